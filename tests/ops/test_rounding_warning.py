# SPDX-License-Identifier: Apache-2.0
"""Calls warn of rounding wherever it shifts a probability by 1e-3, and never for ordinary models."""

import itertools
import re
import warnings

import numpy as np
import pytest
import torch
from graph_support import complete_graph, graph_named, star_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gibbs_ext import (
    ColoredGraph,
    CouplingResolutionWarning,
    bipartite_ais,
    bipartite_gibbs,
    bipartite_gibbs_relaxed,
    coupling_resolution,
    graph_ais,
    graph_gibbs,
    graph_gibbs_relaxed,
    graph_metropolis,
    reference,
)

OF_FLOAT32 = r"(weight|coupling) and biases of about \S+ may nearly cancel, and float32 then shifts a field by about"
# Couplings of a hub to its neighbours, and the bias that nearly cancels them. Fixed point is fine enough here.
CANCELLING = {
    1: ([2057954.81], -2057954.69),
    2: ([520784.15, 506246.88], -1027030.97),
    3: ([165114.16, 164000.41, 158564.57], -487679.11),
    6: ([43114.42, 40334.02, 44356.66, 42155.05, 44771.2, 43879.72], -258611.18),
}


def float64(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def largest_shift(coupling, bias, beta, base=None) -> float:
    """Largest |P(hub = 1) as sampled - exact| over all states of its neighbours. ``base``: Bias of annealed sweeps."""
    f, graph = np.float32, star_graph(len(coupling))
    rounded, k = reference.round_graph_couplings(np.array(coupling), graph.edges.numpy(), graph.num_nodes)
    states = np.array(list(itertools.product((0, 1), repeat=len(coupling))))
    fields = (states @ rounded.astype(np.int64)).astype(f) * f(2.0**-k) + f(bias)
    logit, exact = f(beta) * fields, float(f(beta)) * (states @ np.array(coupling) + bias)
    if base is not None:
        logit, exact = logit + (f(1) - f(beta)) * f(base), exact + (1 - float(f(beta))) * base
    sampled = reference.threshold(logit) / 2.0**32
    return float(np.abs(sampled - torch.sigmoid(torch.from_numpy(exact)).numpy()).max())


def star_biases(rays, hub) -> Tensor:
    return torch.zeros(rays + 1, dtype=torch.float64).index_fill(0, torch.tensor(rays // 2), hub)


def messages_of(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if issubclass(w.category, CouplingResolutionWarning)]


def warns_at(coupling, bias, beta) -> bool:
    rays = len(coupling)
    graph, biases = star_graph(rays), star_biases(rays, bias)
    return bool(messages_of(lambda: graph_gibbs(torch.zeros(rays + 1), biases, float64(coupling), graph, 1, beta=beta)))


# Models that need the warning -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rays", "shift"), [(1, 0.025), (2, 0.0125), (3, 0.007), (6, 0.003)])
def test_a_shift_that_float32_makes_is_said(rays, shift):
    coupling, bias = CANCELLING[rays]
    assert rays * float(coupling_resolution(float64([coupling]))) <= 1e-3
    assert largest_shift(coupling, bias, 1.0) > shift
    graph, biases = star_graph(rays), star_biases(rays, bias)
    (message,) = messages_of(lambda: graph_gibbs(torch.zeros(rays + 1), biases, float64(coupling), graph, 1))
    figures = re.fullmatch(
        r"graph_gibbs: coupling and biases of about (\S+) may nearly cancel, and float32 then shifts a field by about "
        rf"(\S+) \(smaller parameters or a lower beta help\) for units of up to {rays} neighbours at beta 1",
        message,
    )
    assert figures, message
    assert [float(x) for x in figures.groups()] == pytest.approx([-bias, -bias * 2.0**-23], rel=0.01)
    # Both remedies of the message help.
    assert not warns_at(coupling, bias, 0.003)
    assert not warns_at([x / 400 for x in coupling], bias / 400, 1.0)


OPS = {
    "bipartite_gibbs": lambda left, b, c, w, kw: bipartite_gibbs(left, b, c, w, 2, **kw),
    "bipartite_gibbs_relaxed": lambda left, b, c, w, kw: bipartite_gibbs_relaxed(left, b, c, w, 2, 1, **kw),
    "bipartite_ais": lambda left, b, c, w, kw: bipartite_ais(left, b, c, w, 0 * b, 0 * c, [0.0, 0.5, 1.0], **kw),
    "graph_gibbs": lambda state, b, w, graph, kw: graph_gibbs(state, b, w, graph, 2, **kw),
    "graph_metropolis": lambda state, b, w, graph, kw: graph_metropolis(state, b, w, graph, 2, **kw),
    "graph_gibbs_relaxed": lambda state, b, w, graph, kw: graph_gibbs_relaxed(state, b, w, graph, 2, 1, **kw),
    "graph_ais": lambda state, b, w, graph, kw: graph_ais(state, b, w, graph, 0 * b, [0.0, 0.5, 1.0], **kw),
}
# Parameters may be each chain's own; only those of the last chain matter then.
KINDS = {"shared": (False, False), "biases": (True, False), "couplings": (False, True), "both": (True, True)}


def cancelling_call(op, kind, chains, transposed=False):
    """A call of ``chains`` chains, in which only the rounding of float32 shifts logits, of all chains or the last."""
    coupling, hub = (float64(x) for x in CANCELLING[3])
    own_biases, own_couplings = KINDS[kind]
    is_last = (torch.arange(chains) == chains - 1).double().unsqueeze(-1)
    coupling = coupling * is_last if own_couplings else coupling
    hub = hub * is_last if own_biases else hub.reshape(1)
    if op.startswith("graph"):
        bias = torch.cat([torch.zeros(*hub.shape[:-1], 1).double(), hub, torch.zeros(*hub.shape[:-1], 2).double()], -1)
        return lambda **kw: OPS[op](torch.zeros(chains, 4), bias, coupling, star_graph(3), kw)
    rays = torch.zeros(3, dtype=torch.float64)
    if transposed:
        return lambda **kw: OPS[op](torch.zeros(chains, 1), hub, rays, coupling.unsqueeze(-2), kw)
    return lambda **kw: OPS[op](torch.zeros(chains, 3), rays, hub, coupling.unsqueeze(-1), kw)


def check_cancelling_calls(op):
    for kind, chains, transposed in itertools.product(KINDS, (1, 3, 70), (False, True)):
        (message,) = messages_of(cancelling_call(op, kind, chains, transposed))
        assert message.startswith(f"{op}: "), message
        assert "float32 then shifts" in message, message
        assert "3 neighbours at beta 1" in message, message


@pytest.mark.parametrize("op", [op for op in OPS if op.startswith("graph")])
def test_graph_ops_say_so_on_every_route(op, graph_route):
    check_cancelling_calls(op)


@pytest.mark.parametrize("op", [op for op in OPS if op.startswith("bipartite")])
def test_bipartite_ops_say_so_on_every_route(op, instruction_set):
    check_cancelling_calls(op)


def test_threads_note_the_same(threads):
    for number, op in itertools.product((1, 3), OPS):
        torch.set_num_threads(number)
        check_cancelling_calls(op)


def test_float32_parameters_are_no_different():
    """Sums of float32 numbers need not be float32 numbers; the same values draw the same bits in both dtypes."""
    coupling, bias = torch.tensor([165114 + 1 / 64, 164000, 158564]), -487678.0
    assert largest_shift(coupling.tolist(), bias, 1.0) > 0.0035
    with pytest.warns(CouplingResolutionWarning, match=OF_FLOAT32):
        graph_gibbs(torch.zeros(4), star_biases(3, bias).float(), coupling, star_graph(3), 1)


def test_a_sum_of_two_small_errors_is_said():
    """Neither term exceeds 1e-3 alone."""
    coupling, bias = [1000.0] * 200, -150e3
    beta = 0.7e-3 / (200 * float(coupling_resolution(float64([coupling]))))
    assert beta * 2.0**-23 * -bias < 0.9e-3
    assert warns_at(coupling, bias, beta)
    assert not warns_at(coupling, 0.0, beta)


@pytest.mark.parametrize("family", ["bipartite", "graph"])
def test_base_biases_take_part(family):
    coupling, bias = (float64(x) for x in CANCELLING[3])
    state = torch.zeros(5, 4 if family == "graph" else 3)
    zeros, betas = torch.zeros(3, dtype=torch.float64), [0.0, 0.3, 0.7, 1.0]

    def call(hub, base, coupling):
        if family == "graph":
            hubs = star_biases(3, float(hub)), star_biases(3, float(base))
            return messages_of(lambda: graph_ais(state, hubs[0], coupling, star_graph(3), hubs[1], betas))
        hub, base, weight = float64([hub]), float64([base]), coupling[:, None]
        return messages_of(lambda: bipartite_ais(state, zeros, hub, weight, zeros, base, betas))

    (message,) = call(0.0, bias, coupling)
    assert "float32 then shifts" in message
    assert largest_shift([1.0] * 3, 1e7, 0.3, base=-3e6 / 0.7) > 1e-3
    # bias and base bias cancel each other, or never
    assert call(1e7, -3e6 / 0.7, torch.ones(3).double())
    assert not call(1e7, 3e6, torch.ones(3).double())
    assert not call(-1e7, 0.0, torch.ones(3).double())
    assert not call(3.0, -2.0, torch.ones(3).double())


# Models that need no warning --------------------------------------------------------------------------------------


def ordinary_graphs():
    chimera = graph_named("chimera with holes")
    n, edges = chimera.num_nodes, len(chimera.edges)
    signs = torch.randn(edges).sign().double()
    annealing = torch.linspace(0.01, 10, 20).double()
    clamps = 1e6 * torch.randn(n).sign().double()
    yield "hundreds", (300 * torch.randn(n).double(), 300 * torch.randn(edges).double()), chimera, 1.0
    yield "clamps", (clamps, torch.randn(edges).double()), chimera, 1.0
    yield "clamps of a cold model", (clamps, signs), chimera, annealing
    yield "annealing", (torch.randn(n).sign().double(), signs), chimera, annealing
    # spins with couplings +-1, as bits
    bias = torch.zeros(n).double().index_add(0, chimera.edges.T.reshape(-1), -2 * torch.cat([signs, signs]))
    yield "annealing of spins", (bias, 4 * signs), chimera, annealing
    dense = complete_graph(60)
    yield "dense", (torch.randn(60).double(), torch.randn(len(dense.edges)).double()), dense, 1.0
    alone = ColoredGraph(5, torch.zeros(0, 2, dtype=torch.int64))
    yield "no couplings", (1e6 * torch.randn(5).double(), torch.zeros(0).double()), alone, 1e4


def test_ordinary_graphs_are_left_alone(graph_route):
    for name, (bias, coupling), graph, beta in ordinary_graphs():
        for chains in (1, 70):
            state = torch.zeros(chains, graph.num_nodes)
            for own_bias in (bias, bias.expand(chains, -1).clone()):
                num_sweeps = beta.numel() if isinstance(beta, Tensor) else 2
                found = messages_of(
                    lambda s=state, b=own_bias, n=num_sweeps: graph_gibbs(s, b, coupling, graph, n, beta=beta)  # noqa: B023
                )
                assert not found, (name, found)
        found = messages_of(lambda: graph_ais(state, bias, coupling, graph, bias + 1, [0.0, 0.5, 1.0]))  # noqa: B023
        assert not found, (name, found)


def test_ordinary_bipartite_models_are_left_alone(instruction_set):
    weight, left_bias, right_bias = (torch.randn(*shape).double() for shape in ((100, 80), (100,), (80,)))
    clamps = 1e6 * torch.randn(100).sign().double()
    for bias in (left_bias, 300 * left_bias, clamps):
        for chains in (1, 70):
            left = torch.zeros(chains, 100)
            assert not messages_of(lambda x=left, b=bias: bipartite_gibbs(x, b, right_bias, weight, 2))
            base = bias, 0 * right_bias
            assert not messages_of(
                lambda x=left, b=bias, base=base: bipartite_ais(x, b, right_bias, weight, *base, [0.0, 0.5, 1.0])
            )


# The bound --------------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(
    magnitude=st.floats(2, 6.5),
    ratios=st.lists(st.floats(0.01, 1), min_size=1, max_size=7),
    signs=st.integers(0, 127),
    cancelled=st.integers(1, 127),
    rest=st.floats(-4, 4),
    beta=st.floats(-3, 2),
)
def test_silence_means_that_no_probability_is_shifted(magnitude, ratios, signs, cancelled, rest, beta):
    """The bias cancels some of the couplings up to ``rest`` of a logit. By the bound, 1e-3 of a logit is 2.5e-4."""
    beta = 10**beta
    coupling = [10**magnitude / beta * x * (-1 if signs >> i & 1 else 1) for i, x in enumerate(ratios)]
    bias = rest / beta - sum(x for i, x in enumerate(coupling) if cancelled >> i & 1)
    assert warns_at(coupling, bias, beta) or largest_shift(coupling, bias, beta) < 3e-4


@settings(max_examples=300)
@given(
    magnitudes=st.tuples(st.floats(-2, 6.5), st.floats(-2, 7)),
    ratios=st.lists(st.floats(0.01, 1), min_size=1, max_size=6),
    cancelled=st.integers(1, 63),
    rest=st.floats(-4, 4),
    beta=st.floats(0.01, 0.99),
    sign=st.sampled_from([-1, 1]),
    of_base=st.booleans(),
)
def test_silence_of_annealed_sweeps(magnitudes, ratios, cancelled, rest, beta, sign, of_base):
    rays = len(ratios)
    coupling = [10 ** magnitudes[0] * x for x in ratios]
    partial = sum(x for i, x in enumerate(coupling) if cancelled >> i & 1)
    given_bias = sign * 10 ** magnitudes[1]
    if of_base:
        bias, base = given_bias, (rest - beta * (partial + given_bias)) / (1 - beta)
    else:
        bias, base = (rest - (1 - beta) * given_bias) / beta - partial, given_bias
    hubs = star_biases(rays, bias), star_biases(rays, base)
    found = messages_of(
        lambda: graph_ais(torch.zeros(rays + 1), hubs[0], float64(coupling), star_graph(rays), hubs[1], [0, beta, 1])
    )
    assert found or largest_shift(coupling, bias, beta, base) < 1e-3
