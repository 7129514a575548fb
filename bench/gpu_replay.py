# SPDX-License-Identifier: Apache-2.0
"""Writes bench/history and README from the lines of bench/gpu_proof.py; needs only Python."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .gpu_proof import KINDS, LINES, ROUTES, source
from .texts import PROOF, ROOT, duration, file_name, markdown, parts, write, write_part

COMMAND = "make gpu-proof"  # the command that writes a part of README, and marks it there
BITS = (*(f"bits:{route}" for route in (*ROUTES, "auto")), *(f"headline:{kind}" for kind in KINDS))
EMULATED = "emulated"  # in place of a GPU's name
# Parts of GPUs' names, with the device of bench/history/cuda-bounds.json that has the same multiprocessors.
BOUNDS = {"A100": "A100", "H100": "H100", "H200": "H100", "B200": "B200"}

KEPT = ("status", "seconds", "date", "error", "figures")  # keys of a line that the history keeps

UNPROVEN = """\
**No GPU has run these kernels yet.** Their source runs, thread by thread, on an emulator on the CPU
(`tests/cuda/emulator.h`), and passes the tests of the CPU's ops there, to the bit. `csrc/cuda/README.md` lists what
only a GPU can prove. Take the kernels as unproven until this paragraph is gone."""


class ReplayError(RuntimeError):
    """The folder is of no use; the message says why."""


def lines_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / LINES
    if not path.is_file():
        raise ReplayError(f"{folder}: expected a folder with {LINES}, which `make gpu-proof OUT=folder` writes")
    lines = []
    texts = path.read_text().splitlines()
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            lines.append({key: line[key] for key in ("step", "source", "emulated", *KEPT)})
        except (ValueError, TypeError, KeyError) as error:
            if number == len(texts):  # the machine went away in the middle of it
                print(f"gpu-proof: {path}: the last line is cut off and left out", file=sys.stderr)
                continue
            raise ReplayError(f"{path}: line {number}: expected a step's line of JSON, got {text[:80]!r}") from error
    return lines


def read(folders: Sequence[Path]) -> dict[str, Any]:
    """Joins the lines of one GPU's runs into one proof. The last line of a step counts."""
    lines = [line for folder in folders for line in lines_of(folder)]
    names = ", ".join(map(str, folders))
    steps: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line["status"] != "skipped" or line["step"] not in steps:
            steps[line["step"]] = line
    environment = steps.get("environment")
    if environment is None:
        raise ReplayError(f"{names}: expected a line of the step environment, got {', '.join(steps) or 'none'}")
    if environment["status"] != "ok":
        raise ReplayError(f"{names}: nothing was measured: {environment['error']}")
    alike = {key: {str(line[key]) for line in lines} for key in ("source", "emulated")}
    alike["gpu"] = {str(line["figures"].get("gpu")) for line in lines if line["step"] == "environment"}
    for what, values in alike.items():
        if len(values) > 1:
            raise ReplayError(f"{names}: expected lines of one {what}, got {', '.join(sorted(values))}")
    about = environment["figures"]
    for name in ("gpu", "torch", "cuda"):
        if name not in about and not environment["emulated"]:
            raise ReplayError(
                f"{names}: expected the figure {name} of the step environment, got {', '.join(about) or 'none'}"
            )
    return {
        "gpu": EMULATED if environment["emulated"] else about["gpu"],
        "torch": about.get("torch"),
        "cuda": about.get("cuda"),
        "date": environment["date"][:10],
        "source": environment["source"],
        "steps": {name: {key: line[key] for key in KEPT} for name, line in steps.items()},
    }


def unproven(proof: dict[str, Any]) -> list[str]:
    """The steps of bit equality that are not ok, each with the reason."""
    missing = {"status": "missing", "error": "it did not run"}
    steps = {name: proof["steps"].get(name, missing) for name in BITS}
    return [f"`{name}` ({first_line(step)})" for name, step in steps.items() if step["status"] != "ok"]


def first_line(step: dict[str, Any]) -> str:
    text = str(step["error"] or step["status"]).splitlines()[0]
    return text if len(text) <= 160 else f"{text[:160]}..."


def best(entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    return min((entry for entry in entries if "us" in entry), key=lambda entry: entry["us"], default=None)


def figures(proof: dict[str, Any], step: str) -> dict[str, Any]:
    return dict(proof["steps"].get(step, {}).get("figures", {}))


def bounds(proof: dict[str, Any], root: Path) -> tuple[str, dict[str, float]]:
    """The device whose bounds apply to this GPU, and seconds by problem; both empty if there are none."""
    device = next((device for name, device in BOUNDS.items() if name in proof["gpu"]), "")
    path = root / "bench" / "history" / "cuda-bounds.json"
    if not device or not path.exists():
        return "", {}
    problems = json.loads(path.read_text())["problems"]
    return device, {case["problem"]: case["devices"][device]["seconds"] for case in problems}


def table(proof: dict[str, Any], root: Path) -> str:
    device, least = bounds(proof, root)
    modes = ("eager", "compiled", "captured")
    lines = [["problem", "a call", "as a CUDA graph", "best of PyTorch", "which", "ratio"]]
    if device:
        lines[0] += [f"bound ({device})", "of the bound"]
    for problem, entries in figures(proof, "ours").items():
        if not isinstance(entries, list):  # clocks
            continue
        ours = best(entries)
        peer = best([entry for mode in modes for entry in figures(proof, f"peers:{mode}").get(problem, [])])
        row = [problem]
        for mode in ("eager", "captured"):
            entry = next((entry for entry in entries if entry["mode"] == mode), {"error": "not run"})
            row.append(duration(entry["us"] / 1e6) if "us" in entry else "failed" if "mode" in entry else "")
        row += [duration(peer["us"] / 1e6), f"{peer['way']}, {peer['precision']}, {peer['mode']}"] if peer else ["", ""]
        row.append(f"{peer['us'] / ours['us']:.1f}x" if peer and ours else "")
        if device:
            bound = least.get(problem)
            row.append(duration(bound) if bound else "")
            row.append(f"{ours['us'] / 1e6 / bound:.1f}x" if bound and ours else "")
        lines.append(row)
    return markdown(lines) if len(lines) > 1 else ""


def remarks(proof: dict[str, Any]) -> str:
    """Sentences about training, tools and tests, and about steps that are not ok."""
    steps = proof["steps"]
    text = []
    training = [f"{name} {entry['ms']:.3g} ms" for name, entry in figures(proof, "training").items() if "ms" in entry]
    if training:
        text.append(f"A training step of the default model: {', '.join(training)}.")
    metrics = figures(proof, "preset").get("metrics")
    if metrics:
        text.append(f"`paper-mnist-200`: {metrics[-1]['steps_per_second']:.0f} steps a second.")
    for kind in ("memcheck", "racecheck"):
        of_kind = [step for name, step in steps.items() if name.startswith(f"{kind}:") and step["status"] != "skipped"]
        if of_kind:
            num_ok = sum(step["status"] == "ok" for step in of_kind)
            text.append(f"{kind}: {num_ok} of {len(of_kind)} routes without errors.")
    tests = [figures(proof, f"tests:{which}") for which in ("own", "ops")]
    if any(tests):
        passed, failed = (sum(int(found.get(key, 0)) for found in tests) for key in ("passed", "failed"))
        text.append(f"`tests/ops/test_gpu.py`: {passed} passed, {failed} failed.")
    others: dict[str, list[str]] = {}
    for name, step in steps.items():
        if step["status"] != "ok" and name not in BITS:
            others.setdefault(first_line(step), []).append(f"`{name}`")
    if others:
        reasons = [f"{', '.join(names)} ({why})" for why, names in others.items()]
        text.append(f"Not ok: {'; '.join(reasons)}.")
    return "\n".join(text)


def section(proof: dict[str, Any], root: Path) -> str:
    """The part of README about one GPU."""
    missing = unproven(proof)
    rehearsal = "A rehearsal on the host emulator, no GPU: its figures say nothing of one"
    heading = (
        f"**{rehearsal if proof['gpu'] == EMULATED else proof['gpu']}**, PyTorch {proof['torch']}, {proof['date']}:"
    )
    if missing:
        verdict = f"the kernels are **not proven** to give the CPU's bits. What failed: {'; '.join(missing)}."
    else:
        compared = [found for name in BITS for found in figures(proof, name).values()]
        num_bits, error = sum(found["bits"] for found in compared), max(found["largest_error"] for found in compared)
        verdict = (
            f"the routes {', '.join(ROUTES)} give the CPU's bits ({num_bits:,} compared),\n"
            f"on small problems of all kinds and,\n"
            f"in the chains that the CPU computed too, on those below; what is not bits\n"
            f"differs by at most {error:.1g} of its norm. Medians; ratios are of the faster way of either side."
        )
    return "\n\n".join(part for part in (f"{heading} {verdict}", table(proof, root), remarks(proof)) if part)


def readme_text(root: Path = ROOT) -> str:
    """The part of README about all GPUs in the history, which begins with a warning if none proves the kernels."""
    proofs = [json.loads(path.read_text()) for path in sorted((root / "bench" / "history").glob(f"*/{PROOF}"))]
    sections = [section(proof, root) for proof in proofs]
    measured = [proof for proof in proofs if proof["gpu"] != EMULATED]
    if all(unproven(proof) for proof in measured):
        # A GPU may have run the kernels and found them wrong.
        sections.insert(0, UNPROVEN.replace("has run", "has proven") if measured else UNPROVEN)
    return "\n\n".join(sections)


def main(folders: Sequence[Path], root: Path = ROOT) -> int:
    """Writes the history from the folders, if any are given, and README from the history."""
    try:
        readme = root / "README.md"
        parts(readme, COMMAND)  # fails before anything is written where the markers are missing
        if folders:
            proof = read(folders)
            if proof["gpu"] == EMULATED and root.resolve() == ROOT.resolve():
                raise ReplayError(
                    f"{folders[0]}: what was emulated goes into no README or history but a copy's: --root"
                )
            if proof["source"] != source():
                print("gpu-proof: these sources are others than those that were measured", file=sys.stderr)
            path = root / "bench" / "history" / file_name(proof["gpu"]) / PROOF
            write(path, json.dumps(proof, indent=1) + "\n")
            print(f"kept in {path.relative_to(root)}")
        write_part(readme, COMMAND, readme_text(root))
    except (ReplayError, OSError, ValueError) as error:
        print(f"gpu-proof: REPLAY: {error}", file=sys.stderr)
        return 1
    return 0
