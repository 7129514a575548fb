# SPDX-License-Identifier: Apache-2.0
"""The cost of a call itself: one sweep of a tiny model, against plain PyTorch code that makes the same sweep."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import gibbs_ext as gx

from .bipartite_gibbs_relaxed import SHARPNESS, relax
from .harness import OURS, Case

N = 4  # units on either side
CALLS = 100  # A single call after those of others finds their code and data in the caches, and takes twice as long.


def bits_given(given: Tensor, bias: Tensor, matrix: Tensor) -> Tensor:
    p = torch.addmm(bias, given, matrix).sigmoid_()
    return torch.rand_like(p).lt_(p)


@torch.no_grad()
def torch_sweep(left: Tensor, left_bias: Tensor, right_bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """States [C, n] and the parameters of one model."""
    right = bits_given(left, right_bias, weight)
    return bits_given(right, left_bias, weight.T), right


def torch_relaxed(
    left: Tensor, left_bias: Tensor, right_bias: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A binary sweep and a relaxed one: left, right, and the means of both updates."""
    left, _right = torch_sweep(left, left_bias, right_bias, weight)
    right_mean = torch.addmm(right_bias, left, weight).sigmoid()
    right = relax(right_mean)
    left_mean = torch.addmm(left_bias, right, weight.T).sigmoid()
    return relax(left_mean), right, left_mean, right_mean


def repeated(call: Callable[[], object]) -> Callable[[], object]:
    """Makes the call CALLS times and returns the last result."""

    def calls() -> object:
        for _ in range(CALLS - 1):
            call()
        return call()

    return calls


def family_cases(
    family: str,
    op: Callable[[], object],
    binary: Callable[[], object],
    relaxed: Callable[[], tuple[Tensor, ...]],
    parameters: list[Tensor],
    torch_binary: Callable[[], object],
    torch_relaxed: Callable[[], tuple[Tensor, ...]],
) -> Iterator[Case]:
    """Functions of no argument, of which the relaxed ones are differentiable in ``parameters``."""

    def with_backward(forward: Callable[[], tuple[Tensor, ...]]) -> Callable[[], object]:
        grads = [torch.ones_like(output) for output in forward()]
        return lambda: torch.autograd.grad(forward(), parameters, grads)

    rows: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "the op alone": (op, torch_binary),
        "binary call": (binary, torch_binary),
        "relaxed forward": (relaxed, torch_relaxed),
        "forward and backward": (with_backward(relaxed), with_backward(torch_relaxed)),
    }
    for name, (ours, peer) in rows.items():
        # A CUDA graph would hide the cost that is measured here.
        contenders = {OURS: repeated(ours), "torch.rand": repeated(peer)}
        yield Case(f"tiny {family}, {name}", contenders, calls=CALLS, is_capturable=False)


def cases(chains: int = 4) -> Iterator[Case]:
    torch.manual_seed(1)
    left, right = torch.randint(2, (2, chains, N)).float()
    parameters = [torch.randn(N), torch.randn(N), torch.randn(N, N)]
    numbers = torch.ones(1, dtype=torch.float64, device="cpu"), torch.tensor(1, device="cpu")  # beta and seed
    bipartite = torch.ops.gibbs_ext.bipartite_gibbs.default
    detached, leaves = parameters, [p.clone().requires_grad_() for p in parameters]
    yield from family_cases(
        "bipartite model",
        lambda: bipartite(left, *detached, *numbers, None, None, None, None, 0, 0, 1),
        lambda: gx.bipartite_gibbs(left, *detached, 1, seed=1),
        lambda: gx.bipartite_gibbs_relaxed(left, *leaves, 1, sharpness=SHARPNESS, seed=1),
        leaves,
        lambda: torch_sweep(left, *detached),
        lambda: torch_relaxed(left, *leaves)[:3],
    )

    # The same model as a graph: biases and edges are in an order that makes the peer's slices views.
    graph = gx.ColoredGraph(2 * N, [(i, N + j) for i in range(N) for j in range(N)])
    state, bias, coupling = torch.cat([left, right], -1), torch.cat(parameters[:2]), parameters[2].flatten()
    layout, graph_gibbs = graph.layout_on(state.device), torch.ops.gibbs_ext.graph_gibbs.default
    graph_leaves = [bias.clone().requires_grad_(), coupling.clone().requires_grad_()]

    def of_graph(bias: Tensor, coupling: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The peers' parameters. Their first update is that of colour 0, which is their right side."""
        return bias[N:], bias[:N], coupling.view(N, N).T

    def torch_relaxed_graph() -> tuple[Tensor, Tensor]:
        second, first, second_mean, first_mean = torch_relaxed(state[:, N:], *of_graph(*graph_leaves))
        return torch.cat([first, second], -1), torch.cat([first_mean, second_mean], -1)

    yield from family_cases(
        "graph",
        lambda: graph_gibbs(state, bias, coupling, layout, *numbers, None, None, 0, 0, 1),
        lambda: gx.graph_gibbs(state, bias, coupling, graph, 1, seed=1),
        lambda: gx.graph_gibbs_relaxed(state, *graph_leaves, graph, 1, sharpness=SHARPNESS, seed=1),
        graph_leaves,
        lambda: torch.cat(torch_sweep(state[:, N:], *of_graph(bias, coupling))[::-1], -1),
        torch_relaxed_graph,
    )
