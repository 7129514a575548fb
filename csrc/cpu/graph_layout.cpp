// SPDX-License-Identifier: Apache-2.0
#include "cpu/graph_layout.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/graph_view.h"
#include "core/philox.h"

namespace gibbs {
namespace {

using Numbers = std::vector<int32_t>;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream out;
  (out << "ColoredGraph: " << ... << parts);
  throw std::invalid_argument(out.str());
}

// The half-edges of each node, by edge number.
struct Rows {
  int64_t num_nodes;
  std::span<const int64_t> edges;
  Numbers offsets, neighbors, edge_of;

  Rows(int64_t nodes, std::span<const int64_t> edges_) : num_nodes(nodes), edges(edges_), offsets(size_t(nodes) + 1) {
    if (edges.size() >= size_t{1} << 31) fail("edges must number less than 2^30, got ", edges.size() / 2);
    for (size_t i = 0; i < edges.size(); ++i)
      if (edges[i] < 0 || edges[i] >= num_nodes)
        fail("edges must join nodes 0 .. ", num_nodes - 1, ", got ", shown(int32_t(i / 2)));
    for (size_t i = 0; i < edges.size(); ++i) {
      if (edges[i] == edges[i ^ 1]) fail("edges must join two different nodes, got ", shown(int32_t(i / 2)));
      ++offsets[size_t(edges[i]) + 1];
    }
    for (int64_t v = 0; v < num_nodes; ++v) offsets[v + 1] += offsets[v];
    neighbors.resize(edges.size()), edge_of.resize(edges.size());
    Numbers next(offsets.begin(), offsets.end() - 1);
    for (size_t i = 0; i < edges.size(); ++i) {
      const size_t at = size_t(next[edges[i]]++);
      neighbors[at] = int32_t(edges[i ^ 1]), edge_of[at] = int32_t(i / 2);
    }
    Numbers last(size_t(num_nodes), -1);  // node whose row named this one last
    for (int64_t v = 0; v < num_nodes; ++v)
      for (int32_t h = offsets[v]; h < offsets[v + 1]; ++h) {
        if (last[neighbors[h]] == v) {
          const auto first = std::find(neighbors.begin() + offsets[v], neighbors.begin() + h, neighbors[h]);
          fail("edges must be listed once each, got ", shown(edge_of[first - neighbors.begin()]), " and ", shown(edge_of[h]));
        }
        last[neighbors[h]] = int32_t(v);
      }
  }

  int32_t degree(int64_t v) const { return offsets[v + 1] - offsets[v]; }
  std::span<const int32_t> neighbors_of(int64_t v) const { return {neighbors.data() + offsets[v], size_t(degree(v))}; }
  std::string shown(int32_t e) const {
    std::ostringstream out;
    out << "edges[" << e << "] = (" << edges[2 * size_t(e)] << ", " << edges[2 * size_t(e) + 1] << ")";
    return out.str();
  }
};

// Colours breadth first. Empty if some cycle is odd.
Numbers two_colors(const Rows& rows) {
  Numbers colors(size_t(rows.num_nodes), -1), queue;
  queue.reserve(size_t(rows.num_nodes));
  for (int64_t root = 0; root < rows.num_nodes; ++root) {
    if (colors[root] >= 0) continue;
    colors[root] = 0;
    queue.assign(1, int32_t(root));
    for (size_t head = 0; head < queue.size(); ++head) {
      const int32_t color = colors[queue[head]];
      for (int32_t u : rows.neighbors_of(queue[head])) {
        if (colors[u] == color) return {};
        if (colors[u] < 0) colors[u] = 1 - color, queue.push_back(u);
      }
    }
  }
  return colors;
}

// DSATUR (Brelaz 1979) with queues instead of a heap. The next node is the one with most colours among its neighbours; among equals
// it is the first to get there, and at the start the one with most neighbours. It takes the lowest free colour. Every push but the
// first of a node belongs to a half-edge, hence linear time. It finds 4 colours on whole Pegasus graphs, the fewest possible, and 5
// on Zephyr.
Numbers greedy_colors(const Rows& rows) {
  const int64_t n = rows.num_nodes;
  Numbers by_degree(static_cast<size_t>(n)), colors(size_t(n), -1), saturation(size_t(n), 0);
  int32_t max_degree = 0;
  for (int64_t v = 0; v < n; ++v) max_degree = std::max(max_degree, rows.degree(v));
  Numbers next(size_t(max_degree) + 2);
  for (int64_t v = 0; v < n; ++v) ++next[max_degree - rows.degree(v) + 1];
  for (int32_t d = 0; d <= max_degree; ++d) next[d + 1] += next[d];
  for (int64_t v = 0; v < n; ++v) by_degree[next[max_degree - rows.degree(v)]++] = int32_t(v);

  struct Queue {
    Numbers nodes;
    size_t head = 0;
  };
  std::vector<Queue> queues(size_t(max_degree) + 1);  // by saturation; a node that moved on is skipped when met
  queues[0].nodes = std::move(by_degree);
  // Bit offsets[v] + v + c says whether a neighbour of v has colour c. Colours beyond v's degree are never needed.
  std::vector<bool> taken(rows.neighbors.size() + size_t(n));
  const auto bit = [&](int64_t v, int32_t color) { return size_t(rows.offsets[v]) + size_t(v) + size_t(color); };
  for (int64_t top = 0; top >= 0;) {
    Queue& queue = queues[top];
    if (queue.head == queue.nodes.size()) {
      --top;
      continue;
    }
    const int32_t v = queue.nodes[queue.head++];
    if (colors[v] >= 0 || saturation[v] != top) continue;
    int32_t color = 0;
    while (taken[bit(v, color)]) ++color;
    colors[v] = color;
    for (int32_t u : rows.neighbors_of(v)) {
      if (colors[u] >= 0 || color > rows.degree(u) || taken[bit(u, color)]) continue;
      taken[bit(u, color)] = true;
      queues[++saturation[u]].nodes.push_back(u);
      top = std::max<int64_t>(top, saturation[u]);
    }
  }
  return colors;
}

Numbers given_colors(const Rows& rows, std::span<const int64_t> given) {
  const int64_t n = rows.num_nodes;
  if (int64_t(given.size()) != n) fail("colors must have one entry per node, ", n, ", got ", given.size());
  Numbers number(size_t(n) + 1, 0), colors(static_cast<size_t>(n));
  for (int64_t v = 0; v < n; ++v) {
    // n is allowed, so that colours may be counted from 1.
    if (given[v] < 0 || given[v] > n) fail("colors must lie in 0 .. num_nodes = ", n, ", got ", given[v], " of node ", v);
    number[given[v]] = 1;
  }
  for (int32_t count = 0; int32_t& used : number) count += std::exchange(used, count);
  for (int64_t v = 0; v < n; ++v) colors[v] = number[given[v]];
  for (size_t e = 0; e < rows.edges.size() / 2; ++e)
    if (colors[rows.edges[2 * e]] == colors[rows.edges[2 * e + 1]])
      fail("colors must differ at the two ends of an edge, got ", given[rows.edges[2 * e]], " at both of ", rows.shown(int32_t(e)));
  return colors;
}

}  // namespace

std::vector<int32_t> graph_layout(int64_t num_nodes, std::span<const int64_t> edges,
                                  std::optional<std::span<const int64_t>> given) {
  if (num_nodes < 1 || num_nodes >= kMaxUnits) fail("num_nodes must be at least 1 and less than 2^30, got ", num_nodes);
  const Rows rows(num_nodes, edges);
  Numbers colors = given ? given_colors(rows, *given) : two_colors(rows);
  if (colors.empty()) colors = greedy_colors(rows);

  const int64_t num_edges = int64_t(edges.size() / 2), num_colors = *std::max_element(colors.begin(), colors.end()) + 1;
  Numbers out(size_t(layout_size(num_nodes, num_edges, num_colors)));
  int32_t* to = out.data();
  *to++ = int32_t(num_nodes), *to++ = int32_t(num_edges), *to++ = int32_t(num_colors);
  int32_t& max_degree = *to++;
  int32_t* const color_offsets = to;
  int32_t* const order = color_offsets + num_colors + 1;
  for (int32_t color : colors) ++color_offsets[color + 1];
  for (int64_t c = 0; c < num_colors; ++c) color_offsets[c + 1] += color_offsets[c];
  Numbers next(color_offsets, color_offsets + num_colors);
  for (int64_t v = 0; v < num_nodes; ++v) order[next[colors[v]]++] = int32_t(v);

  int32_t* const row_offsets = order + num_nodes;
  int32_t* neighbors = row_offsets + num_nodes + 1;
  int32_t* edge_of = neighbors + 2 * num_edges;
  for (int64_t p = 0; p < num_nodes; ++p) {
    const int32_t v = order[p], degree = rows.degree(v);
    max_degree = std::max(max_degree, degree);
    row_offsets[p + 1] = row_offsets[p] + degree;
    neighbors = std::copy_n(rows.neighbors.begin() + rows.offsets[v], degree, neighbors);
    edge_of = std::copy_n(rows.edge_of.begin() + rows.offsets[v], degree, edge_of);
  }
  return out;
}

}  // namespace gibbs
