// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. Relaxed units (csrc/README.md, 4), for T = float or double.

// exp(-a), 0 <= a, to the last bits of T. float uses the polynomial of binary updates; double uses Taylor's to degree 13, whose
// remainder on |r| <= 0.35 is below 1e-17.
inline VecF exp_negative(VecF a) { return exp_of_negative(a < kThresholdLimit ? a : splat(kThresholdLimit)); }
inline Vec<double> exp_negative(Vec<double> a) {
  using VecD = Vec<double>;
  constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer, left in the low bits
  a = a < 700.0 ? a : splat(700.0);
  const VecD shifted = a * -1.4426950408889634 + kRounder;
  const VecD n = shifted - kRounder;
  const VecD r = (-a - n * 0x1.62e42fefa0000p-1) - n * 0x1.cf79abc9e3b3ap-40;
  VecD p = splat(1.0 / 6227020800.0);
  constexpr double kInverseFactorials[] = {1.0 / 479001600.0,
                                           1.0 / 39916800.0,
                                           1.0 / 3628800.0,
                                           1.0 / 362880.0,
                                           1.0 / 40320.0,
                                           1.0 / 5040.0,
                                           1.0 / 720.0,
                                           1.0 / 120.0,
                                           1.0 / 24.0,
                                           1.0 / 6.0,
                                           0.5,
                                           1.0,
                                           1.0};
  for (double c : kInverseFactorials) p = p * r + c;
  const Vec<int64_t> power = ((Vec<int64_t>)shifted - bit_cast<Vec<int64_t>>(splat(kRounder)) + 1023) << 52;
  return p * (VecD)power;
}

template <int kCount>
__attribute__((always_inline)) inline void exp_negatives(VecF (&a)[kCount]) {
  GIBBS_EACH a[k] = a[k] < kThresholdLimit ? a[k] : splat(kThresholdLimit);
  exp_of_negatives(a);
}
template <int kCount>
__attribute__((always_inline)) inline void exp_negatives(Vec<double> (&a)[kCount]) {
  GIBBS_EACH a[k] = exp_negative(a[k]);
}

// Uniform numbers in (0, 1), made of a vector of random words.
typedef uint32_t VecWords __attribute__((vector_size(GIBBS_VECTOR_BYTES / 2)));  // as many as a vector has doubles
inline VecF uniforms(const uint32_t* words, VecF) { return (to_float((VecI)(load<VecU>(words) >> 9)) + 0.5f) * 0x1p-23f; }
inline Vec<double> uniforms(const uint32_t* words, Vec<double>) {
  return (__builtin_convertvector(load<VecWords>(words), Vec<double>) + 0.5) * 0x1p-32;
}

template <class T>
struct RelaxedUnit {
  Vec<T> value, mean, slope, mean_slope;  // zeta, q, d zeta / d field, d q / d field
};

// kCount vectors of units; words: their random words.
template <class T, int kCount>
__attribute__((always_inline)) inline void relax(Relaxation kind, const Vec<T> (&field)[kCount],
                                                 const uint32_t* const (&words)[kCount], T beta, T sharpness, bool slope_gradient,
                                                 RelaxedUnit<T> (&out)[kCount]) {
  using V = Vec<T>;
  V e[kCount], tail[kCount], q[kCount], variance[kCount], u[kCount];
  GIBBS_EACH e[k] = beta * field[k];
  GIBBS_EACH e[k] = e[k] < 0 ? -e[k] : e[k];
  exp_negatives(e);
  GIBBS_EACH tail[k] = e[k] / (1 + e[k]);
  GIBBS_EACH q[k] = beta * field[k] < 0 ? tail[k] : 1 - tail[k];
  GIBBS_EACH variance[k] = tail[k] / (1 + e[k]);  // q (1 - q) without cancellation
  GIBBS_EACH out[k].mean = q[k];
  GIBBS_EACH out[k].mean_slope = beta * variance[k];
  if (kind == kMeanField) {
    GIBBS_EACH out[k].value = q[k];
    GIBBS_EACH out[k].slope = out[k].mean_slope;
    return;
  }
  GIBBS_EACH u[k] = uniforms(words[k], V{});
  if (kind == kConcrete) {
    V y[kCount];
    GIBBS_EACH {
      V logit_u;
      for (int l = 0; l < lanes_of<T>; ++l) logit_u[l] = T(__builtin_log(double(u[k][l])) - __builtin_log1p(-double(u[k][l])));
      y[k] = sharpness * (beta * field[k] + logit_u);
      e[k] = y[k] < 0 ? -y[k] : y[k];
    }
    exp_negatives(e);
    GIBBS_EACH tail[k] = e[k] / (1 + e[k]);
    GIBBS_EACH out[k].value = y[k] < 0 ? tail[k] : 1 - tail[k];
    GIBBS_EACH out[k].slope = sharpness * beta * (tail[k] / (1 + e[k]));
  } else if (kind == kStraightThrough) {
    GIBBS_EACH out[k].value = u[k] > 1 - q[k] ? splat(T{1}) : V{};
    GIBBS_EACH out[k].slope = out[k].mean_slope;
  } else {
    V denominator[kCount], slope[kCount], distance[kCount], linear[kCount];
    GIBBS_EACH denominator[k] = variance[k] + T(1e-2);
    GIBBS_EACH slope[k] = (sharpness / 4) / denominator[k];
    GIBBS_EACH distance[k] = u[k] - (1 - q[k]);
    GIBBS_EACH linear[k] = T(0.5) + slope[k] * distance[k];
    GIBBS_EACH out[k].value = linear[k] < 0 ? V{} : (linear[k] > 1 ? splat(T{1}) : linear[k]);
    if (slope_gradient) GIBBS_EACH slope[k] -= distance[k] * slope[k] * (1 - 2 * q[k]) / denominator[k];  // d linear / d q
    GIBBS_EACH slope[k] = linear[k] > 0 ? (linear[k] < 1 ? slope[k] : V{}) : V{};
    GIBBS_EACH out[k].slope = slope[k] * out[k].mean_slope;
  }
}
