# SPDX-License-Identifier: Apache-2.0
"""The limits of one core, which bench/limits.cpp measures, and the work that a sampler which keeps the contract of
csrc/README.md cannot avoid. Their quotient bounds the time of a call from below.

Work is counted generously, so that the bound holds for any way that is known:
- A sweep needs the first 8 bits of each unit's random word, which Philox makes 128 at once; the others decide one unit
  in 256.
- Couplings and states are read once a call as they come, and states are written. Then
  couplings are integers of 16 bits, in the fastest cache that holds them.
- A unit's field is a sum. With one chain for each model it is kept up to date by the row of each unit that flips, one
  add an element; FLIPS is the share that flips in these cases. With many chains of one model, either bytes are
  multiplied, or sums of a few couplings are looked up in tables, which needs an add for each such sum.
- On a graph each unit needs its couplings once with one chain for each model, and one add or look-up in any case.
- A relaxed sweep and its backward pass read the couplings and write their gradients as float32; their arithmetic is
  left out.
"""

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from statistics import median

from .texts import ROOT

FLIPS, COUPLINGS_OF_SUM = 0.4, 5
Work = dict[str, float]  # numbers of units of work, by the names that limits.cpp prints


def compiler() -> list[str]:
    return os.environ.get("CXX", "g++").split()


@functools.cache
def program() -> str | None:
    """The compiled program, or None if there is no compiler."""
    if not shutil.which(compiler()[0]):
        return None
    out = ROOT / "build" / "limits"
    out.parent.mkdir(exist_ok=True)
    flags = ["-std=c++20", "-O3", "-march=native", "-ffp-contract=off", f"-I{ROOT / 'csrc'}", "-o", str(out)]
    subprocess.run([*compiler(), *flags, str(ROOT / "bench" / "limits.cpp")], check=True)
    return str(out)


def measure() -> dict[str, list[float]]:
    """Samples of each rate, in units of work a second."""
    if not (path := program()):
        return {}
    found: dict[str, list[float]] = json.loads(
        subprocess.run([path], check=True, capture_output=True, text=True).stdout
    )
    return found


def medians(runs: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Of all samples of all runs."""
    return {name: median([x for run in runs for x in run[name]]) for name in runs[0]} if runs else {}


def bound(ways: Sequence[Mapping[str, float]], rates: Mapping[str, float]) -> tuple[float, str]:
    """The least seconds of a call, and the work that takes them. Of each way the largest part counts, because a core
    may do the others meanwhile; of several ways the best."""
    return min(max((amount / rates[name], name) for name, amount in way.items()) for way in ways)


def level(num_bytes: float) -> str:
    """The level of memory that holds so many bytes; processors of which this is not true have smaller caches."""
    sizes = {"L1 bytes": 32 << 10, "L2 bytes": 1 << 20, "L3 bytes": 32 << 20}
    return next((name for name, size in sizes.items() if num_bytes <= size), "memory bytes")


def total(*parts: tuple[str, float]) -> Work:
    found: Work = {}
    for name, amount in parts:
        found[name] = found.get(name, 0) + amount
    return found


def once(chains: float, units: int, couplings: float, backward: bool) -> tuple[tuple[str, float], ...]:
    """The work of a call that does not grow with the binary sweeps: parameters in, states in and out, and what a
    relaxed sweep adds, which is whole random words, relaxed states, means and their gradients."""
    parts = ((couplings, 2 if backward else 1), (chains * units, 5 if backward else 2))
    return (
        *((level(4 * times * numbers), 4 * times * numbers) for numbers, times in parts),
        ("random words", chains * units if backward else 0),
    )


def bipartite(models: int, chains: int, n1: int, n2: int, num_sweeps: int, backward: bool = False) -> list[Work]:
    """`models` models of `chains` chains each; `backward` adds a relaxed sweep and its backward pass."""
    weights, sweeps = n1 * n2, models * chains * num_sweeps
    common = (
        *once(models * chains, n1 + n2, models * weights, backward),
        ("random words", sweeps * (n1 + n2) / 4),
    )
    if chains == 1:
        elements = 2 * FLIPS * weights * sweeps
        return [total(*common, ("int16 adds", elements), (level(4 * weights), 2 * elements))]
    return [
        total(*common, ("int16 adds", 2 * weights * sweeps / COUPLINGS_OF_SUM)),
        total(*common, ("byte multiply-adds", 2 * weights * sweeps)),
    ]


def graph(models: int, chains: int, nodes: int, edges: int, num_sweeps: int, backward: bool = False) -> list[Work]:
    """As bipartite()."""
    sweeps = models * chains * num_sweeps
    common = (*once(models * chains, nodes, models * edges, backward), ("random words", sweeps * nodes / 4))
    if chains == 1:
        # A vector holds a chain in each of 16 lanes, whose couplings stay in a cache from sweep to sweep.
        return [total(*common, ("int16 adds", 2 * edges * sweeps), (level(16 * 2 * edges), 2 * 2 * edges * sweeps))]
    return [total(*common, ("int16 adds", nodes * sweeps))]
