# SPDX-License-Identifier: Apache-2.0
"""Structures of posterior and prior: two sides of which every pair is coupled, or the edges of a graph."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gibbs_ext.arguments import check_graph
from gibbs_ext.checks import check_integers, shown
from gibbs_ext.functional import graph_fields
from gibbs_ext.graphs import ColoredGraph
from gibbs_ext.models import BipartiteBoltzmann, GraphBoltzmann


@dataclass(frozen=True)
class Sides:
    """Two sides of which every pair is coupled."""

    num_left: int
    num_right: int
    parameter_names: ClassVar = ("left_bias", "right_bias", "weight")  # the biases, then the couplings
    graph: ClassVar = None
    edges: ClassVar = None  # or [E, 2] int64, the order of the couplings

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of units of each bias parameter."""
        return self.num_left, self.num_right

    @property
    def coupling_shape(self) -> tuple[int, ...]:
        return self.num_left, self.num_right

    @property
    def num_summed(self) -> int:
        """The number of couplings of which a unit's field is the sum."""
        return self.num_left

    def model(self, parameters: Iterable[Tensor]) -> BipartiteBoltzmann:
        left_bias, right_bias, weight = parameters
        return BipartiteBoltzmann(left_bias, right_bias, weight, validate_args=False)

    def new_factors(self, rank: int) -> dict[str, Tensor]:
        """Random factors, by name, of a low-rank coupling, whose variance is then that of the strengths."""
        left = torch.randn(self.num_left, rank) / math.sqrt(rank)
        return {"left_factor": left, "right_factor": torch.randn(self.num_right, rank)}

    def low_rank(self, factors: Mapping[str, Tensor], strength: Tensor) -> Tensor:
        """The couplings ``U diag(strength) V^T`` for strength [B, rank]."""
        return (factors["left_factor"] * strength.unsqueeze(-2)) @ factors["right_factor"].mT

    def centered(self, bias: Tensor, coupling: Tensor) -> tuple[Tensor, ...]:
        """The parameters, with half of the sum of each unit's couplings subtracted from its bias.

        Args:
            bias: [B, sum of ``sizes``].
            coupling: [B, *coupling_shape], or [*coupling_shape].
        """
        left, right = bias.split(self.sizes, dim=-1)
        return left - coupling.sum(-1) / 2, right - coupling.sum(-2) / 2, coupling


@dataclass(frozen=True)
class OnGraph:
    """The nodes of a graph, coupled along its edges. Attributes and methods mean the same as for :class:`Sides`."""

    graph: ColoredGraph
    parameter_names: ClassVar = ("bias", "coupling")

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.graph.num_nodes,)

    @property
    def coupling_shape(self) -> tuple[int, ...]:
        return (self.graph.num_edges,)

    @property
    def num_summed(self) -> int:
        return max(1, self.graph.max_degree)

    @property
    def edges(self) -> Tensor:
        return self.graph.edges

    def model(self, parameters: Iterable[Tensor]) -> GraphBoltzmann:
        bias, coupling = parameters
        return GraphBoltzmann(self.graph, bias, coupling, validate_args=False)

    def new_factors(self, rank: int) -> dict[str, Tensor]:
        return {"factor": torch.randn(self.graph.num_nodes, rank) / rank**0.25}

    def low_rank(self, factors: Mapping[str, Tensor], strength: Tensor) -> Tensor:
        factor, (u, v) = factors["factor"], self.graph.edges_on(strength.device).unbind(-1)
        return strength @ (factor[u] * factor[v]).mT

    def centered(self, bias: Tensor, coupling: Tensor) -> tuple[Tensor, ...]:
        # Under autocast their dtypes may differ.
        dtype = torch.promote_types(bias.dtype, coupling.dtype)
        coupling = coupling.to(dtype)
        # The fields of units that are all 1 are sums whose order is fixed on a GPU, too.
        ones, zeros = (coupling.new_full((), value).expand(self.graph.num_nodes) for value in (1, 0))
        sums = graph_fields(ones, zeros, coupling, self.graph).to(dtype)
        return bias.to(dtype) - sums / 2, coupling


Structure = Sides | OnGraph


def structure_of(name: str, num_left: int | None, num_right: int | None, graph: ColoredGraph | None) -> Structure:
    """The structure that these arguments of the module ``name`` describe, after a check."""
    if graph is None:
        check_integers(name, 1, num_left=num_left, num_right=num_right)
        return Sides(num_left, num_right)  # type: ignore[arg-type]
    check_graph(name, graph)
    for argument, value in (("num_left", num_left), ("num_right", num_right)):
        if value is not None:
            raise ValueError(f"{name}: {argument} must be None when a graph is given, got {shown(value)}")
    return OnGraph(graph)


def edge_order(edges: Tensor, others: Tensor) -> Tensor | None:
    """The places [E] of ``edges`` [E, 2] among ``others``, each edge either way round; None if the edges differ."""
    if edges.shape != others.shape or others.is_floating_point():
        return None
    ours, theirs = (torch.stack((pairs.amin(1), pairs.amax(1)), 1).long() for pairs in (edges, others))
    size = int(torch.cat((ours, theirs)).max()) + 1 if len(ours) else 1
    keys, others_keys = (pairs[:, 0] * size + pairs[:, 1] for pairs in (ours, theirs))
    order, others_order = keys.argsort(), others_keys.argsort()
    if not keys[order].equal(others_keys[others_order]):
        return None
    place = torch.empty_like(order)
    place[order] = others_order
    return place


class MachineModule(nn.Module):
    """A module of a machine; its ``state_dict`` holds the edges of the machine's graph, if it is on one.

    A state of the same edges in another order is loaded into the order of this graph. A state of other edges is an
    error.

    Attributes:
        graph: The graph of the machine; None if the machine is bipartite.
        edges: Buffer [E, 2] int64, the edges of the graph; None if the machine is bipartite.
    """

    edges: Tensor | None

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.structure, self.graph = structure, structure.graph
        edges = structure.edges
        self.register_buffer("edges", None if edges is None else edges.clone())
        self._along_edges: tuple[str, ...] = ()  # names of the state's tensors of one row for each edge

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        # load_state_dict has copied state_dict, and children see what is changed in it.
        key, edges = prefix + "edges", self.structure.edges
        if edges is not None and key in state_dict:
            place = edge_order(edges, state_dict[key].cpu())
            if place is None:
                errors.append(f"{key}: the state is that of a machine on other edges than those of {self.graph}")
            else:
                for name in (prefix + name for name in ("edges", *self._along_edges)):
                    if name in state_dict and len(state_dict[name]) == len(place):
                        state_dict[name] = state_dict[name][place.to(state_dict[name].device)]
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, errors)
