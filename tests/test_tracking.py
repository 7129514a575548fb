# SPDX-License-Identifier: Apache-2.0
"""log Z of a model that is trained, against the exact one all the way."""

import math
import re
import warnings

import pytest
import torch
from graph_support import random_graph
from support import assert_same_bits, random_bits, random_parameters, z_threshold

from gibbs_ext import (
    BipartiteBoltzmann,
    ColoredGraph,
    GraphBoltzmann,
    LogPartitionTracker,
    PersistentChains,
    PopulationCollapseWarning,
    exact_log_partition,
    negative_log_likelihood_surrogate,
    population_annealing,
)

GRAPH = random_graph(12, 30, seed=4)
SEEDS = 200


def rbm():
    return BipartiteBoltzmann(torch.zeros(12), torch.zeros(12), 0.01 * torch.randn(12, 12))


def on_graph():
    return GraphBoltzmann(GRAPH, torch.zeros(12), 0.01 * torch.randn(30))


def training(model, num_steps: int, rate: float, num_sweeps: int = 1):
    """Trains on two prototypes with flipped bits. Yields the model after and before each step, and its chains."""
    model = model._mapped(lambda tensor, _: torch.nn.Parameter(tensor.clone()))
    data = random_bits(2, 12)[random_bits(500).long()]
    data = (data - (torch.rand(500, 12) < 0.1).float()).abs()
    chains, optimizer = PersistentChains(1000, model), torch.optim.Adam(model._parameters, rate)
    for _ in range(num_steps):
        optimizer.zero_grad()
        negative_log_likelihood_surrogate(model, data, chains, num_sweeps).backward()
        before = model.detach()._mapped(lambda tensor, _: tensor.clone())
        optimizer.step()
        yield model, before, chains


def naive_change(before, after, chains) -> float:
    """Of log Z, as the chains that train the model show it."""
    state = chains.state().to(before.dtype)
    log_weights = (before.free_energy(state) - after.free_energy(state)).detach().double()
    return float(log_weights.logsumexp(0)) - math.log(len(log_weights))


@pytest.mark.parametrize("make", [rbm, on_graph])
def test_log_partition_of_a_model_in_training_is_within_its_error_bars(make) -> None:
    model = make()
    tracker = LogPartitionTracker(model, 2000, num_sweeps=5, seed=1)
    naive, excesses, naive_excesses = float(exact_log_partition(model)), [], []
    for step, (trained, before, chains) in enumerate(training(model, 400, 0.01, 5)):
        naive += naive_change(before, trained, chains)
        tracker.update_(trained)
        if step % 40 == 39:
            exact = exact_log_partition(trained).detach()
            excesses.append(float((tracker.log_partition - exact).abs() / tracker.standard_error))
            naive_excesses.append(float((naive - exact).abs() / tracker.standard_error))
    assert tracker.num_updates == 400
    assert max(excesses) < z_threshold(len(excesses))
    assert tracker.standard_error < 0.2
    # Planted fault: the chains that train the model are not independent of its parameters.
    assert naive_excesses[-1] > z_threshold(len(excesses))


@pytest.mark.parametrize("make", [rbm, on_graph])
def test_error_bars_cover_as_often_as_they_say_and_the_estimate_is_unbiased(make) -> None:
    """Over 200 seeds, which are the models of a batch here. Binomial limits of probability 1e-6: 0.86 and 0.995."""
    model = make()
    tracker = LogPartitionTracker(model.expand((SEEDS,)), 400, num_sweeps=1, seed=1)
    for step, (trained, _, _) in enumerate(training(model, 60, 0.03)):
        tracker.update_(trained.expand((SEEDS,)))
        if step % 20 == 19:
            errors = tracker.log_partition - exact_log_partition(trained).detach()
            assert 0.86 < (errors.abs() < 1.96 * tracker.standard_error).double().mean() < 0.996
            assert 0.75 < errors.std() / tracker.standard_error.mean() < 1.25
            ratios = errors.exp()
            assert (ratios.mean() - 1).abs() < z_threshold() * ratios.std() / SEEDS**0.5
    # It has samples, too, of equal weight. Estimates of Z as weights make them unbiased.
    excess = ratios.unsqueeze(-1) * (tracker.samples.mean(0) - trained.detach().mean)
    assert (excess.mean(0) / excess.std(0) * SEEDS**0.5).abs().max() < z_threshold(model.num_units)
    # Planted fault: the chains of before the training.
    start = population_annealing(model.expand((SEEDS,)), 400, 5, seed=1)
    excess = start.samples.mean(0) - trained.detach().mean
    assert (excess.mean(0) / excess.std(0) * SEEDS**0.5).abs().max() > z_threshold(model.num_units)


def test_a_tracker_warns_once_where_families_are_few_and_can_be_anchored_anew() -> None:
    weight = 3 * torch.randn(12, 12)
    models = [BipartiteBoltzmann(torch.zeros(12), torch.zeros(12), scale * weight) for scale in (0.0, 1.0, 1.1)]
    tracker = LogPartitionTracker(models[0], 400, seed=1)
    assert tracker.effective_families == 400

    def follow(path) -> None:
        for model in path:
            tracker.update_(model)

    text = r"most of the 400 chains descend from few: as many as [\d.]+ families count; .* \(call anchor_\)"
    with pytest.warns(PopulationCollapseWarning, match=f"^LogPartitionTracker: {text}$") as caught:
        follow(models[1:])  # the first step is much too large
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert tracker.num_updates == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.anchor_(models[2])
    assert tracker.num_updates == 0
    assert (tracker.log_partition - exact_log_partition(models[2])).abs() < z_threshold() * tracker.standard_error
    # The chains are others than those of the first annealing, and those of population_annealing.
    again = population_annealing(models[2], 400, "adaptive", num_sweeps=5, seed=1, chain_offset=400)
    assert_same_bits([tracker.samples, tracker.log_partition], [again.samples, again.log_partition])


def test_a_tracker_keeps_neither_models_nor_their_graphs_of_gradients() -> None:
    parameters = [torch.nn.Parameter(p) for p in random_parameters(4, 3)]
    model = BipartiteBoltzmann(*parameters)
    tracker = LogPartitionTracker(model, 100, seed=1)
    before = tracker.log_partition
    assert not before.requires_grad
    with torch.no_grad():
        parameters[0].add_(1)
    tracker.update_(model)
    assert not tracker.log_partition.requires_grad
    assert (tracker.log_partition - before).abs() > 0.1
    tracker.update_(model)  # no change
    steady = tracker.log_partition
    tracker.update_(model)
    assert_same_bits(tracker.log_partition, steady)


@pytest.mark.parametrize("make", [rbm, on_graph])
def test_a_tracker_that_loads_a_state_goes_on_to_the_same_bits(make, tmp_path) -> None:
    first, *others = [trained.detach().expand((2,)) for trained, _, _ in training(make(), 4, 0.1)]
    # It has been anchored anew, so that all counts differ from those of a new tracker.
    tracker = LogPartitionTracker(first, 50, 3, seed=1)
    tracker.anchor_(first)
    tracker.update_(others[0])
    torch.save(tracker.state_dict(), tmp_path / "tracker.pt")
    state = tracker.state_dict()
    other = LogPartitionTracker(make().expand((2,)), 50, 3, seed=2)

    def course(of) -> list:
        results = []
        for follow, model in [(of.update_, others[1]), (of.anchor_, others[2]), (of.update_, others[0])]:
            follow(model)
            results += [of.samples, of.log_partition, of.standard_error, torch.tensor(of.num_updates)]
        return results

    expected = course(tracker)
    for loaded in (torch.load(tmp_path / "tracker.pt", weights_only=True), state):  # following has not changed `state`
        other.load_state_dict(loaded)
        assert other.num_updates == 1
        assert_same_bits(course(other), expected)


def test_states_that_a_tracker_cannot_load() -> None:
    tracker = LogPartitionTracker(rbm(), 10, 3, seed=1)
    before = tracker.state_dict()
    state = before | {"log_partition": torch.zeros((), dtype=torch.float64)}  # would be seen if it were loaded
    lacking = {name: tensor for name, tensor in state.items() if name != "family"}
    other = LogPartitionTracker(rbm(), 11, 3, seed=1).state_dict()
    double = state | {"weight": state["weight"].double()}
    for error, text, bad in [
        (TypeError, "state must be a mapping of names to tensors, got []", []),
        (ValueError, "state must have the names left_bias, right_bias, weight, z, ", lacking),
        (TypeError, "state['excess'] must be a tensor, got 1.0", state | {"excess": 1.0}),
        (ValueError, "state['z'] must be torch.uint8 [10, 24], got torch.uint8 [11, 24]; was it of another", other),
        (ValueError, "state['weight'] must be torch.float32 [12, 12], got torch.float64 [12, 12]; was it", double),
    ]:
        with pytest.raises(error, match=f"^LogPartitionTracker: {re.escape(text)}"):
            tracker.load_state_dict(bad)
        assert_same_bits(list(tracker.state_dict().values()), list(before.values()))


@pytest.mark.parametrize(
    "graph",
    [
        ColoredGraph(12, GRAPH.edges.flip(0), GRAPH.colors),
        ColoredGraph(12, GRAPH.edges, torch.where(GRAPH.colors < 2, 1 - GRAPH.colors, GRAPH.colors)),
    ],
    ids=["order of edges", "colours"],
)
def test_a_state_of_another_graph_of_the_same_shape_is_not_loaded(graph) -> None:
    tracker = LogPartitionTracker(on_graph(), 10, 3, seed=1)
    other = LogPartitionTracker(GraphBoltzmann(graph, torch.zeros(12), torch.zeros(30)), 10, 3, seed=1)
    with pytest.raises(
        ValueError, match=r"^LogPartitionTracker: state\['layout'\] must be that of this tracker's graph"
    ):
        tracker.load_state_dict(other.state_dict())


def test_a_tracker_that_has_warned_does_so_no_more_after_loading() -> None:
    weight = 3 * torch.randn(12, 12)
    model = BipartiteBoltzmann(torch.zeros(12), torch.zeros(12), weight)
    tracker = LogPartitionTracker(model._mapped(lambda tensor, _: 0 * tensor), 400, seed=1)
    with pytest.warns(PopulationCollapseWarning):
        tracker.update_(model)
    other = LogPartitionTracker(model, 400, seed=2)
    other.load_state_dict(tracker.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.update_(model)


@pytest.mark.parametrize(
    ("error", "text", "options"),
    [
        (TypeError, "model must be a BipartiteBoltzmann or a GraphBoltzmann, got int", {"model": 1}),
        (ValueError, "num_chains must be at least 2, got 1", {"num_chains": 1}),
        (ValueError, "num_sweeps must be at least 1, got 0", {"num_sweeps": 0}),
        (ValueError, "betas must rise from 0 to 1, got 0 to 0.5", {"betas": [0.0, 0.5]}),
        (ValueError, "betas must be 'adaptive', an integer or a schedule, got 'fast'", {"betas": "fast"}),
        (ValueError, "base must be 'field', 'bias', None or a pair of biases, got 'data'", {"base": "data"}),
        (ValueError, "give generator or seed, not both", {"generator": torch.Generator(), "seed": 1}),
    ],
)
def test_bad_arguments(error, text: str, options: dict) -> None:
    with pytest.raises(error, match=f"^LogPartitionTracker: {re.escape(text)}"):
        LogPartitionTracker(**{"model": rbm(), "num_chains": 10, "betas": 3} | options)


def test_another_graph_that_is_equal_is_followed() -> None:
    tracker = LogPartitionTracker(on_graph(), 10, 3, seed=1)
    equal = ColoredGraph(12, GRAPH.edges, GRAPH.colors)
    tracker.update_(GraphBoltzmann(equal, torch.zeros(12), torch.zeros(30)))
    assert tracker.num_updates == 1


def test_models_that_a_tracker_cannot_follow() -> None:
    tracker = LogPartitionTracker(BipartiteBoltzmann(torch.zeros(2), torch.zeros(3), torch.zeros(2, 3)), 10, 1)
    wanted = "LogPartitionTracker: model must"
    with pytest.raises(TypeError, match=f"^{wanted} be a BipartiteBoltzmann or a GraphBoltzmann, got int"):
        tracker.update_(1)
    with pytest.raises(ValueError, match=f"^{wanted} be of the class and graph to which chains were annealed"):
        tracker.update_(on_graph())
    other = BipartiteBoltzmann(torch.zeros(3), torch.zeros(2), torch.zeros(3, 2))
    text = r" have \[2, 3\] units and the batch shape \[\], got "
    with pytest.raises(ValueError, match=rf"^{wanted}{text}\[3, 2\] and \[\]"):
        tracker.update_(other)
    with pytest.raises(ValueError, match=rf"^{wanted}{text}\[2, 3\] and \[4\]"):
        tracker.update_(tracker._population.model.expand((4,)))
    bad = BipartiteBoltzmann(torch.zeros(2), torch.zeros(3), torch.full((2, 3), math.nan), validate_args=False)
    before = tracker.samples, tracker.log_partition
    with pytest.raises(ValueError, match=f"^{wanted} have finite parameters, got NaN or inf$"):
        tracker.update_(bad)
    assert_same_bits((tracker.samples, tracker.log_partition), before)
