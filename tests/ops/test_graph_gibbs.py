# SPDX-License-Identifier: Apache-2.0
"""Gibbs sweeps of coloured graphs: rounding, routes, identities and edges. test_graph_sweeps.py holds more tests."""

import functools
import time
import warnings

import graph_support
import pytest
import torch
from graph_support import (
    KINDS,
    PER_CHAIN,
    ROUTES,
    SHARED,
    GraphParameters,
    as_edges,
    chimera_cell,
    complete_graph,
    gauged,
    graph_named,
    parameters_of,
    random_graph_parameters,
    star_graph,
    taking,
)
from support import (
    assert_same_bits,
    longest_standstill,
    random_bits,
    supported_instruction_sets,
)

from gibbs_ext import (
    ChimeraGraph,
    ColoredGraph,
    CouplingResolutionWarning,
    bipartite_gibbs,
    graph_gibbs,
    ops,
    reference,
)
from gibbs_ext.reference import graph_gibbs_reference

both = functools.partial(graph_support.both, graph_gibbs)


# Agreement with the reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize("chains", [1, 3, 9, 20, 33])
@pytest.mark.parametrize("models", [1, 2, 7])
@pytest.mark.parametrize("models_first", [True, False])
def test_chains_of_models(chains, models, models_first):
    for name in ("chimera with holes", "K20"):
        graph = graph_named(name)
        batch = (models, 1) if models_first else (models,)
        state = random_bits(*((models, chains) if models_first else (chains, models)), graph.num_nodes)
        for bias_batch in (batch, ()):
            both(state, *random_graph_parameters(graph, (bias_batch, batch)), graph, 3, seed=4)


@KINDS
@pytest.mark.parametrize("rays", range(1, 21))
def test_every_degree(rays, kind):
    graph = star_graph(rays)
    both(random_bits(35, rays + 1), *parameters_of(kind, graph, 35), graph, 3, seed=rays)


@pytest.mark.parametrize("name", ["chimera", "K3"])
@pytest.mark.filterwarnings("ignore::gibbs_ext.CouplingResolutionWarning")
def test_couplings_of_very_different_size(name):
    """One scale serves all of a model's couplings, and each model has its own."""
    graph = graph_named(name)
    p = random_graph_parameters(graph, ((), (6,)))
    p.coupling[:, 0] = torch.tensor([1e6, 1e-6, 1e30, 0.0, -1e10, 1.0])
    both(random_bits(6, graph.num_nodes), *p, graph, 5, seed=5)
    for coupling in p.coupling:
        both(random_bits(6, graph.num_nodes), p.bias, coupling, graph, 5, seed=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["one edge", "chimera with holes", "K20", "star of 9", "star of 300", "no edges"])
def test_coupling_resolution(name, dtype, instruction_set):
    graph = graph_named(name)
    scales = torch.tensor([0.0, 1e-44, 1e-37, 1e-9, 0.1, 1.0, 3.7, 1e5, 1e36], dtype=dtype)
    coupling = scales[:, None, None] * random_graph_parameters(graph, ((), (3,)), dtype=dtype).coupling
    coupling[:, 2] = scales[:, None]  # equal ones fill their sum
    actual = ops.graph_coupling_resolution(coupling, graph.layout)
    for row, model in zip(actual.flatten(), coupling.flatten(0, 1), strict=True):
        rounded, k = reference.round_graph_couplings(model.numpy(), graph.edges.numpy(), graph.num_nodes)
        assert row == 2.0**-k
        # The contract's own bound: no sum can leave 31 bits, and k is the largest such or 30 (to a factor of 4).
        sums = torch.zeros(graph.num_nodes, dtype=torch.int64)
        sums.index_add_(0, graph.edges.flatten(), torch.from_numpy(rounded).long().abs().repeat_interleave(2))
        assert sums.max() < 2**31
        assert k == 30 or sums.max() >= 2**28


@pytest.mark.parametrize("rays", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 20])
def test_resolution_at_the_bounds_of_a_sum(rays, instruction_set):
    """Sums of rounded-up couplings are within units of the bound where one more bit of k no longer fits.

    A second star with fewer rays has the larger sum, but the degree that counts is still the graph's.
    """
    for other in (0, rays // 2, rays - 1):
        hubs = [(0, 2 + i) for i in range(rays)] + [(1, 2 + rays + i) for i in range(other)]
        graph = ColoredGraph(2 + rays + other, as_edges(hubs))
        bits = 30 - (rays - 1).bit_length()
        coupling = torch.full((40, rays + other), 1 - 2.0**-53, dtype=torch.float64)
        coupling[20:, :rays] *= 0.25
        coupling[:, -1] = 1 - (torch.arange(40) % 20).double() * 2.0**-bits
        for scale in (1.0, -(2.0**-9), 2.0**40):
            expected = [
                2.0 ** -reference.round_graph_couplings(scale * row.numpy(), graph.edges.numpy(), graph.num_nodes)[1]
                for row in coupling
            ]
            assert ops.graph_coupling_resolution(scale * coupling, graph.layout).tolist() == expected


def test_one_cell_is_rounded_as_a_bipartite_model():
    for scale in (1e-6, 0.3, 1.0, 7.7, 1e8):
        p, (_, _, weight) = chimera_cell(scale=scale)
        rounded, k = reference.round_graph_couplings(p.coupling.numpy(), ChimeraGraph(1).edges.numpy(), 8)
        expected, expected_k = reference.round_couplings(weight.numpy())
        assert k == expected_k
        assert sorted(rounded.tolist()) == sorted(expected.flatten().tolist())


# Routes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["one node", "no edges", "chimera with holes", "chimera of shore 5", "grid", "star of 8"]
)
def test_tables_agree_with_reference(name):
    """One draw in 256 ties with the threshold in its high byte; these are enough draws for hundreds of ties."""
    graph = graph_named(name)
    chains = max(100, 8000 // graph.num_nodes)
    p = random_graph_parameters(graph)
    both(random_bits(chains, graph.num_nodes), *p, graph, 15, seed=6)


def test_ties_are_many_there(monkeypatch):
    """The planted fault decides ties of the high byte without the other 24 bits."""
    graph = graph_named("grid")
    p, state = random_graph_parameters(graph), random_bits(228, 35)
    expected = graph_gibbs(state, *p, graph, 15, seed=6)
    random_words = reference.random_words
    monkeypatch.setattr(reference, "random_words", lambda *args: random_words(*args) & 0xFF000000)
    # 31 of the last sweep's 7980 draws tie, and half of these are decided otherwise.
    assert (graph_gibbs_reference(state, *p, graph, 15, seed=6) != expected).sum() > 5


@pytest.mark.parametrize("name", ["chimera of 200", "star of 8", "some isolated"])
@pytest.mark.parametrize("instruction_set", supported_instruction_sets())
def test_routes_agree_on_many_draws(name, instruction_set):
    """Millions of draws are the same on every route, also where each chain has its own bias or coupling."""
    graph = graph_named(name)
    p, state = random_graph_parameters(graph), random_bits(2000, graph.num_nodes, dtype=torch.bool)
    beta = torch.linspace(0.2, 1.5, 5).repeat_interleave(4)
    results = []
    for route in (*ROUTES, "auto"):
        with taking(instruction_set, route):
            results.append(graph_gibbs(state, *p, graph, 20, beta=beta, seed=3))
    for copied in ((p.bias, p.coupling.repeat(2000, 1)), (p.bias.repeat(2000, 1), p.coupling)):
        with taking(instruction_set):
            results.append(graph_gibbs(state, *copied, graph, 20, beta=beta, seed=3))
    for result in results[1:]:
        assert_same_bits(result, results[0])


# Identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (5,)])
def test_one_chimera_cell_is_a_bipartite_model(shape, instruction_set, graph_route):
    p, (left_bias, right_bias, weight) = chimera_cell(shape)
    state, clamp = random_bits(300, *shape, 8), torch.rand(8) < 0.2
    graph = ChimeraGraph(1)
    for options in ({}, {"beta": 0.6}, {"beta": torch.linspace(0, 2, 7)}):
        options |= {"seed": 3, "chain_offset": 2**33, "sweep_offset": 2**34}
        sides = bipartite_gibbs(state[..., :4], left_bias, right_bias, weight, 7, **options)
        assert_same_bits(graph_gibbs(state, *p, graph, 7, **options), torch.cat(sides, -1))
        sides = bipartite_gibbs(
            state[..., :4], left_bias, right_bias, weight, 7,
            right=state[..., 4:], clamp_left=clamp[:4], clamp_right=clamp[4:], **options,
        )  # fmt: skip
        assert_same_bits(graph_gibbs(state, *p, graph, 7, clamp=clamp, **options), torch.cat(sides, -1))


@KINDS
def test_a_complete_bipartite_graph_is_a_bipartite_model(kind, instruction_set):
    """K(30, 50) has more neighbours than tables take."""
    n1, n2, chains = 30, 50, 20
    pairs = torch.cartesian_prod(torch.arange(n1), torch.arange(n1, n1 + n2))
    graph = ColoredGraph(n1 + n2, pairs, (torch.arange(n1 + n2) < n1).long())
    p, state = parameters_of(kind, graph, chains), random_bits(chains, n1 + n2)
    sides = bipartite_gibbs(
        state[:, :n1], p.bias[..., :n1], p.bias[..., n1:], p.coupling.unflatten(-1, (n1, n2)), 6, seed=2
    )
    assert_same_bits(graph_gibbs(state, *p, graph, 6, seed=2), torch.cat(sides, -1))


@KINDS
def test_chimera_as_a_colored_graph(kind, instruction_set):
    chimera = graph_named("chimera with holes")
    graph = ColoredGraph(chimera.num_nodes, chimera.edges, chimera.colors)
    p, state = parameters_of(kind, graph, 70), random_bits(70, graph.num_nodes)
    expected = graph_gibbs(state, *p, chimera, 6, seed=1)
    assert_same_bits(graph_gibbs(state, *p, graph, 6, seed=1), expected)
    # The order and direction of edges do not matter.
    order = torch.randperm(len(graph.edges))
    shuffled = ColoredGraph(graph.num_nodes, graph.edges[order].flip(-1), graph.colors)
    assert_same_bits(graph_gibbs(state, p.bias, p.coupling[..., order], shuffled, 6, seed=1), expected)


@KINDS
def test_colours_are_visited_in_their_order(kind):
    """Two colourings of one graph each agree with the reference, and they differ."""
    edges = graph_named("grid").edges
    colors = graph_named("grid").colors
    one, two = ColoredGraph(35, edges, colors), ColoredGraph(35, edges, 1 - colors)
    p, state = parameters_of(kind, one, 50), random_bits(50, 35)
    assert not both(state, *p, one, 1, seed=1).equal(both(state, *p, two, 1, seed=1))


@KINDS
@pytest.mark.parametrize("name", ["chimera with holes", "K20", "pegasus-like"])
def test_gauge_transformation(name, kind, instruction_set, monkeypatch):
    """The model in which some units z_i are turned into 1 - z_i has the same law.

    It has the same bits if the words of these units are turned as well, because threshold(-x) + threshold(x) = 2^32 and
    parameters are multiples of 2^-4, which makes fields exact: the op on the model is the reference on the other one.
    """
    graph = graph_named(name)
    n, chains = graph.num_nodes, 60
    p = GraphParameters(*(torch.round(16 * x) / 16 for x in parameters_of(kind, graph, chains)))
    state, flipped = random_bits(chains, n), torch.rand(n) < 0.5
    transformed, wrong_bias = gauged(graph, p, flipped)
    actual = graph_gibbs(state, *p, graph, 6, beta=0.7, seed=9)

    random_words = reference.random_words

    def turned_words(*args):
        words = random_words(*args)
        words[:, flipped.numpy()] ^= 0xFFFFFFFF
        return words

    def by_gauge(bias, coupling):
        monkeypatch.setattr(reference, "random_words", turned_words)
        z = graph_gibbs_reference((state - flipped.float()).abs(), bias, coupling, graph, 6, beta=0.7, seed=9)
        monkeypatch.setattr(reference, "random_words", random_words)
        return (z - flipped.float()).abs()

    assert_same_bits(by_gauge(*transformed), actual)
    # Planted faults: a bias not transformed, a coupling whose sign was forgotten.
    assert not by_gauge(wrong_bias, transformed.coupling).equal(actual)
    forgotten = transformed.coupling.clone()
    mixed = (flipped[graph.edges].sum(-1) == 1).nonzero().squeeze(-1)
    forgotten[..., mixed[p.coupling.reshape(-1, graph.num_edges)[0, mixed].abs().argmax()]] *= -1
    assert not by_gauge(transformed.bias, forgotten).equal(actual)


# The bits do not depend on the batch or the numbering of chains ---------------------------------------------------


@KINDS
@pytest.mark.parametrize("split", [[130], [1, 129], [7, 13, 110], [64, 66], [129, 1]])
def test_any_split_of_the_batch(kind, split):
    graph = graph_named("chimera")
    p, state = parameters_of(kind, graph, 130), random_bits(130, graph.num_nodes)
    parts, first = [], 0
    for size in split:
        rows = slice(first, first + size)
        own = [x[rows] if batch else x for x, batch in zip(p, kind, strict=True)]
        parts.append(graph_gibbs(state[rows], *own, graph, 9, seed=1, chain_offset=first))
        first += size
    assert_same_bits(torch.cat(parts), graph_gibbs(state, *p, graph, 9, seed=1))


def test_expanded_equals_materialised():
    graph = graph_named("chimera")
    p, state = random_graph_parameters(graph), random_bits(32)
    expanded = [state.expand(4, 5, 32), p.bias.expand(5, 32), p.coupling.expand(4, 1, -1)]
    expected = graph_gibbs(*(x.contiguous() for x in expanded), graph, 4, seed=1)
    assert_same_bits(graph_gibbs(*expanded, graph, 4, seed=1), expected)
    assert_same_bits(both(state.expand(4, 5, 32), *p, graph, 4, seed=1), expected)
    ones = torch.ones(1).expand(32), torch.ones(1).expand(len(graph.edges))
    both(torch.zeros(1).expand(3, 32), *ones, graph, 4, seed=1)


@pytest.mark.parametrize("bias_batch", [(), (3,)])
@pytest.mark.parametrize("coupling_batch", [(), (3,)])
def test_chain_numbers_given_one_by_one(bias_batch, coupling_batch):
    graph = graph_named("chimera")
    p, state = random_graph_parameters(graph, (bias_batch, coupling_batch)), random_bits(5, 3, 32)
    numbers = torch.randperm(1000)[:15].reshape(5, 3) + 2**40
    actual = both(state, *p, graph, 6, seed=1, chain_offset=numbers)
    bias, coupling = (x.expand(3, -1) for x in p)
    for row in range(5):
        for model in range(3):
            alone = graph_gibbs(
                state[row, model], bias[model], coupling[model], graph, 6,
                seed=1, chain_offset=int(numbers[row, model]),
            )  # fmt: skip
            assert_same_bits(alone, actual[row, model])
    counted = torch.arange(15).reshape(5, 3) + 4
    expected = graph_gibbs(state, *p, graph, 6, seed=1, chain_offset=4)
    assert_same_bits(graph_gibbs(state, *p, graph, 6, seed=1, chain_offset=counted), expected)
    # Only the numbers have a batch shape here; equal numbers give equal draws.
    numbers = torch.tensor([3, 4, 3], dtype=torch.int32)
    z = both(state[0, 0], bias[0], coupling[0], graph, 6, seed=1, chain_offset=numbers)
    assert z[0].equal(z[2])
    assert not z[0].equal(z[1])


def test_chain_numbers_that_cross_32_bits():
    graph = graph_named("chimera")
    for kind in (SHARED, PER_CHAIN):
        p = parameters_of(kind, graph, 100)
        both(random_bits(100, 32), *p, graph, 4, seed=1, chain_offset=2**32 - 50, sweep_offset=2**32 - 2)


# Edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SHARED, PER_CHAIN])
def test_large_logits_decide(kind, graph_route):
    graph = graph_named("no edges")
    bias = torch.tensor([1e30, -1e30]).repeat(20)[:37]
    p = parameters_of(kind, graph, 200)
    z = graph_gibbs(random_bits(200, 37), bias, p.coupling, graph, 1, seed=0)
    assert z.equal((bias > 0).float().expand(200, 37))


@pytest.mark.parametrize("beta", [0.0, 1e-50])  # 1e-50 is 0 in float32
@KINDS
@pytest.mark.filterwarnings("ignore::gibbs_ext.CouplingResolutionWarning")
def test_beta_zero_is_fair_whatever_the_couplings(beta, kind):
    """Fields overflow float32, and 0 times them must not be NaN."""
    graph = graph_named("chimera with holes")
    p = parameters_of(kind, graph, 150)
    p = p._replace(coupling=p.coupling.sign() * 1e38)
    state = random_bits(150, graph.num_nodes)
    drawn = both(state, *p, graph, 3, beta=beta, seed=4)
    none = graph_gibbs(state, torch.zeros(graph.num_nodes), torch.zeros(len(graph.edges)), graph, 3, seed=4)
    assert_same_bits(drawn, none)
    assert 0.45 < drawn.mean() < 0.55
    both(state, *p, graph, 4, beta=[1.0, beta, 0.5, beta], seed=4)


def test_sums_that_fill_31_bits():
    """Equal couplings make the largest sum that rounding allows, with either sign."""
    for rays in (1, 2, 3, 5, 6, 7, 8, 9, 16, 17):
        graph = star_graph(rays)
        for value in (1 - 2**-24, 1.0, -1.0, 1 + 2**-23, 2.0 / rays):
            coupling = torch.full((rays,), value)
            both(torch.ones(40, rays + 1), torch.zeros(rays + 1), coupling, graph, 3, seed=1)


def test_resolution_warning():
    graph = star_graph(3)
    with pytest.warns(CouplingResolutionWarning, match=r"^graph_gibbs: coupling"):
        graph_gibbs(torch.zeros(4), torch.zeros(4), torch.full((3,), 1e6), graph, 1, seed=0)
    # the error of a logit counts
    with pytest.warns(CouplingResolutionWarning, match=r"neighbours at beta 1e\+07$"):
        graph_gibbs(torch.zeros(4), torch.zeros(4), torch.ones(3), graph, 2, beta=[0, -1e7], seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graph_gibbs(torch.zeros(4), torch.zeros(4), torch.full((3,), 1e6), graph, 1, beta=1e-6, seed=0)
        graph = complete_graph(100)
        graph_gibbs(torch.zeros(100), *random_graph_parameters(graph), graph, 1, seed=0)


@pytest.mark.filterwarnings("error::gibbs_ext.CouplingResolutionWarning")
def test_resolution_warning_as_an_error():
    with pytest.raises(CouplingResolutionWarning, match=r"^graph_gibbs: coupling"):
        graph_gibbs(torch.zeros(2), torch.zeros(2), torch.tensor([1e7]), graph_named("one edge"), 1, seed=0)


def test_many_nodes():
    """The nodes are more than a table or a stack buffer may expect, in few chains."""
    n = 5000
    graph = ColoredGraph(n, torch.stack((torch.arange(n), torch.arange(1, n + 1) % n), -1))
    for kind in (SHARED, PER_CHAIN):
        both(random_bits(3, n), *parameters_of(kind, graph, 3), graph, 2, seed=0)


def test_releases_the_gil():
    graph = ChimeraGraph(8)
    p, state = random_graph_parameters(graph), random_bits(512, graph.num_nodes)
    num_sweeps, duration = 100, 0.0
    while duration < 0.5:  # until a call is long enough to measure
        num_sweeps *= 2
        start = time.perf_counter()
        graph_gibbs(state, *p, graph, num_sweeps, seed=0)
        duration = time.perf_counter() - start
    # test_support.py holds the planted fault: a call that keeps the GIL.
    assert longest_standstill(lambda: graph_gibbs(state, *p, graph, num_sweeps, seed=0)) < 0.5
