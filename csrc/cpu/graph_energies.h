// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/bit_rows.h"
#include "cpu/graph_groups.h"

// Energies of binary states of graphs: groups of 64 chains, or a few one after the other.
namespace gibbs {

// Scratch memory and code of one thread.
template <class T>
class EnergyRunner {
 public:
  EnergyRunner(const GraphCall& call, Progress& progress)
      : call_(call),
        progress_(progress),
        coupling_(call, true),
        bias_(call),
        words_(call.graph.num_nodes),
        is_one_(call.graph.num_nodes) {
    const GraphView& g = call.graph;
    std::vector<int32_t> position(static_cast<size_t>(g.num_nodes));
    copy_positions(g, position.data());
    earlier_offsets_.push_back(0);
    for (int64_t at = 0; at < g.num_nodes; ++at) {
      for (int32_t h = g.row_offsets[at]; h < g.row_offsets[at + 1]; ++h)
        if (position[size_t(g.neighbors[h])] < at) earlier_.push_back({g.neighbors[h], h});
      earlier_offsets_.push_back(int32_t(earlier_.size()));
    }
  }

  // first_model: of the coupling.
  void run(int64_t first_model, int64_t number) {
    const int64_t n = call_.graph.num_nodes, chains = call_.batch.chains_per_model();
    if (!coupling_.load(first_model, progress_)) return;
    const int64_t end = std::min((number + 1) * kEnergyGroup, call_.batch.models_per_coupling() * chains);
    if (end - number * kEnergyGroup <= kFewEnergies) {
      for (int64_t at = number * kEnergyGroup; at < end; ++at) run_one(first_model + at / chains, at % chains);
      return;
    }
    Group parts[kParts];
    for (int64_t at = number * kEnergyGroup; at < end; ++at)
      parts[at % kEnergyGroup / kGroup].add(call_.batch, first_model + at / chains, at % chains);
    if (!bias_.load(parts, true)) return progress_.fail(Outcome::kNonFiniteBias);
    BitRows<const uint32_t> rows = {};
    EnergyGroup group = {};
    group.shared_bias = bias_.is_shared();
    for (int part = 0; part < kParts; ++part) {
      group.bias[part] = bias_.values(part);
      for (int l = 0; l < parts[part].count; ++l) rows.row[part * kGroup + l] = call_.bits + parts[part].linear[l] * state_words(n);
    }
    words_from_rows(rows, n, words_.get());
    group.state = words_.get();
    group.earlier = earlier_.data(), group.earlier_offsets = earlier_offsets_.data();
    group.coupling = coupling_.rounded(), group.scale = coupling_.scale();
    double energies[kEnergyGroup];
    kernels().graph_energies(call_.graph, group, energies);
    for (int part = 0; part < kParts; ++part)
      for (int l = 0; l < parts[part].count; ++l) call_.energies[parts[part].linear[l]] = energies[part * kGroup + l];
  }

 private:
  static constexpr int kParts = kEnergyGroup / kGroup;
  static constexpr int64_t kFewEnergies = 8;  // faster one after the other

  void run_one(int64_t model, int64_t chain) {
    const GraphView& g = call_.graph;
    const int64_t linear = call_.batch.linear(model, chain);
    const uint32_t* bits = call_.bits + linear * state_words(g.num_nodes);
    const T* bias = row_of<T>(call_.batch, call_.bias, model, chain);
    for (int64_t node = 0; node < g.num_nodes; ++node) is_one_.get()[node] = -int32_t(bits[node / 32] >> (node % 32) & 1);
    double sum = 0;
    bool finite = true;
    for (int64_t position = 0; position < g.num_nodes; ++position) {
      const int64_t node = g.order[position];
      finite &= std::isfinite(float(bias[node * call_.bias.stride]));
      if (!is_one_.get()[node]) continue;
      int32_t acc = 0;
      for (int32_t at = earlier_offsets_[size_t(position)]; at < earlier_offsets_[size_t(position) + 1]; ++at)
        acc += is_one_.get()[earlier_[size_t(at)].node] & coupling_.rounded()[earlier_[size_t(at)].half_edge];
      sum += double(acc) * double(coupling_.scale()) + double(float(bias[node * call_.bias.stride]));
    }
    if (!finite) return progress_.fail(Outcome::kNonFiniteBias);
    call_.energies[linear] = -sum;
  }

  const GraphCall& call_;
  Progress& progress_;
  SharedCoupling<T> coupling_;
  BiasOfParts<T, kParts> bias_;
  std::vector<EarlierNeighbor> earlier_;
  std::vector<int32_t> earlier_offsets_;
  Buffer<uint64_t> words_;
  Buffer<int32_t> is_one_;  // 0 or -1
};

}  // namespace gibbs
