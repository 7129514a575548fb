# SPDX-License-Identifier: Apache-2.0
"""The device on which a program runs, and the processes that torchrun has started to share its work."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import gibbs_ext as gx

from .config import Config, ConfigError


def find_device(name: str) -> torch.device:
    """Returns the device that `auto`, `cpu`, `cuda` or `cuda:i` names, after trying it.

    `auto` is a GPU if there is one and gibbs_ext has kernels for it, else the CPU. Each process on a machine takes
    a GPU of its own if the name has no number.

    Raises:
        ConfigError: The name is none of these, or the device cannot be used.
    """
    kernels, is_any = gx.build_info()["cuda"], name == "auto"
    if is_any:
        name = "cuda" if torch.cuda.is_available() and kernels == "loaded" else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index is not None):
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:i, got {name!r}")
    if device.type == "cpu":
        return torch.device("cpu")
    if kernels != "loaded":
        raise ConfigError(f"device: {name} needs gibbs_ext's CUDA kernels: {kernels}")
    if not torch.cuda.is_available():
        raise ConfigError(f"device: {name} needs a GPU, PyTorch {torch.__version__} finds none")
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ConfigError(f"device: expected a GPU below cuda:{torch.cuda.device_count()}, got cuda:{index}")
    torch.cuda.set_device(index)
    device = torch.device("cuda", index)
    try:
        _try_kernels(device)
    except RuntimeError as error:
        if is_any:
            print(f"on the CPU, as {device} cannot be used: {error}", file=sys.stderr)
            return torch.device("cpu")
        raise ConfigError(f"device: {device} cannot be used: {error}") from error
    return device


def _try_kernels(device: torch.device) -> None:
    """Runs an op, which fails if the kernels were not compiled for this GPU."""
    unit = torch.zeros(1, device=device)
    gx.bipartite_gibbs(unit, unit, unit, torch.zeros(1, 1, device=device), 1, seed=0)
    gx.synchronize(device)


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Joins the processes that torchrun has started, if any, so that gx.distributed shares work among them."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield
        # A process that leaves while another still sends to it makes the other fail.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def agreed(value: Any) -> Any:
    """Returns the value of the first process in all processes. A collective call."""
    if gx.distributed.world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process. A collective call, which waits for the device."""
    if gx.distributed.world_size() == 1:
        return flag
    flags = torch.full((), int(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def require_shares(config: Config, *names: str) -> None:
    """Raises ConfigError if one of the named settings is smaller than the number of processes."""
    size = gx.distributed.world_size()
    for name in names:
        if getattr(config, name) < size:
            raise ConfigError(f"{name}: expected at least {size}, one for each process, got {getattr(config, name)}")


class _Sum(torch.autograd.Function):
    """Sums values over all processes, and their gradients in the backward pass."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


class SharedBatchNorm1d(nn.BatchNorm1d):
    """Batch normalisation [B, n] of a batch that is spread over processes. PyTorch's SyncBatchNorm needs a GPU."""

    def forward(self, values: Tensor) -> Tensor:
        if not self.training:
            return super().forward(values)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        sums = self._sums(values, values.new_full((1,), len(values)))
        count, mean = sums[-1], sums[:-1] / sums[-1]
        centred = values - mean
        var = self._sums(centred.square()) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        return centred * (var + self.eps).rsqrt() * self.weight + self.bias

    @staticmethod
    def _sums(values: Tensor, *more: Tensor) -> Tensor:
        total: Tensor = _Sum.apply(torch.cat([values.sum(0), *more]))  # type: ignore[no-untyped-call]
        return total


def share_batch_norms(model: nn.Module) -> None:
    """Makes the model's batch normalisations see the whole batch of all processes. Mutates the model."""
    for module in model.modules():
        if type(module) is nn.BatchNorm1d:
            module.__class__ = SharedBatchNorm1d
