// SPDX-License-Identifier: Apache-2.0
#pragma once

// How the CPU's ops read and write tensors: they check values before the kernels run, and hand states to them as bits.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/fixed_point.h"
#include "cpu/batch.h"
#include "cpu/moments.h"
#include "cpu/tempering.h"
#include "cpu/threads.h"
#include "ops/arguments.h"

namespace gibbs {

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

inline Bits pack(const Problem& p, const char* name, const Tensor& t, int64_t n) {
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
          fail(p.op(), name, " must hold 0 and 1 only, got ", float(from[__builtin_ctz(odd) * stride]));
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
    S fours[16][4];  // the elements of every four bits
    for (int i = 0; i < 64; ++i) fours[i / 4][i % 4] = S(i / 4 >> i % 4 & 1);
    for (int64_t row = 0, rows = words ? int64_t(bits.size()) / words : 0; row < rows; ++row, data += n) {
      const uint32_t* from = bits.data() + row * words;
      int64_t i = 0;
      for (; i + 4 <= n; i += 4) std::memcpy(data + i, fours[from[i / 32] >> (i % 32) & 15], sizeof fours[0]);
      for (; i < n; ++i) data[i] = S(from[i / 32] >> (i % 32) & 1);
    }
  });
}

// A part's state, or zeros if none is given, and its clamp, or nothing.
inline Bits pack_state(const Problem& p, const Part& part) {
  return part.state ? pack(p, part.names.state, *part.state, part.size) : Bits(size_t(p.num_chains() * state_words(part.size)));
}
inline Bits pack_clamp(const Problem& p, const Part& part) {
  return part.clamp ? pack(p, part.names.clamp, *part.clamp, part.size) : Bits();
}

// A contiguous tensor, uninitialised. torch::stable::new_empty does the same by way of the dispatcher and takes half a microsecond longer.
inline Tensor empty(const Problem& p, const Shape& shape, ScalarType type) {
  Shape strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= std::max<int64_t>(shape[d], 1)) strides[d] = stride;
  AtenTensorHandle handle;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), cpu = aoti_torch_device_type_cpu();
  if (aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), code, cpu, 0, &handle))
    throw std::runtime_error(std::string(p.op()) + ": cannot allocate " + text(shape) + " " + name_of(type));
  return Tensor(handle);
}

inline Tensor unpack(const Problem& p, const Part& part, const Bits& bits, ScalarType type) {
  const Tensor out = empty(p, p.with_batch({part.size}), type);
  unpack(bits, part.size, out);
  return out;
}

// One zero for each chain, to which annealed sweeps add.
inline Tensor zero_log_weights(const Problem& p) {
  const Tensor out = empty(p, p.with_batch({}), ScalarType::Double);
  std::memset(out.mutable_data_ptr(), 0, size_t(p.num_chains()) * sizeof(double));
  return out;
}

// ---- calls -----------------------------------------------------------------------------------------------------------------------

inline Operand operand(const Problem& p, const Tensor* t) {
  if (!t) return {};
  return {t->const_data_ptr(), p.batch_strides(*t, 1), t->stride(t->dim() - 1), 0};
}
inline Operand coupling_operand(const Problem& p) {
  const Tensor& t = p.coupling();
  const int64_t row_stride = p.coupling_dims() > 1 ? t.stride(t.dim() - 2) : 0;
  return {t.const_data_ptr(), p.batch_strides(t, p.coupling_dims()), t.stride(t.dim() - 1), row_stride};
}
inline Batch batch(const Problem& p) { return Batch(p.batch_shape(), p.is_model_dim(), p.has_same_couplings()); }

inline void describe(SweepCall& call, const Problem& p, const Counters& c) {
  call.batch = batch(p);
  call.is_double = p.is_double();
  if (c.chains) {
    call.chains = static_cast<const int64_t*>(c.chains->const_data_ptr());
    call.chains_strides = p.batch_strides(*c.chains, 0);
    for_each_row(p.batch_shape(), call.chains_strides, [&](int64_t, int64_t offset) {
      if (call.chains[offset] < 0 || call.chains[offset] >= kMaxChains)
        fail(p.op(), "chain_offset must lie in 0 .. 2^48 - 1, got ", call.chains[offset]);
    });
  }
  call.chain_offset = c.chain_offset;
  call.sweep_offset = c.sweep_offset;
  call.num_sweeps = c.num_sweeps;
  call.num_relaxed_sweeps = c.num_relaxed_sweeps;
  call.seed = uint64_t(*static_cast<const int64_t*>(c.seed.const_data_ptr()));
  call.beta = read_beta(p, c.beta);
  call.num_betas = c.beta.size(c.beta.dim() - 1);
  call.beta_strides = beta_strides(p, c.beta);
}

inline void set_relaxation(SweepCall& call, const RelaxationArguments& r) {
  call.relaxation = Relaxation(r.relaxation);
  call.sharpness = r.sharpness;
  call.slope_gradient = r.slope_gradient;
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

inline void check(const Problem& p, Outcome outcome) {
  if (outcome == Outcome::kInterrupted) throw std::runtime_error(std::string(p.op()) + ": interrupted");
  if (outcome != Outcome::kOk) fail(p.op(), text(outcome));
}

inline void warn_if_large(const Problem& p, const Rounding& rounding, int64_t neighbors, const std::vector<double>& betas) {
  const double beta = largest_magnitude(betas);
  if (beta * field_error(rounding, neighbors) > kResolutionLimit)
    warn_of_rounding(p.op(), p.coupling_name(), rounding, neighbors, at_beta(beta));
}

// ---- tempering -------------------------------------------------------------------------------------------------------------------

// The ladder of a call, its copy of the chains' numbers, and the outputs that say what happened in each round.
struct TemperingTensors {
  Ladder ladder;
  std::vector<int64_t> chains;
  Tensor energies, chains_at;

  TemperingTensors(const Problem& p, const Counters& c, int64_t num_swaps)
      : energies(empty(p, p.with_batch({}, {num_swaps}), ScalarType::Double)),
        chains_at(empty(p, p.with_batch({}, {num_swaps}), ScalarType::Long)) {
    const Tensor numbers = as_contiguous(*c.chains);
    const int64_t* from = static_cast<const int64_t*>(numbers.const_data_ptr());
    chains.assign(from, from + p.num_chains());
    ladder.betas = read_beta(p, c.beta);
    for (double& beta : ladder.betas) beta = double(float(beta));
    ladder.columns = p.num_chains() / std::max<int64_t>(p.batch_shape()[0], 1);
    ladder.chains = chains.data();
    ladder.energies = static_cast<double*>(energies.mutable_data_ptr());
    ladder.chains_at = static_cast<int64_t*>(chains_at.mutable_data_ptr());
  }
  // The call's chains have contiguous numbers from now on.
  void number(const Problem& p, SweepCall& call) {
    call.chains = chains.data();
    call.chains_strides.assign(p.batch_shape().size(), 0);
    int64_t stride = 1;
    for (size_t d = p.batch_shape().size(); d-- > 0; stride *= p.batch_shape()[d]) call.chains_strides[d] = stride;
  }
};

// ---- moments ---------------------------------------------------------------------------------------------------------------------

// The counts of a call and its best states. What is not wanted has the shape [0].
struct MomentTensors {
  std::vector<Tensor> units;  // of each part
  Tensor pairs, best_energy;
  std::vector<Bits> best_bits;
  Counts counts;
  BestStates best;

  // bits: the state of each part.
  MomentTensors(const Problem& p, SweepCall& call, int64_t sweeps_per_read, int64_t counted, bool wants_best,
                std::span<const Bits* const> bits)
      : pairs(zeros(p, counted < kUnitsAndPairs, p.pair_shape())),
        best_energy(empty(p, wants_best ? p.with_batch({}) : Shape{0}, ScalarType::Double)),
        wants_best_(wants_best) {
    for (const Part& part : p.parts()) {
      units.push_back(zeros(p, counted < kUnits, p.counted({part.size})));
      counts.units.push_back(static_cast<int64_t*>(units.back().mutable_data_ptr()));
    }
    if (counted == kUnitsAndPairs) counts.pairs = static_cast<int64_t*>(pairs.mutable_data_ptr());
    call.sweeps_per_read = sweeps_per_read;
    if (counted) call.counts = &counts;
    if (!wants_best) return;
    best.energies = static_cast<double*>(best_energy.mutable_data_ptr());
    std::fill_n(best.energies, p.num_chains(), std::numeric_limits<double>::infinity());
    for (const Bits* of_part : bits) best_bits.push_back(*of_part);
    for (size_t i = 0; i < bits.size(); ++i)
      best.parts.push_back({bits[i]->data(), best_bits[i].data(), state_words(p.parts()[i].size)});
  }
  const BestStates* best_or_null() const { return wants_best_ ? &best : nullptr; }
  Tensor best_state(const Problem& p, const Part& part, ScalarType type) const {
    if (!wants_best_) return empty(p, {0}, type);
    return unpack(p, part, best_bits[size_t(&part - p.parts().data())], type);
  }

 private:
  static Tensor zeros(const Problem& p, bool is_unwanted, const Shape& shape) {
    const Tensor out = empty(p, is_unwanted ? Shape{0} : shape, ScalarType::Long);
    std::memset(out.mutable_data_ptr(), 0, size_t(out.numel()) * sizeof(int64_t));
    return out;
  }
  bool wants_best_;
};

// ---- values ----------------------------------------------------------------------------------------------------------------------

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

inline void check_finite(const Problem& p, const char* name, const Tensor& t) {
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
  if (!finite) fail(p.op(), name, " must be finite in float32, got NaN or inf");
}

// Parameters are checked even where the kernels read none, in an empty batch or without binary sweeps.
inline void check_unread(const Problem& p, int64_t num_sweeps) {
  if (num_sweeps && p.num_chains()) return;
  for (const Part& part : p.parts()) check_finite(p, part.names.bias, *part.bias);
  if (!p.num_chains()) check_finite(p, p.coupling_name(), p.coupling());
  for (const Part& part : p.parts())
    if (part.base_bias) check_finite(p, part.names.base_bias, *part.base_bias);
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

// Reads where relaxed sweeps begin. Binary sweeps, which come first, begin at bits: those are returned. Otherwise the state, bits or
// relaxed, is written to `start`, of the parameters' dtype.
inline Bits read_start(const Problem& p, const Part& part, int64_t num_sweeps, const Tensor& start) {
  const Tensor& state = *part.state;
  if (num_sweeps || is_bit_type(state.scalar_type())) {
    Bits bits = pack_state(p, part);
    if (!num_sweeps) unpack(bits, part.size, start);
    return bits;
  }
  const Tensor converted = state.scalar_type() == p.type() ? state : torch::stable::to(state, p.type());
  const bool finite = p.is_double() ? copy_rows(p, converted, part.size, static_cast<double*>(start.mutable_data_ptr()))
                                    : copy_rows(p, converted, part.size, static_cast<float*>(start.mutable_data_ptr()));
  if (!finite) fail(p.op(), part.names.state, " must be finite, got NaN or inf");
  return {};
}

}  // namespace gibbs
