# SPDX-License-Identifier: Apache-2.0
"""Block Gibbs sampling of Boltzmann machines over bits, reproducible to the bit, and differentiable when relaxed."""

import os

import torch

from gibbs_ext import diagnostics, distributed, interop, nn, pictures
from gibbs_ext.chains import PersistentChains, pack_bits, unpack_bits
from gibbs_ext.functional import (
    bipartite_ais,
    bipartite_gibbs,
    bipartite_gibbs_relaxed,
    graph_ais,
    graph_fields,
    graph_gibbs,
    graph_gibbs_relaxed,
    graph_metropolis,
)
from gibbs_ext.graphs import ChimeraGraph, ColoredGraph
from gibbs_ext.ising import boltzmann_to_ising, ising_to_boltzmann
from gibbs_ext.ladders import LadderWarning, TemperingLogPartition, tempering_log_partition
from gibbs_ext.likelihood import Centering, negative_log_likelihood_surrogate
from gibbs_ext.log_partition.annealing import AISResult, EffectiveSampleSizeWarning, annealed_importance_sampling
from gibbs_ext.log_partition.bracket import BracketResult, BracketWarning, bracket_log_partition
from gibbs_ext.log_partition.exact import Marginals, exact_log_partition, exact_marginals, exact_samples
from gibbs_ext.log_partition.population import (
    PopulationCollapseWarning,
    PopulationResult,
    adaptive_betas,
    population_annealing,
)
from gibbs_ext.models import BipartiteBoltzmann, Conditional, GraphBoltzmann, coupling_resolution
from gibbs_ext.moments import Moments, sample_moments
from gibbs_ext.ops import CouplingResolutionWarning, build_info, synchronize
from gibbs_ext.perfect import perfect_samples
from gibbs_ext.tempering import TemperingResult, TemperingWarning, parallel_tempering, tune_ladder
from gibbs_ext.tracking import LogPartitionTracker

__all__ = [
    "AISResult",
    "BipartiteBoltzmann",
    "BracketResult",
    "BracketWarning",
    "Centering",
    "ChimeraGraph",
    "ColoredGraph",
    "Conditional",
    "CouplingResolutionWarning",
    "EffectiveSampleSizeWarning",
    "GraphBoltzmann",
    "LadderWarning",
    "LogPartitionTracker",
    "Marginals",
    "Moments",
    "PersistentChains",
    "PopulationCollapseWarning",
    "PopulationResult",
    "TemperingLogPartition",
    "TemperingResult",
    "TemperingWarning",
    "adaptive_betas",
    "annealed_importance_sampling",
    "bipartite_ais",
    "bipartite_gibbs",
    "bipartite_gibbs_relaxed",
    "boltzmann_to_ising",
    "bracket_log_partition",
    "build_info",
    "coupling_resolution",
    "diagnostics",
    "distributed",
    "exact_log_partition",
    "exact_marginals",
    "exact_samples",
    "graph_ais",
    "graph_fields",
    "graph_gibbs",
    "graph_gibbs_relaxed",
    "graph_metropolis",
    "interop",
    "ising_to_boltzmann",
    "negative_log_likelihood_surrogate",
    "nn",
    "pack_bits",
    "parallel_tempering",
    "perfect_samples",
    "pictures",
    "population_annealing",
    "sample_moments",
    "synchronize",
    "tempering_log_partition",
    "tune_ladder",
    "unpack_bits",
]


def _use_one_thread() -> None:
    """Keeps a forked process from hanging: it cannot start threads of GNU OpenMP if its parent has used some."""
    torch.set_num_threads(1)


os.register_at_fork(after_in_child=_use_one_thread)
