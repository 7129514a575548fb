# SPDX-License-Identifier: Apache-2.0
"""Pairs each differentiable op with its backward op."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, library

from gibbs_ext import ops


class BipartiteGibbsRelaxed(torch.autograd.Function):
    """:func:`gibbs_ext.ops.bipartite_gibbs_relaxed` with its hand-written backward.

    Differentiable in left_bias, right_bias and weight, and in left when no binary sweep comes first; once only. The
    outputs ``state`` and ``fields`` carry no gradient.
    """

    @staticmethod
    def forward(
        left: Tensor, left_bias: Tensor, right_bias: Tensor, weight: Tensor, beta: Tensor, seed: Tensor,
        chains: Tensor | None, chain_offset: int, sweep_offset: int, num_sweeps: int, num_relaxed_sweeps: int,
        relaxation: int, sharpness: float, slope_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        # Named one by one: without gradients, torch.compile counts them.
        return ops.bipartite_gibbs_relaxed(
            left, left_bias, right_bias, weight, beta, seed, chains, chain_offset, sweep_offset, num_sweeps,
            num_relaxed_sweeps, relaxation, sharpness, slope_gradient,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        left, left_bias, right_bias, weight, beta, seed, chains, chain_offset, sweep_offset, num_sweeps, *rest = inputs
        _, relaxation, sharpness, slope_gradient = rest
        state, fields = output[3:]
        ctx.mark_non_differentiable(state, fields)
        ctx.save_for_backward(state, fields, weight, beta, seed, chains)
        ctx.shapes = left.shape, left_bias.shape, right_bias.shape
        ctx.left_is_differentiable = num_sweeps == 0 and left.is_floating_point()
        ctx.numbers = chain_offset, sweep_offset, num_sweeps, relaxation, sharpness, slope_gradient

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_left, grad_right, grad_left_mean = grad_outputs[:3]
        # torch.func.grad needs the Function; torch.compile, which differentiates once, cannot trace a nested one.
        compiling = torch.compiler.is_compiling()
        run = ops.bipartite_gibbs_relaxed_backward if compiling else BipartiteGibbsRelaxedBackward.apply
        state_grad, left_bias_grad, right_bias_grad, weight_grad = run(
            grad_left, grad_right, grad_left_mean, *ctx.saved_tensors, *ctx.numbers
        )
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
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        ops.refuse_vmap("bipartite_gibbs_relaxed")


class BipartiteGibbsRelaxedBackward(torch.autograd.Function):
    """:func:`gibbs_ext.ops.bipartite_gibbs_relaxed_backward`, which refuses to be differentiated again.

    A Function, so that torch.func.grad, which always prepares for a second derivative, can pass through.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return ops.bipartite_gibbs_relaxed_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> NoReturn:
        raise NotImplementedError("bipartite_gibbs_relaxed: second derivatives are not supported")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        ops.refuse_vmap("bipartite_gibbs_relaxed_backward")


class GraphGibbsRelaxed(torch.autograd.Function):
    """:func:`gibbs_ext.ops.graph_gibbs_relaxed` with its hand-written backward.

    Differentiable in bias and coupling, and in state when no binary sweep comes first; once only. The outputs
    ``start`` and ``fields`` carry no gradient.
    """

    @staticmethod
    def forward(
        state: Tensor, bias: Tensor, coupling: Tensor, layout: Tensor, beta: Tensor, seed: Tensor,
        chains: Tensor | None, chain_offset: int, sweep_offset: int, num_sweeps: int, num_relaxed_sweeps: int,
        relaxation: int, sharpness: float, slope_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        # Named one by one: without gradients, torch.compile counts them.
        return ops.graph_gibbs_relaxed(
            state, bias, coupling, layout, beta, seed, chains, chain_offset, sweep_offset, num_sweeps,
            num_relaxed_sweeps, relaxation, sharpness, slope_gradient,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        state, bias, coupling, layout, beta, seed, chains, chain_offset, sweep_offset, num_sweeps, *rest = inputs
        _, relaxation, sharpness, slope_gradient = rest
        start, fields = output[2:]
        ctx.mark_non_differentiable(start, fields)
        ctx.save_for_backward(start, fields, coupling, layout, beta, seed, chains)
        ctx.shapes = state.shape, bias.shape
        ctx.state_is_differentiable = num_sweeps == 0 and state.is_floating_point()
        ctx.numbers = chain_offset, sweep_offset, num_sweeps, relaxation, sharpness, slope_gradient

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # As in BipartiteGibbsRelaxed.
        compiling = torch.compiler.is_compiling()
        run: Any = ops.graph_gibbs_relaxed_backward if compiling else GraphGibbsRelaxedBackward.apply
        state_grad, bias_grad, coupling_grad = run(*grad_outputs[:2], *ctx.saved_tensors, *ctx.numbers)
        state_shape, bias_shape = ctx.shapes
        needs = ctx.needs_input_grad
        return (
            state_grad.sum_to_size(state_shape) if needs[0] and ctx.state_is_differentiable else None,
            bias_grad.sum_to_size(bias_shape) if needs[1] else None,
            coupling_grad if needs[2] else None,
            *(None,) * 11,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        ops.refuse_vmap("graph_gibbs_relaxed")


class GraphGibbsRelaxedBackward(torch.autograd.Function):
    """:func:`gibbs_ext.ops.graph_gibbs_relaxed_backward`, which refuses to be differentiated again."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return ops.graph_gibbs_relaxed_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> NoReturn:
        raise NotImplementedError("graph_gibbs_relaxed: second derivatives are not supported")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        ops.refuse_vmap("graph_gibbs_relaxed_backward")


class GraphFields(torch.autograd.Function):
    """:func:`gibbs_ext.ops.graph_fields`, linear in bias and bilinear in state and coupling; differentiable at will."""

    @staticmethod
    def forward(state: Tensor, bias: Tensor, coupling: Tensor, layout: Tensor) -> Tensor:
        return ops.graph_fields(state, bias, coupling, layout)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        state, bias, coupling, layout = inputs
        ctx.save_for_backward(state, coupling, layout)
        ctx.shapes = state.shape, bias.shape

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        state, coupling, layout = ctx.saved_tensors
        state_shape, bias_shape = ctx.shapes
        needs = ctx.needs_input_grad
        return (
            _sums_of_neighbors(grad, coupling, layout).sum_to_size(state_shape) if needs[0] else None,
            grad.sum_to_size(bias_shape) if needs[1] else None,
            _graph_edge_sums(grad, state, coupling, layout) if needs[2] else None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        *tensors, layout = args
        return GraphFields.apply(*_aligned(tensors, in_dims[:3]), layout), 0  # type: ignore[no-untyped-call]


class GraphEdgeSums(torch.autograd.Function):
    """:func:`gibbs_ext.ops.graph_edge_sums`, bilinear in its first two arguments; differentiable at will."""

    @staticmethod
    def forward(first: Tensor, second: Tensor, coupling: Tensor, layout: Tensor) -> Tensor:
        return ops.graph_edge_sums(first, second, coupling, layout)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        first, second, _, layout = inputs
        ctx.save_for_backward(first, second, layout)

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
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        *tensors, layout = args
        first, second, coupling = _aligned(tensors, in_dims[:3], info.batch_size)
        sums: Tensor = GraphEdgeSums.apply(first, second, coupling, layout)  # type: ignore[no-untyped-call]
        own = tensors[2].shape if in_dims[2] is None else tensors[2].movedim(in_dims[2], 0).shape[1:]
        return sums.reshape(info.batch_size, *own), 0


def _aligned(tensors: Sequence[Tensor], in_dims: Sequence[int | None], batch_size: int | None = None) -> list[Tensor]:
    """The mapped dim first, before as many batch dims for all of them.

    ``batch_size``: the last tensor is given a mapped dim, too.
    """
    mapped = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, in_dims, strict=True)]
    if batch_size is not None and in_dims[-1] is None:
        mapped[-1] = mapped[-1].expand(batch_size, *mapped[-1].shape)
        in_dims = [*in_dims[:-1], 0]
    ranks = [t.dim() - (d is not None) for t, d in zip(mapped, in_dims, strict=True)]
    return [
        t if d is None else t.reshape(t.shape[0], *(1,) * (max(ranks) - rank), *t.shape[1:])
        for t, d, rank in zip(mapped, in_dims, ranks, strict=True)
    ]


# A backward pass is made of the Functions again, so that it can be differentiated; torch.compile, which does so once,
# cannot trace Functions inside one.


def _sums_of_neighbors(values: Tensor, coupling: Tensor, layout: Tensor) -> Tensor:
    """``sum_e coupling_e values_j`` of each unit i, e = (i, j)."""
    run: Any = ops.graph_fields if torch.compiler.is_compiling() else GraphFields.apply
    fields: Tensor = run(values, coupling.new_zeros(()).expand(values.shape[-1]), coupling, layout)
    return fields


def _graph_edge_sums(first: Tensor, second: Tensor, coupling: Tensor, layout: Tensor) -> Tensor:
    run: Any = ops.graph_edge_sums if torch.compiler.is_compiling() else GraphEdgeSums.apply
    sums: Tensor = run(first, second, coupling, layout)
    return sums


def _broadcast_back(grad: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of a tensor of this shape, which may also have dims along which ``grad`` is the same."""
    return grad.expand(torch.broadcast_shapes(grad.shape, shape)).sum_to_size(shape)


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
