// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "core/philox.h"
#include "core/threshold.h"

// Swaps of parallel tempering (csrc/README.md, 2.8). A column has a replica at each beta of the ladder: replica r of column c is the
// chain number c B + r, B the number of betas. twin: gibbs_ext/reference.py::_swap
namespace gibbs {

constexpr uint32_t kSwapStream = 1;

// The first of the pairs (b, b + 1), every other b, that may swap after a round whose first sweep has this number.
GIBBS_HOST_DEVICE int64_t first_pair(int64_t sweep, int64_t sweeps_per_swap) { return sweep / sweeps_per_swap & 1; }

// Whether the replicas at two neighbouring betas swap after this sweep: with probability min(1, exp((beta - next) (energy - next energy))).
// A product of differences leaves a compiler nothing to fuse, so that every backend rounds alike.
GIBBS_HOST_DEVICE bool replicas_swap(double beta, double next_beta, double energy, double next_energy, uint64_t seed,
                                     uint64_t column, uint64_t sweep, uint32_t pair) {
  const float x = float((beta - next_beta) * (energy - next_energy));
  return x >= 0 || random_word(random_stream(seed, column, sweep, kSwapStream), pair) < acceptance(x);
}

}  // namespace gibbs
