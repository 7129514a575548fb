# SPDX-License-Identifier: Apache-2.0
"""Why a run's ELBO is below log p(x): its posterior is not fitted to each image, or its family is too small.

On some images, with decoder and prior fixed, KL(q || p(z | x)) = log p(x) - ELBO of the encoder's answer q is compared
with that of a factorial posterior and that of a bipartite Boltzmann machine, both fitted to each image alone. What
fitting gains within the run's own family is the amortisation gap, and the KL that is left is the family's (Cremer, Li,
Duvenaud 2018, arXiv 1801.03558).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import gibbs_ext as gx

from .data import Dataset, fingerprint
from .directed import DirectedPosterior
from .evaluate import standard_error, suppressed_annealing_warnings
from .runs import Run, RunError, atomic_write
from .vae import VAE, Proposal, anneal, log_mean_exp

ROUNDS = 10  # of samples for log p(x)
SWEEPS = 5  # of the chains of a fit at each step
ROWS = {
    "total": "KL of the encoder's posterior",
    "amortisation": "of it amortisation: fitting its own family to each image gains",
    "family": "of it family: the KL of the best posterior of its own family",
    "factorial": "KL of the best factorial posterior",
    "undirected": "KL of the best bipartite Boltzmann machine",
    "couplings": "what couplings gain, the difference of these two",
}


class Posteriors(NamedTuple):
    """Bipartite Boltzmann machines, one for each of B images, with energies that are linear in ``z - centre``.

    A unit's gradient and that of its couplings are then less correlated, so that fits take fewer steps.
    """

    field: Tensor  # [B, N]: logits of units whose neighbours are at their centre
    coupling: Tensor  # [B, n1, n2], or zeros [n1, n2] of factorial posteriors
    centre: Tensor  # [B, N] in (0, 1), constant

    def machine(self) -> gx.BipartiteBoltzmann:
        sizes = self.coupling.shape[-2:]
        (left, right), (left_centre, right_centre) = self.field.split(sizes, -1), self.centre.split(sizes, -1)
        return gx.BipartiteBoltzmann(
            left - (self.coupling @ right_centre.unsqueeze(-1)).squeeze(-1),
            right - (left_centre.unsqueeze(-2) @ self.coupling).squeeze(-2),
            self.coupling,
            validate_args=False,
        )

    @classmethod
    def of_machine(cls, machine: gx.BipartiteBoltzmann, centre: Tensor) -> Posteriors:
        weight = machine.weight.expand(*machine.batch_shape, -1, -1)
        left_centre, right_centre = machine.split(centre)
        left = machine.left_bias + (weight @ right_centre.unsqueeze(-1)).squeeze(-1)
        right = machine.right_bias + (left_centre.unsqueeze(-2) @ weight).squeeze(-2)
        return cls(torch.cat((left, right), -1), weight, centre)


@torch.no_grad()
def refit(
    log_joint: Callable[[Tensor], Tensor],
    start: Posteriors,
    *,
    with_coupling: bool,
    steps: int,
    num_samples: int,
    rate: float = 0.05,
    seed: int = 0,
) -> tuple[Posteriors, Posteriors]:
    """Fits posteriors to B images, each alone, by ascending the ELBO.

    The gradient of the ELBO in a parameter of the energy E is the covariance under q of ``log p(x, z) + E(z)`` and the
    derivative of -E(z). The samples' covariance estimates it without bias, if the chains are in equilibrium.

    Args:
        log_joint: log p(x, z) [S, B] of bits z [S, B, N], but for a constant.
        start: Where to start.
        with_coupling: Whether couplings are fitted, too, or stay as they are.
        steps: Number of steps of Adam. In the first third of them its rate falls to 0 as a cosine, and once more in the
            rest.
        num_samples: S, samples of each posterior in each step: persistent chains.
        rate: The rate at the start.
        seed: Seed of the chains.

    Returns:
        The posteriors after the first third of the steps and at the end. If the latter are much better, even more steps
        may gain more.
    """
    field, coupling, centre = start.field.clone(), start.coupling.clone(), start.centre
    parameters = [field, coupling] if with_coupling else [field]
    left_centre, right_centre = centre.split(coupling.shape[-2:], -1)
    left = torch.bernoulli(
        left_centre.expand(num_samples, -1, -1), generator=torch.Generator(field.device).manual_seed(seed)
    )
    early = start
    for step in tqdm(range(steps), desc="undirected" if with_coupling else "factorial", unit="step", leave=False):
        if step in (0, steps // 3):
            early = Posteriors(field.clone(), coupling.clone(), centre)
            optimizer = torch.optim.Adam(parameters, rate, eps=1e-3)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - step if step else steps // 3 or 1)
        machine = Posteriors(field, coupling, centre).machine()
        left, right = gx.bipartite_gibbs(
            left, machine.left_bias, machine.right_bias, machine.weight, SWEEPS if with_coupling else 1,
            sweep_offset=SWEEPS * step, seed=seed,
        )  # fmt: skip
        z = torch.cat((left, right), -1)
        value = log_joint(z) + machine.energy(z)
        # The mean of the others as baseline of each sample gives the covariance of the samples.
        advantage = ((value - value.mean(0)) / (num_samples - 1)).unsqueeze(-1)
        field.grad = -(advantage * (z - centre)).sum(0)
        if with_coupling:
            coupling.grad = -torch.einsum("sbi,sbj->bij", advantage * (left - left_centre), right - right_centre)
        optimizer.step()
        schedule.step()
    return early, Posteriors(field, coupling, centre)


class Bounds(NamedTuple):
    """What samples of B posteriors say, all [B] float64; log Z_theta is left out."""

    elbo: Tensor
    log_likelihood: Tensor  # the importance-weighted bound of all rounds
    looseness: Tensor  # that bound minus the mean of those of single rounds
    effective: Tensor  # the part of the chains of AIS that counts


def bounds(
    log_joint: Callable[[Tensor], Tensor], propose: Callable[[int], Proposal], seed: int, rounds: int = 1
) -> Bounds:
    """``propose`` draws samples for a seed."""
    elbos, bounds, effective = [], [], []
    for number in range(rounds):
        with suppressed_annealing_warnings():
            proposal = propose(seed + number)
        values = log_joint(proposal.z)
        elbos.append(proposal.mean(values - proposal.log_q).double())
        bounds.append(log_mean_exp((values + proposal.log_weight).double()))
        effective.append((-log_mean_exp(2 * proposal.log_ratio.double())).exp())
    of_rounds = torch.stack(bounds)
    bound = log_mean_exp(of_rounds)
    return Bounds(torch.stack(elbos).mean(0), bound, bound - of_rounds.mean(0), torch.stack(effective).amin(0))


@torch.no_grad()
def decompose(
    model: VAE,
    images: Tensor,
    *,
    steps: int,
    num_samples: int,
    num_betas: int,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The KL of the model's posterior on images [B, pixels], and its parts, as lists of B numbers by the names of ROWS.

    For directed posteriors of several groups, amortisation and family are left out: their family is not fitted.
    A coupling that images share belongs to the family of all bipartite machines here, so that what sharing costs is in
    the amortisation gap.

    Args:
        model: A model with a prior, whose posterior is directed or bipartite.
        images: Binary images.
        steps: Steps of each fit; the factorial posterior has a second fit of as many.
        num_samples: Samples for each image and step.
        num_betas: Steps of the annealing to each posterior in the end.
        draws: Samples of each posterior and round in the end.
        seed: A 32-bit seed.
    """
    seeds = iter(range(seed << 32, (seed << 32) + 1000 * ROUNDS, ROUNDS))
    images = images.to(model.device)
    n1, n2 = _sides(model)

    def log_joint_of(index: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda z: model.log_joint(images[index], z)

    def of_encoder(index: Tensor) -> Callable[[int], Proposal]:
        return lambda seed: model.propose(images[index], draws, num_betas, seed)

    def of(posteriors: Posteriors) -> Callable[[Tensor], Callable[[int], Proposal]]:
        def of_some(index: Tensor) -> Callable[[int], Proposal]:
            some = Posteriors(
                posteriors.field[index],
                posteriors.coupling[index] if posteriors.coupling.dim() > 2 else posteriors.coupling,
                posteriors.centre[index],
            )
            # AIS starts from the posterior itself if it is factorial.
            betas = num_betas if posteriors.coupling.any() else 1
            return lambda seed: anneal(some.machine(), draws, betas, seed)

        return of_some

    def measured(proposals: Callable[[Tensor], Callable[[int], Proposal]], index: Tensor, rounds: int = 1) -> Bounds:
        # Parts of this size keep the decoder's activations at some 50 MB.
        parts = index.split(max(1, 16_000_000 // (draws * images.shape[1])))
        results = [bounds(log_joint_of(part), proposals(part), next(seeds), rounds) for part in parts]
        return Bounds(*(torch.cat(values) for values in zip(*results, strict=True)))

    every = torch.arange(len(images), device=model.device)
    encoder = measured(of_encoder, every)
    # The encoder's marginals, away from 0 and 1.
    with suppressed_annealing_warnings():
        proposal = of_encoder(every)(next(seeds))
    centre = (proposal.log_ratio.exp().unsqueeze(-1) * proposal.z).mean(0).clamp(0, 1)
    centre = (draws * centre + 0.5) / (draws + 1)
    fit = {"steps": steps, "num_samples": num_samples}

    none = Posteriors(torch.logit(centre), centre.new_zeros(n1, n2), centre)
    _, first = refit(log_joint_of(every), none, with_coupling=False, seed=next(seeds), **fit)
    # Couplings start from this posterior and have as many steps again, so it gets them, too.
    early, factorial = refit(log_joint_of(every), first, with_coupling=False, seed=next(seeds), **fit)
    of_factorial = measured(of(factorial), every)
    factorial_gain = of_factorial.elbo - measured(of(early), every).elbo

    # The start is the encoder's machine, or the factorial posterior of half the steps, whichever is better.
    start = Posteriors.of_machine(first.machine(), centre)
    if isinstance(model.posterior, gx.nn.BoltzmannPosterior):
        machine = model.posterior.distribution(model.encoder(model.seen(images)))
        assert isinstance(machine, gx.BipartiteBoltzmann)
        own, is_better = Posteriors.of_machine(machine, centre), encoder.elbo > measured(of(first), every).elbo
        start = Posteriors(
            torch.where(is_better.unsqueeze(-1), own.field, start.field),
            torch.where(is_better.view(-1, 1, 1), own.coupling, start.coupling),
            centre,
        )
    early, undirected = refit(log_joint_of(every), start, with_coupling=True, seed=next(seeds), **fit)
    of_undirected = measured(of(undirected), every)
    undirected_gain = of_undirected.elbo - measured(of(early), every).elbo

    # The importance-weighted bound comes from new samples of each image's best posterior.
    proposals = (of_encoder, of(factorial), of(undirected))
    results = (encoder, of_factorial, of_undirected)
    best = torch.stack([result.elbo for result in results]).argmax(0)
    log_likelihood, looseness = torch.empty_like(encoder.elbo), torch.empty_like(encoder.elbo)
    for number, propose in enumerate(proposals):
        index = (best == number).nonzero()[:, 0]
        if len(index):
            found = measured(propose, index, ROUNDS)
            log_likelihood[index], looseness[index] = found.log_likelihood, found.looseness
    values = {
        "total": log_likelihood - encoder.elbo,
        "factorial": log_likelihood - of_factorial.elbo,
        "undirected": log_likelihood - of_undirected.elbo,
        "couplings": of_undirected.elbo - of_factorial.elbo,
    }
    own_family = _own_family(model)
    if own_family:
        values |= {"amortisation": values["total"] - values[own_family], "family": values[own_family]}
    return {
        "values": {name: [round(value, 4) for value in values[name].tolist()] for name in ROWS if name in values},
        "means": {name: values[name].mean().item() for name in ROWS if name in values},
        "standard_errors": {name: standard_error(values[name]) for name in ROWS if name in values},
        "own_family": own_family,
        "looseness": looseness.mean().item(),
        "gain_of_more_steps": {"factorial": factorial_gain.mean().item(), "undirected": undirected_gain.mean().item()},
        "effective_sample_size_min": min(result.effective.min().item() for result in results),
    }


def _own_family(model: VAE) -> str | None:
    if isinstance(model.posterior, DirectedPosterior):
        return "factorial" if len(model.posterior.sizes) == 1 else None
    return "factorial" if model.posterior.coupling == "none" else "undirected"


def _sides(model: VAE) -> tuple[int, int]:
    """The sizes of the two sides of the machines that are fitted."""
    if isinstance(model.posterior, DirectedPosterior):
        assert model.prior is not None
        prior = model.prior.distribution()
        num_left = prior.num_left if isinstance(prior, gx.BipartiteBoltzmann) else prior.num_units // 2
        return num_left, prior.num_units - num_left
    return model.posterior.structure.sizes  # type: ignore[return-value]


def gap_run(
    run: Run,
    data: Dataset,
    *,
    split: str = "test",
    num_images: int = 20,
    steps: int = 1000,
    num_samples: int = 128,
    seed: int = 0,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Decomposes the KL of a run on evenly spaced images of a split, and saves the result in the run's folder.

    Raises:
        RunError: The run has no prior or a posterior on a Chimera graph, or the result cannot be saved.
    """
    began = time.perf_counter()
    config = run.config
    if config.task == "structured":
        raise RunError(f"{run.path}: gap: expected a run of task density, got {config.task}, which has no posterior")
    if config.posterior == "chimera":
        raise RunError(f"{run.path}: gap: expected an undirected or directed posterior, got {config.posterior}")
    state = run.load_checkpoint()
    model = run.load_model(data, state).to(device or "cpu")
    images = data.binary(split, None, config.data_seed)
    count = min(num_images, len(images))
    images = images[torch.arange(count) * len(images) // count]
    betas = max(config.posterior_betas, config.posterior_max_betas)
    result = {
        "step": state["step"],
        "split": split,
        "images": count,
        "fingerprint": fingerprint(images),
        "settings": {"steps": steps, "samples": num_samples, "betas": betas, "seed": seed},
        **decompose(model, images, steps=steps, num_samples=num_samples, num_betas=betas, seed=seed),
        "seconds": time.perf_counter() - began,
    }
    path = _path(run, split)
    try:
        atomic_write(path, (json.dumps(result) + "\n").encode())
    except OSError as error:
        raise RunError(f"{path}: the gap cannot be saved ({error.strerror}); it is:\n{table(result)}") from error
    return result


def _path(run: Run, split: str) -> Path:
    return run.path / ("gap.json" if split == "test" else f"gap_{split}.json")


def table(result: dict[str, Any]) -> str:
    """The means over images and their standard errors, a line each, and what they are worth."""
    width = max(map(len, ROWS.values()))
    lines = [f"{'nats, mean over ' + str(result['images']) + ' images':{width}}"]
    for name, title in ROWS.items():
        if name in result["means"]:
            error = result["standard_errors"][name]
            shown = "" if math.isnan(error) else f" +- {error:.2f}"
            lines.append(f"{title:{width}} {result['means'][name]:7.2f}{shown}")
    gains = ", ".join(f"{name} {gain:.2f}" for name, gain in result["gain_of_more_steps"].items())
    lines += [
        f"log p(x) is a bound: all samples raise it by {result['looseness']:.2f} above that of a tenth of them.",
        f"The last two thirds of the steps gained: {gains}.",
        f"At least {100 * result['effective_sample_size_min']:.0f} % of the chains of AIS count.",
    ]
    return "\n".join(lines)
