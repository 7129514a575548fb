# SPDX-License-Identifier: Apache-2.0
"""A grid of runs: a kill loses nothing, a cell that diverges stops no other, and the tables are right."""

import csv
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("mlxtend")
pytest.importorskip("tensorboard")
from undirected_vae import compare, pictures
from undirected_vae.__main__ import main
from undirected_vae.config import ConfigError
from undirected_vae.runs import Run, RunError

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "left": 6, "right": 5, "encoder": [12], "decoder": [12], "prior_chains": 20, "prior_sweeps": 2, "steps": 30,
    "log_every": 10, "posterior_sweeps": 2, "samples": 20, "posterior_betas": 10, "prior_betas": 50,
    "prior_ais_chains": 20, "test_images": 30, "augment": 0,
}  # fmt: skip


def write_grid(folder, **contents):
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({"seeds": [3, 4], "settings": SETTINGS, **contents}, sort_keys=False))
    return path


def start(grid, folder, *flags, limit=None):
    """Starts `compare` in a process of its own, whose files may have at most `limit` bytes."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "python"), *sys.path])}
    command = [sys.executable, "-m", "undirected_vae", "compare", grid, "--folder", folder, *flags]
    return subprocess.Popen(
        list(map(str, command)),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))),
    )


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def cells_of(folder):
    return list(csv.DictReader((folder / "cells.csv").open()))


def line_of(folder, group, row):
    lines = csv.DictReader((folder / "table.csv").open())
    return next(line for line in lines if (line["group"], line["row"]) == (group, row))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A grid with a row that diverges, made whole; its folder and what it printed."""
    folder = tmp_path_factory.mktemp("grid")
    rows = {"none": {"coupling": "none"}, "too fast": {"learning_rate": 1e30}, "L = 1": {"posterior": "directed"}}
    grid = write_grid(folder, rows=rows, groups={"A": None, "B": {"left": 3}})
    process = start(grid, folder / "runs", "--processes", 2)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return grid, folder / "runs", output, errors


def test_a_cell_that_diverges_is_marked_and_stops_no_other(done):
    grid, folder, output, errors = done
    states = {(cell["group"], cell["row"], cell["seed"]): cell["state"] for cell in cells_of(folder)}
    assert states == {
        (group, row, seed): "diverged" if row == "too fast" else "done"
        for group in "AB"
        for row in ("none", "too fast", "L = 1")
        for seed in "34"
    }
    assert len(re.findall(r"too fast / seed [34]: diverged \(error: training diverged at step", errors)) == 4
    assert output.count("| too fast | 0, 2 diverged |") == 2
    assert json.loads((folder / "a" / "too-fast" / "seed-3" / "failed.json").read_text())["error"]
    # It is not tried again unless that is wanted, and nothing else is made anew.
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/*/checkpoint.pt")}
    assert main(["compare", str(grid), "--folder", str(folder)]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/*/*/checkpoint.pt")} == before


def test_tables_hold_means_and_both_kinds_of_errors(done):
    grid, folder, output, _ = done
    results = {
        (row, seed): json.loads((folder / "b" / row / f"seed-{seed}" / "evaluation.json").read_text())
        for row in ("none", "l-1")
        for seed in (3, 4)
    }
    nll = np.array([[results[row, seed]["nll"] for seed in (3, 4)] for row in ("none", "l-1")])
    of_images = np.array([[results[row, seed]["log_likelihood"] for seed in (3, 4)] for row in ("none", "l-1")])
    line = line_of(folder, "B", "L = 1")
    difference = nll[1] - nll[0]
    for name, expected in {
        "nll": nll[1].mean(),
        "nll_error": abs(nll[1, 0] - nll[1, 1]) / 2,
        "difference": difference.mean(),
        "difference_error": abs(difference[0] - difference[1]) / 2,
        "paired_error": (of_images[0] - of_images[1]).mean(0).std(ddof=1) / 30**0.5,
    }.items():
        assert math.isclose(float(line[name]), expected, rel_tol=1e-6, abs_tol=1e-4), name
    assert (line["num_seeds"], line["num_diverged"]) == ("2", "0")
    assert f"| L = 1 | 2 | {nll[1].mean():.2f} +- {abs(nll[1, 0] - nll[1, 1]) / 2:.2f} |" in output
    assert f"{difference.mean():+.2f} +- {abs(difference[0] - difference[1]) / 2:.2f}" in output
    assert (folder / "comparison.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # Another baseline turns the sign.
    assert main(["compare", str(grid), "--folder", str(folder), "--tables-only", "--baseline", "L = 1"]) == 0
    line = line_of(folder, "B", "none")
    assert math.isclose(float(line["difference"]), -difference.mean(), rel_tol=1e-6, abs_tol=1e-4)


@pytest.mark.parametrize(
    ("of_row", "of_baseline", "shown"),
    [
        ([0.01, 0.02, 0.03], [0.01, 0.02, 0.03], "+1.00 +- 0.00 | 0.00 | 0.020 | +0.000 +- 0.000 |"),
        ([0.2, 0.2, 0.2], [0.01, 0.01, 0.01], "+1.00 +- 0.00* | 0.00 | 0.200 | -0.190 +- 0.000 |"),
        ([0.01, 0.01, 0.01], [0.2, 0.2, 0.2], "+1.00 +- 0.00* | 0.00 | 0.010 | +0.190 +- 0.000 |"),
        # Two bounds that are as loose are loose: what even more samples would do is not known.
        ([0.25, 0.25, 0.25], [0.5, 0.25, 0.0], "+1.00 +- 0.00* | 0.00 | 0.250 | +0.000 +- 0.144 |"),
        ([0.01, 0.01], [0.01, 0.01, 0.01], "+1.00 +- 0.00 | 0.00 | 0.010 |  |"),
        (None, [0.01, 0.01, 0.01], "+1.00 +- 0.00* | 0.00 |  |  |"),
    ],
)
def test_a_star_marks_a_difference_that_looseness_may_explain(done, monkeypatch, of_row, of_baseline, shown):
    """Looseness of the baseline flatters the other rows; what was not measured may be large."""
    grid = compare.read_grid(done[0], done[1], {})
    result = compare.Cell.result

    def changed(cell):
        found = result(cell)
        if found:
            level, of_images = (99.0, of_baseline) if cell.row == "none" else (100.0, of_row)
            found |= {"log_likelihood": [-level] * 30, "nll": level}
            found |= {"looseness_of_images": of_images, "looseness": of_images and sum(of_images) / len(of_images)}
            if not of_images:
                del found["looseness"], found["looseness_of_images"]
        return found

    monkeypatch.setattr(compare.Cell, "result", changed)
    assert f"| {shown}" in compare.markdown(grid)


def without_baseline_of_a(monkeypatch):
    result = compare.Cell.result

    def changed(cell):
        return None if (cell.group, cell.row) == ("A", "none") else result(cell)

    monkeypatch.setattr(compare.Cell, "result", changed)


def test_a_row_without_a_seed_of_the_baseline_is_not_drawn_at_0(done, monkeypatch, tmp_path):
    grid, drawn = compare.read_grid(done[0], done[1], {}), {}
    without_baseline_of_a(monkeypatch)
    monkeypatch.setattr(pictures, "differences", lambda path, panels, label: drawn.update(panels) or path)
    compare.write_tables(grid, tmp_path)
    assert {group: [name for name, *_ in rows] for group, rows in drawn.items()} == {"B": ["none", "L = 1"]}


def test_the_label_of_the_plot_of_one_group_is_not_cut_off(done, monkeypatch, tmp_path):
    figures = []
    without_baseline_of_a(monkeypatch)
    monkeypatch.setattr(pictures, "save", lambda path, figure: figures.append(figure) or path)
    compare.write_tables(compare.read_grid(done[0], done[1], {}), tmp_path)
    (figure,) = figures
    figure.draw_without_rendering()
    (label,) = (text for text in figure.texts if "NLL" in text.get_text())
    extent = label.get_window_extent()
    assert extent.x0 >= 0
    assert extent.x1 <= figure.bbox.x1


def test_a_kill_at_any_moment_loses_no_cell(tmp_path):
    rows = {"none": {"coupling": "none"}, "directed": {"posterior": "directed"}}
    settings, folder = SETTINGS | {"steps": 200, "checkpoint_every": 20}, tmp_path / "runs"
    grid = write_grid(tmp_path, rows=rows, settings=settings)
    first = start(grid, folder, "--processes", 2)
    wait_for(lambda: any(folder.glob("*/seed-3/cell.yaml")), first)
    second = start(grid, folder)
    assert second.wait(60) == 2
    assert f"error: {folder}: another process is comparing there" in second.stderr.read()
    # A cell is done, and the next one has begun.
    wait_for(lambda: any(folder.glob("*/seed-3/evaluation.json")) and any(folder.glob("*/seed-4/metrics.jsonl")), first)
    first.kill()
    first.communicate()
    kept = {path: path.read_text() for path in folder.glob("*/*/evaluation.json")}
    assert 1 <= len(kept) < 4
    # The cells' processes notice, save their checkpoints and leave: their locks are free.
    for path in folder.glob("*/*/train.lock"):
        deadline = time.monotonic() + 60
        while True:
            try:
                with Run(path.parent, None).lock():
                    break
            except RunError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
    # Ctrl-C loses nothing either.
    third = start(grid, folder, "--processes", 2)
    wait_for(lambda: third.stderr.readline(), third)
    third.send_signal(signal.SIGINT)
    _, errors = third.communicate(timeout=60)
    assert third.returncode in (130, 0), errors
    assert "Traceback" not in errors
    assert main(["compare", str(grid), "--folder", str(folder)]) == 0
    assert [cell["state"] for cell in cells_of(folder)] == ["done"] * 4
    assert all(path.read_text() == text for path, text in kept.items())
    # The cells are those of runs that were never interrupted.
    settings = str(folder / "none" / "seed-4" / "config.yaml")
    assert main(["train", "--run", str(tmp_path / "whole"), "--config", settings]) == 0
    paths = (tmp_path / "whole", folder / "none" / "seed-4")
    whole, resumed = (json.loads((path / "evaluation.json").read_text()) for path in paths)
    assert resumed["log_likelihood"] == whole["log_likelihood"]


def test_a_full_disk_is_told_and_a_later_call_goes_on(tmp_path):
    """The limit of a file's size stands for a full disk: the checkpoint cannot be written."""
    grid, folder = write_grid(tmp_path, rows={"none": {"coupling": "none"}}, seeds=[0]), tmp_path / "runs"
    process = start(grid, folder, limit=20_000)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert re.search(r"none / seed 0: failed with status 2 \(error: .*cannot be written \(File too large\)", errors)
    assert [cell["state"] for cell in cells_of(folder)] == ["open"]
    assert not list(folder.glob("**/.*.tmp"))
    assert main(["compare", str(grid), "--folder", str(folder)]) == 0
    assert [cell["state"] for cell in cells_of(folder)] == ["done"]


def test_other_settings_of_the_evaluation_evaluate_the_same_runs_anew(tmp_path):
    grid, folder = write_grid(tmp_path, rows={"none": {"coupling": "none"}}, seeds=[0]), tmp_path / "runs"
    path = folder / "none" / "seed-0"
    results = []
    for flags in ([], ["--test-images", "20"], ["--samples", "40"]):  # fewer images, too
        assert main(["compare", str(grid), "--folder", str(folder), *flags]) == 0
        assert [cell["state"] for cell in cells_of(folder)] == ["done"]
        results.append(json.loads((path / "evaluation.json").read_text()))
    assert [result["images"] for result in results] == [30, 20, 30]
    assert [result["samples"] for result in results] == [20, 20, 40]


def test_a_folder_of_other_settings_is_refused(done, capsys):
    grid, folder, *_ = done
    assert main(["compare", str(grid), "--folder", str(folder), "--steps", "31", "--left", "4"]) == 2
    error = capsys.readouterr().err
    assert f"{folder / 'a' / 'none' / 'seed-3'}: holds a run of other settings: left 6 (the grid: 4), steps 30" in error


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"rows": {"a": {"colour": 1}}}, "a: no such setting: colour"),
        ({"rows": {"a": {}}, "groups": {"G": {"left": 0}}}, "G / a: left: expected at least 1, got 0"),
        ({"rows": {"a": {"preset": "best"}}}, "a: preset: expected one of"),
        ({"rows": {"a": {"seed": 1}}}, "rows: a: seed: expected no seed here"),
        ({"rows": {}}, "rows: expected at least one row, got none"),
        ({"rows": {"a": 3}}, "rows: a: expected settings, got 3"),
        ({"rows": [1]}, r"rows: expected names with settings, got \[1\]"),
        ({"rows": {"-": {}}}, "rows: expected names with letters or digits, got '-'"),
        ({"rows": {"a b": {}, "a-b": {}}}, "rows, groups: expected names that differ in letters and digits"),
        ({"rows": {"a": {}}, "baseline": "b"}, "baseline: expected one of a, got 'b'"),
        ({"rows": {"a": {}}, "seeds": []}, r"seeds: expected a list of different integers, got \[\]"),
        ({"rows": {"a": {}}, "seeds": [1, 1]}, "seeds: expected a list of different integers"),
        ({"rows": {"a": {}}, "seeds": [-1]}, "seeds: expected from 0 to"),
        ({"rows": {"a": {}, "b": {"test_images": 3}}}, "rows: expected the same images in all rows that are compared"),
        ({"rows": {"a": {}}, "repeats": 3}, "expected seeds, baseline, settings, groups and rows, got repeats"),
    ],
)
def test_bad_grids(tmp_path, contents, message):
    path = write_grid(tmp_path, **contents)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: {message}"):
        compare.read_grid(path, tmp_path, {})
    assert list(tmp_path.iterdir()) == [path]


def test_the_grids_of_the_package_are_valid(tmp_path):
    names = sorted(path.stem for path in compare.GRIDS.glob("*"))
    assert "paper" in names
    for name in names:
        grid = compare.read_grid(compare.find_grid(name), tmp_path, {})
        assert len({cell.run.path for cell in grid.cells}) == len(grid.cells) > 2
    with pytest.raises(ConfigError, match=r"grid: expected a \.toml or \.yaml file or one of digits, paper"):
        compare.find_grid("other")
