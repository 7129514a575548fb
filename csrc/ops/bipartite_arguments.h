// SPDX-License-Identifier: Apache-2.0
#pragma once

// The arguments of the bipartite ops, checked in one place for every backend: shapes, dtypes, devices, ranges of numbers. What the
// tensors hold, the backend checks.
#include "ops/arguments.h"

namespace gibbs {

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

// Parameters as the kernels read them: half types become float32.
struct BipartiteArguments {
  BipartiteArguments(const char* op, const Tensor& weight, const Tensor& left_bias_given, const Tensor& right_bias_given)
      : p(op, weight),
        left_bias(p.parameter("left_bias", left_bias_given, p.n1)),
        right_bias(p.parameter("right_bias", right_bias_given, p.n2)) {}
  BipartiteProblem p;
  Tensor left_bias, right_bias;
};

inline BipartiteArguments check_bipartite_gibbs(const char* op, const Tensor& left, const Tensor& left_bias,
                                                const Tensor& right_bias, const Tensor& weight, const Tensor& beta,
                                                const std::optional<Tensor>& right, const std::optional<Tensor>& clamp_left,
                                                const std::optional<Tensor>& clamp_right, const Counters& counters) {
  BipartiteArguments a(op, weight, left_bias, right_bias);
  BipartiteProblem& p = a.p;
  p.state("left", left, p.n1);
  if (right) p.state("right", *right, p.n2);
  if (clamp_left) p.mask("clamp_left", *clamp_left, p.n1);
  if (clamp_right) p.mask("clamp_right", *clamp_right, p.n2);
  if (clamp_right && !right) fail(op, "right must be given when clamp_right is, got none");
  if (counters.chains) p.chain_numbers(*counters.chains);
  p.finish(false);
  check_counters(op, p, counters);
  check_beta(op, "beta", p, beta, counters.num_sweeps);
  return a;
}

inline BipartiteArguments check_bipartite_gibbs_relaxed(const char* op, const Tensor& left, const Tensor& left_bias,
                                                        const Tensor& right_bias, const Tensor& weight, const Tensor& beta,
                                                        const Counters& counters, const RelaxationArguments& relaxation) {
  BipartiteArguments a(op, weight, left_bias, right_bias);
  BipartiteProblem& p = a.p;
  p.state("left", left, p.n1);
  if (counters.chains) p.chain_numbers(*counters.chains);
  p.finish(false);
  if (counters.num_relaxed_sweeps < 1) fail(op, "num_relaxed_sweeps must be at least 1, got ", counters.num_relaxed_sweeps);
  check_counters(op, p, counters);
  check_beta(op, "beta", p, beta, counters.num_sweeps + counters.num_relaxed_sweeps);
  check_relaxation(op, relaxation);
  return a;
}

// counters.num_relaxed_sweeps is that of fields.
struct BipartiteBackwardArguments {
  BipartiteProblem p;
  Tensor grad_left, grad_right, grad_left_mean, state, fields;  // contiguous
};
inline int64_t relaxed_sweeps_of(const Tensor& fields) { return fields.dim() ? fields.size(0) : 0; }

inline BipartiteBackwardArguments check_bipartite_gibbs_relaxed_backward(const char* op, const Tensor& grad_left,
                                                                         const Tensor& grad_right, const Tensor& grad_left_mean,
                                                                         const Tensor& state, const Tensor& fields,
                                                                         const Tensor& weight, const Tensor& beta,
                                                                         const Counters& counters,
                                                                         const RelaxationArguments& relaxation) {
  BipartiteProblem p(op, weight);
  const Tensor* sides[] = {&grad_left, &grad_right, &grad_left_mean, &state};
  const char* names[] = {"grad_left", "grad_right", "grad_left_mean", "state"};
  for (int i = 0; i < 4; ++i) p.own_type(names[i], *sides[i]), p.state(names[i], *sides[i], i == 1 ? p.n2 : p.n1);
  if (counters.chains) p.chain_numbers(*counters.chains);
  p.finish(true);
  p.saved_fields(fields, p.n2 + p.n1);
  const Shape left_shape = p.with_batch({p.n1}), right_shape = p.with_batch({p.n2});
  const Tensor gl = whole_rows(op, grad_left, left_shape), gr = whole_rows(op, grad_right, right_shape),
               gm = whole_rows(op, grad_left_mean, left_shape), start = whole_rows(op, state, left_shape);
  check_counters(op, p, counters);
  check_beta(op, "beta", p, beta, counters.num_sweeps + counters.num_relaxed_sweeps);
  check_relaxation(op, relaxation);
  return {p, gl, gr, gm, start, torch::stable::contiguous(fields)};
}

struct BipartiteAnnealedArguments : BipartiteArguments {
  BipartiteAnnealedArguments(const char* op, const Tensor& weight, const Tensor& left_bias_given, const Tensor& right_bias_given,
                             const Tensor& base_left_bias_given, const Tensor& base_right_bias_given)
      : BipartiteArguments(op, weight, left_bias_given, right_bias_given),
        base_left_bias(p.parameter("base_left_bias", base_left_bias_given, p.n1)),
        base_right_bias(p.parameter("base_right_bias", base_right_bias_given, p.n2)) {}
  Tensor base_left_bias, base_right_bias;
};

// As many sweeps as betas has steps.
inline int64_t annealed_sweeps(const char* op, const Tensor& betas) {
  if (betas.dim() != 1 || betas.size(0) < 1)
    fail(op, "betas must be a 1-D float64 tensor of at least 1 value, got ", text(shape_of(betas)));
  return betas.size(0) - 1;
}

inline BipartiteAnnealedArguments check_bipartite_ais(const char* op, const Tensor& left, const Tensor& left_bias,
                                                      const Tensor& right_bias, const Tensor& weight, const Tensor& base_left_bias,
                                                      const Tensor& base_right_bias, const Tensor& betas,
                                                      const Counters& counters) {
  BipartiteAnnealedArguments a(op, weight, left_bias, right_bias, base_left_bias, base_right_bias);
  BipartiteProblem& p = a.p;
  p.state("left", left, p.n1);
  if (counters.chains) p.chain_numbers(*counters.chains);
  p.finish(false);
  check_counters(op, p, counters);
  check_beta(op, "betas", p, betas, counters.num_sweeps + 1);  // the starting one, and one a sweep
  return a;
}

}  // namespace gibbs
