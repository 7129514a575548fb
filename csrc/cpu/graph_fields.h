// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/graph_view.h"
#include "cpu/batch.h"
#include "cpu/threads.h"

// Sums over a coloured graph's edges in floating point, in the layout's order: the parts of energies and their derivatives.
namespace gibbs {

struct GraphFieldsCall {
  GraphView graph;
  Batch batch;
  bool is_double;
  Operand state, bias, coupling;
  void* out;  // [linear number, num_nodes]
};
// out_i = bias_i + sum of coupling_e state_j over the edges e between i and j.
Outcome run_graph_fields(const GraphFieldsCall&, const Runtime&);

struct GraphEdgeSumsCall {
  GraphView graph;
  Batch batch;
  bool is_double;
  Operand first, second;
  void* out;  // [model, num_edges]
};
// out_e = sum of first_u second_v + first_v second_u, e = (u, v), over the chains of a model.
Outcome run_graph_edge_sums(const GraphEdgeSumsCall&, const Runtime&);

}  // namespace gibbs
