// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "core/outcome.h"
#include "cpu/kernels/table.h"

// States of chains as rows of bits, and as words that have a unit's bit of each of 64 chains.
namespace gibbs {

constexpr int kChainsOfWord = 64;

// Rows of bits of up to 64 chains, which become words [n] of 64 chains, and back.
template <class Word>
struct BitRows {
  Word* row[kChainsOfWord];  // null where the group has no chain
};
inline void transpose_halves(const uint32_t (&in)[2][32], uint32_t (&out)[2][32]) {
  for (int half = 0; half < 2; ++half) kernels().transpose_bits(in[half], out[half]);
}
inline void words_from_rows(const BitRows<const uint32_t>& rows, int64_t n, uint64_t* out) {
  for (int64_t w = 0; w < state_words(n); ++w) {
    uint32_t half[2][32], units[2][32];
    for (int p = 0; p < kChainsOfWord; ++p) half[p / 32][p % 32] = rows.row[p] ? rows.row[p][w] : 0;
    transpose_halves(half, units);
    const int64_t count = std::min<int64_t>(32, n - 32 * w);
    for (int64_t i = 0; i < count; ++i) out[32 * w + i] = units[0][i] | uint64_t{units[1][i]} << 32;
  }
}
inline void rows_from_words(const uint64_t* words, int64_t n, const BitRows<uint32_t>& rows) {
  for (int64_t w = 0; w < state_words(n); ++w) {
    uint32_t half[2][32] = {}, of_row[2][32];
    const int64_t count = std::min<int64_t>(32, n - 32 * w);
    for (int64_t i = 0; i < count; ++i) half[0][i] = uint32_t(words[32 * w + i]), half[1][i] = uint32_t(words[32 * w + i] >> 32);
    transpose_halves(half, of_row);
    for (int p = 0; p < kChainsOfWord; ++p)
      if (rows.row[p]) rows.row[p][w] = of_row[p / 32][p % 32];
  }
}

}  // namespace gibbs
