// SPDX-License-Identifier: Apache-2.0
#include "cuda/devices.h"

#include <dlfcn.h>

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <tuple>

namespace gibbs {

namespace {

constexpr int kFirstPtxWithClusters = 90;

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

cudaFuncAttributes attributes_of(const void* kernel) {
  cudaFuncAttributes attributes = {};
  check_cuda(cudaFuncGetAttributes(&attributes, kernel));
  return attributes;
}

int ask_for_clusters(const void* kernel, const LaunchShape& shape) {
  // A kernel that was made from PTX of an older generation, because the build names no newer architecture, knows nothing of clusters
  // whatever the device can do.
  if (attributes_of(kernel).ptxVersion < kFirstPtxWithClusters) return 0;
  LaunchShape one = shape;
  one.num_ctas = shape.cluster_size;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, LaunchConfig(one, nullptr).get()) == cudaSuccess) return clusters;
  cudaGetLastError();  // CUDA remembers it, and the next caller would get it
  return 0;
}

// DeviceLimits::active_clusters. Answers are kept, because every call makes a plan and the driver takes longer than the plan.
int active_clusters(const DeviceLimits&, const void* kernel, const LaunchShape& shape) {
  using Question = std::tuple<int, const void*, int, int64_t, int>;
  static std::mutex mutex;
  static std::map<Question, int> answers;
  int device = 0;
  check_cuda(cudaGetDevice(&device));
  const Question question = {device, kernel, shape.num_threads, shape.shared_memory, shape.cluster_size};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = answers.find(question);
  return known != answers.end() ? known->second : answers[question] = ask_for_clusters(kernel, shape);
}

DeviceLimits read_limits(int device) {
  const DeviceLimits limits = {
      10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device),
      attribute(cudaDevAttrMultiProcessorCount, device),
      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
      attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
      attribute(cudaDevAttrMaxThreadsPerMultiProcessor, device),
      attribute(cudaDevAttrMaxBlocksPerMultiprocessor, device),
      attribute(cudaDevAttrClusterLaunch, device) ? active_clusters : nullptr};
  check_supported(limits, device);
  return limits;
}

// Lets this thread allocate and load while a CUDA graph is captured. Neither becomes part of the graph.
class OutsideCapture {
 public:
  OutsideCapture() { check_cuda(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Loads all kernels, because a capture may launch any of them next, and lets each have the most shared memory that can be granted, so that no
// launch has to ask for more. A launch still takes only its own share. Plans may count on what the kernel with most static shared memory gets.
void load_kernels(DeviceLimits& limits) {
  int64_t most = 0;
  for (const AnyKernel* kernel = AnyKernel::first; kernel; kernel = kernel->next)
    most = std::max(most, int64_t(attributes_of(kernel->function).sharedSizeBytes));
  limits.shared_memory_per_cta -= most;
  for (const AnyKernel* kernel = AnyKernel::first; kernel; kernel = kernel->next)
    check_cuda(
        cudaFuncSetAttribute(kernel->function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(limits.shared_memory_per_cta)));
}

DeviceReport* make_report() {
  void* memory = nullptr;
  check_cuda(cudaHostAlloc(&memory, sizeof(DeviceReport), cudaHostAllocMapped | cudaHostAllocPortable));
  return new (memory) DeviceReport{};
}

Device make_device(int device) {
  const OutsideCapture outside;
  DeviceLimits limits = read_limits(device);
  load_kernels(limits);
  return {limits, make_report()};
}

// CUDA's contexts and the memory of reports do not outlive a fork. Nor can the mutex be used, because a thread may have held it.
void check_process() {
  static std::atomic<pid_t> first_user{0};
  pid_t user = 0;
  const pid_t process = getpid();
  if (!first_user.compare_exchange_strong(user, process) && user != process)
    throw std::runtime_error("CUDA cannot be used in a process that was forked from one that has used it; start it by \"spawn\"");
}

class Devices {
 public:
  const Device& get(int device) {
    check_process();
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = devices_.find(device);
    return found != devices_.end() ? found->second : devices_.emplace(device, make_device(device)).first->second;
  }
  const Device* find(int device) {
    check_process();
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = devices_.find(device);
    return found != devices_.end() ? &found->second : nullptr;
  }

 private:
  std::mutex mutex_;
  std::map<int, Device> devices_;  // a map, because its elements stay where they are
};
Devices devices;

bool is_set(const char* variable) {
  const char* value = std::getenv(variable);
  return value && *value && std::strcmp(value, "0") != 0;
}

}  // namespace

const Device& use_device(int device) { return devices.get(device); }

DeviceReport* report_if_used(int device) {
  const Device* used = devices.find(device);
  return used ? used->report : nullptr;
}

// This library does not link to libtorch_cuda, so that it is built and loads without one, and can then say what is missing.
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
  check_cuda(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

void synchronize(Stream stream) { check_cuda(cudaStreamSynchronize(stream)); }

bool is_synchronous() {
  static const bool set = is_set("GIBBS_CUDA_SYNCHRONOUS") || is_set("CUDA_LAUNCH_BLOCKING");
  return set;
}

}  // namespace gibbs
