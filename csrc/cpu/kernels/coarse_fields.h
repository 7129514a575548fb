// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. Fields of 16 bits (CoarseFields) give a probability of 16 bits by linear interpolation.
// The high byte of a unit's random word decides it in most cases; what it leaves open is decided by the low bits and perhaps the
// exact sum.

// A unit of a larger |logit| does the unexpected with a probability of e^-12, 0.4 of 2^-16.
constexpr double kCoarseReach = 12;
constexpr int kHopeless = INT32_MAX;

// What rounding numbers does to the sum of any of them: it is too large by middle(), and by at most largest() more or less.
struct RoundingErrors {
  VecI round(VecF x) {
    const VecI near = round_to_int(x);
    const VecF error = to_float(near) - x;
    above += error > 0.0f ? error : VecF{};
    below -= error < 0.0f ? error : VecF{};
    return near;
  }
  float middle() const { return (horizontal_sum<float>(above) - horizontal_sum<float>(below)) / 2; }
  float largest() const { return (horizontal_sum<float>(above) + horizontal_sum<float>(below)) / 2; }

  VecF above = {}, below = {};
};

// unit: of a field, times |beta|. With a shift of 9 the segments have all fields of 15 bits. With a shift of 0 the last field lies
// a segment before the reach.
inline int coarse_shift(double unit) {
  int shift = 0;
  while (shift < 9 && unit * double(kSegments << shift) < kCoarseReach) ++shift;
  return shift;
}

// Where |x| lies in a segment of length h, the sigmoid is concave, and lies above its chord by at most h^2 / 8 times the largest
// |second derivative|. The chord is raised by half of the distance in its middle.
// A field is off by the error, half a unit of the bias, and a tenth that is spare for float32: by as much as the sigmoid can rise
// meanwhile. A logit's three roundings to float32 add at most 2^-22 |beta| range / 4. Rounding the base of a segment, the product
// and this bound, and what lies beyond the last segment, come to less than 4; the rest of 5 is spare.
inline CoarseSigmoid coarse_sigmoid(const CoarseFields& fields, double beta) {
  const double size = beta < 0 ? -beta : beta, unit = double(fields.unit) * size;
  const auto curvature = [](double p) { return p * (1 - p) * (2 * p - 1); };
  CoarseSigmoid out;
  out.shift = coarse_shift(unit);
  const double length = unit * double(1 << out.shift), off = unit * (double(fields.error) + 0.6);
  const double over_half = __builtin_exp(-length / 2), over_off = __builtin_exp(off < 700 ? off : 700);
  out.slope_shift = 0;
  if constexpr (GIBBS_VECTOR_BYTES == 32)
    while (65536 * (1 / (1 + over_half * over_half) - 0.5) >= double(255 << out.slope_shift)) ++out.slope_shift;
  const double slope_unit = double(1 << out.slope_shift);
  const double constant = 5 + slope_unit / 2 + 0x1p-8 * size * double(fields.range);
  out.largest_slack = 0;
  double at_begin = 1, p = 0.5;  // exp(-x) and sigmoid(x) at the beginning of a segment
  for (int m = 0; m < kSegments; ++m) {
    const double at_middle = at_begin * over_half, at_end = at_middle * over_half;
    const double middle = 1 / (1 + at_middle), next = 1 / (1 + at_end);
    const double flattest = 0.0962250449;  // 3^-1.5 / 2, the largest curvature, at logit 1.317
    const bool has_flattest = length * m <= 1.317 && length * (m + 1) >= 1.316;
    const double most = has_flattest ? flattest : curvature(p) > curvature(next) ? curvature(p) : curvature(next);
    const double raise = (middle - (p + next) / 2) / 2, below = length * length / 8 * most - raise;
    const double base = 65536 * (p + raise);
    out.base[m] = uint16_t(base < 65535 ? base + 0.5 : 65535);
    // Of a segment of one field only the beginning is looked up.
    const double slope = out.shift ? 65536 * (next - p) / slope_unit + 0.5 : 0;
    out.slope[m] = int16_t(int(slope) << out.slope_shift);
    const double nearer = at_begin * over_off;  // exp(-x) where the true field may lie
    const double steepest = nearer < 1 ? nearer / ((1 + nearer) * (1 + nearer)) : 0.25;
    const double slack = 65536 * (steepest * off + (raise > below ? raise : below)) + constant;
    out.slack[m] = uint16_t(slack < 65535 ? slack : 65535);
    out.largest_slack = out.slack[m] > out.largest_slack ? out.slack[m] : out.largest_slack;
    at_begin = at_end;
    p = next;
  }
  return out;
}

// How a model's fields become probabilities at the beta that was set last.
class SigmoidOfBeta {
 public:
  explicit SigmoidOfBeta(const CoarseFields& fields) : fields_(fields) { make(0); }
  void set(float beta) {
    if (beta != beta_) make(beta);
  }
  float beta() const { return beta_; }
  const CoarseSigmoid& values() const { return values_; }

 private:
  void make(float beta) {
    beta_ = beta;
    values_ = coarse_sigmoid(fields_, beta);
  }
  const CoarseFields fields_;
  float beta_;
  CoarseSigmoid values_;
};

// Units that the high bytes of their words leave open. A vector of them draws its low bits; what they leave open, because the word
// lies within the slack of the probability, takes exact sums.
//   Exact: what decides for certain. Exact::Unit names a unit of a chain; exact.number(unit) is its number in the random counter,
//   exact.stream(unit) its chain's words, exact.sum(unit), exact.bias(unit) and exact.scale(unit) are its field.
template <class Exact>
class OpenFields {
 public:
  OpenFields(const Exact& exact, float beta) : exact_(exact), beta_(beta) {}
  // probability: that the unit is 1, or 0 if it is negative; slack: how far off it may be. Its bit `place` of *word is 0 until it is
  // decided, at the latest by close().
  void add(const typename Exact::Unit& unit, uint8_t byte, uint16_t probability, uint16_t slack, bool negative, uint32_t* word,
           int place) {
    const RandomStream s = exact_.stream(unit);
    c2_ = s.c2, k0_ = s.k0, k1_ = s.k1;
    const int l = count_;
    unit_[l] = unit;
    picked_.set(l, exact_.number(unit), s.c1, s.c3);
    high_[l] = uint32_t{byte} << 24;
    probability_[l] = uint32_t{probability} << 16;
    slack_[l] = uint32_t{slack} << 16;
    flip_[l] = 0 - uint32_t{negative};
    word_[l] = word;
    place_[l] = place;
    if (++count_ == kLanes) decide();
  }
  void close() {
    if (count_) decide();
  }

 private:
  void decide() {
    const VecU word = load<VecU>(high_) | picked_.low_bits(c2_, k0_, k1_);
    const VecU flip = load<VecU>(flip_), probability = load<VecU>(probability_), flipped = word ^ flip;
    const VecU slack = load<VecU>(slack_), low = probability > slack ? probability - slack : VecU{},
               high = ~probability > slack ? probability + slack : ~VecU{};
    const uint32_t below = mask_of(flipped < low), undecided = mask_of(flipped <= high) & ~below & ((1u << count_) - 1);
    uint32_t ones = below ^ mask_of((VecI)flip);
    if (undecided) {
      alignas(64) int32_t sum[kLanes] = {};
      alignas(64) float bias[kLanes] = {}, scale[kLanes] = {};
      for (uint32_t rest = undecided; rest; rest &= rest - 1) {
        const int l = __builtin_ctz(rest);
        sum[l] = exact_.sum(unit_[l]), bias[l] = exact_.bias(unit_[l]), scale[l] = exact_.scale(unit_[l]);
      }
      const VecU exact = threshold_vector(binary_logits(load<VecI>(sum), load<VecF>(scale), load<VecF>(bias), beta_));
      ones = (ones & ~undecided) | (mask_of(word < exact) & undecided);
    }
    for (int l = 0; l < count_; ++l) *word_[l] |= (ones >> l & 1) << place_[l];
    count_ = 0;
  }

  const Exact exact_;
  const float beta_;
  uint32_t c2_ = 0, k0_ = 0, k1_ = 0;
  int count_ = 0;
  PickedLanes picked_;
  alignas(64) uint32_t high_[kLanes] = {}, probability_[kLanes] = {}, slack_[kLanes] = {}, flip_[kLanes] = {};
  typename Exact::Unit unit_[kLanes] = {};
  uint32_t* word_[kLanes] = {};
  int place_[kLanes] = {};
};

#if GIBBS_VECTOR_BYTES == 64

// Decides a unit in 32 chains against bounds.
class CoarseDraw {
 public:
  CoarseDraw(const CoarseSigmoid& s, bool negative_beta)
      : shift_(_mm_cvtsi32_si128(s.shift)),
        up_(_mm_cvtsi32_si128(16 - s.shift)),
        most_(_mm512_set1_epi16(int16_t((kSegments << s.shift) - 1))),
        flip_(negative_beta ? 0xffffffffu : 0) {
    for (int h = 0; h < 2; ++h) {
      base_[h] = _mm512_load_si512(s.base + 32 * h);
      slope_[h] = _mm512_load_si512(s.slope + 32 * h);
      slack_[h] = _mm512_load_si512(s.slack + 32 * h);
    }
  }
  struct Result {
    uint32_t ones;  // for certain; without meaning where open
    uint32_t open, negative;
    __m512i probability, slack;
  };
  // A unit whose logit is negative is 1 unless the complement of its word is less than the threshold of the opposite logit.
  // byte: the high byte of the word, as the high byte of a lane.
  Result operator()(__m512i field, __m512i byte) const {
    const __mmask32 negative = _mm512_movepi16_mask(field) ^ flip_;
    const __m512i size = _mm512_min_epi16(_mm512_abs_epi16(field), most_), segment = _mm512_srl_epi16(size, shift_);
    const __m512i part = _mm512_srli_epi16(_mm512_sll_epi16(size, up_), 1);
    const __m512i base = _mm512_permutex2var_epi16(base_[0], segment, base_[1]);
    const __m512i slope = _mm512_permutex2var_epi16(slope_[0], segment, slope_[1]);
    const __m512i probability = _mm512_adds_epu16(base, _mm512_mulhrs_epi16(slope, part));
    const __m512i word = _mm512_mask_blend_epi16(negative, byte, _mm512_xor_si512(byte, _mm512_set1_epi16(int16_t(0xff00))));
    const __m512i slack = _mm512_permutex2var_epi16(slack_[0], segment, slack_[1]);
    const __m512i with_byte = _mm512_adds_epu16(slack, _mm512_set1_epi16(255));
    const uint32_t below = _mm512_cmplt_epu16_mask(word, _mm512_subs_epu16(probability, with_byte));
    const uint32_t open = _mm512_cmplt_epu16_mask(word, _mm512_adds_epu16(probability, slack)) & ~below;
    return {below ^ negative, open, negative, probability, slack};
  }

 private:
  __m128i shift_, up_;
  __m512i most_;
  __mmask32 flip_;
  __m512i base_[2], slope_[2], slack_[2];
};

// Draws vectors of 32 units. Which of them the high bytes leave open cannot be predicted, so those vectors are listed without a
// branch. Exact::Vector names a vector's units: its unit(lane) is one of them, its byte(lane) the high byte of that one's word.
template <class Exact>
class OpenVectors {
 public:
  OpenVectors(const Exact& exact, float beta) : fields_(exact, beta) {}
  // fixed: the units that keep their bits of *word
  void draw(const CoarseDraw::Result& drawn, uint32_t fixed, uint32_t* word, const typename Exact::Vector& vector) {
    const uint32_t open = drawn.open & ~fixed;
    *word = (drawn.ones & ~fixed & ~open) | (*word & fixed);
    Entry& next = entry_[count_];
    _mm512_store_si512(next.probability, drawn.probability);
    _mm512_store_si512(next.slack, drawn.slack);
    next.open = open, next.negative = drawn.negative, next.word = word, next.vector = vector;
    count_ += open != 0;
    if (count_ == kEnough) list_fields();
  }
  // Reads what the vectors refer to for the last time.
  void list_fields() {
    for (const Entry* e = entry_; e < entry_ + count_; ++e)
      for (uint32_t rest = e->open; rest; rest &= rest - 1) {
        const int l = __builtin_ctz(rest);
        fields_.add(e->vector.unit(l), e->vector.byte(l), e->probability[l], e->slack[l], e->negative >> l & 1, e->word, l);
      }
    count_ = 0;
  }
  void close() {
    list_fields();
    fields_.close();
  }

 private:
  struct alignas(64) Entry {
    uint16_t probability[32], slack[32];
    uint32_t open, negative;
    uint32_t* word;
    typename Exact::Vector vector;
  };
  OpenFields<Exact> fields_;
  int count_ = 0;
  static constexpr int kEnough = 32;
  Entry entry_[kEnough];
};

#endif
