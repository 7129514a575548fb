# SPDX-License-Identifier: Apache-2.0
"""Toys: small models whose posteriors are known, so that KL(q(z | x) || p(z | x)) is exact.

The latents are 6 + 6 bits. A decoder and a factorial prior are given and fixed; only an encoder and a posterior are
trained, with the objective of :class:`.vae.VAE`, on inputs that the model itself draws. All 4096 states are then
enumerated for inputs that were held out.
"""

from __future__ import annotations

import csv
import io
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .compare import die_with_parent, mean_and_error
from .config import Config
from .directed import DirectedPosterior, all_bits, log_bernoulli
from .feed import learning_rate, term_weight
from .runs import atomic_write, blaming
from .vae import VAE

SIDE = 6  # latent bits on each side
TRAINING, HELD_OUT = 10_000, 1000  # numbers of inputs
PART = 100  # number of held-out inputs whose posteriors are enumerated together


class Model(NamedTuple):
    """A fixed p(x | z) p(z) with binary x, whose bits are independent given z."""

    decoder: Callable[[Tensor], Tensor]  # z [..., 12], bits or relaxed, -> logits of x [..., inputs]
    prior: Tensor  # [12] logits of z


def xor_pairs(generator: Generator) -> Model:
    """x_i is left_i XOR right_i, flipped in one case of ten. Each pair's posterior has two modes of equal weight."""
    flip = math.log(0.9 / 0.1)
    return Model(lambda z: -flip * (2 * z[..., :SIDE] - 1) * (2 * z[..., SIDE:] - 1), torch.zeros(2 * SIDE))


def noisy_or(generator: Generator) -> Model:
    """Each of 24 effects has 30% of the causes, each of which brings it about with probability 0.8; a leak with 0.05.

    Causes are on with probability 0.27, and compete to explain an effect.
    """
    is_cause = (torch.rand(2 * SIDE, 24, generator=generator) < 0.3).float()
    weight, leak = -math.log(0.2) * is_cause, -math.log(0.95)
    # p(x = 0) = exp(-leak - z weight), so that the logit is log(exp(leak + z weight) - 1).
    return Model(lambda z: torch.log(torch.expm1(leak + z @ weight)), torch.full((2 * SIDE,), -1.0))


def linear(generator: Generator) -> Model:
    """The logits of 24 bits are linear in the spins 2 z - 1, with coefficients N(0, 0.7^2)."""
    weight = 0.7 * torch.randn(2 * SIDE, 24, generator=generator)
    return Model(lambda z: (2 * z - 1) @ weight, torch.zeros(2 * SIDE))


def mlp(generator: Generator) -> Model:
    """A random network of 32 tanh units, whose inputs have a standard deviation of 2, gives logits of 24 bits."""
    first = torch.randn(2 * SIDE, 32, generator=generator) * 2 / (2 * SIDE) ** 0.5
    second = torch.randn(32, 24, generator=generator) * 3 / 32**0.5
    return Model(lambda z: torch.tanh((2 * z - 1) @ first) @ second, torch.zeros(2 * SIDE))


TOYS: dict[str, tuple[str, Callable[[Generator], Model]]] = {
    "xor": ("XOR pairs", xor_pairs),
    "noisy_or": ("noisy-OR", noisy_or),
    "linear": ("linear", linear),
    "mlp": ("random MLP", mlp),
}
# The paper's values; straight_through does not use its own.
SHARPNESS = {"pwl": 4.0, "concrete": 10.0, "straight_through": 1.0, "power_function": 30.0}
_UNDIRECTED: dict[str, dict[str, Any]] = {
    f"undirected, {coupling}": {"coupling": coupling} for coupling in ("none", "shared", "low_rank", "per_sample")
}
_DIRECTED: dict[str, dict[str, Any]] = {
    f"directed, L = {groups}, t = {t}": {"posterior": "directed", "groups": groups, "spin_beta": t}
    for t in (1, 2)
    for groups in (1, 2, 4)
}
POSTERIORS = _DIRECTED | _UNDIRECTED
# All posteriors with pwl; the other relaxations with the simplest and the richest posterior of each family.
ROWS = (
    *((posterior, "pwl") for posterior in POSTERIORS),
    *(
        (posterior, relaxation)
        for relaxation in ("concrete", "straight_through", "power_function")
        for posterior in ("directed, L = 1, t = 2", "directed, L = 4, t = 2", "undirected, per_sample")
        if posterior in _DIRECTED or relaxation != "power_function"
    ),
)


@dataclass(frozen=True)
class Cell:
    """One training."""

    toy: str
    posterior: str
    relaxation: str
    seed: int
    steps: int

    def config(self) -> Config:
        # These settings are the same for all posteriors.
        settings: dict[str, Any] = {"encoder": (64, 64), "batch_size": 200, "kl_warmup": 0.3}
        settings |= {"learning_rate": 1e-2, "schedule": "cosine", "adam_eps": 1e-3}
        # The prior is fixed, so its chains serve no purpose.
        settings |= {"left": SIDE, "right": SIDE, "prior_chains": 1, "prior_sweeps": 1, "posterior_sweeps": 10}
        settings |= {"relaxation": self.relaxation, "sharpness": SHARPNESS[self.relaxation], "spin_beta": 2}
        return Config(**settings | POSTERIORS[self.posterior] | {"seed": self.seed, "steps": self.steps})


class _Given(nn.Module):
    """A function as a module, in place of a decoder that learns."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z)


def divergence(cell: Cell) -> float:
    """Trains the cell's posterior and returns its KL divergence, the mean over held-out inputs.

    The seed decides on the decoder, the inputs, the start and the samples. Cells of one toy and seed have the same
    decoder and inputs.
    """
    generator = Generator().manual_seed(cell.seed)
    model = TOYS[cell.toy][1](generator)
    inputs = draw(model, TRAINING + HELD_OUT, generator)
    vae = train(cell.config(), model, inputs[:TRAINING])
    kl = torch.cat([exact_kl(vae, model, part) for part in inputs[TRAINING:].split(PART)]).mean().item()
    if not math.isfinite(kl):
        raise ValueError(f"the training diverged (KL {kl})")
    return kl


def draw(model: Model, count: int, generator: Generator) -> Tensor:
    """Inputs [count, inputs] from p(x)."""
    z = torch.bernoulli(torch.sigmoid(model.prior).expand(count, -1), generator=generator)
    return torch.bernoulli(torch.sigmoid(model.decoder(z)), generator=generator)


def train(config: Config, model: Model, inputs: Tensor) -> VAE:
    """A VAE with the decoder and the prior of the model, whose encoder and posterior were trained on the inputs."""
    torch.manual_seed(config.seed)
    vae = VAE(config, inputs.mean(0), len(inputs))
    vae.decoder = _Given(model.decoder)  # type: ignore[assignment]
    assert vae.prior is not None
    vae.prior.requires_grad_(False)
    vae.prior.weight.zero_()
    for bias, logits in zip((vae.prior.left_bias, vae.prior.right_bias), model.prior.split(SIDE), strict=True):
        bias.copy_(logits)
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, eps=config.adam_eps, fused=True)
    for step in range(config.steps):
        progress = step / config.steps
        optimizer.param_groups[0]["lr"] = config.learning_rate * learning_rate(config.schedule, progress)
        index = torch.randint(len(inputs), (config.batch_size,))
        terms = vae(inputs[index], index, term_weight(config, progress))
        optimizer.zero_grad(set_to_none=True)
        terms.loss.backward()
        optimizer.step()
    return vae.eval()


@torch.no_grad()
def exact_kl(vae: VAE, model: Model, inputs: Tensor) -> Tensor:
    """KL(q(z | x) || p(z | x)) [B] for inputs [B, inputs], by enumeration of z."""
    log_q, log_p = log_posterior(vae, inputs), true_log_posterior(model, inputs)
    return (log_q.exp() * (log_q - log_p)).sum(0)


def log_posterior(vae: VAE, inputs: Tensor) -> Tensor:
    """log q(z | x) of all states, [4096, B] float64."""
    features = vae.encoder(inputs)
    if isinstance(vae.posterior, DirectedPosterior):
        return vae.posterior.log_table(features, inputs).double()
    energy = vae.posterior.distribution(features).energy(all_bits(2 * SIDE)[:, None])
    return torch.log_softmax(-energy.double(), 0)


def true_log_posterior(model: Model, inputs: Tensor) -> Tensor:
    """log p(z | x) of all states, [4096, B] float64."""
    states = all_bits(len(model.prior))
    logits = model.decoder(states).double()
    log_likelihood = logits @ inputs.double().mT - F.softplus(logits).sum(-1, keepdim=True)
    return torch.log_softmax(log_likelihood + log_bernoulli(model.prior, states)[:, None], 0)


# The command --------------------------------------------------------------------------------------------------------

Results = dict[tuple[str, str, str], list[float]]  # toy, posterior, relaxation -> divergences of all seeds


def run(toys: Sequence[str], seeds: int, steps: int, num_processes: int) -> Results:
    """Makes all cells in parallel processes of one thread, and shows progress.

    Raises:
        RunError: A training diverged, or its process died.
        KeyboardInterrupt: Ctrl-C came. No process is left.
    """
    cells = [Cell(toy, *row, seed, steps) for seed in range(seeds) for toy in toys for row in ROWS]
    found: dict[Cell, float] = {}
    with (
        _workers(num_processes) as pool,
        tqdm(total=len(cells), unit="training", dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 30) as
        progress,
    ):  # fmt: skip
        with _ignoring_ctrl_c():  # the processes inherit it
            futures = {pool.submit(divergence, cell): cell for cell in cells}
        for future in as_completed(futures):
            cell = futures[future]
            with blaming(Path(cell.toy), f"{cell.posterior}, {cell.relaxation}, seed {cell.seed}"):
                found[cell] = future.result()
            progress.update()
    return {(toy, *row): [found[Cell(toy, *row, seed, steps)] for seed in range(seeds)] for toy in toys for row in ROWS}


@contextmanager
def _workers(number: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with the block, also if it raises."""
    pool = ProcessPoolExecutor(number, multiprocessing.get_context("spawn"), _start_worker)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown()


def _start_worker() -> None:
    die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():  # it died before it was watched
        os._exit(1)
    torch.set_num_threads(1)


@contextmanager
def _ignoring_ctrl_c() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def markdown(results: Results) -> str:
    """A table with a line for each posterior and relaxation and a column for each toy."""
    toys = _toys(results)
    lines = [["posterior", "relaxation", *(TOYS[toy][0] for toy in toys)], ["---"] * (2 + len(toys))]
    for row in ROWS:
        figures = [mean_and_error(results[(toy, *row)]) for toy in toys]
        lines.append([*row, *(f"{mean:.3f} +- {error:.3f}" for mean, error in figures)])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write(results: Results, folder: Path) -> list[Path]:
    """Writes toys.md, toys.csv (with the values of all seeds) and toys.png."""
    from . import pictures  # here, because the processes that train need no matplotlib

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    seeds = len(next(iter(results.values())))
    names = ("toy", "posterior", "relaxation", "mean", "standard_error", *(f"seed_{seed}" for seed in range(seeds)))
    writer.writerow(names)
    writer.writerows((*row, *mean_and_error(values), *values) for row, values in results.items())
    panels: dict[str, dict[str, list[tuple[str, float, float]]]] = {
        TOYS[toy][0]: {
            relaxation: [
                (posterior, *mean_and_error(results[toy, posterior, relaxation]))
                for posterior, relaxed in ROWS
                if relaxed == relaxation
            ]
            for relaxation in SHARPNESS
        }
        for toy in _toys(results)
    }
    label = f"KL(q(z | x) || p(z | x)) [nats], mean and standard error over {seeds} seeds"
    with blaming(folder, "the tables cannot be written", OSError):
        atomic_write(folder / "toys.md", markdown(results).encode())
        atomic_write(folder / "toys.csv", text.getvalue().encode())
        picture = pictures.dots(folder / "toys.png", panels, label)
    return [folder / "toys.md", folder / "toys.csv", picture]


def _toys(results: Results) -> list[str]:
    return list(dict.fromkeys(toy for toy, *_ in results))
