// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>

#include "cpu/bit_rows.h"
#include "cpu/graph_counter.h"
#include "cpu/graph_groups.h"

// Binary sweeps of graphs by the route "tables": groups of 64 chains.
namespace gibbs {

constexpr int64_t kLargestTable = int64_t{1} << 26;  // bytes

inline int table_degree(const GraphView& g) { return int(std::max<int64_t>(g.max_degree, kMinTableDegree)); }

// Number of runs of equal beta, each of which needs tables of its own, of the model that has most.
inline int64_t num_segments(const GraphCall& call) {
  int64_t most = 1;
  for (size_t begin = 0, row = size_t(call.num_betas); begin < call.beta.size(); begin += row) {
    int64_t count = 1;
    for (size_t i = begin + 1; i < begin + row; ++i) count += float(call.beta[i]) != float(call.beta[i - 1]);
    most = std::max(most, count);
  }
  return most;
}

// Whether tables serve a model's chains, `chains` of them in each thread.
inline bool use_tables(const GraphCall& call, int64_t chains) {
  const GraphView& g = call.graph;
  if (!kernels().sweep_tables || g.max_degree > kMaxTableDegree || call.log_weights) return false;
  if (call.route != GraphRoute::kAuto && call.route != GraphRoute::kTables) return false;
  for (int64_t c = 1; c < call.batch.chains_per_model(); ++c)
    if (call.batch.offset(call.bias.batch_strides, 0, c) != call.batch.offset(call.bias.batch_strides, 0, 0)) return false;
  if (g.num_nodes << table_degree(g) > kLargestTable) return false;
  if (call.route == GraphRoute::kTables) return true;
  // A table of 32 entries costs about as much as drawing 64 chains by it saves (bench/NOTES.md).
  const int64_t groups = (chains + kTableGroup - 1) / kTableGroup;
  return chains >= 32 &&
         double(call.num_sweeps) * double(call.num_rounds) * double(groups) * 32 >= double(num_segments(call) << table_degree(g));
}

// One model, as groups of 64 chains read it.
class TablesData {
 public:
  TablesData(const GraphCall& call, const std::vector<float>& beta)
      : call_(call),
        beta_(beta),
        has_table_(num_segments(call) == 1),
        degree_(table_degree(call.graph)),
        neighbors_(call.graph.num_nodes * degree_),
        coupling_(call.graph.num_nodes * degree_),
        bias_(call.graph.num_nodes),
        table_(has_table_ ? call.graph.num_nodes << degree_ : 0) {
    const GraphView& g = call.graph;
    for (int64_t pos = 0; pos < g.num_nodes; ++pos)
      for (int k = 0; k < degree_; ++k) {
        const int64_t h = g.row_offsets[pos] + k;
        neighbors_.get()[pos * degree_ + k] = h < g.row_offsets[pos + 1] ? g.neighbors[h] : int32_t(g.num_nodes);
      }
  }
  template <class T>
  bool load(int64_t model, const SharedCoupling<T>& coupling, const Runtime& runtime, WorstRounding& worst, Progress& progress) {
    const GraphView& g = call_.graph;
    for (int64_t pos = 0; pos < g.num_nodes; ++pos)
      for (int k = 0; k < degree_; ++k) {
        const int64_t h = g.row_offsets[pos] + k;
        coupling_.get()[pos * degree_ + k] = h < g.row_offsets[pos + 1] ? coupling.rounded()[h] : 0;
      }
    scale_ = coupling.scale();
    const T* row = row_of<T>(call_.batch, call_.bias, model, 0);
    if (!copy_finite(row, g.num_nodes, call_.bias.stride, bias_.get())) return progress.fail(Outcome::kNonFiniteBias), false;
    worst.note_biases(&scale_, 1, g.num_nodes, bias_.get(), bias_.get());
    if (has_table_)  // waking threads costs more than building a small one
      for_each_part(runtime, g.num_nodes, std::max<int64_t>(1, 8192 >> degree_), progress, [&](Interval positions) {
        kernels().build_tables(this->model(), betas_of(call_, beta_, model).at(0), positions.begin, positions.end, table_.get());
      });
    return !progress.stop();
  }
  // The table of all sweeps; null if their betas differ.
  const uint8_t* table() const { return has_table_ ? table_.get() : nullptr; }
  TableModel model() const { return {call_.graph, degree_, neighbors_.get(), coupling_.get(), bias_.get(), scale_, call_.seed}; }

 private:
  const GraphCall& call_;
  const std::vector<float>& beta_;
  bool has_table_;
  int degree_;
  Buffer<int32_t> neighbors_, coupling_;
  Buffer<float> bias_;
  Buffer<uint8_t> table_;
  float scale_ = 0;
};

// Scratch memory and code of one thread, which sweeps up to `most` of one model's groups. All groups make the sweeps at one beta
// before the tables of the next are built.
class TablesRunner {
 public:
  TablesRunner(const GraphCall& call, const std::vector<float>& beta, int64_t most, Progress& progress)
      : call_(call),
        progress_(progress),
        beta_(beta),
        state_(most * (call.graph.num_nodes + 1)),
        clamp_(call.clamp ? most * call.graph.num_nodes : 0),
        bytes_(table_random_bytes(call.graph.num_nodes)),
        state_bytes_((call.graph.num_nodes + 1) * kTableGroup),
        ties_(call.graph.num_nodes + 1),
        table_(num_segments(call) == 1 ? 0 : call.graph.num_nodes << table_degree(call.graph)) {
    if (call.counts) counter_.emplace(call);
  }

  void run(int64_t model, Interval groups, const TablesData& data) {
    const int64_t n = call_.graph.num_nodes;
    const TableModel table_model = data.model();
    std::vector<TableGroup> all;
    for (int64_t group = groups.begin; group < groups.end; ++group) {
      const int64_t at = group - groups.begin;
      TableGroup g = {};
      for (int l = 0; l < kTableGroup; ++l) {
        const int64_t chain = group * kTableGroup + l;
        g.number[l] = chain < call_.batch.chains_per_model() ? chain_number(call_, model, chain) : 0;
      }
      g.state = state_.get() + at * (n + 1);
      words_from_rows(rows<const uint32_t>(call_.bits, model, group), n, g.state);
      if (call_.clamp) {
        uint64_t* clamp = clamp_.get() + at * n;
        words_from_rows(rows(call_.clamp, model, group), n, clamp);
        g.clamp = clamp;
      }
      g.bytes = bytes_.get();
      g.state_bytes = state_bytes_.get();
      g.ties = ties_.get();
      all.push_back(g);
    }
    const BetaRow<float> beta = betas_of(call_, beta_, model);
    if (counter_) counter_->begin(model);
    for (int64_t sweep = 0, end; sweep < call_.num_sweeps; sweep = end) {
      end = beta.count > 1 ? sweep + 1 : call_.num_sweeps;
      while (end < call_.num_sweeps && beta.at(end) == beta.at(sweep)) ++end;
      if (!data.table()) kernels().build_tables(table_model, beta.at(sweep), 0, n, table_.get());
      const uint8_t* table = data.table() ? data.table() : table_.get();
      for (int64_t group = groups.begin; group < groups.end; ++group) {
        const TableGroup& g = all[size_t(group - groups.begin)];
        for (int64_t first = sweep, next; first < end; first = next) {
          const int64_t read = next_read(call_, first);
          next = std::min(end, read);
          kernels().sweep_tables(table_model, table, beta.at(sweep), uint64_t(call_.sweep_offset + first), next - first, g,
                                 progress_.check());
          if (progress_.stop()) return;
          if (counter_ && next == read) counter_->add(g.state, present(group));
        }
      }
    }
    for (int64_t group = groups.begin; group < groups.end; ++group)
      rows_from_words(all[size_t(group - groups.begin)].state, n, rows(call_.bits, model, group));
  }

 private:
  template <class Word>
  BitRows<Word> rows(Word* bits, int64_t model, int64_t group) const {
    BitRows<Word> out;
    for (int p = 0; p < kTableGroup; ++p) {
      const int64_t chain = group * kTableGroup + kernels().chain_of_table_bit(p);
      out.row[p] = chain < call_.batch.chains_per_model()
                       ? bits + call_.batch.linear(model, chain) * state_words(call_.graph.num_nodes)
                       : nullptr;
    }
    return out;
  }
  // Bits of a group's words that stand for chains.
  uint64_t present(int64_t group) const {
    uint64_t out = 0;
    for (int p = 0; p < kTableGroup; ++p)
      out |= uint64_t{group * kTableGroup + kernels().chain_of_table_bit(p) < call_.batch.chains_per_model()} << p;
    return out;
  }

  const GraphCall& call_;
  Progress& progress_;
  const std::vector<float>& beta_;
  Buffer<uint64_t> state_, clamp_;
  Buffer<uint8_t> bytes_, state_bytes_;
  Buffer<Tie> ties_;
  Buffer<uint8_t> table_;
  std::optional<GraphCounter> counter_;
};

}  // namespace gibbs
