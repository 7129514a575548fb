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

}  // namespace gibbs
