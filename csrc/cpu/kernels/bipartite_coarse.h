// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. Binary sweeps of a group of chains that share a bipartite model, by fields of 16 bits
// (CoarseCoupling), of which each chain has its own: sums of rows, or of tables of rows.

// The largest sum of |couplings| of a unit, in any of the rows.
inline double largest_sum_of(const int32_t* rows, int64_t num_rows, int64_t ld) {
  double largest = 0;
  for (int64_t i = 0; i < num_rows; ++i) {
    VecF sum = {};
    for (int64_t j = 0; j < ld; j += kLanes)
      sum += bit_cast<VecF>(bit_cast<VecI>(to_float(load<VecI>(rows + i * ld + j))) & 0x7fffffff);
    const double of_row = double(horizontal_sum<float>(sum));
    largest = of_row > largest ? of_row : largest;
  }
  return largest * (1 + 1e-3);  // sums of float32 numbers
}

// out[i][j] = wide[i][j] factor to the nearest integer. The sum of a row's active couplings is then too large by centre[i], and by
// at most the number that is returned more or less, whichever are active.
inline float round_coarse_rows(const int32_t* wide, int64_t num_rows, int64_t n, float factor, int16_t* out, float* centre) {
  const int64_t ld = padded_row(n), out_ld = padded_side(n);
  float largest = 0;
  for (int64_t i = 0; i < num_rows; ++i) {
    RoundingErrors errors;
    for (int64_t j = 0; j < ld; j += kLanes)
      store_integers(out + i * out_ld + j, errors.round(to_float(load<VecI>(wide + i * ld + j)) * factor));
    for (int64_t j = ld; j < out_ld; ++j) out[i * out_ld + j] = 0;
    centre[i] = errors.middle();
    largest = errors.largest() > largest ? errors.largest() : largest;
  }
  // Couplings and their products were rounded to float32, by 2^-23 of themselves, whose sum is below 2^15; so were the sums here,
  // and so is the unit of a field.
  return largest * 1.001f + 0.01f;
}

inline void round_coarse_biases(const float* bias, const float* centre, int64_t n, double most, double unit, int16_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const double of_unit = double(bias[i]), clipped = of_unit < -most ? -most : of_unit > most ? most : of_unit;
    out[i] = int16_t(__builtin_rint(clipped / unit - double(centre[i])));
  }
  for (int64_t i = n; i < padded_side(n); ++i) out[i] = 0;
}

// Rounds a model for betas whose magnitudes lie between two bounds. Returns the larger slack of both sides; kHopeless if it did
// not try. No side has more than kMostCoarseUnits.
int round_coarse_kernel(const BinarySweeps& p, const BinaryChain& chain, double least_beta, double largest_beta,
                        CoarseCoupling& out) {
  const double of_rows = largest_sum_of(p.coupling.rows, p.n1, padded_row(p.n2)),
               of_columns = largest_sum_of(p.coupling.columns, p.n2, padded_row(p.n1)), wide_unit = double(p.coupling.scale);
  const double sum = (of_rows > of_columns ? of_rows : of_columns) * wide_unit;
  const float left = largest_magnitude(chain.left_bias, p.n1), right = largest_magnitude(chain.right_bias, p.n2);
  double bias = double(left > right ? left : right);
  // A larger bias saturates the unit, whatever its neighbours do.
  const double saturated = sum + kCoarseReach / least_beta;
  bias = bias < saturated ? bias : saturated;
  // Rounding up each coupling adds at most n / 2 to a sum; a centre is at most n / 4, and a bias is rounded by a half.
  const double most = 32766 - double(p.n1 > p.n2 ? p.n1 : p.n2);
  const double unit = sum + bias > 0 ? (sum + bias) / most : 1;
  const double factor = wide_unit / unit;
  if (!(factor < 1e30 && factor > 1e-30 && unit < 1e30 && unit > 1e-37)) return kHopeless;  // far from float32's limits
  out.unit = float(unit), out.range = float(sum + bias);
  float centre[kMostCoarseUnits];
  const float error_left = round_coarse_rows(p.coupling.rows, p.n1, p.n2, float(factor), out.rows, centre);
  round_coarse_biases(chain.left_bias, centre, p.n1, bias, unit, out.left_bias);
  const float error_right = round_coarse_rows(p.coupling.columns, p.n2, p.n1, float(factor), out.columns, centre);
  round_coarse_biases(chain.right_bias, centre, p.n2, bias, unit, out.right_bias);
  out.error = error_left > error_right ? error_left : error_right;
  return coarse_sigmoid(out, largest_beta).largest_slack;
}

// One side of every chain of a group.
struct CoarseSide : GroupSide<int16_t> {
  int64_t words, acc_stride;
  const int16_t* bias;
  uint32_t* BinaryChain::* bits;
  const uint32_t* BinaryChain::* clamp;
  ExactSide exact;
};

// Words of 32 units, some of which the high bytes leave open. They are appended without a branch, because which of them have open
// units cannot be predicted.
class CoarseOpen {
 public:
  CoarseOpen(const CoarseSide& side, int slack, float beta, uint64_t sweep)
      : side_(side), slack_(uint16_t(slack)), units_(side.exact.at_sweep(sweep), beta) {}
  struct alignas(64) Entry {
    uint16_t probability[32];
    uint8_t byte[32];
    const BinaryChain* chain;
    uint32_t open, negative;
    int32_t word;
  };
  // The entry to fill, which is kept if keep() says so.
  Entry& next() { return entry_[num_entries_]; }
  void keep(bool is_kept) { num_entries_ += is_kept; }
  bool is_full() const { return num_entries_ >= kEnough; }
  void close() {
    for (int e = 0; e < num_entries_; ++e) {
      const Entry& entry = entry_[e];
      uint32_t* word = entry.chain->*side_.bits + entry.word;
      for (uint32_t open = entry.open; open; open &= open - 1) {
        const int place = __builtin_ctz(open);
        units_.add({entry.chain, 32 * entry.word + place}, entry.byte[place], entry.probability[place], slack_,
                   entry.negative >> place & 1, word, place);
      }
    }
    num_entries_ = 0;
    units_.close();
  }

 private:
  const CoarseSide& side_;
  const uint16_t slack_;
  OpenFields<ExactSide> units_;
  static constexpr int kEnough = 64;
  int num_entries_ = 0;
  Entry entry_[kEnough + kMostCoarseUnits / 32];  // a chain's words are appended before anybody asks whether it is full
};

// Decides 32 units at a time against bounds.
class CoarseDraw {
 public:
  CoarseDraw(const CoarseSigmoid& s, int slack, bool negative_beta)
      : shift_(_mm_cvtsi32_si128(s.shift)),
        up_(_mm_cvtsi32_si128(16 - s.shift)),
        slope_shift_(_mm_cvtsi32_si128(s.slope_shift)),
        most_(_mm256_set1_epi16(int16_t((kSegments << s.shift) - 1))),
        slack_(_mm256_set1_epi16(int16_t(uint16_t(slack)))),
        slack_and_byte_(_mm256_set1_epi16(int16_t(uint16_t(slack < 65280 ? slack + 255 : 65535)))),
        flip_(_mm256_set1_epi16(negative_beta ? -1 : 0)) {
    for (int m = 0; m < kSegments; ++m) {
      bytes_[0][m] = uint8_t(s.base[m]);
      bytes_[1][m] = uint8_t(s.base[m] >> 8);
      bytes_[2][m] = uint8_t(s.slope[m] >> s.slope_shift);
    }
  }
  uint32_t operator()(const int16_t* acc, const int16_t* bias, const uint8_t* bytes, CoarseOpen::Entry& entry) const {
    __m256i field[2], part[2], segment[2];
    for (int h = 0; h < 2; ++h) {
      field[h] =
          _mm256_add_epi16(_mm256_loadu_si256((const __m256i*)(acc + 16 * h)), _mm256_loadu_si256((const __m256i*)(bias + 16 * h)));
      const __m256i size = _mm256_min_epi16(_mm256_abs_epi16(field[h]), most_);
      segment[h] = _mm256_srl_epi16(size, shift_);
      part[h] = _mm256_srli_epi16(_mm256_sll_epi16(size, up_), 1);
    }
    // Bytes are packed and unpacked within halves of a vector, which keeps the order.
    const __m256i index = _mm256_packus_epi16(segment[0], segment[1]), zero = _mm256_setzero_si256();
    const __m256i low = look_up(0, index), high = look_up(1, index), slope = look_up(2, index);
    __m256i not_below[2], not_open[2], negative[2];
    for (int h = 0; h < 2; ++h) {
      const __m256i base = h ? _mm256_unpackhi_epi8(low, high) : _mm256_unpacklo_epi8(low, high);
      const __m256i steepness =
          _mm256_sll_epi16(h ? _mm256_unpackhi_epi8(slope, zero) : _mm256_unpacklo_epi8(slope, zero), slope_shift_);
      const __m256i probability = _mm256_adds_epu16(base, _mm256_mulhrs_epi16(steepness, part[h]));
      _mm256_store_si256((__m256i*)(entry.probability + 16 * h), probability);
      negative[h] = _mm256_xor_si256(_mm256_srai_epi16(field[h], 15), flip_);
      const __m256i byte = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(bytes + 16 * h))), 8);
      const __m256i word = _mm256_xor_si256(byte, _mm256_slli_epi16(negative[h], 8));
      not_below[h] = _mm256_cmpeq_epi16(_mm256_subs_epu16(_mm256_subs_epu16(probability, slack_and_byte_), word), zero);
      not_open[h] = _mm256_cmpeq_epi16(_mm256_subs_epu16(_mm256_adds_epu16(probability, slack_), word), zero);
    }
    _mm256_store_si256((__m256i*)entry.byte, _mm256_loadu_si256((const __m256i*)bytes));
    const uint32_t below = ~mask(not_below);
    entry.negative = mask(negative);
    entry.open = ~mask(not_open) & ~below;
    return below ^ entry.negative;
  }

 private:
  // Bit u of the result: lane u of 32.
  static uint32_t mask(const __m256i (&lanes)[2]) {
    return uint32_t(_mm256_movemask_epi8(_mm256_permute4x64_epi64(_mm256_packs_epi16(lanes[0], lanes[1]), 0xd8)));
  }
  __m256i look_up(int which, __m256i index) const {
    const auto quarter = [&](int q) {
      const __m128i of_sixteen = _mm_load_si128((const __m128i*)(bytes_[which] + 16 * q));
      return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(of_sixteen), index);
    };
    const __m256i odd = _mm256_slli_epi16(index, 3), upper = _mm256_slli_epi16(index, 2);  // bits 4 and 5 as sign bits
    return _mm256_blendv_epi8(_mm256_blendv_epi8(quarter(0), quarter(1), odd), _mm256_blendv_epi8(quarter(2), quarter(3), odd),
                              upper);
  }
  __m128i shift_, up_, slope_shift_;
  __m256i most_, slack_, slack_and_byte_, flip_;
  alignas(16) uint8_t bytes_[3][kSegments];
};
void sweep_coarse_kernel(const BinarySweeps& p, const CoarseCoupling& coarse, const BinaryChain* chains, int64_t count,
                         const GroupScratch& scratch) {
  const CoarseSide left = {{p.n1, 0, (int16_t*)scratch.acc_left, coarse.rows, padded_side(p.n2)},
                           state_words(p.n1),
                           padded_side(p.n1),
                           coarse.left_bias,
                           &BinaryChain::left,
                           &BinaryChain::clamp_left,
                           exact_left(p)};
  const CoarseSide right = {{p.n2, p.n1, (int16_t*)scratch.acc_right, coarse.columns, padded_side(p.n1)},
                            state_words(p.n2),
                            padded_side(p.n2),
                            coarse.right_bias,
                            &BinaryChain::right,
                            &BinaryChain::clamp_right,
                            exact_right(p)};
  const bool one_draw = p.n1 + p.n2 <= kOneDrawUnits;
  const int64_t left_end = (p.n1 + 127) / 128, right_begin = one_draw ? 0 : p.n1 / 128, right_end = (p.n1 + p.n2 + 127) / 128;
  const auto bytes_of = [&](int64_t c) {
    return scratch.bytes + (one_draw ? c : c % kByteChains) * random_bytes_capacity(p.n1 + p.n2);
  };
  const auto by_tables = [&](const CoarseSide& from, const CoarseSide& to) {
    propagate_by_tables(from, to, [&](int64_t c) { return chains[c].*from.bits; }, count, (int16_t*)scratch.table);
  };

  SigmoidOfBeta sigmoid(coarse);
  bool tables[2] = {true, true};  // of right and of left: whether they change the other side's sums by tables or by rows
  by_tables(left, right);
  StopClock clock(p.check);
  for (int64_t sweep = 0; sweep < p.num_sweeps; ++sweep) {
    if (clock.stops(count * (p.n1 + p.n2))) return;
    const float beta = p.beta[sweep * p.beta_stride];
    sigmoid.set(beta);
    const uint64_t number = p.first_sweep + uint64_t(sweep);
    for (int half = 0; half < 2; ++half) {
      const bool is_left = half;
      const CoarseSide &side = is_left ? left : right, &other = is_left ? right : left;
      const int slack = sigmoid.values().largest_slack;
      const CoarseDraw draw(sigmoid.values(), slack, beta < 0);
      CoarseOpen open(side, slack, beta, number);
      for (int64_t c = 0; c < count; ++c) {
        const BinaryChain& chain = chains[c];
        // Bytes that have just been stored cannot be loaded across two stores without waiting for both, so they are drawn ahead.
        if (c % kByteChains == 0 && (!one_draw || !is_left))
          for (int64_t ahead = c; ahead < c + kByteChains && ahead < count; ++ahead)
            random_bytes(random_stream(p.seed, chains[ahead].number, number), is_left ? 0 : right_begin,
                         is_left ? left_end : right_end, bytes_of(ahead));
        const uint8_t* bytes = bytes_of(c) + (is_left ? 0 : p.n1 - right_begin * 128);
        const int16_t* acc = side.acc + c * side.acc_stride;
        uint32_t *bits = chain.*side.bits, *before = scratch.before + c * side.words;
        const uint32_t* clamp = chain.*side.clamp;
        for (int64_t w = 0; w < side.words; ++w) {
          CoarseOpen::Entry& entry = open.next();
          const uint32_t ones = draw(acc + 32 * w, side.bias + 32 * w, bytes + 32 * w, entry);
          const uint32_t exists = side.n - 32 * w >= 32 ? 0xffffffffu : (1u << (side.n - 32 * w)) - 1;
          const uint32_t fixed = clamp ? clamp[w] : 0, drawn = exists & ~fixed;
          entry.open &= drawn;
          entry.chain = &chain;
          entry.word = int32_t(w);
          open.keep(entry.open);
          before[w] = bits[w];
          bits[w] = (ones & drawn & ~entry.open) | (bits[w] & fixed);
        }
        if (open.is_full()) open.close();
      }
      open.close();
      const bool is_last = is_left && sweep + 1 == p.num_sweeps;
      if (is_last) break;
      bool& uses_tables = tables[is_left];
      if (uses_tables) by_tables(side, other);
      int64_t flips = 0;
      for (int64_t c = 0; c < count; ++c) {
        const uint32_t *bits = chains[c].*side.bits, *before = scratch.before + c * side.words;
        int32_t *raised = scratch.raised, *lowered = scratch.lowered;
        for (int64_t w = 0; w < side.words; ++w) {
          flips += __builtin_popcount(bits[w] ^ before[w]);
          if (uses_tables) continue;
          raised = list_bits(bits[w] & ~before[w], int32_t(32 * w), raised);
          lowered = list_bits(before[w] & ~bits[w], int32_t(32 * w), lowered);
        }
        if (!uses_tables)
          add_rows(side.rows, side.ld, scratch.raised, raised - scratch.raised, scratch.lowered, lowered - scratch.lowered,
                   other.acc + c * other.acc_stride);
      }
      uses_tables = tables_win(flips, count, side.n);
    }
  }
}
