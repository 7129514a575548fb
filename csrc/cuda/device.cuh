// SPDX-License-Identifier: Apache-2.0
#pragma once

// CUDA for the kernels: the toolkit's headers, or the host emulator of the tests, which runs the very same text.
// Arrays in shared memory are held by Shared<T>, so that the emulator can check every index and count every access.
#include <stdint.h>

#include "core/outcome.h"

#if defined(GIBBS_EMULATE)

#include "emulator.h"

#else

#include <cuda_runtime.h>

#include <type_traits>

#define GIBBS_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

template <class T>
using Shared = T*;
template <class T>
__device__ __forceinline__ T* shared_array(unsigned char* base, int64_t) {
  return reinterpret_cast<T*>(base);
}
template <class T>
__device__ __forceinline__ T* shared_pointer(T* p) {
  return p;
}
// The same memory as bytes.
__device__ __forceinline__ uint8_t* byte_view(uint32_t* words) { return reinterpret_cast<uint8_t*>(words); }
// A number, or a struct of 8 or 16 bytes, which no one writes while the kernel runs.
template <class T>
__device__ __forceinline__ T global_load(const T* p) {
  if constexpr (std::is_arithmetic_v<T>) {
    return __ldg(p);
  } else {
    using Vector = std::conditional_t<sizeof(T) == 16, int4, int2>;
    static_assert(sizeof(T) == sizeof(Vector) && alignof(T) == alignof(Vector));
    union {
      Vector vector;
      T value;
    } of = {__ldg(reinterpret_cast<const Vector*>(p))};
    return of.value;
  }
}
#endif

#if defined(__CUDACC__) || defined(GIBBS_EMULATE)
#define GIBBS_DEVICE __device__ __forceinline__
// For code that seldom runs or is long, so that there is one copy of it.
#define GIBBS_DEVICE_CALL inline __device__ __noinline__
#endif

namespace gibbs {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// Arrays of shared memory lie one after the other, each on a boundary of 16 bytes, the largest that a load asks for.
constexpr int64_t kSharedAlignment = 16;
template <class T>
GIBBS_HOST_DEVICE int64_t shared_bytes(int64_t count) {
  return round_up(count * int64_t(sizeof(T)), kSharedAlignment);
}

#if defined(GIBBS_DEVICE)
GIBBS_DEVICE int lane() { return int(threadIdx.x) % kWarpSize; }
GIBBS_DEVICE int warp() { return int(threadIdx.x) / kWarpSize; }
GIBBS_DEVICE int num_warps() { return int(blockDim.x) / kWarpSize; }

// The sum over a warp, in every lane.
template <class T>
GIBBS_DEVICE T warp_sum(T x) {
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

// Hands out a CTA's dynamic shared memory, array by array.
class SharedMemory {
 public:
  GIBBS_DEVICE SharedMemory() {
    GIBBS_DYNAMIC_SHARED(base);
    next_ = base;
  }
  template <class T>
  GIBBS_DEVICE Shared<T> take(int64_t count) {
    unsigned char* base = next_;
    next_ += shared_bytes<T>(count);
    return shared_array<T>(base, count);
  }

 private:
  unsigned char* next_;
};
#endif

}  // namespace gibbs
