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

#define GIBBS_ISA baseline
#define GIBBS_ISA_NAME "baseline"
#define GIBBS_VECTOR_BYTES 16
#include "cpu/kernels/instruction_set.h"
