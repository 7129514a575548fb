// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. Binary sweeps of a group of 16 chains, each unit's neighbours summed up.

// Sums of softplus(y) - softplus(x), lane by lane, with one log for 32 units as in softplus_difference.
class GroupSoftplus {
 public:
  explicit GroupSoftplus(double* total) : total_(total) { reset(); }
  void add(int v, VecF x, VecF y) {
    linear_[v] += (y > 0.0f ? y : splat(0.0f)) - (x > 0.0f ? x : splat(0.0f));
    above_[v] *= 1.0f + exp_of_negative(clipped_magnitude(y));
    below_[v] *= 1.0f + exp_of_negative(clipped_magnitude(x));
  }
  void end_of_unit() {
    if (++units_ == 32) flush();
  }
  void flush() {
    for (int l = 0; l < kGroup; ++l)
      total_[l] += double(linear_[l / kLanes][l % kLanes]) +
                   __builtin_log(double(above_[l / kLanes][l % kLanes]) / double(below_[l / kLanes][l % kLanes]));
    reset();
  }

 private:
  void reset() {
    units_ = 0;
    for (int v = 0; v < kGroupVectors; ++v) linear_[v] = VecF{}, above_[v] = below_[v] = splat(1.0f);
  }
  double* total_;
  int units_;
  VecF linear_[kGroupVectors], above_[kGroupVectors], below_[kGroupVectors];
};

// log f_{next}(rest) - log f_{beta}(rest) but for the part of colour 0, which is summed out: energies of the units of the other
// colours.
template <bool kShared>
inline void add_energy_difference(const GraphSweeps& p, const SumsGroup& b, float beta, float next_beta) {
  const GraphView& g = p.graph;
  const int32_t first = g.color_offsets[1];
  const bool coupled = g.num_colors > 2;  // else no two of these units are neighbours
  double sum[kGroup] = {};
  for (int64_t pos = first; pos < g.num_nodes; ++pos) {
    const int64_t at = int64_t{g.order[pos]} * kGroup;
    VecI acc[kGroupVectors] = {};
    for (int32_t h = g.row_offsets[pos]; coupled && h < g.row_offsets[pos + 1]; ++h) {
      const int64_t other = g.neighbors[h];
      if (p.position[other] < first || p.position[other] > pos) continue;  // each edge once
      for (int v = 0; v < kGroupVectors; ++v)
        acc[v] += coupling_vector<kShared>(b.coupling, g, h, v) & load<VecI>(b.state + other * kGroup + v * kLanes);
    }
    alignas(64) int32_t sums[kGroup];
    for (int v = 0; v < kGroupVectors; ++v) store(sums + v * kLanes, acc[v]);
    for (int l = 0; l < kGroup; ++l) {
      const double of_unit = double(sums[l]) * double(b.scale[l]) + double(b.bias[at + l]) - double(b.base_bias[at + l]);
      sum[l] -= double(b.state[at + l]) * of_unit;  // a state is 0 or -1
    }
  }
  for (int l = 0; l < kGroup; ++l) b.log_weight[l] += (double(next_beta) - double(beta)) * sum[l];
}

// Units some of whose chains the first bits of their words leave open. As ties are unpredictable, they are appended without a
// branch, with their logits or thresholds; at the end of the colour the rest of their words is drawn.
struct OpenUnits {
  OpenUnit* unit;  // [num_nodes + 1]
  int64_t count;
};

#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64

// Most logits need no sigmoid: they are compared with the bounds for the six highest bits of the word. One chain in 64 stays open;
// vectors of such chains, of any units, compute thresholds and draw low bits.
struct Bounds {
  explicit Bounds(const LogitBounds& b) {
    for (int i = 0; i < 4; ++i) zero[i] = _mm512_loadu_ps(b.zero + 16 * i), one[i] = _mm512_loadu_ps(b.one + 16 * i);
  }
  // Looks up the bound that the low six bits of `index` name.
  static __m512 look_up(const __m512 (&table)[4], __m512i index, __mmask16 high) {
    return _mm512_mask_blend_ps(high, _mm512_permutex2var_ps(table[0], index, table[1]),
                                _mm512_permutex2var_ps(table[2], index, table[3]));
  }
  __m512 zero[4], one[4];
};

// Draws a unit of all chains but the clamped ones in `keep`.
inline void decide(const Bounds& bounds, OpenUnits& open, VecF logit, const uint32_t* words, int64_t node, __mmask16 keep,
                   int32_t* state) {
  const __m512i bits = _mm512_srli_epi32(_mm512_loadu_si512(words), unsigned(8 * (node & 3) + 2));
  const __mmask16 high = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(32));
  const __mmask16 ones = _mm512_cmp_ps_mask((__m512)logit, Bounds::look_up(bounds.one, bits, high), _CMP_GE_OQ);
  const __mmask16 zeros = _mm512_cmp_ps_mask((__m512)logit, Bounds::look_up(bounds.zero, bits, high), _CMP_LT_OQ);
  const uint32_t undecided = uint32_t(__mmask16(~(ones | zeros | keep)));
  OpenUnit& next = open.unit[open.count];
  store(next.logits, logit);
  next.node = int32_t(node);
  next.lanes = undecided;
  open.count += undecided != 0;
  const __m512i now = _mm512_movm_epi32(ones);
  _mm512_storeu_si512(state, keep ? _mm512_mask_loadu_epi32(now, keep, state) : now);
}

inline void close_units(const SumsGroup& b, const GroupStreams& streams, OpenUnits& open) {
  const LaneStreams& of_lanes = streams.vector[0];
  alignas(64) uint32_t c1[kLanes], c3[kLanes], high[kLanes] = {};
  store(c1, of_lanes.c1), store(c3, of_lanes.c3);
  alignas(64) float logit[kLanes] = {};
  int64_t at[kLanes] = {};
  PickedLanes picked;
  int lanes = 0;
  const auto decide_lanes = [&] {
    const VecU word = load<VecU>(high) << 24 | picked.low_bits(of_lanes.c2, of_lanes.k0, of_lanes.k1);
    alignas(64) int32_t ones[kLanes];
    store(ones, (VecI)(word < threshold_vector(load<VecF>(logit))));
    for (int l = 0; l < lanes; ++l) b.state[at[l]] = ones[l];
    lanes = 0;
  };
  for (int64_t t = 0; t < open.count; ++t) {
    const OpenUnit& unit = open.unit[t];
    const int64_t node = unit.node;
    const uint32_t* words = word_of_high_bytes(b.words, node);
    for (uint32_t rest = unit.lanes; rest; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest), l = lanes;
      picked.set(l, node, c1[lane], c3[lane]);
      high[l] = words[lane] >> (8 * (node & 3)) & 0xff;
      logit[l] = unit.logits[lane];
      at[l] = node * kGroup + lane;
      if (++lanes == kLanes) decide_lanes();
    }
  }
  if (lanes) decide_lanes();
  open.count = 0;
}

#else

inline void close_units(const SumsGroup& b, const GroupStreams& streams, OpenUnits& open) {
  for (int64_t t = 0; t < open.count; ++t) {
    const int64_t node = open.unit[t].node;
    for (int v = 0; v < kGroupVectors; ++v) {
      const VecU threshold = load<VecU>(open.unit[t].thresholds + v * kLanes);
      const VecU byte = (load<VecU>(word_of_high_bytes(b.words, node) + v * kLanes) >> uint32_t(8 * (node & 3))) & 0xff;
      VecI ones = (VecI)(byte == threshold >> 24) & (VecI)(low_bits(streams.vector[v], node) < (threshold & 0xffffff));
      const int64_t at = node * kGroup + v * kLanes;
      if (b.clamp) ones &= ~load<VecI>(b.clamp + at);
      store(b.state + at, load<VecI>(b.state + at) | ones);
    }
  }
  open.count = 0;
}

#endif

// State that the updates of one sweep share.
struct SumsSweep {
  VecF scale[kGroupVectors];
  float beta, last_beta;  // last_beta is for annealed runs
  OpenUnits open;
  GroupSoftplus softplus;
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
  Bounds bounds;
#endif
};

// Updates kUnits units of one colour, from position `first` on, step by step together: they are independent of each other.
template <int kUnits, bool kSharedCoupling, bool kSharedBias, bool kAnnealed, bool kClamped>
__attribute__((always_inline)) inline void update_units(const GraphView& g, const SumsGroup& b, SumsSweep& s, int64_t first,
                                                        bool sum_out) {
  constexpr int kVectors = kUnits * kGroupVectors;
  VecF logits[kVectors];
#pragma GCC unroll 4
  for (int u = 0; u < kUnits; ++u) {
    const int64_t node = g.order[first + u];
    VecI acc[kGroupVectors] = {};
    add_neighbors<kSharedCoupling>(g, b, first + u, acc);
#pragma GCC unroll 4
    for (int v = 0; v < kGroupVectors; ++v) {
      const int64_t at = node * kGroup + v * kLanes;
      const VecF bias = kSharedBias ? splat(b.bias[node]) : load<VecF>(b.bias + at);
      const float* base_bias = kAnnealed ? b.base_bias + at : nullptr;
      logits[u * kGroupVectors + v] = group_logit(acc[v], s.scale[v], bias, s.beta, base_bias);
      if constexpr (kAnnealed)
        if (sum_out)
          s.softplus.add(v, group_logit(acc[v], s.scale[v], bias, s.last_beta, base_bias), logits[u * kGroupVectors + v]);
    }
    if constexpr (kAnnealed)
      if (sum_out) s.softplus.end_of_unit();
  }
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
#pragma GCC unroll 4
  for (int u = 0; u < kUnits; ++u) {
    const int64_t node = g.order[first + u];
    const __mmask16 keep = kClamped ? _mm512_movepi32_mask(_mm512_loadu_si512(b.clamp + node * kGroup)) : 0;
    decide(s.bounds, s.open, logits[u], word_of_high_bytes(b.words, node), node, keep, b.state + node * kGroup);
  }
#else
  VecU thresholds[kVectors];
  threshold_vectors(logits, thresholds);
#pragma GCC unroll 4
  for (int u = 0; u < kUnits; ++u) {
    const int64_t node = g.order[first + u];
    const uint32_t* words = word_of_high_bytes(b.words, node);
    bool tie = false;
#pragma GCC unroll 4
    for (int v = 0; v < kGroupVectors; ++v) {
      const int64_t at = node * kGroup + v * kLanes;
      const VecU threshold = thresholds[u * kGroupVectors + v];
      const VecU byte = (load<VecU>(words + v * kLanes) >> uint32_t(8 * (node & 3))) & 0xff, high = threshold >> 24;
      VecI ones = (VecI)(byte < high);
      store(s.open.unit[s.open.count].thresholds + v * kLanes, threshold);
      tie |= any_equal(byte, high);
      if constexpr (kClamped) {
        const VecI clamp = load<VecI>(b.clamp + at);
        ones = (ones & ~clamp) | (load<VecI>(b.state + at) & clamp);
      }
      store(b.state + at, ones);
    }
    s.open.unit[s.open.count].node = int32_t(node);
    s.open.count += tie;
  }
#endif
}

template <bool kSharedCoupling, bool kSharedBias, bool kAnnealed, bool kClamped>
void sweep_sums_of(const GraphSweeps& p, const SumsGroup& b) {
  constexpr int kUnits = kGroupVectors < 4 ? 4 / kGroupVectors : 1;
  const GraphView& g = p.graph;
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
  SumsSweep s = {{}, 0, 0, {b.open, 0}, GroupSoftplus(b.log_weight), Bounds(*p.bounds)};
#else
  SumsSweep s = {{}, 0, 0, {b.open, 0}, GroupSoftplus(b.log_weight)};
#endif
  for (int v = 0; v < kGroupVectors; ++v) s.scale[v] = load<VecF>(b.scale + v * kLanes);
  for (int64_t sweep = 0; sweep < p.num_sweeps; ++sweep) {
    if (p.check.stop(p.check.context)) return;
    s.beta = p.beta[(sweep + kAnnealed) * p.beta_stride];
    if constexpr (kAnnealed) {
      s.last_beta = p.beta[sweep * p.beta_stride];
      add_energy_difference<kSharedCoupling>(p, b, s.last_beta, s.beta);
    }
    const GroupStreams streams = group_streams(p.seed, b.number, p.first_sweep + uint64_t(sweep));
    draw_high_bytes(streams, g.num_nodes, b.words);
    for (int64_t color = 0; color < g.num_colors; ++color) {
      int64_t pos = g.color_offsets[color];
      const int64_t end = g.color_offsets[color + 1];
      for (; pos + kUnits <= end; pos += kUnits)
        update_units<kUnits, kSharedCoupling, kSharedBias, kAnnealed, kClamped>(g, b, s, pos, color == 0);
      for (; pos < end; ++pos) update_units<1, kSharedCoupling, kSharedBias, kAnnealed, kClamped>(g, b, s, pos, color == 0);
      close_units(b, streams, s.open);
    }
    if constexpr (kAnnealed) s.softplus.flush();
  }
}
void sweep_sums_kernel(const GraphSweeps& p, const SumsGroup& b) {
  if (b.log_weight)
    b.shared_coupling ? sweep_sums_of<true, false, true, false>(p, b) : sweep_sums_of<false, false, true, false>(p, b);
  else if (!b.shared_coupling)
    b.clamp ? sweep_sums_of<false, false, false, true>(p, b) : sweep_sums_of<false, false, false, false>(p, b);
  else if (!b.shared_bias)
    b.clamp ? sweep_sums_of<true, false, false, true>(p, b) : sweep_sums_of<true, false, false, false>(p, b);
  else
    b.clamp ? sweep_sums_of<true, true, false, true>(p, b) : sweep_sums_of<true, true, false, false>(p, b);
}
