# SPDX-License-Identifier: Apache-2.0
"""Numbers that differ from step to step, as tensors on the device, where a captured step reads them without waiting."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .config import Config

ROWS = 100  # number of steps whose numbers go to the device together


class Row(NamedTuple):
    """The numbers of one step; a table of several steps has a first dimension of size ROWS."""

    rate: Tensor  # [] learning rate
    weight: Tensor  # [] weight of the KL term, or of the entropy in structured prediction
    average_weight: Tensor  # [] weight of the new parameters in their moving average
    seeds: Tensor  # [3] int64: seeds of the images' bits, the posterior's sampler and the prior's sampler
    indices: Tensor  # [B] int64: numbers of the training images
    noise: Tensor  # [B, 6] noise of the augmentation; [0, 6] without augmentation


class Feed:
    """Gives out the rows of a table on the device, in turn. A row depends on the settings and the step alone."""

    def __init__(self, config: Config, dataset_size: int, device: torch.device) -> None:
        self.config, self.dataset_size, self.device = config, dataset_size, device
        self._first = self._next = 0  # the steps of the first row and of the next row
        self._order, self._epoch = torch.empty(0, device="cpu"), -1
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        self._table = Row(*(rows.to(device) for rows in self._rows(0)))

    def seek(self, step: int) -> None:
        """Continues from this step."""
        self._next = step
        self._fill()

    def prepare(self) -> None:
        """Puts the numbers of the next steps into the table if all its rows are used. Call it before each step."""
        if self._next == self._first + ROWS:
            self._fill()
        self._next += 1

    def take(self) -> Row:
        """Returns the next row. Only tensors are read and changed, so that a CUDA graph can replay it."""
        row = Row(*(rows.index_select(0, self._row)[0] for rows in self._table))
        self._row += 1
        return row

    def _fill(self) -> None:
        self._first = self._next
        for rows, new in zip(self._table, self._rows(self._first), strict=True):
            # A copy from pinned memory does not wait, and PyTorch keeps that memory until the copy is made.
            is_pinned = self.device.type == "cuda" and torch.cuda.is_available()
            rows.copy_(new.pin_memory() if is_pinned else new, non_blocking=True)
        self._row.zero_()

    def _rows(self, start: int) -> Row:
        """The numbers of the steps from `start` on, as tensors on the CPU."""
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
            # The strength falls to 0, so that the last steps see the images as they are.
            strength = torch.tensor([config.augment * (1 - part) for part in progress])
            draws = [torch.randn(config.batch_size, 6, generator=generator) for generator in generators]
            noise = strength[:, None, None] * torch.stack(draws)
        return Row(
            torch.tensor([config.learning_rate * learning_rate(config.schedule, part) for part in progress]),
            torch.tensor([term_weight(config, part) for part in progress]),
            # The first steps take a plain mean, because a fixed decay would keep the random start for long.
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
    """The factor of the base rate when the fraction `progress` of the training is done."""
    if schedule == "cosine":
        return min(1.0, 0.1 + progress / 0.02) * 0.5 * (1 + math.cos(math.pi * progress))
    for end, factor in ((0.02, 0.1), (0.6, 1.0), (0.75, 1 / 3), (0.95, 0.1)):
        if progress < end:
            return factor
    return 1 / 33


def term_weight(config: Config, progress: float) -> float:
    """The weight of the KL term, which rises to 1, or of the entropy in structured prediction, which falls from 1."""
    part = min(1.0, progress / config.kl_warmup) if config.kl_warmup else 1.0
    return part if config.task == "density" else 1 - part * (1 - config.entropy_weight)


def step_seed(seed: int, step: int) -> int:
    # PyTorch's CPU generator reads 32 bits of a seed. The product sets the seeds of different runs far apart.
    return (seed * 0x9E3779B1 + step) % 2**32
