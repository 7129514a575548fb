# SPDX-License-Identifier: Apache-2.0
"""A run's folder: settings, checkpoint, metrics, evaluation, pictures. Files are replaced whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import io
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from .config import Config, resolve
from .data import Dataset, load
from .vae import VAE

TEMPORARY = ".tmp"
DAMAGED = "damaged, or no file of this program"
CHECKPOINT: dict[str, Any] = {"step": int, "model": dict, "average": (dict, type(None)), "optimizer": dict}


class RunError(RuntimeError):
    """A run folder that cannot be used. The message names the folder or file and says why."""


class Diverged(RunError):
    """A training whose loss or parameters became infinite or NaN."""


@contextmanager
def blaming(path: Path, problem: str, errors: type[Exception] = Exception) -> Iterator[None]:
    """Turns each exception inside into a RunError that names `path` and `problem`."""
    try:
        yield
    except RunError:
        raise
    except errors as error:
        raise RunError(f"{path}: {problem}: {_reason(error)}") from error


def atomic_write(path: Path, content: bytes) -> None:
    """Writes the file whole or not at all: a reader sees the old file or the new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class Run:
    """The folder of one training run."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config
        self.checkpoint_path = path / "checkpoint.pt"
        self.metrics_path = path / "metrics.jsonl"
        self.evaluation_path = path / "evaluation.json"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Makes the folder if it is missing, and keeps other processes from training there while this one does."""
        path = self.path / "train.lock"
        with self.writing():
            self.path.mkdir(parents=True, exist_ok=True)
            path.touch()
        with open(path, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(f"{self.path}: another process is training there") from error
            yield

    def create(self) -> None:
        """Saves the settings in the folder, which must not hold a run."""
        if self.checkpoint_path.exists():
            raise RunError(
                f"{self.path}: already holds a run; continue it with `train --resume {self.path}`,"
                " or choose another folder"
            )
        with self.writing():
            self.save_config()

    @classmethod
    def open(cls, path: Path) -> Run:
        if not (path / "config.yaml").exists():
            raise RunError(f"{path}: no run there (expected config.yaml, which `train` writes)")
        return cls(path, resolve(file=path / "config.yaml"))

    def save_config(self) -> None:
        """Saves the settings, and removes temporary files that killed processes have left."""
        import yaml

        for leftover in self.path.glob(f".*{TEMPORARY}"):
            leftover.unlink()
        atomic_write(self.path / "config.yaml", yaml.safe_dump(self.config.to_dict(), sort_keys=False).encode())

    def writing(self) -> AbstractContextManager[None]:
        return blaming(self.path, "the run folder cannot be written", OSError)

    def fitting(self) -> AbstractContextManager[None]:
        return blaming(self.checkpoint_path, f"does not fit {self.path / 'config.yaml'}")

    def check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise RunError(
                f"{self.path}: the disk is full: training needs about {needed / 1e6:.0f} MB there,"
                f" {free / 1e6:.0f} MB are free"
            )

    def save_checkpoint(self, state: dict[str, Any]) -> int:
        """Returns the checkpoint's size in bytes."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        try:
            atomic_write(self.checkpoint_path, buffer.getvalue())
        except OSError as error:
            reason = f"the checkpoint cannot be written ({_reason(error)}); an earlier one is untouched"
            raise RunError(f"{self.checkpoint_path}: {reason}") from error
        return buffer.tell()

    def load_checkpoint(self) -> dict[str, Any]:
        if not self.checkpoint_path.exists():
            raise RunError(f"{self.checkpoint_path}: no such file; the run has no checkpoint")
        with blaming(self.checkpoint_path, DAMAGED):
            # weights_only: a checkpoint from elsewhere cannot execute code.
            state: dict[str, Any] = torch.load(self.checkpoint_path, map_location="cpu", weights_only=True)
            for name, kind in CHECKPOINT.items():
                if not isinstance(state[name], kind):
                    raise TypeError(f"{name} is of type {type(state[name]).__name__}")
        return state

    def load_data(self) -> Dataset:
        return load(self.config.data, self.config.data_seed)

    def load_model(self, data: Dataset, state: dict[str, Any] | None = None) -> VAE:
        """The trained model in eval mode, with the moving average of the parameters if there is one."""
        state = state or self.load_checkpoint()
        model = VAE(self.config, data.mean(), len(data.train))
        with self.fitting():
            # The chains come from the model, because an average holds none.
            model.load_state_dict(state["model"] | (state["average"] or {}))
        return model.eval()

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of the metrics. A last line that a crash has cut short is left out."""
        if not self.metrics_path.exists():
            return []
        with blaming(self.metrics_path, DAMAGED):
            *lines, last = self.metrics_path.read_text().split("\n")
            metrics = [json.loads(line) for line in lines]
            with suppress(json.JSONDecodeError):
                metrics.append(json.loads(last))
            for line in metrics:
                if not isinstance(line, dict) or not {"step", "elbo"} <= line.keys():
                    raise ValueError(f"expected lines with step and elbo, got {line}")
                if not all(isinstance(value, (int, float)) for value in line.values()):
                    raise ValueError(f"expected numbers, got {line}")
        return metrics

    def write_metrics(self, lines: list[dict[str, Any]]) -> None:
        atomic_write(self.metrics_path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def new_folder(base: Path) -> Path:
    """Makes the folder `base`, or `base`-2, `base`-3, ... if it exists. Two processes never get the same folder."""
    with blaming(base, "the run folder cannot be written", OSError):
        base.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            path = base if number == 1 else base.with_name(f"{base.name}-{number}")
            with suppress(FileExistsError):
                path.mkdir()
                break
    return path


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    return (str(error).splitlines() or [type(error).__name__])[0]
