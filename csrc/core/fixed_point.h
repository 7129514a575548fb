// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "core/macros.h"

// Rounding a model's couplings to int32 with one scale 2^-k (csrc/README.md, 2.1). twin: gibbs_ext/reference.py::round_couplings
//
// The scale must not depend on the order of any floating-point sum. So the magnitudes are first rounded *up* to integers
//   q_ij = ceil(|w_ij| * 2^(b - e)) <= 2^b,   max |w| < 2^e,   b = 30 - ceil(log2(degree)),
// whose sum over a unit's neighbours fits in 31 bits, and k follows from the largest such sum.
namespace gibbs {

constexpr int kMaxScaleExponent = 30;

// ceil(log2(n)), n >= 1
GIBBS_HOST_DEVICE int ceil_log2(int64_t n) {
  int bits = 0;
  while ((int64_t{1} << bits) < n) ++bits;
  return bits;
}

GIBBS_HOST_DEVICE int coupling_sum_bits(int64_t degree) { return 30 - ceil_log2(degree); }

// No scan is needed when even `degree` couplings of 2^e fit at the largest k.
GIBBS_HOST_DEVICE bool largest_scale_fits(int64_t degree, int e) { return e <= -ceil_log2(degree); }

// The largest k <= 30 with  largest_sum * 2^(k + e - b) + ceil(degree / 2) <= 2^31 - 1: rounding to nearest moves each term by at
// most a half, so no unit's sum of |rounded couplings| leaves 31 bits. largest_sum <= 2^30 + degree.
GIBBS_HOST_DEVICE int scale_exponent(int64_t largest_sum, int64_t degree, int e) {
  const int64_t limit = 0x7fffffff - (degree + 1) / 2;
  int shift = -1;  // = k + e - b
  while (shift < kMaxScaleExponent && largest_sum << (shift + 1) <= limit) ++shift;
  const int k = shift - e + coupling_sum_bits(degree);
  return k < kMaxScaleExponent ? k : kMaxScaleExponent;
}

}  // namespace gibbs
