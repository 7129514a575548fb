# SPDX-License-Identifier: Apache-2.0
"""bench/instructions.py: counts that leave the band are found, and every case of the program runs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import instructions

KEPT = {"a": 1000, "b": 1000}


@pytest.mark.parametrize(
    "found", [{"a": 949, "b": 1000}, {"a": 1051, "b": 1000}, {"b": 1000}, {"a": 1000, "b": 1000, "c": 1}]
)
def test_counts_outside_of_the_band_are_found(found: dict[str, int]) -> None:
    _text, outside = instructions.compare(KEPT, found)
    assert outside == ["c" if "c" in found else "a"]


def test_counts_within_the_band_pass() -> None:
    text, outside = instructions.compare(KEPT, {"a": 951, "b": 1049})
    assert outside == []
    assert "-4.9%" in text
    assert "+4.9%" in text


def test_cases_are_those_that_are_kept() -> None:
    path = instructions.program()
    cases = subprocess.run([path], check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(cases) == 8
    assert sorted(json.loads(instructions.KEPT.read_text())["instructions"]) == sorted(cases)
    for case in cases:
        subprocess.run([path, case], check=True)


@pytest.mark.parametrize("changed", [False, True])
def test_a_change_ends_in_an_error(changed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"compiler": instructions.compiler_version(), "instructions": {"case": 110 if changed else 101}}
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps(counts))
    monkeypatch.setattr(instructions, "KEPT", kept)
    monkeypatch.setattr(instructions, "program", lambda: shutil.which("echo"))
    monkeypatch.setattr(
        instructions.subprocess, "run", lambda *args, **more: subprocess.CompletedProcess(args, 0, "case\n")
    )
    monkeypatch.setattr(instructions, "compiler_version", lambda: counts["compiler"])
    monkeypatch.setattr(instructions, "count", lambda path, case: 100)
    monkeypatch.setattr(instructions.shutil, "which", lambda name: name)
    monkeypatch.setattr(sys, "argv", ["instructions"])
    if changed:
        with pytest.raises(SystemExit, match="expected counts within 5% of those kept, got others for: case"):
            instructions.main()
    else:
        instructions.main()
    monkeypatch.setattr(sys, "argv", ["instructions", "--renew"])
    instructions.main()
    assert json.loads(kept.read_text())["instructions"] == {"case": 100}
