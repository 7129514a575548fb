# SPDX-License-Identifier: Apache-2.0
"""The members that log_partition needs of a model, so that it works on every kind of model and imports none."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gibbs_ext.checks import check_all, is_mapped

# log2 of the numbers in all tables held at the same time (2 GiB).
MAX_TABLES = 28
# Numbers of a table worked on at once: few enough to stay in the cache.
CHUNK = 2**17


class Solver(Protocol):
    """An exact algorithm for one kind of model.

    All methods take the name of the public function that was called, with which errors begin, and the parameters of the
    model in its own order. S is the broadcast of the parameters' batch shapes.

    Raises:
        ValueError: The model is too large, or a parameter is not finite.
    """

    def log_partition(self, name: str, parameters: Sequence[Tensor]) -> Tensor:
        """log Z [*S] float64, differentiable in the parameters."""

    def marginals(self, name: str, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """log Z [*S] and the two fields of :class:`gibbs_ext.Marginals`, all float64."""

    def samples(self, name: str, parameters: Sequence[Tensor], num_samples: int, generator: torch.Generator) -> Tensor:
        """Independent draws [*S, num_samples, N] uint8."""


class Machine(Protocol):
    """A Boltzmann machine. :class:`gibbs_ext.models.Boltzmann` implements most of this."""

    @property
    def batch_shape(self) -> torch.Size: ...
    @property
    def num_units(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...

    @property
    def _parameters(self) -> list[Tensor]:
        """The biases, then the couplings."""

    @property
    def _biases(self) -> list[Tensor]:
        """One tensor [..., n] for each part of z: the two sides, or all nodes of a graph."""

    @property
    def _solver(self) -> Solver: ...

    @property
    def _num_state_units(self) -> int:
        """Number of units, the first ones of z, on which the next sweep depends: a chain's state."""

    def energy(self, z: Tensor) -> Tensor:
        """The energies [...] of z [..., N], bits or relaxed values."""

    def _fields_at_half(self) -> list[Tensor]:
        """The fields, in the form of ``_biases``, of units whose neighbours all have the value 1/2.

        They are the fields of the model over spins.
        """

    def _draw_independent(self, biases: Sequence[Tensor], shape: Sequence[int], **options: Any) -> Tensor:
        """Chain states of the given shape, whose units are independent and have these biases as logits."""

    def _state_of(self, z: Tensor) -> Tensor:
        """The chain's state in z: a view."""

    def _anneal(self, state: Tensor, bases: Sequence[Tensor], betas: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """z at the end of an AIS path from the model of biases ``bases``, and the log-weights."""


def refuse_vmap(name: str, model: Machine, *others: object) -> None:
    """Raises if a parameter of the model or another tensor is mapped."""
    if any(isinstance(given, Tensor) and is_mapped(given) for given in (*model._parameters, *others)):
        raise NotImplementedError(f"{name}: torch.vmap is not supported; give the model a batch shape instead")


def check_model(name: str, model: object) -> None:
    if not hasattr(type(model), "_solver"):
        raise TypeError(f"{name}: model must be a BipartiteBoltzmann or a GraphBoltzmann, got {type(model).__name__}")


def check_finite(name: str, argument: str, tensor: Tensor) -> None:
    check_all(tensor.isfinite(), f"{name}: {argument} must be finite, got NaN or inf")


def broadcast_batch(parameters: Iterable[Tensor], dims: Iterable[int]) -> torch.Size:
    """The broadcast of the parameters' batch shapes, ``dims`` being the numbers of dims each has of its own."""
    shape: torch.Size = torch.broadcast_shapes(*(p.shape[:-dim] for p, dim in zip(parameters, dims, strict=True)))
    return shape


def expanded(parameters: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
    """The parameters in float64, each with all batch dims, so that torch.vmap may add one in front."""
    batch_shape = broadcast_batch(parameters, dims)
    return [p.double().expand(*batch_shape, *(-1,) * dim) for p, dim in zip(parameters, dims, strict=True)]


def mapped_first(tensors: Iterable[Tensor], in_dims: Iterable[int | None]) -> list[Tensor]:
    """The parameters that :func:`expanded` returned, with the mapped dim, if there is one, as first batch dim."""
    return [t if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, in_dims, strict=True)]


def alternative(name: str, sweeps: str) -> str:
    """The function that an error recommends where a model is too large for the function ``name``."""
    estimates = {
        "exact_log_partition": "annealed_importance_sampling",
        "mean": "the mean of samples, an estimate",
        "variance": "the variance of samples, an estimate",
        "entropy": "log_partition('ais') plus the mean energy of samples, an estimate",
    }
    return estimates.get(name.split(".")[-1], sweeps)
