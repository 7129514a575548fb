// SPDX-License-Identifier: Apache-2.0
// No include guard: included once per instruction set, after cpu/kernels/bipartite_relaxed.h, in the same namespace and under the same target
// pragma. Chains lie in the lanes, so one unit of 16 or 64 chains is updated at a time.

// ---- random numbers ------------------------------------------------------------------------------------------------------------

constexpr int kBlockVectors = kChainBlock / kLanes;

struct BlockStreams {
  LaneStreams vector[kBlockVectors];
};
inline BlockStreams block_streams(uint64_t seed, const uint64_t* chains, uint64_t sweep) {
  BlockStreams out;
  for (int v = 0; v < kBlockVectors; ++v) out.vector[v] = lane_streams(seed, chains + v * kLanes, sweep);
  return out;
}

// The first unit whose high byte a group of counters supplies; the others follow in the order of core/philox.h.
inline int64_t first_unit_of(int64_t group) { return (group >> 3) * 128 + 4 * (group & 7); }

inline void draw_high_bytes(const BlockStreams& s, int64_t num_nodes, uint32_t* words) {
  for (int64_t group = 0; group < random_groups(num_nodes); ++group) {
    if (first_unit_of(group) >= num_nodes) continue;
    for (int v = 0; v < kBlockVectors; ++v) {
      const PhiloxVectors r = philox_lanes(s.vector[v], splat(uint32_t(group)));
      for (int q = 0; q < 4; ++q) store(words + (group * 4 + q) * kChainBlock + v * kLanes, r.word[q]);
    }
  }
}
inline const uint32_t* word_of_high_bytes(const uint32_t* words, int64_t unit) {
  return words + (((unit >> 7) * 8 + (unit >> 2 & 7)) * 4 + (unit >> 5 & 3)) * kChainBlock;
}

inline VecU low_bits(const LaneStreams& s, int64_t unit) {
  const PhiloxVectors r = philox_lanes(s, splat(uint32_t(kLowPlane | ((unit >> 5) * 8 + (unit & 7)))));
  return r.word[unit >> 3 & 3] & 0xffffff;
}

// Whole words of all units: [num_nodes, kChainBlock] at the front of `words`.
inline void draw_words(const BlockStreams& s, int64_t num_nodes, uint32_t* words) {
  uint32_t* high = words + round_up(num_nodes, 32) * kChainBlock;
  draw_high_bytes(s, num_nodes, high);
  for (int64_t group = 0; group < (num_nodes + 31) / 32 * 8; ++group) {
    const int64_t first = (group >> 3) * 32 + (group & 7);
    if (first >= num_nodes) continue;
    for (int v = 0; v < kBlockVectors; ++v) {
      const PhiloxVectors r = philox_lanes(s.vector[v], splat(uint32_t(kLowPlane | group)));
      for (int q = 0; q < 4; ++q) {
        const int64_t unit = first + 8 * q;
        if (unit >= num_nodes) break;
        const VecU bytes = load<VecU>(word_of_high_bytes(high, unit) + v * kLanes) >> uint32_t(8 * (unit & 3));
        store(words + unit * kChainBlock + v * kLanes, (bytes << 24) | (r.word[q] & 0xffffff));
      }
    }
  }
}

// ---- rows and lanes ------------------------------------------------------------------------------------------------------------

// out [n, kChainBlock] = the transpose of kChainBlock rows [n]. False where a value is not finite.
template <class T>
bool lanes_from_rows_kernel(const T* const* rows, int64_t n, T* out) {
  using Bits = FloatBits<T>;
  using Int = typename Bits::Int;
  Vec<Int> largest = {};
  int64_t i = 0;
  for (; i + kSquare <= n; i += kSquare) {
    for (int half = 0; half < kChainBlock; half += kSquare) {
      const Int* from[kSquare];
      Int* to[kSquare];
      for (int r = 0; r < kSquare; ++r) {
        from[r] = (const Int*)(rows[half + r] + i);
        to[r] = (Int*)(out + (i + r) * kChainBlock + half);
      }
      transpose_square(from, to);
    }
    for (int64_t at = i * kChainBlock; at < (i + kSquare) * kChainBlock; at += lanes_of<T>)
      largest = vector_max(largest, load<Vec<Int>>((const Int*)(out + at)) & Int(~(Int(1) << (8 * sizeof(T) - 1))));
  }
  bool finite = true;
  for (int l = 0; l < lanes_of<T>; ++l) finite &= largest[l] >> Bits::kMantissa != Bits::kExponentMask;
  for (; i < n; ++i)
    for (int l = 0; l < kChainBlock; ++l) {
      out[i * kChainBlock + l] = rows[l][i];
      finite &= __builtin_isfinite(rows[l][i]) != 0;
    }
  return finite;
}
template <class T>
void rows_from_lanes_kernel(const T* lanes, int64_t n, T* const* rows) {
  using Int = typename FloatBits<T>::Int;
  int64_t i = 0;
  for (; i + kSquare <= n; i += kSquare)
    for (int half = 0; half < kChainBlock; half += kSquare) {
      const Int* from[kSquare];
      Int* to[kSquare];
      for (int r = 0; r < kSquare; ++r) {
        from[r] = (const Int*)(lanes + (i + r) * kChainBlock + half);
        to[r] = (Int*)(rows[half + r] + i);
      }
      transpose_square(from, to);
    }
  for (; i < n; ++i)
    for (int l = 0; l < kChainBlock; ++l) rows[l][i] = lanes[i * kChainBlock + l];
}
// out [n] = sums over the lanes, in one order whatever the instruction set.
template <class T>
void sum_lanes_kernel(const T* lanes, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    T sum[kChainBlock / 2];
    for (int l = 0; l < kChainBlock / 2; ++l) sum[l] = lanes[i * kChainBlock + l] + lanes[i * kChainBlock + kChainBlock / 2 + l];
    for (int width = kChainBlock / 4; width; width /= 2)
      for (int l = 0; l < width; ++l) sum[l] += sum[l + width];
    out[i] = sum[0];
  }
}

// ---- rounding of couplings -----------------------------------------------------------------------------------------------------

// kB models at once, or one: w [num_edges, kB], k [kB], out [num_edges, kB]. As scale_exponent_of and round_couplings_of do it for
// matrices, but here every sum is an integer one.
template <class T, int kB>
inline CouplingStatus round_graph_couplings(const GraphView& g, const T* w, int* k, int32_t* out) {
  using Bits = FloatBits<T>;
  using Int = typename Bits::Int;
  constexpr Int kMagnitude = Int(~(Int(1) << (8 * sizeof(T) - 1)));
  Int largest_bits[kB] = {};
  for (int64_t e = 0; e < g.num_edges; ++e)
    for (int l = 0; l < kB; ++l) {
      Int bits;
      __builtin_memcpy(&bits, w + e * kB + l, sizeof bits);
      bits &= kMagnitude;
      largest_bits[l] = bits > largest_bits[l] ? bits : largest_bits[l];
    }
  const int64_t degree = g.max_degree > 1 ? g.max_degree : 1;
  int exponent[kB];
  T factor[kB];
  bool scan = false;
  for (int l = 0; l < kB; ++l) {
    const auto stored = largest_bits[l] >> Bits::kMantissa;
    if (stored == Bits::kExponentMask) return CouplingStatus::kNonFinite;
    exponent[l] = int(stored) - Bits::kBias + 1;  // max |w| < 2^exponent
    if (exponent[l] > 127) return CouplingStatus::kTooLarge;
    // All zero or subnormal, or small: the largest k fits in any case.
    const bool fits = stored == 0 || largest_scale_fits(degree, exponent[l]);
    factor[l] = fits ? T(0) : power_of_two<T>(coupling_sum_bits(degree) - exponent[l]);
    scan |= !fits;
    k[l] = kMaxScaleExponent;
  }
  if (scan) {
    int32_t largest[kB] = {};
    for (int64_t pos = 0; pos < g.num_nodes; ++pos) {
      int32_t sum[kB] = {};
      for (int32_t h = g.row_offsets[pos]; h < g.row_offsets[pos + 1]; ++h)
        for (int l = 0; l < kB; ++l) {
          const T value = w[int64_t{g.edge_of[h]} * kB + l], scaled = value * factor[l], x = scaled < 0 ? -scaled : scaled;
          const int32_t floor = int32_t(x);
          // an underflow is still a little more than nothing
          sum[l] += floor + int32_t((T(floor) < x) | ((x == 0) & (value != 0) & (factor[l] != 0)));
        }
      for (int l = 0; l < kB; ++l) largest[l] = sum[l] > largest[l] ? sum[l] : largest[l];
    }
    for (int l = 0; l < kB; ++l)
      if (factor[l] != 0) k[l] = scale_exponent(largest[l], degree, exponent[l]);
  }
  if (!out) return CouplingStatus::kOk;
  for (int l = 0; l < kB; ++l) factor[l] = power_of_two<T>(k[l]);
  for (int64_t e = 0; e < g.num_edges; ++e)
    for (int l = 0; l < kB; ++l) out[e * kB + l] = int32_t(__builtin_rint(double(w[e * kB + l] * factor[l])));
  return CouplingStatus::kOk;
}
template <class T>
CouplingStatus round_graph_couplings_kernel(const GraphView& g, const T* w, int models, int* k, int32_t* out) {
  return models == 1 ? round_graph_couplings<T, 1>(g, w, k, out) : round_graph_couplings<T, kChainBlock>(g, w, k, out);
}

// ---- binary sweeps of 16 chains ------------------------------------------------------------------------------------------------

template <bool kShared, class T>
inline Vec<T> coupling_vector(const T* coupling, const GraphView& g, int64_t half_edge, int v) {
  if constexpr (kShared) return splat(coupling[half_edge]);
  return load<Vec<T>>(coupling + int64_t{g.edge_of[half_edge]} * kChainBlock + v * lanes_of<T>);
}

// Logits of one vector of chains; base_bias: null, or of an annealed run.
inline VecF block_logit(VecI acc, VecF scale, VecF bias, float beta, const float* base_bias) {
  const VecF logit = beta == 0 ? VecF{} : beta * (to_float(acc) * scale + bias);
  return base_bias ? logit + (1.0f - beta) * load<VecF>(base_bias) : logit;
}

// Sums of softplus(y) - softplus(x), lane by lane; see softplus_difference. The logs of 32 units are taken as one.
class BlockSoftplus {
 public:
  explicit BlockSoftplus(double* total) : total_(total) { reset(); }
  void add(int v, VecF x, VecF y) {
    linear_[v] += (y > 0.0f ? y : splat(0.0f)) - (x > 0.0f ? x : splat(0.0f));
    above_[v] *= 1.0f + exp_of_negative(clipped_magnitude(y));
    below_[v] *= 1.0f + exp_of_negative(clipped_magnitude(x));
  }
  void end_of_unit() {
    if (++units_ == 32) flush();
  }
  void flush() {
    for (int l = 0; l < kChainBlock; ++l)
      total_[l] += double(linear_[l / kLanes][l % kLanes]) +
                   __builtin_log(double(above_[l / kLanes][l % kLanes]) / double(below_[l / kLanes][l % kLanes]));
    reset();
  }

 private:
  void reset() {
    units_ = 0;
    for (int v = 0; v < kBlockVectors; ++v) linear_[v] = VecF{}, above_[v] = below_[v] = splat(1.0f);
  }
  double* total_;
  int units_;
  VecF linear_[kBlockVectors], above_[kBlockVectors], below_[kBlockVectors];
};

// log f_{next}(rest) - log f_{beta}(rest) less the part of colour 0, which is summed out: energies of the units of the other colours.
template <bool kShared>
inline void add_energy_difference(const GraphSweeps& p, const BinaryBlock& b, float beta, float next_beta) {
  const GraphView& g = p.graph;
  const int32_t first = g.color_offsets[1];
  const bool coupled = g.num_colors > 2;  // whether any two of these units are
  double sum[kChainBlock] = {};
  for (int64_t pos = first; pos < g.num_nodes; ++pos) {
    const int64_t at = int64_t{g.order[pos]} * kChainBlock;
    VecI acc[kBlockVectors] = {};
    for (int32_t h = g.row_offsets[pos]; coupled && h < g.row_offsets[pos + 1]; ++h) {
      const int64_t other = g.neighbors[h];
      if (p.position[other] < first || p.position[other] > pos) continue;  // each edge once
      for (int v = 0; v < kBlockVectors; ++v)
        acc[v] += coupling_vector<kShared>(b.coupling, g, h, v) & load<VecI>(b.state + other * kChainBlock + v * kLanes);
    }
    alignas(64) int32_t sums[kChainBlock];
    for (int v = 0; v < kBlockVectors; ++v) store(sums + v * kLanes, acc[v]);
    for (int l = 0; l < kChainBlock; ++l) {
      const double of_unit = double(sums[l]) * double(b.scale[l]) + double(b.bias[at + l]) - double(b.base_bias[at + l]);
      sum[l] -= double(b.state[at + l]) * of_unit;  // a state is 0 or -1
    }
  }
  for (int l = 0; l < kChainBlock; ++l) b.log_weight[l] += (double(next_beta) - double(beta)) * sum[l];
}

// Units not all of whose chains are decided by the first bits of their words. As with tables (Ties), nothing branches on them when they come
// up: what decides them is kept, and at the end of the colour they draw the rest of their words.
struct OpenUnits {
  OpenUnit* unit;  // [num_nodes + 1]
  int64_t count;
};

#if GIBBS_X86 && GIBBS_VECTOR_BYTES >= 32

// Units and chains picked one by one, a vector of them at a time: their low 24 random bits.
struct PickedLanes {
  // Lane l: the word of `unit` in the chain with these counter words.
  void set(int l, int64_t unit, uint32_t of_c1, uint32_t of_c3) {
    group[l] = kLowPlane | uint32_t((unit >> 5) * 8 + (unit & 7));
    word[l] = int32_t(unit >> 3 & 3);
    c1[l] = of_c1, c3[l] = of_c3;
  }
  VecU low_bits(uint32_t c2, uint32_t k0, uint32_t k1) const {
    const PhiloxVectors r = philox_lanes({load<VecU>(c1), load<VecU>(c3), c2, k0, k1}, load<VecU>(group));
    const VecI w = load<VecI>(word);
    return (w < 2 ? (w == 0 ? r.word[0] : r.word[1]) : (w == 2 ? r.word[2] : r.word[3])) & 0xffffff;
  }
  alignas(64) uint32_t group[kLanes] = {}, c1[kLanes] = {}, c3[kLanes] = {};
  alignas(64) int32_t word[kLanes] = {};
};

#endif

#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64

// Most logits need no sigmoid: they are compared with what the six highest bits of the word ask for. One chain in 64 stays open, with its
// logit; vectors of those, of any units, compute thresholds and draw low bits.
struct Bounds {
  explicit Bounds(const LogitBounds& b) {
    for (int i = 0; i < 4; ++i) zero[i] = _mm512_loadu_ps(b.zero + 16 * i), one[i] = _mm512_loadu_ps(b.one + 16 * i);
  }
  // Of the bound that the low six bits of `index` name.
  static __m512 look_up(const __m512 (&table)[4], __m512i index, __mmask16 high) {
    return _mm512_mask_blend_ps(high, _mm512_permutex2var_ps(table[0], index, table[1]),
                                _mm512_permutex2var_ps(table[2], index, table[3]));
  }
  __m512 zero[4], one[4];
};

// keep: chains that are clamped
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

inline void close_units(const BinaryBlock& b, const BlockStreams& streams, OpenUnits& open) {
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
      at[l] = node * kChainBlock + lane;
      if (++lanes == kLanes) decide_lanes();
    }
  }
  if (lanes) decide_lanes();
  open.count = 0;
}

#else

inline void close_units(const BinaryBlock& b, const BlockStreams& streams, OpenUnits& open) {
  for (int64_t t = 0; t < open.count; ++t) {
    const int64_t node = open.unit[t].node;
    for (int v = 0; v < kBlockVectors; ++v) {
      const VecU threshold = load<VecU>(open.unit[t].thresholds + v * kLanes);
      const VecU byte = (load<VecU>(word_of_high_bytes(b.words, node) + v * kLanes) >> uint32_t(8 * (node & 3))) & 0xff;
      VecI ones = (VecI)(byte == threshold >> 24) & (VecI)(low_bits(streams.vector[v], node) < (threshold & 0xffffff));
      const int64_t at = node * kChainBlock + v * kLanes;
      if (b.clamp) ones &= ~load<VecI>(b.clamp + at);
      store(b.state + at, load<VecI>(b.state + at) | ones);
    }
  }
  open.count = 0;
}

#endif

// What the updates of one sweep share.
struct BlockSweep {
  VecF scale[kBlockVectors];
  float beta, last_beta;  // last_beta: annealed runs only
  OpenUnits open;
  BlockSoftplus softplus;
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
  Bounds bounds;
#endif
};

// kUnits units of one colour, from position `first` on: independent of each other, so they are taken step by step together.
template <int kUnits, bool kSharedCoupling, bool kSharedBias, bool kAnnealed, bool kClamped>
__attribute__((always_inline)) inline void update_units(const GraphView& g, const BinaryBlock& b, BlockSweep& s, int64_t first,
                                                        bool sum_out) {
  constexpr int kVectors = kUnits * kBlockVectors;
  VecF logits[kVectors];
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
      const int64_t at = node * kChainBlock + v * kLanes;
      const VecF bias = kSharedBias ? splat(b.bias[node]) : load<VecF>(b.bias + at);
      const float* base_bias = kAnnealed ? b.base_bias + at : nullptr;
      logits[u * kBlockVectors + v] = block_logit(acc[v], s.scale[v], bias, s.beta, base_bias);
      if constexpr (kAnnealed)
        if (sum_out)
          s.softplus.add(v, block_logit(acc[v], s.scale[v], bias, s.last_beta, base_bias), logits[u * kBlockVectors + v]);
    }
    if constexpr (kAnnealed)
      if (sum_out) s.softplus.end_of_unit();
  }
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
#pragma GCC unroll 4
  for (int u = 0; u < kUnits; ++u) {
    const int64_t node = g.order[first + u];
    const __mmask16 keep = kClamped ? _mm512_movepi32_mask(_mm512_loadu_si512(b.clamp + node * kChainBlock)) : 0;
    decide(s.bounds, s.open, logits[u], word_of_high_bytes(b.words, node), node, keep, b.state + node * kChainBlock);
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
    for (int v = 0; v < kBlockVectors; ++v) {
      const int64_t at = node * kChainBlock + v * kLanes;
      const VecU threshold = thresholds[u * kBlockVectors + v];
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
void sweep_block_of(const GraphSweeps& p, const BinaryBlock& b) {
  constexpr int kUnits = kBlockVectors < 4 ? 4 / kBlockVectors : 1;
  const GraphView& g = p.graph;
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
  BlockSweep s = {{}, 0, 0, {b.open, 0}, BlockSoftplus(b.log_weight), Bounds(*p.bounds)};
#else
  BlockSweep s = {{}, 0, 0, {b.open, 0}, BlockSoftplus(b.log_weight)};
#endif
  for (int v = 0; v < kBlockVectors; ++v) s.scale[v] = load<VecF>(b.scale + v * kLanes);
  for (int64_t sweep = 0; sweep < p.num_sweeps; ++sweep) {
    if (p.check.stop(p.check.context)) return;
    s.beta = p.beta[(sweep + kAnnealed) * p.beta_stride];
    if constexpr (kAnnealed) {
      s.last_beta = p.beta[sweep * p.beta_stride];
      add_energy_difference<kSharedCoupling>(p, b, s.last_beta, s.beta);
    }
    const BlockStreams streams = block_streams(p.seed, b.number, p.first_sweep + uint64_t(sweep));
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
void sweep_block_kernel(const GraphSweeps& p, const BinaryBlock& b) {
  if (b.log_weight)
    b.shared_coupling ? sweep_block_of<true, false, true, false>(p, b) : sweep_block_of<false, false, true, false>(p, b);
  else if (!b.shared_coupling)
    b.clamp ? sweep_block_of<false, false, false, true>(p, b) : sweep_block_of<false, false, false, false>(p, b);
  else if (!b.shared_bias)
    b.clamp ? sweep_block_of<true, false, false, true>(p, b) : sweep_block_of<true, false, false, false>(p, b);
  else
    b.clamp ? sweep_block_of<true, true, false, true>(p, b) : sweep_block_of<true, true, false, false>(p, b);
}

// ---- binary sweeps of a single chain -------------------------------------------------------------------------------------------

inline VecI gather(const int32_t* base, VecI index) {
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
  return (VecI)_mm512_i32gather_epi32((__m512i)index, base, 4);
#elif GIBBS_X86 && GIBBS_VECTOR_BYTES == 32
  return (VecI)_mm256_i32gather_epi32(base, (__m256i)index, 4);
#else
  VecI out;
  for (int l = 0; l < kLanes; ++l) out[l] = base[index[l]];
  return out;
#endif
}

// kVectors vectors of units of one colour, from position `first` on.
template <int kVectors>
inline void update_positions(const ChainModel& m, const SingleChain& c, const RandomStream& random, float beta, int64_t first) {
  VecF logits[kVectors];
  VecU thresholds[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = first + v * kLanes, row = at / kChainBlock * kChainBlock * m.degree + at % kChainBlock;
    VecI acc = {};
    for (int64_t k = 0; k < m.degree; ++k)
      acc += gather(c.state, load<VecI>(m.neighbors + row + k * kChainBlock)) & load<VecI>(m.coupling + row + k * kChainBlock);
    logits[v] = block_logit(acc, splat(m.scale), load<VecF>(m.bias + at), beta, nullptr);
  }
  threshold_vectors(logits, thresholds);
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int32_t* nodes = m.nodes + first + v * kLanes;
    alignas(64) uint32_t byte[kLanes];
    for (int l = 0; l < kLanes; ++l) byte[l] = c.bytes[nodes[l]];
    const VecU bytes = load<VecU>(byte), high = thresholds[v] >> 24;
    VecI ones = (VecI)(bytes < high);
    if (any_equal(bytes, high))
      for (int l = 0; l < kLanes; ++l)
        if (byte[l] == thresholds[v][l] >> 24)
          ones[l] = -int32_t(random_low_bits(random, uint32_t(nodes[l])) < (thresholds[v][l] & 0xffffff));
    if (c.clamp) {
      const VecI index = load<VecI>(nodes), clamp = gather(c.clamp, index);
      ones = (ones & ~clamp) | (gather(c.state, index) & clamp);
    }
    for (int l = 0; l < kLanes; ++l) c.state[nodes[l]] = ones[l];
  }
}

void sweep_chain_kernel(const GraphSweeps& p, const ChainModel& m, const SingleChain& c) {
  constexpr int kVectors = kBlockVectors < 4 ? 4 : kBlockVectors;
  for (int64_t sweep = 0; sweep < p.num_sweeps; ++sweep) {
    if (p.check.stop(p.check.context)) return;
    const float beta = p.beta[sweep * p.beta_stride];
    const RandomStream random = random_stream(p.seed, c.number, p.first_sweep + uint64_t(sweep));
    random_bytes(random, 0, (m.graph.num_nodes + 127) / 128, c.bytes);
    for (int64_t color = 0; color < m.graph.num_colors; ++color) {
      int64_t at = m.color_offsets[color];
      const int64_t end = m.color_offsets[color + 1];
      for (; at + kVectors * kLanes <= end; at += kVectors * kLanes) update_positions<kVectors>(m, c, random, beta, at);
      for (; at < end; at += kChainBlock) update_positions<kBlockVectors>(m, c, random, beta, at);
    }
  }
}

// ---- binary sweeps of 64 chains by table ---------------------------------------------------------------------------------------

#if GIBBS_X86 && GIBBS_VECTOR_BYTES >= 32

constexpr int kTableVectors = kTableChains / kLanes;
constexpr int kTableHalf = 4 * kLanes;  // chains whose bytes fill a vector

// Which chain's bytes stand at byte p of the vectors: draw_table_bytes leaves four vectors of words interleaved.
inline int chain_of_byte(int p) { return p / kTableHalf * kTableHalf + p % 4 * kLanes + p % kTableHalf / 4; }
int chain_of_table_bit_kernel(int bit) { return chain_of_byte(bit); }

// High bytes [num_nodes, 64] of all units. Four vectors of words hold four units' bytes of 4 kLanes chains: a transpose of bytes
// within each lane parts the units.
inline void draw_table_bytes(uint64_t seed, const uint64_t* chains, uint64_t sweep, int64_t num_nodes, uint8_t* bytes) {
  LaneStreams streams[kTableVectors];
  for (int v = 0; v < kTableVectors; ++v) streams[v] = lane_streams(seed, chains + v * kLanes, sweep);
  constexpr uint32_t kEven = 0x00ff00ff;
  for (int64_t group = 0; group < random_groups(num_nodes); ++group) {
    const int64_t first = first_unit_of(group);
    if (first >= num_nodes) continue;
    for (int half = 0; half < kTableChains / kTableHalf; ++half) {
      PhiloxVectors r[4];
      for (int v = 0; v < 4; ++v) r[v] = philox_lanes(streams[half * 4 + v], splat(uint32_t(group)));
      for (int q = 0; q < 4; ++q) {
        const VecU a = r[0].word[q], b = r[1].word[q], c = r[2].word[q], d = r[3].word[q];
        const VecU ab_even = (a & kEven) | (b & kEven) << 8, ab_odd = (a >> 8 & kEven) | (b & ~kEven);
        const VecU cd_even = (c & kEven) | (d & kEven) << 8, cd_odd = (c >> 8 & kEven) | (d & ~kEven);
        uint8_t* out = bytes + (first + 32 * q) * kTableChains + half * kTableHalf;
        store(out, (ab_even & 0xffff) | cd_even << 16);
        store(out + kTableChains, (ab_odd & 0xffff) | cd_odd << 16);
        store(out + 2 * kTableChains, ab_even >> 16 | (cd_even & 0xffff0000));
        store(out + 3 * kTableChains, ab_odd >> 16 | (cd_odd & 0xffff0000));
      }
    }
  }
}

// The high bytes of the thresholds of the unit at each position: [num_nodes, 2^degree], bit k of the index is neighbour k.
void build_tables_kernel(const TableModel& m, float beta, uint8_t* table) {
  constexpr int kParts = 16 / kLanes, kVectors = kParts < 4 ? 4 : kParts;
  const VecF scale = splat(m.scale);
  for (int64_t pos = 0; pos < m.graph.num_nodes; ++pos) {
    const int32_t* c = m.coupling + pos * m.degree;
    const VecF bias = splat(m.bias[m.graph.order[pos]]);
    int32_t low[16] = {0};
    for (int i = 1; i < 16; ++i) low[i] = low[i & (i - 1)] + c[__builtin_ctz(uint32_t(i))];
    const int rows = 1 << (m.degree - 4);
    for (int first = 0; first < rows * kParts; first += kVectors) {
      VecF logits[kVectors];
      VecU thresholds[kVectors];
      for (int k = 0; k < kVectors; ++k) {
        int32_t offset = 0;
        for (int bit = 0; bit < m.degree - 4; ++bit) offset += (first + k) / kParts >> bit & 1 ? c[4 + bit] : 0;
        logits[k] = block_logit(load<VecI>(low + (first + k) % kParts * kLanes) + offset, scale, bias, beta, nullptr);
      }
      threshold_vectors(logits, thresholds);
      for (int k = 0; k < kVectors && first + k < rows * kParts; ++k) {
        const VecU high = thresholds[k] >> 24;
        for (int l = 0; l < kLanes; ++l) table[(first + k) * kLanes + l] = uint8_t(high[l]);
      }
    }
    table += rows * 16;
  }
}

// A block's states as this instruction set looks them up: bits are masks with AVX-512, bytes are vectors of masks with AVX2.
#if GIBBS_VECTOR_BYTES == 64

struct TableStates {
  explicit TableStates(const TableModel&, const TableBlock& b) : bits(b.state) {}
  void finish(const TableModel&, const TableBlock&) {}
  int32_t mask(int64_t node, int bit) const { return -int32_t(bits[node] >> bit & 1); }
  void add(int64_t node, int bit, bool one) { bits[node] |= uint64_t{one} << bit; }
  uint64_t* bits;
};

template <int kDegree>
inline __m512i look_up(const uint8_t* table, __m512i index, const __mmask64* high) {
  if constexpr (kDegree == 4) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), index);
  } else {
    const __m512i zero = look_up<kDegree - 1>(table, index, high);
    const __m512i one = look_up<kDegree - 1>(table + (1 << (kDegree - 1)), index, high);
    return _mm512_mask_blend_epi8(high[kDegree - 5], zero, one);
  }
}

// Draws a unit of all chains but those in `keep`; returns the ties.
template <int kDegree>
inline uint64_t update_by_table(TableStates& s, int64_t node, const int32_t* neighbors, const uint8_t* table, const uint8_t* bytes,
                                uint64_t keep) {
  __mmask64 high[kMaxTableDegree - kMinTableDegree + 1];
  __m512i index = _mm512_maskz_set1_epi8(s.bits[neighbors[0]], 1);
  index = _mm512_mask_add_epi8(index, s.bits[neighbors[1]], index, _mm512_set1_epi8(2));
  index = _mm512_mask_add_epi8(index, s.bits[neighbors[2]], index, _mm512_set1_epi8(4));
  index = _mm512_mask_add_epi8(index, s.bits[neighbors[3]], index, _mm512_set1_epi8(8));
  for (int k = 4; k < kDegree; ++k) high[k - 4] = s.bits[neighbors[k]];
  const __m512i threshold = look_up<kDegree>(table, index, high), byte = _mm512_loadu_si512(bytes);
  const uint64_t ones = _mm512_cmplt_epu8_mask(byte, threshold);
  s.bits[node] = (ones & ~keep) | (s.bits[node] & keep);
  return _mm512_cmpeq_epi8_mask(byte, threshold) & ~keep;
}

#else

struct TableStates {
  TableStates(const TableModel& m, const TableBlock& b) : bytes(b.state_bytes) {
    const __m256i spread =
        _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i bit_of_byte = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    for (int64_t node = 0; node <= m.graph.num_nodes; ++node)
      for (int half = 0; half < 2; ++half) {
        const __m256i word = _mm256_set1_epi32(int32_t(b.state[node] >> (32 * half)));
        const __m256i bits = _mm256_and_si256(_mm256_shuffle_epi8(word, spread), bit_of_byte);
        _mm256_storeu_si256((__m256i*)(bytes + node * kTableChains + 32 * half), _mm256_cmpeq_epi8(bits, bit_of_byte));
      }
  }
  void finish(const TableModel& m, const TableBlock& b) {
    for (int64_t node = 0; node < m.graph.num_nodes; ++node) b.state[node] = word(node);
  }
  uint64_t word(int64_t node) const {
    const __m256i* at = (const __m256i*)(bytes + node * kTableChains);
    return uint32_t(_mm256_movemask_epi8(_mm256_loadu_si256(at))) |
           uint64_t{uint32_t(_mm256_movemask_epi8(_mm256_loadu_si256(at + 1)))} << 32;
  }
  int32_t mask(int64_t node, int bit) const { return int8_t(bytes[node * kTableChains + bit]); }
  void add(int64_t node, int bit, bool one) { bytes[node * kTableChains + bit] |= uint8_t(-int(one)); }
  uint8_t* bytes;
};

template <int kDegree>
inline __m256i look_up(const uint8_t* table, __m256i index, const __m256i* high) {
  if constexpr (kDegree == 4) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table)), index);
  } else {
    const __m256i zero = look_up<kDegree - 1>(table, index, high);
    const __m256i one = look_up<kDegree - 1>(table + (1 << (kDegree - 1)), index, high);
    return _mm256_blendv_epi8(zero, one, high[kDegree - 5]);
  }
}

template <int kDegree>
inline uint64_t update_by_table(TableStates& s, int64_t node, const int32_t* neighbors, const uint8_t* table, const uint8_t* bytes,
                                uint64_t keep) {
  const uint64_t before = keep ? s.word(node) : 0;
  uint64_t equal = 0;
  for (int half = 0; half < 2; ++half) {
    const auto load_mask = [&](int64_t n) { return _mm256_loadu_si256((const __m256i*)(s.bytes + n * kTableChains + 32 * half)); };
    __m256i high[kMaxTableDegree - kMinTableDegree + 1];
    const __m256i low = _mm256_or_si256(_mm256_and_si256(load_mask(neighbors[0]), _mm256_set1_epi8(1)),
                                        _mm256_and_si256(load_mask(neighbors[1]), _mm256_set1_epi8(2)));
    const __m256i upper = _mm256_or_si256(_mm256_and_si256(load_mask(neighbors[2]), _mm256_set1_epi8(4)),
                                          _mm256_and_si256(load_mask(neighbors[3]), _mm256_set1_epi8(8)));
    for (int k = 4; k < kDegree; ++k) high[k - 4] = load_mask(neighbors[k]);
    const __m256i threshold = look_up<kDegree>(table, _mm256_or_si256(low, upper), high);
    const __m256i byte = _mm256_loadu_si256((const __m256i*)(bytes + 32 * half));
    const __m256i at_least = _mm256_cmpeq_epi8(_mm256_max_epu8(byte, threshold), byte);
    equal |= uint64_t{uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(byte, threshold)))} << (32 * half);
    _mm256_storeu_si256((__m256i*)(s.bytes + node * kTableChains + 32 * half), _mm256_andnot_si256(at_least, _mm256_set1_epi8(-1)));
  }
  for (uint64_t rest = keep; rest; rest &= rest - 1) {
    const int bit = __builtin_ctzll(rest);
    s.bytes[node * kTableChains + bit] = before >> bit & 1 ? 0xff : 0;
  }
  return equal & ~keep;
}

#endif

// Units whose high byte equals their threshold's, one in 256: their bits are 0 until, at the end of their colour, vectors of them draw
// low bits and compute whole thresholds. No unit of the colour depends on them.
template <int kDegree>
class Ties {
 public:
  Ties(const TableModel& m, const TableBlock& b, TableStates& states) : m_(m), b_(b), states_(states) {}
  void begin(float beta, uint64_t sweep) {
    beta_ = beta;
    for (int bit = 0; bit < kTableChains; ++bit) {
      const RandomStream s = random_stream(m_.seed, b_.number[chain_of_byte(bit)], sweep);
      c1_[bit] = s.c1, c2_ = s.c2, c3_[bit] = s.c3;
    }
  }
  // Whether there is a tie is anybody's guess, so nothing branches on it.
  void add(int64_t pos, uint64_t bits) {
    b_.ties[count_] = {bits, pos};
    count_ += bits != 0;
  }
  void decide() {
    alignas(64) int32_t node[kLanes] = {}, bit[kLanes] = {}, sum[kLanes] = {};
    alignas(64) float bias[kLanes] = {};
    PickedLanes picked;
    int lanes = 0;
    const auto decide_lanes = [&] {
      const VecF logit = block_logit(load<VecI>(sum), splat(m_.scale), load<VecF>(bias), beta_, nullptr);
      const VecU low = picked.low_bits(c2_, uint32_t(m_.seed), uint32_t(m_.seed >> 32));
      alignas(64) int32_t one[kLanes];
      store(one, (VecI)(low < (threshold_vector(logit) & 0xffffff)));
      for (int l = 0; l < lanes; ++l) states_.add(node[l], bit[l], one[l]);
      lanes = 0;
    };
    for (int64_t t = 0; t < count_; ++t) {
      const int64_t pos = b_.ties[t].position, n = m_.graph.order[pos];
      const int32_t *neighbors = m_.neighbors + pos * kDegree, *coupling = m_.coupling + pos * kDegree;
      for (uint64_t bits = b_.ties[t].bits; bits; bits &= bits - 1) {
        const int l = lanes;
        node[l] = int32_t(n);
        bit[l] = __builtin_ctzll(bits);
        picked.set(l, n, c1_[bit[l]], c3_[bit[l]]);
        bias[l] = m_.bias[n];
        int32_t total = 0;
        for (int k = 0; k < kDegree; ++k) total += states_.mask(neighbors[k], bit[l]) & coupling[k];
        sum[l] = total;
        if (++lanes == kLanes) decide_lanes();
      }
    }
    if (lanes) decide_lanes();
    count_ = 0;
  }

 private:
  const TableModel& m_;
  const TableBlock& b_;
  TableStates& states_;
  float beta_ = 0;
  int64_t count_ = 0;
  uint32_t c2_ = 0, c1_[kTableChains], c3_[kTableChains];
};

template <int kDegree>
void sweep_tables_of(const TableModel& m, const uint8_t* table, float beta, uint64_t first_sweep, int64_t num_sweeps,
                     const TableBlock& b, const StopCheck& check) {
  const GraphView& g = m.graph;
  TableStates states(m, b);
  Ties<kDegree> ties(m, b, states);
  for (int64_t sweep = 0; sweep < num_sweeps; ++sweep) {
    if (check.stop(check.context)) return;
    draw_table_bytes(m.seed, b.number, first_sweep + uint64_t(sweep), g.num_nodes, b.bytes);
    ties.begin(beta, first_sweep + uint64_t(sweep));
    for (int64_t color = 0; color < g.num_colors; ++color) {
      for (int64_t pos = g.color_offsets[color]; pos < g.color_offsets[color + 1]; ++pos) {
        const int64_t node = g.order[pos];
        ties.add(pos, update_by_table<kDegree>(states, node, m.neighbors + pos * kDegree, table + (pos << kDegree),
                                               b.bytes + node * kTableChains, b.clamp ? b.clamp[node] : 0));
      }
      ties.decide();
    }
  }
  states.finish(m, b);
}
void sweep_tables_kernel(const TableModel& m, const uint8_t* table, float beta, uint64_t first_sweep, int64_t num_sweeps,
                         const TableBlock& b, const StopCheck& check) {
  static_assert(kMinTableDegree == 4 && kMaxTableDegree == 8);
  if (m.degree == 4) sweep_tables_of<4>(m, table, beta, first_sweep, num_sweeps, b, check);
  if (m.degree == 5) sweep_tables_of<5>(m, table, beta, first_sweep, num_sweeps, b, check);
  if (m.degree == 6) sweep_tables_of<6>(m, table, beta, first_sweep, num_sweeps, b, check);
  if (m.degree == 7) sweep_tables_of<7>(m, table, beta, first_sweep, num_sweeps, b, check);
  if (m.degree == 8) sweep_tables_of<8>(m, table, beta, first_sweep, num_sweeps, b, check);
}

#endif
