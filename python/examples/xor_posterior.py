# SPDX-License-Identifier: Apache-2.0
"""Two hidden bits and their XOR: a posterior with two modes, which needs a coupling.

Each input has six bits x, and x_i is left_i XOR right_i, flipped in one case of ten. So x_i = 0 says that left_i and
right_i are probably equal, but not whether they are 0 or 1. A linear encoder is trained to give posteriors q(z | x) of
the hidden bits, once with couplings and once without.

    python python/examples/xor_posterior.py --folder runs/xor_posterior

prints the exact KL divergence of both, and writes ``posteriors.png``, the posteriors of one pair. Needs matplotlib.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

import gibbs_ext as gx

PAIRS = 6
FLIP = math.log(0.9 / 0.1)
STATES = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2 * PAIRS)))[:, None]  # all z, [4096, 1, 12]
INPUTS = torch.tensor(list(itertools.product((0.0, 1.0), repeat=PAIRS)))  # all x, [64, 6]


def log_likelihood(x: Tensor, z: Tensor) -> Tensor:
    """log p(x | z) for x [..., 6] and bits, or relaxed values, z [..., 12]."""
    left, right = 2 * z[..., :PAIRS] - 1, 2 * z[..., PAIRS:] - 1
    return F.logsigmoid(-FLIP * left * right * (2 * x - 1)).sum(-1)


def train(coupling: str, steps: int) -> gx.nn.BoltzmannPosterior:
    """A posterior that is trained on random inputs; all inputs are equally likely."""
    # Features are the spins of the input. The prior has parameters of 0, because hidden bits are fair and independent.
    posterior = gx.nn.BoltzmannPosterior(PAIRS, PAIRS, PAIRS, coupling=coupling)
    prior = gx.BipartiteBoltzmann(torch.zeros(PAIRS), torch.zeros(PAIRS), torch.zeros(PAIRS, PAIRS))
    optimizer = torch.optim.Adam(posterior.parameters(), lr=0.01)
    for _ in range(steps):
        x = torch.randint(2, (200, PAIRS)).float()
        sample = posterior(2 * x - 1)
        loss = gx.nn.kl_divergence(sample, prior) - log_likelihood(x, sample.z)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return posterior.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=500, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/xor_posterior"), help="where the picture goes (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must lie in 0 .. 2^32 - 1, got {args.seed}")
    args.folder.mkdir(parents=True, exist_ok=True)

    exact = torch.log_softmax(log_likelihood(INPUTS, STATES), 0)
    posteriors = {"exact": exact}
    for title, coupling in (("without couplings", "none"), ("with couplings", "per_sample")):
        torch.manual_seed(args.seed)
        posterior = train(coupling, args.steps)
        with torch.no_grad():
            log_q = posterior.distribution(2 * INPUTS - 1).log_prob(STATES)
        kl = (log_q.exp() * (log_q - exact)).sum(0).mean()
        print(f"{title}: KL(q || p) = {kl:.3f} nats")
        posteriors[title] = log_q
    draw(args.folder / "posteriors.png", posteriors)
    print(f"picture in {args.folder}")


def draw(path: Path, posteriors: dict[str, Tensor]) -> None:
    """Draws the posteriors of the first pair for the input of zeros and for that of ones."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    all_axes = figure.subplots(2, len(posteriors), sharex=True, sharey=True)
    for row, number in enumerate((0, -1)):
        for axes, (title, log_q) in zip(all_axes[row], posteriors.items(), strict=True):
            states = log_q[:, number].exp().view(2, 2 ** (PAIRS - 1), 2, 2 ** (PAIRS - 1))  # left_1, ., right_1, .
            table = states.sum((1, 3))
            axes.imshow(table, cmap="Blues", vmin=0, vmax=0.5, origin="lower")
            for left, right in itertools.product((0, 1), repeat=2):
                color = "white" if table[left, right] > 0.3 else "black"
                axes.text(right, left, f"{table[left, right]:.2f}", ha="center", va="center", color=color)
            axes.set(xticks=(0, 1), yticks=(0, 1))
            if row == 0:
                axes.set_title(title)
        all_axes[row][0].set_ylabel(f"x = {row}\n\nleft")
    for axes in all_axes[-1]:
        axes.set_xlabel("right")
    figure.suptitle("Probabilities of two hidden bits, given their noisy XOR x")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
