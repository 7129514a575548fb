# SPDX-License-Identifier: Apache-2.0
"""Population annealing: unbiased estimates, error bars, samples, families, collapse, and what is refused."""

import doctest
import math
import re
import warnings

import pytest
import torch
from graph_support import random_graph, random_graph_parameters
from support import assert_close, assert_same_bits, random_bits, random_parameters, z_threshold

from gibbs_ext import (
    BipartiteBoltzmann,
    ChimeraGraph,
    GraphBoltzmann,
    PopulationCollapseWarning,
    adaptive_betas,
    annealed_importance_sampling,
    exact_log_partition,
    ising_to_boltzmann,
    population_annealing,
)
from gibbs_ext.log_partition import population
from gibbs_ext.log_partition.population import Population, systematic_parents

GRAPH = random_graph(9, 20, seed=4)
SEEDS = 200


def bipartite(scale: float = 1.0) -> BipartiteBoltzmann:
    return BipartiteBoltzmann(*random_parameters(10, 8, dtype=torch.float64, scale=scale))


def on_graph(scale: float = 1.0) -> GraphBoltzmann:
    return GraphBoltzmann(GRAPH, *random_graph_parameters(GRAPH, ((), ()), dtype=torch.float64, scale=scale))


def spin_glass(coupling: float) -> GraphBoltzmann:
    """Spins on a Chimera graph of 2 x 2 cells, with couplings of both signs and weak fields."""
    graph = ChimeraGraph(2)
    signs = 2 * random_bits(graph.num_edges, dtype=torch.float64) - 1
    fields = 0.3 * torch.randn(graph.num_nodes).double()
    return GraphBoltzmann(graph, *ising_to_boltzmann(fields, coupling * signs, graph)[:2])


# log Z and its error bar --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [bipartite, on_graph])
@pytest.mark.parametrize(("betas", "num_sweeps"), [(3, 1), (20, 1), (10, 4), ("adaptive", 2)])
def test_log_partition_is_unbiased_and_its_error_bar_covers_as_often_as_it_says(make, betas, num_sweeps: int) -> None:
    """Over 200 seeds, which are the models of a batch here. Binomial limits of probability 1e-6: 0.86 and 0.995."""
    model = make(2.0)
    exact = exact_log_partition(model)
    result = population_annealing(model.expand((SEEDS,)), 400, betas, num_sweeps=num_sweeps, seed=1)
    assert result.log_partition.shape == result.standard_error.shape == (SEEDS,)
    errors = result.log_partition - exact
    assert 0.86 < (errors.abs() < 1.96 * result.standard_error).double().mean() < 0.996
    # The spread of 200 repetitions is known to 5 %.
    assert 0.75 < errors.std() / result.standard_error.mean() < 1.25
    ratios = errors.exp()
    assert (ratios.mean() - 1).abs() < z_threshold() * ratios.std() / SEEDS**0.5
    # Planted fault: log Z of a model that is slightly hotter.
    hot = model._mapped(lambda tensor, _: 0.97 * tensor)
    ratios = (result.log_partition - exact_log_partition(hot)).exp()
    assert (ratios.mean() - 1).abs() > z_threshold() * ratios.std() / SEEDS**0.5


def test_error_bars_of_a_spin_glass_whose_families_barely_count() -> None:
    """The variance of log Z is a hundred times that of independent steps here, since chains forget their start late."""
    model = spin_glass(2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PopulationCollapseWarning)
        result = population_annealing(model.expand((SEEDS,)), 1000, 20, num_sweeps=2, seed=1)
    assert 20 < result.effective_families.mean() < 200
    errors = result.log_partition - exact_log_partition(model)
    assert 0.86 < (errors.abs() < 1.96 * result.standard_error).double().mean() < 0.996
    assert 0.75 < errors.std() / result.standard_error.mean() < 1.25


@pytest.mark.parametrize("make", [bipartite, on_graph])
def test_one_step_is_importance_sampling(make) -> None:
    model = make().expand((3,))
    ours = population_annealing(model, 50, 1, seed=5, chain_offset=7)
    theirs = annealed_importance_sampling(model, 50, 1, seed=5, chain_offset=7)
    assert_close(ours.log_partition, theirs.log_partition, 1e-12)
    assert_close(ours.standard_error, theirs.standard_error, 1e-12)


@pytest.mark.parametrize("make", [bipartite, on_graph])
def test_every_beta_has_its_log_partition_and_its_energy(make) -> None:
    model = make()
    result = population_annealing(model, 20_000, 8, base=None, seed=1)
    assert_close(result.betas, torch.linspace(0, 1, 9).double(), 1e-15)
    assert result.log_partitions.shape == result.energies.shape == (9,)
    assert result.log_partitions[-1] == result.log_partition
    for beta, log_partition, energy in zip(result.betas, result.log_partitions, result.energies, strict=True):
        at_beta = model._mapped(lambda tensor, _, beta=beta: beta * tensor)
        assert (log_partition - exact_log_partition(at_beta)).abs() < z_threshold() * result.standard_error + 1e-9
        mean = (at_beta.entropy() - exact_log_partition(at_beta)) / beta if beta else model.energy(at_beta.mean)
        # A unit of energy is about its standard deviation, of which 20,000 chains know the mean to 0.7 % at least.
        assert (energy - mean).abs() < 0.1
    assert (result.energies.diff() < -0.1).all()


# Samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [bipartite, on_graph])
@pytest.mark.parametrize("num_sweeps", [1, 3])
def test_populations_weighted_by_their_estimates_have_the_models_mean(make, num_sweeps: int) -> None:
    """That is exact for populations of any size (Machta 2010): these are so small that resampling matters."""
    model, count = make(), 4000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PopulationCollapseWarning)
        result = population_annealing(model.expand((count,)), 10, 3, num_sweeps=num_sweeps, seed=1)
    assert result.samples.shape == (10, count, model.num_units)
    assert result.samples.dtype == model.dtype
    means = result.samples.mean(0)
    ratios = (result.log_partition - exact_log_partition(model)).exp().unsqueeze(-1)
    excesses = ratios * (means - model.mean)
    z = excesses.mean(0) / excesses.std(0) * count**0.5
    assert z.abs().max() < z_threshold(model.num_units)
    # Planted fault: the chains as they start, from the base.
    base = Population("", model.expand((count,)), 10, "field", 0, torch.tensor(1))
    z, _ = base._weigh(torch.zeros(2).double())
    excesses = z.double().mean(0) - model.mean
    assert (excesses.mean(0) / excesses.std(0) * count**0.5).abs().max() > z_threshold(model.num_units)


def test_copies_are_drawn_systematically() -> None:
    weights = torch.tensor([[0.0, 2.5], [1.2, 0.5], [2.8, 0.0], [0.0, 1.0]]).double()
    uniforms = (torch.arange(1000).double() + 0.5) / 1000
    copies = torch.zeros(1000, 4, 2)
    for i, uniform in enumerate(uniforms):
        parents = systematic_parents(weights, uniform.expand(2))
        assert (parents.diff(dim=0) >= 0).all()
        for model in range(2):
            copies[i, :, model] = torch.bincount(parents[:, model], minlength=4)
    assert ((copies >= weights.floor()) & (copies <= weights.ceil())).all()
    assert_close(copies.mean(0).double(), weights, 1e-3)
    # A uniform number next to 1 and sums that are rounded name no chain too many.
    ones = torch.full((3, 1), 1 / 3).double() * 3 * (1 - 2**-53)
    assert systematic_parents(ones, torch.tensor([1 - 2**-53]).double()).flatten().tolist() == [0, 1, 2]


def test_random_numbers_of_resampling_are_uniform_and_each_models_own() -> None:
    models = bipartite().expand((10, 50))
    start = Population("", models, 2, "field", 0, torch.tensor(1))
    numbers = []
    for start.num_resamplings in range(20):
        numbers.append(start._uniform())
    numbers = torch.stack(numbers)
    assert numbers.shape == (20, 500)
    assert len(numbers.unique()) == 10_000
    for power in (1, 2, 3):
        deviation = (numbers**power).mean() - 1 / (power + 1)
        assert deviation.abs() < z_threshold() * (numbers**power).std() / 100
    chains = torch.arange(1000).reshape(2, 10, 50) + 3
    assert (
        Population("", models, 2, "field", chains, torch.tensor(1))
        ._uniform()
        .equal(Population("", models, 2, "field", 3, torch.tensor(1))._uniform())
    )


def bits_of(*args, **options):
    """What is the same to the bit for a seed."""
    result = population_annealing(*args, num_sweeps=2, **options)
    return result.samples, result.log_partitions, result.family_sizes, result.betas


@pytest.mark.parametrize("betas", [20, "adaptive"])
def test_results_do_not_depend_on_the_number_of_threads(betas, threads) -> None:
    """There are so many chains that PyTorch would share sums over them among threads."""
    model = BipartiteBoltzmann(*random_parameters(3, 3))
    torch.set_num_threads(1)
    first = bits_of(model, 70_000, betas, seed=1)
    torch.set_num_threads(3)
    assert_same_bits(bits_of(model, 70_000, betas, seed=1), first)


@pytest.mark.parametrize("make", [bipartite, on_graph])
@pytest.mark.parametrize("betas", [3, "adaptive"])
def test_results_depend_on_the_seed_alone(make, betas) -> None:
    one = make()
    model = one.expand((2,))
    first = bits_of(model, 1000, betas, seed=1)
    assert_same_bits(bits_of(model, 1000, betas, seed=1), first)
    assert_same_bits(bits_of(model, 1000, betas, seed=1, chain_offset=torch.arange(2000).reshape(1000, 2)), first)
    assert_same_bits(*(bits_of(model, 1000, betas, generator=torch.Generator().manual_seed(3)) for _ in range(2)))
    for other in ({"seed": 2}, {"seed": 1, "chain_offset": 1}):
        assert not bits_of(model, 1000, betas, **other)[0].equal(first[0])
    if betas == 3:
        # A model of a batch is as if it were alone, with the same chains.
        alone = bits_of(one, 1000, 3, seed=1, chain_offset=torch.arange(1000) * 2 + 1)
        assert_same_bits([alone[0], alone[2]], [first[0][:, 1], first[2][:, 1]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_and_empty_batches(dtype: torch.dtype) -> None:
    model = BipartiteBoltzmann(*random_parameters(5, 4, dtype=dtype))
    result = population_annealing(model, 400, 5, seed=1)
    assert result.samples.dtype == dtype
    assert result.energies.dtype == result.log_partition.dtype == torch.float64
    assert (result.log_partition - exact_log_partition(model)).abs() < z_threshold() * result.standard_error
    for betas in (3, "adaptive"):
        assert population_annealing(model.expand((0, 2)), 10, betas).samples.shape == (10, 0, 2, 9)


# Families ---------------------------------------------------------------------------------------------------------


def test_families_are_counted() -> None:
    result = population_annealing(bipartite(), 4, 1)
    sizes = result._replace(family_sizes=torch.tensor([[3, 1], [0, 1], [1, 1], [0, 1]]))
    assert sizes.num_families.tolist() == [2, 4]
    assert sizes.largest_family.tolist() == [3, 1]
    assert sizes.mean_square_family_size.tolist() == [2.5, 1]
    assert sizes.effective_families.tolist() == [1.6, 4]
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert_close(sizes.family_entropy, torch.tensor([entropy, math.log(4)], dtype=torch.float64), 1e-12)


def test_families_descend_from_the_first_chains() -> None:
    """One unit that its field holds at 1: only the first chains that have it there may have descendants."""
    model = BipartiteBoltzmann(torch.tensor([40.0]), torch.zeros(1), torch.zeros(1, 1))
    result = population_annealing(model, 1000, 1, base=None, seed=1)
    start = Population("", model, 1000, None, 0, torch.tensor(1)).z.flatten()
    assert 400 < start.sum() < 600
    assert ((result.family_sizes > 0) == (start == 1)).all()
    assert result.family_sizes.sum() == 1000
    assert result.samples[:, 0].all()


def test_models_without_couplings_are_exact() -> None:
    model = BipartiteBoltzmann(torch.randn(4).double(), torch.randn(3).double(), torch.zeros(4, 3).double())
    for betas, steps in ((5, 5), ("adaptive", 1)):
        result = population_annealing(model, 100, betas, seed=1)
        assert len(result.betas) == steps + 1
        assert_close(result.log_partition, exact_log_partition(model), 1e-6)
        assert result.standard_error < 1e-6
        assert result.num_families == 100


def test_a_collapsed_population_warns_and_is_wrong() -> None:
    model = spin_glass(8.0)
    text = r"most of the 400 chains descend from few: as many as [\d.]+ families count; log_partition and"
    with pytest.warns(PopulationCollapseWarning, match=f"^population_annealing: {text}") as caught:
        result = population_annealing(model.expand((SEEDS,)), 400, 20, num_sweeps=1, seed=1)
    assert caught[0].filename == __file__
    assert (result.effective_families < 20).all()
    errors = result.log_partition - exact_log_partition(model)
    assert (errors.abs() < 1.96 * result.standard_error).double().mean() < 0.8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good = population_annealing(model, 1000, 200, seed=1)
        population_annealing(bipartite(), 8, 10, seed=1)  # few chains are no collapse
    assert (good.log_partition - exact_log_partition(model)).abs() < z_threshold() * good.standard_error
    # One model of a batch is enough.
    couplings = torch.stack((model.coupling, 0 * model.coupling))
    with pytest.warns(PopulationCollapseWarning):
        population_annealing(GraphBoltzmann(model.graph, model.bias, couplings), 400, 20, num_sweeps=1, seed=1)


# Adaptive schedules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.8, 0.95])
def test_adaptive_steps_have_the_overlap_that_is_asked_for(target: float) -> None:
    strong = bipartite(4.0)
    model = BipartiteBoltzmann(*(torch.stack((0.1 * p, p)) for p in strong._parameters))
    start = Population("", model, 1000, "field", 0, torch.tensor(1))
    found, log_weights = zip(*start.anneal("adaptive", 2, target), strict=True)
    betas = torch.cat([torch.zeros(1).double(), *found])
    assert betas[-1] == 1
    assert (betas.diff() > 0).all()
    weights = torch.stack(log_weights).softmax(1)
    overlaps = weights.clamp(max=1 / 1000).sum(1)
    # The strong model is the one that decides, and the last step is shorter than others.
    culled = 1 - overlaps[:-1, 1]
    assert ((culled > 0.9 * (1 - target)) & (culled < 1.1 * (1 - target))).all()
    assert (overlaps[:, 0] > overlaps[:, 1]).all()
    assert overlaps[-1, 1] > 1 - 1.1 * (1 - target)
    result = population_annealing(model, 1000, "adaptive", num_sweeps=2, target_overlap=target, seed=1)
    assert_close(result.betas, betas, 0)


@pytest.mark.parametrize("scale", [1e2, 1e8])
def test_adaptive_steps_of_huge_couplings_come_to_an_end(scale: float) -> None:
    model = BipartiteBoltzmann(torch.zeros(6), torch.zeros(6), scale * torch.randn(6, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = population_annealing(model, 100, "adaptive", base=None, num_sweeps=1, seed=1)
    assert result.betas[-1] == 1
    assert len(result.betas) < 1000
    assert result.log_partition.isfinite()


def of_two_modes() -> BipartiteBoltzmann:
    return BipartiteBoltzmann(*(torch.full((12,), -5.4) for _ in range(2)), torch.ones(12, 12))


@pytest.mark.parametrize("make", [lambda: spin_glass(4.0), of_two_modes])
def test_adaptive_betas_have_steps_of_equal_shares_and_make_estimates_better(make) -> None:
    model = make()
    betas = adaptive_betas(model, 40, seed=1)
    assert betas.dtype == torch.float64
    assert betas.shape == (41,)
    assert betas[0] == 0
    assert betas[-1] == 1
    assert ((betas.diff() > 0) & (betas.diff() < 2 / 40 + 1e-9)).all()
    exact, spread = exact_log_partition(model), {}
    for name, schedule in {"even": 40, "adaptive": betas}.items():
        result = annealed_importance_sampling(model.expand((SEEDS,)), 400, schedule, seed=1)
        spread[name] = (result.log_partition - exact).square().mean().sqrt()
    # Each is known to 5 %.
    assert spread["adaptive"] < 0.9 * spread["even"]
    assert_same_bits(adaptive_betas(model, 40, seed=1), betas)
    assert not adaptive_betas(model, 40, seed=2).equal(betas)


def test_estimates_with_adaptive_betas_of_the_same_seed_are_unbiased() -> None:
    model = bipartite(2.0)
    exact, errors, covered = exact_log_partition(model), [], 0
    for seed in range(SEEDS):
        betas = adaptive_betas(model, 5, num_chains=20, num_sweeps=1, seed=seed)
        result = annealed_importance_sampling(model, 100, betas, seed=seed)
        errors.append(result.log_partition - exact)
        covered += bool(errors[-1].abs() < 1.96 * result.standard_error)
    ratios = torch.stack(errors).exp()
    assert (ratios.mean() - 1).abs() < z_threshold() * ratios.std() / SEEDS**0.5
    assert 0.86 < covered / SEEDS < 0.996


def test_the_chains_that_measure_a_schedule_have_numbers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bipartite(2.0)
    betas = adaptive_betas(model, 5, seed=1)
    monkeypatch.setattr(population, "_FIRST_PILOT", 0)
    assert not adaptive_betas(model, 5, seed=1).equal(betas)


def test_adaptive_betas_of_a_batch_and_of_nothing() -> None:
    strong = bipartite(4.0)
    both = BipartiteBoltzmann(*(torch.stack((0 * p, p)) for p in strong._parameters))
    chains = {"num_chains": 1000, "num_sweeps": 2}
    assert_close(adaptive_betas(both, 10, seed=1, **chains), adaptive_betas(strong, 10, seed=1, **chains), 0.05)
    even = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert_close(adaptive_betas(both.expand((0, 2)), 10), even, 1e-12)
    assert_close(adaptive_betas(BipartiteBoltzmann(*(0 * p for p in strong._parameters)), 10), even, 1e-12)


@pytest.mark.parametrize(
    ("error", "text", "options"),
    [
        (TypeError, "model must be a BipartiteBoltzmann or a GraphBoltzmann, got int", {"model": 1}),
        (ValueError, "num_steps must be at least 1, got 0", {"num_steps": 0}),
        (ValueError, "num_chains must be at least 2, got 1", {"num_chains": 1}),
        (ValueError, "num_sweeps must be at least 1, got 0", {"num_sweeps": 0}),
        (ValueError, "base must be 'field', 'bias', None or a pair of biases, got 'data'", {"base": "data"}),
        (ValueError, "give generator or seed, not both", {"generator": torch.Generator(), "seed": 1}),
    ],
)
def test_bad_arguments_of_adaptive_betas(error, text: str, options: dict) -> None:
    with pytest.raises(error, match=f"^adaptive_betas: {re.escape(text)}"):
        adaptive_betas(**{"model": bipartite(), "num_steps": 3} | options)


# Arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "text", "options"),
    [
        (TypeError, "model must be a BipartiteBoltzmann or a GraphBoltzmann, got int", {"model": 1}),
        (ValueError, "num_chains must be at least 2, got 1", {"num_chains": 1}),
        (TypeError, "num_chains must be an integer, got 2.5", {"num_chains": 2.5}),
        (ValueError, "num_sweeps must be at least 1, got 0", {"num_sweeps": 0}),
        (ValueError, "betas must be at least 1, got 0", {"betas": 0}),
        (ValueError, "betas must rise from 0 to 1, got 0 to 0.5", {"betas": [0.0, 0.5]}),
        (ValueError, "betas must be 'adaptive', an integer or a schedule, got 'fast'", {"betas": "fast"}),
        (ValueError, "target_overlap must be a number between 0 and 1, got 1", {"target_overlap": 1}),
        (ValueError, "target_overlap must be a number between 0 and 1, got 'most'", {"target_overlap": "most"}),
        (ValueError, "base must be 'field', 'bias', None or a pair of biases, got 'data'", {"base": "data"}),
        ((ValueError, RuntimeError), "base[1] must be finite", {"base": (torch.zeros(1), torch.tensor([math.nan]))}),
        (ValueError, "chain_offset must ", {"chain_offset": -1}),
        ((ValueError, RuntimeError), "chain_offset [4] does not broadcast", {"chain_offset": torch.arange(4)}),
        (ValueError, "give generator or seed, not both", {"generator": torch.Generator(), "seed": 1}),
    ],
)
def test_bad_arguments(error, text: str, options: dict) -> None:
    model = BipartiteBoltzmann(torch.zeros(1), torch.zeros(1), torch.zeros(1, 1))
    with pytest.raises(error, match=f"^population_annealing: {re.escape(text)}"):
        population_annealing(**{"model": model, "num_chains": 5, "betas": 3} | options)


def test_vmap_is_refused() -> None:
    def of_row(weight):
        return population_annealing(BipartiteBoltzmann(torch.zeros(2), torch.zeros(2), weight), 5, 3).log_partition

    with pytest.raises(NotImplementedError, match=r"^population_annealing: torch.vmap is not supported"):
        torch.vmap(of_row)(torch.zeros(3, 2, 2))
    model = BipartiteBoltzmann(torch.zeros(2), torch.zeros(2), torch.zeros(2, 2))
    with pytest.raises(NotImplementedError, match=r"^population_annealing: torch.vmap is not supported"):
        torch.vmap(lambda seed: population_annealing(model, 5, 3, seed=seed).log_partition)(torch.arange(3))


def test_docstring_example() -> None:
    names = {"torch": torch, "math": math, "BipartiteBoltzmann": BipartiteBoltzmann}
    results = doctest.testmod(population, extraglobs=names)
    assert results.attempted >= 3
    assert not results.failed
