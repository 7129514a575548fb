# SPDX-License-Identifier: Apache-2.0
"""Timing several ways of doing one thing side by side, and keeping the figures."""

import dataclasses
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gibbs_ext

from .texts import PROOF, ROOT, duration, file_name, markdown, write

HISTORY = ROOT / "bench" / "history"
TABLES = ROOT / "bench" / "README.md"
SPEED = "python -m bench --readme"  # the command that writes the tables there, and marks them
OURS = "gibbs_ext"
WITHOUT_SAMPLING = "without sampling"  # not a peer: the rest of a call, with samplers that do nothing


@dataclass
class Case:
    """One task. Each contender is called without arguments, does the whole task and leaves its inputs unchanged."""

    name: str
    contenders: dict[str, Callable[[], object]]  # OURS and its peers
    updates: int | None = None  # updates of units per call; None if the time of a call is shown instead of a rate
    wanted: float | None = None  # the ratio to the best peer that is the goal
    rivals: dict[str, float] = field(default_factory=dict)  # peers that have a row and a goal of their own
    calls: int = 1  # number of times that a contender does the task; figures are those of one time
    is_capturable: bool = True  # whether a CUDA graph can hold the call
    # Samples [n] of some quantities, made from a contender's result; their means must agree with those of OURS.
    statistics: Callable[[Any], Sequence[Tensor]] | None = None


def on_gpu() -> bool:
    """Whether tensors are made on a GPU: `python -m bench --device cuda`."""
    return torch.get_default_device().type == "cuda"


def timed(call: Callable[[], object]) -> tuple[float, object]:
    """The seconds of a call and its result. On a GPU the time ends when the result is there."""
    if on_gpu():
        torch.cuda.synchronize()
    start = time.perf_counter()
    returned = call()
    if on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter() - start, returned


def as_cuda_graph(call: Callable[[], object]) -> Callable[[], object]:
    """Captures a call; the result replays it. Each replay overwrites the results and draws new random numbers."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the first calls compile, and allocate memory that is kept from call to call
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            returned = call()
    except BaseException:
        # A capture that fails leaves its stream current and, in some versions, the random generator capturing.
        torch.cuda.set_stream(current)
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(torch.Generator("cuda").graphsafe_get_state())
        raise

    def replay() -> object:
        graph.replay()
        return returned

    return replay


def as_cuda_graphs(case: Case) -> Case:
    """The case with every contender as a CUDA graph, which leaves out most of the cost of launches."""
    graphs = {}
    for name, call in case.contenders.items():
        try:
            graphs[name] = as_cuda_graph(call)
        except RuntimeError as error:
            if name == OURS:
                raise
            print(f"{case.name}: {name} cannot be captured: {error}", file=sys.stderr)
    return dataclasses.replace(case, name=f"{case.name}, CUDA graphs", contenders=graphs)


def with_cuda_graphs(cases: Iterator[Case]) -> Iterator[Case]:
    for case in cases:
        yield case
        if on_gpu() and case.is_capturable:
            yield as_cuda_graphs(case)
        if on_gpu():
            torch._dynamo.reset()  # torch.compile gives up functions that it has compiled many times


def check_agreement(case: Case, returned: dict[str, object]) -> None:
    """Raises RuntimeError if a peer does other work than OURS. Other kinds of sweeps may differ by 1%."""
    if not case.statistics:
        return
    samples = {name: [x.detach().double() for x in case.statistics(value)] for name, value in returned.items()}
    for name, theirs in samples.items():
        for x, y in zip(theirs, samples[OURS], strict=True):
            error = (x.var() / len(x) + y.var() / len(y)).sqrt()
            # not <=: NaN is no agreement
            if not (x.mean() - y.mean()).abs() <= 5 * error + 0.01 * y.mean().abs():
                raise RuntimeError(f"{case.name}: {name} has a mean of {x.mean():g}, {OURS} {y.mean():g}, +- {error:g}")


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """Medians of 5 rounds or more. A round calls each contender once, so that all of them meet a machine's slow spell.

    A peer is called only once if it takes twice `seconds`, or half a second and thrice the time of the fastest peer.
    """
    returned: dict[str, object] = {}
    times: dict[str, list[float]] = {}
    for name, call in case.contenders.items():
        if on_gpu():
            call()  # the first one compiles
        once, returned[name] = timed(call)
        times[name] = [once]
    check_agreement(case, returned)
    returned.clear()
    fastest = min(t for name, (t,) in times.items() if name != OURS)
    slow = {name for name, (t,) in times.items() if t > 2 * seconds or t > max(0.5, 3 * fastest)}
    repeated = {name: call for name, call in case.contenders.items() if name == OURS or name not in slow}
    times |= {name: [] for name in repeated}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[OURS]) < 5:
        for name, call in repeated.items():
            times[name].append(timed(call)[0])
    medians = {name: statistics.median(values) / case.calls for name, values in times.items()}
    peers = {name: t for name, t in medians.items() if name not in (OURS, WITHOUT_SAMPLING, *case.rivals)}
    best = min(peers, key=peers.__getitem__)
    return {
        "case": case.name,
        "seconds": medians,
        "rounds": len(times[OURS]),
        "updates": case.updates,
        "best_peer": best,
        "ratio": peers[best] / medians[OURS],
        "wanted": case.wanted,
        "rivals": case.rivals,
    }


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        return re.findall(r"model name\s*: (.*)", text)[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def metadata() -> dict[str, Any]:
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if on_gpu() else {}
    return gpu | {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "build": gibbs_ext.build_info(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def history_file() -> Path:
    if on_gpu():
        return HISTORY / file_name(torch.cuda.get_device_name()) / "speed.json"
    return HISTORY / "cpu" / f"{file_name(cpu_name())}.json"


def store(results: dict[str, list[dict[str, Any]]]) -> Path:
    """Replaces the figures of these benchmarks in the file of this device; git keeps the older ones."""
    path = history_file()
    kept = json.loads(path.read_text()) if path.exists() else {}
    about = metadata()
    kept |= {module: {"metadata": about, "results": measured} for module, measured in results.items()}
    write(path, json.dumps(kept, indent=1, default=str) + "\n")
    return path


def speed(result: dict[str, Any], name: str) -> str:
    seconds = result["seconds"][name]
    if result["updates"]:
        per_second = result["updates"] / seconds
        return f"{per_second / 1e9:.3g} G/s" if per_second >= 1e10 else f"{per_second / 1e6:.0f} M/s"
    if WITHOUT_SAMPLING not in result["seconds"]:
        return duration(seconds)
    share = 1 - result["seconds"][WITHOUT_SAMPLING] / seconds
    return f"{seconds * 1e3:.3g} ms, {share:.0%} of it sampling"


def table(results: list[dict[str, Any]]) -> str:
    lines = [["case", OURS, "best peer", "ratio", "wanted"]]
    for result in results:
        for peer, wanted in ((result["best_peer"], result["wanted"]), *result.get("rivals", {}).items()):
            ratio = result["seconds"][peer] / result["seconds"][OURS]
            aim = f"{wanted:g}x" if wanted else ""
            lines.append([result["case"], speed(result, OURS), f"{speed(result, peer)} ({peer})", f"{ratio:.1f}x", aim])
    return markdown(lines)


def readme_table() -> str:
    """The tables of bench/README.md: each device's newest figures. Cases that were measured alike share a table."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(HISTORY.glob("*/*.json")):
        if path.name == PROOF:
            continue
        for module in json.loads(path.read_text()).values():
            about = module["metadata"]
            device = about.get("gpu") or f"{about['cpu']}, {about['threads']} thread"
            heading = f"{device}, PyTorch {about['torch']}, {about['date']}:"
            tables.setdefault(heading, []).extend(module["results"])
    return "\n\n".join(f"{heading}\n\n{table(results)}" for heading, results in tables.items())
