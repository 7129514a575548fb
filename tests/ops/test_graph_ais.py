# SPDX-License-Identifier: Apache-2.0
"""The AIS op of graphs has the reference's states to the bit, its log-weights to float64 accuracy, and exact means."""

import pytest
import torch
from graph_support import (
    GRAPH_BROADCASTS,
    GRAPHS,
    GraphParameters,
    chimera_cell,
    complete_graph,
    exact_energies,
    exact_graph_probabilities,
    graph_named,
    random_graph_parameters,
    taking,
)
from support import assert_close, assert_same_bits, random_bits, supported_instruction_sets, z_threshold

from gibbs_ext import ChimeraGraph, ColoredGraph, bipartite_ais, graph_ais, graph_gibbs
from gibbs_ext.reference import graph_ais_reference


def both(*args, **kwargs):
    """Runs the reference, and the op with every instruction set; checks that all agree; returns the op's results."""
    expected = graph_ais_reference(*args, **kwargs)
    for instruction_set in supported_instruction_sets():
        with taking(instruction_set):
            actual = graph_ais(*args, **kwargs)
            assert_same_bits(actual[0], expected[0])
            assert actual[1].dtype == torch.float64
            # Its logits are float32, the reference's float64.
            assert_close(actual[1], expected[1], 1e-5)
    return actual


def base_of(graph):
    return 0.3 * torch.randn(graph.num_nodes)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("broadcast", ["single", "shared", "chains_of_models", "coupling_per_chain", "outer"])
def test_agrees_with_reference(name, broadcast):
    (state, *batches), shape = GRAPH_BROADCASTS[broadcast]
    graph = graph_named(name)
    n = graph.num_nodes
    p = random_graph_parameters(graph, batches)
    z, log_weights = both(random_bits(*state, n), *p, graph, base_of(graph), torch.linspace(0, 1, 5).double(), seed=n)
    assert (z.shape, log_weights.shape) == ((*shape, n), shape)


@pytest.mark.parametrize("chains", [1, 15, 16, 17, 64, 65, 130])
@pytest.mark.parametrize("shared", [True, False])
def test_any_number_of_chains(chains, shared):
    for name in ("chimera", "K20"):
        graph = graph_named(name)
        p = random_graph_parameters(graph, ((), () if shared else (chains,)))
        base = torch.randn(chains, graph.num_nodes) if shared else base_of(graph)
        both(random_bits(chains, graph.num_nodes), *p, graph, base, [0.0, 0.5, 1.0], seed=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("state_dtype", [torch.bool, torch.float32])
def test_dtypes(dtype, state_dtype):
    graph = graph_named("chimera with holes")
    p = random_graph_parameters(graph, ((), (5,)), dtype=dtype)
    both(
        random_bits(5, graph.num_nodes, dtype=state_dtype), *p, graph, base_of(graph).to(dtype), [0.0, 0.3, 1.0], seed=1
    )


@pytest.mark.parametrize("betas", [[0.5], [0.2, 0.2], [1.0, 0.6, 0.0], [0.0, 1.0], torch.linspace(0, 1, 40).double()])
@pytest.mark.parametrize("shared", [True, False])
def test_schedules(betas, shared):
    graph = graph_named("chimera")
    p = random_graph_parameters(graph, ((), () if shared else (9,)))
    state = random_bits(9, 32)
    z, log_weights = both(state, *p, graph, base_of(graph), betas, seed=3, sweep_offset=5, chain_offset=2**32 - 3)
    if len(betas) == 1:
        assert_same_bits((z, log_weights), (state, torch.zeros(9).double()))


@pytest.mark.filterwarnings("ignore::gibbs_ext.CouplingResolutionWarning")
def test_beta_zero_is_the_base_whatever_the_couplings():
    """Fields overflow float32, and 0 times them must not be NaN."""
    for name in ("chimera", "K20"):
        graph = graph_named(name)
        p = random_graph_parameters(graph)
        base, state = base_of(graph), random_bits(100, graph.num_nodes)
        z, log_weights = both(state, p.bias, p.coupling.sign() * 1e37, graph, base, [0.0, 0.0, 0.0], seed=4)
        assert not log_weights.any()
        assert_same_bits(z, graph_gibbs(state, base, torch.zeros(len(graph.edges)), graph, 2, seed=4))


def test_sweeps_at_beta_one_are_those_of_graph_gibbs(instruction_set):
    for name in ("chimera with holes", "K20"):
        graph = graph_named(name)
        p, state = random_graph_parameters(graph), random_bits(50, graph.num_nodes)
        z, log_weights = graph_ais(state, *p, graph, base_of(graph), [1.0] * 5, seed=3)
        assert_same_bits(z, graph_gibbs(state, *p, graph, 4, seed=3))
        assert not log_weights.any()


@pytest.mark.parametrize("shape", [(), (5,)])
def test_one_chimera_cell_is_a_bipartite_model(shape, instruction_set):
    """Colour 0 is the right side."""
    p, sides = chimera_cell(shape)
    state, base, betas = random_bits(100, *shape, 8), torch.randn(8), torch.linspace(0, 1, 9).double()
    options = {"seed": 3, "chain_offset": 2**40, "sweep_offset": 2**35}
    z, log_weights = graph_ais(state, *p, ChimeraGraph(1), base, betas, **options)
    left, right, expected = bipartite_ais(state[..., :4], *sides, base[:4], base[4:], betas, **options)
    assert_same_bits(z, torch.cat((left, right), -1))
    assert_close(log_weights, expected, 1e-6)


def log_f(graph, p, base, b, rest):
    """[C] log f_b(rest); colour 0 is summed out by brute force."""
    summed_out = (graph.colors == 0).nonzero().squeeze(-1)
    u, v = graph.edges.unbind(-1)
    values = []
    for number in range(2 ** len(summed_out)):
        z = rest.clone()
        z[:, summed_out] = (torch.tensor(number) >> torch.arange(len(summed_out)) & 1).to(z.dtype)
        values.append(z @ (b * p.bias + (1 - b) * base) + b * (z[:, u] * z[:, v]) @ p.coupling)
    return torch.stack(values).logsumexp(0)


@pytest.mark.parametrize("name", ["chimera cell", "K3", "odd ring", "star of 8", "no edges, 3 colours", "one node"])
def test_one_step_is_importance_sampling(name):
    graph = ChimeraGraph(1) if name == "chimera cell" else graph_named(name)
    p = random_graph_parameters(graph, dtype=torch.float64, scale=0.5)
    base, state = base_of(graph).double(), random_bits(20, graph.num_nodes, dtype=torch.float64)
    for before, after in ((0.0, 1.0), (0.3, 0.7), (1.0, 0.0)):
        log_weights = graph_ais(state, *p, graph, base, [before, after], seed=0)[1]
        expected = log_f(graph, p, base, after, state) - log_f(graph, p, base, before, state)
        assert_close(log_weights, expected, 1e-6)  # couplings are rounded to 2^-k


def test_long_schedules_do_not_drift():
    graph = graph_named("chimera")
    p = random_graph_parameters(graph, scale=2.0)
    args = (random_bits(4, 32), *p, graph, p.bias, torch.linspace(0, 1, 1001).double())
    actual, expected = graph_ais(*args, seed=1), graph_ais_reference(*args, seed=1)
    assert_same_bits(actual[0], expected[0])
    assert (actual[1] - expected[1]).abs().max() < 1e-3


@pytest.mark.parametrize("shared", [True, False])
def test_invariances(shared, threads):
    graph = graph_named("chimera with holes")
    p = random_graph_parameters(graph, ((), () if shared else (64,)))
    base, state, betas = base_of(graph), random_bits(64, graph.num_nodes), torch.linspace(0, 1, 11).double()
    torch.set_num_threads(1)
    together = graph_ais(state, *p, graph, base, betas, seed=8)
    torch.set_num_threads(2)
    assert_same_bits(graph_ais(state, *p, graph, base, betas, seed=8), together)
    coupling = p.coupling if shared else p.coupling[7]
    alone = graph_ais(state[7], p.bias, coupling, graph, base, betas, seed=8, chain_offset=7)
    assert_same_bits(alone[0], together[0][7])
    assert_close(alone[1], together[1][7], 1e-12)
    # 10 steps are the same as 3 and then 7.
    first = graph_ais(state, *p, graph, base, betas[:4], seed=8)
    rest = graph_ais(first[0], *p, graph, base, betas[3:], seed=8, sweep_offset=3)
    assert_same_bits(rest[0], together[0])
    assert_close(first[1] + rest[1], together[1], 1e-12)


@pytest.mark.parametrize("empty", [(0,), (3, 0)])
def test_empty_batches(empty):
    graph = graph_named("chimera")
    p = random_graph_parameters(graph, ((), empty))
    outputs = graph_ais(torch.zeros(*empty, 32), *p, graph, torch.zeros(32), [0.0, 1.0], seed=0)
    assert [x.shape for x in outputs] == [(*empty, 32), empty]


# Exact ratios of partition functions ------------------------------------------------------------------------------


UNBIASED = {
    "chimera cell": lambda: ChimeraGraph(1),
    "K6": lambda: complete_graph(6),
    "odd ring": lambda: graph_named("odd ring"),
}


def excess(log_weights, log_ratio):
    """Distance of the mean weight from the ratio of partition functions, over its threshold at FALSE_ALARM.

    The weights' spread is small (asserted), so that their mean is normal far into its tails.
    """
    weights = (log_weights - log_ratio).exp()
    assert log_weights.std() < 0.5
    return float((weights.mean() - 1).abs() / (weights.std() / len(weights) ** 0.5)) / z_threshold()


@pytest.mark.parametrize("name", UNBIASED)
def test_weights_are_unbiased(name):
    """E[weight] = Z(1) / Z(0) forward, and its inverse backward from exact draws. Each alarms once in a million seeds.

    Parameters do not depend on the seed; they are positive, which makes the mean energy so large that 2% of it is seen.
    """
    graph = UNBIASED[name]()
    n, chains = graph.num_nodes, 60_000
    generator = torch.Generator().manual_seed(1)
    p = GraphParameters(*(0.5 * x.abs() for x in random_graph_parameters(graph, generator=generator)))
    base = 0.5 * torch.randn(n, generator=generator)
    betas = torch.linspace(0, 1, 31).double()
    base_model = GraphParameters(base, torch.zeros(len(graph.edges)))
    log_ratio = float((-exact_energies(graph, p)).logsumexp(0) - (-exact_energies(graph, base_model)).logsumexp(0))
    start = torch.bernoulli(torch.sigmoid(base).expand(chains, n))

    def forward(start=start, bias=p.bias, coupling=p.coupling, betas=betas, graph=graph):
        return excess(graph_ais(start, bias, coupling, graph, base, betas)[1], log_ratio)

    numbers = torch.multinomial(exact_graph_probabilities(graph, p), chains, replacement=True)
    exact_start = (numbers[:, None] >> torch.arange(n) & 1).float()
    assert forward() < 1
    assert forward(graph=ColoredGraph(n, graph.edges, graph.num_colors - 1 - graph.colors)) < 1
    assert excess(graph_ais(exact_start, *p, graph, base, betas.flip(0))[1], -log_ratio) < 1

    dropped = p.coupling.clone()
    dropped[dropped.argmax()] = 0
    planted = {
        "one coupling dropped": forward(coupling=dropped),
        "beta * 1.02": forward(betas=1.02 * betas),
        "a wrong start": forward(start=torch.zeros_like(start)),
        "one bias off by 0.1": forward(bias=p.bias + 0.1 * torch.eye(n)[0]),
    }
    assert not [fault for fault, excess in planted.items() if excess < 1], planted
