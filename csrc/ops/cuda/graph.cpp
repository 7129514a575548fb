// SPDX-License-Identifier: Apache-2.0
// The ops on coloured graphs on CUDA devices, against libtorch's stable ABI. twin: csrc/ops/cpu/graph.cpp
#include "cuda/graph.h"

#include <tuple>

#include "core/graph_view.h"
#include "cuda/graph_fields.h"
#include "ops/arguments.h"
#include "ops/cuda/call.h"
#include "ops/cuda/routes.h"

namespace gibbs {

namespace {

// The size of a graph whose layout lies on a device, where it is not read: the sizes of tensors tell the numbers of nodes, edges and
// colours, and the kernels check that the layout agrees.
GraphSize size_of(OpId op, const Tensor& coupling, const Tensor& layout, const Tensor& units) {
  check_layout_tensor(op, layout);
  if (coupling.dim() < 1 || units.dim() < 1) return {1, coupling.dim() < 1 ? 0 : coupling.size(coupling.dim() - 1), 1};
  const int64_t nodes = units.size(units.dim() - 1), edges = coupling.size(coupling.dim() - 1);
  const int64_t colors = layout.size(0) - layout_size(nodes, edges, 0);
  if (nodes < 1 || nodes >= kMaxUnits || colors < 1 || colors > nodes) fail_layout(op, layout);
  return {nodes, edges, colors};
}

template <class Params>
Params model(const Problem& p, const Tensor& layout, const GraphSize& size) {
  Params params = {};
  params.layout = static_cast<const int32_t*>(layout.const_data_ptr());
  params.num_nodes = size.num_nodes, params.num_edges = size.num_edges, params.num_colors = size.num_colors;
  params.is_double = p.is_double();
  return params;
}

void add_parameters(GraphParams& params, const Problem& p, BatchBuilder& batch) {
  batch.coupling(params.coupling);
  batch.parameter(params.bias, p.nodes().bias);
  batch.parameter(params.base_bias, p.nodes().base_bias);
}

GraphPlan plan_sweeps(const GraphParams& params, const DeviceLimits& limits) {
  const GraphPlan plan = plan_graph(params, limits, route_in_force().graph);
  note(plan);
  return plan;
}

// Binary sweeps; log_weights: annealed.
void sweep(Call& call, const Problem& p, const Tensor& layout, const GraphSize& size, const Counters& counters, const Tensor& out,
           double* log_weights = nullptr) {
  BatchBuilder& batch = call.batch();
  GraphParams params = model<GraphParams>(p, layout, size);
  add_parameters(params, p, batch);
  batch.state(params.state, p.nodes().state);
  batch.state(params.clamp, p.nodes().clamp);
  params.state_out = BatchBuilder::output(out);
  params.log_weights = log_weights;
  params.metropolis = p.id() == kGraphMetropolis;
  call.describe(params.sweep, counters);
  call.launch(params, plan_sweeps, launch_graph);
}

// graph_gibbs and graph_metropolis.
template <OpId kOp>
Tensor graph_sweeps(const Tensor& state, const Tensor& bias, const Tensor& coupling, const Tensor& layout, const Tensor& beta,
                    const Tensor& seed, const std::optional<Tensor>& clamp, const std::optional<Tensor>& chains,
                    int64_t chain_offset, int64_t sweep_offset, int64_t num_sweeps) {
  const Counters counters = {seed, beta, chains, chain_offset, sweep_offset, num_sweeps};
  const GraphSize size = size_of(kOp, coupling, layout, state);
  Problem p(kOp, coupling, layout, size, {.state = &state, .bias = &bias, .clamp = pointer(clamp)});
  check_sweeps(p, counters);
  Call call(p);
  const Tensor out = call.state_output(p.nodes(), state);
  sweep(call, p, layout, size, counters, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> graph_gibbs_relaxed(const Tensor& state, const Tensor& bias, const Tensor& coupling,
                                                               const Tensor& layout, const Tensor& beta, const Tensor& seed,
                                                               const std::optional<Tensor>& chains, int64_t chain_offset,
                                                               int64_t sweep_offset, int64_t num_sweeps, int64_t num_relaxed_sweeps,
                                                               int64_t relaxation, double sharpness, bool slope_gradient) {
  const Counters counters = {seed, beta, chains, chain_offset, sweep_offset, num_sweeps, num_relaxed_sweeps};
  const RelaxationArguments how = {relaxation, sharpness, slope_gradient};
  const GraphSize size = size_of(kGraphGibbsRelaxed, coupling, layout, state);
  Problem p(kGraphGibbsRelaxed, coupling, layout, size, {.state = &state, .bias = &bias});
  check_sweeps(p, counters, &how);
  Call call(p);
  const Shape shape = p.with_batch({p.num_units()});
  const Tensor start_out = call.output(shape), relaxed = call.output(shape), mean = call.output(shape),
               fields = call.output(p.with_batch({p.num_units()}, {num_relaxed_sweeps}));
  BatchBuilder& batch = call.batch();
  GraphParams params = model<GraphParams>(p, layout, size);
  add_parameters(params, p, batch);
  const Tensor start = num_sweeps || state.scalar_type() == p.type() ? state : torch::stable::to(state, p.type());
  if (num_sweeps)
    batch.state(params.state, &state);
  else
    batch.parameter(params.start, &start);
  params.start_is_bits = is_bit_type(state.scalar_type());
  params.state_out = BatchBuilder::output(start_out);
  params.relaxed = relaxed.mutable_data_ptr();
  params.mean = mean.mutable_data_ptr();
  params.fields = fields.mutable_data_ptr();
  call.describe(params.sweep, counters);
  call.describe(params.sweep, how);
  call.launch(params, plan_graph_relaxed, launch_graph_relaxed);
  return {relaxed, mean, start_out, fields};
}

std::tuple<Tensor, Tensor, Tensor> graph_gibbs_relaxed_backward(const Tensor& grad_relaxed, const Tensor& grad_mean,
                                                                const Tensor& state, const Tensor& fields, const Tensor& coupling,
                                                                const Tensor& layout, const Tensor& beta, const Tensor& seed,
                                                                const std::optional<Tensor>& chains, int64_t chain_offset,
                                                                int64_t sweep_offset, int64_t num_sweeps, int64_t relaxation,
                                                                double sharpness, bool slope_gradient) {
  const Counters counters = {seed, beta, chains, chain_offset, sweep_offset, num_sweeps, relaxed_sweeps_of(fields)};
  const RelaxationArguments how = {relaxation, sharpness, slope_gradient};
  const GraphSize size = size_of(kGraphGibbsRelaxedBackward, coupling, layout, state);
  Problem p(kGraphGibbsRelaxedBackward, coupling, layout, size);
  const int64_t n = p.num_units();
  const std::vector<Tensor> rows = check_backward(
      p, {{"grad_relaxed", grad_relaxed, n}, {"grad_mean", grad_mean, n}, {"state", state, n}}, fields, counters, how);
  const Tensor saved = as_contiguous(fields);
  Call call(p);
  const Tensor grad_state = call.output(p.with_batch({n})), grad_bias = call.output(p.with_batch({n}));
  Tensor grad_coupling = call.output(p.model_couplings());
  if (!p.num_chains()) torch::stable::zero_(grad_coupling);

  GraphBackwardParams params = model<GraphBackwardParams>(p, layout, size);
  call.batch().coupling(params.coupling);
  params.grad_relaxed = rows[0].const_data_ptr();
  params.grad_mean = rows[1].const_data_ptr();
  params.state = rows[2].const_data_ptr();
  params.fields = saved.const_data_ptr();
  params.grad_state = grad_state.mutable_data_ptr();
  params.grad_bias = grad_bias.mutable_data_ptr();
  params.grad_coupling = grad_coupling.mutable_data_ptr();
  call.describe(params.sweep, counters);
  call.describe(params.sweep, how);
  call.launch(params, plan_graph_backward, launch_graph_backward);
  return {grad_state, grad_bias, grad_coupling};
}

std::tuple<Tensor, Tensor> graph_ais(const Tensor& state, const Tensor& bias, const Tensor& coupling, const Tensor& layout,
                                     const Tensor& base_bias, const Tensor& betas, const Tensor& seed,
                                     const std::optional<Tensor>& chains, int64_t chain_offset, int64_t sweep_offset) {
  const Counters counters = {seed, betas, chains, chain_offset, sweep_offset, annealed_sweeps(kGraphAis, betas)};
  const GraphSize size = size_of(kGraphAis, coupling, layout, state);
  Problem p(kGraphAis, coupling, layout, size, {.state = &state, .bias = &bias, .base_bias = &base_bias});
  check_sweeps(p, counters);
  Call call(p);
  const Tensor out = call.state_output(p.nodes(), state), log_weights = call.output_per_model_or_chain();
  sweep(call, p, layout, size, counters, out, static_cast<double*>(log_weights.mutable_data_ptr()));
  return {out, log_weights};
}

std::tuple<Tensor, Tensor, Tensor> graph_tempering(const Tensor& state, const Tensor& bias, const Tensor& coupling,
                                                   const Tensor& layout, const Tensor& beta, const Tensor& seed,
                                                   const Tensor& chains, int64_t sweep_offset, int64_t sweeps_per_swap,
                                                   int64_t num_swaps, bool cluster_moves) {
  std::optional<Tensor> numbers = chains;
  const GraphSize size = size_of(kGraphTempering, coupling, layout, state);
  Problem p(kGraphTempering, coupling, layout, size, {.state = &state, .bias = &bias});
  check_tempering(p, {seed, beta, numbers, 0, sweep_offset, sweeps_per_swap * num_swaps}, sweeps_per_swap, num_swaps);
  const Pairing pairing = cluster_moves ? check_cluster_moves(p) : Pairing{};
  Call call(p);
  TemperingTensors out(call, p, chains, sweeps_per_swap, num_swaps);
  numbers = out.chains;
  // As in bipartite_tempering.
  BatchBuilder& batch = call.batch();
  GraphParams start = model<GraphParams>(p, layout, size), rounds = start;
  for (GraphParams* params : {&start, &rounds}) {
    add_parameters(*params, p, batch);
    params->state_out = BatchBuilder::output(out.bits[0]);
  }
  batch.state(start.state, &state);
  batch.state(rounds.state, &out.bits[0]);
  call.describe(start.sweep, {seed, beta, numbers, 0, sweep_offset, sweeps_per_swap * num_swaps});
  start.sweep.num_sweeps = 0;
  call.launch(start, plan_sweeps, launch_graph);
  rounds.sweep = start.sweep, rounds.sweep.num_sweeps = sweeps_per_swap;
  const Tensor position = call.allocate(layout, {p.num_units()}, ScalarType::Int);
  std::optional<Tensor> marks;
  if (cluster_moves) marks = call.allocate(layout, p.with_batch({p.num_units()}), ScalarType::Byte);
  const auto energy_params = [&] {
    return GraphEnergyParams{rounds, out.params, static_cast<int32_t*>(position.mutable_data_ptr())};
  };
  call.launch(rounds, [&](Stream stream) {
    launch_graph_coupling_resolution(rounds, static_cast<double*>(out.scales.mutable_data_ptr()), stream);
    launch_graph_positions(energy_params(), stream);
  });
  out.run_rounds(
      call, rounds, num_swaps, [&] { call.launch(rounds, plan_sweeps, launch_graph); },
      [&](Stream stream) {
        if (cluster_moves)
          launch_graph_clusters({rounds, out.params, pairing, static_cast<uint8_t*>(marks->mutable_data_ptr())}, stream);
        launch_graph_energies(energy_params(), stream);
      });
  return {torch::stable::to(out.bits[0], state.scalar_type()), out.energies, out.chains_at};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> graph_moments(const Tensor& state, const Tensor& bias, const Tensor& coupling,
                                                                 const Tensor& layout, const Tensor& beta, const Tensor& seed,
                                                                 const std::optional<Tensor>& clamp,
                                                                 const std::optional<Tensor>& chains, int64_t chain_offset,
                                                                 int64_t sweep_offset, int64_t num_sweeps, int64_t sweeps_per_read,
                                                                 int64_t counted, bool best, bool metropolis) {
  const Counters counters = {seed, beta, chains, chain_offset, sweep_offset, num_sweeps};
  const GraphSize size = size_of(kGraphMoments, coupling, layout, state);
  Problem p(kGraphMoments, coupling, layout, size, {.state = &state, .bias = &bias, .clamp = pointer(clamp)});
  check_moments(p, counters, sweeps_per_read, counted);
  Call call(p);
  MomentTensors out(call, p, state, counted, best);
  // As in bipartite_tempering.
  BatchBuilder& batch = call.batch();
  GraphParams start = model<GraphParams>(p, layout, size), rounds = start;
  for (GraphParams* params : {&start, &rounds}) {
    add_parameters(*params, p, batch);
    batch.state(params->clamp, p.nodes().clamp);
    params->state_out = BatchBuilder::output(out.bits[0]);
    params->metropolis = metropolis;
  }
  batch.state(start.state, &state);
  batch.state(rounds.state, &out.bits[0]);
  call.describe(start.sweep, counters);
  start.sweep.num_sweeps = 0;
  call.launch(start, plan_sweeps, launch_graph);
  rounds.sweep = start.sweep;
  std::optional<Tensor> position;
  const auto energy_params = [&] {
    return GraphEnergyParams{rounds, out.energies, static_cast<int32_t*>(position->mutable_data_ptr())};
  };
  if (best) {
    position = call.allocate(layout, {p.num_units()}, ScalarType::Int);
    call.launch(rounds, [&](Stream stream) {
      launch_graph_coupling_resolution(rounds, out.scales(), stream);
      launch_graph_positions(energy_params(), stream);
    });
  }
  out.run_reads(
      call, rounds, num_sweeps, sweeps_per_read, [&] { call.launch(rounds, plan_sweeps, launch_graph); },
      [&](Stream stream) { launch_graph_pair_counts({rounds, out.params}, stream); },
      [&](Stream stream) { launch_graph_energies(energy_params(), stream); });
  const auto result = [&](const Tensor& bits) { return torch::stable::to(bits, state.scalar_type()); };
  return {result(out.bits[0]), out.units[0], out.pairs, result(out.best[0]), out.best_energies};
}

Tensor graph_coupling_resolution(const Tensor& coupling, const Tensor& layout) {
  constexpr OpId op = kGraphCouplingResolution;
  check_layout_tensor(op, layout);
  // No other tensor tells the numbers of nodes and colours, so this call alone reads them and waits for the device.
  if (layout.size(0) < kLayoutHeader) fail_layout(op, layout);
  Tensor whole = layout;
  const Tensor header = torch::stable::to(torch::stable::narrow(whole, 0, 0, kLayoutHeader),
                                          torch::stable::Device(torch::headeronly::DeviceType::CPU));
  const int32_t* numbers = static_cast<const int32_t*>(header.const_data_ptr());
  const GraphSize size = {numbers[0], numbers[1], numbers[2]};
  if (size.num_nodes < 1 || size.num_edges < 0 || size.num_colors < 1 || size.num_colors > size.num_nodes ||
      layout.size(0) != layout_size(size.num_nodes, size.num_edges, size.num_colors))
    fail_layout(op, layout);
  Problem p(op, coupling, layout, size);
  p.finish(true);
  Call call(p);
  const Tensor out = call.output_per_model_or_chain();
  GraphParams params = model<GraphParams>(p, layout, size);
  call.batch().coupling(params.coupling);
  call.describe(params.sweep);
  call.launch(params, [&](Stream stream) {
    launch_graph_coupling_resolution(params, static_cast<double*>(out.mutable_data_ptr()), stream);
  });
  return out;
}

Tensor graph_fields(const Tensor& state, const Tensor& bias, const Tensor& coupling, const Tensor& layout) {
  const GraphSize size = size_of(kGraphFields, coupling, layout, state);
  Problem p(kGraphFields, coupling, layout, size, {.state = &state, .bias = &bias});
  check_graph_fields(p);
  Call call(p);
  const Tensor out = call.output(p.with_batch({p.num_units()}));
  GraphFieldsParams params = model<GraphFieldsParams>(p, layout, size);
  call.batch().coupling(params.coupling);
  call.batch().parameter(params.bias, p.nodes().bias);
  call.batch().parameter(params.state, &state);
  params.out = out.mutable_data_ptr();
  call.describe(params.sweep);
  call.launch(params, [&](Stream stream) { launch_graph_fields(params, stream); });
  return out;
}

Tensor graph_edge_sums(const Tensor& first, const Tensor& second, const Tensor& coupling, const Tensor& layout) {
  const GraphSize size = size_of(kGraphEdgeSums, coupling, layout, first);
  Problem p(kGraphEdgeSums, coupling, layout, size);
  check_graph_edge_sums(p, first, second);
  Call call(p);
  Tensor out = call.output(shape_of(coupling));
  if (!p.num_chains()) torch::stable::zero_(out);
  GraphEdgeSumsParams params = model<GraphEdgeSumsParams>(p, layout, size);
  call.batch().parameter(params.first, &first);
  call.batch().parameter(params.second, &second);
  params.out = out.mutable_data_ptr();
  call.describe(params.sweep);
  call.launch(params, [&](Stream stream) { launch_graph_edge_sums(params, stream); });
  return out;
}

}  // namespace
}  // namespace gibbs

STABLE_TORCH_LIBRARY_IMPL(GIBBS_OPS, GIBBS_OPS_KEY, m) {
  m.impl("graph_gibbs", TORCH_BOX(&gibbs::graph_sweeps<gibbs::kGraphGibbs>));
  m.impl("graph_metropolis", TORCH_BOX(&gibbs::graph_sweeps<gibbs::kGraphMetropolis>));
  m.impl("graph_gibbs_relaxed", TORCH_BOX(&gibbs::graph_gibbs_relaxed));
  m.impl("graph_gibbs_relaxed_backward", TORCH_BOX(&gibbs::graph_gibbs_relaxed_backward));
  m.impl("graph_ais", TORCH_BOX(&gibbs::graph_ais));
  m.impl("graph_tempering", TORCH_BOX(&gibbs::graph_tempering));
  m.impl("graph_moments", TORCH_BOX(&gibbs::graph_moments));
  m.impl("graph_coupling_resolution", TORCH_BOX(&gibbs::graph_coupling_resolution));
  m.impl("graph_fields", TORCH_BOX(&gibbs::graph_fields));
  m.impl("graph_edge_sums", TORCH_BOX(&gibbs::graph_edge_sums));
}
