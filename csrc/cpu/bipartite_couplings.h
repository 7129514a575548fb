// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/bipartite.h"
#include "cpu/scratch.h"

// A bipartite model's couplings, as its sweeps read them.
namespace gibbs {

// Whether all chains of all models have one.
inline bool is_shared(const Operand& operand) {
  return std::all_of(operand.batch_strides.begin(), operand.batch_strides.end(), [](int64_t stride) { return stride == 0; });
}

// How often a weight is swept with once it is rounded. Of several weights none is kept until the next round.
inline int64_t rounds_of_a_weight(const BipartiteCall& call) { return is_shared(call.weight) ? call.num_rounds : 1; }

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

// A transposed matrix is read as the one that it was made from, whose rows are contiguous.
inline bool is_transposed(const CouplingView& w) { return w.column_stride != 1 && w.row_stride == 1; }
inline CouplingView with_contiguous_rows(const CouplingView& w) {
  return is_transposed(w) ? CouplingView{w.data, w.is_double, w.n2, w.n1, w.column_stride, w.row_stride} : w;
}

// False if the couplings cannot be rounded, which `progress` is told.
inline bool scale_of(const CouplingView& weight, double* sums, WeightScale& out, Progress& progress) {
  const CouplingStatus status = kernels().scale_couplings(weight, sums, out);
  if (status == CouplingStatus::kNonFinite) progress.fail(Outcome::kNonFiniteWeight);
  if (status == CouplingStatus::kTooLarge) progress.fail(Outcome::kTooLargeWeight);
  return status == CouplingStatus::kOk;
}

// The largest magnitude of a bias of some chains of a model.
template <class T>
double largest_bias(const SweepCall& call, const Operand& bias, int64_t n, int64_t model, Interval chains) {
  double largest = 0;
  const T* before = nullptr;
  for (int64_t chain = chains.begin; chain < chains.end; ++chain) {
    const T* row = row_of<T>(call.batch, bias, model, chain);
    for (int64_t i = 0; row != before && i < n; ++i) largest = std::max(largest, double(std::fabs(float(row[i * bias.stride]))));
    before = row;
  }
  return largest;
}

// A model's couplings as tables, for calls of so many chains and sweeps that they pay.
template <class T>
class LookupModel {
 public:
  static bool pays(const BipartiteCall& call) {
    if (!kernels().sweep_lookup || !call.num_sweeps || call.log_weights || std::max(call.n1, call.n2) > kMostCoarseUnits)
      return false;
    const int64_t chains = call.batch.chains_per_model(), least = std::max<int64_t>(128, (call.n1 + call.n2) / 5);
    return call.look_up_always ||
           (call.allow_tables && chains >= kMinTableChains && chains * call.num_sweeps * rounds_of_a_weight(call) >= least);
  }
  explicit LookupModel(const BipartiteCall& call)
      : call_(call),
        to_left_(call.n1 * num_lookup_tables(call.n2)),
        to_right_(call.n2 * num_lookup_tables(call.n1)),
        left_offset_(call.n1),
        right_offset_(call.n2) {}
  // The tables, or null if they leave too many units open or the call failed.
  const LookupCoupling* load(int64_t model, const RoundedCoupling& wide, const Runtime& runtime, Progress& progress) {
    const Interval chains = {0, call_.batch.chains_per_model()};
    const double bias = std::max(largest_bias<T>(call_, call_.left_bias, call_.n1, model, chains),
                                 largest_bias<T>(call_, call_.right_bias, call_.n2, model, chains));
    const void* weight = weight_of(call_, model).data;
    if (weight != weight_ || bias != bias_) loaded_ = make(bias, wide, runtime, progress);
    weight_ = weight, bias_ = bias;
    return progress.stop() ? nullptr : loaded_;
  }

 private:
  const LookupCoupling* make(double bias, const RoundedCoupling& wide, const Runtime& runtime, Progress& progress) {
    const auto [least_beta, largest_beta] = beta_range(call_);
    coupling_.left = {to_left_.get(), left_offset_.get()};
    coupling_.right = {to_right_.get(), right_offset_.get()};
    LookupSums most = {0, 0, 0};
    std::mutex mutex;
    const auto note = [&](const int32_t* rows, int64_t n, Interval part) {
      LookupSums of_part = {0, 0, 0};
      kernels().note_lookup_sums(rows + part.begin * padded_row(n), part.end - part.begin, n, of_part);
      const std::lock_guard<std::mutex> lock(mutex);
      most = {std::max(most.all, of_part.all), std::max(most.block, of_part.block), std::max(most.middle, of_part.middle)};
    };
    for_each_part(runtime, call_.n1, 1, progress, [&](Interval part) { note(wide.rows, call_.n2, part); });
    for_each_part(runtime, call_.n2, 1, progress, [&](Interval part) { note(wide.columns, call_.n1, part); });
    if (!kernels().choose_lookup_unit(call_.n1, call_.n2, most, wide.scale, bias, least_beta, coupling_)) return nullptr;
    coupling_.error = 0;
    for_each_part(runtime, 2 * lookup_counters(call_.n1, call_.n2), 1, progress, [&](Interval part) {
      const int64_t counters = lookup_counters(call_.n1, call_.n2);
      float error = 0;
      for (const bool is_left : {false, true}) {
        const int64_t first = part.begin - is_left * counters, last = part.end - is_left * counters;
        error = std::max(error, kernels().round_lookup(call_.n1, call_.n2, wide, is_left, first, last, coupling_));
      }
      const std::lock_guard<std::mutex> lock(mutex);
      coupling_.error = std::max(coupling_.error, error);
    });
    if (progress.stop()) return nullptr;
    return kernels().slack_of_fields(coupling_, largest_beta) <= call_.largest_slack ? &coupling_ : nullptr;
  }

  const BipartiteCall& call_;
  Buffer<LookupTable> to_left_, to_right_;
  Buffer<float> left_offset_, right_offset_;
  LookupCoupling coupling_ = {};
  const void* weight_ = nullptr;  // what they are made of
  double bias_ = 0;
  const LookupCoupling* loaded_ = nullptr;
};

// The couplings of one model at a time, rounded for binary sweeps.
template <class T>
class RoundedModel {
 public:
  explicit RoundedModel(const BipartiteCall& call)
      : call_(call),
        // With few chains to a model, the memory traffic of each chain's updates is what binds.
        is_narrow_(std::max(call.n1, call.n2) > call.narrow_from && !call.log_weights && !call.energies &&
                   call.batch.chains_per_model() < 32 && !LookupModel<T>::pays(call)),
        rows_(size(false, call.n1, call.n2)),
        columns_(size(false, call.n2, call.n1)),
        narrow_rows_(size(true, call.n1, call.n2)),
        narrow_columns_(size(true, call.n2, call.n1)),
        sums_(2 * padded_row(std::max(call.n1, call.n2))) {
    if (LookupModel<T>::pays(call)) lookup_model_.emplace(call);
  }

  // False if the call failed.
  bool load(int64_t model, const Runtime& runtime, Progress& progress) {
    const CouplingView last = std::exchange(weight, weight_of(call_, model));
    if (weight.data != last.data && !round(runtime, progress)) return false;
    if (call_.num_sweeps) lookup = lookup_model_ ? lookup_model_->load(model, wide, runtime, progress) : nullptr;
    return !progress.stop();
  }

  CouplingView weight = {};
  int k = 0;
  RoundedCoupling wide = {};
  NarrowCoupling narrow = {};              // its rows are null if it is not in use
  const LookupCoupling* lookup = nullptr;  // null: not in use

 private:
  bool round(const Runtime& runtime, Progress& progress) {
    const bool swapped = is_transposed(weight);
    const CouplingView view = with_contiguous_rows(weight);
    WeightScale scale;
    if (!scale_of(view, sums_.get(), scale, progress)) return false;
    k = scale.k, narrow.shift = scale.shift;
    wide = {rows_.get(), columns_.get(), std::ldexp(1.0f, -k)};
    if (is_narrow_) narrow.rows = narrow_rows_.get(), narrow.columns = narrow_columns_.get();
    if (!call_.num_sweeps) return true;
    NarrowCoupling narrow_view = narrow;
    RoundedCoupling wide_view = wide;
    if (swapped) std::swap(narrow_view.rows, narrow_view.columns), std::swap(wide_view.rows, wide_view.columns);
    for_each_part(runtime, view.n1, 16, progress, [&](Interval rows) {
      is_narrow_ ? kernels().round_narrow_couplings(view, k, rows.begin, rows.end, narrow_view)
                 : kernels().round_couplings(view, k, rows.begin, rows.end, wide_view);
    });
    return !progress.stop();
  }
  int64_t size(bool narrow, int64_t rows, int64_t columns) const {
    return call_.num_sweeps && narrow == is_narrow_ ? padded_row(rows) * padded_row(columns) : 0;
  }

  const BipartiteCall& call_;
  const bool is_narrow_;
  Buffer<int32_t> rows_, columns_;
  Buffer<int16_t> narrow_rows_, narrow_columns_;
  Buffer<double> sums_;
  std::optional<LookupModel<T>> lookup_model_;
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
  const BetaRow<double> beta = betas_of(call, call.beta, model);
  return {call.n1,
          call.n2,
          call.num_relaxed_sweeps,
          row_stride,
          call.seed,
          uint64_t(call.sweep_offset + call.num_sweeps),
          beta.values + call.num_sweeps * beta.stride(),
          beta.stride(),
          weight,
          call.relaxation,
          T(call.sharpness),
          call.slope_gradient,
          call.batch.num_models() * call.batch.chains_per_model() * (call.n1 + call.n2)};
}

}  // namespace gibbs
