# SPDX-License-Identifier: Apache-2.0
"""Writes bipartite.txt and graph.txt from the Python reference.

The files hold the sampling contract: a line that changes is a breaking change, which CHANGELOG.md must name. Run
``python tests/golden/regenerate.py`` then, and at no other time.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch

from gibbs_ext import ChimeraGraph, ColoredGraph, pack_bits, reference

FILE, GRAPH_FILE = (Path(__file__).with_name(name) for name in ("bipartite.txt", "graph.txt"))


def parameters(n1: int, n2: int, models: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Small exact fractions by formula, so that no random generator has a say."""
    i, j, m = torch.arange(n1), torch.arange(n2), torch.arange(max(models, 1))
    weight = ((i[:, None] * 7 + j * 13 + m[:, None, None] * 5) % 11 - 5) / 16
    return (i * 5 % 9 - 4) / 8, (j * 3 % 7 - 3) / 8, weight if models else weight[0]


def hexadecimal(state: torch.Tensor) -> str:
    return pack_bits(state).numpy().tobytes().hex()


def vectors(core: ModuleType | SimpleNamespace, gibbs, ais) -> Iterator[str]:
    """One line each; ``core`` has random_word, threshold and round_couplings."""
    for numbers in [(0, 0, 0, 0), (1, 2, 3, 4), (-1, 2**48 - 1, 2**44 - 1, 1000), (2**63 - 1, 2**32, 2**32, 127)]:
        yield f"random_word {' '.join(map(str, numbers))} = {core.random_word(*numbers):08x}"
    for x in [0.0, 1e-3, -0.5, 1.0, -3.25, 7.5, -15.0, 21.0, -30.0, 60.0, -89.0, 100.0]:
        yield f"threshold {x} = {int(core.threshold(np.array([x], np.float32))[0]):08x}"
    for scale in [1e-6, 0.1, 1.0, 3.7, 1e5]:
        weight = (parameters(20, 30)[2] * scale).numpy()
        rounded, k = core.round_couplings(weight)
        yield f"round_couplings {scale} = {k} {int(rounded[3, 5])} {int(rounded.astype(np.int64).sum())}"
    for n1, n2, models, chains, seed in [
        (1, 1, 0, 8, 0),
        (33, 17, 0, 3, 1),
        (40, 129, 2, 1, -5),
        (130, 64, 3, 2, 2**40),
    ]:
        p = parameters(n1, n2, models)
        start = torch.zeros(chains, *([models] if models else []), n1)
        beta = torch.linspace(0.25, 1.25, 5)
        options = {"seed": seed, "chain_offset": 2**33, "sweep_offset": 7}
        left, right = gibbs(start, *p, 5, beta=beta, **options)
        name = f"{n1} {n2} {models} {chains} {seed}"
        yield f"bipartite_gibbs {name} = {hexadecimal(left)} {hexadecimal(right)}"
        left, right, _ = ais(start, *p, p[0] / 2, p[1] / 2, torch.linspace(0, 1, 6).double(), **options)
        yield f"bipartite_ais {name} = {hexadecimal(left)} {hexadecimal(right)}"


GRAPHS = {
    "chimera": ChimeraGraph(2),
    "chimera with holes": ChimeraGraph(3, 3, missing_nodes=[0, 9, 30], missing_edges=[(1, 5), (32, 56)]),
    "K5": ColoredGraph(5, [(i, j) for i in range(5) for j in range(i)], range(5)),
    "star of 12": ColoredGraph(13, [(12, i) for i in range(12)], [0] * 12 + [1]),
    "no edges": ColoredGraph(3, [], [1, 0, 1]),
}


def graph_vectors(gibbs, metropolis, ais, resolution) -> Iterator[str]:
    """One line each; ``resolution`` gives 2^-k of the couplings of one model on a graph."""
    for name, graph in GRAPHS.items():
        n, e = torch.arange(graph.num_nodes), torch.arange(graph.num_edges)
        for scale in [1e-6, 1.0, 3.7, 1e5]:
            coupling = ((e * 7 % 11 - 5) / 16 * scale).float()
            yield f"coupling_resolution {name} {scale} = {resolution(coupling, graph)}"
        for models, chains, seed in [(0, 70, 1), (3, 2, -5)]:
            m = torch.arange(max(models, 1))
            bias, coupling = (n * 5 % 9 - 4) / 8, ((e * 7 + m[:, None] * 5) % 11 - 5) / 8
            coupling = coupling if models else coupling[0]
            start = torch.zeros(chains, *([models] if models else []), graph.num_nodes)
            options = {"seed": seed, "chain_offset": 2**33, "sweep_offset": 7}
            beta = torch.tensor([0.25, 0.25, 0.5, 1.25, 1.25])
            z = gibbs(start, bias, coupling, graph, 5, beta=beta, **options)
            yield f"graph_gibbs {name} {models} {chains} {seed} = {digest(z)}"
            z = metropolis(start, bias, coupling, graph, 5, beta=beta, **options)
            yield f"graph_metropolis {name} {models} {chains} {seed} = {digest(z)}"
            z, _ = ais(start, bias, coupling, graph, bias / 2, torch.linspace(0, 1, 6).double(), **options)
            yield f"graph_ais {name} {models} {chains} {seed} = {digest(z)}"


def digest(state: torch.Tensor) -> str:
    """A hash of all chains, and the bits of the last one, which tell more."""
    packed = pack_bits(state).numpy().tobytes()
    return f"{hashlib.sha256(packed).hexdigest()[:16]} {hexadecimal(state.reshape(-1, state.shape[-1])[-1])}"


def reference_resolution(coupling: torch.Tensor, graph: ColoredGraph) -> float:
    _, k = reference.round_graph_couplings(coupling.numpy(), graph.edges.numpy(), graph.num_nodes)
    return float(2.0**-k)


if __name__ == "__main__":
    lines = vectors(reference, reference.bipartite_gibbs_reference, reference.bipartite_ais_reference)
    FILE.write_text("\n".join(lines) + "\n")
    graph_functions = (
        reference.graph_gibbs_reference,
        reference.graph_metropolis_reference,
        reference.graph_ais_reference,
    )
    lines = graph_vectors(*graph_functions, reference_resolution)
    GRAPH_FILE.write_text("\n".join(lines) + "\n")
