# SPDX-License-Identifier: Apache-2.0
"""sample_moments: exact means, exact counts of the states on the way, and the best of them."""

import itertools

import pytest
import torch
from support import assert_bits, assert_close, assert_same_bits

import gibbs_ext as gx


def bipartite(batch=(), dtype=torch.float64, scale=1.0):
    torch.manual_seed(3)
    shapes = (6,), (5,), (6, 5)
    return gx.BipartiteBoltzmann(*(scale * torch.randn(*batch, *shape, dtype=dtype) for shape in shapes))


def on_graph(batch=(), dtype=torch.float64, scale=1.0):
    torch.manual_seed(4)
    graph = gx.ColoredGraph(9, [(i, (i + k) % 9) for i in range(9) for k in (1, 2)])
    bias, coupling = (scale * torch.randn(*batch, n, dtype=dtype) for n in (9, graph.num_edges))
    return gx.GraphBoltzmann(graph, bias, coupling)


MODELS = {"bipartite": bipartite, "graph": on_graph}


def all_states(model):
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=model.num_units)), dtype=model.dtype)


def pairs_of(model, states):
    """The products of the coupled units, of the couplings' shape."""
    if isinstance(model, gx.BipartiteBoltzmann):
        left, right = model.split(states)
        return left.unsqueeze(-1) * right.unsqueeze(-2)
    first, second = model.graph.edges.long().T
    return states[..., first] * states[..., second]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("seed", range(3))
def test_moments_are_those_of_the_model(kind, seed):
    """Against enumeration. The chains are independent, so that a mean is off by 5 of their errors once in 10^6."""
    model = MODELS[kind]((2,), scale=0.7)
    found = gx.sample_moments(model, 500, 400, burn_in=50, sweeps_per_read=2, seed=seed)
    assert found.num_states == 500 * 200
    for b in range(2):
        single = model._of([p[b] for p in model._parameters])
        states = all_states(single)
        p = (-single.energy(states)).softmax(0)
        # At least a hundredth of the states read are independent here.
        error = (p @ states * (1 - p @ states) / 1000).sqrt()
        assert ((found.means[b] - p @ states).abs() < 5 * error + 1e-9).all()
        pairs = torch.einsum("s,s...->...", p, pairs_of(single, states))
        assert ((found.pair_means[b] - pairs).abs() < 5 * (pairs * (1 - pairs) / 1000).sqrt()).all()
        mean = p @ single.energy(states)
        spread = (p @ (single.energy(states) - mean) ** 2).sqrt()
        assert abs(found.energy[b] - mean) < 5 * spread / 1000**0.5


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_and_best_are_those_of_the_states_on_the_way(kind, dtype):
    model = MODELS[kind]((3,), dtype)
    found = gx.sample_moments(model, 20, 12, burn_in=4, sweeps_per_read=3, best=True, seed=1)
    states, part = [], gx.sample_moments(model, 20, 4, seed=1)
    for _ in range(4):
        part = gx.sample_moments(model, 20, 3, sweeps_per_read=3, initial=part, seed=1)
        states.append(part.samples)
    states = torch.stack(states)
    assert_same_bits(found.samples, states[-1])
    assert found.next_sweep == part.next_sweep == 17
    assert_same_bits(found.means, states.double().sum((0, 1)) / 80)
    assert_same_bits(found.pair_means, pairs_of(model, states).double().sum((0, 1)) / 80)
    energies = model.energy(states).double()
    assert_close(found.energy, energies.mean((0, 1)), 1e-6 if dtype == torch.float64 else 1e-5)
    assert_close(found.best_energies, energies.amin(0), 1e-6)
    assert_close(model.energy(found.best_samples).double(), found.best_energies, 1e-6)
    assert_bits(found.best_samples)


@pytest.mark.parametrize("kind", MODELS)
def test_a_progress_bar_changes_nothing(kind, capsys):
    model = MODELS[kind]((2,))
    plain, shown = (
        gx.sample_moments(model, 7, 250, burn_in=3, best=True, progress=progress, seed=3) for progress in (False, True)
    )
    assert "sample_moments" in capsys.readouterr().err
    assert plain.num_states == shown.num_states
    assert plain.next_sweep == shown.next_sweep
    for name in ("samples", "means", "pair_means", "energy", "best_samples", "best_energies"):
        assert_same_bits(getattr(plain, name), getattr(shown, name))


@pytest.mark.parametrize("kind", MODELS)
def test_the_ground_state_is_found(kind):
    model = MODELS[kind](scale=2.0)
    found = gx.sample_moments(model, 50, 200, best=True, pairs=False, seed=0)
    states = all_states(model)
    ground = model.energy(states).argmin()
    assert found.pair_means is None
    assert found.energy is None
    assert_same_bits(found.best_samples[found.best_energies.argmin()], states[ground])
    assert_close(found.best_energies.min(), model.energy(states[ground]), 1e-6)


def test_beta_starts_and_numbers():
    model = on_graph(scale=0.5)
    hot = gx.sample_moments(model, 200, 200, beta=0.0, seed=1)
    assert_close(hot.means, torch.full((9,), 0.5, dtype=torch.float64), 0.02)
    start = torch.ones(9)
    same = [gx.sample_moments(model, 4, 3, initial=start, chain_offset=n, seed=1) for n in (5, torch.arange(5, 9))]
    assert_same_bits(same[0].samples, same[1].samples)
    rest = gx.sample_moments(model, 3, 3, initial=start, chain_offset=6, seed=1)
    assert_same_bits(same[0].samples[1:], rest.samples)
    assert not gx.sample_moments(model, 4, 3, initial=start, chain_offset=5, seed=2).samples.equal(same[0].samples)


def test_conditional_models_keep_what_is_given():
    model = bipartite()
    where = torch.zeros(11, dtype=torch.bool)
    where[[0, 7]] = True
    conditional = model.conditioned(torch.ones(11), where)
    found = gx.sample_moments(conditional.model, 400, 200, burn_in=20, seed=2)
    states = all_states(model)
    states = states[states[:, where].all(1)]
    p = (-model.energy(states)).softmax(0)
    assert ((found.means - (p @ states)[conditional.free]).abs() < 0.02).all()


def test_no_gradient_and_half_types():
    model = bipartite(dtype=torch.bfloat16, scale=0.5)
    p = [x.requires_grad_() for x in model._parameters]
    found = gx.sample_moments(gx.BipartiteBoltzmann(*p), 5, 4, best=True, seed=0)
    assert found.samples.dtype == torch.bfloat16
    assert found.means.dtype == found.energy.dtype == found.best_energies.dtype == torch.float64
    assert not any(isinstance(x, torch.Tensor) and x.requires_grad for x in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chains": 0}, "num_chains must be at least 1, got 0"),
        ({"num_sweeps": 0}, "num_sweeps must be at least 1, got 0"),
        ({"sweeps_per_read": 3}, "num_sweeps must be a multiple of sweeps_per_read, 3, got 4"),
        ({"sweeps_per_read": 0}, "sweeps_per_read must be at least 1, got 0"),
        ({"burn_in": -1}, "burn_in must be at least 0, got -1"),
        ({"num_sweeps": 2**44}, r"num_sweeps and burn_in must be below 2\^44"),
        ({"initial": torch.zeros(3)}, "initial"),
        ({"initial": torch.full((11,), 0.5)}, "initial must hold 0 and 1 only"),
        ({"beta": float("nan")}, "beta must be finite"),
        ({"beta": [1.0, 2.0]}, "beta must be a number or have shape"),
        ({"chain_offset": -1}, "chain_offset"),
        ({"chain_offset": torch.arange(4)[None]}, r"chain_offset must broadcast to shape \[2\]"),
        ({"chain_offset": torch.arange(6).reshape(3, 2)}, r"chain_offset must broadcast to shape \[2\]"),
        ({"beta": torch.ones(3, 1)}, r"beta must broadcast to shape \[1\]"),
        ({"best": "no"}, "best must be a bool, got 'no'"),
        ({"pairs": None}, "pairs must be a bool, got None"),
        ({"model": 3}, "model"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_refuses_what_does_not_fit(options, message):
    given = {"model": bipartite(), "num_chains": 2, "num_sweeps": 4} | options
    with pytest.raises((TypeError, ValueError, RuntimeError), match=f"^sample_moments: .*{message}"):
        gx.sample_moments(**given)


def test_refuses_a_result_of_other_chains():
    model = bipartite()
    with pytest.raises(ValueError, match=r"^sample_moments: initial must be a result of the same chains"):
        gx.sample_moments(model, 3, 1, initial=gx.sample_moments(model, 2, 1, seed=0))


def test_refuses_vmap():
    def mean(weight):
        return gx.sample_moments(gx.BipartiteBoltzmann(torch.zeros(6), torch.zeros(5), weight), 2, 1, seed=0).means

    with pytest.raises(NotImplementedError, match=r"^sample_moments"):
        torch.func.vmap(mean)(torch.zeros(3, 6, 5))
