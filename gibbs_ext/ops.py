# SPDX-License-Identifier: Apache-2.0
"""The only module that speaks to the compiled one: typed wrappers, fake kernels and what vmap and autograd may do.

Every argument check that concerns tensors is made once, in C++, in front of the kernels. Names, meanings and shapes
are those of :mod:`gibbs_ext.functional`; here every argument is explicit, ``beta`` is a float64 tensor of one value
or one per sweep, and ``seed`` a 0-dim int64 tensor.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, library

try:
    from gibbs_ext import _C
except ImportError as error:
    raise ImportError(
        f"gibbs_ext: the compiled module gibbs_ext._C does not load ({error}). Build it for this Python and PyTorch "
        "with `pip install --no-build-isolation .` in the source folder, and do not import from there uninstalled."
    ) from error

RELAXATIONS = {"pwl": 0, "concrete": 1, "straight_through": 2, "mean_field": 3}


class CouplingResolutionWarning(UserWarning):
    """Couplings, or couplings and biases, are so large that rounding may shift a probability.

    ``|beta| * (n * 2^-k + 2^-23 * b)`` exceeds 1e-3, for parameters of any dtype. The message says which of the two
    terms is the larger. beta is the largest of a schedule. A beta that is a tensor on a CUDA device counts as 1, as its
    values are not known before the kernels run.

    - Fixed point: n is the largest number of neighbours of a unit and 2^-k the resolution
      (:func:`gibbs_ext.coupling_resolution`). Couplings much smaller than the largest are lost then.
    - float32, in which biases are added to sums of couplings: b is the largest bias that such a sum may cancel. Where
      the two nearly cancel, what is left of them is off by up to 2^-23 of either.

    Parameters that are smaller, or a lower beta, help. Without a warning no unit's probability is off by
    1e-3, unless beta is a tensor on a CUDA device.
    """


_C.set_resolution_warning(CouplingResolutionWarning)

CUDA_LIBRARY = Path(__file__).with_name("_cuda.so")


def _load_cuda() -> tuple[_C.CudaLibrary | None, str]:
    """The library of CUDA kernels, or why there is none."""
    if torch.version.cuda is None:
        return None, f"this PyTorch, {torch.__version__}, is built without CUDA"
    if not CUDA_LIBRARY.exists():
        return None, "gibbs_ext was built without CUDA kernels; GIBBS_CUDA=1 when it is installed insists on them"
    try:
        return _C.load_cuda(str(CUDA_LIBRARY)), ""
    except ImportError as error:
        return None, f"the CUDA kernels do not load: {error}"


_cuda, _why_no_cuda = _load_cuda()


def build_info() -> dict[str, Any]:
    """What was compiled, and what of it is in use.

    Returns:
        version, compiler, cpu_instruction_sets, instruction_set, stable_abi; cuda_architectures: compute capabilities
        that the loaded CUDA kernels are compiled for ("75" is 7.5; on newer ones the driver compiles their PTX); cuda:
        "loaded", or why there are no CUDA kernels.
    """
    architectures = tuple(_cuda.architectures.split(";")) if _cuda else ()
    return _C.build_info() | {"cuda_architectures": architectures, "cuda": _why_no_cuda or "loaded"}


def synchronize(device: int | str | torch.device | None = None) -> None:
    """Waits for a CUDA device and raises what its kernels found wrong.

    Calls on a CUDA device return before their kernels have run. What a kernel finds wrong with the values of a tensor
    (NaN in a weight, a state that is not 0 or 1) is therefore raised by the next call on that device, or by this
    function; the results of the faulty call are not valid. A CouplingResolutionWarning is given there, too. With
    GIBBS_CUDA_SYNCHRONOUS=1 in the environment every call waits, and raises its own faults.

    Args:
        device: A CUDA device; the current one by default.

    Raises:
        RuntimeError: The message begins with the name of the function that was called.
    """
    torch.cuda.synchronize(device)
    index = torch.cuda._utils._get_device_index(device, optional=True)
    try:
        fault = _cuda.take_fault(index) if _cuda else None
    except RuntimeError:
        _raise_pending()
        raise
    if fault:
        raise RuntimeError(fault)


def set_cuda_route(name: str) -> None:
    """How binary sweeps are made on CUDA devices: "auto" or, for tests and benchmarks, one route by name."""
    if _cuda is None:
        raise RuntimeError(f"set_cuda_route: {_why_no_cuda}")
    _cuda.set_route(name)


def last_cuda_route() -> str:
    """Which route the last binary sweeps on a CUDA device took: another than was asked for where that does not fit."""
    return _cuda.last_route if _cuda else ""


set_graph_route = _C.set_graph_route
set_instruction_set = _C.set_instruction_set
instruction_set = _C.instruction_set


def graph_layout(num_nodes: int, edges: Tensor, colors: Tensor | None) -> Tensor:
    """The int32 tensor that the graph ops read, its format in csrc/core/graph_view.h.

    Args:
        num_nodes: At least 1.
        edges: [E, 2] int64 on the CPU, each edge once.
        colors: [num_nodes] int64 on the CPU, or None to have them found.
    """
    return torch.from_numpy(_C.graph_layout(num_nodes, edges.numpy(), None if colors is None else colors.numpy()))


def _raise_pending() -> None:
    """Raises what stopped an op, if it has left an exception behind."""
    pending = _C.take_exception()
    if pending is not None:
        raise pending from None


def _call(op: Any, *args: Any) -> Any:
    """Calls an op, turning a Ctrl-C that stopped it into KeyboardInterrupt.

    Between C++ and Python the dispatcher turns every exception into RuntimeError, so the op leaves the one it was
    stopped by behind. (A graph of torch.compile calls the op directly: there Ctrl-C is a RuntimeError.)
    """
    if torch.compiler.is_compiling():
        return op(*args)
    _C.take_exception()  # of an op that a graph called and that was stopped
    try:
        return op(*args)
    except NotImplementedError as error:
        if _cuda is None and any(isinstance(tensor, Tensor) and tensor.is_cuda for tensor in args):
            name = op._schema.name.removeprefix("gibbs_ext::")
            raise RuntimeError(f"{name}: no CUDA kernels for tensors on a GPU: {_why_no_cuda}") from error
        raise
    except RuntimeError:
        _raise_pending()
        raise


# Typed wrappers ---------------------------------------------------------------------------------------------------


def bipartite_gibbs(
    left: Tensor,
    left_bias: Tensor,
    right_bias: Tensor,
    weight: Tensor,
    beta: Tensor,
    seed: Tensor,
    right: Tensor | None,
    clamp_left: Tensor | None,
    clamp_right: Tensor | None,
    chains: Tensor | None,
    chain_offset: int,
    sweep_offset: int,
    num_sweeps: int,
) -> tuple[Tensor, Tensor]:
    """Binary sweeps; see :func:`gibbs_ext.bipartite_gibbs`. Not differentiable.

    Returns:
        left [*S, n1] and right [*S, n2] of left's dtype, S the broadcast of every batch shape.
    """
    outputs: tuple[Tensor, Tensor] = _call(
        torch.ops.gibbs_ext.bipartite_gibbs.default,
        left, left_bias, right_bias, weight, beta, seed, right, clamp_left, clamp_right,
        chains, chain_offset, sweep_offset, num_sweeps,
    )  # fmt: skip
    return outputs


def bipartite_gibbs_relaxed(
    left: Tensor,
    left_bias: Tensor,
    right_bias: Tensor,
    weight: Tensor,
    beta: Tensor,
    seed: Tensor,
    chains: Tensor | None,
    chain_offset: int,
    sweep_offset: int,
    num_sweeps: int,
    num_relaxed_sweeps: int,
    relaxation: int,
    sharpness: float,
    slope_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Binary sweeps, then relaxed ones; see :func:`gibbs_ext.bipartite_gibbs_relaxed`. Differentiable.

    Returns:
        left [*S, n1], right [*S, n2], left_mean [*S, n1], the binary state [*S, n1] the relaxed sweeps started from,
        and the fields [num_relaxed_sweeps, *S, n2 + n1] (before beta) of each relaxed sweep's right, then left update.
        The last two carry no gradient: they are what backward needs.
    """
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _call(
        torch.ops.gibbs_ext.bipartite_gibbs_relaxed.default,
        left, left_bias, right_bias, weight, beta, seed, chains, chain_offset, sweep_offset,
        num_sweeps, num_relaxed_sweeps, relaxation, sharpness, slope_gradient,
    )  # fmt: skip
    return outputs


def bipartite_gibbs_relaxed_backward(
    grad_left: Tensor,
    grad_right: Tensor,
    grad_left_mean: Tensor,
    state: Tensor,
    fields: Tensor,
    weight: Tensor,
    beta: Tensor,
    seed: Tensor,
    chains: Tensor | None,
    chain_offset: int,
    sweep_offset: int,
    num_sweeps: int,
    relaxation: int,
    sharpness: float,
    slope_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backward of :func:`bipartite_gibbs_relaxed`, which recomputes the random words. Not differentiable itself.

    Returns:
        Gradients of state [*S, n1], left_bias [*S, n1], right_bias [*S, n2] (not yet summed over broadcast dims) and
        weight (of weight's own shape).
    """
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = _call(
        torch.ops.gibbs_ext.bipartite_gibbs_relaxed_backward.default,
        grad_left, grad_right, grad_left_mean, state, fields, weight, beta, seed, chains, chain_offset, sweep_offset,
        num_sweeps, relaxation, sharpness, slope_gradient,
    )  # fmt: skip
    return outputs


def bipartite_ais(
    left: Tensor,
    left_bias: Tensor,
    right_bias: Tensor,
    weight: Tensor,
    base_left_bias: Tensor,
    base_right_bias: Tensor,
    betas: Tensor,
    seed: Tensor,
    chains: Tensor | None,
    chain_offset: int,
    sweep_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Annealed importance sampling; see :func:`gibbs_ext.bipartite_ais`. Not differentiable.

    Returns:
        left [*S, n1] and right [*S, n2] of left's dtype, log-weights [*S] float64.
    """
    outputs: tuple[Tensor, Tensor, Tensor] = _call(
        torch.ops.gibbs_ext.bipartite_ais.default,
        left, left_bias, right_bias, weight, base_left_bias, base_right_bias, betas, seed,
        chains, chain_offset, sweep_offset,
    )  # fmt: skip
    return outputs


def coupling_resolution(weight: Tensor) -> Tensor:
    """The fixed-point step 2^-k of each model; see :func:`gibbs_ext.coupling_resolution`.

    Args:
        weight: [..., n1, n2], floating.

    Returns:
        [...] float64.
    """
    outputs: Tensor = _call(torch.ops.gibbs_ext.coupling_resolution.default, weight)
    return outputs


def graph_gibbs(
    state: Tensor,
    bias: Tensor,
    coupling: Tensor,
    layout: Tensor,
    beta: Tensor,
    seed: Tensor,
    clamp: Tensor | None,
    chains: Tensor | None,
    chain_offset: int,
    sweep_offset: int,
    num_sweeps: int,
) -> Tensor:
    """Binary sweeps of a coloured graph; see :func:`gibbs_ext.graph_gibbs`. Not differentiable.

    Args:
        layout: The graph, int32 on the CPU: :attr:`gibbs_ext.ColoredGraph.layout`.

    Returns:
        [*S, N] of state's dtype, S the broadcast of every batch shape.
    """
    output: Tensor = _call(
        torch.ops.gibbs_ext.graph_gibbs.default,
        state, bias, coupling, layout, beta, seed, clamp, chains, chain_offset, sweep_offset, num_sweeps,
    )  # fmt: skip
    return output


def graph_metropolis(
    state: Tensor,
    bias: Tensor,
    coupling: Tensor,
    layout: Tensor,
    beta: Tensor,
    seed: Tensor,
    clamp: Tensor | None,
    chains: Tensor | None,
    chain_offset: int,
    sweep_offset: int,
    num_sweeps: int,
) -> Tensor:
    """Metropolis sweeps of a coloured graph; see :func:`gibbs_ext.graph_metropolis`. Not differentiable.

    Args:
        layout: As in :func:`graph_gibbs`.

    Returns:
        [*S, N] of state's dtype, S the broadcast of every batch shape.
    """
    output: Tensor = _call(
        torch.ops.gibbs_ext.graph_metropolis.default,
        state, bias, coupling, layout, beta, seed, clamp, chains, chain_offset, sweep_offset, num_sweeps,
    )  # fmt: skip
    return output


def graph_gibbs_relaxed(
    state: Tensor,
    bias: Tensor,
    coupling: Tensor,
    layout: Tensor,
    beta: Tensor,
    seed: Tensor,
    chains: Tensor | None,
    chain_offset: int,
    sweep_offset: int,
    num_sweeps: int,
    num_relaxed_sweeps: int,
    relaxation: int,
    sharpness: float,
    slope_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Binary sweeps, then relaxed ones; see :func:`gibbs_ext.graph_gibbs_relaxed`. Differentiable.

    Returns:
        The relaxed state [*S, N], mean [*S, N], the state [*S, N] the relaxed sweeps started from, and the fields
        [num_relaxed_sweeps, *S, N] (before beta) of each relaxed update. The last two carry no gradient: they are what
        backward needs.
    """
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = _call(
        torch.ops.gibbs_ext.graph_gibbs_relaxed.default,
        state, bias, coupling, layout, beta, seed, chains, chain_offset, sweep_offset,
        num_sweeps, num_relaxed_sweeps, relaxation, sharpness, slope_gradient,
    )  # fmt: skip
    return outputs


def graph_gibbs_relaxed_backward(
    grad_relaxed: Tensor,
    grad_mean: Tensor,
    state: Tensor,
    fields: Tensor,
    coupling: Tensor,
    layout: Tensor,
    beta: Tensor,
    seed: Tensor,
    chains: Tensor | None,
    chain_offset: int,
    sweep_offset: int,
    num_sweeps: int,
    relaxation: int,
    sharpness: float,
    slope_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of :func:`graph_gibbs_relaxed`, which recomputes the random words. Not differentiable itself.

    Returns:
        Gradients of state [*S, N], bias [*S, N] (not yet summed over broadcast dims) and coupling (of coupling's own
        shape).
    """
    outputs: tuple[Tensor, Tensor, Tensor] = _call(
        torch.ops.gibbs_ext.graph_gibbs_relaxed_backward.default,
        grad_relaxed, grad_mean, state, fields, coupling, layout, beta, seed, chains, chain_offset, sweep_offset,
        num_sweeps, relaxation, sharpness, slope_gradient,
    )  # fmt: skip
    return outputs


def graph_ais(
    state: Tensor,
    bias: Tensor,
    coupling: Tensor,
    layout: Tensor,
    base_bias: Tensor,
    betas: Tensor,
    seed: Tensor,
    chains: Tensor | None,
    chain_offset: int,
    sweep_offset: int,
) -> tuple[Tensor, Tensor]:
    """Annealed importance sampling on a coloured graph; see :func:`gibbs_ext.graph_ais`. Not differentiable.

    Returns:
        The state [*S, N] of state's dtype, log-weights [*S] float64.
    """
    outputs: tuple[Tensor, Tensor] = _call(
        torch.ops.gibbs_ext.graph_ais.default,
        state, bias, coupling, layout, base_bias, betas, seed, chains, chain_offset, sweep_offset,
    )  # fmt: skip
    return outputs


def graph_coupling_resolution(coupling: Tensor, layout: Tensor) -> Tensor:
    """The fixed-point step 2^-k of each model; see :func:`gibbs_ext.coupling_resolution`.

    Args:
        coupling: [..., E], floating.
        layout: As in :func:`graph_gibbs`.

    Returns:
        [...] float64.
    """
    outputs: Tensor = _call(torch.ops.gibbs_ext.graph_coupling_resolution.default, coupling, layout)
    return outputs


def graph_fields(state: Tensor, bias: Tensor, coupling: Tensor, layout: Tensor) -> Tensor:
    """Fields of a coloured graph's units; see :func:`gibbs_ext.graph_fields`. Differentiable.

    Args:
        state: [..., N] of the dtype computed in: coupling's, float32 for half types.
        layout: As in :func:`graph_gibbs`.

    Returns:
        [*S, N] of state's dtype, S the broadcast of every batch shape.
    """
    output: Tensor = _call(torch.ops.gibbs_ext.graph_fields.default, state, bias, coupling, layout)
    return output


def graph_edge_sums(first: Tensor, second: Tensor, coupling: Tensor, layout: Tensor) -> Tensor:
    """``first_u second_v + first_v second_u`` of each edge (u, v), summed over a model's chains. Differentiable.

    Args:
        first: [..., N] of the dtype computed in.
        second: [..., N], likewise.
        coupling: [..., E]: says which chains are a model's; its values do not count.
        layout: As in :func:`graph_gibbs`.

    Returns:
        Of coupling's shape and first's dtype.
    """
    output: Tensor = _call(torch.ops.gibbs_ext.graph_edge_sums.default, first, second, coupling, layout)
    return output


# Fake kernels: output shapes and dtypes for torch.compile and meta tensors -----------------------------------------


def _batch_shape(own: torch.Size, *tensors: Tensor | None, chains: Tensor | None) -> torch.Size:
    """Of the couplings' batch shape and that of tensors [..., n]."""
    shapes = [tensor.shape[:-1] for tensor in tensors if tensor is not None]
    batch: torch.Size = torch.broadcast_shapes(own, *shapes, () if chains is None else chains.shape)
    return batch


def computed_dtype(weight: Tensor) -> torch.dtype:
    """What is done in floating point with half-precision parameters is done, and returned, in float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def bipartite_gibbs_fake(
    left: Tensor, left_bias: Tensor, right_bias: Tensor, weight: Tensor, beta: Tensor, seed: Tensor,
    right: Tensor | None, clamp_left: Tensor | None, clamp_right: Tensor | None, chains: Tensor | None,
    chain_offset: int, sweep_offset: int, num_sweeps: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch = _batch_shape(weight.shape[:-2], left, left_bias, right_bias, right, clamp_left, clamp_right, chains=chains)
    return left.new_empty((*batch, weight.shape[-2])), left.new_empty((*batch, weight.shape[-1]))


def bipartite_gibbs_relaxed_fake(
    left: Tensor, left_bias: Tensor, right_bias: Tensor, weight: Tensor, beta: Tensor, seed: Tensor,
    chains: Tensor | None, chain_offset: int, sweep_offset: int, num_sweeps: int, num_relaxed_sweeps: int,
    relaxation: int, sharpness: float, slope_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch = _batch_shape(weight.shape[:-2], left, left_bias, right_bias, chains=chains)
    n1, n2 = weight.shape[-2:]
    shapes = ((*batch, n1), (*batch, n2), (*batch, n1), (*batch, n1), (num_relaxed_sweeps, *batch, n2 + n1))
    left_out, right_out, left_mean, state, fields = (
        weight.new_empty(shape, dtype=computed_dtype(weight)) for shape in shapes
    )
    return left_out, right_out, left_mean, state, fields


def bipartite_gibbs_relaxed_backward_fake(
    grad_left: Tensor, grad_right: Tensor, grad_left_mean: Tensor, state: Tensor, fields: Tensor, weight: Tensor,
    beta: Tensor, seed: Tensor, chains: Tensor | None, chain_offset: int, sweep_offset: int, num_sweeps: int,
    relaxation: int, sharpness: float, slope_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = (state.shape, state.shape, (*state.shape[:-1], weight.shape[-1]), weight.shape)
    grad_state, grad_left_bias, grad_right_bias, grad_weight = (
        weight.new_empty(shape, dtype=computed_dtype(weight)) for shape in grads
    )
    return grad_state, grad_left_bias, grad_right_bias, grad_weight


def bipartite_ais_fake(
    left: Tensor, left_bias: Tensor, right_bias: Tensor, weight: Tensor, base_left_bias: Tensor,
    base_right_bias: Tensor, betas: Tensor, seed: Tensor, chains: Tensor | None, chain_offset: int, sweep_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    biases = (left_bias, right_bias, base_left_bias, base_right_bias)
    batch = _batch_shape(weight.shape[:-2], left, *biases, chains=chains)
    return (
        left.new_empty((*batch, weight.shape[-2])),
        left.new_empty((*batch, weight.shape[-1])),
        left.new_empty(batch, dtype=torch.float64),
    )


def coupling_resolution_fake(weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape[:-2], dtype=torch.float64)


def graph_gibbs_fake(
    state: Tensor, bias: Tensor, coupling: Tensor, layout: Tensor, beta: Tensor, seed: Tensor, clamp: Tensor | None,
    chains: Tensor | None, chain_offset: int, sweep_offset: int, num_sweeps: int,
) -> Tensor:  # fmt: skip
    batch = _batch_shape(coupling.shape[:-1], state, bias, clamp, chains=chains)
    return state.new_empty((*batch, state.shape[-1]))


def graph_gibbs_relaxed_fake(
    state: Tensor, bias: Tensor, coupling: Tensor, layout: Tensor, beta: Tensor, seed: Tensor, chains: Tensor | None,
    chain_offset: int, sweep_offset: int, num_sweeps: int, num_relaxed_sweeps: int, relaxation: int, sharpness: float,
    slope_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape = (*_batch_shape(coupling.shape[:-1], state, bias, chains=chains), state.shape[-1])
    relaxed, mean, start, fields = (
        coupling.new_empty(size, dtype=computed_dtype(coupling))
        for size in (shape, shape, shape, (num_relaxed_sweeps, *shape))
    )
    return relaxed, mean, start, fields


def graph_gibbs_relaxed_backward_fake(
    grad_relaxed: Tensor, grad_mean: Tensor, state: Tensor, fields: Tensor, coupling: Tensor, layout: Tensor,
    beta: Tensor, seed: Tensor, chains: Tensor | None, chain_offset: int, sweep_offset: int, num_sweeps: int,
    relaxation: int, sharpness: float, slope_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_state, grad_bias, grad_coupling = (
        coupling.new_empty(shape, dtype=computed_dtype(coupling))
        for shape in (state.shape, state.shape, coupling.shape)
    )
    return grad_state, grad_bias, grad_coupling


def graph_ais_fake(
    state: Tensor, bias: Tensor, coupling: Tensor, layout: Tensor, base_bias: Tensor, betas: Tensor, seed: Tensor,
    chains: Tensor | None, chain_offset: int, sweep_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch = _batch_shape(coupling.shape[:-1], state, bias, base_bias, chains=chains)
    return state.new_empty((*batch, state.shape[-1])), state.new_empty(batch, dtype=torch.float64)


def graph_coupling_resolution_fake(coupling: Tensor, layout: Tensor) -> Tensor:
    return coupling.new_empty(coupling.shape[:-1], dtype=torch.float64)


def graph_fields_fake(state: Tensor, bias: Tensor, coupling: Tensor, layout: Tensor) -> Tensor:
    batch = _batch_shape(coupling.shape[:-1], state, bias, chains=None)
    return state.new_empty((*batch, state.shape[-1]))


def graph_edge_sums_fake(first: Tensor, second: Tensor, coupling: Tensor, layout: Tensor) -> Tensor:
    return first.new_empty(coupling.shape)


# vmap and forward mode --------------------------------------------------------------------------------------------

# A call has one of each. If one of these is mapped, a call is made for each row.
_ONE_PER_CALL = ("layout", "beta", "betas", "seed")
# The number of dims that are no batch dims, of tensors that do not have exactly one.
_OWN_DIMS = {"weight": 2, "chains": 0}


class _Signature(NamedTuple):
    parameters: list[str]
    summed: str | None  # the last output is of this argument's shape: sums over the chains of each model


_signatures: dict[str, _Signature] = {}


def map_rows(name: str, run: Callable[..., Any], info: Any, in_dims: Sequence[int | None], args: Sequence[Any]) -> Any:
    """The vmap rule of an op: one call for all rows, in which the mapped dim is the first batch dim.

    Each row is, to the bit, what the op gives for it alone: its chains have the same numbers as those of every other.

    Args:
        name: Of the op.
        run: The op, or its Function.
        info: PyTorch's, with the number of rows.
        in_dims: The mapped dim of each argument.
        args: All of them.

    Returns:
        The outputs, and the mapped dim of each.
    """
    parameters, summed = _signatures[name]
    given = dict(zip(parameters, args, strict=True))
    dims = dict(zip(parameters, in_dims, strict=True))
    tensors = {p: value for p, value in given.items() if isinstance(value, Tensor) and p not in _ONE_PER_CALL}
    shapes = {p: row_shape(tensor, dims[p]) for p, tensor in tensors.items()}
    # The first dim of saved fields counts sweeps.
    batches = {p: shape[p == "fields" : len(shape) - _OWN_DIMS.get(p, 1)] for p, shape in shapes.items()}
    try:
        batch = torch.broadcast_shapes(*batches.values())
    except RuntimeError:
        batch = None
    fits = batch is not None and all(len(shape) >= _OWN_DIMS.get(p, 1) for p, shape in shapes.items())
    if not fits or any(dims.get(p) is not None for p in _ONE_PER_CALL):
        return _one_by_one(run, info.batch_size, in_dims, args)  # where the op says what does not fit

    for p, tensor in tensors.items():
        dim = dims[p]
        if dim is not None:
            tensor = tensor.movedim(dim, 0)
        elif summed:  # sums are those of one row, also of what is not mapped
            tensor = tensor.expand(info.batch_size, *tensor.shape)
        else:
            continue
        missing = (1,) * (len(batch) - len(batches[p]))
        given[p] = tensor.movedim(0, 1) if p == "fields" else tensor.reshape(info.batch_size, *missing, *shapes[p])
    if "chains" in given and given["chains"] is None:
        numbers = torch.arange(math.prod(batch), device=args[0].device)
        given |= {"chains": given["chain_offset"] + numbers.reshape(batch), "chain_offset": 0}

    outputs = run(*given.values())
    *others, last = [outputs] if isinstance(outputs, Tensor) else outputs
    if summed:
        last = last.reshape(info.batch_size, *shapes[summed])
    if isinstance(outputs, Tensor):
        return last, 0
    # The last output of relaxed sweeps is the fields that backward needs.
    return (*others, last), (*(0,) * len(others), int("num_relaxed_sweeps" in given))


def row_shape(tensor: Tensor, dim: int | None) -> torch.Size:
    """Of one row of what is mapped over ``dim``."""
    return tensor.shape if dim is None else tensor.movedim(dim, 0).shape[1:]


def row_of(tensor: Any, dim: int | None, row: int) -> Any:
    """One row of what is mapped over ``dim``: zeros where there is none."""
    if dim is None:
        return tensor
    return tensor.select(dim, row) if tensor.shape[dim] else tensor.new_zeros(row_shape(tensor, dim))


def _one_by_one(run: Callable[..., Any], rows: int, in_dims: Sequence[int | None], args: Sequence[Any]) -> Any:
    """A call for each row (also one where there are none, which tells the outputs' shapes)."""
    results = [
        run(*(row_of(value, dim, row) for value, dim in zip(args, in_dims, strict=True))) for row in range(max(1, rows))
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results)[:rows], 0
    return tuple(torch.stack(outputs)[:rows] for outputs in zip(*results, strict=True)), 0


def refuse_forward_mode(name: str) -> NoReturn:
    raise NotImplementedError(
        f"{name}: forward-mode derivatives (torch.func.jvp, jacfwd, hessian) are not supported; use reverse mode "
        "(backward, torch.func.grad, jacrev)"
    )


def refuse_second_derivative(name: str) -> NoReturn:
    raise NotImplementedError(f"{name}: second derivatives are not supported")


def _register(name: str, fake: Callable[..., Any], summed: str | None = None) -> None:
    """``summed``: the last output is of the shape of this argument, one sum over chains for each model."""
    parameters = list(inspect.signature(fake).parameters)
    _signatures[name] = _Signature(parameters, summed)

    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return map_rows(name, getattr(torch.ops.gibbs_ext, name).default, info, in_dims, args)

    @functools.wraps(fake)
    def on_one_device(*args: Any) -> Any:
        """One stray meta tensor would bring real tensors here, and hand out memory that nobody has filled."""
        device = args[0].device
        for parameter, tensor in zip(parameters, args, strict=True):
            if not isinstance(tensor, Tensor) or tensor.device == device:
                continue
            free = parameter in ("beta", "betas", "seed") or (parameter == "layout" and device.type == "meta")
            if not free or tensor.device.type != "cpu":
                raise ValueError(
                    f"{name}: {parameter} must be on {parameters[0]}'s device, {device}, got {tensor.device}"
                )
        return fake(*args)

    library.register_fake(f"gibbs_ext::{name}", on_one_device)
    library.register_vmap(f"gibbs_ext::{name}", vmap)


_register("bipartite_gibbs", bipartite_gibbs_fake)
_register("bipartite_gibbs_relaxed", bipartite_gibbs_relaxed_fake)
_register("bipartite_gibbs_relaxed_backward", bipartite_gibbs_relaxed_backward_fake, summed="weight")
_register("bipartite_ais", bipartite_ais_fake)
_register("coupling_resolution", coupling_resolution_fake)
_register("graph_gibbs", graph_gibbs_fake)
_register("graph_metropolis", graph_gibbs_fake)
_register("graph_gibbs_relaxed", graph_gibbs_relaxed_fake)
_register("graph_gibbs_relaxed_backward", graph_gibbs_relaxed_backward_fake, summed="coupling")
_register("graph_ais", graph_ais_fake)
_register("graph_coupling_resolution", graph_coupling_resolution_fake)
_register("graph_fields", graph_fields_fake)
_register("graph_edge_sums", graph_edge_sums_fake, summed="coupling")
