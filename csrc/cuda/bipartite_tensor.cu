// SPDX-License-Identifier: Apache-2.0
// Plan and launch of binary sweeps by tensor cores.
#include <algorithm>

#include "cuda/bipartite_routes.h"
#include "cuda/bipartite_tensor_kernel.cuh"

namespace gibbs {

namespace {

constexpr int kNarrow = 32, kWide = 64;  // numbers of chains of a CTA

int64_t shared_memory(const BipartiteParams& p, bool is_resident, int chains) {
  return TensorLayout(p, is_resident, chains).bytes();
}

int64_t tiles_of(const BatchView& batch, int chains) { return batch.num_models * ((batch.chains_per_model + chains - 1) / chains); }

bool is_resident(const BipartitePlan& plan) { return plan.slice_parts == 0; }

BipartitePlan plan_for(const BipartiteParams& p, bool resident, int chains) {
  BipartitePlan plan = {};
  plan.route = BipartiteRoute::kTensor;
  plan.chains_per_cta = chains;
  plan.shape.num_ctas = tiles_of(p.sweep.batch, chains);
  plan.shape.num_threads = kTensorThreads;
  plan.shape.shared_memory = shared_memory(p, resident, chains);
  plan.workspace = resident ? 0 : p.sweep.batch.num_models * sliced_model_bytes(p);
  return plan;
}

const Kernel<BipartiteTensorParams>& kernel_of(const BipartiteParams& p, const BipartitePlan& plan) {
  const bool annealed = p.log_weights, wide = plan.chains_per_cta == kWide;
  return is_resident(plan) ? annealed ? registered<bipartite_tensor_kernel<true, true, kNarrow>>
                                      : registered<bipartite_tensor_kernel<false, true, kNarrow>>
         : annealed        ? registered<bipartite_tensor_kernel<true, false, kNarrow>>
         : wide            ? registered<bipartite_tensor_kernel<false, false, kWide>>
                           : registered<bipartite_tensor_kernel<false, false, kNarrow>>;
}

}  // namespace

bool plan_bipartite_tensor(const BipartiteParams& p, const DeviceLimits& limits, BipartitePlan* plan) {
  *plan = plan_for(p, true, kNarrow);
  return plan->shape.shared_memory <= limits.shared_memory_per_cta;
}

bool plan_bipartite_tensor_streaming(const BipartiteParams& p, const DeviceLimits& limits, BipartitePlan* plan) {
  const BatchView& batch = p.sweep.batch;
  const auto plan_of = [&](int chains, int cluster_size) {
    BipartitePlan of = plan_for(p, false, chains);
    // Enough CTAs to keep the device busy. Each also reads the whole weight for its scale.
    const int64_t words = slice_bytes(p) / 4 / kSlices;
    of.slice_parts =
        int(std::clamp<int64_t>(limits.num_sms / batch.num_models, 1, std::max<int64_t>(words / (8 * kSliceThreads), 1)));
    of.shape.cluster_size = cluster_size;
    of.shape.num_ctas *= cluster_size;
    return of;
  };
  const auto ctas_at_a_time = [&](const BipartitePlan& of) { return limits.ctas_in_clusters(kernel_of(p, of), of.shape); };
  // A wide CTA reads the slices half as often; but without clusters half as many multiprocessors may be at work.
  const bool is_wide = !p.log_weights && batch.chains_per_model >= kWide &&
                       (ctas_at_a_time(plan_of(kWide, 2)) || tiles_of(batch, kWide) >= limits.num_sms) &&
                       shared_memory(p, false, kWide) <= limits.shared_memory_per_cta;
  const int chains = is_wide ? kWide : kNarrow;
  const int64_t tiles = tensor_tiles(std::max(p.n1, p.n2));
  *plan = plan_of(chains, 1);
  // Few enough CTAs that most warps of each have a tile and that all of them run at a time.
  for (int size = 2; !p.log_weights && size <= kMaxClusterSize && 2 * size < tiles; size *= 2) {
    const BipartitePlan larger = plan_of(chains, size);
    if (larger.shape.num_ctas > ctas_at_a_time(larger)) break;
    *plan = larger;
  }
  return plan->shape.shared_memory <= limits.shared_memory_per_cta;
}

// A CTA of 32 chains is busy longer than a CTA of few chains that adds flipped rows, and needs more chains to fill the device. On the other hand
// a weight that does not fit shared memory is read once for all chains of a CTA.
bool prefers_tensor(const BipartiteParams& p, const DeviceLimits& limits) {
  const BatchView& batch = p.sweep.batch;
  if (!p.sweep.num_sweeps) return false;
  BipartitePlan plan = {};
  if (plan_bipartite_resident(p, limits, &plan))
    return batch.chains_per_model >= kNarrow && tiles_of(batch, kNarrow) >= limits.num_sms;
  return batch.chains_per_model >= kNarrow / 4;
}

void launch_bipartite_tensor(const BipartiteParams& p, const BipartitePlan& plan, Stream stream) {
  if (!is_resident(plan)) {
    LaunchShape slices;
    slices.num_ctas = p.sweep.batch.num_models * plan.slice_parts;
    slices.num_threads = kSliceThreads;
    slices.shared_memory = shared_bytes<uint32_t>(scale_scratch(p.n2));
    launch(registered<bipartite_slice_kernel>, slices, stream, BipartiteSliceParams{p, plan.slice_parts});
  }
  launch(kernel_of(p, plan), plan.shape, stream, BipartiteTensorParams{p, plan.shape.cluster_size});
}

}  // namespace gibbs
