// SPDX-License-Identifier: Apache-2.0
#pragma once

// Random words and decisions of binary sweeps on the device (csrc/README.md, 2 and 3).
#include "core/philox.h"
#include "core/threshold.h"
#include "cuda/views.cuh"

namespace gibbs {

// Random bytes come in spans of 128 units, as words of four units: unit u is byte u % 4 of word u / 4. A counter of Philox serves 16 units, four in
// each of the four quarters of a span.
constexpr int kSpanUnits = 128, kSpanWords = kSpanUnits / 4, kSpanCounters = kSpanUnits / 16;
GIBBS_HOST_DEVICE int64_t num_spans(int64_t n) { return divide_up(n, kSpanUnits); }
// Of units 0 .. n - 1, in whole spans.
GIBBS_HOST_DEVICE int64_t random_byte_words(int64_t n) { return num_spans(n) * kSpanWords; }
GIBBS_HOST_DEVICE int64_t random_byte_counters(int64_t n) { return num_spans(n) * kSpanCounters; }

#if defined(GIBBS_DEVICE)

// The bytes of one counter, `group` of random_byte_counters(n).
GIBBS_DEVICE PhiloxOutput random_bytes(const RandomStream& s, int64_t group) {
  return philox4x32(uint32_t(group), s.c1, s.c2, s.c3, s.k0, s.k1);
}
// Which word of a chain the word w of a counter is.
GIBBS_DEVICE int64_t random_byte_word(int64_t group, int w) {
  return group / kSpanCounters * kSpanWords + group % kSpanCounters + kSpanCounters * w;
}
// Writes them into the words of a chain, which begin at `begin`.
template <class Words>
GIBBS_DEVICE void store_random_bytes(const RandomStream& s, int64_t group, const Words& words, int64_t begin = 0) {
  const PhiloxOutput r = random_bytes(s, group);
#pragma unroll
  for (int w = 0; w < 4; ++w) words[begin + random_byte_word(group, w)] = r.word[w];
}

// Streams are passed by value, because an argument that a call gets by reference lies in local memory.
GIBBS_DEVICE_CALL uint32_t draw_low_bits(RandomStream s, uint32_t unit) { return random_low_bits(s, unit); }
GIBBS_DEVICE_CALL uint32_t draw_high_bytes(RandomStream s, uint32_t at) { return random_high_bytes(s, at); }

// beta field + (1 - beta) base field of an annealed sweep.
GIBBS_DEVICE float annealed_logit(int32_t acc, float scale, float bias, float base_bias, float beta) {
  return add_rn(binary_logit(acc, scale, bias, beta), mul_rn(add_rn(1.0f, -beta), base_bias));
}

// softplus(y) - softplus(x), softplus(x) = log(1 + exp(x)).
GIBBS_DEVICE_CALL float softplus_difference(float x, float y) {
  return (fmaxf(y, 0.0f) - fmaxf(x, 0.0f)) + (log1pf(expf(-fabsf(y))) - log1pf(expf(-fabsf(x))));
}

#endif

}  // namespace gibbs
