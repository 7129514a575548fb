# SPDX-License-Identifier: Apache-2.0
"""PyTorch's default device, which set_default_device("cuda") changes, gets no tensors but those that a caller makes.

Tensors here are on the CPU and the default is "meta", so code that meets a tensor of the default device fails.
"""

from collections.abc import Callable
from typing import Any

import dimod
import pytest
import torch

import gibbs_ext as gx
from gibbs_ext.interop.dimod import BlockGibbsSampler

GRAPH = gx.ChimeraGraph(2)
LEFT = torch.tensor([[0.0, 1, 1], [1, 0, 1]])
PARAMETERS = [torch.full(shape, 0.5, requires_grad=True) for shape in ((2, 3), (2, 2), (2, 3, 2))]
STATE = torch.zeros(2, GRAPH.num_nodes)
BIAS, COUPLING = torch.full((GRAPH.num_nodes,), 0.5), torch.full((GRAPH.num_edges,), 0.5)
BIPARTITE = gx.BipartiteBoltzmann(*(p[0].detach() for p in PARAMETERS))
OF_GRAPH = gx.GraphBoltzmann(GRAPH, BIAS, COUPLING)


def relaxed_and_backward() -> Any:
    left, *_ = gx.bipartite_gibbs_relaxed(LEFT, *PARAMETERS, 3)
    return torch.autograd.grad(left.sum(), PARAMETERS)


@pytest.mark.parametrize(
    "call",
    [
        lambda: gx.bipartite_gibbs(LEFT, *(p.detach() for p in PARAMETERS), 3, seed=1, beta=[0.5, 1.0, 1.0]),
        lambda: gx.bipartite_gibbs(LEFT, *(p.detach() for p in PARAMETERS), 3),
        relaxed_and_backward,
        lambda: gx.graph_gibbs(STATE, BIAS, COUPLING, GRAPH, 3, seed=1),
        lambda: gx.graph_metropolis(STATE, BIAS, COUPLING, GRAPH, 3, seed=1),
        lambda: gx.graph_gibbs_relaxed(STATE, BIAS, COUPLING, GRAPH, 3),
        lambda: gx.ising_to_boltzmann(BIAS, COUPLING, GRAPH),
        lambda: gx.boltzmann_to_ising(BIAS, COUPLING, GRAPH),
        lambda: gx.coupling_resolution(PARAMETERS[2].detach()),
        lambda: BIPARTITE.sample((5,), num_sweeps=3),
        lambda: BIPARTITE.log_prob(torch.zeros(5, 5, device="cpu")),
        lambda: OF_GRAPH.sample((5,), num_sweeps=3),
        lambda: OF_GRAPH.log_prob(STATE),
        lambda: gx.exact_marginals(OF_GRAPH),
        lambda: gx.exact_marginals(BIPARTITE),
        lambda: gx.exact_samples(BIPARTITE, 5),
        lambda: gx.exact_samples(OF_GRAPH, 5),
        lambda: gx.annealed_importance_sampling(BIPARTITE, 10, 5).log_partition,
        lambda: gx.annealed_importance_sampling(OF_GRAPH, 10, 5).log_partition,
        lambda: gx.ChimeraGraph(2, missing_nodes=[3]).colors,
        lambda: gx.ColoredGraph(3, [(0, 1), (1, 2)]).colors,
        lambda: BlockGibbsSampler().sample(dimod.BinaryQuadraticModel({0: 1.0}, {(0, 1): -1.0}, "SPIN"), num_reads=2),
    ],
)
def test_other_default_device(call: Callable[[], Any]) -> None:
    with torch.device("meta"):
        results = call()
    for result in results if isinstance(results, tuple) else [results]:
        assert not isinstance(result, torch.Tensor) or result.device.type == "cpu"
