// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>

#include "core/fixed_point.h"
#include "cpu/batch.h"
#include "cpu/kernels/table.h"
#include "cpu/threads.h"

// Runs the kernels of bipartite models over a batch of chains.
namespace gibbs {

struct BipartiteCall : SweepCall {
  int64_t n1, n2;
  Operand left_bias, right_bias, weight;
  Operand base_left_bias, base_right_bias;  // annealed

  // Binary sweeps: state bits, [linear number, state_words(n)].
  uint32_t *left_bits = nullptr, *right_bits = nullptr;
  const uint32_t *clamp_left = nullptr, *clamp_right = nullptr;
  double* log_weights = nullptr;  // [linear number]; not null: annealed
  // Which route where; tests set them to compare the routes.
  bool allow_tables = true;
  int64_t narrow_from = kernels().narrow_from;
  bool look_up_always = false;  // also for so few chains and sweeps that tables do not pay
  int largest_slack = kernels().largest_slack;
  int largest_single_slack = 384;                     // of single chains (bench/NOTES.md)
  int64_t single_from = 1 << 16;                      // updates of units: fewer do not pay for the probabilities of their fields
  std::atomic<int64_t>* num_coarse_groups = nullptr;  // counts the groups of chains that took them

  // Relaxed sweeps: [linear number, n] of the parameters' dtype.
  void *state = nullptr, *left = nullptr, *right = nullptr, *left_mean = nullptr;
  void* fields = nullptr;  // [num_relaxed_sweeps, linear number, n2 + n1]
};

// Runs num_sweeps binary sweeps, then num_relaxed_sweeps relaxed ones from the state that they leave, which is written to `state`;
// if num_sweeps is 0, from `state` as given. *rounding: of the model whose error is largest.
Outcome run_bipartite(const BipartiteCall&, const Runtime&, Rounding* rounding, const AfterRound& = nullptr);

struct BipartiteBackwardCall {
  BipartiteCall forward;                                // the fields that name the problem, `state` and `fields`; no biases
  const void *grad_left, *grad_right, *grad_left_mean;  // [linear number, n]
  void *grad_state, *grad_left_bias, *grad_right_bias;  // [linear number, n]
  void* grad_weight;                                    // [model, n1, n2]
  bool needs_grad_state;
};
Outcome run_bipartite_backward(const BipartiteBackwardCall&, const Runtime&);

// Writes the resolution 2^-k of each model of a weight.
Outcome run_coupling_resolution(int64_t n1, int64_t n2, const Batch&, bool is_double, const Operand& weight, double* out);

}  // namespace gibbs
