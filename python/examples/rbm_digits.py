# SPDX-License-Identifier: Apache-2.0
"""A restricted Boltzmann machine learns small images of digits, and its log-likelihood is bracketed on the way.

The data are scikit-learn's digits (8 x 8 pixels, here bits), of which 360 are held out. Training is persistent
contrastive divergence with centred gradients (Melchior, Fischer, Wiskott, JMLR 17, 2016) and a learning rate that falls
linearly to 0. The log-likelihood needs log Z, which annealing from independent units to the machine estimates too low
in expectation, and annealing back from samples of the machine too high, if these samples are good: their chains start
afresh from uniform bits.

    python python/examples/rbm_digits.py --hidden 128 --folder runs/rbm_digits

prints log-likelihoods, and writes ``learning_curve.png``, ``filters.png`` (the weights) and ``samples.png``. Needs
matplotlib, pymbar, scikit-learn and tqdm.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm import tqdm

import gibbs_ext as gx

BATCH = 50  # images in a minibatch, and persistent chains


def train(
    images: Tensor, num_hidden: int, epochs: int, centering: bool, learning_rate: float
) -> Iterator[gx.BipartiteBoltzmann]:
    """The machine of pixels (left) and hidden units (right) after each epoch; it is one object, which goes on learning.

    Training starts from the log-odds of each pixel, so that the machine need not learn them first.
    """
    mean = (images.sum(0) + 1) / (len(images) + 2)
    weight = 0.01 * torch.randn(images.shape[1], num_hidden)
    parameters = [p.requires_grad_() for p in (mean.logit(), torch.zeros(num_hidden), weight)]
    model = gx.BipartiteBoltzmann(*parameters)
    chains = gx.PersistentChains(BATCH, model)
    offsets = gx.Centering(model) if centering else None
    optimizer = torch.optim.SGD(parameters, lr=learning_rate)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(BATCH)[: steps // epochs]:
            optimizer.zero_grad()
            gx.negative_log_likelihood_surrogate(model, images[index], chains, 5, centering=offsets).backward()
            optimizer.step()
            schedule.step()
        yield model


class LogLikelihood(NamedTuple):
    """In nats per image. What a log Z that is too low or too high does to all images alike stands in its own fields."""

    training: Tensor  # [M]
    held_out: Tensor  # [M]
    error: float  # the standard error of log Z
    lower: tuple[float, float]  # the lower end minus the estimate, and its standard error
    upper: tuple[float, float]


@torch.no_grad()
def log_likelihood(model: gx.BipartiteBoltzmann, training: Tensor, held_out: Tensor, num_chains: int) -> LogLikelihood:
    bracket = gx.bracket_log_partition(model, model.sample((num_chains,), 1000), 1000)
    log_partition = float(bracket.log_partition)
    ends = [
        (log_partition - float(end.log_partition), float(end.standard_error))
        for end in (bracket.reverse, bracket.forward)
    ]
    of_training, of_held_out = (-model.free_energy(x).double() - log_partition for x in (training, held_out))
    return LogLikelihood(of_training, of_held_out, float(bracket.standard_error), *ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=128, help="hidden units (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=200, help="epochs of training (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.5, help="learning rate at the start (default: %(default)s)")
    parser.add_argument(
        "--centering", action=argparse.BooleanOptionalAction, default=True, help="centre gradients (default: yes)"
    )
    parser.add_argument("--chains", type=int, default=200, help="chains of each annealing (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training and of all chains (default: 0)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/rbm_digits"), help="where the pictures go (default: %(default)s)"
    )
    args = parser.parse_args()
    for option, minimum in (("hidden", 1), ("epochs", 1), ("chains", 40)):
        if getattr(args, option) < minimum:
            parser.error(f"--{option} must be at least {minimum}, got {getattr(args, option)}")
    if not 0 < args.rate < math.inf:
        parser.error(f"--rate must be positive and finite, got {args.rate}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must lie in 0 .. 2^32 - 1, got {args.seed}")
    args.folder.mkdir(parents=True, exist_ok=True)

    images = torch.from_numpy(load_digits().data >= 8).float()
    training, held_out = train_test_split(images, test_size=360, random_state=0)
    mean = (training.sum(0) + 1) / (len(training) + 2)
    independent = torch.where(held_out > 0, mean.log(), (1 - mean).log()).sum(1)
    print(f"independent pixels: {shown(independent)} nats on {len(held_out)} held-out images")

    torch.manual_seed(args.seed)
    looks = {round(epoch) for epoch in np.geomspace(1, args.epochs, 12)}
    curve = {}
    machines = train(training, args.hidden, args.epochs, args.centering, args.rate)
    for epoch, model in enumerate(tqdm(machines, "training", args.epochs, unit="epoch"), 1):
        if epoch in looks:
            found = curve[epoch] = log_likelihood(model, training, held_out, args.chains)
            tqdm.write(
                f"epoch {epoch:4}: training {found.training.mean():7.3f}, held out {found.held_out.mean():7.3f} nats "
                f"+- {found.error:.3f} of log Z, ends {found.lower[0]:+.3f} and {found.upper[0]:+.3f}"
            )
    print(f"machine: {shown(found.held_out)} nats, {shown(found.held_out - independent)} more than independent pixels")
    print("+- is the standard error over held-out images, if nothing else is said")

    draw_curve(args.folder / "learning_curve.png", curve, float(independent.mean()), args.hidden)
    draw_filters(args.folder / "filters.png", model.weight.detach().T)
    draw_samples(args.folder / "samples.png", model, held_out)
    print(f"pictures in {args.folder}")


def shown(of_images: Tensor) -> str:
    return f"{of_images.mean():.2f} +- {of_images.std() / len(of_images) ** 0.5:.2f}"


def draw_curve(path: Path, curve: dict[int, LogLikelihood], independent: float, num_hidden: int) -> None:
    epochs = list(curve)
    figure = Figure(figsize=(7, 7), layout="constrained")
    axes, below = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    for name, style in (("training", "o-"), ("held_out", "s-")):
        of_images = [getattr(found, name) for found in curve.values()]
        means = np.array([of.mean() for of in of_images])
        errors = np.array([of.std() / len(of) ** 0.5 for of in of_images])
        (line,) = axes.plot(epochs, means, style, label=f"{len(of_images[0])} {name.replace('_', '-')} images")
        axes.fill_between(epochs, means - errors, means + errors, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.axhline(independent, color="0.4", linestyle=":", label="independent pixels, held-out images")
    axes.set(
        ylabel="log-likelihood per image, nats", title=f"Restricted Boltzmann machine of {num_hidden} hidden units"
    )
    axes.legend(title="band: standard error over images")

    for end, label, style in ((0, "lower end, by annealing back", "v--"), (1, "upper end, by annealing", "^--")):
        values, errors = np.array([(found.lower, found.upper)[end] for found in curve.values()]).T
        below.errorbar(epochs, values, errors, fmt=style, markersize=4, linewidth=1, capsize=3, label=label)
    error = np.array([found.error for found in curve.values()])
    below.fill_between(epochs, -error, error, color="0.5", alpha=0.3, linewidth=0, label="Bennett's estimate")
    below.set(xscale="log", xlabel="epochs", ylabel="ends minus estimate, nats")
    below.set_xticks(epochs, map(str, epochs))
    below.minorticks_off()
    below.legend(title="with standard errors", fontsize="small", title_fontsize="small", loc="upper left")
    for each in (axes, below):
        each.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def mosaic(pictures: Tensor, columns: int) -> Tensor:
    """Pictures [n, 64] in rows of one large picture, with nan between them; those that do not fill a row are left out.

    One large picture is drawn much faster than many small ones.
    """
    rows = pictures[: len(pictures) // columns * columns].view(-1, columns, 8, 8)
    padded = torch.nn.functional.pad(rows, (1, 0, 1, 0), value=math.nan)
    return torch.nn.functional.pad(padded.transpose(1, 2).flatten(2).flatten(0, 1), (0, 1, 0, 1), value=math.nan)


def draw_filters(path: Path, filters: Tensor) -> None:
    """Draws the weights of each hidden unit, at most 128, the strongest first."""
    strongest = filters[filters.square().sum(1).argsort(descending=True)][:128]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    limit = float(strongest.abs().quantile(0.99))
    shade = axes.imshow(mosaic(strongest, min(16, len(strongest))), cmap="RdBu_r", vmin=-limit, vmax=limit)
    axes.set(xticks=(), yticks=(), facecolor="0.6")
    figure.colorbar(shade, ax=axes, label="weight", extend="both")
    figure.suptitle("Weights of hidden units to the 8 x 8 pixels, the strongest units first")
    figure.savefig(path, dpi=120)


@torch.no_grad()
def draw_samples(path: Path, model: gx.BipartiteBoltzmann, held_out: Tensor) -> None:
    pixels, hidden = model.split(model.sample((60,), 1000))
    groups = {
        "Held-out images": held_out[:60],
        "Samples, after 1000 sweeps from uniform bits": pixels,
        "P(pixel = 1 | hidden units) of these samples": (model.left_bias + hidden @ model.weight.T).sigmoid(),
    }
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    for axes, (title, pictures) in zip(figure.subplots(len(groups)), groups.items(), strict=True):
        axes.imshow(mosaic(pictures, 20), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=(), yticks=(), title=title, facecolor="lightsteelblue")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
