// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <limits>
#include <optional>

#include "cpu/graph_counter.h"
#include "cpu/graph_groups.h"

// Binary sweeps of graphs by the route "units": single chains.
namespace gibbs {

inline bool use_units(const GraphCall& call) {
  const GraphView& g = call.graph;
  if (call.log_weights || (call.route != GraphRoute::kAuto && call.route != GraphRoute::kUnits)) return false;
  if (call.route == GraphRoute::kAuto && call.batch.chains_per_model() > kFewChains) return false;
  int64_t positions = 0;
  for (int64_t color = 0; color < g.num_colors; ++color)
    positions += round_up(g.color_offsets[color + 1] - g.color_offsets[color], kUnitsRow);
  // If colours are small, or a few units have many neighbours, most of the rows are empty.
  return positions <= 4 * g.num_nodes + 4 * kUnitsRow && positions * g.max_degree <= 8 * g.num_edges + 4096 &&
         positions < std::numeric_limits<int32_t>::max();
}

// One model, as its single chains read it.
class UnitsData {
 public:
  explicit UnitsData(const GraphCall& call)
      : call_(call), color_offsets_(call.graph.num_colors + 1), nodes_(0), neighbors_(0), coupling_(0) {
    const GraphView& g = call.graph;
    int32_t* offsets = color_offsets_.get();
    for (int64_t color = 0; color < g.num_colors; ++color)
      offsets[color + 1] = offsets[color] + int32_t(round_up(g.color_offsets[color + 1] - g.color_offsets[color], kUnitsRow));
    const int64_t positions = offsets[g.num_colors], rows = positions * g.max_degree;
    nodes_ = Buffer<int32_t>(positions);
    neighbors_ = Buffer<int32_t>(rows);
    coupling_ = Buffer<int32_t>(rows);
    std::fill_n(nodes_.get(), positions, int32_t(g.num_nodes + 1));
    std::fill_n(neighbors_.get(), rows, int32_t(g.num_nodes));
    each_half_edge([&](int64_t h, int64_t at) { neighbors_.get()[at] = g.neighbors[h]; });
  }
  template <class T>
  void load(const SharedCoupling<T>& coupling) {
    each_half_edge([&](int64_t h, int64_t at) { coupling_.get()[at] = coupling.rounded()[h]; });
    scale_ = coupling.scale();
  }
  int64_t num_positions() const { return color_offsets_.get()[call_.graph.num_colors]; }
  const int32_t* nodes() const { return nodes_.get(); }
  float scale() const { return scale_; }
  UnitsModel model(const float* bias) const {
    return {call_.graph, call_.graph.max_degree, color_offsets_.get(), nodes_.get(), neighbors_.get(), coupling_.get(), bias,
            scale_};
  }

 private:
  template <class F>
  void each_half_edge(const F& f) {
    const GraphView& g = call_.graph;
    for (int64_t color = 0; color < g.num_colors; ++color)
      for (int64_t pos = g.color_offsets[color]; pos < g.color_offsets[color + 1]; ++pos) {
        const int64_t at = color_offsets_.get()[color] + pos - g.color_offsets[color];
        nodes_.get()[at] = g.order[pos];
        for (int64_t h = g.row_offsets[pos], k = 0; h < g.row_offsets[pos + 1]; ++h, ++k)
          f(h, (at / kUnitsRow * g.max_degree + k) * kUnitsRow + at % kUnitsRow);
      }
  }

  const GraphCall& call_;
  Buffer<int32_t> color_offsets_, nodes_, neighbors_, coupling_;
  float scale_ = 0;
};

// Scratch memory and code of one thread.
class UnitsRunner {
 public:
  UnitsRunner(const GraphCall& call, const std::vector<float>& beta, int64_t positions, WorstRounding& worst, Progress& progress)
      : call_(call),
        worst_(worst),
        progress_(progress),
        beta_(beta),
        state_(call.graph.num_nodes + 2),
        clamp_(call.clamp ? call.graph.num_nodes + 2 : 0),
        bias_(positions),
        bytes_(random_bytes_capacity(call.graph.num_nodes) + 16) {
    if (call.counts) counter_.emplace(call);
  }

  template <class T>
  void run(int64_t model, int64_t chain, const UnitsData& data) {
    const int64_t n = call_.graph.num_nodes, words = state_words(n), linear = call_.batch.linear(model, chain);
    const T* bias = row_of<T>(call_.batch, call_.bias, model, chain);
    bool finite = true;
    for (int64_t at = 0; at < data.num_positions(); ++at) {
      const int64_t node = data.nodes()[at];
      bias_.get()[at] = node < n ? float(bias[node * call_.bias.stride]) : 0.0f;
      finite &= std::isfinite(bias_.get()[at]);
    }
    if (!finite) return progress_.fail(Outcome::kNonFiniteBias);
    const float scale = data.scale();
    worst_.note_biases(&scale, 1, data.num_positions(), bias_.get(), bias_.get());
    const auto unpack = [&](const uint32_t* bits, int32_t* out) {
      for (int64_t i = 0; i < n; ++i) out[i] = -int32_t(bits[linear * words + i / 32] >> (i % 32) & 1);
    };
    unpack(call_.bits, state_.get());
    if (call_.clamp) unpack(call_.clamp, clamp_.get());
    const SingleChain c = {chain_number(call_, model, chain), state_.get(), call_.clamp ? clamp_.get() : nullptr, bytes_.get()};
    const BetaRow<float> beta = betas_of(call_, beta_, model);
    const auto sweep = [&](int64_t first, int64_t count) {
      kernels().sweep_units(binary_sweeps(call_, beta, first, count, progress_), data.model(bias_.get()), c);
    };
    if (counter_) counter_->begin(model);
    uint32_t* bits = call_.bits + linear * words;
    const auto pack = [&] {
      std::fill_n(bits, words, 0u);
      for (int64_t i = 0; i < n; ++i) bits[i / 32] |= (uint32_t(state_.get()[i]) & 1) << (i % 32);
    };
    sweep_and_read(call_, progress_, sweep, [&] {
      pack();
      counter_->add_one(bits, n, nullptr);
    });
    pack();
  }

 private:
  const GraphCall& call_;
  WorstRounding& worst_;
  Progress& progress_;
  const std::vector<float>& beta_;
  Buffer<int32_t> state_, clamp_;
  Buffer<float> bias_;
  Buffer<uint8_t> bytes_;
  std::optional<GraphCounter> counter_;
};

}  // namespace gibbs
