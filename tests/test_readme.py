# SPDX-License-Identifier: Apache-2.0
"""What README shows, works: its example, its commands, its figures."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import harness

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_the_example_runs(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    paths = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'python')!r}]\n"
    done = subprocess.run([sys.executable, "-c", paths + program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shape, gradient, error = done.stdout.splitlines()
    assert shape.startswith("torch.Size([1000, 64, 28])")
    assert gradient == "torch.Size([64, 16, 12])"
    worst, standard_error = map(float, re.findall(r"tensor\(([-\d.e]+)", error))
    assert worst < 6 * standard_error


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"make (\w+)", TEXT.replace("`make` sets", ""))) - {"TORCH_INDEX"}
    rules = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"train", "test"} <= targets
    assert targets <= rules


def test_the_table_of_speed_is_that_of_the_history() -> None:
    table = TEXT.split(harness.BEGIN)[1].split(harness.END)[0]
    assert table.strip() == harness.readme_table().strip()


def test_results_keep_the_metadata_of_their_own_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "HISTORY", tmp_path)
    result = {"case": "a", "seconds": {harness.OURS: 1.0, "peer": 2.0}, "updates": 10**6, "best_peer": "peer"}
    result |= {"ratio": 2.0, "wanted": None}
    metadata = harness.metadata()
    monkeypatch.setattr(harness, "metadata", lambda: metadata | {"date": "2001-01-01"})
    harness.store({"old": [result], "both": [result]})
    monkeypatch.setattr(harness, "metadata", lambda: metadata | {"date": "2002-02-02"})
    harness.store({"both": [result | {"case": "b"}]})
    old, new = re.split(r"\n\n(?=.*2002-02-02:)", harness.readme_table())
    assert "2001-01-01:" in old
    assert ("| a " in old, "| b " in old, "| a " in new, "| b " in new) == (True, False, False, True)
