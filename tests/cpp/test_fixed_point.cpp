// SPDX-License-Identifier: Apache-2.0
// The scale of the rounded couplings: no unit's sum of |coupling| leaves 31 bits, and one more bit would not be safe.
#include <math.h>

#include <algorithm>
#include <random>
#include <vector>

#include "check.h"
#include "core/fixed_point.h"

using namespace gibbs;

int main() {
  CHECK(ceil_log2(1) == 0);
  CHECK(ceil_log2(2) == 1);
  CHECK(ceil_log2(3) == 2);
  CHECK(ceil_log2(1 << 20) == 20);

  std::mt19937_64 random(1);
  for (int trial = 0; trial < 20000; ++trial) {
    const int degree = 1 + int(random() % (trial % 10 ? 8 : 3000));
    const double magnitude = exp2(double(int(random() % 253)) - 126);
    const bool equal = random() % 4 == 0;  // all couplings equal: the largest sums
    std::vector<float> weight(degree);
    for (float& w : weight) w = float(magnitude * (equal ? 1.0 : std::uniform_real_distribution<double>(-1, 1)(random)));
    float largest = 0;
    for (float w : weight) largest = std::max(largest, fabsf(w));
    if (largest == 0) continue;
    int e;
    frexp(largest, &e);
    const int b = coupling_sum_bits(degree);
    int64_t sum = 0;
    for (float w : weight) sum += int64_t(ceil(ldexp(fabs(double(w)), b - e)));
    const int k = scale_exponent(sum, degree, e);
    if (largest_scale_fits(degree, e)) CHECK(k == kMaxScaleExponent, "degree %d, e %d: k = %d", degree, e, k);

    int64_t rounded = 0;
    for (float w : weight) rounded += llrint(fabs(ldexp(double(w), k)));
    CHECK(rounded <= 0x7fffffff, "degree %d, largest %g: sum %lld at k = %d", degree, largest, (long long)rounded, k);
    const double bound = ldexp(double(sum), k + 1 + e - b) + (degree + 1) / 2;
    CHECK(k == kMaxScaleExponent || bound > 0x7fffffff, "degree %d, largest %g: k = %d is not the largest", degree, largest, k);
  }
}
