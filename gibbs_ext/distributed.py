# SPDX-License-Identifier: Apache-2.0
"""Many processes that do the work of one: each takes its share of the chains.

A random word depends on the seed and on the number of its chain, not on where it is drawn. So processes that are given
one seed, and number their chains by their place among all, draw the bits that one process would draw::

    mine = gx.distributed.share(num_chains)
    z = model.sample((mine.stop - mine.start,), chain_offset=mine.start * model.batch_shape.numel(), seed=seed)
    z = gx.distributed.gather(z, num_chains)  # as model.sample((num_chains,), seed=seed) of one process

The processes are those of torch.distributed's default group, as ``torchrun`` starts them. Without such a group there is
one process, whose share is everything.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gibbs_ext.checks import check_integers, check_tensors, expand_to, shown
from gibbs_ext.distributions import BipartiteBoltzmann, GraphBoltzmann, check_model
from gibbs_ext.estimators import AISResult, ais_result, annealed_chains


def rank() -> int:
    """The number of this process, 0 where there is one only."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share(count: int, of: int | None = None) -> slice:
    """Which of ``count`` chains (data points, images, ...) are this process's.

    Shares are consecutive and in the order of the processes. Their sizes differ by one at most, and may be 0.

    Args:
        count: At least 0.
        of: The number of the process, this one by default.

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
    """What all processes have, in their order. A collective call: all of them make it.

    Args:
        values: [s, ...], s being the size of this process's ``share(count)``; of the same dtype and other dims in all.
        count: As in :func:`share`.

    Returns:
        [count, ...], the same on every process; where there is one process a view of ``values``. Carries no gradient.

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
    # Shares of one size, the largest: not every backend gathers unequal ones.
    largest = -(-count // size)
    padded = values.new_zeros(largest, *values.shape[1:])
    padded[: len(values)] = values.detach()
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    shares = [share(count, number) for number in range(size)]
    return torch.cat([part[: s.stop - s.start] for part, s in zip(parts, shares, strict=True)])


def annealed_importance_sampling(
    model: BipartiteBoltzmann | GraphBoltzmann,
    num_chains: int,
    betas: int | Sequence[float] | Tensor,
    *,
    seed: int | Tensor,
    base: str | tuple[Tensor, Tensor] | Tensor | None = "field",
    reverse: bool = False,
    initial: Tensor | None = None,
) -> AISResult:
    """:func:`gibbs_ext.annealed_importance_sampling` with its chains shared out. A collective call.

    Args:
        model: The same on every process.
        num_chains: Of all processes together: at least one for each.
        betas: As there.
        seed: The same on every process.
        base: As there.
        reverse: As there.
        initial: As there: of all chains, on every process.

    Returns:
        The result that one process would get, to the bit for the samples: that of all chains, on every process.

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
