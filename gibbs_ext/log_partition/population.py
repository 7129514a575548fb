# SPDX-License-Identifier: Apache-2.0
"""Population annealing: chains that are resampled by their weights while they are annealed."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gibbs_ext.arguments import as_seed
from gibbs_ext.checks import check_integers, expand_to, is_readable, reported_as, shown, warn
from gibbs_ext.functional import graph_gibbs
from gibbs_ext.graphs import ColoredGraph
from gibbs_ext.log_partition.annealing import (
    BASES_CALLED,
    Base,
    Betas,
    as_schedule,
    base_biases,
    base_draws,
    base_log_partition,
)
from gibbs_ext.log_partition.machine import Machine, check_model, refuse_vmap
from gibbs_ext.progress import shown_progress

# The effective number of families below which their spread tells little of the error.
_LEAST_FAMILIES = 20
# Fair bits of one uniform number, and the sweep that draws them first: far beyond those of the chains.
_UNIFORM_BITS = ColoredGraph(53, [])
_FIRST_UNIFORM = 2**43
_MOST_TRIALS = 50
_OVERLAP = 0.9
_FIRST_PILOT = 2**47  # the first chain that measures a schedule


class PopulationCollapseWarning(UserWarning):
    """Most of a population descends from few of its first chains, so that log Z and its error bar cannot be believed.

    The effective number of families, :attr:`PopulationResult.effective_families`, is less than 20, or than a quarter of
    the chains. In 200 runs of spin glasses, error bars of 95 % covered log Z in 90 to 95 % with 20 and more, and in 60
    to 80 % with 3 or 4. It is not checked on a GPU, because reading it would synchronise.
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
        return effective_families(self.family_sizes)

    @property
    def family_entropy(self) -> Tensor:
        """``- sum n log n`` over the shares n of the families, [M] float64 from 0 to log C.

        ``C / exp(family_entropy)`` is their entropic size rho_s (Wang, Machta and Katzgraber 2015).
        """
        shares = self.family_sizes.double() / len(self.family_sizes)
        return -shares.xlogy(shares).sum(0)


def effective_families(family_sizes: Tensor) -> Tensor:
    return len(family_sizes) / family_sizes.double().square().mean(0)


@torch.no_grad()
def population_annealing(
    model: Machine,
    num_chains: int,
    betas: Betas | str,
    *,
    num_sweeps: int = 10,
    target_overlap: float = _OVERLAP,
    base: Base = "field",
    chain_offset: int | Tensor = 0,
    progress: bool = False,
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
        progress: Whether to show a progress bar (tqdm).
        generator: Supplies the seed.
        seed: A 64-bit integer, instead of a generator.

    Returns:
        :class:`PopulationResult`. It does not depend on the number of threads, but for rounding errors of
        ``standard_error`` and ``energies``.

    Raises:
        TypeError, ValueError: An argument has a wrong type or does not fit.
        NotImplementedError: Under torch.vmap, where a tensor is mapped or each row has a seed of its own.

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
    refuse_vmap(name, model)
    number = as_seed(name, generator, seed, model.device)
    refuse_vmap(name, model, number, chain_offset)
    population = Population(name, model, num_chains, base, chain_offset, number)
    # An energy is linear in each unit, and the base's units are independent.
    means = torch.cat([bias.sigmoid() for bias in population.bases], -1)
    found, log_partitions, energies = [], [population.log_partition], [model.energy(means).detach().double()]
    for beta, _ in shown_progress(name, population.anneal(betas, num_sweeps, target_overlap), progress):
        found.append(beta)
        log_partitions.append(population.log_partition)
        energies.append(model.energy(population.z).detach().mean(0, dtype=torch.float64))
    sizes = population.family_sizes()
    schedule = torch.cat([torch.zeros_like(found[0]), *found]).to(model.device)
    warn_of_collapse(name, sizes, "take more betas, more sweeps or more chains")
    return PopulationResult(
        population.log_partition, population.standard_error(), population.z.to(model.dtype), sizes, schedule,
        torch.stack(log_partitions), torch.stack(energies),
    )  # fmt: skip


@torch.no_grad()
def adaptive_betas(
    model: Machine,
    num_steps: int,
    *,
    num_chains: int = 200,
    num_sweeps: int = 5,
    base: Base = "field",
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """A schedule with more of its steps where they are hard, for annealing from a factorial model to this one.

    The standard deviation of the log-weights of a small step is its thermodynamic length. Of as many steps, those of
    equal length give log Z the least variance, if chains keep up with the path (A. Gelman and X.-L. Meng, "Simulating
    normalizing constants", 1998; G. E. Crooks, "Measuring thermodynamic length", 2007). Where chains mix slowly they
    need steps that the lengths do not show. So steps have equal sums of their shares in the length and in beta: none is
    longer than two even ones. A short run of :func:`gibbs_ext.population_annealing`, which finds its own betas,
    measures the lengths.

    Args:
        model: A model of any batch shape. All models share the schedule; at each beta the longest of their lengths
            counts.
        num_steps: K, number of steps.
        num_chains: Chains of the run per model, at least 2.
        num_sweeps: Sweeps of the run at each beta, at least 1.
        base: The factorial model at beta = 0, which must be that of the run for which the schedule is meant.
        generator: Supplies the seed.
        seed: A 64-bit integer, instead of a generator. It may be that of the run for which the schedule is meant: the
            chains have numbers from 2^47 on here.

    Returns:
        [K + 1] float64 on the model's device, rising from 0 to 1: ``betas`` of
        :func:`gibbs_ext.annealed_importance_sampling`, :func:`gibbs_ext.bracket_log_partition`,
        :func:`gibbs_ext.population_annealing` or ``log_partition`` of a model.

    Raises:
        TypeError, ValueError: An argument has a wrong type or does not fit.
        NotImplementedError: Under torch.vmap, where a tensor is mapped or each row has a seed of its own.

        The messages begin with ``adaptive_betas:``.

    Not differentiable.
    """
    name = "adaptive_betas"
    check_model(name, model)
    check_integers(name, 1, num_steps=num_steps, num_sweeps=num_sweeps)
    check_integers(name, 2, num_chains=num_chains)
    refuse_vmap(name, model)
    number = as_seed(name, generator, seed, model.device)
    refuse_vmap(name, model, number)
    population = Population(name, model, num_chains, base, _FIRST_PILOT, number)
    betas, lengths = [0.0], [0.0]
    for beta, log_weights in population.anneal("adaptive", num_sweeps):
        longest = float(log_weights.std(0).max()) if log_weights.numel() else 0.0
        lengths.append(lengths[-1] + longest)
        betas.append(float(beta))
    share = np.array(lengths) / lengths[-1] if lengths[-1] else betas
    schedule = np.interp(np.linspace(0, 1, num_steps + 1), np.add(share, betas) / 2, betas)
    return torch.from_numpy(schedule).to(model.device)


def warn_of_collapse(name: str, family_sizes: Tensor, remedy: str) -> bool:
    """Gives the warning if the families of sizes [C, M] are too few, and says whether it did."""
    num_chains, effective = len(family_sizes), effective_families(family_sizes)
    if not is_readable(effective) or not bool((effective < min(_LEAST_FAMILIES, num_chains / 4)).any()):
        return False
    warn(
        f"{name}: most of the {num_chains} chains descend from few: as many as {float(effective.min()):.1f} families "
        f"count; log_partition and standard_error are not to be believed ({remedy})",
        PopulationCollapseWarning,
    )
    return True


class Population:
    """Chains of a batch of models, on their way from the base to the models, and their families."""

    def __init__(
        self, name: str, model: Machine, num_chains: int, base: Base, chain_offset: int | Tensor, seed: Tensor
    ) -> None:
        self.name, self.model, self.bases = name, model, base_biases(name, model, base)
        self.shape = (num_chains, *model.batch_shape)
        self.options = {"chain_offset": chain_offset, "seed": seed}
        self.num_sweeps_done, self.num_resamplings = 1, 0  # a sweep for the base's draws
        flat = num_chains, model.batch_shape.numel()
        draws = base_draws(name, model, self.bases, (*self.shape, model._num_state_units), **self.options)
        self.z = self.state = draws.to(torch.uint8)
        self.log_partition = base_log_partition(self.bases)
        self.family = torch.arange(num_chains, device=model.device).unsqueeze(1).expand(flat)
        # The sums of (weight - 1) over the chains of each family and all steps.
        self.excess = torch.zeros(flat, dtype=torch.float64, device=model.device)

    def standard_error(self) -> Tensor:
        """That of ``log_partition``, [M]."""
        return (self.excess.square().mean(0) / (len(self.excess) - 1)).sqrt().reshape(self.shape[1:])

    def family_sizes(self) -> Tensor:
        sizes = torch.zeros_like(self.excess, dtype=torch.int64)
        return sizes.scatter_add_(0, self.family, torch.ones_like(sizes)).reshape(self.shape)

    def anneal(
        self, betas: Betas | str, num_sweeps: int, target_overlap: float = _OVERLAP
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Anneals by a schedule or by steps of about this overlap. Yields each beta [1] and log-weights [C, models]."""
        name = self.name
        number: object = target_overlap
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < 1:
            raise ValueError(f"{name}: target_overlap must be a number between 0 and 1, got {shown(number)}")
        if not isinstance(betas, str):
            for pair in as_schedule(name, betas, self.model.device).unfold(0, 2, 1):
                z, log_weights = self._weigh(pair)
                self._resample_and_sweep(z, log_weights, pair[1:], num_sweeps)
                yield pair[1:], log_weights
            return
        if betas != "adaptive":
            raise ValueError(f"{name}: betas must be 'adaptive', an integer or a schedule, got {shown(betas)}")
        beta, step = 0.0, 1.0
        while beta < 1:
            z, log_weights, following = self._next(beta, step, 1 - target_overlap)
            beta, step = following, following - beta
            reached = torch.tensor([beta], dtype=torch.float64)
            self._resample_and_sweep(z, log_weights, reached, num_sweeps)
            yield reached, log_weights

    def _next(self, beta: float, step: float, target: float) -> tuple[Tensor, Tensor, float]:
        """What :meth:`_weigh` returns for the next beta, where about ``target`` of a population is culled, and it."""
        low, high, trial = beta, math.inf, min(beta + step, 1.0)
        for _ in range(_MOST_TRIALS):
            z, log_weights = self._weigh(torch.tensor([beta, trial], dtype=torch.float64))
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
        return *self._weigh(torch.tensor([beta, high], dtype=torch.float64)), high

    def _weigh(self, pair: Tensor) -> tuple[Tensor, Tensor]:
        """z after a sweep at the second of two betas, and the log-weights [C, models] of the step from the first."""
        z, log_weights = self._anneal(pair)
        return z, log_weights.reshape(self.family.shape)

    def _anneal(self, betas: Tensor) -> tuple[Tensor, Tensor]:
        with reported_as(self.name, **BASES_CALLED):
            return self.model._anneal(self.state, self.bases, betas, sweep_offset=self.num_sweeps_done, **self.options)

    def _resample_and_sweep(self, z: Tensor, log_weights: Tensor, beta: Tensor, num_sweeps: int) -> None:
        """Resamples what :meth:`_weigh` returned, and makes the other sweeps at the new beta [1]."""
        self.num_sweeps_done += 1
        self.resample(z, log_weights)
        if num_sweeps > 1:
            z, _ = self._anneal(beta.expand(num_sweeps))
            self.keep(z, num_sweeps - 1)

    def keep(self, z: Tensor, num_sweeps: int) -> None:
        """Replaces the population by what so many sweeps have made of it."""
        self.z, self.state = z, self.model._state_of(z)
        self.num_sweeps_done += num_sweeps

    def resample(self, z: Tensor, log_weights: Tensor) -> None:
        """Replaces the population by a draw from z [C, *M, N] of these log-weights [C, models]."""
        weights, log_mean = normalized(log_weights)
        parents = systematic_parents(weights, self._uniform())
        self.num_resamplings += 1
        self.log_partition = self.log_partition + log_mean.reshape(self.shape[1:])
        self.excess.scatter_add_(0, self.family, weights - 1)
        self.family = self.family.gather(0, parents)
        num_models = parents.shape[1]
        rows = parents * num_models + torch.arange(num_models, device=parents.device)
        self.keep(z.reshape(-1, z.shape[-1]).index_select(0, rows.flatten()).reshape(z.shape), 0)

    def _uniform(self) -> Tensor:
        """A uniform number of each model [models], the same on every device."""
        numbers, device = self.options["chain_offset"], self.model.device
        if isinstance(numbers, Tensor):
            numbers = expand_to(self.name, "chain_offset", numbers, self.shape)[0]  # those of the first chains
        bias = torch.zeros(_UNIFORM_BITS.num_nodes, device=device)
        bits = graph_gibbs(
            bias.expand(*self.shape[1:], -1), bias, bias[:0], _UNIFORM_BITS, 1, chain_offset=numbers,
            sweep_offset=_FIRST_UNIFORM + self.num_resamplings, seed=self.options["seed"],
        )  # fmt: skip
        places = torch.arange(len(bias), device=device)
        return (bits.long() << places).sum(-1).flatten().double() * 2.0 ** -len(bias)


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
