// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. Metropolis sweeps of a group of 16 chains (csrc/README.md, 2.6). Unlike Gibbs sweeps
// they draw whole words and decide nothing later: that is simpler, and as fast with AVX-512.

// Updates kUnits units of one colour, from position `first` on, step by step together: they are independent of each other.
template <bool kSharedCoupling, int kUnits>
__attribute__((always_inline)) inline void flip_units(const GraphView& g, const SumsGroup& b, float beta,
                                                      const VecF (&scale)[kGroupVectors], int64_t first) {
  constexpr int kCount = kUnits * kGroupVectors;
  int64_t at[kCount];
  VecF x[kCount];
#pragma GCC unroll 4
  for (int u = 0; u < kUnits; ++u) {
    const int64_t node = g.order[first + u];
    VecI acc[kGroupVectors] = {};
    add_neighbors<kSharedCoupling>(g, b, first + u, acc);
#pragma GCC unroll 4
    for (int v = 0; v < kGroupVectors; ++v) {
      const int k = u * kGroupVectors + v;
      at[k] = node * kGroup + v * kLanes;
      const VecF bias = b.shared_bias ? splat(b.bias[node]) : load<VecF>(b.bias + at[k]);
      const VecI sign = load<VecI>(b.state + at[k]) & INT32_MIN;
      // twin: logit_of_flip
      x[k] = bit_cast<VecF>(bit_cast<VecI>(group_logit(acc[v], scale[v], bias, beta, nullptr)) ^ sign);
    }
  }
  VecU acceptances[kCount];
  acceptance_vectors(x, acceptances);
  GIBBS_EACH {
    VecI flips = (x[k] >= 0.0f) | (VecI)(load<VecU>(b.words + at[k]) < acceptances[k]);
    if (b.clamp) flips &= ~load<VecI>(b.clamp + at[k]);
    store(b.state + at[k], load<VecI>(b.state + at[k]) ^ flips);
  }
}

template <bool kSharedCoupling>
void metropolis_of(const GraphSweeps& p, const SumsGroup& b) {
  constexpr int kUnits = kGroupVectors < 4 ? 4 / kGroupVectors : 1;
  const GraphView& g = p.graph;
  VecF scale[kGroupVectors];
  for (int v = 0; v < kGroupVectors; ++v) scale[v] = load<VecF>(b.scale + v * kLanes);
  for (int64_t sweep = 0; sweep < p.num_sweeps; ++sweep) {
    if (p.check.stop(p.check.context)) return;
    const float beta = p.beta[sweep * p.beta_stride];
    draw_words(group_streams(p.seed, b.number, p.first_sweep + uint64_t(sweep)), g.num_nodes, b.words);
    for (int64_t color = 0; color < g.num_colors; ++color) {
      int64_t pos = g.color_offsets[color];
      const int64_t end = g.color_offsets[color + 1];
      for (; pos + kUnits <= end; pos += kUnits) flip_units<kSharedCoupling, kUnits>(g, b, beta, scale, pos);
      for (; pos < end; ++pos) flip_units<kSharedCoupling, 1>(g, b, beta, scale, pos);
    }
  }
}
void metropolis_kernel(const GraphSweeps& p, const SumsGroup& b) {
  b.shared_coupling ? metropolis_of<true>(p, b) : metropolis_of<false>(p, b);
}
