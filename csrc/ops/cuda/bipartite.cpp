// SPDX-License-Identifier: Apache-2.0
// The bipartite ops on CUDA devices, against libtorch's stable ABI. twin: csrc/ops/cpu/bipartite.cpp
#include "cuda/bipartite.h"

#include <tuple>

#include "ops/arguments.h"
#include "ops/cuda/call.h"
#include "ops/cuda/routes.h"

namespace gibbs {

namespace {

template <class Params>
Params model(const Problem& p, BatchBuilder& batch) {
  Params params = {};
  params.n1 = p.left().size, params.n2 = p.right().size, params.is_double = p.is_double();
  batch.coupling(params.weight);
  return params;
}

void add_biases(BipartiteParams& params, const Problem& p, BatchBuilder& batch) {
  batch.parameter(params.left_bias, p.left().bias);
  batch.parameter(params.right_bias, p.right().bias);
  batch.parameter(params.base_left_bias, p.left().base_bias);
  batch.parameter(params.base_right_bias, p.right().base_bias);
}

BipartitePlan plan_sweeps(const BipartiteParams& params, const DeviceLimits& limits) {
  const BipartitePlan plan = plan_bipartite(params, limits, route_in_force().bipartite);
  note(plan);
  return plan;
}

// Binary sweeps; log_weights: annealed.
void sweep(Call& call, const Problem& p, const Counters& counters, const Tensor& left_out, const Tensor& right_out,
           double* log_weights = nullptr) {
  BatchBuilder& batch = call.batch();
  BipartiteParams params = model<BipartiteParams>(p, batch);
  add_biases(params, p, batch);
  batch.state(params.left, p.left().state);
  batch.state(params.right, p.right().state);
  batch.state(params.clamp_left, p.left().clamp);
  batch.state(params.clamp_right, p.right().clamp);
  params.left_out = BatchBuilder::output(left_out);
  params.right_out = BatchBuilder::output(right_out);
  params.log_weights = log_weights;
  call.describe(params.sweep, counters);
  call.launch(params, plan_sweeps, launch_bipartite);
}

std::tuple<Tensor, Tensor> bipartite_gibbs(const Tensor& left, const Tensor& left_bias, const Tensor& right_bias,
                                           const Tensor& weight, const Tensor& beta, const Tensor& seed,
                                           const std::optional<Tensor>& right, const std::optional<Tensor>& clamp_left,
                                           const std::optional<Tensor>& clamp_right, const std::optional<Tensor>& chains,
                                           int64_t chain_offset, int64_t sweep_offset, int64_t num_sweeps) {
  const Counters counters = {seed, beta, chains, chain_offset, sweep_offset, num_sweeps};
  Problem p(kBipartiteGibbs, weight, {.state = &left, .bias = &left_bias, .clamp = pointer(clamp_left)},
            {.state = pointer(right), .bias = &right_bias, .clamp = pointer(clamp_right)});
  check_sweeps(p, counters);
  Call call(p);
  const Tensor left_out = call.state_output(p.left(), left), right_out = call.state_output(p.right(), left);
  sweep(call, p, counters, left_out, right_out);
  return {left_out, right_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bipartite_gibbs_relaxed(
    const Tensor& left, const Tensor& left_bias, const Tensor& right_bias, const Tensor& weight, const Tensor& beta,
    const Tensor& seed, const std::optional<Tensor>& chains, int64_t chain_offset, int64_t sweep_offset, int64_t num_sweeps,
    int64_t num_relaxed_sweeps, int64_t relaxation, double sharpness, bool slope_gradient) {
  const Counters counters = {seed, beta, chains, chain_offset, sweep_offset, num_sweeps, num_relaxed_sweeps};
  const RelaxationArguments how = {relaxation, sharpness, slope_gradient};
  Problem p(kBipartiteGibbsRelaxed, weight, {.state = &left, .bias = &left_bias}, {.bias = &right_bias});
  check_sweeps(p, counters, &how);
  Call call(p);
  const Shape left_shape = p.with_batch({p.left().size}), right_shape = p.with_batch({p.right().size});
  const Tensor state = call.output(left_shape), left_out = call.output(left_shape), right_out = call.output(right_shape),
               mean = call.output(left_shape), fields = call.output(p.with_batch({p.num_units()}, {num_relaxed_sweeps}));
  BatchBuilder& batch = call.batch();
  BipartiteParams params = model<BipartiteParams>(p, batch);
  add_biases(params, p, batch);
  const Tensor start = num_sweeps || left.scalar_type() == p.type() ? left : torch::stable::to(left, p.type());
  if (num_sweeps)
    batch.state(params.left, &left);
  else
    batch.parameter(params.start, &start);
  params.start_is_bits = is_bit_type(left.scalar_type());
  params.left_out = BatchBuilder::output(state);
  params.left_relaxed = left_out.mutable_data_ptr();
  params.right_relaxed = right_out.mutable_data_ptr();
  params.left_mean = mean.mutable_data_ptr();
  params.fields = fields.mutable_data_ptr();
  call.describe(params.sweep, counters);
  call.describe(params.sweep, how);
  call.launch(params, plan_bipartite_relaxed, launch_bipartite_relaxed);
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
  Call call(p);
  const Tensor grad_state = call.output(p.with_batch({n1})), grad_left_bias = call.output(p.with_batch({n1})),
               grad_right_bias = call.output(p.with_batch({n2}));
  Tensor grad_weight = call.output(p.model_couplings());
  if (!p.num_chains()) torch::stable::zero_(grad_weight);

  BipartiteBackwardParams params = model<BipartiteBackwardParams>(p, call.batch());
  params.needs_grad_state = num_sweeps == 0;
  params.grad_left = rows[0].const_data_ptr();
  params.grad_right = rows[1].const_data_ptr();
  params.grad_left_mean = rows[2].const_data_ptr();
  params.state = rows[3].const_data_ptr();
  params.fields = saved.const_data_ptr();
  params.grad_state = grad_state.mutable_data_ptr();
  params.grad_left_bias = grad_left_bias.mutable_data_ptr();
  params.grad_right_bias = grad_right_bias.mutable_data_ptr();
  params.grad_weight = grad_weight.mutable_data_ptr();
  call.describe(params.sweep, counters);
  call.describe(params.sweep, how);
  call.launch(params, plan_bipartite_backward, launch_bipartite_backward);
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
  Call call(p);
  const Tensor left_out = call.state_output(p.left(), left), right_out = call.state_output(p.right(), left),
               log_weights = call.output_per_model_or_chain();
  sweep(call, p, counters, left_out, right_out, static_cast<double*>(log_weights.mutable_data_ptr()));
  return {left_out, right_out, log_weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bipartite_tempering(const Tensor& left, const Tensor& left_bias,
                                                               const Tensor& right_bias, const Tensor& weight, const Tensor& beta,
                                                               const Tensor& seed, const Tensor& chains, int64_t sweep_offset,
                                                               int64_t sweeps_per_swap, int64_t num_swaps) {
  std::optional<Tensor> numbers = chains;
  Problem p(kBipartiteTempering, weight, {.state = &left, .bias = &left_bias}, {.bias = &right_bias});
  check_tempering(p, {seed, beta, numbers, 0, sweep_offset, sweeps_per_swap * num_swaps}, sweeps_per_swap, num_swaps);
  Call call(p);
  TemperingTensors out(call, p, chains, sweeps_per_swap, num_swaps);
  numbers = out.chains;
  // The rounds read the bytes that the start, which makes no sweep, has written.
  BatchBuilder& batch = call.batch();
  BipartiteParams start = model<BipartiteParams>(p, batch), rounds = model<BipartiteParams>(p, batch);
  for (BipartiteParams* params : {&start, &rounds}) {
    add_biases(*params, p, batch);
    params->left_out = BatchBuilder::output(out.bits[0]), params->right_out = BatchBuilder::output(out.bits[1]);
  }
  batch.state(start.left, &left);
  batch.state(rounds.left, &out.bits[0]);
  call.describe(start.sweep, {seed, beta, numbers, 0, sweep_offset, sweeps_per_swap * num_swaps});
  start.sweep.num_sweeps = 0;
  call.launch(start, plan_sweeps, launch_bipartite);
  rounds.sweep = start.sweep, rounds.sweep.num_sweeps = sweeps_per_swap;
  const auto find_scales = [&](const BipartiteParams& of, const ResolutionPlan& plan, Stream stream) {
    launch_coupling_resolution(of, plan, static_cast<double*>(out.scales.mutable_data_ptr()), stream);
  };
  call.launch(rounds, plan_coupling_resolution, find_scales);
  out.run_rounds(
      call, rounds, num_swaps, [&] { call.launch(rounds, plan_sweeps, launch_bipartite); },
      [&](Stream stream) { launch_bipartite_energies({rounds, out.params}, stream); });
  const auto result = [&](const Tensor& bits) { return torch::stable::to(bits, left.scalar_type()); };
  return {result(out.bits[0]), result(out.bits[1]), out.energies, out.chains_at};
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
  Call call(p);
  MomentTensors out(call, p, left, counted, best);
  // As in bipartite_tempering.
  BatchBuilder& batch = call.batch();
  BipartiteParams start = model<BipartiteParams>(p, batch), rounds = model<BipartiteParams>(p, batch);
  for (BipartiteParams* params : {&start, &rounds}) {
    add_biases(*params, p, batch);
    batch.state(params->clamp_left, p.left().clamp);
    batch.state(params->clamp_right, p.right().clamp);
    params->left_out = BatchBuilder::output(out.bits[0]), params->right_out = BatchBuilder::output(out.bits[1]);
  }
  batch.state(start.left, p.left().state);
  batch.state(start.right, p.right().state);
  batch.state(rounds.left, &out.bits[0]);
  batch.state(rounds.right, &out.bits[1]);
  call.describe(start.sweep, counters);
  start.sweep.num_sweeps = 0;
  call.launch(start, plan_sweeps, launch_bipartite);
  rounds.sweep = start.sweep;
  if (best) {
    call.launch(rounds, plan_coupling_resolution, [&](const BipartiteParams& of, const ResolutionPlan& plan, Stream stream) {
      launch_coupling_resolution(of, plan, out.scales(), stream);
    });
  }
  out.run_reads(
      call, rounds, num_sweeps, sweeps_per_read, [&] { call.launch(rounds, plan_sweeps, launch_bipartite); },
      [&](Stream stream) { launch_bipartite_pair_counts(out.params, stream); },
      [&](Stream stream) { launch_bipartite_energies({rounds, out.energies}, stream); });
  const auto result = [&](const Tensor& bits) { return torch::stable::to(bits, left.scalar_type()); };
  return {result(out.bits[0]), result(out.bits[1]), out.units[0],        out.units[1],
          out.pairs,           result(out.best[0]), result(out.best[1]), out.best_energies};
}

Tensor coupling_resolution(const Tensor& weight) {
  Problem p(kCouplingResolution, weight);
  p.finish(true);
  Call call(p);
  const Tensor out = call.output_per_model_or_chain();
  BipartiteParams params = model<BipartiteParams>(p, call.batch());
  call.describe(params.sweep);
  call.launch(params, plan_coupling_resolution, [&](const BipartiteParams& of, const ResolutionPlan& plan, Stream stream) {
    launch_coupling_resolution(of, plan, static_cast<double*>(out.mutable_data_ptr()), stream);
  });
  return out;
}

}  // namespace
}  // namespace gibbs

STABLE_TORCH_LIBRARY_IMPL(GIBBS_OPS, GIBBS_OPS_KEY, m) {
  m.impl("bipartite_gibbs", TORCH_BOX(&gibbs::bipartite_gibbs));
  m.impl("bipartite_gibbs_relaxed", TORCH_BOX(&gibbs::bipartite_gibbs_relaxed));
  m.impl("bipartite_gibbs_relaxed_backward", TORCH_BOX(&gibbs::bipartite_gibbs_relaxed_backward));
  m.impl("bipartite_ais", TORCH_BOX(&gibbs::bipartite_ais));
  m.impl("bipartite_tempering", TORCH_BOX(&gibbs::bipartite_tempering));
  m.impl("bipartite_moments", TORCH_BOX(&gibbs::bipartite_moments));
  m.impl("coupling_resolution", TORCH_BOX(&gibbs::coupling_resolution));
}
