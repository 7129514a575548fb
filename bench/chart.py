# SPDX-License-Identifier: Apache-2.0
"""The bar chart of README: how many times faster than its peers gibbs_ext is, by the figures of bench/history/cpu."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from .harness import HISTORY, OURS
from .texts import ROOT

CHART = ROOT / "docs" / "speed.png"
MODULES = ("bipartite_gibbs", "bipartite_gibbs_relaxed", "graph_gibbs", "graph_gibbs_relaxed", "training_step")
RIVAL = "dwave-samplers"
COLORS = {"the fastest of plain PyTorch and NumPy": "tab:blue", RIVAL: "tab:orange"}


class Row(NamedTuple):
    case: str
    ratios: dict[str, float]  # a key of COLORS: seconds of that peer for one second of ours


def row(result: dict[str, Any]) -> Row:
    seconds = result["seconds"]
    best, rival = COLORS
    peers = {best: result["best_peer"]} | ({rival: rival} if rival in seconds else {})
    return Row(result["case"], {label: round(seconds[peer] / seconds[OURS], 2) for label, peer in peers.items()})


def rows(history: Path = HISTORY) -> list[Row]:
    """Every case that has a peer with one thread; the CPU's first file, if there are several."""
    found = json.loads(min((history / "cpu").glob("*.json")).read_text())
    results = [result for module in MODULES if module in found for result in found[module]["results"]]
    return [row(result) for result in results if "threads" not in result["case"]]


def description(bars: list[Row]) -> str:
    """Stands in the picture's metadata, so that a test sees whether the picture is that of the history."""
    return json.dumps(bars)


def draw(path: Path = CHART) -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    bars = rows()
    figure = Figure(figsize=(8, 0.27 * len(bars) + 1.2), layout="constrained")
    axes = figure.subplots()
    height = 0.38
    for position, (_, ratios) in enumerate(bars):
        for number, (label, ratio) in enumerate(ratios.items()):
            y = position + height * (number - (len(ratios) - 1) / 2)
            axes.barh(y, ratio - 1, height, left=1, color=COLORS[label])  # a logarithmic axis has no 0
            axes.text(ratio * 1.03, y, f"{ratio:.1f}", va="center", fontsize=7)
    axes.set(xscale="log", xlim=(1, 150), xticks=[1, 2, 5, 10, 20, 50, 100], yticks=range(len(bars)))
    axes.set_xticklabels(["1", "2", "5", "10", "20", "50", "100"])
    axes.set_yticklabels([bar.case for bar in bars], fontsize=8)
    axes.minorticks_off()
    axes.invert_yaxis()
    axes.set_xlabel("times faster than (one CPU thread, logarithmic)")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(handles=[Patch(color=color, label=label) for label, color in COLORS.items()], loc="lower right")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Description": description(bars)})
