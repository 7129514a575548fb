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
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,popcnt")
#endif
#define GIBBS_ISA avx2
#define GIBBS_ISA_NAME "avx2"
#define GIBBS_VECTOR_BYTES 32
#include "cpu/kernels/instruction_set.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
