// SPDX-License-Identifier: Apache-2.0
// Random shapes, strides and values through cpu/bipartite.h. Binary sweeps and annealed ones are compared to the bit with
// the scalar functions of core/, on every instruction set and number of threads; relaxed ones in double with a plain rewriting.
#include "core/threshold.h"
#include "cpu/bipartite.h"
#include "fuzz.h"
#include "reads.h"

using namespace gibbs;

template <class T>
struct Problem : RandomBatch {
  int64_t n1, n2;
  std::vector<bool> is_model_dim;
  bool has_energies = false;
  Tensor<T> weight, left_bias, right_bias, base_left_bias, base_right_bias;
  std::vector<uint32_t> left, right, clamp_left, clamp_right;
  BipartiteCall call;

  uint64_t number(int64_t linear) const { return uint64_t(call.chain_offset + linear); }
};

template <class T>
static void draw_betas(Problem<T>& p, int64_t count, bool in_order) {
  p.draw_betas(p.call, count, p.is_model_dim, in_order, [](std::vector<double>& row) {
    const bool one = one_in(2);
    for (double& b : row) b = one && &b != &row[0] ? row[0] : one_in(10) ? 0 : normal();
  });
}

template <class T>
static Problem<T> random_problem(double largest_exponent) {
  Problem<T> p;
  do {
    const auto side = [] { return one_in(8) ? 1 + below(300) : 1 + below(one_in(2) ? 9 : 70); };
    p.n1 = side(), p.n2 = side();
    p.draw(30, one_in(2) ? 79 : 300);  // enough for tables, and for several groups
  } while (p.chains * p.n1 * p.n2 > 200000);  // the reference is slow
  const double scale = one_in(3) ? exp2(largest_exponent * (2.0 * double(below(1000)) / 999 - 1)) : exp2(double(below(5)) - 3);
  const bool equal = one_in(8);
  const std::vector<bool> shared = p.some_broadcast();
  p.weight = Tensor<T>(p.shape({p.n1, p.n2}), shared, [&] { return equal ? scale : one_in(50) ? 0.0 : scale * normal(); });
  for (Tensor<T>* bias : {&p.left_bias, &p.base_left_bias}) *bias = Tensor<T>(p.shape({p.n1}), p.some_broadcast(), normal);
  for (Tensor<T>* bias : {&p.right_bias, &p.base_right_bias}) *bias = Tensor<T>(p.shape({p.n2}), p.some_broadcast(), normal);
  p.left = random_bits(p.chains, p.n1), p.right = random_bits(p.chains, p.n2);

  BipartiteCall& c = p.call;
  c.n1 = p.n1, c.n2 = p.n2;
  for (bool b : shared) p.is_model_dim.push_back(!b);
  c.batch = Batch(p.sizes, p.is_model_dim);
  c.is_double = sizeof(T) == 8;
  c.weight = p.weight.operand(p.sizes.size());
  c.left_bias = p.left_bias.operand(p.sizes.size()), c.right_bias = p.right_bias.operand(p.sizes.size());
  c.base_left_bias = p.base_left_bias.operand(p.sizes.size()), c.base_right_bias = p.base_right_bias.operand(p.sizes.size());
  p.draw_counters(c);
  draw_betas(p, one_in(2) ? 1 : std::max<int64_t>(c.num_sweeps, 1), false);
  c.allow_tables = !one_in(4);
  c.look_up_always = one_in(2);
  c.narrow_from = one_in(2) ? 0 : 1 << 20;
  c.largest_slack = one_in(3) ? 0 : one_in(2) ? 512 : 65535;
  c.largest_single_slack = one_in(3) ? 0 : one_in(2) ? 384 : 65535;
  c.single_from = one_in(3) ? 2000 : 0;
  return p;
}

struct Result {
  std::vector<uint32_t> left, right;
  std::vector<double> log_weights, energies = {};
};

// Runs a copy of the problem's state; clamps and log weights only where the problem has them.
template <class T>
static Result run_binary(const Problem<T>& p, bool annealed, const Runtime& runtime) {
  Result r = {p.left, p.right, std::vector<double>(annealed ? size_t(p.chains) : 0)};
  BipartiteCall call = p.call;
  call.left_bits = r.left.data(), call.right_bits = r.right.data();
  call.clamp_left = p.clamp_left.empty() ? nullptr : p.clamp_left.data();
  call.clamp_right = p.clamp_right.empty() ? nullptr : p.clamp_right.data();
  call.log_weights = annealed ? r.log_weights.data() : nullptr;
  r.energies.resize(p.has_energies ? size_t(p.chains) : 0);
  if (p.has_energies) call.energies = r.energies.data();
  const AfterRound after = annealed ? nullptr : p.draw_rounds(call);
  Rounding rounding;
  const Outcome outcome = run_bipartite(call, runtime, &rounding, after);
  CHECK(outcome == Outcome::kOk, "outcome %d", int(outcome));
  return r;
}

// The contract, written out.
template <class T>
static Result reference(const Problem<T>& p, bool annealed) {
  Result r = {p.left, p.right, std::vector<double>(annealed ? size_t(p.chains) : 0)};
  const int64_t n1 = p.n1, n2 = p.n2;
  std::vector<double> weight(static_cast<size_t>(n1 * n2));
  std::vector<int64_t> coupling(weight.size());
  for (int64_t chain = 0; chain < p.chains; ++chain) {
    for (int64_t i = 0; i < n1; ++i)
      for (int64_t j = 0; j < n2; ++j) weight[size_t(i * n2 + j)] = double(p.at(p.weight, chain, {i, j}));
    const int k = scale_exponent_of(weight, n1 + n2, std::max(n1, n2), [&](int64_t e) { return std::pair(e / n2, n1 + e % n2); });
    for (size_t e = 0; e < weight.size(); ++e) coupling[e] = llrint(ldexp(weight[e], k));
    const float scale = ldexpf(1.0f, -k);

    uint32_t* left = r.left.data() + chain * state_words(n1);
    uint32_t* right = r.right.data() + chain * state_words(n2);
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
      const float beta = annealed ? float(p.call.beta[size_t(sweep + 1)]) : float(p.beta_of(p.call, chain, sweep));
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
          set_bit(bits, i, on);
        }
      }
    }
    double energy = 0;
    for (int64_t j = 0; j < n2; ++j)
      if (bit(right, j)) energy -= double(float(p.at(p.right_bias, chain, {j})));
    for (int64_t i = 0; i < n1; ++i)
      if (bit(left, i)) energy -= double(acc(true, i)) * double(scale) + double(float(p.at(p.left_bias, chain, {i})));
    if (p.has_energies) r.energies.push_back(energy);
  }
  return r;
}

template <class T>
static void fuzz_binary() {
  Problem<T> p = random_problem<T>(one_in(2) ? 40 : 115);
  const bool annealed = one_in(3);
  if (annealed) {
    p.draw_annealed_betas(p.call);
  } else {
    if (one_in(3)) p.clamp_left = random_bits(p.chains, p.n1);
    if (one_in(3)) p.clamp_right = random_bits(p.chains, p.n2);
  }
  p.has_energies = !annealed && p.call.num_sweeps && one_in(3);
  const Result expected = reference(p, annealed);
  for_each_runtime([&](const char* name, const Runtime& runtime) {
    const Result r = run_binary(p, annealed, runtime);
    const auto where = [&](const std::vector<uint32_t>& a, const std::vector<uint32_t>& b) {
      return int64_t(std::mismatch(a.begin(), a.end(), b.begin()).first - a.begin());
    };
    CHECK(r.energies == expected.energies, "%s, %d threads, %ld+%ld, %ld chains: energies", name, runtime.num_threads, p.n1, p.n2,
          p.chains);
    CHECK(r.left == expected.left, "%s, %d threads, %ld+%ld, %ld chains: left word %ld", name, runtime.num_threads, p.n1, p.n2,
          p.chains, where(r.left, expected.left));
    CHECK(r.right == expected.right, "%s, %d threads, %ld+%ld, %ld chains: right word %ld", name, runtime.num_threads, p.n1, p.n2,
          p.chains, where(r.right, expected.right));
    for (size_t i = 0; i < r.log_weights.size(); ++i) {
      double size = 1;  // terms are float32: the error goes with the largest of them
      for (int64_t a = 0; a < p.n1; ++a)
        for (int64_t b = 0; b < p.n2; ++b) size += fabs(double(p.at(p.weight, int64_t(i), {a, b})));
      CHECK(fabs(r.log_weights[i] - expected.log_weights[i]) <= 1e-5 * size * double(p.n2 + p.n1), "%s: chain %zu: %g, not %g",
            name, i, r.log_weights[i], expected.log_weights[i]);
    }
  });
}

template <class T>
static void fuzz_reads() {
  Problem<T> p = random_problem<T>(40);
  if (!p.call.num_sweeps) return;
  if (one_in(3)) p.clamp_left = random_bits(p.chains, p.n1);
  if (one_in(3)) p.clamp_right = random_bits(p.chains, p.n2);
  p.has_energies = true;
  const int64_t every = random_divisor(p.call.num_sweeps);
  std::vector<std::pair<int64_t, int64_t>> ends;
  for (int64_t i = 0; i < p.n1; ++i)
    for (int64_t j = 0; j < p.n2; ++j) ends.emplace_back(i, p.n1 + j);
  const Reads start(p.chains, {{p.n1, p.left}, {p.n2, p.right}}, ends.size());
  Reads expected = start;
  for (int64_t sweeps = every; sweeps <= p.call.num_sweeps; sweeps += every) {
    Problem<T> part = p;
    part.call.num_sweeps = sweeps;
    const Result r = reference(part, false);
    expected.expect(p.call.batch, {r.left, r.right}, r.energies, ends);
  }
  for_each_runtime([&](const char* name, const Runtime& runtime) {
    for (const bool best : {false, true}) {
      Reads found = start;
      BipartiteCall call = p.call;
      call.left_bits = found.parts[0].state.data(), call.right_bits = found.parts[1].state.data();
      call.clamp_left = p.clamp_left.empty() ? nullptr : p.clamp_left.data();
      call.clamp_right = p.clamp_right.empty() ? nullptr : p.clamp_right.data();
      Rounding rounding;
      const Outcome outcome = found.make(call, every, best, [&](const BipartiteCall& c, const AfterRound& after) {
        return run_bipartite(c, runtime, &rounding, after);
      });
      CHECK(outcome == Outcome::kOk, "outcome %d", int(outcome));
      Reads wanted = expected;
      if (!best) wanted.forget_best(start);
      CHECK(found == wanted, "%s, %d threads, %ld+%ld, %ld chains, best %d", name, runtime.num_threads, p.n1, p.n2, p.chains, best);
    }
  });
}

// Relaxed sweeps of one chain, in double.
static void relaxed_reference(const Problem<double>& p, int64_t chain, std::vector<double> left, double* out_left,
                              double* out_right, double* out_mean) {
  const BipartiteCall& c = p.call;
  std::vector<double> right(size_t(p.n2)), mean(size_t(p.n1));
  for (int64_t sweep = 0; sweep < c.num_relaxed_sweeps; ++sweep) {
    const double beta = p.beta_of(c, chain, c.num_sweeps + sweep);
    const RandomStream stream = random_stream(c.seed, p.number(chain), uint64_t(c.sweep_offset + c.num_sweeps + sweep));
    for (const bool of_left : {false, true})
      for (int64_t i = 0; i < (of_left ? p.n1 : p.n2); ++i) {
        double field = p.at(of_left ? p.left_bias : p.right_bias, chain, {i});
        for (int64_t o = 0; o < (of_left ? p.n2 : p.n1); ++o)
          field += of_left ? p.at(p.weight, chain, {i, o}) * right[size_t(o)] : p.at(p.weight, chain, {o, i}) * left[size_t(o)];
        const RelaxedUpdate r = relax(c, beta * field, random_word(stream, uint32_t(of_left ? i : p.n1 + i)));
        (of_left ? left : right)[size_t(i)] = r.value;
        if (of_left) mean[size_t(i)] = r.q;
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
  draw_betas(p, one_in(2) ? 1 : c.num_sweeps + c.num_relaxed_sweeps, true);
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
  for_each_runtime([&](const char* name, const Runtime& runtime) {
    std::vector<T> state = start, left(on_left), mean(on_left), right(on_right);
    std::vector<T> fields(size_t(c.num_relaxed_sweeps) * (on_left + on_right));
    std::vector<uint32_t> left_bits = p.left, right_bits = p.right;
    BipartiteCall call = c;
    call.state = state.data(), call.left = left.data(), call.right = right.data(), call.left_mean = mean.data();
    call.fields = fields.data(), call.left_bits = left_bits.data(), call.right_bits = right_bits.data();
    Rounding rounding;
    CHECK(run_bipartite(call, runtime, &rounding) == Outcome::kOk);
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
                "%s, %d threads, relaxation %d, output %zu: %g, not %g", name, runtime.num_threads, c.relaxation, t,
                double(now[t][i]), double(first[t][i]));
      }
  });
}

// Each fault is reported as itself, whichever thread sees it, and nothing is read or written out of bounds on the way.
template <class T>
static void fuzz_faults() {
  Problem<T> p = random_problem<T>(0);
  if (p.chains == 0) return;
  p.call.num_sweeps = 1 + below(3);
  p.call.beta = {1.0}, p.call.num_betas = 1, p.call.beta_strides.clear();
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
  Rounding rounding;
  const Outcome outcome = run_bipartite(call, {int(1 + below(3)), run_on_threads, nullptr}, &rounding);
  CHECK(outcome == fault.outcome, "outcome %d, not %d", int(outcome), int(fault.outcome));
}

static void check_interrupt() {
  Problem<float> p = random_problem<float>(0);
  while (p.chains == 0) p = random_problem<float>(0);
  p.call.num_sweeps = int64_t{1} << 40;
  p.call.beta = {1.0}, p.call.num_betas = 1, p.call.beta_strides.clear();
  BipartiteCall call = p.call;
  call.left_bits = p.left.data(), call.right_bits = p.right.data();
  Rounding rounding;
  const Outcome outcome = run_bipartite(call, {2, run_on_threads, [] { return true; }}, &rounding);
  CHECK(outcome == Outcome::kInterrupted, "outcome %d", int(outcome));
}

int main(int argc, char** argv) {
  for_each_trial(argc, argv, 200, [] {
    fuzz_binary<float>();
    fuzz_binary<double>();
    one_in(2) ? fuzz_reads<float>() : fuzz_reads<double>();
    fuzz_relaxed<float>();
    fuzz_relaxed<double>();
    fuzz_faults<float>();
    fuzz_faults<double>();
  });
  check_interrupt();
}
