// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "core/macros.h"

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) and the counter layout.
// twin: gibbs_ext/reference.py::random_words. A change here changes every sample: golden vectors and CHANGELOG.
//
// A counter names (stream, chain, sweep, unit), never a thread or a vector lane. The key is the 64-bit seed.
//
//        31 30 29                                                0
//   c0  [plane|                      group                       ]   which units, see below
//   c1  [                     chain, bits 0..31                  ]
//   c2  [                     sweep, bits 0..31                  ]
//   c3  [ stream 31..28 | sweep 32..43 at 27..16 | chain 32..47 at 15..0 ]
//
// A unit's 32-bit random word is  high byte << 24 | low 24 bits.  The two parts come from two planes, so that a sampler can
// compare the high byte first and draw the low bits only for the one unit in 256 whose threshold ties with it:
//   plane 0 (high bytes): one counter serves 16 units, one byte each;   plane 1 (low bits): one counter serves 4 units.
// Units are spread over a counter's outputs so that eight consecutive counters, computed in eight vector lanes and stored output
// after output, give their units in order (plane 0: 128 consecutive units, plane 1: 32).
namespace gibbs {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

constexpr int64_t kMaxChains = int64_t{1} << 48;
constexpr int64_t kMaxSweeps = int64_t{1} << 44;
constexpr int64_t kMaxUnits = int64_t{1} << 30;

struct PhiloxOutput {
  uint32_t word[4];
};

GIBBS_HOST_DEVICE PhiloxOutput philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t{kPhiloxMultiplier0} * c0, p1 = uint64_t{kPhiloxMultiplier1} * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// Output word `i`, 0 .. 3, by selection: an array with an index known only at run time would have to lie in a GPU's local memory.
GIBBS_HOST_DEVICE uint32_t output_word(const PhiloxOutput& r, uint32_t i) {
  const uint32_t low = i & 1 ? r.word[1] : r.word[0], high = i & 1 ? r.word[3] : r.word[2];
  return i & 2 ? high : low;
}

// Everything that a random word depends on besides the unit: the last three counter words and the key.
struct RandomStream {
  uint32_t c1, c2, c3, k0, k1;
};

GIBBS_HOST_DEVICE RandomStream random_stream(uint64_t seed, uint64_t chain, uint64_t sweep, uint32_t stream = 0) {
  return {uint32_t(chain), uint32_t(sweep), stream << 28 | uint32_t(sweep >> 32 & 0xfff) << 16 | uint32_t(chain >> 32 & 0xffff),
          uint32_t(seed), uint32_t(seed >> 32)};
}

constexpr uint32_t kLowPlane = 1u << 30;

// The high bytes of units 4 at .. 4 at + 3, lowest first.
GIBBS_HOST_DEVICE uint32_t random_high_bytes(const RandomStream& s, uint32_t at) {
  const PhiloxOutput r = philox4x32((at >> 5) * 8 + (at & 7), s.c1, s.c2, s.c3, s.k0, s.k1);
  return output_word(r, at >> 3 & 3);
}
GIBBS_HOST_DEVICE uint32_t random_high_byte(const RandomStream& s, uint32_t unit) {
  return random_high_bytes(s, unit >> 2) >> (8 * (unit & 3)) & 0xff;
}

GIBBS_HOST_DEVICE uint32_t random_low_bits(const RandomStream& s, uint32_t unit) {
  const PhiloxOutput r = philox4x32(kLowPlane | ((unit >> 5) * 8 + (unit & 7)), s.c1, s.c2, s.c3, s.k0, s.k1);
  return output_word(r, unit >> 3 & 3) & 0xffffff;
}

GIBBS_HOST_DEVICE uint32_t random_word(const RandomStream& s, uint32_t unit) {
  return random_high_byte(s, unit) << 24 | random_low_bits(s, unit);
}

}  // namespace gibbs
