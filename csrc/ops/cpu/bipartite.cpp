// SPDX-License-Identifier: Apache-2.0
// The bipartite ops on the CPU, against libtorch's stable ABI, and the schemas of all ops. twin: csrc/ops/cuda/bipartite.cpp
#include "cpu/bipartite.h"

#include <tuple>

#include "ops/arguments.h"
#include "ops/cpu/tensors.h"

namespace gibbs {

Hooks hooks;

namespace {

BipartiteCall describe(const Problem& p, const Counters& counters) {
  BipartiteCall call;
  describe(call, p, counters);
  call.n1 = p.left().size, call.n2 = p.right().size;
  call.weight = coupling_operand(p);
  call.left_bias = operand(p, p.left().bias);
  call.right_bias = operand(p, p.right().bias);
  call.base_left_bias = operand(p, p.left().base_bias);
  call.base_right_bias = operand(p, p.right().base_bias);
  return call;
}

// Runs a call by rounds(forward), where forward(call, after) makes its rounds.
template <class Rounds>
void run(const Problem& p, const BipartiteCall& call, const Rounds& rounds) {
  Rounding rounding = {};
  check(p, rounds([&](const BipartiteCall& c, const AfterRound& after) { return run_bipartite(c, runtime(), &rounding, after); }));
  if (call.num_sweeps) warn_if_large(p, rounding, std::max(call.n1, call.n2), call.beta);
}
void run(const Problem& p, const BipartiteCall& call) {
  run(p, call, [&](const auto& forward) { return forward(call, nullptr); });
}

// The states that a call sweeps, and its clamps.
struct States {
  Bits left, right, clamp_left, clamp_right;
  States(const Problem& p, BipartiteCall& call)
      : left(pack_state(p, p.left())),
        right(pack_state(p, p.right())),
        clamp_left(pack_clamp(p, p.left())),
        clamp_right(pack_clamp(p, p.right())) {
    call.left_bits = left.data(), call.right_bits = right.data();
    if (p.left().clamp) call.clamp_left = clamp_left.data();
    if (p.right().clamp) call.clamp_right = clamp_right.data();
  }
};

std::tuple<Tensor, Tensor> bipartite_gibbs(const Tensor& left, const Tensor& left_bias, const Tensor& right_bias,
                                           const Tensor& weight, const Tensor& beta, const Tensor& seed,
                                           const std::optional<Tensor>& right, const std::optional<Tensor>& clamp_left,
                                           const std::optional<Tensor>& clamp_right, const std::optional<Tensor>& chains,
                                           int64_t chain_offset, int64_t sweep_offset, int64_t num_sweeps) {
  const Counters counters = {seed, beta, chains, chain_offset, sweep_offset, num_sweeps};
  Problem p(kBipartiteGibbs, weight, {.state = &left, .bias = &left_bias, .clamp = pointer(clamp_left)},
            {.state = pointer(right), .bias = &right_bias, .clamp = pointer(clamp_right)});
  check_sweeps(p, counters);
  BipartiteCall call = describe(p, counters);
  check_unread(p, num_sweeps);

  const States states(p, call);
  run(p, call);
  return {unpack(p, p.left(), states.left, left.scalar_type()), unpack(p, p.right(), states.right, left.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bipartite_gibbs_relaxed(
    const Tensor& left, const Tensor& left_bias, const Tensor& right_bias, const Tensor& weight, const Tensor& beta,
    const Tensor& seed, const std::optional<Tensor>& chains, int64_t chain_offset, int64_t sweep_offset, int64_t num_sweeps,
    int64_t num_relaxed_sweeps, int64_t relaxation, double sharpness, bool slope_gradient) {
  const Counters counters = {seed, beta, chains, chain_offset, sweep_offset, num_sweeps, num_relaxed_sweeps};
  const RelaxationArguments how = {relaxation, sharpness, slope_gradient};
  Problem p(kBipartiteGibbsRelaxed, weight, {.state = &left, .bias = &left_bias}, {.bias = &right_bias});
  check_sweeps(p, counters, &how);
  BipartiteCall call = describe(p, counters);
  set_relaxation(call, how);
  check_unread(p, num_sweeps);

  const Shape left_shape = p.with_batch({p.left().size}), right_shape = p.with_batch({p.right().size});
  const Tensor state = empty(p, left_shape, p.type()), left_out = empty(p, left_shape, p.type()),
               right_out = empty(p, right_shape, p.type()), mean = empty(p, left_shape, p.type()),
               fields = empty(p, p.with_batch({p.num_units()}, {num_relaxed_sweeps}), p.type());
  Bits left_bits = read_start(p, p.left(), num_sweeps, state);
  Bits right_bits = num_sweeps ? pack_state(p, p.right()) : Bits();
  call.left_bits = left_bits.data();
  call.right_bits = right_bits.data();
  call.state = state.mutable_data_ptr();
  call.left = left_out.mutable_data_ptr();
  call.right = right_out.mutable_data_ptr();
  call.left_mean = mean.mutable_data_ptr();
  call.fields = fields.mutable_data_ptr();
  run(p, call);
  return {left_out, right_out, mean, state, fields};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bipartite_gibbs_relaxed_backward(
    const Tensor& grad_left, const Tensor& grad_right, const Tensor& grad_left_mean, const Tensor& state, const Tensor& fields,
    const Tensor& weight, const Tensor& beta, const Tensor& seed, const std::optional<Tensor>& chains, int64_t chain_offset,
    int64_t sweep_offset, int64_t num_sweeps, int64_t relaxation, double sharpness, bool slope_gradient) {
  const Counters counters = {seed, beta, chains, chain_offset, sweep_offset, num_sweeps, relaxed_sweeps_of(fields)};
  const RelaxationArguments how = {relaxation, sharpness, slope_gradient};
  Problem p(kBipartiteGibbsRelaxedBackward, weight);
  const int64_t n1 = p.left().size, n2 = p.right().size;
  const std::vector<Tensor> rows = check_backward(
      p,
      {{"grad_left", grad_left, n1}, {"grad_right", grad_right, n2}, {"grad_left_mean", grad_left_mean, n1}, {"state", state, n1}},
      fields, counters, how);
  const Tensor saved = as_contiguous(fields);
  const Tensor grad_state = empty(p, p.with_batch({n1}), p.type()), grad_left_bias = empty(p, p.with_batch({n1}), p.type()),
               grad_right_bias = empty(p, p.with_batch({n2}), p.type()), grad_weight = empty(p, p.model_couplings(), p.type());
  BipartiteBackwardCall back{};
  back.forward = describe(p, counters);
  set_relaxation(back.forward, how);
  back.grad_left = rows[0].const_data_ptr();
  back.grad_right = rows[1].const_data_ptr();
  back.grad_left_mean = rows[2].const_data_ptr();
  back.forward.state = rows[3].data_ptr();
  back.forward.fields = saved.data_ptr();
  back.grad_state = grad_state.mutable_data_ptr();
  back.grad_left_bias = grad_left_bias.mutable_data_ptr();
  back.grad_right_bias = grad_right_bias.mutable_data_ptr();
  back.grad_weight = grad_weight.mutable_data_ptr();
  back.needs_grad_state = num_sweeps == 0;
  check(p, run_bipartite_backward(back, runtime()));
  return {grad_state, grad_left_bias, grad_right_bias, grad_weight};
}

std::tuple<Tensor, Tensor, Tensor> bipartite_ais(const Tensor& left, const Tensor& left_bias, const Tensor& right_bias,
                                                 const Tensor& weight, const Tensor& base_left_bias, const Tensor& base_right_bias,
                                                 const Tensor& betas, const Tensor& seed, const std::optional<Tensor>& chains,
                                                 int64_t chain_offset, int64_t sweep_offset) {
  const Counters counters = {seed, betas, chains, chain_offset, sweep_offset, annealed_sweeps(kBipartiteAis, betas)};
  Problem p(kBipartiteAis, weight, {.state = &left, .bias = &left_bias, .base_bias = &base_left_bias},
            {.bias = &right_bias, .base_bias = &base_right_bias});
  check_sweeps(p, counters);
  BipartiteCall call = describe(p, counters);
  check_unread(p, counters.num_sweeps);

  const States states(p, call);
  const Tensor log_weights = zero_log_weights(p);
  call.log_weights = static_cast<double*>(log_weights.mutable_data_ptr());
  run(p, call);
  return {unpack(p, p.left(), states.left, left.scalar_type()), unpack(p, p.right(), states.right, left.scalar_type()),
          log_weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bipartite_tempering(const Tensor& left, const Tensor& left_bias,
                                                               const Tensor& right_bias, const Tensor& weight, const Tensor& beta,
                                                               const Tensor& seed, const Tensor& chains, int64_t sweep_offset,
                                                               int64_t sweeps_per_swap, int64_t num_swaps) {
  const std::optional<Tensor> numbers = chains;
  const Counters counters = {seed, beta, numbers, 0, sweep_offset, sweeps_per_swap * num_swaps};
  Problem p(kBipartiteTempering, weight, {.state = &left, .bias = &left_bias}, {.bias = &right_bias});
  check_tempering(p, counters, sweeps_per_swap, num_swaps);
  BipartiteCall call = describe(p, counters);
  check_unread(p, num_swaps);

  const States states(p, call);
  TemperingTensors out(p, counters, num_swaps);
  out.ladder.parts = {{call.left_bits, state_words(p.left().size)}, {call.right_bits, state_words(p.right().size)}};
  out.number(p, call);
  call.num_sweeps = sweeps_per_swap;
  run(p, call, [&](const auto& forward) { return run_tempering(call, out.ladder, num_swaps, forward); });
  return {unpack(p, p.left(), states.left, left.scalar_type()), unpack(p, p.right(), states.right, left.scalar_type()),
          out.energies, out.chains_at};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bipartite_moments(
    const Tensor& left, const Tensor& left_bias, const Tensor& right_bias, const Tensor& weight, const Tensor& beta,
    const Tensor& seed, const std::optional<Tensor>& right, const std::optional<Tensor>& clamp_left,
    const std::optional<Tensor>& clamp_right, const std::optional<Tensor>& chains, int64_t chain_offset, int64_t sweep_offset,
    int64_t num_sweeps, int64_t sweeps_per_read, int64_t counted, bool best) {
  const Counters counters = {seed, beta, chains, chain_offset, sweep_offset, num_sweeps};
  Problem p(kBipartiteMoments, weight, {.state = &left, .bias = &left_bias, .clamp = pointer(clamp_left)},
            {.state = pointer(right), .bias = &right_bias, .clamp = pointer(clamp_right)});
  check_moments(p, counters, sweeps_per_read, counted);
  BipartiteCall call = describe(p, counters);
  check_unread(p, num_sweeps);

  const States states(p, call);
  const Bits* const bits[] = {&states.left, &states.right};
  MomentTensors out(p, call, sweeps_per_read, counted, best, bits);
  run(p, call, [&](const auto& forward) { return run_with_reads(call, out.best_or_null(), forward); });
  const ScalarType type = left.scalar_type();
  return {unpack(p, p.left(), states.left, type), unpack(p, p.right(), states.right, type), out.units[0],   out.units[1], out.pairs,
          out.best_state(p, p.left(), type),      out.best_state(p, p.right(), type),       out.best_energy};
}

Tensor coupling_resolution(const Tensor& weight) {
  Problem p(kCouplingResolution, weight);
  p.finish(true);
  const Tensor out = empty(p, p.with_batch({}), ScalarType::Double);
  check(p, run_coupling_resolution(p.left().size, p.right().size, batch(p), p.is_double(), coupling_operand(p),
                                   static_cast<double*>(out.mutable_data_ptr())));
  return out;
}

}  // namespace
}  // namespace gibbs

STABLE_TORCH_LIBRARY(gibbs_ext, m) {
  for (const auto& [name, signature] : gibbs::kOps) m.def((std::string(name) + signature).c_str());
}

STABLE_TORCH_LIBRARY_IMPL(gibbs_ext, CPU, m) {
  m.impl("bipartite_gibbs", TORCH_BOX(&gibbs::bipartite_gibbs));
  m.impl("bipartite_gibbs_relaxed", TORCH_BOX(&gibbs::bipartite_gibbs_relaxed));
  m.impl("bipartite_gibbs_relaxed_backward", TORCH_BOX(&gibbs::bipartite_gibbs_relaxed_backward));
  m.impl("bipartite_ais", TORCH_BOX(&gibbs::bipartite_ais));
  m.impl("bipartite_tempering", TORCH_BOX(&gibbs::bipartite_tempering));
  m.impl("bipartite_moments", TORCH_BOX(&gibbs::bipartite_moments));
  m.impl("coupling_resolution", TORCH_BOX(&gibbs::coupling_resolution));
}
