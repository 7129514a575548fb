// SPDX-License-Identifier: Apache-2.0
// The backward pass of relaxed sweeps of graphs.
#include "cpu/graph_groups.h"

namespace gibbs {

namespace {

template <class T>
class BackwardRunner {
 public:
  BackwardRunner(const GraphBackwardCall& back, Progress& progress)
      : back_(back),
        call_(back.forward),
        progress_(progress),
        rows_(call_.graph.num_nodes),
        edge_rows_(call_.graph.num_edges),
        fields_(lane_size()),
        start_(lane_size()),
        grad_value_(lane_size()),
        grad_mean_(lane_size()),
        grad_bias_(lane_size()),
        value_(lane_size()),
        slope_(lane_size()),
        grad_coupling_(call_.graph.num_edges * kGroup),
        words_(whole_words(call_.graph.num_nodes)) {}

  void clear() { std::memset(static_cast<void*>(grad_coupling_.get()), 0, size_t(call_.graph.num_edges * kGroup) * sizeof(T)); }
  // Adds to the gradient of each lane's couplings. coupling: SharedCoupling or LaneCoupling.
  template <class Coupling>
  void run(const Group& group, const Coupling& coupling) {
    const int64_t n = call_.graph.num_nodes, total = call_.batch.num_models() * call_.batch.chains_per_model();
    const auto load = [&](const void* base, int64_t offset, T* out) {
      const T* rows[kGroup] = {};
      for (int l = 0; l < group.count; ++l) rows[l] = static_cast<const T*>(base) + (offset + group.linear[l]) * n;
      rows_.load(rows, group.count, n, 1, out);
    };
    const auto save = [&](const T* from, void* base) {
      T* rows[kGroup] = {};
      for (int l = 0; l < group.count; ++l) rows[l] = static_cast<T*>(base) + group.linear[l] * n;
      rows_.store(from, group.count, n, rows);
    };
    load(call_.state, 0, start_.get());
    load(back_.grad_relaxed, 0, grad_value_.get());
    load(back_.grad_mean, 0, grad_mean_.get());
    RelaxedBackwardGroup<T> g = {};
    group.number_chains(call_, g.number);
    g.shared_coupling = Coupling::kShared;
    g.coupling = coupling.values();
    g.fields = fields_.get();
    g.start = start_.get();
    g.grad_value = grad_value_.get();
    g.grad_mean = grad_mean_.get();
    g.grad_bias = grad_bias_.get();
    g.grad_coupling = grad_coupling_.get();
    g.value = value_.get();
    g.slope = slope_.get();
    g.words = words_.get();
    const int64_t last = call_.num_relaxed_sweeps - 1;
    load(call_.fields, last * total, fields_.get());
    kernels().of<T>().relaxed_graph_backward_begin(relaxed_sweep<T>(call_, group.model[0], last), g);
    for (int64_t sweep = last; sweep >= 0; --sweep) {
      if (progress_.stop()) return;
      RelaxedGraphSweep<T> before = {};
      if (sweep > 0) {
        before = relaxed_sweep<T>(call_, group.model[0], sweep - 1);
        load(call_.fields, (sweep - 1) * total, fields_.get());
      }
      kernels().of<T>().relaxed_graph_backward(call_.graph, sweep > 0 ? &before : nullptr, g, sweep == last);
    }
    save(grad_value_.get(), back_.grad_state);
    save(grad_bias_.get(), back_.grad_bias);
  }
  // Writes the gradient of couplings that all lanes share, out [num_edges].
  void reduce(T* out) const { kernels().of<T>().sum_lanes(grad_coupling_.get(), call_.graph.num_edges, out); }
  // Writes the gradients of a mixed group's models to grad_coupling [model, num_edges].
  void reduce(const Group& group, T* grad_coupling) {
    const int64_t edges = call_.graph.num_edges;
    const int chains = int(call_.batch.chains_per_model());
    for (int64_t e = 0; chains > 1 && e < edges; ++e) {  // each model's first lane takes the sum
      T* lane = grad_coupling_.get() + e * kGroup;
      for (int l = 0; l < group.count; ++l)
        if (l % chains) lane[l - l % chains] += lane[l];
    }
    T* rows[kGroup];
    std::fill_n(rows, kGroup, edge_rows_.spare());
    for (int l = 0; l < group.count; l += chains) rows[l] = grad_coupling + group.model[l] * edges;
    edge_rows_.store(grad_coupling_.get(), kGroup, edges, rows);
  }

 private:
  int64_t lane_size() const { return call_.graph.num_nodes * kGroup; }

  const GraphBackwardCall& back_;
  const GraphCall& call_;
  Progress& progress_;
  LaneRows<T> rows_, edge_rows_;
  Buffer<T> fields_, start_, grad_value_, grad_mean_, grad_bias_, value_, slope_, grad_coupling_;
  Buffer<uint32_t> words_;
};

template <class T>
Outcome run_backward(const GraphBackwardCall& back, const Runtime& runtime) {
  const GraphCall& call = back.forward;
  const Batch& batch = call.batch;
  const int64_t models = batch.num_models(), chains = batch.chains_per_model(), edges = call.graph.num_edges;
  T* grad_coupling = static_cast<T*>(back.grad_coupling);
  Progress progress(runtime);
  if (models * chains == 0) {
    std::fill_n(grad_coupling, models * edges, T{});
    return Outcome::kOk;
  }
  if (mixes_models(call)) {
    for_each_task(runtime, num_mixed_groups(batch), progress, [&] {
      return [&, runner = std::make_shared<BackwardRunner<T>>(back, progress),
              coupling = std::make_shared<LaneCoupling<T>>(call)](int64_t number) {
        const Group group = mixed_group(batch, number);
        if (!coupling->load(group, progress)) return;
        runner->clear();
        runner->run(group, *coupling);
        runner->reduce(group, grad_coupling);
      };
    });
    return progress.outcome();
  }
  // A model's groups are divided into slices, whose sums are added up in order: the order does not depend on the number of threads.
  const int64_t groups = num_groups(batch), slices = std::min(groups, std::max<int64_t>(1, 16 / models));
  std::vector<T> partial(size_t(slices > 1 ? models * slices * edges : 0));
  for_each_task(runtime, models * slices, progress, [&] {
    return [&, runner = std::make_shared<BackwardRunner<T>>(back, progress),
            coupling = std::make_shared<SharedCoupling<T>>(call, false)](int64_t task) {
      const int64_t model = task / slices, slice = task % slices;
      if (!coupling->load(model, progress)) return;
      runner->clear();
      for (int64_t group = slice * groups / slices; group < (slice + 1) * groups / slices && !progress.stop(); ++group)
        runner->run(group_of_model(batch, model, group), *coupling);
      runner->reduce(slices > 1 ? partial.data() + task * edges : grad_coupling + model * edges);
    };
  });
  if (slices > 1)
    for (int64_t model = 0; model < models; ++model)
      for (int64_t e = 0; e < edges; ++e) {
        T sum = 0;
        for (int64_t slice = 0; slice < slices; ++slice) sum += partial[size_t((model * slices + slice) * edges + e)];
        grad_coupling[model * edges + e] = sum;
      }
  return progress.outcome();
}

}  // namespace

Outcome run_graph_backward(const GraphBackwardCall& back, const Runtime& runtime) {
  return back.forward.is_double ? run_backward<double>(back, runtime) : run_backward<float>(back, runtime);
}

}  // namespace gibbs
