# SPDX-License-Identifier: Apache-2.0
"""Builds a ColoredGraph from an array of edges: checks, colours, lists of neighbours. The peer only colours it."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import gibbs_ext as gx

from .harness import Case, benchmark_of
from .tables import OURS


def networkx_colors(num_nodes: int, edges: Tensor) -> dict[int, int]:
    import networkx

    G = networkx.empty_graph(num_nodes)
    G.add_edges_from(edges.tolist())
    return networkx.greedy_color(G, "smallest_last")  # this strategy needs as few colours as ours


def pegasus() -> tuple[int, Tensor]:
    from dwave.graphs import pegasus_graph

    graph = gx.ColoredGraph.from_networkx(pegasus_graph(16))
    return graph.num_nodes, graph.edges


def random(num_nodes: int, num_edges: int) -> tuple[int, Tensor]:
    torch.manual_seed(1)
    pairs = torch.randint(num_nodes, (num_edges * 101 // 100, 2)).sort(1).values
    edges = pairs[pairs[:, 0] < pairs[:, 1]].unique(dim=0)
    return num_nodes, edges[torch.randperm(len(edges))[:num_edges]]


def case(name: str, inputs: Callable[[], tuple[int, Tensor]]) -> Case:
    return Case(
        name,
        inputs,
        {OURS: lambda i: lambda: gx.ColoredGraph(*i), "networkx": lambda i: lambda: networkx_colors(*i)},
    )


def cases() -> Iterator[Case]:
    yield case("Pegasus P16: graph of 40,484 edges", pegasus)
    yield case("random: graph of 1,000,000 edges", lambda: random(200_000, 1_000_000))


graph_building = benchmark_of(cases, "graph_building")
