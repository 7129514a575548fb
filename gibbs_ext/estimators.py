# SPDX-License-Identifier: Apache-2.0
"""Estimates of log Z and of the gradient of the log-likelihood."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from gibbs_ext.chains import PersistentChains
from gibbs_ext.distributions import ENUMERABLE_UNITS, BipartiteBoltzmann
from gibbs_ext.functional import bipartite_ais, bipartite_gibbs

# Numbers of an enumeration kept in memory at once.
_CHUNK = 2**22


def exact_log_partition(model: BipartiteBoltzmann) -> Tensor:
    """``log Z`` by enumerating the smaller side, the other summed out.

    Args:
        model: The smaller of its sides has at most 25 units. 2^20 states of 100 other units take seconds.

    Returns:
        [*batch_shape] float64. Differentiable in the parameters.

    Raises:
        ValueError: Both sides have more than 25 units.
    """
    n = min(model.num_left, model.num_right)
    if n > ENUMERABLE_UNITS:
        raise ValueError(
            f"exact_log_partition: the smaller side of {model.num_left} + {model.num_right} units has more than "
            f"{ENUMERABLE_UNITS}; use annealed_importance_sampling"
        )
    bias, other_bias, weight = model.left_bias.double(), model.right_bias.double(), model.weight.double()
    if model.num_left > model.num_right:
        bias, other_bias, weight = other_bias, bias, weight.mT

    def log_sum(first: int, last: int, bias: Tensor, other_bias: Tensor, weight: Tensor) -> Tensor:
        number = torch.arange(first, last, device=weight.device).unsqueeze(-1)
        states = (number >> torch.arange(n, device=weight.device) & 1).double()  # [states, n]
        on_side = states @ bias.unsqueeze(-1)
        fields = states @ weight + other_bias.unsqueeze(-2)  # [..., states, other side]
        return (on_side.squeeze(-1) + softplus(fields).sum(-1)).logsumexp(-1)

    # A power of two of states, so that chunks tile the enumeration.
    per_state = max(1, math.prod(model.batch_shape)) * max(model.num_left, model.num_right)
    step = 1 << max(0, min(n, (_CHUNK // per_state).bit_length() - 1))
    chunks = [(first, first + step) for first in range(0, 2**n, step)]
    parameters = (bias, other_bias, weight)
    if len(chunks) > 1 and torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
        # Recompute each chunk in backward rather than keep the whole enumeration.
        sums = [checkpoint(log_sum, *chunk, *parameters, use_reentrant=False) for chunk in chunks]
    else:
        sums = [log_sum(*chunk, *parameters) for chunk in chunks]
    return torch.stack(torch.broadcast_tensors(*sums)).logsumexp(0).expand(model.batch_shape)


class AISResult(NamedTuple):
    """What :func:`annealed_importance_sampling` returns; M stands for the model's batch shape."""

    log_partition: Tensor  # [M] float64: estimate of log Z
    standard_error: Tensor  # [M] float64: of log_partition, by the spread of the weights (one chain: nan)
    log_weights: Tensor  # [C, M] float64: log Z of the start model not included
    samples: Tensor  # [C, M, n1 + n2] bits; with weights softmax(log_weights) they represent the model


@torch.no_grad()
def annealed_importance_sampling(
    model: BipartiteBoltzmann,
    num_chains: int,
    betas: int | Sequence[float] | Tensor,
    *,
    base: str | tuple[Tensor, Tensor] | None = None,
    reverse: bool = False,
    initial: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> AISResult:
    """``log Z`` by annealing chains from a factorial model, whose log Z is known, to this one.

    The mean of exp(log_weights) is an unbiased estimate of Z / Z_base; therefore ``log_partition`` is too low in
    expectation (Jensen), noticeably so where few of the weights dominate, and then ``standard_error`` is too small as
    well. ``reverse=True``, started from exact samples of the model, errs to the other side: together they bracket
    log Z. See :func:`gibbs_ext.bipartite_ais` for the path.

    Args:
        model: Of any batch shape; all models are done at once.
        num_chains: C, chains per model.
        betas: The number of steps (evenly spaced), or the schedule itself, [K + 1] from 0 to 1.
        base: The factorial start: ``None`` for uniform bits, ``"bias"`` for the model's own biases (the better start
            when biases are large), or a pair left_bias [..., n1], right_bias [..., n2].
        reverse: Run the path from the model to the base. Needs ``initial``.
        initial: [C, *batch_shape, n1] exact draws of left, from the model (``reverse``) or from the base.
        generator: Supplies the seed.
        seed: A 64-bit integer, instead of a generator.

    Returns:
        :class:`AISResult`. With ``reverse`` the samples are those of the base.

    Raises:
        ValueError: A schedule that is not from 0 to 1, an unknown base, or ``reverse`` without ``initial``; tensors
            that do not fit are errors of :func:`gibbs_ext.bipartite_ais`.

    Not differentiable. Sweep number 0 draws from the base, 1 to K are the path.
    """
    name = "annealed_importance_sampling"
    if num_chains < 1:
        raise ValueError(f"{name}: num_chains must be positive, got {num_chains}")
    if isinstance(betas, int):
        if betas < 1:
            raise ValueError(f"{name}: betas must be a schedule or a positive number of steps, got {betas}")
        betas = torch.linspace(0, 1, betas + 1, dtype=torch.float64)
    schedule = torch.as_tensor(betas, dtype=torch.float64)
    rises = schedule.dim() == 1 and len(schedule) > 1 and bool((schedule.diff() >= 0).all())
    if not rises or schedule[0] != 0 or schedule[-1] != 1:
        raise ValueError(f"{name}: betas must rise from 0 to 1")
    if isinstance(base, str):
        if base != "bias":
            raise ValueError(f"{name}: base must be None, 'bias' or a pair of biases, got {base!r}")
        base_left, base_right = model.left_bias, model.right_bias
    elif base is None:
        base_left, base_right = torch.zeros_like(model.left_bias), torch.zeros_like(model.right_bias)
    else:
        base_left, base_right = base
    if reverse and initial is None:
        raise ValueError(f"{name}: reverse=True needs initial, exact draws of left from the model")
    if seed is None:
        # One seed for the base's draw and the path.
        seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, generator=generator)
    elif generator is not None:
        raise ValueError(f"{name}: give generator or seed, not both")

    shape = (num_chains, *model.batch_shape, model.num_left)
    if initial is None:
        nothing = model.weight.new_zeros(())
        initial, _ = bipartite_gibbs(
            nothing.expand(shape), base_left, base_right, nothing.expand(model.weight.shape[-2:]), 1, seed=seed
        )
    left, right, log_weights = bipartite_ais(
        initial.expand(shape), model.left_bias, model.right_bias, model.weight, base_left, base_right,
        schedule.flip(0) if reverse else schedule, sweep_offset=1, seed=seed,
    )  # fmt: skip
    base_log_partition = softplus(base_left.double()).sum(-1) + softplus(base_right.double()).sum(-1)
    log_ratio = log_weights.logsumexp(0) - math.log(num_chains)
    # Delta method: the relative error of the mean weight.
    relative = (log_weights - log_ratio).exp()
    spread = relative.var(0) if num_chains > 1 else torch.full_like(log_ratio, math.nan)
    standard_error = (spread / num_chains).sqrt()
    log_partition = base_log_partition - log_ratio if reverse else base_log_partition + log_ratio
    return AISResult(log_partition, standard_error, log_weights, torch.cat((left, right), -1))


def negative_log_likelihood_surrogate(
    model: BipartiteBoltzmann, data: Tensor, chains: PersistentChains | None, num_sweeps: int = 1
) -> Tensor:
    """A loss whose gradient estimates that of the mean negative log-likelihood: data moments minus model moments.

    ``mean_data energy - mean_chains free_energy``, the chains advanced first (persistent contrastive divergence). The
    value itself means nothing: log Z is missing from it.

    Args:
        model: Of batch shape [*batch_shape].
        data: [B, *batch_shape, n1] bits of left, right being hidden and summed out; or [B, *batch_shape, n1 + n2] of
            both sides. Of the parameters' dtype.
        chains: Persistent chains; mutated. Or ``None`` for contrastive divergence (CD-k): chains that start at the
            data in every call.
        num_sweeps: Sweeps before the model's moments are taken: k.

    Returns:
        [*batch_shape]. Differentiable in the parameters. The seed comes from torch's default generator.
    """
    positive = model.free_energy(data) if data.shape[-1] == model.num_left else model.energy(data)
    if chains is None:
        start = data[..., : model.num_left]
        left, _ = bipartite_gibbs(start, model.left_bias, model.right_bias, model.weight, num_sweeps)
    else:
        left, _ = chains.advance_(model, num_sweeps)
    return positive.mean(0) - model.free_energy(left).mean(0)
