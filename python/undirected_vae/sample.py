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
def generate(model: VAE, count: int, num_betas: int = 2000) -> Tensor:
    """Mean images [count, pixels] of the prior's latents, annealed from independent bits (it mixes slowly)."""
    latents = gx.annealed_importance_sampling(model.prior.distribution(), count, num_betas, base="bias").samples
    return torch.sigmoid(model.decoder(latents))


@torch.no_grad()
def reconstruct(model: VAE, images: Tensor) -> Tensor:
    """Mean images of one posterior sample each, [B, pixels]."""
    proposal = model.propose(images, 1, 200)
    return torch.sigmoid(model.decoder(proposal.z[0]))


def sample_run(run: Run, data: Dataset, model: VAE | None = None, count: int = 100, seed: int = 0) -> list[Path]:
    """Writes samples.png, reconstructions.png and curves.png into the run's folder."""
    model = model or run.load_model(data)
    model.eval()
    torch.manual_seed(seed)
    images = data.binary("test", 30, run.config.data_seed)
    written = [
        pictures.grid(run.path / "samples.png", generate(model, count), data.shape),
        pictures.pairs(run.path / "reconstructions.png", images, reconstruct(model, images), data.shape),
    ]
    metrics = run.read_metrics()
    if metrics:
        written.append(pictures.curves(run.path / "curves.png", metrics))
    return written
