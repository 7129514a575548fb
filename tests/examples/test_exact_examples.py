# SPDX-License-Identifier: Apache-2.0
"""python/examples whose answers are known exactly: Ising tori, annealed log Z, the modes of tempered chains."""

import itertools
import math
import re
import runpy
import sys

import numpy as np
import pytest
import torch
from programs import EXAMPLES, load, run

import gibbs_ext as gx

NUMBER = r"([+-]?[\d.]+)"


def numbers(pattern, text):
    """A row for each match, a column for each NUMBER."""
    found = re.findall(pattern.replace("#", NUMBER), text)
    assert found
    return np.array(found, dtype=float).reshape(len(found), -1)


def assert_pictures(folder, *names):
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    for path in folder.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


# Ising tori -------------------------------------------------------------------------------------------------------


def enumerated_torus(size, beta):
    """|m|, energy per spin and Binder's cumulant of each beta, [3, B], from all states."""
    spins = np.array(list(itertools.product((-1, 1), repeat=size**2)), dtype=np.int8).reshape(-1, size, size)
    energy = -sum((spins * np.roll(spins, 1, axis)).sum((1, 2)) for axis in (1, 2)) / size**2
    m = spins.mean((1, 2))
    weight = np.exp(-beta[:, None] * size**2 * (energy + 2))
    weight /= weight.sum(1, keepdims=True)
    m2, m4 = weight @ m**2, weight @ m**4
    return np.stack([weight @ abs(m), weight @ energy, 1 - m4 / (3 * m2**2)])


def test_ising_2d(tmp_path):
    """Of 31 betas, with errors that are neither too large nor too small: chi^2 / 31 is 1 +- 0.25."""
    arguments = ("--sizes", 4, 6, "--betas", 31, "--draws", 500, "--folder", tmp_path / "a" / "b")
    out = run(EXAMPLES / "ising_2d.py", *arguments, cwd=tmp_path)
    assert_pictures(tmp_path / "a" / "b", "magnetization.png")
    assert re.findall(r"^L = (\d+)", out, re.MULTILINE) == ["4", "6"]
    table = numbers(r"beta #: \|m\| # \+- #, energy # \+- # \(exact #\), Binder # \+- #", out)
    beta, m, m_error, energy, energy_error, exact, binder, binder_error = table[:31].T
    assert np.any(np.abs(beta - math.log(1 + math.sqrt(2)) / 2) < 1e-5)
    expected = enumerated_torus(4, beta)
    assert np.abs(exact - expected[1]).max() < 3e-5  # betas and energies are printed with 5 digits
    errors = np.stack([m_error, energy_error, binder_error])
    assert (errors.max(1) < [0.02, 0.04, 0.05]).all()
    of_small = (np.stack([m, energy, binder]) - expected) / (errors + 1e-5)
    energies, errors, exact = table[31:, 3:6].T
    for deviations in (*of_small, (energies - exact) / (errors + 1e-5)):
        assert np.abs(deviations).max() < 5
        assert 0.4 < (deviations**2).mean() < 2


@pytest.mark.parametrize("size", [3, 4, 5, 6])
def test_the_exact_torus(size):
    """Kaufman's formula for even and odd sizes, against the elimination of the nodes of the program's own model."""
    module, beta = load("ising_2d"), np.array([0.05, 0.3, 0.44, 0.6, 1.5])
    model, offset = module.torus_models(size, beta)
    expected = gx.exact_log_partition(model).numpy() - offset
    assert np.abs(module.torus_log_partition(size, torch.tensor(beta)).numpy() - expected).max() < 1e-5
    if size < 5:
        assert np.abs(module.torus_energy(size, beta) - enumerated_torus(size, beta)[1]).max() < 1e-9


def test_the_infinite_lattice():
    module, critical = load("ising_2d"), math.log(1 + math.sqrt(2)) / 2
    away = np.array([0.01, 0.2, 0.35, 0.55, 0.8, 2.0])
    assert np.abs(module.onsager_energy(away) - module.torus_energy(100, away)).max() < 1e-12
    assert np.abs(module.onsager_energy(np.array([critical])) + math.sqrt(2)).max() < 1e-9
    # The series at low temperature, whose next term is 714 u^6.
    u = np.exp(-4 * np.array([1.0, 1.2]))
    series = 1 - 2 * u**2 - 8 * u**3 - 34 * u**4 - 152 * u**5
    assert np.abs(module.yang_magnetization(np.array([1.0, 1.2])) - series).max() < 1000 * u.max() ** 6
    below, above = module.yang_magnetization(critical * np.array([0.999, 1.001]))
    assert below == 0
    assert 0.4 < above < 0.6


# log Z by annealing -----------------------------------------------------------------------------------------------


def test_ais_bracket(tmp_path):
    seeds = 16
    arguments = ("--left", 8, "--right", 10, "--strengths", 0.5, 6, "--steps", 2, 100, "--chains", 60)
    out = run(EXAMPLES / "ais_bracket.py", *arguments, "--seeds", seeds, "--folder", tmp_path / "a", cwd=tmp_path)
    assert_pictures(tmp_path / "a", "bracket.png")
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 18)
    machine = load("ais_bracket").machine
    for (strength, printed), expected in zip(
        numbers(r"standard deviation of #: log Z is #; 16 seeds", out), (0.5, 6), strict=True
    ):
        assert strength == expected
        exact = torch.logsumexp(-machine(8, 10, strength, 0).energy(states), 0)
        assert abs(printed - exact) < 1e-4

    estimates = ", ".join(rf"{name} # \+- # \(reported #\)" for name in ("forward", "reverse", "Bennett's"))
    row = rf"# steps: {estimates}; effective sample size # and # of 60; "
    row += "warned of the size #, of the bracket #; bracket holds # of 16"
    weak_fast, weak_slow, strong_fast, _ = numbers(row, out)
    for cell in (weak_fast, weak_slow):
        mean, spread, reported = cell[1:10].reshape(3, 3).T
        assert (abs(mean) < 5 * spread / seeds**0.5).all()
        # A spread over 16 seeds has an error of 18%.
        assert ((spread / reported > 0.5) & (spread / reported < 2)).all()
        assert spread[2] < 1.2 * spread[:2].min()
        assert cell[-3:-1].tolist() == [0, 0]
        assert cell[-1] >= 12
    assert (weak_slow[2:10:3] < 0.3 * weak_fast[2:10:3]).all()
    assert (weak_slow[10:12] > 58).all()
    mean, spread, reported = strong_fast[1:10].reshape(3, 3).T
    assert mean[0] < -3 * spread[0] / seeds**0.5
    assert mean[1] > 3 * spread[1] / seeds**0.5
    assert (abs(mean[:2]) > reported[:2]).all()
    assert strong_fast[-3] == seeds
    assert strong_fast[-2] > seeds / 4
    assert strong_fast[-1] >= 12


def test_when_a_bracket_holds():
    errors = np.array([[-1.0, 1.0, 1.0, -1.0, -1.0], [1.0, 2.0, 2.0, 1.0, -1.0], [0.0] * 5])
    reported = np.array([[0.1, 0.6, 0.4, 0.1, 0.1], [0.1] * 4 + [0.4], [0.1] * 5])
    measured = load("ais_bracket").Measured(errors, reported, np.ones((2, 5)), np.zeros((2, 5), dtype=bool))
    assert measured.holds.tolist() == [True, True, False, True, False]


# Modes of tempered chains -----------------------------------------------------------------------------------------


def share_of_ones(left, right, weight, tilt):
    """Sums over the number k of left units that are 1, with the right units summed out."""
    k = np.arange(left + 1)
    log_binomial = np.array([math.log(math.comb(left, n)) for n in k])
    log_weight = log_binomial + k * (tilt - weight * right / 2)
    log_weight += right * np.log1p(np.exp(tilt - weight * left / 2 + weight * k))
    p = np.exp(log_weight - log_weight.max())
    return p[k > left / 2].sum() / p.sum()


def test_tempering_round_trips(tmp_path):
    arguments = ("--left", 5, "--right", 30, "--weight", 2.5, "--tilt", 0.04, "--betas", 6, "--rounds", 800)
    out = run(EXAMPLES / "tempering_round_trips.py", *arguments, "--folder", tmp_path / "a", cwd=tmp_path)
    assert_pictures(tmp_path / "a", "ladder.png", "modes.png", "replicas.png")
    share = share_of_ones(5, 30, 2.5, 0.04)
    assert 0.7 < share < 0.9
    ((printed,),) = numbers("the mode of ones has the weight #", out)
    assert abs(printed - share) < 1e-4

    betas, rates = (
        [np.array(row.split(), dtype=float) for row in re.findall(rf"ladder: {name} ([\d. ]+)", out)]
        for name in ("betas", "swap rates")
    )
    assert np.abs(betas[0] - np.linspace(0, 1, 6)).max() < 1e-3
    assert [betas[1][0], betas[1][-1]] == [0, 1]
    assert np.ptp(rates[1]) < 0.1 < 0.4 < np.ptp(rates[0])
    trips = numbers(r"ladder: # \+- # round trips of each chain in 1000 rounds \(# if energies", out)
    for (mean, _, ideal), of_ladder in zip(trips, rates, strict=True):
        assert abs(ideal - 500 / (1 + (1 / of_ladder - 1).sum())) < 0.05 * ideal
        assert 0.5 * ideal < mean < 1.1 * ideal
    (even, even_error, _), (tuned, tuned_error, _) = trips
    assert tuned - even > 5 * math.hypot(even_error, tuned_error)

    shares = numbers(r"chains: share of ones # \+- # \(exact #\), # changes of mode", out)
    (plain, _, _, plain_changes), *tempered = shares
    assert plain_changes == 0
    assert plain < share - 0.1  # about as many as begin there
    for mean, error, exact, changes in tempered:
        assert abs(exact - share) < 1e-4
        assert abs(mean - share) < 5 * error
        assert error < 0.03
        assert changes > 10


# What all do ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "option", "value"),
    [
        ("ising_2d", "sizes", 2),
        ("ising_2d", "betas", 0),
        ("ising_2d", "chains", 1),
        ("ising_2d", "draws", 9),
        ("ising_2d", "seed", -1),
        ("ais_bracket", "left", 26),
        ("ais_bracket", "right", 0),
        ("ais_bracket", "strengths", "inf"),
        ("ais_bracket", "steps", 0),
        ("ais_bracket", "chains", 1),
        ("ais_bracket", "seeds", 1),
        ("ais_bracket", "seed", 2**32),
        ("tempering_round_trips", "left", 4),
        ("tempering_round_trips", "weight", "nan"),
        ("tempering_round_trips", "betas", 1),
        ("tempering_round_trips", "chains", 12),
        ("tempering_round_trips", "rounds", 99),
        ("tempering_round_trips", "seed", -1),
    ],
)
def test_refuses(monkeypatch, capsys, program, option, value):
    monkeypatch.setattr(sys, "argv", [f"{program}.py", f"--{option}={value}"])
    with pytest.raises(SystemExit) as stop:
        load(program).main()
    assert stop.value.code == 2
    assert re.search(rf"error: --{option} must .*, got {value}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("program", "module", "function"),
    [
        ("ising_2d", gx.diagnostics, "record"),
        ("ais_bracket", gx, "bracket_log_partition"),
        ("tempering_round_trips", gx, "parallel_tempering"),
    ],
)
def test_ends_in_one_line_when_interrupted(monkeypatch, capsys, tmp_path, program, module, function):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, function, interrupt)
    small = ["--left=5", "--right=5"] if program != "ising_2d" else ["--sizes=3"]
    monkeypatch.setattr(sys, "argv", [f"{program}.py", f"--folder={tmp_path}", *small])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLES / f"{program}.py"), run_name="__main__")
    assert stop.value.code == 130
    err = capsys.readouterr().err
    assert err.endswith("interrupted\n")
    assert "Traceback" not in err
