// SPDX-License-Identifier: Apache-2.0
// The emulator's answers in place of csrc/cuda/devices.cpp: there is device 0, of a kind that tests choose.
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda/devices.h"
#include "known_devices.h"

namespace gibbs {

namespace {

DeviceReport report = {};

}

// Asked at every call, so that what tests set in the environment holds from the next one on.
const Device& use_device(int device) {
  constexpr DeviceLimits kTooOld = {70, 80, 96 * kKiB, 96 * kKiB, 2048, 32};
  constexpr DeviceLimits kPromisesTooMuch = {90, 132, 512 * kKiB, 512 * kKiB, 2048, 32};  // of shared memory
  static thread_local Device used;
  using cuda_emulator::Order;
  const char *name = std::getenv("GIBBS_EMULATED_DEVICE"), *order = std::getenv("GIBBS_EMULATOR_ORDER"),
             *seed = std::getenv("GIBBS_EMULATOR_SEED");
  cuda_emulator::options().seed = seed ? std::strtoull(seed, nullptr, 0) : 1;
  cuda_emulator::options().order = !order                           ? Order::kRandom
                                   : !std::strcmp(order, "forward") ? Order::kForward
                                   : !std::strcmp(order, "reverse") ? Order::kReverse
                                                                    : Order::kRandom;
  if (name && !std::strcmp(name, "V100")) check_supported(kTooOld, device);
  used = {kKnownDevices[kH100].limits, &report};
  for (const KnownDevice& known : kKnownDevices)
    if (name && !std::strcmp(known.name, name)) used.limits = known.limits;
  if (name && !std::strcmp(name, "promises too much")) used.limits = kPromisesTooMuch;
  return used;
}
DeviceReport* report_if_used(int device) { return device == 0 ? &report : nullptr; }
Stream current_stream(int) { return nullptr; }
bool is_capturing(Stream) { return false; }
void synchronize(Stream) {}
bool is_synchronous() { return !std::getenv("GIBBS_EMULATED_ASYNCHRONOUS"); }

}  // namespace gibbs

static const char* name_of(const void* kernel) {
  Dl_info info = {};
  dladdr(kernel, &info);
  return info.dli_sname ? info.dli_sname : "";
}

// For bench/cuda_report.py. From now on launches are counted, and run most_ctas CTAs each, or as many more as the first CTAs of sweeps need the
// results of: the first model's scale and slices, all that is packed.
extern "C" __attribute__((visibility("default"))) void emulator_count(int64_t most_ctas) {
  cuda_emulator::options().counts = true;
  cuda_emulator::options().most_ctas = most_ctas;
  cuda_emulator::options().least_ctas = [](const void* kernel) -> int64_t {
    constexpr std::pair<const char*, int64_t> kStages[] = {
        {"part_kernel", INT64_MAX}, {"pack_kernel", INT64_MAX}, {"slice_kernel", 128}};
    for (const auto& [stage, least] : kStages)
      if (std::strstr(name_of(kernel), stage)) return least;
    return 0;
  };
  cuda_emulator::launches().clear();
}
// Returns the counted launches as JSON, with kernels by the name that nvcc gives them too, and ends the counting.
extern "C" __attribute__((visibility("default"))) const char* emulator_launches() {
  static std::string text;
  text = "[";
  for (const cuda_emulator::Launch& launch : cuda_emulator::launches()) {
    const auto number = [](const char* name, int64_t value) { return std::string(", \"") + name + "\": " + std::to_string(value); };
    const cuda_emulator::Counts& c = launch.counts;
    text += std::string(text.size() > 1 ? ", " : "") + "{\"kernel\": \"" + name_of(launch.kernel) + "\"" +
            number("num_ctas", launch.num_ctas) + number("num_threads", launch.num_threads) +
            number("shared_memory", launch.shared_memory) + number("cluster_size", launch.cluster_size) +
            number("ctas_run", launch.ctas_run) + number("instructions", c.instructions) + number("wavefronts", c.wavefronts) +
            number("conflicts", c.conflicts) + number("barriers", c.barriers) + number("lines", c.lines) +
            number("sectors", c.sectors) + number("different_sectors", c.different_sectors) + number("products", c.products) + "}";
  }
  cuda_emulator::options().counts = false;
  cuda_emulator::options().most_ctas = -1;
  return (text += "]").c_str();
}
