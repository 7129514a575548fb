// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/graph_coarse.h"

// Binary sweeps of graphs by the route "coarse units": single chains.
namespace gibbs {

inline int64_t units_vectors(const GraphView& g, int64_t color) {
  return (g.color_offsets[color + 1] - g.color_offsets[color] + kUnitsVector - 1) / kUnitsVector;
}

constexpr int64_t kFewUnitsChains = 10;  // more are faster side by side
constexpr int kMostSlack = 65535;        // even if all units take exact sums, that is as fast as a few lanes side by side

inline bool use_coarse_units(const GraphCall& call) {
  const GraphView& g = call.graph;
  if (!kernels().sweep_coarse_units || call.log_weights || call.metropolis) return false;
  if (call.route != GraphRoute::kAuto && call.route != GraphRoute::kCoarseUnits) return false;
  // Few updates do not pay for the layout.
  if (call.route == GraphRoute::kAuto && call.num_sweeps * call.num_rounds * call.batch.chains_per_model() * g.num_nodes < 8192)
    return false;
  int64_t vectors = 0, rows = 0;
  for (int64_t color = 0; color < g.num_colors; ++color) {
    vectors += units_vectors(g, color);
    for (int64_t begin = g.color_offsets[color]; begin < g.color_offsets[color + 1]; begin += kUnitsVector) {
      int32_t most = 0;
      for (int64_t at = begin; at < std::min<int64_t>(begin + kUnitsVector, g.color_offsets[color + 1]); ++at)
        most = std::max(most, g.row_offsets[at + 1] - g.row_offsets[at]);
      rows += most;
    }
  }
  // If colours are small, or a few units have many neighbours, most of the rows are empty.
  return vectors <= kMostUnitsVectors && rows * kUnitsVector <= 8 * g.num_edges + 4096;
}

// How the units of a graph lie in vectors, and the neighbours of each.
class UnitsLayout {
 public:
  explicit UnitsLayout(const GraphView& g) : color_offsets_(size_t(g.num_colors) + 1) {
    for (int64_t color = 0; color < g.num_colors; ++color)
      color_offsets_[size_t(color) + 1] = color_offsets_[size_t(color)] + int32_t(units_vectors(g, color));
    const auto vectors = size_t(num_vectors()), positions = vectors * kUnitsVector;
    nodes_.assign(positions, int32_t(g.num_nodes));
    row_of_position_.resize(positions);
    position_of_node_.resize(size_t(g.num_nodes));
    rows_.resize(vectors + 1);
    for (int64_t color = 0; color < g.num_colors; ++color)
      for (int32_t at = g.color_offsets[color]; at < g.color_offsets[color + 1]; ++at) {
        const int32_t position = color_offsets_[size_t(color)] * kUnitsVector + at - g.color_offsets[color];
        nodes_[size_t(position)] = g.order[at];
        row_of_position_[size_t(position)] = at;
        position_of_node_[size_t(g.order[at])] = position;
        int32_t& rows = rows_[size_t(position / kUnitsVector) + 1];
        rows = std::max(rows, g.row_offsets[at + 1] - g.row_offsets[at]);
      }
    for (size_t v = 0; v < vectors; ++v) rows_[v + 1] += rows_[v];
    neighbors_.resize(size_t(rows_[vectors]) * kUnitsVector);
    each_half_edge(g, [&](int32_t h, size_t at) { neighbors_[at] = code_of_neighbor(position_of_node_[size_t(g.neighbors[h])]); });
    place_bytes(g.num_nodes);
  }
  int64_t num_vectors() const { return color_offsets_.back(); }
  int64_t num_positions() const { return num_vectors() * kUnitsVector; }
  int64_t num_rows() const { return rows_.back(); }
  const std::vector<int32_t>& nodes() const { return nodes_; }
  // Calls function(half-edge, its place in the rows of neighbours).
  template <class Function>
  void each_half_edge(const GraphView& g, const Function& function) const {
    for (size_t position = 0; position < nodes_.size(); ++position) {
      if (nodes_[position] == g.num_nodes) continue;
      const int32_t row = row_of_position_[position];
      size_t at = size_t(rows_[position / kUnitsVector]) * kUnitsVector + position % kUnitsVector;
      for (int32_t h = g.row_offsets[row]; h < g.row_offsets[row + 1]; ++h, at += kUnitsVector) function(h, at);
    }
  }
  void put_into(CoarseUnits& m) const {
    m.color_offsets = color_offsets_.data(), m.nodes = nodes_.data(), m.position_of_node = position_of_node_.data();
    m.row_of_position = row_of_position_.data(), m.rows = rows_.data(), m.neighbors = neighbors_.data();
    m.first_byte = first_byte_.data(), m.byte_places = byte_places_.data();
  }

 private:
  void place_bytes(int64_t num_nodes) {
    first_byte_.assign(size_t(num_vectors()), -1);
    byte_places_.resize(nodes_.size());
    for (size_t v = 0; v < first_byte_.size(); ++v) {
      const int32_t* nodes = nodes_.data() + v * kUnitsVector;
      const int64_t count = std::find(nodes, nodes + kUnitsVector, num_nodes) - nodes;
      const auto [least, most] = std::minmax_element(nodes, nodes + count);
      const int32_t first = *least / 2 * 2;
      if (*most - first >= kByteWindow) continue;
      first_byte_[v] = first;
      for (int64_t l = 0; l < count; ++l)
        byte_places_[v * kUnitsVector + size_t(l)] = uint16_t((nodes[l] - first) / 2 | nodes[l] % 2 << 15);
    }
  }

  std::vector<int32_t> color_offsets_, nodes_, row_of_position_, position_of_node_, rows_, first_byte_;
  std::vector<uint16_t> neighbors_, byte_places_;
};

// Scratch memory and code of one thread.
template <class T>
class CoarseUnitsRunner {
 public:
  CoarseUnitsRunner(const GraphCall& call, const std::vector<float>& beta, const UnitsLayout& layout, WorstRounding& worst,
                    Progress& progress)
      : call_(call),
        worst_(worst),
        progress_(progress),
        beta_(beta),
        layout_(layout),
        exact_bias_(call.graph.num_nodes),
        half_edges_(2 * call.graph.num_edges),
        node_bias_(call.graph.num_nodes),
        offset_(call.graph.num_nodes),
        coupling_(layout.num_rows() * kUnitsVector),
        bias_(layout.num_positions()),
        fields_(layout.num_positions()),
        state_(kUnitsChains * kMostUnitsVectors),
        fixed_(kUnitsChains * layout.num_vectors()),
        bytes_(kUnitsChains * num_bytes()) {
    if (call.counts) counter_.emplace(call);
    std::tie(least_beta_, largest_beta_) = beta_range(call);
  }

  // Sweeps some chains of a model; leaves those to sweep_by_sums(chains) whose fields do not fit into 16 bits.
  template <class SweepBySums>
  void run(int64_t model, Interval chains, const SharedCoupling<T>& coupling, const SweepBySums& sweep_by_sums) {
    for (int64_t begin = chains.begin, end; begin < chains.end && !progress_.stop(); begin = end) {
      end = begin + 1;  // chains in step have one bias
      while (end < chains.end && end - begin < kUnitsChains && bias_row(model, end) == bias_row(model, begin)) ++end;
      if (!load(model, begin, coupling)) return;
      if (is_hopeless_)
        sweep_by_sums(Interval{begin, end});
      else
        sweep(model, {begin, end});
    }
  }

 private:
  static bool bit(const uint32_t* words, int64_t i) { return words[i / 32] >> (i % 32) & 1; }

  const T* bias_row(int64_t model, int64_t chain) const { return row_of<T>(call_.batch, call_.bias, model, chain); }
  int64_t num_bytes() const { return random_bytes_capacity(call_.graph.num_nodes) + kByteWindow; }

  void sweep(int64_t model, Interval interval) {
    const int64_t n = call_.graph.num_nodes, words = state_words(n);
    const std::vector<int32_t>& nodes = layout_.nodes();
    CoarseChain chains[kUnitsChains];
    int count = 0;
    for (int64_t chain = interval.begin; chain < interval.end; ++chain, ++count) {
      CoarseChain& c = chains[count];
      c = {chain_number(call_, model, chain), state_.get() + count * kMostUnitsVectors,
           fixed_.get() + count * layout_.num_vectors(), bytes_.get() + count * num_bytes()};
      const int64_t at = call_.batch.linear(model, chain) * words;
      std::fill_n(c.state, kMostUnitsVectors, 0u);
      std::fill_n(c.fixed, layout_.num_vectors(), 0u);
      for (size_t position = 0; position < nodes.size(); ++position) {
        const size_t vector = position / kUnitsVector, place = position % kUnitsVector;
        const bool exists = nodes[position] < n;
        c.state[vector] |= uint32_t(exists && bit(call_.bits + at, nodes[position])) << place;
        c.fixed[vector] |= uint32_t(!exists || (call_.clamp && bit(call_.clamp + at, nodes[position]))) << place;
      }
    }
    const BetaRow<float> beta = betas_of(call_, beta_, model);
    const auto sweep = [&](int64_t first, int64_t some) {
      kernels().sweep_coarse_units(binary_sweeps(call_, beta, first, some, progress_), units_, chains, count, fields_.get());
    };
    if (counter_) counter_->begin(model);
    sweep_and_read(call_, progress_, sweep, [&] {
      for (int c = 0; c < count; ++c) counter_->add_one(chains[c].state, layout_.num_positions(), units_.position_of_node);
    });
    for (int c = 0; c < count; ++c) {
      uint32_t* bits = call_.bits + call_.batch.linear(model, interval.begin + c) * words;
      std::fill_n(bits, words, 0u);
      for (size_t position = 0; position < nodes.size(); ++position)
        if (nodes[position] < n)
          bits[nodes[position] / 32] |= uint32_t(bit(chains[c].state, int64_t(position))) << nodes[position] % 32;
    }
  }

  // Rounds what the last chain did not have. False if the call failed.
  bool load(int64_t model, int64_t chain, const SharedCoupling<T>& coupling) {
    const T* bias = bias_row(model, chain);
    if (coupling.source() == coupling_row_ && bias == bias_row_) return true;
    const int64_t n = call_.graph.num_nodes;
    coupling_row_ = coupling.source(), bias_row_ = bias;
    if (!copy_finite(bias, n, call_.bias.stride, exact_bias_.get())) return progress_.fail(Outcome::kNonFiniteBias), false;
    CoarseGroup group = {};
    coupling.copy_scales(group.scale);
    worst_.note_biases(group.scale, 1, n, exact_bias_.get(), exact_bias_.get());
    group.shared_coupling = group.shared_bias = true;
    group.exact_coupling[0] = coupling.rounded(), group.exact_bias[0] = exact_bias_.get();
    group.coupling = half_edges_.get(), group.bias = node_bias_.get(), group.offset = offset_.get();
    is_hopeless_ = kernels().round_coarse_graph(call_.graph, least_beta_, largest_beta_, group) > kMostSlack;
    if (is_hopeless_) return true;
    layout_.each_half_edge(call_.graph, [&](int32_t h, size_t at) { coupling_.get()[at] = half_edges_.get()[h]; });
    for (size_t position = 0; position < layout_.nodes().size(); ++position) {
      const int64_t node = layout_.nodes()[position];
      bias_.get()[position] = node < n ? node_bias_.get()[node] : int16_t{0};
    }
    layout_.put_into(units_);
    units_.graph = call_.graph;
    units_.coupling = coupling_.get(), units_.bias = bias_.get();
    units_.exact_coupling = coupling.rounded(), units_.exact_bias = exact_bias_.get();
    units_.scale = coupling.scale(), units_.fields = group.fields;
    return true;
  }

  const GraphCall& call_;
  WorstRounding& worst_;
  Progress& progress_;
  const std::vector<float>& beta_;
  const UnitsLayout& layout_;
  double least_beta_, largest_beta_;
  const T *coupling_row_ = nullptr, *bias_row_ = nullptr;
  bool is_hopeless_ = false;
  Buffer<float> exact_bias_;
  Buffer<int16_t> half_edges_, node_bias_;
  Buffer<float> offset_;
  Buffer<int16_t> coupling_, bias_, fields_;
  Buffer<uint32_t> state_, fixed_;
  Buffer<uint8_t> bytes_;
  CoarseUnits units_ = {};
  std::optional<GraphCounter> counter_;
};

}  // namespace gibbs
