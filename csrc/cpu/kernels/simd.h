// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. Vectors of GIBBS_VECTOR_BYTES: 16 (baseline), 32 (AVX2) or 64 (AVX-512). GCC's and
// Clang's generic vectors carry the arithmetic; the few operations that they lack are intrinsics with a portable twin.

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
// The first `count` elements (0 < count), then zeros; nothing beyond them is read.
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
inline void store_integers(int16_t* p, VecI v) {  // each value fits in 16 bits
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

// The even lanes of two vectors, those of the second as odd lanes.
inline VecU of_even_lanes(VecU a, VecU b) {
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
  return (VecU)_mm512_mask_moveldup_ps((__m512)a, 0xaaaa, (__m512)b);
#elif GIBBS_X86 && GIBBS_VECTOR_BYTES == 32
  return (VecU)_mm256_blend_epi32((__m256i)a, _mm256_slli_epi64((__m256i)b, 32), 0xaa);
#else
  return (VecU)(((Vec<uint64_t>)a & 0xffffffffu) | ((Vec<uint64_t>)b << 32));
#endif
}

#if GIBBS_X86 && GIBBS_VECTOR_BYTES >= 32
// The elements whose bits are set, the others 0; only the former are read.
inline VecI load_where(uint32_t bits, const int32_t* p) {
#if GIBBS_VECTOR_BYTES == 64
  return (VecI)_mm512_maskz_loadu_epi32(__mmask16(bits), p);
#else
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return (VecI)_mm256_maskload_epi32(p, _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int32_t(bits)), bit), bit));
#endif
}
// Bit l: whether lane l is negative.
inline uint32_t mask_of(VecI v) {
#if GIBBS_VECTOR_BYTES == 64
  return _mm512_movepi32_mask((__m512i)v);
#else
  return uint32_t(_mm256_movemask_ps((__m256)v));
#endif
}
#endif

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

template <class V>
inline V vector_max(V a, V b) {
  return a > b ? a : b;
}
template <class T>
inline T horizontal_sum(Vec<T> v) {
  T total = 0;
  for (int l = 0; l < lanes_of<T>; ++l) total += v[l];
  return total;
}

// The same in another order.
inline float quick_sum(VecF v) {
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
  return _mm512_reduce_add_ps((__m512)v);
#elif GIBBS_X86 && GIBBS_VECTOR_BYTES == 32
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return horizontal_sum<float>(v);
#endif
}
inline double quick_sum(Vec<double> v) { return horizontal_sum<double>(v); }

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

// Takes kCount vectors step by step: the chains of operations are long, and a processor looks ahead by less than two of them.
#define GIBBS_EACH _Pragma("GCC unroll 8") for (int k = 0; k < kCount; ++k)

// The places of each byte's set bits, and their number.
struct BitPositions {
  uint8_t of[256][8] = {}, count[256] = {};
  constexpr BitPositions() {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0; bit < 8; ++bit)
        if (byte >> bit & 1) of[byte][count[byte]++] = uint8_t(bit);
  }
};
[[maybe_unused]] constexpr BitPositions kBitPositions;

// Lists the positions of a word's set bits, counted from `first`; returns the end of the list, beyond which up to 16 entries are
// overwritten. With AVX no branch depends on the bits: a misprediction for every word would cost as much as drawing it.
inline int32_t* list_bits(uint32_t word, int32_t first, int32_t* out) {
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
  const __m512i low =
      _mm512_add_epi32(_mm512_set1_epi32(first), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(__mmask16(word), low));
  out += __builtin_popcount(word & 0xffff);
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(__mmask16(word >> 16), _mm512_add_epi32(low, _mm512_set1_epi32(16))));
  return out + __builtin_popcount(word >> 16);
#elif GIBBS_X86 && GIBBS_VECTOR_BYTES == 32
  for (int byte = 0; byte < 4; ++byte, word >>= 8, first += 8) {
    const __m256i position = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)kBitPositions.of[word & 0xff]));
    _mm256_storeu_si256((__m256i*)out, _mm256_add_epi32(position, _mm256_set1_epi32(first)));
    out += kBitPositions.count[word & 0xff];
  }
  return out;
#else
  for (; word; word &= word - 1) *out++ = first + __builtin_ctz(word);
  return out;
#endif
}

// out[c][r] = in[r][c], r and c below kSquare
constexpr int kSquare = 8;
template <class E>
inline void transpose_square(const E* const (&in)[kSquare], E* const (&out)[kSquare]) {
#if GIBBS_X86 && GIBBS_VECTOR_BYTES >= 32
  if constexpr (sizeof(E) == 4) {
    __m256i row[8], pair[8], four[8];
    for (int r = 0; r < 8; ++r) row[r] = _mm256_loadu_si256((const __m256i*)in[r]);
    for (int r = 0; r < 8; r += 2) {
      pair[r] = _mm256_unpacklo_epi32(row[r], row[r + 1]);
      pair[r + 1] = _mm256_unpackhi_epi32(row[r], row[r + 1]);
    }
    for (int r = 0; r < 8; r += 4)
      for (int h = 0; h < 2; ++h) {
        four[r + 2 * h] = _mm256_unpacklo_epi64(pair[r + h], pair[r + 2 + h]);
        four[r + 2 * h + 1] = _mm256_unpackhi_epi64(pair[r + h], pair[r + 2 + h]);
      }
    for (int c = 0; c < 4; ++c) {
      _mm256_storeu_si256((__m256i*)out[c], _mm256_permute2x128_si256(four[c], four[c + 4], 0x20));
      _mm256_storeu_si256((__m256i*)out[c + 4], _mm256_permute2x128_si256(four[c], four[c + 4], 0x31));
    }
    return;
  } else if constexpr (sizeof(E) == 2) {
    __m128i row[8], pair[8], four[8];
    for (int r = 0; r < 8; ++r) row[r] = _mm_loadu_si128((const __m128i*)in[r]);
    for (int r = 0; r < 8; r += 2) {  // pair[r], pair[r + 1]: columns 0..3 and 4..7 of two rows
      pair[r] = _mm_unpacklo_epi16(row[r], row[r + 1]);
      pair[r + 1] = _mm_unpackhi_epi16(row[r], row[r + 1]);
    }
    for (int r = 0; r < 8; r += 4)
      for (int h = 0; h < 2; ++h) {  // four[r + 2h + q]: columns 4h + 2q, 4h + 2q + 1 of four rows
        four[r + 2 * h] = _mm_unpacklo_epi32(pair[r + h], pair[r + 2 + h]);
        four[r + 2 * h + 1] = _mm_unpackhi_epi32(pair[r + h], pair[r + 2 + h]);
      }
    for (int c = 0; c < 4; ++c) {
      _mm_storeu_si128((__m128i*)out[2 * c], _mm_unpacklo_epi64(four[c], four[c + 4]));
      _mm_storeu_si128((__m128i*)out[2 * c + 1], _mm_unpackhi_epi64(four[c], four[c + 4]));
    }
    return;
  }
#endif
  for (int r = 0; r < kSquare; ++r)
    for (int c = 0; c < kSquare; ++c) out[c][r] = in[r][c];
}
template <class E>
inline void transpose_square(const E* in, int64_t in_stride, E* out, int64_t out_stride) {
  const E* from[kSquare];
  E* to[kSquare];
  for (int r = 0; r < kSquare; ++r) from[r] = in + r * in_stride, to[r] = out + r * out_stride;
  transpose_square(from, to);
}
