# SPDX-License-Identifier: Apache-2.0
"""Helpers of all tests: comparisons that cannot pass by accident, models, and thresholds of statistical tests."""

import contextlib
import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gibbs_ext import ops

FALSE_ALARM = 1e-6  # the probability that a statistical test fails by chance, if it is run with a fresh seed

# The batch of the state, of the couplings, and of beta.
BETA_BATCHES = {
    "a ladder of one model": ((4, 70), (), (4, 1)),
    "a ladder of single chains": ((6, 1), (), (6, 1)),
    "each chain its own": ((20,), (), (20,)),
    "only beta has this batch": ((), (), (3, 1)),
    "a ladder of models": ((3, 5, 2), (2,), (3, 1, 1)),
    "each model its own": ((5, 3), (3,), (3,)),
    "two dims apart": ((2, 3, 4), (3, 1), (2, 1, 4)),
}

# All ops of torch.ops.gibbs_ext, on every backend.
OPS = (
    "bipartite_ais",
    "bipartite_gibbs",
    "bipartite_gibbs_relaxed",
    "bipartite_gibbs_relaxed_backward",
    "bipartite_moments",
    "bipartite_tempering",
    "coupling_resolution",
    "graph_ais",
    "graph_coupling_resolution",
    "graph_edge_sums",
    "graph_fields",
    "graph_gibbs",
    "graph_gibbs_relaxed",
    "graph_gibbs_relaxed_backward",
    "graph_metropolis",
    "graph_moments",
    "graph_tempering",
)


def registered_ops() -> list[str]:
    """Names of the ops that PyTorch's dispatcher knows."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("gibbs_ext::") for name in names if name.startswith("gibbs_ext::"))


def ops_without_cuda() -> list[str]:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return [name for name in OPS if not has(f"gibbs_ext::{name}", "CUDA")]


def names_listed(error: Exception) -> list[str]:
    """The choices that an error names: "... must be a, b or c, got d"."""
    found = re.search(r" must be ([\w, ]+?), (?:got|and) ", str(error))
    assert found, error
    return re.split(r", | or ", found[1])


# Comparisons: each rejects NaN, wrong shapes and wrong dtypes -----------------------------------------------------


def assert_same_bits(actual: Sequence[Tensor] | Tensor, expected: Sequence[Tensor] | Tensor) -> None:
    """Shapes, dtypes and all values are equal; NaN equals nothing."""
    if isinstance(actual, Tensor) and isinstance(expected, Tensor):
        actual, expected = [actual], [expected]
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape, f"shape {list(a.shape)}, expected {list(e.shape)}"
        assert a.dtype == e.dtype, f"{a.dtype}, expected {e.dtype}"
        unequal = int((a != e).sum())
        assert not unequal, f"{unequal} of {a.numel()} values differ"


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """The largest difference is within ``tolerance``, times the largest magnitude expected if that exceeds 1."""
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    assert torch.isfinite(actual).all(), "not finite"
    assert torch.isfinite(expected).all(), "the expected value is not finite"
    if actual.numel():
        actual, expected = actual.detach().double(), expected.detach().double()
        error = float((actual - expected).abs().max())
        scale = max(1.0, float(expected.abs().max()))
        assert error <= tolerance * scale, f"differs by {error:.3g} where values reach {scale:.3g}"


def assert_bits(state: Tensor) -> None:
    assert ((state == 0) | (state == 1)).all(), "not bits"


def bytes_of(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


@contextlib.contextmanager
def untouched(**tensors: Tensor) -> Iterator[None]:
    """The block leaves every byte of these tensors as it was."""
    before = {name: bytes_of(tensor) for name, tensor in tensors.items()}
    yield
    for name, tensor in tensors.items():
        assert bytes_of(tensor) == before[name], f"{name} was changed"


def longest_standstill(function: Callable[[], object]) -> float:
    """The longest time that other Python threads stood still while ``function`` ran, as a share of its running time."""
    duration = 0.0

    def run() -> None:
        nonlocal duration
        start = time.perf_counter()
        function()
        duration = time.perf_counter() - start

    thread = threading.Thread(target=run)
    last, longest = time.perf_counter(), 0.0
    thread.start()
    is_over = False
    while not is_over:
        is_over = not thread.is_alive()  # a thread that ended before this one ran again is a standstill, too
        time.sleep(0.001)
        now = time.perf_counter()
        last, longest = now, max(longest, now - last)
    return longest / duration


def supported_instruction_sets() -> list[str]:
    """Names of the compiled instruction sets that this CPU has."""
    names = []
    for name in ops.build_info()["cpu_instruction_sets"]:
        with contextlib.suppress(ValueError):
            ops.set_instruction_set(name)
            names.append(name)
    ops.set_instruction_set("auto")
    return names


# Relaxed sweeps ---------------------------------------------------------------------------------------------------

# Names of relaxations, and whether their slope has a gradient. The gradient of SMOOTH ones is the derivative of their
# value; straight_through and a stopped slope have another gradient by design.
SMOOTH = [("pwl", True), ("concrete", True), ("mean_field", True)]
RELAXATIONS = [*SMOOTH, ("pwl", False), ("straight_through", True)]


def gradients(
    function: Callable[..., Sequence[Tensor]], state: Tensor, parameters: Sequence[Tensor], *args: Any, **kwargs: Any
) -> tuple[Sequence[Tensor], tuple[Tensor, ...]]:
    """Values, and gradients of a fixed random linear function of them in every input that is floating."""
    inputs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in (state, *parameters)]
    outputs = function(*inputs, *args, **kwargs)
    generator = torch.Generator().manual_seed(7)
    loss = torch.zeros((), dtype=torch.float64)
    for out in outputs:
        loss = loss + (out.double() * torch.randn(out.shape, dtype=torch.float64, generator=generator)).sum()
    return outputs, torch.autograd.grad(loss, [x for x in inputs if x.requires_grad], allow_unused=True)


def assert_only_wanted_gradients(
    function: Callable[..., Sequence[Tensor]], parameters: Sequence[Tensor], expected: Sequence[Tensor]
) -> None:
    """Whichever of the parameters require grad, these get the gradients of :func:`gradients`, and the others none."""
    for wanted in itertools.product([False, True], repeat=len(parameters)):
        leaves = [x.clone().requires_grad_(w) for x, w in zip(parameters, wanted, strict=True)]
        outputs = function(*leaves)
        assert all(out.requires_grad == any(wanted) for out in outputs)
        if any(wanted):
            generator = torch.Generator().manual_seed(7)
            sum((o * torch.randn(o.shape, dtype=o.dtype, generator=generator)).sum() for o in outputs).backward()
        for leaf, wants, gradient in zip(leaves, wanted, expected, strict=True):
            assert (leaf.grad is not None) == wants
            if wants:
                assert_same_bits(leaf.grad, gradient)


def assert_gradients_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Results of :func:`gradients`: the same are missing, and the others are close."""
    for a, e in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        assert (a is None) == (e is None)
        if e is not None:
            assert_close(a, e, tolerance)


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """L2 error of all gradients together, relative to their L2 norm."""
    pairs = list(zip(actual, expected, strict=True))
    assert all(torch.isfinite(a).all() for a, _ in pairs)
    difference = sum(float((a.double() - e).pow(2).sum()) for a, e in pairs)
    return float((difference / sum(float(e.pow(2).sum()) for _, e in pairs)) ** 0.5)


# Models -----------------------------------------------------------------------------------------------------------


class Parameters(NamedTuple):
    left_bias: Tensor
    right_bias: Tensor
    weight: Tensor


# Batch shapes of (left state, left_bias, right_bias, weight), and what they broadcast to.
BROADCASTS: dict[str, tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]] = {
    "single": (((), (), (), ()), ()),
    "shared": (((7,), (), (), ()), (7,)),
    "per_model": (((5,), (5,), (5,), (5,)), (5,)),
    "chains_of_models": (((3, 4), (4,), (4,), (4,)), (3, 4)),
    "models_of_chains": (((4, 3), (4, 1), (4, 1), (4, 1)), (4, 3)),
    "bias_per_chain": (((6,), (6,), (), ()), (6,)),
    "weight_per_chain": (((1,), (), (), (6,)), (6,)),
    "outer": (((3, 1), (4,), (3, 1), (1, 4)), (3, 4)),
    "state_shared": (((), (2, 3), (3,), (2, 1)), (2, 3)),
}


def random_parameters(
    n1: int,
    n2: int,
    batches: Sequence[Sequence[int]] = ((), (), ()),
    *,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> Parameters:
    """Biases and weight of the given batch shapes. The weight is such that fields are of order ``scale``."""
    left, right, weight = batches
    coupling_scale = 2 * scale / max(n1, n2, 1) ** 0.5
    return Parameters(
        (scale * torch.randn(*left, n1, dtype=torch.float64)).to(dtype),
        (scale * torch.randn(*right, n2, dtype=torch.float64)).to(dtype),
        (coupling_scale * torch.randn(*weight, n1, n2, dtype=torch.float64)).to(dtype),
    )


def random_bits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(2, shape).to(dtype)


def awkward(tensor: Tensor, how: str) -> Tensor:
    """The same values in memory that is not contiguous."""
    if how == "transposed":
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
    if how == "strided":
        padded = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 1, dtype=tensor.dtype)
        padded[..., 1::2] = tensor
        return padded[..., 1::2]
    if how == "offset":
        flat = torch.cat([torch.ones(3, dtype=tensor.dtype), tensor.reshape(-1)])
        return flat[3:].view(tensor.shape)
    raise ValueError(how)


# Statistics -------------------------------------------------------------------------------------------------------


def all_states(n: int) -> Tensor:
    """[2^n, n] bits; the state's number has unit 0 as its lowest bit."""
    return (torch.arange(2**n).unsqueeze(-1) >> torch.arange(n) & 1).double()


def state_numbers(z: Tensor) -> Tensor:
    return (z.long() << torch.arange(z.shape[-1])).sum(-1)


def exact_probabilities(parameters: Parameters, beta: float = 1.0) -> Tensor:
    """[2^(n1 + n2)] float64, by brute force over the energy as the contract writes it."""
    left_bias, right_bias, weight = (p.double() for p in parameters)
    states = all_states(len(left_bias) + len(right_bias))
    left, right = states.split((len(left_bias), len(right_bias)), -1)
    energy = -left @ left_bias - right @ right_bias - ((left @ weight) * right).sum(-1)
    return (-beta * energy).softmax(0)


def chi_square_excess(z: Tensor, probabilities: Tensor) -> float:
    """Pearson's statistic of independent draws over its threshold at FALSE_ALARM: above 1 is an alarm.

    States expected fewer than 10 times are pooled, so that the chi-square distribution holds in the tail.
    """
    from scipy import stats  # imported here, because tests of a GPU run without SciPy

    count = torch.bincount(state_numbers(z.reshape(-1, z.shape[-1])), minlength=len(probabilities)).double()
    expected = probabilities * count.sum()
    rare = expected < 10
    if rare.any():
        count = torch.cat([count[~rare], count[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        if expected[-1] < 10:  # still too few: the next smallest joins the pool
            order = expected.argsort()
            count, expected = count[order], expected[order]
            count = torch.cat([count[:2].sum()[None], count[2:]])
            expected = torch.cat([expected[:2].sum()[None], expected[2:]])
    statistic = float(((count - expected) ** 2 / expected).sum())
    return statistic / float(stats.chi2.isf(FALSE_ALARM, len(expected) - 1))


def z_threshold(num_comparisons: int = 1) -> float:
    """Threshold that the largest |z| of ``num_comparisons`` normal variables exceeds with probability FALSE_ALARM."""
    from scipy import stats

    return float(stats.norm.isf(FALSE_ALARM / 2 / num_comparisons))


def word_faults(random_words: Callable[..., NDArray[np.uint32]]) -> list[Callable[..., NDArray[np.uint32]]]:
    """Faults to plant in place of the reference's random words. A model's second side, or colour, begins at unit 4."""

    def one_word_for_all_units(seed: int, chain: Any, sweep: int, num_units: int) -> NDArray[np.uint32]:
        return random_words(seed, chain, sweep, num_units)[:, :1].repeat(num_units, axis=1)

    def same_words_every_sweep(seed: int, chain: Any, sweep: int, num_units: int) -> NDArray[np.uint32]:
        return random_words(seed, chain, 0, num_units)

    def sides_share_words(seed: int, chain: Any, sweep: int, num_units: int) -> NDArray[np.uint32]:
        words = random_words(seed, chain, sweep, num_units)
        words[:, 4:] = words[:, : num_units - 4]
        return words

    def four_bits(seed: int, chain: Any, sweep: int, num_units: int) -> NDArray[np.uint32]:
        return random_words(seed, chain, sweep, num_units) & 0xF0000000

    return [one_word_for_all_units, same_words_every_sweep, sides_share_words, four_bits]


def product(**axes: Sequence[object]) -> list[dict[str, object]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
