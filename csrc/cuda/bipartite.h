// SPDX-License-Identifier: Apache-2.0
#pragma once

// Calls of the bipartite kernels: their parameters, plans and launches, without a framework or CUDA syntax.
#include "cuda/launch.cuh"
#include "cuda/views.cuh"

namespace gibbs {

struct BipartiteParams {
  SweepView sweep;
  int64_t n1, n2;
  ParameterView left_bias, right_bias, weight;
  ParameterView base_left_bias, base_right_bias;   // annealed
  StateView left, right, clamp_left, clamp_right;  // right and the clamps may be absent: zeros, no clamp
  StateOutput left_out, right_out;
  double* log_weights;  // [linear number]; not null: annealed
  bool is_double;       // dtype of the parameters

  // Relaxed calls, in the parameters' dtype.
  ParameterView start;  // [..., n1] where the relaxed sweeps begin if num_sweeps is 0; else `left` is read
  bool start_is_bits;   // `start` must hold 0 and 1 only
  void *state, *left_relaxed, *right_relaxed, *left_mean;  // outputs, [linear number, n]
  void* fields;                                            // output, [num_relaxed_sweeps, linear number, n2 + n1]

  void* workspace;  // device memory of the plan's size
};

struct BipartiteBackwardParams {
  SweepView sweep;
  int64_t n1, n2;
  ParameterView weight;
  bool is_double, needs_grad_state;
  // [linear number, n] of the parameters' dtype, contiguous; fields as above
  const void *grad_left, *grad_right, *grad_left_mean, *state, *fields;
  void *grad_state, *grad_left_bias, *grad_right_bias;  // outputs, [linear number, n]
  void* grad_weight;                                    // output, [model, n1, n2]
  void* workspace;
};

// Routes of binary sweeps. The weight of a model lies in the shared memory of one CTA (kResident) or of a cluster, or stays where it is
// (kStreaming). Tensor cores multiply a weight that many chains share; its slices lie in shared memory or (kTensorStreaming) in device memory.
// Tests and benchmarks choose one.
enum class BipartiteRoute { kAuto, kResident, kCluster, kStreaming, kTensor, kTensorStreaming };

struct BipartitePlan {
  BipartiteRoute route;
  LaunchShape shape;
  int chains_per_cta;
  int64_t workspace;  // bytes
  int slice_parts;    // number of CTAs that slice a weight beforehand (kTensorStreaming)
};

// Throws std::invalid_argument, without the op's name, if the model is too large for any route or for the chosen one.
BipartitePlan plan_bipartite(const BipartiteParams&, const DeviceLimits&, BipartiteRoute = BipartiteRoute::kAuto);
void launch_bipartite(const BipartiteParams&, const BipartitePlan&, Stream);

BipartitePlan plan_bipartite_relaxed(const BipartiteParams&, const DeviceLimits&);
void launch_bipartite_relaxed(const BipartiteParams&, const BipartitePlan&, Stream);

struct BipartiteBackwardPlan {
  LaunchShape shape;
  LaunchShape outer;  // the launch that sums the weight's gradient over a model's chains; 0 CTAs: the first one does it
  int chains_per_cta;
  bool weight_in_shared;
  int64_t workspace;
};
BipartiteBackwardPlan plan_bipartite_backward(const BipartiteBackwardParams&, const DeviceLimits&);
void launch_bipartite_backward(const BipartiteBackwardParams&, const BipartiteBackwardPlan&, Stream);

// out [model] = 2^-k of each model of params.weight (float64); only weight, n1, n2, is_double and sweep.batch are used.
void launch_coupling_resolution(const BipartiteParams&, double* out, Stream);

}  // namespace gibbs
