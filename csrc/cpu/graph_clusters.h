// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>

#include "core/tempering.h"
#include "cpu/bit_rows.h"
#include "cpu/graph_groups.h"

// Cluster moves of parallel tempering (csrc/README.md, 2.9): the chains of a coupling in tasks of 64.
namespace gibbs {

// Scratch memory and code of one thread.
template <class T>
class ClusterRunner {
 public:
  ClusterRunner(const GraphCall& call, Progress& progress)
      : call_(call),
        progress_(progress),
        coupling_(call, true),
        position_(call.graph.num_nodes),
        begin_(call.graph.num_nodes + 1),
        neighbors_(2 * call.graph.num_edges),
        differ_(state_words(call.graph.num_nodes)),
        cluster_(call.graph.num_nodes + 1) {
    copy_positions(call.graph, position_.get());
  }

  // first_model: of the coupling.
  void run(int64_t first_model, int64_t task) {
    if (!load(first_model)) return;
    const int64_t chains = call_.batch.chains_per_model(), words = state_words(call_.graph.num_nodes);
    const int64_t end = std::min((task + 1) * kChainsOfWord, call_.batch.models_per_coupling() * chains);
    for (int64_t at = task * kChainsOfWord; at < end && !progress_.stop(); ++at) {
      const int64_t model = first_model + at / chains, chain = at % chains, linear = call_.batch.linear(model, chain);
      const int64_t other = partner(call_.pairing, linear);
      if (other < 0) continue;
      move(linear, chain_number(call_, model, chain), call_.bits + linear * words, call_.bits + other * words);
    }
  }

 private:
  // Lists the neighbours of each node to which it is coupled.
  bool load(int64_t model) {
    const T* before = coupling_.source();
    if (!coupling_.load(model, progress_)) return false;
    if (is_loaded_ && coupling_.source() == before) return true;
    const GraphView& g = call_.graph;
    int32_t count = 0;
    for (int64_t node = 0; node < g.num_nodes; ++node) {
      begin_.get()[node] = count;
      for (int32_t row = position_.get()[node], h = g.row_offsets[row]; h < g.row_offsets[row + 1]; ++h)
        if (coupling_.rounded()[h]) neighbors_.get()[count++] = g.neighbors[h];
    }
    begin_.get()[g.num_nodes] = count;
    is_loaded_ = true;
    return true;
  }

  void move(int64_t linear, uint64_t number, uint32_t* first, uint32_t* second) {
    const int64_t words = state_words(call_.graph.num_nodes);
    uint32_t* const differ = differ_.get();
    int64_t count = 0;
    for (int64_t w = 0; w < words; ++w) {
      differ[w] = first[w] ^ second[w];
      count += std::popcount(differ[w]);
    }
    if (!count) return;
    const auto last_sweep = uint64_t(call_.sweep_offset + call_.num_sweeps - 1);
    int32_t* const cluster = cluster_.get();
    int64_t size = 0;
    // A unit of the cluster counts among those that differ no more. Without a branch, which nobody could predict.
    const auto take_if_it_differs = [&](int32_t node) {
      const uint32_t bit = differ[node / 32] & 1u << node % 32;
      differ[node / 32] ^= bit;
      cluster[size] = node;
      size += bit != 0;
    };
    take_if_it_differs(nth_that_differs(cluster_start(call_.pairing, linear, count, call_.seed, number, last_sweep)));
    for (int64_t next = 0; next < size; ++next) {
      const int32_t node = cluster[next];
      first[node / 32] ^= 1u << node % 32, second[node / 32] ^= 1u << node % 32;
      for (int32_t i = begin_.get()[node]; i < begin_.get()[node + 1]; ++i) take_if_it_differs(neighbors_.get()[i]);
    }
  }

  int32_t nth_that_differs(int64_t n) const {
    const uint32_t* word = differ_.get();
    for (int64_t ones; (ones = std::popcount(*word)) <= n; n -= ones) ++word;
    uint32_t rest = *word;
    for (; n; --n) rest &= rest - 1;
    return int32_t(32 * (word - differ_.get())) + std::countr_zero(rest);
  }

  const GraphCall& call_;
  Progress& progress_;
  SharedCoupling<T> coupling_;
  Buffer<int32_t> position_;
  Buffer<int32_t> begin_, neighbors_;  // of each node, in neighbors_
  bool is_loaded_ = false;
  Buffer<uint32_t> differ_;
  Buffer<int32_t> cluster_;  // in the order in which it is found, and a place for what is not in it
};

}  // namespace gibbs
