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
#include "hooks.h"

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
    if (t.scalar_type() != original_type_)
      fail(op_, name, " must have ", name_, "'s dtype, ", name_of(original_type_), ", got ", name_of(t.scalar_type()));
    Tensor out = as_parameter(name, t);
    last_dim(name, out, n);
    return out;
  }

  void state(const char* name, const Tensor& t, int64_t n) {
    cpu(name, t);
    if (!is_state_type(t.scalar_type()))
      fail(op_, name, " must be bool, uint8 or a floating-point tensor, got ", name_of(t.scalar_type()));
    last_dim(name, t, n);
  }

  void mask(const char* name, const Tensor& t, int64_t n) {
    cpu(name, t);
    if (t.scalar_type() != ScalarType::Bool) fail(op_, name, " must be a bool mask, got ", name_of(t.scalar_type()));
    last_dim(name, t, n);
  }

  void chain_numbers(const Tensor& t) {
    cpu("chain_offset", t);
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

  const char* op() const { return op_; }

  Batch batch;

 private:
  void cpu(const char* name, const Tensor& t) const {
    if (!t.is_cpu()) fail(op_, name, " must be on the CPU like the other tensors");
  }

  Tensor as_parameter(const char* name, const Tensor& t) {
    cpu(name, t);
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
};

template <class F>
auto dispatch_state(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{});
    case ScalarType::Bool:  // a bool tensor's bytes are 0 or 1
    case ScalarType::Byte:
      return f(uint8_t{});
    default:
      return f(float{});
  }
}

// Calls f(chain's linear number, offset) for every chain, row by row.
template <class F>
inline void for_each_row(const Shape& batch, const Shape& strides, const F& f) {
  int64_t count = 1;
  for (int64_t size : batch) count *= size;
  Shape at(batch.size(), 0);
  for (int64_t linear = 0, offset = 0; linear < count; ++linear) {
    f(linear, offset);
    for (size_t d = batch.size(); d-- > 0;) {
      offset += strides[d];
      if (++at[d] < batch[d]) break;
      offset -= strides[d] * batch[d];
      at[d] = 0;
    }
  }
}

using Bits = std::vector<uint32_t>;

// Bit i is byte i, which is 0 or 1: a multiplication gathers eight of them in the top byte.
inline uint32_t bits_of_bytes(const uint8_t* bytes) {
  uint32_t out = 0;
  for (int group = 0; group < 4; ++group) {
    uint64_t eight = 0;
    for (int i = 0; i < 8; ++i) eight |= uint64_t{bytes[8 * group + i]} << (8 * i);
    out |= uint32_t(eight * 0x0102040810204080u >> 56) << (8 * group);
  }
  return out;
}

inline Bits pack(const char* op, const char* name, const Problem& p, const Tensor& t, int64_t n) {
  const int64_t words = state_words(n), stride = t.stride(t.dim() - 1);
  Bits out(size_t(p.num_chains() * words));
  dispatch_state(t.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    const S* data = static_cast<const S*>(t.const_data_ptr());
    for_each_row(p.batch_shape(), p.batch_strides(t, 1), [&](int64_t linear, int64_t offset) {
      uint32_t* row = out.data() + linear * words;
      for (int64_t w = 0; w < words; ++w) {
        const int64_t count = std::min<int64_t>(32, n - 32 * w);
        const S* from = data + offset + 32 * w * stride;
        alignas(32) uint8_t is_one[32] = {}, is_bit[32] = {};
        for (int64_t i = 0; i < count; ++i) {
          const S x = from[i * stride];
          is_one[i] = x == S(1);
          is_bit[i] = (x == S(0)) | (x == S(1));
        }
        const uint32_t ones = bits_of_bytes(is_one), bits = bits_of_bytes(is_bit);
        if (const uint32_t odd = ~bits & (count < 32 ? (1u << count) - 1 : ~0u))
          fail(op, name, " must hold 0 and 1 only, got ", float(from[__builtin_ctz(odd) * stride]));
        row[w] = ones;
      }
    });
  });
  return out;
}

inline void unpack(const Bits& bits, int64_t n, const Tensor& out) {
  const int64_t words = state_words(n);
  dispatch_state(out.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    S* data = static_cast<S*>(out.mutable_data_ptr());
    S fours[16][4];  // of each four bits
    for (int i = 0; i < 64; ++i) fours[i / 4][i % 4] = S(i / 4 >> i % 4 & 1);
    for (int64_t row = 0, rows = words ? int64_t(bits.size()) / words : 0; row < rows; ++row, data += n) {
      const uint32_t* from = bits.data() + row * words;
      int64_t i = 0;
      for (; i + 4 <= n; i += 4) std::memcpy(data + i, fours[from[i / 32] >> (i % 32) & 15], sizeof fours[0]);
      for (; i < n; ++i) data[i] = S(from[i / 32] >> (i % 32) & 1);
    }
  });
}

inline void set_beta(const char* op, const char* name, SweepCall& call, const Tensor& beta, int64_t count) {
  if (!beta.is_cpu() || beta.scalar_type() != ScalarType::Double || beta.dim() != 1)
    fail(op, name, " must be a 1-D float64 tensor on the CPU, got ", name_of(beta.scalar_type()), " ", text(shape_of(beta)));
  if (beta.size(0) != 1 && beta.size(0) != count)
    fail(op, name, " must hold 1 value or one per sweep (", count, "), got ", beta.size(0));
  const double* values = static_cast<const double*>(beta.const_data_ptr());
  for (int64_t i = 0; i < beta.size(0); ++i) {
    const double value = values[i * beta.stride(0)];
    if (!std::isfinite(float(value))) fail(op, name, " must be finite in float32, got ", value);
    call.beta.push_back(value);
  }
}

// What does not depend on the model: counters and seed.
inline void set_counters(const char* op, SweepCall& call, const Problem& p, const Tensor& seed, const std::optional<Tensor>& chains,
                         int64_t chain_offset, int64_t sweep_offset, int64_t num_sweeps, int64_t num_relaxed_sweeps) {
  if (num_sweeps < 0) fail(op, "num_sweeps must not be negative, got ", num_sweeps);
  const int64_t sweeps = num_sweeps + num_relaxed_sweeps;
  if (sweep_offset < 0 || num_sweeps >= kMaxSweeps || num_relaxed_sweeps >= kMaxSweeps || sweep_offset > kMaxSweeps - sweeps)
    fail(op, "sweep_offset must lie in 0 .. 2^44 less the number of sweeps, got ", sweep_offset);
  if (!seed.is_cpu() || seed.scalar_type() != ScalarType::Long || seed.dim() != 0)
    fail(op, "seed must be a 0-dim int64 tensor on the CPU, got shape ", text(shape_of(seed)));
  if (chains) {
    call.chains = static_cast<const int64_t*>(chains->const_data_ptr());
    call.chains_strides = p.batch_strides(*chains, 0);
    for_each_row(p.batch_shape(), call.chains_strides, [&](int64_t, int64_t offset) {
      if (call.chains[offset] < 0 || call.chains[offset] >= kMaxChains)
        fail(op, "chain_offset must lie in 0 .. 2^48 - 1, got ", call.chains[offset]);
    });
  } else if (chain_offset < 0 || chain_offset > kMaxChains - p.num_chains()) {
    fail(op, "chain_offset must lie in 0 .. 2^48 less the number of chains, got ", chain_offset);
  }
  call.chain_offset = chain_offset;
  call.sweep_offset = sweep_offset;
  call.num_sweeps = num_sweeps;
  call.num_relaxed_sweeps = num_relaxed_sweeps;
  call.seed = uint64_t(*static_cast<const int64_t*>(seed.const_data_ptr()));
}

inline Runtime runtime() {
  return {int(torch::stable::get_num_threads()),
          [](int64_t count, const std::function<void(int64_t)>& task) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) task(i);
            });
          },
          hooks.interrupted};
}

inline void check(const char* op, Outcome outcome) {
  switch (outcome) {
    case Outcome::kOk:
      return;
    case Outcome::kInterrupted:
      throw std::runtime_error(std::string(op) + ": interrupted");
    case Outcome::kNonFiniteWeight:
      fail(op, "weight must be finite, got NaN or inf");
    case Outcome::kTooLargeWeight:
      fail(op, "weight must be less than 2^127 in magnitude, got a larger value");
    case Outcome::kNonFiniteLeftBias:
      fail(op, "left_bias must be finite in float32, got NaN or inf");
    case Outcome::kNonFiniteRightBias:
      fail(op, "right_bias must be finite in float32, got NaN or inf");
    case Outcome::kNonFiniteBaseLeftBias:
      fail(op, "base_left_bias must be finite in float32, got NaN or inf");
    case Outcome::kNonFiniteBaseRightBias:
      fail(op, "base_right_bias must be finite in float32, got NaN or inf");
    case Outcome::kNonFiniteCoupling:
      fail(op, "coupling must be finite, got NaN or inf");
    case Outcome::kTooLargeCoupling:
      fail(op, "coupling must be less than 2^127 in magnitude, got a larger value");
    case Outcome::kNonFiniteBias:
      fail(op, "bias must be finite in float32, got NaN or inf");
    case Outcome::kNonFiniteBaseBias:
      fail(op, "base_bias must be finite in float32, got NaN or inf");
  }
}

constexpr double kResolutionLimit = 1e-3;  // of beta * n * 2^-k: the largest error of a logit that rounding can make, doubled

// Whether `count` values, `stride` apart, are finite in float32. Without a branch, so that the compiler can take many at once.
inline bool all_finite(const float* values, int64_t count, int64_t stride) {
  uint32_t odd = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i * stride, sizeof bits);
    odd |= uint32_t((bits & 0x7f800000u) == 0x7f800000u);
  }
  return !odd;
}
inline bool all_finite(const double* values, int64_t count, int64_t stride) {
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) finite &= std::isfinite(float(values[i * stride]));
  return finite;
}

// Parameters that the kernels do not come to read, in an empty batch or with no sweeps, are checked all the same.
inline void check_finite(const char* op, const char* name, const Tensor& t) {
  Shape rows = shape_of(t), strides(t.strides().begin(), t.strides().end());
  const int64_t count = rows.back(), stride = strides.back();
  rows.pop_back(), strides.pop_back();
  bool finite = true;
  const auto check_rows = [&](auto* data) {
    for_each_row(rows, strides, [&](int64_t, int64_t at) { finite &= all_finite(data + at, count, stride); });
  };
  if (t.scalar_type() == ScalarType::Double)
    check_rows(static_cast<const double*>(t.const_data_ptr()));
  else
    check_rows(static_cast<const float*>(t.const_data_ptr()));
  if (!finite) fail(op, name, " must be finite in float32, got NaN or inf");
}

// Says so where rounding may be felt: resolution is the coarsest 2^-k of any model, by which times beta a logit is off for every other
// neighbour.
inline void warn_of_resolution(const char* op, const char* name, const SweepCall& call, double resolution, int64_t neighbors) {
  double beta = 0;
  for (double b : call.beta) beta = std::max(beta, std::fabs(b));
  if (beta * double(neighbors) * resolution <= kResolutionLimit || !hooks.warn) return;
  std::ostringstream out;
  out << op << ": " << name << " is so large that rounding it to fixed point is felt: resolution " << resolution
      << " for units of up to " << neighbors << " neighbours at beta " << beta;
  if (!hooks.warn(out.str().c_str())) throw std::runtime_error(std::string(op) + ": stopped by a warning");
}

inline Tensor empty_like_batch(const Tensor& like, const Shape& shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}

inline void check_relaxation(const char* op, SweepCall& call, int64_t relaxation, double sharpness, bool slope_gradient) {
  if (relaxation < 0 || relaxation >= kNumRelaxations) fail(op, "relaxation must be a code in 0 .. 3, got ", relaxation);
  if (!(sharpness > 0) || !std::isfinite(float(sharpness))) fail(op, "sharpness must be positive and finite, got ", sharpness);
  call.relaxation = Relaxation(relaxation);
  call.sharpness = sharpness;
  call.slope_gradient = slope_gradient;
}

// Copies a state of the parameters' dtype, broadcast, into rows.
template <class T>
inline bool copy_rows(const Problem& p, const Tensor& from, int64_t n, T* to) {
  const T* data = static_cast<const T*>(from.const_data_ptr());
  const int64_t stride = from.stride(from.dim() - 1);
  bool finite = true;
  for_each_row(p.batch_shape(), p.batch_strides(from, 1), [&](int64_t linear, int64_t offset) {
    T* row = to + linear * n;
    if (stride == 1)
      std::copy_n(data + offset, n, row);
    else
      for (int64_t i = 0; i < n; ++i) row[i] = data[offset + i * stride];
    finite &= all_finite(row, n, 1);
  });
  return finite;
}

// Where relaxed sweeps begin: bits, if binary sweeps come first, which are returned; else the state as it is, bits or relaxed, which is
// written to `start`, of the parameters' dtype.
inline Bits read_start(const char* op, const char* name, const Problem& p, const Tensor& state, int64_t n, int64_t num_sweeps,
                       const Tensor& start) {
  if (num_sweeps || state.scalar_type() == ScalarType::Bool || state.scalar_type() == ScalarType::Byte) {
    Bits bits = pack(op, name, p, state, n);
    if (!num_sweeps) unpack(bits, n, start);
    return bits;
  }
  const ScalarType type = start.scalar_type();
  const Tensor converted = state.scalar_type() == type ? state : torch::stable::to(state, type);
  const bool finite = type == ScalarType::Double ? copy_rows(p, converted, n, static_cast<double*>(start.mutable_data_ptr()))
                                                 : copy_rows(p, converted, n, static_cast<float*>(start.mutable_data_ptr()));
  if (!finite) fail(op, name, " must be finite, got NaN or inf");
  return {};
}

// Contiguous rows for the kernels; expanded gradients (of a sum, say) are materialised here.
inline Tensor whole_rows(const char* op, const Tensor& t, const Shape& shape) {
  if (shape_of(t) != shape)
    fail(op, "every gradient and state must have the whole batch shape, ", text(shape), ", got ", text(shape_of(t)));
  return torch::stable::contiguous(t);
}

}  // namespace gibbs
