# SPDX-License-Identifier: Apache-2.0
"""What differs from step to step, as tensors on the device: a captured step reads them there, and nobody waits."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .config import Config

ROWS = 100  # steps whose numbers go to the device together


class Row(NamedTuple):
    """The numbers of one step; `[ROWS, ...]` in a table of several."""

    rate: Tensor  # [] of learning
    kl_weight: Tensor  # []
    average_weight: Tensor  # [] of the new parameters in their moving average
    seeds: Tensor  # [3] int64, for the images' bits, the posterior's sampler and the prior's
    indices: Tensor  # [B] int64, which training images
    noise: Tensor  # [B, 6] for the augmentation; [0, 6] without


class Feed:
    """Rows of a table on the device, in turn. What is in them depends on the settings and the step alone."""

    def __init__(self, config: Config, dataset_size: int, device: torch.device) -> None:
        self.config, self.dataset_size, self.device = config, dataset_size, device
        self._first = self._next = 0  # steps: of the table's first row, and of the row to come
        self._order, self._epoch = torch.empty(0, device="cpu"), -1
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        self._table = Row(*(rows.to(device) for rows in self._rows(0)))

    def seek(self, step: int) -> None:
        """Goes on from this step."""
        self._next = step
        self._fill()

    def prepare(self) -> None:
        """To be called before each step: puts the numbers of the next steps into the table where it has run out."""
        if self._next == self._first + ROWS:
            self._fill()
        self._next += 1

    def take(self) -> Row:
        """The next row. Made of tensors alone, so that a CUDA graph can do it."""
        row = Row(*(rows.index_select(0, self._row)[0] for rows in self._table))
        self._row += 1
        return row

    def _fill(self) -> None:
        self._first = self._next
        for rows, new in zip(self._table, self._rows(self._first), strict=True):
            # From pinned memory, which PyTorch keeps until the copy has been made.
            is_pinned = self.device.type == "cuda" and torch.cuda.is_available()
            rows.copy_(new.pin_memory() if is_pinned else new, non_blocking=True)
        self._row.zero_()

    def _rows(self, start: int) -> Row:
        """Of the steps from `start` on, on the CPU."""
        with torch.device("cpu"):
            return self._make_rows(start)

    def _make_rows(self, start: int) -> Row:
        config = self.config
        steps = range(start, start + ROWS)
        progress = [step / config.steps for step in steps]
        generators = [torch.Generator().manual_seed(step_seed(config.seed, step)) for step in steps]
        seeds = [torch.randint(-(2**63), 2**63 - 1, (3,), generator=generator) for generator in generators]
        noise = torch.empty(ROWS, 0, 6)
        if config.augment:
            # Less and less: the last steps see images as they are.
            strength = torch.tensor([config.augment * (1 - part) for part in progress])
            draws = [torch.randn(config.batch_size, 6, generator=generator) for generator in generators]
            noise = strength[:, None, None] * torch.stack(draws)
        return Row(
            torch.tensor([config.learning_rate * learning_rate(config.schedule, part) for part in progress]),
            torch.tensor([kl_weight(config.kl_warmup, part) for part in progress]),
            # At first a plain mean: a fixed decay would keep the random start for long.
            torch.tensor([1 - min(config.average, step / (step + 10)) for step in steps]),
            torch.stack(seeds),
            torch.stack([self._index(step) for step in steps]),
            noise,
        )

    def _index(self, step: int) -> Tensor:
        size = self.config.batch_size
        epoch, position = divmod(step, self.dataset_size // size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(step_seed(self.config.seed, -1 - epoch))
            self._order, self._epoch = torch.randperm(self.dataset_size, generator=generator), epoch
        return self._order[position * size : (position + 1) * size]


def learning_rate(schedule: str, progress: float) -> float:
    """The factor of the base rate when this part of the training is done."""
    if schedule == "cosine":
        return min(1.0, 0.1 + progress / 0.02) * 0.5 * (1 + math.cos(math.pi * progress))
    for end, factor in ((0.02, 0.1), (0.6, 1.0), (0.75, 1 / 3), (0.95, 0.1)):
        if progress < end:
            return factor
    return 1 / 33


def kl_weight(warmup: float, progress: float) -> float:
    return min(1.0, progress / warmup) if warmup else 1.0


def step_seed(seed: int, step: int) -> int:
    # PyTorch's CPU generator reads 32 bits of a seed. This keeps a run's steps apart, and runs far from each other.
    return (seed * 0x9E3779B1 + step) % 2**32
