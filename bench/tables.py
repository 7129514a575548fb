# SPDX-License-Identifier: Apache-2.0
"""The figures that are kept, in pytest-benchmark's own format, and the tables that are made of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .texts import HISTORY, PROOF, ROOT, duration, file_name, markdown, write, write_part

COMMAND = "make bench"  # writes the tables, and marks them
README, ALL = ROOT / "README.md", ROOT / "bench" / "README.md"
OURS = "gibbs_ext"
TWO_THREADS = f"{OURS}, 2 threads"
PLAIN_SWEEPS = "plain sweeps"  # of as many chains: ours as well, but what a call that does more is compared with
WITHOUT_SAMPLING = "without sampling"  # not a peer: the rest of a call, with samplers that do nothing
# The modules of benchmarks, in the order of the tables.
NAMES = (
    "bipartite_gibbs",
    "bipartite_gibbs_relaxed",
    "graph_gibbs",
    "graph_gibbs_relaxed",
    "chains",
    "log_partition",
    "graph_building",
    "training_epoch",
    "interop_sklearn",
    "training_step",
    "call_cost",
    "memory",
)
# Columns of peers; a contender belongs to that whose name it has before the first comma.
PEERS = (
    "PyTorch",
    "torch.compile",
    "NumPy",
    "scikit-learn",
    "rbms",
    "thrml",
    "dwave-samplers",
    "networkx",
    PLAIN_SWEEPS,
)
# Rows of README.md.
CHOSEN = (
    "bipartite_gibbs: 128 models, 100+100, 50 sweeps",
    "bipartite_gibbs: 128 models, 200+200, 50 sweeps",
    "bipartite_gibbs: shared weight, 1024 chains, 200+200, 100 sweeps",
    "bipartite_gibbs: shared weight, 512 chains, 784+500, 10 sweeps",
    "bipartite_gibbs_relaxed: 128 models, 200+200, 40 + 1 sweeps and backward",
    "graph_gibbs: Chimera C16, 1024 chains, 100 sweeps",
    "graph_gibbs: Chimera C16, 1024 chains, annealed over 100 betas",
    "graph_gibbs: Pegasus P6, 256 chains, 100 sweeps",
    "graph_gibbs: Chimera C8, 128 models, 100 sweeps",
)


class Group(NamedTuple):
    """A case of a benchmark, as it was measured."""

    op: str
    case: str
    heading: str  # the machine and the day
    seconds: dict[str, float]  # of each contender
    about: dict[str, Any]  # extra_info of gibbs_ext
    figures: dict[str, dict[str, float]]  # of memory, of each contender

    def peers(self) -> dict[str, float]:
        """For each column of PEERS that has contenders here: the time of the fastest for one second of gibbs_ext."""
        found: dict[str, float] = {}
        for name, seconds in self.seconds.items():
            if (column := name.split(",")[0]) in PEERS:
                found[column] = min(found.get(column, float("inf")), seconds / self.seconds[OURS])
        return found


def history_file(machine_info: dict[str, Any]) -> Path:
    if "gpu" in machine_info:
        return HISTORY / file_name(machine_info["gpu"]) / "speed.json"
    return HISTORY / "cpu" / f"{file_name(machine_info['cpu_name'])}.json"


def keep(run: dict[str, Any]) -> Path:
    """Puts a run of pytest-benchmark, without raw data, into the file of its machine, and keeps groups that it lacks.
    A group counts if gibbs_ext was measured in it, because ratios hold within a run only. Git keeps older figures."""
    path = history_file(run["machine_info"])
    groups: dict[str, list[dict[str, Any]]] = {}
    before = json.loads(path.read_text()) if path.exists() else {"benchmarks": []}
    if before["benchmarks"] and not run["machine_info"].get("limits"):  # no group of this run needed them
        run["machine_info"]["limits"] = before["machine_info"].get("limits", {})
    for benchmark in before["benchmarks"]:
        groups.setdefault(benchmark["group"], []).append(benchmark)
    measured = {b["group"]: [] for b in run["benchmarks"] if b["params"]["contender"] == OURS}
    for benchmark in run["benchmarks"]:
        if benchmark["group"] in measured:
            stats = {key: value for key, value in benchmark["stats"].items() if key != "data"}
            measured[benchmark["group"]].append(benchmark | {"stats": stats})
    groups |= measured
    kept = run | {"benchmarks": [benchmark for group in groups.values() for benchmark in group]}
    write(path, json.dumps(kept, indent=1) + "\n")
    return path


def groups(paths: Sequence[Path] | None = None) -> list[Group]:
    """Those of all machines, or of these files, in the order of NAMES."""
    found: dict[tuple[Path, str], Group] = {}
    for path in sorted(HISTORY.glob("*/*.json")) if paths is None else paths:
        if path.name == PROOF:
            continue
        run = json.loads(path.read_text())
        device = run["machine_info"].get("gpu") or f"{run['machine_info']['cpu_name']}, 1 thread"
        for benchmark in run["benchmarks"]:
            op, case = benchmark["group"].split(": ", 1)
            name, about = benchmark["params"]["contender"], benchmark["extra_info"]
            heading = f"{device}, PyTorch {about['torch']}, {about['date']}:"
            group = found.setdefault((path, benchmark["group"]), Group(op, case, heading, {}, {}, {}))
            group.seconds[name] = benchmark["stats"]["median"]
            group.figures[name] = about.get("figures", {})
            if name == OURS:
                group.about.update(about)
    return sorted(found.values(), key=lambda group: NAMES.index(group.op))


def speed(group: Group, name: str) -> str:
    seconds = group.seconds[name]
    if group.about.get("updates"):
        per_second = group.about["updates"] / seconds
        return f"{per_second / 1e9:.3g} G/s" if per_second >= 1e10 else f"{per_second / 1e6:.0f} M/s"
    if WITHOUT_SAMPLING not in group.seconds:
        return duration(seconds)
    return f"{duration(seconds)}, {1 - group.seconds[WITHOUT_SAMPLING] / seconds:.0%} of it sampling"


def times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio < 9.95 else f"{ratio:.0f}x"


def table(groups: Sequence[Group]) -> str:
    """One row a case; columns that would be empty are left out."""
    rows = []
    for group in groups:
        row = {"case": group.case, OURS: speed(group, OURS)}
        if TWO_THREADS in group.seconds:
            row["2 threads"] = times(group.seconds[OURS] / group.seconds[TWO_THREADS])
        row |= {peer: times(ratio) for peer, ratio in group.peers().items()}
        if "bound" in group.about:
            row["bound"] = f"{duration(group.about['bound'])} ({group.about['bound_by']})"
            row["reached"] = f"{group.about['bound'] / group.seconds[OURS]:.0%}"
        rows.append(row)
    columns = [c for c in ("case", OURS, "2 threads", *PEERS, "bound", "reached") if any(c in row for row in rows)]
    return markdown([columns, *([row.get(column, "") for column in columns] for row in rows)])


def memory_table(groups: Sequence[Group]) -> str:
    """What a call takes beyond its inputs, over inputs and outputs; a peer's beside it."""
    rows = [["memory of a call", "inputs and outputs", "of these, weights", OURS, "PyTorch"]]
    for group in groups:
        figures = group.figures[OURS]
        sizes = [figures["inputs"] + figures["outputs"], figures["weights"]]
        ratios = [f"{f['additional'] / (f['inputs'] + f['outputs']):.2f}x" for f in group.figures.values()]
        rows.append([group.case, *(f"{size / 1e6:.0f} MB" for size in sizes), *ratios, *[""] * (2 - len(ratios))])
    return markdown(rows)


def all_tables(found: Sequence[Group]) -> str:
    """A table for each op; those that were measured on one machine and day share a heading."""
    parts: dict[str, dict[str, list[Group]]] = {}
    for group in found:
        parts.setdefault(group.heading, {}).setdefault(group.op, []).append(group)
    texts = []
    for heading, ops in parts.items():
        texts += [heading, *(memory_table(of) if op == "memory" else table(of) for op, of in ops.items())]
    return "\n\n".join(texts)


def short_table(found: Sequence[Group]) -> str:
    """The chosen cases, of one machine."""
    chosen = {f"{group.op}: {group.case}": group for group in found}
    return table([chosen[name] for name in CHOSEN if name in chosen])


def cpu_groups() -> list[Group]:
    """The CPU's first file, if there are several."""
    return groups(sorted((HISTORY / "cpu").glob("*.json"))[:1])


def write_tables() -> None:
    write_part(ALL, COMMAND, all_tables(groups()))
    write_part(README, COMMAND, short_table(cpu_groups()))
