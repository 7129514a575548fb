# SPDX-License-Identifier: Apache-2.0
"""PNG pictures, each written whole or not at all."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure  # not pyplot, which would choose a backend for the whole process
from matplotlib.image import imsave
from torch import Tensor
from torch.nn import functional as F

from .runs import atomic_write


def tile(images: Tensor, shape: tuple[int, int], columns: int) -> np.ndarray[Any, Any]:
    """Puts images [N, height * width] in [0, 1] into one array [H, W], row by row, with a gray line between them."""
    height, width = shape[0] + 1, shape[1] + 1
    rows = math.ceil(len(images) / columns)
    canvas = np.full((rows * height + 1, columns * width + 1), 0.5, dtype=np.float32)
    for number, image in enumerate(images.float().numpy()):
        top, left = number // columns * height + 1, number % columns * width + 1
        canvas[top : top + shape[0], left : left + shape[1]] = image.reshape(shape)
    return canvas


def grid(path: Path, images: Tensor, shape: tuple[int, int], columns: int = 10, zoom: int = 3) -> Path:
    """Writes a grid of images."""
    canvas = tile(images, shape, columns).repeat(zoom, 0).repeat(zoom, 1)
    buffer = io.BytesIO()
    imsave(buffer, canvas, cmap="gray", vmin=0, vmax=1, format="png")
    atomic_write(path, buffer.getvalue())
    return path


def pairs(path: Path, originals: Tensor, reconstructions: Tensor, shape: tuple[int, int], columns: int = 10) -> Path:
    """Writes rows of originals, each above the row of their reconstructions."""
    blocks = []
    for start in range(0, len(originals), columns):
        for images in (originals, reconstructions):
            row = images[start : start + columns]
            blocks.append(F.pad(row, (0, 0, 0, columns - len(row))))
    return grid(path, torch.cat(blocks), shape, columns)


def differences(path: Path, panels: Mapping[str, Sequence[tuple[str, float, float]]], label: str) -> Path:
    """Writes a plot of differences with error bars: one panel for each group, one line for each (name, value, error).

    A value that is NaN is that of the row to which the others are compared.
    """
    names = list(dict.fromkeys(name for rows in panels.values() for name, *_ in rows))
    figure = Figure(figsize=(1.5 + 3.2 * len(panels), 1.2 + 0.32 * len(names)), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (group, rows) in zip(all_axes, panels.items(), strict=True):
        for name, value, error in rows:
            middle, bar = (0.0 if math.isnan(number) else number for number in (value, error))
            axes.errorbar(middle, names.index(name), xerr=bar, fmt="o", color="C0", capsize=3)
        axes.axvline(0, color="gray", linewidth=1)
        axes.set_title(group)
        axes.locator_params(axis="x", nbins=5)  # more labels run into each other
        axes.grid(alpha=0.3)
    all_axes[0].set_yticks(range(len(names)), names)
    all_axes[0].invert_yaxis()
    figure.supxlabel(label, fontsize=10)
    return save(path, figure)


def dots(path: Path, panels: Mapping[str, Mapping[str, Sequence[tuple[str, float, float]]]], label: str) -> Path:
    """Writes a plot of positive values with error bars.

    There is one panel for each toy, one marker for each series in it, and one line for each (name, value, error).
    """
    names = list(dict.fromkeys(name for series in panels.values() for rows in series.values() for name, *_ in rows))
    figure = Figure(figsize=(2 + 2.6 * len(panels), 1.6 + 0.42 * len(names)), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, series) in zip(all_axes, panels.items(), strict=True):
        for number, (kind, rows) in enumerate(series.items()):
            places = [names.index(name) + 0.18 * (number - (len(series) - 1) / 2) for name, *_ in rows]
            values, errors = [value for _, value, _ in rows], [error for *_, error in rows]
            axes.errorbar(
                values, places, xerr=errors, fmt="os^D"[number % 4], label=kind, capsize=3, markersize=5, linewidth=1
            )
        axes.set_title(title)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3, axis="x")
        for place in range(1, len(names)):
            axes.axhline(place - 0.5, color="0.85", linewidth=0.8)
    all_axes[0].set_yticks(range(len(names)), names)
    all_axes[0].invert_yaxis()
    figure.supxlabel(label, fontsize=10)
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    atomic_write(path, buffer.getvalue())
    return path


def curves(path: Path, metrics: Sequence[Mapping[str, float]]) -> Path:
    """Writes a plot of the ELBO of training and validation images over the steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    elbos = [line[name] for line in metrics for name in ("elbo", "validation_elbo") if name in line]
    for name, label, style in (("elbo", "training batch", "-"), ("validation_elbo", "validation", "o-")):
        points = [(line["step"], line[name]) for line in metrics if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=3)
    # The first steps' values would hide all the others.
    best, low = max(elbos), float(np.quantile(elbos, 0.1))
    axes.set_ylim(low - 1, best + 0.1 * (best - low) + 1)
    axes.set(xlabel="step", ylabel="ELBO [nats]")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return save(path, figure)


def save(path: Path, figure: Figure) -> Path:
    """Writes a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    atomic_write(path, buffer.getvalue())
    return path
