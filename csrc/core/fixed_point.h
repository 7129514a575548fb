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

// ---- which rounding errors change probabilities ----------------------------------------------------------------------------------

constexpr double kResolutionLimit = 1e-3;  // the largest |beta| field_error() without a warning

// The largest magnitude of a sum of couplings. scale = 2^-k.
GIBBS_HOST_DEVICE float largest_coupling_sum(float scale) { return 0x1p31f * scale; }

// The number of which 2^-23 bounds the error of a field, wherever the unit is not saturated. Float32 rounds acc 2^-k and the bias before it adds
// them, each by up to 2^-24 of itself. That is much of their sum only where they nearly cancel. So the number is the bias, or the largest sum
// that may cancel it if that is less, and 0 for a bias of twice that sum.
// base: the base bias of an annealed run; other runs pass the bias twice. beta bias + (1 - beta) base takes all values between the two, and
// cancels itself where their signs differ. Its error may be three times the bound, because it is rounded more often.
GIBBS_HOST_DEVICE float cancelling_bias(float bias, float base, float scale) {
  const float largest_sum = largest_coupling_sum(scale), a = bias < 0 ? -bias : bias, b = base < 0 ? -base : base;
  const float less = a < b ? a : b, more = a < b ? b : a;
  const bool differ = (bias < 0 && base > 0) || (bias > 0 && base < 0);
  if (!differ && less > 2 * largest_sum) return 0;
  const float most = differ ? less + largest_sum : largest_sum;
  return more < most ? more : most;
}

// The rounding of a model's fields.
struct Rounding {
  float scale;  // 2^-k
  float bias;   // the largest cancelling_bias()
};

GIBBS_HOST_DEVICE float float32_error(const Rounding& r) { return 0x1p-23f * r.bias; }

// The largest error of a field. The part of fixed point is doubled.
GIBBS_HOST_DEVICE float field_error(const Rounding& r, int64_t degree) { return float(degree) * r.scale + float32_error(r); }

}  // namespace gibbs
