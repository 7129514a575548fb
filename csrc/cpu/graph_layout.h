// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

// Turns a list of edges into the layout of core/graph_view.h, in time and memory O(num_nodes + edges).
namespace gibbs {

// edges: [E, 2] row by row, each edge once, in either direction. colors: [num_nodes], found if not given; they are numbered anew
// without gaps, in their order. Throws std::invalid_argument, with a message in ColoredGraph's name, if the edges make no graph or
// the colours are no proper colouring of it.
//
// If the graph is bipartite, the colours found are 0 and 1, with 0 for the lowest node of each component; else they are found
// greedily, the most constrained node first.
std::vector<int32_t> graph_layout(int64_t num_nodes, std::span<const int64_t> edges,
                                  std::optional<std::span<const int64_t>> colors);

}  // namespace gibbs
