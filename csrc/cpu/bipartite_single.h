// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "cpu/bipartite_binary.h"

// Binary sweeps of a few chains of a model, one after the other, by fields of 16 bits.
namespace gibbs {

// Scratch memory and code of one thread.
template <class T>
class SingleRunner {
 public:
  static bool pays(const BipartiteCall& call) {
    const int64_t chains = call.batch.chains_per_model(), units = call.n1 + call.n2;
    // There are probabilities for one beta of a model only.
    return kernels().sweep_single && !call.log_weights && !call.energies && call.largest_single_slack && chains < kMinTableChains &&
           std::max(call.n1, call.n2) <= kMostSingleUnits &&
           call.batch.num_models() * chains * call.num_sweeps * units >= call.single_from && has_one_beta(call) &&
           !LookupModel<T>::pays(call);
  }
  SingleRunner(const BipartiteCall& call, WorstRounding& worst, Progress& progress)
      : call_(call),
        worst_(worst),
        progress_(progress),
        beta_(call.beta.begin(), call.beta.end()),
        sums_(2 * padded_row(std::max(call.n1, call.n2))),
        rows_(padded_row(call.n1) * padded_side(call.n2)),
        columns_(padded_row(call.n2) * padded_side(call.n1)),
        left_bias_(padded_side(call.n1)),
        right_bias_(padded_side(call.n2)),
        left_field_(padded_side(call.n1)),
        right_field_(padded_side(call.n2)),
        bytes_(2 * random_bytes_capacity(call.n1 + call.n2)),
        exact_left_bias_(call.n1, 1),
        exact_right_bias_(call.n2, 1) {
    if (call.counts) counter_.emplace(call, call.n1, call.n2);
    single_.rows = rows_.get(), single_.columns = columns_.get();
    single_.left_bias = left_bias_.get(), single_.right_bias = right_bias_.get();
    single_.left_field = left_field_.get(), single_.right_field = right_field_.get();
    single_.bytes = bytes_.get();
  }

  // Sweeps some chains of a model; false if its fields would be too coarse.
  bool run(int64_t model, Interval chains) {
    single_.weight = weight_of(call_, model);
    if (!scale_of(with_contiguous_rows(single_.weight), sums_.get(), single_.scale, progress_)) return true;
    const float beta = betas_of(call_, beta_, model).at(0);
    const double bias = std::max(largest_bias<T>(call_, call_.left_bias, call_.n1, model, chains),
                                 largest_bias<T>(call_, call_.right_bias, call_.n2, model, chains));
    if (!kernels().round_single(bias, double(beta), call_.largest_single_slack, single_)) return false;
    const float unit = std::ldexp(1.0f, -single_.scale.k);
    worst_.note({unit, 0});
    for (int64_t chain = chains.begin; chain < chains.end && !progress_.stop(); ++chain) {
      single_.chain = chain_of(call_, model, chain);
      single_.chain.left_bias = load(exact_left_bias_, call_.left_bias, model, chain, Outcome::kNonFiniteLeftBias);
      single_.chain.right_bias = load(exact_right_bias_, call_.right_bias, model, chain, Outcome::kNonFiniteRightBias);
      if (progress_.stop()) break;
      worst_.note_biases(&unit, 1, call_.n1, single_.chain.left_bias, single_.chain.left_bias);
      worst_.note_biases(&unit, 1, call_.n2, single_.chain.right_bias, single_.chain.right_bias);
      BinarySweeps sweeps = {};
      sweeps.n1 = call_.n1, sweeps.n2 = call_.n2, sweeps.num_sweeps = call_.num_sweeps;
      sweeps.seed = call_.seed, sweeps.first_sweep = uint64_t(call_.sweep_offset), sweeps.beta = &beta;
      sweeps.check = progress_.check();
      if (counter_) counter_->begin(model);
      const auto sweep = [&](int64_t first, int64_t some) {
        sweeps.num_sweeps = some, sweeps.first_sweep = uint64_t(call_.sweep_offset + first);
        kernels().sweep_single(sweeps, single_, kept_);
      };
      sweep_and_read(call_, progress_, sweep, [&] { counter_->add(&single_.chain, 1); });
      if (call_.num_coarse_groups) ++*call_.num_coarse_groups;
    }
    return true;
  }

 private:
  static bool has_one_beta(const BipartiteCall& call) {
    for (size_t i = 0; i < call.beta.size(); ++i)
      if (call.beta[i] != call.beta[i / size_t(call.num_betas) * size_t(call.num_betas)]) return false;
    return true;
  }
  const float* load(BiasCache<T>& cache, const Operand& bias, int64_t model, int64_t chain, Outcome fault) {
    cache.clear();
    const float* values = cache.add(row_of<T>(call_.batch, bias, model, chain), bias.stride);
    if (!values) progress_.fail(fault);
    return values;
  }

  const BipartiteCall& call_;
  WorstRounding& worst_;
  Progress& progress_;
  const std::vector<float> beta_;
  Buffer<double> sums_;
  Buffer<int16_t> rows_, columns_, left_bias_, right_bias_, left_field_, right_field_;
  Buffer<uint8_t> bytes_;
  BiasCache<T> exact_left_bias_, exact_right_bias_;
  CoarseSingle single_ = {};
  KeptSigmoids kept_;
  std::optional<BipartiteCounter> counter_;
};

}  // namespace gibbs
