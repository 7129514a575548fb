// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

// What the CPU kernels of all models share. Plain structs, as in cpu/bipartite.h.
namespace gibbs {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t state_words(int64_t n) { return (n + 31) / 32; }

enum class CouplingStatus { kOk, kNonFinite, kTooLarge };

enum Relaxation { kPwl = 0, kConcrete = 1, kStraightThrough = 2, kMeanField = 3, kNumRelaxations = 4 };

struct StopCheck {
  bool (*stop)(void* context);  // true: leave as soon as possible, the results will not be used
  void* context;
};

}  // namespace gibbs
