# SPDX-License-Identifier: Apache-2.0
"""Minibatches of BernoulliRBM.fit, ours and scikit-learn's, with the same parameters and from the same weights."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .harness import Call, Case, benchmark_of
from .tables import OURS

Array = np.ndarray
N1, N2, NUM_DATA = 784, 256, 2000


def draws(dtype: str) -> Array:
    """Images [NUM_DATA, N1]: bits that are 1 with a probability of 0.2."""
    return (np.random.default_rng(1).random((NUM_DATA, N1)) < 0.2).astype(dtype)


def fit(make: Callable[..., Any], data: Array, batch_size: int) -> Call:
    model = make(N2, batch_size=batch_size, n_iter=1, random_state=1)
    return lambda: model.fit(data)


def ours(data: Array, batch_size: int) -> Call:
    from gibbs_ext.interop.sklearn import BernoulliRBM

    return fit(BernoulliRBM, data, batch_size)


def theirs(data: Array, batch_size: int) -> Call:
    from sklearn.neural_network import BernoulliRBM

    return fit(BernoulliRBM, data, batch_size)


def statistics(data: Array, model: Any) -> list[Tensor]:
    """The biases of the pixels, and for each pixel the size of its weights."""
    return [torch.as_tensor(model.intercept_visible_), torch.as_tensor(model.components_).norm(dim=0)]


def cases() -> Iterator[Case]:
    for batch_size in (10, 100):  # 10 is the default
        for dtype in ("float64", "float32"):
            makes = {OURS: ours, "scikit-learn": theirs}
            yield Case(
                f"BernoulliRBM.fit, {N1}+{N2}, a minibatch of {batch_size} images in {dtype}",
                functools.partial(draws, dtype),
                {name: functools.partial(make, batch_size=batch_size) for name, make in makes.items()},
                calls=NUM_DATA // batch_size,
                statistics=statistics,
            )


interop_sklearn = benchmark_of(cases, "interop_sklearn")
