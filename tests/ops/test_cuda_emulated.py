# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of the ops on the CUDA kernels, by means of tests/cuda/emulator.h."""

import ctypes
import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import backends
import pytest
import test_bipartite_ais
import test_bipartite_gibbs
import test_bipartite_gibbs_relaxed
import test_golden
import test_graph_ais
import test_graph_fields
import test_graph_gibbs
import test_graph_gibbs_relaxed
import test_graph_metropolis
import test_graph_sweeps
import test_moments_ops
import test_rounding_warning
import test_tempering_ops
import torch
from backends import BIPARTITE_ROUTES, GRAPH_ROUTES, call_emulated, emulated_library

import gibbs_ext as gx
from gibbs_ext import ops, reference

MODULES = (
    test_bipartite_gibbs,
    test_bipartite_gibbs_relaxed,
    test_bipartite_ais,
    test_graph_gibbs,
    test_graph_gibbs_relaxed,
    test_graph_metropolis,
    test_graph_sweeps,
    test_graph_ais,
    test_graph_fields,
    test_rounding_warning,
    test_tempering_ops,
    test_moments_ops,
    test_golden,
)
# Tests of the CPU's threads, instruction sets and routes and of Python's locks, and tests whose many draws would take
# minutes here. Errors may call a wrong state a wrong bias, because only the state tells a call the size of its graph.
UNFIT = (
    *("thread", "gil", "instruction_set", "routes_agree", "docstring", "can_fail"),
    *("many_nodes", "drift", "tables_agree", "ties_are", "refuses", "statistics", "plain_calls"),
)


def unfit(module: str, name: str) -> bool:
    return any(word in name for word in UNFIT)


globals().update(backends.tests_of(MODULES, unfit))


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    library = emulated_library()
    backends.send_ops(call_emulated, library.set_route, monkeypatch)
    yield
    library.set_route("auto")


@pytest.fixture(params=BIPARTITE_ROUTES)
def instruction_set(request: pytest.FixtureRequest) -> str:
    emulated_library().set_route(request.param)
    return str(request.param)


@pytest.fixture(params=GRAPH_ROUTES)
def graph_route(request: pytest.FixtureRequest) -> str:
    emulated_library().set_route(request.param)
    return str(request.param)


def test_a_fault_goes_before_a_warning_and_leaves_nothing_behind() -> None:
    weight, bias = 1e6 * torch.randn(17, 33), torch.zeros(17)
    left = torch.zeros(33, 17)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="bipartite_gibbs: left_bias must be finite"):
            gx.bipartite_gibbs(left, bias.index_fill(0, torch.tensor(3), torch.nan), torch.zeros(33), weight, 1)
        with pytest.raises(gx.CouplingResolutionWarning):
            gx.bipartite_gibbs(left, bias, torch.zeros(33), weight, 1)
        gx.bipartite_gibbs(left, bias, torch.zeros(33), weight / 1e6, 1)


def test_a_fault_is_raised_by_the_next_call_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIBBS_EMULATED_ASYNCHRONOUS", "1")
    parameters = torch.zeros(17), torch.zeros(33), torch.zeros(17, 33)
    gx.bipartite_gibbs(torch.full((3, 17), 2.0), *parameters, 1)
    with pytest.raises(ValueError, match=r"bipartite_gibbs: left must hold 0 and 1 only, got 2 \(found by an earlier"):
        gx.bipartite_gibbs(torch.zeros(3, 17), *parameters, 1)
    gx.bipartite_gibbs(torch.zeros(3, 17), *parameters, 1)


@pytest.fixture
def asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls leave behind what their kernels find, for gx.synchronize()."""
    monkeypatch.setenv("GIBBS_EMULATED_ASYNCHRONOUS", "1")
    monkeypatch.setattr(ops, "_cuda", emulated_library())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda._utils, "_get_device_index", lambda device, optional: device or 0)


@pytest.mark.usefixtures("asynchronous")
def test_synchronize_raises_a_fault_once() -> None:
    gx.bipartite_gibbs(torch.full((3, 17), 2.0), torch.zeros(17), torch.zeros(33), torch.zeros(17, 33), 1)
    gx.synchronize(1)  # a device that nobody has used
    with pytest.raises(RuntimeError, match=r"^bipartite_gibbs: left must hold 0 and 1 only, got 2$"):
        gx.synchronize()
    gx.synchronize()


@pytest.mark.usefixtures("asynchronous")
def test_a_coarse_resolution_is_said_once() -> None:
    graph = gx.ChimeraGraph(1)
    message = r"^bipartite_gibbs: weight spans too wide a range: .* steps of 0.0625 .* units of up to 33 neighbours$"

    def call() -> None:
        gx.bipartite_gibbs(torch.zeros(3, 17), torch.zeros(17), torch.zeros(33), torch.full((17, 33), 3e6), 1)

    call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(gx.CouplingResolutionWarning, match=message):
            gx.synchronize()
        gx.synchronize()
    call()
    with pytest.warns(gx.CouplingResolutionWarning, match=message):
        gx.synchronize()
    call()
    # The results of that call are valid, although they are rounded.
    with pytest.warns(gx.CouplingResolutionWarning, match=r" neighbours \(found by an earlier call\)$"):
        gx.graph_gibbs(torch.zeros(3, 8), torch.zeros(8), torch.zeros(16), graph, 1)


@pytest.mark.parametrize("op", test_rounding_warning.OPS)
def test_rounding_to_float32_is_said_on_every_route(op: str) -> None:
    for route in GRAPH_ROUTES if op.startswith("graph") else BIPARTITE_ROUTES:
        emulated_library().set_route(route)
        test_rounding_warning.check_cancelling_calls(op)


def test_a_device_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIBBS_EMULATED_DEVICE", "V100")
    with pytest.raises(RuntimeError, match=r"bipartite_gibbs: cuda:\S+ has compute capability 7.0, older than .* 7.5"):
        gx.bipartite_gibbs(torch.zeros(3), torch.zeros(3), torch.zeros(2), torch.zeros(3, 2), 1)


def test_a_launch_that_fails_is_no_fault_of_an_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIBBS_EMULATED_DEVICE", "promises too much")
    with pytest.raises(RuntimeError, match=r"^bipartite_gibbs: emulator: a CTA cannot have \d+ bytes of shared memory"):
        gx.bipartite_gibbs(torch.zeros(300), torch.zeros(300), torch.zeros(300), torch.zeros(300, 300), 1)


def test_too_little_memory() -> None:
    left = torch.zeros(3).expand(10**14, 3)
    with pytest.raises(RuntimeError, match=r"bipartite_gibbs: cannot allocate \[100000000000000, 3\] float32 on cpu: "):
        gx.bipartite_gibbs(left, torch.zeros(3), torch.zeros(2), torch.zeros(3, 2), 1)


# The slices of the model fit neither registers nor these devices' shared memory.
@pytest.mark.parametrize("device", ["T4", "A100", "RTX 5090"])
def test_smaller_devices(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIBBS_EMULATED_DEVICE", device)
    n1, n2 = 300, 290
    parameters = torch.randn(n1), torch.randn(n2), torch.randn(n1, n2) / n1**0.5
    for chains in (3, 40):
        left = torch.randint(2, (chains, n1)).float()
        emulated = gx.bipartite_gibbs(left, *parameters, 2, seed=1)
        assert emulated_library().last_route == ("cluster" if device == "RTX 5090" else "global")
        expected = reference.bipartite_gibbs_reference(left, *parameters, 2, seed=1)
        assert all(a.equal(b) for a, b in zip(emulated, expected, strict=True))


def launches(call: Callable[[], object], most_ctas: int = -1) -> list[dict[str, Any]]:
    """The launches of a call, as tests/cuda/emulated_devices.cpp counts them, run with `most_ctas` CTAs (-1: all)."""
    counters = ctypes.CDLL(str(backends.build.emulated_ops()))
    counters.emulator_launches.restype = ctypes.c_char_p
    counters.emulator_count(ctypes.c_int64(most_ctas))
    try:
        call()
    finally:
        text = counters.emulator_launches()
    found: list[dict[str, Any]] = json.loads(text)
    return found


# 16 clusters of eight CTAs run at a time on an H100. Of 250 models one CTA each would leave a third of the device idle.
@pytest.mark.parametrize(
    ("n1", "n2", "models", "chains", "stay"), [(784, 500, 1, 8192, True), (32, 32, 250, 533, False)]
)
def test_ctas_stay_for_many_chains_if_the_device_is_busy(
    n1: int, n2: int, models: int, chains: int, stay: bool
) -> None:
    left = torch.zeros(n1).expand(chains, models, n1)
    weight = torch.zeros(models, n1, n2)
    emulated_library().set_route("auto")
    found = launches(lambda: gx.bipartite_gibbs(left, torch.zeros(n1), torch.zeros(n2), weight, 1, seed=1), most_ctas=0)
    sweeps = next(launch for launch in found if "bipartite_kernel" in launch["kernel"])
    assert sweeps["num_ctas"] == 16 * 8 if stay else sweeps["num_ctas"] >= 2 * models


# A device may grant clusters of eight, of two, or none although its compute capability has them.
@pytest.mark.parametrize(
    ("device", "chains", "route", "most"),
    [
        ("H100", 3, "cluster", 8),
        ("RTX 5090", 40, "cluster", 8),
        ("pairs", 3, "cluster", 2),
        ("no clusters", 3, "global", 1),
    ],
)
def test_clusters_that_a_device_grants(
    device: str, chains: int, route: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIBBS_EMULATED_DEVICE", device)
    emulated_library().set_route("cluster")
    n1, n2 = 160, 131
    parameters = torch.randn(n1), torch.randn(n2), torch.randn(n1, n2) / n1**0.5
    left = torch.randint(2, (chains, n1)).float()
    results: list[torch.Tensor] = []
    found = launches(lambda: results.extend(gx.bipartite_gibbs(left, *parameters, 2, seed=1)))
    sweeps = next(launch for launch in found if "bipartite_kernel" in launch["kernel"])
    assert emulated_library().last_route == route
    assert (2 if route == "cluster" else 1) <= sweeps["cluster_size"] <= most
    expected = reference.bipartite_gibbs_reference(left, *parameters, 2, seed=1)
    assert all(a.equal(b) for a, b in zip(results, expected, strict=True))
