// SPDX-License-Identifier: Apache-2.0
#pragma once

// The arguments of kernels: plain structs, passed by value. csrc/ops/cuda fills them in.
#include <string.h>

#include "core/fixed_point.h"
#include "core/outcome.h"
#include "core/philox.h"
#include "cuda/device.cuh"

namespace gibbs {

constexpr int kMaxBatchDims = 6;     // after neighbouring dimensions have been merged
constexpr int kMaxInlineBetas = 64;  // longer schedules lie in device memory

using BatchStrides = int64_t[kMaxBatchDims];

// A batch of chains. Dimensions along which the model changes come first.
struct BatchView {
  int32_t num_model_dims, num_dims;
  int64_t num_models, chains_per_model;
  BatchStrides sizes, contiguous;  // contiguous: strides of the row-by-row ("linear") number
};

GIBBS_HOST_DEVICE int64_t num_rows(const BatchView& b) { return b.num_models * b.chains_per_model; }
// CTAs, or clusters, of a model, if each takes so many chains.
GIBBS_HOST_DEVICE int64_t ctas_per_model(const BatchView& b, int64_t chains_of_each) {
  return divide_up(b.chains_per_model, chains_of_each);
}

// A parameter or a per-unit value [..., n], or a weight [..., n1, n2], of the call's dtype. Strides are in elements.
struct ParameterView {
  const void* data;
  int64_t stride, row_stride;  // of units; of a weight: of columns and rows
  BatchStrides batch_strides;
};

// Whether all chains of a model have one and the same row of a parameter.
GIBBS_HOST_DEVICE bool is_shared_row(const ParameterView& p, const BatchView& b) {
  for (int d = b.num_model_dims; d < b.num_dims; ++d)
    if (p.batch_strides[d] != 0) return false;
  return true;
}

// A tensor of bits [..., n] of any dtype: its elements are 0 (whose bits are all zero but perhaps the sign's) or `one`.
struct StateView {
  const void* data;  // null: absent
  int32_t element_size;
  bool is_floating;
  uint64_t one;
  int64_t stride;
  BatchStrides batch_strides;
};

// Bits to be written, [linear number, n].
struct StateOutput {
  void* data;
  int32_t element_size;
  uint64_t one;
};

// Mapped host memory, which a later call reads, or this one after a synchronisation. A kernel stores each word by one 8-byte store, so that a
// reader sees a whole word. Any one of several faults is kept.
//   fault:      op << 40 | outcome << 32 | float32 bits of the offending value; 0: none
//   rounding:   op << 56 | exponent bits of 2^-k << 48 | upper half of the bits of a bias << 32 | degree, of a model to be warned of;
//               0: none
struct DeviceReport {
  uint64_t fault, rounding;
};
constexpr int kMantissaBits = 23;

// The arguments of a call that do not depend on the kind of model.
struct SweepView {
  BatchView batch;
  const int64_t* chains;  // chain numbers; null: chain_offset + linear number
  BatchStrides chains_strides;
  int64_t chain_offset, sweep_offset, num_sweeps;
  const int64_t* seed_data;  // in device memory; null: `seed`
  uint64_t seed;
  const double* beta_data;  // in device memory; null: `beta`
  int64_t num_betas;        // of a row: 1, or one per sweep (binary, then relaxed); annealed: num_sweeps + 1
  int64_t num_beta_values;  // of all rows
  int64_t first_beta;       // in a row of one per sweep: that of the first sweep
  bool has_beta_rows;       // else all models have one row
  BatchStrides beta_strides;
  double beta[kMaxInlineBetas];

  int64_t num_relaxed_sweeps;
  int32_t relaxation;  // Relaxation
  bool slope_gradient;
  double sharpness;

  uint32_t op;          // OpId of csrc/ops/schemas.h, for reports
  float largest_error;  // largest error of a field that is not reported; negative: none is
  DeviceReport* report;
};

#if defined(GIBBS_DEVICE)

// ---- reports ---------------------------------------------------------------------------------------------------------------------

GIBBS_DEVICE_CALL void report_fault(const SweepView& s, Outcome outcome, float value = 0.0f) {
  const uint64_t word = uint64_t{s.op} << 40 | uint64_t(outcome) << 32 | __float_as_uint(value);
  *static_cast<volatile uint64_t*>(&s.report->fault) = word;
}
GIBBS_DEVICE_CALL void store_rounding(const SweepView& s, Rounding rounding, int64_t degree) {
  const uint64_t exponent = __float_as_uint(rounding.scale) >> kMantissaBits, bias = __float_as_uint(rounding.bias) >> 16;
  *static_cast<volatile uint64_t*>(&s.report->rounding) = uint64_t{s.op} << 56 | exponent << 48 | bias << 32 | uint64_t(degree);
}
// Reports a model whose rounding calls for a warning. degree: less than 2^32.
GIBBS_DEVICE void report_rounding(const SweepView& s, Rounding rounding, int64_t degree) {
  if (s.largest_error >= 0 && field_error(rounding, degree) > s.largest_error) store_rounding(s, rounding, degree);
}

// ---- batches ---------------------------------------------------------------------------------------------------------------------

GIBBS_DEVICE_CALL int64_t batch_offset(const BatchView& b, const BatchStrides& strides, int64_t model, int64_t chain) {
  int64_t at = 0;
  for (int d = b.num_model_dims; d-- > 0; model /= b.sizes[d]) at += model % b.sizes[d] * strides[d];
  for (int d = b.num_dims; d-- > b.num_model_dims; chain /= b.sizes[d]) at += chain % b.sizes[d] * strides[d];
  return at;
}
GIBBS_DEVICE int64_t linear_number(const BatchView& b, int64_t model, int64_t chain) {
  return batch_offset(b, b.contiguous, model, chain);
}

template <class T>
GIBBS_DEVICE const T* parameter_row(const ParameterView& p, const BatchView& b, int64_t model, int64_t chain) {
  return static_cast<const T*>(p.data) + batch_offset(b, p.batch_strides, model, chain);
}

// ---- counters --------------------------------------------------------------------------------------------------------------------

GIBBS_DEVICE uint64_t seed_of(const SweepView& s) { return s.seed_data ? uint64_t(*s.seed_data) : s.seed; }

// A chain's number. A number out of range is reported and replaced by 0.
GIBBS_DEVICE_CALL uint64_t chain_number(const SweepView& s, int64_t model, int64_t chain) {
  if (!s.chains) return uint64_t(s.chain_offset + linear_number(s.batch, model, chain));
  const int64_t number = s.chains[batch_offset(s.batch, s.chains_strides, model, chain)];
  if (number >= 0 && number < kMaxChains) return uint64_t(number);
  report_fault(s, Outcome::kChainOutOfRange, float(number));
  return 0;
}

// One of all rows' betas.
GIBBS_DEVICE double beta_value(const SweepView& s, int64_t i) {
  if (!s.beta_data) return s.beta[i];
  const double beta = s.beta_data[i];
  if (fabs(beta) <= 3.4028234663852886e38) return beta;
  report_fault(s, Outcome::kNonFiniteBeta, float(beta));
  return 0;
}
// A model's beta at sweep `at`, or at step `at` of an annealed call.
GIBBS_DEVICE double beta_at(const SweepView& s, int64_t model, int64_t at) {
  const int64_t row = s.has_beta_rows ? batch_offset(s.batch, s.beta_strides, model, 0) : 0;
  return beta_value(s, row + (s.num_betas == 1 ? 0 : s.first_beta + at));
}

// ---- states ----------------------------------------------------------------------------------------------------------------------

GIBBS_DEVICE uint64_t load_element(const void* data, int64_t at, int element_size) {
  switch (element_size) {
    case 1:
      return static_cast<const uint8_t*>(data)[at];
    case 2:
      return static_cast<const uint16_t*>(data)[at];
    case 4:
      return static_cast<const uint32_t*>(data)[at];
    default:
      return static_cast<const uint64_t*>(data)[at];
  }
}

GIBBS_DEVICE float element_value(const StateView& v, uint64_t element) {
  if (v.element_size == 8) return float(__longlong_as_double(int64_t(element)));
  if (v.element_size == 4) return __uint_as_float(uint32_t(element));
  if (v.element_size == 1) return float(element);
  if (v.one == 0x3f80) return __uint_as_float(uint32_t(element) << 16);  // bfloat16
  const uint32_t sign = uint32_t(element) >> 15 << 31, exponent = uint32_t(element) >> 10 & 31,
                 mantissa = uint32_t(element) & 0x3ff;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  const float magnitude = exponent ? __uint_as_float((exponent + 112) << 23 | mantissa << 13) : float(mantissa) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

// Element `at` from the start of the tensor as a bit. An element that is neither 0 nor 1 is reported and replaced by 0.
GIBBS_DEVICE_CALL uint32_t load_bit(const SweepView& s, const StateView& v, int64_t at, Outcome outcome) {
  const uint64_t element = load_element(v.data, at, v.element_size);
  if (element == v.one) return 1;
  const uint64_t magnitude = v.is_floating ? element & ((uint64_t{1} << (8 * v.element_size - 1)) - 1) : element;
  if (magnitude != 0) report_fault(s, outcome, element_value(v, element));
  return 0;
}

GIBBS_DEVICE_CALL void store_bit(const StateOutput& v, int64_t at, uint32_t bit) {
  const uint64_t element = bit ? v.one : 0;
  switch (v.element_size) {
    case 1:
      static_cast<uint8_t*>(v.data)[at] = uint8_t(element);
      return;
    case 2:
      static_cast<uint16_t*>(v.data)[at] = uint16_t(element);
      return;
    case 4:
      static_cast<uint32_t*>(v.data)[at] = uint32_t(element);
      return;
    default:
      static_cast<uint64_t*>(v.data)[at] = element;
  }
}

// ---- biases ----------------------------------------------------------------------------------------------------------------------

// Element `at` of a row of parameters of either dtype.
GIBBS_DEVICE double load_parameter(const void* row, int64_t at, bool is_double) {
  return is_double ? static_cast<const double*>(row)[at] : double(static_cast<const float*>(row)[at]);
}
GIBBS_DEVICE const void* parameter_row(const ParameterView& p, const BatchView& b, bool is_double, int64_t model, int64_t chain) {
  return static_cast<const char*>(p.data) + batch_offset(b, p.batch_strides, model, chain) * (is_double ? 8 : 4);
}

// Whether a number of either dtype is finite in float32, which the CPU asks of it, too.
template <class T>
GIBBS_DEVICE bool is_finite(T x) {
  return fabsf(float(x)) <= 3.402823466e38f;
}

// A bias as binary sweeps use it, in float32. A bias that is not finite is reported and replaced by 0.
GIBBS_DEVICE float finite_bias(const SweepView& s, float bias, Outcome outcome) {
  if (is_finite(bias)) return bias;
  report_fault(s, outcome, bias);
  return 0;
}

#endif

}  // namespace gibbs
