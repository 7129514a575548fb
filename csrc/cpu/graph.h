// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/fixed_point.h"
#include "core/graph_view.h"
#include "core/tempering.h"
#include "cpu/batch.h"
#include "cpu/threads.h"

// Runs the kernels of coloured graphs over a batch of chains.
namespace gibbs {

// Routes of binary sweeps. Tests and benchmarks choose one, which is then taken wherever it can be:
//   sums    16 chains side by side, each unit's neighbours summed up; serves every call
//   tables  64 chains side by side, probabilities looked up in tables
//   units   one chain at a time, 16 units of a colour side by side
//   coarse, coarse units
//           the same as sums and units with fields of 16 bits, for 64 chains or 32 units at a time, and with AVX-512 only
enum class GraphRoute { kAuto, kSums, kTables, kUnits, kCoarse, kCoarseUnits };
inline constexpr const char* kGraphRouteNames[] = {"auto", "sums", "tables", "units", "coarse", "coarse units"};
GraphRoute graph_route();
// False if the name is not in kGraphRouteNames.
bool set_graph_route(const char* name);

struct GraphCall : SweepCall {
  GraphView graph;
  Operand bias, coupling;
  Operand base_bias;  // annealed

  // Binary sweeps: state bits, [linear number, state_words(num_nodes)].
  uint32_t* bits = nullptr;
  const uint32_t* clamp = nullptr;
  double* log_weights = nullptr;  // [linear number]; not null: annealed
  bool metropolis = false;        // sweeps by Metropolis's rule instead of Gibbs's, always in groups of 16; not annealed
  GraphRoute route = GraphRoute::kAuto;
  Pairing pairing = {};                  // cluster moves after the binary sweeps of a round
  int64_t most_kept = int64_t{1} << 26;  // numbers of models that are kept from round to round; tests set it

  // Relaxed sweeps: [linear number, num_nodes] of the parameters' dtype.
  void *state = nullptr, *relaxed = nullptr, *mean = nullptr;
  void* fields = nullptr;  // [num_relaxed_sweeps, linear number, num_nodes]
};

// Runs num_sweeps binary sweeps, then num_relaxed_sweeps relaxed ones from the state that they leave, which is written to `state`;
// if num_sweeps is 0, from `state` as given. *rounding: of the model whose error is largest, 0 without binary sweeps.
Outcome run_graph(const GraphCall&, const Runtime&, Rounding* rounding, const AfterRound& = nullptr);

struct GraphBackwardCall {
  GraphCall forward;                     // the fields that name the problem, `state` and `fields`; no bias
  const void *grad_relaxed, *grad_mean;  // [linear number, num_nodes]
  void *grad_state, *grad_bias;          // [linear number, num_nodes]
  void* grad_coupling;                   // [model, num_edges]
};
Outcome run_graph_backward(const GraphBackwardCall&, const Runtime&);

// Writes the resolution 2^-k of each model of a coupling.
Outcome run_graph_coupling_resolution(const GraphView&, const Batch&, bool is_double, const Operand& coupling, double* out);

}  // namespace gibbs
