# SPDX-License-Identifier: Apache-2.0
"""Readers of arguments that the ops share: seeds, betas, chain numbers, masks, relaxations."""

import functools
import math
import numbers
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gibbs_ext import autograd, ops
from gibbs_ext.checks import check_integers, is_mapped, shown
from gibbs_ext.graphs import ColoredGraph

Beta = float | Sequence[float] | Tensor


_full = torch.full  # Libraries that load models replace the function for a while.


def _make_tensor(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
    return _full(shape, value, dtype=dtype, device="cpu")  # in half the time of torch.tensor


_kept_tensor = functools.lru_cache(_make_tensor)


def _constant(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
    """A tensor of one value, which must not be mutated.

    Making it takes a microsecond. The last ones are kept, because many calls have the same beta and, when they continue
    a run, the same seed. A tensor is not kept if it fits no other call because it is fake, traced, wrapped by a
    transform of torch.func, or made in torch.inference_mode or another mode.
    """
    is_special = (
        torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
    )
    if is_special:
        return _make_tensor(shape, value, dtype)
    tensor = _kept_tensor(shape, value, dtype)
    if tensor._version:  # Someone has found it among the saved tensors of a graph, and mutated it.
        _kept_tensor.cache_clear()
        tensor = _kept_tensor(shape, value, dtype)
    return tensor


def as_beta(name: str, beta: Beta, argument: str = "beta", device: torch.device | None = None) -> Tensor:
    """beta as a float64 tensor, which must not be mutated: [1] or [num_sweeps], or [..., 1] or [..., num_sweeps] with
    batch dims. The op checks its length and its batch dims. A schedule of AIS, ``betas``, has none.

    Returned on the CPU, where its values are validated. A beta already on ``device`` stays there, because reading it
    would synchronise.
    """
    if type(beta) is float:  # the default
        return _constant((1,), beta, torch.float64)
    if isinstance(beta, Tensor) and beta.requires_grad:
        raise ValueError(f"{name}: {argument} is not differentiable; pass {argument}.detach()")
    if isinstance(beta, np.ndarray):
        beta = np.array(beta, order="C")  # PyTorch does not support negative strides.
    if isinstance(beta, (Tensor, np.ndarray)):
        is_complex = beta.dtype.is_complex if isinstance(beta, Tensor) else beta.dtype.kind == "c"
    else:
        is_complex = isinstance(beta, (complex, np.complexfloating))
    if is_complex:
        raise TypeError(f"{name}: {argument} must be real, got {shown(beta)}")
    try:
        stays = isinstance(beta, Tensor) and beta.device == device
        values = torch.as_tensor(beta, dtype=torch.float64, device=device if stays else "cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name}: {argument} must be a number or a sequence of numbers, got {shown(beta)}") from error
    if values.dim() > 1:
        if argument == "betas":
            raise ValueError(f"{name}: betas must be a number or 1-dimensional, got shape {list(values.shape)}")
        return values
    return values.reshape(-1)


def as_seed(
    name: str, generator: torch.Generator | None, seed: int | Tensor | None, device: torch.device | None = None
) -> Tensor:
    """The seed as a 0-dim int64 tensor. It is drawn from the generator if it is not given.

    The default generator is that of ``device``, so that a CUDA graph draws a new seed at every replay.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{name}: generator must be a torch.Generator, got {shown(generator)}")
    if seed is None:
        try:
            source = device if generator is None else generator.device
            return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, generator=generator, device=source)
        except RuntimeError as error:
            if str(error).startswith("vmap"):
                raise RuntimeError(
                    f"{name}: seed must be given inside torch.vmap(randomness='error'), got None; or pass "
                    "randomness='different' to torch.vmap (rows draw independently) or 'same'"
                ) from error
            raise
    if generator is not None:
        raise ValueError(f"{name}: give generator or seed, not both")
    if isinstance(seed, Tensor):
        if seed.dim() or seed.dtype != torch.int64:
            got = f"{seed.dtype} {list(seed.shape)}"
            raise ValueError(f"{name}: seed must be an int or a 0-dim int64 tensor, got {got}")
        return seed
    check_integers(name, -(2**63), 2**64 - 1, seed=seed)
    number = int(seed)  # A NumPy integer would overflow.
    return _constant((), number if number < 2**63 else number - 2**64, torch.int64)


def as_chains(name: str, chain_offset: int | Tensor) -> tuple[Tensor | None, int]:
    """An op's chains and chain_offset: the numbers of all chains, or None and the number of the first one."""
    if isinstance(chain_offset, Tensor):
        if chain_offset.is_floating_point() or chain_offset.is_complex() or chain_offset.dtype == torch.bool:
            raise TypeError(f"{name}: chain_offset must be an integer or an integer tensor, got {chain_offset.dtype}")
        return chain_offset.to(torch.int64), 0
    check_integers(name, chain_offset=chain_offset)
    return None, chain_offset


def as_counters(
    name: str,
    generator: torch.Generator | None,
    seed: int | Tensor | None,
    chain_offset: int | Tensor,
    device: torch.device,
    given: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor | None, int]:
    """An op's seed, chains and chain_offset.

    Args:
        name: Name of the function, with which errors begin.
        generator: Supplies the seed if there is none.
        seed: A 64-bit integer or None.
        chain_offset: Number of the first chain, or the numbers of all chains.
        device: Device of the state.
        given: Tensors with batch dims, by argument.
    """
    chains, first_chain = as_chains(name, chain_offset)
    call_seed = as_seed(name, generator, seed, device)
    if seed is not None or chains is not None or not is_mapped(call_seed):
        return call_seed, chains, first_chain
    # The seed was drawn inside torch.vmap(randomness="different"). One call can make all rows if they share one seed
    # and the chains of each row have the numbers after those of the row before.
    try:
        batch = ops.batch_shape(given)
    except RuntimeError:
        return call_seed, None, first_chain  # The op says what does not fit.
    one_seed, row = autograd.OneSeed.apply(call_seed)  # type: ignore[no-untyped-call]
    count = math.prod(batch)
    numbers = torch.arange(count, device=device).reshape(batch)
    return one_seed, first_chain + row.to(device) * count + numbers, 0


def as_clamp(clamp: Tensor | None, bias: Tensor) -> Tensor | None:
    """A mask of all units of a side, whose biases are ``bias``. One value for the whole side is a mask, too."""
    if not isinstance(clamp, Tensor) or (clamp.dim() and clamp.shape[-1] != 1):
        return clamp
    if not isinstance(bias, Tensor) or not bias.dim():
        return clamp  # The bias is refused later.
    return clamp.expand(*clamp.shape[:-1], bias.shape[-1])


def as_relaxation(name: str, relaxation: str, sharpness: float) -> tuple[int, float]:
    """The relaxation's code, and the sharpness. The op checks the sharpness' range."""
    if isinstance(sharpness, bool) or not isinstance(sharpness, (int, float, numbers.Real)):
        raise TypeError(f"{name}: sharpness must be a number, got {shown(sharpness)}")
    if not isinstance(relaxation, str) or relaxation not in ops.RELAXATIONS:
        raise ValueError(f"{name}: relaxation must be one of {', '.join(ops.RELAXATIONS)}, got {shown(relaxation)}")
    try:
        return ops.RELAXATIONS[relaxation], float(sharpness)
    except OverflowError as error:
        raise ValueError(f"{name}: sharpness must be positive and finite, got {shown(sharpness)}") from error


def check_graph(name: str, graph: object) -> ColoredGraph:
    if not isinstance(graph, ColoredGraph):
        raise TypeError(f"{name}: graph must be a ColoredGraph, got {type(graph).__name__}")
    return graph
