// SPDX-License-Identifier: Apache-2.0
#pragma once

// Couplings of bipartite models to fixed point and to slices (bipartite_slices.h). twin: gibbs_ext/reference.py::round_couplings
#include "cuda/bipartite_slices.h"
#include "cuda/rounding.cuh"

namespace gibbs {

constexpr int kScaleThreads = 512;
constexpr int kSliceThreads = 128;

struct BipartiteScaleParams {
  BipartiteParams call;
  ModelScale* scales;
  uint32_t* scratch;  // null: in shared memory
  double* out;
};

struct BipartiteSliceParams {
  ParameterView weight;
  BatchView batch;
  bool is_double;
  BipartitePacked packed;
};

GIBBS_HOST_DEVICE bool has_columns_in_one_piece(const BipartiteParams& p) { return p.weight.stride > p.weight.row_stride; }
GIBBS_HOST_DEVICE int64_t scale_numbers(const BipartiteParams& p) {
  return scale_scratch(has_columns_in_one_piece(p) ? p.n1 : p.n2);
}

#if defined(GIBBS_DEVICE)

// A CTA owns a model, whose weight it reads once or twice, along rows or columns, whichever are in one piece.
template <class T, class Scratch>
GIBBS_DEVICE void find_scale(const BipartiteScaleParams& params, const Scratch& scratch) {
  const BipartiteParams& p = params.call;
  const bool swaps = has_columns_in_one_piece(p);
  const int64_t rows = swaps ? p.n2 : p.n1, columns = swaps ? p.n1 : p.n2;
  const int64_t row_stride = swaps ? p.weight.stride : p.weight.row_stride, stride = swaps ? p.weight.row_stride : p.weight.stride;
  const T* weight = parameter_row<T>(p.weight, p.sweep.batch, blockIdx.x, 0);
  const auto coupling = [&](int64_t i, int64_t j) { return global_load(weight + i * row_stride + j * stride); };
  const CouplingScale scale = matrix_scale<T>(p.sweep, rows, columns, coupling, scratch);
  if (threadIdx.x != 0) return;
  if (params.out) params.out[linear_number(p.sweep.batch, blockIdx.x, 0)] = FloatTraits<double>::power(-scale.k);
  if (params.scales) params.scales[blockIdx.x] = {scale.k, scale.shift(), FloatTraits<float>::power(-scale.k), 0};
}

template <class T>
__global__ void __launch_bounds__(kScaleThreads, 1) bipartite_scale_kernel(const __grid_constant__ BipartiteScaleParams params) {
  GIBBS_DYNAMIC_SHARED(shared);
  SharedMemory memory(shared);
  const int64_t numbers = scale_numbers(params.call);
  if (params.scratch)
    find_scale<T>(params, params.scratch + blockIdx.x * numbers);
  else
    find_scale<T>(params, memory.take<uint32_t>(numbers));
}

// A CTA owns a word of a side of a model; its warps share the blocks of it.
// Shared memory: what slices have lost of the fields of 32 units, above and below 0.
// Traffic: a coupling is read twice by all CTAs together, and written as 2 or 4 bytes twice.
// Computes: slices of w_ij, and for each unit the middle and the half of the interval of sum_j (w_ij - its slices) z_j over all z.
__global__ void __launch_bounds__(kSliceThreads, 1) bipartite_slice_kernel(const __grid_constant__ BipartiteSliceParams p) {
  GIBBS_DYNAMIC_SHARED(shared);
  SharedMemory memory(shared);
  const Shared<uint32_t> lost = memory.take<uint32_t>(2 * kWarpSize);
  if (threadIdx.x < 2 * kWarpSize) lost[threadIdx.x] = 0;
  __syncthreads();  // the sums are clear
  const int left_words = p.packed.sides[0].words, words = left_words + p.packed.sides[1].words;
  const int64_t model = blockIdx.x / words;
  const int at = int(blockIdx.x % words);
  const bool is_right = at >= left_words;
  const BipartiteSide &to = p.packed.sides[is_right], &from = p.packed.sides[!is_right];
  const int word = is_right ? at - left_words : at;
  const int lane = int(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
  const ModelScale scale = p.packed.scales[model];
  const int num_slices = p.packed.num_slices, shift = num_slices == kMaxSlices ? 0 : scale.shift;
  const void* weight = parameter_row(p.weight, p.batch, p.is_double, model, 0);
  LeftFragment* const blocks =
      p.packed.slices + (model * p.packed.num_blocks + to.blocks_at + int64_t{word} * from.words) * block_fragments(num_slices);
  uint32_t above[4] = {}, below[4] = {};
  for (int block = int(threadIdx.x) / kWarpSize; block < from.words; block += kSliceThreads / kWarpSize) {
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
      LeftFragment fragment[kMaxSlices] = {};
#pragma unroll
      for (int element = 0; element < 16; ++element) {
        const int i = element % 4, r = element / 4 % 2, half = element / 8, row = 2 * m + r;
        const int64_t of_to = int64_t{word} * kWarpSize + 16 * m + 2 * g + r - to.offset,
                      of_from = int64_t{block} * kWarpSize + 8 * i + 2 * t + half - from.offset;
        if (of_to < 0 || of_to >= to.n || of_from < 0 || of_from >= from.n) continue;
        const int32_t exact =
            coupling_at(p.weight, weight, p.is_double, scale.k, is_right ? of_from : of_to, is_right ? of_to : of_from);
        int32_t rest = shifted(exact, shift);
        const uint32_t residual = uint32_t(exact) - (uint32_t(rest) << shift);
        if (int32_t(residual) > 0)
          above[row] += residual;
        else
          below[row] += 0 - residual;
#pragma unroll
        for (int s = 0; s < kMaxSlices; ++s) fragment[s].of[r + 2 * half] |= uint32_t(take_digit(rest) & 0xff) << (8 * i);
      }
#pragma unroll
      for (int s = 0; s < kMaxSlices; ++s)
        if (s < num_slices) blocks[((int64_t{block} * num_slices + s) * kFragments + m) * kWarpSize + lane] = fragment[s];
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
  const float most = float(lost[2 * lane]) * scale.scale, least = -float(lost[2 * lane + 1]) * scale.scale;
  to.field_errors[(model * to.words + word) * kWarpSize + lane] = {(most + least) / 2, (most - least) / 2 * (1 + 0x1p-20f)};
}

#endif

}  // namespace gibbs
