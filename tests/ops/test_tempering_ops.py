# SPDX-License-Identifier: Apache-2.0
"""Parallel tempering: the bits, energies and swaps of the reference, whatever the batch or the instruction set."""

import pytest
import torch
from graph_support import graph_named, random_graph_parameters
from support import assert_same_bits, random_bits, random_parameters

from gibbs_ext import ops
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
def test_graph_agrees_with_reference(kind, name, instruction_set):
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
        )
        expected = graph_tempering_reference(
            state, *p, graph, betas, num_swaps, sweeps_per_swap=sweeps, chains=chains, sweep_offset=offset * sweeps,
            seed=5,
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
