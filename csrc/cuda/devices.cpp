// SPDX-License-Identifier: Apache-2.0
#include "cuda/devices.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

namespace gibbs {

namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error));
}

// Things made once per device, when first asked for.
template <class T>
class PerDevice {
 public:
  template <class Make>
  T& get(int device, const Make& make) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (values_.size() <= size_t(device)) values_.resize(size_t(device) + 1);
    if (!values_[size_t(device)]) values_[size_t(device)] = std::make_unique<T>(make());
    return *values_[size_t(device)];
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<T>> values_;
};

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

DeviceLimits read_limits(int device) {
  const DeviceLimits limits = {
      10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device),
      attribute(cudaDevAttrMultiProcessorCount, device),
      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
      attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
      attribute(cudaDevAttrMaxThreadsPerMultiProcessor, device),
      attribute(cudaDevAttrMaxBlocksPerMultiprocessor, device)};
  check_supported(limits, device);
  return limits;
}

bool is_set(const char* variable) {
  const char* value = std::getenv(variable);
  return value && *value && std::strcmp(value, "0") != 0;
}

}  // namespace

const DeviceLimits& device_limits(int device) {
  static PerDevice<DeviceLimits> limits;
  return limits.get(device, [&] { return read_limits(device); });
}

// libtorch_cuda is not linked to: a build needs none, and this library then loads, and explains itself, without one.
Stream current_stream(int device) {
  using Function = int (*)(int32_t, void**);
  static const Function get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  if (!get || get(device, &stream) != 0) throw std::runtime_error("this PyTorch has no current CUDA stream to offer");
  return static_cast<Stream>(stream);
}

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

void synchronize(Stream stream) { check(cudaStreamSynchronize(stream)); }

bool is_synchronous() {
  static const bool set = is_set("GIBBS_CUDA_SYNCHRONOUS") || is_set("CUDA_LAUNCH_BLOCKING");
  return set;
}

DeviceReport* device_report(int device) {
  static PerDevice<DeviceReport*> reports;
  return reports.get(device, [] {
    // Allowed even while some stream captures a graph: it is not part of it.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check(cudaThreadExchangeStreamCaptureMode(&mode));
    void* memory = nullptr;
    const cudaError_t error = cudaHostAlloc(&memory, sizeof(DeviceReport), cudaHostAllocMapped | cudaHostAllocPortable);
    check(cudaThreadExchangeStreamCaptureMode(&mode));
    check(error);
    std::memset(memory, 0, sizeof(DeviceReport));
    return static_cast<DeviceReport*>(memory);
  });
}

}  // namespace gibbs
