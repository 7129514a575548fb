# SPDX-License-Identifier: Apache-2.0
"""log Z of Boltzmann machines: estimated by annealing, or exact by enumeration or elimination."""

from gibbs_ext.log_partition.annealing import (
    AISResult,
    EffectiveSampleSizeWarning,
    annealed_importance_sampling,
)
from gibbs_ext.log_partition.exact import Marginals, exact_log_partition, exact_marginals, exact_samples

__all__ = [
    "AISResult",
    "EffectiveSampleSizeWarning",
    "Marginals",
    "annealed_importance_sampling",
    "exact_log_partition",
    "exact_marginals",
    "exact_samples",
]
