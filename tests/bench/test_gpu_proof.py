# SPDX-License-Identifier: Apache-2.0
"""make gpu-proof without a GPU: steps that fail in every way, a rehearsal on the emulator, replayed lines."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import backends
import pytest
import torch
from torch import Tensor

from bench import cuda_report, gpu_proof, gpu_replay, gpu_steps, tables, texts
from bench.gpu_proof import LINES, LOG, Output, Proof, Step
from gibbs_ext import ops

ROOT = Path(__file__).parents[2]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def python(program: str) -> tuple[str, ...]:
    return sys.executable, "-c", program


def step(name: str, program: str = "", limit: float = 60, **more: Any) -> Step:
    """A step that runs a program, and then says that it is done."""
    done = "print(); print('gpu-proof: {\"done\": true}')"
    return Step(name, limit, needs=more.pop("needs", ()), command=python(f"{program}\n{done}"), **more)


def lines_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {line["step"]: line for line in map(json.loads, (folder / LINES).read_text().splitlines())}


def prove(folder: Path, *steps: Step, budget: float = 60) -> tuple[int, dict[str, dict[str, Any]]]:
    status = Proof(steps, Output(folder), budget, emulate=False).run()
    return status, lines_of(folder)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


# The program -------------------------------------------------------------------------------------------------------


def test_no_fault_of_a_step_stops_another(tmp_path: Path) -> None:
    child = tmp_path / "child"
    hangs = (
        f"import subprocess; c = subprocess.Popen(['sleep', '60']); open({str(child)!r}, 'w').write(str(c.pid))\n"
        'print(\'gpu-proof: {"figures": {"before": 1}}\', flush=True); c.wait()'
    )
    too_much = f"print('gpu-proof: {{\"figures\": {{\"x\": \"' + 'x' * {gpu_proof.MOST_OF_A_LINE} + '\"}}}}')"
    status, lines = prove(
        tmp_path / "out",
        step("raises", "raise ValueError('planted')"),
        step("hangs", hangs, limit=1.5),
        step("is killed by no name", "import os, signal; os.kill(os.getpid(), signal.SIGRTMIN + 2)"),
        step("is killed", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        Step("writes garbage", 60, needs=(), command=python("import os; os.write(1, bytes(range(256)))")),
        step("writes no JSON", "print('gpu-proof: [1')"),
        step("writes no object", "print('gpu-proof: [1]')"),
        step("writes too much", too_much),
        Step("is no program", 60, needs=(), command=("/nowhere/program",)),
        step("says so", "print('gpu-proof: {\"failed\": \"one bit differs\"}'); raise SystemExit(1)"),
        step("fine", "print('gpu-proof: {\"figures\": {\"a\": 1}}'); print('gpu-proof: {\"figures\": {\"b\": 2}}')"),
    )  # fmt: skip
    assert status == 1
    assert {name: line["status"] for name, line in lines.items()} == {
        **dict.fromkeys(lines, "failed"),
        "hangs": "timeout",
        "fine": "ok",
    }
    errors = {name: line["error"] for name, line in lines.items()}
    assert errors["raises"] == "exit status 1: ValueError: planted"
    assert "Traceback" in lines["raises"]["tail"]
    assert errors["hangs"] == "stopped at its limit of 2 s"
    assert lines["hangs"]["figures"] == {"before": 1}
    assert not is_running(int(child.read_text()))
    assert errors["is killed by no name"] == f"ended by signal {signal.SIGRTMIN + 2}"
    assert errors["is killed"] == "ended by SIGSEGV"
    assert errors["writes garbage"].startswith("ended without saying that it is done")
    assert errors["writes no JSON"] == "wrote what is no JSON object of figures: [1"
    assert errors["writes no object"] == "wrote what is no JSON object of figures: [1]"
    assert "characters of figures were left out" in errors["writes too much"]
    assert "/nowhere/program" in errors["is no program"]
    assert errors["says so"] == "one bit differs"
    assert (lines["fine"]["error"], lines["fine"]["figures"]) == ("", {"a": 1, "b": 2})
    assert "Traceback" in (tmp_path / "out" / LOG).read_text()


def test_lines_hold_no_path_of_this_tree(tmp_path: Path) -> None:
    _, lines = prove(tmp_path, step("a", f"raise SystemExit({str(ROOT / 'setup.py')!r})"))
    assert lines["a"]["error"] == "exit status 1: ./setup.py"
    assert str(ROOT) not in (tmp_path / LINES).read_text() + (tmp_path / LOG).read_text()


def test_of_much_output_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_proof, "MOST_READ", 1000)
    found = 'print(\'gpu-proof: {"figures": {"%s": 1}}\')'
    _, lines = prove(tmp_path, step("a", f"{found % 'lost'}; print('x' * 1000); {found % 'kept'}"))
    assert (lines["a"]["status"], lines["a"]["figures"]) == ("ok", {"kept": 1})


def test_a_command_of_a_step_has_a_limit_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    done = gpu_steps.shell(*python("import time; print('begun', flush=True); time.sleep(60)"), seconds=2)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == "begun\nit took more than 2 s\n"
    assert capfd.readouterr().out == "begun\n"
    done = gpu_steps.shell(*python("import os; print(os.environ['NAME']); raise SystemExit(3)"), NAME="x", seconds=60)
    assert (done.returncode, done.stdout) == (3, "x\n")
    assert gpu_steps.shell("/nowhere/program").returncode == 127


def test_a_step_knows_when_it_will_be_stopped(tmp_path: Path) -> None:
    tells = "from bench import gpu_steps; gpu_steps.found(left=gpu_steps.seconds_left())"
    _, lines = prove(tmp_path, step("a", tells, limit=100), budget=200)
    assert 50 < lines["a"]["figures"]["left"] < 95


def test_all_is_well_only_where_every_step_is(tmp_path: Path) -> None:
    assert prove(tmp_path / "a", step("a"), step("b"))[0] == 0
    assert prove(tmp_path / "b", step("a"), step("b", "raise SystemExit(3)"))[0] == 1


def test_a_line_is_there_before_the_next_step_begins(tmp_path: Path) -> None:
    counts = (
        f'n = len(open({str(tmp_path / LINES)!r}).readlines())\nprint(\'gpu-proof: {{"figures": {{"n": %d}}}}\' % n)'
    )
    _, lines = prove(tmp_path, step("first"), step("second", counts), step("third", counts))
    assert [lines[name]["figures"]["n"] for name in ("second", "third")] == [1, 2]


def test_what_is_not_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_proof, "LEAST", 0.5)
    _, lines = prove(
        tmp_path,
        step("a", "print('gpu-proof: {\"failed\": \"no GPU\"}'); raise SystemExit(1)"),
        step("b", needs=("a",)),
        step("c", needs=("b",)),
        step("sleeps", "import time; time.sleep(60)"),
        step("late"),
        budget=2,
    )  # fmt: skip
    assert [lines[name]["status"] for name in ("b", "c", "late")] == ["skipped"] * 3
    assert lines["sleeps"]["status"] == "timeout"
    assert lines["b"]["error"] == lines["c"]["error"] == "a failed: no GPU"
    assert lines["late"]["error"] == "the budget of 2 s is used up"


def test_only_steps_of_a_kind_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    there = tmp_path / "there"
    waits = (
        f"import os, time\nos.makedirs({str(there)!r}, exist_ok=True); open(os.path.join({str(there)!r}, NAME), 'w')\n"
        f"while len(os.listdir({str(there)!r})) < 2: time.sleep(0.01)"
    )
    alone = f"import os; assert len(os.listdir({str(there)!r})) == 2"
    a, b = (step(f"a:{i}", f"NAME = '{i}'\n{waits}", limit=20, together=2) for i in range(2))
    status, _ = prove(tmp_path / "out", a, b, step("b", alone, together=2))
    assert status == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_writes_its_line_and_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    pid = tmp_path / "pid"
    program = f"""
import sys
from bench.gpu_proof import Output, Path, Proof, Step
wait = (sys.executable, "-c", "import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
steps = [Step("a", 60, (), command=wait), Step("b", 60, ())]
sys.exit(Proof(steps, Output(Path({str(tmp_path / "out")!r})), 60, False).run())
"""
    run = subprocess.Popen(python(program), cwd=ROOT)
    while not (pid.exists() and pid.read_text()):
        assert run.poll() is None
        time.sleep(0.02)
    run.send_signal(number)
    assert run.wait(30) == 128 + number
    lines = lines_of(tmp_path / "out")
    assert {name: line["status"] for name, line in lines.items()} == {"a": "interrupted"}
    assert lines["a"]["error"] == f"by {number.name}"
    assert not is_running(int(pid.read_text()))


def test_out_stays_within_its_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(gpu_proof.MOST_FILES - 2):
        (tmp_path / str(i)).touch()
    output = Output(tmp_path)
    output.log("a", "x" * (gpu_proof.MOST_OF_A_LOG + 7))
    assert "(7 characters left out)" in (tmp_path / LOG).read_text()
    os.truncate(tmp_path / LOG, gpu_proof.MOST_BYTES - 10)
    output.log("b", "y")
    assert (tmp_path / LOG).stat().st_size == gpu_proof.MOST_BYTES - 10 + len("=== b\ny\n")
    output.log("c", "z")
    assert (tmp_path / LOG).stat().st_size <= gpu_proof.MOST_BYTES
    assert f"{LOG} is full" in capsys.readouterr().err
    (tmp_path / "one more").touch()
    with pytest.raises(SystemExit, match=r"gpu-proof: OUT: expected a folder, or a place for one, got .*one more"):
        Output(tmp_path / "one more")
    with pytest.raises(SystemExit, match=r"gpu-proof: OUT: expected a folder of at most 6 other files, got 7"):
        Output(tmp_path)


def test_steps_can_be_chosen() -> None:
    always = ["environment", "build", "build_info"]
    assert [step.name for step in gpu_proof.chosen(["bits:shared", "preset"])] == [*always, "bits:shared", "preset"]
    assert len(gpu_proof.chosen(["ncu"])) == len(always) + len(gpu_proof.KERNELS)
    assert gpu_proof.chosen([]) == list(gpu_proof.STEPS)
    with pytest.raises(SystemExit, match=r"gpu-proof: STEPS: expected some of .*, got nothing"):
        gpu_proof.chosen(["nothing"])


def test_names_are_those_of_the_project() -> None:
    assert tuple(dict.fromkeys(backends.BIPARTITE_ROUTES + backends.GRAPH_ROUTES)) == gpu_proof.ROUTES
    assert tuple(gpu_steps.KERNELS) == gpu_proof.KERNELS
    problems = list(cuda_report.problems())
    for some in (problems, gpu_steps.standard_problems(emulate=True)):
        assert {gpu_steps.kind_of(problem) for problem in some} == set(gpu_proof.KINDS)
    assert set(gpu_replay.BITS) <= {step.name for step in gpu_proof.STEPS}
    limits = [step.limit for step in gpu_proof.STEPS]
    assert max(limits) < gpu_proof.BUDGET


# Without a GPU, and emulated ---------------------------------------------------------------------------------------


def make(*arguments: str) -> "subprocess.CompletedProcess[str]":
    # This make is no part of the make that may run the tests.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "OUT", "REPLAY"))}
    command = ["make", "gpu-proof", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_line_says_so(tmp_path: Path) -> None:
    done = make(f"OUT={tmp_path}")
    assert done.returncode != 0
    assert "NOT proven" in done.stdout
    lines = lines_of(tmp_path)
    assert list(lines) == [step.name for step in gpu_proof.STEPS]
    assert all("no GPU" in line["error"] for line in lines.values())
    assert {line["status"] for line in lines.values()} == {"failed", "skipped"}
    assert {path.name for path in tmp_path.iterdir()} <= {LINES, LOG}
    done = make(f"REPLAY={tmp_path}")
    assert done.returncode != 0
    assert "nothing was measured: no GPU" in done.stderr


def test_make_needs_a_folder_and_calls_nothing_but_python() -> None:
    done = make()
    assert done.returncode != 0
    assert "expected OUT=folder" in done.stderr
    done = make("-n", "OUT=somewhere", "STEPS=ncu tests", "BUDGET=200")
    assert done.stdout == f"{sys.executable} -m bench.gpu_proof --out 'somewhere' --budget 200  --steps ncu tests\n"


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rehearsal")
    make(f"OUT={folder}", "REHEARSE=1")
    return folder


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the files that a replay needs."""
    (tmp_path / "bench" / "history").mkdir(parents=True)
    shutil.copy(ROOT / "bench" / "history" / "cuda-bounds.json", tmp_path / "bench" / "history")
    texts.write(tmp_path / "README.md", f"before\n<!-- begin: {gpu_replay.COMMAND} -->\n<!-- end -->\nafter\n")
    return tmp_path


def test_a_rehearsal(rehearsal: Path) -> None:
    lines = lines_of(rehearsal)
    assert set(lines) == {step.name for step in gpu_proof.STEPS}
    for step in gpu_proof.STEPS:
        line = lines[step.name]
        assert line["emulated"]
        if step.is_emulated:
            assert line["status"] == "ok", line
        else:
            assert (line["status"], line["error"]) == ("skipped", "needs a GPU: nothing emulates it")
    for name in gpu_replay.BITS:
        for found in lines[name]["figures"].values():
            assert found["calls"] > 0
            assert found["different"] == 0
            assert found["bits"] > 0 or found["largest_error"] < 1e-3
    for name in ("bits:registers", "bits:shared", "headline:ais"):
        assert all(found["bits"] > 100 for found in lines[name]["figures"].values())
    for routes, op in ((backends.BIPARTITE_ROUTES, "bipartite_gibbs"), (backends.GRAPH_ROUTES, "graph_gibbs")):
        for route in gpu_proof.ROUTES:
            assert (op in lines[f"bits:{route}"]["figures"]) == (route in routes)


def test_a_rehearsal_is_written_down_in_a_copy_only(rehearsal: Path, copy: Path) -> None:
    before = (ROOT / "README.md").read_text()
    done = make(f"REPLAY={rehearsal}")
    assert done.returncode != 0
    assert "what was emulated goes into no README or history but a copy's" in done.stderr
    assert (ROOT / "README.md").read_text() == before
    assert not (ROOT / "bench" / "history" / gpu_replay.EMULATED).exists()

    assert gpu_proof.main(["--replay", str(rehearsal), "--root", str(copy)]) == 0
    text = (copy / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert gpu_replay.UNPROVEN in text
    assert "A rehearsal on the host emulator" in text
    for problem in gpu_steps.standard_problems(emulate=True):
        assert re.search(rf"\| {re.escape(problem.name)} +\| [\d.e+]+ [mu]?s +\|.*eager", text)
    assert (copy / "bench" / "history" / "emulated" / texts.PROOF).exists()


# Comparisons -------------------------------------------------------------------------------------------------------


@pytest.fixture
def emulated() -> Iterator[gpu_steps.Backend]:
    library = backends.emulated_library()
    call, threads = ops._call, torch.get_num_threads()
    call_emulated = backends.call_emulated
    yield gpu_steps.Backend("cpu", call_emulated, call_emulated, library.set_route, lambda: library.last_route)
    library.set_route("auto")
    ops._call = call
    torch.set_num_threads(threads)


def test_a_route_that_does_not_fit_is_not_proven(emulated: gpu_steps.Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compare.SIZES", ((33, 100),))
    gpu_steps.bits("cluster", emulated)
    monkeypatch.setenv("GIBBS_EMULATED_DEVICE", "no clusters")
    with pytest.raises(
        gpu_steps.Failed, match=r"no bipartite call took the route cluster, which does not fit .*'registers'"
    ):
        gpu_steps.bits("cluster", emulated)


@pytest.mark.parametrize("kind", ["bipartite", "graph"])
def test_a_route_of_both_kinds_is_proven_for_both(
    emulated: gpu_steps.Backend, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compare.SIZES", ((33, 100),))
    gpu_steps.bits("shared", emulated)

    def call(op: Any, *arguments: Any) -> Any:
        if op._schema.name.startswith(f"gibbs_ext::{kind}"):
            emulated.set_route("global")
        return backends.call_emulated(op, *arguments)

    with pytest.raises(gpu_steps.Failed, match=rf"no {kind} call took the route shared, .*'global'"):
        gpu_steps.bits("shared", emulated._replace(call_from_cpu=call))


def with_one_changed(op_name: str, place: int, change: Callable[[Tensor], object]) -> Callable[..., Any]:
    """The emulated ops, one result of which is changed at every call."""

    def call(op: Any, *arguments: Any) -> Any:
        results = backends.call_emulated(op, *arguments)
        if op._schema.name == f"gibbs_ext::{op_name}":
            change(gpu_steps.as_results(results)[place])
        return results

    return call


def flip_one(bits: Tensor) -> None:
    bits.view(-1)[-1] = 1 - bits.view(-1)[-1]


def scale_one(values: Tensor) -> None:
    """Changes a result by enough to be seen in single precision."""
    values.view(-1)[values.abs().argmax()] *= 1.5


@pytest.mark.parametrize(
    ("route", "op", "place", "change", "message"),
    [
        ("shared", "graph_gibbs", 0, flip_one, r"graph_gibbs: 1 of \d+ bits of result 0 differ"),
        ("global", "graph_ais", 0, flip_one, r"graph_ais: 1 of \d+ bits of result 0 differ"),
        ("shared", "bipartite_gibbs", 0, flip_one, r"bipartite_gibbs: 1 of \d+ bits of result 0 differ"),
        ("registers", "bipartite_gibbs", 1, flip_one, r"bipartite_gibbs: 1 of \d+ bits of result 1 differ"),
        ("all_global", "bipartite_ais", 2, scale_one, "bipartite_ais: result 2 has a relative error of"),
        ("auto", "graph_gibbs_relaxed", 2, flip_one, "graph_gibbs_relaxed: 1 of .* bits of result 2 differ"),
        ("auto", "graph_gibbs_relaxed_backward", 1, scale_one, "backward: result 1 has a relative error of"),
        ("auto", "graph_fields", 0, lambda x: x.fill_(torch.nan), "graph_fields: result 0 has a relative error of nan"),
    ],
)
def test_one_bit_is_found(
    emulated: gpu_steps.Backend, route: str, op: str, place: int, change: Callable[[Tensor], object], message: str
) -> None:
    there = emulated._replace(call_from_cpu=with_one_changed(op, place, change))
    with pytest.raises(gpu_steps.Failed, match=message):
        gpu_steps.bits(route, there)


def some_problems(kind: str) -> list[Any]:
    return [problem for problem in gpu_steps.standard_problems(True) if gpu_steps.kind_of(problem) == kind]


@pytest.mark.parametrize(
    ("kind", "op", "place", "change", "message"),
    [
        ("bipartite", "bipartite_gibbs", 0, flip_one, "auto: 1 of .* bits of result 0 differ"),
        ("ais", "bipartite_ais", 1, flip_one, "auto: 1 of .* bits of result 1 differ"),
        ("graph", "graph_gibbs", 0, flip_one, "global: 1 of .* bits of result 0 differ"),
        ("relaxed", "bipartite_gibbs_relaxed", 4, scale_one, "result 4 has a relative error"),
        ("relaxed", "bipartite_gibbs_relaxed_backward", 3, scale_one, "result 3 has a relative error"),
        ("relaxed", "graph_gibbs_relaxed_backward", 2, scale_one, "result 2 has a relative error"),
    ],
)
def test_one_bit_of_one_chain_is_found(
    emulated: gpu_steps.Backend, kind: str, op: str, place: int, change: Callable[[Tensor], object], message: str
) -> None:
    there = emulated._replace(call=with_one_changed(op, place, change))
    with pytest.raises(gpu_steps.Failed, match=message):
        gpu_steps.headline(kind, there, some_problems(kind))


def test_chains_are_compared_by_their_numbers(emulated: gpu_steps.Backend) -> None:
    def misnumbered(op: Any, *arguments: Any) -> Any:
        names = [argument.name for argument in op._schema.arguments]
        changed = [x + 1 if name == "chain_offset" else x for name, x in zip(names, arguments, strict=True)]
        return backends.call_emulated(op, *changed)

    with pytest.raises(gpu_steps.Failed, match="bits of result 0 differ"):
        gpu_steps.headline("graph", emulated._replace(call=misnumbered), some_problems("graph")[:1])


def test_nothing_compared_is_nothing_proven(emulated: gpu_steps.Backend) -> None:
    with pytest.raises(gpu_steps.Failed, match="nothing was compared"):
        gpu_steps.headline("graph", emulated, [])
    with pytest.raises(gpu_steps.Failed, match="nothing was compared"):
        gpu_steps.bits("no route", emulated)
    with pytest.raises(ValueError, match=r"not JSON compliant|Out of range"):
        gpu_steps.found(ratio=float("nan"))


# Speed, tools ------------------------------------------------------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The figures that a step wrote."""
    figures: dict[str, Any] = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith(gpu_proof.SAYS):
            figures |= json.loads(line.removeprefix(gpu_proof.SAYS)).get("figures", {})
    return figures


def test_a_time_is_the_median_of_events(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0  # milliseconds

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    calls = 0

    def call() -> None:
        nonlocal now, calls
        now, calls = now + (1.0 if calls % 2 else 3.0), calls + 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_steps.time, "perf_counter", lambda: now / 1e3)
    # There are 3 calls beforehand; the last one takes 3 ms.
    assert gpu_steps.timed(call, "cuda", most=0.0213) == {"us": 1000.0, "least_us": 1000.0, "rounds": 7}
    assert calls == 3 + 7
    assert gpu_steps.timed(call, "cuda", most=1e-9)["rounds"] == 5
    assert gpu_steps.timed(call, "cuda", most=1e9)["rounds"] == gpu_steps.ROUNDS


def test_a_peer_that_fails_fails_alone(
    emulated: gpu_steps.Backend, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: None)
    (problem,) = some_problems("ais")

    def peer(num_sweeps: int, way: str, dtype: torch.dtype) -> Callable[[], object]:
        if dtype == torch.bfloat16:
            raise RuntimeError("not in bfloat16")
        return lambda: None

    gpu_steps.peers("eager", emulated, [gpu_steps_problem := problem_with(problem, peer=peer)])
    entries = said(capsys)[gpu_steps_problem.name]
    assert [(entry["precision"], "us" in entry, entry.get("error")) for entry in entries] == [
        ("float32", True, None),
        ("bf16", False, "RuntimeError: not in bfloat16"),
        ("TF32", True, None),
    ]
    with pytest.raises(gpu_steps.Failed, match="no peer ran"):
        gpu_steps.peers("eager", emulated, [problem_with(problem, peer=lambda *_: 1 / 0)])
    with pytest.raises(gpu_steps.Failed, match=r"AIS.*, eager: ZeroDivisionError"):
        gpu_steps.ours(emulated, [problem_with(problem, ours=lambda _: 1 / 0)])


def problem_with(problem: Any, **changes: Any) -> Any:
    return type(problem)(**{**vars(problem), **changes})


def test_a_way_of_training_that_fails_fails_alone(
    emulated: gpu_steps.Backend, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trainer:
        def __init__(self, config: Any, data: Any, device: torch.device, *, capture: bool) -> None:
            assert (device.type, capture, len(data.train)) == ("cpu", False, 60)
            if config.coupling == "shared":
                raise RuntimeError("planted")

        def advance(self, num_steps: int) -> None:
            time.sleep(0.01 * num_steps)

    monkeypatch.setattr("undirected_vae.train.Trainer", Trainer, raising=False)
    with pytest.raises(gpu_steps.Failed, match="shared, eager: RuntimeError: planted"):
        gpu_steps.training(emulated)
    figures = said(capsys)
    assert figures["shared, eager"] == {"error": "RuntimeError: planted"}
    assert 10 <= figures["per_sample, eager"]["ms"] < 1000


@pytest.mark.parametrize("steps_done", [20, 10])
def test_the_preset_is_run_by_the_command_line(
    steps_done: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from undirected_vae.data import load

    def shell(*command: str, **_: Any) -> "subprocess.CompletedProcess[str]":
        options = dict(pairwise(command))
        data = load(options["--data"])
        assert (len(data.train), len(data.test), data.shape) == (8000, 1000, (28, 28))
        assert 0.02 < float(data.mean().mean()) < 0.5
        lines = [{"step": step, "steps_per_second": 100.0} for step in (1, steps_done)]
        text = "\n".join(map(json.dumps, lines))
        texts.write(Path(options["--run"], "metrics.jsonl"), f'{text}\n{{"step": 30, "steps_')
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setattr(gpu_steps, "shell", shell)
    if steps_done < 20:
        with pytest.raises(gpu_steps.Failed, match=r"expected 20 steps, metrics\.jsonl has 10"):
            gpu_steps.preset(20)
    else:
        gpu_steps.preset(20)
    assert said(capsys)["metrics"][-1] == {"step": steps_done, "steps_per_second": 100.0}


@pytest.mark.parametrize("which", gpu_proof.KERNELS)
def test_the_kernels_for_ncu_are_those_that_their_problems_launch(which: str) -> None:
    problem, route = gpu_steps.problem_of(which)
    library = backends.emulated_library()
    library.set_route(route)
    launched, _ = cuda_report.launches(problem.ours(problem.sweeps), "H100", 0)
    library.set_route("auto")
    function = gpu_steps.KERNELS[which][0]
    assert any(f"{len(function)}{function}" in launch["kernel"] for launch in launched)
    if which in gpu_proof.ROUTES:  # these are one kernel
        assert library.last_route == which


NCU = '''==PROF== Connected to process 12
==PROF== Profiling "graph_kernel" - 0: 0%....50%....100% - 9 passes
"ID","Process ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread","lts__t_sectors.sum","other"
"","","","usecond","register/thread","sector",""
"0","12","void gibbs::graph_kernel<1>(gibbs::P)","7.25","96","1,234","x"
==PROF== Disconnected
'''  # fmt: skip


def test_what_the_tools_write_is_read(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_steps.ncu_metrics(NCU) == {
        "gpu__time_duration.sum": "7.25 usecond",
        "launch__registers_per_thread": "96 register/thread",
        "lts__t_sectors.sum": "1,234 sector",
    }
    assert gpu_steps.ncu_metrics(NCU.splitlines()[0]) == {}

    calls: list[tuple[str, ...]] = []

    def answers(*texts: str, status: int = 0) -> None:
        left = list(texts)

        def shell(*command: str, **_: Any) -> "subprocess.CompletedProcess[str]":
            calls.append(command)
            return subprocess.CompletedProcess(command, status, left.pop(0))

        monkeypatch.setattr(gpu_steps, "shell", shell)

    answers("==ERROR== Failed to find metric lts__t_sectors.sum", NCU)
    gpu_steps.ncu("graph")
    assert said(capsys)["metrics"]["gpu__time_duration.sum"] == "7.25 usecond"
    assert ["--metrics" in command for command in calls] == [True, False]
    answers("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission")
    with pytest.raises(gpu_steps.Failed, match="ERR_NVGPUCTRPERM"):
        gpu_steps.ncu("graph")
    answers("there is no ncu on the PATH", status=127)
    with pytest.raises(gpu_steps.Failed, match="exit status 127, no metrics of graph_kernel: there is no ncu"):
        gpu_steps.ncu("graph")

    fine = "the small problems agree\n========= ERROR SUMMARY: 0 errors\n"
    answers(fine)
    gpu_steps.sanitizer("memcheck", "shared")
    assert said(capsys)["summaries"] == ["ERROR SUMMARY: 0 errors"]
    assert calls[-1][-3:] == ("tests/ops/test_gpu.py", "shared", "1")
    answers(fine.replace("0 errors", "2 errors"), status=9)
    with pytest.raises(gpu_steps.Failed, match="exit status 9: ERROR SUMMARY: 2 errors"):
        gpu_steps.sanitizer("memcheck", "shared")
    answers(fine.splitlines()[1])
    with pytest.raises(gpu_steps.Failed, match="did not run to their end"):
        gpu_steps.sanitizer("memcheck", "shared")


def test_tests_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    text = """\
tests/ops/test_gpu.py::test_a PASSED                                         [ 25%]
tests/ops/test_gpu.py::test_b[x-1] FAILED                                    [ 50%]
[gw1] [ 75%] PASSED tests/ops/test_gpu.py::test_c
[gw0] [100%] SKIPPED tests/ops/test_gpu.py::test_d
FAILED tests/ops/test_gpu.py::test_b[x-1] - AssertionError
"""
    counts = gpu_steps.tally(io.StringIO(text))
    assert dict(counts) == {"passed": 2, "failed": 1, "skipped": 1}
    assert said(capsys)["failed_tests"] == ["tests/ops/test_gpu.py::test_b[x-1]"]


def test_a_library_is_taken_only_if_it_is_new_loads_and_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = {"cuda": "loaded", "cuda_architectures": ["80", "90"]}
    for name in ("setup.py", "csrc/cuda/a.cu", f"gibbs_ext/_C{SUFFIX}", "gibbs_ext/_cuda.so"):
        texts.write(tmp_path / name, "")
        os.utime(tmp_path / name, (1000, 1000))
    monkeypatch.setattr(gpu_steps, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_steps, "architecture", lambda: "90")
    monkeypatch.setattr(gpu_steps, "library_info", lambda: info)
    assert gpu_steps.is_current()
    info["cuda_architectures"] = ["80"]
    assert not gpu_steps.is_current()
    info |= {"cuda": "an undefined symbol", "cuda_architectures": ["90"]}
    assert not gpu_steps.is_current()
    info["cuda"] = "loaded"
    os.utime(tmp_path / "csrc/cuda/a.cu", (1001, 1001))
    assert not gpu_steps.is_current()
    os.utime(tmp_path / f"gibbs_ext/_C{SUFFIX}", (1002, 1002))
    assert not gpu_steps.is_current()
    os.utime(tmp_path / "gibbs_ext/_cuda.so", (1002, 1002))
    assert gpu_steps.is_current()
    (tmp_path / "gibbs_ext/_cuda.so").unlink()
    assert not gpu_steps.is_current()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_ceilings_compile_and_say_what_fails(tmp_path: Path) -> None:
    program = gpu_steps.compile_ceilings("90", tmp_path)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("ceilings: cudaGetDeviceProperties: ")


# Replay ------------------------------------------------------------------------------------------------------------

PROBLEM = "128 models, 100+100, 100 sweeps"


def write_lines(folder: Path, *changes: dict[str, Any], left_out: Sequence[str] = (), gpu: str = "NVIDIA H200") -> Path:
    """A good run on an unknown GPU; then the lines of a second GPU."""
    figures: dict[str, Any] = {
        "environment": {"gpu": gpu, "torch": "2.11.0", "cuda": "13.0"},
        "ours": {
            "before": {"clocks.sm": "1980 MHz"},
            PROBLEM: [{"mode": "eager", "us": 60.0}, {"mode": "captured", "us": 50.0}],
        },
        "peers:eager": {PROBLEM: [{"way": "rand", "precision": "float32", "mode": "eager", "us": 4000.0}]},
        "peers:captured": {
            PROBLEM: [
                {"way": "rand", "precision": "float32", "mode": "captured", "us": 900.0},
                {"way": "bernoulli", "precision": "bf16", "mode": "captured", "us": 800.0},
                {"way": "compile", "precision": "TF32", "mode": "captured", "error": "planted"},
            ]
        },
        "training": {"shared, captured": {"ms": 1.25, "steps_per_second": 800.0}},
        **{name: {"op": {"calls": 1, "bits": 1000, "different": 0, "largest_error": 2e-7}} for name in gpu_replay.BITS},
        "tests:own": {"passed": 10, "failed": 1},
        "tests:ops": {"passed": 5},
    }
    about = {"emulated": False, "source": "abc", "date": "2030-01-02T03:04:05+00:00", "status": "ok", "seconds": 1.0}
    about |= {"error": "", "tail": ""}
    lines = [
        about | {"step": step.name, "figures": figures.get(step.name, {})}
        for step in gpu_proof.STEPS
        if step.name not in left_out
    ]
    texts.write(folder / LINES, "".join(json.dumps(line) + "\n" for line in [*lines, *(about | x for x in changes)]))
    return folder


STEP_NAMES = [step.name for step in gpu_proof.STEPS]


def replay(folder: Path, root: Path, *more: Path) -> str:
    assert gpu_proof.main(["--replay", *map(str, [folder, *more]), "--root", str(root)]) == 0
    return (root / "README.md").read_text()


def test_what_was_measured_is_written_down(copy: Path, tmp_path: Path) -> None:
    text = replay(write_lines(tmp_path / "out"), copy)
    assert "No GPU" not in text
    assert "**NVIDIA H200**, PyTorch 2.11.0, 2030-01-02: the routes registers, shared, cluster, " in text
    assert "global, all_global give the CPU's bits (10,000 compared)" in text
    assert "differs by at most 2e-07 of its norm" in text
    (row,) = (re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line.startswith(f"| {PROBLEM}"))
    bounds = json.loads((copy / "bench" / "history" / "cuda-bounds.json").read_text())["problems"]
    bound = next(case for case in bounds if case["problem"] == PROBLEM)["devices"]["H100"]["seconds"]
    assert row == [
        PROBLEM, "60 us", "50 us", "800 us", "bernoulli, bf16, captured", "16.0x",
        texts.duration(bound), f"{50e-6 / bound:.1f}x",
    ]  # fmt: skip
    assert "shared, captured 1.25 ms" in text
    assert "memcheck: 6 of 6 routes" in text
    assert "15 passed, 1 failed" in text
    kept = json.loads((copy / "bench" / "history" / "nvidia-h200" / texts.PROOF).read_text())
    assert kept["steps"]["peers:captured"]["figures"][PROBLEM][2]["error"] == "planted"
    # A second GPU has a part of its own, which is the same if it is written from the history alone.
    other = replay(write_lines(tmp_path / "other", gpu="NVIDIA B200"), copy)
    assert "**NVIDIA B200**" in other
    assert "**NVIDIA H200**" in other
    texts.write_part(copy / "README.md", gpu_replay.COMMAND, "")
    assert gpu_proof.main(["--readme", "--root", str(copy)]) == 0
    assert (copy / "README.md").read_text() == other


@pytest.mark.parametrize("is_missing", [True, False])
def test_without_all_bits_nothing_is_proven(copy: Path, tmp_path: Path, is_missing: bool) -> None:
    fault = {"step": "bits:cluster", "status": "failed", "error": "3 of 99 bits differ", "figures": {}}
    if is_missing:
        folder = write_lines(tmp_path / "out", left_out=["bits:cluster"])
    else:
        folder = write_lines(tmp_path / "out", fault)
    text = replay(folder, copy)
    assert "**No GPU has proven these kernels yet.**" in text
    assert "**not proven**" in text
    assert f"`bits:cluster` ({'it did not run' if is_missing else '3 of 99 bits differ'})" in text
    assert f"| {PROBLEM} " in text


def test_the_last_line_of_a_step_counts(copy: Path, tmp_path: Path) -> None:
    fault = {"status": "failed", "error": "planted", "figures": {}}
    faults = [fault | {"step": name} for name in ("bits:shared", "ncu:graph")]
    skipped = {"step": "bits:cluster", "status": "skipped", "error": "the budget", "figures": {}}
    folder = write_lines(tmp_path / "out", *faults, fault | {"step": "ncu:cluster"}, skipped)
    again = {"op": {"calls": 1, "bits": 7, "different": 0, "largest_error": 0.0}}
    second = write_lines(tmp_path / "second", {"step": "bits:shared", "figures": again}, left_out=STEP_NAMES[1:])
    with (second / LINES).open("a") as file:
        file.write('{"step": "bits:shared", "stat')  # the machine went away
    text = replay(folder, copy, second)
    assert "global give the CPU's bits (9,007 compared)" in text
    assert "Not ok: `ncu:cluster`, `ncu:graph` (planted)." in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "ours", "source": "def", "figures": {}}, "expected lines of one source, got abc, def"),
        ({"step": "ours", "emulated": True, "figures": {}}, "expected lines of one emulated, got False, True"),
        (
            {"step": "environment", "figures": {"gpu": "NVIDIA B200", "torch": "2.11.0", "cuda": "13.0"}},
            "expected lines of one gpu, got NVIDIA B200, NVIDIA H200",
        ),
        ({"step": "environment", "status": "failed", "error": "no GPU", "figures": {}}, "nothing was measured: no GPU"),
    ],
)
def test_what_cannot_be_written_down_changes_nothing(
    copy: Path, tmp_path: Path, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (copy / "README.md").read_text()
    assert gpu_proof.main(["--replay", str(write_lines(tmp_path / "out", change)), "--root", str(copy)]) == 1
    assert message in capsys.readouterr().err
    assert (copy / "README.md").read_text() == before
    assert [path.name for path in (copy / "bench" / "history").iterdir()] == ["cuda-bounds.json"]


def test_a_damaged_folder_is_named(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    assert gpu_proof.main(["--replay", str(folder), "--root", str(copy)]) == 1
    assert f"{folder}: expected a folder with {LINES}" in capsys.readouterr().err
    write_lines(folder)
    (folder / LINES).write_text("garbage\n" + (folder / LINES).read_text())
    assert gpu_proof.main(["--replay", str(folder), "--root", str(copy)]) == 1
    assert "line 1: expected a step's line of JSON, got 'garbage'" in capsys.readouterr().err
    texts.write(copy / "README.md", "no markers")
    write_lines(folder)
    assert gpu_proof.main(["--replay", str(folder), "--root", str(copy)]) == 1
    assert not (copy / "bench" / "history" / "nvidia-h200").exists()


def test_readme_says_what_the_history_does() -> None:
    inside = texts.parts(ROOT / "README.md", gpu_replay.COMMAND)[1]
    assert inside.strip() == gpu_replay.readme_text().strip()
    assert gpu_replay.EMULATED not in {path.name for path in (ROOT / "bench" / "history").iterdir()}


def test_the_table_of_speed_leaves_proofs_out(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replay(write_lines(tmp_path / "out"), copy)
    monkeypatch.setattr(tables, "HISTORY", copy / "bench" / "history")
    assert tables.groups() == []


# Benchmarks without dimod and dwave --------------------------------------------------------------------------------


def test_benchmarks_and_the_tests_of_a_gpu_import_without_packages_that_only_some_use() -> None:
    names = [f"bench.{path.stem}" for path in (ROOT / "bench").glob("*.py") if path.stem != "__main__"]
    assert "bench.graph_gibbs" in names
    absent = ["dimod", "dwave", "dwave.graphs", "dwave.samplers", "networkx", "scipy", "matplotlib", "mlxtend", "yaml"]
    absent += ["jax", "pytest_benchmark", "rbms", "sklearn", "threadpoolctl", "thrml"]
    program = f"import sys; sys.modules |= dict.fromkeys({absent})\n"
    program += "".join(f"import {name}\n" for name in [*names, "bench.__main__", "test_gpu"])
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), str(ROOT / "tests"), str(ROOT / "tests" / "ops")])
    environment = os.environ | {"PYTHONPATH": paths}
    subprocess.run(python(program), cwd=ROOT, env=environment, check=True)
    # Only steps that train, and their tests, need the packages of training.
    program = (
        f"import sys; sys.modules |= dict.fromkeys({[*absent, 'tqdm', 'tensorboard', 'torch.utils.tensorboard']})\n"
    )
    program += "import bench.gpu_steps, bench.cuda_report, test_gpu; assert not test_gpu.TRAININGS"
    subprocess.run(python(program), cwd=ROOT, env=environment, check=True)
