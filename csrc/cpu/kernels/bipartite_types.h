// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "cpu/kernels/types.h"

// Arguments of the CPU kernels of bipartite models: plain structs of pointers without containers, whose inline functions, if
// compiled for AVX-512, could be the copy that the linker keeps for every CPU.
namespace gibbs {

// Sizes are padded so that a vector never straddles two rows: rounded couplings to 16 integers, fields and biases to the units of
// whole 32-bit words of state bits. Padded fields may hold anything; state bits beyond the last unit are always 0.
inline int64_t padded_row(int64_t n) { return round_up(n, 16); }
inline int64_t padded_side(int64_t n) { return round_up(n, 32); }
// Kernels write high random bytes for 128 units at a time, and for up to 128 more than asked for.
inline int64_t random_bytes_capacity(int64_t units) { return round_up(units, 128) + 3 * 128; }

// A model's couplings as the caller holds them; strides in elements.
struct CouplingView {
  const void* data;  // float or double
  bool is_double;
  int64_t n1, n2, row_stride, column_stride;
};

// What a model's couplings are rounded by.
struct WeightScale {
  int k;                       // the exact unit is 2^-k
  int shift;                   // of NarrowCoupling
  double largest_of_one_sign;  // the largest |sum| that a unit's couplings may have; its relative error is that of their type
};

struct RoundedCoupling {
  int32_t* rows;     // [padded_row(n1), padded_row(n2)]; rows beyond n1 are 0
  int32_t* columns;  // [padded_row(n2), padded_row(n1)], the transpose
  float scale;       // 2^-k
};

// The same couplings rounded to 16 bits, which halve the memory traffic of an update. Their sums bound a unit's threshold; the few
// units that the bounds leave open take exact sums from the caller's couplings, so the resulting bits are the same.
struct NarrowCoupling {
  int16_t* rows;     // [padded_row(n1), padded_row(n2)] as above; null: not in use
  int16_t* columns;  // [padded_row(n2), padded_row(n1)]
  int shift;         // the unit is 2^(shift - k): every coupling fits in 16 bits and is at most half a unit off
};

// A model whose couplings are rounded to the unit of fields.
struct CoarseCoupling : CoarseFields {
  int16_t *rows, *columns;          // [n1, padded_side(n2)], [n2, padded_side(n1)]
  int16_t *left_bias, *right_bias;  // [padded_side(n)]
};

// A model as tables of the sums of five couplings of a unit, which a vector instruction looks up for 32 chains at a time. A block of
// kLookupBlock tables has sums of 16 bits in units of 2^-shift; the sums of blocks are rounded and added.
constexpr int kLookupRows = 5, kLookupBlock = 16, kLookupLanes = 32, kMostLookupVectors = 8;
// Counters 0 .. lookup_counters() - 1 have the high bytes of all units.
inline int64_t lookup_counters(int64_t n1, int64_t n2) { return (n1 + n2 + 127) / 128 * 8; }
inline int64_t num_lookup_tables(int64_t n) { return (n + kLookupRows - 1) / kLookupRows; }
struct LookupTable {
  int16_t low[8], high[4];  // entry e is low[e % 8] + high[e / 8]
};
struct LookupSide {
  LookupTable* tables;  // [n, num_lookup_tables(other n)], in the order in which they are read
  float* offset;        // [n] what sums are too large by, in units of a field
};
// What the unit of fields depends on: the largest over units, in multiples of the scale.
struct LookupSums {
  double all, block;  // the sum of |couplings|, and its part in a block
  double middle;      // half of |the sum of couplings|
};
struct LookupCoupling : CoarseFields {
  int shift;
  float factor;      // couplings of tables for each exact one
  double most_bias;  // a larger |bias| saturates a unit, whatever its neighbours do
  LookupSide left, right;
};

// One chain. Biases are float32, padded_side() long.
struct BinaryChain {
  uint32_t *left, *right;                    // state bits, mutated
  const uint32_t *clamp_left, *clamp_right;  // bits of the units that stay as they are; null: none
  const float *left_bias, *right_bias;
  const float *base_left_bias, *base_right_bias;  // annealed runs only
  uint64_t number;                                // the chain's number in the random counter
  double* log_weight;                             // annealed runs only, added to
};

struct BinarySweeps {
  int64_t n1, n2, num_sweeps;
  uint64_t seed, first_sweep;
  const float* beta;         // num_sweeps values beta_stride apart; annealed: num_sweeps + 1 values, the first the starting one
  int64_t beta_stride;       // 0 or 1
  RoundedCoupling coupling;  // its matrices are unused if narrow is in use
  NarrowCoupling narrow;
  CouplingView weight;
  int k;
  bool annealed;
  bool allow_tables;
  StopCheck check;
};

// A single chain and its model, of which fields have 16 bits.
struct CoarseSingle {
  BinaryChain chain;
  CouplingView weight;
  WeightScale scale;
  float unit;                       // of a field
  float most_bias;                  // a larger |bias| saturates a unit, whatever its neighbours do
  int16_t *rows, *columns;          // [padded_row(n1), padded_side(n2)], [padded_row(n2), padded_side(n1)]; 0 beyond n1 and n2
  int16_t *left_bias, *right_bias;  // scratch, as the next: [padded_side(n)]
  int16_t *left_field, *right_field;
  uint8_t* bytes;  // scratch: [2, random_bytes_capacity(n1 + n2)]
};
// Sigmoids of a unit of fields, for each side and each of the parts of the other side that may be active. They are made where they are
// used first.
constexpr int kActiveParts = 8;
struct SingleSigmoids {
  float unit, beta;
  bool is_made[2][kActiveParts];
  CoarseSigmoid of[2][kActiveParts];
};
// Models of similar couplings have the same unit at one beta.
constexpr int kKeptSigmoids = 8;
struct KeptSigmoids {
  int next = 0;
  SingleSigmoids of[kKeptSigmoids] = {};
};
constexpr int64_t kMostSingleUnits = 512;

// Scratch memory of a group of `count` chains that share a model.
struct GroupScratch {
  int32_t *acc_left, *acc_right;  // [count, padded_side(n)]
  uint8_t* bytes;                 // [group_random_bytes(n1 + n2, count)]
  int32_t *raised, *lowered;      // [max(n1, n2) + 16] units that flipped to 1 and to 0
  int32_t* table;                 // [table_size(count)]
  uint32_t* before;               // [count, state_words(max(n1, n2))], for coarse couplings only
};
// Scratch memory of a group of up to 32 * kMostLookupVectors chains that sweeps by LookupCoupling. The numbers of vectors are as large
// as the group needs.
struct LookupScratch {
  uint32_t *left, *right;              // [n, vectors] the bits of a unit in all chains
  uint32_t *left_fixed, *right_fixed;  // the same, of the units that are not drawn
  int16_t *left_bias, *right_bias;     // [n] if all chains share them, else [n, vectors, 32]
  uint16_t* index;                     // [num_lookup_tables(max(n1, n2)), vectors, 32]
  uint16_t* bytes;                     // [8, 16, vectors, 32]
};

// Number of high random bytes kept for a group: those of all its chains if the model is small, else those of a few.
constexpr int64_t kOneDrawUnits = 512, kByteChains = 16;
inline int64_t group_random_bytes(int64_t units, int64_t count) {
  return random_bytes_capacity(units) * (units <= kOneDrawUnits || count < kByteChains ? count : kByteChains);
}

constexpr int kTablesAtOnce = 4, kTableRows = 4, kTableBytes = 256;  // the last: of an entry
constexpr int64_t kMinTableChains = 32;                              // fewer chains do not look up often enough
inline int64_t table_size(int64_t count) {
  return count < kMinTableChains ? 0 : int64_t{kTablesAtOnce} * (1 << kTableRows) * kTableBytes / 4;
}

// Relaxed sweeps of a few chains that share a model, for T = float or double. Rows of `weight` are contiguous.
template <class T>
struct RelaxedChain {
  const T *left_bias, *right_bias;  // contiguous
  T* state;                         // [n1] start of the relaxed sweeps
  T *left, *right, *left_mean;      // [n1], [n2], [n1] results
  uint64_t number;
};
template <class T>
struct RelaxedSweeps {
  int64_t n1, n2, num_sweeps, row_stride;
  uint64_t seed, first_sweep;
  const double* beta;
  int64_t beta_stride;
  const T* weight;
  Relaxation relaxation;
  T sharpness;
  bool slope_gradient;
  int64_t fields_stride;  // from one sweep's fields to the next, in elements
};
// fields: one pointer per chain, to [num_sweeps (fields_stride), n2 + n1]
template <class T>
struct RelaxedBackwardChain {
  const T *grad_left, *grad_right, *grad_left_mean, *state, *fields;
  T *grad_state, *grad_left_bias, *grad_right_bias;
  T *left_factor, *right_factor;  // [2 * num_sweeps, n1], [2 * num_sweeps, n2]: grad_weight = sum of their outer products
  uint64_t number;
};

constexpr int kRelaxedGroup = 4;

}  // namespace gibbs
