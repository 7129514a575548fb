# SPDX-License-Identifier: Apache-2.0
"""Exact answers for models on graphs: the nodes are eliminated one by one.

To eliminate a node is to sum it out: what remains is a table over the states of those of its neighbours that are still
there (its *scope*), and these become neighbours of one another. The largest scope of an order is its *width*; the work
and the memory are 2^width. Tables hold logarithms, in float64.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor

from gibbs_ext import ops
from gibbs_ext.graphs import ChimeraGraph, ColoredGraph
from gibbs_ext.log_partition import machine
from gibbs_ext.log_partition.machine import alternative, check_finite, expanded, mapped_first

# log2 of the numbers in one table (128 MiB).
MAX_WIDTH = 24
# A width at which the search for an order gives up.
_HOPELESS = 64

# An order of elimination: nodes, one after the other, given their neighbours, which the caller keeps up to date.
_Order = Callable[[list[set[int]]], Iterable[int]]


class Elimination(NamedTuple):
    """The :class:`gibbs_ext.log_partition.machine.Solver` of bias [..., N] and coupling [..., E] on a graph."""

    graph: ColoredGraph

    def log_partition(self, name: str, parameters: Sequence[Tensor]) -> Tensor:
        is_differentiated = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
        return self._eliminate(name, parameters, with_marginals=is_differentiated)[0]

    def marginals(self, name: str, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        log_partition, single, pair = self._eliminate(name, parameters, with_marginals=True)
        return log_partition, single, pair

    def samples(self, name: str, parameters: Sequence[Tensor], num_samples: int, generator: torch.Generator) -> Tensor:
        def draw(steps: list[_Step], odds: list[Tensor]) -> list[Tensor]:
            return [_draw(steps, odds, num_samples, generator)]

        bias, coupling = parameters
        return _solve(name, self.graph, bias.double(), coupling.double(), draw)[1]

    def _eliminate(self, name: str, parameters: Sequence[Tensor], with_marginals: bool) -> tuple[Tensor, ...]:
        """log Z [*S], differentiable, and if wanted the marginals, which are not."""
        arguments = name, self.graph, with_marginals, *expanded(parameters, (1, 1))
        return cast(tuple[Tensor, ...], _Elimination.apply(*arguments))  # type: ignore[no-untyped-call]


# An order of elimination ------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """The elimination of one node."""

    node: int
    scope: list[int]  # the neighbours that it then has, in the order of their elimination
    couplings: list[tuple[int, int]]  # the couplings to them: number of the edge, place in scope
    children: list["_Step"]  # earlier steps whose scope begins with this node: their tables are over it and our scope


def _fewest_neighbors_first(neighbors: list[set[int]]) -> Iterator[int]:
    heap = [(len(others), node) for node, others in enumerate(neighbors)]
    heapq.heapify(heap)
    gone = set()
    while heap:
        degree, node = heapq.heappop(heap)
        if node not in gone and degree == len(neighbors[node]):
            yield node  # and the caller eliminates it
            gone.add(node)
            for other in neighbors[node]:
                heapq.heappush(heap, (len(neighbors[other]), other))


def _line_by_line(graph: ChimeraGraph) -> tuple[list[int], list[int]]:
    """Two orders of width shore * cols and shore * rows: by rows and by columns of cells.

    By rows, the units of a row of cells that are coupled along the row go first, one line after the other: the table of
    each line is over the row's other units, which separate one row from the next.
    """
    places = graph.coordinates.tolist()

    def by_rows(node: int) -> tuple[int, ...]:
        row, col, side, index = places[node]
        return row, -side, index, col

    def by_columns(node: int) -> tuple[int, ...]:
        row, col, side, index = places[node]
        return col, side, index, row

    nodes = range(graph.num_nodes)
    return sorted(nodes, key=by_rows), sorted(nodes, key=by_columns)


def _scopes(neighbors: list[set[int]], order: _Order) -> dict[int, set[int]] | None:
    """The scope of each node, in the order; None if a scope has more than _HOPELESS nodes."""
    neighbors = [set(others) for others in neighbors]
    scopes = {}
    for node in order(neighbors):
        scopes[node] = scope = neighbors[node]
        if len(scope) > _HOPELESS:
            return None
        for other in scope:
            neighbors[other] |= scope
            neighbors[other] -= {node, other}
    return scopes


def _plan(name: str, graph: ColoredGraph, keep: bool) -> list[_Step]:
    """The steps of the best of a few orders. Refuses a graph that would take too much memory.

    Args:
        name: Function that errors speak of.
        graph: The graph.
        keep: Whether all tables are kept.
    """
    instead = alternative(name, "graph_gibbs")
    edges = graph.edges.tolist()
    neighbors: list[set[int]] = [set() for _ in range(graph.num_nodes)]
    for u, v in edges:
        neighbors[u].add(v)
        neighbors[v].add(u)
    # The order of the nodes' numbers suits lattices, where the number of neighbours is a poor guide.
    orders: list[_Order] = [_fewest_neighbors_first, lambda _: range(graph.num_nodes)]
    if isinstance(graph, ChimeraGraph):
        by_rows, by_columns = _line_by_line(graph)
        orders += [lambda _: by_rows, lambda _: by_columns]
    found = [scopes for order in orders if (scopes := _scopes(neighbors, order)) is not None]
    sizes = [[len(scope) for scope in scopes.values()] for scopes in found]
    width, _, best = min(
        ((max(size), sum(2**n for n in size), i) for i, size in enumerate(sizes)), default=(_HOPELESS, 0, 0)
    )
    if width > MAX_WIDTH:
        over = "" if found else "over "
        raise ValueError(
            f"{name}: the graph needs tables of {over}2^{width} numbers (the least width found is {over}{width}), and "
            f"2^{MAX_WIDTH} is the limit; use {instead}"
        )

    scopes = found[best]
    position = {node: i for i, node in enumerate(scopes)}
    steps = {node: _Step(node, sorted(scope, key=position.__getitem__), [], []) for node, scope in scopes.items()}
    for edge, (u, v) in enumerate(edges):
        first, second = (u, v) if position[u] < position[v] else (v, u)
        steps[first].couplings.append((edge, steps[first].scope.index(second)))
    held = largest = 0
    for step in steps.values():
        if step.scope:
            steps[step.scope[0]].children.append(step)
        held += 2 ** len(step.scope)
        largest = max(largest, held)
        held -= 0 if keep else sum(2 ** len(child.scope) for child in step.children)
    if largest > 2**machine.MAX_TABLES:
        why = ", all of which marginals and gradients need" if keep else ""
        raise ValueError(
            f"{name}: the graph's tables hold {largest} numbers at a time (width {width}){why}, and "
            f"2^{machine.MAX_TABLES} is the limit; use {instead}"
        )
    return list(steps.values())


# Elimination ------------------------------------------------------------------------------------------------------


def _solve(
    name: str,
    graph: ColoredGraph,
    bias: Tensor,
    coupling: Tensor,
    read: Callable[[list[_Step], list[Tensor]], list[Tensor]] | None,
) -> list[Tensor]:
    """log Z [*S], and the results of ``read`` [*S, ...].

    Args:
        name: Function that errors speak of.
        graph: Graph of N nodes and E edges.
        bias: [..., N] float64.
        coupling: [..., E] float64. S is the broadcast of both batch shapes.
        read: Function of the steps and the tables that :func:`_forward` kept, for a few models at a time.
    """
    steps = _plan(name, graph, keep=read is not None)
    batch = torch.broadcast_shapes(bias.shape[:-1], coupling.shape[:-1])
    parameters = []
    for argument, tensor in (("bias", bias), ("coupling", coupling)):
        check_finite(name, argument, tensor)
        parameters.append(tensor.expand(*batch, -1).reshape(math.prod(batch), tensor.shape[-1]))
    at_once = max(1, machine.CHUNK >> max(len(step.scope) for step in steps))
    parts = []
    for bias, coupling in zip(*(p.split(at_once) for p in parameters), strict=True):
        log_partition, odds = _forward(steps, bias, coupling, keep=read is not None)
        parts.append([log_partition, *(read(steps, odds) if read else ())])
    return [torch.cat(p).reshape((*batch, *p[0].shape[1:])) for p in zip(*parts, strict=True)]


def _forward(steps: list[_Step], bias: Tensor, coupling: Tensor, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """Eliminates the nodes.

    Args:
        steps: Steps of the graph.
        bias: [B, N].
        coupling: [B, E].
        keep: Whether the tables are kept.

    Returns:
        log Z [B] and, if kept, for each step the log-odds of its node given its scope: [B, 2, ..., 2].
    """
    zero = bias.new_zeros(())
    bit = torch.arange(2, dtype=bias.dtype, device=bias.device)
    log_partition, kept = torch.zeros_like(bias[:, 0]), []
    tables: dict[int, Tensor] = {}
    for step in steps:
        ones = (1,) * len(step.scope)
        odds = bias[:, step.node].reshape(-1, *ones)
        for edge, place in step.couplings:
            odds = odds + coupling[:, edge].reshape(-1, *ones) * bit.reshape(2, *ones[place + 1 :])
        off, change = zero, zero  # the children's terms if the node is 0, and what is added if it is 1
        for child in sorted(step.children, key=lambda child: len(child.scope)):
            table = tables.pop(child.node).reshape(-1, 2, *(2 if node in child.scope else 1 for node in step.scope))
            off = off + table[:, 0]
            change = change + (table[:, 1] - table[:, 0])
        odds = odds + change
        # logaddexp with 0 is softplus, but accurate everywhere.
        table = off + torch.logaddexp(odds, zero)
        if step.scope:
            tables[step.node] = table
        else:
            log_partition = log_partition + table
        if keep:
            kept.append(odds)
    return log_partition, kept


def _marginals(steps: list[_Step], odds: list[Tensor]) -> list[Tensor]:
    """single [B, N] and pair [B, E] from the tables that :func:`_forward` kept, which are consumed."""
    num_models = len(odds[0])
    single = odds[0].new_empty(num_models, len(steps))
    pair = odds[0].new_empty(num_models, sum(len(step.couplings) for step in steps))
    probabilities: dict[int, Tensor] = {}  # of the states of a step's scope
    for step in reversed(steps):
        scope = probabilities.pop(step.node) if step.scope else odds[0].new_ones(num_models)
        on = scope * odds.pop().sigmoid()
        single[:, step.node] = on.reshape(num_models, 2 ** len(step.scope)).sum(-1)
        for edge, place in step.couplings:
            pair[:, edge] = on.select(1 + place, 1).reshape(num_models, 2 ** len(step.scope) // 2).sum(-1)
        both = torch.stack((scope - on, on), 1)
        for child in step.children:
            others = [2 + place for place, node in enumerate(step.scope) if node not in child.scope]
            probabilities[child.node] = both.sum(others) if others else both
    return [single, pair]


def _draw(steps: list[_Step], odds: list[Tensor], num_samples: int, generator: torch.Generator) -> Tensor:
    """[B, C, N] bits from the tables that :func:`_forward` kept."""
    num_models = len(odds[0])
    z = torch.zeros(num_models, num_samples, len(steps), dtype=torch.uint8, device=odds[0].device)
    for step, table in zip(reversed(steps), reversed(odds), strict=True):
        state = torch.zeros_like(z[..., 0], dtype=torch.int64)
        for node in step.scope:
            state = 2 * state + z[..., node]
        p = table.reshape(num_models, 2 ** len(step.scope)).gather(-1, state).sigmoid()
        z[..., step.node] = torch.rand(p.shape, dtype=p.dtype, device=p.device, generator=generator) < p
    return z


class _Elimination(torch.autograd.Function):
    """log Z [*S] and, if ``with_marginals``, the marginals, which derivatives need and otherwise compute.

    bias [..., N] and coupling [..., E] are as in :func:`_solve`.
    """

    @staticmethod
    def forward(
        name: str, graph: ColoredGraph, with_marginals: bool, bias: Tensor, coupling: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(_solve(name, graph, bias, coupling, _marginals if with_marginals else None))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.name, ctx.graph, _, bias, coupling = inputs
        _, *marginals = output
        ctx.mark_non_differentiable(*marginals)
        ctx.save_for_backward(bias, coupling, *marginals)
        ctx.save_for_forward(bias, coupling, *marginals)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        bias, coupling, _, _ = arguments = _Elimination._saved(ctx)
        bias_grad, coupling_grad = _Gradient.apply(grad_outputs[0], *arguments)  # type: ignore[no-untyped-call]
        return None, None, None, bias_grad.sum_to_size(bias.shape), coupling_grad.sum_to_size(coupling.shape)

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> tuple[Tensor | None, ...]:
        arguments = _Elimination._saved(ctx)
        one = torch.ones_like(arguments[2][..., 0])
        slopes = _Gradient.apply(one, *arguments)  # type: ignore[no-untyped-call]
        terms = zip(slopes, grad_inputs[3:], strict=True)
        tangent = sum((slope * step).sum(-1) for slope, step in terms if step is not None)
        return tangent, *(None,) * (len(ctx.saved_tensors) - 2)

    @staticmethod
    def _saved(ctx: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """bias, coupling and the marginals."""
        bias, coupling, *marginals = ctx.saved_tensors
        if not marginals:
            _, *marginals = _Elimination.apply(ctx.name, ctx.graph, True, bias.detach(), coupling.detach())  # type: ignore[no-untyped-call]
        single, pair = marginals
        return bias, coupling, single, pair

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        outputs = _Elimination.apply(*args[:3], *mapped_first(args[3:], in_dims[3:]))  # type: ignore[no-untyped-call]
        return outputs, (0,) * len(outputs)


class _Gradient(torch.autograd.Function):
    """A function of the parameters, so that asking for its derivative is an error rather than zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, bias: Tensor, coupling: Tensor, single: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
        return grad.unsqueeze(-1) * single, grad.unsqueeze(-1) * pair

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> NoReturn:
        ops.refuse_second_derivative("exact_log_partition")

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> NoReturn:
        ops.refuse_second_derivative("exact_log_partition")
