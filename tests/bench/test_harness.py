# SPDX-License-Identifier: Apache-2.0
"""bench/harness.py with a fake clock, the tables, and `pytest bench/` with benchmarks that do next to nothing."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import graph_gibbs, harness, limits, machine, tables, texts
from bench.tables import OURS

pytest_plugins = "pytester"
ROOT = Path(__file__).parents[2]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.cpu = 0.0
        self.calls: list[float] = []

    def takes(self, seconds: float, threads: float = 1) -> Callable[[Any], harness.Call]:
        def call() -> None:
            self.now += seconds
            self.cpu += seconds * threads
            self.calls.append(seconds)

        return lambda inputs: call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(harness.time, "perf_counter", lambda: made.now)
    monkeypatch.setattr(harness.time, "process_time", lambda: made.cpu)
    return made


def case(contenders: dict[str, Callable[[Any], harness.Call]], **more: Any) -> harness.Case:
    return harness.Case("a", lambda: None, contenders, **more)


def measure(of: harness.Case, seconds: float, names: list[str] | None = None) -> dict[str, harness.Outcome]:
    return harness.measure(of, names or list(of.contenders), seconds, min_rounds=5)


def test_rounds_fill_the_time(clock: Clock) -> None:
    found = measure(case({OURS: clock.takes(0.25), "slow": clock.takes(0.5), "fast": clock.takes(0.125)}), 8 / 3)
    # Each contender is called once, then in rounds of 0.875 s until 8 s are over.
    assert clock.calls == [0.25, 0.5, 0.125] * 11
    assert {name: outcome.times for name, outcome in found.items()} == {
        OURS: [0.25] * 10,
        "slow": [0.5] * 10,
        "fast": [0.125] * 10,
    }


def test_a_peer_that_is_far_behind_is_called_once(clock: Clock) -> None:
    peers = {"slow": clock.takes(20), "behind": clock.takes(3), "fast": clock.takes(0.5)}
    found = measure(case({OURS: clock.takes(0.25), **peers}), 0.25)
    assert (clock.calls.count(20), clock.calls.count(3)) == (1, 1)
    assert len(found[OURS].times) == clock.calls.count(0.25) - 1 == 5
    assert (found["slow"].times, found["slow"].is_repeated) == ([20], False)


def test_without_time_each_contender_is_called_once(clock: Clock) -> None:
    measure(case({OURS: clock.takes(0.25), "b": clock.takes(0.5)}), 0)
    assert clock.calls == [0.25, 0.5]


def test_times_are_of_one_of_many_calls(clock: Clock) -> None:
    found = measure(case({OURS: clock.takes(0.5), "b": clock.takes(0.5)}, calls=2), 1)
    assert {*found["b"].times} == {0.25}


def test_a_contender_on_more_threads_than_it_may_have_fails(clock: Clock) -> None:
    contenders = {OURS: clock.takes(0.5), tables.TWO_THREADS: clock.takes(0.5, 2), "b": clock.takes(0.5, 1.5)}
    found = measure(case(contenders), 1)
    assert (found[OURS].error, found[tables.TWO_THREADS].error) == (None, None)
    assert str(found["b"].error).startswith("a: b must take 1 thread, and took ")


def draws(mean: float) -> Callable[[Any], harness.Call]:
    return lambda inputs: lambda: torch.full((100,), mean)


@pytest.mark.parametrize("mean", [1.1, float("nan")])
def test_those_who_do_something_else_are_found_also_if_ours_is_not_chosen(mean: float) -> None:
    of = case({OURS: draws(1), "b": draws(mean), "c": draws(1)}, statistics=lambda inputs, x: [x])
    found = measure(of, 0.001, ["b", "c"])
    assert str(found["b"].error).startswith(f"a: b has a mean of {mean}, expected 1 +- ")
    assert found["b"].times == []
    assert found["c"].error is None
    assert len(found["c"].times) >= 5


def test_nobody_passes_unchecked_if_ours_fails() -> None:
    def broken(inputs: None) -> harness.Call:
        raise ValueError("broken")

    found = measure(case({OURS: broken, "b": draws(1)}, statistics=lambda inputs, x: [x]), 0.001)
    assert str(found[OURS].error) == "broken"
    assert str(found["b"].error) == "a: b cannot be checked, because gibbs_ext failed"


def test_cuda_graphs_are_cases_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(call: harness.Call) -> harness.Call:
        if call() == "synchronises":
            raise RuntimeError("not while capturing")
        return lambda: "replayed"

    def returns(value: str) -> Callable[[Any], harness.Call]:
        return lambda inputs: lambda: value

    monkeypatch.setattr(harness, "on_gpu", lambda: True)
    monkeypatch.setattr(harness, "as_cuda_graph", captured)
    cases = [case({OURS: returns("eager"), "b": returns("synchronises")})]
    eager, graphs, alone = harness.variants([*cases, case({OURS: returns("")}, is_capturable=False)])
    assert [found.name for found in (eager, graphs, alone)] == ["a", "a, CUDA graphs", "a"]
    assert graphs.contenders[OURS](None)() == "replayed"
    with pytest.raises(harness.Missing, match="b cannot be captured by a CUDA graph: not while capturing"):
        graphs.contenders["b"](None)


def test_on_the_cpu_gibbs_ext_has_two_threads_once_more() -> None:
    seen: list[int] = []
    threads = case({OURS: lambda inputs: lambda: seen.append(torch.get_num_threads())})
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        (found,) = harness.variants([threads])
        measure(found, 0)
        assert (seen, torch.get_num_threads()) == ([1, 2], 1)
    finally:
        torch.set_num_threads(before)
    (alone,) = harness.variants([case({OURS: draws(1)}, calls=100)])
    assert [*alone.contenders] == [OURS]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    texts.write(path, "a")
    texts.write(path, "b")
    assert path.read_text() == "b"
    assert list(path.parent.iterdir()) == [path]


def test_a_case_may_tell_its_own_figures() -> None:
    figures = {"seconds": 7.0, "bytes": 1.0}
    calls = []
    of = case({OURS: lambda inputs: lambda: calls.append(1) or figures}, tells_figures=True)
    assert [*next(harness.variants([of])).contenders] == [OURS]
    found = measure(of, 1)[OURS]
    assert (found.times, found.figures, found.is_repeated, len(calls)) == ([7.0], figures, False, 1)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory cannot be set back")
def test_the_memory_of_a_call_is_found() -> None:
    # In a fresh process, as in the benchmark: the system may take back pages that a long test run has not touched.
    program = """
import json, torch
from bench import memory

def allocates(x):
    torch.ones(10 * len(x))
    return torch.ones(len(x))

problem = memory.Problem((10**6,), (10,), lambda n: [torch.ones(n)], {"a": allocates})
print(json.dumps(memory.measure(problem, "a")))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert (found["inputs"], found["outputs"], found["weights"]) == (4e6, 4e6, 4e6)
    assert 39e6 < found["additional"] < 50e6  # the first page may have been there


# The environment ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "MKL_DEBUG_CPU_TYPE", "ATEN_CPU_CAPABILITY"])
def test_what_slows_peers_is_removed_or_refused(name: str) -> None:
    environ = {name: "x", "OTHER": "y"}
    assert machine.clean(environ, loaded=["json"]) is None
    assert environ == {"OTHER": "y", **machine.ONE_THREAD}
    said = machine.clean({name: "x", "OTHER": "y"}, loaded=["torch"])
    assert said is not None
    assert said.endswith(f"torch has read it already, so unset it before pytest starts: unset {name}")
    assert machine.clean(dict(machine.ONE_THREAD), loaded=["torch"]) is None


def test_libraries_have_one_thread_and_the_kernels_of_the_processor() -> None:
    pool = {"internal_api": "openblas", "version": "0.3", "num_threads": 1, "architecture": "SkylakeX"}
    assert machine.complaint([pool], ["avx2", "avx512f"]) is None
    assert machine.complaint([pool | {"architecture": "Zen"}], ["avx2"]) is None
    assert "openblas 0.3 must have one thread, and has 2" in str(machine.complaint([pool | {"num_threads": 2}], []))
    slow = machine.complaint([pool | {"architecture": "Nehalem"}], ["avx2", "avx512f"])
    assert "must have one of the kernels cooperlake, sapphirerapids, skylakex" in str(slow)
    assert "has zen" in str(machine.complaint([pool | {"architecture": "Zen"}], ["avx2", "avx512f"]))


# pytest bench/ ------------------------------------------------------------------------------------------------------

BENCHMARK = """
import torch
from .harness import Case, benchmark_of
from .tables import OURS

def turn(name, mean=1.0):
    def prepare(inputs):
        if name == "broken":
            raise ValueError("broken")
        if name == "needy":
            import package_that_nobody_has
        def call():
            with open("order", "a") as file:
                print(name, file=file)
            return torch.full((10,), mean)
        return call
    return prepare

def cases():
    contenders = {OURS: turn("ours"), "NumPy": turn("numpy"), "PyTorch, a": turn("other", 2.0)}
    contenders |= {"PyTorch, b": turn("broken"), "absent": turn("absent"), "NumPy, needy": turn("needy")}
    for name in ("first", "second"):
        yield Case(name, lambda: None, contenders, 10, calls=2, statistics=lambda i, x: [x])

call_cost = benchmark_of(cases, "call_cost")
"""


@pytest.fixture
def bench(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pytest.RunResult]:
    """Runs pytest in a copy of bench/ that has one module of benchmarks, without the variables that it would refuse."""
    folder = pytester.mkpydir("bench")
    for name in ("conftest", "harness", "limits", "machine", "tables", "texts"):
        shutil.copy(ROOT / "bench" / f"{name}.py", folder)
    (folder / "call_cost.py").write_text(BENCHMARK)
    text = (folder / "machine.py").read_text()
    (folder / "machine.py").write_text(f'{text}\nPEERS["absent"] = ("absent", "absent")\n')
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "python")]))
    # By it pytest-benchmark knows the processes of pytest-xdist, in which it measures nothing.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    fast = ("--benchmark-max-time=0.001", "--benchmark-min-rounds=3")
    return lambda *arguments: pytester.runpytest_subprocess("bench/", "-ra", *fast, *arguments)


def test_contenders_take_turns_and_fail_alone(
    bench: Callable[..., pytest.RunResult], pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Nehalem")
    done = bench("--benchmark-json=run.json", "-k", "first")
    done.assert_outcomes(passed=2, failed=2, skipped=2, deselected=6)
    text = done.stdout.str()
    assert "first: PyTorch, a has a mean of 2, expected 1 +- 0" in text
    assert "ValueError: broken" in text
    assert "absent is not installed: pip install absent, or make bench-peers" in text
    assert "No module named 'package_that_nobody_has': make bench-peers installs all" in text
    order = (pytester.path / "order").read_text().split()
    assert order[:3] == ["ours", "numpy", "other"]
    assert order[3:] == ["ours", "numpy"] * (len(order[3:]) // 2)
    assert len(order[3:]) >= 6

    run = json.loads((pytester.path / "run.json").read_text())
    assert [b["name"] for b in run["benchmarks"]] == ["call_cost[first-gibbs_ext]", "call_cost[first-NumPy]"]
    for benchmark in run["benchmarks"]:
        assert benchmark["group"] == "call_cost: first"
        assert benchmark["stats"]["rounds"] == len(order[3:]) // 2 == len(benchmark["stats"]["data"])
        assert benchmark["extra_info"].keys() >= {"updates", "once", "load", "date", "torch", "commit"}
    about = run["machine_info"]
    assert about["cpu_name"] == harness.cpu_name()
    assert about["versions"]["torch"] == torch.__version__
    openblas = [pool for pool in about["threadpools"] if pool["internal_api"] == "openblas"]
    assert all(pool["num_threads"] == 1 and pool["architecture"] != "Nehalem" for pool in openblas)


def test_a_run_can_be_compared_and_disabled(bench: Callable[..., pytest.RunResult], pytester: pytest.Pytester) -> None:
    chosen = ("-k", "second and (NumPy or gibbs) and not needy")
    bench("--benchmark-disable", *chosen).assert_outcomes(passed=2, deselected=10)
    assert (pytester.path / "order").read_text().split() == ["ours", "numpy"]
    bench("--benchmark-save=a", *chosen).assert_outcomes(passed=2, deselected=10)
    done = bench("--benchmark-compare=0001", *chosen)
    done.assert_outcomes(passed=2, deselected=10)
    done.stdout.fnmatch_lines(["*call_cost[[]second-NumPy] (0001_a)*"])
    assert "call_cost[second-NumPy] (NOW)" in done.stdout.str()


def test_contenders_of_the_real_benchmarks_agree(monkeypatch: pytest.MonkeyPatch, pytester: pytest.Pytester) -> None:
    """Those that take seconds; `pytest bench/ --benchmark-disable` runs all."""
    monkeypatch.chdir(ROOT)
    chosen = "(100+100 or C8 and 128) and not compile and not thrml"
    plugins = ("-p", "no:jaxtyping", "-p", "no:cacheprovider")
    done = pytester.runpytest_subprocess(
        f"--rootdir={ROOT}", str(ROOT / "bench"), *plugins, "--benchmark-disable", "-k", chosen
    )
    outcomes = done.parseoutcomes()
    assert outcomes["passed"] > 20, done.stdout.str()
    assert not {"failed", "errors", "error"} & outcomes.keys(), done.stdout.str()


@pytest.mark.parametrize("name", sorted({*tables.NAMES} - {"graph_building", "interop_sklearn", "memory"}))
def test_on_a_gpu_no_peer_is_of_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"bench.{name}")
    for imported in (module, harness):
        monkeypatch.setattr(imported, "on_gpu", lambda: True, raising=False)
    found = {contender for of in harness.variants(module.cases()) for contender in of.contenders}
    assert {contender.split(",")[0] for contender in found} <= {
        OURS,
        tables.WITHOUT_SAMPLING,
        tables.PLAIN_SWEEPS,
        "PyTorch",
        "torch.compile",
    }
    assert not any("NumPy" in contender or "threads" in contender for contender in found)


def test_what_cannot_be_measured_is_refused(
    bench: Callable[..., pytest.RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    done = bench("-p", "torch")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*expected an environment without ATEN_CPU_CAPABILITY, *: unset ATEN_CPU_CAPABILITY"])
    if not torch.cuda.is_available():
        monkeypatch.delenv("ATEN_CPU_CAPABILITY")
        done = bench("--device", "cuda")
        assert done.ret == pytest.ExitCode.USAGE_ERROR
        done.stderr.fnmatch_lines(["*--device cuda needs a GPU, and PyTorch * finds none"])


# The limits of a core ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not limits.program(), reason="there is no compiler")
def test_the_rates_of_this_core_are_measured() -> None:
    found = limits.measure()
    assert {*found} == {
        *(f"{name} bytes" for name in ("L1", "L2", "L3", "memory")),
        *("int32 adds", "int16 adds", "byte multiply-adds", "random words"),
    }
    assert all(len(samples) > 20 and min(samples) > 0 for samples in found.values())


def test_a_bound_is_the_largest_part_of_the_best_way() -> None:
    rates = limits.medians([{"a": [1.0, 9.0, 2.0], "b": [4.0]}, {"a": [2.0, 2.0], "b": [4.0, 4.0]}])
    assert rates == {"a": 2, "b": 4}
    assert limits.bound([{"a": 6, "b": 8}], rates) == (3, "a")
    assert limits.bound([{"a": 6}, {"a": 2, "b": 8}], rates) == (2, "b")


def test_the_work_of_a_case_is_counted() -> None:
    (one,) = limits.bipartite(2, 1, 10, 20, 5)
    # 2 models x 5 sweeps x 30 units, 8 bits each; of the rows of 0.4 of the units each element is added
    assert one["random words"] == 2 * 5 * 30 / 4
    assert one["int16 adds"] == pytest.approx(2 * 5 * 0.4 * (10 * 20 + 20 * 10))
    assert one["L1 bytes"] == pytest.approx(2 * one["int16 adds"] + 4 * 2 * 200 + 4 * 2 * 2 * 30)
    tables, products = limits.bipartite(1, 8, 10, 20, 5)
    assert (tables["int16 adds"], products["byte multiply-adds"]) == (8 * 5 * 400 / 5, 8 * 5 * 400)
    (chains,) = limits.graph(1, 8, 10, 20, 5)
    assert (chains["random words"], chains["int16 adds"]) == (8 * 5 * 10 / 4, 8 * 5 * 10)
    (relaxed,) = limits.graph(1, 8, 10, 20, 0, backward=True)
    assert (relaxed["random words"], relaxed["L1 bytes"]) == (80, 4 * 2 * 20 + 4 * 5 * 80)


@pytest.mark.parametrize("of", [*graph_gibbs.cases()], ids=lambda of: of.name)
def test_the_sizes_of_graphs_are_right(of: harness.Case) -> None:
    if "Pegasus" in of.name:
        pytest.importorskip("dwave.graphs")
    inputs = of.inputs()
    models, chains = (len(inputs.J), 1) if inputs.J.dim() == 2 else (1, len(inputs.bits))
    nodes, edges = inputs.graph.num_nodes, inputs.graph.num_edges
    num_sweeps = 10 if "models, 10 sweeps" in of.name else 100
    assert of.updates == models * chains * nodes * num_sweeps
    assert of.work == limits.graph(models, chains, nodes, edges, num_sweeps)


# The history --------------------------------------------------------------------------------------------------------


def run_of(day: str, medians: dict[tuple[str, str], float]) -> dict[str, Any]:
    """A run of pytest-benchmark with these medians of (case, contender)."""
    return {
        "machine_info": {"cpu_name": "A CPU"},
        "benchmarks": [
            {
                "group": f"graph_gibbs: {of}",
                "params": {"case": of, "contender": contender},
                "extra_info": {"updates": 10**6, "torch": "2", "date": day},
                "stats": {"median": seconds, "data": [seconds]},
            }
            for (of, contender), seconds in medians.items()
        ],
    }


def test_groups_that_are_not_measured_again_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "HISTORY", tmp_path)
    first = {("a", OURS): 1.0, ("a", "NumPy"): 2.0, ("b", OURS): 1.0, ("b", "NumPy"): 3.0, ("c", OURS): 1.0}
    path = tables.keep(run_of("2001-01-01", first))
    # c has no gibbs_ext this time, so its ratios would be of two days.
    second = {("b", OURS): 1.0, ("b", "NumPy"): 20.0, ("b", "PyTorch, x"): 4.0, ("b", "PyTorch, y"): 5.0}
    assert tables.keep(run_of("2002-02-02", second | {("c", "NumPy"): 1.0})) == path
    assert list(tmp_path.glob("*/*")) == [path]
    assert "data" not in path.read_text()
    groups = {group.case: group for group in tables.groups()}
    assert [*groups] == ["a", "b", "c"]
    assert groups["a"].peers() == {"NumPy": 2}
    assert groups["b"].peers() == {"NumPy": 20, "PyTorch": 4}
    assert groups["c"].seconds == {OURS: 1}
    figures = {"additional": 1e6, "inputs": 1e6, "outputs": 1e6, "weights": 5e5}
    rows = tables.memory_table([groups["a"]._replace(figures={OURS: figures, "PyTorch, rand": figures})]).splitlines()
    assert rows[2].split("|")[2:6] == [" 2 MB               ", " 0 MB              ", " 0.50x     ", " 0.50x   "]
    old, new = tables.all_tables(list(groups.values())).split("\n\nA CPU, 1 thread, PyTorch 2, 2002-02-02:\n\n")
    assert old.startswith("A CPU, 1 thread, PyTorch 2, 2001-01-01:\n\n| case | gibbs_ext | NumPy |\n")
    assert new.splitlines()[0] == "| case | gibbs_ext | PyTorch | NumPy |"
    assert new.splitlines()[2] == "| b    | 1 M/s     | 4.0x    | 20x   |"
