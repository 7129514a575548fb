# SPDX-License-Identifier: Apache-2.0
"""The base class of all models: validation, samples, probabilities and exact answers."""

import contextlib
import copy
import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.nn.functional import softplus

from gibbs_ext import ops
from gibbs_ext.checks import (
    check_integers,
    check_tensors,
    check_units,
    check_values,
    expand_to,
    is_mapped,
    reported_as,
    shown,
)
from gibbs_ext.log_partition.annealing import Base, Betas, annealed_importance_sampling
from gibbs_ext.log_partition.exact import exact_log_partition, log_partition_and_marginals, without_derivative
from gibbs_ext.log_partition.machine import Machine, broadcast_batch, check_model

_Model = TypeVar("_Model", bound="Boltzmann")


def coupling_resolution(model: "Boltzmann | Tensor") -> Tensor:
    """The step 2^-k to which the couplings of each model are rounded in binary sweeps.

    Args:
        model: A model, or the weight [..., n1, n2] of a bipartite one.

    Returns:
        [...] float64. The field of a unit, before beta, is off by at most half of this per neighbour that is 1.

    Raises:
        TypeError: ``model`` is neither a model nor a tensor.
        ValueError: The weight has a wrong dtype or shape; or a coupling is not finite or is 2^127 or more in magnitude.

        The messages begin with ``coupling_resolution:``, or ``graph_coupling_resolution:`` on the couplings of a graph.
    """
    if isinstance(model, Tensor):
        return ops.coupling_resolution(model.detach())
    check_model("coupling_resolution", model)
    return model._coupling_resolution()


# This is asked beforehand, because torch.compile cannot trace the question in PyTorch 2.10.
_HAVE_AUTOCAST = [kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind)]


def outside_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which results keep the dtypes of their operands, whatever autocast says."""
    kind = device.type
    if kind not in _HAVE_AUTOCAST or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def with_all_digits(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The method outside autocast: half types are too coarse for energies, large numbers whose differences count."""

    @functools.wraps(method)
    def outside(self: "Boltzmann", *args: Tensor) -> Tensor:
        with outside_autocast(self.device):
            return method(self, *args)

    return outside


class Conditional(NamedTuple):
    """The result of :meth:`Boltzmann.conditioned`: a model over n free units given the N - n others.

    M stands for the broadcast of the model's batch shape and the batch dims of the given values. For each state z that
    has the given values, ``energy(z)`` of the whole model is ``self.energy + self.model.energy(z[..., self.free])``. So
    ``self.model.log_partition() - self.energy`` is the logarithm of the sum of ``exp(-energy(z))`` over these states.
    """

    model: "Boltzmann"  # batch shape [M], over the free units; one of its samples is completed by `complete`
    energy: Tensor  # [M]: the energy of the given units among themselves
    given: Tensor  # [..., N], broadcasts to [M, N]: the given values, and 0 at the free units
    free: Tensor  # [n] int64: the numbers of the free units, ascending

    def complete(self, z: Tensor) -> Tensor:
        """The states of all units.

        Args:
            z: [..., n] states of the free units, of any dtype; batch dims broadcast against [M].

        Returns:
            [..., N] of the parameters' dtype: z at the free units, and the given values at the others. Differentiable
            in z and the given values.

        Raises:
            TypeError, ValueError: z is no tensor, its last dim is not n, or batch dims do not broadcast. The message
                begins with ``Conditional.complete:``.
        """
        name = "Conditional.complete"
        check_units(name, "z", z, len(self.free))
        try:
            batch = torch.broadcast_shapes(z.shape[:-1], self.given.shape[:-1])
        except RuntimeError as error:
            wanted = f"z must have batch dims that broadcast against {list(self.given.shape[:-1])}"
            raise ValueError(f"{name}: {wanted}, got {list(z.shape[:-1])}") from error
        values = z.to(self.given.dtype).expand(*batch, -1)
        return self.given.expand(*batch, -1).index_copy(-1, self.free, values)


class Boltzmann(Distribution, Machine):
    """A model over bits z [..., N] with ``p(z) = exp(-energy(z)) / Z``.

    Each model answers in z: the parts of a bipartite one are joined, left before right. A subclass has the parameters,
    energies and sweeps of its kind; what depends on nothing else is here.
    """

    # The parameters, each with the number of its own dims: the biases of the parts of z, then the couplings, whose
    # dtype all parameters share.
    _dims: ClassVar[dict[str, int]]
    support = constraints.independent(constraints.boolean, 1)
    has_rsample = True

    def __init__(self, num_units: int, validate_args: bool | None) -> None:
        """Called when the parameters are set, and known to fit but for dtypes and batch dims."""
        name = type(self).__name__
        parameters = dict(zip(self._dims, self._parameters, strict=True))
        *_, last = parameters
        for argument, tensor in parameters.items():
            if tensor.dtype != self.dtype:
                wanted = f"{argument} must have the dtype of {last}, {self.dtype}"
                raise ValueError(f"{name}: {wanted}, got {tensor.dtype}")
        try:
            batch_shape = broadcast_batch(self._parameters, self._dims.values())
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

    def _check_units(self, argument: str, num_units: int, fits: str) -> None:
        """Refuses a parameter whose last dim is not ``num_units``, the number that ``fits`` something else."""
        shape = getattr(self, argument).shape
        if shape[-1] != num_units:
            wanted = f"{argument} must have shape [..., {num_units}] to fit {fits}"
            raise ValueError(f"{type(self).__name__}: {wanted}, got {list(shape)}")

    def _of(self: _Model, parameters: Sequence[Tensor]) -> _Model:
        """The model of other parameters, whose values are not validated."""
        new = copy.copy(self)
        for argument, tensor in zip(self._dims, parameters, strict=True):
            setattr(new, argument, tensor)
        new._batch_shape = broadcast_batch(new._parameters, new._dims.values())
        return new

    def _mapped(self: _Model, function: Callable[[Tensor, int], Tensor]) -> _Model:
        """The model of ``function(parameter, number of its own dims)``, whose values are not validated again."""
        return self._of([function(getattr(self, argument), dim) for argument, dim in self._dims.items()])

    def _with(self: _Model, biases: Tensor, couplings: Tensor) -> _Model:
        """The model of other biases, joined as in z [..., N], and couplings, whose values are not validated."""
        return self._of([*biases.split([bias.shape[-1] for bias in self._biases], dim=-1), couplings])

    def expand(self: _Model, batch_shape: Sequence[int], _instance: Any = None) -> _Model:
        """The same models under the larger ``batch_shape``; the parameters are views."""
        return self._mapped(lambda tensor, dim: tensor.expand(*batch_shape, *(-1,) * dim))

    def detach(self: _Model) -> _Model:
        """The same model, whose parameters carry no gradient."""
        return self._mapped(lambda tensor, _: tensor.detach())

    @property
    def num_units(self) -> int:
        return self.event_shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self._couplings.dtype

    @property
    def device(self) -> torch.device:
        return self._couplings.device

    @property
    def _parameters(self) -> list[Tensor]:
        return [getattr(self, argument) for argument in self._dims]

    @property
    def _biases(self) -> list[Tensor]:
        return self._parameters[:-1]

    @property
    def _couplings(self) -> Tensor:
        return self._parameters[-1]

    def _computed(self, tensor: Tensor) -> Tensor:
        """In the dtype that energies are computed in: the parameters', float32 for half types."""
        return tensor.to(ops.computed_dtype(self._couplings))

    # Methods that a subclass defines, beside the members of Machine that are missing here ---------------------

    def _edges(self) -> Tensor:
        """The pairs of units [E, 2] that the couplings, in their order, couple."""
        raise NotImplementedError

    def _coupling_resolution(self) -> Tensor:
        raise NotImplementedError

    def energy(self, z: Tensor) -> Tensor:
        """The energy, whose formula the class states.

        Args:
            z: [..., N] bits or relaxed values of any dtype; batch dims broadcast against the model's.

        Returns:
            [...] energies, computed in the parameters' dtype, half types in float32, whatever autocast says.
            Differentiable in z and the parameters.

        Raises:
            TypeError: z is no tensor. The message begins with the class' name.
            ValueError: The last dim of z is not N (the message begins with the class' name); or, on a graph, batch dims
                do not broadcast (it begins with ``graph_fields:``).
            RuntimeError: Batch dims do not broadcast, on a bipartite model. The message is PyTorch's.
        """
        raise NotImplementedError

    def free_energy(self, state: Tensor, /) -> Tensor:
        """``- log sum exp(-energy)`` over the units that a sweep updates first, given the others.

        Args:
            state: A chain's state [..., n], the first units of z, of any dtype.

        Returns:
            [...], of the dtype of :meth:`energy`. Differentiable in the state and the parameters.

        Raises:
            TypeError, ValueError, RuntimeError: The state does not fit, as z in :meth:`energy`.
        """
        raise NotImplementedError

    def _sweep(self, state: Tensor, num_sweeps: int, **options: Any) -> Tensor:
        """z [..., N] after binary sweeps from a chain's state."""
        raise NotImplementedError

    def _fields_of(self, z: Tensor) -> Tensor:
        """``- d energy / d z`` [..., N]: the logit of each unit given the others."""
        raise NotImplementedError

    def _clamped(self, state: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The chain's state with the values [..., N] of a mask, and options of :meth:`_sweep` that keep them."""
        raise NotImplementedError

    def _sweep_relaxed(
        self, state: Tensor, num_sweeps: int, num_relaxed_sweeps: int, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z after relaxed sweeps, the conditional mean of (at least) the units updated last, and the binary state."""
        raise NotImplementedError

    def _ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The values, of x [..., N], at the first and at the second unit of each coupling; they broadcast to it."""
        raise NotImplementedError

    def _restricted(self, free: Tensor, fields: Tensor) -> "Boltzmann":
        """The model over the units ``free`` [n], ascending, whose biases are at their places in ``fields`` [..., N]."""
        raise NotImplementedError

    def _with_mean(self, z: Tensor, mean: Tensor) -> Tensor:
        """z with the units updated last replaced by their conditional mean, as :meth:`_sweep_relaxed` returns it."""
        raise NotImplementedError

    def _temper(self, state: Tensor, *args: Any, cluster_moves: bool) -> tuple[Tensor, Tensor, Tensor]:
        """z after parallel tempering, energies and chain numbers of each round. ``args``: the op's, from beta on."""
        raise NotImplementedError

    def _count(self, state: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """z after sweeps, counts of units and pairs, best z and energies. ``args``: the op's, but for clamps."""
        raise NotImplementedError

    def _colors(self) -> Tensor:
        """The colour of each unit [N] int64, on the CPU: units of one colour are not coupled. A sweep begins at 0."""
        raise NotImplementedError

    def _state_of(self, z: Tensor) -> Tensor:
        """The chain's state in z: a view."""
        return z.narrow(-1, 0, self._num_state_units)  # cheaper than an index

    def _draw_independent(self, biases: Sequence[Tensor], shape: Sequence[int], **options: Any) -> Tensor:
        """States of independent units of these biases: one sweep without couplings."""
        uncoupled = self._mapped(lambda tensor, dim: tensor.new_zeros(()).expand(tensor.shape[-dim:]))
        for argument, bias in zip(self._dims, biases, strict=False):
            setattr(uncoupled, argument, bias)
        return self._state_of(uncoupled._sweep(self._couplings.new_zeros(()).expand(shape), 1, **options))

    def _draw_uniform(self, shape: Sequence[int], **options: Any) -> Tensor:
        """States of uniform bits, by a sweep without parameters."""
        return self._draw_independent([torch.zeros_like(bias) for bias in self._biases], shape, **options)

    @with_all_digits
    def _free_energy_over(self, units: Tensor, z: Tensor) -> Tensor:
        """``- log sum exp(-energy(z))`` over some units [n], ascending, no two of which are coupled, given the rest."""
        if not len(units):
            return self.energy(z)
        # As for the data of a restricted machine: cheaper than the fields of all units.
        if units.equal((self._colors() == 0).nonzero()[:, 0]):
            return self.free_energy(self._state_of(z))
        rest, fields = self._rest(units, z)
        return self.energy(rest) - softplus(fields).sum(-1)

    @torch.no_grad()
    def _with_means(self, z: Tensor, units: Tensor) -> Tensor:
        """z with the conditional means of such units."""
        if not len(units):
            return z
        rest, fields = self._rest(units, z)
        return self._computed(rest).index_copy(-1, units.to(z.device), fields.sigmoid())

    def _rest(self, units: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """z with 0 at some units, and the fields of these."""
        units = units.to(z.device)
        rest = z.index_fill(-1, units, 0)
        return rest, self._fields_of(rest).index_select(-1, units)

    # Samples --------------------------------------------------------------------------------------------------

    def _start(
        self, name: str, sample_shape: Sequence[int], initial: Tensor | None, num_sweeps: int
    ) -> tuple[Tensor, Tensor]:
        """Starting states and the schedule of beta.

        A first sweep at beta = 0 makes uniform bits if ``initial`` is None: so they too depend on seed and chain alone.
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
        return self._couplings.new_zeros(()).expand(shape), beta

    def sample(
        self,
        sample_shape: Sequence[int] = (),
        num_sweeps: int = 100,
        *,
        initial: Tensor | None = None,
        given: Tensor | None = None,
        where: Tensor | None = None,
        chain_offset: int | Tensor = 0,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """Independent chains of ``num_sweeps`` binary Gibbs sweeps, of all units or of some given the others.

        Args:
            sample_shape: Shape of the chains of each model.
            num_sweeps: Number of sweeps, at least 0. The number needed depends on the model; compare two lengths.
            initial: States to start from: left [..., n1] of a bipartite model, z [..., N] of a graph. Uniform bits when
                not given.
            given: Values z [..., N] of the units of ``where``, 0 and 1; of the other units they do not matter. With
                both, samples are those of the other units given these, and have these values: z is completed.
            where: Mask of the units whose values are given, bool. Both broadcast to the shape of the result.
            chain_offset: Number of the first chain, or numbers of all chains, as in :func:`gibbs_ext.bipartite_gibbs`.
            generator: Supplies the seed.
            seed: A 64-bit integer or a 0-dim int64 tensor, instead of a generator.

        Returns:
            [*sample_shape, *batch_shape, num_units] bits of the parameters' dtype, without gradient. Seed and
            randomness are as in :func:`gibbs_ext.bipartite_gibbs`; uniform starts take one sweep number more.

        Raises:
            TypeError: ``sample_shape`` is no sequence of integers, or another argument has a wrong type.
            ValueError: A number is negative or too large, ``initial`` or ``chain_offset`` does not broadcast,
                ``given`` in ``where``, or ``initial`` elsewhere, has values other than 0 and 1, only one of given and
                where is given, both ``generator`` and ``seed`` are given, or a parameter is not finite.

            The messages begin with the class' name and ``.sample:``.
        """
        name = f"{type(self).__name__}.sample"
        state, beta = self._start(name, sample_shape, initial, num_sweeps)
        state, clamps = self._held(name, state, given, where)
        with reported_as(name, left="initial", state="initial"):
            return self._sweep(
                state, len(beta), beta=beta if len(beta) else 1.0, chain_offset=chain_offset,
                generator=generator, seed=seed, **clamps,
            )  # fmt: skip

    def _held(
        self, name: str, state: Tensor, given: Tensor | None, where: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The chain's state with the given values, and options of :meth:`_sweep` that keep them."""
        clamped = self._read_given(name, state.shape[:-1], given, where)
        return self._clamped(state, *clamped) if clamped else (state, {})

    def _read_given(
        self,
        name: str,
        batch: Sequence[int],
        given: Tensor | None,
        where: Tensor | None,
        is_relaxed: bool = False,
    ) -> tuple[Tensor, Tensor] | None:
        """Values [..., N], 0 where they are not given, and the mask [..., N] of those that are, or None if none are.

        The batch dims of both broadcast to ``batch``, but are not expanded to it.
        """
        if given is None and where is None:
            return None
        if given is None or where is None:
            missing, other = ("given", "where") if given is None else ("where", "given")
            raise ValueError(f"{name}: {missing} must be given together with {other}, got None")
        for argument, tensor in (("given", given), ("where", where)):
            if isinstance(tensor, Tensor) and tensor.device != self.device:
                wanted = f"{argument} must be on the model's device, {self.device}"
                raise ValueError(f"{name}: {wanted}, got {tensor.device}")
            expand_to(name, argument, tensor, (*batch, self.num_units))
        values, mask = (tensor.expand(*tensor.shape[:-1], self.num_units) for tensor in (given, where))
        if mask.dtype != torch.bool:
            raise ValueError(f"{name}: where must be a bool tensor, got {mask.dtype}")
        values, is_free = torch.broadcast_tensors(values, ~mask)
        if is_relaxed:
            good, wanted = (values >= 0) & (values <= 1), "lie in [0, 1] in where"
        else:
            good, wanted = (values == 0) | (values == 1), "hold 0 and 1 only in where"
        check_values(name, "given", wanted, values, good | is_free)
        return values.to(self.dtype).masked_fill(is_free, 0), mask

    def conditioned(self, given: Tensor, where: Tensor) -> Conditional:
        """The model of the other units given some: a smaller model, for everything that takes models.

        What the given units add to the fields of the others is added to their biases; units and couplings of the given
        ones are gone. So :func:`gibbs_ext.annealed_importance_sampling`, :func:`gibbs_ext.exact_log_partition`,
        :func:`gibbs_ext.perfect_samples` and all other functions of a model answer for the conditional, whose log Z is
        a sum over the free units alone, and chains sweep these alone.

        Args:
            given: Values z [..., N] of the units of ``where``, from 0 to 1; of the other units they do not matter.
                Batch dims broadcast against the model's.
            where: Mask [N] of the units whose values are given, bool; the same for all models and all values, because
                all conditionals must have the same units. At least one unit is free. (:meth:`sample` and
                :meth:`rsample` take other masks for other chains.) On a GPU the call waits for it.

        Returns:
            :class:`Conditional`. Its model is of this class, with the free units in their order, and of the parameters'
            dtype. If all units of one side of a bipartite model are given, the others are independent, and it is a
            :class:`gibbs_ext.GraphBoltzmann` without edges. Differentiable in the parameters and in ``given``.

        Raises:
            TypeError: An argument is no tensor.
            ValueError: ``where`` is no bool tensor [N] or leaves no unit free; ``given`` does not broadcast or has
                values outside of [0, 1] in where; or an argument is on another device.
            NotImplementedError: Under torch.vmap, where the mask is mapped.

            The messages begin with the class' name and ``.conditioned:``.

        Example:
            >>> model = GraphBoltzmann(ColoredGraph(3, [(0, 1), (1, 2)]), torch.zeros(3), torch.tensor([1.0, 2.0]))
            >>> conditional = model.conditioned(torch.ones(3), torch.tensor([False, True, False]))
            >>> conditional.model.bias
            tensor([1., 2.])
            >>> conditional.complete(torch.zeros(2))
            tensor([0., 1., 0.])
        """
        name = f"{type(self).__name__}.conditioned"
        check_tensors(name, given=given, where=where)
        if where.shape != (self.num_units,):
            raise ValueError(
                f"{name}: where must be one mask [{self.num_units}] for all models and chains (sample and rsample take "
                f"masks of chains), got shape {list(where.shape)}"
            )
        if is_mapped(where):
            raise NotImplementedError(f"{name}: where must not be mapped by torch.vmap")
        try:
            batch = torch.broadcast_shapes(self.batch_shape, given.shape[:-1])
        except RuntimeError as error:
            wanted = f"given must have batch dims that broadcast against {list(self.batch_shape)}"
            raise ValueError(f"{name}: {wanted}, got shape {list(given.shape)}") from error
        clamped = self._read_given(name, batch, given, where, is_relaxed=True)
        assert clamped
        values, mask = clamped
        free = (~mask).nonzero()[:, 0]
        if not len(free):
            raise ValueError(f"{name}: where must leave one or more units free, got all {self.num_units}")
        model = self._restricted(free, self._fields_of(values).to(self.dtype))
        model._validate_args = self._validate_args
        return Conditional(model, self.energy(values), values, free)

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
        given: Tensor | None = None,
        where: Tensor | None = None,
        chain_offset: int | Tensor = 0,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """Binary sweeps, then relaxed ones through which gradient flows.

        The values lie in [0, 1] and follow the law of the relaxation, not the model's: the gradient of E[f] that they
        give is biased by the difference.

        Args:
            sample_shape: Shape of the chains of each model.
            num_sweeps: Number of binary sweeps, at least 0.
            num_relaxed_sweeps: Number of relaxed sweeps that follow, at least 1.
            relaxation: Name of the relaxation; see :func:`gibbs_ext.bipartite_gibbs_relaxed`.
            sharpness: Sharpness of the relaxation, positive and finite.
            slope_gradient: Whether the relaxation ``"pwl"`` lets gradient through its slope.
            initial: States to start from, as in :meth:`sample`. Without binary sweeps they may have values other than 0
                and 1, and gradient flows into them. Uniform bits when not given.
            given: Values z [..., N] of the units of ``where``, from 0 to 1; of the other units they do not matter. With
                both, samples are those of the other units given these, and have these values.
            where: Mask of the units whose values are given, bool. Both broadcast to the shape of the result. A mask
                with batch dims makes couplings with these batch dims.
            chain_offset: Number of the first chain, or numbers of all chains, as in :func:`gibbs_ext.bipartite_gibbs`.
            generator: Supplies the seed.
            seed: A 64-bit integer or a 0-dim int64 tensor, instead of a generator.

        Returns:
            [*sample_shape, *batch_shape, num_units] of the parameters' dtype, differentiable in the parameters and in
            ``given``.

        Raises:
            TypeError, ValueError: As in :meth:`sample`, but given values may lie between 0 and 1; or ``relaxation`` is
                unknown, or ``sharpness`` is no positive finite number. The messages begin with the class' name and
                ``.rsample:``.
        """
        name = f"{type(self).__name__}.rsample"
        state, beta = self._start(name, sample_shape, initial, num_sweeps)
        check_integers(name, 1, num_relaxed_sweeps=num_relaxed_sweeps)
        clamped = self._read_given(name, state.shape[:-1], given, where, is_relaxed=True)
        model = self._decoupled(*clamped) if clamped else self
        with reported_as(name, left="initial", state="initial"):
            z, _, _ = model._sweep_relaxed(
                state, len(beta), num_relaxed_sweeps, relaxation=relaxation, sharpness=sharpness,
                slope_gradient=slope_gradient, beta=torch.cat([beta, beta.new_ones(num_relaxed_sweeps)]),
                chain_offset=chain_offset, generator=generator, seed=seed,
            )  # fmt: skip
        return torch.where(clamped[1], clamped[0], z) if clamped else z

    def _decoupled(self: _Model, values: Tensor, mask: Tensor) -> _Model:
        """The model without the couplings of the units of a mask, whose values are added to the other units' biases.

        The ops of relaxed sweeps have no clamps. In this model it does not matter what becomes of these units.
        """
        first, second = self._ends(~mask)
        return self._with(self._fields_of(values).to(self.dtype), self._couplings * (first & second))

    def centered(self: _Model, offsets: Tensor) -> _Model:
        """The same model, whose parameters get centred gradients from everything that is computed of it.

        With offsets m_i of the units the energy is, but for a constant, that of ``- sum_i c_i (z_i - m_i) - sum_ij
        coupling_ij (z_i - m_i) (z_j - m_j)``, the centred parametrisation, where ``bias_i = c_i - sum_j coupling_ij
        m_j``. The centred gradient of a function of the parameters is the step in the biases and couplings that its
        gradient in c and the couplings makes. If g is the plain gradient, it is::

            coupling_ij:  h_ij = g_ij - g_i m_j - g_j m_i         bias_i:  g_i - sum_j h_ij m_j

        For the likelihood, h_ij is the difference of the covariances ``<(z_i - m_i) (z_j - m_j)>`` of data and model
        (Montavon and Mueller, "Deep Boltzmann machines and the centering trick", 2012; Melchior, Fischer and Wiskott,
        "How to center deep Boltzmann machines", JMLR 17, 2016). Flipped data and flipped offsets flip this step.
        Offsets of 0 give the plain gradient. Gradient descent by it descends, because it is a positive definite matrix
        times the gradient; optimizers that scale each parameter's gradient by itself, such as Adam, lose the symmetry.

        Args:
            offsets: [..., N], of values meant to lie in [0, 1]; broadcasts to [*batch_shape, N].

        Returns:
            A model of the same values. Its parameters have all batch dims, so that parameters which models share get
            the sum of these models' centred gradients. No gradient reaches the offsets.

        Raises:
            TypeError, ValueError: ``offsets`` is no tensor, does not broadcast or is on another device. The message
                begins with the class' name and ``.centered:``.
        """
        name = f"{type(self).__name__}.centered"
        check_tensors(name, offsets=offsets)
        if offsets.device != self.device:
            raise ValueError(f"{name}: offsets must be on the model's device, {self.device}, got {offsets.device}")
        offsets = expand_to(name, "offsets", offsets, (*self.batch_shape, self.num_units)).detach().to(self.dtype)
        biases = torch.cat([bias.expand(*self.batch_shape, -1) for bias in self._biases], -1)
        # Zeros that carry the gradient; the transposed map, which is the same, takes gradients back.
        change, couplings_change = biases - biases.detach(), self._couplings - self._couplings.detach()
        (first, second), (first_offset, second_offset) = self._ends(change), self._ends(offsets)
        couplings_change = couplings_change - first * second_offset - second * first_offset
        change = self._with(change, -couplings_change)._fields_of(offsets).to(self.dtype)
        return self._with(biases.detach() + change, self._couplings.detach() + couplings_change)

    # Probabilities --------------------------------------------------------------------------------------------

    @overload
    def log_partition(
        self, method: str = ..., *, num_chains: int = ..., betas: Betas = ..., base: Base = ...,
        generator: torch.Generator | None = ..., seed: int | Tensor | None = ..., return_error: Literal[False] = ...,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def log_partition(
        self, method: str = ..., *, num_chains: int = ..., betas: Betas = ..., base: Base = ...,
        generator: torch.Generator | None = ..., seed: int | Tensor | None = ..., return_error: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    def log_partition(
        self,
        method: str = "ais",
        *,
        num_chains: int = 1000,
        betas: Betas = 1000,
        base: Base = "field",
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        return_error: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``log Z``.

        Args:
            method: ``"exact"`` is :func:`gibbs_ext.exact_log_partition`, for a bipartite model with a side of up to 25
                units or a graph of small width; ``"ais"`` estimates by :func:`gibbs_ext.annealed_importance_sampling`,
                whose result also holds the effective sample size.
            num_chains: Number of AIS chains per model.
            betas: Number of AIS steps, or their schedule, as in :func:`gibbs_ext.annealed_importance_sampling`.
            base: Factorial model where AIS starts, as there.
            generator: Supplies the seed of AIS.
            seed: A 64-bit integer, instead of a generator.
            return_error: Whether to return the standard error, too.

        Returns:
            [*batch_shape] float64. Differentiable in the parameters: exactly (of a graph once), or through the weighted
            samples of AIS any number of times (``d log Z = - E_p[d energy]``).

            With ``return_error`` a pair: log Z, and its standard error [*batch_shape] float64, without gradient. The
            error is 0 where log Z is exact. The error of AIS is as in :class:`gibbs_ext.AISResult`, nan with one chain,
            and too small where the chains miss a part of the states.

        Raises:
            TypeError: An argument of AIS has a wrong type.
            ValueError: ``method`` is neither ``"exact"`` nor ``"ais"``, the model is too large for ``"exact"``, an
                argument of AIS does not fit, or a parameter is not finite.

            The messages begin with the class' name and ``.log_partition:``.
        """
        name = f"{type(self).__name__}.log_partition"
        if method == "exact":
            with reported_as(name):
                log_partition = exact_log_partition(self)
            return (log_partition, torch.zeros_like(log_partition)) if return_error else log_partition
        if method != "ais":
            raise ValueError(f"{name}: method must be 'exact' or 'ais', got {shown(method)}")
        with reported_as(name):
            result = annealed_importance_sampling(self, num_chains, betas, base=base, generator=generator, seed=seed)
        negative_energy = -self.energy(result.samples).double()
        # Its value is 0, its derivatives those of the logarithm of the weighted mean of exp(-energy).
        change = (result.log_weights + negative_energy - negative_energy.detach()).logsumexp(0)
        log_partition = result.log_partition + (change - change.detach())
        return (log_partition, result.standard_error) if return_error else log_partition

    def log_prob(self, z: Tensor, log_partition: Tensor | None = None) -> Tensor:
        """``-energy(z) - log Z``.

        Args:
            z: [..., num_units] bits, of any dtype: converted to the parameters'.
            log_partition: log Z [*batch_shape]. Computed as by :func:`gibbs_ext.exact_log_partition` if None, for up to
                25 units on a bipartite model's smaller side or a Chimera graph of up to 6 cells across (5 x 11 cells if
                its gradient is needed).

        Returns:
            [...] float64. Differentiable in the parameters.

        Raises:
            TypeError: z is no tensor.
            ValueError: z has values other than 0 and 1 or does not broadcast (when validating), or its last dim is not
                num_units; or log Z is not given and the model is too large to compute it (the message begins with the
                class' name and ``.log_prob:``).
            RuntimeError: The shape of ``log_partition`` does not broadcast. The message is PyTorch's.
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
        """``P(z_i = 1)``, exact, as in :func:`gibbs_ext.exact_marginals`; computed anew at each access.

        The work is proportional to 2^n for each model of the batch, where n is the number of units of the smaller side
        or the width of the graph: n = 20 takes about a second a model.

        Returns:
            [*batch_shape, num_units] float64. Not differentiable: its backward pass is an error.

        Raises:
            ValueError: The model is too large (take the mean of samples), or a parameter is not finite.
        """
        return self._exact("mean", lambda _, single, pair: single)

    @property
    def variance(self) -> Tensor:
        """``mean (1 - mean)`` of each unit [*batch_shape, num_units]; otherwise as :attr:`mean`."""
        return self._exact("variance", lambda _, single, pair: single * (1 - single))

    def entropy(self) -> Tensor:
        """``- sum_z p(z) log p(z) = log Z + E[energy]`` in nats, exact, at the cost of :attr:`mean`.

        Returns:
            [*batch_shape] float64. Not differentiable: its backward pass is an error.

        Raises:
            ValueError: The model is too large (``log_partition("ais")`` plus the mean energy of samples is an
                estimate), or a parameter is not finite.
        """
        own = tuple(range(-list(self._dims.values())[-1], 0))

        def entropy_of(log_partition: Tensor, single: Tensor, pair: Tensor) -> Tensor:
            bias = torch.cat([bias.double().expand(*self.batch_shape, -1) for bias in self._biases], -1)
            energy = -(bias * single).sum(-1) - (self._couplings.double() * pair).sum(own)
            return (log_partition + energy).clamp(min=0)  # rounding may have made it negative

        return self._exact("entropy", entropy_of)

    def _exact(self, method: str, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """``function`` of log Z and the two marginals, for the method of that name."""
        name = f"{type(self).__name__}.{method}"
        with torch.no_grad():
            log_partition, marginals = log_partition_and_marginals(name, self)
            value = function(log_partition, *marginals)
        return without_derivative(name, value, self)
