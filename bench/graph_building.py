# SPDX-License-Identifier: Apache-2.0
"""Builds a ColoredGraph from an array of edges: checks, colours, lists of neighbours. The peer only colours it."""

from collections.abc import Iterator

import torch
from torch import Tensor

import gibbs_ext as gx

from .harness import OURS, Case


def networkx_colors(num_nodes: int, edges: Tensor) -> dict[int, int]:
    import networkx

    G = networkx.empty_graph(num_nodes)
    G.add_edges_from(edges.tolist())
    return networkx.greedy_color(G, "smallest_last")  # this strategy needs as few colours as ours


def case(name: str, num_nodes: int, edges: Tensor) -> Case:
    return Case(
        f"{name}: graph of {len(edges):,} edges",
        {OURS: lambda: gx.ColoredGraph(num_nodes, edges), "networkx": lambda: networkx_colors(num_nodes, edges)},
    )


def cases() -> Iterator[Case]:
    from dwave.graphs import pegasus_graph

    pegasus = gx.ColoredGraph.from_networkx(pegasus_graph(16))
    yield case("Pegasus P16", pegasus.num_nodes, pegasus.edges)
    torch.manual_seed(1)
    num_nodes = 200_000
    pairs = torch.randint(num_nodes, (1_010_000, 2)).sort(1).values
    edges = pairs[pairs[:, 0] < pairs[:, 1]].unique(dim=0)
    yield case("random", num_nodes, edges[torch.randperm(len(edges))[:1_000_000]])
