// SPDX-License-Identifier: Apache-2.0
#include "core/macros.h"

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if GIBBS_X86
#include <immintrin.h>
#endif

#include "core/fixed_point.h"
#include "core/philox.h"
#include "core/threshold.h"
#include "cpu/kernels/table.h"

#if GIBBS_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi,bmi2,popcnt"))), \
                             apply_to = function)
#else
// GCC takes the undefined operands of its own AVX-512 intrinsics for a mistake (bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi,bmi2,popcnt")
#endif
#ifndef GIBBS_ISA
#define GIBBS_ISA avx512  // a test has a copy in a namespace of its own
#endif
#define GIBBS_ISA_NAME "avx512"
#define GIBBS_VECTOR_BYTES 64
#include "cpu/kernels/instruction_set.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
