# SPDX-License-Identifier: Apache-2.0
"""Warnings name the line that called the package, through whichever of its layers, and of PyTorch's, the call went."""

import warnings

import pytest
import torch

import gibbs_ext as gx


def calls_that_round():
    """Calls with huge couplings, of every layer of the package, each of which warns."""
    weight, coupling = torch.full((3, 2), 3e6), torch.full((2,), 3e6)
    bias, left, graph = torch.zeros(3), torch.zeros(4, 3), gx.ColoredGraph(3, [(0, 1), (1, 2)])
    bipartite = bias, torch.zeros(2), weight
    learning = tuple(tensor.clone().requires_grad_() for tensor in bipartite)
    rbm, machine = gx.BipartiteBoltzmann(*bipartite), gx.GraphBoltzmann(graph, bias, coupling)
    chains = gx.PersistentChains(5, rbm)

    def relaxed(weight):
        return gx.bipartite_gibbs_relaxed(left, bias, torch.zeros(2), weight, 1, seed=1)[0].sum()

    return {
        "bipartite_gibbs": lambda: gx.bipartite_gibbs(left, *bipartite, 1),
        "bipartite_gibbs_relaxed": lambda: gx.bipartite_gibbs_relaxed(left, *bipartite, 1),
        "with_gradient": lambda: gx.bipartite_gibbs_relaxed(left, *learning, 1),
        "bipartite_ais": lambda: gx.bipartite_ais(left, *bipartite, *bipartite[:2], [0, 1]),
        "graph_gibbs": lambda: gx.graph_gibbs(left, bias, coupling, graph, 1),
        "graph_metropolis": lambda: gx.graph_metropolis(left, bias, coupling, graph, 1),
        "graph_gibbs_relaxed": lambda: gx.graph_gibbs_relaxed(left, bias, coupling, graph, 1),
        "sample": lambda: rbm.sample((4,), 1),
        "rsample": lambda: machine.rsample((4,), 1),
        "advance_": lambda: chains.advance_(rbm, 1),
        "log_partition": lambda: machine.log_partition("ais", num_chains=20, betas=2),
        "grad": lambda: torch.func.grad(relaxed)(weight),
        "vmap": lambda: torch.vmap(relaxed, randomness="same")(weight.expand(2, 3, 2)),
    }


@pytest.mark.parametrize("call", calls_that_round())
def test_a_warning_of_rounding_names_the_callers_line(call):
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always", gx.CouplingResolutionWarning)
        warnings.simplefilter("ignore", gx.EffectiveSampleSizeWarning)
        calls_that_round()[call]()
    assert given
    assert {warning.filename for warning in given} == {__file__}


def test_a_warning_of_few_effective_chains_names_the_callers_line():
    model = gx.BipartiteBoltzmann(torch.zeros(30), torch.zeros(30), 3 * torch.randn(30, 30))
    for call in (
        lambda: gx.annealed_importance_sampling(model, 100, 1),
        lambda: model.log_partition(num_chains=100, betas=1),
    ):
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            call()
        assert {warning.filename for warning in given} == {__file__}
