// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include "cpu/batch.h"
#include "cpu/bit_rows.h"
#include "cpu/kernels/table.h"
#include "cpu/threads.h"

// Sums over the states that the chains of a call pass through. Its first batch dimension has the chains of a model.
namespace gibbs {

// How often each unit, and each pair of coupled units, is 1. Threads add to these in any order.
struct Counts {
  std::vector<int64_t*> units;  // of each part: [models, units]
  int64_t* pairs = nullptr;     // [models, pairs]; null: not wanted
  std::mutex mutex;
};

// The number of a round's sweeps after which states are counted next, or all of them if none are.
inline int64_t next_read(const SweepCall& call, int64_t done) {
  return call.counts ? (done / call.sweeps_per_read + 1) * call.sweeps_per_read : call.num_sweeps;
}

// Makes a round's binary sweeps by sweep(first, count), and calls read() where states are counted.
template <class Sweep, class Read>
void sweep_and_read(const SweepCall& call, Progress& progress, const Sweep& sweep, const Read& read) {
  for (int64_t first = 0, next; first < call.num_sweeps && !progress.stop(); first = next) {
    next = next_read(call, first);
    sweep(first, next - first);
    if (call.counts && !progress.stop()) read();
  }
}

// Gathers states of one model after the other, and counts many at a time.
class Counter {
 public:
  explicit Counter(const SweepCall& call) : call_(call) {}
  Counter(const Counter&) = delete;
  virtual ~Counter() = default;
  // The states that are added next are those of this model.
  void begin(int64_t model) {
    if (model == model_) return;
    end();
    model_ = model;
  }

 protected:
  static constexpr int64_t kMostStates = kCountWords * kChainsOfWord;

  // The first of places for so many states, at most 64, whose bits go into one word of each unit.
  int64_t place(int64_t states) {
    if (used_ % kChainsOfWord + states > kChainsOfWord) used_ = round_up(used_, kChainsOfWord);
    if (used_ == kMostStates) count_all();
    return std::exchange(used_, used_ + states);
  }
  // A class that counts ends so, before its memory goes.
  void end() {
    if (model_ < 0) return;
    place_rest();
    count_all();
    add_all();
  }
  // Adds counts to others, and clears them.
  static void move_counts(uint32_t* from, int64_t size, int64_t* to) {
    for (int64_t i = 0; i < size; ++i) to[i] += from[i];
    std::fill_n(from, size, 0u);
  }

 private:
  // Gives places to states that have none yet.
  virtual void place_rest() {}
  // Counts the states at all places, and clears those.
  virtual void count() = 0;
  // Adds what was counted to a row of the call's outputs, and clears it.
  virtual void add_to(Counts& counts, int64_t row) = 0;

  void count_all() {
    if (!used_) return;
    count();
    used_ = 0;
    if ((counted_ += kMostStates) > (int64_t{1} << 32) - 2 * kMostStates) add_all();
  }
  void add_all() {
    const std::lock_guard<std::mutex> lock(call_.counts->mutex);
    add_to(*call_.counts, call_.batch.linear(model_, 0));
    counted_ = 0;
  }

  const SweepCall& call_;
  int64_t model_ = -1, used_ = 0;
  int64_t counted_ = 0;  // states since counts were 0, fewer than 2^32
};

// The state of each chain that has the lowest energy of those read.
struct BestStates {
  struct Part {
    const uint32_t* bits;
    uint32_t* best;
    int64_t words;
  };
  std::vector<Part> parts;
  double* energies;  // [linear number], infinite at first
  // Given the energies of the states that the chains have now.
  void update(const std::vector<double>& now) const {
    for (size_t at = 0; at < now.size(); ++at) {
      if (!(now[at] < energies[at])) continue;
      energies[at] = now[at];
      for (const Part& part : parts)
        std::copy_n(part.bits + int64_t(at) * part.words, part.words, part.best + int64_t(at) * part.words);
    }
  }
};

// Runs a call whose states are read every call.sweeps_per_read sweeps, by run(call, after). best: null, or where the best states go;
// then each read ends a round, because the energies of all states are found together.
template <class Call, class Run>
Outcome run_with_reads(Call& call, const BestStates* best, const Run& run) {
  if (!best) return run(call, nullptr);
  std::vector<double> energies(size_t(call.batch.num_models() * call.batch.chains_per_model()));
  call.energies = energies.data();
  call.num_rounds = call.num_sweeps / call.sweeps_per_read;
  call.num_sweeps = std::min(call.sweeps_per_read, call.num_sweeps);
  return run(call, [&](int64_t) {
    best->update(energies);
    call.sweep_offset += call.num_sweeps, call.first_beta += call.num_sweeps;
  });
}

}  // namespace gibbs
