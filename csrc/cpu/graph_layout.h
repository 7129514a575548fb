// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

// From a list of edges to the layout of core/graph_view.h, in time and memory O(num_nodes + edges). No framework.
namespace gibbs {

// edges: [E, 2] row by row, each edge once, either way round. colors: [num_nodes], found if not given. Colours are numbered
// anew without gaps, in the order they had. Throws std::invalid_argument, the message in ColoredGraph's name, if this is no graph or
// no proper colouring of it.
//
// Colours found: 0 and 1 if the graph is bipartite, the lowest node of each component 0; else greedily, most constrained node first.
std::vector<int32_t> graph_layout(int64_t num_nodes, std::span<const int64_t> edges,
                                  std::optional<std::span<const int64_t>> colors);

}  // namespace gibbs
