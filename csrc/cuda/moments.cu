// SPDX-License-Identifier: Apache-2.0
#include "cuda/moments.h"

#include "cuda/moments_kernel.cuh"

namespace gibbs {

namespace {

LaunchShape one_thread_each(int64_t items) { return shape_for(items, kMomentThreads, kMomentThreads); }

}  // namespace

void launch_unit_counts(const MomentParams& p, Stream stream) {
  int64_t units = 0;
  for (int part = 0; part < p.num_parts; ++part) units += p.num_models * p.parts[part].n;
  launch(registered<unit_counts_kernel>, one_thread_each(units), stream, p);
}

void launch_bipartite_pair_counts(const MomentParams& p, Stream stream) {
  launch(registered<bipartite_pair_counts_kernel>, one_thread_each(p.num_models * p.parts[0].n * p.parts[1].n), stream, p);
}

void launch_graph_pair_counts(const GraphPairParams& p, Stream stream) {
  launch(registered<graph_pair_counts_kernel>, one_thread_each(p.moments.num_models * p.model.num_nodes), stream, p);
}

void launch_best_states(const MomentParams& p, Stream stream) {
  launch(registered<best_states_kernel>, one_thread_each(p.num_models * p.num_chains * kWarpSize), stream, p);
}

}  // namespace gibbs
