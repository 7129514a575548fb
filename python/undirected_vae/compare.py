# SPDX-License-Identifier: Apache-2.0
"""A grid of runs: settings times seeds, trained and evaluated in parallel, in one table and one plot.

A grid is a TOML or YAML file::

    seeds: [0, 1, 2]
    baseline: none                    # each row's difference to this row is reported; the first row by default
    settings: {preset: paper-mnist-200, steps: 50000}
    groups:                           # optional; each group has a table of its own
      32 + 32: {left: 32, right: 32}
    rows:
      none: {coupling: none}
      per sample: {coupling: per_sample}

Each cell is a run in FOLDER/group/row/seed, trained by a process of its own with one thread. A run that was cut short
goes on from its checkpoint, and a cell that is done is never made again.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from .config import EVALUATION, MAX_SEED, ConfigError, checked, read_file, resolve
from .data import load
from .evaluate import compare as paired_difference
from .evaluate import looseness_change, saved, settings
from .runs import Run, RunError, atomic_write, blaming

GRIDS = Path(__file__).parent / "grids"
POLL = 0.5  # seconds between two looks at the processes
DIVERGED = 3  # exit status of a training that diverged
# Settings that change no result of a cell.
BOOKKEEPING = ("log_every", "validate_every", "checkpoint_every")


@dataclass(frozen=True)
class Cell:
    group: str
    row: str
    run: Run

    @property
    def name(self) -> str:
        return " / ".join(part for part in (self.group, self.row, f"seed {self.run.config.seed}") if part)

    @property
    def failure(self) -> Path:
        return self.run.path / "failed.json"

    def result(self) -> dict[str, Any] | None:
        """The cell's evaluation if it is done."""
        config = self.run.config
        result = saved(self.run, "test", config.steps)
        return result if result and result["settings"] == settings(config) else None

    def has_diverged(self) -> bool:
        return self.failure.exists()

    def steps(self) -> int:
        """The number of steps that the metrics show."""
        try:
            with open(self.run.metrics_path, "rb") as file:
                file.seek(max(0, os.path.getsize(self.run.metrics_path) - 4096))
                return max((int(step) for step in re.findall(rb'"step": (\d+)', file.read())), default=0)
        except OSError:
            return 0

    def check(self) -> None:
        """Raises RunError if the folder holds a run of other settings."""
        if not (self.run.path / "config.yaml").exists():
            return
        before, now = Run.open(self.run.path).config.to_dict(), self.run.config.to_dict()
        changed = [name for name in now if name not in (*EVALUATION, *BOOKKEEPING) and before[name] != now[name]]
        if changed:
            values = ", ".join(f"{name} {before[name]} (the grid: {now[name]})" for name in changed)
            raise RunError(f"{self.run.path}: holds a run of other settings: {values}; choose another --folder")


@dataclass(frozen=True)
class Grid:
    baseline: str
    rows: tuple[str, ...]
    groups: tuple[str, ...]
    cells: tuple[Cell, ...]  # in the order in which they are made: all rows of a seed come before the next seed


def find_grid(name: str) -> Path:
    """The file that is named, or the file of a grid that comes with the package."""
    shipped = sorted(path.stem for path in GRIDS.glob("*.yaml"))
    if name in shipped:
        return GRIDS / f"{name}.yaml"
    if not Path(name).exists():
        raise ConfigError(f"grid: expected a .toml or .yaml file or one of {', '.join(shipped)}, got {name!r}")
    return Path(name)


def read_grid(path: Path, folder: Path, flags: Mapping[str, Any], baseline: str | None = None) -> Grid:
    """Reads a grid; `flags` are settings of all cells, and they and `baseline` stand above those of the file.

    Raises:
        ConfigError: The file is damaged, or a name or a value in it is unknown; the message names the cell.
    """
    contents = read_file(path)
    unknown = sorted(set(contents) - {"seeds", "baseline", "settings", "groups", "rows"})
    if unknown:
        raise ConfigError(f"{path}: expected seeds, baseline, settings, groups and rows, got {', '.join(unknown)}")
    seeds = contents.get("seeds", [0, 1, 2])
    if not isinstance(seeds, list) or not seeds or len(set(map(str, seeds))) < len(seeds):
        raise ConfigError(f"{path}: seeds: expected a list of different integers, got {seeds!r}")
    seeds = [checked(f"{path}: seeds", seed, int, 0, MAX_SEED) for seed in seeds]
    rows, groups = _tables(path, "rows", contents), _tables(path, "groups", contents) or {"": {}}
    if not rows:
        raise ConfigError(f"{path}: rows: expected at least one row, got none")
    baseline = baseline or str(contents.get("baseline", next(iter(rows))))
    if baseline not in tuple(rows):
        raise ConfigError(f"{path}: baseline: expected one of {', '.join(rows)}, got {baseline!r}")
    common = _settings(path, "settings", contents.get("settings", {}))
    cells = []
    for seed in seeds:
        for group, of_group in groups.items():
            for row, of_row in rows.items():
                place = " / ".join(part for part in (group, row) if part)
                try:
                    merged = {**common, **of_group, **of_row, **flags, "seed": seed}
                    config = resolve(merged.pop("preset", None), None, merged)
                except ConfigError as error:
                    raise ConfigError(f"{path}: {place}: {error}") from error
                parts = [slug(part) for part in (group, row) if part]
                cells.append(Cell(group, row, Run(folder.joinpath(*parts, f"seed-{seed}"), config)))
    folders = [cell.run.path for cell in cells]
    if len(set(folders)) < len(folders):
        raise ConfigError(f"{path}: rows, groups: expected names that differ in letters and digits, got {list(rows)}")
    for group in groups:
        images = {
            (c.run.config.data, c.run.config.data_seed, c.run.config.test_images) for c in cells if c.group == group
        }
        if len(images) > 1:
            found = "; ".join(f"data {data}, data_seed {seed}, test_images {count}" for data, seed, count in images)
            raise ConfigError(f"{path}: rows: expected the same images in all rows that are compared, got {found}")
    return Grid(baseline, tuple(rows), tuple(groups), tuple(cells))


def slug(name: str) -> str:
    """The name as a folder's name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


def _tables(path: Path, name: str, contents: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    tables = contents.get(name, {})
    if not isinstance(tables, dict):
        raise ConfigError(f"{path}: {name}: expected names with settings, got {tables!r}")
    for key in tables:
        if not slug(str(key)):
            raise ConfigError(f"{path}: {name}: expected names with letters or digits, got {key!r}")
    return {str(key): _settings(path, f"{name}: {key}", value) for key, value in tables.items()}


def _settings(path: Path, name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {name}: expected settings, got {value!r}")
    if "seed" in value:
        raise ConfigError(f"{path}: {name}: seed: expected no seed here (the grid has seeds), got {value['seed']!r}")
    return {str(key).replace("-", "_"): item for key, item in value.items()}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps other processes from comparing there while this one does."""
    with blaming(folder, "the folder of the grid cannot be written", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "grid.lock", "a")  # noqa: SIM115
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{folder}: another process is comparing there") from error
        yield


def compare(grid: Grid, folder: Path, num_processes: int, retry: bool = False) -> int:
    """Makes all cells that are not done, and writes the tables and the plot whenever one is.

    Returns the number of cells that could not be made for another reason than divergence.

    Raises:
        RunError, DataError: A cell's folder holds a run of other settings, or the images cannot be read.
        KeyboardInterrupt: Ctrl-C or SIGTERM came. The cells in progress have saved checkpoints.
    """
    for cell in grid.cells:
        cell.check()
    for source, seed in {(cell.run.config.data, cell.run.config.data_seed): None for cell in grid.cells}:
        load(source, seed)  # one error now in place of one for each cell
    waiting = [cell for cell in grid.cells if not cell.result() and (retry or not cell.has_diverged())]
    write_tables(grid, folder)
    running: dict[Cell, tuple[subprocess.Popen[bytes], TextIO]] = {}
    num_failed = 0
    total = sum(cell.run.config.steps for cell in waiting)
    done = 0
    is_terminal = sys.stderr.isatty()
    with (
        _termination(),
        tqdm(total=total, unit="step", dynamic_ncols=True, mininterval=0.5 if is_terminal else 60) as progress,
    ):
        try:
            while waiting or running:
                while waiting and len(running) < num_processes:
                    cell = waiting.pop(0)
                    running[cell] = _start(cell)
                time.sleep(POLL)
                for cell, (process, log) in list(running.items()):
                    if process.poll() is None:
                        continue
                    log.close()
                    del running[cell]
                    done += cell.run.config.steps
                    num_failed += _finish(cell, process.returncode, progress)
                    write_tables(grid, folder)
                steps = sum(min(cell.steps(), cell.run.config.steps) for cell in running)
                progress.set_postfix_str(", ".join(cell.name for cell in running), refresh=False)
                progress.update(max(0, done + steps - progress.n))
        finally:
            _stop(running)
    return num_failed


def _start(cell: Cell) -> tuple[subprocess.Popen[bytes], TextIO]:
    """Starts the cell's process, which goes on from a checkpoint if there is one. Its messages go to a file."""
    run = cell.run
    with run.writing():
        run.path.mkdir(parents=True, exist_ok=True)
        cell.failure.unlink(missing_ok=True)
        import yaml

        settings = run.path / "cell.yaml"
        atomic_write(settings, yaml.safe_dump(run.config.to_dict(), sort_keys=False).encode())
        log = open(run.path / "log.txt", "a")  # noqa: SIM115
    where = "--resume" if run.checkpoint_path.exists() else "--run"
    command = [sys.executable, "-m", "undirected_vae", "train", where, str(run.path), "--config", str(settings)]
    process = subprocess.Popen(
        [*command, "--device", "cpu"],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the others
        preexec_fn=die_with_parent,
    )
    return process, log


def die_with_parent() -> None:
    """Makes the kernel send SIGTERM to this process when its parent dies: it then saves a checkpoint and leaves."""
    set_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)


def _finish(cell: Cell, status: int, progress: Any) -> bool:
    """Reports a cell whose process has ended; returns whether it failed for another reason than divergence."""
    result = cell.result()
    if status == 0 and result:
        progress.write(f"{cell.name}: NLL {result['nll']:.2f}, ELBO {result['elbo']:.2f}", file=sys.stderr)
        return False
    lines = (cell.run.path / "log.txt").read_text(errors="replace").strip().split("\n")
    reason = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
    if status == DIVERGED:
        with cell.run.writing():
            atomic_write(cell.failure, json.dumps({"error": reason}).encode())
        progress.write(f"{cell.name}: diverged ({reason})", file=sys.stderr)
        return False
    progress.write(f"{cell.name}: failed with status {status} ({reason}); see {cell.run.path / 'log.txt'}", sys.stderr)
    return True


def _stop(running: Mapping[Cell, tuple[subprocess.Popen[bytes], TextIO]]) -> None:
    """Lets the processes save their checkpoints and waits for them."""
    for process, _ in running.values():
        process.terminate()
    for process, log in running.values():
        process.wait()
        log.close()


@contextmanager
def _termination() -> Iterator[None]:
    """Turns SIGTERM into KeyboardInterrupt."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# Tables -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """The figures of a row of a group, in nats. Errors are standard errors; NaN stands for what cannot be known."""

    group: str
    row: str
    num_seeds: int  # seeds that are done
    num_diverged: int
    nll: float  # mean over seeds
    nll_error: float  # over seeds
    elbo: float
    elbo_error: float
    difference: float  # NLL minus that of the baseline, mean over the seeds that both have
    difference_error: float  # over seeds
    paired_error: float  # over images, of the mean over seeds
    looseness: float  # of the importance-weighted bound, mean over seeds
    change: float  # what ten times the samples would add to the difference, mean over seeds and the images checked
    change_error: float  # over images, of the mean over seeds
    is_loose: bool  # whether the looseness of the row or of the baseline is not known to be below a tenth of difference
    effective_samples: float  # effective number of the bound's samples, median over images, mean over seeds
    num_failed: int  # images and seeds for which the annealing to the posterior failed


def summarise(grid: Grid) -> list[Summary]:
    results = {(cell.group, cell.row, cell.run.config.seed): cell.result() for cell in grid.cells}
    diverged = [(cell.group, cell.row) for cell in grid.cells if cell.has_diverged()]
    seeds = sorted({cell.run.config.seed for cell in grid.cells})
    summaries = []
    for group in grid.groups:
        for row in grid.rows:
            found = {seed: result for seed in seeds if (result := results[group, row, seed])}
            pairs = [
                (result, other) for seed, result in found.items() if (other := results[group, grid.baseline, seed])
            ]
            has_pairs = row != grid.baseline and pairs
            paired = [paired_difference(result, other) for result, other in pairs]
            difference = mean_and_error([pair["difference"] for pair in paired]) if has_pairs else (math.nan, math.nan)
            # A loose bound of the baseline flatters the row, so the looser one of the two counts.
            looseness = sum(pair["looseness"] for pair in paired) / max(1, len(paired))
            changes = [looseness_change(result, other).numpy() for result, other in pairs]
            is_checked = has_pairs and len({len(change) for change in changes}) == 1
            of_images = [np.subtract(other["log_likelihood"], result["log_likelihood"]) for result, other in pairs]
            summaries.append(
                Summary(
                    group,
                    row,
                    len(found),
                    diverged.count((group, row)),
                    *mean_and_error([result["nll"] for result in found.values()]),
                    *mean_and_error([result["elbo"] for result in found.values()]),
                    *difference,
                    mean_and_error(list(np.mean(of_images, 0)))[1] if has_pairs else math.nan,
                    mean_and_error([result.get("looseness", math.nan) for result in found.values()])[0],
                    *(mean_and_error(list(np.mean(changes, 0))) if is_checked else (math.nan, math.nan)),
                    bool(has_pairs) and not looseness <= abs(difference[0]) / 10,
                    mean_and_error([float(np.median(result["effective_sample_size"])) for result in found.values()])[0],
                    sum(result.get("annealing", {}).get("failed", 0) for result in found.values()),
                )
            )
    return summaries


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, which needs two values; NaN stands for what cannot be known."""
    if not values:
        return math.nan, math.nan
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.nan


COLUMNS = {
    "row": "posterior",
    "num_seeds": "seeds",
    "nll": "test NLL (nats)",
    "elbo": "ELBO",
    "difference": "minus {baseline}: over seeds",
    "paired_error": "over images",
    "looseness": "looseness",
    "change": "10 times the samples would change that by",
    "effective_samples": "effective samples",
    "num_failed": "AIS failed",
}


def markdown(grid: Grid) -> str:
    """One table for each group, with a line that explains its columns."""
    summaries = summarise(grid)
    parts = []
    for group in grid.groups:
        rows = [summary for summary in summaries if summary.group == group]
        titles = [title.format(baseline=grid.baseline) for title in COLUMNS.values()]
        lines = [titles, ["---"] * len(titles), *([*_entries(row)] for row in rows)]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append(f"### {group}\n\n{table}" if group else table)
    note = (
        '`+-` is a standard error: over seeds, except in the column "over images", where it is that of the paired '
        "difference on the same images (mean over seeds). Looseness is the mean, over some images, of the bound with "
        "ten times as many samples minus the bound itself; a star marks a difference of which a tenth is not above the "
        "looseness of both rows. Ten times as many samples would change the difference by what stands beside it, with "
        "the standard error over the images. Effective samples are those of the bound's weights, for the median image. "
        "AIS failed for that many images, of all seeds together."
    )
    return "\n\n".join([*parts, note]) + "\n"


def _entries(row: Summary) -> Iterator[str]:
    def number(value: float, form: str = ".2f") -> str:
        return "" if math.isnan(value) else format(value, form)

    def with_error(value: float, error: float, form: str = ".2f") -> str:
        return number(value, form) + ("" if math.isnan(error) else f" +- {error:{form.lstrip('+')}}")

    yield row.row
    yield f"{row.num_seeds}" + (f", {row.num_diverged} diverged" if row.num_diverged else "")
    yield with_error(row.nll, row.nll_error)
    yield with_error(row.elbo, row.elbo_error)
    yield with_error(row.difference, row.difference_error, "+.2f") + ("*" if row.is_loose else "")
    yield number(row.paired_error)
    yield number(row.looseness, ".3f")
    yield with_error(row.change, row.change_error, "+.3f")
    yield number(row.effective_samples, ".0f")
    yield str(row.num_failed)


def write_tables(grid: Grid, folder: Path) -> list[Path]:
    """Writes table.md, table.csv (a line for each row), cells.csv (a line for each cell) and comparison.png."""
    import csv
    import io
    from dataclasses import asdict, fields

    from . import pictures

    def as_csv(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bytes:
        text = io.StringIO()
        writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()

    summaries = summarise(grid)
    of_result = (
        *("nll", "nll_standard_error", "nll_plain", "nll_plain_is_wrong", "elbo", "samples"),
        *("looseness", "looseness_standard_error", "looseness_is_reached", "effective_sample_size_min"),
        *("log_partition", "log_partition_standard_error", "images", "step"),
    )
    cells = [
        {"group": cell.group, "row": cell.row, "seed": cell.run.config.seed, "state": "done"} | result
        if (result := cell.result())
        else {"group": cell.group, "row": cell.row, "seed": cell.run.config.seed}
        | {"state": "diverged" if cell.has_diverged() else "open"}
        for cell in grid.cells
    ]
    contents = {
        "table.md": markdown(grid).encode(),
        "table.csv": as_csv([field.name for field in fields(Summary)], [asdict(summary) for summary in summaries]),
        "cells.csv": as_csv(["group", "row", "seed", "state", *of_result], cells),
    }
    with blaming(folder, "the folder of the grid cannot be written", OSError):
        for name, content in contents.items():
            atomic_write(folder / name, content)
        # A row without a seed in common with the baseline has no difference to show.
        done = [
            row for row in summaries if row.num_seeds and (row.row == grid.baseline or not math.isnan(row.difference))
        ]
        panels: dict[str, list[tuple[str, float, float]]] = {row.group: [] for row in done or summaries}
        for row in done:
            panels[row.group].append((row.row, row.difference, row.difference_error))
        label = f"test NLL minus that of {grid.baseline} [nats]\nbars: standard error over two seeds or more"
        picture = pictures.differences(folder / "comparison.png", panels, label)
    return [*(folder / name for name in contents), picture]
