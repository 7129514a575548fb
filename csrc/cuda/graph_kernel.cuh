// SPDX-License-Identifier: Apache-2.0
#pragma once

// Binary sweeps of coloured graphs. twins: csrc/cpu/kernels/graph_{sums,tables,units,metropolis}.h
//
// A lane is a unit, and a byte of its state holds eight chains: one gather of the neighbours' bytes serves all eight. Couplings are rounded once
// more, to 16 bits in two slices of 8, and an instruction multiplies those of four neighbours by their bits (dp4a), so that two of them make
// four terms of a field. Bounds decide from this field (bounds.cuh). The few units that they leave open are noted, and taken up when the
// colour is done, by as many threads as there are of them.
#include "cuda/bounds.cuh"
#include "cuda/graph_cta.cuh"
#include "cuda/stages.h"

#include <type_traits>

namespace gibbs {

constexpr int kGraphThreads = 512;      // at most, a power of 2
constexpr int kGraphPackThreads = 512;  // of the kernel that rounds couplings
constexpr int kOctet = 8;               // chains of a byte
constexpr int kQuad = 4;                // half-edges of a product
constexpr int kMaxGraphTile = 32;       // chains of a CTA

// Copies of the table of bounds: one for each lane, or a single one if shared memory has not even room for the states.
GIBBS_HOST_DEVICE constexpr int graph_logit_copies(bool is_shared) { return is_shared ? 32 : 1; }

// The rule by which a sweep updates a unit. kAnnealed is Gibbs's rule with log-weights.
enum class GraphRule { kGibbs, kAnnealed, kMetropolis };

// Words of a chain's random bytes. Eight more than there are bytes for, so that chains begin in different banks.
GIBBS_HOST_DEVICE int64_t byte_words(int64_t num_nodes) { return random_byte_words(num_nodes) + kSpanCounters; }

// Bytes that hold the chains of a CTA: a power of 2, as `tile` is.
GIBBS_HOST_DEVICE int octets_of(int tile) { return int(divide_up(tile, kOctet)); }

struct alignas(16) Quad {
  int32_t node[kQuad];
};
struct alignas(8) Slices {
  int32_t high, low;  // signed bytes of four couplings: 256 high + low, in units of 2^shift
};

// The quads of half-edges of each position. If all positions may have as many as the largest without more memory, quad q of position i is at
// q num_nodes + i, so that lanes along positions read neighbouring quads; otherwise a position's quads lie one after the other.
struct QuadLayout {
  bool is_strided;
  GIBBS_HOST_DEVICE static int64_t capacity(int64_t num_nodes, int64_t num_edges) { return num_edges / 2 + num_nodes + 1; }
  GIBBS_HOST_DEVICE QuadLayout(int64_t num_nodes, int64_t num_edges, int64_t max_degree)
      : is_strided(divide_up(max_degree, kQuad) * num_nodes <= capacity(num_nodes, num_edges)) {}
  // The places of all quads fit int32, as the numbers of half-edges do.
  GIBBS_HOST_DEVICE int first(int position, int row_offset) const { return is_strided ? position : row_offset / kQuad + position; }
  GIBBS_HOST_DEVICE int step(int64_t num_nodes) const { return is_strided ? int(num_nodes) : 1; }
};

// What the stages before a sweep make, in the call's workspace.
struct GraphPacked {
  ModelScale* scales;       // [model]
  Quad* neighbors;          // [capacity]
  Slices* slices;           // [model, capacity]
  int32_t* couplings;       // [model, E]
  uint32_t *bits, *clamps;  // [row, words]; clamps may be null
  float *bias, *base_bias;  // [model or row, position]; base_bias: annealed
  uint64_t* numbers;        // [row]
  uint32_t* states;         // kGlobal: [CTA, state_words]
  GraphPacked(const GraphParams& p, const GraphPlan& plan, Workspace& workspace);
};

struct GraphPackParams {
  GraphParams call;
  GraphPacked packed;
};

// A CTA's arrays, of words but for terms. States and clamps are in shared memory if they fit (is_shared), and random bytes are drawn alone otherwise.
struct GraphBinaryLayout {
  bool is_shared;
  int64_t states, clamps, bytes, terms;
  GIBBS_HOST_DEVICE GraphBinaryLayout(const GraphParams& p, const GraphPlan& plan)
      : is_shared(plan.route == GraphCudaRoute::kShared),
        states((p.num_nodes * octets_of(plan.tile) + 3) / 4),
        clamps(p.clamp.data ? states : 0),
        bytes(is_shared ? plan.tile * byte_words(p.num_nodes) : 0),
        terms(p.log_weights ? plan.shape.num_threads : 0) {}
  GIBBS_HOST_DEVICE int64_t shared_memory() const {
    return open_logits_bytes(graph_logit_copies(is_shared)) +
           (is_shared ? shared_bytes<uint32_t>(states) + shared_bytes<uint32_t>(clamps) : 0) + shared_bytes<uint32_t>(bytes) +
           shared_bytes<uint64_t>(kMaxGraphTile) + open_units_bytes() + shared_bytes<double>(terms);
  }
};

struct GraphBinaryParams {
  SweepView sweep;
  GraphView graph;            // without max_degree,
  const int32_t* max_degree;  // which only the device knows
  GraphPacked packed;
  GraphBinaryLayout arrays;
  int32_t tile, octets, words, ctas_per_model;  // words: of a row of bits
  bool bias_per_chain;
  double* log_weights;
};

#if defined(GIBBS_DEVICE)

// Rounds couplings. CTA m < num_models owns model m, whose scale it finds, and writes its couplings and their slices. The last CTA writes the
// neighbours, which all models share. Every CTA checks the layout before it follows it.
// Traffic: the layout and the couplings two or three times each, mostly from L2.
template <class T>
GIBBS_DEVICE void round_couplings(const GraphPackParams& params, const GraphView& g, const QuadLayout& quads, int64_t model,
                                  const Shared<uint32_t>& scratch) {
  const GraphParams& p = params.call;
  const T* const coupling = parameter_row<T>(p.coupling, p.sweep.batch, model, 0);
  const CouplingScale scale = graph_scale_of(p.sweep, g, coupling, p.coupling.stride, scratch);
  const int shift = scale.shift();
  const T factor = FloatTraits<T>::power(scale.k);
  const auto at = [&](int64_t edge) { return rounded(global_load(coupling + edge * p.coupling.stride), factor); };
  if (threadIdx.x == 0) {
    const float error = shift ? 0.5f * float(g.max_degree) * float(int64_t{1} << shift) : 0;
    params.packed.scales[model] = {scale.k, shift, FloatTraits<float>::power(-scale.k), error};
  }
  int32_t* const couplings = params.packed.couplings + model * g.num_edges;
  for (int64_t e = threadIdx.x; e < g.num_edges; e += blockDim.x) couplings[e] = at(e);
  Slices* const slices = params.packed.slices + model * QuadLayout::capacity(g.num_nodes, g.num_edges);
  for (int64_t position = threadIdx.x; position < g.num_nodes; position += blockDim.x) {
    const int64_t begin = g.row_offsets[position], end = g.row_offsets[position + 1];
    int64_t to = quads.first(int(position), int(begin));
    for (int64_t h = begin; h < end; h += kQuad, to += quads.step(g.num_nodes)) {
      uint32_t high = 0, low = 0;
      for (int i = 0; i < kQuad && h + i < end; ++i) {
        int32_t rest = shifted(at(g.edge_of[h + i]), shift);
        low |= uint32_t(take_digit(rest) & 0xff) << (8 * i);
        high |= uint32_t(rest & 0xff) << (8 * i);
      }
      slices[to] = {int32_t(high), int32_t(low)};
    }
  }
}

GIBBS_DEVICE void copy_neighbors(const GraphView& g, const QuadLayout& quads, Quad* to_quads) {
  for (int64_t position = threadIdx.x; position < g.num_nodes; position += blockDim.x) {
    const int64_t begin = g.row_offsets[position], end = g.row_offsets[position + 1];
    int64_t to = quads.first(int(position), int(begin));
    for (int64_t h = begin; h < end; h += kQuad, to += quads.step(g.num_nodes)) {
      Quad quad;
#pragma unroll
      for (int i = 0; i < kQuad; ++i) quad.node[i] = h + i < end ? g.neighbors[h + i] : 0;  // its coupling is 0
      to_quads[to] = quad;
    }
  }
}

__global__ void __launch_bounds__(kGraphPackThreads, 1) graph_pack_kernel(const __grid_constant__ GraphPackParams params) {
  SharedMemory memory;
  const Shared<uint32_t> scratch = memory.take<uint32_t>(kGraphScaleScratch);
  const GraphParams& p = params.call;
  const int64_t model = blockIdx.x, num_models = p.sweep.batch.num_models;
  if (!graph_layout_is_sound(p)) {
    if (model == num_models) return;
    if (threadIdx.x == 0) params.packed.scales[model] = {kUnsound, 0, 1, 0};
    for (int64_t chain = threadIdx.x; p.log_weights && chain < p.sweep.batch.chains_per_model; chain += blockDim.x)
      p.log_weights[linear_number(p.sweep.batch, model, chain)] = 0;
    return;
  }
  const GraphView g = graph_view(p.layout);
  const QuadLayout quads(g.num_nodes, g.num_edges, g.max_degree);
  if (model == num_models)
    copy_neighbors(g, quads, params.packed.neighbors);
  else if (p.is_double)
    round_couplings<double>(params, g, quads, model, scratch);
  else
    round_couplings<float>(params, g, quads, model, scratch);
}

// A CTA owns up to 32 chains of one model, for all sweeps.
// Shared memory: the interval of logits that each random byte leaves open, the states and clamps as bytes [node, octet of chains], a sweep's random
// bytes [chain, node], and the units of a colour that are still open. If states do not fit, they lie in device memory, and each random
// byte is drawn alone.
// Synchronisation: barriers after a sweep's random bytes, after each colour, and again after its open units, if there are any.
// Traffic: An update reads a quad of neighbours, a pair of slices and four bytes of states for four half-edges and eight chains, and for itself
// a random byte and an interval. Philox is 1/16 of a counter.
// Computes: field_i = sum over e of slices_e z_j, logit_i within beta (field_i 2^(shift - k) + bias_i) +- error; z_i = [word_i < threshold(logit_i)], or
// (kMetropolis) z_i flips where x = (1 - 2 z_i) logit_i >= 0 or word_i < acceptance(x).
template <GraphRule kRule, bool kShared>
class GraphCta {
  static constexpr int kLogitCopies = graph_logit_copies(kShared);
  static constexpr bool kAnnealed = kRule == GraphRule::kAnnealed, kMetropolis = kRule == GraphRule::kMetropolis;
  template <class T>
  using Array = std::conditional_t<kShared, Shared<T>, T*>;

 public:
  GIBBS_DEVICE explicit GraphCta(const GraphBinaryParams& params)
      : p_(params),
        quads_(g().num_nodes, g().num_edges, *params.max_degree),
        model_(int(blockIdx.x) / params.ctas_per_model),
        first_(int64_t{int(blockIdx.x) % params.ctas_per_model} * params.tile) {
    const int64_t left_over = params.sweep.batch.chains_per_model - first_;
    num_chains_ = left_over < params.tile ? int(left_over) : params.tile;
    slices_ = params.packed.slices + model_ * QuadLayout::capacity(g().num_nodes, g().num_edges);
    SharedMemory memory;
    // Arrays of constant size come first, so that their places are constants.
    open_logits_ = OpenLogits<kLogitCopies>(memory);
    numbers_ = memory.take<uint64_t>(kMaxGraphTile);
    open_units_ = OpenUnits(memory);
    if constexpr (kShared) {
      states_ = memory.take<uint32_t>(params.arrays.states);
      random_words_ = memory.take<uint32_t>(params.arrays.bytes);
      random_bytes_ = byte_view(random_words_);
      clamps_ = memory.take<uint32_t>(params.arrays.clamps);
    } else {
      states_ = params.packed.states + int64_t{blockIdx.x} * (params.arrays.states + params.arrays.clamps);
      clamps_ = states_ + params.arrays.states;
    }
    state_bytes_ = byte_view(states_);
    clamp_bytes_ = byte_view(clamps_);
    terms_ = memory.take<double>(params.arrays.terms);
  }

  GIBBS_DEVICE void run() {
    const SweepView& s = p_.sweep;
    open_logits_.template tabulate<kMetropolis>();
    load(state_bytes_, p_.packed.bits);
    if (p_.packed.clamps) load(clamp_bytes_, p_.packed.clamps);
    if (int(threadIdx.x) < num_chains_) numbers_[threadIdx.x] = p_.packed.numbers[row(int(threadIdx.x))];
    open_units_.clear();
    __syncthreads();  // all arrays are filled
    const ModelScale scale = p_.packed.scales[model_];
    scale_ = scale.scale;
    double log_weight = 0;
    for (int64_t sweep = 0; sweep < s.num_sweeps; ++sweep) {
      const ModelBounds bounds(float(beta_at(s, model_, sweep + kAnnealed)), scale.shift, scale.scale, scale.error);
      if constexpr (kShared) draw_bytes(sweep);
      if (kAnnealed) log_weight += weigh(beta_at(s, model_, sweep), beta_at(s, model_, sweep + 1));
      __syncthreads();  // the bytes are there, and nobody weighs any more
      for (int64_t color = 0; color < g().num_colors; ++color) {
        const bool notes = update_color(g().color_offsets[color], g().color_offsets[color + 1], sweep, bounds);
        if (!__syncthreads_or(notes)) continue;  // the colour is whole, but for its open units
        close(sweep, bounds);
        __syncthreads();  // the colour is whole
        open_units_.next();
      }
    }
    store();
    if (kAnnealed) store_log_weight(log_weight);
  }

 private:
  GIBBS_DEVICE const GraphView& g() const { return p_.graph; }
  GIBBS_DEVICE int64_t row(int chain) const { return model_ * p_.sweep.batch.chains_per_model + first_ + chain; }

  // ---- before and after ----

  // Lanes lie along units; eight rows of bits become bytes.
  GIBBS_DEVICE void load(const Array<uint8_t>& to, const uint32_t* from) const {
    for (int item = warp(); item < p_.octets * p_.words; item += num_warps()) {
      const int octet = item % p_.octets, word = item / p_.octets, node = word * kWarpSize + lane();
      uint32_t byte = 0;
      for (int c = 0; c < kOctet && octet * kOctet + c < num_chains_; ++c)
        byte |= (from[row(octet * kOctet + c) * p_.words + word] >> lane() & 1) << c;
      if (node < int(g().num_nodes)) to[node * p_.octets + octet] = uint8_t(byte);
    }
  }
  GIBBS_DEVICE void store() const {
    for (int item = warp(); item < p_.octets * p_.words; item += num_warps()) {
      const int octet = item % p_.octets, word = item / p_.octets, node = word * kWarpSize + lane();
      const uint32_t byte = node < int(g().num_nodes) ? state_bytes_[node * p_.octets + octet] : 0;
      for (int c = 0; c < kOctet && octet * kOctet + c < num_chains_; ++c) {
        const uint32_t bits = __ballot_sync(kFullWarp, byte >> c & 1);
        if (lane() == 0) p_.packed.bits[row(octet * kOctet + c) * p_.words + word] = bits;
      }
    }
  }

  GIBBS_DEVICE RandomStream stream(int chain, int64_t sweep) const {
    return random_stream(seed_of(p_.sweep), numbers_[chain], uint64_t(p_.sweep.sweep_offset + sweep));
  }
  GIBBS_DEVICE int bytes_per_chain() const { return int(4 * byte_words(g().num_nodes)); }
  GIBBS_DEVICE void draw_bytes(int64_t sweep) const {
    const auto counters = int(random_byte_counters(g().num_nodes));
    for (int item = int(threadIdx.x); item < num_chains_ * counters; item += int(blockDim.x)) {
      // Eight lanes write words side by side. The next eight have the next chain, whose words are in other banks.
      const int eight = item / kSpanCounters, chain = eight % num_chains_, span = eight / num_chains_;
      store_random_bytes(stream(chain, sweep), kSpanCounters * span + item % kSpanCounters,
                         random_words_ + chain * (bytes_per_chain() / 4));
    }
  }
  GIBBS_DEVICE uint32_t random_byte(int node, int chain, int64_t sweep) const {
    if constexpr (kShared) return random_bytes_[chain * bytes_per_chain() + node];
    return random_high_byte(stream(chain, sweep), uint32_t(node));
  }
  GIBBS_DEVICE float bias(const float* biases, int position, int chain) const {
    return biases[(p_.bias_per_chain ? row(chain) : int64_t{model_}) * g().num_nodes + position];
  }
  GIBBS_DEVICE UnitBounds unit_bounds(const ModelBounds& bounds, int position, int chain) const {
    return {bounds, bias(p_.packed.bias, position, chain), kAnnealed ? bias(p_.packed.base_bias, position, chain) : 0.0f};
  }

  // ---- updates by bounds ----

  // Updates the units of a colour at positions begin .. end - 1. Returns whether the thread has noted one that is open.
  GIBBS_DEVICE bool update_color(int begin, int end, int64_t sweep, const ModelBounds& bounds) {
    // Few units get a thread for each of their chains. So do few chains, those that have biases of their own, and random bytes that are drawn alone.
    if (kShared && p_.tile >= kOctet && !p_.bias_per_chain && (end - begin) * p_.octets * 2 >= int(blockDim.x))
      return update<kOctet>(begin, end, p_.octets, sweep, bounds);
    return update<1>(begin, end, p_.tile, sweep, bounds);
  }

  // groups: number, a power of 2, of kChains chains each. Lanes lie along units, or along chains if a warp has more lanes than there are units.
  template <int kChains>
  GIBBS_DEVICE bool update(int begin, int end, int groups, int64_t sweep, const ModelBounds& bounds) {
    const int thread = int(threadIdx.x), per_group = int(blockDim.x) / groups;
    const bool along_chains = end - begin < kWarpSize;
    const int group = along_chains ? thread & (groups - 1) : thread / per_group;
    if (group * kChains >= num_chains_) return false;
    bool notes = false;
    for (int position = begin + (along_chains ? thread / groups : thread % per_group); position < end; position += per_group)
      notes |= update_unit<kChains>(position, group * kChains, sweep, bounds);
    return notes;
  }

  // Updates chains first .. first + kChains - 1 of the unit at a position.
  template <int kChains>
  GIBBS_DEVICE bool update_unit(int position, int first, int64_t sweep, const ModelBounds& bounds) {
    const int node = g().order[position], octet = first / kOctet, shift = first % kOctet;
    int32_t high[kChains] = {}, low[kChains] = {};
    const int row = g().row_offsets[position], degree = g().row_offsets[position + 1] - row;
    int at = quads_.first(position, row);
    for (int h = 0; h < degree; h += kQuad, at += quads_.step(g().num_nodes)) {
      const Quad quad = global_load(p_.packed.neighbors + at);
      const Slices of_quad = global_load(slices_ + at);
      uint32_t bits = 0;
#pragma unroll
      for (int i = 0; i < kQuad; ++i) bits |= uint32_t(state_bytes_[quad.node[i] * p_.octets + octet]) << (8 * i);
      bits >>= shift;
#pragma unroll
      for (int c = 0; c < kChains; ++c) {
        const auto of_chain = int32_t(bits >> c & 0x01010101);
        high[c] = __dp4a(of_quad.high, of_chain, high[c]);
        low[c] = __dp4a(of_quad.low, of_chain, low[c]);
      }
    }
    const int last = num_chains_ - first < kChains ? num_chains_ - first : kChains;
    const uint32_t mask = (1u << last) - 1, old = uint32_t(state_bytes_[node * p_.octets + octet]) >> shift & mask,
                   fixed = p_.packed.clamps ? uint32_t(clamp_bytes_[node * p_.octets + octet]) >> shift : 0;
    const UnitBounds unit = unit_bounds(bounds, position, first);
    Decided decided;
#pragma unroll
    for (int c = kChains; c-- > 0;) {  // nobody looks at what becomes of chains that do not exist
      high[c] = int32_t(uint32_t(high[c]) * 256 + uint32_t(low[c]));
      decide(decided, unit, high[c], random_byte(node, first + c, sweep), old >> c & 1);
    }
    const uint32_t open = decided.open() & ~fixed & mask, ones = ~decided.is_not_one & mask,
                   drawn = kMetropolis ? old ^ ones : ones;
    write<kChains>(node, octet, shift, old, (old & fixed) | (drawn & ~fixed));
    if (open) note<kChains>(position, first, open, high, sweep, bounds);
    return open != 0;
  }
  GIBBS_DEVICE void decide(Decided& decided, const UnitBounds& unit, int32_t field, uint32_t byte, bool is_one) const {
    const float sum = float(field), low = unit.slope * sum + unit.low, high = unit.slope * sum + unit.high;
    if (kMetropolis && is_one)
      decided.add(open_logits_[byte], -high, -low);
    else
      decided.add(open_logits_[byte], low, high);
  }
  template <int kChains>
  GIBBS_DEVICE void write(int node, int octet, int shift, uint32_t old, uint32_t next) const {
    const int at = node * p_.octets + octet;
    if constexpr (kChains == kOctet)
      state_bytes_[at] = uint8_t(next);
    else if (old != next)  // other threads have the byte's other chains
      flip_bit(at, shift);
  }
  GIBBS_DEVICE void flip_bit(int at, int bit) const { atomicXor(&states_[at / 4], 1u << (8 * (at % 4) + bit)); }

  // ---- open units ----

  // Notes the open ones of kChains chains of a unit, whose bits are 0 until they are decided (kMetropolis: as they were).
  template <int kChains>
  GIBBS_DEVICE void note(int position, int first, uint32_t open, const int32_t (&fields)[kChains], int64_t sweep,
                         const ModelBounds& bounds) const {
    uint32_t at = open_units_.reserve(__popc(open)), left = 0;
#pragma unroll
    for (int c = 0; c < kChains; ++c) {
      if (!(open >> c & 1)) continue;
      if (!open_units_.note(at++, {position, first + c, fields[c]})) left |= 1u << c;
    }
    for (; left; left &= left - 1) {  // there is no room for these
      const int chain = first + __ffs(int(left)) - 1;
      const bool is_one = bit(g().order[position], chain);
      if (is_below_exactly(position, chain, word(position, chain, sweep), is_one, bounds.beta)) flip(position, chain);
    }
  }
  GIBBS_DEVICE void close(int64_t sweep, const ModelBounds& bounds) const {
    const uint32_t count = open_units_.take_up();
    for (uint32_t at = threadIdx.x; at < count; at += blockDim.x) {
      const auto [position, chain, field] = open_units_[at];
      const bool is_one = bit(g().order[position], chain), negates = kMetropolis && is_one;
      const uint32_t of_unit = word(position, chain, sweep);
      const UnitBounds unit = unit_bounds(bounds, position, chain);
      const float sum = float(field), low = unit.slope * sum + unit.low, high = unit.slope * sum + unit.high;
      const IsBelow below = is_below<kMetropolis>(of_unit, negates ? -high : low, negates ? -low : high);
      if (below == IsBelow::kYes || (below == IsBelow::kOpen && is_below_exactly(position, chain, of_unit, is_one, bounds.beta)))
        flip(position, chain);
    }
  }
  GIBBS_DEVICE uint32_t word(int position, int chain, int64_t sweep) const {
    const int node = g().order[position];
    return random_byte(node, chain, sweep) << 24 | draw_low_bits(stream(chain, sweep), uint32_t(node));
  }
  GIBBS_DEVICE void flip(int position, int chain) const {
    flip_bit(g().order[position] * p_.octets + chain / kOctet, chain % kOctet);
  }

  // ---- exact fields ----

  GIBBS_DEVICE uint32_t bit(int node, int chain) const {
    return state_bytes_[node * p_.octets + chain / kOctet] >> (chain % kOctet) & 1;
  }
  GIBBS_DEVICE int32_t coupling(int half_edge) const {
    return p_.packed.couplings[int64_t{model_} * g().num_edges + g().edge_of[half_edge]];
  }
  // Unsigned, because couplings for which a fault has been reported may overflow.
  GIBBS_DEVICE int32_t exact_field(int position, int chain) const {
    uint32_t sum = 0;
    for (int h = g().row_offsets[position]; h < g().row_offsets[position + 1]; ++h)
      sum += (0u - bit(g().neighbors[h], chain)) & uint32_t(coupling(h));
    return int32_t(sum);
  }
  GIBBS_DEVICE float exact_logit(int32_t field, int position, int chain, float beta) const {
    const float of_bias = bias(p_.packed.bias, position, chain);
    return kAnnealed ? annealed_logit(field, scale_, of_bias, bias(p_.packed.base_bias, position, chain), beta)
                     : binary_logit(field, scale_, of_bias, beta);
  }

  // Whether the word is below the threshold of the unit's logit, or (kMetropolis) the unit flips.
  GIBBS_DEVICE bool is_below_exactly(int position, int chain, uint32_t word, bool is_one, float beta) const {
    const float logit = exact_logit(exact_field(position, chain), position, chain, beta), x = logit_of_flip(logit, is_one);
    return kMetropolis ? x >= 0 || word < acceptance(x) : word < threshold(logit);
  }

  // ---- annealing ----

  // The thread's part of log f_next - log f_beta of its chain, over its units. Units of colour 0 are summed out, given the rest.
  GIBBS_DEVICE double weigh(double beta, double next_beta) const {
    const int chain = int(threadIdx.x) & (p_.tile - 1), step = int(blockDim.x) / p_.tile;
    if (chain >= num_chains_) return 0;
    double summed_out = 0, linear = 0;
    const int rest = g().color_offsets[1];
    for (int position = int(threadIdx.x) / p_.tile; position < int(g().num_nodes); position += step) {
      if (position < rest) {
        const int32_t field = exact_field(position, chain);
        summed_out += double(softplus_difference(exact_logit(field, position, chain, float(beta)),
                                                 exact_logit(field, position, chain, float(next_beta))));
      } else if (bit(g().order[position], chain)) {
        // Each end of an edge takes half of its coupling. With two colours no edge is inside the rest.
        double inside = 0;
        if (g().num_colors > 2)
          for (int h = g().row_offsets[position]; h < g().row_offsets[position + 1]; ++h)
            if (bit(g().neighbors[h], chain) && !is_first_color(g().neighbors[h])) inside += double(coupling(h));
        linear += inside * double(scale_) / 2 + double(bias(p_.packed.bias, position, chain)) -
                  double(bias(p_.packed.base_bias, position, chain));
      }
    }
    return summed_out + (double(float(next_beta)) - double(float(beta))) * linear;
  }
  // A colour's nodes rise with their positions.
  GIBBS_DEVICE bool is_first_color(int node) const {
    int low = 0, high = g().color_offsets[1];
    while (low < high) {
      const int middle = (low + high) / 2;
      if (g().order[middle] < node)
        low = middle + 1;
      else
        high = middle;
    }
    return low < g().color_offsets[1] && g().order[low] == node;
  }
  GIBBS_DEVICE void store_log_weight(double log_weight) const {
    terms_[threadIdx.x] = log_weight;
    __syncthreads();  // all parts are there
    const auto chain = int(threadIdx.x);
    if (chain >= num_chains_) return;
    double sum = 0;
    for (int at = chain; at < int(blockDim.x); at += p_.tile) sum += terms_[at];
    p_.log_weights[linear_number(p_.sweep.batch, model_, first_ + chain)] = sum;
  }

  const GraphBinaryParams& p_;
  const QuadLayout quads_;
  const int model_;
  const int64_t first_;  // chain of the model
  int num_chains_;
  const Slices* slices_;
  float scale_ = 1;
  OpenUnits open_units_;
  OpenLogits<kLogitCopies> open_logits_;
  Shared<uint32_t> random_words_;
  Array<uint32_t> states_, clamps_;
  Array<uint8_t> state_bytes_, clamp_bytes_;
  Shared<uint8_t> random_bytes_;
  Shared<uint64_t> numbers_;
  Shared<double> terms_;
};

template <GraphRule kRule, bool kShared>
__global__ void __launch_bounds__(kGraphThreads, 1) graph_kernel(const __grid_constant__ GraphBinaryParams params) {
  if (params.packed.scales[0].k == kUnsound) return;
  GraphCta<kRule, kShared>(params).run();
}

struct GraphResolutionParams {
  GraphParams call;
  double* out;  // [linear number]
};

// A CTA owns a model.
__global__ void __launch_bounds__(kGraphPackThreads, 1)
    graph_resolution_kernel(const __grid_constant__ GraphResolutionParams params) {
  const GraphParams& p = params.call;
  SharedMemory memory;
  const Shared<uint32_t> scratch = memory.take<uint32_t>(kGraphScaleScratch);
  int k = 0;
  if (graph_layout_is_sound(p)) {
    const GraphView g = graph_view(p.layout);
    const void* row = parameter_row(p.coupling, p.sweep.batch, p.is_double, blockIdx.x, 0);
    k = p.is_double ? graph_scale_of(p.sweep, g, static_cast<const double*>(row), p.coupling.stride, scratch).k
                    : graph_scale_of(p.sweep, g, static_cast<const float*>(row), p.coupling.stride, scratch).k;
  }
  if (threadIdx.x == 0) params.out[linear_number(p.sweep.batch, blockIdx.x, 0)] = FloatTraits<double>::power(-k);
}

#endif

}  // namespace gibbs
