# SPDX-License-Identifier: Apache-2.0
"""Counts the work of the CUDA kernels on GPUs without a GPU: `make cuda-report`.

For each standard problem and device the report has the plan that the ops make, registers and spills (from ptxas),
occupancy (from cuda_occupancy.h) and bytes of device memory. It runs a CTA in the emulator of the tests and counts
wavefronts and bank conflicts of shared memory, sectors that global_load() asks for, barriers and matrix products;
instructions are those of the machine code. From these follows a time that the call does not undercut; only a GPU can
tell how much slower it is. A floor says what any program would need for the same updates on that device. The bound for
plain PyTorch is computed from the operators that the peers of bench/ call: their launches, bytes and products. What the
host does for a call is measured.
"""

import argparse
import ctypes
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import gibbs_ext as gx
from gibbs_ext import ops

from . import bipartite_gibbs, bipartite_gibbs_relaxed, graph_gibbs, graph_gibbs_relaxed, texts
from .bipartite_gibbs import draws, one_model_or_many
from .harness import cpu_name
from .texts import ROOT, duration, markdown, write, write_part

sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
sys.path.insert(0, str(ROOT / "tests"))
import backends
import nvcc
from backends import build

HISTORY = texts.HISTORY / "cuda-bounds.json"
README = ROOT / "csrc" / "cuda" / "README.md"
COMMAND = "make cuda-report"  # writes the table of bounds there, and marks it


class Limits(NamedTuple):
    """Limits of a device per second or clock cycle: what it promises, or what was measured where that is much less."""

    clock: float  # Hz
    memory: float  # bytes of device memory per second
    l2: float  # bytes that all multiprocessors read from L2 per second
    l2_size: int  # bytes
    l1_size: int  # bytes of a multiprocessor, with its shared memory
    tensor: int  # dense 8-bit multiply-adds of a multiprocessor per clock
    mma: float  # the part of these that mma.sync reaches
    latency: float  # clocks from a load of shared memory to its value
    flops: dict[str, float]  # of matrix products, per second, by arithmetic


# Memory, products, size of L2: NVIDIA's data sheets of A100 80GB SXM, H100 SXM5, HGX B200; the clock is the one that
# makes the promised 8-bit products. L1: "CUDA C++ Programming Guide", compute capabilities 8.0, 9.0, 10.0.
# L2: 5.7 TB/s were measured on an H100 PCIe (chipsandcheese.com, "Nvidia's H100: Funny L2, and Tons of Bandwidth"),
# 28.5 bytes per clock of each of its 114 multiprocessors at 1.755 GHz. The others are taken to have as much per clock.
# Latency and mma.sync: Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture", arXiv:2402.13499:
# 29 clocks on A100 and H100; 63% of the promised rate on H100, nearly all of it on A100. B200 is taken to have the
# latency, and the rate of mma.sync, of H100.
FLOPS = {
    "A100": {"float32": 19.5e12, "TF32": 156e12, "bfloat16": 312e12},
    "H100": {"float32": 67e12, "TF32": 494e12, "bfloat16": 989e12},
    "B200": {"float32": 75e12, "TF32": 1.1e15, "bfloat16": 2.25e15},
}
LIMITS = {
    "A100": Limits(1.41e9, 2.039e12, 108 * 28.5 * 1.41e9, 40 << 20, 192 << 10, 2048, 1, 29, FLOPS["A100"]),
    "H100": Limits(1.83e9, 3.35e12, 132 * 28.5 * 1.83e9, 50 << 20, 256 << 10, 4096, 0.63, 29, FLOPS["H100"]),
    "B200": Limits(1.85e9, 8e12, 148 * 28.5 * 1.85e9, 126 << 20, 256 << 10, 8192, 0.32, 29, FLOPS["B200"]),
}
ARCHITECTURES = {"T4": "75", "A100": "80", "A10": "80", "L40S": "80", "H100": "90", "B200": "100", "RTX 5090": "120"}

# Seconds of a launch, as is commonly seen.
LAUNCH = 2e-6  # eager: what the driver takes, beside the host's own time for the operator
GRAPH_LAUNCH = 1e-6  # in a CUDA graph, from one launch to the next
LANES = 128  # instructions of single lanes that a multiprocessor begins per clock
PRODUCT = 16 * 8 * 32  # multiply-adds of a matrix product in the emulator's count


class Work(NamedTuple):
    """The least that a kernel does: instructions of lanes, and bytes of device memory, with float32 parameters."""

    coupling: float = 0  # instructions for each coupling of all models
    product: float = 0  # for each multiply-add of a coupling and a value of a chain, for each relaxed sweep
    update: float = 0  # for each unit of all chains (of relaxed sweeps: for each sweep)
    coupling_bytes: float = 0
    update_bytes: float = 0


# Instructions of bipartite_slice are counted in the machine code for 9.0; the others are estimates, meant to be low.
# A relaxed update computes about 60 and draws two Philox counters alone.
PHILOX = 40  # instructions of a counter, which serves 16 high bytes
RELAXED = 60 + 2 * PHILOX
WORK = {
    "pack": Work(update=10, update_bytes=4),
    "unpack": Work(update=10, update_bytes=4),
    "bipartite_scale": Work(coupling=22, coupling_bytes=4),  # two passes
    "bipartite_part": Work(coupling=8, coupling_bytes=4),
    "bipartite_slice": Work(coupling=2 * 31, coupling_bytes=4 + 2 * 2),  # of two sides, in two slices
    "bipartite": Work(coupling_bytes=2 * 2),
    "bipartite_relaxed": Work(coupling=4, product=2.5, update=RELAXED, coupling_bytes=4, update_bytes=4 * 4),
    "bipartite_backward": Work(coupling=10, product=2.5, update=RELAXED, coupling_bytes=2 * 4, update_bytes=6 * 4),
    "graph_pack": Work(coupling=2 * 20, coupling_bytes=4 + 2 * 4),
    "graph": Work(),
    "graph_relaxed": Work(product=8, update=RELAXED, coupling_bytes=4, update_bytes=4 * 4),
    "graph_backward": Work(product=12, update=RELAXED, coupling_bytes=2 * 4, update_bytes=6 * 4),
}
# Of a binary update. Bipartite: 408 for 16 units of four tiles of chains, decisions and all around them, and one more
# for each if sums are shifted. Lanes have two chains of eight, so a model with one chain takes four times as many.
# Log-weights take two softplus of right units (an estimate).
BIPARTITE_DECISION, SHIFT, SOFTPLUS = 408 / 16, 1, 80
# Of graphs with eight chains: 101 for two quads of half-edges, 156 for the decisions; with one chain, estimates.
GRAPH_DECISION, GRAPH_QUAD = 156 / 8, 101 / 2 / 8
GRAPH_DECISION_ALONE, GRAPH_QUAD_ALONE = 30, 20
# Of a warp for a matrix product, with loads of slices and bits and their expansion, by tiles of a warp.
PRODUCT_IN_REGISTERS = 2.3
PRODUCT_FROM_SHARED = {1: 65 / 16, 2: 60 / 16, 4: 55 / 16, 8: 92 / 32}
# What no program of this kind can do without: random bits and one comparison; or a random number of 23 bits, an
# exponential and a quotient (16 lanes a clock each).
LEAST = {"binary": PHILOX / 16 + 1, "relaxed": PHILOX / 16 + PHILOX / 4 + 2 * LANES / 16, "softplus": 4 * LANES / 16}

# Problems of the table in README.
SHORT = (
    "4096 models, 200+200, 100 sweeps",
    "shared weight, 65536 chains, 784+500, 100 sweeps",
    "4096 models, 200+200, 10 + 1 sweeps and backward",
    "Chimera C16, 1024 chains, 100 sweeps",
    "Pegasus P14, 10000 chains, 100 sweeps",
)

COMPILE = "compile"  # the way of a peer that torch.compile compiles

# Problems ----------------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """A problem makes its calls for any number of sweeps, so that counts of few sweeps can be extrapolated to many."""

    name: str
    sweeps: int
    chains: int  # of all models
    units: int
    couplings: int  # of all models
    products: int  # multiply-adds of a coupling and a bit per sweep
    ours: Callable[[int], Callable[[], object]]
    peer: Callable[
        ..., Callable[[], object]
    ]  # takes a number of sweeps, one of `ways` (the first by default) and a dtype
    ways: tuple[str, ...] = ("rand", "bernoulli", COMPILE)
    num_relaxed: int = 0
    quads: int = 0  # of a graph: quads of half-edges of a unit
    runs: tuple[int, int] = (2, 4)  # numbers of sweeps that are run; large enough for the plan of many sweeps

    @property
    def updates(self) -> int:
        """Updates of units per sweep."""
        return self.chains * self.units

    @property
    def call(self) -> str:
        """What of gibbs_ext it calls."""
        family = "graph" if self.quads else "bipartite"
        return "AIS" if self.name.startswith("AIS") else f"{family}_gibbs{'_relaxed' * bool(self.num_relaxed)}"


def bipartite(models: int, chains: int, n1: int, n2: int, sweeps: int, **more: Any) -> Problem:
    what = f"{models} models" if models > 1 else f"shared weight, {chains} chains"

    def ours(num_sweeps: int) -> Callable[[], object]:
        arguments = one_model_or_many(*draws(models, chains, n1, n2))
        return lambda: gx.bipartite_gibbs(*arguments, num_sweeps, seed=1)

    def peer(num_sweeps: int, way: str = "rand", dtype: torch.dtype = torch.float32) -> Callable[[], object]:
        left, a, b, weight = (x.to(dtype) for x in draws(models, chains, n1, n2))
        if way == COMPILE:
            return lambda: bipartite_gibbs.compiled_sweeps(left, a, b, weight, num_sweeps)
        return lambda: bipartite_gibbs.torch_sweeps(left, a, b, weight, num_sweeps, getattr(bipartite_gibbs, way))

    name = f"{what}, {n1}+{n2}, {sweeps} sweeps"
    couplings = models * n1 * n2
    return Problem(name, sweeps, models * chains, n1 + n2, couplings, 2 * chains * couplings, ours, peer, **more)


def relaxed(models: int, n: int, sweeps: int) -> Problem:
    def ours(num_sweeps: int) -> Callable[[], object]:
        left, *parameters = one_model_or_many(*draws(models, 1, n, n))
        leaves = [p.requires_grad_() for p in parameters]

        def run() -> object:
            left_out, right_out, _mean = gx.bipartite_gibbs_relaxed(left, *leaves, num_sweeps, 1, seed=1)
            return torch.autograd.grad((left_out.sum() + right_out.sum()), leaves)

        return run

    def peer(num_sweeps: int, way: str = "rand", dtype: torch.dtype = torch.float32) -> Callable[[], object]:
        left, *parameters = (x.to(dtype) for x in draws(models, 1, n, n))
        leaves = [p.requires_grad_() for p in parameters]

        def run() -> object:
            if way == COMPILE:
                outputs = bipartite_gibbs_relaxed.compiled_relaxed(left, *leaves, num_sweeps=num_sweeps)
            else:
                draw = getattr(bipartite_gibbs, way)
                outputs = bipartite_gibbs_relaxed.torch_relaxed(left, *leaves, num_sweeps, 1, draw)
            left_out, right_out, _mean = outputs
            return torch.autograd.grad((left_out.sum() + right_out.sum()), leaves)

        return run

    name = f"{models} models, {n}+{n}, {sweeps} + 1 sweeps and backward"
    couplings = models * n * n
    return Problem(name, sweeps, models, 2 * n, couplings, 2 * couplings, ours, peer, num_relaxed=1)


def ais_step(
    left: Tensor, log_weight: Tensor, a: Tensor, b: Tensor, weight: Tensor, before: Any, beta: Any
) -> tuple[Tensor, Tensor]:
    field = torch.baddbmm(b, left, weight)
    softplus = torch.nn.functional.softplus
    log_weight = log_weight + (softplus(beta * field) - softplus(before * field)).sum(-1, dtype=log_weight.dtype)
    log_weight = log_weight + (beta - before) * (left @ a.mT)[..., 0]
    right = (torch.rand_like(field) < torch.sigmoid(beta * field)).to(left.dtype)
    field = torch.baddbmm(a, right, weight.mT)
    return (torch.rand_like(field) < torch.sigmoid(beta * field)).to(left.dtype), log_weight


def torch_ais(left: Tensor, a: Tensor, b: Tensor, weight: Tensor, betas: Any, step: Callable[..., Any]) -> Tensor:
    """Annealed importance sampling from the uniform distribution, as in gibbs_ext.annealed_importance_sampling."""
    log_weight = left.new_zeros(left.shape[:-1], dtype=torch.float32)
    for before, beta in pairwise(betas):
        left, log_weight = step(left, log_weight, a, b, weight, before, beta)
    return log_weight


def ais(chains: int, n: int, steps: int) -> Problem:
    def ours(num_steps: int) -> Callable[[], object]:
        _left, a, b, weight = one_model_or_many(*draws(1, 1, n, n))
        model = gx.BipartiteBoltzmann(a, b, weight)
        betas = torch.linspace(0, 1, num_steps + 1)
        return lambda: gx.annealed_importance_sampling(model, chains, betas, seed=1)

    def peer(num_steps: int, way: str = "rand", dtype: torch.dtype = torch.float32) -> Callable[[], object]:
        left, a, b, weight = (x.to(dtype) for x in draws(1, chains, n, n))
        betas: Any = [step / num_steps for step in range(num_steps + 1)]
        step = ais_step
        if way == COMPILE:  # Python numbers would be compiled as constants, each beta anew
            betas, step = torch.tensor(betas, dtype=dtype).unbind(), bipartite_gibbs.compiled(ais_step)
        return lambda: torch_ais(left, a, b, weight, betas, step)

    ways = ("rand", COMPILE)
    name = f"AIS, {chains} chains, {n}+{n}, {steps} steps"
    return Problem(name, steps, chains, 2 * n, n * n, chains * 2 * n * n, ours, peer, ways)


def pegasus(size: int) -> gx.ColoredGraph:
    """D-Wave's graph Pegasus P`size`, without the nodes that a chip leaves out because they have no internal coupler.

    Boothby, Bunyk, Raymond, Roy, "Next-Generation Topology of D-Wave Quantum Processors", arXiv:2003.00133. A qubit has
    an orientation u, an offset w of its tile across it, an offset k in its tile and an offset z along it. GPU machines
    need not have the package dwave-graphs, which the tests compare with.
    """
    tiles, per_tile = size - 1, 12
    vertical, horizontal = (2, 2, 2, 2, 10, 10, 10, 10, 6, 6, 6, 6), (6, 6, 6, 6, 2, 2, 2, 2, 10, 10, 10, 10)

    def number(u: int, w: int, k: int, z: int) -> int:
        return ((u * size + w) * per_tile + k) * tiles + z

    internal = [
        (number(0, w, k, z), number(1, z + (j < vertical[k]), j, w - (k < horizontal[j])))
        for w, k, j, z in product(range(size), range(per_tile), range(per_tile), range(tiles))
        if 0 <= w - (k < horizontal[j]) < tiles
    ]
    places = list(product((0, 1), range(size), range(per_tile), range(tiles)))
    external = [(number(u, w, k, z), number(u, w, k, z + 1)) for u, w, k, z in places if z + 1 < tiles]
    odd = [(number(u, w, k, z), number(u, w, k + 1, z)) for u, w, k, z in places if k % 2 == 0]
    used = {node: at for at, node in enumerate(sorted({node for edge in internal for node in edge}))}
    edges = [(used[a], used[b]) for a, b in internal + external + odd if a in used and b in used]
    return gx.ColoredGraph(len(used), edges)


def coloured(
    name: str, graph: gx.ColoredGraph, chains: int, sweeps: int, *, models: bool = False, num_relaxed: int = 0
) -> Problem:
    lists = graph_gibbs.Lists(graph)
    n, own = graph.num_nodes, (chains,) if models else ()
    # A bag has the same weights for every chain. Relaxed sweeps have no peer that is compiled here.
    ways = ("gather",) if models else ("bag", "gather")
    ways = ways if num_relaxed else (*ways, COMPILE)

    def parameters() -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(1)
        return (
            torch.randint(2, (chains, n)).float(),
            torch.randn(*own, n),
            torch.rand(*own, graph.num_edges) * 2 - 1,
        )

    def ours(num_sweeps: int) -> Callable[[], object]:
        state, bias, coupling = parameters()
        if not num_relaxed:
            return lambda: gx.graph_gibbs(state, bias, coupling, graph, num_sweeps, seed=1)
        leaves = bias.requires_grad_(), coupling.requires_grad_()

        def run() -> object:
            outputs = gx.graph_gibbs_relaxed(state, *leaves, graph, num_sweeps, num_relaxed, seed=1)
            return torch.autograd.grad(sum(x.sum() for x in outputs), leaves)

        return run

    def peer(num_sweeps: int, way: str = ways[0], dtype: torch.dtype = torch.float32) -> Callable[[], object]:
        state, bias, coupling = (x.to(dtype).T.contiguous() if x.dim() > 1 else x.to(dtype) for x in parameters())
        arguments = lists, state, bias if models else bias[:, None], coupling
        if way == COMPILE:
            betas = torch.ones(num_sweeps, dtype=dtype)
            return lambda: graph_gibbs.in_order(lists, graph_gibbs.compiled_sweeps(*arguments, betas))
        if not num_relaxed:
            fields, ones = getattr(graph_gibbs, way), [1.0] * num_sweeps
            return lambda: graph_gibbs.in_order(lists, graph_gibbs.torch_sweeps(*arguments, ones, fields))
        leaves = [x.requires_grad_() for x in arguments[2:]]
        field, sweep_field = getattr(graph_gibbs_relaxed, way), getattr(graph_gibbs, way)

        def run() -> object:
            outputs = graph_gibbs_relaxed.torch_relaxed(
                lists, state, *leaves, num_sweeps, field, sweep_field, lambda u: u.uniform_()
            )
            return torch.autograd.grad(sum(x.sum() for x in outputs), leaves)

        return run

    what = f"{chains} models" if models else f"{chains} chains"
    relaxation = f" + {num_relaxed} sweeps and backward" if num_relaxed else " sweeps"
    name = f"{name}, {what}, {sweeps}{relaxation}"
    quads = math.ceil(graph.max_degree / 4)
    couplings, products = graph.num_edges * (chains if models else 1), chains * 2 * graph.num_edges
    return Problem(name, sweeps, chains, n, couplings, products, ours, peer, ways, num_relaxed, quads, runs=(4, 8))


def chimera(size: int, chains: int, sweeps: int, **more: Any) -> Problem:
    return coloured(f"Chimera C{size}", gx.ChimeraGraph(size), chains, sweeps, **more)


def problems() -> Iterator[Problem]:
    yield bipartite(128, 1, 100, 100, 100)
    yield bipartite(4096, 1, 200, 200, 100)
    yield bipartite(1, 1024, 784, 500, 100, runs=(1, 2))
    yield bipartite(1, 65536, 784, 500, 100, runs=(1, 2))
    yield relaxed(128, 100, 10)
    yield relaxed(4096, 200, 10)
    yield ais(1024, 100, 1000)
    yield chimera(16, 1024, 100)
    yield chimera(16, 16384, 100)
    for chains in (80, 10000, 100000):
        yield coloured("Pegasus P14", pegasus(14), chains, 100)
    yield chimera(8, 128, 100, models=True)
    yield chimera(8, 128, 10, models=True, num_relaxed=1)


# Counting ----------------------------------------------------------------------------------------------------------


@cache
def counters() -> Any:
    """The library with the counters of tests/cuda/emulated_devices.cpp."""
    library = ctypes.CDLL(str(build.emulated_ops()))
    library.emulator_count.argtypes = [ctypes.c_int64]
    library.emulator_launches.restype = ctypes.c_char_p
    return library


def launches(call: Callable[[], object], device: str, most_ctas: int) -> tuple[list[dict[str, Any]], int]:
    """The launches of a call, each run with `most_ctas` CTAs at most, and the bytes of all arguments and results."""
    moved = 0

    def counted(op: Any, *args: Any) -> Any:
        nonlocal moved
        results = backends.call_emulated(op, *args)
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in tree_leaves((args, results))
            if isinstance(t, Tensor)
        }
        moved += sum(storages.values())
        return results

    backends.emulated_library()
    counters().emulator_count(most_ctas)
    try:
        with patch.dict(os.environ, GIBBS_EMULATED_DEVICE=device), patch.object(ops, "_call", counted):
            call()
    finally:
        text = counters().emulator_launches()
    return json.loads(text), moved


COUNTS = ("wavefronts", "conflicts", "barriers", "lines", "sectors", "different_sectors", "products")
SHAPE = ("kernel", "num_ctas", "num_threads", "shared_memory", "cluster_size")
_counted: dict[Any, list[dict[str, Any]]] = {}


def count(problem: Problem, device: str) -> tuple[list[dict[str, Any]], int]:
    """The launches of a call, with counts per CTA, and the bytes of the ops' arguments and results."""
    planned, moved = launches(problem.ours(problem.sweeps), device, 0)
    shapes = [[launch[k] for k in SHAPE] for launch in planned]
    key = problem.name, str(shapes)
    if key not in _counted:  # devices that have the same plan share the counts
        per_cta = []
        for sweeps in problem.runs:
            done, _ = launches(problem.ours(sweeps), device, 1)
            if [[launch[k] for k in SHAPE] for launch in done] != shapes:
                raise RuntimeError(f"{problem.name}, {device}: the plan for {sweeps} sweeps is another one")
            per_cta.append([{k: launch[k] / max(1, launch["ctas_run"]) for k in COUNTS} for launch in done])
        few, more = per_cta
        steps = (problem.sweeps - problem.runs[0]) / (problem.runs[1] - problem.runs[0])
        _counted[key] = [
            {k: a[k] + (b[k] - a[k]) * steps for k in COUNTS} | {"different_sectors": b["different_sectors"]}
            for a, b in zip(few, more, strict=True)
        ]
    return [launch | counts for launch, counts in zip(planned, _counted[key], strict=True)], moved


class Operator(NamedTuple):
    """What an operator of PyTorch has to do."""

    flops: int  # of matrix products
    operands: tuple[int, ...]  # bytes of each tensor that it reads or writes
    gathered: int  # bytes that it picks from a tensor


class Operators(TorchDispatchMode):
    """Counts the operators that a GPU would launch a kernel for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Operator] = Counter()

    @property
    def launches(self) -> int:
        return self.found.total()

    @property
    def bytes(self) -> int:
        return sum((sum(x.operands) + x.gathered) * times for x, times in self.found.items())

    @property
    def flops(self) -> int:
        return sum(x.flops * times for x, times in self.found.items())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not func.is_view and re.match(r"(aten|gibbs_ext)::(?!_?empty|new_empty|detach|_unsafe_view|lift)", name):
            # `out` is among the results.
            read = {name: value for name, value in (kwargs or {}).items() if name != "out"}
            tensors = [t for t in tree_leaves((args, read, results)) if isinstance(t, Tensor)]
            flops, gathered = 0, 0
            if func.overloadpacket in flop_registry:
                flops = flop_registry[func.overloadpacket](*args, **read, out_val=results)
            if "_embedding_bag" in name:  # reads a row for each index
                rows, indices = args[:2]
                tensors = [t for t in tensors if t is not rows]
                gathered = indices.numel() * rows[0].numel() * rows.element_size()
            self.found[Operator(flops, tuple(t.numel() * t.element_size() for t in tensors), gathered)] += 1
        return results


def count_peer(problem: Problem, dtype: torch.dtype = torch.float32) -> dict[Operator, float]:
    """The operators of plain PyTorch, extrapolated from few sweeps on tensors without data."""
    few, more = 2, 3
    counts = []
    for sweeps in (few, more):
        with FakeTensorMode(allow_non_fake_inputs=True):
            call = problem.peer(sweeps, dtype=dtype)
            with Operators() as counted:
                call()
        counts.append(counted.found)
    a, b = counts
    return {x: a[x] + (b[x] - a[x]) * (problem.sweeps - few) for x in a | b}


# Bounds ------------------------------------------------------------------------------------------------------------


def occupancies(rows: list[tuple[str, int, int, int]]) -> list[tuple[int, int, int]]:
    """CTAs per multiprocessor, multiprocessors and a multiprocessor's most threads, for each row.

    A row has a device, registers per thread, threads and bytes of shared memory.
    """
    program = ROOT / "build" / "occupancy"
    cuda = nvcc.find()
    assert cuda, "make cuda-report needs nvcc"
    flags = ["-std=c++20", "-DGIBBS_EMULATE", *build.include_flags(), f"-I{cuda.home / 'include'}"]
    source = Path(__file__).with_name("occupancy.cpp")
    subprocess.run([*build.compiler(), *flags, str(source), "-o", str(program)], check=True)
    text = "\n".join("|".join(map(str, row)) for row in rows)
    done = subprocess.run([str(program)], input=text, capture_output=True, text=True, check=True)
    return [(int(a), int(b), int(c)) for a, b, c in map(str.split, done.stdout.splitlines())]


def work_of(launch: dict[str, Any]) -> Work:
    kernel = short_name(launch["kernel"])
    if kernel == "bipartite_scale" and not launch["sectors"]:
        return Work()  # only sums what bipartite_part has found
    return WORK[kernel]


def least_instructions(problem: Problem, launch: dict[str, Any]) -> float:
    """Instructions of all lanes of a launch."""
    kernel, work = short_name(launch["kernel"]), work_of(launch)
    sweeps = problem.num_relaxed if "relaxed" in kernel or "backward" in kernel else 1
    lanes = work.coupling * problem.couplings
    lanes += (work.product * problem.products + work.update * problem.updates) * sweeps
    if kernel == "bipartite":
        tiles, kept_sides = re.findall(r"Li(\d)", launch["kernel"])
        of_product = PRODUCT_FROM_SHARED[int(tiles)] if kept_sides == "0" else PRODUCT_IN_REGISTERS
        lanes += launch["num_ctas"] * launch["products"] * of_product * 32
        alone = problem.couplings == problem.products / 2  # one chain of each model
        of_update = (BIPARTITE_DECISION + (SHIFT if int(tiles) >= 4 else 0)) * (4 if alone else 1) + PHILOX / 16
        is_annealed, sweeps = "kernelILb1" in launch["kernel"], problem.sweeps
        if is_annealed:
            of_update += SOFTPLUS / 2
        elif problem.call == "AIS":
            sweeps = 1  # draws the start
        lanes += problem.updates * sweeps * of_update
    elif kernel == "graph":
        alone = problem.couplings == problem.products / 2
        decision, quad = (GRAPH_DECISION_ALONE, GRAPH_QUAD_ALONE) if alone else (GRAPH_DECISION, GRAPH_QUAD)
        lanes += problem.updates * problem.sweeps * (decision + PHILOX / 16 + quad * problem.quads)
    return lanes


def kernel_bounds(problem: Problem, launch: dict[str, Any], limits: Limits, num_sms: int) -> dict[str, float]:
    """The least seconds of a launch for each resource."""
    clusters = launch["num_ctas"] // launch["cluster_size"]
    on_one_sm = math.ceil(clusters / (num_sms // launch["cluster_size"]))  # a multiprocessor has one CTA of a cluster
    together = min(on_one_sm, launch["ctas_per_sm"])
    waves = math.ceil(on_one_sm / together)
    # A CTA that reads sectors again finds as many of them in L1 as L1 has room for.
    room = max(0, limits.l1_size / together - launch["shared_memory"]) / 32
    different = launch["different_sectors"]
    passes = launch["sectors"] / max(1, different)
    from_l2 = 32 * launch["num_ctas"] * (different + max(0, passes - 1) * max(0, different - room))
    work = work_of(launch)
    moved = work.coupling_bytes * problem.couplings + work.update_bytes * problem.updates
    instructions = least_instructions(problem, launch) / launch["num_ctas"] * on_one_sm
    return {
        "launches": GRAPH_LAUNCH,
        "shared memory": on_one_sm * (launch["wavefronts"] + launch["lines"]) / limits.clock,
        "latency": waves * launch["barriers"] * limits.latency / limits.clock,
        "L2": from_l2 / limits.l2,
        "memory": max(0, moved - limits.l2_size) / limits.memory,
        "tensor cores": on_one_sm * launch["products"] * PRODUCT / limits.tensor / limits.mma / limits.clock,
        "instructions": instructions / LANES / limits.clock,
    }


def bounds(problem: Problem, planned: list[dict[str, Any]], limits: Limits, num_sms: int) -> dict[str, Any]:
    """The least time of a call of gibbs_ext in a CUDA graph, and the resource that bounds it most."""
    seconds: Counter[str] = Counter()
    for launch in planned:
        of_kernel = kernel_bounds(problem, launch, limits, num_sms)
        most = max(of_kernel, key=of_kernel.__getitem__)
        seconds[most] += of_kernel[most]
    return {"seconds": seconds.total(), "bound_by": seconds.most_common(1)[0][0]}


def floor(problem: Problem, limits: Limits, num_sms: int) -> float:
    """The least seconds of any program that makes these updates by these random bits, with couplings of 16 bits.

    It reads parameters and states and writes states and gradients once, multiplies on tensor cores at their full rate,
    adds two couplings of a graph at once, and has the instructions LEAST. A half sweep reads what the last one wrote.
    """
    learns = problem.num_relaxed > 0
    moved = 4 * (problem.couplings * (1 + learns) + 2 * problem.updates)
    lanes = problem.updates * (problem.sweeps * LEAST["binary"] + problem.num_relaxed * LEAST["relaxed"])
    products, slices = 0.0, 2
    if problem.call == "AIS":  # log-weights need all bits, and two softplus of half of the units
        slices = 4
        lanes += problem.updates * problem.sweeps * LEAST["softplus"] / 2
    if problem.quads:
        lanes += problem.products * problem.sweeps / 2
    else:
        products = slices * problem.products * problem.sweeps / limits.tensor / num_sms / limits.clock
        # A relaxed sweep's fields, and the products of its backward pass.
        products += 3 * 2 * problem.products * problem.num_relaxed / limits.flops["TF32"]
    instructions = lanes / LANES / num_sms / limits.clock
    latency = 2 * (problem.sweeps + 2 * problem.num_relaxed) * limits.latency / limits.clock
    return max(moved / limits.memory, products, instructions, GRAPH_LAUNCH + latency)


def peer_bound(peer: dict[Operator, float], limits: Limits, arithmetic: str, launch: float) -> float:
    """The least seconds of plain PyTorch, where L2 holds as much as it can of every tensor."""
    seconds = 0.0
    for x, times in peer.items():
        beyond_l2 = sum(max(0, size - limits.l2_size) for size in x.operands)
        from_l2 = sum(x.operands) + x.gathered
        flops = x.flops / limits.flops[arithmetic]
        seconds += times * max(launch, beyond_l2 / limits.memory, from_l2 / limits.l2, flops)
    return seconds


# The host ----------------------------------------------------------------------------------------------------------


def median_seconds(call: Callable[[], object], calls: int = 50) -> float:
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def host_seconds() -> dict[str, float]:
    """What Python and host code take for a call of gibbs_ext, whose launches do nothing, and for PyTorch's operator."""
    backends.emulated_library()
    found = {}
    for problem in (
        bipartite(2, 1, 4, 4, 2),
        relaxed(2, 4, 2),
        ais(2, 4, 2),
        chimera(1, 2, 2),
        chimera(1, 2, 2, models=True, num_relaxed=1),
    ):
        call = problem.ours(problem.sweeps)
        counters().emulator_count(0)
        try:
            with patch.object(ops, "_call", backends.call_emulated):
                found[problem.call] = min(median_seconds(call) for _ in range(5))
        finally:
            counters().emulator_launches()
    sweeps = 20
    call = bipartite(1, 8, 4, 4, sweeps).peer(sweeps)
    with Operators() as counted:
        call()
    return found | {"operator": min(median_seconds(call) for _ in range(5)) / counted.launches}


# Machine code ------------------------------------------------------------------------------------------------------

CLASSES = {  # classes of SASS instructions by the beginning of an opcode; the first that fits counts
    "convert": "I2F|F2I|I2FP|F2F",
    "shared": "LDS|STS|LDSM|ATOMS",
    "local": "LDL|STL",
    "tensor": "IMMA|HMMA",
    "control": "BRA|BRX|BAR|BSSY|BSYNC|BREAK|CALL|RET|EXIT|WARPSYNC|NOP|VOTE|SHFL|MEMBAR|UCGABAR",
    "global": r"LDG|STG|LD\b|ST\b|ATOMG|RED\b",
    "float": "F(?!L)|D|MUFU",
    "integer": "",
}


def instruction_class(opcode: str) -> str:
    return next(kind for kind, begins in CLASSES.items() if re.match(begins, opcode))


def instructions(text: str) -> list[tuple[int, str, str]]:
    """Reads (address, opcode, operands) from cuobjdump's lines."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_.]*)(.*?);", text)
    return [(int(address, 16), opcode, operands) for address, opcode, operands in lines]


def inner_loop(code: list[tuple[int, str, str]]) -> list[str]:
    """The opcodes of the innermost loop that uses memories and tensor cores most."""
    loops = []
    for address, opcode, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [[opcode for address, opcode, _ in code if begin <= address <= end] for begin, end in innermost]
    asks = ("shared", "tensor", "global")
    return max(bodies, key=lambda body: sum(instruction_class(o) in asks for o in body), default=[])


def instruction_mix(objects: list[str], architecture: str) -> dict[str, dict[str, int]]:
    """The instructions of each kernel's inner loop, by class; empty if there is no cuobjdump."""
    beside = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"  # the place where PyPI's packages put it
    tools = f"{beside}{os.pathsep}{os.environ['PATH']}"
    cuobjdump = shutil.which("cuobjdump", path=tools)
    if cuobjdump is None:
        return {}
    mixes = {}
    for name in objects:
        text = subprocess.run(
            [cuobjdump, "-sass", "-arch", f"sm_{architecture}", name],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PATH": tools},
        ).stdout
        for function in text.split("Function : ")[1:]:
            kinds = Counter(map(instruction_class, inner_loop(instructions(function))))
            mixes[function.split()[0]] = dict(kinds.most_common())
    return mixes


# The report --------------------------------------------------------------------------------------------------------


def short_name(kernel: str) -> str:
    """Shortens bipartite_scale_kernel<float> to "bipartite_scale"."""
    found = re.search(r"\d+([a-z_]+?)(?:_kernel)?(?:I|E|v)", kernel.removeprefix("_ZN5gibbs"))
    return found[1] if found else kernel


def report() -> dict[str, Any]:
    cuda = nvcc.find()
    if cuda is None:
        sys.exit("cuda-report: there is no nvcc in CUDA_HOME/bin or on the PATH, or GIBBS_CUDA=0")
    objects = nvcc.compile_kernels(cuda)
    usage = {(u.kernel, u.architecture): u for u in nvcc.usages(objects)}
    mixes = instruction_mix(objects, "90")
    host = host_seconds()
    cases = []
    for problem in problems():
        peer, halved = count_peer(problem), count_peer(problem, torch.bfloat16)
        devices = {}
        for device, architecture in ARCHITECTURES.items():
            planned, moved = count(problem, device)
            for launch in planned:
                used = usage[launch["kernel"], architecture]
                launch |= {"registers": used.registers, "spilled_bytes": used.spilled_bytes}
            rows = [(device, x["registers"], x["num_threads"], x["shared_memory"]) for x in planned]
            found_rows = occupancies(rows)
            for launch, (ctas_per_sm, _, most_threads) in zip(planned, found_rows, strict=True):
                launch["ctas_per_sm"] = ctas_per_sm
                launch["occupancy"] = ctas_per_sm * launch["num_threads"] / most_threads
            devices[device] = {"launches": planned, "bytes": moved}
            if device in LIMITS:
                limits, num_sms = LIMITS[device], found_rows[0][1]
                found = devices[device]
                found |= {"multiprocessors": num_sms} | bounds(problem, planned, limits, num_sms)
                found["floor"] = floor(problem, limits, num_sms)
                found["eager_seconds"] = max(found["seconds"], host[problem.call] + LAUNCH * len(planned))
                found["peer_eager_seconds"] = peer_bound(peer, limits, "float32", LAUNCH + host["operator"])
                counts = {"float32": peer, "TF32": peer, "bfloat16": halved}
                found["peer_graph_seconds"] = {
                    name: peer_bound(counts[name], limits, name, GRAPH_LAUNCH) for name in limits.flops
                }
        cases.append({"problem": problem.name, "peer_launches": sum(peer.values()), "devices": devices})
        print(describe(cases[-1]), flush=True)
    for kernel, mix in mixes.items():
        print(f"{short_name(kernel)}, inner loop: {', '.join(f'{count} {kind}' for kind, count in mix.items())}")
    if not mixes:
        print("no cuobjdump, no instruction mix: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return {
        "limits": {name: limits._asdict() for name, limits in LIMITS.items()},
        "launch_seconds": {"eager": LAUNCH, "graph": GRAPH_LAUNCH},
        "host_seconds": host,
        "host": cpu_name(),
        "problems": cases,
        "kernels": [u._asdict() for u in usage.values()],
        "inner_loops_sm_90": mixes,
    }


def describe(case: dict[str, Any]) -> str:
    counts = ("wavefronts", "conflicts", "barriers", "lines", "sectors", "products")
    lines = [["", "kernel", "CTAs", "threads", "registers", "spills", "shared", "per SM", "occupancy", *counts]]
    for device, found in case["devices"].items():
        for launch in found["launches"]:
            lines.append(
                [
                    device,
                    short_name(launch["kernel"]),
                    *(str(launch[k]) for k in ("num_ctas", "num_threads", "registers", "spilled_bytes")),
                    f"{launch['shared_memory'] / 1024:.1f} KB",
                    str(launch["ctas_per_sm"]),
                    f"{launch['occupancy']:.0%}",
                    *(f"{launch[k]:.0f}" for k in counts),
                ]
            )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [f"{case['problem']} (counts are of a CTA)"]
    text += ["  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    for device, found in case["devices"].items():
        if "seconds" in found:
            text.append(
                f"  {device}: at least {duration(found['seconds'])} ({found['bound_by']}; floor "
                f"{duration(found['floor'])}), {found['bytes'] / 1e6:.1f} MB; PyTorch {case['peer_launches']:.0f} "
                f"launches, {duration(found['peer_eager_seconds'])}, as a CUDA graph "
                + ", ".join(f"{duration(s)} ({name})" for name, s in found["peer_graph_seconds"].items())
            )
    return "\n".join(text) + "\n"


def table(found: dict[str, Any]) -> str:
    """The table of csrc/cuda/README.md, which has bounds and no measurements."""
    arithmetics = list(LIMITS["H100"].flops)
    head = ["problem", *LIMITS, "because of", "above the floor", "eager", "PyTorch, eager"]
    lines = [[*head, *(f"as a CUDA graph, {name}" for name in arithmetics), "TF32 / ours"]]
    for case in found["problems"]:
        h100 = case["devices"]["H100"]
        peers = h100["peer_graph_seconds"]
        lines.append(
            [
                case["problem"],
                *(duration(case["devices"][name]["seconds"]) for name in LIMITS),
                h100["bound_by"],
                f"{h100['seconds'] / h100['floor']:.1f}x",
                duration(h100["eager_seconds"]),
                duration(h100["peer_eager_seconds"]),
                *(duration(peers[name]) for name in arithmetics),
                f"{peers['TF32'] / h100['seconds']:.1f}x",
            ]
        )
    host = found["host_seconds"]
    measured = ", ".join(f"{duration(host[call])} for {call}" for call in host if call != "operator")
    operator = duration(host["operator"])
    text = f"The host ({found['host']}) took {measured}, and {operator} for an operator of PyTorch."
    return f"{markdown(lines)}\n\n{text}"


def short_table(found: dict[str, Any]) -> str:
    """The table of README: some rows, on an H100."""
    lines = [
        ["on an H100, in a CUDA graph", "at least", "because of", "above the floor", "PyTorch with TF32, at least"]
    ]
    for case in found["problems"]:
        if case["problem"] in SHORT:
            h100 = case["devices"]["H100"]
            above = f"{h100['seconds'] / h100['floor']:.1f}x"
            peer = duration(h100["peer_graph_seconds"]["TF32"])
            lines.append([case["problem"], duration(h100["seconds"]), h100["bound_by"], above, peer])
    return markdown(lines)


def write_tables() -> None:
    found = json.loads(HISTORY.read_text())
    write_part(README, COMMAND, table(found))
    write_part(ROOT / "README.md", COMMAND, short_table(found))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_report", description="Counts what the CUDA kernels do.")
    parser.add_argument(
        "--readme", action="store_true", help="only rewrite the tables of both READMEs from the history"
    )
    args = parser.parse_args()
    if not args.readme:
        found = report()
        write(HISTORY, json.dumps(found, indent=1) + "\n")
        print(f"kept in {HISTORY.relative_to(ROOT)}")
    write_tables()


if __name__ == "__main__":
    main()
