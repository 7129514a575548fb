# SPDX-License-Identifier: Apache-2.0
"""graph_gibbs on 128 units of a Chimera graph against exact marginals, which elimination gives.

One draw from each of CHAINS independent chains. Compared are all means of units, all means of coupled pairs and the
mean energy: the largest |z-score| exceeds its threshold in one seed of a million, and planted faults must exceed it.
"""

import pytest
import torch
from graph_support import GraphParameters, random_graph_parameters
from support import z_threshold

from gibbs_ext import ChimeraGraph, GraphBoltzmann, exact_marginals, exact_samples, graph_gibbs

CHAINS, SWEEPS, BETA = 30_000, 15, 0.5
GRAPH = ChimeraGraph(4)
# They have a generator of their own, so that the power of the tests does not depend on the seed.
PARAMETERS = random_graph_parameters(GRAPH, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model():
    """At BETA: its exact answers are those of beta = 1."""
    return GraphBoltzmann(GRAPH, *(BETA * p for p in PARAMETERS))


@pytest.fixture(scope="module")
def exact(model):
    return torch.cat(exact_marginals(model))


def draw(parameters=PARAMETERS, beta=BETA, num_sweeps=SWEEPS, **kwargs):
    start = torch.zeros(CHAINS, GRAPH.num_nodes, dtype=torch.bool)
    return graph_gibbs(start, *parameters, GRAPH, num_sweeps, beta=beta, **kwargs)


def excess(z, model, exact):
    """Above 1 is an alarm."""
    moments = torch.cat((z, z[:, GRAPH.edges].all(-1)), -1).T.contiguous()  # [N + E, CHAINS]
    means = moments.float().mean(-1, dtype=torch.float64)
    scores = (means - exact) / (exact * (1 - exact) / len(z)).sqrt()
    weights = torch.cat((model.bias, model.coupling)).double()
    energies = model.energy(z.float())
    energy_score = (weights @ (exact - means)) / (energies.double().std() / len(z) ** 0.5)
    scores = torch.cat((scores, energy_score[None]))
    return float(scores.abs().max()) / z_threshold(len(scores))


def test_sweeps_are_enough(model):
    """Chains from zeros meet chains from exact draws, of the same random words, too soon for a bias to be seen."""
    start = exact_samples(model, CHAINS).bool()

    def apart(num_sweeps):
        from_exact = graph_gibbs(start, *PARAMETERS, GRAPH, num_sweeps, beta=BETA, seed=1)
        return (from_exact != draw(num_sweeps=num_sweeps, seed=1)).float().mean(0).max()

    # No mean of a unit is further off than the share of chains in which it is still apart, of a pair than twice that.
    assert apart(SWEEPS) < 0.02 * 0.5 / CHAINS**0.5
    assert apart(3) > 0.5 / CHAINS**0.5


def test_exact_samples_have_the_exact_marginals(model, exact):
    assert excess(exact_samples(model, CHAINS).bool(), model, exact) < 1


def test_binary_sweeps_have_the_exact_marginals(model, exact, instruction_set, graph_route):
    assert excess(draw(), model, exact) < 1


def test_couplings_per_model_have_the_exact_marginals(model, exact, instruction_set):
    start = torch.zeros(CHAINS // 20, 20, GRAPH.num_nodes, dtype=torch.bool)
    parameters = (p.expand(20, -1).contiguous() for p in PARAMETERS)
    z = graph_gibbs(start, *parameters, GRAPH, SWEEPS, beta=BETA)
    assert excess(z.flatten(0, 1), model, exact) < 1


def dropped(edge):
    coupling = PARAMETERS.coupling.clone()
    coupling[edge] = 0
    return GraphParameters(PARAMETERS.bias, coupling)


def exchanged(edge):
    """The couplings of two edges."""
    coupling = PARAMETERS.coupling.clone()
    coupling[[edge, edge + 1]] = coupling[[edge + 1, edge]]
    return GraphParameters(PARAMETERS.bias, coupling)


FAULTS = {
    "one coupling dropped, the median in size": lambda: draw(dropped(PARAMETERS.coupling.abs().median(0).indices)),
    "one coupling dropped, the first": lambda: draw(dropped(0)),
    "two couplings exchanged": lambda: draw(exchanged(100)),
    "colour 0 skipped": lambda: draw(clamp=GRAPH.colors == 0),
    "colour 1 skipped": lambda: draw(clamp=GRAPH.colors == 1),
    "beta * 1.02": lambda: draw(beta=1.02 * BETA),
    "beta / 1.02": lambda: draw(beta=BETA / 1.02),
    "beta not applied to biases": lambda: draw(PARAMETERS._replace(bias=PARAMETERS.bias / BETA)),
    "one sweep": lambda: draw(num_sweeps=1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_trip_the_alarm(fault, model, exact):
    assert excess(FAULTS[fault](), model, exact) > 1
