# SPDX-License-Identifier: Apache-2.0
"""A Boltzmann machine whose parameters a network computes: one model per data point."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gibbs_ext.chains import PersistentChains
from gibbs_ext.checks import check_integers, shown
from gibbs_ext.distributions import BipartiteBoltzmann
from gibbs_ext.functional import bipartite_gibbs_relaxed


class BoltzmannSample(NamedTuple):
    """A relaxed sample of B posteriors; with chains_per_point > 1 the tensors have that dim in front."""

    left: Tensor  # [B, n1] in [0, 1]
    right: Tensor  # [B, n2] in [0, 1]
    left_mean: Tensor  # [B, n1]: the conditional mean of left given right, for what is linear in left
    model: BipartiteBoltzmann  # batch shape [B]


class BoltzmannPosterior(nn.Module):
    """``q(left, right | x)``, an undirected approximate posterior (Vahdat, Andriyash, Macready, ICML 2020).

    A linear layer maps features of x to raw biases b1, b2 and raw couplings. The latter are batch-normalised, scaled by
    ``1.5 / sqrt(n1)`` and read as spin couplings J at inverse temperature ``t = spin_beta``; in bits that is
    ``weight = 2 t J``, ``left_bias = t (b1 - sum_j J_ij)``, ``right_bias = t (b2 - sum_i J_ij)``, so that b = 0
    gives fair bits.

    Args:
        in_features: F.
        num_left: n1.
        num_right: n2.
        coupling: ``"per_sample"``, every coupling from the features (the paper's; n1 * n2 outputs); ``"shared"``, one
            learnt matrix for all data points; ``"low_rank"``, ``J ~ U diag(s(x)) V^T`` with s from the features.
        rank: Length of s, for ``"low_rank"``.
        spin_beta: t.
        num_sweeps: Binary sweeps a sample makes from where its chain stands, without gradient.
        num_relaxed_sweeps: Relaxed sweeps that follow, with gradient.
        relaxation: See :func:`gibbs_ext.bipartite_gibbs_relaxed`.
        sharpness: Of the relaxation.
        slope_gradient: Of the relaxation.
        dataset_size: Keep persistent chains for that many data points.
        chains_per_point: Samples per data point.

    Attributes:
        chains: :class:`gibbs_ext.PersistentChains` of the data points, or None without ``dataset_size``.
    """

    def __init__(
        self,
        in_features: int,
        num_left: int,
        num_right: int,
        *,
        coupling: str = "per_sample",
        rank: int = 16,
        spin_beta: float = 2.0,
        num_sweeps: int = 10,
        num_relaxed_sweeps: int = 1,
        relaxation: str = "pwl",
        sharpness: float = 4.0,
        slope_gradient: bool = True,
        dataset_size: int | None = None,
        chains_per_point: int = 1,
    ) -> None:
        super().__init__()
        name = "BoltzmannPosterior"
        check_integers(name, 1, in_features=in_features, num_left=num_left, num_right=num_right, rank=rank)
        check_integers(name, 0, num_sweeps=num_sweeps)
        check_integers(name, 1, num_relaxed_sweeps=num_relaxed_sweeps, chains_per_point=chains_per_point)
        if dataset_size is not None:
            check_integers(name, 1, dataset_size=dataset_size)
        outputs = {"per_sample": num_left * num_right, "shared": 0, "low_rank": rank}
        if coupling not in outputs:
            raise ValueError(f"{name}: coupling must be one of {', '.join(outputs)}, got {shown(coupling)}")
        self.num_left, self.num_right = num_left, num_right
        self.coupling = coupling
        self.spin_beta = spin_beta
        self.num_sweeps, self.num_relaxed_sweeps = num_sweeps, num_relaxed_sweeps
        self.relaxation, self.sharpness, self.slope_gradient = relaxation, sharpness, slope_gradient
        self.chains_per_point = chains_per_point
        self.bias = nn.Linear(in_features, num_left + num_right)
        if coupling == "shared":
            self.raw_coupling = nn.Parameter(0.01 * torch.randn(num_left, num_right))
        else:
            # Batch normalisation subtracts the mean, and with it any bias.
            self.head = nn.Linear(in_features, outputs[coupling], bias=False)
            self.norm = nn.BatchNorm1d(outputs[coupling], eps=1e-2, momentum=0.01)
        if coupling == "low_rank":
            # Unit variance of U diag(s) V^T for s of unit variance, as per_sample has it.
            self.left_factor = nn.Parameter(torch.randn(num_left, rank) / math.sqrt(rank))
            self.right_factor = nn.Parameter(torch.randn(num_right, rank))
        self.chains: PersistentChains | None = None
        if dataset_size is not None:
            shape_only = BipartiteBoltzmann(
                torch.zeros(num_left), torch.zeros(num_right), torch.zeros(()).expand(num_left, num_right)
            )
            self.chains = PersistentChains(chains_per_point, shape_only, dataset_size)

    def parameters_of(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The posterior's parameters.

        Args:
            features: [B, F].

        Returns:
            left_bias [B, n1], right_bias [B, n2] and weight [B, n1, n2] ([n1, n2] for a shared coupling), all with
            gradient. In training mode, updates the moving averages of the batch normalisation.
        """
        t = self.spin_beta
        raw_left, raw_right = (t * self.bias(features)).split((self.num_left, self.num_right), dim=-1)
        scale = 2 * t * 1.5 / math.sqrt(self.num_left)
        if self.coupling == "shared":
            weight = scale * self.raw_coupling
        else:
            strength = scale * self.norm(self.head(features))
            if self.coupling == "per_sample":
                weight = strength.unflatten(-1, (self.num_left, self.num_right))
            else:
                weight = (self.left_factor * strength.unsqueeze(-2)) @ self.right_factor.mT
        # t sum_j J_ij is half of weight's sum.
        return raw_left - weight.sum(-1) / 2, raw_right - weight.sum(-2) / 2, weight

    def distribution(self, features: Tensor) -> BipartiteBoltzmann:
        """The posteriors of features [B, F] as a distribution of batch shape [B]."""
        return BipartiteBoltzmann(*self.parameters_of(features), validate_args=False)

    def forward(self, features: Tensor, index: Tensor | None = None) -> BoltzmannSample:
        """A relaxed sample of each posterior, differentiable in the features and in this module's parameters.

        Args:
            features: [B, F].
            index: [B] int64, which data points these are: their persistent chains start the sweeps and, in training
                mode, are replaced by the binary state before the relaxed sweeps (mutates ``chains``). Without index
                the chains start from uniform bits.

        Returns:
            :class:`BoltzmannSample`. The seed comes from torch's default generator.
        """
        model = self.distribution(features)
        num_sweeps = self.num_sweeps
        beta = torch.ones(num_sweeps + self.num_relaxed_sweeps, dtype=torch.float64)
        if index is None:
            # A first sweep at beta = 0 makes uniform bits.
            num_sweeps, beta = num_sweeps + 1, torch.cat([beta.new_zeros(1), beta])
            start = features.new_zeros(()).expand(self.chains_per_point, len(features), self.num_left)
        elif self.chains is None:
            raise ValueError("BoltzmannPosterior: index needs a posterior built with dataset_size")
        else:
            start = self.chains.state(index)
        left, right, left_mean, state = bipartite_gibbs_relaxed(
            start, model.left_bias, model.right_bias, model.weight, num_sweeps, self.num_relaxed_sweeps,
            relaxation=self.relaxation, sharpness=self.sharpness, slope_gradient=self.slope_gradient, beta=beta,
            return_state=True,
        )  # fmt: skip
        if self.chains is not None and index is not None and self.training:
            self.chains.store_(state, index)
        if self.chains_per_point == 1:
            left, right, left_mean = left.squeeze(0), right.squeeze(0), left_mean.squeeze(0)
        return BoltzmannSample(left, right, left_mean, model)
