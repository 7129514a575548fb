# SPDX-License-Identifier: Apache-2.0
"""Directed posteriors against enumeration, and the mixture of power functions against its definition."""

import numpy as np
import pytest
import torch
from scipy import stats
from support import FALSE_ALARM, assert_close, assert_same_bits
from torch.nn import functional as F

import gibbs_ext as gx
from undirected_vae.directed import (
    DirectedPosterior,
    DirectedSample,
    all_bits,
    power_function_divergence,
    power_function_log_odds,
)

PIXELS, FEATURES = 4, 3


def posterior(num_latents, groups, **options):
    """A posterior far from its initial values, in evaluation mode."""
    torch.manual_seed(0)
    made = DirectedPosterior(FEATURES, num_latents, torch.full((PIXELS,), 0.5), groups=groups, widths=(5,), **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.7 * torch.randn_like(parameter)
    return made.eval()


def points(count):
    """Features and images."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(count, FEATURES, generator=generator)
    return features, (torch.rand(count, PIXELS, generator=generator) < 0.5).float()


def test_all_bits_in_order():
    assert all_bits(2).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert all_bits(1).tolist() == [[0], [1]]


@pytest.mark.parametrize("groups", range(1, 8))
def test_groups_are_as_even_as_possible(groups):
    sizes = posterior(7, groups).sizes
    assert len(sizes) == groups
    assert sum(sizes) == 7
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_samples_follow_the_table_of_probabilities(groups):
    made, (features, images) = posterior(5, groups), points(2)
    with torch.no_grad():
        table = made.log_table(features, images)
        z, log_q = made.sample(features, images, 20_000, seed=3)
    assert table.shape == (32, 2)
    assert_close(table.logsumexp(0), torch.zeros(2), 1e-5)
    number = (z @ 2.0 ** torch.arange(4, -1, -1)).long()
    assert_close(log_q, table.gather(0, number), 1e-5)
    counts = torch.stack([torch.bincount(column, minlength=32) for column in number.unbind(1)]).numpy()
    expected = table.double().softmax(0).mT.numpy() * len(z)
    assert stats.chisquare(counts.ravel(), expected.ravel(), ddof=1).pvalue > FALSE_ALARM
    # The planted fault: each data point has the other's probabilities.
    assert stats.chisquare(counts.ravel(), expected[::-1].ravel(), ddof=1).pvalue < FALSE_ALARM


def test_further_groups_depend_on_the_groups_before():
    table = posterior(2, 2).log_table(*points(1))[:, 0]
    logits = table[[1, 3]] - table[[0, 2]]  # of the second unit, given each value of the first
    assert abs(logits[0] - logits[1]) > 0.1


@pytest.mark.parametrize("t", [1.0, 2.5])
def test_spin_beta_is_a_factor_of_all_logits(t):
    def logits(spin_beta):
        """Of the first unit; and of the second, given each value of the first."""
        made = posterior(2, 2, spin_beta=spin_beta)
        with torch.no_grad():
            table = made.log_table(*points(3)).view(2, 2, 3)
        first = table.logsumexp(1)
        return torch.cat([(first[1] - first[0])[None], table[:, 1] - table[:, 0]])

    assert logits(1.0).abs().min() > 1e-3
    assert_close(logits(t), t * logits(1.0), 1e-5)


def test_groups_have_random_words_of_their_own():
    made, (features, images) = posterior(2, 2, relaxation="concrete", sharpness=1.0), points(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
        relaxed = made(features, images, 1000, seed=5).z[:, 0]
        bits, _ = made.sample(features, images, 1000, seed=5)
    assert (relaxed[:, 0] != relaxed[:, 1]).all()
    equal = [int((z[:, 0] == z[:, 1]).sum()) for z in (relaxed.round(), bits[:, 0])]
    assert all(stats.binomtest(count, 1000, 0.5).pvalue > FALSE_ALARM for count in equal)


@pytest.mark.parametrize("relaxation", ["pwl", "concrete", "straight_through", "power_function"])
def test_samples_do_not_depend_on_how_a_batch_is_split(relaxation):
    made, (features, images) = posterior(5, 2, relaxation=relaxation), points(6)
    numbers = torch.arange(3 * 6).view(3, 6)
    whole = made(features, images, 3, chain_offset=numbers, seed=7)
    parts = [
        made(features[part], images[part], 3, chain_offset=numbers[:, part], seed=7)
        for part in (slice(0, 2), slice(2, 6))
    ]
    assert whole.z.shape == (3, 6, 5)
    assert_close(torch.cat([part.z for part in parts], 1), whole.z, 1e-5)
    # Other numbers have other noise.
    others = made(features, images, 3, chain_offset=numbers + 18, seed=7)
    assert (others.z != whole.z).any(-1).float().mean() > 0.5


def test_the_means_of_the_last_group_replace_it():
    sample = posterior(5, 2)(*points(3), seed=1)
    assert_same_bits(sample.z_mean[:, :2], sample.z[:, :2])
    assert_same_bits(sample.z_mean[:, 2:], torch.sigmoid(sample.logits[:, 2:]))
    assert sample.log_odds is None


# The mixture of power functions --------------------------------------------------------------------------------------

EXPONENTS = [1 / 100, 1 / 30, 1 / 4, 1 / 2, 1]


def grid():
    """Logits and noise [400] float64, to the ends of float32's range of probabilities."""
    logits = torch.tensor(np.concatenate((np.linspace(-12, 12, 19), [0.3]))).double()
    noise = torch.tensor(np.concatenate((np.linspace(0.01, 0.99, 17), [1e-7, 1e-3, 1 - 1e-7]))).double()
    return (part.flatten() for part in torch.meshgrid(logits, noise, indexing="ij"))


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_log_odds_invert_the_distribution_function(exponent):
    logits, noise = grid()
    log_odds = power_function_log_odds(logits, noise, exponent)
    log_zeta, log_rest = F.logsigmoid(log_odds), F.logsigmoid(-log_odds)
    q = torch.sigmoid(logits)
    distribution = (1 - q) * (exponent * log_zeta).exp() - q * torch.expm1(exponent * log_rest)
    assert_close(distribution, noise, 1e-12)
    # The same where F is almost 1: 1 - F, to its relative precision.
    complement = -(1 - q) * torch.expm1(exponent * log_zeta) + q * (exponent * log_rest).exp()
    assert_close(complement / (1 - noise), torch.ones_like(noise), 1e-8)


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_gradient_of_the_implicit_function(exponent):
    logits, noise = grid()

    def log_odds(values):
        return power_function_log_odds(values, noise, exponent)

    step = 1e-4
    expected = (log_odds(logits + step) - log_odds(logits - step)) / (2 * step)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(log_odds(logits).sum(), logits)
    assert_close(gradient, expected, 1e-5)
    if exponent < 1:  # at 1, zeta is the noise
        assert expected.min() > -1e-6
        assert expected.max() > 0.5


def drawn(scale, exponent, groups=1):
    """A sample of the mixture, and a prior of 3 + 2 units with couplings of this standard deviation."""
    torch.manual_seed(2)
    made = posterior(5, groups, relaxation="power_function", sharpness=1 / exponent)
    prior = gx.nn.BoltzmannPrior(3, 2, num_chains=1)
    with torch.no_grad():
        prior.left_bias.normal_()
        prior.right_bias.normal_()
        prior.weight.normal_(0, scale) if scale else prior.weight.zero_()
        return made(*points(50), seed=11), prior


def exact_divergence(sample, prior, exponent):
    """log q(zeta) - log sum_z exp(-E(z)) r(zeta | z), by enumeration, in float64."""
    zeta, q = torch.sigmoid(sample.log_odds.double()), torch.sigmoid(sample.logits.double())
    off, on = (exponent * value ** (exponent - 1) for value in (zeta, torch.sigmoid(-sample.log_odds.double())))
    states = all_bits(5).double()
    log_r = torch.where(states[:, None] > 0, on.log(), off.log()).sum(-1)
    joint = -prior.energy(states.float()).detach().double()[:, None] + log_r
    return ((1 - q) * off + q * on).log().sum(-1) - joint.logsumexp(0)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("exponent", [1 / 30, 1 / 4])
def test_divergence_is_an_upper_bound_that_is_close_for_weak_couplings(exponent, groups):
    gaps = []
    for scale in (0.0, 0.1, 3.0):
        sample, prior = drawn(scale, exponent, groups)
        exact = exact_divergence(sample, prior, exponent)
        gap = power_function_divergence(sample, prior, exponent).detach().double() - exact
        assert gap.min() > -1e-4, scale
        gaps.append(gap)
    assert gaps[0].max() < 1e-4
    assert gaps[1].max() < 0.01
    assert gaps[2].max() > 0.05


def test_gradient_of_the_divergence_without_couplings():
    """Mean field is exact there, so the bound has the gradient of the exact value."""
    sample, prior = drawn(0.0, 1 / 4)
    gradients = []
    for divergence in (power_function_divergence, exact_divergence):
        logits, log_odds = (value.clone().requires_grad_() for value in (sample.logits, sample.log_odds))
        value = divergence(DirectedSample(sample.z, sample.z_mean, logits, log_odds), prior, 1 / 4)
        gradients.append(torch.autograd.grad(value.sum(), (logits, log_odds)))
    for actual, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0.1
        assert_close(actual, expected, 1e-4)
