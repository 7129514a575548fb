# SPDX-License-Identifier: Apache-2.0
"""Metropolis sweeps of coloured graphs: identities, edges and exact law. test_graph_sweeps.py holds more tests."""

import functools
import warnings

import graph_support
import pytest
import torch
from graph_support import (
    KINDS,
    GraphParameters,
    complete_graph,
    exact_energies,
    exact_graph_probabilities,
    exact_metropolis_sweeps,
    gauged,
    graph_named,
    grid_graph,
    parameters_of,
    random_graph_parameters,
    star_graph,
)
from support import (
    all_states,
    assert_same_bits,
    chi_square_excess,
    random_bits,
)

from gibbs_ext import ChimeraGraph, CouplingResolutionWarning, graph_gibbs, graph_metropolis

both = functools.partial(graph_support.both, graph_metropolis)


# Identities -------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("name", ["chimera with holes", "K20", "pegasus-like"])
def test_gauge_transformation(name, kind):
    """The model in which some units z_i are turned into 1 - z_i flips the same units, to the bit.

    Parameters are multiples of 2^-4, which makes fields exact.
    """
    graph = graph_named(name)
    n, chains = graph.num_nodes, 60
    p = GraphParameters(*(torch.round(16 * x) / 16 for x in parameters_of(kind, graph, chains)))
    state, flipped = random_bits(chains, n), torch.rand(n) < 0.5

    def by_gauge(bias, coupling):
        z = graph_metropolis((state - flipped.float()).abs(), bias, coupling, graph, 6, beta=0.7, seed=9)
        return (z - flipped.float()).abs()

    transformed, wrong_bias = gauged(graph, p, flipped)
    actual = graph_metropolis(state, *p, graph, 6, beta=0.7, seed=9)
    assert_same_bits(by_gauge(*transformed), actual)
    assert not by_gauge(wrong_bias, transformed.coupling).equal(actual)  # a planted fault: a bias not transformed


# Edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 1e-50])  # 1e-50 is 0 in float32
@KINDS
@pytest.mark.filterwarnings("ignore::gibbs_ext.CouplingResolutionWarning")
def test_at_beta_zero_every_unit_flips(beta, kind):
    """Fields may even overflow float32."""
    graph = graph_named("chimera with holes")
    p, state = parameters_of(kind, graph, 150), random_bits(150, graph.num_nodes)
    for coupling in (p.coupling, p.coupling.sign() * 1e38):
        for num_sweeps in (1, 2):
            flipped = both(state, p.bias, coupling, graph, num_sweeps, beta=beta, seed=4)
            assert flipped.equal((state - num_sweeps % 2).abs())
    clamp = torch.rand(graph.num_nodes) < 0.5
    flipped = both(state, *p, graph, 1, beta=beta, clamp=clamp, seed=4)
    assert flipped.equal(torch.where(clamp, state, 1 - state))


@pytest.mark.filterwarnings("ignore::gibbs_ext.CouplingResolutionWarning")
@pytest.mark.parametrize("name", ["grid", "chimera", "K20", "odd ring"])
def test_frozen_sweeps_never_raise_the_energy_and_flip_at_ties(name):
    """beta is the largest that float32 holds. Integer parameters make many ties."""
    graph = graph_named(name)
    n, beta = graph.num_nodes, torch.finfo(torch.float32).max
    bias, coupling = torch.randint(-2, 3, (n,)).float(), torch.randint(2, (graph.num_edges,)).float() * 2 - 1
    u, v = graph.edges.unbind(-1)

    def energies(z):
        return -(z @ bias) - (z[:, u] * z[:, v]) @ coupling

    state, ties = random_bits(100, n), 0
    for sweep in range(5):
        whole = graph_metropolis(state, bias, coupling, graph, 1, beta=beta, seed=3)
        # Colours are updated one by one, so the state before determines the update of each unit.
        for color in range(graph.num_colors):
            fields = bias.expand(100, n).clone()
            fields.index_add_(-1, u, state[:, v] * coupling).index_add_(-1, v, state[:, u] * coupling)
            moves = (graph.colors == color) & ((1 - 2 * state) * fields >= 0)
            ties += int((moves & (fields == 0)).sum())
            after = both(state, bias, coupling, graph, 1, beta=beta, clamp=graph.colors != color, seed=3)
            assert after.equal(torch.where(moves, 1 - state, state)), f"sweep {sweep}"
            assert (energies(after) <= energies(state)).all()
            state = after
        assert_same_bits(whole, state)
    assert ties > 30


def test_resolution_warning():
    graph = star_graph(3)
    with pytest.warns(CouplingResolutionWarning, match=r"^graph_metropolis: coupling"):
        graph_metropolis(torch.zeros(4), torch.zeros(4), torch.full((3,), 1e6), graph, 1, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graph_metropolis(torch.zeros(4), torch.zeros(4), torch.full((3,), 1e6), graph, 1, beta=1e-6, seed=0)


# Statistics: by the thresholds of tests/support.py, with planted faults that must exceed them ------------------------

CHAINS = 100_000
MODELS = {
    "grid": lambda: grid_graph(2, 3),
    "K5": lambda: complete_graph(5),
    "chimera cell": lambda: ChimeraGraph(1),
}


def model_named(name):
    graph = MODELS[name]()
    return graph, random_graph_parameters(graph, generator=torch.Generator().manual_seed(4))


def draw(graph, parameters, num_sweeps, **kwargs):
    return graph_metropolis(torch.zeros(CHAINS, graph.num_nodes), *parameters, graph, num_sweeps, seed=1, **kwargs)


@pytest.mark.parametrize("name", MODELS)
def test_statistics_of_few_sweeps(name, instruction_set):
    """The distribution one and two sweeps after the start, which mixing does not hide."""
    graph, p = model_named(name)
    for num_sweeps in (1, 2):
        for beta in (0.5, 1.0):
            expected = exact_metropolis_sweeps(graph, p, num_sweeps, beta)
            assert chi_square_excess(draw(graph, p, num_sweeps, beta=beta), expected) < 1
    expected = exact_metropolis_sweeps(graph, p, 2)
    bias = p.bias + 0.1 * torch.eye(graph.num_nodes)[0]
    faults = [
        draw(graph, p, 2, beta=1.05),
        draw(graph, GraphParameters(bias, p.coupling), 2),
        draw(graph, p, 3),
        graph_gibbs(torch.zeros(CHAINS, graph.num_nodes), *p, graph, 2, seed=1),
    ]
    assert all(chi_square_excess(z, expected) > 1 for z in faults)


@pytest.mark.parametrize("name", MODELS)
def test_statistics_of_many_sweeps(name, instruction_set):
    graph, p = model_named(name)
    exact = exact_graph_probabilities(graph, p)
    # After 60 sweeps from this start, CHAINS draws cannot tell their law from the model's.
    assert CHAINS * ((exact_metropolis_sweeps(graph, p, 60) - exact) ** 2 / exact).sum() < 0.1
    assert chi_square_excess(draw(graph, p, 60), exact) < 1
    assert chi_square_excess(draw(graph, p, 60, beta=1.05), exact) > 1
    assert chi_square_excess(draw(graph, p, 1), exact) > 1


def test_statistics_of_clamped_units():
    graph, p = model_named("chimera cell")
    start = torch.tensor([True, False, False, False, True, True, False, False])
    z = graph_metropolis(start.expand(CHAINS, 8), *p, graph, 60, clamp=start, seed=1)
    conditioned = exact_graph_probabilities(graph, p) * (all_states(8)[:, start] == 1).all(-1)
    assert chi_square_excess(z, conditioned / conditioned.sum()) < 1
    assert chi_square_excess(draw(graph, p, 60), conditioned / conditioned.sum()) > 1


def test_enumeration_can_fail():
    """The exact sweeps converge to the model's distribution, which is not flat."""
    graph, p = model_named("grid")
    exact = exact_graph_probabilities(graph, p)
    assert (exact_metropolis_sweeps(graph, p, 500) - exact).abs().max() < 1e-12
    energies = exact_energies(graph, p)
    assert (energies - energies.mean()).abs().max() > 1  # the model is not flat
