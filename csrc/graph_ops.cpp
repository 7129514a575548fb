// SPDX-License-Identifier: Apache-2.0
// Schemas, argument checks and CPU kernels of the ops on coloured graphs; see csrc/ops.cpp.
#include "arguments.h"
#include "cpu/graph_driver.h"

namespace gibbs {

namespace {

// The graph that a layout describes. Nothing in it leads outside any tensor, whoever made it: that is read again by every call, at about a
// nanosecond a number. Whether its colouring is proper, only gibbs_ext._C.graph_layout checks.
GraphView read_layout(const char* op, const Tensor& layout) {
  if (!layout.is_cpu() || layout.scalar_type() != ScalarType::Int || layout.dim() != 1 || !layout.is_contiguous())
    fail(op, "layout must be a contiguous 1-D int32 tensor on the CPU, the layout of a ColoredGraph, got ",
         name_of(layout.scalar_type()), " ", text(shape_of(layout)));
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
  if (!fits()) fail(op, "layout must be the layout of a ColoredGraph, got ", size, " numbers that are none");
  return graph_view(data);
}

class GraphProblem : public Problem {
 public:
  GraphProblem(const char* op, const Tensor& coupling, const Tensor& layout)
      : Problem(op, "coupling", coupling, 1, "[..., num_edges]"), graph(read_layout(op, layout)) {
    const Tensor& c = this->coupling();
    if (c.size(c.dim() - 1) != graph.num_edges)
      fail(op, "coupling must have shape [..., ", graph.num_edges, "], one for each edge of graph, got ", text(shape_of(coupling)));
  }
  // What else has one value for each unit says so in terms of the graph.
  Tensor parameter(const char* name, const Tensor& t) { return units(name, t), Problem::parameter(name, t, graph.num_nodes); }
  void state(const char* name, const Tensor& t) { units(name, t), Problem::state(name, t, graph.num_nodes); }
  void mask(const char* name, const Tensor& t) { units(name, t), Problem::mask(name, t, graph.num_nodes); }

  GraphView graph;

 private:
  void units(const char* name, const Tensor& t) const {
    if (t.dim() < 1 || t.size(t.dim() - 1) != graph.num_nodes)
      fail(op(), name, " must have shape [..., ", graph.num_nodes, "], one for each node of graph, got ", text(shape_of(t)));
  }
};

GraphCall describe(const GraphProblem& p) {
  GraphCall call;
  call.graph = p.graph;
  call.batch = p.batch;
  call.is_double = p.is_double();
  call.coupling = p.coupling_operand();
  call.route = graph_route();
  return call;
}

void run(const char* op, const GraphCall& call) {
  double resolution = 0;
  check(op, run_graph(call, runtime(), &resolution));
  if (call.num_sweeps && call.graph.num_edges) warn_of_resolution(op, "coupling", call, resolution, call.graph.max_degree);
}

// What the kernels do not come to read.
void check_unread(const char* op, const GraphProblem& p, int64_t num_sweeps, const Tensor& bias,
                  const Tensor* base_bias = nullptr) {
  if (num_sweeps && p.num_chains()) return;
  check_finite(op, "bias", bias);
  if (base_bias) check_finite(op, "base_bias", *base_bias);
  if (!p.num_chains()) check_finite(op, "coupling", p.coupling());
}

Tensor graph_gibbs(const Tensor& state, const Tensor& bias, const Tensor& coupling, const Tensor& layout, const Tensor& beta,
                   const Tensor& seed, const std::optional<Tensor>& clamp, const std::optional<Tensor>& chains,
                   int64_t chain_offset, int64_t sweep_offset, int64_t num_sweeps) {
  constexpr const char* op = "graph_gibbs";
  GraphProblem p(op, coupling, layout);
  const int64_t n = p.graph.num_nodes;
  const Tensor parameter = p.parameter("bias", bias);
  p.state("state", state);
  if (clamp) p.mask("clamp", *clamp);
  if (chains) p.chain_numbers(*chains);
  p.finish(false);
  GraphCall call = describe(p);
  call.bias = p.operand(parameter);
  set_counters(op, call, p, seed, chains, chain_offset, sweep_offset, num_sweeps, 0);
  set_beta(op, "beta", call, beta, num_sweeps);
  check_unread(op, p, num_sweeps, parameter);

  Bits bits = pack(op, "state", p, state, n);
  const Bits mask = clamp ? pack(op, "clamp", p, *clamp, n) : Bits();
  call.bits = bits.data();
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
  GraphProblem p(op, coupling, layout);
  const int64_t n = p.graph.num_nodes;
  const Tensor parameter = p.parameter("bias", bias);
  p.state("state", state);
  if (chains) p.chain_numbers(*chains);
  p.finish(false);
  if (num_relaxed_sweeps < 1) fail(op, "num_relaxed_sweeps must be at least 1, got ", num_relaxed_sweeps);
  GraphCall call = describe(p);
  call.bias = p.operand(parameter);
  set_counters(op, call, p, seed, chains, chain_offset, sweep_offset, num_sweeps, num_relaxed_sweeps);
  set_beta(op, "beta", call, beta, num_sweeps + num_relaxed_sweeps);
  check_unread(op, p, num_sweeps, parameter);
  check_relaxation(op, call, relaxation, sharpness, slope_gradient);

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
  GraphProblem p(op, coupling, layout);
  const int64_t n = p.graph.num_nodes;
  const Tensor* inputs[] = {&grad_relaxed, &grad_mean, &state};
  const char* names[] = {"grad_relaxed", "grad_mean", "state"};
  const ScalarType type = p.coupling().scalar_type();
  for (int i = 0; i < 3; ++i) {
    if (inputs[i]->scalar_type() != type)
      fail(op, names[i], " must be ", name_of(type), ", got ", name_of(inputs[i]->scalar_type()));
    p.state(names[i], *inputs[i]);
  }
  if (chains) p.chain_numbers(*chains);
  p.finish(true);
  const int64_t num_relaxed_sweeps = fields.dim() ? fields.size(0) : 0;
  const Shape shape = p.with_batch({n});
  if (fields.scalar_type() != type || !fields.is_cpu() || num_relaxed_sweeps < 1 ||
      shape_of(fields) != p.with_batch({n}, {num_relaxed_sweeps}))
    fail(op, "fields must be the forward op's output, of shape ", text(p.with_batch({n}, {-1})), ", got ", text(shape_of(fields)));
  const Tensor gr = whole_rows(op, grad_relaxed, shape), gm = whole_rows(op, grad_mean, shape),
               start = whole_rows(op, state, shape), saved = torch::stable::contiguous(fields);
  const auto output = [&](const Shape& s) { return empty_like_batch(p.coupling(), s, type); };
  const Tensor grad_state = output(shape), grad_bias = output(shape), grad_coupling = output(shape_of(coupling));
  GraphBackwardCall back{};
  back.forward = describe(p);
  set_counters(op, back.forward, p, seed, chains, chain_offset, sweep_offset, num_sweeps, num_relaxed_sweeps);
  set_beta(op, "beta", back.forward, beta, num_sweeps + num_relaxed_sweeps);
  check_relaxation(op, back.forward, relaxation, sharpness, slope_gradient);
  back.forward.state = start.data_ptr();
  back.forward.fields = saved.data_ptr();
  back.grad_relaxed = gr.const_data_ptr();
  back.grad_mean = gm.const_data_ptr();
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
  GraphProblem p(op, coupling, layout);
  const int64_t n = p.graph.num_nodes;
  const Tensor parameter = p.parameter("bias", bias), base = p.parameter("base_bias", base_bias);
  p.state("state", state);
  if (chains) p.chain_numbers(*chains);
  p.finish(false);
  if (betas.dim() != 1 || betas.size(0) < 1)
    fail(op, "betas must be a 1-D float64 tensor of at least 1 value, got ", text(shape_of(betas)));
  const int64_t num_sweeps = betas.size(0) - 1;
  GraphCall call = describe(p);
  call.bias = p.operand(parameter);
  call.base_bias = p.operand(base);
  set_counters(op, call, p, seed, chains, chain_offset, sweep_offset, num_sweeps, 0);
  set_beta(op, "betas", call, betas, num_sweeps + 1);  // the starting one, and one a sweep
  check_unread(op, p, num_sweeps, parameter, &base);
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
  GraphProblem p(op, coupling, layout);
  p.finish(true);
  const Tensor out = empty_like_batch(p.coupling(), p.with_batch({}), ScalarType::Double);
  check(op, run_graph_coupling_resolution(p.graph, p.batch, p.is_double(), p.coupling_operand(),
                                          static_cast<double*>(out.mutable_data_ptr())));
  return out;
}

}  // namespace
}  // namespace gibbs

STABLE_TORCH_LIBRARY_FRAGMENT(gibbs_ext, m) {
  m.def(
      "graph_gibbs(Tensor state, Tensor bias, Tensor coupling, Tensor layout, Tensor beta, Tensor seed, Tensor? clamp, "
      "Tensor? chains, int chain_offset, int sweep_offset, int num_sweeps) -> Tensor");
  m.def(
      "graph_gibbs_relaxed(Tensor state, Tensor bias, Tensor coupling, Tensor layout, Tensor beta, Tensor seed, Tensor? chains, "
      "int chain_offset, int sweep_offset, int num_sweeps, int num_relaxed_sweeps, int relaxation, float sharpness, "
      "bool slope_gradient) -> (Tensor relaxed, Tensor mean, Tensor start, Tensor fields)");
  m.def(
      "graph_gibbs_relaxed_backward(Tensor grad_relaxed, Tensor grad_mean, Tensor state, Tensor fields, Tensor coupling, "
      "Tensor layout, Tensor beta, Tensor seed, Tensor? chains, int chain_offset, int sweep_offset, int num_sweeps, "
      "int relaxation, float sharpness, bool slope_gradient) -> (Tensor grad_state, Tensor grad_bias, Tensor grad_coupling)");
  m.def(
      "graph_ais(Tensor state, Tensor bias, Tensor coupling, Tensor layout, Tensor base_bias, Tensor betas, Tensor seed, "
      "Tensor? chains, int chain_offset, int sweep_offset) -> (Tensor state_out, Tensor log_weights)");
  m.def("graph_coupling_resolution(Tensor coupling, Tensor layout) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gibbs_ext, CPU, m) {
  m.impl("graph_gibbs", TORCH_BOX(&gibbs::graph_gibbs));
  m.impl("graph_gibbs_relaxed", TORCH_BOX(&gibbs::graph_gibbs_relaxed));
  m.impl("graph_gibbs_relaxed_backward", TORCH_BOX(&gibbs::graph_gibbs_relaxed_backward));
  m.impl("graph_ais", TORCH_BOX(&gibbs::graph_ais));
  m.impl("graph_coupling_resolution", TORCH_BOX(&gibbs::graph_coupling_resolution));
}
