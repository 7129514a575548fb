# SPDX-License-Identifier: Apache-2.0
"""Pairs each differentiable op with its backward op."""

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
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return ops.bipartite_gibbs_relaxed(*args)

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
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return ops.graph_gibbs_relaxed(*args)

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
