// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <math.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "core/fixed_point.h"
#include "core/philox.h"
#include "cpu/batch.h"
#include "cpu/kernels/table.h"
#include "cpu/threads.h"

// Random batches of tensors, and ways to run a call, for all fuzz programs.
namespace gibbs {

inline std::mt19937_64 rng;
inline int64_t below(int64_t n) { return int64_t(rng() % uint64_t(n)); }
inline bool one_in(int64_t n) { return below(n) == 0; }
inline double normal() { return std::normal_distribution<double>()(rng); }

// "fuzz_graph 5000 7": 5000 trials from seed 7.
inline void for_each_trial(int argc, char** argv, int trials, const std::function<void()>& trial) {
  if (argc > 1) trials = atoi(argv[1]);
  const uint64_t first_seed = argc > 2 ? uint64_t(atoll(argv[2])) : 0;
  for (int t = 0; t < trials; ++t) {
    rng.seed(first_seed + uint64_t(t));
    trial();
  }
}

inline void run_on_threads(int64_t count, const std::function<void(int64_t)>& task) {
  std::vector<std::thread> others;
  for (int64_t i = 1; i < count; ++i) others.emplace_back(task, i);
  task(0);
  for (std::thread& t : others) t.join();
}

// Every instruction set of this machine, serially and on threads.
inline void for_each_runtime(const std::function<void(const char* instruction_set, const Runtime&)>& body) {
  for (const char* name : {"baseline", "avx2", "avx512"}) {
    if (!set_instruction_set(name)) continue;
    for (const int threads : {1, 3}) body(name, {threads, run_on_threads, nullptr});
  }
}

// A tensor [batch..., tail...] in memory of exactly the size it needs, with strides in any order, gaps and broadcast dimensions:
// a read past an element that belongs to it is a read past the allocation, or changes the result.
template <class T>
struct Tensor {
  std::vector<T> data;
  std::vector<int64_t> strides;

  Tensor() = default;
  Tensor(const std::vector<int64_t>& sizes, const std::vector<bool>& broadcast, const std::function<double()>& value)
      : strides(sizes.size(), 0) {
    std::vector<size_t> order(sizes.size());
    for (size_t d = 0; d < order.size(); ++d) order[d] = d;
    std::reverse(order.begin(), order.end());
    if (one_in(3)) std::shuffle(order.begin(), order.end(), rng);
    int64_t stride = one_in(4) ? 2 : 1, last = 0;
    for (size_t d : order) {
      if (d < broadcast.size() && broadcast[d]) continue;
      strides[d] = stride;
      last += (sizes[d] - 1) * stride;
      stride = stride * sizes[d] + (one_in(4) ? 3 : 0);
    }
    const bool empty = std::find(sizes.begin(), sizes.end(), 0) != sizes.end();
    // The contents of the gaps must not matter.
    const T gap = std::numeric_limits<T>::has_quiet_NaN ? std::numeric_limits<T>::quiet_NaN() : std::numeric_limits<T>::min();
    data.assign(size_t(empty ? 0 : last + 1), gap);
    std::vector<bool> filled(data.size());
    std::vector<int64_t> index(sizes.size());
    for (bool more = !data.empty(); more;) {
      const size_t at = size_t(offset(index));
      if (!filled[at]) data[at] = T(value());
      filled[at] = true;
      more = false;
      for (size_t d = sizes.size(); d-- > 0 && !more;) {
        more = ++index[d] < sizes[d];
        if (!more) index[d] = 0;
      }
    }
  }
  int64_t offset(const std::vector<int64_t>& index) const {
    int64_t at = 0;
    for (size_t d = 0; d < index.size(); ++d) at += index[d] * strides[d];
    return at;
  }
  Operand operand(size_t batch_dims) const {
    Operand o;
    o.data = data.data();
    o.batch_strides.assign(strides.begin(), strides.begin() + int64_t(batch_dims));
    o.stride = strides.back();
    if (strides.size() == batch_dims + 2) o.row_stride = strides[batch_dims];
    return o;
  }
};

struct RandomBatch {
  int64_t chains = 1;
  std::vector<int64_t> sizes;

  // Up to three small dimensions, at times one of many chains, `least` to `most`.
  void draw(int64_t least, int64_t most) {
    sizes.clear(), chains = 1;
    for (int64_t d = below(4); d-- > 0;) sizes.push_back(one_in(20) ? 0 : 1 + below(3));
    if (one_in(4)) sizes.push_back(least + below(most - least + 1));
    for (int64_t size : sizes) chains *= size;
  }
  std::vector<bool> some_broadcast(bool large_ones = true) const {
    std::vector<bool> broadcast;
    for (int64_t size : sizes) broadcast.push_back((large_ones && size > 20) || one_in(2));
    return broadcast;
  }
  std::vector<int64_t> shape(std::initializer_list<int64_t> tail) const {
    std::vector<int64_t> all = sizes;
    all.insert(all.end(), tail);
    return all;
  }
  // The place of element `tail` of a chain in a tensor.
  template <class T>
  size_t offset(const Tensor<T>& t, int64_t chain, std::initializer_list<int64_t> tail) const {
    int64_t at = 0;
    for (size_t d = sizes.size(); d-- > 0; chain /= sizes[d]) at += chain % sizes[d] * t.strides[d];
    size_t d = sizes.size();
    for (int64_t i : tail) at += i * t.strides[d++];
    return size_t(at);
  }
  template <class T>
  T at(const Tensor<T>& t, int64_t chain, std::initializer_list<int64_t> tail) const {
    return t.data[offset(t, chain, tail)];
  }
  // Seed, numbers of the chains and sweeps, often beyond 32 bits, and how many sweeps.
  void draw_counters(SweepCall& c) const {
    c.seed = rng();
    c.chain_offset = one_in(2) ? 0 : below(kMaxChains - chains);
    c.sweep_offset = one_in(2) ? 0 : below(kMaxSweeps - 100);
    c.num_sweeps = below(6);
  }
  // The beta of a chain in a sweep.
  double beta_of(const SweepCall& c, int64_t chain, int64_t sweep) const {
    int64_t row = 0;
    for (size_t d = c.beta_strides.size(); d-- > 0; chain /= sizes[d]) row += chain % sizes[d] * c.beta_strides[d];
    return c.beta[size_t(row + (c.num_betas > 1 ? sweep : 0))];
  }
  // Those of annealed sweeps, in which beta often stays the same from one to the next.
  void draw_annealed_betas(SweepCall& c) const {
    c.num_betas = c.num_sweeps + 1, c.beta_strides.clear();
    c.beta.resize(size_t(c.num_betas));
    for (size_t i = 0; i < c.beta.size(); ++i) c.beta[i] = i > 0 && one_in(2) ? c.beta[i - 1] : double(below(101)) / 100;
  }
  // Divides a call's sweeps into rounds where one beta allows it. Returns what comes after each.
  AfterRound draw_rounds(SweepCall& c) const {
    if (c.num_betas > 1 || !c.num_sweeps || !one_in(3)) return nullptr;
    for (const int64_t rounds : {5, 3, 2})
      if (c.num_sweeps % rounds == 0) c.num_sweeps /= rounds, c.num_rounds *= rounds;
    return [&c](int64_t) { c.sweep_offset += c.num_sweeps; };
  }
  // Draws rows of `count` betas, at times one for each index of some dimensions, which are models' then.
  void draw_betas(SweepCall& c, int64_t count, std::vector<bool>& is_model_dim, bool in_order,
                  const std::function<void(std::vector<double>&)>& draw_row) const {
    int64_t rows = 1;
    c.num_betas = count, c.beta_strides.clear();
    c.batch = Batch(sizes, is_model_dim);
    if (chains > 0 && one_in(3)) {
      const std::vector<bool> has_same_couplings = [&] {
        std::vector<bool> out = is_model_dim;
        out.flip();
        return out;
      }();
      c.beta_strides.assign(sizes.size(), 0);
      for (size_t d = sizes.size(); d-- > 0;)
        if (one_in(2)) c.beta_strides[d] = rows * count, rows *= sizes[d], is_model_dim[d] = true;
      c.batch = Batch(sizes, is_model_dim, in_order ? std::vector<bool>() : has_same_couplings);
    }
    c.beta.clear();
    for (; rows > 0; --rows) {
      std::vector<double> row(static_cast<size_t>(count));
      draw_row(row);
      c.beta.insert(c.beta.end(), row.begin(), row.end());
    }
  }
};

inline bool bit(const uint32_t* bits, int64_t i) { return bits[i / 32] >> (i % 32) & 1; }
inline void set_bit(uint32_t* bits, int64_t i, bool on) {
  bits[i / 32] = (bits[i / 32] & ~(1u << (i % 32))) | uint32_t(on) << (i % 32);
}
inline std::vector<uint32_t> random_bits(int64_t chains, int64_t n) {
  std::vector<uint32_t> bits(size_t(chains * state_words(n)));
  for (size_t w = 0; w < bits.size(); ++w) {
    const int64_t units = std::min<int64_t>(32, n - int64_t(w) % state_words(n) * 32);
    bits[w] = uint32_t(rng()) & (units == 32 ? ~0u : (1u << units) - 1);
  }
  return bits;
}

// ---- plain rewritings ----------------------------------------------------------------------------------------------------------

inline double softplus(double x) { return std::max(x, 0.0) + log1p(exp(-fabs(x))); }

// k, for couplings each between the two units that `ends` names.
inline int scale_exponent_of(const std::vector<double>& couplings, int64_t num_units, int64_t degree,
                             const std::function<std::pair<int64_t, int64_t>(int64_t)>& ends) {
  double largest = 0;
  for (double w : couplings) largest = std::max(largest, fabs(w));
  if (largest == 0) return kMaxScaleExponent;
  int e;
  frexp(largest, &e);
  std::vector<int64_t> sums(static_cast<size_t>(num_units));
  for (size_t i = 0; i < couplings.size(); ++i) {
    const int64_t q = int64_t(ceil(ldexp(fabs(couplings[i]), coupling_sum_bits(degree) - e)));
    const auto [a, b] = ends(int64_t(i));
    sums[size_t(a)] += q, sums[size_t(b)] += q;
  }
  return scale_exponent(*std::max_element(sums.begin(), sums.end()), degree, e);
}

// One relaxed update in double. frozen: the update at another point, which supplies the factors that carry no gradient.
struct RelaxedUpdate {
  double q, slope, value;
  int piece;  // of the piecewise linear one
};
inline RelaxedUpdate relax(const SweepCall& c, double x, uint32_t word, const RelaxedUpdate* frozen = nullptr) {
  const double q = 1 / (1 + exp(-x)), u = (word + 0.5) * 0x1p-32;
  RelaxedUpdate r = {q, 0, q, 0};
  if (c.relaxation == kPwl) {
    r.slope = frozen && !c.slope_gradient ? frozen->slope : c.sharpness / 4 / (q * (1 - q) + 1e-2);
    const double linear = 0.5 + r.slope * (u - (1 - q));
    r.value = std::clamp(linear, 0.0, 1.0);
    r.piece = (linear > 0) + (linear > 1);
  } else if (c.relaxation == kConcrete) {
    r.value = 1 / (1 + exp(-c.sharpness * (x + log(u / (1 - u)))));
  } else if (c.relaxation == kStraightThrough) {
    r.value = frozen ? frozen->value + (q - frozen->q) : u > 1 - q;
  }
  return r;
}

}  // namespace gibbs
