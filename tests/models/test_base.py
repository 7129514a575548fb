# SPDX-License-Identifier: Apache-2.0
"""Members that both kinds of models have: identities against sums over all states, samples, copies, exact answers."""

import pytest
import torch
from graph_support import GRAPH_BROADCASTS, as_edges, random_graph, random_graph_parameters
from support import (
    BROADCASTS,
    all_states,
    assert_bits,
    assert_close,
    assert_same_bits,
    random_bits,
    random_parameters,
)

from gibbs_ext import (
    BipartiteBoltzmann,
    ChimeraGraph,
    ColoredGraph,
    GraphBoltzmann,
    annealed_importance_sampling,
)

# 9 nodes, 4 colours, of which the middle ones hold two nodes each.
GRAPH = random_graph(9, 20, seed=4)


def bipartite(batches=((), (), ()), **options):
    """A model of 4 + 3 units."""
    parameters = random_parameters(4, 3, batches, dtype=torch.float64, **options)
    return BipartiteBoltzmann(*parameters, validate_args=True)


def on_graph(batches=((), ()), **options):
    """A model of 9 units."""
    parameters = random_graph_parameters(GRAPH, batches, dtype=torch.float64, **options)
    return GraphBoltzmann(GRAPH, *parameters, validate_args=True)


MAKERS = pytest.mark.parametrize("make", [bipartite, on_graph])
MAKERS_AND_BATCHES = pytest.mark.parametrize(
    ("make", "batches"),
    [
        (make, tuple(batches))
        for make, broadcasts in ((bipartite, BROADCASTS), (on_graph, GRAPH_BROADCASTS))
        for (_, *batches), _ in broadcasts.values()
    ],
)
# A batch of the first and the last parameter.
SOME_BATCHES = pytest.mark.parametrize(
    ("make", "batches", "coupling"), [(bipartite, ((3,), (), ()), "weight"), (on_graph, ((3,), ()), "coupling")]
)


def all_of(model):
    """[2^N, *ones, N]: every state, to broadcast against the model's batch."""
    n = model.num_units
    return all_states(n).reshape(-1, *(1,) * len(model.batch_shape), n)


def leaves(model):
    return [getattr(model, argument).requires_grad_() for argument in model._dims]


@MAKERS_AND_BATCHES
def test_log_prob_is_normalised(make, batches):
    model = make(batches)
    log_prob = model.log_prob(all_of(model))
    assert log_prob.shape == (2**model.num_units, *model.batch_shape)
    assert_close(log_prob.exp().sum(0), torch.ones(model.batch_shape, dtype=torch.float64), 1e-12)
    known = model.log_prob(all_of(model), log_partition=model.log_partition("exact"))
    assert_close(known, log_prob, 1e-12)


@MAKERS_AND_BATCHES
def test_shapes(make, batches):
    model = make(batches)
    n = model.num_units
    assert n == (7 if make is bipartite else 9)
    for sample_shape in ((), (2,), (2, 3)):
        z = model.sample(sample_shape, 3)
        assert z.shape == (*sample_shape, *model.batch_shape, n)
        assert z.dtype == torch.float64
        assert_bits(z)
        assert model.rsample(sample_shape, 3).shape == z.shape
        assert model.energy(z).shape == model.log_prob(z).shape == z.shape[:-1]
        if make is on_graph:
            assert model.free_energy(z).shape == z.shape[:-1]
            assert model.fields(z).shape == z.shape
    assert model.event_shape == (n,)


@pytest.mark.parametrize(("make", "batches"), [(bipartite, ((2,), (), (2,))), (on_graph, ((2,), ()))])
def test_rsample_is_differentiable(make, batches):
    model = make(batches)
    parameters = leaves(model)
    z = model.rsample((50,), 5, 2, sharpness=3.0)
    assert ((z >= 0) & (z <= 1)).all()
    (z**2).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in parameters)


@SOME_BATCHES
def test_expand_shares_memory(make, batches, coupling):
    model = make(batches)
    big = model.expand((5, 3))
    assert big.batch_shape == (5, 3)
    assert big.event_shape == model.event_shape
    assert getattr(big, coupling).data_ptr() == getattr(model, coupling).data_ptr()
    assert make is bipartite or big.graph is model.graph
    z = random_bits(5, 3, model.num_units, dtype=torch.float64)
    assert_close(big.energy(z), model.energy(z), 1e-12)
    assert_same_bits(big.sample((), 3, seed=1), model.sample((5,), 3, seed=1))
    assert model.batch_shape == (3,)


@MAKERS
def test_detach(make):
    model = make()
    *_, coupling = leaves(model)
    z = torch.zeros(model.num_units).double()
    assert model.energy(z).requires_grad
    assert not model.detach().energy(z).requires_grad
    assert coupling.requires_grad


@pytest.mark.parametrize("validate", [True, False])
@MAKERS
def test_copies_validate_as_the_original(make, validate):
    model = make()
    parameters = [getattr(model, argument) for argument in model._dims]
    model = type(model)(*([GRAPH] if make is on_graph else []), *parameters, validate_args=validate)
    for copy in (model.detach(), model.expand((2,)), model.expand((2,)).detach()):
        z = torch.full((model.num_units,), 0.5).double()
        if validate:
            with pytest.raises(ValueError, match="support"):
                copy.log_prob(z)
        else:
            copy.log_prob(z)


@MAKERS
def test_exact_gradient_of_log_prob(make):
    """Moments: d log Z = E[-d energy]."""
    model = make()
    parameters = leaves(model)
    probabilities = model.log_prob(all_of(model)).exp().detach()
    gradient = torch.autograd.grad(model.log_partition("exact"), parameters)
    expected = torch.autograd.grad(-(probabilities * model.energy(all_of(model))).sum(), parameters)
    for actual, moment in zip(gradient, expected, strict=True):
        assert_close(actual, moment, 1e-12)


@pytest.mark.parametrize(("make", "options"), [(bipartite, {}), (on_graph, {"scale": 0.7})])
def test_ais_gradient_of_log_partition(make, options):
    model = make(**options)
    parameters = leaves(model)
    exact = torch.autograd.grad(model.log_partition("exact"), parameters)
    estimate = torch.autograd.grad(model.log_partition("ais", num_chains=20_000, betas=50), parameters)
    assert max(float(g.max()) for g in exact) > 0.2
    for actual, expected in zip(estimate, exact, strict=True):
        # A moment of 20000 bits has a standard error of at most 0.0036; the weights hardly widen it.
        assert_close(actual, expected, 6 * 0.0036)


def test_log_partition_with_its_error():
    for model in with_all_states((3,)):
        parameters = [getattr(model, argument).requires_grad_() for argument in model._dims]
        options = {"num_chains": 200, "betas": 20, "seed": 3}
        log_partition, error = model.log_partition(return_error=True, **options)
        result = annealed_importance_sampling(model, 200, 20, seed=3)
        assert_same_bits((log_partition, error), (result.log_partition, result.standard_error))
        assert not error.requires_grad
        # The default's value and gradient.
        alone = model.log_partition(**options)
        assert_same_bits(log_partition, alone)
        assert_same_bits(*(torch.autograd.grad(value.sum(), parameters) for value in (log_partition, alone)))

        log_partition, error = model.log_partition("exact", return_error=True)
        assert_same_bits(log_partition, model.log_partition("exact"))
        assert_same_bits(error, torch.zeros(3).double())
        assert not error.requires_grad


@pytest.mark.parametrize("method", ["sample", "rsample"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_sweeps": -1}, "num_sweeps must be at least 0, got -1"),
        ({"num_sweeps": 1.5}, "num_sweeps must be an integer, got 1.5"),
        ({"initial": torch.zeros(5)}, r"initial must broadcast to shape \[2, {}\], got \[5\]"),
        ({"initial": torch.zeros(3, 1)}, r"initial must broadcast to shape \[2, {}\], got \[3, 1\]"),
        ({"initial": [0, 1]}, "initial must be a tensor, got list"),
        ({"initial": torch.full((1,), 0.5)}, "initial must hold 0 and 1 only, got 0.5"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"generator": 3}, "generator must be a torch.Generator, got 3"),
    ],
)
@MAKERS
def test_bad_samples(make, method, arguments, message):
    name = "BipartiteBoltzmann" if make is bipartite else "GraphBoltzmann"
    message = message.format(4 if make is bipartite else 9)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=f"^{name}.{method}: {message}"):
        getattr(make(), method)((2,), **arguments)


ON_EDGES = ColoredGraph(3, [(0, 1), (1, 2)])


def both_kinds():
    yield BipartiteBoltzmann(torch.randn(2), torch.randn(1), torch.randn(2, 1))
    yield GraphBoltzmann(ON_EDGES, torch.randn(3), torch.randn(2))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
def test_bits_of_any_dtype(dtype):
    for model in both_kinds():
        z = torch.randint(2, (5, 3)).float()
        methods = [model.energy, model.log_prob]
        methods += [model.fields, model.free_energy] if isinstance(model, GraphBoltzmann) else []
        for method in methods:
            assert_same_bits(method(z.to(dtype)), method(z))
        if isinstance(model, BipartiteBoltzmann):
            assert_same_bits(model.free_energy(z[:, :2].to(dtype)), model.free_energy(z[:, :2]))


@pytest.mark.parametrize("sample_shape", [3, None, (-1,), (2.5,), (True,), "ab", ((2,),)])
@pytest.mark.parametrize("method", ["sample", "rsample"])
def test_sample_shapes_that_are_none(method, sample_shape):
    for model in both_kinds():
        name = f"{type(model).__name__}.{method}"
        with pytest.raises((TypeError, ValueError), match=f"^{name}: sample_shape must be a sequence of non-negative"):
            getattr(model, method)(sample_shape)


# Precision --------------------------------------------------------------------------------------------------------


def small_models(batch, dtype):
    """A bipartite model and one on a graph, of 11 and 8 units, and the parameters of both in float64."""
    torch.manual_seed(2)
    parameters = [torch.randn(*batch, *shape).to(dtype) for shape in ((5,), (6,), (5, 6))]
    graph, on_graph = ChimeraGraph(1), [torch.randn(*batch, n).to(dtype) for n in (8, 16)]
    yield BipartiteBoltzmann(*parameters), BipartiteBoltzmann(*(x.double() for x in parameters))
    yield GraphBoltzmann(graph, *on_graph), GraphBoltzmann(graph, *(x.double() for x in on_graph))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("autocast", [False, True])
def test_energies_and_probabilities_have_their_digits(dtype, batch, autocast):
    for model, exact in small_models(batch, dtype):
        z = all_states(model.num_units).float().reshape(-1, *(1,) * len(batch), model.num_units)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            log_prob, energy = model.log_prob(z), model.energy(z.to(dtype))
            log_partitions = [model.log_partition("exact"), model.log_partition("ais", num_chains=500, betas=50)]
            samples = model.sample((3,), 4), model.rsample((3,), 4)
            free = model.free_energy(z[..., :5] if isinstance(model, BipartiteBoltzmann) else z)
        assert {x.dtype for x in (log_prob, *log_partitions)} == {torch.float64}
        assert {x.dtype for x in (energy, free)} == {torch.float32}
        assert [x.dtype for x in samples] == [dtype, torch.float32]
        assert_close(energy, exact.energy(z.double()).float(), 1e-5)
        assert_close(log_prob, exact.log_prob(z.double()), 1e-5)
        assert_close(log_prob.exp().sum(0), torch.ones(batch, dtype=torch.float64), 1e-5)
        assert_close(log_partitions[0], exact.log_partition("exact"), 1e-5)


def test_energies_of_half_precision_do_not_overflow():
    """float16 ends at 65504, and bfloat16 has 8 bits."""
    model = BipartiteBoltzmann(torch.zeros(300).half(), torch.zeros(300).half(), torch.ones(300, 300).half())
    assert model.energy(torch.ones(600)).item() == -90000
    assert model.free_energy(torch.ones(300)).item() == -90000
    graph = ColoredGraph(600, [(i, 300 + j) for i in range(300) for j in range(300)])
    on_graph = GraphBoltzmann(graph, torch.zeros(600).half(), torch.ones(graph.num_edges).half())
    assert on_graph.energy(torch.ones(600)).item() == -90000


# Exact answers ----------------------------------------------------------------------------------------------------


def with_all_states(batch=(), scale=1.0):
    """Models of either kind, both orientations of the bipartite one, and the log-probabilities of their states."""
    for n1, n2 in ((4, 3), (3, 4), (1, 6)):
        yield BipartiteBoltzmann(*random_parameters(n1, n2, (batch, (), batch), dtype=torch.float64, scale=scale))
    graph = random_graph(7, 12)
    yield GraphBoltzmann(graph, *random_graph_parameters(graph, ((), batch), dtype=torch.float64, scale=scale))
    yield GraphBoltzmann(ColoredGraph(7, as_edges([])), torch.randn(*batch, 7).double(), torch.zeros(0).double())


@pytest.mark.parametrize("batch", [(), (3,), (2, 1, 2)])
def test_mean_variance_and_entropy_are_those_of_all_states(batch):
    for model in with_all_states(batch):
        z = all_states(7).reshape(-1, *(1,) * len(batch), 7)
        log_p = (-model.energy(z)).expand(128, *batch).log_softmax(0)
        p = log_p.exp().unsqueeze(-1)
        mean = (p * z).sum(0)
        assert_close(model.mean, mean, 1e-12)
        assert_close(model.variance, (p * (z - mean) ** 2).sum(0), 1e-12)
        assert_close(model.stddev, (p * (z - mean) ** 2).sum(0).sqrt(), 1e-12)
        assert_close(model.entropy(), -(log_p.exp() * log_p).sum(0), 1e-12)
        assert_close(model.perplexity(), (-(log_p.exp() * log_p).sum(0)).exp(), 1e-12)


def test_entropy_of_models_with_one_state_or_all():
    """Where log Z and the mean energy are large and equal, their difference is no less than 0."""
    for model in with_all_states((50,), scale=300.0):
        assert (model.entropy() >= 0).all()
    uniform = BipartiteBoltzmann(torch.zeros(5), torch.zeros(4), torch.zeros(5, 4))
    assert_close(uniform.entropy(), 9 * torch.tensor(2.0).double().log(), 1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_exact_answers_are_float64(dtype):
    for model in with_all_states():
        parameters = [getattr(model, argument).to(dtype) for argument in model._dims]
        graph = [model.graph] if isinstance(model, GraphBoltzmann) else []
        low = type(model)(*graph, *parameters)
        same = type(model)(*graph, *(p.double() for p in parameters))
        for answer in (lambda model: model.mean, lambda model: model.variance, lambda model: model.entropy()):
            assert answer(low).dtype == torch.float64
            assert_close(answer(low), answer(same), 1e-14)


def test_asking_for_the_gradient_of_an_exact_answer_is_an_error():
    """A loss that has the entropy in it must not go without its gradient."""
    for model in with_all_states():
        bias = getattr(model, next(iter(model._dims))).requires_grad_()
        name = type(model).__name__
        for method, value in (("mean", model.mean), ("variance", model.variance), ("entropy", model.entropy())):
            with pytest.raises(NotImplementedError, match=f"^{name}.{method}: derivatives are not supported$"):
                torch.autograd.grad(value.sum() + bias.sum(), bias)
        with torch.no_grad():
            assert not model.entropy().requires_grad
        assert not model.detach().mean.requires_grad


def test_exact_answers_of_large_models_are_errors_that_say_what_to_do():
    bipartite = BipartiteBoltzmann(torch.zeros(30), torch.zeros(26), torch.zeros(30, 26))
    graph = ChimeraGraph(7)
    on_graph = GraphBoltzmann(graph, torch.zeros(graph.num_nodes), torch.zeros(graph.num_edges))
    for model, why in ((bipartite, r"the smaller side of 30 \+ 26 units .*"), (on_graph, "the graph needs tables .*")):
        for method, call, instead in (
            ("mean", lambda model: model.mean, "the mean of samples"),
            ("variance", lambda model: model.variance, "the variance of samples"),
            ("entropy", lambda model: model.entropy(), r"log_partition\('ais'\) plus the mean energy of samples"),
        ):
            with pytest.raises(
                ValueError, match=f"^{type(model).__name__}.{method}: {why}; use {instead}, an estimate$"
            ):
                call(model)
        assert repr(model).startswith(type(model).__name__)  # which asks for none of them
    with pytest.raises(ValueError, match=r"^BipartiteBoltzmann.mean: weight must be finite, got NaN or inf"):
        _ = BipartiteBoltzmann(torch.zeros(2), torch.zeros(1), torch.full((2, 1), torch.nan), validate_args=False).mean
