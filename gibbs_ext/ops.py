# SPDX-License-Identifier: Apache-2.0
"""The only module that speaks to the compiled one: it calls the ops and gives them fake kernels and vmap rules.

csrc/ops/schemas.h lists the ops, their arguments and their outputs. Names, meanings and shapes are those of
:mod:`gibbs_ext.functional`, but every argument is explicit, ``beta`` is a float64 tensor [1] or [sweeps], or [..., 1]
or [..., sweeps] with batch dims, ``seed`` is a 0-dim int64 tensor, and ``layout`` is
:attr:`gibbs_ext.ColoredGraph.layout`. The arguments are checked once, in C++, in front of the kernels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, library

from gibbs_ext.checks import warn

try:
    from gibbs_ext import _C
except ImportError as error:
    raise ImportError(
        f"gibbs_ext: the compiled module gibbs_ext._C does not load ({error}). Build it for this Python and PyTorch "
        "with `pip install --no-build-isolation .` in the source folder, and do not import from there uninstalled."
    ) from error

RELAXATIONS = {"pwl": 0, "concrete": 1, "straight_through": 2, "mean_field": 3}


class CouplingResolutionWarning(UserWarning):
    """Parameters span such a wide range that rounding may shift a probability by 1e-3.

    The warning is given if ``|beta| * (n * 2^-k + 2^-23 * b)`` exceeds 1e-3, for parameters of any dtype. The message
    says which of the two terms is the larger. beta is the largest one of a schedule. A beta that is a tensor on a CUDA
    device counts as 1, because its values are not known before the kernels run.

    - The first term is due to fixed point: n is the largest number of neighbours of a unit and 2^-k is the resolution
      (:func:`gibbs_ext.coupling_resolution`). Couplings much smaller than the largest one are lost.
    - The second term is due to float32, in which biases are added to sums of couplings: b is the largest bias that a
      sum may cancel. If bias and sum nearly cancel, their total is off by up to 2^-23 of either.

    Smaller parameters or a lower beta help. Without a warning no unit's probability is off by 1e-3, unless beta is a
    tensor on a CUDA device.
    """


_C.set_warn(lambda message: warn(message, CouplingResolutionWarning))

CUDA_LIBRARY = Path(__file__).with_name("_cuda.so")


def _load_cuda() -> tuple[_C.CudaLibrary | None, str]:
    """Returns the library of CUDA kernels, or None and the reason."""
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
    """Describes the compiled modules, and says which parts of them are in use.

    Returns:
        version, compiler, cpu_instruction_sets, instruction_set, stable_abi; cuda_architectures: compute capabilities
        that the loaded CUDA kernels are compiled for ("75" is 7.5; the driver compiles their PTX for newer ones); cuda:
        "loaded", or the reason why there are no CUDA kernels.
    """
    architectures = tuple(_cuda.architectures.split(";")) if _cuda else ()
    return _C.build_info() | {"cuda_architectures": architectures, "cuda": _why_no_cuda or "loaded"}


def synchronize(device: int | str | torch.device | None = None) -> None:
    """Waits for a CUDA device and raises the faults that its kernels found.

    Calls on a CUDA device return before their kernels have run. If a kernel finds a fault in the values of a tensor
    (NaN in a weight, a state that is not 0 or 1), the next call on that device or this function raises it; the results
    of the faulty call are not valid. A CouplingResolutionWarning is given there, too. Every call waits and raises its
    own faults if the environment has GIBBS_CUDA_SYNCHRONOUS=1.

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
    """Chooses how CUDA devices make binary sweeps: "auto" or, for tests and benchmarks, one route by name."""
    if _cuda is None:
        raise RuntimeError(f"set_cuda_route: {_why_no_cuda}")
    _cuda.set_route(name)


def last_cuda_route() -> str:
    """The route that the last binary sweeps on a CUDA device took: not the chosen one if that does not fit."""
    return _cuda.last_route if _cuda else ""


set_graph_route = _C.set_graph_route
set_instruction_set = _C.set_instruction_set
instruction_set = _C.instruction_set


def graph_layout(num_nodes: int, edges: Tensor, colors: Tensor | None) -> Tensor:
    """The int32 tensor that the graph ops read. csrc/core/graph_view.h describes its format.

    Args:
        num_nodes: Number of nodes, at least 1.
        edges: Ends of each edge, [E, 2] int64 on the CPU. Each edge occurs once.
        colors: Colour of each node, [num_nodes] int64 on the CPU. If None, a colouring is found.
    """
    return torch.from_numpy(_C.graph_layout(num_nodes, edges.numpy(), None if colors is None else colors.numpy()))


def _raise_pending() -> None:
    """Raises the exception that stopped an op, if the op left one behind."""
    pending = _C.take_exception()
    if pending is not None:
        raise pending from None


def _call(op: Any, *args: Any) -> Any:
    """Calls an op, turning a Ctrl-C that stopped it into KeyboardInterrupt. Tests replace it by other backends.

    The dispatcher turns every exception between C++ and Python into RuntimeError, so the op leaves the exception that
    stopped it behind. (A graph of torch.compile calls the op directly, so that Ctrl-C is a RuntimeError there.)
    """
    if torch.compiler.is_compiling():
        return op(*args)
    _C.take_exception()  # An op that was stopped in a graph of torch.compile may have left one.
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


def call(name: str, *args: Any) -> Any:
    """Calls an op with all arguments of its schema, in their order."""
    return _call(getattr(torch.ops.gibbs_ext, name).default, *args)


def call_without_gradient(name: str, *args: Any) -> Any:
    """Calls an op whose results carry no gradient anywhere."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        with torch.no_grad():
            return call(name, *args)
    with torch._C._AutoDispatchBelowAutograd():  # torch.no_grad() takes a microsecond longer.
        return call(name, *args)


def coupling_resolution(weight: Tensor) -> Tensor:
    """The fixed-point step 2^-k of each bipartite model, [...] float64, of a weight [..., n1, n2]."""
    resolution: Tensor = call("coupling_resolution", weight)
    return resolution


def graph_coupling_resolution(coupling: Tensor, layout: Tensor) -> Tensor:
    """The fixed-point step 2^-k of each model on a graph, [...] float64, of a coupling [..., E]."""
    resolution: Tensor = call("graph_coupling_resolution", coupling, layout)
    return resolution


def computed_dtype(coupling: Tensor) -> torch.dtype:
    """The dtype of floating-point results: float32 for half-precision parameters, else the parameters' own."""
    return torch.float64 if coupling.dtype == torch.float64 else torch.float32


# Batch shapes -----------------------------------------------------------------------------------------------------

# A call has a single one of each of these, unless ``beta`` has batch dims. vmap makes a call for each row if it maps
# one of them.
_ONE_PER_CALL = ("layout", "beta", "betas", "seed")
# The number of dims that are not batch dims. Other tensors have one such dim.
_OWN_DIMS = {"weight": 2, "chains": 0}


def _batched(given: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that have batch dims, by parameter."""
    return {
        p: value
        for p, value in given.items()
        if isinstance(value, Tensor) and (p not in _ONE_PER_CALL or _is_beta_per_chain(p, value))
    }


def _is_beta_per_chain(parameter: str, value: Tensor) -> bool:
    return parameter == "beta" and value.dim() > 1


def _batch_of(parameter: str, shape: torch.Size) -> torch.Size:
    """The batch shape of a tensor. (The first dim of saved fields counts sweeps.)"""
    return shape[parameter == "fields" : len(shape) - _OWN_DIMS.get(parameter, 1)]


def batch_shape(given: Mapping[str, Any]) -> torch.Size:
    """The batch shape of a call: the broadcast of all tensors' batch shapes.

    Args:
        given: Arguments by parameter.

    Raises:
        RuntimeError: The batch shapes do not broadcast.
    """
    shape: torch.Size = torch.broadcast_shapes(*(_batch_of(p, tensor.shape) for p, tensor in _batched(given).items()))
    return shape


# Fake kernels: output shapes and dtypes for torch.compile and meta tensors ----------------------------------------


class _Arguments(SimpleNamespace):
    """An op's arguments, as attributes named as in its schema."""

    @property
    def batch(self) -> torch.Size:
        return batch_shape(vars(self))


def _computed(coupling: Tensor, *shapes: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(coupling.new_empty(shape, dtype=computed_dtype(coupling)) for shape in shapes)


def _bipartite_gibbs(a: _Arguments) -> Any:
    n1, n2 = a.weight.shape[-2:]
    return a.left.new_empty((*a.batch, n1)), a.left.new_empty((*a.batch, n2))


def _bipartite_gibbs_relaxed(a: _Arguments) -> Any:
    """The last two outputs carry no gradient. backward needs them: the binary state that the relaxed sweeps start from,
    and the fields (before beta) of each relaxed sweep's right, then left update."""
    batch, (n1, n2) = a.batch, a.weight.shape[-2:]
    left, right = (*batch, n1), (*batch, n2)
    return _computed(a.weight, left, right, left, left, (a.num_relaxed_sweeps, *batch, n2 + n1))


def _model_couplings(coupling: Tensor, own_dims: int, a: _Arguments) -> tuple[int, ...]:
    """The shape of the couplings' gradient, in which a model at several betas counts as several models."""
    if a.beta.dim() < 2:
        return coupling.shape
    models = torch.broadcast_shapes(coupling.shape[:-own_dims], a.beta.shape[:-1])
    return (*(1,) * (len(a.batch) - len(models)), *models, *coupling.shape[-own_dims:])


def _bipartite_gibbs_relaxed_backward(a: _Arguments) -> Any:
    """Gradients of the state and the biases are not yet summed over broadcast dims, that of weight not over models
    that differ in nothing but beta; it has weight's shape if beta has no batch dims. The random words are computed
    again."""
    left, right = a.state.shape, (*a.state.shape[:-1], a.weight.shape[-1])
    return _computed(a.weight, left, left, right, _model_couplings(a.weight, 2, a))


def _bipartite_ais(a: _Arguments) -> Any:
    return *_bipartite_gibbs(a), a.left.new_empty(a.batch, dtype=torch.float64)


def _bipartite_tempering(a: _Arguments) -> Any:
    left, right = _bipartite_gibbs(a)
    return left, right, *_tempering(a)


def _graph_tempering(a: _Arguments) -> Any:
    return _graph_state(a), *_tempering(a)


def _tempering(a: _Arguments) -> tuple[Tensor, Tensor]:
    """Of each round: the energies of all states, and the numbers of the chains after its swaps."""
    shape = (a.num_swaps, *a.batch)
    return a.chains.new_empty(shape, dtype=torch.float64), a.chains.new_empty(shape)


def _bipartite_moments(a: _Arguments) -> Any:
    return _moments(a, _bipartite_gibbs(a), a.weight.shape[-2:])


def _graph_moments(a: _Arguments) -> Any:
    return _moments(a, (_graph_state(a),), a.coupling.shape[-1:])


def _moments(a: _Arguments, states: Sequence[Tensor], pairs: torch.Size) -> tuple[Tensor, ...]:
    """Counts are sums over the first batch dim. What is not wanted has shape [0]."""

    def wanted(is_wanted: bool, shape: Sequence[int], **options: Any) -> Tensor:
        return states[0].new_empty(shape if is_wanted else 0, **options)

    units = [wanted(a.counted > 0, (*a.batch[1:], state.shape[-1]), dtype=torch.int64) for state in states]
    pair_counts = wanted(a.counted > 1, (*a.batch[1:], *pairs), dtype=torch.int64)
    best = [wanted(a.best, state.shape) for state in states]
    return *states, *units, pair_counts, *best, wanted(a.best, a.batch, dtype=torch.float64)


def _coupling_resolution(a: _Arguments) -> Any:
    return a.weight.new_empty(a.batch, dtype=torch.float64)


def _graph_state(a: _Arguments) -> Any:
    return a.state.new_empty((*a.batch, a.state.shape[-1]))


def _graph_gibbs_relaxed(a: _Arguments) -> Any:
    """The last two outputs are as in :func:`_bipartite_gibbs_relaxed`."""
    shape = (*a.batch, a.state.shape[-1])
    return _computed(a.coupling, shape, shape, shape, (a.num_relaxed_sweeps, *shape))


def _graph_gibbs_relaxed_backward(a: _Arguments) -> Any:
    """As in :func:`_bipartite_gibbs_relaxed_backward`."""
    return _computed(a.coupling, a.state.shape, a.state.shape, _model_couplings(a.coupling, 1, a))


def _graph_ais(a: _Arguments) -> Any:
    return _graph_state(a), a.state.new_empty(a.batch, dtype=torch.float64)


def _graph_coupling_resolution(a: _Arguments) -> Any:
    return a.coupling.new_empty(a.batch, dtype=torch.float64)


def _graph_edge_sums(a: _Arguments) -> Any:
    """``first_u second_v + first_v second_u`` of each edge (u, v), summed over a model's chains.

    The values of ``coupling`` do not matter, but its shape says which chains belong to a model."""
    return a.first.new_empty(a.coupling.shape)


# vmap and forward mode --------------------------------------------------------------------------------------------


class _Signature(NamedTuple):
    parameters: list[str]
    summed: str | None  # The last output has this argument's shape: it is a sum over the chains of each model.


_signatures: dict[str, _Signature] = {}


def map_rows(name: str, run: Callable[..., Any], info: Any, in_dims: Sequence[int | None], args: Sequence[Any]) -> Any:
    """The vmap rule of an op: one call for all rows, in which the mapped dim is the first batch dim.

    Each row equals, to the bit, the op's results for that row alone: the chains of every row have the same numbers.

    Args:
        name: Name of the op.
        run: The op, or its Function.
        info: The number of rows, as PyTorch gives it.
        in_dims: The mapped dim of each argument.
        args: All arguments.

    Returns:
        The outputs, and the mapped dim of each.
    """
    parameters, summed = _signatures[name]
    given = dict(zip(parameters, args, strict=True))
    dims = dict(zip(parameters, in_dims, strict=True))
    tensors = _batched(given)
    shapes = {p: row_shape(tensor, dims[p]) for p, tensor in tensors.items()}
    batches = {p: _batch_of(p, shape) for p, shape in shapes.items()}
    try:
        batch = torch.broadcast_shapes(*batches.values())
    except RuntimeError:
        batch = None
    fits = batch is not None and all(len(shape) >= _OWN_DIMS.get(p, 1) for p, shape in shapes.items())
    # Sums over models at several betas do not have the shape of the parameter ``summed``, and a ladder, or the chains
    # over which states are counted, must stay the first batch dim.
    one_by_one = (summed and "beta" in tensors) or "sweeps_per_swap" in given or "sweeps_per_read" in given
    if not fits or one_by_one or any(dims.get(p) is not None for p in _ONE_PER_CALL):
        return _one_by_one(run, info.batch_size, in_dims, args)  # The op says what does not fit.

    for p, tensor in tensors.items():
        dim = dims[p]
        if dim is not None:
            tensor = tensor.movedim(dim, 0)
        elif summed:  # Each row has sums of its own, even over tensors that are not mapped.
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
    # The last output of relaxed sweeps is the fields, whose first dim counts sweeps.
    return (*others, last), (*(0,) * len(others), int("num_relaxed_sweeps" in given))


def row_shape(tensor: Tensor, dim: int | None) -> torch.Size:
    """The shape of one row of a tensor that is mapped over ``dim``."""
    return tensor.shape if dim is None else tensor.movedim(dim, 0).shape[1:]


def row_of(value: Any, dim: int | None, row: int) -> Any:
    """One row of an argument that is mapped over ``dim``, or zeros if there are no rows."""
    if dim is None:
        return value
    return value.select(dim, row) if value.shape[dim] else value.new_zeros(row_shape(value, dim))


def _one_by_one(run: Callable[..., Any], rows: int, in_dims: Sequence[int | None], args: Sequence[Any]) -> Any:
    """Makes a call for each row. Without rows it makes one call, which tells the outputs' shapes."""
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


def _register(name: str, fake: Callable[[_Arguments], Any], summed: str | None = None) -> None:
    """Gives an op its fake kernel and its vmap rule.

    Args:
        name: Name of the op.
        fake: Makes the outputs, without values.
        summed: An argument whose shape the last output has, because that output sums over the chains of each model.
    """
    op = getattr(torch.ops.gibbs_ext, name).default
    parameters = [argument.name for argument in op._schema.arguments]
    _signatures[name] = _Signature(parameters, summed)

    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return map_rows(name, op, info, in_dims, args)

    def on_one_device(*args: Any) -> Any:
        """A single stray meta tensor would bring real tensors here, and users would get memory that nobody filled."""
        device = args[0].device
        for parameter, tensor in zip(parameters, args, strict=True):
            if not isinstance(tensor, Tensor) or tensor.device == device:
                continue
            free = parameter in ("beta", "betas", "seed") or (parameter == "layout" and device.type == "meta")
            if not free or tensor.device.type != "cpu":
                raise ValueError(
                    f"{name}: {parameter} must be on {parameters[0]}'s device, {device}, got {tensor.device}"
                )
        return fake(_Arguments(**dict(zip(parameters, args, strict=True))))

    library.register_fake(f"gibbs_ext::{name}", on_one_device)
    library.register_vmap(f"gibbs_ext::{name}", vmap)


_register("bipartite_gibbs", _bipartite_gibbs)
_register("bipartite_gibbs_relaxed", _bipartite_gibbs_relaxed)
_register("bipartite_gibbs_relaxed_backward", _bipartite_gibbs_relaxed_backward, summed="weight")
_register("bipartite_ais", _bipartite_ais)
_register("bipartite_tempering", _bipartite_tempering)
_register("bipartite_moments", _bipartite_moments)
_register("coupling_resolution", _coupling_resolution)
_register("graph_gibbs", _graph_state)
_register("graph_metropolis", _graph_state)
_register("graph_gibbs_relaxed", _graph_gibbs_relaxed)
_register("graph_gibbs_relaxed_backward", _graph_gibbs_relaxed_backward, summed="coupling")
_register("graph_ais", _graph_ais)
_register("graph_tempering", _graph_tempering)
_register("graph_moments", _graph_moments)
_register("graph_coupling_resolution", _graph_coupling_resolution)
_register("graph_fields", _graph_state)
_register("graph_edge_sums", _graph_edge_sums, summed="coupling")
