// SPDX-License-Identifier: Apache-2.0
#include "cpu/graph_fields.h"

namespace gibbs {

namespace {

constexpr int64_t kTaskTerms = 1 << 16;  // half-edges to a task, whose work then outweighs the cost of handing it out

template <class T>
Outcome fields(const GraphFieldsCall& call, const Runtime& runtime) {
  const GraphView& g = call.graph;
  const int64_t chains = call.batch.chains_per_model(), total = call.batch.num_models() * chains;
  const int64_t per_task = std::max<int64_t>(1, kTaskTerms / (2 * g.num_edges + g.num_nodes));
  Progress progress(runtime);
  for_each_task(runtime, (total + per_task - 1) / per_task, progress, [&] {
    return [&](int64_t task) {
      for (int64_t at = task * per_task; at < std::min(total, (task + 1) * per_task); ++at) {
        const int64_t model = at / chains, chain = at % chains;
        const T *state = row_of<T>(call.batch, call.state, model, chain), *bias = row_of<T>(call.batch, call.bias, model, chain),
                *coupling = row_of<T>(call.batch, call.coupling, model, 0);
        T* out = static_cast<T*>(call.out) + call.batch.linear(model, chain) * g.num_nodes;
        for (int64_t position = 0; position < g.num_nodes; ++position) {
          const int64_t node = g.order[position];
          T field = bias[node * call.bias.stride];
          for (int32_t h = g.row_offsets[position]; h < g.row_offsets[position + 1]; ++h)
            field += coupling[g.edge_of[h] * call.coupling.stride] * state[g.neighbors[h] * call.state.stride];
          out[node] = field;
        }
      }
    };
  });
  return progress.outcome();
}

template <class T>
Outcome edge_sums(const GraphEdgeSumsCall& call, const Runtime& runtime) {
  const GraphView& g = call.graph;
  const int64_t models = call.batch.num_models(), chains = call.batch.chains_per_model();
  std::fill_n(static_cast<T*>(call.out), models * g.num_edges, T{});
  // If there are few models, threads divide a model's positions. An edge belongs to the end with the lower number.
  const int64_t parts = models >= runtime.num_threads ? 1 : std::min<int64_t>(g.num_nodes, 4 * runtime.num_threads);
  Progress progress(runtime);
  for_each_task(runtime, models * parts, progress, [&] {
    return [&](int64_t task) {
      const int64_t model = task / parts, part = task % parts;
      T* out = static_cast<T*>(call.out) + model * g.num_edges;
      for (int64_t chain = 0; chain < chains && !progress.stop(); ++chain) {
        const T *first = row_of<T>(call.batch, call.first, model, chain),
                *second = row_of<T>(call.batch, call.second, model, chain);
        for (int64_t position = part * g.num_nodes / parts; position < (part + 1) * g.num_nodes / parts; ++position) {
          const int64_t u = g.order[position];
          for (int32_t h = g.row_offsets[position]; h < g.row_offsets[position + 1]; ++h) {
            const int64_t v = g.neighbors[h];
            if (u < v)
              out[g.edge_of[h]] += first[u * call.first.stride] * second[v * call.second.stride] +
                                   first[v * call.first.stride] * second[u * call.second.stride];
          }
        }
      }
    };
  });
  return progress.outcome();
}

}  // namespace

Outcome run_graph_fields(const GraphFieldsCall& call, const Runtime& runtime) {
  return call.is_double ? fields<double>(call, runtime) : fields<float>(call, runtime);
}

Outcome run_graph_edge_sums(const GraphEdgeSumsCall& call, const Runtime& runtime) {
  return call.is_double ? edge_sums<double>(call, runtime) : edge_sums<float>(call, runtime);
}

}  // namespace gibbs
