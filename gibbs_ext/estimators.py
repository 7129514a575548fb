# SPDX-License-Identifier: Apache-2.0
"""Estimates of log Z and of the gradient of the log-likelihood."""

import math
import numbers
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from gibbs_ext.arguments import as_beta, as_seed
from gibbs_ext.chains import PersistentChains
from gibbs_ext.checks import (
    check_all,
    check_integers,
    check_units,
    check_values,
    expand_to,
    is_readable,
    reported_as,
    shown,
)
from gibbs_ext.distributions import BipartiteBoltzmann, GraphBoltzmann, check_model


class EffectiveSampleSizeWarning(UserWarning):
    """The weights of so few chains dominate that neither an estimate of log Z nor its error bar can be believed.

    The effective sample size is less than 10, or than a quarter of the chains. It is not looked at on a GPU, which
    would have to be waited for: see :attr:`AISResult.effective_sample_size`.
    """


class AISResult(NamedTuple):
    """What :func:`annealed_importance_sampling` returns; M stands for the model's batch shape."""

    log_partition: Tensor  # [M] float64: estimate of log Z
    standard_error: Tensor  # [M] float64: of log_partition, by the spread of the weights (one chain: nan)
    log_weights: Tensor  # [C, M] float64: log Z of the start model not included
    samples: Tensor  # [C, M, num_units] bits; with weights softmax(log_weights) they represent the model
    effective_sample_size: Tensor  # [M] float64: 1 / sum of the squared normalised weights, from 1 to C


def ais_result(base_log_partition: Tensor, log_weights: Tensor, samples: Tensor, reverse: bool) -> AISResult:
    """The estimates that the weights [C, M] of all chains give."""
    log_ratio = log_weights.logsumexp(0) - math.log(len(log_weights))
    # Delta method: the relative error of the mean weight.
    relative = (log_weights - log_ratio).exp()
    spread = relative.var(0) if len(log_weights) > 1 else torch.full_like(log_ratio, math.nan)
    standard_error = (spread / len(log_weights)).sqrt()
    log_partition = base_log_partition - log_ratio if reverse else base_log_partition + log_ratio
    effective = 1 / log_weights.softmax(0).square().sum(0)
    if is_readable(effective) and bool((effective < min(10, len(log_weights) / 4)).any()):
        warnings.warn(
            f"annealed_importance_sampling: the weights of few chains dominate: of {len(log_weights)} as many as "
            f"{float(effective.min()):.1f} count; log_partition and standard_error are not to be believed (take more "
            "betas, more chains or another base)",
            EffectiveSampleSizeWarning,
            stacklevel=3,
        )
    return AISResult(log_partition, standard_error, log_weights, samples, effective)


def _rising(name: str, schedule: Tensor) -> Tensor:
    if not is_readable(schedule):
        rises = (schedule.diff() >= 0).all() & (schedule[:1] == 0).all() & (schedule[-1:] == 1).all()
        check_all(rises, f"{name}: betas must rise from 0 to 1")
        return schedule
    falls = (~(schedule.diff() >= 0)).nonzero().flatten()
    if not len(falls) and len(schedule) > 1 and schedule[0] == 0 and schedule[-1] == 1:
        return schedule
    shown = schedule[falls[0] : falls[0] + 2] if len(falls) else schedule[[0, -1][: len(schedule)]]
    got = (" then " if len(falls) else " to ").join(f"{value:g}" for value in shown.tolist())
    raise ValueError(f"{name}: betas must rise from 0 to 1, got {got or 'none'}")


def _base_biases(
    name: str, model: BipartiteBoltzmann | GraphBoltzmann, base: str | tuple[Tensor, Tensor] | Tensor | None
) -> list[Tensor]:
    """Those of the start of AIS, each [*batch_shape, units]."""
    own = model._biases
    arguments = ["base"] if isinstance(model, GraphBoltzmann) else ["base[0]", "base[1]"]
    if base is None:
        biases: Sequence[Tensor] = [torch.zeros_like(bias) for bias in own]
    elif isinstance(base, str) and base == "field":
        biases = model._fields_at_half()
    elif isinstance(base, str) and base == "bias":
        biases = own
    elif isinstance(model, GraphBoltzmann) and isinstance(base, Tensor):
        biases = [base]
    elif isinstance(model, BipartiteBoltzmann) and isinstance(base, (tuple, list)) and len(base) == 2:
        biases = base
    else:
        wanted = "a pair of biases" if isinstance(model, BipartiteBoltzmann) else "a tensor of biases"
        raise ValueError(f"{name}: base must be 'field', 'bias', None or {wanted}, got {shown(base)}")
    return [  # detached, as forward-mode derivatives pass torch.no_grad
        expand_to(name, argument, bias, (*model.batch_shape, of_model.shape[-1])).detach()
        for argument, bias, of_model in zip(arguments, biases, own, strict=True)
    ]


def annealed_importance_sampling(
    model: BipartiteBoltzmann | GraphBoltzmann,
    num_chains: int,
    betas: int | Sequence[float] | Tensor,
    *,
    base: str | tuple[Tensor, Tensor] | Tensor | None = "field",
    reverse: bool = False,
    initial: Tensor | None = None,
    chain_offset: int | Tensor = 0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> AISResult:
    """``log Z`` by annealing chains from a factorial model, whose log Z is known, to this one.

    The mean of exp(log_weights) is an unbiased estimate of Z / Z_base; therefore ``log_partition`` is too low in
    expectation (Jensen), noticeably so where few of the weights dominate, and then ``standard_error`` is too small as
    well. ``reverse=True``, started from exact samples of the model, errs to the other side: together they bracket
    log Z. See :func:`gibbs_ext.bipartite_ais` and :func:`gibbs_ext.graph_ais` for the path.

    Args:
        model: Of any batch shape; all models are done at once.
        num_chains: C, chains per model.
        betas: The number of steps (evenly spaced), or the schedule itself, [K + 1] from 0 to 1.
        base: The factorial start. ``"field"``: biases ``bias_i + sum_j coupling_ij / 2``, which are the fields of the
            model over spins; the best or about the best of these where they were compared. ``"bias"``: the model's own
            biases, wrong by many nats where couplings oppose them, with a small error bar. ``None``: uniform bits. Or
            biases: for a bipartite model a pair [..., n1], [..., n2], for a graph [..., N].
        reverse: Run the path from the model to the base. Needs ``initial``.
        initial: Exact draws from the model (``reverse``) or from the base: of left [C, *batch_shape, n1], or of a
            graph's z [C, *batch_shape, N]. :func:`gibbs_ext.exact_samples` draws z from small models; left is
            ``model.split(z)[0]``.
        chain_offset: Number of the first of the C * M chains, or numbers [C, *batch_shape], as in
            :func:`gibbs_ext.bipartite_gibbs`.
        generator: Supplies the seed.
        seed: A 64-bit integer, instead of a generator.

    Returns:
        :class:`AISResult`. With ``reverse`` the samples are those of the base.

    Raises:
        ValueError: A schedule that is not from 0 to 1, an unknown base, or ``reverse`` without ``initial``; tensors
            that do not fit.

    Warns:
        EffectiveSampleSizeWarning: The weights of few chains dominate. (That they do not says little: all chains may
            have missed where most of the probability is.)

    Not differentiable. Sweep number 0 draws from the base, 1 to K are the path.
    """
    base_log_partition, log_weights, samples = annealed_chains(
        model, num_chains, betas, base=base, reverse=reverse, initial=initial, chain_offset=chain_offset,
        generator=generator, seed=seed,
    )  # fmt: skip
    return ais_result(base_log_partition, log_weights, samples, reverse)


@torch.no_grad()
def annealed_chains(
    model: BipartiteBoltzmann | GraphBoltzmann,
    num_chains: int,
    betas: int | Sequence[float] | Tensor,
    *,
    base: str | tuple[Tensor, Tensor] | Tensor | None,
    reverse: bool,
    initial: Tensor | None,
    chain_offset: int | Tensor,
    generator: torch.Generator | None,
    seed: int | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`annealed_importance_sampling` is made of: log Z of the base, the chains' log-weights and samples."""
    name = "annealed_importance_sampling"
    check_model(name, model)
    check_integers(name, 1, num_chains=num_chains)
    if isinstance(betas, (int, numbers.Integral)):
        check_integers(name, 1, betas=betas)
        # On the model's device, so that a CUDA graph can capture it. A division is rounded alike on every device.
        betas = torch.arange(int(betas) + 1, dtype=torch.float64, device=model.device) / int(betas)
        schedule = betas
    else:
        schedule = _rising(name, as_beta(name, betas, "betas", model.device))
    bases = _base_biases(name, model, base)
    if reverse and initial is None:
        of_left = " of left" if isinstance(model, BipartiteBoltzmann) else ""
        raise ValueError(f"{name}: reverse=True needs initial, exact draws{of_left} from the model, got None")
    seed = as_seed(name, generator, seed, model.device)  # one for the base's draw and the path

    shape = (num_chains, *model.batch_shape, model._num_state_units)
    if initial is None:
        with reported_as(name, left_bias="base[0]", right_bias="base[1]", bias="base"):
            initial = model._draw_independent(bases, shape, chain_offset=chain_offset, seed=seed)
    state = expand_to(name, "initial", initial, shape).to(model.dtype)
    bases_called = {"base_left_bias": "base[0]", "base_right_bias": "base[1]", "base_bias": "base"}
    with reported_as(name, left="initial", state="initial", **bases_called):
        *z, log_weights = model._anneal(
            state, bases, schedule.flip(0) if reverse else schedule,
            chain_offset=chain_offset, sweep_offset=1, seed=seed,
        )  # fmt: skip
    base_log_partition = torch.stack([softplus(bias.double()).sum(-1) for bias in bases]).sum(0)
    return base_log_partition, log_weights, model._joined(z)


def negative_log_likelihood_surrogate(
    model: BipartiteBoltzmann | GraphBoltzmann, data: Tensor, chains: PersistentChains | None, num_sweeps: int = 1
) -> Tensor:
    """A loss whose gradient estimates that of the mean negative log-likelihood: data moments minus model moments.

    ``mean_data energy - mean_chains free_energy``, the chains advanced first (persistent contrastive divergence). The
    value itself means nothing: log Z is missing from it.

    Args:
        model: Of batch shape [*batch_shape].
        data: [B, *batch_shape, num_units] bits of all units, of the parameters' dtype; or, of a bipartite model,
            [B, *batch_shape, n1] of left, right being hidden and summed out. With ``chains`` also values in between.
        chains: Persistent chains; mutated. Or ``None`` for contrastive divergence (CD-k): chains that start at the
            data in every call.
        num_sweeps: Sweeps before the model's moments are taken: k.

    Returns:
        [*batch_shape]. Differentiable in the parameters, the chains held fixed: second derivatives are those of this
        function, not of the likelihood. The seed comes from torch's default generator.

    Raises:
        TypeError, ValueError: An argument does not fit, or data lie outside of [0, 1]; the message begins with
            ``negative_log_likelihood_surrogate:``.
    """
    name = "negative_log_likelihood_surrogate"
    check_model(name, model)
    check_units(name, "data", data, *dict.fromkeys((model._num_state_units, model.num_units)))
    if chains is not None:  # CD-k begins with data, and its first sweep looks whether they are bits
        check_values(name, "data", "lie in [0, 1]", data, (data >= 0) & (data <= 1))
    positive = model.energy(data) if data.shape[-1] == model.num_units else model.free_energy(data)
    with reported_as(name, left="data", state="data"):
        if chains is None:
            state, *_ = model._sweep(data[..., : model._num_state_units], num_sweeps)
        elif isinstance(model, BipartiteBoltzmann):
            state, _ = chains.advance_(model, num_sweeps)
        else:
            state = chains.advance_(model, num_sweeps)
    return positive.mean(0) - model.free_energy(state).mean(0)
