# SPDX-License-Identifier: Apache-2.0
"""Gibbs and Metropolis sweeps of graphs: the bits of the reference, whatever the route, batch, threads or memory.

test_graph_gibbs.py and test_graph_metropolis.py hold the tests that only one of the two has.
"""

import pytest
import torch
from graph_support import (
    GRAPH_BROADCASTS,
    GRAPHS,
    KINDS,
    PER_CHAIN,
    SHARED,
    both,
    graph_named,
    parameters_of,
    random_graph,
    random_graph_parameters,
)
from hypothesis import given
from hypothesis import strategies as st
from support import BETA_BATCHES, assert_bits, assert_same_bits, awkward, random_bits

from gibbs_ext import ColoredGraph, graph_gibbs, graph_metropolis

DTYPES = [torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(params=[graph_gibbs, graph_metropolis], ids=lambda op: op.__name__)
def sweep(request):
    """Runs the test with each op that makes binary sweeps."""
    return request.param


# Agreement with the reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("broadcast", GRAPH_BROADCASTS)
def test_agrees_with_reference(sweep, name, broadcast):
    (state, *batches), shape = GRAPH_BROADCASTS[broadcast]
    graph = graph_named(name)
    n = graph.num_nodes
    z = both(sweep, random_bits(*state, n), *random_graph_parameters(graph, batches), graph, 4, seed=n)
    assert z.shape == (*shape, n)
    assert_bits(z)


@given(
    n=st.integers(1, 150),
    density=st.sampled_from([0.0, 0.02, 0.1, 1.0]),
    one_colour_each=st.booleans(),
    chains=st.integers(1, 40),
    models=st.sampled_from([None, 1, 3]),
    per_chain=st.booleans(),
    scale=st.sampled_from([0.0, 0.1, 1.0, 10.0]),
    num_sweeps=st.integers(0, 4),
    clamp=st.booleans(),
)
def test_agrees_with_reference_on_any_problem(
    sweep, n, density, one_colour_each, chains, models, per_chain, scale, num_sweeps, clamp
):
    n = min(n, 40) if density == 1 else n
    graph = random_graph(n, round(density * n * (n - 1) / 2), seed=n)
    if one_colour_each:
        graph = ColoredGraph(n, graph.edges, torch.randperm(n))
    batch = () if models is None else (models,)
    p = random_graph_parameters(graph, ((chains, *batch) if per_chain else (), batch), scale=scale)
    options = {"clamp": torch.rand(n) < 0.3} if clamp else {}
    both(sweep, random_bits(chains, *batch, n), *p, graph, num_sweeps, seed=n, chain_offset=n, **options)


@KINDS
@pytest.mark.parametrize("chains", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130, 257])
@pytest.mark.parametrize("name", ["chimera", "star of 9"])
def test_agrees_with_reference_for_any_number_of_chains(sweep, name, chains, kind):
    graph = graph_named(name)
    both(sweep, random_bits(chains, graph.num_nodes), *parameters_of(kind, graph, chains), graph, 4, seed=3)


@KINDS
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 0.1, 3.0, 30.0, 3e4, 1e30])
@pytest.mark.filterwarnings("ignore::gibbs_ext.CouplingResolutionWarning")
def test_agrees_with_reference_at_any_scale(sweep, scale, kind):
    """Couplings range from none to those of a frozen model, whose probabilities are 0 and 1."""
    for name in ("chimera", "K20"):
        graph = graph_named(name)
        p = parameters_of(kind, graph, 40, scale=scale)
        both(sweep, random_bits(40, graph.num_nodes), *p, graph, 5, seed=5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameter_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(sweep, dtype, parameter_dtype):
    graph = graph_named("chimera with holes")
    n = graph.num_nodes
    for kind in (SHARED, PER_CHAIN):
        p = parameters_of(kind, graph, 5, dtype=parameter_dtype)
        z = both(sweep, random_bits(5, n, dtype=dtype), *p, graph, 3, seed=1)
        assert z.dtype == dtype
        as_float = sweep(torch.zeros(5, n), *p, graph, 3, seed=1)
        assert_same_bits(sweep(torch.zeros(5, n, dtype=dtype), *p, graph, 3, seed=1).float(), as_float)


@KINDS
@pytest.mark.parametrize("mask", ["unit", "chain", "one per chain", "one", "all", "none"])
def test_clamps(sweep, kind, mask):
    chains = 37
    for name in ("chimera with holes", "K20", "no edges"):
        graph = graph_named(name)
        n = graph.num_nodes
        clamp = {
            "unit": torch.rand(n) < 0.5,
            "chain": torch.rand(chains, n) < 0.5,
            "one per chain": torch.rand(chains, 1) < 0.5,
            "one": torch.tensor(True),
            "all": torch.ones(n, dtype=torch.bool),
            "none": torch.zeros(n, dtype=torch.bool),
        }[mask]
        before = random_bits(chains, n)
        after = both(sweep, before, *parameters_of(kind, graph, chains), graph, 5, clamp=clamp, seed=2)
        kept = clamp.expand(before.shape)
        assert after[kept].equal(before[kept])
        assert mask in ("all", "one") or not after[~kept].equal(before[~kept])


SCHEDULES = [
    0.0,
    0.37,
    2.5,
    -1.0,
    torch.tensor(0.5),
    [0.0, 0.5, 0.5, 0.5, 1.0, 2.0],
    [1.0, 1.0, 0.3, 0.3, 1.0, 1.0],
    torch.linspace(0, 3, 6),
]


@KINDS
@pytest.mark.parametrize("name", ["chimera", "star of 20"])
def test_schedule_of_beta(sweep, name, kind):
    """Schedules with constant stretches and changes: tables for one beta must not serve another."""
    graph = graph_named(name)
    p, state = parameters_of(kind, graph, 50), random_bits(50, graph.num_nodes)
    for beta in SCHEDULES:
        both(sweep, state, *p, graph, 6, beta=beta, seed=4)
    expected = sweep(state, *p, graph, 3, beta=0.7, seed=4)
    assert_same_bits(sweep(state, *p, graph, 3, beta=[0.7] * 3, seed=4), expected)


@pytest.mark.parametrize("steps", ["one", "each sweep"])
@pytest.mark.parametrize("kind", BETA_BATCHES)
@pytest.mark.parametrize("name", ["chimera", "star of 20"])
def test_beta_of_each_chain(sweep, name, kind, steps):
    graph = graph_named(name)
    state, own, batch = BETA_BATCHES[kind]
    p, clamp = random_graph_parameters(graph, ((), own)), torch.rand(graph.num_nodes) < 0.2
    beta = torch.rand(*batch, 1 if steps == "one" else 6) * 3 - 0.5
    beta.flatten()[0] = 0
    both(sweep, random_bits(*state, graph.num_nodes), *p, graph, 6, beta=beta, seed=4, clamp=clamp)


# The bits do not depend on the batch, the split, threads or memory ------------------------------------------------


@KINDS
def test_a_chain_alone_is_the_chain_among_others(sweep, kind):
    graph = graph_named("chimera with holes")
    p, state = parameters_of(kind, graph, 64), random_bits(64, graph.num_nodes)
    together = sweep(state, *p, graph, 12, seed=8)
    own = [x[7] if batch else x for x, batch in zip(p, kind, strict=True)]
    assert_same_bits(sweep(state[7], *own, graph, 12, seed=8, chain_offset=7), together[7])


@KINDS
@pytest.mark.parametrize("beta", [torch.linspace(0.1, 2, 10), torch.tensor([0.5] * 4 + [1.0] * 6)])
def test_any_split_of_the_sweeps(sweep, kind, beta, graph_route):
    graph = graph_named("chimera")
    p, state = parameters_of(kind, graph, 70), random_bits(70, graph.num_nodes)
    expected = sweep(state, *p, graph, 10, beta=beta, seed=6)
    for cut in (0, 1, 3, 9, 10):
        first = sweep(state, *p, graph, cut, beta=beta[:cut] if cut else 1.0, seed=6)
        rest = sweep(first, *p, graph, 10 - cut, beta=beta[cut:] if cut < 10 else 1.0, sweep_offset=cut, seed=6)
        assert_same_bits(rest, expected)
        if cut == 3:  # the planted fault: words of the first sweeps again
            assert not sweep(first, *p, graph, 7, beta=beta[3:], seed=6).equal(expected)


@pytest.mark.parametrize(
    "broadcast", ["shared", "per_model", "bias_per_chain", "chains_of_models", "models_of_chains", "single"]
)
@pytest.mark.parametrize("name", ["chimera", "K20"])
def test_any_number_of_threads(sweep, name, broadcast, threads):
    graph = graph_named(name)
    (state, *batches), _ = GRAPH_BROADCASTS[broadcast]
    grow = [(*(40 * s if s > 1 else s for s in batch),) for batch in (state, *batches)]
    p = random_graph_parameters(graph, grow[1:])
    z = random_bits(*grow[0], graph.num_nodes, dtype=torch.bool)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(sweep(z, *p, graph, 8, seed=2))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@KINDS
@pytest.mark.parametrize("how", ["transposed", "strided", "offset"])
def test_memory_layout_does_not_matter(sweep, how, kind):
    graph = graph_named("chimera with holes")
    n = graph.num_nodes
    p, state, clamp = parameters_of(kind, graph, 6), random_bits(6, n), torch.rand(6, n) < 0.3
    expected = sweep(state, *p, graph, 4, clamp=clamp, seed=1)
    state, bias, coupling, clamp = (awkward(x, how) for x in (state, *p, clamp))
    assert_same_bits(both(sweep, state, bias, coupling, graph, 4, clamp=clamp, seed=1), expected)


@pytest.mark.parametrize("chain_offset", [0, 2**32 - 2, 2**48 - 5])
@pytest.mark.parametrize("sweep_offset", [0, 2**32 - 2, 2**44 - 4])
@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63 - 1, 2**64 - 1])
def test_numbers_at_their_limits(sweep, chain_offset, sweep_offset, seed):
    graph = graph_named("chimera with holes")
    for kind in (SHARED, PER_CHAIN):
        both(
            sweep, random_bits(5, graph.num_nodes), *parameters_of(kind, graph, 5), graph, 4,
            seed=seed, chain_offset=chain_offset, sweep_offset=sweep_offset,
        )  # fmt: skip


def test_seeds(sweep):
    graph = graph_named("chimera")
    args = random_bits(10, 32), *random_graph_parameters(graph), graph, 3
    assert_same_bits(sweep(*args, seed=-1), sweep(*args, seed=2**64 - 1))
    assert_same_bits(sweep(*args, seed=7), sweep(*args, seed=torch.tensor(7)))
    assert not sweep(*args, seed=7).equal(sweep(*args, seed=8))
    torch.manual_seed(3)
    first, second = sweep(*args), sweep(*args)
    assert not first.equal(second)
    torch.manual_seed(3)
    assert_same_bits(sweep(*args), first)
    assert_same_bits(sweep(*args, generator=torch.Generator().manual_seed(3)), first)
    assert_same_bits(sweep(*args), second)  # a generator of its own leaves the default one alone


# Edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [(0,), (3, 0), (0, 4)])
@pytest.mark.parametrize("shared", [True, False])
def test_empty_batches(sweep, empty, shared):
    for name in ("chimera", "K3", "no edges"):
        graph = graph_named(name)
        p = random_graph_parameters(graph, ((), () if shared else empty))
        z = both(sweep, torch.zeros(*empty, graph.num_nodes), *p, graph, 3, seed=0)
        assert z.shape == (*empty, graph.num_nodes)


def test_no_sweeps(sweep):
    graph = graph_named("chimera")
    p, state = random_graph_parameters(graph), random_bits(3, 32)
    same = sweep(state, *p, graph, 0, seed=0)
    assert_same_bits(same, state)
    assert same.data_ptr() != state.data_ptr()
    assert_same_bits(sweep(state[0], *p, graph, 0, seed=0, chain_offset=torch.arange(4)), state[0].repeat(4, 1))


@pytest.mark.parametrize("sign", [torch.ones_like, torch.randn_like], ids=["one sign", "both signs"])
@KINDS
@pytest.mark.filterwarnings("ignore::gibbs_ext.CouplingResolutionWarning")
def test_couplings_whose_sum_overflows_float32(sweep, sign, kind):
    for name in ("chimera", "one edge", "star of 9", "K20"):
        graph = graph_named(name)
        p = parameters_of(kind, graph, 40)
        p = p._replace(coupling=torch.sign(sign(p.coupling)) * 1.6e38)
        for beta in (1.0, 1e-38, 0.0, -1.0):
            both(sweep, random_bits(40, graph.num_nodes), *p, graph, 3, beta=beta, seed=9)


def test_no_gradient(sweep):
    graph = graph_named("chimera")
    p = [x.requires_grad_() for x in random_graph_parameters(graph)]
    assert not sweep(torch.zeros(32), *p, graph, 2, seed=0).requires_grad
