// SPDX-License-Identifier: Apache-2.0
#pragma once

// One relaxed update and its derivative (csrc/README.md, 4), and what kernels of relaxed sweeps share. twin: gibbs_ext/reference.py::relax
#include "core/philox.h"
#include "cuda/views.cuh"

namespace gibbs {

#if defined(GIBBS_DEVICE)

// The chains of a CTA, which belong to one model.
struct CtaChains {
  int64_t model, first;
  int count;
  GIBBS_DEVICE CtaChains(const BatchView& batch, int chains_per_cta) {
    const int64_t ctas = ctas_per_model(batch, chains_per_cta);
    model = blockIdx.x / ctas;
    first = blockIdx.x % ctas * chains_per_cta;
    const int64_t left_over = batch.chains_per_model - first;
    count = left_over < chains_per_cta ? int(left_over) : chains_per_cta;
  }
};

template <class T>
struct RelaxedUnit {
  T value, mean, slope, mean_slope;  // zeta, q, d zeta / d field, d q / d field
};

template <class T>
GIBBS_DEVICE T uniform(uint32_t word) {
  if constexpr (sizeof(T) == 4)
    return (float(word >> 9) + 0.5f) * 0x1p-23f;
  else
    return (double(word) + 0.5) * 0x1p-32;
}

// word: the unit's random word, which mean_field ignores.
template <class T>
GIBBS_DEVICE_CALL RelaxedUnit<T> relax(int relaxation, T field, uint32_t word, T beta, T sharpness, bool slope_gradient) {
  RelaxedUnit<T> out;
  const T x = beta * field, e = exp(x < 0 ? x : -x), tail = e / (1 + e);
  const T q = x < 0 ? tail : 1 - tail, variance = tail / (1 + e);  // q (1 - q) without cancellation
  out.mean = q;
  out.mean_slope = beta * variance;
  if (relaxation == kMeanField) {
    out.value = q;
    out.slope = out.mean_slope;
    return out;
  }
  const T u = uniform<T>(word);
  if (relaxation == kConcrete) {
    const T y = sharpness * (x + T(log(double(u)) - log1p(-double(u))));
    const T decay = exp(y < 0 ? y : -y), rest = decay / (1 + decay);
    out.value = y < 0 ? rest : 1 - rest;
    out.slope = sharpness * beta * (rest / (1 + decay));
  } else if (relaxation == kStraightThrough) {
    out.value = u > 1 - q ? T(1) : T(0);
    out.slope = out.mean_slope;
  } else {
    const T denominator = variance + T(1e-2), distance = u - (1 - q);
    T slope = sharpness / 4 / denominator;
    const T linear = T(0.5) + slope * distance;
    out.value = linear < 0 ? T(0) : (linear > 1 ? T(1) : linear);
    if (slope_gradient) slope -= distance * slope * (1 - 2 * q) / denominator;  // d linear / d q
    out.slope = linear > 0 && linear < 1 ? slope * out.mean_slope : T(0);
  }
  return out;
}

#endif

}  // namespace gibbs
