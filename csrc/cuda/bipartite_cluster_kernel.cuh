// SPDX-License-Identifier: Apache-2.0
#pragma once

// Binary sweeps of models whose couplings fit only in the shared memory of several CTAs, which form a thread-block cluster (compute
// capability 9.0 and later).
#include "cuda/bipartite_kernel.cuh"
#include "cuda/cluster.cuh"

namespace gibbs {

constexpr int kClusterThreads = 256;

// The number of units of a side that a CTA of the cluster has, rounded up to whole words.
GIBBS_HOST_DEVICE int64_t cluster_share(int64_t n, int cluster_size) {
  return round_up((n + cluster_size - 1) / cluster_size, kWarpSize);
}

struct ClusterLayout {
  int64_t rows, columns, couplings, left_words, right_words, own_right_words, partial, scratch;
  int chains;
  GIBBS_HOST_DEVICE ClusterLayout(const BipartiteParams& p, int chains_per_cta, int cluster_size)
      : rows(cluster_share(p.n1, cluster_size)),
        columns(cluster_share(p.n2, cluster_size)),
        couplings(rows * odd(p.n2)),
        left_words(rows / kWarpSize),
        right_words(state_words(p.n2)),
        own_right_words(columns / kWarpSize),
        partial(p.n2),
        scratch(scale_scratch(p.n2)),
        chains(chains_per_cta) {}
  GIBBS_HOST_DEVICE int64_t bytes() const {
    return shared_bytes<int32_t>(couplings) + 3 * shared_bytes<uint32_t>(chains * left_words) +
           3 * shared_bytes<uint32_t>(chains * own_right_words) + 2 * shared_bytes<uint32_t>(chains * right_words) +
           shared_bytes<int32_t>(chains * rows) + shared_bytes<int32_t>(chains * columns) +
           shared_bytes<int32_t>(chains * partial) + shared_bytes<uint64_t>(chains) + shared_bytes<uint32_t>(scratch);
  }
};

struct BipartiteClusterParams {
  BipartiteParams call;
  int chains_per_cta, cluster_size;
};

#if defined(GIBBS_DEVICE)

// Older devices have no clusters, and nvcc does not compile clusters for them.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// A CTA owns a range of left units, with their rows of the weight, and a range of right units, both of some chains of one model.
// Shared memory holds its rows, as int32 and of odd length. For each chain it holds the bits, flips, clamps and fields of the CTA's
// units, all right bits and flips, and the sums that the flips of the CTA's own left units add to all right fields.
// Synchronisation: A sweep has two cluster barriers. At (A) all partial sums are there, before the owners of right units add them
// up. At (B) right is drawn, before its bits are copied and partial sums are written anew. A last one comes before the CTA leaves,
// because others may still copy its bits.
// Traffic: A cluster reads the weight once, and each CTA reads it once more, from L2, for its scale. Per sweep and chain 4 n2 bytes
// and the bits pass over distributed shared memory. A random byte takes a Philox counter of its own, because latency counts here.
// It computes the same as bipartite_resident_kernel.
class ClusterCta {
 public:
  GIBBS_DEVICE ClusterCta(const BipartiteClusterParams& params, SharedMemory& memory)
      : p_(params.call),
        size_(params.cluster_size),
        layout_(p_, params.chains_per_cta, size_),
        cluster_(cooperative_groups::this_cluster()) {
    const int64_t cluster = blockIdx.x / unsigned(size_),
                  per_model = (p_.sweep.batch.chains_per_model + params.chains_per_cta - 1) / params.chains_per_cta;
    model_ = cluster / per_model;
    first_chain_ = cluster % per_model * params.chains_per_cta;
    const int64_t left_over = p_.sweep.batch.chains_per_model - first_chain_;
    chains_ = left_over < params.chains_per_cta ? int(left_over) : params.chains_per_cta;
    rank_ = int(cluster_.block_rank());
    weight_ = memory.take<int32_t>(layout_.couplings);
    left_ = side(memory, p_.n1, layout_.rows, layout_.left_words, 0);
    right_ = side(memory, p_.n2, layout_.columns, layout_.own_right_words, p_.n1);
    all_right_ = memory.take<uint32_t>(layout_.chains * layout_.right_words);
    all_right_flips_ = memory.take<uint32_t>(layout_.chains * layout_.right_words);
    partial_ = memory.take<int32_t>(layout_.chains * layout_.partial);
    number_ = memory.take<uint64_t>(layout_.chains);
    scratch_ = memory.take<uint32_t>(layout_.scratch);
  }

  GIBBS_DEVICE void run() {
    const SweepView& s = p_.sweep;
    for (int c = threadIdx.x; c < chains_; c += blockDim.x) number_[c] = chain_number(s, model_, first_chain_ + c);
    load_side(left_, p_.left, p_.clamp_left, Outcome::kLeftNotBits);
    load_side(right_, p_.right, p_.clamp_right, Outcome::kRightNotBits);
    const int k = streaming_scale_exponent(p_, model_, scratch_, first_chain_ == 0 && rank_ == 0);
    scale_ = FloatTraits<float>::power(-k);
    check_biases(left_, p_.left_bias, Outcome::kNonFiniteLeftBias);
    check_biases(right_, p_.right_bias, Outcome::kNonFiniteRightBias);
    load_rows(k);
    __syncthreads();  // bits and rows are there
    for (int64_t sweep = 0; sweep < s.num_sweeps; ++sweep) {
      const float beta = float(beta_at(s, sweep));
      sum_partially(sweep == 0);
      cluster_.sync();  // (A) partial sums are there
      gather_fields();
      __syncthreads();  // right's fields are up to date
      draw_side(right_, p_.right_bias, sweep, beta);
      cluster_.sync();  // (B) right is drawn, partial sums have been read
      copy_right();
      __syncthreads();  // right's bits are here
      update_left(sweep == 0);
      __syncthreads();  // left's fields are up to date
      draw_side(left_, p_.left_bias, sweep, beta);
      __syncthreads();  // left is drawn
    }
    store_side(left_, p_.left_out);
    store_side(right_, p_.right_out);
    cluster_.sync();  // nobody reads this CTA's memory any more
  }

 private:
  struct Side {
    int64_t n, first, count, words, first_unit;  // n, first_unit: of the whole side; others: of the CTA
    Shared<uint32_t> state, flips, clamp;        // [chain, word]
    Shared<int32_t> acc;                         // [chain, unit], in whole words of units
  };

  GIBBS_DEVICE Side side(SharedMemory& memory, int64_t n, int64_t share, int64_t words, int64_t first_unit) const {
    const int64_t first = rank_ * share, left_over = n - first;
    const Shared<uint32_t> state = memory.take<uint32_t>(layout_.chains * words),
                           flips = memory.take<uint32_t>(layout_.chains * words),
                           clamp = memory.take<uint32_t>(layout_.chains * words);
    return {n,     first,      left_over < 0 ? 0 : left_over < share ? left_over : share,
            words, first_unit, state,
            flips, clamp,      memory.take<int32_t>(layout_.chains * share)};
  }

  GIBBS_DEVICE static int lane() { return int(threadIdx.x) % kWarpSize; }
  GIBBS_DEVICE static int warp() { return int(threadIdx.x) / kWarpSize; }
  GIBBS_DEVICE static int num_warps() { return int(blockDim.x) / kWarpSize; }

  GIBBS_DEVICE void load_side(const Side& side, const StateView& state, const StateView& clamp, Outcome fault) const {
    for (int64_t item = warp(); item < chains_ * side.words; item += num_warps()) {
      const int64_t chain = first_chain_ + item / side.words, at = item % side.words * kWarpSize + lane(), unit = side.first + at;
      const auto word_of = [&](const StateView& view) {
        const int64_t row = batch_offset(p_.sweep.batch, view.batch_strides, model_, chain);
        const bool is_set = view.data && at < side.count && load_bit(p_.sweep, view, row + unit * view.stride, fault);
        return __ballot_sync(kFullWarp, is_set);
      };
      const uint32_t bits = word_of(state), fixed = word_of(clamp);
      if (lane() == 0) side.state[item] = side.flips[item] = bits, side.clamp[item] = fixed;
      side.acc[item * kWarpSize + lane()] = 0;
    }
  }
  GIBBS_DEVICE float bias(const ParameterView& view, int64_t chain, int64_t unit) const {
    const void* row = parameter_row(view, p_.sweep.batch, p_.is_double, model_, first_chain_ + chain);
    return float(load_parameter(row, unit * view.stride, p_.is_double));
  }
  GIBBS_DEVICE void check_biases(const Side& side, const ParameterView& view, Outcome fault) const {
    const int64_t degree = p_.n1 > p_.n2 ? p_.n1 : p_.n2;
    for (int64_t item = threadIdx.x; item < chains_ * side.count; item += blockDim.x) {
      const float of_unit = finite_bias(p_.sweep, bias(view, item / side.count, side.first + item % side.count), fault);
      report_bias(p_.sweep, of_unit, of_unit, scale_, degree);
    }
  }
  GIBBS_DEVICE void load_rows(int k) const {
    const void* from = parameter_row(p_.weight, p_.sweep.batch, p_.is_double, model_, 0);
    const StreamingCouplings rounded_weight = {from, p_.weight.row_stride, p_.weight.stride, p_.is_double, k};
    for (int i = warp(); i < int(left_.count); i += num_warps())
      for (int j = lane(); j < int(p_.n2); j += kWarpSize) weight_[i * int(odd(p_.n2)) + j] = rounded_weight(left_.first + i, j);
  }

  // Computes the sums that the flips of the CTA's left units add to all right fields. Lanes lie along columns.
  GIBBS_DEVICE void sum_partially(bool is_first) const {
    for (int64_t item = warp(); item < chains_ * layout_.right_words; item += num_warps()) {
      const int64_t chain = item / layout_.right_words, j = item % layout_.right_words * kWarpSize + lane();
      if (item % layout_.right_words * kWarpSize >= p_.n2) continue;
      const int64_t column = j < p_.n2 ? j : p_.n2 - 1;
      uint32_t sum = 0;
      for (int64_t w = 0; w < left_.words; ++w) {
        const uint32_t state = left_.state[chain * left_.words + w],
                       flips = is_first ? state : left_.flips[chain * left_.words + w];
        const auto coupling = [&](int64_t i) { return weight_[int(i) * int(odd(p_.n2)) + int(column)]; };
        sum += sum_over_bits(flips & state, w * kWarpSize, coupling) - sum_over_bits(flips & ~state, w * kWarpSize, coupling);
      }
      if (j < p_.n2) partial_[chain * p_.n2 + j] = int32_t(sum);
    }
  }
  GIBBS_DEVICE void gather_fields() const {
    for (int64_t item = threadIdx.x; item < chains_ * right_.count; item += blockDim.x) {
      const int64_t chain = item / right_.count, j = item % right_.count;
      uint32_t sum = 0;
      for (int rank = 0; rank < size_; ++rank)
        sum += uint32_t(cluster_array(partial_, unsigned(rank))[chain * p_.n2 + right_.first + j]);
      int32_t& acc = right_.acc[chain * layout_.columns + j];
      acc = wrapping_sum(acc, int32_t(sum));
    }
  }
  GIBBS_DEVICE void copy_right() const {
    for (int64_t item = threadIdx.x; item < chains_ * layout_.right_words; item += blockDim.x) {
      const int64_t chain = item / layout_.right_words, word = item % layout_.right_words;
      const auto owner = unsigned(word / right_.words);
      const int64_t at = chain * right_.words + word % right_.words;
      all_right_[item] = cluster_array(right_.state, owner)[at];
      all_right_flips_[item] = cluster_array(right_.flips, owner)[at];
    }
  }
  // Lanes lie along the CTA's rows.
  GIBBS_DEVICE void update_left(bool is_first) const {
    for (int64_t item = warp(); item < chains_ * left_.words; item += num_warps()) {
      const int64_t chain = item / left_.words, i = item % left_.words * kWarpSize + lane();
      if (item % left_.words * kWarpSize >= left_.count) continue;
      const int64_t row = i < left_.count ? i : left_.count - 1;
      uint32_t sum = 0;
      for (int64_t w = 0; w < layout_.right_words; ++w) {
        const uint32_t state = all_right_[chain * layout_.right_words + w],
                       flips = is_first ? state : all_right_flips_[chain * layout_.right_words + w];
        const auto coupling = [&](int64_t j) { return weight_[int(row) * int(odd(p_.n2)) + int(j)]; };
        sum += sum_over_bits(flips & state, w * kWarpSize, coupling) - sum_over_bits(flips & ~state, w * kWarpSize, coupling);
      }
      int32_t& acc = left_.acc[chain * layout_.rows + i];
      acc = wrapping_sum(acc, int32_t(sum));
    }
  }

  GIBBS_DEVICE void draw_side(const Side& side, const ParameterView& biases, int64_t sweep, float beta) const {
    for (int64_t item = warp(); item < chains_ * side.words; item += num_warps()) {
      const int64_t chain = item / side.words, at = item % side.words * kWarpSize + lane();
      bool bit = false;
      if (at < side.count) {
        const auto number = uint32_t(side.first_unit + side.first + at);
        const RandomStream stream = random_stream(seed_of(p_.sweep), number_[chain], uint64_t(p_.sweep.sweep_offset + sweep));
        const float logit = binary_logit(side.acc[item * kWarpSize + lane()], scale_, bias(biases, chain, side.first + at), beta);
        bit = decide(stream, number, random_high_byte(stream, number), logit);
      }
      const uint32_t drawn = __ballot_sync(kFullWarp, bit);
      if (lane() == 0) {
        const uint32_t old = side.state[item], fixed = side.clamp[item], now = (old & fixed) | (drawn & ~fixed);
        side.state[item] = now;
        side.flips[item] = old ^ now;
      }
    }
  }

  GIBBS_DEVICE void store_side(const Side& side, const StateOutput& out) const {
    for (int64_t item = threadIdx.x; item < chains_ * side.count; item += blockDim.x) {
      const int64_t chain = item / side.count, at = item % side.count;
      store_bit(out, linear_number(p_.sweep.batch, model_, first_chain_ + chain) * side.n + side.first + at,
                side.state[chain * side.words + at / kWarpSize] >> (at % kWarpSize) & 1);
    }
  }

  const BipartiteParams& p_;
  const int size_;
  const ClusterLayout layout_;
  cooperative_groups::cluster_group cluster_;
  int rank_, chains_;
  int64_t model_, first_chain_;
  float scale_ = 1;
  Shared<int32_t> weight_, partial_;
  Side left_, right_;
  Shared<uint32_t> all_right_, all_right_flips_, scratch_;
  Shared<uint64_t> number_;
};

#endif

__global__ void __launch_bounds__(kClusterThreads, 1)
    bipartite_cluster_kernel(const __grid_constant__ BipartiteClusterParams params) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  GIBBS_DYNAMIC_SHARED(shared);
  SharedMemory memory(shared);
  ClusterCta cta(params, memory);
  cta.run();
#endif
}

#endif

}  // namespace gibbs
