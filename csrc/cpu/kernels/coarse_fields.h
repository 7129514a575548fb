// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. Fields of 16 bits (CoarseFields) give a probability of 16 bits by linear interpolation.
// The high byte of a unit's random word decides it in most cases; what it leaves open is decided by the low bits and perhaps the
// exact sum.

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
inline int coarse_slack(const CoarseFields& c, float error, double beta, float residual) {
  const double size = beta < 0 ? -beta : beta;
  const double slack =
      16384 * size * double(c.unit) * (double(error) + 0.6) + 0x1p-8 * size * double(c.range) + double(residual) + 5;
  return slack < 65535 ? int(slack) : 65535;
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
  int slack(float error) const { return coarse_slack(fields_, error, beta_, values_.residual); }

 private:
  void make(float beta) {
    beta_ = beta;
    values_ = coarse_sigmoid(double(fields_.unit) * double(beta < 0 ? -beta : beta));
  }
  const CoarseFields& fields_;
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
  OpenFields(const Exact& exact, int slack, float beta) : exact_(exact), slack_(uint32_t(slack) << 16), beta_(beta) {}
  // probability: that the unit is 1, or 0 if it is negative. Its bit `place` of *word is 0 until it is decided, at the latest by
  // close().
  void add(const typename Exact::Unit& unit, uint8_t byte, uint16_t probability, bool negative, uint32_t* word, int place) {
    const RandomStream s = exact_.stream(unit);
    c2_ = s.c2, k0_ = s.k0, k1_ = s.k1;
    const int l = count_;
    unit_[l] = unit;
    picked_.set(l, exact_.number(unit), s.c1, s.c3);
    high_[l] = uint32_t{byte} << 24;
    probability_[l] = uint32_t{probability} << 16;
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
    const VecU low = probability > slack_ ? probability - slack_ : VecU{},
               high = ~probability > slack_ ? probability + slack_ : ~VecU{};
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
  const uint32_t slack_;
  const float beta_;
  uint32_t c2_ = 0, k0_ = 0, k1_ = 0;
  int count_ = 0;
  PickedLanes picked_;
  alignas(64) uint32_t high_[kLanes] = {}, probability_[kLanes] = {}, flip_[kLanes] = {};
  typename Exact::Unit unit_[kLanes] = {};
  uint32_t* word_[kLanes] = {};
  int place_[kLanes] = {};
};

#if GIBBS_VECTOR_BYTES == 64

// Decides a unit in 32 chains against bounds.
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
  struct Result {
    uint32_t ones;  // for certain; without meaning where open
    uint32_t open, negative;
    __m512i probability;
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
    const uint32_t below = _mm512_cmplt_epu16_mask(word, _mm512_subs_epu16(probability, slack_and_byte_));
    const uint32_t open = _mm512_cmplt_epu16_mask(word, _mm512_adds_epu16(probability, slack_)) & ~below;
    return {below ^ negative, open, negative, probability};
  }

 private:
  __m128i shift_, up_;
  __m512i most_, slack_, slack_and_byte_;
  __mmask32 flip_;
  __m512i base_[2], slope_[2];
};

#endif
