# SPDX-License-Identifier: Apache-2.0
"""Tests and times the kernels on a GPU in ten minutes: `make gpu-proof OUT=folder`, then REPLAY=folder.

Every step is a process of its own under a time limit, and its line of JSON in OUT/proof.jsonl is on the disk before the
next step begins. A step that fails, hangs or crashes stops no other. The most valuable steps come first, so that they
are done if the time is cut off. This program needs only Python; bench/gpu_steps.py has the steps, and
bench/gpu_replay.py makes the history and README from their lines.
"""

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from .texts import ROOT

LINES, LOG = "proof.jsonl", "proof.log"
MOST_FILES, MOST_BYTES = 8, 16_000_000  # the most files in OUT, and the most bytes of each
MOST_OF_A_LINE, MOST_OF_A_LOG = 100_000, 300_000  # the most characters of a step
MOST_READ = 50_000_000  # bytes at the end of a step's output that are read
DEADLINE = "GPU_PROOF_DEADLINE"  # variable of a step's environment: the time of its end in seconds since the epoch
SAYS = "gpu-proof: "  # the beginning of the lines in which a step reports its results
ROUTES = ("registers", "shared", "cluster", "global", "all_global")  # of bipartite models; graphs have two of them
KINDS = ("bipartite", "relaxed", "ais", "graph")  # kinds of standard problems
KERNELS = ("registers", "shared", "cluster", "graph", "relaxed_backward")  # kernels that ncu looks at
BUDGET = 560.0
LEAST = 3.0  # no step begins if fewer seconds are left


@dataclass(frozen=True)
class Step:
    name: str  # kind, or kind:which
    limit: float  # seconds
    needs: tuple[str, ...] = ("build_info",)  # steps that must be ok before this one runs
    together: int = 1  # number of steps of this kind that may run at once
    is_emulated: bool = False  # whether it can run with emulated ops in place of the GPU
    command: tuple[str, ...] = ()  # bench.gpu_steps if empty

    @property
    def kind(self) -> str:
        return self.name.split(":")[0]


STEPS = (
    Step("environment", 60, needs=(), is_emulated=True),
    Step("build", 240, needs=("environment",), is_emulated=True),
    Step("build_info", 60, needs=("build",), is_emulated=True),
    *(Step(f"bits:{route}", 60, together=4, is_emulated=True) for route in (*ROUTES, "auto")),
    *(Step(f"headline:{kind}", 90, together=2, is_emulated=True) for kind in KINDS),
    Step("ours", 60, is_emulated=True),
    Step("peers:eager", 60, is_emulated=True),
    Step("peers:compiled", 90),
    Step("peers:captured", 60),
    Step("training", 60, is_emulated=True),
    Step("preset", 90, is_emulated=True),
    Step("ceilings", 60, needs=("environment",)),
    *(Step(f"memcheck:{route}", 90, together=9) for route in (*ROUTES, "auto")),
    *(Step(f"racecheck:{route}", 90, together=9) for route in (*ROUTES, "auto")),
    *(Step(f"ncu:{kernel}", 45) for kernel in KERNELS),
    Step("tests:own", 240),
    Step("tests:ops", 240),
)


class Output:
    """The folder OUT, with limits on the number and the size of its files."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"gpu-proof: OUT: expected a folder, or a place for one, got {folder}: {error}") from error
        others = [path.name for path in folder.iterdir() if path.name not in (LINES, LOG)]
        if len(others) > MOST_FILES - 2:
            raise SystemExit(
                f"gpu-proof: OUT: expected a folder of at most {MOST_FILES - 2} other files, "
                f"got {len(others)} in {folder}"
            )
        self.folder = folder

    def append(self, name: str, text: str) -> None:
        """Appends text, which is on the disk when this returns."""
        path = self.folder / name
        content = text.encode()
        if (path.stat().st_size if path.exists() else 0) + len(content) > MOST_BYTES:
            print(f"gpu-proof: {path} is full: {len(content)} bytes of it are lost", file=sys.stderr)
            return  # half a line would be no JSON
        with path.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def line(self, line: dict[str, Any]) -> None:
        text = json.dumps(line)
        if len(text) > MOST_OF_A_LINE:
            said = f"{len(text)} characters of figures were left out: more than {MOST_OF_A_LINE}"
            text = json.dumps(line | {"figures": {}, "status": "failed", "error": said, "tail": ""})
        self.append(LINES, text + "\n")

    def log(self, title: str, text: str) -> None:
        if len(text) > MOST_OF_A_LOG:
            text = f"({len(text) - MOST_OF_A_LOG} characters left out)\n{text[-MOST_OF_A_LOG:]}"
        self.append(LOG, f"=== {title}\n{text.rstrip()}\n")


def source() -> str:
    """A hash of the sources, which is kept with each line."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("csrc/**/*"), *ROOT.glob("gibbs_ext/**/*.py"), ROOT / "setup.py"]):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def signal_name(number: int) -> str:
    names = {int(one): one.name for one in signal.Signals}
    return names.get(number, f"signal {number}")


class Running:
    """The process of a step, with all processes that it starts."""

    def __init__(self, step: Step, limit: float, emulate: bool, output: BinaryIO) -> None:
        self.step, self.limit, self.output, self.began = step, limit, output, time.monotonic()
        paths = [ROOT, ROOT / "python", ROOT / "tests", ROOT / "tests" / "cuda", os.environ.get("PYTHONPATH", "")]
        environment = {
            "PYTHONPATH": os.pathsep.join(map(str, paths)).rstrip(os.pathsep),
            "PYTHONUNBUFFERED": "1",
            DEADLINE: str(time.time() + limit),
        }
        command = step.command or (sys.executable, "-m", "bench.gpu_steps", step.name, *["--emulate"] * emulate)
        # A session of its own keeps signals for this program away, and lets all of its processes be ended together.
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def end(self) -> str:
        """Ends the processes. Returns a remark if that fails."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            return "; its process could not be ended"
        return ""

    def outcome(self, status: str, why: str) -> tuple[dict[str, Any], str]:
        """The step's line and the rest of its output. ``status`` and ``why`` are given if it did not end by itself."""
        self.output.seek(max(0, self.output.seek(0, os.SEEK_END) - MOST_READ))
        text = (
            self.output.read().decode(errors="replace").replace(str(ROOT), ".")
        )  # the path differs from machine to machine
        said = [line.removeprefix(SAYS) for line in text.splitlines() if line.startswith(SAYS)]
        rest = "\n".join(line for line in text.splitlines() if line.strip() and not line.startswith(SAYS))
        figures: dict[str, Any] = {}
        is_done = False
        for line in said:
            try:
                found = json.loads(line)
                figures |= found.get("figures", {})
                is_done |= bool(found.get("done"))
                why = why or str(found.get("failed", ""))
            except (ValueError, TypeError, AttributeError):
                status, why = status or "failed", why or f"wrote what is no JSON object of figures: {line[:200]}"
        if not status:
            code = self.process.returncode
            if code < 0:
                status, why = "failed", f"ended by {signal_name(-code)}"
            elif code or not is_done:
                last = (rest.splitlines() or ["no output"])[-1]
                ended = f"exit status {code}" if code else "ended without saying that it is done"
                status, why = "failed", why or f"{ended}: {last[:500]}"
            else:
                status = "ok"
        tail = "" if status == "ok" else rest[-3000:]
        seconds = round(self.seconds, 2)
        return {"status": status, "seconds": seconds, "figures": figures, "error": why, "tail": tail}, rest


class Proof:
    """Runs steps and writes their lines."""

    def __init__(self, steps: Sequence[Step], output: Output, budget: float, emulate: bool) -> None:
        self.pending, self.output, self.emulate = list(steps), output, emulate
        self.end = time.monotonic() + budget
        self.budget, self.source = budget, source()
        self.running: list[Running] = []
        self.lines: dict[str, dict[str, Any]] = {}
        self.signal = 0

    def interrupt(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number

    def write(self, step: Step, line: dict[str, Any], log: str = "") -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        about = {"step": step.name, "emulated": self.emulate, "source": self.source, "date": now}
        self.lines[step.name] = line = about | line
        self.output.line(line)
        if log:
            self.output.log(step.name, log)
        why = f": {line['error'].splitlines()[0][:200]}" if line["error"] else ""
        print(f"{step.name:24} {line['status']:11} {line['seconds']:7.1f} s{why}", flush=True)

    def why_not(self, step: Step) -> str:
        for name in step.needs:
            line = self.lines.get(name)
            if line is not None and line["status"] != "ok":
                # A chain of steps that could not run repeats the reason of the first.
                begins = "" if line["status"] == "skipped" else f"{name} {line['status']}: "
                return f"{begins}{line['error']}"
        if self.emulate and not step.is_emulated:
            return "needs a GPU: nothing emulates it"
        if self.end - time.monotonic() < LEAST:
            return f"the budget of {self.budget:g} s is used up"
        return ""

    def begin(self) -> None:
        """Starts as many of the pending steps as may run now."""
        cores = os.cpu_count() or 1
        while self.pending and not self.signal:
            step = self.pending[0]
            kinds = {other.step.kind for other in self.running}
            if self.running and (kinds != {step.kind} or len(self.running) >= min(step.together, cores)):
                return
            self.pending.pop(0)
            if reason := self.why_not(step):
                self.write(step, {"status": "skipped", "seconds": 0.0, "figures": {}, "error": reason, "tail": ""})
                continue
            limit = min(step.limit, self.end - time.monotonic())
            file = tempfile.TemporaryFile()  # noqa: SIM115
            try:
                self.running.append(Running(step, limit, self.emulate, file))
            except OSError as error:
                file.close()
                self.write(step, {"status": "failed", "seconds": 0.0, "figures": {}, "error": str(error), "tail": ""})

    def look(self) -> None:
        """Writes the lines of steps that have ended, and ends those that are over their limit."""
        for one in list(self.running):
            status = why = ""
            if self.signal:
                status, why = "interrupted", f"by {signal_name(self.signal)}"
            elif one.process.poll() is None:
                if one.seconds < one.limit:
                    continue
                status, why = "timeout", f"stopped at its limit of {one.limit:.0f} s"
            why += one.end()  # also ends processes that a step has left behind
            self.running.remove(one)
            line, log = one.outcome(status, why)
            self.write(one.step, line, log)
            one.output.close()

    def run(self) -> int:
        """Runs the steps. Returns the exit status, which is 0 if every step is ok."""
        before = {number: signal.signal(number, self.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while (self.pending and not self.signal) or self.running:
                self.begin()
                self.look()
                time.sleep(0.02)
        finally:
            for one in self.running:  # after an exception, for example on a full disk
                one.end()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.signal:
            return 128 + self.signal
        return int(any(line["status"] != "ok" for line in self.lines.values()))


def chosen(names: Sequence[str]) -> list[Step]:
    """The steps of these names or kinds, with the steps that they need."""
    known = {step.name for step in STEPS} | {step.kind for step in STEPS}
    for name in names:
        if name not in known:
            raise SystemExit(f"gpu-proof: STEPS: expected some of {', '.join(sorted(known))}, got {name}")
    always = ("environment", "build", "build_info")
    return [step for step in STEPS if not names or {step.name, step.kind} & {*names, *always}]


def summary(lines: dict[str, dict[str, Any]]) -> str:
    """A sentence that says what a run has proven."""
    statuses = [line["status"] for line in lines.values()]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    bits = [line for name, line in lines.items() if name.startswith(("bits:", "headline:"))]
    emulated = any(line["emulated"] for line in lines.values())
    if not bits:
        return f"{counts}: no bits were compared"
    if any(line["status"] != "ok" for line in bits):
        return f"{counts}: the kernels are NOT proven to give the CPU's bits"
    return f"{counts}: {'emulated, and not proven on a GPU, ' if emulated else ''}the kernels give the CPU's bits"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_proof", description=__doc__.split("\n\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help=f"run, and append to this folder's {LINES} and {LOG}")
    what.add_argument(
        "--replay", type=Path, nargs="+", help="write bench/history and README from folders of earlier runs"
    )
    what.add_argument("--readme", action="store_true", help="only rewrite README from the history")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help="seconds for all steps together (default: %(default)g)"
    )
    parser.add_argument("--steps", nargs="*", default=[], help="run only these steps, and the steps that they need")
    parser.add_argument("--emulate", action="store_true", help="rehearse with emulated ops on small problems")
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree that --replay writes to (default: this one)")
    args = parser.parse_args(arguments)
    if args.out is None:
        from . import gpu_replay

        return gpu_replay.main(args.replay or [], args.root)
    if not 0 < args.budget < float("inf"):
        parser.error(f"--budget: expected a positive number of seconds, got {args.budget:g}")
    proof = Proof(chosen(args.steps), Output(args.out), args.budget, args.emulate)
    status = proof.run()
    print(summary(proof.lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
