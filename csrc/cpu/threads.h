// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "core/outcome.h"
#include "cpu/kernels/types.h"

namespace gibbs {

struct Runtime {
  int num_threads;
  // Calls task(0) .. task(count - 1) on up to num_threads threads and waits for them.
  void (*parallel)(int64_t count, const std::function<void(int64_t)>& task);
  // Called now and then on the calling thread; returns whether to stop. May be null.
  bool (*interrupted)();
};

// The first fault or interrupt that any thread sees. Only the calling thread may ask the host whether to stop.
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

// Runs worker(0) .. worker(num_tasks - 1), where each thread makes a worker of its own. Threads take tasks in turn, because costs
// differ; results do not depend on which thread runs which task. When no tasks are left, the calling thread goes on asking the host
// whether to stop until the other threads have finished.
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
    const std::unique_ptr<void, decltype(leave)> guard(&mutex, leave);  // an exception leaves, too
    if (next.load() >= num_tasks) return;
    auto worker = make_worker();
    for (int64_t task; (task = next++) < num_tasks && !progress.stop();) worker(task);
  };
  if (workers <= 1)
    work(0);
  else
    runtime.parallel(workers, work);
}

// Scratch memory and couplings that threads leave for those of the next round.
template <class T>
class Kept {
 public:
  template <class Make>
  std::shared_ptr<T> take(const Make& make) {
    std::unique_ptr<T> one;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!idle_.empty()) one = std::move(idle_.back()), idle_.pop_back();
    }
    if (!one) one = make();
    return std::shared_ptr<T>(one.release(), [this](T* used) {
      const std::lock_guard<std::mutex> lock(mutex_);
      idle_.emplace_back(used);
    });
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<T>> idle_;
};

struct Interval {
  int64_t begin, end;
};
// Shares 0 .. count - 1 among the threads in equal parts, of which all but the last are multiples of `multiple`: run(Interval).
template <class Run>
void for_each_part(const Runtime& runtime, int64_t count, int64_t multiple, Progress& progress, const Run& run) {
  const int64_t pieces = (count + multiple - 1) / multiple, parts = std::min<int64_t>(runtime.num_threads, pieces);
  if (parts <= 1) return run(Interval{0, count});
  for_each_task(runtime, parts, progress, [&] {
    return [&](int64_t part) {
      run(Interval{part * pieces / parts * multiple, std::min(count, (part + 1) * pieces / parts * multiple)});
    };
  });
}

}  // namespace gibbs
