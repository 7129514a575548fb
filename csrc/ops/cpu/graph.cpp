// SPDX-License-Identifier: Apache-2.0
// The ops on coloured graphs on the CPU, against libtorch's stable ABI. twin: csrc/ops/cuda/graph.cpp
#include "cpu/graph.h"

#include <tuple>

#include "core/graph_view.h"
#include "cpu/graph_fields.h"
#include "ops/arguments.h"
#include "ops/cpu/tensors.h"

namespace gibbs {

namespace {

// The graph that a layout describes. Every call checks, at about a nanosecond a number, that no number leads outside a tensor, because a
// layout may come from anywhere. Only gibbs_ext._C.graph_layout checks that the colouring is proper.
GraphView read_layout(OpId op, const Tensor& layout) {
  check_layout_tensor(op, layout);
  const int32_t* data = static_cast<const int32_t*>(layout.const_data_ptr());
  const int64_t size = layout.size(0);
  const auto fits = [&] {
    if (size < kLayoutHeader) return false;
    const int64_t nodes = data[0], edges = data[1], colors = data[2];
    if (nodes < 1 || nodes >= kMaxUnits || edges < 0 || colors < 1 || colors > nodes || data[3] < 0) return false;
    if (size != layout_size(nodes, edges, colors)) return false;
    const GraphView g = graph_view(data);
    const auto rises = [](const int32_t* offsets, int64_t count, int64_t last) {
      bool ok = offsets[0] == 0 && offsets[count] == last;
      for (int64_t i = 0; i < count; ++i) ok &= offsets[i] <= offsets[i + 1];
      return ok;
    };
    const auto within = [](const int32_t* values, int64_t count, int64_t limit) {
      bool ok = true;
      for (int64_t i = 0; i < count; ++i) ok &= uint32_t(values[i]) < uint32_t(limit);
      return ok;
    };
    if (!rises(g.color_offsets, colors, nodes) || !rises(g.row_offsets, nodes, 2 * edges)) return false;
    bool small = true;
    for (int64_t i = 0; i < nodes; ++i) small &= g.row_offsets[i + 1] - g.row_offsets[i] <= g.max_degree;
    return small && within(g.order, nodes, nodes) && within(g.neighbors, 2 * edges, nodes) && within(g.edge_of, 2 * edges, edges);
  };
  if (!fits()) fail_layout(op, layout);
  return graph_view(data);
}

GraphSize size_of(const GraphView& graph) { return {graph.num_nodes, graph.num_edges, graph.num_colors}; }

GraphCall describe(const Problem& p, const GraphView& graph, const Counters& counters) {
  GraphCall call;
  describe(call, p, counters);
  call.graph = graph;
  call.coupling = coupling_operand(p);
  call.bias = operand(p, p.nodes().bias);
  call.base_bias = operand(p, p.nodes().base_bias);
  call.route = graph_route();
  return call;
}

// Runs a call by rounds(forward), where forward(call, after) makes its rounds.
template <class Rounds>
void run(const Problem& p, const GraphCall& call, const Rounds& rounds) {
  Rounding rounding = {};
  check(p, rounds([&](const GraphCall& c, const AfterRound& after) { return run_graph(c, runtime(), &rounding, after); }));
  if (call.num_sweeps && call.graph.num_edges) warn_if_large(p, rounding, call.graph.max_degree, call.beta);
}
void run(const Problem& p, const GraphCall& call) {
  run(p, call, [&](const auto& forward) { return forward(call, nullptr); });
}

// The states that a call sweeps, and its clamp.
struct States {
  Bits bits, clamp;
  States(const Problem& p, GraphCall& call) : bits(pack_state(p, p.nodes())), clamp(pack_clamp(p, p.nodes())) {
    call.bits = bits.data();
    if (p.nodes().clamp) call.clamp = clamp.data();
  }
};

// graph_gibbs and graph_metropolis.
template <OpId kOp>
Tensor graph_sweeps(const Tensor& state, const Tensor& bias, const Tensor& coupling, const Tensor& layout, const Tensor& beta,
                    const Tensor& seed, const std::optional<Tensor>& clamp, const std::optional<Tensor>& chains,
                    int64_t chain_offset, int64_t sweep_offset, int64_t num_sweeps) {
  const Counters counters = {seed, beta, chains, chain_offset, sweep_offset, num_sweeps};
  const GraphView graph = read_layout(kOp, layout);
  Problem p(kOp, coupling, layout, size_of(graph), {.state = &state, .bias = &bias, .clamp = pointer(clamp)});
  check_sweeps(p, counters);
  GraphCall call = describe(p, graph, counters);
  check_unread(p, num_sweeps);

  const States states(p, call);
  call.metropolis = kOp == kGraphMetropolis;
  run(p, call);
  return unpack(p, p.nodes(), states.bits, state.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> graph_gibbs_relaxed(const Tensor& state, const Tensor& bias, const Tensor& coupling,
                                                               const Tensor& layout, const Tensor& beta, const Tensor& seed,
                                                               const std::optional<Tensor>& chains, int64_t chain_offset,
                                                               int64_t sweep_offset, int64_t num_sweeps, int64_t num_relaxed_sweeps,
                                                               int64_t relaxation, double sharpness, bool slope_gradient) {
  const Counters counters = {seed, beta, chains, chain_offset, sweep_offset, num_sweeps, num_relaxed_sweeps};
  const RelaxationArguments how = {relaxation, sharpness, slope_gradient};
  const GraphView graph = read_layout(kGraphGibbsRelaxed, layout);
  Problem p(kGraphGibbsRelaxed, coupling, layout, size_of(graph), {.state = &state, .bias = &bias});
  check_sweeps(p, counters, &how);
  GraphCall call = describe(p, graph, counters);
  set_relaxation(call, how);
  check_unread(p, num_sweeps);

  const Shape shape = p.with_batch({p.num_units()});
  const Tensor start = empty(p, shape, p.type()), relaxed = empty(p, shape, p.type()), mean = empty(p, shape, p.type()),
               fields = empty(p, p.with_batch({p.num_units()}, {num_relaxed_sweeps}), p.type());
  Bits bits = read_start(p, p.nodes(), num_sweeps, start);
  call.bits = bits.data();
  call.state = start.mutable_data_ptr();
  call.relaxed = relaxed.mutable_data_ptr();
  call.mean = mean.mutable_data_ptr();
  call.fields = fields.mutable_data_ptr();
  run(p, call);
  return {relaxed, mean, start, fields};
}

std::tuple<Tensor, Tensor, Tensor> graph_gibbs_relaxed_backward(const Tensor& grad_relaxed, const Tensor& grad_mean,
                                                                const Tensor& state, const Tensor& fields, const Tensor& coupling,
                                                                const Tensor& layout, const Tensor& beta, const Tensor& seed,
                                                                const std::optional<Tensor>& chains, int64_t chain_offset,
                                                                int64_t sweep_offset, int64_t num_sweeps, int64_t relaxation,
                                                                double sharpness, bool slope_gradient) {
  const Counters counters = {seed, beta, chains, chain_offset, sweep_offset, num_sweeps, relaxed_sweeps_of(fields)};
  const RelaxationArguments how = {relaxation, sharpness, slope_gradient};
  const GraphView graph = read_layout(kGraphGibbsRelaxedBackward, layout);
  Problem p(kGraphGibbsRelaxedBackward, coupling, layout, size_of(graph));
  const int64_t n = p.num_units();
  const std::vector<Tensor> rows = check_backward(
      p, {{"grad_relaxed", grad_relaxed, n}, {"grad_mean", grad_mean, n}, {"state", state, n}}, fields, counters, how);
  const Tensor saved = as_contiguous(fields);
  const Tensor grad_state = empty(p, p.with_batch({n}), p.type()), grad_bias = empty(p, p.with_batch({n}), p.type()),
               grad_coupling = empty(p, p.model_couplings(), p.type());
  GraphBackwardCall back{};
  back.forward = describe(p, graph, counters);
  set_relaxation(back.forward, how);
  back.grad_relaxed = rows[0].const_data_ptr();
  back.grad_mean = rows[1].const_data_ptr();
  back.forward.state = rows[2].data_ptr();
  back.forward.fields = saved.data_ptr();
  back.grad_state = grad_state.mutable_data_ptr();
  back.grad_bias = grad_bias.mutable_data_ptr();
  back.grad_coupling = grad_coupling.mutable_data_ptr();
  check(p, run_graph_backward(back, runtime()));
  return {grad_state, grad_bias, grad_coupling};
}

std::tuple<Tensor, Tensor> graph_ais(const Tensor& state, const Tensor& bias, const Tensor& coupling, const Tensor& layout,
                                     const Tensor& base_bias, const Tensor& betas, const Tensor& seed,
                                     const std::optional<Tensor>& chains, int64_t chain_offset, int64_t sweep_offset) {
  const Counters counters = {seed, betas, chains, chain_offset, sweep_offset, annealed_sweeps(kGraphAis, betas)};
  const GraphView graph = read_layout(kGraphAis, layout);
  Problem p(kGraphAis, coupling, layout, size_of(graph), {.state = &state, .bias = &bias, .base_bias = &base_bias});
  check_sweeps(p, counters);
  GraphCall call = describe(p, graph, counters);
  check_unread(p, counters.num_sweeps);

  const States states(p, call);
  const Tensor log_weights = zero_log_weights(p);
  call.log_weights = static_cast<double*>(log_weights.mutable_data_ptr());
  run(p, call);
  return {unpack(p, p.nodes(), states.bits, state.scalar_type()), log_weights};
}

std::tuple<Tensor, Tensor, Tensor> graph_tempering(const Tensor& state, const Tensor& bias, const Tensor& coupling,
                                                   const Tensor& layout, const Tensor& beta, const Tensor& seed,
                                                   const Tensor& chains, int64_t sweep_offset, int64_t sweeps_per_swap,
                                                   int64_t num_swaps, bool cluster_moves) {
  const std::optional<Tensor> numbers = chains;
  const Counters counters = {seed, beta, numbers, 0, sweep_offset, sweeps_per_swap * num_swaps};
  const GraphView graph = read_layout(kGraphTempering, layout);
  Problem p(kGraphTempering, coupling, layout, size_of(graph), {.state = &state, .bias = &bias});
  check_tempering(p, counters, sweeps_per_swap, num_swaps);
  GraphCall call = describe(p, graph, counters);
  if (cluster_moves) call.pairing = check_cluster_moves(p);
  check_unread(p, num_swaps);

  const States states(p, call);
  TemperingTensors out(p, counters, num_swaps);
  out.ladder.parts = {{call.bits, state_words(p.num_units())}};
  out.number(p, call);
  call.num_sweeps = sweeps_per_swap;
  run(p, call, [&](const auto& forward) { return run_tempering(call, out.ladder, num_swaps, forward); });
  return {unpack(p, p.nodes(), states.bits, state.scalar_type()), out.energies, out.chains_at};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> graph_moments(const Tensor& state, const Tensor& bias, const Tensor& coupling,
                                                                 const Tensor& layout, const Tensor& beta, const Tensor& seed,
                                                                 const std::optional<Tensor>& clamp,
                                                                 const std::optional<Tensor>& chains, int64_t chain_offset,
                                                                 int64_t sweep_offset, int64_t num_sweeps, int64_t sweeps_per_read,
                                                                 int64_t counted, bool best, bool metropolis) {
  const Counters counters = {seed, beta, chains, chain_offset, sweep_offset, num_sweeps};
  const GraphView graph = read_layout(kGraphMoments, layout);
  Problem p(kGraphMoments, coupling, layout, size_of(graph), {.state = &state, .bias = &bias, .clamp = pointer(clamp)});
  check_moments(p, counters, sweeps_per_read, counted);
  GraphCall call = describe(p, graph, counters);
  check_unread(p, num_sweeps);

  const States states(p, call);
  call.metropolis = metropolis;
  const Bits* const bits[] = {&states.bits};
  MomentTensors out(p, call, sweeps_per_read, counted, best, bits);
  run(p, call, [&](const auto& forward) { return run_with_reads(call, out.best_or_null(), forward); });
  return {unpack(p, p.nodes(), states.bits, state.scalar_type()), out.units[0], out.pairs,
          out.best_state(p, p.nodes(), state.scalar_type()), out.best_energy};
}

Tensor graph_coupling_resolution(const Tensor& coupling, const Tensor& layout) {
  const GraphView graph = read_layout(kGraphCouplingResolution, layout);
  Problem p(kGraphCouplingResolution, coupling, layout, size_of(graph));
  p.finish(true);
  const Tensor out = empty(p, p.with_batch({}), ScalarType::Double);
  check(p, run_graph_coupling_resolution(graph, batch(p), p.is_double(), coupling_operand(p),
                                         static_cast<double*>(out.mutable_data_ptr())));
  return out;
}

Tensor graph_fields(const Tensor& state, const Tensor& bias, const Tensor& coupling, const Tensor& layout) {
  const GraphView graph = read_layout(kGraphFields, layout);
  Problem p(kGraphFields, coupling, layout, size_of(graph), {.state = &state, .bias = &bias});
  check_graph_fields(p);
  const Tensor out = empty(p, p.with_batch({p.num_units()}), p.type());
  check(p, run_graph_fields({graph, batch(p), p.is_double(), operand(p, &state), operand(p, p.nodes().bias), coupling_operand(p),
                             out.mutable_data_ptr()},
                            runtime()));
  return out;
}

Tensor graph_edge_sums(const Tensor& first, const Tensor& second, const Tensor& coupling, const Tensor& layout) {
  const GraphView graph = read_layout(kGraphEdgeSums, layout);
  Problem p(kGraphEdgeSums, coupling, layout, size_of(graph));
  check_graph_edge_sums(p, first, second);
  const Tensor out = empty(p, shape_of(coupling), p.type());
  check(p, run_graph_edge_sums({graph, batch(p), p.is_double(), operand(p, &first), operand(p, &second), out.mutable_data_ptr()},
                               runtime()));
  return out;
}

}  // namespace
}  // namespace gibbs

STABLE_TORCH_LIBRARY_IMPL(gibbs_ext, CPU, m) {
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
