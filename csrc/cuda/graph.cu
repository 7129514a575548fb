// SPDX-License-Identifier: Apache-2.0
// Plans and launches of binary sweeps of coloured graphs.
#include "cuda/graph.h"

#include <algorithm>
#include <bit>

#include "cuda/graph_kernel.cuh"

namespace gibbs {

namespace {

bool has_shared_biases(const GraphParams& p) {
  return is_shared_row(p.bias, p.sweep.batch) && (!p.log_weights || is_shared_row(p.base_bias, p.sweep.batch));
}

GraphPlan plan_for(const GraphParams& p, int tile, GraphCudaRoute route) {
  GraphPlan plan = {};
  plan.route = route, plan.tile = tile;
  plan.shape.num_ctas = p.sweep.batch.num_models * ctas_per_model(p.sweep.batch, tile);
  // A thread has an octet of chains of a unit of a colour at a time, if colours are alike.
  const int64_t items = p.num_nodes / p.num_colors * octets_of(tile);
  plan.shape.num_threads = int(std::bit_ceil(uint64_t(std::clamp<int64_t>(items, 4 * kWarpSize, kGraphThreads))));
  plan.shape.shared_memory = GraphBinaryLayout(p, plan).shared_memory();
  return plan;
}

LaunchShape pack_shape(int64_t ctas) { return {ctas, kGraphPackThreads, shared_bytes<uint32_t>(kGraphScaleScratch)}; }

GraphView graph_of(const GraphParams& p) { return graph_view(p.layout, p.num_nodes, p.num_edges, p.num_colors, 0); }

template <bool kShared>
const Kernel<GraphBinaryParams>& kernel_of(const GraphParams& p) {
  return p.log_weights  ? registered<graph_kernel<GraphRule::kAnnealed, kShared>>
         : p.metropolis ? registered<graph_kernel<GraphRule::kMetropolis, kShared>>
                        : registered<graph_kernel<GraphRule::kGibbs, kShared>>;
}

}  // namespace

GraphPacked::GraphPacked(const GraphParams& p, const GraphPlan& plan, Workspace& workspace) {
  const BatchView& batch = p.sweep.batch;
  const int64_t capacity = QuadLayout::capacity(p.num_nodes, p.num_edges), words = num_rows(batch) * state_words(p.num_nodes),
                biases = (has_shared_biases(p) ? batch.num_models : num_rows(batch)) * p.num_nodes;
  scales = workspace.take<ModelScale>(batch.num_models);
  neighbors = workspace.take<Quad>(capacity);
  slices = workspace.take<Slices>(batch.num_models * capacity);
  couplings = workspace.take<int32_t>(batch.num_models * p.num_edges);
  bits = workspace.take<uint32_t>(words);
  clamps = p.clamp.data ? workspace.take<uint32_t>(words) : nullptr;
  bias = workspace.take<float>(biases);
  base_bias = p.log_weights ? workspace.take<float>(biases) : nullptr;
  numbers = workspace.take<uint64_t>(num_rows(batch));
  const GraphBinaryLayout arrays(p, plan);
  states = arrays.is_shared ? nullptr : workspace.take<uint32_t>(plan.shape.num_ctas * (arrays.states + arrays.clamps));
}

// A CTA takes a gather of neighbours for all its chains, which costs as much as about three of them, and the multiprocessor with the most
// CTAs determines the time.
GraphPlan plan_graph(const GraphParams& p, const DeviceLimits& limits, GraphCudaRoute route) {
  const BatchView& batch = p.sweep.batch;
  constexpr int64_t kGather = 3;
  const auto cost = [&](int tile) {
    const int64_t ctas = batch.num_models * ctas_per_model(batch, tile);
    return divide_up(ctas, limits.num_sms) * (kGather + tile);
  };
  GraphPlan plan = {};
  bool is_planned = false;
  const auto choose = [&](GraphCudaRoute of) {
    int64_t least = 0;
    for (int tile = 1; tile <= kMaxGraphTile; tile *= 2) {
      const GraphPlan candidate = plan_for(p, tile, of);
      // Kernels count the bytes of states by int32.
      const bool fits = candidate.shape.shared_memory <= limits.shared_memory_per_cta && p.num_nodes * octets_of(tile) <= INT32_MAX;
      if (!fits || (is_planned && (cost(tile) >= least || tile >= 2 * batch.chains_per_model))) continue;
      plan = candidate, least = cost(tile), is_planned = true;
    }
  };
  if (route != GraphCudaRoute::kGlobal) choose(GraphCudaRoute::kShared);
  if (!is_planned) choose(GraphCudaRoute::kGlobal);
  if (!is_planned) throw std::invalid_argument("the device has too little shared memory");
  Workspace workspace(nullptr);
  GraphPacked(p, plan, workspace);
  plan.workspace = workspace.size();
  return plan;
}

void launch_graph(const GraphParams& p, const GraphPlan& plan, Stream stream) {
  Workspace workspace(p.workspace);
  const GraphPacked packed(p, plan, workspace);
  launch(registered<graph_pack_kernel>, pack_shape(p.sweep.batch.num_models + 1), stream, GraphPackParams{p, packed});

  PackParams pack = {};
  pack.sweep = p.sweep;
  pack.is_double = p.is_double;
  pack.scales = packed.scales;
  pack.device_degree = p.layout + kMaxDegreePlace;
  pack.numbers = packed.numbers;
  pack.bits[pack.num_bits++] = {p.state, p.num_nodes, 0, packed.bits, Outcome::kStateNotBits};
  if (packed.clamps) pack.bits[pack.num_bits++] = {p.clamp, p.num_nodes, 0, packed.clamps, Outcome::kStateNotBits};
  pack.biases[pack.num_biases++] = {p.bias,
                                    p.base_bias,
                                    p.num_nodes,
                                    0,
                                    p.num_nodes,
                                    has_shared_biases(p),
                                    graph_of(p).order,
                                    packed.bias,
                                    packed.base_bias,
                                    Outcome::kNonFiniteBias,
                                    Outcome::kNonFiniteBaseBias};
  launch_pack(pack, stream);

  const GraphBinaryParams params = {p.sweep,
                                    graph_of(p),
                                    p.layout + kMaxDegreePlace,
                                    packed,
                                    GraphBinaryLayout(p, plan),
                                    plan.tile,
                                    octets_of(plan.tile),
                                    int32_t(state_words(p.num_nodes)),
                                    int32_t(ctas_per_model(p.sweep.batch, plan.tile)),
                                    !has_shared_biases(p),
                                    p.log_weights};
  launch(params.arrays.is_shared ? kernel_of<true>(p) : kernel_of<false>(p), plan.shape, stream, params);

  UnpackParams unpack = {};
  unpack.batch = p.sweep.batch;
  unpack.scales = packed.scales;
  unpack.bits[unpack.num_bits++] = {packed.bits, p.num_nodes, 0, p.state_out};
  launch_unpack(unpack, stream);
}

void launch_graph_coupling_resolution(const GraphParams& p, double* out, Stream stream) {
  launch(registered<graph_resolution_kernel>, pack_shape(p.sweep.batch.num_models), stream, GraphResolutionParams{p, out});
}

}  // namespace gibbs
