# SPDX-License-Identifier: Apache-2.0
"""What sample_moments and parallel_tempering add to the sweeps that they make: plain sweeps are their peer."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import gibbs_ext as gx

from .harness import Call, Case, benchmark_of
from .tables import OURS, PLAIN_SWEEPS

Model = gx.BipartiteBoltzmann | gx.GraphBoltzmann


def model_of(kind: str) -> Model:
    """ "n1+n2", or "Chimera Cn": biases ~ N(0, 0.1^2), couplings of a size at which chains move."""
    torch.manual_seed(1)
    if kind.startswith("Chimera"):
        graph = gx.ChimeraGraph(int(kind.removeprefix("Chimera C")))
        return gx.GraphBoltzmann(graph, 0.1 * torch.randn(graph.num_nodes), 0.5 * torch.randn(graph.num_edges))
    n1, n2 = map(int, kind.split("+"))
    return gx.BipartiteBoltzmann(0.1 * torch.randn(n1), 0.1 * torch.randn(n2), torch.randn(n1, n2) / (n1 + n2) ** 0.5)


def plain_sweeps(model: Model, num_chains: int, num_sweeps: int) -> Call:
    state = torch.zeros(num_chains, model._num_state_units)
    return lambda: model._sweep(state, num_sweeps, seed=1)


def means_of(model: Model, found: Any) -> list[Tensor]:
    """The means of the last states."""
    return [found if isinstance(found, Tensor) else found.samples]


def moments(kind: str, num_chains: int, num_sweeps: int, **options: Any) -> Case:
    def run(model: Model) -> Call:
        start = torch.zeros(model.num_units)
        return lambda: gx.sample_moments(model, num_chains, num_sweeps, initial=start, seed=1, **options)

    every = options.get("sweeps_per_read", 1)
    what = "best states" if options.get("best") else "means and pairs"
    name = f"{what} after every {f'{every} sweeps' if every > 1 else 'sweep'}, {kind}, {num_chains} chains"
    contenders = {OURS: run, PLAIN_SWEEPS: lambda model: plain_sweeps(model, num_chains, num_sweeps)}
    return Case(name, lambda: model_of(kind), contenders, statistics=means_of)


def tempering(kind: str, num_chains: int, num_sweeps: int, sweeps_per_swap: int, num_betas: int = 16) -> Case:
    betas = torch.linspace(0.1, 1, num_betas)

    def run(model: Model) -> Call:
        start = torch.zeros(model.num_units)
        options = {"sweeps_per_swap": sweeps_per_swap, "initial": start, "seed": 1}
        return lambda: gx.parallel_tempering(model, num_chains, betas, num_sweeps, **options)

    swaps = f"every {f'{sweeps_per_swap} sweeps' if sweeps_per_swap > 1 else 'sweep'}"
    name = f"tempering, {num_betas} betas x {num_chains} chains, swaps after {swaps}, {kind}"
    contenders = {OURS: run, PLAIN_SWEEPS: lambda model: plain_sweeps(model, num_betas * num_chains, num_sweeps)}
    return Case(name, lambda: model_of(kind), contenders)


def cases() -> Iterator[Case]:
    for kind, num_chains, num_sweeps in (("100+100", 512, 100), ("784+500", 512, 20), ("Chimera C16", 1024, 50)):
        yield moments(kind, num_chains, num_sweeps)
        yield moments(kind, num_chains, num_sweeps, sweeps_per_read=10, best=True)
    for kind in ("100+100", "Chimera C16"):
        yield tempering(kind, 64, 50, 10)
        yield tempering(kind, 64, 50, 1)
        yield tempering(kind, 8, 100, 10)


chains = benchmark_of(cases, "chains")
