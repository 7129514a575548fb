# SPDX-License-Identifier: Apache-2.0
"""Markov chains that live from one training step to the next, stored as bits."""

import torch
from torch import Tensor, nn

from gibbs_ext.checks import check_bits, check_integers, check_tensors, reported_as, shown
from gibbs_ext.distributions import BipartiteBoltzmann, check_model
from gibbs_ext.functional import bipartite_gibbs


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
    """Persistent Gibbs chains of a bipartite model: n1 / 8 bytes each (right is redrawn from left), in ``state_dict``.

    One set of chains per model, or one per data point, of which a training step uses those of its batch. They start as
    uniform bits, drawn from torch's default generator.

    Args:
        num_chains: C, chains per model or per data point.
        model: Gives n1, the device and (without ``dataset_size``) the batch shape. It is not kept.
        dataset_size: N, for chains of N data points. The model's batch shape is then of no account: ``index [B]``
            picks the points to which a batch of B models belongs.

    Attributes:
        left_bits: Buffer, uint8 [C, *batch_shape, ceil(n1 / 8)] or [N, C, ceil(n1 / 8)]; see :func:`pack_bits`.
    """

    left_bits: Tensor

    def __init__(self, num_chains: int, model: BipartiteBoltzmann, dataset_size: int | None = None) -> None:
        super().__init__()
        check_integers("PersistentChains", 1, num_chains=num_chains)
        check_model("PersistentChains", model)
        if dataset_size is not None:
            check_integers("PersistentChains", 1, dataset_size=dataset_size)
        self.num_left = model.num_left
        self.dataset_size = dataset_size
        shape = (num_chains, *model.batch_shape) if dataset_size is None else (dataset_size, num_chains)
        bits = torch.randint(2, (*shape, self.num_left), dtype=torch.uint8, device=model.weight.device)
        self.register_buffer("left_bits", pack_bits(bits))

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
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(self.left_bits):
            raise ValueError(
                f"PersistentChains: index must be in [0, {self.dataset_size}), got {shown(index.tolist())}"
            )

    def state(self, index: Tensor | None = None) -> Tensor:
        """The left states, unpacked: a copy.

        Args:
            index: [B] int64 data points, with ``dataset_size`` only.

        Returns:
            uint8 [C, *batch_shape, n1], or [C, B, n1].
        """
        self._check_index(index)
        packed = self.left_bits if index is None else self.left_bits[index].movedim(0, 1)
        return unpack_bits(packed, self.num_left)

    def store_(self, left: Tensor, index: Tensor | None = None) -> None:
        """Replaces left states. Mutates ``left_bits``.

        Args:
            left: Bits of any dtype, of the shape that :meth:`state` returns.
            index: [B] int64 data points, with ``dataset_size`` only. Which of several
                states a point named more than once gets is undefined.
        """
        self._check_index(index)
        check_tensors("PersistentChains", left=left)
        chains, *batch = self.left_bits.shape[:-1]
        if index is not None:
            chains, batch = self.left_bits.shape[1], [len(index)]
        if left.shape != (chains, *batch, self.num_left):
            raise ValueError(
                f"PersistentChains: left must have shape {[chains, *batch, self.num_left]}, got {list(left.shape)}"
            )
        with reported_as("PersistentChains", bits="left"):
            packed = pack_bits(left.detach())
        if index is None:
            self.left_bits.copy_(packed)
        else:
            self.left_bits[index] = packed.movedim(1, 0)

    @torch.no_grad()
    def advance_(
        self,
        model: BipartiteBoltzmann,
        num_sweeps: int,
        index: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sweeps the chains under ``model`` and keeps the result. Mutates ``left_bits``.

        Args:
            model: Batch shape as at construction, or [B] with ``index``.
            num_sweeps: Binary sweeps, at least 1.
            index: [B] int64 data points, with ``dataset_size`` only.
            generator: Supplies the seed.

        Returns:
            left [C, *batch_shape, n1] and right [C, *batch_shape, n2], bits of the parameters' dtype, no gradient.
        """
        check_model("PersistentChains", model)
        check_integers("PersistentChains", 1, num_sweeps=num_sweeps)
        with reported_as("PersistentChains"):
            left, right = bipartite_gibbs(
                self.state(index).to(model.weight.dtype), model.left_bias, model.right_bias, model.weight, num_sweeps,
                generator=generator,
            )  # fmt: skip
        self.store_(left, index)
        return left, right

    def extra_repr(self) -> str:
        return f"num_left={self.num_left}, left_bits={list(self.left_bits.shape)}, dataset_size={self.dataset_size}"
