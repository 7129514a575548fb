// SPDX-License-Identifier: Apache-2.0
#include "cpu/bipartite.h"

#include <cmath>
#include <limits>

namespace gibbs {

namespace {

// The biases of a tile's chains as padded float32; chains whose bias lies at the same place share one copy.
class BiasCache {
 public:
  BiasCache(int64_t n, int64_t capacity) : n_(n), padded_(padded_side(n)), values_(capacity * padded_) {}
  void clear() { used_ = 0, last_ = -1; }
  // Null where a value is not finite in float32.
  const float* add(const Operand& bias, bool is_double, int64_t offset) {
    if (offset == last_) return values_.get() + (used_ - 1) * padded_;
    float* out = values_.get() + used_++ * padded_;
    last_ = offset;
    if (is_double)
      copy(static_cast<const double*>(bias.data) + offset, bias.stride, out);
    else
      copy(static_cast<const float*>(bias.data) + offset, bias.stride, out);
    bool finite = true;
    for (int64_t i = 0; i < n_; ++i) finite &= std::fabs(out[i]) <= std::numeric_limits<float>::max();
    return finite ? out : nullptr;
  }

 private:
  template <class T>
  void copy(const T* from, int64_t stride, float* out) const {
    if (stride == 1)
      std::copy_n(from, n_, out);
    else
      for (int64_t i = 0; i < n_; ++i) out[i] = float(from[i * stride]);
  }

  int64_t n_, padded_, used_ = 0, last_ = -1;
  Buffer<float> values_;
};

int64_t tile_size(const BipartiteCall& call) {
  // both sides' sums should stay in the second-level cache
  const int64_t bytes_per_chain = 4 * (padded_side(call.n1) + padded_side(call.n2));
  return std::clamp<int64_t>((512 << 10) / bytes_per_chain, 64, 512);
}

// Few chains to a model: what counts is the memory traffic of each chain's own updates.
bool use_narrow(const BipartiteCall& call) {
  return kernels().has_narrow && std::max(call.n1, call.n2) > call.narrow_from && !call.log_weights &&
         call.batch.chains_per_model() < 32;
}

// A model's couplings as the sweeps of one thread read them.
struct CouplingBuffers {
  explicit CouplingBuffers(const BipartiteCall& call) : CouplingBuffers(call, use_narrow(call)) {}
  bool narrow;
  Buffer<int32_t> rows, columns;
  Buffer<int16_t> narrow_rows, narrow_columns;
  Buffer<double> sums;

 private:
  CouplingBuffers(const BipartiteCall& call, bool narrow)
      : CouplingBuffers(call, narrow, call.num_sweeps ? call.n1 * padded_row(call.n2) : 0,
                        call.num_sweeps ? call.n2 * padded_row(call.n1) : 0) {}
  CouplingBuffers(const BipartiteCall& call, bool is_narrow, int64_t row_size, int64_t column_size)
      : narrow(is_narrow),
        rows(is_narrow ? 0 : row_size),
        columns(is_narrow ? 0 : column_size),
        narrow_rows(is_narrow ? row_size : 0),
        narrow_columns(is_narrow ? column_size : 0),
        sums(padded_row(call.n2)) {}
};

CouplingView weight_of(const BipartiteCall& call, int64_t model) {
  const int64_t size = call.is_double ? 8 : 4;
  const int64_t offset = call.batch.offset(call.weight.batch_strides, model, 0);
  return {static_cast<const char*>(call.weight.data) + offset * size,
          call.is_double,
          call.n1,
          call.n2,
          call.weight.row_stride,
          call.weight.stride};
}

// What the relaxed sweeps of all chains of a model share. `packed`: room for [n1, n2], used where the weight's rows are not contiguous.
template <class T>
RelaxedSweeps<T> relaxed_sweeps(const BipartiteCall& call, int64_t model, T* packed) {
  const CouplingView view = weight_of(call, model);
  const T* weight = static_cast<const T*>(view.data);
  int64_t row_stride = view.row_stride;
  if (view.column_stride != 1) {
    for (int64_t i = 0; i < call.n1; ++i)
      for (int64_t j = 0; j < call.n2; ++j) packed[i * call.n2 + j] = weight[i * view.row_stride + j * view.column_stride];
    weight = packed;
    row_stride = call.n2;
  }
  const bool schedule = call.beta.size() > 1;
  return {call.n1,
          call.n2,
          call.num_relaxed_sweeps,
          row_stride,
          call.seed,
          uint64_t(call.sweep_offset + call.num_sweeps),
          call.beta.data() + (schedule ? call.num_sweeps : 0),
          schedule ? 1 : 0,
          weight,
          call.relaxation,
          T(call.sharpness),
          call.slope_gradient,
          call.batch.num_models() * call.batch.chains_per_model() * (call.n1 + call.n2)};
}

bool exponent_of(const CouplingView& weight, double* sums, int* k, int* shift, Progress& progress) {
  switch (kernels().scale_exponent(weight, sums, k, shift)) {
    case CouplingStatus::kNonFinite:
      progress.fail(Outcome::kNonFiniteWeight);
      return false;
    case CouplingStatus::kTooLarge:
      progress.fail(Outcome::kTooLargeWeight);
      return false;
    case CouplingStatus::kOk:
      return true;
  }
  return false;
}

struct ModelCoupling {
  RoundedCoupling wide;  // scale 0: the call failed
  NarrowCoupling narrow;
  CouplingView weight;
  int k;
  const char* next = nullptr;  // the couplings that this thread is likely to want next
};

ModelCoupling round_model(const BipartiteCall& call, int64_t model, const CouplingBuffers& buffers, Progress& progress) {
  ModelCoupling out = {
      {buffers.rows.get(), buffers.columns.get(), 0.0f}, {nullptr, nullptr, 0}, weight_of(call, model), 0, nullptr};
  if (!exponent_of(out.weight, buffers.sums.get(), &out.k, &out.narrow.shift, progress)) return out;
  out.wide.scale = std::ldexp(1.0f, -out.k);
  if (!call.num_sweeps) return out;
  if (buffers.narrow) {
    out.narrow.rows = buffers.narrow_rows.get();
    out.narrow.columns = buffers.narrow_columns.get();
    kernels().round_narrow_couplings(out.weight, out.k, out.narrow);
  } else {
    kernels().round_couplings(out.weight, out.k, out.wide);
  }
  return out;
}

// Scratch memory and code of one thread for tiles of chains that share a model.
class TileRunner {
 public:
  TileRunner(const BipartiteCall& call, int64_t capacity, WorstRounding& worst, Progress& progress)
      : call_(call),
        worst_(worst),
        progress_(progress),
        chains_(size_t(capacity)),
        left_bias_(call.n1, capacity),
        right_bias_(call.n2, capacity),
        base_left_bias_(call.n1, call.log_weights ? capacity : 0),
        base_right_bias_(call.n2, call.log_weights ? capacity : 0),
        acc_left_(capacity * padded_side(call.n1)),
        acc_right_(capacity * padded_side(call.n2)),
        bytes_(tile_random_bytes(call.n1 + call.n2, capacity)),
        words_(call.num_relaxed_sweeps ? random_bytes_capacity(call.n1 + call.n2) : 0),
        raised_(std::max(call.n1, call.n2) + 16),
        lowered_(std::max(call.n1, call.n2) + 16),
        table_(kTableInts),
        packed_weight_(needs_packing() ? call.n1 * call.n2 : 0),
        bias_copies_(call.num_relaxed_sweeps ? kRelaxedTile * (call.n1 + call.n2) : 0),
        beta_(call.beta.begin(), call.beta.end()) {}

  void run(int64_t model, Interval tile, const ModelCoupling& coupling) {
    if (call_.num_sweeps && !run_binary(model, tile, coupling)) return;
    if (call_.num_relaxed_sweeps) call_.is_double ? run_relaxed<double>(model, tile) : run_relaxed<float>(model, tile);
  }

 private:
  bool needs_packing() const { return call_.num_relaxed_sweeps && call_.weight.stride != 1; }

  bool run_binary(int64_t model, Interval tile, const ModelCoupling& coupling) {
    const int64_t left_words = state_words(call_.n1), right_words = state_words(call_.n2);
    left_bias_.clear(), right_bias_.clear(), base_left_bias_.clear(), base_right_bias_.clear();
    const auto load = [&](BiasCache& cache, const Operand& bias, int64_t chain, Outcome fault) {
      const float* values = cache.add(bias, call_.is_double, call_.batch.offset(bias.batch_strides, model, chain));
      if (!values) progress_.fail(fault);
      return values;
    };
    for (int64_t chain = tile.begin; chain < tile.end; ++chain) {
      const int64_t linear = call_.batch.linear(model, chain);
      BinaryChain& c = chains_[size_t(chain - tile.begin)];
      c = {};
      c.left = call_.left_bits + linear * left_words;
      c.right = call_.right_bits + linear * right_words;
      if (call_.clamp_left) c.clamp_left = call_.clamp_left + linear * left_words;
      if (call_.clamp_right) c.clamp_right = call_.clamp_right + linear * right_words;
      c.number = chain_number(call_, model, chain);
      c.left_bias = load(left_bias_, call_.left_bias, chain, Outcome::kNonFiniteLeftBias);
      c.right_bias = load(right_bias_, call_.right_bias, chain, Outcome::kNonFiniteRightBias);
      if (call_.log_weights) {
        c.base_left_bias = load(base_left_bias_, call_.base_left_bias, chain, Outcome::kNonFiniteBaseLeftBias);
        c.base_right_bias = load(base_right_bias_, call_.base_right_bias, chain, Outcome::kNonFiniteBaseRightBias);
        c.log_weight = call_.log_weights + linear;
      }
    }
    if (progress_.stop()) return false;
    note_biases(tile.end - tile.begin, coupling.wide.scale);
    const BinarySweeps sweeps = {call_.n1,
                                 call_.n2,
                                 call_.num_sweeps,
                                 call_.seed,
                                 uint64_t(call_.sweep_offset),
                                 beta_.data(),
                                 beta_.size() > 1 ? 1 : 0,
                                 coupling.wide,
                                 coupling.narrow,
                                 coupling.weight,
                                 coupling.k,
                                 call_.log_weights != nullptr,
                                 call_.allow_tables,
                                 coupling.next,
                                 coupling.next ? call_.n1 * call_.n2 * (call_.is_double ? 8 : 4) : 0,
                                 progress_.check()};
    kernels().sweep_tile(sweeps, chains_.data(), tile.end - tile.begin,
                         {acc_left_.get(), acc_right_.get(), bytes_.get(), raised_.get(), lowered_.get(), table_.get()});
    return !progress_.stop();
  }

  void note_biases(int64_t count, float scale) {
    const auto note = [&](int64_t n, const float* bias, const float* base) {
      worst_.note_biases(&scale, 1, n, bias, base ? base : bias);
    };
    const BinaryChain* before = nullptr;  // which may have the same biases
    for (const BinaryChain* c = chains_.data(); c < chains_.data() + count; before = c++) {
      if (!before || before->left_bias != c->left_bias || before->base_left_bias != c->base_left_bias)
        note(call_.n1, c->left_bias, c->base_left_bias);
      if (!before || before->right_bias != c->right_bias || before->base_right_bias != c->base_right_bias)
        note(call_.n2, c->right_bias, c->base_right_bias);
    }
  }

  template <class T>
  void run_relaxed(int64_t model, Interval tile) {
    const int64_t n1 = call_.n1, n2 = call_.n2;
    const RelaxedSweeps<T> sweeps = relaxed_sweeps(call_, model, reinterpret_cast<T*>(packed_weight_.get()));
    for (int64_t begin = tile.begin; begin < tile.end && !progress_.stop(); begin += kRelaxedTile) {
      const int count = int(std::min<int64_t>(kRelaxedTile, tile.end - begin));
      RelaxedChain<T> chains[kRelaxedTile];
      T* fields[kRelaxedTile];
      T* copies = reinterpret_cast<T*>(bias_copies_.get());
      bool finite = true;
      const auto copy_bias = [&](const Operand& bias, int64_t n, int64_t chain) {
        const T* from = static_cast<const T*>(bias.data) + call_.batch.offset(bias.batch_strides, model, chain);
        T* to = copies;
        for (int64_t i = 0; i < n; ++i) {
          to[i] = from[i * bias.stride];
          finite &= std::isfinite(to[i]);
        }
        copies += n;
        return to;
      };
      for (int c = 0; c < count; ++c) {
        const int64_t linear = call_.batch.linear(model, begin + c);
        RelaxedChain<T>& chain = chains[c];
        chain.left_bias = copy_bias(call_.left_bias, n1, begin + c);
        if (!finite) return progress_.fail(Outcome::kNonFiniteLeftBias);
        chain.right_bias = copy_bias(call_.right_bias, n2, begin + c);
        if (!finite) return progress_.fail(Outcome::kNonFiniteRightBias);
        chain.state = static_cast<T*>(call_.state) + linear * n1;
        chain.left = static_cast<T*>(call_.left) + linear * n1;
        chain.right = static_cast<T*>(call_.right) + linear * n2;
        chain.left_mean = static_cast<T*>(call_.left_mean) + linear * n1;
        chain.number = chain_number(call_, model, begin + c);
        fields[c] = static_cast<T*>(call_.fields) + linear * (n1 + n2);
        if (call_.num_sweeps) {
          const uint32_t* bits = call_.left_bits + linear * state_words(n1);
          for (int64_t i = 0; i < n1; ++i) chain.state[i] = T(bits[i / 32] >> (i % 32) & 1);
        }
      }
      if constexpr (sizeof(T) == 4)
        kernels().relaxed_float(sweeps, chains, fields, count, words_.get(), bytes_.get());
      else
        kernels().relaxed_double(sweeps, chains, fields, count, words_.get(), bytes_.get());
    }
  }

  const BipartiteCall& call_;
  WorstRounding& worst_;
  Progress& progress_;
  std::vector<BinaryChain> chains_;
  BiasCache left_bias_, right_bias_, base_left_bias_, base_right_bias_;
  Buffer<int32_t> acc_left_, acc_right_;
  Buffer<uint8_t> bytes_;
  Buffer<uint32_t> words_;
  Buffer<int32_t> raised_, lowered_, table_;
  Buffer<double> packed_weight_, bias_copies_;
  std::vector<float> beta_;
};

}  // namespace

Outcome run_bipartite(const BipartiteCall& call, const Runtime& runtime, Rounding* rounding) {
  const int64_t models = call.batch.num_models(), chains = call.batch.chains_per_model();
  *rounding = {};
  if (models * chains == 0) return Outcome::kOk;
  Progress progress(runtime);
  WorstRounding worst(call, std::max(call.n1, call.n2), call.log_weights);
  // Enough models: each thread takes whole models, and a model's couplings stay in its cache. Few: threads share one model's tiles.
  const bool by_model = models >= runtime.num_threads || chains == 1;
  int64_t tile = std::min(chains, tile_size(call));
  if (!by_model) tile = std::min(tile, (chains + runtime.num_threads - 1) / runtime.num_threads);
  const int64_t tiles = (chains + tile - 1) / tile;
  const auto interval = [&](int64_t t) { return Interval{t * tile, std::min(chains, (t + 1) * tile)}; };
  if (by_model) {
    for_each_task(runtime, models, progress, [&] {
      return [&, buffers = std::make_shared<CouplingBuffers>(call),
              runner = std::make_shared<TileRunner>(call, tile, worst, progress)](int64_t model) {
        ModelCoupling coupling = round_model(call, model, *buffers, progress);
        worst.note({coupling.wide.scale, 0});
        const int64_t next = model + std::min<int64_t>(runtime.num_threads, models);
        if (next < models && chains == 1 && coupling.weight.column_stride == 1 && coupling.weight.row_stride == call.n2)
          coupling.next = static_cast<const char*>(weight_of(call, next).data);
        for (int64_t t = 0; t < tiles && !progress.stop(); ++t) runner->run(model, interval(t), coupling);
      };
    });
  } else {
    const CouplingBuffers buffers(call);
    for (int64_t model = 0; model < models && !progress.stop(); ++model) {
      const ModelCoupling coupling = round_model(call, model, buffers, progress);
      worst.note({coupling.wide.scale, 0});
      if (progress.stop()) break;
      for_each_task(runtime, tiles, progress, [&] {
        return [&, runner = std::make_shared<TileRunner>(call, tile, worst, progress)](int64_t t) {
          runner->run(model, interval(t), coupling);
        };
      });
    }
  }
  *rounding = worst.most();
  return progress.outcome();
}

namespace {

template <class T>
Outcome run_backward(const BipartiteBackwardCall& back, const Runtime& runtime) {
  const BipartiteCall& call = back.forward;
  const int64_t models = call.batch.num_models(), chains = call.batch.chains_per_model();
  const int64_t n1 = call.n1, n2 = call.n2, factors = 2 * call.num_relaxed_sweeps, total = models * chains;
  Progress progress(runtime);
  if (total == 0) {
    std::fill_n(static_cast<T*>(back.grad_weight), models * n1 * n2, T{});
    return Outcome::kOk;
  }
  struct Scratch {
    Scratch(const BipartiteCall& c)
        : words(random_bytes_capacity(c.n1 + c.n2)),
          bytes(random_bytes_capacity(c.n1 + c.n2)),
          values(2 * (c.n1 + c.n2)),
          weight(c.weight.stride == 1 ? 0 : c.n1 * c.n2) {}
    Buffer<uint32_t> words;
    Buffer<uint8_t> bytes;
    Buffer<T> values, weight;
  };
  // The factors of one model's chains, then their outer products.
  const auto run_chains = [&](int64_t model, Interval range, T* left_factors, T* right_factors, Scratch& scratch) {
    const RelaxedSweeps<T> sweeps = relaxed_sweeps(call, model, scratch.weight.get());
    for (int64_t chain = range.begin; chain < range.end && !progress.stop(); ++chain) {
      const int64_t linear = call.batch.linear(model, chain);
      const auto row = [&](const void* base, int64_t n) { return static_cast<const T*>(base) + linear * n; };
      const auto out = [&](void* base, int64_t n) { return static_cast<T*>(base) + linear * n; };
      const RelaxedBackwardChain<T> c = {row(back.grad_left, n1),
                                         row(back.grad_right, n2),
                                         row(back.grad_left_mean, n1),
                                         row(call.state, n1),
                                         row(call.fields, n1 + n2),
                                         out(back.grad_state, n1),
                                         out(back.grad_left_bias, n1),
                                         out(back.grad_right_bias, n2),
                                         left_factors + chain * factors * n1,
                                         right_factors + chain * factors * n2,
                                         chain_number(call, model, chain)};
      if constexpr (sizeof(T) == 4)
        kernels().relaxed_backward_float(sweeps, c, back.needs_grad_state, scratch.words.get(), scratch.bytes.get(),
                                         scratch.values.get());
      else
        kernels().relaxed_backward_double(sweeps, c, back.needs_grad_state, scratch.words.get(), scratch.bytes.get(),
                                          scratch.values.get());
    }
  };
  const auto outer = [&](int64_t model, const T* left_factors, const T* right_factors, Interval rows) {
    T* out = static_cast<T*>(back.grad_weight) + model * n1 * n2;
    if constexpr (sizeof(T) == 4)
      kernels().outer_products_float(left_factors, right_factors, chains * factors, n1, n2, rows.begin, rows.end, out);
    else
      kernels().outer_products_double(left_factors, right_factors, chains * factors, n1, n2, rows.begin, rows.end, out);
  };
  if (models >= runtime.num_threads) {
    for_each_task(runtime, models, progress, [&] {
      return [&, scratch = std::make_shared<Scratch>(call), left = std::make_shared<Buffer<T>>(chains * factors * n1),
              right = std::make_shared<Buffer<T>>(chains * factors * n2)](int64_t model) {
        run_chains(model, {0, chains}, left->get(), right->get(), *scratch);
        outer(model, left->get(), right->get(), {0, n1});
      };
    });
  } else {
    const Buffer<T> left(chains * factors * n1), right(chains * factors * n2);
    constexpr int64_t kChains = 8, kRows = 16;
    for (int64_t model = 0; model < models && !progress.stop(); ++model) {
      for_each_task(runtime, (chains + kChains - 1) / kChains, progress, [&] {
        return [&, scratch = std::make_shared<Scratch>(call)](int64_t t) {
          run_chains(model, {t * kChains, std::min(chains, (t + 1) * kChains)}, left.get(), right.get(), *scratch);
        };
      });
      for_each_task(runtime, (n1 + kRows - 1) / kRows, progress, [&] {
        return [&](int64_t t) { outer(model, left.get(), right.get(), {t * kRows, std::min(n1, (t + 1) * kRows)}); };
      });
    }
  }
  return progress.outcome();
}

}  // namespace

Outcome run_bipartite_backward(const BipartiteBackwardCall& back, const Runtime& runtime) {
  return back.forward.is_double ? run_backward<double>(back, runtime) : run_backward<float>(back, runtime);
}

Outcome run_coupling_resolution(int64_t n1, int64_t n2, const Batch& batch, bool is_double, const Operand& weight, double* out) {
  const Runtime serial = {1, nullptr, nullptr};
  Progress progress(serial);
  BipartiteCall call;
  call.n1 = n1, call.n2 = n2, call.batch = batch, call.is_double = is_double, call.weight = weight;
  const Buffer<double> sums(padded_row(n2));
  for (int64_t model = 0; model < batch.num_models(); ++model) {
    int k = 0, shift = 0;
    if (!exponent_of(weight_of(call, model), sums.get(), &k, &shift, progress)) break;
    out[model] = std::ldexp(1.0, -k);
  }
  return progress.outcome();
}

}  // namespace gibbs
