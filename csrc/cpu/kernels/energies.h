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

// Chains whose sums stay in registers.
constexpr int kEnergyVectors = 4, kEnergyChains = kEnergyVectors * kLanes;
static_assert(kEnergyGroup % kEnergyChains == 0);

// Adds x in the lanes whose bits in a word of chains are 1.
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
inline void add_where(uint64_t word, VecI& acc, const VecI& x) {
  acc = (VecI)_mm512_mask_add_epi32((__m512i)acc, __mmask16(word), (__m512i)acc, (__m512i)x);
}
inline void add_where(uint64_t word, Vec<double>& acc, const Vec<double>& x) {
  acc = (Vec<double>)_mm512_mask_add_pd((__m512d)acc, __mmask8(word), (__m512d)acc, (__m512d)x);
}
#else
template <class T>
inline Vec<T> lane_masks(uint64_t word) {
  Vec<T> bit;
  for (int l = 0; l < lanes_of<T>; ++l) bit[l] = T{1} << l;
  return (Vec<T>)((splat(T(word)) & bit) == bit);
}
inline void add_where(uint64_t word, VecI& acc, const VecI& x) { acc += lane_masks<int32_t>(word) & x; }
inline void add_where(uint64_t word, Vec<double>& acc, const Vec<double>& x) {
  acc += (Vec<double>)(lane_masks<int64_t>(word) & (Vec<int64_t>)x);
}
#endif

// Half of a vector's lanes, as float64.
template <class V>
inline Vec<double> half_as_double(const V& v, int half) {
  typedef decltype(v[0] + 0) HalfOfV __attribute__((vector_size(GIBBS_VECTOR_BYTES / 2)));
  HalfOfV out;
  __builtin_memcpy(&out, (const char*)&v + half * int(sizeof out), sizeof out);
  return __builtin_convertvector(out, Vec<double>);
}

// Those of kEnergyChains chains from `first` on.
inline void graph_energies_of(const GraphView& g, const EnergyGroup& b, int first, double* out) {
  Vec<double> sum[2 * kEnergyVectors] = {};
  const double scale = double(b.scale);
  for (int64_t position = 0; position < g.num_nodes; ++position) {
    const int64_t node = g.order[position];
    VecI acc[kEnergyVectors] = {};
    const EarlierNeighbor* const end = b.earlier + b.earlier_offsets[position + 1];
    for (const EarlierNeighbor* e = b.earlier + b.earlier_offsets[position]; e < end; ++e) {
      const VecI coupling = splat(b.coupling[e->half_edge]);
      const uint64_t state = b.state[e->node] >> first;
      for (int v = 0; v < kEnergyVectors; ++v) add_where(state >> (v * kLanes), acc[v], coupling);
    }
    const bool has_earlier = b.earlier_offsets[position + 1] > b.earlier_offsets[position];
    const uint64_t state = b.state[node] >> first;
    for (int v = 0; v < 2 * kEnergyVectors; ++v) {
      const int at = first + v * kLanes / 2;
      Vec<double> term;
      if (b.shared_bias) {
        term = splat(double(b.bias[0][node]));
      } else {
        typedef float Half __attribute__((vector_size(GIBBS_VECTOR_BYTES / 2)));
        term = __builtin_convertvector(load<Half>(b.bias[at / kGroup] + node * kGroup + at % kGroup), Vec<double>);
      }
      if (has_earlier) term = half_as_double(acc[v / 2], v % 2) * scale + term;
      add_where(state >> (v * kLanes / 2), sum[v], term);
    }
  }
  for (int v = 0; v < 2 * kEnergyVectors; ++v) store(out + first + v * kLanes / 2, -sum[v]);
}

void graph_energies_kernel(const GraphView& g, const EnergyGroup& b, double* out) {
  for (int first = 0; first < kEnergyGroup; first += kEnergyChains) graph_energies_of(g, b, first, out);
}
