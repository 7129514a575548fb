# SPDX-License-Identifier: Apache-2.0
"""The cost of a call itself: one sweep of a tiny model, against plain PyTorch code that makes the same sweep."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import gibbs_ext as gx

from .bipartite_gibbs import compiled
from .bipartite_gibbs_relaxed import SHARPNESS, relax
from .harness import Call, Case, benchmark_of, warm
from .tables import OURS

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


Rows = dict[str, tuple[Call, Call, Call]]  # what is called: gibbs_ext's, the peer's, the compiled peer's
ROWS = ("the op alone", "binary call", "relaxed forward", "forward and backward")


def rows(
    op: Call,
    binary: Call,
    relaxed: Callable[[], tuple[Tensor, ...]],
    parameters: list[Tensor],
    torch_binary: Call,
    torch_relaxed: Callable[[], tuple[Tensor, ...]],
) -> Rows:
    """Functions of no argument, of which the relaxed ones are differentiable in ``parameters``."""

    def with_backward(forward: Callable[[], tuple[Tensor, ...]]) -> Call:
        grads = [torch.ones_like(output) for output in forward()]
        return lambda: torch.autograd.grad(forward(), parameters, grads)

    calls = (
        (op, torch_binary, compiled(torch_binary)),
        (binary, torch_binary, compiled(torch_binary)),
        (relaxed, torch_relaxed, compiled(torch_relaxed)),
        (with_backward(relaxed), with_backward(torch_relaxed), with_backward(compiled(torch_relaxed))),
    )
    return dict(zip(ROWS, calls, strict=True))


def draws(chains: int) -> tuple[Tensor, Tensor, list[Tensor], tuple[Tensor, Tensor]]:
    """States of both sides, the parameters of a bipartite model, and beta and the seed as the ops want them."""
    torch.manual_seed(1)
    left, right = torch.randint(2, (2, chains, N)).float()
    numbers = torch.ones(1, dtype=torch.float64, device="cpu"), torch.tensor(1, device="cpu")
    return left, right, [torch.randn(N), torch.randn(N), torch.randn(N, N)], numbers


def bipartite_rows(chains: int) -> Rows:
    left, _right, parameters, numbers = draws(chains)
    op, leaves = torch.ops.gibbs_ext.bipartite_gibbs.default, [p.clone().requires_grad_() for p in parameters]
    return rows(
        lambda: op(left, *parameters, *numbers, None, None, None, None, 0, 0, 1),
        lambda: gx.bipartite_gibbs(left, *parameters, 1, seed=1),
        lambda: gx.bipartite_gibbs_relaxed(left, *leaves, 1, sharpness=SHARPNESS, seed=1),
        leaves,
        lambda: torch_sweep(left, *parameters),
        lambda: torch_relaxed(left, *leaves)[:3],
    )


def graph_rows(chains: int) -> Rows:
    """The same model as a graph: biases and edges are in an order that makes the peer's slices views."""
    left, right, parameters, numbers = draws(chains)
    graph = gx.ColoredGraph(2 * N, [(i, N + j) for i in range(N) for j in range(N)])
    state, bias, coupling = torch.cat([left, right], -1), torch.cat(parameters[:2]), parameters[2].flatten()
    layout, op = graph.layout_on(state.device), torch.ops.gibbs_ext.graph_gibbs.default
    leaves = [bias.clone().requires_grad_(), coupling.clone().requires_grad_()]

    def of_graph(bias: Tensor, coupling: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The peers' parameters. Their first update is that of colour 0, which is their right side."""
        return bias[N:], bias[:N], coupling.view(N, N).T

    def torch_relaxed_graph() -> tuple[Tensor, Tensor]:
        second, first, second_mean, first_mean = torch_relaxed(state[:, N:], *of_graph(*leaves))
        return torch.cat([first, second], -1), torch.cat([first_mean, second_mean], -1)

    return rows(
        lambda: op(state, bias, coupling, layout, *numbers, None, None, 0, 0, 1),
        lambda: gx.graph_gibbs(state, bias, coupling, graph, 1, seed=1),
        lambda: gx.graph_gibbs_relaxed(state, *leaves, graph, 1, sharpness=SHARPNESS, seed=1),
        leaves,
        lambda: torch.cat(torch_sweep(state[:, N:], *of_graph(bias, coupling))[::-1], -1),
        torch_relaxed_graph,
    )


def case(family: str, make_rows: Callable[[int], Rows], row: str, chains: int) -> Case:
    return Case(
        f"tiny {family}, {row}",
        lambda: make_rows(chains)[row],
        {
            OURS: lambda calls: repeated(calls[0]),
            "PyTorch, rand": lambda calls: repeated(calls[1]),
            "torch.compile": lambda calls: repeated(warm(calls[2])),
        },
        calls=CALLS,
        is_capturable=False,  # a CUDA graph would hide the cost that is measured here
    )


def cases(chains: int = 4) -> Iterator[Case]:
    for family, make_rows in (("bipartite model", bipartite_rows), ("graph", graph_rows)):
        for row in ROWS:
            yield case(family, make_rows, row, chains)


call_cost = benchmark_of(cases, "call_cost")
