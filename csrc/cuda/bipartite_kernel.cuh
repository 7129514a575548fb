// SPDX-License-Identifier: Apache-2.0
#pragma once

// Binary sweeps of bipartite models. twin: csrc/cpu/kernels/bipartite.h
//
// Fields are products of matrices on tensor cores: couplings in two slices of signed bytes times bits, for tiles of 8 chains. A warp takes a word's
// 32 units of one or two tiles, or 16 units of four or eight, for which slices are read less often. A lane gets the fields of pairs of units, and
// decides them by bounds (bounds.cuh). The few units that stay open are noted, and taken up when the side is done, by as many threads as there are
// of them. Log-weights need exact fields; their calls have four slices.
#include "cuda/bipartite_slices.h"
#include "cuda/cluster.cuh"

#include <type_traits>

namespace gibbs {

constexpr int kBipartiteThreads = 384;                             // at most
constexpr int kTileChains = 8;                                     // chains of a product
constexpr int kBundle = 4, kBundleChains = kBundle * kTileChains;  // tiles whose bits may lie together
constexpr int kMostTilesOfWarp = 2 * kBundle;
constexpr int kMaxBipartiteTiles = 16;  // of a CTA
constexpr int kMaxSweepsAhead = 8;      // at most this many sweeps' random bytes are drawn at once

// Slices of both sides (kept_sides = 2), or of right's updates (1), may lie in registers: of a side with at most this many words, with a warp for each.
GIBBS_HOST_DEVICE constexpr int kept_words(int kept_sides) { return kept_sides == 2 ? 4 : 8; }
// Four slices take many registers, and so do sums of eight tiles.
GIBBS_HOST_DEVICE constexpr int most_threads(bool is_annealed, int tiles_per_warp, int kept_sides) {
  return kept_sides                                          ? kept_words(kept_sides) * kWarpSize
         : is_annealed || tiles_per_warp == kMostTilesOfWarp ? 256
                                                             : kBipartiteThreads;
}

static_assert(kMaxBipartiteTiles * kTileChains <= 256, "a note of an open unit has 8 bits for its chain");

// Copies of the table of bounds, for which there is more room if slices lie in registers.
GIBBS_HOST_DEVICE constexpr int logit_copies(int kept_sides) { return kept_sides ? 32 : 1; }

// The words of a side that a CTA of a cluster updates.
struct WordRange {
  int begin, end;
  GIBBS_HOST_DEVICE WordRange(int words, int rank, int cluster_size)
      : begin(int(int64_t{words} * rank / cluster_size)), end(int(int64_t{words} * (rank + 1) / cluster_size)) {}
  GIBBS_HOST_DEVICE int count() const { return end - begin; }
};
// The most that any CTA has.
GIBBS_HOST_DEVICE int most_words(int words, int cluster_size) { return int(divide_up(words, cluster_size)); }

// A CTA of a cluster has random bytes for its own words of each side, any other CTA for all units. They come as words of four units.
constexpr int kByteWords = kWarpSize / 4;
GIBBS_HOST_DEVICE int all_byte_words(const BipartiteSide& right) { return int(right.first_number / 4) + kByteWords * right.words; }

// A CTA's arrays.
struct BipartiteLayout {
  bool is_shared;  // states and terms are in shared memory, else in device memory
  int64_t states, terms, resident, bytes;
  int copies;           // of the table of bounds
  int32_t byte_stride;  // of a chain, in words; 4 modulo 16, so that words of chains 2 t are in different banks
  GIBBS_HOST_DEVICE BipartiteLayout(const BipartitePacked& packed, const BipartitePlan& plan)
      : is_shared(plan.route != BipartiteRoute::kAllGlobal),
        states(int64_t{packed.sides[0].words + packed.sides[1].words} * plan.tiles * kTileChains),
        terms(packed.num_slices == kMaxSlices ? states : 0),
        resident(plan.resident * block_fragments(packed.num_slices)),
        copies(logit_copies(plan.kept_sides)) {
    const BipartiteSide &left = packed.sides[0], &right = packed.sides[1];
    const int size = plan.shape.cluster_size;
    const int words =
        size > 1 ? kByteWords * (most_words(left.words, size) + most_words(right.words, size)) : all_byte_words(right);
    byte_stride = int(round_up(words - 4, 16)) + 4;
    bytes = int64_t{plan.sweeps_ahead} * plan.tiles * kTileChains * byte_stride;
  }
  GIBBS_HOST_DEVICE int64_t shared_memory() const {
    return open_logits_bytes(copies) + shared_bytes<uint64_t>(kMaxBipartiteTiles * kTileChains) + open_units_bytes() +
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

// A CTA, or a cluster of them, has up to 128 chains of one model at a time, for all sweeps, and then others of that model. In a cluster, each CTA
// updates some words of both sides.
// Shared memory: the interval of logits that each random byte leaves open, both sides' bits [word, chain], random bytes of some sweeps
// [sweep, chain, unit], the units of a half sweep that are still open, and as many blocks of slices as there is room for, unless they lie in
// registers. Bits that do not fit lie in device memory; random bytes that do not fit are drawn alone.
// Synchronisation: one barrier a half sweep, between the bits that it writes and the products that read them; one more if units are open, or if
// random bytes are drawn; two between chains and the next ones. In a cluster, a CTA's own words are copied to the other CTAs after the first barrier,
// before one of the cluster.
// Traffic: a block's slices (1 KB each, from registers, shared memory or L2) for kTiles tiles of 8 chains. Bits take a wavefront a tile or, interleaved,
// one for four tiles and half a word. Each unit also takes a random byte and an interval, and a sixteenth of a Philox counter.
// Computes: field_i = sum_j slices_ij z_j, logit_i within beta (field_i 2^(shift - k) + centre_i + bias_i) +- error_i;
// z_i = [word_i < threshold(logit_i)].
template <bool kAnnealed, int kTiles, int kKeptSides, bool kShared>
class BipartiteCta {
  static constexpr int kSlices = kAnnealed ? kMaxSlices : 2;
  // Bits of four tiles are interleaved (the plan has four tiles or more then): word 4 g + t of a word of units has bits 8 i + 2 t + r of chains g of
  // these tiles n, at 8 i + 2 n + r. So a lane reads the bits that it multiplies, and writes those that it decides as bytes.
  static constexpr bool kInterleaved = kTiles >= kBundle;
  static constexpr int kItemFragments = kInterleaved ? 1 : kFragments;  // of an item of a warp's work
  static_assert(!kInterleaved || kKeptSides == 0);
  static_assert(!kAnnealed || kTiles == 1, "weigh_right() takes the pairs of one tile");
  static constexpr int kPairs = 4;  // of units, which a lane decides together
  static constexpr int kLogitCopies = logit_copies(kKeptSides);
  template <class T>
  using Array = std::conditional_t<kShared, Shared<T>, T*>;
  struct OwnSide {    // what a CTA has of a side
    WordRange words;  // that it updates
    int states_at;    // where the side's words begin among those of both sides
    int resident_at;  // where its blocks begin among those in shared memory
    int bytes_at;     // where the random byte of number 0 would be, in words
  };
  struct Sums {
    int32_t of[kTiles][kItemFragments][kSlices][4];
  };
  // Two neighbouring units, which the lane decides for one chain.
  struct Pair {
    int first_chain, fragment;  // the chain of the group's first lane
    UnitBounds* units;
    int32_t fields[2];
    GIBBS_DEVICE int chain() const { return first_chain + 2 * place_in_group(); }
  };

 public:
  GIBBS_DEVICE explicit BipartiteCta(const BipartiteBinaryParams& params)
      : p_(params),
        rank_(int(blockIdx.x) % params.plan.shape.cluster_size),
        model_(int64_t{blockIdx.x} / params.plan.shape.cluster_size / params.clusters_per_model),
        own_{{WordRange(side_of(0).words, rank_, params.plan.shape.cluster_size), 0, 0, 0},
             {WordRange(side_of(1).words, rank_, params.plan.shape.cluster_size), side_of(0).words, 0, 0}} {
    if (!kKeptSides) own_[0].resident_at = own(1).words.count() * side_of(0).words;
    if (is_cluster()) {
      own_[0].bytes_at = -byte_run(0).begin;
      own_[1].bytes_at = byte_run(0).end - byte_run(0).begin - byte_run(1).begin;
    }
    slices_ = params.packed.slices + model_ * params.packed.num_blocks * block_fragments(kSlices);
    scale_ = params.packed.scales[model_];
    SharedMemory memory;
    // Arrays of constant size come first, so that their places are constants.
    open_logits_ = OpenLogits<kLogitCopies>(memory);
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
    open_logits_.template tabulate<false>();
    open_units_.clear();
    load_slices();
    const int64_t begin = int64_t{blockIdx.x} / p_.plan.shape.cluster_size % p_.clusters_per_model;
    for (first_ = begin * chain_slots(); first_ < p_.sweep.batch.chains_per_model;
         first_ += int64_t{p_.clusters_per_model} * chain_slots()) {
      sweep_chains();
      __syncthreads();  // states are stored, and others may be loaded
    }
  }

 private:
  GIBBS_DEVICE void sweep_chains() {
    const SweepView& s = p_.sweep;
    const int64_t left_over = s.batch.chains_per_model - first_;
    num_chains_ = left_over < chain_slots() ? int(left_over) : chain_slots();
    for (int c = int(threadIdx.x); c < num_chains_; c += int(blockDim.x)) numbers_[c] = p_.packed.numbers[row(c)];
    load_states(0);
    load_states(1);
    barrier();  // all arrays are filled
    double log_weight = 0;
    for (int64_t sweep = 0; sweep < s.num_sweeps; ++sweep) {
      if (p_.plan.sweeps_ahead && (sweep == 0 || ++ahead_ == p_.plan.sweeps_ahead)) {
        ahead_ = 0;
        draw_bytes(sweep);
        __syncthreads();  // the bytes are there
      }
      const float beta = float(beta_at(s, model_, sweep + kAnnealed)),
                  last_beta = kAnnealed ? float(beta_at(s, model_, sweep)) : beta;
      const ModelBounds bounds(beta, kAnnealed ? 0 : scale_.shift, scale_.scale, 0);
      if (kAnnealed) weigh_left();
#pragma unroll 1
      for (int side = 2; side-- > 0;) {  // right first
        half_sweep(side, sweep, bounds, last_beta);
        if (kAnnealed && side == 1) log_weight += weight_of_chain(beta_at(s, model_, sweep), beta_at(s, model_, sweep + 1));
      }
    }
    store_states(0);
    store_states(1);
    if (kAnnealed && int(threadIdx.x) < num_chains_)
      p_.log_weights[linear_number(s.batch, model_, first_ + threadIdx.x)] = log_weight;
  }

  GIBBS_DEVICE static int group() { return lane() / 4; }           // g of bipartite_slices.h
  GIBBS_DEVICE static int place_in_group() { return lane() % 4; }  // t
  GIBBS_DEVICE int chain_slots() const { return p_.plan.tiles * kTileChains; }
  GIBBS_DEVICE int64_t row(int chain) const { return model_ * p_.sweep.batch.chains_per_model + first_ + chain; }
  GIBBS_DEVICE const BipartiteSide& side_of(int side) const { return p_.packed.sides[side]; }
  // A selection, because an array with an index known only at run time would lie in local memory.
  GIBBS_DEVICE OwnSide own(int side) const { return side ? own_[1] : own_[0]; }
  GIBBS_DEVICE bool is_cluster() const { return p_.plan.shape.cluster_size > 1; }

  // Random bytes that a CTA of a cluster draws for a side, or any other CTA for all units (side 0): words of four units, and the spans with them.
  struct ByteRun {
    int begin, end;
    GIBBS_DEVICE int first_span() const { return begin / kSpanWords; }
    GIBBS_DEVICE int spans() const { return begin == end ? 0 : (end - 1) / kSpanWords + 1 - first_span(); }
  };
  GIBBS_DEVICE ByteRun byte_run(int side) const {
    if (!is_cluster()) return {0, side == 0 ? all_byte_words(side_of(1)) : 0};
    const int first = int(side_of(side).first_number / 4);
    return {first + kByteWords * own(side).words.begin, first + kByteWords * own(side).words.end};
  }

  GIBBS_DEVICE void barrier() const {
    if (is_cluster())
      sync_cluster();
    else
      __syncthreads();
  }

  // ---- before and after ----

  GIBBS_DEVICE void load_states(int side) const {
    const int words = side_of(side).words, at = own(side).states_at * chain_slots();
    for (int item = int(threadIdx.x); item < words * chain_slots(); item += int(blockDim.x)) {
      const int word = item / chain_slots(), slot = item % chain_slots(), in_bundle = slot % kBundleChains;
      const auto bits = [&](int chain) { return chain < num_chains_ ? side_of(side).bits[row(chain) * words + word] : 0; };
      states_[at + item] =
          kInterleaved ? interleaved(in_bundle % 4, [&](int n) { return bits(slot - in_bundle + n * kTileChains + in_bundle / 4); })
                       : bits(slot);
    }
  }
  // Turns four words of a chain each into word k of the four that hold their bits, and back.
  template <class Words>
  GIBBS_DEVICE static uint32_t interleaved(int k, const Words& words) {
    uint32_t of_all = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) of_all |= (words(j) >> (2 * k) & 0x03030303) << (2 * j);
    return of_all;
  }
  // Where interleaved bits of a chain are: slot t of those of a bundle, and the tile in it.
  GIBBS_DEVICE static int slot_of(int chain, int t) {
    return chain / kBundleChains * kBundleChains + 4 * (chain % kTileChains) + t;
  }
  GIBBS_DEVICE static int tile_in_bundle(int chain) { return chain / kTileChains % kBundle; }
  // A word of a chain; `word` counts through both sides' words.
  GIBBS_DEVICE uint32_t state_word(int word, int chain) const {
    const int at = word * chain_slots();
    if constexpr (kInterleaved)
      return interleaved(tile_in_bundle(chain), [&](int t) { return states_[at + slot_of(chain, t)]; });
    else
      return states_[at + chain];
  }
  GIBBS_DEVICE void store_states(int side) const {
    const OwnSide of = own(side);
    for (int item = int(threadIdx.x); item < of.words.count() * num_chains_; item += int(blockDim.x)) {
      const int word = of.words.begin + item % of.words.count(), chain = item / of.words.count();
      side_of(side).bits[row(chain) * side_of(side).words + word] = state_word(of.states_at + word, chain);
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
    const int first_spans = byte_run(0).spans(), spans = first_spans + byte_run(1).spans();
    const bool has_whole_tiles = num_chains_ % kTileChains == 0;
    for (int item = int(threadIdx.x); item < sweeps * spans * num_chains_ * kSpanCounters; item += int(blockDim.x)) {
      // Eight lanes write words side by side, and the next eight have another chain: rows of even ones are in different banks (byte_stride).
      const int eight = item / kSpanCounters, of_sweep = eight / num_chains_, at = eight % num_chains_,
                chain = has_whole_tiles ? at / 8 * 8 + at % 4 * 2 + at / 4 % 2 : at;
      const int ahead = of_sweep / spans, nth_span = of_sweep % spans, side = nth_span >= first_spans;
      const ByteRun run = byte_run(side);
      const int span = run.first_span() + nth_span - (side ? first_spans : 0),
                counter = kSpanCounters * span + item % kSpanCounters;
      const PhiloxOutput random = random_bytes(stream(chain, sweep + ahead), counter);
      const int64_t of_chain = (ahead * chain_slots() + chain) * p_.arrays.byte_stride + own(side).bytes_at;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int word = int(random_byte_word(counter, w));
        if (run.begin <= word && word < run.end) bytes_[of_chain + word] = random.word[w];
      }
    }
  }
  // The bytes of numbers 4 at ... 4 at + 3 of this sweep.
  GIBBS_DEVICE uint32_t drawn_bytes(int bytes_at, int at, int chain) const {
    return bytes_[(ahead_ * chain_slots() + chain) * p_.arrays.byte_stride + bytes_at + at];
  }
  GIBBS_DEVICE int64_t bias_row(int chain) const {
    return p_.packed.bias_per_chain ? row(chain < num_chains_ ? chain : 0) : model_;
  }
  // What bounds of units are made of, from position 0 of a side on, for one chain.
  struct UnitRow {
    const float *bias, *base_bias;
    const FieldError* errors;
  };
  struct UnitData {
    float bias, base_bias;
    FieldError error;
    GIBBS_DEVICE UnitBounds bounds(const ModelBounds& of_model) const { return {of_model, bias, base_bias, error}; }
  };
  GIBBS_DEVICE UnitRow unit_row(int side, int chain) const {
    const BipartiteSide& of = side_of(side);
    const int64_t width = int64_t{of.words} * kWarpSize, at = bias_row(chain) * width;
    return {of.bias + at, kAnnealed ? of.base_bias + at : nullptr, of.field_errors + model_ * width};
  }
  GIBBS_DEVICE static UnitData load_unit(const UnitRow& of, int position) {
    return {global_load(of.bias + position), kAnnealed ? global_load(of.base_bias + position) : 0.0f,
            global_load(of.errors + position)};
  }
  GIBBS_DEVICE UnitBounds unit_bounds(int side, const ModelBounds& bounds, int position, int chain) const {
    return load_unit(unit_row(side, chain), position).bounds(bounds);
  }
  // A lane's pair of units of a fragment begins at this one of the word.
  GIBBS_DEVICE static int pair_of(int fragment) { return 16 * fragment + 2 * group(); }

  // ---- products ----

  // Adds to the sums of an item of a side: of a word, fragments first_fragment ..., and tiles first_tile ...
  GIBBS_DEVICE void multiply(int side, int word, int first_fragment, int first_tile, Sums& sums) const {
    const int blocks = side_of(1 - side).words, from = own(1 - side).states_at * chain_slots();
    const auto add = [&](int block, const LeftFragment(&left)[kSlices][kItemFragments]) {
      uint32_t bits = 0, next_bits = 0;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int at = from + block * chain_slots() + (first_tile + n) * kTileChains;
        if (!kInterleaved || n % kBundle == 0) {
          bits = kInterleaved ? states_[at + lane()] : states_[at + group()] >> (2 * place_in_group());
          next_bits = bits >> 1;
        }
        const uint32_t mask = 0x01010101u << shift_of(n);
        const RightFragment right = {{bits & mask, next_bits & mask}};
#pragma unroll
        for (int m = 0; m < kItemFragments; ++m)
#pragma unroll
          for (int s = 0; s < kSlices; ++s) multiply_add(sums.of[n][m][s], left[s][m], right);
      }
    };
    const auto add_kept = [&](const auto& kept) {
#pragma unroll
      for (int block = 0; block < kKeptWords; ++block) {
        if (block >= blocks) break;
        add(block, kept.of[block]);
      }
    };
    if constexpr (kKeptSides == 2)
      side ? add_kept(kept_[1]) : add_kept(kept_[0]);
    else if constexpr (kKeptSides == 1)
      if (side == 1) add_kept(kept_[0]);
    if constexpr (kKeptSides != 2) {
      if (is_kept(side)) return;
      const OwnSide of = own(side);
      const int64_t begin = of.resident_at + int64_t{word - of.words.begin} * blocks, left_over = p_.plan.resident - begin;
      const int num_resident = left_over < 0 ? 0 : left_over < blocks ? int(left_over) : blocks;
      LeftFragment left[kSlices][kItemFragments];
      const auto load = [&](const auto& fragment_at) {
#pragma unroll
        for (int s = 0; s < kSlices; ++s)
#pragma unroll
          for (int m = 0; m < kItemFragments; ++m)
            left[s][m] = fragment_at((s * kFragments + first_fragment + m) * kWarpSize + lane());
      };
#pragma unroll(kTiles == 1 ? 4 : 2)
      for (int block = 0; block < num_resident; ++block) {
        load([&](int at) { return resident_[(begin + block) * block_fragments(kSlices) + at]; });
        add(block, left);
      }
      if constexpr (kKeptSides == 0) {  // else all are resident
#pragma unroll 2
        for (int block = num_resident; block < blocks; ++block) {
          load([&](int at) { return global_load(block_of(side, word, block) + at); });
          add(block, left);
        }
      }
    }
  }

  // ---- updates by bounds ----

  GIBBS_DEVICE void half_sweep(int side, int64_t sweep, const ModelBounds& bounds, float last_beta) {
    const OwnSide of = own(side);
    constexpr int kParts = kFragments / kItemFragments;  // of a word
    const int groups = (num_chains_ + kTiles * kTileChains - 1) / (kTiles * kTileChains), items = kParts * groups;
    const UnitRow units_of_side = unit_row(side, 0);
    bool notes = false;
    // A warp has the words that it keeps.
    const int all = of.words.count() * items, begin = is_kept(side) ? warp() * items : warp(),
              end = is_kept(side) && begin + items < all ? begin + items : all;
    for (int item = begin; item < end; item += is_kept(side) ? 1 : num_warps()) {
      const int word = of.words.begin + item / items, fragment = item % kParts, first_tile = item % items / kParts * kTiles;
      constexpr bool kLoadsEarly = kKeptSides != 1;  // which has no registers left
      UnitData data[kItemFragments][2];
      const auto load_units = [&] {
#pragma unroll
        for (int i = 0; i < 2 * kItemFragments; ++i)
          data[i / 2][i % 2] =
              load_unit(kLoadsEarly ? units_of_side : unit_row(side, 0), word * kWarpSize + pair_of(fragment + i / 2) + i % 2);
      };
      if (kLoadsEarly) load_units();
      Sums sums = {};
      multiply(side, word, fragment, first_tile, sums);
      if (!kLoadsEarly) load_units();
      UnitBounds units[kItemFragments][2];
#pragma unroll
      for (int i = 0; i < 2 * kItemFragments; ++i) units[i / 2][i % 2] = data[i / 2][i % 2].bounds(bounds);
      const uint32_t mask = mask_of_units(side, word, fragment);
      // Of four tiles, the chains of a column are decided together; of fewer, the units of a tile.
#pragma unroll
      for (int k = 0; k < (kInterleaved ? kTiles / 2 : kTiles); ++k) {
        Pair pairs[kPairs];
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          const int column = kInterleaved ? k % 2 : p / 2, tile = kInterleaved ? k / 2 * kBundle + p : k,
                    m = kInterleaved ? 0 : p % 2;
          Pair& pair = pairs[p];
          pair.first_chain = (first_tile + tile) * kTileChains + column;
          pair.fragment = fragment + m;
          pair.units = units[m];
#pragma unroll
          for (int r = 0; r < 2; ++r) pair.fields[r] = field_of(sums.of[tile][m], 2 * r + column, shift_of(tile));
        }
        notes |= decide(side, of, word, pairs, mask, sweep, bounds, last_beta);
      }
    }
    if (__syncthreads_or(notes)) {  // the side is whole, but for its open units
      close(side, sweep, bounds);
      __syncthreads();  // the CTA's words are whole
      open_units_.next();
    }
    if (is_cluster()) {
      publish(side);
      sync_cluster();  // all words are whole, everywhere
    }
  }

  // Interleaved bits of a tile are multiplied where they lie in a byte, which saves instructions: its sums are too large by 2^shift.
  GIBBS_DEVICE static constexpr int shift_of(int tile) { return kInterleaved ? 2 * (tile % kBundle) : 0; }
  // Shared memory has room for fewer than 2^11 words of 32 units, so that a sum stays below 2^16 2^7 2^6.
  GIBBS_DEVICE static int32_t field_of(const int32_t (&sums)[kSlices][4], int element, int shift) {
    auto field = uint32_t(sums[0][element] >> shift);
#pragma unroll
    for (int s = 1; s < kSlices; ++s) field += uint32_t(sums[s][element]) << (8 * s - shift);
    return int32_t(field);
  }
  // Bits of an item's pairs of units: 1 where there is such a unit; the same for four tiles, or for two columns of chains.
  GIBBS_DEVICE uint32_t mask_of_units(int side, int word, int fragment) const {
    const BipartiteSide& of = side_of(side);
    const int unit = word * kWarpSize + pair_of(fragment) - of.offset;
    uint32_t are = 0;
#pragma unroll
    for (int i = 0; i < 2 * kItemFragments; ++i) are |= uint32_t(unsigned(unit + 16 * (i / 2) + i % 2) < unsigned(of.n)) << i;
    return are * (kInterleaved ? 0x55 : 0x11);
  }

  // Decides pairs of units of a word, as far as they are in the mask. Returns whether the thread has noted one that is open. Chains that are not
  // there get bits too, which nobody reads; they are never noted.
  GIBBS_DEVICE bool decide(int side, const OwnSide& of, int word, const Pair (&pairs)[kPairs], uint32_t mask, int64_t sweep,
                           const ModelBounds& bounds, float last_beta) {
    const BipartiteSide& to = side_of(side);
    if (kAnnealed && side == 1) {
      weigh_right(of, word, pairs[0], pairs[1], last_beta, bounds.beta);
      weigh_right(of, word, pairs[2], pairs[3], last_beta, bounds.beta);
    }
    uint32_t bytes[kPairs];
    load_bytes(side, of, word, pairs, sweep, bytes);
    Decided decided;
#pragma unroll
    for (int p = kPairs; p-- > 0;) {
      const Pair& pair = pairs[p];
      if (kTiles == 1 && pair.first_chain >= num_chains_) {  // in all lanes: many models have one chain
        decided.skip(2);
        continue;
      }
      if (p_.packed.bias_per_chain) {
        const UnitRow units = unit_row(side, pair.chain());
#pragma unroll
        for (int r = 0; r < 2; ++r) pair.units[r] = load_unit(units, word * kWarpSize + pair_of(pair.fragment) + r).bounds(bounds);
      }
#pragma unroll
      for (int r = 2; r-- > 0;) {
        const UnitBounds& unit = pair.units[r];
        const auto sum = float(pair.fields[r]);
        decided.add(open_logits_[bytes[p] >> (8 * r) & 0xff], unit.slope * sum + unit.low, unit.slope * sum + unit.high);
      }
    }
    uint32_t fixed = 0, old = 0;
    if (to.clamps) {
      if constexpr (kInterleaved) old = state_bytes_[byte_of(of, word, pairs[0])];
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        if (pairs[p].chain() >= num_chains_) continue;
        const int in_word = pair_of(pairs[p].fragment);
        fixed |= (to.clamps[row(pairs[p].chain()) * to.words + word] >> in_word & 3) << (2 * p);
        if constexpr (!kInterleaved) old |= (state_word(of.states_at + word, pairs[p].chain()) >> in_word & 3) << (2 * p);
      }
    }
    uint32_t open = decided.open() & ~fixed & mask, bits = ((old & fixed) | (~decided.is_not_one & ~fixed)) & mask;
    if (open) {
#pragma unroll
      for (int p = 0; p < kPairs; ++p)
        if (pairs[p].chain() >= num_chains_) open &= ~(3u << (2 * p));
      if (open) bits |= note(side, word, pairs, open, sweep, bounds);
    }
    write(of, word, pairs[0], bits);
    return open != 0;
  }
  // Random bytes of pairs of units, in the lowest 16 bits.
  GIBBS_DEVICE void load_bytes(int side, const OwnSide& of, int word, const Pair (&pairs)[kPairs], int64_t sweep,
                               uint32_t (&bytes)[kPairs]) const {
    const auto number = int(side_of(side).first_number) + word * kWarpSize;
    const auto each = [&](const auto& load) {
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const int chain = min(pairs[p].chain(), num_chains_ - 1);
        if (kTiles > 1 || pairs[p].first_chain < num_chains_)
          bytes[p] = load((number + pair_of(pairs[p].fragment)) / 4, chain) >> (16 * (group() % 2));
      }
    };
    if (p_.plan.sweeps_ahead)
      each([&](int at, int chain) { return drawn_bytes(of.bytes_at, at, chain); });
    else
      each([&](int at, int chain) { return draw_high_bytes(stream(chain, sweep), uint32_t(at)); });
  }
  // The byte of the states that a lane writes, for four pairs of which the first is given. Interleaved: it has the bits of these pairs.
  GIBBS_DEVICE int64_t byte_of(const OwnSide& of, int word, const Pair& first) const {
    const int at = (of.states_at + word) * chain_slots(), quarter = group() % 4, byte = group() / 4;
    return kInterleaved ? int64_t{4} * (at + slot_of(first.chain(), quarter)) + 2 * first.fragment + byte
                        : int64_t{4} * (at + first.chain() + quarter / 2) + 2 * (quarter % 2) + byte;
  }
  GIBBS_DEVICE void write(const OwnSide& of, int word, const Pair& first, uint32_t bits) const {
    if constexpr (!kInterleaved) {
      // Four lanes put a byte together for each pair (two chains, two fragments), and each writes one.
      const int quarter = group() % 4;
      bits = (bits | bits << 12) & 0x000f000f;
      bits = ((bits | bits << 6) & 0x03030303) << (2 * quarter);
      bits |= __shfl_xor_sync(kFullWarp, bits, 4);
      bits |= __shfl_xor_sync(kFullWarp, bits, 8);
      bits >>= 8 * quarter;
    }
    state_bytes_[byte_of(of, word, first)] = uint8_t(bits);
  }

  // ---- open units ----

  // Notes open ones of a lane's units, whose bits are 0 until they are decided. Returns the bits of those for which there is no room.
  GIBBS_DEVICE uint32_t note(int side, int word, const Pair (&pairs)[kPairs], uint32_t open, int64_t sweep,
                             const ModelBounds& bounds) const {
    uint32_t at = open_units_.reserve(__popc(open)), left = 0, bits = 0;
    const auto unit = [&](int k, const Pair& pair, int32_t field) {
      return OpenUnits::Unit{word * kWarpSize + pair_of(pair.fragment) + k % 2, pair.chain(), field};
    };
#pragma unroll
    for (int k = 0; k < 2 * kPairs; ++k)
      if (open >> k & 1 && !open_units_.note(at++, unit(k, pairs[k / 2], pairs[k / 2].fields[k % 2]))) left |= 1u << k;
    for (; left; left &= left - 1) {  // there is no room for these
      const int which = __ffs(int(left)) - 1;
      OpenUnits::Unit of = {};
#pragma unroll
      for (int k = 0; k < 2 * kPairs; ++k)
        if (k == which) of = unit(k, pairs[k / 2], pairs[k / 2].fields[k % 2]);
      bits |= uint32_t(decide_alone(side, of, sweep, bounds)) << which;
    }
    return bits;
  }
  GIBBS_DEVICE bool decide_alone(int side, const OpenUnits::Unit& unit, int64_t sweep, const ModelBounds& bounds) const {
    const uint32_t word = random_word_of(side, unit.position, unit.chain, sweep);
    const auto below = is_below_by_bounds(side, unit.position, unit.chain, unit.field, word, bounds);
    if (below != IsBelow::kOpen) return below == IsBelow::kYes;
    const int32_t exact = kAnnealed ? unit.field : int32_t(partial_field(side, unit.position, unit.chain, ~0u));
    return word < threshold(exact_logit(side, exact, unit.position, unit.chain, bounds.beta));
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
    const uint32_t bytes = p_.plan.sweeps_ahead ? drawn_bytes(own(side).bytes_at, int(number / 4), chain)
                                                : draw_high_bytes(stream(chain, sweep), number / 4);
    return (bytes >> (8 * (number % 4)) & 0xff) << 24 | draw_low_bits(stream(chain, sweep), number);
  }
  GIBBS_DEVICE void set_bit(int side, int position, int chain) const {
    const int at = (own(side).states_at + position / kWarpSize) * chain_slots(), in_word = position % kWarpSize;
    if constexpr (kInterleaved)  // bits 8 i + 2 t + r of tile n
      atomicOr(&states_[at + slot_of(chain, in_word % 8 / 2)], 1u << (in_word / 8 * 8 + 2 * tile_in_bundle(chain) + in_word % 2));
    else
      atomicOr(&states_[at + chain], 1u << in_word);
  }

  // ---- exact fields ----

  // The field's integer, as far as those bits of the other side's words go that are in the mask. Couplings for which a fault has been reported
  // may overflow.
  GIBBS_DEVICE uint32_t partial_field(int side, int position, int chain, uint32_t mask) const {
    const BipartiteSide &to = side_of(side), &from = side_of(1 - side);
    const void* weight = parameter_row(p_.weight, p_.sweep.batch, p_.is_double, model_, 0);
    const int unit = position - to.offset, at = own(1 - side).states_at;
    uint32_t sum = 0;
    for (int word = 0; word < from.words; ++word)
      for (uint32_t bits = state_word(at + word, chain) & mask; bits; bits &= bits - 1) {
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

  // What right units of a word, which are summed out, add to log f_beta - log f_last_beta of a chain.
  GIBBS_DEVICE void weigh_right(const OwnSide& of, int word, const Pair& first, const Pair& second, float last_beta,
                                float beta) const {
    const BipartiteSide& right = side_of(1);
    const int chain = first.chain();
    double term = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Pair& pair = k < 2 ? first : second;
      const int position = word * kWarpSize + pair_of(pair.fragment) + k % 2;
      if (position < right.offset || position >= right.offset + right.n || chain >= num_chains_) continue;
      term += double(softplus_difference(exact_logit(1, pair.fields[k % 2], position, chain, last_beta),
                                         exact_logit(1, pair.fields[k % 2], position, chain, beta)));
    }
    store_term(of.states_at + word, chain, term);
  }
  // The same for left units, without the factor of the betas' difference.
  GIBBS_DEVICE void weigh_left() const {
    const OwnSide of = own(0);
    const BipartiteSide& left = side_of(0);
    for (int item = warp(); item < of.words.count() * p_.plan.tiles; item += num_warps()) {
      const int word = of.words.begin + item / p_.plan.tiles, chain = item % p_.plan.tiles * kTileChains + 2 * place_in_group();
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        double term = 0;
        if (chain + c < num_chains_) {
          const uint32_t bits = state_word(of.states_at + word, chain + c) >> (4 * group());
          const int64_t at = (bias_row(chain + c) * left.words + word) * kWarpSize + 4 * group();
#pragma unroll
          for (int i = 0; i < 4; ++i)
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
  const int64_t model_;
  int64_t first_ = 0;  // chain of the model
  OwnSide own_[2];
  int num_chains_ = 0, ahead_ = 0;
  ModelScale scale_;
  const LeftFragment* slices_;
  OpenUnits open_units_;
  OpenLogits<kLogitCopies> open_logits_;
  Shared<uint32_t> bytes_;
  Array<uint32_t> states_;
  Array<uint8_t> state_bytes_;
  Array<double> terms_;
  Shared<uint64_t> numbers_;
  Shared<LeftFragment> resident_;
  Kept kept_[kKeptSides == 0 ? 1 : kKeptSides];  // right's is the last
};

template <bool kAnnealed, int kTiles, int kKeptSides, bool kShared>
__global__ void __launch_bounds__(most_threads(kAnnealed, kTiles, kKeptSides), 1)
    bipartite_kernel(const __grid_constant__ BipartiteBinaryParams params) {
  BipartiteCta<kAnnealed, kTiles, kKeptSides, kShared>(params).run();
}

#endif

}  // namespace gibbs
