// SPDX-License-Identifier: Apache-2.0
#pragma once

// Binary sweeps of bipartite models, one CTA for some chains of one model: with the model's couplings in shared memory ("resident"), or
// rounded as they are read from global memory ("streaming"), at any size. twin: csrc/cpu/kernels/bipartite.h
#include "cuda/bipartite.h"
#include "cuda/rounding.cuh"
#include "cuda/sampling.cuh"

namespace gibbs {

constexpr int kBipartiteThreads = 512;  // at most
constexpr int kStreamingThreads = 256;  // at most; addresses of global memory take registers
constexpr int kSweepsAhead = 8;         // at most this many sweeps' random bytes are drawn at once

// Leading dimension of couplings in shared memory. It is odd, so that lanes along a row and lanes along a column are in 32 banks.
GIBBS_HOST_DEVICE int64_t odd(int64_t n) { return n | 1; }

// Numbers of each kind that a CTA keeps. If `is_resident`, the couplings come first.
struct BinaryLayout {
  int64_t couplings, left_words, right_words, left_biases, right_biases, bytes_ahead, sweeps_ahead, scratch;
  int chains;
  bool has_clamps, is_annealed;

  GIBBS_HOST_DEVICE BinaryLayout(const BipartiteParams& p, int chains_per_cta, int num_threads, bool is_resident)
      : couplings(is_resident ? p.n1 * odd(p.n2) : 0),
        left_words(state_words(p.n1)),
        right_words(state_words(p.n2)),
        scratch(scale_scratch(p.n2)),
        chains(chains_per_cta),
        has_clamps(p.clamp_left.data || p.clamp_right.data),
        is_annealed(p.log_weights) {
    const auto rows = [&](const ParameterView& bias, const ParameterView& base) {
      return is_shared_row(bias, p.sweep.batch) && (!is_annealed || is_shared_row(base, p.sweep.batch)) ? 1 : chains;
    };
    left_biases = rows(p.left_bias, p.base_left_bias) * p.n1;
    right_biases = rows(p.right_bias, p.base_right_bias) * p.n2;
    const int64_t counters = random_byte_counters(p.n1 + p.n2) * chains, ahead = num_threads / counters;
    sweeps_ahead = ahead < 1 ? 1 : ahead < kSweepsAhead ? ahead : kSweepsAhead;
    bytes_ahead = sweeps_ahead * chains * random_byte_words(p.n1 + p.n2);
  }

  GIBBS_HOST_DEVICE int64_t bytes() const {
    const int64_t words = left_words + right_words, biases = (is_annealed ? 2 : 1);
    return shared_bytes<int32_t>(couplings) +
           (has_clamps ? 3 : 2) * (shared_bytes<uint32_t>(chains * left_words) + shared_bytes<uint32_t>(chains * right_words)) +
           shared_bytes<int32_t>(chains * left_words * kWarpSize) + shared_bytes<int32_t>(chains * right_words * kWarpSize) +
           biases * (shared_bytes<float>(left_biases) + shared_bytes<float>(right_biases)) + shared_bytes<uint32_t>(bytes_ahead) +
           shared_bytes<uint64_t>(chains) + shared_bytes<uint32_t>(scratch) +
           (is_annealed ? shared_bytes<double>(chains * words) + shared_bytes<double>(chains) : 0);
  }
};

struct BipartiteBinaryParams {
  BipartiteParams call;
  int chains_per_cta, parts;  // parts: see BinaryCta::add_flips
};

#if defined(GIBBS_DEVICE)

// Arrays of a CTA, in shared memory or, where they do not fit, in its part of the workspace.
template <bool kShared>
class CtaMemory;
template <>
class CtaMemory<true> : public SharedMemory {
 public:
  template <class T>
  using Array = Shared<T>;
  using SharedMemory::SharedMemory;
};
template <>
class CtaMemory<false> {
 public:
  template <class T>
  using Array = T*;
  GIBBS_DEVICE explicit CtaMemory(unsigned char* base) : next_(base) {}
  template <class T>
  GIBBS_DEVICE T* take(int64_t count) {
    T* out = reinterpret_cast<T*>(next_);
    next_ += shared_bytes<T>(count);
    return out;
  }

 private:
  unsigned char* next_;
};

// Sums of couplings stay within 31 bits, except where a fault has been reported: those may wrap around.
GIBBS_DEVICE int32_t wrapping_sum(int32_t a, int32_t b) { return int32_t(uint32_t(a) + uint32_t(b)); }

// The sum of value(unit) over the units whose bits are set, four at a time, so that their loads wait together. All lanes have the same bits.
template <class Value>
GIBBS_DEVICE uint32_t sum_over_bits(uint32_t bits, int first, const Value& value) {
  uint32_t sum = 0;
  while (bits) {
    uint32_t part[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      part[k] = bits ? uint32_t(value(first + (__ffs(int(bits)) - 1))) : 0;
      bits &= bits - 1;
    }
    sum += (part[0] + part[1]) + (part[2] + part[3]);
  }
  return sum;
}

// The couplings of a model in shared memory.
struct ResidentCouplings {
  static constexpr bool kCoalescedColumns = true;
  Shared<int32_t> weight;
  int ld;
  GIBBS_DEVICE int32_t operator()(int i, int j) const { return weight[i * ld + j]; }
};
// The couplings in global memory, rounded as they are read.
struct StreamingCouplings {
  static constexpr bool kCoalescedColumns = false;
  const void* weight;
  int64_t row_stride, column_stride;
  bool is_double;
  int k;
  GIBBS_DEVICE int32_t operator()(int i, int j) const {
    const int64_t at = i * row_stride + j * column_stride;
    return is_double ? rounded(global_load(static_cast<const double*>(weight) + at), FloatTraits<double>::power(k))
                     : rounded(global_load(static_cast<const float*>(weight) + at), FloatTraits<float>::power(k));
  }
};

// One side of the model for the CTA's chains.
template <bool kShared>
struct BinarySide {
  template <class E>
  using Array = typename CtaMemory<kShared>::template Array<E>;
  int n, words;
  int first_unit;         // its number in the random words
  int bias_stride;        // 0: one row for all chains
  Array<uint32_t> state;  // [chain, word]
  Array<uint32_t> flips;  // [chain, word]: units that changed when they were last drawn
  Array<uint32_t> clamp;  // [chain, word]
  Array<int32_t> acc;     // [chain, 32 words]: sums of the couplings to the units that are 1
  Array<float> bias, base_bias;
};

// Header of the kernels below.
//   A CTA owns: `chains` chains of one model, for all sweeps.
//   Shared memory: int32 couplings (resident), and of each chain its bits, which of them flipped last, clamps, int32 fields, biases, and the
//   random bytes of some sweeps ahead.
//   Synchronisation: one barrier a half sweep, between the bits that it writes and the fields that read them (two where warps share a
//   unit's flips, one more for a batch of random bytes).
//   Traffic: couplings, biases and bits once. An update reads one coupling from shared memory per flipped unit of the other side (a wavefront
//   for 32 of them) and its field; Philox is 1/16 of a counter; threshold about 35 instructions.
//   Computes: acc_j += sum_i +-coupling_ij over flipped i;  z_j = [word_j < threshold(beta (acc_j 2^-k + bias_j))].
template <bool kShared, bool kAnnealed, class Couplings>
class BinaryCta {
 public:
  template <class E>
  using Array = typename CtaMemory<kShared>::template Array<E>;

  GIBBS_DEVICE BinaryCta(const BipartiteParams& p, const BinaryLayout& layout, int64_t model, int64_t first_chain, int num_chains,
                         int parts, CtaMemory<kShared>& memory)
      : p_(p),
        model_(model),
        first_chain_(first_chain),
        num_chains_(num_chains),
        parts_(parts),
        sweeps_ahead_(int(layout.sweeps_ahead)) {
    left_ = side(layout, memory, p.n1, layout.left_words, layout.left_biases, 0);
    right_ = side(layout, memory, p.n2, layout.right_words, layout.right_biases, p.n1);
    bytes_ = memory.template take<uint32_t>(layout.bytes_ahead);
    number_ = memory.template take<uint64_t>(layout.chains);
    if (kAnnealed) {
      terms_ = memory.template take<double>(layout.chains * (layout.left_words + layout.right_words));
      log_weight_ = memory.template take<double>(layout.chains);
    }
  }

  // Reads chain numbers, biases, clamps and starting bits. A barrier must follow.
  GIBBS_DEVICE void load() {
    const BatchView& batch = p_.sweep.batch;
    for (int c = threadIdx.x; c < num_chains_; c += blockDim.x) {
      number_[c] = chain_number(p_.sweep, model_, first_chain_ + c);
      if (kAnnealed) log_weight_[c] = 0;
    }
    load_side(left_, p_.left, p_.clamp_left, Outcome::kLeftNotBits);
    load_side(right_, p_.right, p_.clamp_right, Outcome::kRightNotBits);
    load_biases(left_, left_.bias, p_.left_bias, batch, Outcome::kNonFiniteLeftBias);
    load_biases(right_, right_.bias, p_.right_bias, batch, Outcome::kNonFiniteRightBias);
    if (kAnnealed) {
      load_biases(left_, left_.base_bias, p_.base_left_bias, batch, Outcome::kNonFiniteBaseLeftBias);
      load_biases(right_, right_.base_bias, p_.base_right_bias, batch, Outcome::kNonFiniteBaseRightBias);
    }
  }

  // Runs all binary sweeps of the call. Begins after a barrier and ends with one.
  GIBBS_DEVICE void sweep(const Couplings& couplings, float scale) {
    const SweepView& s = p_.sweep;
    report_biases(left_, scale);
    report_biases(right_, scale);
    for (int64_t sweep = 0; sweep < s.num_sweeps; ++sweep) {
      const auto ahead = int(sweep % sweeps_ahead_);
      if (ahead == 0) {
        draw_bytes(sweep);
        __syncthreads();  // the bytes are there
      }
      const float beta = float(beta_at(s, sweep + kAnnealed));
      const auto row = [&](int from, int to) { return couplings(from, to); };
      const auto column = [&](int from, int to) { return couplings(to, from); };
      if (!kAnnealed) {
        half_sweep<true>(left_, right_, row, sweep, ahead, beta, scale);
      } else {
        add_flips<true>(left_, right_, row, sweep == 0);
        __syncthreads();  // right's fields are up to date
        weigh(float(beta_at(s, sweep)), beta, scale);
        draw_side(right_, sweep, ahead, beta, scale);
      }
      __syncthreads();  // right's bits are drawn
      if (kAnnealed) add_weights(beta_at(s, sweep), beta_at(s, sweep + 1));
      half_sweep<Couplings::kCoalescedColumns>(right_, left_, column, sweep, ahead, beta, scale);
      __syncthreads();  // left's bits are drawn
    }
  }

  // Writes bits and log-weights.
  GIBBS_DEVICE void store() const {
    store_side(left_, p_.left_out);
    store_side(right_, p_.right_out);
    if (kAnnealed)
      for (int c = threadIdx.x; c < num_chains_; c += blockDim.x)
        p_.log_weights[linear_number(p_.sweep.batch, model_, first_chain_ + c)] = log_weight_[c];
  }

  GIBBS_DEVICE uint32_t left_bit(int chain, int i) const { return left_.state[chain * left_.words + i / 32] >> (i % 32) & 1; }

 private:
  using Side = BinarySide<kShared>;

  GIBBS_DEVICE static Side side(const BinaryLayout& layout, CtaMemory<kShared>& memory, int64_t n, int64_t words, int64_t biases,
                                int64_t first_unit) {
    const int64_t all = layout.chains * words;
    Array<uint32_t> state = memory.template take<uint32_t>(all), flips = memory.template take<uint32_t>(all),
                    clamp = layout.has_clamps ? memory.template take<uint32_t>(all) : state;
    Array<int32_t> acc = memory.template take<int32_t>(all * kWarpSize);
    Array<float> bias = memory.template take<float>(biases), base_bias = kAnnealed ? memory.template take<float>(biases) : bias;
    return {int(n), int(words), int(first_unit), biases == n ? 0 : int(n), state, flips, clamp, acc, bias, base_bias};
  }

  GIBBS_DEVICE static int lane() { return int(threadIdx.x) % kWarpSize; }
  GIBBS_DEVICE static int warp() { return int(threadIdx.x) / kWarpSize; }
  GIBBS_DEVICE static int num_warps() { return int(blockDim.x) / kWarpSize; }

  GIBBS_DEVICE void load_side(const Side& side, const StateView& state, const StateView& clamp, Outcome fault) const {
    const BatchView& batch = p_.sweep.batch;
    const auto word_of = [&](const StateView& view, int64_t offset, int word) {
      const int unit = word * kWarpSize + lane();
      const bool is_set = view.data && unit < side.n && load_bit(p_.sweep, view, offset + unit * view.stride, fault);
      return __ballot_sync(kFullWarp, is_set);
    };
    for (int item = warp(); item < num_chains_ * side.words; item += num_warps()) {
      const int word = item % side.words;
      const int64_t chain = first_chain_ + item / side.words;
      const uint32_t bits = word_of(state, batch_offset(batch, state.batch_strides, model_, chain), word);
      if (lane() == 0) side.state[item] = side.flips[item] = bits;
      if (has_clamps()) {
        const uint32_t fixed = word_of(clamp, batch_offset(batch, clamp.batch_strides, model_, chain), word);
        if (lane() == 0) side.clamp[item] = fixed;
      }
      side.acc[item * kWarpSize + lane()] = 0;
    }
  }
  GIBBS_DEVICE bool has_clamps() const { return p_.clamp_left.data || p_.clamp_right.data; }

  GIBBS_DEVICE void load_biases(const Side& side, const Array<float>& to, const ParameterView& bias, const BatchView& batch,
                                Outcome fault) const {
    const int rows = side.bias_stride ? num_chains_ : 1;
    for (int c = 0; c < rows; ++c) {
      const void* row = parameter_row(bias, batch, p_.is_double, model_, first_chain_ + c);
      for (int i = threadIdx.x; i < side.n; i += blockDim.x)
        to[c * side.n + i] = finite_bias(p_.sweep, float(load_parameter(row, i * bias.stride, p_.is_double)), fault);
    }
  }

  GIBBS_DEVICE void report_biases(const Side& side, float scale) const {
    const int64_t degree = p_.n1 > p_.n2 ? p_.n1 : p_.n2;
    for (int at = threadIdx.x; at < (side.bias_stride ? num_chains_ : 1) * side.n; at += blockDim.x)
      report_bias(p_.sweep, side.bias[at], side.base_bias[at], scale, degree);
  }

  GIBBS_DEVICE RandomStream stream(int chain, int64_t sweep) const {
    return random_stream(seed_of(p_.sweep), number_[chain], uint64_t(p_.sweep.sweep_offset + sweep));
  }

  // Draws the random bytes of `sweep` and of as many later sweeps as there is room for.
  GIBBS_DEVICE void draw_bytes(int64_t sweep) {
    const auto counters = int(random_byte_counters(p_.n1 + p_.n2)), words = int(random_byte_words(p_.n1 + p_.n2));
    const int64_t left_over = p_.sweep.num_sweeps - sweep;
    const int sweeps = left_over < sweeps_ahead_ ? int(left_over) : sweeps_ahead_;
    for (int item = threadIdx.x; item < sweeps * num_chains_ * counters; item += blockDim.x) {
      const int row = item / counters;  // sweep ahead, chain
      store_random_bytes(stream(row % num_chains_, sweep + row / num_chains_), item % counters, bytes_ + row * words);
    }
  }

  // Brings the fields of `to` up to date with the flips of `from`; couplings(unit of from, unit of to). In the first sweep the fields are sums
  // over no unit at all, and all units that are 1 count as flipped. If lanes along `to` read neighbouring couplings (kLanesAlongTo), a warp has
  // 32 units of a chain, or, with several parts, every parts-th word of their flips; else a warp has one unit, and its lanes the flips.
  template <bool kLanesAlongTo, class C>
  GIBBS_DEVICE void add_flips(const Side& from, const Side& to, const C& couplings, bool is_first) {
    if constexpr (kLanesAlongTo) {
      for (int item = warp(); item < num_chains_ * to.words * parts_; item += num_warps()) {
        const int part = item % parts_, word = item / parts_, chain = word / to.words, unit = word % to.words * kWarpSize + lane();
        const int32_t sum = flipped_sum(from, couplings, chain, unit < to.n ? unit : to.n - 1, part, is_first);
        if (parts_ == 1)
          to.acc[word * kWarpSize + lane()] = wrapping_sum(to.acc[word * kWarpSize + lane()], sum);
        else
          atomicAdd(&to.acc[word * kWarpSize + lane()], sum);
      }
    } else {
      for (int item = warp(); item < num_chains_ * to.n; item += num_warps()) {
        const int chain = item / to.n, unit = item % to.n;
        uint32_t sum = 0;
        for (int w = 0; w < from.words; ++w) {
          const uint32_t state = from.state[chain * from.words + w], flips = is_first ? state : from.flips[chain * from.words + w];
          if (flips >> lane() & 1) {
            const auto coupling = uint32_t(couplings(w * kWarpSize + lane(), unit));
            sum += state >> lane() & 1 ? coupling : 0 - coupling;
          }
        }
        sum = warp_sum(sum);
        if (lane() == 0) {
          int32_t& acc = to.acc[chain * to.words * kWarpSize + unit];
          acc = wrapping_sum(acc, int32_t(sum));
        }
      }
    }
  }

  template <class C>
  GIBBS_DEVICE int32_t flipped_sum(const Side& from, const C& couplings, int chain, int unit, int part, bool is_first) {
    uint32_t sum = 0;
    for (int w = part; w < from.words; w += parts_) {
      const uint32_t state = from.state[chain * from.words + w], flips = is_first ? state : from.flips[chain * from.words + w];
      const auto coupling = [&](int flipped) { return couplings(flipped, unit); };
      sum += sum_over_bits(flips & state, w * kWarpSize, coupling) - sum_over_bits(flips & ~state, w * kWarpSize, coupling);
    }
    return int32_t(sum);
  }

  template <bool kLanesAlongTo, class C>
  GIBBS_DEVICE void half_sweep(const Side& from, const Side& to, const C& couplings, int64_t sweep, int ahead, float beta,
                               float scale) {
    add_flips<kLanesAlongTo>(from, to, couplings, sweep == 0);
    // With one part, the warp that drew a word's bits has also brought its fields up to date.
    if (!kLanesAlongTo || parts_ > 1) __syncthreads();  // fields are up to date
    draw_side(to, sweep, ahead, beta, scale);
  }

  GIBBS_DEVICE float logit(const Side& side, int item, int chain, int unit, float beta, float scale) const {
    const int32_t acc = side.acc[item * kWarpSize + lane()];
    const float bias = side.bias[chain * side.bias_stride + unit];
    return kAnnealed ? annealed_logit(acc, scale, bias, side.base_bias[chain * side.bias_stride + unit], beta)
                     : binary_logit(acc, scale, bias, beta);
  }

  GIBBS_DEVICE void draw_side(const Side& side, int64_t sweep, int ahead, float beta, float scale) {
    const auto byte_words = int(random_byte_words(p_.n1 + p_.n2));
    for (int item = warp(); item < num_chains_ * side.words; item += num_warps()) {
      const int chain = item / side.words, unit = item % side.words * kWarpSize + lane(), number = side.first_unit + unit;
      bool bit = false;
      if (unit < side.n) {
        const uint32_t word = bytes_[(ahead * num_chains_ + chain) * byte_words + (number >> 2)];
        bit = decide(stream(chain, sweep), uint32_t(number), word >> (8 * (number & 3)) & 0xff,
                     logit(side, item, chain, unit, beta, scale));
      }
      const uint32_t drawn = __ballot_sync(kFullWarp, bit);
      if (lane() == 0) {
        const uint32_t old = side.state[item], fixed = has_clamps() ? side.clamp[item] : 0;
        const uint32_t now = (old & fixed) | (drawn & ~fixed);
        side.state[item] = now;
        side.flips[item] = old ^ now;
      }
    }
  }

  // Computes what each word of 32 units adds to a chain's log-weight in the step from beta to next_beta. Right is summed out.
  GIBBS_DEVICE void weigh(float beta, float next_beta, float scale) {
    const int words = left_.words + right_.words;
    for (int item = warp(); item < num_chains_ * words; item += num_warps()) {
      const int chain = item / words, at = item % words;
      double term = 0;
      if (at < right_.words) {
        const int unit = at * kWarpSize + lane(), word = chain * right_.words + at;
        if (unit < right_.n)
          term = double(softplus_difference(logit(right_, word, chain, unit, beta, scale),
                                            logit(right_, word, chain, unit, next_beta, scale)));
      } else {
        const int word = at - right_.words, unit = word * kWarpSize + lane(), row = chain * left_.bias_stride + unit;
        if (left_.state[chain * left_.words + word] >> lane() & 1) term = double(left_.bias[row]) - double(left_.base_bias[row]);
      }
      term = warp_sum(term);
      if (lane() == 0) terms_[item] = term;
    }
  }
  // The order is the same for any number of threads.
  GIBBS_DEVICE void add_weights(double beta, double next_beta) {
    const int words = left_.words + right_.words;
    for (int c = threadIdx.x; c < num_chains_; c += blockDim.x) {
      double summed_out = 0, linear = 0;
      for (int w = 0; w < right_.words; ++w) summed_out += terms_[c * words + w];
      for (int w = right_.words; w < words; ++w) linear += terms_[c * words + w];
      log_weight_[c] += summed_out + (next_beta - beta) * linear;
    }
  }

  GIBBS_DEVICE void store_side(const Side& side, const StateOutput& out) const {
    for (int c = 0; c < num_chains_; ++c) {
      const int64_t row = linear_number(p_.sweep.batch, model_, first_chain_ + c) * side.n;
      for (int i = threadIdx.x; i < side.n; i += blockDim.x)
        store_bit(out, row + i, side.state[c * side.words + i / kWarpSize] >> (i % kWarpSize) & 1);
    }
  }

  const BipartiteParams& p_;
  const int64_t model_, first_chain_;
  const int num_chains_, parts_;
  const int sweeps_ahead_;
  Side left_, right_;
  Array<uint32_t> bytes_;
  Array<uint64_t> number_;
  Array<double> terms_, log_weight_;
};

// The chains of a CTA, which belong to one model.
struct CtaChains {
  int64_t model, first;
  int count;
  GIBBS_DEVICE CtaChains(const BatchView& batch, int chains_per_cta, int64_t cta = blockIdx.x) {
    const int64_t ctas = (batch.chains_per_model + chains_per_cta - 1) / chains_per_cta, at = cta % ctas;
    model = cta / ctas;
    first = at * chains_per_cta;
    const int64_t left_over = batch.chains_per_model - first;
    count = left_over < chains_per_cta ? int(left_over) : chains_per_cta;
  }
};

// The k of a model's couplings, read from global memory. Ends with a barrier.
template <class Scratch>
GIBBS_DEVICE_CALL int streaming_scale_exponent(const BipartiteParams& p, int64_t model, Scratch scratch, bool reports) {
  const auto exponent = [&](auto zero) {
    using T = decltype(zero);
    const T* weight = parameter_row<T>(p.weight, p.sweep.batch, model, 0);
    const auto coupling = [&](int64_t i, int64_t j) { return global_load(weight + i * p.weight.row_stride + j * p.weight.stride); };
    return matrix_scale_exponent<T>(p.sweep, p.n1, p.n2, coupling, scratch, reports);
  };
  return p.is_double ? exponent(double{}) : exponent(float{});
}

// Rounds a model's couplings into shared memory, [n1, odd(n2)], and returns 2^-k. Ends with a barrier. float32 couplings are read once, and
// wait in the place of the rounded ones for their scale; float64 ones do not fit there.
GIBBS_DEVICE_CALL float round_into_shared(const BipartiteParams& p, int64_t model, Shared<int32_t> weight, Shared<uint32_t> scratch,
                                          bool reports) {
  const int n1 = int(p.n1), n2 = int(p.n2), ld = int(odd(p.n2));
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize, num_warps = int(blockDim.x) / kWarpSize;
  const void* from = parameter_row(p.weight, p.sweep.batch, p.is_double, model, 0);
  const auto for_each = [&](const auto& f) {
    for (int i = warp; i < n1; i += num_warps)
      for (int j = lane; j < n2; j += kWarpSize) f(i * ld + j, i * p.weight.row_stride + j * p.weight.stride);
  };
  int k;
  if (p.is_double) {
    k = streaming_scale_exponent(p, model, scratch, reports);
    const double factor = FloatTraits<double>::power(k);
    for_each([&](int to, int64_t at) { weight[to] = rounded(global_load(static_cast<const double*>(from) + at), factor); });
  } else {
    for_each([&](int to, int64_t at) { weight[to] = __float_as_int(global_load(static_cast<const float*>(from) + at)); });
    __syncthreads();  // the couplings are there
    const auto coupling = [&](int64_t i, int64_t j) { return __int_as_float(weight[int(i) * ld + int(j)]); };
    k = matrix_scale_exponent<float>(p.sweep, n1, n2, coupling, scratch, reports);
    const float factor = FloatTraits<float>::power(k);
    for_each([&](int to, int64_t) { weight[to] = rounded(__int_as_float(weight[to]), factor); });
  }
  __syncthreads();  // the couplings are rounded
  return FloatTraits<float>::power(-k);
}

template <bool kAnnealed>
__global__ void __launch_bounds__(kBipartiteThreads, 1)
    bipartite_resident_kernel(const __grid_constant__ BipartiteBinaryParams params) {
  GIBBS_DYNAMIC_SHARED(shared);
  const BipartiteParams& p = params.call;
  const CtaChains chains(p.sweep.batch, params.chains_per_cta);
  const BinaryLayout layout(p, params.chains_per_cta, int(blockDim.x), true);
  CtaMemory<true> memory(shared);
  const Shared<int32_t> weight = memory.take<int32_t>(layout.couplings);
  const Shared<uint32_t> scratch = memory.take<uint32_t>(layout.scratch);
  BinaryCta<true, kAnnealed, ResidentCouplings> cta(p, layout, chains.model, chains.first, chains.count, params.parts, memory);
  cta.load();
  const float scale = round_into_shared(p, chains.model, weight, scratch, chains.first == 0);
  cta.sweep({weight, int(odd(p.n2))}, scale);
  cta.store();
}

// The CTA's arrays lie in shared memory if they fit, else in the workspace. Pointers do not tell which.
template <bool kAnnealed>
__global__ void __launch_bounds__(kStreamingThreads, 1)
    bipartite_streaming_kernel(const __grid_constant__ BipartiteBinaryParams params) {
  GIBBS_DYNAMIC_SHARED(shared);
  const BipartiteParams& p = params.call;
  const CtaChains chains(p.sweep.batch, params.chains_per_cta);
  const BinaryLayout layout(p, params.chains_per_cta, int(blockDim.x), false);
  CtaMemory<false> memory(p.workspace ? static_cast<unsigned char*>(p.workspace) + int64_t{blockIdx.x} * layout.bytes() : shared);
  uint32_t* const scratch = memory.take<uint32_t>(layout.scratch);
  BinaryCta<false, kAnnealed, StreamingCouplings> cta(p, layout, chains.model, chains.first, chains.count, params.parts, memory);
  cta.load();
  const int k = streaming_scale_exponent(p, chains.model, scratch, chains.first == 0);
  const void* weight = parameter_row(p.weight, p.sweep.batch, p.is_double, chains.model, 0);
  cta.sweep({weight, p.weight.row_stride, p.weight.stride, p.is_double, k}, FloatTraits<float>::power(-k));
  cta.store();
}

struct ResolutionParams {
  BipartiteParams call;
  double* out;  // [linear number]
};

// A CTA owns a model and computes 2^-k of its weight, which it reads once or twice.
template <class T>
__global__ void __launch_bounds__(kBipartiteThreads, 1)
    coupling_resolution_kernel(const __grid_constant__ ResolutionParams params) {
  GIBBS_DYNAMIC_SHARED(shared);
  const BipartiteParams& p = params.call;
  SharedMemory memory(shared);
  // Takes the weight or its transpose, whichever has fewer columns, because the columns' sums are in shared memory.
  const bool swaps = p.n2 > p.n1;
  const int64_t rows = swaps ? p.n2 : p.n1, columns = swaps ? p.n1 : p.n2;
  const int64_t row_stride = swaps ? p.weight.stride : p.weight.row_stride, stride = swaps ? p.weight.row_stride : p.weight.stride;
  const Shared<uint32_t> scratch = memory.take<uint32_t>(scale_scratch(columns));
  const T* weight = parameter_row<T>(p.weight, p.sweep.batch, blockIdx.x, 0);
  const auto coupling = [&](int64_t i, int64_t j) { return global_load(weight + i * row_stride + j * stride); };
  const int k = matrix_scale_exponent<T>(p.sweep, rows, columns, coupling, scratch, true);
  if (threadIdx.x == 0) params.out[linear_number(p.sweep.batch, blockIdx.x, 0)] = FloatTraits<double>::power(-k);
}

#endif

}  // namespace gibbs
