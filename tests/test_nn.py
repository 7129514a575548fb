# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from support import assert_bits, assert_close, assert_same_bits, exact_left_samples, z_threshold

from gibbs_ext import exact_log_partition
from gibbs_ext.nn import BoltzmannPosterior, BoltzmannPrior

COUPLINGS = ["per_sample", "shared", "low_rank"]


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_parameters_are_those_of_the_method(coupling):
    """weight = 2 t J, left_bias = t (b1 - sum_j J), right_bias = t (b2 - sum_i J), J = 1.5 / sqrt(n1) * raw."""
    posterior = BoltzmannPosterior(7, 5, 4, coupling=coupling, rank=3, spin_beta=2.0).double()
    features = torch.randn(6, 7, dtype=torch.float64)
    if coupling == "shared":
        raw = posterior.raw_coupling.expand(6, 5, 4)
    else:
        out = features @ posterior.head.weight.mT
        out = (out - out.mean(0)) / (out.var(0, correction=0) + 1e-2).sqrt()
        if coupling == "per_sample":
            raw = out.reshape(6, 5, 4)
        else:
            raw = torch.einsum("ir,br,jr->bij", posterior.left_factor, out, posterior.right_factor)
    spin = 1.5 / math.sqrt(5) * raw
    b1, b2 = posterior.bias(features).split((5, 4), -1)
    left_bias, right_bias, weight = posterior.parameters_of(features)
    assert weight.shape == ((5, 4) if coupling == "shared" else (6, 5, 4))
    assert_close(weight.expand(6, 5, 4), 4 * spin, 1e-12)
    assert_close(left_bias, 2 * (b1 - spin.sum(-1)), 1e-12)
    assert_close(right_bias, 2 * (b2 - spin.sum(-2)), 1e-12)
    # Without biases, flipping every bit leaves the energy: the units are fair.
    model = posterior.distribution(features)
    assert model.batch_shape == (6,)
    flat = type(model)(-weight.sum(-1) / 2, -weight.sum(-2) / 2, weight)
    z = (torch.rand(6, 9) < 0.5).double()
    assert_close(flat.energy(1 - z), flat.energy(z), 1e-12)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("chains", [1, 3])
def test_sample(coupling, chains):
    posterior = BoltzmannPosterior(7, 5, 4, coupling=coupling, chains_per_point=chains, dataset_size=20)
    features = torch.randn(6, 7, requires_grad=True)
    leading = () if chains == 1 else (chains,)
    for index in (None, torch.arange(6)):
        sample = posterior(features, index)
        assert sample.left.shape == sample.left_mean.shape == (*leading, 6, 5)
        assert sample.right.shape == (*leading, 6, 4)
        assert sample.model.energy_of(sample.left, sample.right).shape == (*leading, 6)
        assert ((sample.left >= 0) & (sample.left <= 1)).all()
        posterior.zero_grad()
        features.grad = None
        (sample.left_mean.sum() + (sample.right**2).sum()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in posterior.parameters())
        assert features.grad.abs().max() > 0


def test_persistent_chains_are_continued_in_training_only():
    posterior = BoltzmannPosterior(7, 5, 4, num_sweeps=0, dataset_size=20)
    features, index = torch.randn(6, 7), torch.tensor([3, 1, 4, 15, 9, 2])
    before = posterior.chains.left_bits.clone()
    posterior(features, index)  # no binary sweeps: the state stays
    assert_same_bits(posterior.chains.left_bits, before)
    posterior.num_sweeps = 10
    posterior.eval()(features, index)
    assert_same_bits(posterior.chains.left_bits, before)
    posterior.train()
    posterior(features)  # no index: chains of its own
    assert_same_bits(posterior.chains.left_bits, before)
    posterior(features, index)
    changed = (posterior.chains.left_bits != before).flatten(1).any(1)
    assert not changed[[i for i in range(20) if i not in index.tolist()]].any()
    assert changed.any()
    with pytest.raises(ValueError, match=r"^BoltzmannPosterior: index needs"):
        BoltzmannPosterior(7, 5, 4)(features, index)
    with pytest.raises(ValueError, match=r"^BoltzmannPosterior: coupling must be one of"):
        BoltzmannPosterior(7, 5, 4, coupling="none")


@pytest.mark.parametrize(
    "change",
    [{"chains_per_point": 0}, {"num_left": 0}, {"num_sweeps": -1}, {"num_relaxed_sweeps": 0}, {"dataset_size": 0},
     {"num_right": 2.5}, {"rank": 0}],
)  # fmt: skip
def test_bad_posterior(change):
    ((name, value),) = change.items()
    with pytest.raises((TypeError, ValueError), match=f"^BoltzmannPosterior: {name} must be .*, got {value}$"):
        BoltzmannPosterior(**{"in_features": 7, "num_left": 5, "num_right": 4, **change})


@pytest.mark.parametrize("change", [{"num_left": 0}, {"num_right": 2.5}, {"num_chains": 0}, {"num_sweeps": 0}])
def test_bad_prior(change):
    ((name, value),) = change.items()
    with pytest.raises((TypeError, ValueError), match=f"^BoltzmannPrior: {name} must be .*, got {value}$"):
        BoltzmannPrior(**{"num_left": 5, "num_right": 4, **change})


def test_posterior_is_governed_by_manual_seed():
    posterior = BoltzmannPosterior(7, 5, 4).eval()
    features = torch.randn(6, 7)
    torch.manual_seed(3)
    first, second = posterior(features), posterior(features)
    torch.manual_seed(3)
    assert_same_bits(posterior(features)[:3], first[:3])
    assert not second.left.equal(first.left)


@pytest.mark.parametrize("module", ["posterior", "prior"])
def test_state_dict_round_trip(module):
    def make():
        return (
            BoltzmannPosterior(7, 5, 4, dataset_size=9) if module == "posterior" else BoltzmannPrior(5, 4, num_chains=7)
        )

    first, second = make(), make()
    assert any("left_bits" in key for key in first.state_dict())
    second.load_state_dict(first.state_dict())
    for key, value in first.state_dict().items():
        assert_same_bits(second.state_dict()[key], value)


def test_log_partition_surrogate_has_the_gradient_of_log_z():
    count = 20_000
    prior = BoltzmannPrior(5, 4, num_chains=count, num_sweeps=30)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.normal_()
    names, parameters = zip(*prior.named_parameters(), strict=True)
    actual = torch.autograd.grad(prior.log_partition_surrogate(), parameters)
    exact = torch.autograd.grad(exact_log_partition(prior.distribution()), parameters)
    for name, a, e in zip(names, actual, exact, strict=True):
        assert (a - e).abs().max() < z_threshold(29) * 0.5 / count**0.5, name
    # Planted fault: parameters that moved after the chains did.
    with torch.no_grad():
        prior.weight += 0.2
    moved = torch.autograd.grad(exact_log_partition(prior.distribution()), parameters)
    assert (
        max(float((a - e).abs().max()) for a, e in zip(actual, moved, strict=True)) > z_threshold(29) * 0.5 / count**0.5
    )


def test_prior_chains_advance():
    prior = BoltzmannPrior(5, 4, num_chains=50)
    assert_bits(prior.chains.state())
    before = prior.chains.state()
    prior.log_partition_surrogate()
    assert not prior.chains.state().equal(before)
    assert prior.energy(torch.zeros(5), torch.zeros(4)).item() == 0
    left = exact_left_samples(prior.distribution(), 10)
    assert prior.energy(left, torch.ones(10, 4)).requires_grad
