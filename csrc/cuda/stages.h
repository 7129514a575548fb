// SPDX-License-Identifier: Apache-2.0
#pragma once

// What goes before and after the sweeps of a call. Tensors of binary sweeps, of any dtype and strides, are checked and packed into device memory, and
// the packed bits are unpacked in the end, so that the kernels which sweep know packed arrays only. Parts of gradients are summed.
//
// A row is a chain of a model, models first: number model * chains_per_model + chain. A side's units may begin at an offset in its rows.
#include "cuda/launch.cuh"
#include "cuda/views.cuh"

namespace gibbs {

// How a model's couplings are rounded.
struct alignas(16) ModelScale {
  int32_t k;      // the scale is 2^-k; kUnsound: the graph's layout cannot be followed
  int32_t shift;  // the slices are in units of 2^shift
  float scale;    // 2^-k
  float error;    // the largest error of a field that is made of slices, in units of 1
};
constexpr int32_t kUnsound = INT32_MIN;

struct BitsToPack {
  StateView from;  // absent: zeros
  int64_t n, offset;
  uint32_t* to;  // [row, state_words(offset + n)]
  Outcome fault;
};
struct BiasesToPack {
  ParameterView bias, base_bias;  // base_bias: annealed
  int64_t n, offset, stride;      // stride: of rows that are written
  bool is_shared;                 // one row for all chains of a model
  const int32_t* order;           // [n] place of each number that is written; null: in order
  float *to_bias, *to_base_bias;  // [model or row, stride]; to_base_bias may be null
  Outcome bias_fault, base_fault;
};
struct PackParams {
  static constexpr int kMaxBits = 4, kMaxBiases = 2;
  SweepView sweep;
  bool is_double;
  const ModelScale* scales;  // [model]
  int64_t degree;
  const int32_t* device_degree;  // not null: in place of `degree`
  uint64_t* numbers;             // [row] chain numbers
  int num_bits, num_biases;
  BitsToPack bits[kMaxBits];
  BiasesToPack biases[kMaxBiases];
};

struct BitsToUnpack {
  const uint32_t* from;  // [row, state_words(offset + n)]
  int64_t n, offset;
  StateOutput to;
};
struct UnpackParams {
  static constexpr int kMaxBits = 2;
  BatchView batch;
  const ModelScale* scales;  // of graphs: where a layout is unsound, bits are 0; null: of bipartite models
  int num_bits;
  BitsToUnpack bits[kMaxBits];
};

// Gradients of models of which several CTAs have parts: to [model, i] = sum of from [model, part, i] over the parts, always in the same order.
struct PartialSums {
  static constexpr int64_t kMaxBytes = int64_t{1} << 28;  // that parts may take, if one of each model does not take more
  int64_t num_models, parts, count;
  const void* from;
  void* to;
};

void launch_pack(const PackParams&, Stream);
void launch_unpack(const UnpackParams&, Stream);
void launch_partial_sums(const PartialSums&, bool is_double, Stream);

// Hands out device memory, array by array. With a null base it only adds up.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<unsigned char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    unsigned char* const at = base_ ? base_ + size_ : nullptr;
    size_ += round_up(count * int64_t(sizeof(T)), kAlignment);
    return reinterpret_cast<T*>(at);
  }
  int64_t size() const { return size_; }

 private:
  static constexpr int64_t kAlignment = 256;
  unsigned char* base_;
  int64_t size_ = 0;
};

}  // namespace gibbs
