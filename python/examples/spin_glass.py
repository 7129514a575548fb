# SPDX-License-Identifier: Apache-2.0
"""A spin glass on a Chimera graph whose ground state is known, annealed ever more slowly.

The instance is a sum of frustrated loops (Hen, Job, Albash, Ronnow, Troyer, Lidar, Phys. Rev. A 92, 042325, 2015): each
is a closed walk on the graph, and all of its couplings but one agree with one planted state. No state can satisfy all
couplings of a loop, and the planted state violates only one in each, so it is a ground state of every loop and of their
sum. Its energy is the sum over the loops of ``-(length - 2)``.

    python python/examples/spin_glass.py --size 8 --folder runs/spin_glass

writes ``annealing.png``, energy against sweeps with the planted ground state as a line, and ``state.png``, the best
state found. Needs dimod and matplotlib.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import dimod
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

import gibbs_ext as gx
from gibbs_ext.interop.dimod import BlockGibbsSampler
from gibbs_ext.pictures import draw_chimera

SHORTEST_LOOP = 6  # shorter loops, which lie inside a cell, are too easy


def random_loop(neighbors: list[list[int]], random: np.random.Generator) -> list[int]:
    """Nodes of a simple loop, which a random walk closes at its first return; the walk never turns straight back."""
    walk = [int(random.integers(len(neighbors)))]
    position = {walk[0]: 0}
    while True:
        onward = [node for node in neighbors[walk[-1]] if len(walk) < 2 or node != walk[-2]]
        node = int(random.choice(onward))
        if node in position:
            return walk[position[node] :]
        position[node] = len(walk)
        walk.append(node)


def planted_spin_glass(
    graph: gx.ChimeraGraph, num_loops: int, random: np.random.Generator
) -> tuple[dimod.BinaryQuadraticModel, NDArray[np.int8], int]:
    """A model of spins on the graph's nodes, its planted state [N] of -1 and 1, and the energy of that state."""
    neighbors: list[list[int]] = [[] for _ in range(graph.num_nodes)]
    for u, v in graph.edges.tolist():
        neighbors[u].append(v)
        neighbors[v].append(u)
    planted = random.choice(np.array([-1, 1], np.int8), graph.num_nodes)
    bqm = dimod.BinaryQuadraticModel(dict.fromkeys(range(graph.num_nodes), 0.0), {}, "SPIN")
    energy = 0
    for _ in range(num_loops):
        loop = random_loop(neighbors, random)
        while len(loop) < SHORTEST_LOOP:
            loop = random_loop(neighbors, random)
        frustrated = random.integers(len(loop))
        for i, (u, v) in enumerate(zip(loop, loop[1:] + loop[:1], strict=True)):
            agree = -int(planted[u]) * int(planted[v])
            bqm.add_interaction(u, v, -agree if i == frustrated else agree)
        energy -= len(loop) - 2
    return bqm, planted, energy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=8, help="rows and columns of cells (default: %(default)s)")
    parser.add_argument("--loops", type=float, default=0.25, help="loops per unit (default: %(default)s)")
    parser.add_argument("--reads", type=int, default=1000, help="chains (default: %(default)s)")
    parser.add_argument(
        "--sweeps", type=int, default=10_000, help="sweeps of the slowest annealing (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the model and of all chains (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/spin_glass"), help="where the pictures go (default: %(default)s)"
    )
    args = parser.parse_args()
    for option, minimum in (("size", 1), ("reads", 1), ("sweeps", 10)):
        if getattr(args, option) < minimum:
            parser.error(f"--{option} must be at least {minimum}, got {getattr(args, option)}")
    if not 0 < args.loops < math.inf:
        parser.error(f"--loops must be positive and finite, got {args.loops}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must lie in 0 .. 2^32 - 1, got {args.seed}")
    args.folder.mkdir(parents=True, exist_ok=True)

    graph = gx.ChimeraGraph(args.size)
    num_loops = round(args.loops * graph.num_nodes)
    bqm, planted, ground = planted_spin_glass(graph, num_loops, np.random.default_rng(args.seed))
    assert bqm.energy(planted) == ground
    print(f"{graph.num_nodes} spins, {num_loops} loops, planted ground state energy {ground}")

    # 10, 30, 100, 300, ... sweeps
    lengths = [n for k in range(1, 10) for n in (10**k, 3 * 10**k) if n <= args.sweeps]
    energies = []
    best = None
    for num_sweeps in lengths:
        start = time.perf_counter()
        # The couplings are integers, so Gibbs sweeps beyond beta = 3 would hardly change a spin.
        sampleset = BlockGibbsSampler().sample(
            bqm, num_reads=args.reads, num_sweeps=num_sweeps, beta_range=(0.1, 3.0), seed=args.seed
        )
        seconds = time.perf_counter() - start
        energy = sampleset.record.energy
        energies.append(energy)
        if best is None or sampleset.first.energy < best.energy:
            best = sampleset.first
        print(
            f"{num_sweeps:7d} sweeps: mean {energy.mean():9.2f}, best {energy.min():7.0f}, "
            f"ground state in {np.mean(energy == ground):6.1%} of reads, {seconds:.2f} s"
        )
    assert best is not None
    print(f"best found {best.energy:.0f}, {best.energy - ground:.0f} above the planted ground state")

    draw_annealing(args.folder / "annealing.png", lengths, energies, ground, graph)
    spins = torch.tensor([best.sample[unit] for unit in range(graph.num_nodes)])
    # In gibbs_ext a positive coupling favours equal units, in dimod a negative one does.
    coupling = torch.tensor([-4 * bqm.adj[u].get(v, 0.0) for u, v in graph.edges.tolist()])
    title = f"energy {best.energy:.0f} (planted ground state {ground})"
    draw_chimera(graph, spins > 0, args.folder / "state.png", coupling=coupling, frustration=True, title=title)
    print(f"pictures in {args.folder}")


def draw_annealing(
    path: Path, lengths: list[int], energies: list[NDArray[np.float64]], ground: int, graph: gx.ChimeraGraph
) -> None:
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    low, high = np.quantile(energies, (0.1, 0.9), axis=1)
    axes.fill_between(lengths, low, high, alpha=0.2, linewidth=0, label="80% of reads")
    axes.plot(lengths, np.mean(energies, 1), "o-", label="mean of reads")
    axes.plot(lengths, np.min(energies, 1), "s--", label="best read")
    axes.axhline(ground, color="0.2", linewidth=1, label=f"planted ground state, {ground}")
    axes.set(ylabel="energy", title=f"{graph.num_nodes} spins with a planted ground state, {len(energies[0])} reads")
    axes.legend()
    below.plot(lengths, 100 * np.mean(np.array(energies) == ground, 1), "o-")
    below.set(xscale="log", xlabel="sweeps", ylabel="% of reads in\nthe ground state", ylim=(0, None))
    for each in (axes, below):
        each.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
