// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>
#include <string.h>

#include "core/macros.h"

// Probabilities as unsigned integers, so that  random_word < integer  has the probability:
//   threshold(x)  = 2^32 * sigmoid(x), that a unit of logit x becomes 1 by Gibbs's rule;
//   acceptance(x) = 2^32 * exp(x), x < 0, that a unit flips by Metropolis's although that makes the state exp(x) times as probable.
//
// float32 throughout, each multiply, add and divide rounded once (build with -ffp-contract=off; on the GPU __fmul_rn and friends),
// so every backend gives the same bits. Both are made of
//   exp(-a) = 2^-n * exp(n ln2 - a), n = round(a / ln2), ln2 split in two (Cody and Waite), exp on |r| <= 0.35 by Cephes' polynomial.
// threshold computes s = sigmoid(-|x|), the small tail, and mirrors it in integers: threshold(-x) + threshold(x) = 2^32, so both tails
// keep their relative resolution.
// Measured over all float32 inputs (tests/cpp/test_threshold.cpp): threshold is within 177.3 units of 2^-32, and no step from one float
// to the next goes down by more than 128; acceptance is within 207 units, and no step goes down.
// Limits: threshold(+-0) = 2^31; x <= -22.19 gives 0 (probability exactly 0); the mirror of 0 saturates at 2^32 - 1; +-inf are
// like +-90. acceptance saturates at 2^32 - 1, too; x <= -22.181 gives 0. NaN is rejected before.
// twins: gibbs_ext/reference.py::threshold, acceptance
namespace gibbs {

constexpr float kThresholdLimit = 90.0f;  // beyond it the tail is 0 anyway, and n stays a small integer
constexpr float kLog2e = 1.44269504f;
constexpr float kLn2High = 0.693359375f;  // 9 bits: n * kLn2High is exact
constexpr float kLn2Low = -2.12194440e-4f;
constexpr float kExp0 = 1.9875691500e-4f, kExp1 = 1.3981999507e-3f, kExp2 = 8.3334519073e-3f, kExp3 = 4.1665795894e-2f,
                kExp4 = 1.6666665459e-1f, kExp5 = 5.0000001201e-1f;

#if defined(__CUDA_ARCH__)
GIBBS_HOST_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
GIBBS_HOST_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
GIBBS_HOST_DEVICE float div_rn(float a, float b) { return __fdiv_rn(a, b); }
#else
GIBBS_HOST_DEVICE float mul_rn(float a, float b) { return a * b; }
GIBBS_HOST_DEVICE float add_rn(float a, float b) { return a + b; }
GIBBS_HOST_DEVICE float div_rn(float a, float b) { return a / b; }
#endif

// |x|, at most kThresholdLimit.
GIBBS_HOST_DEVICE float clipped_magnitude(float x) {
  const float magnitude = x < 0 ? -x : x;
  return magnitude < kThresholdLimit ? magnitude : kThresholdLimit;
}

// exp(-a), 0 <= a <= kThresholdLimit
GIBBS_HOST_DEVICE float exp_of_negative(float a) {
  const int n = int(add_rn(mul_rn(a, kLog2e), 0.5f));
  float r = add_rn(mul_rn(float(n), kLn2High), -a);
  r = add_rn(r, mul_rn(float(n), kLn2Low));
  float p = kExp0;
  p = add_rn(mul_rn(p, r), kExp1);
  p = add_rn(mul_rn(p, r), kExp2);
  p = add_rn(mul_rn(p, r), kExp3);
  p = add_rn(mul_rn(p, r), kExp4);
  p = add_rn(mul_rn(p, r), kExp5);
  float y = mul_rn(p, mul_rn(r, r));
  y = add_rn(y, r);
  y = add_rn(y, 1.0f);
  const uint32_t bits = n < 127 ? uint32_t(127 - n) << 23 : 0;
  float power;
  memcpy(&power, &bits, sizeof power);
  return mul_rn(y, power);
}

GIBBS_HOST_DEVICE uint32_t threshold(float x) {
  const float e = exp_of_negative(clipped_magnitude(x));
  const float s = div_rn(e, add_rn(1.0f, e));
  const uint32_t tail = uint32_t(mul_rn(s, 4294967296.0f));
  return x > 0 ? (tail ? 0u - tail : 0xffffffffu) : tail;
}

GIBBS_HOST_DEVICE uint32_t acceptance(float x) {
  const float e = exp_of_negative(clipped_magnitude(x));
  return e < 1 ? uint32_t(mul_rn(e, 4294967296.0f)) : 0xffffffffu;
}

// The logit of a binary update, from the integer sum of its rounded couplings (csrc/README.md, 2.3). scale = 2^-k.
// At beta = 0 it is 0 even where the field overflows.
GIBBS_HOST_DEVICE float binary_logit(int32_t acc, float scale, float bias, float beta) {
  return beta == 0 ? 0.0f : mul_rn(beta, add_rn(mul_rn(float(acc), scale), bias));
}

// -beta times the change of energy when a unit of this logit flips (csrc/README.md, 2.6).
GIBBS_HOST_DEVICE float logit_of_flip(float logit, bool is_one) { return is_one ? -logit : logit; }

}  // namespace gibbs
