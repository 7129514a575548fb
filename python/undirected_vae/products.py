# SPDX-License-Identifier: Apache-2.0
"""Matrix products in float32 on the CPU, by the faster of the libraries that PyTorch brings along."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Sets PyTorch's precision of float32 products for as long as it lasts. "medium" permits factors that are rounded
    to bfloat16, or to TF32 on a GPU; "highest" permits nothing."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _onednn_rounds() -> bool:
    """Whether oneDNN makes use of the permission, as it does if the processor has units for bfloat16 (AMX)."""
    with torch.device("cpu"), matmul_precision("medium"):
        factor = torch.full((128, 256), 1 + 2**-12)  # in bfloat16 and in TF32 it is 1
        return not factor.equal(factor @ torch.eye(256))


# This is asked beforehand, because a step may be traced, and then there are no values to read.
ONEDNN_ROUNDS = _onednn_rounds()


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Lets oneDNN compute large products of float32 matrices on the CPU, if it computes them in float32.

    On processors of AMD it is twice as fast as MKL, which computes them otherwise. PyTorch hands them to oneDNN only
    with the permission to round their factors, which is given only where a trial has shown that oneDNN does not use it.
    Other devices keep PyTorch's settings; so does the CPU as soon as this ends.
    """
    if device.type != "cpu" or ONEDNN_ROUNDS:
        yield
        return
    with matmul_precision("medium"):
        yield
