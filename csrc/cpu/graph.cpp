// SPDX-License-Identifier: Apache-2.0
#include "cpu/graph.h"

#include <atomic>
#include <cstring>
#include <optional>

#include "cpu/graph_relaxed.h"
#include "cpu/graph_sums.h"
#include "cpu/graph_tables.h"
#include "cpu/graph_units.h"

namespace gibbs {

namespace {

std::atomic<GraphRoute> chosen_route{GraphRoute::kAuto};

// The route of a model's binary sweeps, given the number of its chains in each thread.
GraphRoute route_of(const GraphCall& call, const std::vector<float>& beta, int64_t chains) {
  if (!call.num_sweeps || call.metropolis) return GraphRoute::kSums;
  if (use_tables(call, beta, chains)) return GraphRoute::kTables;
  return use_units(call) ? GraphRoute::kUnits : GraphRoute::kSums;
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
        beta_(call.beta.begin(), call.beta.end()) {}

  Outcome run(Rounding* rounding) {
    mixes_models(call_.batch) ? run_mixed() : run_by_model();
    *rounding = worst_.most();
    return progress_.outcome();
  }

 private:
  // Scratch memory and code of one thread, made when a route first needs it.
  struct Runners {
    template <class Coupling>
    void run_group(ForwardRun& run, const Group& group, const Coupling& coupling, bool binary) {
      if (binary) {
        if (!sums) sums.emplace(run.call_, run.beta_, run.worst_, run.progress_);
        if (!sums->run(group, coupling)) return;
      }
      if (!run.call_.num_relaxed_sweeps) return;
      if (!relaxed) relaxed.emplace(run.call_, run.progress_);
      relaxed->run(group, coupling);
    }
    std::optional<SumsRunner<T>> sums;
    std::optional<TablesRunner> tables;
    std::optional<UnitsRunner> units;
    std::optional<GraphRelaxedRunner<T>> relaxed;
  };

  void run_mixed() {
    for_each_task(runtime_, num_mixed_groups(call_.batch), progress_, [&] {
      return [&, runners = std::make_shared<Runners>(),
              coupling = std::make_shared<LaneCoupling<T>>(call_, call_.num_sweeps > 0)](int64_t task) {
        const Group group = mixed_group(call_.batch, task);
        if (!coupling->load(group, progress_)) return;
        for (int l = 0; l < group.count && call_.num_sweeps; ++l) worst_.note({coupling->scale()[l], 0});
        runners->run_group(*this, group, *coupling, call_.num_sweeps > 0);
      };
    });
  }

  // One model, as its route reads it.
  struct Model {
    Model(const GraphCall& call, GraphRoute route) : coupling(call, call.num_sweeps > 0) {
      if (route == GraphRoute::kTables) tables.emplace(call);
      if (route == GraphRoute::kUnits) units.emplace(call);
    }
    bool load(ForwardRun& run, int64_t model) {
      if (!coupling.load(model, run.progress_)) return false;
      if (run.call_.num_sweeps) run.worst_.note({coupling.scale(), 0});
      if (units) units->load(coupling);
      return !tables || tables->load(model, coupling, run.worst_, run.progress_);
    }
    SharedCoupling<T> coupling;
    std::optional<TablesData> tables;
    std::optional<UnitsData> units;
  };

  // If there are enough models, each thread takes whole models; else threads share the chains of a model.
  void run_by_model() {
    const int64_t models = call_.batch.num_models(), chains = call_.batch.chains_per_model();
    const int64_t threads = models >= runtime_.num_threads ? 1 : runtime_.num_threads;
    const GraphRoute route = route_of(call_, beta_, (chains + threads - 1) / threads);
    // A model's tasks: binary sweeps by tables or units, then those of groups of 16 chains.
    const int64_t table_groups = (chains + kTableGroup - 1) / kTableGroup, parts = std::min(threads, table_groups);
    const int64_t own_tasks = route == GraphRoute::kTables ? parts : route == GraphRoute::kUnits ? chains : 0;
    const int64_t group_tasks = route == GraphRoute::kSums || call_.num_relaxed_sweeps ? num_groups(call_.batch) : 0;
    const auto run_own = [=, this](Runners& runners, int64_t model, const Model& data, int64_t task) {
      if (data.tables) {
        if (!runners.tables) runners.tables.emplace(call_, beta_, (table_groups + parts - 1) / parts, progress_);
        runners.tables->run(model, {task * table_groups / parts, (task + 1) * table_groups / parts}, *data.tables);
      } else {
        if (!runners.units) runners.units.emplace(call_, beta_, data.units->num_positions(), worst_, progress_);
        runners.units->template run<T>(model, task, *data.units);
      }
    };
    const auto run_group = [=, this](Runners& runners, int64_t model, const Model& data, int64_t task) {
      const bool binary = call_.num_sweeps && route == GraphRoute::kSums;
      runners.run_group(*this, group_of_model(call_.batch, model, task), data.coupling, binary);
    };
    if (threads == 1) {
      for_each_task(runtime_, models, progress_, [&] {
        return [&, data = std::make_shared<Model>(call_, route), runners = std::make_shared<Runners>()](int64_t model) {
          if (!data->load(*this, model)) return;
          for (int64_t t = 0; t < own_tasks && !progress_.stop(); ++t) run_own(*runners, model, *data, t);
          for (int64_t t = 0; t < group_tasks && !progress_.stop(); ++t) run_group(*runners, model, *data, t);
        };
      });
    } else {
      Model data(call_, route);
      const auto share = [&](int64_t tasks, const auto& run, int64_t model) {
        if (tasks)
          for_each_task(runtime_, tasks, progress_, [&] {
            return [&, model, runners = std::make_shared<Runners>()](int64_t t) { run(*runners, model, data, t); };
          });
      };
      for (int64_t model = 0; model < models && !progress_.stop() && data.load(*this, model); ++model) {
        share(own_tasks, run_own, model);
        share(group_tasks, run_group, model);
      }
    }
  }

  const GraphCall& call_;
  const Runtime& runtime_;
  Progress progress_;
  WorstRounding worst_;
  const std::vector<float> beta_;
};

template <class T>
Outcome run_forward(const GraphCall& call, const Runtime& runtime, Rounding* rounding) {
  *rounding = {};
  if (call.batch.num_models() * call.batch.chains_per_model() == 0) return Outcome::kOk;
  return ForwardRun<T>(call, runtime).run(rounding);
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

Outcome run_graph(const GraphCall& call, const Runtime& runtime, Rounding* rounding) {
  return call.is_double ? run_forward<double>(call, runtime, rounding) : run_forward<float>(call, runtime, rounding);
}

Outcome run_graph_coupling_resolution(const GraphView& graph, const Batch& batch, bool is_double, const Operand& coupling,
                                      double* out) {
  return is_double ? run_resolution<double>(graph, batch, coupling, out) : run_resolution<float>(graph, batch, coupling, out);
}

}  // namespace gibbs
