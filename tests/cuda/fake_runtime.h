// SPDX-License-Identifier: Apache-2.0
#pragma once

// A CUDA runtime without a GPU: as much of it as csrc/cuda calls and nvcc's code is linked to. It runs no kernel, but refuses what a graph
// capture forbids and what was not asked for beforehand, and remembers who asked for what. To be included once.
#include <cuda_runtime.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>

namespace fake {

constexpr int kNumDevices = 16;
constexpr int kStaticShared = 512;  // of every kernel, so that it cannot be forgotten

struct Device {
  int capability = 90, ptx_version = 90, has_clusters = 1, largest_cluster = 8;
  bool is_out_of_host_memory = false;
  int host_allocations = 0, cluster_questions = 0, launches = 0;
  std::set<const void*> loaded;
  std::map<const void*, int> shared_memory;          // that a kernel has opted in to
  std::map<const void*, int> shared_memory_changes;  // how often
};
inline Device devices[kNumDevices];
inline std::map<const void*, std::string> kernels;  // all that nvcc compiled
inline std::recursive_mutex mutex;
inline std::atomic<bool> is_capturing = false;  // some thread, in cudaStreamCaptureModeGlobal
inline std::atomic<int64_t> calls = 0;
inline thread_local int current_device = 0;
inline thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
inline thread_local cudaError_t last_error = cudaSuccess;

inline cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}
inline Device& device() { return devices[current_device]; }

// Whether a capture is under way that forbids unsafe calls.
inline bool is_forbidden() { return is_capturing && capture_mode != cudaStreamCaptureModeRelaxed; }

inline cudaError_t load(const void* kernel) {
  if (!kernels.count(kernel)) return cudaErrorInvalidDeviceFunction;
  if (device().loaded.count(kernel)) return cudaSuccess;
  if (is_forbidden()) return cudaErrorStreamCaptureUnsupported;
  device().loaded.insert(kernel);
  return cudaSuccess;
}

struct Entry {  // of every function: one at a time
  std::lock_guard<std::recursive_mutex> lock{mutex};
  Entry() { ++calls; }
};

}  // namespace fake

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  const fake::Entry entry;
  *device = fake::current_device;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const fake::Entry entry;
  return std::exchange(fake::last_error, cudaSuccess);
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidClusterSize:
      return "invalid cluster size";
    default:
      return "another error";
  }
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int number) {
  const fake::Entry entry;
  const fake::Device& device = fake::devices[number];
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      return *value = device.capability / 10, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = device.capability % 10, cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      return *value = 132, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = 227 << 10, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return *value = 228 << 10, cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return *value = 2048, cudaSuccess;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      return *value = 32, cudaSuccess;
    case cudaDevAttrClusterLaunch:
      return *value = device.has_clusters, cudaSuccess;
    default:
      return fake::result(cudaErrorInvalidValue);
  }
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  const fake::Entry entry;
  *attributes = {};
  attributes->sharedSizeBytes = fake::kStaticShared;
  attributes->ptxVersion = fake::device().ptx_version;
  return fake::result(fake::load(kernel));
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const fake::Entry entry;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value + fake::kStaticShared > 227 << 10)
    return fake::result(cudaErrorInvalidValue);
  if (const cudaError_t error = fake::load(kernel)) return fake::result(error);
  fake::device().shared_memory[kernel] = value;
  ++fake::device().shared_memory_changes[kernel];
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config) {
  const fake::Entry entry;
  ++fake::device().cluster_questions;
  if (const cudaError_t error = fake::load(kernel)) return fake::result(error);
  const auto size = int(config->numAttrs ? config->attrs->val.clusterDim.x : 1);
  if (size > fake::device().largest_cluster) return fake::result(cudaErrorInvalidClusterSize);
  *clusters = 132 / size;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  const fake::Entry entry;
  fake::Device& device = fake::device();
  if (const cudaError_t error = fake::load(kernel)) return fake::result(error);
  const auto size = int(config->numAttrs ? config->attrs->val.clusterDim.x : 1);
  if (size > 1 && (!device.has_clusters || size > device.largest_cluster)) return fake::result(cudaErrorInvalidClusterSize);
  const int granted = device.shared_memory.count(kernel) ? device.shared_memory[kernel] : (48 << 10) - fake::kStaticShared;
  if (int64_t(config->dynamicSmemBytes) > granted) return fake::result(cudaErrorInvalidValue);
  ++device.launches;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  const fake::Entry entry;
  std::swap(*mode, fake::capture_mode);
  return cudaSuccess;
}
// No child of a fork has it. It takes so long that other threads come in between.
cudaError_t cudaHostAlloc(void** memory, size_t size, unsigned) {
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
  const fake::Entry entry;
  if (fake::is_forbidden()) return fake::result(cudaErrorStreamCaptureUnsupported);
  if (fake::device().is_out_of_host_memory) return fake::result(cudaErrorMemoryAllocation);
  ++fake::device().host_allocations;
  *memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  madvise(*memory, size, MADV_DONTFORK);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  const fake::Entry entry;
  *status = fake::is_capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  const fake::Entry entry;
  return fake::result(fake::is_forbidden() ? cudaErrorStreamCaptureUnsupported : cudaSuccess);
}

// Functions that nvcc's code calls before main() to name its kernels, and that kernels launched by <<<>>> would call.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  fake::kernels[kernel] = name;
}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorInvalidValue; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorInvalidValue; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorInvalidValue; }

}  // extern "C"
