// SPDX-License-Identifier: Apache-2.0
#pragma once

// What calls that read states do after each read: they count units and pairs, and keep the best state of each chain. The first batch
// dimension has the chains of a model, so that the state of `chain` of a model has the linear number chain num_models + model.
#include "cuda/tempering.h"

namespace gibbs {

constexpr int kMomentThreads = 128;

struct MomentParams {
  static constexpr int kMaxParts = 2;
  struct Part {
    const uint8_t* bits;  // [linear number, n] bytes of 0 and 1
    int64_t n;
    uint32_t* words;  // scratch: [words of 32 chains, models, n]
    int64_t* counts;  // [models, n], added to
    uint8_t* best;    // [linear number, n], mutated
  };
  int64_t num_models, num_chains, num_words;  // chains of each model, and their words
  Part parts[kMaxParts];
  int num_parts;
  int64_t* pair_counts;    // bipartite: [models, n1, n2]; graphs: [models, E]; added to
  const double* energies;  // [linear number]
  double* best_energies;   // [linear number], mutated
};

// Counts units, whose words they leave for the pairs.
void launch_unit_counts(const MomentParams&, Stream);
void launch_bipartite_pair_counts(const MomentParams&, Stream);

struct GraphPairParams {
  GraphParams model;
  MomentParams moments;
};
void launch_graph_pair_counts(const GraphPairParams&, Stream);

void launch_best_states(const MomentParams&, Stream);

}  // namespace gibbs
