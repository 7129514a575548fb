// SPDX-License-Identifier: Apache-2.0
#pragma once

// Sums over a coloured graph's edges: fields of units, and their derivative by the couplings.
#include "cuda/graph_cta.cuh"
#include "cuda/graph_fields.h"

namespace gibbs {

#if defined(GIBBS_DEVICE)

// The unit at a position, and its half-edges.
struct GraphRow {
  bool is_sound = false;  // inside the graph
  int64_t node, begin, end;
  GIBBS_DEVICE GraphRow(const GraphModel& p, int64_t position) {
    if (!header_fits(p)) return;
    const GraphView g = graph_view(p.layout);
    node = g.order[position], begin = g.row_offsets[position], end = g.row_offsets[position + 1];
    is_sound = 0 <= node && node < p.num_nodes && 0 <= begin && begin <= end && end <= 2 * p.num_edges;
  }
};

// A thread owns one unit of one chain. Only the caches share anything: the couplings and the graph among all chains of a model, the state among
// neighbours. Traffic: 8 bytes of graph, a coupling and a state for each half-edge, mostly from L1.
// field_i = bias_i + sum_e coupling_e state_j.
template <class T>
__global__ void __launch_bounds__(kFieldsThreads, 1) graph_fields_kernel(const __grid_constant__ GraphFieldsParams p) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const BatchView& batch = p.sweep.batch;
  const int64_t row = at / p.num_nodes, position = at % p.num_nodes;
  if (row >= num_rows(batch)) return;
  const GraphRow unit(p, position);
  if (!unit.is_sound) return report_fault(p.sweep, Outcome::kBadLayout);
  const GraphView g = graph_view(p.layout);
  const int64_t model = row / batch.chains_per_model, chain = row % batch.chains_per_model;
  const T *state = parameter_row<T>(p.state, batch, model, chain), *coupling = parameter_row<T>(p.coupling, batch, model, 0);
  T field = parameter_row<T>(p.bias, batch, model, chain)[unit.node * p.bias.stride];
  for (int64_t h = unit.begin; h < unit.end; ++h) {
    const int64_t other = g.neighbors[h], edge = g.edge_of[h];
    if (other < 0 || other >= p.num_nodes || edge < 0 || edge >= p.num_edges) return report_fault(p.sweep, Outcome::kBadLayout);
    field += coupling[edge * p.coupling.stride] * state[other * p.state.stride];
  }
  static_cast<T*>(p.out)[linear_number(batch, model, chain) * p.num_nodes + unit.node] = field;
}

// A thread owns the edges from one unit of one model to those of higher numbers, summed over the model's chains in their order.
// out_e = sum over chains of first_u second_v + first_v second_u.
template <class T>
__global__ void __launch_bounds__(kFieldsThreads, 1) graph_edge_sums_kernel(const __grid_constant__ GraphEdgeSumsParams p) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const BatchView& batch = p.sweep.batch;
  const int64_t model = at / p.num_nodes, position = at % p.num_nodes;
  if (model >= batch.num_models) return;
  const GraphRow unit(p, position);
  if (!unit.is_sound) return report_fault(p.sweep, Outcome::kBadLayout);
  const GraphView g = graph_view(p.layout);
  const int64_t u = unit.node;
  for (int64_t h = unit.begin; h < unit.end; ++h) {
    const int64_t v = g.neighbors[h], edge = g.edge_of[h];
    if (v < 0 || v >= p.num_nodes || edge < 0 || edge >= p.num_edges) return report_fault(p.sweep, Outcome::kBadLayout);
    if (u >= v) continue;
    T sum = 0;
    for (int64_t chain = 0; chain < batch.chains_per_model; ++chain) {
      const T *first = parameter_row<T>(p.first, batch, model, chain), *second = parameter_row<T>(p.second, batch, model, chain);
      sum += first[u * p.first.stride] * second[v * p.second.stride] + first[v * p.first.stride] * second[u * p.second.stride];
    }
    static_cast<T*>(p.out)[model * p.num_edges + edge] = sum;
  }
}

#endif

}  // namespace gibbs
