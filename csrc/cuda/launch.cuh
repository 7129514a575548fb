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

// Of one device. csrc/cuda/devices.cpp asks the driver for them; the tests' emulator makes them up.
struct DeviceLimits {
  int compute_capability;  // 10 major + minor
  int num_sms;
  int64_t shared_memory_per_cta;  // the most that a kernel may opt in to
  int64_t shared_memory_per_sm;
  int max_threads_per_sm;
  int max_ctas_per_sm;
  bool has_clusters() const { return compute_capability >= 90; }
};

#if defined(GIBBS_EMULATE)
using Stream = void*;
#else
using Stream = cudaStream_t;
#endif

struct LaunchShape {
  int64_t num_ctas = 0;
  int num_threads = 0;
  int64_t shared_memory = 0;
  int cluster_size = 1;
};

// How many CTAs run on a multiprocessor at a time, at least one. kRegisters: about what the kernels that are planned by this take of each thread
// (make cuda-report); plans are made without asking the driver.
inline int64_t ctas_per_sm(const DeviceLimits& limits, const LaunchShape& shape) {
  constexpr int64_t kReservedShared = 1024;  // of each CTA, by CUDA
  constexpr int64_t kRegistersPerSm = 65536, kRegisters = 128;
  return std::max<int64_t>(1, std::min<int64_t>({limits.shared_memory_per_sm / (shape.shared_memory + kReservedShared),
                                                 limits.max_threads_per_sm / shape.num_threads, limits.max_ctas_per_sm,
                                                 kRegistersPerSm / (kRegisters * shape.num_threads)}));
}

// Launches kernel(params) on the stream; does nothing for 0 CTAs. Throws what CUDA says.
template <class Params>
void launch(void (*kernel)(Params), const LaunchShape& shape, Stream stream, const Params& params) {
  if (!shape.num_ctas) return;
  if (shape.num_ctas > 0x7fffffff) throw std::runtime_error("the batch needs more than 2^31 - 1 CTAs");
#if defined(GIBBS_EMULATE)
  (void)stream;
  cuda_emulator::launch(kernel, dim3(unsigned(shape.num_ctas)), dim3(unsigned(shape.num_threads)), size_t(shape.shared_memory),
                        dim3(unsigned(shape.cluster_size)), params);
#else
  const auto check = [](cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error));
  };
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.shared_memory)));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(shape.num_ctas));
  config.blockDim = dim3(unsigned(shape.num_threads));
  config.dynamicSmemBytes = size_t(shape.shared_memory);
  config.stream = stream;
  cudaLaunchAttribute cluster = {};
  if (shape.cluster_size > 1) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = unsigned(shape.cluster_size);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, params));
#endif
}

}  // namespace gibbs
