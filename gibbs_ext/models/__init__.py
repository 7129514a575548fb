# SPDX-License-Identifier: Apache-2.0
"""Boltzmann machines as torch.distributions."""

from gibbs_ext.models.base import Boltzmann, Conditional, coupling_resolution
from gibbs_ext.models.bipartite import BipartiteBoltzmann
from gibbs_ext.models.graph import GraphBoltzmann

__all__ = ["BipartiteBoltzmann", "Boltzmann", "Conditional", "GraphBoltzmann", "coupling_resolution"]
