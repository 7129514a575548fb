// SPDX-License-Identifier: Apache-2.0
#pragma once

// What parallel tempering does between two rounds of sweeps: energies of all states, then swaps of replicas. The first batch dimension is the
// ladder, so that state `at` of B C states is that of column at % C at beta at / C.
#include "core/tempering.h"
#include "cuda/bipartite.h"
#include "cuda/graph.h"

namespace gibbs {

constexpr int kEnergyWarps = 4, kClusterThreads = 128, kSwapThreads = 128;

struct TemperingParams {
  static constexpr int kMaxParts = 2;
  struct Part {
    uint8_t* bits;  // [linear number, n] bytes of 0 and 1, mutated
    int64_t n;
  };
  int64_t num_betas, columns, sweeps_per_swap;
  Part parts[kMaxParts];
  int num_parts;
  const double* scales;  // 2^-k of each model, at the linear number of its first state
  int64_t* chains;       // [linear number] numbers of the replicas, mutated
  double* energies;      // out: [linear number]
  int64_t* chains_at;    // out: [linear number], after the swaps
};

// The parts are left and right.
struct BipartiteEnergyParams {
  BipartiteParams model;
  TemperingParams tempering;
};
void launch_bipartite_energies(const BipartiteEnergyParams&, Stream);

// The only part is all nodes.
struct GraphEnergyParams {
  GraphParams model;
  TemperingParams tempering;
  int32_t* position;  // scratch: [num_nodes] of each node in the order of updates
};
void launch_graph_positions(const GraphEnergyParams&, Stream);
void launch_graph_energies(const GraphEnergyParams&, Stream);

struct GraphClusterParams {
  GraphParams model;  // of the round
  TemperingParams tempering;
  Pairing pairing;
  uint8_t* marks;  // scratch: [linear number, num_nodes] what a pair knows of each node, in the rows of the pairs' first states
};
void launch_graph_clusters(const GraphClusterParams&, Stream);

struct SwapParams {
  SweepView sweep;  // of the round
  TemperingParams tempering;
};
void launch_swaps(const SwapParams&, Stream);

}  // namespace gibbs
