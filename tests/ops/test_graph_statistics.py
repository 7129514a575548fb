# SPDX-License-Identifier: Apache-2.0
"""Samples of graphs against enumeration. Each test alarms once in a million seeds (small models have two tests, which
alarm once in half a million); its planted faults must trip it.

Each of many independent chains gives one draw. SWEEPS leave no bias that this many draws could see (a test shows it).
Models come from a generator of their own, so that the power of the tests does not depend on the seed.
"""

import functools

import pytest
import torch
from graph_support import (
    WAYS,
    GraphParameters,
    as_edges,
    complete_graph,
    exact_energies,
    exact_graph_probabilities,
    exact_sweeps,
    graph_named,
    random_graph_parameters,
    star_graph,
    taking,
    where,
)
from support import all_states, chi_square_excess, state_numbers, supported_instruction_sets, word_faults, z_threshold

from gibbs_ext import ChimeraGraph, ColoredGraph, graph_gibbs, graph_gibbs_relaxed, reference

CHAINS, SWEEPS = 150_000, 10
# Small enough for a chi-square test of all states: tables, and more neighbours than tables take.
SMALL = {
    "chimera cell": lambda: ChimeraGraph(1),
    "chimera with holes": lambda: ChimeraGraph(1, 2, 3, missing_nodes=[1, 4, 9], missing_edges=[(2, 3)]),
    "K6": lambda: complete_graph(6),
    "star of 9": lambda: star_graph(9),
    "triangles": lambda: ColoredGraph(
        8, as_edges([(i, i + 1) for i in range(7)] + [(i, i + 2) for i in range(6)]), torch.arange(8) % 3
    ),
}
# For tests of moments alone: 20 units, and 16 with more neighbours than tables take.
LARGE = {"chimera": lambda: ChimeraGraph(2, 1, 5), "random": lambda: graph_named("random of 16")}
MODELS = [*SMALL, *LARGE]


@functools.cache
def model_named(name):
    """The energy has a variance of at least 1.6, so an error of 2% in beta moves its mean by 10 standard errors."""
    graph = {**SMALL, **LARGE}[name]()
    return graph, random_graph_parameters(graph, generator=torch.Generator().manual_seed(4))


def moments(name, p):
    """Means of units, means of products over edges, and the mean energy of a distribution [2^N]."""
    graph, parameters = model_named(name)
    ones = [(i,) for i in range(graph.num_nodes)] + graph.edges.tolist()
    means = torch.stack([where(p, *units).sum() for units in ones])
    return torch.cat((means, -(means @ torch.cat(parameters).double())[None]))


@functools.cache
def exact(name, beta):
    """Probabilities [2^N], and moments with their standard deviations."""
    graph, parameters = model_named(name)
    energies = exact_energies(graph, parameters)
    p = (-beta * energies).softmax(0)
    means = moments(name, p)
    assert (CHAINS * means[:-1] * (1 - means[:-1])).min() > 500, "too rare to be normal"
    variances = torch.cat((means[:-1] * (1 - means[:-1]), (p @ (energies - means[-1]) ** 2)[None]))
    return p, means, variances.sqrt()


def excess(name, z, beta=1.0):
    """Above 1 is an alarm: the largest |z-score| of the moments, or a chi-square statistic, over its threshold."""
    p, means, deviations = exact(name, beta)
    z = z.reshape(-1, z.shape[-1])
    drawn = torch.bincount(state_numbers(z), minlength=len(p)).double() / len(z)
    scores = (moments(name, drawn) - means) / (deviations / len(z) ** 0.5)
    of_moments = float(scores.abs().max()) / z_threshold(len(scores))
    return of_moments if name in LARGE else max(of_moments, chi_square_excess(z, p))


def draw(graph, parameters, beta=1.0, num_sweeps=SWEEPS, **kwargs):
    state = torch.zeros(CHAINS, graph.num_nodes, dtype=torch.bool)
    return graph_gibbs(state, *parameters, graph, num_sweeps, beta=beta, **kwargs)


@pytest.mark.parametrize("name", MODELS)
def test_sweeps_are_enough(name):
    """The exact distribution after SWEEPS, from the start and at the largest beta of the tests, is the model's."""
    p = exact(name, 1.2)[0]

    def noncentrality(num_sweeps):  # the noncentrality of chi-square
        return float(CHAINS * ((exact_sweeps(*model_named(name), num_sweeps, 1.2) - p) ** 2 / p).sum())

    assert noncentrality(SWEEPS) < 0.1
    assert noncentrality(1) > 100


# Chains one by one are slow: with one instruction set.
@pytest.mark.parametrize("way", [*(way for way in WAYS if way[1] != "units"), ("auto", "units")], ids=" ".join)
@pytest.mark.parametrize("name", MODELS)
def test_binary_sweeps_sample_the_model(name, way):
    with taking(*way):
        assert excess(name, draw(*model_named(name))) < 1


@pytest.mark.parametrize("name", MODELS)
def test_another_beta(name):
    assert excess(name, draw(*model_named(name), beta=1.2), beta=1.2) < 1


@pytest.mark.parametrize("instruction_set", supported_instruction_sets())
@pytest.mark.parametrize("name", MODELS)
def test_coupling_per_model_samples_the_model(name, instruction_set):
    graph, p = model_named(name)
    for models in (5, CHAINS // 4):  # each has many chains, or few
        state = torch.zeros(CHAINS // models, models, graph.num_nodes, dtype=torch.bool)
        with taking(instruction_set):
            z = graph_gibbs(state, p.bias, p.coupling.repeat(models, 1), graph, SWEEPS)
            assert excess(name, z) < 1


@pytest.mark.parametrize("name", SMALL)
def test_few_sweeps_have_their_exact_law(name):
    """The distribution one and two sweeps after the start is exact; mixing cannot hide a fault."""
    graph, p = model_named(name)
    for num_sweeps in (1, 2):
        assert chi_square_excess(draw(graph, p, num_sweeps=num_sweeps), exact_sweeps(graph, p, num_sweeps)) < 1
    other_order = ColoredGraph(graph.num_nodes, graph.edges, graph.num_colors - 1 - graph.colors)
    assert chi_square_excess(draw(other_order, p, num_sweeps=1), exact_sweeps(graph, p, 1)) > 1


@pytest.mark.parametrize("name", MODELS)
def test_planted_faults_trip_the_alarm(name):
    graph, p = model_named(name)
    dropped = p.coupling.clone()
    dropped[dropped.abs().argmax()] = 0
    faults = {f"colour {color} skipped": {"clamp": graph.colors == color} for color in range(graph.num_colors)} | {
        "beta * 1.02": {"beta": 1.02},
        "beta / 1.02": {"beta": 1 / 1.02},
        "one coupling dropped": {"parameters": p._replace(coupling=dropped)},
        "one bias off by 0.1": {"parameters": p._replace(bias=p.bias + 0.1 * torch.eye(graph.num_nodes)[0])},
        "couplings in the wrong order": {"parameters": p._replace(coupling=p.coupling.flip(0))},
        "one sweep from a fixed start": {"num_sweeps": 1},
        "few distinct chains": {"chain_offset": torch.arange(CHAINS) % (CHAINS // 20)},
    }
    passed = [name_ for name_, fault in faults.items() if excess(name, draw(graph, **{"parameters": p, **fault})) < 1]
    assert not passed


def test_reused_random_words_trip_the_alarm(monkeypatch):
    """Faults of the random words are planted into the reference."""
    graph, p = model_named("chimera cell")

    def alarm():
        z = reference.graph_gibbs_reference(torch.zeros(20_000, 8), *p, graph, 6, seed=1)
        return excess("chimera cell", z) > 1

    assert not alarm()

    for fault in word_faults(reference.random_words):
        monkeypatch.setattr(reference, "random_words", fault)
        assert alarm(), fault.__name__


def test_clamped_units_condition_the_rest():
    """Draws are those of p(free | clamped), with some units of each colour clamped to 1."""
    graph, p = model_named("triangles")
    start = torch.tensor([True, False, False, False, True, True, False, False])
    z = graph_gibbs(start.expand(CHAINS, 8), *p, graph, SWEEPS, clamp=start)
    conditioned = exact("triangles", 1.0)[0] * (all_states(8)[:, start] == 1).all(-1)
    assert chi_square_excess(z, conditioned / conditioned.sum()) < 1
    assert chi_square_excess(draw(graph, p), conditioned / conditioned.sum()) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["chimera cell", "triangles"])
def test_straight_through_samples_the_model(name, dtype):
    graph, p = model_named(name)
    p = GraphParameters(*(x.to(dtype) for x in p))

    def sample(beta):
        state = torch.zeros(CHAINS, graph.num_nodes, dtype=dtype)
        return graph_gibbs_relaxed(state, *p, graph, SWEEPS, 2, relaxation="straight_through", beta=beta)[0]

    assert excess(name, sample(1.0)) < 1
    assert excess(name, sample(0.98)) > 1


@pytest.mark.parametrize("name", ["chimera cell", "triangles"])
def test_mean_integrates_units_out(name):
    """The mean over chains is each unit's marginal, with less variance than the unit itself."""
    graph, p = model_named(name)
    marginals = exact(name, 1.0)[1][:8]

    def score(beta):
        state = torch.zeros(CHAINS, 8)
        zeta, mean = graph_gibbs_relaxed(state, *p, graph, SWEEPS, relaxation="straight_through", beta=beta)
        assert (mean.var(0) < zeta.var(0)).all()
        return ((mean.double().mean(0) - marginals) / (mean.double().std(0) / CHAINS**0.5)).abs().max()

    assert score(1.0) < z_threshold(8)
    assert score(0.95) > z_threshold(8)


def test_every_degree_is_sampled():
    """Hubs of stars are units of each degree that a route may treat differently."""
    for rays in range(1, 13):
        graph = star_graph(rays)
        p = random_graph_parameters(graph, generator=torch.Generator().manual_seed(rays))
        hub = where(exact_graph_probabilities(graph, p), rays // 2).sum()
        mean = draw(graph, p)[:, rays // 2].double().mean()
        threshold = z_threshold(12) * (hub * (1 - hub) / CHAINS).sqrt()
        assert (mean - hub).abs() < threshold
        nudged = p._replace(bias=p.bias + 0.2 * torch.eye(rays + 1)[rays // 2])
        wrong = draw(graph, nudged)[:, rays // 2].double().mean()
        assert (wrong - hub).abs() > threshold
