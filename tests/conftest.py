# SPDX-License-Identifier: Apache-2.0
import os
from collections.abc import Iterator

import eighths
import pytest
import torch
from graph_support import ROUTES, WAYS
from hypothesis import HealthCheck, settings
from support import supported_instruction_sets

from gibbs_ext import ops

# A deadline would fail on a loaded machine, and random examples would fail by chance.
settings.register_profile(
    "gibbs_ext", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("gibbs_ext")


def pytest_configure(config: pytest.Config) -> None:
    # Workers share the cores, and so do the programs that they start: threads that find none spin for long.
    if workers := len(config.getoption("tx", None) or []):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
    try:
        eighths.chosen()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_report_header() -> str:
    which = "an eighth of the emulated tests, and of the faults planted in kernels"
    return f"{which}: {eighths.chosen()} of 0 to 7 (GIBBS_TEST_EMULATED names another, or all)"


def is_no_way(item: pytest.Item) -> bool:
    """Whether the test names an instruction set that lacks the route that it names."""
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    way = params.get("instruction_set"), params.get("graph_route")
    return way[0] in supported_instruction_sets() and way[1] in ROUTES and way not in WAYS


# They take minutes, so they come first: else a worker is left alone with one of them at the end of `make test`.
LONG_FILES = ["test_gpu_proof.py", "test_cuda_emulated.py", "test_cuda_planted.py", "test_compare.py"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the other eighths of the emulated tests out, and ways that do not exist; long files come first."""
    chosen = eighths.chosen()
    left_out = {
        item.nodeid
        for item in items
        if is_no_way(item) or (chosen != "all" and eighths.eighth_of(item.nodeid) not in (None, chosen))
    }
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
    items[:] = [item for item in items if item.nodeid not in left_out]
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """GIBBS_TEST_SEED tries other draws, say every night; a statistical test fails for one seed in a million."""
    torch.manual_seed(int(os.environ.get("GIBBS_TEST_SEED", "0")))


@pytest.fixture(params=supported_instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each instruction set of this machine."""
    ops.set_instruction_set(request.param)
    yield request.param
    ops.set_instruction_set("auto")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=ROUTES)
def graph_route(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each route that binary sweeps of a graph may take."""
    ops.set_graph_route(request.param)
    yield request.param
    ops.set_graph_route("auto")
