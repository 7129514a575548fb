// SPDX-License-Identifier: Apache-2.0
#pragma once

// Relaxed sweeps of bipartite models and the chain rule through them (csrc/README.md, 4). twin: csrc/cpu/kernels/bipartite_relaxed.h
#include <type_traits>

#include "cuda/bipartite.h"
#include "cuda/relaxation.cuh"
#include "cuda/rounding.cuh"

namespace gibbs {

constexpr int kRelaxedThreads = 256, kRelaxedWarps = kRelaxedThreads / kWarpSize;
constexpr int kOuterTile = 64;      // rows and columns of a CTA's part of the weight's gradient
constexpr int kOuterFactors = 16;   // that it loads at a time
constexpr int kOuterThreads = 256;  // 16 x 16, with 4 x 4 elements each

// Leading dimension of a weight in shared memory. It is odd, so that lanes along a column are in 32 banks.
GIBBS_HOST_DEVICE int64_t odd(int64_t n) { return n | 1; }

// A product takes one chain or, in float, four at a time; a lane then has so many columns.
constexpr int kChainsAtATime = 4;
template <class T>
GIBBS_HOST_DEVICE constexpr int chains_at_a_time(int chains_per_cta) {
  return sizeof(T) == 4 && chains_per_cta > 1 ? kChainsAtATime : 1;
}
GIBBS_HOST_DEVICE constexpr int lane_columns(int chains) { return chains == 1 ? 8 : 4; }
// Of a CTA with some chains: sums of each warp, [warp, chain at a time, columns of a warp].
template <class T>
GIBBS_HOST_DEVICE int64_t partial_sums(int chains_per_cta) {
  const int at_a_time = chains_at_a_time<T>(chains_per_cta);
  return int64_t{kRelaxedWarps} * at_a_time * lane_columns(at_a_time) * kWarpSize;
}

struct BipartiteRelaxedParams {
  BipartiteParams call;
  int chains_per_cta;
  bool values_in_shared;
};
struct BipartiteBackwardKernelParams {
  BipartiteBackwardParams call;
  int chains_per_cta;
  bool sums_outer;  // the CTA has all chains of its model, and sums their outer products itself
};

// Arrays of the forward pass: what is found once for each chain, the weight (resident), the values of both sides, and sums of warps. Values of large
// models lie in the outputs.
template <class T>
struct RelaxedLayout {
  int64_t chains, weight, values, partial;
  GIBBS_HOST_DEVICE RelaxedLayout(const BipartiteParams& p, int chains_per_cta, bool is_resident, bool values_in_shared)
      : chains(chains_per_cta),
        weight(is_resident ? p.n1 * odd(p.n2) : 0),
        values(values_in_shared ? chains * (p.n1 + p.n2) : 0),
        partial(partial_sums<T>(chains_per_cta)) {}
  GIBBS_HOST_DEVICE int64_t bytes() const {
    return 5 * shared_bytes<int64_t>(chains) + 2 * shared_bytes<T*>(chains) + shared_bytes<T>(weight) + shared_bytes<T>(values) +
           shared_bytes<T>(partial);
  }
};

// Arrays of the backward pass: what is found once for each chain, the weight and each chain's gradients of left values (resident; else the gradients
// are in the output), each chain's factors of both sides, [2 num_relaxed_sweeps, n], and sums of warps.
template <class T>
struct BackwardLayout {
  int64_t chains, weight, grads, left_factors, right_factors, partial;
  GIBBS_HOST_DEVICE BackwardLayout(const BipartiteBackwardParams& p, int chains_per_cta, bool is_resident, bool sums_outer)
      : chains(chains_per_cta),
        weight(is_resident ? p.n1 * odd(p.n2) : 0),
        grads(is_resident ? chains * p.n1 : 0),
        left_factors(sums_outer ? chains * 2 * p.sweep.num_relaxed_sweeps * p.n1 : 0),
        right_factors(sums_outer ? chains * 2 * p.sweep.num_relaxed_sweeps * p.n2 : 0),
        partial(partial_sums<T>(chains_per_cta)) {}
  GIBBS_HOST_DEVICE int64_t bytes() const {
    return 2 * shared_bytes<int64_t>(chains) + shared_bytes<T>(weight) + shared_bytes<T>(grads) + shared_bytes<T>(left_factors) +
           shared_bytes<T>(right_factors) + shared_bytes<T>(partial);
  }
};

#if defined(GIBBS_DEVICE)

// ---- products with a weight ------------------------------------------------------------------------------------------------------

// A weight of the parameters' dtype, [n1, n2], in shared memory or in global memory.
template <class T, bool kResident>
struct RelaxedWeight {
  std::conditional_t<kResident, Shared<T>, const T*> couplings;
  int64_t row_stride, stride;
  int rows, columns;
  GIBBS_DEVICE T operator()(int row, int column) const {
    if constexpr (kResident)
      return couplings[row * int(row_stride) + column];
    else
      return global_load(couplings + row * row_stride + column * stride);
  }
};

// Finds a model's weight for relaxed sweeps, and loads it into `to` if it is resident. A barrier must follow.
template <class T, bool kResident>
GIBBS_DEVICE RelaxedWeight<T, kResident> find_weight(const ParameterView& view, const BatchView& batch, int n1, int n2,
                                                     int64_t model, const Shared<T>& to) {
  const T* const from = parameter_row<T>(view, batch, model, 0);
  if constexpr (kResident) {
    const int ld = int(odd(n2));
    if (view.stride <= view.row_stride) {
      for (int first = 4 * warp(); first < n1; first += 4 * kRelaxedWarps)  // rows that are loaded together
#pragma unroll 2
        for (int j = lane(); j < n2; j += kWarpSize)
#pragma unroll
          for (int i = first; i < first + 4; ++i)
            if (i < n1) to[i * ld + j] = global_load(from + i * view.row_stride + j * view.stride);
    } else {  // columns are in one piece
      for (int j = warp(); j < n2; j += kRelaxedWarps)
#pragma unroll 4
        for (int i = lane(); i < n1; i += kWarpSize) to[i * ld + j] = global_load(from + i * view.row_stride + j * view.stride);
    }
    return {to, ld, 1, n1, n2};
  } else {
    return {from, view.row_stride, view.stride, n1, n2};
  }
}

// Sums four numbers over a warp; the sum of number k is in lanes 8 k .. 8 k + 7.
template <class T>
GIBBS_DEVICE T warp_sums(const T (&x)[4]) {
  const bool upper = lane() & 16, second_of_two = lane() & 8;
  const T first = (upper ? x[2] : x[0]) + __shfl_xor_sync(kFullWarp, upper ? x[0] : x[2], 16),
          second = (upper ? x[3] : x[1]) + __shfl_xor_sync(kFullWarp, upper ? x[1] : x[3], 16);
  T sum = (second_of_two ? second : first) + __shfl_xor_sync(kFullWarp, second_of_two ? first : second, 8);
  for (int step = 4; step; step >>= 1) sum += __shfl_xor_sync(kFullWarp, sum, step);
  return sum;
}

// Products of a weight with values of some chains, kChains of them at a time. Couplings are read in rows; all warps take part, and sums do not depend
// on where couplings lie. Each function ends with a barrier.
template <class T, int kChains, class Weight>
class RelaxedProduct {
  static constexpr int kColumns = lane_columns(kChains), kWidth = kColumns * kWarpSize;

 public:
  GIBBS_DEVICE RelaxedProduct(const Weight& weight, int num_chains, const Shared<T>& partial)
      : weight_(weight), num_chains_(num_chains), partial_(partial) {}

  // sum(chain, j) = sum over i of value(chain, i) W_ij for every right unit. A warp has every eighth row, a lane some columns.
  template <class Value, class Sum>
  GIBBS_DEVICE void to_right(const Value& value, const Sum& sum) const {
    for (int chain = 0; chain < num_chains_; chain += kChains)
      for (int first = 0; first < weight_.columns; first += kWidth) {
        T sums[kChains][kColumns] = {};
#pragma unroll 2
        for (int row = warp(); row < weight_.rows; row += kRelaxedWarps) {
          T couplings[kColumns];
#pragma unroll
          for (int k = 0; k < kColumns; ++k) {
            const int column = first + k * kWarpSize + lane();
            couplings[k] = column < weight_.columns ? weight_(row, column) : T(0);
          }
#pragma unroll
          for (int c = 0; c < kChains; ++c) {
            const T of_row = chain + c < num_chains_ ? value(chain + c, row) : T(0);
#pragma unroll
            for (int k = 0; k < kColumns; ++k) sums[c][k] += of_row * couplings[k];
          }
        }
#pragma unroll
        for (int c = 0; c < kChains; ++c)
#pragma unroll
          for (int k = 0; k < kColumns; ++k) partial_[(warp() * kChains + c) * kWidth + k * kWarpSize + lane()] = sums[c][k];
        __syncthreads();  // the warps' sums are there
        for (int item = int(threadIdx.x); item < kChains * kWidth; item += kRelaxedThreads) {
          const int c = item / kWidth, column = first + item % kWidth;
          if (chain + c >= num_chains_ || column >= weight_.columns) continue;
          T total = 0;
#pragma unroll
          for (int w = 0; w < kRelaxedWarps; ++w) total += partial_[w * kChains * kWidth + item];
          sum(chain + c, column) = total;
        }
        __syncthreads();  // they have been used
      }
  }

  // sum(chain, i) = sum over j of W_ij value(chain, j) for every left unit. A warp has four rows, a lane every 32nd column.
  template <class Value, class Sum>
  GIBBS_DEVICE void to_left(const Value& value, const Sum& sum) const {
    for (int chain = 0; chain < num_chains_; chain += kChains)
      for (int first = 4 * warp(); first < weight_.rows; first += 4 * kRelaxedWarps) {
        T sums[kChains][4] = {};
#pragma unroll 2
        for (int column = lane(); column < weight_.columns; column += kWarpSize) {
          T couplings[4];
#pragma unroll
          for (int r = 0; r < 4; ++r) couplings[r] = first + r < weight_.rows ? weight_(first + r, column) : T(0);
#pragma unroll
          for (int c = 0; c < kChains; ++c) {
            const T of_column = chain + c < num_chains_ ? value(chain + c, column) : T(0);
#pragma unroll
            for (int r = 0; r < 4; ++r) sums[c][r] += of_column * couplings[r];
          }
        }
#pragma unroll
        for (int c = 0; c < kChains; ++c) {
          const T total = warp_sums(sums[c]);
          const int row = first + lane() / 8;
          if (lane() % 8 == 0 && row < weight_.rows && chain + c < num_chains_) sum(chain + c, row) = total;
        }
      }
    __syncthreads();  // the sums are there
  }

 private:
  const Weight& weight_;
  const int num_chains_;
  const Shared<T> partial_;
};

// ---- sweeps ----------------------------------------------------------------------------------------------------------------------

GIBBS_DEVICE_CALL uint32_t draw_word(RandomStream s, uint32_t unit) { return random_word(s, unit); }
GIBBS_DEVICE uint32_t relaxed_word(const SweepView& s, uint64_t seed, uint64_t chain, int64_t relaxed_sweep, int unit) {
  if (s.relaxation == kMeanField) return 0;
  return draw_word(random_stream(seed, chain, uint64_t(s.sweep_offset + s.num_sweeps + relaxed_sweep)), uint32_t(unit));
}

// A CTA owns some chains of one model, whose binary sweeps, if there are any, have left their bits in p.left_out.
// Shared memory holds the weight (resident; else it stays in global memory), the values of both sides, or the outputs hold these, and the warps' sums.
// Synchronisation: barriers lie between products, which put sums in the place of old values, and updates, which make values of them.
// Traffic: the weight passes once or, if it is not resident, twice a sweep for every four chains of the CTA; fields and values pass once. Products read
// a coupling from shared memory for one chain or four. An update draws two Philox counters.
// It computes field_j = bias_j + sum_i zeta_i W_ij and zeta_j = relax(field_j, u_j).
template <class T, int kChains, bool kResident>
__global__ void __launch_bounds__(kRelaxedThreads, 1)
    bipartite_relaxed_kernel(const __grid_constant__ BipartiteRelaxedParams params) {
  const BipartiteParams& p = params.call;
  const SweepView& s = p.sweep;
  const BatchView& batch = s.batch;
  const int n1 = int(p.n1), n2 = int(p.n2);
  const int64_t total = num_rows(batch);
  const CtaChains chains(batch, params.chains_per_cta);
  const RelaxedLayout<T> layout(p, params.chains_per_cta, kResident, params.values_in_shared);
  SharedMemory memory;
  T *const state = static_cast<T*>(p.left_out.data), *const left_out = static_cast<T*>(p.left_relaxed),
           *const right_out = static_cast<T*>(p.right_relaxed), *const mean_out = static_cast<T*>(p.left_mean),
           *const fields = static_cast<T*>(p.fields);
  // These take 64-bit divisions, so they are found once.
  const Shared<int64_t> rows = memory.take<int64_t>(layout.chains), starts = memory.take<int64_t>(layout.chains),
                        left_biases = memory.take<int64_t>(layout.chains), right_biases = memory.take<int64_t>(layout.chains);
  const Shared<uint64_t> numbers = memory.take<uint64_t>(layout.chains);
  const Shared<T*> left_rows = memory.take<T*>(layout.chains), right_rows = memory.take<T*>(layout.chains);
  const Shared<T> weight_array = memory.take<T>(layout.weight), values = memory.take<T>(layout.values),
                  partial = memory.take<T>(layout.partial);
  for (int c = int(threadIdx.x); c < chains.count; c += kRelaxedThreads) {
    rows[c] = linear_number(batch, chains.model, chains.first + c);
    left_rows[c] = params.values_in_shared ? shared_pointer(values) + c * n1 : left_out + rows[c] * n1;
    right_rows[c] = params.values_in_shared ? shared_pointer(values) + chains.count * n1 + c * n2 : right_out + rows[c] * n2;
    starts[c] = batch_offset(batch, p.start.batch_strides, chains.model, chains.first + c);
    left_biases[c] = batch_offset(batch, p.left_bias.batch_strides, chains.model, chains.first + c);
    right_biases[c] = batch_offset(batch, p.right_bias.batch_strides, chains.model, chains.first + c);
    numbers[c] = chain_number(s, chains.model, chains.first + c);
  }
  const auto weight = find_weight<T, kResident>(p.weight, batch, n1, n2, chains.model, weight_array);
  __syncthreads();  // rows and weight are there
  const auto left_value = [&](int c, int i) -> T& {
    if constexpr (kResident) return values[c * n1 + i];
    return left_rows[c][i];
  };
  const auto right_value = [&](int c, int j) -> T& {
    if constexpr (kResident) return values[chains.count * n1 + c * n2 + j];
    return right_rows[c][j];
  };
  const auto for_each = [&](int n, const auto& f) {
    for (int item = int(threadIdx.x); item < chains.count * n; item += kRelaxedThreads) f(item / n, item % n);
  };
  for_each(n1, [&](int c, int i) {
    T& of_state = state[rows[c] * n1 + i];
    if (!s.num_sweeps) {
      const T value = static_cast<const T*>(p.start.data)[starts[c] + i * p.start.stride];
      if (p.start_is_bits && value != 0 && value != 1) report_fault(s, Outcome::kLeftNotBits, float(value));
      if (!is_finite(value)) report_fault(s, Outcome::kNonFiniteLeft);
      of_state = value;
    }
    left_value(c, i) = of_state;
  });
  __syncthreads();  // values are there

  const RelaxedProduct<T, kChains, RelaxedWeight<T, kResident>> product(weight, chains.count, partial);
  const uint64_t seed = seed_of(s);
  for (int64_t sweep = 0; sweep < s.num_relaxed_sweeps; ++sweep) {
    const T beta = T(beta_at(s, chains.model, s.num_sweeps + sweep));
    const auto update = [&](const ParameterView& biases, int64_t bias_row, Outcome fault, int c, int number, int unit, int at,
                            T sum) {
      const T bias = static_cast<const T*>(biases.data)[bias_row + unit * biases.stride], field = bias + sum;
      if (!is_finite(bias)) report_fault(s, fault);
      fields[(sweep * total + rows[c]) * (n1 + n2) + at] = field;
      return relax<T>(s.relaxation, field, relaxed_word(s, seed, numbers[c], sweep, number), beta, T(s.sharpness),
                      s.slope_gradient);
    };
    product.to_right(left_value, right_value);
    for_each(n2, [&](int c, int j) {
      T& value = right_value(c, j);
      value = update(p.right_bias, right_biases[c], Outcome::kNonFiniteRightBias, c, n1 + j, j, j, value).value;
    });
    __syncthreads();  // right's values are there
    product.to_left(right_value, left_value);
    for_each(n1, [&](int c, int i) {
      T& value = left_value(c, i);
      const RelaxedUnit<T> unit = update(p.left_bias, left_biases[c], Outcome::kNonFiniteLeftBias, c, i, i, n2 + i, value);
      value = unit.value;
      mean_out[rows[c] * n1 + i] = unit.mean;
    });
    __syncthreads();  // left's values are there
  }
  if (params.values_in_shared) {
    for_each(n1, [&](int c, int i) { left_out[rows[c] * n1 + i] = left_value(c, i); });
    for_each(n2, [&](int c, int j) { right_out[rows[c] * n2 + j] = right_value(c, j); });
  }
}

// A CTA owns some chains of one model, and goes through all relaxed sweeps in reverse. For each sweep it leaves two pairs of
// factors, whose outer products sum to the weight's gradient: (d loss / d left field, right values) and (left values that right
// saw, d loss / d right field).
// Shared memory holds the weight and the gradients of left values (resident), and the warps' sums. It also holds the factors if the CTA has all chains
// of its model; then the CTA sums their products, too. Otherwise factors lie in the workspace, and outer_products_kernel sums their
// products.
// Synchronisation: A barrier lies between each product's factors and the product.
// Traffic: Fields and gradients are read once, the weight as in the forward pass, and its gradient is written once. Random words are drawn again.
// It computes g_field = g_zeta d zeta / d field, g_right = W^T g_left_field and g_left = W g_right_field.
template <class T, int kChains, bool kResident>
__global__ void __launch_bounds__(kRelaxedThreads, 1)
    bipartite_backward_kernel(const __grid_constant__ BipartiteBackwardKernelParams params) {
  const BipartiteBackwardParams& p = params.call;
  const SweepView& s = p.sweep;
  const BatchView& batch = s.batch;
  const int n1 = int(p.n1), n2 = int(p.n2);
  const int64_t sweeps = s.num_relaxed_sweeps, total = num_rows(batch);
  const CtaChains chains(batch, params.chains_per_cta);
  const BackwardLayout<T> layout(p, params.chains_per_cta, kResident, params.sums_outer);
  SharedMemory memory;
  const Shared<int64_t> rows = memory.take<int64_t>(layout.chains);
  const Shared<uint64_t> numbers = memory.take<uint64_t>(layout.chains);
  for (int c = int(threadIdx.x); c < chains.count; c += kRelaxedThreads) {
    rows[c] = linear_number(batch, chains.model, chains.first + c);
    numbers[c] = chain_number(s, chains.model, chains.first + c);
  }
  const auto weight = find_weight<T, kResident>(p.weight, batch, n1, n2, chains.model, memory.take<T>(layout.weight));
  const Shared<T> grads = memory.take<T>(layout.grads);
  // The factors of chain c, [2 sweeps, n], lie in shared memory or in the workspace, where chains are in the order of their models.
  T *left_factors, *right_factors;
  if (params.sums_outer) {
    left_factors = shared_pointer(memory.take<T>(layout.left_factors));
    right_factors = shared_pointer(memory.take<T>(layout.right_factors));
  } else {
    const int64_t first = (chains.model * batch.chains_per_model + chains.first) * 2 * sweeps;
    left_factors = static_cast<T*>(p.workspace) + first * n1;
    right_factors = static_cast<T*>(p.workspace) + total * 2 * sweeps * n1 + first * n2;
  }
  const Shared<T> partial = memory.take<T>(layout.partial);
  __syncthreads();  // rows and weight are there
  const auto left_factor = [&](int c, int64_t which) { return left_factors + (c * 2 * sweeps + which) * n1; };
  const auto right_factor = [&](int c, int64_t which) { return right_factors + (c * 2 * sweeps + which) * n2; };
  const auto in = [&](const void* data, int c, int n) { return static_cast<const T*>(data) + rows[c] * n; };
  const auto out = [&](void* data, int c, int n) { return static_cast<T*>(data) + rows[c] * n; };
  const auto grad_value = [&](int c, int i) -> T& {
    if constexpr (kResident) return grads[c * n1 + i];
    return out(p.grad_state, c, n1)[i];
  };
  const auto for_each = [&](int n, const auto& f) {
    for (int item = int(threadIdx.x); item < chains.count * n; item += kRelaxedThreads) f(item / n, item % n);
  };
  for_each(n1, [&](int c, int i) {
    grad_value(c, i) = in(p.grad_left, c, n1)[i];
    out(p.grad_left_bias, c, n1)[i] = 0;
    left_factor(c, 1)[i] = in(p.state, c, n1)[i];  // right saw this value in the first sweep
  });
  for_each(n2, [&](int c, int j) { out(p.grad_right_bias, c, n2)[j] = 0; });
  __syncthreads();  // gradients are there
  const RelaxedProduct<T, kChains, RelaxedWeight<T, kResident>> product(weight, chains.count, partial);
  const uint64_t seed = seed_of(s);
  for (int64_t sweep = sweeps; sweep-- > 0;) {
    const bool last = sweep + 1 == sweeps;
    const T beta = T(beta_at(s, chains.model, s.num_sweeps + sweep));
    const auto relaxed = [&](int c, int number, int at) {
      const T field = static_cast<const T*>(p.fields)[(sweep * total + rows[c]) * (n1 + n2) + at];
      return relax<T>(s.relaxation, field, relaxed_word(s, seed, numbers[c], sweep, number), beta, T(s.sharpness),
                      s.slope_gradient);
    };
    for_each(n1, [&](int c, int i) {
      const RelaxedUnit<T> unit = relaxed(c, i, n2 + i);
      T grad = grad_value(c, i) * unit.slope;
      if (last)
        grad += in(p.grad_left_mean, c, n1)[i] * unit.mean_slope;
      else
        left_factor(c, 2 * sweep + 3)[i] = unit.value;  // right saw this value in the next sweep
      left_factor(c, 2 * sweep)[i] = grad;
      out(p.grad_left_bias, c, n1)[i] += grad;
    });
    __syncthreads();  // gradients of left's fields are there
    const auto right_grad = [&](int c, int j) -> T& { return right_factor(c, 2 * sweep + 1)[j]; };
    product.to_right([&](int c, int i) { return left_factor(c, 2 * sweep)[i]; }, right_grad);
    for_each(n2, [&](int c, int j) {
      const RelaxedUnit<T> unit = relaxed(c, n1 + j, j);
      T& grad = right_grad(c, j);
      grad = (last ? in(p.grad_right, c, n2)[j] + grad : grad) * unit.slope;
      right_factor(c, 2 * sweep)[j] = unit.value;
      out(p.grad_right_bias, c, n2)[j] += grad;
    });
    __syncthreads();  // gradients of right's fields are there
    if (sweep > 0 || p.needs_grad_state) product.to_left(right_grad, grad_value);
  }
  for_each(n1, [&](int c, int i) { out(p.grad_state, c, n1)[i] = p.needs_grad_state ? grad_value(c, i) : T(0); });
  if (!params.sums_outer) return;
  // A lane has some columns of four rows; factors lie in shared memory.
  T* const grad_weight = static_cast<T*>(p.grad_weight) + chains.model * n1 * n2;
  constexpr int kRows = 4, kColumns = 4;
  const int factors = chains.count * 2 * int(sweeps);
  for (int first = kRows * warp(); first < n1; first += kRows * kRelaxedWarps)
    for (int begin = lane(); begin < n2; begin += kColumns * kWarpSize) {
      T sums[kRows][kColumns] = {};
      for (int f = 0; f < factors; ++f) {
        T right[kColumns];
#pragma unroll
        for (int k = 0; k < kColumns; ++k) {
          const int j = begin + k * kWarpSize;
          right[k] = j < n2 ? right_factors[f * n2 + j] : T(0);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const T left = first + r < n1 ? left_factors[f * n1 + first + r] : T(0);
#pragma unroll
          for (int k = 0; k < kColumns; ++k) sums[r][k] += left * right[k];
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int k = 0; k < kColumns; ++k)
          if (first + r < n1 && begin + k * kWarpSize < n2)
            grad_weight[int64_t{first + r} * n2 + begin + k * kWarpSize] = sums[r][k];
    }
}

struct OuterProductsParams {
  BipartiteBackwardParams call;
  int parts;
  void* sums;  // [model, part, n1, n2]
};

// A CTA owns 64 x 64 elements of one model's gradient, or of a part of it, and a thread owns 4 x 4 of them, 16 rows and columns apart.
// Shared memory holds 16 factors of either side. Synchronisation: Barriers lie between loading and using them.
// Traffic: Factors are read n2 / 64 and n1 / 64 times, and the gradient is written once. Sixteen products take eight numbers from shared memory.
// It computes grad_ij = sum over chains and sweeps, or a part of them, in their order, of left_i right_j.
template <class T>
__global__ void __launch_bounds__(kOuterThreads) outer_products_kernel(const __grid_constant__ OuterProductsParams params) {
  const BipartiteBackwardParams& p = params.call;
  SharedMemory memory;
  const Shared<T> left = memory.take<T>(kOuterFactors * kOuterTile), right = memory.take<T>(kOuterFactors * kOuterTile);
  const int64_t n1 = p.n1, n2 = p.n2, tiles_i = divide_up(n1, kOuterTile), tiles_j = divide_up(n2, kOuterTile);
  const int64_t tile = blockIdx.x % (tiles_i * tiles_j), part = blockIdx.x / (tiles_i * tiles_j), model = part / params.parts;
  const int64_t first_i = tile / tiles_j * kOuterTile, first_j = tile % tiles_j * kOuterTile;
  const BatchView& batch = p.sweep.batch;
  const int64_t factors = batch.chains_per_model * 2 * p.sweep.num_relaxed_sweeps, total = batch.num_models * factors;
  const T* const left_factors = static_cast<const T*>(p.workspace) + model * factors * n1;
  const T* const right_factors = static_cast<const T*>(p.workspace) + total * n1 + model * factors * n2;
  constexpr int kEach = 4, kApart = kOuterTile / kEach;
  const int row = int(threadIdx.x) / kApart, column = int(threadIdx.x) % kApart;
  T sums[kEach][kEach] = {};
  const int64_t first = factors * (part % params.parts) / params.parts, end = factors * (part % params.parts + 1) / params.parts;
  for (int64_t begin = first; begin < end; begin += kOuterFactors) {
#pragma unroll
    for (int at = int(threadIdx.x); at < kOuterFactors * kOuterTile; at += kOuterThreads) {
      const int64_t f = begin + at / kOuterTile, i = first_i + at % kOuterTile, j = first_j + at % kOuterTile;
      left[at] = f < end && i < n1 ? left_factors[f * n1 + i] : T(0);
      right[at] = f < end && j < n2 ? right_factors[f * n2 + j] : T(0);
    }
    __syncthreads();  // the factors are there
#pragma unroll 4
    for (int f = 0; f < kOuterFactors; ++f) {
      T of_row[kEach], of_column[kEach];
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        of_row[k] = left[f * kOuterTile + k * kApart + row];
        of_column[k] = right[f * kOuterTile + k * kApart + column];
      }
#pragma unroll
      for (int r = 0; r < kEach; ++r)
#pragma unroll
        for (int k = 0; k < kEach; ++k) sums[r][k] += of_row[r] * of_column[k];
    }
    __syncthreads();  // the factors have been used
  }
#pragma unroll
  for (int r = 0; r < kEach; ++r)
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int64_t i = first_i + r * kApart + row, j = first_j + k * kApart + column;
      if (i < n1 && j < n2) static_cast<T*>(params.sums)[(part * n1 + i) * n2 + j] = sums[r][k];
    }
}

#endif

}  // namespace gibbs
