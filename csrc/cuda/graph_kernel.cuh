// SPDX-License-Identifier: Apache-2.0
#pragma once

// Binary sweeps of coloured graphs. twins: csrc/cpu/kernels/graph_{sums,tables,units,metropolis}.h
//
// A CTA owns a tile of chains of one model for all sweeps; neighbouring lanes are the tile's chains, and groups of as many lanes go through the
// units of a colour. With 32 chains (kSums, kTables) a lane is a chain, a warp has one unit, and loads of the graph are broadcasts; with fewer
// (kUnits) a warp has several units, down to 32 units of one chain.
#include "cuda/graph_cta.cuh"

namespace gibbs {

constexpr int kGraphThreads = 512;
constexpr int kMaxTableDegree = 6;
constexpr int kTableEntries = 1 << kMaxTableDegree;

// The rule by which a sweep updates a unit. kAnnealed is Gibbs's rule with log-weights.
enum class GraphRule { kGibbs, kAnnealed, kMetropolis };

// The place of half-edge h in shared memory. Lanes along units are a degree apart, and an even degree would leave half of the banks idle.
template <class Index>
GIBBS_HOST_DEVICE Index skewed(Index h) {
  return h + (h >> 5);
}

// Numbers of elements in shared memory. If they do not fit, states lie in the workspace, the graph and the couplings stay where they are, and
// random bytes are drawn one by one.
struct GraphBinaryLayout {
  int64_t state_bytes = 0, state_words = 0, clamp_words = 0, half_edges = 0, byte_words = 0, table = 0, terms = 0;

  GIBBS_HOST_DEVICE GraphBinaryLayout(const GraphParams& p, const GraphPlan& plan) {
    const int64_t n = p.num_nodes;
    const bool has_lanes = plan.route != GraphCudaRoute::kUnits;
    if (has_lanes) {
      state_words = n;
      if (p.clamp.data) clamp_words = n;
    } else if (plan.state_in_shared) {
      state_bytes = n * plan.tile;
    }
    if (plan.couplings_in_shared) half_edges = skewed(2 * p.num_edges);
    if (plan.bytes_in_shared) byte_words = random_byte_words(n) * plan.tile;
    if (plan.route == GraphCudaRoute::kTables) table = n * kTableEntries;
    if (p.log_weights) terms = kGraphThreads;
  }
  GIBBS_HOST_DEVICE int64_t bytes() const {
    return shared_bytes<uint8_t>(state_bytes) + shared_bytes<uint32_t>(state_words) + shared_bytes<uint32_t>(clamp_words) +
           2 * shared_bytes<int32_t>(half_edges) + shared_bytes<uint32_t>(byte_words) + shared_bytes<uint8_t>(table) +
           shared_bytes<double>(terms) + shared_bytes<uint32_t>(kGraphScaleScratch);
  }
};

struct GraphBinaryParams {
  GraphParams call;
  GraphPlan plan;
};

#if defined(GIBBS_DEVICE)

// The k of a model's couplings of either dtype.
GIBBS_DEVICE int graph_scale_exponent(const GraphParams& p, const GraphView& g, int64_t model, const Shared<uint32_t>& scratch) {
  const void* row = parameter_row(p.coupling, p.sweep.batch, p.is_double, model, 0);
  return p.is_double ? graph_scale_exponent_of(p.sweep, g, static_cast<const double*>(row), p.coupling.stride, scratch)
                     : graph_scale_exponent_of(p.sweep, g, static_cast<const float*>(row), p.coupling.stride, scratch);
}

// Shared memory: the tile's states, the rounded couplings and the graph by half-edges, a sweep's random bytes, and (kTables) of each unit the high
// bytes of the thresholds of all its neighbours' states.
// Synchronisation: barriers after the random bytes of a sweep, and between colours: a colour's bits are whole before the next one reads them.
// Traffic: states in and out once, couplings and graph once. An update reads, per half-edge, a neighbour, a coupling and a state (kSums: three
// broadcasts for 32 chains; kTables: two, and one entry of the table), and a random byte; Philox is 1/16 of a counter. The other 24 bits of a word are
// drawn where the high byte ties with the threshold's: at once, or (kTables) for a warp's units of a colour together, as otherwise 12% of the
// warps would stop for one lane.
// Computes: acc_i = sum over e of coupling_e z_j, logit_i = beta (acc_i 2^-k + bias_i);  z_i = [word_i < threshold(logit_i)], or (kMetropolis)
// z_i flips where x = (1 - 2 z_i) logit_i >= 0 or word_i < acceptance(x).
template <GraphCudaRoute kRoute, GraphRule kRule>
class GraphCta {
  static constexpr bool kAnnealed = kRule == GraphRule::kAnnealed;
  static constexpr bool kLanes = kRoute != GraphCudaRoute::kUnits;
  static constexpr uint8_t kBit = 1, kClamp = 2, kFirstColor = 4;  // bits of a state byte

 public:
  GIBBS_DEVICE GraphCta(const GraphBinaryParams& params, SharedMemory& memory)
      : p_(params.call),
        plan_(params.plan),
        g_(graph_view(p_.layout)),
        own_(p_.sweep.batch, plan_.chains_per_cta),
        thread_(kLanes ? kWarpSize : plan_.tile) {
    const GraphBinaryLayout layout(p_, plan_);
    const Shared<uint8_t> state_bytes = memory.take<uint8_t>(layout.state_bytes);
    state_words_ = memory.take<uint32_t>(layout.state_words);
    clamp_words_ = memory.take<uint32_t>(layout.clamp_words);
    neighbor_ = memory.take<int32_t>(layout.half_edges);
    coupling_ = memory.take<int32_t>(layout.half_edges);
    bytes_ = memory.take<uint32_t>(layout.byte_words);
    table_ = memory.take<uint8_t>(layout.table);
    terms_ = memory.take<double>(layout.terms);
    scratch_ = memory.take<uint32_t>(kGraphScaleScratch);
    if constexpr (!kLanes)
      state_ = plan_.state_in_shared ? shared_pointer(state_bytes)
                                     : static_cast<uint8_t*>(p_.workspace) + int64_t{blockIdx.x} * p_.num_nodes * plan_.tile;
    const int64_t mine = own_.begin + thread_.lane;
    is_active_ = mine < own_.end;
    chain_ = is_active_ ? mine : own_.begin;
    linear_ = linear_number(p_.sweep.batch, own_.model, chain_);
    number_ = chain_number(p_.sweep, own_.model, chain_);
    bias_ = parameter_row(p_.bias, p_.sweep.batch, p_.is_double, own_.model, chain_);
    if (kAnnealed) base_bias_ = parameter_row(p_.base_bias, p_.sweep.batch, p_.is_double, own_.model, chain_);
    coupling_row_ = parameter_row(p_.coupling, p_.sweep.batch, p_.is_double, own_.model, 0);
  }

  GIBBS_DEVICE void run() {
    const SweepView& s = p_.sweep;
    if (!graph_layout_is_sound(p_.layout, p_.num_nodes, p_.num_edges, p_.num_colors)) {
      if (threadIdx.x == 0) report_fault(s, Outcome::kBadLayout);
      return clear();
    }
    k_ = graph_scale_exponent(p_, g_, own_.model, scratch_);
    scale_ = FloatTraits<float>::power(-k_);
    load();
    __syncthreads();  // states, graph and couplings are there
    const bool has_tables = kRoute == GraphCudaRoute::kTables && g_.max_degree <= kMaxTableDegree;
    double log_weight = 0;
    float table_beta = 0;
    for (int64_t sweep = 0; sweep < s.num_sweeps; ++sweep) {
      const float beta = float(beta_at(s, sweep + kAnnealed));
      const RandomStream stream = random_stream(seed_of(s), number_, uint64_t(s.sweep_offset + sweep));
      if (plan_.bytes_in_shared) draw_bytes(stream);
      if (has_tables && (sweep == 0 || beta != table_beta)) tabulate(table_beta = beta);
      if (kAnnealed) log_weight += weigh(beta_at(s, sweep), beta_at(s, sweep + 1));
      __syncthreads();  // bytes and tables are there
      for (int64_t color = 0; color < g_.num_colors; ++color) {
        const int begin = g_.color_offsets[color], end = g_.color_offsets[color + 1];
        if (has_tables)
          look_up(begin, end, stream, beta);
        else
          update(begin, end, stream, beta);
        __syncthreads();  // the colour is whole; nobody reads its bytes any more
      }
    }
    store();
    if (kAnnealed) store_log_weight(log_weight);
  }

 private:
  // ---- units and their neighbours ----

  GIBBS_DEVICE int32_t rounded_coupling(int64_t half_edge) const {
    const int64_t at = g_.edge_of[half_edge] * p_.coupling.stride;
    return p_.is_double ? rounded(global_load(static_cast<const double*>(coupling_row_) + at), FloatTraits<double>::power(k_))
                        : rounded(global_load(static_cast<const float*>(coupling_row_) + at), FloatTraits<float>::power(k_));
  }
  GIBBS_DEVICE int neighbor(int half_edge) const {
    return plan_.couplings_in_shared ? neighbor_[skewed(half_edge)] : global_load(g_.neighbors + half_edge);
  }
  GIBBS_DEVICE int32_t coupling(int half_edge) const {
    return plan_.couplings_in_shared ? coupling_[skewed(half_edge)] : rounded_coupling(half_edge);
  }
  GIBBS_DEVICE uint8_t& state_byte(int node) const { return state_[int64_t{node} * plan_.tile + thread_.lane]; }
  GIBBS_DEVICE uint32_t bit(int node) const {
    if constexpr (kLanes) return state_words_[node] >> thread_.lane & 1;
    return state_byte(node) & kBit;
  }
  // Unsigned, because couplings for which a fault has been reported may overflow.
  GIBBS_DEVICE int32_t sum_of_neighbors(int position) const {
    uint32_t acc = 0;
    const int end = g_.row_offsets[position + 1];
    for (int h = g_.row_offsets[position]; h < end; ++h) acc += (0u - bit(neighbor(h))) & uint32_t(coupling(h));
    return int32_t(acc);
  }
  GIBBS_DEVICE float bias(const void* row, const ParameterView& view, int node) const {
    return float(load_parameter(row, node * view.stride, p_.is_double));
  }
  GIBBS_DEVICE float logit(int32_t acc, int node, float beta) const {
    const float of_bias = bias(bias_, p_.bias, node);
    return kAnnealed ? annealed_logit(acc, scale_, of_bias, bias(base_bias_, p_.base_bias, node), beta)
                     : binary_logit(acc, scale_, of_bias, beta);
  }
  GIBBS_DEVICE uint32_t high_byte(const RandomStream& stream, int node) const {
    if (!plan_.bytes_in_shared) return random_high_byte(stream, uint32_t(node));
    return bytes_[(node >> 2) * thread_.tile + thread_.lane] >> (8 * (node & 3)) & 0xff;
  }

  // ---- before and after ----

  GIBBS_DEVICE void load() {
    if (plan_.couplings_in_shared)
      for (int h = threadIdx.x; h < 2 * p_.num_edges; h += blockDim.x) {
        neighbor_[skewed(h)] = g_.neighbors[h];
        coupling_[skewed(h)] = rounded_coupling(h);
      }
    const BatchView& batch = p_.sweep.batch;
    const int64_t state = batch_offset(batch, p_.state.batch_strides, own_.model, chain_),
                  clamp = batch_offset(batch, p_.clamp.batch_strides, own_.model, chain_);
    for (int position = thread_.group; position < p_.num_nodes; position += thread_.num_groups) {
      const int node = g_.order[position];
      const bool is_set = is_active_ && load_bit(p_.sweep, p_.state, state + node * p_.state.stride, Outcome::kStateNotBits);
      const bool is_fixed =
          is_active_ && p_.clamp.data && load_bit(p_.sweep, p_.clamp, clamp + node * p_.clamp.stride, Outcome::kStateNotBits);
      const float of_unit = finite_bias(p_.sweep, bias(bias_, p_.bias, node), Outcome::kNonFiniteBias);
      const float base =
          kAnnealed ? finite_bias(p_.sweep, bias(base_bias_, p_.base_bias, node), Outcome::kNonFiniteBaseBias) : of_unit;
      report_bias(p_.sweep, of_unit, base, scale_, g_.max_degree);
      if constexpr (kLanes) {  // a warp has one unit
        const uint32_t word = __ballot_sync(kFullWarp, is_set), fixed = __ballot_sync(kFullWarp, is_fixed);
        if (thread_.lane == 0) {
          state_words_[node] = word;
          if (p_.clamp.data) clamp_words_[node] = fixed;
        }
      } else {
        const bool is_first = position < g_.color_offsets[1];
        state_byte(node) = uint8_t((is_set ? kBit : 0) | (is_fixed ? kClamp : 0) | (is_first ? kFirstColor : 0));
      }
    }
  }

  GIBBS_DEVICE void store() const {
    // Lanes lie along units, so that global stores are coalesced.
    for (int64_t c = own_.begin; c < own_.end; ++c) {
      const int64_t row = linear_number(p_.sweep.batch, own_.model, c) * p_.num_nodes;
      const int at = int(c - own_.begin);
      for (int node = threadIdx.x; node < p_.num_nodes; node += blockDim.x)
        store_bit(p_.state_out, row + node, kLanes ? state_words_[node] >> at & 1 : state_[int64_t{node} * plan_.tile + at] & kBit);
    }
  }
  GIBBS_DEVICE void clear() const {
    for (int64_t c = own_.begin; c < own_.end; ++c) {
      const int64_t linear = linear_number(p_.sweep.batch, own_.model, c);
      for (int64_t node = threadIdx.x; node < p_.num_nodes; node += blockDim.x)
        store_bit(p_.state_out, linear * p_.num_nodes + node, 0);
      if (kAnnealed && threadIdx.x == 0) p_.log_weights[linear] = 0;
    }
  }

  // Each lane's value is that of its own chain.
  GIBBS_DEVICE void draw_bytes(const RandomStream& stream) {
    for (int counter = thread_.group; counter < random_byte_counters(p_.num_nodes); counter += thread_.num_groups) {
      const PhiloxOutput r = philox4x32(uint32_t(counter), stream.c1, stream.c2, stream.c3, stream.k0, stream.k1);
      const int at = (counter >> 3) * 32 + (counter & 7);
#pragma unroll
      for (int w = 0; w < 4; ++w) bytes_[(at + 8 * w) * thread_.tile + thread_.lane] = r.word[w];
    }
  }

  // ---- updates ----

  GIBBS_DEVICE void update(int begin, int end, const RandomStream& stream, float beta) {
    for (int position = begin + thread_.group; position < end; position += thread_.num_groups) {
      const int node = g_.order[position];
      const float logit_of_unit = logit(sum_of_neighbors(position), node, beta);
      bool drawn;
      if constexpr (kRule == GraphRule::kMetropolis)
        drawn = decide_flip(stream, uint32_t(node), high_byte(stream, node), logit_of_unit, bit(node));
      else
        drawn = decide(stream, uint32_t(node), high_byte(stream, node), logit_of_unit);
      if constexpr (kLanes) {
        write(node, __ballot_sync(kFullWarp, drawn));
      } else {
        uint8_t& byte = state_byte(node);
        if (!(byte & kClamp)) byte = uint8_t((byte & ~kBit) | (drawn ? kBit : 0));
      }
    }
  }
  GIBBS_DEVICE void write(int node, uint32_t drawn) {
    if (thread_.lane != 0) return;
    const uint32_t fixed = p_.clamp.data ? clamp_words_[node] : 0;
    state_words_[node] = (state_words_[node] & fixed) | (drawn & ~fixed);
  }

  // Tabulates each unit for every state of its neighbours; the first half-edge's bit is the lowest.
  GIBBS_DEVICE void tabulate(float beta) {
    for (int at = threadIdx.x; at < int(p_.num_nodes) * kTableEntries; at += blockDim.x) {
      const int position = at / kTableEntries, states = at % kTableEntries, node = g_.order[position];
      uint32_t acc = 0;
      const int begin = g_.row_offsets[position], end = g_.row_offsets[position + 1];
      for (int h = begin; h < end; ++h)
        if (states >> (h - begin) & 1) acc += uint32_t(coupling(h));
      table_[at] = uint8_t(threshold(logit(int32_t(acc), node, beta)) >> 24);
    }
  }

  GIBBS_DEVICE void look_up(int begin, int end, const RandomStream& stream, float beta) {
    const int lane = thread_.lane;
    // A warp takes 32 of its units at a time and notes which of them the lane's chain has still to decide.
    for (int first = begin + thread_.group; first < end; first += kWarpSize * thread_.num_groups) {
      uint32_t open = 0;
      for (int u = 0; u < kWarpSize; ++u) {
        const int position = first + u * thread_.num_groups;
        if (position >= end) break;
        const int node = g_.order[position], row = g_.row_offsets[position], row_end = g_.row_offsets[position + 1];
        int states = 0;
        for (int h = row; h < row_end; ++h) states |= int(state_words_[neighbor(h)] >> lane & 1) << (h - row);
        const uint32_t high = table_[position * kTableEntries + states], byte = high_byte(stream, node);
        if (byte == high) open |= 1u << u;
        write(node, __ballot_sync(kFullWarp, byte < high));
      }
      __syncwarp();  // what lane 0 wrote is there
      while (__any_sync(kFullWarp, open != 0)) {
        if (open) {
          const int position = first + (__ffs(int(open)) - 1) * thread_.num_groups, node = g_.order[position];
          open &= open - 1;
          const bool is_fixed = p_.clamp.data && (clamp_words_[node] >> lane & 1);
          if (!is_fixed && decide(stream, uint32_t(node), high_byte(stream, node), logit(sum_of_neighbors(position), node, beta)))
            atomicOr(&state_words_[node], 1u << lane);
        }
      }
    }
  }

  // ---- annealing ----

  // The thread's part of log f_next - log f_beta of its chain, over its units. Units of colour 0 are summed out, given the rest.
  GIBBS_DEVICE double weigh(double beta, double next_beta) const {
    double summed_out = 0, linear = 0;
    const int rest = g_.color_offsets[1];
    for (int position = thread_.group; position < p_.num_nodes; position += thread_.num_groups) {
      const int node = g_.order[position];
      if (position < rest) {
        const int32_t acc = sum_of_neighbors(position);
        summed_out += double(softplus_difference(logit(acc, node, float(beta)), logit(acc, node, float(next_beta))));
      } else if (bit(node)) {
        // Each end of an edge takes half of its coupling.
        double inside = 0;
        for (int h = g_.row_offsets[position]; h < g_.row_offsets[position + 1]; ++h) {
          const int other = neighbor(h);
          if (bit(other) && !is_first_color(other)) inside += double(coupling(h));
        }
        linear += inside * double(scale_) / 2 + double(bias(bias_, p_.bias, node)) - double(bias(base_bias_, p_.base_bias, node));
      }
    }
    return summed_out + (double(float(next_beta)) - double(float(beta))) * linear;
  }
  GIBBS_DEVICE bool is_first_color(int node) const {
    if constexpr (!kLanes) return state_byte(node) & kFirstColor;
    // A colour's nodes rise with their positions.
    int low = 0, high = g_.color_offsets[1];
    while (low < high) {
      const int middle = (low + high) / 2;
      if (g_.order[middle] < node)
        low = middle + 1;
      else
        high = middle;
    }
    return low < g_.color_offsets[1] && g_.order[low] == node;
  }

  GIBBS_DEVICE void store_log_weight(double log_weight) {
    terms_[threadIdx.x] = log_weight;
    __syncthreads();  // all parts are there
    if (thread_.group != 0 || !is_active_) return;
    double sum = 0;
    for (int group = 0; group < thread_.num_groups; ++group) sum += terms_[group * thread_.tile + thread_.lane];
    p_.log_weights[linear_] = sum;
  }

  const GraphParams& p_;
  const GraphPlan& plan_;
  const GraphView g_;
  const GraphCtaChains own_;
  const GraphTileThread thread_;
  Shared<uint32_t> state_words_, clamp_words_, bytes_, scratch_;
  Shared<int32_t> neighbor_, coupling_;
  Shared<uint8_t> table_;
  Shared<double> terms_;
  uint8_t* state_ = nullptr;
  bool is_active_;
  int64_t chain_, linear_;
  uint64_t number_;
  const void *bias_, *base_bias_ = nullptr, *coupling_row_;
  int k_ = 0;
  float scale_ = 1;
};

template <GraphCudaRoute kRoute, GraphRule kRule>
__global__ void __launch_bounds__(kGraphThreads, 1) graph_kernel(const __grid_constant__ GraphBinaryParams params) {
  GIBBS_DYNAMIC_SHARED(shared);
  SharedMemory memory(shared);
  GraphCta<kRoute, kRule> cta(params, memory);
  cta.run();
}

struct GraphResolutionParams {
  GraphParams call;
  double* out;  // [linear number]
};

// A CTA owns a model.
__global__ void __launch_bounds__(kGraphThreads, 1) graph_resolution_kernel(const __grid_constant__ GraphResolutionParams params) {
  GIBBS_DYNAMIC_SHARED(shared);
  const GraphParams& p = params.call;
  SharedMemory memory(shared);
  const Shared<uint32_t> scratch = memory.take<uint32_t>(kGraphScaleScratch);
  int k = 0;
  if (graph_layout_is_sound(p.layout, p.num_nodes, p.num_edges, p.num_colors))
    k = graph_scale_exponent(p, graph_view(p.layout), blockIdx.x, scratch);
  else if (threadIdx.x == 0)
    report_fault(p.sweep, Outcome::kBadLayout);
  if (threadIdx.x == 0) params.out[linear_number(p.sweep.batch, blockIdx.x, 0)] = FloatTraits<double>::power(-k);
}

#endif

}  // namespace gibbs
