// SPDX-License-Identifier: Apache-2.0
#pragma once

// Binary sweeps of bipartite models. twin: csrc/cpu/kernels/bipartite.h
//
// Fields are products of matrices on tensor cores: couplings in two slices of signed bytes times bits, for 8 chains at a time. A lane gets the
// fields of four neighbouring units of two chains, and decides them by bounds (bounds.cuh). The few units that stay open are noted, and taken up
// when the side is done, by as many threads as there are of them. Log-weights need exact fields; their calls have four slices.
#include "cuda/bipartite_slices.h"
#include "cuda/cluster.cuh"

#include <type_traits>

namespace gibbs {

constexpr int kBipartiteThreads = 384;  // at most
constexpr int kTileChains = 8;          // chains of a product
constexpr int kMaxBipartiteTiles = 4;   // of a CTA
constexpr int kMaxSweepsAhead = 8;      // at most this many sweeps' random bytes are drawn at once

// Slices of both sides (kept_sides = 2), or of right's updates (1), may lie in registers: of a side with at most this many words, with a warp for each.
GIBBS_HOST_DEVICE constexpr int kept_words(int kept_sides) { return kept_sides == 2 ? 4 : 8; }
// Four slices take many registers.
GIBBS_HOST_DEVICE constexpr int most_threads(bool is_annealed, int kept_sides) {
  return kept_sides ? kept_words(kept_sides) * kWarpSize : is_annealed ? 256 : kBipartiteThreads;
}

// The words of a side that a CTA of a cluster updates.
struct WordRange {
  int begin, end;
  GIBBS_HOST_DEVICE WordRange(int words, int rank, int cluster_size)
      : begin(int(int64_t{words} * rank / cluster_size)), end(int(int64_t{words} * (rank + 1) / cluster_size)) {}
  GIBBS_HOST_DEVICE int count() const { return end - begin; }
};
// The most that any CTA has.
GIBBS_HOST_DEVICE int most_words(int words, int cluster_size) { return (words + cluster_size - 1) / cluster_size; }

// One run of spans of random bytes serves all positions; in a cluster each side of a CTA has its own.
GIBBS_HOST_DEVICE int num_spans_of_all(const BipartiteSide& right) {
  return int(num_spans(int64_t{right.first_number} + right.words * kWarpSize));
}

// A CTA's arrays.
struct BipartiteLayout {
  bool is_shared;  // states and terms are in shared memory, else in device memory
  int64_t states, terms, resident, bytes;
  int32_t byte_stride;  // of a chain, in words; rows of 2 t chains are in different banks
  GIBBS_HOST_DEVICE BipartiteLayout(const BipartitePacked& packed, const BipartitePlan& plan)
      : is_shared(plan.route != BipartiteRoute::kAllGlobal),
        states(int64_t{packed.sides[0].words + packed.sides[1].words} * plan.tiles * kTileChains),
        terms(packed.num_slices == kMaxSlices ? states : 0),
        resident(plan.resident * block_fragments(packed.num_slices)) {
    const BipartiteSide &left = packed.sides[0], &right = packed.sides[1];
    const int size = plan.shape.cluster_size;
    const auto spans = [&](const BipartiteSide& side) { return int(num_spans(most_words(side.words, size) * kWarpSize)) + 1; };
    byte_stride = kSpanWords * (size > 1 ? spans(left) + spans(right) : num_spans_of_all(right)) + 4;
    bytes = int64_t{plan.sweeps_ahead} * plan.tiles * kTileChains * byte_stride;
  }
  GIBBS_HOST_DEVICE int64_t shared_memory() const {
    return shared_bytes<uint32_t>(kBytes) + shared_bytes<uint64_t>(kMaxBipartiteTiles * kTileChains) + open_units_bytes() +
           shared_bytes<LeftFragment>(resident) + shared_bytes<uint32_t>(bytes) +
           (is_shared ? shared_bytes<uint32_t>(states) + shared_bytes<double>(terms) : 0);
  }
  // Of a CTA.
  GIBBS_HOST_DEVICE int64_t device_memory() const {
    return is_shared ? 0 : shared_bytes<uint32_t>(states) + shared_bytes<double>(terms);
  }
};

struct BipartiteBinaryParams {
  SweepView sweep;
  ParameterView weight;
  bool is_double;
  BipartitePacked packed;
  BipartiteLayout arrays;
  BipartitePlan plan;
  int32_t clusters_per_model;
  unsigned char* in_device;  // arrays.device_memory() bytes of each CTA
  double* log_weights;
};

#if defined(GIBBS_DEVICE)

// A CTA, or a cluster of them, owns up to 32 chains of one model, for all sweeps. In a cluster, each CTA updates some words of both sides.
// Shared memory: the interval of logits that each random byte leaves open, both sides' bits [word, chain], random bytes of some sweeps
// [sweep, chain, unit], the units of a half sweep that are still open, and as many blocks of slices as there is room for, unless they lie in
// registers. Bits that do not fit lie in device memory; random bytes that do not fit are drawn alone.
// Synchronisation: one barrier a half sweep, between the bits that it writes and the products that read them; one more if units are open, or for a
// batch of random bytes. In a cluster, its own words are then copied to the other CTAs, before a barrier of the cluster.
// Traffic: a block's slices (1 KB each, from registers, shared memory or L2) for kTiles tiles of 8 chains, whose bits take one wavefront. Each unit also
// takes a random byte and an interval, and a sixteenth of a Philox counter.
// Computes: field_i = sum_j slices_ij z_j, logit_i within beta (field_i 2^(shift - k) + centre_i + bias_i) +- error_i;
// z_i = [word_i < threshold(logit_i)].
template <bool kAnnealed, int kTiles, int kKeptSides, bool kShared>
class BipartiteCta {
  static constexpr int kSlices = kAnnealed ? kMaxSlices : 2;
  static constexpr int kUnits = 4, kChains = 2;  // of a lane
  template <class T>
  using Array = std::conditional_t<kShared, Shared<T>, T*>;
  struct OwnSide {    // what a CTA has of a side
    WordRange words;  // that it updates
    int states_at;    // where the side's words begin among those of both sides
    int resident_at;  // where its blocks begin among those in shared memory
    int bytes_at;     // where the random byte of number 0 would be, in words
  };

 public:
  GIBBS_DEVICE BipartiteCta(const BipartiteBinaryParams& params, SharedMemory& memory)
      : p_(params),
        rank_(int(blockIdx.x) % params.plan.shape.cluster_size),
        model_(int64_t{blockIdx.x} / params.plan.shape.cluster_size / params.clusters_per_model),
        first_(int64_t{blockIdx.x} / params.plan.shape.cluster_size % params.clusters_per_model * chain_slots()),
        own_{{WordRange(side_of(0).words, rank_, params.plan.shape.cluster_size), 0, 0, 0},
             {WordRange(side_of(1).words, rank_, params.plan.shape.cluster_size), side_of(0).words, 0, 0}} {
    if (!kKeptSides) own_[0].resident_at = own(1).words.count() * side_of(0).words;
    if (params.plan.shape.cluster_size > 1) {
      own_[0].bytes_at = -kSpanWords * first_span(0, own(0).words.begin);
      own_[1].bytes_at = kSpanWords * (spans_of(0) - first_span(1, own(1).words.begin));
    }
    const int64_t left_over = params.sweep.batch.chains_per_model - first_;
    num_chains_ = left_over < chain_slots() ? int(left_over) : chain_slots();
    slices_ = params.packed.slices + model_ * params.packed.num_blocks * block_fragments(kSlices);
    scale_ = params.packed.scales[model_];
    // Arrays of constant size come first, so that their places are constants.
    open_logits_ = memory.take<uint32_t>(kBytes);
    numbers_ = memory.take<uint64_t>(kMaxBipartiteTiles * kTileChains);
    open_units_ = OpenUnits(memory);
    if constexpr (kShared) {
      states_ = memory.take<uint32_t>(params.arrays.states);
      terms_ = memory.take<double>(params.arrays.terms);
    } else {
      states_ = reinterpret_cast<uint32_t*>(params.in_device + int64_t{blockIdx.x} * params.arrays.device_memory());
      terms_ = reinterpret_cast<double*>(reinterpret_cast<unsigned char*>(states_) + shared_bytes<uint32_t>(params.arrays.states));
    }
    state_bytes_ = byte_view(states_);
    bytes_ = memory.take<uint32_t>(params.arrays.bytes);
    resident_ = memory.take<LeftFragment>(params.arrays.resident);
  }

  GIBBS_DEVICE void run() {
    const SweepView& s = p_.sweep;
    tabulate_open_logits<false>(open_logits_);
    for (int c = int(threadIdx.x); c < num_chains_; c += int(blockDim.x)) numbers_[c] = p_.packed.numbers[row(c)];
    open_units_.clear();
    load_states(0);
    load_states(1);
    load_slices();
    barrier();  // all arrays are filled
    double log_weight = 0;
    for (int64_t sweep = 0; sweep < s.num_sweeps; ++sweep) {
      ahead_ = p_.plan.sweeps_ahead ? int(sweep % p_.plan.sweeps_ahead) : 0;
      if (ahead_ == 0 && p_.plan.sweeps_ahead) {
        draw_bytes(sweep);
        __syncthreads();  // the bytes are there
      }
      const float beta = float(beta_at(s, sweep + kAnnealed)), last_beta = kAnnealed ? float(beta_at(s, sweep)) : beta;
      const ModelBounds bounds(beta, kAnnealed ? 0 : scale_.shift, scale_.scale, 0);
      if (kAnnealed) weigh_left();
#pragma unroll 1
      for (int side = 2; side-- > 0;) {  // right first
        half_sweep(side, sweep, bounds, last_beta);
        if (kAnnealed && side == 1) log_weight += weight_of_chain(beta_at(s, sweep), beta_at(s, sweep + 1));
      }
    }
    store_states(0);
    store_states(1);
    if (kAnnealed && int(threadIdx.x) < num_chains_)
      p_.log_weights[linear_number(s.batch, model_, first_ + threadIdx.x)] = log_weight;
  }

 private:
  GIBBS_DEVICE static int lane() { return int(threadIdx.x) % kWarpSize; }
  GIBBS_DEVICE static int group() { return lane() / 4; }           // g of bipartite_slices.h
  GIBBS_DEVICE static int place_in_group() { return lane() % 4; }  // t
  GIBBS_DEVICE static int warp() { return int(threadIdx.x) / kWarpSize; }
  GIBBS_DEVICE static int num_warps() { return int(blockDim.x) / kWarpSize; }
  GIBBS_DEVICE int chain_slots() const { return p_.plan.tiles * kTileChains; }
  GIBBS_DEVICE int64_t row(int chain) const { return model_ * p_.sweep.batch.chains_per_model + first_ + chain; }
  GIBBS_DEVICE const BipartiteSide& side_of(int side) const { return p_.packed.sides[side]; }
  // A selection, because an array with an index known only at run time would lie in local memory.
  GIBBS_DEVICE OwnSide own(int side) const { return side ? own_[1] : own_[0]; }
  // Spans of random bytes of a side of a cluster's CTA: the first one, and their number.
  GIBBS_DEVICE int first_span(int side, int word, int up = 0) const {
    return int(side_of(side).first_number + uint32_t(word * kWarpSize + up)) / kSpanUnits;
  }
  GIBBS_DEVICE int spans_of(int side) const {
    return first_span(side, own(side).words.end, kSpanUnits - 1) - first_span(side, own(side).words.begin);
  }

  GIBBS_DEVICE void barrier() const {
    if (p_.plan.shape.cluster_size > 1)
      sync_cluster();
    else
      __syncthreads();
  }

  // ---- before and after ----

  GIBBS_DEVICE void load_states(int side) const {
    const int words = side_of(side).words, at = own(side).states_at * chain_slots();
    for (int item = int(threadIdx.x); item < words * chain_slots(); item += int(blockDim.x)) {
      const int word = item / chain_slots(), chain = item % chain_slots();
      states_[at + item] = chain < num_chains_ ? side_of(side).bits[row(chain) * words + word] : 0;
    }
  }
  GIBBS_DEVICE void store_states(int side) const {
    const OwnSide of = own(side);
    for (int item = int(threadIdx.x); item < of.words.count() * num_chains_; item += int(blockDim.x)) {
      const int word = of.words.begin + item % of.words.count(), chain = item / of.words.count();
      side_of(side).bits[row(chain) * side_of(side).words + word] = states_[(of.states_at + word) * chain_slots() + chain];
    }
  }
  GIBBS_DEVICE void load_slices() {
    if constexpr (kKeptSides == 2) keep(0, kept_[0]);
    if constexpr (kKeptSides != 0) keep(1, kept_[kKeptSides - 1]);
    if constexpr (kKeptSides == 0) load_resident(1);
    if constexpr (kKeptSides != 2) load_resident(0);
  }
  GIBBS_DEVICE void load_resident(int side) const {
    const OwnSide of = own(side);
    const int64_t per_word = side_of(1 - side).words * block_fragments(kSlices), begin = of.resident_at * block_fragments(kSlices),
                  all = p_.plan.resident * block_fragments(kSlices) - begin,
                  count = all < of.words.count() * per_word ? all : of.words.count() * per_word;
    const LeftFragment* const from = slices_ + side_of(side).blocks_at * block_fragments(kSlices) + of.words.begin * per_word;
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) resident_[begin + i] = global_load(from + i);
  }
  static constexpr int kKeptWords = kept_words(kKeptSides);
  struct Kept {
    LeftFragment of[kKeptWords][kSlices][kFragments];
  };
  GIBBS_DEVICE static bool is_kept(int side) { return kKeptSides == 2 || (kKeptSides == 1 && side == 1); }
  // Warp w keeps word w.
  GIBBS_DEVICE void keep(int side, Kept& kept) const {
    if (warp() >= side_of(side).words) return;
#pragma unroll
    for (int block = 0; block < kKeptWords; ++block) {
      if (block >= side_of(1 - side).words) break;
#pragma unroll
      for (int s = 0; s < kSlices; ++s)
#pragma unroll
        for (int m = 0; m < kFragments; ++m)
          kept.of[block][s][m] = global_load(block_of(side, warp(), block) + (s * kFragments + m) * kWarpSize + lane());
    }
  }
  GIBBS_DEVICE const LeftFragment* block_of(int side, int word, int block) const {
    return slices_ + (side_of(side).blocks_at + int64_t{word} * side_of(1 - side).words + block) * block_fragments(kSlices);
  }

  GIBBS_DEVICE RandomStream stream(int chain, int64_t sweep) const {
    return random_stream(seed_of(p_.sweep), numbers_[chain], uint64_t(p_.sweep.sweep_offset + sweep));
  }
  // Draws the random bytes of `sweep` and of as many later sweeps as there is room for.
  GIBBS_DEVICE void draw_bytes(int64_t sweep) const {
    const int64_t left_over = p_.sweep.num_sweeps - sweep;
    const int sweeps = left_over < p_.plan.sweeps_ahead ? int(left_over) : p_.plan.sweeps_ahead;
    const bool is_cluster = p_.plan.shape.cluster_size > 1;
    const int first_spans = is_cluster ? spans_of(0) : num_spans_of_all(side_of(1)),
              counters = kSpanCounters * (first_spans + (is_cluster ? spans_of(1) : 0));
    for (int item = int(threadIdx.x); item < sweeps * num_chains_ * counters; item += int(blockDim.x)) {
      const int of_sweep = item / counters, counter = item % counters, chain = of_sweep % num_chains_,
                ahead = of_sweep / num_chains_;
      const int bytes_at = counter < kSpanCounters * first_spans ? own(0).bytes_at : own(1).bytes_at;
      store_random_bytes(stream(chain, sweep + ahead), counter - bytes_at / kSpanWords * kSpanCounters, bytes_,
                         (ahead * chain_slots() + chain) * p_.arrays.byte_stride + bytes_at);
    }
  }
  // The bytes of four neighbouring numbers.
  GIBBS_DEVICE uint32_t random_bytes(int bytes_at, uint32_t number, int chain, int64_t sweep) const {
    if (chain >= num_chains_) return 0;
    if (p_.plan.sweeps_ahead) return bytes_[(ahead_ * chain_slots() + chain) * p_.arrays.byte_stride + bytes_at + int(number / 4)];
    return draw_high_bytes(stream(chain, sweep), number / 4);
  }
  GIBBS_DEVICE int64_t bias_row(int chain) const {
    return p_.packed.bias_per_chain ? row(chain < num_chains_ ? chain : 0) : model_;
  }
  GIBBS_DEVICE UnitBounds unit_bounds(int side, const ModelBounds& bounds, int position, int chain) const {
    const int width = side_of(side).words * kWarpSize;
    const int64_t at = bias_row(chain) * width + position;
    return {bounds, global_load(side_of(side).bias + at), kAnnealed ? global_load(side_of(side).base_bias + at) : 0.0f,
            global_load(side_of(side).field_errors + model_ * width + position)};
  }

  GIBBS_DEVICE void load_bounds(int side, const ModelBounds& bounds, int word, int chain, UnitBounds (&of)[kUnits]) const {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) of[i] = unit_bounds(side, bounds, word * kWarpSize + kUnits * group() + i, chain);
  }

  // ---- products ----

  // Adds to the sums of a word of a side, of tiles first .. first + kTiles - 1.
  GIBBS_DEVICE void multiply(int side, int word, int first_tile, int32_t (&sums)[kTiles][kFragments][kSlices][4]) const {
    const int blocks = side_of(1 - side).words, from = own(1 - side).states_at * chain_slots() + first_tile * kTileChains + group(),
              shift = 8 * place_in_group();
    const auto add = [&](int block, const LeftFragment(&left)[kSlices][kFragments]) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const uint32_t bits = states_[from + block * chain_slots() + n * kTileChains] >> shift;
        // Copies of a half byte, 7 bits apart, have its bits at 0, 8, 16 and 24.
        const RightFragment right = {{(bits & 0xf) * 0x204081 & 0x01010101, (bits >> 4 & 0xf) * 0x204081 & 0x01010101}};
#pragma unroll
        for (int m = 0; m < kFragments; ++m)
#pragma unroll
          for (int s = 0; s < kSlices; ++s) multiply_add(sums[n][m][s], left[s][m], right);
      }
    };
    const auto add_kept = [&](const Kept& kept) {
#pragma unroll
      for (int block = 0; block < kKeptWords; ++block) {
        if (block >= blocks) break;
        add(block, kept.of[block]);
      }
    };
    if constexpr (kKeptSides == 2)
      side ? add_kept(kept_[1]) : add_kept(kept_[0]);
    else if (is_kept(side))
      add_kept(kept_[0]);
    if constexpr (kKeptSides != 2) {
      if (is_kept(side)) return;
      const OwnSide of = own(side);
      const int64_t begin = of.resident_at + int64_t{word - of.words.begin} * blocks, left_over = p_.plan.resident - begin;
      const int num_resident = left_over < 0 ? 0 : left_over < blocks ? int(left_over) : blocks;
      LeftFragment left[kSlices][kFragments];
      const auto load = [&](const auto& fragment_at) {
#pragma unroll
        for (int s = 0; s < kSlices; ++s)
#pragma unroll
          for (int m = 0; m < kFragments; ++m) left[s][m] = fragment_at((s * kFragments + m) * kWarpSize + lane());
      };
      for (int block = 0; block < num_resident; ++block) {
        load([&](int at) { return resident_[(begin + block) * block_fragments(kSlices) + at]; });
        add(block, left);
      }
#pragma unroll 2
      for (int block = num_resident; block < blocks; ++block) {
        load([&](int at) { return global_load(block_of(side, word, block) + at); });
        add(block, left);
      }
    }
  }

  // ---- updates by bounds ----

  GIBBS_DEVICE void half_sweep(int side, int64_t sweep, const ModelBounds& bounds, float last_beta) {
    const OwnSide of = own(side);
    const int groups = (num_chains_ + kTiles * kTileChains - 1) / (kTiles * kTileChains);
    bool notes = false;
    // A warp has the words that it keeps.
    const int all = of.words.count() * groups, begin = is_kept(side) ? warp() * groups : warp(),
              end = is_kept(side) && begin + groups < all ? begin + groups : all;
    for (int item = begin; item < end; item += is_kept(side) ? 1 : num_warps()) {
      const int word = of.words.begin + item / groups, first_tile = item % groups * kTiles;
      int32_t sums[kTiles][kFragments][kSlices][4] = {};
      multiply(side, word, first_tile, sums);
      UnitBounds units[kUnits];
      load_bounds(side, bounds, word, 0, units);
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
        notes |= decide(side, of, word, (first_tile + n) * kTileChains, sums[n], units, sweep, bounds, last_beta);
    }
    if (__syncthreads_or(notes)) {  // the side is whole, but for its open units
      close(side, sweep, bounds);
      __syncthreads();  // the CTA's words are whole
      open_units_.next();
    }
    if (p_.plan.shape.cluster_size > 1) {
      publish(side);
      sync_cluster();  // all words are whole, everywhere
    }
  }

  // Decides the units of a word in chains first .. first + 7. Returns whether the thread has noted one that is open.
  GIBBS_DEVICE bool decide(int side, const OwnSide& of, int word, int first_chain, const int32_t (&sums)[kFragments][kSlices][4],
                           UnitBounds (&bounds_of)[kUnits], int64_t sweep, const ModelBounds& bounds, float last_beta) {
    const BipartiteSide& to = side_of(side);
    const int position = word * kWarpSize + kUnits * group(), chain = first_chain + kChains * place_in_group(),
              at = (of.states_at + word) * chain_slots() + chain;
    int32_t fields[kChains][kUnits];
#pragma unroll
    for (int c = 0; c < kChains; ++c)
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        uint32_t field = 0;
#pragma unroll
        for (int s = kSlices; s-- > 0;) field = field * 256 + uint32_t(sums[i / 2][s][2 * (i % 2) + c]);
        fields[c][i] = int32_t(field);
      }
    if (kAnnealed && side == 1) weigh_right(of, word, chain, fields, last_beta, bounds.beta);
    uint32_t units = 0;  // that there are
#pragma unroll
    for (int i = 0; i < kUnits; ++i) units |= uint32_t(position + i >= to.offset && position + i < to.offset + to.n) << i;
    const uint32_t mask = (chain < num_chains_ ? units : 0) | (chain + 1 < num_chains_ ? units << kUnits : 0);
    Decided decided;
#pragma unroll
    for (int c = kChains; c-- > 0;) {
      if (first_chain + c >= num_chains_) continue;  // so do all lanes, and nobody looks at what becomes of these chains
      const uint32_t bytes = random_bytes(of.bytes_at, to.first_number + uint32_t(position), chain + c, sweep);
      if (p_.packed.bias_per_chain) load_bounds(side, bounds, word, chain + c, bounds_of);
#pragma unroll
      for (int i = kUnits; i-- > 0;) {
        const UnitBounds& unit = bounds_of[i];
        const auto sum = float(fields[c][i]);
        decided.add(open_logits_[bytes >> (8 * i) & 0xff], unit.slope * sum + unit.low, unit.slope * sum + unit.high);
      }
    }
    uint32_t old = 0, fixed = 0;
    if (to.clamps) {
#pragma unroll
      for (int c = 0; c < kChains; ++c) {
        if (chain + c >= num_chains_) continue;
        const int shift = kUnits * group();
        old |= (states_[at + c] >> shift & 0xf) << (kUnits * c);
        fixed |= (to.clamps[row(chain + c) * to.words + word] >> shift & 0xf) << (kUnits * c);
      }
    }
    const uint32_t open = decided.open() & ~fixed & mask;
    write(at, ((old & fixed) | (~decided.is_not_one & ~fixed)) & mask);
    if (open) note(side, position, chain, open, fields, sweep, bounds);
    return open != 0;
  }
  // Two lanes with neighbouring units put a byte together for each of their chains, and each writes one.
  GIBBS_DEVICE void write(int at, uint32_t bits) const {
    const uint32_t others = __shfl_xor_sync(kFullWarp, bits, 4);
    const bool is_odd = group() & 1;
    const uint32_t byte = is_odd ? others >> 4 | (bits & 0xf0) : (bits & 0xf) | (others & 0xf) << 4;
    state_bytes_[int64_t{4} * (at + is_odd) + group() / 2] = uint8_t(byte);
    __syncwarp();  // the bits are there before any of them is set
  }

  // ---- open units ----

  // Notes open ones of a lane's units, whose bits are 0 until they are decided.
  GIBBS_DEVICE void note(int side, int position, int chain, uint32_t open, const int32_t (&fields)[kChains][kUnits], int64_t sweep,
                         const ModelBounds& bounds) const {
    uint32_t at = open_units_.reserve(__popc(open)), left = 0;
#pragma unroll
    for (int c = 0; c < kChains; ++c)
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        if (!(open >> (kUnits * c + i) & 1)) continue;
        if (!open_units_.note(at++, {position + i, chain + c, fields[c][i]})) left |= 1u << (kUnits * c + i);
      }
    for (; left; left &= left - 1) {  // there is no room for these
      const int which = __ffs(int(left)) - 1, of_unit = position + which % kUnits, of_chain = chain + which / kUnits;
      int32_t field = 0;
#pragma unroll
      for (int k = 0; k < kChains * kUnits; ++k) field = k == which ? fields[k / kUnits][k % kUnits] : field;
      const uint32_t word = random_word_of(side, of_unit, of_chain, sweep);
      auto below = is_below_by_bounds(side, of_unit, of_chain, field, word, bounds);
      if (below == IsBelow::kOpen) {
        const int32_t exact = kAnnealed ? field : int32_t(partial_field(side, of_unit, of_chain, ~0u));
        if (word < threshold(exact_logit(side, exact, of_unit, of_chain, bounds.beta))) below = IsBelow::kYes;
      }
      if (below == IsBelow::kYes) set_bit(side, of_unit, of_chain);
    }
  }
  GIBBS_DEVICE void close(int side, int64_t sweep, const ModelBounds& bounds) const {
    const uint32_t count = open_units_.take_up();
    for (uint32_t first = uint32_t(warp()) * kWarpSize; first < count; first += blockDim.x) {
      const uint32_t at = first + uint32_t(lane());
      OpenUnits::Unit unit = {};
      uint32_t word = 0;
      auto below = IsBelow::kNo;
      if (at < count) {
        unit = open_units_[at];
        word = random_word_of(side, unit.position, unit.chain, sweep);
        below = is_below_by_bounds(side, unit.position, unit.chain, unit.field, word, bounds);
      }
      for (uint32_t open = __ballot_sync(kFullWarp, below == IsBelow::kOpen); open; open &= open - 1) {
        const int of = __ffs(int(open)) - 1;
        const int position = __shfl_sync(kFullWarp, unit.position, of), chain = __shfl_sync(kFullWarp, unit.chain, of);
        const int32_t exact = kAnnealed ? unit.field : int32_t(warp_sum(partial_field(side, position, chain, 1u << lane())));
        if (lane() == of && word < threshold(exact_logit(side, exact, position, chain, bounds.beta))) below = IsBelow::kYes;
      }
      if (below == IsBelow::kYes) set_bit(side, unit.position, unit.chain);
    }
  }
  GIBBS_DEVICE IsBelow is_below_by_bounds(int side, int position, int chain, int32_t field, uint32_t word,
                                          const ModelBounds& bounds) const {
    const UnitBounds unit = unit_bounds(side, bounds, position, chain);
    const auto sum = float(field);
    return is_below<false>(word, unit.slope * sum + unit.low, unit.slope * sum + unit.high);
  }
  GIBBS_DEVICE uint32_t random_word_of(int side, int position, int chain, int64_t sweep) const {
    const uint32_t number = side_of(side).first_number + uint32_t(position);
    const uint32_t bytes = random_bytes(own(side).bytes_at, number & ~3u, chain, sweep);
    return (bytes >> (8 * (number % 4)) & 0xff) << 24 | draw_low_bits(stream(chain, sweep), number);
  }
  GIBBS_DEVICE void set_bit(int side, int position, int chain) const {
    atomicOr(&states_[(own(side).states_at + position / kWarpSize) * chain_slots() + chain], 1u << (position % kWarpSize));
  }

  // ---- exact fields ----

  // The field's integer, as far as those bits of the other side's words go that are in the mask. Couplings for which a fault has been reported
  // may overflow.
  GIBBS_DEVICE uint32_t partial_field(int side, int position, int chain, uint32_t mask) const {
    const BipartiteSide &to = side_of(side), &from = side_of(1 - side);
    const void* weight = parameter_row(p_.weight, p_.sweep.batch, p_.is_double, model_, 0);
    const int unit = position - to.offset, at = own(1 - side).states_at * chain_slots() + chain;
    uint32_t sum = 0;
    for (int word = 0; word < from.words; ++word)
      for (uint32_t bits = states_[at + word * chain_slots()] & mask; bits; bits &= bits - 1) {
        const int other = word * kWarpSize + __ffs(int(bits)) - 1 - from.offset;
        sum += uint32_t(coupling_at(p_.weight, weight, p_.is_double, scale_.k, side == 0 ? unit : other, side == 0 ? other : unit));
      }
    return sum;
  }
  GIBBS_DEVICE float exact_logit(int side, int32_t field, int position, int chain, float beta) const {
    const int64_t at = bias_row(chain) * side_of(side).words * kWarpSize + position;
    return kAnnealed ? annealed_logit(field, scale_.scale, side_of(side).bias[at], side_of(side).base_bias[at], beta)
                     : binary_logit(field, scale_.scale, side_of(side).bias[at], beta);
  }

  // ---- clusters ----

  GIBBS_DEVICE void publish(int side) const {
    const OwnSide of = own(side);
    const int begin = (of.states_at + of.words.begin) * chain_slots(), count = of.words.count() * chain_slots();
    for (int item = int(threadIdx.x); item < (p_.plan.shape.cluster_size - 1) * count; item += int(blockDim.x)) {
      const int other = item / count;
      if constexpr (kShared)
        cluster_array(states_, unsigned(other + (other >= rank_)))[begin + item % count] = states_[begin + item % count];
    }
  }

  // ---- annealing ----

  // What right units of a word, which are summed out, add to log f_beta - log f_last_beta of chains `chain` and `chain` + 1.
  GIBBS_DEVICE void weigh_right(const OwnSide& of, int word, int chain, const int32_t (&fields)[kChains][kUnits], float last_beta,
                                float beta) const {
    const BipartiteSide& right = side_of(1);
#pragma unroll
    for (int c = 0; c < kChains; ++c) {
      double term = 0;
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        const int position = word * kWarpSize + kUnits * group() + i;
        if (position < right.offset || position >= right.offset + right.n || chain + c >= num_chains_) continue;
        term += double(softplus_difference(exact_logit(1, fields[c][i], position, chain + c, last_beta),
                                           exact_logit(1, fields[c][i], position, chain + c, beta)));
      }
      store_term(of.states_at + word, chain + c, term);
    }
  }
  // The same for left units, without the factor of the betas' difference.
  GIBBS_DEVICE void weigh_left() const {
    const OwnSide of = own(0);
    const BipartiteSide& left = side_of(0);
    for (int item = warp(); item < of.words.count() * p_.plan.tiles; item += num_warps()) {
      const int word = of.words.begin + item / p_.plan.tiles,
                chain = item % p_.plan.tiles * kTileChains + kChains * place_in_group();
#pragma unroll
      for (int c = 0; c < kChains; ++c) {
        double term = 0;
        if (chain + c < num_chains_) {
          const uint32_t bits = states_[(of.states_at + word) * chain_slots() + chain + c] >> (kUnits * group());
          const int64_t at = (bias_row(chain + c) * left.words + word) * kWarpSize + kUnits * group();
#pragma unroll
          for (int i = 0; i < kUnits; ++i)
            if (bits >> i & 1) term += double(left.bias[at + i]) - double(left.base_bias[at + i]);
        }
        store_term(of.states_at + word, chain + c, term);
      }
    }
  }
  GIBBS_DEVICE void store_term(int word, int chain, double term) const {
    for (int step = 4; step < kWarpSize; step *= 2) term += __shfl_xor_sync(kFullWarp, term, step);
    if (group() == 0) terms_[word * chain_slots() + chain] = term;
  }
  // The order is the same for any number of threads.
  GIBBS_DEVICE double weight_of_chain(double last_beta, double beta) const {
    const auto chain = int(threadIdx.x);
    if (chain >= num_chains_) return 0;
    double summed_out = 0, linear = 0;
    for (int word = 0; word < side_of(0).words; ++word) linear += terms_[word * chain_slots() + chain];
    for (int word = 0; word < side_of(1).words; ++word) summed_out += terms_[(side_of(0).words + word) * chain_slots() + chain];
    return summed_out + (beta - last_beta) * linear;
  }

  const BipartiteBinaryParams& p_;
  const int rank_;
  const int64_t model_, first_;  // chain of the model
  OwnSide own_[2];
  int num_chains_, ahead_ = 0;
  ModelScale scale_;
  const LeftFragment* slices_;
  OpenUnits open_units_;
  Shared<uint32_t> open_logits_, bytes_;
  Array<uint32_t> states_;
  Array<uint8_t> state_bytes_;
  Array<double> terms_;
  Shared<uint64_t> numbers_;
  Shared<LeftFragment> resident_;
  Kept kept_[kKeptSides == 0 ? 1 : kKeptSides];  // right's is the last
};

template <bool kAnnealed, int kTiles, int kKeptSides, bool kShared>
__global__ void __launch_bounds__(most_threads(kAnnealed, kKeptSides), 1)
    bipartite_kernel(const __grid_constant__ BipartiteBinaryParams params) {
  GIBBS_DYNAMIC_SHARED(shared);
  SharedMemory memory(shared);
  BipartiteCta<kAnnealed, kTiles, kKeptSides, kShared> cta(params, memory);
  cta.run();
}

#endif

}  // namespace gibbs
