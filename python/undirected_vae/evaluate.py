# SPDX-License-Identifier: Apache-2.0
"""Test log-likelihood: the importance-weighted bound with binary samples, log Z by AIS."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import gibbs_ext as gx

from .config import EVALUATION, Config
from .data import Dataset, fingerprint
from .processes import require_shares
from .products import fast_products
from .runs import DAMAGED, Run, RunError, atomic_write, blaming
from .vae import VAE, log_mean_exp

SETTINGS = (*EVALUATION, "data_seed", "seed")
# A few chains for each image show whether the annealing to its posterior suffices.
PILOT_CHAINS = 64
# It does not if less than this part of the chains counts (their effective number; a quarter of the steps would be as
# good as that), ...
MIN_EFFECTIVE = 0.25
# ... or if the mean log-weight is below log Z by more than this number of nats: many chains end where q has no mass.
MAX_GAP = 1.0
# The factor between one number of steps, or of samples, and the next.
GROWTH = 4
# The bound's looseness is measured by this number of times the samples.
LOOSENESS_FACTOR = 10
# The paper's number of mean-field sweeps, which take each sample to a mode of the posterior.
MODE_SWEEPS = 40
# The plain figure is called wrong where it differs from the bound by more nats than this, and significantly.
MAX_DISAGREEMENT = 0.1


class AnnealingWarning(gx.EffectiveSampleSizeWarning):
    """The annealing to the posterior fails for some images, however many steps it may take."""


@contextmanager
def suppressed_annealing_warnings() -> Iterator[None]:
    """Leaves out the sampler's own warnings where its weights are judged by other means."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gx.EffectiveSampleSizeWarning)
        yield


class Estimates(NamedTuple):
    """Estimates for each image from rounds of samples of its posterior, all [rounds, images] float64."""

    log_likelihood: Tensor  # the importance-weighted bound, without log Z_theta, as are the next three
    log_square: Tensor  # the logarithm of the mean of the squared importance weights
    plain: Tensor
    elbo: Tensor
    effective: Tensor  # the part, from 0 to 1, of the chains of AIS that counts: their effective number per chain
    gap: Tensor  # log Z_phi(x) of AIS minus the mean log-weight of its chains
    modes: Tensor  # number of the posterior's modes; nan if they are not counted


@torch.no_grad()
def evaluate(model: VAE, data: Dataset, config: Config, split: str = "test") -> dict[str, Any]:
    """Returns the estimates, their settings and the log-likelihood of each image.

    Processes share the work; each returns the whole result, which does not depend on their number.

    `nll` is -log of the mean over samples of p(x, z) / q(z), with the weights of AIS for q. Its mean over repetitions
    is an upper bound of the true value for any annealing (but for undirected models in structured prediction).
    `nll_plain` takes the samples of AIS as exact samples of q and its log Z_phi(x) as exact, as Vahdat et al. do. It
    bounds nothing, and is wrong by many nats where the annealing is too short. Both share log Z_theta, whose AIS
    estimate is low by about half its squared error.

    A few chains find out beforehand how many steps the annealing to each image's posterior needs, and some images how
    many samples the bound needs. All estimates come from new samples, so these choices do not bias them.

    `looseness` is the mean of the bound with ten times the samples minus the bound with the samples, on `check_images`
    evenly spaced images (`looseness_of_images`); it is less than the distance from the true value.
    `effective_sample_size` is that of the weights p(x, z) / q(z), `effective_sample_size_min` the least of the weights
    of AIS, over the number of samples. Directed posteriors, whose samples are exact, have no `annealing`.

    Warns:
        AnnealingWarning: The annealing fails for some images even with `posterior_max_betas` steps.
    """
    began = time.perf_counter()
    require_shares(config, "prior_ais_chains")
    model.eval()
    log_partition, error = model.prior_log_partition(
        config.prior_ais_chains, config.prior_betas, config.seed << 32, gx.distributed.annealed_importance_sampling
    )
    images = data.binary(split, config.test_images, config.data_seed)
    work = _Work(model, images, config)
    betas, failed = _choose_betas(work)
    factor, checks = _check(work, betas)
    estimates = work.estimates(torch.arange(len(images)), betas, config.samples, factor, "evaluate")
    log_likelihood = log_mean_exp(estimates.log_likelihood) - log_partition
    plain = log_mean_exp(estimates.plain) - log_partition
    samples = factor * config.samples
    effective = samples * (2 * log_mean_exp(estimates.log_likelihood) - log_mean_exp(estimates.log_square)).exp()
    difference = plain - log_likelihood
    is_wrong = difference.mean().abs() > MAX_DISAGREEMENT + 3 * standard_error(difference)
    result = {
        "split": split,
        "nll": -log_likelihood.mean().item(),
        "nll_standard_error": standard_error(log_likelihood),
        "nll_plain": -plain.mean().item(),
        "nll_plain_is_wrong": bool(is_wrong),
        "elbo": (estimates.elbo.mean() - log_partition).item(),
        "samples": samples,
        "effective_sample_size_min": estimates.effective.min().item(),
        "log_partition": log_partition,
        "log_partition_standard_error": error,
        "images": len(images),
        "fingerprint": fingerprint(images),
        "settings": settings(config),
        **checks,
        "seconds": time.perf_counter() - began,
        "log_likelihood": _rounded(log_likelihood, 4),
        "effective_sample_size": _rounded(effective, 1),
    }
    if work.is_annealed:
        result["annealing"] = {
            "images_at_betas": {str(count): int((betas == count).sum()) for count in betas.unique().tolist()},
            "failed": int(failed.sum()),
            "effective_sample_size": _rounded(samples * estimates.effective.mean(0), 1),
        }
        if failed.any() and gx.distributed.rank() == 0:
            warnings.warn(_failure(result), AnnealingWarning, stacklevel=3)
    return result


class _Work:
    """Estimates of some images of a split, made by all processes together."""

    def __init__(self, model: VAE, images: Tensor, config: Config) -> None:
        self.model, self.images, self.config = model, images, config
        self.is_annealed = isinstance(model.posterior, gx.nn.BoltzmannPosterior)
        self._stage = -1

    def estimates(
        self, index: Tensor, betas: Tensor, num_samples: int, rounds: int, label: str, count_modes: bool = False
    ) -> Estimates:
        """Estimates from new samples. A collective call.

        Args:
            index: [n] int64, the images' numbers.
            betas: [n] int64, the number of steps of the annealing to each image's posterior.
            num_samples: Samples of each image and round.
            rounds: Number of rounds.
            label: Name of this work, for the progress bar.
            count_modes: Whether to count the modes that the samples lead to.
        """
        self._stage += 1
        device = self.model.device
        # Chunks of this size keep the decoder's activations at some 50 MB.
        size = max(1, min(len(index), 16_000_000 // (num_samples * self.images.shape[1])))
        pieces = [
            (number, part)
            for number in range(rounds)
            for count in betas.unique()
            for part in (betas == count).nonzero()[:, 0].split(size)
        ]
        # Pieces of the same cost are neighbours. In a random order all processes have about as much to do.
        order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0)).tolist()
        mine = order[gx.distributed.share(len(pieces))]
        values = torch.full((len(mine), len(Estimates._fields), size), math.nan, dtype=torch.float64, device=device)
        # Each piece has a seed of its own, which does not depend on the process that does it.
        seed = (self.config.seed << 32) + (self._stage << 24) + 1
        progress = tqdm(mine, desc=label, unit=" chunks", leave=False, disable=gx.distributed.rank() > 0)
        for row, number in zip(values, progress, strict=True):
            _, part = pieces[number]
            chunk = self.images[index[part]].to(device)
            row[:, : len(part)] = _estimate(
                self.model, chunk, num_samples, int(betas[part[0]]), seed + number, count_modes
            )
        result = torch.full((len(Estimates._fields), rounds, len(index)), math.nan, dtype=torch.float64)
        for row, number in zip(gx.distributed.gather(values, len(pieces)).cpu(), order, strict=True):
            round_number, part = pieces[number]
            result[:, round_number, part] = row[:, : len(part)]
        return Estimates(*result)


def _estimate(model: VAE, images: Tensor, num_samples: int, num_betas: int, seed: int, count_modes: bool) -> Tensor:
    """The values of :class:`Estimates` [7, B] of one round for images [B, pixels]."""
    with suppressed_annealing_warnings():
        proposal = model.propose(images, num_samples, num_betas, seed)
    with fast_products(images.device):
        log_joint = model.log_joint(images, proposal.z)
    log_weight, log_bound = proposal.log_ratio.double(), (log_joint + proposal.log_weight).double()
    values = Estimates(
        log_likelihood=log_mean_exp(log_bound),
        log_square=log_mean_exp(2 * log_bound),
        plain=log_mean_exp((log_joint - proposal.log_q).double()),
        elbo=proposal.mean(log_joint - proposal.log_q).double(),
        effective=(-log_mean_exp(2 * log_weight)).exp(),
        gap=-log_weight.mean(0),
        modes=_count_modes(model, images, proposal.z) if count_modes else log_weight.new_full((len(images),), math.nan),
    )
    return torch.stack(values)


def _count_modes(model: VAE, images: Tensor, z: Tensor) -> Tensor:
    """The number [B] of distinct points to which mean-field sweeps from bits z [K, B, N] lead, rounded to bits."""
    posterior = model.posterior.distribution(model.encoder(model.seen(images)))  # type: ignore[operator]
    start = posterior.split(z)[0] if isinstance(posterior, gx.BipartiteBoltzmann) else z
    points = posterior.rsample((len(z),), 0, MODE_SWEEPS, relaxation="mean_field", initial=start, seed=0) > 0.5
    return torch.tensor([len(of_image.unique(dim=0)) for of_image in points.unbind(1)]).to(z.device, torch.float64)


def _choose_betas(work: _Work) -> tuple[Tensor, Tensor]:
    """The number of steps [images] of the annealing to each posterior, and where even the largest number fails."""
    betas = torch.full((len(work.images),), work.config.posterior_betas)
    failed = torch.full((len(work.images),), work.is_annealed)
    while failed.any():
        index = failed.nonzero()[:, 0]
        pilot = work.estimates(index, betas[index], PILOT_CHAINS, 1, "pilot")
        failed[index] = ((pilot.effective < MIN_EFFECTIVE) | (pilot.gap > MAX_GAP))[0]
        if GROWTH * int(betas.max()) > work.config.posterior_max_betas:
            break
        betas[failed] *= GROWTH
    return betas, failed


def _check(work: _Work, betas: Tensor) -> tuple[int, dict[str, Any]]:
    """By how many times `samples` the bound is tight enough; its looseness then, and the number of modes."""
    config, num_images = work.config, len(work.images)
    count = min(config.check_images, num_images)
    if not count:
        return 1, {}
    # Images from all over the split, because the images of MNIST are in an order.
    index = torch.arange(count) * num_images // count
    first = work.estimates(index, betas[index], config.samples, 1, "modes", work.is_annealed)
    bounds, factor = first.log_likelihood, 1
    while True:
        rounds = LOOSENESS_FACTOR * factor - len(bounds)
        more = work.estimates(index, betas[index], config.samples, rounds, "looseness")
        bounds = torch.cat([bounds, more.log_likelihood])
        grouped = log_mean_exp(bounds.view(factor, LOOSENESS_FACTOR, count))
        looseness = log_mean_exp(grouped) - grouped.mean(0)
        is_small = looseness.mean() <= config.max_looseness
        if not config.max_looseness or is_small or GROWTH * factor * config.samples > config.max_samples:
            break
        factor *= GROWTH
    checks = {
        "looseness": looseness.mean().item(),
        "looseness_standard_error": standard_error(looseness),
        "looseness_images": count,
        "looseness_of_images": _rounded(looseness, 4),
        "looseness_is_reached": bool(is_small) if config.max_looseness else None,
    }
    if work.is_annealed:  # A factorial posterior has one mode.
        checks |= {"modes": first.modes.mean().item(), "modes_max": int(first.modes.max())}
    return factor, checks


def compare(result: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The paired difference of two evaluations on the same images: nll of `result` minus nll of `other`.

    Their bounds are loose by up to `looseness`, which is infinite if that of one was not measured. `change` is what ten
    times the samples of both would add to the difference, measured on the images on which both were checked; it is NaN
    if they were not checked on the same ones.
    """
    if result["fingerprint"] != other["fingerprint"]:
        raise RunError(
            "the two runs were not evaluated on the same images (data, data_seed and the number of images must agree)"
        )
    change = looseness_change(result, other)
    difference = torch.tensor(other["log_likelihood"], dtype=torch.float64) - torch.tensor(
        result["log_likelihood"], dtype=torch.float64
    )
    return {
        "difference": difference.mean().item(),
        "standard_error": standard_error(difference),
        "images": len(difference),
        "looseness": max(found.get("looseness", math.inf) for found in (result, other)),
        "change": change.mean().item(),
        "change_standard_error": standard_error(change),
    }


def looseness_change(result: dict[str, Any], other: dict[str, Any]) -> Tensor:
    """For each image on which both were checked, what ten times the samples would add to their difference."""
    gain, other_gain = (
        torch.tensor(found.get("looseness_of_images", []), dtype=torch.float64) for found in (result, other)
    )
    return other_gain - gain if len(gain) == len(other_gain) else gain.new_empty(0)


def evaluate_run(
    run: Run,
    data: Dataset,
    model: VAE | None = None,
    split: str = "test",
    replace: bool = True,
    device: torch.device | None = None,
    keep_larger: bool = True,
) -> dict[str, Any]:
    """Evaluates a run with its own settings and saves the result.

    Args:
        run: The run to evaluate.
        data: Images of the run.
        model: The trained model; loaded from the run by default.
        split: Split of the images, one of SPLITS.
        replace: Whether the result may replace an earlier evaluation of the same checkpoint.
        device: Device of a model that is loaded; the CPU by default.
        keep_larger: Whether an earlier evaluation of more images of the same checkpoint stays.

    Returns:
        The result of :func:`evaluate`, with the step of the checkpoint.
    """
    state = run.load_checkpoint()
    result = {"step": state["step"]} | evaluate(
        model or run.load_model(data, state).to(device or "cpu"), data, run.config, split
    )
    earlier = saved(run, split, state["step"])
    is_kept = earlier is not None and (not replace or (keep_larger and earlier["images"] > result["images"]))
    if gx.distributed.rank() == 0 and not is_kept:
        path = _path(run, split)
        try:
            atomic_write(path, (json.dumps(result) + "\n").encode())
        except OSError as error:
            reason = f"the evaluation cannot be saved ({error.strerror}); it is: {summary(result)}"
            raise RunError(f"{path}: {reason}") from error
    return result


def read(run: Run, split: str = "test") -> dict[str, Any] | None:
    """The run's evaluation of any step, or None."""
    path = _path(run, split)
    if not path.exists():
        return None
    with blaming(path, DAMAGED):
        result: dict[str, Any] = json.loads(path.read_text())
        # A damaged file makes one of these fail, so the callers need no checks of their own.
        summary(result)
        compare(result, result)
    return result


def saved(run: Run, split: str, step: int) -> dict[str, Any] | None:
    """The run's evaluation of this step, or None if there is none or it is damaged."""
    with suppress(RunError):
        result = read(run, split)
        if result and result.get("step") == step:
            return result
    return None


def settings(config: Config) -> dict[str, Any]:
    """The settings that an evaluation depends on."""
    return {name: getattr(config, name) for name in SETTINGS}


def _path(run: Run, split: str) -> Path:
    return run.evaluation_path if split == "test" else run.path / f"evaluation_{split}.json"


def summary(result: dict[str, Any]) -> str:
    """One line. Evaluations of earlier versions lack the clauses on the samples of the posterior."""
    used = result["settings"]
    ais = f"by AIS, {used['prior_ais_chains']} chains x {used['prior_betas']} betas"
    prior = f"log Z of the prior {result['log_partition']:.2f} +- {result['log_partition_standard_error']:.2f} {ais}"
    clauses = [
        f"{result['images']} images, {result.get('samples', used['samples'])} samples each",
        *_clauses(result),
        prior,
        f"{result['seconds']:.0f} s",
    ]
    return (
        f"{result['split']} NLL {result['nll']:.2f} +- {result['nll_standard_error']:.2f} nats, "
        f"ELBO {result['elbo']:.2f} ({'; '.join(clauses)})"
    )


def _clauses(result: dict[str, Any]) -> list[str]:
    """What the samples of the posterior are worth."""
    clauses = []
    annealing = result.get("annealing")
    if "looseness" in result:
        size = f"{result['looseness']:.3f} +- {result['looseness_standard_error']:.3f}"
        missed = ", more than max_looseness" if result["looseness_is_reached"] is False else ""
        clauses.append(
            f"10 times the samples raise the bound by {size} on {result['looseness_images']} of them{missed}"
        )
    if annealing:
        steps = annealing["images_at_betas"]
        sizes = annealing["effective_sample_size"]
        numbers = f"{', '.join(steps)} betas" + (
            f" for {', '.join(map(str, steps.values()))}" if len(steps) > 1 else ""
        )
        clauses.append(
            f"AIS to the posterior: {numbers}, {min(sizes):.0f} or more samples count, median {median(sizes):.0f}"
        )
        if annealing["failed"]:
            clauses.append(_failure(result))
    if "modes" in result:
        clauses.append(f"{result['modes']:.1f} posterior modes, at most {result['modes_max']}")
    if result.get("nll_plain_is_wrong"):
        clauses.append(f"WARNING: AIS samples taken as exact would give {result['nll_plain']:.2f}, which is wrong")
    return clauses


def _failure(result: dict[str, Any]) -> str:
    steps = max(map(int, result["annealing"]["images_at_betas"]))
    count = f"{result['annealing']['failed']} of {result['images']} images"
    return f"WARNING: AIS to the posterior fails for {count} with {steps} betas, so their bound is loose"


def _rounded(values: Tensor, digits: int) -> list[float]:
    return [round(value, digits) for value in values.tolist()]


def standard_error(values: Tensor) -> float:
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else math.nan
