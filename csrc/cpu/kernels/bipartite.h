// SPDX-License-Identifier: Apache-2.0
// No include guard: included once per instruction set, after cpu/kernels/simd.h, in the same namespace and under the same target pragma.

// ---- random numbers ------------------------------------------------------------------------------------------------------------

// The high bytes of the units of blocks [begin, end), 128 units each; may write one block more.
inline void random_bytes(const RandomStream& s, int64_t begin, int64_t end, uint8_t* out) {
  constexpr int kPart = kLanes < 8 ? kLanes : 8;  // lanes of one block
  VecU groups = splat(uint32_t(begin * 8));
  for (int l = 0; l < kLanes; ++l) groups[l] += uint32_t(l);
  for (int64_t g = 0; g < (end - begin) * 8; g += kLanes, groups += splat(uint32_t(kLanes))) {
    const PhiloxVectors r = philox_vectors(s, groups);
    for (int q = 0; q < 4; ++q)
      for (int part = 0; part < kLanes / kPart; ++part) {
        const int64_t at = g + part * kPart;
        __builtin_memcpy(out + (at >> 3) * 128 + q * 32 + 4 * (at & 7), (const char*)&r.word[q] + 4 * kPart * part, 4 * kPart);
      }
  }
}

// Whole random words of units 0..units, in order. words, bytes: random_bytes_capacity(units) long.
inline void random_words_of(const RandomStream& s, int64_t units, uint32_t* words, uint8_t* bytes) {
  random_bytes(s, 0, (units + 127) / 128, bytes);
  constexpr int kPart = kLanes < 8 ? kLanes : 8;
  VecU groups = splat(kLowPlane);
  for (int l = 0; l < kLanes; ++l) groups[l] += uint32_t(l);
  for (int64_t g = 0; g < (units + 31) / 32 * 8; g += kLanes, groups += splat(uint32_t(kLanes))) {
    const PhiloxVectors r = philox_vectors(s, groups);
    for (int q = 0; q < 4; ++q)
      for (int part = 0; part < kLanes / kPart; ++part) {
        const int64_t at = g + part * kPart;
        __builtin_memcpy(words + (at >> 3) * 32 + q * 8 + (at & 7), (const char*)&r.word[q] + 4 * kPart * part, 4 * kPart);
      }
  }
  for (int64_t i = 0; i < units; ++i) words[i] = uint32_t(bytes[i]) << 24 | (words[i] & 0xffffff);
}

// ---- rounding of couplings -----------------------------------------------------------------------------------------------------

template <class V>
inline V vector_max(V a, V b) {
  return a > b ? a : b;
}
inline int32_t horizontal_sum(VecI v) {
  int32_t total = 0;
  for (int l = 0; l < kLanes; ++l) total += v[l];
  return total;
}

template <class T>
struct FloatBits;
template <>
struct FloatBits<float> {
  using Int = int32_t;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr Int kExponentMask = 0xff;
};
template <>
struct FloatBits<double> {
  using Int = int64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr Int kExponentMask = 0x7ff;
};

template <class T>
inline T power_of_two(int exponent) {
  using Bits = FloatBits<T>;
  const typename Bits::Int bits = typename Bits::Int(exponent + Bits::kBias) << Bits::kMantissa;
  T out;
  __builtin_memcpy(&out, &bits, sizeof out);
  return out;
}

// One pass over a model's couplings: the largest bit pattern of |w|, which orders like |w| and puts inf and NaN on top, and the
// largest sum of |w| over a row or a column, in floating point. column_sums: [padded_row(n2)]
template <class T>
struct CouplingScan {
  typename FloatBits<T>::Int largest_bits;
  T largest_sum;
};
template <class T>
inline CouplingScan<T> scan_couplings(const CouplingView& w, T* column_sums) {
  using Int = typename FloatBits<T>::Int;
  constexpr Int kMagnitude = Int(~(Int(1) << (8 * sizeof(T) - 1)));
  Vec<Int> lane_max = {};
  CouplingScan<T> out = {0, 0};
  for (int64_t j = 0; j < w.n2; ++j) column_sums[j] = 0;
  for (int64_t i = 0; i < w.n1; ++i) {
    const T* row = (const T*)w.data + i * w.row_stride;
    Vec<T> lane_sum = {};
    T row_sum = 0;
    if (w.column_stride == 1) {
      for (int64_t j = 0; j < w.n2; j += lanes_of<T>) {
        const int64_t left_over = w.n2 - j;
        const Vec<Int> bits = bit_cast<Vec<Int>>(load_part(row + j, left_over)) & kMagnitude;
        lane_max = vector_max(lane_max, bits);
        const Vec<T> magnitude = bit_cast<Vec<T>>(bits);
        lane_sum += magnitude;
        store_part(column_sums + j, load_part(column_sums + j, left_over) + magnitude, left_over);
      }
      for (int l = 0; l < lanes_of<T>; ++l) row_sum += lane_sum[l];
    } else {
      for (int64_t j = 0; j < w.n2; ++j) {
        Int bits;
        __builtin_memcpy(&bits, row + j * w.column_stride, sizeof bits);
        bits &= kMagnitude;
        T magnitude;
        __builtin_memcpy(&magnitude, &bits, sizeof bits);
        out.largest_bits = bits > out.largest_bits ? bits : out.largest_bits;
        row_sum += magnitude;
        column_sums[j] += magnitude;
      }
    }
    out.largest_sum = row_sum > out.largest_sum ? row_sum : out.largest_sum;
  }
  for (int l = 0; l < lanes_of<T>; ++l) out.largest_bits = lane_max[l] > out.largest_bits ? lane_max[l] : out.largest_bits;
  for (int64_t j = 0; j < w.n2; ++j) out.largest_sum = column_sums[j] > out.largest_sum ? column_sums[j] : out.largest_sum;
  return out;
}

// The largest sum, over the rows and the columns, of ceil(|w| * factor): what the scale is defined by.
template <class T>
inline int64_t largest_rounded_up_sum(const CouplingView& w, T factor, int32_t* column_sums) {
  for (int64_t j = 0; j < w.n2; ++j) column_sums[j] = 0;
  int32_t largest = 0;
  for (int64_t i = 0; i < w.n1; ++i) {
    const T* row = (const T*)w.data + i * w.row_stride;
    int32_t row_sum = 0;
    for (int64_t j = 0; j < w.n2; ++j) {
      const T signed_x = row[j * w.column_stride] * factor, x = signed_x < 0 ? -signed_x : signed_x;
      int32_t q = int32_t(x);
      q += T(q) < x;
      row_sum += q;
      column_sums[j] += q;
    }
    largest = row_sum > largest ? row_sum : largest;
  }
  for (int64_t j = 0; j < w.n2; ++j) largest = column_sums[j] > largest ? column_sums[j] : largest;
  return largest;
}

// sums: [padded_row(n2)] of 8 bytes each
template <class T>
inline CouplingStatus scale_exponent_of(const CouplingView& w, void* sums, int* k, T* largest) {
  using Bits = FloatBits<T>;
  *k = kMaxScaleExponent;
  const CouplingScan<T> scan = scan_couplings<T>(w, (T*)sums);
  const auto exponent = scan.largest_bits >> Bits::kMantissa;
  __builtin_memcpy(largest, &scan.largest_bits, sizeof(T));
  if (exponent == Bits::kExponentMask) return CouplingStatus::kNonFinite;
  if (exponent == 0) return CouplingStatus::kOk;  // all zero or subnormal
  const int e = int(exponent) - Bits::kBias + 1;  // max |w| < 2^e
  if (e > 127) return CouplingStatus::kTooLarge;
  const int64_t degree = w.n1 > w.n2 ? w.n1 : w.n2;
  if (largest_scale_fits(degree, e)) return CouplingStatus::kOk;
  // The floating-point sum tells the integer one to within its rounding errors and the degree. Nearly always that settles k.
  const T factor = power_of_two<T>(coupling_sum_bits(degree) - e);
  const double sum = double(scan.largest_sum) * double(factor), slack = sum * double(degree) * (sizeof(T) == 4 ? 0x1p-23 : 0x1p-52);
  if (!(sum + slack < 0x1p40)) {  // the sum left the floating-point range
    *k = scale_exponent(largest_rounded_up_sum<T>(w, factor, (int32_t*)sums), degree, e);
    return CouplingStatus::kOk;
  }
  const int64_t low = int64_t(sum - slack), high = int64_t(sum + slack) + degree + 1;
  *k = scale_exponent(low > 0 ? low : 0, degree, e);
  if (*k != scale_exponent(high, degree, e)) *k = scale_exponent(largest_rounded_up_sum<T>(w, factor, (int32_t*)sums), degree, e);
  return CouplingStatus::kOk;
}
template <class T>
inline CouplingStatus choose_scale(const CouplingView& w, void* sums, int* k, int* shift) {
  T largest;
  const CouplingStatus status = scale_exponent_of<T>(w, sums, k, &largest);
  *shift = 0;
  if (status == CouplingStatus::kOk)
    while (__builtin_rint(double(largest) * power_of_two<double>(*k - *shift)) > 0x7fff) ++*shift;
  return status;
}
CouplingStatus scale_exponent_kernel(const CouplingView& w, void* sums, int* k, int* shift) {
  return w.is_double ? choose_scale<double>(w, sums, k, shift) : choose_scale<float>(w, sums, k, shift);
}

// out[c][r] = in[r][c] of a square block of kSquare integers a side
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

// rows[i][j] = w[i][j] * 2^exponent to the nearest integer, ties to even; columns is its transpose. No value leaves E.
template <class T>
inline int32_t rounded(T w, T factor) {
  return int32_t(__builtin_rint(double(w * factor)));
}
template <class T, class E>
inline void round_couplings_of(const CouplingView& w, int exponent, E* rows, E* columns) {
  const int64_t ld1 = padded_row(w.n1), ld2 = padded_row(w.n2);
  const T factor = power_of_two<T>(exponent);
  // 16 rows at a time: a cache line of each column
  for (int64_t begin = 0; begin < w.n1; begin += 16) {
    const int64_t end = begin + 16 < w.n1 ? begin + 16 : w.n1;
    for (int64_t i = begin; i < end; ++i) {
      const T* row = (const T*)w.data + i * w.row_stride;
      E* to = rows + i * ld2;
      int64_t j = 0;
      if constexpr (sizeof(T) == 4)
        if (w.column_stride == 1)
          for (; j < w.n2; j += kLanes) store_integers(to + j, round_to_int(load_part(row + j, w.n2 - j) * factor));
      for (; j < w.n2; ++j) to[j] = E(rounded(row[j * w.column_stride], factor));
      for (; j < ld2; ++j) to[j] = 0;
    }
    int64_t j = 0;
    if (end == begin + 16)
      for (; j + kSquare <= w.n2; j += kSquare)
        for (int64_t i = begin; i < end; i += kSquare) transpose_square(rows + i * ld2 + j, ld2, columns + j * ld1 + i, ld1);
    for (; j < w.n2; ++j)
      for (int64_t i = begin; i < begin + 16; ++i) columns[j * ld1 + i] = i < end ? rows[i * ld2 + j] : E(0);
  }
}
void round_couplings_kernel(const CouplingView& w, int k, const RoundedCoupling& out) {
  w.is_double ? round_couplings_of<double>(w, k, out.rows, out.columns) : round_couplings_of<float>(w, k, out.rows, out.columns);
}
void round_narrow_couplings_kernel(const CouplingView& w, int k, const NarrowCoupling& out) {
  w.is_double ? round_couplings_of<double>(w, k - out.shift, out.rows, out.columns)
              : round_couplings_of<float>(w, k - out.shift, out.rows, out.columns);
}

// ---- binary updates ------------------------------------------------------------------------------------------------------------

// Several vectors step by step: the chain of operations is long, and a processor looks ahead by less than two of them.
#define GIBBS_EACH _Pragma("GCC unroll 8") for (int k = 0; k < kCount; ++k)

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

// What every unit of one half-sweep shares.
struct HalfSweep {
  int64_t n, first_unit;
  float beta, scale;
  RandomStream random;
};

template <bool kAnnealed>
inline VecF logit_vector(const int32_t* acc, const float* bias, const float* base_bias, float beta, float scale) {
  const VecF logit = beta == 0 ? VecF{} : beta * (to_float(load<VecI>(acc)) * scale + load<VecF>(bias));
  if constexpr (kAnnealed) return logit + (1.0f - beta) * load<VecF>(base_bias);
  return logit;
}

// New bits of units i .. i + 31 of one side of one chain. bytes[i]: high random byte of unit i of the side.
template <bool kAnnealed>
inline uint32_t sample_word(const HalfSweep& h, int64_t i, const int32_t* acc, const float* bias, const float* base_bias,
                            const uint8_t* bytes, const uint32_t* clamp, const uint32_t* bits) {
  constexpr int kVectors = 32 / kLanes;
  VecF logits[kVectors];
  VecU thresholds[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = i + v * kLanes;
    logits[v] = logit_vector<kAnnealed>(acc + at, bias + at, kAnnealed ? base_bias + at : nullptr, h.beta, h.scale);
  }
  threshold_vectors(logits, thresholds);
  uint32_t less, equal;
  compare_high_bytes(thresholds, bytes + i, less, equal);
  const uint32_t valid = h.n - i >= 32 ? 0xffffffffu : (1u << (h.n - i)) - 1;
  for (equal &= valid; equal; equal &= equal - 1) {  // one unit in 256: draw the low bits
    const int l = __builtin_ctz(equal);
    uint32_t low_threshold;
    __builtin_memcpy(&low_threshold, (const char*)thresholds + 4 * l, 4);
    less |= uint32_t(random_low_bits(h.random, uint32_t(h.first_unit + i + l)) < (low_threshold & 0xffffff)) << l;
  }
  less &= valid;
  return clamp ? (less & ~clamp[i / 32]) | (bits[i / 32] & clamp[i / 32]) : less;
}

// Of each byte: the places of its set bits, and how many there are.
struct BitPositions {
  uint8_t of[256][8] = {}, count[256] = {};
  constexpr BitPositions() {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0; bit < 8; ++bit)
        if (byte >> bit & 1) of[byte][count[byte]++] = uint8_t(bit);
  }
};
[[maybe_unused]] constexpr BitPositions kBitPositions;

// Writes the numbers of a word's set bits, from `first` on; returns where the next goes. Writes up to 16 entries more than that.
// With AVX no branch depends on the bits: a wrong guess for every word would cost as much as drawing it.
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

// acc += rows of `raised` - rows of `lowered`, kBlock vectors of columns at a time in registers.
constexpr int kMaxBlock = GIBBS_VECTOR_BYTES == 64 ? 28 : 14;
template <int kBlock, class E>
inline void add_rows_block(const E* rows, int64_t ld, const int32_t* raised, int64_t num_raised, const int32_t* lowered,
                           int64_t num_lowered, int32_t* acc) {
  VecI sum[kBlock];
#pragma GCC unroll 28
  for (int v = 0; v < kBlock; ++v) sum[v] = load<VecI>(acc + v * kLanes);
  for (int64_t t = 0; t < num_raised; ++t) {
    const E* row = rows + raised[t] * ld;
#pragma GCC unroll 28
    for (int v = 0; v < kBlock; ++v) sum[v] += widen(row + v * kLanes);
  }
  for (int64_t t = 0; t < num_lowered; ++t) {
    const E* row = rows + lowered[t] * ld;
#pragma GCC unroll 28
    for (int v = 0; v < kBlock; ++v) sum[v] -= widen(row + v * kLanes);
  }
#pragma GCC unroll 28
  for (int v = 0; v < kBlock; ++v) store(acc + v * kLanes, sum[v]);
}
template <int kBlock, class E>
inline void add_rows_of(int block, const E* rows, int64_t ld, const int32_t* raised, int64_t num_raised, const int32_t* lowered,
                        int64_t num_lowered, int32_t* acc) {
  if constexpr (kBlock > 0) {
    if (block == kBlock)
      add_rows_block<kBlock>(rows, ld, raised, num_raised, lowered, num_lowered, acc);
    else
      add_rows_of<kBlock - 1>(block, rows, ld, raised, num_raised, lowered, num_lowered, acc);
  }
}
template <class E>
inline void add_rows(const E* rows, int64_t ld, const int32_t* raised, int64_t num_raised, const int32_t* lowered,
                     int64_t num_lowered, int32_t* acc) {
  int64_t vectors = ld / kLanes;
  for (int64_t blocks = (vectors + kMaxBlock - 1) / kMaxBlock, at = 0; blocks > 0; --blocks) {  // blocks of nearly equal width
    const int64_t block = (vectors + blocks - 1) / blocks;
    add_rows_of<kMaxBlock>(int(block), rows + at, ld, raised, num_raised, lowered, num_lowered, acc + at);
    vectors -= block;
    at += block * kLanes;
  }
}

// Sums of all active rows by table: the 16 subset sums of each 4 rows are built once per tile and looked up by every chain
// ("four Russians"). kVectors vectors of columns; tables of kTableGroups groups at a time stay in the first-level cache.
template <int kVectors>
inline void table_sums_block(const int32_t* rows, int64_t ld, int64_t num_rows, const uint32_t* const* bits, int64_t count,
                             int32_t* acc, int64_t acc_stride, int32_t* table) {
  constexpr int kWidth = kVectors * kLanes, kEntries = 1 << kTableRows;
  for (int64_t first = 0; first < num_rows; first += kTableGroups * kTableRows) {
    for (int g = 0; g < kTableGroups; ++g) {
      int32_t* entries = table + g * kEntries * kWidth;
      for (int v = 0; v < kVectors; ++v) store(entries + v * kLanes, VecI{});
      for (int m = 1; m < kEntries; ++m) {
        const int64_t base = first + g * kTableRows, row = base + __builtin_ctz(m);
        if (base + 31 - __builtin_clz(m) >= num_rows) break;  // never looked up: bits beyond the last unit are 0
        for (int v = 0; v < kVectors; ++v)
          store(entries + m * kWidth + v * kLanes,
                load<VecI>(entries + (m & (m - 1)) * kWidth + v * kLanes) + load<VecI>(rows + row * ld + v * kLanes));
      }
    }
    for (int64_t c = 0; c < count; ++c) {
      const uint32_t active = bits[c][first / 32] >> (first % 32);
      const int32_t* entry[kTableGroups];
      for (int g = 0; g < kTableGroups; ++g)
        entry[g] = table + (g * kEntries + (active >> (g * kTableRows) & (kEntries - 1))) * kWidth;
      int32_t* sum = acc + c * acc_stride;
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        VecI x = (load<VecI>(entry[0] + v * kLanes) + load<VecI>(entry[1] + v * kLanes)) +
                 (load<VecI>(entry[2] + v * kLanes) + load<VecI>(entry[3] + v * kLanes));
        if (first) x += load<VecI>(sum + v * kLanes);
        store(sum + v * kLanes, x);
      }
    }
  }
}
inline void table_sums(const int32_t* rows, int64_t ld, int64_t num_rows, const uint32_t* const* bits, int64_t count, int32_t* acc,
                       int64_t acc_stride, int32_t* table) {
  constexpr int kStep = 16 / kLanes;  // vectors in 16 columns
  int64_t columns = ld / 16;
  for (int64_t blocks = (columns + 3) / 4, at = 0; blocks > 0; --blocks) {
    const int64_t block = (columns + blocks - 1) / blocks;
    if (block == 4) table_sums_block<4 * kStep>(rows + at, ld, num_rows, bits, count, acc + at, acc_stride, table);
    if (block == 3) table_sums_block<3 * kStep>(rows + at, ld, num_rows, bits, count, acc + at, acc_stride, table);
    if (block == 2) table_sums_block<2 * kStep>(rows + at, ld, num_rows, bits, count, acc + at, acc_stride, table);
    if (block == 1) table_sums_block<1 * kStep>(rows + at, ld, num_rows, bits, count, acc + at, acc_stride, table);
    columns -= block;
    at += block * 16;
  }
}

// log f_{beta'}(left) - log f_beta(left) less its part linear in left (gibbs_ext/functional.py, bipartite_ais):
//   sum_j softplus(x'_j) - softplus(x_j),   softplus(x) = max(x, 0) + log(1 + exp(-|x|)).
// The logs of up to 32 vectors of units are taken as one log of the product of their ratios, each within [1/2, 2].
inline double softplus_difference(int64_t n, const int32_t* acc, const float* bias, const float* base_bias, float scale, float beta,
                                  float next_beta) {
  constexpr int64_t kChunk = 32 * kLanes;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = begin + kChunk < n ? begin + kChunk : n;
    VecF linear = {}, above = splat(1.0f), below = splat(1.0f);
    for (int64_t i = begin; i < end; i += kLanes) {
      VecF x = logit_vector<true>(acc + i, bias + i, base_bias + i, beta, scale);
      VecF y = logit_vector<true>(acc + i, bias + i, base_bias + i, next_beta, scale);
      if (i + kLanes > n)
        for (int l = 0; l < kLanes; ++l)
          if (i + l >= n) x[l] = y[l] = 0;
      linear += (y > 0.0f ? y : splat(0.0f)) - (x > 0.0f ? x : splat(0.0f));
      above *= 1.0f + exp_of_negative(clipped_magnitude(y));
      below *= 1.0f + exp_of_negative(clipped_magnitude(x));
    }
    double ratio = 1;
    for (int l = 0; l < kLanes; ++l) {
      ratio *= double(above[l]) / double(below[l]);
      total += double(linear[l]);
    }
    total += __builtin_log(ratio);
  }
  return total;
}
inline double linear_difference(int64_t n, const uint32_t* bits, const float* bias, const float* base_bias, float beta,
                                float next_beta) {
  double sum = 0;
  for (int64_t w = 0; w < state_words(n); ++w)
    for (uint32_t b = bits[w]; b; b &= b - 1) {
      const int64_t i = 32 * w + __builtin_ctz(b);
      sum += double(bias[i]) - double(base_bias[i]);
    }
  return (double(next_beta) - double(beta)) * sum;
}

// One side of every chain of a tile: the integer sums its bits are drawn from, and the rows that they add to the other side's sums.
struct TileSide {
  int64_t n, first_unit;
  int32_t* acc;         // [count, padded_side(n)]
  const int32_t* rows;  // [n, ld] couplings to the other side
  int64_t ld;
};

// The other side's sums afresh from all of this side's bits, by tables.
template <class Bits>
inline void propagate_by_tables(const TileSide& from, const TileSide& to, Bits bits_of, int64_t count, int32_t* table) {
  constexpr int64_t kChunk = 512;
  const uint32_t* bits[kChunk];
  const int64_t acc_stride = padded_side(to.n);
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const int64_t n = count - begin < kChunk ? count - begin : kChunk;
    for (int64_t c = 0; c < n; ++c) bits[c] = bits_of(begin + c);
    table_sums(from.rows, from.ld, from.n, bits, n, to.acc + begin * acc_stride, acc_stride, table);
  }
}
inline void propagate_by_rows(const TileSide& from, const uint32_t* bits, int32_t* acc, int32_t* active) {
  int32_t* end = active;
  for (int64_t w = 0; w < state_words(from.n); ++w) end = list_bits(bits[w], int32_t(32 * w), end);
  add_rows(from.rows, from.ld, active, end - active, nullptr, 0, acc);
}

// The sums of a side may be brought up to date by the rows of the units that flipped, or afresh by tables once all chains are drawn.
// Integer sums: both give the same bits. Which is faster shows by the flips of the sweep before.
// Measured break-even: a looked-up group of four rows costs about as much as 0.75 of a flipped row (bench/NOTES.md).
inline bool tables_win(int64_t flips, int64_t count, int64_t n) { return flips * 16 > count * n * 3; }

// A sweep's share of what comes next, into the second-level cache: sweeping leaves the memory idle.
inline void prefetch_share(const BinarySweeps& p, int64_t sweep) {
  const int64_t share = p.next_bytes / p.num_sweeps + 64,
                end = share * (sweep + 1) < p.next_bytes ? share * (sweep + 1) : p.next_bytes;
  for (int64_t at = share * sweep; at < end; at += 64) __builtin_prefetch(p.next + at, 0, 2);
}

template <bool kAnnealed>
inline void sweep_tile_of(const BinarySweeps& p, const BinaryChain* chains, int64_t count, const TileWorkspace& ws) {
  const TileSide left = {p.n1, 0, ws.acc_left, p.coupling.rows, padded_row(p.n2)};
  const TileSide right = {p.n2, p.n1, ws.acc_right, p.coupling.columns, padded_row(p.n1)};
  const int64_t left_stride = padded_side(p.n1), right_stride = padded_side(p.n2);
  const bool may_use_tables = p.allow_tables && count >= 32;
  const auto left_bits = [&](int64_t c) { return chains[c].left; };
  const auto right_bits = [&](int64_t c) { return chains[c].right; };
  // Small models keep both sides' bytes from one pass over the counter; large ones would leave the cache.
  const bool one_draw = p.n1 + p.n2 <= kOneDrawUnits;
  const int64_t left_blocks = (p.n1 + 127) / 128, first_block = one_draw ? 0 : p.n1 / 128, end_block = (p.n1 + p.n2 + 127) / 128;
  const int64_t bytes_stride = one_draw ? random_bytes_capacity(p.n1 + p.n2) : 0;

  __builtin_memset(ws.acc_right, 0, size_t(count * right_stride) * 4);
  if (may_use_tables)
    propagate_by_tables(left, right, left_bits, count, ws.table);
  else
    for (int64_t c = 0; c < count; ++c) propagate_by_rows(left, chains[c].left, ws.acc_right + c * right_stride, ws.raised);

  // Draws a side of a chain; returns the number of flips. to_acc: the other side's sums, to be updated by rows; null: not now.
  const auto draw = [&](const TileSide& from, const HalfSweep& h, const int32_t* acc, const float* bias, const float* base_bias,
                        const uint8_t* bytes, const uint32_t* clamp, uint32_t* bits, int32_t* to_acc) {
    int64_t flips = 0;
    int32_t *raised = ws.raised, *lowered = ws.lowered;
    for (int64_t i = 0; i < from.n; i += 32) {
      const uint32_t before = bits[i / 32], now = sample_word<kAnnealed>(h, i, acc, bias, base_bias, bytes, clamp, bits);
      bits[i / 32] = now;
      if (to_acc) {
        raised = list_bits(now & ~before, int32_t(i), raised);
        lowered = list_bits(before & ~now, int32_t(i), lowered);
      }
      flips += __builtin_popcount(before ^ now);
    }
    if (to_acc) add_rows(from.rows, from.ld, ws.raised, raised - ws.raised, ws.lowered, lowered - ws.lowered, to_acc);
    return flips;
  };

  bool right_by_tables = may_use_tables, left_by_tables = may_use_tables;
  int64_t work = 0;
  for (int64_t sweep = 0; sweep < p.num_sweeps; ++sweep) {
    if ((work += count * (p.n1 + p.n2)) > (1 << 18)) {
      work = 0;
      if (p.check.stop(p.check.context)) return;
    }
    prefetch_share(p, sweep);
    const float beta = p.beta[(sweep + kAnnealed) * p.beta_stride];
    const bool last = sweep + 1 == p.num_sweeps;
    if (sweep == 0) {  // left's sums have not been made yet: those of right's starting bits, which flips then correct
      __builtin_memset(ws.acc_left, 0, size_t(count * left_stride) * 4);
      if (!right_by_tables)
        for (int64_t c = 0; c < count; ++c) propagate_by_rows(right, chains[c].right, ws.acc_left + c * left_stride, ws.raised);
    }
    int64_t flips = 0;
    for (int64_t c = 0; c < count; ++c) {
      const BinaryChain& chain = chains[c];
      int32_t* acc = ws.acc_right + c * right_stride;
      if constexpr (kAnnealed) {
        const float last_beta = p.beta[sweep * p.beta_stride];
        *chain.log_weight +=
            softplus_difference(p.n2, acc, chain.right_bias, chain.base_right_bias, p.coupling.scale, last_beta, beta) +
            linear_difference(p.n1, chain.left, chain.left_bias, chain.base_left_bias, last_beta, beta);
      }
      const HalfSweep h = {p.n2, p.n1, beta, p.coupling.scale,
                           random_stream(p.seed, chain.number, p.first_sweep + uint64_t(sweep))};
      uint8_t* bytes = ws.bytes + c * bytes_stride;
      random_bytes(h.random, first_block, end_block, bytes);
      flips += draw(right, h, acc, chain.right_bias, chain.base_right_bias, bytes + p.n1 - first_block * 128, chain.clamp_right,
                    chain.right, right_by_tables ? nullptr : ws.acc_left + c * left_stride);
    }
    if (right_by_tables) propagate_by_tables(right, left, right_bits, count, ws.table);
    right_by_tables = may_use_tables && tables_win(flips, count, p.n2);
    flips = 0;
    for (int64_t c = 0; c < count; ++c) {
      const BinaryChain& chain = chains[c];
      const HalfSweep h = {p.n1, 0, beta, p.coupling.scale, random_stream(p.seed, chain.number, p.first_sweep + uint64_t(sweep))};
      uint8_t* bytes = ws.bytes + c * bytes_stride;
      if (!one_draw) random_bytes(h.random, 0, left_blocks, bytes);
      flips += draw(left, h, ws.acc_left + c * left_stride, chain.left_bias, chain.base_left_bias, bytes, chain.clamp_left,
                    chain.left, left_by_tables || last ? nullptr : ws.acc_right + c * right_stride);
    }
    if (left_by_tables && !last) propagate_by_tables(left, right, left_bits, count, ws.table);
    left_by_tables = may_use_tables && tables_win(flips, count, p.n1);
  }
}
// ---- one chain of a model, by narrow couplings ---------------------------------------------------------------------------------

// The exact sum of one unit's couplings: what RoundedCoupling would have held.
template <class T>
inline int32_t exact_sum(const CouplingView& w, int k, bool is_left, int64_t unit, const uint32_t* other_bits) {
  const T factor = power_of_two<T>(k);
  const T* first = (const T*)w.data + unit * (is_left ? w.row_stride : w.column_stride);
  const int64_t stride = is_left ? w.column_stride : w.row_stride, words = state_words(is_left ? w.n2 : w.n1);
  int32_t sum = 0;
  for (int64_t word = 0; word < words; ++word)
    for (uint32_t b = other_bits[word]; b; b &= b - 1) sum += rounded(first[(32 * word + __builtin_ctz(b)) * stride], factor);
  return sum;
}

// How far a threshold from narrow sums can be from the true one, in units of 2^-32.
//   Each of `active` couplings is off by half a narrow unit and half a wide one. A logit's three roundings make it off by
//   2^-24 beta (3 |sum| + 2 |bias|) at most, and sigmoid's slope is 1/4; threshold() is within 178 of sigmoid.
//   |sum| < 2^(31 - k). A bias that exceeds that by 91 / beta saturates both thresholds, so counts no more.
inline uint32_t narrow_slack(int64_t active, int shift, int k, float beta, float largest_bias) {
  const double size = beta < 0 ? -double(beta) : double(beta), unit = power_of_two<double>(-k), sum = unit * 0x1p31;
  const double bias = size * double(largest_bias) < size * sum + 91 ? size * double(largest_bias) : size * sum + 91;
  const double logit = size * double(active) * unit * (0.5 * power_of_two<double>(shift) + 0.5) + 0x1p-21 * (size * sum + bias);
  const double slack = 400 + 0x1p30 * logit;
  return slack < 4294967295.0 ? uint32_t(slack) : 0xffffffffu;
}

inline void sweep_narrow_chain(const BinarySweeps& p, const BinaryChain& chain, const TileWorkspace& ws) {
  struct Side {
    int64_t n, first_unit, words, ld;
    const int16_t* rows;
    int32_t* acc;
    const float* bias;
    float largest_bias;
    uint32_t* bits;
    const uint32_t* clamp;
  };
  const auto largest = [](const float* bias, int64_t n) {
    float out = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float size = bias[i] < 0 ? -bias[i] : bias[i];
      out = size > out ? size : out;
    }
    return out;
  };
  const float largest_left = largest(chain.left_bias, p.n1), largest_right = largest(chain.right_bias, p.n2);
  const Side left = {p.n1,         0,          state_words(p.n1), padded_row(p.n2), p.narrow.rows, ws.acc_left, chain.left_bias,
                     largest_left, chain.left, chain.clamp_left};
  const Side right = {
      p.n2,          p.n1,        state_words(p.n2), padded_row(p.n1), p.narrow.columns, ws.acc_right, chain.right_bias,
      largest_right, chain.right, chain.clamp_right};
  const auto start = [&](const Side& from, const Side& to) {
    __builtin_memset(to.acc, 0, size_t(padded_side(to.n)) * 4);
    int32_t* end = ws.raised;
    for (int64_t w = 0; w < from.words; ++w) end = list_bits(from.bits[w], int32_t(32 * w), end);
    add_rows(from.rows, from.ld, ws.raised, end - ws.raised, nullptr, 0, to.acc);
  };
  start(left, right);
  start(right, left);
  const float narrow_scale = power_of_two<float>(p.narrow.shift - p.k);
  int64_t work = 0;
  for (int64_t sweep = 0; sweep < p.num_sweeps; ++sweep) {
    if ((work += p.n1 + p.n2) > (1 << 18)) {
      work = 0;
      if (p.check.stop(p.check.context)) return;
    }
    prefetch_share(p, sweep);
    const float beta = p.beta[sweep * p.beta_stride];
    const RandomStream random = random_stream(p.seed, chain.number, p.first_sweep + uint64_t(sweep));
    random_bytes(random, 0, (p.n1 + p.n2 + 127) / 128, ws.bytes);
    const auto update = [&](const Side& side, const Side& other) {
      int64_t active = 0;
      for (int64_t w = 0; w < other.words; ++w) active += __builtin_popcount(other.bits[w]);
      const uint32_t slack = narrow_slack(active, p.narrow.shift, p.k, beta, side.largest_bias);
      int32_t *raised = ws.raised, *lowered = ws.lowered;
      constexpr int kVectors = 32 / kLanes;
      for (int64_t i = 0; i < side.n; i += 32) {
        VecU low[kVectors], high[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          const int64_t at = i + v * kLanes;
          const VecU t = threshold_vector(logit_vector<false>(side.acc + at, side.bias + at, nullptr, beta, narrow_scale));
          low[v] = (t > slack ? t : splat(slack)) - slack;
          high[v] = (t < ~slack ? t : splat(~slack)) + slack;
        }
        const uint8_t* bytes = ws.bytes + side.first_unit + i;
        uint32_t ones, low_ties, below_high, high_ties;
        compare_high_bytes(low, bytes, ones, low_ties);
        compare_high_bytes(high, bytes, below_high, high_ties);
        const uint32_t valid = side.n - i >= 32 ? 0xffffffffu : (1u << (side.n - i)) - 1;
        for (uint32_t open = (below_high | high_ties) & ~ones & valid; open; open &= open - 1) {
          const int l = __builtin_ctz(open);
          uint32_t t_low, t_high;
          __builtin_memcpy(&t_low, (const char*)low + 4 * l, 4);
          __builtin_memcpy(&t_high, (const char*)high + 4 * l, 4);
          const uint32_t word = uint32_t(bytes[l]) << 24 | random_low_bits(random, uint32_t(side.first_unit + i + l));
          bool one = word < t_low;
          if (!one && word < t_high) {
            const bool is_left = &side == &left;
            const int32_t sum = p.weight.is_double ? exact_sum<double>(p.weight, p.k, is_left, i + l, other.bits)
                                                   : exact_sum<float>(p.weight, p.k, is_left, i + l, other.bits);
            one = word < threshold(binary_logit(sum, p.coupling.scale, side.bias[i + l], beta));
          }
          ones |= uint32_t(one) << l;
        }
        ones &= valid;
        const uint32_t before = side.bits[i / 32];
        const uint32_t now = side.clamp ? (ones & ~side.clamp[i / 32]) | (before & side.clamp[i / 32]) : ones;
        side.bits[i / 32] = now;
        raised = list_bits(now & ~before, int32_t(i), raised);
        lowered = list_bits(before & ~now, int32_t(i), lowered);
      }
      add_rows(side.rows, side.ld, ws.raised, raised - ws.raised, ws.lowered, lowered - ws.lowered, other.acc);
    };
    update(right, left);
    update(left, right);
  }
}

void sweep_tile_kernel(const BinarySweeps& p, const BinaryChain* chains, int64_t count, const TileWorkspace& ws) {
  if (p.narrow.rows)
    for (int64_t c = 0; c < count; ++c) sweep_narrow_chain(p, chains[c], ws);
  else if (p.annealed)
    sweep_tile_of<true>(p, chains, count, ws);
  else
    sweep_tile_of<false>(p, chains, count, ws);
}

void random_words_kernel(uint64_t seed, uint64_t chain, uint64_t sweep, int64_t units, uint32_t* words, uint8_t* bytes) {
  random_words_of(random_stream(seed, chain, sweep), units, words, bytes);
}
