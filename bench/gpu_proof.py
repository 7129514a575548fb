# SPDX-License-Identifier: Apache-2.0
"""All that only a GPU can tell, in ten minutes: `make gpu-proof OUT=folder`, then `make gpu-proof REPLAY=folder`.

Every step is a process of its own under a time limit; its line of JSON in OUT/proof.jsonl is on the disk before the
next begins, and what fails, hangs or crashes stops no other. The order is that of worth: a cut-off leaves the most
valuable. This program needs Python alone; what the steps do is in bench/gpu_steps.py, what is made of their lines in
bench/gpu_replay.py.
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
MOST_FILES, MOST_BYTES = 8, 16_000_000  # what OUT may hold, and each file there
MOST_OF_A_LINE, MOST_OF_A_LOG = 100_000, 300_000  # characters of a step
MOST_READ = 50_000_000  # bytes of a step's output: of more, the end
DEADLINE = "GPU_PROOF_DEADLINE"  # in the environment of a step: when it will be stopped, in seconds since the epoch
SAYS = "gpu-proof: "  # how lines begin by which a step tells what it found
ROUTES = ("resident", "cluster", "streaming", "tensor", "tensor_streaming", "tables", "sums", "units")
KINDS = ("bipartite", "relaxed", "ais", "graph")  # of standard problems
KERNELS = ("resident", "cluster", "tensor_streaming", "tables", "relaxed_backward")  # for ncu
BUDGET = 560.0
LEAST = 3.0  # seconds left that no step is begun with


@dataclass(frozen=True)
class Step:
    name: str  # kind, or kind:which
    limit: float  # seconds
    needs: tuple[str, ...] = ("build_info",)
    together: int = 1  # so many of a kind may run at once
    is_emulated: bool = False  # can run with the emulated ops in the GPU's place
    command: tuple[str, ...] = ()  # by default bench.gpu_steps

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
    """OUT: never more files, nor larger ones, than may lie there."""

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
        """On the disk when this returns."""
        path = self.folder / name
        content = text.encode()
        if (path.stat().st_size if path.exists() else 0) + len(content) > MOST_BYTES:
            print(f"gpu-proof: {path} is full: {len(content)} bytes of it are lost", file=sys.stderr)
            return  # half a line could not be read
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
    """Tells apart the sources that lines were measured with."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("csrc/**/*"), *ROOT.glob("gibbs_ext/**/*.py"), ROOT / "setup.py"]):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def signal_name(number: int) -> str:
    names = {int(one): one.name for one in signal.Signals}
    return names.get(number, f"signal {number}")


class Running:
    """A step's process, and all that it starts."""

    def __init__(self, step: Step, limit: float, emulate: bool, output: BinaryIO) -> None:
        self.step, self.limit, self.output, self.began = step, limit, output, time.monotonic()
        paths = [ROOT, ROOT / "python", ROOT / "tests", ROOT / "tests" / "cuda", os.environ.get("PYTHONPATH", "")]
        environment = {
            "PYTHONPATH": os.pathsep.join(map(str, paths)).rstrip(os.pathsep),
            "PYTHONUNBUFFERED": "1",
            DEADLINE: str(time.time() + limit),
        }
        command = step.command or (sys.executable, "-m", "bench.gpu_steps", step.name, *["--emulate"] * emulate)
        # A session of its own: a signal for this program is not theirs, and all of them can be ended together.
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def end(self) -> str:
        """Ends the processes. Returns what is to be said of that."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            return "; its process could not be ended"
        return ""

    def outcome(self, status: str, why: str) -> tuple[dict[str, Any], str]:
        """What its line says, and all else that it wrote. ``status`` and ``why``, if it did not end by itself."""
        self.output.seek(max(0, self.output.seek(0, os.SEEK_END) - MOST_READ))
        text = self.output.read().decode(errors="replace").replace(str(ROOT), ".")  # others have it elsewhere
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
                # Of a chain of steps that could not run, what stopped the first.
                begins = "" if line["status"] == "skipped" else f"{name} {line['status']}: "
                return f"{begins}{line['error']}"
        if self.emulate and not step.is_emulated:
            return "needs a GPU: nothing emulates it"
        if self.end - time.monotonic() < LEAST:
            return f"the budget of {self.budget:g} s is used up"
        return ""

    def begin(self) -> None:
        """As many of the pending steps as may run now."""
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
        """Writes the lines of steps that have ended, or have to."""
        for one in list(self.running):
            status = why = ""
            if self.signal:
                status, why = "interrupted", f"by {signal_name(self.signal)}"
            elif one.process.poll() is None:
                if one.seconds < one.limit:
                    continue
                status, why = "timeout", f"stopped at its limit of {one.limit:.0f} s"
            why += one.end()  # also of what a step has left behind
            self.running.remove(one)
            line, log = one.outcome(status, why)
            self.write(one.step, line, log)
            one.output.close()

    def run(self) -> int:
        """The exit status: 0 where every step is ok."""
        before = {number: signal.signal(number, self.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while (self.pending and not self.signal) or self.running:
                self.begin()
                self.look()
                time.sleep(0.02)
        finally:
            for one in self.running:  # a full disk, say
                one.end()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.signal:
            return 128 + self.signal
        return int(any(line["status"] != "ok" for line in self.lines.values()))


def chosen(names: Sequence[str]) -> list[Step]:
    """Steps by name or kind, with those that the others need."""
    known = {step.name for step in STEPS} | {step.kind for step in STEPS}
    for name in names:
        if name not in known:
            raise SystemExit(f"gpu-proof: STEPS: expected some of {', '.join(sorted(known))}, got {name}")
    always = ("environment", "build", "build_info")
    return [step for step in STEPS if not names or {step.name, step.kind} & {*names, *always}]


def summary(lines: dict[str, dict[str, Any]]) -> str:
    """What a run has proven, in a sentence."""
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
    what.add_argument("--replay", type=Path, nargs="+", help="write bench/history and README from such folders")
    what.add_argument("--readme", action="store_true", help="only rewrite README from the history")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds in all (default: %(default)g)")
    parser.add_argument("--steps", nargs="*", default=[], help="only these, and those that they need")
    parser.add_argument("--emulate", action="store_true", help="a rehearsal: emulated ops, on small problems")
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
