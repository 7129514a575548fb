// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. Binary sweeps of single chains by fields of 16 bits, which the rows of units that flip keep
// up to date.

bool round_single_kernel(double largest_bias, double beta, int largest_slack, CoarseSingle& s) {
  const CouplingView& w = s.weight;
  const double larger = double(w.n1 > w.n2 ? w.n1 : w.n2), size = beta < 0 ? -beta : beta,
               sum = s.scale.largest_of_one_sign * (1 + 1e-3), saturated = sum + kCoarseReach / size,
               most_bias = largest_bias < saturated ? largest_bias : saturated;
  // Rounding adds at most n / 2 to a sum of couplings.
  const double least = (sum + most_bias) / (32766 - larger / 2);
  if (!(least > 1e-30 && least < 1e30)) return false;  // far from float32's limits
  const double unit = __builtin_exp2(__builtin_ceil(4 * __builtin_log2(least)) / 4);
  s.unit = float(unit), s.most_bias = float(most_bias);
  if (larger * power_of_two<double>(-s.scale.k) > 0.05 * unit) return false;  // the exact unit is nearly as coarse
  // A sigmoid's slope is at most a quarter. Half of the neighbours are active, and each is off by at most a half.
  if (0x1p16 / 4 * size * unit * larger / 4 > largest_slack) return false;
  const auto round_to = [&](const CouplingView& view, int16_t* rows, int64_t ld, int16_t* columns, int64_t columns_ld) {
    const double factor = 1 / double(s.unit);
    view.is_double ? round_couplings_of(view, factor, 0, view.n1, rows, ld, columns, columns_ld)
                   : round_couplings_of(view, float(factor), 0, view.n1, rows, ld, columns, columns_ld);
  };
  const int64_t ld1 = padded_side(w.n1), ld2 = padded_side(w.n2);
  if (w.column_stride != 1 && w.row_stride == 1)  // the transpose has contiguous rows
    round_to({w.data, w.is_double, w.n2, w.n1, w.column_stride, w.row_stride}, s.columns, ld1, s.rows, ld2);
  else
    round_to(w, s.rows, ld2, s.columns, ld1);
  return true;
}

// How fields become probabilities if up to `part` + 1 parts of n neighbours are active. Each is off by at most half a unit; the rest of
// the error is for exact couplings and for float32.
inline const CoarseSigmoid& sigmoid_of(SingleSigmoids& kept, bool is_left, int part, int64_t n, float beta) {
  CoarseSigmoid& out = kept.of[is_left][part];
  if (!kept.is_made[is_left][part]) {
    const float error = float(n) * float(part + 1) / (2 * kActiveParts) + 0.05f;
    out = coarse_sigmoid({kept.unit, 32768 * kept.unit, error}, double(beta));
    kept.is_made[is_left][part] = true;
  }
  return out;
}
inline SingleSigmoids& sigmoids_of(float unit, float beta, KeptSigmoids& kept) {
  for (SingleSigmoids& s : kept.of)
    if (s.unit == unit && s.beta == beta) return s;
  SingleSigmoids& out = kept.of[kept.next++ % kKeptSigmoids];
  out.unit = unit, out.beta = beta;
  __builtin_memset(out.is_made, 0, sizeof out.is_made);
  return out;
}

inline void round_single_biases(const float* bias, int64_t n, float most, float unit, int16_t* out) {
  const float factor = float(1 / double(unit));
  for (int64_t i = 0; i < n; i += kLanes) {
    const VecF x = load<VecF>(bias + i), low = x < -most ? splat(-most) : x;
    store_integers(out + i, round_to_int((low > most ? splat(most) : low) * factor));
  }
}

void sweep_single_kernel(const BinarySweeps& p, const CoarseSingle& s, KeptSigmoids& kept) {
  struct Side {
    int64_t n, words, first_unit, ld;  // ld: of rows to the other side
    const int16_t *rows, *bias;
    int16_t* field;
    const float* exact_bias;
    uint32_t* bits;
    const uint32_t* clamp;
  };
  const Side sides[2] = {{p.n2, state_words(p.n2), p.n1, padded_side(p.n1), s.columns, s.right_bias, s.right_field,
                          s.chain.right_bias, s.chain.right, s.chain.clamp_right},
                         {p.n1, state_words(p.n1), 0, padded_side(p.n2), s.rows, s.left_bias, s.left_field, s.chain.left_bias,
                          s.chain.left, s.chain.clamp_left}};
  round_single_biases(s.chain.right_bias, p.n2, s.most_bias, s.unit, s.right_bias);
  round_single_biases(s.chain.left_bias, p.n1, s.most_bias, s.unit, s.left_bias);
  const float beta = p.beta[0], scale = power_of_two<float>(-s.scale.k);
  SingleSigmoids& sigmoids = sigmoids_of(s.unit, beta, kept);
  const int64_t blocks = (p.n1 + p.n2 + 127) / 128;
  alignas(64) int32_t raised[kMostSingleUnits + 16], lowered[kMostSingleUnits + 16];
  alignas(64) uint16_t probability[kMostSingleUnits], slack[kMostSingleUnits];
  uint32_t before[kMostSingleUnits / 32], open[kMostSingleUnits / 32], negative[kMostSingleUnits / 32];

  // Changes the other side's fields from a side's old bits to its new ones; from none where there are no old ones.
  const auto propagate = [&](const Side& from, const Side& to, const uint32_t* old) {
    int32_t *last_raised = raised, *last_lowered = lowered;
    if (!old) __builtin_memcpy(to.field, to.bias, size_t(padded_side(to.n)) * 2);
    for (int64_t w = 0; w < from.words; ++w) {
      const uint32_t was = old ? old[w] : 0;
      last_raised = list_bits(from.bits[w] & ~was, int32_t(32 * w), last_raised);
      last_lowered = list_bits(was & ~from.bits[w], int32_t(32 * w), last_lowered);
    }
    add_rows(from.rows, from.ld, raised, last_raised - raised, lowered, last_lowered - lowered, to.field);
  };
  const auto update = [&](const RandomStream& random, const uint8_t* bytes, const bool is_left, bool is_first, bool is_last) {
    const Side &side = sides[is_left], &other = sides[!is_left];
    int64_t active = 0;
    for (int64_t w = 0; w < other.words; ++w) active += __builtin_popcount(other.bits[w]);
    int part = 0;
    for (int k = 1; k < kActiveParts; ++k) part += kActiveParts * active > k * other.n;
    const CoarseSigmoid& sigmoid = sigmoid_of(sigmoids, is_left, part, other.n, beta);
    const CoarseDraw decide(sigmoid, beta < 0);
    int64_t flips = 0, now_active = 0;
    for (int64_t w = 0; w < side.words; ++w) {
      const __m256i high = _mm256_loadu_si256((const __m256i*)(bytes + side.first_unit + 32 * w));
      const CoarseDraw::Result drawn =
          decide(_mm512_load_si512(side.field + 32 * w), _mm512_slli_epi16(_mm512_cvtepu8_epi16(high), 8));
      const uint32_t exists = side.n - 32 * w >= 32 ? 0xffffffffu : (1u << (side.n - 32 * w)) - 1;
      const uint32_t fixed = ~exists | (side.clamp ? side.clamp[w] : 0), kept_bits = fixed | drawn.open;
      _mm512_store_si512(probability + 32 * w, drawn.probability);
      _mm512_store_si512(slack + 32 * w, drawn.slack);
      open[w] = drawn.open & ~fixed, negative[w] = drawn.negative;
      before[w] = side.bits[w];
      side.bits[w] = (drawn.ones & ~kept_bits) | (before[w] & kept_bits);  // open units flip later, if they do
      flips += __builtin_popcount(side.bits[w] ^ before[w]), now_active += __builtin_popcount(side.bits[w]);
    }
    // The delays of deciding open units and of adding rows overlap, because neither waits for the other.
    int32_t late_raised[kMostSingleUnits], late_lowered[kMostSingleUnits];
    int64_t num_raised = 0, num_lowered = 0;
    uint32_t late[kMostSingleUnits / 32];
    for (int64_t w = 0; w < side.words; ++w) {
      late[w] = 0;
      for (uint32_t rest = open[w]; rest; rest &= rest - 1) {
        const int l = __builtin_ctz(rest);
        const int64_t unit = 32 * w + l;
        const uint32_t word =
            uint32_t{bytes[side.first_unit + unit]} << 24 | random_low_bits(random, uint32_t(side.first_unit + unit));
        const uint32_t flip = 0 - (negative[w] >> l & 1), flipped = word ^ flip, about = uint32_t{probability[unit]} << 16,
                       off = uint32_t{slack[unit]} << 16;
        bool one = (flipped < about) != (flip & 1);
        if ((flipped < about ? about - flipped : flipped - about) <= off) {
          const int32_t sum = s.weight.is_double ? exact_sum<double>(s.weight, s.scale.k, is_left, unit, other.bits)
                                                 : exact_sum<float>(s.weight, s.scale.k, is_left, unit, other.bits);
          one = word < threshold(binary_logit(sum, scale, side.exact_bias[unit], beta));
        }
        const bool was = before[w] >> l & 1;
        late_raised[num_raised] = late_lowered[num_lowered] = int32_t(unit);
        num_raised += one && !was, num_lowered += was && !one;
        late[w] |= uint32_t(one != was) << l;
      }
    }
    if (!is_last) {
      propagate(side, other, is_first || flips > now_active ? nullptr : before);
      if (num_raised + num_lowered) add_rows(side.rows, side.ld, late_raised, num_raised, late_lowered, num_lowered, other.field);
    }
    for (int64_t w = 0; w < side.words; ++w) side.bits[w] ^= late[w];
  };

  propagate(sides[1], sides[0], nullptr);
  StopClock clock(p.check);
  for (int64_t sweep = 0; sweep < p.num_sweeps; ++sweep) {
    if (clock.stops(p.n1 + p.n2)) return;
    const RandomStream random = random_stream(p.seed, s.chain.number, p.first_sweep + uint64_t(sweep));
    uint8_t* bytes = s.bytes + sweep % 2 * random_bytes_capacity(p.n1 + p.n2);
    if (sweep % 2 == 0)
      random_bytes_of_two(random, random_stream(p.seed, s.chain.number, p.first_sweep + uint64_t(sweep) + 1), blocks, bytes,
                          bytes + random_bytes_capacity(p.n1 + p.n2));
    update(random, bytes, false, sweep == 0, false);
    update(random, bytes, true, false, sweep + 1 == p.num_sweeps);
  }
}
