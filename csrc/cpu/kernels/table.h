// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/kernels/bipartite_types.h"
#include "cpu/kernels/graph_types.h"

// The kernels of one instruction set.
namespace gibbs {

struct Kernels {
  const char* name;
  bool has_narrow;
  // k, and the shift of narrow couplings, for one model. sums: scratch of 8 * padded_row(n2) bytes.
  CouplingStatus (*scale_exponent)(const CouplingView&, void* sums, int* k, int* shift);
  void (*round_couplings)(const CouplingView&, int k, const RoundedCoupling&);
  void (*round_narrow_couplings)(const CouplingView&, int k, const NarrowCoupling&);
  void (*sweep_tile)(const BinarySweeps&, const BinaryChain*, int64_t count, const TileWorkspace&);
  void (*random_words)(uint64_t seed, uint64_t chain, uint64_t sweep, int64_t units, uint32_t* words, uint8_t* bytes);
  void (*thresholds)(const float* logits, int64_t count, uint32_t* out);   // count: multiple of 32
  void (*acceptances)(const float* logits, int64_t count, uint32_t* out);  // count: multiple of 32
  // words: [random_bytes_capacity(n1 + n2)] uint32 scratch, bytes: the same number of uint8
  void (*relaxed_float)(const RelaxedSweeps<float>&, const RelaxedChain<float>*, float* const* fields, int count, uint32_t*,
                        uint8_t*);
  void (*relaxed_double)(const RelaxedSweeps<double>&, const RelaxedChain<double>*, double* const* fields, int count, uint32_t*,
                         uint8_t*);
  // scratch: [2 * (n1 + n2)]
  void (*relaxed_backward_float)(const RelaxedSweeps<float>&, const RelaxedBackwardChain<float>&, bool needs_grad_state, uint32_t*,
                                 uint8_t*, float* scratch);
  void (*relaxed_backward_double)(const RelaxedSweeps<double>&, const RelaxedBackwardChain<double>&, bool needs_grad_state,
                                  uint32_t*, uint8_t*, double* scratch);
  // out[rows begin..end) = sum over `count` outer products left[c] x right[c]
  void (*outer_products_float)(const float* left, const float* right, int64_t count, int64_t n1, int64_t n2, int64_t begin,
                               int64_t end, float* out);
  void (*outer_products_double)(const double* left, const double* right, int64_t count, int64_t n1, int64_t n2, int64_t begin,
                                int64_t end, double* out);

  // Graphs. kChainBlock rows [n] as lanes [n, kChainBlock] (false where a value is not finite), back, and the sums over the lanes.
  bool (*lanes_from_rows_float)(const float* const* rows, int64_t n, float* out);
  bool (*lanes_from_rows_double)(const double* const* rows, int64_t n, double* out);
  void (*rows_from_lanes_float)(const float* lanes, int64_t n, float* const* rows);
  void (*rows_from_lanes_double)(const double* lanes, int64_t n, double* const* rows);
  void (*sum_lanes_float)(const float* lanes, int64_t n, float* out);
  void (*sum_lanes_double)(const double* lanes, int64_t n, double* out);
  // k [models] and out [num_edges, models] (or null: k only) for couplings w [num_edges, models], models 1 or kChainBlock.
  CouplingStatus (*round_graph_couplings_float)(const GraphView&, const float* w, int models, int* k, int32_t* out);
  CouplingStatus (*round_graph_couplings_double)(const GraphView&, const double* w, int models, int* k, int32_t* out);
  void (*sweep_block)(const GraphSweeps&, const BinaryBlock&);
  void (*sweep_chain)(const GraphSweeps&, const ChainModel&, const SingleChain&);
  void (*metropolis_block)(const GraphSweeps&, const BinaryBlock&);
  void (*relaxed_block_float)(const RelaxedGraphSweep<float>&, const RelaxedBlock<float>&);
  void (*relaxed_block_double)(const RelaxedGraphSweep<double>&, const RelaxedBlock<double>&);
  // Backward: begin with the last sweep and its fields, then undo it and the ones before, given each time the sweep before (null: the
  // first is undone) and its fields.
  void (*relaxed_backward_begin_float)(const RelaxedGraphSweep<float>&, const RelaxedBackwardBlock<float>&);
  void (*relaxed_backward_begin_double)(const RelaxedGraphSweep<double>&, const RelaxedBackwardBlock<double>&);
  void (*relaxed_backward_block_float)(const GraphView&, const RelaxedGraphSweep<float>* before, const RelaxedBackwardBlock<float>&,
                                       bool last);
  void (*relaxed_backward_block_double)(const GraphView&, const RelaxedGraphSweep<double>* before,
                                        const RelaxedBackwardBlock<double>&, bool last);
  // Null where bytes cannot be shuffled by vectors.
  int (*chain_of_table_bit)(int bit);
  // table: [num_nodes << degree]
  void (*build_tables)(const TableModel&, float beta, uint8_t* table);
  void (*sweep_tables)(const TableModel&, const uint8_t* table, float beta, uint64_t first_sweep, int64_t num_sweeps,
                       const TableBlock&, const StopCheck&);
};

// The kernels in force: the best that this CPU runs, or those chosen by set_instruction_set.
const Kernels& kernels();
// "auto", "baseline", "avx2" or "avx512"; false where the name is unknown or this CPU or build cannot run it.
bool set_instruction_set(const char* name);

}  // namespace gibbs
