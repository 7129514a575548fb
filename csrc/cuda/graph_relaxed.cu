// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/graph_relaxed_kernel.cuh"
#include "cuda/stages.h"

namespace gibbs {

namespace {

int64_t number_size(bool is_double) { return is_double ? 8 : 4; }

// Chooses the number of chains of a CTA, which takes a tile of them at a time, and the contents of its shared memory. A tile reads the graph
// once for all its chains, so tiles are as wide as leaves no multiprocessor idle. Couplings are left out of shared memory first, because a
// cache holds what is the same for every CTA. CTAs take several tiles if all tiles together would run in more than two waves.
void plan_relaxed(const GraphModel& call, const DeviceLimits& device, bool is_backward, GraphTilePlan& plan) {
  const BatchView& batch = call.sweep.batch;
  const int64_t chains = num_rows(batch);
  int widest = kGraphRelaxedTile;
  while (widest > 1 && (widest > batch.chains_per_model || chains / widest < device.num_sms)) widest /= 2;
  const auto fits = [&](int tile, bool state, bool couplings) {
    plan.tile = tile;
    plan.state_in_shared = state;
    plan.couplings_in_shared = couplings;
    const GraphRelaxedLayout layout(call, plan, is_backward);
    plan.shape.shared_memory = call.is_double ? layout.bytes<double>() : layout.bytes<float>();
    return plan.shape.shared_memory <= device.shared_memory_per_cta;
  };
  const auto any_fits = [&](bool couplings) {
    for (int tile = widest; tile; tile /= 2)
      if (fits(tile, true, couplings)) return true;
    return false;
  };
  if (!any_fits(true) && !any_fits(false)) fits(widest, false, false);
  const int64_t tile = plan.tile, threads = round_up((call.num_nodes / call.num_colors + 1) * tile, kWarpSize);
  plan.shape.num_threads = int(std::clamp<int64_t>(threads, 2 * kWarpSize, kGraphRelaxedThreads));

  int64_t most_ctas = 2 * device.num_sms * ctas_per_sm(device, plan.shape);
  if (is_backward && call.num_edges)
    most_ctas = std::min(most_ctas, PartialSums::kMaxBytes / (call.num_edges * number_size(call.is_double)));
  const int64_t most_per_model = std::max<int64_t>(most_ctas / batch.num_models, 1);
  const int64_t tiles = divide_up(batch.chains_per_model, tile);
  plan.chains_per_cta = int(std::min<int64_t>(divide_up(tiles, most_per_model), INT32_MAX / tile) * tile);
  plan.shape.num_ctas = batch.num_models * ctas_per_model(batch, plan.chains_per_cta);
}

}  // namespace

GraphRelaxedPlan plan_graph_relaxed(const GraphParams& call, const DeviceLimits& device) {
  GraphRelaxedPlan plan = {};
  plan_relaxed(call, device, false, plan);
  if (call.sweep.num_sweeps) plan.binary = plan_graph(call, device);
  plan.workspace = plan.binary.workspace;
  return plan;
}

void launch_graph_relaxed(const GraphParams& call, const GraphRelaxedPlan& plan, Stream stream) {
  if (call.sweep.num_sweeps) launch_graph(call, plan.binary, stream);
  const auto& kernel = plan.state_in_shared ? call.is_double ? registered<graph_relaxed_kernel<double, true>>
                                                             : registered<graph_relaxed_kernel<float, true>>
                       : call.is_double     ? registered<graph_relaxed_kernel<double, false>>
                                            : registered<graph_relaxed_kernel<float, false>>;
  launch(kernel, plan.shape, stream, {call, plan});
}

GraphBackwardPlan plan_graph_backward(const GraphBackwardParams& call, const DeviceLimits& device) {
  GraphBackwardPlan plan = {};
  plan_relaxed(call, device, true, plan);
  const GraphBackwardWorkspace workspace(call, plan);
  plan.workspace = (workspace.fields + workspace.partial_rows * call.num_edges) * number_size(call.is_double);
  return plan;
}

void launch_graph_backward(const GraphBackwardParams& call, const GraphBackwardPlan& plan, Stream stream) {
  const GraphRelaxedBackwardParams params = {call, plan};
  const auto& kernel = plan.state_in_shared ? call.is_double ? registered<graph_backward_kernel<double, true>>
                                                             : registered<graph_backward_kernel<float, true>>
                       : call.is_double     ? registered<graph_backward_kernel<double, false>>
                                            : registered<graph_backward_kernel<float, false>>;
  launch(kernel, plan.shape, stream, params);
  const GraphBackwardWorkspace workspace(call, plan);
  if (!workspace.partial_rows) return;
  const int64_t models = call.sweep.batch.num_models;
  const auto* const parts = static_cast<const unsigned char*>(call.workspace) + workspace.fields * number_size(call.is_double);
  launch_partial_sums({models, workspace.partial_rows / models, call.num_edges, parts, call.grad_coupling}, call.is_double, stream);
}

}  // namespace gibbs
