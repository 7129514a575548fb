// SPDX-License-Identifier: Apache-2.0
// Plan and launch of binary sweeps by clusters of CTAs.
#include <algorithm>

#include "cuda/bipartite_cluster_kernel.cuh"
#include "cuda/bipartite_routes.h"

namespace gibbs {

bool plan_bipartite_cluster(const BipartiteParams& p, const DeviceLimits& limits, BipartitePlan* plan) {
  if (!limits.has_clusters() || p.log_weights) return false;
  const BatchView& batch = p.sweep.batch;
  for (int size = 2; size <= kMaxClusterSize; size *= 2) {
    const auto fits = [&](int chains) { return ClusterLayout(p, chains, size).bytes() <= limits.shared_memory_per_cta; };
    const auto ctas = [&](int chains) { return batch.num_models * ((batch.chains_per_model + chains - 1) / chains) * size; };
    if (!fits(1)) continue;
    int chains = 1;
    while (chains < std::min<int64_t>(kWarpSize, batch.chains_per_model) && ctas(chains) > limits.num_sms && fits(chains + 1))
      ++chains;
    *plan = {};
    plan->route = BipartiteRoute::kCluster;
    plan->chains_per_cta = chains;
    plan->shape.num_ctas = ctas(chains);
    plan->shape.num_threads = kClusterThreads;
    plan->shape.shared_memory = ClusterLayout(p, chains, size).bytes();
    plan->shape.cluster_size = size;
    return true;
  }
  return false;
}

void launch_bipartite_cluster(const BipartiteParams& p, const BipartitePlan& plan, Stream stream) {
  launch(bipartite_cluster_kernel, plan.shape, stream, BipartiteClusterParams{p, plan.chains_per_cta, plan.shape.cluster_size});
}

}  // namespace gibbs
