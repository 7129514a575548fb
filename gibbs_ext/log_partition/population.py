# SPDX-License-Identifier: Apache-2.0
"""Population annealing: chains that are resampled by their weights while they are annealed."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gibbs_ext.arguments import as_seed
from gibbs_ext.checks import check_integers, expand_to, is_readable, reported_as, shown, warn
from gibbs_ext.functional import graph_gibbs
from gibbs_ext.graphs import ColoredGraph
from gibbs_ext.log_partition.annealing import (
    Base,
    Betas,
    as_schedule,
    base_biases,
    base_draws,
    base_log_partition,
)
from gibbs_ext.log_partition.machine import Machine, check_model, refuse_vmap

# The effective number of families below which their spread tells little of the error.
_LEAST_FAMILIES = 20
# Fair bits of one uniform number, and the sweep that draws them first: far beyond those of the chains.
_UNIFORM_BITS = ColoredGraph(53, [])
_FIRST_UNIFORM = 2**43
_MOST_TRIALS = 50


class PopulationCollapseWarning(UserWarning):
    """Most of a population descends from few of its first chains, so that log Z and its error bar cannot be believed.

    The effective number of families, :attr:`PopulationResult.effective_families`, is less than 20, or than a quarter of
    the chains. With 20 and more, error bars of 95 % cover log Z in 90 to 97 % of runs, with 10 in 87 %, with 3 in 60 %.
    It is not checked on a GPU, because reading it would synchronise.
    """


class PopulationResult(NamedTuple):
    """The result of :func:`population_annealing`; M stands for the model's batch shape.

    A family is what descends from one of the C chains that were drawn at beta = 0. Few families mean that chains have
    not forgotten their start, or that betas are too far apart.
    """

    log_partition: Tensor  # [M] float64: estimate of log Z
    standard_error: Tensor  # [M] float64: that of log_partition, from the spread of families
    samples: Tensor  # [C, M, num_units] bits, all of the same weight; those of a family are correlated
    family_sizes: Tensor  # [C, M] int64: descendants of each first chain, in sum C
    betas: Tensor  # [K + 1] float64: the schedule
    log_partitions: Tensor  # [K + 1, M] float64: log Z at each beta
    energies: Tensor  # [K + 1, M] float64: mean of the model's energy over the law at each beta

    @property
    def num_families(self) -> Tensor:
        """Families that survive, [M] int64 from 1 to C."""
        return (self.family_sizes > 0).sum(0)

    @property
    def largest_family(self) -> Tensor:
        """Its number of chains, [M] int64 from 1 to C."""
        return self.family_sizes.amax(0)

    @property
    def mean_square_family_size(self) -> Tensor:
        """rho_t, the mean square of all C family sizes, [M] float64 from 1 to C.

        Samples have at most about the errors of C / rho_t independent ones (Wang, Machta and Katzgraber 2015).
        """
        return self.family_sizes.double().square().mean(0)

    @property
    def effective_families(self) -> Tensor:
        """C / rho_t, [M] float64 from 1 to C: as many families of equal size have the same mean square size."""
        return len(self.family_sizes) / self.mean_square_family_size

    @property
    def family_entropy(self) -> Tensor:
        """``- sum n log n`` over the shares n of the families, [M] float64 from 0 to log C.

        ``C / exp(family_entropy)`` is their entropic size rho_s (Wang, Machta and Katzgraber 2015).
        """
        shares = self.family_sizes.double() / len(self.family_sizes)
        return -shares.xlogy(shares).sum(0)


@torch.no_grad()
def population_annealing(
    model: Machine,
    num_chains: int,
    betas: Betas | str,
    *,
    num_sweeps: int = 10,
    target_overlap: float = 0.9,
    base: Base = "field",
    chain_offset: int | Tensor = 0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> PopulationResult:
    """``log Z``, and samples of equal weight, by annealing a population of chains that is resampled at each beta.

    The path is that of :func:`gibbs_ext.annealed_importance_sampling`, from a factorial model to this one. At each step
    a chain's weight is the ratio of its probabilities at both betas, with right (on a graph, colour 0) summed out. The
    population is resampled by these weights, so that it represents the model at the new beta. log Z is the sum of the
    logarithms of the mean weights (K. Hukushima and Y. Iba, "Population annealing and its application to a spin glass",
    2003; J. Machta, "Population annealing with weighted averages", 2010; W. Wang, J. Machta and H. G. Katzgraber,
    "Population annealing: theory and application in spin glasses", 2015).

    Resampling is systematic: of each chain it makes ``C * weight`` copies, rounded up or down by one random number for
    all chains of a model. So the population keeps its size, and exp(log_partition) is an unbiased estimate of Z if the
    schedule is not adaptive. ``log_partition`` is too low in expectation (Jensen), by half of its variance where that
    is small.

    The error bar comes from families, which are independent but for resampling. The share of a family in the error of
    log Z is the sum of ``weight - 1`` over its chains and all steps, where weights have the mean 1: what the family
    grows by, without what the rounding of copies adds. With one step it is the error bar of importance sampling.

    Args:
        model: A model of any batch shape; all models of the batch are done at once, each with its own population.
        num_chains: C, chains per model, at least 2.
        betas: The number of steps K (evenly spaced), or the schedule itself, [K + 1] from 0 to 1. Or ``"adaptive"``:
            each beta is chosen on the way, the same for all models, so that the least overlap among the models is about
            ``target_overlap`` (L. Barash et al., "GPU accelerated population annealing algorithm", 2017). That takes a
            few sweeps more at each beta, waits for a GPU, and biases exp(log_partition) by a share of the order 1 / C.
        num_sweeps: Sweeps at each beta, at least 1. One is made before the population is resampled, the others after.
            With a single one, copies are still equal where they are weighted next, and among the samples.
        target_overlap: Of an adaptive schedule, the share of the chains that resampling keeps at each step, between 0
            and 1: the sum of ``min(1 / C, weight)`` over weights of sum 1. Copies replace the rest.
        base: The factorial model at beta = 0, as in :func:`gibbs_ext.annealed_importance_sampling`. With ``None``,
            uniform bits, the path is the model itself at each beta, so that ``log_partitions`` and ``energies`` are its
            thermodynamics.
        chain_offset: Number of the first of the C * M chains, or numbers [C, *batch_shape], as in
            :func:`gibbs_ext.bipartite_gibbs`.
        generator: Supplies the seed.
        seed: A 64-bit integer, instead of a generator.

    Returns:
        :class:`PopulationResult`. It does not depend on the number of threads, but for rounding errors of
        ``standard_error`` and ``energies``.

    Raises:
        TypeError, ValueError: An argument has a wrong type or does not fit.
        NotImplementedError: Under torch.vmap, where a parameter is mapped.

        The messages begin with ``population_annealing:``.

    Warns:
        PopulationCollapseWarning: Most chains descend from few. Take more betas, sweeps or chains. (The absence of the
            warning says little: all chains may have missed where most of the probability is.)

    Not differentiable. Sweep number 0 draws from the base, and the others follow. The resampling of a model draws the
    words of its first chain and of 53 units at the sweep numbers from 2^43 on, one number for each step.

    Example:
        >>> model = BipartiteBoltzmann(torch.zeros(4), torch.zeros(3), torch.zeros(4, 3))
        >>> result = population_annealing(model, 100, betas=5, seed=1)
        >>> result.log_partition / math.log(2), result.num_families
        (tensor(7., dtype=torch.float64), tensor(100))
    """
    name = "population_annealing"
    check_model(name, model)
    check_integers(name, 2, num_chains=num_chains)
    check_integers(name, 1, num_sweeps=num_sweeps)
    if isinstance(target_overlap, bool) or not isinstance(target_overlap, (int, float)) or not 0 < target_overlap < 1:
        raise ValueError(f"{name}: target_overlap must be a number between 0 and 1, got {shown(target_overlap)}")
    refuse_vmap(name, model)
    if isinstance(betas, str):
        if betas != "adaptive":
            raise ValueError(f"{name}: betas must be 'adaptive', an integer or a schedule, got {shown(betas)}")
        schedule = None
    else:
        schedule = as_schedule(name, betas, model.device)
    number = as_seed(name, generator, seed, model.device)
    population = Population(name, model, num_chains, base, chain_offset, number)
    if schedule is None:
        for _ in population.anneal_adaptively(target_overlap, num_sweeps):
            pass
        schedule = torch.tensor(population.betas, dtype=torch.float64, device=model.device)
    else:
        for pair in schedule.unfold(0, 2, 1):
            population.resample(*population.weigh(pair))
            population.sweep(pair[1:], num_sweeps - 1)
    return population.result(schedule)


class Population:
    """Chains of a batch of models on their way from the base to the models."""

    def __init__(
        self, name: str, model: Machine, num_chains: int, base: Base, chain_offset: int | Tensor, seed: Tensor
    ) -> None:
        self.name, self.model, self.bases = name, model, base_biases(name, model, base)
        self.shape = (num_chains, *model.batch_shape)
        self.options = {"chain_offset": chain_offset, "seed": seed}
        self.num_sweeps_done = 1  # that of the base's draws
        flat = num_chains, model.batch_shape.numel()
        shape = (*self.shape, model._num_state_units)
        draws = base_draws(name, model, self.bases, shape, **self.options)
        self.z = self.state = draws.to(torch.uint8)
        self.family = torch.arange(num_chains, device=model.device).unsqueeze(1).expand(flat)
        self.excess = torch.zeros(flat, dtype=torch.float64, device=model.device)  # a family's weights - 1, summed up
        self.log_partitions = [base_log_partition(self.bases)]
        # An energy is linear in each unit, and the base's units are independent.
        means = torch.cat([bias.sigmoid() for bias in self.bases], -1)
        self.energies = [model.energy(means).detach().double()]
        self.betas = [0.0]  # of an adaptive schedule

    def _anneal(self, betas: Tensor) -> tuple[Tensor, Tensor]:
        bases_called = {"base_left_bias": "base[0]", "base_right_bias": "base[1]", "base_bias": "base"}
        with reported_as(self.name, **bases_called):
            return self.model._anneal(
                self.state, self.bases, betas, sweep_offset=self.num_sweeps_done, **self.options
            )  # fmt: skip

    def sweep(self, beta: Tensor, num_sweeps: int) -> None:
        """Sweeps at the beta [1]."""
        if num_sweeps:
            self.z, _ = self._anneal(beta.expand(num_sweeps + 1))
            self.state = self.model._state_of(self.z)
            self.num_sweeps_done += num_sweeps

    def weigh(self, pair: Tensor) -> tuple[Tensor, Tensor]:
        """z after a sweep at the second of two betas, and the log-weights [C, models] of the step from the first."""
        z, log_weights = self._anneal(pair)
        return z, log_weights.reshape(self.family.shape)

    def resample(self, z: Tensor, log_weights: Tensor) -> None:
        """Replaces the population by a draw from what :meth:`weigh` returned."""
        weights, log_mean = normalized(log_weights)
        parents = systematic_parents(weights, self._uniform(len(self.energies) - 1))
        self.log_partitions.append(self.log_partitions[-1] + log_mean.reshape(self.shape[1:]))
        energies = self.model.energy(z).detach()
        self.energies.append((weights.reshape(self.shape) * energies).mean(0))
        self.excess.scatter_add_(0, self.family, weights - 1)
        self.family = self.family.gather(0, parents)
        num_models = parents.shape[1]
        rows = parents * num_models + torch.arange(num_models, device=parents.device)
        self.z = z.reshape(-1, z.shape[-1]).index_select(0, rows.flatten()).reshape(z.shape)
        self.state = self.model._state_of(self.z)
        self.num_sweeps_done += 1

    def _uniform(self, step: int) -> Tensor:
        """A uniform number of each model [models], the same on every device."""
        numbers, device = self.options["chain_offset"], self.model.device
        of_first = (
            expand_to(self.name, "chain_offset", numbers, self.shape)[0] if isinstance(numbers, Tensor) else numbers
        )
        bias = torch.zeros(_UNIFORM_BITS.num_nodes, device=device)
        bits = graph_gibbs(
            bias.expand(*self.shape[1:], -1), bias, bias[:0], _UNIFORM_BITS, 1, chain_offset=of_first,
            sweep_offset=_FIRST_UNIFORM + step, seed=self.options["seed"],
        )  # fmt: skip
        places = torch.arange(len(bias), device=device)
        return (bits.long() << places).sum(-1).flatten().double() * 2.0 ** -len(bias)

    def anneal_adaptively(self, target_overlap: float, num_sweeps: int) -> Iterator[Tensor]:
        """Anneals to beta = 1 by steps of about this overlap, and yields the log-weights [C, models] of each."""
        step = 1.0
        while (beta := self.betas[-1]) < 1:
            z, log_weights, following = self._next(beta, step, 1 - target_overlap)
            step = following - beta
            self.betas.append(following)
            self.resample(z, log_weights)
            self.sweep(torch.tensor([following], dtype=torch.float64), num_sweeps - 1)
            yield log_weights

    def _next(self, beta: float, step: float, target: float) -> tuple[Tensor, Tensor, float]:
        """What :meth:`weigh` returns for the next beta, where about ``target`` of a population is culled, and it."""
        low, high, trial = beta, math.inf, min(beta + step, 1.0)
        for _ in range(_MOST_TRIALS):
            z, log_weights = self.weigh(torch.tensor([beta, trial], dtype=torch.float64))
            culled = 1 - normalized(log_weights)[0].clamp(max=1).mean(0)
            worst = float(culled.max()) if culled.numel() else 0.0
            if worst < 1.1 * target and (worst > 0.9 * target or trial == 1):
                return z, log_weights, trial
            low, high = (low, trial) if worst > target else (trial, high)
            # What is culled is about proportional to the step.
            proposal = min(beta + (trial - beta) * target / max(worst, 1e-9), 1.0)
            trial = proposal if low < proposal < high else (low + high) / 2
        # Rounding errors of huge fields make weights jump from one number to the next.
        high = min(high, 1.0)
        return *self.weigh(torch.tensor([beta, high], dtype=torch.float64)), high

    def result(self, betas: Tensor) -> PopulationResult:
        num_chains, num_models = self.family.shape
        error = (self.excess.square().mean(0) / (num_chains - 1)).sqrt()
        sizes = torch.zeros(num_chains, num_models, dtype=torch.int64, device=self.family.device)
        sizes.scatter_add_(0, self.family, torch.ones_like(sizes))
        log_partitions = torch.stack(self.log_partitions)
        result = PopulationResult(
            log_partitions[-1], error.reshape(self.shape[1:]), self.z.to(self.model.dtype), sizes.reshape(self.shape),
            betas, log_partitions, torch.stack(self.energies),
        )  # fmt: skip
        effective = result.effective_families
        if is_readable(effective) and bool((effective < min(_LEAST_FAMILIES, num_chains / 4)).any()):
            warn(
                f"{self.name}: most of the {num_chains} chains descend from few: as many as "
                f"{float(effective.min()):.1f} families count; log_partition and standard_error are not to be believed "
                "(take more betas, more sweeps or more chains)",
                PopulationCollapseWarning,
            )
        return result


def normalized(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weights [C, models] divided by their means, and the logarithms of the means [models].

    They are summed up one after the other, so that the sums do not depend on the number of threads.
    """
    largest = log_weights.amax(0)
    weights = (log_weights - largest).exp()
    mean = weights.cumsum(0)[-1] / len(weights)
    return weights / mean, largest + mean.log()


def systematic_parents(weights: Tensor, uniform: Tensor) -> Tensor:
    """Whose copy each chain of a resampled population is, [C, models] in rising order.

    Args:
        weights: [C, models] float64, of mean 1. A chain gets as many copies, rounded up or down.
        uniform: [models] float64, in [0, 1).
    """
    ends = weights.cumsum(0).mT.contiguous()
    points = torch.arange(len(weights), device=weights.device) + uniform.unsqueeze(1)
    return torch.searchsorted(ends, points, right=True).clamp(max=len(weights) - 1).mT
