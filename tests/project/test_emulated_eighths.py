# SPDX-License-Identifier: Apache-2.0
"""The eighths of the emulated tests: together they are all tests, they are about equal, and commits go round them."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import eighths
import pytest

ROOT = Path(__file__).parents[2]


def collect(chosen: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", "-o", "addopts="]
    environment = os.environ | {"GIBBS_TEST_EMULATED": chosen}
    environment.pop("PYTEST_ADDOPTS", None)
    return subprocess.run(
        [*command, "tests/ops/test_cuda_emulated.py"], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def node_ids(chosen: str) -> set[str]:
    done = collect(chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line for line in done.stdout.splitlines() if line.startswith("tests/ops/test_cuda_emulated.py::")]
    assert len(set(found)) == len(found)
    return set(found)


def test_a_run_takes_one_eighth_and_all_of_them_are_about_equal() -> None:
    every = node_ids("all")
    parts = Counter(eighths.eighth_of(node_id) for node_id in every)
    always = parts.pop(None)
    assert sorted(parts) == eighths.NAMES  # so they are disjoint, and cover all
    average = (len(every) - always) / 8
    assert 0.8 * average < min(parts.values()) <= max(parts.values()) < 1.2 * average
    assert 0 < always < 100
    assert node_ids("3") == {node_id for node_id in every if eighths.eighth_of(node_id) in (None, "3")}


def test_another_name_is_refused() -> None:
    done = collect("8")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "GIBBS_TEST_EMULATED must be 0 to 7 or all, got '8'" in done.stderr


def git(folder: Path, *words: str) -> None:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run([*command, *words], check=True, capture_output=True)


def test_commits_go_round_the_eighths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    for name in os.environ.keys() & {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"}:  # as in a hook
        monkeypatch.delenv(name)
    deep, shallow = tmp_path / "deep", tmp_path / "shallow"
    deep.mkdir()
    assert eighths.of_commit(deep) == "0"
    git(deep, "init")
    assert eighths.of_commit(deep) == "0"  # without a commit
    found = []
    hashes = set()
    for number in range(1, 17):
        git(deep, "commit", "--allow-empty", "-m", str(number))
        found.append(eighths.of_commit(deep))
        git(tmp_path, "clone", "--depth", "1", deep.as_uri(), f"{shallow}{number}")
        hashes.add(eighths.of_commit(Path(f"{shallow}{number}")))
    assert found == [str(number % 8) for number in range(1, 17)]
    assert len(hashes) > 1
    monkeypatch.setenv("PATH", "")
    assert eighths.of_commit(deep) == "0"
