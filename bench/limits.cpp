// SPDX-License-Identifier: Apache-2.0
// Measures what one core can do, in units a second, and prints samples of each rate as JSON. bench/limits.py compiles and runs it.
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <chrono>
#include <vector>

#include "core/macros.h"
#if GIBBS_X86
#include <immintrin.h>
#endif
#include "core/fixed_point.h"
#include "core/philox.h"
#include "core/threshold.h"
#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define GIBBS_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define GIBBS_VECTOR_BYTES 32
#else
#define GIBBS_VECTOR_BYTES 16
#endif

namespace gibbs {
namespace {
#include "cpu/kernels/simd.h"
// clang-format off
#include "cpu/kernels/sampling.h"
// clang-format on

// Keeps a vector in a register, and the compiler from guessing its value.
template <class V>
inline void opaque(V& v) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(v));
#else
  asm volatile("" : "+x"(v));
#endif
}

template <class Run>  // does `units` units of work
void print_rates(const char* name, double units, Run run) {
  using Clock = std::chrono::steady_clock;
  run();
  printf("%s\"%s\": [", strcmp(name, "L1 bytes") == 0 ? "" : ",\n ", name);
  for (int sample = 0; sample < 21; ++sample) {
    int64_t calls = 0;
    const Clock::time_point begin = Clock::now();
    double seconds = 0;
    do {
      run();
      ++calls;
      seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    } while (seconds < 0.002);
    printf("%s%.4g", sample ? ", " : "", units * double(calls) / seconds);
  }
  printf("]");
}

void read_all(const VecU* data, size_t vectors) {
  VecU sums[8] = {};
  for (size_t i = 0; i + 8 <= vectors; i += 8)
    for (int j = 0; j < 8; ++j) sums[j] |= data[i + j];
  for (VecU& sum : sums) opaque(sum);
}

void print_bytes(const char* name, size_t bytes) {
  bytes = bytes / (8 * sizeof(VecU)) * (8 * sizeof(VecU));
  void* data = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  memset(data, 1, bytes);
  const int times = bytes < (1 << 20) ? 64 : 1;
  print_rates(name, double(bytes) * times, [&] {
    for (int i = 0; i < times; ++i) read_all(static_cast<const VecU*>(data), bytes / sizeof(VecU));
  });
  free(data);
}

constexpr int kRounds = 10000, kSums = 12;  // so many sums hide the latency of an operation

template <class T>
void add() {
  Vec<T> sums[kSums] = {}, x = splat(T(1));
  for (int i = 0; i < kRounds; ++i)
    for (Vec<T>& sum : sums) {
      sum += x;
      opaque(sum);
    }
}

// The products of unsigned and signed bytes, summed by four.
inline VecI multiply_bytes(VecI sum, VecI a, VecI b) {
#if defined(__AVX512VNNI__) && GIBBS_VECTOR_BYTES == 64
  return (VecI)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif GIBBS_VECTOR_BYTES == 64
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)a, (__m512i)b);
  return sum + (VecI)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVXVNNI__) && GIBBS_VECTOR_BYTES == 32
  return (VecI)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif GIBBS_VECTOR_BYTES == 32
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)a, (__m256i)b);
  return sum + (VecI)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  return sum + a * b;
#endif
}

void multiply_add() {
  VecI sums[kSums] = {}, a = splat(int32_t(0x01010101)), b = a;
  for (int i = 0; i < kRounds; ++i)
    for (VecI& sum : sums) {
      opaque(a);  // so that each product is made
      sum = multiply_bytes(sum, a, b);
      opaque(sum);
    }
}

void draw() {
  const RandomStream stream = random_stream(1, 2, 3);
  VecU counters[kPhiloxAtOnce] = {};
  for (VecU& counter : counters) opaque(counter);
  for (int i = 0; i < kRounds; i += kPhiloxAtOnce) {
    PhiloxVectors words[kPhiloxAtOnce];
    philox_vectors(stream, counters, words);
    for (PhiloxVectors& vectors : words)
      for (VecU& word : vectors.word) opaque(word);
    for (VecU& counter : counters) counter += splat(uint32_t(kLanes));
  }
}

size_t cache(int name, size_t unknown) {
  const long bytes = sysconf(name);
  return bytes > 0 ? size_t(bytes) : unknown;
}
}  // namespace
}  // namespace gibbs

int main() {
  using namespace gibbs;
  const size_t l1 = cache(_SC_LEVEL1_DCACHE_SIZE, 32 << 10), l2 = cache(_SC_LEVEL2_CACHE_SIZE, 1 << 20);

  printf("{");
  print_bytes("L1 bytes", l1 / 2);
  print_bytes("L2 bytes", l2 / 2);
  print_bytes("L3 bytes", 4 * l2);  // virtual machines may name a third level that they do not have
  print_bytes("memory bytes", size_t(256) << 20);
  print_rates("int32 adds", double(kRounds) * kSums * lanes_of<int32_t>, add<int32_t>);
  print_rates("int16 adds", double(kRounds) * kSums * lanes_of<int16_t>, add<int16_t>);
  const int products = GIBBS_VECTOR_BYTES >= 32 ? GIBBS_VECTOR_BYTES : kLanes;
  print_rates("byte multiply-adds", double(kRounds) * kSums * products, multiply_add);
  print_rates("random words", double(kRounds) * kLanes * 4, draw);
  printf("}\n");
}
