# SPDX-License-Identifier: Apache-2.0
"""Boltzmann machines as Ising models and back: energies of every state, both signs, gradients and bad inputs."""

import itertools

import networkx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import assert_close, assert_same_bits, untouched

from gibbs_ext import ChimeraGraph, ColoredGraph, boltzmann_to_ising, ising_to_boltzmann

CONVENTIONS = ["dimod", "physics"]
EDGES = [(0, 1), (2, 1), (0, 3), (3, 2), (4, 0)]
N, E = 6, len(EDGES)  # node 5 has no edge


def states(n):
    """[2^n, n] bits, float64."""
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=n)), dtype=torch.float64)


def quadratic(x, linear, coupling):
    """linear . x + coupling . x x of every state x [K, N], of parameters [..., N] and [..., E]: [..., K]."""
    u, v = torch.tensor(EDGES).T
    return linear @ x.T + coupling @ (x[:, u] * x[:, v]).T


def assert_same_energies(h, J, bias, coupling, offset, convention):
    """``ising_energy = energy + offset`` in all states."""
    z = states(N)
    ising = quadratic(2 * z - 1, h, J) * (1 if convention == "dimod" else -1)
    assert_close(-quadratic(z, bias, coupling) + offset[..., None], ising, 1e-12)


def parameters(*batch, n=N, e=E, dtype=torch.float64):
    return torch.randn(*batch, n, dtype=dtype), torch.randn(*batch, e, dtype=dtype)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_state_has_the_same_energy(convention):
    h, J = parameters(3)
    with untouched(h=h, J=J):
        bias, coupling, offset = ising_to_boltzmann(h, J, EDGES, convention=convention)
    assert (bias.shape, coupling.shape, offset.shape) == ((3, N), (3, E), (3,))
    assert_same_energies(h, J, bias, coupling, offset, convention)

    bias, coupling = parameters(3)
    with untouched(bias=bias, coupling=coupling):
        h, J, offset = boltzmann_to_ising(bias, coupling, EDGES, convention=convention)
    assert (h.shape, J.shape, offset.shape) == ((3, N), (3, E), (3,))
    # This offset leads from the Ising model's energy to that over bits.
    assert_same_energies(h, J, bias, coupling, -offset, convention)


@pytest.mark.parametrize("fault", ["offset", "edge", "convention", "field"])
def test_a_fault_in_an_energy_is_seen(fault):
    h, J = parameters()
    bias, coupling, offset = ising_to_boltzmann(h, J, EDGES)
    if fault == "offset":
        offset = -offset
    elif fault == "edge":
        coupling = coupling * torch.tensor([1, 1, 0, 1, 1])
    elif fault == "field":
        bias = -2 * h
    with pytest.raises(AssertionError):
        assert_same_energies(h, J, bias, coupling, offset, "physics" if fault == "convention" else "dimod")


def test_the_signs_by_hand():
    """Two spins: dimod's negative J and the physicists' positive J align them."""
    h, J = torch.tensor([0.5, 0.0]), torch.tensor([-1.0])
    expected = torch.tensor([-3.0, -2.0]), torch.tensor([4.0]), torch.tensor(-1.5)
    assert_same_bits(ising_to_boltzmann(h, J, [(0, 1)]), expected)
    assert_same_bits(ising_to_boltzmann(-h, -J, [(0, 1)], convention="physics"), expected)
    back = boltzmann_to_ising(*expected[:2], [(1, 0)])
    assert_same_bits(back, (h, J, torch.tensor(1.5)))


def test_dimod_agrees():
    dimod = pytest.importorskip("dimod")
    bias, coupling = parameters()
    bits = states(N)
    for vartype in ("SPIN", "BINARY"):
        if vartype == "SPIN":
            h, J, offset = boltzmann_to_ising(bias, coupling, EDGES)
            first, second, constant, samples = h, J, offset, 2 * bits - 1
        else:
            first, second, constant, samples = -bias, -coupling, torch.tensor(0.0), bits
        interactions = dict(zip(EDGES, second.tolist(), strict=True))
        bqm = dimod.BinaryQuadraticModel(dict(enumerate(first.tolist())), interactions, constant.item(), vartype)
        energies = torch.from_numpy(bqm.energies((samples.numpy(), list(range(N)))))
        assert_close(energies, -quadratic(bits, bias, coupling), 1e-12)
        linear, interactions, offset = bqm.to_ising()
        h, J, ours = boltzmann_to_ising(bias, coupling, EDGES)
        assert_close(torch.tensor([linear[i] for i in range(N)], dtype=torch.float64), h, 1e-12)
        theirs = {frozenset(pair): value for pair, value in interactions.items()}
        assert_close(torch.tensor([theirs[frozenset(pair)] for pair in EDGES], dtype=torch.float64), J, 1e-12)
        assert offset == pytest.approx(ours.item(), abs=1e-12)


def graph_of_any_size():
    return st.builds(lambda n, p, seed: networkx.gnp_random_graph(n, p, seed=seed), st.integers(1, 12),
                     st.floats(0, 1), st.integers(0, 1000))  # fmt: skip


@given(graph_of_any_size(), st.sampled_from(CONVENTIONS), st.sampled_from([torch.float32, torch.float64]), st.data())
def test_round_trip(G, convention, dtype, data):
    """Exact where all sums are (multiples of 2^-8), else to the rounding of a node's sum."""
    graph = ColoredGraph.from_networkx(G)
    exact = data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    h, J = parameters(n=graph.num_nodes, e=graph.num_edges, dtype=dtype)
    if exact:
        h, J = (h * 256).round() / 256, (J * 256).round() / 256
    tolerance = 0 if exact else 8 * torch.finfo(dtype).eps * (1 + graph.num_edges)
    for there, back in ((ising_to_boltzmann, boltzmann_to_ising), (boltzmann_to_ising, ising_to_boltzmann)):
        *other, offset = there(h, J, graph, convention=convention)
        *again, reverse = back(*other, graph, convention=convention)
        assert {x.dtype for x in (*other, offset, *again, reverse)} == {dtype}
        assert_close(again[0], h, tolerance)
        assert_same_bits(again[1], J)
        assert_close(reverse, -offset, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [ising_to_boltzmann, boltzmann_to_ising])
def test_batches_broadcast(function, dtype):
    graph = ColoredGraph(N, EDGES)
    h, J = torch.randn(4, 1, N, dtype=dtype), torch.randn(3, E, dtype=dtype)
    nodes, couplings, offset = function(h, J, graph)
    assert (nodes.shape, couplings.shape, offset.shape) == ((4, 3, N), (3, E), (4, 3))
    for i, j in itertools.product(range(4), range(3)):
        one = function(h[i, 0], J[j], graph)
        for batched, single in zip((nodes[i, j], couplings[j], offset[i, j]), one, strict=True):
            assert_close(batched, single, 1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("function", [ising_to_boltzmann, boltzmann_to_ising])
@pytest.mark.parametrize("shapes", [((), ()), ((2, 1), (3,)), ((0,), ())])
def test_gradients(function, shapes):
    h, J = torch.randn(*shapes[0], N, dtype=torch.float64), torch.randn(*shapes[1], E, dtype=torch.float64)
    for convention in CONVENTIONS:

        def run(h, J, convention=convention):
            return function(h, J, EDGES, convention=convention)

        assert torch.autograd.gradcheck(run, (h.requires_grad_(), J.requires_grad_()))


@pytest.mark.parametrize("function", [ising_to_boltzmann, boltzmann_to_ising])
def test_edges_of_any_kind(function):
    graph = ChimeraGraph(2, missing_nodes=[4])
    h, J = parameters(2, n=graph.num_nodes, e=graph.num_edges)
    expected = function(h, J, graph)
    for edges in (graph.edges, graph.edges.numpy(), graph.edges.tolist(), graph.edges.flip(1)):
        assert_same_bits(function(h, J, edges), expected)


@pytest.mark.parametrize("function", [ising_to_boltzmann, boltzmann_to_ising])
def test_without_edges(function):
    h = torch.randn(4)
    nodes, couplings, offset = function(h, torch.zeros(0), [])
    assert couplings.shape == (0,)
    scale = -2 if function is ising_to_boltzmann else -0.5
    assert_same_bits(nodes, scale * h)
    assert_close(offset, h.sum() * (-1 if function is ising_to_boltzmann else -0.5), 1e-6)


F64 = torch.float64


@pytest.mark.parametrize(("function", "names"), [(ising_to_boltzmann, "h J"), (boltzmann_to_ising, "bias coupling")])
@pytest.mark.parametrize(
    ("nodes", "couplings", "edges", "convention", "error", "text"),
    [
        ([0.0, 0.0], torch.zeros(1), [(0, 1)], "dimod", TypeError, "{0} must be a tensor, got list"),
        (torch.zeros(2), {}, [(0, 1)], "dimod", TypeError, "{1} must be a tensor, got dict"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(1), [(0, 1)], "dimod", TypeError,
         "{0} and {1} must be of one dtype, float16, bfloat16, float32 or float64, got {0} torch.int64"),
        (torch.zeros(2), torch.zeros(1, dtype=F64), [(0, 1)], "dimod", TypeError,
         "{0} and {1} must be of one dtype, float16, bfloat16, float32 or float64, got {1} torch.float64"),
        (torch.zeros(2, dtype=torch.float16), torch.zeros(1), [(0, 1)], "dimod", TypeError,
         "{0} and {1} must be of one dtype, float16, bfloat16, float32 or float64, got {1} torch.float32"),
        (torch.zeros(()), torch.zeros(0), [], "dimod", ValueError, "{0} must have shape [..., N], got []"),
        (torch.zeros(3), torch.zeros(1), ColoredGraph(2, [(0, 1)]), "dimod", ValueError,
         "{0} must have shape [..., 2], got [3]"),
        (torch.zeros(2), torch.zeros(2), ColoredGraph(2, [(0, 1)]), "dimod", ValueError,
         "{1} must have shape [..., 1], got [2]"),
        (torch.zeros(2), torch.zeros(()), [(0, 1)], "dimod", ValueError, "{1} must have shape [..., 1], got []"),
        (torch.zeros(3, 2), torch.zeros(4, 1), [(0, 1)], "dimod", ValueError,
         "{1} must broadcast with {0} [3, 2], got [4, 1]"),
        (torch.zeros(2), torch.zeros(2), [(0, 1), (1, 2)], "dimod", ValueError,
         "edges must join two of the nodes 0 .. 1 of {0}, got (1, 2)"),
        (torch.zeros(2), torch.zeros(1), [(-1, 0)], "dimod", ValueError,
         "edges must join two of the nodes 0 .. 1 of {0}, got (-1, 0)"),
        (torch.zeros(2), torch.zeros(1), [(1, 1)], "dimod", ValueError,
         "edges must join two of the nodes 0 .. 1 of {0}, got (1, 1)"),
        (torch.zeros(2), torch.zeros(1), [(0.0, 1.0)], "dimod", TypeError, "edges must be integers of shape [E, 2]"),
        (torch.zeros(2), torch.zeros(1), [(0, 1)], "ising", ValueError,
         "convention must be one of dimod, physics, got 'ising'"),
        (torch.zeros(2), torch.zeros(1), [(0, 1)], 1, ValueError, "convention must be one of dimod, physics, got 1"),
    ],
)  # fmt: skip
def test_bad_inputs(function, names, nodes, couplings, edges, convention, error, text):
    with pytest.raises(error) as caught:
        function(nodes, couplings, edges, convention=convention)
    assert str(caught.value).startswith(f"{function.__name__}: {text.format(*names.split())}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", [ising_to_boltzmann, boltzmann_to_ising])
def test_half_types(function, dtype):
    h, J = parameters(2, dtype=dtype)
    outputs = function(h, J, EDGES)
    assert {x.dtype for x in outputs} == {dtype}
    for half, full in zip(outputs, function(h.double(), J.double(), EDGES), strict=True):
        assert_close(half.double(), full, 64 * torch.finfo(dtype).eps)
