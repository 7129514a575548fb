# SPDX-License-Identifier: Apache-2.0
"""Many processes do the work of one: each takes its share of the chains.

A random word depends on the seed and on the number of its chain, not on where it is drawn. So processes that share a
seed, and number their chains by their place among all chains, draw the bits that one process would draw::

    mine = gx.distributed.share(num_chains)
    z = model.sample((mine.stop - mine.start,), chain_offset=mine.start * model.batch_shape.numel(), seed=seed)
    z = gx.distributed.gather(z, num_chains)  # as model.sample((num_chains,), seed=seed) of one process

The processes are those of torch.distributed's default group, as ``torchrun`` starts them. Without such a group there is
one process, whose share is everything.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from gibbs_ext.checks import check_integers, check_tensors, expand_to, shown
from gibbs_ext.log_partition.annealing import AISResult, Base, Betas, ais_result, annealed_chains
from gibbs_ext.log_partition.machine import Machine, check_model


def rank() -> int:
    """Number of this process, 0 if there is only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share(count: int, of: int | None = None) -> slice:
    """The part of ``count`` chains (data points, images, ...) that belongs to a process.

    Shares are consecutive and in the order of the processes. Their sizes differ by one at most, and may be 0.

    Args:
        count: Number of chains of all processes, at least 0.
        of: Number of the process; this one by default.

    Returns:
        A slice with start and stop.

    Raises:
        TypeError, ValueError: The message begins with ``share:``.
    """
    check_integers("share", 0, count=count)
    number, size = rank() if of is None else of, world_size()
    check_integers("share", 0, of=number)
    if number >= size:
        raise ValueError(f"share: of must be less than the number of processes, {size}, got {shown(number)}")
    return slice(number * count // size, (number + 1) * count // size)


def gather(values: Tensor, count: int) -> Tensor:
    """The values of all processes, in the order of the processes. A collective call: every process makes it.

    Args:
        values: [s, ...], where s is the size of this process's ``share(count)``. All processes have the same dtype and
            the same other dims.
        count: Number of chains of all processes.

    Returns:
        [count, ...], the same on every process, without gradient; a view of ``values`` if there is only one process.

    Raises:
        TypeError, ValueError: The message begins with ``gather:``.
    """
    check_tensors("gather", values=values)
    check_integers("gather", 0, count=count)
    mine = share(count)
    if not values.dim() or len(values) != mine.stop - mine.start:
        wanted = f"[{mine.stop - mine.start}, ...], this process's share of {count}"
        raise ValueError(f"gather: values must have shape {wanted}, got {list(values.shape)}")
    size = world_size()
    if size == 1:
        return values.detach()
    # Shares are padded to the largest, because not every backend gathers unequal ones.
    largest = -(-count // size)
    padded = values.new_zeros(largest, *values.shape[1:])
    padded[: len(values)] = values.detach()
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    shares = [share(count, number) for number in range(size)]
    return torch.cat([part[: s.stop - s.start] for part, s in zip(parts, shares, strict=True)])


def annealed_importance_sampling(
    model: Machine,
    num_chains: int,
    betas: Betas,
    *,
    seed: int | Tensor,
    base: Base = "field",
    reverse: bool = False,
    initial: Tensor | None = None,
) -> AISResult:
    """:func:`gibbs_ext.annealed_importance_sampling` with its chains shared out. A collective call.

    All processes give the same arguments, which mean the same as for that function, and get the same result.

    Args:
        model: A model of any batch shape.
        num_chains: Number of chains of all processes together, at least one for each process.
        betas: The number of steps, or the schedule.
        seed: A 64-bit integer or a 0-dim int64 tensor.
        base: The factorial start.
        reverse: Run the path from the model to the base.
        initial: Starting states of all chains.

    Returns:
        The result of all chains, as one process would get it; the samples are the same to the bit.

    Raises:
        TypeError, ValueError: The message begins with the function's name.
    """
    name = "annealed_importance_sampling"
    check_model(name, model)
    check_integers(name, 1, num_chains=num_chains)
    if seed is None:
        wanted = "seed must be an integer or a 0-dim int64 tensor, the same on every process"
        raise TypeError(f"{name}: {wanted}, got None")
    if num_chains < world_size():
        raise ValueError(
            f"{name}: num_chains must be at least the number of processes, {world_size()}, got {num_chains}"
        )
    mine = share(num_chains)
    if initial is not None:
        shape = (num_chains, *model.batch_shape, model._num_state_units)
        initial = expand_to(name, "initial", initial, shape)[mine]
    base_log_partition, log_weights, samples = annealed_chains(
        model, mine.stop - mine.start, betas, base=base, reverse=reverse, initial=initial,
        chain_offset=mine.start * model.batch_shape.numel(), generator=None, seed=seed,
    )  # fmt: skip
    return ais_result(base_log_partition, gather(log_weights, num_chains), gather(samples, num_chains), reverse)
