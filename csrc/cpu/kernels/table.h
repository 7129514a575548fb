// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <type_traits>

#include "cpu/kernels/bipartite_types.h"
#include "cpu/kernels/graph_types.h"

// The kernels of one instruction set: the drivers see kernels through this table and the types alone.
namespace gibbs {

// Kernels for parameters of type T, float or double.
template <class T>
struct TypedKernels {
  // words: [random_bytes_capacity(n1 + n2)] uint32 scratch; bytes: the same number of uint8
  void (*relaxed)(const RelaxedSweeps<T>&, const RelaxedChain<T>*, T* const* fields, int count, uint32_t* words, uint8_t* bytes);
  // scratch: [2 * (n1 + n2)]
  void (*relaxed_backward)(const RelaxedSweeps<T>&, const RelaxedBackwardChain<T>&, bool needs_grad_state, uint32_t* words,
                           uint8_t* bytes, T* scratch);
  // out[rows begin..end) = sum of `count` outer products left[c] x right[c]
  void (*outer_products)(const T* left, const T* right, int64_t count, int64_t n1, int64_t n2, int64_t begin, int64_t end, T* out);

  // kGroup rows [n] as lanes [n, kGroup] (false if a value is not finite), the way back, and the sums over the lanes.
  bool (*lanes_from_rows)(const T* const* rows, int64_t n, T* out);
  void (*rows_from_lanes)(const T* lanes, int64_t n, T* const* rows);
  void (*sum_lanes)(const T* lanes, int64_t n, T* out);
  // k [models] and out [num_edges, models] (null: k only) for couplings w [num_edges, models]; models: 1 or kGroup.
  CouplingStatus (*round_graph_couplings)(const GraphView&, const T* w, int models, int* k, int32_t* out);
  void (*relaxed_graph)(const RelaxedGraphSweep<T>&, const RelaxedGroup<T>&);
  // The backward pass begins with the last sweep and its fields. Each further call undoes a sweep, given the sweep before it (null
  // if the first sweep is undone) and the fields of that.
  void (*relaxed_graph_backward_begin)(const RelaxedGraphSweep<T>&, const RelaxedBackwardGroup<T>&);
  void (*relaxed_graph_backward)(const GraphView&, const RelaxedGraphSweep<T>* before, const RelaxedBackwardGroup<T>&, bool last);
};

struct Kernels {
  const char* name;
  int64_t narrow_from;  // models with a side of more units sweep a few chains faster by narrow couplings (bench/NOTES.md)

  void (*transpose_bits)(const uint32_t* in, uint32_t* out);  // of 32 words
  void (*random_words)(uint64_t seed, uint64_t chain, uint64_t sweep, int64_t units, uint32_t* words, uint8_t* bytes);
  void (*thresholds)(const float* logits, int64_t count, uint32_t* out);   // count: multiple of 32
  void (*acceptances)(const float* logits, int64_t count, uint32_t* out);  // count: multiple of 32

  // sums: scratch of 16 * padded_row(n2) bytes.
  CouplingStatus (*scale_couplings)(const CouplingView&, void* sums, WeightScale&);
  // Rows first .. last - 1; `first` is a multiple of 16, and so is `last` but at the end.
  void (*round_couplings)(const CouplingView&, int k, int64_t first, int64_t last, const RoundedCoupling&);
  void (*round_narrow_couplings)(const CouplingView&, int k, int64_t first, int64_t last, const NarrowCoupling&);
  void (*sweep_group)(const BinarySweeps&, const BinaryChain*, int64_t count, const GroupScratch&);
  void (*sweep_narrow)(const BinarySweeps&, const BinaryChain*, int64_t count, const GroupScratch&);
  // Of fields of 16 bits, in units of 2^-16: with more they leave so much open that they do not pay (bench/NOTES.md). With AVX2
  // all units have the largest slack, with AVX-512 only those that can go either way.
  int largest_slack = 0;
  // AVX2, else null. All chains have the biases of `chain`. Returns the distance, in units of 2^-16, of a coarse probability from the
  // true one that has to be expected. Above 65535: the couplings were not rounded.
  int (*round_coarse)(const BinarySweeps&, const BinaryChain& chain, double least_beta, double largest_beta,
                      CoarseCoupling&) = nullptr;
  // At least kMinTableChains chains; not annealed.
  void (*sweep_coarse)(const BinarySweeps&, const CoarseCoupling&, const BinaryChain*, int64_t count,
                       const GroupScratch&) = nullptr;
  // AVX-512, else null. A model is rounded to tables in three steps, of which the first and the last may take any part of a side:
  // the sums of rows [num_rows, padded_row(n)]; the unit of fields, for biases of magnitudes up to largest_bias and betas of at least
  // least_beta (false if there is none); a side's tables of the units whose high bytes have the counters first .. last - 1 of
  // lookup_counters(), which returns the largest error of a sum. The last returns the largest slack of fields.
  void (*note_lookup_sums)(const int32_t* rows, int64_t num_rows, int64_t n, LookupSums&) = nullptr;
  bool (*choose_lookup_unit)(int64_t n1, int64_t n2, const LookupSums&, float scale, double largest_bias, double least_beta,
                             LookupCoupling&) = nullptr;
  float (*round_lookup)(int64_t n1, int64_t n2, const RoundedCoupling&, bool is_left, int64_t first, int64_t last,
                        const LookupCoupling&) = nullptr;
  // Single chains by fields of 16 bits, if no side has more than kMostSingleUnits. Rounds the couplings for one beta and biases of
  // magnitudes up to largest_bias; false if the slack that has to be expected is larger than largest_slack.
  bool (*round_single)(double largest_bias, double beta, int largest_slack, CoarseSingle&) = nullptr;
  void (*sweep_single)(const BinarySweeps&, const CoarseSingle&, KeptSigmoids&) = nullptr;
  int (*slack_of_fields)(const CoarseFields&, double beta) = nullptr;
  void (*sweep_lookup)(const BinarySweeps&, const LookupCoupling&, const BinaryChain*, int64_t count,
                       const LookupScratch&) = nullptr;

  void (*sweep_sums)(const GraphSweeps&, const SumsGroup&);
  void (*metropolis)(const GraphSweeps&, const SumsGroup&);
  void (*sweep_units)(const GraphSweeps&, const UnitsModel&, const SingleChain&);
  // AVX-512, else null. Returns the slack as round_coarse does.
  int (*round_coarse_graph)(const GraphView&, double least_beta, double largest_beta, CoarseGroup&) = nullptr;
  void (*sweep_coarse_graph)(const GraphSweeps&, const CoarseGroup&) = nullptr;
  // At most kUnitsChains chains. fields: scratch, by position
  void (*sweep_coarse_units)(const GraphSweeps&, const CoarseUnits&, const CoarseChain*, int count, int16_t* fields) = nullptr;
  // Null if the instruction set cannot shuffle the bytes of a vector.
  int (*chain_of_table_bit)(int bit);
  // table: [num_nodes << degree], of which the positions first .. last - 1 are written
  void (*build_tables)(const TableModel&, float beta, int64_t first, int64_t last, uint8_t* table);
  void (*sweep_tables)(const TableModel&, const uint8_t* table, float beta, uint64_t first_sweep, int64_t num_sweeps,
                       const TableGroup&, const StopCheck&);

  // Counts of states (kernels/counts.h), as words that have a unit's bit of each of 64 states. All pairs of the sides' units, to
  // which out [n1, right_stride] adds; a side's words are [kCountWords, stride], and right_stride is a multiple of kRightsAtOnce.
  void (*count_products)(const uint64_t* left, int64_t n1, int64_t left_stride, const uint64_t* right, int64_t right_stride,
                         uint32_t* out);
  // The same of some pairs of units, whose words are [units, kCountWords].
  void (*count_pairs)(const UnitPair*, int64_t num_pairs, const uint64_t* words, uint32_t* out);
  // Adds the bits of the chains in `present` of lanes [n, kGroup] of 0 and -1, shifted, to the first of each unit's words.
  void (*words_from_lanes)(const int32_t* lanes, int64_t n, uint64_t present, int shift, uint64_t* words);

  // Energies of states (kernels/energies.h): of one chain, and of kEnergyGroup.
  double (*bipartite_energy)(int64_t n1, int64_t n2, const RoundedCoupling&, const BinaryChain&, int32_t* acc, int32_t* list);
  void (*graph_energies)(const GraphView&, const EnergyGroup&, double* out);

  TypedKernels<float> of_float;
  TypedKernels<double> of_double;
  template <class T>
  const TypedKernels<T>& of() const {
    if constexpr (std::is_same_v<T, float>)
      return of_float;
    else
      return of_double;
  }
};

// The kernels in force: the best that this CPU runs, or those chosen by set_instruction_set.
const Kernels& kernels();
// name: "auto", "baseline", "avx2" or "avx512"; false if it is unknown or this CPU or build cannot run it.
bool set_instruction_set(const char* name);

}  // namespace gibbs
