# SPDX-License-Identifier: Apache-2.0
"""Philox, random words, fixed point and threshold: compiled and Python versions against published or exact values."""

import math
import platform
from fractions import Fraction

import numpy as np
import pytest
import torch
from graph_support import ROUTES
from support import names_listed

from gibbs_ext import _C, coupling_resolution, ops, reference

# Random123's kat_vectors, philox4x32 10.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("philox", [_C.philox, reference.philox], ids=["compiled", "reference"])
@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(philox, counter, key, answer):
    assert tuple(int(word) for word in philox(counter, key)) == answer


def test_random_word_agrees_with_reference():
    rng = np.random.default_rng(0)
    numbers = [(0, 0, 0), (-1, 2**48 - 1, 2**44 - 1), (2**63 - 1, 2**32, 2**32), (-(2**63), 2**32 - 1, 2**32 - 1)]
    numbers += [tuple(int(x) for x in rng.integers(0, (2**62, 2**48, 2**44))) for _ in range(20)]
    units = [*range(130), 255, 256, 1000, 4095]
    for seed, chain, sweep in numbers:
        words = reference.random_words(seed, np.array([chain]), sweep, 4096)[0]
        for unit in units:
            assert _C.random_word(seed, chain, sweep, unit) == int(words[unit]), (seed, chain, sweep, unit)


def test_random_words_depend_on_every_number_and_never_repeat():
    """Each field of the counter changes the words. A dropped field would repeat them; chance repeats only a few."""
    base = {"seed": 5, "chain": 3, "sweep": 9}
    words = {tuple(base.values()): reference.random_words(5, np.array([3]), 9, 300)[0]}
    for name in base:
        for bit in range({"seed": 64, "chain": 48, "sweep": 44}[name]):
            changed = {**base, name: base[name] ^ 1 << bit}
            row = reference.random_words(changed["seed"], np.array([changed["chain"]]), changed["sweep"], 300)[0]
            words[tuple(changed.values())] = row
    drawn = np.concatenate(list(words.values()))
    assert len(words) == 1 + 64 + 48 + 44
    # Birthday collisions among n random words: n^2 / 2^33 on average, 0.26 here.
    assert len(drawn) - len(np.unique(drawn)) <= 8


@pytest.mark.parametrize("function", [_C.threshold, reference.threshold], ids=["compiled", "reference"])
def test_threshold_limits(function):
    x = np.array([0, -0.0, np.inf, -np.inf, 3.4e38, -3.4e38, 90, -90, 1e-45, -1e-45], np.float32)
    t = function(x)
    assert t.dtype == np.uint32
    assert t.tolist() == [2**31, 2**31, 2**32 - 1, 0, 2**32 - 1, 0, 2**32 - 1, 0, 2**31, 2**31]


@pytest.mark.parametrize("function", [_C.acceptance, reference.acceptance], ids=["compiled", "reference"])
def test_acceptance_limits(function):
    x = np.array([-1e-45, -1e-9, -22.18, -22.181, -90, -3.4e38, -np.inf], np.float32)
    t = function(x)
    assert t.dtype == np.uint32
    assert t.tolist() == [2**32 - 1, 2**32 - 1, 1, 0, 0, 0, 0]


def threshold_inputs() -> np.ndarray:
    """A million float32 values: every exponent, many where the sigmoid changes, both sides of every rounding of n."""
    patterns = np.random.default_rng(1).integers(0, 2**32, 400_000, dtype=np.uint64).astype(np.uint32)
    any_float = patterns.view(np.float32)
    edges = (np.arange(-130, 131) + 0.5) * math.log(2)
    near = np.concatenate([np.nextafter(np.float32(edges), np.float32(s), dtype=np.float32) for s in (-1e9, 1e9)])
    return np.concatenate([any_float[~np.isnan(any_float)], np.linspace(-95, 95, 600_001, dtype=np.float32), near])


def test_threshold_is_a_sigmoid():
    x = np.sort(threshold_inputs())
    t = _C.threshold(x).astype(np.int64)
    wide = x.astype(np.float64)
    with np.errstate(over="ignore"):
        exact = np.where(wide > 0, 2**32 - 2**32 / (1 + np.exp(wide)), 2**32 / (1 + np.exp(-wide)))
    assert np.abs(t - exact).max() <= 200
    # Tails keep their relative precision until they are a few units.
    small = (wide < -1) & (exact > 1e4)
    assert (np.abs(t - exact)[small] / exact[small]).max() < 1e-3
    mirrored = _C.threshold(-x).astype(np.int64)
    saturated = np.minimum(2**32 - t, 2**32 - 1)
    assert (mirrored == saturated)[x <= 0].all()


def test_acceptance_is_an_exponential():
    x = np.sort(threshold_inputs())
    x = x[x < 0]
    t = _C.acceptance(x).astype(np.int64)
    exact = 2**32 * np.exp(x.astype(np.float64))
    assert np.abs(t - exact).max() <= 207
    assert (np.diff(t) >= 0).all()
    small = (x < -1) & (exact > 1e4)
    assert (np.abs(t - exact)[small] / exact[small]).max() < 1e-3


COUPLINGS = {
    "normal": np.random.default_rng(2).standard_normal((20, 30)),
    "one": np.array([[0.7]]),
    "power of two": np.full((3, 5), 0.25),
    "just below": np.full((4, 4), np.nextafter(1.0, 0)),
    "zero": np.zeros((3, 2)),
    "huge": np.array([[1e38, -1.2e38], [1.0, 1e-30]]),
    "tiny": np.array([[1e-37, 3e-38]]),
    "subnormal": np.array([[1e-45, 0.0], [2e-45, -1e-45]]),
    "wide range": np.array([[1e30, 1e-30, 1.0], [-1e-38, 5e29, 0.0]]),
    "row": np.random.default_rng(3).standard_normal((1, 129)),
    "column": np.random.default_rng(4).standard_normal((100, 1)) * 1e-3,
    "equal large": np.full((33, 31), 3e5),
    "sums beyond float32": np.full((4, 5), 1.6e38) * np.array([1, -1, 1, -1, 1]),
}


@pytest.mark.parametrize("name", COUPLINGS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_round_couplings(name, dtype):
    weight = COUPLINGS[name].astype(dtype)
    rounded, k = _C.round_couplings(weight)
    expected, expected_k = reference.round_couplings(weight)
    assert k == expected_k <= 30
    np.testing.assert_array_equal(rounded, expected)
    assert rounded.dtype == np.int32
    # No sum can leave 31 bits, and one more bit of k would break the contract's bound (or k is at its cap).
    magnitude = np.abs(rounded.astype(np.int64))
    assert max(magnitude.sum(0).max(), magnitude.sum(1).max()) <= 2**31 - 1
    # Each is exactly the nearest multiple of 2^-k.
    for q, w in zip(rounded.flat, weight.flat, strict=True):
        scaled = Fraction(float(w)) * Fraction(2) ** k
        assert abs(q - scaled) <= Fraction(1, 2)
        assert abs(q - scaled) < Fraction(1, 2) or q % 2 == 0
    if np.abs(weight).max() > 1e-20:
        assert k == 30 or max(magnitude.sum(0).max(), magnitude.sum(1).max()) > 2**28, "resolution was given away"


def test_round_couplings_is_the_largest_safe_k():
    """k follows from the contract's definition, here in exact rationals."""
    rng = np.random.default_rng(5)
    for n1, n2 in [(1, 1), (1, 7), (5, 3), (16, 16), (17, 40)]:
        for scale in (1e-4, 0.3, 1.0, 77.0, 1e9):
            weight = (rng.standard_normal((n1, n2)) * scale).astype(np.float32)
            degree = max(n1, n2)
            exponent = math.frexp(float(np.abs(weight).max()))[1]
            bits = 30 - math.ceil(math.log2(degree))
            q = [[math.ceil(abs(Fraction(float(w))) * Fraction(2) ** (bits - exponent)) for w in row] for row in weight]
            largest = max([sum(row) for row in q] + [sum(column) for column in zip(*q, strict=True)])
            limit = 2**31 - 1 - math.ceil(degree / 2)
            allowed = [k for k in range(-200, 31) if largest * Fraction(2) ** (k + exponent - bits) <= limit]
            assert _C.round_couplings(weight)[1] == max(allowed)


def test_coupling_resolution():
    weight = torch.randn(3, 2, 20, 30)
    expected = [2.0 ** -reference.round_couplings(w.numpy())[1] for w in weight.reshape(-1, 20, 30)]
    assert coupling_resolution(weight).tolist() == torch.tensor(expected, dtype=torch.float64).reshape(3, 2).tolist()
    assert coupling_resolution(torch.zeros(4, 4)).item() == 2.0**-30
    assert coupling_resolution(torch.zeros(0, 4, 4)).shape == (0,)


def test_uniform_is_inside_the_unit_interval():
    words = np.array([0, 2**32 - 1, 2**31], np.uint32)
    for dtype in (torch.float32, torch.float64):
        u = torch.from_numpy(reference.uniform(words, dtype)).to(dtype)
        assert (u > 0).all()
        assert (u < 1).all()


def test_build_info_says_what_was_built():
    info = ops.build_info()
    has_simd = platform.machine() in ("x86_64", "AMD64")
    assert info["cpu_instruction_sets"] == (("baseline", "avx2", "avx512") if has_simd else ("baseline",))
    assert ops.instruction_set() == info["instruction_set"]
    assert ops.instruction_set() in info["cpu_instruction_sets"]
    with pytest.raises(ValueError, match=r"^set_instruction_set: name must be ") as caught:
        ops.set_instruction_set("mmx")
    assert names_listed(caught.value) == ["auto", "baseline", "avx2", "avx512"]


def test_the_routes_of_a_graph_are_these():
    with pytest.raises(ValueError, match=r"^set_graph_route: name must be ") as caught:
        ops.set_graph_route("fast")
    assert names_listed(caught.value) == ["auto", *ROUTES]


@pytest.mark.parametrize("name", COUPLINGS)
def test_every_instruction_set_rounds_couplings_alike(instruction_set, name):
    for dtype in (np.float32, np.float64):
        weight = COUPLINGS[name].astype(dtype)
        for view in (weight, weight[::-1], np.asfortranarray(weight)):
            rounded, k = _C.round_couplings(view)
            expected, expected_k = reference.round_couplings(view)
            assert k == expected_k
            np.testing.assert_array_equal(rounded, expected)


@pytest.mark.parametrize("name", ["threshold", "acceptance"])
def test_every_instruction_set_has_the_same_threshold(name, instruction_set):
    x = threshold_inputs()
    compiled, expected = getattr(_C, name), getattr(reference, name)
    np.testing.assert_array_equal(compiled(x), expected(x))
    for size in (1, 3, 31, 33):  # partial vectors
        np.testing.assert_array_equal(compiled(x[:size]), expected(x[:size]))


def test_every_instruction_set_draws_the_same_words(instruction_set):
    for seed, chain, sweep in [(0, 0, 0), (-1, 2**48 - 1, 2**44 - 1), (2**40 + 5, 2**33 + 1, 2**35 + 7)]:
        for units in (1, 3, 31, 33, 127, 128, 129, 1000):
            np.testing.assert_array_equal(
                _C.random_words(seed, chain, sweep, units),
                reference.random_words(seed, np.array([chain]), sweep, units)[0],
            )
