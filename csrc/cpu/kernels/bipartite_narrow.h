// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. Binary sweeps of single chains by couplings rounded to 16 bits (NarrowCoupling).

// The exact sum of one unit's active couplings, as RoundedCoupling would give it.
template <class T>
inline int32_t exact_sum(const CouplingView& w, int k, bool is_left, int64_t unit, const uint32_t* other_bits) {
  const T factor = power_of_two<T>(k);
  const T* first = (const T*)w.data + unit * (is_left ? w.row_stride : w.column_stride);
  const int64_t stride = is_left ? w.column_stride : w.row_stride, n = is_left ? w.n2 : w.n1;
#if GIBBS_X86 && GIBBS_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    VecI sum = {};
    constexpr int64_t kChunk = 256;
    for (int64_t begin = 0; begin < n; begin += kChunk) {
      const int64_t count = n - begin < kChunk ? n - begin : kChunk;
      T packed[kChunk];
      const T* from = first + begin;
      if (stride != 1) {  // a copy by scalars is no slower than gathers
        for (int64_t i = 0; i < count; ++i) packed[i] = first[(begin + i) * stride];
        from = packed;
      }
      for (int64_t i = 0; i < count; i += kLanes) {
        const auto active = __mmask16(other_bits[(begin + i) / 32] >> (i % 32));
        sum += round_to_int((VecF)_mm512_maskz_loadu_ps(active, from + i) * factor);
      }
    }
    return horizontal_sum<int32_t>(sum);
  }
#endif
  int32_t sum = 0;
  for (int64_t word = 0; word < state_words(n); ++word)
    for (uint32_t b = other_bits[word]; b; b &= b - 1) sum += rounded(first[(32 * word + __builtin_ctz(b)) * stride], factor);
  return sum;
}

// Bound on the distance of a threshold made of narrow sums from the true one, in units of 2^-32.
//   Each of `active` couplings is off by at most half a narrow unit and half a wide one. A logit's three roundings add at most
//   2^-24 beta (3 |sum| + 2 |bias|); sigmoid's slope is at most 1/4; threshold() is within 178 of sigmoid.
//   |sum| < 2^(31 - k). A bias that exceeds this by 91 / beta saturates both thresholds, so its excess adds no error.
inline uint32_t narrow_slack(int64_t active, int shift, int k, float beta, float largest_bias) {
  const double size = beta < 0 ? -double(beta) : double(beta), unit = power_of_two<double>(-k), sum = unit * 0x1p31;
  const double bias = size * double(largest_bias) < size * sum + 91 ? size * double(largest_bias) : size * sum + 91;
  const double logit = size * double(active) * unit * (0.5 * power_of_two<double>(shift) + 0.5) + 0x1p-21 * (size * sum + bias);
  const double slack = 400 + 0x1p30 * logit;
  return slack < 4294967295.0 ? uint32_t(slack) : 0xffffffffu;
}

inline void sweep_narrow_chain(const BinarySweeps& p, const BinaryChain& chain, const GroupScratch& scratch) {
  struct Side {
    int64_t n, first_unit, words, ld;
    const int16_t* rows;
    int32_t* acc;
    const float* bias;
    float largest_bias;
    uint32_t* bits;
    const uint32_t* clamp;
  };
  const float largest_left = largest_magnitude(chain.left_bias, p.n1), largest_right = largest_magnitude(chain.right_bias, p.n2);
  const Side left = {
      p.n1,         0,          state_words(p.n1), padded_row(p.n2), p.narrow.rows, scratch.acc_left, chain.left_bias,
      largest_left, chain.left, chain.clamp_left};
  const Side right = {
      p.n2,          p.n1,        state_words(p.n2), padded_row(p.n1), p.narrow.columns, scratch.acc_right, chain.right_bias,
      largest_right, chain.right, chain.clamp_right};
  const auto start = [&](const Side& from, const Side& to) {
    __builtin_memset(to.acc, 0, size_t(padded_side(to.n)) * 4);
    int32_t* end = scratch.raised;
    for (int64_t w = 0; w < from.words; ++w) end = list_bits(from.bits[w], int32_t(32 * w), end);
    add_rows(from.rows, from.ld, scratch.raised, end - scratch.raised, nullptr, 0, to.acc);
  };
  start(left, right);
  start(right, left);
  const float narrow_scale = power_of_two<float>(p.narrow.shift - p.k);
  StopClock clock(p.check);
  for (int64_t sweep = 0; sweep < p.num_sweeps; ++sweep) {
    if (clock.stops(p.n1 + p.n2)) return;
    const float beta = p.beta[sweep * p.beta_stride];
    const RandomStream random = random_stream(p.seed, chain.number, p.first_sweep + uint64_t(sweep));
    random_bytes(random, 0, (p.n1 + p.n2 + 127) / 128, scratch.bytes);
    const auto update = [&](const Side& side, const Side& other) {
      int64_t active = 0;
      for (int64_t w = 0; w < other.words; ++w) active += __builtin_popcount(other.bits[w]);
      const uint32_t slack = narrow_slack(active, p.narrow.shift, p.k, beta, side.largest_bias);
      int32_t *raised = scratch.raised, *lowered = scratch.lowered;
      constexpr int kVectors = 32 / kLanes;
      for (int64_t i = 0; i < side.n; i += 32) {
        VecU low[kVectors], high[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          const int64_t at = i + v * kLanes;
          const VecU t = threshold_vector(logit_vector<false>(side.acc + at, side.bias + at, nullptr, beta, narrow_scale));
          low[v] = (t > slack ? t : splat(slack)) - slack;
          high[v] = (t < ~slack ? t : splat(~slack)) + slack;
        }
        const uint8_t* bytes = scratch.bytes + side.first_unit + i;
        uint32_t ones, low_ties, below_high, high_ties;
        compare_high_bytes(low, bytes, ones, low_ties);
        compare_high_bytes(high, bytes, below_high, high_ties);
        const uint32_t valid = side.n - i >= 32 ? 0xffffffffu : (1u << (side.n - i)) - 1;
        for (uint32_t open = (below_high | high_ties) & ~ones & valid; open; open &= open - 1) {
          const int l = __builtin_ctz(open);
          uint32_t t_low, t_high;
          __builtin_memcpy(&t_low, (const char*)low + 4 * l, 4);
          __builtin_memcpy(&t_high, (const char*)high + 4 * l, 4);
          const uint32_t word = uint32_t(bytes[l]) << 24 | random_low_bits(random, uint32_t(side.first_unit + i + l));
          bool one = word < t_low;
          if (!one && word < t_high) {
            const bool is_left = &side == &left;
            const int32_t sum = p.weight.is_double ? exact_sum<double>(p.weight, p.k, is_left, i + l, other.bits)
                                                   : exact_sum<float>(p.weight, p.k, is_left, i + l, other.bits);
            one = word < threshold(binary_logit(sum, p.coupling.scale, side.bias[i + l], beta));
          }
          ones |= uint32_t(one) << l;
        }
        ones &= valid;
        const uint32_t before = side.bits[i / 32];
        const uint32_t now = side.clamp ? (ones & ~side.clamp[i / 32]) | (before & side.clamp[i / 32]) : ones;
        side.bits[i / 32] = now;
        raised = list_bits(now & ~before, int32_t(i), raised);
        lowered = list_bits(before & ~now, int32_t(i), lowered);
      }
      add_rows(side.rows, side.ld, scratch.raised, raised - scratch.raised, scratch.lowered, lowered - scratch.lowered, other.acc);
    };
    update(right, left);
    update(left, right);
  }
}

void sweep_narrow_kernel(const BinarySweeps& p, const BinaryChain* chains, int64_t count, const GroupScratch& scratch) {
  for (int64_t c = 0; c < count; ++c) sweep_narrow_chain(p, chains[c], scratch);
}
