# SPDX-License-Identifier: Apache-2.0
"""The tests of the ops once more, with the CUDA kernels in the CPU's place, run by tests/cuda/emulator.h."""

import warnings
from collections.abc import Iterator

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
import torch
from backends import BIPARTITE_ROUTES, GRAPH_ROUTES, call_emulated, emulated_library

import gibbs_ext as gx
from gibbs_ext import reference

MODULES = (
    test_bipartite_gibbs,
    test_bipartite_gibbs_relaxed,
    test_bipartite_ais,
    test_graph_gibbs,
    test_graph_gibbs_relaxed,
    test_graph_ais,
    test_graph_fields,
    test_golden,
)
# Of the CPU alone: its threads, instruction sets and routes, Python's locks; or so many draws that the emulator would
# take minutes. A wrong state is said to be a wrong bias: only the state tells a call how many nodes its graph has.
UNFIT = (
    *("thread", "gil", "instruction_set", "routes_agree", "docstring", "can_fail"),
    *("many_nodes", "drift", "tables_agree", "ties_are", "refuses"),
)


def unfit(module: str, name: str) -> bool:
    return any(word in name for word in UNFIT)


globals().update(backends.tests_of(MODULES, unfit))


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    library = emulated_library()
    backends.send_ops(call_emulated, library.set_route, MODULES, monkeypatch)
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


def test_a_device_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIBBS_EMULATED_DEVICE", "V100")
    with pytest.raises(RuntimeError, match=r"bipartite_gibbs: cuda:\S+ has compute capability 7.0, older than .* 7.5"):
        gx.bipartite_gibbs(torch.zeros(3), torch.zeros(3), torch.zeros(2), torch.zeros(3, 2), 1)


def test_too_little_memory() -> None:
    left = torch.zeros(3).expand(10**14, 3)
    with pytest.raises(RuntimeError, match=r"bipartite_gibbs: cannot allocate \[100000000000000, 3\] float32 on cpu: "):
        gx.bipartite_gibbs(left, torch.zeros(3), torch.zeros(2), torch.zeros(3, 2), 1)


# Where a model fits no shared memory, nor a CTA's part of it.
@pytest.mark.parametrize("device", ["T4", "A100", "RTX 5090"])
def test_smaller_devices(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIBBS_EMULATED_DEVICE", device)
    n1, n2 = 160, 131
    parameters = torch.randn(n1), torch.randn(n2), torch.randn(n1, n2) / n1**0.5
    for chains in (3, 40):
        left = torch.randint(2, (chains, n1)).float()
        emulated = gx.bipartite_gibbs(left, *parameters, 2, seed=1)
        expected = reference.bipartite_gibbs_reference(left, *parameters, 2, seed=1)
        assert all(a.equal(b) for a, b in zip(emulated, expected, strict=True))
