// SPDX-License-Identifier: Apache-2.0
#include <atomic>
#include <cstring>

#include "core/macros.h"
#include "cpu/kernels/table.h"

namespace gibbs {
namespace baseline {
extern const Kernels table;
}
#if GIBBS_X86
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

const Kernels* best() {
#if GIBBS_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return &avx512::table;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2")) return &avx2::table;
#endif
  return &baseline::table;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* k = chosen.load(std::memory_order_relaxed);
  if (!k) chosen.store(k = best(), std::memory_order_relaxed);
  return *k;
}

bool set_instruction_set(const char* name) {
  const Kernels* wanted = nullptr;
  if (!std::strcmp(name, "auto")) wanted = best();
  if (!std::strcmp(name, "baseline")) wanted = &baseline::table;
#if GIBBS_X86
  if (!std::strcmp(name, "avx2") && best() != &baseline::table) wanted = &avx2::table;
  if (!std::strcmp(name, "avx512") && best() == &avx512::table) wanted = &avx512::table;
#endif
  if (wanted) chosen.store(wanted, std::memory_order_relaxed);
  return wanted;
}

}  // namespace gibbs
