# SPDX-License-Identifier: Apache-2.0
"""The fully connected networks of Vahdat et al. 2020."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def normalised_tanh(width: int, dropout: float = 0.0) -> list[nn.Module]:
    """What follows a linear layer: batch normalisation, tanh and perhaps dropout."""
    # The paper's moving averages have momentum 0.99, which is 0.01 in PyTorch's convention.
    layers: list[nn.Module] = [nn.BatchNorm1d(width, eps=1e-2, momentum=0.01), nn.Tanh()]
    return [*layers, nn.Dropout(dropout)] if dropout else layers


def hidden_layers(in_features: int, widths: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """A linear layer, batch normalisation and tanh for each width."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(in_features, width, bias=False), *normalised_tanh(width, dropout)]
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


class GroupNetwork(nn.Module):
    """Maps images [B, pixels] and the latents before a group [..., B, n] to outputs for the group [..., B, num_units].

    The first layer's part that depends on the images alone is computed once for all samples of an image.
    """

    mean: Tensor

    def __init__(
        self, mean: Tensor, num_before: int, num_units: int, widths: Sequence[int], dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        first = widths[0] if widths else num_units
        # Batch normalisation subtracts the mean, and with it any bias.
        self.of_images = nn.Linear(mean.shape[0], first, bias=not widths)
        self.of_latents = nn.Linear(num_before, first, bias=False)
        self.layers = nn.Sequential()
        if widths:
            self.layers.extend(normalised_tanh(first, dropout))
            self.layers.extend(hidden_layers(first, widths[1:], dropout))
            self.layers.append(nn.Linear(widths[-1], num_units))

    def forward(self, images: Tensor, latents: Tensor) -> Tensor:
        outputs = self.of_images(images - self.mean) + self.of_latents(latents - 0.5)
        of_rows: Tensor = self.layers(outputs.flatten(0, -2))
        return of_rows.view(*outputs.shape[:-1], -1)


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
