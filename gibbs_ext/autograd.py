# SPDX-License-Identifier: Apache-2.0
"""Derivatives of the differentiable ops, in eager mode, under torch.compile and under transforms of torch.func."""

import functools
from typing import Any, NoReturn

import torch
from torch import Tensor, library
from torch.autograd import forward_ad

from gibbs_ext import ops


def _run(
    function: Any, name: str, args: tuple[Any, ...], before: tuple[Any, ...] = (), after: tuple[Any, ...] = ()
) -> Any:
    """Applies a Function, or calls its op if nothing needs the Function.

    Args:
        function: Function that computes the op.
        name: Name of the op.
        args: Arguments of the op.
        before: Arguments of the Function that come before those of the op.
        after: Arguments of the Function that come after those of the op.
    """
    if torch.compiler.is_compiling():  # torch.compile traces neither nested Functions nor Functions with a jvp.
        return ops.call(name, *args)
    if torch._C._are_functorch_transforms_active():
        return function.apply(*before, *args, *after)
    needs_gradient = torch.is_grad_enabled() and torch._C._any_requires_grad(*before, *args)
    if not needs_gradient and forward_ad._current_level < 0:
        return ops.call_without_gradient(name, *args)
    return _eager(function).apply(*before, *args, *after)


@functools.cache
def _eager(function: Any) -> Any:
    """The same Function for calls outside of torch.func.

    torch.func needs a separate setup_context, for which PyTorch inspects the signature of forward at every call. That
    takes 30 microseconds.
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


def relaxed_sweeps(name: str, *args: Any) -> tuple[Tensor, ...]:
    """The op ``bipartite_gibbs_relaxed`` or ``graph_gibbs_relaxed`` under every transform of torch.func."""
    outputs: tuple[Tensor, ...] = _run(RelaxedSweeps, name, args, after=(name,))
    return outputs


def graph_fields(state: Tensor, bias: Tensor, coupling: Tensor, layout: Tensor) -> Tensor:
    """The op ``graph_fields`` under every transform of torch.func."""
    fields: Tensor = _run(GraphFields, "graph_fields", (state, bias, coupling, layout))
    return fields


def graph_edge_sums(first: Tensor, second: Tensor, coupling: Tensor, layout: Tensor) -> Tensor:
    """The op ``graph_edge_sums`` under every transform of torch.func."""
    sums: Tensor = _run(GraphEdgeSums, "graph_edge_sums", (first, second, coupling, layout))
    return sums


# The ops of relaxed sweeps differ in the number of tensors that precede the coupling: a state and its biases.
_NUM_SOURCES = {"bipartite_gibbs_relaxed": 3, "graph_gibbs_relaxed": 2}


class RelaxedSweeps(torch.autograd.Function):
    """An op of relaxed sweeps with its hand-written backward. Takes the op's arguments, then its name.

    Differentiable in the biases and the coupling, and in the state if no binary sweep comes first; once only. The last
    two outputs, the binary state and the fields, carry no gradient.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        *args_of_op, name = args
        outputs: tuple[Tensor, ...] = ops.call(name, *args_of_op)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        # The arguments: state and biases; coupling, layout (of graphs), beta, seed and chains; seven numbers; the name.
        *tensors, chain_offset, sweep_offset, num_sweeps, _, relaxation, sharpness, slope_gradient, ctx.op = inputs
        num_sources = _NUM_SOURCES[ctx.op]
        state, *biases = tensors[:num_sources]
        *differentiable, start, fields = output
        ctx.mark_non_differentiable(start, fields)
        ctx.set_materialize_grads(False)  # else PyTorch makes zeros for start and fields, too
        ctx.state_is_differentiable = num_sweeps == 0 and state.is_floating_point()
        # A starting state without gradient is not saved, because it may be overwritten before backward.
        given = state if ctx.state_is_differentiable else None
        ctx.save_for_backward(given, *biases, start, fields, *tensors[num_sources:])
        ctx.shapes = [source.shape for source in (state, *biases)]
        ctx.output_shapes = [tensor.shape for tensor in differentiable]
        ctx.numbers = chain_offset, sweep_offset, num_sweeps, relaxation, sharpness, slope_gradient

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        num_sources = len(ctx.shapes)
        saved = ctx.saved_tensors
        sources, start = saved[:num_sources], saved[num_sources]
        grads = [
            start.new_zeros(shape) if grad is None else grad
            for grad, shape in zip(grad_outputs, ctx.output_shapes, strict=False)  # start and fields have none
        ]
        args = (*grads, *saved[num_sources:], *ctx.numbers)
        *of_sources, of_coupling = _run(
            RelaxedSweepsBackward, f"{ctx.op}_backward", args, before=sources, after=(ctx.op,)
        )
        needs = list(ctx.needs_input_grad)
        needs[0] &= ctx.state_is_differentiable
        results = [
            _sum_to(grad, shape) if need else None
            for need, grad, shape in zip(needs, of_sources, ctx.shapes, strict=False)
        ]
        coupling = saved[num_sources + 2]  # after start and fields
        results.append(_sum_to(of_coupling, coupling.shape) if needs[num_sources] else None)
        return *results, *(None,) * (len(needs) - len(results))

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> NoReturn:
        ops.refuse_forward_mode(ctx.op)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        *args_of_op, name = args

        def run(*args_of_op: Any) -> Any:
            return RelaxedSweeps.apply(*args_of_op, name)  # type: ignore[no-untyped-call]

        return ops.map_rows(name, run, info, in_dims[:-1], args_of_op)


class RelaxedSweepsBackward(torch.autograd.Function):
    """The backward op of relaxed sweeps, which refuses to be differentiated again.

    It is a Function because torch.func.grad, which always prepares for a second derivative, must pass through. It takes
    the sources, the backward op's arguments and the name of the forward op. The sources (the state, if differentiable,
    and the biases) are tensors that the results depend on although the op does not read them: a derivative in one of
    them is thereby an error rather than zero.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        *inputs, name = args
        outputs: tuple[Tensor, ...] = ops.call(f"{name}_backward", *inputs[_NUM_SOURCES[name] :])
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> NoReturn:
        ops.refuse_second_derivative(ctx.op)

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> NoReturn:
        ops.refuse_second_derivative(ctx.op)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        name = args[-1]
        num_sources = _NUM_SOURCES[name]
        sources = args[:num_sources]

        def run(*args_of_op: Any) -> Any:
            return RelaxedSweepsBackward.apply(*sources, *args_of_op, name)  # type: ignore[no-untyped-call]

        return ops.map_rows(f"{name}_backward", run, info, in_dims[num_sources:-1], args[num_sources:-1])


class GraphFields(torch.autograd.Function):
    """The op ``graph_fields``, which is linear in bias and bilinear in state and coupling.

    Its derivatives are made of the Functions again, so that it can be differentiated any number of times.
    """

    @staticmethod
    def forward(*args: Any) -> Tensor:
        fields: Tensor = ops.call("graph_fields", *args)
        return fields

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
    """The op ``graph_edge_sums``, which is bilinear in its first two arguments; its derivatives are Functions, too."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        sums: Tensor = ops.call("graph_edge_sums", *args)
        return sums

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
    """``sum_e coupling_e values_j`` over the edges e = (i, j) of each unit i."""
    return graph_fields(values, coupling.new_zeros(()).expand(values.shape[-1]), coupling, layout)


def _sum_to(grad: Tensor, shape: torch.Size) -> Tensor:
    """``grad.sum_to_size(shape)``, a microsecond faster in the usual cases: the same shape, or leading dims to sum."""
    if grad.shape == shape:
        return grad
    leading = grad.dim() - len(shape)
    return grad.sum(tuple(range(leading))) if grad.shape[leading:] == shape else grad.sum_to_size(shape)


def _broadcast_back(grad: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of a tensor of this shape. ``grad`` is constant along dims that only the tensor has."""
    return grad.expand(torch.broadcast_shapes(grad.shape, shape)).sum_to_size(shape)


class OneSeed(torch.autograd.Function):
    """Returns the seed and 0. Under vmap it returns the first row's seed for all rows, and each row's number.

    torch.vmap(randomness="different") draws a seed for each row, but one call for all rows needs a single seed.
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


# The same formulas for direct calls of torch.ops and for graphs of torch.compile, which hold the ops themselves.
def _register_relaxed_sweeps(name: str) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        RelaxedSweeps.setup_context(ctx, (*inputs, name), output)

    def refuse(ctx: Any, *grad_outputs: Tensor) -> NoReturn:
        ops.refuse_second_derivative(name)

    library.register_autograd(f"gibbs_ext::{name}", RelaxedSweeps.backward, setup_context=setup_context)
    library.register_autograd(f"gibbs_ext::{name}_backward", refuse)


for _name in _NUM_SOURCES:
    _register_relaxed_sweeps(_name)
library.register_autograd("gibbs_ext::graph_fields", GraphFields.backward, setup_context=GraphFields.setup_context)
library.register_autograd(
    "gibbs_ext::graph_edge_sums", GraphEdgeSums.backward, setup_context=GraphEdgeSums.setup_context
)
