// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/tempering.h"
#include "cuda/graph_fields_kernel.cuh"
#include "cuda/rounding.cuh"
#include "cuda/tempering.h"

namespace gibbs {

#if defined(GIBBS_DEVICE)

// A warp owns one state, and a lane one unit of 32. Energies must be those of the CPU to the bit (csrc/README.md, 2.7), so all lanes add the
// terms of the units that are 1 one after the other.
class EnergySum {
 public:
  GIBBS_DEVICE void add(bool is_one, double term) {
    for (uint32_t ones = __ballot_sync(kFullWarp, is_one); ones; ones &= ones - 1)
      sum_ += __shfl_sync(kFullWarp, term, __ffs(int(ones)) - 1);
  }
  GIBBS_DEVICE double energy() const { return -sum_; }

 private:
  double sum_ = 0;
};

// The state that a warp owns, models first, and its linear number.
struct EnergyRow {
  int64_t row, model, chain, linear;
  GIBBS_DEVICE explicit EnergyRow(const BatchView& batch)
      : row(int64_t{blockIdx.x} * kEnergyWarps + threadIdx.x / kWarpSize),
        model(row / batch.chains_per_model),
        chain(row % batch.chains_per_model),
        linear(row < num_rows(batch) ? linear_number(batch, model, chain) : 0) {}
};

GIBBS_DEVICE int exponent_of_scale(double scale) { return FloatTraits<double>::kBias - int(FloatTraits<double>::exponent(scale)); }

// Traffic: the couplings of the right units that are 1, to all left units, from caches.
__global__ void __launch_bounds__(kEnergyWarps* kWarpSize, 1)
    bipartite_energies_kernel(const __grid_constant__ BipartiteEnergyParams p) {
  const BipartiteParams& m = p.model;
  const BatchView& batch = m.sweep.batch;
  const EnergyRow own(batch);
  if (own.row >= num_rows(batch)) return;
  const uint8_t *left = p.tempering.parts[0].bits + own.linear * m.n1, *right = p.tempering.parts[1].bits + own.linear * m.n2;
  const void* weight = parameter_row(m.weight, batch, m.is_double, own.model, 0);
  const void *left_bias = parameter_row(m.left_bias, batch, m.is_double, own.model, own.chain),
             *right_bias = parameter_row(m.right_bias, batch, m.is_double, own.model, own.chain);
  const double scale = p.tempering.scales[linear_number(batch, own.model, 0)];
  const int k = exponent_of_scale(scale);
  EnergySum sum;
  for (int64_t first = 0; first < m.n2; first += kWarpSize) {
    const int64_t j = first + lane();
    const bool is_one = j < m.n2 && right[j];
    sum.add(is_one, is_one ? double(float(load_parameter(right_bias, j * m.right_bias.stride, m.is_double))) : 0);
  }
  for (int64_t first = 0; first < m.n1; first += kWarpSize) {
    const int64_t i = first + lane();
    const bool is_one = i < m.n1 && left[i];
    int64_t acc = 0;
    for (int64_t j = 0; j < m.n2 && is_one; ++j)
      if (right[j]) acc += coupling_at(m.weight, weight, m.is_double, k, i, j);
    sum.add(is_one,
            is_one ? double(acc) * scale + double(float(load_parameter(left_bias, i * m.left_bias.stride, m.is_double))) : 0);
  }
  if (lane() == 0) p.tempering.energies[own.linear] = sum.energy();
}

__global__ void __launch_bounds__(kFieldsThreads, 1) graph_positions_kernel(const __grid_constant__ GraphEnergyParams p) {
  const int64_t position = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (position >= p.model.num_nodes || !header_fits(p.model)) return;
  const int64_t node = graph_view(p.model.layout).order[position];
  if (0 <= node && node < p.model.num_nodes) p.position[node] = int32_t(position);
}

// Traffic: the half-edges of the units that are 1, and their couplings, from caches.
__global__ void __launch_bounds__(kEnergyWarps* kWarpSize, 1) graph_energies_kernel(const __grid_constant__ GraphEnergyParams p) {
  const GraphParams& m = p.model;
  const BatchView& batch = m.sweep.batch;
  const EnergyRow own(batch);
  if (own.row >= num_rows(batch)) return;
  const uint8_t* state = p.tempering.parts[0].bits + own.linear * m.num_nodes;
  const void *coupling = parameter_row(m.coupling, batch, m.is_double, own.model, 0),
             *bias = parameter_row(m.bias, batch, m.is_double, own.model, own.chain);
  const double scale = p.tempering.scales[linear_number(batch, own.model, 0)];
  const int k = exponent_of_scale(scale);
  EnergySum sum;
  bool is_sound = true;
  for (int64_t first = 0; first < m.num_nodes; first += kWarpSize) {
    const int64_t position = first + lane();
    double term = 0;
    bool is_one = false;
    if (position < m.num_nodes) {
      const GraphRow unit(m, position);
      is_sound &= unit.is_sound;
      is_one = unit.is_sound && state[unit.node];
      int64_t acc = 0;
      for (int64_t h = unit.begin; is_one && h < unit.end; ++h) {
        const GraphView g = graph_view(m.layout);
        const int64_t other = g.neighbors[h], edge = g.edge_of[h];
        const bool inside = 0 <= other && other < m.num_nodes && 0 <= edge && edge < m.num_edges;
        is_sound &= inside;
        if (inside && p.position[other] < position && state[other])
          acc += coupling_at(m.coupling, coupling, m.is_double, k, 0, edge);
      }
      if (is_one) term = double(acc) * scale + double(float(load_parameter(bias, unit.node * m.bias.stride, m.is_double)));
    }
    sum.add(is_one, term);
  }
  if (!is_sound) report_fault(m.sweep, Outcome::kBadLayout);
  if (lane() == 0) p.tempering.energies[own.linear] = sum.energy();
}

// A CTA owns a pair of states, which that of its first state does; those of other states have nothing to do. The cluster grows by rounds, in each
// of which all units that differ look for a neighbour in it: as many rounds as it is long, at most. A thread writes the marks of its units alone,
// and one that it reads too early or too late it reads again in the next round.
// Traffic: the marks of all units and the half-edges of those that differ, once a round, from caches.
__global__ void __launch_bounds__(kClusterThreads, 1) graph_clusters_kernel(const __grid_constant__ GraphClusterParams p) {
  enum : uint8_t { kEqual, kDiffers, kInCluster };
  const GraphParams& m = p.model;
  const BatchView& batch = m.sweep.batch;
  const int64_t model = int64_t{blockIdx.x} / batch.chains_per_model, chain = int64_t{blockIdx.x} % batch.chains_per_model;
  const int64_t linear = linear_number(batch, model, chain), other = partner(p.pairing, linear);
  if (other < 0 || !header_fits(m)) return;  // the energies report a layout that does not fit
  uint8_t *first = p.tempering.parts[0].bits + linear * m.num_nodes, *second = p.tempering.parts[0].bits + other * m.num_nodes;
  volatile uint8_t* marks = p.marks + linear * m.num_nodes;
  const void* coupling = parameter_row(m.coupling, batch, m.is_double, model, 0);
  const int k = exponent_of_scale(p.tempering.scales[linear_number(batch, model, 0)]);
  for (int64_t i = threadIdx.x; i < m.num_nodes; i += blockDim.x) marks[i] = first[i] == second[i] ? kEqual : kDiffers;
  __syncthreads();  // marks: written by all threads, read by the first warp
  if (warp() == 0) {
    int64_t count = 0;
    for (int64_t i = 0; i < m.num_nodes; i += kWarpSize)
      count += __popc(__ballot_sync(kFullWarp, i + lane() < m.num_nodes && marks[i + lane()] == kDiffers));
    if (count) {
      const auto last_sweep = uint64_t(m.sweep.sweep_offset + p.tempering.sweeps_per_swap - 1);
      int64_t at = cluster_start(p.pairing, linear, count, seed_of(m.sweep), uint64_t(p.tempering.chains[linear]), last_sweep);
      for (int64_t i = 0; i < m.num_nodes && at >= 0; i += kWarpSize) {
        const bool differs = i + lane() < m.num_nodes && marks[i + lane()] == kDiffers;
        const uint32_t ones = __ballot_sync(kFullWarp, differs);
        if (differs && __popc(ones & ((1u << lane()) - 1)) == at) marks[i + lane()] = kInCluster;
        at -= __popc(ones);
      }
    }
  }
  bool grows = true;
  while (__syncthreads_or(grows)) {  // marks: those of the first warp, and of the round before, are written
    grows = false;
    for (int64_t position = threadIdx.x; position < m.num_nodes; position += blockDim.x) {
      const GraphRow unit(m, position);
      if (!unit.is_sound || marks[unit.node] != kDiffers) continue;
      const GraphView g = graph_view(m.layout);
      bool joins = false;
      for (int64_t h = unit.begin; h < unit.end && !joins; ++h) {
        const int64_t neighbor = g.neighbors[h], edge = g.edge_of[h];
        joins = 0 <= neighbor && neighbor < m.num_nodes && 0 <= edge && edge < m.num_edges && marks[neighbor] == kInCluster &&
                coupling_at(m.coupling, coupling, m.is_double, k, 0, edge);
      }
      if (joins) marks[unit.node] = kInCluster, grows = true;
    }
  }
  for (int64_t i = threadIdx.x; i < m.num_nodes; i += blockDim.x)
    if (marks[i] == kInCluster) first[i] ^= 1, second[i] ^= 1;
}

// A CTA owns the two states of a column at the betas 2 g - parity and the one after, of which the first or the last may have no partner.
__global__ void __launch_bounds__(kSwapThreads, 1) swaps_kernel(const __grid_constant__ SwapParams p) {
  const TemperingParams& t = p.tempering;
  const int64_t first_sweep = p.sweep.sweep_offset, column = int64_t{blockIdx.x} % t.columns;
  // Pairs begin at 0 or at 1; the beta before a first pair is a pair's second one without its first.
  const int64_t low = 2 * (int64_t{blockIdx.x} / t.columns) - first_pair(first_sweep, t.sweeps_per_swap), high = low + 1;
  const int64_t at = low * t.columns + column, next = at + t.columns;
  bool do_swap = false;  // of the first thread
  if (threadIdx.x == 0) {
    if (low >= 0 && high < t.num_betas) {
      const auto beta = [&](int64_t b) { return double(float(beta_value(p.sweep, b))); };
      do_swap = replicas_swap(beta(low), beta(high), t.energies[at], t.energies[next], seed_of(p.sweep),
                              uint64_t(t.chains[at]) / uint64_t(t.num_betas), uint64_t(first_sweep + t.sweeps_per_swap - 1),
                              uint32_t(low));
    }
    if (do_swap) {
      const int64_t number = t.chains[at];
      t.chains[at] = t.chains[next], t.chains[next] = number;
    }
    if (low >= 0 && low < t.num_betas) t.chains_at[at] = t.chains[at];
    if (high < t.num_betas) t.chains_at[next] = t.chains[next];
  }
  if (!__syncthreads_or(do_swap)) return;
  for (int part = 0; part < t.num_parts; ++part) {
    const TemperingParams::Part& of = t.parts[part];
    for (int64_t i = threadIdx.x; i < of.n; i += blockDim.x) {
      const uint8_t bit = of.bits[at * of.n + i];
      of.bits[at * of.n + i] = of.bits[next * of.n + i];
      of.bits[next * of.n + i] = bit;
    }
  }
}

#endif

}  // namespace gibbs
