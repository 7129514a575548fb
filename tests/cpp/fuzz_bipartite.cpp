// SPDX-License-Identifier: Apache-2.0
// Random shapes, strides and values through cpu/bipartite_driver.h. Binary sweeps and annealed ones are compared to the bit with
// the scalar functions of core/, on every instruction set and number of threads; relaxed ones in double with a plain rewriting.
// "fuzz_bipartite 5000 7": 5000 trials from seed 7.
#include <math.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "core/fixed_point.h"
#include "core/philox.h"
#include "core/threshold.h"
#include "cpu/bipartite_driver.h"

using namespace gibbs;

static std::mt19937_64 rng;
static int64_t below(int64_t n) { return int64_t(rng() % uint64_t(n)); }
static bool one_in(int64_t n) { return below(n) == 0; }
static double normal() { return std::normal_distribution<double>()(rng); }

static void run_on_threads(int64_t count, const std::function<void(int64_t)>& task) {
  std::vector<std::thread> others;
  for (int64_t i = 1; i < count; ++i) others.emplace_back(task, i);
  task(0);
  for (std::thread& t : others) t.join();
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
    // what lies in the gaps must not matter
    const bool empty = std::find(sizes.begin(), sizes.end(), 0) != sizes.end();
    data.assign(size_t(empty ? 0 : last + 1), std::numeric_limits<T>::quiet_NaN());
    std::vector<int64_t> index(sizes.size());
    for (bool more = !data.empty(); more;) {
      T& x = data[size_t(offset(index))];
      if (isnan(x)) x = T(value());
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

template <class T>
struct Problem {
  int64_t n1, n2, chains = 1;
  std::vector<int64_t> sizes;  // of the batch
  Tensor<T> weight, left_bias, right_bias, base_left_bias, base_right_bias;
  std::vector<uint32_t> left, right, clamp_left, clamp_right;
  BipartiteCall call;

  // Where element `tail` of a chain lies in a tensor.
  size_t offset(const Tensor<T>& t, int64_t chain, std::initializer_list<int64_t> tail) const {
    int64_t at = 0;
    for (size_t d = sizes.size(); d-- > 0; chain /= sizes[d]) at += chain % sizes[d] * t.strides[d];
    size_t d = sizes.size();
    for (int64_t i : tail) at += i * t.strides[d++];
    return size_t(at);
  }
  T at(const Tensor<T>& t, int64_t chain, std::initializer_list<int64_t> tail) const { return t.data[offset(t, chain, tail)]; }
  uint64_t number(int64_t linear) const { return uint64_t(call.chain_offset + linear); }
  float beta(int64_t sweep) const { return float(call.beta.size() > 1 ? call.beta[size_t(sweep)] : call.beta[0]); }
};

static std::vector<uint32_t> random_bits(int64_t chains, int64_t n) {
  std::vector<uint32_t> bits(size_t(chains * state_words(n)));
  for (size_t w = 0; w < bits.size(); ++w) {
    const int64_t units = std::min<int64_t>(32, n - int64_t(w) % state_words(n) * 32);
    bits[w] = uint32_t(rng()) & (units == 32 ? ~0u : (1u << units) - 1);
  }
  return bits;
}

template <class T>
static Problem<T> random_problem(double largest_exponent) {
  Problem<T> p;
  do {
    p.sizes.clear(), p.chains = 1;
    const auto side = [] { return one_in(8) ? 1 + below(300) : 1 + below(one_in(2) ? 9 : 70); };
    p.n1 = side(), p.n2 = side();
    for (int64_t d = below(4); d-- > 0;) p.sizes.push_back(one_in(20) ? 0 : 1 + below(3));
    if (one_in(4)) p.sizes.push_back(30 + below(50));  // enough chains for tables
    for (int64_t size : p.sizes) p.chains *= size;
  } while (p.chains * p.n1 * p.n2 > 200000);  // the reference is slow
  const auto some_broadcast = [&] {
    std::vector<bool> broadcast;
    for (size_t d = 0; d < p.sizes.size(); ++d) broadcast.push_back(p.sizes[d] > 20 || one_in(2));
    return broadcast;
  };
  const auto shape = [&](std::initializer_list<int64_t> tail) {
    std::vector<int64_t> all = p.sizes;
    all.insert(all.end(), tail);
    return all;
  };
  const double scale = one_in(3) ? exp2(largest_exponent * (2.0 * double(below(1000)) / 999 - 1)) : exp2(double(below(5)) - 3);
  const bool equal = one_in(8);
  const std::vector<bool> shared = some_broadcast();
  p.weight = Tensor<T>(shape({p.n1, p.n2}), shared, [&] { return equal ? scale : one_in(50) ? 0.0 : scale * normal(); });
  for (Tensor<T>* bias : {&p.left_bias, &p.base_left_bias}) *bias = Tensor<T>(shape({p.n1}), some_broadcast(), normal);
  for (Tensor<T>* bias : {&p.right_bias, &p.base_right_bias}) *bias = Tensor<T>(shape({p.n2}), some_broadcast(), normal);
  p.left = random_bits(p.chains, p.n1), p.right = random_bits(p.chains, p.n2);

  BipartiteCall& c = p.call;
  c.n1 = p.n1, c.n2 = p.n2;
  std::vector<bool> is_model_dim;
  for (bool b : shared) is_model_dim.push_back(!b);
  c.batch = Batch(p.sizes, is_model_dim);
  c.is_double = sizeof(T) == 8;
  c.weight = p.weight.operand(p.sizes.size());
  c.left_bias = p.left_bias.operand(p.sizes.size()), c.right_bias = p.right_bias.operand(p.sizes.size());
  c.base_left_bias = p.base_left_bias.operand(p.sizes.size()), c.base_right_bias = p.base_right_bias.operand(p.sizes.size());
  c.seed = rng();
  c.chain_offset = one_in(2) ? 0 : below(kMaxChains - p.chains);
  c.sweep_offset = one_in(2) ? 0 : below(kMaxSweeps - 100);
  c.num_sweeps = below(6);
  c.beta.resize(one_in(2) ? 1 : size_t(std::max<int64_t>(c.num_sweeps, 1)));
  for (double& b : c.beta) b = one_in(10) ? 0 : normal();
  c.allow_tables = !one_in(4);
  c.narrow_from = one_in(2) ? 0 : 1 << 20;
  return p;
}

struct Result {
  std::vector<uint32_t> left, right;
  std::vector<double> log_weights;
};

// Runs a copy of the problem's state; clamps and log weights only where the problem has them.
template <class T>
static Result run_binary(const Problem<T>& p, bool annealed, int threads) {
  Result r = {p.left, p.right, std::vector<double>(annealed ? size_t(p.chains) : 0)};
  BipartiteCall call = p.call;
  call.left_bits = r.left.data(), call.right_bits = r.right.data();
  call.clamp_left = p.clamp_left.empty() ? nullptr : p.clamp_left.data();
  call.clamp_right = p.clamp_right.empty() ? nullptr : p.clamp_right.data();
  call.log_weights = annealed ? r.log_weights.data() : nullptr;
  double resolution;
  const Outcome outcome = run_bipartite(call, {threads, run_on_threads, nullptr}, &resolution);
  CHECK(outcome == Outcome::kOk, "outcome %d", int(outcome));
  return r;
}

static double softplus(double x) { return std::max(x, 0.0) + log1p(exp(-fabs(x))); }

// The contract, written out.
template <class T>
static Result reference(const Problem<T>& p, bool annealed) {
  Result r = {p.left, p.right, std::vector<double>(annealed ? size_t(p.chains) : 0)};
  const int64_t n1 = p.n1, n2 = p.n2, degree = std::max(n1, n2);
  std::vector<int64_t> coupling(size_t(n1 * n2)), sums(size_t(n1 + n2));
  for (int64_t chain = 0; chain < p.chains; ++chain) {
    const auto weight = [&](int64_t i, int64_t j) { return double(p.at(p.weight, chain, {i, j})); };
    double largest = 0;
    for (int64_t i = 0; i < n1; ++i)
      for (int64_t j = 0; j < n2; ++j) largest = std::max(largest, fabs(weight(i, j)));
    int k = kMaxScaleExponent, e = 0;
    if (largest > 0) {
      frexp(largest, &e);
      std::fill(sums.begin(), sums.end(), 0);
      for (int64_t i = 0; i < n1; ++i)
        for (int64_t j = 0; j < n2; ++j) {
          const int64_t q = int64_t(ceil(ldexp(fabs(weight(i, j)), coupling_sum_bits(degree) - e)));
          sums[size_t(i)] += q, sums[size_t(n1 + j)] += q;
        }
      k = scale_exponent(*std::max_element(sums.begin(), sums.end()), degree, e);
    }
    for (int64_t i = 0; i < n1; ++i)
      for (int64_t j = 0; j < n2; ++j) coupling[size_t(i * n2 + j)] = llrint(ldexp(weight(i, j), k));
    const float scale = ldexpf(1.0f, -k);

    uint32_t* left = r.left.data() + chain * state_words(n1);
    uint32_t* right = r.right.data() + chain * state_words(n2);
    const auto bit = [](const uint32_t* bits, int64_t i) { return bits[i / 32] >> (i % 32) & 1; };
    const auto acc = [&](bool of_left, int64_t unit) {
      int64_t sum = 0;
      for (int64_t o = 0; o < (of_left ? n2 : n1); ++o)
        if (bit(of_left ? right : left, o)) sum += coupling[size_t(of_left ? unit * n2 + o : o * n2 + unit)];
      CHECK(sum >= -0x7fffffff && sum <= 0x7fffffff, "sum %lld", (long long)sum);
      return int32_t(sum);
    };
    const auto logit = [&](bool of_left, int64_t unit, float beta) {
      const float bias = float(p.at(of_left ? p.left_bias : p.right_bias, chain, {unit}));
      const float base = float(p.at(of_left ? p.base_left_bias : p.base_right_bias, chain, {unit}));
      const float x = binary_logit(acc(of_left, unit), scale, bias, beta);
      return annealed ? x + (1.0f - beta) * base : x;
    };
    for (int64_t sweep = 0; sweep < p.call.num_sweeps; ++sweep) {
      const float beta = annealed ? float(p.call.beta[size_t(sweep + 1)]) : p.beta(sweep);
      if (annealed) {
        const float last = float(p.call.beta[size_t(sweep)]);
        double& total = r.log_weights[size_t(chain)];
        for (int64_t j = 0; j < n2; ++j) total += softplus(logit(false, j, beta)) - softplus(logit(false, j, last));
        for (int64_t i = 0; i < n1; ++i)
          if (bit(left, i))
            total += (double(beta) - double(last)) *
                     (double(float(p.at(p.left_bias, chain, {i}))) - double(float(p.at(p.base_left_bias, chain, {i}))));
      }
      const RandomStream stream = random_stream(p.call.seed, p.number(chain), uint64_t(p.call.sweep_offset + sweep));
      for (const bool of_left : {false, true}) {
        uint32_t* bits = of_left ? left : right;
        const std::vector<uint32_t>& clamp = of_left ? p.clamp_left : p.clamp_right;
        for (int64_t i = 0; i < (of_left ? n1 : n2); ++i) {
          if (!clamp.empty() && bit(clamp.data() + chain * state_words(of_left ? n1 : n2), i)) continue;
          const bool on = random_word(stream, uint32_t(of_left ? i : n1 + i)) < threshold(logit(of_left, i, beta));
          bits[i / 32] = (bits[i / 32] & ~(1u << (i % 32))) | uint32_t(on) << (i % 32);
        }
      }
    }
  }
  return r;
}

static const char* const kInstructionSets[] = {"baseline", "avx2", "avx512"};

template <class T>
static void fuzz_binary() {
  Problem<T> p = random_problem<T>(one_in(2) ? 40 : 115);
  const bool annealed = one_in(3);
  if (annealed) {
    p.call.beta.resize(size_t(p.call.num_sweeps + 1));
    for (double& b : p.call.beta) b = double(below(101)) / 100;
  } else {
    if (one_in(3)) p.clamp_left = random_bits(p.chains, p.n1);
    if (one_in(3)) p.clamp_right = random_bits(p.chains, p.n2);
  }
  const Result expected = reference(p, annealed);
  for (const char* name : kInstructionSets) {
    if (!set_instruction_set(name)) continue;
    for (const int threads : {1, 3}) {
      const Result r = run_binary(p, annealed, threads);
      const auto where = [&](const std::vector<uint32_t>& a, const std::vector<uint32_t>& b) {
        return int64_t(std::mismatch(a.begin(), a.end(), b.begin()).first - a.begin());
      };
      CHECK(r.left == expected.left, "%s, %d threads, %ld+%ld, %ld chains: left word %ld", name, threads, p.n1, p.n2, p.chains,
            where(r.left, expected.left));
      CHECK(r.right == expected.right, "%s, %d threads, %ld+%ld, %ld chains: right word %ld", name, threads, p.n1, p.n2, p.chains,
            where(r.right, expected.right));
      for (size_t i = 0; i < r.log_weights.size(); ++i) {
        double size = 1;  // terms are float32: the error goes with the largest of them
        for (int64_t a = 0; a < p.n1; ++a)
          for (int64_t b = 0; b < p.n2; ++b) size += fabs(double(p.at(p.weight, int64_t(i), {a, b})));
        CHECK(fabs(r.log_weights[i] - expected.log_weights[i]) <= 1e-5 * size * double(p.n2 + p.n1), "%s: chain %zu: %g, not %g",
              name, i, r.log_weights[i], expected.log_weights[i]);
      }
    }
  }
}

// Relaxed sweeps of one chain, in double.
static void relaxed_reference(const Problem<double>& p, int64_t chain, std::vector<double> left, double* out_left,
                              double* out_right, double* out_mean) {
  const BipartiteCall& c = p.call;
  std::vector<double> right(size_t(p.n2)), mean(size_t(p.n1));
  for (int64_t sweep = 0; sweep < c.num_relaxed_sweeps; ++sweep) {
    const double beta = c.beta.size() > 1 ? c.beta[size_t(c.num_sweeps + sweep)] : c.beta[0];
    const RandomStream stream = random_stream(c.seed, p.number(chain), uint64_t(c.sweep_offset + c.num_sweeps + sweep));
    for (const bool of_left : {false, true})
      for (int64_t i = 0; i < (of_left ? p.n1 : p.n2); ++i) {
        double field = p.at(of_left ? p.left_bias : p.right_bias, chain, {i});
        for (int64_t o = 0; o < (of_left ? p.n2 : p.n1); ++o)
          field += of_left ? p.at(p.weight, chain, {i, o}) * right[size_t(o)] : p.at(p.weight, chain, {o, i}) * left[size_t(o)];
        const double q = 1 / (1 + exp(-beta * field));
        const double u = (random_word(stream, uint32_t(of_left ? i : p.n1 + i)) + 0.5) * 0x1p-32;
        double value = q;
        if (c.relaxation == kPwl)
          value = std::clamp(0.5 + c.sharpness / 4 / (q * (1 - q) + 1e-2) * (u - (1 - q)), 0.0, 1.0);
        else if (c.relaxation == kConcrete)
          value = 1 / (1 + exp(-c.sharpness * (beta * field + log(u / (1 - u)))));
        else if (c.relaxation == kStraightThrough)
          value = u > 1 - q;
        (of_left ? left : right)[size_t(i)] = value;
        if (of_left) mean[size_t(i)] = q;
      }
  }
  std::copy(left.begin(), left.end(), out_left);
  std::copy(right.begin(), right.end(), out_right);
  std::copy(mean.begin(), mean.end(), out_mean);
}

template <class T>
static void fuzz_relaxed() {
  Problem<T> p = random_problem<T>(0);
  BipartiteCall& c = p.call;
  c.num_relaxed_sweeps = 1 + below(3);
  if (c.beta.size() > 1) c.beta.resize(size_t(c.num_sweeps + c.num_relaxed_sweeps), 0.7);
  c.relaxation = Relaxation(below(kNumRelaxations));
  c.sharpness = 0.5 + double(below(10));
  c.slope_gradient = one_in(2);
  const size_t on_left = size_t(p.chains * p.n1), on_right = size_t(p.chains * p.n2);
  std::vector<T> start(on_left), grad_left(on_left), grad_mean(on_left), grad_right(on_right);
  for (T& x : start) x = T(below(2));
  for (std::vector<T>* grad : {&grad_left, &grad_mean, &grad_right})
    for (T& g : *grad) g = T(normal());

  std::vector<std::vector<T>> first;
  const double tolerance = sizeof(T) == 8 ? 1e-9 : 1e-2;
  for (const char* name : kInstructionSets) {
    if (!set_instruction_set(name)) continue;
    for (const int threads : {1, 3}) {
      const Runtime runtime = {threads, run_on_threads, nullptr};
      std::vector<T> state = start, left(on_left), mean(on_left), right(on_right);
      std::vector<T> fields(size_t(c.num_relaxed_sweeps) * (on_left + on_right));
      std::vector<uint32_t> left_bits = p.left, right_bits = p.right;
      BipartiteCall call = c;
      call.state = state.data(), call.left = left.data(), call.right = right.data(), call.left_mean = mean.data();
      call.fields = fields.data(), call.left_bits = left_bits.data(), call.right_bits = right_bits.data();
      double resolution;
      CHECK(run_bipartite(call, runtime, &resolution) == Outcome::kOk);
      if constexpr (sizeof(T) == 8) {
        std::vector<double> l(on_left), r(on_right), m(on_left);
        for (int64_t chain = 0; chain < p.chains; ++chain)
          relaxed_reference(p, chain, {state.begin() + chain * p.n1, state.begin() + (chain + 1) * p.n1}, l.data() + chain * p.n1,
                            r.data() + chain * p.n2, m.data() + chain * p.n1);
        for (size_t i = 0; i < on_left; ++i) {
          CHECK(fabs(left[i] - l[i]) < 1e-9, "%s, relaxation %d: left %zu: %g, not %g", name, c.relaxation, i, left[i], l[i]);
          CHECK(fabs(mean[i] - m[i]) < 1e-9, "%s, relaxation %d: mean %zu: %g, not %g", name, c.relaxation, i, mean[i], m[i]);
        }
        for (size_t i = 0; i < on_right; ++i)
          CHECK(fabs(right[i] - r[i]) < 1e-9, "%s, relaxation %d: right %zu: %g, not %g", name, c.relaxation, i, right[i], r[i]);
      }

      std::vector<T> grad_state(on_left), grad_left_bias(on_left), grad_right_bias(on_right);
      std::vector<T> grad_weight(size_t(c.batch.num_models() * p.n1 * p.n2));
      const BipartiteBackwardCall back = {call,
                                          grad_left.data(),
                                          grad_right.data(),
                                          grad_mean.data(),
                                          grad_state.data(),
                                          grad_left_bias.data(),
                                          grad_right_bias.data(),
                                          grad_weight.data(),
                                          true};
      CHECK(run_bipartite_backward(back, runtime) == Outcome::kOk);

      const std::vector<std::vector<T>> now = {left, right, mean, state, grad_state, grad_left_bias, grad_right_bias, grad_weight};
      if (first.empty()) first = now;
      for (size_t t = 0; t < now.size(); ++t)
        for (size_t i = 0; i < now[t].size(); ++i) {
          CHECK(isfinite(now[t][i]), "%s, output %zu", name, t);
          // float's last bits may move a value over a kink or a step
          if (sizeof(T) == 8)
            CHECK(fabs(now[t][i] - first[t][i]) <= tolerance * (1 + fabs(first[t][i])),
                  "%s, %d threads, relaxation %d, output %zu: %g, not %g", name, threads, c.relaxation, t, double(now[t][i]),
                  double(first[t][i]));
        }
    }
  }
}

// Each fault is reported as what it is, from whatever thread, and nothing is read or written out of bounds on the way.
template <class T>
static void fuzz_faults() {
  Problem<T> p = random_problem<T>(0);
  if (p.chains == 0) return;
  p.call.num_sweeps = 1 + below(3);
  p.call.beta = {1.0};
  const T bad = one_in(2) ? std::numeric_limits<T>::quiet_NaN() : std::numeric_limits<T>::infinity();
  const struct {
    Tensor<T>* tensor;
    T value;
    Outcome outcome;
  } faults[] = {{&p.weight, bad, Outcome::kNonFiniteWeight},
                {&p.weight, T(-0x1p127), Outcome::kTooLargeWeight},
                {&p.left_bias, bad, Outcome::kNonFiniteLeftBias},
                {&p.right_bias, -bad, Outcome::kNonFiniteRightBias}};
  const auto& fault = faults[below(4)];
  const int64_t chain = below(p.chains), unit = below(fault.tensor == &p.right_bias ? p.n2 : p.n1);
  const size_t at =
      fault.tensor == &p.weight ? p.offset(p.weight, chain, {unit, below(p.n2)}) : p.offset(*fault.tensor, chain, {unit});
  fault.tensor->data[at] = fault.value;
  BipartiteCall call = p.call;
  call.left_bits = p.left.data(), call.right_bits = p.right.data();
  double resolution;
  const Outcome outcome = run_bipartite(call, {int(1 + below(3)), run_on_threads, nullptr}, &resolution);
  CHECK(outcome == fault.outcome, "outcome %d, not %d", int(outcome), int(fault.outcome));
}

static void check_interrupt() {
  Problem<float> p = random_problem<float>(0);
  while (p.chains == 0) p = random_problem<float>(0);
  p.call.num_sweeps = int64_t{1} << 40;
  p.call.beta = {1.0};
  BipartiteCall call = p.call;
  call.left_bits = p.left.data(), call.right_bits = p.right.data();
  double resolution;
  const Outcome outcome = run_bipartite(call, {2, run_on_threads, [] { return true; }}, &resolution);
  CHECK(outcome == Outcome::kInterrupted, "outcome %d", int(outcome));
}

int main(int argc, char** argv) {
  const int trials = argc > 1 ? atoi(argv[1]) : 200;
  const uint64_t first_seed = argc > 2 ? uint64_t(atoll(argv[2])) : 0;
  for (int trial = 0; trial < trials; ++trial) {
    rng.seed(first_seed + uint64_t(trial));
    fuzz_binary<float>();
    fuzz_binary<double>();
    fuzz_relaxed<float>();
    fuzz_relaxed<double>();
    fuzz_faults<float>();
    fuzz_faults<double>();
  }
  check_interrupt();
}
