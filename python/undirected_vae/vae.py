# SPDX-License-Identifier: Apache-2.0
"""The VAE: encoder, posterior (undirected or directed), Boltzmann prior, decoder; its objective and its proposals.

Posterior and prior are each bipartite or on a Chimera graph. The latent bits are one vector z [N]: the left, then the
right units; or the units of the Chimera graph.

In structured prediction the encoder sees an image's upper half x, the decoder gives the lower half y, and there is no
prior: the "posterior" is the model p(z | x) of the latents itself.

The method is that of Vahdat et al. 2020, "Undirected Graphical Models as Approximate Posteriors" (arXiv 1901.03440).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import gibbs_ext as gx

from .config import Config
from .directed import DirectedPosterior, DirectedSample, log_bernoulli, negative_entropy, power_function_divergence
from .networks import Decoder, Encoder


class Terms(NamedTuple):
    """Results of one training step."""

    loss: Tensor  # [], whose gradient is that of the objective; its value lacks the log partition functions
    reconstruction: Tensor  # [B] log p(x | zeta), the mean over samples
    divergence: Tensor  # [B] E_q[log q - log p] + log Z_phi - log Z_theta, without log p in structured prediction


class Proposal(NamedTuple):
    """Binary samples of q(z | x), with the weights that the importance-weighted bound needs."""

    z: Tensor  # [K, B, N]
    # The mean over k of exp(log_weight) * f(z) estimates sum_z f(z), without bias. In structured prediction it
    # estimates sum_z q(z | x) f(z), for an undirected q with normalised weights, whose bias falls with K.
    log_weight: Tensor  # [K, B]
    # log q(z | x) [K, B], of an undirected posterior with the AIS estimate of log Z_phi(x); 0 in structured prediction
    log_q: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """[K, B] logarithms of the weights of AIS, which are scaled to have mean 1; 0 for exact samples."""
        return self.log_weight + self.log_q

    def mean(self, values: Tensor) -> Tensor:
        """An estimate [B] of E_q of values [K, B] that belong to the samples."""
        return (self.log_ratio.exp() * values).mean(0)


def chimera(config: Config) -> gx.ColoredGraph:
    """The Chimera graph. If the other machine is bipartite, units of colour 1 come first, in place of its left units.

    In both machines the first half then has no couplings inside, and a sweep updates it last.
    """
    graph = gx.ChimeraGraph(config.chimera_rows, config.chimera_cols, config.chimera_shore)
    if not config.has_bipartite:
        return graph
    order = graph.colors.argsort(descending=True, stable=True)
    return gx.ColoredGraph(graph.num_nodes, order.argsort()[graph.edges], graph.colors[order])


def anneal(
    model: gx.BipartiteBoltzmann | gx.GraphBoltzmann, num_samples: int, num_betas: int, seed: int | None = None
) -> Proposal:
    """Samples of B posteriors by AIS, which starts from the factorial model with the fields of their spins."""
    result = gx.annealed_importance_sampling(model, num_samples, num_betas, seed=seed)
    z = result.samples
    energy, log_partition = model.energy(z), result.log_partition.to(z)
    # The weights are scaled so that their mean is Z_phi.
    scaled = torch.log_softmax(result.log_weights, 0).to(z) + math.log(num_samples) + log_partition
    return Proposal(z, scaled + energy, -energy - log_partition)


class VAE(nn.Module):
    @property
    def device(self) -> torch.device:
        return self.encoder.mean.device

    def __init__(self, config: Config, mean: Tensor, dataset_size: int) -> None:
        super().__init__()
        self.is_structured = config.task == "structured"
        self.num_samples = config.train_samples
        # Images are rows of pixels, so the first half of the pixels is the upper half of the image.
        self.num_seen = len(mean) // 2 if self.is_structured else len(mean)
        seen, predicted = (mean[: self.num_seen], mean[self.num_seen :]) if self.is_structured else (mean, mean)
        self.encoder = Encoder(seen, config.encoder, config.dropout)
        features = config.encoder[-1] if config.encoder else len(seen)
        shared: dict[str, Any] = {
            "spin_beta": config.spin_beta,
            "relaxation": config.relaxation,
            "sharpness": config.sharpness,
            "slope_gradient": config.slope_gradient,
        }
        self.posterior: DirectedPosterior | gx.nn.BoltzmannPosterior
        units: dict[str, dict[str, Any]] = {"bipartite": {"num_left": config.left, "num_right": config.right}}
        if config.has_chimera:
            units["chimera"] = {"graph": chimera(config)}
        if config.posterior == "directed":
            self.posterior = DirectedPosterior(
                features,
                config.num_latents,
                seen,
                groups=config.groups,
                widths=config.encoder,
                dropout=config.dropout,
                **shared,
            )
        else:
            self.posterior = gx.nn.BoltzmannPosterior(
                features,
                **units["chimera" if config.posterior == "chimera" else "bipartite"],
                coupling=config.coupling,
                rank=config.rank,
                coupling_init=config.coupling_init,
                num_sweeps=config.posterior_sweeps,
                num_relaxed_sweeps=config.relaxed_sweeps,
                dataset_size=dataset_size,
                chains_per_point=config.train_samples,
                **shared,
            )
        self.prior: gx.nn.BoltzmannPrior | None = None
        if not self.is_structured:
            self.prior = gx.nn.BoltzmannPrior(
                **units[config.prior], num_chains=config.prior_chains, num_sweeps=config.prior_sweeps
            )
        self.decoder = Decoder(config.num_latents, predicted, config.decoder, config.dropout)

    def seen(self, images: Tensor) -> Tensor:
        """The pixels that the encoder sees: all of them, or the upper half in structured prediction."""
        return images[..., : self.num_seen]

    def predicted(self, images: Tensor) -> Tensor:
        """The pixels that the decoder gives: all of them, or the lower half in structured prediction."""
        return images[..., self.num_seen :] if self.is_structured else images

    def forward(
        self,
        images: Tensor,
        index: Tensor,
        weight: float | Tensor = 1.0,
        *,
        seeds: Tensor | None = None,
        first: int = 0,
        batch_size: int | None = None,
        part: slice | None = None,
    ) -> Terms:
        """The objective of one training step.

        For one sample it is the ELBO, ``log p(x | zeta) - weight * KL``; for k samples the importance-weighted bound,
        ``log mean_k exp(log p(x | zeta_k) - weight * log (q / p)(zeta_k))``. In structured prediction it is
        ``log mean_k p(y | zeta_k) + weight * H``, where H is the entropy of p(z | x).

        Args:
            images: [B, pixels] binary images.
            index: [B] int64 numbers of the images in the training set.
            weight: Weight of the KL term, or of the entropy in structured prediction.
            seeds: [2] int64, seeds of the posterior's and of the prior's sampler; drawn from the default generator if
                None.
            first: Place of these images in a batch that several processes share. Their losses add up to that of the
                batch.
            batch_size: Size of that batch; B if None.
            part: This process's part of the prior's chains; all chains if None.
        """
        posterior_seed, prior_seed = (None, None) if seeds is None else seeds.unbind()
        whole = batch_size or len(images)
        seen = self.seen(images)
        features = self.encoder(seen)
        chains: int | Tensor = first
        if self.num_samples > 1:  # sample k of the batch's image b has the number k * batch_size + b
            numbers = torch.arange(self.num_samples * whole, device=images.device).view(self.num_samples, whole)
            chains = numbers[:, first : first + len(images)]
        sample: DirectedSample | gx.nn.BoltzmannSample
        if isinstance(self.posterior, DirectedPosterior):
            several = self.num_samples if self.num_samples > 1 else None
            sample = self.posterior(features, seen, several, chain_offset=chains, seed=posterior_seed)
        else:
            sample = self.posterior(features, index, chain_offset=chains, seed=posterior_seed)
        reconstruction = log_bernoulli(self.decoder(sample.z), self.predicted(images))
        divergence = self._divergence(sample)
        samples = reconstruction.view(-1, len(images))
        if self.is_structured:
            loss = (weight * divergence.view_as(samples).mean(0) - log_mean_exp(samples)).sum() / whole
        else:
            objective = (reconstruction - weight * divergence).view_as(samples)
            if self.num_samples > 1 and isinstance(self.posterior, gx.nn.BoltzmannPosterior):
                _reparameterise_twice(sample.z, objective, weight)
            assert self.prior is not None
            num_chains = len(self.prior.chains.bits)
            share = 1.0 if part is None else (part.stop - part.start) / num_chains
            log_partition = share * self.prior.log_partition_surrogate(part=part, seed=prior_seed)
            loss = weight * log_partition - log_mean_exp(objective).sum() / whole
        return Terms(loss, samples.detach().mean(0), divergence.detach().view_as(samples).mean(0))

    def _divergence(self, sample: DirectedSample | gx.nn.BoltzmannSample) -> Tensor:
        """log q - log p at each sample without log Z, [B] or [K, B]; what can be integrated out is, if there is one.

        The parameters of an undirected q are detached in log q (see gx.nn.kl_divergence); those of a directed q are
        not. The gradient of the prior's log Z is added from its chains in ``forward``.
        """
        prior, is_mean = self.prior, self.num_samples == 1
        if isinstance(sample, gx.nn.BoltzmannSample):
            if is_mean and prior:
                return gx.nn.kl_divergence(sample, prior, log_partition_gradient=False)
            z = sample.z_mean if prior is None else sample.z
            log_q = -sample.model.detach().energy(z)
        elif prior and sample.log_odds is not None:
            return power_function_divergence(sample, prior, 1 / self.posterior.sharpness)
        else:
            # The prior's energy is linear in each unit, so its mean over the last group is its value at their mean.
            z = sample.z_mean if is_mean else sample.z
            is_integrated = is_mean or prior is None
            log_q = negative_entropy(sample.logits) if is_integrated else log_bernoulli(sample.logits, z)
        return log_q if prior is None else log_q + prior.energy(z)

    @torch.no_grad()
    def propose(self, images: Tensor, num_samples: int, num_betas: int, seed: int | None = None) -> Proposal:
        """Binary samples of the posterior: exact samples if it is directed, samples of AIS if it is undirected."""
        seen = self.seen(images)
        features = self.encoder(seen)
        if isinstance(self.posterior, DirectedPosterior):
            z, log_q = self.posterior.sample(features, seen, num_samples, seed)
            log_weight = -log_q
        else:
            z, log_weight, log_q = anneal(self.posterior.distribution(features), num_samples, num_betas, seed)
        if self.is_structured:
            return Proposal(z, log_weight + log_q, torch.zeros_like(log_q))
        return Proposal(z, log_weight, log_q)

    def prior_log_partition(
        self, num_chains: int, num_betas: int, seed: int, anneal: Any = gx.annealed_importance_sampling
    ) -> tuple[float, float]:
        """log Z_theta by AIS and its standard error; 0 and 0 without a prior.

        `anneal` is gx.distributed.annealed_importance_sampling if all processes are to share the work.
        """
        if self.prior is None:
            return 0.0, 0.0
        result = anneal(self.prior.distribution(), num_chains, num_betas, seed=seed)
        return float(result.log_partition), float(result.standard_error)

    @torch.no_grad()
    def log_joint(self, images: Tensor, z: Tensor) -> Tensor:
        """log p(x, z) + log Z_theta, [K, B]; log p(y | z) in structured prediction."""
        predicted = self.predicted(images)
        # On the CPU a part's activations stay in a core's cache.
        parts = z.split(max(1, 1000 // len(images)) if z.device.type == "cpu" else len(z))
        reconstruction = torch.cat([log_bernoulli(self.decoder(part), predicted) for part in parts])
        return reconstruction if self.prior is None else reconstruction - self.prior.energy(z)

    @torch.no_grad()
    def elbo(
        self, images: Tensor, log_partition: float, num_samples: int = 16, num_betas: int = 50, seed: int | None = None
    ) -> Tensor:
        """An estimate of each image's ELBO with binary samples, [B]; of E[log p(y | z)] in structured prediction."""
        proposal = self.propose(images, num_samples, num_betas, seed)
        log_joint = self.log_joint(images, proposal.z) - log_partition
        return proposal.mean(log_joint - proposal.log_q)


def log_mean_exp(values: Tensor) -> Tensor:
    """The log of the mean of exp over the first dim."""
    if len(values) == 1:  # a step of training with one sample is launches of a GPU, and these are saved
        return values[0]
    return torch.logsumexp(values, 0) - math.log(len(values))


def _reparameterise_twice(z: Tensor, objective: Tensor, weight: float | Tensor) -> None:
    """Makes the gradient that passes z [K, B, N] that of the bound for a log q of detached parameters.

    Such a log q leaves out the score of the importance weights w, which is sum_k w_k d log q(z_k), w_k normalised.
    Its mean is that of the path's gradient times (1 - w_k) (Tucker et al. 2019, arXiv 1810.04152), so that the path's
    gradient is multiplied by 1 - weight * (1 - w_k).
    """
    factor = 1 - weight * (1 - torch.softmax(objective.detach(), 0))
    z.register_hook(lambda gradient: gradient * factor.unsqueeze(-1))
