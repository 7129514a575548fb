# SPDX-License-Identifier: Apache-2.0
"""Boltzmann machines as torch.distributions."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.nn.functional import softplus

from gibbs_ext import ops
from gibbs_ext.checks import check_integers, check_units, expand_to, reported_as, shown
from gibbs_ext.functional import bipartite_gibbs, bipartite_gibbs_relaxed

ENUMERABLE_UNITS = 25


def coupling_resolution(model: "BipartiteBoltzmann | Tensor") -> Tensor:
    """The step 2^-k to which the couplings of each model are rounded in binary sweeps.

    Args:
        model: A model, or its weight [..., n1, n2].

    Returns:
        [...] float64. The logit of a unit is off by at most half of this per neighbour that is 1.
    """
    if not isinstance(model, Tensor):
        check_model("coupling_resolution", model)
        model = model.weight
    return ops.coupling_resolution(model.detach())


class BipartiteBoltzmann(Distribution):
    """Bits z = (left, right) with couplings between the two sides only: a restricted Boltzmann machine.

    ``energy(z) = - left_bias . left - right_bias . right - left^T weight right`` and ``p(z) = exp(-energy(z)) / Z``.

    Sampling is block Gibbs: exact only in the limit of many sweeps, and slow to mix where p has well-separated modes
    (large couplings of one sign).

    Args:
        left_bias: [..., n1], floating.
        right_bias: [..., n2].
        weight: [..., n1, n2]. Batch dims of the three broadcast to ``batch_shape``; nothing is materialised.
        validate_args: As of every distribution: whether to check values here and in :meth:`log_prob`.

    Raises:
        ValueError: Shapes or dtypes do not fit together, or (when validating) a value is not finite.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "left_bias": constraints.real_vector,
        "right_bias": constraints.real_vector,
        "weight": constraints.independent(constraints.real, 2),
    }
    support = constraints.independent(constraints.boolean, 1)
    has_rsample = True

    def __init__(
        self, left_bias: Tensor, right_bias: Tensor, weight: Tensor, validate_args: bool | None = None
    ) -> None:
        name = "BipartiteBoltzmann"
        parameters = (("left_bias", left_bias, 1), ("right_bias", right_bias, 1), ("weight", weight, 2))
        for argument, tensor, dim in parameters:
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"{name}: {argument} must be a floating-point tensor, got {got}")
            if tensor.dim() < dim:
                raise ValueError(f"{name}: {argument} needs {dim} or more dims, got shape {list(tensor.shape)}")
        n1, n2 = weight.shape[-2:]
        for argument, bias, n in (("left_bias", left_bias, n1), ("right_bias", right_bias, n2)):
            if bias.shape[-1] != n:
                raise ValueError(
                    f"{name}: {argument} must have shape [..., {n}] to fit weight {list(weight.shape)}, "
                    f"got {list(bias.shape)}"
                )
            if bias.dtype != weight.dtype:
                raise ValueError(f"{name}: {argument} must have the dtype of weight, {weight.dtype}, got {bias.dtype}")
        try:
            batch_shape = torch.broadcast_shapes(left_bias.shape[:-1], right_bias.shape[:-1], weight.shape[:-2])
        except RuntimeError as error:
            raise ValueError(
                f"{name}: batch dims do not broadcast: left_bias {list(left_bias.shape)}, "
                f"right_bias {list(right_bias.shape)}, weight {list(weight.shape)}"
            ) from error
        self.left_bias, self.right_bias, self.weight = left_bias, right_bias, weight
        super().__init__(batch_shape, torch.Size([n1 + n2]), validate_args=validate_args)

    @property
    def num_left(self) -> int:
        return self.weight.shape[-2]

    @property
    def num_right(self) -> int:
        return self.weight.shape[-1]

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "BipartiteBoltzmann":
        """The same models under a larger batch shape, without a copy."""
        return self._with(
            self.left_bias.expand(*batch_shape, -1),
            self.right_bias.expand(*batch_shape, -1),
            self.weight.expand(*batch_shape, -1, -1),
        )

    def detach(self) -> "BipartiteBoltzmann":
        """The same model, its parameters cut from the graph."""
        return self._with(self.left_bias.detach(), self.right_bias.detach(), self.weight.detach())

    def _with(self, left_bias: Tensor, right_bias: Tensor, weight: Tensor) -> "BipartiteBoltzmann":
        """A model of values that this one has validated, and which goes on validating if this one does."""
        new = BipartiteBoltzmann(left_bias, right_bias, weight, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z [..., n1 + n2] as views left [..., n1] and right [..., n2]."""
        check_units("BipartiteBoltzmann", "z", z, self.num_left + self.num_right)
        left, right = z.split((self.num_left, self.num_right), dim=-1)
        return left, right

    # Energies -------------------------------------------------------------------------------------------------

    def fields_of_right(self, left: Tensor) -> Tensor:
        """``right_bias + left^T weight``: logits of right given left [..., n1], as [..., n2]. Differentiable."""
        check_units("BipartiteBoltzmann", "left", left, self.num_left)
        # einsum, unlike matmul, never materialises a weight that broadcasts over the state's dims.
        return torch.einsum("...i,...ij->...j", left, self.weight) + self.right_bias

    def energy_of(self, left: Tensor, right: Tensor) -> Tensor:
        """:meth:`energy` of the two sides given apart: left [..., n1], right [..., n2], in [0, 1] (relaxed or not)."""
        fields = self.fields_of_right(left)
        check_units("BipartiteBoltzmann", "right", right, self.num_right)
        on_left = torch.einsum("...i,...i->...", left, self.left_bias)
        return -on_left - torch.einsum("...j,...j->...", fields, right)

    def energy(self, z: Tensor) -> Tensor:
        """``- left_bias . left - right_bias . right - left^T weight right``.

        Args:
            z: [..., n1 + n2] of the parameters' dtype, bits or relaxed values; batch dims broadcast against the
                model's.

        Returns:
            [...] energies. Differentiable in z and the parameters.
        """
        return self.energy_of(*self.split(z))

    def free_energy(self, left: Tensor) -> Tensor:
        """``- log sum_right exp(-energy(left, right))``: right summed out exactly.

        Args:
            left: [..., n1] of the parameters' dtype.

        Returns:
            [...]. Differentiable in left and the parameters.
        """
        fields = self.fields_of_right(left)
        on_left = torch.einsum("...i,...i->...", left, self.left_bias)
        return -on_left - softplus(fields).sum(-1)

    # Samples --------------------------------------------------------------------------------------------------

    def _start(
        self, name: str, sample_shape: Sequence[int], initial: Tensor | None, num_sweeps: int
    ) -> tuple[Tensor, Tensor]:
        """Starting left states and the schedule of beta.

        Without ``initial``, a first sweep at beta = 0 makes the uniform bits, so that they too depend on nothing but
        seed and chain.
        """
        check_integers(name, 0, num_sweeps=num_sweeps)
        shape = (*sample_shape, *self.batch_shape, self.num_left)
        if initial is not None:
            initial = expand_to(name, "initial", initial, shape)
            return initial.to(self.weight.dtype), torch.ones(num_sweeps, dtype=torch.float64)
        beta = torch.ones(1 + num_sweeps, dtype=torch.float64)
        beta[0] = 0
        return self.weight.new_zeros(()).expand(shape), beta

    def sample(
        self,
        sample_shape: Sequence[int] = (),
        num_sweeps: int = 100,
        *,
        initial: Tensor | None = None,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """Independent chains of ``num_sweeps`` binary Gibbs sweeps.

        Args:
            sample_shape: Chains per model.
            num_sweeps: At least 0. How many are enough depends on the model; compare two lengths.
            initial: [..., n1] left states to start from; uniform bits when not given.
            generator: Supplies the seed.
            seed: A 64-bit integer, instead of a generator.

        Returns:
            [*sample_shape, *batch_shape, n1 + n2] bits of the parameters' dtype, without gradient. Seed and randomness
            as in :func:`gibbs_ext.bipartite_gibbs`; uniform starts take one sweep number more.
        """
        name = "BipartiteBoltzmann.sample"
        left, beta = self._start(name, sample_shape, initial, num_sweeps)
        with reported_as(name, left="initial"):
            sides = bipartite_gibbs(
                left, self.left_bias, self.right_bias, self.weight, len(beta), beta=_or_one(beta),
                generator=generator, seed=seed,
            )  # fmt: skip
        return torch.cat(sides, -1)

    def rsample(
        self,
        sample_shape: Sequence[int] = (),
        num_sweeps: int = 100,
        num_relaxed_sweeps: int = 1,
        *,
        relaxation: str = "pwl",
        sharpness: float = 4.0,
        slope_gradient: bool = True,
        initial: Tensor | None = None,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """Binary sweeps, then relaxed ones through which gradient flows.

        The values lie in [0, 1] and are those of a relaxation, not of the distribution: the gradient of E[f] that they
        give is biased by it. Arguments as in :meth:`sample` and :func:`gibbs_ext.bipartite_gibbs_relaxed`.

        Returns:
            [*sample_shape, *batch_shape, n1 + n2], differentiable in the parameters.
        """
        name = "BipartiteBoltzmann.rsample"
        left, beta = self._start(name, sample_shape, initial, num_sweeps)
        check_integers(name, 1, num_relaxed_sweeps=num_relaxed_sweeps)
        with reported_as(name, left="initial"):
            left, right, _ = bipartite_gibbs_relaxed(
                left, self.left_bias, self.right_bias, self.weight, len(beta), num_relaxed_sweeps,
                relaxation=relaxation, sharpness=sharpness, slope_gradient=slope_gradient,
                beta=torch.cat([beta, beta.new_ones(num_relaxed_sweeps)]), generator=generator, seed=seed,
            )  # fmt: skip
        return torch.cat((left, right), -1)

    # Probabilities --------------------------------------------------------------------------------------------

    def log_partition(
        self,
        method: str = "ais",
        *,
        num_chains: int = 1000,
        betas: int | Sequence[float] | Tensor = 1000,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """``log Z``.

        Args:
            method: ``"exact"`` enumerates the smaller side (up to 25 units); ``"ais"`` estimates by annealed importance
                sampling from the factorial model of the same biases; its error is
                :func:`gibbs_ext.annealed_importance_sampling`'s to tell.
            num_chains: Of AIS.
            betas: Of AIS: the number of steps, or the schedule.
            generator: Supplies the seed of AIS.
            seed: A 64-bit integer, instead of a generator.

        Returns:
            [*batch_shape] float64. Differentiable in the parameters: exactly, or through the weighted samples of AIS
            (``d log Z = - E_p[d energy]``).
        """
        from gibbs_ext import estimators  # which imports this module

        name = "BipartiteBoltzmann.log_partition"
        if method == "exact":
            with reported_as(name):
                return estimators.exact_log_partition(self)
        if method != "ais":
            raise ValueError(f"{name}: method must be 'exact' or 'ais', got {shown(method)}")
        with reported_as(name):
            result = estimators.annealed_importance_sampling(
                self, num_chains, betas, base="bias", generator=generator, seed=seed
            )
        negative_energy = -self.energy(result.samples)
        zero = (result.log_weights.softmax(0) * (negative_energy - negative_energy.detach())).sum(0)
        return result.log_partition + zero

    def log_prob(self, z: Tensor, log_partition: Tensor | None = None) -> Tensor:
        """``-energy(z) - log Z``.

        Args:
            z: [..., n1 + n2] bits of the parameters' dtype.
            log_partition: log Z, when known; else it is enumerated, which needs a side of at most 25 units.

        Returns:
            [...] float64. Differentiable in the parameters.

        Raises:
            ValueError: z is no bits (when validating), or log Z is not given and the model too large to enumerate.
        """
        if self._validate_args:
            self._validate_sample(z)
        if log_partition is None:
            if min(self.num_left, self.num_right) > ENUMERABLE_UNITS:
                raise ValueError(
                    f"BipartiteBoltzmann.log_prob: a model of {self.num_left} + {self.num_right} units is too large to "
                    "enumerate; give log_partition, for instance log_partition=model.log_partition('ais')"
                )
            log_partition = self.log_partition("exact")
        return -self.energy(z) - log_partition


def check_model(name: str, model: object) -> None:
    if not isinstance(model, BipartiteBoltzmann):
        raise TypeError(f"{name}: model must be a BipartiteBoltzmann, got {type(model).__name__}")


def _or_one(beta: Tensor) -> Tensor:
    """An empty schedule, of 0 sweeps, is no valid beta."""
    return beta if len(beta) else beta.new_ones(1)
