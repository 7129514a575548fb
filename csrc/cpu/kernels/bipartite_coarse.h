// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. Binary sweeps of a group of chains that share a bipartite model, by fields of 16 bits
// (CoarseCoupling). A field gives a probability of 16 bits by linear interpolation. The high byte of a unit's random word decides
// against it in all but a few of a thousand cases; what it leaves open is decided by the exact sum and the whole word.

// A unit of a larger |logit| does the unexpected with a probability of e^-12, 0.4 of 2^-16.
constexpr double kCoarseReach = 12;
constexpr int kSegments = 64;
constexpr int kHopeless = INT32_MAX;

// How fields become probabilities, at one beta. A segment is 2^shift field units long.
struct CoarseSigmoid {
  int shift;
  int slope_shift;  // slopes are multiples of 2^slope_shift: with AVX2 at most 255 times that, so that a byte holds them
  float residual;   // the largest distance from the sigmoid, in units of 2^-16
  alignas(64) uint16_t base[kSegments];
  alignas(64) int16_t slope[kSegments];
};

// unit: of a field, times |beta|. With a shift of 9 the segments have all fields of 15 bits. With a shift of 0 the last field lies
// a segment before the reach.
inline int coarse_shift(double unit) {
  int shift = 0;
  while (shift < 9 && unit * double(kSegments << shift) < kCoarseReach) ++shift;
  return shift;
}

// Where |x| lies in a segment of length h from x0 on, the sigmoid is concave, and lies above its chord by at most h^2 / 8 times the
// largest |second derivative|. The chord is raised by half of the distance in its middle.
inline CoarseSigmoid coarse_sigmoid(double unit) {
  const auto curvature = [](double p) { return p * (1 - p) * (2 * p - 1); };
  CoarseSigmoid out;
  out.shift = coarse_shift(unit);
  const double length = unit * double(1 << out.shift);
  out.slope_shift = 0;
  if constexpr (GIBBS_VECTOR_BYTES == 32)
    while (65536 * (1 / (1 + __builtin_exp(-length)) - 0.5) >= double(255 << out.slope_shift)) ++out.slope_shift;
  const double slope_unit = double(1 << out.slope_shift);
  double residual = 0, p = 0.5;
  for (int m = 0; m < kSegments; ++m) {
    const double next = 1 / (1 + __builtin_exp(-length * (m + 1))), middle = 1 / (1 + __builtin_exp(-length * (m + 0.5)));
    const double at_begin = curvature(p), at_end = curvature(next), flattest = 0.0962250449;  // 3^-1.5 / 2, at logit 1.317
    const bool has_most = length * m <= 1.317 && length * (m + 1) >= 1.316;
    const double most = has_most ? flattest : at_begin > at_end ? at_begin : at_end;
    const double raise = (middle - (p + next) / 2) / 2, below = length * length / 8 * most - raise;
    residual = raise > residual ? raise : residual;
    residual = below > residual ? below : residual;
    const double base = 65536 * (p + raise);
    out.base[m] = uint16_t(base < 65535 ? base + 0.5 : 65535);
    // Of a segment of one field only the beginning is looked up.
    const double slope = out.shift ? 65536 * (next - p) / slope_unit + 0.5 : 0;
    out.slope[m] = int16_t(int(slope) << out.slope_shift);
    p = next;
  }
  out.residual = float(65536 * (residual < 1 ? residual : 1) + slope_unit / 2);
  return out;
}

// Bound on the distance of a coarse probability from the true threshold, in units of 2^-16.
//   The slope of the sigmoid is at most 1/4. A bias was rounded by half a unit, and a tenth is spare for float32. A logit's three
//   roundings to float32 add at most 2^-22 |beta| range / 4, range being the largest |sum| plus the largest |bias| that is told
//   apart. Rounding the base of a segment, the product and this bound, and what lies beyond the last segment, come to less than 4.
inline int coarse_slack(const CoarseCoupling& c, float error, double beta, float residual) {
  const double size = beta < 0 ? -beta : beta;
  const double slack =
      16384 * size * double(c.unit) * (double(error) + 0.6) + 0x1p-8 * size * double(c.range) + double(residual) + 5;
  return slack < 65535 ? int(slack) : 65535;
}

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
    VecF above = {}, below = {};
    for (int64_t j = 0; j < ld; j += kLanes) {
      const VecF exact = to_float(load<VecI>(wide + i * ld + j)) * factor;
      const VecI near = round_to_int(exact);
      const VecF error = to_float(near) - exact;
      above += error > 0.0f ? error : VecF{};
      below -= error < 0.0f ? error : VecF{};
      store_integers(out + i * out_ld + j, near);
    }
    for (int64_t j = ld; j < out_ld; ++j) out[i * out_ld + j] = 0;
    const float most_above = horizontal_sum<float>(above), most_below = horizontal_sum<float>(below);
    centre[i] = (most_above - most_below) / 2;
    const float most = (most_above + most_below) / 2;
    largest = most > largest ? most : largest;
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
  const double saturated = least_beta > 0 ? sum + kCoarseReach / least_beta : bias;
  bias = bias < saturated ? bias : saturated;
  // Rounding up each coupling adds at most n / 2 to a sum; a centre is at most n / 4, and a bias is rounded by a half.
  const double most = 32766 - double(p.n1 > p.n2 ? p.n1 : p.n2);
  const double unit = sum + bias > 0 ? (sum + bias) / most : 1;
  const double factor = wide_unit / unit;
  if (!(factor < 1e30 && factor > 1e-30 && unit < 1e30 && unit > 1e-37)) return kHopeless;  // far from float32's limits
  out.unit = float(unit), out.range = float(sum + bias);
  float centre[kMostCoarseUnits];
  out.left_error = round_coarse_rows(p.coupling.rows, p.n1, p.n2, float(factor), out.rows, centre);
  round_coarse_biases(chain.left_bias, centre, p.n1, bias, unit, out.left_bias);
  out.right_error = round_coarse_rows(p.coupling.columns, p.n2, p.n1, float(factor), out.columns, centre);
  round_coarse_biases(chain.right_bias, centre, p.n2, bias, unit, out.right_bias);
  const double scaled = largest_beta * double(out.unit);
  const float error = out.left_error > out.right_error ? out.left_error : out.right_error;
  return coarse_slack(out, error, largest_beta, coarse_sigmoid(scaled).residual);
}

// One side of every chain of a group.
struct CoarseSide : GroupSide<int16_t> {
  int64_t words, acc_stride;
  const int32_t* couplings;  // of its own units, [n, couplings_ld], exact
  int64_t couplings_ld;
  const int16_t* bias;
  const float* exact_bias;
  float error;
  uint32_t* BinaryChain::* bits;
  const uint32_t* BinaryChain::* clamp;
  uint32_t* BinaryChain::* other;
};

// Units that the high bytes of their words leave open. Words of 32 units are appended without a branch, because which of them have
// open units cannot be predicted. Later, a vector of open units draws its low bits; what they leave open, because the word lies
// within the slack of the probability, takes exact sums.
class CoarseOpen {
 public:
  CoarseOpen(const BinarySweeps& p, const CoarseSide& side, int64_t num_other_words, int slack, float beta, uint64_t sweep)
      : p_(p), side_(side), num_other_words_(num_other_words), slack_(uint32_t(slack) << 16), beta_(beta), sweep_(sweep) {}
  struct alignas(64) Entry {
    uint16_t probability[32];  // that a unit is 1, or 0 if it is negative
    uint8_t byte[32];
    const BinaryChain* chain;
    uint32_t open, negative;  // the open units' bits are 0 meanwhile
    int32_t word;
  };
  // The entry to fill, which is kept if keep() says so.
  Entry& next() { return entry_[num_entries_]; }
  void keep(bool is_kept) { num_entries_ += is_kept; }
  bool is_full() const { return num_entries_ >= kEnough; }
  void close() {
    for (int e = 0; e < num_entries_; ++e) {
      const Entry& entry = entry_[e];
      const RandomStream s = random_stream(p_.seed, entry.chain->number, sweep_);
      c2_ = s.c2;
      for (uint32_t open = entry.open; open; open &= open - 1) {
        const int place = __builtin_ctz(open), l = count_;
        unit_[l] = 32 * entry.word + place;
        chain_[l] = entry.chain;
        picked_.set(l, side_.first_unit + unit_[l], s.c1, s.c3);
        high_[l] = uint32_t{entry.byte[place]} << 24;
        probability_[l] = uint32_t{entry.probability[place]} << 16;
        flip_[l] = 0 - (entry.negative >> place & 1);
        if (++count_ == kLanes) decide();
      }
    }
    num_entries_ = 0;
    if (count_) decide();
  }

 private:
  void decide() {
    const VecU word = load<VecU>(high_) | picked_.low_bits(c2_, uint32_t(p_.seed), uint32_t(p_.seed >> 32));
    const VecU flip = load<VecU>(flip_), probability = load<VecU>(probability_), flipped = word ^ flip;
    const VecU low = probability > slack_ ? probability - slack_ : VecU{},
               high = ~probability > slack_ ? probability + slack_ : ~VecU{};
    const uint32_t below = mask_of(flipped < low), undecided = mask_of(flipped <= high) & ~below & ((1u << count_) - 1);
    uint32_t ones = below ^ mask_of((VecI)flip);
    if (undecided) {
      alignas(64) int32_t sum[kLanes] = {};
      alignas(64) float bias[kLanes] = {};
      for (uint32_t rest = undecided; rest; rest &= rest - 1) {
        const int l = __builtin_ctz(rest);
        sum[l] = exact_sum(l);
        bias[l] = side_.exact_bias[unit_[l]];
      }
      const VecU exact = threshold_vector(logit_vector<false>(sum, bias, nullptr, beta_, p_.coupling.scale));
      ones = (ones & ~undecided) | (mask_of(word < exact) & undecided);
    }
    for (int l = 0; l < count_; ++l) (chain_[l]->*side_.bits)[unit_[l] / 32] |= (ones >> l & 1) << (unit_[l] % 32);
    count_ = 0;
  }
  int32_t exact_sum(int l) const {
    const int32_t* row = side_.couplings + unit_[l] * side_.couplings_ld;
    const uint32_t* active = chain_[l]->*side_.other;
    VecI sum = {};
    for (int64_t w = 0; w < num_other_words_; ++w)
      for (int part = 0; part < 32; part += kLanes) sum += load_where(active[w] >> part, row + 32 * w + part);
    return horizontal_sum<int32_t>(sum);
  }

  const BinarySweeps& p_;
  const CoarseSide& side_;
  const int64_t num_other_words_;
  const uint32_t slack_;
  const float beta_;
  const uint64_t sweep_;
  uint32_t c2_ = 0;
  int count_ = 0;
  PickedLanes picked_;
  alignas(64) uint32_t high_[kLanes] = {}, probability_[kLanes] = {}, flip_[kLanes] = {};
  const BinaryChain* chain_[kLanes] = {};
  int32_t unit_[kLanes] = {};
  static constexpr int kEnough = 64;
  int num_entries_ = 0;
  Entry entry_[kEnough + kMostCoarseUnits / 32];  // a chain's words are appended before anybody asks whether it is full
};

// Decides 32 units at a time against bounds.
#if GIBBS_VECTOR_BYTES == 64
class CoarseDraw {
 public:
  CoarseDraw(const CoarseSigmoid& s, int slack, bool negative_beta)
      : shift_(_mm_cvtsi32_si128(s.shift)),
        up_(_mm_cvtsi32_si128(16 - s.shift)),
        most_(_mm512_set1_epi16(int16_t((kSegments << s.shift) - 1))),
        slack_(_mm512_set1_epi16(int16_t(uint16_t(slack)))),
        slack_and_byte_(_mm512_set1_epi16(int16_t(uint16_t(slack < 65280 ? slack + 255 : 65535)))),
        flip_(negative_beta ? 0xffffffffu : 0) {
    for (int h = 0; h < 2; ++h) {
      base_[h] = _mm512_load_si512(s.base + 32 * h);
      slope_[h] = _mm512_load_si512(s.slope + 32 * h);
    }
  }
  // A unit whose logit is negative is 1 unless the complement of its word is less than the threshold of the opposite logit.
  // Returns the bits that are 1 for certain, or open.
  uint32_t operator()(const int16_t* acc, const int16_t* bias, const uint8_t* bytes, CoarseOpen::Entry& entry) const {
    const __m512i field = _mm512_add_epi16(_mm512_loadu_si512(acc), _mm512_loadu_si512(bias));
    const __mmask32 negative = _mm512_movepi16_mask(field) ^ flip_;
    const __m512i size = _mm512_min_epi16(_mm512_abs_epi16(field), most_), segment = _mm512_srl_epi16(size, shift_);
    const __m512i part = _mm512_srli_epi16(_mm512_sll_epi16(size, up_), 1);
    const __m512i base = _mm512_permutex2var_epi16(base_[0], segment, base_[1]);
    const __m512i slope = _mm512_permutex2var_epi16(slope_[0], segment, slope_[1]);
    const __m512i probability = _mm512_adds_epu16(base, _mm512_mulhrs_epi16(slope, part));
    const __m256i drawn = _mm256_loadu_si256((const __m256i*)bytes);
    const __m512i byte = _mm512_slli_epi16(_mm512_cvtepu8_epi16(drawn), 8);
    const __m512i high = _mm512_mask_blend_epi16(negative, byte, _mm512_xor_si512(byte, _mm512_set1_epi16(int16_t(0xff00))));
    const uint32_t below = _mm512_cmplt_epu16_mask(high, _mm512_subs_epu16(probability, slack_and_byte_));
    _mm512_store_si512(entry.probability, probability);
    _mm256_store_si256((__m256i*)entry.byte, drawn);
    entry.open = _mm512_cmplt_epu16_mask(high, _mm512_adds_epu16(probability, slack_)) & ~below;
    entry.negative = negative;
    return below ^ negative;
  }

 private:
  __m128i shift_, up_;
  __m512i most_, slack_, slack_and_byte_;
  __mmask32 flip_;
  __m512i base_[2], slope_[2];
};
#else
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
#endif

void sweep_coarse_kernel(const BinarySweeps& p, const CoarseCoupling& coarse, const BinaryChain* chains, int64_t count,
                         const GroupScratch& scratch) {
  const CoarseSide left = {{p.n1, 0, (int16_t*)scratch.acc_left, coarse.rows, padded_side(p.n2)},
                           state_words(p.n1),
                           padded_side(p.n1),
                           p.coupling.rows,
                           padded_row(p.n2),
                           coarse.left_bias,
                           chains->left_bias,
                           coarse.left_error,
                           &BinaryChain::left,
                           &BinaryChain::clamp_left,
                           &BinaryChain::right};
  const CoarseSide right = {{p.n2, p.n1, (int16_t*)scratch.acc_right, coarse.columns, padded_side(p.n1)},
                            state_words(p.n2),
                            padded_side(p.n2),
                            p.coupling.columns,
                            padded_row(p.n1),
                            coarse.right_bias,
                            chains->right_bias,
                            coarse.right_error,
                            &BinaryChain::right,
                            &BinaryChain::clamp_right,
                            &BinaryChain::left};
  const bool one_draw = p.n1 + p.n2 <= kOneDrawUnits;
  const int64_t left_end = (p.n1 + 127) / 128, right_begin = one_draw ? 0 : p.n1 / 128, right_end = (p.n1 + p.n2 + 127) / 128;
  const auto bytes_of = [&](int64_t c) {
    return scratch.bytes + (one_draw ? c : c % kByteChains) * random_bytes_capacity(p.n1 + p.n2);
  };
  const auto by_tables = [&](const CoarseSide& from, const CoarseSide& to) {
    propagate_by_tables(from, to, [&](int64_t c) { return chains[c].*from.bits; }, count, (int16_t*)scratch.table);
  };

  CoarseSigmoid sigmoid = {};
  float sigmoid_beta = 0;
  bool tables[2] = {true, true};  // of right and of left: whether they change the other side's sums by tables or by rows
  by_tables(left, right);
  int64_t work = 0;
  for (int64_t sweep = 0; sweep < p.num_sweeps; ++sweep) {
    if ((work += count * (p.n1 + p.n2)) > (1 << 18)) {
      work = 0;
      if (p.check.stop(p.check.context)) return;
    }
    const float beta = p.beta[sweep * p.beta_stride];
    if (sweep == 0 || beta != sigmoid_beta) {
      sigmoid_beta = beta;
      sigmoid = coarse_sigmoid(double(coarse.unit) * double(beta < 0 ? -beta : beta));
    }
    const uint64_t number = p.first_sweep + uint64_t(sweep);
    for (int half = 0; half < 2; ++half) {
      const bool is_left = half;
      const CoarseSide &side = is_left ? left : right, &other = is_left ? right : left;
      const int slack = coarse_slack(coarse, side.error, beta, sigmoid.residual);
      const CoarseDraw draw(sigmoid, slack, beta < 0);
      CoarseOpen open(p, side, other.words, slack, beta, number);
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
