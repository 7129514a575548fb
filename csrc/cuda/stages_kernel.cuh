// SPDX-License-Identifier: Apache-2.0
#pragma once

// Kernels that pack, unpack and sum (stages.h).
#include "cuda/rounding.cuh"
#include "cuda/stages.h"

namespace gibbs {

constexpr int kStageThreads = 256;
constexpr int kStageWarps = kStageThreads / kWarpSize;
constexpr int kPartWords = 32;  // a warp takes this many words of a row, or of biases 32 times as many numbers

GIBBS_HOST_DEVICE int64_t parts_of_row(int64_t n) { return divide_up(state_words(n), kPartWords); }
GIBBS_HOST_DEVICE int64_t rows_of(const BiasesToPack& biases, const BatchView& b) {
  return biases.is_shared ? b.num_models : num_rows(b);
}

#if defined(GIBBS_DEVICE)

// A warp's part of one array: parts are numbered through all arrays of a launch.
struct RowPart {
  int64_t row, begin, end;  // numbers of units
  GIBBS_DEVICE RowPart(int64_t part, int64_t n) {
    const int64_t parts = parts_of_row(n);
    row = part / parts;
    begin = part % parts * kPartWords * kWarpSize;
    end = begin + kPartWords * kWarpSize < n ? begin + kPartWords * kWarpSize : n;
  }
};
// Whether a part is among the `parts` of an array; if not, it is counted from the next array on.
GIBBS_DEVICE bool is_part_of(int64_t parts, int64_t* part) {
  if (*part < parts) return true;
  *part -= parts;
  return false;
}
GIBBS_DEVICE int64_t warp_of_grid() { return int64_t{blockIdx.x} * kStageWarps + warp(); }

// A warp owns a part of a row. Lanes lie along units, so that loads are coalesced. No barriers, no shared memory. Every number is read once.
__global__ void __launch_bounds__(kStageThreads, 1) pack_kernel(const __grid_constant__ PackParams p) {
  const BatchView& batch = p.sweep.batch;
  const int64_t rows = num_rows(batch);
  if (p.scales[0].k == kUnsound) return;
  int64_t part = warp_of_grid();
  for (int i = 0; i < p.num_bits; ++i) {
    const BitsToPack& job = p.bits[i];
    if (!is_part_of(rows * parts_of_row(job.offset + job.n), &part)) continue;
    const RowPart own(part, job.offset + job.n);
    const int64_t row_begin =
        batch_offset(batch, job.from.batch_strides, own.row / batch.chains_per_model, own.row % batch.chains_per_model);
    for (int64_t first = own.begin; first < own.end; first += kWarpSize) {
      const int64_t unit = first + lane() - job.offset;
      const bool is_set =
          job.from.data && unit >= 0 && unit < job.n && load_bit(p.sweep, job.from, row_begin + unit * job.from.stride, job.fault);
      const uint32_t word = __ballot_sync(kFullWarp, is_set);
      if (lane() == 0) job.to[own.row * state_words(job.offset + job.n) + first / kWarpSize] = word;
    }
    return;
  }
  for (int i = 0; i < p.num_biases; ++i) {
    const BiasesToPack& job = p.biases[i];
    if (!is_part_of(rows_of(job, batch) * parts_of_row(job.n), &part)) continue;
    const RowPart own(part, job.n);
    const int64_t model = job.is_shared ? own.row : own.row / batch.chains_per_model,
                  chain = job.is_shared ? 0 : own.row % batch.chains_per_model;
    const void* const bias = parameter_row(job.bias, batch, p.is_double, model, chain);
    const void* const base = job.to_base_bias ? parameter_row(job.base_bias, batch, p.is_double, model, chain) : nullptr;
    for (int64_t at = own.begin + lane(); at < own.end; at += kWarpSize) {
      const int64_t unit = job.order ? job.order[at] : at;
      const float of_unit = finite_bias(p.sweep, float(load_parameter(bias, unit * job.bias.stride, p.is_double)), job.bias_fault);
      float base_of_unit = of_unit;
      if (base) {
        base_of_unit = finite_bias(p.sweep, float(load_parameter(base, unit * job.base_bias.stride, p.is_double)), job.base_fault);
        job.to_base_bias[own.row * job.stride + job.offset + at] = base_of_unit;
      }
      job.to_bias[own.row * job.stride + job.offset + at] = of_unit;
      const float scale = p.scales[model].scale;
      report_rounding(p.sweep, {scale, cancelling_bias(of_unit, base_of_unit, scale)},
                      p.device_degree ? *p.device_degree : p.degree);
    }
    return;
  }
  if (part == 0)
    for (int64_t i = lane(); i < p.sweep.num_beta_values; i += kWarpSize)
      beta_value(p.sweep, i);  // checks it, even if there is no sweep
  const int64_t row = part * kWarpSize + lane();
  if (row < rows) p.numbers[row] = chain_number(p.sweep, row / batch.chains_per_model, row % batch.chains_per_model);
}

// The same for bits that are unpacked.
__global__ void __launch_bounds__(kStageThreads, 1) unpack_kernel(const __grid_constant__ UnpackParams p) {
  const int64_t rows = num_rows(p.batch);
  const bool is_sound = !p.scales || p.scales[0].k != kUnsound;
  int64_t part = warp_of_grid();
  for (int i = 0; i < p.num_bits; ++i) {
    const BitsToUnpack& job = p.bits[i];
    if (!is_part_of(rows * parts_of_row(job.offset + job.n), &part)) continue;
    const RowPart own(part, job.offset + job.n);
    const int64_t to = linear_number(p.batch, own.row / p.batch.chains_per_model, own.row % p.batch.chains_per_model) * job.n;
    const uint32_t* const words = job.from + own.row * state_words(job.offset + job.n);
    for (int64_t at = own.begin + lane(); at < own.end; at += kWarpSize)
      if (at >= job.offset) store_bit(job.to, to + at - job.offset, is_sound && words[at / kWarpSize] >> (at % kWarpSize) & 1);
    return;
  }
}

// A CTA owns 32 elements of one model. Each of its warps adds every eighth part; then their sums are added.
// Shared memory holds the warps' sums. The barrier makes them whole before they are added. Every part is read once.
template <class T>
__global__ void __launch_bounds__(kStageThreads) partial_sum_kernel(const __grid_constant__ PartialSums p) {
  const Shared<T> sums = SharedMemory().take<T>(kStageThreads);
  const int64_t groups = divide_up(p.count, kWarpSize), model = blockIdx.x / groups;
  const int64_t at = blockIdx.x % groups * kWarpSize + lane();
  const T* const parts = static_cast<const T*>(p.from) + model * p.parts * p.count + at;
  T sum = 0;
  if (at < p.count)
    for (int64_t part = warp(); part < p.parts; part += kStageWarps) sum += parts[part * p.count];
  sums[warp() * kWarpSize + lane()] = sum;
  __syncthreads();  // the warps' sums are whole
  if (warp() != 0 || at >= p.count) return;
  for (int w = 1; w < kStageWarps; ++w) sum += sums[w * kWarpSize + lane()];
  static_cast<T*>(p.to)[model * p.count + at] = sum;
}

#endif

}  // namespace gibbs
