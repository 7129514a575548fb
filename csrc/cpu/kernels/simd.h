// SPDX-License-Identifier: Apache-2.0
// No include guard: included once in each instruction set's translation unit, inside namespace gibbs::GIBBS_ISA and its target
// pragma. GCC's and Clang's generic vectors carry the arithmetic; the few operations they lack are intrinsics with a portable twin.
// GIBBS_VECTOR_BYTES is 16 (baseline), 32 (AVX2) or 64 (AVX-512).

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(GIBBS_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
using VecF = Vec<float>;
using VecI = Vec<int32_t>;
using VecU = Vec<uint32_t>;

constexpr int kLanes = GIBBS_VECTOR_BYTES / 4;
template <class T>
constexpr int lanes_of = GIBBS_VECTOR_BYTES / int(sizeof(T));

template <class V, class T>
inline V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
inline void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}
// The first `count` elements (0 < count), then zeros; reads no more than those.
template <class T>
inline Vec<T> load_part(const T* p, int64_t count) {
  if (count >= lanes_of<T>) return load<Vec<T>>(p);
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p);
#endif
  Vec<T> v = {};
  for (int64_t l = 0; l < count; ++l) v[l] = p[l];
  return v;
}
template <class T>
inline void store_part(T* p, Vec<T> v, int64_t count) {
  if (count >= lanes_of<T>) return store(p, v);
  for (int64_t l = 0; l < count; ++l) p[l] = v[l];
}
template <class To, class From>
inline To bit_cast(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  __builtin_memcpy(&out, &v, sizeof out);
  return out;
}
inline VecF to_float(VecI v) { return __builtin_convertvector(v, VecF); }

// kLanes integers of 32 or 16 bits, and back. (GCC 12 makes two halves of the generic conversion.)
typedef int16_t VecShort __attribute__((vector_size(GIBBS_VECTOR_BYTES / 2)));
inline VecI widen(const int32_t* p) { return load<VecI>(p); }
inline VecI widen(const int16_t* p) {
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
  return (VecI)_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif GIBBS_X86 && GIBBS_VECTOR_BYTES == 32
  return (VecI)_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  return __builtin_convertvector(load<VecShort>(p), VecI);
#endif
}
inline void store_integers(int32_t* p, VecI v) { store(p, v); }
inline void store_integers(int16_t* p, VecI v) {  // values of 16 bits
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)v));
#elif GIBBS_X86 && GIBBS_VECTOR_BYTES == 32
  const __m256i packed = _mm256_packs_epi32((__m256i)v, (__m256i)v);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  store(p, __builtin_convertvector(v, VecShort));
#endif
}

// Truncation of 0 <= v <= 2^31 to unsigned.
inline VecU truncate_to_unsigned(VecF v) {
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
  return (VecU)_mm512_cvttps_epu32((__m512)v);
#elif GIBBS_X86 && GIBBS_VECTOR_BYTES == 32
  return (VecU)_mm256_cvttps_epi32((__m256)v);  // 2^31 gives 0x80000000, which is 2^31 unsigned
#elif GIBBS_X86
  return (VecU)_mm_cvttps_epi32((__m128)v);
#else
  return __builtin_convertvector(v, VecU);
#endif
}

// To the nearest integer, ties to even (the default rounding mode).
inline VecI round_to_int(VecF v) {
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
  return (VecI)_mm512_cvtps_epi32((__m512)v);
#elif GIBBS_X86 && GIBBS_VECTOR_BYTES == 32
  return (VecI)_mm256_cvtps_epi32((__m256)v);
#elif GIBBS_X86
  return (VecI)_mm_cvtps_epi32((__m128)v);
#else
  VecI out;
  for (int l = 0; l < kLanes; ++l) out[l] = int32_t(__builtin_rintf(v[l]));
  return out;
#endif
}

// Products of the even 32-bit lanes as 64-bit lanes.
inline Vec<uint64_t> multiply_even(VecU a, VecU b) {
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
  return (Vec<uint64_t>)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif GIBBS_X86 && GIBBS_VECTOR_BYTES == 32
  return (Vec<uint64_t>)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif GIBBS_X86
  return (Vec<uint64_t>)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return ((Vec<uint64_t>)a & 0xffffffffu) * ((Vec<uint64_t>)b & 0xffffffffu);
#endif
}

// Bit l of less / equal: byte l of `bytes` against the top byte of thresholds[l], l < 32.
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

// Philox for kLanes consecutive groups. Counters are kept as 64-bit lanes (even and odd ones apart), of which a widening multiply
// reads the low halves only: no lane has to be moved between rounds.
struct PhiloxVectors {
  VecU word[4];
};
inline void philox_rounds(VecU& c0, VecU& c1, VecU& c2, VecU& c3, uint32_t k0, uint32_t k1) {
  const VecU m0 = splat(kPhiloxMultiplier0), m1 = splat(kPhiloxMultiplier1);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Vec<uint64_t> p0 = multiply_even(c0, m0), p1 = multiply_even(c2, m1);
    c0 = (VecU)(p1 >> 32) ^ c1 ^ splat(k0);
    c2 = (VecU)(p0 >> 32) ^ c3 ^ splat(k1);
    c1 = (VecU)p1;
    c3 = (VecU)p0;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
}
inline PhiloxVectors philox_of_halves(VecU (&even)[4], VecU (&odd)[4], uint32_t k0, uint32_t k1) {
  philox_rounds(even[0], even[1], even[2], even[3], k0, k1);
  philox_rounds(odd[0], odd[1], odd[2], odd[3], k0, k1);
  PhiloxVectors out;
  for (int q = 0; q < 4; ++q) out.word[q] = (VecU)(((Vec<uint64_t>)even[q] & 0xffffffffu) | ((Vec<uint64_t>)odd[q] << 32));
  return out;
}
inline VecU odd_lanes(VecU v) { return (VecU)((Vec<uint64_t>)v >> 32); }
// The groups of one chain.
inline PhiloxVectors philox_vectors(const RandomStream& s, VecU groups) {
  VecU even[4] = {groups, splat(s.c1), splat(s.c2), splat(s.c3)};
  VecU odd[4] = {odd_lanes(groups), even[1], even[2], even[3]};
  return philox_of_halves(even, odd, s.k0, s.k1);
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
inline PhiloxVectors philox_lanes(const LaneStreams& s, VecU groups) {
  VecU even[4] = {groups, s.c1, splat(s.c2), s.c3};
  VecU odd[4] = {odd_lanes(groups), odd_lanes(s.c1), even[2], odd_lanes(s.c3)};
  return philox_of_halves(even, odd, s.k0, s.k1);
}

inline bool any_equal(VecU a, VecU b) {
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
  return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b);
#elif GIBBS_X86 && GIBBS_VECTOR_BYTES == 32
  return _mm256_movemask_epi8(_mm256_cmpeq_epi32((__m256i)a, (__m256i)b));
#elif GIBBS_X86
  return _mm_movemask_epi8(_mm_cmpeq_epi32((__m128i)a, (__m128i)b));
#else
  const VecI equal = a == b;
  int32_t found = 0;
  for (int l = 0; l < kLanes; ++l) found |= equal[l];
  return found;
#endif
}
