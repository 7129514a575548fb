// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. Energies of binary states (csrc/README.md, 2.7): minus the sum over the units that are 1, in the
// order of their updates, of acc_i 2^-k + bias_i in float64, acc_i = the sum of the rounded couplings to the neighbours that are
// updated before.

// acc, list: scratch, [padded_side(n1)] and [max(n1, n2) + 16].
double bipartite_energy_kernel(int64_t n1, int64_t n2, const RoundedCoupling& coupling, const BinaryChain& chain, int32_t* acc,
                               int32_t* list) {
  const GroupSide<int32_t> right = {n2, n1, nullptr, coupling.columns, padded_row(n1)};
  __builtin_memset(acc, 0, size_t(padded_side(n1)) * sizeof *acc);
  propagate_by_rows(right, chain.right, acc, list);
  double sum = 0;
  const auto each_active = [&](const uint32_t* bits, int64_t n, const auto& f) {
    for (int64_t w = 0; w < state_words(n); ++w)
      for (uint32_t word = bits[w]; word; word &= word - 1) f(w * 32 + __builtin_ctz(word));
  };
  each_active(chain.right, n2, [&](int64_t j) { sum += double(chain.right_bias[j]); });
  each_active(chain.left, n1, [&](int64_t i) { sum += double(acc[i]) * double(coupling.scale) + double(chain.left_bias[i]); });
  return -sum;
}

using EnergyVec = double __attribute__((vector_size(8 * kLanes)));

// Adds x in the lanes whose bits v * kLanes .. of a word of 64 chains are 1.
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
inline void add_where(uint64_t word, int v, VecI& acc, const VecI& x) {
  acc = (VecI)_mm512_mask_add_epi32((__m512i)acc, __mmask16(word >> (v * kLanes)), (__m512i)acc, (__m512i)x);
}
inline void add_where(uint64_t word, int v, EnergyVec& acc, const EnergyVec& x) {
  union Halves {
    EnergyVec all;
    __m512d half[2];
  } sum = {acc}, other = {x};
  for (int h = 0; h < 2; ++h)
    sum.half[h] = _mm512_mask_add_pd(sum.half[h], __mmask8(word >> (v * kLanes + 8 * h)), sum.half[h], other.half[h]);
  acc = sum.all;
}
#else
inline VecI lane_masks(uint64_t word, int v) {
  VecI bit;
  for (int l = 0; l < kLanes; ++l) bit[l] = int32_t(1u << l);
  return (VecI)((splat(int32_t(word >> (v * kLanes))) & bit) != VecI{});
}
inline void add_where(uint64_t word, int v, VecI& acc, const VecI& x) { acc += lane_masks(word, v) & x; }
inline void add_where(uint64_t word, int v, EnergyVec& acc, const EnergyVec& x) {
  using Bits = int64_t __attribute__((vector_size(8 * kLanes)));
  acc += (EnergyVec)((Bits)x & __builtin_convertvector(lane_masks(word, v), Bits));
}
#endif

void graph_energies_kernel(const GraphView& g, const EnergyGroup& b, double* out) {
  constexpr int kVectors = kEnergyGroup / kLanes;
  EnergyVec sum[kVectors] = {};
  for (int64_t position = 0; position < g.num_nodes; ++position) {
    const int64_t node = g.order[position];
    VecI acc[kVectors] = {};
    for (int64_t h = g.row_offsets[position]; h < g.row_offsets[position + 1]; ++h) {
      if (b.position[g.neighbors[h]] > position) continue;
      const VecI coupling = splat(b.coupling[h]);
      const uint64_t state = b.state[g.neighbors[h]];
      for (int v = 0; v < kVectors; ++v) add_where(state, v, acc[v], coupling);
    }
    for (int v = 0; v < kVectors; ++v) {
      const int at = v * kLanes;
      const VecF bias = b.shared_bias ? splat(b.bias[0][node]) : load<VecF>(b.bias[at / kGroup] + node * kGroup + at % kGroup);
      const EnergyVec term =
          __builtin_convertvector(acc[v], EnergyVec) * double(b.scale) + __builtin_convertvector(bias, EnergyVec);
      add_where(b.state[node], v, sum[v], term);
    }
  }
  for (int v = 0; v < kVectors; ++v)
    for (int l = 0; l < kLanes; ++l) out[v * kLanes + l] = -sum[v][l];
}
