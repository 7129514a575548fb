# SPDX-License-Identifier: Apache-2.0
"""A run's folder: settings, checkpoint, metrics, evaluation, pictures. Files are replaced whole or not at all."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from .config import Config, resolve
from .data import Dataset, load
from .vae import VAE

TEMPORARY = ".tmp"


class RunError(RuntimeError):
    """A run folder that cannot be used. The message names the folder or file and says why."""


def atomic_write(path: Path, content: bytes) -> None:
    """Writes beside `path`, then renames: a reader sees the old file or the new one, also after a crash."""
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

    def create(self) -> None:
        """Makes the folder (which may exist, without a run in it) and saves the settings."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.checkpoint_path.exists():
                raise RunError(
                    f"{self.path}: already holds a run; continue it with `train --resume {self.path}`,"
                    " or choose another folder"
                )
            self.save_config()
        except OSError as error:
            raise RunError(f"{self.path}: the run folder cannot be written: {_reason(error)}") from error

    @classmethod
    def open(cls, path: Path) -> Run:
        if not (path / "config.yaml").exists():
            raise RunError(f"{path}: no run there (expected config.yaml, which `train` writes)")
        return cls(path, resolve(file=path / "config.yaml"))

    def save_config(self) -> None:
        """Also clears away what writers that were killed have left."""
        import yaml

        for leftover in self.path.glob(f".*{TEMPORARY}"):
            leftover.unlink()
        atomic_write(self.path / "config.yaml", yaml.safe_dump(self.config.to_dict(), sort_keys=False).encode())

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
        try:
            # weights_only: a checkpoint from elsewhere cannot execute code.
            state: dict[str, Any] = torch.load(self.checkpoint_path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or not {"step", "model", "optimizer"} <= state.keys():
                raise ValueError("it lacks step, model or optimizer")
        except Exception as error:  # torch.load has no error class of its own
            raise RunError(
                f"{self.checkpoint_path}: damaged, or no checkpoint of this program: {_reason(error)}"
            ) from error
        return state

    def load_data(self) -> Dataset:
        return load(self.config.data, self.config.data_seed)

    def load_model(self, data: Dataset) -> VAE:
        """The trained model, in eval mode; where a moving average of the parameters was kept, that one."""
        state = self.load_checkpoint()
        model = VAE(self.config, data.mean(), len(data.train))
        try:
            model.load_state_dict(state["average"] or state["model"])
        except (RuntimeError, KeyError) as error:
            raise RunError(
                f"{self.checkpoint_path}: does not fit {self.path / 'config.yaml'}: {_reason(error)}"
            ) from error
        return model.eval()

    def read_metrics(self) -> list[dict[str, Any]]:
        """The metrics' lines. A last line cut short by a crash is left out."""
        lines = []
        try:
            for line in self.metrics_path.read_text().splitlines():
                lines.append(json.loads(line))
        except (FileNotFoundError, json.JSONDecodeError):
            pass
        return lines

    def write_metrics(self, lines: list[dict[str, Any]]) -> None:
        atomic_write(self.metrics_path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def free_name(base: Path) -> Path:
    """`base`, or `base`-2, `base`-3, ... where that is taken."""
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
