// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/launch.cuh"
#include "cuda/views.cuh"

namespace gibbs {

constexpr int kFieldsThreads = 128;

// Only the batch and the report of `sweep` are used.
struct GraphFieldsParams {
  SweepView sweep;
  const int32_t* layout;  // as in cuda/graph.h
  int64_t num_nodes, num_edges, num_colors;
  bool is_double;
  ParameterView state, bias, coupling;
  void* out;  // [linear number, N]
};
void launch_graph_fields(const GraphFieldsParams&, Stream);

struct GraphEdgeSumsParams {
  SweepView sweep;
  const int32_t* layout;
  int64_t num_nodes, num_edges, num_colors;
  bool is_double;
  ParameterView first, second;
  void* out;  // [model, E]
};
void launch_graph_edge_sums(const GraphEdgeSumsParams&, Stream);

}  // namespace gibbs
