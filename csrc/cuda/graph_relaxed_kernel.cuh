// SPDX-License-Identifier: Apache-2.0
#pragma once

// Relaxed sweeps of coloured graphs, and the chain rule through them (csrc/README.md, 4).
// twin: csrc/cpu/kernels/graph_relaxed.h
//
// A CTA takes chains of one model, a tile of 1, 2 or 4 of them at a time. Neighbouring lanes, one for each chain of the tile, share
// a unit, so that the graph is read once for all of them and a thread keeps its chain.
#include "cuda/graph_cta.cuh"
#include "cuda/relaxation.cuh"

namespace gibbs {

constexpr int kGraphRelaxedThreads = 512;  // at most
constexpr int kGraphRelaxedTile = 4;       // at most, a power of two

struct GraphRelaxedParams {
  GraphParams call;
  GraphRelaxedPlan plan;
};
struct GraphRelaxedBackwardParams {
  GraphBackwardParams call;
  GraphBackwardPlan plan;
};

// Numbers of elements in shared memory: values of the dtype (states forward, gradients of fields backward), random words by low
// bits and high bytes, couplings, and the sums of their gradients.
struct GraphRelaxedLayout {
  int64_t values = 0, low_words = 0, high_words = 0, couplings = 0, sums = 0;

  GIBBS_HOST_DEVICE GraphRelaxedLayout(const GraphModel& call, const GraphTilePlan& plan, bool is_backward) {
    if (plan.state_in_shared) {
      values = plan.tile * call.num_nodes;
      if (call.sweep.relaxation != kMeanField) {
        low_words = plan.tile * round_up(call.num_nodes, 32);
        high_words = plan.tile * random_byte_words(call.num_nodes);
      }
    }
    if (plan.couplings_in_shared) {
      couplings = call.num_edges;
      if (is_backward) sums = call.num_edges;
    }
  }
  template <class T>
  GIBBS_HOST_DEVICE int64_t bytes() const {
    return shared_bytes<T>(values) + shared_bytes<uint32_t>(low_words) + shared_bytes<uint32_t>(high_words) +
           shared_bytes<T>(couplings) + shared_bytes<T>(sums);
  }
};

// Device memory of the backward pass, in numbers of the dtype: gradients of fields, [linear number, node], if they are not in
// shared memory, then sums of gradients of couplings, [CTA, edge], if a model has several CTAs.
struct GraphBackwardWorkspace {
  int64_t fields, partial_rows;
  GIBBS_HOST_DEVICE GraphBackwardWorkspace(const GraphBackwardParams& call, const GraphBackwardPlan& plan) {
    const BatchView& b = call.sweep.batch;
    const int64_t ctas = ctas_per_model(b, plan.chains_per_cta);
    fields = plan.state_in_shared ? 0 : num_rows(b) * call.num_nodes;
    partial_rows = ctas > 1 ? b.num_models * ctas : 0;
  }
};

#if defined(GIBBS_DEVICE)

// A thread's part: lane `lane` of group `group`. blockDim.x is a multiple of the tile.
struct GraphTileThread {
  int tile, lane, group, num_groups;
  GIBBS_DEVICE explicit GraphTileThread(int tile_)
      : tile(tile_), lane(int(threadIdx.x) % tile), group(int(threadIdx.x) / tile), num_groups(int(blockDim.x) / tile) {}
  // The sum over the tile's chains, in the same order for each of them.
  template <class T>
  GIBBS_DEVICE T sum(T x) const {
    const unsigned mask = ((1u << tile) - 1) << (threadIdx.x % kWarpSize / tile * tile);
    for (int step = 1; step < tile; step *= 2) x += __shfl_xor_sync(mask, x, step);
    return x;
  }
};

// The thread's chain, `at` of its CTA's. Lanes beyond the last chain read the first one's and write nothing.
struct GraphTileChain {
  bool is_active;
  int64_t chain, linear;
  uint64_t number;
  GIBBS_DEVICE GraphTileChain(const SweepView& s, const CtaChains& own, int at)
      : is_active(at < own.count),
        chain(own.first + (is_active ? at : 0)),
        linear(linear_number(s.batch, own.model, chain)),
        number(chain_number(s, own.model, chain)) {}
  GIBBS_DEVICE RandomStream stream(const SweepView& s, int64_t relaxed_sweep) const {
    return random_stream(seed_of(s), number, uint64_t(s.sweep_offset + s.num_sweeps + relaxed_sweep));
  }
};

// The numbers of the thread's chain, one for each node. They are in shared memory, [node, tile], or in the row of device memory.
template <class T, bool kInShared>
struct GraphTileValues {
  Shared<T> shared;
  T* row;
  GraphTileThread thread;
  bool is_active;

  GIBBS_DEVICE T load(int node) const {
    if constexpr (kInShared)
      return shared[node * thread.tile + thread.lane];
    else
      return row[node];
  }
  GIBBS_DEVICE void store(int node, T value) const {
    if constexpr (kInShared)
      shared[node * thread.tile + thread.lane] = value;
    else if (is_active)
      row[node] = value;
  }
};

// Random words of the tile's chains for one sweep, [unit, tile]: low bits, and the high bytes of four units in each word. There is
// no room for the words if the values are not in shared memory; each word is drawn alone then.
template <bool kInShared>
struct GraphTileWords {
  Shared<uint32_t> low, high;
  GraphTileThread thread;

  // Draws and stores one Philox counter. High bytes take random_byte_counters of them, low bits one for every 4 units. Output w
  // goes 8 w places on.
  GIBBS_DEVICE void store(const RandomStream& s, uint32_t plane, int counter, uint32_t bits, Shared<uint32_t> out) const {
    const PhiloxOutput r = philox4x32(plane | uint32_t(counter), s.c1, s.c2, s.c3, s.k0, s.k1);
    const int at = (counter >> 3) * 32 + (counter & 7);
#pragma unroll
    for (int w = 0; w < 4; ++w) out[(at + 8 * w) * thread.tile + thread.lane] = r.word[w] & bits;
  }
  GIBBS_DEVICE void draw(const RandomStream& s, int64_t num_nodes) const {
    for (int g = thread.group; g < random_byte_counters(num_nodes); g += thread.num_groups) store(s, 0, g, ~0u, high);
    for (int g = thread.group; g < round_up(num_nodes, 32) / 4; g += thread.num_groups) store(s, kLowPlane, g, 0xffffff, low);
  }
  GIBBS_DEVICE uint32_t word(const RandomStream& s, int unit) const {
    if constexpr (!kInShared) return random_word(s, uint32_t(unit));
    const uint32_t of_four = high[(unit >> 2) * thread.tile + thread.lane];
    return of_four >> (8 * (unit & 3)) << 24 | low[unit * thread.tile + thread.lane];
  }
};

// Reports couplings that are not finite, and copies them to shared memory if they are to lie there.
template <class T>
GIBBS_DEVICE void load_graph_couplings(const SweepView& s, const T* row, int64_t stride, int64_t num_edges, bool in_shared,
                                       Shared<T> coupling) {
  for (int64_t e = threadIdx.x; e < num_edges; e += blockDim.x) {
    const T w = global_load(row + e * stride);
    if (!is_finite(w)) report_fault(s, Outcome::kNonFiniteCoupling);
    if (in_shared) coupling[e] = w;
  }
}

// Clears rows of n elements, [linear number, n], of the CTA's chains.
template <class T>
GIBBS_DEVICE void clear_rows(const CtaChains& own, const BatchView& b, T* rows, int64_t n) {
  for (int c = 0; c < own.count; ++c)
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) rows[linear_number(b, own.model, own.first + c) * n + i] = 0;
}

// ---- forward -------------------------------------------------------------------------------------------------------------------

// Checks the state that relaxed sweeps begin with if there are no binary ones, and writes it to start_out.
template <class T>
GIBBS_DEVICE void copy_graph_start(const GraphParams& call, int64_t model, int64_t chain, T* out) {
  const T* row = parameter_row<T>(call.start, call.sweep.batch, model, chain);
  for (int64_t i = threadIdx.x; i < call.num_nodes; i += blockDim.x) {
    const T x = row[i * call.start.stride];
    if (!is_finite(x)) report_fault(call.sweep, Outcome::kNonFiniteState);
    if (call.start_is_bits && x != 0 && x != 1) report_fault(call.sweep, Outcome::kStateNotBits, float(x));
    out[i] = x;
  }
}

// A CTA owns chains of one model. Tile by tile it runs their relaxed sweeps from the states in start_out, where the binary sweeps have left them, if
// there are any.
// Shared memory holds the tile's states and random words, and the model's couplings, as far as they fit. Otherwise states are in
// start_out and `relaxed`, words are drawn alone, and couplings are read where they are.
// Barriers: A sweep's words are drawn before they are read. A colour is whole before the next one reads it or words are drawn anew.
// Traffic of an update: The bias is read and the field is written (8 bytes of float). The caches give 8 bytes of graph per
// half-edge and tile, and shared memory gives a coupling and a state per half-edge. An update takes 0.3 Philox counters. C16 in
// float takes 96 KB for a tile of 4.
// It computes field_i = bias_i + sum_j coupling_ij value_j and value_i = relax(beta field_i, u_i).
template <class T, bool kInShared>
__global__ void __launch_bounds__(kGraphRelaxedThreads, 1) graph_relaxed_kernel(const __grid_constant__ GraphRelaxedParams p) {
  const GraphParams& call = p.call;
  const SweepView& s = call.sweep;
  const int64_t n = call.num_nodes, total = num_rows(s.batch);
  const CtaChains own(s.batch, p.plan.chains_per_cta);
  const int64_t model = own.model;
  T *start_out = static_cast<T*>(call.state_out.data), *relaxed = static_cast<T*>(call.relaxed), *mean = static_cast<T*>(call.mean),
    *fields = static_cast<T*>(call.fields);

  if (!graph_layout_is_sound(call)) {
    for (T* rows : {start_out, relaxed, mean}) clear_rows(own, s.batch, rows, n);
    for (int64_t sweep = 0; sweep < s.num_relaxed_sweeps; ++sweep) clear_rows(own, s.batch, fields + sweep * total * n, n);
    return;
  }
  const GraphView g = graph_view(call.layout);

  if (s.num_sweeps == 0)
    for (int64_t chain = own.first; chain < own.first + own.count; ++chain)
      copy_graph_start(call, model, chain, start_out + linear_number(s.batch, model, chain) * n);

  SharedMemory memory;
  const GraphRelaxedLayout layout(call, p.plan, false);
  const Shared<T> values = memory.take<T>(layout.values);
  const GraphTileThread thread(p.plan.tile);
  const Shared<uint32_t> low = memory.take<uint32_t>(layout.low_words), high = memory.take<uint32_t>(layout.high_words);
  const GraphTileWords<kInShared> words = {low, high, thread};
  const Shared<T> shared_coupling = memory.take<T>(layout.couplings);
  const T* coupling = parameter_row<T>(call.coupling, s.batch, model, 0);
  const bool couplings_in_shared = p.plan.couplings_in_shared;
  load_graph_couplings(s, coupling, call.coupling.stride, call.num_edges, couplings_in_shared, shared_coupling);
  __syncthreads();  // start_out and the couplings are whole

  for (int first = 0; first < own.count; first += thread.tile) {
    const GraphTileChain chain(s, own, first + thread.lane);
    const T* bias = parameter_row<T>(call.bias, s.batch, model, chain.chain);
    const int64_t row = chain.linear * n;
    const GraphTileValues<T, kInShared> value = {values, relaxed + row, thread, chain.is_active};
    for (int node = thread.group; node < n; node += thread.num_groups) {
      if (!is_finite(bias[node * call.bias.stride])) report_fault(s, Outcome::kNonFiniteBias);
      value.store(node, start_out[row + node]);
    }
    for (int64_t sweep = 0; sweep < s.num_relaxed_sweeps; ++sweep) {
      const T beta = T(beta_at(s, model, s.num_sweeps + sweep));
      const RandomStream stream = chain.stream(s, sweep);
      if (kInShared && s.relaxation != kMeanField) words.draw(stream, n);
      __syncthreads();  // states and words are whole
      for (int64_t color = 0; color < g.num_colors; ++color) {
        const int end = g.color_offsets[color + 1];
        for (int pos = g.color_offsets[color] + thread.group; pos < end && chain.is_active; pos += thread.num_groups) {
          const int node = global_load(g.order + pos), row_end = global_load(g.row_offsets + pos + 1);
          T field = bias[node * call.bias.stride];
          for (int h = global_load(g.row_offsets + pos); h < row_end; ++h) {
            const int edge = global_load(g.edge_of + h);
            const T w = couplings_in_shared ? shared_coupling[edge] : global_load(coupling + edge * call.coupling.stride);
            field += w * value.load(global_load(g.neighbors + h));
          }
          const uint32_t word = s.relaxation == kMeanField ? 0 : words.word(stream, node);
          const RelaxedUnit<T> unit = relax<T>(s.relaxation, field, word, beta, T(s.sharpness), s.slope_gradient);
          fields[sweep * total * n + row + node] = field;
          value.store(node, unit.value);
          if (sweep + 1 == s.num_relaxed_sweeps) {
            relaxed[row + node] = unit.value;
            mean[row + node] = unit.mean;
          }
        }
        __syncthreads();  // the colour is whole; nobody reads its words or its neighbours' old states any more
      }
    }
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------------------

// A CTA owns chains of one model. Tile by tile it goes from the last relaxed sweep back to the state that they began with.
// Shared memory holds the tile's gradients of fields and random words, the model's couplings, and the sums of the couplings'
// gradients, as far as they fit. Otherwise gradients are in the workspace, words are drawn alone, and couplings are read where they
// are and their gradients are summed where the sums are to go.
// Barriers: Words are as in the forward pass. A colour's gradients and sums are whole before the next one reads or adds to them.
// (The colour at hand has at most one of an edge's two ends, so the edge's sum has one writer.)
// Traffic of an update: The field is read, and grad_bias is read and written (12 bytes of float). The caches give 8 bytes of graph
// per half-edge and tile, and shared memory gives a coupling and a gradient per half-edge; a sum is read and written per half-edge
// and tile. An update takes 0.3 Philox counters. C16 in float takes 119 KB for a tile of 4.
// It computes grad_value_i = sum_j coupling_ij grad_field_j, where grad_field_j belongs to j's latest update that saw this value;
// grad_coupling_ij += value_i grad_field_j; and grad_field_i = grad_value_i d value_i / d field_i. All updates that saw a value
// follow it in the sweeps' order, so one pass over a unit's neighbours gathers both, and no value is kept.
template <class T, bool kInShared>
__global__ void __launch_bounds__(kGraphRelaxedThreads, 1)
    graph_backward_kernel(const __grid_constant__ GraphRelaxedBackwardParams p) {
  const GraphBackwardParams& call = p.call;
  const SweepView& s = call.sweep;
  const int64_t n = call.num_nodes, edges = call.num_edges, total = num_rows(s.batch);
  const CtaChains own(s.batch, p.plan.chains_per_cta);
  const int64_t model = own.model;
  const T *grad_relaxed = static_cast<const T*>(call.grad_relaxed), *grad_mean = static_cast<const T*>(call.grad_mean),
          *state = static_cast<const T*>(call.state), *fields = static_cast<const T*>(call.fields);
  T *grad_state = static_cast<T*>(call.grad_state), *grad_bias = static_cast<T*>(call.grad_bias);
  const GraphBackwardWorkspace workspace(call, p.plan);
  T* sums_out = workspace.partial_rows ? static_cast<T*>(call.workspace) + workspace.fields + blockIdx.x * edges
                                       : static_cast<T*>(call.grad_coupling) + model * edges;

  if (!graph_layout_is_sound(call)) {
    clear_rows(own, s.batch, grad_state, n);
    clear_rows(own, s.batch, grad_bias, n);
    for (int64_t e = threadIdx.x; e < edges; e += blockDim.x) sums_out[e] = 0;
    return;
  }
  const GraphView g = graph_view(call.layout);
  SharedMemory memory;
  const GraphRelaxedLayout layout(call, p.plan, true);
  const Shared<T> grad_fields = memory.take<T>(layout.values);
  const GraphTileThread thread(p.plan.tile);
  const Shared<uint32_t> low = memory.take<uint32_t>(layout.low_words), high = memory.take<uint32_t>(layout.high_words);
  const GraphTileWords<kInShared> words = {low, high, thread};
  const Shared<T> shared_coupling = memory.take<T>(layout.couplings), sums = memory.take<T>(layout.sums);
  const T* coupling = parameter_row<T>(call.coupling, s.batch, model, 0);
  const bool couplings_in_shared = p.plan.couplings_in_shared;
  load_graph_couplings(s, coupling, call.coupling.stride, edges, couplings_in_shared, shared_coupling);
  for (int64_t e = threadIdx.x; e < edges; e += blockDim.x) (couplings_in_shared ? sums[e] : sums_out[e]) = 0;

  for (int first = 0; first < own.count; first += thread.tile) {
    const GraphTileChain chain(s, own, first + thread.lane);
    const int64_t row = chain.linear * n;
    T* grad_field_row = kInShared ? nullptr : static_cast<T*>(call.workspace) + row;
    const GraphTileValues<T, kInShared> grad_field = {grad_fields, grad_field_row, thread, chain.is_active};
    for (int node = thread.group; node < n; node += thread.num_groups) grad_field.store(node, 0);
    const int64_t last = s.num_relaxed_sweeps - 1;
    for (int64_t sweep = last; sweep >= -1; --sweep) {  // -1: the state before all sweeps
      const T beta = sweep < 0 ? T(0) : T(beta_at(s, model, s.num_sweeps + sweep));
      const RandomStream stream = chain.stream(s, sweep);
      if (kInShared && s.relaxation != kMeanField && sweep >= 0) words.draw(stream, n);
      __syncthreads();  // words and, before the first sweep, couplings, sums and gradients are whole
      for (int64_t color = g.num_colors - 1; color >= 0; --color) {
        const int end = g.color_offsets[color + 1];
        for (int pos = g.color_offsets[color] + thread.group; pos < end; pos += thread.num_groups) {
          const int node = global_load(g.order + pos), row_end = global_load(g.row_offsets + pos + 1);
          RelaxedUnit<T> unit = {};
          if (chain.is_active && sweep < 0) {
            unit.value = state[row + node];
          } else if (chain.is_active) {
            const uint32_t word = s.relaxation == kMeanField ? 0 : words.word(stream, node);
            unit = relax<T>(s.relaxation, fields[sweep * total * n + row + node], word, beta, T(s.sharpness), s.slope_gradient);
          }
          T grad_value = sweep == last ? grad_relaxed[row + node] : T(0);
          for (int h = global_load(g.row_offsets + pos); h < row_end; ++h) {
            const int edge = global_load(g.edge_of + h);
            const T other = grad_field.load(global_load(g.neighbors + h));
            grad_value +=
                other * (couplings_in_shared ? shared_coupling[edge] : global_load(coupling + edge * call.coupling.stride));
            const T sum = thread.sum(other * unit.value);
            if (thread.lane == 0) (couplings_in_shared ? sums[edge] : sums_out[edge]) += sum;
          }
          T grad = grad_value * unit.slope;
          if (sweep == last) grad += grad_mean[row + node] * unit.mean_slope;
          grad_field.store(node, grad);
          if (chain.is_active && sweep < 0)
            grad_state[row + node] = grad_value;
          else if (chain.is_active)
            grad_bias[row + node] = sweep == last ? grad : grad_bias[row + node] + grad;
        }
        __syncthreads();  // the colour's gradients and sums are whole; nobody reads its words any more
      }
    }
  }
  if (couplings_in_shared)
    for (int64_t e = threadIdx.x; e < edges; e += blockDim.x) sums_out[e] = sums[e];
}

#endif

}  // namespace gibbs
