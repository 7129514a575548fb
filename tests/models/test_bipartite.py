# SPDX-License-Identifier: Apache-2.0
"""BipartiteBoltzmann: identities against brute force over all states."""

import pytest
import torch
from support import BROADCASTS, all_states, assert_close, assert_same_bits, random_parameters

from gibbs_ext import (
    BipartiteBoltzmann,
    bipartite_gibbs,
)


def make(batches=((), (), ()), n1=4, n2=3, dtype=torch.float64):
    return BipartiteBoltzmann(*random_parameters(n1, n2, batches, dtype=dtype), validate_args=True)


BATCHES = [tuple(batches) for (_, *batches), _ in BROADCASTS.values()]


@pytest.mark.parametrize("batches", BATCHES)
def test_energy_is_the_contracts_sum(batches):
    model = make(batches)
    z = (torch.rand(5, *model.batch_shape, 7) < 0.5).double()
    left, right = model.split(z)
    expected = torch.zeros(5, *model.batch_shape, dtype=torch.float64)
    for i in range(4):
        expected -= model.left_bias[..., i] * left[..., i]
        for j in range(3):
            expected -= model.weight[..., i, j] * left[..., i] * right[..., j]
    for j in range(3):
        expected -= model.right_bias[..., j] * right[..., j]
    assert_close(model.energy(z), expected, 1e-12)
    assert_close(model.energy_of(left, right), expected, 1e-12)
    transposed = BipartiteBoltzmann(model.right_bias, model.left_bias, model.weight.mT)
    assert_close(transposed.energy_of(right, left), expected, 1e-12)


@pytest.mark.parametrize("batches", BATCHES)
def test_free_energy_sums_right_out(batches):
    model = make(batches)
    left = (torch.rand(5, *model.batch_shape, 4) < 0.5).double()
    rights = all_states(3).reshape(8, *(1,) * (left.dim() - 1), 3)
    expected = -torch.logsumexp(-model.energy_of(left, rights), 0)
    assert_close(model.free_energy(left), expected, 1e-12)


def test_zero_couplings_are_independent_bits():
    bias = torch.randn(4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    model = BipartiteBoltzmann(*bias, torch.zeros(4, 3, dtype=torch.float64))
    independent = torch.distributions.Independent(torch.distributions.Bernoulli(logits=torch.cat(bias)), 1)
    states = all_states(7)
    assert_close(model.log_prob(states), independent.log_prob(states), 1e-12)


def test_sample_start_and_seed():
    model = make()
    left = (torch.rand(6, 4) < 0.5).double()
    expected = bipartite_gibbs(left, model.left_bias, model.right_bias, model.weight, 5, seed=3)
    assert_same_bits(model.sample((6,), 5, initial=left, seed=3), torch.cat(expected, -1))
    assert_same_bits(model.sample((6,), 5, seed=3)[:2], model.sample((2,), 5, seed=3))
    assert_same_bits(model.sample((6,), 0, initial=left)[:, :4], left)
    for dtype in (torch.bool, torch.uint8, torch.float32):  # the result is of the parameters' dtype all the same
        assert_same_bits(model.sample((6,), 5, initial=left.to(dtype), seed=3), torch.cat(expected, -1))
        assert model.rsample((6,), 5, initial=left.to(dtype), seed=3).dtype == torch.float64
    torch.manual_seed(1)
    first = model.sample((6,), 5)
    assert_same_bits(model.sample((6,), 5, generator=torch.Generator().manual_seed(1)), first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left_bias": torch.zeros(5)}, r"left_bias must have shape \[\.\.\., 4\]"),
        ({"right_bias": torch.zeros(2, 4)}, r"right_bias must have shape \[\.\.\., 3\]"),
        ({"weight": torch.zeros(4)}, "weight needs 2 or more dims"),
        ({"left_bias": torch.tensor(0.0)}, "left_bias needs 1 or more dims"),
        ({"weight": torch.zeros(4, 3, dtype=torch.int64)}, "weight must be a floating-point tensor"),
        ({"right_bias": [0.0, 0.0, 0.0]}, "right_bias must be a floating-point tensor, got list"),
        ({"left_bias": torch.zeros(4, dtype=torch.float64)}, "left_bias must have the dtype of weight"),
        ({"left_bias": torch.zeros(2, 4), "weight": torch.zeros(3, 4, 3)}, "batch dims do not broadcast"),
    ],
)
def test_bad_parameters(change, message):
    good = {"left_bias": torch.zeros(4), "right_bias": torch.zeros(3), "weight": torch.zeros(4, 3)}
    BipartiteBoltzmann(**good)
    with pytest.raises(ValueError, match=f"^BipartiteBoltzmann: {message}"):
        BipartiteBoltzmann(**{**good, **change})


def test_values_are_validated_on_request():
    with pytest.raises(ValueError, match="weight"):
        BipartiteBoltzmann(torch.zeros(4), torch.zeros(3), torch.full((4, 3), torch.nan), validate_args=True)
    model = make()
    with pytest.raises(ValueError, match="support"):
        model.log_prob(torch.full((7,), 0.5).double())
    with pytest.raises(ValueError, match=r"^BipartiteBoltzmann: z must have shape \[\.\.\., 7\]"):
        model.energy(torch.zeros(6).double())
    with pytest.raises(ValueError, match=r"^BipartiteBoltzmann.log_partition: method must be"):
        model.log_partition("guess")
    large = BipartiteBoltzmann(torch.zeros(30), torch.zeros(26), torch.zeros(30, 26))
    with pytest.raises(ValueError, match=r"^BipartiteBoltzmann.log_prob: a model of 30 \+ 26 units is too large"):
        large.log_prob(torch.zeros(56))


def test_other_bad_calls():
    model = make()
    errors = pytest.raises
    with errors(ValueError, match=r"^BipartiteBoltzmann.rsample: num_relaxed_sweeps must be at least 1, got 0"):
        model.rsample(num_relaxed_sweeps=0)
    with errors(ValueError, match=r"^BipartiteBoltzmann.rsample: relaxation must be one of .*, got 'none'"):
        model.rsample(relaxation="none")
    for call in (model.free_energy, model.fields_of_right, lambda left: model.energy_of(left, torch.zeros(3))):
        with errors(ValueError, match=r"^BipartiteBoltzmann: left must have shape \[\.\.\., 4\], got \[2, 5\]"):
            call(torch.zeros(2, 5))
        with errors(TypeError, match=r"^BipartiteBoltzmann: left must be a tensor, got int"):
            call(3)
    with errors(ValueError, match=r"^BipartiteBoltzmann: right must have shape \[\.\.\., 3\], got \[4\]"):
        model.energy_of(torch.zeros(4).double(), torch.zeros(4).double())
    with errors(TypeError, match=r"^BipartiteBoltzmann: z must be a tensor, got list"):
        model.energy([0])
    with errors(ValueError, match=r"^BipartiteBoltzmann.log_partition: num_chains must be at least 1, got 0"):
        model.log_partition(num_chains=0)


def test_broadcast_energy_does_not_materialise_the_weight():
    """1000 chains of 2 models of 500 + 500 units: the weight repeated per chain would be 2 GB."""
    model = BipartiteBoltzmann(*random_parameters(500, 500, ((), (), (2,)), dtype=torch.float32), validate_args=False)
    z = torch.zeros(1000, 2, 1000)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model.energy(z)
    assert max(event.self_cpu_memory_usage for event in profile.key_averages()) < 50e6
