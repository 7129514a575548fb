// SPDX-License-Identifier: Apache-2.0
// Tells bench/cuda_report.py how many CTAs a multiprocessor of a known device runs at a time, by NVIDIA's rules (cuda_occupancy.h).
// Reads lines "device|registers per thread|threads|bytes of shared memory". For each it writes a line with the number of CTAs, of
// multiprocessors, and of threads that a multiprocessor holds at most.
#include <cuda_occupancy.h>

#include <cstdio>
#include <cstring>

#include "known_devices.h"

int main() {
  char name[64];
  int registers, threads;
  size_t shared;
  while (std::scanf(" %63[^|]|%d|%d|%zu", name, &registers, &threads, &shared) == 4) {
    const gibbs::KnownDevice* found = nullptr;
    for (const gibbs::KnownDevice& device : gibbs::kKnownDevices)
      if (!std::strcmp(device.name, name)) found = &device;
    if (!found) {
      std::fprintf(stderr, "occupancy: no device %s is known\n", name);
      return 1;
    }
    const gibbs::DeviceLimits& limits = found->limits;
    constexpr int kRegisters = 65536, kStaticShared = 48 << 10, kReservedShared = 1 << 10;
    cudaOccDeviceProp device;
    device.computeMajor = limits.compute_capability / 10;
    device.computeMinor = limits.compute_capability % 10;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = limits.max_threads_per_sm;
    device.regsPerBlock = device.regsPerMultiprocessor = kRegisters;
    device.warpSize = 32;
    device.sharedMemPerBlock = kStaticShared;
    device.sharedMemPerMultiprocessor = size_t(limits.shared_memory_per_sm);
    device.sharedMemPerBlockOptin = size_t(limits.shared_memory_per_cta);
    device.reservedSharedMemPerBlock = limits.compute_capability >= 80 ? kReservedShared : 0;
    device.numSms = limits.num_sms;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = 0;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = size_t(limits.shared_memory_per_cta);
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.cacheConfig = CACHE_PREFER_SHARED;
    cudaOccResult result;
    const cudaOccError error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared);
    if (error != CUDA_OCC_SUCCESS) {
      std::fprintf(stderr, "occupancy: error %d for %s\n", int(error), name);
      return 1;
    }
    std::printf("%d %d %d\n", result.activeBlocksPerMultiprocessor, limits.num_sms, limits.max_threads_per_sm);
  }
}
