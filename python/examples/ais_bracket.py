# SPDX-License-Identifier: Apache-2.0
"""log Z of restricted Boltzmann machines between two estimates by annealing, with the exact value beside them.

Annealed importance sampling (Neal, Statistics and Computing 11, 125, 2001) errs downwards; run in reverse, from exact
draws of the model, it errs upwards (Grosse, Ghahramani and Adams, arXiv:1511.02543, 2015), and Bennett's acceptance
ratio (J. Comput. Phys. 22, 245, 1976) joins the two. One side of these machines is small enough to enumerate, so that
the errors themselves are known: how large they are, how large the reported ones are, and when the library warns.

    python python/examples/ais_bracket.py --folder runs/ais_bracket

prints the errors for growing couplings and numbers of annealing steps, over independent seeds, and writes
``bracket.png``. Needs matplotlib, pymbar and tqdm.
"""

import argparse
import math
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tqdm import tqdm

import gibbs_ext as gx

ESTIMATES = ("forward", "reverse", "Bennett's")


class Measured(NamedTuple):
    """What S seeds gave; all in nats but the effective sizes."""

    errors: NDArray[np.float64]  # [3, S]: estimate minus exact log Z, in the order of ESTIMATES
    reported: NDArray[np.float64]  # [3, S]: standard errors
    effective: NDArray[np.float64]  # [2, S]: effective sample sizes, forward and reverse
    warned: NDArray[np.bool_]  # [2, S]: whether there was an EffectiveSampleSizeWarning, a BracketWarning

    @property
    def holds(self) -> NDArray[np.bool_]:
        """Whether the exact value lies in the bracket [S], two standard errors allowed at either end."""
        (lower, upper, _), (of_lower, of_upper, _) = self.errors, self.reported
        inside: NDArray[np.bool_] = (lower - 2 * of_lower <= 0) & (upper + 2 * of_upper >= 0)
        return inside


def machine(num_left: int, num_right: int, strength: float, seed: int) -> gx.BipartiteBoltzmann:
    """Couplings are normal, with the standard deviation ``strength``; biases are so that they favour neither value."""
    generator = torch.Generator().manual_seed(seed)
    weight, left, right = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((num_left, num_right), (num_left,), (num_right,))
    )
    weight *= strength
    return gx.BipartiteBoltzmann(left / 2 - weight.sum(1) / 2, right / 2 - weight.sum(0) / 2, weight)


def measure(
    model: gx.BipartiteBoltzmann, exact: float, draws: torch.Tensor, num_steps: int, first_seed: int
) -> Measured:
    """Brackets log Z once for each row of draws [S, C, N]."""
    errors, reported, effective, warned = [], [], [], []
    for number, of_seed in enumerate(draws):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = gx.bracket_log_partition(model, of_seed, num_steps, seed=first_seed + number)
        forward, reverse = result.forward, result.reverse
        errors.append([float(x) - exact for x in (result.lower, result.upper, result.log_partition)])
        reported.append([float(x) for x in (forward.standard_error, reverse.standard_error, result.standard_error)])
        effective.append([float(x.effective_sample_size) for x in (forward, reverse)])
        kinds = [warning.category for warning in caught]
        warned.append([kind in kinds for kind in (gx.EffectiveSampleSizeWarning, gx.BracketWarning)])
    return Measured(*(np.array(rows).T for rows in (errors, reported, effective, warned)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--left", type=int, default=20, help="left units, which are enumerated (default: %(default)s)")
    parser.add_argument("--right", type=int, default=100, help="right units (default: %(default)s)")
    parser.add_argument(
        "--strengths", type=float, nargs="+", default=[0.5, 1.0, 2.0],
        help="standard deviations of the couplings (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[3, 10, 30, 100, 300, 1000, 3000],
        help="numbers of annealing steps (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--chains", type=int, default=100, help="chains in either direction (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=16, help="independent repetitions (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the machines and chains (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/ais_bracket"), help="where the picture goes (default: %(default)s)"
    )
    args = parser.parse_args()
    for option, least, value in (
        ("left", 1, args.left), ("right", 1, args.right), ("steps", 1, min(args.steps)), ("chains", 2, args.chains),
        ("seeds", 2, args.seeds),
    ):  # fmt: skip
        if value < least:
            parser.error(f"--{option} must be at least {least}, got {value}")
    if args.left > 25:
        parser.error(f"--left must be at most 25, which can be enumerated, got {args.left}")
    for strength in args.strengths:
        if not 0 < strength < math.inf:
            parser.error(f"--strengths must be positive and finite, got {strength}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must lie in 0 .. 2^32 - 1, got {args.seed}")
    args.folder.mkdir(parents=True, exist_ok=True)

    lengths, table = sorted(set(args.steps)), {}
    for strength in sorted(set(args.strengths)):
        model = machine(args.left, args.right, strength, args.seed)
        exact = float(gx.exact_log_partition(model))
        print(f"couplings with a standard deviation of {strength:g}: log Z is {exact:.4f}; {args.seeds} seeds")
        draws = gx.exact_samples(model, args.seeds * args.chains, seed=args.seed)
        draws = draws.reshape(args.seeds, args.chains, -1)
        progress = tqdm(lengths, unit="length", leave=False)
        table[strength] = [measure(model, exact, draws, length, args.seed) for length in progress]
        for length, measured in zip(lengths, table[strength], strict=True):
            estimates = ", ".join(
                f"{name} {errors.mean():+.3f} +- {errors.std(ddof=1):.3f} (reported {reported.mean():.3f})"
                for name, errors, reported in zip(ESTIMATES, measured.errors, measured.reported, strict=True)
            )
            sizes = " and ".join(f"{size:.0f}" for size in measured.effective.mean(1))
            of_size, of_bracket = measured.warned.sum(1)
            print(
                f"{length:5d} steps: {estimates}; effective sample size {sizes} of {args.chains}; warned of the size "
                f"{of_size}, of the bracket {of_bracket}; bracket holds {measured.holds.sum()} of {args.seeds}"
            )
    draw(args.folder / "bracket.png", lengths, table, args)
    print(f"picture in {args.folder}")


def draw(path: Path, lengths: list[int], table: dict[float, list[Measured]], args: argparse.Namespace) -> None:
    columns = len(table)
    figure = Figure(figsize=(1.5 + 3.6 * columns, 11), layout="constrained")
    rows = figure.subplots(4, columns, sharex=True, sharey="row", squeeze=False)
    for column, (strength, cells) in zip(rows.T, table.items(), strict=True):
        estimate, error, size, share = column
        errors, reported = (np.stack([getattr(cell, name) for cell in cells]) for name in ("errors", "reported"))
        for i, name in enumerate(ESTIMATES):
            style = {"color": f"C{i}", "marker": "^vo"[i], "markersize": 5}
            x = np.array(lengths) * (0.9, 1.1, 1.0)[i]
            estimate.errorbar(
                x, errors[:, i].mean(-1), errors[:, i].std(-1, ddof=1), linestyle="none", capsize=2, label=name, **style
            )
            error.plot(lengths, np.sqrt((errors[:, i] ** 2).mean(-1)), label=f"{name}, true", **style)
            error.plot(lengths, reported[:, i].mean(-1), f"C{i}--", label=f"{name}, reported")
            if i < 2:
                sizes = np.stack([cell.effective[i] for cell in cells])
                size.errorbar(x, sizes.mean(1), sizes.std(1, ddof=1), linestyle="none", capsize=2, label=name, **style)
        estimate.axhline(0, color="0.2", linewidth=1)
        size.axhline(min(10, args.chains / 4), color="0.2", linestyle=":", label="below: a warning")
        share.plot(lengths, [100 * cell.holds.mean() for cell in cells], "ko-", label="bracket +- 2 errors holds log Z")
        for kind, name, line in ((0, "EffectiveSampleSizeWarning", "C4s-"), (1, "BracketWarning", "C3x--")):
            share.plot(lengths, [100 * cell.warned[kind].mean() for cell in cells], line, label=name)
        estimate.set(xscale="log", title=f"couplings with a standard deviation of {strength:g}")
        estimate.set_yscale("symlog", linthresh=0.1)
        error.set_yscale("log")
        size.set(yscale="log", ylim=(0.9, 1.3 * args.chains))
        share.set(xlabel="annealing steps", ylim=(-4, 104))
        for axes in column:
            axes.grid(alpha=0.3)
    labels = (
        "estimate - exact log Z, nats\n(mean and spread over seeds)",
        "root mean square error,\nmean reported error, nats",
        f"effective sample size\nof {args.chains} chains",
        "% of seeds",
    )
    for axes, label in zip(rows[:, 0], labels, strict=True):
        axes.set_ylabel(label)
        axes.legend(fontsize="x-small")
    figure.suptitle(
        f"log Z of restricted Boltzmann machines of {args.left} + {args.right} units by annealing, {args.seeds} seeds"
    )
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
