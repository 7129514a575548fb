# SPDX-License-Identifier: Apache-2.0
"""A step of `make train`, with gibbs_ext, with plain PyTorch in its place, and without sampling.

`python -m bench.training_step` counts the launches, bytes and products of a step of the paper's presets on a GPU, by
running it on tensors without values.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from undirected_vae.config import Config, resolve
from undirected_vae.data import Dataset
from undirected_vae.products import matmul_precision
from undirected_vae.train import Trainer

from .bipartite_gibbs import rand, torch_sweeps
from .bipartite_gibbs_relaxed import torch_relaxed
from .harness import Case, benchmark_of
from .tables import OURS, WITHOUT_SAMPLING
from .texts import duration

SHAPE = (28, 28)


def as_models(left: Tensor, left_bias: Tensor, right_bias: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Turns gibbs_ext's [..., n] into the peers' [M, C, n]: many chains of one model, or one chain of each model."""
    if weight.dim() == 2:
        biases = (b.expand(*left.shape[:-1], -1).flatten(0, -2)[None] for b in (left_bias, right_bias))
        return left.flatten(0, -2)[None], *biases, weight[None]
    return left.movedim(-3, -2), left_bias[:, None], right_bias[:, None], weight


# The trainer's "medium" makes the peer's transposed products 100 times slower.
@matmul_precision("highest")
def peer_gibbs(left: Tensor, left_bias: Tensor, right_bias: Tensor, weight: Tensor, num_sweeps: int, **_: Any) -> Any:
    return tuple(t.squeeze(0) for t in torch_sweeps(*as_models(left, left_bias, right_bias, weight), num_sweeps, rand))


@matmul_precision("highest")
def peer_relaxed(
    left: Tensor, left_bias: Tensor, right_bias: Tensor, weight: Tensor, num_sweeps: int, num_relaxed: int, **_: Any
) -> Any:
    start, *model = as_models(left.to(weight.dtype), left_bias, right_bias, weight)
    with torch.no_grad():
        state, _right = torch_sweeps(start, *model, num_sweeps, rand)
    outputs = (*torch_relaxed(state, *model, 0, num_relaxed, rand), state)
    return (t.reshape(*left.shape[:-1], t.shape[-1]) for t in outputs)


def no_gibbs(left: Tensor, left_bias: Tensor, right_bias: Tensor, weight: Tensor, num_sweeps: int, **_: Any) -> Any:
    return left, left.new_zeros(*left.shape[:-1], weight.shape[-1])


def no_relaxed(
    left: Tensor, left_bias: Tensor, right_bias: Tensor, weight: Tensor, num_sweeps: int, num_relaxed: int, **_: Any
) -> Any:
    # The results depend on each parameter, so that the encoder's backward pass is complete.
    mean = torch.sigmoid(left_bias + weight.sum(-1)).expand(left.shape)
    return mean, torch.sigmoid(right_bias).expand(*left.shape[:-1], -1), mean, left


def step_with(
    coupling: str, gibbs: Callable[..., Any] | None, relaxed: Callable[..., Any] | None
) -> Callable[[], object]:
    torch.manual_seed(1)
    config = Config(coupling=coupling)
    gray = (torch.bernoulli(torch.full((config.batch_size, math.prod(SHAPE)), 0.2)) * 255).to(torch.uint8)
    trainer = Trainer(config, Dataset(gray, gray, gray, SHAPE, "noise"), torch.get_default_device(), capture=False)

    def step() -> None:
        with ExitStack() as stack:
            if gibbs and relaxed:
                stack.enter_context(patch("gibbs_ext.models.bipartite.bipartite_gibbs", gibbs))
                stack.enter_context(patch("gibbs_ext.models.bipartite.bipartite_gibbs_relaxed", relaxed))
            trainer.advance(1)

    return step


def cases() -> Iterator[Case]:
    for coupling in ("shared", "per_sample"):
        yield Case(
            f"step of `make train`, default settings, {coupling} coupling",
            lambda coupling=coupling: coupling,
            {
                OURS: lambda coupling: step_with(coupling, None, None),
                "PyTorch, rand": lambda coupling: step_with(coupling, peer_gibbs, peer_relaxed),
                WITHOUT_SAMPLING: lambda coupling: step_with(coupling, no_gibbs, no_relaxed),
            },
            is_capturable=False,  # Trainer captures by itself
        )


training_step = benchmark_of(cases, "training_step")


def count(preset: str) -> tuple[int, int, int]:
    """Launches, bytes of operands and FLOP of matrix products of a step, without the inside of the samplers.

    Each operator of PyTorch or of gibbs_ext counts as one launch.
    """
    from .cuda_report import Operators  # its import makes the tests' modules importable

    import deviceless  # isort: skip

    config = resolve(preset)
    gray = torch.zeros(10 * config.batch_size, math.prod(SHAPE), dtype=torch.uint8)
    with deviceless.ready("cpu"):
        trainer = Trainer(config, Dataset(gray, gray, gray, SHAPE, "none"), torch.device("cpu"))
        trainer.advance(1)
        with Operators() as operators:
            trainer.advance(1)
    return operators.launches, operators.bytes, operators.flops


def main() -> None:
    from .cuda_report import GRAPH_LAUNCH, HISTORY, LAUNCH, LIMITS

    eager_launch = LAUNCH + json.loads(HISTORY.read_text())["host_seconds"]["operator"]

    for preset in ("paper-mnist-200", "paper-mnist-400"):
        launches, moved, products = count(preset)
        print(
            f"{preset}: {launches} operators, {moved / 1e6:.0f} MB, {products / 1e9:.2f} GFLOP. On an H100, beside the "
            f"samplers, at least {duration(GRAPH_LAUNCH * launches)} of launches captured, "
            f"{duration(eager_launch * launches)} not, {duration(moved / LIMITS['H100'].memory)} of memory"
        )


if __name__ == "__main__":
    main()
