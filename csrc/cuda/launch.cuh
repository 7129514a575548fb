// SPDX-License-Identifier: Apache-2.0
#pragma once

// The only place that launches. A plan is made for a device's limits alone, so that it can be made, tested and reported for any device.
#include <stdint.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/device.cuh"

namespace gibbs {

constexpr int kOldestArchitecture = 75;
constexpr int kMaxClusterSize = 8;  // the portable limit: larger ones need a kernel's consent and do not run on every device

struct LaunchShape {
  int64_t num_ctas = 0;
  int num_threads = 0;
  int64_t shared_memory = 0;
  int cluster_size = 1;
};

// As many CTAs as take all items, `per_cta` each.
inline LaunchShape shape_for(int64_t items, int per_cta, int num_threads) { return {divide_up(items, per_cta), num_threads}; }

// A kernel that can be launched. Each enters a list of all kernels when it is made, so that a device can load every one beforehand:
// CUDA would load each at its first launch, which may lie in a graph capture, where loading is not allowed.
struct AnyKernel {
  const void* function;
  const AnyKernel* next;
  static inline const AnyKernel* first = nullptr;
};
template <class Params>
struct Kernel : AnyKernel {
  using Function = void (*)(Params);
  explicit Kernel(Function f) : AnyKernel{reinterpret_cast<const void*>(f), first}, call(f) { first = this; }
  Kernel(const Kernel&) = delete;
  const Function call;
};
// The one Kernel of a __global__ function. launch() takes nothing else, so nobody can forget to name a kernel here.
template <auto function>
inline const Kernel registered{function};

// The limits of one device. csrc/cuda/devices.cpp asks the driver for them; the tests' emulator makes them up.
struct DeviceLimits {
  int compute_capability;  // 10 major + minor
  int num_sms;
  int64_t shared_memory_per_cta;  // the most that a kernel may opt in to
  int64_t shared_memory_per_sm;
  int max_threads_per_sm;
  int max_ctas_per_sm;
  // The number of clusters of this shape that run at a time on the device, which is the current one; 0: none can. Null: it has no clusters.
  // A slice of a device, or one with parts switched off, may grant fewer than its compute capability promises.
  int (*active_clusters)(const DeviceLimits&, const void* kernel, const LaunchShape&) = nullptr;

  // The number of CTAs in clusters of this shape that run at a time, each on a multiprocessor of its own.
  int64_t ctas_in_clusters(const AnyKernel& kernel, const LaunchShape& shape) const {
    if (!active_clusters || shape.shared_memory > shared_memory_per_cta) return 0;
    const int64_t ctas = int64_t{shape.cluster_size} * active_clusters(*this, kernel.function, shape);
    return std::min<int64_t>(ctas, num_sms);
  }
};

#if defined(GIBBS_EMULATE)
using Stream = void*;
#else
using Stream = cudaStream_t;

inline void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // CUDA remembers it too, and the next caller would get it
  throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error));
}

// A launch as CUDA's API describes it.
class LaunchConfig {
 public:
  LaunchConfig(const LaunchShape& shape, Stream stream) {
    config_.gridDim = dim3(unsigned(shape.num_ctas));
    config_.blockDim = dim3(unsigned(shape.num_threads));
    config_.dynamicSmemBytes = size_t(shape.shared_memory);
    config_.stream = stream;
    if (shape.cluster_size > 1) {
      cluster_.id = cudaLaunchAttributeClusterDimension;
      cluster_.val.clusterDim.x = unsigned(shape.cluster_size);
      cluster_.val.clusterDim.y = cluster_.val.clusterDim.z = 1;
      config_.attrs = &cluster_;
      config_.numAttrs = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;  // config_ points into it
  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchConfig_t config_ = {};
  cudaLaunchAttribute cluster_ = {};
};
#endif

// The number of CTAs that run on a multiprocessor at a time, at least one. registers: about the number that each thread of the planned kernel
// takes (make cuda-report), because plans are made without asking the driver.
inline int64_t ctas_per_sm(const DeviceLimits& limits, const LaunchShape& shape, int64_t registers = 128) {
  constexpr int64_t kReservedShared = 1024;  // CUDA takes it from each CTA
  constexpr int64_t kRegistersPerSm = 65536;
  return std::max<int64_t>(1, std::min<int64_t>({limits.shared_memory_per_sm / (shape.shared_memory + kReservedShared),
                                                 limits.max_threads_per_sm / shape.num_threads, limits.max_ctas_per_sm,
                                                 kRegistersPerSm / (registers * shape.num_threads)}));
}

// Launches kernel(params) on the stream; does nothing for 0 CTAs. Throws CUDA's errors. The kernel has been loaded, and may have as much
// shared memory as the device grants: see use_device() in csrc/cuda/devices.h.
template <class Params>
void launch(const Kernel<Params>& kernel, const LaunchShape& shape, Stream stream, const Params& params) {
  if (!shape.num_ctas) return;
  if (shape.num_ctas > 0x7fffffff) throw std::invalid_argument("the batch needs more than 2^31 - 1 CTAs");
#if defined(GIBBS_EMULATE)
  (void)stream;
  cuda_emulator::launch(kernel.call, dim3(unsigned(shape.num_ctas)), dim3(unsigned(shape.num_threads)), size_t(shape.shared_memory),
                        dim3(unsigned(shape.cluster_size)), params);
#else
  check_cuda(cudaLaunchKernelEx(LaunchConfig(shape, stream).get(), kernel.call, params));
#endif
}

}  // namespace gibbs
