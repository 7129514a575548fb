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
    assert model.prior is not None
    prior = model.prior.distribution()
    latents = gx.annealed_importance_sampling(prior, count, num_betas, seed=seed).samples
    return torch.sigmoid(model.decoder(latents)).cpu()


@torch.no_grad()
def reconstruct(model: VAE, images: Tensor, seed: int, num_samples: int = 1) -> Tensor:
    """Mean images [num_samples, B, pixels], one for each posterior sample of each image.

    In structured prediction their upper half is that of the image, which the encoder sees.
    """
    images = images.to(model.device)
    means = torch.sigmoid(model.decoder(model.propose(images, num_samples, 200, seed).z))
    if model.is_structured:
        means = torch.cat((model.seen(images).expand(num_samples, -1, -1), means), -1)
    return means.cpu()


def sample_run(
    run: Run,
    data: Dataset,
    model: VAE | None = None,
    count: int = 100,
    seed: int = 0,
    device: torch.device | None = None,
) -> list[Path]:
    """Writes samples.png, reconstructions.png and curves.png into the run's folder.

    In structured prediction samples.png has several completions of each image, and there are no reconstructions.

    `device` is that of a model that is loaded from the run; the CPU by default.
    """
    model = model or run.load_model(data).to(device or "cpu")
    model.eval()
    images = data.binary("test", 30, run.config.data_seed)
    if model.is_structured:
        # Each column has an image above its completions, whose upper half is the image's own.
        columns = images[:20]
        completions = reconstruct(model, columns, seed << 32, max(1, count // len(columns)))
        blocks = torch.cat((columns[None], completions)).flatten(0, 1)
        written = [pictures.grid(run.path / "samples.png", blocks, data.shape, len(columns))]
    else:
        samples = generate(model, count, seed << 32)
        reconstructions = reconstruct(model, images, (seed << 32) + 1)[0]
        written = [
            pictures.grid(run.path / "samples.png", samples, data.shape),
            pictures.pairs(run.path / "reconstructions.png", images, reconstructions, data.shape),
        ]
    metrics = run.read_metrics()
    if metrics:
        written.append(pictures.curves(run.path / "curves.png", metrics))
    return written
