# SPDX-License-Identifier: Apache-2.0
"""Test log-likelihood: the importance-weighted bound with binary samples, log Z by AIS."""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import gibbs_ext as gx

from .config import EVALUATION, Config
from .data import Dataset, fingerprint
from .processes import require_shares
from .runs import DAMAGED, Run, RunError, atomic_write, blaming
from .vae import VAE

SETTINGS = (*EVALUATION, "data_seed", "seed")


@torch.no_grad()
def evaluate(model: VAE, data: Dataset, config: Config, split: str = "test") -> dict[str, Any]:
    """Returns the estimates, their settings and the log-likelihood of each image.

    Processes share the work; each returns the whole result, which does not depend on their number.

    `nll` is -log of the mean over samples of p(x, z) / q(z), with the weights of AIS for q. Its mean over repetitions
    is an upper bound of the true value for any annealing. `nll_plain` takes the samples of AIS as exact samples of
    q and its log Z_phi(x) as exact, as Vahdat et al. do. The two agree if the annealing is long enough. Both share
    log Z_theta, whose AIS estimate is low by about half its squared error.
    """
    began = time.perf_counter()
    require_shares(config, "prior_ais_chains")
    model.eval()
    # Each piece of work has a seed of its own, which does not depend on the process that does it.
    seed = config.seed << 32
    log_partition, error = model.prior_log_partition(
        config.prior_ais_chains, config.prior_betas, seed, gx.distributed.annealed_importance_sampling
    )
    images = data.binary(split, config.test_images, config.data_seed)
    # Chunks of this size keep the decoder's activations at some 50 MB.
    size = max(1, 16_000_000 // (config.samples * images.shape[1]))
    chunks = images.split(size)
    mine = gx.distributed.share(len(chunks))
    # Each chunk has three estimates for each image; the last chunk may be smaller.
    estimates = torch.full((mine.stop - mine.start, 3, size), math.nan, dtype=torch.float64, device=model.device)
    progress = tqdm(
        range(mine.start, mine.stop), desc="evaluate", unit=" chunks", leave=False, disable=gx.distributed.rank() > 0
    )
    for number in progress:
        chunk = chunks[number].to(model.device)
        proposal = model.propose(chunk, config.samples, config.posterior_betas, seed + 1 + number)
        log_joint = model.log_joint(chunk, proposal.z) - log_partition
        estimates[number - mine.start, :, : len(chunk)] = torch.stack(
            [
                _log_mean_exp(log_joint + proposal.log_weight),
                _log_mean_exp(log_joint - proposal.log_q),
                (log_joint - proposal.log_q).mean(0),
            ]
        )
    # [3, images]
    estimates = gx.distributed.gather(estimates, len(chunks)).movedim(1, 0).flatten(1)[:, : len(images)].cpu()
    log_likelihood, plain, elbo = estimates
    return {
        "split": split,
        "nll": -log_likelihood.mean().item(),
        "nll_standard_error": _standard_error(log_likelihood),
        "nll_plain": -plain.mean().item(),
        "elbo": elbo.mean().item(),
        "log_partition": log_partition,
        "log_partition_standard_error": error,
        "images": len(images),
        "fingerprint": fingerprint(images),
        "settings": settings(config),
        "seconds": time.perf_counter() - began,
        "log_likelihood": [round(value, 4) for value in log_likelihood.tolist()],
    }


def compare(result: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The paired difference of two evaluations on the same images: nll of `result` minus nll of `other`."""
    if result["fingerprint"] != other["fingerprint"]:
        raise RunError(
            "the two runs were not evaluated on the same images (data, data_seed and the number of images must agree)"
        )
    difference = torch.tensor(other["log_likelihood"], dtype=torch.float64) - torch.tensor(
        result["log_likelihood"], dtype=torch.float64
    )
    return {
        "difference": difference.mean().item(),
        "standard_error": _standard_error(difference),
        "images": len(difference),
    }


def evaluate_run(
    run: Run,
    data: Dataset,
    model: VAE | None = None,
    split: str = "test",
    replace: bool = True,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Evaluates a run with its own settings and saves the result, but never in place of an evaluation of more images.

    Args:
        run: The run to evaluate.
        data: Images of the run.
        model: The trained model; loaded from the run by default.
        split: Split of the images, one of SPLITS.
        replace: Whether the result may replace an earlier evaluation of the same checkpoint.
        device: Device of a model that is loaded; the CPU by default.

    Returns:
        The result of :func:`evaluate`, with the step of the checkpoint.
    """
    state = run.load_checkpoint()
    result = {"step": state["step"]} | evaluate(
        model or run.load_model(data, state).to(device or "cpu"), data, run.config, split
    )
    earlier = saved(run, split, state["step"])
    if gx.distributed.rank() == 0 and (earlier is None or (replace and earlier["images"] <= result["images"])):
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
    used = result["settings"]
    ais = f"{used['prior_ais_chains']} chains x {used['prior_betas']} betas"
    return (
        f"{result['split']} NLL {result['nll']:.2f} +- {result['nll_standard_error']:.2f} nats, "
        f"ELBO {result['elbo']:.2f} ({result['images']} images, {used['samples']} samples each; "
        f"log Z of the prior {result['log_partition']:.2f} +- {result['log_partition_standard_error']:.2f} "
        f"by AIS, {ais}; {result['seconds']:.0f} s)"
    )


def _log_mean_exp(values: Tensor) -> Tensor:
    return torch.logsumexp(values, 0) - math.log(len(values))


def _standard_error(values: Tensor) -> float:
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else math.nan
