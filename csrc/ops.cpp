// SPDX-License-Identifier: Apache-2.0
// Schemas, argument checks and CPU kernels of the ops, against libtorch's stable ABI. What each op computes: gibbs_ext/ops.py and
// gibbs_ext/functional.py (docstrings), csrc/README.md. Every message starts with the op's name and names the argument.
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
#include "cpu/bipartite_driver.h"
#include "hooks.h"

namespace gibbs {

Hooks hooks;

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

Shape shape_of(const Tensor& t) { return Shape(t.sizes().begin(), t.sizes().end()); }

std::string text(const Shape& shape) {
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

const char* name_of(ScalarType type) {
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

bool is_state_type(ScalarType type) {
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
bool is_parameter_type(ScalarType type) { return is_state_type(type) && type != ScalarType::Bool && type != ScalarType::Byte; }

// The problem that the arguments of one call describe: checked, broadcast, described by strides.
class Problem {
 public:
  Problem(const char* op, const Tensor& weight) : op_(op), weight_(as_parameter("weight", weight)) {
    if (weight_.dim() < 2) fail(op, "weight must have shape [..., n1, n2], got ", text(shape_of(weight_)));
    n1 = weight_.size(weight_.dim() - 2);
    n2 = weight_.size(weight_.dim() - 1);
    if (n1 < 1 || n2 < 1) fail(op, "weight must have at least one unit on each side, got ", text(shape_of(weight_)));
    if (n1 + n2 >= kMaxUnits) fail(op, "weight must have fewer than 2^30 units, got ", text(shape_of(weight_)));
    join("weight", weight_, 2);
  }

  Tensor parameter(const char* name, const Tensor& t, int64_t n) {
    if (t.scalar_type() != original_type_)
      fail(op_, name, " must have weight's dtype, ", name_of(original_type_), ", got ", name_of(t.scalar_type()));
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

  // All operands are known: what broadcasts where. A model is a place of the weight; by size (backward: a gradient for each) or by
  // stride (forward: expanded weights are one model).
  void finish(bool models_by_size) {
    Shape strides = batch_strides(weight_, 2);
    std::vector<bool> is_model_dim(batch_.size());
    const size_t lead = batch_.size() - size_t(weight_.dim() - 2);
    for (size_t d = lead; d < batch_.size(); ++d)
      is_model_dim[d] = weight_.size(int64_t(d - lead)) != 1 && (models_by_size || strides[d] != 0);
    batch = Batch(batch_, is_model_dim);
  }

  Shape batch_strides(const Tensor& t, int64_t own_dims) const {
    Shape out(batch_.size(), 0);
    const int64_t dims = t.dim() - own_dims, lead = int64_t(batch_.size()) - dims;
    for (int64_t d = 0; d < dims; ++d) out[size_t(lead + d)] = t.size(d) == 1 ? 0 : t.stride(d);
    return out;
  }
  Operand operand(const Tensor& t) const { return {t.const_data_ptr(), batch_strides(t, 1), t.stride(t.dim() - 1), 0}; }
  Operand weight_operand() const {
    return {weight_.const_data_ptr(), batch_strides(weight_, 2), weight_.stride(weight_.dim() - 1),
            weight_.stride(weight_.dim() - 2)};
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
  const Tensor& weight() const { return weight_; }
  bool is_double() const { return weight_.scalar_type() == ScalarType::Double; }
  const Shape& batch_shape() const { return batch_; }

  int64_t n1, n2;
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
      fail(op_, name, " must have shape [..., ", n, "] to fit weight ", text(shape_of(weight_)), ", got ", text(shape_of(t)));
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

  const char* op_;
  Tensor weight_;
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
void for_each_row(const Shape& batch, const Shape& strides, const F& f) {
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
uint32_t bits_of_bytes(const uint8_t* bytes) {
  uint32_t out = 0;
  for (int group = 0; group < 4; ++group) {
    uint64_t eight = 0;
    for (int i = 0; i < 8; ++i) eight |= uint64_t{bytes[8 * group + i]} << (8 * i);
    out |= uint32_t(eight * 0x0102040810204080u >> 56) << (8 * group);
  }
  return out;
}

Bits pack(const char* op, const char* name, const Problem& p, const Tensor& t, int64_t n) {
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

void unpack(const Bits& bits, int64_t n, const Tensor& out) {
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

void set_beta(const char* op, const char* name, BipartiteCall& call, const Tensor& beta, int64_t count) {
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
void set_counters(const char* op, BipartiteCall& call, const Problem& p, const Tensor& seed, const std::optional<Tensor>& chains,
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

Runtime runtime() {
  return {int(torch::stable::get_num_threads()),
          [](int64_t count, const std::function<void(int64_t)>& task) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) task(i);
            });
          },
          hooks.interrupted};
}

void check(const char* op, Outcome outcome) {
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
  }
}

constexpr double kResolutionLimit = 1e-3;  // of n * 2^-k: the largest error of a field that rounding can make, doubled

// Parameters that the kernels do not come to read, in an empty batch or with no sweeps, are checked all the same.
void check_finite(const char* op, const char* name, const Tensor& t) {
  bool finite = true;
  for_each_row(shape_of(t), Shape(t.strides().begin(), t.strides().end()), [&](int64_t, int64_t at) {
    finite &= t.scalar_type() == ScalarType::Double ? std::isfinite(float(static_cast<const double*>(t.const_data_ptr())[at]))
                                                    : std::isfinite(static_cast<const float*>(t.const_data_ptr())[at]);
  });
  if (!finite) fail(op, name, " must be finite in float32, got NaN or inf");
}

void run(const char* op, const BipartiteCall& call) {
  double resolution = 0;
  check(op, run_bipartite(call, runtime(), &resolution));
  const int64_t degree = std::max(call.n1, call.n2);
  if (call.num_sweeps && double(degree) * resolution > kResolutionLimit && hooks.warn) {
    std::ostringstream out;
    out << op << ": weight is so large that rounding it to fixed point is felt: resolution " << resolution << " for " << degree
        << " units";
    if (!hooks.warn(out.str().c_str())) throw std::runtime_error(std::string(op) + ": stopped by a warning");
  }
}

Tensor empty_like_batch(const Tensor& like, const Shape& shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}

BipartiteCall describe(const Problem& p, const Tensor& left_bias, const Tensor& right_bias) {
  BipartiteCall call;
  call.n1 = p.n1, call.n2 = p.n2;
  call.batch = p.batch;
  call.is_double = p.is_double();
  call.weight = p.weight_operand();
  call.left_bias = p.operand(left_bias);
  call.right_bias = p.operand(right_bias);
  return call;
}

std::tuple<Tensor, Tensor> bipartite_gibbs(const Tensor& left, const Tensor& left_bias, const Tensor& right_bias,
                                           const Tensor& weight, const Tensor& beta, const Tensor& seed,
                                           const std::optional<Tensor>& right, const std::optional<Tensor>& clamp_left,
                                           const std::optional<Tensor>& clamp_right, const std::optional<Tensor>& chains,
                                           int64_t chain_offset, int64_t sweep_offset, int64_t num_sweeps) {
  constexpr const char* op = "bipartite_gibbs";
  Problem p(op, weight);
  const Tensor left_parameter = p.parameter("left_bias", left_bias, p.n1),
               right_parameter = p.parameter("right_bias", right_bias, p.n2);
  p.state("left", left, p.n1);
  if (right) p.state("right", *right, p.n2);
  if (clamp_left) p.mask("clamp_left", *clamp_left, p.n1);
  if (clamp_right) p.mask("clamp_right", *clamp_right, p.n2);
  if (clamp_right && !right) fail(op, "right must be given when clamp_right is, got none");
  if (chains) p.chain_numbers(*chains);
  p.finish(false);
  BipartiteCall call = describe(p, left_parameter, right_parameter);
  set_counters(op, call, p, seed, chains, chain_offset, sweep_offset, num_sweeps, 0);
  set_beta(op, "beta", call, beta, num_sweeps);
  if (!num_sweeps || !p.num_chains()) {
    check_finite(op, "left_bias", left_parameter);
    check_finite(op, "right_bias", right_parameter);
    if (!p.num_chains()) check_finite(op, "weight", p.weight());
  }

  Bits left_bits = pack(op, "left", p, left, p.n1);
  Bits right_bits = right ? pack(op, "right", p, *right, p.n2) : Bits(size_t(p.num_chains() * state_words(p.n2)));
  const Bits left_mask = clamp_left ? pack(op, "clamp_left", p, *clamp_left, p.n1) : Bits();
  const Bits right_mask = clamp_right ? pack(op, "clamp_right", p, *clamp_right, p.n2) : Bits();
  call.left_bits = left_bits.data();
  call.right_bits = right_bits.data();
  if (clamp_left) call.clamp_left = left_mask.data();
  if (clamp_right) call.clamp_right = right_mask.data();
  run(op, call);

  const Tensor left_out = empty_like_batch(left, p.with_batch({p.n1}), left.scalar_type());
  const Tensor right_out = empty_like_batch(left, p.with_batch({p.n2}), left.scalar_type());
  unpack(left_bits, p.n1, left_out);
  unpack(right_bits, p.n2, right_out);
  return {left_out, right_out};
}

void check_relaxation(const char* op, BipartiteCall& call, int64_t relaxation, double sharpness, bool slope_gradient) {
  if (relaxation < 0 || relaxation >= kNumRelaxations) fail(op, "relaxation must be a code in 0 .. 3, got ", relaxation);
  if (!(sharpness > 0) || !std::isfinite(float(sharpness))) fail(op, "sharpness must be positive and finite, got ", sharpness);
  call.relaxation = Relaxation(relaxation);
  call.sharpness = sharpness;
  call.slope_gradient = slope_gradient;
}

// Copies a state of the parameters' dtype, broadcast, into rows.
template <class T>
bool copy_rows(const Problem& p, const Tensor& from, int64_t n, T* to) {
  const T* data = static_cast<const T*>(from.const_data_ptr());
  const int64_t stride = from.stride(from.dim() - 1);
  bool finite = true;
  for_each_row(p.batch_shape(), p.batch_strides(from, 1), [&](int64_t linear, int64_t offset) {
    for (int64_t i = 0; i < n; ++i) {
      to[linear * n + i] = data[offset + i * stride];
      finite &= std::isfinite(to[linear * n + i]);
    }
  });
  return finite;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bipartite_gibbs_relaxed(
    const Tensor& left, const Tensor& left_bias, const Tensor& right_bias, const Tensor& weight, const Tensor& beta,
    const Tensor& seed, const std::optional<Tensor>& chains, int64_t chain_offset, int64_t sweep_offset, int64_t num_sweeps,
    int64_t num_relaxed_sweeps, int64_t relaxation, double sharpness, bool slope_gradient) {
  constexpr const char* op = "bipartite_gibbs_relaxed";
  Problem p(op, weight);
  const Tensor left_parameter = p.parameter("left_bias", left_bias, p.n1),
               right_parameter = p.parameter("right_bias", right_bias, p.n2);
  p.state("left", left, p.n1);
  if (chains) p.chain_numbers(*chains);
  p.finish(false);
  if (num_relaxed_sweeps < 1) fail(op, "num_relaxed_sweeps must be at least 1, got ", num_relaxed_sweeps);
  BipartiteCall call = describe(p, left_parameter, right_parameter);
  set_counters(op, call, p, seed, chains, chain_offset, sweep_offset, num_sweeps, num_relaxed_sweeps);
  set_beta(op, "beta", call, beta, num_sweeps + num_relaxed_sweeps);
  if (!num_sweeps || !p.num_chains()) {
    check_finite(op, "left_bias", left_parameter);
    check_finite(op, "right_bias", right_parameter);
    if (!p.num_chains()) check_finite(op, "weight", p.weight());
  }
  check_relaxation(op, call, relaxation, sharpness, slope_gradient);

  const ScalarType type = p.weight().scalar_type();
  const auto output = [&](const Shape& shape) { return empty_like_batch(p.weight(), shape, type); };
  const Tensor state = output(p.with_batch({p.n1})), left_out = output(p.with_batch({p.n1})),
               right_out = output(p.with_batch({p.n2})), mean = output(p.with_batch({p.n1})),
               fields = output(p.with_batch({p.n2 + p.n1}, {num_relaxed_sweeps}));
  const bool is_bits = left.scalar_type() == ScalarType::Bool || left.scalar_type() == ScalarType::Byte;
  Bits left_bits, right_bits;
  if (num_sweeps || is_bits) {
    left_bits = pack(op, "left", p, left, p.n1);
    right_bits.resize(size_t(p.num_chains() * state_words(p.n2)));
    call.left_bits = left_bits.data();
    call.right_bits = right_bits.data();
    if (!num_sweeps) unpack(left_bits, p.n1, state);
  } else {
    // relaxed sweeps may start from a relaxed state
    const Tensor converted = left.scalar_type() == type ? left : torch::stable::to(left, type);
    const bool finite = p.is_double() ? copy_rows(p, converted, p.n1, static_cast<double*>(state.mutable_data_ptr()))
                                      : copy_rows(p, converted, p.n1, static_cast<float*>(state.mutable_data_ptr()));
    if (!finite) fail(op, "left must be finite, got NaN or inf");
  }
  call.state = state.mutable_data_ptr();
  call.left = left_out.mutable_data_ptr();
  call.right = right_out.mutable_data_ptr();
  call.left_mean = mean.mutable_data_ptr();
  call.fields = fields.mutable_data_ptr();
  run(op, call);
  return {left_out, right_out, mean, state, fields};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bipartite_gibbs_relaxed_backward(
    const Tensor& grad_left, const Tensor& grad_right, const Tensor& grad_left_mean, const Tensor& state, const Tensor& fields,
    const Tensor& weight, const Tensor& beta, const Tensor& seed, const std::optional<Tensor>& chains, int64_t chain_offset,
    int64_t sweep_offset, int64_t num_sweeps, int64_t relaxation, double sharpness, bool slope_gradient) {
  constexpr const char* op = "bipartite_gibbs_relaxed_backward";
  Problem p(op, weight);
  const Tensor* sides[] = {&grad_left, &grad_right, &grad_left_mean, &state};
  const char* names[] = {"grad_left", "grad_right", "grad_left_mean", "state"};
  const ScalarType type = p.weight().scalar_type();
  for (int i = 0; i < 4; ++i) {
    if (sides[i]->scalar_type() != type) fail(op, names[i], " must be ", name_of(type), ", got ", name_of(sides[i]->scalar_type()));
    p.state(names[i], *sides[i], i == 1 ? p.n2 : p.n1);
  }
  if (chains) p.chain_numbers(*chains);
  p.finish(true);
  const int64_t num_relaxed_sweeps = fields.dim() ? fields.size(0) : 0;
  if (fields.scalar_type() != type || !fields.is_cpu() || num_relaxed_sweeps < 1 ||
      shape_of(fields) != p.with_batch({p.n2 + p.n1}, {num_relaxed_sweeps}))
    fail(op, "fields must be the forward op's output, of shape ", text(p.with_batch({p.n2 + p.n1}, {-1})), ", got ",
         text(shape_of(fields)));
  // contiguous rows for the kernels; expanded gradients (of a sum, say) are materialised here
  const Shape left_shape = p.with_batch({p.n1}), right_shape = p.with_batch({p.n2});
  const auto rows = [&](const Tensor& t, const Shape& shape) {
    if (shape_of(t) != shape)
      fail(op, "every gradient and state must have the whole batch shape, ", text(shape), ", got ", text(shape_of(t)));
    return torch::stable::contiguous(t);
  };
  const Tensor gl = rows(grad_left, left_shape), gr = rows(grad_right, right_shape), gm = rows(grad_left_mean, left_shape),
               start = rows(state, left_shape), saved = torch::stable::contiguous(fields);
  const auto output = [&](const Shape& shape) { return empty_like_batch(p.weight(), shape, type); };
  const Tensor grad_state = output(left_shape), grad_left_bias = output(left_shape), grad_right_bias = output(right_shape),
               grad_weight = output(shape_of(weight));
  BipartiteBackwardCall back{};
  back.forward.n1 = p.n1, back.forward.n2 = p.n2;
  back.forward.batch = p.batch;
  back.forward.is_double = p.is_double();
  back.forward.weight = p.weight_operand();
  set_counters(op, back.forward, p, seed, chains, chain_offset, sweep_offset, num_sweeps, num_relaxed_sweeps);
  set_beta(op, "beta", back.forward, beta, num_sweeps + num_relaxed_sweeps);
  check_relaxation(op, back.forward, relaxation, sharpness, slope_gradient);
  back.forward.state = start.data_ptr();
  back.forward.fields = saved.data_ptr();
  back.grad_left = gl.const_data_ptr();
  back.grad_right = gr.const_data_ptr();
  back.grad_left_mean = gm.const_data_ptr();
  back.grad_state = grad_state.mutable_data_ptr();
  back.grad_left_bias = grad_left_bias.mutable_data_ptr();
  back.grad_right_bias = grad_right_bias.mutable_data_ptr();
  back.grad_weight = grad_weight.mutable_data_ptr();
  back.needs_grad_state = num_sweeps == 0;
  check(op, run_bipartite_backward(back, runtime()));
  return {grad_state, grad_left_bias, grad_right_bias, grad_weight};
}

std::tuple<Tensor, Tensor, Tensor> bipartite_ais(const Tensor& left, const Tensor& left_bias, const Tensor& right_bias,
                                                 const Tensor& weight, const Tensor& base_left_bias, const Tensor& base_right_bias,
                                                 const Tensor& betas, const Tensor& seed, const std::optional<Tensor>& chains,
                                                 int64_t chain_offset, int64_t sweep_offset) {
  constexpr const char* op = "bipartite_ais";
  Problem p(op, weight);
  const Tensor left_parameter = p.parameter("left_bias", left_bias, p.n1),
               right_parameter = p.parameter("right_bias", right_bias, p.n2);
  const Tensor base_left = p.parameter("base_left_bias", base_left_bias, p.n1),
               base_right = p.parameter("base_right_bias", base_right_bias, p.n2);
  p.state("left", left, p.n1);
  if (chains) p.chain_numbers(*chains);
  p.finish(false);
  if (betas.dim() != 1 || betas.size(0) < 1)
    fail(op, "betas must be a 1-D float64 tensor of at least 1 value, got ", text(shape_of(betas)));
  const int64_t num_sweeps = betas.size(0) - 1;
  BipartiteCall call = describe(p, left_parameter, right_parameter);
  call.base_left_bias = p.operand(base_left);
  call.base_right_bias = p.operand(base_right);
  set_counters(op, call, p, seed, chains, chain_offset, sweep_offset, num_sweeps, 0);
  set_beta(op, "betas", call, betas, num_sweeps + 1);  // the starting one, and one a sweep
  if (!num_sweeps || !p.num_chains()) {
    check_finite(op, "left_bias", left_parameter);
    check_finite(op, "right_bias", right_parameter);
    if (!p.num_chains()) check_finite(op, "weight", p.weight());
    check_finite(op, "base_left_bias", base_left);
    check_finite(op, "base_right_bias", base_right);
  }
  Bits left_bits = pack(op, "left", p, left, p.n1), right_bits(size_t(p.num_chains() * state_words(p.n2)));
  const Tensor log_weights = empty_like_batch(p.weight(), p.with_batch({}), ScalarType::Double);
  call.log_weights = static_cast<double*>(log_weights.mutable_data_ptr());
  std::memset(call.log_weights, 0, size_t(p.num_chains()) * sizeof(double));
  call.left_bits = left_bits.data();
  call.right_bits = right_bits.data();
  run(op, call);
  const Tensor left_out = empty_like_batch(left, p.with_batch({p.n1}), left.scalar_type());
  const Tensor right_out = empty_like_batch(left, p.with_batch({p.n2}), left.scalar_type());
  unpack(left_bits, p.n1, left_out);
  unpack(right_bits, p.n2, right_out);
  return {left_out, right_out, log_weights};
}

Tensor coupling_resolution(const Tensor& weight) {
  constexpr const char* op = "coupling_resolution";
  Problem p(op, weight);
  p.finish(true);
  const Tensor out = empty_like_batch(p.weight(), p.with_batch({}), ScalarType::Double);
  check(op, run_coupling_resolution(p.n1, p.n2, p.batch, p.is_double(), p.weight_operand(),
                                    static_cast<double*>(out.mutable_data_ptr())));
  return out;
}

}  // namespace
}  // namespace gibbs

STABLE_TORCH_LIBRARY(gibbs_ext, m) {
  m.def(
      "bipartite_gibbs(Tensor left, Tensor left_bias, Tensor right_bias, Tensor weight, Tensor beta, Tensor seed, Tensor? right, "
      "Tensor? clamp_left, Tensor? clamp_right, Tensor? chains, int chain_offset, int sweep_offset, int num_sweeps) "
      "-> (Tensor left, Tensor right)");
  m.def(
      "bipartite_gibbs_relaxed(Tensor left, Tensor left_bias, Tensor right_bias, Tensor weight, Tensor beta, Tensor seed, "
      "Tensor? chains, int chain_offset, int sweep_offset, int num_sweeps, int num_relaxed_sweeps, int relaxation, float "
      "sharpness, "
      "bool slope_gradient) -> (Tensor left, Tensor right, Tensor left_mean, Tensor state, Tensor fields)");
  m.def(
      "bipartite_gibbs_relaxed_backward(Tensor grad_left, Tensor grad_right, Tensor grad_left_mean, Tensor state, Tensor fields, "
      "Tensor weight, Tensor beta, Tensor seed, Tensor? chains, int chain_offset, int sweep_offset, int num_sweeps, int "
      "relaxation, "
      "float sharpness, bool slope_gradient) -> (Tensor grad_state, Tensor grad_left_bias, Tensor grad_right_bias, Tensor "
      "grad_weight)");
  m.def(
      "bipartite_ais(Tensor left, Tensor left_bias, Tensor right_bias, Tensor weight, Tensor base_left_bias, Tensor "
      "base_right_bias, "
      "Tensor betas, Tensor seed, Tensor? chains, int chain_offset, int sweep_offset) -> (Tensor left, Tensor right, Tensor "
      "log_weights)");
  m.def("coupling_resolution(Tensor weight) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gibbs_ext, CPU, m) {
  m.impl("bipartite_gibbs", TORCH_BOX(&gibbs::bipartite_gibbs));
  m.impl("bipartite_gibbs_relaxed", TORCH_BOX(&gibbs::bipartite_gibbs_relaxed));
  m.impl("bipartite_gibbs_relaxed_backward", TORCH_BOX(&gibbs::bipartite_gibbs_relaxed_backward));
  m.impl("bipartite_ais", TORCH_BOX(&gibbs::bipartite_ais));
  m.impl("coupling_resolution", TORCH_BOX(&gibbs::coupling_resolution));
}
