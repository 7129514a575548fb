# SPDX-License-Identifier: Apache-2.0
"""A deep Boltzmann machine as a coloured graph, beside a restricted one of as many units and parameters.

Layers are coupled to their neighbours alone (Salakhutdinov and Hinton, "Deep Boltzmann machines", AISTATS 2009), so the
graph has two colours, odd and even layers, and a sweep updates one after the other. Training is that of a restricted
machine, except that hidden units given the data are sampled, because they are coupled to one another. Gradients are
centred, so that layers can learn together (Montavon and Mueller, "Deep Boltzmann machines and the centering trick",
2012). The data are scikit-learn's digits (8 x 8 pixels, here bits), of which 360 are held out.

log p(image) is log Z of the hidden units given the image minus log Z of the machine. Both are estimated by annealing in
both directions. Machines of several seeds are one batch of models.

    python python/examples/deep_boltzmann_machine.py --layers 64 16 --folder runs/deep_boltzmann_machine

prints log-likelihoods of both machines, and writes ``learning_curve.png`` and ``samples.png``. A first hidden layer of
64 units, as many as pixels, makes the numbers of parameters equal. Needs matplotlib, pymbar, scikit-learn and tqdm.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
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

PIXELS = 64
BATCH = 50  # images in a minibatch, and persistent chains of each machine


def machine(layers: Sequence[int], images: Tensor, seeds: int) -> gx.GraphBoltzmann:
    """A batch of machines whose first layer is the pixels. It starts from the log-odds of each pixel."""
    units = torch.arange(sum(layers)).split(list(layers))
    edges = torch.cat([torch.cartesian_prod(*pair) for pair in itertools.pairwise(units)])
    graph = gx.ColoredGraph(sum(layers), edges)
    bias = torch.zeros(seeds, graph.num_nodes)
    bias[:, :PIXELS] = ((images.sum(0) + 1) / (len(images) + 2)).logit()
    return gx.GraphBoltzmann(graph, bias.requires_grad_(), (0.01 * torch.randn(seeds, len(edges))).requires_grad_())


def is_pixel(model: gx.GraphBoltzmann) -> Tensor:
    return torch.arange(model.num_units) < PIXELS


def train(model: gx.GraphBoltzmann, images: Tensor, epochs: int, learning_rate: float) -> Iterator[int]:
    """Trains the machines by persistent contrastive divergence, and counts the epochs that are done."""
    parameters = [model.bias, model.coupling]
    (seeds,) = model.batch_shape
    chains, centering = gx.PersistentChains(BATCH, model), gx.Centering(model)
    optimizer = torch.optim.SGD(parameters, lr=learning_rate)
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=epochs * steps)
    for epoch in range(1, epochs + 1):
        orders = torch.stack([torch.randperm(len(images)) for _ in range(seeds)], 1)  # each machine has its own
        for index in orders.split(BATCH)[:steps]:
            loss = gx.negative_log_likelihood_surrogate(
                model, images[index], chains, 5, where=is_pixel(model), centering=centering
            )
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            schedule.step()
        yield epoch


class LogLikelihood(NamedTuple):
    """In nats, of M images and S machines."""

    estimate: Tensor  # [M, S]
    error: Tensor  # [S]: the standard error, by annealing, of the mean over the images
    lower: Tensor  # [M, S]: too low in expectation, if the samples from which annealing goes back are good
    upper: Tensor  # [M, S]


@torch.no_grad()
def log_likelihood(model: gx.GraphBoltzmann, images: Tensor, num_chains: int, num_sweeps: int) -> LogLikelihood:
    whole = gx.bracket_log_partition(model, model.sample((num_chains,), num_sweeps), num_sweeps)
    given = torch.nn.functional.pad(images, (0, model.num_units - PIXELS)).unsqueeze(1)
    conditional = model.conditioned(given, is_pixel(model))  # M x S machines of the hidden units
    hidden = conditional.model.sample((20,), 50)
    forward = gx.annealed_importance_sampling(conditional.model, 20, 50)
    back = gx.annealed_importance_sampling(conditional.model, 20, 50, reverse=True, initial=hidden)
    middle = (forward.log_partition + back.log_partition) / 2
    of_hidden = torch.hypot(forward.standard_error, back.standard_error) / 2
    return LogLikelihood(
        middle - conditional.energy - whole.log_partition,
        torch.hypot(of_hidden.square().sum(0).sqrt() / len(images), whole.standard_error),
        forward.log_partition - conditional.energy - whole.upper,
        back.log_partition - conditional.energy - whole.lower,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[64, 16], metavar="UNITS",
        help="units of each hidden layer (default: 64 16)",
    )  # fmt: skip
    parser.add_argument("--epochs", type=int, default=30, help="epochs of training (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1.0, help="learning rate at the start (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="machines of each kind (default: %(default)s)")
    parser.add_argument("--chains", type=int, default=200, help="chains of each annealing (default: %(default)s)")
    parser.add_argument(
        "--sweeps", type=int, default=500, help="sweeps of a sample, and of an annealing (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/deep_boltzmann_machine"),
        help="where the pictures go (default: %(default)s)",
    )  # fmt: skip
    args = parser.parse_args()
    if len(args.layers) < 2 or min(args.layers) < 1:
        parser.error(f"--layers must be two or more numbers, each at least 1, got {' '.join(map(str, args.layers))}")
    for option, minimum in (("epochs", 1), ("seeds", 2), ("chains", 40), ("sweeps", 1)):
        if getattr(args, option) < minimum:
            parser.error(f"--{option} must be at least {minimum}, got {getattr(args, option)}")
    if not 0 < args.rate < math.inf:
        parser.error(f"--rate must be positive and finite, got {args.rate}")
    args.folder.mkdir(parents=True, exist_ok=True)

    images = torch.from_numpy(load_digits().data >= 8).float()
    training, held_out = train_test_split(images, test_size=360, random_state=0)
    looks = {round(epoch) for epoch in np.geomspace(1, args.epochs, 6)}
    curves: dict[str, dict[int, LogLikelihood]] = {}
    samples = {}
    for name, layers in (("deep", [PIXELS, *args.layers]), ("restricted", [PIXELS, sum(args.layers)])):
        torch.manual_seed(0)
        model = machine(layers, training, args.seeds)
        size = model.num_units + model.graph.num_edges
        print(f"{name}: layers of {', '.join(map(str, layers))} units, {size} parameters")
        curve = curves[f"{name}, {size} parameters"] = {}
        for epoch in tqdm(train(model, training, args.epochs, args.rate), name, args.epochs, unit="epoch"):
            if epoch in looks:
                found = curve[epoch] = log_likelihood(model, held_out, args.chains, args.sweeps)
                tqdm.write(
                    f"epoch {epoch:3}: {shown(found.estimate)} nats, of annealing +- {of_annealing(found):.3f}, "
                    f"ends {found.lower.mean():.3f} and {found.upper.mean():.3f}"
                )
        samples[name] = model.sample((40,), 2 * args.sweeps)[:, 0, :PIXELS]
    deep, restricted = (curve[args.epochs].estimate for curve in curves.values())
    print(f"deep minus restricted: {shown(deep - restricted)} nats on {len(held_out)} held-out images")
    print("+- is the standard error over images and seeds, if nothing else is said")
    draw_curves(args.folder / "learning_curve.png", curves)
    draw_samples(args.folder / "samples.png", {"Held-out images": held_out[:40]} | {
        f"Samples of the {name} machine, after {2 * args.sweeps} sweeps from uniform bits": bits
        for name, bits in samples.items()
    })  # fmt: skip
    print(f"pictures in {args.folder}")


def standard_error(values: Tensor) -> float:
    """Of the mean of values [M, S], over images and seeds."""
    return math.sqrt(sum(values.mean(dim).var() / values.shape[1 - dim] for dim in (0, 1)))


def shown(values: Tensor) -> str:
    return f"{values.mean():.2f} +- {standard_error(values):.2f}"


def of_annealing(found: LogLikelihood) -> float:
    """The standard error, by annealing, of the mean over images and seeds."""
    return float(found.error.square().sum().sqrt() / len(found.error))


def draw_curves(path: Path, curves: dict[str, dict[int, LogLikelihood]]) -> None:
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    for (name, curve), style in zip(curves.items(), ("o-", "s--"), strict=True):
        of_seeds = torch.stack([found.estimate.mean(0) for found in curve.values()])  # [epochs, S]
        (line,) = axes.plot(list(curve), of_seeds.mean(1), style, label=name)
        axes.plot(list(curve), of_seeds, ".", color=line.get_color(), markersize=4)
    axes.set(
        ylabel="log-likelihood per\nheld-out image, nats",
        title=f"A deep and a restricted Boltzmann machine, {of_seeds.shape[1]} seeds of each",
    )
    axes.legend(title="line: mean of the seeds (dots)")
    deep, restricted = (list(of.values()) for of in curves.values())
    pairs = list(zip(deep, restricted, strict=True))
    differences = [one.estimate - other.estimate for one, other in pairs]
    errors = [standard_error(values) for values in differences]
    below.errorbar(
        list(curve), [values.mean() for values in differences], errors, fmt="o-", color="0.2", capsize=3,
        label="with the standard error over images and seeds",
    )  # fmt: skip
    noise = np.array([math.hypot(*map(of_annealing, pair)) for pair in pairs])
    below.fill_between(list(curve), -noise, noise, alpha=0.4, linewidth=0, label="standard error of annealing")
    below.set(xscale="log", xlabel="epochs", ylabel="deep minus\nrestricted, nats")
    below.set_xticks(list(curve), map(str, curve))
    below.minorticks_off()
    below.legend(fontsize="small")
    for each in (axes, below):
        each.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def draw_samples(path: Path, groups: dict[str, Tensor]) -> None:
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, (title, pictures) in zip(figure.subplots(len(groups)), groups.items(), strict=True):
        framed = torch.nn.functional.pad(pictures.view(2, 20, 8, 8), (1, 0, 1, 0), value=math.nan)
        axes.imshow(framed.transpose(1, 2).reshape(18, 180), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=(), yticks=(), title=title, facecolor="lightsteelblue")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
