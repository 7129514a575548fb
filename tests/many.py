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
        torch.manual_seed(rank)  # who relies on the default generators of all being alike is found out
        Path(folder, f"{rank}").write_bytes(pickle.dumps(function(*args)))
        dist.barrier()
    except BaseException:
        dist.destroy_process_group()
        raise
    # Not by the usual way out: there PyTorch's threads abort the process now and then, after DistributedDataParallel.
    os._exit(0)


def run(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function``, of a module's top level, and its arguments are pickled. An error in one process is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (size, folder, function, args), size)
        return [pickle.loads(Path(folder, f"{rank}").read_bytes()) for rank in range(size)]
