// SPDX-License-Identifier: Apache-2.0
// Random graphs, batches, strides, values and devices through the relaxed calls of cuda/graph.h, run by the emulator, against
// cpu/graph.h. What a chain gives must not depend, to the bit, on the device, the plan or the order in which threads run.

#include "cpu/graph.h"
#include "cuda/graph.h"
#include "device_batch.h"
#include "random_graph.h"

using namespace gibbs;

// ---- problems ------------------------------------------------------------------------------------------------------------------

template <class T>
struct Problem : RandomBatch {
  Graph graph;
  std::vector<bool> is_model_dim;
  Tensor<T> coupling, bias, start;  // start: where relaxed sweeps begin if there are no binary ones
  Tensor<T> bits;                   // where binary sweeps begin
  Tensor<int64_t> numbers;          // of the chains
  std::vector<T> grad_relaxed, grad_mean;
  GraphCall call;
  bool start_is_bits = false;

  size_t size() const { return size_t(chains * graph.num_nodes); }
};

static double random_beta() { return one_in(10) ? 0 : normal(); }

template <class T>
static Problem<T> random_problem() {
  Problem<T> p;
  draw_small_problem(p.graph, p);
  const GraphView g = p.graph.view();
  const std::vector<bool> shared = p.some_broadcast(!one_in(4));
  const double scale = exp2(double(below(one_in(4) ? 24 : 4)) - 3);
  p.coupling = Tensor<T>(p.shape({g.num_edges}), shared, [&] { return scale * normal(); });
  p.bias = Tensor<T>(p.shape({g.num_nodes}), one_in(2) ? shared : p.some_broadcast(), normal);
  p.start_is_bits = one_in(3);
  p.start = Tensor<T>(p.shape({g.num_nodes}), p.some_broadcast(),
                      [&] { return p.start_is_bits ? double(below(2)) : double(below(101)) / 100; });
  p.bits = Tensor<T>(p.shape({g.num_nodes}), p.some_broadcast(), [] { return double(below(2)); });
  for (std::vector<T>* grad : {&p.grad_relaxed, &p.grad_mean}) {
    grad->resize(p.size());
    for (T& x : *grad) x = T(normal());
  }
  for (bool b : shared) p.is_model_dim.push_back(!b || one_in(6));

  GraphCall& c = p.call;
  c.graph = g;
  c.batch = Batch(p.sizes, p.is_model_dim);
  p.draw_counters(c);
  if (one_in(2)) c.num_sweeps = 0;
  if (one_in(4)) {
    p.numbers = Tensor<int64_t>(p.sizes, p.some_broadcast(false), [] { return double(below(kMaxChains)); });
    c.chains = p.numbers.data.data();
    c.chains_strides = p.numbers.strides;
  }
  c.num_relaxed_sweeps = 1 + below(3);
  p.draw_betas(c, one_in(2) ? 1 : c.num_sweeps + c.num_relaxed_sweeps, p.is_model_dim, true, [](std::vector<double>& row) {
    for (double& beta : row) beta = random_beta();
  });
  c.relaxation = Relaxation(below(kNumRelaxations));
  c.sharpness = 0.5 + double(below(10));
  c.slope_gradient = one_in(2);
  return p;
}

// ---- both ways to run one ------------------------------------------------------------------------------------------------------

enum { kStart, kRelaxed, kMean, kFields, kGradState, kGradBias, kGradCoupling, kNumOutputs };
constexpr const char* kOutputNames[] = {"start", "relaxed", "mean", "fields", "grad_state", "grad_bias", "grad_coupling"};

template <class T>
struct Outputs {
  std::vector<T> of[kNumOutputs];
  Rounding rounding = {};  // of binary sweeps; on a device that of some model, by some bias
  template <class U>
  explicit Outputs(const Problem<U>& p) {
    for (std::vector<T>& out : of) out.assign(p.size(), std::numeric_limits<T>::quiet_NaN());
    of[kFields].resize(p.size() * size_t(p.call.num_relaxed_sweeps), std::numeric_limits<T>::quiet_NaN());
    of[kGradCoupling].assign(size_t(p.call.batch.num_models() * p.graph.num_edges()), std::numeric_limits<T>::quiet_NaN());
  }
};

// Computed in R, whatever the problem's type.
template <class R, class T>
static Outputs<R> run_on_cpu(const Problem<T>& p) {
  const int64_t n = p.graph.num_nodes;
  const auto converted = [](const Tensor<T>& t) {
    Tensor<R> out;
    out.strides = t.strides, out.data.assign(t.data.begin(), t.data.end());
    return out;
  };
  const Tensor<R> coupling = converted(p.coupling), bias = converted(p.bias);
  Outputs<R> out(p);
  std::vector<uint32_t> bits(size_t(p.chains * state_words(n)));
  for (int64_t chain = 0; chain < p.chains; ++chain)
    for (int64_t i = 0; i < n; ++i) {
      if (p.call.num_sweeps) set_bit(bits.data() + chain * state_words(n), i, p.at(p.bits, chain, {i}) != 0);
      if (!p.call.num_sweeps) out.of[kStart][size_t(chain * n + i)] = R(p.at(p.start, chain, {i}));
    }
  GraphCall call = p.call;
  call.is_double = sizeof(R) == 8;
  call.coupling = coupling.operand(p.sizes.size());
  call.bias = bias.operand(p.sizes.size());
  call.bits = bits.data();
  call.state = out.of[kStart].data(), call.relaxed = out.of[kRelaxed].data(), call.mean = out.of[kMean].data();
  call.fields = out.of[kFields].data();
  const Runtime runtime = {1, run_on_threads, nullptr};
  CHECK(run_graph(call, runtime, &out.rounding) == Outcome::kOk);
  const std::vector<R> grad_relaxed(p.grad_relaxed.begin(), p.grad_relaxed.end()),
      grad_mean(p.grad_mean.begin(), p.grad_mean.end());
  const GraphBackwardCall back = {call,
                                  grad_relaxed.data(),
                                  grad_mean.data(),
                                  out.of[kGradState].data(),
                                  out.of[kGradBias].data(),
                                  out.of[kGradCoupling].data()};
  CHECK(run_graph_backward(back, runtime) == Outcome::kOk);
  return out;
}

// The views of a problem, as a device's kernels see them.
template <class T>
class DeviceCall {
 public:
  explicit DeviceCall(const Problem<T>& p) : p_(p), device_(p.sizes, p.is_model_dim, p.call), layout_(p.graph.layout) {}

  // Faults of the call, kOk if none.
  Outcome forward(const DeviceLimits& device, Outputs<T>& out) {
    GraphParams params = {};
    describe(params);
    params.bias = view(p_.bias);
    if (p_.call.num_sweeps) {
      params.state = device_.state_view(p_.bits);
    } else {
      params.start = view(p_.start);
      params.start_is_bits = p_.start_is_bits;
    }
    params.state_out = {out.of[kStart].data(), int32_t(sizeof(T)), sizeof(T) == 8 ? uint64_t{0x3ff0000000000000} : 0x3f800000};
    params.relaxed = out.of[kRelaxed].data(), params.mean = out.of[kMean].data();
    params.fields = out.of[kFields].data();
    const GraphRelaxedPlan plan = plan_graph_relaxed(params, device);
    check_shape(plan.shape, device);
    std::vector<double> workspace(size_t(plan.workspace + 7) / 8, nan(""));
    params.workspace = plan.workspace ? workspace.data() : nullptr;
    launch_graph_relaxed(params, plan, nullptr);
    const Findings found = device_.findings();
    if (found.rounding) out.rounding = found.rounding->rounding;
    return outcome_of(found);
  }
  Outcome backward(const DeviceLimits& device, Outputs<T>& out) {
    GraphBackwardParams params = {};
    describe(params);
    params.grad_relaxed = p_.grad_relaxed.data(), params.grad_mean = p_.grad_mean.data();
    params.state = out.of[kStart].data(), params.fields = out.of[kFields].data();
    params.grad_state = out.of[kGradState].data(), params.grad_bias = out.of[kGradBias].data();
    params.grad_coupling = out.of[kGradCoupling].data();
    const GraphBackwardPlan plan = plan_graph_backward(params, device);
    check_shape(plan.shape, device);
    std::vector<double> workspace(size_t(plan.workspace + 7) / 8, nan(""));
    params.workspace = plan.workspace ? workspace.data() : nullptr;
    launch_graph_backward(params, plan, nullptr);
    return outcome_of(device_.findings());
  }
  std::vector<int32_t>& layout() { return layout_; }

 private:
  template <class Params>
  void describe(Params& params) {
    params.sweep = device_.sweep();
    params.layout = layout_.data();
    params.num_nodes = p_.graph.num_nodes, params.num_edges = p_.graph.num_edges(), params.num_colors = p_.call.graph.num_colors;
    params.is_double = sizeof(T) == 8;
    params.coupling = view(p_.coupling);
  }
  ParameterView view(const Tensor<T>& t) const { return device_.view(t); }
  static Outcome outcome_of(const Findings& found) { return found.fault ? found.fault->outcome : Outcome::kOk; }

  const Problem<T>& p_;
  DeviceBatch device_;
  std::vector<int32_t> layout_;
};

// ---- comparisons ---------------------------------------------------------------------------------------------------------------

// Whether any unit is so near a kink or a step that another rounding may fall on the other side.
template <class T>
static bool is_near_kink(const Problem<T>& p, const std::vector<T>& fields) {
  const GraphCall& c = p.call;
  const double margin = sizeof(T) == 8 ? 1e-10 : 2e-4;
  if (c.relaxation != kPwl && c.relaxation != kStraightThrough) return false;
  for (int64_t sweep = 0; sweep < c.num_relaxed_sweeps; ++sweep)
    for (int64_t chain = 0; chain < p.chains; ++chain) {
      const uint64_t number = uint64_t(c.chains ? p.at(p.numbers, chain, {}) : c.chain_offset + chain);
      const RandomStream stream = random_stream(c.seed, number, uint64_t(c.sweep_offset + c.num_sweeps + sweep));
      for (int64_t i = 0; i < p.graph.num_nodes; ++i) {
        const double field = double(fields[size_t((sweep * p.chains + chain) * p.graph.num_nodes + i)]);
        const double q = 1 / (1 + exp(-p.beta_of(c, chain, c.num_sweeps + sweep) * field));
        const double distance = (random_word(stream, uint32_t(i)) + 0.5) * 0x1p-32 - (1 - q);
        const double linear = 0.5 + c.sharpness / 4 / (q * (1 - q) + 1e-2) * distance;
        const double nearest = c.relaxation == kPwl ? std::min(fabs(linear), fabs(linear - 1)) : fabs(distance);
        if (nearest < margin) return true;
      }
    }
  return false;
}

static double worst[2];  // error relative to the largest number of an output, of float and of double

template <class T, class R>
static void compare(const Problem<T>& p, const Outputs<T>& got, const Outputs<R>& wanted) {
  for (int out = 0; out < kNumOutputs; ++out) {
    double size = 1;
    for (R x : wanted.of[out]) size = std::max(size, fabs(double(x)));
    for (size_t i = 0; i < got.of[out].size(); ++i) {
      const double error = fabs(double(got.of[out][i]) - double(wanted.of[out][i])) / size;
      CHECK(error <= (sizeof(T) == 8 ? 1e-12 : 2e-5), "relaxation %d, %s[%zu]: %g, not %g of %g", p.call.relaxation,
            kOutputNames[out], i, double(got.of[out][i]), double(wanted.of[out][i]), size);
      worst[sizeof(T) == 8] = std::max(worst[sizeof(T) == 8], error);
    }
  }
}

template <class T>
static void fuzz_values() {
  const Problem<T> p = random_problem<T>();
  std::vector<Outputs<T>> runs;
  for (int run = 0; run < 3; ++run) {
    const DeviceLimits device = run == 0 ? kKnownDevices[kH100].limits : random_device();
    for (int order = 0; order < 2; ++order) {  // a plan twice: even the sums over chains must be the same
      cuda_emulator::options().seed = rng();
      Outputs<T> out(p);
      DeviceCall<T> call(p);
      CHECK(call.forward(device, out) == Outcome::kOk);
      CHECK(call.backward(device, out) == Outcome::kOk);
      for (int i = 0; i < kNumOutputs; ++i)
        for (size_t at = 0; !runs.empty() && at < out.of[i].size(); ++at)
          if (i != kGradCoupling || order > 0)
            CHECK(out.of[i][at] == runs.back().of[i][at], "run %d, order %d: %s[%zu] is %a, not %a", run, order, kOutputNames[i],
                  at, double(out.of[i][at]), double(runs.back().of[i][at]));
      runs.push_back(std::move(out));
    }
  }
  const Outputs<T> on_cpu = run_on_cpu<T>(p);
  CHECK(runs[0].of[kStart] == on_cpu.of[kStart]);
  if (p.call.batch.num_models() == 1) CHECK(runs[0].rounding.scale == on_cpu.rounding.scale);
  if (is_near_kink(p, runs[0].of[kFields])) return;
  // float32 words are not quite those of float64, and a float32 field of size x is off by x 2^-24, whoever computes it.
  double largest = 0;
  for (T field : runs[0].of[kFields]) largest = std::max(largest, fabs(double(field)));
  for (const Outputs<T>& out : runs)
    if (p.call.relaxation == kMeanField && largest < 100)
      compare(p, out, run_on_cpu<double>(p));
    else
      compare(p, out, on_cpu);
}

// ---- faults --------------------------------------------------------------------------------------------------------------------

// Each is reported as what it is, and nothing is read or written out of bounds.
template <class T>
static void fuzz_faults() {
  Problem<T> p = random_problem<T>();
  const int64_t n = p.graph.num_nodes, edges = p.graph.num_edges(), chain = below(p.chains), node = below(n);
  const T bad = one_in(2) ? std::numeric_limits<T>::quiet_NaN() : std::numeric_limits<T>::infinity() * T(one_in(2) ? 1 : -1);
  const bool too_large = p.call.num_sweeps > 0 && one_in(2);  // for rounding
  Outcome forward = Outcome::kOk, backward = Outcome::kOk;
  int corrupted = -1;
  switch (below(7)) {
    case 0:
      p.bias.data[p.offset(p.bias, chain, {node})] = bad;
      forward = Outcome::kNonFiniteBias;
      break;
    case 1:
      if (!edges) return;
      p.coupling.data[p.offset(p.coupling, chain, {below(edges)})] = too_large ? T(0x1p127) : bad;
      forward = too_large ? Outcome::kTooLargeCoupling : Outcome::kNonFiniteCoupling;
      backward = too_large ? Outcome::kOk : Outcome::kNonFiniteCoupling;
      break;
    case 2:
      p.start_is_bits = one_in(2);
      if (p.call.num_sweeps) {
        p.bits.data[p.offset(p.bits, chain, {node})] = one_in(2) ? bad : T(0.5);
        forward = Outcome::kStateNotBits;
      } else if (p.start_is_bits) {
        for (T& x : p.start.data) x = T(1);
        p.start.data[p.offset(p.start, chain, {node})] = T(2);
        forward = Outcome::kStateNotBits;
      } else {
        p.start.data[p.offset(p.start, chain, {node})] = bad;
        forward = Outcome::kNonFiniteState;
      }
      break;
    case 3:
      p.numbers = Tensor<int64_t>(p.sizes, p.some_broadcast(false), [] { return 5; });
      p.numbers.data[p.offset(p.numbers, chain, {})] = one_in(2) ? -1 : kMaxChains;
      p.call.chains = p.numbers.data.data(), p.call.chains_strides = p.numbers.strides;
      forward = backward = Outcome::kChainOutOfRange;
      break;
    case 4:
      p.call.beta.back() = double(bad);
      forward = backward = Outcome::kNonFiniteBeta;
      break;
    default:
      corrupted = int(below(int64_t(p.graph.layout.size())));
      forward = backward = Outcome::kBadLayout;
  }
  const DeviceLimits device = random_device();
  Outputs<T> out(p);
  DeviceCall<T> call(p);
  bool is_outside = false;
  if (corrupted >= 0) {
    const int64_t wrong[] = {-1, int64_t(INT32_MAX), int64_t(INT32_MIN), below(n + 2 * edges + 2)};
    const size_t which = size_t(below(4));
    call.layout()[size_t(corrupted)] = int32_t(wrong[which]);
    is_outside = which < 3;  // others may look like another graph
  }
  const Outcome of_forward = call.forward(device, out), of_backward = call.backward(device, out);
  if (corrupted < 0 || is_outside) {
    CHECK(of_forward == forward, "outcome %d, not %d", int(of_forward), int(forward));
    CHECK(of_backward == backward, "outcome %d, not %d", int(of_backward), int(backward));
  }
  if (is_outside)
    for (int i = 0; i < kNumOutputs; ++i)
      for (T x : out.of[i]) CHECK(x == 0, "%s is %g", kOutputNames[i], double(x));
}

int main(int argc, char** argv) {
  for_each_trial(argc, argv, 1000, [] {
    fuzz_values<float>();
    fuzz_values<double>();
    fuzz_faults<float>();
    fuzz_faults<double>();
  });
  printf("largest error relative to an output's scale: float %.2g, double %.2g\n", worst[0], worst[1]);
}
