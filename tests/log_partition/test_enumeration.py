# SPDX-License-Identifier: Apache-2.0
"""Exact answers of bipartite models against brute force over all states."""

import math

import pytest
import torch
from support import (
    BROADCASTS,
    all_states,
    assert_bits,
    assert_close,
    assert_same_bits,
    chi_square_excess,
    exact_probabilities,
    random_parameters,
    state_numbers,
    z_threshold,
)
from torch.nn.functional import softplus

from gibbs_ext import (
    BipartiteBoltzmann,
    exact_log_partition,
    exact_marginals,
    exact_samples,
)
from gibbs_ext.log_partition import machine


def make_bipartite(n1, n2, batches=((), (), ())):
    return BipartiteBoltzmann(*random_parameters(n1, n2, batches, dtype=torch.float64))


@pytest.mark.parametrize("batches", [tuple(batches) for (_, *batches), _ in BROADCASTS.values()])
@pytest.mark.parametrize(("n1", "n2"), [(1, 1), (4, 3), (2, 6)])
@pytest.mark.parametrize("chunk", [None, 16])
def test_bipartite_log_partition(batches, n1, n2, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(machine, "CHUNK", chunk)
    model = make_bipartite(n1, n2, batches)
    states = all_states(n1 + n2).reshape(-1, *(1,) * len(model.batch_shape), n1 + n2)
    expected = (-model.energy(states)).logsumexp(0)
    actual = exact_log_partition(model)
    assert actual.dtype == torch.float64
    assert_close(actual, expected.expand(model.batch_shape), 1e-12)


@pytest.mark.parametrize("chunk", [2**22, 64])
def test_bipartite_gradcheck(chunk, monkeypatch):
    monkeypatch.setattr(machine, "CHUNK", chunk)
    p = [x.requires_grad_() for x in random_parameters(5, 4, ((2,), (), (2,)), dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *p: exact_log_partition(BipartiteBoltzmann(*p)), p)


def test_a_wide_bipartite_model():
    """Zero couplings have a closed form; the enumeration is of many chunks."""
    bias = torch.randn(300), torch.randn(16)
    expected = sum(softplus(b.double()).sum() for b in bias)
    assert_close(exact_log_partition(BipartiteBoltzmann(*bias, torch.zeros(300, 16))), expected, 1e-12)


# The smaller side is left, or right, or of one unit.
SIDES = [(1, 1), (1, 6), (6, 1), (4, 3), (3, 4), (2, 6)]


def bipartite_by_brute_force(model):
    """single [M, n1 + n2] and pair [M, n1, n2] in float64."""
    n = model.num_units
    z = all_states(n).reshape(-1, *(1,) * len(model.batch_shape), n)
    p = (-model.energy(z)).expand(-1, *model.batch_shape).softmax(0).unsqueeze(-1)
    left, right = model.split(z)
    pairs = left.unsqueeze(-1) * right.unsqueeze(-2)
    return (p * z).sum(0), (p.unsqueeze(-1) * pairs).sum(0)


@pytest.mark.parametrize("batches", [tuple(batches) for (_, *batches), _ in BROADCASTS.values()])
@pytest.mark.parametrize(("n1", "n2"), SIDES)
@pytest.mark.parametrize("chunk", [None, 1, 16, 64])
def test_bipartite_marginals(batches, n1, n2, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(machine, "CHUNK", chunk)
    model = make_bipartite(n1, n2, batches)
    marginals = exact_marginals(model)
    for actual, expected in zip(marginals, bipartite_by_brute_force(model), strict=True):
        assert actual.dtype == torch.float64
        assert_close(actual, expected, 1e-12)


def test_bipartite_marginals_are_the_gradient():
    """With many chunks of the usual size: 2^15 states of 50 other units."""
    for sides in ((15, 50), (50, 15)):
        parameters = [p.requires_grad_() for p in random_parameters(*sides)]
        model = BipartiteBoltzmann(*parameters)
        *single, pair = torch.autograd.grad(exact_log_partition(model), parameters)
        marginals = exact_marginals(model)
        assert not marginals.single.requires_grad
        assert_close(marginals.single.float(), torch.cat(single), 1e-6)
        assert_close(marginals.pair.float(), pair, 1e-6)
        # No rounding makes more than 1 of a probability.
        assert (marginals.single <= 1).all()


def test_bipartite_marginals_of_large_parameters():
    """exp(1000) is no float64."""
    model = BipartiteBoltzmann(*(1000 * p for p in random_parameters(4, 5, ((3,), (), (3,)), dtype=torch.float64)))
    for actual, expected in zip(exact_marginals(model), bipartite_by_brute_force(model), strict=True):
        assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize(("n1", "n2"), SIDES)
def test_bipartite_samples_follow_the_model(n1, n2, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(machine, "CHUNK", chunk)
    p = [x + 0.5 for x in random_parameters(n1, n2, scale=0.6)]
    z = exact_samples(BipartiteBoltzmann(*p), 50_000)
    assert_bits(z)
    assert z.dtype == torch.float32
    assert chi_square_excess(z, exact_probabilities(p)) < 1
    assert chi_square_excess(z, exact_probabilities(p, 1.2)) > 1


@pytest.mark.parametrize("chunk", [None, 4])
def test_bipartite_samples_are_independent(chunk, monkeypatch):
    """Pairs of consecutive draws: six bits whose probabilities are products."""
    if chunk:
        monkeypatch.setattr(machine, "CHUNK", chunk)
    p = random_parameters(2, 1)
    z = exact_samples(BipartiteBoltzmann(*p), 100_000)
    probabilities = exact_probabilities(p)
    both = torch.outer(probabilities, probabilities).flatten()
    assert chi_square_excess(z.reshape(-1, 6), both) < 1
    # Planted fault: in the order of their states.
    assert chi_square_excess(z[state_numbers(z).argsort()].reshape(-1, 6), both) > 1


@pytest.mark.parametrize("chunk", [None, 8, 100])
def test_bipartite_samples_of_batches(chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(machine, "CHUNK", chunk)
    count, model = 20_000, make_bipartite(3, 4, ((2, 1), (3,), (2, 3)))
    z = exact_samples(model, count)
    assert z.shape == (count, 2, 3, 7)
    single, pair = exact_marginals(model)
    left, right = model.split(z)
    means = torch.cat((z.mean(0), (left.unsqueeze(-1) * right.unsqueeze(-2)).mean(0).flatten(-2)), -1)

    def excess(*marginals):
        e = torch.cat([m.flatten(2) for m in marginals], -1)
        return float(((means - e) / (e * (1 - e) / count).sqrt()).abs().max()) / z_threshold(e.numel())

    assert excess(single, pair) < 1
    # Planted fault: the models of the batch exchanged.
    assert excess(single.flip(0, 1), pair.flip(0, 1)) > 1


@pytest.mark.parametrize(("n1", "n2"), [(5, 9), (9, 5)])
def test_generator_and_seed_of_bipartite_samples(n1, n2):
    model = make_bipartite(n1, n2, ((2,), (), ()))
    torch.manual_seed(5)
    first = exact_samples(model, 10)
    assert_same_bits(exact_samples(model, 10, generator=torch.Generator().manual_seed(5)), first)
    assert not exact_samples(model, 10).equal(first)
    assert exact_samples(model, 0).shape == (0, 2, 14)
    before = torch.get_rng_state()
    seeded = exact_samples(model, 10, seed=7)
    assert_same_bits(exact_samples(model, 10, seed=torch.tensor(7)), seeded)
    assert not exact_samples(model, 10, seed=8).equal(seeded)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_bipartite_samples_have_the_dtype_of_the_parameters(dtype):
    z = exact_samples(BipartiteBoltzmann(*random_parameters(3, 2, dtype=dtype)), 5)
    assert z.dtype == dtype
    assert_bits(z)


def test_bipartite_answers_in_inference_mode():
    with torch.inference_mode():
        model = make_bipartite(3, 2)
        assert_close(exact_marginals(model).single, bipartite_by_brute_force(model)[0], 1e-12)
        assert exact_samples(model, 4).shape == (4, 5)


@pytest.mark.parametrize("batch", [(0,), (3, 0)])
def test_no_bipartite_models(batch):
    model = BipartiteBoltzmann(torch.zeros(*batch, 3), torch.zeros(2), torch.zeros(3, 2))
    single, pair = exact_marginals(model)
    assert (single.shape, pair.shape) == ((*batch, 5), (*batch, 3, 2))
    assert exact_samples(model, 2).shape == (2, *batch, 5)


@pytest.mark.parametrize(("n1", "n2"), [(0, 0), (0, 3), (3, 0)])
def test_a_side_without_units(n1, n2):
    model = make_bipartite(n1, n2, ((2,), (), ()))
    biases = torch.cat([model.left_bias.expand(2, n1), model.right_bias.expand(2, n2)], -1)
    assert_close(exact_log_partition(model), softplus(biases).sum(-1), 1e-12)
    assert_close(exact_marginals(model)[0], biases.sigmoid(), 1e-12)
    assert exact_samples(model, 7).shape == (7, 2, n1 + n2)


def test_says_when_too_large():
    for name, call, instead in (
        ("exact_log_partition", exact_log_partition, "annealed_importance_sampling"),
        ("exact_marginals", exact_marginals, "bipartite_gibbs"),
        ("exact_samples", lambda model: exact_samples(model, 3), "bipartite_gibbs"),
    ):
        message = rf"^{name}: the smaller side of 30 \+ 26 units has more than 25; use {instead}$"
        with pytest.raises(ValueError, match=message):
            call(make_bipartite(30, 26))
    message = r"model must be a BipartiteBoltzmann or a GraphBoltzmann, got int"
    with pytest.raises(TypeError, match=f"^exact_log_partition: {message}"):
        exact_log_partition(3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_parameters_of_bipartite_models_must_be_finite(value):
    for argument in ("left_bias", "right_bias", "weight"):
        model = make_bipartite(2, 3, ((2,), (2,), (2,)))
        getattr(model, argument)[1, 1] = value
        with pytest.raises(ValueError, match=f"^exact_log_partition: {argument} must be finite, got NaN or inf"):
            exact_log_partition(model)
        with pytest.raises(ValueError, match=f"^exact_marginals: {argument} must be finite, got NaN or inf"):
            exact_marginals(model)
        with pytest.raises(ValueError, match=f"^exact_samples: {argument} must be finite, got NaN or inf"):
            exact_samples(model, 3)
