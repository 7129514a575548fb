// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. Binary sweeps of a group of chains that share a bipartite model.

// Asks after so many updates of units whether to stop.
class StopClock {
 public:
  explicit StopClock(const StopCheck& check) : check_(check) {}
  bool stops(int64_t updates) {
    if ((updates_ += updates) <= 1 << 18) return false;
    updates_ = 0;
    return check_.stop(check_.context);
  }

 private:
  const StopCheck& check_;
  int64_t updates_ = 0;
};

// Constants of one half-sweep of one chain.
struct HalfSweep {
  int64_t n, first_unit;
  float beta, scale;
  RandomStream random;
};

template <bool kAnnealed>
inline VecF logit_vector(const int32_t* acc, const float* bias, const float* base_bias, float beta, float scale) {
  const VecF logit = binary_logits(load<VecI>(acc), splat(scale), load<VecF>(bias), beta);
  if constexpr (kAnnealed) return logit + (1.0f - beta) * load<VecF>(base_bias);
  return logit;
}

// New bits of units i .. i + 32 kWordsAtOnce - 1 of one side of a chain, of which only those in the first kVectors vectors exist.
// bytes: high random bytes of the side. The chain of operations from a sum to its bit is so long that a processor needs several
// vectors at a time to be busy.
constexpr int kWordVectors = 32 / kLanes, kWordsAtOnce = GIBBS_VECTOR_BYTES == 64 ? 4 : 1;
template <bool kAnnealed, int kVectors>
inline void sample_words_of(const HalfSweep& h, int64_t i, const int32_t* acc, const float* bias, const float* base_bias,
                            const uint8_t* bytes, const uint32_t* clamp, const uint32_t* bits, uint32_t* out) {
  constexpr int kWords = (kVectors + kWordVectors - 1) / kWordVectors;
  VecF logits[kVectors];
  union {
    VecU used[kVectors];
    VecU all[kWords * kWordVectors];
  } thresholds;
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = i + v * kLanes;
    logits[v] = logit_vector<kAnnealed>(acc + at, bias + at, kAnnealed ? base_bias + at : nullptr, h.beta, h.scale);
  }
  threshold_vectors(logits, thresholds.used);
  for (int v = kVectors; v < kWords * kWordVectors; ++v) thresholds.all[v] = VecU{};
  for (int w = 0; w < kWords; ++w, i += 32) {
    uint32_t less, equal;
    compare_high_bytes(thresholds.all + w * kWordVectors, bytes + i, less, equal);
    const uint32_t valid = h.n - i >= 32 ? 0xffffffffu : (1u << (h.n - i)) - 1;
    for (equal &= valid; equal; equal &= equal - 1) {  // one unit in 256 needs its low bits
      const int l = __builtin_ctz(equal);
      uint32_t low_threshold;
      __builtin_memcpy(&low_threshold, (const char*)(thresholds.all + w * kWordVectors) + 4 * l, 4);
      less |= uint32_t(random_low_bits(h.random, uint32_t(h.first_unit + i + l)) < (low_threshold & 0xffffff)) << l;
    }
    less &= valid;
    out[w] = clamp ? (less & ~clamp[i / 32]) | (bits[i / 32] & clamp[i / 32]) : less;
  }
}
template <bool kAnnealed, int kVectors, class... Arguments>
inline void sample_words(int64_t vectors, const HalfSweep& h, int64_t i, Arguments... arguments) {
  if constexpr (kVectors > 1)
    if (vectors < kVectors) return sample_words<kAnnealed, kVectors - 1>(vectors, h, i, arguments...);
  sample_words_of<kAnnealed, kVectors>(h, i, arguments...);
}

// The elements of a row as sums of type A take them.
template <class A, class E>
inline Vec<A> addends(const E* p) {
  if constexpr (sizeof(A) == sizeof(E))
    return load<Vec<A>>(p);
  else
    return widen(p);
}

// acc += rows of `raised` - rows of `lowered`, a strip of kStrip vectors of columns at a time in registers.
constexpr int kMaxStrip = GIBBS_VECTOR_BYTES == 64 ? 28 : 14;
template <int kStrip, class E, class A>
inline void add_rows_strip(const E* rows, int64_t ld, const int32_t* raised, int64_t num_raised, const int32_t* lowered,
                           int64_t num_lowered, A* acc) {
  Vec<A> sum[kStrip];
#pragma GCC unroll 28
  for (int v = 0; v < kStrip; ++v) sum[v] = load<Vec<A>>(acc + v * lanes_of<A>);
  for (int64_t t = 0; t < num_raised; ++t) {
    const E* row = rows + raised[t] * ld;
#pragma GCC unroll 28
    for (int v = 0; v < kStrip; ++v) sum[v] += addends<A>(row + v * lanes_of<A>);
  }
  for (int64_t t = 0; t < num_lowered; ++t) {
    const E* row = rows + lowered[t] * ld;
#pragma GCC unroll 28
    for (int v = 0; v < kStrip; ++v) sum[v] -= addends<A>(row + v * lanes_of<A>);
  }
#pragma GCC unroll 28
  for (int v = 0; v < kStrip; ++v) store(acc + v * lanes_of<A>, sum[v]);
}
template <int kStrip, class E, class A>
inline void add_rows_of(int strip, const E* rows, int64_t ld, const int32_t* raised, int64_t num_raised, const int32_t* lowered,
                        int64_t num_lowered, A* acc) {
  if constexpr (kStrip > 0) {
    if (strip == kStrip)
      add_rows_strip<kStrip>(rows, ld, raised, num_raised, lowered, num_lowered, acc);
    else
      add_rows_of<kStrip - 1>(strip, rows, ld, raised, num_raised, lowered, num_lowered, acc);
  }
}
template <class E, class A>
inline void add_rows(const E* rows, int64_t ld, const int32_t* raised, int64_t num_raised, const int32_t* lowered,
                     int64_t num_lowered, A* acc) {
  int64_t vectors = ld / lanes_of<A>;
  for (int64_t strips = (vectors + kMaxStrip - 1) / kMaxStrip, at = 0; strips > 0; --strips) {  // of nearly equal width
    const int64_t strip = (vectors + strips - 1) / strips;
    add_rows_of<kMaxStrip>(int(strip), rows + at, ld, raised, num_raised, lowered, num_lowered, acc + at);
    vectors -= strip;
    at += strip * lanes_of<A>;
  }
}

// Sums of all active rows by table: the 16 subset sums of each 4 rows are built once and looked up by every chain of the group
// ("four Russians"). It handles a strip of kVectors vectors of columns; kTablesAtOnce tables stay in the first-level cache.
template <int kVectors, class E>
inline void table_sums_strip(const E* rows, int64_t ld, int64_t num_rows, const uint32_t* const* bits, int64_t count, E* acc,
                             int64_t acc_stride, E* table) {
  constexpr int kLanesOf = lanes_of<E>, kWidth = kVectors * kLanesOf, kEntries = 1 << kTableRows;
  for (int64_t first = 0; first < num_rows; first += kTablesAtOnce * kTableRows) {
    for (int g = 0; g < kTablesAtOnce; ++g) {
      E* entries = table + g * kEntries * kWidth;
      for (int v = 0; v < kVectors; ++v) store(entries + v * kLanesOf, Vec<E>{});
      for (int m = 1; m < kEntries; ++m) {
        const int64_t base = first + g * kTableRows, row = base + __builtin_ctz(m);
        if (base + 31 - __builtin_clz(m) >= num_rows) break;  // bits beyond the last unit are 0: no chain looks these up
        for (int v = 0; v < kVectors; ++v)
          store(entries + m * kWidth + v * kLanesOf,
                load<Vec<E>>(entries + (m & (m - 1)) * kWidth + v * kLanesOf) + load<Vec<E>>(rows + row * ld + v * kLanesOf));
      }
    }
    for (int64_t c = 0; c < count; ++c) {
      const uint32_t active = bits[c][first / 32] >> (first % 32);
      const E* entry[kTablesAtOnce];
      for (int g = 0; g < kTablesAtOnce; ++g)
        entry[g] = table + (g * kEntries + (active >> (g * kTableRows) & (kEntries - 1))) * kWidth;
      E* sum = acc + c * acc_stride;
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        Vec<E> x = (load<Vec<E>>(entry[0] + v * kLanesOf) + load<Vec<E>>(entry[1] + v * kLanesOf)) +
                   (load<Vec<E>>(entry[2] + v * kLanesOf) + load<Vec<E>>(entry[3] + v * kLanesOf));
        if (first) x += load<Vec<E>>(sum + v * kLanesOf);
        store(sum + v * kLanesOf, x);
      }
    }
  }
}
template <class E>
inline void table_sums(const E* rows, int64_t ld, int64_t num_rows, const uint32_t* const* bits, int64_t count, E* acc,
                       int64_t acc_stride, E* table) {
  // A quarter of a table's width, and the vectors in it. A row's length is a multiple of that.
  constexpr int kQuarter = kTableBytes / 4 / int(sizeof(E)), kStep = kQuarter / lanes_of<E>;
  int64_t quarters = ld / kQuarter;
  for (int64_t strips = (quarters + 3) / 4, at = 0; strips > 0; --strips) {
    const int64_t strip = (quarters + strips - 1) / strips;
    if (strip == 4) table_sums_strip<4 * kStep>(rows + at, ld, num_rows, bits, count, acc + at, acc_stride, table);
    if (strip == 3) table_sums_strip<3 * kStep>(rows + at, ld, num_rows, bits, count, acc + at, acc_stride, table);
    if (strip == 2) table_sums_strip<2 * kStep>(rows + at, ld, num_rows, bits, count, acc + at, acc_stride, table);
    if (strip == 1) table_sums_strip<1 * kStep>(rows + at, ld, num_rows, bits, count, acc + at, acc_stride, table);
    quarters -= strip;
    at += strip * kQuarter;
  }
}

// log f_{beta'}(left) - log f_beta(left) less its part linear in left (gibbs_ext/functional.py, bipartite_ais):
//   sum_j softplus(x'_j) - softplus(x_j),   softplus(x) = max(x, 0) + log(1 + exp(-|x|)).
// The logs of up to 32 vectors of units are taken as one log of the product of their ratios, each within [1/2, 2].
inline double softplus_difference(int64_t n, const int32_t* acc, const float* bias, const float* base_bias, float scale, float beta,
                                  float next_beta) {
  constexpr int64_t kChunk = 32 * kLanes;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = begin + kChunk < n ? begin + kChunk : n;
    VecF linear = {}, above = splat(1.0f), below = splat(1.0f);
    for (int64_t i = begin; i < end; i += kLanes) {
      VecF x = logit_vector<true>(acc + i, bias + i, base_bias + i, beta, scale);
      VecF y = logit_vector<true>(acc + i, bias + i, base_bias + i, next_beta, scale);
      if (i + kLanes > n)
        for (int l = 0; l < kLanes; ++l)
          if (i + l >= n) x[l] = y[l] = 0;
      linear += (y > 0.0f ? y : splat(0.0f)) - (x > 0.0f ? x : splat(0.0f));
      above *= 1.0f + exp_of_negative(clipped_magnitude(y));
      below *= 1.0f + exp_of_negative(clipped_magnitude(x));
    }
    double ratio = 1;
    for (int l = 0; l < kLanes; ++l) {
      ratio *= double(above[l]) / double(below[l]);
      total += double(linear[l]);
    }
    total += __builtin_log(ratio);
  }
  return total;
}
inline double linear_difference(int64_t n, const uint32_t* bits, const float* bias, const float* base_bias, float beta,
                                float next_beta) {
  double sum = 0;
  for (int64_t w = 0; w < state_words(n); ++w)
    for (uint32_t b = bits[w]; b; b &= b - 1) {
      const int64_t i = 32 * w + __builtin_ctz(b);
      sum += double(bias[i]) - double(base_bias[i]);
    }
  return (double(next_beta) - double(beta)) * sum;
}

// One side of every chain of a group: the integer sums that its bits are drawn from, and the rows that they add to the other side's
// sums.
template <class E>
struct GroupSide {
  int64_t n, first_unit;
  E* acc;         // [count, padded_side(n)]
  const E* rows;  // [n, ld] couplings to the other side
  int64_t ld;
};

// Computes the other side's sums afresh from all of this side's bits, by tables.
template <class E, class Bits>
inline void propagate_by_tables(const GroupSide<E>& from, const GroupSide<E>& to, Bits bits_of, int64_t count, E* table) {
  constexpr int64_t kChunk = 512;
  const uint32_t* bits[kChunk];
  const int64_t acc_stride = padded_side(to.n);
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const int64_t n = count - begin < kChunk ? count - begin : kChunk;
    for (int64_t c = 0; c < n; ++c) bits[c] = bits_of(begin + c);
    table_sums(from.rows, from.ld, from.n, bits, n, to.acc + begin * acc_stride, acc_stride, table);
  }
}
inline void propagate_by_rows(const GroupSide<int32_t>& from, const uint32_t* bits, int32_t* acc, int32_t* active) {
  int32_t* end = active;
  for (int64_t w = 0; w < state_words(from.n); ++w) end = list_bits(bits[w], int32_t(32 * w), end);
  add_rows(from.rows, from.ld, active, end - active, nullptr, 0, acc);
}

// A side's sums are either updated by the rows of the units that flipped, or computed afresh by tables once all chains are drawn.
// Sums of integers are the same either way. The flips of the sweep before predict which is faster: looking up four rows costs as
// much as 0.75 of a flipped row (bench/NOTES.md).
inline bool tables_win(int64_t flips, int64_t count, int64_t n) { return flips * 16 > count * n * 3; }

template <bool kAnnealed>
inline void sweep_group_of(const BinarySweeps& p, const BinaryChain* chains, int64_t count, const GroupScratch& scratch) {
  const GroupSide<int32_t> left = {p.n1, 0, scratch.acc_left, p.coupling.rows, padded_row(p.n2)};
  const GroupSide<int32_t> right = {p.n2, p.n1, scratch.acc_right, p.coupling.columns, padded_row(p.n1)};
  const int64_t left_stride = padded_side(p.n1), right_stride = padded_side(p.n2);
  const bool may_use_tables = p.allow_tables && count >= kMinTableChains;
  const auto left_bits = [&](int64_t c) { return chains[c].left; };
  const auto right_bits = [&](int64_t c) { return chains[c].right; };
  // Small models keep both sides' bytes from one pass over the counters; those of large models would leave the cache.
  const bool one_draw = p.n1 + p.n2 <= kOneDrawUnits;
  const int64_t left_end = (p.n1 + 127) / 128, right_begin = one_draw ? 0 : p.n1 / 128, right_end = (p.n1 + p.n2 + 127) / 128;
  const int64_t bytes_stride = one_draw ? random_bytes_capacity(p.n1 + p.n2) : 0;

  __builtin_memset(scratch.acc_right, 0, size_t(count * right_stride) * 4);
  if (may_use_tables)
    propagate_by_tables(left, right, left_bits, count, scratch.table);
  else
    for (int64_t c = 0; c < count; ++c)
      propagate_by_rows(left, chains[c].left, scratch.acc_right + c * right_stride, scratch.raised);

  // Draws a side of a chain; returns the number of flips. to_acc: the other side's sums if rows update them, else null.
  const auto draw = [&](const GroupSide<int32_t>& from, const HalfSweep& h, const int32_t* acc, const float* bias,
                        const float* base_bias, const uint8_t* bytes, const uint32_t* clamp, uint32_t* bits, int32_t* to_acc) {
    int64_t flips = 0;
    int32_t *raised = scratch.raised, *lowered = scratch.lowered;
    uint32_t drawn[kWordsAtOnce];
    for (int64_t i = 0; i < from.n; i += 32) {
      const int64_t w = i / 32 % kWordsAtOnce;
      if (w == 0) {
        const int64_t vectors = (from.n - i + kLanes - 1) / kLanes;
        sample_words<kAnnealed, kWordsAtOnce * kWordVectors>(vectors, h, i, acc, bias, base_bias, bytes, clamp, bits, drawn);
      }
      const uint32_t before = bits[i / 32], now = drawn[w];
      bits[i / 32] = now;
      if (to_acc) {
        raised = list_bits(now & ~before, int32_t(i), raised);
        lowered = list_bits(before & ~now, int32_t(i), lowered);
      }
      flips += __builtin_popcount(before ^ now);
    }
    if (to_acc)
      add_rows(from.rows, from.ld, scratch.raised, raised - scratch.raised, scratch.lowered, lowered - scratch.lowered, to_acc);
    return flips;
  };

  bool right_by_tables = may_use_tables, left_by_tables = may_use_tables;
  StopClock clock(p.check);
  for (int64_t sweep = 0; sweep < p.num_sweeps; ++sweep) {
    if (clock.stops(count * (p.n1 + p.n2))) return;
    const float beta = p.beta[(sweep + kAnnealed) * p.beta_stride];
    const bool last = sweep + 1 == p.num_sweeps;
    if (sweep == 0) {  // left's first sums are those of right's starting bits, which flips then correct
      __builtin_memset(scratch.acc_left, 0, size_t(count * left_stride) * 4);
      if (!right_by_tables)
        for (int64_t c = 0; c < count; ++c)
          propagate_by_rows(right, chains[c].right, scratch.acc_left + c * left_stride, scratch.raised);
    }
    int64_t flips = 0;
    for (int64_t c = 0; c < count; ++c) {
      const BinaryChain& chain = chains[c];
      int32_t* acc = scratch.acc_right + c * right_stride;
      if constexpr (kAnnealed) {
        const float last_beta = p.beta[sweep * p.beta_stride];
        *chain.log_weight +=
            softplus_difference(p.n2, acc, chain.right_bias, chain.base_right_bias, p.coupling.scale, last_beta, beta) +
            linear_difference(p.n1, chain.left, chain.left_bias, chain.base_left_bias, last_beta, beta);
      }
      const HalfSweep h = {p.n2, p.n1, beta, p.coupling.scale,
                           random_stream(p.seed, chain.number, p.first_sweep + uint64_t(sweep))};
      uint8_t* bytes = scratch.bytes + c * bytes_stride;
      random_bytes(h.random, right_begin, right_end, bytes);
      flips += draw(right, h, acc, chain.right_bias, chain.base_right_bias, bytes + p.n1 - right_begin * 128, chain.clamp_right,
                    chain.right, right_by_tables ? nullptr : scratch.acc_left + c * left_stride);
    }
    if (right_by_tables) propagate_by_tables(right, left, right_bits, count, scratch.table);
    right_by_tables = may_use_tables && tables_win(flips, count, p.n2);
    flips = 0;
    for (int64_t c = 0; c < count; ++c) {
      const BinaryChain& chain = chains[c];
      const HalfSweep h = {p.n1, 0, beta, p.coupling.scale, random_stream(p.seed, chain.number, p.first_sweep + uint64_t(sweep))};
      uint8_t* bytes = scratch.bytes + c * bytes_stride;
      if (!one_draw) random_bytes(h.random, 0, left_end, bytes);
      flips += draw(left, h, scratch.acc_left + c * left_stride, chain.left_bias, chain.base_left_bias, bytes, chain.clamp_left,
                    chain.left, left_by_tables || last ? nullptr : scratch.acc_right + c * right_stride);
    }
    if (left_by_tables && !last) propagate_by_tables(left, right, left_bits, count, scratch.table);
    left_by_tables = may_use_tables && tables_win(flips, count, p.n1);
  }
}

void sweep_group_kernel(const BinarySweeps& p, const BinaryChain* chains, int64_t count, const GroupScratch& scratch) {
  p.annealed ? sweep_group_of<true>(p, chains, count, scratch) : sweep_group_of<false>(p, chains, count, scratch);
}
