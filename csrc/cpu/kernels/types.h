// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "core/outcome.h"

// Arguments that the CPU kernels of all models share, as plain as those in cpu/kernels/bipartite_types.h.
namespace gibbs {

enum class CouplingStatus { kOk, kNonFinite, kTooLarge };

struct StopCheck {
  bool (*stop)(void* context);  // true: leave as soon as possible, the results will not be used
  void* context;
};

// States are counted so many words of bits at a time, and so many right units at a time.
constexpr int kCountWords = 8, kRightsAtOnce = 8;
struct UnitPair {
  int32_t first, second;
};

constexpr int64_t kMostCoarseUnits = 4096;  // of a unit's neighbours: roundings of more couplings leave too little of 16 bits

// Fields of 16 bits: a unit's bias and the couplings to its neighbours that are 1. They are so coarse that none leaves 16 bits, and
// their bounded error leaves open few units, which draw more bits and perhaps take exact sums; so the bits are the same.
struct CoarseFields {
  float unit;   // of a field
  float range;  // the largest |field|, but for biases that saturate a unit
  float error;  // the largest of a unit's sum of couplings, in units
};

constexpr int kSegments = 64;
// How fields become probabilities, at one beta. A segment is 2^shift field units long.
struct CoarseSigmoid {
  int shift;
  int slope_shift;  // slopes are multiples of 2^slope_shift: with AVX2 at most 255 times that, so that a byte holds them
  alignas(64) uint16_t base[kSegments];
  alignas(64) int16_t slope[kSegments];
  // Bounds on the distance of a probability from the true threshold, in units of 2^-16.
  alignas(64) uint16_t slack[kSegments];
  int largest_slack;
};

}  // namespace gibbs
