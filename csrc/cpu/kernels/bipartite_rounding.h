// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. The scale of a coupling matrix, and the matrix rounded to it (core/fixed_point.h).

// One pass over a model's couplings: the largest magnitude_bits(), and what the largest sums of |w| and of the w of one sign are, over
// rows and columns, in floating point. sums: scratch, [2, padded_row(n2)]
template <class T>
struct CouplingScan {
  void note(T size, T total) {
    const T of_one_sign = (size + T(__builtin_fabs(double(total)))) / 2;  // a branch would be mispredicted
    largest_sum = size > largest_sum ? size : largest_sum;
    largest_of_one_sign = of_one_sign > largest_of_one_sign ? of_one_sign : largest_of_one_sign;
  }
  typename FloatBits<T>::Int largest_bits = 0;
  T largest_sum = 0, largest_of_one_sign = 0;
};
template <class T>
inline CouplingScan<T> scan_couplings(const CouplingView& w, T* sums) {
  using Int = typename FloatBits<T>::Int;
  T *sizes = sums, *totals = sums + padded_row(w.n2);
  __builtin_memset(sums, 0, size_t(2 * padded_row(w.n2)) * sizeof(T));
  Vec<Int> lane_max = {};
  CouplingScan<T> out;
  for (int64_t i = 0; i < w.n1; ++i) {
    const T* row = (const T*)w.data + i * w.row_stride;
    T row_size = 0, row_total = 0;
    if (w.column_stride == 1) {
      Vec<T> size = {}, total = {};
      for (int64_t j = 0; j < w.n2; j += lanes_of<T>) {
        const Vec<T> coupling = load_part(row + j, w.n2 - j);
        const Vec<Int> bits = bit_cast<Vec<Int>>(coupling) & FloatBits<T>::kMagnitude;
        const Vec<T> magnitude = bit_cast<Vec<T>>(bits);
        lane_max = vector_max(lane_max, bits);
        size += magnitude, total += coupling;
        store(sizes + j, load<Vec<T>>(sizes + j) + magnitude);
        store(totals + j, load<Vec<T>>(totals + j) + coupling);
      }
      row_size = quick_sum(size), row_total = quick_sum(total);
    } else {
      for (int64_t j = 0; j < w.n2; ++j) {
        const T coupling = row[j * w.column_stride];
        const Int bits = magnitude_bits(coupling);
        T magnitude;
        __builtin_memcpy(&magnitude, &bits, sizeof bits);
        out.largest_bits = bits > out.largest_bits ? bits : out.largest_bits;
        row_size += magnitude, row_total += coupling;
        sizes[j] += magnitude, totals[j] += coupling;
      }
    }
    out.note(row_size, row_total);
  }
  for (int l = 0; l < lanes_of<T>; ++l) out.largest_bits = lane_max[l] > out.largest_bits ? lane_max[l] : out.largest_bits;
  for (int64_t j = 0; j < w.n2; ++j) out.note(sizes[j], totals[j]);
  return out;
}

// The largest sum of ceil(|w| * factor) over a row or a column, which defines the scale.
template <class T>
inline int64_t largest_rounded_up_sum(const CouplingView& w, T factor, int32_t* column_sums) {
  for (int64_t j = 0; j < w.n2; ++j) column_sums[j] = 0;
  int32_t largest = 0;
  for (int64_t i = 0; i < w.n1; ++i) {
    const T* row = (const T*)w.data + i * w.row_stride;
    int32_t row_sum = 0;
    for (int64_t j = 0; j < w.n2; ++j) {
      const T signed_x = row[j * w.column_stride] * factor, x = signed_x < 0 ? -signed_x : signed_x;
      int32_t q = int32_t(x);
      q += T(q) < x;
      row_sum += q;
      column_sums[j] += q;
    }
    largest = row_sum > largest ? row_sum : largest;
  }
  for (int64_t j = 0; j < w.n2; ++j) largest = column_sums[j] > largest ? column_sums[j] : largest;
  return largest;
}

// sums: [2, padded_row(n2)] of 8 bytes each
template <class T>
inline CouplingStatus scale_exponent_of(const CouplingView& w, void* sums, int* k, CouplingScan<T>& scan) {
  *k = kMaxScaleExponent;
  scan = scan_couplings<T>(w, (T*)sums);
  const int64_t degree = w.n1 > w.n2 ? w.n1 : w.n2;
  const LargestCoupling most = largest_coupling<T>(scan.largest_bits, degree);
  if (most.status != CouplingStatus::kOk || most.fits) return most.status;
  const int e = most.exponent;
  // The floating-point sum bounds the integer one to within its rounding errors and the degree, which nearly always settles k.
  const T factor = power_of_two<T>(coupling_sum_bits(degree) - e);
  const double sum = double(scan.largest_sum) * double(factor), slack = sum * double(degree) * (sizeof(T) == 4 ? 0x1p-23 : 0x1p-52);
  if (!(sum + slack < 0x1p40)) {  // the sum left the floating-point range
    *k = scale_exponent(largest_rounded_up_sum<T>(w, factor, (int32_t*)sums), degree, e);
    return CouplingStatus::kOk;
  }
  const int64_t low = int64_t(sum - slack), high = int64_t(sum + slack) + degree + 1;
  *k = scale_exponent(low > 0 ? low : 0, degree, e);
  if (*k != scale_exponent(high, degree, e)) *k = scale_exponent(largest_rounded_up_sum<T>(w, factor, (int32_t*)sums), degree, e);
  return CouplingStatus::kOk;
}
template <class T>
inline CouplingStatus choose_scale(const CouplingView& w, void* sums, WeightScale& out) {
  CouplingScan<T> scan;
  const CouplingStatus status = scale_exponent_of<T>(w, sums, &out.k, scan);
  T largest;
  __builtin_memcpy(&largest, &scan.largest_bits, sizeof largest);
  out.largest_of_one_sign = double(scan.largest_of_one_sign);
  out.shift = 0;
  if (status == CouplingStatus::kOk)
    while (__builtin_rint(double(largest) * power_of_two<double>(out.k - out.shift)) > 0x7fff) ++out.shift;
  return status;
}
CouplingStatus scale_couplings_kernel(const CouplingView& w, void* sums, WeightScale& out) {
  return w.is_double ? choose_scale<double>(w, sums, out) : choose_scale<float>(w, sums, out);
}

// rows[i][j] = rounded(w[i][j], factor), which must fit in E, for `first` <= i < last; columns is the transpose. Rows are ld2 apart,
// columns ld1; all are as long as padded_row(), and so is their number.
template <class T, class E>
inline void round_couplings_of(const CouplingView& w, T factor, int64_t first, int64_t last, E* rows, int64_t ld2, E* columns,
                               int64_t ld1) {
  // 16 rows are transposed at a time: they fill a cache line of each column.
  for (int64_t begin = first; begin < last; begin += 16) {
    const int64_t end = begin + 16 < last ? begin + 16 : last;
    for (int64_t i = begin; i < end; ++i) {
      const T* row = (const T*)w.data + i * w.row_stride;
      E* to = rows + i * ld2;
      int64_t j = 0;
      if constexpr (sizeof(T) == 4)
        if (w.column_stride == 1)
          for (; j < w.n2; j += kLanes) store_integers(to + j, round_to_int(load_part(row + j, w.n2 - j) * factor));
      for (; j < w.n2; ++j) to[j] = E(rounded(row[j * w.column_stride], factor));
      for (; j < padded_row(w.n2); ++j) to[j] = 0;
    }
    for (int64_t j = 0; j < w.n2; j += kSquare)
      for (int64_t i = begin; i < begin + 16; i += kSquare) transpose_square(rows + i * ld2 + j, ld2, columns + j * ld1 + i, ld1);
  }
}
template <class E>
inline void round_couplings_to(const CouplingView& w, int exponent, int64_t first, int64_t last, E* rows, E* columns) {
  const int64_t ld1 = padded_row(w.n1), ld2 = padded_row(w.n2);
  w.is_double ? round_couplings_of(w, power_of_two<double>(exponent), first, last, rows, ld2, columns, ld1)
              : round_couplings_of(w, power_of_two<float>(exponent), first, last, rows, ld2, columns, ld1);
}
void round_couplings_kernel(const CouplingView& w, int k, int64_t first, int64_t last, const RoundedCoupling& out) {
  round_couplings_to(w, k, first, last, out.rows, out.columns);
}
void round_narrow_couplings_kernel(const CouplingView& w, int k, int64_t first, int64_t last, const NarrowCoupling& out) {
  round_couplings_to(w, k - out.shift, first, last, out.rows, out.columns);
}
