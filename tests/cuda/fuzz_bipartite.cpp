// SPDX-License-Identifier: Apache-2.0
// Random problems, devices, routes and CTAs through the binary sweeps of cuda/bipartite.h, run by the emulator, against
// cpu/bipartite.h: bits are equal, log-weights agree within float32's rounding and, on one route, do not depend on the CTAs.
#include "cpu/bipartite.h"
#include "cuda/bipartite.h"
#include "cuda/bipartite_kernel.cuh"
#include "cuda/devices.h"
#include "fuzz.h"
#include "known_devices.h"

using namespace gibbs;

// ---- problems ------------------------------------------------------------------------------------------------------------------

// Bits [batch..., n] of some dtype. The tensor holds 0 and 1; `elements` are the bytes that a kernel reads.
struct Bits {
  Tensor<float> values;
  StateView view = {};
  std::vector<unsigned char> elements;
};

struct Dtype {
  int element_size;
  bool is_floating;
  uint64_t one;
};
constexpr Dtype kDtypes[] = {{1, false, 1},     {2, false, 1},     {4, false, 1},         {8, false, 1},
                             {2, true, 0x3c00}, {2, true, 0x3f80}, {4, true, 0x3f800000}, {8, true, 0x3ffull << 52}};
static Dtype random_dtype() { return kDtypes[below(std::size(kDtypes))]; }

static Bits random_bits_of(const std::vector<int64_t>& shape, const std::vector<bool>& broadcast, const Dtype& dtype) {
  Bits bits;
  bits.values = Tensor<float>(shape, broadcast, [] { return double(below(2)); });
  const auto size = size_t(dtype.element_size);
  for (const float value : bits.values.data) {
    const uint64_t minus_zero = dtype.is_floating && one_in(2) ? uint64_t{1} << (8 * size - 1) : 0;
    const uint64_t element = value == 1 ? dtype.one : value == 0 ? minus_zero : ~uint64_t{0};
    const auto* bytes = reinterpret_cast<const unsigned char*>(&element);
    bits.elements.insert(bits.elements.end(), bytes, bytes + size);
  }
  bits.view = {bits.elements.data(), dtype.element_size, dtype.is_floating, dtype.one, bits.values.strides.back(), {}};
  return bits;
}

template <class T>
struct Problem : RandomBatch {
  int64_t n1, n2;
  std::vector<bool> is_model_dim;
  Tensor<T> weight, left_bias, right_bias, base_left_bias, base_right_bias;
  Bits left, right, clamp_left, clamp_right;  // all but left may be absent
  Tensor<int64_t> numbers;                    // of the chains
  bool annealed;
  BipartiteCall call;
};

static int64_t random_side() {
  constexpr int64_t kSides[] = {1, 2, 3, 4, 8, 12, 31, 32, 33, 64, 65, 100, 120, 124, 129, 252};
  return one_in(2) ? kSides[below(std::size(kSides))] : 1 + below(one_in(10) ? 400 : 70);
}

template <class T>
static Problem<T> random_problem() {
  Problem<T> p;
  do {
    p.n1 = random_side(), p.n2 = random_side();
    p.draw(1, 70);
  } while (p.chains == 0 || p.chains * p.n1 * p.n2 > 30000 || p.chains * (p.n1 + p.n2) > 2000);  // the emulator is slow
  const std::vector<bool> shared = p.some_broadcast(!one_in(4));
  const double scale = one_in(3) ? exp2(80 * (2.0 * double(below(1000)) / 999 - 1)) : exp2(double(below(5)) - 3);
  p.weight = Tensor<T>(p.shape({p.n1, p.n2}), shared, [&] { return one_in(50) ? 0.0 : scale * normal(); });
  const auto broadcast = [&] { return one_in(2) ? shared : p.some_broadcast(); };
  for (Tensor<T>* bias : {&p.left_bias, &p.base_left_bias}) *bias = Tensor<T>(p.shape({p.n1}), broadcast(), normal);
  for (Tensor<T>* bias : {&p.right_bias, &p.base_right_bias}) *bias = Tensor<T>(p.shape({p.n2}), broadcast(), normal);
  for (bool b : shared) p.is_model_dim.push_back(!b || one_in(6));
  p.annealed = one_in(3);
  p.left = random_bits_of(p.shape({p.n1}), p.some_broadcast(), random_dtype());
  if (one_in(2)) p.right = random_bits_of(p.shape({p.n2}), p.some_broadcast(), random_dtype());
  if (!p.annealed && one_in(3)) p.clamp_left = random_bits_of(p.shape({p.n1}), p.some_broadcast(), kDtypes[0]);
  if (!p.annealed && one_in(3)) p.clamp_right = random_bits_of(p.shape({p.n2}), p.some_broadcast(), kDtypes[0]);

  BipartiteCall& c = p.call;
  c.n1 = p.n1, c.n2 = p.n2;
  c.batch = Batch(p.sizes, p.is_model_dim);
  c.is_double = sizeof(T) == 8;
  c.weight = p.weight.operand(p.sizes.size());
  c.left_bias = p.left_bias.operand(p.sizes.size()), c.right_bias = p.right_bias.operand(p.sizes.size());
  c.base_left_bias = p.base_left_bias.operand(p.sizes.size()), c.base_right_bias = p.base_right_bias.operand(p.sizes.size());
  p.draw_counters(c);
  if (one_in(5)) c.num_sweeps = below(25);  // more than random bytes are drawn ahead for
  if (one_in(4)) {
    p.numbers = Tensor<int64_t>(p.sizes, p.some_broadcast(false), [] { return double(below(kMaxChains)); });
    c.chains = p.numbers.data.data(), c.chains_strides = p.numbers.strides;
  }
  if (p.annealed) {
    p.draw_annealed_betas(c);
  } else {
    p.draw_betas(c, one_in(2) ? 1 : std::max<int64_t>(c.num_sweeps, 1), p.is_model_dim, false, [](std::vector<double>& row) {
      for (double& b : row) b = one_in(10) ? 0 : normal();
    });
  }
  return p;
}

// ---- both ways to run one ------------------------------------------------------------------------------------------------------

struct Result {
  Outcome outcome;
  std::vector<unsigned char> left, right;  // a byte a unit
  std::vector<double> log_weights;
  Rounding rounding;  // on a device that of some model, by some bias
};

template <class T>
static Result run_on_cpu(const Problem<T>& p) {
  const auto packed = [&](const Bits& bits, int64_t n) {
    std::vector<uint32_t> words(size_t(p.chains * state_words(n)));
    for (int64_t chain = 0; bits.view.data && chain < p.chains; ++chain)
      for (int64_t i = 0; i < n; ++i) set_bit(words.data() + chain * state_words(n), i, p.at(bits.values, chain, {i}) != 0);
    return words;
  };
  const auto unpacked = [&](const std::vector<uint32_t>& words, int64_t n) {
    std::vector<unsigned char> bits;
    for (int64_t chain = 0; chain < p.chains; ++chain)
      for (int64_t i = 0; i < n; ++i) bits.push_back(bit(words.data() + chain * state_words(n), i));
    return bits;
  };
  std::vector<uint32_t> left = packed(p.left, p.n1), right = packed(p.right, p.n2);
  const std::vector<uint32_t> clamp_left = packed(p.clamp_left, p.n1), clamp_right = packed(p.clamp_right, p.n2);
  Result r = {};
  r.log_weights.resize(p.annealed ? size_t(p.chains) : 0);
  BipartiteCall call = p.call;
  call.left_bits = left.data(), call.right_bits = right.data();
  if (p.clamp_left.view.data) call.clamp_left = clamp_left.data();
  if (p.clamp_right.view.data) call.clamp_right = clamp_right.data();
  if (p.annealed) call.log_weights = r.log_weights.data();
  r.outcome = run_bipartite(call, {1, run_on_threads, nullptr}, &r.rounding);
  r.left = unpacked(left, p.n1), r.right = unpacked(right, p.n2);
  return r;
}

// The views of a problem, as a device's kernels see them.
template <class T>
class DeviceCall {
 public:
  explicit DeviceCall(const Problem<T>& p) : p_(p), seed_(int64_t(p.call.seed)) {
    for (const bool of_models : {true, false})
      for (size_t d = 0; d < p.sizes.size(); ++d)
        if (p.is_model_dim[d] == of_models) dims_.push_back(d);
    const BipartiteCall& c = p.call;
    SweepView& s = params.sweep;
    s.batch.num_dims = int32_t(dims_.size());
    s.batch.num_model_dims = int32_t(std::count(p.is_model_dim.begin(), p.is_model_dim.end(), true));
    s.batch.num_models = c.batch.num_models(), s.batch.chains_per_model = c.batch.chains_per_model();
    in_order(p.sizes, s.batch.sizes);
    std::vector<int64_t> contiguous(p.sizes.size(), 1);
    for (size_t d = p.sizes.size(); d-- > 1;) contiguous[d - 1] = contiguous[d] * p.sizes[d];
    in_order(contiguous, s.batch.contiguous);
    s.chains = c.chains;
    if (c.chains) in_order(c.chains_strides, s.chains_strides);
    s.chain_offset = c.chain_offset, s.sweep_offset = c.sweep_offset, s.num_sweeps = c.num_sweeps;
    one_in(2) ? void(s.seed_data = &seed_) : void(s.seed = c.seed);
    s.num_betas = c.num_betas, s.num_beta_values = int64_t(c.beta.size()), s.has_beta_rows = !c.beta_strides.empty();
    if (s.has_beta_rows) in_order(c.beta_strides, s.beta_strides);
    if (one_in(2) || c.beta.size() > kMaxInlineBetas || !std::isfinite(c.beta.back()))
      s.beta_data = c.beta.data();
    else
      std::copy(c.beta.begin(), c.beta.end(), s.beta);
    s.report = &report_;
    params.n1 = p.n1, params.n2 = p.n2, params.is_double = sizeof(T) == 8;
    params.weight = view(p.weight, p.weight.strides[p.sizes.size()]);
    params.left_bias = view(p.left_bias), params.right_bias = view(p.right_bias);
    params.base_left_bias = view(p.base_left_bias), params.base_right_bias = view(p.base_right_bias);
    params.left = view(p.left), params.right = view(p.right);
    params.clamp_left = view(p.clamp_left), params.clamp_right = view(p.clamp_right);
    log_weights_.assign(size_t(p.chains), nan(""));
    if (p.annealed) params.log_weights = log_weights_.data();
    params.left_out = output(left_, p.n1), params.right_out = output(right_, p.n2);
  }
  DeviceCall(const DeviceCall&) = delete;  // params points into it

  Result run(const BipartitePlan& plan) {
    std::vector<double> workspace(size_t(plan.workspace + 7) / 8, nan(""));
    params.workspace = plan.workspace ? workspace.data() : nullptr;
    launch_bipartite(params, plan, nullptr);
    Result r = {};
    const Findings found = take_findings(report_);
    r.outcome = found.fault ? found.fault->outcome : Outcome::kOk;
    r.left = bits_of(left_, params.left_out), r.right = bits_of(right_, params.right_out);
    if (p_.annealed) r.log_weights = log_weights_;
    if (found.rounding) r.rounding = found.rounding->rounding;
    return r;
  }

  BipartiteParams params = {};

 private:
  void in_order(const std::vector<int64_t>& of_dims, BatchStrides& out) const {
    for (size_t d = 0; d < dims_.size(); ++d) out[d] = of_dims[dims_[d]];
  }
  ParameterView view(const Tensor<T>& t, int64_t row_stride = 0) const {
    ParameterView v = {t.data.data(), t.strides.back(), row_stride, {}};
    in_order(t.strides, v.batch_strides);
    return v;
  }
  StateView view(const Bits& bits) const {
    StateView v = bits.view;
    if (v.data) in_order(bits.values.strides, v.batch_strides);
    return v;
  }
  StateOutput output(std::vector<uint64_t>& memory, int64_t n) const {
    const Dtype dtype = random_dtype();
    memory.assign(size_t(p_.chains * n * dtype.element_size + 7) / 8, 0xa5a5a5a5a5a5a5a5);
    return {memory.data(), dtype.element_size, dtype.one};
  }
  static std::vector<unsigned char> bits_of(const std::vector<uint64_t>& memory, const StateOutput& out) {
    std::vector<unsigned char> bits;
    const auto* bytes = reinterpret_cast<const unsigned char*>(memory.data());
    const auto size = size_t(out.element_size);
    for (size_t at = 0; at + size <= memory.size() * 8; at += size) {
      uint64_t element = 0;
      memcpy(&element, bytes + at, size);
      bits.push_back(element == out.one ? 1 : element == 0 ? 0 : 2);
    }
    return bits;
  }

  const Problem<T>& p_;
  std::vector<size_t> dims_;
  int64_t seed_;
  DeviceReport report_ = {};
  std::vector<uint64_t> left_, right_;
  std::vector<double> log_weights_;
};

// ---- plans ---------------------------------------------------------------------------------------------------------------------

// One that exists, or one that makes plans for few multiprocessors, for clusters, or for little shared memory.
static DeviceLimits random_device() {
  constexpr decltype(DeviceLimits::active_clusters) kGrants[] = {clusters_of_up_to<8>, clusters_of_up_to<8>, clusters_of_up_to<4>,
                                                                 clusters_of_up_to<2>, clusters_of_up_to<0>, nullptr};
  DeviceLimits device = kKnownDevices[below(std::size(kKnownDevices))].limits;
  if (one_in(2)) device.active_clusters = kGrants[below(std::size(kGrants))];
  if (one_in(2)) device.num_sms = 1 << below(4);
  if (one_in(4)) device.shared_memory_per_cta = (16 << 10) + below(1 << below(17));  // real ones have more
  return device;
}

constexpr BipartiteRoute kRoutes[] = {BipartiteRoute::kAuto,    BipartiteRoute::kRegisters, BipartiteRoute::kShared,
                                      BipartiteRoute::kCluster, BipartiteRoute::kGlobal,    BipartiteRoute::kAllGlobal};

// Other CTAs, threads, tiles, random bytes and resident blocks than those that the plan chose, if the device has room for them.
static void change_plan(const BipartiteParams& p, const DeviceLimits& device, BipartitePlan& chosen) {
  BipartitePlan plan = chosen;
  plan.sweeps_ahead = int(below(plan.sweeps_ahead + 1));
  if (plan.route != BipartiteRoute::kRegisters) {
    if (!p.log_weights && plan.route != BipartiteRoute::kAllGlobal) {
      do plan.tiles = 1 << below(5);  // sometimes more than there are chains for
      while (plan.tiles / 4 * kTileChains > p.sweep.batch.chains_per_model);
      plan.tiles_per_warp = plan.tiles >= 8 && one_in(2) ? 8 : std::min(plan.tiles, 4);
    }
    plan.resident = below(plan.resident + 1);
    const int most = most_threads(p.log_weights, plan.tiles_per_warp, 0) / kWarpSize,
              least = p.log_weights ? int(divide_up(plan.tiles * kTileChains, kWarpSize)) : 1;  // a chain's log-weight has a thread
    plan.shape.num_threads = kWarpSize * (least + int(below(most - least + 1)));
  }
  const int64_t clusters = 1 + below(ctas_per_model(p.sweep.batch, plan.tiles * kTileChains));
  plan.shape.num_ctas = p.sweep.batch.num_models * clusters * plan.shape.cluster_size;
  Workspace nowhere(nullptr);
  const BipartitePacked packed(p, plan.scale, nowhere);
  const BipartiteLayout arrays(packed, plan);
  plan.workspace = nowhere.size() + plan.shape.num_ctas * arrays.device_memory();
  plan.shape.shared_memory = arrays.shared_memory();
  if (plan.shape.shared_memory <= device.shared_memory_per_cta) chosen = plan;
}

static BipartitePlan random_plan(const BipartiteParams& p) {
  const DeviceLimits device = random_device();
  BipartitePlan plan = plan_bipartite(p, device, kRoutes[below(std::size(kRoutes))]);
  if (!one_in(3)) change_plan(p, device, plan);
  CHECK(plan.shape.shared_memory <= device.shared_memory_per_cta, "%ld bytes", long(plan.shape.shared_memory));
  CHECK(plan.shape.num_threads % kWarpSize == 0 && plan.shape.num_threads <= 1024, "%d threads", plan.shape.num_threads);
  CHECK(plan.shape.cluster_size == 1 || (device.active_clusters && device.active_clusters(device, nullptr, plan.shape) > 0),
        "clusters of %d", plan.shape.cluster_size);
  using cuda_emulator::Order;
  constexpr Order kOrders[] = {Order::kRandom, Order::kForward, Order::kReverse};
  cuda_emulator::options().order = kOrders[one_in(2) ? 0 : 1 + below(2)];
  cuda_emulator::options().seed = rng();
  return plan;
}

// ---- comparisons ---------------------------------------------------------------------------------------------------------------

static int64_t runs_of_route[std::size(kRoutes)];

template <class T>
static void fuzz_values() {
  const Problem<T> p = random_problem<T>();
  const Result expected = run_on_cpu(p);
  CHECK(expected.outcome == Outcome::kOk);
  std::vector<double> sizes(size_t(p.chains), 1.0);  // terms are float32: the error of a log-weight goes with the largest of them
  for (int64_t chain = 0; p.annealed && chain < p.chains; ++chain)
    for (int64_t i = 0; i < p.n1; ++i)
      for (int64_t j = 0; j < p.n2; ++j) sizes[size_t(chain)] += fabs(double(p.at(p.weight, chain, {i, j})));
  std::vector<double> log_weights[std::size(runs_of_route)];
  for (int run = 0; run < 4; ++run) {
    DeviceCall<T> call(p);
    const BipartitePlan plan = random_plan(call.params);
    const Result r = call.run(plan);
    const auto route = size_t(plan.route);
    ++runs_of_route[route];
    const auto where = [](const std::vector<unsigned char>& a, const std::vector<unsigned char>& b) {
      return long(std::mismatch(a.begin(), a.begin() + long(b.size()), b.begin()).first - a.begin());
    };
    const auto same = [&](const std::vector<unsigned char>& a, const std::vector<unsigned char>& b) {
      return where(a, b) == long(b.size());  // after them there may be a part of a word
    };
    CHECK(r.outcome == Outcome::kOk, "route %zu: outcome %d", route, int(r.outcome));
    CHECK(same(r.left, expected.left), "route %zu, %ld+%ld, %ld chains, %d tiles: left unit %ld", route, long(p.n1), long(p.n2),
          long(p.chains), plan.tiles, where(r.left, expected.left));
    CHECK(same(r.right, expected.right), "route %zu, %ld+%ld, %ld chains, %d tiles: right unit %ld", route, long(p.n1), long(p.n2),
          long(p.chains), plan.tiles, where(r.right, expected.right));
    if (p.call.batch.num_models() == 1)
      CHECK(r.rounding.scale == expected.rounding.scale, "route %zu: %g, not %g", route, double(r.rounding.scale),
            double(expected.rounding.scale));
    for (size_t i = 0; i < r.log_weights.size(); ++i)
      CHECK(fabs(r.log_weights[i] - expected.log_weights[i]) <= 1e-5 * sizes[i] * double(p.n1 + p.n2),
            "route %zu, chain %zu: %g, not %g", route, i, r.log_weights[i], expected.log_weights[i]);
    if (log_weights[route].empty()) log_weights[route] = r.log_weights;
    CHECK(r.log_weights == log_weights[route], "route %zu: log-weights depend on the CTAs", route);
  }
}

template <class T>
static void fuzz_resolution() {
  const Problem<T> p = random_problem<T>();
  const auto models = size_t(p.call.batch.num_models());
  if (models != size_t(p.chains)) return;  // the op is given one weight a model
  std::vector<double> expected(models), got(models);
  CHECK(run_coupling_resolution(p.n1, p.n2, p.call.batch, sizeof(T) == 8, p.call.weight, expected.data()) == Outcome::kOk);
  DeviceCall<T> call(p);
  const ResolutionPlan plan = plan_coupling_resolution(call.params, random_device());
  std::vector<uint32_t> workspace(size_t(plan.workspace / 4));
  call.params.workspace = workspace.data();
  launch_coupling_resolution(call.params, plan, got.data(), nullptr);
  for (size_t model = 0; model < models; ++model) {
    const auto linear = size_t(p.call.batch.linear(int64_t(model), 0));
    CHECK(got[linear] == expected[model], "%g, not %g", got[linear], expected[model]);
  }
}

// Each fault is reported as what it is, and nothing is read or written out of bounds.
template <class T>
static void fuzz_faults() {
  Problem<T> p = random_problem<T>();
  if (p.call.num_sweeps == 0 && one_in(2)) return;
  const T bad = one_in(2) ? std::numeric_limits<T>::quiet_NaN() : std::numeric_limits<T>::infinity() * T(one_in(2) ? 1 : -1);
  const int64_t chain = below(p.chains), i = below(p.n1), j = below(p.n2);
  Outcome expected = Outcome::kOk;
  const auto spoil = [&](Tensor<T>& t, int64_t unit, Outcome outcome) {
    t.data[p.offset(t, chain, {unit})] = bad;
    expected = outcome;
  };
  const auto spoil_bits = [&](Bits& bits, int64_t unit, Outcome outcome) {
    const auto size = size_t(bits.view.element_size);
    bits.elements[p.offset(bits.values, chain, {unit}) * size + size - 1] = 0x41;  // of a float: 8 or more
    expected = outcome;
  };
  switch (below(9)) {
    case 0:
      p.weight.data[p.offset(p.weight, chain, {i, j})] = bad;
      expected = Outcome::kNonFiniteWeight;
      break;
    case 1:
      p.weight.data[p.offset(p.weight, chain, {i, j})] = T(-0x1p127);
      expected = Outcome::kTooLargeWeight;
      break;
    case 2:
      spoil(p.left_bias, i, Outcome::kNonFiniteLeftBias);
      break;
    case 3:
      spoil(p.right_bias, j, Outcome::kNonFiniteRightBias);
      break;
    case 4:
      if (!p.annealed) return;
      one_in(2) ? spoil(p.base_left_bias, i, Outcome::kNonFiniteBaseLeftBias)
                : spoil(p.base_right_bias, j, Outcome::kNonFiniteBaseRightBias);
      break;
    case 5:
      spoil_bits(p.left, i, Outcome::kLeftNotBits);
      break;
    case 6:
      if (!p.right.view.data) return;
      spoil_bits(p.right, j, Outcome::kRightNotBits);
      break;
    case 7:
      p.numbers = Tensor<int64_t>(p.sizes, p.some_broadcast(false), [] { return 5; });
      p.numbers.data[p.offset(p.numbers, chain, {})] = one_in(2) ? -1 : kMaxChains;
      p.call.chains = p.numbers.data.data(), p.call.chains_strides = p.numbers.strides;
      expected = Outcome::kChainOutOfRange;
      break;
    default:
      p.call.beta.back() = double(bad);  // also if no sweep reads it
      expected = Outcome::kNonFiniteBeta;
  }
  DeviceCall<T> call(p);
  const BipartitePlan plan = random_plan(call.params);
  const Result r = call.run(plan);
  CHECK(r.outcome == expected, "route %d: outcome %d, not %d", int(plan.route), int(r.outcome), int(expected));
}

int main(int argc, char** argv) {
  for_each_trial(argc, argv, 80, [] {
    fuzz_values<float>();
    fuzz_values<double>();
    fuzz_resolution<float>();
    fuzz_resolution<double>();
    fuzz_faults<float>();
    fuzz_faults<double>();
  });
  printf("runs: registers %ld, shared %ld, cluster %ld, global %ld, all global %ld\n", long(runs_of_route[1]),
         long(runs_of_route[2]), long(runs_of_route[3]), long(runs_of_route[4]), long(runs_of_route[5]));
}
