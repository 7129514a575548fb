# SPDX-License-Identifier: Apache-2.0
"""Boltzmann machines as torch.distributions."""

import contextlib
import copy
import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, TypeVar, cast, overload

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.nn.functional import softplus

from gibbs_ext import ops
from gibbs_ext.arguments import check_graph
from gibbs_ext.checks import check_integers, check_units, expand_to, is_mapped, reported_as, shown
from gibbs_ext.functional import (
    bipartite_ais,
    bipartite_gibbs,
    bipartite_gibbs_relaxed,
    graph_ais,
    graph_fields,
    graph_gibbs,
    graph_gibbs_relaxed,
)
from gibbs_ext.graphs import ColoredGraph

ENUMERABLE_UNITS = 25

_Model = TypeVar("_Model", bound="_Boltzmann")


def coupling_resolution(model: "BipartiteBoltzmann | GraphBoltzmann | Tensor") -> Tensor:
    """The step 2^-k to which the couplings of each model are rounded in binary sweeps.

    Args:
        model: A model, or the weight [..., n1, n2] of a bipartite one.

    Returns:
        [...] float64. The field of a unit, before beta, is off by at most half of this per neighbour that is 1.
    """
    if isinstance(model, GraphBoltzmann):
        return ops.graph_coupling_resolution(model.coupling.detach(), model.graph.layout_on(model.device))
    if not isinstance(model, Tensor):
        check_model("coupling_resolution", model)
        model = model.weight
    return ops.coupling_resolution(model.detach())


# Asked beforehand, because torch.compile cannot trace the question in PyTorch 2.10.
_HAVE_AUTOCAST = [kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind)]


def outside_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What is computed inside keeps the dtypes of its operands."""
    kind = device.type
    if kind not in _HAVE_AUTOCAST or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def _with_all_digits(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Energies are large numbers of which differences count: half precision is too coarse for them."""

    @functools.wraps(method)
    def outside(self: "_Boltzmann", *args: Tensor) -> Tensor:
        with outside_autocast(self.device):
            return method(self, *args)

    return outside


class _Boltzmann(Distribution):
    """What the models have in common; a subclass knows its parameters, energies and sweeps."""

    # The parameters and how many dims each has of its own. The last are the couplings, whose dtype all share.
    _dims: ClassVar[dict[str, int]]
    support = constraints.independent(constraints.boolean, 1)
    has_rsample = True

    def __init__(self, num_units: int, validate_args: bool | None) -> None:
        """Once the parameters are set, and known to fit but for dtypes and batch dims."""
        name = type(self).__name__
        parameters = {argument: getattr(self, argument) for argument in self._dims}
        *_, last = parameters
        for argument, tensor in parameters.items():
            if tensor.dtype != self.dtype:
                wanted = f"{argument} must have the dtype of {last}, {self.dtype}"
                raise ValueError(f"{name}: {wanted}, got {tensor.dtype}")
        try:
            batch_shape = self._broadcast_batch()
        except RuntimeError as error:
            shapes = ", ".join(f"{argument} {list(tensor.shape)}" for argument, tensor in parameters.items())
            raise ValueError(f"{name}: batch dims do not broadcast: {shapes}") from error
        # PyTorch's own checks trip over no values, and inside torch.vmap there are none to read.
        if not batch_shape.numel() or any(is_mapped(tensor) for tensor in parameters.values()):
            validate_args = False
        super().__init__(batch_shape, torch.Size([num_units]), validate_args=validate_args)

    def _check_floating(self, **parameters: object) -> None:
        name = type(self).__name__
        for argument, tensor in parameters.items():
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"{name}: {argument} must be a floating-point tensor, got {got}")
            dim = self._dims[argument]
            if tensor.dim() < dim:
                raise ValueError(f"{name}: {argument} needs {dim} or more dims, got shape {list(tensor.shape)}")

    def _broadcast_batch(self) -> torch.Size:
        shapes = (getattr(self, argument).shape[:-dim] for argument, dim in self._dims.items())
        batch_shape: torch.Size = torch.broadcast_shapes(*shapes)
        return batch_shape

    def _mapped(self: _Model, function: Callable[[Tensor, int], Tensor]) -> _Model:
        """A model of ``function(parameter, its own dims)``: values that have been validated, or need not be."""
        new = copy.copy(self)
        for argument, dim in self._dims.items():
            setattr(new, argument, function(getattr(self, argument), dim))
        new._batch_shape = new._broadcast_batch()
        return new

    def expand(self: _Model, batch_shape: Sequence[int], _instance: Any = None) -> _Model:
        """The same models under a larger batch shape, without a copy."""
        return self._mapped(lambda tensor, dim: tensor.expand(*batch_shape, *(-1,) * dim))

    def detach(self: _Model) -> _Model:
        """The same model, its parameters cut from the graph."""
        return self._mapped(lambda tensor, _: tensor.detach())

    @property
    def num_units(self) -> int:
        return self.event_shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self._last.dtype

    @property
    def device(self) -> torch.device:
        return self._last.device

    def _computed(self, tensor: Tensor) -> Tensor:
        """In the dtype that energies are computed in: the parameters', float32 for half types."""
        return tensor.to(ops.computed_dtype(self._last))

    @property
    def _biases(self) -> list[Tensor]:
        *biases, _ = self._dims
        return [getattr(self, argument) for argument in biases]

    def _fields_at_half(self) -> list[Tensor]:
        """The fields of units whose neighbours all have the value 1/2: of the model over spins, the fields alone."""
        raise NotImplementedError

    @property
    def _last(self) -> Tensor:
        *_, last = self._dims
        couplings: Tensor = getattr(self, last)
        return couplings

    @property
    def _num_state_units(self) -> int:
        """The first so many units are a chain's state: all that the next sweep depends on."""
        raise NotImplementedError

    def energy(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def _sweep(self, state: Tensor, num_sweeps: int, **options: Any) -> tuple[Tensor, ...]:
        """z after binary sweeps, in parts of which the first is the chain's next state."""
        raise NotImplementedError

    def _sweep_relaxed(
        self, state: Tensor, num_sweeps: int, num_relaxed_sweeps: int, **options: Any
    ) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _anneal(self, state: Tensor, bases: list[Tensor], betas: Tensor, **options: Any) -> tuple[Tensor, ...]:
        """The parts of z at the end of an AIS path from the model of biases ``bases``, then the log-weights."""
        raise NotImplementedError

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """z of its parts; autocast knows no bits, and refuses some dtypes."""
        with outside_autocast(self.device):
            return torch.cat(tuple(parts), -1)

    def _draw_independent(self, biases: list[Tensor], shape: Sequence[int], **options: Any) -> Tensor:
        """States of independent units of these biases: one sweep without couplings."""
        uncoupled = self._mapped(lambda tensor, dim: tensor.new_zeros(()).expand(tensor.shape[-dim:]))
        for argument, bias in zip(self._dims, biases, strict=False):
            setattr(uncoupled, argument, bias)
        return uncoupled._sweep(self._last.new_zeros(()).expand(shape), 1, **options)[0]

    # Samples --------------------------------------------------------------------------------------------------

    def _start(
        self, name: str, sample_shape: Sequence[int], initial: Tensor | None, num_sweeps: int
    ) -> tuple[Tensor, Tensor]:
        """Starting states and the schedule of beta.

        Without ``initial``, a first sweep at beta = 0 makes the uniform bits, so that they too depend on nothing but
        seed and chain.
        """
        check_integers(name, 0, num_sweeps=num_sweeps)
        wanted = f"sample_shape must be a sequence of non-negative integers, got {shown(sample_shape)}"
        sizes: Any = sample_shape if isinstance(sample_shape, Sequence) else [None]
        if any(isinstance(n, bool) or not isinstance(n, (int, torch.SymInt, numbers.Integral)) for n in sizes):
            raise TypeError(f"{name}: {wanted}")
        if any(n < 0 for n in sizes):
            raise ValueError(f"{name}: {wanted}")
        shape = (*sample_shape, *self.batch_shape, self._num_state_units)
        if initial is not None:
            initial = expand_to(name, "initial", initial, shape)
            return initial.to(self.dtype), torch.ones(num_sweeps, dtype=torch.float64, device=self.device)
        beta = (torch.arange(1 + num_sweeps, device=self.device) > 0).double()
        return self._last.new_zeros(()).expand(shape), beta

    def sample(
        self,
        sample_shape: Sequence[int] = (),
        num_sweeps: int = 100,
        *,
        initial: Tensor | None = None,
        chain_offset: int | Tensor = 0,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """Independent chains of ``num_sweeps`` binary Gibbs sweeps.

        Args:
            sample_shape: Chains per model.
            num_sweeps: At least 0. How many are enough depends on the model; compare two lengths.
            initial: States to start from: left [..., n1] of a bipartite model, z [..., N] of a graph. Uniform bits when
                not given.
            chain_offset: Number of the first chain, or numbers of all, as in :func:`gibbs_ext.bipartite_gibbs`.
            generator: Supplies the seed.
            seed: A 64-bit integer, instead of a generator.

        Returns:
            [*sample_shape, *batch_shape, num_units] bits of the parameters' dtype, without gradient. Seed and
            randomness as in :func:`gibbs_ext.bipartite_gibbs`; uniform starts take one sweep number more.
        """
        name = f"{type(self).__name__}.sample"
        state, beta = self._start(name, sample_shape, initial, num_sweeps)
        with reported_as(name, left="initial", state="initial"):
            parts = self._sweep(
                state, len(beta), beta=_or_one(beta), chain_offset=chain_offset, generator=generator, seed=seed
            )
        return self._joined(parts)

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
        chain_offset: int | Tensor = 0,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """Binary sweeps, then relaxed ones through which gradient flows.

        The values lie in [0, 1] and are those of a relaxation, not of the distribution: the gradient of E[f] that they
        give is biased by it. Arguments as in :meth:`sample` and :func:`gibbs_ext.bipartite_gibbs_relaxed`.

        Returns:
            [*sample_shape, *batch_shape, num_units], differentiable in the parameters.
        """
        name = f"{type(self).__name__}.rsample"
        state, beta = self._start(name, sample_shape, initial, num_sweeps)
        check_integers(name, 1, num_relaxed_sweeps=num_relaxed_sweeps)
        with reported_as(name, left="initial", state="initial"):
            parts = self._sweep_relaxed(
                state, len(beta), num_relaxed_sweeps, relaxation=relaxation, sharpness=sharpness,
                slope_gradient=slope_gradient, beta=torch.cat([beta, beta.new_ones(num_relaxed_sweeps)]),
                chain_offset=chain_offset, generator=generator, seed=seed,
            )  # fmt: skip
        return self._joined(parts)

    # Probabilities --------------------------------------------------------------------------------------------

    @overload
    def log_partition(
        self,
        method: str = ...,
        *,
        num_chains: int = ...,
        betas: int | Sequence[float] | Tensor = ...,
        base: str | tuple[Tensor, Tensor] | Tensor | None = ...,
        generator: torch.Generator | None = ...,
        seed: int | Tensor | None = ...,
        return_error: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def log_partition(
        self,
        method: str = ...,
        *,
        num_chains: int = ...,
        betas: int | Sequence[float] | Tensor = ...,
        base: str | tuple[Tensor, Tensor] | Tensor | None = ...,
        generator: torch.Generator | None = ...,
        seed: int | Tensor | None = ...,
        return_error: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def log_partition(
        self,
        method: str = "ais",
        *,
        num_chains: int = 1000,
        betas: int | Sequence[float] | Tensor = 1000,
        base: str | tuple[Tensor, Tensor] | Tensor | None = "field",
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        return_error: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``log Z``.

        Args:
            method: ``"exact"`` is :func:`gibbs_ext.exact_log_partition`, for a bipartite model with a side of up to 25
                units or a graph of small width; ``"ais"`` estimates by :func:`gibbs_ext.annealed_importance_sampling`,
                whose result also holds the effective sample size.
            num_chains: Of AIS.
            betas: Of AIS: the number of steps, or the schedule.
            base: Of AIS: the start.
            generator: Supplies the seed of AIS.
            seed: A 64-bit integer, instead of a generator.
            return_error: Whether to return the standard error, too.

        Returns:
            [*batch_shape] float64. Differentiable in the parameters: exactly (of a graph once), or through the weighted
            samples of AIS any number of times (``d log Z = - E_p[d energy]``).

            With ``return_error`` a pair: that, and its standard error [*batch_shape] float64, without gradient. The
            error is 0 where log Z is exact. That of AIS is as in :class:`gibbs_ext.AISResult`, nan with one chain, and
            too small where the chains miss a part of the states.
        """
        from gibbs_ext import estimators, exact  # which import this module

        name = f"{type(self).__name__}.log_partition"
        model: Any = self
        if method == "exact":
            with reported_as(name):
                log_partition = exact.exact_log_partition(model)
            return (log_partition, torch.zeros_like(log_partition)) if return_error else log_partition
        if method != "ais":
            raise ValueError(f"{name}: method must be 'exact' or 'ais', got {shown(method)}")
        with reported_as(name):
            result = estimators.annealed_importance_sampling(
                model, num_chains, betas, base=base, generator=generator, seed=seed
            )
        negative_energy = -self.energy(result.samples).double()
        # 0, and the same function of the parameters as the logarithm of the mean of exp(-energy) / exp(-energy now).
        change = (result.log_weights + negative_energy - negative_energy.detach()).logsumexp(0)
        log_partition = result.log_partition + (change - change.detach())
        return (log_partition, result.standard_error) if return_error else log_partition

    def log_prob(self, z: Tensor, log_partition: Tensor | None = None) -> Tensor:
        """``-energy(z) - log Z``.

        Args:
            z: [..., num_units] bits, of any dtype: converted to the parameters'.
            log_partition: log Z, when known; else it is computed, as by :func:`gibbs_ext.exact_log_partition`: up to 25
                units on a bipartite model's smaller side, or a Chimera graph of up to 6 cells across; one of up to
                5 x 11 cells where its gradient is needed.

        Returns:
            [...] float64. Differentiable in the parameters.

        Raises:
            ValueError: z is no bits (when validating), or log Z is not given and the model too large to compute it.
        """
        if self._validate_args and not is_mapped(z):
            self._validate_sample(z)
        if log_partition is None:
            with reported_as(f"{type(self).__name__}.log_prob"):
                log_partition = self.log_partition("exact")
        return -self.energy(z).double() - log_partition

    # Exact answers --------------------------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        """``P(z_i = 1)``, exact: what :func:`gibbs_ext.exact_marginals` has, computed anew at each access.

        The cost is that of 2^n states for each model of the batch, n being the units of the smaller side or the width
        of the graph: with n = 20 that is about a second a model.

        Returns:
            [*batch_shape, num_units] float64. Not differentiable: its backward pass is an error.

        Raises:
            ValueError: The model is too large (take the mean of samples), or a parameter is not finite.
        """
        return self._exact("mean", lambda _, single, pair: single)

    @property
    def variance(self) -> Tensor:
        """``mean (1 - mean)`` of each unit; as :attr:`mean` in all else."""
        return self._exact("variance", lambda _, single, pair: single * (1 - single))

    def entropy(self) -> Tensor:
        """``- sum_z p(z) log p(z) = log Z + E[energy]`` in nats, exact, at the cost of :attr:`mean`.

        Returns:
            [*batch_shape] float64. Not differentiable: its backward pass is an error.

        Raises:
            ValueError: The model is too large (``log_partition("ais")`` plus the mean energy of samples is an
                estimate), or a parameter is not finite.
        """
        own = tuple(range(-self._dims[[*self._dims][-1]], 0))

        def of(log_partition: Tensor, single: Tensor, pair: Tensor) -> Tensor:
            bias = torch.cat([bias.double().expand(*self.batch_shape, -1) for bias in self._biases], -1)
            energy = -(bias * single).sum(-1) - (self._last.double() * pair).sum(own)
            return (log_partition + energy).clamp(min=0)  # which rounding may have passed

        return self._exact("entropy", of)

    def _exact(self, method: str, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """``function`` of log Z and the two marginals, for the method of that name."""
        from gibbs_ext import exact  # which imports this module

        name, model = f"{type(self).__name__}.{method}", cast(Any, self)
        with torch.no_grad():
            log_partition, marginals = exact.log_partition_and_marginals(name, model)
            value = function(log_partition, *marginals)
        return exact.without_derivative(name, value, model)


class BipartiteBoltzmann(_Boltzmann):
    """Bits z = (left, right) with couplings between the two sides only: a restricted Boltzmann machine.

    ``energy(z) = - left_bias . left - right_bias . right - left^T weight right`` and ``p(z) = exp(-energy(z)) / Z``.

    Sampling is block Gibbs: exact only in the limit of many sweeps, and slow to mix where p has well-separated modes
    (large couplings of one sign).

    Args:
        left_bias: [..., n1], floating.
        right_bias: [..., n2].
        weight: [..., n1, n2]. Batch dims of the three broadcast to ``batch_shape``; nothing is materialised.
        validate_args: As of every distribution: whether to check values here and in :meth:`log_prob`. Inside torch.vmap
            values cannot be read, and nothing is checked.

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
        n1, n2 = weight.shape[-2:]
        for argument, bias, n in (("left_bias", left_bias, n1), ("right_bias", right_bias, n2)):
            if bias.shape[-1] != n:
                raise ValueError(
                    f"{type(self).__name__}: {argument} must have shape [..., {n}] to fit weight "
                    f"{list(weight.shape)}, got {list(bias.shape)}"
                )
        self.left_bias, self.right_bias, self.weight = left_bias, right_bias, weight
        super().__init__(n1 + n2, validate_args)

    @property
    def num_left(self) -> int:
        return self.weight.shape[-2]

    @property
    def num_right(self) -> int:
        return self.weight.shape[-1]

    @property
    def _num_state_units(self) -> int:
        return self.num_left

    def _fields_at_half(self) -> list[Tensor]:
        with outside_autocast(self.device):
            sums = (self._computed(self.weight).sum(dim) for dim in (-1, -2))
            return [(bias + s / 2).to(self.dtype) for bias, s in zip(self._biases, sums, strict=True)]

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z [..., n1 + n2] as views left [..., n1] and right [..., n2]."""
        check_units("BipartiteBoltzmann", "z", z, self.num_left + self.num_right)
        left, right = z.split((self.num_left, self.num_right), dim=-1)
        return left, right

    @_with_all_digits
    def fields_of_right(self, left: Tensor) -> Tensor:
        """``right_bias + left^T weight``: logits of right given left [..., n1], as [..., n2]. Differentiable.

        Computed and returned in the parameters' dtype, half types in float32, whatever autocast says.
        """
        check_units("BipartiteBoltzmann", "left", left, self.num_left)
        # einsum, unlike matmul, never materialises a weight that broadcasts over the state's dims.
        products = torch.einsum("...i,...ij->...j", self._computed(left), self._computed(self.weight))
        return products + self.right_bias

    @_with_all_digits
    def energy_of(self, left: Tensor, right: Tensor) -> Tensor:
        """:meth:`energy` of the two sides given apart: left [..., n1], right [..., n2], in [0, 1] (relaxed or not)."""
        fields = self.fields_of_right(left)
        check_units("BipartiteBoltzmann", "right", right, self.num_right)
        on_left = torch.einsum("...i,...i->...", self._computed(left), self._computed(self.left_bias))
        return -on_left - torch.einsum("...j,...j->...", fields, self._computed(right))

    def energy(self, z: Tensor) -> Tensor:
        """``- left_bias . left - right_bias . right - left^T weight right``.

        Args:
            z: [..., n1 + n2] bits or relaxed values of any dtype; batch dims broadcast against the model's.

        Returns:
            [...] energies, computed in the parameters' dtype, half types in float32, whatever autocast says.
            Differentiable in z and the parameters.
        """
        return self.energy_of(*self.split(z))

    @_with_all_digits
    def free_energy(self, left: Tensor) -> Tensor:
        """``- log sum_right exp(-energy(left, right))``: right summed out exactly.

        Args:
            left: [..., n1], of any dtype.

        Returns:
            [...], of the dtype of :meth:`energy`. Differentiable in left and the parameters.
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

    def _sweep(self, state: Tensor, num_sweeps: int, **options: Any) -> tuple[Tensor, ...]:
        return bipartite_gibbs(state, self.left_bias, self.right_bias, self.weight, num_sweeps, **options)

    def _sweep_relaxed(
        self, state: Tensor, num_sweeps: int, num_relaxed_sweeps: int, **options: Any
    ) -> tuple[Tensor, ...]:
        left, right, _ = bipartite_gibbs_relaxed(
            state, self.left_bias, self.right_bias, self.weight, num_sweeps, num_relaxed_sweeps, **options
        )
        return left, right

    def _anneal(self, state: Tensor, bases: list[Tensor], betas: Tensor, **options: Any) -> tuple[Tensor, ...]:
        left_base, right_base = bases
        return bipartite_ais(
            state, self.left_bias, self.right_bias, self.weight, left_base, right_base, betas, **options
        )


class GraphBoltzmann(_Boltzmann):
    """Bits z of a coloured graph's nodes, coupled along its edges.

    ``energy(z) = - sum_i bias_i z_i - sum_e coupling_e z_u z_v``, e = (u, v), and ``p(z) = exp(-energy(z)) / Z``.

    Sampling is block Gibbs, colour by colour: exact only in the limit of many sweeps, and slow to mix where p has
    well-separated modes, as spin glasses at low temperature do.

    Args:
        graph: Of N nodes and E edges.
        bias: [..., N], floating.
        coupling: [..., E], in the order of ``graph.edges``. Batch dims broadcast to ``batch_shape``; nothing is
            materialised.
        validate_args: As of every distribution: whether to check values here and in :meth:`log_prob`. Inside torch.vmap
            values cannot be read, and nothing is checked.

    Raises:
        TypeError: No graph.
        ValueError: Shapes or dtypes do not fit together, or (when validating) a value is not finite.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "bias": constraints.real_vector,
        "coupling": constraints.real_vector,
    }
    _dims: ClassVar[dict[str, int]] = {"bias": 1, "coupling": 1}

    def __init__(self, graph: ColoredGraph, bias: Tensor, coupling: Tensor, validate_args: bool | None = None) -> None:
        name = type(self).__name__
        check_graph(name, graph)
        self._check_floating(bias=bias, coupling=coupling)
        sizes = (("bias", bias, graph.num_nodes, "nodes"), ("coupling", coupling, len(graph.edges), "edges"))
        for argument, tensor, n, what in sizes:
            if tensor.shape[-1] != n:
                raise ValueError(
                    f"{name}: {argument} must have shape [..., {n}] to fit the graph's {what}, got {list(tensor.shape)}"
                )
        self.graph, self.bias, self.coupling = graph, bias, coupling
        super().__init__(graph.num_nodes, validate_args)

    @property
    def _num_state_units(self) -> int:
        return self.num_units

    def _fields_at_half(self) -> list[Tensor]:
        halves = self.bias.new_full((), 0.5).expand(self.num_units)
        return [self.fields(halves).to(self.dtype)]

    def fields(self, z: Tensor) -> Tensor:
        """``bias_i + sum of the couplings to neighbours, times their values``: logits of each unit given the others.

        Args:
            z: [..., N] bits or relaxed values of any dtype; batch dims broadcast against the model's.

        Returns:
            [..., N], of the parameters' dtype, float32 for half types. Differentiable in z and the parameters.
        """
        check_units("GraphBoltzmann", "z", z, self.num_units)
        return graph_fields(z, self.bias, self.coupling, self.graph)

    @_with_all_digits
    def energy(self, z: Tensor) -> Tensor:
        """``- sum_i bias_i z_i - sum_e coupling_e z_u z_v``.

        Args:
            z: [..., N] bits or relaxed values of any dtype; batch dims broadcast against the model's.

        Returns:
            [...] energies, computed in the parameters' dtype, half types in float32, whatever autocast says.
            Differentiable in z and the parameters.
        """
        check_units("GraphBoltzmann", "z", z, self.num_units)
        z = self._computed(z)
        return self._energy(z, self.fields(z))

    @_with_all_digits
    def free_energy(self, z: Tensor) -> Tensor:
        """``- log sum_(units of colour 0) exp(-energy(z))``: colour 0 summed out exactly, given the rest of z.

        Args:
            z: [..., N], of any dtype. Values of colour 0 do not matter.

        Returns:
            [...], of the dtype of :meth:`energy`. Differentiable in the rest of z and the parameters.
        """
        check_units("GraphBoltzmann", "z", z, self.num_units)
        first = self.graph.units_of_color(0, z.device)
        rest = self._computed(z).index_fill(-1, first, 0)
        fields = self.fields(rest)
        return self._energy(rest, fields) - softplus(fields.index_select(-1, first)).sum(-1)

    def _energy(self, z: Tensor, fields: Tensor) -> Tensor:
        """Half of it, since fields count each coupling at both its ends."""
        return -torch.einsum("...i,...i->...", z, self.bias + fields) / 2

    def _sweep(self, state: Tensor, num_sweeps: int, **options: Any) -> tuple[Tensor, ...]:
        return (graph_gibbs(state, self.bias, self.coupling, self.graph, num_sweeps, **options),)

    def _sweep_relaxed(
        self, state: Tensor, num_sweeps: int, num_relaxed_sweeps: int, **options: Any
    ) -> tuple[Tensor, ...]:
        z, _ = graph_gibbs_relaxed(
            state, self.bias, self.coupling, self.graph, num_sweeps, num_relaxed_sweeps, **options
        )
        return (z,)

    def _anneal(self, state: Tensor, bases: list[Tensor], betas: Tensor, **options: Any) -> tuple[Tensor, ...]:
        (base,) = bases
        return graph_ais(state, self.bias, self.coupling, self.graph, base, betas, **options)


def check_model(name: str, model: object, *kinds: type) -> None:
    """``kinds``: which models will do, all when none is given."""
    kinds = kinds or (BipartiteBoltzmann, GraphBoltzmann)
    if not isinstance(model, kinds):
        wanted = " or a ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{name}: model must be a {wanted}, got {type(model).__name__}")


def _or_one(beta: Tensor) -> Tensor:
    """An empty schedule, of 0 sweeps, is no valid beta."""
    return beta if len(beta) else beta.new_ones(1)
