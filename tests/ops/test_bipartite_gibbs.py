# SPDX-License-Identifier: Apache-2.0
"""Binary sweeps: the bits of the reference, whatever the batch, threads or memory."""

import doctest
import time
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import (
    BETA_BATCHES,
    BROADCASTS,
    assert_bits,
    assert_same_bits,
    awkward,
    longest_standstill,
    random_bits,
    random_parameters,
    untouched,
)

from gibbs_ext import CouplingResolutionWarning, bipartite_gibbs, functional
from gibbs_ext.reference import bipartite_gibbs_reference

SIZES = [(1, 1), (1, 33), (3, 1), (31, 33), (33, 31), (100, 129), (129, 3), (64, 128)]
DTYPES = [torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]


def both(*args, **kwargs):
    """Runs op and reference; checks that they agree and that no input changed; returns what they return."""
    tensors = {str(i): x for i, x in enumerate((*args, *kwargs.values())) if isinstance(x, torch.Tensor)}
    with untouched(**tensors):
        actual = bipartite_gibbs(*args, **kwargs)
    assert_same_bits(actual, bipartite_gibbs_reference(*args, **kwargs))
    assert all(side.is_contiguous() for side in actual)
    return actual


# Agreement with the reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n1", "n2"), SIZES)
@pytest.mark.parametrize("broadcast", BROADCASTS)
def test_agrees_with_reference(n1, n2, broadcast, instruction_set):
    (state, *batches), shape = BROADCASTS[broadcast]
    left, right = both(random_bits(*state, n1), *random_parameters(n1, n2, batches), 5, seed=n1 * 1000 + n2)
    assert left.shape == (*shape, n1)
    assert right.shape == (*shape, n2)
    assert_bits(left)


@given(
    n1=st.integers(1, 300),
    n2=st.integers(1, 300),
    chains=st.integers(1, 40),
    models=st.sampled_from([None, 1, 3]),
    scale=st.sampled_from([0.0, 0.1, 1.0, 10.0]),
    num_sweeps=st.integers(0, 5),
    clamp=st.booleans(),
)
def test_agrees_with_reference_on_any_problem(n1, n2, chains, models, scale, num_sweeps, clamp):
    batch = () if models is None else (models,)
    p = random_parameters(n1, n2, ((), batch, batch), scale=scale)
    options = {}
    if clamp:
        options = {"right": random_bits(n2), "clamp_left": torch.rand(n1) < 0.3, "clamp_right": torch.rand(n2) < 0.3}
    both(random_bits(chains, *batch, n1), *p, num_sweeps, seed=n1, chain_offset=n2, **options)


@pytest.mark.parametrize("chains", [1, 2, 15, 16, 17, 64, 65, 200])
@pytest.mark.parametrize("shared", [True, False])
def test_agrees_with_reference_for_any_number_of_chains(chains, shared, instruction_set):
    p = random_parameters(40, 56, ((), (), () if shared else (chains,)))
    both(random_bits(chains, 40), *p, 4, seed=3)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 0.1, 3.0, 30.0, 3e4, 1e30])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.filterwarnings("ignore::gibbs_ext.CouplingResolutionWarning")
def test_agrees_with_reference_at_any_scale(scale, shared, instruction_set):
    """Couplings range from none, where most units flip, to those of a frozen model, where none does."""
    p = random_parameters(50, 70, ((), (), () if shared else (6,)), scale=scale)
    both(random_bits(6, 50), *p, 6, seed=5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameter_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype, parameter_dtype):
    p = random_parameters(10, 37, ((), (), (5,)), dtype=parameter_dtype)
    left, right = both(random_bits(5, 10, dtype=dtype), *p, 3, seed=1)
    assert left.dtype == right.dtype == dtype
    as_float = bipartite_gibbs(torch.zeros(5, 10), *p, 3, seed=1)
    assert_same_bits(bipartite_gibbs(torch.zeros(5, 10, dtype=dtype), *p, 3, seed=1)[0].float(), as_float[0])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("mask", ["unit", "chain", "one", "all", "none"])
def test_clamps(shared, side, mask, instruction_set):
    n1, n2, chains = 33, 45, 7
    shapes = {"unit": lambda n: (n,), "chain": lambda n: (chains, n), "one": lambda n: (chains, 1)}

    def draw(n):
        if mask in shapes:
            return torch.rand(shapes[mask](n)) < 0.5
        return torch.full((n,), mask == "all")

    clamps = {}
    if side != "right":
        clamps["clamp_left"] = draw(n1)
    if side != "left":
        clamps["clamp_right"] = draw(n2)
    left, right = random_bits(chains, n1), random_bits(chains, n2)
    p = random_parameters(n1, n2, ((), (), () if shared else (chains,)))
    new_left, new_right = both(left, *p, 5, right=right, seed=2, **clamps)
    for before, after, name in ((left, new_left, "clamp_left"), (right, new_right, "clamp_right")):
        if name in clamps:
            kept = clamps[name].expand(before.shape)
            assert after[kept].equal(before[kept])
            assert mask in ("all", "one") or not after[~kept].equal(before[~kept])


@pytest.mark.parametrize("shared", [True, False])
def test_schedule_of_beta(shared, instruction_set):
    p = random_parameters(20, 31, ((), (), () if shared else (9,)))
    left = random_bits(9, 20)
    for beta in (0.0, 0.37, 2.5, -1.0, [0.0, 0.5, 1.0, 2.0], torch.linspace(0, 3, 4), torch.tensor(0.5)):
        both(left, *p, 4, beta=beta, seed=4)
    assert_same_bits(
        bipartite_gibbs(left, *p, 3, beta=0.7, seed=4), bipartite_gibbs(left, *p, 3, beta=[0.7] * 3, seed=4)
    )


@pytest.mark.parametrize("steps", ["one", "each sweep"])
@pytest.mark.parametrize("kind", BETA_BATCHES)
def test_beta_of_each_chain(kind, steps, instruction_set):
    state, weight, batch = BETA_BATCHES[kind]
    p = random_parameters(20, 31, ((), weight, weight))
    clamp = {"right": random_bits(31), "clamp_right": torch.rand(31) < 0.2}
    beta = torch.rand(*batch, 1 if steps == "one" else 6) * 3 - 0.5
    beta.flatten()[0] = 0
    both(random_bits(*state, 20), *p, 6, beta=beta, seed=4, **clamp)
    many = [0.0, 0.3, 1.0, 1.1, 2.0] * 20  # as many chains as the fastest routes need
    both(random_bits(*state, 20), *p, 100, beta=beta[..., :1] * torch.tensor(many), seed=4)


def test_a_beta_that_is_expanded_is_one():
    left, p = random_bits(6, 20), random_parameters(20, 31, ((), (), ()))
    expected = bipartite_gibbs(left, *p, 4, beta=0.7, seed=4)
    assert_same_bits(bipartite_gibbs(left, *p, 4, beta=torch.tensor([0.7]).expand(6, 1), seed=4), expected)


def test_a_ladder_is_so_many_calls():
    left, p = random_bits(3, 50, 20), random_parameters(20, 31, ((), (), ()))
    betas = torch.tensor([0.1, 0.7, 1.3])
    together = bipartite_gibbs(left, *p, 10, beta=betas[:, None, None], seed=4)
    for i, beta in enumerate(betas):
        alone = bipartite_gibbs(left[i], *p, 10, beta=float(beta), seed=4, chain_offset=50 * i)
        assert_same_bits(alone, [side[i] for side in together])


@pytest.mark.parametrize("how", ["transposed", "strided", "offset"])
@pytest.mark.parametrize("weight_batch", [(), (6,)])
def test_memory_layout_does_not_matter(how, weight_batch):
    p = random_parameters(17, 23, ((6,), (), weight_batch))
    left, right = random_bits(6, 17), random_bits(6, 23)
    clamp = torch.rand(6, 23) < 0.3
    expected = bipartite_gibbs(left, *p, 4, right=right, clamp_right=clamp, seed=1)
    moved = [awkward(x, how) for x in (left, *p)]
    actual = bipartite_gibbs(*moved, 4, right=awkward(right, how), clamp_right=awkward(clamp, how), seed=1)
    assert_same_bits(actual, expected)


def test_expanded_equals_materialised():
    p = random_parameters(17, 23)
    left = random_bits(17)
    expanded = [
        left.expand(4, 5, 17),
        p.left_bias.expand(5, 17),
        p.right_bias.expand(4, 1, 23),
        p.weight.expand(5, 17, 23),
    ]
    expected = bipartite_gibbs(*(x.contiguous() for x in expanded), 4, seed=1)
    assert_same_bits(bipartite_gibbs(*expanded, 4, seed=1), expected)
    assert_same_bits(both(left.expand(4, 5, 17), *p, 4, seed=1), expected)


@pytest.mark.filterwarnings("ignore::gibbs_ext.CouplingResolutionWarning")
def test_swapping_the_sides_swaps_the_model():
    """right given left is left given right of the transposed model; a frozen one, as random words are others."""
    p = random_parameters(300, 20, scale=1e3)
    left = random_bits(50, 300)
    _, right = bipartite_gibbs(left, *p, 1, seed=0)
    swapped, _ = bipartite_gibbs(
        torch.zeros(50, 20), p.right_bias, p.left_bias, p.weight.mT, 1,
        right=left, clamp_right=torch.tensor(True), seed=1,
    )  # fmt: skip
    assert (swapped != right).float().mean() < 0.01
    assert 0.2 < right.mean() < 0.8


# The bits do not depend on the batch, the split, threads or memory ------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_a_chain_alone_is_the_chain_among_others(shared):
    p = random_parameters(70, 45, ((64,), (), () if shared else (64,)))
    left = random_bits(64, 70)
    together = bipartite_gibbs(left, *p, 12, seed=8)
    weight = p.weight if shared else p.weight[7]
    alone = bipartite_gibbs(left[7], p.left_bias[7], p.right_bias, weight, 12, seed=8, chain_offset=7)
    assert_same_bits(alone, [side[7] for side in together])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("split", [[64], [1, 63], [7, 13, 44], [32, 32], [63, 1]])
def test_any_split_of_the_batch(shared, split):
    p = random_parameters(33, 65, ((), (64,), () if shared else (64,)))
    left = random_bits(64, 33)
    parts, first = [], 0
    for size in split:
        rows = slice(first, first + size)
        weight = p.weight if shared else p.weight[rows]
        parts.append(
            bipartite_gibbs(left[rows], p.left_bias, p.right_bias[rows], weight, 9, seed=1, chain_offset=first)
        )
        first += size
    assert_same_bits([torch.cat(side) for side in zip(*parts, strict=True)], bipartite_gibbs(left, *p, 9, seed=1))


@pytest.mark.parametrize("shared", [True, False])
def test_any_split_of_the_sweeps(shared):
    p = random_parameters(100, 50, ((), (), () if shared else (20,)))
    left, beta = random_bits(20, 100), torch.linspace(0.1, 2, 10)
    expected = bipartite_gibbs(left, *p, 10, beta=beta, seed=6)
    for cut in (0, 1, 3, 9, 10):
        first, right = bipartite_gibbs(left, *p, cut, beta=beta[:cut] if cut else 1.0, seed=6)
        rest = bipartite_gibbs(
            first, *p, 10 - cut, beta=beta[cut:] if cut < 10 else 1.0, right=right, sweep_offset=cut, seed=6
        )
        assert_same_bits(rest, expected)


@pytest.mark.parametrize("broadcast", ["shared", "per_model", "chains_of_models", "models_of_chains", "single"])
def test_any_number_of_threads(broadcast, threads):
    (state, *batches), _ = BROADCASTS[broadcast]
    grow = [(*(40 * s if s > 1 else s for s in batch),) for batch in (state, *batches)]
    p = random_parameters(50, 60, grow[1:])
    left = random_bits(*grow[0], 50)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(bipartite_gibbs(left, *p, 8, seed=2))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_chain_numbers_given_one_by_one():
    p = random_parameters(20, 30, ((), (), (3,)))
    left = random_bits(5, 3, 20)
    numbers = torch.randperm(1000)[:15].reshape(5, 3) + 2**40
    actual = both(left, *p, 6, seed=1, chain_offset=numbers)
    for row in range(5):
        for model in range(3):
            alone = bipartite_gibbs(
                left[row, model], *p[:2], p.weight[model], 6, seed=1, chain_offset=int(numbers[row, model])
            )
            assert_same_bits(alone, [side[row, model] for side in actual])
    counted = torch.arange(15).reshape(5, 3) + 4
    assert_same_bits(
        bipartite_gibbs(left, *p, 6, seed=1, chain_offset=counted), bipartite_gibbs(left, *p, 6, seed=1, chain_offset=4)
    )
    # Only the numbers have a batch shape here; equal numbers give equal draws.
    left, _ = both(left[0, 0], *p[:2], p.weight[0], 6, seed=1, chain_offset=torch.tensor([3, 4, 3], dtype=torch.int32))
    assert left[0].equal(left[2])
    assert not left[0].equal(left[1])


@pytest.mark.parametrize("chain_offset", [0, 2**32 - 2, 2**48 - 5])
@pytest.mark.parametrize("sweep_offset", [0, 2**32 - 2, 2**44 - 4])
@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63 - 1, 2**64 - 1])
def test_numbers_at_their_limits(chain_offset, sweep_offset, seed):
    p = random_parameters(5, 6)
    both(random_bits(5, 5), *p, 4, seed=seed, chain_offset=chain_offset, sweep_offset=sweep_offset)


def test_seeds():
    p, left = random_parameters(40, 30), random_bits(10, 40)
    assert_same_bits(bipartite_gibbs(left, *p, 3, seed=-1), bipartite_gibbs(left, *p, 3, seed=2**64 - 1))
    assert_same_bits(bipartite_gibbs(left, *p, 3, seed=7), bipartite_gibbs(left, *p, 3, seed=torch.tensor(7)))
    assert not bipartite_gibbs(left, *p, 3, seed=7)[0].equal(bipartite_gibbs(left, *p, 3, seed=8)[0])
    torch.manual_seed(3)
    first, second = bipartite_gibbs(left, *p, 3), bipartite_gibbs(left, *p, 3)
    assert not first[0].equal(second[0])
    torch.manual_seed(3)
    assert_same_bits(bipartite_gibbs(left, *p, 3), first)
    by_generator = bipartite_gibbs(left, *p, 3, generator=torch.Generator().manual_seed(3))
    assert_same_bits(by_generator, first)
    assert_same_bits(bipartite_gibbs(left, *p, 3), second)  # a generator that is given leaves the default one alone


# Edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [(0,), (3, 0), (0, 4)])
@pytest.mark.parametrize("shared", [True, False])
def test_empty_batches(empty, shared):
    p = random_parameters(5, 7, ((), (), () if shared else empty))
    left, right = both(torch.zeros(*empty, 5), *p, 3, seed=0)
    assert left.shape == (*empty, 5)
    assert right.shape == (*empty, 7)


def test_no_sweeps():
    p, left, right = random_parameters(5, 7), random_bits(3, 5), random_bits(3, 7)
    assert_same_bits(bipartite_gibbs(left, *p, 0, right=right, seed=0), (left, right))
    same, zeros = bipartite_gibbs(left, *p, 0, seed=0)
    assert_same_bits(same, left)
    assert_same_bits(zeros, torch.zeros(3, 7))
    assert same.data_ptr() != left.data_ptr()


def test_large_logits_decide():
    weight = torch.zeros(2, 2)
    left, right = bipartite_gibbs(
        torch.zeros(1000, 2), torch.tensor([1e30, -1e30]), torch.tensor([-1e30, 1e30]), weight, 1, seed=0
    )
    assert left.equal(torch.tensor([1.0, 0.0]).expand(1000, 2))
    assert right.equal(torch.tensor([0.0, 1.0]).expand(1000, 2))


@pytest.mark.parametrize("beta", [0.0, 1e-50])  # 1e-50 is 0 in float32
@pytest.mark.filterwarnings("ignore::gibbs_ext.CouplingResolutionWarning")
def test_beta_zero_is_fair_whatever_the_couplings(beta, instruction_set):
    """Fields overflow float32, and 0 times them must not be NaN."""
    for models in ((), (200,)):
        p = random_parameters(60, 70, ((), (), models))
        p = p._replace(weight=p.weight.sign() * 1e37)
        left = random_bits(200, 60)
        drawn = both(left, *p, 3, beta=beta, seed=4)
        none = bipartite_gibbs(left, *(torch.zeros_like(x) for x in p), 3, seed=4)
        assert_same_bits(drawn, none)
        assert 0.45 < drawn[0].mean() < 0.55
        both(left, *p, 4, beta=[1.0, beta, 0.5, beta], seed=4)


@pytest.mark.parametrize("sign", [torch.ones_like, torch.randn_like], ids=["one sign", "both signs"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.filterwarnings("ignore::gibbs_ext.CouplingResolutionWarning")
def test_couplings_whose_sum_overflows_float32(sign, shared, instruction_set):
    for n1, n2 in ((4, 4), (1, 4), (4, 1), (40, 37)):
        batches = ((), (), () if shared else (6,))
        p = random_parameters(n1, n2, batches)
        p = p._replace(weight=torch.sign(sign(p.weight)) * 1.6e38)
        for beta in (1.0, 1e-38, 0.0, -1.0):
            both(random_bits(6, n1), *p, 3, beta=beta, seed=9)


def test_resolution_warning():
    left, bias = torch.zeros(3), torch.zeros(3)
    with pytest.warns(CouplingResolutionWarning, match=r"^bipartite_gibbs: weight"):
        bipartite_gibbs(left, bias, bias, torch.full((3, 3), 1e6), 1, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bipartite_gibbs(torch.zeros(200), *random_parameters(200, 200), 1, seed=0)


@pytest.mark.filterwarnings("error::gibbs_ext.CouplingResolutionWarning")
def test_resolution_warning_as_an_error():
    left, bias = torch.zeros(3), torch.zeros(3)
    with pytest.raises(CouplingResolutionWarning, match=r"^bipartite_gibbs: weight"):
        bipartite_gibbs(left, bias, bias, torch.full((3, 3), 1e6), 1, seed=0)


def test_no_gradient():
    p = [x.requires_grad_() for x in random_parameters(5, 7)]
    assert not any(side.requires_grad for side in bipartite_gibbs(torch.zeros(5), *p, 2, seed=0))


def test_docstring_example():
    results = doctest.testmod(functional)
    assert results.attempted >= 3
    assert not results.failed


def test_releases_the_gil():
    p, left = random_parameters(200, 200), random_bits(512, 200)
    num_sweeps, duration = 100, 0.0
    while duration < 0.5:  # until a call is long enough to measure
        num_sweeps *= 2
        start = time.perf_counter()
        bipartite_gibbs(left, *p, num_sweeps, seed=0)
        duration = time.perf_counter() - start
    # test_support.py holds the planted fault: a call that keeps the GIL.
    assert longest_standstill(lambda: bipartite_gibbs(left, *p, num_sweeps, seed=0)) < 0.5
