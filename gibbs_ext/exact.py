# SPDX-License-Identifier: Apache-2.0
"""Exact answers: a bipartite model's smaller side enumerated, a graph's nodes eliminated one by one.

To eliminate a node is to sum it out: what remains is a table over the states of those of its neighbours that are still
there (its *scope*), and these become neighbours of one another. The largest scope of an order is its *width*; the work
and the memory are 2^width. Tables hold logarithms, in float64.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gibbs_ext import ops
from gibbs_ext.arguments import as_seed
from gibbs_ext.checks import check_all, check_integers
from gibbs_ext.distributions import ENUMERABLE_UNITS, BipartiteBoltzmann, GraphBoltzmann, check_model
from gibbs_ext.graphs import ChimeraGraph, ColoredGraph

# Numbers of a table worked on at once: few enough to stay in the cache.
_CHUNK = 2**17
# log2 of the numbers in one table (128 MiB), and in all tables held at the same time (2 GiB).
_MAX_WIDTH, _MAX_TABLES = 24, 28
# A width at which the search for an order gives up.
_HOPELESS = 64

# An order of elimination: nodes, one after the other, given their neighbours, which the caller keeps up to date.
_Order = Callable[[list[set[int]]], Iterable[int]]


class Marginals(NamedTuple):
    """What :func:`exact_marginals` returns; M stands for the model's batch shape."""

    single: Tensor  # [M, N] float64: P(z_i = 1); of a bipartite model left before right, [M, n1 + n2]
    pair: Tensor  # [M, E] float64: P(z_u = z_v = 1) of each edge (u, v); bipartite [M, n1, n2]: P(left_i = right_j = 1)


def exact_log_partition(model: BipartiteBoltzmann | GraphBoltzmann) -> Tensor:
    """``log Z``: of a bipartite model by enumerating the smaller side, of a graph by eliminating its nodes.

    Args:
        model: Bipartite: the smaller of its sides has at most 25 units; 2^20 states of 100 other units take seconds.
            A graph: of width 24 or less in the order found (a Chimera graph's is shore * min(rows, cols)). Width 16
            takes less than a second, 20 seconds, 24 minutes and a gigabyte.

    Returns:
        [*batch_shape] float64. Differentiable in the parameters; for graphs once only, and at several times the cost.

    Raises:
        ValueError: The model is too large, and how large it is; or a parameter is not finite.
        NotImplementedError: A second derivative of a graph's; or torch.func.grad of a bipartite model for which only
            torch.autograd.grad has the memory, as it computes parts again.
    """
    name = "exact_log_partition"
    check_model(name, model)
    if isinstance(model, BipartiteBoltzmann):
        return _Enumeration(*_smaller_side_first(name, model)).log_sums().logsumexp(0).expand(model.batch_shape)
    differentiable = torch.is_grad_enabled() and (model.bias.requires_grad or model.coupling.requires_grad)
    return _eliminate(name, model, differentiable)[0]


@torch.no_grad()
def exact_marginals(model: BipartiteBoltzmann | GraphBoltzmann) -> Marginals:
    """Probabilities of units and of coupled pairs: by enumeration, or by eliminating the nodes and then going back.

    Args:
        model: Bipartite: as for :func:`exact_log_partition`, at three times its cost. A graph: as there, but all
            tables are kept, so that the width may be about 20.

    Returns:
        :class:`Marginals`. Not differentiable.

    Raises:
        ValueError: The model is too large, and how large it is; or a parameter is not finite.
    """
    name = "exact_marginals"
    check_model(name, model)
    return log_partition_and_marginals(name, model)[1]


@torch.no_grad()
def exact_samples(
    model: BipartiteBoltzmann | GraphBoltzmann,
    num_samples: int,
    *,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Independent draws from the model itself, no Markov chain.

    The smaller side of a bipartite model is drawn from all its states, and the other side given that. A graph's nodes
    are eliminated, and drawn in the reverse order.

    Args:
        model: As for :func:`exact_marginals`; bipartite: at about twice the cost of :func:`exact_log_partition`.
        num_samples: C, draws per model.
        generator: Supplies the seed; the default generator when neither is given.
        seed: A 64-bit integer, instead of a generator. PyTorch's generators look at its lower 32 bits.

    Returns:
        [C, *batch_shape, N] bits of the parameters' dtype; of a bipartite model left before right.

    Raises:
        TypeError, ValueError: As :func:`exact_marginals`; or num_samples, generator or seed do not fit.
        NotImplementedError: Under torch.vmap, where a parameter or the seed is mapped.
    """
    name = "exact_samples"
    check_model(name, model)
    check_integers(name, 0, num_samples=num_samples)
    number = as_seed(name, generator, seed, model.device)

    def of_bipartite(source: torch.Generator, left_bias: Tensor, right_bias: Tensor, weight: Tensor) -> Tensor:
        machine = BipartiteBoltzmann(left_bias, right_bias, weight, validate_args=False)
        return _bipartite_samples(name, machine, num_samples, source)

    def of_graph(source: torch.Generator, bias: Tensor, coupling: Tensor) -> Tensor:
        def draw(steps: list[_Step], odds: list[Tensor]) -> list[Tensor]:
            return [_draw(steps, odds, num_samples, source)]

        return _solve(name, cast(GraphBoltzmann, model).graph, bias, coupling, draw)[1]

    draw = of_bipartite if isinstance(model, BipartiteBoltzmann) else of_graph
    z: Tensor = _Samples.apply(draw, number, *_of_every_model(model.detach()))  # type: ignore[no-untyped-call]
    return z.movedim(-2, 0).to(model.dtype)


@torch.no_grad()
def log_partition_and_marginals(name: str, model: BipartiteBoltzmann | GraphBoltzmann) -> tuple[Tensor, Marginals]:
    """log Z [*batch_shape] and :class:`Marginals`. ``name`` is the caller's, for errors."""
    model = model.detach()
    if isinstance(model, BipartiteBoltzmann):
        outputs = _BipartiteMarginals.apply(name, *_of_every_model(model))  # type: ignore[no-untyped-call]
    else:
        outputs = _eliminate(name, model, True)
    log_partition, single, pair = outputs
    return log_partition, Marginals(single, pair)


def without_derivative(name: str, value: Tensor, model: BipartiteBoltzmann | GraphBoltzmann) -> Tensor:
    """``value``, a function of the parameters; asking for its gradient is an error rather than zero."""
    parameters = [getattr(model, argument) for argument in model._dims]
    return cast(Tensor, _NotDifferentiable.apply(name, value, *parameters))  # type: ignore[no-untyped-call]


class _NotDifferentiable(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, value: Tensor, *parameters: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> NoReturn:
        raise NotImplementedError(f"{ctx.name}: derivatives are not supported")

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> NoReturn:
        raise NotImplementedError(f"{ctx.name}: derivatives are not supported")


class _Samples(torch.autograd.Function):
    """[*S, C, N] by ``draw``. A Function, because torch.vmap would refuse its random draws."""

    @staticmethod
    def forward(draw: Callable[..., Tensor], seed: Tensor, *parameters: Tensor) -> Tensor:
        return draw(torch.Generator(parameters[0].device).manual_seed(int(seed)), *parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError("exact_samples: torch.vmap is not supported; give the model a batch shape instead")


def _of_every_model(model: BipartiteBoltzmann | GraphBoltzmann) -> tuple[Tensor, ...]:
    """The parameters in float64, each with all batch dims of the model, so that torch.vmap may add one in front."""
    return tuple(
        getattr(model, argument).double().expand(*model.batch_shape, *(-1,) * dim)
        for argument, dim in model._dims.items()
    )


def _mapped_first(tensors: Iterable[Tensor], in_dims: Iterable[int | None]) -> list[Tensor]:
    """The parameters of :func:`_of_every_model` with the mapped dim, if there is one, as first batch dim."""
    return [t if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, in_dims, strict=True)]


def _instead(name: str, sweeps: str) -> str:
    """What to use where a model is too large."""
    estimates = {
        "exact_log_partition": "annealed_importance_sampling",
        "mean": "the mean of samples, an estimate",
        "variance": "the variance of samples, an estimate",
        "entropy": "log_partition('ais') plus the mean energy of samples, an estimate",
    }
    return estimates.get(name.split(".")[-1], sweeps)


def _check_finite(name: str, argument: str, tensor: Tensor) -> None:
    check_all(tensor.isfinite(), f"{name}: {argument} must be finite, got NaN or inf")


# Enumeration ------------------------------------------------------------------------------------------------------


def _smaller_side_first(name: str, model: BipartiteBoltzmann) -> tuple[Tensor, Tensor, Tensor]:
    """Biases of the side to enumerate and of the other, and the weight between them, in float64."""
    if min(model.num_left, model.num_right) > ENUMERABLE_UNITS:
        raise ValueError(
            f"{name}: the smaller side of {model.num_left} + {model.num_right} units has more than "
            f"{ENUMERABLE_UNITS}; use {_instead(name, 'bipartite_gibbs')}"
        )
    for argument in model._dims:
        _check_finite(name, argument, getattr(model, argument))
    left_bias, right_bias, weight = model.left_bias.double(), model.right_bias.double(), model.weight.double()
    if model.num_left > model.num_right:
        return right_bias, left_bias, weight.mT
    return left_bias, right_bias, weight


def _bits(numbers: Tensor, num_units: int) -> Tensor:
    """States [..., num_units] float64 of these numbers [...], whose lowest bit is unit 0."""
    return (numbers.unsqueeze(-1) >> torch.arange(num_units, device=numbers.device) & 1).double()


class _Enumeration:
    """The states of one side, n units, in chunks: states that differ in their first ``low`` units only.

    A state's fields are those of the first state of its chunk, plus what is the same in all chunks.

    Args:
        bias: [..., n] float64, of the side.
        other_bias: [..., m], of the other.
        weight: [..., n, m].
    """

    def __init__(self, bias: Tensor, other_bias: Tensor, weight: Tensor) -> None:
        self.bias, self.weight = bias, weight
        n, m = weight.shape[-2:]
        batch_shape = torch.broadcast_shapes(bias.shape[:-1], other_bias.shape[:-1], weight.shape[:-2])
        self.per_state = max(1, math.prod(batch_shape)) * max(n, m)
        self.low = max(0, min(n, (_CHUNK // self.per_state).bit_length() - 1))
        self.numbers = torch.arange(2 ** (n - self.low), device=weight.device)  # of the chunks
        self.low_numbers = torch.arange(2**self.low, device=weight.device)
        low_states = _bits(self.low_numbers, self.low)
        self.on_low = (low_states @ bias[..., : self.low].unsqueeze(-1)).squeeze(-1)
        self.low_fields = low_states @ weight[..., : self.low, :] + other_bias.unsqueeze(-2)  # [..., states, m]

    def chunk(self, number: Tensor) -> tuple[Tensor, Tensor]:
        """``log sum_other exp(-energy)`` of the states of a chunk, [..., 2^low], and the other side's fields.

        Args:
            number: [1] int64.
        """
        state = _bits(number, self.weight.shape[-2] - self.low)
        fields = self.low_fields + state @ self.weight[..., self.low :, :]
        on_side = self.on_low + (state @ self.bias[..., self.low :].unsqueeze(-1)).squeeze(-1)
        # logaddexp with 0 is softplus, but accurate everywhere.
        return on_side + torch.logaddexp(fields, fields.new_zeros(())).sum(-1), fields

    def log_sums(self) -> Tensor:
        """The logarithms of the sums over each chunk, [chunks, ...]; differentiable."""

        def log_sum(number: Tensor) -> Tensor:
            return self.chunk(number)[0].logsumexp(-1)

        chunks = self.numbers.split(1)
        if len(chunks) > 1 and torch.is_grad_enabled() and (self.on_low.requires_grad or self.low_fields.requires_grad):
            if torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
                # Recompute each chunk in backward rather than keep the whole enumeration.
                return torch.stack([checkpoint(log_sum, number, use_reentrant=False) for number in chunks])
            # Inside torch.func.grad, which knows no checkpoints.
            kept = self.per_state << self.weight.shape[-2]
            if kept > 2**_MAX_TABLES:
                raise NotImplementedError(
                    f"exact_log_partition: torch.func.grad would keep {kept} numbers of the enumeration, and "
                    f"2^{_MAX_TABLES} is the limit; use torch.autograd.grad, for which they are computed again"
                )
            return torch.stack([log_sum(number) for number in chunks])
        # Not a list: its small tensors would lie between the large ones of chunks, and keep their memory from reuse.
        sums = torch.stack([log_sum(chunks[0])] * len(chunks))
        for i, number in enumerate(chunks[1:], 1):
            sums[i] = log_sum(number)
        return sums


def _few_models(name: str, model: BipartiteBoltzmann) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The parameters of a few models at a time, as :func:`_smaller_side_first` has them, with one batch dim.

    As many as fit into one chunk. A model too large for one chunk comes alone.
    """
    parameters = _smaller_side_first(name, model.detach())
    num_models, (n, m) = math.prod(model.batch_shape), parameters[-1].shape[-2:]
    at_once = max(1, _CHUNK // (2**n * max(n, m)))
    flat = (
        p.expand(*model.batch_shape, *own).reshape(num_models, *own)
        for p, own in zip(parameters, ((n,), (m,), (n, m)), strict=True)
    )
    yield from zip(*(p.split(at_once) for p in flat), strict=True)


class _BipartiteMarginals(torch.autograd.Function):
    """log Z [*S] and the two of :class:`Marginals`. A Function, so that torch.vmap adds a batch dim."""

    @staticmethod
    def forward(name: str, left_bias: Tensor, right_bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _bipartite_marginals(name, BipartiteBoltzmann(left_bias, right_bias, weight, validate_args=False))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, name: str, *parameters: Tensor) -> Any:
        outputs = _BipartiteMarginals.apply(name, *_mapped_first(parameters, in_dims[1:]))  # type: ignore[no-untyped-call]
        return outputs, (0,) * len(outputs)


def _bipartite_marginals(name: str, model: BipartiteBoltzmann) -> tuple[Tensor, Tensor, Tensor]:
    parts = []
    for bias, other_bias, weight in _few_models(name, model):
        enumeration = _Enumeration(bias, other_bias, weight)
        log_partition = enumeration.log_sums().logsumexp(0)
        side, other, pair = torch.zeros_like(bias), torch.zeros_like(other_bias), torch.zeros_like(weight)
        for number in enumeration.numbers.split(1):
            log_weights, fields = enumeration.chunk(number)
            p = (log_weights - log_partition.unsqueeze(-1)).exp().unsqueeze(-1)
            on = p * _bits(enumeration.low_numbers + (number << enumeration.low), weight.shape[-2])
            other_on = fields.sigmoid()
            side += on.sum(-2)
            other += (p.mT @ other_on).squeeze(-2)
            pair += on.mT @ other_on
        parts.append((log_partition, side, other, pair))
    log_partition, side, other, pair = (
        torch.cat(p).reshape((*model.batch_shape, *p[0].shape[1:])) for p in zip(*parts, strict=True)
    )
    if model.num_left > model.num_right:
        side, other, pair = other, side, pair.mT
    # Sums of probabilities may be rounded to more than 1.
    return log_partition, torch.cat((side, other), -1).clamp(max=1), pair.clamp(max=1)


def _bipartite_samples(name: str, model: BipartiteBoltzmann, num_samples: int, generator: torch.Generator) -> Tensor:
    """[*batch_shape, C, n1 + n2]: first the chunk of the smaller side's state, then the state, then the other side."""
    parts = []
    for bias, other_bias, weight in _few_models(name, model):
        enumeration = _Enumeration(bias, other_bias, weight)
        chunks = _choose(enumeration.log_sums().mT, num_samples, generator)
        numbers = torch.empty_like(chunks)
        for number in chunks.unique().unsqueeze(-1):
            here = chunks == number  # of all models, if there is one chunk; else there is one model
            low_numbers = _choose(enumeration.chunk(number)[0], int(here.sum()) // len(bias), generator)
            numbers[here] = (low_numbers + (number << enumeration.low)).flatten()
        n, m = weight.shape[-2:]
        z = torch.empty(*numbers.shape, n + m, dtype=torch.uint8, device=model.device)
        side, other = z.split((n, m), -1) if model.num_left <= model.num_right else z.split((m, n), -1)[::-1]
        at_once = max(1, _CHUNK // (max(1, len(bias)) * max(n, m)))
        for few in (slice(first, first + at_once) for first in range(0, num_samples, at_once)):
            state = _bits(numbers[:, few], n)
            p = (state @ weight + other_bias.unsqueeze(-2)).sigmoid()
            side[:, few] = state
            other[:, few] = torch.rand(p.shape, dtype=p.dtype, device=p.device, generator=generator) < p
        parts.append(z)
    return torch.cat(parts).reshape(*model.batch_shape, num_samples, model.num_units)


def _choose(log_weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Independent numbers of states, with these weights [B, S]: [B, count] int64."""
    cumulative = log_weights.softmax(-1).cumsum(-1)
    size = (len(log_weights), count)
    draws = torch.rand(size, dtype=cumulative.dtype, device=cumulative.device, generator=generator)
    # torch.multinomial has uniforms of 24 bits on a GPU.
    chosen = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
    return chosen.clamp_(max=cumulative.shape[-1] - 1)


# An order of elimination ------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """The elimination of one node."""

    node: int
    scope: list[int]  # the neighbours it has by then, in the order in which they will go
    couplings: list[tuple[int, int]]  # to them: number of the edge, place in scope
    children: list["_Step"]  # whose tables are over this node, then some of the scope: their scope begins with it


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

    Of a row of cells first the units coupled along it go, one line of them after the other: each line's table is over
    the row's other units, and these stand between one row and the next.
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
    """The scope of each node, in the order; None as soon as one has more than _HOPELESS nodes."""
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
    """The best order of a few, as steps; refuses what would take too much memory. ``keep``: all tables are kept."""
    instead = _instead(name, "graph_gibbs")
    edges = graph.edges.tolist()
    neighbors: list[set[int]] = [set() for _ in range(graph.num_nodes)]
    for u, v in edges:
        neighbors[u].add(v)
        neighbors[v].add(u)
    # The order of the numbers suits lattices, where the fewest neighbours are a poor guide.
    orders: list[_Order] = [_fewest_neighbors_first, lambda _: range(graph.num_nodes)]
    if isinstance(graph, ChimeraGraph):
        by_rows, by_columns = _line_by_line(graph)
        orders += [lambda _: by_rows, lambda _: by_columns]
    found = [scopes for order in orders if (scopes := _scopes(neighbors, order)) is not None]
    sizes = [[len(scope) for scope in scopes.values()] for scopes in found]
    width, _, best = min(
        ((max(size), sum(2**n for n in size), i) for i, size in enumerate(sizes)), default=(_HOPELESS, 0, 0)
    )
    if width > _MAX_WIDTH:
        over = "" if found else "over "
        raise ValueError(
            f"{name}: the graph needs tables of {over}2^{width} numbers (the least width found is {over}{width}), and "
            f"2^{_MAX_WIDTH} is the limit; use {instead}"
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
    if largest > 2**_MAX_TABLES:
        why = ", all of which marginals and gradients need" if keep else ""
        raise ValueError(
            f"{name}: the graph's tables hold {largest} numbers at a time (width {width}){why}, and 2^{_MAX_TABLES} is "
            f"the limit; use {instead}"
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
    """log Z [*S], and what ``read`` makes of the tables of a few models at a time, [*S, ...].

    Args:
        name: Of the function that errors speak of.
        graph: Of N nodes and E edges.
        bias: [..., N] float64.
        coupling: [..., E] float64. S is the broadcast of both batch shapes.
        read: Is given the steps and their tables.
    """
    steps = _plan(name, graph, keep=read is not None)
    batch = torch.broadcast_shapes(bias.shape[:-1], coupling.shape[:-1])
    parameters = []
    for argument, tensor in (("bias", bias), ("coupling", coupling)):
        _check_finite(name, argument, tensor)
        parameters.append(tensor.expand(*batch, -1).reshape(math.prod(batch), tensor.shape[-1]))
    at_once = max(1, _CHUNK >> max(len(step.scope) for step in steps))
    parts = []
    for bias, coupling in zip(*(p.split(at_once) for p in parameters), strict=True):
        log_partition, odds = _forward(steps, bias, coupling, keep=read is not None)
        parts.append([log_partition, *(read(steps, odds) if read else ())])
    return [torch.cat(p).reshape((*batch, *p[0].shape[1:])) for p in zip(*parts, strict=True)]


def _forward(steps: list[_Step], bias: Tensor, coupling: Tensor, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """Eliminates.

    Args:
        steps: Of the graph.
        bias: [B, N].
        coupling: [B, E].
        keep: Whether the tables are wanted.

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
        off, change = zero, zero  # what the children say of the node being 0, and of its being 1 instead
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
    """single [B, N] and pair [B, E] from what :func:`_forward` kept, which is used up."""
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
    """[B, C, N] bits from what :func:`_forward` kept."""
    num_models = len(odds[0])
    z = torch.zeros(num_models, num_samples, len(steps), dtype=torch.uint8, device=odds[0].device)
    for step, table in zip(reversed(steps), reversed(odds), strict=True):
        state = torch.zeros_like(z[..., 0], dtype=torch.int64)
        for node in step.scope:
            state = 2 * state + z[..., node]
        p = table.reshape(num_models, 2 ** len(step.scope)).gather(-1, state).sigmoid()
        z[..., step.node] = torch.rand(p.shape, dtype=p.dtype, device=p.device, generator=generator) < p
    return z


def _eliminate(name: str, model: GraphBoltzmann, with_marginals: bool) -> tuple[Tensor, ...]:
    """log Z [*batch_shape], differentiable, and if wanted the marginals, which are not."""
    parameters = _of_every_model(model)
    return cast(tuple[Tensor, ...], _Elimination.apply(name, model.graph, with_marginals, *parameters))  # type: ignore[no-untyped-call]


class _Elimination(torch.autograd.Function):
    """log Z [*S] and, if ``with_marginals``, the marginals. Derivatives need these, and compute them if need be.

    bias [..., N] and coupling [..., E] are those of :func:`_solve`.
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
        outputs = _Elimination.apply(*args[:3], *_mapped_first(args[3:], in_dims[3:]))  # type: ignore[no-untyped-call]
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
