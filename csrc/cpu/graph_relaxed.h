// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/graph_groups.h"

// Relaxed sweeps of graphs in groups of 16 chains.
namespace gibbs {

// Scratch memory and code of one thread.
template <class T>
class GraphRelaxedRunner {
 public:
  GraphRelaxedRunner(const GraphCall& call, Progress& progress)
      : call_(call),
        progress_(progress),
        rows_(call.graph.num_nodes),
        words_(whole_words(call.graph.num_nodes)),
        bias_(lane_size()),
        value_(lane_size()),
        mean_(lane_size()),
        fields_(lane_size()) {}

  // coupling: SharedCoupling or LaneCoupling.
  template <class Coupling>
  void run(const Group& group, const Coupling& coupling) {
    if (progress_.stop()) return;
    const int64_t n = call_.graph.num_nodes, total = call_.batch.num_models() * call_.batch.chains_per_model();
    const T* bias[kGroup] = {};
    for (int l = 0; l < group.count; ++l) bias[l] = row_of<T>(call_.batch, call_.bias, group.model[l], group.chain[l]);
    if (!rows_.load(bias, group.count, n, call_.bias.stride, bias_.get())) return progress_.fail(Outcome::kNonFiniteBias);
    T* rows[kGroup];
    const auto rows_at = [&](void* base, int64_t offset = 0) {
      for (int l = 0; l < group.count; ++l) rows[l] = static_cast<T*>(base) + (offset + group.linear[l]) * n;
      return rows;
    };
    if (call_.num_sweeps) {
      lanes_from_bits(call_.bits, group, n, T{1}, value_.get());
      rows_.store(value_.get(), group.count, n, rows_at(call_.state));
    } else {
      rows_.load(rows_at(call_.state), group.count, n, 1, value_.get());
    }
    RelaxedGroup<T> g = {};
    group.number_chains(call_, g.number);
    g.shared_coupling = Coupling::kShared;
    g.coupling = coupling.values();
    g.bias = bias_.get();
    g.value = value_.get();
    g.mean = mean_.get();
    g.fields = fields_.get();
    g.words = words_.get();
    for (int64_t sweep = 0; sweep < call_.num_relaxed_sweeps; ++sweep) {
      if (progress_.stop()) return;
      kernels().of<T>().relaxed_graph(relaxed_sweep<T>(call_, group.model[0], sweep), g);
      rows_.store(fields_.get(), group.count, n, rows_at(call_.fields, sweep * total));
    }
    rows_.store(value_.get(), group.count, n, rows_at(call_.relaxed));
    rows_.store(mean_.get(), group.count, n, rows_at(call_.mean));
  }

 private:
  int64_t lane_size() const { return call_.graph.num_nodes * kGroup; }

  const GraphCall& call_;
  Progress& progress_;
  LaneRows<T> rows_;
  Buffer<uint32_t> words_;
  Buffer<T> bias_, value_, mean_, fields_;
};

}  // namespace gibbs
