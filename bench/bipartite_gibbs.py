# SPDX-License-Identifier: Apache-2.0
"""Binary sweeps. The peers work in place, in preallocated buffers, as a careful user of PyTorch or NumPy would."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

import gibbs_ext as gx

from . import limits
from .harness import Call, Case, benchmark_of, on_gpu, warm
from .peers import MOST_EDGES, thrml_gibbs
from .tables import OURS

Array = np.ndarray


def draws(models: int, chains: int, n1: int, n2: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random states [M, C, n1], biases [M, 1, n] ~ N(0, 1) and weights [M, n1, n2] ~ N(0, 2 / (n1 + n2))."""
    torch.manual_seed(1)
    left = torch.randint(2, (models, chains, n1)).float()
    weight = torch.randn(models, n1, n2) / ((n1 + n2) / 2) ** 0.5
    return left, torch.randn(models, 1, n1), torch.randn(models, 1, n2), weight


def one_model_or_many(left: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """The arguments of gibbs_ext's functions: [C, n] for one model, or [M, n] for models of one chain each."""
    if len(left) == 1:
        return left[0], *(p[0].squeeze(0) if p.shape[1] == 1 else p[0] for p in parameters)
    return left.squeeze(1), *(p.squeeze(1) for p in parameters)


def torch_sweeps(
    left: Tensor,
    left_bias: Tensor,
    right_bias: Tensor,
    weight: Tensor,
    num_sweeps: int,
    draw: Callable[[Tensor, Tensor], object],
) -> tuple[Tensor, Tensor]:
    """States [M, C, n] are of M models of C chains. At C = 1 matrix @ column is the faster product, see NOTES.md."""
    left, transposed = left.clone(), weight.mT.contiguous()
    right = left.new_empty(*left.shape[:-1], weight.shape[-1])
    p_left, p_right = torch.empty_like(left), torch.empty_like(right)
    for _ in range(num_sweeps):
        torch.baddbmm(right_bias.mT, transposed, left.mT, out=p_right.mT)
        draw(p_right.sigmoid_(), right)
        torch.baddbmm(left_bias.mT, weight, right.mT, out=p_left.mT)
        draw(p_left.sigmoid_(), left)
    return left, right


def rand(p: Tensor, out: Tensor) -> None:
    torch.lt(torch.rand(p.shape, device=p.device), p, out=out)


def bernoulli(p: Tensor, out: Tensor) -> None:
    torch.bernoulli(p, out=out)


def half_sweep(given: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    p = torch.sigmoid(torch.baddbmm(bias, given, matrix))
    return (torch.rand_like(p) < p).to(p.dtype)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def compiled_sweeps(
    left: Tensor, left_bias: Tensor, right_bias: Tensor, weight: Tensor, num_sweeps: int
) -> tuple[Tensor, Tensor]:
    """Does the same as torch_sweeps, with half a sweep compiled by torch.compile."""
    transposed, right = weight.mT.contiguous(), left
    for _ in range(num_sweeps):
        right = compiled(half_sweep)(left, weight, right_bias)
        left = compiled(half_sweep)(right, transposed, left_bias)
    return left, right


def numpy_sweeps(
    left: Array, left_bias: Array, right_bias: Array, weight: Array, num_sweeps: int, rng: np.random.Generator
) -> tuple[Array, Array]:
    left, transposed = left.copy(), np.ascontiguousarray(weight.swapaxes(-1, -2))
    right = np.empty((*left.shape[:-1], weight.shape[-1]), np.float32)

    def update(state: Array, matrix: Array, given: Array, bias: Array, p: Array, u: Array) -> None:
        # u < 1 / (1 + exp(-field)), without the division
        np.matmul(matrix, given.swapaxes(-1, -2), out=p.swapaxes(-1, -2))
        p += bias
        np.exp(np.negative(p, out=p), out=p)
        p += 1
        p *= rng.random(dtype=np.float32, out=u)
        np.less(p, 1, out=state)

    on_left = np.empty_like(left), np.empty_like(left)
    on_right = np.empty_like(right), np.empty_like(right)
    for _ in range(num_sweeps):
        update(right, transposed, left, right_bias, *on_right)
        update(left, weight, right, left_bias, *on_left)
    return left, right


def rbms_sweeps(inputs: tuple[Tensor, ...], num_sweeps: int) -> Call:
    """Samples with rbms, one model."""
    from rbms.bernoulli_bernoulli.classes import BBRBM
    from rbms.sampling.gibbs import sample_state

    left, left_bias, right_bias, weight = (t[0] for t in inputs)
    model = BBRBM(weight, left_bias[0], right_bias[0])
    chains = model.init_chains(len(left), start_v=left)

    def run() -> tuple[Tensor, Tensor]:
        found = sample_state(num_sweeps, dict(chains), model)
        return found["visible"], found["hidden"]

    return warm(warm(run))  # its functions are scripts, which are compiled in the first calls


def sklearn_sweeps(inputs: tuple[Tensor, ...], num_sweeps: int) -> Call:
    """Samples with scikit-learn, one model in float32, its faster type. It returns the left units alone."""
    from sklearn.neural_network import BernoulliRBM

    left, left_bias, right_bias, weight = (t[0].numpy() for t in inputs)
    model = BernoulliRBM(weight.shape[1], random_state=1)
    model.components_ = np.asfortranarray(weight.T)
    model.intercept_visible_, model.intercept_hidden_ = left_bias[0], right_bias[0]

    def run() -> tuple[Array]:
        v = left
        for _ in range(num_sweeps):
            v = model.gibbs(v)
        return (v,)

    return run


def thrml_sweeps(inputs: tuple[Tensor, ...], num_sweeps: int) -> Call:
    """Samples with thrml: one model with many chains, or one chain of each of many models."""
    n1, n2 = inputs[-1].shape[1:]
    left, left_bias, right_bias, weight = one_model_or_many(*inputs)
    edges = torch.cartesian_prod(torch.arange(n1), torch.arange(n1, n1 + n2))
    h, J, _offset = gx.boltzmann_to_ising(torch.cat([left_bias, right_bias], -1), weight.flatten(-2), edges)
    start = torch.cat([left, torch.zeros(len(left), n2)], -1)
    run = thrml_gibbs([range(n1, n1 + n2), range(n1)], edges, h, J, start, num_sweeps, 1.0)
    return lambda: np.split(run(), [n1], 1)


def statistics(inputs: tuple[Tensor, ...], returned: tuple[Any, ...]) -> list[Tensor]:
    """Free energies of the left units and the share of them that is 1, of all chains."""
    left_bias, right_bias, weight = inputs[1:]
    left = torch.as_tensor(returned[0]).float().reshape(len(weight), -1, weight.shape[1])
    free_energy = -(left * left_bias).sum(-1) - softplus(left @ weight + right_bias).sum(-1)
    return [free_energy, left.mean(-1)]


def case(models: int, chains: int, n1: int, n2: int, num_sweeps: int) -> Case:
    """A case of `models` models with `chains` chains each."""

    def ours(inputs: tuple[Tensor, ...]) -> Call:
        arguments = one_model_or_many(*inputs)
        return lambda: gx.bipartite_gibbs(*arguments, num_sweeps, seed=1)

    def with_numpy(inputs: tuple[Tensor, ...]) -> Call:
        arrays = [t.numpy() for t in inputs]
        rng = np.random.default_rng(1)
        return lambda: numpy_sweeps(*arrays, num_sweeps, rng)

    contenders: dict[str, Callable[[tuple[Tensor, ...]], Call]] = {
        OURS: ours,
        "PyTorch, rand": lambda inputs: lambda: torch_sweeps(*inputs, num_sweeps, rand),
        "PyTorch, bernoulli": lambda inputs: lambda: torch_sweeps(*inputs, num_sweeps, bernoulli),
        "torch.compile": lambda inputs: warm(lambda: compiled_sweeps(*inputs, num_sweeps)),
    }
    if not on_gpu():
        contenders["NumPy"] = with_numpy
        if models == 1:  # for one model at a time
            contenders["scikit-learn"] = lambda inputs: sklearn_sweeps(inputs, num_sweeps)
            contenders["rbms"] = lambda inputs: rbms_sweeps(inputs, num_sweeps)
        if n1 * n2 <= MOST_EDGES:
            contenders["thrml"] = lambda inputs: thrml_sweeps(inputs, num_sweeps)
    what = f"{models} models" if models > 1 else f"shared weight, {chains} chains"
    return Case(
        f"{what}, {n1}+{n2}, {num_sweeps} sweeps",
        lambda: draws(models, chains, n1, n2),
        contenders,
        updates=models * chains * (n1 + n2) * num_sweeps,
        work=limits.bipartite(models, chains, n1, n2, num_sweeps),
        statistics=statistics,
    )


def cases() -> Iterator[Case]:
    if on_gpu():  # the problems of bench/cuda_report.py
        yield case(128, 1, 100, 100, 100)
        yield case(4096, 1, 200, 200, 100)
        yield case(1, 1024, 784, 500, 100)
        yield case(1, 65536, 784, 500, 100)
        return
    for num_sweeps in (50, 10):
        yield case(128, 1, 100, 100, num_sweeps)
        yield case(128, 1, 200, 200, num_sweeps)
    yield case(32, 1, 784, 500, 50)
    yield case(1, 1024, 200, 200, 100)
    yield case(1, 512, 784, 500, 10)


bipartite_gibbs = benchmark_of(cases, "bipartite_gibbs")
