// SPDX-License-Identifier: Apache-2.0
#pragma once

// What binary sweeps of bipartite models work on: packed bits and biases, and weights as slices of signed bytes in the order in which tensor
// cores take them.
#include "cuda/bipartite.h"
#include "cuda/bounds.cuh"
#include "cuda/mma.cuh"
#include "cuda/stages.h"

namespace gibbs {

constexpr int kMaxSlices = 4;  // all bits of a coupling; log-weights need them

// A word has 32 units of a side. A block multiplies the bits of a word by couplings with another word's units: for each slice two fragments of
// 16 units. Rows and columns of fragments are units in an order that lets a lane (4 g + t) expand bits of the other side's word by shifts and masks
// alone, and get fields of two neighbouring units:
//   row g + 8 r of fragment m is unit 16 m + 2 g + r of the word that is updated;
//   column 4 t + i + 16 r     is unit 8 i + 2 t + r of the other word.
constexpr int kFragments = 2;
GIBBS_HOST_DEVICE int64_t block_fragments(int slices) { return int64_t{slices} * kFragments * kWarpSize; }

// A side of a model. Its units lie at positions offset .. offset + n - 1 of its words. The number of position 0 is a multiple of 4, so that four
// random bytes of four neighbouring positions are a word that Philox returns.
struct BipartiteSide {
  int32_t n, offset, words;
  uint32_t first_number;
  int64_t blocks_at;         // its blocks among those of a model: [word of this side, word of the other]
  uint32_t* bits;            // [row, words]
  uint32_t* clamps;          // [row, words], or null
  float *bias, *base_bias;   // [model or row, 32 words]; base_bias: annealed
  FieldError* field_errors;  // [model, 32 words]
};

struct BipartitePacked {
  ModelScale* scales;    // [model]; their errors are 0, because units have their own
  LeftFragment* slices;  // [model, block, slice, fragment, lane]
  int64_t num_blocks;    // of a model
  int32_t num_slices;    // 2, or 4 and exact (annealed)
  bool bias_per_chain;
  uint64_t* numbers;       // [row]
  BipartiteSide sides[2];  // left, right
  uint32_t* scale_parts;   // of CTAs that share a model
  BipartitePacked(const BipartiteParams&, const ScalePlan&, Workspace&);
};

// Finds scales, makes slices and packs bits, biases and numbers.
void launch_bipartite_pack(const BipartiteParams&, const ScalePlan&, const BipartitePacked&, Stream);
void launch_bipartite_unpack(const BipartiteParams&, const BipartitePacked&, Stream);

ScalePlan plan_bipartite_scale(const BipartiteParams&, const DeviceLimits&);

}  // namespace gibbs
