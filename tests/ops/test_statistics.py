# SPDX-License-Identifier: Apache-2.0
"""Samples against enumeration. Each test alarms once in a million seeds, and its planted faults must trip it.

Each of many independent chains gives one draw, so the chi-square test needs no autocorrelation time. SWEEPS leave no
bias that this many draws could see (a test shows it).
"""

import pytest
import torch
from support import (
    FALSE_ALARM,
    Parameters,
    all_states,
    chi_square_excess,
    exact_probabilities,
    random_parameters,
    word_faults,
    z_threshold,
)

from gibbs_ext import BipartiteBoltzmann, bipartite_gibbs, bipartite_gibbs_relaxed, reference

CHAINS, SWEEPS = 150_000, 16


@pytest.fixture
def model() -> Parameters:
    # conftest seeds the model; scale 0.8 keeps every state likely enough to count.
    return random_parameters(4, 3, scale=0.8)


def test_sweeps_are_enough(model):
    """The exact transition matrix of left shows it, from the start and at the largest beta of the tests."""
    beta = 1.7
    left, right = all_states(4), all_states(3)
    left_bias, right_bias, weight = (x.double() for x in model)

    def conditional(states, fields):
        p = torch.sigmoid(beta * fields).unsqueeze(1)
        return torch.where(states.bool(), p, 1 - p).prod(-1)

    transition = conditional(right, left @ weight + right_bias) @ conditional(left, right @ weight.mT + left_bias)
    at_end = torch.linalg.matrix_power(transition, SWEEPS)[0]
    exact = exact_probabilities(model, beta).reshape(8, 16).sum(0)
    # The noncentrality of chi-square is far below its standard deviation, which is about 16.
    assert CHAINS * ((at_end - exact) ** 2 / exact).sum() < 0.1


def draw(model, beta=1.0, **kwargs):
    left = torch.zeros(CHAINS, 4, dtype=torch.bool)
    return torch.cat(bipartite_gibbs(left, *model, SWEEPS, beta=beta, **kwargs), -1)


@pytest.mark.parametrize("beta", [1.0, 0.5, 1.7])
def test_binary_sweeps_sample_the_model(model, beta, instruction_set):
    assert chi_square_excess(draw(model, beta), exact_probabilities(model, beta)) < 1


def test_weight_per_chain_samples_the_model(model):
    left = torch.zeros(CHAINS // 10, 10, 4, dtype=torch.bool)
    weight = model.weight.expand(10, 4, 3).contiguous()
    z = torch.cat(bipartite_gibbs(left, *model[:2], weight, SWEEPS), -1)
    assert chi_square_excess(z, exact_probabilities(model)) < 1


def test_planted_faults_trip_the_alarm(model):
    exact = exact_probabilities(model)
    dropped = model.weight.clone()
    dropped.view(-1)[dropped.abs().argmax()] = 0
    nudged = model.left_bias + torch.tensor([0.1, 0, 0, 0])
    half = torch.cat(bipartite_gibbs(torch.zeros(CHAINS, 4), *model, 1), -1)
    sides_swapped = Parameters(model.left_bias, model.right_bias, model.weight.flip(0))
    faults = {
        "beta * 1.03": draw(model, 1.03),
        "one coupling dropped": draw(model._replace(weight=dropped)),
        "one bias off by 0.1": draw(model._replace(left_bias=nudged)),
        "couplings in the wrong order": draw(sides_swapped),
        "one sweep from a fixed start": half,
        "left never updated": torch.cat(
            bipartite_gibbs(torch.zeros(CHAINS, 4), *model, SWEEPS, clamp_left=torch.tensor(True)), -1
        ),
        "few distinct chains": draw(model, chain_offset=torch.arange(CHAINS) % (CHAINS // 20)),
    }
    passed = [name for name, z in faults.items() if chi_square_excess(z, exact) < 1]
    assert not passed


def sampled_by_reference(model, chains=40_000):
    left = torch.zeros(chains, 4)
    return torch.cat(reference.bipartite_gibbs_reference(left, *model, 15, seed=1), -1)


def test_reused_random_words_trip_the_alarm(model, monkeypatch):
    """Faults of the random words are planted into the reference."""
    exact = exact_probabilities(model)
    assert chi_square_excess(sampled_by_reference(model), exact) < 1

    for fault in word_faults(reference.random_words):
        monkeypatch.setattr(reference, "random_words", fault)
        assert chi_square_excess(sampled_by_reference(model), exact) > 1, fault.__name__


def test_clamped_units_condition_the_rest(model):
    """Draws are those of p(free | clamped), with the first left and the last right unit clamped to 1."""
    left, right = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0.0, 0, 1])
    clamps = {
        "right": right.expand(CHAINS, 3),
        "clamp_left": torch.tensor([True, False, False, False]),
        "clamp_right": torch.tensor([False, False, True]),
    }
    z = torch.cat(bipartite_gibbs(left.expand(CHAINS, 4), *model, SWEEPS, **clamps), -1)
    states = all_states(7)
    exact = exact_probabilities(model) * (states[:, 0] == 1) * (states[:, 6] == 1)
    assert chi_square_excess(z, exact / exact.sum()) < 1
    assert chi_square_excess(draw(model), exact / exact.sum()) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_straight_through_samples_the_model(model, dtype):
    p = [x.to(dtype) for x in model]
    left, right, _ = bipartite_gibbs_relaxed(
        torch.zeros(CHAINS, 4, dtype=dtype), *p, SWEEPS, 2, relaxation="straight_through"
    )
    exact = exact_probabilities(model)
    assert chi_square_excess(torch.cat((left, right), -1), exact) < 1
    hot = bipartite_gibbs_relaxed(
        torch.zeros(CHAINS, 4, dtype=dtype), *p, SWEEPS, 2, relaxation="straight_through", beta=0.95
    )
    assert chi_square_excess(torch.cat(hot[:2], -1), exact) > 1


def test_left_mean_integrates_left_out(model):
    """The mean over chains is the marginal of left, with less variance than left itself."""
    exact = (exact_probabilities(model).unsqueeze(-1) * all_states(7)).sum(0)[:4]
    left, _, left_mean = bipartite_gibbs_relaxed(torch.zeros(CHAINS, 4), *model, SWEEPS, relaxation="straight_through")
    z = (left_mean.double().mean(0) - exact) / (left_mean.double().std(0) / CHAINS**0.5)
    assert z.abs().max() < z_threshold(4)
    assert (left_mean.var(0) < left.var(0)).all()
    wrong = bipartite_gibbs_relaxed(torch.zeros(CHAINS, 4), *model, SWEEPS, relaxation="straight_through", beta=0.95)[2]
    assert ((wrong.double().mean(0) - exact) / (wrong.double().std(0) / CHAINS**0.5)).abs().max() > z_threshold(4)


@pytest.mark.parametrize("relaxation", ["pwl", "concrete"])
def test_relaxed_units_follow_the_uniforms_law(relaxation):
    """Without couplings zeta is a known increasing function of a uniform; a Kolmogorov-Smirnov test checks its law."""
    from scipy import stats

    bias = torch.tensor([-2.0, 0.3, 1.1], dtype=torch.float64)
    zero = torch.zeros(3, 3, dtype=torch.float64)
    n = 100_000
    left, _, _ = bipartite_gibbs_relaxed(
        torch.zeros(n, 3, dtype=torch.float64), bias, bias, zero, 0, 1, relaxation=relaxation, sharpness=4.0
    )
    q = torch.sigmoid(bias)
    inside = (left > 1e-9) & (left < 1 - 1e-9)
    if relaxation == "pwl":
        u = (left - 0.5) * (q * (1 - q) + 1e-2) + 1 - q
    else:
        u = torch.sigmoid(torch.logit(left) / 4.0 - bias)
    for unit in range(3):
        x = u[inside[:, unit], unit]
        low, high = float(x.min()), float(x.max())
        scaled = ((x - low) / (high - low)).numpy()
        assert stats.kstest(scaled, "uniform").pvalue > FALSE_ALARM
        assert stats.kstest(scaled**1.2, "uniform").pvalue < FALSE_ALARM


def test_distribution_sample(model):
    rbm = BipartiteBoltzmann(*model)
    assert chi_square_excess(rbm.sample((CHAINS,), SWEEPS), exact_probabilities(model)) < 1
    # Its uniform start, which is exact at beta = 0.
    nothing = Parameters(torch.zeros(4), torch.zeros(3), torch.zeros(4, 3))
    assert chi_square_excess(rbm.sample((CHAINS,), 0), exact_probabilities(nothing)) < 1
    assert chi_square_excess(rbm.sample((CHAINS,), 1), exact_probabilities(model)) > 1
