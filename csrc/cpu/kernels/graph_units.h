// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. Binary sweeps of a single chain, 16 units of a colour side by side.

// Updates kVectors vectors of units of one colour, from position `first` on.
template <int kVectors>
inline void update_positions(const UnitsModel& m, const SingleChain& c, const RandomStream& random, float beta, int64_t first) {
  VecF logits[kVectors];
  VecU thresholds[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = first + v * kLanes, row = at / kUnitsRow * kUnitsRow * m.degree + at % kUnitsRow;
    VecI acc = {};
    for (int64_t k = 0; k < m.degree; ++k)
      acc += gather(c.state, load<VecI>(m.neighbors + row + k * kUnitsRow)) & load<VecI>(m.coupling + row + k * kUnitsRow);
    logits[v] = group_logit(acc, splat(m.scale), load<VecF>(m.bias + at), beta, nullptr);
  }
  threshold_vectors(logits, thresholds);
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int32_t* nodes = m.nodes + first + v * kLanes;
    alignas(64) uint32_t byte[kLanes];
    for (int l = 0; l < kLanes; ++l) byte[l] = c.bytes[nodes[l]];
    const VecU bytes = load<VecU>(byte), high = thresholds[v] >> 24;
    VecI ones = (VecI)(bytes < high);
    if (any_equal(bytes, high))
      for (int l = 0; l < kLanes; ++l)
        if (byte[l] == thresholds[v][l] >> 24)
          ones[l] = -int32_t(random_low_bits(random, uint32_t(nodes[l])) < (thresholds[v][l] & 0xffffff));
    if (c.clamp) {
      const VecI index = load<VecI>(nodes), clamp = gather(c.clamp, index);
      ones = (ones & ~clamp) | (gather(c.state, index) & clamp);
    }
    for (int l = 0; l < kLanes; ++l) c.state[nodes[l]] = ones[l];
  }
}

void sweep_units_kernel(const GraphSweeps& p, const UnitsModel& m, const SingleChain& c) {
  constexpr int kRowVectors = kUnitsRow / kLanes, kVectors = kRowVectors < 4 ? 4 : kRowVectors;
  for (int64_t sweep = 0; sweep < p.num_sweeps; ++sweep) {
    if (p.check.stop(p.check.context)) return;
    const float beta = p.beta[sweep * p.beta_stride];
    const RandomStream random = random_stream(p.seed, c.number, p.first_sweep + uint64_t(sweep));
    random_bytes(random, 0, (m.graph.num_nodes + 127) / 128, c.bytes);
    for (int64_t color = 0; color < m.graph.num_colors; ++color) {
      int64_t at = m.color_offsets[color];
      const int64_t end = m.color_offsets[color + 1];
      for (; at + kVectors * kLanes <= end; at += kVectors * kLanes) update_positions<kVectors>(m, c, random, beta, at);
      for (; at < end; at += kUnitsRow) update_positions<kRowVectors>(m, c, random, beta, at);
    }
  }
}
