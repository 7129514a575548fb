# SPDX-License-Identifier: Apache-2.0
"""Parallel tempering: the bits, energies and swaps of the reference, whatever the batch or the instruction set."""

import pytest
import torch
from graph_support import graph_named, random_graph_parameters
from support import assert_same_bits, random_bits, random_parameters

from gibbs_ext import ColoredGraph, ops
from gibbs_ext.reference import bipartite_tempering_reference, graph_tempering_reference

# The numbers of betas and chains, the models' batch, the sweeps of a round.
PROBLEMS = {
    "few chains": (3, 5, (), 4),
    "a swap after every sweep": (4, 40, (), 1),
    "one chain of each model": (5, 1, (3,), 2),
    "one beta": (1, 3, (2,), 3),
    "many chains": (2, 70, (2,), 1),
    "no chains": (3, 0, (), 2),
}


def ladder_of(kind):
    """betas [B], their shape in a call, the numbers of the replicas, the batch of parameters, and a round's sweeps."""
    num_betas, num_chains, models, sweeps = PROBLEMS[kind]
    betas = torch.rand(num_betas, dtype=torch.float64).sort()[0] * 2
    columns = torch.arange(num_chains * (2 if models == (2,) else 3 if models else 1)).reshape(num_chains, *models)
    replicas = torch.arange(num_betas).reshape(-1, *[1] * columns.dim())
    chains = (2**33 + columns) * num_betas + replicas
    return betas, betas.reshape(*replicas.shape, 1), chains, models, sweeps


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bipartite_agrees_with_reference(kind, dtype, instruction_set):
    betas, beta, chains, models, sweeps = ladder_of(kind)
    p = [x.to(dtype) for x in random_parameters(37, 20, (models, models, models))]
    for num_swaps, offset in ((5, 2**34), (2, 1), (0, 0)):
        left = random_bits(*chains.shape, 37)
        actual = ops.call(
            "bipartite_tempering", left, *p, beta, torch.tensor(-5), chains, offset * sweeps, sweeps, num_swaps
        )
        expected = bipartite_tempering_reference(
            left, *p, betas, num_swaps, sweeps_per_swap=sweeps, chains=chains, sweep_offset=offset * sweeps, seed=-5
        )
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("name", ["chimera with holes", "star of 20", "no edges"])
@pytest.mark.parametrize("cluster_moves", [False, True])
def test_graph_agrees_with_reference(kind, name, cluster_moves, instruction_set):
    betas, beta, chains, models, sweeps = ladder_of(kind)
    graph = graph_named(name)
    p = random_graph_parameters(graph, (models, models))
    for num_swaps, offset in ((5, 2**34), (2, 1), (0, 0)):
        state = random_bits(*chains.shape, graph.num_nodes, dtype=torch.bool)
        actual = ops.call(
            "graph_tempering",
            state,
            *p,
            graph.layout,
            beta,
            torch.tensor(5),
            chains,
            offset * sweeps,
            sweeps,
            num_swaps,
            cluster_moves,
        )
        expected = graph_tempering_reference(
            state, *p, graph, betas, num_swaps, sweeps_per_swap=sweeps, chains=chains, sweep_offset=offset * sweeps,
            seed=5, cluster_moves=cluster_moves,
        )  # fmt: skip
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("own", ["bias", "all"])
def test_biases_of_each_chain(own):
    betas, beta, chains, _, sweeps = ladder_of("few chains")
    batch = chains.shape[1:]
    p = random_parameters(9, 7, (batch, batch, batch if own == "all" else ()))
    left = random_bits(*chains.shape, 9)
    actual = ops.call("bipartite_tempering", left, *p, beta, torch.tensor(1), chains, 0, sweeps, 6)
    expected = bipartite_tempering_reference(left, *p, betas, 6, sweeps_per_swap=sweeps, chains=chains, seed=1)
    assert_same_bits(actual, expected)


def lattice(size):
    """A square lattice, whose right and lower edges are open."""
    sites = range(size * size)
    right = [(s, s + 1) for s in sites if (s + 1) % size]
    return ColoredGraph(size * size, right + [(s, s + size) for s in sites if s + size < size * size])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("models", [(), (3,), (2, 2)])
def test_long_clusters_and_couplings_of_zero(models, dtype, instruction_set):
    """Clusters wind through a lattice; a third of its couplings, or too little of one, does not connect."""
    graph, num_betas, num_chains = lattice(9), 3, 5
    bias, coupling = (x.to(dtype) for x in random_graph_parameters(graph, (models, models)))
    rank = torch.rand(coupling.shape).argsort(-1)
    coupling = torch.where(rank % 6 == 0, 0, torch.where(rank % 6 == 1, 1e-12, coupling)).to(dtype)
    columns = torch.arange(num_chains * bias[..., 0].numel()).reshape(num_chains, *models)
    replicas = torch.arange(num_betas).reshape(-1, *[1] * columns.dim())
    betas = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    chains, beta = columns * num_betas + replicas, betas.reshape(*replicas.shape, 1)
    state = random_bits(*chains.shape, graph.num_nodes)
    arguments = (state, bias, coupling, graph.layout, beta, torch.tensor(3), chains, 6, 2, 4)
    expected = graph_tempering_reference(
        state, bias, coupling, graph, betas, 4, sweeps_per_swap=2, chains=chains, sweep_offset=6, seed=3,
        cluster_moves=True,
    )  # fmt: skip
    actual, plain = (ops.call("graph_tempering", *arguments, moves) for moves in (True, False))
    assert_same_bits(actual, expected)
    assert not actual[0].equal(plain[0])
    assert_same_bits(actual[0][:, -1], plain[0][:, -1])  # of an odd number of chains, the last one makes no moves


def test_a_ladder_of_single_states_has_no_pairs():
    graph = graph_named("star of 20")
    p, state = random_graph_parameters(graph, ((), ())), random_bits(3, graph.num_nodes)
    beta = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64).unsqueeze(1)
    run = [
        ops.call("graph_tempering", state, *p, graph.layout, beta, torch.tensor(3), torch.arange(3), 0, 2, 4, moves)
        for moves in (False, True)
    ]
    assert_same_bits(run[0], run[1])


def test_cluster_moves_keep_the_sum_of_a_pairs_energies():
    """At beta = 0 the sweep before the moves makes the same states with them and without."""
    graph, beta = lattice(8), torch.zeros(1, 1, 1, dtype=torch.float64)
    p, state = random_graph_parameters(graph, ((), ())), random_bits(1, 10, graph.num_nodes)
    arguments = (state, *p, graph.layout, beta, torch.tensor(1), torch.arange(10).reshape(1, 10), 0, 1, 1)
    before, after = (ops.call("graph_tempering", *arguments, moves)[1].reshape(5, 2) for moves in (False, True))
    assert ((before - after).abs() > 0.1).any(1).all()
    assert (before.sum(1) - after.sum(1)).abs().max() < 1e-9


def test_refuses_chains_of_a_pair_with_parameters_of_their_own():
    graph = graph_named("star of 20")
    _, beta, chains, _, _ = ladder_of("few chains")
    state = random_bits(3, 5, graph.num_nodes)
    for own in ("bias", "coupling"):
        p = random_graph_parameters(graph, ((5,) if own == "bias" else (), (5,) if own == "coupling" else ()))
        arguments = (state, *p, graph.layout, beta, torch.tensor(1), chains, 0, 2, 1)
        ops.call("graph_tempering", *arguments, False)
        text = rf"graph_tempering: {own} must be the same for all chains of the second batch dimension .* got \[5, 2"
        with pytest.raises((ValueError, RuntimeError), match=text):
            ops.call("graph_tempering", *arguments, True)


def test_refuses_what_is_no_ladder():
    _, beta, chains, _, _ = ladder_of("few chains")
    p, left = random_parameters(9, 7, ((), (), ())), random_bits(3, 5, 9)

    def call(left=left, beta=beta, chains=chains, sweeps=2, swaps=1):
        return ops.call("bipartite_tempering", left, *p, beta, torch.tensor(1), chains, 0, sweeps, swaps)

    for given, message in [
        ({"beta": beta.expand(3, 5, 1)}, r"beta must have shape \[B, 1, ..., 1\]"),
        ({"beta": beta[:, 0]}, r"beta must have shape|does not broadcast"),
        ({"beta": beta[:2]}, "does not broadcast"),
        ({"beta": beta.expand(3, 1, 2)}, "beta must hold 1 value|must have shape"),
        ({"chains": chains[:, :1]}, "chains must have the batch shape"),
        ({"chains": -chains}, "must lie in 0"),
        ({"sweeps": 0}, "sweeps_per_swap must lie in 1"),
        ({"swaps": -1}, "num_swaps must lie in 0"),
        ({"left": left * 2}, "left must hold 0 and 1 only"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=f"bipartite_tempering: .*({message})"):
            call(**given)
