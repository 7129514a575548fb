// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <numeric>
#include <optional>
#include <set>

#include "core/graph_view.h"
#include "cpu/graph_layout.h"
#include "fuzz.h"

// Random coloured graphs for the fuzz programs.
namespace gibbs {

struct Graph {
  int64_t num_nodes = 1;
  std::vector<int64_t> edges;                  // [E, 2]
  std::optional<std::vector<int64_t>> colors;  // to be found if there are none
  std::vector<int32_t> layout;

  int64_t num_edges() const { return int64_t(edges.size() / 2); }
  void make_layout() {
    layout = graph_layout(num_nodes, edges, colors ? std::optional(std::span<const int64_t>(*colors)) : std::nullopt);
  }
  GraphView view() const { return graph_view(layout.data()); }
};

class GraphMaker {
 public:
  void join(int64_t u, int64_t v) {
    if (u == v || !edges_.insert({std::min(u, v), std::max(u, v)}).second) return;
    num_nodes_ = std::max({num_nodes_, u + 1, v + 1});
    degree_.resize(size_t(num_nodes_));
    ++degree_[size_t(u)], ++degree_[size_t(v)];
  }
  void add_nodes(int64_t count) { degree_.resize(size_t(num_nodes_ += count)); }
  // Random edges, `attempts` of them tried, between nodes that have less than `most` neighbours.
  void join_at_random(int64_t attempts, int64_t most) {
    for (; attempts > 0; --attempts) {
      const int64_t u = below(num_nodes_), v = below(num_nodes_);
      if (degree_[size_t(u)] < most && degree_[size_t(v)] < most) join(u, v);
    }
  }
  void drop_edges(int64_t one_of) {
    std::erase_if(edges_, [&](const auto& edge) {
      if (!one_in(one_of)) return false;
      return --degree_[size_t(edge.first)], --degree_[size_t(edge.second)], true;
    });
  }
  // Nodes, edges and their ends in random order.
  Graph graph() const {
    Graph g;
    g.num_nodes = num_nodes_;
    std::vector<int64_t> name(static_cast<size_t>(num_nodes_));
    std::iota(name.begin(), name.end(), 0);
    std::shuffle(name.begin(), name.end(), rng);
    std::vector<std::pair<int64_t, int64_t>> list(edges_.begin(), edges_.end());
    std::shuffle(list.begin(), list.end(), rng);
    for (auto [u, v] : list) {
      if (one_in(2)) std::swap(u, v);
      g.edges.insert(g.edges.end(), {name[size_t(u)], name[size_t(v)]});
    }
    return g;
  }

 private:
  int64_t num_nodes_ = 0;
  std::set<std::pair<int64_t, int64_t>> edges_;
  std::vector<int64_t> degree_;
};

inline GraphMaker chimera(int64_t rows, int64_t columns, int64_t shore) {
  GraphMaker m;
  const auto node = [&](int64_t r, int64_t c, int64_t side, int64_t k) { return ((r * columns + c) * 2 + side) * shore + k; };
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t k = 0; k < shore; ++k) {
        for (int64_t l = 0; l < shore; ++l) m.join(node(r, c, 0, k), node(r, c, 1, l));
        if (r + 1 < rows) m.join(node(r, c, 0, k), node(r + 1, c, 0, k));
        if (c + 1 < columns) m.join(node(r, c, 1, k), node(r, c + 1, 1, k));
      }
  return m;
}

inline GraphMaker complete(int64_t nodes) {
  GraphMaker m;
  for (int64_t v = 1; v < nodes; ++v)
    for (int64_t u = 0; u < v; ++u) m.join(u, v);
  return m;
}

// Some node has this many neighbours, none has more.
inline GraphMaker of_degree(int64_t degree, int64_t nodes) {
  GraphMaker m;
  m.add_nodes(nodes);
  for (int64_t v = 1; v <= degree; ++v) m.join(0, v);
  m.join_at_random(4 * nodes, degree);
  return m;
}

// A proper colouring with gaps between the numbers of its colours.
inline std::vector<int64_t> random_colors(const Graph& g) {
  std::vector<std::vector<int64_t>> neighbors(static_cast<size_t>(g.num_nodes));
  for (size_t i = 0; i < g.edges.size(); ++i) neighbors[size_t(g.edges[i])].push_back(g.edges[i ^ 1]);
  std::vector<int64_t> colors(size_t(g.num_nodes), -1);
  const int64_t fewest = 1 + below(g.num_nodes + 1);
  for (int64_t v = 0; v < g.num_nodes; ++v) {
    std::vector<bool> taken(static_cast<size_t>(g.num_nodes + 1));
    for (int64_t u : neighbors[size_t(v)])
      if (colors[size_t(u)] >= 0) taken[size_t(colors[size_t(u)])] = true;
    int64_t color = below(fewest);
    while (taken[size_t(color)]) color = (color + 1) % (g.num_nodes + 1);
    colors[size_t(v)] = color;
  }
  return colors;
}

inline Graph random_graph() {
  GraphMaker m;
  switch (below(8)) {
    case 0: {
      const auto side = [] { return 1 + below(one_in(4) ? 6 : 3); };
      m = chimera(side(), side(), 1 + below(4));
      if (one_in(2)) m.drop_edges(10);
      break;
    }
    case 1:
      m = complete(2 + below(one_in(3) ? 20 : 8));
      break;
    case 2:  // stars
      for (int64_t stars = 1 + below(3), center = 0; stars > 0; --stars) {
        const int64_t degree = 1 + below(20);
        for (int64_t leaf = 1; leaf <= degree; ++leaf) m.join(center, center + leaf);
        center += degree + 1;
      }
      m.add_nodes(below(3));
      break;
    case 3: {  // sparse
      m.add_nodes(1 + below(one_in(2) ? 300 : 30));
      m.join_at_random(below(400), 20);
      break;
    }
    case 4:  // nobody joined
      m.add_nodes(one_in(3) ? 1 : 1 + below(300));
      break;
    default: {
      const int64_t degree = 4 + below(5);
      m = of_degree(degree, degree + 1 + below(one_in(3) ? 150 : 20));
    }
  }
  Graph g = m.graph();
  if (one_in(3)) g.colors = random_colors(g);
  g.make_layout();
  return g;
}

inline Graph large_graph() {
  Graph g = chimera(16, 16, 4).graph();
  g.make_layout();
  return g;
}

// A graph and a batch that are small enough for the emulator of GPUs, which is slow.
inline void draw_small_problem(Graph& graph, RandomBatch& batch) {
  do {
    graph = one_in(30) ? large_graph() : random_graph();
    batch.draw(5, 70);
  } while (batch.chains == 0 || batch.chains * (graph.num_nodes + graph.num_edges()) > 25000);
}

}  // namespace gibbs
