# SPDX-License-Identifier: Apache-2.0
"""Bipartite Boltzmann machines: restricted Boltzmann machines, one or a batch of them."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

from gibbs_ext import ops
from gibbs_ext.checks import check_units
from gibbs_ext.functional import bipartite_ais, bipartite_gibbs, bipartite_gibbs_relaxed
from gibbs_ext.graphs import ColoredGraph
from gibbs_ext.log_partition.enumeration import ENUMERABLE_UNITS, Enumeration
from gibbs_ext.log_partition.machine import Solver
from gibbs_ext.models.base import Boltzmann, outside_autocast, with_all_digits
from gibbs_ext.models.graph import GraphBoltzmann


class BipartiteBoltzmann(Boltzmann):
    """Bits z = (left, right) with couplings between the two sides only: a restricted Boltzmann machine.

    ``energy(z) = - left_bias . left - right_bias . right - left^T weight right`` and ``p(z) = exp(-energy(z)) / Z``.

    Sampling is block Gibbs: exact only in the limit of many sweeps, and slow to mix where p has well-separated modes
    (large couplings of one sign).

    Args:
        left_bias: [..., n1], floating.
        right_bias: [..., n2].
        weight: [..., n1, n2]. Batch dims of the three broadcast to ``batch_shape``; nothing is materialised.
        validate_args: Whether to check values here and in :meth:`log_prob`, as for every distribution. Nothing is
            checked inside torch.vmap, where values cannot be read.

    Raises:
        ValueError: Shapes or dtypes do not fit together, or (when validating) a value is not finite.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "left_bias": constraints.real_vector,
        "right_bias": constraints.real_vector,
        "weight": constraints.independent(constraints.real, 2),
    }
    _dims: ClassVar[dict[str, int]] = {"left_bias": 1, "right_bias": 1, "weight": 2}

    def __init__(
        self, left_bias: Tensor, right_bias: Tensor, weight: Tensor, validate_args: bool | None = None
    ) -> None:
        self._check_floating(left_bias=left_bias, right_bias=right_bias, weight=weight)
        self.left_bias, self.right_bias, self.weight = left_bias, right_bias, weight
        n1, n2 = weight.shape[-2:]
        for argument, n in (("left_bias", n1), ("right_bias", n2)):
            self._check_units(argument, n, f"weight {list(weight.shape)}")
        super().__init__(n1 + n2, validate_args)

    @property
    def num_left(self) -> int:
        return self.weight.shape[-2]

    @property
    def num_right(self) -> int:
        return self.weight.shape[-1]

    @property
    def _solver(self) -> Solver:
        return Enumeration()

    @property
    def _num_state_units(self) -> int:
        return self.num_left

    def _edges(self) -> Tensor:
        return torch.cartesian_prod(*torch.arange(self.num_units).split((self.num_left, self.num_right)))

    def _colors(self) -> Tensor:
        return (torch.arange(self.num_units, device="cpu") < self.num_left).long()

    def _coupling_resolution(self) -> Tensor:
        return ops.coupling_resolution(self.weight.detach())

    def _fields_at_half(self) -> list[Tensor]:
        with outside_autocast(self.device):
            sums = (self._computed(self.weight).sum(dim) for dim in (-1, -2))
            return [(bias + s / 2).to(self.dtype) for bias, s in zip(self._biases, sums, strict=True)]

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The two sides of z.

        Args:
            z: [..., n1 + n2], of any dtype.

        Returns:
            Views left [..., n1] and right [..., n2].

        Raises:
            TypeError, ValueError: z is no tensor, or its last dim is not n1 + n2. The message begins with
                ``BipartiteBoltzmann:``.
        """
        check_units("BipartiteBoltzmann", "z", z, self.num_left + self.num_right)
        left, right = z.split((self.num_left, self.num_right), dim=-1)
        return left, right

    @with_all_digits
    def fields_of_right(self, left: Tensor) -> Tensor:
        """``right_bias + left^T weight``: logits of right given left.

        Args:
            left: [..., n1] bits or relaxed values of any dtype; batch dims broadcast against the model's.

        Returns:
            [..., n2], computed in the parameters' dtype, half types in float32, whatever autocast says. Differentiable
            in left and the parameters.

        Raises:
            TypeError, ValueError: Left is no tensor, or its last dim is not n1. The message begins with
                ``BipartiteBoltzmann:``.
            RuntimeError: Batch dims do not broadcast. The message is PyTorch's.
        """
        check_units("BipartiteBoltzmann", "left", left, self.num_left)
        # einsum, unlike matmul, never materialises a weight that broadcasts over the state's dims.
        products = torch.einsum("...i,...ij->...j", self._computed(left), self._computed(self.weight))
        return products + self.right_bias

    @with_all_digits
    def energy_of(self, left: Tensor, right: Tensor) -> Tensor:
        """:meth:`energy` of two sides that are given apart.

        Args:
            left: [..., n1] bits or relaxed values of any dtype; batch dims broadcast against right's and the model's.
            right: [..., n2] bits or relaxed values of any dtype.

        Returns:
            [...], of the dtype of :meth:`energy`. Differentiable in left, right and the parameters.

        Raises:
            TypeError, ValueError: A side is no tensor, or its last dim is not its number of units. The message begins
                with ``BipartiteBoltzmann:``.
            RuntimeError: Batch dims do not broadcast. The message is PyTorch's.
        """
        fields = self.fields_of_right(left)
        check_units("BipartiteBoltzmann", "right", right, self.num_right)
        on_left = torch.einsum("...i,...i->...", self._computed(left), self._computed(self.left_bias))
        return -on_left - torch.einsum("...j,...j->...", fields, self._computed(right))

    def energy(self, z: Tensor) -> Tensor:
        return self.energy_of(*self.split(z))

    @with_all_digits
    def free_energy(self, left: Tensor) -> Tensor:
        """``- log sum_right exp(-energy(left, right))``: right summed out exactly.

        Args:
            left: [..., n1] bits or relaxed values of any dtype; batch dims broadcast against the model's.

        Returns:
            [...], of the dtype of :meth:`energy`. Differentiable in left and the parameters.

        Raises:
            TypeError, ValueError: Left is no tensor, or its last dim is not n1. The message begins with
                ``BipartiteBoltzmann:``.
            RuntimeError: Batch dims do not broadcast. The message is PyTorch's.
        """
        fields = self.fields_of_right(left)
        on_left = torch.einsum("...i,...i->...", self._computed(left), self._computed(self.left_bias))
        return -on_left - softplus(fields).sum(-1)

    def log_prob(self, z: Tensor, log_partition: Tensor | None = None) -> Tensor:
        if log_partition is None and min(self.num_left, self.num_right) > ENUMERABLE_UNITS:
            raise ValueError(
                f"BipartiteBoltzmann.log_prob: a model of {self.num_left} + {self.num_right} units is too large to "
                "enumerate; give log_partition, for instance log_partition=model.log_partition('ais'), an estimate"
            )
        return super().log_prob(z, log_partition)

    def _joined(self, left: Tensor, right: Tensor) -> Tensor:
        with outside_autocast(self.device):  # autocast refuses some dtypes of states
            return torch.cat((left, right), -1)

    def _sweep(self, state: Tensor, num_sweeps: int, **options: Any) -> Tensor:
        sides = bipartite_gibbs(state, self.left_bias, self.right_bias, self.weight, num_sweeps, **options)
        return self._joined(*sides)

    @with_all_digits
    def _fields_of(self, z: Tensor) -> Tensor:
        left, right = self.split(z)
        of_left = torch.einsum("...ij,...j->...i", self._computed(self.weight), self._computed(right)) + self.left_bias
        return self._joined(of_left, self.fields_of_right(left))

    def _ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = self.split(x)
        return left.unsqueeze(-1), right.unsqueeze(-2)

    def _restricted(self, free: Tensor, fields: Tensor) -> Boltzmann:
        left, right = free[free < self.num_left], free[free >= self.num_left]
        if not len(left) or not len(right):
            # The ops take no model without units on one side.
            graph = ColoredGraph(len(free), [])
            return GraphBoltzmann(graph, fields[..., free], self.weight.new_empty(0), validate_args=False)
        weight = self.weight.index_select(-2, left).index_select(-1, right - self.num_left)
        return BipartiteBoltzmann(fields[..., left], fields[..., right], weight, validate_args=False)

    def _clamped(self, state: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        left, right = self.split(values)
        clamp_left, clamp_right = self.split(mask)
        options = {"right": right, "clamp_left": clamp_left, "clamp_right": clamp_right}
        return torch.where(clamp_left, left, state), options

    def _sweep_relaxed(
        self, state: Tensor, num_sweeps: int, num_relaxed_sweeps: int, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        left, right, left_mean, start = bipartite_gibbs_relaxed(
            state, self.left_bias, self.right_bias, self.weight, num_sweeps, num_relaxed_sweeps,
            return_state=True, **options,
        )  # fmt: skip
        return self._joined(left, right), left_mean, start

    def _with_mean(self, z: Tensor, mean: Tensor) -> Tensor:
        return self._joined(mean, self.split(z)[1])

    def _anneal(self, state: Tensor, bases: Sequence[Tensor], betas: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        left_base, right_base = bases
        left, right, log_weights = bipartite_ais(
            state, self.left_bias, self.right_bias, self.weight, left_base, right_base, betas, **options
        )
        return self._joined(left, right), log_weights

    def _temper(self, state: Tensor, *args: Any, cluster_moves: bool) -> tuple[Tensor, Tensor, Tensor]:
        if cluster_moves:
            raise ValueError(
                "tempering: cluster_moves must be False for a BipartiteBoltzmann, got True: where all units of the two "
                "sides are coupled, a cluster is all or one of the units that differ (a GraphBoltzmann may be sparse)"
            )
        left, right, energies, chains = ops.call_without_gradient(
            "bipartite_tempering", state, self.left_bias, self.right_bias, self.weight, *args
        )
        return self._joined(left, right), energies, chains

    def _count(self, state: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        beta, seed, *rest = args
        outputs = ops.call_without_gradient(
            "bipartite_moments", state, self.left_bias, self.right_bias, self.weight, beta, seed, *[None] * 3, *rest
        )
        left, right, left_counts, right_counts, pairs, best_left, best_right, energies = outputs
        counts, best = torch.cat([left_counts, right_counts], -1), self._joined(best_left, best_right)
        return self._joined(left, right), counts, pairs, best, energies
