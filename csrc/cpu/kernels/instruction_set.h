// SPDX-License-Identifier: Apache-2.0
// No include guard: all kernels of one instruction set, in an anonymous namespace. The including file defines GIBBS_ISA (a
// namespace), GIBBS_ISA_NAME and GIBBS_VECTOR_BYTES, opens a target pragma, and includes the system's headers before that pragma.
namespace gibbs {
namespace GIBBS_ISA {
namespace {
// clang-format off
#include "cpu/kernels/simd.h"
#include "cpu/kernels/bits.h"
#include "cpu/kernels/sampling.h"
#include "cpu/kernels/rounding.h"
#include "cpu/kernels/relaxation.h"

#include "cpu/kernels/bipartite_rounding.h"
#include "cpu/kernels/bipartite.h"
#include "cpu/kernels/bipartite_narrow.h"
#if GIBBS_X86 && GIBBS_VECTOR_BYTES >= 32
#include "cpu/kernels/coarse_fields.h"

#include "cpu/kernels/bipartite_fields.h"
#endif
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 32
#include "cpu/kernels/bipartite_coarse.h"
#elif GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
#include "cpu/kernels/bipartite_lookup.h"
#include "cpu/kernels/bipartite_single.h"
#endif
#include "cpu/kernels/bipartite_relaxed.h"

#include "cpu/kernels/graph_groups.h"
#include "cpu/kernels/graph_rounding.h"
#include "cpu/kernels/graph_sums.h"
#include "cpu/kernels/graph_units.h"
#include "cpu/kernels/graph_tables.h"
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
#include "cpu/kernels/graph_coarse.h"
#include "cpu/kernels/graph_coarse_units.h"
#endif
#include "cpu/kernels/energies.h"
#include "cpu/kernels/counts.h"
#include "cpu/kernels/graph_metropolis.h"
#include "cpu/kernels/graph_relaxed.h"
// clang-format on

template <class T>
constexpr TypedKernels<T> typed_kernels = {
    .relaxed = relaxed_kernel<T>,
    .relaxed_backward = relaxed_backward_kernel<T>,
    .outer_products = outer_products_kernel<T>,
    .lanes_from_rows = lanes_from_rows_kernel<T>,
    .rows_from_lanes = rows_from_lanes_kernel<T>,
    .sum_lanes = sum_lanes_kernel<T>,
    .round_graph_couplings = round_graph_couplings_kernel<T>,
    .relaxed_graph = relaxed_graph_kernel<T>,
    .relaxed_graph_backward_begin = relaxed_graph_backward_begin_kernel<T>,
    .relaxed_graph_backward = relaxed_graph_backward_kernel<T>,
};
}  // namespace

extern const Kernels table;
const Kernels table = {
    .name = GIBBS_ISA_NAME,
    .narrow_from = GIBBS_VECTOR_BYTES == 64   ? 128
                   : GIBBS_VECTOR_BYTES == 32 ? 384
                                              : INT64_MAX,
    .transpose_bits = transpose_bits_kernel,
    .random_words = random_words_kernel,
    .thresholds = thresholds_kernel,
    .acceptances = acceptances_kernel,
    .scale_couplings = scale_couplings_kernel,
    .round_couplings = round_couplings_kernel,
    .round_narrow_couplings = round_narrow_couplings_kernel,
    .sweep_group = sweep_group_kernel,
    .sweep_narrow = sweep_narrow_kernel,
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 32
    .largest_slack = 512,
    .round_coarse = round_coarse_kernel,
    .sweep_coarse = sweep_coarse_kernel,
#endif
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
    .largest_slack = 8192,
    .note_lookup_sums = note_lookup_sums_kernel,
    .choose_lookup_unit = choose_lookup_unit_kernel,
    .round_lookup = round_lookup_kernel,
    .round_single = round_single_kernel,
    .sweep_single = sweep_single_kernel,
    .slack_of_fields = slack_of_fields_kernel,
    .sweep_lookup = sweep_lookup_kernel,
#endif
    .sweep_sums = sweep_sums_kernel,
    .metropolis = metropolis_kernel,
    .sweep_units = sweep_units_kernel,
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
    .round_coarse_graph = round_coarse_graph_kernel,
    .sweep_coarse_graph = sweep_coarse_graph_kernel,
    .sweep_coarse_units = sweep_coarse_units_kernel,
#endif
#if GIBBS_X86 && GIBBS_VECTOR_BYTES >= 32
    .chain_of_table_bit = chain_of_table_bit_kernel,
    .build_tables = build_tables_kernel,
    .sweep_tables = sweep_tables_kernel,
#else
    .chain_of_table_bit = nullptr,
    .build_tables = nullptr,
    .sweep_tables = nullptr,
#endif
    .count_products = count_products_kernel,
    .count_pairs = count_pairs_kernel,
    .words_from_lanes = words_from_lanes_kernel,
    .bipartite_energy = bipartite_energy_kernel,
    .graph_energies = graph_energies_kernel,
    .of_float = typed_kernels<float>,
    .of_double = typed_kernels<double>,
};
}  // namespace GIBBS_ISA
}  // namespace gibbs
