# SPDX-License-Identifier: Apache-2.0
"""The helpers must fail when they should."""

import ctypes
import hashlib

import pytest
import torch
from support import (
    all_states,
    assert_close,
    assert_same_bits,
    awkward,
    chi_square_excess,
    exact_probabilities,
    longest_standstill,
    random_parameters,
    untouched,
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


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        (torch.tensor([1.0, 2.0]), 2.5),
        (torch.tensor([1.0, float("nan")]), 2.0),
        (torch.tensor([1.0, 2.0]), float("nan")),
        (torch.tensor([1.0, 0.0]), -0.0),
        (torch.tensor([1.0, 2.0], dtype=torch.bfloat16), 3.0),
        (torch.tensor([True, False]), True),
        (torch.ones(2, dtype=torch.complex64), 1j),
        (torch.ones(4, 2)[::2, 1], 0.0),
    ],
)
def test_untouched_fails(tensor: torch.Tensor, value: complex) -> None:
    with untouched(tensor=tensor, number=torch.tensor(3), nothing=torch.zeros(0)):
        pass
    with pytest.raises(AssertionError, match="tensor was changed"), untouched(number=torch.tensor(3), tensor=tensor):
        tensor[-1] = value


def test_longest_standstill_sees_a_held_gil() -> None:
    assert longest_standstill(lambda: ctypes.PyDLL(None).usleep(500_000)) > 0.5
    assert longest_standstill(lambda: ctypes.CDLL(None).usleep(500_000)) < 0.5
    # Released in the first half of the time only.
    data = bytes(10**6)

    def first_half() -> None:
        for _ in range(100):
            hashlib.sha256(data)
        ctypes.PyDLL(None).usleep(900_000)

    assert longest_standstill(first_half) > 0.3
