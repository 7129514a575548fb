# SPDX-License-Identifier: Apache-2.0
"""Relaxed sweeps: values and gradients against float64 autograd through the reference, and against differences."""

import pytest
import torch
from support import (
    BROADCASTS,
    RELAXATIONS,
    SMOOTH,
    Parameters,
    assert_close,
    assert_gradients_close,
    assert_only_wanted_gradients,
    assert_same_bits,
    awkward,
    gradients,
    random_bits,
    random_parameters,
    relative_error,
)

from gibbs_ext import bipartite_gibbs, bipartite_gibbs_relaxed
from gibbs_ext.reference import bipartite_gibbs_relaxed_reference

SIZES = [(1, 1), (1, 33), (3, 1), (31, 33), (100, 129)]


def compare(left, parameters, *args, tolerance=1e-11, **kwargs):
    actual = gradients(bipartite_gibbs_relaxed, left, parameters, *args, **kwargs)
    expected = gradients(bipartite_gibbs_relaxed_reference, left, parameters, *args, **kwargs)
    assert_gradients_close(actual, expected, tolerance)
    return actual[0]


# float64: value and gradient of the reference ---------------------------------------------------------------------


@pytest.mark.parametrize(("n1", "n2"), SIZES)
@pytest.mark.parametrize("broadcast", BROADCASTS)
@pytest.mark.parametrize(("relaxation", "slope_gradient"), RELAXATIONS)
def test_agrees_with_reference(n1, n2, broadcast, relaxation, slope_gradient):
    (state, *batches), shape = BROADCASTS[broadcast]
    p = random_parameters(n1, n2, batches, dtype=torch.float64)
    left, right, left_mean = compare(
        random_bits(*state, n1, dtype=torch.float64), p, 3, 2,
        relaxation=relaxation, slope_gradient=slope_gradient, seed=5,
    )  # fmt: skip
    assert left.shape == left_mean.shape == (*shape, n1)
    assert right.shape == (*shape, n2)


@pytest.mark.parametrize("relaxed", [1, 2, 3])
@pytest.mark.parametrize("binary", [0, 1, 4])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("relaxation", "slope_gradient"), RELAXATIONS)
def test_every_instruction_set(relaxed, binary, shared, relaxation, slope_gradient, instruction_set):
    p = random_parameters(37, 20, ((), (6,), () if shared else (6,)), dtype=torch.float64)
    left = torch.rand(6, 37, dtype=torch.float64) if binary == 0 else random_bits(6, 37, dtype=torch.float64)
    schedule = torch.linspace(0.5, 1.5, binary + relaxed)
    compare(left, p, binary, relaxed, relaxation=relaxation, slope_gradient=slope_gradient, beta=schedule,
            sharpness=3.0, seed=2, chain_offset=2**33, sweep_offset=2**34)  # fmt: skip


@pytest.mark.parametrize("binary", [0, 2])
@pytest.mark.parametrize(
    ("state", "weight", "beta"),
    [((4, 3), (), (4, 1)), ((9,), (), (9,)), ((3, 5, 2), (2,), (3, 1, 1)), ((5, 3), (3,), (3,)), ((), (), (3, 1))],
)
def test_beta_of_each_chain(state, weight, beta, binary):
    p = random_parameters(18, 23, ((), weight, weight), dtype=torch.float64)
    for steps in (1, binary + 2):
        compare(random_bits(*state, 18, dtype=torch.float64), p, binary, 2, beta=torch.rand(*beta, steps) * 2, seed=3)


@pytest.mark.parametrize("chains", [1, 7, 33, 130])
@pytest.mark.parametrize("broadcast", ["shared", "chains_of_models", "models_of_chains", "per_model"])
def test_any_number_of_chains(chains, broadcast):
    batches = {
        "shared": ((chains,), (), (), ()),
        "per_model": ((chains,), (chains,), (chains,), (chains,)),
        "chains_of_models": ((chains, 3), (3,), (3,), (3,)),
        "models_of_chains": ((3, chains), (3, 1), (3, 1), (3, 1)),
    }[broadcast]
    p = random_parameters(18, 23, batches[1:], dtype=torch.float64)
    compare(random_bits(*batches[0], 18, dtype=torch.float64), p, 2, 1, seed=3)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 10.0, 1e3])
@pytest.mark.parametrize(("relaxation", "slope_gradient"), RELAXATIONS)
def test_any_scale(scale, relaxation, slope_gradient):
    p = random_parameters(20, 20, scale=scale, dtype=torch.float64)
    compare(random_bits(9, 20, dtype=torch.float64), p, 1, 2, relaxation=relaxation, slope_gradient=slope_gradient,
            seed=1, tolerance=1e-9)  # fmt: skip


@pytest.mark.parametrize("how", ["transposed", "strided", "offset"])
def test_memory_layout_does_not_matter(how):
    p = random_parameters(17, 23, ((6,), (), (6,)), dtype=torch.float64)
    left = random_bits(6, 17, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in p]
    outputs = bipartite_gibbs_relaxed(awkward(left, how), *(awkward(x, how) for x in p), 2, seed=1)
    assert_same_bits(outputs, bipartite_gibbs_relaxed(left, *p, 2, seed=1))
    # Gradients are expanded (stride 0) or transposed, or missing, if an output is not used.
    left_out, right_out, _ = bipartite_gibbs_relaxed(left, *leaves, 2, seed=1)
    weights = torch.randn(23, 6, dtype=torch.float64)
    (left_out.sum() + (right_out.mT * weights).sum()).backward()
    reference_leaves = [x.clone().requires_grad_() for x in p]
    left_out, right_out, _ = bipartite_gibbs_relaxed_reference(left, *reference_leaves, 2, seed=1)
    (left_out.sum() + (right_out.mT * weights).sum()).backward()
    for actual, expected in zip(leaves, reference_leaves, strict=True):
        assert_close(actual.grad, expected.grad, 1e-11)


def test_expanded_weight_gets_its_whole_gradient():
    """autograd sums the gradient of an expanded weight, so the op must fill all of its entries."""
    weight = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    left, biases = random_bits(5, 9, dtype=torch.float64), (torch.zeros(9).double(), torch.zeros(8).double())
    expected = torch.autograd.grad(bipartite_gibbs_relaxed(left, *biases, weight, 2, seed=1)[0].sum(), weight)[0]
    expanded = weight.expand(5, 9, 8)
    actual = torch.autograd.grad(bipartite_gibbs_relaxed(left, *biases, expanded, 2, seed=1)[0].sum(), weight)[0]
    assert_close(actual, expected, 1e-12)
    assert expected.abs().max() > 0


def test_only_some_gradients():
    p = random_parameters(7, 9, ((4,), (4,), (4,)), dtype=torch.float64)
    left = random_bits(4, 7, dtype=torch.float64)
    everything = gradients(bipartite_gibbs_relaxed, left, p, 1, seed=1)[1][1:]
    assert_only_wanted_gradients(lambda *leaves: bipartite_gibbs_relaxed(left, *leaves, 1, seed=1), p, everything)


# float64: gradients against differences ---------------------------------------------------------------------------


@pytest.mark.parametrize("broadcast", BROADCASTS)
@pytest.mark.parametrize(("relaxation", "slope_gradient"), SMOOTH)
@pytest.mark.parametrize("relaxed", [1, 2, 3])
def test_gradcheck(broadcast, relaxation, slope_gradient, relaxed):
    (state, *batches), _ = BROADCASTS[broadcast]
    p = [x.requires_grad_() for x in random_parameters(3, 2, batches, dtype=torch.float64)]

    def after_binary_sweeps(*parameters):
        return bipartite_gibbs_relaxed(
            random_start, *parameters, 2, relaxed, relaxation=relaxation, slope_gradient=slope_gradient, seed=11
        )

    def from_a_relaxed_state(left, *parameters):
        return bipartite_gibbs_relaxed(
            left, *parameters, 0, relaxed, relaxation=relaxation, slope_gradient=slope_gradient, seed=12
        )

    random_start = random_bits(*state, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(after_binary_sweeps, p)
    left = torch.rand(*state, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(from_a_relaxed_state, [left, *p])


@pytest.mark.parametrize(("relaxation", "slope_gradient"), [("straight_through", True), ("pwl", False)])
def test_gradcheck_can_fail(relaxation, slope_gradient):
    """The planted fault is a derivative that is not that of the value."""
    p = [x.requires_grad_() for x in random_parameters(3, 2, ((8,), (), ()), dtype=torch.float64)]

    def sample(*p):
        left = torch.zeros(8, 3, dtype=torch.float64)
        return bipartite_gibbs_relaxed(left, *p, 1, relaxation=relaxation, slope_gradient=slope_gradient, seed=1)

    assert not torch.autograd.gradcheck(sample, p, raise_exception=False)


# float32 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broadcast", ["shared", "per_model", "chains_of_models", "models_of_chains"])
@pytest.mark.parametrize(("relaxation", "slope_gradient"), RELAXATIONS)
@pytest.mark.parametrize("relaxed", [1, 3])
def test_float32_gradient_is_near_float64s(broadcast, relaxation, slope_gradient, relaxed, instruction_set):
    (state, *batches), _ = BROADCASTS[broadcast]
    errors = []
    for seed in range(5):
        p = random_parameters(40, 33, batches)
        args = (random_bits(*state, 40), p, 3, relaxed)
        kwargs = {"relaxation": relaxation, "slope_gradient": slope_gradient, "seed": seed}
        actual = gradients(bipartite_gibbs_relaxed, *args, **kwargs)
        expected = gradients(bipartite_gibbs_relaxed_reference, *args, **kwargs)
        assert all(out.dtype == torch.float32 for out in actual[0])
        value = max(float((a.double() - e).detach().abs().max()) for a, e in zip(actual[0], expected[0], strict=True))
        errors.append((value, relative_error(actual[1][1:], [e.double() for e in expected[1][1:]])))
    # The median over seeds counts: a unit at the very edge of a clip or step may be on the other side in float32.
    values, gradient_errors = (sorted(column) for column in zip(*errors, strict=True))
    assert values[2] < 2e-4
    assert gradient_errors[2] < 2e-4


def test_relative_error_can_fail():
    expected = [torch.ones(3, dtype=torch.float64)]
    assert relative_error([torch.tensor([1.0, 1.0, -1.0])], expected) > 0.5
    with pytest.raises(AssertionError):
        relative_error([torch.tensor([1.0, 1.0, float("nan")])], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_parameters_are_computed_in_float32(dtype):
    p = random_parameters(9, 12, ((4,), (4,), (4,)), dtype=dtype)
    leaves = [x.requires_grad_() for x in p]
    outputs = bipartite_gibbs_relaxed(random_bits(4, 9), *leaves, 2, seed=3)
    assert all(out.dtype == torch.float32 for out in outputs)
    wide = Parameters(*(x.detach().float().requires_grad_() for x in p))
    expected = bipartite_gibbs_relaxed(random_bits(4, 9) * 0, *wide, 2, seed=3)
    assert_same_bits(bipartite_gibbs_relaxed(torch.zeros(4, 9), *leaves, 2, seed=3), expected)
    sum(out.sum() for out in outputs).backward()
    assert all(leaf.grad.dtype == dtype for leaf in leaves)


# The binary part and the numbering --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [True, False])
def test_state_is_what_binary_sweeps_give(dtype, shared, instruction_set):
    p = random_parameters(50, 40, ((), (), () if shared else (9,)), dtype=dtype)
    for left in (random_bits(9, 50, dtype=dtype), random_bits(9, 50, dtype=torch.uint8), random_bits(9, 50).bool()):
        *_, state = bipartite_gibbs_relaxed(left, *p, 6, seed=4, return_state=True)
        expected, _ = bipartite_gibbs(left, *p, 6, seed=4)
        assert_same_bits(state, expected.to(dtype))
        assert not state.requires_grad
        *_, state = bipartite_gibbs_relaxed(left, *p, 0, seed=4, return_state=True)
        assert_same_bits(state, left.to(dtype))


@pytest.mark.parametrize("shared", [True, False])
def test_straight_through_is_a_binary_sweep(shared):
    """Uniforms in float64 decide as thresholds do, except for draws within a rounding of the probability."""
    p = random_parameters(50, 40, ((), (), () if shared else (200,)), dtype=torch.float64)
    left = random_bits(200, 50, dtype=torch.float64)
    new_left, right, _ = bipartite_gibbs_relaxed(left, *p, 3, relaxation="straight_through", seed=4)
    binary_left, binary_right = bipartite_gibbs(left, *p, 3, seed=4)
    assert set(new_left.unique().tolist()) == {0.0, 1.0}
    # [u > 1 - q] and [word < threshold] have the same law; their draws are mirrored.
    assert abs(float(right.mean() - bipartite_gibbs(binary_left, *p, 1, sweep_offset=3, seed=4)[1].mean())) < 0.05
    assert not binary_right.equal(right)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chains_are_independent_of_the_batch(shared, dtype, threads):
    p = random_parameters(33, 40, ((), (64,), () if shared else (64,)), dtype=dtype)
    left = random_bits(64, 33, dtype=dtype)
    torch.set_num_threads(1)
    together = bipartite_gibbs_relaxed(left, *p, 4, 2, seed=8)
    weight = p.weight if shared else p.weight[7]
    alone = bipartite_gibbs_relaxed(left[7], p.left_bias, p.right_bias[7], weight, 4, 2, seed=8, chain_offset=7)
    numbered = bipartite_gibbs_relaxed(left, *p, 4, 2, seed=8, chain_offset=torch.arange(64))
    assert_same_bits(numbered, together)
    for a, b in zip(alone, together, strict=True):
        assert_close(a, b[7], 1e-12 if dtype == torch.float64 else 1e-4)
    torch.set_num_threads(2)
    assert_same_bits(bipartite_gibbs_relaxed(left, *p, 4, 2, seed=8), together)


@pytest.mark.parametrize("shared", [True, False])
def test_gradient_is_the_same_for_any_number_of_threads(shared, threads):
    p = random_parameters(33, 40, ((), (), () if shared else (200,)))
    left = random_bits(200, 33)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(gradients(bipartite_gibbs_relaxed, left, p, 2, seed=8)[1][1:])
    for one, two in zip(*results, strict=True):
        assert_close(two, one, 1e-5)


def test_seed_and_generator():
    p, left = random_parameters(20, 30), random_bits(10, 20)
    torch.manual_seed(3)
    first, second = bipartite_gibbs_relaxed(left, *p), bipartite_gibbs_relaxed(left, *p)
    assert not first[0].equal(second[0])
    assert_same_bits(bipartite_gibbs_relaxed(left, *p, generator=torch.Generator().manual_seed(3)), first)


def test_inputs_are_intact():
    p, left = random_parameters(20, 30, ((4,), (4,), (4,))), random_bits(4, 20)
    before = [x.clone() for x in (left, *p)]
    gradients(bipartite_gibbs_relaxed, left, p, 3, seed=1)
    assert_same_bits((left, *p), before)


@pytest.mark.parametrize("empty", [(0,), (3, 0)])
@pytest.mark.parametrize("shared", [True, False])
def test_empty_batches(empty, shared):
    p = random_parameters(5, 7, ((), (), () if shared else empty), dtype=torch.float64)
    outputs, grads = gradients(bipartite_gibbs_relaxed, torch.zeros(*empty, 5).double(), p, 2, seed=0)
    assert outputs[0].shape == (*empty, 5)
    for grad, parameter in zip(grads[1:], p, strict=True):
        assert_same_bits(grad, torch.zeros_like(parameter))


def test_second_derivative_says_so():
    p = [x.requires_grad_() for x in random_parameters(3, 2, dtype=torch.float64)]
    out = bipartite_gibbs_relaxed(torch.zeros(3).double(), *p, 1, seed=0)[2]
    first = torch.autograd.grad(out.sum(), p, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^bipartite_gibbs_relaxed: second derivatives"):
        first[0].sum().backward()
