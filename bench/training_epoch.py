# SPDX-License-Identifier: Apache-2.0
"""An epoch of persistent contrastive divergence, as scikit-learn's BernoulliRBM makes it: one sweep a batch."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import gibbs_ext as gx

from .harness import Call, Case, benchmark_of, on_gpu
from .tables import OURS

N1, N2, BATCH, RATE = 784, 256, 100, 0.1
# From the right units and the model: the left units given them, right units given those, and the means of the latter.
Sweep = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def draws(num_data: int) -> Tensor:
    """Images [num_data, N1]: bits that are 1 with a probability of 0.2."""
    torch.manual_seed(1)
    return torch.bernoulli(torch.full((num_data, N1), 0.2))


def epoch(data: Tensor, sweep: Sweep) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the biases and the weight. The right units of the chains are kept from batch to batch."""
    left_bias, right_bias, weight = torch.zeros(N1), torch.zeros(N2), 0.01 * torch.randn(N1, N2)
    right = torch.zeros(BATCH, N2)
    for batch in data.split(BATCH):
        given_data = torch.addmm(right_bias, batch, weight).sigmoid_()
        left, right, given_left = sweep(right, left_bias, right_bias, weight)
        rate = RATE / len(batch)
        weight.addmm_(batch.T, given_data, alpha=rate).addmm_(left.T, given_left, alpha=-rate)
        left_bias.add_(batch.sum(0) - left.sum(0), alpha=rate)
        right_bias.add_(given_data.sum(0) - given_left.sum(0), alpha=rate)
    return left_bias, right_bias, weight


def our_sweep(right: Tensor, left_bias: Tensor, right_bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # The model with its sides exchanged, because a sweep updates the other side first.
    new_right, left = gx.bipartite_gibbs(right, right_bias, left_bias, weight.T, 1)
    return left, new_right, torch.addmm(right_bias, left, weight).sigmoid_()


def torch_sweep(right: Tensor, left_bias: Tensor, right_bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p = torch.addmm(left_bias, right, weight.T).sigmoid_()
    left = torch.rand_like(p).lt_(p)
    given_left = torch.addmm(right_bias, left, weight).sigmoid_()
    return left, torch.rand_like(given_left).lt_(given_left), given_left


def with_sklearn(data: Tensor) -> Call:
    from sklearn.neural_network import BernoulliRBM

    model = BernoulliRBM(N2, learning_rate=RATE, batch_size=BATCH, n_iter=1, random_state=1)
    array = data.numpy()

    def run() -> tuple[Any, Any, Any]:
        model.fit(array)
        return model.intercept_visible_, model.intercept_hidden_, model.components_.T

    return run


def statistics(data: Tensor, returned: tuple[Any, Any, Any]) -> list[Tensor]:
    """The left biases, and for each left unit the size of its weights."""
    left_bias, _right_bias, weight = map(torch.as_tensor, returned)
    return [left_bias, weight.norm(dim=1)]


def cases() -> Iterator[Case]:
    peers = {} if on_gpu() else {"scikit-learn": with_sklearn}
    yield Case(
        f"epoch of {10_000:,} images, {N1}+{N2}, batches of {BATCH}",
        lambda: draws(10_000),
        {
            OURS: lambda data: lambda: epoch(data, our_sweep),
            "PyTorch, rand": lambda data: lambda: epoch(data, torch_sweep),
            **peers,
        },
        statistics=statistics,
    )


training_epoch = benchmark_of(cases, "training_epoch")
