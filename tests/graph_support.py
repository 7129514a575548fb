# SPDX-License-Identifier: Apache-2.0
"""Helpers of the tests of graphs: graphs of every kind, parameters of their batches, and answers by enumeration."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pytest
import torch
from support import assert_same_bits, supported_instruction_sets, untouched
from torch import Tensor

from gibbs_ext import ChimeraGraph, ColoredGraph, graph_gibbs, graph_metropolis, ops
from gibbs_ext.reference import graph_gibbs_reference, graph_metropolis_reference


class GraphParameters(NamedTuple):
    bias: Tensor
    coupling: Tensor


# Batch shapes of (state, bias, coupling), and what they broadcast to.
GRAPH_BROADCASTS: dict[str, tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]] = {
    "single": (((), (), ()), ()),
    "shared": (((7,), (), ()), (7,)),
    "per_model": (((5,), (5,), (5,)), (5,)),
    "chains_of_models": (((3, 4), (4,), (4,)), (3, 4)),
    "models_of_chains": (((4, 3), (4, 1), (4, 1)), (4, 3)),
    "bias_per_chain": (((6,), (6,), ()), (6,)),
    "coupling_per_chain": (((1,), (), (6,)), (6,)),
    "outer": (((3, 1), (4,), (3, 1)), (3, 4)),
    "state_shared": (((), (2, 3), (2, 1)), (2, 3)),
}


# Every way to the same bits: instruction sets, and routes of binary sweeps (where a route cannot go, another is taken).
ROUTES = ["sums", "tables", "units", "coarse", "coarse units"]
WAYS = [
    (name, route)
    for name, route in itertools.product(supported_instruction_sets(), ROUTES)
    if name == "avx512" or "coarse" not in route
]


@contextlib.contextmanager
def taking(instruction_set: str = "auto", route: str = "auto") -> Iterator[None]:
    """Sets one of WAYS, or a part of it. Assertions that fail in the block name it."""
    ops.set_instruction_set(instruction_set)
    ops.set_graph_route(route)
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{instruction_set}, {route}: {error}") from error
    finally:
        ops.set_instruction_set("auto")
        ops.set_graph_route("auto")


# Ways of each op that makes binary sweeps; Metropolis sweeps have one route on the CPU. Other backends replace these.
WAYS_OF = {graph_gibbs: WAYS, graph_metropolis: [(name, "auto") for name in supported_instruction_sets()]}
REFERENCES = {graph_gibbs: graph_gibbs_reference, graph_metropolis: graph_metropolis_reference}


def both(op, state: Tensor, bias: Tensor, coupling: Tensor, graph: ColoredGraph, *args, **kwargs) -> Tensor:
    """Runs the reference, and the op in every way; checks that all agree and no input changes; returns the bits."""
    tensors = {
        str(i): x for i, x in enumerate((state, bias, coupling, *kwargs.values())) if isinstance(x, torch.Tensor)
    }
    expected = REFERENCES[op](state, bias, coupling, graph, *args, **kwargs)
    with untouched(**tensors, edges=graph.edges, colors=graph.colors, layout=graph.layout):
        for way in WAYS_OF[op]:
            with taking(*way):
                actual = op(state, bias, coupling, graph, *args, **kwargs)
                assert_same_bits(actual, expected)
                assert actual.is_contiguous()
    return expected


# Batch shapes of bias and coupling for a state [C, N]. Routes depend on them.
SHARED, PER_CHAIN_BIAS, PER_CHAIN = ("", ""), ("C", ""), ("", "C")
KINDS = pytest.mark.parametrize("kind", [SHARED, PER_CHAIN_BIAS, PER_CHAIN], ids=["shared", "bias", "coupling"])


def parameters_of(kind: tuple[str, str], graph: ColoredGraph, chains: int, **options) -> GraphParameters:
    return random_graph_parameters(graph, [(chains,) if batch else () for batch in kind], **options)


def gauged(graph: ColoredGraph, parameters: GraphParameters, flipped: Tensor) -> tuple[GraphParameters, Tensor]:
    """Parameters of the model in which the units ``flipped`` are turned, and the biases that lack their couplings."""
    u, v = graph.edges.unbind(-1)
    sign = torch.where(flipped, -1.0, 1.0)
    onto = torch.zeros(*parameters.coupling.shape[:-1], graph.num_nodes)  # sums of the couplings to flipped neighbours
    onto.index_add_(-1, u, parameters.coupling * flipped[v]).index_add_(-1, v, parameters.coupling * flipped[u])
    coupling = sign[u] * sign[v] * parameters.coupling
    return GraphParameters(sign * (parameters.bias + onto), coupling), sign * parameters.bias


# Graphs -----------------------------------------------------------------------------------------------------------


def as_edges(pairs: Sequence[tuple[int, int]]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def complete_graph(n: int) -> ColoredGraph:
    """Each node has a colour of its own."""
    return ColoredGraph(n, as_edges([(i, j) for i in range(n) for j in range(i)]))


def star_graph(rays: int) -> ColoredGraph:
    """The hub is a node in the middle, of the second colour."""
    hub = rays // 2
    colors = torch.zeros(rays + 1, dtype=torch.int64)
    colors[hub] = 1
    return ColoredGraph(rays + 1, as_edges([(hub, i) for i in range(rays + 1) if i != hub]), colors)


def random_graph(num_nodes: int, num_edges: int, seed: int = 0) -> ColoredGraph:
    """Edges in random order and orientation."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.triu_indices(num_nodes, num_nodes, 1).T
    edges = pairs[torch.randperm(len(pairs), generator=generator)[:num_edges]]
    swap = torch.rand(len(edges), generator=generator) < 0.5
    return ColoredGraph(num_nodes, torch.where(swap[:, None], edges.flip(-1), edges))


def grid_graph(rows: int, cols: int) -> ColoredGraph:
    at = torch.arange(rows * cols).reshape(rows, cols)
    edges = [torch.stack((at[:, 1:], at[:, :-1]), -1), torch.stack((at[1:], at[:-1]), -1)]
    return ColoredGraph(rows * cols, torch.cat([e.reshape(-1, 2) for e in edges]))


_GRAPHS = {
    "one node": lambda: ColoredGraph(1, as_edges([])),
    "one edge": lambda: ColoredGraph(2, as_edges([(1, 0)])),
    "no edges": lambda: ColoredGraph(37, as_edges([])),
    "no edges, 3 colours": lambda: ColoredGraph(5, as_edges([]), torch.tensor([2, 0, 1, 0, 2])),
    "chimera": lambda: ChimeraGraph(2),
    "chimera of 200": lambda: ChimeraGraph(5),
    "chimera with holes": lambda: ChimeraGraph(2, 3, missing_nodes=[0, 5, 17, 46], missing_edges=[(1, 6), (36, 44)]),
    "chimera of shore 5": lambda: ChimeraGraph(2, 1, 5),  # degrees 6 and 7
    "K3": lambda: complete_graph(3),
    "K20": lambda: complete_graph(20),
    "grid": lambda: grid_graph(5, 7),
    "odd ring": lambda: ColoredGraph(9, as_edges([(i, (i + 1) % 9) for i in range(9)])),
    "star of 5": lambda: star_graph(5),
    "star of 8": lambda: star_graph(8),
    "star of 9": lambda: star_graph(9),
    "star of 20": lambda: star_graph(20),
    "star of 300": lambda: star_graph(300),
    "some isolated": lambda: random_graph(40, 15),
    "pegasus-like": lambda: random_graph(48, 48 * 15 // 2),
    "random of 16": lambda: random_graph(16, 60),
    "a colour each": lambda: ColoredGraph(18, grid_graph(3, 6).edges, torch.arange(18).flip(0)),
}
GRAPHS = list(_GRAPHS)


@functools.cache
def graph_named(name: str) -> ColoredGraph:
    return _GRAPHS[name]()


def degrees(graph: ColoredGraph) -> Tensor:
    return torch.bincount(graph.edges.reshape(-1), minlength=graph.num_nodes)


def random_graph_parameters(
    graph: ColoredGraph,
    batches: Sequence[Sequence[int]] = ((), ()),
    *,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> GraphParameters:
    """Bias and coupling of the given batch shapes. The coupling is such that fields are of order ``scale``."""
    bias, coupling = (
        torch.randn(*batch, n, dtype=torch.float64, generator=generator)
        for batch, n in zip(batches, (graph.num_nodes, len(graph.edges)), strict=True)
    )
    degree = max(1, int(degrees(graph).max()))
    return GraphParameters((scale * bias).to(dtype), (2 * scale / degree**0.5 * coupling).to(dtype))


def chimera_cell(shape: Sequence[int] = (), **options) -> tuple[GraphParameters, tuple[Tensor, Tensor, Tensor]]:
    """Parameters of ChimeraGraph(1), and the same as left_bias, right_bias and weight of a bipartite model."""
    graph = ChimeraGraph(1)
    p = random_graph_parameters(graph, (shape, shape), **options)
    weight = torch.zeros(*shape, 8, 8, dtype=p.coupling.dtype)
    u, v = graph.edges.unbind(-1)
    weight[..., u, v] = weight[..., v, u] = p.coupling
    return p, (p.bias[..., :4], p.bias[..., 4:], weight[..., :4, 4:])


# Enumeration: tensors [2^N] over all states, whose number has unit 0 as its lowest bit -----------------------------


def where(of_states: Tensor, *ones: int) -> Tensor:
    """A view of the states in which these units are 1."""
    for unit in sorted(ones, reverse=True):  # the dims of lower units are not yet split
        of_states = halves(of_states, unit)[1]
    return of_states


def halves(of_states: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """Views of the states in which a unit is 0, and 1. The last dim counts the states of the units below."""
    split = of_states.unflatten(-1, (-1, 2, 2**unit))
    return split.select(-2, 0), split.select(-2, 1)


def exact_energies(graph: ColoredGraph, parameters: GraphParameters) -> Tensor:
    """[2^N] float64, as the contract writes it."""
    energies = torch.zeros(2**graph.num_nodes, dtype=torch.float64)
    for i, b in enumerate(parameters.bias.tolist()):
        where(energies, i).sub_(b)
    for (u, v), c in zip(graph.edges.tolist(), parameters.coupling.tolist(), strict=True):
        where(energies, u, v).sub_(c)
    return energies


def exact_graph_probabilities(graph: ColoredGraph, parameters: GraphParameters, beta: float = 1.0) -> Tensor:
    """[2^N] float64, by brute force."""
    return (-beta * exact_energies(graph, parameters)).softmax(0)


def exact_sweeps(graph: ColoredGraph, parameters: GraphParameters, num_sweeps: int, beta: float = 1.0) -> Tensor:
    """[2^N] float64: the distribution after ``num_sweeps`` Gibbs sweeps from all zeros, unit by unit."""
    return _swept(graph, parameters, num_sweeps, lambda logit: (torch.sigmoid(logit), torch.sigmoid(-logit)), beta)


def exact_metropolis_sweeps(
    graph: ColoredGraph, parameters: GraphParameters, num_sweeps: int, beta: float = 1.0
) -> Tensor:
    """[2^N] float64: the distribution after ``num_sweeps`` Metropolis sweeps from all zeros."""
    return _swept(graph, parameters, num_sweeps, lambda x: (x.clamp(max=0).exp(), (-x).clamp(max=0).exp()), beta)


def _swept(
    graph: ColoredGraph,
    parameters: GraphParameters,
    num_sweeps: int,
    flips: Callable[[Tensor], tuple[Tensor, Tensor]],
    beta: float,
) -> Tensor:
    """``flips`` takes logits and returns the probabilities that 0 becomes 1, and that 1 becomes 0."""
    energies = exact_energies(graph, parameters)
    p = torch.zeros_like(energies)
    p[0] = 1
    updates = []
    for unit in graph.colors.argsort(stable=True).tolist():
        low, high = halves(energies, unit)
        updates.append((*halves(p, unit), *flips(beta * (low - high))))
    for _ in range(num_sweeps):
        for zero, one, up, down in updates:
            change = zero * up - one * down
            zero -= change
            one += change
    return p
