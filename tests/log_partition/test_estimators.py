# SPDX-License-Identifier: Apache-2.0
"""AIS against the exact log Z; gradients of the likelihood against exact ones."""

import math
import warnings

import numpy as np
import pytest
import torch
from graph_support import chimera_cell, complete_graph, random_graph_parameters
from support import (
    all_states,
    assert_close,
    assert_same_bits,
    random_bits,
    random_parameters,
    z_threshold,
)

from gibbs_ext import (
    BipartiteBoltzmann,
    ChimeraGraph,
    ColoredGraph,
    EffectiveSampleSizeWarning,
    GraphBoltzmann,
    PersistentChains,
    annealed_importance_sampling,
    boltzmann_to_ising,
    distributed,
    exact_log_partition,
    exact_marginals,
    exact_samples,
    negative_log_likelihood_surrogate,
)


def make(n1, n2, batches=((), (), ()), dtype=torch.float64, scale=1.0):
    return BipartiteBoltzmann(*random_parameters(n1, n2, batches, dtype=dtype, scale=scale))


# 2 colours of 36 nodes each; and 8 colours.
GRAPHS = {"chimera": ChimeraGraph(3), "K8": complete_graph(8)}


def make_graph(name, batches=((), ()), **kwargs):
    """It has a generator of its own, so that the power of the tests does not depend on the seed."""
    options = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(3)} | kwargs
    return GraphBoltzmann(GRAPHS[name], *random_graph_parameters(GRAPHS[name], batches, **options))


# AIS --------------------------------------------------------------------------------------------------------------


def excess(result, exact):
    """|error| over what its own error bar allows at the false-alarm rate; above 1 is an alarm."""
    z = (result.log_partition - exact).abs() / result.standard_error
    return float(z.max()) / z_threshold(z.numel())


BASES = [None, "field", "bias", "pair"]


def base_for(base, model):
    if base != "pair":
        return base
    return 0.5 * model.left_bias, torch.zeros_like(model.right_bias)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("batches", [((), (), ()), ((3,), (3,), (3,)), ((3,), (), ())])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ais_is_within_its_error_bars(base, batches, dtype):
    model = make(10, 14, batches, dtype)
    exact = exact_log_partition(model)
    result = annealed_importance_sampling(model, 4000, 100, base=base_for(base, model))
    assert result.log_weights.shape == (4000, *model.batch_shape)
    assert result.samples.shape == (4000, *model.batch_shape, 24)
    assert excess(result, exact) < 1
    assert (result.standard_error > 0).all()
    assert (result.standard_error < 0.05).all()
    # Planted faults: log Z of a model slightly hotter, and one with a coupling missing.
    hot = BipartiteBoltzmann(0.95 * model.left_bias, 0.95 * model.right_bias, 0.95 * model.weight)
    assert excess(result, exact_log_partition(hot)) > 1
    weight = model.weight.clone()
    weight[..., 0, 0] += 1
    assert excess(result, exact_log_partition(BipartiteBoltzmann(model.left_bias, model.right_bias, weight))) > 1


@pytest.mark.parametrize("base", BASES)
def test_reverse_ais_is_within_its_error_bars(base):
    model = make(8, 12, ((), (), (2,)))
    exact = exact_log_partition(model)
    initial = model.split(exact_samples(model, 4000))[0]
    options = {"base": base_for(base, model), "reverse": True}
    assert excess(annealed_importance_sampling(model, 4000, 100, initial=initial, **options), exact) < 1
    # Planted fault: starting draws that are not the model's.
    wrong = annealed_importance_sampling(model, 4000, 100, initial=random_bits(4000, 2, 8).double(), **options)
    assert excess(wrong, exact) > 1


@pytest.mark.parametrize(("n1", "n2"), [(8, 10), (10, 8)])
def test_forward_and_reverse_bracket_log_z(n1, n2):
    """With a poor schedule and few chains each errs to its own side (Jensen): many repetitions show it."""
    one = make(n1, n2, scale=1.5)
    model, exact = one.expand((4000,)), exact_log_partition(one)
    forward = annealed_importance_sampling(model, 5, 3).log_partition - exact
    initial, _ = model.split(exact_samples(one, 20_000).unflatten(0, (5, 4000)))
    backward = annealed_importance_sampling(model, 5, 3, reverse=True, initial=initial).log_partition - exact
    for bias in (-forward, backward):
        assert bias.mean() / bias.std() * 4000**0.5 > z_threshold()


def test_error_bar_is_the_spread_of_repetitions():
    result = annealed_importance_sampling(make(8, 10).expand((300,)), 200, 30)
    ratio = float(result.log_partition.std() / result.standard_error.mean())
    # 300 repetitions: the standard deviation is known to 4%, 25% is six of these.
    assert 0.75 < ratio < 1.25


def test_one_step_of_ais_is_importance_sampling():
    model = make(6, 5)
    result = annealed_importance_sampling(model, 3000, 1, base=None, seed=4)
    # Uniform draws of left weighted by exp(-free_energy).
    initial = model.sample((3000,), 0, seed=4)[:, :6]
    assert not result.log_weights.equal(torch.zeros(3000).double())
    assert excess(result, exact_log_partition(model)) < 1
    again = annealed_importance_sampling(model, 3000, [0.0, 1.0], base=None, initial=initial, seed=4)
    assert_close(again.log_weights, -model.free_energy(initial).double() - 5 * math.log(2), 1e-6)


GRAPH_BASES = [None, "field", "bias", "tensor"]


@pytest.mark.parametrize("base", GRAPH_BASES)
@pytest.mark.parametrize("batches", [((), ()), ((3,), (3,)), ((3,), ())])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GRAPHS)
def test_ais_of_graphs_is_within_its_error_bars(name, base, batches, dtype):
    model = make_graph(name, batches, dtype=dtype)
    result = annealed_importance_sampling(model, 4000, 100, base=0.5 * model.bias if base == "tensor" else base)
    assert result.log_weights.shape == (4000, *model.batch_shape)
    assert result.samples.shape == (4000, *model.batch_shape, model.num_units)
    assert excess(result, exact_log_partition(model)) < 1
    assert ((result.standard_error > 0) & (result.standard_error < 0.05)).all()
    # Planted faults: log Z of a model slightly hotter, and one with another coupling.
    hot = GraphBoltzmann(model.graph, 0.95 * model.bias, 0.95 * model.coupling)
    assert excess(result, exact_log_partition(hot)) > 1
    coupling = model.coupling.clone()
    coupling[..., exact_marginals(model).pair.reshape(-1, model.graph.num_edges).mean(0).argmax()] += 0.3
    assert excess(result, exact_log_partition(GraphBoltzmann(model.graph, model.bias, coupling))) > 1


@pytest.mark.parametrize("base", GRAPH_BASES)
@pytest.mark.parametrize("name", GRAPHS)
def test_reverse_ais_of_graphs_is_within_its_error_bars(name, base):
    model = make_graph(name, ((), (2,)))
    exact = exact_log_partition(model)
    options = {"base": 0.5 * model.bias if base == "tensor" else base, "reverse": True}
    right = annealed_importance_sampling(model, 4000, 100, initial=exact_samples(model, 4000), **options)
    assert excess(right, exact) < 1
    # Planted fault: starting draws that are not the model's.
    uniform = random_bits(4000, 2, model.num_units, dtype=torch.float64)
    assert excess(annealed_importance_sampling(model, 4000, 100, initial=uniform, **options), exact) > 1


@pytest.mark.parametrize("name", GRAPHS)
def test_forward_and_reverse_bracket_log_z_of_graphs(name):
    one = make_graph(name, scale=1.5)
    model, exact = one.expand((2000,)), exact_log_partition(one)
    forward = annealed_importance_sampling(model, 5, 3).log_partition - exact
    initial = exact_samples(one, 10_000).unflatten(0, (5, 2000))
    backward = annealed_importance_sampling(model, 5, 3, reverse=True, initial=initial).log_partition - exact
    for bias in (-forward, backward):
        assert bias.mean() / bias.std() * 2000**0.5 > z_threshold()


def test_ais_of_a_chimera_cell_is_that_of_a_bipartite_model():
    p, bipartite = chimera_cell((2,), dtype=torch.float64)
    cell, rbm = GraphBoltzmann(ChimeraGraph(1), *p), BipartiteBoltzmann(*bipartite)
    for base in (None, "bias", "tensor"):
        bases = [base] * 2 if base != "tensor" else [0.5 * p.bias, (0.5 * rbm.left_bias, 0.5 * rbm.right_bias)]
        ours, theirs = (
            annealed_importance_sampling(model, 50, 7, base=b, seed=1)
            for model, b in zip((cell, rbm), bases, strict=True)
        )
        assert_same_bits(ours.samples, theirs.samples)
        for a, b in zip(ours[:3], theirs[:3], strict=True):
            assert_close(a, b, 1e-5)


def test_weighted_samples_are_the_models():
    model = make(5, 4)
    result = annealed_importance_sampling(model, 50_000, 50, base="bias")
    states = all_states(9)
    exact = (model.log_prob(states).exp().unsqueeze(-1) * states).sum(0)
    weights = result.log_weights.softmax(0).unsqueeze(-1)
    mean = (weights * result.samples).sum(0)
    error = (weights**2 * (result.samples - mean) ** 2).sum(0).sqrt()
    assert ((mean - exact) / error).abs().max() < z_threshold(9)


def test_ais_seed_and_betas():
    model = make(6, 5)
    first = annealed_importance_sampling(model, 10, 4, seed=1)
    assert_same_bits(annealed_importance_sampling(model, 10, torch.linspace(0, 1, 5).double(), seed=1), first)
    assert_same_bits(annealed_importance_sampling(model, 20, 4, seed=1).log_weights[:10], first.log_weights)
    torch.manual_seed(1)
    drawn = annealed_importance_sampling(model, 10, 4)
    by_generator = annealed_importance_sampling(model, 10, 4, generator=torch.Generator().manual_seed(1))
    assert_same_bits(by_generator, drawn)
    exact = make(2, 2, scale=0.0)
    assert annealed_importance_sampling(exact, 3, 1).log_partition.item() == pytest.approx(4 * math.log(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": 3}, "model must be a BipartiteBoltzmann or a GraphBoltzmann, got int"),
        ({"num_chains": 0}, "num_chains must be at least 1, got 0"),
        ({"num_chains": 2.5}, "num_chains must be an integer, got 2.5"),
        ({"betas": 0}, "betas must be at least 1, got 0"),
        ({"betas": "hot"}, "betas must be a number or a sequence of numbers, got 'hot'"),
        ({"betas": []}, "betas must rise from 0 to 1, got none"),
        ({"betas": [0.0]}, "betas must rise from 0 to 1, got 0"),
        ({"betas": [0.0, 0.5]}, "betas must rise from 0 to 1, got 0 to 0.5"),
        ({"betas": [0.0, 0.7, 0.5, 1.0]}, "betas must rise from 0 to 1, got 0.7 then 0.5"),
        ({"betas": [0.0, math.nan, 1.0]}, "betas must rise from 0 to 1, got 0 then nan"),
        ({"betas": torch.zeros(2, 2)}, r"betas must be a number or 1-dimensional, got shape \[2, 2\]"),
        ({"base": "data"}, "base must be 'field', 'bias', None or a pair of biases, got 'data'"),
        ({"base": 3}, "base must be 'field', 'bias', None or a pair of biases, got 3"),
        ({"base": (torch.zeros(3), 1)}, r"base\[1\] must be a tensor, got int"),
        ({"base": (torch.zeros(4), torch.zeros(2))}, r"base\[0\] must broadcast to shape \[3\], got \[4\]"),
        ({"base": (torch.zeros(3), torch.zeros(2).double())}, r"base\[0\] must have weight's dtype"),
        ({"base": (torch.zeros(3).double(), torch.full((2,), math.nan).double())}, r"base\[1\] must be finite"),
        ({"reverse": True}, "reverse=True needs initial"),
        ({"initial": torch.zeros(5)}, r"initial must broadcast to shape \[4, 3\], got \[5\]"),
        ({"initial": torch.full((3,), 0.5)}, "initial must hold 0 and 1 only, got 0.5"),
        ({"initial": 3}, "initial must be a tensor, got int"),
        ({"seed": 1, "generator": torch.Generator()}, "give generator or seed"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"generator": 3}, "generator must be a torch.Generator, got 3"),
    ],
)
def test_bad_arguments(arguments, message):
    good = {"model": make(3, 2), "num_chains": 4, "betas": 5}
    with pytest.raises((TypeError, ValueError, RuntimeError), match=f"^annealed_importance_sampling: {message}"):
        annealed_importance_sampling(**{**good, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": "data"}, "base must be 'field', 'bias', None or a tensor of biases, got 'data'"),
        ({"base": (torch.zeros(5), torch.zeros(5))}, "base must be 'field', 'bias', None or a tensor of biases, got "),
        ({"base": torch.zeros(4)}, r"base must broadcast to shape \[8\], got \[4\]"),
        ({"base": torch.zeros(8)}, "base must have coupling's dtype"),
        ({"base": torch.full((8,), math.nan).double()}, "base must be finite"),
        ({"base": torch.full((8,), math.nan).double(), "initial": torch.zeros(8)}, "base must be finite"),
        ({"reverse": True}, "reverse=True needs initial, exact draws from the model, got None"),
        ({"initial": torch.zeros(4)}, r"initial must broadcast to shape \[4, 8\], got \[4\]"),
        ({"initial": torch.full((8,), 0.5)}, "initial must hold 0 and 1 only, got 0.5"),
        ({"betas": [0.0, 0.5]}, "betas must rise from 0 to 1, got 0 to 0.5"),
    ],
)
def test_bad_arguments_with_a_graph(arguments, message):
    good = {"model": make_graph("K8"), "num_chains": 4, "betas": 5}
    annealed_importance_sampling(**good)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=f"^annealed_importance_sampling: {message}"):
        annealed_importance_sampling(**{**good, **arguments})


@pytest.mark.parametrize("base", [(0, 1), (1, 0)])
def test_nan_in_one_base(base):
    pair = [
        torch.zeros(n, dtype=torch.float64).masked_fill(torch.tensor(bad == 1), math.nan)
        for n, bad in zip((3, 2), base, strict=True)
    ]
    with pytest.raises(
        (ValueError, RuntimeError), match=rf"^annealed_importance_sampling: base\[{base.index(1)}\] must be finite"
    ):
        annealed_importance_sampling(make(3, 2), 4, 5, base=pair)
    with pytest.raises(
        (ValueError, RuntimeError), match=rf"^annealed_importance_sampling: base\[{base.index(1)}\] must be finite"
    ):
        annealed_importance_sampling(make(3, 2), 4, 5, base=pair, initial=torch.zeros(3).double())


# The base, and how many chains count -------------------------------------------------------------------------------


def opposed(n=12, bias=-5.4, coupling=1.0, graph=False):
    """All units are 0, or all are 1; the biases alone know only the former."""
    if not graph:
        return BipartiteBoltzmann(*(torch.full((n,), bias) for _ in range(2)), torch.full((n, n), coupling))
    pairs = ColoredGraph(2 * n, [(i, n + j) for i in range(n) for j in range(n)])
    return GraphBoltzmann(pairs, torch.full((2 * n,), bias), torch.full((n * n,), coupling))


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("bias", [-5.4, -6.0, -6.6])
def test_the_default_base_is_right_where_biases_oppose_couplings(bias, graph):
    model = opposed(bias=bias, graph=graph)
    exact = exact_log_partition(model)
    for estimate in (
        annealed_importance_sampling(model, 1000, 1000, seed=1).log_partition,
        model.log_partition("ais", seed=1),
        distributed.annealed_importance_sampling(model, 1000, 1000, seed=1).log_partition,
    ):
        assert abs(estimate - exact) < 0.1
    if bias == -5.4:
        # The base that was the default, with an error bar of nothing.
        wrong = annealed_importance_sampling(model, 1000, 1000, base="bias", seed=1)
        assert wrong.log_partition < exact - 10
        assert wrong.standard_error < 0.01
        assert abs(model.log_partition("ais", base="bias", seed=1) - wrong.log_partition) < 1e-9


def test_the_fields_change_sign_with_the_bits():
    """z to 1 - z: the start of the annealing does not depend on what is called 0."""
    parameters = random_parameters(6, 5, dtype=torch.float64)
    left, right, weight = parameters
    flipped = BipartiteBoltzmann(-left - weight.sum(1), -right - weight.sum(0), weight)
    for fields, others in zip(
        BipartiteBoltzmann(*parameters)._fields_at_half(), flipped._fields_at_half(), strict=True
    ):
        assert_close(fields, -others, 1e-12)
    graph = make_graph("K8", dtype=torch.float64)
    (fields,) = graph._fields_at_half()
    h, _, _ = boltzmann_to_ising(graph.bias, graph.coupling, graph.graph, convention="physics")
    assert_close(fields, 2 * h, 1e-12)


def test_effective_sample_size_is_that_of_the_weights_and_warns():
    torch.manual_seed(0)
    model = BipartiteBoltzmann(torch.randn(20), torch.randn(20), 2 * torch.randn(20, 20))
    with pytest.warns(EffectiveSampleSizeWarning, match=r"^annealed_importance_sampling: .* of 200 as many as [\d.]+"):
        few = annealed_importance_sampling(model, 200, 2, seed=1)
    weights = few.log_weights.softmax(0)
    assert_close(few.effective_sample_size, 1 / (weights**2).sum(), 1e-12)
    assert few.effective_sample_size < 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        many = annealed_importance_sampling(model, 200, 2000, seed=1)
        annealed_importance_sampling(model, 1, 2, seed=1)  # one chain says nothing of its weight
    assert 10 < many.effective_sample_size <= 200
    both = BipartiteBoltzmann(torch.zeros(2, 20), torch.zeros(20), torch.stack((model.weight, 0 * model.weight)))
    with pytest.warns(EffectiveSampleSizeWarning):
        result = annealed_importance_sampling(both, 200, 2, seed=1)
    assert result.effective_sample_size.shape == (2,)
    assert_close(result.effective_sample_size[1], torch.tensor(200.0).double(), 1e-9)


def test_bad_likelihoods():
    name = "negative_log_likelihood_surrogate"
    with pytest.raises(
        ValueError, match=rf"^{name}: data must have shape \[\.\.\., 3\] or \[\.\.\., 5\], got \[7, 4\]"
    ):
        negative_log_likelihood_surrogate(make(3, 2), torch.zeros(7, 4), None)
    with pytest.raises((ValueError, RuntimeError), match=f"^{name}: data must hold 0 and 1 only, got 0.5"):
        negative_log_likelihood_surrogate(make(3, 2), torch.full((7, 3), 0.5).double(), None)
    # With persistent chains nothing else looks at the data. Probabilities will do there.
    model = make(3, 2)
    chains, bits = PersistentChains(4, model), torch.randint(2, (7, 5)).double()
    before = chains.bits.clone()
    for n in (3, 5):
        for bad, got in ((2 * bits - 1, "-1.0"), (255 * bits, "255.0"), (bits * math.nan, "nan")):
            with pytest.raises(ValueError, match=rf"^{name}: data must lie in \[0, 1\], got {got}$"):
                negative_log_likelihood_surrogate(model, bad[:, :n], chains)
    assert chains.bits.equal(before)
    for n in (3, 5):
        assert negative_log_likelihood_surrogate(model, bits[:, :n] / 2, chains).isfinite()
    with pytest.raises(TypeError, match=f"^{name}: num_sweeps must be an integer, got 1.5"):
        negative_log_likelihood_surrogate(make(3, 2), torch.zeros(7, 3).double(), None, 1.5)


# Likelihood -------------------------------------------------------------------------------------------------------


def exact_gradient(parameters, data):
    model = BipartiteBoltzmann(*parameters)
    energy = model.free_energy(data) if data.shape[-1] == model.num_left else model.energy(data)
    return torch.autograd.grad((energy.mean(0) + exact_log_partition(model)).sum(), parameters)


@pytest.mark.parametrize("both_sides", [False, True])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_surrogate_gradient_is_that_of_the_likelihood(both_sides, batch):
    p = [x.requires_grad_() for x in random_parameters(5, 4, (batch, batch, batch), dtype=torch.float64)]
    model = BipartiteBoltzmann(*p)
    data = random_bits(30, *batch, 9 if both_sides else 5, dtype=torch.float64)
    expected = exact_gradient(p, data)
    count = 20_000
    chains = PersistentChains(count, model)
    loss = negative_log_likelihood_surrogate(model, data, chains, num_sweeps=40)
    assert loss.shape == batch
    actual = torch.autograd.grad(loss.sum(), p)
    for a, e in zip(actual, expected, strict=True):
        # A moment of `count` chains has a standard error of at most 1 / 2 / sqrt(count).
        assert (a - e).abs().max() < z_threshold(e.numel()) * 0.5 / count**0.5
        assert e.abs().max() > 0.05
    # Planted fault: chains that have not arrived, one sweep from uniform bits.
    frozen = negative_log_likelihood_surrogate(model, data, PersistentChains(count, model), num_sweeps=1)
    wrong = torch.autograd.grad(frozen.sum(), p)
    assert any(
        (a - e).abs().max() > z_threshold(e.numel()) * 0.5 / count**0.5 for a, e in zip(wrong, expected, strict=True)
    )


@pytest.mark.parametrize("name", ["K8", "chimera"])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_surrogate_gradient_of_a_graph_is_that_of_the_likelihood(name, batch):
    model, count = make_graph(name, (batch, batch), scale=0.8), 20_000
    p = [x.requires_grad_() for x in (model.bias, model.coupling)]
    data = random_bits(30, *batch, model.num_units, dtype=torch.float64)
    expected = torch.autograd.grad((model.energy(data).mean(0) + exact_log_partition(model)).sum(), p)

    def excess(num_sweeps):
        loss = negative_log_likelihood_surrogate(model, data, PersistentChains(count, model), num_sweeps)
        assert loss.shape == batch
        errors = torch.cat(
            [(a - e).flatten() for a, e in zip(torch.autograd.grad(loss.sum(), p), expected, strict=True)]
        )
        # A moment of `count` chains has a standard error of at most 1 / 2 / sqrt(count).
        return errors.abs().max() / (z_threshold(len(errors)) * 0.5 / count**0.5)

    assert excess(40) < 1
    # Planted fault: chains that have not arrived, one sweep from uniform bits.
    assert excess(1) > 1


def test_contrastive_divergence_of_a_graph_starts_at_the_data():
    model = make_graph("chimera")
    p = [x.requires_grad_() for x in (model.bias, model.coupling)]
    # Data drawn from the model stays put on average: the gradient is near zero. Any other data moves.
    draws = exact_samples(model, 20_000)
    at_rest = torch.autograd.grad(negative_log_likelihood_surrogate(model, draws, None), p)
    ones = torch.ones(20_000, model.num_units).double()
    pushed = torch.autograd.grad(negative_log_likelihood_surrogate(model, ones, None), p)
    limit = z_threshold(model.num_units + model.graph.num_edges) * 0.5 / 20_000**0.5 * 2**0.5
    assert all(g.abs().max() < limit for g in at_rest)
    assert all(g.abs().max() > limit for g in pushed)
    with pytest.raises(ValueError, match=r"data must have shape \[\.\.\., 72\], got \[7, 36\]"):
        negative_log_likelihood_surrogate(model, torch.zeros(7, 36).double(), None)


def test_contrastive_divergence_starts_at_the_data():
    p = [x.requires_grad_() for x in random_parameters(5, 4, dtype=torch.float64)]
    model = BipartiteBoltzmann(*p)
    # Data drawn from the model stays put on average: the gradient is near zero. Any other data moves.
    draws = model.split(exact_samples(model, 20_000))[0]
    at_rest = torch.autograd.grad(negative_log_likelihood_surrogate(model, draws, None), p)
    pushed = torch.autograd.grad(negative_log_likelihood_surrogate(model, torch.ones(20_000, 5).double(), None), p)
    limit = z_threshold(29) * 0.5 / 20_000**0.5 * 2**0.5
    assert all(g.abs().max() < limit for g in at_rest)
    assert all(g.abs().max() > limit for g in pushed)


def test_surrogate_trains_a_model():
    """Persistent contrastive divergence on three pairs of equal bits, each pair broken one time in ten."""
    data = random_bits(2000, 3).repeat(1, 2)
    data[:, 3:] = (data[:, 3:] - (torch.rand(2000, 3) < 0.1).float()).abs()
    p = [torch.nn.Parameter(x) for x in (torch.zeros(6), torch.zeros(4), 0.1 * torch.randn(6, 4))]
    model = BipartiteBoltzmann(*p)
    chains, optimizer = PersistentChains(500, model), torch.optim.Adam(p, 0.02)

    @torch.no_grad()
    def likelihood():
        return float((-model.free_energy(data)).mean() - exact_log_partition(model))

    before = likelihood()
    for _ in range(300):
        optimizer.zero_grad()
        negative_log_likelihood_surrogate(model, data, chains, num_sweeps=5).backward()
        optimizer.step()
    # Six fair bits have a log-likelihood of -4.16, the truth -3.05.
    assert before < -4.1
    assert likelihood() > -3.6


def test_numpy_number_of_steps():
    for model in (make(3, 2), make_graph("K8")):
        first, second = (annealed_importance_sampling(model, 4, betas, seed=1) for betas in (5, np.int64(5)))
        assert_same_bits(second.log_weights, first.log_weights)
        partitions = [model.log_partition(num_chains=4, betas=betas, seed=1) for betas in (5, np.int64(5))]
        assert_same_bits(*partitions)
