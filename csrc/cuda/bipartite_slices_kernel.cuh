// SPDX-License-Identifier: Apache-2.0
#pragma once

// Couplings of bipartite models to fixed point and to slices (bipartite_slices.h). twin: gibbs_ext/reference.py::round_couplings
#include "cuda/bipartite_slices.h"
#include "cuda/rounding.cuh"

namespace gibbs {

constexpr int kScaleThreads = 512;
constexpr int kSliceThreads = 128;

// Of a model's scale: all that is needed; what CTAs that share a model find; what follows from their findings.
enum class ScaleStep { kAll, kLargest, kSums, kConclusion };

struct BipartiteScaleParams {
  BipartiteParams call;
  ScalePlan plan;
  ScaleStep step;
  ModelScale* scales;
  uint32_t* parts;  // [model, part, kScaleHead + columns]; null: all is in shared memory
  double* out;
};

struct BipartiteSliceParams {
  ParameterView weight;
  BatchView batch;
  BipartitePacked packed;
};

GIBBS_HOST_DEVICE bool has_columns_in_one_piece(const BipartiteParams& p) { return p.weight.stride > p.weight.row_stride; }
GIBBS_HOST_DEVICE int64_t scale_columns(const BipartiteParams& p) { return has_columns_in_one_piece(p) ? p.n1 : p.n2; }

// Numbers that come before the sums of columns: the stored exponent of the largest coupling, and the largest sum of a row.
constexpr int kScaleHead = 2;

#if defined(GIBBS_DEVICE)

// CTAs own parts of the rows of a model's weight, which they read along rows or columns, whichever are in one piece: once for the largest coupling, and
// then for the sums of rows and columns, if these are needed at all. columns: room for the columns' sums.
template <class T, class Columns>
GIBBS_DEVICE void find_scale(const BipartiteScaleParams& params, const Shared<uint32_t>& head, const Columns& columns) {
  const BipartiteParams& p = params.call;
  const SweepView& s = p.sweep;
  const bool swaps = has_columns_in_one_piece(p);
  const int64_t num_rows = swaps ? p.n2 : p.n1, num_columns = scale_columns(p), degree = p.n1 > p.n2 ? p.n1 : p.n2;
  const int64_t row_stride = swaps ? p.weight.stride : p.weight.row_stride, stride = swaps ? p.weight.row_stride : p.weight.stride;
  const bool is_part = params.step == ScaleStep::kLargest || params.step == ScaleStep::kSums, concludes = !is_part;
  const int64_t model = is_part ? blockIdx.x / params.plan.parts : blockIdx.x;
  const int part = is_part ? int(blockIdx.x % params.plan.parts) : 0, parts = is_part ? params.plan.parts : 1;
  const int64_t size = kScaleHead + num_columns;  // of what a CTA finds
  uint32_t *const of_model = params.parts + model * params.plan.parts * size, *const own = of_model + part * size;
  constexpr int kWarps = kScaleThreads / kWarpSize;
  const int64_t begin = num_rows * part / parts, end = num_rows * (part + 1) / parts;
  const T* weight = parameter_row<T>(p.weight, p.sweep.batch, model, 0);
  const auto coupling = [&](int64_t i, int64_t j) { return global_load(weight + i * row_stride + j * stride); };

  if (threadIdx.x < kScaleHead) head[threadIdx.x] = 0;
  __syncthreads();  // the head is clear
  uint32_t stored = 0;
  if (params.step == ScaleStep::kAll || params.step == ScaleStep::kLargest) {
    for (int64_t i = begin + warp(); i < end; i += kWarps)
#pragma unroll 4
      for (int64_t j = lane(); j < num_columns; j += kWarpSize) stored = max(stored, FloatTraits<T>::exponent(coupling(i, j)));
  } else {
    for (int of = int(threadIdx.x); of < params.plan.parts; of += kScaleThreads) stored = max(stored, of_model[of * size]);
  }
  stored = cta_max(stored, head, 0);
  if (params.step == ScaleStep::kLargest) {
    if (threadIdx.x == 0) own[0] = stored;
    return;
  }
  const LargestCoupling largest = largest_coupling<T>(stored, degree, Outcome::kNonFiniteWeight, Outcome::kTooLargeWeight);
  if (concludes && largest.fault != Outcome::kOk && threadIdx.x == 0) report_fault(s, largest.fault);
  int k = kMaxScaleExponent;
  if (!largest.settled) {  // the same for the whole CTA
    if (params.step != ScaleStep::kConclusion) {
      for (int64_t j = threadIdx.x; j < num_columns; j += kScaleThreads) columns[j] = 0;
      __syncthreads();  // the sums are clear
      const T factor = FloatTraits<T>::power(coupling_sum_bits(degree) - largest.exponent);
      for (int64_t i = begin + warp(); i < end; i += kWarps) {
        uint32_t row = 0;
#pragma unroll 4
        for (int64_t j = lane(); j < num_columns; j += kWarpSize) {
          const uint32_t q = rounded_up<T>(coupling(i, j), factor);
          row += q;
          atomicAdd(&columns[j], q);
        }
        row = warp_sum(row);
        if (lane() == 0) atomicMax(&head[1], row);
      }
      __syncthreads();  // the columns' sums are whole
    }
    if (params.step == ScaleStep::kSums) {
      if (threadIdx.x == 0) own[1] = head[1];
      if (params.plan.columns_in_shared)
        for (int64_t j = threadIdx.x; j < num_columns; j += kScaleThreads) own[kScaleHead + j] = columns[j];
      return;
    }
    uint32_t most = 0;
    if (params.step == ScaleStep::kConclusion)
      for (int of = int(threadIdx.x); of < params.plan.parts; of += kScaleThreads) most = max(most, of_model[of * size + 1]);
    for (int64_t j = threadIdx.x; j < num_columns; j += kScaleThreads) {
      uint32_t column = 0;
      if (params.step == ScaleStep::kAll) {
        column = columns[j];
      } else {
#pragma unroll 8
        for (int of = 0; of < params.plan.parts; ++of) column += of_model[of * size + kScaleHead + j];
      }
      most = max(most, column);
    }
    k = scale_exponent(int64_t(cta_max(most, head, 1)), degree, largest.exponent);
  }
  if (!concludes || threadIdx.x != 0) return;
  const CouplingScale scale = {k, largest.exponent};
  report_rounding(s, {FloatTraits<float>::power(-k), 0}, degree);
  if (params.out) params.out[linear_number(p.sweep.batch, model, 0)] = FloatTraits<double>::power(-k);
  if (params.scales) params.scales[model] = {k, scale.shift(), FloatTraits<float>::power(-k), 0};
}

template <class T>
GIBBS_DEVICE void find_scale_in(const BipartiteScaleParams& params) {
  SharedMemory memory;
  const Shared<uint32_t> head = memory.take<uint32_t>(kScaleHead);
  if (params.plan.columns_in_shared)
    find_scale<T>(params, head, memory.take<uint32_t>(scale_columns(params.call)));
  else
    find_scale<T>(params, head, params.parts + blockIdx.x * (kScaleHead + scale_columns(params.call)) + kScaleHead);
}
// All of a model's scale, or the conclusion from what CTAs have found.
template <class T>
__global__ void __launch_bounds__(kScaleThreads, 1) bipartite_scale_kernel(const __grid_constant__ BipartiteScaleParams params) {
  find_scale_in<T>(params);
}
// What a CTA finds of its part of a model.
template <class T>
__global__ void __launch_bounds__(kScaleThreads, 1) bipartite_part_kernel(const __grid_constant__ BipartiteScaleParams params) {
  find_scale_in<T>(params);
}

// A CTA owns a word of a side of a model; its warps share the blocks of it.
// Shared memory: what slices have lost of the fields of 32 units, above and below 0.
// Traffic: a coupling is read twice by all CTAs together, and written as 2 or 4 bytes twice.
// Computes: slices of w_ij, and for each unit the middle and the half of the interval of sum_j (w_ij - its slices) z_j over all z.
template <class T, int kSlices>
__global__ void __launch_bounds__(kSliceThreads, 1) bipartite_slice_kernel(const __grid_constant__ BipartiteSliceParams p) {
  SharedMemory memory;
  const Shared<uint32_t> lost = memory.take<uint32_t>(2 * kWarpSize);
  if (threadIdx.x < 2 * kWarpSize) lost[threadIdx.x] = 0;
  __syncthreads();  // the sums are clear
  const int left_words = p.packed.sides[0].words, words = left_words + p.packed.sides[1].words;
  const int64_t model = blockIdx.x / words;
  const int at = int(blockIdx.x % words);
  const bool is_right = at >= left_words;
  const BipartiteSide &to = p.packed.sides[is_right], &from = p.packed.sides[!is_right];
  const int word = is_right ? at - left_words : at;
  const int g = lane() / 4, t = lane() % 4;
  const ModelScale scale = p.packed.scales[model];
  const T factor = FloatTraits<T>::power(scale.k);
  const int shift = kSlices == kMaxSlices ? 0 : scale.shift;
  const int64_t to_stride = is_right ? p.weight.stride : p.weight.row_stride,
                from_stride = is_right ? p.weight.row_stride : p.weight.stride;
  // A lane's units of the word: rows 2 m + r. Those that there are not have no couplings.
  const int first_unit = word * kWarpSize + 2 * g - to.offset;
  const auto unit_of = [&](int row) { return first_unit + 16 * (row / 2) + row % 2; };
  const T* const couplings = parameter_row<T>(p.weight, p.batch, model, 0);
  LeftFragment* const blocks =
      p.packed.slices + (model * p.packed.num_blocks + to.blocks_at + int64_t{word} * from.words) * block_fragments(kSlices);
  uint32_t above[4] = {}, below[4] = {};
  for (int block = warp(); block < from.words; block += kSliceThreads / kWarpSize) {
    // The other side's units, columns 4 t + i + 16 half, and where their couplings are in a row.
    bool are[2][4];
    int64_t places[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int unit = block * kWarpSize + 8 * i + 2 * t + half - from.offset;
        are[half][i] = unsigned(unit) < unsigned(from.n);
        places[half][i] = are[half][i] ? unit * from_stride : 0;
      }
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
      LeftFragment fragment[kSlices] = {};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = 2 * m + r;
        const bool is_unit = unsigned(unit_of(row)) < unsigned(to.n);
        const T* const of_unit = couplings + (is_unit ? unit_of(row) : 0) * to_stride;
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const T coupling = global_load(of_unit + places[half][i]);
            const int32_t exact = rounded(is_unit && are[half][i] ? coupling : T(0), factor);
            int32_t rest = shifted(exact, shift);
            const uint32_t residual = uint32_t(exact) - (uint32_t(rest) << shift);
            if (kSlices < kMaxSlices) {
              above[row] += int32_t(residual) > 0 ? residual : 0;
              below[row] += int32_t(residual) > 0 ? 0 : 0 - residual;
            }
#pragma unroll
            for (int s = 0; s < kSlices; ++s) fragment[s].of[r + 2 * half] |= uint32_t(take_digit(rest) & 0xff) << (8 * i);
          }
      }
#pragma unroll
      for (int s = 0; s < kSlices; ++s)
        blocks[((int64_t{block} * kSlices + s) * kFragments + m) * kWarpSize + lane()] = fragment[s];
    }
  }
#pragma unroll
  for (int row = 0; row < 4; ++row) {
    const int unit = 16 * (row / 2) + 2 * g + row % 2;
    atomicAdd(&lost[2 * unit], above[row]);
    atomicAdd(&lost[2 * unit + 1], below[row]);
  }
  __syncthreads();  // the sums are whole
  if (threadIdx.x >= kWarpSize) return;
  // The sums are below 2^31, and float32 is off by 2^-24 of them.
  const float most = float(lost[2 * lane()]) * scale.scale, least = -float(lost[2 * lane() + 1]) * scale.scale;
  to.field_errors[(model * to.words + word) * kWarpSize + lane()] = {(most + least) / 2, (most - least) / 2 * (1 + 0x1p-20f)};
}

#endif

}  // namespace gibbs
