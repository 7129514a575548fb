// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/batch.h"
#include "cuda/devices.h"
#include "fuzz.h"
#include "known_devices.h"

// A random problem's batch and counters as kernels see them, for the fuzz programs.
namespace gibbs {

class DeviceBatch {
 public:
  DeviceBatch(const std::vector<int64_t>& sizes, const std::vector<bool>& is_model_dim, const SweepCall& c)
      : seed_(int64_t(c.seed)) {
    for (const bool of_models : {true, false})
      for (size_t d = 0; d < sizes.size(); ++d)
        if (is_model_dim[d] == of_models) dims_.push_back(d);
    sweep_.batch.num_dims = int32_t(dims_.size());
    sweep_.batch.num_model_dims = int32_t(std::count(is_model_dim.begin(), is_model_dim.end(), true));
    sweep_.batch.num_models = c.batch.num_models();
    sweep_.batch.chains_per_model = c.batch.chains_per_model();
    in_order(sizes, sweep_.batch.sizes);
    std::vector<int64_t> contiguous(sizes.size(), 1);
    for (size_t d = sizes.size(); d-- > 1;) contiguous[d - 1] = contiguous[d] * sizes[d];
    in_order(contiguous, sweep_.batch.contiguous);
    if (c.chains) {
      sweep_.chains = c.chains;
      in_order(c.chains_strides, sweep_.chains_strides);
    }
    sweep_.chain_offset = c.chain_offset, sweep_.sweep_offset = c.sweep_offset, sweep_.num_sweeps = c.num_sweeps;
    sweep_.num_betas = c.num_betas, sweep_.num_beta_values = int64_t(c.beta.size());
    sweep_.has_beta_rows = !c.beta_strides.empty();
    if (sweep_.has_beta_rows) in_order(c.beta_strides, sweep_.beta_strides);
    if (one_in(2)) sweep_.seed_data = &seed_;
    sweep_.seed = sweep_.seed_data ? 0 : c.seed;
    if (one_in(2) || c.beta.size() > kMaxInlineBetas || !std::isfinite(c.beta.back())) sweep_.beta_data = c.beta.data();
    if (!sweep_.beta_data) std::copy(c.beta.begin(), c.beta.end(), sweep_.beta);
    sweep_.num_relaxed_sweeps = c.num_relaxed_sweeps;
    sweep_.relaxation = c.relaxation, sweep_.slope_gradient = c.slope_gradient, sweep_.sharpness = c.sharpness;
    sweep_.report = &report_;
  }
  DeviceBatch(const DeviceBatch&) = delete;  // the view points into it

  const SweepView& sweep() const { return sweep_; }
  Findings findings() { return take_findings(report_); }

  template <class T>
  ParameterView view(const Tensor<T>& t) const {
    ParameterView v = {t.data.data(), t.strides.back(), 0, {}};
    in_order(t.strides, v.batch_strides);
    return v;
  }
  // Of a tensor of 0 and 1.
  template <class T>
  StateView state_view(const Tensor<T>& t) const {
    static_assert(std::is_floating_point_v<T>);
    StateView v = {t.data.data(), sizeof(T), true, sizeof(T) == 8 ? 0x3ff0000000000000 : 0x3f800000, t.strides.back(), {}};
    in_order(t.strides, v.batch_strides);
    return v;
  }

 private:
  void in_order(const std::vector<int64_t>& of_dims, BatchStrides& out) const {
    for (size_t d = 0; d < dims_.size(); ++d) out[d] = of_dims[dims_[d]];
  }
  std::vector<size_t> dims_;  // the models' first
  int64_t seed_;
  SweepView sweep_ = {};
  DeviceReport report_ = {};
};

inline void check_shape(const LaunchShape& shape, const DeviceLimits& device) {
  CHECK(shape.shared_memory <= device.shared_memory_per_cta, "%ld bytes", long(shape.shared_memory));
  CHECK(shape.num_threads % kWarpSize == 0 && shape.num_threads <= device.max_threads_per_sm, "%d threads", shape.num_threads);
}

// One that exists, or one that makes plans for few or many multiprocessors, or for little shared memory.
inline DeviceLimits random_device() {
  DeviceLimits device = kKnownDevices[below(std::size(kKnownDevices))].limits;
  if (one_in(2)) device.num_sms = 1 << below(4);
  if (one_in(2)) device.shared_memory_per_cta = (16 << 10) + below(1 << below(17));  // real ones have more
  return device;
}

}  // namespace gibbs
