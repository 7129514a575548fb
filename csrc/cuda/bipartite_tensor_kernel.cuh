// SPDX-License-Identifier: Apache-2.0
#pragma once

// Binary sweeps of many chains that share a weight: fields are integer matrix products on tensor cores, exact modulo 2^32.
//
// The reason, in numbers for an SM of an H100, 100 + 100 units, and a quarter of the units flipping in a sweep: An update by
// flipped rows makes 25 loads from shared memory, each of which is a wavefront for 32 chains; this is 0.8 clocks a unit. Tables of
// 16 entries for 4 rows take 25 loads as well, whether units flip or not. Tensor cores make 100 units x 4 slices of 8 bits = 400
// multiply-adds, which take 0.2 clocks at 2048 a clock. They also read 8 wavefronts of slices and 4 wavefronts of states for the 8
// products of 16 x 16 couplings and 32 chains. Drawing a unit (threshold, an eighth of a Philox counter, comparison; about 60
// instructions) takes 0.5 clocks either way.
//
// A weight that is too large for shared memory is sliced once, into device memory, by a launch of its own. Each half sweep then
// reads 4 n1 n2 bytes of slices from L2 for all chains of a CTA. Therefore a CTA has 64 chains if there are as many, and the CTAs
// of a cluster share out the units of the same chains if there would be fewer CTAs than multiprocessors.
//
// Slices and states lie in memory tile by tile, with K innermost, so that a lane's part of a fragment is whole words. For that
// reason slices are kept twice, once as left updates multiply by them and once as right updates do.
#include "cuda/bipartite_kernel.cuh"
#include "cuda/cluster.cuh"

#if !defined(GIBBS_EMULATE)
#include <mma.h>
#endif

namespace gibbs {

constexpr int kTensorThreads = 256;
constexpr int kTensorWarps = kTensorThreads / kWarpSize;
constexpr int kTensorTile = 16;  // number of units (wmma's M and K) and of chains (its N)
constexpr int kSlices = 4;       // signed digits of 8 bits in an int32 coupling
constexpr int kSliceThreads = 512;
constexpr int kTileCouplings = kTensorTile * kTensorTile;
constexpr int64_t kSlicesAlignment = 256;  // bytes before a model's slices in device memory; they begin with its k

GIBBS_HOST_DEVICE int64_t tensor_tiles(int64_t n) { return (n + kTensorTile - 1) / kTensorTile; }
// Bytes of a model's slices: the slices for left updates are followed by the slices for right updates.
GIBBS_HOST_DEVICE int64_t slice_bytes(const BipartiteParams& p) {
  return 2 * kSlices * kTileCouplings * tensor_tiles(p.n1) * tensor_tiles(p.n2);
}
// Device memory holds k, then the slices.
GIBBS_HOST_DEVICE int64_t sliced_model_bytes(const BipartiteParams& p) { return kSlicesAlignment + slice_bytes(p); }

// The values of 16 units of a chain, with a byte for each.
struct alignas(16) UnitTile {
  uint32_t word[4];
};

struct TensorLayout {
  int64_t slices, left_biases, right_biases, words, terms, scratch;
  int64_t left_tiles, right_tiles;
  int chains, stage_stride;  // stage_stride: from unit to unit
  bool has_clamps, is_annealed;
  GIBBS_HOST_DEVICE TensorLayout(const BipartiteParams& p, bool is_resident, int chains_per_cta)
      : slices(is_resident ? slice_bytes(p) : 0),
        words(2 * kTensorTile * kTensorWarps / 4),  // a round may begin between multiples of 128 units
        scratch(is_resident ? scale_scratch(p.n2) : 0),
        left_tiles(tensor_tiles(p.n1)),
        right_tiles(tensor_tiles(p.n2)),
        chains(chains_per_cta),
        stage_stride(chains + 4),
        has_clamps(p.clamp_left.data || p.clamp_right.data),
        is_annealed(p.log_weights) {
    const auto copies = [&](const ParameterView& bias, const ParameterView& base) {
      return is_shared_row(bias, p.sweep.batch) && (!is_annealed || is_shared_row(base, p.sweep.batch)) ? 1 : chains;
    };
    left_biases = copies(p.left_bias, p.base_left_bias) * left_tiles * kTensorTile;
    right_biases = copies(p.right_bias, p.base_right_bias) * right_tiles * kTensorTile;
    terms = is_annealed ? (2 * left_tiles + right_tiles) * chains : 0;
  }
  GIBBS_HOST_DEVICE int64_t bytes() const {
    return shared_bytes<uint8_t>(slices) +
           (has_clamps ? 2 : 1) * (shared_bytes<UnitTile>(left_tiles * chains) + shared_bytes<UnitTile>(right_tiles * chains)) +
           shared_bytes<int32_t>(kTensorWarps * kTensorTile * stage_stride) + shared_bytes<uint32_t>(words * chains) +
           (is_annealed ? 2 : 1) * (shared_bytes<float>(left_biases) + shared_bytes<float>(right_biases)) +
           shared_bytes<uint64_t>(chains) + shared_bytes<uint32_t>(scratch) +
           (is_annealed ? shared_bytes<double>(terms) + shared_bytes<double>(chains) : 0);
  }
};

struct BipartiteTensorParams {
  BipartiteParams call;
  int cluster_size;
};
struct BipartiteSliceParams {
  BipartiteParams call;
  int parts;  // CTAs of a model
};

#if defined(GIBBS_DEVICE)

// Returns coupling (i, j) of a model in fixed point, or 0 if it lies outside the weight.
GIBBS_DEVICE int32_t tensor_coupling(const BipartiteParams& p, const void* weight, int k, int i, int j) {
  if (i >= int(p.n1) || j >= int(p.n2)) return 0;
  const int64_t at = i * p.weight.row_stride + j * p.weight.stride;
  return p.is_double ? rounded(global_load(static_cast<const double*>(weight) + at), FloatTraits<double>::power(k))
                     : rounded(global_load(static_cast<const float*>(weight) + at), FloatTraits<float>::power(k));
}
// Takes the lowest digit, -128 .. 127, off `rest`. Only sums of the four digits modulo 2^32 matter.
GIBBS_DEVICE int8_t take_digit(int32_t& rest) {
  const auto digit = int8_t(uint32_t(rest) & 0xff);
  rest = int32_t(uint32_t(rest) - uint32_t(int32_t(digit))) >> 8;
  return digit;
}

// Writes a model's slices, or one of `parts` parts of them, by calls of store(at, word). A word holds a digit of four couplings
// along K. Lanes lie along the rows of the weight while it is read.
template <class Store>
GIBBS_DEVICE void slice_weight(const BipartiteParams& p, int64_t model, int k, int part, int parts, const Store& store) {
  const void* weight = parameter_row(p.weight, p.sweep.batch, p.is_double, model, 0);
  for (int of_right = 0; of_right < 2; ++of_right) {
    const int m_tiles = int(tensor_tiles(of_right ? p.n2 : p.n1)), k_tiles = int(tensor_tiles(of_right ? p.n1 : p.n2));
    const int units = m_tiles * kTensorTile, words = k_tiles * kTensorTile / 4;
    for (int item = part * int(blockDim.x) + int(threadIdx.x); item < units * words; item += parts * int(blockDim.x)) {
      const int m = of_right ? item % units : item / words, quad = of_right ? item / units : item % words;
      uint32_t word[kSlices] = {};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int32_t rest = of_right ? tensor_coupling(p, weight, k, 4 * quad + e, m) : tensor_coupling(p, weight, k, m, 4 * quad + e);
#pragma unroll
        for (int s = 0; s < kSlices; ++s) word[s] |= uint32_t(uint8_t(take_digit(rest))) << (8 * e);
      }
      const int tile = of_right * m_tiles * k_tiles + m / kTensorTile * k_tiles + quad / 4;
      const int at = tile * kSlices * (kTileCouplings / 4) + m % kTensorTile * 4 + quad % 4;
#pragma unroll
      for (int s = 0; s < kSlices; ++s) store(at + s * (kTileCouplings / 4), word[s]);
    }
  }
}

// A CTA owns 32 or 64 chains of one model for all sweeps. In a cluster it owns a part of the units of the cluster's chains.
// Shared memory holds all states as bytes, the random bytes of a round of tiles, the biases, and a tile of fields for each warp. It
// also holds the couplings' slices if kResident; otherwise they are in device memory.
// Synchronisation: A barrier follows each half sweep, a barrier of the cluster if there is one. A barrier of the CTA follows the
// random bytes of a round. A warp multiplies a tile of 16 units and draws it, with __syncwarp between the writes of lanes and the
// reads of others.
// Traffic: The weight is read once, or its slices are read from L2 in each half sweep. The wavefronts are counted above. In a
// cluster every bit is written to each CTA, as a byte.
// It computes acc = sum over slices s of 2^(8 s) W_s z and z' = [word < threshold(beta (acc 2^-k + bias))].
template <bool kAnnealed, bool kResident, int kChains>
class TensorCta {
  static constexpr int kChainTiles = kChains / kTensorTile, kStageStride = kChains + 4;

 public:
  GIBBS_DEVICE TensorCta(const BipartiteTensorParams& params, SharedMemory& memory)
      : p_(params.call),
        size_(params.cluster_size),
        rank_(int(blockIdx.x) % size_),
        chains_(params.call.sweep.batch, kChains, int64_t{blockIdx.x} / size_) {
    const TensorLayout layout(p_, kResident, kChains);
    const Shared<uint32_t> slices = memory.take<uint32_t>(layout.slices / 4);
    left_ = side(layout, memory, p_.n1, layout.left_tiles, layout.left_biases, 0);
    right_ = side(layout, memory, p_.n2, layout.right_tiles, layout.right_biases, p_.n1);
    stage_ = memory.take<int32_t>(kTensorWarps * kTensorTile * kStageStride) + warp() * kTensorTile * kStageStride;
    bytes_ = memory.take<uint32_t>(layout.words * kChains);
    number_ = memory.take<uint64_t>(kChains);
    scratch_ = memory.take<uint32_t>(layout.scratch);
    if (kAnnealed) {
      right_terms_ = memory.take<double>(layout.terms);
      left_terms_ = right_terms_ + layout.right_tiles * kChains;
      log_weight_ = memory.take<double>(kChains);
    }
    if constexpr (kResident) {
      shared_slices_ = slices;
      slices_ = reinterpret_cast<const signed char*>(shared_pointer(slices));
    } else {
      slices_ = static_cast<const signed char*>(p_.workspace) + chains_.model * sliced_model_bytes(p_) + kSlicesAlignment;
    }
  }

  GIBBS_DEVICE void run() {
    const SweepView& s = p_.sweep;
    for (int c = threadIdx.x; c < kChains; c += blockDim.x) {
      number_[c] = c < chains_.count ? chain_number(s, chains_.model, chains_.first + c) : 0;
      if (kAnnealed) log_weight_[c] = 0;
    }
    load_side(left_, p_.left, p_.clamp_left, Outcome::kLeftNotBits);
    load_side(right_, p_.right, p_.clamp_right, Outcome::kRightNotBits);
    load_biases(left_.bias, left_, p_.left_bias, Outcome::kNonFiniteLeftBias);
    load_biases(right_.bias, right_, p_.right_bias, Outcome::kNonFiniteRightBias);
    if (kAnnealed) {
      load_biases(left_.base_bias, left_, p_.base_left_bias, Outcome::kNonFiniteBaseLeftBias);
      load_biases(right_.base_bias, right_, p_.base_right_bias, Outcome::kNonFiniteBaseRightBias);
    }
    int k;
    if constexpr (kResident) {
      k = streaming_scale_exponent(p_, chains_.model, scratch_, chains_.first == 0);
      slice_weight(p_, chains_.model, k, 0, 1, [&](int at, uint32_t word) { shared_slices_[at] = word; });
    } else {
      k = *reinterpret_cast<const int32_t*>(slices_ - kSlicesAlignment);
    }
    const float scale = FloatTraits<float>::power(-k);
    sync();  // all arrays are loaded
    report_biases(left_, scale);
    report_biases(right_, scale);
    if (kAnnealed) weigh_left(0);
    for (int64_t sweep = 0; sweep < s.num_sweeps; ++sweep) {
      const float last_beta = kAnnealed ? float(beta_at(s, sweep)) : 0, beta = float(beta_at(s, sweep + kAnnealed));
      half_sweep<true>(left_, right_, sweep, last_beta, beta, scale);
      sync();  // right's bits are drawn
      if (kAnnealed) add_weights(sweep);
      half_sweep<false>(right_, left_, sweep, last_beta, beta, scale);
      sync();  // left's bits are drawn
    }
    store_side(left_, p_.left_out);
    store_side(right_, p_.right_out);
    if (kAnnealed)
      for (int c = threadIdx.x; c < chains_.count; c += blockDim.x)
        p_.log_weights[linear_number(s.batch, chains_.model, chains_.first + c)] = log_weight_[c];
  }

 private:
  struct Side {
    int n, tiles;
    int64_t first_unit;
    bool is_shared;                 // one bias for all chains
    Shared<UnitTile> state, clamp;  // tiles of 16 units and 16 chains, chains innermost
    Shared<float> bias, base_bias;  // [unit] or [unit, chain]
    GIBBS_DEVICE int bias_at(int unit, int chain) const { return is_shared ? unit : unit * kChains + chain; }
    GIBBS_DEVICE int at(int tile, int chain) const {
      return (chain / kTensorTile * tiles + tile) * kTensorTile + chain % kTensorTile;
    }
    GIBBS_DEVICE bool bit(int unit, int chain) const {
      return state[at(unit / kTensorTile, chain)].word[unit % kTensorTile / 4] >> (8 * (unit % 4)) & 1;
    }
  };
  template <class Use, class Order = void>
  using Fragment = nvcuda::wmma::fragment<Use, kTensorTile, 16, 16, signed char, Order>;
  using Accumulator = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, kTensorTile, 16, 16, int>;

  GIBBS_DEVICE static Side side(const TensorLayout& layout, SharedMemory& memory, int64_t n, int64_t tiles, int64_t biases,
                                int64_t first_unit) {
    const Shared<UnitTile> state = memory.take<UnitTile>(tiles * kChains),
                           clamp = layout.has_clamps ? memory.take<UnitTile>(tiles * kChains) : state;
    const Shared<float> bias = memory.take<float>(biases), base_bias = kAnnealed ? memory.take<float>(biases) : bias;
    return {int(n), int(tiles), first_unit, biases == tiles * kTensorTile, state, clamp, bias, base_bias};
  }

  GIBBS_DEVICE static int lane() { return int(threadIdx.x) % kWarpSize; }
  GIBBS_DEVICE static int warp() { return int(threadIdx.x) / kWarpSize; }
  GIBBS_DEVICE bool has_clamps() const { return p_.clamp_left.data || p_.clamp_right.data; }
  // Waits for all threads that share the chains.
  GIBBS_DEVICE void sync() const {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (size_ > 1) return cooperative_groups::this_cluster().sync();
#endif
    __syncthreads();
  }

  // Spreads bits 0 .. 15 into bytes.
  GIBBS_DEVICE static UnitTile spread(uint32_t bits) {
    UnitTile out;
#pragma unroll
    for (int q = 0; q < 4; ++q, bits >>= 4) out.word[q] = (bits & 1) | (bits & 2) << 7 | (bits & 4) << 14 | (bits & 8) << 21;
    return out;
  }
  // Lanes lie along units, so that global loads are coalesced. Units and chains that do not exist have state 0.
  GIBBS_DEVICE void load_side(const Side& side, const StateView& state, const StateView& clamp, Outcome fault) const {
    for (int c = warp(); c < kChains; c += kTensorWarps) {
      const int64_t chain = chains_.first + (c < chains_.count ? c : 0);
      const auto load = [&](const Shared<UnitTile>& to, const StateView& view) {
        const int64_t row = batch_offset(p_.sweep.batch, view.batch_strides, chains_.model, chain);
        for (int tile = 0; tile < side.tiles; tile += 2) {
          const int unit = tile * kTensorTile + lane();
          const bool exists = view.data && unit < side.n && c < chains_.count;
          const uint32_t bits =
              __ballot_sync(kFullWarp, exists && load_bit(p_.sweep, view, row + unit * view.stride, fault)) >> (16 * (lane() & 1));
          if (lane() < 2 && tile + lane() < side.tiles) to[side.at(tile + lane(), c)] = spread(bits);
        }
      };
      load(side.state, state);
      if (has_clamps()) load(side.clamp, clamp);
    }
  }

  GIBBS_DEVICE void load_biases(const Shared<float>& to, const Side& side, const ParameterView& bias, Outcome fault) const {
    for (int c = 0; c < (side.is_shared ? 1 : chains_.count); ++c) {
      const void* row = parameter_row(bias, p_.sweep.batch, p_.is_double, chains_.model, chains_.first + c);
      for (int i = threadIdx.x; i < side.n; i += blockDim.x)
        to[side.bias_at(i, c)] = finite_bias(p_.sweep, float(load_parameter(row, i * bias.stride, p_.is_double)), fault);
    }
  }

  GIBBS_DEVICE void report_biases(const Side& side, float scale) const {
    const int64_t degree = p_.n1 > p_.n2 ? p_.n1 : p_.n2;
    for (int c = 0; c < (side.is_shared ? 1 : chains_.count); ++c)
      for (int i = threadIdx.x; i < side.n; i += blockDim.x) {
        const int at = side.bias_at(i, c);
        report_bias(p_.sweep, side.bias[at], side.base_bias[at], scale, degree);
      }
  }

  GIBBS_DEVICE RandomStream stream(int chain, int64_t sweep) const {
    return random_stream(seed_of(p_.sweep), number_[chain], uint64_t(p_.sweep.sweep_offset + sweep));
  }
  // Draws a sweep's random bytes of the units first .. end - 1, of which there are at most 128. Word bytes_[q, chain] has the bytes
  // of four units of a chain. Words are counted from the multiple of 128 units at or before `first`.
  GIBBS_DEVICE void draw_bytes(int64_t first, int64_t end, int64_t sweep) {
    const int64_t begin = first >> 7 << 3;
    const int counters = int(((end - 1) >> 7) + 1 - (first >> 7)) * 8;
    for (int item = threadIdx.x; item < counters * kChains; item += blockDim.x) {
      const int counter = item / kChains, c = item % kChains;
      const RandomStream of_chain = stream(c, sweep);
      const PhiloxOutput r = philox4x32(uint32_t(begin + counter), of_chain.c1, of_chain.c2, of_chain.c3, of_chain.k0, of_chain.k1);
#pragma unroll
      for (int w = 0; w < 4; ++w) bytes_[((counter >> 3) * 32 + (counter & 7) + 8 * w) * kChains + c] = r.word[w];
    }
  }

  // Writes the fields of the 16 units of a tile of `to`, for all chains, to the warp's stage.
  template <bool kRight>
  GIBBS_DEVICE void multiply(const Side& from, const Side& to, int tile) {
    namespace wmma = nvcuda::wmma;
    Accumulator sum[kSlices][kChainTiles];
    for (int s = 0; s < kSlices; ++s)
      for (int n = 0; n < kChainTiles; ++n) wmma::fill_fragment(sum[s][n], 0);
    const signed char* slices = slices_ + int64_t{(kRight ? to.tiles : 0) + tile} * from.tiles * kSlices * kTileCouplings;
    const signed char* states = reinterpret_cast<const signed char*>(shared_pointer(from.state));
#pragma unroll 2
    for (int t = 0; t < from.tiles; ++t) {
      Fragment<wmma::matrix_b, wmma::col_major> bits[kChainTiles];
#pragma unroll
      for (int n = 0; n < kChainTiles; ++n)
        wmma::load_matrix_sync(bits[n], states + (n * from.tiles + t) * kTileCouplings, kTensorTile);
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        Fragment<wmma::matrix_a, wmma::row_major> a;
        wmma::load_matrix_sync(a, slices + (t * kSlices + s) * kTileCouplings, kTensorTile);
#pragma unroll
        for (int n = 0; n < kChainTiles; ++n) wmma::mma_sync(sum[s][n], a, bits[n], sum[s][n]);
      }
    }
    __syncwarp();  // the stage has been read
#pragma unroll
    for (int n = 0; n < kChainTiles; ++n) {
      // Fragments of one type share their layout, whatever it is.
      for (int e = 0; e < sum[0][n].num_elements; ++e)
        sum[0][n].x[e] = int(uint32_t(sum[0][n].x[e]) + (uint32_t(sum[1][n].x[e]) << 8) + (uint32_t(sum[2][n].x[e]) << 16) +
                             (uint32_t(sum[3][n].x[e]) << 24));
      wmma::store_matrix_sync(shared_pointer(stage_) + kTensorTile * n, sum[0][n], kStageStride, wmma::mem_row_major);
    }
    __syncwarp();  // the fields are there
  }

  // Draws the CTA's share of the tiles of `to`, in rounds of one tile for each warp.
  template <bool kRight>
  GIBBS_DEVICE void half_sweep(const Side& from, const Side& to, int64_t sweep, float last_beta, float beta, float scale) {
    const int share = (to.tiles + size_ - 1) / size_, begin = rank_ * share;
    const int end = begin + share < to.tiles ? begin + share : to.tiles;
    for (int first = begin; first < end; first += kTensorWarps) {
      const int round_end = first + kTensorWarps < end ? first + kTensorWarps : end;
      const int64_t first_unit = to.first_unit + first * kTensorTile;
      const int64_t units_end = to.first_unit + (round_end * kTensorTile < to.n ? round_end * kTensorTile : to.n);
      if (first > begin) __syncthreads();  // the last round's bytes have been read
      draw_bytes(first_unit, units_end, sweep);
      __syncthreads();  // the random bytes are there
      const int tile = first + warp();
      if (tile >= round_end) continue;
      multiply<kRight>(from, to, tile);
#pragma unroll 1
      for (int c = lane(); c < kChains; c += kWarpSize)
        draw<kRight>(to, tile, c, first_unit >> 7 << 7, sweep, last_beta, beta, scale);
    }
  }
  template <bool kRight>
  GIBBS_DEVICE void draw(const Side& to, int tile, int c, int64_t bytes_begin, int64_t sweep, float last_beta, float beta,
                         float scale) {
    const RandomStream of_chain = stream(c, sweep);
    const int state_at = to.at(tile, c);
    const int units = to.n - tile * kTensorTile < kTensorTile ? to.n - tile * kTensorTile : kTensorTile;
    uint32_t bits = 0;
    double term = 0;
#pragma unroll 1
    for (int u = 0; u < units; ++u) {
      const int unit = tile * kTensorTile + u, at = to.bias_at(unit, c < chains_.count ? c : 0);
      const int64_t number = to.first_unit + unit;
      const int32_t acc = stage_[u * kStageStride + c];
      const float bias = to.bias[at], base = kAnnealed ? to.base_bias[at] : 0;
      const float logit = kAnnealed ? annealed_logit(acc, scale, bias, base, beta) : binary_logit(acc, scale, bias, beta);
      if (kAnnealed && kRight) term += double(softplus_difference(annealed_logit(acc, scale, bias, base, last_beta), logit));
      const uint32_t byte = bytes_[int((number - bytes_begin) >> 2) * kChains + c] >> (8 * (number & 3)) & 0xff;
      const bool bit = decide(of_chain, uint32_t(number), byte, logit);
      bits |= uint32_t{bit} << u;
      if (kAnnealed && !kRight && bit) term += double(bias) - double(base);
    }
    UnitTile drawn = spread(bits);
    if (kAnnealed) (kRight ? right_terms_ : left_terms(sweep + 1))[tile * kChains + c] = term;
    if (c >= chains_.count) return;
    if (has_clamps()) {
      const UnitTile old = to.state[state_at], fixed = to.clamp[state_at];
#pragma unroll
      for (int quad = 0; quad < 4; ++quad) {
        const uint32_t mask = fixed.word[quad] * 0xff;
        drawn.word[quad] = (old.word[quad] & mask) | (drawn.word[quad] & ~mask);
      }
    }
    if (size_ == 1)
      to.state[state_at] = drawn;
    else
      for (int rank = 0; rank < size_; ++rank) cluster_array(to.state, unsigned(rank))[state_at] = drawn;
  }

  // Returns the terms of the left bits with which a sweep starts. The sweep reads them while the next sweep's terms are written.
  GIBBS_DEVICE Shared<double> left_terms(int64_t sweep) const { return left_terms_ + (sweep & 1) * left_.tiles * kChains; }

  // Writes the terms of left bits, tile by tile.
  GIBBS_DEVICE void weigh_left(int64_t sweep) {
    const int c = lane();
    for (int tile = warp(); tile < left_.tiles; tile += kTensorWarps) {
      double term = 0;
      for (int unit = tile * kTensorTile; unit < left_.n && unit < (tile + 1) * kTensorTile; ++unit) {
        const int at = left_.bias_at(unit, c < chains_.count ? c : 0);
        if (left_.bit(unit, c)) term += double(left_.bias[at]) - double(left_.base_bias[at]);
      }
      left_terms(sweep)[tile * kChains + c] = term;
    }
  }
  GIBBS_DEVICE void add_weights(int64_t sweep) {
    for (int c = threadIdx.x; c < kChains; c += blockDim.x) {
      double summed_out = 0, linear = 0;
      for (int tile = 0; tile < right_.tiles; ++tile) summed_out += right_terms_[tile * kChains + c];
      for (int tile = 0; tile < left_.tiles; ++tile) linear += left_terms(sweep)[tile * kChains + c];
      log_weight_[c] += summed_out + (beta_at(p_.sweep, sweep + 1) - beta_at(p_.sweep, sweep)) * linear;
    }
  }

  GIBBS_DEVICE void store_side(const Side& side, const StateOutput& out) const {
    for (int c = rank_ + warp() * size_; c < chains_.count; c += kTensorWarps * size_) {  // each CTA stores its share
      const int64_t row = linear_number(p_.sweep.batch, chains_.model, chains_.first + c) * side.n;
      for (int i = lane(); i < side.n; i += kWarpSize) store_bit(out, row + i, side.bit(i, c));
    }
  }

  const BipartiteParams& p_;
  const int size_, rank_;  // the cluster's size, the CTA's rank in it
  const CtaChains chains_;
  Side left_, right_;
  Shared<uint32_t> shared_slices_;
  const signed char* slices_;  // in shared or in device memory
  Shared<int32_t> stage_;
  Shared<uint32_t> bytes_, scratch_;
  Shared<uint64_t> number_;
  Shared<double> right_terms_, left_terms_, log_weight_;
};

template <bool kAnnealed, bool kResident, int kChains>
__global__ void __launch_bounds__(kTensorThreads, 1) bipartite_tensor_kernel(const __grid_constant__ BipartiteTensorParams params) {
  GIBBS_DYNAMIC_SHARED(shared);
  SharedMemory memory(shared);
  TensorCta<kAnnealed, kResident, kChains> cta(params, memory);
  cta.run();
}

// A CTA owns a part of a model's slices, which it writes to device memory; the first CTA also writes k. The only barriers are the
// scale's. Traffic: Each CTA reads the weight once or twice for the scale, and then writes its part of the slices.
__global__ void __launch_bounds__(kSliceThreads, 1) bipartite_slice_kernel(const __grid_constant__ BipartiteSliceParams params) {
  GIBBS_DYNAMIC_SHARED(shared);
  const BipartiteParams& p = params.call;
  SharedMemory memory(shared);
  const Shared<uint32_t> scratch = memory.take<uint32_t>(scale_scratch(p.n2));
  const int64_t model = blockIdx.x / unsigned(params.parts);
  const int part = int(blockIdx.x % unsigned(params.parts));
  const int k = streaming_scale_exponent(p, model, scratch, part == 0);
  unsigned char* const out = static_cast<unsigned char*>(p.workspace) + model * sliced_model_bytes(p);
  if (part == 0 && threadIdx.x == 0) *reinterpret_cast<int32_t*>(out) = k;
  auto* const slices = reinterpret_cast<uint32_t*>(out + kSlicesAlignment);
  slice_weight(p, model, k, part, params.parts, [&](int at, uint32_t word) { slices[at] = word; });
}

#endif

}  // namespace gibbs
