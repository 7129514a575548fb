// SPDX-License-Identifier: Apache-2.0
#pragma once

// One call of a CUDA op: tensors become views, kernels are planned and launched, and their reports become errors and warnings. Kernels
// check the values of tensors, and report what is wrong (csrc/cuda/README.md, "Faults").
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "cuda/devices.h"
#include "cuda/moments.h"
#include "cuda/tempering.h"
#include "cuda/views.cuh"
#include "ops/arguments.h"

// The emulator's kernels run on the host, as ops of their own with the same schemas.
#if defined(GIBBS_EMULATE)
#define GIBBS_OPS gibbs_ext_emulated
#define GIBBS_OPS_KEY CPU
#else
#define GIBBS_OPS gibbs_ext
#define GIBBS_OPS_KEY CUDA
#endif

namespace gibbs {

// Gathers the strides of a call's operands over its batch, merges dimensions that none of them keeps apart, and writes the strides into the
// views. Until then the views must stay where they are.
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

  void add(BatchStrides& target, const Shape& strides) { operands_.push_back({strides, &target}); }

  // Absent tensors, null, leave their views as they are.
  void parameter(ParameterView& view, const Tensor* t, int64_t own_dims = 1) {
    if (!t) return;
    view.data = t->const_data_ptr();
    view.stride = t->stride(t->dim() - 1);
    view.row_stride = own_dims > 1 ? t->stride(t->dim() - 2) : 0;
    add(view.batch_strides, *t, own_dims);
  }
  void coupling(ParameterView& view) { parameter(view, &p_.coupling(), p_.coupling_dims()); }

  void state(StateView& view, const Tensor* t) {
    if (!t) return;
    view.data = t->const_data_ptr();
    view.is_floating = !is_bit_type(t->scalar_type());
    const StateOutput like = output(*t);
    view.element_size = like.element_size, view.one = like.one;
    view.stride = t->stride(t->dim() - 1);
    add(view.batch_strides, *t, 1);
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
    std::vector<size_t> dims;  // dimensions of more than one element, the models' first
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

// The error that a device's kernels have reported since this was last asked; "": none. Warns of rounding if there was no error.
enum class FoundBy { kThisCall, kEarlierCall };
inline std::string take_report(DeviceReport& report, FoundBy by, const std::string& with_beta = "") {
  const Findings found = take_findings(report);
  if (found.rounding && !found.fault) {
    const auto& [op, rounding, degree] = *found.rounding;
    warn_of_rounding(kOps[op].name, op >= kGraphGibbs ? "coupling" : "weight", rounding, degree,
                     with_beta + (by == FoundBy::kEarlierCall ? " (found by an earlier call)" : ""));
  }
  if (!found.fault) return "";
  const auto& [op, outcome, value] = *found.fault;
  return std::string(kOps[op].name) + ": " + text(outcome, value, Problem::is_annealed(op) ? "betas" : "beta") +
         (by == FoundBy::kEarlierCall ? " (found by an earlier call, whose results are not valid)" : "");
}

// ---- one call --------------------------------------------------------------------------------------------------------------------

class Call {
 public:
  // Raises what an earlier call's kernels have found meanwhile.
  explicit Call(const Problem& p) : p_(p), device_(cuda_device(p)), guard_(device_), batch_(p) {
    try {
      used_ = &use_device(device_);
      stream_ = current_stream(device_);
    } catch (const std::runtime_error& error) {
      fail_at_runtime(error.what());
    }
    raise(take_report(*used_->report, FoundBy::kEarlierCall));
  }

  BatchBuilder& batch() { return batch_; }

  // Outputs and workspace. The error of a failed allocation names the op and the size.
  Tensor allocate(const Tensor& like, const Shape& shape, ScalarType type) const {
    try {
      return torch::stable::new_empty(like, shape, type);
    } catch (const std::exception& error) {
      fail_at_runtime("cannot allocate " + text(shape) + " " + name_of(type) + " on " + device_name(like) + ": " + error.what());
    }
  }
  Tensor zeros(const Shape& shape, ScalarType type) const {
    Tensor out = allocate(p_.coupling(), shape, type);
    torch::stable::zero_(out);
    return out;
  }
  // An output of the dtype in which the op computes.
  Tensor output(const Shape& shape) const { return allocate(p_.coupling(), shape, p_.type()); }
  Tensor state_output(const Part& part, const Tensor& like) const {
    return allocate(like, p_.with_batch({part.size}), like.scalar_type());
  }
  Tensor output_per_model_or_chain() const { return allocate(p_.coupling(), p_.with_batch({}), ScalarType::Double); }

  // Without sweeps.
  void describe(SweepView& s) const { s.op = p_.id(), s.report = used_->report, s.largest_error = -1; }

  void describe(SweepView& s, const Counters& c) {
    describe(s);
    s.chain_offset = c.chain_offset, s.sweep_offset = c.sweep_offset;
    s.num_sweeps = c.num_sweeps, s.num_relaxed_sweeps = c.num_relaxed_sweeps;
    if (c.chains) {
      s.chains = static_cast<const int64_t*>(c.chains->const_data_ptr());
      batch_.add(s.chains_strides, *c.chains, 0);
    }
    if (c.seed.is_cpu())
      s.seed = uint64_t(*static_cast<const int64_t*>(c.seed.const_data_ptr()));
    else
      s.seed_data = static_cast<const int64_t*>(c.seed.const_data_ptr());
    s.num_betas = c.beta.size(c.beta.dim() - 1), s.num_beta_values = c.beta.numel();
    s.has_beta_rows = Problem::is_per_chain(c.beta);
    if (s.has_beta_rows) batch_.add(s.beta_strides, beta_strides(p_, c.beta));
    if (c.beta.is_cpu()) {
      const std::vector<double> values = read_beta(p_, c.beta);
      largest_beta_ = 0;
      for (const double value : values) largest_beta_ = std::max(largest_beta_, std::fabs(value));
      if (values.size() <= kMaxInlineBetas)
        std::copy(values.begin(), values.end(), s.beta);
      else
        s.beta_data = on_device(c.beta);
    } else {
      beta_ = as_contiguous(c.beta);
      s.beta_data = static_cast<const double*>(beta_->const_data_ptr());
    }
    const bool rounds = c.num_sweeps > 0 && p_.coupling().numel() > 0;
    if (rounds && largest_beta_ > 0) s.largest_error = float(kResolutionLimit / largest_beta_);
  }

  Tensor copy(const Tensor& t) const {
    Tensor out = allocate(t, shape_of(t), t.scalar_type());
    torch::stable::copy_(out, t);
    return out;
  }

  static void describe(SweepView& s, const RelaxationArguments& r) {
    s.relaxation = int32_t(r.relaxation), s.sharpness = r.sharpness, s.slope_gradient = r.slope_gradient;
  }

  // Plans, allocates the plan's workspace and launches, by start(params, plan, stream). make_plan(params, limits) may note what it has chosen.
  // Nothing is launched for an empty batch.
  template <class Params, class MakePlan, class Start>
  void launch(Params& params, const MakePlan& make_plan, const Start& start) {
    if (!p_.num_chains()) return;
    batch_.finish(params.sweep.batch);
    const auto plan = run([&] { return make_plan(params, used_->limits); });
    std::optional<Tensor> workspace;
    if (plan.workspace) workspace = allocate(p_.coupling(), {plan.workspace}, ScalarType::Byte);
    params.workspace = workspace ? workspace->mutable_data_ptr() : nullptr;
    run([&] { start(params, plan, stream_); });
    finish();
  }
  // Launches kernels that need no plan, by start(stream).
  template <class Params, class Start>
  void launch(Params& params, const Start& start) {
    if (!p_.num_chains()) return;
    batch_.finish(params.sweep.batch);
    run([&] { start(stream_); });
    finish();
  }

 private:
  // The dispatcher brings a call here as soon as one tensor is on a CUDA device.
  static int cuda_device(const Problem& p) {
#if defined(GIBBS_EMULATE)
    return (void)p, 0;
#else
    if (!p.coupling().is_cuda())
      fail(p.op(), "the parameters must be on the CUDA device of the other tensors, got ", device_name(p.coupling()));
    return p.coupling().get_device_index();
#endif
  }

  // Errors of the machine, not of an argument.
  [[noreturn]] void fail_at_runtime(const std::string& what) const { throw std::runtime_error(std::string(p_.op()) + ": " + what); }
  static void raise(const std::string& message) {
    if (!message.empty()) throw std::invalid_argument(message);
  }

  // Raises errors of plans and launches in the op's name.
  template <class F>
  auto run(const F& f) const {
    try {
      return f();
    } catch (const std::invalid_argument& error) {
      fail(p_.op(), error.what());
    } catch (const std::exception& error) {
      fail_at_runtime(error.what());
    }
  }

  void finish() const {
    if (!is_synchronous() || run([&] { return is_capturing(stream_); })) return;
    run([&] { synchronize(stream_); });
    raise(take_report(*used_->report, FoundBy::kThisCall, at_beta(largest_beta_)));
  }

  const double* on_device(const Tensor& beta) {
#if defined(GIBBS_EMULATE)
    beta_ = as_contiguous(beta);
#else
    if (run([&] { return is_capturing(stream_); }))
      fail(p_.op(), p_.beta_name(), " of more than ", kMaxInlineBetas,
           " values must be on the device while a CUDA graph is captured, got cpu");
    // From pinned memory, because a copy from any other would wait for the stream. PyTorch keeps that memory until the copy is done.
    Tensor pinned = torch::stable::new_empty(beta, shape_of(beta), std::nullopt, std::nullopt, std::nullopt, true);
    torch::stable::copy_(pinned, beta);
    beta_ = torch::stable::to(pinned, torch::stable::Device(torch::headeronly::DeviceType::CUDA, device_), /*non_blocking=*/true);
#endif
    return static_cast<const double*>(beta_->const_data_ptr());
  }

  const Problem& p_;
  const int device_;
#if defined(GIBBS_EMULATE)
  struct NoGuard {
    explicit NoGuard(int) {}
  } guard_;
#else
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  const Device* used_;
  Stream stream_;
  BatchBuilder batch_;
  std::optional<Tensor> beta_;  // on the device, until the launch
  double largest_beta_ = 1;     // 1 where beta is not read here
};

// ---- tempering -------------------------------------------------------------------------------------------------------------------

// The outputs and the state of a call of parallel tempering, whose states are bytes between its rounds.
struct TemperingTensors {
  std::vector<Tensor> bits;  // of each part
  Tensor chains, scales, energies, chains_at;
  TemperingParams params = {};

  TemperingTensors(const Call& call, const Problem& p, const Tensor& given_chains, int64_t sweeps_per_swap, int64_t num_swaps)
      : chains(call.copy(given_chains)),
        scales(call.output_per_model_or_chain()),
        energies(call.allocate(given_chains, p.with_batch({}, {num_swaps}), ScalarType::Double)),
        chains_at(call.allocate(given_chains, p.with_batch({}, {num_swaps}), ScalarType::Long)) {
    for (const Part& part : p.parts()) {
      bits.push_back(call.allocate(given_chains, p.with_batch({part.size}), ScalarType::Byte));
      params.parts[params.num_parts++] = {static_cast<uint8_t*>(bits.back().mutable_data_ptr()), part.size};
    }
    params.num_betas = p.batch_shape()[0], params.columns = p.num_chains() / std::max<int64_t>(params.num_betas, 1);
    params.sweeps_per_swap = sweeps_per_swap;
    params.scales = static_cast<const double*>(scales.const_data_ptr());
    params.chains = static_cast<int64_t*>(chains.mutable_data_ptr());
    params.energies = static_cast<double*>(energies.mutable_data_ptr());
    params.chains_at = static_cast<int64_t*>(chains_at.mutable_data_ptr());
  }
  // Makes each round's sweeps by sweep() and its energies by find_energies(stream), and then its swaps. model: that of the rounds.
  template <class Params, class Sweep, class FindEnergies>
  void run_rounds(Call& call, Params& model, int64_t num_swaps, const Sweep& sweep, const FindEnergies& find_energies) {
    const int64_t size = params.num_betas * params.columns;
    for (int64_t round = 0; round < num_swaps; ++round) {
      sweep();
      call.launch(model, [&](Stream stream) {
        find_energies(stream);
        launch_swaps({model.sweep, params}, stream);
      });
      model.sweep.sweep_offset += params.sweeps_per_swap;
      params.energies += size, params.chains_at += size;
    }
  }
};

// ---- moments ---------------------------------------------------------------------------------------------------------------------

// The counts of a call and its best states, and the call's states, which are bytes between its reads. What is not wanted has the shape [0].
struct MomentTensors {
  std::vector<Tensor> bits, best, units;  // of each part
  Tensor pairs, best_energies;
  MomentParams params = {};
  TemperingParams energies = {};  // of the states that are read

  MomentTensors(const Call& call, const Problem& p, const Tensor& state, int64_t counted, bool wants_best)
      : pairs(call.zeros(counted < kUnitsAndPairs ? Shape{0} : p.pair_shape(), ScalarType::Long)),
        best_energies(call.allocate(p.coupling(), wants_best ? p.with_batch({}) : Shape{0}, ScalarType::Double)),
        counted_(counted),
        wants_best_(wants_best) {
    params.num_chains = p.batch_shape()[0];
    params.num_models = params.num_chains ? p.num_chains() / params.num_chains : 0;
    params.num_words = divide_up(params.num_chains, 32);
    for (const Part& part : p.parts()) {
      bits.push_back(call.allocate(state, p.with_batch({part.size}), ScalarType::Byte));
      best.push_back(call.allocate(state, wants_best ? p.with_batch({part.size}) : Shape{0}, ScalarType::Byte));
      units.push_back(call.zeros(counted < kUnits ? Shape{0} : p.counted({part.size}), ScalarType::Long));
      words_.push_back(
          call.allocate(state, counted ? Shape{params.num_words, params.num_models, part.size} : Shape{0}, ScalarType::Int));
      const auto bytes = [](const Tensor& t) { return static_cast<uint8_t*>(t.mutable_data_ptr()); };
      energies.parts[params.num_parts] = {bytes(bits.back()), part.size};
      params.parts[params.num_parts++] = {bytes(bits.back()), part.size, static_cast<uint32_t*>(words_.back().mutable_data_ptr()),
                                          static_cast<int64_t*>(units.back().mutable_data_ptr()), bytes(best.back())};
    }
    params.pair_counts = static_cast<int64_t*>(pairs.mutable_data_ptr());
    if (!wants_best) return;
    scales_ = call.output_per_model_or_chain(), energies_ = call.output_per_model_or_chain();
    torch::stable::fill_(best_energies, std::numeric_limits<double>::infinity());
    energies.num_parts = params.num_parts;
    energies.scales = static_cast<const double*>(scales_->const_data_ptr());
    energies.energies = static_cast<double*>(energies_->mutable_data_ptr());
    params.energies = energies.energies, params.best_energies = static_cast<double*>(best_energies.mutable_data_ptr());
  }
  double* scales() const { return static_cast<double*>(scales_->mutable_data_ptr()); }
  // Makes the sweeps before each read by sweep(); count_pairs(stream) and find_energies(stream) are the model's. The states have been
  // written to `bits`.
  template <class Params, class Sweep, class CountPairs, class FindEnergies>
  void run_reads(Call& call, Params& model, int64_t num_sweeps, int64_t sweeps_per_read, const Sweep& sweep,
                 const CountPairs& count_pairs, const FindEnergies& find_energies) {
    for (size_t i = 0; wants_best_ && i < bits.size(); ++i) torch::stable::copy_(best[i], bits[i]);
    model.sweep.num_sweeps = sweeps_per_read;
    for (int64_t first = 0; first < num_sweeps; first += sweeps_per_read) {
      sweep();
      call.launch(model, [&](Stream stream) {
        if (counted_) launch_unit_counts(params, stream);
        if (counted_ == kUnitsAndPairs) count_pairs(stream);
        if (!wants_best_) return;
        find_energies(stream);
        launch_best_states(params, stream);
      });
      model.sweep.sweep_offset += sweeps_per_read, model.sweep.first_beta += sweeps_per_read;
    }
  }

 private:
  std::vector<Tensor> words_;
  std::optional<Tensor> scales_, energies_;
  int64_t counted_;
  bool wants_best_;
};

}  // namespace gibbs
