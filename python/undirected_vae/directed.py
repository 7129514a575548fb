# SPDX-License-Identifier: Apache-2.0
"""The baselines: directed posteriors of L groups of units, each a factorial Bernoulli given x and the groups before."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gibbs_ext as gx

from .networks import GroupNetwork

NEWTON_STEPS = 8  # They reach float64's precision for every exponent from 1/100 to 1/2.
MEAN_FIELD_STEPS = 5  # as Vahdat et al. 2018 take


class DirectedSample(NamedTuple):
    """Relaxed samples of B posteriors; with several samples per point the tensors have that dim in front."""

    z: Tensor  # [B, N] in [0, 1]
    z_mean: Tensor  # [B, N]: z, the last group replaced by its conditional mean, for what is linear in its units
    logits: Tensor  # [B, N]: logits of each unit given x and the groups before
    log_odds: Tensor | None  # [B, N]: log(z / (1 - z)) of the power-function mixture; None for other relaxations


class DirectedPosterior(nn.Module):
    """``q(z | x) = prod_l q(z_l | x, z_1 .. z_(l-1))``, each factor a product of Bernoullis.

    The logits of the first group are a linear function of the encoder's features. Each further group has a network of
    its own, of the encoder's widths, which sees the image and the groups before. Units are relaxed as those of the
    undirected posterior, or by the mixture of power functions of DVAE# (Vahdat, Andriyash, Macready, NeurIPS 2018,
    arXiv 1805.07445): ``zeta`` has the density ``(1 - q) r(zeta) + q r(1 - zeta)``, ``r(zeta) = lambda zeta^(lambda -
    1)``, and its gradient is that of the implicit function ``F(zeta; q) = u``.

    Args:
        in_features: F, number of the encoder's features.
        num_latents: N, split into groups as evenly as possible.
        mean: [pixels], which the networks of the further groups subtract from images.
        groups: L, from 1 to N.
        widths: Widths of the hidden layers of these networks.
        dropout: Dropout probability after each of them.
        spin_beta: t, a factor of all logits. An undirected posterior's biases have the same.
        relaxation: ``"pwl"``, ``"concrete"``, ``"straight_through"`` or ``"mean_field"`` as in
            :func:`gibbs_ext.bipartite_gibbs_relaxed`, or ``"power_function"``.
        sharpness: Sharpness of the relaxation; 1 / lambda of the power function.
        slope_gradient: Whether ``"pwl"`` lets gradient through its slope.
    """

    def __init__(
        self,
        in_features: int,
        num_latents: int,
        mean: Tensor,
        *,
        groups: int = 1,
        widths: Sequence[int] = (),
        dropout: float = 0.0,
        spin_beta: float = 1.0,
        relaxation: str = "pwl",
        sharpness: float = 4.0,
        slope_gradient: bool = True,
    ) -> None:
        super().__init__()
        ends = [num_latents * group // groups for group in range(groups + 1)]
        self.sizes = [end - start for start, end in itertools.pairwise(ends)]
        # A machine without couplings is factorial, so one sweep draws a group.
        self.graphs = [gx.ColoredGraph(size, []) for size in self.sizes]
        self.spin_beta = spin_beta
        self.relaxation, self.sharpness, self.slope_gradient = relaxation, sharpness, slope_gradient
        self.logits = nn.Linear(in_features, self.sizes[0])
        self.further = nn.ModuleList(
            GroupNetwork(mean, start, size, widths, dropout)
            for start, size in zip(ends[1:-1], self.sizes[1:], strict=True)
        )

    def forward(
        self,
        features: Tensor,
        images: Tensor,
        num_samples: int | None = None,
        *,
        chain_offset: int | Tensor = 0,
        seed: int | Tensor | None = None,
    ) -> DirectedSample:
        """Relaxed samples, differentiable in the features and in this module's parameters.

        Args:
            features: [B, F].
            images: [B, pixels], which the networks of the further groups see.
            num_samples: K, number of samples of each posterior. If None, there is one, and no dim for it.
            chain_offset: Number of the first sample, or numbers [K, B], as in :func:`gibbs_ext.bipartite_gibbs`.
            seed: A 64-bit integer or a 0-dim int64 tensor; drawn from the default generator if None.
        """
        seed = _drawn(seed)
        zs: list[Tensor] = []
        all_logits: list[Tensor] = []
        all_odds: list[Tensor] = []
        for number in range(len(self.sizes)):
            logits = self._logits(number, features, images, zs)
            if num_samples is not None and logits.dim() == 2:
                logits = logits.expand(num_samples, -1, -1)
            if self.relaxation == "power_function":
                noise = self._relaxed(number, torch.zeros_like(logits), "concrete", 1.0, chain_offset, seed)
                all_odds.append(power_function_log_odds(logits, noise, 1 / self.sharpness))
                zs.append(torch.sigmoid(all_odds[-1]))
            else:
                zs.append(self._relaxed(number, logits, self.relaxation, self.sharpness, chain_offset, seed))
            all_logits.append(logits)
        means = [*zs[:-1], torch.sigmoid(all_logits[-1])]
        odds = torch.cat(all_odds, -1) if all_odds else None
        return DirectedSample(torch.cat(zs, -1), torch.cat(means, -1), torch.cat(all_logits, -1), odds)

    def sample(
        self, features: Tensor, images: Tensor, num_samples: int, seed: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draws bits [num_samples, B, N]; returns them and log q(z | x) [num_samples, B]."""
        drawn = _drawn(seed)
        zs: list[Tensor] = []
        log_q = features.new_zeros(())
        for number, graph in enumerate(self.graphs):
            logits = self._logits(number, features, images, zs)
            start = logits.new_zeros(()).expand(num_samples, *logits.shape[-2:])
            z = gx.graph_gibbs(start, logits, logits.new_empty(0), graph, 1, sweep_offset=number, seed=drawn)
            log_q = log_q + log_bernoulli(logits, z)
            zs.append(z)
        return torch.cat(zs, -1), log_q

    def log_table(self, features: Tensor, images: Tensor) -> Tensor:
        """log q(z | x) of all 2^N states, [2^N, B], in the order of all_bits(N)."""
        table = features.new_zeros(1, len(features))
        before = features.new_zeros(1, len(features), 0)  # the states of the groups before, [prefixes, B, n]
        for number, size in enumerate(self.sizes):
            bits = all_bits(size).to(features)[:, None]
            logits = self._logits(number, features, images, [before])
            logits = logits.view(-1, 1, *logits.shape[-2:])  # [prefixes, or 1 for the first group, 1, B, size]
            table = (table[:, None] + log_bernoulli(logits, bits)).flatten(0, 1)
            pairs = (len(before), len(bits), len(features))
            before = torch.cat((before[:, None].expand(*pairs, -1), bits.expand(*pairs, -1)), -1).flatten(0, 1)
        return table

    def _logits(self, number: int, features: Tensor, images: Tensor, before: list[Tensor]) -> Tensor:
        if number == 0:
            logits: Tensor = self.logits(features)
        else:
            logits = self.further[number - 1](images, torch.cat(before, -1))
        return self.spin_beta * logits

    def _relaxed(
        self, number: int, logits: Tensor, relaxation: str, sharpness: float, chain_offset: int | Tensor,
        seed: int | Tensor,
    ) -> Tensor:  # fmt: skip
        z, _ = gx.graph_gibbs_relaxed(
            torch.zeros_like(logits),
            logits,
            logits.new_empty(0),
            self.graphs[number],
            num_sweeps=0,
            num_relaxed_sweeps=1,
            relaxation=relaxation,
            sharpness=sharpness,
            slope_gradient=self.slope_gradient,
            chain_offset=chain_offset,
            sweep_offset=number,  # so that each group has random words of its own
            seed=seed,
        )
        return z


def _drawn(seed: int | Tensor | None) -> int | Tensor:
    """The seed, drawn from the default generator if there is none: all groups share it."""
    return int(torch.randint(-(2**63), 2**63 - 1, ())) if seed is None else seed


def all_bits(num_units: int) -> Tensor:
    """All states of n bits, [2^n, n]; the last bit changes fastest."""
    return torch.cartesian_prod(*[torch.tensor((0.0, 1.0))] * num_units).view(-1, num_units)


def log_bernoulli(logits: Tensor, bits: Tensor) -> Tensor:
    """log p(bits) [...] of independent Bernoulli bits, for logits [..., n] and bits that broadcast to them."""
    # Unlike binary_cross_entropy_with_logits this broadcasts.
    return (logits * bits - F.softplus(logits)).sum(-1)


def negative_entropy(logits: Tensor) -> Tensor:
    """sum_i E_q[log q(z_i)] of a factorial Bernoulli, [..., n] -> [...]."""
    return (torch.sigmoid(logits) * logits - F.softplus(logits)).sum(-1)


def power_function_log_odds(logits: Tensor, noise: Tensor, exponent: float) -> Tensor:
    """log(zeta / (1 - zeta)) of the mixture of power functions, of the shape of logits.

    zeta solves ``(1 - q) zeta^lambda + q (1 - (1 - zeta)^lambda) = u`` (Vahdat et al. 2018, section 3). Both zeta and
    1 - zeta may be as small as 1e-200, so the log odds are returned.

    Args:
        logits: Logits of q; gradient flows into them.
        noise: u in (0, 1).
        exponent: lambda in (0, 1].
    """
    z0, z1 = torch.sigmoid(-logits.double()), torch.sigmoid(logits.double())
    u, half = noise.double(), 2.0**-exponent
    # Exchanging 0 and 1 turns zeta into 1 - zeta, so only zeta <= 1/2 is solved for.
    is_low = u <= z0 * half + z1 * (1 - half)
    near, far, target = torch.where(is_low, z0, z1), torch.where(is_low, z1, z0), torch.where(is_low, u, 1 - u)

    def excess(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """F - u at zeta = v^(1 / lambda), its derivative in v, and log zeta."""
        log_zeta = v.clamp_min(1e-300).log() / exponent
        log_rest = torch.log1p(-log_zeta.exp())
        value = near * v - far * torch.expm1(exponent * log_rest) - target
        return value, near + far * torch.exp((1 - exponent) * (log_zeta - log_rest)), log_zeta

    with torch.no_grad():
        # F is convex in v and not below u here, so Newton's steps fall to the root without passing it.
        v = torch.minimum(target / near, torch.full_like(near, half))
        for _ in range(NEWTON_STEPS):
            value, slope, _ = excess(v)
            v = v - value / slope
    # One further step has the derivative of the implicit function.
    value, slope, _ = excess(v)
    *_, log_zeta = excess(v - value / slope.detach())
    log_odds = log_zeta - torch.log1p(-log_zeta.exp())
    return torch.where(is_low, log_odds, -log_odds).to(logits.dtype)


def power_function_divergence(sample: DirectedSample, prior: gx.nn.BoltzmannPrior, exponent: float) -> Tensor:
    """log q(zeta | x) - log p(zeta) - log Z at a sample, [...]: an upper bound of it, by mean field.

    ``p(zeta) = sum_z p(z) prod_i r(zeta_i | z_i)`` is the partition function of the prior with the biases ``bias_i +
    log r(zeta_i | 1) - log r(zeta_i | 0)`` over that of the prior (Vahdat et al. 2018, section 4). Mean field bounds
    the former from below. Its solution is held fixed in the gradient, because the bound's derivative in it is almost 0.
    """
    assert sample.log_odds is not None
    log_ratio = (1 - exponent) * sample.log_odds  # log r(zeta | 1) - log r(zeta | 0)
    log_q = (F.softplus(sample.logits + log_ratio) - F.softplus(sample.logits)).sum(-1)
    with torch.no_grad():
        to_left, to_right = log_ratio.split((len(prior.left_bias), len(prior.right_bias)), -1)
        left = torch.sigmoid(to_left)
        for _ in range(MEAN_FIELD_STEPS):
            right_field = left @ prior.weight + prior.right_bias + to_right
            left_field = torch.sigmoid(right_field) @ prior.weight.mT + prior.left_bias + to_left
            left = torch.sigmoid(left_field)
        field = torch.cat((left_field, right_field), -1)
    mean = torch.sigmoid(field)
    return log_q + prior.energy(mean) - (mean * log_ratio).sum(-1) + negative_entropy(field)
