# SPDX-License-Identifier: Apache-2.0
"""Block Gibbs sampling of Boltzmann machines over bits, reproducible to the bit, and differentiable when relaxed."""

from gibbs_ext import nn
from gibbs_ext.chains import PersistentChains, pack_bits, unpack_bits
from gibbs_ext.distributions import BipartiteBoltzmann, coupling_resolution
from gibbs_ext.estimators import (
    AISResult,
    annealed_importance_sampling,
    exact_log_partition,
    negative_log_likelihood_surrogate,
)
from gibbs_ext.functional import bipartite_ais, bipartite_gibbs, bipartite_gibbs_relaxed
from gibbs_ext.ops import CouplingResolutionWarning, build_info

__all__ = [
    "AISResult",
    "BipartiteBoltzmann",
    "CouplingResolutionWarning",
    "PersistentChains",
    "annealed_importance_sampling",
    "bipartite_ais",
    "bipartite_gibbs",
    "bipartite_gibbs_relaxed",
    "build_info",
    "coupling_resolution",
    "exact_log_partition",
    "negative_log_likelihood_surrogate",
    "nn",
    "pack_bits",
    "unpack_bits",
]
