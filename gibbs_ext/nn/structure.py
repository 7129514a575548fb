# SPDX-License-Identifier: Apache-2.0
"""What posterior and prior have in common: two sides of which every pair is coupled, or the edges of a graph."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gibbs_ext.arguments import check_graph
from gibbs_ext.checks import check_integers, shown
from gibbs_ext.distributions import BipartiteBoltzmann, GraphBoltzmann
from gibbs_ext.graphs import ColoredGraph


def coupling_shape(
    name: str, num_left: int | None, num_right: int | None, graph: ColoredGraph | None
) -> tuple[int, ...]:
    """(n1, n2), or (E,) on a graph, after a check of the arguments."""
    if graph is None:
        check_integers(name, 1, num_left=num_left, num_right=num_right)
        return num_left, num_right  # type: ignore[return-value]
    check_graph(name, graph)
    for argument, value in (("num_left", num_left), ("num_right", num_right)):
        if value is not None:
            raise ValueError(f"{name}: {argument} must be None when a graph is given, got {shown(value)}")
    return (graph.num_edges,)


def boltzmann(graph: ColoredGraph | None, parameters: Iterable[Tensor]) -> BipartiteBoltzmann | GraphBoltzmann:
    """The model of left_bias, right_bias and weight, or of a graph's bias and coupling."""
    if graph is None:
        left_bias, right_bias, weight = parameters
        return BipartiteBoltzmann(left_bias, right_bias, weight, validate_args=False)
    bias, coupling = parameters
    return GraphBoltzmann(graph, bias, coupling, validate_args=False)


def edge_order(edges: Tensor, others: Tensor) -> Tensor | None:
    """Where each of ``edges`` [E, 2] stands among ``others``, whichever way round; None if they are not the same."""
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
    """A module of a machine; its ``state_dict`` holds the edges of its graph, if that is what it is on.

    A state of the same edges in another order is loaded into the order of this graph. That of other edges is an error.

    Attributes:
        graph: Of the machine; None where that is bipartite.
        edges: Buffer [E, 2] int64, those of the graph; None where the machine is bipartite.
    """

    edges: Tensor | None

    def __init__(self, graph: ColoredGraph | None) -> None:
        super().__init__()
        self.graph = graph
        self.register_buffer("edges", None if graph is None else graph.edges.clone())
        self._along_edges: tuple[str, ...] = ()  # what of the state has a number, or a row, for each edge

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        # state_dict is load_state_dict's own, and what is changed in it is what children see.
        key = prefix + "edges"
        if self.graph is not None and key in state_dict:
            place = edge_order(self.graph.edges, state_dict[key].cpu())
            if place is None:
                errors.append(f"{key}: the state is that of a machine on other edges than those of {self.graph}")
            else:
                for name in (prefix + name for name in ("edges", *self._along_edges)):
                    if name in state_dict and len(state_dict[name]) == len(place):
                        state_dict[name] = state_dict[name][place.to(state_dict[name].device)]
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, errors)
