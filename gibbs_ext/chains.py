# SPDX-License-Identifier: Apache-2.0
"""Markov chains that live from one training step to the next, stored as bits."""

from typing import overload

import torch
from torch import Tensor, nn

from gibbs_ext.checks import check_bits, check_integers, check_tensors, reported_as, shown
from gibbs_ext.distributions import BipartiteBoltzmann, GraphBoltzmann, check_model


def pack_bits(bits: Tensor) -> Tensor:
    """Eight bits a byte, the first in the lowest place.

    Args:
        bits: [..., n] of any dtype, values 0 and 1.

    Returns:
        [..., ceil(n / 8)] uint8, the last byte filled up with zeros.
    """
    check_bits("pack_bits", "bits", bits)
    octets = nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    packed: Tensor = (octets << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)
    return packed


def unpack_bits(packed: Tensor, num_bits: int) -> Tensor:
    """Inverse of :func:`pack_bits`.

    Args:
        packed: [..., ceil(num_bits / 8)] uint8.
        num_bits: n.

    Returns:
        [..., n] uint8, values 0 and 1.
    """
    octets = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return octets.flatten(-2)[..., :num_bits]


class PersistentChains(nn.Module):
    """Persistent Gibbs chains of a model, a byte for eight units, in ``state_dict``.

    Of a bipartite model they keep left only, from which right is redrawn; of a graph, all units. Below, n is n1 or N.

    One set of chains per model, or one per data point, of which a training step uses those of its batch. They start as
    uniform bits, drawn from torch's default generator.

    Args:
        num_chains: C, chains per model or per data point.
        model: Gives n, the device and (without ``dataset_size``) the batch shape. It is not kept.
        dataset_size: For chains of so many data points. The model's batch shape is then of no account: ``index [B]``
            picks the points to which a batch of B models belongs.

    Attributes:
        bits: Buffer, uint8 [C, *batch_shape, ceil(n / 8)] or [dataset_size, C, ceil(n / 8)]; see :func:`pack_bits`.
    """

    bits: Tensor

    def __init__(
        self, num_chains: int, model: BipartiteBoltzmann | GraphBoltzmann, dataset_size: int | None = None
    ) -> None:
        super().__init__()
        check_integers("PersistentChains", 1, num_chains=num_chains)
        check_model("PersistentChains", model)
        if dataset_size is not None:
            check_integers("PersistentChains", 1, dataset_size=dataset_size)
        self.num_bits = model._num_state_units
        self.dataset_size = dataset_size
        shape = (num_chains, *model.batch_shape) if dataset_size is None else (dataset_size, num_chains)
        bits = torch.randint(2, (*shape, self.num_bits), dtype=torch.uint8, device=model.device)
        self.register_buffer("bits", pack_bits(bits))

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
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(self.bits):
            raise ValueError(
                f"PersistentChains: index must be in [0, {self.dataset_size}), got {shown(index.tolist())}"
            )

    def state(self, index: Tensor | None = None) -> Tensor:
        """The states, unpacked: a copy.

        Args:
            index: [B] int64 data points, with ``dataset_size`` only.

        Returns:
            uint8 [C, *batch_shape, n], or [C, B, n].
        """
        self._check_index(index)
        packed = self.bits if index is None else self.bits[index].movedim(0, 1)
        return unpack_bits(packed, self.num_bits)

    def store_(self, state: Tensor, index: Tensor | None = None) -> None:
        """Replaces states. Mutates ``bits``.

        Args:
            state: Bits of any dtype, of the shape that :meth:`state` returns.
            index: [B] int64 data points, with ``dataset_size`` only. Which of several
                states a point named more than once gets is undefined.
        """
        self._check_index(index)
        check_tensors("PersistentChains", state=state)
        chains, *batch = self.bits.shape[:-1]
        if index is not None:
            chains, batch = self.bits.shape[1], [len(index)]
        if state.shape != (chains, *batch, self.num_bits):
            raise ValueError(
                f"PersistentChains: state must have shape {[chains, *batch, self.num_bits]}, got {list(state.shape)}"
            )
        with reported_as("PersistentChains", bits="state"):
            packed = pack_bits(state.detach())
        if index is None:
            self.bits.copy_(packed)
        else:
            self.bits[index] = packed.movedim(1, 0)

    @overload
    def advance_(
        self,
        model: BipartiteBoltzmann,
        num_sweeps: int,
        index: Tensor | None = ...,
        generator: torch.Generator | None = ...,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def advance_(
        self,
        model: GraphBoltzmann,
        num_sweeps: int,
        index: Tensor | None = ...,
        generator: torch.Generator | None = ...,
    ) -> Tensor: ...

    @torch.no_grad()
    def advance_(
        self,
        model: BipartiteBoltzmann | GraphBoltzmann,
        num_sweeps: int,
        index: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Sweeps the chains under ``model`` and keeps the result. Mutates ``bits``.

        Args:
            model: As at construction; or of batch shape [B], with ``index``.
            num_sweeps: Binary sweeps, at least 1.
            index: [B] int64 data points, with ``dataset_size`` only.
            generator: Supplies the seed.

        Returns:
            Bits of the parameters' dtype, without gradient: left [C, *batch_shape, n1] and right [C, *batch_shape, n2],
            or z [C, *batch_shape, N] of a graph.
        """
        check_model("PersistentChains", model)
        check_integers("PersistentChains", 1, num_sweeps=num_sweeps)
        with reported_as("PersistentChains"):
            z = model._sweep(self.state(index).to(model.dtype), num_sweeps, generator=generator)
        self.store_(z[0], index)
        return z if isinstance(model, BipartiteBoltzmann) else z[0]

    def extra_repr(self) -> str:
        return f"num_bits={self.num_bits}, bits={list(self.bits.shape)}, dataset_size={self.dataset_size}"
