// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "core/fixed_point.h"
#include "cpu/kernels/table.h"

// What the drivers of all models share: batches, scratch memory, threads, and stopping them.
namespace gibbs {

// A batch of chains, row by row over `sizes`. Dimensions along which the model changes come first in the loops, so that a model's
// couplings are rounded once.
class Batch {
 public:
  Batch() = default;
  Batch(std::vector<int64_t> sizes, const std::vector<bool>& is_model_dim) : sizes_(std::move(sizes)), contiguous_(sizes_.size()) {
    int64_t stride = 1;
    for (size_t d = sizes_.size(); d-- > 0; stride *= sizes_[d]) contiguous_[d] = stride;
    for (size_t d = 0; d < sizes_.size(); ++d) {
      (is_model_dim[d] ? model_dims_ : chain_dims_).push_back(int(d));
      (is_model_dim[d] ? num_models_ : chains_per_model_) *= sizes_[d];
    }
  }
  int64_t num_models() const { return num_models_; }
  int64_t chains_per_model() const { return chains_per_model_; }
  // Where (model, chain) lies in an operand with these batch strides (one per dimension, 0 where it is broadcast).
  int64_t offset(const std::vector<int64_t>& strides, int64_t model, int64_t chain) const {
    int64_t at = 0;
    for (size_t i = model_dims_.size(); i-- > 0; model /= sizes_[size_t(model_dims_[i])])
      at += model % sizes_[size_t(model_dims_[i])] * strides[size_t(model_dims_[i])];
    for (size_t i = chain_dims_.size(); i-- > 0; chain /= sizes_[size_t(chain_dims_[i])])
      at += chain % sizes_[size_t(chain_dims_[i])] * strides[size_t(chain_dims_[i])];
    return at;
  }
  // Row-by-row number of (model, chain).
  int64_t linear(int64_t model, int64_t chain) const { return offset(contiguous_, model, chain); }

 private:
  std::vector<int64_t> sizes_, contiguous_;
  std::vector<int> model_dims_, chain_dims_;
  int64_t num_models_ = 1, chains_per_model_ = 1;
};

// A tensor with the batch's strides; element strides of its own last dimension(s).
struct Operand {
  const void* data = nullptr;
  std::vector<int64_t> batch_strides;
  int64_t stride = 1;      // of the last dimension; of a weight: of its columns
  int64_t row_stride = 0;  // of a weight
};

struct Runtime {
  int num_threads;
  // Calls task(0) .. task(count - 1) on up to num_threads threads and waits.
  void (*parallel)(int64_t count, const std::function<void(int64_t)>& task);
  // Asked now and then on the calling thread; true: stop. May be null.
  bool (*interrupted)();
};

// What a call says of its chains, whatever the model.
struct SweepCall {
  Batch batch;
  bool is_double;                   // dtype of the parameters
  const int64_t* chains = nullptr;  // chain numbers; null: chain_offset + linear number
  std::vector<int64_t> chains_strides;
  int64_t chain_offset = 0, sweep_offset = 0, num_sweeps = 0;
  uint64_t seed = 0;
  std::vector<double> beta;  // 1 value, or one per sweep (binary, then relaxed); annealed: num_sweeps + 1

  int64_t num_relaxed_sweeps = 0;
  Relaxation relaxation = kPwl;
  double sharpness = 4;
  bool slope_gradient = true;
};

inline uint64_t chain_number(const SweepCall& call, int64_t model, int64_t chain) {
  return uint64_t(call.chains ? call.chains[call.batch.offset(call.chains_strides, model, chain)]
                              : call.chain_offset + call.batch.linear(model, chain));
}

// Uninitialised memory on a cache line's boundary. Kernels read padding, so it is cleared once.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, size_t(round_up(count * int64_t(sizeof(T)) + 64, 64))))) {
    if (!data_) throw std::bad_alloc();
    std::memset(static_cast<void*>(data_.get()), 0, size_t(round_up(count * int64_t(sizeof(T)) + 64, 64)));
  }
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

inline double largest_magnitude(const std::vector<double>& values) {
  double largest = 0;
  for (double value : values) largest = std::max(largest, std::fabs(value));
  return largest;
}

// The rounding of the model whose error is largest; any thread notes what it sees.
class WorstRounding {
 public:
  WorstRounding(const SweepCall& call, int64_t degree, bool annealed)
      : degree_(degree), annealed_(annealed), largest_beta_(largest_magnitude(call.beta)) {}
  void note(Rounding rounding) {
    for (Rounding seen = most_.load(); field_error(rounding, degree_) > field_error(seen, degree_);)
      if (most_.compare_exchange_weak(seen, rounding)) return;
  }
  // Notes the biases of `models` models that lie side by side, `units` each. base: see cancelling_bias(). The loop over models runs only if
  // some bias is large enough to matter.
  void note_biases(const float* scale, int models, int64_t units, const float* bias, const float* base) {
    const float coarsest = *std::max_element(scale, scale + models);
    const double error = kResolutionLimit / largest_beta_ - field_error({coarsest, 0}, degree_);  // that float32 may add
    const auto harmless = float(std::min(error / float32_error({0, 1}), double{std::numeric_limits<float>::max()}));
    if (!annealed_ && largest_coupling_sum(coarsest) <= harmless) return;
    int is_large = 0;
    for (int64_t i = 0; i < units * models; ++i) is_large |= (std::fabs(bias[i]) > harmless) | (std::fabs(base[i]) > harmless);
    if (!is_large) return;
    for (int m = 0; m < models; ++m) {
      float largest = 0;
      for (int64_t i = m; i < units * models; i += models) largest = std::max(largest, cancelling_bias(bias[i], base[i], scale[m]));
      note({scale[m], largest});
    }
  }
  Rounding most() const { return most_.load(); }

 private:
  const int64_t degree_;
  const bool annealed_;
  const double largest_beta_;
  std::atomic<Rounding> most_{Rounding{0, 0}};
};

// The first fault, or an interrupt, seen by any thread. Only the calling thread may ask the host whether to stop.
class Progress {
 public:
  explicit Progress(const Runtime& runtime) : runtime_(runtime), caller_(std::this_thread::get_id()), asked_(Clock::now()) {}
  void fail(Outcome outcome) {
    Outcome none = Outcome::kOk;
    outcome_.compare_exchange_strong(none, outcome);
  }
  bool stop() {
    if (runtime_.interrupted && std::this_thread::get_id() == caller_) {
      const auto now = Clock::now();
      if (now - asked_ > std::chrono::milliseconds(100)) {
        asked_ = now;
        if (runtime_.interrupted()) fail(Outcome::kInterrupted);
      }
    }
    return outcome_.load(std::memory_order_relaxed) != Outcome::kOk;
  }
  StopCheck check() {
    return {[](void* self) { return static_cast<Progress*>(self)->stop(); }, this};
  }
  Outcome outcome() const { return outcome_.load(); }

 private:
  using Clock = std::chrono::steady_clock;
  const Runtime& runtime_;
  const std::thread::id caller_;
  Clock::time_point asked_;
  std::atomic<Outcome> outcome_{Outcome::kOk};
};

// Tasks are taken in turn by as many threads as there are: their costs differ, and results do not depend on who does what. The calling
// thread, when it has run out of tasks, goes on asking the host whether to stop until the others have too.
template <class MakeWorker>
void for_each_task(const Runtime& runtime, int64_t num_tasks, Progress& progress, const MakeWorker& make_worker) {
  const int64_t workers = std::min<int64_t>(runtime.num_threads, num_tasks);
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::condition_variable finished;
  int64_t running = 0;  // guarded by mutex
  const std::function<void(int64_t)> work = [&](int64_t) {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      ++running;
    }
    const auto leave = [&](void*) {
      std::unique_lock<std::mutex> lock(mutex);
      if (--running == 0) finished.notify_all();
      if (std::this_thread::get_id() != caller) return;
      while (!finished.wait_for(lock, std::chrono::milliseconds(50), [&] { return running == 0; })) progress.stop();
    };
    const std::unique_ptr<void, decltype(leave)> guard(&mutex, leave);  // leaves on an exception, too
    if (next.load() >= num_tasks) return;
    auto worker = make_worker();
    for (int64_t task; (task = next++) < num_tasks && !progress.stop();) worker(task);
  };
  if (workers <= 1)
    work(0);
  else
    runtime.parallel(workers, work);
}

struct Interval {
  int64_t begin, end;
};

}  // namespace gibbs
