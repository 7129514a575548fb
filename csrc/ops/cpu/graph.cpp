// SPDX-License-Identifier: Apache-2.0
// Schemas, argument checks and CPU kernels of the ops on coloured graphs; see csrc/ops/cpu/bipartite.cpp.
#include "cpu/graph.h"
#include "cpu/graph_fields.h"
#include "ops/cpu/tensors.h"
#include "ops/graph_arguments.h"

namespace gibbs {

namespace {

// The graph that a layout describes. Nothing in it leads outside any tensor, whoever made it: that is read again by every call, at about a
// nanosecond a number. Whether its colouring is proper, only gibbs_ext._C.graph_layout checks.
GraphView read_layout(const char* op, const Tensor& layout) {
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

class CpuGraphProblem : public GraphProblem {
 public:
  CpuGraphProblem(const char* op, const Tensor& coupling, const Tensor& layout)
      : CpuGraphProblem(op, coupling, layout, read_layout(op, layout)) {}
  GraphView graph;

 private:
  CpuGraphProblem(const char* op, const Tensor& coupling, const Tensor& layout, const GraphView& view)
      : GraphProblem(op, coupling, layout, {view.num_nodes, view.num_edges, view.num_colors}), graph(view) {}
};

GraphCall describe(const CpuGraphProblem& p, const Counters& counters, const char* beta_name, const Tensor& beta) {
  GraphCall call;
  call.graph = p.graph;
  call.batch = p.batch;
  call.is_double = p.is_double();
  call.coupling = p.coupling_operand();
  call.route = graph_route();
  set_counters(p.op(), call, p, counters);
  call.beta = read_beta(p.op(), beta_name, beta);
  return call;
}

void run(const char* op, const GraphCall& call) {
  Rounding rounding = {};
  check(op, run_graph(call, runtime(), &rounding));
  if (call.num_sweeps && call.graph.num_edges) warn_if_large(op, "coupling", rounding, call.graph.max_degree, call.beta);
}

// What the kernels do not come to read.
void check_unread(const char* op, const CpuGraphProblem& p, int64_t num_sweeps, const Tensor& bias,
                  const Tensor* base_bias = nullptr) {
  if (num_sweeps && p.num_chains()) return;
  check_finite(op, "bias", bias);
  if (base_bias) check_finite(op, "base_bias", *base_bias);
  if (!p.num_chains()) check_finite(op, "coupling", p.coupling());
}

// graph_gibbs and graph_metropolis.
template <bool kMetropolis>
Tensor graph_sweeps(const Tensor& state, const Tensor& bias, const Tensor& coupling, const Tensor& layout, const Tensor& beta,
                    const Tensor& seed, const std::optional<Tensor>& clamp, const std::optional<Tensor>& chains,
                    int64_t chain_offset, int64_t sweep_offset, int64_t num_sweeps) {
  constexpr const char* op = kMetropolis ? "graph_metropolis" : "graph_gibbs";
  const Counters counters = {seed, chains, chain_offset, sweep_offset, num_sweeps, 0};
  CpuGraphProblem p(op, coupling, layout);
  const int64_t n = p.graph.num_nodes;
  const Tensor parameter = check_graph_gibbs(p, state, bias, beta, clamp, counters);
  GraphCall call = describe(p, counters, "beta", beta);
  call.bias = p.operand(parameter);
  check_unread(op, p, num_sweeps, parameter);

  Bits bits = pack(op, "state", p, state, n);
  const Bits mask = clamp ? pack(op, "clamp", p, *clamp, n) : Bits();
  call.bits = bits.data();
  call.metropolis = kMetropolis;
  if (clamp) call.clamp = mask.data();
  run(op, call);
  const Tensor out = empty_like_batch(state, p.with_batch({n}), state.scalar_type());
  unpack(bits, n, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> graph_gibbs_relaxed(const Tensor& state, const Tensor& bias, const Tensor& coupling,
                                                               const Tensor& layout, const Tensor& beta, const Tensor& seed,
                                                               const std::optional<Tensor>& chains, int64_t chain_offset,
                                                               int64_t sweep_offset, int64_t num_sweeps, int64_t num_relaxed_sweeps,
                                                               int64_t relaxation, double sharpness, bool slope_gradient) {
  constexpr const char* op = "graph_gibbs_relaxed";
  const Counters counters = {seed, chains, chain_offset, sweep_offset, num_sweeps, num_relaxed_sweeps};
  const RelaxationArguments how = {relaxation, sharpness, slope_gradient};
  CpuGraphProblem p(op, coupling, layout);
  const int64_t n = p.graph.num_nodes;
  const Tensor parameter = check_graph_gibbs_relaxed(p, state, bias, beta, counters, how);
  GraphCall call = describe(p, counters, "beta", beta);
  call.bias = p.operand(parameter);
  set_relaxation(call, how);
  check_unread(op, p, num_sweeps, parameter);

  const ScalarType type = p.coupling().scalar_type();
  const auto output = [&](const Shape& shape) { return empty_like_batch(p.coupling(), shape, type); };
  const Tensor start = output(p.with_batch({n})), relaxed = output(p.with_batch({n})), mean = output(p.with_batch({n})),
               fields = output(p.with_batch({n}, {num_relaxed_sweeps}));
  Bits bits = read_start(op, "state", p, state, n, num_sweeps, start);
  call.bits = bits.data();
  call.state = start.mutable_data_ptr();
  call.relaxed = relaxed.mutable_data_ptr();
  call.mean = mean.mutable_data_ptr();
  call.fields = fields.mutable_data_ptr();
  run(op, call);
  return {relaxed, mean, start, fields};
}

std::tuple<Tensor, Tensor, Tensor> graph_gibbs_relaxed_backward(const Tensor& grad_relaxed, const Tensor& grad_mean,
                                                                const Tensor& state, const Tensor& fields, const Tensor& coupling,
                                                                const Tensor& layout, const Tensor& beta, const Tensor& seed,
                                                                const std::optional<Tensor>& chains, int64_t chain_offset,
                                                                int64_t sweep_offset, int64_t num_sweeps, int64_t relaxation,
                                                                double sharpness, bool slope_gradient) {
  constexpr const char* op = "graph_gibbs_relaxed_backward";
  const Counters counters = {seed, chains, chain_offset, sweep_offset, num_sweeps, relaxed_sweeps_of(fields)};
  const RelaxationArguments how = {relaxation, sharpness, slope_gradient};
  CpuGraphProblem p(op, coupling, layout);
  const GraphBackwardTensors t = check_graph_gibbs_relaxed_backward(p, grad_relaxed, grad_mean, state, fields, beta, counters, how);
  const Shape shape = p.with_batch({p.graph.num_nodes});
  const ScalarType type = p.coupling().scalar_type();
  const auto output = [&](const Shape& s) { return empty_like_batch(p.coupling(), s, type); };
  const Tensor grad_state = output(shape), grad_bias = output(shape), grad_coupling = output(shape_of(coupling));
  GraphBackwardCall back{};
  back.forward = describe(p, counters, "beta", beta);
  set_relaxation(back.forward, how);
  back.forward.state = t.state.data_ptr();
  back.forward.fields = t.fields.data_ptr();
  back.grad_relaxed = t.grad_relaxed.const_data_ptr();
  back.grad_mean = t.grad_mean.const_data_ptr();
  back.grad_state = grad_state.mutable_data_ptr();
  back.grad_bias = grad_bias.mutable_data_ptr();
  back.grad_coupling = grad_coupling.mutable_data_ptr();
  check(op, run_graph_backward(back, runtime()));
  return {grad_state, grad_bias, grad_coupling};
}

std::tuple<Tensor, Tensor> graph_ais(const Tensor& state, const Tensor& bias, const Tensor& coupling, const Tensor& layout,
                                     const Tensor& base_bias, const Tensor& betas, const Tensor& seed,
                                     const std::optional<Tensor>& chains, int64_t chain_offset, int64_t sweep_offset) {
  constexpr const char* op = "graph_ais";
  const Counters counters = {seed, chains, chain_offset, sweep_offset, annealed_sweeps(op, betas), 0};
  CpuGraphProblem p(op, coupling, layout);
  const int64_t n = p.graph.num_nodes;
  const GraphAnnealedTensors t = check_graph_ais(p, state, bias, base_bias, betas, counters);
  GraphCall call = describe(p, counters, "betas", betas);
  call.bias = p.operand(t.bias);
  call.base_bias = p.operand(t.base_bias);
  check_unread(op, p, counters.num_sweeps, t.bias, &t.base_bias);
  Bits bits = pack(op, "state", p, state, n);
  const Tensor log_weights = empty_like_batch(p.coupling(), p.with_batch({}), ScalarType::Double);
  call.log_weights = static_cast<double*>(log_weights.mutable_data_ptr());
  std::memset(call.log_weights, 0, size_t(p.num_chains()) * sizeof(double));
  call.bits = bits.data();
  run(op, call);
  const Tensor out = empty_like_batch(state, p.with_batch({n}), state.scalar_type());
  unpack(bits, n, out);
  return {out, log_weights};
}

Tensor graph_coupling_resolution(const Tensor& coupling, const Tensor& layout) {
  constexpr const char* op = "graph_coupling_resolution";
  CpuGraphProblem p(op, coupling, layout);
  p.finish(true);
  const Tensor out = empty_like_batch(p.coupling(), p.with_batch({}), ScalarType::Double);
  check(op, run_graph_coupling_resolution(p.graph, p.batch, p.is_double(), p.coupling_operand(),
                                          static_cast<double*>(out.mutable_data_ptr())));
  return out;
}

Tensor graph_fields(const Tensor& state, const Tensor& bias, const Tensor& coupling, const Tensor& layout) {
  CpuGraphProblem p("graph_fields", coupling, layout);
  const Tensor parameter = check_graph_fields(p, state, bias);
  const Tensor out = empty_like_batch(p.coupling(), p.with_batch({p.graph.num_nodes}), p.coupling().scalar_type());
  check(p.op(), run_graph_fields({p.graph, p.batch, p.is_double(), p.operand(state), p.operand(parameter), p.coupling_operand(),
                                  out.mutable_data_ptr()},
                                 runtime()));
  return out;
}

Tensor graph_edge_sums(const Tensor& first, const Tensor& second, const Tensor& coupling, const Tensor& layout) {
  CpuGraphProblem p("graph_edge_sums", coupling, layout);
  check_graph_edge_sums(p, first, second);
  const Tensor out = empty_like_batch(p.coupling(), shape_of(coupling), p.coupling().scalar_type());
  check(p.op(), run_graph_edge_sums({p.graph, p.batch, p.is_double(), p.operand(first), p.operand(second), out.mutable_data_ptr()},
                                    runtime()));
  return out;
}

}  // namespace
}  // namespace gibbs

STABLE_TORCH_LIBRARY_IMPL(gibbs_ext, CPU, m) {
  m.impl("graph_gibbs", TORCH_BOX(&gibbs::graph_sweeps<false>));
  m.impl("graph_metropolis", TORCH_BOX(&gibbs::graph_sweeps<true>));
  m.impl("graph_gibbs_relaxed", TORCH_BOX(&gibbs::graph_gibbs_relaxed));
  m.impl("graph_gibbs_relaxed_backward", TORCH_BOX(&gibbs::graph_gibbs_relaxed_backward));
  m.impl("graph_ais", TORCH_BOX(&gibbs::graph_ais));
  m.impl("graph_coupling_resolution", TORCH_BOX(&gibbs::graph_coupling_resolution));
  m.impl("graph_fields", TORCH_BOX(&gibbs::graph_fields));
  m.impl("graph_edge_sums", TORCH_BOX(&gibbs::graph_edge_sums));
}
