// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "core/graph_view.h"
#include "cpu/kernels/types.h"

// Arguments of the CPU kernels of coloured graphs, as plain as those in cpu/kernels/bipartite_types.h.
namespace gibbs {

// ---- groups of 16 chains side by side in the lanes, with couplings of their own or shared ---------------------------------------

constexpr int kGroup = 16;

// Number of random counters that supply the high bytes of one sweep, 16 units each.
inline int64_t high_byte_counters(int64_t num_nodes) { return (num_nodes + 127) / 128 * 8; }

// Bounds for each value of a random word's six highest bits: a unit whose logit is less than `zero` draws 0, and one whose logit is
// at least `one` draws 1 (core/threshold.h). In between, for one word in 64, the whole word and the whole threshold decide.
struct LogitBounds {
  float zero[64], one[64];
};

struct GraphSweeps {
  GraphView graph;
  int64_t num_sweeps;
  uint64_t seed, first_sweep;
  const float* beta;          // num_sweeps values beta_stride apart; annealed: num_sweeps + 1 values, the first the starting one
  int64_t beta_stride;        // 0 or 1
  const int32_t* position;    // [num_nodes] of each node in the order of a sweep; annealed runs only
  const LogitBounds* bounds;  // groups of 16 only
  StopCheck check;
};

// A unit some of whose chains are not decided yet, and the thresholds or logits that will decide them.
struct OpenUnit {
  union {
    uint32_t thresholds[kGroup];
    float logits[kGroup];
  };
  int32_t node;
  uint32_t lanes;  // bits of the chains that are open
};

struct SumsGroup {
  uint64_t number[kGroup];  // the chains' numbers in the random counter
  float scale[kGroup];      // 2^-k
  bool shared_coupling, shared_bias;
  const int32_t* coupling;  // rounded: shared [2 num_edges] by half-edge, else [num_edges, kGroup]
  const float* bias;        // shared [num_nodes], else [num_nodes, kGroup]
  const float* base_bias;   // [num_nodes, kGroup], annealed runs only, which share no bias
  int32_t* state;           // [num_nodes, kGroup], 0 or -1, mutated
  const int32_t* clamp;     // [num_nodes, kGroup], 0 or -1; null: none
  double* log_weight;       // [kGroup], added to; null: not annealed
  uint32_t* words;          // scratch: [high_byte_counters * 4, kGroup]; Metropolis sweeps: [whole_words(num_nodes)]
  OpenUnit* open;           // scratch: [num_nodes + 1]; Metropolis sweeps need none
};

// Size of the whole words of every unit, followed by their high bytes.
inline int64_t whole_words(int64_t num_nodes) { return (round_up(num_nodes, 32) + high_byte_counters(num_nodes) * 4) * kGroup; }

// ---- single chains: 16 units of one colour side by side -------------------------------------------------------------------------

constexpr int kUnitsRow = 16;

// A model as single chains read it. Positions are those of a sweep; each colour is filled up to a multiple of 16.
struct UnitsModel {
  GraphView graph;
  int64_t degree;                // largest
  const int32_t* color_offsets;  // [num_colors + 1] positions
  const int32_t* nodes;          // by position; num_nodes + 1 at positions without a node
  const int32_t* neighbors;      // [position / 16, degree, 16]; num_nodes where a neighbour is missing
  const int32_t* coupling;       // like neighbors; 0 where a neighbour is missing
  const float* bias;             // by position
  float scale;
};
struct SingleChain {
  uint64_t number;
  int32_t* state;        // [num_nodes + 2], 0 or -1, then 0, then anything; mutated
  const int32_t* clamp;  // [num_nodes + 2], 0 or -1; null: none
  uint8_t* bytes;        // scratch: [random_bytes_capacity(num_nodes) + 16]
};

// ---- groups of 64 chains whose fields have 16 bits: AVX-512 ---------------------------------------------------------------------

constexpr int kCoarseParts = 4, kCoarseGroup = kCoarseParts * kGroup;

// Bits of two words, and values in rows of 64, stand for chains so that a vector of lanes of 16 bits has those whose random high
// bytes are the even or the odd ones of a row: bit p for the chain chain_of_table_bit(byte_of_coarse_bit(p)).
inline int byte_of_coarse_bit(int bit) { return bit % 32 * 2 + bit / 32; }

// Groups of 16 as in SumsGroup, side by side.
struct CoarseGroup {
  uint64_t number[kCoarseGroup];  // by chain
  float scale[kCoarseGroup];      // 2^-k, by chain
  bool shared_coupling, shared_bias;
  const int32_t* exact_coupling[kCoarseParts];  // shared [2 num_edges] by half-edge, else [num_edges, kGroup]
  const float* exact_bias[kCoarseParts];        // shared [num_nodes], else [num_nodes, kGroup]
  uint32_t* state;                              // [num_nodes, 2] words of bits, mutated
  const uint32_t* fixed;                        // [num_nodes, 2], of the units that are not drawn
  uint8_t* bytes;                               // scratch: [table_random_bytes(num_nodes)]
  // Couplings and biases in units of a field, which round_coarse_graph writes.
  int16_t* coupling;  // shared [2 num_edges], else [num_edges, 64]
  int16_t* bias;      // shared [num_nodes], else [num_nodes, 64]
  float* offset;      // [num_nodes] what the sums at each position are too large by; shared couplings only, else 0
  CoarseFields fields;
};

// ---- single chains whose fields have 16 bits: AVX-512 ---------------------------------------------------------------------------

// 32 units of a colour fill a vector. Positions are those of a sweep; each colour is filled up to a whole vector.
constexpr int kUnitsVector = 32, kMostUnitsVectors = 256;
constexpr int kUnitsChains = 4;   // chains in step, so that one need not wait for what another has just stored
constexpr int kByteWindow = 256;  // random bytes among which a vector finds its own
inline uint16_t code_of_neighbor(int64_t position) { return uint16_t(position / 16 | (15 - position % 16) << 12); }

struct CoarseUnits {
  GraphView graph;
  const int32_t* color_offsets;     // [num_colors + 1] vectors
  const int32_t* nodes;             // by position; num_nodes at positions without a node
  const int32_t* position_of_node;  // [num_nodes]
  const int32_t* row_of_position;   // by position: the node's row in the graph
  const int32_t* rows;              // [vectors + 1] each vector's rows of neighbours, as many as the most that a unit has
  const uint16_t* neighbors;        // [rows, 32] code_of_neighbor()
  const int16_t* coupling;          // [rows, 32] in units of a field; 0 where a neighbour is missing
  const int16_t* bias;              // by position
  const int32_t* first_byte;        // [vectors] where the window of a vector's random bytes begins; -1: they lie farther apart
  const uint16_t* byte_places;    // by position: the word in the window that has the byte, plus 2^15 if it is the word's high byte
  const int32_t* exact_coupling;  // [2 num_edges] by half-edge
  const float* exact_bias;        // by node
  float scale;                    // 2^-k
  CoarseFields fields;
};
struct CoarseChain {
  uint64_t number;
  uint32_t* state;  // [kMostUnitsVectors] bits by position, mutated
  uint32_t* fixed;  // [vectors] bits of the positions that are not drawn
  uint8_t* bytes;   // scratch: [random_bytes_capacity(num_nodes) + kByteWindow]
};

// ---- relaxed sweeps of groups of 16 ---------------------------------------------------------------------------------------------

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
struct RelaxedGroup {
  uint64_t number[kGroup];
  bool shared_coupling;
  const T* coupling;  // shared [2 num_edges] by half-edge, else [num_edges, kGroup]
  const T* bias;      // [num_nodes, kGroup]
  T* value;           // [num_nodes, kGroup], mutated
  T* mean;            // [num_nodes, kGroup]
  T* fields;          // [num_nodes, kGroup]
  uint32_t* words;    // scratch: [whole_words(num_nodes)]
};

template <class T>
struct RelaxedBackwardGroup {
  uint64_t number[kGroup];
  bool shared_coupling;
  const T* coupling;
  const T* fields;     // [num_nodes, kGroup] of the sweep that is recomputed
  const T* start;      // [num_nodes, kGroup] value before the first sweep
  T* grad_value;       // [num_nodes, kGroup], in: gradient of the final value; out: of the value before the first sweep
  const T* grad_mean;  // [num_nodes, kGroup] of the last sweep's means
  T* grad_bias;        // [num_nodes, kGroup]
  T* grad_coupling;    // [num_edges, kGroup], added to
  T *value, *slope;    // [num_nodes, kGroup] kept from one sweep to the next
  uint32_t* words;     // scratch: [whole_words(num_nodes)]
};

// ---- energies of 64 chains that share couplings ---------------------------------------------------------------------------------

constexpr int kEnergyGroup = 64;

// A neighbour that is updated before.
struct EarlierNeighbor {
  int32_t node, half_edge;
};
struct EnergyGroup {
  const uint64_t* state;  // [num_nodes] bits of the chains
  const EarlierNeighbor* earlier;
  const int32_t* earlier_offsets;  // [num_nodes + 1] where those of each position begin
  const int32_t* coupling;         // rounded, by half-edge
  float scale;
  bool shared_bias;
  const float* bias[kEnergyGroup / kGroup];  // [num_nodes, kGroup]; shared: [num_nodes], the first one only
};

// ---- groups of 64 chains that share couplings and biases: probabilities by table ------------------------------------------------

// A unit's neighbours have at most 2^degree joint states. The high byte of the unit's threshold in each is tabulated once for each
// beta, and 64 chains look theirs up at a time.
constexpr int kTableGroup = 64;
constexpr int kMaxTableDegree = 8, kMinTableDegree = 4;

struct TableModel {
  GraphView graph;
  int degree;  // 4 .. 8, at least the graph's
  // [num_nodes, degree] of the node at each position; num_nodes, a unit that is always 0, where a neighbour is missing
  const int32_t* neighbors;
  const int32_t* coupling;  // [num_nodes, degree] rounded; 0 where a neighbour is missing
  const float* bias;        // [num_nodes] by node
  float scale;
  uint64_t seed;
};

struct Tie {
  uint64_t bits;  // the chains
  int64_t position;
};

// Bit p of a word stands for the chain chain_of_table_bit(p).
struct TableGroup {
  uint64_t number[kTableGroup];  // by chain
  uint64_t* state;               // [num_nodes + 1] bits, the last always 0; mutated
  const uint64_t* clamp;         // [num_nodes] bits; null: none
  uint8_t* bytes;                // scratch: [num_nodes, 64] random high bytes
  uint8_t* state_bytes;          // scratch: [num_nodes + 1, 64], AVX2 only
  Tie* ties;                     // scratch: [num_nodes + 1]
};
inline int64_t table_random_bytes(int64_t num_nodes) { return round_up(num_nodes, 128) * kTableGroup; }

}  // namespace gibbs
