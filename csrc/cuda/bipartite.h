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
  void *left_relaxed, *right_relaxed, *left_mean;  // outputs, [linear number, n], beside left_out, where they begin
  void* fields;                                    // output, [num_relaxed_sweeps, linear number, n2 + n1]

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

// Where binary sweeps find the slices of a weight and the states of a CTA's chains. Slices lie in registers (kRegisters; perhaps only those for right's
// updates, and the others in shared memory), in the shared memory of a CTA (kShared) or of a cluster, which may leave a part of them in device
// memory (kCluster), or all in device memory (kGlobal). States lie in shared memory, or in device memory if they do not fit (kAllGlobal). Tests
// and benchmarks choose one.
enum class BipartiteRoute { kAuto, kRegisters, kShared, kCluster, kGlobal, kAllGlobal };

// How the scales of weights are found. CTAs share a model if models are few and large.
struct ScalePlan {
  int parts;               // CTAs of a model
  bool columns_in_shared;  // the columns' sums are in shared memory, else in the workspace
};

struct BipartitePlan {
  BipartiteRoute route;
  LaunchShape shape;
  int tiles;           // tiles of 8 chains that a CTA (a cluster) has at a time
  int tiles_per_warp;  // of those that a warp multiplies at a time: 1 or 2, or 4 or 8 with half a word
  int kept_sides;      // of which slices lie in registers: none, right, or both
  int64_t resident;    // blocks of slices that each CTA keeps in shared memory
  ScalePlan scale;
  int sweeps_ahead;   // for which random bytes are drawn at once; 0: there is no room for bytes, and each is drawn alone
  int64_t workspace;  // bytes
};

BipartitePlan plan_bipartite(const BipartiteParams&, const DeviceLimits&, BipartiteRoute = BipartiteRoute::kAuto);
void launch_bipartite(const BipartiteParams&, const BipartitePlan&, Stream);

struct ResolutionPlan {
  ScalePlan scale;
  int64_t workspace;
};

struct BipartiteRelaxedPlan {
  BipartitePlan binary;       // if there are binary sweeps,
  ResolutionPlan resolution;  // and if there are none
  LaunchShape shape;
  int chains_per_cta;
  bool is_resident;       // the weight and values are in shared memory
  bool values_in_shared;  // else they are in the outputs
  int64_t workspace;      // bytes
};
BipartiteRelaxedPlan plan_bipartite_relaxed(const BipartiteParams&, const DeviceLimits&);
void launch_bipartite_relaxed(const BipartiteParams&, const BipartiteRelaxedPlan&, Stream);

struct BipartiteBackwardPlan {
  LaunchShape shape;
  LaunchShape outer;  // the launch that sums the weight's gradient over a model's chains; 0 CTAs: the first one does it
  int outer_parts;    // parts of the chains and sweeps, whose sums are added by one more launch
  int chains_per_cta;
  bool weight_in_shared;
  int64_t workspace;
};
BipartiteBackwardPlan plan_bipartite_backward(const BipartiteBackwardParams&, const DeviceLimits&);
void launch_bipartite_backward(const BipartiteBackwardParams&, const BipartiteBackwardPlan&, Stream);

// out [linear number] (may be null) = 2^-k of each model of params.weight (float64); only weight, n1, n2, is_double, sweep and workspace are used.
ResolutionPlan plan_coupling_resolution(const BipartiteParams&, const DeviceLimits&);
void launch_coupling_resolution(const BipartiteParams&, const ResolutionPlan&, double* out, Stream);

}  // namespace gibbs
