// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "core/macros.h"

// What every backend says and is told, whatever the model.
namespace gibbs {

GIBBS_HOST_DEVICE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
GIBBS_HOST_DEVICE int64_t state_words(int64_t n) { return (n + 31) / 32; }

enum Relaxation { kPwl = 0, kConcrete = 1, kStraightThrough = 2, kMeanField = 3, kNumRelaxations = 4 };

// How a call ended. The texts: csrc/ops/arguments.h.
enum class Outcome : uint32_t {
  kOk,
  kInterrupted,
  kNonFiniteWeight,
  kTooLargeWeight,
  kNonFiniteLeftBias,
  kNonFiniteRightBias,
  kNonFiniteBaseLeftBias,
  kNonFiniteBaseRightBias,
  kNonFiniteCoupling,
  kTooLargeCoupling,
  kNonFiniteBias,
  kNonFiniteBaseBias,
  // What only a device comes to see: on the CPU these are checked before the kernels.
  kLeftNotBits,
  kRightNotBits,
  kStateNotBits,
  kNonFiniteLeft,
  kNonFiniteState,
  kChainOutOfRange,
  kNonFiniteBeta,
  kBadLayout,
};

}  // namespace gibbs
