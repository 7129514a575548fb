// SPDX-License-Identifier: Apache-2.0
// No include guard: included once per instruction set, after cpu/graph_kernel.h. Relaxed sweeps of a block of 16 chains and their
// backward pass (csrc/README.md, 4), for T = float or double.

// kCount vectors of a block, from element at[0], at[1], ... on.
template <class T, int kCount>
__attribute__((always_inline)) inline void relax_at(const RelaxedGraphSweeps<T>& p, const T* fields, const int64_t (&at)[kCount],
                                                    const uint32_t* words, T beta, RelaxedUnit<T> (&out)[kCount]) {
  Vec<T> field[kCount];
  const uint32_t* word[kCount];
  GIBBS_EACH field[k] = load<Vec<T>>(fields + at[k]);
  GIBBS_EACH word[k] = words + at[k];
  relax<T, kCount>(p.relaxation, field, word, beta, p.sharpness, p.slope_gradient, out);
}

// kUnits units of one colour, from position `first` on.
template <class T, bool kShared, int kUnits>
inline void relax_positions(const RelaxedGraphSweeps<T>& p, const RelaxedBlock<T>& b, T* fields, T beta, int64_t first) {
  const GraphView& g = p.graph;
  constexpr int kL = lanes_of<T>, kVectors = kChainBlock / kL, kCount = kUnits * kVectors;
  int64_t at[kCount];
  RelaxedUnit<T> r[kCount];
#pragma GCC unroll 4
  for (int unit = 0; unit < kUnits; ++unit) {
    const int64_t node = g.order[first + unit], begin = g.row_offsets[first + unit], end = g.row_offsets[first + unit + 1];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t here = at[unit * kVectors + v] = node * kChainBlock + v * kL;
      Vec<T> field = load<Vec<T>>(b.bias + here);
      for (int64_t h = begin; h < end; ++h)
        field +=
            coupling_vector<kShared>(b.coupling, g, h, v) * load<Vec<T>>(b.value + int64_t{g.neighbors[h]} * kChainBlock + v * kL);
      store(fields + here, field);
    }
  }
  relax_at<T, kCount>(p, fields, at, b.words, beta, r);
  GIBBS_EACH store(b.value + at[k], r[k].value);
  GIBBS_EACH store(b.mean + at[k], r[k].mean);
}

template <class T, bool kShared>
void relaxed_block_of(const RelaxedGraphSweeps<T>& p, const RelaxedBlock<T>& b) {
  const GraphView& g = p.graph;
  constexpr int kVectors = kChainBlock / lanes_of<T>, kUnits = kVectors < 4 ? 4 / kVectors : 1;
  for (int64_t sweep = 0; sweep < p.num_sweeps; ++sweep) {
    if (p.check.stop(p.check.context)) return;
    const T beta = T(p.beta[sweep * p.beta_stride]);
    T* fields = b.fields + sweep * g.num_nodes * kChainBlock;
    draw_words(block_streams(p.seed, b.number, p.first_sweep + uint64_t(sweep)), g.num_nodes, b.words);
    for (int64_t color = 0; color < g.num_colors; ++color) {
      int64_t pos = g.color_offsets[color];
      const int64_t end = g.color_offsets[color + 1];
      for (; pos + kUnits <= end; pos += kUnits) relax_positions<T, kShared, kUnits>(p, b, fields, beta, pos);
      for (; pos < end; ++pos) relax_positions<T, kShared, 1>(p, b, fields, beta, pos);
    }
  }
}
template <class T>
void relaxed_block_kernel(const RelaxedGraphSweeps<T>& p, const RelaxedBlock<T>& b) {
  b.shared_coupling ? relaxed_block_of<T, true>(p, b) : relaxed_block_of<T, false>(p, b);
}

// Of the last sweep, kCount vectors from `from` on: values and slopes, and in grad_bias what comes by way of the mean.
template <class T, int kCount>
inline void last_values(const RelaxedGraphSweeps<T>& p, const RelaxedBackwardBlock<T>& b, int64_t from) {
  const int64_t last = p.num_sweeps - 1;
  int64_t at[kCount];
  RelaxedUnit<T> r[kCount];
  GIBBS_EACH at[k] = from + k * lanes_of<T>;
  relax_at<T, kCount>(p, b.fields + last * p.graph.num_nodes * kChainBlock, at, b.words, T(p.beta[last * p.beta_stride]), r);
  GIBBS_EACH store(b.value + at[k], r[k].value);
  GIBBS_EACH store(b.slope + at[k], r[k].slope);
  GIBBS_EACH store(b.grad_bias + at[k], load<Vec<T>>(b.grad_mean + at[k]) * r[k].mean_slope);
}

// The chain rule through the updates in reverse. `value` holds the states as they were before the update at hand: once a unit's
// update is undone, its value (and slope) become those of the sweep before, from that sweep's fields and random words.
template <class T, bool kShared>
void relaxed_backward_block_of(const RelaxedGraphSweeps<T>& p, const RelaxedBackwardBlock<T>& b) {
  const GraphView& g = p.graph;
  constexpr int kL = lanes_of<T>, kVectors = kChainBlock / kL, kCount = 4;
  const int64_t size = g.num_nodes * kChainBlock;
  const auto beta_of = [&](int64_t sweep) { return T(p.beta[sweep * p.beta_stride]); };
  const auto draw = [&](int64_t sweep) {
    draw_words(block_streams(p.seed, b.number, p.first_sweep + uint64_t(sweep)), g.num_nodes, b.words);
  };
  const int64_t last = p.num_sweeps - 1;
  draw(last);
  int64_t from = 0;
  for (; from + kCount * kL <= size; from += kCount * kL) last_values<T, kCount>(p, b, from);
  for (; from < size; from += kL) last_values<T, 1>(p, b, from);
  for (int64_t sweep = last; sweep >= 0; --sweep) {
    if (p.check.stop(p.check.context)) return;
    if (sweep > 0) draw(sweep - 1);
    for (int64_t pos = g.num_nodes - 1; pos >= 0; --pos) {
      const int64_t node = g.order[pos], begin = g.row_offsets[pos], end = g.row_offsets[pos + 1];
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = node * kChainBlock + v * kL;
        Vec<T> grad_field = load<Vec<T>>(b.grad_value + at) * load<Vec<T>>(b.slope + at);
        const Vec<T> so_far = load<Vec<T>>(b.grad_bias + at);
        store(b.grad_bias + at, so_far + grad_field);
        if (sweep == last) grad_field += so_far;
        store(b.grad_value + at, Vec<T>{});  // what the unit was before, this update has overwritten
        for (int64_t h = begin; h < end; ++h) {
          const int64_t other = int64_t{g.neighbors[h]} * kChainBlock + v * kL;
          T* grad_coupling = b.grad_coupling + int64_t{g.edge_of[h]} * kChainBlock + v * kL;
          store(grad_coupling, load<Vec<T>>(grad_coupling) + grad_field * load<Vec<T>>(b.value + other));
          store(b.grad_value + other,
                load<Vec<T>>(b.grad_value + other) + grad_field * coupling_vector<kShared>(b.coupling, g, h, v));
        }
        if (sweep > 0) {
          const int64_t here[1] = {at};
          RelaxedUnit<T> r[1];
          relax_at<T, 1>(p, b.fields + (sweep - 1) * size, here, b.words, beta_of(sweep - 1), r);
          store(b.value + at, r[0].value);
          store(b.slope + at, r[0].slope);
        } else {
          store(b.value + at, load<Vec<T>>(b.start + at));
        }
      }
    }
  }
}
template <class T>
void relaxed_backward_block_kernel(const RelaxedGraphSweeps<T>& p, const RelaxedBackwardBlock<T>& b) {
  b.shared_coupling ? relaxed_backward_block_of<T, true>(p, b) : relaxed_backward_block_of<T, false>(p, b);
}
