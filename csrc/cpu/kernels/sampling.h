// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. Random words, thresholds and acceptances (core/philox.h, core/threshold.h) by the
// vector.

// ---- random words ---------------------------------------------------------------------------------------------------------------

// Philox for kLanes counters. They are kept as 64-bit lanes, even and odd ones apart: a widening multiply reads only the low
// halves, so no lane has to be moved between rounds. A processor looks ahead by less than the rounds of two halves, so those of
// several vectors go step by step.
struct PhiloxVectors {
  VecU word[4];
};
template <int kHalves>
__attribute__((always_inline)) inline void philox_rounds(VecU (&c)[kHalves][4], uint32_t k0, uint32_t k1) {
  const VecU m0 = splat(kPhiloxMultiplier0), m1 = splat(kPhiloxMultiplier1);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const VecU key0 = splat(k0), key1 = splat(k1);
#pragma GCC unroll 4
    for (int h = 0; h < kHalves; ++h) {
      const Vec<uint64_t> p0 = multiply_even(c[h][0], m0), p1 = multiply_even(c[h][2], m1);
      c[h][0] = (VecU)(p1 >> 32) ^ c[h][1] ^ key0;
      c[h][2] = (VecU)(p0 >> 32) ^ c[h][3] ^ key1;
      c[h][1] = (VecU)p1;
      c[h][3] = (VecU)p0;
    }
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
}
inline VecU odd_lanes(VecU v) { return (VecU)((Vec<uint64_t>)v >> 32); }
// counters: the four words of kCount vectors
template <int kCount>
__attribute__((always_inline)) inline void philox_of(const VecU (&counters)[kCount][4], uint32_t k0, uint32_t k1,
                                                     PhiloxVectors* out) {
  VecU halves[2 * kCount][4];
#pragma GCC unroll 2
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) halves[2 * i][q] = counters[i][q], halves[2 * i + 1][q] = odd_lanes(counters[i][q]);
  philox_rounds(halves, k0, k1);
#pragma GCC unroll 2
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) out[i].word[q] = of_even_lanes(halves[2 * i][q], halves[2 * i + 1][q]);
}
// As many vectors as registers have room for.
constexpr int kPhiloxAtOnce = GIBBS_VECTOR_BYTES == 64 ? 2 : 1;

// Counters of one chain.
template <int kCount>
inline void philox_vectors(const RandomStream& s, const VecU (&counters)[kCount], PhiloxVectors* out) {
  VecU words[kCount][4];
  for (int i = 0; i < kCount; ++i)
    words[i][0] = counters[i], words[i][1] = splat(s.c1), words[i][2] = splat(s.c2), words[i][3] = splat(s.c3);
  philox_of(words, s.k0, s.k1, out);
}

// A chain in each lane.
struct LaneStreams {
  VecU c1, c3;
  uint32_t c2, k0, k1;
};
inline LaneStreams lane_streams(uint64_t seed, const uint64_t* chains, uint64_t sweep) {
  const RandomStream s = random_stream(seed, 0, sweep);
  LaneStreams out = {{}, {}, s.c2, s.k0, s.k1};
  for (int l = 0; l < kLanes; ++l) {
    const RandomStream of_chain = random_stream(seed, chains[l], sweep);
    out.c1[l] = of_chain.c1;
    out.c3[l] = of_chain.c3;
  }
  return out;
}
// Vectors of chains, which have the seed and the sweep in common.
template <int kCount>
inline void philox_lanes(const LaneStreams* const (&s)[kCount], const VecU (&counters)[kCount], PhiloxVectors* out) {
  VecU words[kCount][4];
  for (int i = 0; i < kCount; ++i)
    words[i][0] = counters[i], words[i][1] = s[i]->c1, words[i][2] = splat(s[0]->c2), words[i][3] = s[i]->c3;
  philox_of(words, s[0]->k0, s[0]->k1, out);
}
inline PhiloxVectors philox_lanes(const LaneStreams& s, VecU counters) {
  PhiloxVectors out;
  philox_lanes({&s}, {counters}, &out);
  return out;
}
// The vectors of chains s[0 .. kCount - 1] at one counter.
template <int kCount>
inline void philox_of_chains(const LaneStreams* s, uint32_t counter, PhiloxVectors (&out)[kCount]) {
  for (int i = 0; i < kCount; i += kPhiloxAtOnce)
    if constexpr (kPhiloxAtOnce == 2)
      philox_lanes({s + i, s + i + 1}, {splat(counter), splat(counter)}, out + i);
    else
      philox_lanes({s + i}, {splat(counter)}, out + i);
}
// A vector of chains at counters first, first + 1, ..
inline void philox_of_counters(const LaneStreams& s, uint32_t first, PhiloxVectors (&out)[kPhiloxAtOnce]) {
  if constexpr (kPhiloxAtOnce == 2)
    philox_lanes({&s, &s}, {splat(first), splat(first + 1)}, out);
  else
    philox_lanes({&s}, {splat(first)}, out);
}

#if GIBBS_X86 && GIBBS_VECTOR_BYTES >= 32
// The low 24 random bits of a vector of units and chains that are picked one by one.
struct PickedLanes {
  // Lane l: the word of `unit` in the chain with these counter words.
  void set(int l, int64_t unit, uint32_t of_c1, uint32_t of_c3) {
    counter[l] = kLowPlane | uint32_t((unit >> 5) * 8 + (unit & 7));
    word[l] = int32_t(unit >> 3 & 3);
    c1[l] = of_c1, c3[l] = of_c3;
  }
  VecU low_bits(uint32_t c2, uint32_t k0, uint32_t k1) const {
    const PhiloxVectors r = philox_lanes({load<VecU>(c1), load<VecU>(c3), c2, k0, k1}, load<VecU>(counter));
    const VecI w = load<VecI>(word);
    return (w < 2 ? (w == 0 ? r.word[0] : r.word[1]) : (w == 2 ? r.word[2] : r.word[3])) & 0xffffff;
  }
  alignas(64) uint32_t counter[kLanes] = {}, c1[kLanes] = {}, c3[kLanes] = {};
  alignas(64) int32_t word[kLanes] = {};
};
#endif

// Stores the words of a vector of counters, from `at` on; out: of counter 0. The words of eight counters stand in order.
template <class Word>
inline void store_counters(const PhiloxVectors& r, int64_t at, Word* out) {
  constexpr int kPart = kLanes < 8 ? kLanes : 8, kPerWord = 4 / int(sizeof(Word));  // kPart lanes' units are consecutive
  for (int q = 0; q < 4; ++q)
    for (int part = 0; part < kLanes / kPart; ++part) {
      const int64_t first = at + part * kPart;
      __builtin_memcpy(out + ((first >> 3) * 32 + q * 8 + (first & 7)) * kPerWord, (const char*)&r.word[q] + 4 * kPart * part,
                       4 * kPart);
    }
}
inline VecU counters_from(uint32_t first) {
  VecU out;
  for (int l = 0; l < kLanes; ++l) out[l] = first + uint32_t(l);
  return out;
}
// Draws kCount vectors of counters, from first + begin on; out: of counter `first`.
template <int kCount, class Word>
inline void random_counters_at(const RandomStream& s, uint32_t first, int64_t begin, Word* out) {
  VecU counters[kCount];
  for (int i = 0; i < kCount; ++i) counters[i] = counters_from(first + uint32_t(begin) + uint32_t(i * kLanes));
  PhiloxVectors r[kCount];
  philox_vectors(s, counters, r);
  for (int i = 0; i < kCount; ++i) store_counters(r[i], begin + i * kLanes, out);
}
// Draws `count` counters, and up to kLanes - 1 more.
template <class Word>
inline void random_counters(const RandomStream& s, uint32_t first, int64_t count, Word* out) {
  constexpr int kAtOnce = kPhiloxAtOnce * kLanes;
  int64_t at = 0;
  for (; at + kAtOnce - kLanes < count; at += kAtOnce) random_counters_at<kPhiloxAtOnce>(s, first, at, out);
  for (; at < count; at += kLanes) random_counters_at<1>(s, first, at, out);
}

// High bytes of units 128 begin .. 128 end - 1, from out[0] on; up to 128 more may be written.
inline void random_bytes(const RandomStream& s, int64_t begin, int64_t end, uint8_t* out) {
  random_counters(s, uint32_t(begin * 8), (end - begin) * 8, out);
}

// High bytes of units 0 .. 128 blocks - 1 of two streams of one seed, and of up to 128 more.
inline void random_bytes_of_two(const RandomStream& s, const RandomStream& t, int64_t blocks, uint8_t* out_s, uint8_t* out_t) {
  for (int64_t at = 0; at < 8 * blocks; at += kLanes) {
    const VecU counters = counters_from(uint32_t(at));
    const VecU words[2][4] = {{counters, splat(s.c1), splat(s.c2), splat(s.c3)}, {counters, splat(t.c1), splat(t.c2), splat(t.c3)}};
    PhiloxVectors r[2];
    philox_of(words, s.k0, s.k1, r);
    store_counters(r[0], at, out_s);
    store_counters(r[1], at, out_t);
  }
}

// Whole random words of units 0 .. units - 1, in order. words, bytes: [random_bytes_capacity(units)]
inline void random_words_of(const RandomStream& s, int64_t units, uint32_t* words, uint8_t* bytes) {
  random_bytes(s, 0, (units + 127) / 128, bytes);
  random_counters(s, kLowPlane, (units + 31) / 32 * 8, words);
  for (int64_t i = 0; i < units; ++i) words[i] = uint32_t(bytes[i]) << 24 | (words[i] & 0xffffff);
}
void random_words_kernel(uint64_t seed, uint64_t chain, uint64_t sweep, int64_t units, uint32_t* words, uint8_t* bytes) {
  random_words_of(random_stream(seed, chain, sweep), units, words, bytes);
}

// ---- logits, thresholds and acceptances --------------------------------------------------------------------------------------

// As binary_logit of core/threshold.h.
inline VecF binary_logits(VecI acc, VecF scale, VecF bias, float beta) {
  return beta == 0 ? VecF{} : beta * (to_float(acc) * scale + bias);
}

// exp(-a) for 0 <= a <= kThresholdLimit, as core/threshold.h spells it out.
template <int kCount>
__attribute__((always_inline)) inline void exp_of_negatives(VecF (&a)[kCount]) {
  VecI n[kCount];
  VecF r[kCount], p[kCount];
  GIBBS_EACH n[k] = (VecI)truncate_to_unsigned(a[k] * kLog2e + 0.5f);
  GIBBS_EACH r[k] = to_float(n[k]) * kLn2High - a[k];
  GIBBS_EACH r[k] = r[k] + to_float(n[k]) * kLn2Low;
  GIBBS_EACH p[k] = r[k] * kExp0 + kExp1;
  GIBBS_EACH p[k] = p[k] * r[k] + kExp2;
  GIBBS_EACH p[k] = p[k] * r[k] + kExp3;
  GIBBS_EACH p[k] = p[k] * r[k] + kExp4;
  GIBBS_EACH p[k] = p[k] * r[k] + kExp5;
  GIBBS_EACH p[k] = p[k] * (r[k] * r[k]);
  GIBBS_EACH p[k] = p[k] + r[k];
  GIBBS_EACH p[k] = p[k] + 1.0f;
  GIBBS_EACH a[k] = p[k] * (VecF)(((127 - n[k]) << 23) & (n[k] < 127));
}
inline VecF exp_of_negative(VecF a) {
  VecF one[1] = {a};
  exp_of_negatives(one);
  return one[0];
}
inline VecF clipped_magnitude(VecF x) {
  const VecF magnitude = bit_cast<VecF>((VecI)x & 0x7fffffff);
  return magnitude < kThresholdLimit ? magnitude : splat(kThresholdLimit);
}
template <int kCount>
__attribute__((always_inline)) inline void threshold_vectors(const VecF (&x)[kCount], VecU (&out)[kCount]) {
  VecF e[kCount];
  GIBBS_EACH e[k] = clipped_magnitude(x[k]);
  exp_of_negatives(e);
  GIBBS_EACH e[k] = e[k] / (1.0f + e[k]);
  GIBBS_EACH out[k] = truncate_to_unsigned(e[k] * 4294967296.0f);
  GIBBS_EACH out[k] = x[k] > 0.0f ? (0u - out[k]) | (VecU)(out[k] == 0) : out[k];
}
inline VecU threshold_vector(VecF x) {
  const VecF in[1] = {x};
  VecU out[1];
  threshold_vectors(in, out);
  return out[0];
}
void thresholds_kernel(const float* logits, int64_t count, uint32_t* out) {
  for (int64_t i = 0; i < count; i += kLanes) store(out + i, threshold_vector(load<VecF>(logits + i)));
}

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
    VecU acceptances[1];
    acceptance_vectors(in, acceptances);
    store(out + i, acceptances[0]);
  }
}

// Bit l of `less` and `equal` compares byte l with the high byte of thresholds[l], l < 32.
inline void compare_high_bytes(const VecU* thresholds, const uint8_t* bytes, uint32_t& less, uint32_t& equal) {
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
  const __m128i t0 = _mm512_cvtepi32_epi8(_mm512_srli_epi32((__m512i)thresholds[0], 24));
  const __m128i t1 = _mm512_cvtepi32_epi8(_mm512_srli_epi32((__m512i)thresholds[1], 24));
  const __m256i t = _mm256_inserti128_si256(_mm256_castsi128_si256(t0), t1, 1);
  const __m256i r = _mm256_loadu_si256((const __m256i*)bytes);
  less = _mm256_cmplt_epu8_mask(r, t);
  equal = _mm256_cmpeq_epi8_mask(r, t);
#elif GIBBS_X86 && GIBBS_VECTOR_BYTES == 32
  const __m256i a =
      _mm256_packus_epi32(_mm256_srli_epi32((__m256i)thresholds[0], 24), _mm256_srli_epi32((__m256i)thresholds[1], 24));
  const __m256i b =
      _mm256_packus_epi32(_mm256_srli_epi32((__m256i)thresholds[2], 24), _mm256_srli_epi32((__m256i)thresholds[3], 24));
  // the packs interleave 128-bit halves: undo that once, in dwords
  const __m256i t = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  const __m256i r = _mm256_loadu_si256((const __m256i*)bytes);
  equal = uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(r, t)));
  less = ~uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(r, t), r)));
#elif GIBBS_X86
  less = equal = 0;
  for (int half = 0; half < 2; ++half) {
    const VecU* th = thresholds + 4 * half;
    const __m128i a = _mm_packs_epi32(_mm_srli_epi32((__m128i)th[0], 24), _mm_srli_epi32((__m128i)th[1], 24));
    const __m128i b = _mm_packs_epi32(_mm_srli_epi32((__m128i)th[2], 24), _mm_srli_epi32((__m128i)th[3], 24));
    const __m128i t = _mm_packus_epi16(a, b), r = _mm_loadu_si128((const __m128i*)(bytes + 16 * half));
    equal |= uint32_t(_mm_movemask_epi8(_mm_cmpeq_epi8(r, t))) << 16 * half;
    less |= (0xffffu & ~uint32_t(_mm_movemask_epi8(_mm_cmpeq_epi8(_mm_max_epu8(r, t), r)))) << 16 * half;
  }
#else
  less = equal = 0;
  for (int l = 0; l < 32; ++l) {
    const uint32_t t = thresholds[l / kLanes][l % kLanes] >> 24;
    less |= uint32_t(bytes[l] < t) << l;
    equal |= uint32_t(bytes[l] == t) << l;
  }
#endif
}
