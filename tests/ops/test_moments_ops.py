# SPDX-License-Identifier: Apache-2.0
"""Sweeps whose states are read: the counts and best states of the reference, whatever the batch, route or threads."""

import pytest
import torch
from graph_support import graph_named, random_graph_parameters
from support import assert_same_bits, random_bits, random_parameters

from gibbs_ext import ops
from gibbs_ext.reference import bipartite_moments_reference, graph_moments_reference

ONE = torch.ones(1, dtype=torch.float64)
# The number of chains, the models' batch, sweeps, and sweeps for each read.
PROBLEMS = {
    "few chains": (5, (), 12, 3),
    "a read after every sweep": (70, (), 9, 1),
    "one chain of each model": (1, (3,), 20, 2),
    "models of few chains": (3, (2, 2), 8, 4),
    "many chains of models": (130, (2,), 3, 1),
    "no chains": (0, (2,), 4, 2),
    "no sweeps": (3, (2,), 0, 1),
}
NOTHING, UNITS, PAIRS = range(3)


def moments_of_bipartite(left, *args, counted=PAIRS, best=True, chains=None, offset=0, right=None, clamps=(None, None)):
    *parameters, beta, seed, num_sweeps, sweeps_per_read = args
    return ops.call(
        "bipartite_moments", left, *parameters, beta, torch.tensor(seed), right, *clamps, chains, 0, offset,
        num_sweeps, sweeps_per_read, counted, best,
    )  # fmt: skip


def moments_of_graph(state, *args, counted=PAIRS, best=True, chains=None, offset=0, clamp=None, metropolis=False):
    bias, coupling, graph, beta, seed, num_sweeps, sweeps_per_read = args
    return ops.call(
        "graph_moments", state, bias, coupling, graph.layout, beta, torch.tensor(seed), clamp, chains, 0, offset,
        num_sweeps, sweeps_per_read, counted, best, metropolis,
    )  # fmt: skip


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bipartite_agrees_with_reference(kind, dtype, instruction_set):
    num_chains, models, sweeps, every = PROBLEMS[kind]
    p = [x.to(dtype) for x in random_parameters(37, 20, (models, models, models))]
    left = random_bits(num_chains, *models, 37)
    beta = torch.rand(sweeps, dtype=torch.float64) if sweeps else ONE
    for b in (ONE, beta):
        expected = bipartite_moments_reference(left, *p, sweeps, sweeps_per_read=every, beta=b, sweep_offset=7, seed=-5)
        assert_same_bits(moments_of_bipartite(left, *p, b, -5, sweeps, every, offset=7), expected)
        counts_only = moments_of_bipartite(left, *p, b, -5, sweeps, every, offset=7, best=False)
        assert_same_bits(counts_only[:5], expected[:5])
        assert all(out.shape == (0,) for out in counts_only[5:])
        best_only = moments_of_bipartite(left, *p, b, -5, sweeps, every, offset=7, counted=NOTHING)
        assert_same_bits([*best_only[:2], *best_only[5:]], [*expected[:2], *expected[5:]])
        assert all(out.shape == (0,) for out in best_only[2:5])


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("metropolis", [False, True], ids=["gibbs", "metropolis"])
@pytest.mark.parametrize("name", ["chimera with holes", "star of 20", "no edges"])
def test_graph_agrees_with_reference(kind, name, metropolis, instruction_set):
    num_chains, models, sweeps, every = PROBLEMS[kind]
    graph = graph_named(name)
    p = random_graph_parameters(graph, (models, models))
    state = random_bits(num_chains, *models, graph.num_nodes, dtype=torch.bool)
    beta = torch.rand(sweeps, dtype=torch.float64) if sweeps else ONE
    for b in (ONE, beta):
        expected = graph_moments_reference(
            state, *p, graph, sweeps, sweeps_per_read=every, beta=b, sweep_offset=2**34, metropolis=metropolis, seed=5
        )
        options = {"offset": 2**34, "metropolis": metropolis}
        assert_same_bits(moments_of_graph(state, *p, graph, b, 5, sweeps, every, **options), expected)
        counts_only = moments_of_graph(state, *p, graph, b, 5, sweeps, every, best=False, **options)
        assert_same_bits(counts_only[:3], expected[:3])
        units_only = moments_of_graph(state, *p, graph, b, 5, sweeps, every, counted=UNITS, **options)
        assert_same_bits([*units_only[:2], *units_only[3:]], [*expected[:2], *expected[3:]])
        assert units_only[2].shape == (0,)


def test_clamped_units_chain_numbers_and_betas_of_models():
    models, sweeps = (3,), 6
    beta = torch.rand(3, sweeps, dtype=torch.float64)
    chains = torch.randperm(4 * 3).reshape(4, 3)
    p = random_parameters(9, 7, (models, models, ()))
    left, right = random_bits(4, 3, 9), random_bits(4, 3, 7)
    clamps = torch.rand(9) < 0.3, torch.rand(4, 3, 7) < 0.3
    expected = bipartite_moments_reference(
        left, *p, sweeps, sweeps_per_read=2, beta=beta, right=right, clamp_left=clamps[0], clamp_right=clamps[1],
        chain_offset=chains, seed=1,
    )  # fmt: skip
    assert_same_bits(
        moments_of_bipartite(left, *p, beta, 1, sweeps, 2, right=right, clamps=clamps, chains=chains), expected
    )
    graph = graph_named("chimera with holes")
    bias, coupling = random_graph_parameters(graph, ((4, 3), ()))
    state, clamp = random_bits(4, 3, graph.num_nodes), torch.rand(graph.num_nodes) < 0.3
    expected = graph_moments_reference(
        state, bias, coupling, graph, sweeps, sweeps_per_read=2, beta=beta, clamp=clamp, chain_offset=chains, seed=1
    )
    actual = moments_of_graph(state, bias, coupling, graph, beta, 1, sweeps, 2, clamp=clamp, chains=chains)
    assert_same_bits(actual, expected)


def states_of(sweep, start, num_sweeps, every):
    """All states that are read, by calls of their own."""
    states, z = [], start
    for first in range(0, num_sweeps, every):
        z = sweep(z, every, first)
        states.append(z)
    return torch.stack(states).double()


# More chains and sweeps than one group of any route has, and single chains of many updates.
@pytest.mark.parametrize(("num_chains", "sweeps", "every"), [(1, 900, 1), (10, 90, 3), (300, 24, 1), (1100, 5, 5)])
@pytest.mark.parametrize("num_threads", [1, 4])
def test_bipartite_routes_count_the_states_of_plain_calls(
    num_chains, sweeps, every, num_threads, threads, instruction_set
):
    a, b, w = random_parameters(60, 45, ((), (), ()))
    start = random_bits(num_chains, 60)

    def sweep(z, count, first):
        left, right = ops.call(
            "bipartite_gibbs", z[:, :60], a, b, w, ONE, torch.tensor(3), None, None, None, None, 0, first, count
        )
        return torch.cat([left, right], -1)

    torch.set_num_threads(num_threads)
    states = states_of(sweep, start, sweeps, every)
    for best in (False, True):
        left, right, of_left, of_right, pairs, *_ = moments_of_bipartite(
            start, a, b, w, ONE, 3, sweeps, every, best=best
        )
        assert_same_bits(torch.cat([left, right], -1).double(), states[-1])
        assert_same_bits(torch.cat([of_left, of_right]), states.sum((0, 1)).long())
        assert_same_bits(pairs, torch.einsum("rci,rcj->ij", states[..., :60], states[..., 60:]).long())


@pytest.mark.parametrize(("num_chains", "sweeps", "every"), [(1, 300, 1), (9, 90, 3), (40, 12, 2), (300, 12, 1)])
@pytest.mark.parametrize("num_threads", [1, 4])
@pytest.mark.parametrize("name", ["chimera with holes", "star of 20"])
def test_graph_routes_count_the_states_of_plain_calls(
    name, num_chains, sweeps, every, num_threads, threads, graph_route
):
    graph = graph_named(name)
    bias, coupling = random_graph_parameters(graph, ((), ()))
    start = random_bits(num_chains, graph.num_nodes)

    def sweep(z, count, first):
        return ops.call(
            "graph_gibbs", z, bias, coupling, graph.layout, ONE, torch.tensor(3), None, None, 0, first, count
        )

    torch.set_num_threads(num_threads)
    states = states_of(sweep, start, sweeps, every)
    ends = graph.edges.long()
    for best in (False, True):
        z, units, pairs, *_ = moments_of_graph(start, bias, coupling, graph, ONE, 3, sweeps, every, best=best)
        assert_same_bits(z.double(), states[-1])
        assert_same_bits(units, states.sum((0, 1)).long())
        assert_same_bits(pairs, (states[..., ends[:, 0]] * states[..., ends[:, 1]]).sum((0, 1)).long())


def test_refuses_what_does_not_fit():
    p, left = random_parameters(9, 7, ((), (), ())), random_bits(5, 9)

    def call(left=left, p=p, beta=ONE, sweeps=4, every=2, counted=PAIRS):
        return moments_of_bipartite(left, *p, beta, 1, sweeps, every, counted=counted)

    for given, message in [
        ({"left": left[0]}, "the batch must have at least one dimension"),
        ({"p": random_parameters(9, 7, ((), (), (5,)))}, "must not change along the first batch dimension"),
        ({"beta": torch.rand(5, 1).double()}, "must not change along the first batch dimension"),
        ({"every": 0}, "sweeps_per_read must be at least 1 and divide num_sweeps"),
        ({"every": 3}, "sweeps_per_read must be at least 1 and divide num_sweeps, 4, got 3"),
        ({"counted": 3}, "counted must be a code in 0 .. 2"),
        ({"sweeps": -2}, "num_sweeps must not be negative"),
        ({"left": left * 2}, "left must hold 0 and 1 only"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=f"bipartite_moments: .*({message})"):
            call(**given)
