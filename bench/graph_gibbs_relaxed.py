# SPDX-License-Identifier: Apache-2.0
"""Binary sweeps, one relaxed sweep (pwl) and the backward pass on Chimera, against PyTorch's autograd."""

import functools
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

import gibbs_ext as gx

from . import graph_gibbs
from .bipartite_gibbs_relaxed import SHARPNESS, relax
from .graph_gibbs import Lists, ising_energy, numpy_uniform, torch_sweeps
from .harness import OURS, Case, on_gpu

# Returns weight . state, [n, C], for weights [n, k] or [n, k, C], neighbours [n, k] and a state [n', C].
Field = Callable[[Tensor, Tensor, Tensor], Tensor]


def gather(weight: Tensor, neighbors: Tensor, state: Tensor) -> Tensor:
    values = state.index_select(0, neighbors.flatten()).view(*neighbors.shape, -1)
    return (values * (weight if weight.dim() == 3 else weight[:, :, None])).sum(1)


def bag(weight: Tensor, neighbors: Tensor, state: Tensor) -> Tensor:
    return embedding_bag(neighbors, state, per_sample_weights=weight, mode="sum")


def dense(weight: Tensor, neighbors: Tensor, state: Tensor) -> Tensor:
    return weight.new_zeros(len(weight), len(state)).scatter_add(1, neighbors, weight) @ state


def torch_relaxed(
    lists: Lists,
    state: Tensor,
    bias: Tensor,
    coupling: Tensor,
    num_sweeps: int,
    field: Field,
    sweep_field: Callable[..., graph_gibbs.Field],
    draw: Callable[[Tensor], object],
) -> tuple[Tensor, Tensor]:
    """Sweeps as graph_gibbs.torch_sweeps on a graph of two colours, then relaxes: returns relaxed and mean, [N, C]."""
    first, second = lists.colors
    with torch.no_grad():
        y = torch_sweeps(lists, state, bias, coupling, [1.0] * num_sweeps, sweep_field, draw)[second]
    weight = lists.weights(coupling)
    neighbors = (lists.neighbors[first] - second.start).clamp(min=0)  # padding becomes negative
    first_mean = torch.sigmoid(bias[first] + field(weight[first], neighbors, y))
    x = relax(first_mean)
    second_mean = torch.sigmoid(bias[second] + field(weight[second], lists.neighbors[second], x))
    return torch.cat([x, relax(second_mean)]), torch.cat([first_mean, second_mean])


def case(chains: int, num_sweeps: int, models: bool) -> Case:
    """A case of `chains` chains of one model, or of one model each if `models`."""
    torch.manual_seed(1)
    graph = gx.ChimeraGraph(8)
    lists = Lists(graph)
    bits = torch.randint(2, (chains, graph.num_nodes)).float()
    J = (torch.rand(*([chains] if models else []), graph.num_edges) * 2 - 1) / 2
    bias, coupling, _ = gx.ising_to_boltzmann(J.new_zeros(*J.shape[:-1], graph.num_nodes), J, graph)
    grads = [torch.rand(chains, graph.num_nodes) for _ in range(2)]
    ours = [bias.requires_grad_(), coupling.requires_grad_()]
    rng = np.random.default_rng(1)

    def by_color(x: Tensor) -> Tensor:
        return x.detach().T[lists.order].contiguous()

    peer = [
        by_color(bias if models else bias[None]).requires_grad_(),
        coupling.detach().movedim(-1, 0).contiguous().requires_grad_(),
    ]
    start, peer_grads = by_color(bits), [by_color(g) for g in grads]

    def run_ours() -> list[Tensor]:
        outputs = gx.graph_gibbs_relaxed(bits, *ours, graph, num_sweeps, 1, sharpness=SHARPNESS, seed=1)
        return [*outputs, *torch.autograd.grad(outputs, ours, grads)]

    def run_torch(*how: Callable[..., object]) -> list[Tensor]:
        outputs = torch_relaxed(lists, start, *peer, num_sweeps, *how)
        bias_grad, coupling_grad = torch.autograd.grad(outputs, peer, peer_grads)
        return [*(x[lists.position].T for x in (*outputs, bias_grad)), coupling_grad.movedim(0, -1)]

    def statistics(returned: list[Tensor]) -> list[Tensor]:
        relaxed, mean, *gradients = returned
        # A gradient of shared parameters has no samples; its elements stand for them.
        return [ising_energy(graph, J, relaxed), ising_energy(graph, J, mean)] + [
            g.abs().mean(-1) if models else g.abs().flatten() for g in gradients
        ]

    contenders: dict[str, Callable[[], object]] = {OURS: run_ours}
    ways = {"gather": gather} if models else {"gather": gather, "embedding_bag": bag, "dense": dense}
    draws = {"": Tensor.uniform_}
    if num_sweeps and not on_gpu():
        draws[", NumPy's random"] = numpy_uniform(rng)
    for (way, field), (suffix, draw) in itertools.product(ways.items(), draws.items()):
        sweep_field = graph_gibbs.gather if models else graph_gibbs.bag
        contenders[f"torch, {way}{suffix}"] = functools.partial(run_torch, field, sweep_field, draw)
    what = f"{chains} models" if models else f"{chains} chains"
    return Case(
        f"Chimera C8, {what}, {num_sweeps} + 1 sweeps and backward",
        contenders,
        updates=chains * graph.num_nodes * (num_sweeps + 1),
        wanted=10,
        statistics=statistics,
    )


def cases() -> Iterator[Case]:
    yield case(128, 10, models=True)
    yield case(1024, 0, models=False)
