// SPDX-License-Identifier: Apache-2.0
// No include guard: included once per instruction set, after cpu/kernels/graph.h. Metropolis sweeps of a block of 16 chains
// (csrc/README.md, 2.6). Unlike in Gibbs sweeps whole words are drawn, and nothing is decided later: simpler, and as fast with AVX-512.

template <int kCount>
__attribute__((always_inline)) inline void acceptance_vectors(const VecF (&x)[kCount], VecU (&out)[kCount]) {
  VecF e[kCount];
  GIBBS_EACH e[k] = clipped_magnitude(x[k]);
  exp_of_negatives(e);
  GIBBS_EACH {
    const VecI is_below_one = e[k] < 1.0f;
    out[k] = __builtin_convertvector(is_below_one ? e[k] * 4294967296.0f : VecF{}, VecU) | (VecU)~is_below_one;
  }
}
void acceptances_kernel(const float* x, int64_t count, uint32_t* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const VecF in[1] = {load<VecF>(x + i)};
    VecU of_lanes[1];
    acceptance_vectors(in, of_lanes);
    store(out + i, of_lanes[0]);
  }
}

// kUnits units of one colour, from position `first` on: independent of each other, so they are taken step by step together.
template <bool kSharedCoupling, int kUnits>
inline void flip_units(const GraphView& g, const BinaryBlock& b, float beta, const VecF (&scale)[kBlockVectors], int64_t first) {
  constexpr int kCount = kUnits * kBlockVectors;
  int64_t at[kCount];
  VecF x[kCount];
#pragma GCC unroll 4
  for (int u = 0; u < kUnits; ++u) {
    const int64_t node = g.order[first + u], begin = g.row_offsets[first + u], end = g.row_offsets[first + u + 1];
    VecI acc[kBlockVectors] = {};
    for (int64_t h = begin; h < end; ++h)
#pragma GCC unroll 4
      for (int v = 0; v < kBlockVectors; ++v)
        acc[v] += coupling_vector<kSharedCoupling>(b.coupling, g, h, v) &
                  load<VecI>(b.state + int64_t{g.neighbors[h]} * kChainBlock + v * kLanes);
#pragma GCC unroll 4
    for (int v = 0; v < kBlockVectors; ++v) {
      const int k = u * kBlockVectors + v;
      at[k] = node * kChainBlock + v * kLanes;
      const VecF bias = b.shared_bias ? splat(b.bias[node]) : load<VecF>(b.bias + at[k]);
      const VecI sign = load<VecI>(b.state + at[k]) & INT32_MIN;
      // As logit_of_flip.
      x[k] = bit_cast<VecF>(bit_cast<VecI>(block_logit(acc[v], scale[v], bias, beta, nullptr)) ^ sign);
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
void metropolis_block_of(const GraphSweeps& p, const BinaryBlock& b) {
  constexpr int kUnits = kBlockVectors < 4 ? 4 / kBlockVectors : 1;
  const GraphView& g = p.graph;
  VecF scale[kBlockVectors];
  for (int v = 0; v < kBlockVectors; ++v) scale[v] = load<VecF>(b.scale + v * kLanes);
  for (int64_t sweep = 0; sweep < p.num_sweeps; ++sweep) {
    if (p.check.stop(p.check.context)) return;
    const float beta = p.beta[sweep * p.beta_stride];
    draw_words(block_streams(p.seed, b.number, p.first_sweep + uint64_t(sweep)), g.num_nodes, b.words);
    for (int64_t color = 0; color < g.num_colors; ++color) {
      int64_t pos = g.color_offsets[color];
      const int64_t end = g.color_offsets[color + 1];
      for (; pos + kUnits <= end; pos += kUnits) flip_units<kSharedCoupling, kUnits>(g, b, beta, scale, pos);
      for (; pos < end; ++pos) flip_units<kSharedCoupling, 1>(g, b, beta, scale, pos);
    }
  }
}
void metropolis_block_kernel(const GraphSweeps& p, const BinaryBlock& b) {
  b.shared_coupling ? metropolis_block_of<true>(p, b) : metropolis_block_of<false>(p, b);
}
