# SPDX-License-Identifier: Apache-2.0
"""Whatever is wrong with a call: one clear error that begins with the function's name, and untouched inputs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gibbs_ext as gx

CALLS = ["bipartite_gibbs", "bipartite_gibbs_relaxed", "bipartite_ais"]
N1, N2, BATCH = 4, 6, 3


def good(name):
    """Keyword arguments of a call that works, every tensor of them given."""
    arguments = {
        "left": torch.randint(2, (BATCH, N1)).float(),
        "left_bias": torch.randn(BATCH, N1),
        "right_bias": torch.randn(N2),
        "weight": torch.randn(BATCH, N1, N2),
        "chain_offset": torch.arange(BATCH),
        "sweep_offset": 3,
        "seed": 1,
    }
    if name == "bipartite_gibbs":
        arguments |= {
            "num_sweeps": 2,
            "beta": torch.tensor([0.5, 1.0]),
            "right": torch.randint(2, (BATCH, N2)).float(),
            "clamp_left": torch.zeros(BATCH, N1, dtype=torch.bool),
            "clamp_right": torch.ones(N2, dtype=torch.bool),
        }
    elif name == "bipartite_gibbs_relaxed":
        arguments |= {"num_sweeps": 1, "num_relaxed_sweeps": 2, "beta": torch.tensor([0.5, 1.0, 1.0]), "sharpness": 4.0}
    else:
        arguments |= {"base_left_bias": torch.randn(N1), "base_right_bias": torch.randn(N2)}
        arguments["betas"] = torch.tensor([0.0, 1.0])
    return arguments


def tensors_of(name, *, floating=None):
    return sorted(
        key
        for key, value in good(name).items()
        if isinstance(value, torch.Tensor) and (floating is None or value.is_floating_point() == floating)
    )


PARAMETERS = ("left_bias", "right_bias", "weight", "base_left_bias", "base_right_bias")
SIDES = (*PARAMETERS, "left", "right", "clamp_left", "clamp_right")


@st.composite
def faults(draw, name):
    """What to change in the good arguments, and a word that the message must hold."""
    arguments = good(name)
    present = [key for key in SIDES if key in arguments]
    parameters = [key for key in PARAMETERS if key in arguments]
    beta = "betas" if name == "bipartite_ais" else "beta"
    integers = [key for key in ("num_sweeps", "num_relaxed_sweeps", "sweep_offset") if key in arguments]
    kind = draw(
        st.sampled_from(
            ["last dim", "batch dim", "too few dims", "not finite", "dtype", "mixed dtype", "not a tensor", "integer",
             "negative", "beta", "chains", "seed", "state", "mask", "sharpness", "relaxation", "right"]
        )
    )  # fmt: skip
    if kind == "last dim":
        key = draw(st.sampled_from(present))
        size = draw(st.integers(0, 12).filter(lambda n: n not in (N1, N2, 1)))
        shape = (*arguments[key].shape[:-1], size)
        return {key: torch.zeros(shape, dtype=arguments[key].dtype)}, ""
    if kind == "batch dim":
        key = draw(st.sampled_from([*present, "chain_offset"]))
        size = draw(st.integers(2, 9).filter(lambda n: n != BATCH))
        own = {"weight": 2, "chain_offset": 0}.get(key, 1)
        value = arguments[key]
        return {key: torch.zeros((size, *value.shape[value.dim() - own :]), dtype=value.dtype)}, "broadcast"
    if kind == "too few dims":
        key = draw(st.sampled_from(parameters))
        return {key: torch.zeros(N1) if key == "weight" else torch.tensor(0.0)}, key
    if kind == "not finite":
        key = draw(st.sampled_from(parameters))
        value = arguments[key].clone()
        place = draw(st.integers(0, value.numel() - 1))
        value.view(-1)[place] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
        return {key: value}, key
    if kind == "dtype":
        key = draw(st.sampled_from(parameters))
        return {
            key: arguments[key].to(draw(st.sampled_from([torch.int32, torch.int64, torch.bool, torch.complex64])))
        }, key
    if kind == "mixed dtype":
        key = draw(st.sampled_from([key for key in parameters if key != "weight"]))
        return {key: arguments[key].double()}, key
    if kind == "not a tensor":
        key = draw(st.sampled_from([key for key in present if key != "right" or name == "bipartite_gibbs"]))
        return {key: draw(st.sampled_from([[0.0], 3, "left", object()]))}, key
    if kind == "integer":
        key = draw(st.sampled_from(integers))
        return {key: draw(st.sampled_from([1.0, "2", None, True, torch.tensor(2.5)]))}, key
    if kind == "negative":
        key = draw(st.sampled_from([*integers, "chain_offset"]))
        lowest = -(2**40)
        return {key: draw(st.integers(lowest, -1))}, "" if key == "chain_offset" else key
    if kind == "beta":
        bad = [torch.zeros(2, 2), torch.tensor([math.nan]), torch.tensor([math.inf] * 2), "hot", None, torch.zeros(0),
               torch.ones(1, requires_grad=True), [0.5, "x"]]  # fmt: skip
        if name != "bipartite_ais":  # whose schedule may have any length
            bad.append(torch.zeros(7))
        return {beta: draw(st.sampled_from(bad))}, beta
    if kind == "chains":
        bad = [torch.zeros(BATCH), torch.ones(BATCH, dtype=torch.bool), torch.tensor([0, -1, 2]), 2**48, 1.5, None,
               torch.tensor([0, 1, 2**48]), 2**48 - 1]  # fmt: skip
        return {"chain_offset": draw(st.sampled_from(bad))}, "chain"
    if kind == "seed":
        bad = [2**64, -(2**63) - 1, 1.0, "seed", torch.tensor(1.0), torch.tensor([1])]
        changed = {"seed": draw(st.sampled_from(bad))}
        return (changed if draw(st.booleans()) else {"generator": torch.Generator()}), "seed"
    if kind == "state":
        values = [0.5, math.nan, 2.0, -1.0]
        value = arguments["left"].clone()
        value[1, 2] = draw(st.sampled_from(values))
        bad = [value, arguments["left"].long(), arguments["left"].to(torch.complex64)]
        return {"left": draw(st.sampled_from(bad))}, "left"
    if kind == "mask" and name == "bipartite_gibbs":
        key = draw(st.sampled_from(["clamp_left", "clamp_right"]))
        return {key: arguments[key].to(draw(st.sampled_from([torch.uint8, torch.float32, torch.int64])))}, key
    if kind == "right" and name == "bipartite_gibbs":
        return {"right": None}, "right"
    if kind == "sharpness" and name == "bipartite_gibbs_relaxed":
        return {"sharpness": draw(st.sampled_from([0.0, -1.0, math.nan, math.inf, "4", None]))}, "sharpness"
    if kind == "relaxation" and name == "bipartite_gibbs_relaxed":
        return {"relaxation": draw(st.sampled_from(["", "PWL", 0, None]))}, "relaxation"
    key = draw(st.sampled_from(["sweep_offset"]))
    return {key: draw(st.sampled_from([2**44, 2**44 + 1, 2**60]))}, key


def check_error(name, arguments, word):
    before = {key: value.clone() for key, value in arguments.items() if isinstance(value, torch.Tensor)}
    with pytest.raises((TypeError, ValueError, RuntimeError)) as raised:
        getattr(gx, name)(**arguments)
    message = str(raised.value)
    assert message.startswith(f"{name}: "), message
    assert word in message, f"{message!r} does not name {word}"
    assert len(message) < 300, message
    assert "\n" not in message, message
    for key, copy in before.items():
        now = arguments[key]
        assert torch.equal(now, copy) or now.isnan().equal(copy.isnan()), f"{key} was changed"


@pytest.mark.parametrize("name", CALLS)
def test_good_arguments_are_good(name):
    getattr(gx, name)(**good(name))


@pytest.mark.parametrize("name", CALLS)
@given(data=st.data())
def test_one_fault(name, data):
    change, word = data.draw(faults(name))
    check_error(name, {**good(name), **change}, word)


@pytest.mark.parametrize("name", CALLS)
@given(data=st.data())
def test_many_faults_give_one_error(name, data):
    arguments = good(name)
    for _ in range(data.draw(st.integers(2, 4))):
        arguments |= data.draw(faults(name))[0]
    check_error(name, arguments, "")


@pytest.mark.parametrize("name", CALLS)
@given(data=st.data())
def test_any_shapes_either_work_or_say_why(name, data):
    """Random small shapes for every tensor: the right shape comes back, or the one error."""
    arguments = good(name)
    del arguments["chain_offset"]
    sizes = st.lists(st.integers(0, 3), max_size=2)
    n1, n2 = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    units = {"left": (n1,), "left_bias": (n1,), "base_left_bias": (n1,), "clamp_left": (n1,), "weight": (n1, n2)}
    batches = []
    for key in SIDES:
        if key in arguments:
            batch = data.draw(sizes)
            own = units.get(key, (n2,))
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
    shape, (n1, n2) = torch.broadcast_shapes(*batches), arguments["weight"].shape[-2:]
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
    ],
)
def test_coupling_resolution(weight, message):
    with pytest.raises((ValueError, RuntimeError), match=rf"^coupling_resolution: {message}"):
        gx.coupling_resolution(weight)


def test_biases_must_be_finite_in_float32():
    bias, weight = torch.zeros(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    with pytest.raises((ValueError, RuntimeError), match=r"^bipartite_gibbs: right_bias"):
        gx.bipartite_gibbs(bias, bias, torch.full_like(bias, 1e300), weight, 1, seed=0)
