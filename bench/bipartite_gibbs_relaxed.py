# SPDX-License-Identifier: Apache-2.0
"""Binary sweeps, one relaxed sweep (pwl) and the backward pass, a weight per model, against PyTorch's autograd."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import gibbs_ext as gx

from . import limits
from .bipartite_gibbs import bernoulli, compiled, compiled_sweeps, draws, rand, torch_sweeps
from .harness import Call, Case, benchmark_of, on_gpu, warm
from .tables import OURS

SHARPNESS = 4.0


def relax(q: Tensor) -> Tensor:
    slope = SHARPNESS / 4 / (q * (1 - q) + 1e-2)
    return (0.5 + slope * (torch.rand_like(q) - (1 - q))).clamp(0, 1)


def torch_relaxed(
    left: Tensor,
    left_bias: Tensor,
    right_bias: Tensor,
    weight: Tensor,
    num_sweeps: int,
    num_relaxed_sweeps: int,
    draw: Callable[[Tensor, Tensor], object],
) -> tuple[Tensor, Tensor, Tensor]:
    """Binary sweeps, then relaxed ones. States are [M, C, n], as in torch_sweeps."""
    with torch.no_grad():
        left, _right = torch_sweeps(left, left_bias, right_bias, weight, num_sweeps, draw)
    return relaxed_sweeps(left, left_bias, right_bias, weight, num_relaxed_sweeps)


def relaxed_sweeps(
    left: Tensor, left_bias: Tensor, right_bias: Tensor, weight: Tensor, num_sweeps: int
) -> tuple[Tensor, Tensor, Tensor]:
    right = left_mean = left
    for _ in range(num_sweeps):
        right = relax(torch.sigmoid(torch.baddbmm(right_bias, left, weight)))
        left_mean = torch.sigmoid(torch.baddbmm(left_bias, right, weight.mT))
        left = relax(left_mean)
    return left, right, left_mean


def compiled_relaxed(left: Tensor, *parameters: Tensor, num_sweeps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Does the same as torch_relaxed with one relaxed sweep, compiled by torch.compile."""
    with torch.no_grad():
        left, _right = compiled_sweeps(left, *parameters, num_sweeps)
    outputs: tuple[Tensor, Tensor, Tensor] = compiled(relaxed_sweeps)(left, *parameters, 1)
    return outputs


def case(models: int, n: int, num_sweeps: int) -> Case:
    def inputs() -> tuple[Tensor, list[Tensor], list[Tensor]]:
        left, *parameters = draws(models, 1, n, n)
        grads = [torch.randn(models, 1, n) for _ in range(3)]
        return left, [p.requires_grad_() for p in parameters], grads

    def ours(inputs: tuple[Tensor, list[Tensor], list[Tensor]]) -> Call:
        left, parameters, grads = inputs[0][:, 0], *([t.detach().squeeze(1) for t in part] for part in inputs[1:])
        leaves = [p.requires_grad_() for p in parameters]

        def run() -> object:
            outputs = gx.bipartite_gibbs_relaxed(left, *leaves, num_sweeps, 1, sharpness=SHARPNESS, seed=1)
            return torch.autograd.grad(outputs, leaves, grads)

        return run

    def peer(forward: Callable[..., tuple[Tensor, ...]]) -> Callable[[Any], Call]:
        def prepare(inputs: tuple[Tensor, list[Tensor], list[Tensor]]) -> Call:
            left, parameters, grads = inputs
            return lambda: torch.autograd.grad(forward(left, *parameters), parameters, grads)

        return prepare

    return Case(
        f"{models} models, {n}+{n}, {num_sweeps} + 1 sweeps and backward",
        inputs,
        {
            OURS: ours,
            "PyTorch, rand": peer(lambda *args: torch_relaxed(*args, num_sweeps, 1, rand)),
            "PyTorch, bernoulli": peer(lambda *args: torch_relaxed(*args, num_sweeps, 1, bernoulli)),
            "torch.compile": lambda inputs: warm(
                peer(lambda *args: compiled_relaxed(*args, num_sweeps=num_sweeps))(inputs)
            ),
        },
        updates=models * 2 * n * (num_sweeps + 1),
        work=limits.bipartite(models, 1, n, n, num_sweeps, backward=True),
        # Gradients of each model, by their mean sizes.
        statistics=lambda inputs, grads: [g.reshape(models, -1).abs().mean(-1) for g in grads],
    )


def cases() -> Iterator[Case]:
    if on_gpu():
        yield case(128, 100, 10)
        yield case(4096, 200, 10)
        return
    yield case(128, 100, 40)
    yield case(128, 200, 40)


bipartite_gibbs_relaxed = benchmark_of(cases, "bipartite_gibbs_relaxed")
