# SPDX-License-Identifier: Apache-2.0
"""The gradient through relaxed sweeps against the exact one, on machines small enough to enumerate.

A kernel K_theta that makes a Gibbs sweep leaves q_theta unchanged, so that E_q[f] = E_q[K^r f] for r sweeps. Relaxed
sweeps from a sample of q follow theta in K^r, but not in the law of the sample. Their gradient is therefore truncated::

    d/dtheta E_q[K_theta^r f]  with q held fixed   =   d/dtheta (E_q_theta[f] - E_q_theta[K^r f])  with K held fixed

This lacks d/dtheta E_q_theta[K^r f], which falls to 0 as K^r f becomes constant. The relaxation and a sample that is
not from q add biases of their own. REINFORCE is neither truncated nor relaxed.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gibbs_ext as gx

from .config import MAX_SEED, checked
from .directed import all_bits, log_bernoulli
from .runs import atomic_write, blaming

RELAXATIONS = ("pwl", "concrete", "straight_through", "mean_field")
SHARPNESS = {"concrete": 10.0}  # that of the paper; the others have the default, which pwl alone uses
STARTS = ("random", "previous")  # besides exact samples
REINFORCE = "REINFORCE"
GROUP = 8  # samples of one posterior that are each other's baseline in REINFORCE
SPIN_BETA = 2.0
BIAS = 0.5  # standard deviation of a unit's logit if its neighbours are fair
PRIOR_COUPLING = 0.5
HIDDEN, PIXELS = 16, 20  # of the decoder
LARGEST_SIDE = 8
LARGEST_ERROR = 0.3  # a mean with a larger Monte-Carlo error shows no bias
METRICS = {
    "cosine": "cosine",
    "truncated_cosine": "truncated, exact",
    "bias": "relative bias",
    "bias_error": "MC error",
    "truncated_bias": "of the truncation",
    "other_bias": "of the rest",
    "noise": "relative noise",
}
HIDDEN_BY_NOISE = ("cosine", "bias", "other_bias")


@dataclass(frozen=True)
class Problem:
    """A random bipartite machine q_theta, and an integrand f like that of the ELBO.

    theta [..., P] are the outputs of an encoder: biases [n1] and [n2] and couplings J [n1 * n2] of spins at inverse
    temperature SPIN_BETA, which :meth:`machine` reads as :class:`gibbs_ext.nn.BoltzmannPosterior` does.
    """

    left: int
    right: int
    theta: Tensor  # [P]
    previous: Tensor  # [P], parameters that persistent chains have been drawn from
    prior: Tensor  # [P]
    layers: tuple[Tensor, Tensor]  # [n1 + n2, HIDDEN] and [HIDDEN, PIXELS], the decoder
    image: Tensor  # [PIXELS] bits

    @classmethod
    def random(cls, left: int, right: int, coupling: float, drift: float, generator: torch.Generator) -> Problem:
        """A problem whose bit couplings ``2 * SPIN_BETA * J`` have the standard deviation ``coupling``.

        Each parameter of the previous machine is off by ``drift`` times its standard deviation.
        """

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def scale(coupling: float) -> Tensor:
            deviations = torch.tensor([BIAS / SPIN_BETA, coupling / (2 * SPIN_BETA)], dtype=torch.float64)
            return deviations.repeat_interleave(torch.tensor([left + right, left * right]))

        theta, change, prior = (normal(left + right + left * right) for _ in range(3))
        # Layers of this size make pixels that depend on the bits, and fill the tanh.
        inward, outward = normal(left + right, HIDDEN), normal(HIDDEN, PIXELS)
        layers = 2 * inward / math.sqrt(left + right), 2 * outward / math.sqrt(HIDDEN)
        z = torch.rand(left + right, generator=generator, dtype=torch.float64).round()
        image = torch.bernoulli(torch.sigmoid(decode(layers, z)), generator=generator)
        changed = theta + drift * change
        return cls(
            left,
            right,
            scale(coupling) * theta,
            scale(coupling) * changed,
            scale(PRIOR_COUPLING) * prior,
            layers,
            image,
        )

    def machine(self, theta: Tensor) -> gx.BipartiteBoltzmann:
        """The machine over bits of theta [..., P], of batch shape [...]."""
        left, right, couplings = theta.split((self.left, self.right, self.left * self.right), -1)
        weight = 2 * SPIN_BETA * couplings.unflatten(-1, (self.left, self.right))
        return gx.BipartiteBoltzmann(
            SPIN_BETA * left - weight.sum(-1) / 2, SPIN_BETA * right - weight.sum(-2) / 2, weight
        )

    def f(self, z: Tensor, z_mean: Tensor) -> Tensor:
        """``log p(x | z) - E_prior(z) + E_q(z)`` [...] without gradient in E_q's parameters, as in training.

        Args:
            z: Bits, or their relaxation, [..., n1 + n2].
            z_mean: z, whose left units may be replaced by their conditional means, which the energies are linear in.
        """
        energies = self.machine(self.theta).energy(z_mean) - self.machine(self.prior).energy(z_mean)
        return log_bernoulli(decode(self.layers, z), self.image) + energies


def decode(layers: tuple[Tensor, Tensor], z: Tensor) -> Tensor:
    """Logits [..., PIXELS] of a decoder's image, for z [..., n1 + n2]."""
    inward, outward = layers
    return torch.tanh((2 * z - 1) @ inward) @ outward


def exact_gradients(problem: Problem, relaxed_sweeps: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """The gradient [P] of E_q[f] in theta by enumeration, and the truncated one of each number of relaxed sweeps."""
    z = all_bits(problem.left + problem.right).double()
    theta = problem.theta.clone().requires_grad_()
    log_weights = -problem.machine(theta).energy(z)
    q = torch.softmax(log_weights, 0)

    def gradient(values: Tensor) -> Tensor:
        return torch.autograd.grad((q * values).sum(), theta, retain_graph=True)[0]

    table = log_weights.detach().view(2**problem.left, 2**problem.right)
    right_given_left, left_given_right = torch.softmax(table, 1), torch.softmax(table, 0)
    f = problem.f(z, z)
    swept, truncated = f, {}
    for number in range(1, max(relaxed_sweeps) + 1):
        of_right = (left_given_right * swept.view_as(table)).sum(0)
        swept = (right_given_left @ of_right).repeat_interleave(2**problem.right)
        if number in relaxed_sweeps:
            truncated[number] = gradient(f - swept)
    return gradient(f), truncated


def relaxed_gradients(
    problem: Problem, left: Tensor, num_relaxed_sweeps: int, relaxation: str, generator: torch.Generator
) -> Tensor:
    """The gradient [C, P] through relaxed sweeps from each of the states left [C, n1]."""
    theta = problem.theta.repeat(len(left), 1).requires_grad_()
    q = problem.machine(theta)
    left, right, left_mean = gx.bipartite_gibbs_relaxed(
        left, q.left_bias, q.right_bias, q.weight, 0, num_relaxed_sweeps, relaxation=relaxation,
        sharpness=SHARPNESS.get(relaxation, 4.0), generator=generator,
    )  # fmt: skip
    f = problem.f(torch.cat((left, right), -1), torch.cat((left_mean, right), -1))
    return torch.autograd.grad(f.sum(), theta)[0]


def reinforce_gradients(problem: Problem, left: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient [C // GROUP, P] by REINFORCE, from states left [C, n1] that make one binary sweep more.

    A group's estimate is the mean of ``(f(z) - baseline) * d log q(z)``, where the baseline is the mean of f over the
    group's other samples (Kool, van Hoof, Welling 2019). It equals the sample covariance of f and -dE, so that the
    gradient of log Z cancels and is not needed.
    """
    q = problem.machine(problem.theta)
    left = left[: len(left) // GROUP * GROUP]
    sides = gx.bipartite_gibbs(left, q.left_bias, q.right_bias, q.weight, 1, generator=generator)
    z = torch.cat(sides, -1).unflatten(0, (GROUP, -1))
    f = problem.f(z, z)
    advantage = (f - f.mean(0)) * GROUP / (GROUP - 1)  # f minus the mean of the others
    theta = problem.theta.repeat(z.shape[1], 1).requires_grad_()
    surrogate = -(advantage * problem.machine(theta).energy(z)).mean(0)
    return torch.autograd.grad(surrogate.sum(), theta)[0]


def measure(gradients: Tensor, full: Tensor, truncated: Tensor, samples_each: int = 1) -> dict[str, float]:
    """Compares estimates [M, P], each made of ``samples_each`` samples, with the exact gradients [P]: see METRICS.

    The squared length of a mean of M estimates, or of its distance to something, exceeds that of the expectation by
    trace(covariance) / M, which is subtracted.
    """
    mean, trace = gradients.mean(0), gradients.var(0).sum()
    excess, size = trace / len(gradients), full.norm()

    def length(vector: Tensor) -> Tensor:
        return torch.relu(vector.square().sum() - excess).sqrt()

    results = {
        "cosine": (mean @ full / (length(mean).clamp(min=excess.sqrt()) * size)).clamp(-1, 1),
        "truncated_cosine": truncated @ full / (truncated.norm() * size),
        "bias": length(mean - full) / size,
        "bias_error": excess.sqrt() / size,
        "truncated_bias": (truncated - full).norm() / size,
        "other_bias": length(mean - truncated) / size,
        "noise": (samples_each * trace).sqrt() / size,
    }
    return {name: float(value) for name, value in results.items()}


class Case(NamedTuple):
    """What a row of the table is about."""

    coupling: float
    estimator: str  # a relaxation or REINFORCE
    relaxed_sweeps: int  # 0 for REINFORCE
    start: str
    binary_sweeps: int


class Row(NamedTuple):
    case: Case
    means: dict[str, float]  # over machines, by metric; NaN where noise hides it
    errors: dict[str, float]  # standard errors over machines


class Flag(NamedTuple):
    default: Any  # a tuple if there are several values
    low: float
    high: float
    help: str


FLAGS = {
    "left": Flag(6, 1, LARGEST_SIDE, "left units"),
    "right": Flag(6, 1, LARGEST_SIDE, "right units"),
    "couplings": Flag((0.5, 1.0, 2.0, 4.0), 0, 100, "standard deviations of the couplings between bits"),
    "relaxed_sweeps": Flag((1, 2, 5), 1, 100, "numbers of relaxed sweeps"),
    "binary_sweeps": Flag((0, 1, 10, 100), 0, 100_000, "numbers of binary sweeps from random and previous starts"),
    "drift": Flag(0.3, 0, 100, "change of parameters since the previous ones, in their standard deviations"),
    "samples": Flag(40_000, 10 * GROUP, 10_000_000, "samples per machine"),
    "seeds": Flag(8, 3, 1000, "random machines per coupling"),
    "seed": Flag(0, 0, MAX_SEED - 1000, "seed of the first machine"),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/estimator"),
        help="where table and plot are written (default: runs/estimator)",
    )
    parser.add_argument(
        "--relaxations",
        nargs="+",
        choices=RELAXATIONS,
        default=RELAXATIONS,
        help="relaxations (default: all); starts that are not exact have the first",
    )
    for name, flag in FLAGS.items():
        several = isinstance(flag.default, tuple)
        default = " ".join(map(str, flag.default)) if several else flag.default
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(flag.default[0] if several else flag.default),
            nargs="+" if several else None,
            default=flag.default,
            help=f"{flag.help} (default: {default})",
        )


def run(arguments: Mapping[str, Any]) -> None:
    """Makes the table and the plot, writes them into the folder, and prints the table and the files' names.

    Raises:
        ConfigError: A value is out of its range.
        RunError: The folder cannot be written.
    """
    settings = argparse.Namespace(**arguments)
    for name, flag in FLAGS.items():
        value = arguments[name]
        if isinstance(flag.default, tuple):  # each value once, the least first
            hint = type(flag.default[0])
            value = sorted({checked(name, item, hint, flag.low, flag.high) for item in value})
        else:
            value = checked(name, value, type(flag.default), flag.low, flag.high)
        setattr(settings, name, value)
    settings.relaxations = list(dict.fromkeys(settings.relaxations))
    folder = settings.folder
    with blaming(folder, "the folder cannot be written", OSError):
        folder.mkdir(parents=True, exist_ok=True)
    rows = table(settings)
    text = markdown(rows, settings)
    with blaming(folder, "the folder cannot be written", OSError):
        atomic_write(folder / "estimator.md", text.encode())
        atomic_write(folder / "estimator.csv", comma_separated(rows, settings.seeds).encode())
        plot(folder / "estimator.png", rows, settings)
    print(text)
    for kind in ("md", "csv", "png"):
        print(folder / f"estimator.{kind}")


def table(settings: argparse.Namespace) -> list[Row]:
    """All rows: exact samples with each estimator, then other starts with the first relaxation and with REINFORCE."""
    from tqdm import tqdm

    results: dict[Case, list[dict[str, float]]] = {}
    problems = [(seed, coupling) for seed in range(settings.seeds) for coupling in settings.couplings]
    starts = 1 + len(STARTS) * len(settings.binary_sweeps)
    with tqdm(
        total=len(problems) * starts, desc="estimator", unit="start", leave=False, dynamic_ncols=True
    ) as progress:
        for number, coupling in problems:
            # Machines of one seed differ in the size of their couplings alone.
            generator = torch.Generator().manual_seed(settings.seed + number)
            problem = Problem.random(settings.left, settings.right, coupling, settings.drift, generator)
            for case, measured in _cases(problem, coupling, settings, generator):
                if case.estimator == REINFORCE:
                    progress.update()
                results.setdefault(case, []).append(measured)
    rows = []
    for case, machines in results.items():
        columns = {name: torch.tensor([machine[name] for machine in machines]) for name in METRICS}
        means = {name: float(column.mean()) for name, column in columns.items()}
        errors = {name: float(column.std()) / math.sqrt(len(column)) for name, column in columns.items()}
        if means["bias_error"] > LARGEST_ERROR:
            for values in (means, errors):
                values.update(dict.fromkeys(HIDDEN_BY_NOISE, math.nan))
        rows.append(Row(case, means, errors))
    return rows


def _cases(
    problem: Problem, coupling: float, settings: argparse.Namespace, generator: torch.Generator
) -> Iterator[tuple[Case, dict[str, float]]]:
    full, truncated = exact_gradients(problem, settings.relaxed_sweeps)
    q = problem.machine(problem.theta)
    starts = [("exact", 0), *((start, sweeps) for start in STARTS for sweeps in settings.binary_sweeps)]
    for start, binary_sweeps in starts:
        if start == "random":
            shape = settings.samples, settings.left
            left = torch.randint(2, shape, generator=generator, dtype=torch.float64)
        else:
            source = q if start == "exact" else problem.machine(problem.previous)
            left = q.split(gx.exact_samples(source, settings.samples, generator=generator))[0]
        left, _ = gx.bipartite_gibbs(left, q.left_bias, q.right_bias, q.weight, binary_sweeps, generator=generator)
        is_exact = start == "exact"
        for relaxation in settings.relaxations[: None if is_exact else 1]:
            for sweeps in settings.relaxed_sweeps[: None if is_exact else 1]:
                gradients = relaxed_gradients(problem, left, sweeps, relaxation, generator)
                case = Case(coupling, relaxation, sweeps, start, binary_sweeps)
                yield case, measure(gradients, full, truncated[sweeps])
        case = Case(coupling, REINFORCE, 0, start, binary_sweeps)
        yield case, measure(reinforce_gradients(problem, left, generator), full, full, GROUP)


def markdown(rows: Sequence[Row], settings: argparse.Namespace) -> str:
    """The table in Markdown, below a text that explains its columns."""
    names = ["coupling", "estimator", "relaxed sweeps", "start", "binary sweeps", *METRICS.values()]
    lines = [
        f"Gradients of E_q[f] on {settings.seeds} random machines of {settings.left} + {settings.right} units with"
        f" {settings.samples} samples each: mean +- standard error over machines. `coupling` is the standard deviation"
        " of the couplings between bits, 2 t J for spin couplings J at inverse temperature t."
        f" REINFORCE has the mean of f over {GROUP - 1} other samples as its baseline.",
        "",
        "Starts are exact samples, random bits, or exact samples of previous parameters, from which the present ones"
        f" differ by {settings.drift:g} of their standard deviation. Binary sweeps follow, then the relaxed ones.",
        "",
        "`cosine` is that of the estimates' mean with the exact gradient, and `truncated, exact` that of the truncated"
        " gradient, by enumeration. Lengths are relative to the exact gradient's. `relative bias` is the distance of"
        " the mean from the exact gradient; `of the truncation` is that of the truncated gradient, by enumeration;"
        " `of the rest` is the distance of the mean from the truncated gradient, which relaxation and start cause."
        f" The mean has the Monte-Carlo error `MC error`; where that exceeds {LARGEST_ERROR}, - stands for what it"
        " hides. `relative noise` is the root of the trace of one sample's covariance.",
        "",
        f"| {' | '.join(names)} |",
        f"|{'---|' * len(names)}",
    ]
    for case, means, errors in rows:
        values = ["-" if math.isnan(means[name]) else f"{means[name]:.3f} +- {errors[name]:.3f}" for name in METRICS]
        lines.append(f"| {' | '.join([*map(str, case), *values])} |")
    return "\n".join(lines) + "\n"


def comma_separated(rows: Sequence[Row], seeds: int) -> str:
    """The table as CSV, with a column ``<metric>_se`` of standard errors for each metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*Case._fields, "machines", *(column for name in METRICS for column in (name, f"{name}_se"))])
    for case, means, errors in rows:
        writer.writerow([*case, seeds, *(values[name] for name in METRICS for values in (means, errors))])
    return text.getvalue()


def plot(path: Path, rows: Sequence[Row], settings: argparse.Namespace) -> Path:
    """Four panels: bias and noise by relaxed sweeps, bias beside the truncation by relaxation, and bias by start."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    from .pictures import save

    by_case = {row.case: row for row in rows}
    couplings, first, fewest = settings.couplings, settings.relaxations[0], settings.relaxed_sweeps[0]
    colors = colormaps["viridis"].resampled(1 + max(len(settings.relaxed_sweeps), len(couplings)))
    figure = Figure(figsize=(12, 9.5), layout="constrained")
    (by_sweeps, noise), (by_relaxation, by_start) = figure.subplots(2, 2)

    def line(axes: Any, metric: str, cases: Sequence[Case], **style: Any) -> None:
        chosen = [by_case[case] for case in cases]
        values, errors = [row.means[metric] for row in chosen], [row.errors[metric] for row in chosen]
        axes.errorbar(range(len(cases)), values, errors, **{"marker": "o", "markersize": 4, "capsize": 3} | style)

    def exact(estimator: str, sweeps: int) -> list[Case]:
        return [Case(coupling, estimator, sweeps, "exact", 0) for coupling in couplings]

    for number, sweeps in enumerate(settings.relaxed_sweeps):
        color, cases = colors(number), exact(first, sweeps)
        line(by_sweeps, "bias", cases, color=color, label=f"{first}, {sweeps} relaxed")
        truncation: dict[str, Any] = {"linestyle": ":", "marker": None, "label": f"truncation alone, {sweeps} relaxed"}
        line(by_sweeps, "truncated_bias", cases, color=color, **truncation)
        line(noise, "noise", cases, color=color, label=f"{first}, {sweeps} relaxed")
    for axes, metric in ((by_sweeps, "bias"), (noise, "noise")):
        line(axes, metric, exact(REINFORCE, 0), color="tab:red", label=f"REINFORCE, {GROUP - 1} others as baseline")
    extremes = dict.fromkeys((fewest, settings.relaxed_sweeps[-1]))
    for number, relaxation in enumerate(settings.relaxations):
        for sweeps, linestyle in zip(extremes, ("-", "--"), strict=False):  # there may be one number of sweeps
            label = f"{relaxation}, {sweeps} relaxed"
            cases = exact(relaxation, sweeps)
            line(by_relaxation, "other_bias", cases, color=f"C{number}", linestyle=linestyle, label=label)
    for number, coupling in enumerate(couplings):
        for start, linestyle in zip(STARTS, ("-", "--"), strict=True):
            cases = [Case(coupling, first, fewest, start, sweeps) for sweeps in settings.binary_sweeps]
            cases.append(Case(coupling, first, fewest, "exact", 0))
            label = f"coupling {coupling:g}, {start}"
            line(by_start, "bias", cases, color=colors(number), linestyle=linestyle, label=label)

    for axes, title, label in (
        (by_sweeps, "Bias from exact samples", "|mean - exact| / |exact|"),
        (noise, "Noise of one sample, from exact samples", "sqrt(trace of covariance) / |exact|"),
        (by_relaxation, "Bias beside the truncation, from exact samples", "|mean - truncated| / |exact|"),
        (by_start, f"Bias by start ({first}, {fewest} relaxed)", "|mean - exact| / |exact|"),
    ):
        axes.set(title=title, ylabel=label, xlabel="standard deviation of the couplings between bits")
        axes.set_xticks(range(len(couplings)), [f"{coupling:g}" for coupling in couplings])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    for axes in (noise, by_relaxation):
        axes.set_yscale("log")
    # A bias that cannot be told from 0 may have any logarithm.
    by_relaxation.set_ylim(bottom=5e-3)
    ticks = [*map(str, settings.binary_sweeps), "exact"]
    by_start.set_xticks(range(len(ticks)), ticks)
    by_start.set_xlabel("binary sweeps before the relaxed ones")
    figure.suptitle(
        f"Gradient of E_q[f] through relaxed sweeps, on {settings.seeds} random machines of {settings.left} +"
        f" {settings.right} units, {settings.samples} samples each\n"
        "n relaxed: with n relaxed sweeps; bars: standard errors over machines; points hidden by noise are left out"
    )
    return save(path, figure)
