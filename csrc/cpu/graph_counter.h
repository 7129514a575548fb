// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/graph.h"
#include "cpu/graph_groups.h"
#include "cpu/moments.h"

namespace gibbs {

// Counts the pairs that edges join.
class GraphCounter final : public Counter {
 public:
  explicit GraphCounter(const GraphCall& call)
      : Counter(call),
        num_nodes_(call.graph.num_nodes),
        pairs_(size_t(num_nodes_ + (call.counts->pairs ? call.graph.num_edges : 0))),
        words_(num_nodes_ * kCountWords),
        counts_(int64_t(pairs_.size())) {
    const GraphView& g = call.graph;
    for (int64_t node = 0; node < num_nodes_; ++node) pairs_[size_t(node)] = {int32_t(node), int32_t(node)};
    for (int64_t position = 0; position < num_nodes_ && call.counts->pairs; ++position)
      for (int64_t h = g.row_offsets[position]; h < g.row_offsets[position + 1]; ++h)
        pairs_[size_t(num_nodes_ + g.edge_of[h])] = {g.order[position], g.neighbors[h]};
  }
  ~GraphCounter() override { end(); }

  // 64 chains: a word for each node, of whose bits those in `present` count.
  void add(const uint64_t* words, uint64_t present) {
    uint64_t* out = words_.get() + place(kChainsOfWord) / kChainsOfWord;
    for (int64_t node = 0; node < num_nodes_; ++node) out[node * kCountWords] = words[node] & present;
  }
  // 16 chains, of which the first so many count: lanes [num_nodes, kGroup] of 0 and -1.
  void add_lanes(const int32_t* lanes, int count) {
    const int64_t at = place(count);
    kernels().words_from_lanes(lanes, num_nodes_, (uint64_t{1} << count) - 1, int(at % kChainsOfWord),
                               words_.get() + at / kChainsOfWord);
  }
  // One chain: bits by position, of which the nodes' are position_of_node (null: their numbers). All calls have the same positions.
  void add_one(const uint32_t* bits, int64_t num_positions, const int32_t* position_of_node) {
    if (position_of_node && position_of_node_.empty()) position_of_node_.assign(position_of_node, position_of_node + num_nodes_);
    num_positions_ = num_positions;
    const int64_t words = state_words(num_positions);
    rows_.resize(size_t(kChainsOfWord * words));
    std::copy_n(bits, words, rows_.data() + num_rows_++ * words);
    if (num_rows_ == kChainsOfWord) place_rest();
  }

 private:
  void place_rest() override {
    if (!num_rows_) return;
    BitRows<const uint32_t> rows = {};
    for (int64_t c = 0; c < num_rows_; ++c) rows.row[c] = rows_.data() + c * state_words(num_positions_);
    num_rows_ = 0;
    by_position_.resize(size_t(num_positions_));
    words_from_rows(rows, num_positions_, by_position_.data());
    uint64_t* out = words_.get() + place(kChainsOfWord) / kChainsOfWord;
    for (int64_t node = 0; node < num_nodes_; ++node)
      out[node * kCountWords] = by_position_[size_t(position_of_node_.empty() ? node : position_of_node_[size_t(node)])];
  }
  void count() override {
    kernels().count_pairs(pairs_.data(), int64_t(pairs_.size()), words_.get(), counts_.get());
    std::fill_n(words_.get(), num_nodes_ * kCountWords, 0);
  }
  void add_to(Counts& counts, int64_t row) override {
    const int64_t num_edges = int64_t(pairs_.size()) - num_nodes_;
    move_counts(counts_.get(), num_nodes_, counts.units[0] + row * num_nodes_);
    if (num_edges) move_counts(counts_.get() + num_nodes_, num_edges, counts.pairs + row * num_edges);
  }

  int64_t num_nodes_;
  std::vector<UnitPair> pairs_;  // nodes with themselves, then edges
  Buffer<uint64_t> words_;       // [num_nodes, kCountWords]
  Buffer<uint32_t> counts_;
  // Single chains: bits by position [num_rows, words], and those of each position.
  int64_t num_rows_ = 0, num_positions_ = 0;
  std::vector<int32_t> position_of_node_;  // a copy, because the counter outlives the layout
  std::vector<uint32_t> rows_;
  std::vector<uint64_t> by_position_;
};

}  // namespace gibbs
