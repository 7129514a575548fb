// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/kernels/table.h"
#include "cpu/moments.h"
#include "cpu/scratch.h"

namespace gibbs {

// Counts all pairs of a left and a right unit.
class BipartiteCounter final : public Counter {
 public:
  BipartiteCounter(const SweepCall& call, int64_t n1, int64_t n2)
      : Counter(call),
        sides_{Side(n1), Side(n2)},
        ones_(kCountWords),
        counts_pairs_(call.counts->pairs),
        pairs_(counts_pairs_ ? n1 * sides_[1].stride : 0) {
    std::fill_n(ones_.get(), kCountWords, ~uint64_t{0});
  }
  ~BipartiteCounter() override { end(); }

  void add(const BinaryChain* chains, int64_t count) {
    for (const BinaryChain* c = chains; c < chains + count; ++c) {
      const int64_t at = place(1);
      sides_[0].put(at, c->left), sides_[1].put(at, c->right);
    }
  }

 private:
  struct Side {
    explicit Side(int64_t n)
        : n(n),
          stride(round_up(n, kRightsAtOnce)),
          rows(kMostStates * state_words(n)),
          words(kCountWords * stride),
          units(stride) {}
    void put(int64_t at, const uint32_t* bits) const { std::copy_n(bits, state_words(n), rows.get() + at * state_words(n)); }
    void gather() const {
      for (int64_t word = 0; word < kCountWords; ++word) {
        BitRows<const uint32_t> some;
        for (int64_t c = 0; c < kChainsOfWord; ++c) some.row[c] = rows.get() + (word * kChainsOfWord + c) * state_words(n);
        words_from_rows(some, n, words.get() + word * stride);
      }
      std::fill_n(rows.get(), kMostStates * state_words(n), 0u);
    }
    int64_t n, stride;
    Buffer<uint32_t> rows;   // [kMostStates, state_words(n)]
    Buffer<uint64_t> words;  // [kCountWords, stride]
    Buffer<uint32_t> units;
  };

  void count() override {
    const Side &left = sides_[0], &right = sides_[1];
    for (const Side& side : sides_) {
      side.gather();
      kernels().count_products(ones_.get(), 1, 1, side.words.get(), side.stride, side.units.get());
    }
    if (counts_pairs_)
      kernels().count_products(left.words.get(), left.n, left.stride, right.words.get(), right.stride, pairs_.get());
  }
  void add_to(Counts& counts, int64_t row) override {
    const int64_t n1 = sides_[0].n, n2 = sides_[1].n, stride = sides_[1].stride;
    for (int s = 0; s < 2; ++s) move_counts(sides_[s].units.get(), sides_[s].n, counts.units[size_t(s)] + row * sides_[s].n);
    for (int64_t i = 0; i < n1 && counts_pairs_; ++i)
      move_counts(pairs_.get() + i * stride, n2, counts.pairs + (row * n1 + i) * n2);
  }

  Side sides_[2];
  Buffer<uint64_t> ones_;
  bool counts_pairs_;
  Buffer<uint32_t> pairs_;
};

}  // namespace gibbs
