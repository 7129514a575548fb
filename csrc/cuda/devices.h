// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/launch.cuh"
#include "cuda/views.cuh"

// What the ops ask of the machine. csrc/cuda/devices.cpp asks CUDA; the emulator of the tests answers for itself.
namespace gibbs {

inline void check_supported(const DeviceLimits& limits, int device) {
  const auto version = [](int number) { return std::to_string(number / 10) + "." + std::to_string(number % 10); };
  if (limits.compute_capability < kOldestArchitecture)
    throw std::runtime_error("cuda:" + std::to_string(device) + " has compute capability " + version(limits.compute_capability) +
                             ", older than the oldest supported, " + version(kOldestArchitecture));
}

// Throws where the device is older than any that kernels are compiled for.
const DeviceLimits& device_limits(int device);

// PyTorch's current stream on a device.
Stream current_stream(int device);

// Whether a CUDA graph is being captured on the stream: then nothing may wait.
bool is_capturing(Stream);

// Waits for all that was launched, and throws what went wrong.
void synchronize(Stream);

// Whether every call waits for its kernels and reports their faults itself: GIBBS_CUDA_SYNCHRONOUS or CUDA_LAUNCH_BLOCKING is set.
bool is_synchronous();

// Host memory that the device's kernels write their faults to; the same address on both sides.
DeviceReport* device_report(int device);

}  // namespace gibbs
