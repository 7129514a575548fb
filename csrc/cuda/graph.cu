// SPDX-License-Identifier: Apache-2.0
// Plans and launches of binary sweeps of coloured graphs.
#include <algorithm>

#include "cuda/graph.h"
#include "cuda/graph_kernel.cuh"

namespace gibbs {

namespace {

constexpr int kMaxUnitsTile = 8;  // chains side by side when lanes are units

bool fits(const GraphParams& p, const GraphPlan& plan, const DeviceLimits& limits) {
  return GraphBinaryLayout(p, plan).bytes() <= limits.shared_memory_per_cta;
}

// Puts as much as fits into shared memory, beginning with what is read most. False: not even the states fit.
bool place(const GraphParams& p, const DeviceLimits& limits, GraphPlan* plan) {
  const auto with = [&](bool couplings, bool bytes) {
    plan->state_in_shared = true, plan->couplings_in_shared = couplings, plan->bytes_in_shared = bytes;
    return fits(p, *plan, limits);
  };
  return with(true, true) || with(false, true) || with(true, false) || with(false, false);
}

int64_t ctas(const BatchView& batch, int chains) { return batch.num_models * ((batch.chains_per_model + chains - 1) / chains); }

// Whether units may have few enough neighbours for tables. Only the device knows; the kernel makes sums if a unit has more.
bool can_tabulate(const GraphParams& p) {
  return 2 * p.num_edges <= kMaxTableDegree * p.num_nodes && !p.log_weights && !p.metropolis &&
         is_shared_row(p.bias, p.sweep.batch);
}

template <GraphCudaRoute kRoute>
const Kernel<GraphBinaryParams>& kernel_of(const GraphParams& p) {
  return p.log_weights  ? registered<graph_kernel<kRoute, GraphRule::kAnnealed>>
         : p.metropolis ? registered<graph_kernel<kRoute, GraphRule::kMetropolis>>
                        : registered<graph_kernel<kRoute, GraphRule::kGibbs>>;
}

}  // namespace

GraphPlan plan_graph(const GraphParams& p, const DeviceLimits& limits, GraphCudaRoute route) {
  const BatchView& batch = p.sweep.batch;
  GraphPlan plan = {};
  const auto finish = [&](GraphCudaRoute taken, int chains) {
    plan.route = taken;
    plan.chains_per_cta = plan.tile = chains;
    plan.shape.num_threads = kGraphThreads;
    plan.shape.num_ctas = ctas(batch, chains);
    const bool placed = place(p, limits, &plan);
    plan.shape.shared_memory = GraphBinaryLayout(p, plan).bytes();
    return placed;
  };
  const bool is_auto = route == GraphCudaRoute::kAuto,
             fills = batch.chains_per_model >= kWarpSize && ctas(batch, kWarpSize) >= limits.num_sms;
  // Tables pay off if they serve many sweeps, that is, at one beta and for more than a few sweeps.
  const bool tabulates = can_tabulate(p) && (route == GraphCudaRoute::kTables ||
                                             (is_auto && fills && p.sweep.num_betas == 1 && p.sweep.num_sweeps >= 4));
  if (tabulates && finish(GraphCudaRoute::kTables, kWarpSize)) return plan;
  const bool lanes = route == GraphCudaRoute::kSums || route == GraphCudaRoute::kTables || (is_auto && fills);
  if (lanes && finish(GraphCudaRoute::kSums, kWarpSize)) return plan;
  int tile = 1;
  while (2 * tile <= std::min<int64_t>(kMaxUnitsTile, batch.chains_per_model) && ctas(batch, tile) > limits.num_sms) tile *= 2;
  for (; tile > 1; tile /= 2)
    if (finish(GraphCudaRoute::kUnits, tile)) return plan;
  if (finish(GraphCudaRoute::kUnits, 1)) return plan;
  plan.state_in_shared = false;
  plan.shape.shared_memory = GraphBinaryLayout(p, plan).bytes();
  plan.workspace = plan.shape.num_ctas * p.num_nodes;
  return plan;
}

void launch_graph(const GraphParams& p, const GraphPlan& plan, Stream stream) {
  using enum GraphCudaRoute;
  const auto& kernel = plan.route == kTables ? registered<graph_kernel<kTables, GraphRule::kGibbs>>
                       : plan.route == kSums ? kernel_of<kSums>(p)
                                             : kernel_of<kUnits>(p);
  launch(kernel, plan.shape, stream, GraphBinaryParams{p, plan});
}

void launch_graph_coupling_resolution(const GraphParams& p, double* out, Stream stream) {
  LaunchShape shape;
  shape.num_ctas = p.sweep.batch.num_models;
  shape.num_threads = kGraphThreads;
  shape.shared_memory = shared_bytes<uint32_t>(kGraphScaleScratch);
  launch(registered<graph_resolution_kernel>, shape, stream, GraphResolutionParams{p, out});
}

}  // namespace gibbs
