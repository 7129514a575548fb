# SPDX-License-Identifier: Apache-2.0
import os
import zlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from support import supported_instruction_sets

from gibbs_ext import ops

# A timing-dependent deadline fails on a loaded machine; a derandomised run fails for a reason, not by chance.
settings.register_profile(
    "gibbs_ext", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("gibbs_ext")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The emulator takes minutes for what the CPU does in seconds: of the CPU's tests one in eight; on demand all."""
    if os.environ.get("GIBBS_TEST_EMULATED") == "all":
        return
    emulated = [item for item in items if item.path.name == "test_cuda_emulated.py" and "__" in item.name]
    left_out = {item.nodeid for item in emulated if zlib.crc32(item.nodeid.encode()) % 8}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
    items[:] = [item for item in items if item.nodeid not in left_out]


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Set GIBBS_TEST_SEED to try other draws (nightly); a statistical test fails for one seed in a million."""
    torch.manual_seed(int(os.environ.get("GIBBS_TEST_SEED", "0")))


@pytest.fixture(params=supported_instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each instruction set that this machine has."""
    ops.set_instruction_set(request.param)
    yield request.param
    ops.set_instruction_set("auto")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["blocks", "tables", "chains"])
def graph_route(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with each route that binary sweeps of a graph may take."""
    ops.set_graph_route(request.param)
    yield request.param
    ops.set_graph_route("auto")
