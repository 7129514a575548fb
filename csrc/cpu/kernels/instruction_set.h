// SPDX-License-Identifier: Apache-2.0
// No include guard: the whole of one instruction set's kernels. Before it: GIBBS_ISA (namespace), GIBBS_ISA_NAME,
// GIBBS_VECTOR_BYTES and a target pragma; system headers must have been included without that pragma.
namespace gibbs {
namespace GIBBS_ISA {
namespace {
#include "cpu/kernels/simd.h"

#include "cpu/kernels/bipartite.h"

#include "cpu/kernels/bipartite_relaxed.h"

#include "cpu/kernels/graph.h"

#include "cpu/kernels/graph_metropolis.h"

#include "cpu/kernels/graph_relaxed.h"
}  // namespace

extern const Kernels table;
const Kernels table = {GIBBS_ISA_NAME,
                       GIBBS_VECTOR_BYTES >= 32,
                       scale_exponent_kernel,
                       round_couplings_kernel,
                       round_narrow_couplings_kernel,
                       sweep_tile_kernel,
                       random_words_kernel,
                       thresholds_kernel,
                       acceptances_kernel,
                       relaxed_kernel<float>,
                       relaxed_kernel<double>,
                       relaxed_backward_kernel<float>,
                       relaxed_backward_kernel<double>,
                       outer_products_kernel<float>,
                       outer_products_kernel<double>,
                       lanes_from_rows_kernel<float>,
                       lanes_from_rows_kernel<double>,
                       rows_from_lanes_kernel<float>,
                       rows_from_lanes_kernel<double>,
                       sum_lanes_kernel<float>,
                       sum_lanes_kernel<double>,
                       round_graph_couplings_kernel<float>,
                       round_graph_couplings_kernel<double>,
                       sweep_block_kernel,
                       sweep_chain_kernel,
                       metropolis_block_kernel,
                       relaxed_block_kernel<float>,
                       relaxed_block_kernel<double>,
                       relaxed_backward_begin_kernel<float>,
                       relaxed_backward_begin_kernel<double>,
                       relaxed_backward_block_kernel<float>,
                       relaxed_backward_block_kernel<double>,
#if GIBBS_X86 && GIBBS_VECTOR_BYTES >= 32
                       chain_of_table_bit_kernel,
                       build_tables_kernel,
                       sweep_tables_kernel};
#else
                       nullptr,
                       nullptr,
                       nullptr};
#endif
}  // namespace GIBBS_ISA
}  // namespace gibbs
