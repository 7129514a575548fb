# SPDX-License-Identifier: Apache-2.0
"""Every bad call raises one clear error, which begins with the function's name, and leaves its inputs untouched."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from graph_support import ROUTES, taking
from hypothesis import given
from hypothesis import strategies as st
from support import assert_same_bits, untouched

import gibbs_ext as gx

CALLS = [f"{kind}_{op}" for kind in ("bipartite", "graph") for op in ("gibbs", "gibbs_relaxed", "ais")]
CALLS.append("graph_metropolis")
N1, N2, BATCH = 4, 6, 3
N, E = 8, 9
EDGES = [(i, (i + 1) % N) for i in range(N)] + [(0, 4)]


def good(name):
    """Keyword arguments of a call that works, including all optional tensors."""
    arguments = {"chain_offset": torch.arange(BATCH), "sweep_offset": 3, "seed": 1}
    on_graph = name.startswith("graph")
    if on_graph:
        arguments |= {
            "state": torch.randint(2, (BATCH, N)).float(),
            "bias": torch.randn(N),
            "coupling": torch.randn(BATCH, E),
            "graph": gx.ColoredGraph(N, EDGES),
        }
    else:
        arguments |= {
            "left": torch.randint(2, (BATCH, N1)).float(),
            "left_bias": torch.randn(BATCH, N1),
            "right_bias": torch.randn(N2),
            "weight": torch.randn(BATCH, N1, N2),
        }
    if name.endswith(("_gibbs", "_metropolis")):
        arguments |= {"num_sweeps": 2, "beta": torch.tensor([0.5, 1.0])}
        if on_graph:
            arguments["clamp"] = torch.zeros(BATCH, N, dtype=torch.bool)
        else:
            arguments |= {
                "right": torch.randint(2, (BATCH, N2)).float(),
                "clamp_left": torch.zeros(BATCH, N1, dtype=torch.bool),
                "clamp_right": torch.ones(N2, dtype=torch.bool),
            }
    elif name.endswith("_relaxed"):
        arguments |= {"num_sweeps": 1, "num_relaxed_sweeps": 2, "beta": torch.tensor([0.5, 1.0, 1.0]), "sharpness": 4.0}
    else:
        arguments["betas"] = torch.tensor([0.0, 1.0])
        if on_graph:
            arguments["base_bias"] = torch.randn(N)
        else:
            arguments |= {"base_left_bias": torch.randn(N1), "base_right_bias": torch.randn(N2)}
    return arguments


def state_of(name):
    return "state" if name.startswith("graph") else "left"


COUPLINGS = ("weight", "coupling")
PARAMETERS = (*COUPLINGS, "left_bias", "right_bias", "base_left_bias", "base_right_bias", "bias", "base_bias")
MASKS = ("clamp_left", "clamp_right", "clamp")
SIDES = (*PARAMETERS, *MASKS, "left", "right", "state")


def faults(name):
    """All faults: a change to the good arguments, and a word that the message must hold."""
    arguments = good(name)
    present = [key for key in SIDES if key in arguments]
    parameters = [key for key in PARAMETERS if key in arguments]
    integers = [key for key in ("num_sweeps", "num_relaxed_sweeps", "sweep_offset") if key in arguments]
    for key in present:
        value = arguments[key]
        own = 2 if key == "weight" else 1
        for size in (0, 5, 12):
            yield {key: torch.zeros((*value.shape[:-1], size), dtype=value.dtype)}, "weight" if own == 2 else key
        for size in (2, BATCH + 1):
            yield {key: torch.zeros((size, *value.shape[value.dim() - own :]), dtype=value.dtype)}, "broadcast"
        for thing in ([0.0], 3, "left", object()):
            yield {key: thing}, key
    yield {"chain_offset": torch.arange(BATCH + 1)}, "broadcast"
    for key in parameters:
        value = arguments[key]
        yield {key: torch.zeros(N1) if key == "weight" else torch.tensor(0.0)}, key
        for dtype in (torch.int32, torch.int64, torch.bool, torch.complex64):
            yield {key: value.to(dtype)}, key
        for place in (0, value.numel() // 2, value.numel() - 1):
            for number in (math.nan, math.inf, -math.inf):
                wrong = value.clone()
                wrong.view(-1)[place] = number
                yield {key: wrong}, key
        if key not in COUPLINGS:
            yield {key: value.double()}, key
    for key in integers:
        for number in (1.0, "2", None, True, torch.tensor(2.5), -1, -(2**40), -(2**70), 2**63, 2**70):
            yield {key: number}, key
    for number in (2**44, 2**44 + 1, 2**60, 2**63 - 1):
        yield {"sweep_offset": number}, "sweep_offset"
    for numbers in (torch.zeros(BATCH), torch.ones(BATCH, dtype=torch.bool), torch.tensor([0, -1, 2]), 1.5, None, True,
                    torch.tensor([0, 1, 2**48]), 2**48, 2**48 - 1, -1, -(2**40), 2**63, 2**70):  # fmt: skip
        yield {"chain_offset": numbers}, "chain_offset"
    for seed in (2**64, -(2**63) - 1, 1.0, "seed", torch.tensor(1.0), torch.tensor([1])):
        yield {"seed": seed}, "seed"
    yield {"generator": torch.Generator()}, "seed"
    for generator in (3, "cpu", torch.tensor(1)):
        yield {"generator": generator}, "generator"
        yield {"generator": generator, "seed": None}, "generator"

    beta = "betas" if name.endswith("ais") else "beta"
    for schedule in (torch.zeros(2, 2), torch.tensor([math.nan]), torch.tensor([math.inf] * 2), "hot", None, 10**400,
                     torch.zeros(0), torch.ones(1, requires_grad=True), [0.5, "x"], [1.0, 1e39]):  # fmt: skip
        yield {beta: schedule}, beta
    if beta == "beta":  # the schedule of AIS may have any length
        yield {beta: torch.zeros(7)}, beta

    key = state_of(name)
    for number in (0.5, math.nan, 2.0, -1.0):
        state = arguments[key].clone()
        state[1, 2] = number
        yield {key: state}, key
    for dtype in (torch.int64, torch.complex64):
        yield {key: arguments[key].to(dtype)}, key
    for key in MASKS:
        if key in arguments:
            for dtype in (torch.uint8, torch.float32, torch.int64):
                yield {key: arguments[key].to(dtype)}, key
    if name == "bipartite_gibbs":
        yield {"right": None}, "right"
    if "graph" in arguments:
        graph = arguments["graph"]
        for thing in (None, 3, "chimera", graph.layout, graph.edges, EDGES, SimpleNamespace(**vars(graph))):
            yield {"graph": thing}, "graph"
        for other in (gx.ColoredGraph(N, EDGES[:-1]), gx.ColoredGraph(N + 1, EDGES), gx.ChimeraGraph(1)):
            yield {"graph": other}, "graph"
    if name.endswith("_relaxed"):
        for number in (0.0, -1.0, math.nan, math.inf, 1e39, 10**400, "4", None, True, 1j):
            yield {"sharpness": number}, "sharpness"
        for thing in ("", "PWL", 0, None, ["pwl"]):
            yield {"relaxation": thing}, "relaxation"


# Hypothesis tries each of them.
FAULTS = {name: list(faults(name)) for name in CALLS}
ALL = [pytest.param(name, *fault, id=f"{name}-{i}") for name in CALLS for i, fault in enumerate(FAULTS[name])]


def check_error(name, arguments, word):
    tensors = {key: value for key, value in arguments.items() if isinstance(value, torch.Tensor)}
    with untouched(**tensors), pytest.raises((TypeError, ValueError, RuntimeError)) as raised:
        getattr(gx, name)(**arguments)
    message = str(raised.value)
    assert message.startswith(f"{name}: "), message
    assert re.search(rf"\b{word}\b", message), f"{message!r} does not name {word}"
    assert len(message) < 300, message
    assert "\n" not in message, message


@pytest.mark.parametrize("name", CALLS)
def test_good_arguments_are_good(name):
    getattr(gx, name)(**good(name))


@pytest.mark.parametrize(("name", "change", "word"), ALL)
def test_one_fault(name, change, word):
    check_error(name, {**good(name), **change}, word)


@pytest.mark.parametrize("parameter", PARAMETERS)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_parameters_are_checked_even_if_nothing_is_to_do(name, parameter, number):
    """Calls have no sweeps, or no chains."""
    arguments = good(name)
    if parameter not in arguments:
        return
    one = {key: arguments[key][0] if arguments[key].shape[:1] == (BATCH,) else arguments[key] for key in arguments
           if isinstance(arguments[key], torch.Tensor) and key != "chain_offset"}  # fmt: skip
    one[parameter].view(-1)[-1] = number
    beta = {"betas": torch.tensor([1.0])} if name.endswith("ais") else {"beta": torch.ones(1)}
    idle = {} if name.endswith("ais") else {"num_sweeps": 0}
    arguments |= {**one, "chain_offset": 0, **beta}
    check_error(name, {**arguments, **idle}, parameter)
    empty = {state_of(name): torch.zeros(0, N if "graph" in arguments else N1)}
    if name == "bipartite_gibbs":
        empty["right"] = torch.zeros(0, N2)
    check_error(name, {**arguments, **empty}, parameter)


@pytest.mark.parametrize("name", CALLS)
@given(data=st.data())
def test_many_faults_give_one_error(name, data):
    arguments = good(name)
    for _ in range(data.draw(st.integers(2, 4))):
        arguments |= data.draw(st.sampled_from(FAULTS[name]))[0]
    check_error(name, arguments, r"\w+")


@pytest.mark.parametrize("name", CALLS)
@given(data=st.data())
def test_any_shapes_either_work_or_say_why(name, data):
    """Tensors have random small shapes: the call returns the right shape, or raises the one error."""
    arguments = good(name)
    del arguments["chain_offset"]
    sizes = st.lists(st.integers(0, 3), max_size=2)
    n1, n2 = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    own_shapes = dict.fromkeys(("left", "left_bias", "base_left_bias", "clamp_left"), (n1,)) | {"weight": (n1, n2)}
    if "graph" in arguments:
        arguments["graph"] = gx.ColoredGraph(n1, EDGES[: n1 - 1])
        own_shapes = dict.fromkeys(("state", "bias", "base_bias", "clamp"), (n1,)) | {"coupling": (n1 - 1,)}
    batches = []
    for key in SIDES:
        if key in arguments:
            batch = data.draw(sizes)
            own = own_shapes.get(key, (n2,))
            if data.draw(st.integers(0, 9)) == 0:
                own = (*own[:-1], own[-1] + 1)
            arguments[key] = torch.zeros((*batch, *own), dtype=arguments[key].dtype)
            batches.append(batch)
    try:
        outputs = getattr(gx, name)(**arguments)
    except (ValueError, RuntimeError) as error:
        if not str(error).startswith(f"{name}: "):
            raise
        return
    shape = torch.broadcast_shapes(*batches)
    if "graph" in arguments:
        assert (outputs if isinstance(outputs, torch.Tensor) else outputs[0]).shape == (*shape, n1)
    else:
        n1, n2 = arguments["weight"].shape[-2:]
        assert outputs[0].shape == (*shape, n1)
        assert outputs[1].shape == (*shape, n2)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(3), "weight must have shape"),
        (torch.zeros(3, 3, dtype=torch.int32), "weight must be float"),
        (torch.full((3, 3), math.nan), "weight must be finite"),
        (torch.full((3, 3), 2.0**127), "weight must be less than"),
        (torch.full((3, 3), 1e200, dtype=torch.float64), "weight must be less than"),
        (torch.zeros(0, 3), "weight must have at least one unit"),
        ([1], "model must be a BipartiteBoltzmann or a GraphBoltzmann, got list"),
    ],
)
def test_coupling_resolution(weight, message):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=rf"^coupling_resolution: {message}"):
        gx.coupling_resolution(weight)


def test_biases_must_be_finite_in_float32():
    bias, weight = torch.zeros(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    with pytest.raises((ValueError, RuntimeError), match=r"^bipartite_gibbs: right_bias"):
        gx.bipartite_gibbs(bias, bias, torch.full_like(bias, 1e300), weight, 1, seed=0)


# Graphs: each route reads the parameters in its own way --------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("graph")])
@pytest.mark.parametrize("own", [(), ("bias",), ("coupling",), ("bias", "coupling")], ids="-".join)
@pytest.mark.parametrize("route", ROUTES)
def test_every_route_checks_parameters(name, own, route):
    """Any one bad number is found, whether 100 chains share a parameter or each has its own."""
    arguments = good(name) | {"state": torch.zeros(100, N), "chain_offset": 0}
    arguments = {key: value for key, value in arguments.items() if key != "clamp"}
    for key, size in (("bias", N), ("base_bias", N), ("coupling", E)):
        if key in arguments:
            arguments[key] = torch.zeros(100, size) if key in own else torch.zeros(size)
    with taking(route=route):
        getattr(gx, name)(**arguments)
        for key in ("bias", "base_bias", "coupling"):
            if key not in arguments:
                continue
            for place in (0, arguments[key].numel() // 2, -1):
                for number in (math.nan, math.inf, -math.inf, *[2.0**127] * (key == "coupling")):
                    wrong = arguments[key].clone()
                    wrong.view(-1)[place] = number
                    check_error(name, arguments | {key: wrong}, key)


def layouts():
    """Tensors that are no layouts, which torch.ops lets anyone pass."""
    layout = gx.ColoredGraph(N, EDGES).layout
    yield from (layout[:-1], layout[:3], torch.cat((layout, layout)), layout.long(), layout.float(), layout[:, None])
    yield from (torch.zeros(0, dtype=torch.int32), torch.zeros_like(layout), layout.repeat_interleave(2)[::2])
    for place in range(len(layout)):
        for number in (-1, 10**6, 2**31 - 1, -(2**31)):
            if place != 3 or number < 0:  # a max_degree may be larger than necessary
                wrong = layout.clone()
                wrong[place] = number
                yield wrong


@pytest.mark.parametrize(
    "op", ["graph_gibbs", "graph_metropolis", "graph_gibbs_relaxed", "graph_ais", "graph_coupling_resolution"]
)
def test_layouts_that_are_none(op):
    """No number in a layout may lead outside a tensor."""
    state, bias, coupling, seed = torch.zeros(3, N), torch.zeros(N), torch.zeros(E), torch.tensor(1)
    one = torch.ones(2, dtype=torch.float64)
    rest = {
        "graph_gibbs": (one, seed, None, None, 0, 0, 2),
        "graph_metropolis": (one, seed, None, None, 0, 0, 2),
        "graph_gibbs_relaxed": (one, seed, None, 0, 0, 1, 1, 0, 4.0, True),
        "graph_ais": (bias, one, seed, None, 0, 0),
        "graph_coupling_resolution": (),
    }[op]
    first = (coupling,) if op == "graph_coupling_resolution" else (state, bias, coupling)
    call = getattr(torch.ops.gibbs_ext, op)
    call(*first, gx.ColoredGraph(N, EDGES).layout, *rest)
    for layout in layouts():
        with pytest.raises((ValueError, RuntimeError), match=rf"^{op}: (layout|coupling|state|bias) must "):
            call(*first, layout, *rest)


@pytest.mark.parametrize("op", ["graph_fields", "graph_edge_sums"])
def test_layouts_whose_rows_are_none(op):
    """These ops follow the order of nodes and the half-edges of each position."""
    layout, call = gx.ColoredGraph(N, EDGES).layout, getattr(torch.ops.gibbs_ext, op)
    first = (torch.zeros(3, N), torch.zeros(N) if op == "graph_fields" else torch.zeros(3, N), torch.zeros(E))
    call(*first, layout)
    numbers = [*range(3), *range(len(layout) - (2 * N + 1 + 4 * E), len(layout))]
    for place in numbers:
        for number in (-1, 10**6, 2**31 - 1, -(2**31)):
            wrong = layout.clone()
            wrong[place] = number
            with pytest.raises((ValueError, RuntimeError), match=rf"^{op}: layout must "):
                call(*first, wrong)


def test_a_bad_beta_of_an_empty_batch():
    with pytest.raises(ValueError, match=r"^bipartite_gibbs: beta must be finite"):
        gx.bipartite_gibbs(torch.zeros(0, 3), torch.zeros(3), torch.zeros(2), torch.zeros(3, 2), 1, beta=math.nan)
    with pytest.raises(ValueError, match=r"^graph_gibbs: beta must be finite"):
        gx.graph_gibbs(torch.zeros(0, N), torch.zeros(N), torch.zeros(E), gx.ColoredGraph(N, EDGES), 1, beta=math.nan)


def test_a_coupling_too_large():
    for value in (2.0**127, -(2.0**127), 3e38):
        arguments = good("graph_gibbs") | {"coupling": torch.full((E,), value)}
        check_error("graph_gibbs", arguments, "coupling")
    with pytest.warns(gx.CouplingResolutionWarning):
        gx.graph_gibbs(**good("graph_gibbs") | {"coupling": torch.full((E,), 1.7e38)})


# Numbers from NumPy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_numpy_numbers_are_numbers(name):
    """NumPy gives schedules with negative strides, unsigned seeds and float32 numbers."""
    beta = "betas" if name.endswith("ais") else "beta"
    schedule = np.linspace(0, 1, len(good(name)[beta]))[::-1]
    call, arguments = getattr(gx, name), good(name) | {"seed": 2**63 + 1}
    expected = call(**arguments | {beta: torch.from_numpy(schedule.copy())})
    sharpness = {"sharpness": np.float32(4)} if name.endswith("_relaxed") else {}
    assert_same_bits(call(**arguments | {beta: schedule, "seed": np.uint64(2**63 + 1), **sharpness}), expected)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("value", [1j, np.complex64(1), np.ones(2, complex), torch.ones(2, dtype=torch.complex64)])
def test_beta_is_real(name, value):
    beta = "betas" if name.endswith("ais") else "beta"
    with pytest.raises(TypeError, match=f"^{name}: {beta} must be real, got "):
        getattr(gx, name)(**good(name) | {beta: value})
