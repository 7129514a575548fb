// SPDX-License-Identifier: Apache-2.0
// Compares the routes of binary sweeps of graphs (kGraphRouteNames) to the bit on every instruction set, over enough updates
// to meet many ties of high bytes, one update in 256. "test_graph_routes 20" makes 20 times as many sweeps.
#include "cpu/graph.h"
#include "random_graph.h"

using namespace gibbs;

struct Model {
  Graph graph;
  int64_t chains;
  std::vector<float> coupling, bias;
  double beta;
  std::vector<uint32_t> clamp;  // or none
  bool has_own = false;         // each chain its own couplings
};

static void run(const Model& m, GraphRoute route, int64_t first_sweep, int64_t num_sweeps, std::vector<uint32_t>& state) {
  GraphCall call;
  call.graph = m.graph.view();
  call.batch = Batch({m.chains}, {m.has_own});
  call.is_double = false;
  call.coupling = {m.coupling.data(), {m.has_own ? m.graph.num_edges() : 0}, 1, 0};
  call.bias = {m.bias.data(), {0}, 1, 0};
  call.seed = 5;
  call.sweep_offset = first_sweep;
  call.num_sweeps = num_sweeps;
  call.beta = {m.beta};
  call.route = route;
  call.bits = state.data();
  call.clamp = m.clamp.empty() ? nullptr : m.clamp.data();
  Rounding rounding;
  const Runtime serial = {1, nullptr, nullptr};
  CHECK(run_graph(call, serial, &rounding) == Outcome::kOk);
}

// Chains with common random words soon forget a unit drawn wrongly, so states are compared every few sweeps.
static void compare(const Model& m, int64_t num_sweeps) {
  const std::vector<uint32_t> start = random_bits(m.chains, m.graph.num_nodes);
  std::vector<std::vector<uint32_t>> expected;
  for (const char* name : {"baseline", "avx2", "avx512"}) {
    if (!set_instruction_set(name)) continue;
    for (size_t number = 1; number < std::size(kGraphRouteNames); ++number) {
      const auto route = GraphRoute(number);
      std::vector<uint32_t> state = start;
      size_t step = 0;
      for (int64_t sweep = 0, count; sweep < num_sweeps; sweep += count, ++step) {
        count = 1 + int64_t(step % 3);
        run(m, route, sweep, count, state);
        if (step == expected.size()) expected.push_back(state);
        CHECK(state == expected[step], "%s, %s, %d nodes, degree %d, beta %g: sweep %d", name, kGraphRouteNames[number],
              int(m.graph.num_nodes), int(m.graph.view().max_degree), m.beta, int(sweep));
      }
    }
  }
}

// Couplings that all lose nearly half a unit of a field of 16 bits, so that fields are as far off as they can be. Node 0 never is 1:
// its couplings and bias are what makes the unit large. Half of the other nodes always are 1, and the rest goes either way.
static void compare_at_worst(Model m, bool has_own, double sign, int64_t num_sweeps) {
  const GraphView g = m.graph.view();
  constexpr double kHub = 50, kNextPowerOfTwo = 64;  // shared couplings are summed up, for others the fixed point's scale serves
  const double sum = has_own ? kNextPowerOfTwo : kHub;
  m.beta = 1;
  m.has_own = has_own;
  const double unit = (2 * sum + 12 / m.beta) / (32750 - double(g.max_degree));
  int64_t hub_degree = 0;
  for (int64_t node : m.graph.edges) hub_degree += node == 0;
  m.coupling.clear();
  for (int64_t c = 0; c < (has_own ? m.chains : 1); ++c)
    for (int64_t e = 0; e < g.num_edges; ++e) {
      const bool of_hub = m.graph.edges[size_t(2 * e)] == 0 || m.graph.edges[size_t(2 * e + 1)] == 0;
      m.coupling.push_back(float(of_hub ? kHub / double(hub_degree) : sign * 0.49 * unit));
    }
  m.bias.assign(size_t(g.num_nodes), 20);
  for (int32_t at = g.color_offsets[1]; at < g.num_nodes; ++at) m.bias[size_t(g.order[at])] = float(0.3 * normal());
  m.bias[0] = -1000;
  compare(m, num_sweeps);
}

// Single chains hold the bits of a graph in 1 to 16 registers.
static void compare_sizes() {
  for (const int64_t nodes : {400, 900, 1800, 3600, 7200}) {
    Model m = {of_degree(5, nodes).graph(), 3, {}, {}, 1, {}};
    m.graph.make_layout();
    for (int64_t e = 0; e < m.graph.num_edges(); ++e) m.coupling.push_back(float(0.5 * normal()));
    for (int64_t i = 0; i < nodes; ++i) m.bias.push_back(float(normal()));
    compare(m, 6);
  }
}

int main(int argc, char** argv) {
  const int64_t times = argc > 1 ? atoi(argv[1]) : 1;
  compare_sizes();
  for (const int degree : {3, 4, 5, 6, 7, 8, 9, 15}) {  // tables serve up to 8
    Model m = {degree == 6 ? chimera(4, 4, 4).graph() : of_degree(degree, 100).graph(), 130, {}, {}, 1, {}};
    m.graph.make_layout();
    const auto compare_at = [&](double beta, double coupling, const std::function<double(int64_t)>& bias) {
      m.beta = beta;
      m.coupling.clear(), m.bias.clear();
      for (int64_t e = 0; e < m.graph.num_edges(); ++e) m.coupling.push_back(float(coupling * normal()));
      for (int64_t i = 0; i < m.graph.num_nodes; ++i) m.bias.push_back(float(bias(i)));
      compare(m, 25 * times);
    };
    compare_at(1, 0.5, [](int64_t) { return normal(); });
    compare_at(-0.7, 3, [](int64_t) { return 2 * normal(); });
    // Fields of 16 bits are so coarse that many units take exact sums.
    compare_at(4, 2, [](int64_t) { return normal(); });
    // Thresholds of exactly 2^31: a tie never makes a 1.
    compare_at(0, 1, [](int64_t) { return normal(); });
    // High bytes 0 and 255, whose low bits say whether the probability is 0, all but 1, or between.
    compare_at(1, 0.05, [](int64_t i) { return (i % 2 ? 1 : -1) * (5.5 + double(i % 7)); });
    compare_at(1, 0, [](int64_t i) { return (i % 2 ? 1 : -1) * (i % 3 ? 30 : 21.9); });
    for (const bool has_own : {false, true})
      for (const double sign : {-1, 1}) compare_at_worst(m, has_own, sign, 20 * times);
    // A scale of its own for each chain.
    compare_at(1, 0.5, [](int64_t) { return normal(); });
    m.has_own = true;
    for (int64_t i = m.graph.num_edges(); i < m.chains * m.graph.num_edges(); ++i)
      m.coupling.push_back(float(0.1 * double(1 + i / m.graph.num_edges() % 9) * normal()));
    compare(m, 25 * times);
    m.has_own = false;
    m.clamp = random_bits(m.chains, m.graph.num_nodes);
    compare_at(1, 0.5, [](int64_t) { return normal(); });
  }
}
