// SPDX-License-Identifier: Apache-2.0
#pragma once

// Binary sweeps of many chains that share a weight: fields as integer matrix products on tensor cores, exact modulo 2^32.
//
// Why, by numbers (an H100's SM; 100 + 100 units; a quarter of the units flip in a sweep): an update by flipped rows is 25 loads from shared
// memory, a wavefront for 32 chains' worth each: 0.8 clocks a unit. Tables of 16 entries for 4 rows are 25 loads as well, flips or not. On
// tensor cores it is 100 units x 4 slices of 8 bits = 400 multiply-adds, at 2048 a clock 0.2 clocks, plus 4 wavefronts of slices for 512 products.
// Drawing a unit (threshold, a sixteenth of a Philox counter, comparison; about 60 instructions) is 0.5 clocks either way.
#include "cuda/bipartite_kernel.cuh"

namespace gibbs {

constexpr int kTensorThreads = 256;
constexpr int kTensorWarps = kTensorThreads / kWarpSize;
constexpr int kTensorChains = 32;                 // of a CTA: a lane is a chain
constexpr int kTensorTile = 16;                   // of units, wmma's M and K; two tiles of chains are its N
constexpr int kSlices = 4;                        // of 8 bits in an int32 coupling; the highest is signed
constexpr int kStateStride = kTensorChains + 16;  // bytes from unit to unit: rows of 16 bytes fall in different banks
constexpr int kStageStride = kTensorChains + 4;   // integers from unit to unit of a warp's fields

GIBBS_HOST_DEVICE int64_t whole_tiles(int64_t n) { return round_up(n, kTensorTile); }
GIBBS_HOST_DEVICE int64_t slice_stride(int64_t n2) { return whole_tiles(n2) + 16; }

struct TensorLayout {
  int64_t slice, left_biases, right_biases, words,
      terms;  // slice: bytes of one of four; of a warp's own tile where they are staged
  bool has_clamps, is_annealed;
  int64_t n1, n2;
  GIBBS_HOST_DEVICE TensorLayout(const BipartiteParams& p, bool is_staged)
      : slice(is_staged ? kTensorWarps * kTensorTile * kTensorTile : whole_tiles(p.n1) * slice_stride(p.n2)),
        words(random_byte_words(p.n1 + p.n2)),
        has_clamps(p.clamp_left.data || p.clamp_right.data),
        is_annealed(p.log_weights),
        n1(whole_tiles(p.n1)),
        n2(whole_tiles(p.n2)) {
    const auto copies = [&](const ParameterView& bias, const ParameterView& base) {
      return is_shared_row(bias, p.sweep.batch) && (!is_annealed || is_shared_row(base, p.sweep.batch)) ? 1 : kTensorChains;
    };
    left_biases = copies(p.left_bias, p.base_left_bias) * p.n1;
    right_biases = copies(p.right_bias, p.base_right_bias) * p.n2;
    terms = is_annealed ? (2 * n1 + n2) / kTensorTile * kTensorChains : 0;
  }
  GIBBS_HOST_DEVICE int64_t bytes(int64_t scale_columns) const {
    return kSlices * shared_bytes<uint8_t>(slice) +
           (has_clamps ? 2 : 1) * (shared_bytes<uint8_t>(n1 * kStateStride) + shared_bytes<uint8_t>(n2 * kStateStride)) +
           shared_bytes<int32_t>(kTensorWarps * kTensorTile * kStageStride) + shared_bytes<uint32_t>(words * kTensorChains) +
           (is_annealed ? 2 : 1) * (shared_bytes<float>(left_biases) + shared_bytes<float>(right_biases)) +
           shared_bytes<uint64_t>(kTensorChains) + shared_bytes<uint32_t>(scale_scratch(scale_columns)) +
           (is_annealed ? shared_bytes<double>(terms) + shared_bytes<double>(kTensorChains) : 0);
  }
};

#if defined(GIBBS_DEVICE)

// A CTA owns: 32 chains of one model, for all sweeps.
// Shared memory: the couplings' slices (or a tile of them a warp, staged from global memory, where they do not fit), states as bytes, [unit,
// chain], random bytes of a sweep, biases, a tile of fields a warp.
// Synchronisation: barriers after each half sweep and after the random bytes; a warp multiplies a tile of units and draws it, with __syncwarp
// between what lanes write for each other.
// Traffic: a weight once (staged: in each half sweep, from L2); see above for wavefronts.
// Computes: acc = sum over slices s of 2^(8 s) W_s z;  z' = [word < threshold(beta (acc 2^-k + bias))].
template <bool kAnnealed, bool kStaged>
class TensorCta {
 public:
  GIBBS_DEVICE TensorCta(const BipartiteParams& p, const CtaChains& chains, SharedMemory& memory) : p_(p), chains_(chains) {
    const TensorLayout layout(p, kStaged);
    for (int s = 0; s < kSlices; ++s) slices_[s] = memory.take<uint8_t>(layout.slice);
    left_ = side(layout, memory, p.n1, layout.n1, layout.left_biases, 0);
    right_ = side(layout, memory, p.n2, layout.n2, layout.right_biases, p.n1);
    stage_ = memory.take<int32_t>(kTensorWarps * kTensorTile * kStageStride) + warp() * kTensorTile * kStageStride;
    bytes_ = memory.take<uint32_t>(layout.words * kTensorChains);
    number_ = memory.take<uint64_t>(kTensorChains);
    scratch_ = memory.take<uint32_t>(scale_scratch(p.n2));
    if (kAnnealed) {
      right_terms_ = memory.take<double>(layout.terms);
      left_terms_ = right_terms_ + layout.n2 / kTensorTile * kTensorChains;
      log_weight_ = memory.take<double>(kTensorChains);
    }
  }

  GIBBS_DEVICE void run() {
    const SweepView& s = p_.sweep;
    for (int c = threadIdx.x; c < kTensorChains; c += blockDim.x) {
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
    k_ = streaming_scale_exponent(p_, chains_.model, scratch_, chains_.first == 0);  // and a barrier: what was loaded is there
    const float scale = FloatTraits<float>::power(-k_);
    if (!kStaged) slice_weight();
    if (kAnnealed) weigh_left(0);
    for (int64_t sweep = 0; sweep < s.num_sweeps; ++sweep) {
      draw_bytes(sweep);
      __syncthreads();  // random bytes, and the first time slices, are there
      const float last_beta = kAnnealed ? float(beta_at(s, sweep)) : 0, beta = float(beta_at(s, sweep + kAnnealed));
      half_sweep<true>(left_, right_, sweep, last_beta, beta, scale);
      __syncthreads();  // right's bits are drawn
      if (kAnnealed) add_weights(sweep);
      half_sweep<false>(right_, left_, sweep, last_beta, beta, scale);
      __syncthreads();  // left's bits are drawn, and nobody reads the random bytes any more
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
    bool is_shared;  // one bias for all chains
    Shared<uint8_t> state, clamp;
    Shared<float> bias, base_bias;  // [unit] or [unit, chain]
    GIBBS_DEVICE int bias_at(int unit, int chain) const { return is_shared ? unit : unit * kTensorChains + chain; }
  };
  using Accumulator = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, kTensorTile, 16, 16, int>;
  template <class E>
  using States = nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, kTensorTile, 16, 16, E, nvcuda::wmma::row_major>;

  GIBBS_DEVICE static Side side(const TensorLayout& layout, SharedMemory& memory, int64_t n, int64_t padded, int64_t biases,
                                int64_t first_unit) {
    const Shared<uint8_t> state = memory.take<uint8_t>(padded * kStateStride),
                          clamp = layout.has_clamps ? memory.take<uint8_t>(padded * kStateStride) : state;
    const Shared<float> bias = memory.take<float>(biases), base_bias = kAnnealed ? memory.take<float>(biases) : bias;
    return {int(n), int(padded / kTensorTile), first_unit, biases == n, state, clamp, bias, base_bias};
  }

  GIBBS_DEVICE static int lane() { return int(threadIdx.x) % kWarpSize; }
  GIBBS_DEVICE static int warp() { return int(threadIdx.x) / kWarpSize; }
  GIBBS_DEVICE bool has_clamps() const { return p_.clamp_left.data || p_.clamp_right.data; }

  // Lanes along units, for the sake of global memory; units and chains that there are not have state 0.
  GIBBS_DEVICE void load_side(const Side& side, const StateView& state, const StateView& clamp, Outcome fault) const {
    const int padded = side.tiles * kTensorTile;
    for (int c = warp(); c < kTensorChains; c += kTensorWarps) {
      const int64_t chain = chains_.first + (c < chains_.count ? c : 0);
      const auto load = [&](const Shared<uint8_t>& to, const StateView& view) {
        const int64_t row = batch_offset(p_.sweep.batch, view.batch_strides, chains_.model, chain);
        for (int i = lane(); i < padded; i += kWarpSize) {
          const bool exists = view.data && i < side.n && c < chains_.count;
          to[i * kStateStride + c] = exists ? uint8_t(load_bit(p_.sweep, view, row + i * view.stride, fault)) : uint8_t(0);
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

  // Coupling (i, j) in fixed point; 0 outside the weight.
  GIBBS_DEVICE int32_t coupling(const void* weight, int i, int j) const {
    if (i >= int(p_.n1) || j >= int(p_.n2)) return 0;
    const int64_t at = i * p_.weight.row_stride + j * p_.weight.stride;
    return p_.is_double ? rounded(global_load(static_cast<const double*>(weight) + at), FloatTraits<double>::power(k_))
                        : rounded(global_load(static_cast<const float*>(weight) + at), FloatTraits<float>::power(k_));
  }
  GIBBS_DEVICE void store_slices(int at, int32_t coupling) {
#pragma unroll
    for (int s = 0; s < kSlices; ++s) slices_[s][at] = uint8_t(uint32_t(coupling) >> (8 * s));
  }
  GIBBS_DEVICE const void* weight() const { return parameter_row(p_.weight, p_.sweep.batch, p_.is_double, chains_.model, 0); }

  GIBBS_DEVICE void slice_weight() {
    const void* from = weight();
    const int ld = int(slice_stride(p_.n2)), columns = right_.tiles * kTensorTile;
    for (int i = warp(); i < left_.tiles * kTensorTile; i += kTensorWarps)
      for (int j = lane(); j < columns; j += kWarpSize) store_slices(i * ld + j, coupling(from, i, j));
  }

  GIBBS_DEVICE RandomStream stream(int chain, int64_t sweep) const {
    return random_stream(seed_of(p_.sweep), number_[chain], uint64_t(p_.sweep.sweep_offset + sweep));
  }
  // Lanes along chains: word q of four units of a chain is bytes_[q, chain].
  GIBBS_DEVICE void draw_bytes(int64_t sweep) {
    const RandomStream of_lane = stream(lane(), sweep);
    for (int group = warp(); group < int(random_byte_counters(p_.n1 + p_.n2)); group += kTensorWarps) {
      const PhiloxOutput r = philox4x32(uint32_t(group), of_lane.c1, of_lane.c2, of_lane.c3, of_lane.k0, of_lane.k1);
#pragma unroll
      for (int w = 0; w < 4; ++w) bytes_[((group >> 3) * 32 + (group & 7) + 8 * w) * kTensorChains + lane()] = r.word[w];
    }
  }

  // Fields of the 16 units of a tile of `to` for all chains, to the warp's stage. In a right update (kRight) a unit of `to` is a column.
  template <bool kRight>
  GIBBS_DEVICE void multiply(const Side& from, int tile) {
    namespace wmma = nvcuda::wmma;
    using Order = std::conditional_t<kRight, wmma::col_major, wmma::row_major>;
    Accumulator sum[kSlices][2];
    for (int s = 0; s < kSlices; ++s)
      for (int n = 0; n < 2; ++n) wmma::fill_fragment(sum[s][n], 0);
    const void* from_weight = kStaged ? weight() : nullptr;
    for (int t = 0; t < from.tiles; ++t) {
      int at, ld;
      if (kStaged) {
        at = warp() * kTensorTile * kTensorTile, ld = kTensorTile;
        __syncwarp();  // the tile before has been multiplied
        for (int e = lane(); e < kTensorTile * kTensorTile; e += kWarpSize) {
          const int row = e / kTensorTile, column = e % kTensorTile;  // of the weight
          const int i = (kRight ? t : tile) * kTensorTile + row, j = (kRight ? tile : t) * kTensorTile + column;
          store_slices(at + e, coupling(from_weight, i, j));
        }
        __syncwarp();  // the tile is staged
      } else {
        ld = int(slice_stride(p_.n2));
        at = (kRight ? t * ld + tile : tile * ld + t) * kTensorTile;
      }
      const uint8_t* states = shared_pointer(from.state) + t * kTensorTile * kStateStride;
      States<unsigned char> bits[2];
      States<signed char> signed_bits[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        wmma::load_matrix_sync(bits[n], states + 16 * n, kStateStride);
        wmma::load_matrix_sync(signed_bits[n], reinterpret_cast<const signed char*>(states) + 16 * n, kStateStride);
      }
#pragma unroll
      for (int s = 0; s + 1 < kSlices; ++s) {
        wmma::fragment<wmma::matrix_a, kTensorTile, 16, 16, unsigned char, Order> a;
        wmma::load_matrix_sync(a, shared_pointer(slices_[s]) + at, unsigned(ld));
#pragma unroll
        for (int n = 0; n < 2; ++n) wmma::mma_sync(sum[s][n], a, bits[n], sum[s][n]);
      }
      wmma::fragment<wmma::matrix_a, kTensorTile, 16, 16, signed char, Order> top;
      wmma::load_matrix_sync(top, reinterpret_cast<const signed char*>(shared_pointer(slices_[kSlices - 1])) + at, unsigned(ld));
#pragma unroll
      for (int n = 0; n < 2; ++n) wmma::mma_sync(sum[kSlices - 1][n], top, signed_bits[n], sum[kSlices - 1][n]);
    }
    __syncwarp();  // the stage has been read
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      // Fragments of one type share their layout, whatever it is.
      for (int e = 0; e < sum[0][n].num_elements; ++e)
        sum[0][n].x[e] = int(uint32_t(sum[0][n].x[e]) + (uint32_t(sum[1][n].x[e]) << 8) + (uint32_t(sum[2][n].x[e]) << 16) +
                             (uint32_t(sum[3][n].x[e]) << 24));
      wmma::store_matrix_sync(shared_pointer(stage_) + 16 * n, sum[0][n], kStageStride, wmma::mem_row_major);
    }
    __syncwarp();  // the fields are there
  }

  template <bool kRight>
  GIBBS_DEVICE void half_sweep(const Side& from, const Side& to, int64_t sweep, float last_beta, float beta, float scale) {
    const int c = lane();
    const RandomStream of_lane = stream(c, sweep);
    for (int tile = warp(); tile < to.tiles; tile += kTensorWarps) {
      multiply<kRight>(from, tile);
      double term = 0;
      const int units = to.n - tile * kTensorTile < kTensorTile ? to.n - tile * kTensorTile : kTensorTile;
      for (int u = 0; u < units; ++u) {
        const int unit = tile * kTensorTile + u, at = to.bias_at(unit, c < chains_.count ? c : 0);
        const int64_t number = to.first_unit + unit;
        const int32_t acc = stage_[u * kStageStride + c];
        const float bias = to.bias[at], base = kAnnealed ? to.base_bias[at] : 0;
        const float logit = kAnnealed ? annealed_logit(acc, scale, bias, base, beta) : binary_logit(acc, scale, bias, beta);
        if (kAnnealed && kRight) term += double(softplus_difference(annealed_logit(acc, scale, bias, base, last_beta), logit));
        const uint32_t byte = bytes_[int(number >> 2) * kTensorChains + c] >> (8 * (number & 3)) & 0xff;
        const bool bit = decide(of_lane, uint32_t(number), byte, logit), keeps = has_clamps() && to.clamp[unit * kStateStride + c];
        if (!keeps && c < chains_.count) to.state[unit * kStateStride + c] = bit;
        if (kAnnealed && !kRight && bit) term += double(bias) - double(base);
      }
      if (kAnnealed) (kRight ? right_terms_ : left_terms(sweep + 1))[tile * kTensorChains + c] = term;
    }
  }

  // Of the sweep's starting left bits: read in it while those of the next one are written.
  GIBBS_DEVICE Shared<double> left_terms(int64_t sweep) const { return left_terms_ + (sweep & 1) * left_.tiles * kTensorChains; }

  // Terms of left bits, tile by tile.
  GIBBS_DEVICE void weigh_left(int64_t sweep) {
    const int c = lane();
    for (int tile = warp(); tile < left_.tiles; tile += kTensorWarps) {
      double term = 0;
      for (int unit = tile * kTensorTile; unit < left_.n && unit < (tile + 1) * kTensorTile; ++unit) {
        const int at = left_.bias_at(unit, c < chains_.count ? c : 0);
        if (left_.state[unit * kStateStride + c]) term += double(left_.bias[at]) - double(left_.base_bias[at]);
      }
      left_terms(sweep)[tile * kTensorChains + c] = term;
    }
  }
  GIBBS_DEVICE void add_weights(int64_t sweep) {
    for (int c = threadIdx.x; c < kTensorChains; c += blockDim.x) {
      double summed_out = 0, linear = 0;
      for (int tile = 0; tile < right_.tiles; ++tile) summed_out += right_terms_[tile * kTensorChains + c];
      for (int tile = 0; tile < left_.tiles; ++tile) linear += left_terms(sweep)[tile * kTensorChains + c];
      log_weight_[c] += summed_out + (beta_at(p_.sweep, sweep + 1) - beta_at(p_.sweep, sweep)) * linear;
    }
  }

  GIBBS_DEVICE void store_side(const Side& side, const StateOutput& out) const {
    for (int c = warp(); c < chains_.count; c += kTensorWarps) {
      const int64_t row = linear_number(p_.sweep.batch, chains_.model, chains_.first + c) * side.n;
      for (int i = lane(); i < side.n; i += kWarpSize) store_bit(out, row + i, side.state[i * kStateStride + c]);
    }
  }

  const BipartiteParams& p_;
  const CtaChains chains_;
  int k_ = 0;
  Side left_, right_;
  Shared<uint8_t> slices_[kSlices];
  Shared<int32_t> stage_;
  Shared<uint32_t> bytes_, scratch_;
  Shared<uint64_t> number_;
  Shared<double> right_terms_, left_terms_, log_weight_;
};

template <bool kAnnealed, bool kStaged>
__global__ void __launch_bounds__(kTensorThreads, 1) bipartite_tensor_kernel(const __grid_constant__ BipartiteParams p) {
  GIBBS_DYNAMIC_SHARED(shared);
  SharedMemory memory(shared);
  TensorCta<kAnnealed, kStaged> cta(p, CtaChains(p.sweep.batch, kTensorChains), memory);
  cta.run();
}

#endif

}  // namespace gibbs
