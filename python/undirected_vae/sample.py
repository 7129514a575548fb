# SPDX-License-Identifier: Apache-2.0
"""Images that a trained model generates, and its reconstructions."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import gibbs_ext as gx

from . import pictures
from .data import Dataset
from .runs import Run
from .vae import VAE


@torch.no_grad()
def generate(model: VAE, count: int, seed: int, num_betas: int = 2000) -> Tensor:
    """Mean images [count, pixels] of samples of the prior, which are annealed because its chains mix slowly."""
    prior = model.prior.distribution()
    latents = gx.annealed_importance_sampling(prior, count, num_betas, seed=seed).samples
    return torch.sigmoid(model.decoder(latents)).cpu()


@torch.no_grad()
def reconstruct(model: VAE, images: Tensor, seed: int) -> Tensor:
    """Mean images [B, pixels] of one posterior sample for each image."""
    proposal = model.propose(images.to(model.device), 1, 200, seed)
    return torch.sigmoid(model.decoder(proposal.z[0])).cpu()


def sample_run(
    run: Run,
    data: Dataset,
    model: VAE | None = None,
    count: int = 100,
    seed: int = 0,
    device: torch.device | None = None,
) -> list[Path]:
    """Writes samples.png, reconstructions.png and curves.png into the run's folder.

    `device` is that of a model that is loaded from the run; the CPU by default.
    """
    model = model or run.load_model(data).to(device or "cpu")
    model.eval()
    images = data.binary("test", 30, run.config.data_seed)
    samples, reconstructions = generate(model, count, seed << 32), reconstruct(model, images, (seed << 32) + 1)
    written = [
        pictures.grid(run.path / "samples.png", samples, data.shape),
        pictures.pairs(run.path / "reconstructions.png", images, reconstructions, data.shape),
    ]
    metrics = run.read_metrics()
    if metrics:
        written.append(pictures.curves(run.path / "curves.png", metrics))
    return written
