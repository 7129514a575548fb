# SPDX-License-Identifier: Apache-2.0
"""tests/torch_versions.py (``make torch-versions``) without downloads: commands are recorded and not run."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch_versions

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
GOOD = '<testsuites><testsuite tests="9" failures="0" errors="0" skipped="2" /></testsuites>'
BAD = '<testsuites><testsuite tests="9" failures="1" errors="2" skipped="0" /></testsuites>'


class Commands(list[str]):
    """Stands in for torch_versions.run. A command that holds ``fails`` fails; pytest leaves ``report``."""

    fails, report = "nothing", GOOD

    def run(self, words: Sequence[object], log: Path, cwd: Path = torch_versions.ROOT) -> int:
        command = " ".join(map(str, words))
        self.append(command)
        if " venv " in command:
            Path(str(words[-1])).mkdir()
        if " pytest " in command and self.report:
            report = next(str(word) for word in words if str(word).startswith("--junitxml="))
            Path(report.partition("=")[2]).write_text(self.report)
        return int(self.fails in command or (" pytest " in command and self.report != GOOD))

    def held(self, *parts: str) -> int:
        return sum(all(part in command for part in parts) for command in self)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Runs in a small source folder of its own, on a PATH without python3.98 and with a python3.99 that fails."""
    commands, sources = Commands(), tmp_path / "sources"
    for name in ("gibbs_ext/ops.py", "gibbs_ext/_C.so", "build/old", ".venv/bin/python"):
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).touch()
    for name in ("pyproject.toml", ".gitignore"):
        shutil.copy(torch_versions.ROOT / name, sources)
    (tmp_path / "python3.99").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3.99").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch_versions, "ROOT", sources)
    monkeypatch.setattr(torch_versions, "FOLDER", sources / "build" / "torch-versions")
    monkeypatch.setattr(torch_versions, "run", commands.run)
    return commands


def rows(printed: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[2:]]


def test_each_version_has_an_environment_and_a_row(commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    assert torch_versions.main(["2.10.0", f"2.11.0:{sys.executable}", "--index", "an index"]) == 0
    table = rows(capsys.readouterr().out)
    assert [row[:5] for row in table] == [["2.10.0", HERE, "7", "0", "2"], ["2.11.0", HERE, "7", "0", "2"]]
    assert [row[6] for row in table] == ["good", "good"]
    for version in ("2.10.0", "2.11.0"):
        own = f"torch-{version}-python{HERE}"
        assert commands.held("pip install --extra-index-url an index", own, f" torch=={version} ", "pybind11") == 1
        for step in ("venv", "pip install --no-build-isolation", f" {version} ", "pytest"):
            assert commands.held(own, step) >= 1
        copy = torch_versions.FOLDER / own / "source"
        assert {path.name for path in copy.rglob("*")} == {"gibbs_ext", "ops.py", "pyproject.toml", ".gitignore"}


@pytest.mark.parametrize(
    ("fails", "outcome"),
    [
        ("-m venv", "making the environment failed"),
        ("torch==2.10.0", "installing PyTorch failed"),
        ("--no-build-isolation", "building failed"),
        (" -c ", "importing failed"),
    ],
)
def test_a_step_that_fails_is_named_and_stops_no_other_version(
    commands: Commands, capsys: pytest.CaptureFixture[str], fails: str, outcome: str
) -> None:
    commands.fails = fails
    assert torch_versions.main(["2.10.0", "2.11.0"]) == 1
    first, second = rows(capsys.readouterr().out)
    assert first[6].startswith(f"{outcome}: {torch_versions.FOLDER}")
    assert (second[6] == "good") == ("2.10.0" in fails)
    assert commands.held("2.11.0")


@pytest.mark.parametrize(("report", "outcome"), [(BAD, "tests failed"), ("", "running the tests failed")])
def test_tests_that_fail_or_do_not_run(
    commands: Commands, capsys: pytest.CaptureFixture[str], report: str, outcome: str
) -> None:
    commands.report = BAD
    torch_versions.main(["2.10.0"])  # whose report is not to be taken for the next one's
    capsys.readouterr()
    commands.report = report
    assert torch_versions.main(["2.10.0"]) == 1
    (row,) = rows(capsys.readouterr().out)
    assert row[2:5] == (["6", "3", "0"] if report else ["0", "0", "0"])
    assert row[6].startswith(f"{outcome}: ")


@pytest.mark.parametrize("name", ["3.98", "3.99", "/nowhere/python3"])
def test_an_interpreter_that_is_missing(commands: Commands, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert torch_versions.main([f"2.10.0:{name}", "2.11.0"]) == 1
    missing, other = rows(capsys.readouterr().out)
    assert missing[:2] == ["2.10.0", name]
    assert missing[6] == f"no interpreter {name} on the PATH"
    assert other[6] == "good"


def test_what_is_ready_is_kept_and_what_is_half_made_is_made_again(commands: Commands) -> None:
    environment = torch_versions.FOLDER / f"torch-2.10.0-python{HERE}"
    commands.fails = "torch==2.10.0"
    torch_versions.main(["2.10.0"])
    (environment / "half").touch()
    commands.fails = "nothing"
    torch_versions.main(["2.10.0"])
    assert not (environment / "half").exists()
    assert commands.held("-m venv") == 2

    object_file = environment / "source" / "build" / "object"
    object_file.parent.mkdir()
    object_file.touch()
    stale = environment / "source" / "gibbs_ext" / "_C.so"
    stale.touch()
    torch_versions.main(["2.10.0"])
    assert commands.held("-m venv") == 2
    assert object_file.exists()
    assert not stale.exists()


@pytest.mark.parametrize("item", ["torch", "2", "2.11.0:", ":3.12", ">=2.10"])
def test_versions_that_are_none(commands: Commands, capsys: pytest.CaptureFixture[str], item: str) -> None:
    with pytest.raises(SystemExit):
        torch_versions.main(["2.10.0", item])
    expected = f"torch_versions: error: versions: expected TORCH or TORCH:PYTHON, as 2.11.0:3.12; got {item!r}\n"
    assert capsys.readouterr().err.endswith(expected)
    assert not commands
