// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. Binary sweeps of a group of 64 chains whose fields have 16 bits. A lane is a chain, and
// half of the chains fill a vector.

constexpr int kCoarseLanes = 32;

// ---- couplings and biases in units of a field -----------------------------------------------------------------------------------

// Vectors of kGroup integers of two parts, as lanes in the order of bits.
inline __m512i interleaved(VecI even, VecI odd) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)even, _mm512_slli_epi32((__m512i)odd, 16));
}

// The largest sum of |couplings| of a unit.
inline double largest_sum(const GraphView& g, const CoarseGroup& b) {
  double most = 0;
  if (!b.shared_coupling) {  // fixed point keeps sums below 31 bits
    for (float scale : b.scale) most = double(scale) > most ? double(scale) : most;
    return 0x1p31 * most;
  }
  for (int64_t pos = 0; pos < g.num_nodes; ++pos) {
    int64_t sum = 0;
    for (int32_t h = g.row_offsets[pos]; h < g.row_offsets[pos + 1]; ++h) {
      const int64_t c = b.exact_coupling[0][h];
      sum += c < 0 ? -c : c;
    }
    most = double(sum) > most ? double(sum) : most;
  }
  return most * double(b.scale[0]);
}

// Both return the largest error of a sum but for what float32 adds.
inline float round_shared_couplings(const GraphView& g, const CoarseGroup& b) {
  const float factor = b.scale[0] / b.fields.unit;
  float largest = 0;
  for (int64_t pos = 0; pos < g.num_nodes; ++pos) {
    RoundingErrors errors;
    for (int64_t h = g.row_offsets[pos]; h < g.row_offsets[pos + 1]; h += kLanes) {
      const int64_t count = g.row_offsets[pos + 1] - h;
      const VecI near = errors.round(to_float(load_part(b.exact_coupling[0] + h, count)) * factor);
      const __mmask16 used = count < kLanes ? __mmask16((1u << count) - 1) : __mmask16(0xffff);
      _mm512_mask_cvtepi32_storeu_epi16(b.coupling + h, used, (__m512i)near);
    }
    b.offset[pos] = errors.middle();
    largest = errors.largest() > largest ? errors.largest() : largest;
  }
  return largest * 1.001f;
}
inline float round_own_couplings(const GraphView& g, const CoarseGroup& b) {
  VecF factor[kCoarseParts];
  for (int part = 0; part < kCoarseParts; ++part) factor[part] = load<VecF>(b.scale + part * kGroup) / b.fields.unit;
  const auto near = [&](int part, int64_t e) {
    return round_to_int(to_float(load<VecI>(b.exact_coupling[part] + e * kGroup)) * factor[part]);
  };
  for (int64_t e = 0; e < g.num_edges; ++e)
    for (int h = 0; h < 2; ++h) store(b.coupling + e * kCoarseGroup + h * kCoarseLanes, interleaved(near(h, e), near(h + 2, e)));
  return 0.5f * float(g.max_degree);
}

// Rounds couplings and biases for betas whose magnitudes lie between two bounds. Returns the slack; kHopeless if it did not try.
int round_coarse_graph_kernel(const GraphView& g, double least_beta, double largest_beta, CoarseGroup& b) {
  if (g.max_degree > kMostCoarseUnits) return kHopeless;
  float largest_bias = 0;
  for (int part = 0; part < (b.shared_bias ? 1 : kCoarseParts); ++part) {
    const float of_part = largest_magnitude(b.exact_bias[part], g.num_nodes * (b.shared_bias ? 1 : kGroup));
    largest_bias = of_part > largest_bias ? of_part : largest_bias;
  }
  const double sum = largest_sum(g, b);
  // A larger |bias| saturates a unit, whatever its neighbours do.
  const double saturated = sum + kCoarseReach / least_beta;
  const double most_bias = double(largest_bias) < saturated ? double(largest_bias) : saturated;
  // Rounding adds at most a half for each coupling and for the bias, and the offset is at most a quarter of the degree.
  const double unit = (sum + most_bias) / (32750 - double(g.max_degree));
  if (unit * largest_beta >= kCoarseReach || unit > 1e30 || (unit > 0 && unit < 1e-30)) return kHopeless;
  b.fields = {float(unit > 0 ? unit : 1), float(sum + most_bias), 0};
  // Couplings and their products were rounded to float32, by 2^-23 of themselves, whose sum is below 2^15 units.
  b.fields.error = 0.02f + (b.shared_coupling ? round_shared_couplings(g, b) : round_own_couplings(g, b));

  const float most = float(most_bias), per_unit = 1 / b.fields.unit;
  const auto clipped = [&](VecF x) { return (x < -most ? splat(-most) : x > most ? splat(most) : x) * per_unit; };
  for (int64_t pos = 0; pos < g.num_nodes; ++pos) {
    const int64_t node = g.order[pos];
    const float offset = b.shared_coupling ? b.offset[pos] : 0;
    const auto near = [&](int part) { return round_to_int(clipped(load<VecF>(b.exact_bias[part] + node * kGroup)) - offset); };
    if (b.shared_bias)
      b.bias[node] = int16_t(round_to_int(clipped(splat(b.exact_bias[0][node])) - offset)[0]);
    else
      for (int h = 0; h < 2; ++h) store(b.bias + node * kCoarseGroup + h * kCoarseLanes, interleaved(near(h), near(h + 2)));
  }
  return coarse_sigmoid(b.fields, largest_beta).largest_slack;
}

// ---- sweeps ---------------------------------------------------------------------------------------------------------------------

inline int chain_of_coarse_bit(int bit) { return chain_of_byte(byte_of_coarse_bit(bit)); }

// What decides those units for certain that fields leave open.
struct ExactGraph {
  struct Unit {
    int32_t position, bit;
  };
  int64_t number(const Unit& u) const { return g.order[u.position]; }
  RandomStream stream(const Unit& u) const { return random_stream(seed, b.number[chain_of_coarse_bit(u.bit)], sweep); }
  float bias(const Unit& u) const {
    const int chain = chain_of_coarse_bit(u.bit);
    const int64_t node = g.order[u.position];
    return b.shared_bias ? b.exact_bias[0][node] : b.exact_bias[chain / kGroup][node * kGroup + chain % kGroup];
  }
  float scale(const Unit& u) const { return b.scale[chain_of_coarse_bit(u.bit)]; }
  int32_t sum(const Unit& u) const {
    const int chain = chain_of_coarse_bit(u.bit);
    int32_t total = 0;
    for (int32_t h = g.row_offsets[u.position]; h < g.row_offsets[u.position + 1]; ++h) {
      const int32_t coupling = b.shared_coupling
                                   ? b.exact_coupling[0][h]
                                   : b.exact_coupling[chain / kGroup][int64_t{g.edge_of[h]} * kGroup + chain % kGroup];
      total += coupling & -int32_t(b.state[2 * g.neighbors[h] + u.bit / kCoarseLanes] >> u.bit % kCoarseLanes & 1);
    }
    return total;
  }

  const GraphView& g;
  const CoarseGroup& b;
  uint64_t seed, sweep;
};

// A unit some of whose chains the high bytes leave open, listed as OpenVectors lists vectors; two of those to a unit take up to a
// tenth longer.
struct alignas(64) OpenCoarseUnit {
  uint16_t probability[kCoarseGroup], slack[kCoarseGroup];
  uint64_t open, negative;
  int64_t position;
};

inline uint64_t words_of_unit(const uint32_t* words) {
  uint64_t both;
  __builtin_memcpy(&both, words, sizeof both);
  return both;
}

template <bool kSharedCoupling, bool kSharedBias>
void sweep_coarse_graph_of(const GraphSweeps& p, const CoarseGroup& b) {
  const GraphView& g = p.graph;
  constexpr int kEnough = 32;
  OpenCoarseUnit found[kEnough];
  SigmoidOfBeta sigmoid(b.fields);
  for (int64_t sweep = 0; sweep < p.num_sweeps; ++sweep) {
    if (p.check.stop(p.check.context)) return;
    sigmoid.set(p.beta[sweep * p.beta_stride]);
    const uint64_t number = p.first_sweep + uint64_t(sweep);
    const CoarseDraw decide(sigmoid.values(), sigmoid.beta() < 0);
    OpenFields<ExactGraph> open({g, b, p.seed, number}, sigmoid.beta());
    draw_table_bytes(p.seed, b.number, number, g.num_nodes, b.bytes);
    int num_found = 0;
    const auto close = [&] {
      for (const OpenCoarseUnit* f = found; f < found + num_found; ++f) {
        const int64_t node = g.order[f->position];
        for (uint64_t rest = f->open; rest; rest &= rest - 1) {
          const int bit = __builtin_ctzll(rest), half = bit / kCoarseLanes;
          open.add({int32_t(f->position), bit}, b.bytes[node * kCoarseGroup + bit % kCoarseLanes * 2 + half], f->probability[bit],
                   f->slack[bit], f->negative >> bit & 1, b.state + 2 * node + half, bit % kCoarseLanes);
        }
      }
      num_found = 0;
    };
    for (int64_t color = 0; color < g.num_colors; ++color) {
      for (int64_t pos = g.color_offsets[color]; pos < g.color_offsets[color + 1]; ++pos) {
        const int64_t node = g.order[pos];
        __m512i field[2];
        for (int h = 0; h < 2; ++h)
          field[h] =
              kSharedBias ? _mm512_set1_epi16(b.bias[node]) : _mm512_loadu_si512(b.bias + node * kCoarseGroup + h * kCoarseLanes);
        for (int64_t e = g.row_offsets[pos]; e < g.row_offsets[pos + 1]; ++e) {
          const uint32_t* active = b.state + 2 * int64_t{g.neighbors[e]};
          const int16_t* coupling = b.coupling + (kSharedCoupling ? e : int64_t{g.edge_of[e]} * kCoarseGroup);
          for (int h = 0; h < 2; ++h) {
            const __m512i add = kSharedCoupling ? _mm512_set1_epi16(*coupling) : _mm512_loadu_si512(coupling + h * kCoarseLanes);
            field[h] = _mm512_mask_add_epi16(field[h], active[h], field[h], add);
          }
        }
        const __m512i row = _mm512_loadu_si512(b.bytes + node * kCoarseGroup);
        const auto low = decide(field[0], _mm512_slli_epi16(row, 8));
        const auto high = decide(field[1], _mm512_and_si512(row, _mm512_set1_epi16(int16_t(0xff00))));
        const auto joined = [](uint32_t a, uint32_t c) { return a | uint64_t{c} << 32; };
        const uint64_t fixed = words_of_unit(b.fixed + 2 * node), is_open = joined(low.open, high.open) & ~fixed;
        const uint64_t ones = joined(low.ones, high.ones) & ~fixed & ~is_open, before = words_of_unit(b.state + 2 * node);
        store(b.state + 2 * node, ones | (before & fixed));
        OpenCoarseUnit& next = found[num_found];
        _mm512_store_si512(next.probability, low.probability);
        _mm512_store_si512(next.probability + kCoarseLanes, high.probability);
        _mm512_store_si512(next.slack, low.slack);
        _mm512_store_si512(next.slack + kCoarseLanes, high.slack);
        next.open = is_open, next.negative = joined(low.negative, high.negative), next.position = pos;
        num_found += is_open != 0;
        if (num_found == kEnough) close();
      }
      close();
      open.close();
    }
  }
}
void sweep_coarse_graph_kernel(const GraphSweeps& p, const CoarseGroup& b) {
  if (!b.shared_coupling)
    sweep_coarse_graph_of<false, false>(p, b);
  else
    b.shared_bias ? sweep_coarse_graph_of<true, true>(p, b) : sweep_coarse_graph_of<true, false>(p, b);
}
