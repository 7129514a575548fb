# SPDX-License-Identifier: Apache-2.0
"""The VAE: encoder, posterior (undirected or factorial), Boltzmann prior, decoder; its objective and its proposals.

Posterior and prior are each bipartite or on a Chimera graph. The latent bits are one vector z [N]: the left, then the
right units; or the units of the Chimera graph.

The method is that of Vahdat et al. 2020, "Undirected Graphical Models as Approximate Posteriors" (arXiv 1901.03440).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gibbs_ext as gx

from .config import Config
from .directed import FactorialPosterior, negative_entropy
from .networks import Decoder, Encoder


class Terms(NamedTuple):
    """Results of one training step."""

    # Its gradient is that of -(log p(x|z) - kl_weight * KL); its value lacks the log partition functions.
    loss: Tensor  # []
    reconstruction: Tensor  # [B] log p(x | zeta)
    divergence: Tensor  # [B] E_q[log q - log p] + log Z_phi - log Z_theta (directed: log Z_phi = 0)


class Proposal(NamedTuple):
    """Binary samples of q(z | x), with the weights that the importance-weighted bound needs."""

    z: Tensor  # [K, B, N]
    log_weight: Tensor  # [K, B]; the mean over k of exp(log_weight) * f(z) is an unbiased estimate of sum_z f(z)
    log_q: Tensor  # [K, B] log q(z | x); of an undirected posterior with the AIS estimate of log Z_phi(x)


def chimera(config: Config) -> gx.ColoredGraph:
    """The Chimera graph. If the other machine is bipartite, units of colour 1 come first, in place of its left units.

    In both machines the first half then has no couplings inside, and a sweep updates it last.
    """
    graph = gx.ChimeraGraph(config.chimera_rows, config.chimera_cols, config.chimera_shore)
    if not config.has_bipartite:
        return graph
    order = graph.colors.argsort(descending=True, stable=True)
    return gx.ColoredGraph(graph.num_nodes, order.argsort()[graph.edges], graph.colors[order])


class VAE(nn.Module):
    @property
    def device(self) -> torch.device:
        return self.encoder.mean.device

    def __init__(self, config: Config, mean: Tensor, dataset_size: int) -> None:
        super().__init__()
        self.encoder = Encoder(mean, config.encoder, config.dropout)
        features = config.encoder[-1] if config.encoder else mean.shape[0]
        relaxation: dict[str, Any] = {
            "relaxation": config.relaxation,
            "sharpness": config.sharpness,
            "slope_gradient": config.slope_gradient,
        }
        self.posterior: FactorialPosterior | gx.nn.BoltzmannPosterior
        units: dict[str, dict[str, Any]] = {"bipartite": {"num_left": config.left, "num_right": config.right}}
        if config.has_chimera:
            units["chimera"] = {"graph": chimera(config)}
        if config.posterior == "directed":
            self.posterior = FactorialPosterior(features, config.num_latents, **relaxation)
        else:
            self.posterior = gx.nn.BoltzmannPosterior(
                features,
                **units["chimera" if config.posterior == "chimera" else "bipartite"],
                coupling=config.coupling,
                rank=config.rank,
                spin_beta=config.spin_beta,
                num_sweeps=config.posterior_sweeps,
                num_relaxed_sweeps=config.relaxed_sweeps,
                dataset_size=dataset_size,
                **relaxation,
            )
        self.prior = gx.nn.BoltzmannPrior(
            **units[config.prior], num_chains=config.prior_chains, num_sweeps=config.prior_sweeps
        )
        self.decoder = Decoder(config.num_latents, mean, config.decoder, config.dropout)

    def forward(
        self,
        images: Tensor,
        index: Tensor,
        kl_weight: float | Tensor = 1.0,
        *,
        seeds: Tensor | None = None,
        first: int = 0,
        batch_size: int | None = None,
        part: slice | None = None,
    ) -> Terms:
        """The objective of one training step.

        Args:
            images: [B, pixels] binary images.
            index: [B] int64 numbers of the images in the training set.
            kl_weight: Weight of the KL term.
            seeds: [2] int64, seeds of the posterior's and of the prior's sampler; drawn from the default generator if
                None.
            first: Place of these images in a batch that several processes share. Their losses add up to that of the
                batch.
            batch_size: Size of that batch; B if None.
            part: This process's part of the prior's chains; all chains if None.
        """
        posterior_seed, prior_seed = (None, None) if seeds is None else seeds.unbind()
        features = self.encoder(images)
        if isinstance(self.posterior, FactorialPosterior):
            sample = self.posterior(features, chain_offset=first, seed=posterior_seed)
            # The prior's energy is linear in each unit: its mean under a factorial posterior is its value at the means.
            divergence = negative_entropy(sample.logits) + self.prior.energy(torch.sigmoid(sample.logits))
        else:
            sample = self.posterior(features, index, chain_offset=first, seed=posterior_seed)
            # The gradient of the prior's log Z is added below, from this process's chains.
            divergence = gx.nn.kl_divergence(sample, self.prior, log_partition_gradient=False)
        reconstruction = log_bernoulli(self.decoder(sample.z), images)
        num_chains = len(self.prior.chains.bits)
        share = 1.0 if part is None else (part.stop - part.start) / num_chains
        log_partition = share * self.prior.log_partition_surrogate(part=part, seed=prior_seed)
        loss = (kl_weight * divergence - reconstruction).sum() / (batch_size or len(images)) + kl_weight * log_partition
        return Terms(loss, reconstruction.detach(), divergence.detach())

    @torch.no_grad()
    def propose(self, images: Tensor, num_samples: int, num_betas: int, seed: int | None = None) -> Proposal:
        """Binary samples of the posterior: exact samples if it is factorial, samples of AIS if it is undirected."""
        features = self.encoder(images)
        if isinstance(self.posterior, FactorialPosterior):
            logits = self.posterior.logits(features)
            z = self.posterior.sample(logits, num_samples, seed)
            log_q = log_bernoulli(logits, z)
            return Proposal(z, -log_q, log_q)
        model = self.posterior.distribution(features)
        # AIS starts from the factorial model with the fields of the spins that the encoder's outputs stand for.
        result = gx.annealed_importance_sampling(model, num_samples, num_betas, seed=seed)
        z = result.samples
        energy, log_partition = model.energy(z), result.log_partition.to(z)
        # The weights are scaled so that their mean is Z_phi.
        log_weight = torch.log_softmax(result.log_weights, 0).to(z) + math.log(num_samples) + log_partition
        return Proposal(z, log_weight + energy, -energy - log_partition)

    def prior_log_partition(
        self, num_chains: int, num_betas: int, seed: int, anneal: Any = gx.annealed_importance_sampling
    ) -> tuple[float, float]:
        """log Z_theta by AIS and its standard error.

        `anneal` is gx.distributed.annealed_importance_sampling if all processes are to share the work.
        """
        result = anneal(self.prior.distribution(), num_chains, num_betas, seed=seed)
        return float(result.log_partition), float(result.standard_error)

    @torch.no_grad()
    def log_joint(self, images: Tensor, z: Tensor) -> Tensor:
        """log p(x, z) + log Z_theta, [K, B]."""
        return log_bernoulli(self.decoder(z), images) - self.prior.energy(z)

    @torch.no_grad()
    def elbo(
        self, images: Tensor, log_partition: float, num_samples: int = 16, num_betas: int = 50, seed: int | None = None
    ) -> Tensor:
        """An estimate of each image's ELBO with binary samples, [B]."""
        proposal = self.propose(images, num_samples, num_betas, seed)
        log_joint = self.log_joint(images, proposal.z) - log_partition
        return (log_joint - proposal.log_q).mean(0)


def log_bernoulli(logits: Tensor, bits: Tensor) -> Tensor:
    """log p(bits) [...] of independent Bernoulli bits, for logits [..., n] and bits that broadcast to them."""
    # Unlike binary_cross_entropy_with_logits this broadcasts.
    return (logits * bits - F.softplus(logits)).sum(-1)
