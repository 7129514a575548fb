// SPDX-License-Identifier: Apache-2.0
#include "cpu/bipartite.h"

#include <optional>

#include "cpu/bipartite_binary.h"
#include "cpu/bipartite_relaxed.h"
#include "cpu/bipartite_single.h"

namespace gibbs {

namespace {

// Both sides' sums of a group should stay in the second-level cache; where tables are looked up, a group fills vectors.
template <class T>
int64_t group_size(const BipartiteCall& call, int64_t chains, int64_t num_threads) {
  const int64_t bytes_per_chain = 4 * (padded_side(call.n1) + padded_side(call.n2));
  const bool looks_up = LookupModel<T>::pays(call);
  const int64_t most = looks_up ? kLookupLanes * kMostLookupVectors : std::clamp<int64_t>((512 << 10) / bytes_per_chain, 64, 512);
  const int64_t groups = std::max((chains + most - 1) / most, num_threads), size = (chains + groups - 1) / groups;
  return looks_up ? round_up(size, kLookupLanes) : size;
}

// Scratch memory and code of one thread, made where they are used first.
template <class T>
class Runners {
 public:
  Runners(const BipartiteCall& call, int64_t group_size, WorstRounding& worst, Progress& progress)
      : call_(call), group_size_(group_size), worst_(worst), progress_(progress) {}
  void run(int64_t model, Interval group, const RoundedModel<T>& coupling) {
    run_binary(model, group, coupling);
    run_relaxed(model, group);
  }
  // load(coupling, model) rounds the model if it has to be swept otherwise; false: the call failed.
  template <class Load>
  void run_single(int64_t model, Interval chains, const Load& load) {
    if (!single_) single_.emplace(call_, worst_, progress_);
    is_too_coarse_ = is_too_coarse_ || !single_->run(model, chains);
    if (is_too_coarse_) {
      if (!coupling_) coupling_.emplace(call_);
      if (!load(*coupling_, model)) return;
      run_binary(model, chains, *coupling_);
    }
    run_relaxed(model, chains);
  }

 private:
  void run_binary(int64_t model, Interval group, const RoundedModel<T>& coupling) {
    if (!call_.num_sweeps) return;
    if (!binary_) binary_.emplace(call_, group_size_, worst_, progress_);
    binary_->run(model, group, coupling);
  }
  void run_relaxed(int64_t model, Interval group) {
    if (!call_.num_relaxed_sweeps || progress_.stop()) return;
    if (!relaxed_) relaxed_.emplace(call_, progress_);
    relaxed_->run(model, group);
  }

  const BipartiteCall& call_;
  const int64_t group_size_;
  WorstRounding& worst_;
  Progress& progress_;
  std::optional<BinaryRunner<T>> binary_;
  std::optional<BipartiteRelaxedRunner<T>> relaxed_;
  std::optional<SingleRunner<T>> single_;
  bool is_too_coarse_ = false;               // for single_; the models of a call are alike, so it is not asked again
  std::optional<RoundedModel<T>> coupling_;  // of the others
};

// What a thread needs for whole models.
template <class T>
struct Worker {
  Worker(const BipartiteCall& call, int64_t group_size, WorstRounding& worst, Progress& progress)
      : runners(call, group_size, worst, progress) {}
  Runners<T> runners;
  std::optional<RoundedModel<T>> coupling;
};

template <class T>
Outcome run_forward(const BipartiteCall& call, const Runtime& runtime, Rounding* rounding, const AfterRound& after) {
  const int64_t models = call.batch.num_models(), chains = call.batch.chains_per_model();
  *rounding = {};
  if (models * chains == 0) return Outcome::kOk;
  Progress progress(runtime);
  WorstRounding worst(call, std::max(call.n1, call.n2), call.log_weights);
  // If there are enough models, each thread takes whole models, whose couplings stay in its cache; else threads share a model's
  // groups.
  const bool by_model = models >= runtime.num_threads || chains == 1;
  const int64_t size = group_size<T>(call, chains, by_model ? 1 : runtime.num_threads);
  const int64_t groups = (chains + size - 1) / size;
  const Runtime serial = {1, nullptr, nullptr};
  // Waking threads costs more than rounding a small model.
  const bool rounds_in_parts = !by_model && call.n1 * call.n2 >= 1 << 16;
  const auto load = [&](RoundedModel<T>& coupling, int64_t model) {
    if (!coupling.load(model, rounds_in_parts ? runtime : serial, progress)) return false;
    worst.note({coupling.wide.scale, 0});
    return true;
  };
  const auto chains_of = [&](int64_t group) { return Interval{group * size, std::min(chains, (group + 1) * size)}; };
  Kept<Worker<T>> workers;
  const auto take_worker = [&] { return workers.take([&] { return std::make_unique<Worker<T>>(call, size, worst, progress); }); };
  const bool single = SingleRunner<T>::pays(call);
  std::optional<RoundedModel<T>> coupling;  // which threads share
  for (int64_t round = 0; round < call.num_rounds && !progress.stop(); ++round) {
    if (by_model && single) {
      for_each_task(runtime, models, progress, [&] {
        return [&, worker = take_worker()](int64_t model) { worker->runners.run_single(model, {0, chains}, load); };
      });
    } else if (by_model) {
      for_each_task(runtime, models, progress, [&] {
        return [&, worker = take_worker()](int64_t model) {
          if (!worker->coupling) worker->coupling.emplace(call);
          if (!load(*worker->coupling, model)) return;
          for (int64_t group = 0; group < groups && !progress.stop(); ++group)
            worker->runners.run(model, chains_of(group), *worker->coupling);
        };
      });
    } else if (single) {
      for (int64_t model = 0; model < models && !progress.stop(); ++model)
        for_each_task(runtime, groups, progress, [&] {
          return [&, model, worker = take_worker()](int64_t group) { worker->runners.run_single(model, chains_of(group), load); };
        });
    } else {
      if (!coupling) coupling.emplace(call);
      for (int64_t model = 0; model < models && !progress.stop() && load(*coupling, model); ++model)
        for_each_task(runtime, groups, progress, [&] {
          return [&, model, worker = take_worker()](int64_t group) { worker->runners.run(model, chains_of(group), *coupling); };
        });
    }
    if (after && !progress.stop()) after(round);
  }
  *rounding = worst.most();
  return progress.outcome();
}

}  // namespace

Outcome run_bipartite(const BipartiteCall& call, const Runtime& runtime, Rounding* rounding, const AfterRound& after) {
  return call.is_double ? run_forward<double>(call, runtime, rounding, after) : run_forward<float>(call, runtime, rounding, after);
}

Outcome run_coupling_resolution(int64_t n1, int64_t n2, const Batch& batch, bool is_double, const Operand& weight, double* out) {
  const Runtime serial = {1, nullptr, nullptr};
  Progress progress(serial);
  BipartiteCall call;
  call.n1 = n1, call.n2 = n2, call.batch = batch, call.is_double = is_double, call.weight = weight;
  const Buffer<double> sums(2 * padded_row(n2));
  for (int64_t model = 0; model < batch.num_models(); ++model) {
    WeightScale scale;
    if (!scale_of(weight_of(call, model), sums.get(), scale, progress)) break;
    out[model] = std::ldexp(1.0, -scale.k);
  }
  return progress.outcome();
}

}  // namespace gibbs
