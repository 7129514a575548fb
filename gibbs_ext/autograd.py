# SPDX-License-Identifier: Apache-2.0
"""Pairs each differentiable op with its backward op, and says what transforms of torch.func make of it."""

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, library

from gibbs_ext import ops


def _run(function: Any, op: Callable[..., Any], *args: Any, sources: tuple[Tensor | None, ...] | None = None) -> Any:
    """A Function, or its op in torch.compile, which traces neither nested Functions nor any with a jvp.

    Args:
        function: The Function.
        op: With the same arguments, but for sources.
        args: Of both.
        sources: See :class:`BipartiteGibbsRelaxedBackward`; given to the Functions that take them.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    if sources is not None:
        args = (len(sources), *sources, *args)
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return _eager(function).apply(*args)


@functools.cache
def _eager(function: Any) -> Any:
    """The same Function for calls outside of torch.func.

    What torch.func needs, a setup_context of its own, costs a call 30 microseconds: PyTorch then looks at the signature
    of forward each time.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = function.forward(*args)
            function.setup_context(ctx, args, output)
            return output

        backward = function.backward
        jvp = function.jvp

    Eager.__name__ = function.__name__
    return Eager


def bipartite_gibbs_relaxed(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`gibbs_ext.ops.bipartite_gibbs_relaxed` under every transform of torch.func."""
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _run(
        BipartiteGibbsRelaxed, ops.bipartite_gibbs_relaxed, *args
    )
    return outputs


def graph_gibbs_relaxed(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`gibbs_ext.ops.graph_gibbs_relaxed` under every transform of torch.func."""
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = _run(GraphGibbsRelaxed, ops.graph_gibbs_relaxed, *args)
    return outputs


def graph_fields(state: Tensor, bias: Tensor, coupling: Tensor, layout: Tensor) -> Tensor:
    """:func:`gibbs_ext.ops.graph_fields` under every transform of torch.func."""
    fields: Tensor = _run(GraphFields, ops.graph_fields, state, bias, coupling, layout)
    return fields


def graph_edge_sums(first: Tensor, second: Tensor, coupling: Tensor, layout: Tensor) -> Tensor:
    """:func:`gibbs_ext.ops.graph_edge_sums` under every transform of torch.func."""
    sums: Tensor = _run(GraphEdgeSums, ops.graph_edge_sums, first, second, coupling, layout)
    return sums


class BipartiteGibbsRelaxed(torch.autograd.Function):
    """:func:`gibbs_ext.ops.bipartite_gibbs_relaxed` with its hand-written backward.

    Differentiable in left_bias, right_bias and weight, and in left when no binary sweep comes first; once only. The
    outputs ``state`` and ``fields`` carry no gradient.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return ops.bipartite_gibbs_relaxed(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        left, left_bias, right_bias, weight, beta, seed, chains, chain_offset, sweep_offset, num_sweeps, *rest = inputs
        _, relaxation, sharpness, slope_gradient = rest
        state, fields = output[3:]
        ctx.mark_non_differentiable(state, fields)
        ctx.left_is_differentiable = num_sweeps == 0 and left.is_floating_point()
        # A starting state without gradient may be overwritten before backward.
        start = left if ctx.left_is_differentiable else None
        ctx.save_for_backward(start, left_bias, right_bias, state, fields, weight, beta, seed, chains)
        ctx.shapes = left.shape, left_bias.shape, right_bias.shape
        ctx.numbers = chain_offset, sweep_offset, num_sweeps, relaxation, sharpness, slope_gradient

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_left, grad_right, grad_left_mean = grad_outputs[:3]
        start, left_bias, right_bias, *saved = ctx.saved_tensors
        state_grad, left_bias_grad, right_bias_grad, weight_grad = _run(
            BipartiteGibbsRelaxedBackward, ops.bipartite_gibbs_relaxed_backward,
            grad_left, grad_right, grad_left_mean, *saved, *ctx.numbers, sources=(start, left_bias, right_bias),
        )  # fmt: skip
        left_shape, left_bias_shape, right_bias_shape = ctx.shapes
        needs = ctx.needs_input_grad
        return (
            state_grad.sum_to_size(left_shape) if needs[0] and ctx.left_is_differentiable else None,
            left_bias_grad.sum_to_size(left_bias_shape) if needs[1] else None,
            right_bias_grad.sum_to_size(right_bias_shape) if needs[2] else None,
            weight_grad if needs[3] else None,
            *(None,) * 10,
        )

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> NoReturn:
        ops.refuse_forward_mode("bipartite_gibbs_relaxed")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return ops.map_rows("bipartite_gibbs_relaxed", BipartiteGibbsRelaxed.apply, info, in_dims, args)


class BipartiteGibbsRelaxedBackward(torch.autograd.Function):
    """:func:`gibbs_ext.ops.bipartite_gibbs_relaxed_backward`, which refuses to be differentiated again.

    A Function, so that torch.func.grad, which always prepares for a second derivative, can pass through. It takes
    ``sources``, the tensors that its results depend on but that it does not read, so that derivatives in these are an
    error rather than zero.
    """

    @staticmethod
    def forward(num_sources: int, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return ops.bipartite_gibbs_relaxed_backward(*args[num_sources:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> NoReturn:
        ops.refuse_second_derivative("bipartite_gibbs_relaxed")

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> NoReturn:
        ops.refuse_second_derivative("bipartite_gibbs_relaxed")

    @staticmethod
    def vmap(info: Any, in_dims: Any, num_sources: int, *args: Any) -> Any:
        run = functools.partial(BipartiteGibbsRelaxedBackward.apply, num_sources, *args[:num_sources])
        return ops.map_rows(
            "bipartite_gibbs_relaxed_backward", run, info, in_dims[1 + num_sources :], args[num_sources:]
        )


class GraphGibbsRelaxed(torch.autograd.Function):
    """:func:`gibbs_ext.ops.graph_gibbs_relaxed` with its hand-written backward.

    Differentiable in bias and coupling, and in state when no binary sweep comes first; once only. The outputs
    ``start`` and ``fields`` carry no gradient.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return ops.graph_gibbs_relaxed(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        state, bias, coupling, layout, beta, seed, chains, chain_offset, sweep_offset, num_sweeps, *rest = inputs
        _, relaxation, sharpness, slope_gradient = rest
        start, fields = output[2:]
        ctx.mark_non_differentiable(start, fields)
        ctx.state_is_differentiable = num_sweeps == 0 and state.is_floating_point()
        # As in BipartiteGibbsRelaxed.
        given = state if ctx.state_is_differentiable else None
        ctx.save_for_backward(given, bias, start, fields, coupling, layout, beta, seed, chains)
        ctx.shapes = state.shape, bias.shape
        ctx.numbers = chain_offset, sweep_offset, num_sweeps, relaxation, sharpness, slope_gradient

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        given, bias, *saved = ctx.saved_tensors
        state_grad, bias_grad, coupling_grad = _run(
            GraphGibbsRelaxedBackward, ops.graph_gibbs_relaxed_backward,
            *grad_outputs[:2], *saved, *ctx.numbers, sources=(given, bias),
        )  # fmt: skip
        state_shape, bias_shape = ctx.shapes
        needs = ctx.needs_input_grad
        return (
            state_grad.sum_to_size(state_shape) if needs[0] and ctx.state_is_differentiable else None,
            bias_grad.sum_to_size(bias_shape) if needs[1] else None,
            coupling_grad if needs[2] else None,
            *(None,) * 11,
        )

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> NoReturn:
        ops.refuse_forward_mode("graph_gibbs_relaxed")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return ops.map_rows("graph_gibbs_relaxed", GraphGibbsRelaxed.apply, info, in_dims, args)


class GraphGibbsRelaxedBackward(torch.autograd.Function):
    """:func:`gibbs_ext.ops.graph_gibbs_relaxed_backward`, as :class:`BipartiteGibbsRelaxedBackward` is."""

    @staticmethod
    def forward(num_sources: int, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return ops.graph_gibbs_relaxed_backward(*args[num_sources:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> NoReturn:
        ops.refuse_second_derivative("graph_gibbs_relaxed")

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> NoReturn:
        ops.refuse_second_derivative("graph_gibbs_relaxed")

    @staticmethod
    def vmap(info: Any, in_dims: Any, num_sources: int, *args: Any) -> Any:
        run = functools.partial(GraphGibbsRelaxedBackward.apply, num_sources, *args[:num_sources])
        return ops.map_rows("graph_gibbs_relaxed_backward", run, info, in_dims[1 + num_sources :], args[num_sources:])


class GraphFields(torch.autograd.Function):
    """:func:`gibbs_ext.ops.graph_fields`, linear in bias and bilinear in state and coupling; differentiable at will.

    Derivatives are made of the Functions again, so that they can be differentiated.
    """

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return ops.graph_fields(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        state, bias, coupling, layout = inputs
        ctx.save_for_backward(state, coupling, layout)
        ctx.save_for_forward(state, coupling, layout)
        ctx.shapes = state.shape, bias.shape, output.shape

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        state, coupling, layout = ctx.saved_tensors
        state_shape, bias_shape, _ = ctx.shapes
        needs = ctx.needs_input_grad
        return (
            _sums_of_neighbors(grad, coupling, layout).sum_to_size(state_shape) if needs[0] else None,
            grad.sum_to_size(bias_shape) if needs[1] else None,
            graph_edge_sums(grad, state, coupling, layout) if needs[2] else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Tensor:
        state_tangent, bias_tangent, coupling_tangent, _ = grad_inputs
        state, coupling, layout = ctx.saved_tensors
        *_, shape = ctx.shapes
        terms = []
        if state_tangent is not None:
            terms.append(_sums_of_neighbors(state_tangent, coupling, layout))
        if bias_tangent is not None:
            terms.append(bias_tangent.to(state.dtype))
        if coupling_tangent is not None:
            terms.append(_sums_of_neighbors(state, coupling_tangent, layout))
        return functools.reduce(torch.add, (term.expand(shape) for term in terms))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return ops.map_rows("graph_fields", GraphFields.apply, info, in_dims, args)


class GraphEdgeSums(torch.autograd.Function):
    """:func:`gibbs_ext.ops.graph_edge_sums`, bilinear in its first two arguments; differentiable at will."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return ops.graph_edge_sums(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        first, second, coupling, layout = inputs
        ctx.save_for_backward(first, second, layout)
        ctx.save_for_forward(first, second, coupling, layout)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        first, second, layout = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            _broadcast_back(_sums_of_neighbors(second, grad, layout), first.shape) if needs[0] else None,
            _broadcast_back(_sums_of_neighbors(first, grad, layout), second.shape) if needs[1] else None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Tensor:
        first_tangent, second_tangent, _, _ = grad_inputs
        first, second, coupling, layout = ctx.saved_tensors
        sums = []
        if first_tangent is not None:
            sums.append(graph_edge_sums(first_tangent, second, coupling, layout))
        if second_tangent is not None:
            sums.append(graph_edge_sums(first, second_tangent, coupling, layout))
        return sum(sums, torch.zeros_like(coupling, dtype=first.dtype))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return ops.map_rows("graph_edge_sums", GraphEdgeSums.apply, info, in_dims, args)


def _sums_of_neighbors(values: Tensor, coupling: Tensor, layout: Tensor) -> Tensor:
    """``sum_e coupling_e values_j`` of each unit i, e = (i, j)."""
    return graph_fields(values, coupling.new_zeros(()).expand(values.shape[-1]), coupling, layout)


def _broadcast_back(grad: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of a tensor of this shape, which may also have dims along which ``grad`` is the same."""
    return grad.expand(torch.broadcast_shapes(grad.shape, shape)).sum_to_size(shape)


class OneSeed(torch.autograd.Function):
    """Returns the seed and 0. Under vmap it returns the first row's seed for all rows, and each row's number.

    torch.vmap(randomness="different") draws a seed for each row; one call for all rows needs a single one.
    """

    @staticmethod
    def forward(seed: Tensor) -> tuple[Tensor, Tensor]:
        return seed.clone(), torch.zeros_like(seed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        first, row = OneSeed.apply(ops.row_of(args[0], in_dims[0], 0))  # type: ignore[no-untyped-call]
        rows = info.batch_size
        return (first, row * rows + torch.arange(rows, device=row.device)), (None, 0)


# For those who call torch.ops directly, and for graphs that hold the op itself.
library.register_autograd(
    "gibbs_ext::bipartite_gibbs_relaxed",
    BipartiteGibbsRelaxed.backward,
    setup_context=BipartiteGibbsRelaxed.setup_context,
)
library.register_autograd("gibbs_ext::bipartite_gibbs_relaxed_backward", BipartiteGibbsRelaxedBackward.backward)
library.register_autograd(
    "gibbs_ext::graph_gibbs_relaxed", GraphGibbsRelaxed.backward, setup_context=GraphGibbsRelaxed.setup_context
)
library.register_autograd("gibbs_ext::graph_gibbs_relaxed_backward", GraphGibbsRelaxedBackward.backward)
library.register_autograd("gibbs_ext::graph_fields", GraphFields.backward, setup_context=GraphFields.setup_context)
library.register_autograd(
    "gibbs_ext::graph_edge_sums", GraphEdgeSums.backward, setup_context=GraphEdgeSums.setup_context
)
