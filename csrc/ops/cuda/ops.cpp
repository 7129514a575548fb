// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of the ops: tensors to views, outputs, workspace, launch. Argument checks are those of the CPU (csrc/*_arguments.h);
// what tensors hold, the kernels check as they read it, and report (docs: csrc/cuda/README.md, "Faults").
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <atomic>

#include "cuda/bipartite.h"
#include "cuda/devices.h"
#include "cuda/graph.h"
#include "cuda/graph_fields.h"
#include "ops/cuda/library.h"
#include "ops/graph_arguments.h"
#include "ops/schemas.h"

namespace gibbs {

Hooks hooks;

namespace {

enum OpId : uint32_t {
  kBipartiteGibbs,
  kBipartiteGibbsRelaxed,
  kBipartiteGibbsRelaxedBackward,
  kBipartiteAis,
  kCouplingResolution,
  kGraphGibbs,
  kGraphMetropolis,
  kGraphGibbsRelaxed,
  kGraphGibbsRelaxedBackward,
  kGraphAis,
  kGraphCouplingResolution,
  kGraphFields,
  kGraphEdgeSums,
};
constexpr const char* kOpNames[] = {"bipartite_gibbs",  "bipartite_gibbs_relaxed",   "bipartite_gibbs_relaxed_backward",
                                    "bipartite_ais",    "coupling_resolution",       "graph_gibbs",
                                    "graph_metropolis", "graph_gibbs_relaxed",       "graph_gibbs_relaxed_backward",
                                    "graph_ais",        "graph_coupling_resolution", "graph_fields",
                                    "graph_edge_sums"};
const char* coupling_name(uint32_t op) { return op >= kGraphGibbs ? "coupling" : "weight"; }

std::atomic<BipartiteRoute> bipartite_route = BipartiteRoute::kAuto;
std::atomic<GraphCudaRoute> graph_cuda_route = GraphCudaRoute::kAuto;
// Which one the last binary sweeps took: not that asked for where this cannot be taken.
std::atomic<const char*> last_route = "";

void note(const BipartitePlan& plan) {
  constexpr const char* kNames[] = {"auto", "resident", "cluster", "streaming", "tensor", "tensor_streaming"};
  last_route = kNames[int(plan.slice_parts ? BipartiteRoute::kTensorStreaming : plan.route)];
}
void note(const GraphPlan& plan) {
  constexpr const char* kNames[] = {"auto", "tables", "sums", "units"};
  last_route = kNames[int(plan.route)];
}

// ---- views -----------------------------------------------------------------------------------------------------------------------

// Gathers the strides of a call's operands over its batch, merges dimensions that all of them can do without, and writes them into the
// views. The views must stay where they are until then.
class BatchBuilder {
 public:
  explicit BatchBuilder(const Problem& p) : p_(p) {
    Shape contiguous(p.batch_shape().size());
    int64_t stride = 1;
    for (size_t d = contiguous.size(); d-- > 0; stride *= p.batch_shape()[d]) contiguous[d] = stride;
    operands_.push_back({contiguous, nullptr});
  }

  void add(BatchStrides& target, const Tensor& t, int64_t own_dims) {
    operands_.push_back({p_.batch_strides(t, own_dims), &target});
  }

  ParameterView parameter(ParameterView& view, const Tensor& t, int64_t own_dims = 1) {
    view.data = t.const_data_ptr();
    view.stride = t.stride(t.dim() - 1);
    view.row_stride = own_dims > 1 ? t.stride(t.dim() - 2) : 0;
    add(view.batch_strides, t, own_dims);
    return view;
  }

  void state(StateView& view, const Tensor& t) {
    view.data = t.const_data_ptr();
    view.is_floating = t.scalar_type() != ScalarType::Bool && t.scalar_type() != ScalarType::Byte;
    const StateOutput like = output(t);
    view.element_size = like.element_size, view.one = like.one;
    view.stride = t.stride(t.dim() - 1);
    add(view.batch_strides, t, 1);
  }

  static StateOutput output(const Tensor& t) {
    switch (t.scalar_type()) {
      case ScalarType::Double:
        return {t.data_ptr(), 8, 0x3ff0000000000000};
      case ScalarType::Float:
        return {t.data_ptr(), 4, 0x3f800000};
      case ScalarType::Half:
        return {t.data_ptr(), 2, 0x3c00};
      case ScalarType::BFloat16:
        return {t.data_ptr(), 2, 0x3f80};
      default:
        return {t.data_ptr(), 1, 1};
    }
  }

  void finish(BatchView& batch) {
    std::vector<size_t> dims;  // those of more than one element, models' first
    for (const bool of_models : {true, false})
      for (size_t d = 0; d < p_.batch_shape().size(); ++d)
        if (p_.is_model_dim()[d] == of_models && p_.batch_shape()[d] != 1) dims.push_back(d);
    batch = {};
    batch.num_models = batch.chains_per_model = 1;
    int last = -1;
    bool last_of_models = false;
    for (const size_t d : dims) {
      const int64_t size = p_.batch_shape()[d];
      const bool of_models = p_.is_model_dim()[d];
      const auto continues = [&](const Operand& o) { return o.merged[last] == o.strides[d] * size; };
      const bool merges = last >= 0 && of_models == last_of_models && std::all_of(operands_.begin(), operands_.end(), continues);
      if (!merges && ++last == kMaxBatchDims)
        fail(p_.op(), "the batch has more than ", kMaxBatchDims,
             " dimensions that are strided or broadcast each in its own way: ", text(p_.batch_shape()));
      batch.sizes[last] = merges ? batch.sizes[last] * size : size;
      for (Operand& o : operands_) o.merged[last] = o.strides[d];
      last_of_models = of_models;
      if (of_models) batch.num_model_dims = last + 1;
      (of_models ? batch.num_models : batch.chains_per_model) *= size;
    }
    batch.num_dims = last + 1;
    std::copy(operands_[0].merged.begin(), operands_[0].merged.end(), batch.contiguous);
    for (size_t i = 1; i < operands_.size(); ++i)
      std::copy(operands_[i].merged.begin(), operands_[i].merged.end(), *operands_[i].target);
  }

 private:
  struct Operand {
    Shape strides;
    BatchStrides* target;
    std::array<int64_t, kMaxBatchDims> merged = {};
  };
  const Problem& p_;
  std::vector<Operand> operands_;
};

// ---- reports ---------------------------------------------------------------------------------------------------------------------

// What a device's kernels have found since it was last asked; "" if nothing. Warns of rounding where nothing was wrong.
enum class FoundBy { kThisCall, kEarlierCall };
std::string take_report(DeviceReport& report, FoundBy by, const std::string& with_beta = "") {
  const Findings found = take_findings(report);
  if (found.rounding && !found.fault) {
    const auto& [op, rounding, degree] = *found.rounding;
    warn_of_rounding(kOpNames[op], coupling_name(op), rounding, degree,
                     with_beta + (by == FoundBy::kEarlierCall ? " (found by an earlier call)" : ""));
  }
  if (!found.fault) return "";
  const auto& [op, outcome, value] = *found.fault;
  const char* beta = op == kBipartiteAis || op == kGraphAis ? "betas" : "beta";
  return std::string(kOpNames[op]) + ": " + text(outcome, value, beta) +
         (by == FoundBy::kEarlierCall ? " (found by an earlier call, whose results are not valid)" : "");
}

// ---- one call --------------------------------------------------------------------------------------------------------------------

class Call {
 public:
  // Raises what an earlier call's kernels have found meanwhile.
  Call(OpId id, const Tensor& on) : op_(kOpNames[id]), id_(id), device_(device_index(on)), guard_(device_) {
    try {
      used_ = &use_device(device_);
      stream_ = current_stream(device_);
    } catch (const std::runtime_error& error) {
      fail_at_runtime(error.what());
    }
    raise(take_report(*used_->report, FoundBy::kEarlierCall));
  }

  const DeviceLimits& limits() const { return used_->limits; }
  Stream stream() const { return stream_; }

  void describe(SweepView& s, BatchBuilder& batch, const Counters& c, const char* beta_name, const Tensor& beta,
                double num_rounded_sweeps) {
    s.op = id_;
    s.report = used_->report;
    s.chain_offset = c.chain_offset, s.sweep_offset = c.sweep_offset;
    s.num_sweeps = c.num_sweeps, s.num_relaxed_sweeps = c.num_relaxed_sweeps;
    if (c.chains) {
      s.chains = static_cast<const int64_t*>(c.chains->const_data_ptr());
      batch.add(s.chains_strides, *c.chains, 0);
    }
    if (c.seed.is_cpu())
      s.seed = uint64_t(*static_cast<const int64_t*>(c.seed.const_data_ptr()));
    else
      s.seed_data = static_cast<const int64_t*>(c.seed.const_data_ptr());
    s.num_betas = beta.size(0);
    double& largest_beta = largest_beta_;
    if (beta.is_cpu()) {
      const std::vector<double> values = read_beta(op_, beta_name, beta);
      largest_beta = largest_magnitude(values);
      if (values.size() <= kMaxInlineBetas)
        std::copy(values.begin(), values.end(), s.beta);
      else
        s.beta_data = on_device(beta_name, beta);
    } else {
      beta_ = torch::stable::contiguous(beta);
      s.beta_data = static_cast<const double*>(beta_.const_data_ptr());
    }
    s.largest_error = num_rounded_sweeps > 0 && largest_beta > 0 ? float(kResolutionLimit / largest_beta) : -1;
  }

  void describe(SweepView& s) const { s.op = id_, s.report = used_->report, s.largest_error = -1; }

  void describe(SweepView& s, const RelaxationArguments& r) const {
    s.relaxation = int32_t(r.relaxation), s.sharpness = r.sharpness, s.slope_gradient = r.slope_gradient;
  }

  // Outputs and workspace. Says who wanted how much where there is not enough.
  Tensor allocate(const Tensor& like, const Shape& shape, ScalarType type) const {
    try {
      return torch::stable::new_empty(like, shape, type);
    } catch (const std::exception& error) {
      fail_at_runtime("cannot allocate " + text(shape) + " " + name_of(type) + " on " + device_of(like) + ": " + error.what());
    }
  }
  void* workspace(const Tensor& like, int64_t bytes) {
    if (!bytes) return nullptr;
    workspace_ = allocate(like, {bytes}, ScalarType::Byte);
    return workspace_.mutable_data_ptr();
  }

  // Plans and launches: whatever they throw is said in the op's name.
  template <class F>
  auto run(const F& f) const {
    try {
      return f();
    } catch (const std::invalid_argument& error) {
      fail(op_, error.what());
    } catch (const std::exception& error) {
      fail_at_runtime(error.what());
    }
  }

  // After the launch.
  void finish() const {
    if (!is_synchronous() || run([&] { return is_capturing(stream_); })) return;
    run([&] { synchronize(stream_); });
    raise(take_report(*used_->report, FoundBy::kThisCall, at_beta(largest_beta_)));
  }

 private:
  // What is wrong with the machine, not with an argument.
  [[noreturn]] void fail_at_runtime(const std::string& what) const { throw std::runtime_error(std::string(op_) + ": " + what); }
  static int device_index(const Tensor& t) { return t.is_cpu() ? 0 : t.get_device_index(); }
  static void raise(const std::string& message) {
    if (!message.empty()) throw std::invalid_argument(message);
  }

  const double* on_device(const char* name, const Tensor& beta) {
#if defined(GIBBS_EMULATE)
    (void)name;
    beta_ = torch::stable::contiguous(beta);
#else
    if (run([&] { return is_capturing(stream_); }))
      fail(op_, name, " of more than ", kMaxInlineBetas, " values must be on the device while a CUDA graph is captured, got cpu");
    beta_ = torch::stable::to(torch::stable::contiguous(beta), torch::stable::Device(torch::headeronly::DeviceType::CUDA, device_));
#endif
    return static_cast<const double*>(beta_.const_data_ptr());
  }

  const char* op_;
  OpId id_;
  int device_;
#if defined(GIBBS_EMULATE)
  struct NoGuard {
    explicit NoGuard(int) {}
  } guard_;
#else
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  const Device* used_;
  Stream stream_;
  Tensor workspace_, beta_;
  double largest_beta_ = 1;  // as far as it is known here
};

// The dispatcher brings a call here as soon as one tensor is on a CUDA device.
void check_device(const Problem& p) {
#if !defined(GIBBS_EMULATE)
  if (!p.coupling().is_cuda())
    fail(p.op(), "the parameters must be on the CUDA device of the other tensors, got ", device_of(p.coupling()));
#endif
  (void)p;
}

// ---- bipartite -------------------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> bipartite_gibbs(const Tensor& left, const Tensor& left_bias, const Tensor& right_bias,
                                           const Tensor& weight, const Tensor& beta, const Tensor& seed,
                                           const std::optional<Tensor>& right, const std::optional<Tensor>& clamp_left,
                                           const std::optional<Tensor>& clamp_right, const std::optional<Tensor>& chains,
                                           int64_t chain_offset, int64_t sweep_offset, int64_t num_sweeps) {
  const Counters counters = {seed, chains, chain_offset, sweep_offset, num_sweeps, 0};
  const BipartiteArguments a = check_bipartite_gibbs(kOpNames[kBipartiteGibbs], left, left_bias, right_bias, weight, beta, right,
                                                     clamp_left, clamp_right, counters);
  const BipartiteProblem& p = a.p;
  check_device(p);
  Call call(kBipartiteGibbs, p.coupling());
  const Tensor left_out = call.allocate(left, p.with_batch({p.n1}), left.scalar_type()),
               right_out = call.allocate(left, p.with_batch({p.n2}), left.scalar_type());
  if (!p.num_chains()) return {left_out, right_out};
  BipartiteParams params = {};
  BatchBuilder batch(p);
  params.n1 = p.n1, params.n2 = p.n2, params.is_double = p.is_double();
  batch.parameter(params.weight, p.coupling(), 2);
  batch.parameter(params.left_bias, a.left_bias);
  batch.parameter(params.right_bias, a.right_bias);
  batch.state(params.left, left);
  if (right) batch.state(params.right, *right);
  if (clamp_left) batch.state(params.clamp_left, *clamp_left);
  if (clamp_right) batch.state(params.clamp_right, *clamp_right);
  params.left_out = BatchBuilder::output(left_out);
  params.right_out = BatchBuilder::output(right_out);
  call.describe(params.sweep, batch, counters, "beta", beta, double(num_sweeps));
  batch.finish(params.sweep.batch);
  const BipartitePlan plan = call.run([&] { return plan_bipartite(params, call.limits(), bipartite_route); });
  note(plan);
  params.workspace = call.workspace(p.coupling(), plan.workspace);
  call.run([&] { launch_bipartite(params, plan, call.stream()); });
  call.finish();
  return {left_out, right_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bipartite_gibbs_relaxed(
    const Tensor& left, const Tensor& left_bias, const Tensor& right_bias, const Tensor& weight, const Tensor& beta,
    const Tensor& seed, const std::optional<Tensor>& chains, int64_t chain_offset, int64_t sweep_offset, int64_t num_sweeps,
    int64_t num_relaxed_sweeps, int64_t relaxation, double sharpness, bool slope_gradient) {
  const Counters counters = {seed, chains, chain_offset, sweep_offset, num_sweeps, num_relaxed_sweeps};
  const RelaxationArguments relaxed = {relaxation, sharpness, slope_gradient};
  const BipartiteArguments a =
      check_bipartite_gibbs_relaxed(kOpNames[kBipartiteGibbsRelaxed], left, left_bias, right_bias, weight, beta, counters, relaxed);
  const BipartiteProblem& p = a.p;
  check_device(p);
  Call call(kBipartiteGibbsRelaxed, p.coupling());
  const ScalarType type = p.coupling().scalar_type();
  const auto output = [&](const Shape& shape) { return call.allocate(p.coupling(), shape, type); };
  const Tensor state = output(p.with_batch({p.n1})), left_out = output(p.with_batch({p.n1})),
               right_out = output(p.with_batch({p.n2})), mean = output(p.with_batch({p.n1})),
               fields = output(p.with_batch({p.n2 + p.n1}, {num_relaxed_sweeps}));
  if (!p.num_chains()) return {left_out, right_out, mean, state, fields};
  BipartiteParams params = {};
  BatchBuilder batch(p);
  params.n1 = p.n1, params.n2 = p.n2, params.is_double = p.is_double();
  batch.parameter(params.weight, p.coupling(), 2);
  batch.parameter(params.left_bias, a.left_bias);
  batch.parameter(params.right_bias, a.right_bias);
  const Tensor start = num_sweeps || left.scalar_type() == type ? left : torch::stable::to(left, type);
  if (num_sweeps)
    batch.state(params.left, left);
  else
    batch.parameter(params.start, start);
  params.start_is_bits = left.scalar_type() == ScalarType::Bool || left.scalar_type() == ScalarType::Byte;
  params.state = state.mutable_data_ptr();
  params.left_relaxed = left_out.mutable_data_ptr();
  params.right_relaxed = right_out.mutable_data_ptr();
  params.left_mean = mean.mutable_data_ptr();
  params.fields = fields.mutable_data_ptr();
  call.describe(params.sweep, batch, counters, "beta", beta, double(num_sweeps));
  call.describe(params.sweep, relaxed);
  batch.finish(params.sweep.batch);
  const BipartitePlan plan = call.run([&] { return plan_bipartite_relaxed(params, call.limits()); });
  params.workspace = call.workspace(p.coupling(), plan.workspace);
  call.run([&] { launch_bipartite_relaxed(params, plan, call.stream()); });
  call.finish();
  return {left_out, right_out, mean, state, fields};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bipartite_gibbs_relaxed_backward(
    const Tensor& grad_left, const Tensor& grad_right, const Tensor& grad_left_mean, const Tensor& state, const Tensor& fields,
    const Tensor& weight, const Tensor& beta, const Tensor& seed, const std::optional<Tensor>& chains, int64_t chain_offset,
    int64_t sweep_offset, int64_t num_sweeps, int64_t relaxation, double sharpness, bool slope_gradient) {
  const Counters counters = {seed, chains, chain_offset, sweep_offset, num_sweeps, relaxed_sweeps_of(fields)};
  const RelaxationArguments relaxed = {relaxation, sharpness, slope_gradient};
  const BipartiteBackwardArguments a =
      check_bipartite_gibbs_relaxed_backward(kOpNames[kBipartiteGibbsRelaxedBackward], grad_left, grad_right, grad_left_mean, state,
                                             fields, weight, beta, counters, relaxed);
  const BipartiteProblem& p = a.p;
  check_device(p);
  Call call(kBipartiteGibbsRelaxedBackward, p.coupling());
  const ScalarType type = p.coupling().scalar_type();
  const auto output = [&](const Shape& shape) { return call.allocate(p.coupling(), shape, type); };
  const Tensor grad_state = output(p.with_batch({p.n1})), grad_left_bias = output(p.with_batch({p.n1})),
               grad_right_bias = output(p.with_batch({p.n2}));
  Tensor grad_weight = output(shape_of(weight));
  if (!p.num_chains()) return {grad_state, grad_left_bias, grad_right_bias, torch::stable::zero_(grad_weight)};
  BipartiteBackwardParams params = {};
  BatchBuilder batch(p);
  params.n1 = p.n1, params.n2 = p.n2, params.is_double = p.is_double();
  params.needs_grad_state = num_sweeps == 0;
  batch.parameter(params.weight, p.coupling(), 2);
  params.grad_left = a.grad_left.const_data_ptr();
  params.grad_right = a.grad_right.const_data_ptr();
  params.grad_left_mean = a.grad_left_mean.const_data_ptr();
  params.state = a.state.const_data_ptr();
  params.fields = a.fields.const_data_ptr();
  params.grad_state = grad_state.mutable_data_ptr();
  params.grad_left_bias = grad_left_bias.mutable_data_ptr();
  params.grad_right_bias = grad_right_bias.mutable_data_ptr();
  params.grad_weight = grad_weight.mutable_data_ptr();
  call.describe(params.sweep, batch, counters, "beta", beta, 0);
  call.describe(params.sweep, relaxed);
  batch.finish(params.sweep.batch);
  const BipartiteBackwardPlan plan = call.run([&] { return plan_bipartite_backward(params, call.limits()); });
  params.workspace = call.workspace(p.coupling(), plan.workspace);
  call.run([&] { launch_bipartite_backward(params, plan, call.stream()); });
  call.finish();
  return {grad_state, grad_left_bias, grad_right_bias, grad_weight};
}

std::tuple<Tensor, Tensor, Tensor> bipartite_ais(const Tensor& left, const Tensor& left_bias, const Tensor& right_bias,
                                                 const Tensor& weight, const Tensor& base_left_bias, const Tensor& base_right_bias,
                                                 const Tensor& betas, const Tensor& seed, const std::optional<Tensor>& chains,
                                                 int64_t chain_offset, int64_t sweep_offset) {
  constexpr const char* op = kOpNames[kBipartiteAis];
  const Counters counters = {seed, chains, chain_offset, sweep_offset, annealed_sweeps(op, betas), 0};
  const BipartiteAnnealedArguments a =
      check_bipartite_ais(op, left, left_bias, right_bias, weight, base_left_bias, base_right_bias, betas, counters);
  const BipartiteProblem& p = a.p;
  check_device(p);
  Call call(kBipartiteAis, p.coupling());
  const Tensor left_out = call.allocate(left, p.with_batch({p.n1}), left.scalar_type()),
               right_out = call.allocate(left, p.with_batch({p.n2}), left.scalar_type()),
               log_weights = call.allocate(p.coupling(), p.with_batch({}), ScalarType::Double);
  if (!p.num_chains()) return {left_out, right_out, log_weights};
  BipartiteParams params = {};
  BatchBuilder batch(p);
  params.n1 = p.n1, params.n2 = p.n2, params.is_double = p.is_double();
  batch.parameter(params.weight, p.coupling(), 2);
  batch.parameter(params.left_bias, a.left_bias);
  batch.parameter(params.right_bias, a.right_bias);
  batch.parameter(params.base_left_bias, a.base_left_bias);
  batch.parameter(params.base_right_bias, a.base_right_bias);
  batch.state(params.left, left);
  params.left_out = BatchBuilder::output(left_out);
  params.right_out = BatchBuilder::output(right_out);
  params.log_weights = static_cast<double*>(log_weights.mutable_data_ptr());
  call.describe(params.sweep, batch, counters, "betas", betas, double(counters.num_sweeps));
  batch.finish(params.sweep.batch);
  const BipartitePlan plan = call.run([&] { return plan_bipartite(params, call.limits(), bipartite_route); });
  note(plan);
  params.workspace = call.workspace(p.coupling(), plan.workspace);
  call.run([&] { launch_bipartite(params, plan, call.stream()); });
  call.finish();
  return {left_out, right_out, log_weights};
}

Tensor coupling_resolution(const Tensor& weight) {
  BipartiteProblem p(kOpNames[kCouplingResolution], weight);
  p.finish(true);
  check_device(p);
  Call call(kCouplingResolution, p.coupling());
  const Tensor out = call.allocate(p.coupling(), p.with_batch({}), ScalarType::Double);
  if (!p.num_chains()) return out;
  BipartiteParams params = {};
  BatchBuilder batch(p);
  params.n1 = p.n1, params.n2 = p.n2, params.is_double = p.is_double();
  batch.parameter(params.weight, p.coupling(), 2);
  call.describe(params.sweep);
  batch.finish(params.sweep.batch);
  call.run([&] { launch_coupling_resolution(params, static_cast<double*>(out.mutable_data_ptr()), call.stream()); });
  call.finish();
  return out;
}

// ---- graphs ----------------------------------------------------------------------------------------------------------------------

// A layout on a device is not read here: sizes tell how many nodes, edges and colours it must hold, the kernels check what it says.
GraphSize size_of(const char* op, const Tensor& coupling, const Tensor& layout, const Tensor& units) {
  check_layout_tensor(op, layout);
  if (coupling.dim() < 1 || units.dim() < 1) return {1, coupling.dim() < 1 ? 0 : coupling.size(coupling.dim() - 1), 1};
  const int64_t nodes = units.size(units.dim() - 1), edges = coupling.size(coupling.dim() - 1);
  const int64_t colors = layout.size(0) - layout_size(nodes, edges, 0);
  if (nodes < 1 || nodes >= kMaxUnits || colors < 1 || colors > nodes) fail_layout(op, layout);
  return {nodes, edges, colors};
}

template <class Params>
Params graph_params(const GraphProblem& p, const Tensor& layout) {
  Params params = {};
  params.layout = static_cast<const int32_t*>(layout.const_data_ptr());
  params.num_nodes = p.size.num_nodes, params.num_edges = p.size.num_edges, params.num_colors = p.size.num_colors;
  params.is_double = p.is_double();
  return params;
}

// graph_gibbs and graph_metropolis.
template <OpId kOp>
Tensor graph_sweeps(const Tensor& state, const Tensor& bias, const Tensor& coupling, const Tensor& layout, const Tensor& beta,
                    const Tensor& seed, const std::optional<Tensor>& clamp, const std::optional<Tensor>& chains,
                    int64_t chain_offset, int64_t sweep_offset, int64_t num_sweeps) {
  constexpr const char* op = kOpNames[kOp];
  const Counters counters = {seed, chains, chain_offset, sweep_offset, num_sweeps, 0};
  GraphProblem p(op, coupling, layout, size_of(op, coupling, layout, state));
  const Tensor parameter = check_graph_gibbs(p, state, bias, beta, clamp, counters);
  check_device(p);
  Call call(kOp, p.coupling());
  const Tensor out = call.allocate(state, p.with_batch({p.size.num_nodes}), state.scalar_type());
  if (!p.num_chains()) return out;
  GraphParams params = graph_params<GraphParams>(p, layout);
  BatchBuilder batch(p);
  batch.parameter(params.coupling, p.coupling());
  batch.parameter(params.bias, parameter);
  batch.state(params.state, state);
  if (clamp) batch.state(params.clamp, *clamp);
  params.state_out = BatchBuilder::output(out);
  params.metropolis = kOp == kGraphMetropolis;
  call.describe(params.sweep, batch, counters, "beta", beta, double(p.size.num_edges ? num_sweeps : 0));
  batch.finish(params.sweep.batch);
  const GraphPlan plan = call.run([&] { return plan_graph(params, call.limits(), graph_cuda_route); });
  note(plan);
  params.workspace = call.workspace(p.coupling(), plan.workspace);
  call.run([&] { launch_graph(params, plan, call.stream()); });
  call.finish();
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> graph_gibbs_relaxed(const Tensor& state, const Tensor& bias, const Tensor& coupling,
                                                               const Tensor& layout, const Tensor& beta, const Tensor& seed,
                                                               const std::optional<Tensor>& chains, int64_t chain_offset,
                                                               int64_t sweep_offset, int64_t num_sweeps, int64_t num_relaxed_sweeps,
                                                               int64_t relaxation, double sharpness, bool slope_gradient) {
  constexpr const char* op = kOpNames[kGraphGibbsRelaxed];
  const Counters counters = {seed, chains, chain_offset, sweep_offset, num_sweeps, num_relaxed_sweeps};
  const RelaxationArguments how = {relaxation, sharpness, slope_gradient};
  GraphProblem p(op, coupling, layout, size_of(op, coupling, layout, state));
  const Tensor parameter = check_graph_gibbs_relaxed(p, state, bias, beta, counters, how);
  check_device(p);
  Call call(kGraphGibbsRelaxed, p.coupling());
  const int64_t n = p.size.num_nodes;
  const ScalarType type = p.coupling().scalar_type();
  const auto output = [&](const Shape& shape) { return call.allocate(p.coupling(), shape, type); };
  const Tensor start_out = output(p.with_batch({n})), relaxed = output(p.with_batch({n})), mean = output(p.with_batch({n})),
               fields = output(p.with_batch({n}, {num_relaxed_sweeps}));
  if (!p.num_chains()) return {relaxed, mean, start_out, fields};
  GraphParams params = graph_params<GraphParams>(p, layout);
  BatchBuilder batch(p);
  batch.parameter(params.coupling, p.coupling());
  batch.parameter(params.bias, parameter);
  const Tensor start = num_sweeps || state.scalar_type() == type ? state : torch::stable::to(state, type);
  if (num_sweeps)
    batch.state(params.state, state);
  else
    batch.parameter(params.start, start);
  params.start_is_bits = state.scalar_type() == ScalarType::Bool || state.scalar_type() == ScalarType::Byte;
  params.start_out = start_out.mutable_data_ptr();
  params.relaxed = relaxed.mutable_data_ptr();
  params.mean = mean.mutable_data_ptr();
  params.fields = fields.mutable_data_ptr();
  call.describe(params.sweep, batch, counters, "beta", beta, double(p.size.num_edges ? num_sweeps : 0));
  call.describe(params.sweep, how);
  batch.finish(params.sweep.batch);
  const GraphPlan plan = call.run([&] { return plan_graph_relaxed(params, call.limits()); });
  params.workspace = call.workspace(p.coupling(), plan.workspace);
  call.run([&] { launch_graph_relaxed(params, plan, call.stream()); });
  call.finish();
  return {relaxed, mean, start_out, fields};
}

std::tuple<Tensor, Tensor, Tensor> graph_gibbs_relaxed_backward(const Tensor& grad_relaxed, const Tensor& grad_mean,
                                                                const Tensor& state, const Tensor& fields, const Tensor& coupling,
                                                                const Tensor& layout, const Tensor& beta, const Tensor& seed,
                                                                const std::optional<Tensor>& chains, int64_t chain_offset,
                                                                int64_t sweep_offset, int64_t num_sweeps, int64_t relaxation,
                                                                double sharpness, bool slope_gradient) {
  constexpr const char* op = kOpNames[kGraphGibbsRelaxedBackward];
  const Counters counters = {seed, chains, chain_offset, sweep_offset, num_sweeps, relaxed_sweeps_of(fields)};
  const RelaxationArguments how = {relaxation, sharpness, slope_gradient};
  GraphProblem p(op, coupling, layout, size_of(op, coupling, layout, state));
  const GraphBackwardTensors t = check_graph_gibbs_relaxed_backward(p, grad_relaxed, grad_mean, state, fields, beta, counters, how);
  check_device(p);
  Call call(kGraphGibbsRelaxedBackward, p.coupling());
  const ScalarType type = p.coupling().scalar_type();
  const Shape shape = p.with_batch({p.size.num_nodes});
  const Tensor grad_state = call.allocate(p.coupling(), shape, type), grad_bias = call.allocate(p.coupling(), shape, type);
  Tensor grad_coupling = call.allocate(p.coupling(), shape_of(coupling), type);
  if (!p.num_chains()) return {grad_state, grad_bias, torch::stable::zero_(grad_coupling)};
  GraphBackwardParams params = graph_params<GraphBackwardParams>(p, layout);
  BatchBuilder batch(p);
  batch.parameter(params.coupling, p.coupling());
  params.grad_relaxed = t.grad_relaxed.const_data_ptr();
  params.grad_mean = t.grad_mean.const_data_ptr();
  params.state = t.state.const_data_ptr();
  params.fields = t.fields.const_data_ptr();
  params.grad_state = grad_state.mutable_data_ptr();
  params.grad_bias = grad_bias.mutable_data_ptr();
  params.grad_coupling = grad_coupling.mutable_data_ptr();
  call.describe(params.sweep, batch, counters, "beta", beta, 0);
  call.describe(params.sweep, how);
  batch.finish(params.sweep.batch);
  const GraphBackwardPlan plan = call.run([&] { return plan_graph_backward(params, call.limits()); });
  params.workspace = call.workspace(p.coupling(), plan.workspace);
  call.run([&] { launch_graph_backward(params, plan, call.stream()); });
  call.finish();
  return {grad_state, grad_bias, grad_coupling};
}

std::tuple<Tensor, Tensor> graph_ais(const Tensor& state, const Tensor& bias, const Tensor& coupling, const Tensor& layout,
                                     const Tensor& base_bias, const Tensor& betas, const Tensor& seed,
                                     const std::optional<Tensor>& chains, int64_t chain_offset, int64_t sweep_offset) {
  constexpr const char* op = kOpNames[kGraphAis];
  const Counters counters = {seed, chains, chain_offset, sweep_offset, annealed_sweeps(op, betas), 0};
  GraphProblem p(op, coupling, layout, size_of(op, coupling, layout, state));
  const GraphAnnealedTensors t = check_graph_ais(p, state, bias, base_bias, betas, counters);
  check_device(p);
  Call call(kGraphAis, p.coupling());
  const Tensor out = call.allocate(state, p.with_batch({p.size.num_nodes}), state.scalar_type()),
               log_weights = call.allocate(p.coupling(), p.with_batch({}), ScalarType::Double);
  if (!p.num_chains()) return {out, log_weights};
  GraphParams params = graph_params<GraphParams>(p, layout);
  BatchBuilder batch(p);
  batch.parameter(params.coupling, p.coupling());
  batch.parameter(params.bias, t.bias);
  batch.parameter(params.base_bias, t.base_bias);
  batch.state(params.state, state);
  params.state_out = BatchBuilder::output(out);
  params.log_weights = static_cast<double*>(log_weights.mutable_data_ptr());
  call.describe(params.sweep, batch, counters, "betas", betas, double(p.size.num_edges ? counters.num_sweeps : 0));
  batch.finish(params.sweep.batch);
  const GraphPlan plan = call.run([&] { return plan_graph(params, call.limits(), graph_cuda_route); });
  note(plan);
  params.workspace = call.workspace(p.coupling(), plan.workspace);
  call.run([&] { launch_graph(params, plan, call.stream()); });
  call.finish();
  return {out, log_weights};
}

Tensor graph_coupling_resolution(const Tensor& coupling, const Tensor& layout) {
  constexpr const char* op = kOpNames[kGraphCouplingResolution];
  check_layout_tensor(op, layout);
  // No other tensor tells how many nodes and colours there are, so this one call waits for the device.
  if (layout.size(0) < kLayoutHeader) fail_layout(op, layout);
  Tensor whole = layout;
  const Tensor header = torch::stable::to(torch::stable::narrow(whole, 0, 0, kLayoutHeader),
                                          torch::stable::Device(torch::headeronly::DeviceType::CPU));
  const int32_t* numbers = static_cast<const int32_t*>(header.const_data_ptr());
  const GraphSize size = {numbers[0], numbers[1], numbers[2]};
  if (size.num_nodes < 1 || size.num_edges < 0 || size.num_colors < 1 || size.num_colors > size.num_nodes ||
      layout.size(0) != layout_size(size.num_nodes, size.num_edges, size.num_colors))
    fail_layout(op, layout);
  GraphProblem p(op, coupling, layout, size);
  p.finish(true);
  check_device(p);
  Call call(kGraphCouplingResolution, p.coupling());
  const Tensor out = call.allocate(p.coupling(), p.with_batch({}), ScalarType::Double);
  if (!p.num_chains()) return out;
  GraphParams params = graph_params<GraphParams>(p, layout);
  BatchBuilder batch(p);
  batch.parameter(params.coupling, p.coupling());
  call.describe(params.sweep);
  batch.finish(params.sweep.batch);
  call.run([&] { launch_graph_coupling_resolution(params, static_cast<double*>(out.mutable_data_ptr()), call.stream()); });
  call.finish();
  return out;
}

Tensor graph_fields(const Tensor& state, const Tensor& bias, const Tensor& coupling, const Tensor& layout) {
  constexpr const char* op = kOpNames[kGraphFields];
  GraphProblem p(op, coupling, layout, size_of(op, coupling, layout, state));
  const Tensor parameter = check_graph_fields(p, state, bias);
  check_device(p);
  Call call(kGraphFields, p.coupling());
  const Tensor out = call.allocate(p.coupling(), p.with_batch({p.size.num_nodes}), p.coupling().scalar_type());
  if (!p.num_chains()) return out;
  GraphFieldsParams params = graph_params<GraphFieldsParams>(p, layout);
  BatchBuilder batch(p);
  batch.parameter(params.coupling, p.coupling());
  batch.parameter(params.bias, parameter);
  batch.parameter(params.state, state);
  params.out = out.mutable_data_ptr();
  call.describe(params.sweep);
  batch.finish(params.sweep.batch);
  call.run([&] { launch_graph_fields(params, call.stream()); });
  call.finish();
  return out;
}

Tensor graph_edge_sums(const Tensor& first, const Tensor& second, const Tensor& coupling, const Tensor& layout) {
  constexpr const char* op = kOpNames[kGraphEdgeSums];
  GraphProblem p(op, coupling, layout, size_of(op, coupling, layout, first));
  check_graph_edge_sums(p, first, second);
  check_device(p);
  Call call(kGraphEdgeSums, p.coupling());
  Tensor out = call.allocate(p.coupling(), shape_of(coupling), p.coupling().scalar_type());
  if (!p.num_chains()) return torch::stable::zero_(out);
  GraphEdgeSumsParams params = graph_params<GraphEdgeSumsParams>(p, layout);
  BatchBuilder batch(p);
  batch.parameter(params.first, first);
  batch.parameter(params.second, second);
  params.out = out.mutable_data_ptr();
  call.describe(params.sweep);
  batch.finish(params.sweep.batch);
  call.run([&] { launch_graph_edge_sums(params, call.stream()); });
  call.finish();
  return out;
}

bool set_route(const char* name) {
  struct Route {
    const char* name;
    BipartiteRoute bipartite;
    GraphCudaRoute graph;
  };
  constexpr Route kRoutes[] = {{"auto", BipartiteRoute::kAuto, GraphCudaRoute::kAuto},
                               {"resident", BipartiteRoute::kResident, GraphCudaRoute::kAuto},
                               {"cluster", BipartiteRoute::kCluster, GraphCudaRoute::kAuto},
                               {"streaming", BipartiteRoute::kStreaming, GraphCudaRoute::kAuto},
                               {"tensor", BipartiteRoute::kTensor, GraphCudaRoute::kAuto},
                               {"tensor_streaming", BipartiteRoute::kTensorStreaming, GraphCudaRoute::kAuto},
                               {"tables", BipartiteRoute::kAuto, GraphCudaRoute::kTables},
                               {"sums", BipartiteRoute::kAuto, GraphCudaRoute::kSums},
                               {"units", BipartiteRoute::kAuto, GraphCudaRoute::kUnits}};
  for (const Route& route : kRoutes)
    if (!std::strcmp(route.name, name)) {
      bipartite_route = route.bipartite, graph_cuda_route = route.graph;
      return true;
    }
  return false;
}

const char* take_fault(int device) {
  static thread_local std::string text;
  DeviceReport* const report = report_if_used(device);
  text = report ? take_report(*report, FoundBy::kThisCall) : "";
  return text.empty() ? nullptr : text.c_str();
}

}  // namespace
}  // namespace gibbs

#if !defined(GIBBS_ARCHITECTURES)
#define GIBBS_ARCHITECTURES ""
#endif

extern "C" __attribute__((visibility("default"))) const gibbs::CudaLibrary* gibbs_cuda_library() {
  static const gibbs::CudaLibrary library = {[](const gibbs::Hooks& hooks) { gibbs::hooks = hooks; }, GIBBS_ARCHITECTURES,
                                             gibbs::take_fault, gibbs::set_route, [] { return gibbs::last_route.load(); }};
  return &library;
}

// The emulator's kernels run on the host and are ops of their own, with the same schemas.
#if defined(GIBBS_EMULATE)
#define GIBBS_OPS gibbs_ext_emulated
#define GIBBS_OPS_KEY CPU
STABLE_TORCH_LIBRARY(gibbs_ext_emulated, m) {
  for (const char* schema : gibbs::kSchemas) m.def(schema);
}
#else
#define GIBBS_OPS gibbs_ext
#define GIBBS_OPS_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(GIBBS_OPS, GIBBS_OPS_KEY, m) {
  m.impl("bipartite_gibbs", TORCH_BOX(&gibbs::bipartite_gibbs));
  m.impl("bipartite_gibbs_relaxed", TORCH_BOX(&gibbs::bipartite_gibbs_relaxed));
  m.impl("bipartite_gibbs_relaxed_backward", TORCH_BOX(&gibbs::bipartite_gibbs_relaxed_backward));
  m.impl("bipartite_ais", TORCH_BOX(&gibbs::bipartite_ais));
  m.impl("coupling_resolution", TORCH_BOX(&gibbs::coupling_resolution));
  m.impl("graph_gibbs", TORCH_BOX(&gibbs::graph_sweeps<gibbs::kGraphGibbs>));
  m.impl("graph_metropolis", TORCH_BOX(&gibbs::graph_sweeps<gibbs::kGraphMetropolis>));
  m.impl("graph_gibbs_relaxed", TORCH_BOX(&gibbs::graph_gibbs_relaxed));
  m.impl("graph_gibbs_relaxed_backward", TORCH_BOX(&gibbs::graph_gibbs_relaxed_backward));
  m.impl("graph_ais", TORCH_BOX(&gibbs::graph_ais));
  m.impl("graph_coupling_resolution", TORCH_BOX(&gibbs::graph_coupling_resolution));
  m.impl("graph_fields", TORCH_BOX(&gibbs::graph_fields));
  m.impl("graph_edge_sums", TORCH_BOX(&gibbs::graph_edge_sums));
}
