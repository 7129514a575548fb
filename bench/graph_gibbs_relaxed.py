# SPDX-License-Identifier: Apache-2.0
"""Binary sweeps, one relaxed sweep (pwl) and the backward pass on Chimera, against PyTorch's autograd."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

import gibbs_ext as gx

from . import graph_gibbs, limits
from .bipartite_gibbs import compiled
from .bipartite_gibbs_relaxed import SHARPNESS, relax
from .graph_gibbs import Lists, compiled_sweeps, ising_energy, numpy_uniform, torch_sweeps
from .harness import Call, Case, benchmark_of, on_gpu, warm
from .tables import OURS

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
    with torch.no_grad():
        y = torch_sweeps(lists, state, bias, coupling, [1.0] * num_sweeps, sweep_field, draw)
    return relaxed_sweep(lists, y, bias, coupling, field)


def compiled_relaxed(
    lists: Lists, state: Tensor, bias: Tensor, coupling: Tensor, num_sweeps: int
) -> tuple[Tensor, Tensor]:
    """Does the same as torch_relaxed, compiled by torch.compile."""
    with torch.no_grad():
        y = compiled_sweeps(lists, state, bias, coupling, torch.ones(num_sweeps))
    outputs: tuple[Tensor, Tensor] = compiled(relaxed_sweep)(lists, y, bias, coupling, gather)
    return outputs


def relaxed_sweep(lists: Lists, state: Tensor, bias: Tensor, coupling: Tensor, field: Field) -> tuple[Tensor, Tensor]:
    first, second = lists.colors
    y = state[second]
    weight = lists.weights(coupling)
    neighbors = (lists.neighbors[first] - second.start).clamp(min=0)  # padding becomes negative
    first_mean = torch.sigmoid(bias[first] + field(weight[first], neighbors, y))
    x = relax(first_mean)
    second_mean = torch.sigmoid(bias[second] + field(weight[second], lists.neighbors[second], x))
    return torch.cat([x, relax(second_mean)]), torch.cat([first_mean, second_mean])


class Inputs(NamedTuple):
    graph: gx.ColoredGraph
    bits: Tensor
    J: Tensor
    parameters: list[Tensor]  # bias and coupling
    grads: list[Tensor]
    lists: Lists


def draws(chains: int, models: bool) -> Inputs:
    torch.manual_seed(1)
    graph = gx.ChimeraGraph(8)
    bits = torch.randint(2, (chains, graph.num_nodes)).float()
    J = (torch.rand(*([chains] if models else []), graph.num_edges) * 2 - 1) / 2
    bias, coupling, _ = gx.ising_to_boltzmann(J.new_zeros(*J.shape[:-1], graph.num_nodes), J, graph)
    grads = [torch.rand(chains, graph.num_nodes) for _ in range(2)]
    return Inputs(graph, bits, J, [bias.requires_grad_(), coupling.requires_grad_()], grads, Lists(graph))


def case(chains: int, num_sweeps: int, models: bool) -> Case:
    """A case of `chains` chains of one model, or of one model each if `models`."""

    def ours(i: Inputs) -> Call:
        def run() -> list[Tensor]:
            outputs = gx.graph_gibbs_relaxed(i.bits, *i.parameters, i.graph, num_sweeps, 1, sharpness=SHARPNESS, seed=1)
            return [*outputs, *torch.autograd.grad(outputs, i.parameters, i.grads)]

        return run

    def peer(forward: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Inputs], Call]:
        """`forward` gets what torch_relaxed gets, up to the number of sweeps."""

        def prepare(inputs: Inputs) -> Call:
            lists, (bias, coupling) = inputs.lists, inputs.parameters

            def by_color(x: Tensor) -> Tensor:
                return x.detach().T[lists.order].contiguous()

            parameters = [
                by_color(bias if models else bias[None]).requires_grad_(),
                coupling.detach().movedim(-1, 0).contiguous().requires_grad_(),
            ]
            start, grads = by_color(inputs.bits), [by_color(g) for g in inputs.grads]

            def run() -> list[Tensor]:
                outputs = forward(lists, start, *parameters, num_sweeps)
                bias_grad, coupling_grad = torch.autograd.grad(outputs, parameters, grads)
                return [*(x[lists.position].T for x in (*outputs, bias_grad)), coupling_grad.movedim(0, -1)]

            return run

        return prepare

    def statistics(inputs: Inputs, returned: list[Tensor]) -> list[Tensor]:
        relaxed, mean, *gradients = returned
        # A gradient of shared parameters has no samples; its elements stand for them.
        return [ising_energy(inputs.graph, inputs.J, x) for x in (relaxed, mean)] + [
            g.abs().mean(-1) if models else g.abs().flatten() for g in gradients
        ]

    contenders: dict[str, Callable[[Inputs], Call]] = {OURS: ours}
    ways = {"gather": gather} if models else {"gather": gather, "embedding_bag": bag, "dense": dense}
    randoms = {"": Tensor.uniform_}
    if num_sweeps and not on_gpu():
        randoms[", NumPy's random"] = numpy_uniform(np.random.default_rng(1))
    sweep_field = graph_gibbs.gather if models else graph_gibbs.bag
    for (way, field), (suffix, draw) in itertools.product(ways.items(), randoms.items()):
        how = {"field": field, "sweep_field": sweep_field, "draw": draw}
        contenders[f"PyTorch, {way}{suffix}"] = peer(functools.partial(torch_relaxed, **how))
    contenders["torch.compile"] = lambda inputs: warm(peer(compiled_relaxed)(inputs))
    what = f"{chains} models" if models else f"{chains} chains"
    return Case(
        f"Chimera C8, {what}, {num_sweeps} + 1 sweeps and backward",
        lambda: draws(chains, models),
        contenders,
        updates=chains * 512 * (num_sweeps + 1),
        work=limits.graph(*((chains, 1) if models else (1, chains)), 512, 1472, num_sweeps, backward=True),
        statistics=statistics,
    )


def cases() -> Iterator[Case]:
    yield case(128, 10, models=True)
    yield case(1024, 0, models=False)


graph_gibbs_relaxed = benchmark_of(cases, "graph_gibbs_relaxed")
