# SPDX-License-Identifier: Apache-2.0
"""Tensors of seeds and betas are kept for later calls: no mode that a call is made in may leave a wrong one behind."""

import contextlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import gibbs_ext as gx
from gibbs_ext import arguments

PARAMETERS = torch.zeros(3), torch.zeros(2), torch.ones(3, 2)
NUMBERS = itertools.count(987_654_321)


class Zeros(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 0 if isinstance(result, Tensor) and result.dtype in (torch.int64, torch.float64) else result


def within(mode: contextlib.AbstractContextManager[Any]) -> Any:
    def run(call: Any) -> None:
        with mode, contextlib.suppress(ValueError):  # a meta tensor is refused
            call(torch.ones(3))

    return run


WAYS = {
    "plainly": lambda call: call(torch.ones(3)),
    "grad": lambda call: torch.func.grad(call)(torch.ones(3)),
    "jvp": lambda call: torch.func.jvp(call, (torch.ones(3),), (torch.ones(3),)),
    "functionalize": lambda call: torch.func.functionalize(call)(torch.ones(3)),
    "vmap": lambda call: torch.vmap(call)(torch.ones(2, 3)),
    "make_fx": lambda call: make_fx(call)(torch.ones(3)),
    "inference_mode": within(torch.inference_mode()),
    "fake": within(FakeTensorMode(allow_non_fake_inputs=True)),
    "function_mode": within(Zeros()),
    "meta": within(torch.device("meta")),
    "trace": lambda call: torch.jit.trace(call, (torch.ones(3),)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", WAYS)
def test_the_next_call_gets_plain_tensors(way: str) -> None:
    seed = next(NUMBERS)
    beta = 1 / seed * 1e9

    def call(factor: Tensor) -> Tensor:
        drawn, _ = gx.bipartite_gibbs(torch.zeros(5, 3), *PARAMETERS, 2, beta=beta, seed=seed)
        return (drawn * factor).sum()

    WAYS[way](call)
    for kept, value in ((arguments.as_seed("test", None, seed), seed), (arguments.as_beta("test", beta), beta)):
        assert type(kept) is Tensor
        assert not torch._C._functorch.is_functorch_wrapped_tensor(kept)
        assert not kept.is_inference()
        assert kept.item() == value


def test_they_are_kept() -> None:
    seed = next(NUMBERS)
    assert arguments.as_seed("test", None, seed) is arguments.as_seed("test", None, seed)
    assert arguments.as_beta("test", 0.625) is arguments.as_beta("test", 0.625)


def test_a_mutated_one_is_made_anew() -> None:
    seed = next(NUMBERS)
    parameters = [tensor.clone().requires_grad_() for tensor in PARAMETERS]

    def call() -> Tensor:
        left: Tensor = gx.bipartite_gibbs_relaxed(torch.zeros(5, 3), *parameters, 2, seed=seed)[0]
        return left

    first = call()
    for saved in first.grad_fn.saved_tensors:
        if saved is not None and saved.dtype in (torch.int64, torch.float64):
            saved.add_(1)
    assert call().equal(first)
