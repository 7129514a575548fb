# SPDX-License-Identifier: Apache-2.0
"""Traces of chains as ArviZ takes them, what it says of them, and what is refused."""

import re
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from support import assert_same_bits

from gibbs_ext import BipartiteBoltzmann, ChimeraGraph, ColoredGraph, GraphBoltzmann, diagnostics
from gibbs_ext.diagnostics import MixingWarning

PAIR = BipartiteBoltzmann(torch.tensor([-1.0]), torch.tensor([-1.0]), torch.tensor([[2.0]]))


def grid(*batch: int) -> GraphBoltzmann:
    graph = ChimeraGraph(1)
    return GraphBoltzmann(graph, torch.randn(*batch, 8), 0.3 * torch.randn(graph.num_edges))


@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize(("thin", "warmup"), [(1, 0), (3, 5)])
def test_a_recorded_run_is_that_of_sample(batch: tuple[int, ...], thin: int, warmup: int) -> None:
    model = grid(*batch)
    data = diagnostics.record(model, 5, 4, thin=thin, warmup=warmup, units=[6, 1], seed=1)
    draws = torch.stack([model.sample((5,), warmup + (i + 1) * thin, seed=1) for i in range(4)])
    expected = diagnostics.to_inference_data(model, draws, units=[6, 1], thin=thin)
    assert data.posterior.drop_attrs().identical(expected.posterior.drop_attrs())
    assert data.posterior.attrs["thin"] == thin
    assert data.posterior.energy.dims == ("chain", "draw", *[f"batch_{i}" for i in range(len(batch))])
    assert data.posterior.unit.dtype == np.uint8
    assert list(data.posterior.unit_number) == [6, 1]
    assert_same_bits(torch.tensor(data.posterior.unit.values), draws[..., [6, 1]].movedim(1, 0).to(torch.uint8))
    assert np.allclose(data.posterior.energy.values, model.energy(draws).movedim(1, 0), rtol=1e-6)
    assert np.allclose(data.posterior.magnetization.values, (2 * draws - 1).mean(-1).movedim(1, 0))


def test_a_run_from_given_states() -> None:
    model, start = grid(), torch.ones(8)
    data = diagnostics.record(model, 3, 1, initial=start, units=range(8), seed=1)
    assert_same_bits(
        torch.tensor(data.posterior.unit.values[:, 0]), model.sample((3,), 1, initial=start, seed=1).to(torch.uint8)
    )


def test_the_autocorrelation_time_of_a_chain_of_two_states() -> None:
    """left flips from 0 to 1 with probability a and back with b, so that its correlation falls by 1 - a - b a sweep."""
    on = torch.tensor([-1.0, 1.0]).sigmoid()  # of right given left, and of left given right
    up = (1 - on[0]) * on[0] + on[0] * on[1]
    down = (1 - on[1]) * (1 - on[0]) + on[1] * (1 - on[1])
    decay = float(1 - up - down)
    expected = (1 + decay) / (1 - decay)
    assert expected > 1.5
    for thin in (1, 2):
        table = diagnostics.summary(diagnostics.record(PAIR, 40, 2000, thin=thin, warmup=20, units=[0], seed=2))
        of_draws = (1 + decay**thin) / (1 - decay**thin)
        assert table.loc["unit[0]", "autocorrelation_time"] == pytest.approx(thin * of_draws, rel=0.06)
        assert table.loc["unit[0]", "r_hat"] < 1.005
        assert table.loc["unit[0]", "ess_bulk"] == pytest.approx(80_000 / of_draws, rel=0.06)


def test_chains_that_mix_give_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", MixingWarning)
        table = diagnostics.summary(diagnostics.record(grid(2), 4, 1000, seed=3), ["energy"])
    assert list(table.index) == ["energy[0]", "energy[1]"]


def test_chains_that_do_not_mix_give_one() -> None:
    stuck = GraphBoltzmann(ColoredGraph(2, [(0, 1)]), torch.full((2,), -20.0), torch.full((1,), 40.0))
    data = diagnostics.record(stuck, 4, 500, seed=1)
    text = r"^diagnostics\.summary: the chains may not have mixed: R-hat is up to .* \(magnetization\), above 1\.01"
    with pytest.warns(MixingWarning, match=text) as caught:
        table = diagnostics.summary(data)
    assert caught[0].filename == __file__
    assert table.loc["magnetization", "ess_bulk"] < 10
    assert table.loc["energy", ["r_hat", "autocorrelation_time"]].isna().all()  # it never changes


@pytest.mark.parametrize(
    ("chains", "draws", "text"),
    [
        (4, 50, r"the effective sample size is down to \d+ \(\w+\), below 100 for each of 4 chains$"),
        (4, 3, r": 3 draws are too few$"),
        (1, 1000, r": there is one chain, whose R-hat says little: take several from different starts$"),
    ],
)
def test_too_little_to_tell_gives_a_warning(chains: int, draws: int, text: str) -> None:
    with pytest.warns(MixingWarning, match=text):
        diagnostics.summary(diagnostics.record(grid(), chains, draws, seed=3))


def test_chains_that_never_move_give_a_warning() -> None:
    frozen = GraphBoltzmann(ColoredGraph(2, [(0, 1)]), torch.full((2,), -40.0), torch.full((1,), 80.0))
    data = diagnostics.record(frozen, 4, 500, initial=torch.zeros(2), seed=1)
    with pytest.warns(MixingWarning, match="nothing changes, so that nothing can be told of mixing$"):
        diagnostics.summary(data)


def test_traces_and_histograms_are_axes() -> None:
    import matplotlib.pyplot as plt

    data = diagnostics.record(grid(2), 3, 50, units=[3], seed=1)
    axes = diagnostics.plot(data)
    assert axes.shape == (3, 2)
    assert [a.get_ylabel() for a in axes[:, 1]] == ["energy", "magnetization", "unit"]
    for variable, (histogram, trace) in zip(["energy", "magnetization", "unit"], axes, strict=True):
        values = data.posterior[variable].values.reshape(3, 50, 2)
        lines = np.stack([line.get_ydata() for line in trace.lines])
        assert np.array_equal(lines, values.transpose(2, 0, 1).reshape(6, 50))
        assert histogram.patches
    plt.close(axes[0, 0].figure)
    _, given = plt.subplots(1, 2)
    shown = diagnostics.plot(diagnostics.record(grid(), 2, 50, seed=1), ["energy"], axes=given[None])
    assert shown[0, 0] is given[0]
    with pytest.raises(ValueError, match=r"^diagnostics\.plot: axes must have shape \[3, 2\], got \[2\]"):
        diagnostics.plot(data, axes=given)
    plt.close(given[0].figure)


def test_progress_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    diagnostics.record(grid(), 1, 3, seed=1)
    assert capsys.readouterr().err == ""
    diagnostics.record(grid(), 1, 3, seed=1, progress=True)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "text", "options"),
    [
        (TypeError, "record: model must be a BipartiteBoltzmann or a GraphBoltzmann, got int", {"model": 1}),
        (ValueError, "record: num_chains must be at least 1, got 0", {"num_chains": 0}),
        (ValueError, "record: num_draws must be at least 1, got 0", {"num_draws": 0}),
        (ValueError, "record: thin must be at least 1, got 0", {"thin": 0}),
        (ValueError, "record: warmup must be at least 0, got -1", {"warmup": -1}),
        (ValueError, "record: units must be below 2, the model's number of units, got 2", {"units": [2]}),
        (ValueError, "record: units must be at least 0, got -1", {"units": [-1]}),
        (ValueError, "record: units must be distinct, got [1, 1]", {"units": [1, 1]}),
        (ValueError, "record: warmup + num_draws * thin must be at most 2^40, got 46", {"warmup": 2**62}),
        (TypeError, "record: units must be a sequence of integers, got 3", {"units": 3}),
        (ValueError, "record: initial must broadcast to shape [4, 1], got [3]", {"initial": torch.zeros(3)}),
        (ValueError, "record: give generator or seed, not both", {"seed": 1, "generator": torch.Generator()}),
    ],
)
def test_bad_arguments_of_record(error: type[Exception], text: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"^diagnostics.{re.escape(text)}"):
        diagnostics.record(**{"model": PAIR, "num_draws": 2} | options)


@pytest.mark.parametrize(
    ("text", "draws"),
    [
        ("draws must have shape [..., 2], got [2, 3, 5]", torch.zeros(2, 3, 5)),
        ("draws must have shape [D, C, 2], got [3, 2]", torch.zeros(3, 2)),
        ("draws must hold a draw of a chain, got shape [0, 3, 2]", torch.zeros(0, 3, 2)),
        ("draws must hold 0 and 1 only, got 0.5", torch.full((2, 3, 2), 0.5)),
        ("draws must be on the model's device, cpu, got meta", torch.zeros(2, 3, 2, device="meta")),
    ],
)
def test_bad_draws(text: str, draws: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=f"^diagnostics.to_inference_data: {re.escape(text)}"):
        diagnostics.to_inference_data(PAIR, draws)


@pytest.mark.parametrize("function", [diagnostics.summary, diagnostics.plot])
def test_bad_data_and_variables(function) -> None:
    data, name = diagnostics.record(PAIR, 2, 5, seed=1), f"^diagnostics.{function.__name__}: "
    with pytest.raises(ValueError, match=name + r"variables must be among energy, magnetization, got 'spin'$"):
        function(data, ["spin"])
    with pytest.raises(
        ValueError, match=name + r"variables must name at least one of energy, magnetization, got none$"
    ):
        function(data, [])
    with pytest.raises(TypeError, match=name + r"data must be an arviz\.InferenceData with a posterior, got Tensor$"):
        function(torch.zeros(3))


def test_draws_that_require_grad_and_vmap() -> None:
    draws = torch.zeros(3, 2, 2).requires_grad_()
    assert diagnostics.to_inference_data(PAIR, draws).posterior.energy.shape == (2, 3)

    def run(bias: torch.Tensor) -> torch.Tensor:
        diagnostics.record(BipartiteBoltzmann(bias, PAIR.right_bias, PAIR.weight), 2, 3, seed=1)
        return bias

    with pytest.raises(NotImplementedError, match=r"^diagnostics\.record: torch\.vmap is not supported"):
        torch.vmap(run)(torch.zeros(3, 1))


@pytest.mark.parametrize(
    ("package", "text"),
    [("arviz", "needs arviz; pip install 'arviz<1'"), ("tqdm.auto", "progress needs tqdm; pip install tqdm")],
)
def test_a_missing_package_is_named(package: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"^diagnostics.record: {re.escape(text)}"):
        diagnostics.record(PAIR, 2, 5, progress=True)
