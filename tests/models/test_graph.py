# SPDX-License-Identifier: Apache-2.0
"""GraphBoltzmann: identities against sums over edges and over all states."""

import pytest
import torch
from graph_support import (
    GRAPH_BROADCASTS,
    GRAPHS,
    chimera_cell,
    exact_energies,
    exact_graph_probabilities,
    graph_named,
    grid_graph,
    random_graph,
    random_graph_parameters,
)
from support import (
    FALSE_ALARM,
    all_states,
    assert_close,
    assert_same_bits,
    chi_square_excess,
    random_bits,
)

from gibbs_ext import (
    BipartiteBoltzmann,
    ChimeraGraph,
    GraphBoltzmann,
    coupling_resolution,
    graph_gibbs,
    graph_gibbs_relaxed,
)

# 9 nodes, 4 colours, of which the middle ones hold two nodes each.
GRAPH = random_graph(9, 20, seed=4)
BATCHES = [tuple(batches) for (_, *batches), _ in GRAPH_BROADCASTS.values()]


def make(batches=((), ()), graph=GRAPH, dtype=torch.float64, **kwargs):
    p = random_graph_parameters(graph, batches, dtype=dtype, **kwargs)
    return GraphBoltzmann(graph, *p, validate_args=True)


def all_of(model):
    """[2^N, *ones, N]: every state, to broadcast against the model's batch."""
    n = model.num_units
    return all_states(n).reshape(-1, *(1,) * len(model.batch_shape), n)


def test_the_graph_has_colours_to_tell_apart():
    assert GRAPH.num_colors >= 3
    assert GRAPH.max_degree > 4


# Energies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("relaxed", [False, True])
def test_energy_is_the_contracts_sum(batches, relaxed):
    model = make(batches)
    z = torch.rand(5, *model.batch_shape, 9, dtype=torch.float64)
    z = z if relaxed else z.round()
    expected = torch.zeros(5, *model.batch_shape, dtype=torch.float64)
    for i in range(9):
        expected -= model.bias[..., i] * z[..., i]
    for e, (u, v) in enumerate(GRAPH.edges.tolist()):
        expected -= model.coupling[..., e] * z[..., u] * z[..., v]
    assert_close(model.energy(z), expected, 1e-12)


@pytest.mark.parametrize("batches", BATCHES)
def test_fields_are_the_energys_slopes(batches):
    model = make(batches)
    z = torch.rand(5, *model.batch_shape, 9, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(model.energy(z).sum(), z)
    assert_close(model.fields(z), -slope, 1e-12)


@pytest.mark.parametrize("batches", BATCHES)
def test_free_energy_sums_colour_0_out(batches):
    model = make(batches)
    z = random_bits(5, *model.batch_shape, 9, dtype=torch.float64)
    first = GRAPH.colors == 0
    filled = all_states(int(first.sum()))
    states = z.expand(len(filled), *z.shape).clone()
    states[..., first] = filled.reshape(len(filled), *(1,) * (z.dim() - 1), -1)
    expected = -torch.logsumexp(-model.energy(states), 0)
    assert_close(model.free_energy(z), expected, 1e-12)
    assert_same_bits(model.free_energy(torch.where(first, 1 - z, z)), model.free_energy(z))


@pytest.mark.parametrize("name", GRAPHS)
def test_energies_of_any_graph(name):
    """One unit flipped: the energy changes by its field."""
    graph = graph_named(name)
    model = make(graph=graph)
    unit = torch.randint(graph.num_nodes, (50,))
    at_unit = torch.nn.functional.one_hot(unit, graph.num_nodes).double()
    off = random_bits(50, graph.num_nodes, dtype=torch.float64) * (1 - at_unit)
    change = model.energy(off + at_unit) - model.energy(off)
    assert_close(change, -(model.fields(off) * at_unit).sum(-1), 1e-12)
    # The same of free energies, where the unit is not summed out; and with colour 0 at its mean they differ from
    # the energy by the entropy.
    rest = graph.colors != 0
    q = model.fields(off * rest).sigmoid()
    entropy = -(q * q.log() + (1 - q) * (1 - q).log())[..., ~rest].sum(-1)
    assert_close(model.free_energy(off), model.energy(torch.where(rest, off, q)) - entropy, 1e-10)


def test_one_chimera_cell_is_a_bipartite_model():
    p, bipartite = chimera_cell((3,), dtype=torch.float64)
    cell, rbm = GraphBoltzmann(ChimeraGraph(1), *p), BipartiteBoltzmann(*bipartite)
    z = random_bits(5, 3, 8, dtype=torch.float64)
    assert_close(cell.energy(z), rbm.energy(z), 1e-12)
    assert_close(cell.fields(z)[..., 4:], rbm.fields_of_right(z[..., :4]), 1e-12)
    # Side 1, here the right one, has colour 0.
    assert_close(cell.free_energy(z), rbm.free_energy(z[..., :4]), 1e-12)
    assert_close(cell.log_partition("exact"), rbm.log_partition("exact"), 1e-12)
    assert_same_bits(cell.sample((4,), 7, seed=1), rbm.sample((4,), 7, seed=1))
    assert_same_bits(coupling_resolution(cell), coupling_resolution(rbm))
    for relaxation in ("pwl", "straight_through"):
        options = {"num_relaxed_sweeps": 2, "relaxation": relaxation, "seed": 1}
        assert_close(cell.rsample((4,), 7, **options), rbm.rsample((4,), 7, **options), 1e-12)
    estimates = [model.log_partition(num_chains=10, betas=5, seed=1) for model in (cell, rbm)]
    assert_close(*estimates, 1e-5)


@pytest.mark.parametrize("function", ["energy", "fields", "free_energy"])
def test_gradients(function):
    z = torch.rand(4, 2, 9, dtype=torch.float64, requires_grad=True)
    p = [x.requires_grad_() for x in random_graph_parameters(GRAPH, ((2,), ()), dtype=torch.float64)]

    def call(z, *p):
        return getattr(GraphBoltzmann(GRAPH, *p), function)(z)

    assert torch.autograd.gradcheck(call, (z, *p))
    assert torch.autograd.gradgradcheck(call, (z, *p))


def test_broadcast_energies_do_not_materialise_the_coupling():
    """1000 chains of 2 models: no dense matrix, nothing larger than the values at the edges."""
    graph = ChimeraGraph(8)
    model = GraphBoltzmann(graph, *random_graph_parameters(graph, ((), (2,))), validate_args=False)
    z = torch.zeros(1000, 2, graph.num_nodes)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model.energy(z)
        model.free_energy(z)
    at_edges = 4 * 1000 * 2 * graph.num_edges
    assert max(event.cpu_memory_usage / event.count for event in profile.key_averages()) < 2 * at_edges


# Probabilities ----------------------------------------------------------------------------------------------------


def test_log_prob_is_the_contracts():
    p = random_graph_parameters(GRAPH)
    model = GraphBoltzmann(GRAPH, *p)
    exact = exact_graph_probabilities(GRAPH, p)
    assert_close(model.log_prob(all_of(model).float()).exp(), exact, 1e-6)
    assert_close(model.energy(all_of(model).float()).double(), exact_energies(GRAPH, p), 1e-6)


# Samples ----------------------------------------------------------------------------------------------------------


def test_sample_start_and_seed():
    model = make()
    p = model.bias, model.coupling, GRAPH
    state = random_bits(6, 9, dtype=torch.float64)
    expected = graph_gibbs(state, *p, 5, seed=3)
    assert_same_bits(model.sample((6,), 5, initial=state, seed=3), expected)
    assert_same_bits(model.sample((6,), 5, seed=3)[:2], model.sample((2,), 5, seed=3))
    assert_same_bits(model.sample((6,), 0, initial=state), state)
    for dtype in (torch.bool, torch.uint8, torch.float32):  # the result is of the parameters' dtype all the same
        assert_same_bits(model.sample((6,), 5, initial=state.to(dtype), seed=3), expected)
        assert model.rsample((6,), 5, initial=state.to(dtype), seed=3).dtype == torch.float64
    relaxed, _ = graph_gibbs_relaxed(state, *p, 5, 2, sharpness=3.0, seed=3)
    assert_same_bits(model.rsample((6,), 5, 2, sharpness=3.0, initial=state, seed=3), relaxed)
    # Uniform bits are a sweep at beta = 0.
    schedule = torch.tensor([0.0, *[1.0] * 5])
    uniform = graph_gibbs(torch.zeros(6, 9).double(), *p, 6, beta=schedule, seed=3)
    assert_same_bits(model.sample((6,), 5, seed=3), uniform)
    torch.manual_seed(1)
    first = model.sample((6,), 5)
    assert_same_bits(model.sample((6,), 5, generator=torch.Generator().manual_seed(1)), first)


def test_samples_follow_the_model():
    graph = graph_named("odd ring")
    p = random_graph_parameters(graph, scale=0.6, generator=torch.Generator().manual_seed(3))
    model = GraphBoltzmann(graph, *p)
    exact = exact_graph_probabilities(graph, p)
    assert chi_square_excess(model.sample((100_000,), 15), exact) < 1, FALSE_ALARM
    assert chi_square_excess(model.sample((100_000,), 0), torch.full((512,), 1 / 512).double()) < 1
    assert chi_square_excess(model.sample((100_000,), 1), exact) > 1


# Copies -----------------------------------------------------------------------------------------------------------


def test_coupling_resolution():
    model = make(((2, 1), (3,)))
    resolution = coupling_resolution(model)
    assert (resolution.dtype, resolution.shape) == (torch.float64, (3,))
    assert ((resolution > 0) & (resolution < 1e-6)).all()
    doubled = GraphBoltzmann(GRAPH, model.bias, 2 * model.coupling)
    assert_same_bits(coupling_resolution(doubled), 2 * resolution)


# Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"graph": [(0, 1)]}, "graph must be a ColoredGraph, got list"),
        ({"bias": torch.zeros(7)}, r"bias must have shape \[\.\.\., 6\] to fit the graph's nodes, got \[7\]"),
        (
            {"coupling": torch.zeros(2, 6)},
            r"coupling must have shape \[\.\.\., 7\] to fit the graph's edges, got \[2, 6\]",
        ),
        ({"bias": torch.tensor(0.0)}, r"bias needs 1 or more dims, got shape \[\]"),
        ({"coupling": torch.zeros(7, dtype=torch.int64)}, "coupling must be a floating-point tensor, got torch.int64"),
        ({"bias": [0.0] * 6}, "bias must be a floating-point tensor, got list"),
        ({"bias": torch.zeros(6).double()}, "bias must have the dtype of coupling, torch.float32, got torch.float64"),
        (
            {"bias": torch.zeros(2, 6), "coupling": torch.zeros(3, 7)},
            r"batch dims do not broadcast: bias \[2, 6\], coupling \[3, 7\]",
        ),
    ],
)
def test_bad_parameters(change, message):
    good = {"graph": grid_graph(2, 3), "bias": torch.zeros(6), "coupling": torch.zeros(7)}
    GraphBoltzmann(**good)
    with pytest.raises((TypeError, ValueError), match=f"^GraphBoltzmann: {message}"):
        GraphBoltzmann(**{**good, **change})


def test_values_are_validated_on_request():
    with pytest.raises(ValueError, match="coupling"):
        GraphBoltzmann(GRAPH, torch.zeros(9), torch.full((20,), torch.nan), validate_args=True)
    model = make()
    with pytest.raises(ValueError, match="support"):
        model.log_prob(torch.full((9,), 0.5).double())
    for call in (model.energy, model.fields, model.free_energy):
        with pytest.raises(ValueError, match=r"^GraphBoltzmann: z must have shape \[\.\.\., 9\], got \[2, 6\]"):
            call(torch.zeros(2, 6).double())
        with pytest.raises(TypeError, match=r"^GraphBoltzmann: z must be a tensor, got list"):
            call([0])
    with pytest.raises(ValueError, match=r"^GraphBoltzmann.log_partition: method must be"):
        model.log_partition("guess")
    large = make(graph=ChimeraGraph(8))
    for method, call in (("log_prob", large.log_prob), ("log_partition", lambda z: large.log_partition("exact"))):
        with pytest.raises(ValueError, match=rf"^GraphBoltzmann.{method}: the graph needs tables of 2\^32 numbers"):
            call(torch.zeros(512).double())
    with pytest.raises(ValueError, match=r"^GraphBoltzmann.log_partition: num_chains must be at least 1, got 0"):
        model.log_partition(num_chains=0)


def test_other_bad_calls():
    model = make()
    with pytest.raises(ValueError, match=r"^GraphBoltzmann.rsample: num_relaxed_sweeps must be at least 1, got 0"):
        model.rsample(num_relaxed_sweeps=0)
    with pytest.raises(ValueError, match=r"^GraphBoltzmann.rsample: relaxation must be one of .*, got 'none'"):
        model.rsample(relaxation="none")
    with pytest.raises(
        TypeError, match=r"^coupling_resolution: model must be a BipartiteBoltzmann or a GraphBoltzmann"
    ):
        coupling_resolution(3)
