// SPDX-License-Identifier: Apache-2.0
// Schemas, argument checks and CPU kernels of the ops, against libtorch's stable ABI. What each op computes: gibbs_ext/ops.py and
// gibbs_ext/functional.py (docstrings), csrc/README.md. Every message starts with the op's name and names the argument.
#include "arguments.h"
#include "cpu/bipartite_driver.h"

namespace gibbs {

Hooks hooks;

namespace {

class BipartiteProblem : public Problem {
 public:
  BipartiteProblem(const char* op, const Tensor& weight) : Problem(op, "weight", weight, 2, "[..., n1, n2]") {
    n1 = coupling().size(coupling().dim() - 2);
    n2 = coupling().size(coupling().dim() - 1);
    if (n1 < 1 || n2 < 1) fail(op, "weight must have at least one unit on each side, got ", text(shape_of(weight)));
    if (n1 + n2 >= kMaxUnits) fail(op, "weight must have fewer than 2^30 units, got ", text(shape_of(weight)));
  }
  int64_t n1, n2;
};

void run(const char* op, const BipartiteCall& call) {
  double resolution = 0;
  check(op, run_bipartite(call, runtime(), &resolution));
  if (call.num_sweeps) warn_of_resolution(op, "weight", call, resolution, std::max(call.n1, call.n2));
}

BipartiteCall describe(const BipartiteProblem& p, const Tensor& left_bias, const Tensor& right_bias) {
  BipartiteCall call;
  call.n1 = p.n1, call.n2 = p.n2;
  call.batch = p.batch;
  call.is_double = p.is_double();
  call.weight = p.coupling_operand();
  call.left_bias = p.operand(left_bias);
  call.right_bias = p.operand(right_bias);
  return call;
}

std::tuple<Tensor, Tensor> bipartite_gibbs(const Tensor& left, const Tensor& left_bias, const Tensor& right_bias,
                                           const Tensor& weight, const Tensor& beta, const Tensor& seed,
                                           const std::optional<Tensor>& right, const std::optional<Tensor>& clamp_left,
                                           const std::optional<Tensor>& clamp_right, const std::optional<Tensor>& chains,
                                           int64_t chain_offset, int64_t sweep_offset, int64_t num_sweeps) {
  constexpr const char* op = "bipartite_gibbs";
  BipartiteProblem p(op, weight);
  const Tensor left_parameter = p.parameter("left_bias", left_bias, p.n1),
               right_parameter = p.parameter("right_bias", right_bias, p.n2);
  p.state("left", left, p.n1);
  if (right) p.state("right", *right, p.n2);
  if (clamp_left) p.mask("clamp_left", *clamp_left, p.n1);
  if (clamp_right) p.mask("clamp_right", *clamp_right, p.n2);
  if (clamp_right && !right) fail(op, "right must be given when clamp_right is, got none");
  if (chains) p.chain_numbers(*chains);
  p.finish(false);
  BipartiteCall call = describe(p, left_parameter, right_parameter);
  set_counters(op, call, p, seed, chains, chain_offset, sweep_offset, num_sweeps, 0);
  set_beta(op, "beta", call, beta, num_sweeps);
  if (!num_sweeps || !p.num_chains()) {
    check_finite(op, "left_bias", left_parameter);
    check_finite(op, "right_bias", right_parameter);
    if (!p.num_chains()) check_finite(op, "weight", p.coupling());
  }

  Bits left_bits = pack(op, "left", p, left, p.n1);
  Bits right_bits = right ? pack(op, "right", p, *right, p.n2) : Bits(size_t(p.num_chains() * state_words(p.n2)));
  const Bits left_mask = clamp_left ? pack(op, "clamp_left", p, *clamp_left, p.n1) : Bits();
  const Bits right_mask = clamp_right ? pack(op, "clamp_right", p, *clamp_right, p.n2) : Bits();
  call.left_bits = left_bits.data();
  call.right_bits = right_bits.data();
  if (clamp_left) call.clamp_left = left_mask.data();
  if (clamp_right) call.clamp_right = right_mask.data();
  run(op, call);

  const Tensor left_out = empty_like_batch(left, p.with_batch({p.n1}), left.scalar_type());
  const Tensor right_out = empty_like_batch(left, p.with_batch({p.n2}), left.scalar_type());
  unpack(left_bits, p.n1, left_out);
  unpack(right_bits, p.n2, right_out);
  return {left_out, right_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bipartite_gibbs_relaxed(
    const Tensor& left, const Tensor& left_bias, const Tensor& right_bias, const Tensor& weight, const Tensor& beta,
    const Tensor& seed, const std::optional<Tensor>& chains, int64_t chain_offset, int64_t sweep_offset, int64_t num_sweeps,
    int64_t num_relaxed_sweeps, int64_t relaxation, double sharpness, bool slope_gradient) {
  constexpr const char* op = "bipartite_gibbs_relaxed";
  BipartiteProblem p(op, weight);
  const Tensor left_parameter = p.parameter("left_bias", left_bias, p.n1),
               right_parameter = p.parameter("right_bias", right_bias, p.n2);
  p.state("left", left, p.n1);
  if (chains) p.chain_numbers(*chains);
  p.finish(false);
  if (num_relaxed_sweeps < 1) fail(op, "num_relaxed_sweeps must be at least 1, got ", num_relaxed_sweeps);
  BipartiteCall call = describe(p, left_parameter, right_parameter);
  set_counters(op, call, p, seed, chains, chain_offset, sweep_offset, num_sweeps, num_relaxed_sweeps);
  set_beta(op, "beta", call, beta, num_sweeps + num_relaxed_sweeps);
  if (!num_sweeps || !p.num_chains()) {
    check_finite(op, "left_bias", left_parameter);
    check_finite(op, "right_bias", right_parameter);
    if (!p.num_chains()) check_finite(op, "weight", p.coupling());
  }
  check_relaxation(op, call, relaxation, sharpness, slope_gradient);

  const ScalarType type = p.coupling().scalar_type();
  const auto output = [&](const Shape& shape) { return empty_like_batch(p.coupling(), shape, type); };
  const Tensor state = output(p.with_batch({p.n1})), left_out = output(p.with_batch({p.n1})),
               right_out = output(p.with_batch({p.n2})), mean = output(p.with_batch({p.n1})),
               fields = output(p.with_batch({p.n2 + p.n1}, {num_relaxed_sweeps}));
  Bits left_bits = read_start(op, "left", p, left, p.n1, num_sweeps, state);
  Bits right_bits(num_sweeps ? size_t(p.num_chains() * state_words(p.n2)) : 0);
  call.left_bits = left_bits.data();
  call.right_bits = right_bits.data();
  call.state = state.mutable_data_ptr();
  call.left = left_out.mutable_data_ptr();
  call.right = right_out.mutable_data_ptr();
  call.left_mean = mean.mutable_data_ptr();
  call.fields = fields.mutable_data_ptr();
  run(op, call);
  return {left_out, right_out, mean, state, fields};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bipartite_gibbs_relaxed_backward(
    const Tensor& grad_left, const Tensor& grad_right, const Tensor& grad_left_mean, const Tensor& state, const Tensor& fields,
    const Tensor& weight, const Tensor& beta, const Tensor& seed, const std::optional<Tensor>& chains, int64_t chain_offset,
    int64_t sweep_offset, int64_t num_sweeps, int64_t relaxation, double sharpness, bool slope_gradient) {
  constexpr const char* op = "bipartite_gibbs_relaxed_backward";
  BipartiteProblem p(op, weight);
  const Tensor* sides[] = {&grad_left, &grad_right, &grad_left_mean, &state};
  const char* names[] = {"grad_left", "grad_right", "grad_left_mean", "state"};
  const ScalarType type = p.coupling().scalar_type();
  for (int i = 0; i < 4; ++i) {
    if (sides[i]->scalar_type() != type) fail(op, names[i], " must be ", name_of(type), ", got ", name_of(sides[i]->scalar_type()));
    p.state(names[i], *sides[i], i == 1 ? p.n2 : p.n1);
  }
  if (chains) p.chain_numbers(*chains);
  p.finish(true);
  const int64_t num_relaxed_sweeps = fields.dim() ? fields.size(0) : 0;
  if (fields.scalar_type() != type || !fields.is_cpu() || num_relaxed_sweeps < 1 ||
      shape_of(fields) != p.with_batch({p.n2 + p.n1}, {num_relaxed_sweeps}))
    fail(op, "fields must be the forward op's output, of shape ", text(p.with_batch({p.n2 + p.n1}, {-1})), ", got ",
         text(shape_of(fields)));
  const Shape left_shape = p.with_batch({p.n1}), right_shape = p.with_batch({p.n2});
  const Tensor gl = whole_rows(op, grad_left, left_shape), gr = whole_rows(op, grad_right, right_shape),
               gm = whole_rows(op, grad_left_mean, left_shape), start = whole_rows(op, state, left_shape),
               saved = torch::stable::contiguous(fields);
  const auto output = [&](const Shape& shape) { return empty_like_batch(p.coupling(), shape, type); };
  const Tensor grad_state = output(left_shape), grad_left_bias = output(left_shape), grad_right_bias = output(right_shape),
               grad_weight = output(shape_of(weight));
  BipartiteBackwardCall back{};
  back.forward.n1 = p.n1, back.forward.n2 = p.n2;
  back.forward.batch = p.batch;
  back.forward.is_double = p.is_double();
  back.forward.weight = p.coupling_operand();
  set_counters(op, back.forward, p, seed, chains, chain_offset, sweep_offset, num_sweeps, num_relaxed_sweeps);
  set_beta(op, "beta", back.forward, beta, num_sweeps + num_relaxed_sweeps);
  check_relaxation(op, back.forward, relaxation, sharpness, slope_gradient);
  back.forward.state = start.data_ptr();
  back.forward.fields = saved.data_ptr();
  back.grad_left = gl.const_data_ptr();
  back.grad_right = gr.const_data_ptr();
  back.grad_left_mean = gm.const_data_ptr();
  back.grad_state = grad_state.mutable_data_ptr();
  back.grad_left_bias = grad_left_bias.mutable_data_ptr();
  back.grad_right_bias = grad_right_bias.mutable_data_ptr();
  back.grad_weight = grad_weight.mutable_data_ptr();
  back.needs_grad_state = num_sweeps == 0;
  check(op, run_bipartite_backward(back, runtime()));
  return {grad_state, grad_left_bias, grad_right_bias, grad_weight};
}

std::tuple<Tensor, Tensor, Tensor> bipartite_ais(const Tensor& left, const Tensor& left_bias, const Tensor& right_bias,
                                                 const Tensor& weight, const Tensor& base_left_bias, const Tensor& base_right_bias,
                                                 const Tensor& betas, const Tensor& seed, const std::optional<Tensor>& chains,
                                                 int64_t chain_offset, int64_t sweep_offset) {
  constexpr const char* op = "bipartite_ais";
  BipartiteProblem p(op, weight);
  const Tensor left_parameter = p.parameter("left_bias", left_bias, p.n1),
               right_parameter = p.parameter("right_bias", right_bias, p.n2);
  const Tensor base_left = p.parameter("base_left_bias", base_left_bias, p.n1),
               base_right = p.parameter("base_right_bias", base_right_bias, p.n2);
  p.state("left", left, p.n1);
  if (chains) p.chain_numbers(*chains);
  p.finish(false);
  if (betas.dim() != 1 || betas.size(0) < 1)
    fail(op, "betas must be a 1-D float64 tensor of at least 1 value, got ", text(shape_of(betas)));
  const int64_t num_sweeps = betas.size(0) - 1;
  BipartiteCall call = describe(p, left_parameter, right_parameter);
  call.base_left_bias = p.operand(base_left);
  call.base_right_bias = p.operand(base_right);
  set_counters(op, call, p, seed, chains, chain_offset, sweep_offset, num_sweeps, 0);
  set_beta(op, "betas", call, betas, num_sweeps + 1);  // the starting one, and one a sweep
  if (!num_sweeps || !p.num_chains()) {
    check_finite(op, "left_bias", left_parameter);
    check_finite(op, "right_bias", right_parameter);
    if (!p.num_chains()) check_finite(op, "weight", p.coupling());
    check_finite(op, "base_left_bias", base_left);
    check_finite(op, "base_right_bias", base_right);
  }
  Bits left_bits = pack(op, "left", p, left, p.n1), right_bits(size_t(p.num_chains() * state_words(p.n2)));
  const Tensor log_weights = empty_like_batch(p.coupling(), p.with_batch({}), ScalarType::Double);
  call.log_weights = static_cast<double*>(log_weights.mutable_data_ptr());
  std::memset(call.log_weights, 0, size_t(p.num_chains()) * sizeof(double));
  call.left_bits = left_bits.data();
  call.right_bits = right_bits.data();
  run(op, call);
  const Tensor left_out = empty_like_batch(left, p.with_batch({p.n1}), left.scalar_type());
  const Tensor right_out = empty_like_batch(left, p.with_batch({p.n2}), left.scalar_type());
  unpack(left_bits, p.n1, left_out);
  unpack(right_bits, p.n2, right_out);
  return {left_out, right_out, log_weights};
}

Tensor coupling_resolution(const Tensor& weight) {
  constexpr const char* op = "coupling_resolution";
  BipartiteProblem p(op, weight);
  p.finish(true);
  const Tensor out = empty_like_batch(p.coupling(), p.with_batch({}), ScalarType::Double);
  check(op, run_coupling_resolution(p.n1, p.n2, p.batch, p.is_double(), p.coupling_operand(),
                                    static_cast<double*>(out.mutable_data_ptr())));
  return out;
}

}  // namespace
}  // namespace gibbs

STABLE_TORCH_LIBRARY(gibbs_ext, m) {
  m.def(
      "bipartite_gibbs(Tensor left, Tensor left_bias, Tensor right_bias, Tensor weight, Tensor beta, Tensor seed, Tensor? right, "
      "Tensor? clamp_left, Tensor? clamp_right, Tensor? chains, int chain_offset, int sweep_offset, int num_sweeps) "
      "-> (Tensor left, Tensor right)");
  m.def(
      "bipartite_gibbs_relaxed(Tensor left, Tensor left_bias, Tensor right_bias, Tensor weight, Tensor beta, Tensor seed, "
      "Tensor? chains, int chain_offset, int sweep_offset, int num_sweeps, int num_relaxed_sweeps, int relaxation, float "
      "sharpness, "
      "bool slope_gradient) -> (Tensor left, Tensor right, Tensor left_mean, Tensor state, Tensor fields)");
  m.def(
      "bipartite_gibbs_relaxed_backward(Tensor grad_left, Tensor grad_right, Tensor grad_left_mean, Tensor state, Tensor fields, "
      "Tensor weight, Tensor beta, Tensor seed, Tensor? chains, int chain_offset, int sweep_offset, int num_sweeps, int "
      "relaxation, "
      "float sharpness, bool slope_gradient) -> (Tensor grad_state, Tensor grad_left_bias, Tensor grad_right_bias, Tensor "
      "grad_weight)");
  m.def(
      "bipartite_ais(Tensor left, Tensor left_bias, Tensor right_bias, Tensor weight, Tensor base_left_bias, Tensor "
      "base_right_bias, "
      "Tensor betas, Tensor seed, Tensor? chains, int chain_offset, int sweep_offset) -> (Tensor left, Tensor right, Tensor "
      "log_weights)");
  m.def("coupling_resolution(Tensor weight) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gibbs_ext, CPU, m) {
  m.impl("bipartite_gibbs", TORCH_BOX(&gibbs::bipartite_gibbs));
  m.impl("bipartite_gibbs_relaxed", TORCH_BOX(&gibbs::bipartite_gibbs_relaxed));
  m.impl("bipartite_gibbs_relaxed_backward", TORCH_BOX(&gibbs::bipartite_gibbs_relaxed_backward));
  m.impl("bipartite_ais", TORCH_BOX(&gibbs::bipartite_ais));
  m.impl("coupling_resolution", TORCH_BOX(&gibbs::coupling_resolution));
}
