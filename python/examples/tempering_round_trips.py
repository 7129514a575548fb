# SPDX-License-Identifier: Apache-2.0
"""Parallel tempering of a machine with two modes: how replicas travel on an even and on a tuned ladder.

All couplings of the machine are equal and favour all ones or all zeros; a small bias makes all ones more probable.
Gibbs sweeps never lead from one mode to the other. Replicas that travel between beta = 0 and beta = 1 do (Hukushima and
Nemoto, J. Phys. Soc. Jpn. 65, 1604, 1996), the more often, the more evenly neighbouring betas of the ladder exchange
them. Few left units make the weights of both modes known exactly.

    python python/examples/tempering_round_trips.py --folder runs/tempering_round_trips

prints swap rates, round trips and the share of all ones, and writes ``ladder.png`` (the swap rates and the round trips
of both ladders), ``replicas.png`` (the paths of replicas) and ``modes.png`` (the modes that chains visit). Needs
matplotlib and tqdm.
"""

import argparse
import math
import sys
import warnings
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import gibbs_ext as gx

GROUPS = 8  # of chains, whose differences give standard errors
DRAWS = 100  # states of each chain whose modes are looked at


def machine(num_left: int, num_right: int, weight: float, tilt: float) -> gx.BipartiteBoltzmann:
    """All couplings are ``weight``; with a tilt of 0, all ones and all zeros would be equally probable."""
    weights = torch.full((num_left, num_right), weight, dtype=torch.float64)
    return gx.BipartiteBoltzmann(tilt - weights.sum(1) / 2, tilt - weights.sum(0) / 2, weights)


def is_up(model: gx.BipartiteBoltzmann, z: Tensor) -> Tensor:
    """Which states z [..., N] are in the mode of ones: [...], true where most of the left units are 1."""
    return model.split(z)[0].mean(-1) > 0.5


def exact_share(model: gx.BipartiteBoltzmann) -> float:
    """The probability of the mode of ones, by enumeration of the left units."""
    left = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=model.dtype)] * model.num_left)
    return float((-model.free_energy(left)).softmax(0)[left.mean(-1) > 0.5].sum())


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Over the last dim, independent groups."""
    return values.mean(-1), values.std(-1) / values.shape[-1] ** 0.5


def ideal_round_trips(swap_rates: Tensor) -> float:
    """Round trips of a chain in each round, if each sweep made all energies independent of the last ones; swap_rates
    [B - 1] (Syed, Bouchard-Cote, Deligiannidis and Doucet, J. R. Stat. Soc. B 84, 321, 2022)."""
    return float(1 / (2 + 2 * ((1 - swap_rates) / swap_rates).sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--left", type=int, default=11, help="left units, an odd number (default: %(default)s)")
    parser.add_argument("--right", type=int, default=100, help="right units (default: %(default)s)")
    parser.add_argument("--weight", type=float, default=1.0, help="each coupling (default: %(default)s)")
    parser.add_argument("--tilt", type=float, default=0.015, help="bias towards ones (default: %(default)s)")
    parser.add_argument("--betas", type=int, default=10, help="betas of each ladder (default: %(default)s)")
    parser.add_argument("--chains", type=int, default=64, help=f"chains, a multiple of {GROUPS} (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3000, help="sweeps of each replica (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all chains (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/tempering_round_trips"),
        help="where the pictures go (default: %(default)s)",
    )  # fmt: skip
    args = parser.parse_args()
    for option, least in (("left", 3), ("right", 1), ("betas", 2), ("chains", GROUPS), ("rounds", DRAWS)):
        if getattr(args, option) < least:
            parser.error(f"--{option} must be at least {least}, got {getattr(args, option)}")
    if args.left % 2 == 0 or args.left > 19:
        parser.error(f"--left must be odd, and at most 19, which can be enumerated, got {args.left}")
    if args.chains % GROUPS:
        parser.error(f"--chains must be a multiple of {GROUPS}, got {args.chains}")
    for option in ("weight", "tilt"):
        if not 0 <= getattr(args, option) < math.inf:
            parser.error(f"--{option} must be at least 0 and finite, got {getattr(args, option)}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must lie in 0 .. 2^32 - 1, got {args.seed}")
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    model = machine(args.left, args.right, args.weight, args.tilt)
    share = exact_share(model)
    even = torch.linspace(0, 1, args.betas, dtype=torch.float64)
    ladders = {"even": even, "tuned": gx.tune_ladder(model, even)}
    groups = model.expand((GROUPS,))
    num_chains = args.chains // GROUPS
    print(f"{args.left} + {args.right} units; the mode of ones has the weight {share:.4f}")

    runs = {
        name: gx.parallel_tempering(groups, num_chains, ladder, args.rounds, seed=args.seed, progress=True)
        for name, ladder in ladders.items()
    }
    trips = {name: run.round_trips / num_chains / args.rounds for name, run in runs.items()}
    for name, run in runs.items():
        rates = run.swap_rates.mean(-1)
        mean, error = mean_and_error(1000 * trips[name])
        print(f"{name} ladder: betas {' '.join(f'{beta:.3f}' for beta in run.betas)}")
        print(f"{name} ladder: swap rates {' '.join(f'{rate:.3f}' for rate in rates)}")
        print(
            f"{name} ladder: {mean:.2f} +- {error:.2f} round trips of each chain in 1000 rounds "
            f"({1000 * ideal_round_trips(rates):.2f} if energies became independent in each)"
        )

    # Each plain chain makes as many sweeps as all replicas of a tempered chain together.
    plain = gx.PersistentChains(num_chains, groups)
    plain.advance_(groups, args.rounds * args.betas)
    every, after = args.rounds // DRAWS, dict(runs)
    visited: dict[str, list[Tensor]] = {name: [] for name in ("plain", *runs)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gx.TemperingWarning)  # The long runs above have warned of gaps.
        for _ in tqdm(range(DRAWS), desc="modes", unit="draw"):
            visited["plain"].append(is_up(groups, plain.advance_(groups, every * args.betas)))
            for name, ladder in ladders.items():
                after[name] = gx.parallel_tempering(
                    groups, num_chains, ladder, every, initial=after[name], seed=args.seed
                )
                visited[name].append(is_up(groups, after[name].samples))
    modes = {name: torch.stack(draws).flatten(1).double() for name, draws in visited.items()}  # [DRAWS, chains]
    for name, mode in modes.items():
        mean, error = mean_and_error(mode.mean(0))
        # Replicas of different modes that exchange their betas without a round trip change the mode, too.
        changes = float(mode.diff(dim=0).abs().sum()) / args.chains
        print(
            f"{name} chains: share of ones {mean:.4f} +- {error:.4f} (exact {share:.4f}), {changes:.1f} changes of mode"
        )
    draw_ladders(args.folder / "ladder.png", runs, trips)
    draw_replicas(args.folder / "replicas.png", runs, 500)
    draw_modes(args.folder / "modes.png", modes, every, share)
    print(f"pictures in {args.folder}")


def draw_ladders(path: Path, runs: dict[str, gx.TemperingResult], trips: dict[str, Tensor]) -> None:
    figure = Figure(figsize=(9, 4), layout="constrained")
    rates, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    for i, (name, run) in enumerate(runs.items()):
        middle, half = (run.betas[1:] + run.betas[:-1]) / 2, run.betas.diff() / 2
        mean, error = mean_and_error(run.swap_rates)
        rates.errorbar(middle, mean, error, half, fmt="os"[i], color=f"C{i}", markersize=4, label=f"{name} ladder")
        mean, error = mean_and_error(1000 * trips[name])
        ideal = 1000 * ideal_round_trips(run.swap_rates.mean(-1))
        bars.bar(i, float(mean), yerr=float(error), color=f"C{i}", width=0.6, capsize=4)
        bars.plot([i - 0.4, i + 0.4], [ideal, ideal], "k--", label="if energies became independent" if i == 0 else None)
    rates.set(xlabel="beta (bars reach from one beta to the next)", ylabel="probability of a swap", ylim=(0, 1))
    rates.set_title("Swaps between neighbouring betas")
    bars.set(xticks=range(len(runs)), xticklabels=[f"{name} ladder" for name in runs])
    bars.set(ylabel="round trips of a chain in 1000 rounds", title="Round trips, beta = 0 to 1 and back")
    bars.margins(y=0.2)  # room for the legend
    for axes, place in ((rates, "upper center"), (bars, "upper left")):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc=place)
    figure.savefig(path, dpi=120)


def draw_replicas(path: Path, runs: dict[str, gx.TemperingResult], num_rounds: int) -> None:
    """The way of each replica of the first chain through the ladder, in the last rounds."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (name, run) in zip(figure.subplots(2, sharex=True), runs.items(), strict=True):
        at = run.replicas[-num_rounds:, :, 0, 0].argsort(1)  # [rounds, B]: the number of the beta of each replica
        rounds = range(len(run.replicas) - len(at), len(run.replicas))
        axes.plot(rounds, at, color="0.8", linewidth=0.6)
        for i, replica in enumerate((0, len(run.betas) // 2)):
            axes.plot(rounds, at[:, replica], color=f"C{3 * i}", linewidth=1.2)
        axes.set(
            xlim=(rounds[0], rounds[-1]),
            yticks=range(len(run.betas)),
            yticklabels=[f"{beta:.3f}" for beta in run.betas],
            ylabel="beta",
        )
        axes.set_title(f"{name} ladder: paths of the {len(run.betas)} replicas of one chain, two of them in colour")
    axes.set(xlabel="round (a sweep of each replica, then swaps)")
    figure.savefig(path, dpi=120)


def draw_modes(path: Path, modes: dict[str, Tensor], every: int, share: float) -> None:
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplot_mosaic([list(modes), ["share"] * len(modes)], height_ratios=(3, 2))
    titles = {"plain": "plain chains", "even": "tempered, even ladder", "tuned": "tempered, tuned ladder"}
    for i, (name, mode) in enumerate(modes.items()):
        end = len(mode) * every
        axes[name].imshow(
            mode.T, cmap="cividis", aspect="auto", interpolation="none", extent=(0, end, 0, mode.shape[1])
        )
        axes[name].set(
            title=titles[name], xticks=(0, end // 2, end), xlabel="round", ylabel="chain" if i == 0 else None
        )
        x = [(draw + 1) * every for draw in range(len(mode))]
        axes["share"].plot(x, mode.mean(1), color=("0.5", "C0", "C1")[i], label=titles[name])
    axes["share"].axhline(share, color="k", linestyle="--", label=f"exact, {share:.3f}")
    axes["share"].set(xlabel="round", ylabel="share of chains\nin the mode of ones", xlim=(0, x[-1]), ylim=(0, 1))
    axes["share"].legend(ncols=4, fontsize="small", loc="lower right")
    axes["share"].grid(alpha=0.3)
    figure.suptitle("Modes that chains visit at beta = 1: ones (yellow) and zeros (blue)")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
