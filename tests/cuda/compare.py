# SPDX-License-Identifier: Apache-2.0
"""Compares emulated CUDA ops with the CPU's, on small problems that take every route; exits with 1 if they differ.

Arguments: the library; prefixes of the names of the ops, and of their routes, that are compared (default: all).
The tests run it on libraries with a fault planted in a kernel; see tests/csrc/test_cuda_planted.py.
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gibbs_ext as gx
from gibbs_ext import _C, ops

SIZES = ((33, 100), (129, 65), (40, 31))
BIPARTITE_ROUTES = ("registers", "shared", "cluster", "global", "all_global")
GRAPH_ROUTES = ("shared", "global")
RUN_AHEAD = ("cluster", "registers")


def bits(*shape: int) -> Tensor:
    return torch.randint(2, shape).float()


def binary_calls(sizes: Sequence[tuple[int, int]] = SIZES) -> Iterator[Any]:
    """Names, arguments and routes of calls whose results must be equal to the bit."""
    schedule = torch.tensor([0.5, 1.0, 1.5, 0.7], dtype=torch.float64)
    seed = torch.tensor(7)
    for place in ((-1, slice(None)), (slice(None), -1), (-1, -1)):  # one row, column or coupling outweighs all others
        weight = torch.randn(300, 120)
        weight[place] = 50 if place != (-1, -1) else 1e4
        yield "coupling_resolution", (weight,), ("auto",)  # several CTAs share it
    for n1, n2 in sizes:
        # In clusters of a small device 150 chains do not fit at a time.
        for batch in ((150 if n1 + n2 < 100 else 70,), (20,), (3, 2)):
            own = batch[1:]
            left_bias, right_bias = torch.randn(*own, n1), torch.randn(*own, n2)
            weight = torch.randn(*own, n1, n2) * (2 / (n1 + n2)) ** 0.5
            clamps = torch.rand(n1) < 0.2, torch.rand(*batch, n2) < 0.2
            arguments = (bits(*batch, n1), left_bias, right_bias, weight, schedule, seed, bits(*batch, n2), *clamps)
            yield "bipartite_gibbs", (*arguments, None, 5, 3, 4), BIPARTITE_ROUTES
            if batch == (20,):  # for which a warp takes two tiles
                continue
            # The largest coupling leaves slices of 1/128 for the others, whose roundings all go one way.
            coarse = (torch.randint(-16, 17, weight.shape) + 0.45) / 128
            coarse[..., 0, 0] = 100
            ones = torch.ones(*batch, n1)
            yield "bipartite_gibbs", (ones, *arguments[1:3], coarse, *arguments[4:], None, 5, 3, 4), BIPARTITE_ROUTES
            # Bounds decide nothing near the largest numbers, and there is no room to note so many units.
            huge = [1e38 * (bias.sign() + bias.clamp(-1, 1)) for bias in (left_bias, right_bias)]
            arguments_of_huge = (arguments[0], *huge, weight, 1e-38 * schedule, *arguments[5:])
            yield "bipartite_gibbs", (*arguments_of_huge, None, 5, 3, 4), BIPARTITE_ROUTES
            bases = torch.randn(n1), torch.randn(n2)
            arguments = (bits(*batch, n1), left_bias, right_bias, weight, *bases, schedule, seed, None, 5, 3)
            yield "bipartite_ais", arguments, BIPARTITE_ROUTES
            yield "coupling_resolution", (1e3 * weight,), ("auto",)
    for graph in (
        gx.ChimeraGraph(2, 3),
        gx.ColoredGraph(20, [(i, j) for i in range(20) for j in range(i) if (i * j) % 3]),
    ):
        for batch in ((70,), (3, 2)):
            bias = torch.randn(*batch[1:], graph.num_nodes)
            coupling = torch.randn(*batch[1:], graph.num_edges)
            state = bits(*batch, graph.num_nodes)
            clamp = torch.rand(*batch, graph.num_nodes) < 0.1
            for beta in (schedule, schedule[:1]):
                arguments = (state, bias, coupling, graph.layout, beta, seed, clamp, None, 5, 3, 4)
                yield "graph_gibbs", arguments, GRAPH_ROUTES
                yield "graph_metropolis", arguments, GRAPH_ROUTES
            # The largest coupling leaves units of 1/256 for the others, whose roundings all go one way.
            coarse = (torch.randint(-16, 17, coupling.shape) + 0.45) / 256
            coarse[..., 0] = 100
            arguments = (state, bias, coarse, graph.layout, schedule, seed, clamp, None, 5, 3, 4)
            yield "graph_gibbs", arguments, GRAPH_ROUTES
            base = torch.randn(graph.num_nodes)
            yield "graph_ais", (state, bias, coupling, graph.layout, base, schedule, seed, None, 5, 3), GRAPH_ROUTES
            yield "graph_fields", (state, bias, coupling, graph.layout), ("auto",)


def tempering_calls() -> Iterator[Any]:
    """As :func:`binary_calls`: cluster moves and swaps, among couplings of which a third do not connect."""
    draw = torch.Generator().manual_seed(0)
    graph, beta = gx.ChimeraGraph(4, 2), torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    for columns in ((7,), (4, 2)):
        own = columns[1:]
        bias, coupling = (torch.randn(*own, n, generator=draw) for n in (graph.num_nodes, graph.num_edges))
        coupling *= torch.rand(coupling.shape, generator=draw) < 0.67
        state = torch.randint(2, (3, *columns, graph.num_nodes), generator=draw).float()
        chains = torch.arange(state[..., 0].numel()).reshape(-1, 3).mT.reshape(3, *columns)
        at_betas = beta.reshape(3, *[1] * len(columns), 1)
        arguments = (state, bias, coupling, graph.layout, at_betas, torch.tensor(7), chains, 4, 2, 3, True)
        yield "graph_tempering", arguments, GRAPH_ROUTES


def moments_calls() -> Iterator[Any]:
    """As :func:`binary_calls`: counts and best states, of chains that each have biases of their own."""
    draw = torch.Generator().manual_seed(0)
    graph, beta = gx.ChimeraGraph(2, 3), torch.tensor([0.5, 1.0, 1.5, 0.7], dtype=torch.float64)
    seed, n1, n2 = torch.tensor(7), 40, 31
    for batch in ((37,), (5, 2)):
        own = batch[1:]
        biases = [torch.randn(*batch, n, generator=draw) for n in (n1, n2, graph.num_nodes)]
        weight = torch.randn(*own, n1, n2, generator=draw) / 6
        left = torch.randint(2, (*batch, n1), generator=draw).float()
        numbers = (None, 5, 3, 4, 2, 2, True)
        yield "bipartite_moments", (left, *biases[:2], weight, beta, seed, None, None, None, *numbers), BIPARTITE_ROUTES
        coupling = torch.randn(*own, graph.num_edges, generator=draw)
        state = torch.randint(2, (*batch, graph.num_nodes), generator=draw).float()
        for metropolis in (False, True):
            arguments = (state, biases[2], coupling, graph.layout, beta, seed, None, *numbers, metropolis)
            yield "graph_moments", arguments, GRAPH_ROUTES


def relaxed_calls(sizes: Sequence[tuple[int, int]], dtypes: Sequence[torch.dtype]) -> Iterator[Any]:
    """Names and arguments of forward and backward calls, whose results must agree within rounding."""
    seed, beta = torch.tensor(7), torch.ones(1, dtype=torch.float64)
    many = [(n1, n2, batch) for n1, n2 in sizes for batch in ((37,), (3, 2), (2,))]
    # Shared memory of a small device does not hold these weights, and not the values of the last two.
    large = [(190, 90, (5,)), (190, 90, (2,)), (16000, 1, (5,)), (1, 16000, (2,))]
    for (n1, n2, batch), dtype in itertools.product([*many, *large], dtypes):
        own = batch[1:] if len(batch) > 1 else batch if batch == (2,) else ()
        parameters = (
            torch.randn(*own, n1),
            torch.randn(*own, n2),
            torch.randn(*own, n1, n2) * (2 / (n1 + n2)) ** 0.5,
        )
        if n1 < n2:  # columns in one piece
            parameters = (*parameters[:2], parameters[2].mT.contiguous().mT)
        numbers = (beta, seed, None, 5, 3, 2)
        arguments = (bits(*batch, n1).to(dtype), *(x.to(dtype) for x in parameters), *numbers, 2, 0, 4.0, True)
        yield "bipartite_gibbs_relaxed", arguments
        left, right, mean, state, fields = ops.call("bipartite_gibbs_relaxed", *arguments)
        grads = torch.randn_like(left), torch.randn_like(right), torch.randn_like(mean)
        yield "bipartite_gibbs_relaxed_backward", (*grads, state, fields, arguments[3], *numbers, 0, 4.0, True)

    for graph in (
        gx.ChimeraGraph(2, 3),
        gx.ColoredGraph(20, [(i, j) for i in range(20) for j in range(i) if (i * j) % 3]),
    ):
        for batch in ((37,), (3, 2)):
            own = batch[1:]
            bias, coupling = torch.randn(*own, graph.num_nodes).double(), torch.randn(*own, graph.num_edges).double()
            numbers = (graph.layout, beta, seed, None, 5, 3, 2)
            arguments = (bits(*batch, graph.num_nodes).double(), bias, coupling, *numbers, 2, 0, 4.0, True)
            yield "graph_gibbs_relaxed", arguments
            relaxed, mean, state, fields = ops.call("graph_gibbs_relaxed", *arguments)
            grads = torch.randn_like(relaxed), torch.randn_like(mean)
            yield "graph_gibbs_relaxed_backward", (*grads, state, fields, coupling, *numbers, 0, 4.0, True)
            yield "graph_edge_sums", (*grads, coupling, graph.layout)


def calls(
    is_wanted: Callable[[str], bool],
    sizes: Sequence[tuple[int, int]] = SIZES,
    relaxed_dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32),
) -> Iterator[tuple[str, Any, list[str], float]]:
    """Names, arguments, wanted routes and tolerances of calls."""
    for name, arguments, routes in itertools.chain(binary_calls(sizes), tempering_calls(), moments_calls()):
        if found := list(filter(is_wanted, routes)):
            is_exact = name.endswith(("gibbs", "metropolis", "tempering", "moments", "resolution"))
            yield name, arguments, found, 0.0 if is_exact else 1e-3
    if is_wanted("auto"):
        for name, arguments in relaxed_calls(sizes, relaxed_dtypes):
            yield name, arguments, ["auto"], 1e-9 if arguments[0].dtype == torch.float64 else 1e-3


def differs(actual: Any, expected: Any, tolerance: float) -> bool:
    if isinstance(expected, Tensor):
        actual, expected = (actual,), (expected,)
    return any(
        not torch.isfinite(a).all() or float((a.double() - e.double()).abs().max()) > tolerance
        for a, e in zip(actual, expected, strict=True)
    )


def emulated_calls(
    library_path: str, wanted: str = "", wanted_route: str = ""
) -> Iterator[tuple[str, str, Any, float, Callable[[], Any]]]:
    """Names of ops, how they are called, arguments, tolerances, and calls, for which route and device are set."""
    library = _C.load_cuda(library_path)
    torch.manual_seed(0)
    for name, arguments, routes, tolerance in calls(lambda route: route.startswith(wanted_route)):
        if not name.startswith(wanted):
            continue
        # A device of few multiprocessors makes wide CTAs, and gives each many chains.
        small = "pairs" if name.startswith("graph") else "one pair"
        for route, order, device in itertools.product(routes, ("random", "forward", "reverse"), ("H100", small)):
            # Some faults need one CTA of a cluster, or one warp, to run far ahead of the others.
            if order != "random" and (route not in RUN_AHEAD or arguments[0].numel() > 300):
                continue
            if device != "H100" and name == "coupling_resolution":
                continue
            os.environ |= {"GIBBS_EMULATOR_ORDER": order, "GIBBS_EMULATED_DEVICE": device}
            library.set_route(route)
            op = getattr(torch.ops.gibbs_ext_emulated, name)
            yield name, f"{route}, {order}", arguments, tolerance, partial(op, *arguments)


def main(library_path: str, wanted: str = "", wanted_route: str = "") -> str:
    """Says which results differ, or ""."""
    last: Any = None
    for name, what, arguments, tolerance, call in emulated_calls(library_path, wanted, wanted_route):
        if last is None or last[0] != name or last[1] is not arguments:
            last = name, arguments, ops.call(name, *arguments)
        if differs(call(), last[2], tolerance):
            return f"{name}, {what}: the results differ"
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(*sys.argv[1:]) or 0)
