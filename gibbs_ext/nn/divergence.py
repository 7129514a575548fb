# SPDX-License-Identifier: Apache-2.0
"""The divergence between a posterior and a prior, by a sample of the posterior."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gibbs_ext.checks import reported_as
from gibbs_ext.models import Boltzmann
from gibbs_ext.nn.posterior import BoltzmannSample
from gibbs_ext.nn.prior import BoltzmannPrior


def kl_divergence(
    sample: BoltzmannSample,
    prior: BoltzmannPrior | Boltzmann,
    *,
    log_partition_gradient: bool = True,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """An estimate of ``KL(q || p)`` to train with: its gradient is complete, its value lacks both log Z.

    The value is ``E_p(z) - E_q(z)`` at ``z = sample.z_mean``, where E_p and E_q are energies. That estimates
    ``E_q[log q - log p] + log Z_q - log Z_p``, the first term of which is the divergence. So values for different
    parameters cannot be compared. The units that were updated last are integrated out exactly: they are independent
    given the rest, and an energy is linear in each unit.

    The gradient estimates that of ``KL(q || p)`` itself:

    * With respect to the posterior's parameters it flows through z alone. The parameters inside log q are detached,
      because the score ``d log q(z)`` has mean zero under q (Vahdat, Andriyash, Macready 2020, arXiv 1901.03440;
      Roeder, Wu, Duvenaud 2017, arXiv 1703.09194). Its bias is that of the relaxed sample, and it is smaller when
      couplings are weak and when the sample has more relaxed sweeps.
    * With respect to the prior's parameters it is ``d E_p(z) + d log Z_p``. The second term is estimated by the prior's
      chains as in :meth:`BoltzmannPrior.log_partition_surrogate`, and every element has it: the sum and the mean over
      data points have the right gradient, with any weight. Do not add the surrogate to the loss again.

    Args:
        sample: A sample of a :class:`BoltzmannPosterior` of N units for B data points, bipartite or on a graph.
        prior: A prior of N units, bipartite or on a graph, of either kind of posterior. Unit i of the prior is unit i
            of the posterior, left before right. A distribution has no chains; its parameters must neither require grad
            nor have tangents, unless ``log_partition_gradient`` is False.
        log_partition_gradient: Whether the gradient has the term ``d log Z_p``. Without it the prior's gradient is
            wrong and its energies fall without end, unless the loss adds the term, as in ``kl_weight *
            divergence.mean() + kl_weight * prior.log_partition_surrogate(part=part)``.
        generator: Supplies the seed of the prior's chains.
        seed: A 64-bit integer or a 0-dim int64 tensor, instead of a generator.

    Returns:
        [B], or [chains_per_point, B] if there are several chains, of the dtype of energies. Mutates the prior's
        ``chains``, which its sampler advances, if ``log_partition_gradient`` is True, gradients are enabled and
        the prior's parameters require grad. Otherwise the prior is left as it is.

    Raises:
        TypeError, ValueError: An argument has a wrong type, or the numbers of units differ; the message begins with
            ``kl_divergence:``.
    """
    name = "kl_divergence"
    if not isinstance(sample, BoltzmannSample):
        raise TypeError(f"{name}: sample must be a BoltzmannSample or a GraphSample, got {type(sample).__name__}")
    if not isinstance(prior, (BoltzmannPrior, Boltzmann)):
        wanted = "prior must be a BoltzmannPrior, a BipartiteBoltzmann or a GraphBoltzmann"
        raise TypeError(f"{name}: {wanted}, got {type(prior).__name__}")
    model = prior.distribution() if isinstance(prior, BoltzmannPrior) else prior
    if model.num_units != sample.model.num_units:
        raise ValueError(f"{name}: prior must have {sample.model.num_units} units, as sample, got {model.num_units}")
    parameters = model._parameters
    learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
    learns |= any(forward_ad.unpack_dual(parameter).tangent is not None for parameter in parameters)
    if log_partition_gradient and learns and not isinstance(prior, BoltzmannPrior):
        raise ValueError(
            f"{name}: prior must be a BoltzmannPrior if its parameters are differentiated, got {type(prior).__name__}, "
            "which has no chains to estimate d log Z from; give prior.detach(), or log_partition_gradient=False and "
            "add log Z to the loss"
        )
    z = sample.z_mean
    divergence = model.energy(z) - sample.model.detach().energy(z)
    if log_partition_gradient and learns and isinstance(prior, BoltzmannPrior):
        with reported_as(name):
            surrogate = prior.log_partition_surrogate(generator=generator, seed=seed)
        divergence = divergence + (surrogate - surrogate.detach())
    return divergence
