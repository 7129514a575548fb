# SPDX-License-Identifier: Apache-2.0
"""The bar chart of README: how many times faster than its peers gibbs_ext is, by the figures of bench/history/cpu."""

import json
from pathlib import Path
from typing import NamedTuple

from . import tables
from .texts import ROOT

CHART = ROOT / "docs" / "speed.png"
COLORS = dict(zip(tables.PEERS, (f"C{number}" for number in (0, 9, 2, 1, 5, 3, 4, 6)), strict=False))
LEFT_OUT = ("graph_building", "call_cost", "memory")


class Row(NamedTuple):
    case: str
    ratios: dict[str, float]  # of each peer: its time for one second of ours


def rows() -> list[Row]:
    found = [group for group in tables.cpu_groups() if group.op not in LEFT_OUT]
    return [
        Row(group.case, {peer: round(ratio, 2) for peer, ratio in group.peers().items()})
        for group in found
        if group.peers()
    ]


def description(bars: list[Row]) -> str:
    """Stands in the picture's metadata, so that a test sees whether the picture is that of the history."""
    return json.dumps(bars)


def draw(path: Path = CHART) -> None:
    """A bar reaches to the fastest peer, whose ratio stands at the right; points are all peers."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    bars = rows()
    figure = Figure(figsize=(8, 0.25 * len(bars) + 1.3), layout="constrained")
    axes = figure.subplots()
    for y, (_, ratios) in enumerate(bars):
        fastest = min(ratios, key=ratios.__getitem__)
        # A logarithmic axis has no 0.
        axes.barh(y, ratios[fastest] - 1, 0.7, left=1, color=COLORS[fastest], alpha=0.55)
        axes.text(370, y, f"{ratios[fastest]:.1f}", va="center", ha="right", fontsize=7)
        for peer, ratio in ratios.items():
            axes.plot(ratio, y, "o", color=COLORS[peer], markersize=5)
    axes.set(
        xscale="log",
        xlim=(min(1, 0.9 * min(min(bar.ratios.values()) for bar in bars)), 400),
        xticks=[1, 2, 5, 10, 20, 50, 100, 200],
        yticks=range(len(bars)),
    )
    axes.set_xticklabels(["1", "2", "5", "10", "20", "50", "100", "200"])
    axes.set_yticklabels([bar.case for bar in bars], fontsize=8)
    axes.minorticks_off()
    axes.invert_yaxis()
    axes.set_xlabel("how many times the time of gibbs_ext (one thread, logarithmic)")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    shown = [peer for peer in COLORS if any(peer in bar.ratios for bar in bars)]
    handles = [Line2D([], [], marker="o", linestyle="", color=COLORS[peer], label=peer) for peer in shown]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(shown), fontsize=8, frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Description": description(bars)})
