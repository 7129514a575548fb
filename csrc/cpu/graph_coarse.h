// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>

#include "cpu/graph_groups.h"
#include "cpu/graph_tables.h"

// Binary sweeps of graphs by the route "coarse": 64 chains side by side, four groups of 16.
namespace gibbs {

inline bool use_coarse(const GraphCall& call) {
  if (!kernels().sweep_coarse_graph || call.log_weights || call.metropolis) return false;
  // Few sweeps do not pay for rounding couplings once more.
  return call.route == GraphRoute::kCoarse || (call.route == GraphRoute::kAuto && call.num_sweeps >= 4);
}
// How many times four of a call's groups of 16 go together, which takes a little longer than two of them apart. At the end three
// are enough, too.
inline int64_t num_wide_groups(const GraphCall& call, int64_t groups, int64_t threads) {
  const int64_t wide = (groups + 1) / kCoarseParts;
  if (call.route == GraphRoute::kCoarse) return (groups + kCoarseParts - 1) / kCoarseParts;
  return (wide + threads - 1) / threads * 2 <= (groups + threads - 1) / threads ? wide : 0;
}

// Scratch memory and code of one thread.
template <class T>
class CoarseRunner {
 public:
  // is_shared: whether one model has all chains of a group.
  CoarseRunner(const GraphCall& call, const std::vector<float>& beta, bool is_shared, WorstRounding& worst, Progress& progress)
      : call_(call),
        worst_(worst),
        progress_(progress),
        beta_(beta),
        exact_bias_(call),
        coupling_(is_shared ? 2 * call.graph.num_edges : call.graph.num_edges * kCoarseGroup),
        bias_(call.graph.num_nodes * kCoarseGroup),
        offset_(is_shared ? call.graph.num_nodes : 0),
        state_(2 * call.graph.num_nodes),
        fixed_(2 * call.graph.num_nodes),
        words_(call.graph.num_nodes),
        bytes_(table_random_bytes(call.graph.num_nodes)) {
    if (call.counts) counter_.emplace(call);
    std::tie(least_beta_, largest_beta_) = beta_range(call);
    group_.shared_coupling = is_shared;
    group_.coupling = coupling_.get(), group_.bias = bias_.get(), group_.offset = offset_.get();
    group_.state = state_.get(), group_.fixed = fixed_.get(), group_.bytes = bytes_.get();
  }

  // coupling(part): the SharedCoupling or RoundedLanes of a part. False if fields of 16 bits would leave too much open; then nothing
  // is drawn.
  template <class CouplingOf>
  bool run(const Group* parts, const CouplingOf& coupling) {
    for (int part = 0; part < kCoarseParts; ++part) {
      parts[part].number_chains(call_, group_.number + part * kGroup);
      coupling(part).copy_scales(group_.scale + part * kGroup);
      group_.exact_coupling[part] = coupling(part).rounded();
    }
    if (!load_bias(parts)) return true;  // the call failed
    if (kernels().round_coarse_graph(call_.graph, least_beta_, largest_beta_, group_) > kernels().largest_slack) return false;

    const int64_t n = call_.graph.num_nodes;
    words_from_rows(rows<const uint32_t>(call_.bits, parts), n, words_.get());
    std::memcpy(state_.get(), words_.get(), size_t(n) * sizeof(uint64_t));
    uint64_t absent = 0;
    for (int bit = 0; bit < kCoarseGroup; ++bit) absent |= uint64_t{!has_chain(parts, bit)} << bit;
    if (call_.clamp) words_from_rows(rows(call_.clamp, parts), n, words_.get());
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t fixed = absent | (call_.clamp ? words_.get()[i] : 0);
      std::memcpy(fixed_.get() + 2 * i, &fixed, sizeof fixed);
    }
    const BetaRow<float> beta = betas_of(call_, beta_, parts[0].model[0]);
    const auto sweep = [&](int64_t first, int64_t count) {
      kernels().sweep_coarse_graph(binary_sweeps(call_, beta, first, count, progress_), group_);
    };
    const auto copy_words = [&] { std::memcpy(words_.get(), state_.get(), size_t(n) * sizeof(uint64_t)); };
    if (counter_) counter_->begin(parts[0].model[0]);
    sweep_and_read(call_, progress_, sweep, [&] {
      copy_words();
      counter_->add(words_.get(), ~absent);
    });
    if (progress_.stop()) return true;
    copy_words();
    rows_from_words(words_.get(), n, rows(call_.bits, parts));
    return true;
  }

 private:
  bool load_bias(const Group* parts) {
    if (!exact_bias_.load(parts, group_.shared_coupling)) return progress_.fail(Outcome::kNonFiniteBias), false;
    group_.shared_bias = exact_bias_.is_shared();
    for (int part = 0; part < exact_bias_.num_loaded(); ++part) {
      const float* bias = exact_bias_.values(part);
      worst_.note_biases(group_.scale + part * kGroup, exact_bias_.num_lanes(), call_.graph.num_nodes, bias, bias);
      group_.exact_bias[part] = bias;
    }
    return true;
  }
  static bool has_chain(const Group* parts, int bit) {
    const int chain = kernels().chain_of_table_bit(byte_of_coarse_bit(bit));
    return chain % kGroup < parts[chain / kGroup].count;
  }
  template <class Word>
  BitRows<Word> rows(Word* bits, const Group* parts) const {
    BitRows<Word> out;
    for (int bit = 0; bit < kCoarseGroup; ++bit) {
      const int chain = kernels().chain_of_table_bit(byte_of_coarse_bit(bit));
      const int64_t words = state_words(call_.graph.num_nodes);
      out.row[bit] = has_chain(parts, bit) ? bits + parts[chain / kGroup].linear[chain % kGroup] * words : nullptr;
    }
    return out;
  }

  const GraphCall& call_;
  WorstRounding& worst_;
  Progress& progress_;
  const std::vector<float>& beta_;
  double least_beta_, largest_beta_;
  BiasOfParts<T, kCoarseParts> exact_bias_;
  Buffer<int16_t> coupling_, bias_;
  Buffer<float> offset_;
  Buffer<uint32_t> state_, fixed_;
  Buffer<uint64_t> words_;
  Buffer<uint8_t> bytes_;
  CoarseGroup group_ = {};
  std::optional<GraphCounter> counter_;
};

}  // namespace gibbs
