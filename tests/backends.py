# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of the ops on another backend: each call of an op is sent there, and its results come back.

A backend is a function (op, arguments) -> results that stands in for :func:`gibbs_ext.ops._call`.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import graph_support
import pytest
import torch
from torch import Tensor

from gibbs_ext import _C, ops

sys.path.insert(0, str(Path(__file__).parent / "cuda"))
from compare import BIPARTITE_ROUTES as BIPARTITE_ROUTES
from compare import GRAPH_ROUTES as GRAPH_ROUTES

import build

call_on_cpu = ops._call


@functools.cache
def emulated_library() -> Any:
    return _C.load_cuda(str(build.emulated_ops()))


def call_emulated(op: Any, *args: Any) -> Any:
    """The CUDA kernels, run by the host emulator on CPU tensors."""
    emulated_library()
    name = op._schema.name.removeprefix("gibbs_ext::")
    return call_on_cpu(getattr(torch.ops.gibbs_ext_emulated, name).default, *args)


def to_device(value: Any, device: str) -> Any:
    """Moves a tensor to the device with the same strides; returns anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    return whole.to(device).as_strided(value.size(), value.stride(), value.storage_offset())


def call_on_gpu(op: Any, *args: Any) -> Any:
    """The CUDA kernels on a GPU. beta and seed stay on the CPU, as they do when a user gives numbers."""
    names = [argument.name for argument in op._schema.arguments]
    stay = ("beta", "betas", "seed")
    moved = [value if name in stay else to_device(value, "cuda") for name, value in zip(names, args, strict=True)]
    results = call_on_cpu(op, *moved)
    return results.cpu() if isinstance(results, Tensor) else tuple(result.cpu() for result in results)


def send_ops(call: Callable[..., Any], set_route: Callable[[str], None], patch: pytest.MonkeyPatch) -> None:
    """Sends calls of ops to another backend during a test. Names of routes then mean the routes of that backend."""
    patch.setattr(ops, "_call", call)
    patch.setattr(ops, "set_instruction_set", lambda name: None)
    patch.setattr(ops, "set_graph_route", set_route)
    ways = [("auto", route) for route in GRAPH_ROUTES]
    patch.setattr(graph_support, "WAYS_OF", dict.fromkeys(graph_support.WAYS_OF, ways))


def tests_of(modules: Sequence[ModuleType], unfit: Callable[[str, str], bool]) -> dict[str, Any]:
    """Test functions and fixtures of other modules, with the module in each name, without those that are ``unfit``."""
    found = {}
    for module in modules:
        for name, value in vars(module).items():
            if name.startswith("test_") and callable(value) and not unfit(module.__name__, name):
                found[f"{module.__name__}__{name.removeprefix('test_')}"] = value
            elif type(value).__name__ == "FixtureFunctionDefinition":
                found[name] = value
    return found
