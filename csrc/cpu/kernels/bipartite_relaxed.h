// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. Relaxed sweeps of bipartite models and their backward pass (csrc/README.md, 4).

// ---- products with the coupling matrix -----------------------------------------------------------------------------------------

// out[c][j] += sum_i in[c][i] weight[i][j], for kChains chains at a time
template <class T, int kChains, int kVectors>
inline void add_row_products_strip(const T* weight, int64_t row_stride, int64_t n1, const T* const* in, T* const* out,
                                   int64_t column) {
  constexpr int kL = lanes_of<T>;
  Vec<T> sum[kChains][kVectors];
#pragma GCC unroll 4
  for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 12
    for (int v = 0; v < kVectors; ++v) sum[c][v] = load<Vec<T>>(out[c] + column + v * kL);
  for (int64_t i = 0; i < n1; ++i) {
    const T* row = weight + i * row_stride + column;
#pragma GCC unroll 12
    for (int v = 0; v < kVectors; ++v) {
      const Vec<T> w = load<Vec<T>>(row + v * kL);
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) sum[c][v] += w * in[c][i];
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 12
    for (int v = 0; v < kVectors; ++v) store(out[c] + column + v * kL, sum[c][v]);
}
template <class T, int kChains>
inline void add_row_products_of(const T* weight, int64_t row_stride, int64_t n1, int64_t n2, const T* const* in, T* const* out) {
  constexpr int kL = lanes_of<T>, kWide = 12 / kChains;
  int64_t j = 0;
  for (; j + kWide * kL <= n2; j += kWide * kL) add_row_products_strip<T, kChains, kWide>(weight, row_stride, n1, in, out, j);
  for (; j + kL <= n2; j += kL) add_row_products_strip<T, kChains, 1>(weight, row_stride, n1, in, out, j);
  if (j < n2)
    for (int64_t i = 0; i < n1; ++i)
      for (int c = 0; c < kChains; ++c)
        for (int64_t t = j; t < n2; ++t) out[c][t] += in[c][i] * weight[i * row_stride + t];
}
template <class T>
inline void add_row_products(const T* weight, int64_t row_stride, int64_t n1, int64_t n2, const T* const* in, T* const* out,
                             int count) {
  if (count == kRelaxedGroup) return add_row_products_of<T, kRelaxedGroup>(weight, row_stride, n1, n2, in, out);
  for (int c = 0; c < count; ++c) add_row_products_of<T, 1>(weight, row_stride, n1, n2, in + c, out + c);
}

// out[c][i] += sum_j weight[i][j] in[c][j], for kRows rows from i on
template <class T, int kChains, int kRows>
inline void add_column_products_rows(const T* weight, int64_t row_stride, int64_t n2, const T* const* in, T* const* out,
                                     int64_t i) {
  constexpr int kL = lanes_of<T>;
  Vec<T> sum[kRows][kChains] = {};
  int64_t j = 0;
  for (; j + kL <= n2; j += kL)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> w = load<Vec<T>>(weight + (i + r) * row_stride + j);
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) sum[r][c] += w * load<Vec<T>>(in[c] + j);
    }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kChains; ++c) {
      T total = horizontal_sum<T>(sum[r][c]);
      for (int64_t t = j; t < n2; ++t) total += weight[(i + r) * row_stride + t] * in[c][t];
      out[c][i + r] += total;
    }
}
template <class T, int kChains>
inline void add_column_products_of(const T* weight, int64_t row_stride, int64_t n1, int64_t n2, const T* const* in, T* const* out) {
  constexpr int kRows = 8 / kChains;
  int64_t i = 0;
  for (; i + kRows <= n1; i += kRows) add_column_products_rows<T, kChains, kRows>(weight, row_stride, n2, in, out, i);
  for (; i < n1; ++i) add_column_products_rows<T, kChains, 1>(weight, row_stride, n2, in, out, i);
}
template <class T>
inline void add_column_products(const T* weight, int64_t row_stride, int64_t n1, int64_t n2, const T* const* in, T* const* out,
                                int count) {
  if (count == kRelaxedGroup) return add_column_products_of<T, kRelaxedGroup>(weight, row_stride, n1, n2, in, out);
  for (int c = 0; c < count; ++c) add_column_products_of<T, 1>(weight, row_stride, n1, n2, in + c, out + c);
}

// ---- forward -------------------------------------------------------------------------------------------------------------------

template <class T, int kCount>
inline void relax_units(const RelaxedSweeps<T>& p, int64_t i, int64_t n, const T* fields, const uint32_t* words, T beta, T* value,
                        T* mean, T* slope) {
  constexpr int kL = lanes_of<T>;
  Vec<T> field[kCount];
  const uint32_t* word[kCount];
  RelaxedUnit<T> r[kCount];
  GIBBS_EACH field[k] = load_part(fields + i + k * kL, n - i - k * kL);
  GIBBS_EACH word[k] = words + i + k * kL;
  relax<T, kCount>(p.relaxation, field, word, beta, p.sharpness, p.slope_gradient, r);
  GIBBS_EACH {
    const int64_t at = i + k * kL;
    if (value) store_part(value + at, r[k].value, n - at);
    if (mean) store_part(mean + at, r[k].mean, n - at);
    if (slope) store_part(slope + at, r[k].slope, n - at);
  }
}
template <class T>
inline void relax_side(const RelaxedSweeps<T>& p, int64_t n, const T* fields, const uint32_t* words, T beta, T* value, T* mean,
                       T* slope) {
  constexpr int kCount = 4, kL = lanes_of<T>;
  int64_t i = 0;
  for (; i + kCount * kL <= n; i += kCount * kL) relax_units<T, kCount>(p, i, n, fields, words, beta, value, mean, slope);
  for (; i < n; i += kL) relax_units<T, 1>(p, i, n, fields, words, beta, value, mean, slope);
}

template <class T>
void relaxed_kernel(const RelaxedSweeps<T>& p, const RelaxedChain<T>* chains, T* const* fields, int count, uint32_t* words,
                    uint8_t* bytes) {
  const T *left_in[kRelaxedGroup], *right_in[kRelaxedGroup];
  T *right_field[kRelaxedGroup], *left_field[kRelaxedGroup];
  for (int c = 0; c < count; ++c) {
    left_in[c] = chains[c].state;
    right_in[c] = chains[c].right;
  }
  for (int64_t sweep = 0; sweep < p.num_sweeps; ++sweep) {
    const T beta = T(p.beta[sweep * p.beta_stride]);
    for (int c = 0; c < count; ++c) {
      right_field[c] = fields[c] + sweep * p.fields_stride;
      left_field[c] = right_field[c] + p.n2;
      __builtin_memcpy(right_field[c], chains[c].right_bias, size_t(p.n2) * sizeof(T));
      __builtin_memcpy(left_field[c], chains[c].left_bias, size_t(p.n1) * sizeof(T));
    }
    add_row_products(p.weight, p.row_stride, p.n1, p.n2, left_in, right_field, count);
    // `words` holds one chain's units: drawing them again for its left side is cheaper than memory for a group of chains.
    for (int c = 0; c < count; ++c) {
      random_words_of(random_stream(p.seed, chains[c].number, p.first_sweep + uint64_t(sweep)), p.n1 + p.n2, words, bytes);
      relax_side<T>(p, p.n2, right_field[c], words + p.n1, beta, chains[c].right, nullptr, nullptr);
    }
    add_column_products(p.weight, p.row_stride, p.n1, p.n2, right_in, left_field, count);
    for (int c = 0; c < count; ++c) {
      if (count > 1) random_words_of(random_stream(p.seed, chains[c].number, p.first_sweep + uint64_t(sweep)), p.n1, words, bytes);
      relax_side<T>(p, p.n1, left_field[c], words, beta, chains[c].left, chains[c].left_mean, nullptr);
      left_in[c] = chains[c].left;
    }
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------------------

// The chain rule through the sweeps in reverse. For each sweep it leaves two pairs of factors, whose outer products sum to
// grad_weight:  (d loss / d left field, zeta_right)  and  (left that the right update saw, d loss / d right field).
// scratch: [2 * (n1 + n2)]
template <class T>
void relaxed_backward_kernel(const RelaxedSweeps<T>& p, const RelaxedBackwardChain<T>& chain, bool needs_grad_state,
                             uint32_t* words, uint8_t* bytes, T* scratch) {
  T *slope_left = scratch, *grad_left = scratch + p.n1, *slope_right = grad_left + p.n1, *grad_right = slope_right + p.n2;
  __builtin_memcpy(grad_left, chain.grad_left, size_t(p.n1) * sizeof(T));
  __builtin_memcpy(grad_right, chain.grad_right, size_t(p.n2) * sizeof(T));
  for (int64_t i = 0; i < p.n1; ++i) chain.grad_left_bias[i] = 0;
  for (int64_t j = 0; j < p.n2; ++j) chain.grad_right_bias[j] = 0;
  for (int64_t sweep = p.num_sweeps - 1; sweep >= 0; --sweep) {
    const T beta = T(p.beta[sweep * p.beta_stride]);
    const T *right_field = chain.fields + sweep * p.fields_stride, *left_field = right_field + p.n2;
    T *grad_left_field = chain.left_factor + 2 * sweep * p.n1, *left_in = grad_left_field + p.n1;
    T *right_value = chain.right_factor + 2 * sweep * p.n2, *grad_right_field = right_value + p.n2;
    random_words_of(random_stream(p.seed, chain.number, p.first_sweep + uint64_t(sweep)), p.n1 + p.n2, words, bytes);
    relax_side<T>(p, p.n2, right_field, words + p.n1, beta, right_value, nullptr, slope_right);
    // The left value of this sweep is the input of the next sweep's right update.
    const bool last = sweep + 1 == p.num_sweeps;
    relax_side<T>(p, p.n1, left_field, words, beta, last ? nullptr : left_in + 2 * p.n1, nullptr, slope_left);
    for (int64_t i = 0; i < p.n1; ++i) grad_left_field[i] = grad_left[i] * slope_left[i];
    if (last)
      for (int64_t i = 0; i < p.n1; i += lanes_of<T>) {
        const int64_t left_over = p.n1 - i;
        const Vec<T> x = beta * load_part(left_field + i, left_over);
        const Vec<T> e = exp_negative(x < 0 ? -x : x);
        store_part(grad_left_field + i,
                   load_part(grad_left_field + i, left_over) +
                       load_part(chain.grad_left_mean + i, left_over) * (beta * (e / ((1 + e) * (1 + e)))),
                   left_over);
      }
    else
      for (int64_t j = 0; j < p.n2; ++j) grad_right[j] = 0;
    const T* in = grad_left_field;
    add_row_products_of<T, 1>(p.weight, p.row_stride, p.n1, p.n2, &in, &grad_right);
    for (int64_t j = 0; j < p.n2; ++j) grad_right_field[j] = grad_right[j] * slope_right[j];
    for (int64_t i = 0; i < p.n1; ++i) chain.grad_left_bias[i] += grad_left_field[i];
    for (int64_t j = 0; j < p.n2; ++j) chain.grad_right_bias[j] += grad_right_field[j];
    if (sweep > 0 || needs_grad_state) {
      for (int64_t i = 0; i < p.n1; ++i) grad_left[i] = 0;
      in = grad_right_field;
      add_column_products_of<T, 1>(p.weight, p.row_stride, p.n1, p.n2, &in, &grad_left);
    }
  }
  __builtin_memcpy(chain.left_factor + p.n1, chain.state, size_t(p.n1) * sizeof(T));
  for (int64_t i = 0; i < p.n1; ++i) chain.grad_state[i] = needs_grad_state ? grad_left[i] : T{};
}
template <class T, int kRows, int kVectors>
inline void outer_products_strip(const T* left, const T* right, int64_t count, int64_t n1, int64_t n2, int64_t i, int64_t j,
                                 T* out) {
  constexpr int kL = lanes_of<T>;
  Vec<T> sum[kRows][kVectors] = {};
  for (int64_t c = 0; c < count; ++c) {
    const T *a = left + c * n1 + i, *b = right + c * n2 + j;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Vec<T> w = load<Vec<T>>(b + v * kL);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r][v] += w * a[r];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(out + (i + r) * n2 + j + v * kL, sum[r][v]);
}
template <class T, int kRows>
inline void outer_products_rows(const T* left, const T* right, int64_t count, int64_t n1, int64_t n2, int64_t i, T* out) {
  constexpr int kL = lanes_of<T>, kVectors = 3;
  int64_t j = 0;
  for (; j + kVectors * kL <= n2; j += kVectors * kL)
    outer_products_strip<T, kRows, kVectors>(left, right, count, n1, n2, i, j, out);
  for (; j + kL <= n2; j += kL) outer_products_strip<T, kRows, 1>(left, right, count, n1, n2, i, j, out);
  for (; j < n2; ++j)
    for (int r = 0; r < kRows; ++r) {
      T sum = 0;
      for (int64_t c = 0; c < count; ++c) sum += left[c * n1 + i + r] * right[c * n2 + j];
      out[(i + r) * n2 + j] = sum;
    }
}
template <class T>
void outer_products_kernel(const T* left, const T* right, int64_t count, int64_t n1, int64_t n2, int64_t begin, int64_t end,
                           T* out) {
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) outer_products_rows<T, 4>(left, right, count, n1, n2, i, out);
  for (; i < end; ++i) outer_products_rows<T, 1>(left, right, count, n1, n2, i, out);
}
