// SPDX-License-Identifier: Apache-2.0
#pragma once

// Everything in core/ is host and device code: the same text is compiled by the C++ compiler, by nvcc and by the host emulator.
#if defined(__CUDACC__)
#define GIBBS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GIBBS_HOST_DEVICE inline
#endif

// Intrinsics of x86-64. -DGIBBS_PORTABLE leaves them out, as on any other processor, so that tests reach the portable code anywhere.
#if defined(__x86_64__) && !defined(GIBBS_PORTABLE)
#define GIBBS_X86 1
#else
#define GIBBS_X86 0
#endif
