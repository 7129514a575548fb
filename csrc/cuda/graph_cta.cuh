// SPDX-License-Identifier: Apache-2.0
#pragma once

// Code that the kernels of coloured graphs share: the chains of a CTA and of a thread, checks of a layout, the couplings' scale.
#include "core/graph_view.h"
#include "cuda/graph.h"
#include "cuda/rounding.cuh"
#include "cuda/sampling.cuh"

namespace gibbs {

constexpr int kGraphScaleScratch = 2;

#if defined(GIBBS_DEVICE)

// Whether the layout's header agrees with its tensor's size.
GIBBS_DEVICE bool header_fits(const GraphModel& p) {
  return p.layout[0] == p.num_nodes && p.layout[1] == p.num_edges && p.layout[2] == p.num_colors;
}

// Whether every number that sweeps follow lies inside the graph; else the fault is reported. All threads of the CTA must call this and get the
// same answer.
GIBBS_DEVICE_CALL bool graph_layout_is_sound(const GraphModel& p) {
  bool sound = header_fits(p);
  if (sound) {  // the same for the whole CTA
    const GraphView g = graph_view(p.layout);
    sound = g.color_offsets[0] == 0 && g.color_offsets[p.num_colors] == p.num_nodes && g.row_offsets[0] == 0 &&
            g.row_offsets[p.num_nodes] == 2 * p.num_edges && g.max_degree < p.num_nodes;
    const auto is_below = [](int32_t x, int64_t limit) { return uint32_t(x) < uint32_t(limit); };
    for (int64_t c = threadIdx.x; c < p.num_colors; c += blockDim.x) sound &= g.color_offsets[c] <= g.color_offsets[c + 1];
    for (int64_t pos = threadIdx.x; pos < p.num_nodes; pos += blockDim.x)
      sound &= is_below(g.order[pos], p.num_nodes) && g.row_offsets[pos] <= g.row_offsets[pos + 1] &&
               int64_t{g.row_offsets[pos + 1]} - g.row_offsets[pos] <= g.max_degree;
    for (int64_t h = threadIdx.x; h < 2 * p.num_edges; h += blockDim.x)
      sound &= is_below(g.neighbors[h], p.num_nodes) && is_below(g.edge_of[h], p.num_edges);
  }
  if (!__syncthreads_or(!sound)) return true;
  if (threadIdx.x == 0) report_fault(p.sweep, Outcome::kBadLayout);
  return false;
}

// The scale of a model's couplings (core/fixed_point.h). All threads of the CTA must call this and get the same answer. Reports faults, and rounding
// that calls for a warning.
// scratch: [kGraphScaleScratch].
template <class T>
GIBBS_DEVICE_CALL CouplingScale graph_scale_of(const SweepView& s, GraphView g, const T* coupling, int64_t stride,
                                               Shared<uint32_t> scratch) {
  if (threadIdx.x < kGraphScaleScratch) scratch[threadIdx.x] = 0;
  __syncthreads();  // scratch is clear
  uint32_t stored = 0;
  for (int64_t e = threadIdx.x; e < g.num_edges; e += blockDim.x)
    stored = max(stored, FloatTraits<T>::exponent(global_load(coupling + e * stride)));
  const int64_t degree = g.max_degree > 1 ? g.max_degree : 1;
  const LargestCoupling largest =
      largest_coupling<T>(cta_max(stored, scratch, 0), degree, Outcome::kNonFiniteCoupling, Outcome::kTooLargeCoupling);
  if (largest.fault != Outcome::kOk && threadIdx.x == 0) report_fault(s, largest.fault);
  int k = kMaxScaleExponent;
  if (!largest.settled) {  // the same for the whole CTA
    const T factor = FloatTraits<T>::power(coupling_sum_bits(degree) - largest.exponent);
    uint32_t sum = 0;
    for (int64_t pos = threadIdx.x; pos < g.num_nodes; pos += blockDim.x) {
      uint32_t of_unit = 0;
      for (int h = g.row_offsets[pos]; h < g.row_offsets[pos + 1]; ++h)
        of_unit += rounded_up<T>(global_load(coupling + g.edge_of[h] * stride), factor);
      sum = max(sum, of_unit);
    }
    k = scale_exponent(int64_t(cta_max(sum, scratch, 1)), degree, largest.exponent);
  }
  if (threadIdx.x == 0) report_rounding(s, {FloatTraits<float>::power(-k), 0}, degree);
  return {k, largest.exponent};
}

#endif

}  // namespace gibbs
