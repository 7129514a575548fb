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
from gibbs_ext.checks import check_integers, check_units, expand_to, reported_as, shown
from gibbs_ext.distributions import ENUMERABLE_UNITS, BipartiteBoltzmann, check_model
from gibbs_ext.functional import as_beta, as_seed, bipartite_ais, bipartite_gibbs

# Numbers of an enumeration worked on at once: few enough to stay in the cache.
_CHUNK = 2**17


def exact_log_partition(model: BipartiteBoltzmann) -> Tensor:
    """``log Z`` by enumerating the smaller side, the other summed out.

    Args:
        model: The smaller of its sides has at most 25 units. 2^20 states of 100 other units take seconds.

    Returns:
        [*batch_shape] float64. Differentiable in the parameters.

    Raises:
        ValueError: Both sides have more than 25 units.
    """
    check_model("exact_log_partition", model)
    n = min(model.num_left, model.num_right)
    if n > ENUMERABLE_UNITS:
        raise ValueError(
            f"exact_log_partition: the smaller side of {model.num_left} + {model.num_right} units has more than "
            f"{ENUMERABLE_UNITS}; use annealed_importance_sampling"
        )
    bias, other_bias, weight = model.left_bias.double(), model.right_bias.double(), model.weight.double()
    if model.num_left > model.num_right:
        bias, other_bias, weight = other_bias, bias, weight.mT

    # States that differ in their first `low` units only are a chunk; its fields are the same but for one offset.
    per_state = max(1, math.prod(model.batch_shape)) * max(model.num_left, model.num_right)
    low = max(0, min(n, (_CHUNK // per_state).bit_length() - 1))

    def states(numbers: Tensor, num_units: int) -> Tensor:
        units = torch.arange(num_units, device=weight.device)
        return (numbers.unsqueeze(-1) >> units & 1).double()  # [numbers, num_units]

    low_states = states(torch.arange(2**low, device=weight.device), low)
    on_low = (low_states @ bias[..., :low].unsqueeze(-1)).squeeze(-1)
    low_fields = low_states @ weight[..., :low, :] + other_bias.unsqueeze(-2)  # [..., states, other side]

    def log_sum(number: Tensor, on_low: Tensor, low_fields: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
        state = states(number, n - low)
        fields = low_fields + state @ weight[..., low:, :]
        on_side = on_low + (state @ bias[..., low:].unsqueeze(-1)).squeeze(-1)
        # logaddexp with 0 is softplus, but accurate everywhere.
        return (on_side + torch.logaddexp(fields, fields.new_zeros(())).sum(-1)).logsumexp(-1)

    chunks = torch.arange(2 ** (n - low), device=weight.device).split(1)
    tensors = (on_low, low_fields, bias, weight)
    if len(chunks) > 1 and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        # Recompute each chunk in backward rather than keep the whole enumeration.
        sums = [checkpoint(log_sum, number, *tensors, use_reentrant=False) for number in chunks]
    else:
        sums = [log_sum(number, *tensors) for number in chunks]
    return torch.stack(sums).logsumexp(0).expand(model.batch_shape)


class AISResult(NamedTuple):
    """What :func:`annealed_importance_sampling` returns; M stands for the model's batch shape."""

    log_partition: Tensor  # [M] float64: estimate of log Z
    standard_error: Tensor  # [M] float64: of log_partition, by the spread of the weights (one chain: nan)
    log_weights: Tensor  # [C, M] float64: log Z of the start model not included
    samples: Tensor  # [C, M, n1 + n2] bits; with weights softmax(log_weights) they represent the model


def _rising(name: str, schedule: Tensor) -> Tensor:
    falls = (~(schedule.diff() >= 0)).nonzero().flatten()
    if not len(falls) and len(schedule) > 1 and schedule[0] == 0 and schedule[-1] == 1:
        return schedule
    shown = schedule[falls[0] : falls[0] + 2] if len(falls) else schedule[[0, -1][: len(schedule)]]
    got = (" then " if len(falls) else " to ").join(f"{value:g}" for value in shown.tolist())
    raise ValueError(f"{name}: betas must rise from 0 to 1, got {got or 'none'}")


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
            that do not fit.

    Not differentiable. Sweep number 0 draws from the base, 1 to K are the path.
    """
    name = "annealed_importance_sampling"
    check_model(name, model)
    check_integers(name, 1, num_chains=num_chains)
    if isinstance(betas, int):
        check_integers(name, 1, betas=betas)
        betas = torch.linspace(0, 1, betas + 1, dtype=torch.float64)
    schedule = _rising(name, as_beta(name, betas, "betas"))
    if base is None:
        base = torch.zeros_like(model.left_bias), torch.zeros_like(model.right_bias)
    elif isinstance(base, str) and base == "bias":
        base = model.left_bias, model.right_bias
    elif not isinstance(base, (tuple, list)) or len(base) != 2:
        raise ValueError(f"{name}: base must be None, 'bias' or a pair of biases, got {shown(base)}")
    sides = zip(("base[0]", "base[1]"), base, (model.num_left, model.num_right), strict=True)
    base_left, base_right = (expand_to(name, side, bias, (*model.batch_shape, n)) for side, bias, n in sides)
    if reverse and initial is None:
        raise ValueError(f"{name}: reverse=True needs initial, exact draws of left from the model, got None")
    seed = as_seed(name, generator, seed)  # one for the base's draw and the path

    shape = (num_chains, *model.batch_shape, model.num_left)
    with reported_as(name, left="initial", base_left_bias="base[0]", base_right_bias="base[1]"):
        if initial is None:
            nothing = model.weight.new_zeros(())
            with reported_as(name, left_bias="base[0]", right_bias="base[1]"):
                initial, _ = bipartite_gibbs(
                    nothing.expand(shape), base_left, base_right, nothing.expand(model.weight.shape[-2:]), 1, seed=seed
                )
        left, right, log_weights = bipartite_ais(
            expand_to(name, "initial", initial, shape).to(model.weight.dtype),
            model.left_bias, model.right_bias, model.weight, base_left, base_right,
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
    name = "negative_log_likelihood_surrogate"
    check_model(name, model)
    check_units(name, "data", data, model.num_left, model.num_left + model.num_right)
    positive = model.free_energy(data) if data.shape[-1] == model.num_left else model.energy(data)
    with reported_as(name, left="data"):
        if chains is None:
            start = data[..., : model.num_left]
            left, _ = bipartite_gibbs(start, model.left_bias, model.right_bias, model.weight, num_sweeps)
        else:
            left, _ = chains.advance_(model, num_sweeps)
    return positive.mean(0) - model.free_energy(left).mean(0)
