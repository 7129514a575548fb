# SPDX-License-Identifier: Apache-2.0
"""Perfect samples against enumeration and elimination, and what splits, gauges and refusals must do to them."""

import math
import re
from typing import Any

import pytest
import torch
from support import all_states, assert_same_bits, chi_square_excess, z_threshold
from torch import Tensor

from gibbs_ext import (
    BipartiteBoltzmann,
    ChimeraGraph,
    ColoredGraph,
    GraphBoltzmann,
    exact_marginals,
    graph_gibbs,
    perfect_samples,
)

SQUARE = ColoredGraph(4, [(0, 1), (1, 2), (2, 3), (0, 3)])


def probabilities(model: Any) -> Tensor:
    """[2^N] float64, of one model, by brute force."""
    return (-model.energy(all_states(model.num_units))).softmax(0)


def bipartite(signs_of_left: Tensor, signs_of_right: Tensor, *batch: int) -> BipartiteBoltzmann:
    n1, n2 = len(signs_of_left), len(signs_of_right)
    weight = torch.rand(*batch, n1, n2).double() * signs_of_left.double()[:, None] * signs_of_right.double()
    return BipartiteBoltzmann(torch.randn(*batch, n1).double(), torch.randn(n2).double(), weight)


@pytest.mark.parametrize("signs", [(1, 1, 1), (1, -1, 1)])
def test_the_law_of_a_bipartite_model(signs: tuple[int, ...]) -> None:
    model = bipartite(torch.tensor(signs), torch.tensor([1, 1, -1 if min(signs) < 0 else 1]))
    assert chi_square_excess(perfect_samples(model, 100_000, seed=1), probabilities(model)) < 1


@pytest.mark.parametrize("coupling", [[1.5, 0.5, 2.0, 1.0], [1.5, -0.5, 2.0, -1.0], [-3.0, 0.0, 2.0, -1.0], [0.0] * 4])
def test_the_law_of_a_graph(coupling: list[float]) -> None:
    model = GraphBoltzmann(SQUARE, torch.tensor([-1.0, 0.5, -2.0, 0.25]), torch.tensor(coupling))
    z = perfect_samples(model, 100_000, seed=2)
    assert z.dtype == torch.float32
    assert chi_square_excess(z, probabilities(model.expand(()))) < 1


def test_meeting_forward_in_time_would_be_found() -> None:
    """The state in which two chains from 0 on meet first has another law, so the tests of the law can fail."""
    model = GraphBoltzmann(SQUARE, torch.tensor([-1.0, 0.5, -2.0, 0.25]), torch.tensor([1.5, 0.5, 2.0, 1.0]))
    chains = 100_000
    both = torch.stack([torch.zeros(chains, 4), torch.ones(chains, 4)])
    met = torch.full((chains, 4), -1.0)
    for sweep in range(100):
        both = graph_gibbs(
            both, model.bias, model.coupling, SQUARE, 1, seed=1, sweep_offset=sweep,
            chain_offset=torch.arange(chains).expand(2, chains),
        )  # fmt: skip
        is_new = (both[0] == both[1]).all(-1) & (met[:, 0] < 0)
        met[is_new] = both[0][is_new]
    assert (met >= 0).all()
    assert chi_square_excess(met, probabilities(model)) > 1
    assert chi_square_excess(perfect_samples(model, chains, seed=1), probabilities(model)) < 1


@pytest.mark.parametrize("flip", [False, True])
def test_the_marginals_of_a_chimera_graph(flip: bool) -> None:
    graph = ChimeraGraph(2)
    sign = torch.where(torch.rand(graph.num_nodes) < 0.5, -1.0, 1.0) if flip else torch.ones(graph.num_nodes)
    u, v = graph.edges.unbind(1)
    coupling = torch.rand(graph.num_edges) * sign[u] * sign[v]
    model = GraphBoltzmann(
        graph, torch.randn(graph.num_nodes) - torch.zeros(graph.num_nodes).index_add(0, u, coupling), coupling
    )
    count = 20_000
    z, exact = perfect_samples(model, count, seed=3).double(), exact_marginals(model)
    for found, expected in ((z, exact.single), (z[:, u] * z[:, v], exact.pair)):
        error = (expected * (1 - expected) / count).sqrt()
        assert ((found.mean(0) - expected) / error).abs().max() < z_threshold(len(expected))


def test_a_batch_of_models_and_a_split_call() -> None:
    """A sample depends on its number, and not on which others are drawn with it or how long they take."""
    coupling = torch.rand(3, 4) * torch.tensor([[0.1], [1.0], [6.0]])
    model = GraphBoltzmann(SQUARE, -coupling.sum(-1, keepdim=True).expand(3, 4) / 4, coupling)
    z = perfect_samples(model, 40, seed=4)
    assert z.shape == (40, 3, 4)
    assert_same_bits(perfect_samples(model, 15, seed=4), z[:15])
    assert_same_bits(perfect_samples(model, 25, seed=4, chain_offset=45), z[15:])
    one = GraphBoltzmann(SQUARE, model.bias[0], coupling[0])
    assert_same_bits(perfect_samples(one, 1, seed=4, chain_offset=3)[0], z[1, 0])
    assert_same_bits(perfect_samples(model, 40, seed=4, max_sweeps=2**14), z)
    assert not perfect_samples(model, 40, seed=5).equal(z)
    torch.manual_seed(6)
    first = perfect_samples(model, 40)
    assert_same_bits(perfect_samples(model, 40, generator=torch.Generator().manual_seed(6)), first)
    assert perfect_samples(model, 0, seed=1).shape == (0, 3, 4)
    assert perfect_samples(model.expand((2, 3)), 5, seed=4).shape == (5, 2, 3, 4)
    assert perfect_samples(GraphBoltzmann(SQUARE, torch.zeros(0, 4), torch.zeros(4)), 5).shape == (5, 0, 4)


def test_each_model_has_a_gauge_of_its_own() -> None:
    coupling = torch.tensor([[1.0, 1.0, 1.0, 1.0], [-1.0, 1.0, 1.0, -1.0], [-1.0, -1.0, -1.0, -1.0]])
    bias = torch.tensor([0.5, -1.0, 0.25, -0.5])
    z = perfect_samples(GraphBoltzmann(SQUARE, bias, coupling), 60_000, seed=7)
    for m in range(3):
        assert chi_square_excess(z[:, m], probabilities(GraphBoltzmann(SQUARE, bias, coupling[m]))) < 1


def test_nothing_is_mutated_and_no_gradient_flows() -> None:
    parameters = torch.zeros(4, requires_grad=True), torch.tensor([-1.0, 1.0, -1.0, 1.0], requires_grad=True)
    before = [p.detach().clone() for p in parameters]
    z = perfect_samples(GraphBoltzmann(SQUARE, *parameters), 3, seed=1)
    assert not z.requires_grad
    assert all(p.equal(b) for p, b in zip(parameters, before, strict=True))


def test_inference_mode_and_a_long_path() -> None:
    with torch.inference_mode():
        assert perfect_samples(GraphBoltzmann(SQUARE, torch.zeros(4), -torch.ones(4)), 2, seed=1).shape == (2, 4)
    count = 16_000  # the labels of the gauge reach the path's end in few steps
    path = ColoredGraph(count, torch.stack([torch.arange(count - 1), torch.arange(1, count)], 1))
    bias = torch.full((count,), 2.0).index_fill(0, torch.tensor([0, count - 1]), 1.0)
    z = perfect_samples(GraphBoltzmann(path, bias, torch.full((count - 1,), -2.0)), 1, seed=1)[0]
    equal = 1 / (1 + math.e)  # spins whose coupling is -1 / 2
    error = (equal * (1 - equal) / count) ** 0.5
    assert abs((z[1:] == z[:-1]).double().mean() - equal) < 6 * error


def test_a_frustrated_model_is_refused() -> None:
    coupling = torch.tensor([1.0, 1.0, 1.0, -1.0])
    text = "model must have couplings of at least 0 once some units are flipped, got a loop of edges with an odd number"
    with pytest.raises(ValueError, match=f"^perfect_samples: {text}"):
        perfect_samples(GraphBoltzmann(SQUARE, torch.zeros(4), coupling), 1)
    batch = torch.stack([coupling.abs(), coupling])
    with pytest.raises(ValueError, match=re.escape("(model 1 of the batch)")):
        perfect_samples(GraphBoltzmann(SQUARE, torch.zeros(4), batch), 1)


def test_chains_that_do_not_meet_are_an_error() -> None:
    strong = GraphBoltzmann(SQUARE, torch.full((4,), -40.0), torch.full((4,), 40.0))
    text = "max_sweeps must be large enough for all pairs of chains to meet, got 100, after which 7 of 7 have not met"
    with pytest.raises(RuntimeError, match=f"^perfect_samples: {text}"):
        perfect_samples(strong, 7, max_sweeps=100, seed=1)


@pytest.mark.parametrize(
    ("error", "text", "options"),
    [
        (ValueError, "num_samples must be at least 0, got -1", {"num_samples": -1}),
        (TypeError, "num_samples must be an integer, got 1.5", {"num_samples": 1.5}),
        (ValueError, "max_sweeps must be at least 1, got 0", {"max_sweeps": 0}),
        (ValueError, "max_sweeps must be at most 2^43, got 17592186044416", {"max_sweeps": 2**44}),
        (ValueError, "chain_offset must be at least 0, got -1", {"chain_offset": -1}),
        (ValueError, "give generator or seed, not both", {"generator": torch.Generator(), "seed": 1}),
        (TypeError, "model must be a BipartiteBoltzmann or a GraphBoltzmann, got int", {"model": 1}),
    ],
)
def test_bad_arguments(error: type[Exception], text: str, options: dict[str, Any]) -> None:
    model = GraphBoltzmann(SQUARE, torch.zeros(4), torch.zeros(4))
    with pytest.raises(error, match=f"^perfect_samples: {re.escape(text)}"):
        perfect_samples(**{"model": model, "num_samples": 1} | options)


def test_a_value_that_is_not_finite() -> None:
    for bias, coupling in ((math.nan, 1.0), (0.0, math.nan), (0.0, math.inf), (math.nan, -1.0), (0.0, -math.inf)):
        model = GraphBoltzmann(SQUARE, torch.full((4,), bias), torch.full((4,), coupling), validate_args=False)
        with pytest.raises(ValueError, match=r"^perfect_samples: .*finite"):
            perfect_samples(model, 1, seed=1)


def test_vmap_is_refused() -> None:
    def draw(bias: Tensor) -> Tensor:
        return perfect_samples(GraphBoltzmann(SQUARE, bias, torch.zeros(4)), 2, seed=1)

    with pytest.raises(NotImplementedError, match=r"^perfect_samples: torch\.vmap is not supported"):
        torch.vmap(draw)(torch.zeros(3, 4))
