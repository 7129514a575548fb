// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. Binary sweeps of a group of 64 chains whose probabilities are looked up in tables.

#if GIBBS_X86 && GIBBS_VECTOR_BYTES >= 32

constexpr int kTableVectors = kTableGroup / kLanes;
constexpr int kTableHalf = 4 * kLanes;  // chains whose bytes fill a vector

// The chain whose bytes stand at byte p of the vectors: draw_table_bytes leaves four vectors of words interleaved.
inline int chain_of_byte(int p) { return p / kTableHalf * kTableHalf + p % 4 * kLanes + p % kTableHalf / 4; }
int chain_of_table_bit_kernel(int bit) { return chain_of_byte(bit); }

// Draws the high bytes [num_nodes, 64] of all units. Four vectors of words hold four units' bytes of 4 kLanes chains; transposing
// the bytes within each lane separates the units.
inline void draw_table_bytes(uint64_t seed, const uint64_t* chains, uint64_t sweep, int64_t num_nodes, uint8_t* bytes) {
  LaneStreams streams[kTableVectors];
  for (int v = 0; v < kTableVectors; ++v) streams[v] = lane_streams(seed, chains + v * kLanes, sweep);
  constexpr uint32_t kEven = 0x00ff00ff;
  for (int64_t counter = 0; counter < high_byte_counters(num_nodes); ++counter) {
    const int64_t first = first_unit_of(counter);
    if (first >= num_nodes) continue;
    for (int half = 0; half < kTableGroup / kTableHalf; ++half) {
      PhiloxVectors r[4];
      philox_of_chains(streams + half * 4, uint32_t(counter), r);
      for (int q = 0; q < 4; ++q) {
        const VecU a = r[0].word[q], b = r[1].word[q], c = r[2].word[q], d = r[3].word[q];
        const VecU ab_even = (a & kEven) | (b & kEven) << 8, ab_odd = (a >> 8 & kEven) | (b & ~kEven);
        const VecU cd_even = (c & kEven) | (d & kEven) << 8, cd_odd = (c >> 8 & kEven) | (d & ~kEven);
        uint8_t* out = bytes + (first + 32 * q) * kTableGroup + half * kTableHalf;
        store(out, (ab_even & 0xffff) | cd_even << 16);
        store(out + kTableGroup, (ab_odd & 0xffff) | cd_odd << 16);
        store(out + 2 * kTableGroup, ab_even >> 16 | (cd_even & 0xffff0000));
        store(out + 3 * kTableGroup, ab_odd >> 16 | (cd_odd & 0xffff0000));
      }
    }
  }
}

// Tabulates the high bytes of the thresholds of the units at positions first .. last - 1, of [num_nodes, 2^degree]: bit k of the
// index is neighbour k.
void build_tables_kernel(const TableModel& m, float beta, int64_t first, int64_t last, uint8_t* table) {
  constexpr int kParts = 16 / kLanes, kVectors = kParts < 4 ? 4 : kParts;
  const VecF scale = splat(m.scale);
  table += first << m.degree;
  for (int64_t pos = first; pos < last; ++pos) {
    const int32_t* c = m.coupling + pos * m.degree;
    const VecF bias = splat(m.bias[m.graph.order[pos]]);
    int32_t low[16] = {0};
    for (int i = 1; i < 16; ++i) low[i] = low[i & (i - 1)] + c[__builtin_ctz(uint32_t(i))];
    const int rows = 1 << (m.degree - 4);
    for (int begin = 0; begin < rows * kParts; begin += kVectors) {
      VecF logits[kVectors];
      VecU thresholds[kVectors];
      for (int k = 0; k < kVectors; ++k) {
        int32_t offset = 0;
        for (int bit = 0; bit < m.degree - 4; ++bit) offset += (begin + k) / kParts >> bit & 1 ? c[4 + bit] : 0;
        logits[k] = group_logit(load<VecI>(low + (begin + k) % kParts * kLanes) + offset, scale, bias, beta, nullptr);
      }
      threshold_vectors(logits, thresholds);
      for (int k = 0; k < kVectors && begin + k < rows * kParts; ++k) {
        const VecU high = thresholds[k] >> 24;
        for (int l = 0; l < kLanes; ++l) table[(begin + k) * kLanes + l] = uint8_t(high[l]);
      }
    }
    table += rows * 16;
  }
}

// A group's states in the form that lookups need: masks of bits with AVX-512, vectors of bytes with AVX2.
#if GIBBS_VECTOR_BYTES == 64

struct TableStates {
  explicit TableStates(const TableModel&, const TableGroup& b) : bits(b.state) {}
  void finish(const TableModel&, const TableGroup&) {}
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
  TableStates(const TableModel& m, const TableGroup& b) : bytes(b.state_bytes) {
    const __m256i spread =
        _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i bit_of_byte = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    for (int64_t node = 0; node <= m.graph.num_nodes; ++node)
      for (int half = 0; half < 2; ++half) {
        const __m256i word = _mm256_set1_epi32(int32_t(b.state[node] >> (32 * half)));
        const __m256i bits = _mm256_and_si256(_mm256_shuffle_epi8(word, spread), bit_of_byte);
        _mm256_storeu_si256((__m256i*)(bytes + node * kTableGroup + 32 * half), _mm256_cmpeq_epi8(bits, bit_of_byte));
      }
  }
  void finish(const TableModel& m, const TableGroup& b) {
    for (int64_t node = 0; node < m.graph.num_nodes; ++node) b.state[node] = word(node);
  }
  uint64_t word(int64_t node) const {
    const __m256i* at = (const __m256i*)(bytes + node * kTableGroup);
    return uint32_t(_mm256_movemask_epi8(_mm256_loadu_si256(at))) |
           uint64_t{uint32_t(_mm256_movemask_epi8(_mm256_loadu_si256(at + 1)))} << 32;
  }
  int32_t mask(int64_t node, int bit) const { return int8_t(bytes[node * kTableGroup + bit]); }
  void add(int64_t node, int bit, bool one) { bytes[node * kTableGroup + bit] |= uint8_t(-int(one)); }
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
    const auto load_mask = [&](int64_t n) { return _mm256_loadu_si256((const __m256i*)(s.bytes + n * kTableGroup + 32 * half)); };
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
    _mm256_storeu_si256((__m256i*)(s.bytes + node * kTableGroup + 32 * half), _mm256_andnot_si256(at_least, _mm256_set1_epi8(-1)));
  }
  for (uint64_t rest = keep; rest; rest &= rest - 1) {
    const int bit = __builtin_ctzll(rest);
    s.bytes[node * kTableGroup + bit] = before >> bit & 1 ? 0xff : 0;
  }
  return equal & ~keep;
}

#endif

// Units whose high byte equals their threshold's, one in 256. Their bits stay 0 until the end of their colour, none of whose units
// depends on them; then vectors of them draw low bits and compute whole thresholds.
template <int kDegree>
class Ties {
 public:
  Ties(const TableModel& m, const TableGroup& b, TableStates& states) : m_(m), b_(b), states_(states) {}
  void begin(float beta, uint64_t sweep) {
    beta_ = beta;
    for (int bit = 0; bit < kTableGroup; ++bit) {
      const RandomStream s = random_stream(m_.seed, b_.number[chain_of_byte(bit)], sweep);
      c1_[bit] = s.c1, c2_ = s.c2, c3_[bit] = s.c3;
    }
  }
  // Ties are unpredictable, so this appends without a branch.
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
      const VecF logit = group_logit(load<VecI>(sum), splat(m_.scale), load<VecF>(bias), beta_, nullptr);
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
  const TableGroup& b_;
  TableStates& states_;
  float beta_ = 0;
  int64_t count_ = 0;
  uint32_t c2_ = 0, c1_[kTableGroup], c3_[kTableGroup];
};

template <int kDegree>
void sweep_tables_of(const TableModel& m, const uint8_t* table, float beta, uint64_t first_sweep, int64_t num_sweeps,
                     const TableGroup& b, const StopCheck& check) {
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
                                               b.bytes + node * kTableGroup, b.clamp ? b.clamp[node] : 0));
      }
      ties.decide();
    }
  }
  states.finish(m, b);
}
void sweep_tables_kernel(const TableModel& m, const uint8_t* table, float beta, uint64_t first_sweep, int64_t num_sweeps,
                         const TableGroup& b, const StopCheck& check) {
  static_assert(kMinTableDegree == 4 && kMaxTableDegree == 8);
  if (m.degree == 4) sweep_tables_of<4>(m, table, beta, first_sweep, num_sweeps, b, check);
  if (m.degree == 5) sweep_tables_of<5>(m, table, beta, first_sweep, num_sweeps, b, check);
  if (m.degree == 6) sweep_tables_of<6>(m, table, beta, first_sweep, num_sweeps, b, check);
  if (m.degree == 7) sweep_tables_of<7>(m, table, beta, first_sweep, num_sweeps, b, check);
  if (m.degree == 8) sweep_tables_of<8>(m, table, beta, first_sweep, num_sweeps, b, check);
}

#endif
