// SPDX-License-Identifier: Apache-2.0
// What the emulator answers for csrc/cuda/devices.cpp: device 0, of a kind that tests choose.
#include <cstdlib>
#include <cstring>

#include "cuda/devices.h"
#include "known_devices.h"

namespace gibbs {

// Asked at every call, so that what tests set in the environment holds from the next one on.
const DeviceLimits& device_limits(int) {
  using cuda_emulator::Order;
  const char *name = std::getenv("GIBBS_EMULATED_DEVICE"), *order = std::getenv("GIBBS_EMULATOR_ORDER"),
             *seed = std::getenv("GIBBS_EMULATOR_SEED");
  cuda_emulator::options().seed = seed ? std::strtoull(seed, nullptr, 0) : 1;
  cuda_emulator::options().order = !order                           ? Order::kRandom
                                   : !std::strcmp(order, "forward") ? Order::kForward
                                   : !std::strcmp(order, "reverse") ? Order::kReverse
                                                                    : Order::kRandom;
  for (const KnownDevice& device : kKnownDevices)
    if (name && !std::strcmp(device.name, name)) return device.limits;
  return kKnownDevices[kH100].limits;
}
Stream current_stream(int) { return nullptr; }
bool is_capturing(Stream) { return false; }
void synchronize(Stream) {}
bool is_synchronous() { return true; }
DeviceReport* device_report(int) {
  static DeviceReport report = {};
  return &report;
}

}  // namespace gibbs
