// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. Groups of 16 chains side by side in the lanes: random words, rows and lanes, neighbours.

constexpr int kGroupVectors = kGroup / kLanes;

struct GroupStreams {
  LaneStreams vector[kGroupVectors];
};
inline GroupStreams group_streams(uint64_t seed, const uint64_t* chains, uint64_t sweep) {
  GroupStreams out;
  for (int v = 0; v < kGroupVectors; ++v) out.vector[v] = lane_streams(seed, chains + v * kLanes, sweep);
  return out;
}

// The first of the 16 units whose high bytes a counter supplies; the others follow in the order of core/philox.h.
inline int64_t first_unit_of(int64_t counter) { return (counter >> 3) * 128 + 4 * (counter & 7); }

inline void draw_high_bytes(const GroupStreams& s, int64_t num_nodes, uint32_t* words) {
  for (int64_t counter = 0; counter < high_byte_counters(num_nodes); counter += kPhiloxAtOnce) {
    if (first_unit_of(counter) >= num_nodes) continue;
    for (int v = 0; v < kGroupVectors; ++v) {
      PhiloxVectors r[kPhiloxAtOnce];
      philox_of_counters(s.vector[v], uint32_t(counter), r);
      for (int i = 0; i < kPhiloxAtOnce; ++i)
        for (int q = 0; q < 4; ++q) store(words + ((counter + i) * 4 + q) * kGroup + v * kLanes, r[i].word[q]);
    }
  }
}
inline const uint32_t* word_of_high_bytes(const uint32_t* words, int64_t unit) {
  return words + (((unit >> 7) * 8 + (unit >> 2 & 7)) * 4 + (unit >> 5 & 3)) * kGroup;
}

inline VecU low_bits(const LaneStreams& s, int64_t unit) {
  const PhiloxVectors r = philox_lanes(s, splat(uint32_t(kLowPlane | ((unit >> 5) * 8 + (unit & 7)))));
  return r.word[unit >> 3 & 3] & 0xffffff;
}

// Whole words of all units: [num_nodes, kGroup] at the front of `words`.
inline void draw_words(const GroupStreams& s, int64_t num_nodes, uint32_t* words) {
  uint32_t* high = words + round_up(num_nodes, 32) * kGroup;
  draw_high_bytes(s, num_nodes, high);
  for (int64_t counter = 0; counter < (num_nodes + 31) / 32 * 8; counter += kPhiloxAtOnce) {
    const int64_t first = (counter >> 3) * 32 + (counter & 7);
    if (first >= num_nodes) continue;
    for (int v = 0; v < kGroupVectors; ++v) {
      PhiloxVectors r[kPhiloxAtOnce];
      philox_of_counters(s.vector[v], uint32_t(kLowPlane | counter), r);
      for (int i = 0; i < kPhiloxAtOnce; ++i)
        for (int q = 0; q < 4; ++q) {
          const int64_t unit = first + i + 8 * q;
          if (unit >= num_nodes) break;
          const VecU bytes = load<VecU>(word_of_high_bytes(high, unit) + v * kLanes) >> uint32_t(8 * (unit & 3));
          store(words + unit * kGroup + v * kLanes, (bytes << 24) | (r[i].word[q] & 0xffffff));
        }
    }
  }
}

// ---- rows and lanes ------------------------------------------------------------------------------------------------------------

// out [n, kGroup] = the transpose of kGroup rows [n]. False if a value is not finite.
template <class T>
bool lanes_from_rows_kernel(const T* const* rows, int64_t n, T* out) {
  using Bits = FloatBits<T>;
  using Int = typename Bits::Int;
  Vec<Int> largest = {};
  int64_t i = 0;
  for (; i + kSquare <= n; i += kSquare) {
    for (int half = 0; half < kGroup; half += kSquare) {
      const Int* from[kSquare];
      Int* to[kSquare];
      for (int r = 0; r < kSquare; ++r) {
        from[r] = (const Int*)(rows[half + r] + i);
        to[r] = (Int*)(out + (i + r) * kGroup + half);
      }
      transpose_square(from, to);
    }
    for (int64_t at = i * kGroup; at < (i + kSquare) * kGroup; at += lanes_of<T>)
      largest = vector_max(largest, load<Vec<Int>>((const Int*)(out + at)) & Bits::kMagnitude);
  }
  bool finite = true;
  for (int l = 0; l < lanes_of<T>; ++l) finite &= largest[l] >> Bits::kMantissa != Bits::kExponentMask;
  for (; i < n; ++i)
    for (int l = 0; l < kGroup; ++l) {
      out[i * kGroup + l] = rows[l][i];
      finite &= __builtin_isfinite(rows[l][i]) != 0;
    }
  return finite;
}
template <class T>
void rows_from_lanes_kernel(const T* lanes, int64_t n, T* const* rows) {
  using Int = typename FloatBits<T>::Int;
  int64_t i = 0;
  for (; i + kSquare <= n; i += kSquare)
    for (int half = 0; half < kGroup; half += kSquare) {
      const Int* from[kSquare];
      Int* to[kSquare];
      for (int r = 0; r < kSquare; ++r) {
        from[r] = (const Int*)(lanes + (i + r) * kGroup + half);
        to[r] = (Int*)(rows[half + r] + i);
      }
      transpose_square(from, to);
    }
  for (; i < n; ++i)
    for (int l = 0; l < kGroup; ++l) rows[l][i] = lanes[i * kGroup + l];
}
// out [n] = sums over the lanes, in the same order on every instruction set.
template <class T>
void sum_lanes_kernel(const T* lanes, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    T sum[kGroup / 2];
    for (int l = 0; l < kGroup / 2; ++l) sum[l] = lanes[i * kGroup + l] + lanes[i * kGroup + kGroup / 2 + l];
    for (int width = kGroup / 4; width; width /= 2)
      for (int l = 0; l < width; ++l) sum[l] += sum[l + width];
    out[i] = sum[0];
  }
}

template <bool kShared, class T>
inline Vec<T> coupling_vector(const T* coupling, const GraphView& g, int64_t half_edge, int v) {
  if constexpr (kShared) return splat(coupling[half_edge]);
  return load<Vec<T>>(coupling + int64_t{g.edge_of[half_edge]} * kGroup + v * lanes_of<T>);
}

// Logits of a vector of chains. base_bias: null unless the run is annealed.
inline VecF group_logit(VecI acc, VecF scale, VecF bias, float beta, const float* base_bias) {
  const VecF logit = binary_logits(acc, scale, bias, beta);
  return base_bias ? logit + (1.0f - beta) * load<VecF>(base_bias) : logit;
}

// acc += the couplings of the active neighbours of the node at a position.
template <bool kShared>
__attribute__((always_inline)) inline void add_neighbors(const GraphView& g, const SumsGroup& b, int64_t position,
                                                         VecI (&acc)[kGroupVectors]) {
  const int64_t begin = g.row_offsets[position], end = g.row_offsets[position + 1];
  const int32_t* neighbors = g.neighbors;
  for (int64_t h = begin; h < end; ++h)
#pragma GCC unroll 4
    for (int v = 0; v < kGroupVectors; ++v)
      acc[v] += coupling_vector<kShared>(b.coupling, g, h, v) & load<VecI>(b.state + int64_t{neighbors[h]} * kGroup + v * kLanes);
}
