# SPDX-License-Identifier: Apache-2.0
"""Fields of a coloured graph's units, from which energies follow, against dense matrices, with all derivatives."""

import pytest
import torch
from graph_support import GRAPHS, graph_named, random_graph_parameters
from support import assert_close, assert_same_bits, untouched
from torch.autograd import gradcheck, gradgradcheck

import gibbs_ext as gx
from gibbs_ext import ops

# Batch shapes of state, bias and coupling.
BATCHES = [((), (), ()), ((3,), (), ()), ((3, 2), (2,), (2,)), ((), (3,), ()), ((), (), (3,)), ((2, 1), (1, 3), ())]


def problem(graph, batches, dtype=torch.float64):
    state = torch.randn(*batches[0], graph.num_nodes, dtype=dtype)
    return state, *random_graph_parameters(graph, batches[1:], dtype=dtype)


def dense(state, bias, coupling, graph):
    """Fields in float64, with a dense matrix of couplings."""
    state, bias, coupling = state.double(), bias.double(), coupling.double()
    matrix = coupling.new_zeros(*coupling.shape[:-1], graph.num_nodes, graph.num_nodes)
    u, v = graph.edges.unbind(-1)
    matrix[..., u, v] = coupling
    return bias + ((matrix + matrix.mT) @ state.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_dense_matrices(name, batches, dtype):
    graph = graph_named(name)
    state, bias, coupling = problem(graph, batches, dtype)
    with untouched(state=state, bias=bias, coupling=coupling):
        fields = gx.graph_fields(state, bias, coupling, graph)
    assert fields.dtype == dtype
    assert_close(fields.double(), dense(state, bias, coupling, graph), 1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("batches", BATCHES)
def test_edge_sums_agree_with_outer_products(batches):
    graph = graph_named("chimera with holes")
    first, _, coupling = problem(graph, batches)
    second = torch.randn(graph.num_nodes, dtype=torch.float64)
    sums = ops.call("graph_edge_sums", first, second, coupling, graph.layout)
    u, v = graph.edges.unbind(-1)
    each = first[..., u] * second[v] + first[..., v] * second[u]
    whole = each.expand(*torch.broadcast_shapes(each.shape, coupling.shape))
    assert_close(sums, whole.sum_to_size(coupling.shape), 1e-12)


@pytest.mark.parametrize("batches", BATCHES)
def test_derivatives(batches):
    graph = gx.ColoredGraph(5, [(0, 1), (1, 2), (2, 0), (3, 1)])
    leaves = [x.requires_grad_() for x in problem(graph, batches)]

    def fields(*leaves):
        return gx.graph_fields(*leaves, graph)

    assert gradcheck(fields, leaves)
    assert gradgradcheck(fields, leaves)
    other = torch.randn(graph.num_nodes, dtype=torch.float64, requires_grad=True)
    edge_sums = torch.ops.gibbs_ext.graph_edge_sums
    assert gradcheck(lambda a, b: edge_sums(a, b, leaves[2].detach(), graph.layout), (leaves[0], other))


def test_gradcheck_can_fail(monkeypatch):
    graph = gx.ColoredGraph(3, [(0, 1), (1, 2)])
    leaves = [x.requires_grad_() for x in problem(graph, BATCHES[0])]
    right = ops._call
    monkeypatch.setattr(ops, "_call", lambda op, *args: right(op, *args) * (2 if "edge_sums" in op.name() else 1))
    assert not gradcheck(lambda *leaves: gx.graph_fields(*leaves, graph), leaves, raise_exception=False)


def test_second_derivative_of_an_energy_is_the_matrix_of_couplings():
    graph = gx.ChimeraGraph(2, 1)
    bias, coupling = random_graph_parameters(graph, dtype=torch.float64)
    model = gx.GraphBoltzmann(graph, bias, coupling)
    hessian = torch.autograd.functional.hessian(model.energy, torch.rand(graph.num_nodes, dtype=torch.float64))
    u, v = graph.edges.unbind(-1)
    expected = torch.zeros_like(hessian)
    expected[u, v] = expected[v, u] = -coupling
    assert_close(hessian, expected, 1e-12)


@pytest.mark.parametrize("mapped", ["state", "coupling", "both"])
def test_vmap(mapped):
    graph = gx.ChimeraGraph(1)
    state, bias, coupling = problem(graph, ((5,), (), (5,)))
    state = state if mapped != "coupling" else state[0]
    coupling = coupling if mapped != "state" else coupling[0]

    def energy(state, coupling):
        return gx.GraphBoltzmann(graph, bias, coupling, validate_args=False).energy(state)

    dims = (None if mapped == "coupling" else 0, None if mapped == "state" else 0)
    for argnums in (0, 1):
        slopes = torch.vmap(torch.func.grad(energy, argnums), dims)(state, coupling)
        for i in range(5):
            one = state[i] if dims[0] == 0 else state, coupling[i] if dims[1] == 0 else coupling
            assert_close(slopes[i], torch.func.grad(energy, argnums)(*one), 1e-12)


def test_strides_and_threads(threads):
    graph = gx.ChimeraGraph(3)
    state, bias, coupling = problem(graph, ((40, 3), (3,), (3,)), torch.float32)
    expected = gx.graph_fields(state, bias, coupling, graph)
    edges = ops.call("graph_edge_sums", state, state, coupling, graph.layout)
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        transposed = state.mT.contiguous().mT
        assert_same_bits(gx.graph_fields(transposed, bias, coupling, graph), expected)
        assert_same_bits(ops.call("graph_edge_sums", transposed, state, coupling, graph.layout), edges)
        one = ops.call("graph_edge_sums", state[:, 0], state[:, 0], coupling[0], graph.layout)
        assert_same_bits(one, edges[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_parameters_are_computed_in_float32(dtype):
    graph = gx.ChimeraGraph(1)
    state, bias, coupling = problem(graph, BATCHES[0], dtype)
    fields = gx.graph_fields(state, bias, coupling, graph)
    assert_same_bits(fields, gx.graph_fields(state.float(), bias.float(), coupling.float(), graph))
    assert gx.GraphBoltzmann(graph, bias, coupling).energy(state).dtype == torch.float32


@pytest.mark.parametrize("empty", [(0,), (3, 0)])
def test_empty_batches(empty):
    graph = gx.ChimeraGraph(1)
    state, bias, coupling = (x.requires_grad_() for x in problem(graph, (empty, (), ())))
    fields = gx.graph_fields(state, bias, coupling, graph)
    assert fields.shape == (*empty, 8)
    fields.sum().backward()
    assert not coupling.grad.any()


def test_what_it_refuses():
    graph = gx.ChimeraGraph(1)
    state, bias, coupling = problem(graph, BATCHES[0])
    for arguments, message in [
        ((state[1:], bias, coupling, graph), r"state must have shape \[\.\.\., 8\]"),
        ((state, bias[1:], coupling, graph), r"bias must have shape \[\.\.\., 8\]"),
        ((state, bias, coupling[1:], graph), r"coupling must have shape \[\.\.\., 16\]"),
        ((state, bias.float(), coupling, graph), "bias must have coupling's dtype"),
        ((state, bias, coupling, 3), "graph must be a ColoredGraph"),
        ((None, bias, coupling, graph), "state must be a tensor"),
    ]:
        with pytest.raises((TypeError, ValueError, RuntimeError), match=f"^graph_fields: {message}"):
            gx.graph_fields(*arguments)


def test_an_allocation_that_fails_is_an_error_in_the_ops_name() -> None:
    graph = gx.ColoredGraph(2, [(0, 1)])
    states = torch.zeros(1, 1).expand(2**45, 2)
    with pytest.raises(RuntimeError, match=r"graph_fields: cannot allocate \[35184372088832, 2\] float32"):
        gx.graph_fields(states, torch.zeros(2), torch.zeros(1), graph)
