// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. Binary sweeps of a group of chains that share a bipartite model (LookupCoupling). A lane
// of 16 bits is a chain: for each unit, vectors of chains look up the sums of its couplings, and decide it against bounds.

// ---- couplings ------------------------------------------------------------------------------------------------------------------

constexpr int kBlockRows = kLookupRows * kLookupBlock;
static_assert(kBlockRows % kLanes == 0);

// A table is kept as its first eight entries and what two more couplings add to them, three eighths of its size.
inline void store_table(const int16_t* coupling, int16_t first, LookupTable& out) {
  // The couplings that each entry has, one at a time: for entries 0..7 from 0, 1 and 2, for their multiples of 8 from 3 and 4.
  const auto choose = [](__m128i from, int row, int entry_bit) {
    alignas(16) uint8_t byte[16];
    for (int e = 0; e < 8; ++e)
      for (int half = 0; half < 2; ++half) byte[2 * e + half] = uint8_t(e >> entry_bit & 1 ? 2 * row + half : 0x80);
    return _mm_shuffle_epi8(from, _mm_load_si128((const __m128i*)byte));
  };
  const __m128i all = _mm_loadu_si128((const __m128i*)coupling);
  const __m128i low =
      _mm_add_epi16(_mm_add_epi16(choose(all, 0, 0), choose(all, 1, 1)), _mm_add_epi16(choose(all, 2, 2), _mm_set1_epi16(first)));
  _mm_storeu_si128((__m128i*)out.low, low);
  _mm_storel_epi64((__m128i*)out.high, _mm_add_epi16(choose(all, 3, 0), choose(all, 4, 1)));
}
inline __m512i load_table(const LookupTable& table) {
  constexpr int64_t kEntry = 0x0202020202020202, kFirst = 0x0100010001000100;
  const __m512i each_eight_times = _mm512_set_epi64(kFirst + 3 * kEntry, kFirst + 3 * kEntry, kFirst + 2 * kEntry,
                                                    kFirst + 2 * kEntry, kFirst + kEntry, kFirst + kEntry, kFirst, kFirst);
  int64_t high;
  __builtin_memcpy(&high, table.high, sizeof high);
  return _mm512_add_epi16(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table.low)),
                          _mm512_shuffle_epi8(_mm512_set1_epi64(high), each_eight_times));
}

void note_lookup_sums_kernel(const int32_t* rows, int64_t num_rows, int64_t n, LookupSums& most) {
  for (int64_t i = 0; i < num_rows; ++i) {
    double all = 0, sum = 0;
    for (int64_t begin = 0; begin < n; begin += kBlockRows) {
      const int64_t end = begin + kBlockRows < padded_row(n) ? begin + kBlockRows : padded_row(n);
      VecF plain = {}, magnitude = {};
      for (int64_t j = begin; j < end; j += kLanes) {
        const VecF x = to_float(load<VecI>(rows + i * padded_row(n) + j));
        plain += x;
        magnitude += bit_cast<VecF>(bit_cast<VecI>(x) & 0x7fffffff);
      }
      const double of_block = double(horizontal_sum<float>(magnitude)) * (1 + 1e-5);  // sums of float32 numbers
      most.block = of_block > most.block ? of_block : most.block;
      all += of_block;
      sum += double(horizontal_sum<float>(plain));
    }
    const double middle = (sum < 0 ? -sum : sum) / 2 + 1e-5 * all;
    most.all = all > most.all ? all : most.all;
    most.middle = middle > most.middle ? middle : most.middle;
  }
}

// Up to 16 units whose high bytes have one counter. They are drawn together.
constexpr int kTileUnits = 16;
struct LookupTile {
  uint32_t counter;
  int num_units;
  int32_t units[kTileUnits], slots[kTileUnits];  // of the side, and their places among the counter's bytes
  int64_t units_before;                          // in the tiles before
  // The place of a unit's first table in a block in which each unit has `length`: tables lie in the order in which they are read.
  int64_t tables(int64_t num_tables, int64_t begin_of_block, int64_t length, int at) const {
    return units_before * num_tables + begin_of_block * num_units + at * length;
  }
};
template <class Function>
inline void for_each_tile(int64_t first_unit, int64_t n, Function function) {
  LookupTile tile = {};
  for (int64_t counter = first_unit / 128 * 8; counter < (first_unit + n + 127) / 128 * 8; ++counter) {
    tile.counter = uint32_t(counter);
    tile.units_before += tile.num_units;
    tile.num_units = 0;
    for (int slot = 0; slot < kTileUnits; ++slot) {
      const int64_t unit = counter / 8 * 128 + slot / 4 * 32 + counter % 8 * 4 + slot % 4 - first_unit;
      if (unit < 0 || unit >= n) continue;
      tile.slots[tile.num_units] = slot;
      tile.units[tile.num_units++] = int32_t(unit);
    }
    if (tile.num_units) function(tile);
  }
}

// Rounds the units of a side whose high bytes have the counters first .. last - 1. Returns the largest error of a unit's sum, in
// units of a field.
float round_lookup_kernel(int64_t n1, int64_t n2, const RoundedCoupling& wide, bool is_left, int64_t first, int64_t last,
                          const LookupCoupling& coupling) {
  const int64_t first_unit = is_left ? 0 : n1, num_units = is_left ? n1 : n2, n = is_left ? n2 : n1;
  const int32_t* rows = is_left ? wide.rows : wide.columns;
  const LookupSide& out = is_left ? coupling.left : coupling.right;
  const float factor = coupling.factor;
  const int shift = coupling.shift;
  const int64_t ld = padded_row(n), num_tables = num_lookup_tables(n), num_blocks = (num_tables + kLookupBlock - 1) / kLookupBlock;
  const float per_unit = power_of_two<float>(-shift);
  int16_t near[kMostCoarseUnits + kLanes + kLookupRows] = {};
  int16_t centre[kMostCoarseUnits / kBlockRows + 1];
  float largest = 0;
  const auto round_unit = [&](const LookupTile& tile, int at) {
    const int64_t i = tile.units[at];
    RoundingErrors errors;
    int64_t sum_of_centres = 0;
    for (int64_t block = 0; block < num_blocks; ++block) {
      VecI sum = {};
      for (int64_t j = block * kBlockRows; j < (block + 1) * kBlockRows && j < ld; j += kLanes) {
        const VecI rounded = errors.round(to_float(load<VecI>(rows + i * ld + j)) * factor);
        sum += rounded;
        store_integers(near + j, rounded);  // modulo 2^16
      }
      const int32_t middle = -(horizontal_sum<int32_t>(sum) >> 1);
      centre[block] = int16_t(middle + (shift ? 1 << (shift - 1) : 0));  // dropping bits then rounds
      sum_of_centres += middle;
    }
    out.offset[i] = float((double(sum_of_centres) + double(errors.middle())) * double(per_unit));
    largest = errors.largest() > largest ? errors.largest() : largest;
    for (int64_t begin = 0; begin < num_tables; begin += kLookupBlock) {
      const int64_t length = num_tables - begin < kLookupBlock ? num_tables - begin : kLookupBlock;
      LookupTable* to = out.tables + tile.tables(num_tables, begin, length, at);
      for (int64_t t = begin; t < begin + length; ++t)
        store_table(near + t * kLookupRows, t == begin ? centre[t / kLookupBlock] : int16_t{0}, *to++);
    }
  };
  for_each_tile(first_unit, num_units, [&](const LookupTile& tile) {
    for (int at = 0; at < tile.num_units && first <= tile.counter && tile.counter < last; ++at) round_unit(tile, at);
  });
  // Couplings and their products were rounded to float32, by 2^-23 of themselves, whose sum is below 2^16 units of a field; so were
  // the sums here, and so is the unit of a field.
  return largest * 1.001f * per_unit + 0.02f + (shift ? 0.5f * float(num_blocks) : 0);
}

// Chooses the unit for betas of at least least_beta and biases of magnitudes up to largest_bias. False if it would be far from
// float32's limits. No side has more than kMostCoarseUnits.
bool choose_lookup_unit_kernel(int64_t n1, int64_t n2, const LookupSums& most, float scale, double largest_bias, double least_beta,
                               LookupCoupling& out) {
  const double all = most.all * double(scale), saturated = all + kCoarseReach / least_beta;
  out.most_bias = largest_bias < saturated ? largest_bias : saturated;
  // Sums are kept around their middle. Rounding up each coupling adds at most n / 2 to a sum, and half of that to a middle; the
  // errors' middle is at most n / 4. The rounded sums of blocks, off by a half each, fit in the rest.
  const double field = all / 2 + most.middle * double(scale) + out.most_bias;
  const double unit = field > 0 ? field / (32750 - double(n1 > n2 ? n1 : n2)) : 1;
  // Half of a block's sum, 20 of rounding and the 128 by which a dropped half is added are below 2^15.
  for (out.shift = 0; out.shift < 8 && most.block * double(scale) * double(2 << out.shift) < 65000 * unit;) ++out.shift;
  const double factor = double(scale) / unit * double(1 << out.shift);
  out.unit = float(unit), out.range = float(all + out.most_bias), out.factor = float(factor);
  return factor < 1e30 && factor > 1e-30 && unit < 1e30 && unit > 1e-37;
}

int slack_of_fields_kernel(const CoarseFields& fields, double beta) { return coarse_sigmoid(fields, beta).largest_slack; }

// ---- sweeps ---------------------------------------------------------------------------------------------------------------------

// One side of all chains.
struct LookupChains {
  int64_t n, first_unit;
  LookupSide coupling;
  uint32_t* bits;         // [n, vectors]
  const uint32_t* fixed;  // [n, vectors]
  const int16_t* bias;    // [n] or [n, vectors, 32]
  uint32_t* BinaryChain::* of_chain;
  ExactSide exact;
};

constexpr int kTablesAhead = 64;  // the third-level cache answers later than the processor looks ahead

// The fields of a tile's units in all chains, from the entries that the neighbours' bits select.
// Not inlined, so that all registers are free for its sums.
template <int kVectors>
__attribute__((noinline)) void lookup_sums_of(const LookupChains& side, const LookupTile& tile, const uint16_t* index,
                                              int64_t num_tables, bool shared_bias, int shift, int16_t* sums) {
  const __m128i by = _mm_cvtsi32_si128(shift);
  for (int64_t begin = 0; begin < num_tables; begin += kLookupBlock) {
    const int64_t length = num_tables - begin < kLookupBlock ? num_tables - begin : kLookupBlock;
    const LookupTable* table = side.coupling.tables + tile.tables(num_tables, begin, length, 0);
    for (int k = 0; k < tile.num_units; ++k) {
      __m512i sum[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[v] = _mm512_setzero_si512();
      for (int64_t t = begin; t < begin + length; ++t, ++table) {
        _mm_prefetch((const char*)(table + kTablesAhead), _MM_HINT_T0);
        const __m512i entries = load_table(*table);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v)
          sum[v] = _mm512_add_epi16(
              sum[v], _mm512_permutexvar_epi16(_mm512_load_si512(index + (t * kVectors + v) * kLookupLanes), entries));
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v)
          asm("" : "+v"(sum[v]));  // keeps it in its register, from which GCC 12 moves it once a table
      }
      int16_t* out = sums + k * kVectors * kLookupLanes;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        __m512i before;
        if (begin)
          before = _mm512_load_si512(out + v * kLookupLanes);
        else if (shared_bias)
          before = _mm512_set1_epi16(side.bias[tile.units[k]]);
        else
          before = _mm512_load_si512(side.bias + (int64_t{tile.units[k]} * kVectors + v) * kLookupLanes);
        _mm512_store_si512(out + v * kLookupLanes, _mm512_add_epi16(before, _mm512_sra_epi16(sum[v], by)));
      }
    }
  }
}
template <int kVectors = kMostLookupVectors, class... Arguments>
inline void lookup_sums(int vectors, Arguments&... arguments) {
  if constexpr (kVectors > 1)
    if (vectors < kVectors) return lookup_sums<kVectors - 1>(vectors, arguments...);
  lookup_sums_of<kVectors>(arguments...);
}

// The high bytes of the units of a counter, as high bytes of lanes. out: [16, vectors, 32], in the order of the bytes
inline void lookup_bytes(const LaneStreams* streams, int vectors, uint32_t counter, uint16_t* out) {
  alignas(64) static constexpr auto kHalves = [] {
    struct {
      uint16_t of[2][32];
    } halves = {};
    for (int h = 0; h < 2; ++h)
      for (int l = 0; l < 32; ++l) halves.of[h][l] = uint16_t(l / 16 * 32 + l % 16 * 2 + h);
    return halves;
  }();
  const __m512i high_byte = _mm512_set1_epi16(int16_t(0xff00));
  for (int v = 0; v < vectors; ++v) {
    PhiloxVectors r[2];
    philox_of_chains(streams + 2 * v, counter, r);
    for (int q = 0; q < 4; ++q)
      for (int h = 0; h < 2; ++h) {
        const __m512i pair =
            _mm512_permutex2var_epi16((__m512i)r[0].word[q], _mm512_load_si512(kHalves.of[h]), (__m512i)r[1].word[q]);
        uint16_t* to = out + ((4 * q + 2 * h) * vectors + v) * kLookupLanes;
        _mm512_store_si512(to, _mm512_slli_epi16(pair, 8));
        _mm512_store_si512(to + vectors * kLookupLanes, _mm512_and_si512(pair, high_byte));
      }
  }
}

class LookupSweeps {
 public:
  LookupSweeps(const BinarySweeps& p, const LookupCoupling& coupling, const BinaryChain* chains, int64_t count,
               const LookupScratch& scratch)
      : p_(p),
        coupling_(coupling),
        chains_(chains),
        count_(count),
        vectors_(int((count + kLookupLanes - 1) / kLookupLanes)),
        scratch_(scratch),
        left_{p.n1, 0, coupling.left, scratch.left, scratch.left_fixed, scratch.left_bias, &BinaryChain::left, exact_left(p)},
        right_{p.n2,          p.n1, coupling.right, scratch.right, scratch.right_fixed, scratch.right_bias, &BinaryChain::right,
               exact_right(p)},
        sigmoid_(coupling) {
    for (int64_t c = 0; c < count; ++c)
      shared_bias_ &= chains[c].left_bias == chains->left_bias && chains[c].right_bias == chains->right_bias;
    for (int64_t l = 0; l < kLookupLanes * kMostLookupVectors; ++l) number_[l] = chains[l < count ? l : 0].number;
    load(left_, scratch.left_fixed, scratch.left_bias, &BinaryChain::left_bias, &BinaryChain::clamp_left);
    load(right_, scratch.right_fixed, scratch.right_bias, &BinaryChain::right_bias, &BinaryChain::clamp_right);
  }

  void run() {
    StopClock clock(p_.check);
    for (int64_t sweep = 0; sweep < p_.num_sweeps; ++sweep) {
      if (clock.stops(count_ * (p_.n1 + p_.n2))) return;
      sigmoid_.set(p_.beta[sweep * p_.beta_stride]);
      number_of_sweep_ = p_.first_sweep + uint64_t(sweep);
      for (int v = 0; v < 2 * vectors_; ++v) streams_[v] = lane_streams(p_.seed, number_ + v * kLanes, number_of_sweep_);
      kept_ = 0;
      draw(right_, left_);
      draw(left_, right_);
    }
  }

 private:
  // A side's bits, the units that are fixed, and biases.
  void load(const LookupChains& side, uint32_t* fixed, int16_t* bias, const float* BinaryChain::* bias_of,
            const uint32_t* BinaryChain::* clamp_of) {
    const auto lane_words = [&](auto word_of, uint32_t* out) {
      for (int64_t w = 0; w < state_words(side.n); ++w)
        for (int v = 0; v < vectors_; ++v) {
          uint32_t in[32] = {}, units[32];
          for (int64_t l = 0; l < 32 && v * 32 + l < count_; ++l) in[l] = word_of(chains_[v * 32 + l], w);
          transpose_bits_kernel(in, units);
          for (int64_t r = 0; r < 32 && 32 * w + r < side.n; ++r) out[(32 * w + r) * vectors_ + v] = units[r];
        }
    };
    lane_words([&](const BinaryChain& c, int64_t w) { return (c.*side.of_chain)[w]; }, side.bits);
    if (chains_->*clamp_of)
      lane_words([&](const BinaryChain& c, int64_t w) { return (c.*clamp_of)[w]; }, fixed);
    else
      __builtin_memset(fixed, 0, size_t(side.n * vectors_) * sizeof *fixed);
    const int last = int(count_ - (vectors_ - 1) * kLookupLanes);
    if (last < kLookupLanes)  // lanes without a chain
      for (int64_t i = 0; i < side.n; ++i) fixed[(i + 1) * vectors_ - 1] |= ~0u << last;
    const double unit = double(coupling_.unit), most = coupling_.most_bias;
    const auto rounded = [&](float of_unit, int64_t i) {
      const double x = double(of_unit), clipped = x < -most ? -most : x > most ? most : x;
      return int16_t(__builtin_rint(clipped / unit - double(side.coupling.offset[i])));
    };
    if (shared_bias_)
      for (int64_t i = 0; i < side.n; ++i) bias[i] = rounded((chains_->*bias_of)[i], i);
    else
      for (int64_t c = 0; c < count_; ++c)
        for (int64_t i = 0; i < side.n; ++i) bias[i * vectors_ * kLookupLanes + c] = rounded((chains_[c].*bias_of)[i], i);
  }

  void index_entries(const LookupChains& given) {
    for (int64_t t = 0; t < num_lookup_tables(given.n); ++t)
      for (int v = 0; v < vectors_; ++v) {
        __m512i index = _mm512_setzero_si512();
        for (int r = 0; r < kLookupRows && t * kLookupRows + r < given.n; ++r) {
          const __m512i with = _mm512_or_si512(index, _mm512_set1_epi16(int16_t(1 << r)));
          index = _mm512_mask_mov_epi16(index, given.bits[(t * kLookupRows + r) * vectors_ + v], with);
        }
        _mm512_store_si512(scratch_.index + (t * vectors_ + v) * kLookupLanes, index);
      }
  }

  void draw(const LookupChains& side, const LookupChains& given) {
    index_entries(given);
    const CoarseDraw decide(sigmoid_.values(), sigmoid_.beta() < 0);
    OpenVectors<ExactSide> open(side.exact.at_sweep(number_of_sweep_), sigmoid_.beta());
    const int64_t num_tables = num_lookup_tables(given.n);
    // Both sides have units of this span of 128.
    const int64_t common_span = p_.n1 % 128 ? p_.n1 / 128 : -1;
    alignas(64) int16_t sums[kTileUnits * kMostLookupVectors * kLookupLanes];
    alignas(64) uint16_t bytes_of_tile[kTileUnits * kMostLookupVectors * kLookupLanes];
    for_each_tile(side.first_unit, side.n, [&](const LookupTile& tile) {
      uint16_t* bytes = bytes_of_tile;
      bool is_kept = false;
      if (int64_t{tile.counter / 8} == common_span) {
        bytes = scratch_.bytes + tile.counter % 8 * kTileUnits * vectors_ * kLookupLanes;
        is_kept = kept_ >> (tile.counter % 8) & 1;
        kept_ |= 1u << (tile.counter % 8);
      }
      if (!is_kept) lookup_bytes(streams_, vectors_, tile.counter, bytes);
      lookup_sums(vectors_, side, tile, scratch_.index, num_tables, shared_bias_, coupling_.shift, sums);
      for (int k = 0; k < tile.num_units; ++k)
        for (int v = 0; v < vectors_; ++v) {
          const uint16_t* high = bytes + (tile.slots[k] * vectors_ + v) * kLookupLanes;
          const int64_t at = int64_t{tile.units[k]} * vectors_ + v;
          const __m512i field = _mm512_load_si512(sums + (k * vectors_ + v) * kLookupLanes);
          open.draw(decide(field, _mm512_load_si512(high)), side.fixed[at], side.bits + at,
                    {chains_ + v * kLookupLanes, tile.units[k], high});
        }
      open.list_fields();
    });
    open.close();
    store_bits(side);
  }

  // The chains' own bits, which exact sums read, and which are the result.
  void store_bits(const LookupChains& side) {
    for (int64_t w = 0; w < state_words(side.n); ++w)
      for (int v = 0; v < vectors_; ++v) {
        uint32_t in[32] = {}, of_chain[32];
        for (int64_t r = 0; r < 32 && 32 * w + r < side.n; ++r) in[r] = side.bits[(32 * w + r) * vectors_ + v];
        transpose_bits_kernel(in, of_chain);
        for (int64_t l = 0; l < 32 && v * 32 + l < count_; ++l) (chains_[v * 32 + l].*side.of_chain)[w] = of_chain[l];
      }
  }

  const BinarySweeps& p_;
  const LookupCoupling& coupling_;
  const BinaryChain* chains_;
  const int64_t count_;
  const int vectors_;
  const LookupScratch& scratch_;
  const LookupChains left_, right_;
  bool shared_bias_ = true;
  SigmoidOfBeta sigmoid_;
  uint64_t number_of_sweep_ = 0;
  uint32_t kept_ = 0;  // which counters of the common span have their bytes kept
  uint64_t number_[kLookupLanes * kMostLookupVectors];
  LaneStreams streams_[2 * kMostLookupVectors];
};

void sweep_lookup_kernel(const BinarySweeps& p, const LookupCoupling& coupling, const BinaryChain* chains, int64_t count,
                         const LookupScratch& scratch) {
  LookupSweeps(p, coupling, chains, count, scratch).run();
}
