// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/graph.h"
#include "cpu/kernels/table.h"
#include "cpu/scratch.h"
#include "cpu/worst_rounding.h"

// Groups of up to 16 chains side by side in the lanes of vectors: their rows as lanes, and their couplings.
namespace gibbs {

constexpr int64_t kFewChains = 4;  // faster one after the other than side by side in a group, most of whose lanes would be empty

// The chains of a group: some of one model, or all those of several models.
struct Group {
  int count = 0;
  int64_t model[kGroup], chain[kGroup], linear[kGroup];
  void add(const Batch& batch, int64_t m, int64_t c) {
    model[count] = m, chain[count] = c;
    linear[count++] = batch.linear(m, c);
  }
  void number_chains(const SweepCall& call, uint64_t* number) const {
    for (int l = 0; l < kGroup; ++l) number[l] = l < count ? chain_number(call, model[l], chain[l]) : 0;
  }
};

// Models of few chains share a group, so that no lanes are left empty; models of many have groups of their own, and couplings that
// need no copy for each lane.
// All lanes of a group have one beta, and those that are counted one model.
inline bool mixes_models(const SweepCall& call) {
  const int64_t models = call.batch.num_models(), chains = call.batch.chains_per_model();
  return call.beta_strides.empty() && !call.counts && models > 1 && chains <= kGroup / 2 && models * chains > kFewChains;
}
inline int64_t models_per_group(const Batch& batch) { return kGroup / batch.chains_per_model(); }
inline int64_t num_mixed_groups(const Batch& batch) {
  return (batch.num_models() + models_per_group(batch) - 1) / models_per_group(batch);
}
inline Group mixed_group(const Batch& batch, int64_t group) {
  Group out;
  const int64_t per = models_per_group(batch), end = std::min(batch.num_models(), (group + 1) * per);
  for (int64_t m = group * per; m < end; ++m)
    for (int64_t c = 0; c < batch.chains_per_model(); ++c) out.add(batch, m, c);
  return out;
}
inline int64_t num_groups(const Batch& batch) { return (batch.chains_per_model() + kGroup - 1) / kGroup; }
inline Group group_of_model(const Batch& batch, int64_t model, int64_t group) {
  Group out;
  const int64_t end = std::min<int64_t>(batch.chains_per_model(), (group + 1) * kGroup);
  for (int64_t c = group * kGroup; c < end; ++c) out.add(batch, model, c);
  return out;
}

template <class T>
bool same_rows(const T* const* rows, int count) {
  for (int l = 1; l < count; ++l)
    if (rows[l] != rows[0]) return false;
  return true;
}

// Copies n values as `To`; false if one is not finite.
template <class From, class To>
bool copy_finite(const From* from, int64_t n, int64_t stride, To* out) {
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    out[i] = To(from[i * stride]);
    finite &= std::isfinite(out[i]);
  }
  return finite;
}

// Turns rows of up to `longest` values, one for each chain of a group, into lanes [n, kGroup], and back.
template <class T>
class LaneRows {
 public:
  explicit LaneRows(int64_t longest) : zeros_(longest), spare_(longest) {}

  // Lanes without a row become 0. False if a value is not finite as T.
  template <class From>
  bool load(const From* const* rows, int count, int64_t n, int64_t stride, T* out) {
    if constexpr (std::is_same_v<From, T>)
      if (stride == 1 && !(count > 1 && same_rows(rows, count))) {
        const T* all[kGroup];
        for (int l = 0; l < kGroup; ++l) all[l] = l < count ? rows[l] : zeros_.get();
        return kernels().of<T>().lanes_from_rows(all, n, out);
      }
    bool finite = true;
    if (count > 0 && same_rows(rows, count)) {
      for (int64_t i = 0; i < n; ++i) {
        const T value = T(rows[0][i * stride]);
        finite &= std::isfinite(value);
        std::fill_n(out + i * kGroup, kGroup, value);
      }
      return finite;
    }
    if (count < kGroup) std::memset(static_cast<void*>(out), 0, size_t(n * kGroup) * sizeof(T));
    for (int64_t i = 0; i < n; ++i)
      for (int l = 0; l < count; ++l) {
        out[i * kGroup + l] = T(rows[l][i * stride]);
        finite &= std::isfinite(out[i * kGroup + l]);
      }
    return finite;
  }
  void store(const T* lanes, int count, int64_t n, T* const* rows) {
    T* all[kGroup];
    for (int l = 0; l < kGroup; ++l) all[l] = l < count ? rows[l] : spare_.get();
    kernels().of<T>().rows_from_lanes(lanes, n, all);
  }
  T* spare() const { return spare_.get(); }  // a row that nobody reads

 private:
  Buffer<T> zeros_, spare_;
};

// Turns rows of bits into lanes [n, kGroup] of 0 and `one`, and masks 0 and -1 back into rows of bits.
template <class T>
void lanes_from_bits(const uint32_t* bits, const Group& group, int64_t n, T one, T* lanes) {
  const int64_t words = state_words(n);
  uint32_t word[kGroup] = {};
  for (int64_t w = 0; w < words; ++w) {
    for (int l = 0; l < group.count; ++l) word[l] = bits[group.linear[l] * words + w];
    const int64_t count = std::min<int64_t>(32, n - 32 * w);
    for (int64_t i = 0; i < count; ++i, lanes += kGroup)
      for (int l = 0; l < kGroup; ++l) lanes[l] = T(int32_t(word[l] >> i & 1)) * one;
  }
}
inline void bits_from_masks(const int32_t* masks, const Group& group, int64_t n, uint32_t* bits) {
  const int64_t words = state_words(n);
  for (int64_t w = 0; w < words; ++w) {
    uint32_t word[kGroup] = {};
    const int64_t count = std::min<int64_t>(32, n - 32 * w);
    for (int64_t i = 0; i < count; ++i, masks += kGroup)
      for (int l = 0; l < kGroup; ++l) word[l] |= (uint32_t(masks[l]) & 1) << i;
    for (int l = 0; l < group.count; ++l) bits[group.linear[l] * words + w] = word[l];
  }
}

inline Outcome fault_of(CouplingStatus status) {
  return status == CouplingStatus::kNonFinite ? Outcome::kNonFiniteCoupling : Outcome::kTooLargeCoupling;
}

// One model's couplings, as all lanes of its groups read them: by half-edge. Backward passes need no rounded ones.
template <class T>
class SharedCoupling {
 public:
  SharedCoupling(const GraphCall& call, bool is_rounded)
      : call_(call),
        row_(call.graph.num_edges),
        rounded_(is_rounded ? call.graph.num_edges : 0),
        halves_(2 * call.graph.num_edges),
        rounded_halves_(is_rounded ? 2 * call.graph.num_edges : 0),
        is_rounded_(is_rounded) {}
  bool load(int64_t model, Progress& progress) {
    const GraphView& g = call_.graph;
    const T* row = row_of<T>(call_.batch, call_.coupling, model, 0);
    if (is_loaded_ && row == loaded_) return true;
    const bool finite = copy_finite(row, g.num_edges, call_.coupling.stride, row_.get());
    if (!finite) return progress.fail(Outcome::kNonFiniteCoupling), false;
    for (int64_t h = 0; h < 2 * g.num_edges; ++h) halves_.get()[h] = row_.get()[g.edge_of[h]];
    if (is_rounded_) {
      const CouplingStatus status = kernels().of<T>().round_graph_couplings(g, row_.get(), 1, &k_, rounded_.get());
      if (status != CouplingStatus::kOk) return progress.fail(fault_of(status)), false;
      for (int64_t h = 0; h < 2 * g.num_edges; ++h) rounded_halves_.get()[h] = rounded_.get()[g.edge_of[h]];
    }
    loaded_ = row, is_loaded_ = true;
    return true;
  }
  const T* source() const { return loaded_; }
  const T* values() const { return halves_.get(); }
  const int32_t* rounded() const { return rounded_halves_.get(); }
  float scale() const { return std::ldexp(1.0f, -k_); }
  void copy_scales(float* out) const { std::fill_n(out, kGroup, scale()); }
  static constexpr bool kShared = true;

 private:
  const GraphCall& call_;
  Buffer<T> row_;
  Buffer<int32_t> rounded_;
  Buffer<T> halves_;
  Buffer<int32_t> rounded_halves_;
  bool is_rounded_;
  const T* loaded_ = nullptr;  // also that of a graph without edges
  bool is_loaded_ = false;
  int k_ = 0;
};

// Each lane's own couplings, [num_edges, kGroup].
template <class T>
class LaneCoupling {
 public:
  explicit LaneCoupling(const GraphCall& call) : call_(call), rows_(call.graph.num_edges), lanes_(call.graph.num_edges * kGroup) {}
  bool load(const Group& group, Progress& progress) {
    const T* rows[kGroup] = {};
    for (int l = 0; l < group.count; ++l) rows[l] = row_of<T>(call_.batch, call_.coupling, group.model[l], 0);
    if (rows_.load(rows, group.count, call_.graph.num_edges, call_.coupling.stride, lanes_.get())) return true;
    return progress.fail(Outcome::kNonFiniteCoupling), false;
  }
  const T* values() const { return lanes_.get(); }
  static constexpr bool kShared = false;

 private:
  const GraphCall& call_;
  LaneRows<T> rows_;
  Buffer<T> lanes_;
};

// The same, rounded.
class RoundedLanes {
 public:
  explicit RoundedLanes(const GraphCall& call) : call_(call), rounded_(call.graph.num_edges * kGroup) {}
  template <class T>
  bool load(const Group& group, const LaneCoupling<T>& coupling, WorstRounding& worst, Progress& progress) {
    int k[kGroup];
    const CouplingStatus status =
        kernels().of<T>().round_graph_couplings(call_.graph, coupling.values(), kGroup, k, rounded_.get());
    if (status != CouplingStatus::kOk) return progress.fail(fault_of(status)), false;
    for (int l = 0; l < kGroup; ++l) scale_[l] = std::ldexp(1.0f, -k[l]);
    for (int l = 0; l < group.count; ++l) worst.note({scale_[l], 0});
    return true;
  }
  const int32_t* rounded() const { return rounded_.get(); }
  void copy_scales(float* out) const { std::copy_n(scale_, kGroup, out); }
  static constexpr bool kShared = false;

 private:
  const GraphCall& call_;
  Buffer<int32_t> rounded_;
  float scale_[kGroup];
};

// Loads the biases of a group in float32, one for each lane. If `shared` is given and all chains have the same bias, sets it and
// loads one for all. False if one is not finite.
template <class T>
bool load_group_bias(const GraphCall& call, const Operand& bias, const Group& group, LaneRows<float>& lanes, float* out,
                     bool* shared) {
  const T* rows[kGroup] = {};
  for (int l = 0; l < group.count; ++l) rows[l] = row_of<T>(call.batch, bias, group.model[l], group.chain[l]);
  const int64_t n = call.graph.num_nodes;
  return shared && (*shared = same_rows(rows, group.count)) ? copy_finite(rows[0], n, bias.stride, out)
                                                            : lanes.load(rows, group.count, n, bias.stride, out);
}

// The same of several groups of chains side by side. If all chains of all groups have the same bias, one row is loaded for all.
template <class T, int kParts>
class BiasOfParts {
 public:
  explicit BiasOfParts(const GraphCall& call)
      : call_(call), lanes_(call.graph.num_nodes), values_(call.graph.num_nodes * kGroup * kParts) {}
  // False if one is not finite.
  bool load(const Group* parts, bool may_be_shared) {
    const auto row = [&](int part, int l) {
      return row_of<T>(call_.batch, call_.bias, parts[part].model[l], parts[part].chain[l]);
    };
    is_shared_ = may_be_shared;
    for (int part = 0; part < kParts && is_shared_; ++part)
      for (int l = 0; l < parts[part].count; ++l) is_shared_ &= row(part, l) == row(0, 0);
    bool is_shared = false;
    for (int part = 0; part < num_loaded(); ++part)
      if (!load_group_bias<T>(call_, call_.bias, parts[part], lanes_, values(part), is_shared_ ? &is_shared : nullptr))
        return false;
    return true;
  }
  bool is_shared() const { return is_shared_; }
  int num_loaded() const { return is_shared_ ? 1 : kParts; }
  int num_lanes() const { return is_shared_ ? 1 : kGroup; }
  float* values(int part) const { return values_.get() + part * call_.graph.num_nodes * kGroup; }  // [num_nodes, num_lanes()]

 private:
  const GraphCall& call_;
  LaneRows<float> lanes_;
  Buffer<float> values_;
  bool is_shared_ = false;
};

// The place of each node in the order of updates.
inline void copy_positions(const GraphView& g, int32_t* out) {
  for (int64_t position = 0; position < g.num_nodes; ++position) out[g.order[position]] = int32_t(position);
}

// Some of a round's binary sweeps, as kernels that need no tables of their own read them.
inline GraphSweeps binary_sweeps(const GraphCall& call, const BetaRow<float>& beta, int64_t first, int64_t count,
                                 Progress& progress) {
  return {
      call.graph, count,   call.seed,       uint64_t(call.sweep_offset + first), beta.values + first * beta.stride(), beta.stride(),
      nullptr,    nullptr, progress.check()};
}

// The relaxed sweeps are numbered from 0.
template <class T>
RelaxedGraphSweep<T> relaxed_sweep(const GraphCall& call, int64_t model, int64_t sweep) {
  return {call.graph,
          call.seed,
          uint64_t(call.sweep_offset + call.num_sweeps + sweep),
          T(betas_of(call, call.beta, model).at(call.num_sweeps + sweep)),
          call.relaxation,
          T(call.sharpness),
          call.slope_gradient};
}

}  // namespace gibbs
