# SPDX-License-Identifier: Apache-2.0
"""What `evaluate` finds out about its own estimates: annealing that fails, a loose bound, modes of the posterior."""

import itertools
import json
import math
import warnings

import many
import numpy as np
import pytest
import torch
from scipy import special

pytest.importorskip("tqdm")
from test_model import KINDS, exact_log_likelihood, small

import gibbs_ext as gx
from undirected_vae.__main__ import parser
from undirected_vae.config import EVALUATION, PRESETS, Config, resolve
from undirected_vae.data import Dataset
from undirected_vae.directed import log_bernoulli
from undirected_vae.evaluate import AnnealingWarning, compare, evaluate, read, summary
from undirected_vae.runs import Run, RunError
from undirected_vae.vae import VAE

SIDE, COUPLING, FIELD = 4, 5.0, 0.5


def planted(**settings):
    """A model of 4 + 4 latents, whose posterior is strongly coupled for images with pixel 0, and uniform for others.

    Its two modes, all units 1 and all units 0, have a barrier between them. The prior is coupled half as strongly, and
    the decoder looks at the sum of the units.
    """
    sizes = {"samples": 5000, "check_images": 0, "posterior_betas": 2, "prior_betas": 1000}
    config = Config(left=SIDE, right=SIDE, encoder=(), decoder=(), coupling="per_sample", **{**sizes, **settings})
    torch.manual_seed(0)
    images = (torch.rand(12, 9) < 0.4).to(torch.uint8) * 255
    images[:, 0] = torch.tensor([255, 255, 255, 0] * 3)
    data = Dataset(images, images, images, (3, 3), "test")
    model = VAE(config, torch.zeros(9), len(images)).eval()
    scale = 2 * config.spin_beta * 1.5 / SIDE**0.5
    with torch.no_grad():
        for parameter in model.posterior.parameters():
            parameter.zero_()
        model.posterior.norm.weight.fill_((1 + model.posterior.norm.eps) ** 0.5)
        model.posterior.head.weight[:, 0] = COUPLING / scale
        model.posterior.bias.weight[:, 0] = FIELD / config.spin_beta
        model.prior.weight.fill_(COUPLING / 2)
        for bias in (model.prior.left_bias, model.prior.right_bias):
            bias.fill_(FIELD - SIDE * COUPLING / 4)
        model.decoder.output.weight.fill_(0.3)
    return config, data, model


def exact_logits(model, images):
    """All states [S, N], and log p(x, z) and log q(z | x) [S, B] of a posterior that is factorial or a machine."""
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=model.prior.distribution().num_units)))
    with torch.no_grad():
        log_joint = model.log_joint(images, states[:, None])
        log_joint -= torch.logsumexp(-model.prior.energy(states), 0)
        features = model.encoder(images)
        if isinstance(model.posterior, gx.nn.BoltzmannPosterior):
            log_q = torch.log_softmax(-model.posterior.distribution(features).energy(states[:, None]), 0)
        else:
            log_q = log_bernoulli(model.posterior.spin_beta * model.posterior.logits(features), states[:, None])
    return states, log_joint.double(), log_q.double()


# Annealing ----------------------------------------------------------------------------------------------------------


def test_the_planted_posterior_is_as_described():
    _, data, model = planted()
    images = data.binary("test")
    states, _, log_q = exact_logits(model, images)
    coupled = images[:, 0] == 1
    extreme = (states.sum(1) == 0) | (states.sum(1) == 8)
    assert (log_q.exp()[extreme][:, coupled].sum(0) > 0.9).all()
    np.testing.assert_allclose(log_q[:, ~coupled], -8 * np.log(2), rtol=1e-5)


def test_annealing_that_fails_is_noticed_and_gets_more_steps():
    config, data, model = planted(posterior_max_betas=2)
    exact = exact_log_likelihood(model, data.binary("test"))
    with pytest.warns(AnnealingWarning, match="fails for 9 of 12 images with 2 betas"):
        result = evaluate(model, data, config)
    assert result["annealing"]["images_at_betas"] == {"2": 12}
    assert result["annealing"]["failed"] == 9
    assert "AIS to the posterior fails for 9 of 12 images with 2 betas" in summary(result)
    coupled = data.binary("test")[:, 0] == 1
    assert result["nll_plain_is_wrong"]
    assert result["nll_plain"] < -exact.mean() - 1  # as if it were much better than it is
    assert summary(result).index("WARNING") < summary(result).index(f"would give {result['nll_plain']:.2f}")

    with warnings.catch_warnings():
        warnings.simplefilter("error", gx.EffectiveSampleSizeWarning)
        result = evaluate(model, data, config.replace({"posterior_max_betas": 10_000}))
    steps = {int(count): number for count, number in result["annealing"]["images_at_betas"].items()}
    assert steps.pop(2) == 3
    assert sum(steps.values()) == 9
    assert all(count in (2 * 4**power for power in range(1, 7)) for count in steps)
    assert result["annealing"]["failed"] == 0
    sizes = torch.tensor(result["annealing"]["effective_sample_size"])
    assert sizes.shape == (12,)
    assert (sizes > 0.15 * 5000).all()
    assert (sizes[~coupled] == 5000).all()
    assert f"{', '.join(map(str, [2, *steps]))} betas for 3, " in summary(result)
    assert "WARNING" not in summary(result)
    assert not result["nll_plain_is_wrong"]
    assert abs(result["nll"] + exact.mean()) < 0.05
    assert abs(result["nll_plain"] + exact.mean()) < 0.05


def test_the_bound_is_one_for_any_annealing():
    """Its mean over seeds is below the exact log-likelihood, and the closer the better AIS works."""
    config, data, model = planted(samples=10, prior_betas=500)
    exact = exact_log_likelihood(model, data.binary("test")).numpy()
    coupled = data.binary("test")[:, 0].numpy() == 1
    looseness = {}
    for most in (2, 10_000):
        settings = [{"posterior_max_betas": most, "seed": seed} for seed in range(12)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AnnealingWarning)
            results = [evaluate(model, data, config.replace(setting)) for setting in settings]
        looseness[most] = (exact - np.mean([result["log_likelihood"] for result in results], 0))[coupled].mean()
    assert looseness[2] > 2 * looseness[10_000] > 0


def test_pilots_cost_little_where_annealing_suffices(monkeypatch):
    config, data, model = planted(samples=1000)
    model.posterior.head.weight.data.zero_()
    work = []
    propose = VAE.propose

    def counted(self, images, num_samples, num_betas, seed):
        work.append((num_samples, len(images) * num_samples * num_betas, seed))
        return propose(self, images, num_samples, num_betas, seed)

    monkeypatch.setattr(VAE, "propose", counted)
    result = evaluate(model, data, config)
    assert result["annealing"]["images_at_betas"] == {"2": 12}
    pilots = sum(cost for samples, cost, _ in work if samples < 1000)
    assert 0 < pilots < 0.1 * sum(cost for samples, cost, _ in work if samples == 1000)
    assert len({seed for _, _, seed in work}) == len(work)  # pilots do not share samples with the estimate


@pytest.mark.parametrize("kind", ["shared", "directed", "chimera-bipartite-low_rank"])
def test_elbo_and_effective_sample_size_agree_with_enumeration(kind):
    config, data, model = small(**KINDS[kind])
    images = data.binary("test")
    _, log_joint, log_q = exact_logits(model, images)
    log_weight = log_joint - log_q
    elbo = (log_q.exp() * log_weight).sum(0)
    part = (2 * torch.logsumexp(log_joint, 0) - torch.logsumexp(log_q + 2 * log_weight, 0)).exp()
    results = [evaluate(model, data, config.replace({"samples": 20_000, "seed": seed})) for seed in range(3)]
    for result in results:
        assert abs(result["elbo"] - elbo.mean()) < 0.02
        sizes = torch.tensor(result["effective_sample_size"]).double() / 20_000
        np.testing.assert_allclose(sizes.mean(), part.mean(), rtol=0.15)
        assert ("annealing" in result) == (kind != "directed")
        assert (result["effective_sample_size_min"] == 1) == (kind == "directed")


def test_elbo_is_right_with_unequal_weights_of_the_annealing():
    config, data, model = planted(posterior_betas=20, posterior_max_betas=20, samples=20_000)
    _, log_joint, log_q = exact_logits(model, data.binary("test"))
    exact = (log_q.exp() * (log_joint - log_q)).sum(0).mean().item()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AnnealingWarning)
        result = evaluate(model, data, config)
    assert min(result["annealing"]["effective_sample_size"]) < 15_000
    assert abs(result["elbo"] - exact) < 0.05


# Looseness ----------------------------------------------------------------------------------------------------------


def simulated_bound(log_weight, log_q, num_samples, repetitions=10_000):
    """The mean of the importance-weighted bound over images, for weights [S, B] of all states."""
    generator = np.random.default_rng(0)
    means = []
    for weight, q in zip(log_weight.T.numpy(), log_q.T.exp().numpy(), strict=True):
        state = generator.choice(len(q), (repetitions, num_samples), p=q / q.sum())
        means.append((special.logsumexp(weight[state], 1) - np.log(num_samples)).mean())
    return np.mean(means)


def test_looseness_is_that_of_the_bound():
    config, data, model = small(posterior="directed", samples=1, check_images=12, prior_betas=1, prior_ais_chains=2)
    _, log_joint, log_q = exact_logits(model, data.binary("test"))
    bounds = [simulated_bound(log_joint - log_q, log_q, samples) for samples in (1, 10, 5)]
    results = [evaluate(model, data, config.replace({"seed": seed})) for seed in range(100)]
    looseness = np.array([result["looseness"] for result in results])
    error = looseness.std() / 10
    assert abs(looseness.mean() - (bounds[1] - bounds[0])) < 4.5 * error
    # The planted fault: five times the samples.
    assert abs(looseness.mean() - (bounds[2] - bounds[0])) > 4.5 * error
    assert results[0]["looseness_images"] == len(results[0]["looseness_of_images"]) == 12
    assert math.isclose(np.mean(results[0]["looseness_of_images"]), results[0]["looseness"], abs_tol=1e-4)
    assert results[0]["looseness_is_reached"] is None
    assert "modes" not in results[0]
    assert "10 times the samples raise the bound by" in summary(results[0])


def test_samples_are_raised_until_the_bound_is_tight():
    config, data, model = small(posterior="directed", samples=10, check_images=6)
    loose = evaluate(model, data, config)
    result = evaluate(model, data, config.replace({"max_looseness": 0.01}))
    assert result["samples"] in (40, 160, 640)
    assert result["looseness"] <= 0.01 < loose["looseness"]
    assert result["looseness_images"] == 6
    assert result["looseness_is_reached"] is True
    assert result["nll"] < loose["nll"]
    assert f"{result['samples']} samples each" in summary(result)
    assert "more than max_looseness" not in summary(result)
    exact = exact_log_likelihood(model, data.binary("test"))
    assert abs(result["nll"] + exact.mean()) < 0.1

    capped = evaluate(model, data, config.replace({"max_looseness": 0.01, "max_samples": 159}))
    assert capped["samples"] == 40
    assert capped["looseness_is_reached"] is False
    assert "more than max_looseness" in summary(capped)


def test_a_comparison_knows_what_more_samples_would_change():
    one = {"fingerprint": "a", "log_likelihood": [-1.0, -2.0, -6.0]}
    other = {"fingerprint": "a", "log_likelihood": [-2.0, -2.0, -2.0]}
    other |= {"looseness_of_images": [0.5, 0.1], "looseness": 0.3}
    found = compare(one | {"looseness_of_images": [0.3, 0.1], "looseness": 0.2}, other)
    assert found["difference"] == 1
    assert found["images"] == 3
    assert found["looseness"] == 0.3  # of the looser one
    assert compare(one, other)["looseness"] == math.inf  # not measured
    # The other's bound rises by 0.2 more on the first of the two images.
    assert math.isclose(found["change"], 0.1)
    assert math.isclose(found["change_standard_error"], 0.1)
    for not_measured in (one, one | {"looseness_of_images": [0.1, 0.1, 0.1]}):
        assert math.isnan(compare(not_measured, other)["change"])


# Modes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("posterior", ["undirected", "chimera"])
def test_modes_are_counted(posterior):
    """Two where the couplings are strong, one where there are none."""
    settings = {"posterior_betas": 100, "check_images": 4, "samples": 100}
    if posterior == "chimera":  # one cell, which is bipartite
        settings |= {"posterior": "chimera", "chimera_rows": 1, "chimera_cols": 1, "chimera_shore": SIDE}
    config, data, model = planted(**settings)
    # The images that are looked at are numbers 0, 3, 6 and 9, the second of which lacks pixel 0.
    result = evaluate(model, data, config)
    assert (result["modes"], result["modes_max"]) == ((2 + 1 + 2 + 2) / 4, 2)
    assert "1.8 posterior modes, at most 2" in summary(result)


# Processes, settings and files --------------------------------------------------------------------------------------


def planted_result():
    config, data, model = planted(posterior_max_betas=40, check_images=5, samples=500, max_looseness=1e-6)
    model.prior.weight.data.mul_(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AnnealingWarning)
        result = evaluate(model, data, config.replace({"max_samples": 2000}))
    del result["seconds"]
    return result


def test_processes_agree():
    one = planted_result()
    assert one["samples"] == 2000
    assert len(one["annealing"]["images_at_betas"]) > 1
    for result in many.run(2, planted_result):
        assert result == one


def test_evaluate_has_a_flag_for_each_setting_of_an_evaluation():
    words = [word for name in EVALUATION for word in (f"--{name.replace('_', '-')}", "7")]
    arguments = vars(parser().parse_args(["evaluate", "run", *words]))
    config = Config().replace({name: arguments[name] for name in EVALUATION})
    assert all(getattr(config, name) == 7 for name in EVALUATION)
    assert all(resolve(preset).posterior_max_betas >= resolve(preset).posterior_betas for preset in PRESETS)


def test_evaluations_of_earlier_versions_are_read(tmp_path):
    settings = {"test_images": None, "samples": 1000, "posterior_betas": 100, "prior_betas": 10_000,
                "prior_ais_chains": 1024, "data_seed": 0, "seed": 0}  # fmt: skip
    old = {
        "step": 3, "split": "test", "nll": 91.4, "nll_standard_error": 1.07, "nll_plain": 91.3, "elbo": -99.1,
        "log_partition": 5.0, "log_partition_standard_error": 0.01, "images": 2, "fingerprint": "a",
        "settings": settings, "seconds": 3.0, "log_likelihood": [-90.0, -92.8],
    }  # fmt: skip
    run = Run(tmp_path, Config())
    run.evaluation_path.write_text(json.dumps(old))
    assert read(run) == old
    assert summary(old) == (
        "test NLL 91.40 +- 1.07 nats, ELBO -99.10 (2 images, 1000 samples each; "
        "log Z of the prior 5.00 +- 0.01 by AIS, 1024 chains x 10000 betas; 3 s)"
    )
    run.evaluation_path.write_text(json.dumps(old | {"looseness": 1.0}))
    with pytest.raises(RunError, match="damaged"):
        read(run)
