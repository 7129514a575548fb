// SPDX-License-Identifier: Apache-2.0
#pragma once

// Relaxed sweeps of bipartite models and the chain rule through them (csrc/README.md, 4). twin: csrc/cpu/kernels/bipartite_relaxed.h
#include <type_traits>

#include "cuda/bipartite.h"
#include "cuda/relaxation.cuh"
#include "cuda/rounding.cuh"

namespace gibbs {

constexpr int kRelaxedThreads = 256;
constexpr int kOuterTile = 32;  // rows and columns of a CTA's part of the weight's gradient, and factors that it loads at a time
constexpr int kOuterThreads = 256;

// Leading dimension of a weight in shared memory. It is odd, so that lanes along a row and lanes along a column are in 32 banks.
GIBBS_HOST_DEVICE int64_t odd(int64_t n) { return n | 1; }

struct BipartiteRelaxedParams {
  BipartiteParams call;
  int chains_per_cta;
};
struct BipartiteBackwardKernelParams {
  BipartiteBackwardParams call;
  int chains_per_cta;
  bool sums_outer;  // the CTA has all chains of its model, and sums their outer products itself
};

// Arrays of the forward pass: what is found once for each chain, and (resident) the weight and the values of both sides.
template <class T>
struct RelaxedLayout {
  int64_t chains, weight, values;
  GIBBS_HOST_DEVICE RelaxedLayout(const BipartiteParams& p, int chains_per_cta, bool is_resident)
      : chains(chains_per_cta), weight(is_resident ? p.n1 * odd(p.n2) : 0), values(is_resident ? chains * (p.n1 + p.n2) : 0) {}
  GIBBS_HOST_DEVICE int64_t bytes() const {
    return 4 * shared_bytes<int64_t>(chains) + shared_bytes<T>(weight) + shared_bytes<T>(values);
  }
};

// Arrays of the backward pass: what is found once for each chain, the weight, and each chain's gradients of left values, which are in global memory if they do not fit;
// and each chain's factors of both sides, [2 num_relaxed_sweeps, n].
template <class T>
struct BackwardLayout {
  int64_t chains, weight, grads, left_factors, right_factors;
  GIBBS_HOST_DEVICE BackwardLayout(const BipartiteBackwardParams& p, int chains_per_cta, bool is_resident, bool sums_outer)
      : chains(chains_per_cta),
        weight(is_resident ? p.n1 * odd(p.n2) : 0),
        grads(is_resident ? chains * p.n1 : 0),
        left_factors(sums_outer ? chains * 2 * p.sweep.num_relaxed_sweeps * p.n1 : 0),
        right_factors(sums_outer ? chains * 2 * p.sweep.num_relaxed_sweeps * p.n2 : 0) {}
  GIBBS_HOST_DEVICE int64_t bytes() const {
    return 2 * shared_bytes<int64_t>(chains) + shared_bytes<T>(weight) + shared_bytes<T>(grads) + shared_bytes<T>(left_factors) +
           shared_bytes<T>(right_factors);
  }
};

#if defined(GIBBS_DEVICE)

// A weight of the parameters' dtype, in shared memory with an odd leading dimension, or in global memory.
template <class T, bool kResident>
struct RelaxedWeight;
template <class T>
struct RelaxedWeight<T, true> {
  Shared<T> weight;
  int ld;
  GIBBS_DEVICE T operator()(int i, int j) const { return weight[i * ld + j]; }
};
template <class T>
struct RelaxedWeight<T, false> {
  const T* weight;
  int64_t row_stride, stride;
  GIBBS_DEVICE T operator()(int i, int j) const { return global_load(weight + i * row_stride + j * stride); }
};

// Returns the sum over i of value(i) coupling(i). It has four interleaved parts, so that their loads wait together.
template <class T, class Value, class Coupling>
GIBBS_DEVICE T dot(int n, const Value& value, const Coupling& coupling) {
  T sum[4] = {};
  int i = 0;
#pragma unroll 1
  for (; i + 4 <= n; i += 4)
#pragma unroll
    for (int k = 0; k < 4; ++k) sum[k] += value(i + k) * coupling(i + k);
#pragma unroll 1
  for (; i < n; ++i) sum[0] += value(i) * coupling(i);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Calls out(chain, j, sum over i of value(chain, i) W_ij) for every right unit. Lanes lie along j.
template <class T, class Weight, class Value, class Out>
GIBBS_DEVICE void to_right(const Weight& weight, int n1, int n2, int chains, const Value& value, const Out& out) {
  for (int item = threadIdx.x; item < chains * n2; item += blockDim.x) {
    const int c = item / n2, j = item % n2;
    out(c, j, dot<T>(n1, [&](int i) { return value(c, i); }, [&](int i) { return weight(i, j); }));
  }
}
// Calls out(chain, i, sum over j of W_ij value(chain, j)) for every left unit. Lanes lie along i if the couplings of a column are
// in different banks; a warp takes each i if only the loads of a row are coalesced.
template <class T, bool kResident, class Weight, class Value, class Out>
GIBBS_DEVICE void to_left(const Weight& weight, int n1, int n2, int chains, const Value& value, const Out& out) {
  if constexpr (kResident) {
    for (int item = threadIdx.x; item < chains * n1; item += blockDim.x) {
      const int c = item / n1, i = item % n1;
      out(c, i, dot<T>(n2, [&](int j) { return value(c, j); }, [&](int j) { return weight(i, j); }));
    }
  } else {
    const int lane = int(threadIdx.x) % kWarpSize;
    for (int item = threadIdx.x / kWarpSize; item < chains * n1; item += blockDim.x / kWarpSize) {
      const int c = item / n1, i = item % n1;
      T sum = 0;
      for (int j = lane; j < n2; j += kWarpSize) sum += value(c, j) * weight(i, j);
      sum = warp_sum(sum);
      if (lane == 0) out(c, i, sum);
    }
  }
}

// Loads a model's weight for relaxed sweeps. A barrier must follow.
template <class T, bool kResident>
GIBBS_DEVICE RelaxedWeight<T, kResident> load_weight(const ParameterView& view, const BatchView& batch, int64_t n1, int64_t n2,
                                                     int64_t model, const Shared<T>& to) {
  const T* from = parameter_row<T>(view, batch, model, 0);
  if constexpr (kResident) {
    const int ld = int(odd(n2)), lane = int(threadIdx.x) % kWarpSize;
    for (int i = threadIdx.x / kWarpSize; i < int(n1); i += blockDim.x / kWarpSize)
      for (int j = lane; j < int(n2); j += kWarpSize) to[i * ld + j] = global_load(from + i * view.row_stride + j * view.stride);
    return {to, ld};
  } else {
    return {from, view.row_stride, view.stride};
  }
}

GIBBS_DEVICE_CALL uint32_t relaxed_word(const SweepView& s, uint64_t chain, int64_t relaxed_sweep, int64_t unit) {
  if (s.relaxation == kMeanField) return 0;
  return random_word(random_stream(seed_of(s), chain, uint64_t(s.sweep_offset + s.num_sweeps + relaxed_sweep)), uint32_t(unit));
}

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

// A CTA owns some chains of one model, whose binary sweeps, if there are any, have left their bits in p.state.
// Shared memory (resident) holds the weight and the values of both sides. Otherwise the weight stays in global memory, and the values are in the
// outputs.
// Synchronisation: A barrier follows each half sweep, between the values that it writes and the products that read them.
// Traffic: The weight, fields and values pass once. An update reads one coupling and one
// value (a broadcast) from shared memory per unit of the other side, and draws two Philox counters.
// It computes field_j = bias_j + sum_i zeta_i W_ij and zeta_j = relax(field_j, u_j).
template <class T, bool kResident>
__global__ void __launch_bounds__(kRelaxedThreads, 1)
    bipartite_relaxed_kernel(const __grid_constant__ BipartiteRelaxedParams params) {
  GIBBS_DYNAMIC_SHARED(shared);
  const BipartiteParams& p = params.call;
  const SweepView& s = p.sweep;
  const BatchView& batch = s.batch;
  const int n1 = int(p.n1), n2 = int(p.n2);
  const int64_t total = batch.num_models * batch.chains_per_model;
  const CtaChains chains(batch, params.chains_per_cta);
  SharedMemory memory(shared);
  // These take 64-bit divisions, so they are found once.
  const Shared<int64_t> rows = memory.take<int64_t>(params.chains_per_cta),
                        left_biases = memory.take<int64_t>(params.chains_per_cta),
                        right_biases = memory.take<int64_t>(params.chains_per_cta);
  const Shared<uint64_t> numbers = memory.take<uint64_t>(params.chains_per_cta);
  for (int c = threadIdx.x; c < chains.count; c += blockDim.x) {
    rows[c] = linear_number(batch, chains.model, chains.first + c);
    left_biases[c] = batch_offset(batch, p.left_bias.batch_strides, chains.model, chains.first + c);
    right_biases[c] = batch_offset(batch, p.right_bias.batch_strides, chains.model, chains.first + c);
    numbers[c] = chain_number(s, chains.model, chains.first + c);
  }
  __syncthreads();  // they are found
  const auto linear = [&](int c) { return rows[c]; };
  T *const state = static_cast<T*>(p.state), *const left_out = static_cast<T*>(p.left_relaxed),
           *const right_out = static_cast<T*>(p.right_relaxed), *const mean_out = static_cast<T*>(p.left_mean),
           *const fields = static_cast<T*>(p.fields);

  if (!s.num_sweeps)
    for (int item = threadIdx.x; item < chains.count * n1; item += blockDim.x) {
      const int c = item / n1, i = item % n1;
      const T value = parameter_row<T>(p.start, batch, chains.model, chains.first + c)[i * p.start.stride];
      if (p.start_is_bits && value != 0 && value != 1) report_fault(s, Outcome::kLeftNotBits, float(value));
      if (value - value != 0) report_fault(s, Outcome::kNonFiniteLeft);
      state[linear(c) * n1 + i] = value;
    }
  __syncthreads();  // the state is there

  const Shared<T> weight_array = kResident ? memory.template take<T>(n1 * odd(n2)) : Shared<T>();
  const auto weight = load_weight<T, kResident>(p.weight, batch, n1, n2, chains.model, weight_array);
  // The values, (chain, unit), of each side are in shared memory and in the outputs, or only in the outputs if shared memory has no
  // room.
  const Shared<T> values = kResident ? memory.template take<T>(chains.count * (n1 + n2)) : Shared<T>();
  const auto left_value = [&](int c, int i) -> T& {
    if constexpr (kResident) return values[c * n1 + i];
    return left_out[linear(c) * n1 + i];
  };
  const auto right_value = [&](int c, int j) -> T& {
    if constexpr (kResident) return values[chains.count * n1 + c * n2 + j];
    return right_out[linear(c) * n2 + j];
  };
  for (int item = threadIdx.x; item < chains.count * n1; item += blockDim.x)
    left_value(item / n1, item % n1) = state[linear(item / n1) * n1 + item % n1];
  __syncthreads();  // weight and values are there

  const auto bias_of = [&](const ParameterView& view, int64_t row, int64_t unit, Outcome fault) {
    const T bias = static_cast<const T*>(view.data)[row + unit * view.stride];
    if (bias - bias != 0) report_fault(s, fault);
    return bias;
  };
  for (int64_t sweep = 0; sweep < s.num_relaxed_sweeps; ++sweep) {
    const T beta = T(beta_at(s, s.num_sweeps + sweep));
    const auto update = [&](int c, int number, T field) {
      fields[(sweep * total + linear(c)) * (n1 + n2) + (number < n1 ? n2 + number : number - n1)] = field;
      return relax<T>(s.relaxation, field, relaxed_word(s, numbers[c], sweep, number), beta, T(s.sharpness), s.slope_gradient);
    };
    to_right<T>(weight, n1, n2, chains.count, left_value, [&](int c, int j, T sum) {
      right_value(c, j) = update(c, n1 + j, bias_of(p.right_bias, right_biases[c], j, Outcome::kNonFiniteRightBias) + sum).value;
    });
    __syncthreads();  // right's values are there
    to_left<T, kResident>(weight, n1, n2, chains.count, right_value, [&](int c, int i, T sum) {
      const RelaxedUnit<T> unit = update(c, i, bias_of(p.left_bias, left_biases[c], i, Outcome::kNonFiniteLeftBias) + sum);
      left_value(c, i) = unit.value;
      mean_out[linear(c) * n1 + i] = unit.mean;
    });
    __syncthreads();  // left's values are there
  }
  if constexpr (kResident) {
    for (int item = threadIdx.x; item < chains.count * n1; item += blockDim.x)
      left_out[linear(item / n1) * n1 + item % n1] = left_value(item / n1, item % n1);
    for (int item = threadIdx.x; item < chains.count * n2; item += blockDim.x)
      right_out[linear(item / n2) * n2 + item % n2] = right_value(item / n2, item % n2);
  }
}

// A CTA owns some chains of one model, and goes through all relaxed sweeps in reverse. For each sweep it leaves two pairs of
// factors, whose outer products sum to the weight's gradient: (d loss / d left field, right values) and (left values that right
// saw, d loss / d right field).
// Shared memory holds the weight and the gradients of left values (resident). It also holds the factors if the CTA has all chains
// of its model; then the CTA sums their products, too. Otherwise factors lie in the workspace, and outer_products_kernel sums their
// products.
// Synchronisation: A barrier lies between each product's factors and the product.
// Traffic: Fields, gradients and the weight are read once, and the weight's gradient is written once. Random words are drawn again.
// It computes g_field = g_zeta d zeta / d field, g_right = W^T g_left_field and g_left = W g_right_field.
template <class T, bool kResident>
__global__ void __launch_bounds__(kRelaxedThreads, 1)
    bipartite_backward_kernel(const __grid_constant__ BipartiteBackwardKernelParams params) {
  GIBBS_DYNAMIC_SHARED(shared);
  const BipartiteBackwardParams& p = params.call;
  const SweepView& s = p.sweep;
  const BatchView& batch = s.batch;
  const int n1 = int(p.n1), n2 = int(p.n2);
  const int64_t sweeps = s.num_relaxed_sweeps, total = batch.num_models * batch.chains_per_model;
  const CtaChains chains(batch, params.chains_per_cta);
  const BackwardLayout<T> layout(p, params.chains_per_cta, kResident, params.sums_outer);
  SharedMemory memory(shared);
  const Shared<int64_t> rows = memory.take<int64_t>(params.chains_per_cta);
  const Shared<uint64_t> numbers = memory.take<uint64_t>(params.chains_per_cta);
  for (int c = threadIdx.x; c < chains.count; c += blockDim.x) {
    rows[c] = linear_number(batch, chains.model, chains.first + c);
    numbers[c] = chain_number(s, chains.model, chains.first + c);
  }
  __syncthreads();  // they are found
  const auto linear = [&](int64_t c) { return rows[c]; };
  const auto weight = load_weight<T, kResident>(p.weight, batch, n1, n2, chains.model, memory.template take<T>(layout.weight));
  const Shared<T> grads = memory.template take<T>(layout.grads);
  // The factors of chain c, [2 sweeps, n], lie in shared memory or in the workspace, where chains are in the order of their models.
  T *left_factors, *right_factors;
  if (params.sums_outer) {
    left_factors = shared_pointer(memory.template take<T>(layout.left_factors));
    right_factors = shared_pointer(memory.template take<T>(layout.right_factors));
  } else {
    const int64_t first = (chains.model * batch.chains_per_model + chains.first) * 2 * sweeps;
    left_factors = static_cast<T*>(p.workspace) + first * n1;
    right_factors = static_cast<T*>(p.workspace) + total * 2 * sweeps * n1 + first * n2;
  }
  const auto left_factor = [&](int c, int64_t which) { return left_factors + (c * 2 * sweeps + which) * n1; };
  const auto right_factor = [&](int c, int64_t which) { return right_factors + (c * 2 * sweeps + which) * n2; };
  const auto in = [&](const void* data, int64_t c, int64_t n) { return static_cast<const T*>(data) + linear(c) * n; };
  const auto out = [&](void* data, int64_t c, int64_t n) { return static_cast<T*>(data) + linear(c) * n; };
  const auto grad_value = [&](int c, int i) -> T& {
    if constexpr (kResident) return grads[c * n1 + i];
    return out(p.grad_state, c, n1)[i];
  };
  const auto for_each = [&](int n, const auto& f) {
    for (int item = threadIdx.x; item < chains.count * n; item += blockDim.x) f(item / n, item % n);
  };
  for_each(n1, [&](int c, int i) {
    grad_value(c, i) = in(p.grad_left, c, n1)[i];
    out(p.grad_left_bias, c, n1)[i] = 0;
    left_factor(c, 1)[i] = in(p.state, c, n1)[i];  // right saw this value in the first sweep
  });
  for_each(n2, [&](int c, int j) { out(p.grad_right_bias, c, n2)[j] = 0; });
  __syncthreads();  // gradients and weight are there
  for (int64_t sweep = sweeps; sweep-- > 0;) {
    const bool last = sweep + 1 == sweeps;
    const T beta = T(beta_at(s, s.num_sweeps + sweep));
    const auto relaxed = [&](int c, int number) {
      const T* of_chain = static_cast<const T*>(p.fields) + (sweep * total + linear(c)) * (n1 + n2);
      const T field = of_chain[number < n1 ? n2 + number : number - n1];
      return relax<T>(s.relaxation, field, relaxed_word(s, numbers[c], sweep, number), beta, T(s.sharpness), s.slope_gradient);
    };
    for_each(n1, [&](int c, int i) {
      const RelaxedUnit<T> unit = relaxed(c, i);
      T grad = grad_value(c, i) * unit.slope;
      if (last)
        grad += in(p.grad_left_mean, c, n1)[i] * unit.mean_slope;
      else
        left_factor(c, 2 * sweep + 3)[i] = unit.value;  // right saw this value in the next sweep
      left_factor(c, 2 * sweep)[i] = grad;
      out(p.grad_left_bias, c, n1)[i] += grad;
    });
    __syncthreads();  // gradients of left's fields are there
    to_right<T>(
        weight, n1, n2, chains.count, [&](int c, int i) { return left_factor(c, 2 * sweep)[i]; },
        [&](int c, int j, T sum) {
          const RelaxedUnit<T> unit = relaxed(c, n1 + j);
          const T grad = (last ? in(p.grad_right, c, n2)[j] + sum : sum) * unit.slope;
          right_factor(c, 2 * sweep)[j] = unit.value;
          right_factor(c, 2 * sweep + 1)[j] = grad;
          out(p.grad_right_bias, c, n2)[j] += grad;
        });
    __syncthreads();  // gradients of right's fields are there
    if (sweep > 0 || p.needs_grad_state)
      to_left<T, kResident>(
          weight, n1, n2, chains.count, [&](int c, int j) { return right_factor(c, 2 * sweep + 1)[j]; },
          [&](int c, int i, T sum) { grad_value(c, i) = sum; });
    __syncthreads();  // gradients of left's values are there
  }
  for_each(n1, [&](int c, int i) { out(p.grad_state, c, n1)[i] = p.needs_grad_state ? grad_value(c, i) : T(0); });
  if (!params.sums_outer) return;
  T* const grad_weight = static_cast<T*>(p.grad_weight) + chains.model * n1 * n2;
  const int factors = chains.count * 2 * int(sweeps);  // they lie in shared memory
  for (int i = threadIdx.x / kWarpSize; i < n1; i += blockDim.x / kWarpSize)
    for (int j = threadIdx.x % kWarpSize; j < n2; j += kWarpSize)
      grad_weight[int64_t{i} * n2 + j] =
          dot<T>(factors, [&](int f) { return left_factors[f * n1 + i]; }, [&](int f) { return right_factors[f * n2 + j]; });
}

// A CTA owns 32 x 32 elements of one model's gradient, and a thread owns four rows of a column.
// Shared memory holds 32 factors of either side. Synchronisation: Barriers lie between loading and using them.
// Traffic: Factors are read n2 / 32 and n1 / 32 times, and the gradient is written once.
// It computes grad_ij = sum over chains and sweeps, in their order, of left_i right_j.
template <class T>
__global__ void __launch_bounds__(kOuterThreads) outer_products_kernel(const __grid_constant__ BipartiteBackwardParams p) {
  GIBBS_DYNAMIC_SHARED(shared);
  SharedMemory memory(shared);
  const Shared<T> left = memory.template take<T>(kOuterTile * kOuterTile), right = memory.template take<T>(kOuterTile * kOuterTile);
  const int64_t n1 = p.n1, n2 = p.n2, tiles_i = (n1 + kOuterTile - 1) / kOuterTile, tiles_j = (n2 + kOuterTile - 1) / kOuterTile;
  const int64_t tile = blockIdx.x % (tiles_i * tiles_j), model = blockIdx.x / (tiles_i * tiles_j);
  const int64_t first_i = tile / tiles_j * kOuterTile, first_j = tile % tiles_j * kOuterTile;
  const BatchView& batch = p.sweep.batch;
  const int64_t factors = batch.chains_per_model * 2 * p.sweep.num_relaxed_sweeps, total = batch.num_models * factors;
  const T* const left_factors = static_cast<const T*>(p.workspace) + model * factors * n1;
  const T* const right_factors = static_cast<const T*>(p.workspace) + total * n1 + model * factors * n2;
  constexpr int kRows = kOuterTile * kOuterTile / kOuterThreads;
  const int column = int(threadIdx.x) % kOuterTile, row = int(threadIdx.x) / kOuterTile * kRows;
  T sum[kRows] = {};
  for (int64_t begin = 0; begin < factors; begin += kOuterTile) {
    for (int at = threadIdx.x; at < kOuterTile * kOuterTile; at += kOuterThreads) {
      const int64_t f = begin + at / kOuterTile, i = first_i + at % kOuterTile, j = first_j + at % kOuterTile;
      left[at] = f < factors && i < n1 ? left_factors[f * n1 + i] : T(0);
      right[at] = f < factors && j < n2 ? right_factors[f * n2 + j] : T(0);
    }
    __syncthreads();  // the factors are there
    for (int f = 0; f < kOuterTile; ++f)
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum[r] += left[f * kOuterTile + row + r] * right[f * kOuterTile + column];
    __syncthreads();  // the factors have been used
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (first_i + row + r < n1 && first_j + column < n2)
      static_cast<T*>(p.grad_weight)[(model * n1 + first_i + row + r) * n2 + first_j + column] = sum[r];
}

#endif

}  // namespace gibbs
