# SPDX-License-Identifier: Apache-2.0
"""The memory that a call takes: the peak of its resident memory beyond what was there, beside its inputs and outputs.

Each call is made in a fresh process, after a small one that loads everything: `python -m bench.memory CASE CONTENDER`.
"""

import ctypes
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gibbs_ext as gx

from .bipartite_gibbs import draws, one_model_or_many, rand, torch_sweeps
from .bipartite_gibbs_relaxed import torch_relaxed
from .harness import Call, Case, Missing, benchmark_of
from .tables import OURS
from .texts import ROOT

PEER = "PyTorch, rand"
Size = tuple[int, ...]


class Problem(NamedTuple):
    size: Size
    small: Size
    inputs: Callable[..., list[Tensor]]  # of a size; the last one is the weight or coupling
    contenders: dict[str, Callable[..., Any]]  # return outputs


def bipartite(*size: int) -> list[Tensor]:
    return [*draws(*size)]


def needing_grad(*size: int) -> list[Tensor]:
    left, *parameters = draws(*size)
    return [left, *(p.requires_grad_() for p in parameters)]


def our_relaxed(left: Tensor, *parameters: Tensor) -> list[Tensor]:
    flat = one_model_or_many(left, *parameters)
    outputs = gx.bipartite_gibbs_relaxed(*flat, 2, 1, seed=1)
    return [*outputs, *torch.autograd.grad([x.sum() for x in outputs], parameters)]


def their_relaxed(left: Tensor, *parameters: Tensor) -> list[Tensor]:
    outputs = torch_relaxed(left, *parameters, 2, 1, rand)
    return [*outputs, *torch.autograd.grad([x.sum() for x in outputs], parameters)]


def chimera(chains: int, size: int) -> list[Tensor]:
    torch.manual_seed(1)
    graph = gx.ChimeraGraph(size)
    state = torch.randint(2, (chains, graph.num_nodes), dtype=torch.uint8)
    return [state, torch.randn(graph.num_nodes), torch.randn(graph.num_edges)]


def our_graph(state: Tensor, bias: Tensor, coupling: Tensor) -> Tensor:
    graph = gx.ChimeraGraph(round((bias.numel() / 8) ** 0.5))
    return gx.graph_gibbs(state, bias, coupling, graph, 2, seed=1)


BINARY = {
    OURS: lambda *inputs: gx.bipartite_gibbs(*one_model_or_many(*inputs), 2, seed=1),
    PEER: lambda *inputs: torch_sweeps(*inputs, 2, rand),
}
PROBLEMS = {
    "256 models, 400+400, 2 sweeps": Problem((256, 1, 400, 400), (2, 1, 20, 20), bipartite, BINARY),
    "shared weight, 512 chains, 784+500, 2 sweeps": Problem((1, 512, 784, 500), (1, 64, 20, 20), bipartite, BINARY),
    "shared weight, 32768 chains, 784+500, 2 sweeps": Problem((1, 32768, 784, 500), (1, 64, 20, 20), bipartite, BINARY),
    "Chimera C16, 65536 chains, 2 sweeps": Problem((65536, 16), (64, 2), chimera, {OURS: our_graph}),
    "256 models, 400+400, 2 + 1 sweeps and backward": Problem(
        (256, 1, 400, 400), (2, 1, 20, 20), needing_grad, {OURS: our_relaxed, PEER: their_relaxed}
    ),
}


def resident(name: str) -> int:
    """Bytes: VmRSS of now, VmHWM at the peak."""
    (kilobytes,) = re.findall(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(kilobytes) * 1024


def num_bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in ([tensors] if isinstance(tensors, Tensor) else tensors))


def measure(problem: Problem, contender: str) -> dict[str, float]:
    run = problem.contenders[contender]
    run(*problem.inputs(*problem.small))
    inputs = problem.inputs(*problem.size)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not serve the call unseen
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    before, start = resident("VmRSS"), time.perf_counter()
    outputs = run(*inputs)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "additional": resident("VmHWM") - before,
        "inputs": num_bytes(inputs),
        "outputs": num_bytes(outputs),
        "weights": num_bytes(inputs[-1]),
    }


def in_a_process(name: str, contender: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.memory", name, contender]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if "clear_refs" in done.stderr:
        raise Missing("memory: the system does not let a process write /proc/self/clear_refs")
    if done.returncode:
        raise RuntimeError(f"{name}: {contender} failed in a process of its own\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def cases() -> Iterator[Case]:
    for name, problem in PROBLEMS.items():

        def prepare(contender: str, name: str = name) -> Callable[[Any], Call]:
            return lambda inputs: lambda: in_a_process(name, contender)

        yield Case(name, lambda: None, {c: prepare(c) for c in problem.contenders}, tells_figures=True)


memory = benchmark_of(cases, "memory")

if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(PROBLEMS[sys.argv[1]], sys.argv[2])))
