# SPDX-License-Identifier: Apache-2.0
"""Coloured graphs: their layout, colours that are given or found, Chimera as D-Wave has it, and what they refuse."""

import copy
import itertools
import pickle
import sys

import dwave.graphs as dwave
import networkx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gibbs_ext import ChimeraGraph, ColoredGraph, ops


def layout_of(num_nodes, edges, colors):
    """The layout as csrc/core/graph_view.h draws it, the slow way."""
    num_colors = max(colors) + 1
    order = sorted(range(num_nodes), key=lambda node: (colors[node], node))
    rows = [[(u + v - node, e) for e, (u, v) in enumerate(edges) if node in (u, v)] for node in order]
    half_edges = [half for row in rows for half in row]
    return [
        *(num_nodes, len(edges), num_colors, max(map(len, rows))),
        *(sum(c < color for c in colors) for color in range(num_colors + 1)),
        *order,
        *itertools.accumulate(map(len, rows), initial=0),
        *(neighbor for neighbor, _ in half_edges),
        *(e for _, e in half_edges),
    ]


def assert_consistent(graph):
    """Every attribute says the same, and no edge joins nodes of one colour."""
    edges, colors = graph.edges.tolist(), graph.colors.tolist()
    assert all(colors[u] != colors[v] for u, v in edges), "an edge inside a colour"
    assert graph.layout.tolist() == layout_of(graph.num_nodes, edges, colors), "the layout is not that of the edges"
    degrees = [sum(node in edge for edge in edges) for node in range(graph.num_nodes)]
    assert graph.degrees.tolist() == degrees
    assert graph.max_degree == max(degrees)
    assert (graph.num_nodes, graph.num_edges) == (len(colors), len(edges))
    assert set(colors) == set(range(graph.num_colors)), "a colour without nodes"
    assert len(graph.labels) == graph.num_nodes
    assert [graph.index(label) for label in graph.labels] == list(range(graph.num_nodes))
    assert {t.dtype for t in (graph.edges, graph.colors, graph.degrees)} == {torch.int64}
    assert graph.edges.shape == (graph.num_edges, 2)
    assert graph.layout.dtype == torch.int32


def assert_lowest(graph):
    """No node could have a lower colour: its neighbours have them all."""
    colors = graph.colors.tolist()
    seen = [set() for _ in colors]
    for u, v in graph.edges.tolist():
        seen[u].add(colors[v])
        seen[v].add(colors[u])
    assert all(set(range(color)) <= seen[node] for node, color in enumerate(colors))


@st.composite
def edge_lists(draw):
    """num_nodes, and edges in any order, either way round."""
    n = draw(st.integers(1, 12))
    pairs = list(itertools.combinations(range(n), 2))
    chosen = draw(st.permutations(pairs))[: draw(st.integers(0, len(pairs)))]
    return n, [edge[::-1] if draw(st.booleans()) else edge for edge in chosen]


def simple_graph(num_nodes, edges):
    G = networkx.empty_graph(num_nodes)
    G.add_edges_from(edges)
    return G


# Colours ----------------------------------------------------------------------------------------------------------


@given(edge_lists())
def test_colors_found_are_proper_few_and_two_if_two_do(problem):
    graph = ColoredGraph(*problem)
    assert_consistent(graph)
    assert_lowest(graph)
    assert graph.edges.tolist() == [list(edge) for edge in problem[1]]
    G = simple_graph(*problem)
    if networkx.is_bipartite(G):
        distance = {}
        for component in networkx.connected_components(G):
            distance |= networkx.single_source_shortest_path_length(G, min(component))
        assert graph.colors.tolist() == [distance[node] % 2 for node in range(graph.num_nodes)]
    else:
        assert 3 <= graph.num_colors <= graph.max_degree + 1


@given(edge_lists(), st.data())
def test_colors_given_are_kept_but_for_gaps(problem, data):
    n, edges = problem
    found = ColoredGraph(n, edges).colors.tolist()
    names = sorted(data.draw(st.sets(st.integers(0, n), min_size=max(found) + 1)))
    names = data.draw(st.permutations(names[: max(found) + 1]))
    colors = [names[color] for color in found]
    graph = ColoredGraph(n, edges, colors)
    assert_consistent(graph)
    assert graph.colors.tolist() == [sorted(set(colors)).index(color) for color in colors]


@given(edge_lists(), st.data())
def test_an_edge_inside_a_color_is_an_error(problem, data):
    n, edges = problem
    colors = data.draw(st.lists(st.integers(0, n), min_size=n, max_size=n))
    inside = [e for e, (u, v) in enumerate(edges) if colors[u] == colors[v]]
    if not inside:
        ColoredGraph(n, edges, colors)
        return
    with pytest.raises(
        ValueError, match=r"^ColoredGraph: colors must differ at the two ends of an edge, got"
    ) as caught:
        ColoredGraph(n, edges, colors)
    e = inside[0]
    assert str(caught.value).endswith(f"got {colors[edges[e][0]]} at both of edges[{e}] = {edges[e]}")


@given(edge_lists(), st.data())
def test_an_edge_twice_is_an_error(problem, data):
    n, edges = problem
    if not edges:
        return
    again = data.draw(st.sampled_from(edges))
    edges.insert(data.draw(st.integers(0, len(edges))), again[::-1] if data.draw(st.booleans()) else again)
    first, second = (e for e, edge in enumerate(edges) if set(edge) == set(again))
    with pytest.raises(ValueError, match=r"^ColoredGraph: edges must be listed once each, got ") as caught:
        ColoredGraph(n, edges)
    assert str(caught.value).endswith(f"edges[{first}] = {edges[first]} and edges[{second}] = {edges[second]}")


@pytest.mark.parametrize("shift", [0, 1])
def test_colors_may_be_counted_from_one(shift):
    edges = list(itertools.combinations(range(5), 2))
    assert ColoredGraph(5, edges, np.arange(5) + shift).colors.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("make", "sizes", "num_colors"),
    [
        # The least there are: of Pegasus 4, of Chimera 2. Zephyr does with 4, which no fast greedy order finds.
        (dwave.chimera_graph, (1, 2, 5), 2),
        (dwave.pegasus_graph, (2, 3, 6), 4),
        (dwave.zephyr_graph, (2, 4), 5),
    ],
    ids=["chimera", "pegasus", "zephyr"],
)
def test_colors_of_dwave_graphs(make, sizes, num_colors):
    for size in sizes:
        G = make(size)
        graph = ColoredGraph.from_networkx(G)
        assert_consistent(graph)
        assert graph.num_colors == num_colors
        assert graph.labels == tuple(G.nodes)
        assert {frozenset(edge) for edge in G.edges} == {
            frozenset((graph.labels[u], graph.labels[v])) for u, v in graph.edges.tolist()
        }


@pytest.mark.parametrize("make", [networkx.complete_graph, networkx.cycle_graph, networkx.wheel_graph])
@pytest.mark.parametrize("size", [3, 4, 5, 8, 9])
def test_greedy_colors_of_well_known_graphs(make, size):
    graph = ColoredGraph.from_networkx(make(size))
    fewest = {"complete_graph": size, "cycle_graph": 2 + size % 2, "wheel_graph": 4 - size % 2}
    assert graph.num_colors == fewest[make.__name__]


@pytest.mark.parametrize("seed", range(5))
def test_nodes_of_few_edges_beside_colors_they_cannot_have(seed):
    """The later colours of a clique with tails are beyond the degree of a tail's nodes."""
    nodes = np.random.default_rng(seed).permutation(24)
    edges = [(i, j) for i in range(8) for j in range(i)] + [(i, i + 8) for i in range(16)]
    graph = ColoredGraph(24, nodes[np.array(edges)])
    assert_consistent(graph)
    assert_lowest(graph)
    assert graph.num_colors == 8


def test_a_large_graph():
    rng = np.random.default_rng(0)
    edges = np.unique(np.sort(rng.integers(0, 20_000, (100_000, 2)), axis=1), axis=0)
    edges = torch.from_numpy(rng.permutation(edges[edges[:, 0] != edges[:, 1]]))
    graph = ColoredGraph(20_000, edges)
    assert graph.edges.equal(edges)
    assert (graph.colors[edges[:, 0]] != graph.colors[edges[:, 1]]).all()
    assert graph.degrees.equal(torch.bincount(edges.flatten(), minlength=20_000))
    assert graph.num_colors < 10
    assert ColoredGraph(20_000, edges, graph.colors) == graph


def test_isolated_nodes():
    graph = ColoredGraph(4, [(1, 2)])
    assert graph.colors.tolist() == [0, 0, 1, 0]
    assert_consistent(graph)
    alone = ColoredGraph(1, [])
    assert (alone.num_edges, alone.num_colors, alone.max_degree) == (0, 1, 0)
    assert_consistent(alone)


@pytest.mark.parametrize("fault", ["color", "neighbor", "edge", "degree"])
def test_a_fault_in_a_graph_is_seen(fault):
    graph = ChimeraGraph(1, 2, 2)
    assert_consistent(graph)
    if fault == "color":
        graph.colors = graph.colors.clone()
        graph.colors[0] ^= 1
    elif fault == "degree":
        graph.degrees = graph.degrees.flip(0) + 1
    else:
        graph.layout = graph.layout.clone()
        graph.layout[-1 if fault == "edge" else -1 - 2 * graph.num_edges] += 1
    with pytest.raises(AssertionError):
        assert_consistent(graph)


# Arguments that make a graph --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "edges",
    [
        [(0, 2), (3, 1)],
        ((0, 2), (3, 1)),
        [[0, 2], torch.tensor([3, 1])],
        np.array([[0, 2], [3, 1]], np.uint8),
        np.array([[2, 0], [1, 3]], ">i4")[:, ::-1],
        np.array([[3, 1], [0, 2]])[::-1],
        torch.tensor([[0, 2], [3, 1]], dtype=torch.int32),
        torch.tensor([[0, 3], [2, 1]]).T,
        iter([(0, 2), (3, 1)]),
    ],
    ids=["list", "tuple", "mixed", "uint8", "big endian", "reversed", "int32", "transposed", "iterator"],
)
def test_edges_of_any_kind(edges):
    assert ColoredGraph(4, edges).edges.tolist() == [[0, 2], [3, 1]]


@pytest.mark.parametrize("edges", [[], (), np.empty((0, 2), np.int64), torch.empty(0, 2, dtype=torch.int64)])
def test_no_edges(edges):
    assert_consistent(ColoredGraph(np.int64(3), edges))


def test_a_graph_does_not_change_with_its_arguments():
    edges, colors = torch.tensor([[0, 1], [1, 2]]), torch.tensor([0, 1, 0])
    graph = ColoredGraph(3, edges, colors)
    edges.zero_()
    colors.zero_()
    assert_consistent(graph)
    array = np.array([[0, 1], [1, 2]])
    graph = ColoredGraph(3, array)
    array[:] = 0
    assert_consistent(graph)


def test_copies_are_equal_and_keys():
    graph = ChimeraGraph(2, missing_nodes=[3])
    for twin in (copy.copy(graph), copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert type(twin) is ChimeraGraph
        assert twin == graph
        assert hash(twin) == hash(graph)
        assert twin.labels == graph.labels
        assert twin.coordinates.equal(graph.coordinates)
        assert_consistent(twin)


def test_equal_graphs():
    graph = ColoredGraph(3, [(0, 1), (1, 2)])
    same = ColoredGraph(3, [(1, 0), (1, 2)], [1, 2, 1])
    assert graph == same
    assert hash(graph) == hash(same)
    assert len({graph, same, ColoredGraph(3, [(0, 1), (1, 2)], [0, 1, 2])}) == 2
    for other in (
        ColoredGraph(4, [(0, 1), (1, 2)]),
        ColoredGraph(3, [(0, 1)]),
        ColoredGraph(3, [(1, 2), (0, 1)]),
        ColoredGraph(3, [(0, 1), (0, 2)]),
        ColoredGraph(3, [(0, 1), (1, 2)], [1, 0, 1]),
        "graph",
    ):
        assert graph != other


def test_repr():
    assert repr(ColoredGraph(3, [(0, 1)])) == "ColoredGraph(num_nodes=3, num_edges=1, num_colors=2)"
    assert repr(ChimeraGraph(1, 2)) == "ChimeraGraph(1, 2, 4, num_nodes=16, num_edges=36, num_colors=2)"


# networkx ---------------------------------------------------------------------------------------------------------


def test_from_networkx_keeps_order_and_labels():
    G = networkx.Graph([("c", (1, 2)), ("c", 0), (0, (1, 2))])
    G.add_node("d")
    graph = ColoredGraph.from_networkx(G)
    assert graph.labels == ("c", (1, 2), 0, "d")
    assert graph.index((1, 2)) == 1
    assert graph.edges.tolist() == [[0, 1], [0, 2], [1, 2]]
    colors = {"c": 1, (1, 2): 0, 0: 2, "d": 1, "unknown": 7}
    assert ColoredGraph.from_networkx(G, colors).colors.tolist() == [1, 0, 2, 1]
    assert ColoredGraph.from_networkx(G, [1, 0, 2, 1]).colors.tolist() == [1, 0, 2, 1]


def test_from_networkx_with_the_colors_of_others():
    G = dwave.zephyr_graph(2, coordinates=True)
    graph = ColoredGraph.from_networkx(G, {node: dwave.zephyr_four_color(node) for node in G})
    assert graph.num_colors == 4
    assert_consistent(graph)
    assert ColoredGraph.from_networkx(G, networkx.greedy_color(G)).num_nodes == len(G)


@given(edge_lists())
def test_to_networkx(problem):
    graph = ColoredGraph(*problem)
    G = graph.to_networkx()
    assert networkx.utils.graphs_equal(networkx.Graph(G.edges), networkx.Graph(problem[1]))
    assert list(G.nodes) == list(range(graph.num_nodes))
    assert [G.nodes[node]["color"] for node in G] == graph.colors.tolist()


def test_to_networkx_has_the_labels():
    graph = ChimeraGraph(2, missing_nodes=[0, 9])
    assert networkx.utils.edges_equal(graph.to_networkx().edges, chimera_of_dwave(2, 2, 4, {0, 9}, set()).edges)


def test_to_networkx_without_networkx_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "networkx", None)
    message = r"^ColoredGraph.to_networkx: needs networkx; pip install networkx$"
    with pytest.raises(ImportError, match=message):
        ColoredGraph(2, [(0, 1)]).to_networkx()


# Chimera ----------------------------------------------------------------------------------------------------------


def chimera_of_dwave(rows, cols, shore, missing_nodes, missing_edges):
    G = dwave.chimera_graph(rows, cols, shore)
    G.remove_edges_from(missing_edges)
    G.remove_nodes_from(missing_nodes)
    return G


@pytest.mark.parametrize(
    "shape", [(1,), (2,), (5,), (1, 3), (3, 1), (2, 3, 1), (1, 1, 1), (3, 2, 2), (2, 2, 5), (4, 6, 3), (16,)]
)
def test_chimera_is_that_of_dwave(shape):
    G = dwave.chimera_graph(*shape)
    graph = ChimeraGraph(*shape)
    assert graph.labels == tuple(sorted(G)) == tuple(range(len(G)))
    assert graph.edges.tolist() == sorted(sorted(edge) for edge in G.edges)
    assert graph.coordinates.tolist() == [list(G.nodes[label]["chimera_index"]) for label in graph.labels]
    rows, cols, shore = (*shape, *(shape[0], 4)[len(shape) - 1 :])
    assert (graph.rows, graph.cols, graph.shore) == (rows, cols, shore)
    row, col, side, _ = graph.coordinates.unbind(1)
    assert graph.colors.equal((row + col + side + 1) % 2)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.data())
def test_chimera_with_holes(rows, cols, shore, data):
    full = dwave.chimera_graph(rows, cols, shore)
    missing_nodes = data.draw(st.lists(st.sampled_from(sorted(full)), max_size=len(full) // 2))
    missing_edges = data.draw(st.lists(st.sampled_from(sorted(full.edges)), max_size=len(full.edges) // 2))
    missing_edges = [edge[::-1] if data.draw(st.booleans()) else edge for edge in missing_edges]
    graph = ChimeraGraph(rows, cols, shore, missing_nodes=missing_nodes, missing_edges=missing_edges)
    G = chimera_of_dwave(rows, cols, shore, missing_nodes, missing_edges)
    assert_consistent(graph)
    assert graph.labels == tuple(sorted(G))
    ends = [[graph.labels[u], graph.labels[v]] for u, v in graph.edges.tolist()]
    assert ends == sorted(sorted(edge) for edge in G.edges)
    assert graph.coordinates.tolist() == [list(G.nodes[label]["chimera_index"]) for label in graph.labels]
    row, col, side, _ = graph.coordinates.unbind(1)
    colors = (row + col + side + 1) % 2
    assert graph.colors.equal(colors - colors.min())


@pytest.mark.parametrize("holes", [{}, {"missing_nodes": [1, 8, 40], "missing_edges": [(0, 4), (36, 32)]}])
def test_chimera_is_the_colored_graph_of_its_edges(holes):
    graph = ChimeraGraph(2, 3, **holes)
    plain = ColoredGraph(graph.num_nodes, graph.edges, graph.colors)
    assert plain.layout.equal(graph.layout)
    assert plain == graph
    assert graph == plain
    # Found, colours are the same up to their order.
    assert ColoredGraph(graph.num_nodes, graph.edges).num_colors == 2


def test_the_right_side_of_a_cell_comes_first():
    """As the right side of a bipartite model does."""
    graph = ChimeraGraph(1)
    assert graph.colors.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert graph.edges.tolist() == [[i, 4 + j] for i in range(4) for j in range(4)]


def test_holes_of_any_kind():
    expected = ChimeraGraph(2, missing_nodes=[3, 5], missing_edges=[(0, 4)])
    for kind in (np.array, torch.tensor, tuple):
        assert ChimeraGraph(2, missing_nodes=kind([5, 3, 3]), missing_edges=kind([[4, 0]])) == expected
    assert ChimeraGraph(2, missing_nodes={3, 5}, missing_edges={(4, 0), (0, 4)}) == expected


# Bad input --------------------------------------------------------------------------------------------------------

PATH = [(0, 1), (1, 2)]


@pytest.mark.parametrize(
    ("num_nodes", "edges", "colors", "error", "text"),
    [
        (0, [], None, ValueError, "num_nodes must be at least 1 and less than 2^30, got 0"),
        (-1, [], None, ValueError, "num_nodes must be at least 1 and less than 2^30, got -1"),
        (2**30, [], None, ValueError, "num_nodes must be at least 1 and less than 2^30, got 1073741824"),
        (2**64, [], None, ValueError, "num_nodes must fit in 64 bits"),
        (3.0, PATH, None, TypeError, "num_nodes must be an integer, got 3.0"),
        (True, [], None, TypeError, "num_nodes must be an integer, got True"),
        (2, PATH, None, ValueError, "edges must join nodes 0 .. 1, got edges[1] = (1, 2)"),
        (3, [(0, 1), (-1, 2)], None, ValueError, "edges must join nodes 0 .. 2, got edges[1] = (-1, 2)"),
        (3, [(0, 2**62)], None, ValueError, "edges must join nodes 0 .. 2, got edges[0] = (0, 4611686018427387904)"),
        (3, [(0, 1), (2, 2)], None, ValueError, "edges must join two different nodes, got edges[1] = (2, 2)"),
        (3, [*PATH, (2, 1)], None, ValueError,
         "edges must be listed once each, got edges[1] = (1, 2) and edges[2] = (2, 1)"),
        (3, [(0, 1), (0, 1)], None, ValueError,
         "edges must be listed once each, got edges[0] = (0, 1) and edges[1] = (0, 1)"),
        (3, [(0.0, 1.0)], None, TypeError, "edges must be integers of shape [E, 2], got float64 [1, 2]"),
        (3, torch.tensor([[0.0, 1.0]]), None, TypeError, "edges must be integers of shape [E, 2], got torch.float32"),
        (3, torch.tensor([[False, True]]), None, TypeError, "edges must be integers of shape [E, 2], got torch.bool"),
        (3, np.array([[0, 1j]]), None, TypeError, "edges must be integers of shape [E, 2], got complex128 [1, 2]"),
        (3, [(0, 1), (2,)], None, TypeError, "edges must be integers of shape [E, 2], got [(0, 1), (2,)]"),
        (3, [("a", "b")], None, TypeError, "edges must be integers of shape [E, 2], got <U1 [1, 2]"),
        (3, [(0, 2**70)], None, TypeError, "edges must be integers of shape [E, 2], got object [1, 2]"),
        (3, 5, None, TypeError, "edges must be integers of shape [E, 2], got 5"),
        (3, None, None, TypeError, "edges must be integers of shape [E, 2], got None"),
        (3, [0, 1], None, ValueError, "edges must be integers of shape [E, 2], got [2]"),
        (3, [(0, 1, 2)], None, ValueError, "edges must be integers of shape [E, 2], got [1, 3]"),
        (3, np.zeros((2, 0), int), None, ValueError, "edges must be integers of shape [E, 2], got [2, 0]"),
        (3, PATH, [0, 1], ValueError, "colors must have one entry per node, 3, got 2"),
        (3, PATH, [], ValueError, "colors must have one entry per node, 3, got 0"),
        (3, PATH, [0, 1, 0, 1], ValueError, "colors must have one entry per node, 3, got 4"),
        (3, PATH, [[0, 1, 0]], ValueError, "colors must be integers of shape [n], got [1, 3]"),
        (3, PATH, [0.0, 1.0, 0.0], TypeError, "colors must be integers of shape [n], got float64 [3]"),
        (3, PATH, [0, -1, 0], ValueError, "colors must lie in 0 .. num_nodes = 3, got -1 of node 1"),
        (3, PATH, [0, 1, 4], ValueError, "colors must lie in 0 .. num_nodes = 3, got 4 of node 2"),
        (3, PATH, [0, 2, 2], ValueError,
         "colors must differ at the two ends of an edge, got 2 at both of edges[1] = (1, 2)"),
    ],
)  # fmt: skip
def test_bad_graphs(num_nodes, edges, colors, error, text):
    with pytest.raises(error) as caught:
        ColoredGraph(num_nodes, edges, colors)
    assert str(caught.value).startswith(f"ColoredGraph: {text}")


@pytest.mark.parametrize(
    ("G", "colors", "error", "text"),
    [
        (networkx.Graph(), None, ValueError, "num_nodes must be at least 1"),
        (networkx.Graph([("a", "b"), ("b", "b")]), None, ValueError,
         "G must not have edges from a node to itself, got one at 'b'"),
        (networkx.DiGraph([(0, 1)]), None, TypeError, "G must be undirected"),
        (networkx.MultiGraph([(0, 1)]), None, TypeError, "G must be undirected, without parallel edges"),
        ([(0, 1)], None, TypeError, "G must be a networkx.Graph, got [(0, 1)]"),
        (networkx.Graph([("a", "b")]), {"a": 0}, ValueError, "colors must have every node of G, got none for 'b'"),
        (networkx.Graph([("a", "b")]), {"a": 1, "b": 1}, ValueError,
         "colors must differ at the two ends of an edge, got 1 at 'a' and 'b'"),
        (networkx.Graph([("a", "b")]), [0], ValueError, "colors must have one entry per node, 2, got 1"),
        (networkx.Graph([("a", "b")]), {"a": 0, "b": 0.5}, TypeError, "colors must be integers"),
    ],
)  # fmt: skip
def test_bad_networkx_graphs(G, colors, error, text):
    with pytest.raises(error) as caught:
        ColoredGraph.from_networkx(G, colors)
    assert str(caught.value).startswith(f"ColoredGraph.from_networkx: {text}")


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"rows": 0}, ValueError, "rows must be at least 1, got 0"),
        ({"cols": -1}, ValueError, "cols must be at least 1, got -1"),
        ({"shore": 0}, ValueError, "shore must be at least 1, got 0"),
        ({"shore": 4.0}, TypeError, "shore must be an integer, got 4.0"),
        ({"rows": 2**20, "cols": 2**20}, ValueError, "rows, cols and shore must make less than 2^30 nodes and edges"),
        ({"rows": 1, "shore": 2**16}, ValueError, "rows, cols and shore must make less than 2^30 nodes and edges"),
        ({"missing_nodes": [32]}, ValueError, "missing_nodes must lie in 0 .. 31, got 32"),
        ({"missing_nodes": [3, -1]}, ValueError, "missing_nodes must lie in 0 .. 31, got -1"),
        ({"missing_nodes": range(32)}, ValueError, "missing_nodes must leave a node, got all 32"),
        ({"missing_nodes": [1.0]}, TypeError, "missing_nodes must be integers of shape [n], got float64 [1]"),
        ({"missing_nodes": [(0, 1)]}, ValueError, "missing_nodes must be integers of shape [n], got [1, 2]"),
        ({"missing_edges": [(0, 4), (0, 1)]}, ValueError, "missing_edges must be edges of the lattice, got (0, 1)"),
        ({"missing_edges": [(3, 3)]}, ValueError, "missing_edges must be edges of the lattice, got (3, 3)"),
        # As one number, u * 32 + v, this would be the edge (1, 4).
        ({"missing_edges": [(0, 36)]}, ValueError, "missing_edges must be edges of the lattice, got (0, 36)"),
        ({"missing_edges": [(-1, 36)]}, ValueError, "missing_edges must be edges of the lattice, got (-1, 36)"),
        ({"missing_edges": [0, 4]}, ValueError, "missing_edges must be integers of shape [E, 2], got [2]"),
    ],
)
def test_bad_chimeras(arguments, error, text):
    with pytest.raises(error) as caught:
        ChimeraGraph(**{"rows": 2, **arguments})
    assert str(caught.value).startswith(f"ChimeraGraph: {text}")


@pytest.mark.parametrize("label", [0, 32, "a", (0, 0, 0, 0)])
def test_a_label_that_there_is_not(label):
    graph = ChimeraGraph(2, missing_nodes=[0])
    assert graph.index(1) == 0
    with pytest.raises(ValueError, match=r"^ColoredGraph.index: label must be one of the graph's, got "):
        graph.index(label)


def test_graph_layout_checks_shapes():
    with pytest.raises(ValueError, match=r"^graph_layout: edges must have shape \[E, 2\]"):
        ops.graph_layout(3, torch.zeros(4, dtype=torch.int64), None)


@pytest.mark.parametrize("values", [{(0, 1): 1}, {(0, 1)}, frozenset({(0, 1)})])
def test_edges_and_colors_have_an_order(values):
    with pytest.raises(TypeError, match=r"^ColoredGraph: edges must be integers of shape \[E, 2\], got "):
        ColoredGraph(2, values)
    colors = {node: 5 for pair in values for node in pair} if isinstance(values, dict) else type(values)((0, 1))
    with pytest.raises(TypeError, match=r"^ColoredGraph: colors must be integers of shape \[n\], got "):
        ColoredGraph(2, [(0, 1)], colors)


def test_views_of_edges_and_sets_of_what_is_missing():
    G = networkx.path_graph(3)
    assert ColoredGraph(3, G.edges) == ColoredGraph(3, [(0, 1), (1, 2)])
    assert ChimeraGraph(1, missing_nodes={2, 0}) == ChimeraGraph(1, missing_nodes=[0, 2])


@pytest.mark.parametrize("label", [[1], {}, 7, "a"])
def test_index_of_no_label(label):
    with pytest.raises(ValueError, match=r"^ColoredGraph.index: label must be one of the graph's, got "):
        ColoredGraph(2, [(0, 1)]).index(label)


# Subgraphs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "graph",
    [
        ChimeraGraph(2, 3, missing_nodes=[0, 5, 17, 46], missing_edges=[(1, 6), (36, 44)]),
        ColoredGraph.from_networkx(networkx.relabel_nodes(networkx.petersen_graph(), lambda node: f"node {node}")),
    ],
)
def test_a_subgraph_has_the_edges_between_its_nodes(graph):
    for nodes in ([0], [1, 2], range(1, graph.num_nodes, 2), torch.arange(graph.num_nodes).flip(0), {3, 5, 8, 4}):
        part, kept = graph.subgraph(nodes), sorted(int(node) for node in nodes)
        assert_consistent(part)
        assert type(part) is type(graph)
        assert part.labels == tuple(graph.labels[node] for node in kept)
        ends = [[graph.labels[node] for node in edge] for edge in graph.edges.tolist()]
        expected = [edge for edge in ends if set(edge) <= set(part.labels)]
        assert [[part.labels[node] for node in edge] for edge in part.edges.tolist()] == expected
        colors = graph.colors[kept]
        assert part.colors.tolist() == torch.unique(colors, return_inverse=True)[1].tolist()
        if isinstance(part, ChimeraGraph):
            assert part.coordinates.equal(graph.coordinates[kept])
    assert graph.subgraph(range(graph.num_nodes)) == graph


@pytest.mark.parametrize(
    ("nodes", "error", "text"),
    [
        ([], ValueError, "nodes must hold one or more nodes, got none"),
        ([2, 32], ValueError, "nodes must lie in 0 .. 31, got 32"),
        ([-1], ValueError, "nodes must lie in 0 .. 31, got -1"),
        ([4, 2, 4], ValueError, "nodes must differ, got 4 twice"),
        ([1.0], TypeError, "nodes must be integers of shape [n], got float64 [1]"),
        (3, TypeError, "nodes must be integers of shape [n], got 3"),
    ],
)
def test_bad_subgraphs(nodes, error, text):
    with pytest.raises(error) as caught:
        ChimeraGraph(2).subgraph(nodes)
    assert str(caught.value).startswith(f"ColoredGraph.subgraph: {text}")
