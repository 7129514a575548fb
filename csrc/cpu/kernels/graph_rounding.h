// SPDX-License-Identifier: Apache-2.0
// No include guard: see instruction_set.h. The scales of one or 16 models of a graph, and their couplings rounded to them.

// One model or a group of them at once: w [num_edges, kModels], k [kModels], out [num_edges, kModels]. Every sum is an integer one:
// unlike those of matrices, sums over a few neighbours are cheap.
template <class T, int kModels>
inline CouplingStatus round_graph_couplings(const GraphView& g, const T* w, int* k, int32_t* out) {
  using Int = typename FloatBits<T>::Int;
  Int largest_bits[kModels] = {};
  for (int64_t e = 0; e < g.num_edges; ++e)
    for (int l = 0; l < kModels; ++l) {
      const Int bits = magnitude_bits(w[e * kModels + l]);
      largest_bits[l] = bits > largest_bits[l] ? bits : largest_bits[l];
    }
  const int64_t degree = g.max_degree > 1 ? g.max_degree : 1;
  int exponent[kModels];
  T factor[kModels];
  bool scan = false;
  for (int l = 0; l < kModels; ++l) {
    const LargestCoupling most = largest_coupling<T>(largest_bits[l], degree);
    if (most.status != CouplingStatus::kOk) return most.status;
    exponent[l] = most.exponent;
    factor[l] = most.fits ? T(0) : power_of_two<T>(coupling_sum_bits(degree) - most.exponent);
    scan |= !most.fits;
    k[l] = kMaxScaleExponent;
  }
  if (scan) {
    int32_t largest[kModels] = {};
    for (int64_t pos = 0; pos < g.num_nodes; ++pos) {
      int32_t sum[kModels] = {};
      for (int32_t h = g.row_offsets[pos]; h < g.row_offsets[pos + 1]; ++h)
        for (int l = 0; l < kModels; ++l) {
          const T value = w[int64_t{g.edge_of[h]} * kModels + l], scaled = value * factor[l], x = scaled < 0 ? -scaled : scaled;
          const int32_t floor = int32_t(x);
          // A product that underflows is rounded up to 1 nevertheless.
          sum[l] += floor + int32_t((T(floor) < x) | ((x == 0) & (value != 0) & (factor[l] != 0)));
        }
      for (int l = 0; l < kModels; ++l) largest[l] = sum[l] > largest[l] ? sum[l] : largest[l];
    }
    for (int l = 0; l < kModels; ++l)
      if (factor[l] != 0) k[l] = scale_exponent(largest[l], degree, exponent[l]);
  }
  if (!out) return CouplingStatus::kOk;
  for (int l = 0; l < kModels; ++l) factor[l] = power_of_two<T>(k[l]);
  for (int64_t e = 0; e < g.num_edges; ++e)
    for (int l = 0; l < kModels; ++l) out[e * kModels + l] = rounded(w[e * kModels + l], factor[l]);
  return CouplingStatus::kOk;
}
template <class T>
CouplingStatus round_graph_couplings_kernel(const GraphView& g, const T* w, int models, int* k, int32_t* out) {
  return models == 1 ? round_graph_couplings<T, 1>(g, w, k, out) : round_graph_couplings<T, kGroup>(g, w, k, out);
}
