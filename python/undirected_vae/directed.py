# SPDX-License-Identifier: Apache-2.0
"""The baseline: a directed posterior with one group of units (L = 1), a factorial Bernoulli with logits from x."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gibbs_ext as gx


class FactorialSample(NamedTuple):
    left: Tensor
    right: Tensor
    left_logits: Tensor
    right_logits: Tensor


class FactorialPosterior(nn.Module):
    """q(z | x) = product of Bernoulli(sigmoid(logits(x))), relaxed as the undirected posterior's units are."""

    no_coupling: Tensor

    def __init__(
        self,
        in_features: int,
        num_left: int,
        num_right: int,
        *,
        relaxation: str = "pwl",
        sharpness: float = 4.0,
        slope_gradient: bool = True,
    ) -> None:
        super().__init__()
        self.sizes = [num_left, num_right]
        self.relaxation, self.sharpness, self.slope_gradient = relaxation, sharpness, slope_gradient
        self.logits = nn.Linear(in_features, num_left + num_right)
        self.register_buffer("no_coupling", torch.zeros(num_left, num_right), persistent=False)

    def parameters_of(self, features: Tensor) -> tuple[Tensor, Tensor]:
        left_logits, right_logits = self.logits(features).split(self.sizes, -1)
        return left_logits, right_logits

    def forward(self, features: Tensor) -> FactorialSample:
        left_logits, right_logits = self.parameters_of(features)
        # A machine without couplings is factorial: one relaxed sweep draws from it, with the undirected posterior's
        # own relaxation.
        left, right, _ = gx.bipartite_gibbs_relaxed(
            torch.zeros_like(left_logits),
            left_logits,
            right_logits,
            self.no_coupling,
            num_sweeps=0,
            num_relaxed_sweeps=1,
            relaxation=self.relaxation,
            sharpness=self.sharpness,
            slope_gradient=self.slope_gradient,
        )
        return FactorialSample(left, right, left_logits, right_logits)


def negative_entropy(logits: Tensor) -> Tensor:
    """sum_i E_q[log q(z_i)] of a factorial Bernoulli, [..., n] -> [...]."""
    return (torch.sigmoid(logits) * logits - F.softplus(logits)).sum(-1)
