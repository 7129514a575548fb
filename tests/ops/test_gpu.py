# SPDX-License-Identifier: Apache-2.0
"""Tests on a GPU (make gpu): the tests of the ops, and tests of streams, CUDA graphs and late faults.

Without a GPU they are skipped, or fail if GIBBS_REQUIRE_CUDA=1. A process decides once whether calls wait for their
kernels. The tests of the ops need that, to see the faults of each call: they run with GIBBS_CUDA_SYNCHRONOUS=1, and all
others run without. As a program, this file runs small problems for compute-sanitizer; its arguments are the name of a
route and the number of sizes.
"""

import contextlib
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# compute-sanitizer runs this file as a program.
sys.path.append(str(Path(__file__).parents[1]))

import backends
import many
import pytest
import torch
from backends import BIPARTITE_ROUTES, GRAPH_ROUTES, call_on_cpu, call_on_gpu, to_device
from graph_support import GRAPH_BROADCASTS, graph_named, random_graph_parameters
from support import (
    BROADCASTS,
    RELAXATIONS,
    assert_bits,
    assert_close,
    assert_same_bits,
    awkward,
    random_bits,
    random_parameters,
)
from test_cuda_emulated import MODULES, unfit
from torch import Tensor
from torch.utils._triton import has_triton

import gibbs_ext
from bench.harness import as_cuda_graph
from gibbs_ext import ops

try:
    import deviceless

    TRAININGS = [*deviceless.CONFIGS]
except ModuleNotFoundError:  # the packages of training are missing
    TRAININGS = []

gx: Any = gibbs_ext  # mypy does not know how many arguments are unpacked from a list
ROOT = Path(__file__).parents[2]
DEVICE = "cuda"
ERRORS = (TypeError, ValueError, RuntimeError)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The GPU is busy for about a second while a test checks that a call does not wait for it.
SLEEP = 2_000_000_000


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


SYNCHRONOUS = is_set("GIBBS_CUDA_SYNCHRONOUS") or is_set("CUDA_LAUNCH_BLOCKING")


def why_not() -> str:
    """The reason why nothing can run here, or ""."""
    kernels = gx.build_info()["cuda"]
    if kernels != "loaded":
        return f"no CUDA kernels: {kernels}"
    return "" if torch.cuda.is_available() else "no GPU: torch.cuda.is_available() is False"


@pytest.fixture(scope="module", autouse=True)
def _has_gpu() -> None:
    reason = why_not()
    if reason and is_set("GIBBS_REQUIRE_CUDA"):
        pytest.fail(f"GIBBS_REQUIRE_CUDA is set, but {reason}", pytrace=False)
    if reason:
        pytest.skip(reason)


# The tests of the ops ---------------------------------------------------------------------------------------------

if SYNCHRONOUS:
    globals().update(backends.tests_of(MODULES, unfit))
else:

    @pytest.mark.skip(reason="the tests of the ops run with GIBBS_CUDA_SYNCHRONOUS=1: see make gpu")
    def test_ops() -> None:
        pass


@pytest.fixture(autouse=True)
def _backend(_has_gpu: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if "__" not in request.node.name.split("[")[0]:
        if SYNCHRONOUS:
            pytest.skip("runs without GIBBS_CUDA_SYNCHRONOUS")
        yield
        gx.synchronize()  # an unexpected fault fails this test, not the next one
        return
    backends.send_ops(call_on_gpu, ops.set_cuda_route, monkeypatch)
    yield
    ops.set_cuda_route("auto")


@pytest.fixture(params=BIPARTITE_ROUTES)
def instruction_set(request: pytest.FixtureRequest) -> str:
    ops.set_cuda_route(request.param)
    return str(request.param)


@pytest.fixture(params=GRAPH_ROUTES)
def graph_route(request: pytest.FixtureRequest) -> str:
    ops.set_cuda_route(request.param)
    return str(request.param)


# Helpers of the other tests ---------------------------------------------------------------------------------------


@pytest.fixture(params=["auto", *BIPARTITE_ROUTES])
def bipartite_way(request: pytest.FixtureRequest) -> Iterator[str]:
    ops.set_cuda_route(request.param)
    yield request.param
    ops.set_cuda_route("auto")


@pytest.fixture(params=["auto", *GRAPH_ROUTES])
def graph_way(request: pytest.FixtureRequest) -> Iterator[str]:
    ops.set_cuda_route(request.param)
    yield request.param
    ops.set_cuda_route("auto")


def moved(*values: Any) -> list[Any]:
    return [to_device(value, DEVICE) for value in values]


def on_gpu(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[Tensor, ...]:
    """A function's results on the GPU. Every tensor among its arguments is moved there."""
    results = function(*moved(*args), **dict(zip(options, moved(*options.values()), strict=True)))
    results = (results,) if isinstance(results, Tensor) else tuple(results)
    assert all(result.device.type == DEVICE for result in results)
    return results


def on_cpu(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[Tensor, ...]:
    results = function(*args, **options)
    return (results,) if isinstance(results, Tensor) else tuple(results)


def back(results: Any) -> list[Tensor]:
    return [result.detach().cpu() for result in results]


def assert_same_on_gpu(function: Callable[..., Any], *args: Any, **options: Any) -> None:
    assert_same_bits(back(on_gpu(function, *args, **options)), on_cpu(function, *args, **options))


def assert_works() -> None:
    """The bits that the CPU draws, for both kinds of models."""
    graph = gx.ChimeraGraph(2, 3)
    assert_same_on_gpu(gx.bipartite_gibbs, random_bits(9, 33), *random_parameters(33, 40), 3, seed=1)
    assert_same_on_gpu(
        gx.graph_gibbs, random_bits(9, graph.num_nodes), *random_graph_parameters(graph), graph, 3, seed=1
    )
    gx.synchronize()


def leaves_of(parameters: Any) -> list[Tensor]:
    return [parameter.detach().clone().requires_grad_() for parameter in parameters]


def with_gradients(
    function: Callable[..., Any], state: Tensor, parameters: Any, *args: Any, **options: Any
) -> list[Tensor]:
    """Values, and gradients of the sum of their squares."""
    leaves = leaves_of(parameters)
    outputs = function(state, *leaves, *args, **options)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    loss = torch.stack([output.double().square().sum() for output in outputs]).sum()
    return [*(output.detach() for output in outputs), *torch.autograd.grad(loss, leaves)]


def assert_close_on_gpu(
    function: Callable[..., Any], state: Tensor, parameters: Any, *args: Any, tolerance: float, **options: Any
) -> None:
    expected = with_gradients(function, state, parameters, *args, **options)
    actual = with_gradients(function, *moved(state), moved(*parameters), *args, **options)
    for a, e in zip(actual, expected, strict=True):
        assert a.device.type == DEVICE
        assert a.dtype == e.dtype
        assert_close(a.cpu(), e, tolerance)


# Binary sweeps: the bits of the CPU -------------------------------------------------------------------------------


@pytest.mark.parametrize(("n1", "n2"), [(1, 1), (33, 100), (129, 65), (300, 310), (700, 900)])
@pytest.mark.parametrize("batches", [((70,), (), (), ()), ((5, 3), (3,), (3,), (3,)), ((), (), (), ())])
def test_bipartite_sizes(bipartite_way: str, n1: int, n2: int, batches: Any) -> None:
    own, *of_parameters = batches
    p = random_parameters(n1, n2, of_parameters)
    assert_same_on_gpu(gx.bipartite_gibbs, random_bits(*own, n1), *p, 4, seed=5)


def test_bipartite_many_chains(bipartite_way: str) -> None:
    p, left = random_parameters(200, 210), random_bits(3000, 200)
    assert_same_on_gpu(gx.bipartite_gibbs, left, *p, 6, seed=-3, chain_offset=2**33, sweep_offset=2**34)


def test_bipartite_many_chains_with_clamps_and_biases_of_their_own(bipartite_way: str) -> None:
    """So many that warps take four tiles of them or more, whose bits are interleaved."""
    chains = 20000
    left_bias, right_bias, weight = random_parameters(33, 40, ((chains,), (chains,), ()))
    clamps = {"clamp_left": torch.rand(33) < 0.2, "clamp_right": torch.rand(chains, 40) < 0.2}
    left, right = random_bits(chains, 33), random_bits(chains, 40)
    # Bounds decide little near the largest numbers, and there is no room to note all units that they leave open.
    for scale, beta in ((1.0, 1.0), (1e38, 1e-38)):
        biases = [scale * bias.clamp(-1, 1) for bias in (left_bias, right_bias)]
        assert_same_on_gpu(gx.bipartite_gibbs, left, *biases, weight, 3, right=right, beta=beta, seed=5, **clamps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state", [*DTYPES, torch.bool, torch.uint8])
def test_bipartite_dtypes(bipartite_way: str, dtype: torch.dtype, state: torch.dtype) -> None:
    p = random_parameters(40, 70, ((), (6,), ()), dtype=dtype)
    assert_same_on_gpu(gx.bipartite_gibbs, random_bits(6, 40, dtype=state), *p, 3, seed=7)


@pytest.mark.parametrize("how", ["transposed", "strided", "offset"])
@pytest.mark.parametrize("broadcast", BROADCASTS)
def test_bipartite_strides_and_broadcasts(bipartite_way: str, how: str, broadcast: str) -> None:
    (own, *batches), _ = BROADCASTS[broadcast]
    p, left = random_parameters(40, 35, batches), random_bits(*own, 40)
    assert_same_on_gpu(gx.bipartite_gibbs, awkward(left, how), *(awkward(x, how) for x in p), 3, seed=7)


@pytest.mark.parametrize("own", [(), (7,)])
def test_bipartite_clamps_chains_and_schedules(bipartite_way: str, own: tuple[int, ...]) -> None:
    p = random_parameters(50, 40, (own, own, own))
    left, right = random_bits(7, 50), random_bits(7, 40)
    # A schedule of more than 64 values does not fit a kernel's arguments.
    for beta in ([0.0, 0.5, 1.0, -1.5], torch.rand(4).double(), torch.rand(70).tolist(), torch.rand(70).double(), 0.3):
        num_sweeps = 4 if isinstance(beta, float) else len(beta)
        assert_same_on_gpu(
            gx.bipartite_gibbs, left, *p, num_sweeps, beta=beta, right=right, seed=torch.tensor(2**40),
            clamp_left=torch.rand(7, 50) < 0.3, clamp_right=torch.rand(40) < 0.3, chain_offset=torch.randperm(7),
        )  # fmt: skip


@pytest.mark.parametrize("name", ["chimera with holes", "K20", "grid", "star of 300", "pegasus-like", "one node"])
@pytest.mark.parametrize("broadcast", ["single", "shared", "per_model", "chains_of_models", "models_of_chains"])
def test_graphs(graph_way: str, name: str, broadcast: str) -> None:
    graph, ((own, *batches), _) = graph_named(name), GRAPH_BROADCASTS[broadcast]
    p, state = random_graph_parameters(graph, batches), random_bits(*own, graph.num_nodes)
    for op in (gx.graph_gibbs, gx.graph_metropolis):
        assert_same_on_gpu(op, state, *p, graph, 6, seed=5)


def test_graph_of_many_nodes_or_chains(graph_way: str) -> None:
    for graph, chains in ((gx.ChimeraGraph(40), 40), (gx.ChimeraGraph(4, 5), 3000)):
        p, state = random_graph_parameters(graph), random_bits(chains, graph.num_nodes)
        for op in (gx.graph_gibbs, gx.graph_metropolis):
            assert_same_on_gpu(op, state, *p, graph, 5, seed=-3, chain_offset=2**33, sweep_offset=2**34)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state", [*DTYPES, torch.bool, torch.uint8])
def test_graph_dtypes(graph_way: str, dtype: torch.dtype, state: torch.dtype) -> None:
    graph = gx.ChimeraGraph(2, 3)
    p = random_graph_parameters(graph, ((6,), ()), dtype=dtype)
    assert_same_on_gpu(gx.graph_gibbs, random_bits(6, graph.num_nodes, dtype=state), *p, graph, 3, seed=7)


@pytest.mark.parametrize("how", ["transposed", "strided", "offset"])
@pytest.mark.parametrize("own", [(), (7,)])
@pytest.mark.parametrize("op", [gx.graph_gibbs, gx.graph_metropolis], ids=lambda op: op.__name__)
def test_graph_strides_clamps_chains_and_schedules(
    op: Callable[..., Tensor], graph_way: str, how: str, own: tuple[int, ...]
) -> None:
    graph = gx.ChimeraGraph(3)
    p, state = random_graph_parameters(graph, (own, own)), random_bits(7, graph.num_nodes)
    clamp = torch.rand(7, graph.num_nodes) < 0.3
    for beta in ([0.0, 0.5, 1.0, -1.5], torch.rand(4).double(), torch.rand(70).tolist(), torch.rand(70).double(), 0.3):
        num_sweeps = 4 if isinstance(beta, float) else len(beta)
        assert_same_on_gpu(
            op, awkward(state, how), *(awkward(x, how) for x in p), graph, num_sweeps,
            beta=beta, clamp=awkward(clamp, how), chain_offset=torch.randperm(7), seed=torch.tensor(2**40),
        )  # fmt: skip


@pytest.mark.parametrize("shared", [True, False])
def test_annealing(bipartite_way: str, shared: bool) -> None:
    own = () if shared else (4,)
    betas = torch.linspace(0, 1, 30).tolist()
    p, bases = random_parameters(60, 50, (own, own, own)), random_parameters(60, 50)[:2]
    arguments = (random_bits(20, 4, 60), *p, *bases, betas)
    *actual, log_weights = back(on_gpu(gx.bipartite_ais, *arguments, seed=3))
    *expected, expected_weights = on_cpu(gx.bipartite_ais, *arguments, seed=3)
    assert_same_bits(actual, expected)
    assert_close(log_weights, expected_weights, 1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_annealing_on_a_graph(graph_way: str, shared: bool) -> None:
    own, graph = () if shared else (4,), gx.ChimeraGraph(3)
    betas = torch.linspace(0, 1, 30).tolist()
    p = random_graph_parameters(graph, (own, own))
    arguments = (random_bits(20, 4, graph.num_nodes), *p, graph, torch.randn(graph.num_nodes), betas)
    state, log_weights = back(on_gpu(gx.graph_ais, *arguments, seed=3))
    expected, expected_weights = on_cpu(gx.graph_ais, *arguments, seed=3)
    assert_same_bits(state, expected)
    assert_close(log_weights, expected_weights, 1e-4)


# Relaxed sweeps and fields ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("relaxation", "slope_gradient"), RELAXATIONS)
@pytest.mark.parametrize("broadcast", BROADCASTS)
def test_relaxed(relaxation: str, slope_gradient: bool, broadcast: str) -> None:
    (own, *batches), _ = BROADCASTS[broadcast]
    p = random_parameters(100, 129, batches, dtype=torch.float64)
    assert_close_on_gpu(
        gx.bipartite_gibbs_relaxed, random_bits(*own, 100, dtype=torch.float64), p, 3, 2,
        tolerance=1e-9, relaxation=relaxation, slope_gradient=slope_gradient, beta=[0.5, 1.0, 1.5, 0.7, 0.9], seed=5,
    )  # fmt: skip


@pytest.mark.parametrize(("relaxation", "slope_gradient"), RELAXATIONS)
@pytest.mark.parametrize("broadcast", GRAPH_BROADCASTS)
def test_relaxed_on_a_graph(relaxation: str, slope_gradient: bool, broadcast: str) -> None:
    graph, ((own, *batches), _) = gx.ChimeraGraph(3), GRAPH_BROADCASTS[broadcast]
    p = random_graph_parameters(graph, batches, dtype=torch.float64)
    assert_close_on_gpu(
        gx.graph_gibbs_relaxed, random_bits(*own, graph.num_nodes, dtype=torch.float64), p, graph, 3, 2,
        tolerance=1e-9, relaxation=relaxation, slope_gradient=slope_gradient, beta=[0.5, 1.0, 1.5, 0.7, 0.9], seed=5,
    )  # fmt: skip


@pytest.mark.parametrize("shared", [True, False])
def test_relaxed_many_chains(shared: bool) -> None:
    own = () if shared else (300,)
    p = random_parameters(200, 150, (own, own, own), dtype=torch.float64)
    left = random_bits(300, 200, dtype=torch.float64)
    assert_close_on_gpu(gx.bipartite_gibbs_relaxed, left, p, 4, 1, tolerance=1e-9, seed=5)
    graph = gx.ChimeraGraph(10)
    q = random_graph_parameters(graph, (own, own), dtype=torch.float64)
    state = random_bits(300, graph.num_nodes, dtype=torch.float64)
    assert_close_on_gpu(gx.graph_gibbs_relaxed, state, q, graph, 4, 1, tolerance=1e-9, seed=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relaxed_in_single_precision(dtype: torch.dtype) -> None:
    errors = []
    for seed in range(5):
        p, left = random_parameters(60, 50, dtype=dtype), random_bits(40, 60)
        expected = with_gradients(gx.bipartite_gibbs_relaxed, left, p, 3, 1, seed=seed)
        actual = with_gradients(gx.bipartite_gibbs_relaxed, *moved(left), moved(*p), 3, 1, seed=seed)
        pairs = zip(actual, expected, strict=True)
        errors.append(max(float((a.cpu().double() - e.double()).norm() / e.double().norm()) for a, e in pairs))
    # The median counts: a unit at the very edge of a clip may fall on the other side.
    assert sorted(errors)[2] < (1e-3 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("relaxation", ["pwl", "concrete", "mean_field"])
def test_gradients_against_differences(relaxation: str) -> None:
    p = leaves_of(moved(*random_parameters(3, 2, ((), (4,), ()), dtype=torch.float64)))
    left = torch.rand(4, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def relaxed(left: Tensor, *p: Tensor) -> Any:
        return gx.bipartite_gibbs_relaxed(left, *p, 0, 2, relaxation=relaxation, seed=12)

    assert torch.autograd.gradcheck(relaxed, [left, *p])

    graph = gx.ColoredGraph(5, [(0, 1), (1, 2), (2, 0), (3, 1)])
    q = leaves_of(moved(*random_graph_parameters(graph, ((), (4,)), dtype=torch.float64)))
    state = torch.rand(4, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def relaxed_on_graph(state: Tensor, *q: Tensor) -> Any:
        return gx.graph_gibbs_relaxed(state, *q, graph, 0, 2, relaxation=relaxation, seed=12)

    assert torch.autograd.gradcheck(relaxed_on_graph, [state, *q])


def test_second_derivatives_of_fields() -> None:
    graph = gx.ColoredGraph(5, [(0, 1), (1, 2), (2, 0), (3, 1)])
    p = leaves_of(moved(*random_graph_parameters(graph, ((), (4,)), dtype=torch.float64)))
    state = torch.rand(4, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: gx.graph_fields(*x, graph), [state, *p])
    assert torch.autograd.gradgradcheck(lambda *x: gx.graph_fields(*x, graph), [state, *p])


# The same on every run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_runs_are_equal(shared: bool, dtype: torch.dtype) -> None:
    own, graph = () if shared else (500,), gx.ChimeraGraph(5)
    p = moved(*random_parameters(100, 129, (own, own, own), dtype=dtype))
    q = moved(*random_graph_parameters(graph, (own, own), dtype=dtype))
    left, state = moved(random_bits(500, 100, dtype=dtype), random_bits(500, graph.num_nodes, dtype=dtype))

    def run() -> list[Tensor]:
        relaxed = with_gradients(gx.bipartite_gibbs_relaxed, left, p, 5, 2, seed=3)
        on_graph = with_gradients(gx.graph_gibbs_relaxed, state, q, graph, 5, 2, seed=3)
        fields = with_gradients(gx.graph_fields, state, q, graph)
        binary = gx.bipartite_gibbs(left, *p, 5, seed=3), gx.graph_gibbs(state, *q, graph, 5, seed=3)
        annealed = gx.bipartite_ais(left, *p, p[0], p[1], [0.0, 0.5, 1.0], seed=3)
        return [*relaxed, *on_graph, *fields, *binary[0], binary[1], *annealed]

    first = run()
    for _ in range(3):
        assert_same_bits(run(), first)


# Seeds ------------------------------------------------------------------------------------------------------------


def test_default_seed_is_the_devices() -> None:
    p, left = moved(*random_parameters(50, 40)), torch.zeros(20, 50, device=DEVICE)
    torch.manual_seed(3)
    first, second = gx.bipartite_gibbs(left, *p, 2)[0], gx.bipartite_gibbs(left, *p, 2)[0]
    assert not first.equal(second)
    torch.manual_seed(3)
    assert_same_bits(gx.bipartite_gibbs(left, *p, 2)[0], first)
    # A generator's seed is drawn on its own device.
    for device in ("cpu", DEVICE):
        generators = [torch.Generator(device).manual_seed(seed) for seed in (5, 5, 6)]
        draws = [gx.bipartite_gibbs(left, *p, 2, generator=generator)[0] for generator in generators]
        assert_same_bits(draws[1], draws[0])
        assert not draws[2].equal(draws[0])


# CUDA graphs ------------------------------------------------------------------------------------------------------


def replayed(replay: Callable[[], Any]) -> list[Tensor]:
    return [output.clone() for output in replay()]


@pytest.mark.parametrize("kind", ["bipartite", "graph", "annealing"])
def test_replay_draws_anew(kind: str) -> None:
    graph = gx.ChimeraGraph(4)
    p, q = moved(*random_parameters(60, 70)), moved(*random_graph_parameters(graph))
    left, state = moved(random_bits(200, 60), random_bits(200, graph.num_nodes))

    def call() -> Any:
        if kind == "bipartite":
            return gx.bipartite_gibbs(left, *p, 5, beta=[0.2, 0.4, 0.6, 0.8, 1.0])
        if kind == "graph":
            return (gx.graph_gibbs(state, *q, graph, 5),)
        return gx.bipartite_ais(left, *p, p[0], p[1], torch.linspace(0, 1, 10))

    recorded = as_cuda_graph(call)
    first, second = replayed(recorded), replayed(recorded)
    assert_bits(first[0])
    assert not first[0].equal(second[0])
    # The draws of a replay are those of a call.
    torch.cuda.manual_seed(5)
    third = replayed(recorded)
    torch.cuda.manual_seed(5)
    assert_same_bits(call(), third)


def test_replay_of_a_seed_that_is_a_number() -> None:
    graph = gx.ChimeraGraph(4)
    p, q = moved(*random_parameters(60, 70)), moved(*random_graph_parameters(graph))
    left, state = moved(random_bits(200, 60), random_bits(200, graph.num_nodes))

    def call() -> Any:
        return *gx.bipartite_gibbs(left, *p, 5, seed=3), gx.graph_gibbs(state, *q, graph, 5, seed=4)

    recorded = as_cuda_graph(call)
    first = replayed(recorded)
    assert_same_bits(first, call())
    assert_same_bits(replayed(recorded), first)
    # A replay reads the current values of its inputs.
    left.copy_(1 - left)
    assert_same_bits(replayed(recorded), call())


def test_replay_of_a_seed_on_the_device() -> None:
    graph = gx.ChimeraGraph(4)
    p, q = moved(*random_parameters(60, 70)), moved(*random_graph_parameters(graph))
    left, state = moved(random_bits(200, 60), random_bits(200, graph.num_nodes))
    seed, beta = torch.tensor(3, device=DEVICE), torch.linspace(0, 1, 80, dtype=torch.float64, device=DEVICE)

    def call() -> Any:
        return (
            *gx.bipartite_gibbs(left, *p, 80, beta=beta, seed=seed),
            gx.graph_gibbs(state, *q, graph, 80, beta=beta, seed=seed),
        )

    recorded = as_cuda_graph(call)
    draws = []
    for number in (3, 11, -5):
        seed.fill_(number)
        draws.append(replayed(recorded))
        assert_same_bits(draws[-1], call())
    assert not draws[0][0].equal(draws[1][0])


def test_a_long_schedule_on_the_cpu_is_not_captured() -> None:
    p, left = moved(*random_parameters(6, 7)), torch.zeros(2, 6, device=DEVICE)
    with (
        pytest.raises(ERRORS, match=r"^bipartite_gibbs: beta of more than 64 values must be on the device"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        gx.bipartite_gibbs(left, *p, 65, beta=[1.0] * 65, seed=1)
    assert_works()


def test_replay_of_a_backward_pass() -> None:
    graph = gx.ChimeraGraph(3)
    p, q = leaves_of(moved(*random_parameters(60, 70))), leaves_of(moved(*random_graph_parameters(graph)))
    left, state = moved(random_bits(50, 60), random_bits(50, graph.num_nodes))
    seed = torch.tensor(3, device=DEVICE)

    def call() -> list[Tensor]:
        outputs = gx.bipartite_gibbs_relaxed(left, *p, 3, 2, seed=seed)
        outputs = (*outputs, *gx.graph_gibbs_relaxed(state, *q, graph, 3, 2, seed=seed))
        outputs = (*outputs, gx.graph_fields(outputs[3], *q, graph))
        loss = torch.stack([output.square().sum() for output in outputs]).sum()
        return [*(output.detach() for output in outputs), *torch.autograd.grad(loss, [*p, *q])]

    recorded = as_cuda_graph(call)
    for number in (3, 11):
        seed.fill_(number)
        assert_same_bits(replayed(recorded), call())


FIRST_CALL_EVER = """
import torch, gibbs_ext as gx
torch.manual_seed(0)
p = torch.randn(200), torch.randn(150), torch.randn(200, 150) / 10
left = torch.zeros(9, 200)
there = [x.cuda() for x in (left, *p)]
gx.synchronize()  # of a device that nobody has used
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    results = gx.bipartite_gibbs(*there, 3, seed=1)
graph.replay()
gx.synchronize()
for actual, expected in zip(results, gx.bipartite_gibbs(left, *p, 3, seed=1), strict=True):
    assert actual.cpu().equal(expected)
"""


def test_the_first_call_ever_is_captured() -> None:
    run_python("-c", FIRST_CALL_EVER, environment={})


FORK = """
import os, torch, gibbs_ext as gx
arguments = [x.cuda() for x in (torch.zeros(9, 6), torch.zeros(6), torch.zeros(5), torch.zeros(6, 5))]
gx.bipartite_gibbs(*arguments, 3, seed=1)
gx.synchronize()
child = os.fork()
if child == 0:
    try:
        gx.bipartite_gibbs(*arguments, 3, seed=1)
    except RuntimeError:
        os._exit(0)
    os._exit(1)
status = os.waitpid(child, 0)[1]
assert status == 0, status
"""


def test_a_forked_process_gets_an_error() -> None:
    run_python("-c", FORK, environment={})


# Streams ----------------------------------------------------------------------------------------------------------


def busy() -> Any:
    """Occupies the current stream for about a second. Returns an event that is over at the same time."""
    gc.collect()  # memory that is freed later might wait
    torch.cuda._sleep(SLEEP)
    event = torch.cuda.Event()
    event.record()
    return event


def side_calls() -> tuple[dict[str, Callable[..., Any]], list[Tensor]]:
    """Calls by name, as functions of the bits on the GPU: left, then a graph's state."""
    graph = gx.ChimeraGraph(4)
    p, q = random_parameters(60, 70), random_graph_parameters(graph)
    # Copies are kept by device, so that all exist before a stream is checked.
    on = {device: ([x.to(device) for x in p], [x.to(device) for x in q]) for device in ("cpu", DEVICE)}
    calls: dict[str, Callable[..., Any]] = {
        "bipartite": lambda left, state: gx.bipartite_gibbs(left, *on[left.device.type][0], 5, seed=3),
        "graph": lambda left, state: (gx.graph_gibbs(state, *on[state.device.type][1], graph, 5, seed=3),),
        "relaxed": lambda left, state: with_gradients(
            gx.bipartite_gibbs_relaxed, left, on[left.device.type][0], 3, 1, seed=3
        ),
    }
    return calls, [random_bits(200, 60), random_bits(200, graph.num_nodes)]


@pytest.mark.parametrize("kind", ["bipartite", "graph", "relaxed"])
def test_a_call_on_a_side_stream_waits_for_no_other(kind: str) -> None:
    calls, inputs = side_calls()
    call, on_device = calls[kind], moved(*inputs)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        call(*on_device)  # loads kernels and allocates, which may wait
    torch.cuda.synchronize()
    other = busy()
    with torch.cuda.stream(stream):
        results = call(*on_device)
    stream.synchronize()
    assert not other.query(), "the call waited for the default stream"
    for actual, expected in zip(back(results), call(*inputs), strict=True):
        assert_close(actual, expected, 1e-2 if kind == "relaxed" else 0)


@pytest.mark.parametrize("kind", ["bipartite", "graph", "relaxed"])
def test_a_call_waits_for_inputs_of_its_stream(kind: str) -> None:
    calls, inputs = side_calls()
    call, sources = calls[kind], moved(*inputs)
    expected = back(call(*sources))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        call(*sources)  # allocates, which may wait
    for flipped in ([1 - source for source in sources], [torch.zeros_like(source) for source in sources]):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            event = busy()
            for late, source in zip(flipped, sources, strict=True):
                late.copy_(source)
            results = call(*flipped)
            assert not event.query(), "the call waited for its stream"
        stream.synchronize()
        assert_same_bits(back(results), expected)


def test_calls_on_two_streams_at_once() -> None:
    calls, inputs = side_calls()
    on_device = moved(*inputs)
    expected = {kind: back(call(*on_device)) for kind, call in calls.items()}
    torch.cuda.synchronize()
    results = []
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for i in range(40):
        for kind, call in calls.items():
            with torch.cuda.stream(streams[i % 2]):
                results.append((kind, call(*on_device)))
    torch.cuda.synchronize()
    for kind, result in results:
        assert_same_bits(back(result), expected[kind])


# No waiting -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Waits of PyTorch raise an error; other waits show because the GPU has finished meanwhile."""
    torch.cuda.synchronize()
    event = busy()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
        assert not event.query(), "the block waited for the GPU"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


def unwaiting_calls() -> dict[str, Callable[[], Any]]:
    graph = gx.ChimeraGraph(4)
    n = graph.num_nodes
    p, q = leaves_of(moved(*random_parameters(60, 70))), leaves_of(moved(*random_graph_parameters(graph)))
    left, right, state = moved(random_bits(50, 60), random_bits(50, 70), random_bits(50, n))
    clamps = moved(torch.rand(60) < 0.2, torch.rand(50, 70) < 0.2, torch.rand(n) < 0.2)
    chains, seed = torch.arange(50, device=DEVICE), torch.tensor(3, device=DEVICE)
    schedule = torch.linspace(0, 1, 70, device=DEVICE)
    bipartite = gx.BipartiteBoltzmann(*p, validate_args=False)
    on_graph = gx.GraphBoltzmann(graph, *q, validate_args=False)
    posterior = gx.nn.BoltzmannPosterior(5, 60, 70).to(DEVICE)
    features = torch.randn(8, 5, device=DEVICE)
    layout = graph.layout_on(left.device)

    def differentiated(*outputs: Tensor) -> Any:
        loss = torch.stack([output.square().sum() for output in outputs]).sum()
        return torch.autograd.grad(loss, [*p, *q], allow_unused=True)

    return {
        "bipartite_gibbs": lambda: gx.bipartite_gibbs(left, *p, 5, beta=0.7),
        "bipartite_gibbs with everything": lambda: gx.bipartite_gibbs(
            left, *p, 70, beta=schedule, right=right, clamp_left=clamps[0], clamp_right=clamps[1], chain_offset=chains,
            seed=seed,
        ),
        "graph_gibbs": lambda: gx.graph_gibbs(state, *q, graph, 5, beta=[0.2, 0.4, 0.6, 0.8, 1.0]),
        "graph_gibbs with everything": lambda: gx.graph_gibbs(
            state, *q, graph, 70, beta=schedule, clamp=clamps[2], chain_offset=chains, seed=seed
        ),
        "graph_metropolis": lambda: gx.graph_metropolis(state, *q, graph, 5),
        "bipartite_gibbs_relaxed": lambda: differentiated(*gx.bipartite_gibbs_relaxed(left, *p, 5, 2)),
        "graph_gibbs_relaxed": lambda: differentiated(*gx.graph_gibbs_relaxed(state, *q, graph, 5, 2)),
        "bipartite_ais": lambda: gx.bipartite_ais(left, *p, p[0].detach(), p[1].detach(), [0.0, 0.5, 1.0]),
        "graph_ais": lambda: gx.graph_ais(state, *q, graph, q[0].detach(), [0.0, 0.5, 1.0]),
        "graph_fields": lambda: differentiated(gx.graph_fields(state, *q, graph)),
        "graph_edge_sums": lambda: ops.call("graph_edge_sums", state, state, q[1].detach(), layout),
        "coupling_resolution": lambda: gx.coupling_resolution(bipartite),
        "sample": lambda: (bipartite.sample((9,), 5), on_graph.sample((9,), 5)),
        "rsample": lambda: differentiated(bipartite.rsample((9,), 5), on_graph.rsample((9,), 5)),
        "energies": lambda: differentiated(
            bipartite.free_energy(left), bipartite.energy_of(left, right), on_graph.energy(state),
            on_graph.free_energy(state),
        ),
        "posterior": lambda: posterior(features).z.sum().backward(),
    }  # fmt: skip


UNWAITING = (
    *("bipartite_gibbs", "bipartite_gibbs with everything", "graph_gibbs", "graph_gibbs with everything"),
    *("graph_metropolis", "bipartite_gibbs_relaxed", "graph_gibbs_relaxed", "bipartite_ais", "graph_ais"),
    *("graph_fields", "graph_edge_sums", "coupling_resolution", "sample", "rsample", "energies", "posterior"),
)


@pytest.mark.parametrize("name", UNWAITING)
def test_the_host_does_not_wait(name: str) -> None:
    call = unwaiting_calls()[name]
    for _ in range(2):  # a graph's layout is copied, memory is allocated, kernels are loaded
        call()
    with no_waiting():
        call()


# Faults -----------------------------------------------------------------------------------------------------------


def spoilt(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[..., -1] = value
    return tensor


def faulty_calls() -> dict[str, tuple[Callable[[], Any], str]]:
    """Calls, and their expected errors."""
    graph = gx.ChimeraGraph(2)
    nan = float("nan")
    p, q = moved(*random_parameters(40, 33)), moved(*random_graph_parameters(graph))
    left, state = moved(random_bits(9, 40), random_bits(9, graph.num_nodes))
    schedule = torch.tensor([1.0, nan, 1.0], dtype=torch.float64, device=DEVICE)
    chains = torch.tensor([-1], device=DEVICE)
    return {
        "bias": (
            lambda: gx.bipartite_gibbs(left, spoilt(p[0], nan), *p[1:], 3, seed=1),
            "bipartite_gibbs: left_bias must be finite",
        ),
        "weight": (
            lambda: gx.bipartite_gibbs_relaxed(left, *p[:2], spoilt(p[2], nan), 3, 1, seed=1),
            "bipartite_gibbs_relaxed: weight must be finite",
        ),
        "left": (
            lambda: gx.bipartite_gibbs(spoilt(left, 2), *p, 3, seed=1),
            "bipartite_gibbs: left must hold 0 and 1 only, got 2",
        ),
        "beta": (
            lambda: gx.bipartite_gibbs(left, *p, 3, beta=schedule, seed=1),
            "bipartite_gibbs: beta must be finite",
        ),
        "coupling": (
            lambda: gx.graph_gibbs(state, q[0], spoilt(q[1], nan), graph, 3, seed=1),
            "graph_gibbs: coupling must be finite",
        ),
        "state": (
            lambda: gx.graph_gibbs(spoilt(state, 2), *q, graph, 3, seed=1),
            "graph_gibbs: state must hold 0 and 1 only, got 2",
        ),
        "chain": (
            lambda: gx.graph_gibbs(state, *q, graph, 3, chain_offset=chains, seed=1),
            r"graph_gibbs: chain_offset must lie in 0 \.\. 2\^48 - 1, got -1",
        ),
    }


FAULTS = ("bias", "weight", "left", "beta", "coupling", "state", "chain")


@pytest.mark.parametrize("fault", FAULTS)
def test_synchronize_raises_a_fault(fault: str) -> None:
    call, message = faulty_calls()[fault]
    call()
    with pytest.raises(RuntimeError, match=f"^{message}"):
        gx.synchronize()
    assert_works()


@pytest.mark.parametrize("fault", FAULTS)
def test_the_next_call_raises_a_fault(fault: str) -> None:
    call, message = faulty_calls()[fault]
    call()
    torch.cuda.synchronize()
    with pytest.raises(ERRORS, match=rf"^{message}.* \(found by an earlier call, whose results are not valid\)"):
        gx.bipartite_gibbs(*moved(random_bits(9, 33), *random_parameters(33, 40)), 3, seed=1)
    assert_works()


def test_a_replay_reports_a_fault() -> None:
    p, left = moved(*random_parameters(40, 33)), torch.zeros(9, 40, device=DEVICE)
    recorded = as_cuda_graph(lambda: gx.bipartite_gibbs(left, *p, 3, seed=1))
    replayed(recorded)
    gx.synchronize()
    left.fill_(2)
    replayed(recorded)
    with pytest.raises(RuntimeError, match=r"^bipartite_gibbs: left must hold 0 and 1 only, got 2"):
        gx.synchronize()
    assert_works()


def test_synchronize_takes_any_name_of_a_device() -> None:
    call, message = faulty_calls()["bias"]
    for device in (None, torch.cuda.current_device(), "cuda", torch.device("cuda", torch.cuda.current_device())):
        call()
        with pytest.raises(RuntimeError, match=f"^{message}"):
            gx.synchronize(device)
        gx.synchronize(device)


SYNCHRONOUS_FAULT = """
import torch, gibbs_ext as gx
bias = torch.tensor([0.0, float("nan")], device="cuda")
try:
    gx.bipartite_gibbs(torch.zeros(3, 2, device="cuda"), bias, bias, torch.ones(2, 2, device="cuda"), 3, seed=1)
except (ValueError, RuntimeError) as error:
    assert str(error).startswith("bipartite_gibbs: ") and "earlier call" not in str(error), error
else:
    raise SystemExit("the call raised nothing")
gx.synchronize()
"""


@pytest.mark.parametrize("variable", ["GIBBS_CUDA_SYNCHRONOUS", "CUDA_LAUNCH_BLOCKING"])
def test_a_synchronous_call_raises_its_own_fault(variable: str) -> None:
    run_python("-c", SYNCHRONOUS_FAULT, environment={variable: "1"})


# Devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument", ["left", "left_bias", "right_bias", "weight", "right", "clamp_left", "clamp_right", "chain_offset"]
)
def test_a_tensor_left_on_the_cpu(argument: str) -> None:
    p = random_parameters(6, 5)._asdict()
    arguments: dict[str, Any] = {
        "left": torch.zeros(3, 6), **p, "right": torch.zeros(3, 5), "clamp_left": torch.zeros(6, dtype=torch.bool),
        "clamp_right": torch.zeros(5, dtype=torch.bool), "chain_offset": torch.arange(3),
    }  # fmt: skip
    arguments = {name: x if name == argument else x.to(DEVICE) for name, x in arguments.items()}
    named = r"(\w+|the parameters)" if argument == "weight" else argument
    with pytest.raises(ERRORS, match=f"^bipartite_gibbs: {named} must be on "):
        gx.bipartite_gibbs(**arguments, num_sweeps=2, seed=1)
    assert_works()


@pytest.mark.parametrize("argument", ["state", "bias", "coupling", "clamp", "chain_offset"])
def test_a_tensor_of_a_graph_left_on_the_cpu(argument: str) -> None:
    graph = gx.ChimeraGraph(1)
    p = random_graph_parameters(graph)._asdict()
    clamp = torch.zeros(8, dtype=torch.bool)
    arguments: dict[str, Any] = {"state": torch.zeros(3, 8), **p, "clamp": clamp, "chain_offset": torch.arange(3)}
    arguments = {name: x if name == argument else x.to(DEVICE) for name, x in arguments.items()}
    # The graph is copied to the device of the state.
    named = r"(\w+|the parameters)" if argument in ("state", "coupling") else argument
    with pytest.raises(ERRORS, match=f"^graph_gibbs: {named} must be on "):
        gx.graph_gibbs(**arguments, graph=graph, num_sweeps=2, seed=1)
    assert_works()


def test_a_seed_on_the_gpu_for_a_model_on_the_cpu() -> None:
    with pytest.raises(ERRORS, match=r"^bipartite_gibbs: (seed|the parameters) must be"):
        gx.bipartite_gibbs(torch.zeros(3, 6), *random_parameters(6, 5), 2, seed=torch.tensor(1, device=DEVICE))
    assert_works()


needs_two = pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two GPUs")


@needs_two
def test_a_device_that_is_not_the_current_one() -> None:
    graph = gx.ChimeraGraph(3)
    p, q = random_parameters(60, 70), random_graph_parameters(graph)
    left, state = random_bits(20, 60), random_bits(20, graph.num_nodes)
    with torch.cuda.device(0):
        for device in ("cuda:1", "cuda:0", "cuda:1"):
            there = [x.to(device) for x in (left, *p)]
            on_graph = [x.to(device) for x in (state, *q)]
            for results in (gx.bipartite_gibbs(*there, 4, seed=1), (gx.graph_gibbs(*on_graph, graph, 4, seed=1),)):
                assert all(result.device == torch.device(device) for result in results)
            assert_same_bits(back(gx.bipartite_gibbs(*there, 4, seed=1)), gx.bipartite_gibbs(left, *p, 4, seed=1))
            actual = back([gx.graph_gibbs(*on_graph, graph, 4, seed=1)])
            assert_same_bits(actual, [gx.graph_gibbs(state, *q, graph, 4, seed=1)])
            gx.bipartite_gibbs(*there, 4)  # its seed is drawn on the model's device
            assert torch.cuda.current_device() == 0
        gx.synchronize("cuda:1")


@needs_two
def test_tensors_on_two_devices() -> None:
    p, left = [x.to("cuda:0") for x in random_parameters(6, 5)], torch.zeros(3, 6, device="cuda:1")
    with pytest.raises(ERRORS, match=r"^bipartite_gibbs: left must be on .*cuda:0.*cuda:1"):
        gx.bipartite_gibbs(left, *p, 2, seed=1)
    assert_works()


@needs_two
def test_a_fault_belongs_to_its_device() -> None:
    p = [x.to("cuda:1") for x in random_parameters(6, 5)]
    gx.bipartite_gibbs(torch.full((3, 6), 2.0, device="cuda:1"), *p, 2, seed=1)
    torch.cuda.synchronize("cuda:1")
    with torch.cuda.device(0):
        assert_works()
        with pytest.raises(RuntimeError, match=r"^bipartite_gibbs: left must hold 0 and 1 only"):
            gx.synchronize("cuda:1")
    gx.synchronize("cuda:1")


# Memory -----------------------------------------------------------------------------------------------------------


def test_out_of_memory() -> None:
    """Calls need 4 TiB and more, although the inputs are small."""
    graph = gx.ChimeraGraph(2)
    p, q = moved(*random_parameters(64, 33)), moved(*random_graph_parameters(graph))
    left, state = torch.zeros(64, device=DEVICE).expand(2**34, 64), torch.zeros(32, device=DEVICE).expand(2**35, 32)
    calls: dict[str, Callable[[], Any]] = {
        "bipartite_gibbs": lambda: gx.bipartite_gibbs(left, *p, 2, seed=1),
        "bipartite_gibbs_relaxed": lambda: gx.bipartite_gibbs_relaxed(left, *p, 2, seed=1),
        "graph_gibbs": lambda: gx.graph_gibbs(state, *q, graph, 2, seed=1),
    }
    for name, call in calls.items():
        # torch.cuda.OutOfMemoryError, a RuntimeError, or the op's own words.
        with pytest.raises(ERRORS, match=rf"^{name}: cannot allocate|out of memory"):
            call()
        assert_works()


# torch.compile ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["aot_eager", "inductor"])
def compiler(request: pytest.FixtureRequest) -> str:
    if request.param == "inductor" and not has_triton():
        pytest.skip("inductor needs triton for a GPU")
    torch._dynamo.reset()
    return str(request.param)


def test_compiled_binary_sweeps(compiler: str) -> None:
    graph = gx.ChimeraGraph(1, 2)
    p, q = moved(*random_parameters(50, 70)), moved(*random_graph_parameters(graph))
    left, state = moved(random_bits(40, 50), random_bits(40, graph.num_nodes))

    def sample(left: Tensor, state: Tensor) -> Any:
        new, right = gx.bipartite_gibbs(left, *p, 3, beta=[0.5, 1.0, 1.5], seed=3)
        return 2 * new, right, 2 * gx.graph_gibbs(state, *q, graph, 3, seed=3)

    compiled = torch.compile(sample, fullgraph=True, backend=compiler)
    assert_same_bits(compiled(left, state), sample(left, state))


def test_compiled_default_seeds(compiler: str) -> None:
    p, left = moved(*random_parameters(50, 70)), torch.zeros(40, 50, device=DEVICE)
    compiled = torch.compile(lambda: gx.bipartite_gibbs(left, *p, 2)[0], fullgraph=True, backend=compiler)
    torch.manual_seed(1)
    first, second = compiled(), compiled()
    assert not first.equal(second)
    torch.manual_seed(1)
    assert_same_bits(compiled(), first)


def test_compiled_backward_pass(compiler: str) -> None:
    graph = gx.ChimeraGraph(1, 2)
    p = random_parameters(20, 33, ((4,), (4,), (4,)), dtype=torch.float64)
    q = random_graph_parameters(graph, ((4,), (4,)), dtype=torch.float64)
    left, state = moved(random_bits(4, 20, dtype=torch.float64), random_bits(4, 16, dtype=torch.float64))

    def loss(*parameters: Tensor) -> Tensor:
        new, right, mean = gx.bipartite_gibbs_relaxed(left, *(3 * x for x in parameters[:3]), 2, 2, seed=3)
        zeta, other = gx.graph_gibbs_relaxed(state, *(3 * x for x in parameters[3:]), graph, 2, 2, seed=3)
        total: Tensor = (new**2).sum() + right.sum() * mean.mean() + (zeta**2).sum() + other.sum() * zeta.mean()
        return total

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=compiler)):
        leaves = leaves_of(moved(*p, *q))
        value = function(*leaves)
        gradients.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for compiled, eager in zip(*gradients, strict=True):
        assert_close(compiled, eager, 1e-12)


# Distributions and modules ----------------------------------------------------------------------------------------


def models(dtype: torch.dtype = torch.float32) -> Iterator[tuple[Any, Any]]:
    """Each model on the CPU and on the GPU."""
    graph = gx.ChimeraGraph(2, 3)
    for own in ((), (3,)):
        p = random_parameters(12, 40, (own, own, own), dtype=dtype)
        q = random_graph_parameters(graph, (own, own), dtype=dtype)
        yield gx.BipartiteBoltzmann(*p), gx.BipartiteBoltzmann(*moved(*p))
        yield gx.GraphBoltzmann(graph, *q), gx.GraphBoltzmann(graph, *moved(*q))


def test_samples_of_distributions() -> None:
    for model, there in models():
        actual, expected = there.sample((50,), 20, seed=4), model.sample((50,), 20, seed=4)
        assert actual.device.type == DEVICE
        assert_same_bits(actual.cpu(), expected)
        assert_bits(there.sample((50,), 20))
        assert_close(there.energy(actual).cpu(), model.energy(expected), 1e-5)
        assert_same_bits(back([gx.coupling_resolution(there)]), [gx.coupling_resolution(model)])


def test_relaxed_samples_of_distributions() -> None:
    for model, there in models(torch.float64):
        assert_close(there.rsample((50,), 20, seed=4).cpu(), model.rsample((50,), 20, seed=4), 1e-9)


def test_log_probabilities() -> None:
    for model, there in models(torch.float64):
        z = model.sample((9,), 5, seed=1)
        assert_close(there.log_prob(z.to(DEVICE)).cpu(), model.log_prob(z), 1e-9)
        assert_close(gx.exact_log_partition(there).cpu(), gx.exact_log_partition(model), 1e-9)
        for a, e in zip(gx.exact_marginals(there), gx.exact_marginals(model), strict=True):
            assert_close(a.cpu(), e, 1e-9)


def test_gradient_of_log_probabilities() -> None:
    graph = gx.ChimeraGraph(2)
    p, q = random_parameters(9, 20, dtype=torch.float64), random_graph_parameters(graph, dtype=torch.float64)
    left, z = random_bits(7, 29, dtype=torch.float64), random_bits(7, graph.num_nodes, dtype=torch.float64)
    assert_close_on_gpu(lambda z, *p: gx.BipartiteBoltzmann(*p).log_prob(z), left, p, tolerance=1e-9)
    assert_close_on_gpu(lambda z, *q: gx.GraphBoltzmann(graph, *q).log_prob(z), z, q, tolerance=1e-9)


@pytest.mark.parametrize("base", [None, "bias"])
def test_annealed_importance_sampling(base: str | None) -> None:
    for model, there in models():
        actual = gx.annealed_importance_sampling(there, 200, 50, base=base, seed=3)
        expected = gx.annealed_importance_sampling(model, 200, 50, base=base, seed=3)
        assert_same_bits(back([actual.samples]), [expected.samples])
        assert_close(actual.log_weights.cpu(), expected.log_weights, 1e-4)
        assert_close(actual.log_partition.cpu(), expected.log_partition, 1e-4)
        assert torch.isfinite(gx.annealed_importance_sampling(there, 200, 50, base=base).log_partition).all()


def test_persistent_chains() -> None:
    for model, there in models():
        chains, chains_there = gx.PersistentChains(30, model), gx.PersistentChains(30, there)
        assert chains_there.bits.device.type == DEVICE
        chains_there.load_state_dict(chains.state_dict())
        for sweep in range(3):
            generators = [torch.Generator().manual_seed(sweep) for _ in range(2)]
            expected = chains.advance_(model, 4, generator=generators[0])
            actual = chains_there.advance_(there, 4, generator=generators[1])
            if isinstance(actual, Tensor):
                actual, expected = (actual,), (expected,)
            assert_same_bits(back(actual), expected)
            assert_same_bits(chains_there.bits.cpu(), chains.bits)
        loss = gx.negative_log_likelihood_surrogate(there, there.sample((20,), 5), chains_there)
        assert torch.isfinite(loss).all()


@pytest.mark.parametrize("coupling", ["shared", "low_rank", "per_sample"])
@pytest.mark.parametrize("kind", ["bipartite", "graph"])
def test_posterior(kind: str, coupling: str) -> None:
    graph = gx.ChimeraGraph(2)
    units: dict[str, Any] = {"graph": graph} if kind == "graph" else {"num_left": 20, "num_right": 33}
    posterior = gx.nn.BoltzmannPosterior(5, **units, coupling=coupling, rank=4, dataset_size=40, chains_per_point=2)
    posterior.to(DEVICE)
    features = torch.randn(8, 5, device=DEVICE, requires_grad=True)
    index = torch.arange(3, 11, device=DEVICE)
    assert posterior.chains is not None
    before = posterior.chains.bits.clone()
    sample = posterior(features, index)
    assert sample.z.device.type == DEVICE
    assert sample.z.shape[:2] == (2, 8)
    changed = (posterior.chains.bits != before).flatten(1).any(1)
    assert changed[index].all()
    assert int(changed.sum()) == len(index)
    sample.model.energy(sample.z_mean).sum().backward()
    for gradient in (features.grad, *(parameter.grad for parameter in posterior.parameters())):
        assert gradient is not None
        assert torch.isfinite(gradient).all()
        assert gradient.any()
    assert posterior.eval()(features).z.shape == sample.z.shape


@pytest.mark.parametrize("kind", ["bipartite", "graph"])
def test_prior(kind: str) -> None:
    units: dict[str, Any] = {"graph": gx.ChimeraGraph(2)} if kind == "graph" else {"num_left": 20, "num_right": 33}
    prior = gx.nn.BoltzmannPrior(**units, num_chains=50).to(DEVICE)
    before = prior.chains.bits.clone()
    z = prior.distribution().sample((30,), 10)
    (prior.energy(z).mean() + prior.log_partition_surrogate()).backward()
    assert not prior.chains.bits.equal(before)
    assert all(torch.isfinite(parameter.grad).all() for parameter in prior.parameters() if parameter.grad is not None)
    assert all(parameter.grad is not None for parameter in prior.parameters())


# Training ---------------------------------------------------------------------------------------------------------


def trainer_on(device: str, name: str, capture: bool = False) -> Any:
    pytest.importorskip("undirected_vae.train")
    from undirected_vae.train import Trainer

    torch.manual_seed(1)
    config = deviceless.CONFIGS[name].replace({"average": 0.9, "steps": 300})
    return Trainer(config, deviceless.images(), torch.device(device), capture=capture)


def chains_of(trainer: Any) -> list[Tensor]:
    parts = (trainer.model.prior, trainer.model.posterior)
    return [part.chains.bits.cpu() for part in parts if hasattr(part, "chains")]


@pytest.mark.parametrize("name", [name for name in TRAININGS if name != "dropout"])
def test_training_steps_make_the_chains_of_the_cpu(name: str) -> None:
    on_cpu, on_gpu = (trainer_on(device, name) for device in ("cpu", DEVICE))
    for trainer in (on_cpu, on_gpu):
        trainer.advance(3)
        trainer.finish()
    assert_same_bits(on_gpu.images.cpu(), on_cpu.images)
    assert_same_bits(chains_of(on_gpu), chains_of(on_cpu))
    for actual, expected in zip(on_gpu.model.parameters(), on_cpu.model.parameters(), strict=True):
        assert_close(actual.cpu(), expected, 1e-3)


@pytest.mark.parametrize("name", TRAININGS)
def test_captured_training_steps_are_those_that_are_not(name: str) -> None:
    """Training goes on beyond the end of a feed's table, and from a checkpoint."""
    eager, captured = trainer_on(DEVICE, name), trainer_on(DEVICE, name, capture=True)
    for trainer in (eager, captured):
        trainer.advance(105)
        trainer.finish()
    assert captured._graph is not None
    again = trainer_on(DEVICE, name, capture=True)
    again.load_state_dict(captured.state_dict())
    for trainer in (eager, captured, again):
        trainer.advance(8)
        trainer.finish()
    for other in (captured, again):
        assert other.step == eager.step
        assert_same_bits(other.images, eager.images)
        # Sums of cuBLAS and of PyTorch may be rounded differently, and after some steps chains then differ in a bit.
        for actual, expected in zip(other.model.parameters(), eager.model.parameters(), strict=True):
            assert_close(actual.cpu(), expected.cpu(), 0.2)


def test_a_training_step_does_not_wait() -> None:
    for capture in (False, True):
        trainer = trainer_on(DEVICE, "undirected-chimera-per_sample", capture)
        trainer.advance(98)
        with no_waiting():
            trainer.advance(4)  # beyond the end of the feed's table


def test_captured_steps_go_on_after_looks_and_a_checkpoint() -> None:
    """As in training, metrics are read between steps on the default stream, and a state is loaded after a capture."""
    from undirected_vae.train import _line

    name = "undirected-bipartite-per_sample"
    plain, looked_at = trainer_on(DEVICE, name), trainer_on(DEVICE, name, capture=True)
    for trainer in (plain, looked_at):
        trainer.advance(12)
        trainer.finish()
    line = _line(looked_at, looked_at.images)
    assert line["step"] == 12
    state = looked_at.state_dict()
    looked_at.advance(5)
    looked_at.load_state_dict(state)
    for trainer in (plain, looked_at):
        trainer.advance(8)
        trainer.finish()
    assert looked_at._graph is not None
    for actual, expected in zip(looked_at.model.parameters(), plain.model.parameters(), strict=True):
        assert_close(actual.cpu(), expected.cpu(), 1e-2)


def test_a_fault_in_a_captured_step_is_told() -> None:
    trainer = trainer_on(DEVICE, "undirected-bipartite-shared", capture=True)
    trainer.advance(6)
    trainer.finish()
    with torch.no_grad():
        trainer.model.prior.left_bias[0] = float("nan")
    trainer.advance(2)
    with pytest.raises(ValueError, match=r"must be finite|not finite|became nan"):
        trainer.finish()
    assert_works()


def trained_state() -> Any:
    trainer = trainer_on(DEVICE, "undirected-bipartite-per_sample")
    trainer.advance(4)
    trainer.finish()
    return trainer.state_dict()["model"]


def test_two_processes_on_one_gpu_train_as_one() -> None:
    """gloo joins the processes, because NCCL needs a GPU for each of them."""
    one = trained_state()
    for two in many.run(2, trained_state):
        for name, value in one.items():
            if name.endswith("chains.bits"):
                assert_same_bits(two[name], value)
            else:
                assert_close(two[name], value, 1e-3)


BAD_INDEX = """
import torch, gibbs_ext as gx
model = gx.BipartiteBoltzmann(torch.zeros(3), torch.zeros(2), torch.zeros(3, 2))
chains = gx.PersistentChains(1, model, dataset_size=4).to("cuda")
try:
    chains.state(torch.tensor([-1], device="cuda"))
    torch.cuda.synchronize()
except RuntimeError as error:
    print("refused", error)
"""


def test_a_bad_index_is_refused_on_the_device() -> None:
    assert "refused" in run_python("-c", BAD_INDEX, environment={})


@pytest.mark.parametrize("kind", ["bipartite", "graph"])
def test_annealing_is_captured(kind: str) -> None:
    for model, there in models():
        if isinstance(model, gibbs_ext.BipartiteBoltzmann) != (kind == "bipartite"):
            continue
        seed = torch.tensor(3, device=DEVICE)
        recorded = as_cuda_graph(
            lambda there=there, seed=seed: gx.annealed_importance_sampling(there, 50, 100, seed=seed)
        )
        result = recorded()
        expected = gx.annealed_importance_sampling(model, 50, 100, seed=3)
        assert_same_bits(back([result.samples]), [expected.samples])
        assert_close(result.log_weights.cpu(), expected.log_weights, 1e-4)


def test_a_checkpoint_moves_between_devices() -> None:
    on_gpu = trainer_on(DEVICE, "plain")
    on_gpu.advance(4)
    state = on_gpu.state_dict()
    assert all(value.device.type == "cpu" for value in state["model"].values())
    on_cpu = trainer_on("cpu", "plain")
    on_cpu.load_state_dict(state)
    for trainer in (on_gpu, on_cpu):
        trainer.advance(2)
        trainer.finish()
    assert_same_bits(chains_of(on_cpu), chains_of(on_gpu))


# Small problems, by themselves and for compute-sanitizer ----------------------------------------------------------


def small_problems(wanted_route: str = "", num_sizes: str = "3") -> str:
    """Says which results differ from the CPU's, or "". PyTorch's own kernels are hardly used."""
    import compare  # of tests/cuda

    torch.manual_seed(0)
    asked: dict[str, set[str]] = {}  # routes that calls of a kind of model took, of "bipartite" and "graph"
    # In float32 a unit at the very edge of a clip may fall on the other side.
    for name, arguments, routes, tolerance in compare.calls(
        lambda route: wanted_route in ("", route), compare.SIZES[: int(num_sizes)], [torch.float64]
    ):
        op = getattr(torch.ops.gibbs_ext, name).default
        expected = call_on_cpu(op, *arguments)
        for route in routes:
            ops.set_cuda_route(route)
            differs = compare.differs(call_on_gpu(op, *arguments), expected, tolerance)
            ops.set_cuda_route("auto")
            asked.setdefault(name.split("_")[0], set()).add(ops.last_cuda_route())
            if differs:
                return f"{name}, {route}: the results differ"
    gx.synchronize()
    for kind, taken in asked.items():
        if wanted_route not in ("", *taken):
            return f"no {kind} call took the route {wanted_route}: this device has no room for it"
    return ""


def run_python(*arguments: str, environment: dict[str, str], before: tuple[str, ...] = ()) -> str:
    """Runs Python under the command ``before``. Returns its output, and shows it if the program fails."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [*before, sys.executable, *arguments],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": paths} | environment, timeout=3600,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"exit status {done.returncode}:\n{done.stdout[-20000:]}"
    return done.stdout


def test_small_problems() -> None:
    assert small_problems() == ""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str) -> None:
    # PyTorch tries which functions a driver has, so errors of API calls are no faults. Its cache of memory would hide
    # accesses beyond the end of a tensor.
    command = ("compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9")
    output = run_python(__file__, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, before=command)
    assert "the small problems agree" in output
    summaries = [line for line in output.splitlines() if "SUMMARY" in line]
    assert summaries, output[-20000:]
    assert all(" 0 errors" in line or "(0 errors" in line for line in summaries), output[-20000:]


if __name__ == "__main__":
    found = small_problems(*sys.argv[1:])
    print(found or "the small problems agree")
    sys.exit(bool(found))
