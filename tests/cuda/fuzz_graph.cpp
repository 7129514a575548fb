// SPDX-License-Identifier: Apache-2.0
// Random graphs, batches, strides, values and devices through the binary calls of cuda/graph.h, run by the emulator, against cpu/graph.h: the bits
// must be the same.
#include "cpu/graph.h"
#include "cuda/graph.h"
#include "device_batch.h"
#include "random_graph.h"

using namespace gibbs;

template <class T>
struct Problem : RandomBatch {
  Graph graph;
  std::vector<bool> is_model_dim;
  Tensor<T> coupling, bias, base_bias, state, clamp;
  Tensor<int64_t> numbers;
  GraphCall call;
  bool is_annealed = false, has_clamp = false;
};

// Values for which bounds leave much or nothing open, and those near the limits of float32.
static double random_scale() {
  if (one_in(10)) return exp2(double(below(220)) - 110);
  return exp2(double(below(one_in(4) ? 24 : 4)) - 3);
}
static double random_beta() { return one_in(10) ? 0 : normal() * (one_in(10) ? exp2(double(below(120)) - 60) : 1); }

template <class T>
static Problem<T> random_problem() {
  Problem<T> p;
  draw_small_problem(p.graph, p);
  const GraphView g = p.graph.view();
  GraphCall& c = p.call;
  p.is_annealed = one_in(4);
  c.metropolis = !p.is_annealed && one_in(3);
  const std::vector<bool> shared = p.some_broadcast(!one_in(4));
  // Few values make ties of fields, couplings of one size leave bits of their slices unused, and a large one leaves others none.
  const double scale = random_scale(), bias_scale = one_in(3) ? random_scale() : 1;
  const int64_t kind = below(4);
  const auto value = [&] {
    if (kind == 0) return scale * (one_in(2) ? 1 : -1);
    if (kind == 1) return one_in(20) ? 1000 * scale : scale * normal();
    return scale * normal();
  };
  p.coupling = Tensor<T>(p.shape({g.num_edges}), shared, value);
  p.bias = Tensor<T>(p.shape({g.num_nodes}), one_in(2) ? shared : p.some_broadcast(), [&] { return bias_scale * normal(); });
  p.base_bias = Tensor<T>(p.shape({g.num_nodes}), one_in(2) ? shared : p.some_broadcast(), normal);
  p.state = Tensor<T>(p.shape({g.num_nodes}), p.some_broadcast(), [] { return double(below(2)); });
  p.has_clamp = !p.is_annealed && one_in(3);
  p.clamp = Tensor<T>(p.shape({g.num_nodes}), p.some_broadcast(), [] { return double(below(2)); });
  for (bool b : shared) p.is_model_dim.push_back(!b || one_in(6));

  c.graph = g;
  c.batch = Batch(p.sizes, p.is_model_dim);
  p.draw_counters(c);
  if (p.is_annealed) c.num_sweeps = 1 + below(4);
  if (one_in(4)) {
    p.numbers = Tensor<int64_t>(p.sizes, p.some_broadcast(false), [] { return double(below(kMaxChains)); });
    c.chains = p.numbers.data.data();
    c.chains_strides = p.numbers.strides;
  }
  if (p.is_annealed) {
    p.draw_annealed_betas(c);
  } else {
    p.draw_betas(c, one_in(2) ? 1 : std::max<int64_t>(c.num_sweeps, 1), p.is_model_dim, false, [](std::vector<double>& row) {
      for (double& beta : row) beta = random_beta();
    });
  }
  c.is_double = sizeof(T) == 8;
  return p;
}

// Chooses biases of colour 0 such that in the first sweep a unit's threshold is next to its random word, if it can: wherever an error is larger than its
// bound, the bit is likely to be wrong.
template <class T>
static void aim(Problem<T>& p) {
  const GraphCall& c = p.call;
  const GraphView& g = c.graph;
  const double distance = exp2(-double(below(30)));
  for (int64_t chain = 0; chain < p.chains && c.num_sweeps; ++chain) {
    const double beta = p.is_annealed ? c.beta[1] : p.beta_of(c, chain, 0);
    if (!(fabs(beta) > 1e-3)) continue;
    const uint64_t number = uint64_t(c.chains ? p.at(p.numbers, chain, {}) : c.chain_offset + chain);
    const RandomStream stream = random_stream(c.seed, number, uint64_t(c.sweep_offset));
    for (int32_t position = 0; position < g.color_offsets[1]; ++position) {
      const int32_t node = g.order[position];
      double field = 0;
      for (int32_t h = g.row_offsets[position]; h < g.row_offsets[position + 1]; ++h)
        if (p.at(p.state, chain, {g.neighbors[h]}) != 0) field += double(p.at(p.coupling, chain, {g.edge_of[h]}));
      const double probability = (random_word(stream, uint32_t(node)) + 0.5) * 0x1p-32,
                   logit = c.metropolis ? (p.at(p.state, chain, {node}) != 0 ? -log(probability) : log(probability))
                                        : log(probability / (1 - probability)),
                   of_base = p.is_annealed ? (1 - beta) * double(p.at(p.base_bias, chain, {node})) : 0;
      p.bias.data[p.offset(p.bias, chain, {node})] = T((logit + distance * normal() - of_base) / beta - field);
    }
  }
}

struct Outputs {
  std::vector<uint8_t> bits;
  std::vector<double> log_weights;
  Outcome outcome = Outcome::kOk;
};

template <class T>
static Outputs run_on_cpu(Problem<T>& p) {
  const int64_t n = p.graph.num_nodes, words = state_words(n);
  std::vector<uint32_t> bits(size_t(p.chains * words)), clamp(bits.size());
  for (int64_t chain = 0; chain < p.chains; ++chain)
    for (int64_t i = 0; i < n; ++i) {
      set_bit(bits.data() + chain * words, i, p.at(p.state, chain, {i}) != 0);
      set_bit(clamp.data() + chain * words, i, p.at(p.clamp, chain, {i}) != 0);
    }
  Outputs out;
  out.log_weights.assign(size_t(p.chains), 0);
  GraphCall call = p.call;
  call.coupling = p.coupling.operand(p.sizes.size());
  call.bias = p.bias.operand(p.sizes.size());
  call.base_bias = p.base_bias.operand(p.sizes.size());
  call.bits = bits.data();
  call.clamp = p.has_clamp ? clamp.data() : nullptr;
  call.log_weights = p.is_annealed ? out.log_weights.data() : nullptr;
  Rounding rounding;
  CHECK(run_graph(call, {1, run_on_threads, nullptr}, &rounding) == Outcome::kOk);
  for (int64_t chain = 0; chain < p.chains; ++chain)
    for (int64_t i = 0; i < n; ++i) out.bits.push_back(bit(bits.data() + chain * words, i));
  return out;
}

template <class T>
static Outputs run_on_device(Problem<T>& p, const DeviceLimits& device, GraphCudaRoute route) {
  DeviceBatch batch(p.sizes, p.is_model_dim, p.call);
  Outputs out;
  out.bits.assign(size_t(p.chains * p.graph.num_nodes), 2);
  out.log_weights.assign(size_t(p.chains), p.is_annealed ? nan("") : 0);
  GraphParams params = {};
  params.sweep = batch.sweep();
  params.layout = p.graph.layout.data();
  params.num_nodes = p.graph.num_nodes, params.num_edges = p.graph.num_edges(), params.num_colors = p.call.graph.num_colors;
  params.is_double = p.call.is_double, params.metropolis = p.call.metropolis;
  params.coupling = batch.view(p.coupling), params.bias = batch.view(p.bias);
  params.state = batch.state_view(p.state);
  if (p.has_clamp) params.clamp = batch.state_view(p.clamp);
  if (p.is_annealed) params.base_bias = batch.view(p.base_bias), params.log_weights = out.log_weights.data();
  params.state_out = {out.bits.data(), 1, 1};
  const GraphPlan plan = plan_graph(params, device, route);
  check_shape(plan.shape, device);
  std::vector<double> workspace(size_t(plan.workspace + 7) / 8, nan(""));
  params.workspace = workspace.data();
  launch_graph(params, plan, nullptr);
  const Findings found = batch.findings();
  if (found.fault) out.outcome = found.fault->outcome;
  return out;
}

template <class T>
static void fuzz_bits() {
  Problem<T> p = random_problem<T>();
  if (one_in(2)) aim(p);
  const Outputs expected = run_on_cpu(p);
  for (const GraphCudaRoute route : {GraphCudaRoute::kAuto, GraphCudaRoute::kGlobal}) {
    cuda_emulator::options().seed = rng();
    const Outputs found = run_on_device(p, random_device(), route);
    CHECK(found.outcome == Outcome::kOk, "outcome %d", int(found.outcome));
    for (size_t i = 0; i < expected.bits.size(); ++i) CHECK(found.bits[i] == expected.bits[i], "bit %ld", long(i));
    for (size_t i = 0; i < expected.log_weights.size(); ++i) {
      const double wanted = expected.log_weights[i], tolerance = 1e-4 * (1 + double(p.graph.num_nodes)) + 1e-5 * fabs(wanted);
      if (std::isfinite(wanted))
        CHECK(fabs(found.log_weights[i] - wanted) <= tolerance, "%g, not %g", found.log_weights[i], wanted);
    }
  }
}

// What only the device can find: a layout that leads outside, for which bits and log-weights are 0, and a beta, also if no sweep reads it.
template <class T>
static void fuzz_faults() {
  Problem<T> p = random_problem<T>();
  const Outcome expected = one_in(2) ? Outcome::kBadLayout : Outcome::kNonFiniteBeta;
  constexpr int32_t kWrong[] = {-1, INT32_MAX, INT32_MIN};
  if (expected == Outcome::kBadLayout)
    p.graph.layout[size_t(below(int64_t(p.graph.layout.size())))] = kWrong[below(3)];
  else
    p.call.beta.back() = one_in(2) ? nan("") : INFINITY;
  const Outputs found = run_on_device(p, random_device(), one_in(2) ? GraphCudaRoute::kAuto : GraphCudaRoute::kGlobal);
  CHECK(found.outcome == expected, "outcome %d, not %d", int(found.outcome), int(expected));
  if (expected != Outcome::kBadLayout) return;
  for (const uint8_t bit : found.bits) CHECK(bit == 0, "a bit is %d", bit);
  for (const double log_weight : found.log_weights) CHECK(log_weight == 0, "a log-weight is %g", log_weight);
}

int main(int argc, char** argv) {
  for_each_trial(argc, argv, 400, [] {
    fuzz_bits<float>();
    fuzz_bits<double>();
    fuzz_faults<float>();
    fuzz_faults<double>();
  });
}
