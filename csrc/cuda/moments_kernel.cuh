// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/graph_fields_kernel.cuh"
#include "cuda/moments.h"

namespace gibbs {

#if defined(GIBBS_DEVICE)

GIBBS_DEVICE int64_t own_thread() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }

// A thread owns a unit of a model: it gathers the bits of all chains, 32 to a word. Traffic: a byte of each state, in rows.
__global__ void __launch_bounds__(kMomentThreads, 1) unit_counts_kernel(const __grid_constant__ MomentParams p) {
  int64_t at = own_thread();
  for (int of = 0; of < p.num_parts; ++of) {
    const MomentParams::Part& part = p.parts[of];
    const int64_t size = p.num_models * part.n;
    if (at < size) {
      int64_t count = 0;
      for (int64_t word = 0; word < p.num_words; ++word) {
        uint32_t bits = 0;
        for (int c = 0; c < 32 && word * 32 + c < p.num_chains; ++c) bits |= uint32_t(part.bits[(word * 32 + c) * size + at]) << c;
        part.words[word * size + at] = bits;
        count += __popc(bits);
      }
      part.counts[at] += count;
      return;
    }
    at -= size;
  }
}

// A thread owns a pair of units of a model. Traffic: two words for 32 chains, of which one is the whole warp's.
__global__ void __launch_bounds__(kMomentThreads, 1) bipartite_pair_counts_kernel(const __grid_constant__ MomentParams p) {
  const MomentParams::Part &left = p.parts[0], &right = p.parts[1];
  const int64_t at = own_thread(), i = at / right.n, j = i / left.n * right.n + at % right.n;  // units of all models
  const int64_t left_size = p.num_models * left.n, right_size = p.num_models * right.n;
  if (i >= left_size) return;
  int64_t count = 0;
  for (int64_t word = 0; word < p.num_words; ++word)
    count += __popc(left.words[word * left_size + i] & right.words[word * right_size + j]);
  p.pair_counts[at] += count;
}

// A thread owns a unit of a model, and its edges to units of higher numbers.
__global__ void __launch_bounds__(kMomentThreads, 1) graph_pair_counts_kernel(const __grid_constant__ GraphPairParams p) {
  const GraphParams& m = p.model;
  const MomentParams& of = p.moments;
  const int64_t at = own_thread(), model = at / m.num_nodes;
  if (model >= of.num_models) return;
  const GraphRow unit(m, at % m.num_nodes);
  if (!unit.is_sound) return report_fault(m.sweep, Outcome::kBadLayout);
  const GraphView g = graph_view(m.layout);
  const int64_t size = of.num_models * m.num_nodes;
  const uint32_t* words = of.parts[0].words + model * m.num_nodes;
  for (int64_t h = unit.begin; h < unit.end; ++h) {
    const int64_t other = g.neighbors[h], edge = g.edge_of[h];
    if (!(0 <= other && other < m.num_nodes && 0 <= edge && edge < m.num_edges)) return report_fault(m.sweep, Outcome::kBadLayout);
    if (other <= unit.node) continue;
    int64_t count = 0;
    for (int64_t word = 0; word < of.num_words; ++word)
      count += __popc(words[word * size + unit.node] & words[word * size + other]);
    of.pair_counts[model * m.num_edges + edge] += count;
  }
}

// A warp owns a chain, whose state it keeps if its energy is lower than all before.
__global__ void __launch_bounds__(kMomentThreads, 1) best_states_kernel(const __grid_constant__ MomentParams p) {
  const int64_t chain = own_thread() / kWarpSize;
  if (chain >= p.num_models * p.num_chains) return;
  const double energy = p.energies[chain];
  const bool is_better = energy < p.best_energies[chain];
  __syncwarp();  // all lanes have read before one writes
  if (!is_better) return;
  if (lane() == 0) p.best_energies[chain] = energy;
  for (int of = 0; of < p.num_parts; ++of) {
    const MomentParams::Part& part = p.parts[of];
    for (int64_t i = lane(); i < part.n; i += kWarpSize) part.best[chain * part.n + i] = part.bits[chain * part.n + i];
  }
}

#endif

}  // namespace gibbs
