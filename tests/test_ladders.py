# SPDX-License-Identifier: Apache-2.0
"""log Z from parallel tempering: coverage of error bars, every beta, and when it warns."""

import doctest
import itertools
import math
import re
import sys
import warnings

import pytest
import torch
from graph_support import random_graph, random_graph_parameters
from support import assert_close, assert_same_bits, random_parameters

import gibbs_ext as gx
from gibbs_ext import LadderWarning, ladders, parallel_tempering, tempering_log_partition
from gibbs_ext.log_partition.bracket import bennett_estimator

GRAPH = random_graph(9, 20, seed=4)
SEEDS = 200


def bipartite(scale: float = 1.0, dtype: torch.dtype = torch.float64) -> gx.BipartiteBoltzmann:
    return gx.BipartiteBoltzmann(*random_parameters(10, 8, dtype=dtype, scale=scale))


def on_graph(dtype: torch.dtype = torch.float64) -> gx.GraphBoltzmann:
    return gx.GraphBoltzmann(GRAPH, *random_graph_parameters(GRAPH, ((), ()), dtype=dtype))


def even(count: int) -> torch.Tensor:
    return torch.linspace(0, 1, count)


def covered(estimates: torch.Tensor, errors: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((estimates - exact).abs() < 1.96 * errors).double().mean())


# Error bars -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [bipartite, on_graph])
@pytest.mark.parametrize(("num_betas", "num_rounds"), [(3, 12), (6, 60)])
def test_error_bars_cover_as_often_as_they_say(make, num_betas: int, num_rounds: int) -> None:
    """Over 200 seeds, which are the models of a batch here. Binomial limits of probability 1e-6: 0.86 and 0.995."""
    model = make()
    exact = gx.exact_log_partition(model)
    result = parallel_tempering(model.expand((SEEDS,)), 40, even(num_betas), num_rounds, seed=1)
    estimate = tempering_log_partition(result)
    assert 0.86 < covered(estimate.log_partition, estimate.standard_error, exact) < 0.996
    assert abs((estimate.log_partition - exact).mean()) < 5 * estimate.log_partition.std() / SEEDS**0.5
    # Each beta's, too: of the models with parameters times beta.
    for beta, ratio, error in zip(result.betas, estimate.log_ratios, estimate.log_ratio_errors, strict=True):
        cooled = model._mapped(lambda parameter, _, beta=beta: parameter * beta)
        if beta:
            at_beta = gx.exact_log_partition(cooled) - model.num_units * math.log(2)
            assert 0.86 < covered(ratio, error, at_beta) < 0.996
        else:
            assert (ratio == 0).all()
            assert (error == 0).all()


def test_error_bars_for_independent_samples_cover_too_seldom() -> None:
    """The planted fault that the errors above must not have: those of pymbar, which know of no correlation."""
    model = bipartite()
    result = parallel_tempering(model.expand((SEEDS,)), 40, even(6), 60, seed=1)
    bennett, kept = bennett_estimator(""), result.energies[12:]
    errors = torch.zeros(SEEDS, dtype=torch.float64)
    for step in range(5):
        works = 0.2 * kept[:, step], -0.2 * kept[:, step + 1]
        of_step = [bennett(*(w[..., seed].flatten().numpy() for w in works))[1] for seed in range(SEEDS)]
        errors += torch.tensor(of_step).square()
    estimate = tempering_log_partition(result).log_partition
    assert covered(estimate, errors.sqrt(), gx.exact_log_partition(model)) < 0.86


def test_more_chains_and_more_rounds_make_smaller_errors() -> None:
    models = on_graph().expand((20,))
    few, chains, rounds = (
        tempering_log_partition(parallel_tempering(models, count, even(4), num_sweeps, seed=1)).standard_error.mean()
        for count, num_sweeps in ((50, 40), (800, 40), (50, 640))
    )
    assert 0.22 < chains / few < 0.28
    assert 0.22 < rounds / few < 0.28


def test_chains_that_make_cluster_moves_count_in_pairs() -> None:
    model = on_graph()
    result = parallel_tempering(model.expand((SEEDS,)), 60, even(4), 40, cluster_moves=True, seed=1)
    estimate = tempering_log_partition(result)
    assert 0.86 < covered(estimate.log_partition, estimate.standard_error, gx.exact_log_partition(model)) < 0.996
    # Two chains that are the same say as much as one.
    alone = parallel_tempering(model, 30, even(4), 40, seed=1)
    twice = alone._replace(energies=alone.energies.repeat_interleave(2, dim=2), cluster_moves=True)
    for ours, theirs in zip(tempering_log_partition(twice), tempering_log_partition(alone), strict=True):
        assert_close(ours, theirs, 1e-9)
    odd = parallel_tempering(model, 41, even(4), 40, cluster_moves=True, seed=1)
    assert 0 < tempering_log_partition(odd).standard_error < 0.1


# What is estimated ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_are_their_models(dtype: torch.dtype) -> None:
    models = [bipartite(scale, dtype) for scale in (0.3, 0.6, 1.0)]
    stacked = [torch.stack(parts).unsqueeze(0) for parts in zip(*(m._parameters for m in models), strict=True)]
    batch = gx.BipartiteBoltzmann(*stacked)
    result = parallel_tempering(batch, 200, even(5), 100, seed=1)
    estimate = tempering_log_partition(result, warmup=10)
    assert estimate.log_partition.shape == estimate.standard_error.shape == (1, 3)
    assert estimate.log_ratios.shape == estimate.log_ratio_errors.shape == (5, 1, 3)
    assert estimate.overlaps.shape == (4, 1, 3)
    for i, model in enumerate(models):
        one = result._replace(energies=result.energies[:, :, :, 0, i])
        alone = tempering_log_partition(one, warmup=10)
        for ours, theirs in zip(estimate, alone, strict=True):
            assert_close(ours[..., 0, i], theirs, 1e-12)
        assert abs(alone.log_partition - gx.exact_log_partition(model)) < 5 * alone.standard_error < 0.2


def test_overlaps_are_those_of_the_laws() -> None:
    model = bipartite(2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gx.TemperingWarning)
        result = parallel_tempering(model, 2000, [0.0, 0.4, 1.0], 100, seed=1)
    states = (torch.arange(2**18).unsqueeze(1) >> torch.arange(18)) & 1
    laws = [(-beta * model.energy(states.double())).softmax(0) for beta in result.betas]
    exact = torch.stack([(2 * p * q / (p + q)).sum() for p, q in itertools.pairwise(laws)])
    assert_close(tempering_log_partition(result).overlaps, exact, 0.01)


def test_ladders_that_do_not_begin_at_zero_give_ratios() -> None:
    model = on_graph()
    warm = tempering_log_partition(parallel_tempering(model, 500, [0.4, 0.7, 1.0], 100, seed=1))
    assert warm.log_partition.isnan()
    assert warm.standard_error.isnan()
    cooled = model._mapped(lambda parameter, _: 0.4 * parameter)
    ratio = gx.exact_log_partition(model) - gx.exact_log_partition(cooled)
    assert abs(warm.log_ratios[-1] - ratio) < 5 * warm.log_ratio_errors[-1] < 0.1
    falling = tempering_log_partition(parallel_tempering(model, 500, [1.0, 0.5, 0.0], 100, seed=1))
    exact = model.num_units * math.log(2) - gx.exact_log_partition(model)
    assert abs(falling.log_ratios[-1] - exact) < 5 * falling.log_ratio_errors[-1] < 0.1
    assert falling.log_partition.isnan()
    single = tempering_log_partition(parallel_tempering(model, 20, [0.0], 5, seed=1))
    assert_close(single.log_partition, torch.tensor(model.num_units * math.log(2), dtype=torch.float64), 1e-12)
    assert single.overlaps.shape == (0,)


def test_runs_that_go_on_are_joined() -> None:
    model = on_graph()
    whole = parallel_tempering(model, 20, even(3), 40, seed=1)
    part = parallel_tempering(model, 20, even(3), 15, seed=1)
    rest = parallel_tempering(model, 20, even(3), 25, seed=1, initial=part)
    joined = rest._replace(energies=torch.cat([part.energies, rest.energies]))
    assert_same_bits(list(tempering_log_partition(joined)), list(tempering_log_partition(whole)))


def test_a_conditional_and_an_empty_batch() -> None:
    model = bipartite()
    conditional = model.conditioned(torch.zeros(2, 18), torch.arange(18) < 5)
    result = parallel_tempering(conditional.model, 300, even(4), 60, seed=1)
    estimate = tempering_log_partition(result)
    errors = (estimate.log_partition - gx.exact_log_partition(conditional.model)).abs()
    assert (errors < 5 * estimate.standard_error).all()
    empty = tempering_log_partition(parallel_tempering(model.expand((0,)), 30, even(3), 5, seed=1))
    assert empty.log_partition.shape == (0,)
    assert empty.overlaps.shape == (2, 0)


def test_a_model_without_parameters_is_exact() -> None:
    model = gx.GraphBoltzmann(GRAPH, torch.zeros(9), torch.zeros(20))
    estimate = tempering_log_partition(parallel_tempering(model, 20, even(3), 5, seed=1))
    assert_close(estimate.log_partition, torch.tensor(9 * math.log(2)).double(), 1e-6)
    assert estimate.standard_error == 0
    assert_close(estimate.overlaps, torch.ones(2).double(), 1e-6)


# Warnings ---------------------------------------------------------------------------------------------------------


def test_a_good_run_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tempering_log_partition(parallel_tempering(bipartite(), 20, even(6), 50, seed=1))


@pytest.mark.filterwarnings("ignore::gibbs_ext.TemperingWarning")
def test_a_gap_in_the_ladder_warns() -> None:
    model = bipartite(3.0)
    result = parallel_tempering(model, 100, [0.0, 1.0], 100, seed=1)
    text = r"the betas 0 and 1 overlap by [\d.e-]+, so that their log Z differ by [\d.]+ \+- [\d.]+ \("
    with pytest.warns(LadderWarning, match=f"^tempering_log_partition: log Z or its error bar .*: {text}") as caught:
        tempering_log_partition(result)
    assert caught[0].filename == __file__
    with pytest.warns(LadderWarning, match="overlap by"):  # one bad model of a batch is enough
        tempering_log_partition(parallel_tempering(model.expand((2,)), 50, [0.0, 1.0], 20, seed=1))


def test_few_independent_samples_warn() -> None:
    """The laws overlap by more than 0.06 here, but two rounds of 20 chains do not show how."""
    model = bipartite(2.0)
    result = parallel_tempering(model, 20, even(3), 30, seed=1)
    with pytest.warns(LadderWarning, match=r"overlap by 0\.\d+, .* \+- 0\.[3-9]"):
        estimate = tempering_log_partition(result, warmup=28)
    assert estimate.overlaps.min() > 0.06
    assert tempering_log_partition(parallel_tempering(model, 400, even(3), 30, seed=1)).standard_error < 0.3


def test_few_chains_warn() -> None:
    with pytest.warns(LadderWarning, match=r": 19 independent chains say little of the error bar \(take 20 or more\)$"):
        tempering_log_partition(parallel_tempering(on_graph(), 19, even(3), 40, seed=1))


def test_a_run_that_has_not_forgotten_its_start_warns() -> None:
    """All ones to begin with, where single flips seldom lead to zeros, on a ladder that is never hot."""
    model = gx.BipartiteBoltzmann(torch.full((6,), -4.0), torch.full((6,), -4.0), torch.full((6, 6), 1.2))
    result = parallel_tempering(model, 400, [0.7, 0.85, 1.0], 200, initial=torch.ones(12), seed=1)
    with pytest.warns(LadderWarning, match=r": the first half of the rounds and the second one differ by [\d.]+"):
        tempering_log_partition(result, warmup=0)


def test_an_estimate_that_pymbar_does_not_find(monkeypatch: pytest.MonkeyPatch) -> None:
    from pymbar import other_estimators
    from pymbar.utils import ConvergenceError

    def fail(*args: object, **options: object) -> None:
        raise ConvergenceError

    result = parallel_tempering(on_graph(), 20, even(3), 40, seed=1)
    monkeypatch.setattr(other_estimators, "bar", fail)
    with pytest.warns(LadderWarning, match="differ by nan"):
        estimate = tempering_log_partition(result)
    assert estimate.log_partition.isnan()
    assert estimate.standard_error.isnan()


# Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "text", "options"),
    [
        (TypeError, "result must be a TemperingResult, got int", {"result": 1}),
        (TypeError, "warmup must be an integer, got 0.5", {"warmup": 0.5}),
        (ValueError, "warmup must be at least 0, got -1", {"warmup": -1}),
        (ValueError, "result must hold 2 rounds after a warmup of 9, got 10 in all", {"warmup": 9}),
    ],
)
def test_bad_arguments(error: type[Exception], text: str, options: dict) -> None:
    result = parallel_tempering(on_graph(), 20, even(3), 10, seed=1)
    with pytest.raises(error, match=f"^tempering_log_partition: {re.escape(text)}"):
        tempering_log_partition(**{"result": result} | options)


def test_a_single_chain_and_vmap_are_refused() -> None:
    result = parallel_tempering(on_graph(), 1, even(3), 10, seed=1)
    with pytest.raises(ValueError, match=r"^tempering_log_partition: result must hold at least 2 chains, got 1$"):
        tempering_log_partition(result)
    pair = parallel_tempering(on_graph(), 2, even(3), 10, cluster_moves=True, seed=1)
    with pytest.raises(ValueError, match=r"at least 2 chains, or 3 that make cluster moves, got 2$"):
        tempering_log_partition(pair)
    with pytest.raises(NotImplementedError, match=r"^tempering_log_partition: torch.vmap is not supported"):
        torch.vmap(lambda energies: tempering_log_partition(result._replace(energies=energies)))(
            result.energies.expand(2, *result.energies.shape)
        )


def test_pymbar_is_named_if_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymbar.other_estimators", None)
    with pytest.raises(ImportError, match=r"^tempering_log_partition: needs pymbar; pip install pymbar$"):
        tempering_log_partition(parallel_tempering(on_graph(), 20, even(3), 10, seed=1))


def test_the_example_in_the_docstring() -> None:
    names = {"torch": torch, **{name: getattr(gx, name) for name in gx.__all__}}
    assert doctest.testmod(ladders, extraglobs=names).failed == 0


@pytest.mark.parametrize("size", [1e30, math.nan])
def test_energies_that_no_estimate_can_be_made_of(size):
    graph = gx.ColoredGraph(3, [(0, 1), (1, 2)])
    result = gx.parallel_tempering(gx.GraphBoltzmann(graph, torch.ones(3), torch.ones(2)), 40, [0.0, 1.0], 20, seed=0)
    with pytest.warns(gx.LadderWarning, match="overlap by nan"):
        found = gx.tempering_log_partition(result._replace(energies=result.energies * size))
    assert found.log_partition.isnan()
