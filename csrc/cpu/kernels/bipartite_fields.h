// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. What decides those units of a side for certain that fields of 16 bits leave open.

struct ExactSide {
  struct Unit {
    const BinaryChain* chain;
    int32_t unit;
  };
  // A unit of consecutive chains.
  struct Vector {
    Unit unit(int lane) const { return {chains + lane, of_chains}; }
    uint8_t byte(int lane) const { return uint8_t(bytes[lane] >> 8); }
    const BinaryChain* chains;
    int32_t of_chains;
    const uint16_t* bytes;  // of these chains, as the high bytes of lanes
  };
  ExactSide at_sweep(uint64_t number) const {
    ExactSide out = *this;
    out.sweep = number;
    return out;
  }
  int64_t number(const Unit& u) const { return first_unit + u.unit; }
  RandomStream stream(const Unit& u) const { return random_stream(seed, u.chain->number, sweep); }
  float bias(const Unit& u) const { return (u.chain->*bias_of)[u.unit]; }
  float scale(const Unit&) const { return scale_of_all; }
  int32_t sum(const Unit& u) const {
    const int32_t* row = couplings + u.unit * ld;
    const uint32_t* active = u.chain->*other;
    VecI sum = {};
    for (int64_t w = 0; w < num_other_words; ++w)
      for (int part = 0; part < 32; part += kLanes) sum += load_where(active[w] >> part, row + 32 * w + part);
    return horizontal_sum<int32_t>(sum);
  }

  int64_t first_unit;
  const int32_t* couplings;  // [units, ld], exact
  int64_t ld;
  const float* BinaryChain::* bias_of;
  uint32_t* BinaryChain::* other;  // the neighbours' bits
  int64_t num_other_words;
  float scale_of_all;
  uint64_t seed, sweep;
};
inline ExactSide exact_left(const BinarySweeps& p) {
  return {
      0,      p.coupling.rows, padded_row(p.n2), &BinaryChain::left_bias, &BinaryChain::right, state_words(p.n2), p.coupling.scale,
      p.seed, p.first_sweep};
}
inline ExactSide exact_right(const BinarySweeps& p) {
  return {p.n1,
          p.coupling.columns,
          padded_row(p.n1),
          &BinaryChain::right_bias,
          &BinaryChain::left,
          state_words(p.n1),
          p.coupling.scale,
          p.seed,
          p.first_sweep};
}
