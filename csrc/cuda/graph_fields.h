// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/graph.h"

namespace gibbs {

constexpr int kFieldsThreads = 128;

// Only the batch and the report of `sweep` are used.
struct GraphFieldsParams : GraphModel {
  ParameterView state, bias;
  void* out;  // [linear number, N]
};
void launch_graph_fields(const GraphFieldsParams&, Stream);

struct GraphEdgeSumsParams : GraphModel {  // without couplings
  ParameterView first, second;
  void* out;  // [model, E]
};
void launch_graph_edge_sums(const GraphEdgeSumsParams&, Stream);

}  // namespace gibbs
