# SPDX-License-Identifier: Apache-2.0
"""Boltzmann machines on coloured graphs, one or a batch of them."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

from gibbs_ext import ops
from gibbs_ext.arguments import check_graph
from gibbs_ext.checks import check_units
from gibbs_ext.functional import graph_ais, graph_fields, graph_gibbs, graph_gibbs_relaxed
from gibbs_ext.graphs import ColoredGraph
from gibbs_ext.log_partition.elimination import Elimination
from gibbs_ext.log_partition.machine import Solver
from gibbs_ext.models.base import Boltzmann, with_all_digits


class GraphBoltzmann(Boltzmann):
    """Bits z of a coloured graph's nodes, coupled along its edges.

    ``energy(z) = - sum_i bias_i z_i - sum_e coupling_e z_u z_v``, e = (u, v), and ``p(z) = exp(-energy(z)) / Z``.

    Sampling is block Gibbs, colour by colour: exact only in the limit of many sweeps, and slow to mix where p has
    well-separated modes, as spin glasses at low temperature do.

    Args:
        graph: A :class:`gibbs_ext.ColoredGraph` of N nodes and E edges.
        bias: [..., N], floating.
        coupling: [..., E], in the order of ``graph.edges``. Batch dims broadcast to ``batch_shape``; nothing is
            materialised.
        validate_args: Whether to check values here and in :meth:`log_prob`, as for every distribution. Nothing is
            checked inside torch.vmap, where values cannot be read.

    Raises:
        TypeError: ``graph`` is no ColoredGraph.
        ValueError: Shapes or dtypes do not fit together, or (when validating) a value is not finite.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "bias": constraints.real_vector,
        "coupling": constraints.real_vector,
    }
    _dims: ClassVar[dict[str, int]] = {"bias": 1, "coupling": 1}

    def __init__(self, graph: ColoredGraph, bias: Tensor, coupling: Tensor, validate_args: bool | None = None) -> None:
        check_graph(type(self).__name__, graph)
        self._check_floating(bias=bias, coupling=coupling)
        self.graph, self.bias, self.coupling = graph, bias, coupling
        self._check_units("bias", graph.num_nodes, "the graph's nodes")
        self._check_units("coupling", graph.num_edges, "the graph's edges")
        super().__init__(graph.num_nodes, validate_args)

    @property
    def _solver(self) -> Solver:
        return Elimination(self.graph)

    @property
    def _num_state_units(self) -> int:
        return self.num_units

    def _edges(self) -> Tensor:
        return self.graph.edges

    def _colors(self) -> Tensor:
        return self.graph.colors

    def _coupling_resolution(self) -> Tensor:
        return ops.graph_coupling_resolution(self.coupling.detach(), self.graph.layout_on(self.device))

    def _fields_at_half(self) -> list[Tensor]:
        halves = self.bias.new_full((), 0.5).expand(self.num_units)
        return [self.fields(halves).to(self.dtype)]

    def fields(self, z: Tensor) -> Tensor:
        """``bias_i + sum_j coupling_ij z_j`` over the neighbours j: the logit of each unit given the others.

        Args:
            z: [..., N] bits or relaxed values of any dtype; batch dims broadcast against the model's.

        Returns:
            [..., N], of the parameters' dtype, float32 for half types. Differentiable in z and the parameters.

        Raises:
            TypeError: z is no tensor. The message begins with ``GraphBoltzmann:``.
            ValueError: The last dim of z is not N (the message begins with ``GraphBoltzmann:``); or batch dims do not
                broadcast, or z is on another device than the parameters (it begins with ``graph_fields:``).
        """
        check_units("GraphBoltzmann", "z", z, self.num_units)
        return graph_fields(z, self.bias, self.coupling, self.graph)

    @with_all_digits
    def energy(self, z: Tensor) -> Tensor:
        check_units("GraphBoltzmann", "z", z, self.num_units)
        z = self._computed(z)
        return self._energy(z, self.fields(z))

    @with_all_digits
    def free_energy(self, z: Tensor) -> Tensor:
        """``- log sum_(units of colour 0) exp(-energy(z))``: colour 0 summed out exactly, given the rest of z.

        Args:
            z: [..., N] bits or relaxed values of any dtype; batch dims broadcast against the model's. Values of colour
                0 do not matter.

        Returns:
            [...], of the dtype of :meth:`energy`. Differentiable in the rest of z and the parameters.

        Raises:
            TypeError, ValueError: As in :meth:`fields`.
        """
        check_units("GraphBoltzmann", "z", z, self.num_units)
        first = self.graph.units_of_color(0, z.device)
        rest = self._computed(z).index_fill(-1, first, 0)
        fields = self.fields(rest)
        return self._energy(rest, fields) - softplus(fields.index_select(-1, first)).sum(-1)

    def _energy(self, z: Tensor, fields: Tensor) -> Tensor:
        """The energy: half of the sum of z (bias + fields), since fields count each coupling at both its ends."""
        return -torch.einsum("...i,...i->...", z, self.bias + fields) / 2

    def _sweep(self, state: Tensor, num_sweeps: int, **options: Any) -> Tensor:
        return graph_gibbs(state, self.bias, self.coupling, self.graph, num_sweeps, **options)

    def _fields_of(self, z: Tensor) -> Tensor:
        return self.fields(z)

    def _ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.graph.edges_on(x.device).unbind(-1)
        return x[..., first], x[..., second]

    def _restricted(self, free: Tensor, fields: Tensor) -> Boltzmann:
        is_free = torch.zeros(self.num_units, dtype=torch.bool, device=free.device).index_fill(0, free, True)
        first, second = self._ends(is_free)
        return GraphBoltzmann(
            self.graph.subgraph(free), fields[..., free], self.coupling[..., first & second], validate_args=False
        )

    def _clamped(self, state: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.where(mask, values, state), {"clamp": mask}

    def _sweep_relaxed(
        self, state: Tensor, num_sweeps: int, num_relaxed_sweeps: int, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        z, mean, start = graph_gibbs_relaxed(
            state, self.bias, self.coupling, self.graph, num_sweeps, num_relaxed_sweeps, return_state=True, **options
        )
        return z, mean, start

    def _with_mean(self, z: Tensor, mean: Tensor) -> Tensor:
        last = self.graph.units_of_color(-1, z.device)
        return z.index_copy(-1, last, mean.index_select(-1, last))

    def _anneal(self, state: Tensor, bases: Sequence[Tensor], betas: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        (base,) = bases
        return graph_ais(state, self.bias, self.coupling, self.graph, base, betas, **options)

    def _temper(self, state: Tensor, *args: Any, cluster_moves: bool) -> tuple[Tensor, Tensor, Tensor]:
        layout = self.graph.layout_on(self.device)
        outputs: tuple[Tensor, Tensor, Tensor] = ops.call_without_gradient(
            "graph_tempering", state, self.bias, self.coupling, layout, *args, cluster_moves
        )
        return outputs

    def _count(self, state: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        beta, seed, *rest = args
        layout = self.graph.layout_on(self.device)
        outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = ops.call_without_gradient(
            "graph_moments", state, self.bias, self.coupling, layout, beta, seed, None, *rest, False
        )
        return outputs
