// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/launch.cuh"

// Limits of GPUs, from NVIDIA's "CUDA C++ Programming Guide" 13.0, table "Technical Specifications per Compute Capability", and the
// architecture whitepapers (number of SMs).
namespace gibbs {

// DeviceLimits::active_clusters of a device that runs clusters of at most `most` CTAs, as many clusters as it has multiprocessors for.
template <int most>
int clusters_of_up_to(const DeviceLimits& limits, const void*, const LaunchShape& shape) {
  return shape.cluster_size <= most ? limits.num_sms / shape.cluster_size : 0;
}

struct KnownDevice {
  const char* name;
  DeviceLimits limits;
};

constexpr int64_t kKiB = 1024;
constexpr KnownDevice kKnownDevices[] = {
    {"T4", {75, 40, 64 * kKiB, 64 * kKiB, 1024, 16}},
    {"A100", {80, 108, 163 * kKiB, 164 * kKiB, 2048, 32}},
    {"A10", {86, 72, 99 * kKiB, 100 * kKiB, 1536, 16}},
    {"L40S", {89, 142, 99 * kKiB, 100 * kKiB, 1536, 24}},
    {"H100", {90, 132, 227 * kKiB, 228 * kKiB, 2048, 32, clusters_of_up_to<8>}},
    {"B200", {100, 148, 227 * kKiB, 228 * kKiB, 2048, 32, clusters_of_up_to<8>}},
    {"RTX 5090", {120, 170, 99 * kKiB, 100 * kKiB, 1536, 24, clusters_of_up_to<8>}},
    // Made up: of a capability that has clusters, but granting small ones or none, as a slice of a device may.
    {"pairs", {90, 16, 48 * kKiB, 228 * kKiB, 2048, 32, clusters_of_up_to<2>}},
    {"no clusters", {90, 16, 48 * kKiB, 228 * kKiB, 2048, 32, clusters_of_up_to<0>}},
    // Made up: so small that a CTA takes many chains.
    {"one pair", {90, 2, 63 * kKiB, 64 * kKiB, 2048, 32, clusters_of_up_to<2>}},
};
constexpr int kH100 = 4;

}  // namespace gibbs
