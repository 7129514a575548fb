# SPDX-License-Identifier: Apache-2.0
"""Markov chains that live from one training step to the next, stored as bits."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gibbs_ext.checks import (
    check_bits,
    check_integers,
    check_tensors,
    check_values,
    is_transformed,
    reported_as,
    shown,
)
from gibbs_ext.log_partition.machine import check_model
from gibbs_ext.models import Boltzmann


def pack_bits(bits: Tensor) -> Tensor:
    """Packs eight bits into each byte, the first bit into the lowest place.

    Args:
        bits: [..., n] of any dtype, values 0 and 1.

    Returns:
        [..., ceil(n / 8)] uint8, the last byte filled up with zeros.

    Raises:
        TypeError, ValueError: ``bits`` is no tensor, or has values other than 0 and 1. The message begins with
            ``pack_bits:``.
        IndexError: ``bits`` has no dims. The message is Python's.
    """
    check_bits("pack_bits", "bits", bits)
    return _pack(bits)


def _pack(bits: Tensor) -> Tensor:
    octets = nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    packed: Tensor = (octets << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)
    return packed


def unpack_bits(packed: Tensor, num_bits: int) -> Tensor:
    """Inverse of :func:`pack_bits`.

    Arguments are not checked: a ``num_bits`` that does not fit ``packed`` is no error, and all errors are PyTorch's.

    Args:
        packed: [..., ceil(num_bits / 8)] uint8.
        num_bits: n, number of bits in each row of ``packed``.

    Returns:
        [..., n] uint8, values 0 and 1.
    """
    octets = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return octets.flatten(-2)[..., :num_bits]


class PersistentChains(nn.Module):
    """Persistent Gibbs chains of a model, a byte for eight units, in ``state_dict``.

    Chains of a bipartite model keep left only, because right is redrawn from it; chains on a graph keep all units.
    Below, n is n1 or N. Each model has its own set of chains; or each data point has, and a training step uses the
    chains of its batch. Chains start as uniform bits, drawn from torch's default generator.

    The chains belong to the process that made them: they move with the module and are in its ``state_dict``, but they
    are no ``buffers()``, because ``DistributedDataParallel`` overwrites all buffers with those of rank 0.
    (``torch.distributed.checkpoint`` must be given the module inside such a wrapper, not the wrapper, because it
    renames only parameters and buffers.)

    Inside a transform of torch.func, which allows no mutation, chains cannot be advanced (NotImplementedError).

    An ``index`` out of range and states other than 0 and 1 are a ValueError on the CPU. On a GPU they fail an assertion
    on the device, after which the process cannot use the device any more.

    Args:
        num_chains: C, number of chains per model or per data point.
        model: Gives n, the device and (without ``dataset_size``) the batch shape. It is not kept.
        dataset_size: Number of data points. If given, each point keeps its own chains and ``index [B]`` selects those
            of a batch; the model's batch shape is ignored.

    Attributes:
        num_units: Buffer [] int64, n.
        bits: uint8 [C, *batch_shape, ceil(n / 8)] or [dataset_size, C, ceil(n / 8)]; see :func:`pack_bits`.
    """

    def __init__(self, num_chains: int, model: Boltzmann, dataset_size: int | None = None) -> None:
        super().__init__()
        check_integers("PersistentChains", 1, num_chains=num_chains)
        check_model("PersistentChains", model)
        if dataset_size is not None:
            check_integers("PersistentChains", 1, dataset_size=dataset_size)
        self.num_bits = model._num_state_units
        # It is in the state, because it cannot be told from the number of bytes.
        self.register_buffer("num_units", torch.tensor(self.num_bits, device=model.device))
        self.dataset_size = dataset_size
        shape = (num_chains, *model.batch_shape) if dataset_size is None else (dataset_size, num_chains)
        self.bits = _pack(torch.randint(2, (*shape, self.num_bits), dtype=torch.uint8, device=model.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PersistentChains":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.bits = fn(self.bits)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "bits"] = self.bits

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        """Loads ``bits`` as if it were a buffer."""
        key = prefix + "num_units"
        if key in state_dict and (num_units := int(state_dict[key])) != self.num_bits:
            errors.append(f"{key}: the state is that of chains of {num_units} units, these have {self.num_bits}")
        self._buffers["bits"] = self.__dict__.pop("bits")
        try:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, errors)
        finally:
            self.__dict__["bits"] = self._buffers.pop("bits")

    def _check_index(self, index: Tensor | None) -> None:
        if (index is None) != (self.dataset_size is None):
            raise ValueError(
                "PersistentChains: index must be given if and only if the chains have a dataset_size, "
                f"got index={'None' if index is None else 'a tensor'}, dataset_size={self.dataset_size}"
            )
        if index is None:
            return
        check_tensors("PersistentChains", index=index)
        if index.dim() != 1 or index.dtype != torch.int64:
            raise ValueError(f"PersistentChains: index must be int64 [B], got {index.dtype} {list(index.shape)}")
        wanted = f"be in [0, {self.dataset_size})"
        check_values("PersistentChains", "index", wanted, index, (index >= 0) & (index < len(self.bits)))

    def _check_part(self, part: slice | None) -> slice:
        """``part`` with a start and an end."""
        if part is None:
            return slice(0, len(self.bits))
        if self.dataset_size is not None:
            raise ValueError("PersistentChains: part must be None where the chains have a dataset_size")
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise TypeError(f"PersistentChains: part must be a slice of step 1, got {shown(part)}")
        if not all(end is None or isinstance(end, int) for end in (part.start, part.stop)):
            raise TypeError(f"PersistentChains: part must be a slice of integers, got {shown(part)}")
        start, end, _ = part.indices(len(self.bits))
        if end <= start:
            raise ValueError(f"PersistentChains: part must hold one or more of {len(self.bits)} chains, got {part}")
        return slice(start, end)

    def state(self, index: Tensor | None = None, part: slice | None = None) -> Tensor:
        """The states, unpacked: a copy.

        Args:
            index: [B] int64 data points, with ``dataset_size`` only.
            part: Selects some of the C chains per model, without ``dataset_size`` only; all by default.

        Returns:
            uint8 [C, *batch_shape, n], or [C, B, n] with ``index``, where C is the length of ``part`` if that is given.

        Raises:
            TypeError: ``index`` is no tensor, or ``part`` is no slice of integers of step 1.
            ValueError: ``index`` is missing, is not wanted, is not int64 [B] or is out of range; or ``part`` is not
                wanted or selects no chain.

            The messages begin with ``PersistentChains:``.
        """
        self._check_index(index)
        part = self._check_part(part)
        packed = self.bits[part] if index is None else self.bits.index_select(0, index).movedim(0, 1)
        return unpack_bits(packed, self.num_bits)

    def store_(self, state: Tensor, index: Tensor | None = None, part: slice | None = None) -> None:
        """Replaces states. Mutates ``bits``.

        Args:
            state: Bits of any dtype, of the shape that :meth:`state` returns.
            index: [B] int64 data points, with ``dataset_size`` only. A point that is named more than once gets any one
                of its states.
            part: Selects some of the C chains per model, without ``dataset_size`` only; all by default.

        Raises:
            TypeError: As in :meth:`state`; or ``state`` is no tensor.
            ValueError: As in :meth:`state`; or ``state`` has another shape or values other than 0 and 1.
            NotImplementedError: The call is made inside a transform of torch.func.

            The messages begin with ``PersistentChains:``.
        """
        self._check_index(index)
        part = self._check_part(part)
        check_tensors("PersistentChains", state=state)
        check_bits("PersistentChains", "state", state)
        self._store(state, index, part)

    def _store(self, state: Tensor, index: Tensor | None, part: slice = slice(None)) -> None:
        """:meth:`store_` without checks of values and of ``part``."""
        chains, *batch = self.bits[part].shape[:-1]
        if index is not None:
            chains, batch = self.bits.shape[1], [len(index)]
        if state.shape != (chains, *batch, self.num_bits):
            raise ValueError(
                f"PersistentChains: state must have shape {[chains, *batch, self.num_bits]}, got {list(state.shape)}"
            )
        packed = _pack(state.detach())
        if is_transformed(packed) and not is_transformed(self.bits):
            raise NotImplementedError(
                "PersistentChains: bits cannot be mutated inside a transform of torch.func or torch.vmap; advance the "
                "chains before it, and give the transformed function their state"
            )
        if index is None:
            self.bits[part].copy_(packed)
        else:
            self.bits.index_copy_(0, index, packed.movedim(1, 0))

    @torch.no_grad()
    def advance_(
        self,
        model: Boltzmann,
        num_sweeps: int,
        index: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        given: Tensor | None = None,
        where: Tensor | None = None,
        part: slice | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """Sweeps the chains under ``model`` and keeps the result. Mutates ``bits``.

        Args:
            model: The model as at construction; of batch shape [B], or [] if all points share it, with ``index``.
            num_sweeps: Number of binary sweeps, at least 1.
            index: [B] int64 data points, with ``dataset_size`` only.
            generator: Supplies the seed.
            given: Values z [..., N] of the units of ``where``, which these take before the sweeps and keep, as in
                :meth:`gibbs_ext.GraphBoltzmann.sample`.
            where: Mask of the units whose values are given, bool. Both broadcast to the shape of the result.
            part: Selects some of the C chains per model, without ``dataset_size`` only; all by default. The others
                stay. Processes that each advance a part with the same ``seed`` make the bits that one process makes of
                all chains.
            seed: A 64-bit integer or a 0-dim int64 tensor, instead of a generator.

        Returns:
            z [C, *batch_shape, N], bits of the parameters' dtype, without gradient; of a bipartite model left before
            right. C is the length of ``part`` if that is given.

        Raises:
            TypeError: As in :meth:`state`; or ``model`` is no model, or ``num_sweeps``, ``generator`` or ``seed`` has a
                wrong type.
            ValueError: As in :meth:`state`; or ``num_sweeps`` is less than 1, ``generator`` and ``seed`` are both
                given, the model's units or batch shape do not fit the chains, ``given`` or ``where`` does not fit or
                only one of them is given, or a parameter is not finite.
            NotImplementedError: The call is made inside a transform of torch.func.

            The messages begin with ``PersistentChains:``. After an error on the CPU, ``bits`` are as before the call.
        """
        check_model("PersistentChains", model)
        check_integers("PersistentChains", 1, num_sweeps=num_sweeps)
        part = self._check_part(part)
        state = self.state(index, None if self.dataset_size is not None else part).to(model.dtype)
        # Chains are numbered over the whole set.
        first = part.start * math.prod(self.bits.shape[1:-1])
        state, clamps = model._held("PersistentChains", state, given, where)
        with reported_as("PersistentChains"):
            z = model._sweep(state, num_sweeps, chain_offset=first, generator=generator, seed=seed, **clamps)
        self._store(model._state_of(z), index, part)
        return z

    def extra_repr(self) -> str:
        return f"num_bits={self.num_bits}, bits={list(self.bits.shape)}, dataset_size={self.dataset_size}"
