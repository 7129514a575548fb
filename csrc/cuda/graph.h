// SPDX-License-Identifier: Apache-2.0
#pragma once

// Calls of the kernels of coloured graphs: their parameters, plans and launches, without a framework or CUDA syntax.
#include "cuda/launch.cuh"
#include "cuda/views.cuh"

namespace gibbs {

struct GraphModel {
  SweepView sweep;
  // In device memory (core/graph_view.h). Only its size has been checked: kernels check every number that they follow.
  const int32_t* layout;
  int64_t num_nodes, num_edges, num_colors;
  ParameterView coupling;  // [..., E]
  bool is_double;
};

struct GraphParams : GraphModel {
  ParameterView bias, base_bias;  // base_bias: annealed
  StateView state, clamp;         // clamp may be absent
  StateOutput state_out;
  double* log_weights;  // [linear number]; not null: annealed
  bool metropolis;      // binary sweeps by Metropolis's rule instead of Gibbs's; not annealed

  // Relaxed calls, in the parameters' dtype.
  ParameterView start;   // [..., N] where the relaxed sweeps begin if num_sweeps is 0; else `state` is read
  bool start_is_bits;    // `start` must hold 0 and 1 only
  void *relaxed, *mean;  // outputs, [linear number, N], beside state_out, where they begin
  void* fields;          // output, [num_relaxed_sweeps, linear number, N]

  void* workspace;
};

struct GraphBackwardParams : GraphModel {
  const void *grad_relaxed, *grad_mean, *state, *fields;  // [linear number, N], contiguous; fields as above
  void *grad_state, *grad_bias;                           // outputs, [linear number, N]
  void* grad_coupling;                                    // output, [model, E]
  void* workspace;
};

// Where binary sweeps keep a CTA's states: in shared memory, or in device memory if they do not fit there. Tests choose one.
enum class GraphCudaRoute { kAuto, kShared, kGlobal };

struct GraphPlan {
  GraphCudaRoute route;
  LaunchShape shape;
  int tile;  // number of a CTA's chains, a power of 2, at most 32
  int64_t workspace;
};

GraphPlan plan_graph(const GraphParams&, const DeviceLimits&, GraphCudaRoute = GraphCudaRoute::kAuto);
void launch_graph(const GraphParams&, const GraphPlan&, Stream);

// Of relaxed sweeps, forward or backward.
struct GraphTilePlan {
  LaunchShape shape;
  int chains_per_cta;
  int tile;  // number of a CTA's chains that lie side by side in neighbouring lanes, a power of 2
  bool state_in_shared, couplings_in_shared;
  int64_t workspace;
};
struct GraphRelaxedPlan : GraphTilePlan {
  GraphPlan binary;  // of the sweeps before the relaxed ones, if there are any
};
GraphRelaxedPlan plan_graph_relaxed(const GraphParams&, const DeviceLimits&);
void launch_graph_relaxed(const GraphParams&, const GraphRelaxedPlan&, Stream);

using GraphBackwardPlan = GraphTilePlan;
GraphBackwardPlan plan_graph_backward(const GraphBackwardParams&, const DeviceLimits&);
void launch_graph_backward(const GraphBackwardParams&, const GraphBackwardPlan&, Stream);

void launch_graph_coupling_resolution(const GraphParams&, double* out, Stream);

}  // namespace gibbs
