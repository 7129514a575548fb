# SPDX-License-Identifier: Apache-2.0
"""BlockGibbsSampler: dimod's own tests, dwave-samplers' sampler argument by argument, enumeration, and bad input."""

import inspect
import math
import subprocess
import sys
import unittest
import warnings
from pathlib import Path

import dimod
import dimod.testing
import numpy as np
import pytest
import torch
from dwave.samplers import SimulatedAnnealingSampler
from dwave.samplers.sa import sampler as dwave_module
from hypothesis import given
from hypothesis import strategies as st
from support import chi_square_excess, z_threshold

import gibbs_ext.interop.dimod as interop
from gibbs_ext import BipartiteBoltzmann, ChimeraGraph, CouplingResolutionWarning
from gibbs_ext.interop.dimod import BlockGibbsSampler

ROOT = Path(__file__).parents[2]
VARTYPES = pytest.mark.parametrize("vartype", ["SPIN", "BINARY"])
LABELS = ["a", ("a", 1), 7, frozenset({3}), 2.5, "b"]


def sample(bqm, **kwargs):
    """Samples; checks what every sample set must be, and that the model is as it was."""
    before = bqm.copy()
    sampleset = BlockGibbsSampler().sample(bqm, **kwargs)
    assert bqm == before
    assert set(sampleset.variables) == set(bqm.variables)
    assert sampleset.vartype is bqm.vartype
    assert sampleset.record.sample.dtype == np.int8
    assert np.isin(sampleset.record.sample, list(bqm.vartype.value)).all()
    dimod.testing.assert_sampleset_energies(sampleset, bqm)
    dimod.testing.assert_response_energies(sampleset, bqm)
    return sampleset


def states(sampleset, bqm):
    """[reads, variables in the model's order] as a tensor."""
    order = [sampleset.variables.index(v) for v in bqm.variables]
    return torch.from_numpy(sampleset.record.sample[:, order].copy())


def random_bqm(num_variables, vartype="SPIN", seed=0, density=0.4, scale=1.0):
    random = np.random.default_rng(seed)
    pairs = [(i, j) for j in range(num_variables) for i in range(j) if random.random() < density]
    linear = dict(enumerate(scale * random.normal(size=num_variables)))
    return dimod.BinaryQuadraticModel(
        linear, dict(zip(pairs, scale * random.normal(size=len(pairs)), strict=True)), 0.5, vartype
    )


# As a dimod sampler -----------------------------------------------------------------------------------------------


@dimod.testing.load_sampler_bqm_tests(BlockGibbsSampler)
class TestByDimod(unittest.TestCase):
    def test_api(self):
        sampler = BlockGibbsSampler()
        dimod.testing.assert_sampler_api(sampler)
        assert isinstance(sampler, dimod.Initialized)
        with sampler:
            pass


def test_it_takes_the_arguments_of_the_original():
    ours, theirs = (
        dict(inspect.signature(c.sample).parameters) for c in (BlockGibbsSampler, SimulatedAnnealingSampler)
    )
    assert ours.pop("best_of_read").default is False
    assert [(p.name, "Gibbs" if p.default == "Metropolis" else p.default) for p in theirs.values()] == [
        (p.name, p.default) for p in ours.values()
    ]
    sampler, original = BlockGibbsSampler(), SimulatedAnnealingSampler()
    assert sampler.parameters == original.parameters | {"best_of_read": []}
    assert set(original.parameters) == set(ours) - {"self", "bqm", "kwargs"}
    assert sampler.properties == original.properties


def test_unknown_arguments_are_ignored_with_a_warning():
    bqm = random_bqm(5)
    with pytest.warns(dimod.exceptions.SamplerUnknownArgWarning, match="foobar"):
        sampleset = sample(bqm, seed=1, foobar=True)
    assert states(sampleset, bqm).equal(states(sample(bqm, seed=1), bqm))


@VARTYPES
@pytest.mark.parametrize("kind", [dimod.Float64BQM, dimod.Float32BQM, dimod.DictBQM])
def test_any_labels_and_kinds_of_models(vartype, kind):
    pairs = [(LABELS[i], LABELS[j]) for i, j in ((0, 1), (2, 1), (3, 2), (0, 3))]  # the last two are isolated
    bqm = kind({v: i - 2 for i, v in enumerate(LABELS)}, dict.fromkeys(pairs, 1.5), 7, vartype)
    sampleset = sample(bqm, num_reads=20, seed=1)
    assert sampleset.first.energy == pytest.approx(dimod.ExactSolver().sample(bqm).first.energy)
    assert sampleset.info["beta_schedule_type"] == "geometric"
    assert set(sampleset.info["timing"]) == {"preprocessing_ns", "sampling_ns", "postprocessing_ns"}
    assert all(isinstance(t, int) and t > 0 for t in sampleset.info["timing"].values())


@VARTYPES
def test_models_with_nothing_in_them(vartype):
    empty = dimod.BinaryQuadraticModel({}, {}, 1.5, vartype)
    sampleset = sample(empty, num_reads=3)
    assert sampleset.record.energy.tolist() == [1.5] * 3
    assert sampleset.record.sample.shape == (3, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zero = dimod.BinaryQuadraticModel({"a": 0, "b": 0}, {("a", "b"): 0}, 2.0, vartype)
        fair = states(BlockGibbsSampler().sample(zero, num_reads=20_000, num_sweeps=2), zero) > 0
    assert chi_square_excess(fair.double(), torch.full((4,), 0.25, dtype=torch.float64)) < 1


@VARTYPES
def test_high_degree(vartype):
    star = dimod.BinaryQuadraticModel({}, {("hub", i): 1.0 for i in range(500)}, vartype)
    star.add_linear("hub", -1000)
    lowest = -1500 if vartype == "SPIN" else -1000
    assert sample(star, num_reads=5, num_sweeps=100, seed=1).first.energy == lowest
    complete = random_bqm(50, vartype, density=1)
    ours, theirs = (
        s.sample(complete, num_reads=50, num_sweeps=500, seed=1).first.energy
        for s in (BlockGibbsSampler(), SimulatedAnnealingSampler())
    )
    assert ours == pytest.approx(theirs)


# Seeds and reads --------------------------------------------------------------------------------------------------


@VARTYPES
def test_seeds_decide_the_samples(vartype):
    bqm = random_bqm(30, vartype)
    options = {"num_reads": 20, "num_sweeps": 10, "beta_range": (0.01, 0.1)}
    one = states(sample(bqm, seed=1, **options), bqm)
    assert one.equal(states(sample(bqm, seed=1, **options), bqm))
    assert not one.equal(states(sample(bqm, seed=2, **options), bqm))
    assert len(one.unique(dim=0)) == 20
    for seed in (0, 2**32 - 1, np.int64(5)):
        sample(bqm, seed=seed)
    assert one[:7].equal(states(sample(bqm, seed=1, **{**options, "num_reads": 7}), bqm))
    torch.manual_seed(3)
    drawn = states(sample(bqm, **options), bqm)
    assert not drawn.equal(states(sample(bqm, **options), bqm))
    torch.manual_seed(3)
    assert drawn.equal(states(sample(bqm, **options), bqm))


def test_both_vartypes_of_a_model_give_the_same_samples():
    spin = random_bqm(30)
    for v in spin.variables:  # so that the conversion is exact
        spin.set_linear(v, round(8 * spin.get_linear(v)) / 8)
    for u, v in spin.quadratic:
        spin.set_quadratic(u, v, round(8 * spin.get_quadratic(u, v)) / 8)
    binary = spin.change_vartype("BINARY", inplace=False)
    options = {"num_reads": 20, "num_sweeps": 20, "seed": 1}
    one, other = sample(spin, **options), sample(binary, **options)
    assert states(one, spin).equal(2 * states(other, binary) - 1)
    assert one.record.energy == pytest.approx(other.record.energy)
    assert one.info["beta_range"] == other.info["beta_range"]


@pytest.mark.parametrize("power", [-600, -40, 40, 600])
def test_units_of_energy_do_not_matter(power):
    bqm = random_bqm(30)
    scaled = bqm.copy()
    scaled.scale(2.0**power)
    options = {"num_reads": 20, "num_sweeps": 20, "seed": 1}
    for here, there in ((None, None), (np.array([0.1, 2.0]), np.ldexp([0.1, 2.0], -power))):
        expected = states(sample(bqm, beta_range=here, **options), bqm)
        sampleset = BlockGibbsSampler().sample(scaled, beta_range=there, **options)
        assert states(sampleset, scaled).equal(expected)


def test_biases_of_every_size():
    """Beside an enormous bias, and at betas at which some logit is infinite, the rest is sampled all the same."""
    bqm = dimod.BinaryQuadraticModel({"a": 1e30, "b": 0.5, "c": 0}, {("b", "c"): -1}, "SPIN")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sample(bqm, num_reads=10, num_sweeps=100, beta_range=(1e-3, 1e6)).first.sample == {
            "a": -1,
            "b": -1,
            "c": -1,
        }
        # Couplings that differ by far: the finest are lost to fixed point only below about 2^-30 of the largest.
        chain = dimod.BinaryQuadraticModel({0: 1e-6}, {(i, i + 1): -(10.0 ** (-i)) for i in range(7)}, "SPIN")
        lowest = sample(chain, num_reads=10, seed=1).first
    assert set(lowest.sample.values()) == {-1}


# Initial states ---------------------------------------------------------------------------------------------------


@VARTYPES
def test_initial_states(vartype):
    bqm = dimod.BinaryQuadraticModel(dict.fromkeys("cab", 1.0), {}, vartype)
    low, high = sorted(bqm.vartype.value)
    given = [{"a": low, "b": high, "c": low}, {"a": high, "b": high, "c": low}]
    rows = torch.tensor([[low, low, high], [low, high, high]], dtype=torch.int8)  # c, a, b

    def start(**kwargs):
        return states(sample(bqm, num_sweeps=0, seed=1, **kwargs), bqm)

    assert start(initial_states=given).equal(rows)
    for generator in ("none", "tile", "random"):
        assert start(initial_states=given, initial_states_generator=generator).equal(rows)
        assert start(initial_states=given, initial_states_generator=generator, num_reads=1).equal(rows[:1])
    tiled = start(initial_states=given, initial_states_generator="tile", num_reads=5)
    assert tiled.equal(rows[[0, 1, 0, 1, 0]])
    random = start(initial_states=given, num_reads=500)
    assert random[:2].equal(rows)
    assert len(random[2:].unique(dim=0)) == 8
    original = SimulatedAnnealingSampler().sample(bqm, num_sweeps=0, seed=1, num_reads=50)
    assert start(num_reads=50).equal(states(original, bqm))
    # In the other vartype, as a sample set, or as an array with labels.
    other = dimod.SampleSet.from_samples(given, vartype, energy=0)
    other.change_vartype("BINARY" if vartype == "SPIN" else "SPIN", inplace=True)
    assert start(initial_states=other).equal(rows)
    assert start(initial_states=(rows.numpy(), "cab")).equal(rows)


def test_sweeps_start_there():
    """At beta = 20 no spin of a satisfied ferromagnet flips."""
    ring = dimod.BinaryQuadraticModel({}, {(i, (i + 1) % 10): -1 for i in range(10)}, "SPIN")
    up = dict.fromkeys(range(10), 1)
    sampleset = sample(ring, num_sweeps=50, beta_range=(20, 20), initial_states=up, num_reads=40, seed=1)
    assert states(sampleset, ring)[0].tolist() == [1] * 10
    assert not (states(sampleset, ring) == 1).all()
    tiled = sample(
        ring, num_sweeps=50, beta_range=(20, 20), initial_states=up, num_reads=40, initial_states_generator="tile"
    )
    assert (states(tiled, ring) == 1).all()


# Schedules --------------------------------------------------------------------------------------------------------


@pytest.fixture
def captured(monkeypatch):
    """Betas that the two samplers sweep at."""
    betas = {"ours": []}  # without sweeps no call is made

    def graph_gibbs(state, bias, coupling, graph, num_sweeps, *, beta, **kwargs):
        assert len(beta) == num_sweeps
        assert state.dtype == torch.uint8
        # The model's coupling is -4 J = 2; the product is what counts.
        betas["ours"] = (beta * coupling / 2).tolist()
        return state

    def simulated_annealing(num_reads, h, row, col, J, num_sweeps_per_beta, beta_schedule, seed, state, *args):
        betas["theirs"] = np.repeat(beta_schedule, num_sweeps_per_beta).tolist()
        return state, np.zeros(len(state))

    monkeypatch.setitem(interop._UPDATES, "Gibbs", graph_gibbs)
    monkeypatch.setattr(dwave_module, "simulated_annealing", simulated_annealing)
    return betas


SCHEDULES = [
    {},
    {"num_sweeps": 7},
    {"num_sweeps": 1},
    {"num_sweeps": 0},
    {"num_sweeps": 12, "num_sweeps_per_beta": 3},
    {"num_sweeps": 3, "num_sweeps_per_beta": 3},
    {"num_sweeps": 5, "beta_range": (0.5, 4.0)},
    {"num_sweeps": 5, "beta_range": [4.0, 0.5], "beta_schedule_type": "linear"},
    {"num_sweeps": 1, "beta_range": [4.0, 0.5], "beta_schedule_type": "linear"},
    {"num_sweeps": 6, "beta_range": (0, 3), "beta_schedule_type": "linear", "num_sweeps_per_beta": 2},
    {"beta_schedule_type": "custom", "beta_schedule": [3, 1, 0, 2]},
    {"beta_schedule_type": "custom", "beta_schedule": np.linspace(0, 1, 4, dtype=np.float32), "num_sweeps_per_beta": 2},
    {"beta_schedule_type": "custom", "beta_schedule": (1.5,), "num_sweeps": 3, "num_sweeps_per_beta": 3},
    {"beta_schedule_type": "custom", "beta_schedule": np.ones(3, int), "beta_range": (1, 1)},
]


@pytest.mark.parametrize("options", SCHEDULES, ids=str)
def test_schedules_are_those_of_the_original(captured, options):
    bqm = dimod.BinaryQuadraticModel({"a": 0.75}, {("a", "b"): -0.5}, "SPIN")
    info = [s.sample(bqm, **options).info for s in (BlockGibbsSampler(), SimulatedAnnealingSampler())]
    assert captured["ours"] == pytest.approx(captured["theirs"], rel=1e-12)
    assert info[0]["beta_schedule_type"] == info[1]["beta_schedule_type"]
    if info[1]["beta_range"] is None:
        assert info[0]["beta_range"] == [captured["ours"][0], captured["ours"][-1]]
    else:
        assert list(info[0]["beta_range"]) == pytest.approx(list(info[1]["beta_range"]), rel=1e-12)


@given(
    seed=st.integers(0, 10**6),
    num_variables=st.integers(1, 12),
    vartype=st.sampled_from(["SPIN", "BINARY"]),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    levels=st.sampled_from([0, 2, 1000]),
)
def test_the_default_range_is_that_of_the_original(seed, num_variables, vartype, density, levels):
    """Biases are multiples of 1 / 64, so that sums are exact and ties are ties."""
    random = np.random.default_rng(seed)
    bqm = dimod.BinaryQuadraticModel(
        {i: random.integers(-levels, levels + 1) / 64 for i in range(num_variables)}, {}, vartype
    )
    for i in range(num_variables):
        for j in range(i):
            if random.random() < density:
                bqm.add_quadratic(i, j, random.integers(-levels, levels + 1) / 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, of models without biases
        expected = SimulatedAnnealingSampler().sample(bqm, num_sweeps=0).info["beta_range"]
    assert sample(bqm, num_sweeps=0).info["beta_range"] == pytest.approx(expected, rel=1e-12)


def test_the_default_range_knows_rounding_from_a_bias():
    """A field that cancels in the Ising form, but for rounding, is none."""
    bqm = dimod.BinaryQuadraticModel({"a": 1.05, "b": 0.0}, {("a", "b"): -0.7}, "BINARY")
    bqm.add_quadratic("a", "c", -0.35 * 4)
    assert abs(bqm.spin.get_linear("a")) < 1e-15
    beta_range = sample(bqm, num_sweeps=0).info["beta_range"]
    assert beta_range[1] < 1000
    # Given as a field, it is one, however small.
    assert sample(triangle(1e-20), num_sweeps=0).info["beta_range"][1] > 1e20


# Interruption -----------------------------------------------------------------------------------------------------


def test_interrupt_function():
    bqm = random_bqm(10)
    whole = states(sample(bqm, num_reads=1000, num_sweeps=5, seed=1), bqm)
    calls = []

    def never():
        calls.append(None)
        return False

    assert states(sample(bqm, num_reads=1000, num_sweeps=5, seed=1, interrupt_function=never), bqm).equal(whole)
    assert len(calls) > 2
    answers = iter([False, True])
    part = states(sample(bqm, num_reads=1000, num_sweeps=5, seed=1, interrupt_function=lambda: next(answers)), bqm)
    assert 0 < len(part) < 1000
    assert part.equal(whole[: len(part)])
    first = states(sample(bqm, num_reads=1000, num_sweeps=5, seed=1, interrupt_function=lambda: True), bqm)
    assert first.equal(whole[:1])


def test_an_interrupt_function_that_raises_ends_the_sampling_with_what_is_done():
    bqm = random_bqm(10)

    def fail():
        raise OSError("no such file")

    with pytest.warns(RuntimeWarning, match=r"^BlockGibbsSampler: interrupt_function raised OSError\(no such file\); "):
        part = sample(bqm, num_reads=1000, num_sweeps=5, seed=1, interrupt_function=fail)
    assert len(part) == 1
    with pytest.raises(KeyboardInterrupt):
        sample(bqm, num_reads=10, interrupt_function=lambda: (_ for _ in ()).throw(KeyboardInterrupt))


# Samples ----------------------------------------------------------------------------------------------------------


@VARTYPES
def test_samples_have_the_boltzmann_distribution(vartype):
    """All states of 7 variables; alarms once in a million seeds, and beta * 1.05 must trip it."""
    bqm = random_bqm(7, vartype, density=0.5, scale=1.0)
    exact = dimod.ExactSolver().sample(bqm)
    number = states(exact, bqm).gt(0).long() @ (1 << torch.arange(7))
    probabilities = torch.empty(128, dtype=torch.float64)
    probabilities[number] = torch.tensor(-0.8 * exact.record.energy).softmax(0)

    def excess(beta):
        custom = {"beta_schedule_type": "custom", "beta_schedule": [beta] * 30, "num_reads": 200_000}
        sampleset = BlockGibbsSampler().sample(bqm, **custom)
        return chi_square_excess((states(sampleset, bqm) > 0).double(), probabilities)

    assert excess(0.8) < 1
    assert excess(0.8 * 1.05) > 1


@VARTYPES
def test_mean_energy_agrees_with_dwave_samplers(vartype):
    """On a C4, at one beta, in the mean over independent reads; 3% in beta must show."""
    random = np.random.default_rng(5)
    bqm = dimod.BinaryQuadraticModel(
        dict(enumerate(random.normal(size=128))),
        {(u, v): random.normal() for u, v in ChimeraGraph(4).edges.tolist()},
        "SPIN",
    ).change_vartype(vartype, inplace=False)
    # With 10 times the reads, 60 sweeps cannot be told from 400 by either sampler.
    options = {"beta_schedule_type": "custom", "num_reads": 10_000, "seed": int(torch.randint(2**31, ()))}

    def energies(sampler, beta, sweeps=60):
        return sampler.sample(bqm, beta_schedule=[beta] * sweeps, **options).record.energy

    def z(a, b):
        return abs(a.mean() - b.mean()) / np.sqrt((a.var() + b.var()) / len(a))

    theirs = energies(SimulatedAnnealingSampler(), 0.4)
    assert z(energies(BlockGibbsSampler(), 0.4), theirs) < z_threshold()
    assert z(energies(BlockGibbsSampler(), 0.4 * 1.03), theirs) > z_threshold()
    assert z(energies(BlockGibbsSampler(), 0.4, sweeps=1), theirs) > z_threshold()


@VARTYPES
def test_the_ground_state_is_found(vartype):
    bqm = random_bqm(16, vartype, seed=3)
    lowest = dimod.ExactSolver().sample(bqm).first
    found = sample(bqm, num_reads=50, num_sweeps=200, seed=1).first
    assert found.sample == lowest.sample
    assert found.energy == pytest.approx(lowest.energy)


# Small terms ------------------------------------------------------------------------------------------------------


def excess_of(bqm, beta, num_reads=20_000, num_sweeps=60, scale=1.0, **options):
    """Chi-square's excess over the exact distribution at beta * scale, of samples at beta.

    Energies of degenerate states differ by a small field alone, so that they are computed without the large terms.
    """
    spins = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * len(bqm.variables))
    spin = bqm.spin
    pairs = [(spin.variables.index(u), spin.variables.index(v), J) for (u, v), J in spin.quadratic.items()]
    large = torch.stack([J * spins[:, u] * spins[:, v] for u, v, J in pairs]).sum(0)
    large[large < large.min() + 1e-3] = large.min()  # rounding of float64
    field = spins @ torch.tensor([spin.linear[v] for v in spin.variables], dtype=torch.float64)
    probabilities = (-beta * scale * (large - large.min() + field)).softmax(0)
    number = (spins > 0).long() @ (1 << torch.arange(spins.shape[1]))
    ordered = torch.empty_like(probabilities)
    ordered[number] = probabilities
    found = BlockGibbsSampler().sample(
        bqm, beta_schedule_type="custom", beta_schedule=[beta] * num_sweeps, num_reads=num_reads, **options
    )
    return chi_square_excess((states(found, bqm) > 0).double(), ordered)


def triangle(field, interactions=(1.0, 1.0, 1.0)):
    """Six of its eight states have the lowest energy, but for the field."""
    edges = dict(zip(("ab", "bc", "ca"), interactions, strict=True))
    return dimod.BinaryQuadraticModel({"a": field, "b": 2 * field, "c": 4 * field}, edges, "SPIN")


@pytest.mark.parametrize("field", [1e-5, 1e-8, 1e-12, 1e-30])
@pytest.mark.parametrize("interactions", [(1.0, 1.0, 1.0), (0.1, 0.1, 0.1)])
def test_a_small_field_decides_between_degenerate_states(field, interactions):
    """Float32 cannot hold it beside the interactions from 1e-7 on, nor fixed point where these are rounded."""
    bqm = triangle(field, interactions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert excess_of(bqm, 0.3 / field) < 1
    assert excess_of(bqm, 0.3 / field, scale=1.2) > 1


@pytest.mark.parametrize("field", [1e-5, 1e-8])
def test_a_small_field_is_found_as_often_as_by_the_original(field):
    bqm = triangle(field)
    best = triangle(0.1)
    found = []
    for sampler in (BlockGibbsSampler(), SimulatedAnnealingSampler()):
        lowest = dimod.ExactSolver().sample(best).first.sample
        reads = sampler.sample(bqm, num_reads=1000, seed=3)
        found.append(np.all([reads.record.sample[:, reads.variables.index(v)] == lowest[v] for v in "abc"], 0).mean())
    assert found[0] > 0.85
    assert abs(found[0] - found[1]) < 0.05


def test_a_small_field_of_bits():
    """Written for bits, float64 itself holds 16 digits of a field and the interactions together."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert excess_of(triangle(2.0**-30).change_vartype("BINARY", inplace=False), 0.3 * 2**30) < 1


def test_interactions_that_float64_rounds_cancel_as_written():
    """0.1 + 0.2 - 0.3 is 0 here, so that the field of 1e-12 decides."""
    pinned = {"b": 10, "c": 10, "d": -10}
    bqm = dimod.BinaryQuadraticModel({"a": 1e-12, **pinned}, {"ab": 0.1, "ac": 0.2, "ad": 0.3}, "SPIN")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = BlockGibbsSampler().sample(
            bqm, num_reads=20_000, beta_schedule_type="custom", beta_schedule=[1, 1, 0.5e12, 0.5e12]
        )
    a = found.record.sample[:, found.variables.index("a")] > 0
    p = 1 / (1 + math.e)
    assert abs(a.mean() - p) / math.sqrt(p * (1 - p) / len(a)) < z_threshold()


def test_a_small_interaction_beside_large_ones_that_cancel():
    bqm = triangle(0.0)
    bqm.add_quadratic("a", "d", 1e-8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = BlockGibbsSampler().sample(bqm, num_reads=1000, seed=1)
    a, d = (found.record.sample[:, found.variables.index(v)] for v in "ad")
    assert (a == -d).mean() > 0.9


def test_a_field_that_all_but_cancels_the_interactions():
    """a's field is -1 + (1 + 1e-8); that of b, 3.123456 against 1, is far from 0, so that nothing is lost there."""
    bqm = dimod.BinaryQuadraticModel({"a": -1 - 1e-8, "b": 3.123456}, {"ab": -1.0, "bc": -1e-8}, "SPIN")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = BlockGibbsSampler().sample(
            bqm, num_reads=20_000, beta_schedule_type="custom", beta_schedule=[1, 1, 0.5e8, 0.5e8]
        )
    assert (found.record.sample[:, found.variables.index("b")] == -1).all()
    a, c = (found.record.sample[:, found.variables.index(v)] > 0 for v in "ac")
    p = 1 / (1 + math.exp(-1))
    assert abs(a.mean() - p) / math.sqrt(p * (1 - p) / len(a)) < z_threshold()
    assert abs(c.mean() - (1 - p)) / math.sqrt(p * (1 - p) / len(c)) < z_threshold()


def test_a_field_that_rounding_of_interactions_swamps_is_warned_of():
    with pytest.warns(
        CouplingResolutionWarning, match=r"at 3 of the variables rounding may shift logits by more than 0.1"
    ):
        BlockGibbsSampler().sample(triangle(1e-10, (0.1, 0.2, 0.1 * math.pi)), seed=1)


# Zero temperature, other updates, other orders --------------------------------------------------------------------

UPDATES = pytest.mark.parametrize("criteria", ["Gibbs", "Metropolis"])
ORDERS = pytest.mark.parametrize("randomize_order", [False, True])
AT_ZERO = {"beta_schedule_type": "custom", "beta_schedule": [np.inf]}


@UPDATES
@ORDERS
def test_at_zero_temperature_energy_never_rises(criteria, randomize_order):
    bqm, options = random_bqm(30), {"proposal_acceptance_criteria": criteria, "randomize_order": randomize_order}
    before = sample(bqm, num_sweeps=0, num_reads=50, seed=1, beta_range=(1, 1))
    energies = [before.record.energy]
    for seed in range(30):
        after = sample(bqm, num_sweeps=1, initial_states=before, seed=seed, **AT_ZERO, **options)
        assert (after.record.energy <= before.record.energy + 1e-9).all()
        before = after
        energies.append(before.record.energy)
    assert (energies[-1] < energies[0] - 1).all()
    # No single flip lowers it further.
    final, linear = states(before, bqm).double().numpy(), np.array([bqm.linear[v] for v in bqm.variables])
    place = {v: i for i, v in enumerate(bqm.variables)}
    J = np.zeros((30, 30))
    for (u, v), value in bqm.quadratic.items():
        J[place[u], place[v]] = J[place[v], place[u]] = value
    assert (final * (linear + final @ J) < 1e-9).all()


@ORDERS
@pytest.mark.parametrize("interaction", [1.0, 0.1, 1 / 3, math.pi])
def test_at_zero_temperature_gibbs_is_fair_where_nothing_changes(randomize_order, interaction):
    schedule = {"beta_schedule_type": "custom", "beta_schedule": [np.inf] * 40}
    found = BlockGibbsSampler().sample(
        triangle(0.0, [interaction] * 3), num_reads=20_000, randomize_order=randomize_order, **schedule
    )
    expected = torch.full((8,), 1 / 6, dtype=torch.float64)
    expected[[0, 7]] = 0
    assert chi_square_excess(torch.from_numpy(found.record.sample > 0).double(), expected) < 1


def test_at_zero_temperature_metropolis_flips_where_nothing_changes():
    free = dimod.BinaryQuadraticModel.from_ising(dict.fromkeys(range(50), 0), {})
    options = {"proposal_acceptance_criteria": "Metropolis", "seed": 1, **AT_ZERO}
    start = dict.fromkeys(range(50), 1)
    assert (sample(free, initial_states=start, **options).record.sample == -1).all()
    part = sample(free, initial_states=start, randomize_order=True, **options).record.sample
    assert 0.3 < (part == -1).mean() < 0.8


@VARTYPES
@pytest.mark.parametrize(
    ("criteria", "randomize_order"), [("Metropolis", False), ("Metropolis", True), ("Gibbs", True)]
)
def test_every_update_and_order_has_the_boltzmann_distribution(vartype, criteria, randomize_order):
    bqm = random_bqm(7, vartype, density=0.5, scale=1.0).spin
    options = {"proposal_acceptance_criteria": criteria, "randomize_order": randomize_order}
    exact = dimod.ExactSolver().sample(bqm)
    number = states(exact, bqm).gt(0).long() @ (1 << torch.arange(7))
    probabilities = torch.empty(128, dtype=torch.float64)
    probabilities[number] = torch.tensor(-0.4 * exact.record.energy).softmax(0)

    def excess(beta):
        custom = {"beta_schedule_type": "custom", "beta_schedule": [beta] * 40, "num_reads": 100_000}
        found = BlockGibbsSampler().sample(bqm, **custom, **options)
        return chi_square_excess((states(found, bqm) > 0).double(), probabilities)

    assert excess(0.4) < 1
    assert excess(0.4 * 1.1) > 1


@ORDERS
def test_reads_of_other_updates_depend_on_the_seed_alone(randomize_order):
    bqm = random_bqm(20)
    options = {
        "proposal_acceptance_criteria": "Metropolis",
        "randomize_order": randomize_order,
        "num_sweeps": 5,
        "seed": 1,
    }
    whole = states(sample(bqm, num_reads=20, **options), bqm)
    assert whole.equal(states(sample(bqm, num_reads=20, interrupt_function=lambda: False, **options), bqm))
    assert whole[:7].equal(states(sample(bqm, num_reads=7, **options), bqm))
    assert not whole.equal(states(sample(bqm, num_reads=20, **{**options, "seed": 2}), bqm))
    assert not whole.equal(states(sample(bqm, num_reads=20, num_sweeps=5, seed=1), bqm))


@VARTYPES
@pytest.mark.parametrize("criteria", ["Gibbs", "Metropolis"])
def test_the_best_state_of_a_read(vartype, criteria):
    """At a constant, small beta a chain passes through lower states than it ends in. The reads are those of shorter
    calls with the lowest energy."""
    bqm = random_bqm(12, vartype, seed=3)
    options = {"num_reads": 40, "proposal_acceptance_criteria": criteria, "seed": 7}
    betas = [0.5] * 6
    best = sample(
        bqm, beta_schedule_type="custom", beta_schedule=betas, num_sweeps_per_beta=2, best_of_read=True, **options
    )
    on_the_way = [
        sample(bqm, beta_schedule_type="custom", beta_schedule=betas[:n], num_sweeps_per_beta=2, **options)
        for n in range(1, 7)
    ]
    energies = np.stack([s.record.energy for s in on_the_way])
    np.testing.assert_allclose(best.record.energy, energies.min(0), atol=1e-9)
    assert (energies[-1] > energies.min(0)).mean() > 0.5
    chosen = np.stack([states(s, bqm).numpy() for s in on_the_way])[energies.argmin(0), np.arange(40)]
    assert (states(best, bqm).numpy() == chosen).all()


def test_the_best_state_does_not_depend_on_the_default_device():
    bqm = random_bqm(6)
    expected = states(sample(bqm, num_reads=3, best_of_read=True, seed=1), bqm)
    torch.set_default_device("meta")
    try:
        found = sample(bqm, num_reads=3, best_of_read=True, seed=1)
    finally:
        torch.set_default_device(None)
    assert states(found, bqm).equal(expected)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.floats(0, 1))
def test_layers_keep_the_random_order(seed, num_variables, density):
    """Variables that touch or are equal come in the order in which they were drawn, and never in the same layer."""
    random = np.random.default_rng(seed)
    u, v = np.triu_indices(num_variables, 1)
    edges = np.stack((u, v), 1)[random.random(len(u)) < density]
    touch = np.eye(num_variables, dtype=bool)
    touch[edges[:, 0], edges[:, 1]] = touch[edges[:, 1], edges[:, 0]] = True
    drawn = np.random.default_rng(seed).integers(num_variables, size=num_variables).tolist()
    for layer in interop._random_layers(np.random.default_rng(seed), num_variables, edges):
        assert len(layer)
        for i in layer:
            first = next(k for k, other in enumerate(drawn) if touch[i, other])
            assert drawn[first] == i
        for i in layer:
            drawn.remove(i)
        assert len(set(layer)) == len(layer)
    assert not drawn


# Models -----------------------------------------------------------------------------------------------------------


@VARTYPES
def test_a_bqm_as_a_boltzmann_machine_and_back(vartype):
    pairs = {("b", "a"): 1.5, ("a", 3): -0.25, (3, (1, 2)): 0.0}
    bqm = dimod.BinaryQuadraticModel({"a": 0.5, "b": -1.0, "lonely": 2.0}, pairs, 0.75, vartype)
    model, variables, offset = interop.bqm_to_boltzmann(bqm)
    assert variables == list(bqm.variables)
    assert model.graph.num_edges == 3
    z = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 5)
    values = (2 * z - 1 if vartype == "SPIN" else z).numpy().astype(np.int8)
    assert (model.energy(z) + offset).numpy() == pytest.approx(bqm.energies((values, variables)))
    back = interop.boltzmann_to_bqm(model, variables, offset=offset, vartype=vartype)
    assert back == bqm
    assert interop.bqm_to_boltzmann(bqm, dtype=torch.float32).model.dtype == torch.float32


def test_a_bipartite_machine_as_a_bqm():
    rbm = BipartiteBoltzmann(torch.randn(2), torch.randn(3), torch.randn(2, 3))
    bqm = interop.boltzmann_to_bqm(rbm, "abcde")
    z = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 5)
    assert bqm.energies((z.numpy().astype(np.int8), "abcde")) == pytest.approx(rbm.energy(z).numpy(), abs=1e-5)
    assert bqm.num_interactions == 6
    assert list(interop.boltzmann_to_bqm(rbm).variables) == list(range(5))


def test_bad_conversions():
    rbm = BipartiteBoltzmann(torch.randn(2), torch.randn(3), torch.randn(2, 3))
    many = BipartiteBoltzmann(torch.randn(2), torch.randn(3), torch.randn(4, 2, 3))
    bqm = dimod.BQM({"a": 1e9}, {}, "SPIN")
    for call, kind, message in [
        (
            lambda: interop.bqm_to_boltzmann(rbm),
            TypeError,
            "bqm_to_boltzmann: bqm must be a dimod.BinaryQuadraticModel",
        ),
        (
            lambda: interop.bqm_to_boltzmann(dimod.BQM("SPIN")),
            ValueError,
            "bqm_to_boltzmann: bqm must have one variable",
        ),
        (
            lambda: interop.bqm_to_boltzmann(dimod.BQM({"a": np.nan}, {}, "SPIN")),
            ValueError,
            "bqm_to_boltzmann: bqm must have finite biases",
        ),
        (
            lambda: interop.bqm_to_boltzmann(bqm, dtype=torch.int64),
            TypeError,
            "bqm_to_boltzmann: dtype must be a floating",
        ),
        (lambda: interop.bqm_to_boltzmann(bqm, dtype="float"), TypeError, "bqm_to_boltzmann: dtype must be a floating"),
        (
            lambda: interop.bqm_to_boltzmann(bqm, dtype=torch.float16),
            ValueError,
            "bqm_to_boltzmann: bqm must be finite in torch.float16",
        ),
        (lambda: interop.boltzmann_to_bqm(rbm, 3), TypeError, "boltzmann_to_bqm: variables must be a sequence"),
        (lambda: interop.boltzmann_to_bqm(rbm, [[]] * 5), TypeError, "boltzmann_to_bqm: variables must be .* hashable"),
        (lambda: interop.boltzmann_to_bqm(rbm, offset="x"), TypeError, "boltzmann_to_bqm: offset must be a number"),
        (
            lambda: interop.boltzmann_to_bqm(rbm, vartype="FOO"),
            TypeError,
            "boltzmann_to_bqm: vartype must be 'BINARY' or",
        ),
        (lambda: interop.boltzmann_to_bqm(3), TypeError, "boltzmann_to_bqm: model must be a BipartiteBoltzmann"),
        (
            lambda: interop.boltzmann_to_bqm(many),
            ValueError,
            r"boltzmann_to_bqm: model must be one model, .*, got \[4\]",
        ),
        (
            lambda: interop.boltzmann_to_bqm(rbm, "abcda"),
            ValueError,
            "boltzmann_to_bqm: variables must be 5 different labels, one for each unit, got 5, 4 of them different",
        ),
    ]:
        with pytest.raises(kind, match=f"^{message}"):
            call()


# Bad input --------------------------------------------------------------------------------------------------------

BAD = [
    ({"seed": -1}, ValueError, "BlockGibbsSampler: seed must be at least 0, got -1"),
    ({"seed": 2**32}, ValueError, r"BlockGibbsSampler: seed must be below 2\^32, got 4294967296"),
    ({"seed": 1.5}, TypeError, "BlockGibbsSampler: seed must be an integer, got 1.5"),
    ({"num_reads": 0}, ValueError, "num_reads"),
    ({"num_reads": 1.5}, TypeError, "num_reads"),
    ({"num_sweeps": -1}, ValueError, "BlockGibbsSampler: num_sweeps must be at least 0, got -1"),
    ({"num_sweeps": "a"}, TypeError, "BlockGibbsSampler: num_sweeps must be an integer, got 'a'"),
    ({"num_sweeps": 3, "num_sweeps_per_beta": 2}, ValueError, "num_sweeps must be a multiple of .*, 2, got 3"),
    ({"num_sweeps_per_beta": 0}, ValueError, "num_sweeps_per_beta must be at least 1, got 0"),
    ({"num_sweeps_per_beta": 1.0}, TypeError, "num_sweeps_per_beta must be an integer, got 1.0"),
    ({"beta_range": (1,)}, ValueError, r"beta_range must hold two betas, first and last, got \(1,\)"),
    ({"beta_range": (-1, 1)}, ValueError, r"beta_range must be .*, got \(-1, 1\)"),
    ({"beta_range": (0, 1)}, ValueError, r"beta_range must be above 0 for a geometric schedule, got \(0, 1\)"),
    ({"beta_range": "ab"}, (TypeError, ValueError), "beta_range must hold numbers, got 'ab'"),
    ({"beta_range": 5}, (TypeError, ValueError), "beta_range must be a sequence"),
    ({"beta_schedule": [1]}, ValueError, r"beta_schedule must be given with .* got \[1\] with 'geometric'"),
    ({"beta_schedule_type": "custom"}, ValueError, "beta_schedule must be given .* got None with 'custom'"),
    ({"beta_schedule_type": "cosine"}, ValueError, "beta_schedule_type must be one of .*, got 'cosine'"),
    ({"beta_schedule_type": "custom", "beta_schedule": []}, ValueError, r"beta_schedule must be .*, got \[\]"),
    ({"beta_schedule_type": "custom", "beta_schedule": [-1]}, ValueError, r"beta_schedule must be .*, got \[-1\]"),
    (
        {"beta_schedule_type": "custom", "beta_schedule": [10**400]},
        (ValueError, OverflowError),
        "BlockGibbsSampler: beta_schedule must hold numbers",
    ),
    ({"beta_schedule_type": "custom", "beta_schedule": ["a"]}, ValueError, r"beta_schedule must hold .*, got \['a'\]"),
    (
        {"beta_schedule_type": "custom", "beta_schedule": [[1]]},
        (TypeError, ValueError),
        r"beta_schedule must be .*, got \[\[1\]\]",
    ),
    (
        {"beta_schedule_type": "custom", "beta_schedule": [1, 2], "num_sweeps": 3},
        ValueError,
        "num_sweeps must be None or .*, 2 betas x 1, got 3",
    ),
    (
        {"beta_schedule_type": "custom", "beta_schedule": [1, 2], "beta_range": (1, 3)},
        ValueError,
        r"beta_range must be None or .*, got \(1, 3\)",
    ),
    ({"interrupt_function": 3}, TypeError, "BlockGibbsSampler: interrupt_function must be callable, got 3"),
    ({"proposal_acceptance_criteria": "Glauber"}, ValueError, "one of Gibbs, Metropolis, got 'Glauber'"),
    ({"initial_states_generator": "other"}, ValueError, "initial_states_generator"),
    ({"initial_states_generator": "none"}, ValueError, "initial states"),
    ({"initial_states_generator": "tile"}, ValueError, "initial states"),
    ({"initial_states": {"c": 1}}, ValueError, "initial_states"),
    ({"initial_states": {"a": 3, "b": 1}}, ValueError, "vartype"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD, ids=[str(options) for options, *_ in BAD])
def test_bad_input(options, kind, message):
    """One clear error, of the kind that the original raises."""
    bqm = dimod.BinaryQuadraticModel({"a": 1.0}, {("a", "b"): -1.0}, "SPIN")
    with pytest.raises(kind, match=message):
        BlockGibbsSampler().sample(bqm, **options)
    with pytest.raises(kind):
        SimulatedAnnealingSampler().sample(bqm, **options)


INTEGERS = dimod.SampleSet.from_samples([{"a": 5, "b": 0}], "INTEGER", energy=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_range": (1, float("nan"))}, r"BlockGibbsSampler: beta_range must be .* finite .*, got \(1, nan\)"),
        ({"beta_range": (1, float("inf"))}, r"BlockGibbsSampler: beta_range must be .* finite .*, got \(1, inf\)"),
        ({"beta_range": (1, 1e300)}, r"BlockGibbsSampler: beta_range or .* at most .*e\+37 for this bqm, got 1e\+300"),
        ({"beta_schedule_type": "cosine", "num_sweeps": 1}, "BlockGibbsSampler: beta_schedule_type must be one of"),
        ({"initial_states": INTEGERS}, "BlockGibbsSampler: initial_states must have the values of SPIN, got"),
        (
            {"best_of_read": True, "randomize_order": True},
            "BlockGibbsSampler: best_of_read must be False with randomize_order, got True for both",
        ),
    ],
)
def test_bad_input_that_the_original_lets_pass(options, message):
    bqm = dimod.BinaryQuadraticModel({"a": 1.0}, {("a", "b"): -1.0}, "SPIN")
    with pytest.raises(ValueError, match=f"^{message}"):
        BlockGibbsSampler().sample(bqm, **options)


@VARTYPES
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_biases_must_be_finite(vartype, value):
    for linear, quadratic in (({"a": value}, {}), ({}, {("a", "b"): value})):
        bqm = dimod.BinaryQuadraticModel(linear, quadratic, vartype)
        with pytest.raises(ValueError, match=r"^BlockGibbsSampler: bqm must have finite biases, got NaN or inf"):
            BlockGibbsSampler().sample(bqm)


@pytest.mark.parametrize("bqm", ["x", 3, {"a": 1.0}, dimod.QuadraticModel(), dimod.BinaryQuadraticModel], ids=str)
def test_bqm_must_be_one(bqm):
    got = type(bqm).__name__
    with pytest.raises(TypeError, match=f"^BlockGibbsSampler: bqm must be a dimod.BinaryQuadraticModel, got {got}$"):
        BlockGibbsSampler().sample(bqm)


def test_views_are_models():
    bqm = dimod.BinaryQuadraticModel({"a": 1.0}, {("a", "b"): -1.0}, "SPIN")
    for view in (bqm.spin, bqm.binary):
        sample(view)


@pytest.mark.parametrize(
    ("linear", "quadratic"),
    [
        ({"a": 1e-300}, {("b", "c"): 1e300}),  # the range is finite, but not in the units of the sampler
        ({"a": 5e-324}, {}),  # it is inf
        ({"a": 1e308}, {("a", "b"): 1e308}),  # it is 0
    ],
)
def test_a_default_range_out_of_range(linear, quadratic):
    bqm = dimod.BinaryQuadraticModel(linear, quadratic, "SPIN")
    message = r"bqm must have biases that suggest a beta_range of 0 < beta <= .*, got \[.*\]; give another$"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=f"^BlockGibbsSampler: {message}"):
            BlockGibbsSampler().sample(bqm)


def test_biases_that_overflow_as_couplings_of_bits():
    bqm = dimod.BinaryQuadraticModel({}, {("a", "b"): 1e308}, "SPIN")
    with pytest.raises(ValueError, match=r"^BlockGibbsSampler: bqm must be finite, got NaN or inf"):
        BlockGibbsSampler().sample(bqm, beta_range=(1e-309, 1e-308))


def test_without_dimod_the_error_says_what_to_install():
    program = """
import sys
sys.modules["dimod"] = None
import gibbs_ext, gibbs_ext.interop
try:
    import gibbs_ext.interop.dimod
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "gibbs_ext.interop.dimod: needs dimod; pip install dimod"


def test_the_module_is_imported_when_first_used():
    program = """
import sys, gibbs_ext as gx
assert "dimod" in dir(gx.interop) and "dimod" not in sys.modules
assert gx.interop.dimod.BlockGibbsSampler.__name__ == "BlockGibbsSampler"
assert not hasattr(gx.interop, "other")
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_interactions_lost_in_rounding_are_warned_of():
    def sample(ratio):
        bqm = dimod.BinaryQuadraticModel({}, {("a", "b"): -ratio, ("c", "d"): 1.0}, "SPIN")
        return BlockGibbsSampler().sample(bqm, num_reads=100, num_sweeps=100, seed=1)

    with pytest.warns(
        CouplingResolutionWarning,
        match=r"^BlockGibbsSampler: bqm has terms too small .* at 2 of the variables",
    ):
        sample(3e9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples = sample(1e5)
    c, d = (samples.record.sample[:, samples.variables.index(v)] for v in "cd")
    assert (c == -d).mean() > 0.8


@pytest.mark.parametrize("size", [1.0, 0.731058578, math.pi / 10])
@pytest.mark.parametrize("small", [None, 1e-9, 1e-11])
def test_a_bias_of_the_size_of_an_interaction_cancels_it(size, small):
    """x is free once y is 1, also where a small term elsewhere makes beta large."""
    bqm = dimod.BinaryQuadraticModel({"x": size, "y": -5.0}, {("x", "y"): -size}, "BINARY")
    schedule = {"beta_schedule_type": "custom", "beta_schedule": [np.inf] * 20}
    if small:
        bqm.add_linear("t", small)
        schedule = {}
    with warnings.catch_warnings():
        if size != 1.0 and small:
            warnings.simplefilter("ignore", CouplingResolutionWarning)
        else:
            warnings.simplefilter("error")
        for model in (bqm, bqm.spin):
            found = BlockGibbsSampler().sample(model, num_reads=4000, seed=1, **schedule)
            x = found.record.sample[:, found.variables.index("x")] > 0
            assert abs(x.mean() - 0.5) < z_threshold() * 0.5 / math.sqrt(len(x))


def test_interactions_lost_beside_others_elsewhere_are_warned_of():
    bqm = dimod.BinaryQuadraticModel({"a": 2e-10, "b": 2e-10}, {"ab": 1.9e-10, "xy": -1.0}, "SPIN")
    with pytest.warns(CouplingResolutionWarning, match="at 2 of the variables"):
        BlockGibbsSampler().sample(bqm, seed=1)


def test_fields_too_small_for_zero_temperature_are_warned_of():
    for field, lost in ((1e-30, False), (1e-38, True)):
        bqm = dimod.BinaryQuadraticModel({"a": field}, {"xy": 1.0}, "SPIN")
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            reads = sample(bqm, num_reads=100, seed=1, **AT_ZERO)
        assert bool(found) == lost
        assert lost or (reads.record.sample[:, reads.variables.index("a")] == -1).all()


@VARTYPES
def test_dense_models_at_moderate_beta_are_not_warned_of(vartype):
    bqm = random_bqm(150, density=1).change_vartype(vartype, inplace=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BlockGibbsSampler().sample(bqm, num_sweeps=3, beta_range=(0.1, 3), seed=1)


def test_the_rounding_of_many_interactions_adds_up():
    """The rounding of each alone is below a hundredth of the hub's field; the rounding of all of them is not."""
    random = np.random.default_rng(0)
    J = {("hub", i): random.normal() for i in range(400)}
    with pytest.warns(CouplingResolutionWarning, match="at [0-9]+ of the variables"):
        BlockGibbsSampler().sample(dimod.BinaryQuadraticModel({"hub": 1e-4}, J, "SPIN"), num_sweeps=10, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        few = dict(list(J.items())[:4])
        BlockGibbsSampler().sample(dimod.BinaryQuadraticModel({"hub": 1e-4}, few, "SPIN"), num_sweeps=10, seed=1)


def test_usual_models_are_not_warned_of():
    random = np.random.default_rng(0)
    bqm = dimod.BinaryQuadraticModel.from_ising(
        {}, {(u, v): random.normal() for u, v in ChimeraGraph(8).edges.tolist()}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BlockGibbsSampler().sample(bqm, num_sweeps=10, seed=1)
