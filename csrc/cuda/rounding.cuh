// SPDX-License-Identifier: Apache-2.0
#pragma once

// Couplings to fixed point on the device, by the rules of core/fixed_point.h. twin: gibbs_ext/reference.py::round_couplings
#include "core/fixed_point.h"
#include "cuda/views.cuh"

namespace gibbs {

#if defined(GIBBS_DEVICE)

template <class T>
struct FloatTraits;
template <>
struct FloatTraits<float> {
  static constexpr int kBias = 127;
  static constexpr uint32_t kTop = 0xff;
  GIBBS_DEVICE static uint32_t exponent(float x) { return __float_as_uint(x) >> 23 & 0xff; }
  GIBBS_DEVICE static float power(int e) { return __uint_as_float(uint32_t(e + kBias) << 23); }
};
template <>
struct FloatTraits<double> {
  static constexpr int kBias = 1023;
  static constexpr uint32_t kTop = 0x7ff;
  GIBBS_DEVICE static uint32_t exponent(double x) { return uint32_t(__double_as_longlong(x) >> 52) & 0x7ff; }
  GIBBS_DEVICE static double power(int e) { return __longlong_as_double(int64_t(e + kBias) << 52); }
};

// ceil(|w| factor), at least 1 unless w is 0, even where the product underflows.
template <class T>
GIBBS_DEVICE uint32_t rounded_up(T w, T factor) {
  const T scaled = w * factor, x = scaled < 0 ? -scaled : scaled;
  const int32_t floor = int32_t(x);
  return uint32_t(floor + (T(floor) < x || (x == 0 && w != 0)));
}

// w factor to the nearest integer, ties to even; 0 if w is a number for which a fault has been reported.
GIBBS_DEVICE int32_t rounded(float w, float factor) {
  const float x = w * factor;
  return fabsf(x) < 2147483648.0f ? __float2int_rn(x) : 0;
}
GIBBS_DEVICE int32_t rounded(double w, double factor) {
  const double x = w * factor;
  return fabs(x) < 2147483648.0 ? __double2int_rn(x) : 0;
}

// Conclusions from the stored exponent of the largest |w|, before any sum is known.
struct LargestCoupling {
  bool settled;  // k is known
  int exponent;  // max |w| < 2^exponent
  Outcome fault;
};
template <class T>
GIBBS_DEVICE LargestCoupling largest_coupling(uint32_t stored_exponent, int64_t degree, Outcome non_finite, Outcome too_large) {
  const int e = int(stored_exponent) - FloatTraits<T>::kBias + 1;
  const Outcome fault = stored_exponent == FloatTraits<T>::kTop ? non_finite : e > 127 ? too_large : Outcome::kOk;
  return {stored_exponent == 0 || fault != Outcome::kOk || largest_scale_fits(degree, e), e, fault};
}

// Coupling (i, j) of a model, 2^k times as large, to the nearest integer.
GIBBS_DEVICE int32_t coupling_at(const ParameterView& weight, const void* of_model, bool is_double, int k, int64_t i, int64_t j) {
  const int64_t at = i * weight.row_stride + j * weight.stride;
  return is_double ? rounded(global_load(static_cast<const double*>(of_model) + at), FloatTraits<double>::power(k))
                   : rounded(global_load(static_cast<const float*>(of_model) + at), FloatTraits<float>::power(k));
}

// A model's k, and e of max |coupling| < 2^e.
struct CouplingScale {
  int k, exponent;
  // How many of its lowest bits a rounded coupling loses in two slices of 8 bits, which hold up to 127 * 257. A rounded coupling is at most
  // 2^(k + exponent) <= 2^31, unless a fault has been reported.
  GIBBS_DEVICE int shift() const {
    const int largest = k + exponent;
    return largest <= 14 ? 0 : largest < 31 ? largest - 14 : 17;
  }
};
// To the nearest, halves upwards.
GIBBS_DEVICE int32_t shifted(int32_t coupling, int shift) {
  return shift ? (coupling >> shift) + (coupling >> (shift - 1) & 1) : coupling;
}
// Takes the lowest digit, -128 .. 127, off `rest`. Only sums of digits modulo 2^32 matter.
GIBBS_DEVICE int32_t take_digit(int32_t& rest) {
  const auto digit = int32_t(int8_t(uint32_t(rest) & 0xff));
  rest = int32_t(uint32_t(rest) - uint32_t(digit)) >> 8;
  return digit;
}

// The largest of slots[at] and of the threads' x, which slots[at] is then. A barrier has come since it was written.
GIBBS_DEVICE uint32_t cta_max(uint32_t x, const Shared<uint32_t>& slots, int at) {
  for (int step = 16; step; step >>= 1) x = max(x, __shfl_xor_sync(kFullWarp, x, step));
  if (lane() == 0) atomicMax(&slots[at], x);
  __syncthreads();  // all warps have taken part
  return slots[at];
}

#endif

}  // namespace gibbs
