// SPDX-License-Identifier: Apache-2.0
#pragma once

// Random words and decisions of binary sweeps on the device (csrc/README.md, 2 and 3).
#include "core/philox.h"
#include "core/threshold.h"
#include "cuda/views.cuh"

namespace gibbs {

// Random bytes of units 0 .. n - 1 as words of four units: unit u is byte u % 4 of word u / 4. Whole counters are written, so there
// is room for 128 units at a time.
GIBBS_HOST_DEVICE int64_t random_byte_words(int64_t n) { return round_up(n, 128) / 4; }
// The number of counters that supply them. A counter serves 16 units: four in each of the four quarters of 128 units.
GIBBS_HOST_DEVICE int64_t random_byte_counters(int64_t n) { return round_up(n, 128) / 16; }

#if defined(GIBBS_DEVICE)

// Writes the bytes of one counter, `group` of random_byte_counters(n).
template <class Words>
GIBBS_DEVICE void store_random_bytes(const RandomStream& s, int64_t group, const Words& words) {
  const PhiloxOutput r = philox4x32(uint32_t(group), s.c1, s.c2, s.c3, s.k0, s.k1);
  const int64_t at = (group >> 3) * 32 + (group & 7);
#pragma unroll
  for (int w = 0; w < 4; ++w) words[at + 8 * w] = r.word[w];
}

// The stream is passed by value, because an argument that a call gets by reference lies in local memory.
GIBBS_DEVICE_CALL uint32_t draw_low_bits(RandomStream s, uint32_t unit) { return random_low_bits(s, unit); }

// Whether the unit's word is less than t. Its low 24 bits are drawn only if the high byte leaves that open, one time in 256.
GIBBS_DEVICE bool word_is_below(uint32_t t, const RandomStream& s, uint32_t unit, uint32_t high_byte) {
  if (high_byte != t >> 24) return high_byte < t >> 24;
  return draw_low_bits(s, unit) < (t & 0xffffff);
}

// The unit's new value by Gibbs's rule.
GIBBS_DEVICE bool decide(const RandomStream& s, uint32_t unit, uint32_t high_byte, float logit) {
  return word_is_below(threshold(logit), s, unit, high_byte);
}

// The unit's new value by Metropolis's rule.
GIBBS_DEVICE bool decide_flip(const RandomStream& s, uint32_t unit, uint32_t high_byte, float logit, bool is_one) {
  const float x = logit_of_flip(logit, is_one);
  return is_one != (x >= 0 || word_is_below(acceptance(x), s, unit, high_byte));
}

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
