// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "cpu/bipartite.h"

// Runs the kernels over a batch: which chains share a model, who computes what on which thread, and where scratch memory lies.
namespace gibbs {

// A batch of chains, row by row over `sizes`. Dimensions along which the model changes come first in the loops, so that a model's
// couplings are rounded once.
class Batch {
 public:
  Batch() = default;
  Batch(std::vector<int64_t> sizes, const std::vector<bool>& is_model_dim);
  int64_t num_models() const { return num_models_; }
  int64_t chains_per_model() const { return chains_per_model_; }
  // Where (model, chain) lies in an operand with these batch strides (one per dimension, 0 where it is broadcast).
  int64_t offset(const std::vector<int64_t>& strides, int64_t model, int64_t chain) const;
  // Row-by-row number of (model, chain).
  int64_t linear(int64_t model, int64_t chain) const { return offset(contiguous_, model, chain); }

 private:
  std::vector<int64_t> sizes_, contiguous_;
  std::vector<int> model_dims_, chain_dims_;
  int64_t num_models_ = 1, chains_per_model_ = 1;
};

// A tensor with the batch's strides; element strides of its own last dimension(s).
struct Operand {
  const void* data = nullptr;
  std::vector<int64_t> batch_strides;
  int64_t stride = 1;      // of the last dimension; of a weight: of its columns
  int64_t row_stride = 0;  // of a weight
};

struct Runtime {
  int num_threads;
  // Calls task(0) .. task(count - 1) on up to num_threads threads and waits.
  void (*parallel)(int64_t count, const std::function<void(int64_t)>& task);
  // Asked now and then on the calling thread; true: stop. May be null.
  bool (*interrupted)();
};

enum class Outcome {
  kOk,
  kInterrupted,
  kNonFiniteWeight,
  kTooLargeWeight,
  kNonFiniteLeftBias,
  kNonFiniteRightBias,
  kNonFiniteBaseLeftBias,
  kNonFiniteBaseRightBias
};

struct BipartiteCall {
  int64_t n1, n2;
  Batch batch;
  bool is_double;  // dtype of the parameters
  Operand left_bias, right_bias, weight;
  Operand base_left_bias, base_right_bias;  // annealed
  const int64_t* chains = nullptr;          // chain numbers; null: chain_offset + linear number
  std::vector<int64_t> chains_strides;
  int64_t chain_offset = 0, sweep_offset = 0, num_sweeps = 0;
  uint64_t seed = 0;
  std::vector<double> beta;  // 1 value, or one per sweep (binary, then relaxed); annealed: num_sweeps + 1

  // Binary sweeps: state bits, [linear number, state_words(n)].
  uint32_t *left_bits = nullptr, *right_bits = nullptr;
  const uint32_t *clamp_left = nullptr, *clamp_right = nullptr;
  double* log_weights = nullptr;  // [linear number]; not null: annealed
  // Which route where; tests set them to hold the routes against each other.
  bool allow_tables = true;
  int64_t narrow_from = 128;  // narrow couplings for sides of more units: below, memory traffic is not what counts

  // Relaxed sweeps: [linear number, n] of the parameters' dtype.
  int64_t num_relaxed_sweeps = 0;
  Relaxation relaxation = kPwl;
  double sharpness = 4;
  bool slope_gradient = true;
  void *state = nullptr, *left = nullptr, *right = nullptr, *left_mean = nullptr;
  void* fields = nullptr;  // [num_relaxed_sweeps, linear number, n2 + n1]
};

// Runs num_sweeps binary sweeps, then num_relaxed_sweeps relaxed ones from the state they left (from `state` as given if num_sweeps
// is 0). *coarsest_resolution: the largest 2^-k of any model.
Outcome run_bipartite(const BipartiteCall&, const Runtime&, double* coarsest_resolution);

struct BipartiteBackwardCall {
  BipartiteCall forward;                                // the fields that name the problem, `state` and `fields`; no biases
  const void *grad_left, *grad_right, *grad_left_mean;  // [linear number, n]
  void *grad_state, *grad_left_bias, *grad_right_bias;  // [linear number, n]
  void* grad_weight;                                    // [model, n1, n2]
  bool needs_grad_state;
};
Outcome run_bipartite_backward(const BipartiteBackwardCall&, const Runtime&);

// 2^-k of each model of a weight.
Outcome run_coupling_resolution(int64_t n1, int64_t n2, const Batch&, bool is_double, const Operand& weight, double* out);

}  // namespace gibbs
