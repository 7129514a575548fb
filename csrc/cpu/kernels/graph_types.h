// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "core/graph_view.h"
#include "cpu/kernels/types.h"

// The CPU kernels of coloured graphs: chains lie side by side in the vector lanes. Plain structs, as in cpu/kernels/bipartite_types.h.
namespace gibbs {

// ---- blocks of 16 chains, each with couplings of its own or all with the same ones -----------------------------------------------

constexpr int kChainBlock = 16;

// Random words of one sweep: high bytes of 16 units a vector, [random_groups(num_nodes) * 4, chains].
inline int64_t random_groups(int64_t num_nodes) { return (num_nodes + 127) / 128 * 8; }

// What the six highest bits of a random word tell of a unit: with a logit less than `zero` it draws 0, with one of at least `one` it draws 1
// (csrc/core/threshold.h). In between, for one word in 64, only the whole word and the whole threshold tell.
struct LogitBounds {
  float zero[64], one[64];
};

struct GraphSweeps {
  GraphView graph;
  int64_t num_sweeps;
  uint64_t seed, first_sweep;
  const float* beta;        // num_sweeps values beta_stride apart; annealed: num_sweeps + 1 values, the first the starting one
  int64_t beta_stride;      // 0 or 1
  const int32_t* position;  // [num_nodes] of each node in the order of a sweep, annealed runs only
  const LogitBounds* bounds;
  StopCheck check;
};

// A unit some of whose chains are not decided yet, and from what they will be.
struct OpenUnit {
  union {
    uint32_t thresholds[kChainBlock];
    float logits[kChainBlock];
  };
  int32_t node;
  uint32_t lanes;  // bits: which chains
};

struct BinaryBlock {
  uint64_t number[kChainBlock];  // the chains' numbers in the random counter
  float scale[kChainBlock];      // 2^-k
  bool shared_coupling, shared_bias;
  const int32_t* coupling;  // rounded: shared [2 num_edges] by half-edge, else [num_edges, kChainBlock]
  const float* bias;        // shared [num_nodes], else [num_nodes, kChainBlock]
  const float* base_bias;   // [num_nodes, kChainBlock], annealed runs only, which share no bias
  int32_t* state;           // [num_nodes, kChainBlock], 0 or -1, mutated
  const int32_t* clamp;     // [num_nodes, kChainBlock], 0 or -1; null: none
  double* log_weight;       // [kChainBlock], added to; null: not annealed
  uint32_t* words;          // scratch: [random_groups * 4, kChainBlock]; Metropolis sweeps: [whole_words(num_nodes)]
  OpenUnit* open;           // scratch: [num_nodes + 1]; Metropolis sweeps need none
};

// Whole words of every unit, then their high bytes.
inline int64_t whole_words(int64_t num_nodes) { return (round_up(num_nodes, 32) + random_groups(num_nodes) * 4) * kChainBlock; }

// ---- single chains: 16 units of one colour side by side ---------------------------------------------------------------------------

// Where there are too few chains to fill the lanes. Positions are those of a sweep, each colour's filled up to a multiple of 16.
struct ChainModel {
  GraphView graph;
  int64_t degree;                // largest
  const int32_t* color_offsets;  // [num_colors + 1] positions
  const int32_t* nodes;          // by position; num_nodes + 1 where there is none
  const int32_t* neighbors;      // [position / 16, degree, 16]; num_nodes where there is none
  const int32_t* coupling;       // like neighbors; 0 where there is none
  const float* bias;             // by position
  float scale;
};
struct SingleChain {
  uint64_t number;
  int32_t* state;        // [num_nodes + 2], 0 or -1, then 0, then anything; mutated
  const int32_t* clamp;  // [num_nodes + 2], 0 or -1; null: none
  uint8_t* bytes;        // scratch: [random_bytes_capacity(num_nodes) + 16]
};

template <class T>
struct RelaxedGraphSweep {
  GraphView graph;
  uint64_t seed, sweep;
  T beta;
  Relaxation relaxation;
  T sharpness;
  bool slope_gradient;
};

template <class T>
struct RelaxedBlock {
  uint64_t number[kChainBlock];
  bool shared_coupling;
  const T* coupling;  // shared [2 num_edges] by half-edge, else [num_edges, kChainBlock]
  const T* bias;      // [num_nodes, kChainBlock]
  T* value;           // [num_nodes, kChainBlock], mutated
  T* mean;            // [num_nodes, kChainBlock]
  T* fields;          // [num_nodes, kChainBlock]
  uint32_t* words;    // scratch: [whole_words(num_nodes)]
};

template <class T>
struct RelaxedBackwardBlock {
  uint64_t number[kChainBlock];
  bool shared_coupling;
  const T* coupling;
  const T* fields;     // [num_nodes, kChainBlock] of the sweep that is recomputed
  const T* start;      // [num_nodes, kChainBlock] the value that the sweeps started from
  T* grad_value;       // [num_nodes, kChainBlock], in: of the final value; out: of the starting one
  const T* grad_mean;  // [num_nodes, kChainBlock] of the last sweep's means
  T* grad_bias;        // [num_nodes, kChainBlock]
  T* grad_coupling;    // [num_edges, kChainBlock], added to
  T *value, *slope;    // [num_nodes, kChainBlock] kept from one sweep to the next
  uint32_t* words;     // scratch: [whole_words(num_nodes)]
};

// ---- blocks of 64 chains that share couplings and biases: probabilities by table -------------------------------------------------

// A unit's probability depends on the at most 2^degree states of its neighbours, so the high bytes of its thresholds are tabulated
// once for each beta and 64 chains look theirs up at a time.
constexpr int kTableChains = 64;
constexpr int kMaxTableDegree = 8, kMinTableDegree = 4;

struct TableModel {
  GraphView graph;
  int degree;  // 4 .. 8, at least the graph's
  const int32_t*
      neighbors;  // [num_nodes, degree] of the node at each position; num_nodes (a unit that is always 0) where there is none
  const int32_t* coupling;  // [num_nodes, degree] rounded, 0 where there is none
  const float* bias;        // [num_nodes] by node
  float scale;
  uint64_t seed;
};

struct Tie {
  uint64_t bits;  // of chains
  int64_t position;
};

// One block. Bit p of a word is the chain that chain_of_table_bit names.
struct TableBlock {
  uint64_t number[kTableChains];  // by chain
  uint64_t* state;                // [num_nodes + 1] bits, the last always 0; mutated
  const uint64_t* clamp;          // [num_nodes] bits; null: none
  uint8_t* bytes;                 // scratch: [num_nodes, 64] random high bytes
  uint8_t* state_bytes;           // scratch: [num_nodes + 1, 64], AVX2 only
  Tie* ties;                      // scratch: [num_nodes + 1]
};
inline int64_t table_random_bytes(int64_t num_nodes) { return round_up(num_nodes, 128) * kTableChains; }

}  // namespace gibbs
