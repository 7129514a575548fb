# SPDX-License-Identifier: Apache-2.0
"""Parallel tempering: samples at every beta, swaps, round trips, ladders that are tuned, and what is refused."""

import doctest
import warnings

import pytest
import torch
from support import assert_same_bits

import gibbs_ext as gx
from gibbs_ext import TemperingWarning, parallel_tempering, tempering, tune_ladder

LADDER = [0.2, 0.5, 0.8, 1.0]


def rbm(n1=5, n2=4, batch=(), scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(*batch, *s, generator=generator, dtype=dtype) * scale for s in ((n1,), (n2,), (n1, n2))]
    return gx.BipartiteBoltzmann(*parts)


def graph_model(batch=(), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    graph = gx.ColoredGraph(9, [(i, j) for i in range(9) for j in range(i) if (i * j) % 3 == 1 or i == j + 1])
    bias, coupling = (torch.randn(*batch, n, generator=generator, dtype=dtype) for n in (9, len(graph.edges)))
    return gx.GraphBoltzmann(graph, bias, coupling)


def two_modes(weight=1.5, n=8):
    """All ones and all zeros are equally likely, and single flips do not lead from one to the other."""
    bias = torch.full((n,), -weight * n / 2)
    return gx.BipartiteBoltzmann(bias, bias, torch.full((n, n), weight))


MODELS = [rbm(), graph_model(), rbm(batch=(3,)), graph_model(batch=(2,))]


# Laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sweeps_per_swap", [1, 3])
def test_samples_at_every_beta_follow_its_law(model, sweeps_per_swap):
    chains = 4000
    result = parallel_tempering(model, chains, LADDER, 60, sweeps_per_swap=sweeps_per_swap, seed=3)
    assert result.all_samples.shape == (4, chains, *model.batch_shape, model.num_units)
    assert_same_bits(result.samples, result.all_samples[-1])
    for beta, samples in zip(LADDER, result.all_samples, strict=True):
        cooled = model._mapped(lambda parameter, dim, beta=beta: parameter * beta)
        exact = gx.exact_marginals(cooled)
        error = (exact.single * (1 - exact.single) / chains).sqrt()
        assert ((samples.mean(0) - exact.single).abs() < 5 * error).all()


def test_crosses_a_barrier_that_plain_sweeps_do_not():
    model = two_modes()
    chains, start = 400, torch.ones(16)
    alone = model.sample((chains,), num_sweeps=400, initial=start[:8], seed=1)
    assert (alone.mean(-1) > 0.5).all()
    result = parallel_tempering(model, chains, torch.linspace(0, 1, 10), 400, initial=start, seed=1)
    share = (result.samples.mean(-1) > 0.5).double().mean()
    assert abs(share - 0.5) < 5 * 0.5 / chains**0.5
    assert result.round_trips > 10 * chains


@pytest.mark.parametrize("model", MODELS)
def test_energies_are_those_of_the_states(model):
    result = parallel_tempering(model, 7, LADDER, 6, seed=3)
    energies, _ = result.energies[-1].sort(0)  # before swaps, which only exchange them
    expected, _ = model.energy(result.all_samples).sort(0)
    assert (energies - expected).abs().max() < 1e-5


# Swaps ------------------------------------------------------------------------------------------------------------


def test_rates_and_round_trips_are_those_of_the_trace():
    model = rbm(8, 8)
    result = parallel_tempering(model, 50, LADDER, 400, seed=5)
    before = torch.cat([torch.arange(4).reshape(1, 4, 1).expand(1, 4, 50), result.replicas[:-1]])
    for pair in range(3):
        took_turn = slice((pair + 1) % 2, None, 2)  # the first round has number 1
        swapped = (result.replicas[took_turn, pair] != before[took_turn, pair]).double()
        error = swapped.std() / swapped.numel() ** 0.5
        assert abs(swapped.mean() - result.swap_rates[pair]) < 5 * error + 0.01

    trips = 0
    for chain in range(50):
        came_from_last = [False] * 4
        for first, *_, last in result.replicas[:, :, chain].tolist():
            trips += came_from_last[first]
            came_from_last[first] = False
            came_from_last[last] = True
    assert int(result.round_trips) == trips > 0


def test_replicas_are_a_permutation_at_all_times():
    replicas = parallel_tempering(rbm(batch=(2,)), 3, LADDER, 20, seed=5).replicas
    assert replicas.sort(1)[0].equal(torch.arange(4).reshape(1, 4, 1, 1).expand_as(replicas))


# The bits do not depend on how the work is split ------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_a_run_that_goes_on_is_one_run(model):
    whole = parallel_tempering(model, 6, LADDER, 30, sweeps_per_swap=2, seed=7)
    part = parallel_tempering(model, 6, LADDER, 14, sweeps_per_swap=2, seed=7)
    rest = parallel_tempering(model, 6, LADDER, 16, sweeps_per_swap=2, seed=7, initial=part)
    assert_same_bits(rest.all_samples, whole.all_samples)
    assert_same_bits(torch.cat([part.energies, rest.energies]), whole.energies)
    assert_same_bits(torch.cat([part.replicas, rest.replicas]), whole.replicas)
    assert rest.next_sweep == whole.next_sweep == 31


@pytest.mark.parametrize("model", MODELS[:2])
def test_a_chain_alone_is_the_chain_among_others(model):
    together = parallel_tempering(model, 70, LADDER, 20, seed=7)
    alone = parallel_tempering(model, 1, LADDER, 20, seed=7, chain_offset=41)
    assert_same_bits(alone.all_samples[:, 0], together.all_samples[:, 41])
    assert_same_bits(alone.energies[:, :, 0], together.energies[:, :, 41])


@pytest.mark.parametrize("model", MODELS)
def test_threads_and_a_progress_bar_do_not_matter(model, threads):
    results = []
    for num_threads, progress in ((1, False), (3, False), (2, True)):
        torch.set_num_threads(num_threads)
        results.append(parallel_tempering(model, 20, LADDER, 130, seed=7, progress=progress))
    for other in results[1:]:
        assert_same_bits(list(other)[:-2], list(results[0])[:-2])


def test_a_bipartite_model_is_a_graph_of_two_colours():
    model = rbm(dtype=torch.float32)
    n1, n2 = model.weight.shape
    edges = [(i, n1 + j) for i in range(n1) for j in range(n2)]
    graph = gx.ColoredGraph(n1 + n2, edges, colors=[1] * n1 + [0] * n2)
    twin = gx.GraphBoltzmann(graph, torch.cat([model.left_bias, model.right_bias]), model.weight.flatten())
    start = torch.zeros(n1 + n2)
    results = [parallel_tempering(m, 30, LADDER, 20, seed=7, initial=start) for m in (model, twin)]
    assert_same_bits(list(results[0])[:-2], list(results[1])[:-2])


def test_going_on_from_no_sweeps_forgets_nothing():
    model = rbm()
    whole = parallel_tempering(model, 6, LADDER, 20, seed=7)
    part = parallel_tempering(model, 6, LADDER, 10, seed=7)
    idle = parallel_tempering(model, 6, LADDER, 0, seed=7, initial=part)
    rest = parallel_tempering(model, 6, LADDER, 10, seed=7, initial=idle)
    assert_same_bits(rest.all_samples, whole.all_samples)
    assert_same_bits(rest.current_replicas, whole.replicas[-1])


def test_a_result_keeps_its_ladder():
    ladder = torch.tensor(LADDER, dtype=torch.float64)
    result = parallel_tempering(rbm(), 6, ladder, 4, seed=7)
    ladder[1] = 0.6
    assert result.betas.tolist() == LADDER


def test_a_falling_ladder_and_negative_betas():
    model = rbm(8, 8)
    result = parallel_tempering(model, 20, [1.0, 0.3, -0.5], 40, seed=1)
    assert result.energies[-20:, 2].mean() > result.energies[-20:, 0].mean() + 1
    assert (result.swap_rates > 0).all()


# Cluster moves ----------------------------------------------------------------------------------------------------


def spin_glass(size: int, seed: int) -> gx.GraphBoltzmann:
    """Spins with couplings of +1 and -1 on a square lattice with periodic boundaries."""
    sites = [(row, column) for row in range(size) for column in range(size)]
    edges = [
        (r * size + c, other) for r, c in sites for other in ((r + 1) % size * size + c, r * size + (c + 1) % size)
    ]
    graph = gx.ColoredGraph(size**2, edges, colors=[(r + c) % 2 for r, c in sites])
    couplings = torch.randint(2, (len(edges),), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    bias, coupling, _ = gx.ising_to_boltzmann(torch.zeros(size**2), couplings, graph)
    return gx.GraphBoltzmann(graph, bias, coupling)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_pairs_with_cluster_moves_follow_the_product_of_their_laws(batch):
    """Chi-square over all 32 * 32 states of pairs, at each beta, of each model."""
    graph, num_pairs, ladder = gx.ColoredGraph(5, [(0, 1), (1, 2), (2, 3), (3, 4), (0, 4), (0, 2)]), 40_000, [0.4, 1.0]
    generator = torch.Generator().manual_seed(2)
    bias, coupling = (1.3 * torch.randn(*batch, n, generator=generator) for n in (5, 6))
    coupling[..., 3] = 0  # does not connect
    model = gx.GraphBoltzmann(graph, bias, coupling)
    result = parallel_tempering(model, 2 * num_pairs, ladder, 12, cluster_moves=True, seed=1)
    place = 2 ** torch.arange(5)
    numbers = (result.all_samples.long() * place).sum(-1).unflatten(1, (num_pairs, 2))  # [B, P, 2, *M]
    joint = (32 * numbers[:, :, 0] + numbers[:, :, 1]).reshape(2, num_pairs, -1)
    states = ((torch.arange(32).unsqueeze(1) & place) > 0).float()
    energies = model.energy(states.reshape(32, *[1] * len(batch), 5)).reshape(32, -1).double()
    for b, beta in enumerate(ladder):
        for m in range(joint.shape[2]):
            law = (-beta * energies[:, m]).softmax(0)
            expected = num_pairs * torch.outer(law, law).flatten()
            seen = torch.bincount(joint[b, :, m], minlength=1024).double()
            is_rare = expected < 10  # these make one class
            counts, means = (torch.cat([x[~is_rare], x[is_rare].sum(0, keepdim=True)]) for x in (seen, expected))
            statistic, freedom = ((counts - means) ** 2 / means.clamp(min=1e-9)).sum(), len(counts) - 1
            assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5, (beta, m, statistic, freedom)


def test_cluster_moves_bring_more_round_trips_and_shorter_correlations():
    ladder, rounds, num_pairs = torch.linspace(0.2, 2.5, 24), 400, 16
    for seed in range(3):
        model, trips, times = spin_glass(16, seed), [], []
        for cluster_moves in (False, True):
            result = parallel_tempering(model, 2 * num_pairs, ladder, rounds, cluster_moves=cluster_moves, seed=1)
            trips.append(int(result.round_trips))
            coldest = result.energies[rounds // 4 :, -1]
            # The variance of the means of runs over that of states is the time of correlation over the length of runs.
            times.append(coldest.mean(0).reshape(num_pairs, 2).mean(1).var() / coldest.var())
        assert trips[1] > 1.4 * trips[0]
        assert times[1] < 0.7 * times[0]


@pytest.mark.parametrize("model", [graph_model(), graph_model(batch=(2,))])
def test_a_run_with_cluster_moves_goes_on_and_may_be_split(model, threads):
    options = {"sweeps_per_swap": 2, "cluster_moves": True, "seed": 7}
    torch.set_num_threads(1)
    whole = parallel_tempering(model, 71, LADDER, 30, **options)
    assert whole.cluster_moves
    torch.set_num_threads(3)
    part = parallel_tempering(model, 71, LADDER, 14, progress=True, **options)
    rest = parallel_tempering(model, 71, LADDER, 16, initial=part, **options)
    assert_same_bits(rest.all_samples, whole.all_samples)
    assert_same_bits(torch.cat([part.energies, rest.energies]), whole.energies)
    assert_same_bits(torch.cat([part.replicas, rest.replicas]), whole.replicas)
    pair = parallel_tempering(model, 2, LADDER, 30, chain_offset=40 * model.batch_shape.numel(), **options)
    assert_same_bits(pair.all_samples, whole.all_samples[:, 40:42])


def test_cluster_moves_are_refused_where_they_do_not_fit():
    with pytest.raises(ValueError, match=r"^parallel_tempering: cluster_moves must be False for a BipartiteBoltzmann"):
        parallel_tempering(rbm(), 4, LADDER, 4, cluster_moves=True, seed=1)
    with pytest.raises(TypeError, match=r"^parallel_tempering: cluster_moves must be a bool, got 1$"):
        parallel_tempering(graph_model(), 4, LADDER, 4, cluster_moves=1, seed=1)


# Ladders ----------------------------------------------------------------------------------------------------------


def test_a_tuned_ladder_exchanges_equally():
    model = rbm(20, 20, scale=0.7)
    ladder = tune_ladder(model, [0.0, 0.5, 1.0], num_betas=9, num_sweeps=400, seed=1)
    assert ladder.shape == (9,)
    assert float(ladder[0]) == 0.0
    assert float(ladder[-1]) == 1.0
    assert (ladder.diff() > 0).all()
    rates = parallel_tempering(model, 100, ladder, 1000, seed=2).swap_rates
    even = parallel_tempering(model, 100, torch.linspace(0, 1, 9), 1000, seed=2).swap_rates
    assert rates.max() - rates.min() < 0.08
    assert even.max() - even.min() > 2 * (rates.max() - rates.min())


def test_a_ladder_of_a_batch_and_one_that_falls():
    ladder = tune_ladder(rbm(batch=(2,)), [1.0, 0.5, 0.2], num_sweeps=20, num_chains=5, seed=1)
    assert ladder.shape == (3,)
    assert (ladder.diff() < 0).all()


def test_warns_of_a_gap():
    with pytest.warns(TemperingWarning, match=r"the betas 0.01 and 1 exchange replicas in .* of the rounds"):
        parallel_tempering(two_modes(3.0, 20), 20, [0.0, 0.01, 1.0], 50, initial=torch.ones(40), seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parallel_tempering(rbm(), 20, LADDER, 50, seed=1)


# Edges and faults -------------------------------------------------------------------------------------------------


def test_no_sweeps_give_the_start():
    model = rbm()
    start = torch.randint(2, (4, 6, 9)).double()
    result = parallel_tempering(model, 6, LADDER, 0, initial=start, seed=1)
    assert result.all_samples[..., :5].equal(start[..., :5])
    assert result.energies.shape == result.replicas.shape == (0, 4, 6)
    assert result.swap_rates.isnan().all()
    assert int(result.round_trips) == 0


def test_starts_from_uniform_bits_that_depend_on_the_chain_alone():
    start = parallel_tempering(graph_model(), 500, LADDER, 0, seed=1).all_samples
    assert (start.mean((0, 1)) - 0.5).abs().max() < 5 * 0.5 / 2000**0.5
    assert_same_bits(start[:, 3:4], parallel_tempering(graph_model(), 1, LADDER, 0, seed=1, chain_offset=3).all_samples)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"model": torch.zeros(3)}, TypeError, "model must be a BipartiteBoltzmann"),
        ({"num_chains": 0}, ValueError, "num_chains must be at least 1, got 0"),
        ({"num_sweeps": 7, "sweeps_per_swap": 2}, ValueError, "num_sweeps must be a multiple of sweeps_per_swap, 2"),
        ({"sweeps_per_swap": 0}, ValueError, "sweeps_per_swap must be at least 1"),
        ({"betas": [0.1, 1.0, 0.5]}, ValueError, "betas must be finite and rise or fall strictly, got"),
        ({"betas": [0.1, 0.1]}, ValueError, "betas must be finite and rise or fall strictly"),
        ({"betas": [0.1, float("nan")]}, ValueError, "betas must be finite and rise or fall strictly"),
        ({"betas": []}, ValueError, "betas must hold at least 1 value, got none"),
        ({"betas": torch.ones(2, 2)}, ValueError, "betas must be a number or 1-dimensional"),
        ({"initial": torch.full((9,), 0.5)}, ValueError, "initial must hold 0 and 1 only, got 0.5"),
        ({"initial": torch.zeros(8)}, ValueError, "initial must broadcast to shape"),
        ({"initial": parallel_tempering(rbm(), 2, LADDER, 2, seed=1)}, ValueError, "initial must be a result of"),
        ({"chain_offset": -1}, ValueError, r"chain_offset must lie in 0 .. 2\^48 / 4 - 5, got -1"),
        ({"chain_offset": 2**46 - 4}, ValueError, r"chain_offset must lie in 0 .. 2\^48 / 4 - 5, got 70368744177660"),
        ({"chain_offset": 2**62}, ValueError, r"chain_offset must lie in 0 .. 2\^48 / 4 - 5"),
        ({"chain_offset": torch.tensor(2**62)}, ValueError, r"chain_offset must lie in 0 .. 2\^48 / 4 - 1, got 46"),
        ({"num_sweeps": 2**44}, ValueError, r"num_sweeps must be below 2\^44"),
        ({"betas": [0.0, 1e300]}, ValueError, "betas must be finite and rise or fall strictly"),
        ({"seed": 2**70}, ValueError, "seed must fit in 64 bits"),
    ],
)
def test_refuses(given, error, message):
    arguments = {"model": rbm(), "num_chains": 5, "betas": LADDER, "num_sweeps": 4, "seed": 1} | given
    with pytest.raises(error, match=f"^parallel_tempering: {message}"):
        parallel_tempering(**arguments)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"betas": [1.0]}, "betas must be at least 2, got 1"),
        ({"num_betas": 1}, "num_betas must be at least 2"),
        ({"num_rounds": 0}, "num_rounds must be at least 1"),
        ({"num_sweeps": 1}, "num_sweeps must be at least 2"),
        ({"model": rbm(batch=(0,))}, r"model must hold at least one model, got batch shape \[0\]"),
        ({"num_chains": 0}, "num_chains must be at least 1"),
    ],
)
def test_tuning_refuses(given, message):
    with pytest.raises(ValueError, match=f"^tune_ladder: {message}"):
        tune_ladder(**{"model": rbm(), "betas": LADDER, "seed": 1} | given)


def test_vmap_is_refused():
    model = rbm()
    for mapped, run in (
        (torch.arange(3), lambda seed: parallel_tempering(model, 5, LADDER, 4, seed=seed).samples),
        (torch.zeros(3, 9), lambda z: parallel_tempering(model, 5, LADDER, 4, initial=z, seed=1).samples),
        (
            torch.zeros(3, 5).long(),
            lambda numbers: parallel_tempering(model, 5, LADDER, 4, chain_offset=numbers, seed=1),
        ),
    ):
        with pytest.raises(NotImplementedError, match=r"^parallel_tempering: torch.vmap is not supported"):
            torch.vmap(run)(mapped)


def test_parameters_that_are_not_finite_are_refused():
    model = gx.BipartiteBoltzmann(
        torch.zeros(2), torch.tensor([0.0, float("inf")]), torch.zeros(2, 2), validate_args=False
    )
    with pytest.raises(ValueError, match=r"^parallel_tempering: right_bias must be finite"):
        parallel_tempering(model, 5, LADDER, 4, seed=1)


def test_the_examples_in_the_docstrings():
    names = {"BipartiteBoltzmann": gx.BipartiteBoltzmann, "torch": torch}
    assert doctest.testmod(tempering, extraglobs=names).failed == 0


def test_what_goes_on_from_cluster_moves_has_made_them():
    graph = gx.ColoredGraph(4, [(0, 1), (1, 2), (2, 3), (3, 0)])
    model = gx.GraphBoltzmann(graph, torch.zeros(4), torch.ones(4))
    moved = gx.parallel_tempering(model, 4, [0.0, 1.0], 2, cluster_moves=True, seed=0)
    assert moved.cluster_moves
    assert gx.parallel_tempering(model, 4, [0.0, 1.0], 2, initial=moved, seed=0).cluster_moves
    assert not gx.parallel_tempering(model, 4, [0.0, 1.0], 2, seed=0).cluster_moves
