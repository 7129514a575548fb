// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. How many of kCountWords words of states have both of two units at 1.

using Words = Vec<uint64_t>;
constexpr int kWordsOfVector = GIBBS_VECTOR_BYTES / 8;
static_assert(kRightsAtOnce % kWordsOfVector == 0);

// How many bits of each byte are 1.
inline Words bits_of_each_byte(const Words& words) {
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
  const __m512i low = _mm512_set1_epi8(15),
                bits = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m512i x = (__m512i)words;
  return (Words)_mm512_add_epi8(_mm512_shuffle_epi8(bits, _mm512_and_si512(x, low)),
                                _mm512_shuffle_epi8(bits, _mm512_and_si512(_mm512_srli_epi16(x, 4), low)));
#elif GIBBS_X86 && GIBBS_VECTOR_BYTES == 32
  const __m256i low = _mm256_set1_epi8(15),
                bits = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m256i x = (__m256i)words;
  return (Words)_mm256_add_epi8(_mm256_shuffle_epi8(bits, _mm256_and_si256(x, low)),
                                _mm256_shuffle_epi8(bits, _mm256_and_si256(_mm256_srli_epi16(x, 4), low)));
#else
  const Words pairs = words - ((words >> 1) & 0x5555555555555555u),
              fours = (pairs & 0x3333333333333333u) + ((pairs >> 2) & 0x3333333333333333u);
  return (fours + (fours >> 4)) & 0x0f0f0f0f0f0f0f0fu;
#endif
}

// The sum of each word's bytes, which is below 2^16.
inline Words sum_of_bytes(const Words& bytes) {
  Words sum = (bytes & 0x00ff00ff00ff00ffu) + ((bytes >> 8) & 0x00ff00ff00ff00ffu);
  sum += sum >> 16;
  return (sum + (sum >> 32)) & 0xffffu;
}

using WordCounts = uint32_t __attribute__((vector_size(4 * kWordsOfVector)));

#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
// By an instruction that not every processor with AVX-512 has.
__attribute__((target("avx512vpopcntdq"))) void count_products_by_popcount(const uint64_t* left, int64_t n1, int64_t left_stride,
                                                                           const uint64_t* right, int64_t right_stride,
                                                                           uint32_t* out) {
  for (int64_t i = 0; i < n1; ++i, out += right_stride) {
    __m512i of_left[kCountWords];
    for (int w = 0; w < kCountWords; ++w) of_left[w] = _mm512_set1_epi64(int64_t(left[w * left_stride + i]));
    for (int64_t j = 0; j < right_stride; j += kWordsOfVector) {
      __m512i count = _mm512_setzero_si512();
      for (int w = 0; w < kCountWords; ++w)
        count = _mm512_add_epi64(
            count, _mm512_popcnt_epi64(_mm512_and_si512(of_left[w], _mm512_loadu_si512(right + w * right_stride + j))));
      const __m256i before = _mm256_loadu_si256((const __m256i*)(out + j));
      _mm256_storeu_si256((__m256i*)(out + j), _mm256_add_epi32(before, _mm512_cvtepi64_epi32(count)));
    }
  }
}
#endif

void count_products_kernel(const uint64_t* left, int64_t n1, int64_t left_stride, const uint64_t* right, int64_t right_stride,
                           uint32_t* out) {
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
  if (__builtin_cpu_supports("avx512vpopcntdq")) return count_products_by_popcount(left, n1, left_stride, right, right_stride, out);
#endif
  for (int64_t i = 0; i < n1; ++i, out += right_stride) {
    Words of_left[kCountWords];
    for (int w = 0; w < kCountWords; ++w) of_left[w] = splat(left[w * left_stride + i]);
    for (int64_t j = 0; j < right_stride; j += kWordsOfVector) {
      Words bytes = {};  // each at most 8 kCountWords
      for (int w = 0; w < kCountWords; ++w) bytes += bits_of_each_byte(of_left[w] & load<Words>(right + w * right_stride + j));
      store(out + j, load<WordCounts>(out + j) + __builtin_convertvector(sum_of_bytes(bytes), WordCounts));
    }
  }
}

void count_pairs_kernel(const UnitPair* pairs, int64_t num_pairs, const uint64_t* words, uint32_t* out) {
  for (int64_t p = 0; p < num_pairs; ++p) {
    const uint64_t *first = words + pairs[p].first * kCountWords, *second = words + pairs[p].second * kCountWords;
    int64_t count = 0;
    for (int w = 0; w < kCountWords; ++w) count += __builtin_popcountll(first[w] & second[w]);
    out[p] += uint32_t(count);
  }
}

void words_from_lanes_kernel(const int32_t* lanes, int64_t n, uint64_t present, int shift, uint64_t* words) {
  for (int64_t i = 0; i < n; ++i, lanes += kGroup, words += kCountWords) {
    uint64_t ones = 0;
    for (int v = 0; v < kGroup / kLanes; ++v) {
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
      ones |= uint64_t{_mm512_movepi32_mask((__m512i)load<VecI>(lanes))};
#elif GIBBS_X86 && GIBBS_VECTOR_BYTES == 32
      ones |= uint64_t{uint32_t(_mm256_movemask_ps((__m256)load<VecI>(lanes + v * kLanes)))} << (v * kLanes);
#elif GIBBS_X86
      ones |= uint64_t{uint32_t(_mm_movemask_ps((__m128)load<VecI>(lanes + v * kLanes)))} << (v * kLanes);
#else
      for (int l = 0; l < kLanes; ++l) ones |= uint64_t(lanes[v * kLanes + l] & 1) << (v * kLanes + l);
#endif
    }
    *words |= (ones & present) << shift;
  }
}
