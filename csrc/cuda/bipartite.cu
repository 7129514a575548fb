// SPDX-License-Identifier: Apache-2.0
// Plans and launches of binary sweeps, except for those of csrc/cuda/bipartite_tensor.cu and bipartite_cluster.cu.
#include "cuda/bipartite.h"

#include <algorithm>

#include "cuda/bipartite_kernel.cuh"
#include "cuda/bipartite_routes.h"

namespace gibbs {

namespace {

constexpr int kMaxChainsPerCta = 32;
constexpr int kMinThreads = 128;
constexpr int64_t kMostSlices = int64_t{1} << 28;  // bytes of several models' slices: twice their weights, and no longer in L2

// Threads of the warps that have work in a half sweep. Several warps share the flips of 32 units if there are warps left.
int threads_for(const BipartiteParams& p, int chains, bool is_resident) {
  const int64_t words = std::max(state_words(p.n1), state_words(p.n2)), most = is_resident ? kBipartiteThreads : kStreamingThreads;
  return int(std::clamp<int64_t>(4 * chains * words * kWarpSize, kMinThreads, most));
}
int parts_for(const BipartiteParams& p, int chains, int threads) {
  const int64_t words = std::max(state_words(p.n1), state_words(p.n2)), items = chains * words;
  return int(std::clamp<int64_t>(threads / kWarpSize / items, 1, words));
}

// A CTA takes as few chains as fill the device, because that makes the latency of a sweep shortest. More chains share the reading of a weight.
bool plan_one_cta(const BipartiteParams& p, const DeviceLimits& limits, bool is_resident, BipartitePlan* plan) {
  const BatchView& batch = p.sweep.batch;
  const auto shape_of = [&](int chains) {
    LaunchShape shape;
    shape.num_ctas = batch.num_models * ((batch.chains_per_model + chains - 1) / chains);
    shape.num_threads = threads_for(p, chains, is_resident);
    shape.shared_memory = BinaryLayout(p, chains, shape.num_threads, is_resident).bytes();
    return shape;
  };
  const auto fits = [&](const LaunchShape& shape) { return shape.shared_memory <= limits.shared_memory_per_cta; };
  if (!fits(shape_of(1))) return false;
  int chains = 1;
  for (int more = 2; more <= std::min<int64_t>(kMaxChainsPerCta, batch.chains_per_model); ++more) {
    const LaunchShape now = shape_of(chains), next = shape_of(more);
    if (!fits(next) || now.num_ctas <= ctas_per_sm(limits, now) * limits.num_sms) break;
    chains = more;
  }
  plan->shape = shape_of(chains);
  plan->chains_per_cta = chains;
  plan->workspace = 0;
  return true;
}

BipartiteBinaryParams binary_params(const BipartiteParams& p, const BipartitePlan& plan) {
  return {p, plan.chains_per_cta, parts_for(p, plan.chains_per_cta, plan.shape.num_threads)};
}

}  // namespace

bool plan_bipartite_resident(const BipartiteParams& p, const DeviceLimits& limits, BipartitePlan* plan) {
  plan->route = BipartiteRoute::kResident;
  return p.n1 * odd(p.n2) * int64_t(sizeof(int32_t)) <= limits.shared_memory_per_cta && plan_one_cta(p, limits, true, plan);
}

bool plan_bipartite_streaming(const BipartiteParams& p, const DeviceLimits& limits, BipartitePlan* plan) {
  plan->route = BipartiteRoute::kStreaming;
  if (plan_one_cta(p, limits, false, plan)) return true;
  plan->chains_per_cta = 1;  // its arrays lie in the workspace
  plan->shape.num_ctas = p.sweep.batch.num_models * p.sweep.batch.chains_per_model;
  plan->shape.num_threads = kStreamingThreads;
  plan->shape.shared_memory = 0;
  plan->workspace = plan->shape.num_ctas * BinaryLayout(p, 1, kStreamingThreads, false).bytes();
  return true;
}

BipartitePlan plan_bipartite(const BipartiteParams& p, const DeviceLimits& limits, BipartiteRoute route) {
  BipartitePlan plan = {};
  const auto can = [&](BipartiteRoute r, bool (*make)(const BipartiteParams&, const DeviceLimits&, BipartitePlan*)) {
    return (route == BipartiteRoute::kAuto || route == r) && make(p, limits, &(plan = {}));
  };
  // A route that a test has chosen is taken wherever it fits.
  const bool prefers = route == BipartiteRoute::kAuto && prefers_tensor(p, limits);
  if ((prefers || route == BipartiteRoute::kTensor) && plan_bipartite_tensor(p, limits, &plan)) return plan;
  const auto is_worth_it = [&] { return p.sweep.batch.num_models == 1 || plan.workspace <= kMostSlices; };
  if ((prefers || route == BipartiteRoute::kTensorStreaming) && plan_bipartite_tensor_streaming(p, limits, &plan) &&
      (!prefers || is_worth_it()))
    return plan;
  if (can(BipartiteRoute::kResident, plan_bipartite_resident) || can(BipartiteRoute::kCluster, plan_bipartite_cluster)) return plan;
  plan = {};
  plan_bipartite_streaming(p, limits, &plan);
  return plan;
}

void launch_bipartite_resident(const BipartiteParams& p, const BipartitePlan& plan, Stream stream) {
  launch(p.log_weights ? registered<bipartite_resident_kernel<true>> : registered<bipartite_resident_kernel<false>>, plan.shape,
         stream, binary_params(p, plan));
}

void launch_bipartite_streaming(const BipartiteParams& p, const BipartitePlan& plan, Stream stream) {
  launch(p.log_weights ? registered<bipartite_streaming_kernel<true>> : registered<bipartite_streaming_kernel<false>>, plan.shape,
         stream, binary_params(p, plan));
}

void launch_bipartite(const BipartiteParams& p, const BipartitePlan& plan, Stream stream) {
  switch (plan.route) {
    case BipartiteRoute::kCluster:
      return launch_bipartite_cluster(p, plan, stream);
    case BipartiteRoute::kTensor:
      return launch_bipartite_tensor(p, plan, stream);
    case BipartiteRoute::kStreaming:
      return launch_bipartite_streaming(p, plan, stream);
    default:
      return launch_bipartite_resident(p, plan, stream);
  }
}

void launch_coupling_resolution(const BipartiteParams& p, double* out, Stream stream) {
  LaunchShape shape;
  shape.num_ctas = p.sweep.batch.num_models;
  shape.num_threads = kBipartiteThreads;
  shape.shared_memory = shared_bytes<uint32_t>(scale_scratch(std::min(p.n1, p.n2)));
  launch(p.is_double ? registered<coupling_resolution_kernel<double>> : registered<coupling_resolution_kernel<float>>, shape,
         stream, ResolutionParams{p, out});
}

}  // namespace gibbs
