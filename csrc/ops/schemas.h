// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <iterator>

// Names and schemas of all ops. The docstrings of gibbs_ext/ops.py and gibbs_ext/functional.py, and csrc/README.md, say what each computes.
namespace gibbs {

enum OpId : uint32_t {
  kBipartiteGibbs,
  kBipartiteGibbsRelaxed,
  kBipartiteGibbsRelaxedBackward,
  kBipartiteAis,
  kBipartiteTempering,
  kBipartiteMoments,
  kCouplingResolution,
  kGraphGibbs,
  kGraphMetropolis,
  kGraphGibbsRelaxed,
  kGraphGibbsRelaxedBackward,
  kGraphAis,
  kGraphTempering,
  kGraphMoments,
  kGraphCouplingResolution,
  kGraphFields,
  kGraphEdgeSums,
  kNumOps,
};

struct OpSchema {
  const char *name, *signature;
};
// Indexed by OpId.
// clang-format off
constexpr OpSchema kOps[] = {
    {"bipartite_gibbs",
     "(Tensor left, Tensor left_bias, Tensor right_bias, Tensor weight, Tensor beta, Tensor seed, Tensor? right, "
     "Tensor? clamp_left, Tensor? clamp_right, Tensor? chains, int chain_offset, int sweep_offset, int num_sweeps)"
     " -> (Tensor left, Tensor right)"},
    {"bipartite_gibbs_relaxed",
     "(Tensor left, Tensor left_bias, Tensor right_bias, Tensor weight, Tensor beta, Tensor seed, Tensor? chains, "
     "int chain_offset, int sweep_offset, int num_sweeps, int num_relaxed_sweeps, int relaxation, float sharpness,"
     " bool slope_gradient) -> (Tensor left, Tensor right, Tensor left_mean, Tensor state, Tensor fields)"},
    {"bipartite_gibbs_relaxed_backward",
     "(Tensor grad_left, Tensor grad_right, Tensor grad_left_mean, Tensor state, Tensor fields, Tensor weight, "
     "Tensor beta, Tensor seed, Tensor? chains, int chain_offset, int sweep_offset, int num_sweeps, int "
     "relaxation, float sharpness, bool slope_gradient) -> (Tensor grad_state, Tensor grad_left_bias, Tensor "
     "grad_right_bias, Tensor grad_weight)"},
    {"bipartite_ais",
     "(Tensor left, Tensor left_bias, Tensor right_bias, Tensor weight, Tensor base_left_bias, Tensor "
     "base_right_bias, Tensor betas, Tensor seed, Tensor? chains, int chain_offset, int sweep_offset) -> (Tensor "
     "left, Tensor right, Tensor log_weights)"},
    {"bipartite_tempering",
     "(Tensor left, Tensor left_bias, Tensor right_bias, Tensor weight, Tensor beta, Tensor seed, Tensor chains, int "
     "sweep_offset, int sweeps_per_swap, int num_swaps) -> (Tensor left, Tensor right, Tensor energies, Tensor chains_at)"},
    {"bipartite_moments",
     "(Tensor left, Tensor left_bias, Tensor right_bias, Tensor weight, Tensor beta, Tensor seed, Tensor? right, "
     "Tensor? clamp_left, Tensor? clamp_right, Tensor? chains, int chain_offset, int sweep_offset, int num_sweeps, int "
     "sweeps_per_read, int counted, bool best) -> (Tensor left, Tensor right, Tensor left_counts, Tensor right_counts, "
     "Tensor pair_counts, Tensor best_left, Tensor best_right, Tensor best_energy)"},
    {"coupling_resolution",
     "(Tensor weight) -> Tensor"},
    {"graph_gibbs",
     "(Tensor state, Tensor bias, Tensor coupling, Tensor layout, Tensor beta, Tensor seed, Tensor? clamp, Tensor?"
     " chains, int chain_offset, int sweep_offset, int num_sweeps) -> Tensor"},
    {"graph_metropolis",
     "(Tensor state, Tensor bias, Tensor coupling, Tensor layout, Tensor beta, Tensor seed, Tensor? clamp, Tensor?"
     " chains, int chain_offset, int sweep_offset, int num_sweeps) -> Tensor"},
    {"graph_gibbs_relaxed",
     "(Tensor state, Tensor bias, Tensor coupling, Tensor layout, Tensor beta, Tensor seed, Tensor? chains, int "
     "chain_offset, int sweep_offset, int num_sweeps, int num_relaxed_sweeps, int relaxation, float sharpness, "
     "bool slope_gradient) -> (Tensor relaxed, Tensor mean, Tensor start, Tensor fields)"},
    {"graph_gibbs_relaxed_backward",
     "(Tensor grad_relaxed, Tensor grad_mean, Tensor state, Tensor fields, Tensor coupling, Tensor layout, Tensor "
     "beta, Tensor seed, Tensor? chains, int chain_offset, int sweep_offset, int num_sweeps, int relaxation, float"
     " sharpness, bool slope_gradient) -> (Tensor grad_state, Tensor grad_bias, Tensor grad_coupling)"},
    {"graph_ais",
     "(Tensor state, Tensor bias, Tensor coupling, Tensor layout, Tensor base_bias, Tensor betas, Tensor seed, "
     "Tensor? chains, int chain_offset, int sweep_offset) -> (Tensor state_out, Tensor log_weights)"},
    {"graph_tempering",
     "(Tensor state, Tensor bias, Tensor coupling, Tensor layout, Tensor beta, Tensor seed, Tensor chains, int "
     "sweep_offset, int sweeps_per_swap, int num_swaps, bool cluster_moves) -> (Tensor state_out, Tensor energies, Tensor "
     "chains_at)"},
    {"graph_moments",
     "(Tensor state, Tensor bias, Tensor coupling, Tensor layout, Tensor beta, Tensor seed, Tensor? clamp, Tensor? chains, int "
     "chain_offset, int sweep_offset, int num_sweeps, int sweeps_per_read, int counted, bool best, bool metropolis) -> (Tensor "
     "state_out, Tensor counts, Tensor pair_counts, Tensor best_state, Tensor best_energy)"},
    {"graph_coupling_resolution",
     "(Tensor coupling, Tensor layout) -> Tensor"},
    {"graph_fields",
     "(Tensor state, Tensor bias, Tensor coupling, Tensor layout) -> Tensor"},
    {"graph_edge_sums",
     "(Tensor first, Tensor second, Tensor coupling, Tensor layout) -> Tensor"},
};
// clang-format on
static_assert(std::size(kOps) == kNumOps);

}  // namespace gibbs
