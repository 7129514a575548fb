// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h.

// Bit c of out[r] becomes bit r of in[c]; both have 32 words.
void transpose_bits_kernel(const uint32_t* in, uint32_t* out) {
#if GIBBS_X86 && GIBBS_VECTOR_BYTES >= 32
  // The bytes of every four words, and then the pairs of eight words, side by side.
  const __m256i bytes = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)),
                pairs = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  __m256i eight[4];
  for (int k = 0; k < 4; ++k)
    eight[k] = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i*)in + k), bytes), pairs);
  const __m256i even[] = {_mm256_unpacklo_epi64(eight[0], eight[1]), _mm256_unpacklo_epi64(eight[2], eight[3])},
                odd[] = {_mm256_unpackhi_epi64(eight[0], eight[1]), _mm256_unpackhi_epi64(eight[2], eight[3])};
  // One byte of all words.
  __m256i byte[] = {_mm256_permute2x128_si256(even[0], even[1], 0x20), _mm256_permute2x128_si256(odd[0], odd[1], 0x20),
                    _mm256_permute2x128_si256(even[0], even[1], 0x31), _mm256_permute2x128_si256(odd[0], odd[1], 0x31)};
  for (int b = 0; b < 4; ++b)
    for (int r = 7; r >= 0; --r, byte[b] = _mm256_add_epi8(byte[b], byte[b]))
      out[8 * b + r] = uint32_t(_mm256_movemask_epi8(byte[b]));
#else
  __builtin_memcpy(out, in, 32 * sizeof *in);
  uint32_t mask = 0xffff;
  for (int j = 16; j; j >>= 1, mask ^= mask << j)
    for (int k = 0; k < 32; k = (k + j + 1) & ~j) {
      const uint32_t swapped = ((out[k] >> j) ^ out[k + j]) & mask;
      out[k] ^= swapped << j;
      out[k + j] ^= swapped;
    }
#endif
}
