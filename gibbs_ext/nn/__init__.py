# SPDX-License-Identifier: Apache-2.0
"""Boltzmann machines as modules: the posterior and the prior of a discrete VAE."""

from gibbs_ext.nn.divergence import kl_divergence
from gibbs_ext.nn.posterior import BoltzmannPosterior, BoltzmannSample, GraphSample
from gibbs_ext.nn.prior import BoltzmannPrior

__all__ = ["BoltzmannPosterior", "BoltzmannPrior", "BoltzmannSample", "GraphSample", "kl_divergence"]
