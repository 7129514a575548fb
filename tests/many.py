# SPDX-License-Identifier: Apache-2.0
"""Runs a function in several processes, joined by torch.distributed (gloo), and returns what it returns in each."""

import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _work(rank: int, size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    try:
        torch.manual_seed(rank)  # so a program fails that relies on equal default generators
        Path(folder, f"{rank}").write_bytes(pickle.dumps(function(*args)))
        dist.barrier()
    except BaseException:
        dist.destroy_process_group()
        raise
    # The usual exit is avoided: PyTorch's threads sometimes abort the process there after DistributedDataParallel.
    os._exit(0)


def run(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function``, which is at the top level of a module, and its arguments are pickled. Errors are raised here."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (size, folder, function, args), size)
        return [pickle.loads(Path(folder, f"{rank}").read_bytes()) for rank in range(size)]
