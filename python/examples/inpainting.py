# SPDX-License-Identifier: Apache-2.0
"""Half of an image is hidden, and a restricted Boltzmann machine samples it given the other half.

The machine learns the joint law of all pixels of scikit-learn's digits (8 x 8 pixels, here bits). It is never told
which of them will be hidden. Held-out images are completed by its conditional law, which is a smaller machine:
``model.conditioned(given, where)``. Its log Z, bracketed by annealing in both directions, gives the log-probability of
the true hidden half: that of all its pixels at once. It is compared with three predictors that are made for this half:

- each pixel's mean over the training images;
- the hidden half of the nearest training image, by the number of seen pixels that differ;
- all training images with weights that fall exponentially in this number, each with its pixels flipped at some rate:
  a mixture, which is a joint law, too. The fall and the rate are the best for predicting training images from others.

    python python/examples/inpainting.py --hide lower --folder runs/inpainting

prints the log-probabilities and the share of hidden pixels that the best guess gets wrong, and writes
``inpainting.png``. Needs matplotlib, pymbar, scikit-learn and tqdm.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm import tqdm

import gibbs_ext as gx
from gibbs_ext.interop.sklearn import BernoulliRBM

ROW, COLUMN = torch.arange(64) // 8, torch.arange(64) % 8
HALVES = {"lower": ROW >= 4, "upper": ROW < 4, "left": COLUMN < 4, "right": COLUMN >= 4}


def train(images: Tensor, num_hidden: int, epochs: int, seeds: int) -> gx.BipartiteBoltzmann:
    """Machines of 64 pixels (left) and ``num_hidden`` units (right), of seeds 0, 1, ..., as one batch of models."""
    models = [
        BernoulliRBM(
            num_hidden, learning_rate=0.1, n_iter=epochs, batch_size=20, n_sweeps=5, centering=True, random_state=seed
        ).fit(images.numpy()).to_boltzmann()
        for seed in tqdm(range(seeds), "training", unit="machine")
    ]  # fmt: skip
    parameters = ((model.left_bias, model.right_bias, model.weight) for model in models)
    return gx.BipartiteBoltzmann(*map(torch.stack, zip(*parameters, strict=True)))


def complete(
    model: gx.BipartiteBoltzmann, images: Tensor, is_hidden: Tensor, num_chains: int, num_sweeps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the S machines of a batch say of the hidden pixels of M images, given the others.

    Returns:
        log-probabilities [3, M, S] of the truth (estimate, lower end, upper end), their standard errors [M, S],
        ``P(pixel = 1)`` [M, S, 64] and samples [num_chains, M, S, 64].
    """
    where = torch.cat((~is_hidden, torch.zeros(model.num_right, dtype=torch.bool)))
    given = torch.nn.functional.pad(images, (0, model.num_right)).unsqueeze(1)
    conditional = model.conditioned(given, where)  # M x S machines
    free = conditional.model.sample((num_chains,), num_sweeps)
    bracket = gx.bracket_log_partition(conditional.model, free, num_sweeps)
    # log p(hidden | seen) = log sum over units exp(-energy) - log sum over units and hidden pixels exp(-energy)
    sums = torch.stack((bracket.log_partition, bracket.upper, bracket.lower)) - conditional.energy
    log_probability = -model.free_energy(images.unsqueeze(1)) - sums
    samples, units = model.split(conditional.complete(free))
    fields = model.left_bias + torch.einsum("cmsj,sij->cmsi", units, model.weight)
    # The mean of conditional probabilities has less noise than that of samples.
    return log_probability, bracket.standard_error, fields.sigmoid().mean(0), samples


def neighbours(images: Tensor, training: Tensor, is_hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mixture of training images: log-probabilities [M], ``P(pixel = 1)`` [M, n]; and the nearest image [M, n]."""

    def distances(x: Tensor) -> tuple[Tensor, Tensor]:
        seen, hidden = (torch.cdist(x[:, mask], training[:, mask], p=1) for mask in (~is_hidden, is_hidden))
        return seen, hidden

    def predict(seen: Tensor, hidden: Tensor, fall: float, rate: float) -> tuple[Tensor, Tensor]:
        log_weights = (-fall * seen).log_softmax(1)
        log_flips = hidden * math.log(rate) + (int(is_hidden.sum()) - hidden) * math.log(1 - rate)
        return (log_weights + log_flips).logsumexp(1), log_weights.exp()

    seen, hidden = distances(training)
    seen.fill_diagonal_(math.inf)  # each training image is predicted from the others
    grid = itertools.product((0.5, 0.7, 1.0, 1.4, 2.0), (0.01, 0.02, 0.03, 0.05, 0.07, 0.1))
    fall, rate = max(grid, key=lambda choice: predict(seen, hidden, *choice)[0].mean())
    seen, hidden = distances(images)
    log_probability, weights = predict(seen, hidden, fall, rate)
    return log_probability, rate + (1 - 2 * rate) * weights @ training[:, is_hidden], training[seen.argmin(1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hide", choices=HALVES, default="lower", help="the half that is hidden (default: lower)")
    parser.add_argument("--hidden", type=int, default=128, help="hidden units (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=60, help="epochs of training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="machines that are trained (default: %(default)s)")
    parser.add_argument("--chains", type=int, default=50, help="samples of each image (default: %(default)s)")
    parser.add_argument(
        "--sweeps", type=int, default=300, help="sweeps of a sample, and of an annealing (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/inpainting"), help="where the picture goes (default: %(default)s)"
    )
    args = parser.parse_args()
    for option, minimum in (("hidden", 1), ("epochs", 1), ("seeds", 2), ("chains", 3), ("sweeps", 1)):
        if getattr(args, option) < minimum:
            parser.error(f"--{option} must be at least {minimum}, got {getattr(args, option)}")
    args.folder.mkdir(parents=True, exist_ok=True)

    bits, digit = torch.from_numpy(load_digits().data >= 8).float(), load_digits().target
    training, images, _, digit = train_test_split(bits, digit, test_size=360, random_state=0)
    model = train(training, args.hidden, args.epochs, args.seeds)
    is_hidden = HALVES[args.hide]
    truth = images[:, is_hidden]
    torch.manual_seed(0)  # of the chains
    found, errors, probability, samples = complete(model, images, is_hidden, args.chains, args.sweeps)
    mixture, mixture_probability, nearest = neighbours(images, training, is_hidden)
    mean = (training.sum(0) + 1) / (len(training) + 2)
    of_mean = torch.where(truth > 0, mean[is_hidden].log(), (1 - mean[is_hidden]).log()).sum(-1)

    print(f"the {args.hide} half of {len(images)} held-out images, {len(training)} for training")
    print("                              pixels wrong    log p(hidden half | seen half), nats")
    guesses = {
        "each pixel's mean": (mean[is_hidden].expand_as(truth), of_mean),
        "nearest image": (nearest[:, is_hidden], None),
        "mixture of training images": (mixture_probability, mixture),
    }
    for name, (guess, log_probability) in guesses.items():
        of_images = "" if log_probability is None else shown(log_probability)
        print(f"{name:28}  {shown(100 * wrong(guess, truth))} %  {of_images}".rstrip())
    machine_wrong = wrong(probability[..., is_hidden], truth.unsqueeze(1))
    print(f"{'machine':28}  {shown(100 * machine_wrong)} %  {shown(found[0])}")
    print("+- is the standard error over images and seeds of the training")
    ends, noise = found.mean((1, 2)), errors.square().sum().sqrt() / errors.numel()
    print(f"machine: annealing has {ends[0]:.3f} +- {noise:.3f}, ends {ends[1]:.3f} and {ends[2]:.3f}")
    print(f"machine minus mixture: {shown(found[0] - mixture.unsqueeze(1))} nats")
    draw(args.folder / "inpainting.png", digit, is_hidden, images, probability, samples, mean, nearest)
    print(f"picture in {args.folder}")


def wrong(probability: Tensor, truth: Tensor) -> Tensor:
    """The share [M, ...] of pixels in which the more probable value is not the true one."""
    return ((probability > 0.5) != (truth > 0.5)).double().mean(-1)


def shown(values: Tensor) -> str:
    """The mean of values [M] of images, or [M, S] of images and seeds, with its standard error over both."""
    table = values.double().reshape(len(values), -1)
    variance = table.mean(1).var() / len(table)
    if table.shape[1] > 1:
        variance = variance + table.mean(0).var() / table.shape[1]
    return f"{table.mean():6.2f} +- {variance.sqrt():.2f}"


def draw(
    path: Path, digit: np.ndarray, is_hidden: Tensor, images: Tensor, probability: Tensor, samples: Tensor,
    mean: Tensor, nearest: Tensor,
) -> None:  # fmt: skip
    """Draws the first held-out image of each digit, and what the first machine and two of the others make of it."""
    chosen = [int(np.flatnonzero(digit == number)[0]) for number in range(10)]
    rows = {
        "held-out image": images,
        "what is seen": images.masked_fill(is_hidden, math.nan),
        "machine: three samples": samples[0, :, 0],
        "": samples[1, :, 0],
        " ": samples[2, :, 0],
        "machine:\nprobability of 1": probability[:, 0],
        "nearest\ntraining image": nearest,
        "each pixel's mean": mean,
    }
    figure = Figure(figsize=(8, 6), layout="constrained")
    all_axes = figure.subplots(len(rows), len(chosen))
    top, left = ROW[is_hidden].min() - 0.5, COLUMN[is_hidden].min() - 0.5
    width, height = COLUMN[is_hidden].max() + 0.5 - left, ROW[is_hidden].max() + 0.5 - top
    for row, (name, pictures) in zip(all_axes, rows.items(), strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axes, image in zip(row, chosen, strict=True):
            axes.set_facecolor("mistyrose")  # seen where there is no pixel
            picture = torch.where(is_hidden, pictures, images)[image].view(8, 8)
            shade = axes.imshow(picture, cmap="gray_r", vmin=0, vmax=1)
            axes.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor="tab:red", clip_on=False))
            axes.set(xticks=(), yticks=())
    figure.colorbar(shade, ax=all_axes, label="pixel, or its probability of being 1", shrink=0.5)
    figure.suptitle("Half of each held-out image (red frame) is completed given the other half")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
