// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstring>
#include <optional>

#include "cuda/launch.cuh"
#include "cuda/views.cuh"

// The ops' questions to the machine. csrc/cuda/devices.cpp asks CUDA; the emulator of the tests answers for itself.
namespace gibbs {

inline void check_supported(const DeviceLimits& limits, int device) {
  const auto version = [](int number) { return std::to_string(number / 10) + "." + std::to_string(number % 10); };
  if (limits.compute_capability < kOldestArchitecture)
    throw std::runtime_error("cuda:" + std::to_string(device) + " has compute capability " + version(limits.compute_capability) +
                             ", older than the oldest supported, " + version(kOldestArchitecture));
}

struct Device {
  DeviceLimits limits;
  DeviceReport* report;  // host memory that the device's kernels write their faults to; the same address on both sides
};

// The device, which is the current one. Its first use, which may happen while a CUDA graph is captured, loads all kernels there and lets each
// have as much shared memory as the device grants. Throws if the device is older than any that kernels are compiled for.
const Device& use_device(int device);

// The report of a device; null if it has never been used, in which case this does not initialise it.
DeviceReport* report_if_used(int device);

// PyTorch's current stream on a device.
Stream current_stream(int device);

// Whether a CUDA graph is being captured on the stream, so that nothing may wait.
bool is_capturing(Stream);

// Waits for everything launched on the stream and throws its errors.
void synchronize(Stream);

// Whether every call waits for its kernels and reports their faults itself: GIBBS_CUDA_SYNCHRONOUS or CUDA_LAUNCH_BLOCKING is set.
bool is_synchronous();

// ---- reports, as the host reads them ---------------------------------------------------------------------------------------------

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct Fault {
  uint32_t op;
  Outcome outcome;
  float value;
};
struct ReportedRounding {
  uint32_t op;
  Rounding rounding;
  int64_t degree;
};
struct Findings {
  std::optional<Fault> fault;
  std::optional<ReportedRounding> rounding;
};

// Takes what a device's kernels have found since the last call, so that the report is empty again.
//
// Each word is exchanged for 0, so this call or the next returns what a kernel stores meanwhile. It does no harm that a device stores instead of
// exchanging: the store of an aligned 8-byte word reaches the host's memory whole, as one write, through the host's own cache coherence, and
// the exchange holds the word's cache line from reading to writing. It comes before that write or after it.
inline Findings take_findings(DeviceReport& report) {
  const auto take = [](uint64_t& word) { return __atomic_exchange_n(&word, uint64_t{0}, __ATOMIC_ACQ_REL); };
  Findings found;
  if (const uint64_t word = take(report.fault))
    found.fault = {uint32_t(word >> 40), Outcome(word >> 32 & 0xff), float_of_bits(uint32_t(word))};
  if (const uint64_t word = take(report.rounding)) {
    const Rounding rounding = {float_of_bits(uint32_t(word >> 48 & 0xff) << kMantissaBits),
                               float_of_bits(uint32_t(word >> 32 & 0xffff) << 16)};
    found.rounding = {uint32_t(word >> 56), rounding, int64_t(uint32_t(word))};
  }
  return found;
}

}  // namespace gibbs
