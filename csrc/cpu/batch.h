// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "core/outcome.h"

namespace gibbs {

// A batch of chains, row by row over `sizes`. Loops go through the dimensions along which the model changes first, so that a
// model's couplings are rounded once. The same couplings at several betas are several models, one after the other if
// `has_same_couplings` says which dimensions those are.
class Batch {
 public:
  Batch() = default;
  Batch(std::vector<int64_t> sizes, const std::vector<bool>& is_model_dim, const std::vector<bool>& has_same_couplings = {})
      : sizes_(std::move(sizes)), contiguous_(sizes_.size()) {
    int64_t stride = 1;
    for (size_t d = sizes_.size(); d-- > 0; stride *= sizes_[d]) contiguous_[d] = stride;
    for (size_t d = 0; d < sizes_.size(); ++d) {
      (is_model_dim[d] ? model_dims_ : chain_dims_).push_back(int(d));
      (is_model_dim[d] ? num_models_ : chains_per_model_) *= sizes_[d];
    }
    if (has_same_couplings.empty()) return;
    const auto is_last = [&](int d) { return has_same_couplings[size_t(d)]; };
    std::stable_partition(model_dims_.begin(), model_dims_.end(), [&](int d) { return !is_last(d); });
    for (int d : model_dims_) models_per_coupling_ *= is_last(d) ? sizes_[size_t(d)] : 1;
  }
  int64_t num_models() const { return num_models_; }
  int64_t chains_per_model() const { return chains_per_model_; }
  // Neighbouring models that differ in nothing but their betas; 1 if that is not known.
  int64_t models_per_coupling() const { return models_per_coupling_; }
  // Offset of (model, chain) in an operand with these batch strides, one per dimension, 0 along dimensions that are broadcast.
  int64_t offset(const std::vector<int64_t>& strides, int64_t model, int64_t chain) const {
    int64_t at = 0;
    for (size_t i = model_dims_.size(); i-- > 0; model /= sizes_[size_t(model_dims_[i])])
      at += model % sizes_[size_t(model_dims_[i])] * strides[size_t(model_dims_[i])];
    for (size_t i = chain_dims_.size(); i-- > 0; chain /= sizes_[size_t(chain_dims_[i])])
      at += chain % sizes_[size_t(chain_dims_[i])] * strides[size_t(chain_dims_[i])];
    return at;
  }
  // Number of (model, chain), row by row.
  int64_t linear(int64_t model, int64_t chain) const { return offset(contiguous_, model, chain); }

 private:
  std::vector<int64_t> sizes_, contiguous_;
  std::vector<int> model_dims_, chain_dims_;
  int64_t num_models_ = 1, chains_per_model_ = 1, models_per_coupling_ = 1;
};

// A tensor with its strides along the batch dimensions and along its own last one or two.
struct Operand {
  const void* data = nullptr;
  std::vector<int64_t> batch_strides;
  int64_t stride = 1;      // stride of the last dimension: a weight's columns
  int64_t row_stride = 0;  // stride of a weight's rows
};

struct Counts;  // cpu/moments.h

// Arguments of a call that do not depend on the kind of model.
struct SweepCall {
  Batch batch;
  bool is_double = false;           // dtype of the parameters
  const int64_t* chains = nullptr;  // chain numbers; null: chain_offset + linear number
  std::vector<int64_t> chains_strides;
  int64_t chain_offset = 0, sweep_offset = 0, num_sweeps = 0;
  int64_t first_beta = 0;  // of a round, where there is one per sweep
  int64_t num_rounds = 1;  // how often the sweeps are made, which what is rounded or tabulated once has to pay for
  uint64_t seed = 0;
  // A row is 1 value, or one per sweep (binary, then relaxed); annealed: num_sweeps + 1.
  std::vector<double> beta;           // [rows, values of a row]
  int64_t num_betas = 1;              // values of a row
  std::vector<int64_t> beta_strides;  // of rows along the batch's dimensions, in values; empty: all models have one row

  // Counts the states that the chains have after every so many of a round's binary sweeps, if `counts` is not null.
  int64_t sweeps_per_read = 0;
  Counts* counts = nullptr;
  double* energies = nullptr;  // [linear number] of the states that the binary sweeps leave; null: not wanted

  int64_t num_relaxed_sweeps = 0;
  Relaxation relaxation = kPwl;
  double sharpness = 4;
  bool slope_gradient = true;
};

// What comes after each of a call's rounds. It may change the call's states, chain numbers and sweep_offset, which its owner holds.
using AfterRound = std::function<void(int64_t round)>;

// A model's row of betas, of either type. stride: from one sweep's to the next.
template <class T>
struct BetaRow {
  const T* values;
  int64_t count;
  int64_t stride() const { return count > 1; }
  T at(int64_t sweep) const { return values[sweep * stride()]; }
};
template <class T>
BetaRow<T> betas_of(const SweepCall& call, const std::vector<T>& values, int64_t model) {
  const int64_t row = call.beta_strides.empty() ? 0 : call.batch.offset(call.beta_strides, model, 0);
  return {values.data() + row + (call.num_betas > 1 ? call.first_beta : 0), call.num_betas};
}

// The least and the largest |beta| of a call, but for 0, at which fields do not matter; infinity and 0 if there is no other.
inline std::pair<double, double> beta_range(const SweepCall& call) {
  double least = std::numeric_limits<double>::infinity(), most = 0;
  for (const double beta : call.beta) {
    const double size = double(float(std::fabs(beta)));
    if (size > 0) least = std::min(least, size), most = std::max(most, size);
  }
  return {least, most};
}

inline uint64_t chain_number(const SweepCall& call, int64_t model, int64_t chain) {
  return uint64_t(call.chains ? call.chains[call.batch.offset(call.chains_strides, model, chain)]
                              : call.chain_offset + call.batch.linear(model, chain));
}

// The first element of an operand for (model, chain).
template <class T>
const T* row_of(const Batch& batch, const Operand& operand, int64_t model, int64_t chain) {
  return static_cast<const T*>(operand.data) + batch.offset(operand.batch_strides, model, chain);
}

inline double largest_magnitude(const std::vector<double>& values) {
  double largest = 0;
  for (double value : values) largest = std::max(largest, std::fabs(value));
  return largest;
}

}  // namespace gibbs
