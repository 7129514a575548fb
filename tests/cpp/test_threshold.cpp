// SPDX-License-Identifier: Apache-2.0
// threshold() against 2^32 * sigmoid in double. By default every 1009th float; "test_threshold 1" takes all and prints the errors.
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
  double worst = 0;
  uint32_t previous = ~0u, largest_rise = 0;
  for (uint64_t bits = 0; bits <= 0x7f800000; bits += stride) {  // 0 to inf
    const float x = from_bits(uint32_t(bits));
    const uint32_t tail = threshold(-x), mirror = threshold(x);
    CHECK(bits == 0 || mirror == (tail ? 0u - tail : ~0u), "x = %a", x);
    worst = std::max(worst, fabs(4294967296.0 / (1 + exp(double(x))) - tail));
    if (tail > previous) largest_rise = std::max(largest_rise, tail - previous);
    previous = tail;
  }
  if (stride == 1) printf("worst error %.2f of 2^32, largest wrong-way step %u\n", worst, largest_rise);
  CHECK(worst <= 177.3, "%g", worst);
  CHECK(largest_rise <= 128, "%u", largest_rise);
}
