// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the ops share: how arguments are checked, broadcast and read. Every message starts with the op's name and names the argument.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/philox.h"
#include "cpu/driver.h"
#include "ops/hooks.h"

namespace gibbs {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

inline Shape shape_of(const Tensor& t) { return Shape(t.sizes().begin(), t.sizes().end()); }

inline std::string text(const Shape& shape) {
  std::ostringstream out;
  for (size_t d = 0; d < shape.size(); ++d) out << (d ? ", " : "[") << shape[d];
  return shape.empty() ? "[]" : out.str() + "]";
}

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream out;
  out << op << ": ";
  (out << ... << parts);
  throw std::invalid_argument(out.str());
}

inline std::string device_of(const Tensor& t) {
  return t.is_cpu() ? "cpu" : t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another device";
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

inline bool is_state_type(ScalarType type) {
  switch (type) {
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return true;
    default:
      return false;
  }
}
inline bool is_parameter_type(ScalarType type) {
  return is_state_type(type) && type != ScalarType::Bool && type != ScalarType::Byte;
}

// The problem that the arguments of one call describe: checked, broadcast, described by strides.
class Problem {
 public:
  // coupling: [*, own dims], called `name`
  Problem(const char* op, const char* name, const Tensor& coupling, int64_t own_dims, const char* own_shape)
      : op_(op), name_(name), own_dims_(own_dims), coupling_(as_parameter(name, coupling)) {
    if (coupling_.dim() < own_dims) fail(op, name, " must have shape ", own_shape, ", got ", text(shape_of(coupling_)));
    join(name, coupling_, own_dims);
  }

  Tensor parameter(const char* name, const Tensor& t, int64_t n) {
    same_device(name, t);
    if (t.scalar_type() != original_type_)
      fail(op_, name, " must have ", name_, "'s dtype, ", name_of(original_type_), ", got ", name_of(t.scalar_type()));
    Tensor out = as_parameter(name, t);
    last_dim(name, out, n);
    return out;
  }

  void state(const char* name, const Tensor& t, int64_t n) {
    same_device(name, t);
    if (!is_state_type(t.scalar_type()))
      fail(op_, name, " must be bool, uint8 or a floating-point tensor, got ", name_of(t.scalar_type()));
    last_dim(name, t, n);
  }

  void mask(const char* name, const Tensor& t, int64_t n) {
    same_device(name, t);
    if (t.scalar_type() != ScalarType::Bool) fail(op_, name, " must be a bool mask, got ", name_of(t.scalar_type()));
    last_dim(name, t, n);
  }

  // Gradients and saved values have the dtype in which the op computes.
  void own_type(const char* name, const Tensor& t) const {
    const ScalarType type = coupling_.scalar_type();
    if (t.scalar_type() != type) fail(op_, name, " must be ", name_of(type), ", got ", name_of(t.scalar_type()));
  }

  void saved_fields(const Tensor& t, int64_t n) const {
    same_device("fields", t);
    const Shape wanted = with_batch({n}, {t.dim() ? t.size(0) : -1});
    if (t.scalar_type() != coupling_.scalar_type() || wanted[0] < 1 || shape_of(t) != wanted)
      fail(op_, "fields must be the forward op's output, of shape ", text(with_batch({n}, {-1})), ", got ", text(shape_of(t)));
  }

  void chain_numbers(const Tensor& t) {
    same_device("chain_offset", t);
    if (t.scalar_type() != ScalarType::Long) fail(op_, "chain_offset must be int64, got ", name_of(t.scalar_type()));
    join("chain_offset", t, 0);
  }

  // All operands are known: what broadcasts where. A model is a place of the coupling; by size (backward: a gradient for each) or by
  // stride (forward: expanded couplings are one model).
  void finish(bool models_by_size) {
    Shape strides = batch_strides(coupling_, own_dims_);
    std::vector<bool> is_model_dim(batch_.size());
    const size_t lead = batch_.size() - size_t(coupling_.dim() - own_dims_);
    for (size_t d = lead; d < batch_.size(); ++d)
      is_model_dim[d] = coupling_.size(int64_t(d - lead)) != 1 && (models_by_size || strides[d] != 0);
    batch = Batch(batch_, is_model_dim);
    is_model_dim_ = is_model_dim;
  }

  Shape batch_strides(const Tensor& t, int64_t own_dims) const {
    Shape out(batch_.size(), 0);
    const int64_t dims = t.dim() - own_dims, lead = int64_t(batch_.size()) - dims;
    for (int64_t d = 0; d < dims; ++d) out[size_t(lead + d)] = t.size(d) == 1 ? 0 : t.stride(d);
    return out;
  }
  Operand operand(const Tensor& t) const { return {t.const_data_ptr(), batch_strides(t, 1), t.stride(t.dim() - 1), 0}; }
  Operand coupling_operand() const {
    const int64_t row_stride = own_dims_ > 1 ? coupling_.stride(coupling_.dim() - 2) : 0;
    return {coupling_.const_data_ptr(), batch_strides(coupling_, own_dims_), coupling_.stride(coupling_.dim() - 1), row_stride};
  }
  Shape with_batch(std::initializer_list<int64_t> own, std::initializer_list<int64_t> leading = {}) const {
    Shape out(leading);
    out.insert(out.end(), batch_.begin(), batch_.end());
    out.insert(out.end(), own);
    return out;
  }
  int64_t num_chains() const {
    int64_t count = 1;
    for (int64_t size : batch_) count *= size;
    return count;
  }
  const Tensor& coupling() const { return coupling_; }
  bool is_double() const { return coupling_.scalar_type() == ScalarType::Double; }
  const Shape& batch_shape() const { return batch_; }
  const std::vector<bool>& is_model_dim() const { return is_model_dim_; }

  void same_device(const char* name, const Tensor& t) const {
    if (device_of(t) != device_of(coupling_))
      fail(op_, name, " must be on ", name_, "'s device, ", device_of(coupling_), ", got ", device_of(t));
  }
  // What may also stay on the CPU: small, and read there.
  void same_device_or_cpu(const char* name, const Tensor& t) const {
    if (!t.is_cpu()) same_device(name, t);
  }

  const char* op() const { return op_; }

  Batch batch;

 private:
  Tensor as_parameter(const char* name, const Tensor& t) {
    if (!is_parameter_type(t.scalar_type()))
      fail(op_, name, " must be float32, float64, float16 or bfloat16, got ", name_of(t.scalar_type()));
    original_type_ = t.scalar_type();
    const bool half = original_type_ == ScalarType::Half || original_type_ == ScalarType::BFloat16;
    return half ? torch::stable::to(t, ScalarType::Float) : t;
  }

  void last_dim(const char* name, const Tensor& t, int64_t n) {
    if (t.dim() < 1 || t.size(t.dim() - 1) != n)
      fail(op_, name, " must have shape [..., ", n, "] to fit ", name_, " ", text(shape_of(coupling_)), ", got ",
           text(shape_of(t)));
    join(name, t, 1);
  }

  void join(const char* name, const Tensor& t, int64_t own_dims) {
    const size_t dims = size_t(t.dim() - own_dims);
    if (dims > batch_.size()) batch_.insert(batch_.begin(), dims - batch_.size(), 1);
    for (size_t d = 0; d < dims; ++d) {
      int64_t& size = batch_[batch_.size() - dims + d];
      const int64_t here = t.size(int64_t(d));
      if (size == 1)
        size = here;
      else if (here != 1 && here != size)
        fail(op_, name, " ", text(shape_of(t)), " does not broadcast with the other arguments' batch shape ", text(batch_));
    }
  }

  const char *op_, *name_;
  int64_t own_dims_;
  Tensor coupling_;
  ScalarType original_type_;
  Shape batch_;
  std::vector<bool> is_model_dim_;
};

// beta holds one value or one per sweep; what values, the backend sees.
inline void check_beta(const char* op, const char* name, const Problem& p, const Tensor& beta, int64_t count) {
  p.same_device_or_cpu(name, beta);
  if (beta.scalar_type() != ScalarType::Double || beta.dim() != 1)
    fail(op, name, " must be a 1-D float64 tensor, got ", name_of(beta.scalar_type()), " ", text(shape_of(beta)));
  if (beta.size(0) != 1 && beta.size(0) != count)
    fail(op, name, " must hold 1 value or one per sweep (", count, "), got ", beta.size(0));
}

// The values of a beta on the CPU.
inline std::vector<double> read_beta(const char* op, const char* name, const Tensor& beta) {
  std::vector<double> out;
  const double* values = static_cast<const double*>(beta.const_data_ptr());
  for (int64_t i = 0; i < beta.size(0); ++i) {
    out.push_back(values[i * beta.stride(0)]);
    if (!std::isfinite(float(out.back()))) fail(op, name, " must be finite in float32, got ", out.back());
  }
  return out;
}

// What does not depend on the model: counters and seed. Values of chains are left to the backend.
struct Counters {
  Tensor seed;
  std::optional<Tensor> chains;
  int64_t chain_offset, sweep_offset, num_sweeps, num_relaxed_sweeps;
};
inline void check_counters(const char* op, const Problem& p, const Counters& c) {
  if (c.num_sweeps < 0) fail(op, "num_sweeps must not be negative, got ", c.num_sweeps);
  const int64_t sweeps = c.num_sweeps + c.num_relaxed_sweeps;
  if (c.sweep_offset < 0 || c.num_sweeps >= kMaxSweeps || c.num_relaxed_sweeps >= kMaxSweeps ||
      c.sweep_offset > kMaxSweeps - sweeps)
    fail(op, "sweep_offset must lie in 0 .. 2^44 less the number of sweeps, got ", c.sweep_offset);
  p.same_device_or_cpu("seed", c.seed);
  if (c.seed.scalar_type() != ScalarType::Long || c.seed.dim() != 0)
    fail(op, "seed must be a 0-dim int64 tensor, got ", name_of(c.seed.scalar_type()), " ", text(shape_of(c.seed)));
  if (!c.chains && (c.chain_offset < 0 || c.chain_offset > kMaxChains - p.num_chains()))
    fail(op, "chain_offset must lie in 0 .. 2^48 less the number of chains, got ", c.chain_offset);
}

struct RelaxationArguments {
  int64_t relaxation;
  double sharpness;
  bool slope_gradient;
};
inline void check_relaxation(const char* op, const RelaxationArguments& r) {
  if (r.relaxation < 0 || r.relaxation >= kNumRelaxations) fail(op, "relaxation must be a code in 0 .. 3, got ", r.relaxation);
  if (!(r.sharpness > 0) || !std::isfinite(float(r.sharpness)))
    fail(op, "sharpness must be positive and finite, got ", r.sharpness);
}

// What is said of a fault; `value` is the one found where it was no NaN. Interrupts are the caller's.
inline std::string text(Outcome outcome, float value = 0, const char* beta_name = "beta") {
  std::ostringstream found;
  found << value;
  switch (outcome) {
    case Outcome::kOk:
      return "";
    case Outcome::kInterrupted:
      return "interrupted";
    case Outcome::kNonFiniteWeight:
      return "weight must be finite, got NaN or inf";
    case Outcome::kTooLargeWeight:
      return "weight must be less than 2^127 in magnitude, got a larger value";
    case Outcome::kNonFiniteLeftBias:
      return "left_bias must be finite in float32, got NaN or inf";
    case Outcome::kNonFiniteRightBias:
      return "right_bias must be finite in float32, got NaN or inf";
    case Outcome::kNonFiniteBaseLeftBias:
      return "base_left_bias must be finite in float32, got NaN or inf";
    case Outcome::kNonFiniteBaseRightBias:
      return "base_right_bias must be finite in float32, got NaN or inf";
    case Outcome::kNonFiniteCoupling:
      return "coupling must be finite, got NaN or inf";
    case Outcome::kTooLargeCoupling:
      return "coupling must be less than 2^127 in magnitude, got a larger value";
    case Outcome::kNonFiniteBias:
      return "bias must be finite in float32, got NaN or inf";
    case Outcome::kNonFiniteBaseBias:
      return "base_bias must be finite in float32, got NaN or inf";
    case Outcome::kLeftNotBits:
      return "left must hold 0 and 1 only, got " + found.str();
    case Outcome::kRightNotBits:
      return "right must hold 0 and 1 only, got " + found.str();
    case Outcome::kStateNotBits:
      return "state must hold 0 and 1 only, got " + found.str();
    case Outcome::kNonFiniteLeft:
      return "left must be finite, got NaN or inf";
    case Outcome::kNonFiniteState:
      return "state must be finite, got NaN or inf";
    case Outcome::kChainOutOfRange:
      return "chain_offset must lie in 0 .. 2^48 - 1, got " + found.str();
    case Outcome::kNonFiniteBeta:
      return std::string(beta_name) + " must be finite in float32, got " + found.str();
    case Outcome::kBadLayout:
      return "layout must be the layout of a ColoredGraph, got numbers that are none";
  }
  return "an unknown fault";
}

// Warns of rounding that may change probabilities, and says which of the two kinds is the larger. `rest` ends the message.
inline void warn_of_rounding(const char* op, const char* coupling, const Rounding& rounding, int64_t neighbors,
                             const std::string& rest) {
  if (!hooks.warn) return;
  std::ostringstream out;
  out << op << ": " << coupling;
  if (2 * float32_error(rounding) > field_error(rounding, neighbors))
    out << " and biases of about " << rounding.bias << " may nearly cancel, and float32 then shifts a field by about "
        << float32_error(rounding) << " (smaller parameters or a lower beta help)";
  else
    out << " is so large that rounding it to fixed point is felt (a smaller one or a lower beta helps): resolution "
        << rounding.scale;
  out << " for units of up to " << neighbors << " neighbours" << rest;
  if (!hooks.warn(out.str().c_str())) throw std::runtime_error(std::string(op) + ": stopped by a warning");
}
inline std::string at_beta(double beta) {
  std::ostringstream out;
  out << " at beta " << beta;
  return out.str();
}

inline Tensor empty_like_batch(const Tensor& like, const Shape& shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}

// Contiguous rows for the kernels; expanded gradients (of a sum, say) are materialised here.
inline Tensor whole_rows(const char* op, const Tensor& t, const Shape& shape) {
  if (shape_of(t) != shape)
    fail(op, "every gradient and state must have the whole batch shape, ", text(shape), ", got ", text(shape_of(t)));
  return torch::stable::contiguous(t);
}

}  // namespace gibbs
