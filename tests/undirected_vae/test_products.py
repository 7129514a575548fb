# SPDX-License-Identifier: Apache-2.0
"""Products of float32 matrices are computed in float32, and PyTorch's settings outlast a training step."""

from collections.abc import Iterator

import deviceless
import pytest
import torch

from undirected_vae import products
from undirected_vae.train import Trainer


@pytest.fixture(params=["highest", "high", "medium"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("shape", [(100, 784, 200), (100, 200, 10_000), (10_000, 100, 200), (3, 5, 7)])
def test_products_have_the_digits_of_float32(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    m, k, n = shape
    a, b = torch.randn(m, k), torch.randn(k, n)
    with products.fast_products(torch.device("cpu")):
        error = (a @ b).double() - a.double() @ b.double()
    # Rounding the factors to TF32 gives 2^-12, to bfloat16 2^-9.
    assert error.abs().max() < 2**-19 * (a.abs() @ b.abs()).max()


def test_a_step_keeps_the_precision_that_was_set(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(deviceless.CONFIGS["undirected-bipartite-shared"], deviceless.images(), torch.device("cpu"))
    during = []
    make = trainer._make_step
    monkeypatch.setattr(products, "ONEDNN_ROUNDS", False)
    monkeypatch.setattr(trainer, "_make_step", lambda: (during.append(torch.get_float32_matmul_precision()), make()))
    trainer.advance(1)
    monkeypatch.setattr(products, "ONEDNN_ROUNDS", True)
    trainer.advance(1)
    assert during == ["medium", precision]
    monkeypatch.setattr(products, "ONEDNN_ROUNDS", False)
    monkeypatch.setattr(trainer, "_make_step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.advance(1)
    assert torch.get_float32_matmul_precision() == precision


def test_the_trial_tells_rounded_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    product = torch.Tensor.__matmul__
    for dtype in (torch.bfloat16, torch.float16):

        def rounded(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype = dtype) -> torch.Tensor:
            return product(a.to(dtype).float(), b.to(dtype).float())

        monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
        assert products._onednn_rounds()
    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    assert products._onednn_rounds() == products.ONEDNN_ROUNDS
    with torch.device("meta"):
        assert products._onednn_rounds() == products.ONEDNN_ROUNDS
