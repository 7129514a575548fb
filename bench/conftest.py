# SPDX-License-Identifier: Apache-2.0
"""`pytest bench/` with pytest-benchmark: a case is a group, and each contender an item of its own.

The first item of a group that runs measures all contenders of the group that were chosen, in turns. Each item hands its
times to pytest-benchmark by a timer that tells them again. All options of pytest-benchmark are as its users know them;
--benchmark-max-time is of one contender, so a group with five of them takes five times as long.
"""

import os
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from . import machine

# Before the imports below, which load what reads the environment.
COMPLAINT = machine.clean(os.environ)

import torch  # noqa: E402

from . import harness, limits  # noqa: E402
from .harness import Case, Missing, Outcome  # noqa: E402
from .tables import NAMES  # noqa: E402

HERE = Path(__file__).parent
CPU_ONLY = {"graph_building", "interop_sklearn", "memory"}


class Group:
    """The contenders of a case that were chosen."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.contenders: list[str] = []
        self.outcomes: dict[str, Outcome] | None = None
        self.load = (0.0, 0.0, 0.0)
        self.error: Exception | None = None

    def measure(self, benchmark: Any, options: Any) -> None:
        self.load, self.outcomes = os.getloadavg(), {}
        seconds = float(options.benchmark_max_time) if benchmark.enabled else 0.0
        if seconds and self.case.work and not LIMITS and not harness.on_gpu():
            LIMITS.append(limits.measure())
        try:
            self.outcomes = harness.measure(self.case, self.contenders, seconds, options.benchmark_min_rounds)
        except Exception as error:  # of what all of them share
            self.error = error
        harness.forget_compiled()

    def report(self, contender: str, benchmark: Any) -> None:
        assert self.outcomes is not None
        outcome = self.outcomes.get(contender, Outcome(error=self.error))
        if isinstance(outcome.error, Missing):
            pytest.skip(str(outcome.error))
        if isinstance(outcome.error, ModuleNotFoundError):  # say a package that makes the inputs of a case
            pytest.skip(f"{outcome.error}: make bench-peers installs all that benchmarks need")
        if outcome.error:
            raise outcome.error
        benchmark.extra_info |= {
            "updates": self.case.updates,
            "once": not outcome.is_repeated,
            "load": self.load,
            "torch": torch.__version__,
            "work": self.case.work,
            "figures": outcome.figures,
            "date": datetime.now(timezone.utc).date().isoformat(),
        }
        REPLAY.times = iter([reading for seconds in outcome.times for reading in (0.0, seconds)])
        benchmark.pedantic(lambda: None, rounds=len(outcome.times))


class Replay:
    """A timer of pytest-benchmark that tells times which were measured before."""

    __name__ = "in turns"
    times: Iterator[float] = iter(())

    def __call__(self) -> float:
        return next(self.times)


REPLAY = Replay()
LIMITS: list[dict[str, list[float]]] = []  # of this core, before the first measurement and after the last one
GROUPS: dict[tuple[str, str], Group] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where benchmarks run (default: cpu)")


def pytest_configure(config: pytest.Config) -> None:
    if complaint := COMPLAINT or machine.complaint():
        raise pytest.UsageError(complaint)
    if config.option.device == "cuda":  # A default device costs every operator microseconds, so the CPU has none.
        if not torch.cuda.is_available():
            raise pytest.UsageError(f"--device cuda needs a GPU, and PyTorch {torch.__version__} finds none")
        torch.set_default_device("cuda")
    torch.set_num_threads(1)
    for warning in ("ignore:Sparse CSR tensor support is in beta", "ignore:`torch.jit.script_method` is deprecated"):
        config.addinivalue_line("filterwarnings", warning)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    # pytest itself collects a file that the command line names.
    if file_path.parent != HERE or file_path.stem not in NAMES or parent.session.isinitpath(file_path):
        return None
    return pytest.Module.from_parent(parent, path=file_path)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = getattr(metafunc.function, "cases", None)
    if not cases:
        return
    op = metafunc.function.__name__
    parameters = []
    for case in harness.variants(cases()) if op not in CPU_ONLY or not harness.on_gpu() else ():
        GROUPS[op, case.name] = Group(case)
        for name in case.contenders:
            marks = [pytest.mark.benchmark(group=f"{op}: {case.name}", timer=REPLAY)]
            if reason := machine.missing(name):
                marks.append(pytest.mark.skip(reason=reason))
            parameters.append(pytest.param(case.name, name, id=f"{case.name}-{name}", marks=marks))
    metafunc.parametrize(("case", "contender"), parameters)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tells each group which of its contenders were chosen and are there."""
    for item in session.items:
        if hasattr(getattr(item, "function", None), "cases") and not item.get_closest_marker("skip"):
            parameters = item.callspec.params  # type: ignore[attr-defined]
            GROUPS[item.originalname, parameters["case"]].contenders.append(parameters["contender"])  # type: ignore[attr-defined]


@pytest.fixture
def group(request: pytest.FixtureRequest, case: str, benchmark: Any) -> Group:
    found = GROUPS[request.function.__name__, case]
    if found.outcomes is None:
        found.measure(benchmark, request.config.option)
    return found


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    if LIMITS:
        LIMITS.append(limits.measure())
    machine_info |= machine.about() | {"limits": limits.medians(LIMITS)}


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Groups that a later run leaves out stay in the history, so each item names its commit and its bound."""
    rates = output_json["machine_info"]["limits"]
    for benchmark in output_json["benchmarks"]:
        about = benchmark["extra_info"]
        about["commit"] = output_json["commit_info"]["id"]
        if about["work"] and rates:
            about["bound"], about["bound_by"] = limits.bound(about["work"], rates)
