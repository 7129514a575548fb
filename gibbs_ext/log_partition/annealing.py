# SPDX-License-Identifier: Apache-2.0
"""Estimates of log Z by annealed importance sampling."""

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from gibbs_ext.arguments import as_beta, as_seed
from gibbs_ext.checks import check_all, check_integers, expand_to, is_readable, reported_as, shown, warn
from gibbs_ext.log_partition.machine import Machine, check_model
from gibbs_ext.progress import parts

# The number of steps, or the schedule.
Betas = int | Sequence[float] | Tensor
# Where annealing starts: "field", "bias", None, or biases.
Base = str | Sequence[Tensor] | Tensor | None
# What errors of an AIS op call the biases of the base.
BASES_CALLED = {"base_left_bias": "base[0]", "base_right_bias": "base[1]", "base_bias": "base"}


class EffectiveSampleSizeWarning(UserWarning):
    """The weights of few chains dominate, so that an estimate of log Z and its error bar cannot be believed.

    The effective sample size is less than 10, or than a quarter of the chains. It is not checked on a GPU, because
    reading it would synchronise: see :attr:`AISResult.effective_sample_size`.
    """


class AISResult(NamedTuple):
    """The result of :func:`annealed_importance_sampling`; M stands for the model's batch shape."""

    log_partition: Tensor  # [M] float64: estimate of log Z
    standard_error: Tensor  # [M] float64: that of log_partition, from the spread of the weights (nan with one chain)
    log_weights: Tensor  # [C, M] float64: log Z of the start model not included
    samples: Tensor  # [C, M, num_units] bits; with weights softmax(log_weights) they represent the model
    effective_sample_size: Tensor  # [M] float64: 1 / sum of the squared normalised weights, from 1 to C


def ais_result(base_log_partition: Tensor, log_weights: Tensor, samples: Tensor, reverse: bool) -> AISResult:
    """The estimates from the log-weights [C, M] of all chains."""
    log_ratio = log_weights.logsumexp(0) - math.log(len(log_weights))
    # Delta method: the relative error of the mean weight.
    relative = (log_weights - log_ratio).exp()
    spread = relative.var(0) if len(log_weights) > 1 else torch.full_like(log_ratio, math.nan)
    standard_error = (spread / len(log_weights)).sqrt()
    log_partition = base_log_partition - log_ratio if reverse else base_log_partition + log_ratio
    effective = 1 / log_weights.softmax(0).square().sum(0)
    if is_readable(effective) and bool((effective < min(10, len(log_weights) / 4)).any()):
        warn(
            f"annealed_importance_sampling: the weights of few chains dominate: of {len(log_weights)} as many as "
            f"{float(effective.min()):.1f} count; log_partition and standard_error are not to be believed (take more "
            "betas, more chains or another base)",
            EffectiveSampleSizeWarning,
        )
    return AISResult(log_partition, standard_error, log_weights, samples, effective)


def as_schedule(name: str, betas: Betas, device: torch.device) -> Tensor:
    """The schedule [K + 1] float64, from 0 to 1."""
    if isinstance(betas, (int, numbers.Integral)):
        check_integers(name, 1, betas=betas)
        # On the model's device, so that a CUDA graph can capture it. A division is rounded alike on every device.
        return torch.arange(int(betas) + 1, dtype=torch.float64, device=device) / int(betas)
    return _rising(name, as_beta(name, betas, "betas", device))


def _rising(name: str, schedule: Tensor) -> Tensor:
    if not is_readable(schedule):
        rises = (schedule.diff() >= 0).all() & (schedule[:1] == 0).all() & (schedule[-1:] == 1).all()
        check_all(rises, f"{name}: betas must rise from 0 to 1")
        return schedule
    falls = (~(schedule.diff() >= 0)).nonzero().flatten()
    if not len(falls) and len(schedule) > 1 and schedule[0] == 0 and schedule[-1] == 1:
        return schedule
    wrong = schedule[falls[0] : falls[0] + 2] if len(falls) else schedule[[0, -1][: len(schedule)]]
    got = (" then " if len(falls) else " to ").join(f"{value:g}" for value in wrong.tolist())
    raise ValueError(f"{name}: betas must rise from 0 to 1, got {got or 'none'}")


def base_biases(name: str, model: Machine, base: Base) -> list[Tensor]:
    """The biases of the start of AIS, each [*batch_shape, units]."""
    own = model._biases
    is_pair = len(own) > 1
    if base is None:
        biases: Sequence[Tensor] = [torch.zeros_like(bias) for bias in own]
    elif isinstance(base, str) and base == "field":
        biases = model._fields_at_half()
    elif isinstance(base, str) and base == "bias":
        biases = own
    elif not is_pair and isinstance(base, Tensor):
        biases = [base]
    elif is_pair and isinstance(base, (tuple, list)) and len(base) == len(own):
        biases = base
    else:
        wanted = "a pair of biases" if is_pair else "a tensor of biases"
        raise ValueError(f"{name}: base must be 'field', 'bias', None or {wanted}, got {shown(base)}")
    arguments = ["base[0]", "base[1]"] if is_pair else ["base"]
    return [  # detached, as forward-mode derivatives pass torch.no_grad
        expand_to(name, argument, bias, (*model.batch_shape, of_model.shape[-1])).detach()
        for argument, bias, of_model in zip(arguments, biases, own, strict=True)
    ]


def base_draws(name: str, model: Machine, bases: Sequence[Tensor], shape: Sequence[int], **options: Any) -> Tensor:
    """Chain states of the given shape from the base, by a sweep of number 0."""
    with reported_as(name, left_bias="base[0]", right_bias="base[1]", bias="base"):
        return model._draw_independent(bases, shape, **options)


def base_log_partition(bases: Sequence[Tensor]) -> Tensor:
    """log Z of the base, [*batch_shape] float64."""
    return torch.stack([softplus(bias.double()).sum(-1) for bias in bases]).sum(0)


def annealed_importance_sampling(
    model: Machine,
    num_chains: int,
    betas: Betas,
    *,
    base: Base = "field",
    reverse: bool = False,
    initial: Tensor | None = None,
    chain_offset: int | Tensor = 0,
    progress: bool = False,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> AISResult:
    """``log Z`` by annealing chains from a factorial model, whose log Z is known, to this one.

    The mean of exp(log_weights) is an unbiased estimate of Z / Z_base; therefore ``log_partition`` is too low in
    expectation (Jensen), noticeably so where few of the weights dominate, and then ``standard_error`` is too small as
    well. ``reverse=True``, started from exact samples of the model, errs to the other side: together they bracket
    log Z. See :func:`gibbs_ext.bipartite_ais` and :func:`gibbs_ext.graph_ais` for the path.

    Args:
        model: A model of any batch shape; all models of the batch are done at once. Of
            ``conditional = model.conditioned(given, where)`` it is ``conditional.model``: then log Z minus
            ``conditional.energy`` is that of the sum over the free units alone, with the given ones fixed.
        num_chains: C, chains per model.
        betas: The number of steps (evenly spaced), or the schedule itself, [K + 1] from 0 to 1.
        base: The factorial start. ``"field"`` has the biases ``bias_i + sum_j coupling_ij / 2``, which are the fields
            of the model over spins; it was the best or about the best wherever the three were compared. ``"bias"`` has
            the model's own biases; it is wrong by many nats, with a small error bar, where couplings oppose the biases.
            ``None`` is uniform bits. Biases can be given, too: a pair [..., n1], [..., n2] for a bipartite model,
            [..., N] for a graph.
        reverse: Run the path from the model to the base. Needs ``initial``.
        initial: Exact draws from the model (``reverse``) or from the base: left [C, *batch_shape, n1] of a bipartite
            model, z [C, *batch_shape, N] of a graph. :func:`gibbs_ext.exact_samples` draws z from small models; left is
            ``model.split(z)[0]``.
        chain_offset: Number of the first of the C * M chains, or numbers [C, *batch_shape], as in
            :func:`gibbs_ext.bipartite_gibbs`.
        progress: Whether to show a progress bar (tqdm). Log-weights are then added up in parts, which may change their
            last bits.
        generator: Supplies the seed.
        seed: A 64-bit integer, instead of a generator.

    Returns:
        :class:`AISResult`. With ``reverse`` the samples are those of the base.

    Raises:
        ValueError: A schedule that is not from 0 to 1, an unknown base, or ``reverse`` without ``initial``; tensors
            that do not fit.

    Warns:
        EffectiveSampleSizeWarning: The weights of few chains dominate. (The absence of the warning says little: all
            chains may have missed where most of the probability is.)

    Not differentiable. Sweep number 0 draws from the base, 1 to K are the path.
    """
    of_base, log_weights, samples = annealed_chains(
        model, num_chains, betas, base=base, reverse=reverse, initial=initial, chain_offset=chain_offset,
        generator=generator, seed=seed, progress=progress,
    )  # fmt: skip
    return ais_result(of_base, log_weights, samples, reverse)


@torch.no_grad()
def annealed_chains(
    model: Machine,
    num_chains: int,
    betas: Betas,
    *,
    base: Base,
    reverse: bool,
    initial: Tensor | None,
    chain_offset: int | Tensor,
    generator: torch.Generator | None,
    seed: int | Tensor | None,
    progress: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """log Z of the base [M], and the chains' log-weights [C, M] and samples [C, M, N], as in :class:`AISResult`."""
    name = "annealed_importance_sampling"
    check_model(name, model)
    check_integers(name, 1, num_chains=num_chains)
    schedule = as_schedule(name, betas, model.device)
    bases = base_biases(name, model, base)
    if reverse and initial is None:
        of_left = " of left" if len(bases) > 1 else ""
        raise ValueError(f"{name}: reverse=True needs initial, exact draws{of_left} from the model, got None")
    seed = as_seed(name, generator, seed, model.device)  # shared by the base's draw and the path

    shape = (num_chains, *model.batch_shape, model._num_state_units)
    if initial is None:
        initial = base_draws(name, model, bases, shape, chain_offset=chain_offset, seed=seed)
    state = expand_to(name, "initial", initial, shape).to(model.dtype)
    path, done = schedule.flip(0) if reverse else schedule, 0
    log_weights = torch.zeros(shape[:-1], dtype=torch.float64, device=model.device)
    with reported_as(name, left="initial", state="initial", **BASES_CALLED):
        for steps in parts(name, len(path) - 1, progress):
            z, of_steps = model._anneal(
                state, bases, path[done : done + steps + 1],
                chain_offset=chain_offset, sweep_offset=1 + done, seed=seed,
            )  # fmt: skip
            log_weights = log_weights + of_steps
            state, done = model._state_of(z), done + steps
    return base_log_partition(bases), log_weights, z
