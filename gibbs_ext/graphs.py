# SPDX-License-Identifier: Apache-2.0
"""Graphs with colours: which units are coupled, and in which order a sweep updates them.

A colour is a block of block Gibbs sampling: nodes of one colour are never coupled, so that a sweep updates all of
them at once, colour 0 first.
"""

import functools
from collections.abc import Hashable, Iterable, Mapping, Set
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gibbs_ext import ops
from gibbs_ext.checks import check_integers, is_fake, reported_as, shown

if TYPE_CHECKING:
    import networkx

Integers = Tensor | NDArray[np.integer[Any]] | Iterable[Any]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_LIMIT = 2**30  # of nodes, and of edges


def as_integers(name: str, argument: str, values: Integers, pairs: bool = False) -> Tensor:
    """A new int64 tensor [n], or [E, 2]."""
    wanted = f"{name}: {argument} must be integers of shape {'[E, 2]' if pairs else '[n]'}, got "
    # Mappings iterate over keys and sets in no order, so both are refused. networkx's views are mappings and sets that
    # iterate in order. The order of missing nodes and edges does not matter.
    keyed = isinstance(values, Mapping) and not isinstance(values, Set)
    if keyed or (argument in ("edges", "colors") and isinstance(values, (set, frozenset))):
        raise TypeError(wanted + shown(values))
    if not isinstance(values, (Tensor, np.ndarray)):
        try:
            items = list(values)
            # NumPy cannot tell the shape and dtype of no items.
            values = np.array(items) if items else np.empty((0, 2) if pairs else 0, np.int64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(wanted + shown(values)) from error
    if isinstance(values, np.ndarray) and values.dtype.kind in "iu":
        values = torch.from_numpy(values.astype(np.int64, order="C"))
    if not isinstance(values, Tensor) or values.dtype not in _INTEGERS:
        raise TypeError(f"{wanted}{values.dtype} {list(values.shape)}")
    if values.dim() != 1 + pairs or (pairs and values.shape[1] != 2):
        raise ValueError(wanted + str(list(values.shape)))
    return values.to("cpu", torch.int64, copy=True).contiguous()


class ColoredGraph:
    """Nodes, edges and a proper colouring: any graph, such as Pegasus, Zephyr or a lattice.

    Node i of the graph is unit i of a model on it, and ``edges[e]`` are the two units that ``coupling[e]`` couples.
    A sweep updates the nodes of colour 0, then those of colour 1, and so on.

    Args:
        num_nodes: Number of nodes, at least 1 and less than 2^30. A node may have no edge.
        edges: [E, 2] integers in 0 .. num_nodes - 1, as a tensor, an array or pairs, with E less than 2^30. Each edge
            appears once, either way round, and joins two different nodes. Their order is kept.
        colors: [num_nodes] integers in 0 .. num_nodes, different at the two ends of every edge. Only their order
            counts: they are numbered anew from 0 without gaps. If None, a bipartite graph gets two colours, and the
            lowest node of each of its components has colour 0; any other graph gets few colours, found greedily in
            linear time (4 on Pegasus, 5 on Zephyr).

    Attributes:
        num_nodes: N.
        num_edges: E.
        num_colors: Number of colours, at least 1; every colour has a node.
        max_degree: Largest number of edges of a node.
        edges: [E, 2] int64, as given.
        colors: [N] int64 in 0 .. num_colors - 1.
        degrees: [N] int64, number of edges of each node.
        labels: Names of the nodes at the source of the graph; here 0 .. N - 1.
        layout: int32, the graph in the format of csrc/core/graph_view.h, which the graph ops read.

    Tensors are on the CPU. A graph is immutable: copies share it, and it can be a key. Graphs are equal if they have
    the same nodes, edges (in order, each either way round) and colours; labels do not count.

    Raises:
        TypeError, ValueError: An argument does not fit; the message begins with ``ColoredGraph:``.

    Example:
        >>> ColoredGraph(4, [(0, 1), (1, 2), (2, 3), (3, 0)]).colors
        tensor([0, 1, 0, 1])
    """

    num_nodes: int
    num_edges: int
    num_colors: int
    max_degree: int
    edges: Tensor
    colors: Tensor
    degrees: Tensor
    labels: tuple[Hashable, ...]
    layout: Tensor

    def __init__(self, num_nodes: int, edges: Integers, colors: Integers | None = None) -> None:
        name = "ColoredGraph"
        check_integers(name, num_nodes=num_nodes)
        self.edges = as_integers(name, "edges", edges, pairs=True)
        given = None if colors is None else as_integers(name, "colors", colors)
        self.layout = ops.graph_layout(int(num_nodes), self.edges, given)
        self.num_nodes, self.num_edges, self.num_colors, self.max_degree = self.layout[:4].tolist()
        sizes = [4, self.num_colors + 1, self.num_nodes, self.num_nodes + 1]
        _, color_offsets, order, row_offsets = self.layout[: sum(sizes)].split(sizes)
        order = order.to(torch.int64)
        self.colors, self.degrees = torch.empty_like(order), torch.empty_like(order)
        self.colors[order] = torch.arange(self.num_colors, device="cpu").repeat_interleave(color_offsets.diff())
        self.degrees[order] = row_offsets.diff().to(torch.int64)
        self.labels = tuple(range(self.num_nodes))
        self._units_of_colors = order.split(color_offsets.diff().tolist())
        self._copies: dict[tuple[str, torch.device], Tensor] = {}

    def layout_on(self, device: torch.device) -> Tensor:
        """:attr:`layout` on ``device``."""
        return self._copy("layout", self.layout, device)

    def edges_on(self, device: torch.device) -> Tensor:
        """:attr:`edges` on ``device``."""
        return self._copy("edges", self.edges, device)

    def units_of_color(self, color: int, device: torch.device) -> Tensor:
        """The units of a colour, in ascending order, [n] int64 on ``device``. Colour -1 is the last one."""
        return self._copy(f"color {color}", self._units_of_colors[color], device)

    def _copy(self, name: str, tensor: Tensor, device: torch.device) -> Tensor:
        """The tensor on ``device``. A copy on a GPU is kept as long as the graph, because copying synchronises."""
        if device.type != "cuda":
            return tensor.to(device)
        if (name, device) in self._copies:
            return self._copies[name, device]
        copy = tensor.to(device)
        if not is_fake(copy):
            self._copies[name, device] = copy
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_copies": {}}

    @staticmethod
    def from_networkx(G: "networkx.Graph[Any]", colors: Mapping[Any, int] | Integers | None = None) -> "ColoredGraph":
        """The graph of a networkx graph. Its nodes, in its own order, are units 0 .. N - 1 and become ``labels``.

        Args:
            G: An undirected graph without parallel edges. Attributes are ignored.
            colors: Colours as in :class:`ColoredGraph`: a mapping from G's nodes, or a sequence in their order.

        Raises:
            TypeError, ValueError: An argument does not fit; the message begins with ``ColoredGraph.from_networkx:``.
        """
        name = "ColoredGraph.from_networkx"
        if not all(hasattr(G, method) for method in ("nodes", "edges", "is_directed", "is_multigraph")):
            raise TypeError(f"{name}: G must be a networkx.Graph, got {shown(G)}")
        if G.is_directed() or G.is_multigraph():
            raise TypeError(f"{name}: G must be undirected, without parallel edges, got {G} (see networkx.Graph(G))")
        labels = tuple(G.nodes)
        unit = {label: i for i, label in enumerate(labels)}
        edges = np.array([(unit[u], unit[v]) for u, v in G.edges], np.int64).reshape(-1, 2)
        for node in edges[edges[:, 0] == edges[:, 1], 0][:1]:
            raise ValueError(f"{name}: G must not have edges from a node to itself, got one at {shown(labels[node])}")
        given = None
        if isinstance(colors, Mapping):
            for label in labels:
                if label not in colors:
                    raise ValueError(f"{name}: colors must have every node of G, got none for {shown(label)}")
            colors = [colors[label] for label in labels]
        if colors is not None:
            given = as_integers(name, "colors", colors)
        # This is checked here, because the message names nodes by their labels. ColoredGraph checks the length.
        if given is not None and len(given) == len(labels):
            for u, v in edges[(given[edges[:, 0]] == given[edges[:, 1]]).numpy()][:1]:
                ends = f"{shown(labels[u])} and {shown(labels[v])}"
                raise ValueError(f"{name}: colors must differ at the two ends of an edge, got {given[u]} at {ends}")
        with reported_as(name):
            graph = ColoredGraph(len(labels), edges, given)
        graph.labels = labels
        return graph

    def to_networkx(self) -> "networkx.Graph[Any]":
        """A networkx.Graph whose nodes are the labels, with attribute ``color``. Its edges may have another order.

        Raises:
            ImportError: networkx is missing.
        """
        try:
            import networkx
        except ImportError as error:
            raise ImportError("ColoredGraph.to_networkx: needs networkx; pip install networkx") from error

        G = networkx.Graph()
        G.add_nodes_from(
            (label, {"color": color}) for label, color in zip(self.labels, self.colors.tolist(), strict=True)
        )
        G.add_edges_from((self.labels[u], self.labels[v]) for u, v in self.edges.tolist())
        return G

    def subgraph(self, nodes: Integers) -> "ColoredGraph":
        """The graph of some of the nodes, and of the edges between them.

        Args:
            nodes: [n] integers in 0 .. num_nodes - 1, different ones, at least one. Their order does not matter.

        Returns:
            A graph whose nodes, edges, colours and labels are those of this one, in the same order. It is a
            :class:`ChimeraGraph` if this one is.

        Raises:
            TypeError, ValueError: ``nodes`` does not fit; the message begins with ``ColoredGraph.subgraph:``.
        """
        name = "ColoredGraph.subgraph"
        units = as_integers(name, "nodes", nodes).sort()[0]
        for node in units[(units < 0) | (units >= self.num_nodes)].tolist()[:1]:
            raise ValueError(f"{name}: nodes must lie in 0 .. {self.num_nodes - 1}, got {node}")
        for node in units[1:][units.diff() == 0].tolist()[:1]:
            raise ValueError(f"{name}: nodes must differ, got {node} twice")
        if not len(units):
            raise ValueError(f"{name}: nodes must hold one or more nodes, got none")
        return self._subgraph(units)

    def _subgraph(self, units: Tensor) -> "ColoredGraph":
        place = torch.full((self.num_nodes,), -1, device="cpu")
        place[units] = torch.arange(len(units), device="cpu")
        ends = place[self.edges]
        graph = ColoredGraph(len(units), ends[(ends >= 0).all(1)], self.colors[units])
        graph.labels = tuple(self.labels[unit] for unit in units.tolist())
        return graph

    @functools.cached_property
    def _units(self) -> dict[Hashable, int]:
        return {label: unit for unit, label in enumerate(self.labels)}

    def index(self, label: Hashable) -> int:
        """The unit with this label.

        Raises:
            ValueError: No unit has it.
        """
        try:
            return self._units[label]
        except (KeyError, TypeError):  # TypeError: not hashable
            raise ValueError(f"ColoredGraph.index: label must be one of the graph's, got {shown(label)}") from None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ColoredGraph):
            return NotImplemented
        return self is other or torch.equal(self.layout, other.layout)

    def __hash__(self) -> int:
        return hash(self.layout.numpy().tobytes())

    def __deepcopy__(self, memo: dict[int, Any]) -> "ColoredGraph":
        return self

    def __repr__(self) -> str:
        return f"ColoredGraph({self._sizes()})"

    def _sizes(self) -> str:
        return f"num_nodes={self.num_nodes}, num_edges={self.num_edges}, num_colors={self.num_colors}"


class ChimeraGraph(ColoredGraph):
    """A Chimera lattice: rows x cols unit cells, each a complete bipartite graph of 2 x shore nodes.

    Node (row, col, u, k) has the linear index ``((row * cols + col) * 2 + u) * shore + k``, as in D-Wave's
    ``chimera_graph``. In its cell it is coupled to all nodes of the other side. Nodes of side u = 0 are also coupled to
    the nodes with the same col, u and k one row up and down; nodes of side u = 1 are coupled to the nodes with the same
    row, u and k in the neighbouring columns. A node's colour is ``(row + col + u + 1) % 2``: so a single cell is swept
    as a bipartite model whose left side is side 0. (Colour 1 becomes colour 0 if no node of colour 0 is present.)

    The units are the nodes present, in the order of their linear indices, which are their ``labels``. Edges are sorted,
    the lower node first.

    Args:
        rows: Number of rows of cells, at least 1.
        cols: Number of columns of cells, at least 1; ``rows`` if None.
        shore: Number of nodes on each side of a cell, at least 1.
        missing_nodes: Linear indices of nodes that are left out, as on real chips.
        missing_edges: Pairs of linear indices, either way round, of edges of the full lattice that are left out.

    Attributes:
        rows, cols, shore: The arguments.
        coordinates: [N, 4] int64: row, col, u and k of each unit.

    The attributes of :class:`ColoredGraph` come on top.

    Raises:
        TypeError, ValueError: An argument does not fit; the message begins with ``ChimeraGraph:``.

    Example:
        >>> ChimeraGraph(2, missing_nodes=[0])
        ChimeraGraph(2, 2, 4, num_nodes=31, num_edges=75, num_colors=2)
    """

    rows: int
    cols: int
    shore: int
    coordinates: Tensor

    def __init__(
        self,
        rows: int,
        cols: int | None = None,
        shore: int = 4,
        *,
        missing_nodes: Integers = (),
        missing_edges: Integers = (),
    ) -> None:
        name = "ChimeraGraph"
        cols = rows if cols is None else cols
        check_integers(name, 1, rows=rows, cols=cols, shore=shore)
        self.rows, self.cols, self.shore = int(rows), int(cols), int(shore)
        shape = (self.rows, self.cols, 2, self.shore)
        total = 2 * self.rows * self.cols * self.shore
        if max(total, total // 2 * (self.shore + 2)) >= _LIMIT:
            raise ValueError(f"{name}: rows, cols and shore must make less than 2^30 nodes and edges, got {shape}")
        node = torch.arange(total, device="cpu").reshape(shape)
        ends = [
            (node[:, :, 0, :, None], node[:, :, 1, None, :]),
            (node[:-1, :, 0], node[1:, :, 0]),
            (node[:, :-1, 1], node[:, 1:, 1]),
        ]
        edges = torch.cat([torch.stack(torch.broadcast_tensors(u, v), -1).reshape(-1, 2) for u, v in ends])
        keys, by_key = (edges[:, 0] * total + edges[:, 1]).sort()
        edges = edges[by_key]

        vacant = as_integers(name, "missing_nodes", missing_nodes)
        for index in vacant[(vacant < 0) | (vacant >= total)].tolist()[:1]:
            raise ValueError(f"{name}: missing_nodes must lie in 0 .. {total - 1}, got {index}")
        present = torch.ones(total, dtype=torch.bool, device="cpu")
        present[vacant] = False
        if not present.any():
            raise ValueError(f"{name}: missing_nodes must leave a node, got all {total}")

        cut = as_integers(name, "missing_edges", missing_edges, pairs=True)
        cut_keys = cut.amin(1) * total + cut.amax(1)
        for u, v in cut[((cut < 0) | (cut >= total)).any(1) | ~torch.isin(cut_keys, keys)].tolist()[:1]:
            raise ValueError(f"{name}: missing_edges must be edges of the lattice, got ({u}, {v})")
        edges = edges[present[edges].all(1) & ~torch.isin(keys, cut_keys)]

        unit = present.cumsum(0) - 1
        coordinates = torch.stack(torch.unravel_index(node.flatten(), shape), -1)[present]
        row, col, side, _ = coordinates.unbind(1)
        super().__init__(len(coordinates), unit[edges], (row + col + side + 1) % 2)
        self.coordinates = coordinates
        self.labels = tuple(present.nonzero()[:, 0].tolist())
        self._missing_edges = cut

    def _subgraph(self, units: Tensor) -> "ChimeraGraph":
        # Exact answers find a good order of elimination by the lattice.
        missing = torch.ones(2 * self.rows * self.cols * self.shore, dtype=torch.bool, device="cpu")
        missing[[self.labels[unit] for unit in units.tolist()]] = False
        return ChimeraGraph(
            self.rows, self.cols, self.shore,
            missing_nodes=missing.nonzero()[:, 0], missing_edges=self._missing_edges,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"ChimeraGraph({self.rows}, {self.cols}, {self.shore}, {self._sizes()})"
