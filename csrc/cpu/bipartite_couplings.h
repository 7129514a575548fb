// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/bipartite.h"
#include "cpu/scratch.h"

// A bipartite model's couplings, as its sweeps read them.
namespace gibbs {

inline CouplingView weight_of(const BipartiteCall& call, int64_t model) {
  const int64_t size = call.is_double ? 8 : 4;
  const int64_t offset = call.batch.offset(call.weight.batch_strides, model, 0);
  return {static_cast<const char*>(call.weight.data) + offset * size,
          call.is_double,
          call.n1,
          call.n2,
          call.weight.row_stride,
          call.weight.stride};
}

// False if the couplings cannot be rounded, which `progress` is told.
inline bool exponent_of(const CouplingView& weight, double* sums, int* k, int* shift, Progress& progress) {
  const CouplingStatus status = kernels().scale_exponent(weight, sums, k, shift);
  if (status == CouplingStatus::kNonFinite) progress.fail(Outcome::kNonFiniteWeight);
  if (status == CouplingStatus::kTooLarge) progress.fail(Outcome::kTooLargeWeight);
  return status == CouplingStatus::kOk;
}

// The couplings of one model at a time, rounded for binary sweeps.
class RoundedModel {
 public:
  explicit RoundedModel(const BipartiteCall& call)
      : call_(call),
        // With few chains to a model, the memory traffic of each chain's updates is what binds.
        is_narrow_(std::max(call.n1, call.n2) > call.narrow_from && !call.log_weights && call.batch.chains_per_model() < 32),
        rows_(size(false, call.n1, call.n2)),
        columns_(size(false, call.n2, call.n1)),
        narrow_rows_(size(true, call.n1, call.n2)),
        narrow_columns_(size(true, call.n2, call.n1)),
        sums_(padded_row(call.n2)) {}

  bool load(int64_t model, Progress& progress) {
    weight = weight_of(call_, model);
    if (!exponent_of(weight, sums_.get(), &k, &narrow.shift, progress)) return false;
    wide = {rows_.get(), columns_.get(), std::ldexp(1.0f, -k)};
    if (is_narrow_) narrow.rows = narrow_rows_.get(), narrow.columns = narrow_columns_.get();
    if (!call_.num_sweeps) return true;
    is_narrow_ ? kernels().round_narrow_couplings(weight, k, narrow) : kernels().round_couplings(weight, k, wide);
    return true;
  }

  CouplingView weight = {};
  int k = 0;
  RoundedCoupling wide = {};
  NarrowCoupling narrow = {};  // its rows are null if it is not in use

 private:
  int64_t size(bool narrow, int64_t rows, int64_t columns) const {
    return call_.num_sweeps && narrow == is_narrow_ ? rows * padded_row(columns) : 0;
  }

  const BipartiteCall& call_;
  const bool is_narrow_;
  Buffer<int32_t> rows_, columns_;
  Buffer<int16_t> narrow_rows_, narrow_columns_;
  Buffer<double> sums_;
};

// Arguments of relaxed sweeps that all chains of a model share. packed: scratch for packed_size() couplings.
inline int64_t packed_size(const BipartiteCall& call) {
  return call.num_relaxed_sweeps && call.weight.stride != 1 ? call.n1 * call.n2 : 0;
}
template <class T>
RelaxedSweeps<T> relaxed_sweeps(const BipartiteCall& call, int64_t model, T* packed) {
  const T* weight = row_of<T>(call.batch, call.weight, model, 0);
  int64_t row_stride = call.weight.row_stride;
  if (packed_size(call)) {
    for (int64_t i = 0; i < call.n1; ++i)
      for (int64_t j = 0; j < call.n2; ++j) packed[i * call.n2 + j] = weight[i * row_stride + j * call.weight.stride];
    weight = packed;
    row_stride = call.n2;
  }
  const bool schedule = call.beta.size() > 1;
  return {call.n1,
          call.n2,
          call.num_relaxed_sweeps,
          row_stride,
          call.seed,
          uint64_t(call.sweep_offset + call.num_sweeps),
          call.beta.data() + (schedule ? call.num_sweeps : 0),
          schedule ? 1 : 0,
          weight,
          call.relaxation,
          T(call.sharpness),
          call.slope_gradient,
          call.batch.num_models() * call.batch.chains_per_model() * (call.n1 + call.n2)};
}

}  // namespace gibbs
