# SPDX-License-Identifier: Apache-2.0
"""The bound that `evaluate` reports against enumeration of all latents, and the objective's parts."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

pytest.importorskip("tqdm")
from support import FALSE_ALARM, assert_close

import gibbs_ext as gx
from undirected_vae.config import Config
from undirected_vae.data import Dataset
from undirected_vae.directed import DirectedPosterior, log_bernoulli
from undirected_vae.evaluate import compare, evaluate
from undirected_vae.runs import RunError
from undirected_vae.vae import VAE, chimera

# 8 latents, 4 of each colour; the bipartite machine beside it has as many on each side.
CHIMERA = {"chimera_rows": 1, "chimera_cols": 2, "chimera_shore": 2, "left": 4, "right": 4}
KINDS = {
    "per_sample": {"coupling": "per_sample"},
    "shared": {"coupling": "shared"},
    "low_rank": {"coupling": "low_rank", "rank": 2},
    "directed": {"posterior": "directed"},
    "chimera-chimera-per_sample": {"posterior": "chimera", "prior": "chimera", "coupling": "per_sample", **CHIMERA},
    "chimera-chimera-shared": {"posterior": "chimera", "prior": "chimera", "coupling": "shared", **CHIMERA},
    "chimera-bipartite-low_rank": {"posterior": "chimera", "coupling": "low_rank", "rank": 2, **CHIMERA},
    "undirected-chimera": {"prior": "chimera", **CHIMERA},
    "directed-chimera": {"posterior": "directed", "prior": "chimera", **CHIMERA},
    "none": {"coupling": "none"},
    "directed-2-groups": {"posterior": "directed", "groups": 2},
    "directed-4-groups-concrete": {
        "posterior": "directed",
        "groups": 4,
        "relaxation": "concrete",
        "sharpness": 10,
        "encoder": (),
    },
    "power_function": {"posterior": "directed", "relaxation": "power_function", "sharpness": 30},
    "power_function-2-groups": {
        "posterior": "directed",
        "groups": 2,
        "relaxation": "power_function",
        "sharpness": 30,
    },
    "per_sample-3-samples": {"train_samples": 3, "coupling": "per_sample"},
    "directed-3-samples": {"posterior": "directed", "groups": 2, "train_samples": 3},
    "power_function-3-samples": {
        "posterior": "directed",
        "relaxation": "power_function",
        "sharpness": 30,
        "train_samples": 3,
    },
}
STRUCTURED = {
    f"structured-{name}": {**settings, "task": "structured", "train_samples": 3}
    for name, settings in KINDS.items()
    if name in ("per_sample", "none", "directed", "directed-2-groups", "power_function")
}


def small(**settings):
    """A model of 4 + 3 latents (or 8) for 9 pixels, far from its initial values, and 12 images."""
    size = {"left": 4, "right": 3, "encoder": (5,), "decoder": (6,)}
    sizes = {"samples": 5000, "check_images": 0, "posterior_betas": 20, "prior_betas": 200}
    config = Config(**{**sizes, **size, **settings})
    torch.manual_seed(1)
    images = (torch.rand(12, 9) < 0.4).to(torch.uint8) * 255
    data = Dataset(images, images, images, (3, 3), "test")
    model = VAE(config, data.mean(), len(images)).eval()
    with torch.no_grad():
        # A posterior that varies less than its target, so that the importance weights have a small variance.
        for name, parameter in model.named_parameters():
            parameter += (0.5 if name.startswith(("prior", "decoder")) else 0.1) * torch.randn_like(parameter)
    return config, data, model


def exact_log_likelihood(model, images):
    bits = torch.tensor(list(itertools.product([0.0, 1.0], repeat=model.prior.distribution().num_units)))
    with torch.no_grad():
        log_prior = torch.log_softmax(-model.prior.energy(bits), 0)
        log_joint = log_bernoulli(model.decoder(bits)[:, None], images) + log_prior[:, None]
    return torch.logsumexp(log_joint, 0).double()


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_agrees_with_enumeration(kind):
    config, data, model = small(**KINDS[kind])
    exact = exact_log_likelihood(model, data.binary("test")).mean().item()
    results = [evaluate(model, data, config.replace({"seed": seed})) for seed in range(12)]
    for name in ("nll", "nll_plain"):
        values = np.array([result[name] for result in results])
        assert stats.ttest_1samp(values, -exact).pvalue > FALSE_ALARM
        # The planted fault: log Z of the prior wrong by 0.15.
        assert stats.ttest_1samp(values + 0.15, -exact).pvalue < FALSE_ALARM
    assert results[0]["elbo"] < exact - 0.1  # the posterior is random: its bound is far from tight


@pytest.mark.parametrize("kind", [*KINDS, *STRUCTURED])
def test_objective_has_gradients_everywhere_and_keeps_chains(kind):
    settings = {**KINDS, **STRUCTURED}[kind]
    _config, data, model = small(**settings)
    model.train()
    terms = model(data.binary("train"), torch.arange(12), 0.5)
    terms.loss.backward()
    assert terms.reconstruction.shape == terms.divergence.shape == (12,)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    chains = [name for name in model.state_dict() if name.endswith("chains.bits")]
    assert len(chains) == (settings.get("posterior") != "directed") + (settings.get("task") != "structured")


STEP_SEEDS = torch.tensor([5, 6])


def drawn(model, images):
    """The samples that a step draws with STEP_SEEDS, and log q at them (undirected: without log Z, detached)."""
    numbers = torch.arange(model.num_samples * len(images)).view(model.num_samples, -1)
    features = model.encoder(model.seen(images))
    if isinstance(model.posterior, DirectedPosterior):
        sample = model.posterior(
            features, model.seen(images), model.num_samples, chain_offset=numbers, seed=STEP_SEEDS[0]
        )
        return sample, log_bernoulli(sample.logits, sample.z)
    sample = model.posterior(features, torch.arange(len(images)), chain_offset=numbers, seed=STEP_SEEDS[0])
    return sample, -sample.model.detach().energy(sample.z)


def gradients(loss, model, *names):
    chosen = [(name, parameter) for name, parameter in model.named_parameters() if name.startswith(names)]
    found = torch.autograd.grad(loss, [parameter for _, parameter in chosen], retain_graph=True)
    return dict(zip((name for name, _ in chosen), found, strict=True))


@pytest.mark.parametrize("kind", ["per_sample-3-samples", "directed-3-samples"])
def test_objective_of_several_samples_is_the_importance_weighted_bound(kind):
    _config, data, model = small(**KINDS[kind])
    other, images, weight = copy.deepcopy(model), data.binary("train"), 0.7
    terms = model(images, torch.arange(12), weight, seeds=STEP_SEEDS)
    sample, log_q = drawn(other, images)
    assert sample.z.shape == (3, 12, 7)
    assert sample.z.std(0).mean() > 0.1  # the samples of an image differ
    reconstruction = log_bernoulli(other.decoder(sample.z), images)
    log_ratio = log_q + other.prior.energy(sample.z)
    objective = reconstruction - weight * log_ratio
    bound = (objective.logsumexp(0) - math.log(3)).mean()
    assert_close(terms.reconstruction, reconstruction.mean(0), 1e-6)
    assert_close(terms.divergence, log_ratio.mean(0), 1e-6)
    assert_close(terms.loss, weight * other.prior.log_partition_surrogate(seed=STEP_SEEDS[1]) - bound, 1e-6)
    # All of a directed model, and a decoder, have the bound's own gradient. What reaches an undirected posterior on the
    # samples' path is weighted by w and by 1 - weight * (1 - w).
    w = torch.softmax(objective, 0).detach()
    twice = -(w * (1 - weight * (1 - w)) * objective).sum(0).mean()
    is_directed = isinstance(model.posterior, DirectedPosterior)
    expected = gradients(-bound if is_directed else twice, other, "encoder", "posterior")
    expected |= gradients(-bound, other, "decoder")
    for name, gradient in gradients(terms.loss, model, "encoder", "posterior", "decoder").items():
        assert_close(gradient, expected[name], 1e-6)


@pytest.mark.parametrize("kind", STRUCTURED)
def test_structured_objective_is_the_bound_of_the_lower_half_plus_entropy(kind):
    _config, data, model = small(**STRUCTURED[kind])
    other, images, weight = copy.deepcopy(model), data.binary("train"), 0.3
    # 9 pixels: the encoder sees the first 4.
    assert model.encoder.mean.shape == (4,)
    assert model.decoder.output.out_features == 5
    terms = model(images, torch.arange(12), weight, seeds=STEP_SEEDS)
    sample, _ = drawn(other, images)
    reconstruction = log_bernoulli(other.decoder(sample.z), images[:, 4:])
    bound = (reconstruction.logsumexp(0) - math.log(3)).mean()
    if isinstance(model.posterior, DirectedPosterior):
        q = torch.sigmoid(sample.logits)
        entropy = -(q * q.log() + (1 - q) * (1 - q).log()).sum(-1)
    else:
        entropy = sample.model.detach().energy(sample.z_mean)  # + log Z, which has no gradient
    assert_close(terms.divergence, -entropy.mean(0), 1e-6)
    loss = -(bound + weight * entropy.mean())
    assert_close(terms.loss, loss, 1e-6)
    expected = gradients(loss, other, "")
    for name, gradient in gradients(terms.loss, model, "").items():
        assert_close(gradient, expected[name], 1e-6)


def test_beside_a_bipartite_machine_chimera_is_numbered_as_left_then_right():
    config = Config(prior="chimera", chimera_rows=3, chimera_cols=2, left=24, right=24)
    graph, original = chimera(config), gx.ChimeraGraph(3, 2, 4)
    assert chimera(config.replace({"posterior": "chimera"})) == original
    assert chimera(config.replace({"posterior": "directed"})) == original
    left = torch.arange(48) < 24
    assert graph.colors.equal(left.long())
    # Couplings go from left to right only: the energies of all models are linear in left.
    assert (left[graph.edges].sum(1) == 1).all()
    # The nodes of each colour keep their own order.
    number = torch.cat([(original.colors == color).nonzero()[:, 0] for color in (1, 0)])
    assert {frozenset(edge) for edge in number[graph.edges].tolist()} == set(map(frozenset, original.edges.tolist()))


@pytest.mark.parametrize("coupling", ["per_sample", "shared", "low_rank"])
@pytest.mark.parametrize("kinds", [("undirected", "chimera"), ("chimera", "bipartite"), ("chimera", "chimera")])
def test_one_cell_is_the_bipartite_machine(kinds, coupling):
    """K(4, 4) either way: the same objective and gradients."""
    cell = {"chimera_rows": 1, "chimera_cols": 1, "left": 4, "right": 4, "coupling": coupling, "rank": 2}
    results = []
    _, data, first = small(**cell)
    for posterior, prior in (("undirected", "bipartite"), kinds):
        model = small(posterior=posterior, prior=prior, **cell)[2].double().train()
        state = copy.deepcopy(first.state_dict())
        if posterior == "chimera":
            if coupling == "shared":
                state["posterior.raw_coupling"] = state["posterior.raw_coupling"].flatten()
            if coupling == "low_rank":
                factors = [state.pop(f"posterior.{side}_factor") for side in ("left", "right")]
                state["posterior.factor"] = torch.cat(factors)
        if prior == "chimera":
            state["prior.bias"] = torch.cat([state.pop(f"prior.{side}_bias") for side in ("left", "right")])
            state["prior.coupling"] = state.pop("prior.weight").flatten()
        # A byte holds left, or all units, left first; right is drawn anew.
        structure = {n: x for n, x in model.state_dict().items() if n.endswith(("edges", "num_units"))}
        model.load_state_dict(state | structure)
        torch.manual_seed(3)
        terms = model(data.binary("train").double(), torch.arange(12), 0.5)
        terms.loss.backward()
        shared = {
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if name in dict(first.named_parameters())
        }
        results.append({"loss": terms.loss.detach(), "divergence": terms.divergence} | shared)
    names = results[0].keys() & results[1].keys()
    assert len(names) > 8
    for name in names:
        value, expected = (result[name].flatten() for result in reversed(results))
        assert_close(value, expected, 1e-8)


def test_gradient_of_the_prior_is_that_of_the_log_likelihood():
    # With a directed posterior whose logits are huge, z is known, and the prior's gradient is that of -log p(z).
    _config, data, model = small(posterior="directed", prior_chains=20_000)
    images = data.binary("train")
    with torch.no_grad():
        model.posterior.logits.weight.mul_(0)
        model.posterior.logits.bias.copy_(torch.tensor([40.0, -40.0, 40.0, 40.0, -40.0, 40.0, -40.0]))
    model(images, torch.arange(12)).loss.backward()
    bits = torch.tensor(list(itertools.product([0.0, 1.0], repeat=7)))
    target = (model.posterior.logits.bias > 0).float()
    weight = model.prior.weight.detach().requires_grad_()
    energies = -(
        bits[:, :4] @ model.prior.left_bias + bits[:, 4:] @ model.prior.right_bias
        + ((bits[:, :4] @ weight) * bits[:, 4:]).sum(-1)
    )  # fmt: skip
    loss = -torch.log_softmax(-energies, 0)[(bits == target).all(-1)].sum()
    loss.backward()
    # Means of bits over 20000 chains: each has a standard error of at most 0.5 / sqrt(20000).
    bound = -stats.norm.ppf(FALSE_ALARM / 2 / weight.numel()) * 0.5 / 20_000**0.5
    assert (model.prior.weight.grad - weight.grad).abs().max() < bound
    assert weight.grad.abs().max() > 0.2


def test_compare_is_paired():
    first = {"fingerprint": "a", "log_likelihood": [-1.0, -50.0, -99.0]}
    second = {"fingerprint": "a", "log_likelihood": [-2.0, -51.0, -100.3]}
    paired = compare(first, second)
    assert math.isclose(paired["difference"], -1.1)  # the first's NLL is lower
    assert math.isclose(paired["standard_error"], 0.1)
    with pytest.raises(RunError, match="same images"):
        compare(first, second | {"fingerprint": "b"})
