// SPDX-License-Identifier: Apache-2.0
// threshold() against 2^32 * sigmoid and acceptance() against 2^32 * exp in double. By default every 1009th float; "test_threshold
// 1" takes all and prints the errors.
#include <math.h>
#include <string.h>

#include <algorithm>

#include "check.h"
#include "core/threshold.h"

using namespace gibbs;

static float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

int main(int argc, char** argv) {
  CHECK(threshold(0.0f) == 1u << 31);
  CHECK(threshold(-0.0f) == 1u << 31);
  CHECK(threshold(INFINITY) == ~0u);
  CHECK(threshold(-INFINITY) == 0);
  CHECK(threshold(3e38f) == ~0u);
  CHECK(threshold(-3e38f) == 0);
  CHECK(threshold(1e-45f) == 1u << 31);

  const uint32_t stride = argc > 1 ? uint32_t(atoi(argv[1])) : 1009;
  double worst = 0, worst_acceptance = 0;
  uint32_t previous = ~0u, largest_rise = 0, previous_acceptance = ~0u;
  for (uint64_t bits = 0; bits <= 0x7f800000; bits += stride) {  // 0 to inf
    const float x = from_bits(uint32_t(bits));
    const uint32_t tail = threshold(-x), mirror = threshold(x);
    CHECK(bits == 0 || mirror == (tail ? 0u - tail : ~0u), "x = %a", x);
    worst = std::max(worst, fabs(4294967296.0 / (1 + exp(double(x))) - tail));
    if (tail > previous) largest_rise = std::max(largest_rise, tail - previous);
    previous = tail;
    if (bits == 0) continue;
    const uint32_t accepted = acceptance(-x);
    worst_acceptance = std::max(worst_acceptance, fabs(4294967296.0 * exp(-double(x)) - accepted));
    CHECK(accepted <= previous_acceptance, "x = %a", -x);
    previous_acceptance = accepted;
  }
  CHECK(acceptance(-1e-45f) == ~0u);
  CHECK(acceptance(-22.18f) == 1);
  CHECK(acceptance(-22.181f) == 0 && previous_acceptance == 0);
  if (stride == 1) printf("worst errors %.2f and %.2f of 2^32, largest wrong-way step %u\n", worst, worst_acceptance, largest_rise);
  CHECK(worst <= 177.3, "%g", worst);
  CHECK(largest_rise <= 128, "%u", largest_rise);
  CHECK(worst_acceptance <= 207, "%g", worst_acceptance);
}
