// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/bipartite_counter.h"
#include "cpu/bipartite_couplings.h"
#include "cpu/worst_rounding.h"

// Binary sweeps of groups of chains that share a bipartite model.
namespace gibbs {

// Padded float32 copies of the biases of a group's chains. Chains whose bias lies at the same place share one copy.
template <class T>
class BiasCache {
 public:
  BiasCache(int64_t n, int64_t capacity) : n_(n), padded_(padded_side(n)), values_(capacity * padded_) {}
  void clear() { used_ = 0, last_ = nullptr; }
  const T* last() const { return last_; }
  // Null if a value is not finite in float32.
  const float* add(const T* bias, int64_t stride) {
    if (bias == last_) return values_.get() + (used_ - 1) * padded_;
    float* out = values_.get() + used_++ * padded_;
    last_ = bias;
    if (stride == 1)
      std::copy_n(bias, n_, out);
    else
      for (int64_t i = 0; i < n_; ++i) out[i] = float(bias[i * stride]);
    bool finite = true;
    for (int64_t i = 0; i < n_; ++i) finite &= std::fabs(out[i]) <= std::numeric_limits<float>::max();
    return finite ? out : nullptr;
  }

 private:
  int64_t n_, padded_, used_ = 0;
  const T* last_ = nullptr;
  Buffer<float> values_;
};

// A chain without its biases.
inline BinaryChain chain_of(const BipartiteCall& call, int64_t model, int64_t chain) {
  const int64_t linear = call.batch.linear(model, chain), left_words = state_words(call.n1), right_words = state_words(call.n2);
  BinaryChain out = {};
  out.left = call.left_bits + linear * left_words;
  out.right = call.right_bits + linear * right_words;
  if (call.clamp_left) out.clamp_left = call.clamp_left + linear * left_words;
  if (call.clamp_right) out.clamp_right = call.clamp_right + linear * right_words;
  if (call.log_weights) out.log_weight = call.log_weights + linear;
  out.number = chain_number(call, model, chain);
  return out;
}

// Scratch memory and code of one thread, for groups of up to `capacity` chains.
template <class T>
class BinaryRunner {
 public:
  BinaryRunner(const BipartiteCall& call, int64_t capacity, WorstRounding& worst, Progress& progress)
      : call_(call),
        worst_(worst),
        progress_(progress),
        chains_(size_t(capacity)),
        left_bias_(call.n1, is_shared(call.left_bias) ? 1 : capacity),
        right_bias_(call.n2, is_shared(call.right_bias) ? 1 : capacity),
        base_left_bias_(call.n1, call.log_weights ? capacity : 0),
        base_right_bias_(call.n2, call.log_weights ? capacity : 0),
        beta_(call.beta.begin(), call.beta.end()),
        energy_acc_(call.energies ? padded_side(call.n1) : 0),
        energy_list_(call.energies ? std::max(call.n1, call.n2) + 16 : 0) {
    if (call.counts) counter_.emplace(call, call.n1, call.n2);
    // Few sweeps of few chains do not pay for the rounding.
    const int64_t larger = std::max(call.n1, call.n2);
    if (kernels().sweep_coarse && call.allow_tables && !call.log_weights && capacity >= kMinTableChains &&
        larger <= kMostCoarseUnits && capacity * call.num_sweeps * rounds_of_a_weight(call) >= 2 * larger)
      coarse_.emplace(call, capacity);
  }

  void run(int64_t model, Interval group, const RoundedModel<T>& coupling) {
    const int64_t count = group.end - group.begin;
    left_bias_.clear(), right_bias_.clear(), base_left_bias_.clear(), base_right_bias_.clear();
    const auto load = [&](BiasCache<T>& cache, const Operand& bias, int64_t chain, Outcome fault) {
      const float* values = cache.add(row_of<T>(call_.batch, bias, model, chain), bias.stride);
      if (!values) progress_.fail(fault);
      return values;
    };
    for (int64_t chain = group.begin; chain < group.end; ++chain) {
      BinaryChain& c = chains_[size_t(chain - group.begin)];
      c = chain_of(call_, model, chain);
      c.left_bias = load(left_bias_, call_.left_bias, chain, Outcome::kNonFiniteLeftBias);
      c.right_bias = load(right_bias_, call_.right_bias, chain, Outcome::kNonFiniteRightBias);
      if (call_.log_weights) {
        c.base_left_bias = load(base_left_bias_, call_.base_left_bias, chain, Outcome::kNonFiniteBaseLeftBias);
        c.base_right_bias = load(base_right_bias_, call_.base_right_bias, chain, Outcome::kNonFiniteBaseRightBias);
      }
    }
    if (progress_.stop()) return;
    note_biases(count, coupling.wide.scale);
    const BetaRow<float> beta = betas_of(call_, beta_, model);
    BinarySweeps sweeps = {call_.n1,
                           call_.n2,
                           call_.num_sweeps,
                           call_.seed,
                           uint64_t(call_.sweep_offset),
                           beta.values,
                           beta.stride(),
                           coupling.wide,
                           coupling.narrow,
                           coupling.weight,
                           coupling.k,
                           call_.log_weights != nullptr,
                           call_.allow_tables,
                           progress_.check()};
    const bool is_coarse =
        !coupling.lookup && coarse_ && coarse_->serves(sweeps, chains_.data(), count, left_bias_.last(), right_bias_.last());
    if (call_.num_coarse_groups && (coupling.lookup || is_coarse)) ++*call_.num_coarse_groups;
    if (coupling.lookup && !lookup_) lookup_.emplace(call_, int64_t(chains_.size()));
    if (!coupling.lookup && !sums_) sums_.emplace(call_, int64_t(chains_.size()));
    if (counter_) counter_->begin(model);
    const auto sweep = [&](int64_t first, int64_t some) {
      sweeps.num_sweeps = some;
      sweeps.first_sweep = uint64_t(call_.sweep_offset + first), sweeps.beta = beta.values + first * beta.stride();
      if (coupling.lookup) return kernels().sweep_lookup(sweeps, *coupling.lookup, chains_.data(), count, lookup_->scratch());
      const GroupScratch scratch = sums_->scratch(is_coarse ? coarse_->before.get() : nullptr);
      if (is_coarse) return kernels().sweep_coarse(sweeps, coarse_->coupling, chains_.data(), count, scratch);
      (coupling.narrow.rows ? kernels().sweep_narrow : kernels().sweep_group)(sweeps, chains_.data(), count, scratch);
    };
    sweep_and_read(call_, progress_, sweep, [&] { counter_->add(chains_.data(), count); });
    for (int64_t c = 0; call_.energies && c < count; ++c)
      call_.energies[call_.batch.linear(model, group.begin + c)] =
          kernels().bipartite_energy(call_.n1, call_.n2, coupling.wide, chains_[size_t(c)], energy_acc_.get(), energy_list_.get());
  }

 private:
  void note_biases(int64_t count, float scale) {
    const auto note = [&](int64_t n, const float* bias, const float* base) {
      worst_.note_biases(&scale, 1, n, bias, base ? base : bias);
    };
    const BinaryChain* before = nullptr;  // which may have the same biases
    for (const BinaryChain* c = chains_.data(); c < chains_.data() + count; before = c++) {
      if (!before || before->left_bias != c->left_bias || before->base_left_bias != c->base_left_bias)
        note(call_.n1, c->left_bias, c->base_left_bias);
      if (!before || before->right_bias != c->right_bias || before->base_right_bias != c->base_right_bias)
        note(call_.n2, c->right_bias, c->base_right_bias);
    }
  }

  // The group's model in 16 bits.
  struct Coarse {
    Coarse(const BipartiteCall& call, int64_t capacity)
        : rows(call.n1 * padded_side(call.n2)),
          columns(call.n2 * padded_side(call.n1)),
          left_bias(padded_side(call.n1)),
          right_bias(padded_side(call.n2)),
          before(capacity * state_words(std::max(call.n1, call.n2))),
          largest_slack(call.largest_slack),
          coupling{{0, 0, 0}, rows.get(), columns.get(), left_bias.get(), right_bias.get()} {
      std::tie(least_beta, largest_beta) = beta_range(call);
    }
    bool serves(const BinarySweeps& sweeps, const BinaryChain* chains, int64_t count, const void* source_of_left_bias,
                const void* source_of_right_bias) {
      if (count < kMinTableChains) return false;
      for (const BinaryChain* c = chains; c < chains + count; ++c)
        if (c->left_bias != chains->left_bias || c->right_bias != chains->right_bias) return false;
      const void* const source[] = {sweeps.weight.data, source_of_left_bias, source_of_right_bias};
      if (!std::equal(std::begin(source), std::end(source), made_of))
        slack = kernels().round_coarse(sweeps, *chains, least_beta, largest_beta, coupling);
      std::copy_n(source, 3, made_of);
      return slack <= largest_slack;
    }
    Buffer<int16_t> rows, columns, left_bias, right_bias;
    Buffer<uint32_t> before;
    int largest_slack, slack = 0;
    const void* made_of[3] = {};  // the weight and the biases
    double least_beta, largest_beta;
    CoarseCoupling coupling;
  };

  // Scratch memory of chains that keep sums of their own.
  struct Sums {
    Sums(const BipartiteCall& call, int64_t capacity)
        : acc_left(capacity * padded_side(call.n1)),
          acc_right(capacity * padded_side(call.n2)),
          bytes(group_random_bytes(call.n1 + call.n2, capacity)),
          raised(std::max(call.n1, call.n2) + 16),
          lowered(std::max(call.n1, call.n2) + 16),
          table(table_size(capacity)) {}
    GroupScratch scratch(uint32_t* before) const {
      return {acc_left.get(), acc_right.get(), bytes.get(), raised.get(), lowered.get(), table.get(), before};
    }
    Buffer<int32_t> acc_left, acc_right;
    Buffer<uint8_t> bytes;
    Buffer<int32_t> raised, lowered, table;
  };

  // Scratch memory of lookups.
  struct Lookup {
    Lookup(const BipartiteCall& call, int64_t capacity)
        : vectors((capacity + kLookupLanes - 1) / kLookupLanes),
          left(call.n1 * vectors),
          right(call.n2 * vectors),
          left_fixed(call.n1 * vectors),
          right_fixed(call.n2 * vectors),
          lanes(is_shared(call.left_bias) && is_shared(call.right_bias) ? 1 : vectors * kLookupLanes),
          left_bias(call.n1 * lanes),
          right_bias(call.n2 * lanes),
          index(num_lookup_tables(std::max(call.n1, call.n2)) * vectors * kLookupLanes),
          bytes(128 * vectors * kLookupLanes) {}
    LookupScratch scratch() const {
      return {left.get(),      right.get(),      left_fixed.get(), right_fixed.get(),
              left_bias.get(), right_bias.get(), index.get(),      bytes.get()};
    }
    int64_t vectors;
    Buffer<uint32_t> left, right, left_fixed, right_fixed;
    int64_t lanes;  // of biases
    Buffer<int16_t> left_bias, right_bias;
    Buffer<uint16_t> index, bytes;
  };

  const BipartiteCall& call_;
  WorstRounding& worst_;
  Progress& progress_;
  std::vector<BinaryChain> chains_;
  BiasCache<T> left_bias_, right_bias_, base_left_bias_, base_right_bias_;
  std::optional<Coarse> coarse_;
  std::optional<Sums> sums_;  // made where they are used first, as the next
  std::optional<Lookup> lookup_;
  std::optional<BipartiteCounter> counter_;
  std::vector<float> beta_;
  Buffer<int32_t> energy_acc_, energy_list_;
};

}  // namespace gibbs
