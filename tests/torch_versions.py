# SPDX-License-Identifier: Apache-2.0
"""``make torch-versions``: builds gibbs_ext for other versions of PyTorch and Python, imports it, and runs tests there.

Each pair has an environment of its own in build/torch-versions, with a copy of the sources, so that nothing compiled
for one pair is used for another. An environment that is ready is used again.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "torch-versions"
# The tests that call PyTorch most take about two minutes. Tests of Ctrl-C are left out: they fail on a busy machine.
TESTS = [
    *(f"tests/ops/test_{name}.py" for name in ("ops", "golden", "bad_inputs", "transforms")),
    *(f"tests/models/test_{name}.py" for name in ("base", "bipartite", "graph")),
    *("tests/nn/test_nn.py", "tests/test_distributed.py", "tests/project/test_packaging.py"),
    *(f"tests/undirected_vae/test_{name}.py" for name in ("model", "data", "step")),
    "tests/undirected_vae/test_train.py::test_200_steps_improve_the_elbo",
    "tests/undirected_vae/test_train.py::test_train_evaluate_sample_info_against",
    *("-k", "not ctrl_c"),
]
IMPORT = """
import sys, torch, gibbs_ext
found = torch.__version__.partition("+")[0], gibbs_ext.__file__.rpartition("/gibbs_ext/")[0]
sys.exit(0 if found == tuple(sys.argv[1:]) else f"found {found}")
"""


class Failure(Exception):
    """One version cannot be tested; the others are still tried."""


def run(words: Sequence[object], log: Path, cwd: Path = ROOT) -> int:
    """Appends what the command prints to the log."""
    # PYTHONPATH would lead to another environment's packages.
    variables = {"GIBBS_CUDA": "0"} | {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(word) for word in words]
    with log.open("a") as file:
        print("$", *command, file=file, flush=True)
        return subprocess.run(command, cwd=cwd, env=variables, stdout=file, stderr=subprocess.STDOUT).returncode


def require(step: str, words: Sequence[object], log: Path, cwd: Path = ROOT) -> None:
    if run(words, log, cwd):
        raise Failure(f"{step} failed")


def find_python(name: str) -> tuple[str, str]:
    """The program, and its version as 3.12."""
    program = shutil.which(f"python{name}" if re.fullmatch(r"3\.\d+", name) else name)
    words = [program or name, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    done = subprocess.run(words, capture_output=True, text=True) if program else None
    if not program or not done or done.returncode:
        raise Failure(f"no interpreter {name} on the PATH")
    return program, done.stdout.strip()


def make_environment(folder: Path, python: str, version: str, index: str, log: Path) -> None:
    ready = folder / "ready"
    if ready.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)  # an interrupted pip leaves packages that seem installed
    require("making the environment", [python, "-m", "venv", folder], log)
    requires = re.findall(r"^requires = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    packages = [f"torch=={version}", *ast.literal_eval(requires[0])]
    options = ["--extra-index-url", index] if index else []
    require("installing PyTorch", [folder / "bin" / "python", "-m", "pip", "install", *options, *packages], log)
    ready.touch()


def copy_sources(target: Path) -> None:
    """Copies all files that git does not ignore, and keeps what was compiled from an earlier copy."""
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    for path in target.glob("*"):
        if path.is_dir() and path.name != "build":
            shutil.rmtree(path)
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(".git", *ignored), dirs_exist_ok=True)


def count_tests(report: Path) -> tuple[int, int, int]:
    """Numbers of tests that passed, failed and were skipped, from pytest's report."""
    suites = list(ET.parse(report).iter("testsuite")) if report.exists() else []
    total, failures, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    return total - failures - errors - skipped, failures + errors, skipped


def check(folder: Path, python: str, version: str, index: str, tests: Sequence[str], log: Path) -> tuple[int, int, int]:
    """Builds, imports and tests. Returns the numbers of tests that passed, failed and were skipped."""
    make_environment(folder, python, version, index, log)
    copy_sources(folder / "source")
    own, source, report = folder / "bin" / "python", folder / "source", folder / "tests.xml"
    install = [own, "-m", "pip", "install", "--no-build-isolation", "--editable", ".[train,test]"]
    require("building", install, log, source)
    require("importing", [own, "-c", IMPORT, version, source], log, folder)
    report.unlink(missing_ok=True)
    status = run([own, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *tests], log, source)
    counts = count_tests(report)
    if status and not counts[1]:
        raise Failure("running the tests failed")
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="torch_versions", description=__doc__)
    parser.add_argument("versions", nargs="+", help="2.11.0, or 2.11.0:3.12 to have it with python3.12")
    parser.add_argument("--index", default="", help="an extra package index for pip to find PyTorch in")
    parser.add_argument("--tests", default="", help="arguments of pytest that say which tests to run")
    options = parser.parse_args(arguments)
    for item in options.versions:
        if not re.fullmatch(r"\d+(\.\w+)+(:.+)?", item):
            parser.error(f"versions: expected TORCH or TORCH:PYTHON, as 2.11.0:3.12; got {item!r}")

    FOLDER.mkdir(parents=True, exist_ok=True)
    print("| PyTorch | Python | passed | failed | skipped | seconds | |\n|---|---|---|---|---|---|---|", flush=True)
    all_good = True
    for item in options.versions:
        version, _, name = item.partition(":")
        counts, python_version, log, fault, start = (0, 0, 0), name, None, "", time.monotonic()
        try:
            python, python_version = find_python(name or sys.executable)
            folder = FOLDER / f"torch-{version}-python{python_version}"
            log = Path(f"{folder}.log")
            log.unlink(missing_ok=True)
            counts = check(folder, python, version, options.index, options.tests.split() or TESTS, log)
            if counts[1]:
                fault = "tests failed"
        except Failure as failure:
            fault = str(failure)
        outcome = f"{fault}{f': {log}' if log else ''}" if fault else "good"
        cells = [version, python_version, *counts, round(time.monotonic() - start), outcome]
        print("|", " | ".join(map(str, cells)), "|", flush=True)
        all_good &= not fault
    return 0 if all_good else 1


if __name__ == "__main__":
    sys.exit(main())
