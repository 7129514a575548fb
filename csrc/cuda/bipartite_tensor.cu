// SPDX-License-Identifier: Apache-2.0
// Plan and launch of binary sweeps by tensor cores.
#include "cuda/bipartite_routes.h"
#include "cuda/bipartite_tensor_kernel.cuh"

namespace gibbs {

namespace {

int64_t shared_memory(const BipartiteParams& p, bool is_staged) { return TensorLayout(p, is_staged).bytes(p.n2); }

int64_t tiles_of(const BatchView& batch) {
  return batch.num_models * ((batch.chains_per_model + kTensorChains - 1) / kTensorChains);
}

}  // namespace

bool plan_bipartite_tensor(const BipartiteParams& p, const DeviceLimits& limits, BipartitePlan* plan) {
  const bool is_staged = shared_memory(p, false) > limits.shared_memory_per_cta;
  *plan = {};
  plan->route = BipartiteRoute::kTensor;
  plan->chains_per_cta = kTensorChains;
  plan->shape.num_ctas = tiles_of(p.sweep.batch);
  plan->shape.num_threads = kTensorThreads;
  plan->shape.shared_memory = shared_memory(p, is_staged);
  return plan->shape.shared_memory <= limits.shared_memory_per_cta;
}

// A CTA of 32 chains is busy longer than one of a few that goes by flipped rows, and needs as many chains to fill the device. A weight that
// does not fit shared memory is read once for 32 chains.
bool prefers_tensor(const BipartiteParams& p, const DeviceLimits& limits) {
  const BatchView& batch = p.sweep.batch;
  if (!p.sweep.num_sweeps) return false;
  BipartitePlan plan = {};
  if (plan_bipartite_resident(p, limits, &plan))
    return batch.chains_per_model >= kTensorChains && tiles_of(batch) >= limits.num_sms;
  return batch.chains_per_model >= kTensorChains / 4;
}

void launch_bipartite_tensor(const BipartiteParams& p, const BipartitePlan& plan, Stream stream) {
  const bool is_staged = shared_memory(p, false) != plan.shape.shared_memory;
  const auto kernel = p.log_weights ? is_staged ? bipartite_tensor_kernel<true, true> : bipartite_tensor_kernel<true, false>
                      : is_staged   ? bipartite_tensor_kernel<false, true>
                                    : bipartite_tensor_kernel<false, false>;
  launch(kernel, plan.shape, stream, p);
}

}  // namespace gibbs
