// SPDX-License-Identifier: Apache-2.0
// No include guard: included once per instruction set, after cpu/graph_kernel.h. Relaxed sweeps of a block of 16 chains and their
// backward pass (csrc/README.md, 4), for T = float or double.

template <class T, bool kShared>
void relaxed_block_of(const RelaxedGraphSweeps<T>& p, const RelaxedBlock<T>& b) {
  const GraphView& g = p.graph;
  constexpr int kL = lanes_of<T>, kVectors = kChainBlock / kL;
  for (int64_t sweep = 0; sweep < p.num_sweeps; ++sweep) {
    const T beta = T(p.beta[sweep * p.beta_stride]);
    T* fields = b.fields + sweep * g.num_nodes * kChainBlock;
    draw_words(block_streams(p.seed, b.number, p.first_sweep + uint64_t(sweep)), g.num_nodes, b.words);
    for (int64_t pos = 0; pos < g.num_nodes; ++pos) {
      const int64_t node = g.order[pos], begin = g.row_offsets[pos], end = g.row_offsets[pos + 1];
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = node * kChainBlock + v * kL;
        Vec<T> field = load<Vec<T>>(b.bias + at);
        for (int64_t h = begin; h < end; ++h)
          field += coupling_vector<kShared>(b.coupling, g, h, v) *
                   load<Vec<T>>(b.value + int64_t{g.neighbors[h]} * kChainBlock + v * kL);
        const RelaxedUnit<T> r = relax<T>(p.relaxation, field, b.words + at, beta, p.sharpness, p.slope_gradient);
        store(fields + at, field);
        store(b.value + at, r.value);
        store(b.mean + at, r.mean);
      }
    }
  }
}
template <class T>
void relaxed_block_kernel(const RelaxedGraphSweeps<T>& p, const RelaxedBlock<T>& b) {
  b.shared_coupling ? relaxed_block_of<T, true>(p, b) : relaxed_block_of<T, false>(p, b);
}

// The chain rule through the updates in reverse. `value` holds the states as they were before the update at hand: once a unit's
// update is undone, its value (and slope) become those of the sweep before, from that sweep's fields and random words.
template <class T, bool kShared>
void relaxed_backward_block_of(const RelaxedGraphSweeps<T>& p, const RelaxedBackwardBlock<T>& b) {
  const GraphView& g = p.graph;
  constexpr int kL = lanes_of<T>, kVectors = kChainBlock / kL;
  const auto beta_of = [&](int64_t sweep) { return T(p.beta[sweep * p.beta_stride]); };
  const auto fields_of = [&](int64_t sweep) { return b.fields + sweep * g.num_nodes * kChainBlock; };
  const auto draw = [&](int64_t sweep) {
    draw_words(block_streams(p.seed, b.number, p.first_sweep + uint64_t(sweep)), g.num_nodes, b.words);
  };
  const auto recompute = [&](int64_t sweep, int64_t at) {
    const RelaxedUnit<T> r =
        relax<T>(p.relaxation, load<Vec<T>>(fields_of(sweep) + at), b.words + at, beta_of(sweep), p.sharpness, p.slope_gradient);
    store(b.value + at, r.value);
    store(b.slope + at, r.slope);
  };
  draw(p.num_sweeps - 1);
  for (int64_t at = 0; at < g.num_nodes * kChainBlock; at += kL) {
    recompute(p.num_sweeps - 1, at);
    store(b.grad_bias + at, Vec<T>{});
  }
  for (int64_t sweep = p.num_sweeps - 1; sweep >= 0; --sweep) {
    const bool last = sweep + 1 == p.num_sweeps;
    const T beta = beta_of(sweep);
    if (sweep > 0) draw(sweep - 1);
    for (int64_t pos = g.num_nodes - 1; pos >= 0; --pos) {
      const int64_t node = g.order[pos], begin = g.row_offsets[pos], end = g.row_offsets[pos + 1];
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = node * kChainBlock + v * kL;
        Vec<T> grad_field = load<Vec<T>>(b.grad_value + at) * load<Vec<T>>(b.slope + at);
        if (last) {
          const Vec<T> x = beta * load<Vec<T>>(fields_of(sweep) + at);
          const Vec<T> e = exp_negative(x < 0 ? -x : x);
          grad_field += load<Vec<T>>(b.grad_mean + at) * (beta * (e / ((1 + e) * (1 + e))));
        }
        store(b.grad_bias + at, load<Vec<T>>(b.grad_bias + at) + grad_field);
        store(b.grad_value + at, Vec<T>{});  // what the unit was before, this update has overwritten
        for (int64_t h = begin; h < end; ++h) {
          const int64_t other = int64_t{g.neighbors[h]} * kChainBlock + v * kL;
          T* grad_coupling = b.grad_coupling + int64_t{g.edge_of[h]} * kChainBlock + v * kL;
          store(grad_coupling, load<Vec<T>>(grad_coupling) + grad_field * load<Vec<T>>(b.value + other));
          store(b.grad_value + other,
                load<Vec<T>>(b.grad_value + other) + grad_field * coupling_vector<kShared>(b.coupling, g, h, v));
        }
        if (sweep > 0)
          recompute(sweep - 1, at);
        else
          store(b.value + at, load<Vec<T>>(b.start + at));
      }
    }
  }
}
template <class T>
void relaxed_backward_block_kernel(const RelaxedGraphSweeps<T>& p, const RelaxedBackwardBlock<T>& b) {
  b.shared_coupling ? relaxed_backward_block_of<T, true>(p, b) : relaxed_backward_block_of<T, false>(p, b);
}
