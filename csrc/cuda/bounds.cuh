// SPDX-License-Identifier: Apache-2.0
#pragma once

// Decisions by bounds (csrc/README.md, 2). A unit's random byte is known before its field. It leaves open only logits of an interval: above it
// the bit is 1 and below it 0, whatever the word's other 24 bits are. So nearly all bits are decided by a comparison with an approximate
// logit, and only the others need the rest of the word and, one time in a thousand, the exact field.
#include "cuda/rounding.cuh"
#include "cuda/sampling.cuh"

namespace gibbs {

constexpr int kBytes = 256;
GIBBS_HOST_DEVICE int64_t open_logits_bytes(int copies) { return shared_bytes<uint32_t>(kBytes * copies); }

constexpr int kMaxOpenUnits = 512;  // that are noted; further ones are decided at once
GIBBS_HOST_DEVICE int64_t open_units_bytes() {
  return 2 * shared_bytes<int32_t>(kMaxOpenUnits) + shared_bytes<uint8_t>(kMaxOpenUnits) + shared_bytes<uint32_t>(2);
}

// What rounding to slices has taken from a unit's field: between centre - error and centre + error.
struct alignas(8) FieldError {
  float centre, error;
};

#if defined(GIBBS_DEVICE)

// The float16 towards 0 from x, |x| < 65504; 0 for |x| < 2^-14.
GIBBS_DEVICE uint32_t truncated_to_half(float x) {
  const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffff;
  return (bits >> 31 << 15) | (magnitude < 113u << 23 ? 0 : (magnitude >> 13) - (112u << 10));
}
constexpr uint32_t kHalfInfinity = 0x7c00;

// A float16 that is 0, normal or infinite.
GIBBS_DEVICE float float_of_half(uint32_t half) {
#if defined(GIBBS_EMULATE)
  const uint32_t sign = (half & 0x8000) << 16, magnitude = half & 0x7fff;
  return __uint_as_float(sign | (!magnitude ? 0 : magnitude == kHalfInfinity ? 0x7f800000u : (magnitude << 13) + (112u << 23)));
#else
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(uint16_t(half)));
  return value;
#endif
}

// The logits that a random byte leaves open: [low, high] as two float16, high in the upper half. The margins hold the rounding to float16, the
// error of log(), and that of threshold() and acceptance() (core/threshold.h). tests/cuda/test_bounds.cpp compares both ends with exact
// probabilities, for every byte.
template <bool kMetropolis>
GIBBS_DEVICE uint32_t open_logits(int byte) {
  const auto at = [](int b) { return log(float(b) / (kMetropolis ? 256.0f : float(256 - b))); };
  const auto margin = [](float logit) { return 2e-4f + 0x1.02p-10f * fabsf(logit); };
  const float low = byte == 0 ? -22.5f : at(byte);  // below -22.19 both functions are 0
  const uint32_t low_half = truncated_to_half(low - margin(low));
  if (!kMetropolis && byte == 255) return kHalfInfinity << 16 | low_half;  // a threshold does not exceed the largest word
  const float high = at(byte + 1);
  return truncated_to_half(high + margin(high)) << 16 | low_half;
}

// The intervals of all bytes in shared memory, in kCopies copies: a lane reads one of its own, or one that few others read, so that fewer lanes read
// from the same bank at a time.
template <int kCopies>
class OpenLogits {
 public:
  OpenLogits() = default;
  GIBBS_DEVICE explicit OpenLogits(SharedMemory& memory) : table_(memory.take<uint32_t>(kBytes * kCopies)) {}
  // A barrier must follow.
  template <bool kMetropolis>
  GIBBS_DEVICE void tabulate() const {
    for (int byte = int(threadIdx.x); byte < kBytes; byte += int(blockDim.x)) {
      const uint32_t open = open_logits<kMetropolis>(byte);
      for (int copy = 0; copy < kCopies; ++copy) table_[byte * kCopies + (copy + lane()) % kCopies] = open;
    }
  }
  GIBBS_DEVICE uint32_t operator[](uint32_t byte) const { return table_[byte * kCopies + uint32_t(lane()) % kCopies]; }

 private:
  Shared<uint32_t> table_;
};

// ---- bounds of a logit -----------------------------------------------------------------------------------------------------------

// A field's integer in units of 2^shift, off by at most `error` in units of 1, makes logits of a model between slope field + low and
// slope field + high, low and high of a unit.
struct ModelBounds {
  float beta, slope, error, largest_sum;
  // scale = 2^-k
  GIBBS_DEVICE ModelBounds(float beta_, int shift, float scale, float field_error)
      : beta(beta_),
        slope(beta_ * (scale * FloatTraits<float>::power(shift))),
        // Both float32 computations are off by at most 7 * 2^-24 of |beta| (2^31 scale + |bias|); the second part is in UnitBounds.
        error(fabsf(beta_) * ((field_error + 1024.0f) * scale)),
        largest_sum(largest_coupling_sum(scale)) {}
};
struct UnitBounds {
  float slope, low, high;
  UnitBounds() = default;
  // base_bias: of an annealed sweep, with beta bias + (1 - beta) base_bias; 0 of others. own: what its field has besides, and the error of that.
  GIBBS_DEVICE UnitBounds(const ModelBounds& m, float bias, float base_bias = 0, FieldError own = {0, 0}) : slope(m.slope) {
    const float of_bias = m.beta * (bias + own.centre), of_base = (1.0f - m.beta) * base_bias;
    const float constant = of_bias + of_base,
                error = m.error + fabsf(m.beta) * own.error + 0x1p-21f * (fabsf(of_bias) + fabsf(of_base));
    low = constant - error, high = constant + error;
    // Nothing is decided by bounds where exact computations may overflow, and no slope field is larger than 2^21 error.
    const float most = fabsf(bias) + fabsf(base_bias) + m.largest_sum + fabsf(constant) + 0x1p22f * error;
    if (!(most < 1e38f)) slope = 0, low = -1e38f, high = 1e38f;
  }
};

// ---- decisions -------------------------------------------------------------------------------------------------------------------

// Bits of units one after the other, the last one lowest.
struct Decided {
  uint32_t is_not_one = 0, is_zero = 0;  // not decided as 1; decided as 0
  // Takes a unit whose logit is between `low` and `high`. open: of its byte. A difference's sign is exact.
  GIBBS_DEVICE void add(uint32_t open, float low, float high) {
    is_not_one = is_not_one << 1 | __float_as_uint(low - float_of_half(open >> 16)) >> 31;
    is_zero = is_zero << 1 | __float_as_uint(high - float_of_half(open & 0xffff)) >> 31;
  }
  // Takes units that do not matter, as 1.
  GIBBS_DEVICE void skip(int count) { is_not_one <<= count, is_zero <<= count; }
  GIBBS_DEVICE uint32_t open() const { return is_not_one & ~is_zero; }
};

// Whether a word is below the threshold of a logit between `low` and `high`, or below the acceptance.
enum class IsBelow { kNo, kYes, kOpen };
template <bool kMetropolis>
GIBBS_DEVICE IsBelow is_below(uint32_t word, float low, float high) {
  constexpr uint64_t kSlack = 512;  // threshold() and acceptance() of a larger logit are not smaller by more
  if (kMetropolis && high >= 0) return low >= 0 ? IsBelow::kYes : IsBelow::kOpen;
  const auto value = [](float x) { return kMetropolis ? acceptance(x) : threshold(x); };
  if (word + kSlack < value(low)) return IsBelow::kYes;
  return word >= value(high) + kSlack ? IsBelow::kNo : IsBelow::kOpen;
}

// Notes in shared memory of the units of a colour (or side) that bounds leave open, which all threads decide when the colour is done.
class OpenUnits {
 public:
  struct Unit {
    int position, chain;
    int32_t field;
  };

  OpenUnits() = default;
  GIBBS_DEVICE explicit OpenUnits(SharedMemory& memory)
      : positions_(memory.take<int32_t>(kMaxOpenUnits)),
        fields_(memory.take<int32_t>(kMaxOpenUnits)),
        chains_(memory.take<uint8_t>(kMaxOpenUnits)),
        counts_(memory.take<uint32_t>(2)) {}
  // A barrier must follow.
  GIBBS_DEVICE void clear() const {
    if (threadIdx.x < 2) counts_[threadIdx.x] = 0;
  }

  // Takes room for some units, from the returned place on.
  GIBBS_DEVICE uint32_t reserve(int count) const { return atomicAdd(&counts_[turn_], uint32_t(count)); }
  // Notes a unit at a place; returns whether there is room.
  GIBBS_DEVICE bool note(uint32_t at, const Unit& unit) const {
    if (at >= kMaxOpenUnits) return false;
    positions_[at] = unit.position, fields_[at] = unit.field, chains_[at] = uint8_t(unit.chain);
    return true;
  }

  // Begins to take the notes up, after a barrier; returns how many there are. The next colour's are counted by another counter, which is cleared.
  GIBBS_DEVICE uint32_t take_up() const {
    if (threadIdx.x == 0) counts_[turn_ ^ 1] = 0;
    const uint32_t count = counts_[turn_];
    return count < kMaxOpenUnits ? count : kMaxOpenUnits;
  }
  GIBBS_DEVICE Unit operator[](uint32_t at) const { return {positions_[at], chains_[at], fields_[at]}; }
  // Goes on to the next colour, after another barrier.
  GIBBS_DEVICE void next() { turn_ ^= 1; }

 private:
  Shared<int32_t> positions_, fields_;
  Shared<uint8_t> chains_;
  Shared<uint32_t> counts_;
  int turn_ = 0;
};

#endif

}  // namespace gibbs
