# SPDX-License-Identifier: Apache-2.0
"""What posterior and prior have in common: two sides of which every pair is coupled, or the edges of a graph."""

from collections.abc import Iterable

from torch import Tensor

from gibbs_ext.checks import check_integers, shown
from gibbs_ext.distributions import BipartiteBoltzmann, GraphBoltzmann
from gibbs_ext.functional import check_graph
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
