// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. Binary sweeps of a few chains, one after the other, whose fields have 16 bits: 32
// units of a colour side by side. The state's bits lie in registers, from which an instruction fetches words by their number.

// Words of 16 bits of the state that codes name. A code has the word's number in its low bits.
template <int kRegisters>
inline __m512i fetch_words(const __m512i* state, __m512i codes) {
  if constexpr (kRegisters == 1) {
    return _mm512_permutexvar_epi16(codes, state[0]);
  } else if constexpr (kRegisters == 2) {
    return _mm512_permutex2var_epi16(state[0], codes, state[1]);
  } else {
    constexpr int kHalf = kRegisters / 2;
    const __mmask32 upper = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(kHalf * kUnitsVector));
    return _mm512_mask_blend_epi16(upper, fetch_words<kHalf>(state, codes), fetch_words<kHalf>(state + kHalf, codes));
  }
}

// The fields of vectors begin .. end - 1. Not inlined, so that the state stays in registers.
template <int kRegisters>
__attribute__((noinline)) void sum_units_of(const CoarseUnits& m, const uint32_t* bits, int64_t begin, int64_t end,
                                            int16_t* fields) {
  __m512i state[kRegisters];
  for (int r = 0; r < kRegisters; ++r) state[r] = _mm512_loadu_si512(bits + r * 16);
  for (int64_t v = begin; v < end; ++v) {
    __m512i field = _mm512_loadu_si512(m.bias + v * kUnitsVector);
    for (int64_t row = m.rows[v]; row < m.rows[v + 1]; ++row) {
      const __m512i codes = _mm512_loadu_si512(m.neighbors + row * kUnitsVector);
      const __m512i words = _mm512_sllv_epi16(fetch_words<kRegisters>(state, codes), _mm512_srli_epi16(codes, 12));
      field = _mm512_mask_add_epi16(field, _mm512_movepi16_mask(words), field, _mm512_loadu_si512(m.coupling + row * kUnitsVector));
    }
    _mm512_storeu_si512(fields + v * kUnitsVector, field);
  }
}

// The random high bytes of a vector's units, as high bytes of lanes.
inline __m512i bytes_of_units(const CoarseUnits& m, const CoarseChain& c, int64_t v) {
  const int32_t from = m.first_byte[v];
  if (from < 0) {
    alignas(64) uint16_t lanes[kUnitsVector];
    for (int l = 0; l < kUnitsVector; ++l) lanes[l] = uint16_t(c.bytes[m.nodes[v * kUnitsVector + l]] << 8);
    return _mm512_load_si512(lanes);
  }
  const __m512i places = _mm512_loadu_si512(m.byte_places + v * kUnitsVector);
  __m512i window[4];
  for (int r = 0; r < 4; ++r) window[r] = _mm512_loadu_si512(c.bytes + from + 64 * r);
  // The sign of a place says which byte of a word it is.
  const __m512i pairs = fetch_words<4>(window, places);
  const __m512i high = _mm512_and_si512(pairs, _mm512_set1_epi16(int16_t(0xff00)));
  return _mm512_mask_blend_epi16(_mm512_movepi16_mask(places), _mm512_slli_epi16(pairs, 8), high);
}

struct ExactUnits {
  struct Unit {
    int32_t position, chain;
  };
  struct Vector {
    Unit unit(int lane) const { return {vector * kUnitsVector + lane, chain}; }
    uint8_t byte(int lane) const { return bytes[nodes[vector * kUnitsVector + lane]]; }
    int32_t vector, chain;
    const int32_t* nodes;
    const uint8_t* bytes;  // by node
  };
  int64_t number(const Unit& u) const { return m.nodes[u.position]; }
  RandomStream stream(const Unit& u) const { return random[u.chain]; }
  float bias(const Unit& u) const { return m.exact_bias[m.nodes[u.position]]; }
  float scale(const Unit&) const { return m.scale; }
  int32_t sum(const Unit& u) const {
    const GraphView& g = m.graph;
    const int64_t at = m.row_of_position[u.position];
    int32_t total = 0;
    for (int32_t h = g.row_offsets[at]; h < g.row_offsets[at + 1]; ++h) {
      const int32_t other = m.position_of_node[g.neighbors[h]];
      total += m.exact_coupling[h] & -int32_t(chains[u.chain].state[other / 32] >> other % 32 & 1);
    }
    return total;
  }

  const CoarseUnits& m;
  const CoarseChain* chains;
  const RandomStream* random;
};

void sweep_coarse_units_kernel(const GraphSweeps& p, const CoarseUnits& m, const CoarseChain* chains, int count, int16_t* fields) {
  const GraphView& g = p.graph;
  const int64_t num_vectors = m.color_offsets[g.num_colors];
  const auto sum_units = num_vectors <= 16    ? sum_units_of<1>
                         : num_vectors <= 32  ? sum_units_of<2>
                         : num_vectors <= 64  ? sum_units_of<4>
                         : num_vectors <= 128 ? sum_units_of<8>
                                              : sum_units_of<16>;
  SigmoidOfBeta sigmoid(m.fields);
  for (int64_t sweep = 0; sweep < p.num_sweeps; ++sweep) {
    if (p.check.stop(p.check.context)) return;
    sigmoid.set(p.beta[sweep * p.beta_stride]);
    const CoarseDraw decide(sigmoid.values(), sigmoid.beta() < 0);
    RandomStream random[kUnitsChains];
    for (int i = 0; i < count; ++i) {
      random[i] = random_stream(p.seed, chains[i].number, p.first_sweep + uint64_t(sweep));
      random_bytes(random[i], 0, (g.num_nodes + 127) / 128, chains[i].bytes);
    }
    OpenVectors<ExactUnits> open({m, chains, random}, sigmoid.beta());
    for (int64_t color = 0; color < g.num_colors; ++color) {
      const int64_t begin = m.color_offsets[color], end = m.color_offsets[color + 1];
      for (int i = 0; i < count; ++i) {
        const CoarseChain& c = chains[i];
        sum_units(m, c.state, begin, end, fields);
        for (int64_t v = begin; v < end; ++v) {
          const __m512i field = _mm512_loadu_si512(fields + v * kUnitsVector);
          open.draw(decide(field, bytes_of_units(m, c, v)), c.fixed[v], c.state + v, {int32_t(v), i, m.nodes, c.bytes});
        }
      }
      open.close();
    }
  }
}
