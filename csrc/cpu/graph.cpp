// SPDX-License-Identifier: Apache-2.0
#include "cpu/graph.h"

#include <atomic>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/graph_clusters.h"
#include "cpu/graph_coarse.h"
#include "cpu/graph_coarse_units.h"
#include "cpu/graph_energies.h"
#include "cpu/graph_relaxed.h"
#include "cpu/graph_sums.h"
#include "cpu/graph_tables.h"
#include "cpu/graph_units.h"

namespace gibbs {

namespace {

std::atomic<GraphRoute> chosen_route{GraphRoute::kAuto};

// The route of a model's binary sweeps, given the number of its chains in each thread.
GraphRoute route_of(const GraphCall& call, int64_t chains) {
  if (!call.num_sweeps || call.metropolis) return GraphRoute::kSums;
  if (use_tables(call, chains)) return GraphRoute::kTables;
  if ((chains <= kFewUnitsChains || call.route == GraphRoute::kCoarseUnits) && use_coarse_units(call))
    return GraphRoute::kCoarseUnits;
  if (use_units(call)) return GraphRoute::kUnits;
  return use_coarse(call) ? GraphRoute::kCoarse : GraphRoute::kSums;
}

// A forward run: constants that all threads share.
template <class T>
class ForwardRun {
 public:
  ForwardRun(const GraphCall& call, const Runtime& runtime)
      : call_(call),
        runtime_(runtime),
        progress_(runtime),
        worst_(call, std::max<int64_t>(call.graph.max_degree, 1), call.log_weights),
        beta_(call.beta.begin(), call.beta.end()) {
    // Numbers of a model that takes much memory.
    const int64_t size =
        4 * call.graph.num_edges + (call.graph.num_nodes << (use_tables(call, kTableGroup) ? table_degree(call.graph) : 3));
    if (call.num_rounds > 1 && call.batch.num_models() * size <= call.most_kept)
      kept_models_.resize(size_t(call.batch.num_models()));
  }

  Outcome run(Rounding* rounding, const AfterRound& after) {
    for (int64_t round = 0; round < call_.num_rounds && !progress_.stop(); ++round) {
      mixes_models(call_) ? run_mixed() : run_by_model();
      if (call_.pairing.num_betas) run_couplings(clusters_);
      if (call_.energies) run_couplings(energies_);
      if (after && !progress_.stop()) after(round);
    }
    *rounding = worst_.most();
    return progress_.outcome();
  }

 private:
  // Scratch memory and code of one thread, made when a route first needs it.
  struct Runners {
    // Binary sweeps of 16 chains. False if the call failed.
    template <class Coupling>
    bool sweep(ForwardRun& run, const Group& group, const Coupling& coupling) {
      if (!sums) sums.emplace(run.call_, run.beta_, run.worst_, run.progress_);
      return sums->run(group, coupling);
    }
    // Those of four groups of 16; coupling(part) is that of one of them.
    template <class CouplingOf>
    bool sweep_wide(ForwardRun& run, const Group* parts, const CouplingOf& coupling) {
      using Coupling = std::remove_cvref_t<decltype(coupling(0))>;
      if (!coarse) coarse.emplace(run.call_, run.beta_, Coupling::kShared, run.worst_, run.progress_);
      if (coarse->run(parts, coupling)) return !run.progress_.stop();
      for (int part = 0; part < kCoarseParts; ++part)
        if (parts[part].count && !sweep(run, parts[part], coupling(part))) return false;
      return true;
    }
    template <class Coupling>
    void relax(ForwardRun& run, const Group& group, const Coupling& coupling) {
      if (!relaxed) relaxed.emplace(run.call_, run.progress_);
      relaxed->run(group, coupling);
    }
    std::optional<SumsRunner<T>> sums;
    std::optional<CoarseRunner<T>> coarse;
    std::optional<CoarseUnitsRunner<T>> coarse_units;
    std::optional<TablesRunner> tables;
    std::optional<UnitsRunner> units;
    std::optional<GraphRelaxedRunner<T>> relaxed;
  };

  // Each task is four groups of 16 or one.
  void run_mixed() {
    const int64_t groups = num_mixed_groups(call_.batch);
    const int64_t wide = use_coarse(call_) ? num_wide_groups(call_, groups, runtime_.num_threads) : 0;
    struct Scratch : Runners {
      Scratch(const GraphCall& call, int parts) : coupling(call) {
        for (int part = 0; part < parts; ++part) rounded.emplace_back(call);
      }
      LaneCoupling<T> coupling;
      std::vector<RoundedLanes> rounded;
    };
    for_each_task(runtime_, wide + std::max<int64_t>(groups - kCoarseParts * wide, 0), progress_, [&] {
      return [&, scratch = std::make_shared<Scratch>(call_, call_.num_sweeps ? wide ? kCoarseParts : 1 : 0)](int64_t task) {
        const int count = task < wide ? kCoarseParts : 1;
        const int64_t first = task < wide ? task * kCoarseParts : task + (kCoarseParts - 1) * wide;
        LaneCoupling<T>& coupling = scratch->coupling;
        Group parts[kCoarseParts];
        for (int part = 0; part < count; ++part) {
          parts[part] = mixed_group(call_.batch, first + part);
          if (!call_.num_sweeps) continue;
          if (!coupling.load(parts[part], progress_)) return;
          if (!scratch->rounded[size_t(part)].load(parts[part], coupling, worst_, progress_)) return;
        }
        const auto rounded_of = [&](int part) -> const RoundedLanes& { return scratch->rounded[size_t(part)]; };
        if (call_.num_sweeps)
          if (!(count > 1 ? scratch->sweep_wide(*this, parts, rounded_of) : scratch->sweep(*this, parts[0], rounded_of(0)))) return;
        for (int part = 0; part < count && call_.num_relaxed_sweeps; ++part) {
          if ((count > 1 || !call_.num_sweeps) && !coupling.load(parts[part], progress_)) return;
          if (parts[part].count) scratch->relax(*this, parts[part], coupling);
        }
      };
    });
  }

  // One model, as its route reads it.
  struct Model {
    Model(const GraphCall& call, const std::vector<float>& beta, GraphRoute route) : coupling(call, call.num_sweeps > 0) {
      if (route == GraphRoute::kTables) tables.emplace(call, beta);
      if (route == GraphRoute::kUnits) units.emplace(call);
      if (route == GraphRoute::kCoarseUnits) layout.emplace(call.graph);
    }
    bool load(ForwardRun& run, int64_t model, const Runtime& runtime) {
      if (!coupling.load(model, run.progress_)) return false;
      if (run.call_.num_sweeps) run.worst_.note({coupling.scale(), 0});
      if (units) units->load(coupling);
      return !tables || tables->load(model, coupling, runtime, run.worst_, run.progress_);
    }
    SharedCoupling<T> coupling;
    std::optional<TablesData> tables;
    std::optional<UnitsData> units;
    std::optional<UnitsLayout> layout;
  };

  // What a thread needs. Runners remember what they rounded of its model.
  struct Worker {
    std::optional<Model> model;  // if it takes whole models, which are not kept
    Runners runners;
  };

  // If there are enough models, each thread takes whole models; else threads share the chains of a model.
  void run_by_model() {
    const int64_t models = call_.batch.num_models(), chains = call_.batch.chains_per_model();
    const int64_t threads = models >= runtime_.num_threads ? 1 : runtime_.num_threads;
    const GraphRoute route = route_of(call_, (chains + threads - 1) / threads);
    // A model's tasks: binary sweeps by tables or units or of 64 chains, then those of groups of 16 chains.
    const int64_t groups = num_groups(call_.batch),
                  wide = route == GraphRoute::kCoarse ? num_wide_groups(call_, groups, threads) : 0;
    const int64_t table_groups = (chains + kTableGroup - 1) / kTableGroup, parts = std::min(threads, table_groups);
    const int64_t steps = std::max((chains + kUnitsChains - 1) / kUnitsChains, std::min(threads, chains));  // of chains in step
    const int64_t own_tasks = route == GraphRoute::kTables        ? parts
                              : route == GraphRoute::kUnits       ? chains
                              : route == GraphRoute::kCoarseUnits ? steps
                                                                  : wide;
    const bool by_groups = call_.num_sweeps && (route == GraphRoute::kSums || route == GraphRoute::kCoarse);
    const int64_t first_group = by_groups ? std::min(kCoarseParts * wide, groups) : groups;
    const int64_t group_tasks = call_.num_relaxed_sweeps ? groups : groups - first_group;
    const auto run_own = [=, this](Runners& runners, int64_t model, const Model& data, int64_t task) {
      if (data.tables) {
        if (!runners.tables) runners.tables.emplace(call_, beta_, (table_groups + parts - 1) / parts, progress_);
        runners.tables->run(model, {task * table_groups / parts, (task + 1) * table_groups / parts}, *data.tables);
      } else if (data.layout) {
        if (!runners.coarse_units) runners.coarse_units.emplace(call_, beta_, *data.layout, worst_, progress_);
        const Interval interval = {task * chains / steps, (task + 1) * chains / steps};
        runners.coarse_units->run(model, interval, data.coupling, [&](Interval some) {
          Group group;
          for (int64_t chain = some.begin; chain < some.end; ++chain) group.add(call_.batch, model, chain);
          runners.sweep(*this, group, data.coupling);
        });
      } else if (wide) {
        Group group[kCoarseParts];
        for (int part = 0; part < kCoarseParts; ++part)
          group[part] = group_of_model(call_.batch, model, task * kCoarseParts + part);
        runners.sweep_wide(*this, group, [&](int) -> const SharedCoupling<T>& { return data.coupling; });
      } else {
        if (!runners.units) runners.units.emplace(call_, beta_, data.units->num_positions(), worst_, progress_);
        runners.units->template run<T>(model, task, *data.units);
      }
    };
    const auto run_group = [=, this](Runners& runners, int64_t model, const Model& data, int64_t task) {
      const int64_t number = call_.num_relaxed_sweeps ? task : first_group + task;
      const Group group = group_of_model(call_.batch, model, number);
      if (number >= first_group && !runners.sweep(*this, group, data.coupling)) return;
      if (call_.num_relaxed_sweeps) runners.relax(*this, group, data.coupling);
    };
    const auto take_worker = [this] { return workers_.take([] { return std::make_unique<Worker>(); }); };
    const Runtime serial = {1, nullptr, nullptr};
    if (threads == 1) {
      for_each_task(runtime_, models, progress_, [&] {
        return [&, worker = take_worker()](int64_t model) {
          std::optional<Model>& kept = kept_models_.empty() ? worker->model : kept_models_[size_t(model)];
          const bool is_new = !kept;
          if (is_new) kept.emplace(call_, beta_, route);
          Model& data = *kept;
          if ((is_new || kept_models_.empty()) && !data.load(*this, model, serial)) return;
          for (int64_t t = 0; t < own_tasks && !progress_.stop(); ++t) run_own(worker->runners, model, data, t);
          for (int64_t t = 0; t < group_tasks && !progress_.stop(); ++t) run_group(worker->runners, model, data, t);
        };
      });
    } else {
      Model* data = nullptr;
      const auto share = [&](int64_t tasks, const auto& run, int64_t model) {
        if (tasks)
          for_each_task(runtime_, tasks, progress_,
                        [&] { return [&, model, worker = take_worker()](int64_t t) { run(worker->runners, model, *data, t); }; });
      };
      for (int64_t model = 0; model < models && !progress_.stop(); ++model) {
        std::optional<Model>& kept = kept_models_.empty() ? shared_model_ : kept_models_[size_t(model)];
        const bool is_new = !kept;
        if (is_new) kept.emplace(call_, beta_, route);
        data = &*kept;
        if ((is_new || kept_models_.empty()) && !data->load(*this, model, runtime_)) return;
        share(own_tasks, run_own, model);
        share(group_tasks, run_group, model);
      }
    }
  }

  // Runs 64 chains of a coupling, whose models go together, in each task.
  template <class Runner>
  void run_couplings(Kept<Runner>& kept) {
    const int64_t models = call_.batch.models_per_coupling(),
                  tasks = divide_up(models * call_.batch.chains_per_model(), kChainsOfWord);
    for_each_task(runtime_, call_.batch.num_models() / models * tasks, progress_, [&] {
      return [=, this, runner = kept.take([&] { return std::make_unique<Runner>(call_, progress_); })](int64_t task) {
        runner->run(task / tasks * models, task % tasks);
      };
    });
  }

  const GraphCall& call_;
  const Runtime& runtime_;
  Progress progress_;
  WorstRounding worst_;
  const std::vector<float> beta_;
  Kept<Worker> workers_;
  Kept<EnergyRunner<T>> energies_;
  Kept<ClusterRunner<T>> clusters_;
  std::optional<Model> shared_model_;              // if threads share its chains, and it is not kept
  std::vector<std::optional<Model>> kept_models_;  // of calls of several rounds
};

template <class T>
Outcome run_forward(const GraphCall& call, const Runtime& runtime, Rounding* rounding, const AfterRound& after) {
  *rounding = {};
  if (call.batch.num_models() * call.batch.chains_per_model() == 0) return Outcome::kOk;
  return ForwardRun<T>(call, runtime).run(rounding, after);
}

template <class T>
Outcome run_resolution(const GraphView& graph, const Batch& batch, const Operand& coupling, double* out) {
  std::vector<T> row(static_cast<size_t>(graph.num_edges));
  for (int64_t model = 0; model < batch.num_models(); ++model) {
    const T* from = row_of<T>(batch, coupling, model, 0);
    for (int64_t e = 0; e < graph.num_edges; ++e) row[size_t(e)] = from[e * coupling.stride];
    int k = 0;
    const CouplingStatus status = kernels().of<T>().round_graph_couplings(graph, row.data(), 1, &k, nullptr);
    if (status != CouplingStatus::kOk) return fault_of(status);
    out[model] = std::ldexp(1.0, -k);
  }
  return Outcome::kOk;
}

}  // namespace

GraphRoute graph_route() { return chosen_route.load(std::memory_order_relaxed); }

bool set_graph_route(const char* name) {
  for (size_t i = 0; i < std::size(kGraphRouteNames); ++i)
    if (!std::strcmp(name, kGraphRouteNames[i])) return chosen_route.store(GraphRoute(i), std::memory_order_relaxed), true;
  return false;
}

Outcome run_graph(const GraphCall& call, const Runtime& runtime, Rounding* rounding, const AfterRound& after) {
  return call.is_double ? run_forward<double>(call, runtime, rounding, after) : run_forward<float>(call, runtime, rounding, after);
}

Outcome run_graph_coupling_resolution(const GraphView& graph, const Batch& batch, bool is_double, const Operand& coupling,
                                      double* out) {
  return is_double ? run_resolution<double>(graph, batch, coupling, out) : run_resolution<float>(graph, batch, coupling, out);
}

}  // namespace gibbs
