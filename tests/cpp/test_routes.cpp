// SPDX-License-Identifier: Apache-2.0
// Compares the routes of binary sweeps (flipped rows, tables, narrow and coarse couplings, single chains) to the bit, over enough
// updates to meet the rare units that a route's shortcut does not decide. "test_routes 20" makes 20 times as many sweeps.
#include <math.h>

#include <algorithm>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "core/macros.h"
#include "cpu/bipartite.h"

#if GIBBS_X86
#include <xmmintrin.h>
#endif

using namespace gibbs;

static std::mt19937_64 rng(1);

template <class T>
struct Model {
  int64_t n1, n2, chains;
  std::vector<T> weight, left_bias, right_bias;
  double beta;
};

// Makes every coupling lose nearly half a narrow unit in the same direction, so that sums are as far off as they can be.
template <class T>
static void make_worst(std::vector<T>& weight, double largest) {
  const double unit = exp2(ceil(log2(largest)) - 15);
  for (T& w : weight) w = T((floor(w / unit) + 0.49) * unit);
}

template <class T>
static std::vector<uint32_t> run(const Model<T>& m, int64_t num_sweeps, bool tables, bool narrow, int largest_slack = 0,
                                 std::atomic<int64_t>* num_coarse_groups = nullptr, const Runtime& runtime = {1, nullptr, nullptr},
                                 int largest_single_slack = 0) {
  // A chain has biases of its own if there are enough.
  const bool own_bias = int64_t(m.left_bias.size()) == m.chains * m.n1;
  BipartiteCall call;
  call.n1 = m.n1, call.n2 = m.n2;
  call.batch = Batch({m.chains}, {false});
  call.is_double = sizeof(T) == 8;
  call.weight = {m.weight.data(), {0}, 1, m.n2};
  call.left_bias = {m.left_bias.data(), {own_bias ? m.n1 : 0}, 1, 0};
  call.right_bias = {m.right_bias.data(), {own_bias ? m.n2 : 0}, 1, 0};
  call.num_sweeps = num_sweeps;
  call.seed = 5;
  call.beta = {m.beta};
  call.allow_tables = tables;
  call.narrow_from = narrow ? 0 : 1 << 20;
  call.largest_slack = largest_slack;
  call.num_coarse_groups = num_coarse_groups;
  call.look_up_always = num_coarse_groups && !largest_single_slack;
  call.largest_single_slack = largest_single_slack, call.single_from = 0;
  std::vector<uint32_t> left(size_t(m.chains * state_words(m.n1)), 0x5555), right(size_t(m.chains * state_words(m.n2)));
  for (int64_t c = 0; c < m.chains; ++c)  // no bits beyond the last unit
    left[size_t((c + 1) * state_words(m.n1) - 1)] = 0;
  call.left_bits = left.data(), call.right_bits = right.data();
  Rounding rounding;
  CHECK(run_bipartite(call, runtime, &rounding) == Outcome::kOk);
  left.insert(left.end(), right.begin(), right.end());
  return left;
}

// By coarse couplings, whatever their slack, wherever the instruction set has them.
template <class T>
static std::vector<uint32_t> run_coarse(const Model<T>& m, int64_t num_sweeps, bool may_serve = true) {
  std::atomic<int64_t> groups = 0;
  std::vector<uint32_t> bits = run(m, num_sweeps, true, false, 65535, &groups);
  CHECK((groups > 0) == (may_serve && (kernels().sweep_coarse || kernels().sweep_lookup)),
        "%d groups took coarse couplings: n %d + %d, beta %g", int(groups), int(m.n1), int(m.n2), m.beta);
  return bits;
}

// The same by fields of 16 bits of single chains.
template <class T>
static std::vector<uint32_t> run_single(const Model<T>& m, int64_t num_sweeps, bool may_serve = true,
                                        const Runtime& runtime = {1, nullptr, nullptr}) {
  std::atomic<int64_t> chains = 0;
  std::vector<uint32_t> bits = run(m, num_sweeps, false, false, 0, &chains, runtime, 65535);
  CHECK(chains == (may_serve && kernels().sweep_single ? m.chains : 0), "%d chains were swept one by one: n %d + %d, beta %g",
        int(chains), int(m.n1), int(m.n2), m.beta);
  return bits;
}

template <class T>
static void compare(int64_t n1, int64_t n2, double scale, double bias_scale, double beta, bool worst, int64_t num_sweeps) {
  std::normal_distribution<double> normal;
  Model<T> m{n1, n2, 4, {}, {}, {}, beta};
  for (int64_t i = 0; i < n1 * n2; ++i) m.weight.push_back(T(scale * normal(rng)));
  if (worst) {
    double largest = 0;
    for (T w : m.weight) largest = std::max(largest, fabs(double(w)));
    make_worst(m.weight, largest);
  }
  for (int64_t i = 0; i < n1; ++i) m.left_bias.push_back(T(bias_scale * normal(rng)));
  for (int64_t i = 0; i < n2; ++i) m.right_bias.push_back(T(bias_scale * normal(rng)));
  if (worst) {  // biases that bring the fields back to where a unit can go either way
    const double lift = -0.25 * double(n1 + n2) * exp2(-15) * scale;
    for (T& b : m.left_bias) b += T(lift);
    for (T& b : m.right_bias) b += T(lift);
  }
  const std::vector<uint32_t> wide = run(m, num_sweeps, false, false);
  CHECK(run(m, num_sweeps, false, true) == wide, "n %d + %d, scale %g, bias %g, beta %g, worst %d", int(n1), int(n2), scale,
        bias_scale, beta, worst);
  CHECK(run_single(m, num_sweeps) == wide, "single: n %d + %d, scale %g, bias %g, beta %g, worst %d", int(n1), int(n2), scale,
        bias_scale, beta, worst);
  m.chains = 40;
  const std::vector<uint32_t> by_rows = run(m, num_sweeps / 8, false, false);
  CHECK(run(m, num_sweeps / 8, true, false) == by_rows, "tables: n %d + %d, scale %g", int(n1), int(n2), scale);
  CHECK(run_coarse(m, num_sweeps / 8) == by_rows, "coarse: n %d + %d, scale %g, bias %g, beta %g, worst %d", int(n1), int(n2),
        scale, bias_scale, beta, worst);
}

// All couplings are equal, so they are all rounded in the same direction, for some n by nearly a half; and nearly all left units
// are 1.
static void compare_equal(int64_t n, int64_t num_sweeps) {
  Model<float> m{n, 64, 40, {}, {}, {}, 1};
  m.weight.assign(size_t(n * m.n2), 0.25f);
  m.left_bias.assign(size_t(n), 4.0f);
  m.right_bias.assign(size_t(m.n2), -0.2499f * float(n));
  CHECK(run_coarse(m, num_sweeps) == run(m, num_sweeps, false, false), "equal couplings: n %d", int(n));
  m.chains = 8;
  CHECK(run_single(m, 3 * num_sweeps) == run(m, 3 * num_sweeps, false, false), "equal couplings, single: n %d", int(n));
}

// Tables have sums of blocks of 80 couplings, which are rounded to a 256th. Here all couplings are `multiple` of the finer unit, so
// that nothing else is rounded, and the sums of all blocks are off by the same if all left units are 1, which large biases see to.
static void compare_blocks(int multiple, int64_t num_sweeps) {
  const int64_t n = 3000;
  const double coupling = 0x1p-9, left_bias = coupling * (256.0 * double(32750 - n) / multiple - double(n));
  Model<float> m{n, 33, 40, {}, {}, {}, 1};
  m.weight.assign(size_t(n * m.n2), float(coupling));
  m.left_bias.assign(size_t(n), float(left_bias));
  for (int64_t j = 0; j < m.n2; ++j) m.right_bias.push_back(float(double(j - 16) / 8 - coupling * double(n)));
  CHECK(run_coarse(m, num_sweeps, kernels().sweep_lookup) == run(m, num_sweeps, false, false), "blocks: %d", multiple);
}

// More chains than a group has, the last vector of which is not full, and biases of each chain. Only tables that are looked up serve
// chains whose biases differ.
static void compare_groups(int64_t n1, int64_t n2, int64_t chains, bool own_bias, int64_t num_sweeps) {
  std::normal_distribution<double> normal;
  Model<float> m{n1, n2, chains, {}, {}, {}, -1.1};
  for (int64_t i = 0; i < n1 * n2; ++i) m.weight.push_back(float(0.5 * normal(rng) / sqrt(double(std::max(n1, n2)))));
  for (int64_t i = 0; i < n1 * (own_bias ? chains : 1); ++i) m.left_bias.push_back(float(normal(rng)));
  for (int64_t i = 0; i < n2 * (own_bias ? chains : 1); ++i) m.right_bias.push_back(float(normal(rng)));
  CHECK(run_coarse(m, num_sweeps, !own_bias || kernels().sweep_lookup) == run(m, num_sweeps, false, false),
        "groups: n %d + %d, %d chains, own bias %d", int(n1), int(n2), int(chains), own_bias);
}

// A pair of units has no rounding error to speak of; what is left is the sigmoid's, at one logit after the other.
static void compare_pairs(double coupling, int64_t num_sweeps) {
  for (double bias = -coupling; bias <= 0; bias += coupling / 29) {
    const Model<float> m{1, 1, 512, {float(coupling)}, {float(-coupling)}, {float(bias)}, 1};
    CHECK(run_coarse(m, num_sweeps) == run(m, num_sweeps, false, false), "pair: coupling %g, bias %g", coupling, bias);
  }
}

// Biases near the limit of float32, in a thread that takes subnormal numbers for 0 (torch.set_flush_denormal).
static void compare_tiny() {
#if GIBBS_X86
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);
  for (double bias : {1e-32, 1e-33, 1e-34, 5e-35}) {
    const std::vector<float> biases(64, float(bias));
    const Model<float> m{64, 64, 64, std::vector<float>(64 * 64), biases, biases, 3 / bias};
    CHECK(run_coarse(m, 200, bias == 1e-32) == run(m, 200, false, false), "tiny biases: %g", bias);
    const Model<float> few{64, 64, 2, m.weight, biases, biases, 3 / bias};
    CHECK(run_single(few, 200, false) == run(few, 200, false, false), "tiny biases, single: %g", bias);
  }
  _mm_setcsr(before);
#endif
}

// Threads share the rounding of a large model.
template <class T>
static void compare_threads(int64_t n1, int64_t n2, int64_t chains) {
  const auto run_on_threads = [](int64_t count, const std::function<void(int64_t)>& task) {
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < count; ++i) threads.emplace_back(task, i);
    for (std::thread& thread : threads) thread.join();
  };
  std::normal_distribution<double> normal;
  Model<T> m{n1, n2, chains, {}, std::vector<T>(size_t(n1)), std::vector<T>(size_t(n2)), 1};
  for (int64_t i = 0; i < n1 * n2; ++i) m.weight.push_back(T(0.1 * normal(rng)));
  CHECK(n1 * n2 >= 1 << 16);
  const int slack = kernels().largest_slack;
  CHECK(run(m, 3, true, false, slack, nullptr, {3, run_on_threads, nullptr}) == run(m, 3, true, false, slack), "%d + %d, %d chains",
        int(n1), int(n2), int(chains));
  m.chains = 7;
  CHECK(run_single(m, 9, std::max(n1, n2) <= kMostSingleUnits, {3, run_on_threads, nullptr}) == run(m, 9, false, false),
        "%d + %d, single", int(n1), int(n2));
}

int main(int argc, char** argv) {
  const int64_t times = argc > 1 ? atoi(argv[1]) : 1;
  for (const char* name : {"avx512", "avx2", "baseline"}) {
    if (!set_instruction_set(name)) continue;
    for (bool worst : {false, true}) {
      compare<float>(150, 130, 0.1, 0.5, 1, worst, 4000 * times);
      compare<double>(65, 200, 0.1, 0.5, -0.7, worst, 4000 * times);
      compare<float>(33, 31, 3, 2, 0.3, worst, 10000 * times);
      compare<float>(130, 40, 1e3, 1e4, 1e-3, worst, 4000 * times);
      compare<float>(40, 130, 1e-9, 1e6, 1e-6, worst, 4000 * times);
      compare<float>(70, 50, 0.1, 60, 0.5, worst, 1000 * times);  // most biases saturate their units
    }
    for (int64_t n = 100; n < 160; n += 6) compare_equal(n, 200 * times);
    for (double coupling : {3.0, 6.0, 11.0}) compare_pairs(coupling, 100 * times);
    compare_blocks(787, 140);
    compare_blocks(803, 140);
    for (bool own_bias : {false, true}) {
      compare_groups(400, 300, 290, own_bias, 14);
      compare_groups(128, 3, 257, own_bias, 40 * times);
      compare_groups(77, 181, 520, own_bias, 10 * times);
    }
    compare_tiny();
    compare_threads<float>(300, 261, 200);
    compare_threads<double>(145, 610, 40);
    compare_threads<float>(610, 145, 9);
  }
}
