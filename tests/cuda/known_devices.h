// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/launch.cuh"

// Limits of GPUs, from NVIDIA's "CUDA C++ Programming Guide" 13.0, table "Technical Specifications per Compute Capability", and the
// architecture whitepapers (number of SMs).
namespace gibbs {

struct KnownDevice {
  const char* name;
  DeviceLimits limits;
};

constexpr int64_t kKiB = 1024;
constexpr KnownDevice kKnownDevices[] = {
    {"T4", {75, 40, 64 * kKiB, 64 * kKiB, 1024, 16}},          {"A100", {80, 108, 163 * kKiB, 164 * kKiB, 2048, 32}},
    {"A10", {86, 72, 99 * kKiB, 100 * kKiB, 1536, 16}},        {"L40S", {89, 142, 99 * kKiB, 100 * kKiB, 1536, 24}},
    {"H100", {90, 132, 227 * kKiB, 228 * kKiB, 2048, 32}},     {"B200", {100, 148, 227 * kKiB, 228 * kKiB, 2048, 32}},
    {"RTX 5090", {120, 170, 99 * kKiB, 100 * kKiB, 1536, 24}},
};
constexpr int kH100 = 4;

}  // namespace gibbs
