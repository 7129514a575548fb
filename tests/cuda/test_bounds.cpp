// SPDX-License-Identifier: Apache-2.0
// The bounds of cuda/bounds.cuh against exact probabilities: what a random byte leaves open, and what a whole word does.
#include "check.h"
#include "cuda/bounds.cuh"

using namespace gibbs;

// threshold() and acceptance() are within this many units of 2^-32 of the exact value (core/threshold.h, tests/cpp/test_threshold.cpp).
constexpr double kError = 208;

static double exact(bool metropolis, double x) { return 4294967296.0 * (metropolis ? std::min(1.0, exp(x)) : 1 / (1 + exp(-x))); }

// Beyond the interval all words with the byte are on one side of the threshold, and it is not much longer than that takes.
template <bool kMetropolis>
static void check_bytes() {
  double length = 0;
  for (int byte = 0; byte < kBytes; ++byte) {
    const uint32_t open = open_logits<kMetropolis>(byte);
    const double low = float_of_half(open & 0xffff), high = float_of_half(open >> 16);
    const double least = byte * 16777216.0, most = least + 16777216.0;  // of the words
    CHECK(byte == 0 ? low < -22.2 : exact(kMetropolis, low) + kError <= least, "byte %d, low %g", byte, low);
    if (!kMetropolis && byte == 255)
      CHECK(std::isinf(high));
    else
      CHECK(exact(kMetropolis, high) - kError >= most || (kMetropolis && high >= 0), "byte %d, high %g", byte, high);
    length += std::min(exact(kMetropolis, high), 4294967295.0) - exact(kMetropolis, low);
  }
  CHECK(length < 1.25 * 4294967296.0, "the intervals are %g times as long as they must be", length / 4294967296.0);
}

// A word's verdict for an interval of logits is that for each logit inside.
template <bool kMetropolis>
static void check_words() {
  uint64_t random = 1;
  const auto next = [&] { return random = random * 6364136223846793005u + 1442695040888963407u; };
  for (int trial = 0; trial < 2000000; ++trial) {
    const float low = (float(next() >> 40) / 16777216.0f - 0.5f) * 50,
                high = low + (trial % 3 ? 1e-3f : 1e-6f) * float(next() >> 40) / 16777216.0f,
                inside = low + (high - low) * (float(next() >> 40) / 16777216.0f);
    const auto value = [](float x) { return kMetropolis ? (x >= 0 ? 0xffffffffu : acceptance(x)) : threshold(x); };
    const uint32_t near = value(trial % 2 ? low : high) + uint32_t(next() >> 54) - 512,
                   word = trial % 5 ? near : uint32_t(next() >> 32);
    for (const float x : {low, inside, high}) {
      const bool below = kMetropolis && x >= 0 ? true : word < value(x);
      const IsBelow verdict = is_below<kMetropolis>(word, low, high);
      CHECK(verdict == IsBelow::kOpen || (verdict == IsBelow::kYes) == below, "word %u, logits %g .. %g .. %g", word, double(low),
            double(x), double(high));
    }
  }
}

int main() {
  check_bytes<false>();
  check_bytes<true>();
  check_words<false>();
  check_words<true>();
}
