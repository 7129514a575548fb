// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "core/macros.h"

// Outcomes and arguments that all backends and models share.
namespace gibbs {

GIBBS_HOST_DEVICE int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
GIBBS_HOST_DEVICE int64_t round_up(int64_t n, int64_t multiple) { return divide_up(n, multiple) * multiple; }
GIBBS_HOST_DEVICE int64_t state_words(int64_t n) { return divide_up(n, 32); }

enum Relaxation { kPwl = 0, kConcrete = 1, kStraightThrough = 2, kMeanField = 3, kNumRelaxations = 4 };

// How a call ended. csrc/ops/faults.h has the texts.
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
  // Only a device's kernels find these: on the CPU the ops check them before the kernels.
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
