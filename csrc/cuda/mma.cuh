// SPDX-License-Identifier: Apache-2.0
#pragma once

// The tensor cores' product of 16 x 32 signed bytes and 32 x 8 signed bytes, and the layout of its operands.
#include "cuda/device.cuh"

namespace gibbs {

// A lane's part of the left operand, 16 x 32. (NVIDIA, "PTX ISA" 9.0, "Matrix Fragments for mma.m16n8k32"; lane = 4 g + t)
//   left    register r, byte i: row g + 8 (r % 2), column 4 t + i + 16 (r / 2)
//   right   register r, byte i: row 4 t + i + 16 r, column g
//   sum     element e:          row g + 8 (e / 2), column 2 t + e % 2
struct alignas(16) LeftFragment {
  uint32_t of[4];
};
struct RightFragment {
  uint32_t of[2];
};

#if defined(GIBBS_DEVICE)

// Products of 8 x 16 and 16 x 8 bytes, for which there are tensor cores on 7.5, too. (ibid., "Matrix Fragments for mma.m8n8k16")
//   left, byte i: row g, column 4 t + i     right, byte i: row 4 t + i, column g     sum e: row g, column 2 t + e
GIBBS_DEVICE void multiply_add(int32_t& sum0, int32_t& sum1, uint32_t left, uint32_t right) {
#if defined(GIBBS_EMULATE)
  cuda_emulator::multiply_add(sum0, sum1, left, right);
#else
  asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+r"(sum0), "+r"(sum1)
               : "r"(left), "r"(right));
#endif
}
// A register of a larger operand is a smaller one.
GIBBS_DEVICE void multiply_add_in_parts(int32_t (&sum)[4], const LeftFragment& left, const RightFragment& right) {
#pragma unroll
  for (int r = 0; r < 4; ++r) multiply_add(sum[2 * (r % 2)], sum[2 * (r % 2) + 1], left.of[r], right.of[r / 2]);
}

// sum += left right, modulo 2^32. All lanes of a warp must call this; volatile, so that no compiler moves it to where they do not.
GIBBS_DEVICE void multiply_add(int32_t (&sum)[4], const LeftFragment& left, const RightFragment& right) {
#if defined(GIBBS_EMULATE)
  cuda_emulator::multiply_add(sum, left.of, right.of);
#elif __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
               : "r"(left.of[0]), "r"(left.of[1]), "r"(left.of[2]), "r"(left.of[3]), "r"(right.of[0]), "r"(right.of[1]));
#else
  multiply_add_in_parts(sum, left, right);
#endif
}

#endif

}  // namespace gibbs
