// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "core/macros.h"

// A coloured graph as one int32 array, the `layout` tensor of the graph ops. gibbs_ext._C.graph_layout writes it.
//
//   [ num_nodes | num_edges | num_colors | max_degree          ]  kLayoutHeader numbers
//   [ color_offsets: num_colors + 1                            ]  positions at which a colour begins
//   [ order: num_nodes                                         ]  node at each position: by colour, then by number
//   [ row_offsets: num_nodes + 1                               ]  half-edges of the node at each position
//   [ neighbors: 2 num_edges                                   ]  per half-edge: the node at its other end
//   [ edge_of: 2 num_edges                                     ]  per half-edge: which edge, that is, which coupling
//
// Rows stand in the order in which a sweep visits them. A row's half-edges stand by edge number.
namespace gibbs {

constexpr int64_t kLayoutHeader = 4;
constexpr int64_t kMaxDegreePlace = 3;  // in the header

struct GraphView {
  int64_t num_nodes, num_edges, num_colors, max_degree;
  const int32_t *color_offsets, *order, *row_offsets, *neighbors, *edge_of;
};

GIBBS_HOST_DEVICE int64_t layout_size(int64_t num_nodes, int64_t num_edges, int64_t num_colors) {
  return kLayoutHeader + (num_colors + 1) + num_nodes + (num_nodes + 1) + 4 * num_edges;
}

// The parts of a layout, by numbers that are known to agree with its header.
GIBBS_HOST_DEVICE GraphView graph_view(const int32_t* layout, int64_t num_nodes, int64_t num_edges, int64_t num_colors,
                                       int64_t max_degree) {
  GraphView g = {};
  g.num_nodes = num_nodes, g.num_edges = num_edges, g.num_colors = num_colors, g.max_degree = max_degree;
  g.color_offsets = layout + kLayoutHeader;
  g.order = g.color_offsets + g.num_colors + 1;
  g.row_offsets = g.order + g.num_nodes;
  g.neighbors = g.row_offsets + g.num_nodes + 1;
  g.edge_of = g.neighbors + 2 * g.num_edges;
  return g;
}
GIBBS_HOST_DEVICE GraphView graph_view(const int32_t* layout) {
  return graph_view(layout, layout[0], layout[1], layout[2], layout[kMaxDegreePlace]);
}

}  // namespace gibbs
