# SPDX-License-Identifier: Apache-2.0
"""The baseline: a directed posterior with one group of units (L = 1), a factorial Bernoulli with logits from x."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gibbs_ext as gx


class FactorialSample(NamedTuple):
    z: Tensor  # [B, N] in [0, 1]
    logits: Tensor  # [B, N]


class FactorialPosterior(nn.Module):
    """q(z | x) = product of Bernoulli(sigmoid(logits(x))), relaxed as the undirected posterior's units are."""

    def __init__(
        self,
        in_features: int,
        num_latents: int,
        *,
        relaxation: str = "pwl",
        sharpness: float = 4.0,
        slope_gradient: bool = True,
    ) -> None:
        super().__init__()
        # A machine without couplings is factorial, so one relaxed sweep draws from it with the relaxation of the
        # undirected posterior.
        self.graph = gx.ColoredGraph(num_latents, [])
        self.relaxation, self.sharpness, self.slope_gradient = relaxation, sharpness, slope_gradient
        self.logits = nn.Linear(in_features, num_latents)

    def forward(self, features: Tensor, *, chain_offset: int = 0, seed: Tensor | None = None) -> FactorialSample:
        """A relaxed sample for each row of features [B, F]; chain_offset and seed as in BoltzmannPosterior."""
        logits = self.logits(features)
        z, _ = gx.graph_gibbs_relaxed(
            torch.zeros_like(logits),
            logits,
            logits.new_empty(0),
            self.graph,
            num_sweeps=0,
            num_relaxed_sweeps=1,
            relaxation=self.relaxation,
            sharpness=self.sharpness,
            slope_gradient=self.slope_gradient,
            chain_offset=chain_offset,
            seed=seed,
        )
        return FactorialSample(z, logits)

    def sample(self, logits: Tensor, num_samples: int, seed: int | None = None) -> Tensor:
        """Draws bits [num_samples, B, N] for logits [B, N]."""
        start = logits.new_zeros(()).expand(num_samples, *logits.shape)
        return gx.graph_gibbs(start, logits, logits.new_empty(0), self.graph, 1, seed=seed)


def negative_entropy(logits: Tensor) -> Tensor:
    """sum_i E_q[log q(z_i)] of a factorial Bernoulli, [..., n] -> [...]."""
    return (torch.sigmoid(logits) * logits - F.softplus(logits)).sum(-1)
