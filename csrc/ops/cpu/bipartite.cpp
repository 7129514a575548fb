// SPDX-License-Identifier: Apache-2.0
// Schemas, argument checks and CPU kernels of the ops, against libtorch's stable ABI. What each op computes: gibbs_ext/ops.py and
// gibbs_ext/functional.py (docstrings), csrc/README.md. Every message starts with the op's name and names the argument.
#include "cpu/bipartite.h"
#include "ops/bipartite_arguments.h"
#include "ops/cpu/tensors.h"
#include "ops/schemas.h"

namespace gibbs {

Hooks hooks;

namespace {

void run(const char* op, const BipartiteCall& call) {
  Rounding rounding = {};
  check(op, run_bipartite(call, runtime(), &rounding));
  if (call.num_sweeps) warn_if_large(op, "weight", rounding, std::max(call.n1, call.n2), call.beta);
}

BipartiteCall describe(const char* op, const BipartiteArguments& a, const Counters& counters, const char* beta_name,
                       const Tensor& beta) {
  const BipartiteProblem& p = a.p;
  BipartiteCall call;
  call.n1 = p.n1, call.n2 = p.n2;
  call.batch = p.batch;
  call.is_double = p.is_double();
  call.weight = p.coupling_operand();
  call.left_bias = p.operand(a.left_bias);
  call.right_bias = p.operand(a.right_bias);
  set_counters(op, call, p, counters);
  call.beta = read_beta(op, beta_name, beta);
  return call;
}

// What the kernels do not come to read.
void check_unread(const char* op, const BipartiteArguments& a, int64_t num_sweeps) {
  if (num_sweeps && a.p.num_chains()) return;
  check_finite(op, "left_bias", a.left_bias);
  check_finite(op, "right_bias", a.right_bias);
  if (!a.p.num_chains()) check_finite(op, "weight", a.p.coupling());
}

std::tuple<Tensor, Tensor> bipartite_gibbs(const Tensor& left, const Tensor& left_bias, const Tensor& right_bias,
                                           const Tensor& weight, const Tensor& beta, const Tensor& seed,
                                           const std::optional<Tensor>& right, const std::optional<Tensor>& clamp_left,
                                           const std::optional<Tensor>& clamp_right, const std::optional<Tensor>& chains,
                                           int64_t chain_offset, int64_t sweep_offset, int64_t num_sweeps) {
  constexpr const char* op = "bipartite_gibbs";
  const Counters counters = {seed, chains, chain_offset, sweep_offset, num_sweeps, 0};
  const BipartiteArguments a =
      check_bipartite_gibbs(op, left, left_bias, right_bias, weight, beta, right, clamp_left, clamp_right, counters);
  const BipartiteProblem& p = a.p;
  BipartiteCall call = describe(op, a, counters, "beta", beta);
  check_unread(op, a, num_sweeps);

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
  const Counters counters = {seed, chains, chain_offset, sweep_offset, num_sweeps, num_relaxed_sweeps};
  const RelaxationArguments relaxed = {relaxation, sharpness, slope_gradient};
  const BipartiteArguments a = check_bipartite_gibbs_relaxed(op, left, left_bias, right_bias, weight, beta, counters, relaxed);
  const BipartiteProblem& p = a.p;
  BipartiteCall call = describe(op, a, counters, "beta", beta);
  set_relaxation(call, relaxed);
  check_unread(op, a, num_sweeps);

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
  const Counters counters = {seed, chains, chain_offset, sweep_offset, num_sweeps, relaxed_sweeps_of(fields)};
  const RelaxationArguments relaxed = {relaxation, sharpness, slope_gradient};
  const BipartiteBackwardArguments a = check_bipartite_gibbs_relaxed_backward(op, grad_left, grad_right, grad_left_mean, state,
                                                                              fields, weight, beta, counters, relaxed);
  const BipartiteProblem& p = a.p;
  const ScalarType type = p.coupling().scalar_type();
  const Shape left_shape = p.with_batch({p.n1}), right_shape = p.with_batch({p.n2});
  const auto output = [&](const Shape& shape) { return empty_like_batch(p.coupling(), shape, type); };
  const Tensor grad_state = output(left_shape), grad_left_bias = output(left_shape), grad_right_bias = output(right_shape),
               grad_weight = output(shape_of(weight));
  BipartiteBackwardCall back{};
  back.forward.n1 = p.n1, back.forward.n2 = p.n2;
  back.forward.batch = p.batch;
  back.forward.is_double = p.is_double();
  back.forward.weight = p.coupling_operand();
  set_counters(op, back.forward, p, counters);
  back.forward.beta = read_beta(op, "beta", beta);
  set_relaxation(back.forward, relaxed);
  back.forward.state = a.state.data_ptr();
  back.forward.fields = a.fields.data_ptr();
  back.grad_left = a.grad_left.const_data_ptr();
  back.grad_right = a.grad_right.const_data_ptr();
  back.grad_left_mean = a.grad_left_mean.const_data_ptr();
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
  const Counters counters = {seed, chains, chain_offset, sweep_offset, annealed_sweeps(op, betas), 0};
  const BipartiteAnnealedArguments a =
      check_bipartite_ais(op, left, left_bias, right_bias, weight, base_left_bias, base_right_bias, betas, counters);
  const BipartiteProblem& p = a.p;
  BipartiteCall call = describe(op, a, counters, "betas", betas);
  call.base_left_bias = p.operand(a.base_left_bias);
  call.base_right_bias = p.operand(a.base_right_bias);
  check_unread(op, a, counters.num_sweeps);
  if (!counters.num_sweeps || !p.num_chains()) {
    check_finite(op, "base_left_bias", a.base_left_bias);
    check_finite(op, "base_right_bias", a.base_right_bias);
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
  for (const char* schema : gibbs::kSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(gibbs_ext, CPU, m) {
  m.impl("bipartite_gibbs", TORCH_BOX(&gibbs::bipartite_gibbs));
  m.impl("bipartite_gibbs_relaxed", TORCH_BOX(&gibbs::bipartite_gibbs_relaxed));
  m.impl("bipartite_gibbs_relaxed_backward", TORCH_BOX(&gibbs::bipartite_gibbs_relaxed_backward));
  m.impl("bipartite_ais", TORCH_BOX(&gibbs::bipartite_ais));
  m.impl("coupling_resolution", TORCH_BOX(&gibbs::coupling_resolution));
}
