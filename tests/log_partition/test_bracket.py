# SPDX-License-Identifier: Apache-2.0
"""The bracket of log Z and Bennett's estimate: coverage of error bars, order, contradictions, and what is refused."""

import re
import sys
import warnings

import pytest
import torch
from graph_support import random_graph, random_graph_parameters
from support import assert_close, random_parameters

from gibbs_ext import (
    BipartiteBoltzmann,
    BracketWarning,
    EffectiveSampleSizeWarning,
    GraphBoltzmann,
    annealed_importance_sampling,
    bracket_log_partition,
    exact_log_partition,
    exact_samples,
    population_annealing,
)

GRAPH = random_graph(9, 20, seed=4)
SEEDS = 200


def bipartite() -> BipartiteBoltzmann:
    return BipartiteBoltzmann(*random_parameters(10, 8, dtype=torch.float64))


def on_graph() -> GraphBoltzmann:
    return GraphBoltzmann(GRAPH, *random_graph_parameters(GRAPH, ((), ()), dtype=torch.float64))


@pytest.mark.parametrize("make", [bipartite, on_graph])
@pytest.mark.parametrize("betas", [3, 30])
def test_error_bars_cover_as_often_as_they_say(make, betas: int) -> None:
    """Over 200 seeds, which are the models of a batch here. Binomial limits of probability 1e-6: 0.86 and 0.995."""
    model = make()
    exact, chains = exact_log_partition(model), 400
    draws = exact_samples(model, chains * SEEDS, seed=1).reshape(chains, SEEDS, -1)
    result = bracket_log_partition(model.expand((SEEDS,)), draws, betas, seed=2)
    for estimate, error in (
        (result.log_partition, result.standard_error),
        (result.lower, result.forward.standard_error),
        (result.upper, result.reverse.standard_error),
    ):
        covered = ((estimate - exact).abs() < 1.96 * error).double().mean()
        assert 0.86 < covered < 0.996
    # Bennett's estimate has no more variance than either direction's, and the directions err to their own sides.
    assert result.log_partition.std() < 1.05 * min(result.lower.std(), result.upper.std())
    spread = max(result.lower.std(), result.upper.std()) / SEEDS**0.5
    assert result.lower.mean() < exact + 4 * spread
    assert result.upper.mean() > exact - 4 * spread


def test_its_parts_are_annealing_in_both_directions() -> None:
    model = bipartite().expand((2, 3))
    draws = exact_samples(model, 50, seed=1)
    result = bracket_log_partition(model, draws, 10, seed=5, chain_offset=7)
    forward = annealed_importance_sampling(model, 50, 10, seed=5, chain_offset=7)
    reverse = annealed_importance_sampling(
        model, 50, 10, reverse=True, initial=draws[..., :10], seed=5, chain_offset=7 + 300
    )
    assert result.forward.log_weights.equal(forward.log_weights)
    assert result.reverse.log_weights.equal(reverse.log_weights)
    assert_close(result.lower, forward.log_partition, 0)
    assert_close(result.upper, reverse.log_partition, 0)
    assert result.log_partition.shape == result.standard_error.shape == (2, 3)
    one = GraphBoltzmann(GRAPH, torch.zeros(9), torch.zeros(20))
    assert bracket_log_partition(one, exact_samples(one, 5, seed=1), 3, seed=1).log_partition.shape == ()


@pytest.mark.parametrize("make", [bipartite, on_graph])
def test_progress_bars_change_last_bits_at_most(make, capsys: pytest.CaptureFixture[str]) -> None:
    model = make()
    draws = model.sample((50,), 20, seed=1)
    plain, shown = (bracket_log_partition(model, draws, 250, progress=progress, seed=3) for progress in (False, True))
    assert capsys.readouterr().err.count("annealed_importance_sampling: 100%") == 2
    for name in ("log_partition", "lower", "upper", "standard_error"):
        assert_close(getattr(shown, name), getattr(plain, name), 1e-9)
    plain, shown = (
        population_annealing(model, 50, 20, num_sweeps=2, progress=progress, seed=3) for progress in (False, True)
    )
    assert "population_annealing" in capsys.readouterr().err
    assert shown.log_partition.equal(plain.log_partition)


def test_draws_of_another_model_contradict_the_forward_estimate() -> None:
    sides = torch.linspace(-2, 2, 10).double(), torch.linspace(2, -2, 8).double()
    model = BipartiteBoltzmann(*sides, torch.full((10, 8), 0.1).double())
    draws = exact_samples(model, 2000, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = bracket_log_partition(model, draws, 10, seed=1)
    assert_close(result.log_partition, exact_log_partition(model), 0.1)
    against_biases = (torch.cat(sides) < 0).to(draws)
    text = r"the forward estimate [\d.]+ and the reverse one [\d.]+ are [\d.]+ standard errors apart; one of them"
    with pytest.warns(BracketWarning, match=f"^bracket_log_partition: {text}") as caught:
        bracket_log_partition(model, against_biases.expand_as(draws), 3, seed=1)
    assert caught[0].filename == __file__


def test_works_that_do_not_overlap_give_a_wide_error_bar() -> None:
    model = BipartiteBoltzmann(*random_parameters(100, 100, scale=10)).expand((20,))
    with pytest.warns(EffectiveSampleSizeWarning), pytest.warns(BracketWarning):
        result = bracket_log_partition(model, torch.randint(2, (50, 20, 200)).float(), 2, seed=1)
    assert (result.standard_error >= (result.upper - result.lower).abs() / 2).all()
    assert result.log_partition.isfinite().all()


def test_an_estimate_that_pymbar_does_not_find(monkeypatch: pytest.MonkeyPatch) -> None:
    from pymbar import other_estimators
    from pymbar.utils import ConvergenceError

    def fail(*args: object, **options: object) -> None:
        raise ConvergenceError

    monkeypatch.setattr(other_estimators, "bar", fail)
    model = bipartite()
    with pytest.warns(BracketWarning):
        result = bracket_log_partition(model, exact_samples(model, 100, seed=1), 10, seed=1)
    assert result.log_partition == (result.lower + result.upper) / 2
    assert result.standard_error == (result.lower - result.upper).abs() / 2


@pytest.mark.parametrize(
    ("error", "text", "options"),
    [
        (TypeError, "model must be a BipartiteBoltzmann or a GraphBoltzmann, got int", {"model": 1}),
        (TypeError, "draws must be a tensor, got int", {"draws": 1}),
        (ValueError, "draws must have shape [C, 2] with C at least 2, got [5, 3]", {"draws": torch.zeros(5, 3)}),
        (ValueError, "draws must have shape [C, 2] with C at least 2, got [1, 2]", {"draws": torch.zeros(1, 2)}),
        (ValueError, "betas must be at least 1, got 0", {"betas": 0}),
        (ValueError, "betas must rise from 0 to 1, got 0 to 0.5", {"betas": [0.0, 0.5]}),
        (ValueError, "chain_offset must be at least 0, got -1", {"chain_offset": -1}),
        (ValueError, "chain_offset must leave room for all chains below 2^48, got 281", {"chain_offset": 2**48 - 9}),
        (ValueError, "draws must hold 0 and 1 only, got nan", {"draws": torch.tensor([[0.0, torch.nan]] * 5)}),
        (ValueError, "give generator or seed, not both", {"generator": torch.Generator(), "seed": 1}),
    ],
)
def test_bad_arguments(error: type[Exception], text: str, options: dict) -> None:
    model = BipartiteBoltzmann(torch.zeros(1), torch.zeros(1), torch.zeros(1, 1))
    with pytest.raises(error, match=f"^bracket_log_partition: {re.escape(text)}"):
        bracket_log_partition(**{"model": model, "draws": torch.zeros(5, 2), "betas": 3} | options)


def test_pymbar_is_named_if_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymbar.other_estimators", None)
    with pytest.raises(ImportError, match=r"^bracket_log_partition: needs pymbar; pip install pymbar$"):
        bracket_log_partition(bipartite(), torch.zeros(5, 18), 3)
