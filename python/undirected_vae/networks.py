# SPDX-License-Identifier: Apache-2.0
"""The fully connected networks of Vahdat et al. 2020."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def hidden_layers(in_features: int, widths: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """A linear layer, batch normalisation and tanh for each width."""
    layers: list[nn.Module] = []
    for width in widths:
        # The paper's moving averages have momentum 0.99, which is 0.01 in PyTorch's convention.
        layers += [nn.Linear(in_features, width, bias=False), nn.BatchNorm1d(width, eps=1e-2, momentum=0.01), nn.Tanh()]
        if dropout:
            layers.append(nn.Dropout(dropout))
        in_features = width
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """Maps binary images [B, pixels] to features [B, widths[-1]], from which a posterior is made."""

    mean: Tensor

    def __init__(self, mean: Tensor, widths: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.layers = hidden_layers(mean.shape[0], widths, dropout)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(images - self.mean)
        return features


class Decoder(nn.Module):
    """Maps latent bits (or their relaxation) [..., n] to logits of the pixels [..., pixels]."""

    def __init__(self, num_latents: int, mean: Tensor, widths: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = hidden_layers(num_latents, widths, dropout)
        self.output = nn.Linear(widths[-1] if widths else num_latents, mean.shape[0])
        # An untrained decoder predicts the mean of the data. The clamp keeps logits finite where a pixel is always 0.
        with torch.no_grad():
            self.output.bias.copy_(torch.logit(mean.clamp(1e-3, 1 - 1e-3)))

    def forward(self, latents: Tensor) -> Tensor:
        logits: Tensor = self.output(self.layers((latents - 0.5).flatten(0, -2)))
        return logits.view(*latents.shape[:-1], -1)
