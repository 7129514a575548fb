# SPDX-License-Identifier: Apache-2.0
"""The helpers must fail when they should."""

import pytest
import torch
from support import (
    all_states,
    assert_close,
    assert_same_bits,
    awkward,
    chi_square_excess,
    exact_probabilities,
    random_parameters,
)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.tensor([1.0, float("nan")]),
        torch.tensor([1.0, -2.0]),
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([1.0]),
        torch.tensor([1.0, 2.0], dtype=torch.float64),
    ],
    ids=["nan", "sign", "shape", "short", "dtype"],
)
def test_assert_same_bits_fails(wrong: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        assert_same_bits(wrong, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("wrong", [[1.0, float("nan")], [1.0, float("inf")], [1.0, -2.0], [1.0, 2.1], [1.0]])
def test_assert_close_fails(wrong: list[float]) -> None:
    expected = torch.tensor([1.0, 2.0])
    assert_close(torch.tensor([1.0, 2.001]), expected, 1e-2)
    with pytest.raises(AssertionError):
        assert_close(torch.tensor(wrong), expected, 1e-2)
    with pytest.raises(AssertionError):
        assert_close(expected, torch.tensor([1.0, float("nan")]), 1e9)


def test_chi_square_passes_the_truth_and_fails_a_small_lie() -> None:
    p = exact_probabilities(random_parameters(3, 3))
    draws = all_states(6)[torch.multinomial(p, 200_000, replacement=True)]
    assert chi_square_excess(draws, p) < 1
    lie = p.clone()
    lie[p.argmax()] *= 0.9
    assert chi_square_excess(draws, lie / lie.sum()) > 1


@pytest.mark.parametrize("how", ["transposed", "strided", "offset"])
def test_awkward_keeps_values(how: str) -> None:
    tensor = torch.randn(3, 5)
    moved = awkward(tensor, how)
    assert moved.equal(tensor)
    assert how == "offset" or not moved.is_contiguous()
