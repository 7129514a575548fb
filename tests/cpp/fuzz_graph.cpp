// SPDX-License-Identifier: Apache-2.0
// Random graphs, batches, strides and values through graph_layout.h and cpu/graph.h. Binary sweeps and annealed ones are compared
// to the bit with the scalar functions of core/, on every instruction set, number of threads and route; relaxed ones in double with
// a plain rewriting, and their gradients with its differences.
#include <stdexcept>
#include <string>

#include "core/threshold.h"
#include "cpu/graph.h"
#include "random_graph.h"
#include "reads.h"

using namespace gibbs;

// ---- layouts -------------------------------------------------------------------------------------------------------------------

// Checks everything that core/graph_view.h and graph_layout.h promise of a layout, from the list of edges alone.
static void check_layout(const Graph& graph) {
  const int64_t n = graph.num_nodes, edges = graph.num_edges();
  CHECK(int64_t(graph.layout.size()) >= kLayoutHeader);
  const GraphView g = graph.view();
  CHECK(g.num_nodes == n && g.num_edges == edges && g.num_colors >= 1 && g.num_colors <= n);
  CHECK(int64_t(graph.layout.size()) == layout_size(n, edges, g.num_colors));
  CHECK(g.edge_of + 2 * edges == graph.layout.data() + graph.layout.size());

  CHECK(g.color_offsets[0] == 0 && g.color_offsets[g.num_colors] == n);
  std::vector<int64_t> colors(size_t(n), -1);
  for (int64_t c = 0; c < g.num_colors; ++c) {
    CHECK(g.color_offsets[c] < g.color_offsets[c + 1], "colour %d has no node", int(c));
    for (int32_t pos = g.color_offsets[c]; pos < g.color_offsets[c + 1]; ++pos) {
      const int32_t v = g.order[pos];
      CHECK(v >= 0 && v < n && colors[size_t(v)] < 0, "node %d at %d", v, pos);
      CHECK(pos == g.color_offsets[c] || g.order[pos - 1] < v, "node %d at %d", v, pos);
      colors[size_t(v)] = c;
    }
  }

  int64_t max_degree = 0;
  CHECK(g.row_offsets[0] == 0 && g.row_offsets[n] == 2 * edges);
  for (int64_t pos = 0; pos < n; ++pos) {
    int32_t h = g.row_offsets[pos];
    for (int64_t e = 0; e < edges; ++e)
      for (size_t end : {size_t(2 * e), size_t(2 * e + 1)}) {
        if (graph.edges[end] != g.order[pos]) continue;
        CHECK(h < g.row_offsets[pos + 1] && g.neighbors[h] == graph.edges[end ^ 1] && g.edge_of[h] == e, "half-edge %d", h);
        CHECK(colors[size_t(g.neighbors[h])] != colors[size_t(g.order[pos])], "edge %d", int(e));
        ++h;
      }
    CHECK(h == g.row_offsets[pos + 1], "row %d", int(pos));
    max_degree = std::max<int64_t>(max_degree, h - g.row_offsets[pos]);
  }
  CHECK(g.max_degree == max_degree);

  if (graph.colors) {  // in the order they had
    const std::set<int64_t> used(graph.colors->begin(), graph.colors->end());
    for (int64_t v = 0; v < n; ++v)
      CHECK(colors[size_t(v)] == std::distance(used.begin(), used.find((*graph.colors)[size_t(v)])), "node %d", int(v));
    return;
  }
  std::vector<int64_t> parity(size_t(n), -1);
  for (size_t v = 0; v < size_t(n); ++v) {
    if (parity[v] >= 0) continue;
    parity[v] = 0;  // the lowest of its component
    for (bool more = true; more;) {
      more = false;
      for (size_t end = 0; end < graph.edges.size(); ++end) {
        const int64_t from = parity[size_t(graph.edges[end])];
        int64_t& to = parity[size_t(graph.edges[end ^ 1])];
        if (from >= 0 && to < 0) to = 1 - from, more = true;
      }
    }
  }
  bool bipartite = true;
  for (size_t e = 0; e < size_t(edges); ++e)
    bipartite &= parity[size_t(graph.edges[2 * e])] != parity[size_t(graph.edges[2 * e + 1])];
  if (bipartite)
    CHECK(colors == parity);
  else
    CHECK(g.num_colors >= 3 && g.num_colors <= max_degree + 1, "%d colours for degree %d", int(g.num_colors), int(max_degree));
}

static std::string error_of(Graph graph) {
  try {
    graph.make_layout();
  } catch (const std::invalid_argument& e) {
    return e.what();
  }
  return "none";
}

static void fuzz_layout() {
  Graph graph = random_graph();
  check_layout(graph);

  const int64_t n = graph.num_nodes, edges = graph.num_edges();
  const auto text = [](int64_t x) { return std::to_string(x); };
  const auto shown = [&](int64_t e) {
    return "edges[" + text(e) + "] = (" + text(graph.edges[size_t(2 * e)]) + ", " + text(graph.edges[size_t(2 * e + 1)]) + ")";
  };
  const int64_t place = below(edges + 1), node = below(n);
  const auto insert = [&](int64_t u, int64_t v) {
    if (one_in(2)) std::swap(u, v);
    graph.edges.insert(graph.edges.begin() + 2 * place, {u, v});
  };
  const auto expect = [&](const std::string& what) {
    const std::string error = error_of(graph);
    CHECK(error == "ColoredGraph: " + what, "got '%s'", error.c_str());
  };
  constexpr int64_t kLowest = std::numeric_limits<int64_t>::min(), kLargest = std::numeric_limits<int64_t>::max();
  switch (below(7)) {
    case 0: {
      const int64_t outside[] = {-1, n, n + below(1000), int64_t{1} << 31, (int64_t{1} << 32) + node, kLargest, kLowest};
      insert(node, outside[below(7)]);
      expect("edges must join nodes 0 .. " + text(n - 1) + ", got " + shown(place));
      break;
    }
    case 1:
      insert(node, node);
      expect("edges must join two different nodes, got " + shown(place));
      break;
    case 2: {
      if (edges == 0) break;
      int64_t twin = below(edges);
      insert(graph.edges[size_t(2 * twin)], graph.edges[size_t(2 * twin + 1)]);
      twin += twin >= place;
      expect("edges must be listed once each, got " + shown(std::min(place, twin)) + " and " + shown(std::max(place, twin)));
      break;
    }
    case 3: {
      if (edges == 0) break;
      graph.colors = random_colors(graph);
      const size_t end = size_t(below(2 * edges));
      std::vector<int64_t>& colors = *graph.colors;
      colors[size_t(graph.edges[end])] = colors[size_t(graph.edges[end ^ 1])];
      int64_t first = 0;  // there may be others
      while (colors[size_t(graph.edges[size_t(2 * first)])] != colors[size_t(graph.edges[size_t(2 * first + 1)])]) ++first;
      expect("colors must differ at the two ends of an edge, got " + text(colors[size_t(graph.edges[end])]) + " at both of " +
             shown(first));
      break;
    }
    case 4: {
      graph.colors = random_colors(graph);
      const int64_t outside[] = {-1, n + 1, (int64_t{1} << 32), kLargest, kLowest}, color = outside[below(5)];
      (*graph.colors)[size_t(node)] = color;
      expect("colors must lie in 0 .. num_nodes = " + text(n) + ", got " + text(color) + " of node " + text(node));
      break;
    }
    case 5:
      graph.colors = std::vector<int64_t>(size_t(one_in(2) ? n + 1 + below(3) : below(n)));
      expect("colors must have one entry per node, " + text(n) + ", got " + text(int64_t(graph.colors->size())));
      break;
    default: {
      const int64_t outside[] = {0, -1, kMaxUnits, kLargest, kLowest};
      graph.num_nodes = outside[below(5)];
      expect("num_nodes must be at least 1 and less than 2^30, got " + text(graph.num_nodes));
    }
  }
}

// ---- problems ------------------------------------------------------------------------------------------------------------------

struct HalfEdge {
  int64_t node, edge;
};

template <class T>
struct Problem : RandomBatch {
  Graph graph;
  std::vector<bool> is_model_dim;
  bool has_energies = false;
  std::vector<std::vector<HalfEdge>> half_edges;  // of each node
  std::vector<std::vector<int64_t>> by_color;     // nodes
  Tensor<T> coupling, bias, base_bias;
  Tensor<int64_t> numbers;  // of the chains
  std::vector<uint32_t> state, clamp;
  GraphCall call;

  uint64_t number(int64_t chain) const { return uint64_t(call.chains ? at(numbers, chain, {}) : call.chain_offset + chain); }
};

// Draws a schedule in which beta often stays the same from one sweep to the next.
static void draw_schedule(std::vector<double>& betas, const std::function<double()>& value) {
  for (size_t i = 0; i < betas.size(); ++i) betas[i] = i > 0 && one_in(2) ? betas[i - 1] : value();
}
static double random_beta() { return one_in(10) ? 0 : normal(); }
template <class T>
static void draw_betas(Problem<T>& p, int64_t count, bool in_order) {
  p.draw_betas(p.call, count, p.is_model_dim, in_order, [](std::vector<double>& row) { draw_schedule(row, random_beta); });
}

template <class T>
static Problem<T> random_problem(double largest_exponent) {
  Problem<T> p;
  do {
    p.graph = random_graph();
    p.draw(65, 200);
  } while (p.chains * (p.graph.num_nodes + p.graph.num_edges()) > 60000);  // the reference is slow
  const GraphView g = p.graph.view();
  p.half_edges.resize(size_t(g.num_nodes));
  for (size_t end = 0; end < p.graph.edges.size(); ++end)
    p.half_edges[size_t(p.graph.edges[end])].push_back({p.graph.edges[end ^ 1], int64_t(end / 2)});
  for (int64_t c = 0; c < g.num_colors; ++c)
    p.by_color.emplace_back(g.order + g.color_offsets[c], g.order + g.color_offsets[c + 1]);

  const double scale = one_in(3) ? exp2(largest_exponent * (2.0 * double(below(1000)) / 999 - 1)) : exp2(double(below(5)) - 3);
  const bool equal = one_in(8);
  const std::vector<bool> shared = p.some_broadcast(!one_in(4));
  const auto coupling = [&] {
    return equal ? scale : one_in(50) ? 0.0 : std::clamp(scale * normal(), -0x1.fffffep126, 0x1.fffffep126);
  };
  p.coupling = Tensor<T>(p.shape({g.num_edges}), shared, coupling);
  const double bias_scale = exp2(double(below(8)) - 4);
  for (Tensor<T>* bias : {&p.bias, &p.base_bias})
    *bias = Tensor<T>(p.shape({g.num_nodes}), one_in(2) ? shared : p.some_broadcast(), [&] { return bias_scale * normal(); });
  p.state = random_bits(p.chains, g.num_nodes);

  GraphCall& c = p.call;
  c.graph = g;
  const bool expanded = one_in(6);  // models with the same couplings
  for (bool b : shared) p.is_model_dim.push_back(!b || (expanded && one_in(2)));
  c.batch = Batch(p.sizes, p.is_model_dim);
  c.is_double = sizeof(T) == 8;
  c.coupling = p.coupling.operand(p.sizes.size());
  c.bias = p.bias.operand(p.sizes.size());
  c.base_bias = p.base_bias.operand(p.sizes.size());
  p.draw_counters(c);
  if (one_in(6)) c.chain_offset = (int64_t{1} << 32) - below(40);
  if (one_in(6)) c.sweep_offset = (int64_t{1} << 32) - below(5);
  if (one_in(4)) {
    p.numbers = Tensor<int64_t>(p.sizes, p.some_broadcast(false), [] { return double(below(kMaxChains)); });
    c.chains = p.numbers.data.data();
    c.chains_strides = p.numbers.strides;
  }
  draw_betas(p, one_in(2) ? 1 : std::max<int64_t>(c.num_sweeps, 1), false);
  return p;
}

// ---- binary sweeps -------------------------------------------------------------------------------------------------------------

struct Result {
  std::vector<uint32_t> state;
  std::vector<double> log_weights, energies = {};
};

// The contract, written out. *scales: 2^-k of each chain's model.
template <class T>
static Result reference(const Problem<T>& p, bool annealed, std::vector<double>* scales) {
  const GraphCall& c = p.call;
  const int64_t n = p.graph.num_nodes, edges = p.graph.num_edges();
  Result r = {p.state, std::vector<double>(annealed ? size_t(p.chains) : 0)};
  std::vector<double> weight(static_cast<size_t>(edges));
  std::vector<int64_t> coupling(weight.size());
  for (int64_t chain = 0; chain < p.chains; ++chain) {
    for (int64_t e = 0; e < edges; ++e) weight[size_t(e)] = double(p.at(p.coupling, chain, {e}));
    const int k = scale_exponent_of(weight, n, std::max<int64_t>(c.graph.max_degree, 1), [&](int64_t e) {
      return std::pair(p.graph.edges[size_t(2 * e)], p.graph.edges[size_t(2 * e + 1)]);
    });
    for (size_t e = 0; e < weight.size(); ++e) coupling[e] = llrint(ldexp(weight[e], k));
    const float scale = ldexpf(1.0f, -k);
    scales->push_back(double(scale));

    uint32_t* state = r.state.data() + chain * state_words(n);
    const auto bias = [&](const Tensor<T>& t, int64_t node) { return float(p.at(t, chain, {node})); };
    const auto logit = [&](int64_t node, float beta) {
      int64_t sum = 0;
      for (const HalfEdge& h : p.half_edges[size_t(node)])
        if (bit(state, h.node)) sum += coupling[size_t(h.edge)];
      CHECK(sum >= -0x7fffffff && sum <= 0x7fffffff, "sum %lld", (long long)sum);
      const float x = binary_logit(int32_t(sum), scale, bias(p.bias, node), beta);
      return annealed ? x + (1.0f - beta) * bias(p.base_bias, node) : x;
    };
    // log of the weight of all units but those of colour 0
    const auto log_weight_of_rest = [&](float beta) {
      std::vector<bool> rest(size_t(n), true);
      double total = 0;
      for (int64_t node : p.by_color[0]) {
        rest[size_t(node)] = false;
        total += softplus(double(logit(node, beta)));
      }
      for (int64_t i = 0; i < n; ++i)
        if (rest[size_t(i)] && bit(state, i))
          total += double(beta) * double(bias(p.bias, i)) + (1 - double(beta)) * double(bias(p.base_bias, i));
      for (size_t e = 0; e < size_t(edges); ++e) {
        const int64_t u = p.graph.edges[2 * e], v = p.graph.edges[2 * e + 1];
        if (rest[size_t(u)] && rest[size_t(v)] && bit(state, u) && bit(state, v))
          total += double(beta) * double(coupling[e]) * double(scale);
      }
      return total;
    };
    for (int64_t sweep = 0; sweep < c.num_sweeps; ++sweep) {
      const float beta = annealed ? float(c.beta[size_t(sweep + 1)]) : float(p.beta_of(c, chain, sweep));
      if (annealed) r.log_weights[size_t(chain)] += log_weight_of_rest(beta) - log_weight_of_rest(float(c.beta[size_t(sweep)]));
      const RandomStream stream = random_stream(c.seed, p.number(chain), uint64_t(c.sweep_offset + sweep));
      for (const std::vector<int64_t>& nodes : p.by_color)
        for (int64_t node : nodes) {
          if (!p.clamp.empty() && bit(p.clamp.data() + chain * state_words(n), node)) continue;
          const uint32_t word = random_word(stream, uint32_t(node));
          if (c.metropolis) {
            const bool is_one = bit(state, node);
            const float x = is_one ? -logit(node, beta) : logit(node, beta);
            set_bit(state, node, is_one != (x >= 0 || word < acceptance(x)));
          } else {
            set_bit(state, node, word < threshold(logit(node, beta)));
          }
        }
    }
    if (!p.has_energies) continue;
    double sum = 0;
    std::vector<bool> is_before(static_cast<size_t>(n));
    for (const std::vector<int64_t>& nodes : p.by_color)
      for (int64_t node : nodes) {
        is_before[size_t(node)] = true;
        if (!bit(state, node)) continue;
        int64_t acc = 0;
        for (const HalfEdge& h : p.half_edges[size_t(node)])
          if (is_before[size_t(h.node)] && bit(state, h.node)) acc += coupling[size_t(h.edge)];
        sum += double(acc) * double(scale) + double(bias(p.bias, node));
      }
    r.energies.push_back(-sum);
  }
  return r;
}

template <class T>
static void fuzz_reads() {
  Problem<T> p = random_problem<T>(40);
  if (!p.call.num_sweeps) return;
  p.call.metropolis = one_in(4);
  if (one_in(3)) {
    p.clamp = random_bits(p.chains, p.graph.num_nodes);
    p.call.clamp = p.clamp.data();
  }
  p.has_energies = true;
  const int64_t every = random_divisor(p.call.num_sweeps);
  std::vector<std::pair<int64_t, int64_t>> ends;
  for (size_t e = 0; e < size_t(p.graph.num_edges()); ++e) ends.emplace_back(p.graph.edges[2 * e], p.graph.edges[2 * e + 1]);
  const Reads start(p.chains, {{p.graph.num_nodes, p.state}}, ends.size());
  Reads expected = start;
  for (int64_t sweeps = every; sweeps <= p.call.num_sweeps; sweeps += every) {
    Problem<T> part = p;
    part.call.num_sweeps = sweeps;
    std::vector<double> scales;
    const Result r = reference(part, false, &scales);
    expected.expect(p.call.batch, {r.state}, r.energies, ends);
  }
  for_each_runtime([&](const char* name, const Runtime& runtime) {
    for (const bool best : {false, true}) {
      Reads found = start;
      GraphCall call = p.call;
      call.route = GraphRoute(below(int64_t{std::size(kGraphRouteNames)}));
      call.bits = found.parts[0].state.data();
      if (one_in(2)) call.most_kept = 0;
      Rounding rounding;
      const Outcome outcome = found.make(
          call, every, best, [&](const GraphCall& c, const AfterRound& after) { return run_graph(c, runtime, &rounding, after); });
      CHECK(outcome == Outcome::kOk, "outcome %d", int(outcome));
      Reads wanted = expected;
      if (!best) wanted.forget_best(start);
      CHECK(found == wanted, "%s, %d threads, route %d, %ld nodes, %ld chains, best %d", name, runtime.num_threads, int(call.route),
            p.graph.num_nodes, p.chains, best);
    }
  });
}

template <class T>
static void fuzz_binary() {
  const bool annealed = one_in(4);
  Problem<T> p = random_problem<T>(one_in(2) ? 40 : annealed ? 100 : 125);
  const int64_t n = p.graph.num_nodes;
  if (annealed) {
    p.draw_annealed_betas(p.call);
  } else {
    p.call.metropolis = one_in(3);
    if (one_in(3)) {
      p.clamp = random_bits(p.chains, n);
      p.call.clamp = p.clamp.data();
    }
  }
  p.has_energies = !annealed && p.call.num_sweeps && one_in(3);
  std::vector<double> scales;
  const Result expected = reference(p, annealed, &scales);
  const int64_t degree = std::max<int64_t>(p.call.graph.max_degree, 1);
  double largest_error = 0;  // of a field
  for (int64_t chain = 0; chain < p.chains && p.call.num_sweeps; ++chain)
    for (int64_t i = 0; i < n; ++i) {
      const float bias = float(p.at(p.bias, chain, {i})), base = annealed ? float(p.at(p.base_bias, chain, {i})) : bias;
      const float scale = float(scales[size_t(chain)]);
      largest_error = std::max(largest_error, double(field_error({scale, cancelling_bias(bias, base, scale)}, degree)));
    }
  for_each_runtime([&](const char* name, const Runtime& runtime) {
    const Batch& batch = p.call.batch;
    for (size_t number = 0; number < std::size(kGraphRouteNames); ++number) {
      const auto route = GraphRoute(number);
      const double unwritten = p.call.num_sweeps ? nan("") : 0;
      Result r = {p.state, std::vector<double>(expected.log_weights.size(), unwritten)};
      GraphCall call = p.call;
      call.route = route;
      call.bits = r.state.data();
      call.log_weights = annealed ? r.log_weights.data() : nullptr;
      r.energies.resize(p.has_energies ? size_t(p.chains) : 0);
      if (p.has_energies) call.energies = r.energies.data();
      if (one_in(2)) call.most_kept = 0;
      const AfterRound after = annealed ? nullptr : p.draw_rounds(call);
      Rounding rounding = {nanf(""), nanf("")};
      const Outcome outcome = run_graph(call, runtime, &rounding, after);
      CHECK(outcome == Outcome::kOk, "outcome %d", int(outcome));
      const double limit = kResolutionLimit / largest_magnitude(call.beta), error = field_error(rounding, degree);
      CHECK(largest_error > limit ? error == largest_error : error <= limit, "%s: %g, not %g", name, error, largest_error);
      CHECK(r.energies == expected.energies, "%s, %d threads, route %d, %ld nodes, %ld chains: energies", name, runtime.num_threads,
            int(route), n, p.chains);
      for (int64_t chain = 0; chain < p.chains; ++chain)
        for (int64_t i = 0; i < 32 * state_words(n); ++i) {
          const int64_t at = 32 * chain * state_words(n) + i;
          CHECK(bit(r.state.data(), at) == bit(expected.state.data(), at),
                "%s, %d threads, route %d, %ld nodes, %ld edges, degree %ld: node %ld of chain %ld of %ld (%ld models)", name,
                runtime.num_threads, int(route), n, p.graph.num_edges(), call.graph.max_degree, i, chain, p.chains,
                batch.num_models());
        }
      for (int64_t chain = 0; chain < int64_t(r.log_weights.size()); ++chain) {
        double size = double(n);  // terms are float32: the error goes with the largest of them
        for (int64_t e = 0; e < p.graph.num_edges(); ++e) size += 2 * fabs(double(p.at(p.coupling, chain, {e})));
        for (int64_t i = 0; i < n; ++i)
          size += fabs(double(p.at(p.bias, chain, {i}))) + fabs(double(p.at(p.base_bias, chain, {i})));
        const double got = r.log_weights[size_t(chain)], wanted = expected.log_weights[size_t(chain)];
        CHECK(fabs(got - wanted) <= 2e-7 * size * double(p.call.num_sweeps), "%s: chain %ld: %g, not %g", name, chain, got, wanted);
      }
    }
    std::vector<double> of_models(size_t(batch.num_models()), nan(""));
    if (p.chains == 0) return;
    CHECK(run_graph_coupling_resolution(p.call.graph, batch, p.call.is_double, p.call.coupling, of_models.data()) == Outcome::kOk);
    for (int64_t m = 0; m < batch.num_models(); ++m)
      CHECK(of_models[size_t(m)] == scales[size_t(batch.linear(m, batch.chains_per_model() - 1))], "%s: model %ld", name, m);
  });
}

// ---- cluster moves -------------------------------------------------------------------------------------------------------------

// The contract, written out, of the chains 2 c and 2 c + 1 of the second dimension. rounded: [chain, num_edges].
template <class T>
static void move_clusters(const Problem<T>& p, const std::vector<std::vector<int64_t>>& rounded, uint32_t* states) {
  const int64_t n = p.graph.num_nodes, num_chains = p.sizes[1], num_betas = p.sizes[0];
  const int64_t inner = p.chains / (num_betas * num_chains);
  for (int64_t first = 0; first < p.chains; ++first) {
    const int64_t c = first / inner % num_chains, second = first + inner;
    if (c % 2 || c + 1 == num_chains) continue;
    uint32_t *x = states + first * state_words(n), *y = states + second * state_words(n);
    std::vector<int64_t> cluster, differ;
    for (int64_t i = 0; i < n; ++i)
      if (bit(x, i) != bit(y, i)) differ.push_back(i);
    if (differ.empty()) continue;
    const auto beta = uint32_t(first / (inner * num_chains));
    const auto last_sweep = uint64_t(p.call.sweep_offset + p.call.num_sweeps - 1);
    const uint32_t word = random_word(random_stream(p.call.seed, p.number(first) / uint64_t(num_betas), last_sweep, 2), beta);
    cluster.push_back(differ[size_t(uint64_t{word} * differ.size() >> 32)]);
    const auto is_in = [](const std::vector<int64_t>& some, int64_t i) {
      return std::find(some.begin(), some.end(), i) != some.end();
    };
    for (size_t next = 0; next < cluster.size(); ++next)
      for (const HalfEdge& h : p.half_edges[size_t(cluster[next])])
        if (rounded[size_t(first)][size_t(h.edge)] && is_in(differ, h.node) && !is_in(cluster, h.node)) cluster.push_back(h.node);
    for (int64_t i : cluster) {
      const bool one = bit(x, i);
      set_bit(x, i, !one), set_bit(y, i, one);
    }
  }
}

template <class T>
static void fuzz_clusters() {
  Problem<T> p = random_problem<T>(40);
  if (p.sizes.size() < 2 || p.is_model_dim[1] || !p.chains) return;
  p.call.num_sweeps = 1, p.call.num_betas = 1, p.call.beta.assign(p.call.beta.size(), 0.3);
  p.call.beta_strides.clear(), p.call.batch = Batch(p.sizes, p.is_model_dim);
  const int64_t degree = std::max<int64_t>(p.call.graph.max_degree, 1);
  std::vector<std::vector<int64_t>> rounded(static_cast<size_t>(p.chains));
  for (int64_t chain = 0; chain < p.chains; ++chain) {
    std::vector<double> weight;
    for (int64_t e = 0; e < p.graph.num_edges(); ++e) weight.push_back(double(p.at(p.coupling, chain, {e})));
    const int k = scale_exponent_of(weight, p.graph.num_nodes, degree, [&](int64_t e) {
      return std::pair(p.graph.edges[size_t(2 * e)], p.graph.edges[size_t(2 * e + 1)]);
    });
    for (const double w : weight) rounded[size_t(chain)].push_back(llrint(ldexp(w, k)));
  }
  for_each_runtime([&](const char* name, const Runtime& runtime) {
    std::vector<uint32_t> expected = p.state, state = p.state;
    Rounding rounding = {};
    p.call.pairing = {}, p.call.bits = expected.data();
    CHECK(run_graph(p.call, runtime, &rounding) == Outcome::kOk);
    move_clusters(p, rounded, expected.data());
    p.call.pairing = {p.sizes[0], p.sizes[1], p.chains / (p.sizes[0] * p.sizes[1])};
    p.call.bits = state.data();
    CHECK(run_graph(p.call, runtime, &rounding) == Outcome::kOk);
    CHECK(state == expected, "%s, %d threads, %ld nodes, %ld edges, %ld chains", name, runtime.num_threads, p.graph.num_nodes,
          p.graph.num_edges(), p.chains);
  });
}

// ---- relaxed sweeps ------------------------------------------------------------------------------------------------------------

// Inputs and results of a chain's relaxed sweeps.
struct Point {
  std::vector<double> start, bias, coupling;
};
struct Trace {
  std::vector<double> value, mean, fields;
  std::vector<RelaxedUpdate> updates;
};
template <class T>
static Trace relaxed_reference(const Problem<T>& p, int64_t chain, const Point& x, const Trace* frozen = nullptr) {
  const GraphCall& c = p.call;
  const size_t n = x.start.size();
  Trace t = {x.start, std::vector<double>(n), std::vector<double>(n * size_t(c.num_relaxed_sweeps)), {}};
  for (int64_t sweep = 0; sweep < c.num_relaxed_sweeps; ++sweep) {
    const double beta = p.beta_of(c, chain, c.num_sweeps + sweep);
    const RandomStream stream = random_stream(c.seed, p.number(chain), uint64_t(c.sweep_offset + c.num_sweeps + sweep));
    for (const std::vector<int64_t>& nodes : p.by_color)
      for (int64_t node : nodes) {
        double field = x.bias[size_t(node)];
        for (const HalfEdge& h : p.half_edges[size_t(node)]) field += x.coupling[size_t(h.edge)] * t.value[size_t(h.node)];
        const RelaxedUpdate r =
            relax(c, beta * field, random_word(stream, uint32_t(node)), frozen ? &frozen->updates[t.updates.size()] : nullptr);
        t.updates.push_back(r);
        t.fields[size_t(sweep) * n + size_t(node)] = field;
        t.value[size_t(node)] = r.value;
        t.mean[size_t(node)] = r.q;
      }
  }
  return t;
}

template <class T>
struct Gradients {
  std::vector<T> of_relaxed, of_mean;  // given
  std::vector<T> state, bias, coupling;
};

// Compares a few of the gradients with central differences, except across a kink.
static void check_gradients(const Problem<double>& p, const std::vector<Point>& points, const std::vector<Trace>& traces,
                            const Gradients<double>& g, const char* name) {
  const size_t n = size_t(p.graph.num_nodes), edges = size_t(p.graph.num_edges());
  const Batch& batch = p.call.batch;
  constexpr double kStep = 1e-6;
  for (int probe = 0; probe < 6; ++probe) {
    std::vector<int64_t> chains = {below(p.chains)};
    const size_t unit = size_t(below(p.graph.num_nodes)), at = size_t(chains[0]) * n + unit;
    double got = probe % 2 ? g.state[at] : g.bias[at];
    std::function<double&(Point&)> coordinate = [&](Point& x) -> double& { return probe % 2 ? x.start[unit] : x.bias[unit]; };
    if (probe > 3) {
      if (edges == 0) continue;
      const int64_t model = below(batch.num_models());
      const size_t e = size_t(below(int64_t(edges)));
      chains.clear();
      for (int64_t c = 0; c < batch.chains_per_model(); ++c) chains.push_back(batch.linear(model, c));
      got = g.coupling[size_t(model) * edges + e];
      coordinate = [e](Point& x) -> double& { return x.coupling[e]; };
    }
    double wanted = 0, size = 1;
    bool kink = false;
    for (int64_t chain : chains) {
      const Trace& here = traces[size_t(chain)];
      constexpr double kWeights[][2] = {{-2, 1}, {-1, -8}, {1, 8}, {2, -1}};  // of the difference of fourth order: steps, weights
      double difference = 0;
      for (const auto& [steps, weight] : kWeights) {
        Point x = points[size_t(chain)];
        coordinate(x) += steps * kStep;
        const Trace t = relaxed_reference(p, chain, x, &here);
        for (size_t i = 0; i < n; ++i) {
          const size_t j = size_t(chain) * n + i;
          difference += weight * (g.of_relaxed[j] * (t.value[i] - here.value[i]) + g.of_mean[j] * (t.mean[i] - here.mean[i]));
        }
        for (size_t u = 0; u < t.updates.size(); ++u) kink |= t.updates[u].piece != here.updates[u].piece;
      }
      difference /= 12 * kStep;
      wanted += difference;
      size += fabs(difference);
    }
    if (!kink)
      CHECK(fabs(got - wanted) <= 1e-7 * size, "%s, relaxation %d, probe %d: %g, not %g", name, p.call.relaxation, probe, got,
            wanted);
  }
}

template <class T>
static void fuzz_relaxed() {
  Problem<T> p = random_problem<T>(0);
  GraphCall& c = p.call;
  const int64_t n = p.graph.num_nodes, edges = p.graph.num_edges();
  if (one_in(2)) c.num_sweeps = 0;
  c.num_relaxed_sweeps = 1 + below(3);
  draw_betas(p, one_in(2) ? 1 : c.num_sweeps + c.num_relaxed_sweeps, true);
  c.relaxation = Relaxation(below(kNumRelaxations));
  c.sharpness = 0.5 + double(below(10));
  c.slope_gradient = one_in(2);
  const size_t size = size_t(p.chains * n);
  std::vector<T> start(size);
  Gradients<T> gradients = {std::vector<T>(size), std::vector<T>(size), {}, {}, {}};
  for (T& x : start) x = T(double(below(101)) / 100);
  for (std::vector<T>* grad : {&gradients.of_relaxed, &gradients.of_mean})
    for (T& g : *grad) g = T(normal());

  // binary sweeps first
  std::vector<double> scales;
  const Result binary = reference(p, false, &scales);
  std::vector<Point> points;
  std::vector<Trace> traces;
  for (int64_t chain = 0; chain < p.chains; ++chain) {
    Point x;
    for (int64_t i = 0; i < n; ++i) {
      if (c.num_sweeps) start[size_t(chain * n + i)] = T(bit(binary.state.data() + chain * state_words(n), i));
      x.start.push_back(double(start[size_t(chain * n + i)]));
      x.bias.push_back(double(p.at(p.bias, chain, {i})));
    }
    for (int64_t e = 0; e < edges; ++e) x.coupling.push_back(double(p.at(p.coupling, chain, {e})));
    traces.push_back(relaxed_reference(p, chain, x));
    points.push_back(std::move(x));
  }

  const T unwritten = std::numeric_limits<T>::quiet_NaN();
  std::vector<std::vector<T>> first, serial;
  for_each_runtime([&](const char* name, const Runtime& runtime) {
    std::vector<T> state = start, relaxed(size, unwritten), mean(size, unwritten);
    if (c.num_sweeps) std::fill(state.begin(), state.end(), unwritten);
    std::vector<T> fields(size_t(c.num_relaxed_sweeps) * size, unwritten);
    std::vector<uint32_t> bits = p.state;
    GraphCall call = c;
    call.route = GraphRoute(below(int64_t{std::size(kGraphRouteNames)}));
    call.bits = bits.data(), call.state = state.data(), call.relaxed = relaxed.data(), call.mean = mean.data();
    call.fields = fields.data();
    Rounding rounding;
    CHECK(run_graph(call, runtime, &rounding) == Outcome::kOk);
    CHECK(state == start, "%s", name);
    CHECK(bits == (c.num_sweeps ? binary.state : p.state), "%s", name);
    // float32 words are not quite those of float64
    if (sizeof(T) == 8 || c.relaxation == kMeanField)
      for (int64_t chain = 0; chain < p.chains; ++chain)
        for (int64_t i = 0; i < n; ++i) {
          const Trace& t = traces[size_t(chain)];
          const auto check = [&](const char* what, T got, double wanted) {
            CHECK(fabs(double(got) - wanted) <= (sizeof(T) == 8 ? 1e-10 : 1e-4) * (1 + fabs(wanted)),
                  "%s, relaxation %d: %s of node %ld of chain %ld: %g, not %g", name, c.relaxation, what, i, chain, double(got),
                  wanted);
          };
          check("value", relaxed[size_t(chain * n + i)], t.value[size_t(i)]);
          check("mean", mean[size_t(chain * n + i)], t.mean[size_t(i)]);
          for (int64_t s = 0; s < c.num_relaxed_sweeps; ++s)
            check("field", fields[size_t((s * p.chains + chain) * n + i)], t.fields[size_t(s * n + i)]);
        }

    gradients.state.assign(size, unwritten), gradients.bias.assign(size, unwritten);
    gradients.coupling.assign(size_t(c.batch.num_models() * edges), unwritten);
    GraphCall forward = call;
    forward.bias = {};
    forward.bits = nullptr, forward.relaxed = forward.mean = nullptr;
    const GraphBackwardCall back = {forward,
                                    gradients.of_relaxed.data(),
                                    gradients.of_mean.data(),
                                    gradients.state.data(),
                                    gradients.bias.data(),
                                    gradients.coupling.data()};
    CHECK(run_graph_backward(back, runtime) == Outcome::kOk);
    if constexpr (sizeof(T) == 8)
      if (p.chains > 0 && n + edges < 100) check_gradients(p, points, traces, gradients, name);

    const std::vector<std::vector<T>> now = {relaxed, mean, fields, gradients.state, gradients.bias, gradients.coupling};
    if (runtime.num_threads == 1) serial = now;
    if (first.empty()) first = now;
    for (size_t t = 0; t < now.size(); ++t)
      for (size_t i = 0; i < now[t].size(); ++i) {
        CHECK(isfinite(now[t][i]), "%s, output %zu", name, t);
        CHECK(now[t][i] == serial[t][i], "%s, %d threads, relaxation %d, output %zu: %a, not %a", name, runtime.num_threads,
              c.relaxation, t, double(now[t][i]), double(serial[t][i]));
        // float's last bits may move a value over a kink or a step
        if (sizeof(T) == 8)
          CHECK(fabs(now[t][i] - first[t][i]) <= 1e-9 * (1 + fabs(first[t][i])), "%s, relaxation %d, output %zu: %g, not %g", name,
                c.relaxation, t, double(now[t][i]), double(first[t][i]));
      }
  });
}

// ---- faults, interrupts --------------------------------------------------------------------------------------------------------

// Each fault is reported as itself, whichever thread sees it, and nothing is read or written out of bounds on the way.
template <class T>
static void fuzz_faults() {
  Problem<T> p = random_problem<T>(0);
  if (p.chains == 0) return;
  enum { kBinary, kAnnealed, kRelaxed, kBackward, kResolution, kNumKinds };
  const int64_t kind = below(kNumKinds);
  const bool binary = kind == kBinary || kind == kAnnealed;
  const T bad = one_in(2) ? std::numeric_limits<T>::quiet_NaN() : std::numeric_limits<T>::infinity() * T(one_in(2) ? 1 : -1);
  struct Fault {
    Tensor<T>* tensor;
    T value;
    Outcome outcome;
  };
  std::vector<Fault> faults;
  if (p.graph.num_edges()) {
    faults.push_back({&p.coupling, bad, Outcome::kNonFiniteCoupling});
    const T large = T(one_in(2) ? -0x1p127 : 0x1p127);  // for rounding
    if (binary || kind == kResolution) faults.push_back({&p.coupling, large, Outcome::kTooLargeCoupling});
  }
  if (binary || kind == kRelaxed) faults.push_back({&p.bias, bad, Outcome::kNonFiniteBias});
  if (binary && sizeof(T) == 8) faults.push_back({&p.bias, T(1e39), Outcome::kNonFiniteBias});  // as float32
  if (kind == kAnnealed) faults.push_back({&p.base_bias, bad, Outcome::kNonFiniteBaseBias});
  if (faults.empty()) return;
  const Fault fault = faults[size_t(below(int64_t(faults.size())))];
  const int64_t last = fault.tensor == &p.coupling ? p.graph.num_edges() : p.graph.num_nodes;
  fault.tensor->data[p.offset(*fault.tensor, below(p.chains), {below(last)})] = fault.value;

  GraphCall call = p.call;
  call.route = GraphRoute(below(int64_t{std::size(kGraphRouteNames)}));
  call.num_sweeps = binary ? 1 + below(3) : 0;
  call.num_relaxed_sweeps = binary ? 0 : 1 + below(2);
  call.beta = {1.0}, call.num_betas = 1, call.beta_strides.clear();
  const size_t size = size_t(p.chains * p.graph.num_nodes), models = size_t(call.batch.num_models());
  std::vector<T> state(size), relaxed(size), mean(size), fields(size * 2), of_edges(models * size_t(p.graph.num_edges()));
  std::vector<double> log_weights(size_t(p.chains)), of_models(models);
  std::vector<uint32_t> bits = p.state;
  call.bits = bits.data(), call.state = state.data(), call.relaxed = relaxed.data(), call.mean = mean.data();
  call.fields = fields.data();
  if (kind == kAnnealed) {
    call.beta.assign(size_t(call.num_sweeps + 1), 0.5);
    call.num_betas = call.num_sweeps + 1;
    call.log_weights = log_weights.data();
  }
  const Runtime runtime = {int(1 + below(3)), run_on_threads, nullptr};
  Rounding rounding;
  const Outcome outcome =
      kind == kResolution ? run_graph_coupling_resolution(call.graph, call.batch, call.is_double, call.coupling, of_models.data())
      : kind == kBackward
          ? run_graph_backward({call, state.data(), state.data(), relaxed.data(), mean.data(), of_edges.data()}, runtime)
          : run_graph(call, runtime, &rounding);
  CHECK(outcome == fault.outcome, "outcome %d, not %d, of kind %d", int(outcome), int(fault.outcome), int(kind));
}

static void check_interrupt(GraphRoute route, int threads) {
  Problem<float> p = random_problem<float>(0);
  while (p.chains < 65) p = random_problem<float>(0);
  GraphCall call = p.call;
  call.route = route;
  call.num_sweeps = int64_t{1} << 40;
  call.beta = {1.0}, call.num_betas = 1, call.beta_strides.clear();
  call.bits = p.state.data();
  Rounding rounding;
  const Outcome outcome = run_graph(call, {threads, run_on_threads, [] { return true; }}, &rounding);
  CHECK(outcome == Outcome::kInterrupted, "outcome %d", int(outcome));
}

// Runs one chain of four nodes for long enough to be interrupted.
static void check_relaxed_interrupt() {
  Graph graph = complete(4).graph();
  graph.make_layout();
  const std::vector<float> coupling(6), bias(4);
  std::vector<float> state(4), relaxed(4), mean(4), grad_coupling(6), fields(4 << 20, nanf(""));
  GraphCall call;
  call.graph = graph.view();
  call.batch = Batch({}, {});
  call.is_double = false;
  call.coupling = {coupling.data(), {}, 1, 0};
  call.bias = {bias.data(), {}, 1, 0};
  call.beta = {1.0}, call.num_betas = 1, call.beta_strides.clear();
  call.num_relaxed_sweeps = 1 << 20;
  call.state = state.data(), call.relaxed = relaxed.data(), call.mean = mean.data(), call.fields = fields.data();
  const Runtime runtime = {1, run_on_threads, [] { return true; }};
  Rounding rounding;
  CHECK(run_graph(call, runtime, &rounding) == Outcome::kInterrupted);
  CHECK(isnan(fields.back()), "stopped when all was done");
  const GraphBackwardCall back = {call, state.data(), state.data(), relaxed.data(), mean.data(), grad_coupling.data()};
  CHECK(run_graph_backward(back, runtime) == Outcome::kInterrupted);
}

int main(int argc, char** argv) {
  for_each_trial(argc, argv, 250, [] {
    fuzz_layout();
    fuzz_binary<float>();
    fuzz_binary<double>();
    one_in(2) ? fuzz_reads<float>() : fuzz_reads<double>();
    fuzz_clusters<float>();
    fuzz_clusters<double>();
    fuzz_relaxed<float>();
    fuzz_relaxed<double>();
    fuzz_faults<float>();
    fuzz_faults<double>();
  });
  for (size_t route = 1; route < std::size(kGraphRouteNames); ++route)
    for (const int threads : {1, 3}) check_interrupt(GraphRoute(route), threads);
  check_relaxed_interrupt();
}
