// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <limits>
#include <optional>
#include <utility>

#include "core/threshold.h"
#include "cpu/graph_counter.h"
#include "cpu/graph_groups.h"

// Binary sweeps of graphs by the route "sums", and Metropolis sweeps: groups of 16 chains.
namespace gibbs {

// threshold() is within 178 of a function that rises: at a larger logit it is at most 356 less. The bounds keep more than ten times
// that distance.
inline const LogitBounds& logit_bounds() {
  static const LogitBounds bounds = [] {
    constexpr int64_t kSpare = 4096;
    // Bisects for the least logit whose threshold is at least `wanted`.
    const auto logit_of = [](int64_t wanted) {
      float low = -kThresholdLimit, high = kThresholdLimit;
      for (int step = 0; step < 60; ++step) {
        const float middle = 0.5f * (low + high);
        (int64_t{threshold(middle)} >= wanted ? high : low) = middle;
      }
      return std::pair(low, high);
    };
    LogitBounds out;
    for (int64_t k = 0; k < 64; ++k) {
      out.zero[k] = k == 0 ? -std::numeric_limits<float>::infinity() : logit_of((k << 26) - kSpare).first;
      out.one[k] = k == 63 ? std::numeric_limits<float>::quiet_NaN() : logit_of(((k + 1) << 26) + kSpare).second;
    }
    return out;
  }();
  return bounds;
}

// Scratch memory and code of one thread.
template <class T>
class SumsRunner {
 public:
  SumsRunner(const GraphCall& call, const std::vector<float>& beta, WorstRounding& worst, Progress& progress)
      : call_(call),
        worst_(worst),
        progress_(progress),
        beta_(beta),
        position_(call.log_weights ? call.graph.num_nodes : 0),
        rows_(call.graph.num_nodes),
        state_(lane_size()),
        clamp_(call.clamp ? lane_size() : 0),
        bias_(lane_size()),
        base_bias_(call.log_weights ? lane_size() : 0),
        words_(call.metropolis ? whole_words(call.graph.num_nodes) : high_byte_counters(call.graph.num_nodes) * 4 * kGroup),
        open_(call.graph.num_nodes + 1) {
    if (call.counts) counter_.emplace(call);
    if (call.log_weights) copy_positions(call.graph, position_.get());
  }

  // coupling: SharedCoupling or RoundedLanes. False if the call failed.
  template <class Coupling>
  bool run(const Group& group, const Coupling& coupling) {
    const int64_t n = call_.graph.num_nodes;
    const bool annealed = call_.log_weights != nullptr;
    SumsGroup g = {};
    group.number_chains(call_, g.number);
    g.shared_coupling = Coupling::kShared;
    g.coupling = coupling.rounded();
    coupling.copy_scales(g.scale);
    if (!load_bias(call_.bias, group, bias_.get(), Coupling::kShared && !annealed ? &g.shared_bias : nullptr,
                   Outcome::kNonFiniteBias))
      return false;
    if (annealed && !load_bias(call_.base_bias, group, base_bias_.get(), nullptr, Outcome::kNonFiniteBaseBias)) return false;
    lanes_from_bits(call_.bits, group, n, -1, state_.get());
    if (call_.clamp) lanes_from_bits(call_.clamp, group, n, -1, clamp_.get());
    double log_weight[kGroup] = {};
    g.bias = bias_.get();
    g.base_bias = annealed ? base_bias_.get() : nullptr;
    worst_.note_biases(g.scale, g.shared_bias ? 1 : kGroup, n, g.bias, annealed ? g.base_bias : g.bias);
    g.state = state_.get();
    g.clamp = call_.clamp ? clamp_.get() : nullptr;
    g.log_weight = annealed ? log_weight : nullptr;
    g.words = words_.get();
    g.open = open_.get();
    const BetaRow<float> beta = betas_of(call_, beta_, group.model[0]);
    const auto sweep = [&](int64_t first, int64_t count) {
      GraphSweeps sweeps = binary_sweeps(call_, beta, first, count, progress_);
      sweeps.position = position_.get(), sweeps.bounds = &logit_bounds();
      (call_.metropolis ? kernels().metropolis : kernels().sweep_sums)(sweeps, g);
    };
    if (counter_) counter_->begin(group.model[0]);
    sweep_and_read(call_, progress_, sweep, [&] { counter_->add_lanes(state_.get(), group.count); });
    if (progress_.stop()) return false;
    bits_from_masks(state_.get(), group, n, call_.bits);
    if (annealed)
      for (int l = 0; l < group.count; ++l) call_.log_weights[group.linear[l]] = log_weight[l];
    return true;
  }

 private:
  int64_t lane_size() const { return call_.graph.num_nodes * kGroup; }

  bool load_bias(const Operand& bias, const Group& group, float* out, bool* shared, Outcome fault) {
    return load_group_bias<T>(call_, bias, group, rows_, out, shared) || (progress_.fail(fault), false);
  }

  const GraphCall& call_;
  WorstRounding& worst_;
  Progress& progress_;
  const std::vector<float>& beta_;
  Buffer<int32_t> position_;
  LaneRows<float> rows_;
  Buffer<int32_t> state_, clamp_;
  Buffer<float> bias_, base_bias_;
  Buffer<uint32_t> words_;
  Buffer<OpenUnit> open_;
  std::optional<GraphCounter> counter_;
};

}  // namespace gibbs
