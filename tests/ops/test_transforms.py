# SPDX-License-Identifier: Apache-2.0
"""Transforms of torch.func: a row of torch.vmap is a call of its own, and a derivative is right or refused by name."""

import math

import pytest
import torch
from graph_support import random_graph_parameters
from support import assert_close, assert_same_bits, random_bits, random_parameters, z_threshold
from torch import func

import gibbs_ext as gx
from gibbs_ext import ops
from gibbs_ext.log_partition import machine

ROWS = 3
GRAPH = gx.ColoredGraph(7, [(i, (i + 1) % 7) for i in range(7)])
MODELS = {"one model": ((2,), ()), "two models": ((2, 2), (2,))}  # batch shapes of the chains, and of the parameters
SIDES = {"left": 5, "right": 4, "left_bias": 5, "right_bias": 4, "clamp_left": 5, "clamp_right": 4}


def one(argument, chains, models):
    """An argument of one row."""
    if argument in ("left", "right"):
        return random_bits(*chains, SIDES[argument])
    if argument == "state":
        return random_bits(*chains, 7)
    if argument.startswith("clamp"):
        return random_bits(SIDES.get(argument, 7)).bool()
    if argument == "weight":
        return random_parameters(5, 4, (models,) * 3).weight
    if argument == "chain_offset":
        return torch.randint(1000, chains)
    if argument == "seed":
        return torch.randint(1000, ())
    if argument in ("beta", "betas"):
        return torch.rand(3, dtype=torch.float64)
    return torch.randn(*models, SIDES.get(argument.removeprefix("base_"), 7))


COUNTERS = ("chain_offset", "seed")
BIPARTITE = ("left", "left_bias", "right_bias", "weight")
ARGUMENTS = {
    "bipartite_gibbs": (*BIPARTITE, "right", "clamp_left", "clamp_right", "beta", *COUNTERS),
    "bipartite_gibbs_relaxed": (*BIPARTITE, "beta", *COUNTERS),
    "bipartite_ais": (*BIPARTITE, "base_left_bias", "base_right_bias", "betas", *COUNTERS),
    "graph_gibbs": ("state", "bias", "coupling", "clamp", "beta", *COUNTERS),
    "graph_metropolis": ("state", "bias", "coupling", "clamp", "beta", *COUNTERS),
    "graph_gibbs_relaxed": ("state", "bias", "coupling", "beta", *COUNTERS),
    "graph_ais": ("state", "bias", "coupling", "base_bias", "betas", *COUNTERS),
}
DRAWN = [name for name in ARGUMENTS if "ais" not in name]


def call(name, arguments, **options):
    """Outputs of a function as a tuple. ``arguments`` may lack some of its tensors."""
    sweeps = {"relaxed": {"num_sweeps": 1, "num_relaxed_sweeps": 2}, "ais": {}}.get(
        name.split("_")[-1], {"num_sweeps": 3}
    )
    graph = {"graph": GRAPH} if name.startswith("graph") else {}
    outputs = getattr(gx, name)(**arguments, **graph, **sweeps, **options)
    return (outputs,) if isinstance(outputs, torch.Tensor) else outputs


def check_rows(name, models, mapped, dim, left_out=(), **options):
    """Compares torch.vmap with a loop."""
    names = [argument for argument in ARGUMENTS[name] if argument not in left_out]
    rows = [{argument: one(argument, *MODELS[models]) for argument in names} for _ in range(ROWS)]
    for argument in set(names) - set(mapped):
        for row in rows:
            row[argument] = rows[0][argument]
    dims = [dim if argument in mapped else None for argument in names]
    if dim == 1:
        dims = [None if d is None else min(d, rows[0][argument].dim()) for d, argument in zip(dims, names, strict=True)]
    stacked = [
        rows[0][argument] if d is None else torch.stack([row[argument] for row in rows], d)
        for argument, d in zip(names, dims, strict=True)
    ]

    def function(*values):
        return call(name, dict(zip(names, values, strict=True)), **options)

    actual = torch.vmap(function, tuple(dims))(*stacked)
    assert_same_bits(actual, [torch.stack(o) for o in zip(*(call(name, row, **options) for row in rows), strict=True)])


# vmap: rows of a call with a seed --------------------------------------------------------------------------------


@pytest.mark.parametrize("models", MODELS)
@pytest.mark.parametrize(("name", "argument"), [(name, a) for name, given in ARGUMENTS.items() for a in given])
def test_each_argument_may_be_mapped(name, argument, models):
    check_rows(name, models, [argument], 0)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("models", MODELS)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_rows_are_calls_of_their_own(name, models, dim):
    for shared in ((), ("seed",), ("seed", "beta", "betas"), (*COUNTERS, "beta", "betas", "weight", "coupling")):
        check_rows(name, models, set(ARGUMENTS[name]) - set(shared), dim)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_chains_have_the_same_numbers_in_every_row(name):
    optional = ("right", "clamp_left", "clamp_right", "clamp")
    for models in MODELS:
        given = set(ARGUMENTS[name]) - {"beta", "betas", "seed", *optional}
        check_rows(name, models, given, 0, (*optional, "chain_offset"), chain_offset=11)
        check_rows(name, models, ["left_bias", "bias"], 0, ("seed", "chain_offset"), seed=3)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_nested(name):
    """The inner vmap maps the couplings, the outer one the state, and the seed of one of them too."""
    coupling, state = ("weight", "left") if "bipartite" in name else ("coupling", "state")
    row = {argument: one(argument, (2,), ()) for argument in ARGUMENTS[name]}
    states = torch.stack([one(state, (2,), ()) for _ in range(2)])
    couplings = torch.stack([one(coupling, (2,), ()) for _ in range(ROWS)], -1)
    seeds = torch.arange(ROWS)
    for del_offset in (False, True):
        if del_offset:
            del row["chain_offset"]
        for mapped_seed in (None, 0):

            def function(state_row, coupling_row, seed, row=row):
                return call(name, row | {state: state_row, coupling: coupling_row, "seed": seed})

            inner = torch.vmap(function, (None, -1, mapped_seed), 1)
            actual = torch.vmap(inner, (0, None, None))(states, couplings, seeds if mapped_seed == 0 else seeds[1])
            for i, s in enumerate(states):
                for j in range(ROWS):
                    expected = function(s, couplings[..., j], seeds[j if mapped_seed == 0 else 1])
                    assert_same_bits([output[i].select(1, j) for output in actual], expected)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_no_rows(name):
    row = {argument: one(argument, (2,), ()) for argument in ARGUMENTS[name]}
    shapes = [(0, *output.shape) for output in call(name, row)]
    for mapped in (ARGUMENTS[name][0], "seed"):
        function = lambda t, mapped=mapped: call(name, row | {mapped: t})  # noqa: E731
        outputs = torch.vmap(function)(row[mapped].new_zeros(0, *row[mapped].shape))
        assert [output.shape for output in outputs] == shapes


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_coupling_resolution(dim):
    weight = torch.randn(2, 5, 4) * torch.tensor([1.0, 100.0]).reshape(2, 1, 1)
    expected = gx.coupling_resolution(weight)
    assert expected[0] != expected[1]
    assert_same_bits(torch.vmap(gx.coupling_resolution, dim)(weight.movedim(0, dim)), expected)
    coupling, bias = weight[:, 0, :1].expand(2, 7), torch.zeros(7)

    def of_graph(coupling):
        return gx.coupling_resolution(gx.GraphBoltzmann(GRAPH, bias, coupling))

    assert_same_bits(torch.vmap(of_graph, dim)(coupling.movedim(0, dim)), of_graph(coupling))


def test_what_does_not_fit_is_told_of_a_row():
    p = random_parameters(5, 4)
    for bad, message in [
        ({"left": torch.zeros(3, 6)}, r"left must have shape \[\.\.\., 5\]"),
        ({"left": torch.zeros(5)}, r"left must have shape \[\.\.\., 5\] to fit weight \[5, 4\], got \[\]"),
        ({"weight": torch.zeros(5, 4)}, r"weight must have shape \[\.\.\., n1, n2\], got \[4\]"),
        ({"left": torch.zeros(3, 2, 5), "left_bias": torch.zeros(3, 4, 5)}, "does not broadcast"),
    ]:
        arguments = {"left": torch.zeros(2, 5), **p._asdict()} | bad
        dims = tuple(0 if argument in bad else None for argument in arguments)
        for seed, randomness in ((1, "error"), (None, "different")):

            def function(*tensors, seed=seed):
                return gx.bipartite_gibbs(*tensors, 2, seed=seed)

            with pytest.raises((ValueError, RuntimeError), match=f"^bipartite_gibbs: .*{message}"):
                torch.vmap(function, dims, randomness=randomness)(*arguments.values())


def test_compiled():
    p, left = random_parameters(5, 4), random_bits(3, 2, 5)
    q, state = random_graph_parameters(GRAPH), random_bits(3, 2, 7)

    def mapped(left, state):
        def function(left, state):
            fields = gx.graph_fields(state, *q, GRAPH)
            return *gx.bipartite_gibbs(left, *p, 2, seed=1), gx.graph_gibbs(state, *q, GRAPH, 2, seed=1), fields

        return torch.vmap(function)(left, state)

    compiled = torch.compile(mapped, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(left, state), mapped(left, state))


# vmap: rows of a call that draws its seed ------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAWN)
def test_different_rows_are_independent(name):
    """Units are fair and unfair coins, whose means, and how often two rows agree, are known."""
    rows, chains = 40, 50
    bias = torch.linspace(-2, 2, 7)
    if name.startswith("bipartite"):
        parameters = {"left_bias": bias, "right_bias": torch.zeros(1), "weight": torch.zeros(7, 1)}
    else:
        parameters = {"bias": bias, "coupling": torch.zeros(7)}
    if "relaxed" in name:
        parameters |= {"relaxation": "straight_through"}
    state = "left" if "left_bias" in parameters else "state"
    p = bias.sigmoid()
    if name == "graph_metropolis":  # three sweeps from 0
        p = torch.zeros(7)
        for _ in range(3):
            p = p * (1 - (-bias).exp().clamp(max=1)) + (1 - p) * bias.exp().clamp(max=1)
    generator = torch.Generator().manual_seed(5)
    for options in ({}, {"chain_offset": 10**6}, {"chain_offset": torch.arange(chains)}, {"generator": generator}):

        def function(z, options=options):
            return call(name, {state: z} | parameters, **options)[0]

        z = torch.vmap(function, randomness="different")(torch.zeros(rows, chains, 7))
        assert z.shape == (rows, chains, 7)
        limit = z_threshold(7 * 2 * 4)
        deviation = (p * (1 - p) / (rows * chains)).sqrt()
        assert ((z.mean((0, 1)) - p).abs() < limit * deviation).all()
        agree = p**2 + (1 - p) ** 2
        share = (z[1::2] == z[::2]).double().mean((0, 1))
        assert ((share - agree).abs() < limit * (agree * (1 - agree) / (rows // 2 * chains)).sqrt()).all()
        assert len({tuple(row.flatten().tolist()) for row in z}) == rows


def test_different_rows_have_chains_of_one_seed(monkeypatch):
    """The op is called once, and the chains of each row follow those of the row before."""
    calls = []
    right = ops._call
    monkeypatch.setattr(ops, "_call", lambda op, *args: calls.append(args) or right(op, *args))
    p = random_parameters(5, 4)

    def function(left):
        return gx.bipartite_gibbs(left, *p, 3, chain_offset=7)

    actual = torch.vmap(function, randomness="different")(torch.zeros(3, 2, 5))
    assert len(calls) == 1
    seed = calls[0][5]
    assert_same_bits(actual, gx.bipartite_gibbs(torch.zeros(3, 2, 5), *p, 3, chain_offset=7, seed=seed))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_nested_different_rows_differ(name):
    given = {argument: one(argument, (4,), ()) for argument in ARGUMENTS[name] if argument not in COUNTERS}
    state = ARGUMENTS[name][0]
    given = {argument: value for argument, value in given.items() if not argument.startswith("clamp")}

    def function(z):
        return call(name, given | {state: z})[0]

    inner = torch.vmap(function, randomness="different")
    outputs = torch.vmap(inner, randomness="different")(torch.zeros(3, 5, *given[state].shape))
    assert len({tuple(row.flatten().tolist()) for row in outputs.flatten(0, 1)}) == 15
    same = torch.vmap(torch.vmap(function, randomness="same"), randomness="different")
    outputs = same(torch.zeros(3, 5, *given[state].shape))
    assert len({tuple(row.flatten().tolist()) for row in outputs.flatten(0, 1)}) == 3
    assert_same_bits(outputs, outputs[:, :1].expand_as(outputs))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_same_rows_are_those_of_one_seed(name):
    given = {argument: one(argument, (4,), ()) for argument in ARGUMENTS[name] if argument not in COUNTERS}
    state = ARGUMENTS[name][0]
    outputs = torch.vmap(lambda z: call(name, given | {state: z}), randomness="same")(torch.stack([given[state]] * 2))
    for output in outputs:
        assert_same_bits(output[0], output[1])


@pytest.mark.parametrize("name", ARGUMENTS)
def test_randomness_must_be_chosen_or_a_seed_given(name):
    given = {argument: one(argument, (4,), ()) for argument in ARGUMENTS[name] if argument not in COUNTERS}
    state = ARGUMENTS[name][0]
    with pytest.raises(RuntimeError, match=rf"^{name}: seed must be given inside .*'different' .* or 'same'"):
        torch.vmap(lambda z: call(name, given | {state: z}))(torch.stack([given[state]] * 2))


# Models and modules ----------------------------------------------------------------------------------------------


def model_of(graph, coupling):
    """A model of couplings [4, 4] or [7] and biases that stay the same."""
    bias = torch.linspace(-1, 1, 7, dtype=coupling.dtype)
    if graph:
        return gx.GraphBoltzmann(GRAPH, bias, coupling)
    return gx.BipartiteBoltzmann(bias[:4], bias[3:], coupling)


def couplings_of(graph, rows=3):
    return torch.randn(rows, 7, dtype=torch.float64) if graph else torch.randn(rows, 4, 4, dtype=torch.float64)


def bits_of(graph, *shape):
    return random_bits(*shape, 7 if graph else 8, dtype=torch.float64)


@pytest.mark.parametrize("graph", [False, True])
def test_methods_of_models(graph):
    couplings, z = couplings_of(graph), bits_of(graph)
    methods = {
        "energy": lambda model: model.energy(z),
        "free energy": lambda model: model.free_energy(z[: model._num_state_units]),
        "log_prob": lambda model: model.log_prob(z),
        "sample": lambda model: model.sample((3,), 5, seed=1),
        "rsample": lambda model: model.rsample((3,), 5, seed=1),
        "log_partition": lambda model: model.log_partition(num_chains=20, betas=20, seed=1),
        "AIS": lambda model: gx.annealed_importance_sampling(model, 20, [0.0, 0.5, 1.0], seed=1),
        "surrogate": lambda model: gx.negative_log_likelihood_surrogate(model, z[None].expand(50, -1), None),
    }
    for name, method in methods.items():
        torch.manual_seed(0)
        actual = torch.vmap(lambda c, method=method: method(model_of(graph, c)), randomness="same")(couplings)
        for i, coupling in enumerate(couplings):
            torch.manual_seed(0)
            expected = method(model_of(graph, coupling))
            if isinstance(expected, tuple):
                assert_close(actual.log_partition[i], expected.log_partition, 1e-12)
                assert_same_bits(actual.samples[i], expected.samples)
            elif name == "sample":
                assert_same_bits(actual[i], expected)
            else:
                assert_close(actual[i], expected, 1e-12)


@pytest.mark.parametrize("graph", [False, True])
def test_samples_of_different_rows(graph):
    coupling = couplings_of(graph, 1)[0]
    samples = torch.vmap(lambda _: model_of(graph, coupling).sample((20,)), randomness="different")(torch.zeros(9))
    assert len({tuple(row.flatten().tolist()) for row in samples}) == 9
    result = torch.vmap(lambda c: model_of(graph, c).log_partition(num_chains=5, betas=5), randomness="different")(
        coupling.expand(9, *coupling.shape)
    )
    assert len(set(result.tolist())) == 9


def test_values_are_checked_in_all_rows():
    model = model_of(True, couplings_of(True)[0])
    betas = torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.2, 1.0]], dtype=torch.float64)

    def log_partition(betas):
        return gx.annealed_importance_sampling(model, 20, betas, seed=1).log_partition

    assert_close(torch.vmap(log_partition)(betas), torch.stack([log_partition(row) for row in betas]), 1e-12)
    with pytest.raises(ValueError, match=r"^annealed_importance_sampling: betas must rise from 0 to 1"):
        torch.vmap(log_partition)(betas + torch.tensor([[0.0], [0.1]]))
    bits = torch.tensor([[0, 1, 1], [1, 0, 2]])
    assert_same_bits(torch.vmap(gx.pack_bits, 1, 1)(bits[:1].mT), gx.pack_bits(bits[:1]).mT)
    with pytest.raises(ValueError, match=r"^pack_bits: bits must hold 0 and 1 only"):
        torch.vmap(gx.pack_bits)(bits)
    with pytest.raises(ValueError, match=r"^graph_gibbs: beta must be finite"):
        torch.vmap(
            lambda beta: gx.graph_gibbs(torch.zeros(7), model.bias, model.coupling, GRAPH, 2, beta=beta, seed=1)
        )(torch.tensor([1.0, math.nan]))


def test_log_prob_of_mapped_bits():
    model, z = model_of(True, couplings_of(True)[0]), bits_of(True, 3)
    assert_close(torch.vmap(model.log_prob)(z), model.log_prob(z), 1e-12)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("coupling", ["per_sample", "shared"])
def test_gradients_of_a_posterior_for_each_sample(graph, coupling):
    sizes = {"graph": GRAPH} if graph else {"num_left": 3, "num_right": 4}
    posterior = gx.nn.BoltzmannPosterior(5, **sizes, coupling=coupling, num_sweeps=2, sharpness=1.0).double().eval()
    parameters = {name: p.detach() for name, p in posterior.named_parameters()}
    features = torch.randn(6, 5, dtype=torch.float64)

    def loss(parameters, features, chain):
        options = {"seed": 3, "chain_offset": chain}
        sample = func.functional_call(posterior, parameters, (features[None],), options)
        return (sample.z_mean**2).sum() + sample.model.energy(sample.z).sum()

    chains = torch.arange(6).reshape(6, 1)
    actual = torch.vmap(func.grad(loss), (None, 0, 0))(parameters, features, chains)
    assert any(gradient.any() for gradient in actual.values())
    for i, row in enumerate(features):
        for name, gradient in func.grad(loss)(parameters, row, chains[i]).items():
            assert_close(actual[name][i], gradient, 1e-12)


def test_persistent_chains_say_why_not():
    model = model_of(True, couplings_of(True)[0])
    chains = gx.PersistentChains(4, model)
    before = chains.bits.clone()

    def loss(coupling):
        return gx.negative_log_likelihood_surrogate(model_of(True, coupling), bits_of(True, 2), chains)

    message = r"^negative_log_likelihood_surrogate: bits cannot be mutated inside"
    for transformed in (func.grad(loss), lambda c: torch.vmap(loss, randomness="same")(c[None])):
        with pytest.raises(NotImplementedError, match=message):
            transformed(model.coupling)
    assert_same_bits(chains.bits, before)


# Gradients of relaxed sweeps --------------------------------------------------------------------------------------

RELAXED = {
    "bipartite_gibbs_relaxed": ("left", "left_bias", "right_bias", "weight"),
    "graph_gibbs_relaxed": ("state", "bias", "coupling"),
}


def relaxed_loss(name, relaxation="pwl", is_linear=False, **options):
    """A loss of all outputs, differentiable in all of RELAXED's arguments."""

    def loss(*tensors):
        arguments = dict(zip(RELAXED[name], tensors, strict=True))
        graph = {"graph": GRAPH} if name.startswith("graph") else {}
        outputs = getattr(gx, name)(**arguments, **graph, **options, relaxation=relaxation, sharpness=1.5, seed=4)
        return sum((output if is_linear else output**2).sum() * (i + 1) for i, output in enumerate(outputs))

    return loss


def relaxed_arguments(name, models="one model"):
    tensors = [one(argument, *MODELS[models]).double() for argument in RELAXED[name]]
    return [torch.rand_like(tensors[0]), *(0.3 * tensor for tensor in tensors[1:])]


@pytest.mark.parametrize("relaxation", ops.RELAXATIONS)
@pytest.mark.parametrize("models", MODELS)
@pytest.mark.parametrize("name", RELAXED)
def test_gradients_for_each_sample(name, models, relaxation):
    loss = relaxed_loss(name, relaxation, num_sweeps=0, num_relaxed_sweeps=2)
    argnums = tuple(range(len(RELAXED[name])))
    rows = [relaxed_arguments(name, models) for _ in range(ROWS)]
    for mapped in [*((i,) for i in argnums), argnums]:
        for row in rows:
            for i in set(argnums) - set(mapped):
                row[i] = rows[0][i]
        for dim in (0, -1):
            dims = tuple(dim if i in mapped else None for i in argnums)
            stacked = [torch.stack([row[i] for row in rows], dim) if i in mapped else rows[0][i] for i in argnums]
            gradients = torch.vmap(func.grad(loss, argnums), dims)(*stacked)
            whole = func.grad(lambda *t, dims=dims: torch.vmap(loss, dims)(*t).sum(), argnums)(*stacked)
            each = [func.grad(loss, argnums)(*row) for row in rows]
            assert all(gradient.any() for gradient in each[0])
            for i in argnums:
                expected = torch.stack([gradient[i] for gradient in each])
                assert_close(gradients[i], expected, 1e-12)
                assert_close(whole[i], expected.movedim(0, dim) if i in mapped else expected.sum(0), 1e-12)


@pytest.mark.parametrize("name", RELAXED)
def test_gradients_of_rows_with_seeds_of_their_own(name):
    tensors = relaxed_arguments(name)[1:]
    state = one(RELAXED[name][0], (2,), ()).double()

    def loss(seed, *tensors):
        arguments = dict(zip(RELAXED[name], (state, *tensors), strict=True))
        return (call(name, arguments | {"seed": seed}, relaxation="concrete", sharpness=1.0)[0] ** 2).sum()

    argnums = tuple(range(1, 1 + len(tensors)))
    seeds = torch.arange(4)
    actual = torch.vmap(func.grad(loss, argnums), (0, *(None,) * len(tensors)))(seeds, *tensors)
    for i, seed in enumerate(seeds):
        for gradient, expected in zip(actual, func.grad(loss, argnums)(seed, *tensors), strict=True):
            assert_close(gradient[i], expected, 1e-12)
    loose = torch.vmap(lambda c: func.grad(loss, argnums)(None, *tensors[:-1], c), randomness="different")
    rows = loose(tensors[-1].expand(4, *tensors[-1].shape))
    assert all(len({tuple(row.flatten().tolist()) for row in gradient}) == 4 for gradient in rows)


@pytest.mark.parametrize("name", RELAXED)
def test_jacobians(name):
    """torch.func.jacrev maps the gradients of the outputs alone."""
    tensors = relaxed_arguments(name)

    def outputs(*tensors):
        return call(name, dict(zip(RELAXED[name], tensors, strict=True)), seed=2)[1]

    i = len(tensors) - 1
    jacobian = func.jacrev(outputs, i)((tensors[0] > 0.5).double(), *tensors[1:])
    leaves = [(tensors[0] > 0.5).double(), *(tensor.requires_grad_() for tensor in tensors[1:])]
    values = outputs(*leaves).flatten()
    expected = torch.stack([torch.autograd.grad(value, leaves[i], retain_graph=True)[0] for value in values])
    assert expected.any()
    assert_close(jacobian.reshape(expected.shape), expected, 1e-12)


@pytest.mark.parametrize("name", RELAXED)
def test_starting_state_may_be_overwritten_before_backward(name):
    tensors = relaxed_arguments(name)
    state = (tensors[0] > 0.5).double()
    loss = relaxed_loss(name, num_sweeps=1)
    leaves = [tensor.requires_grad_() for tensor in tensors[1:]]
    expected = torch.autograd.grad(loss(state, *leaves), leaves)
    value = loss(state, *leaves)
    state.zero_()
    for actual, wanted in zip(torch.autograd.grad(value, leaves), expected, strict=True):
        assert_same_bits(actual, wanted)


# Refusals by name --------------------------------------------------------------------------------------------------


def forward_derivative(function, tensor):
    with torch.autograd.forward_ad.dual_level():
        return function(torch.autograd.forward_ad.make_dual(tensor, torch.ones_like(tensor)))


FORWARD_MODES = {
    "jvp": lambda f, x: func.jvp(f, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda f, x: func.jacfwd(f)(x),
    "hessian": lambda f, x: func.hessian(f)(x),
    "forward_ad": forward_derivative,
}


@pytest.mark.parametrize("mode", FORWARD_MODES)
@pytest.mark.parametrize(("name", "i"), [(name, i) for name, given in RELAXED.items() for i in range(len(given))])
def test_forward_mode_of_relaxed_sweeps_is_refused(name, i, mode):
    tensors = relaxed_arguments(name)
    loss = relaxed_loss(name, num_sweeps=0)
    with pytest.raises(NotImplementedError, match=f"^{name}: forward-mode derivatives .* not supported; use reverse"):
        FORWARD_MODES[mode](lambda x: loss(*tensors[:i], x, *tensors[i + 1 :]), tensors[i])


def gradient_twice(function, tensor):
    tensor = tensor.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(tensor), tensor, create_graph=True)
    return torch.autograd.grad(gradient.sum(), tensor)


SECOND_DERIVATIVES = {
    "twice": gradient_twice,
    "jacrev": lambda f, x: func.jacrev(func.jacrev(f))(x),
    "autograd.functional": torch.autograd.functional.hessian,
    "gradgradcheck": lambda f, x: torch.autograd.gradgradcheck(f, x.clone().requires_grad_()),
}


@pytest.mark.parametrize("is_linear", [False, True])
@pytest.mark.parametrize("way", SECOND_DERIVATIVES)
@pytest.mark.parametrize(("name", "i"), [(name, i) for name, given in RELAXED.items() for i in range(len(given))])
def test_second_derivatives_of_relaxed_sweeps_are_refused(name, i, way, is_linear):
    """Each argument alone is refused, even a bias: gradients depend on it although backward does not read it."""
    tensors = relaxed_arguments(name)
    loss = relaxed_loss(name, is_linear=is_linear, num_sweeps=0)
    with pytest.raises(NotImplementedError, match=f"^{name}: second derivatives are not supported"):
        SECOND_DERIVATIVES[way](lambda x: loss(*tensors[:i], x, *tensors[i + 1 :]), tensors[i])


@pytest.mark.parametrize("name", RELAXED)
def test_second_derivatives_of_rows_are_refused(name):
    tensors = relaxed_arguments(name)
    loss = relaxed_loss(name, is_linear=True, num_sweeps=0)

    def gradient_of(bias):
        return func.grad(lambda b: loss(tensors[0], b, *tensors[2:]))(bias).sum()

    with pytest.raises(NotImplementedError, match=f"^{name}: second derivatives are not supported"):
        torch.vmap(func.grad(gradient_of))(torch.stack([tensors[1]] * 2))


@pytest.mark.parametrize("name", ["bipartite_gibbs", "graph_gibbs", "bipartite_ais", "graph_ais"])
def test_what_is_not_differentiable_has_no_tangent(name):
    row = {argument: one(argument, (2,), ()) for argument in ARGUMENTS[name]}
    bias = "left_bias" if "left_bias" in row else "bias"
    outputs, tangents = func.jvp(lambda b: call(name, row | {bias: b}), (row[bias],), (torch.ones_like(row[bias]),))
    assert_same_bits(outputs, call(name, row))
    assert not any(tangent.any() for tangent in tangents)


@pytest.mark.parametrize("graph", [False, True])
def test_annealed_importance_sampling_has_no_tangent(graph):
    """There is no gradient, because that of the base's log Z alone would be wrong."""

    def log_partition(coupling):
        return gx.annealed_importance_sampling(model_of(graph, coupling), 50, 10, seed=1).log_partition

    coupling = couplings_of(graph)[0]
    assert not func.jvp(log_partition, (coupling,), (torch.ones_like(coupling),))[1].any()


# Energies, and log Z -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [((),) * 3, ((3,), (), ()), ((3, 2), (2,), (2,)), ((), (3,), ()), ((), (), (3,))])
def test_forward_mode_of_fields(batches):
    state = torch.randn(*batches[0], 7, dtype=torch.float64, requires_grad=True)
    leaves = [state, *(x.requires_grad_() for x in random_graph_parameters(GRAPH, batches[1:], dtype=torch.float64))]
    options = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(lambda *leaves: gx.graph_fields(*leaves, GRAPH), leaves, **options)
    assert torch.autograd.gradgradcheck(
        lambda *leaves: gx.graph_fields(*leaves, GRAPH), leaves, check_fwd_over_rev=True, check_rev_over_rev=True
    )


def methods_of_a_graph(state, bias, coupling):
    model = gx.GraphBoltzmann(GRAPH, bias, coupling, validate_args=False)
    return model.energy(state), model.free_energy(state), model.log_prob(state, torch.tensor(1.0))


def methods_of_two_sides(left, right, left_bias, right_bias, weight):
    model = gx.BipartiteBoltzmann(left_bias, right_bias, weight, validate_args=False)
    z = torch.cat((left, right), -1)
    return model.energy(z), model.free_energy(left), model.log_prob(z)


@pytest.mark.parametrize("methods", [methods_of_a_graph, methods_of_two_sides])
def test_forward_mode_and_hessians_of_energies(methods):
    sizes = [(7,), (7,), (7,)] if methods is methods_of_a_graph else [(2, 4), (2, 3), (4,), (3,), (4, 3)]
    tensors = [torch.rand(*size, dtype=torch.float64) for size in sizes]
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(methods, leaves, check_forward_ad=True)
    for output in range(3):
        total = lambda *tensors, output=output: methods(*tensors)[output].sum()  # noqa: E731
        argnums = tuple(range(len(tensors)))
        hessian = func.hessian(total, argnums)(*tensors)
        reverse = func.jacrev(func.jacrev(total, argnums), argnums)(*tensors)
        forward = func.jacrev(func.jacfwd(total, argnums), argnums)(*tensors)
        assert any(block.any() for row in hessian for block in row)
        for i in argnums:
            for j in argnums:
                assert_close(hessian[i][j], reverse[i][j], 1e-12)
                assert_close(forward[i][j], reverse[i][j], 1e-12)


@pytest.mark.parametrize("batches", [((), ()), ((2,), ()), ((), (2,)), ((2, 1), (2,))])
def test_exact_log_partition_of_a_graph(batches):
    rows = [random_graph_parameters(GRAPH, batches, dtype=torch.float64) for _ in range(ROWS)]

    def log_partition(bias, coupling):
        return gx.exact_log_partition(gx.GraphBoltzmann(GRAPH, bias, coupling, validate_args=False))

    def total(*p):
        return (log_partition(*p) ** 2).sum()

    for mapped in ((0,), (1,), (0, 1)):
        rows = [[row[i] if i in mapped else rows[0][i] for i in (0, 1)] for row in rows]
        dims = tuple(-1 if i in mapped else None for i in (0, 1))
        stacked = [torch.stack([row[i] for row in rows], -1) if i in mapped else rows[0][i] for i in (0, 1)]
        values = torch.stack([log_partition(*row) for row in rows])
        assert_close(torch.vmap(log_partition, dims)(*stacked), values, 1e-13)
        gradients = torch.vmap(func.grad(total, (0, 1)), dims)(*stacked)
        whole = func.grad(lambda *p, dims=dims: torch.vmap(total, dims)(*p).sum(), (0, 1))(*stacked)
        each = [func.grad(total, (0, 1))(*row) for row in rows]
        for i in (0, 1):
            expected = torch.stack([gradient[i] for gradient in each])
            assert_close(gradients[i], expected, 1e-12)
            assert_close(whole[i], expected.movedim(0, -1) if i in mapped else expected.sum(0), 1e-12)

    leaves = [x.clone().requires_grad_() for x in rows[0]]
    options = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(log_partition, leaves, **options)
    for i in (0, 1):
        for jacobian in (func.jacfwd, func.jacrev):
            one_way = jacobian(total, i)(*rows[0])
            assert_close(one_way, func.grad(total, i)(*rows[0]), 1e-12)

    marginals = torch.vmap(lambda b, c: gx.exact_marginals(gx.GraphBoltzmann(GRAPH, b, c)), dims)(*stacked)
    for i, row in enumerate(rows):
        expected = gx.exact_marginals(gx.GraphBoltzmann(GRAPH, *row))
        assert_close(marginals.single[i], expected.single, 1e-13)
        assert_close(marginals.pair[i], expected.pair, 1e-13)


@pytest.mark.parametrize("way", [*SECOND_DERIVATIVES, "hessian", "reverse over forward"])
@pytest.mark.parametrize("i", [0, 1])
def test_second_derivatives_of_a_graphs_log_partition_are_refused(way, i):
    p = random_graph_parameters(GRAPH, dtype=torch.float64)

    def log_partition(x):
        given = [*p[:i], x, *p[i + 1 :]]
        return gx.exact_log_partition(gx.GraphBoltzmann(GRAPH, *given, validate_args=False))

    ways = SECOND_DERIVATIVES | {
        "hessian": lambda f, x: func.hessian(f)(x),
        "reverse over forward": lambda f, x: func.grad(lambda y: func.jvp(f, (y,), (torch.ones_like(y),))[1])(x),
    }
    with pytest.raises(NotImplementedError, match=r"^exact_log_partition: second derivatives are not supported"):
        ways[way](log_partition, p[i])


@pytest.mark.parametrize("dims", [(0, 0), (None, -1), (0, None)])
def test_exact_marginals_and_entropy_of_bipartite_models_are_mapped(dims):
    shared = torch.randn(3, dtype=torch.float64)
    stacked = [torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64)]
    rows = [[x[i] if dim is not None else x[0] for x, dim in zip(stacked, dims, strict=True)] for i in range(4)]
    given = [x[0] if dim is None else x.movedim(0, dim) for x, dim in zip(stacked, dims, strict=True)]

    def model(left_bias, weight):
        return gx.BipartiteBoltzmann(left_bias, shared, weight)

    answers = (
        lambda *p: gx.exact_marginals(model(*p)),
        lambda *p: (model(*p).mean, model(*p).entropy()),
    )
    for answer in answers:
        mapped = torch.vmap(answer, dims)(*given)
        for i, row in enumerate(rows):
            for actual, expected in zip(mapped, answer(*row), strict=True):
                assert_close(actual[i], expected, 1e-13)
    with pytest.raises(NotImplementedError, match=r"^BipartiteBoltzmann.entropy: derivatives are not supported"):
        func.grad(lambda w: model(rows[0][0], w).entropy())(rows[0][1])
    with pytest.raises(NotImplementedError, match=r"^BipartiteBoltzmann.entropy: derivatives are not supported"):
        func.jvp(lambda w: model(rows[0][0], w).entropy(), (rows[0][1],), (rows[0][1],))


@pytest.mark.parametrize("on_graph", [True, False])
def test_exact_samples_say_why_not(on_graph):
    def samples(coupling):
        return gx.exact_samples(model_of(on_graph, coupling), 4, seed=1)

    couplings = couplings_of(on_graph)
    with pytest.raises(NotImplementedError, match=r"^exact_samples: torch.vmap is not supported"):
        torch.vmap(samples)(couplings)
    fixed = torch.vmap(lambda x: x + samples(couplings[0]))(torch.zeros(2, dtype=torch.float64))
    assert_same_bits(fixed[1], samples(couplings[0]))


def test_long_enumerations_in_func_grad(monkeypatch):
    """They are made in chunks, which torch.func.grad cannot compute again in backward."""
    monkeypatch.setattr(machine, "CHUNK", 64)
    biases = torch.randn(2, 8, dtype=torch.float64).unbind()
    weight = torch.randn(8, 8, dtype=torch.float64)

    def log_partition(weight):
        return gx.exact_log_partition(gx.BipartiteBoltzmann(*biases, weight, validate_args=False))

    leaf = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(log_partition(leaf), leaf)
    assert_close(func.grad(log_partition)(weight), expected, 1e-12)
    assert_close(torch.vmap(func.grad(log_partition))(weight[None])[0], expected, 1e-12)
    monkeypatch.setattr(machine, "MAX_TABLES", 10)
    assert_close(torch.autograd.grad(log_partition(leaf), leaf)[0], expected, 1e-12)
    with pytest.raises(NotImplementedError, match=r"^exact_log_partition: torch.func.grad would keep 2048 numbers"):
        func.grad(log_partition)(weight)


@pytest.mark.parametrize("graph", [False, True])
def test_derivatives_of_an_estimated_log_partition(graph):
    """Derivatives of any order are those of the weighted samples; the second is a covariance."""
    coupling = couplings_of(graph)[0]
    size = coupling.numel()
    direction = torch.randn_like(coupling)

    def log_partition(coupling):
        return model_of(graph, coupling).log_partition(num_chains=30, betas=5, seed=1)

    result = gx.annealed_importance_sampling(model_of(graph, coupling), 30, 5, seed=1)
    z, weights = result.samples, result.log_weights.softmax(0)
    if graph:
        u, v = GRAPH.edges.unbind(-1)
        statistics = z[:, u] * z[:, v]
    else:
        statistics = (z[:, :4, None] * z[:, None, 4:]).flatten(1)
    mean = weights @ statistics
    covariance = statistics.mT @ (weights[:, None] * statistics) - torch.outer(mean, mean)
    assert_close(log_partition(coupling), result.log_partition, 1e-14)
    _, tangent = func.jvp(log_partition, (coupling,), (direction,))
    assert math.isclose(float(tangent), float(mean @ direction.flatten()), rel_tol=1e-10)
    assert_close(func.grad(log_partition)(coupling).flatten(), mean, 1e-12)
    assert covariance.any()
    for way in (func.hessian, lambda f: func.jacrev(func.jacrev(f))):
        assert_close(way(log_partition)(coupling).reshape(size, size), covariance, 1e-12)
