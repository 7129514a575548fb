// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/fixed_point.h"
#include "cpu/batch.h"

namespace gibbs {

// The rounding of the model whose error is largest. Any thread may note roundings.
class WorstRounding {
 public:
  WorstRounding(const SweepCall& call, int64_t degree, bool annealed)
      : degree_(degree), annealed_(annealed), largest_beta_(largest_magnitude(call.beta)) {}
  void note(Rounding rounding) {
    for (Rounding seen = most_.load(); field_error(rounding, degree_) > field_error(seen, degree_);)
      if (most_.compare_exchange_weak(seen, rounding)) return;
  }
  // Notes the biases [units, models] of `models` models. base: see cancelling_bias(). The loop over models runs only if some bias
  // is large enough to matter.
  void note_biases(const float* scale, int models, int64_t units, const float* bias, const float* base) {
    const float coarsest = *std::max_element(scale, scale + models);
    const double error = kResolutionLimit / largest_beta_ - field_error({coarsest, 0}, degree_);  // the error that float32 may add
    const auto harmless = float(std::min(error / float32_error({0, 1}), double{std::numeric_limits<float>::max()}));
    if (!annealed_ && largest_coupling_sum(coarsest) <= harmless) return;
    int is_large = 0;
    for (int64_t i = 0; i < units * models; ++i) is_large |= (std::fabs(bias[i]) > harmless) | (std::fabs(base[i]) > harmless);
    if (!is_large) return;
    for (int m = 0; m < models; ++m) {
      float largest = 0;
      for (int64_t i = m; i < units * models; i += models) largest = std::max(largest, cancelling_bias(bias[i], base[i], scale[m]));
      note({scale[m], largest});
    }
  }
  Rounding most() const { return most_.load(); }

 private:
  const int64_t degree_;
  const bool annealed_;
  const double largest_beta_;
  std::atomic<Rounding> most_{Rounding{0, 0}};
};

}  // namespace gibbs
