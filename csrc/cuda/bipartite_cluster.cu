// SPDX-License-Identifier: Apache-2.0
// Plan and launch of binary sweeps by clusters of CTAs.
#include <algorithm>

#include "cuda/bipartite_cluster_kernel.cuh"
#include "cuda/bipartite_routes.h"

namespace gibbs {

namespace {

const Kernel<BipartiteClusterParams>& kernel = registered<bipartite_cluster_kernel>;

}

bool plan_bipartite_cluster(const BipartiteParams& p, const DeviceLimits& limits, BipartitePlan* plan) {
  if (p.log_weights) return false;
  const BatchView& batch = p.sweep.batch;
  for (int size = 2; size <= kMaxClusterSize; size *= 2) {
    const auto shape_of = [&](int chains) {
      LaunchShape shape;
      shape.num_ctas = batch.num_models * ((batch.chains_per_model + chains - 1) / chains) * size;
      shape.num_threads = kClusterThreads;
      shape.shared_memory = ClusterLayout(p, chains, size).bytes();
      shape.cluster_size = size;
      return shape;
    };
    const auto ctas_at_a_time = [&](int chains) { return limits.ctas_in_clusters(kernel, shape_of(chains)); };
    if (!ctas_at_a_time(1)) continue;
    int chains = 1;
    while (chains < std::min<int64_t>(kWarpSize, batch.chains_per_model) && shape_of(chains).num_ctas > ctas_at_a_time(chains) &&
           ctas_at_a_time(chains + 1))
      ++chains;
    *plan = {};
    plan->route = BipartiteRoute::kCluster;
    plan->chains_per_cta = chains;
    plan->shape = shape_of(chains);
    return true;
  }
  return false;
}

void launch_bipartite_cluster(const BipartiteParams& p, const BipartitePlan& plan, Stream stream) {
  launch(kernel, plan.shape, stream, BipartiteClusterParams{p, plan.chains_per_cta, plan.shape.cluster_size});
}

}  // namespace gibbs
