// SPDX-License-Identifier: Apache-2.0
// Checks the bound on which fields of 16 bits rest (csrc/cpu/kernels/coarse_fields.h): no unit's threshold is farther from its
// coarse probability than the slack, whichever neighbours are 1. Random words would seldom meet the units that are farthest off, so
// each model is rounded here, and its fields are drawn as they are. "test_coarse_fields 20" tries 20 times as many models.
#define GIBBS_ISA tested
#include "cpu/kernels/avx512.cpp"
// the kernels first, which include the system's headers
#include "cpu/scratch.h"
#include "random_graph.h"

using namespace gibbs;

#if GIBBS_X86

namespace kernels_of = gibbs::GIBBS_ISA;

static double one_of(std::initializer_list<double> values) { return values.begin()[below(int64_t(values.size()))]; }

// A node with `degree` neighbours, some of which are neighbours of each other.
static Graph star(int64_t degree) {
  GraphMaker maker;
  maker.add_nodes(degree + 2);
  for (int64_t v = 1; v <= degree; ++v) maker.join(0, v);
  if (degree > 1) maker.join_at_random(std::min<int64_t>(2 * degree, 50), degree);
  Graph graph = maker.graph();
  graph.make_layout();
  return graph;
}

struct Model {
  Graph graph = star(int64_t(one_of({0, 1, 2, 3, 5, 8, 15, 17, 40, one_in(20) ? 1000.0 : 20.0})));
  GraphView g = graph.view();
  bool has_own = one_in(3);  // couplings of each chain
  std::vector<int32_t> rounded[kCoarseParts], halves;
  std::vector<float> exact_bias[kCoarseParts];
  Buffer<int16_t> coupling{has_own ? g.num_edges * kCoarseGroup : 2 * g.num_edges}, bias{g.num_nodes * kCoarseGroup};
  Buffer<float> offset{g.num_nodes};
  CoarseGroup group = {};
  float least_beta, largest_beta;

  Model() {
    const double size = exp2(double(one_in(4) ? below(100) - 50 : below(12) - 8));
    largest_beta = float(one_of({0.1, 1, 3, 30}) / (one_in(2) ? size : 1));
    least_beta = one_in(3) ? 1e-30f : largest_beta * float(one_of({1, 0.9, 0.3, 1e-3}));
    const double reach = least_beta > 1e-20f ? 12 / double(least_beta) : 0;
    // Either ordinary couplings, or such that lose nearly half a unit, if one of them makes the unit as large as is guessed here.
    const bool is_worst = one_in(2);
    const double unit = (2 * size + reach) / (32750 - double(g.max_degree)), lost = one_of({0.49, -0.49, 0.499});
    group.shared_coupling = !has_own, group.shared_bias = !has_own && one_in(2);
    for (int part = 0; part < kCoarseParts; ++part) {
      const int models = has_own ? kGroup : 1;
      std::vector<float> w;
      for (int64_t i = 0; i < g.num_edges * models; ++i) {
        const double x = is_worst ? i < models ? size : (lost + double(below(3))) * unit : size * normal();
        w.push_back(float(x * (has_own && one_in(2) ? exp2(-double(i % models)) : 1)));
      }
      rounded[part].resize(w.size() + 1);
      int k[kGroup];
      CHECK(kernels_of::table.of_float.round_graph_couplings(g, w.data(), models, k, rounded[part].data()) == CouplingStatus::kOk);
      for (int l = 0; l < kGroup; ++l)
        group.scale[part * kGroup + l] = has_own ? ldexpf(1, -k[l]) : part ? group.scale[0] : ldexpf(1, -k[0]);
      group.exact_coupling[part] = rounded[part].data();
      const int kind = int(below(4));
      for (int64_t i = 0; i < g.num_nodes * kGroup; ++i) {
        const double edge_of_saturation =
            (one_in(2) ? 1 : -1) * (reach + size * double(g.max_degree)) * one_of({0.5, 0.999, 1.001});
        const double x = kind == 0                ? 0
                         : kind == 1 && one_in(5) ? 1e30
                         : kind == 2 && one_in(3) ? edge_of_saturation
                                                  : normal() * size;
        exact_bias[part].push_back(float(x));
      }
      group.exact_bias[part] = exact_bias[part].data();
    }
    for (int64_t h = 0; h < 2 * g.num_edges; ++h) halves.push_back(has_own ? 0 : rounded[0][size_t(g.edge_of[h])]);
    if (!has_own) group.exact_coupling[0] = halves.data();
    group.coupling = coupling.get(), group.bias = bias.get(), group.offset = offset.get();
  }

  // The unit at a position in 64 chains: its couplings as they are and in units of a field.
  int32_t exact(int64_t h, int chain) const {
    return has_own ? group.exact_coupling[chain / kGroup][int64_t{g.edge_of[h]} * kGroup + chain % kGroup]
                   : group.exact_coupling[0][h];
  }
  int16_t coarse(int64_t h, int bit) const { return coupling.get()[has_own ? int64_t{g.edge_of[h]} * kCoarseGroup + bit : h]; }
  float bias_of(int64_t node, int chain) const {
    return group.shared_bias ? exact_bias[0][size_t(node)] : exact_bias[chain / kGroup][size_t(node * kGroup + chain % kGroup)];
  }
};

// The vector that CoarseDraw makes of 32 fields.
struct DrawnVector {
  uint32_t negative;
  alignas(64) uint16_t probability[32], slack[32];
};
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi,bmi2,popcnt"))) static DrawnVector drawn_vector(
    const kernels_of::CoarseDraw& draw, const int16_t* fields) {
  const auto drawn = draw(_mm512_load_si512(fields), _mm512_setzero_si512());
  DrawnVector out;
  out.negative = drawn.negative;
  _mm512_store_si512(out.probability, drawn.probability);
  _mm512_store_si512(out.slack, drawn.slack);
  return out;
}

// Returns the number of fields that were compared.
static int64_t check_model() {
  Model m;
  const GraphView& g = m.g;
  if (kernels_of::round_coarse_graph_kernel(g, double(m.least_beta), double(m.largest_beta), m.group) > 65000) return 0;
  int64_t compared = 0;
  for (float beta : {m.largest_beta, -m.largest_beta, m.least_beta, (m.least_beta + m.largest_beta) / 2}) {
    const kernels_of::CoarseDraw draw(kernels_of::coarse_sigmoid(m.group.fields, double(beta)), beta < 0);
    for (int64_t pos = 0; pos < g.num_nodes; ++pos)
      for (int which = 0; which < 4;
           ++which) {  // any neighbours, those that err upwards or downwards, or those that raise the field
        const int64_t node = g.order[pos];
        alignas(64) int16_t field[kCoarseGroup];
        int32_t sum[kCoarseGroup] = {};
        for (int bit = 0; bit < kCoarseGroup; ++bit) {
          const int chain = kernels_of::chain_of_coarse_bit(bit);
          int64_t of_unit = m.bias.get()[m.group.shared_bias ? node : node * kCoarseGroup + bit];
          for (int64_t h = g.row_offsets[pos]; h < g.row_offsets[pos + 1]; ++h) {
            const int32_t exact = m.exact(h, chain);
            const double error =
                double(m.coarse(h, bit)) - double(exact) * double(m.group.scale[chain]) / double(m.group.fields.unit);
            if (which == 0 ? one_in(2) : which == 1 ? error > 0 : which == 2 ? error < 0 : exact > 0)
              sum[bit] += exact, of_unit += m.coarse(h, bit);
          }
          CHECK(of_unit >= -INT16_MAX && of_unit <= INT16_MAX, "%d", int(of_unit));
          field[bit] = int16_t(of_unit);
        }
        for (int half = 0; half < 2; ++half) {
          const DrawnVector drawn = drawn_vector(draw, field + 32 * half);
          for (int l = 0; l < 32; ++l) {
            const int bit = 32 * half + l, chain = kernels_of::chain_of_coarse_bit(bit);
            const float bias = m.bias_of(node, chain);
            const uint32_t exact = threshold(binary_logit(sum[bit], m.group.scale[chain], bias, beta));
            const int64_t expected = drawn.negative >> l & 1 ? (int64_t{1} << 32) - exact : int64_t{exact};
            const double off = fabs(double(expected) / 65536 - double(drawn.probability[l]));
            CHECK(off <= double(drawn.slack[l]) || drawn.slack[l] == 65535,
                  "degree %d, beta %g of %g to %g, field %d: %g of 2^-16, the slack is %d", int(g.max_degree), double(beta),
                  double(m.least_beta), double(m.largest_beta), field[bit], off, int(drawn.slack[l]));
            ++compared;
          }
        }
      }
  }
  return compared;
}

int main(int argc, char** argv) {
  if (!set_instruction_set("avx512")) return 0;
  int64_t compared = 0;
  for (int64_t trial = 0; trial < 400 * (argc > 1 ? atoi(argv[1]) : 1); ++trial) compared += check_model();
  CHECK(compared > 1'000'000, "%ld", long(compared));
}

#else

int main() {}

#endif
