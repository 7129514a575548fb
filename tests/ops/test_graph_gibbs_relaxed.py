# SPDX-License-Identifier: Apache-2.0
"""Relaxed sweeps of graphs: values and gradients against float64 autograd through the reference, and differences."""

import itertools

import pytest
import torch
from graph_support import (
    GRAPH_BROADCASTS,
    GRAPHS,
    GraphParameters,
    chimera_cell,
    complete_graph,
    graph_named,
    random_graph,
    random_graph_parameters,
    taking,
)
from support import (
    RELAXATIONS,
    SMOOTH,
    assert_close,
    assert_gradients_close,
    assert_only_wanted_gradients,
    assert_same_bits,
    awkward,
    gradients,
    random_bits,
    relative_error,
    supported_instruction_sets,
)

from gibbs_ext import ChimeraGraph, ColoredGraph, bipartite_gibbs_relaxed, graph_gibbs, graph_gibbs_relaxed
from gibbs_ext.reference import graph_gibbs_relaxed_reference

EVERY_RELAXATION = pytest.mark.parametrize(("relaxation", "slope_gradient"), RELAXATIONS)
F64 = torch.float64


def compare(state, parameters, *args, tolerance=1e-11, **kwargs):
    """Compares the op with the reference, with every instruction set."""
    expected = gradients(graph_gibbs_relaxed_reference, state, parameters, *args, **kwargs)
    for instruction_set in supported_instruction_sets():
        with taking(instruction_set):
            actual = gradients(graph_gibbs_relaxed, state, parameters, *args, **kwargs)
            assert_gradients_close(actual, expected, tolerance)
    return actual[0]


# float64: value and gradient of the reference ---------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
def test_agrees_with_reference(name):
    """Relaxations take turns."""
    graph = graph_named(name)
    n = graph.num_nodes
    for ((state, *batches), shape), (relaxation, slope_gradient) in zip(
        GRAPH_BROADCASTS.values(), itertools.cycle(RELAXATIONS), strict=False
    ):
        zeta, mean = compare(
            random_bits(*state, n, dtype=F64), random_graph_parameters(graph, batches, dtype=F64), graph, 3, 2,
            relaxation=relaxation, slope_gradient=slope_gradient, seed=5,
        )  # fmt: skip
        assert zeta.shape == mean.shape == (*shape, n)


@pytest.mark.parametrize(("binary", "relaxed"), [(0, 1), (0, 3), (1, 2), (4, 1)])
@pytest.mark.parametrize("shared", [True, False])
@EVERY_RELAXATION
def test_every_relaxation(relaxed, binary, shared, relaxation, slope_gradient):
    for name in ("chimera with holes", "K20"):
        graph = graph_named(name)
        n = graph.num_nodes
        p = random_graph_parameters(graph, ((6,), () if shared else (6,)), dtype=F64)
        state = torch.rand(6, n, dtype=F64) if binary == 0 else random_bits(6, n, dtype=F64)
        schedule = torch.linspace(0.5, 1.5, binary + relaxed)
        compare(state, p, graph, binary, relaxed, relaxation=relaxation, slope_gradient=slope_gradient,
                beta=schedule, sharpness=3.0, seed=2, chain_offset=2**33, sweep_offset=2**34)  # fmt: skip


@pytest.mark.parametrize("binary", [0, 2])
@pytest.mark.parametrize(
    ("state", "own", "beta"),
    [((4, 3), (), (4, 1)), ((9,), (), (9,)), ((3, 5, 2), (2,), (3, 1, 1)), ((5, 3), (3,), (3,)), ((), (), (3, 1))],
)
def test_beta_of_each_chain(state, own, beta, binary):
    graph = graph_named("chimera with holes")
    p = random_graph_parameters(graph, ((), own), dtype=F64)
    for steps in (1, binary + 2):
        start = random_bits(*state, graph.num_nodes, dtype=F64)
        compare(start, p, graph, binary, 2, beta=torch.rand(*beta, steps) * 2, seed=3)


@pytest.mark.parametrize("chains", [1, 7, 16, 33, 130])
@pytest.mark.parametrize("broadcast", ["shared", "chains_of_models", "models_of_chains", "per_model", "bias_per_chain"])
def test_any_number_of_chains(chains, broadcast):
    state, *batches = {
        "shared": ((chains,), (), ()),
        "per_model": ((chains,), (chains,), (chains,)),
        "bias_per_chain": ((chains,), (chains,), ()),
        "chains_of_models": ((chains, 3), (3,), (3,)),
        "models_of_chains": ((3, chains), (3, 1), (3, 1)),
    }[broadcast]
    graph = graph_named("chimera")
    p = random_graph_parameters(graph, batches, dtype=F64)
    compare(random_bits(*state, graph.num_nodes, dtype=F64), p, graph, 2, 1, seed=3)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 10.0, 1e3])
@EVERY_RELAXATION
def test_any_scale(scale, relaxation, slope_gradient):
    graph = graph_named("pegasus-like")
    p = random_graph_parameters(graph, scale=scale, dtype=F64)
    compare(random_bits(9, graph.num_nodes, dtype=F64), p, graph, 1, 2, relaxation=relaxation,
            slope_gradient=slope_gradient, seed=1, tolerance=1e-9)  # fmt: skip


@pytest.mark.parametrize("state_dtype", [torch.bool, torch.uint8])
def test_states_of_bits(state_dtype):
    graph = graph_named("chimera")
    p = random_graph_parameters(graph, ((5,), (5,)), dtype=F64)
    for binary in (0, 2):
        compare(random_bits(5, 32, dtype=state_dtype), p, graph, binary, 2, seed=1)


def test_mean_of_the_last_colour_is_conditional_on_the_rest():
    """The mean of each unit is the q of its last update, whatever was relaxed after it."""
    for name in ("chimera with holes", "K20", "a colour each"):
        graph = graph_named(name)
        n = graph.num_nodes
        p = random_graph_parameters(graph, dtype=F64)
        zeta, mean = graph_gibbs_relaxed(random_bits(8, n, dtype=F64), *p, graph, 3, 2, beta=0.7, seed=2)
        u, v = graph.edges.unbind(-1)
        field = p.bias.expand(8, n).index_add(-1, u, p.coupling * zeta[:, v]).index_add(-1, v, p.coupling * zeta[:, u])
        last = graph.colors == graph.num_colors - 1
        assert_close(mean[:, last], torch.sigmoid(0.7 * field)[:, last], 1e-12)
        assert not torch.allclose(mean[:, ~last], torch.sigmoid(0.7 * field)[:, ~last], atol=1e-3)


@pytest.mark.parametrize("shape", [(), (5,)])
@EVERY_RELAXATION
def test_one_chimera_cell_is_a_bipartite_model(shape, relaxation, slope_gradient):
    p, sides = chimera_cell(shape, dtype=F64)
    p, sides = [x.requires_grad_() for x in p], [x.requires_grad_() for x in sides]
    state = random_bits(30, *shape, 8, dtype=F64)
    options = {"relaxation": relaxation, "slope_gradient": slope_gradient, "seed": 3}
    zeta, mean, before = graph_gibbs_relaxed(state, *p, ChimeraGraph(1), 3, 2, return_state=True, **options)
    left, right, left_mean, left_before = bipartite_gibbs_relaxed(
        state[..., :4], *sides, 3, 2, return_state=True, **options
    )
    assert_same_bits(before[..., :4], left_before)
    assert_close(zeta, torch.cat((left, right), -1), 1e-12)
    assert_close(mean[..., :4], left_mean, 1e-12)
    a, b = torch.randn(2, *zeta.shape, dtype=F64)
    ((a * zeta).sum() + (b * mean)[..., :4].sum()).backward()
    ((a * torch.cat((left, right), -1)).sum() + (b[..., :4] * left_mean).sum()).backward()
    assert_close(p[0].grad, torch.cat((sides[0].grad, sides[1].grad), -1), 1e-11)
    u, v = ChimeraGraph(1).edges.unbind(-1)
    assert_close(p[1].grad, sides[2].grad[..., torch.minimum(u, v), torch.maximum(u, v) - 4], 1e-11)


def test_order_and_direction_of_edges_do_not_matter():
    graph = graph_named("pegasus-like")
    p = random_graph_parameters(graph, ((6,), (6,)), dtype=F64)
    order = torch.randperm(len(graph.edges))
    shuffled = ColoredGraph(graph.num_nodes, graph.edges[order].flip(-1), graph.colors)
    state = random_bits(6, graph.num_nodes, dtype=F64)
    outputs, expected = gradients(graph_gibbs_relaxed, state, p, graph, 2, 2, seed=1)
    moved = GraphParameters(p.bias, p.coupling[:, order])
    moved_outputs, actual = gradients(graph_gibbs_relaxed, state, moved, shuffled, 2, 2, seed=1)
    for a, e in zip((*moved_outputs, *actual[1:]), (*outputs, expected[1], expected[2][:, order]), strict=True):
        assert_close(a, e, 1e-12)


@pytest.mark.parametrize("how", ["transposed", "strided", "offset"])
def test_memory_layout_does_not_matter(how):
    graph = graph_named("chimera with holes")
    p = random_graph_parameters(graph, ((6,), (6,)), dtype=F64)
    state = random_bits(6, graph.num_nodes, dtype=F64)
    outputs = graph_gibbs_relaxed(awkward(state, how), *(awkward(x, how) for x in p), graph, 2, seed=1)
    assert_same_bits(outputs, graph_gibbs_relaxed(state, *p, graph, 2, seed=1))
    # Gradients are expanded (stride 0) or transposed, or missing, if an output is not used.
    weights = torch.randn(graph.num_nodes, 6, dtype=F64)
    grads = []
    for function in (graph_gibbs_relaxed, graph_gibbs_relaxed_reference):
        for used in (0, 1):
            leaves = [x.clone().requires_grad_() for x in p]
            out = function(state, *leaves, graph, 2, seed=1)[used]
            (out[:, 3:].sum() + (out.mT * weights).sum()).backward()
            grads.append([leaf.grad for leaf in leaves])
    for actual, expected in zip(grads[:2], grads[2:], strict=True):
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, 1e-11)


def test_expanded_parameters_get_their_whole_gradient():
    """autograd sums the gradient of an expanded tensor, so the op must fill all of its entries."""
    graph = graph_named("chimera")
    state = random_bits(5, 32, dtype=F64)
    p = [x.requires_grad_() for x in random_graph_parameters(graph, dtype=F64)]
    expected = torch.autograd.grad(graph_gibbs_relaxed(state, *p, graph, 2, seed=1)[0].sum(), p)
    expanded = [x.expand(5, -1) for x in p]
    actual = torch.autograd.grad(graph_gibbs_relaxed(state, *expanded, graph, 2, seed=1)[0].sum(), p)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-12)
        assert e.abs().max() > 0


def test_only_some_gradients():
    graph = graph_named("chimera")
    p = random_graph_parameters(graph, ((4,), (4,)), dtype=F64)
    state = torch.rand(4, 32, dtype=F64)
    everything = gradients(graph_gibbs_relaxed, state, p, graph, 0, seed=1)[1]
    assert_only_wanted_gradients(
        lambda *leaves: graph_gibbs_relaxed(*leaves, graph, 0, seed=1), (state, *p), everything
    )


# float64: gradients against differences ---------------------------------------------------------------------------


@pytest.mark.parametrize("broadcast", ["single", "shared", "coupling_per_chain", "outer", "state_shared"])
@pytest.mark.parametrize(("relaxation", "slope_gradient"), SMOOTH)
@pytest.mark.parametrize("relaxed", [1, 3])
def test_gradcheck(broadcast, relaxation, slope_gradient, relaxed):
    (state, *batches), _ = GRAPH_BROADCASTS[broadcast]
    graph = random_graph(4, 4)
    p = [x.requires_grad_() for x in random_graph_parameters(graph, batches, dtype=F64)]
    options = {"relaxation": relaxation, "slope_gradient": slope_gradient}
    start = random_bits(*state, 4, dtype=F64)

    def after_binary_sweeps(*parameters):
        return graph_gibbs_relaxed(start, *parameters, graph, 2, relaxed, seed=11, **options)

    def from_a_relaxed_state(*arguments):
        return graph_gibbs_relaxed(*arguments, graph, 0, relaxed, seed=12, **options)

    assert torch.autograd.gradcheck(after_binary_sweeps, p)
    state = torch.rand(*state, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(from_a_relaxed_state, [state, *p])


@pytest.mark.parametrize(("relaxation", "slope_gradient"), [("straight_through", True), ("pwl", False)])
def test_gradcheck_can_fail(relaxation, slope_gradient):
    """The planted fault is a derivative that is not that of the value."""
    graph = complete_graph(3)
    p = [x.requires_grad_() for x in random_graph_parameters(graph, ((8,), ()), dtype=F64)]

    def sample(*p):
        state = torch.zeros(8, 3, dtype=F64)
        return graph_gibbs_relaxed(state, *p, graph, 1, relaxation=relaxation, slope_gradient=slope_gradient, seed=1)

    assert not torch.autograd.gradcheck(sample, p, raise_exception=False)


# float32 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broadcast", ["shared", "chains_of_models", "bias_per_chain"])
@EVERY_RELAXATION
@pytest.mark.parametrize("name", ["chimera with holes", "K20"])
def test_float32_gradient_is_near_float64s(name, broadcast, relaxation, slope_gradient):
    (state, *batches), _ = GRAPH_BROADCASTS[broadcast]
    graph = graph_named(name)
    errors = {instruction_set: [] for instruction_set in supported_instruction_sets()}
    for seed in range(5):
        p = random_graph_parameters(graph, batches)
        start = torch.rand(*state, graph.num_nodes) if seed % 2 else random_bits(*state, graph.num_nodes)
        args = (start, p, graph, 0 if seed % 2 else 3, 1 + seed % 2)
        kwargs = {"relaxation": relaxation, "slope_gradient": slope_gradient, "seed": seed}
        values, grads = gradients(graph_gibbs_relaxed_reference, *args, **kwargs)
        for instruction_set in errors:
            with taking(instruction_set):
                actual = gradients(graph_gibbs_relaxed, *args, **kwargs)
            assert all(out.dtype == torch.float32 for out in actual[0])
            value = max(float((a.double() - e).detach().abs().max()) for a, e in zip(actual[0], values, strict=True))
            pairs = [(a, e) for a, e in zip(actual[1], grads, strict=True) if e is not None]
            errors[instruction_set].append((value, relative_error(*zip(*pairs, strict=True))))
    # The median over seeds counts: a unit at the very edge of a clip or step may be on the other side in float32.
    for of_seeds in errors.values():
        values, grads = (sorted(column) for column in zip(*of_seeds, strict=True))
        assert values[2] < 2e-4
        assert grads[2] < 2e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_parameters_are_computed_in_float32(dtype):
    graph = graph_named("chimera")
    leaves = [x.requires_grad_() for x in random_graph_parameters(graph, ((4,), (4,)), dtype=dtype)]
    outputs = graph_gibbs_relaxed(random_bits(4, 32), *leaves, graph, 2, seed=3)
    assert all(out.dtype == torch.float32 for out in outputs)
    wide = [x.detach().float().requires_grad_() for x in leaves]
    expected = graph_gibbs_relaxed(torch.zeros(4, 32), *wide, graph, 2, seed=3)
    assert_same_bits(graph_gibbs_relaxed(torch.zeros(4, 32), *leaves, graph, 2, seed=3), expected)
    sum(out.sum() for out in outputs).backward()
    assert all(leaf.grad.dtype == dtype for leaf in leaves)


# The binary part and the numbering --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [(), (90,)])
def test_state_is_what_binary_sweeps_give(dtype, batch, instruction_set, graph_route):
    graph = graph_named("chimera with holes")
    n = graph.num_nodes
    p = random_graph_parameters(graph, ((), batch), dtype=dtype)
    for state_dtype in (dtype, torch.uint8, torch.bool):
        start = random_bits(90, n, dtype=state_dtype)
        *_, state = graph_gibbs_relaxed(start, *p, graph, 6, beta=[0.5] * 3 + [1.0] * 4, seed=4, return_state=True)
        assert_same_bits(state, graph_gibbs(start, *p, graph, 6, beta=[0.5] * 3 + [1.0] * 3, seed=4).to(dtype))
        assert not state.requires_grad
        *_, state = graph_gibbs_relaxed(start, *p, graph, 0, seed=4, return_state=True)
        assert_same_bits(state, start.to(dtype))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chains_are_independent_of_the_batch(shared, dtype):
    graph = graph_named("chimera")
    p = random_graph_parameters(graph, ((64,), () if shared else (64,)), dtype=dtype)
    state = random_bits(64, 32, dtype=dtype)
    together = graph_gibbs_relaxed(state, *p, graph, 4, 2, seed=8)
    coupling = p.coupling if shared else p.coupling[7]
    alone = graph_gibbs_relaxed(state[7], p.bias[7], coupling, graph, 4, 2, seed=8, chain_offset=7)
    assert_same_bits(graph_gibbs_relaxed(state, *p, graph, 4, 2, seed=8, chain_offset=torch.arange(64)), together)
    for a, b in zip(alone, together, strict=True):
        assert_close(a, b[7], 1e-12 if dtype == F64 else 1e-4)


@pytest.mark.parametrize("batches", [((200,), (), ()), ((200,), (200,), (200,)), ((70, 3), (3,), (3,))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_number_of_threads(batches, dtype, threads):
    """Results and gradients have the same bits."""
    graph = graph_named("chimera with holes")
    state, *batches = batches
    p = random_graph_parameters(graph, batches, dtype=dtype)
    start = random_bits(*state, graph.num_nodes, dtype=dtype)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        outputs, grads = gradients(graph_gibbs_relaxed, start, p, graph, 2, seed=8)
        results.append((*outputs, *grads[1:]))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_seed_and_generator():
    graph = graph_named("chimera")
    args = random_bits(10, 32), *random_graph_parameters(graph), graph
    torch.manual_seed(3)
    first, second = graph_gibbs_relaxed(*args), graph_gibbs_relaxed(*args)
    assert not first[0].equal(second[0])
    assert_same_bits(graph_gibbs_relaxed(*args, generator=torch.Generator().manual_seed(3)), first)


def test_inputs_are_intact():
    graph = graph_named("chimera")
    p, state = random_graph_parameters(graph, ((4,), (4,))), random_bits(4, 32)
    for num_sweeps in (0, 3):
        before = [x.clone() for x in (state, *p, graph.layout)]
        leaves = [x.clone().requires_grad_() for x in (state, *p)]
        sum(out.sum() for out in graph_gibbs_relaxed(*leaves, graph, num_sweeps, seed=1)).backward()
        assert_same_bits([*(x.detach() for x in leaves), graph.layout], before)


@pytest.mark.parametrize("empty", [(0,), (3, 0)])
@pytest.mark.parametrize("shared", [True, False])
def test_empty_batches(empty, shared):
    graph = graph_named("chimera")
    p = random_graph_parameters(graph, ((), () if shared else empty), dtype=F64)
    outputs, grads = gradients(graph_gibbs_relaxed, torch.zeros(*empty, 32).double(), p, graph, 2, seed=0)
    assert outputs[0].shape == outputs[1].shape == (*empty, 32)
    for grad, parameter in zip(grads[1:], p, strict=True):
        assert_same_bits(grad, torch.zeros_like(parameter))


def test_second_derivative_says_so():
    graph = graph_named("K3")
    p = [x.requires_grad_() for x in random_graph_parameters(graph, dtype=F64)]
    out = graph_gibbs_relaxed(torch.zeros(3).double(), *p, graph, 1, seed=0)[1]
    first = torch.autograd.grad(out.sum(), p, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^graph_gibbs_relaxed: second derivatives"):
        first[0].sum().backward()
