# SPDX-License-Identifier: Apache-2.0
"""log Z from parallel tempering, with an error bar from its chains."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gibbs_ext.checks import check_integers, is_mapped, warn
from gibbs_ext.log_partition.bracket import Floats, bennett_estimator
from gibbs_ext.tempering import TemperingResult

# Twice the least element of the overlap matrix that Klimovich, Shirts and Mobley (2015) recommend.
_LEAST_OVERLAP = 0.06
# Of one step. An error above it means that about 20 independent samples or fewer lie where both betas do.
_LARGEST_ERROR = 0.3
_FEWEST_CHAINS = 20
_MOST_DEVIATIONS = 5.0  # between the two halves of a run, in standard errors


class LadderWarning(UserWarning):
    """Parallel tempering cannot tell log Z, or its error bar, from this ladder, these chains or this number of rounds.

    Two neighbouring betas may overlap too little, chains may be too few for an error bar, or the run's first half may
    contradict its second half.
    """


class TemperingLogPartition(NamedTuple):
    """The result of :func:`tempering_log_partition`. B betas; M stands for the model's batch shape."""

    log_partition: Tensor  # [M] float64: log Z at the last beta; nan if the first beta is not 0
    standard_error: Tensor  # [M] float64: that of log_partition, and nan with it
    log_ratios: Tensor  # [B, M] float64: log(Z(beta) / Z(first beta)) at each beta, 0 at the first one
    log_ratio_errors: Tensor  # [B, M] float64: the standard errors of log_ratios
    overlaps: Tensor  # [B - 1, M] float64: 0 to 1, how much the laws at neighbouring betas overlap


@torch.no_grad()
def tempering_log_partition(result: TemperingResult, *, warmup: int | None = None) -> TemperingLogPartition:
    """``log Z`` from the energies that parallel tempering has found at each beta.

    Bennett's estimate (C. H. Bennett, "Efficient estimation of free energy differences from Monte Carlo data", J.
    Comput. Phys. 22, 1976), which pymbar computes, joins each beta to the next one, from the energies at both. At
    beta = 0 log Z is ``N log 2``, so a ladder that begins there gives log Z at all its betas; any other gives ratios.
    Needs pymbar (``pip install pymbar``).

    Successive rounds are correlated, and so are the betas, between which replicas move. The chains are not, or, after
    cluster moves, the pairs of chains. So error bars come from the spread of the chains: to first order, each one's
    share in the error of all steps up to a beta is what it adds to Bennett's equations (the infinitesimal jackknife
    over chains). They hold for as few rounds as you like, if the chains have forgotten their start, and are the better
    the more chains there are. log Z is that of the rounded couplings (csrc/README.md, 2.7).

    Args:
        result: Of :func:`gibbs_ext.parallel_tempering` with at least 2 chains. Results of calls that go on may be
            joined beforehand: ``later._replace(energies=torch.cat([earlier.energies, later.energies]))``.
        warmup: Number of rounds at the start that are left out, at least 0, so that at least 2 remain; a fifth of all
            rounds if it is None.

    Returns:
        :class:`TemperingLogPartition`. The overlap of two laws p and p' is the sum of ``2 p p' / (p + p')`` over all
        states, twice the element of MBAR's overlap matrix.

    Raises:
        ImportError: pymbar is not installed.
        TypeError, ValueError: An argument has a wrong type or does not fit.
        NotImplementedError: Under torch.vmap, where the energies are mapped.

        The messages begin with ``tempering_log_partition:``.

    Warns:
        LadderWarning: The law at a beta overlaps with the next one's by less than 0.06, a step's standard error exceeds
            0.3, pymbar finds no estimate (which is nan then), there are fewer than 20 chains (after cluster moves,
            pairs), or the first half of the rounds differs from the second one by more than five standard errors.
            (Where all chains miss the same modes, there is none of these.)

    Not differentiable. It waits for a GPU.

    Example:
        >>> model = BipartiteBoltzmann(torch.zeros(4), torch.zeros(4), torch.full((4, 4), 0.5))
        >>> result = parallel_tempering(model, 50, torch.linspace(0, 1, 5), 200, seed=1)
        >>> estimate = tempering_log_partition(result)
        >>> (estimate.log_partition - exact_log_partition(model)).abs() < 4 * estimate.standard_error
        tensor(True)
    """
    name = "tempering_log_partition"
    if not isinstance(result, TemperingResult):
        raise TypeError(f"{name}: result must be a TemperingResult, got {type(result).__name__}")
    energies = result.energies
    if is_mapped(energies):
        raise NotImplementedError(f"{name}: torch.vmap is not supported; give the model a batch shape instead")
    num_rounds, num_betas, num_chains, *batch_shape = energies.shape
    warmup = num_rounds // 5 if warmup is None else warmup
    check_integers(name, 0, warmup=warmup)
    if num_rounds - warmup < 2:
        raise ValueError(f"{name}: result must hold 2 rounds after a warmup of {warmup}, got {num_rounds} in all")
    # The first chain of each pair, or each chain: what is independent of all others.
    starts = np.arange(0, num_chains, 2 if result.cluster_moves else 1)
    if len(starts) < 2:
        of_pairs = ", or 3 that make cluster moves" if result.cluster_moves else ""
        raise ValueError(f"{name}: result must hold at least 2 chains{of_pairs}, got {num_chains}")
    bennett = bennett_estimator(name)

    num_models = math.prod(batch_shape)
    traces = energies[warmup:].reshape(num_rounds - warmup, num_betas, num_chains, num_models).cpu().numpy()
    betas = result.betas.float().double().cpu().numpy()  # as sweeps and swaps see them
    ratios, overlaps = np.zeros((num_betas, num_models)), np.zeros((num_betas - 1, num_models))
    # The shares in the error of what is independent, in both halves of the run.
    shares = np.zeros((2, num_betas, len(starts), num_models))
    for step, model in np.ndindex(num_betas - 1, num_models):
        change = betas[step + 1] - betas[step]
        forward, reverse = change * traces[:, step, :, model], -change * traces[:, step + 1, :, model]
        difference, _ = bennett(forward.ravel(), reverse.ravel())
        ratios[step + 1, model] = -difference
        of_chains, overlaps[step, model] = _shares(forward, reverse, difference)
        shares[:, step + 1, :, model] = np.add.reduceat(of_chains, starts, axis=1)
    errors = _errors(shares.sum(0).cumsum(0))
    _warn(name, betas, ratios, overlaps, shares)

    log_ratios, log_ratio_errors, overlap = (
        torch.from_numpy(found).to(energies.device).reshape(len(found), *batch_shape)
        for found in (ratios.cumsum(0), errors, overlaps)
    )
    unknown = 0.0 if betas[0] == 0 else math.nan
    log_partition = result.samples.shape[-1] * math.log(2) + log_ratios[-1] + unknown
    return TemperingLogPartition(log_partition, log_ratio_errors[-1] + unknown, log_ratios, log_ratio_errors, overlap)


def _shares(forward: Floats, reverse: Floats, difference: float) -> tuple[Floats, float]:
    """What each chain adds to the error of Bennett's estimate in both halves of the rounds, [2, C], and the overlap.

    The estimate solves ``sum f(forward - difference) = sum f(reverse + difference)`` over works [R, C], where
    ``f(x) = 1 / (1 + exp(x))``.
    """
    accepted, returned = _fermi(forward - difference), _fermi(reverse + difference)
    slope = (accepted * (1 - accepted) + returned * (1 - returned)).sum()
    halves = np.array_split(accepted - returned, 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = np.stack([half.sum(0) for half in halves]) / slope
    return shares, float(2 * slope / forward.size)


def _fermi(x: Floats) -> Floats:
    return np.asarray(0.5 - 0.5 * np.tanh(x / 2))


def _errors(shares: Floats) -> Floats:
    """Standard errors [..., M] of sums of the shares [..., C, M] of chains, whose mean is 0."""
    num_chains = shares.shape[-2]
    return np.asarray(np.sqrt(num_chains / (num_chains - 1) * np.square(shares).sum(-2)))


def _warn(name: str, betas: Floats, ratios: Floats, overlaps: Floats, shares: Floats) -> None:
    num_chains = shares.shape[2]
    doubts = []
    steps = _errors(shares.sum(0))[1:]  # [B - 1, M]
    is_bad = ~((overlaps >= _LEAST_OVERLAP) & (steps <= _LARGEST_ERROR) & np.isfinite(ratios[1:]))
    if is_bad.any():
        at = np.unravel_index(np.where(is_bad, np.nan_to_num(overlaps), np.inf).argmin(), overlaps.shape)
        doubts.append(
            f"the betas {betas[at[0]]:.3g} and {betas[at[0] + 1]:.3g} overlap by {overlaps[at]:.2g}, so that their "
            f"log Z differ by {ratios[1:][at]:.4g} +- {steps[at]:.2g} (place more betas there, or take more rounds)"
        )
    if num_chains < _FEWEST_CHAINS:
        doubts.append(f"{num_chains} independent chains say little of the error bar (take {_FEWEST_CHAINS} or more)")
    drifts = np.diff(shares.sum(1), axis=0)[0]  # [C, M]
    with np.errstate(invalid="ignore", divide="ignore"):
        deviations = np.abs(drifts.mean(0)) / (drifts.std(0, ddof=1) / math.sqrt(num_chains))
    if (deviations > _MOST_DEVIATIONS).any():
        doubts.append(
            f"the first half of the rounds and the second one differ by {np.nanmax(deviations):.1f} standard errors "
            "(take more rounds, or a longer warmup)"
        )
    if doubts:
        warn(f"{name}: log Z or its error bar cannot be believed: {'; '.join(doubts)}", LadderWarning)
