# SPDX-License-Identifier: Apache-2.0
"""Timing several ways of doing one thing side by side, and keeping the figures."""

import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gibbs_ext

ROOT = Path(__file__).parents[1]
HISTORY = ROOT / "bench" / "history"
README = ROOT / "README.md"
BEGIN, END = "<!-- begin: python -m bench --readme -->", "<!-- end -->"
OURS = "gibbs_ext"
WITHOUT_SAMPLING = "without sampling"  # no peer: what is left of a call when samplers cost nothing


@dataclass
class Case:
    """One task. Each contender is called without arguments, does all of it and leaves its inputs as they were."""

    name: str
    contenders: dict[str, Callable[[], object]]  # OURS and its peers
    updates: int | None = None  # variable updates a call; None where a call counts as a whole
    wanted: float | None = None  # how many times faster than the best peer
    rivals: dict[str, float] = field(default_factory=dict)  # peers with a row, and a wanted ratio, of their own
    # Samples [n] of some quantities, from what a contender returned; their means must agree with those of OURS
    statistics: Callable[[Any], Sequence[Tensor]] | None = None


def check_agreement(case: Case, returned: dict[str, object]) -> None:
    """That peers do the same work. 1% is left to other kinds of sweeps, which anneal otherwise."""
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
    """Medians of 5 rounds or more. A round calls each contender once: a slow spell of the machine meets all of them.

    But a peer that takes twice `seconds`, or half a second and thrice the fastest peer's time, is called only once.
    """
    returned: dict[str, object] = {}
    times: dict[str, list[float]] = {}
    for name, call in case.contenders.items():
        start = time.perf_counter()
        returned[name] = call()
        times[name] = [time.perf_counter() - start]
    check_agreement(case, returned)
    returned.clear()
    fastest = min(t for name, (t,) in times.items() if name != OURS)
    slow = {name for name, (t,) in times.items() if t > 2 * seconds or t > max(0.5, 3 * fastest)}
    repeated = {name: call for name, call in case.contenders.items() if name == OURS or name not in slow}
    times |= {name: [] for name in repeated}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[OURS]) < 5:
        for name, call in repeated.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
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
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "build": gibbs_ext.build_info(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def history_file() -> Path:
    return HISTORY / "cpu" / f"{re.sub(r'[^a-z0-9]+', '-', cpu_name().lower()).strip('-')}.json"


def store(results: dict[str, list[dict[str, Any]]]) -> Path:
    """Replaces these modules in this CPU's file; git keeps the older ones."""
    path = history_file()
    kept = json.loads(path.read_text()) if path.exists() else {}
    about = metadata()
    kept |= {module: {"metadata": about, "results": measured} for module, measured in results.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1, default=str) + "\n")
    return path


def speed(result: dict[str, Any], name: str) -> str:
    seconds = result["seconds"][name]
    if result["updates"]:
        return f"{result['updates'] / seconds / 1e6:.0f} M/s"
    if WITHOUT_SAMPLING not in result["seconds"]:
        return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
    share = 1 - result["seconds"][WITHOUT_SAMPLING] / seconds
    return f"{seconds * 1e3:.3g} ms, {share:.0%} of it sampling"


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table with its columns aligned."""
    lines = [["case", OURS, "best peer", "ratio", "wanted"]]
    for result in results:
        for peer, wanted in ((result["best_peer"], result["wanted"]), *result.get("rivals", {}).items()):
            ratio = result["seconds"][peer] / result["seconds"][OURS]
            aim = f"{wanted:g}x" if wanted else ""
            lines.append([result["case"], speed(result, OURS), f"{speed(result, peer)} ({peer})", f"{ratio:.1f}x", aim])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rows[1:]])


def readme_table() -> str:
    """What README says of speed: the newest figures kept for each CPU. What was measured alike shares a table."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((HISTORY / "cpu").glob("*.json")):
        for module in json.loads(path.read_text()).values():
            about = module["metadata"]
            heading = f"{about['cpu']}, {about['threads']} thread, PyTorch {about['torch']}, {about['date']}:"
            tables.setdefault(heading, []).extend(module["results"])
    return "\n\n".join(f"{heading}\n\n{table(results)}" for heading, results in tables.items())


def write_readme() -> None:
    text = README.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{readme_table()}\n{END}{after}")
