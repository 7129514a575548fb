# SPDX-License-Identifier: Apache-2.0
"""The ops in PyTorch: schemas, fake kernels, torch.compile, functorch, Ctrl-C."""

import math
import signal
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from graph_support import random_graph_parameters
from support import OPS, assert_close, assert_same_bits, random_bits, random_parameters, registered_ops
from torch import library

import gibbs_ext as gx
from gibbs_ext import ops

SEED, ONE = torch.tensor(5), torch.ones(1, dtype=torch.float64)


def samples(op):
    """Arguments of an op, of several kinds. Every op must have some."""
    for dtype, batches, state in [
        (torch.float32, ((), (), ()), (4,)),
        (torch.float64, ((3,), (), (3,)), (2, 3)),
        (torch.float32, ((0,), (), ()), (0,)),
    ]:
        grad = op == "bipartite_gibbs_relaxed"
        p = [x.requires_grad_(grad) for x in random_parameters(5, 7, batches, dtype=dtype)]
        left, chains = random_bits(*state, 5, dtype=dtype), torch.arange(state[-1])
        schedule = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
        if op == "bipartite_gibbs":
            yield (left.bool(), *p, ONE, SEED, None, None, None, None, 0, 0, 2)
            clamp = torch.zeros(5, dtype=torch.bool), torch.ones(7, dtype=torch.bool)
            yield (left, *p, schedule, SEED, random_bits(7, dtype=dtype), *clamp, chains, 0, 4, 3)
            yield (left, *p, torch.rand(2, *[1] * len(state), 3).double(), SEED, None, None, None, None, 0, 4, 3)
        elif op == "bipartite_gibbs_relaxed":
            for code in ops.RELAXATIONS.values():
                yield (left, *p, ONE, SEED, None, 0, 0, 2, 1, code, 4.0, True)
            yield (left, *p, schedule, SEED, chains, 0, 4, 1, 2, 0, 3.0, False)
            yield (left, *p, torch.rand(*state, 1).double(), SEED, None, 0, 4, 1, 2, 0, 3.0, False)
            yield (left.requires_grad_(), *p, ONE, SEED, None, 0, 0, 0, 1, 0, 4.0, True)
        elif op == "bipartite_gibbs_relaxed_backward":
            numbers = (ONE, SEED, None, 0, 0, 2)
            *outputs, state_out, fields = ops.call("bipartite_gibbs_relaxed", left, *p, *numbers, 2, 0, 4.0, True)
            grads = [torch.randn_like(out) for out in outputs]
            yield (*grads, state_out, fields, p[2], *numbers, 0, 4.0, True)
        elif op == "bipartite_ais":
            yield (left, *p, torch.zeros_like(p[0]), torch.zeros_like(p[1]), schedule, SEED, None, 0, 0)
            yield (left.bool(), *p, p[0], p[1], schedule, SEED, chains, 0, 3)
        elif op == "bipartite_tempering":
            yield (left, *p, *ladder(state), 4, 2, 3)
        elif op == "bipartite_moments":
            yield (left, *p, ONE, SEED, None, None, None, None, 0, 0, 4, 2, 2, True)
            yield (left.bool(), *p, schedule, SEED, None, None, None, chains, 0, 0, 3, 1, 1, False)
        elif op == "coupling_resolution":
            yield (p[2],)
        elif op.startswith("graph_"):
            yield from graph_samples(op, batches[1:], state, dtype)
        else:
            raise NotImplementedError(f"{op} has no samples: add some")


def ladder(state):
    """beta, seed and chains of a ladder of two betas."""
    beta = torch.tensor([0.5, 1.0], dtype=torch.float64).reshape(2, *[1] * len(state), 1)
    return beta, SEED, torch.arange(2 * math.prod(state)).reshape(2, *state)


def graph_samples(op, batches, state, dtype):
    graph = gx.ColoredGraph(7, [(i, (i + 1) % 7) for i in range(7)])
    p = [x.requires_grad_(op == "graph_gibbs_relaxed") for x in random_graph_parameters(graph, batches, dtype=dtype)]
    z, chains, layout = random_bits(*state, 7, dtype=dtype), torch.arange(state[-1]), graph.layout
    schedule = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    if op in ("graph_gibbs", "graph_metropolis"):
        yield (z.bool(), *p, layout, ONE, SEED, None, None, 0, 0, 2)
        yield (z, *p, layout, schedule, SEED, torch.zeros(7, dtype=torch.bool), chains, 0, 4, 3)
        yield (z, *p, layout, torch.rand(2, *[1] * len(state), 3).double(), SEED, None, None, 0, 4, 3)
    elif op == "graph_gibbs_relaxed":
        for code in ops.RELAXATIONS.values():
            yield (z, *p, layout, ONE, SEED, None, 0, 0, 2, 1, code, 4.0, True)
        yield (z, *p, layout, schedule, SEED, chains, 0, 4, 1, 2, 0, 3.0, False)
        yield (z, *p, layout, torch.rand(*state, 1).double(), SEED, None, 0, 4, 1, 2, 0, 3.0, False)
        yield (z.requires_grad_(), *p, layout, ONE, SEED, None, 0, 0, 0, 1, 0, 4.0, True)
    elif op == "graph_gibbs_relaxed_backward":
        numbers = (layout, ONE, SEED, None, 0, 0, 2)
        *outputs, state_out, fields = ops.call("graph_gibbs_relaxed", z, *p, *numbers, 2, 0, 4.0, True)
        yield (*(torch.randn_like(out) for out in outputs), state_out, fields, p[1], *numbers, 0, 4.0, True)
    elif op == "graph_ais":
        yield (z, *p, layout, torch.zeros_like(p[0]), schedule, SEED, None, 0, 0)
        yield (z.bool(), *p, layout, p[0], schedule, SEED, chains, 0, 3)
    elif op == "graph_tempering":
        yield (z, *p, layout, *ladder(state), 4, 2, 3, False)
        yield (z, *p, layout, *ladder(state), 4, 2, 3, True)
    elif op == "graph_moments":
        yield (z, *p, layout, ONE, SEED, None, None, 0, 0, 4, 2, 2, True, False)
        yield (z.bool(), *p, layout, schedule, SEED, None, chains, 0, 0, 3, 1, 1, False, True)
    elif op == "graph_coupling_resolution":
        yield (p[1], layout)
    elif op == "graph_fields":
        yield (torch.rand_like(z), *p, layout)
        yield (torch.rand_like(z).requires_grad_(), *(x.detach().requires_grad_() for x in p), layout)
    elif op == "graph_edge_sums":
        yield (torch.randn_like(z), torch.randn_like(z), p[1], layout)
        yield (torch.randn_like(z).requires_grad_(), torch.randn(7, dtype=dtype).requires_grad_(), p[1], layout)
    else:
        raise NotImplementedError(f"{op} has no samples: add some")


def test_the_ops_are_these():
    assert registered_ops() == list(OPS)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    overload = getattr(torch.ops.gibbs_ext, op).default
    for arguments in samples(op):
        library.opcheck(overload, arguments)


@pytest.mark.parametrize("op", OPS)
def test_fake_kernels_give_the_ops_shapes_and_dtypes(op):
    overload = getattr(torch.ops.gibbs_ext, op).default
    with torch.no_grad():
        for arguments in samples(op):
            real = overload(*arguments)
            meta = overload(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments))
            for r, m in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (real, meta)), strict=True):
                assert (r.shape, r.dtype, r.stride()) == (m.shape, m.dtype, m.stride())


def test_half_parameters_have_float32_fakes():
    p = [x.bfloat16() for x in random_parameters(5, 7)]
    arguments = (torch.zeros(5), *p, ONE, SEED, None, 0, 0, 2, 1, 0, 4.0, True)
    real = ops.call("bipartite_gibbs_relaxed", *arguments)
    meta = ops.call("bipartite_gibbs_relaxed", *(x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments))
    assert [x.dtype for x in real] == [x.dtype for x in meta]
    graph = gx.ChimeraGraph(1)
    p = random_graph_parameters(graph, dtype=torch.bfloat16)
    arguments = (torch.zeros(8), *p, graph.layout, ONE, SEED, None, 0, 0, 2, 1, 0, 4.0, True)
    real = ops.call("graph_gibbs_relaxed", *arguments)
    meta = ops.call("graph_gibbs_relaxed", *(x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments))
    assert [x.dtype for x in real] == [x.dtype for x in meta]


# torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_binary(backend):
    p, left = random_parameters(5, 7), random_bits(4, 5)

    def sample(left, *p):
        left, right = gx.bipartite_gibbs(left, *p, 3, beta=[0.5, 1.0, 1.5], seed=3)
        return left * 2, right

    compiled = torch.compile(sample, fullgraph=True, backend=backend)
    assert_same_bits(compiled(left, *p), sample(left, *p))


@pytest.mark.parametrize("sample_graph", [gx.graph_gibbs, gx.graph_metropolis], ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_binary_on_a_graph(backend, sample_graph):
    graph = gx.ChimeraGraph(1, 2)
    p, state = random_graph_parameters(graph), random_bits(4, 16)

    def sample(state, *p):
        return 2 * sample_graph(state, *p, graph, 3, beta=[0.5, 1.0, 1.5], clamp=torch.tensor(False), seed=3)

    compiled = torch.compile(sample, fullgraph=True, backend=backend)
    assert_same_bits(compiled(state, *p), sample(state, *p))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_relaxed_with_gradient(backend):
    p, left = random_parameters(5, 7, ((4,), (4,), (4,)), dtype=torch.float64), random_bits(4, 5, dtype=torch.float64)

    def loss(left, *p):
        left, right, left_mean = gx.bipartite_gibbs_relaxed(left, *(3 * x for x in p), 2, 2, seed=3)
        return (left**2).sum() + right.sum() * left_mean.mean()

    assert_compiled_gradients(loss, left, p, backend)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_relaxed_with_gradient_on_a_graph(backend):
    graph = gx.ChimeraGraph(1, 2)
    p = random_graph_parameters(graph, ((4,), (4,)), dtype=torch.float64)

    def loss(state, *p):
        zeta, mean = gx.graph_gibbs_relaxed(state, *(3 * x for x in p), graph, 2, 2, seed=3)
        return (zeta**2).sum() + mean.sum() * zeta.mean()

    assert_compiled_gradients(loss, random_bits(4, 16, dtype=torch.float64), p, backend)


def test_compile_relaxed_without_gradient():
    """Where nothing asks for a gradient, torch.compile calls the Functions' forward by its parameters."""
    left, state, graph = random_bits(4, 5), random_bits(4, 16), gx.ChimeraGraph(2, 1)
    p, q = random_parameters(5, 7), random_graph_parameters(graph)

    def everything(left, state):
        outputs = gx.bipartite_gibbs_relaxed(left, *p, 2, seed=3)
        return *outputs, *gx.graph_gibbs_relaxed(state, *q, graph, 2, seed=3), gx.graph_fields(state, *q, graph)

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(left, state), everything(left, state))


def assert_compiled_gradients(loss, state, parameters, backend):
    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
        leaves = [x.clone().requires_grad_() for x in parameters]
        value = function(state, *leaves)
        gradients.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for compiled, eager in zip(*gradients, strict=True):
        assert_close(compiled, eager, 1e-12)


def test_compile_draws_new_seeds():
    p, left = random_parameters(20, 7), random_bits(4, 20)
    compiled = torch.compile(lambda: gx.bipartite_gibbs(left, *p, 2)[0], fullgraph=True, backend="inductor")
    torch.manual_seed(1)
    first, second = compiled(), compiled()
    assert not first.equal(second)
    torch.manual_seed(1)
    assert_same_bits(compiled(), first)


def test_compile_model_and_changing_batch():
    model = gx.BipartiteBoltzmann(*random_parameters(6, 5))

    def free_energy(left):
        left, _ = gx.bipartite_gibbs(left, model.left_bias, model.right_bias, model.weight, 2, seed=1)
        return model.free_energy(left)

    compiled = torch.compile(free_energy, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (3, 4, 9):
        left = random_bits(batch, 6)
        assert_close(compiled(left), free_energy(left), 1e-5)


def test_compile_ais():
    p, left = random_parameters(5, 7), random_bits(4, 5)
    function = lambda left: gx.bipartite_ais(left, *p, p[0], p[1], [0.0, 0.5, 1.0], seed=2)  # noqa: E731
    assert_same_bits(torch.compile(function, fullgraph=True, backend="aot_eager")(left), function(left))
    graph = gx.ChimeraGraph(1)
    p, state = random_graph_parameters(graph), random_bits(4, 8)
    function = lambda state: gx.graph_ais(state, *p, graph, p[0], [0.0, 0.5, 1.0], seed=2)  # noqa: E731
    assert_same_bits(torch.compile(function, fullgraph=True, backend="aot_eager")(state), function(state))


# functorch --------------------------------------------------------------------------------------------------------


def test_func_grad():
    p, left = random_parameters(5, 7, dtype=torch.float64), random_bits(4, 5, dtype=torch.float64)

    def loss(weight):
        return gx.bipartite_gibbs_relaxed(left, p.left_bias, p.right_bias, weight, 2, seed=1)[0].sum()

    leaf = p.weight.clone().requires_grad_()
    assert_close(torch.func.grad(loss)(p.weight), torch.autograd.grad(loss(leaf), leaf)[0], 1e-12)


def test_func_grad_on_a_graph():
    graph = gx.ChimeraGraph(1)
    p, state = random_graph_parameters(graph, dtype=torch.float64), random_bits(4, 8, dtype=torch.float64)

    def loss(*p):
        return gx.graph_gibbs_relaxed(state, *p, graph, 2, seed=1)[0].sum()

    leaves = [x.clone().requires_grad_() for x in p]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for actual, wanted in zip(torch.func.grad(loss, argnums=(0, 1))(*p), expected, strict=True):
        assert_close(actual, wanted, 1e-12)


# Ctrl-C, and the module itself ------------------------------------------------------------------------------------

INTERRUPTED = """
    import os, signal, threading, time, torch, gibbs_ext as gx
    torch.set_num_threads(2)
    {model}
    before = [x.clone() for x in (state, *model)]
    {prepare}
    sent = []

    def interrupt():
        time.sleep(0.5)
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    try:
        {call}
    except KeyboardInterrupt:
        print("late" if time.perf_counter() - sent[0] > 1 else "in time")
        assert all(x.equal(y) for x, y in zip((state, *model), before))
        {again}
        try:
            {refused}
        except KeyboardInterrupt:
            print("an old interruption came back")
        except (RuntimeError, ValueError):
            print("and works on")
"""


def assert_stops(**parts):
    script = textwrap.dedent(INTERRUPTED).format(**parts)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["in time", "and works on", ""]


def assert_stops_on_a_graph(call, *, graph="gx.ChimeraGraph(4)", chains, models="", route="auto", prepare=""):
    assert_stops(
        model=f"gx.ops.set_graph_route('{route}'); graph = {graph}; n = graph.num_nodes; "
        f"state, bias = torch.zeros({chains}, n), torch.zeros(n, requires_grad=True); "
        f"coupling = 0.1 * torch.randn({models}graph.num_edges); model = bias, coupling",
        prepare=prepare,
        call=call,
        again="gx.graph_gibbs(state[:1], bias, coupling, graph, 1)",
        refused="gx.graph_gibbs(state[:, :3], bias, coupling, graph, 1)",
    )


CALLS = {
    "bipartite_gibbs": "gx.bipartite_gibbs(state, *model, 10**7)",
    "bipartite_gibbs_relaxed": "gx.bipartite_gibbs_relaxed(state, *model, 10**7)",
    "bipartite_ais": "gx.bipartite_ais(state, *model, bias, bias, torch.linspace(0, 1, 10**7))",
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("chains", "models"), [(1, ""), (512, ""), (64, "64, ")])
def test_ctrl_c_stops_within_a_second(call, chains, models):
    assert_stops(
        model=f"state = torch.zeros({chains}, 100); bias = torch.zeros(100, requires_grad=True); "
        f"model = bias, bias, 0.1 * torch.randn({models}100, 100)",
        prepare="",
        call=CALLS[call],
        again="gx.bipartite_gibbs(state[:1], bias, bias, model[2].view(-1, 100, 100)[0], 1)",
        refused="gx.bipartite_gibbs(state[:, :3], *model, 1)",
    )


GRAPH_CALLS = {
    "graph_gibbs": "gx.graph_gibbs(state, *model, graph, 10**8)",
    "graph_metropolis": "gx.graph_metropolis(state, *model, graph, 10**8)",
    "graph_gibbs_relaxed": "gx.graph_gibbs_relaxed(state, *model, graph, 10**8)",
    "graph_ais": "gx.graph_ais(state, *model, graph, bias, torch.linspace(0, 1, 10**7))",
}


@pytest.mark.parametrize(
    ("call", "chains", "models", "route"),
    [
        ("graph_gibbs", 512, "", "tables"),
        ("graph_gibbs", 512, "", "sums"),
        ("graph_gibbs", 1, "", "auto"),
        ("graph_gibbs", 64, "64, ", "auto"),
        ("graph_metropolis", 512, "", "auto"),
        ("graph_gibbs_relaxed", 512, "", "auto"),
        ("graph_ais", 512, "", "auto"),
    ],
)
def test_ctrl_c_on_a_graph(call, chains, models, route):
    assert_stops_on_a_graph(GRAPH_CALLS[call], chains=chains, models=models, route=route)


@pytest.mark.parametrize("backward", [False, True])
def test_ctrl_c_in_relaxed_sweeps(backward):
    """Relaxed sweeps of a dense graph take seconds although they keep few fields."""
    num_sweeps = 1000 if backward else 5000
    forward = f"loss = gx.graph_gibbs_relaxed(state, *model, graph, 0, {num_sweeps})[0].sum()"
    prepare, call = (forward, "loss.backward()") if backward else ("", forward)
    graph = "gx.ColoredGraph(800, torch.cartesian_prod(torch.arange(400), torch.arange(400, 800)))"
    assert_stops_on_a_graph(call, graph=graph, chains=1, prepare=prepare)


IDLE_CALLER = """
    import os, signal, threading, time, torch, gibbs_ext as gx
    bias, weight = torch.zeros(3, 100), 0.1 * torch.randn(3, 100, 100)
    bias[1] = 30

    left, model = torch.zeros(64, 3, 100), (bias, bias, weight)

    def call(n):
        gx.bipartite_gibbs(left, *model, n)

    torch.set_num_threads(2)
    seconds, num_sweeps = 0.0, 100
    while seconds < 0.5:
        num_sweeps *= 2
        start = time.perf_counter()
        call(num_sweeps)
        seconds = time.perf_counter() - start
    sent = []

    def interrupt():
        time.sleep(4.8)
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    try:
        call(int(num_sweeps * 6 / seconds))
        time.sleep(5)
    except KeyboardInterrupt:
        print("late" if time.perf_counter() - sent[0] > 0.7 else "in time")
"""


def test_ctrl_c_stops_threads_that_outlast_the_calling_one():
    """There are three models and two threads. The calling thread takes the first model. The other thread takes the
    second, whose bits never flip, finishes early and goes on to the third, until 6 s. Ctrl-C comes at 4.8 s, while the
    calling thread waits.
    """
    script = textwrap.dedent(IDLE_CALLER)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "in time\n"


@pytest.mark.parametrize("stray", ["left", "left_bias", "right_bias", "weight", "seed"])
def test_one_stray_meta_tensor_is_an_error(stray):
    arguments = {
        "left": torch.zeros(2, 4), "left_bias": torch.zeros(4), "right_bias": torch.zeros(5),
        "weight": torch.zeros(4, 5), "seed": torch.tensor(1),
    }  # fmt: skip
    arguments[stray] = arguments[stray].to("meta")
    with pytest.raises(ValueError, match=r"^bipartite_gibbs: \w+ must be on left's device"):
        gx.bipartite_gibbs(**arguments, num_sweeps=1)


def test_import_error_says_what_to_do():
    """Without its compiled module the package raises one clear error."""
    script = "import sys; sys.modules['gibbs_ext._C'] = None; import gibbs_ext"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: gibbs_ext: the compiled module gibbs_ext._C does not load")


def test_no_signal_handler_is_left_behind():
    before = signal.getsignal(signal.SIGINT)
    gx.bipartite_gibbs(torch.zeros(3), torch.zeros(3), torch.zeros(3), torch.zeros(3, 3), 1)
    assert signal.getsignal(signal.SIGINT) is before


def test_importing_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gx.build_info()["version"]
