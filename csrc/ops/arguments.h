// SPDX-License-Identifier: Apache-2.0
#pragma once

// Checks and readers of arguments that all ops share, on every backend: shapes, dtypes, devices and ranges of numbers. The backends check
// the values that tensors hold.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cmath>
#include <initializer_list>
#include <list>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#include "core/outcome.h"
#include "core/philox.h"
#include "core/tempering.h"
#include "ops/faults.h"
#include "ops/schemas.h"

namespace gibbs {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

inline Shape shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Shape(sizes.begin(), sizes.end());
}

inline std::string text(const Shape& shape) {
  std::ostringstream out;
  for (size_t d = 0; d < shape.size(); ++d) out << (d ? ", " : "[") << shape[d];
  return shape.empty() ? "[]" : out.str() + "]";
}

inline const Tensor* pointer(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

// Without a dispatcher's call where there is nothing to do.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// A device as one number: that of a CUDA device, or one of these.
constexpr int kCpu = -1, kAnotherDevice = -2;
inline int device_of(const Tensor& t) { return t.is_cpu() ? kCpu : t.is_cuda() ? int(t.get_device_index()) : kAnotherDevice; }
inline std::string device_name(const Tensor& t) {
  const int device = device_of(t);
  return device == kCpu ? "cpu" : device == kAnotherDevice ? "another device" : "cuda:" + std::to_string(device);
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

inline bool is_half_type(ScalarType type) { return type == ScalarType::Half || type == ScalarType::BFloat16; }
inline bool is_parameter_type(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || is_half_type(type);
}
// Whether states of this type hold 0 and 1, whatever their bytes are.
inline bool is_bit_type(ScalarType type) { return type == ScalarType::Bool || type == ScalarType::Byte; }
inline bool is_state_type(ScalarType type) { return is_parameter_type(type) || is_bit_type(type); }

// ---- models ----------------------------------------------------------------------------------------------------------------------

// The units of a model come in parts: the left and the right side, or all nodes of a graph.
struct PartNames {
  const char *state, *bias, *base_bias, *clamp;
};
constexpr PartNames kLeft = {"left", "left_bias", "base_left_bias", "clamp_left"};
constexpr PartNames kRight = {"right", "right_bias", "base_right_bias", "clamp_right"};
constexpr PartNames kNodes = {"state", "bias", "base_bias", "clamp"};

// The tensors of one part in a call; null: the op has none, or none was given. Kernels read `bias` and `base_bias` as the checks leave
// them: half types become float32.
struct PartTensors {
  const Tensor *state = nullptr, *bias = nullptr, *base_bias = nullptr, *clamp = nullptr;
};
struct Part : PartTensors {
  PartNames names;
  int64_t size;
};

// Numbers of nodes, edges and colours of a graph, as the sizes of tensors or its layout tell them.
struct GraphSize {
  int64_t num_nodes, num_edges, num_colors;
};

// The model and the batch that the tensors of one call describe. It points to the call's arguments, which outlive it.
class Problem {
 public:
  // A bipartite model. weight: [..., n1, n2].
  Problem(OpId id, const Tensor& weight, const PartTensors& left = {}, const PartTensors& right = {})
      : Problem(id, "weight", weight, 2, "[..., n1, n2]") {
    const int64_t n1 = coupling().size(coupling().dim() - 2), n2 = coupling().size(coupling().dim() - 1);
    if (n1 < 1 || n2 < 1) fail(op(), "weight must have at least one unit on each side, got ", text(shape_of(weight)));
    if (n1 + n2 >= kMaxUnits) fail(op(), "weight must have fewer than 2^30 units, got ", text(shape_of(weight)));
    parts_ = {Part{left, kLeft, n1}, Part{right, kRight, n2}};
    num_parts_ = 2;
  }
  // A model on a graph. coupling: [..., num_edges].
  Problem(OpId id, const Tensor& coupling, const Tensor& layout, const GraphSize& size, const PartTensors& nodes = {})
      : Problem(id, "coupling", coupling, 1, "[..., num_edges]") {
    if (coupling.size(coupling.dim() - 1) != size.num_edges)
      fail(op(), "coupling must have shape [..., ", size.num_edges, "], one for each edge of graph, got ",
           text(shape_of(coupling)));
    same_device("layout", layout);
    parts_[0] = Part{nodes, kNodes, size.num_nodes};
    num_parts_ = 1;
  }
  Problem(const Problem&) = delete;

  OpId id() const { return id_; }
  const char* op() const { return kOps[id_].name; }
  const char* coupling_name() const { return coupling_name_; }
  const char* beta_name() const { return is_annealed(id_) ? "betas" : "beta"; }
  static bool is_annealed(uint32_t id) { return id == kBipartiteAis || id == kGraphAis; }

  std::span<Part> parts() { return {parts_.data(), num_parts_}; }
  std::span<const Part> parts() const { return {parts_.data(), num_parts_}; }
  const Part& left() const { return parts_[0]; }
  const Part& right() const { return parts_[1]; }
  const Part& nodes() const { return parts_[0]; }
  int64_t num_units() const { return num_parts_ == 2 ? left().size + right().size : nodes().size; }

  const Tensor& coupling() const { return *coupling_; }
  int64_t coupling_dims() const { return coupling_dims_; }  // of one model
  ScalarType type() const { return type_; }                 // in which the op computes
  bool is_double() const { return type_ == ScalarType::Double; }

  // ---- arguments, one by one ----

  // Returns the tensor as kernels read it.
  const Tensor* parameter(const char* name, const Tensor& t, int64_t n) {
    same_device(name, t);
    const ScalarType type = t.scalar_type();
    if (type != given_type_)
      fail(op(), name, " must have ", coupling_name_, "'s dtype, ", name_of(given_type_), ", got ", name_of(type));
    last_dim(name, t, n);
    return converted(t, type);
  }

  void state(const char* name, const Tensor& t, int64_t n) {
    same_device(name, t);
    if (const ScalarType type = t.scalar_type(); !is_state_type(type))
      fail(op(), name, " must be bool, uint8 or a floating-point tensor, got ", name_of(type));
    last_dim(name, t, n);
  }

  // A state or a gradient of the dtype in which the op computes.
  void computed(const char* name, const Tensor& t, int64_t n) {
    if (t.scalar_type() != type_) fail(op(), name, " must be ", name_of(type_), ", got ", name_of(t.scalar_type()));
    state(name, t, n);
  }

  void mask(const char* name, const Tensor& t, int64_t n) {
    same_device(name, t);
    if (t.scalar_type() != ScalarType::Bool) fail(op(), name, " must be a bool mask, got ", name_of(t.scalar_type()));
    last_dim(name, t, n);
  }

  void saved_fields(const Tensor& t) const {
    same_device("fields", t);
    const int64_t n = num_units();
    const Shape wanted = with_batch({n}, {t.dim() ? t.size(0) : -1});
    if (t.scalar_type() != type_ || wanted[0] < 1 || shape_of(t) != wanted)
      fail(op(), "fields must be the forward op's output, of shape ", text(with_batch({n}, {-1})), ", got ", text(shape_of(t)));
  }

  // The betas of a call: 1-D, or [..., 1] or [..., sweeps] with batch dimensions.
  void betas(const Tensor& t) {
    same_device_or_cpu(beta_name(), t);
    if (t.scalar_type() != ScalarType::Double || t.dim() < 1)
      fail(op(), beta_name(), " must be a float64 tensor of at least one dimension, got ", name_of(t.scalar_type()), " ",
           text(shape_of(t)));
    if (is_per_chain(t)) join(beta_name(), t, 1), betas_per_chain_ = &t;
  }
  static bool is_per_chain(const Tensor& beta) { return beta.dim() > 1; }

  void chain_numbers(const Tensor& t) {
    same_device("chain_offset", t);
    if (t.scalar_type() != ScalarType::Long) fail(op(), "chain_offset must be int64, got ", name_of(t.scalar_type()));
    join("chain_offset", t, 0);
  }

  void same_device(const char* name, const Tensor& t) const {
    if (device_of(t) != device_)
      fail(op(), name, " must be on ", coupling_name_, "'s device, ", device_name(coupling()), ", got ", device_name(t));
  }
  // For small tensors that are read on the CPU.
  void same_device_or_cpu(const char* name, const Tensor& t) const {
    if (!t.is_cpu()) same_device(name, t);
  }

  // ---- the batch, once all arguments are known ----

  // A model is one element of the batch of the coupling and of the betas, by their sizes (backward ops: each has a gradient) or by their
  // strides (forward ops: an expanded coupling is one model).
  void finish(bool models_by_size) {
    const std::vector<bool> has_own_coupling = changing_dims(coupling(), coupling_dims_, models_by_size);
    is_model_dim_ = has_own_coupling;
    if (betas_per_chain_) {
      const std::vector<bool> has_own_beta = changing_dims(*betas_per_chain_, 1, models_by_size);
      for (size_t d = 0; d < batch_.size(); ++d) is_model_dim_[d] = is_model_dim_[d] || has_own_beta[d];
      if (!models_by_size) {
        has_same_couplings_ = has_own_coupling;
        has_same_couplings_.flip();
      }
    }
    for (int64_t size : batch_) num_chains_ *= size;
  }
  // States are counted over the first batch dimension. A model is one element of all others.
  void count_over_first_dim() {
    if (batch_.empty()) fail(op(), "the batch must have at least one dimension, over which states are counted, got none");
    if (is_model_dim_[0])
      fail(op(), coupling_name_, " and ", beta_name(),
           " must not change along the first batch dimension, over which states are counted, got ", coupling_name_, " ",
           text(shape_of(coupling())), " and the batch shape ", text(batch_));
    const std::vector<bool> has_own_coupling = changing_dims(coupling(), coupling_dims_, false);
    for (size_t d = 1; d < batch_.size(); ++d) is_model_dim_[d] = true;
    has_same_couplings_ = has_own_coupling;
    has_same_couplings_.flip();
  }
  // Of counts: one row for each model.
  Shape counted(std::initializer_list<int64_t> own) const {
    Shape out(batch_.begin() + 1, batch_.end());
    out.insert(out.end(), own);
    return out;
  }
  // Of counts of all pairs of coupled units.
  Shape pair_shape() const {
    Shape out = counted({});
    const Shape own = shape_of(coupling());
    out.insert(out.end(), own.end() - coupling_dims_, own.end());
    return out;
  }
  const Shape& batch_shape() const { return batch_; }
  const std::vector<bool>& is_model_dim() const { return is_model_dim_; }
  // Dimensions of models that differ in nothing but their betas; empty where models are numbered row by row.
  const std::vector<bool>& has_same_couplings() const { return has_same_couplings_; }
  // The shape of one coupling for each model.
  Shape model_couplings() const {
    if (!betas_per_chain_) return shape_of(coupling());
    Shape out = batch_;
    for (size_t d = 0; d < out.size(); ++d)
      if (!is_model_dim_[d]) out[d] = 1;
    const Shape own = shape_of(coupling());
    out.insert(out.end(), own.end() - coupling_dims_, own.end());
    return out;
  }
  int64_t num_chains() const { return num_chains_; }

  // Strides of a tensor over the batch, 0 where it is broadcast. own_dims: the number of last dimensions that are not the batch's.
  Shape batch_strides(const Tensor& t, int64_t own_dims) const {
    Shape out(batch_.size(), 0);
    const auto sizes = t.sizes(), strides = t.strides();
    const size_t dims = sizes.size() - size_t(own_dims), lead = batch_.size() - dims;
    for (size_t d = 0; d < dims; ++d) out[lead + d] = sizes[d] == 1 ? 0 : strides[d];
    return out;
  }
  Shape with_batch(std::initializer_list<int64_t> own, std::initializer_list<int64_t> leading = {}) const {
    Shape out;
    out.reserve(leading.size() + batch_.size() + own.size());
    out.insert(out.end(), leading);
    out.insert(out.end(), batch_.begin(), batch_.end());
    out.insert(out.end(), own);
    return out;
  }

 private:
  Problem(OpId id, const char* name, const Tensor& coupling, int64_t own_dims, const char* own_shape)
      : id_(id), coupling_name_(name), coupling_dims_(own_dims), given_type_(coupling.scalar_type()), device_(device_of(coupling)) {
    if (!is_parameter_type(given_type_))
      fail(op(), name, " must be float32, float64, float16 or bfloat16, got ", name_of(given_type_));
    type_ = is_half_type(given_type_) ? ScalarType::Float : given_type_;
    if (coupling.dim() < own_dims) fail(op(), name, " must have shape ", own_shape, ", got ", text(shape_of(coupling)));
    coupling_ = converted(coupling, given_type_);
    join(name, coupling, own_dims);
  }

  // The dimensions of the batch along which a tensor changes.
  std::vector<bool> changing_dims(const Tensor& t, int64_t own_dims, bool by_size) const {
    const Shape strides = batch_strides(t, own_dims);
    const auto sizes = t.sizes();
    std::vector<bool> out(batch_.size());
    const size_t lead = batch_.size() - (sizes.size() - size_t(own_dims));
    for (size_t d = lead; d < batch_.size(); ++d) out[d] = sizes[d - lead] != 1 && (by_size || strides[d] != 0);
    return out;
  }

  const Tensor* converted(const Tensor& t, ScalarType type) {
    return is_half_type(type) ? &converted_.emplace_back(torch::stable::to(t, ScalarType::Float)) : &t;
  }

  void last_dim(const char* name, const Tensor& t, int64_t n) {
    const auto sizes = t.sizes();
    if (sizes.size() < 1 || sizes[sizes.size() - 1] != n) {
      if (num_parts_ == 1) fail(op(), name, " must have shape [..., ", n, "], one for each node of graph, got ", text(shape_of(t)));
      fail(op(), name, " must have shape [..., ", n, "] to fit ", coupling_name_, " ", text(shape_of(coupling())), ", got ",
           text(shape_of(t)));
    }
    join(name, t, 1);
  }

  void join(const char* name, const Tensor& t, int64_t own_dims) {
    const auto sizes = t.sizes();
    const size_t dims = sizes.size() - size_t(own_dims);
    if (dims > batch_.size()) batch_.insert(batch_.begin(), dims - batch_.size(), 1);
    for (size_t d = 0; d < dims; ++d) {
      int64_t& size = batch_[batch_.size() - dims + d];
      if (size == 1)
        size = sizes[d];
      else if (sizes[d] != 1 && sizes[d] != size)
        fail(op(), name, " ", text(shape_of(t)), " does not broadcast with the other arguments' batch shape ", text(batch_));
    }
  }

  const OpId id_;
  const char* const coupling_name_;
  const int64_t coupling_dims_;
  const ScalarType given_type_;
  const int device_;
  ScalarType type_;
  const Tensor* coupling_;
  std::list<Tensor> converted_;  // which neither allocates while it is empty nor moves its elements
  std::array<Part, 2> parts_;
  size_t num_parts_ = 0;
  Shape batch_;
  const Tensor* betas_per_chain_ = nullptr;
  std::vector<bool> is_model_dim_, has_same_couplings_;
  int64_t num_chains_ = 1;
};

inline void check_layout_tensor(OpId id, const Tensor& layout) {
  if (layout.scalar_type() != ScalarType::Int || layout.dim() != 1 || !layout.is_contiguous())
    fail(kOps[id].name, "layout must be a contiguous 1-D int32 tensor, the layout of a ColoredGraph, got ",
         name_of(layout.scalar_type()), " ", text(shape_of(layout)));
}
[[noreturn]] inline void fail_layout(OpId id, const Tensor& layout) {
  fail(kOps[id].name, "layout must be the layout of a ColoredGraph, got ", layout.size(0), " numbers that are none");
}

// ---- sweeps ----------------------------------------------------------------------------------------------------------------------

// Arguments that do not depend on the model. chains: [...]; the backends check its values.
struct Counters {
  const Tensor& seed;
  const Tensor& beta;  // [..., 1], or one per sweep (binary, then relaxed); annealed: [num_sweeps + 1]
  const std::optional<Tensor>& chains;
  int64_t chain_offset, sweep_offset, num_sweeps, num_relaxed_sweeps = 0;
};

struct RelaxationArguments {
  int64_t relaxation;
  double sharpness;
  bool slope_gradient;
};

// Number of sweeps that a schedule of annealed sweeps describes.
inline int64_t annealed_sweeps(OpId id, const Tensor& betas) {
  if (betas.dim() != 1 || betas.size(0) < 1)
    fail(kOps[id].name, "betas must be a 1-D float64 tensor of at least 1 value, got ", text(shape_of(betas)));
  return betas.size(0) - 1;
}

// Number of relaxed sweeps whose fields a forward op has saved.
inline int64_t relaxed_sweeps_of(const Tensor& fields) { return fields.dim() ? fields.size(0) : 0; }

inline void check_counters(const Problem& p, const Counters& c) {
  const char* const op = p.op();
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

  const char* const name = p.beta_name();
  const int64_t count = Problem::is_annealed(p.id()) ? sweeps + 1 : sweeps;
  if (const int64_t got = c.beta.size(c.beta.dim() - 1); got != 1 && got != count)
    fail(op, name, " must hold 1 value or one per sweep (", count, "), got ", got);
}

inline void check_relaxation(const Problem& p, const RelaxationArguments& r) {
  if (r.relaxation < 0 || r.relaxation >= kNumRelaxations) fail(p.op(), "relaxation must be a code in 0 .. 3, got ", r.relaxation);
  if (!(r.sharpness > 0) || !std::isfinite(float(r.sharpness)))
    fail(p.op(), "sharpness must be positive and finite, got ", r.sharpness);
}

// Binary, relaxed (relaxation: not null) and annealed sweeps.
inline void check_sweeps(Problem& p, const Counters& c, const RelaxationArguments* relaxation = nullptr) {
  for (Part& part : p.parts()) part.bias = p.parameter(part.names.bias, *part.bias, part.size);
  for (Part& part : p.parts())
    if (part.base_bias) part.base_bias = p.parameter(part.names.base_bias, *part.base_bias, part.size);
  for (const Part& part : p.parts())
    if (part.state) p.state(part.names.state, *part.state, part.size);
  for (const Part& part : p.parts()) {
    if (!part.clamp) continue;
    p.mask(part.names.clamp, *part.clamp, part.size);
    if (!part.state) fail(p.op(), part.names.state, " must be given when ", part.names.clamp, " is, got none");
  }
  if (c.chains) p.chain_numbers(*c.chains);
  p.betas(c.beta);
  p.finish(false);
  if (relaxation && c.num_relaxed_sweeps < 1) fail(p.op(), "num_relaxed_sweeps must be at least 1, got ", c.num_relaxed_sweeps);
  check_counters(p, c);
  if (relaxation) check_relaxation(p, *relaxation);
}

// Parallel tempering: the first batch dimension is the ladder. counters.num_sweeps: of all rounds together.
inline void check_tempering(Problem& p, const Counters& counters, int64_t sweeps_per_swap, int64_t num_swaps) {
  if (sweeps_per_swap < 1 || sweeps_per_swap >= kMaxSweeps)
    fail(p.op(), "sweeps_per_swap must lie in 1 .. 2^44 - 1, got ", sweeps_per_swap);
  if (num_swaps < 0 || num_swaps > kMaxSweeps / sweeps_per_swap)
    fail(p.op(), "num_swaps must lie in 0 .. 2^44 / sweeps_per_swap, got ", num_swaps);
  check_sweeps(p, counters);
  const Shape& batch = p.batch_shape();
  const Tensor& beta = counters.beta;
  if (beta.dim() != int64_t(batch.size()) + 1 || beta.dim() < 2 || beta.size(0) != batch[0] || beta.numel() != batch[0])
    fail(p.op(), "beta must have shape [B, 1, ..., 1], one dimension more than the batch shape ", text(batch), ", got ",
         text(shape_of(beta)));
  if (shape_of(*counters.chains) != batch)
    fail(p.op(), "chains must have the batch shape ", text(batch), ", got ", text(shape_of(*counters.chains)));
}

// Cluster moves between the chains of the second batch dimension, which must be chains of one model.
inline Pairing check_cluster_moves(const Problem& p) {
  const Shape& batch = p.batch_shape();
  Pairing pairing = {batch[0], batch.size() > 1 ? batch[1] : 1, 1};
  for (size_t d = 2; d < batch.size(); ++d) pairing.num_models *= batch[d];
  const auto check = [&](const char* name, const Tensor& t) {
    if (batch.size() > 1 && p.batch_strides(t, 1)[1])
      fail(p.op(), name, " must be the same for all chains of the second batch dimension if there are cluster_moves, got ",
           text(shape_of(t)));
  };
  check(p.coupling_name(), p.coupling());
  check(p.nodes().names.bias, *p.nodes().bias);
  return pairing;
}

// What is counted in the states that are read.
enum Counted { kNothing = 0, kUnits = 1, kUnitsAndPairs = 2 };

// Sweeps whose states are read.
inline void check_moments(Problem& p, const Counters& counters, int64_t sweeps_per_read, int64_t counted) {
  check_sweeps(p, counters);
  p.count_over_first_dim();
  if (sweeps_per_read < 1 || counters.num_sweeps % sweeps_per_read)
    fail(p.op(), "sweeps_per_read must be at least 1 and divide num_sweeps, ", counters.num_sweeps, ", got ", sweeps_per_read);
  if (counted < kNothing || counted > kUnitsAndPairs) fail(p.op(), "counted must be a code in 0 .. 2, got ", counted);
}

// One row of `size` values for each chain: a gradient, or a state that the forward op has saved.
struct Rows {
  const char* name;
  const Tensor& tensor;
  int64_t size;
};

// Backward ops of relaxed sweeps. Returns the rows as contiguous tensors: an expanded gradient (of a sum, say) is materialised.
inline std::vector<Tensor> check_backward(Problem& p, std::initializer_list<Rows> rows, const Tensor& fields, const Counters& c,
                                          const RelaxationArguments& relaxation) {
  for (const Rows& r : rows) p.computed(r.name, r.tensor, r.size);
  if (c.chains) p.chain_numbers(*c.chains);
  p.betas(c.beta);
  p.finish(true);
  p.saved_fields(fields);
  std::vector<Tensor> whole;
  whole.reserve(rows.size());
  for (const Rows& r : rows) {
    const Shape shape = p.with_batch({r.size});
    if (shape_of(r.tensor) != shape)
      fail(p.op(), "every gradient and state must have the whole batch shape, ", text(shape), ", got ", text(shape_of(r.tensor)));
    whole.push_back(as_contiguous(r.tensor));
  }
  check_counters(p, c);
  check_relaxation(p, relaxation);
  return whole;
}

// Finite values of a beta on the CPU, row by row.
inline std::vector<double> read_beta(const Problem& p, const Tensor& beta) {
  const Tensor rows = as_contiguous(beta);
  const double* values = static_cast<const double*>(rows.const_data_ptr());
  std::vector<double> out(values, values + rows.numel());
  for (const double value : out)
    if (!std::isfinite(float(value))) fail(p.op(), p.beta_name(), " must be finite in float32, got ", value);
  return out;
}

// The strides of contiguous rows of betas over the batch; empty if there is one row for all chains.
inline Shape beta_strides(const Problem& p, const Tensor& beta) {
  if (!Problem::is_per_chain(beta)) return {};
  const size_t dims = size_t(beta.dim()) - 1, lead = p.batch_shape().size() - dims;
  Shape out(p.batch_shape().size(), 0);
  int64_t stride = beta.size(beta.dim() - 1);
  for (size_t d = dims; d-- > 0; stride *= beta.size(int64_t(d)))
    if (beta.size(int64_t(d)) != 1 && p.is_model_dim()[lead + d]) out[lead + d] = stride;
  return out;
}

// ---- sums over edges -------------------------------------------------------------------------------------------------------------

inline void check_graph_fields(Problem& p) {
  Part& nodes = p.parts()[0];
  nodes.bias = p.parameter("bias", *nodes.bias, nodes.size);
  p.computed("state", *nodes.state, nodes.size);
  p.finish(false);
}

inline void check_graph_edge_sums(Problem& p, const Tensor& first, const Tensor& second) {
  p.computed("first", first, p.nodes().size);
  p.computed("second", second, p.nodes().size);
  p.finish(true);
}

}  // namespace gibbs
