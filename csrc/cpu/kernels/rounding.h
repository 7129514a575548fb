// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. Floating-point numbers by their bits, for the rounding of couplings
// (core/fixed_point.h).

template <class T>
struct FloatBits;
template <>
struct FloatBits<float> {
  using Int = int32_t;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr Int kExponentMask = 0xff, kMagnitude = 0x7fffffff;
};
template <>
struct FloatBits<double> {
  using Int = int64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr Int kExponentMask = 0x7ff, kMagnitude = 0x7fffffffffffffff;
};

// The bits of |x|: they order like |x|, with inf and NaN on top.
template <class T>
inline typename FloatBits<T>::Int magnitude_bits(T x) {
  typename FloatBits<T>::Int bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits & FloatBits<T>::kMagnitude;
}

template <class T>
inline T power_of_two(int exponent) {
  using Bits = FloatBits<T>;
  const typename Bits::Int bits = typename Bits::Int(exponent + Bits::kBias) << Bits::kMantissa;
  T out;
  __builtin_memcpy(&out, &bits, sizeof out);
  return out;
}

// w * factor to the nearest integer, ties to even.
template <class T>
inline int32_t rounded(T w, T factor) {
  return int32_t(__builtin_rint(double(w * factor)));
}

// The consequences of the largest magnitude of a model's couplings for their scale.
struct LargestCoupling {
  CouplingStatus status;
  int exponent;  // max |w| < 2^exponent
  bool fits;     // the largest k serves, whatever the sums: the couplings are small, subnormal or 0
};
template <class T>
inline LargestCoupling largest_coupling(typename FloatBits<T>::Int largest_bits, int64_t degree) {
  using Bits = FloatBits<T>;
  const auto stored = largest_bits >> Bits::kMantissa;
  const int exponent = int(stored) - Bits::kBias + 1;
  const CouplingStatus status = stored == Bits::kExponentMask ? CouplingStatus::kNonFinite
                                : exponent > 127              ? CouplingStatus::kTooLarge
                                                              : CouplingStatus::kOk;
  return {status, exponent, stored == 0 || largest_scale_fits(degree, exponent)};
}

inline float largest_magnitude(const float* x, int64_t n) {
  VecF most = {};
  for (int64_t i = 0; i < n; i += kLanes)
    most = vector_max(most, bit_cast<VecF>(bit_cast<VecI>(load_part(x + i, n - i)) & 0x7fffffff));
  float largest = 0;
  for (int l = 0; l < kLanes; ++l) largest = most[l] > largest ? most[l] : largest;
  return largest;
}
