# SPDX-License-Identifier: Apache-2.0
"""Exact answers of models on graphs against brute force over all states, and closed forms."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from graph_support import (
    GRAPH_BROADCASTS,
    as_edges,
    complete_graph,
    exact_graph_probabilities,
    graph_named,
    grid_graph,
    random_graph,
    random_graph_parameters,
    star_graph,
)
from hypothesis import given
from hypothesis import strategies as st
from support import (
    all_states,
    assert_bits,
    assert_close,
    assert_same_bits,
    chi_square_excess,
    random_parameters,
    z_threshold,
)
from torch.nn.functional import softplus

from gibbs_ext import (
    BipartiteBoltzmann,
    ChimeraGraph,
    ColoredGraph,
    GraphBoltzmann,
    Marginals,
    exact_log_partition,
    exact_marginals,
    exact_samples,
)
from gibbs_ext.log_partition import elimination, machine


def make(graph, batches=((), ()), dtype=torch.float64, validate_args=None, **kwargs):
    return GraphBoltzmann(graph, *random_graph_parameters(graph, batches, dtype=dtype, **kwargs), validate_args)


def by_brute_force(model):
    """log Z [M], single [M, N] and pair [M, E] in float64."""
    n, ones = model.num_units, (1,) * len(model.batch_shape)
    states = all_states(n)
    u, v = model.graph.edges.unbind(-1)
    pairs = states[:, u] * states[:, v]
    bias, coupling = model.bias.double(), model.coupling.double()
    states, pairs = (x.reshape(2**n, *ones, x.shape[-1]) for x in (states, pairs))
    log_p = ((states * bias).sum(-1) + (pairs * coupling).sum(-1)).expand(2**n, *model.batch_shape)
    p = log_p.softmax(0).unsqueeze(-1)
    return log_p.logsumexp(0), (p * states).sum(0), (p * pairs).sum(0)


def check_against_brute_force(model):
    log_partition, single, pair = by_brute_force(model)
    assert_close(exact_log_partition(model), log_partition, 1e-12)
    marginals = exact_marginals(model)
    assert marginals.single.dtype == marginals.pair.dtype == torch.float64
    assert_close(marginals.single, single, 1e-12)
    assert_close(marginals.pair, pair, 1e-12)


SMALL = {
    "one node": lambda: graph_named("one node"),
    "one edge": lambda: graph_named("one edge"),
    "no edges": lambda: ColoredGraph(7, as_edges([])),
    "two trees and a node": lambda: ColoredGraph(9, as_edges([(0, 5), (5, 3), (5, 8), (2, 1), (7, 1)])),
    "chimera cell": lambda: ChimeraGraph(1),
    "chimera column": lambda: ChimeraGraph(3, 1, 2),
    "chimera row with holes": lambda: ChimeraGraph(1, 3, 2, missing_nodes=[0, 6], missing_edges=[(2, 1)]),
    "K9": lambda: complete_graph(9),
    "star": lambda: star_graph(9),
    "grid": lambda: grid_graph(3, 4),
    "odd ring": lambda: graph_named("odd ring"),
    "sparse": lambda: random_graph(14, 16),
    "dense": lambda: random_graph(12, 50),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_graphs(name, dtype):
    check_against_brute_force(make(SMALL[name](), dtype=dtype, scale=2.0))


@pytest.mark.parametrize("batches", [tuple(batches) for (_, *batches), _ in GRAPH_BROADCASTS.values()])
@pytest.mark.parametrize("chunk", [None, 1, 64])
def test_batches(batches, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(machine, "CHUNK", chunk)
    check_against_brute_force(make(random_graph(9, 15), batches))


@pytest.mark.parametrize("batch", [(0,), (3, 0)])
@pytest.mark.parametrize("graph", [grid_graph(2, 3), ColoredGraph(3, as_edges([]))], ids=["grid", "no edges"])
def test_no_models(batch, graph):
    model = make(graph, (batch, ()), validate_args=True)
    assert exact_log_partition(model).shape == batch
    single, pair = exact_marginals(model)
    assert (single.shape, pair.shape) == ((*batch, graph.num_nodes), (*batch, graph.num_edges))
    assert exact_samples(model, 2).shape == (2, *batch, graph.num_nodes)
    assert model.log_prob(torch.zeros(graph.num_nodes).double()).shape == batch
    assert (
        exact_log_partition(BipartiteBoltzmann(torch.zeros(*batch, 3), torch.zeros(2), torch.zeros(3, 2))).shape
        == batch
    )


@st.composite
def graphs(draw):
    """Any graph of up to 9 nodes, its edges in any order and orientation."""
    n = draw(st.integers(1, 9))
    pairs = [(i, j) for i in range(n) for j in range(i)]
    edges = draw(st.permutations(pairs))[: draw(st.integers(0, len(pairs)))]
    return ColoredGraph(n, as_edges([edge[:: draw(st.sampled_from((1, -1)))] for edge in edges]))


@given(graphs(), st.integers(0, 2**31), st.sampled_from([0.1, 1.0, 20.0]))
def test_any_graph(graph, seed, scale):
    check_against_brute_force(make(graph, generator=torch.Generator().manual_seed(seed), scale=scale))


@pytest.mark.parametrize(("n1", "n2"), [(1, 1), (5, 9), (12, 11), (3, 40)])
def test_complete_bipartite_graphs(n1, n2):
    bipartite = BipartiteBoltzmann(*random_parameters(n1, n2, ((2,), (), (2,)), dtype=torch.float64))
    edges = torch.cartesian_prod(torch.arange(n1), n1 + torch.arange(n2))
    bias = torch.cat((bipartite.left_bias, bipartite.right_bias.expand(2, -1)), -1)
    model = GraphBoltzmann(ColoredGraph(n1 + n2, edges), bias, bipartite.weight.flatten(-2))
    assert_close(exact_log_partition(model), exact_log_partition(bipartite), 1e-12)
    on_graph, on_sides = exact_marginals(model), exact_marginals(bipartite)
    assert_close(on_sides.single, on_graph.single, 1e-12)
    assert_close(on_sides.pair.flatten(-2), on_graph.pair, 1e-12)


def test_complete_graphs_have_a_closed_form():
    """With one bias and one coupling the number of ones is all that counts."""
    n, b, c = 17, -1.5, 0.2
    graph = complete_graph(n)
    model = GraphBoltzmann(graph, torch.full((n,), b).double(), torch.full((graph.num_edges,), c).double())
    log_p = [math.log(math.comb(n, k)) + b * k + c * k * (k - 1) / 2 for k in range(n + 1)]
    log_p = torch.tensor(log_p, dtype=torch.float64)
    ones = torch.arange(n + 1).double()
    p = log_p.softmax(0)
    assert_close(exact_log_partition(model), log_p.logsumexp(0), 1e-6)  # the list above is of float32
    single, pair = exact_marginals(model)
    assert_close(single, (p * ones).sum().div(n).expand(n), 1e-6)
    assert_close(pair, (p * ones * (ones - 1)).sum().div(n * (n - 1)).expand(graph.num_edges), 1e-6)


def test_long_chains_have_a_closed_form():
    """Width 1, 3000 nodes: a product of 2 x 2 matrices."""
    n = 3000
    order = torch.randperm(n)
    bias, coupling = torch.randn(n).double(), torch.randn(n - 1).double()
    log_z = torch.stack([torch.zeros(()).double(), bias[0]])
    for b, c in zip(bias[1:], coupling, strict=True):
        log_z = torch.stack([log_z.logsumexp(0), torch.stack([log_z[0] + b, log_z[1] + b + c]).logsumexp(0)])
    model = GraphBoltzmann(ColoredGraph(n, torch.stack((order[1:], order[:-1]), 1)), bias[order.argsort()], coupling)
    assert_close(exact_log_partition(model), log_z.logsumexp(0), 1e-12)


def test_zero_couplings_are_independent_units():
    graph = ChimeraGraph(3)
    bias = torch.randn(graph.num_nodes).double()
    model = GraphBoltzmann(graph, bias, torch.zeros(graph.num_edges).double())
    p, (u, v) = bias.sigmoid(), graph.edges.unbind(-1)
    assert_close(exact_log_partition(model), softplus(bias).sum(), 1e-12)
    assert_close(torch.cat(exact_marginals(model)), torch.cat((p, p[u] * p[v])), 1e-12)


def test_large_parameters():
    """exp(1000) is no float64."""
    model = GraphBoltzmann(complete_graph(5), 1000 * torch.randn(3, 5).double(), 1000 * torch.randn(3, 10).double())
    check_against_brute_force(model)


# Chimera ----------------------------------------------------------------------------------------------------------


def width_of(graph, monkeypatch):
    """As the error names it."""
    with monkeypatch.context() as patch:
        patch.setattr(elimination, "MAX_WIDTH", -1)
        with pytest.raises(ValueError, match="the least width found is") as error:
            exact_log_partition(make(graph))
    return str(error.value).split("the least width found is ")[1].split(")")[0]


@pytest.mark.parametrize(
    ("graph", "width"),
    [
        (ChimeraGraph(4), 16),
        (ChimeraGraph(2, 9), 8),
        (ChimeraGraph(9, 2), 8),
        (ChimeraGraph(3, 5, 2), 6),
        (ChimeraGraph(16), 64),
        (ChimeraGraph(17), "over 64"),
        (ColoredGraph(5, as_edges([])), 0),
        (star_graph(300), 1),
        (grid_graph(30, 4), 4),
        (complete_graph(12), 11),
        (random_graph(400, 10_000), "over 64"),
    ],
    ids=repr,
)
def test_width(graph, width, monkeypatch):
    assert width_of(graph, monkeypatch) == str(width)


def test_holes_do_not_widen(monkeypatch):
    gone = torch.randperm(128)[:20]
    assert int(width_of(ChimeraGraph(4, missing_nodes=gone), monkeypatch)) <= 16


def test_orders_agree():
    """C3 row by row, and as a graph like any other."""
    graph = ChimeraGraph(3)
    model = make(graph, ((2,), ()))
    shuffled = torch.randperm(72)
    unit = shuffled.argsort()
    other = GraphBoltzmann(
        ColoredGraph(72, unit[graph.edges].flip(-1)), model.bias[:, shuffled], model.coupling
    )  # fmt: skip
    assert_close(exact_log_partition(other), exact_log_partition(model), 1e-12)
    ours, theirs = exact_marginals(model), exact_marginals(other)
    assert_close(theirs.single[:, unit], ours.single, 1e-12)
    assert_close(theirs.pair, ours.pair, 1e-12)


def test_c4_is_the_product_of_its_parts():
    """C4 cut in two, by its missing edges and by its halves."""
    cut = [((r * 4 + 1) * 8 + 4 + k, (r * 4 + 2) * 8 + 4 + k) for r in range(4) for k in range(4)]
    whole, half = ChimeraGraph(4, missing_edges=cut), ChimeraGraph(4, 2)
    parts = make(half, ((2,), (2,)))
    places = [whole.coordinates[:, 1] // 2 == part for part in range(2)]
    bias, coupling = torch.empty(128).double(), torch.empty(whole.num_edges).double()
    for part, place in enumerate(places):
        bias[place] = parts.bias[part]
        coupling[place[whole.edges[:, 0]]] = parts.coupling[part]
    model = GraphBoltzmann(whole, bias, coupling)
    assert_close(exact_log_partition(model), exact_log_partition(parts).sum(), 1e-12)
    marginals, of_parts = exact_marginals(model), exact_marginals(parts)
    for part, place in enumerate(places):
        assert_close(marginals.single[place], of_parts.single[part], 1e-12)
        assert_close(marginals.pair[place[whole.edges[:, 0]]], of_parts.pair[part], 1e-12)


def test_c4_marginals_are_difference_quotients():
    model = make(ChimeraGraph(4))
    marginals = exact_marginals(model)
    along = random_graph_parameters(model.graph, dtype=torch.float64)
    h = 1e-4
    ends = [
        exact_log_partition(
            GraphBoltzmann(model.graph, model.bias + s * h * along.bias, model.coupling + s * h * along.coupling)
        )
        for s in (1, -1)
    ]
    slope = (marginals.single * along.bias).sum() + (marginals.pair * along.coupling).sum()
    assert_close((ends[0] - ends[1]) / (2 * h), slope, 1e-6)
    # Planted fault: one coupling dropped.
    assert abs(float(slope - marginals.pair[7] * along.coupling[7] - (ends[0] - ends[1]) / (2 * h))) > 1e-3


@pytest.mark.parametrize(
    ("make", "limit"),  # KiB
    [
        (
            "gx.GraphBoltzmann(graph, torch.randn(2, 128, requires_grad=True), torch.randn(352, requires_grad=True))",
            300_000,
        ),
        ("gx.BipartiteBoltzmann(torch.randn(60), torch.randn(20), torch.randn(60, 20))", 50_000),
    ],
    ids=["two of C4", "60 + 20"],
)
def test_little_memory_is_taken(make, limit):
    """log Z, its gradient if it is wanted, marginals and samples."""
    program = f"""
import resource, torch, gibbs_ext as gx
graph = gx.ChimeraGraph(4)
def answers(model, num_samples):
    log_partition = gx.exact_log_partition(model)
    if log_partition.requires_grad:
        log_partition.sum().backward()
    gx.exact_marginals(model), gx.exact_samples(model, num_samples)
model = {make}
answers(gx.BipartiteBoltzmann(torch.zeros(3), torch.zeros(2), torch.zeros(3, 2)), 3)  # what libraries take once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
answers(model, 100)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True
    )
    assert int(run.stdout) < limit


# Gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [((), ()), ((2,), ()), ((), (2,)), ((2, 1), (3,))])
def test_gradcheck(batches):
    graph = SMALL["chimera row with holes"]()
    p = [x.requires_grad_() for x in random_graph_parameters(graph, batches, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *p: exact_log_partition(GraphBoltzmann(graph, *p)), p)


def test_gradients_are_marginals():
    graph = ChimeraGraph(2)
    p = [x.requires_grad_() for x in random_graph_parameters(graph, ((3,), (3,)))]
    model = GraphBoltzmann(graph, *p)
    marginals = exact_marginals(model)
    assert not marginals.single.requires_grad
    weights = torch.tensor([1.0, -2.0, 0.5]).double()
    log_partition = exact_log_partition(model)
    actual = torch.autograd.grad((weights * log_partition).sum(), p)
    assert actual[0].dtype == torch.float32
    for gradient, marginal in zip(actual, marginals, strict=True):
        assert_close(gradient, weights.unsqueeze(-1) * marginal, 1e-6)
    assert_close(exact_log_partition(model.detach()), log_partition, 1e-14)
    with torch.no_grad():
        assert not exact_log_partition(model).requires_grad
    one_needs_it = GraphBoltzmann(graph, p[0].detach(), p[1])
    assert_same_bits(torch.autograd.grad((weights * exact_log_partition(one_needs_it)).sum(), p[1])[0], actual[1])


def test_differentiable_once_only():
    graph = grid_graph(2, 3)
    p = [x.requires_grad_() for x in random_graph_parameters(graph, dtype=torch.float64)]
    (gradient,) = torch.autograd.grad(exact_log_partition(GraphBoltzmann(graph, *p)), p[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^exact_log_partition: second derivatives are not supported"):
        torch.autograd.grad(gradient.sum(), p)
    f = torch.func.grad(lambda *p: exact_log_partition(GraphBoltzmann(graph, *p, validate_args=False)))
    assert_close(f(*p), gradient, 1e-14)


# Samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one node", "chimera cell", "odd ring", "chimera column"])
def test_samples_follow_the_model(name):
    graph = SMALL[name]()
    p = random_graph_parameters(graph, scale=0.8, generator=torch.Generator().manual_seed(3))
    z = exact_samples(GraphBoltzmann(graph, *p), 100_000)
    assert_bits(z)
    assert z.dtype == torch.float32
    assert chi_square_excess(z, exact_graph_probabilities(graph, p)) < 1
    assert chi_square_excess(z, exact_graph_probabilities(graph, p, 1.1)) > 1


def test_samples_of_batches():
    model = make(SMALL["grid"](), ((2, 1), (3,)), scale=0.8)
    count = 20_000
    z = exact_samples(model, count)
    assert z.shape == (count, 2, 3, 12)
    marginals = exact_marginals(model)

    def scores(marginals):
        u, v = model.graph.edges.unbind(-1)
        means = z.mean(0), (z[..., u] * z[..., v]).mean(0)
        return torch.cat(
            [(m - e) / (e * (1 - e) / count).sqrt() for m, e in zip(means, marginals, strict=True)], -1
        ).abs()  # fmt: skip

    assert scores(marginals).max() < z_threshold(6 * 29)
    # Planted fault: the models of the batch exchanged.
    assert scores(Marginals(*(m.flip(0, 1) for m in marginals))).max() > z_threshold(6 * 29)


def test_generator_and_seed_of_samples():
    model = make(ChimeraGraph(2))
    torch.manual_seed(5)
    first = exact_samples(model, 10)
    assert_same_bits(exact_samples(model, 10, generator=torch.Generator().manual_seed(5)), first)
    assert not exact_samples(model, 10).equal(first)
    assert exact_samples(model, 0).shape == (0, 32)
    seeded = exact_samples(model, 10, seed=7)
    assert_same_bits(exact_samples(model, 10, seed=torch.tensor(7)), seeded)
    assert not exact_samples(model, 10, seed=8).equal(seeded)


# Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "instead"),
    [
        (exact_log_partition, "annealed_importance_sampling"),
        (exact_marginals, "graph_gibbs"),
        (lambda model: exact_samples(model, 3), "graph_gibbs"),
    ],
    ids=["exact_log_partition", "exact_marginals", "exact_samples"],
)
def test_says_when_too_wide(call, instead, request, monkeypatch):
    name = request.node.callspec.id
    message = rf"tables of 2\^28 numbers \(the least width found is 28\), and 2\^24 is the limit; use {instead}$"
    with pytest.raises(ValueError, match=rf"^{name}: the graph needs {message}"):
        call(make(ChimeraGraph(7)))
    message = (
        rf"tables of over 2\^64 numbers \(the least width found is over 64\), and 2\^24 is the limit; use {instead}$"
    )
    with pytest.raises(ValueError, match=rf"^{name}: the graph needs {message}"):
        call(make(ChimeraGraph(17)))
    monkeypatch.setattr(machine, "MAX_TABLES", 6)
    with pytest.raises(ValueError, match=rf"^{name}: the graph's tables hold \d+ numbers at a time .*; use {instead}$"):
        call(make(ChimeraGraph(2)))


def test_gradients_count_all_tables(monkeypatch):
    """log Z alone keeps few tables, its gradient all of them."""
    monkeypatch.setattr(machine, "MAX_TABLES", 10)
    graph = grid_graph(50, 4)
    model = make(graph)
    exact_log_partition(model)
    model.bias.requires_grad_()
    message = "all of which marginals and gradients need"
    with pytest.raises(ValueError, match=f"^exact_log_partition: the graph's tables hold .*, {message}, and 2.10"):
        exact_log_partition(model)
    with torch.no_grad():
        exact_log_partition(model)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_parameters_must_be_finite(value):
    for argument in ("bias", "coupling"):
        model = make(grid_graph(2, 3), ((2,), (2,)))
        getattr(model, argument)[1, 3] = value
        with pytest.raises(ValueError, match=f"^exact_log_partition: {argument} must be finite, got NaN or inf"):
            exact_log_partition(model)
        with pytest.raises(ValueError, match=f"^exact_marginals: {argument} must be finite, got NaN or inf"):
            exact_marginals(model)


def test_other_bad_calls():
    for name, call in (("exact_marginals", exact_marginals), ("exact_samples", lambda model: exact_samples(model, 3))):
        message = "model must be a BipartiteBoltzmann or a GraphBoltzmann, got int"
        with pytest.raises(TypeError, match=f"^{name}: {message}"):
            call(3)
    with pytest.raises(ValueError, match=r"^exact_samples: num_samples must be at least 0, got -1"):
        exact_samples(make(grid_graph(2, 3)), -1)
    with pytest.raises(ValueError, match=r"^exact_samples: give generator or seed, not both"):
        exact_samples(make(grid_graph(2, 3)), 1, generator=torch.Generator(), seed=1)
    with pytest.raises(TypeError, match=r"^exact_samples: num_samples must be an integer, got 1.5"):
        exact_samples(make(grid_graph(2, 3)), 1.5)
