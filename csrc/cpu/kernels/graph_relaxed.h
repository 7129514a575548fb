// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. Relaxed sweeps of a group of 16 chains and their backward pass (csrc/README.md, 4).

// Relaxes kCount vectors of a group, from elements at[0], at[1], ... on.
template <class T, int kCount>
__attribute__((always_inline)) inline void relax_at(const RelaxedGraphSweep<T>& p, const T* fields, const int64_t (&at)[kCount],
                                                    const uint32_t* words, RelaxedUnit<T> (&out)[kCount]) {
  Vec<T> field[kCount];
  const uint32_t* word[kCount];
  GIBBS_EACH field[k] = load<Vec<T>>(fields + at[k]);
  GIBBS_EACH word[k] = words + at[k];
  relax<T, kCount>(p.relaxation, field, word, p.beta, p.sharpness, p.slope_gradient, out);
}

template <class T>
inline void draw_words(const RelaxedGraphSweep<T>& p, const uint64_t* chains, uint32_t* words) {
  draw_words(group_streams(p.seed, chains, p.sweep), p.graph.num_nodes, words);
}

// Updates kUnits units of one colour, from position `first` on.
template <class T, bool kShared, int kUnits>
inline void relax_positions(const RelaxedGraphSweep<T>& p, const RelaxedGroup<T>& b, int64_t first) {
  const GraphView& g = p.graph;
  constexpr int kL = lanes_of<T>, kVectors = kGroup / kL, kCount = kUnits * kVectors;
  int64_t at[kCount];
  RelaxedUnit<T> r[kCount];
#pragma GCC unroll 4
  for (int unit = 0; unit < kUnits; ++unit) {
    const int64_t node = g.order[first + unit], begin = g.row_offsets[first + unit], end = g.row_offsets[first + unit + 1];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t here = at[unit * kVectors + v] = node * kGroup + v * kL;
      Vec<T> field = load<Vec<T>>(b.bias + here);
      for (int64_t h = begin; h < end; ++h)
        field += coupling_vector<kShared>(b.coupling, g, h, v) * load<Vec<T>>(b.value + int64_t{g.neighbors[h]} * kGroup + v * kL);
      store(b.fields + here, field);
    }
  }
  relax_at<T, kCount>(p, b.fields, at, b.words, r);
  GIBBS_EACH store(b.value + at[k], r[k].value);
  GIBBS_EACH store(b.mean + at[k], r[k].mean);
}

template <class T, bool kShared>
void relaxed_graph_of(const RelaxedGraphSweep<T>& p, const RelaxedGroup<T>& b) {
  const GraphView& g = p.graph;
  constexpr int kVectors = kGroup / lanes_of<T>, kUnits = kVectors < 4 ? 4 / kVectors : 1;
  draw_words(p, b.number, b.words);
  for (int64_t color = 0; color < g.num_colors; ++color) {
    int64_t pos = g.color_offsets[color];
    const int64_t end = g.color_offsets[color + 1];
    for (; pos + kUnits <= end; pos += kUnits) relax_positions<T, kShared, kUnits>(p, b, pos);
    for (; pos < end; ++pos) relax_positions<T, kShared, 1>(p, b, pos);
  }
}
template <class T>
void relaxed_graph_kernel(const RelaxedGraphSweep<T>& p, const RelaxedGroup<T>& b) {
  b.shared_coupling ? relaxed_graph_of<T, true>(p, b) : relaxed_graph_of<T, false>(p, b);
}

// Values and slopes of the last sweep, kCount vectors from `from` on, and in grad_bias the gradient by way of the mean.
template <class T, int kCount>
inline void last_values(const RelaxedGraphSweep<T>& p, const RelaxedBackwardGroup<T>& b, int64_t from) {
  int64_t at[kCount];
  RelaxedUnit<T> r[kCount];
  GIBBS_EACH at[k] = from + k * lanes_of<T>;
  relax_at<T, kCount>(p, b.fields, at, b.words, r);
  GIBBS_EACH store(b.value + at[k], r[k].value);
  GIBBS_EACH store(b.slope + at[k], r[k].slope);
  GIBBS_EACH store(b.grad_bias + at[k], load<Vec<T>>(b.grad_mean + at[k]) * r[k].mean_slope);
}
template <class T>
void relaxed_graph_backward_begin_kernel(const RelaxedGraphSweep<T>& last, const RelaxedBackwardGroup<T>& b) {
  constexpr int kL = lanes_of<T>, kCount = 4;
  const int64_t size = last.graph.num_nodes * kGroup;
  draw_words(last, b.number, b.words);
  int64_t from = 0;
  for (; from + kCount * kL <= size; from += kCount * kL) last_values<T, kCount>(last, b, from);
  for (; from < size; from += kL) last_values<T, 1>(last, b, from);
}

// The chain rule through the updates of one sweep in reverse. `value` holds the states from before the update at hand: once a
// unit's update is undone, its value and slope become those of the sweep before, made from that sweep's fields and random words;
// before the first sweep they become the starting values.
template <class T, bool kShared>
void relaxed_graph_backward_of(const GraphView& g, const RelaxedGraphSweep<T>* before, const RelaxedBackwardGroup<T>& b,
                               bool last) {
  constexpr int kL = lanes_of<T>, kVectors = kGroup / kL;
  if (before) draw_words(*before, b.number, b.words);
  for (int64_t pos = g.num_nodes - 1; pos >= 0; --pos) {
    const int64_t node = g.order[pos], begin = g.row_offsets[pos], end = g.row_offsets[pos + 1];
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = node * kGroup + v * kL;
      Vec<T> grad_field = load<Vec<T>>(b.grad_value + at) * load<Vec<T>>(b.slope + at);
      const Vec<T> so_far = load<Vec<T>>(b.grad_bias + at);
      store(b.grad_bias + at, so_far + grad_field);
      if (last) grad_field += so_far;
      store(b.grad_value + at, Vec<T>{});  // the update overwrote the value before it, which has no gradient
      for (int64_t h = begin; h < end; ++h) {
        const int64_t other = int64_t{g.neighbors[h]} * kGroup + v * kL;
        T* grad_coupling = b.grad_coupling + int64_t{g.edge_of[h]} * kGroup + v * kL;
        store(grad_coupling, load<Vec<T>>(grad_coupling) + grad_field * load<Vec<T>>(b.value + other));
        store(b.grad_value + other,
              load<Vec<T>>(b.grad_value + other) + grad_field * coupling_vector<kShared>(b.coupling, g, h, v));
      }
      if (before) {
        const int64_t here[1] = {at};
        RelaxedUnit<T> r[1];
        relax_at<T, 1>(*before, b.fields, here, b.words, r);
        store(b.value + at, r[0].value);
        store(b.slope + at, r[0].slope);
      } else {
        store(b.value + at, load<Vec<T>>(b.start + at));
      }
    }
  }
}
template <class T>
void relaxed_graph_backward_kernel(const GraphView& g, const RelaxedGraphSweep<T>* before, const RelaxedBackwardGroup<T>& b,
                                   bool last) {
  b.shared_coupling ? relaxed_graph_backward_of<T, true>(g, before, b, last)
                    : relaxed_graph_backward_of<T, false>(g, before, b, last);
}
