# SPDX-License-Identifier: Apache-2.0
"""Metropolis sweeps of coloured graphs: the reference's bits, the rule's exact law, and its edges."""

import warnings

import pytest
import torch
from graph_support import (
    GRAPH_BROADCASTS,
    GRAPHS,
    GraphParameters,
    complete_graph,
    exact_energies,
    exact_graph_probabilities,
    exact_metropolis_sweeps,
    graph_named,
    grid_graph,
    random_graph,
    random_graph_parameters,
    star_graph,
    taking,
)
from hypothesis import given
from hypothesis import strategies as st
from support import (
    all_states,
    assert_bits,
    assert_same_bits,
    awkward,
    chi_square_excess,
    random_bits,
    supported_instruction_sets,
    untouched,
)

from gibbs_ext import ChimeraGraph, ColoredGraph, CouplingResolutionWarning, graph_gibbs, graph_metropolis
from gibbs_ext.reference import graph_metropolis_reference

# Always by blocks on the CPU; another backend has routes.
WAYS = [(instruction_set, "auto") for instruction_set in supported_instruction_sets()]
DTYPES = [torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Batch shapes of bias and coupling for a state [C, N].
KINDS = pytest.mark.parametrize("kind", [("", ""), ("C", ""), ("", "C")], ids=["shared", "bias", "coupling"])


def parameters_of(kind, graph, chains, **options):
    return random_graph_parameters(graph, [(chains,) if batch else () for batch in kind], **options)


def both(state, bias, coupling, graph, *args, **kwargs):
    """Runs the reference, and the op in every way; checks that all agree and no input changes; returns the bits."""
    tensors = {
        str(i): x for i, x in enumerate((state, bias, coupling, *kwargs.values())) if isinstance(x, torch.Tensor)
    }
    expected = graph_metropolis_reference(state, bias, coupling, graph, *args, **kwargs)
    with untouched(**tensors, edges=graph.edges, colors=graph.colors, layout=graph.layout):
        for way in WAYS:
            with taking(*way):
                actual = graph_metropolis(state, bias, coupling, graph, *args, **kwargs)
                assert_same_bits(actual, expected)
                assert actual.is_contiguous()
    return expected


# Agreement with the reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("broadcast", GRAPH_BROADCASTS)
def test_agrees_with_reference(name, broadcast):
    (state, *batches), shape = GRAPH_BROADCASTS[broadcast]
    graph = graph_named(name)
    n = graph.num_nodes
    z = both(random_bits(*state, n), *random_graph_parameters(graph, batches), graph, 4, seed=n)
    assert z.shape == (*shape, n)
    assert_bits(z)


@given(
    n=st.integers(1, 150),
    density=st.sampled_from([0.0, 0.02, 0.1, 1.0]),
    one_colour_each=st.booleans(),
    chains=st.integers(1, 40),
    models=st.sampled_from([None, 1, 3]),
    per_chain=st.booleans(),
    scale=st.sampled_from([0.0, 0.1, 1.0, 10.0]),
    num_sweeps=st.integers(0, 4),
    clamp=st.booleans(),
)
def test_agrees_with_reference_on_any_problem(
    n, density, one_colour_each, chains, models, per_chain, scale, num_sweeps, clamp
):
    n = min(n, 40) if density == 1 else n
    graph = random_graph(n, round(density * n * (n - 1) / 2), seed=n)
    if one_colour_each:
        graph = ColoredGraph(n, graph.edges, torch.randperm(n))
    batch = () if models is None else (models,)
    p = random_graph_parameters(graph, ((chains, *batch) if per_chain else (), batch), scale=scale)
    options = {"clamp": torch.rand(n) < 0.3} if clamp else {}
    both(random_bits(chains, *batch, n), *p, graph, num_sweeps, seed=n, chain_offset=n, **options)


@KINDS
@pytest.mark.parametrize("chains", [1, 2, 15, 16, 17, 31, 33, 64, 130])
@pytest.mark.parametrize("name", ["chimera", "star of 9"])
def test_agrees_with_reference_for_any_number_of_chains(name, chains, kind):
    graph = graph_named(name)
    both(random_bits(chains, graph.num_nodes), *parameters_of(kind, graph, chains), graph, 4, seed=3)


@KINDS
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 0.1, 3.0, 30.0, 3e4, 1e30])
@pytest.mark.filterwarnings("ignore::gibbs_ext.CouplingResolutionWarning")
def test_agrees_with_reference_at_any_scale(scale, kind):
    """From flips that are all made to a frozen model."""
    for name in ("chimera", "K20"):
        graph = graph_named(name)
        both(random_bits(40, graph.num_nodes), *parameters_of(kind, graph, 40, scale=scale), graph, 5, seed=5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameter_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype, parameter_dtype):
    graph = graph_named("chimera with holes")
    for batches in (((), ()), ((), (5,))):
        p = random_graph_parameters(graph, batches, dtype=parameter_dtype)
        z = both(random_bits(5, graph.num_nodes, dtype=dtype), *p, graph, 3, seed=1)
        assert z.dtype == dtype


@KINDS
@pytest.mark.parametrize("mask", ["unit", "chain", "one per chain", "one", "all", "none"])
def test_clamps(kind, mask):
    chains = 37
    for name in ("chimera with holes", "K20", "no edges"):
        graph = graph_named(name)
        n = graph.num_nodes
        clamp = {
            "unit": torch.rand(n) < 0.5,
            "chain": torch.rand(chains, n) < 0.5,
            "one per chain": torch.rand(chains, 1) < 0.5,
            "one": torch.tensor(True),
            "all": torch.ones(n, dtype=torch.bool),
            "none": torch.zeros(n, dtype=torch.bool),
        }[mask]
        before = random_bits(chains, n)
        after = both(before, *parameters_of(kind, graph, chains), graph, 5, clamp=clamp, seed=2)
        kept = clamp.expand(before.shape)
        assert after[kept].equal(before[kept])
        assert mask in ("all", "one") or not after[~kept].equal(before[~kept])


@KINDS
@pytest.mark.parametrize("name", ["chimera", "star of 20"])
def test_schedule_of_beta(name, kind):
    graph = graph_named(name)
    p, state = parameters_of(kind, graph, 50), random_bits(50, graph.num_nodes)
    for beta in (0.37, 2.5, -1.0, torch.tensor(0.5), [0.0, 0.5, 0.5, 0.5, 1.0, 2.0], torch.linspace(0, 3, 6)):
        both(state, *p, graph, 6, beta=beta, seed=4)
    expected = graph_metropolis(state, *p, graph, 3, beta=0.7, seed=4)
    assert_same_bits(graph_metropolis(state, *p, graph, 3, beta=[0.7] * 3, seed=4), expected)


# What the bits do not depend on -----------------------------------------------------------------------------------


@KINDS
def test_a_chain_alone_is_the_chain_among_others(kind):
    graph = graph_named("chimera with holes")
    p, state = parameters_of(kind, graph, 64), random_bits(64, graph.num_nodes)
    together = graph_metropolis(state, *p, graph, 12, seed=8)
    own = [x[7] if batch else x for x, batch in zip(p, kind, strict=True)]
    assert_same_bits(graph_metropolis(state[7], *own, graph, 12, seed=8, chain_offset=7), together[7])


@KINDS
def test_any_split_of_the_sweeps(kind):
    graph = graph_named("chimera")
    p, state, beta = parameters_of(kind, graph, 70), random_bits(70, graph.num_nodes), torch.linspace(0.1, 2, 10)
    expected = graph_metropolis(state, *p, graph, 10, beta=beta, seed=6)
    first = graph_metropolis(state, *p, graph, 3, beta=beta[:3], seed=6)
    assert_same_bits(graph_metropolis(first, *p, graph, 7, beta=beta[3:], sweep_offset=3, seed=6), expected)
    assert not graph_metropolis(first, *p, graph, 7, beta=beta[3:], seed=6).equal(expected)


@pytest.mark.parametrize("broadcast", ["shared", "per_model", "bias_per_chain", "models_of_chains", "single"])
@pytest.mark.parametrize("name", ["chimera", "K20"])
def test_any_number_of_threads(name, broadcast, threads):
    graph = graph_named(name)
    (state, *batches), _ = GRAPH_BROADCASTS[broadcast]
    grow = [(*(40 * s if s > 1 else s for s in batch),) for batch in (state, *batches)]
    p = random_graph_parameters(graph, grow[1:])
    z = random_bits(*grow[0], graph.num_nodes, dtype=torch.bool)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(graph_metropolis(z, *p, graph, 8, seed=2))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@KINDS
@pytest.mark.parametrize("how", ["transposed", "strided", "offset"])
def test_memory_layout_does_not_matter(how, kind):
    graph = graph_named("chimera with holes")
    n = graph.num_nodes
    p, state, clamp = parameters_of(kind, graph, 6), random_bits(6, n), torch.rand(6, n) < 0.3
    expected = graph_metropolis(state, *p, graph, 4, clamp=clamp, seed=1)
    state, bias, coupling, clamp = (awkward(x, how) for x in (state, *p, clamp))
    assert_same_bits(both(state, bias, coupling, graph, 4, clamp=clamp, seed=1), expected)


@pytest.mark.parametrize("numbers", [(0, 0), (2**32 - 2, 2**32 - 2), (2**48 - 5, 2**44 - 4)])
@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
def test_numbers_at_their_limits(numbers, seed):
    graph = graph_named("chimera with holes")
    chain_offset, sweep_offset = numbers
    p, state = random_graph_parameters(graph), random_bits(5, graph.num_nodes)
    both(state, *p, graph, 4, seed=seed, chain_offset=chain_offset, sweep_offset=sweep_offset)


@KINDS
@pytest.mark.parametrize("name", ["chimera with holes", "K20", "pegasus-like"])
def test_gauge_transformation(name, kind):
    """Turning z_i into 1 - z_i for some units turns the model into another one, whose flips are the same ones.

    To the bit: parameters are multiples of 2^-4, so that fields are exact.
    """
    graph = graph_named(name)
    n, chains = graph.num_nodes, 60
    bias, coupling = (torch.round(16 * x) / 16 for x in parameters_of(kind, graph, chains))
    state, flipped = random_bits(chains, n), torch.rand(n) < 0.5
    u, v = graph.edges.unbind(-1)
    sign = torch.where(flipped, -1.0, 1.0)
    onto = torch.zeros(*coupling.shape[:-1], n)  # sums of the couplings to flipped neighbours
    onto.index_add_(-1, u, coupling * flipped[v]).index_add_(-1, v, coupling * flipped[u])

    def by_gauge(bias, coupling):
        z = graph_metropolis((state - flipped.float()).abs(), bias, coupling, graph, 6, beta=0.7, seed=9)
        return (z - flipped.float()).abs()

    gauged = sign * (bias + onto), sign[u] * sign[v] * coupling
    actual = graph_metropolis(state, bias, coupling, graph, 6, beta=0.7, seed=9)
    assert_same_bits(by_gauge(*gauged), actual)
    assert not by_gauge(sign * bias, gauged[1]).equal(actual)  # a planted fault: a bias not transformed


# Edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 1e-50])  # 1e-50 is 0 in float32
@KINDS
@pytest.mark.filterwarnings("ignore::gibbs_ext.CouplingResolutionWarning")
def test_at_beta_zero_every_unit_flips(beta, kind):
    """Also where fields overflow float32."""
    graph = graph_named("chimera with holes")
    p, state = parameters_of(kind, graph, 150), random_bits(150, graph.num_nodes)
    for coupling in (p.coupling, p.coupling.sign() * 1e38):
        for num_sweeps in (1, 2):
            flipped = both(state, p.bias, coupling, graph, num_sweeps, beta=beta, seed=4)
            assert flipped.equal((state - num_sweeps % 2).abs())
    clamp = torch.rand(graph.num_nodes) < 0.5
    flipped = both(state, *p, graph, 1, beta=beta, clamp=clamp, seed=4)
    assert flipped.equal(torch.where(clamp, state, 1 - state))


@pytest.mark.filterwarnings("ignore::gibbs_ext.CouplingResolutionWarning")
@pytest.mark.parametrize("name", ["grid", "chimera", "K20", "odd ring"])
def test_frozen_sweeps_never_raise_the_energy_and_flip_at_ties(name):
    """At the largest beta that float32 holds. Integer parameters make many ties."""
    graph = graph_named(name)
    n, beta = graph.num_nodes, torch.finfo(torch.float32).max
    bias, coupling = torch.randint(-2, 3, (n,)).float(), torch.randint(2, (graph.num_edges,)).float() * 2 - 1
    u, v = graph.edges.unbind(-1)

    def energies(z):
        return -(z @ bias) - (z[:, u] * z[:, v]) @ coupling

    state, ties = random_bits(100, n), 0
    for sweep in range(5):
        whole = graph_metropolis(state, bias, coupling, graph, 1, beta=beta, seed=3)
        # Colour by colour, the others clamped: what each unit of the colour does is known from the state before.
        for color in range(graph.num_colors):
            fields = bias.expand(100, n).clone()
            fields.index_add_(-1, u, state[:, v] * coupling).index_add_(-1, v, state[:, u] * coupling)
            moves = (graph.colors == color) & ((1 - 2 * state) * fields >= 0)
            ties += int((moves & (fields == 0)).sum())
            after = both(state, bias, coupling, graph, 1, beta=beta, clamp=graph.colors != color, seed=3)
            assert after.equal(torch.where(moves, 1 - state, state)), f"sweep {sweep}"
            assert (energies(after) <= energies(state)).all()
            state = after
        assert_same_bits(whole, state)
    assert ties > 30


@pytest.mark.filterwarnings("ignore::gibbs_ext.CouplingResolutionWarning")
def test_couplings_whose_sum_overflows_float32():
    for name in ("chimera", "one edge", "star of 9", "K20"):
        graph = graph_named(name)
        p = random_graph_parameters(graph)
        for beta in (1.0, 1e-38, 0.0, -1.0):
            both(random_bits(40, graph.num_nodes), p.bias, p.coupling.sign() * 1.6e38, graph, 3, beta=beta, seed=9)


@pytest.mark.parametrize("empty", [(0,), (3, 0), (0, 4)])
@pytest.mark.parametrize("shared", [True, False])
def test_empty_batches(empty, shared):
    for name in ("chimera", "no edges"):
        graph = graph_named(name)
        p = random_graph_parameters(graph, ((), () if shared else empty))
        z = both(torch.zeros(*empty, graph.num_nodes), *p, graph, 3, seed=0)
        assert z.shape == (*empty, graph.num_nodes)


def test_no_sweeps():
    graph = graph_named("chimera")
    p, state = random_graph_parameters(graph), random_bits(3, 32)
    same = graph_metropolis(state, *p, graph, 0, seed=0)
    assert_same_bits(same, state)
    assert same.data_ptr() != state.data_ptr()


def test_seeds():
    graph = graph_named("chimera")
    args = random_bits(10, 32), *random_graph_parameters(graph), graph, 3
    assert_same_bits(graph_metropolis(*args, seed=-1), graph_metropolis(*args, seed=2**64 - 1))
    torch.manual_seed(3)
    first, second = graph_metropolis(*args), graph_metropolis(*args)
    assert not first.equal(second)
    torch.manual_seed(3)
    assert_same_bits(graph_metropolis(*args), first)
    assert_same_bits(graph_metropolis(*args, generator=torch.Generator().manual_seed(3)), first)


def test_resolution_warning():
    graph = star_graph(3)
    with pytest.warns(CouplingResolutionWarning, match=r"^graph_metropolis: coupling"):
        graph_metropolis(torch.zeros(4), torch.zeros(4), torch.full((3,), 1e6), graph, 1, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graph_metropolis(torch.zeros(4), torch.zeros(4), torch.full((3,), 1e6), graph, 1, beta=1e-6, seed=0)


def test_no_gradient():
    graph = graph_named("chimera")
    p = [x.requires_grad_() for x in random_graph_parameters(graph)]
    assert not graph_metropolis(torch.zeros(32), *p, graph, 2, seed=0).requires_grad


# Statistics: by the thresholds of tests/support.py, with planted faults that must exceed them ------------------------

CHAINS = 100_000
MODELS = {
    "grid": lambda: grid_graph(2, 3),
    "K5": lambda: complete_graph(5),
    "chimera cell": lambda: ChimeraGraph(1),
}


def model_named(name):
    graph = MODELS[name]()
    return graph, random_graph_parameters(graph, generator=torch.Generator().manual_seed(4))


def draw(graph, parameters, num_sweeps, **kwargs):
    return graph_metropolis(torch.zeros(CHAINS, graph.num_nodes), *parameters, graph, num_sweeps, seed=1, **kwargs)


@pytest.mark.parametrize("name", MODELS)
def test_statistics_of_few_sweeps(name, instruction_set):
    """The distribution one and two sweeps after the start, which mixing does not hide."""
    graph, p = model_named(name)
    for num_sweeps in (1, 2):
        for beta in (0.5, 1.0):
            expected = exact_metropolis_sweeps(graph, p, num_sweeps, beta)
            assert chi_square_excess(draw(graph, p, num_sweeps, beta=beta), expected) < 1
    expected = exact_metropolis_sweeps(graph, p, 2)
    bias = p.bias + 0.1 * torch.eye(graph.num_nodes)[0]
    faults = [
        draw(graph, p, 2, beta=1.05),
        draw(graph, GraphParameters(bias, p.coupling), 2),
        draw(graph, p, 3),
        graph_gibbs(torch.zeros(CHAINS, graph.num_nodes), *p, graph, 2, seed=1),
    ]
    assert all(chi_square_excess(z, expected) > 1 for z in faults)


@pytest.mark.parametrize("name", MODELS)
def test_statistics_of_many_sweeps(name, instruction_set):
    graph, p = model_named(name)
    exact = exact_graph_probabilities(graph, p)
    # The law of so many sweeps, from the start that they have, is the model's as far as so many chains can tell.
    assert CHAINS * ((exact_metropolis_sweeps(graph, p, 60) - exact) ** 2 / exact).sum() < 0.1
    assert chi_square_excess(draw(graph, p, 60), exact) < 1
    assert chi_square_excess(draw(graph, p, 60, beta=1.05), exact) > 1
    assert chi_square_excess(draw(graph, p, 1), exact) > 1


def test_statistics_of_clamped_units():
    graph, p = model_named("chimera cell")
    start = torch.tensor([True, False, False, False, True, True, False, False])
    z = graph_metropolis(start.expand(CHAINS, 8), *p, graph, 60, clamp=start, seed=1)
    conditioned = exact_graph_probabilities(graph, p) * (all_states(8)[:, start] == 1).all(-1)
    assert chi_square_excess(z, conditioned / conditioned.sum()) < 1
    assert chi_square_excess(draw(graph, p, 60), conditioned / conditioned.sum()) > 1


def test_enumeration_can_fail():
    """The exact law leaves the model's alone, and another rule's does not."""
    graph, p = model_named("grid")
    exact = exact_graph_probabilities(graph, p)
    assert (exact_metropolis_sweeps(graph, p, 500) - exact).abs().max() < 1e-12
    energies = exact_energies(graph, p)
    assert (energies - energies.mean()).abs().max() > 1  # not a flat model
