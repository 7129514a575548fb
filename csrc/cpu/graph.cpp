// SPDX-License-Identifier: Apache-2.0
#include "cpu/graph.h"

#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#include "core/threshold.h"

namespace gibbs {

namespace {

std::atomic<GraphRoute> chosen_route{GraphRoute::kAuto};

template <class T>
auto round_kernel() {
  if constexpr (sizeof(T) == 4)
    return kernels().round_graph_couplings_float;
  else
    return kernels().round_graph_couplings_double;
}

template <class T>
const T* row_of(const SweepCall& call, const Operand& operand, int64_t model, int64_t chain) {
  return static_cast<const T*>(operand.data) + call.batch.offset(operand.batch_strides, model, chain);
}

Outcome fault_of(CouplingStatus status) {
  return status == CouplingStatus::kNonFinite ? Outcome::kNonFiniteCoupling : Outcome::kTooLargeCoupling;
}

// threshold() is within 178 of a function that rises; so whatever it is at one logit, it is at most 356 less at any larger one.
// Bounds are taken with ten times that to spare.
const LogitBounds& logit_bounds() {
  static const LogitBounds bounds = [] {
    constexpr int64_t kSpare = 4096;
    // The least logit found, by halving an interval, whose threshold is at least `wanted`.
    const auto logit_of = [](int64_t wanted) {
      float low = -kThresholdLimit, high = kThresholdLimit;
      for (int step = 0; step < 60; ++step) {
        const float middle = 0.5f * (low + high);
        (int64_t{threshold(middle)} >= wanted ? high : low) = middle;
      }
      return std::pair(low, high);
    };
    LogitBounds out;
    for (int64_t k = 0; k < 64; ++k) {
      out.zero[k] = k == 0 ? -std::numeric_limits<float>::infinity() : logit_of((k << 26) - kSpare).first;
      out.one[k] = k == 63 ? std::numeric_limits<float>::quiet_NaN() : logit_of(((k + 1) << 26) + kSpare).second;
    }
    return out;
  }();
  return bounds;
}

// ---- which chains lie side by side ---------------------------------------------------------------------------------------------

// Up to 16 chains: of one model, or of several models with all their chains.
struct Lanes {
  int count = 0;
  int64_t model[kChainBlock], chain[kChainBlock], linear[kChainBlock];
  void add(const Batch& batch, int64_t m, int64_t c) {
    model[count] = m, chain[count] = c;
    linear[count++] = batch.linear(m, c);
  }
};

constexpr int64_t kFewChains = 4;  // one after the other they are faster than side by side in a block, most of which would be empty

// Models of few chains share a block, so that lanes are not left empty; those of many have blocks of their own, and couplings that
// need no copy for each lane.
bool mixes_models(const Batch& batch) {
  const int64_t models = batch.num_models(), chains = batch.chains_per_model();
  return models > 1 && chains <= kChainBlock / 2 && models * chains > kFewChains;
}
int64_t models_per_block(const Batch& batch) { return kChainBlock / batch.chains_per_model(); }
int64_t num_mixed_blocks(const Batch& batch) {
  return (batch.num_models() + models_per_block(batch) - 1) / models_per_block(batch);
}
Lanes mixed_lanes(const Batch& batch, int64_t block) {
  Lanes out;
  const int64_t per = models_per_block(batch), end = std::min(batch.num_models(), (block + 1) * per);
  for (int64_t m = block * per; m < end; ++m)
    for (int64_t c = 0; c < batch.chains_per_model(); ++c) out.add(batch, m, c);
  return out;
}
int64_t num_blocks(const Batch& batch) { return (batch.chains_per_model() + kChainBlock - 1) / kChainBlock; }
Lanes lanes_of_model(const Batch& batch, int64_t model, int64_t block) {
  Lanes out;
  const int64_t end = std::min<int64_t>(batch.chains_per_model(), (block + 1) * kChainBlock);
  for (int64_t c = block * kChainBlock; c < end; ++c) out.add(batch, model, c);
  return out;
}

template <class T>
bool same_rows(const T* const* rows, int count) {
  for (int l = 1; l < count; ++l)
    if (rows[l] != rows[0]) return false;
  return true;
}

// Rows of up to `longest` values, one for each chain, as lanes [n, 16], and back.
template <class T>
class LaneRows {
 public:
  explicit LaneRows(int64_t longest) : zeros_(longest), spare_(longest) {}

  // Lanes without a row become 0. False where a value is not finite as T.
  template <class From>
  bool load(const From* const* rows, int count, int64_t n, int64_t stride, T* out) {
    if constexpr (std::is_same_v<From, T>)
      if (stride == 1 && !(count > 1 && same_rows(rows, count))) {
        const T* all[kChainBlock];
        for (int l = 0; l < kChainBlock; ++l) all[l] = l < count ? rows[l] : zeros_.get();
        if constexpr (sizeof(T) == 4)
          return kernels().lanes_from_rows_float(all, n, out);
        else
          return kernels().lanes_from_rows_double(all, n, out);
      }
    bool finite = true;
    if (same_rows(rows, count)) {
      for (int64_t i = 0; i < n; ++i) {
        const T value = T(rows[0][i * stride]);
        finite &= std::isfinite(value);
        std::fill_n(out + i * kChainBlock, kChainBlock, value);
      }
      return finite;
    }
    if (count < kChainBlock) std::memset(static_cast<void*>(out), 0, size_t(n * kChainBlock) * sizeof(T));
    for (int64_t i = 0; i < n; ++i)
      for (int l = 0; l < count; ++l) {
        out[i * kChainBlock + l] = T(rows[l][i * stride]);
        finite &= std::isfinite(out[i * kChainBlock + l]);
      }
    return finite;
  }
  void store(const T* lanes, int count, int64_t n, T* const* rows) {
    T* all[kChainBlock];
    for (int l = 0; l < kChainBlock; ++l) all[l] = l < count ? rows[l] : spare_.get();
    if constexpr (sizeof(T) == 4)
      kernels().rows_from_lanes_float(lanes, n, all);
    else
      kernels().rows_from_lanes_double(lanes, n, all);
  }
  T* spare() const { return spare_.get(); }  // a row that nobody reads

 private:
  Buffer<T> zeros_, spare_;
};

// masks [n, 16], 0 or -1, from rows of bits, and back.
void masks_from_bits(const uint32_t* bits, const Lanes& lanes, int64_t n, int32_t* masks) {
  const int64_t words = state_words(n);
  uint32_t word[kChainBlock] = {};
  for (int64_t w = 0; w < words; ++w) {
    for (int l = 0; l < lanes.count; ++l) word[l] = bits[lanes.linear[l] * words + w];
    const int64_t count = std::min<int64_t>(32, n - 32 * w);
    for (int64_t i = 0; i < count; ++i, masks += kChainBlock)
      for (int l = 0; l < kChainBlock; ++l) masks[l] = -int32_t(word[l] >> i & 1);
  }
}
void bits_from_masks(const int32_t* masks, const Lanes& lanes, int64_t n, uint32_t* bits) {
  const int64_t words = state_words(n);
  for (int64_t w = 0; w < words; ++w) {
    uint32_t word[kChainBlock] = {};
    const int64_t count = std::min<int64_t>(32, n - 32 * w);
    for (int64_t i = 0; i < count; ++i, masks += kChainBlock)
      for (int l = 0; l < kChainBlock; ++l) word[l] |= (uint32_t(masks[l]) & 1) << i;
    for (int l = 0; l < lanes.count; ++l) bits[lanes.linear[l] * words + w] = word[l];
  }
}

// ---- couplings -----------------------------------------------------------------------------------------------------------------

// One model's couplings, as all lanes of its blocks read them. Backward passes need no rounded ones.
template <class T>
class SharedCoupling {
 public:
  SharedCoupling(const GraphCall& call, bool rounded)
      : call_(call),
        row_(call.graph.num_edges),
        rounded_(rounded ? call.graph.num_edges : 0),
        halves_(2 * call.graph.num_edges),
        rounded_halves_(rounded ? 2 * call.graph.num_edges : 0),
        is_rounded_(rounded) {}
  bool load(int64_t model, Progress& progress) {
    if (model == loaded_) return true;
    const GraphView& g = call_.graph;
    const T* row = row_of<T>(call_, call_.coupling, model, 0);
    for (int64_t e = 0; e < g.num_edges; ++e) row_.get()[e] = row[e * call_.coupling.stride];
    for (int64_t h = 0; h < 2 * g.num_edges; ++h) halves_.get()[h] = row_.get()[g.edge_of[h]];
    if (!std::all_of(row_.get(), row_.get() + g.num_edges, [](T x) { return std::isfinite(x); }))
      return progress.fail(Outcome::kNonFiniteCoupling), false;
    if (is_rounded_) {
      const CouplingStatus status = round_kernel<T>()(g, row_.get(), 1, &k_, rounded_.get());
      if (status != CouplingStatus::kOk) return progress.fail(fault_of(status)), false;
      for (int64_t h = 0; h < 2 * g.num_edges; ++h) rounded_halves_.get()[h] = rounded_.get()[g.edge_of[h]];
    }
    loaded_ = model;
    return true;
  }
  const T* halves() const { return halves_.get(); }
  const int32_t* rounded_halves() const { return rounded_halves_.get(); }
  float scale() const { return std::ldexp(1.0f, -k_); }

 private:
  const GraphCall& call_;
  Buffer<T> row_;
  Buffer<int32_t> rounded_;
  Buffer<T> halves_;
  Buffer<int32_t> rounded_halves_;
  bool is_rounded_;
  int64_t loaded_ = -1;
  int k_ = 0;
};

// Each lane's own couplings, [num_edges, 16].
template <class T>
class LaneCoupling {
 public:
  LaneCoupling(const GraphCall& call, bool rounded)
      : call_(call),
        rows_(call.graph.num_edges),
        lanes_(call.graph.num_edges * kChainBlock),
        rounded_(rounded ? call.graph.num_edges * kChainBlock : 0),
        is_rounded_(rounded) {}
  bool load(const Lanes& lanes, Progress& progress) {
    const T* rows[kChainBlock] = {};
    for (int l = 0; l < lanes.count; ++l) rows[l] = row_of<T>(call_, call_.coupling, lanes.model[l], 0);
    if (!rows_.load(rows, lanes.count, call_.graph.num_edges, call_.coupling.stride, lanes_.get()))
      return progress.fail(Outcome::kNonFiniteCoupling), false;
    if (!is_rounded_) return true;
    int k[kChainBlock];
    const CouplingStatus status = round_kernel<T>()(call_.graph, lanes_.get(), kChainBlock, k, rounded_.get());
    if (status != CouplingStatus::kOk) return progress.fail(fault_of(status)), false;
    for (int l = 0; l < kChainBlock; ++l) scale_[l] = std::ldexp(1.0f, -k[l]);
    return true;
  }
  const T* lanes() const { return lanes_.get(); }
  const int32_t* rounded() const { return rounded_.get(); }
  const float* scale() const { return scale_; }

 private:
  const GraphCall& call_;
  LaneRows<T> rows_;
  Buffer<T> lanes_;
  Buffer<int32_t> rounded_;
  bool is_rounded_;
  float scale_[kChainBlock];
};

// ---- blocks of 16 --------------------------------------------------------------------------------------------------------------

template <class T>
RelaxedGraphSweep<T> relaxed_sweep(const GraphCall& call, int64_t sweep) {  // the relaxed sweeps are numbered from 0
  return {call.graph,
          call.seed,
          uint64_t(call.sweep_offset + call.num_sweeps + sweep),
          T(call.beta.size() > 1 ? call.beta[size_t(call.num_sweeps + sweep)] : call.beta[0]),
          call.relaxation,
          T(call.sharpness),
          call.slope_gradient};
}

// Scratch memory and code of one thread.
template <class T>
class BlockRunner {
 public:
  BlockRunner(const GraphCall& call, const std::vector<float>& beta, const std::vector<int32_t>& position, WorstRounding& worst,
              Progress& progress)
      : call_(call),
        worst_(worst),
        progress_(progress),
        beta_(beta),
        position_(position),
        rows_(call.graph.num_nodes),
        float_rows_(call.graph.num_nodes),
        state_(lane_size()),
        clamp_(call.clamp ? lane_size() : 0),
        bias_(binary() * lane_size()),
        base_bias_(call.log_weights ? lane_size() : 0),
        words_(call.num_relaxed_sweeps || call.metropolis ? whole_words(call.graph.num_nodes)
                                                          : random_groups(call.graph.num_nodes) * 4 * kChainBlock),
        open_(binary() * (call.graph.num_nodes + 1)),
        relaxed_bias_(relaxed() * lane_size()),
        value_(relaxed() * lane_size()),
        mean_(relaxed() * lane_size()),
        fields_(relaxed() * lane_size()) {}

  bool run_binary(const Lanes& lanes, const SharedCoupling<T>& coupling) {
    BinaryBlock b = {};
    b.shared_coupling = true;
    b.coupling = coupling.rounded_halves();
    std::fill_n(b.scale, kChainBlock, coupling.scale());
    return run_binary(lanes, b);
  }
  bool run_binary(const Lanes& lanes, const LaneCoupling<T>& coupling) {
    BinaryBlock b = {};
    b.coupling = coupling.rounded();
    std::copy_n(coupling.scale(), kChainBlock, b.scale);
    return run_binary(lanes, b);
  }

  bool run_relaxed(const Lanes& lanes, const SharedCoupling<T>& coupling) { return run_relaxed(lanes, coupling.halves(), true); }
  bool run_relaxed(const Lanes& lanes, const LaneCoupling<T>& coupling) { return run_relaxed(lanes, coupling.lanes(), false); }

 private:
  int64_t lane_size() const { return call_.graph.num_nodes * kChainBlock; }
  int64_t binary() const { return call_.num_sweeps ? 1 : 0; }
  int64_t relaxed() const { return call_.num_relaxed_sweeps ? 1 : 0; }

  void number_chains(const Lanes& lanes, uint64_t* number) const {
    for (int l = 0; l < kChainBlock; ++l) number[l] = l < lanes.count ? chain_number(call_, lanes.model[l], lanes.chain[l]) : 0;
  }

  // Biases in float32, one for each lane, or one for all (where `shared` is not null, and then set).
  bool load_bias(const Operand& bias, const Lanes& lanes, float* out, bool* shared, Outcome fault) {
    const T* rows[kChainBlock] = {};
    for (int l = 0; l < lanes.count; ++l) rows[l] = row_of<T>(call_, bias, lanes.model[l], lanes.chain[l]);
    const int64_t n = call_.graph.num_nodes;
    bool finite = true;
    if (shared && (*shared = same_rows(rows, lanes.count))) {
      for (int64_t i = 0; i < n; ++i) {
        out[i] = float(rows[0][i * bias.stride]);
        finite &= std::isfinite(out[i]);
      }
    } else {
      finite = float_rows_.load(rows, lanes.count, n, bias.stride, out);
    }
    if (!finite) progress_.fail(fault);
    return finite;
  }

  bool run_binary(const Lanes& lanes, BinaryBlock& b) {
    const int64_t n = call_.graph.num_nodes;
    const bool annealed = call_.log_weights != nullptr;
    number_chains(lanes, b.number);
    if (!load_bias(call_.bias, lanes, bias_.get(), b.shared_coupling && !annealed ? &b.shared_bias : nullptr,
                   Outcome::kNonFiniteBias))
      return false;
    if (annealed && !load_bias(call_.base_bias, lanes, base_bias_.get(), nullptr, Outcome::kNonFiniteBaseBias)) return false;
    masks_from_bits(call_.bits, lanes, n, state_.get());
    if (call_.clamp) masks_from_bits(call_.clamp, lanes, n, clamp_.get());
    double log_weight[kChainBlock] = {};
    b.bias = bias_.get();
    b.base_bias = annealed ? base_bias_.get() : nullptr;
    worst_.note_biases(b.scale, b.shared_bias ? 1 : kChainBlock, n, b.bias, annealed ? b.base_bias : b.bias);
    b.state = state_.get();
    b.clamp = call_.clamp ? clamp_.get() : nullptr;
    b.log_weight = annealed ? log_weight : nullptr;
    b.words = words_.get();
    b.open = open_.get();
    const GraphSweeps sweeps = {call_.graph,      call_.num_sweeps,         call_.seed,       uint64_t(call_.sweep_offset),
                                beta_.data(),     beta_.size() > 1 ? 1 : 0, position_.data(), &logit_bounds(),
                                progress_.check()};
    (call_.metropolis ? kernels().metropolis_block : kernels().sweep_block)(sweeps, b);
    if (progress_.stop()) return false;
    bits_from_masks(state_.get(), lanes, n, call_.bits);
    if (annealed)
      for (int l = 0; l < lanes.count; ++l) call_.log_weights[lanes.linear[l]] = log_weight[l];
    return true;
  }

  bool run_relaxed(const Lanes& lanes, const T* coupling, bool shared) {
    if (progress_.stop()) return false;
    const int64_t n = call_.graph.num_nodes, total = call_.batch.num_models() * call_.batch.chains_per_model();
    RelaxedBlock<T> b = {};
    number_chains(lanes, b.number);
    const T* bias[kChainBlock] = {};
    for (int l = 0; l < lanes.count; ++l) bias[l] = row_of<T>(call_, call_.bias, lanes.model[l], lanes.chain[l]);
    if (!rows_.load(bias, lanes.count, n, call_.bias.stride, relaxed_bias_.get()))
      return progress_.fail(Outcome::kNonFiniteBias), false;
    T* rows[kChainBlock];
    const auto rows_of = [&](void* base, int64_t offset = 0) {
      for (int l = 0; l < lanes.count; ++l) rows[l] = static_cast<T*>(base) + (offset + lanes.linear[l]) * n;
      return rows;
    };
    if (call_.num_sweeps) {
      masks_from_bits(call_.bits, lanes, n, state_.get());
      for (int64_t i = 0; i < lane_size(); ++i) value_.get()[i] = T(-state_.get()[i]);
      rows_.store(value_.get(), lanes.count, n, rows_of(call_.state));
    } else {
      rows_.load(rows_of(call_.state), lanes.count, n, 1, value_.get());
    }
    b.shared_coupling = shared;
    b.coupling = coupling;
    b.bias = relaxed_bias_.get();
    b.value = value_.get();
    b.mean = mean_.get();
    b.fields = fields_.get();
    b.words = words_.get();
    for (int64_t sweep = 0; sweep < call_.num_relaxed_sweeps; ++sweep) {
      if (progress_.stop()) return false;
      if constexpr (sizeof(T) == 4)
        kernels().relaxed_block_float(relaxed_sweep<T>(call_, sweep), b);
      else
        kernels().relaxed_block_double(relaxed_sweep<T>(call_, sweep), b);
      rows_.store(fields_.get(), lanes.count, n, rows_of(call_.fields, sweep * total));
    }
    rows_.store(value_.get(), lanes.count, n, rows_of(call_.relaxed));
    rows_.store(mean_.get(), lanes.count, n, rows_of(call_.mean));
    return !progress_.stop();
  }

  const GraphCall& call_;
  WorstRounding& worst_;
  Progress& progress_;
  const std::vector<float>& beta_;
  const std::vector<int32_t>& position_;
  LaneRows<T> rows_;
  LaneRows<float> float_rows_;
  Buffer<int32_t> state_, clamp_;
  Buffer<float> bias_, base_bias_;
  Buffer<uint32_t> words_;
  Buffer<OpenUnit> open_;
  Buffer<T> relaxed_bias_, value_, mean_, fields_;
};

// ---- blocks of 64, by table ----------------------------------------------------------------------------------------------------

// Bit i of word k becomes bit k of word i.
void transpose_bits(uint32_t* word) {
  uint32_t mask = 0xffff;
  for (int j = 16; j; j >>= 1, mask ^= mask << j)
    for (int k = 0; k < 32; k = (k + j + 1) & ~j) {
      const uint32_t swapped = ((word[k] >> j) ^ word[k + j]) & mask;
      word[k] ^= swapped << j;
      word[k + j] ^= swapped;
    }
}

// Rows of bits of up to 64 chains, in the order of a table block's bits, as words [n] of 64 chains, and back.
template <class Word>
struct TableRows {
  Word* row[kTableChains];  // null: no such chain
};
void words_from_rows(const TableRows<const uint32_t>& rows, int64_t n, uint64_t* out) {
  for (int64_t w = 0; w < state_words(n); ++w) {
    uint32_t half[2][32];
    for (int p = 0; p < kTableChains; ++p) half[p / 32][p % 32] = rows.row[p] ? rows.row[p][w] : 0;
    transpose_bits(half[0]), transpose_bits(half[1]);
    const int64_t count = std::min<int64_t>(32, n - 32 * w);
    for (int64_t i = 0; i < count; ++i) out[32 * w + i] = half[0][i] | uint64_t{half[1][i]} << 32;
  }
}
void rows_from_words(const uint64_t* words, int64_t n, const TableRows<uint32_t>& rows) {
  for (int64_t w = 0; w < state_words(n); ++w) {
    uint32_t half[2][32] = {};
    const int64_t count = std::min<int64_t>(32, n - 32 * w);
    for (int64_t i = 0; i < count; ++i) half[0][i] = uint32_t(words[32 * w + i]), half[1][i] = uint32_t(words[32 * w + i] >> 32);
    transpose_bits(half[0]), transpose_bits(half[1]);
    for (int p = 0; p < kTableChains; ++p)
      if (rows.row[p]) rows.row[p][w] = half[p / 32][p % 32];
  }
}

constexpr int64_t kLargestTable = int64_t{1} << 26;  // bytes

int table_degree(const GraphView& g) { return int(std::max<int64_t>(g.max_degree, kMinTableDegree)); }

int64_t num_segments(const std::vector<float>& beta) {  // runs of equal beta
  int64_t count = 1;
  for (size_t i = 1; i < beta.size(); ++i) count += beta[i] != beta[i - 1];
  return count;
}

// Whether 64-chain blocks by table are to be used for a model's chains, `chains` of them in each thread.
bool use_tables(const GraphCall& call, const std::vector<float>& beta, int64_t chains) {
  const GraphView& g = call.graph;
  if (!kernels().sweep_tables || g.max_degree > kMaxTableDegree || call.log_weights || call.route == GraphRoute::kBlocks ||
      call.route == GraphRoute::kChains)
    return false;
  for (int64_t c = 1; c < call.batch.chains_per_model(); ++c)
    if (call.batch.offset(call.bias.batch_strides, 0, c) != call.batch.offset(call.bias.batch_strides, 0, 0)) return false;
  if (g.num_nodes << table_degree(g) > kLargestTable) return false;
  if (call.route == GraphRoute::kTables) return true;
  // A table of 32 entries costs about as much as drawing 64 chains by it saves (bench/NOTES.md).
  const int64_t blocks = (chains + kTableChains - 1) / kTableChains;
  return chains >= 32 && double(call.num_sweeps) * double(blocks) * 32 >= double(num_segments(beta) << table_degree(g));
}

// One model, as its table blocks read it.
class TableData {
 public:
  TableData(const GraphCall& call)
      : call_(call),
        degree_(table_degree(call.graph)),
        neighbors_(call.graph.num_nodes * degree_),
        coupling_(call.graph.num_nodes * degree_),
        bias_(call.graph.num_nodes) {
    const GraphView& g = call.graph;
    for (int64_t pos = 0; pos < g.num_nodes; ++pos)
      for (int k = 0; k < degree_; ++k) {
        const int64_t h = g.row_offsets[pos] + k;
        neighbors_.get()[pos * degree_ + k] = h < g.row_offsets[pos + 1] ? g.neighbors[h] : int32_t(g.num_nodes);
      }
  }
  template <class T>
  bool load(int64_t model, const SharedCoupling<T>& coupling, WorstRounding& worst, Progress& progress) {
    const GraphView& g = call_.graph;
    for (int64_t pos = 0; pos < g.num_nodes; ++pos)
      for (int k = 0; k < degree_; ++k) {
        const int64_t h = g.row_offsets[pos] + k;
        coupling_.get()[pos * degree_ + k] = h < g.row_offsets[pos + 1] ? coupling.rounded_halves()[h] : 0;
      }
    scale_ = coupling.scale();
    const T* row = row_of<T>(call_, call_.bias, model, 0);
    bool finite = true;
    for (int64_t i = 0; i < g.num_nodes; ++i) {
      bias_.get()[i] = float(row[i * call_.bias.stride]);
      finite &= std::isfinite(bias_.get()[i]);
    }
    if (!finite) return progress.fail(Outcome::kNonFiniteBias), false;
    worst.note_biases(&scale_, 1, g.num_nodes, bias_.get(), bias_.get());
    return true;
  }
  TableModel model() const { return {call_.graph, degree_, neighbors_.get(), coupling_.get(), bias_.get(), scale_, call_.seed}; }
  int degree() const { return degree_; }

 private:
  const GraphCall& call_;
  int degree_;
  Buffer<int32_t> neighbors_, coupling_;
  Buffer<float> bias_;
  float scale_ = 0;
};

// Scratch memory and code of one thread, which sweeps `blocks` of one model's blocks. All blocks make the sweeps at one beta before
// the tables of the next are built.
class TableRunner {
 public:
  TableRunner(const GraphCall& call, const std::vector<float>& beta, int64_t blocks, Progress& progress)
      : call_(call),
        progress_(progress),
        beta_(beta),
        state_(blocks * (call.graph.num_nodes + 1)),
        clamp_(call.clamp ? blocks * call.graph.num_nodes : 0),
        bytes_(table_random_bytes(call.graph.num_nodes)),
        state_bytes_((call.graph.num_nodes + 1) * kTableChains),
        ties_(call.graph.num_nodes + 1),
        table_(call.graph.num_nodes << table_degree(call.graph)) {}

  bool run(int64_t model, Interval blocks, const TableData& data) {
    const int64_t n = call_.graph.num_nodes;
    const TableModel table_model = data.model();
    std::vector<TableBlock> all;
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const int64_t at = block - blocks.begin;
      TableBlock b = {};
      for (int l = 0; l < kTableChains; ++l) {
        const int64_t chain = block * kTableChains + l;
        b.number[l] = chain < call_.batch.chains_per_model() ? chain_number(call_, model, chain) : 0;
      }
      b.state = state_.get() + at * (n + 1);
      words_from_rows(rows<const uint32_t>(call_.bits, model, block), n, b.state);
      if (call_.clamp) {
        uint64_t* clamp = clamp_.get() + at * n;
        words_from_rows(rows(call_.clamp, model, block), n, clamp);
        b.clamp = clamp;
      }
      b.bytes = bytes_.get();
      b.state_bytes = state_bytes_.get();
      b.ties = ties_.get();
      all.push_back(b);
    }
    const auto beta_at = [&](int64_t sweep) { return beta_.size() > 1 ? beta_[size_t(sweep)] : beta_[0]; };
    for (int64_t sweep = 0, end; sweep < call_.num_sweeps; sweep = end) {
      end = beta_.size() > 1 ? sweep + 1 : call_.num_sweeps;
      while (end < call_.num_sweeps && beta_at(end) == beta_at(sweep)) ++end;
      kernels().build_tables(table_model, beta_at(sweep), table_.get());
      for (const TableBlock& b : all) {
        kernels().sweep_tables(table_model, table_.get(), beta_at(sweep), uint64_t(call_.sweep_offset + sweep), end - sweep, b,
                               progress_.check());
        if (progress_.stop()) return false;
      }
    }
    for (int64_t block = blocks.begin; block < blocks.end; ++block)
      rows_from_words(all[size_t(block - blocks.begin)].state, n, rows(call_.bits, model, block));
    return true;
  }

 private:
  template <class Word>
  TableRows<Word> rows(Word* bits, int64_t model, int64_t block) const {
    TableRows<Word> out;
    for (int p = 0; p < kTableChains; ++p) {
      const int64_t chain = block * kTableChains + kernels().chain_of_table_bit(p);
      out.row[p] = chain < call_.batch.chains_per_model()
                       ? bits + call_.batch.linear(model, chain) * state_words(call_.graph.num_nodes)
                       : nullptr;
    }
    return out;
  }

  const GraphCall& call_;
  Progress& progress_;
  const std::vector<float>& beta_;
  Buffer<uint64_t> state_, clamp_;
  Buffer<uint8_t> bytes_, state_bytes_;
  Buffer<Tie> ties_;
  Buffer<uint8_t> table_;
};

// ---- single chains -------------------------------------------------------------------------------------------------------------

bool use_chains(const GraphCall& call) {
  const GraphView& g = call.graph;
  if (call.log_weights || call.route == GraphRoute::kBlocks || call.route == GraphRoute::kTables) return false;
  if (call.route == GraphRoute::kAuto && call.batch.chains_per_model() > kFewChains) return false;
  int64_t positions = 0;
  for (int64_t color = 0; color < g.num_colors; ++color)
    positions += round_up(g.color_offsets[color + 1] - g.color_offsets[color], kChainBlock);
  // Small colours and a few units of many neighbours leave most of the rows empty.
  return positions <= 4 * g.num_nodes + 4 * kChainBlock && positions * g.max_degree <= 8 * g.num_edges + 4096 &&
         positions < std::numeric_limits<int32_t>::max();
}

// One model, as its single chains read it.
class ChainData {
 public:
  explicit ChainData(const GraphCall& call)
      : call_(call), color_offsets_(call.graph.num_colors + 1), nodes_(0), neighbors_(0), coupling_(0) {
    const GraphView& g = call.graph;
    int32_t* offsets = color_offsets_.get();
    for (int64_t color = 0; color < g.num_colors; ++color)
      offsets[color + 1] = offsets[color] + int32_t(round_up(g.color_offsets[color + 1] - g.color_offsets[color], kChainBlock));
    const int64_t positions = offsets[g.num_colors], rows = positions * g.max_degree;
    nodes_ = Buffer<int32_t>(positions);
    neighbors_ = Buffer<int32_t>(rows);
    coupling_ = Buffer<int32_t>(rows);
    std::fill_n(nodes_.get(), positions, int32_t(g.num_nodes + 1));
    std::fill_n(neighbors_.get(), rows, int32_t(g.num_nodes));
    each_half_edge([&](int64_t h, int64_t at) { neighbors_.get()[at] = g.neighbors[h]; });
  }
  template <class T>
  void load(const SharedCoupling<T>& coupling) {
    each_half_edge([&](int64_t h, int64_t at) { coupling_.get()[at] = coupling.rounded_halves()[h]; });
    scale_ = coupling.scale();
  }
  int64_t num_positions() const { return color_offsets_.get()[call_.graph.num_colors]; }
  const int32_t* nodes() const { return nodes_.get(); }
  float scale() const { return scale_; }
  ChainModel model(const float* bias) const {
    return {call_.graph, call_.graph.max_degree, color_offsets_.get(), nodes_.get(), neighbors_.get(), coupling_.get(), bias,
            scale_};
  }

 private:
  template <class F>
  void each_half_edge(const F& f) {
    const GraphView& g = call_.graph;
    for (int64_t color = 0; color < g.num_colors; ++color)
      for (int64_t pos = g.color_offsets[color]; pos < g.color_offsets[color + 1]; ++pos) {
        const int64_t at = color_offsets_.get()[color] + pos - g.color_offsets[color];
        nodes_.get()[at] = g.order[pos];
        for (int64_t h = g.row_offsets[pos], k = 0; h < g.row_offsets[pos + 1]; ++h, ++k)
          f(h, (at / kChainBlock * g.max_degree + k) * kChainBlock + at % kChainBlock);
      }
  }

  const GraphCall& call_;
  Buffer<int32_t> color_offsets_, nodes_, neighbors_, coupling_;
  float scale_ = 0;
};

// Scratch memory and code of one thread.
class ChainRunner {
 public:
  ChainRunner(const GraphCall& call, const std::vector<float>& beta, int64_t positions, WorstRounding& worst, Progress& progress)
      : call_(call),
        worst_(worst),
        progress_(progress),
        beta_(beta),
        state_(call.graph.num_nodes + 2),
        clamp_(call.clamp ? call.graph.num_nodes + 2 : 0),
        bias_(positions),
        bytes_(random_bytes_capacity(call.graph.num_nodes) + 16) {}

  template <class T>
  void run(int64_t model, int64_t chain, const ChainData& data) {
    const int64_t n = call_.graph.num_nodes, words = state_words(n), linear = call_.batch.linear(model, chain);
    const T* bias = row_of<T>(call_, call_.bias, model, chain);
    bool finite = true;
    for (int64_t at = 0; at < data.num_positions(); ++at) {
      const int64_t node = data.nodes()[at];
      bias_.get()[at] = node < n ? float(bias[node * call_.bias.stride]) : 0.0f;
      finite &= std::isfinite(bias_.get()[at]);
    }
    if (!finite) return progress_.fail(Outcome::kNonFiniteBias);
    const float scale = data.scale();
    worst_.note_biases(&scale, 1, data.num_positions(), bias_.get(), bias_.get());
    const auto unpack = [&](const uint32_t* bits, int32_t* out) {
      for (int64_t i = 0; i < n; ++i) out[i] = -int32_t(bits[linear * words + i / 32] >> (i % 32) & 1);
    };
    unpack(call_.bits, state_.get());
    if (call_.clamp) unpack(call_.clamp, clamp_.get());
    const SingleChain c = {chain_number(call_, model, chain), state_.get(), call_.clamp ? clamp_.get() : nullptr, bytes_.get()};
    const GraphSweeps sweeps = {call_.graph,      call_.num_sweeps,         call_.seed, uint64_t(call_.sweep_offset),
                                beta_.data(),     beta_.size() > 1 ? 1 : 0, nullptr,    &logit_bounds(),
                                progress_.check()};
    kernels().sweep_chain(sweeps, data.model(bias_.get()), c);
    uint32_t* bits = call_.bits + linear * words;
    std::fill_n(bits, words, 0u);
    for (int64_t i = 0; i < n; ++i) bits[i / 32] |= (uint32_t(state_.get()[i]) & 1) << (i % 32);
  }

 private:
  const GraphCall& call_;
  WorstRounding& worst_;
  Progress& progress_;
  const std::vector<float>& beta_;
  Buffer<int32_t> state_, clamp_;
  Buffer<float> bias_;
  Buffer<uint8_t> bytes_;
};

// How the binary sweeps of a model are made, `chains` of its chains in each thread.
GraphRoute route_of(const GraphCall& call, const std::vector<float>& beta, int64_t chains) {
  if (!call.num_sweeps || call.metropolis) return GraphRoute::kBlocks;
  if (use_tables(call, beta, chains)) return GraphRoute::kTables;
  return use_chains(call) ? GraphRoute::kChains : GraphRoute::kBlocks;
}

// ---- forward -------------------------------------------------------------------------------------------------------------------

template <class T>
Outcome run_forward(const GraphCall& call, const Runtime& runtime, Rounding* rounding) {
  const Batch& batch = call.batch;
  const int64_t models = batch.num_models(), chains = batch.chains_per_model();
  *rounding = {};
  if (models * chains == 0) return Outcome::kOk;
  Progress progress(runtime);
  WorstRounding worst(call, std::max<int64_t>(call.graph.max_degree, 1), call.log_weights);
  const std::vector<float> beta(call.beta.begin(), call.beta.end());
  std::vector<int32_t> position(call.log_weights ? size_t(call.graph.num_nodes) : 0);
  for (size_t pos = 0; pos < position.size(); ++pos) position[size_t(call.graph.order[pos])] = int32_t(pos);

  if (mixes_models(batch)) {
    for_each_task(runtime, num_mixed_blocks(batch), progress, [&] {
      return [&, runner = std::make_shared<BlockRunner<T>>(call, beta, position, worst, progress),
              coupling = std::make_shared<LaneCoupling<T>>(call, call.num_sweeps > 0)](int64_t block) {
        const Lanes lanes = mixed_lanes(batch, block);
        if (!coupling->load(lanes, progress)) return;
        for (int l = 0; l < lanes.count && call.num_sweeps; ++l) worst.note({coupling->scale()[l], 0});
        if (call.num_sweeps && !runner->run_binary(lanes, *coupling)) return;
        if (call.num_relaxed_sweeps) runner->run_relaxed(lanes, *coupling);
      };
    });
    *rounding = worst.most();
    return progress.outcome();
  }

  // Enough models: each thread takes whole models. Few: threads share one model's chains.
  const int64_t threads = models >= runtime.num_threads ? 1 : runtime.num_threads;
  const GraphRoute route = route_of(call, beta, (chains + threads - 1) / threads);
  const int64_t table_blocks = (chains + kTableChains - 1) / kTableChains, groups = std::min(threads, table_blocks);
  // A model's work: binary sweeps by another route than blocks, then what blocks do, binary sweeps included if it is their route.
  const int64_t binary_tasks = route == GraphRoute::kTables ? groups : route == GraphRoute::kChains ? chains : 0;
  const int64_t block_tasks = route == GraphRoute::kBlocks || call.num_relaxed_sweeps ? num_blocks(batch) : 0;
  struct Model {
    Model(const GraphCall& c, GraphRoute route)
        : coupling(c, c.num_sweeps > 0),
          table(route == GraphRoute::kTables ? std::make_unique<TableData>(c) : nullptr),
          chain(route == GraphRoute::kChains ? std::make_unique<ChainData>(c) : nullptr) {}
    bool load(int64_t model, WorstRounding& worst, Progress& p) {
      if (!coupling.load(model, p)) return false;
      if (chain) chain->load(coupling);
      return !table || table->load(model, coupling, worst, p);
    }
    SharedCoupling<T> coupling;
    std::unique_ptr<TableData> table;
    std::unique_ptr<ChainData> chain;
  };
  struct Runners {
    std::unique_ptr<TableRunner> table;
    std::unique_ptr<ChainRunner> chain;
    std::unique_ptr<BlockRunner<T>> block;
  };
  const auto run_binary = [&](Runners& runners, int64_t model, const Model& data, int64_t task) {
    if (data.table) {
      if (!runners.table) runners.table = std::make_unique<TableRunner>(call, beta, (table_blocks + groups - 1) / groups, progress);
      runners.table->run(model, {task * table_blocks / groups, (task + 1) * table_blocks / groups}, *data.table);
    } else {
      if (!runners.chain) runners.chain = std::make_unique<ChainRunner>(call, beta, data.chain->num_positions(), worst, progress);
      runners.chain->template run<T>(model, task, *data.chain);
    }
  };
  const auto run_block = [&](Runners& runners, int64_t model, const Model& data, int64_t task) {
    if (!runners.block) runners.block = std::make_unique<BlockRunner<T>>(call, beta, position, worst, progress);
    const Lanes lanes = lanes_of_model(batch, model, task);
    if (call.num_sweeps && route == GraphRoute::kBlocks && !runners.block->run_binary(lanes, data.coupling)) return;
    if (call.num_relaxed_sweeps) runners.block->run_relaxed(lanes, data.coupling);
  };
  if (threads == 1) {
    for_each_task(runtime, models, progress, [&] {
      return [&, data = std::make_shared<Model>(call, route), runners = std::make_shared<Runners>()](int64_t model) {
        if (!data->load(model, worst, progress)) return;
        if (call.num_sweeps) worst.note({data->coupling.scale(), 0});
        for (int64_t t = 0; t < binary_tasks && !progress.stop(); ++t) run_binary(*runners, model, *data, t);
        for (int64_t t = 0; t < block_tasks && !progress.stop(); ++t) run_block(*runners, model, *data, t);
      };
    });
  } else {
    Model data(call, route);
    const auto share = [&](int64_t tasks, const auto& run, int64_t model) {
      if (tasks)
        for_each_task(runtime, tasks, progress, [&] {
          return [&, model, runners = std::make_shared<Runners>()](int64_t t) { run(*runners, model, data, t); };
        });
    };
    for (int64_t model = 0; model < models && !progress.stop() && data.load(model, worst, progress); ++model) {
      if (call.num_sweeps) worst.note({data.coupling.scale(), 0});
      share(binary_tasks, run_binary, model);
      share(block_tasks, run_block, model);
    }
  }
  *rounding = worst.most();
  return progress.outcome();
}

// ---- backward ------------------------------------------------------------------------------------------------------------------

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
        grad_coupling_(call_.graph.num_edges * kChainBlock),
        words_(whole_words(call_.graph.num_nodes)) {}

  void clear() {
    std::memset(static_cast<void*>(grad_coupling_.get()), 0, size_t(call_.graph.num_edges * kChainBlock) * sizeof(T));
  }
  // Adds to the gradient of each lane's couplings.
  void run(const Lanes& lanes, const T* coupling, bool shared) {
    const int64_t n = call_.graph.num_nodes, total = call_.batch.num_models() * call_.batch.chains_per_model();
    const auto load = [&](const void* base, int64_t offset, T* out) {
      const T* rows[kChainBlock] = {};
      for (int l = 0; l < lanes.count; ++l) rows[l] = static_cast<const T*>(base) + (offset + lanes.linear[l]) * n;
      rows_.load(rows, lanes.count, n, 1, out);
    };
    const auto save = [&](const T* from, void* base) {
      T* rows[kChainBlock] = {};
      for (int l = 0; l < lanes.count; ++l) rows[l] = static_cast<T*>(base) + lanes.linear[l] * n;
      rows_.store(from, lanes.count, n, rows);
    };
    load(call_.state, 0, start_.get());
    load(back_.grad_relaxed, 0, grad_value_.get());
    load(back_.grad_mean, 0, grad_mean_.get());
    RelaxedBackwardBlock<T> b = {};
    for (int l = 0; l < kChainBlock; ++l) b.number[l] = l < lanes.count ? chain_number(call_, lanes.model[l], lanes.chain[l]) : 0;
    b.shared_coupling = shared;
    b.coupling = coupling;
    b.fields = fields_.get();
    b.start = start_.get();
    b.grad_value = grad_value_.get();
    b.grad_mean = grad_mean_.get();
    b.grad_bias = grad_bias_.get();
    b.grad_coupling = grad_coupling_.get();
    b.value = value_.get();
    b.slope = slope_.get();
    b.words = words_.get();
    const int64_t last = call_.num_relaxed_sweeps - 1;
    load(call_.fields, last * total, fields_.get());
    if constexpr (sizeof(T) == 4)
      kernels().relaxed_backward_begin_float(relaxed_sweep<T>(call_, last), b);
    else
      kernels().relaxed_backward_begin_double(relaxed_sweep<T>(call_, last), b);
    for (int64_t sweep = last; sweep >= 0; --sweep) {
      if (progress_.stop()) return;
      RelaxedGraphSweep<T> before = {};
      if (sweep > 0) {
        before = relaxed_sweep<T>(call_, sweep - 1);
        load(call_.fields, (sweep - 1) * total, fields_.get());
      }
      if constexpr (sizeof(T) == 4)
        kernels().relaxed_backward_block_float(call_.graph, sweep > 0 ? &before : nullptr, b, sweep == last);
      else
        kernels().relaxed_backward_block_double(call_.graph, sweep > 0 ? &before : nullptr, b, sweep == last);
    }
    save(grad_value_.get(), back_.grad_state);
    save(grad_bias_.get(), back_.grad_bias);
  }
  // The gradient of couplings that all lanes share, out [num_edges].
  void reduce(T* out) const {
    if constexpr (sizeof(T) == 4)
      kernels().sum_lanes_float(grad_coupling_.get(), call_.graph.num_edges, out);
    else
      kernels().sum_lanes_double(grad_coupling_.get(), call_.graph.num_edges, out);
  }
  // Of the models of mixed lanes, into grad_coupling [model, num_edges].
  void reduce(const Lanes& lanes, T* grad_coupling) {
    const int64_t edges = call_.graph.num_edges;
    const int chains = int(call_.batch.chains_per_model());
    for (int64_t e = 0; chains > 1 && e < edges; ++e) {  // sums to the front of each model's lanes
      T* lane = grad_coupling_.get() + e * kChainBlock;
      for (int l = 0; l < lanes.count; ++l)
        if (l % chains) lane[l - l % chains] += lane[l];
    }
    T* rows[kChainBlock];
    std::fill_n(rows, kChainBlock, edge_rows_.spare());
    for (int l = 0; l < lanes.count; l += chains) rows[l] = grad_coupling + lanes.model[l] * edges;
    edge_rows_.store(grad_coupling_.get(), kChainBlock, edges, rows);
  }

 private:
  int64_t lane_size() const { return call_.graph.num_nodes * kChainBlock; }

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
  if (mixes_models(batch)) {
    for_each_task(runtime, num_mixed_blocks(batch), progress, [&] {
      return [&, runner = std::make_shared<BackwardRunner<T>>(back, progress),
              coupling = std::make_shared<LaneCoupling<T>>(call, false)](int64_t block) {
        const Lanes lanes = mixed_lanes(batch, block);
        if (!coupling->load(lanes, progress)) return;
        runner->clear();
        runner->run(lanes, coupling->lanes(), false);
        runner->reduce(lanes, grad_coupling);
      };
    });
    return progress.outcome();
  }
  // A model's blocks are dealt out to slices, whose sums are added up in order: whatever the number of threads, one order of summation.
  const int64_t blocks = num_blocks(batch), slices = std::min(blocks, std::max<int64_t>(1, 16 / models));
  std::vector<T> partial(size_t(slices > 1 ? models * slices * edges : 0));
  for_each_task(runtime, models * slices, progress, [&] {
    return [&, runner = std::make_shared<BackwardRunner<T>>(back, progress),
            coupling = std::make_shared<SharedCoupling<T>>(call, false)](int64_t task) {
      const int64_t model = task / slices, slice = task % slices;
      if (!coupling->load(model, progress)) return;
      runner->clear();
      for (int64_t block = slice * blocks / slices; block < (slice + 1) * blocks / slices && !progress.stop(); ++block)
        runner->run(lanes_of_model(batch, model, block), coupling->halves(), true);
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

template <class T>
Outcome run_resolution(const GraphView& graph, const Batch& batch, const Operand& coupling, double* out) {
  std::vector<T> row(static_cast<size_t>(graph.num_edges));
  for (int64_t model = 0; model < batch.num_models(); ++model) {
    const T* from = static_cast<const T*>(coupling.data) + batch.offset(coupling.batch_strides, model, 0);
    for (int64_t e = 0; e < graph.num_edges; ++e) row[size_t(e)] = from[e * coupling.stride];
    int k = 0;
    const CouplingStatus status = round_kernel<T>()(graph, row.data(), 1, &k, nullptr);
    if (status != CouplingStatus::kOk) return fault_of(status);
    out[model] = std::ldexp(1.0, -k);
  }
  return Outcome::kOk;
}

}  // namespace

GraphRoute graph_route() { return chosen_route.load(std::memory_order_relaxed); }

bool set_graph_route(const char* name) {
  const char* names[] = {"auto", "blocks", "tables", "chains"};
  for (int i = 0; i < 4; ++i)
    if (!std::strcmp(name, names[i])) return chosen_route.store(GraphRoute(i), std::memory_order_relaxed), true;
  return false;
}

Outcome run_graph(const GraphCall& call, const Runtime& runtime, Rounding* rounding) {
  return call.is_double ? run_forward<double>(call, runtime, rounding) : run_forward<float>(call, runtime, rounding);
}

Outcome run_graph_backward(const GraphBackwardCall& back, const Runtime& runtime) {
  return back.forward.is_double ? run_backward<double>(back, runtime) : run_backward<float>(back, runtime);
}

Outcome run_graph_coupling_resolution(const GraphView& graph, const Batch& batch, bool is_double, const Operand& coupling,
                                      double* out) {
  return is_double ? run_resolution<double>(graph, batch, coupling, out) : run_resolution<float>(graph, batch, coupling, out);
}

}  // namespace gibbs
