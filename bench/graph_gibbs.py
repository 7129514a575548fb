# SPDX-License-Identifier: Apache-2.0
"""Binary sweeps on coloured graphs: spin glasses without fields, with couplings J uniform in [-1, 1].

Peers see the units sorted by colour, with chains last, so that a colour is a contiguous [n, C] part of the state. Lists
of neighbours are made beforehand, as our graph is; couplings are arranged in the call. dwave-samplers gets a finished
model and starting states; its `sample` converts them, sweeps and builds a SampleSet (the sweeps take over 98% of the
time). It is imported where it is used, because a machine with a GPU does not need it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

import gibbs_ext as gx

from . import limits
from .bipartite_gibbs import compiled
from .harness import Call, Case, benchmark_of, on_gpu, warm
from .peers import thrml_gibbs
from .tables import OURS

Array = np.ndarray
DWAVE = "dwave-samplers"


class Lists:
    """Units sorted by colour, and the neighbours of each. Rows are padded with unit 0 and the edge number num_edges."""

    def __init__(self, graph: gx.ColoredGraph) -> None:
        device = torch.get_default_device()
        self.order = graph.colors.argsort(stable=True)
        self.position = self.order.argsort()
        of_unit: list[list[tuple[int, int]]] = [[] for _ in range(graph.num_nodes)]
        for edge, (u, v) in enumerate(self.position[graph.edges].tolist()):
            of_unit[u].append((v, edge))
            of_unit[v].append((u, edge))
        padding = (0, graph.num_edges)
        rows = torch.tensor([row + [padding] * (graph.max_degree - len(row)) for row in of_unit], device=device)
        self.neighbors, self.edges = (part.contiguous() for part in rows.unbind(-1))  # [N, k]
        ends = [0, *graph.colors.bincount().cumsum(0).tolist()]
        self.colors = [slice(*pair) for pair in pairwise(ends)]
        self.order, self.position = self.order.to(device), self.position.to(device)

    def weights(self, coupling: Tensor) -> Tensor:
        """Couplings [E] or [E, M] arranged by unit and neighbour, [N, k] or [N, k, M]."""
        padded = torch.cat([coupling, coupling.new_zeros(1, *coupling.shape[1:])])
        return padded.index_select(0, self.edges.flatten()).view(*self.edges.shape, *coupling.shape[1:])


# Functions that compute beta * (bias + weight . state), [n, C]. A call makes one for each colour, from bias
# [n, 1 or C], weights [n, k] or [n, k, C] and neighbours [n, k].
Field = Callable[[Tensor, float], Tensor]


def gather(bias: Tensor, weight: Tensor, neighbors: Tensor, shape: torch.Size) -> Field:
    field, values = (bias.new_empty(len(bias), shape[1]) for _ in range(2))
    columns = [
        (i, w if w.dim() == 2 else w[:, None]) for i, w in zip(neighbors.T.contiguous(), weight.unbind(1), strict=True)
    ]

    def run(state: Tensor, beta: float) -> Tensor:
        torch.mul(bias, beta, out=field) if bias.shape == field.shape else field.copy_(bias).mul_(beta)
        for index, w in columns:
            field.addcmul_(torch.index_select(state, 0, index, out=values), w, value=beta)
        return field

    return run


def bag(bias: Tensor, weight: Tensor, neighbors: Tensor, shape: torch.Size) -> Field:
    indices, offsets = neighbors.flatten(), torch.arange(0, neighbors.numel(), neighbors.shape[1], device=bias.device)
    scaled = functools.lru_cache(maxsize=1)(lambda beta: (weight * beta).flatten())
    return lambda state, beta: embedding_bag(indices, state, offsets, per_sample_weights=scaled(beta), mode="sum").add_(
        bias, alpha=beta
    )


def matrix(bias: Tensor, weight: Tensor, neighbors: Tensor, shape: torch.Size, *, sparse: bool) -> Field:
    a = torch.zeros(len(bias), shape[0]).scatter_add_(1, neighbors, weight)
    if sparse:
        a = a.to_sparse_csr()
    else:  # the matrix has only the columns that this colour is coupled to: with two colours half of them
        used = a.any(0).nonzero()[:, 0]
        first, end = int(used[0]), int(used[-1]) + 1
        a = a[:, first:end].contiguous()
    field = torch.empty(len(bias), shape[1])
    given = slice(None) if sparse else slice(first, end)
    return lambda state, beta: torch.addmm(bias.expand_as(field), a, state[given], beta=beta, alpha=beta, out=field)


def torch_sweeps(
    lists: Lists,
    state: Tensor,
    bias: Tensor,
    coupling: Tensor,
    betas: Sequence[float],
    field: Callable[..., Field],
    draw: Callable[[Tensor], object] = Tensor.uniform_,
) -> Tensor:
    """State [N, C] and bias [N, 1 or C] are sorted by colour; coupling is [E], or [E, C] for one chain per model."""
    state, weight = state.clone(), lists.weights(coupling)
    steps = [
        (state[c], torch.empty_like(state[c]), field(bias[c], weight[c], lists.neighbors[c], state.shape))
        for c in lists.colors
    ]
    for beta in betas:
        for part, u, run in steps:
            p = run(state, beta).sigmoid_()
            draw(u)
            torch.lt(u, p, out=part)
    return state


def update(state: Tensor, begin: int, end: int, bias: Tensor, weight: Tensor, neighbors: Tensor, beta: Tensor) -> None:
    """Updates the units begin .. end - 1, for torch.compile; weight is [n, k, 1 or C]."""
    field = bias + (state[neighbors] * weight).sum(1)
    state[begin:end] = torch.rand_like(field) < torch.sigmoid(beta * field)


def compiled_sweeps(lists: Lists, state: Tensor, bias: Tensor, coupling: Tensor, betas: Tensor) -> Tensor:
    """Does the same as torch_sweeps, with the update of a colour compiled by torch.compile."""
    state, weight = state.clone(), lists.weights(coupling)
    weight = weight if weight.dim() == 3 else weight[:, :, None]
    bias = bias.expand_as(state)
    for beta in betas.unbind():
        for c in lists.colors:
            compiled(update)(state, c.start, c.stop, bias[c], weight[c], lists.neighbors[c], beta)
    return state


def in_order(lists: Lists, state: Tensor) -> Tensor:
    """Sorted units [N, C] as [C, N], in the order of the nodes."""
    return state[lists.position].T


def numpy_uniform(rng: np.random.Generator) -> Callable[[Tensor], object]:
    """Draws with NumPy, in two thirds of the time of Tensor.uniform_."""
    return lambda u: rng.random(dtype=np.float32, out=u.numpy())


def numpy_gibbs(
    lists: Lists, state: Tensor, bias: Tensor, coupling: Tensor, betas: Sequence[float], rng: np.random.Generator
) -> Array:
    """Does the same as torch_sweeps, with NumPy, and returns [C, N] in the order of the nodes."""
    states, biases, weight = state.numpy().copy(), bias.numpy(), lists.weights(coupling).numpy()
    if weight.ndim == 2:
        weight = weight[:, :, None]
    # Columns become contiguous.
    indices = lists.neighbors.T.contiguous().numpy()
    weights = np.ascontiguousarray(weight.swapaxes(0, 1))
    scratch = [tuple(np.empty_like(states[c]) for _ in range(2)) for c in lists.colors]
    for beta in betas:
        for c, (p, u) in zip(lists.colors, scratch, strict=True):
            p[:] = biases[c]
            for index, w in zip(indices[:, c], weights[:, c], strict=True):
                np.take(states, index, axis=0, out=u, mode="clip")
                u *= w
                p += u
            # u < 1 / (1 + exp(-field)), without the division
            np.exp(np.multiply(p, -beta, out=p), out=p)
            p += 1
            p *= rng.random(dtype=np.float32, out=u)
            np.less(p, 1, out=states[c])
    return states[lists.position.numpy()].T


def dwave_gibbs(bqm: Any, states: Any, betas: Sequence[float]) -> Array:
    """Samples with Metropolis updates, the default; Gibbs updates are as fast."""
    from dwave.samplers import SimulatedAnnealingSampler

    sampleset = SimulatedAnnealingSampler().sample(
        bqm, initial_states=states, beta_schedule_type="custom", beta_schedule=betas, seed=1
    )
    return sampleset.record.sample > 0


def ising_energy(graph: gx.ColoredGraph, J: Tensor, bits: Tensor | Array) -> Tensor:
    """Energies [C] of bits, or of values between 0 and 1, [C, N], for J [E] or [C, E]."""
    spins = 2 * torch.as_tensor(bits).float() - 1
    return (spins[:, graph.edges[:, 0]] * spins[:, graph.edges[:, 1]] * J).sum(1)


class Inputs(NamedTuple):
    graph: gx.ColoredGraph
    bits: Tensor
    J: Tensor
    bias: Tensor
    coupling: Tensor
    lists: Lists

    def of_peer(self) -> tuple[Lists, Tensor, Tensor, Tensor]:
        bias = self.bias if self.bias.dim() == 2 else self.bias[None]
        order = self.lists.order
        coupling = self.coupling.movedim(-1, 0).contiguous()
        return self.lists, self.bits.T[order].float(), bias.T[order].contiguous(), coupling


def draws(make_graph: Callable[[], gx.ColoredGraph], chains: int, models: bool) -> Inputs:
    torch.manual_seed(1)
    graph = make_graph()
    bits = torch.randint(2, (chains, graph.num_nodes), dtype=torch.uint8)
    J = torch.rand(*([chains] if models else []), graph.num_edges) * 2 - 1
    bias, coupling, _ = gx.ising_to_boltzmann(J.new_zeros(*J.shape[:-1], graph.num_nodes), J, graph)
    return Inputs(graph, bits, J, bias, coupling, Lists(graph))


def case(
    name: str,
    num_nodes: int,
    num_edges: int,
    make_graph: Callable[[], gx.ColoredGraph],
    chains: int,
    betas: Sequence[float],
    models: bool = False,
) -> Case:
    """A case of `chains` chains of one model, or of one model each if `models`, with a sweep at each of `betas`."""
    beta = torch.tensor(betas)

    def ours(i: Inputs) -> Call:
        return lambda: gx.graph_gibbs(i.bits, i.bias, i.coupling, i.graph, len(betas), beta=beta, seed=1)

    def peer(field: Callable[..., Field], with_numpys: bool = False) -> Callable[[Inputs], Call]:
        def prepare(inputs: Inputs) -> Call:
            arguments = inputs.of_peer()
            draw = numpy_uniform(np.random.default_rng(1)) if with_numpys else Tensor.uniform_
            return lambda: in_order(inputs.lists, torch_sweeps(*arguments, betas, field, draw))

        return prepare

    def with_compile(inputs: Inputs) -> Call:
        arguments = inputs.of_peer()
        return warm(lambda: in_order(inputs.lists, compiled_sweeps(*arguments, beta)))

    def with_numpy(inputs: Inputs) -> Call:
        arguments, rng = inputs.of_peer(), np.random.default_rng(1)
        return lambda: numpy_gibbs(*arguments, betas, rng)

    def with_dwave(inputs: Inputs) -> Call:
        import dimod

        edges = [(u, v) for u, v in inputs.graph.edges.tolist()]
        bqm = dimod.BinaryQuadraticModel.from_ising(
            dict.fromkeys(range(num_nodes), 0.0), dict(zip(edges, inputs.J.tolist(), strict=True))
        )
        states = 2 * inputs.bits.numpy().astype(np.int8) - 1, list(range(num_nodes))
        return lambda: dwave_gibbs(bqm, states, betas)

    def with_thrml(i: Inputs) -> Call:
        blocks = [i.lists.order[c].tolist() for c in i.lists.colors]
        h = torch.zeros(*i.J.shape[:-1], num_nodes)
        return thrml_gibbs(blocks, i.graph.edges, h, i.J, i.bits, len(betas), betas[0])

    contenders: dict[str, Callable[[Inputs], Call]] = {OURS: ours, "PyTorch, gather": peer(gather)}
    if not models:
        contenders["PyTorch, embedding_bag"] = peer(bag)
    contenders["torch.compile"] = with_compile
    if not on_gpu():
        contenders["NumPy"] = with_numpy
        if len(set(betas)) == 1:  # it has no schedules
            contenders["thrml"] = with_thrml
    if models and not on_gpu():
        contenders["PyTorch, gather, NumPy's random"] = peer(gather, True)
    elif not on_gpu():
        contenders["PyTorch, embedding_bag, NumPy's random"] = peer(bag, True)
        contenders["PyTorch, sparse"] = peer(functools.partial(matrix, sparse=True))
        contenders["PyTorch, dense"] = peer(functools.partial(matrix, sparse=False))
        contenders[DWAVE] = with_dwave
    return Case(
        name,
        lambda: draws(make_graph, chains, models),
        contenders,
        updates=chains * num_nodes * len(betas),
        work=limits.graph(*((chains, 1) if models else (1, chains)), num_nodes, num_edges, len(betas)),
        statistics=lambda inputs, bits: [ising_energy(inputs.graph, inputs.J, bits)],
    )


def chimera_case(size: int, chains: int, betas: Sequence[float], models: bool = False) -> Case:
    what = f"{chains} models" if models else f"{chains} chains"
    how = f"{len(betas)} sweeps" if len(set(betas)) == 1 else f"annealed over {len(betas)} betas"
    nodes, edges = 8 * size**2, 8 * size * (3 * size - 1)
    return case(f"Chimera C{size}, {what}, {how}", nodes, edges, lambda: gx.ChimeraGraph(size), chains, betas, models)


def pegasus() -> gx.ColoredGraph:
    from dwave.graphs import pegasus_graph

    return gx.ColoredGraph.from_networkx(pegasus_graph(6))


def cases() -> Iterator[Case]:
    fixed, annealing = [0.5] * 100, torch.linspace(0.1, 3, 100).tolist()
    if on_gpu():
        for chains in (1024, 16384):
            yield chimera_case(16, chains, fixed)
        yield chimera_case(8, 128, fixed, models=True)
        return
    for size in (8, 16):
        for chains in (256, 1024):
            yield chimera_case(size, chains, fixed)
        yield chimera_case(size, 1024, annealing)
    yield case("Pegasus P6, 256 chains, 100 sweeps", 680, 4484, pegasus, 256, fixed)
    for num_sweeps in (100, 10):
        yield chimera_case(8, 128, fixed[:num_sweeps], models=True)


graph_gibbs = benchmark_of(cases, "graph_gibbs")
