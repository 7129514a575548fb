// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/driver.h"

// Runs the kernels of coloured graphs over a batch: which chains lie side by side in the vector lanes, and by which route they go.
namespace gibbs {

// How binary sweeps are made: as it is fastest, or, for tests and benchmarks, by blocks of 16 chains (which can do everything), by tables
// or one chain at a time wherever that can be done. Models of so few chains that they share a block always go by blocks.
enum class GraphRoute { kAuto, kBlocks, kTables, kChains };
GraphRoute graph_route();
// "auto", "blocks", "tables" or "chains"; false where the name is none of them.
bool set_graph_route(const char* name);

struct GraphCall : SweepCall {
  GraphView graph;
  Operand bias, coupling;
  Operand base_bias;  // annealed

  // Binary sweeps: state bits, [linear number, state_words(num_nodes)].
  uint32_t* bits = nullptr;
  const uint32_t* clamp = nullptr;
  double* log_weights = nullptr;  // [linear number]; not null: annealed
  bool metropolis = false;        // sweeps by Metropolis's rule instead of Gibbs's, always by blocks; not annealed
  GraphRoute route = GraphRoute::kAuto;

  // Relaxed sweeps: [linear number, num_nodes] of the parameters' dtype.
  void *state = nullptr, *relaxed = nullptr, *mean = nullptr;
  void* fields = nullptr;  // [num_relaxed_sweeps, linear number, num_nodes]
};

// Runs num_sweeps binary sweeps, then num_relaxed_sweeps relaxed ones from the state they left, which is written to `state` (from
// `state` as given if num_sweeps is 0). *rounding: of the model whose error is largest, 0 without binary sweeps.
Outcome run_graph(const GraphCall&, const Runtime&, Rounding* rounding);

struct GraphBackwardCall {
  GraphCall forward;                     // the fields that name the problem, `state` and `fields`; no bias
  const void *grad_relaxed, *grad_mean;  // [linear number, num_nodes]
  void *grad_state, *grad_bias;          // [linear number, num_nodes]
  void* grad_coupling;                   // [model, num_edges]
};
Outcome run_graph_backward(const GraphBackwardCall&, const Runtime&);

// 2^-k of each model of a coupling.
Outcome run_graph_coupling_resolution(const GraphView&, const Batch&, bool is_double, const Operand& coupling, double* out);

}  // namespace gibbs
