// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "core/philox.h"
#include "core/threshold.h"

// Swaps of parallel tempering (csrc/README.md, 2.8). A column has a replica at each beta of the ladder: replica r of column c is the
// chain number c B + r, B the number of betas. twin: gibbs_ext/reference.py::_swap
namespace gibbs {

constexpr uint32_t kSwapStream = 1, kClusterStream = 2;

// The first of the pairs (b, b + 1), every other b, that may swap after a round whose first sweep has this number.
GIBBS_HOST_DEVICE int64_t first_pair(int64_t sweep, int64_t sweeps_per_swap) { return sweep / sweeps_per_swap & 1; }

// Whether the replicas at two neighbouring betas swap after this sweep: with probability min(1, exp((beta - next) (energy - next energy))).
// A product of differences leaves a compiler nothing to fuse, so that every backend rounds alike.
GIBBS_HOST_DEVICE bool replicas_swap(double beta, double next_beta, double energy, double next_energy, uint64_t seed,
                                     uint64_t column, uint64_t sweep, uint32_t pair) {
  const float x = float((beta - next_beta) * (energy - next_energy));
  return x >= 0 || random_word(random_stream(seed, column, sweep, kSwapStream), pair) < acceptance(x);
}

// ---- cluster moves (csrc/README.md, 2.9) ----------------------------------------------------------------------------------------
// twin: gibbs_ext/reference.py::_move_clusters

// Which states of a batch [B, C, M], by their linear numbers, are pairs: the chains 2 c and 2 c + 1 at one beta.
struct Pairing {
  int64_t num_betas, num_chains, num_models;  // B, C, M; num_betas is 0 where there are no cluster moves
};

// The second state of the pair of which this one is the first; -1 if it is none.
GIBBS_HOST_DEVICE int64_t partner(const Pairing& p, int64_t linear) {
  const int64_t chain = linear / p.num_models % p.num_chains;
  return chain % 2 == 0 && chain + 1 < p.num_chains ? linear + p.num_models : -1;
}

GIBBS_HOST_DEVICE int64_t beta_of(const Pairing& p, int64_t linear) { return linear / (p.num_chains * p.num_models); }

// At which of `count` units that differ, in the order of their numbers, the cluster of a pair begins. first_chain: the number of the replica
// in the pair's first state. The law does not depend on how evenly this draws, because a move leaves the units that differ as they are.
GIBBS_HOST_DEVICE int64_t cluster_start(const Pairing& p, int64_t linear, int64_t count, uint64_t seed, uint64_t first_chain,
                                        uint64_t sweep) {
  const RandomStream stream = random_stream(seed, first_chain / uint64_t(p.num_betas), sweep, kClusterStream);
  return int64_t(uint64_t{random_word(stream, uint32_t(beta_of(p, linear)))} * uint64_t(count) >> 32);
}

}  // namespace gibbs
