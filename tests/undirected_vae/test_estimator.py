# SPDX-License-Identifier: Apache-2.0
"""Exact and truncated gradients agree with independent enumerations, estimators with them, and the command works."""

import csv
import dataclasses
import itertools
import math

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
import gibbs_ext as gx
from undirected_vae.__main__ import main
from undirected_vae.estimator import (
    GROUP,
    SPIN_BETA,
    Problem,
    exact_gradients,
    measure,
    reinforce_gradients,
    relaxed_gradients,
)

SMALL = ["--left", "2", "--right", "3", "--couplings", "1", "--samples", "400", "--seeds", "3", "--binary-sweeps", "2"]


def problem_of(left, right, coupling, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Problem.random(left, right, coupling, 0.3, generator), generator


def all_bits(n):
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=n)), dtype=torch.float64)


def exact_starts(problem, count, generator):
    z = gx.exact_samples(problem.machine(problem.theta), count, generator=generator)
    return z[:, : problem.left]


def test_the_exact_gradient_is_that_of_an_expectation_over_spins():
    problem, _ = problem_of(2, 3, coupling=2.0)
    theta = problem.theta.clone().requires_grad_()
    z = all_bits(5)
    spins = 2 * z - 1
    fields, couplings = theta[:5], theta[5:].view(2, 3)
    # The coupling between bits is 2 t J: four times a quarter of it is left between spins.
    log_weights = SPIN_BETA / 2 * (spins @ fields + ((spins[:, :2] @ couplings) * spins[:, 2:]).sum(-1))
    f = problem.f(z, z)
    expectation = ((log_weights - torch.logsumexp(log_weights, 0)).exp() * f).sum()
    wanted = torch.autograd.grad(expectation, theta)[0]
    full, _ = exact_gradients(problem, [1])
    torch.testing.assert_close(full, wanted, rtol=1e-10, atol=1e-10)
    assert wanted.norm() > 0.1


def test_f_is_constant_where_q_is_the_exact_posterior():
    problem, _ = problem_of(2, 3, coupling=2.0)
    layers = torch.zeros_like(problem.layers[0]), problem.layers[1]  # every image is equally probable
    problem = dataclasses.replace(problem, layers=layers, prior=problem.theta)
    z = all_bits(5)
    torch.testing.assert_close(problem.f(z, z), torch.full_like(z[:, 0], -len(problem.image) * math.log(2)))
    assert exact_gradients(problem, [1])[0].norm() < 1e-12


def test_the_truncated_gradient_is_that_of_the_kernel_with_the_law_held_fixed():
    problem, _ = problem_of(2, 3, coupling=2.0)
    z = all_bits(5)

    def kernel(theta):
        """[32, 32], from conditional probabilities: right given left, then left given right."""
        machine = problem.machine(theta)
        of_right = torch.sigmoid(machine.right_bias + z[:, :2] @ machine.weight)  # [32, 3], by the state before
        of_left = torch.sigmoid(machine.left_bias + z[:, 2:] @ machine.weight.T)  # [32, 2], by the state after
        right = torch.where(z[None, :, 2:] == 1, of_right[:, None], 1 - of_right[:, None]).prod(-1)
        return right * torch.where(z[:, :2] == 1, of_left, 1 - of_left).prod(-1)

    q = torch.softmax(-problem.machine(problem.theta).energy(z), 0)
    torch.testing.assert_close(q @ kernel(problem.theta), q)  # a sweep leaves q unchanged
    f = problem.f(z, z)
    theta = problem.theta.clone().requires_grad_()
    full, truncated = exact_gradients(problem, [1, 2, 5])
    for sweeps in (1, 2, 5):
        swept = q @ torch.linalg.matrix_power(kernel(theta), sweeps) @ f
        wanted = torch.autograd.grad(swept, theta)[0]
        torch.testing.assert_close(truncated[sweeps], wanted, rtol=1e-9, atol=1e-9)
        assert (wanted - full).norm() > 1e-3 * full.norm()  # the sweeps are too few for the whole gradient


def test_nothing_is_truncated_without_couplings_or_after_many_sweeps():
    free, _ = problem_of(3, 2, coupling=0.0)
    full, truncated = exact_gradients(free, [1])
    torch.testing.assert_close(truncated[1], full)
    problem, _ = problem_of(3, 2, coupling=1.0)
    full, truncated = exact_gradients(problem, [1, 2, 5, 100])
    lacking = [float((truncated[sweeps] - full).norm() / full.norm()) for sweeps in (1, 2, 5, 100)]
    assert lacking[0] > 0.1
    assert lacking == sorted(lacking, reverse=True)
    assert lacking[-1] < 1e-9


def is_unbiased(gradients, expected):
    """A chi-squared test, with a false alarm in a million or fewer."""
    difference = gradients.mean(0) - expected
    statistic = float(difference @ torch.linalg.solve(gradients.T.cov() / len(gradients), difference))
    parameters = len(expected)
    return statistic < parameters + 7 * math.sqrt(2 * parameters) + 10


def test_reinforce_is_unbiased_and_faulty_estimates_are_noticed():
    problem, generator = problem_of(3, 3, coupling=1.0)
    full, truncated = exact_gradients(problem, [1])
    left = exact_starts(problem, 80_000, generator)
    gradients = reinforce_gradients(problem, left, generator)
    assert len(gradients) == 80_000 // GROUP
    assert is_unbiased(gradients, full)
    results = measure(gradients, full, full, GROUP)
    assert results["bias"] < 3 * results["bias_error"]
    assert results["cosine"] > 0.99

    # A scale, f's own sample in its baseline, and the truncation.
    assert not is_unbiased(1.1 * gradients, full)
    assert not is_unbiased(gradients * (GROUP - 1) / GROUP, full)
    assert not is_unbiased(gradients, truncated[1])
    scaled = measure(1.2 * gradients, full, full, GROUP)
    assert abs(scaled["bias"] - 0.2) < 3 * results["bias_error"]


def test_samples_that_are_not_from_the_machine_are_noticed():
    problem, generator = problem_of(3, 3, coupling=4.0)
    full, _ = exact_gradients(problem, [1])
    left = torch.zeros(80_000, 3, dtype=torch.float64)
    assert not is_unbiased(reinforce_gradients(problem, left, generator), full)


@pytest.mark.parametrize("sweeps", [1, 2])
def test_relaxed_gradients_are_the_truncated_ones_if_the_relaxation_is_sharp(sweeps):
    problem, generator = problem_of(3, 3, coupling=2.0, seed=5)
    full, truncated = exact_gradients(problem, [1, 2])
    left = exact_starts(problem, 40_000, generator)
    gradients = relaxed_gradients(problem, left, sweeps, "concrete", generator)
    results = measure(gradients, full, truncated[sweeps])
    assert gradients.shape == (40_000, 6 + 9)
    assert results["bias_error"] < 0.15
    assert results["other_bias"] < 3 * results["bias_error"]
    assert abs(results["bias"] - results["truncated_bias"]) < 3 * results["bias_error"]
    if sweeps == 1:
        assert results["truncated_bias"] > 5 * results["bias_error"]
        assert measure(2 * gradients, full, truncated[1])["other_bias"] > 5 * results["bias_error"]


def test_measures_of_estimates_whose_bias_and_noise_are_known():
    generator = torch.Generator().manual_seed(0)
    full = torch.tensor([3.0, 4.0], dtype=torch.float64)
    across = torch.tensor([-4.0, 3.0], dtype=torch.float64)
    noise = 5 * torch.randn(200_000, 2, generator=generator, dtype=torch.float64)
    results = measure(full + across + noise, full, 2 * full, samples_each=9)
    wanted = {
        "cosine": math.sqrt(0.5),
        "truncated_cosine": 1.0,
        "bias": 1.0,
        "bias_error": math.sqrt(2 / 200_000),
        "truncated_bias": 1.0,
        "other_bias": math.sqrt(2),
        "noise": 3 * math.sqrt(2),
    }
    assert results == pytest.approx(wanted, abs=0.02)
    # Without bias the squared distance is that of the noise, and below its expectation 63 times of 100 in two dims.
    few = [measure(full + noise[start : start + 10], full, full)["bias"] for start in range(0, 2000, 10)]
    assert 100 < sum(bias == 0 for bias in few) < 150


def test_the_command_writes_table_and_plot(tmp_path, capsys):
    flags = [*SMALL, "--relaxed-sweeps", "2", "1", "--relaxations", "concrete", "pwl"]
    assert main(["estimator", "--folder", str(tmp_path / "a"), *flags]) == 0
    text = (tmp_path / "a" / "estimator.md").read_text()
    assert capsys.readouterr().out.startswith(text)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "estimator.csv",
        "estimator.md",
        "estimator.png",
    ]
    assert (tmp_path / "a" / "estimator.png").read_bytes().startswith(b"\x89PNG")
    content = (tmp_path / "a" / "estimator.csv").read_bytes()
    rows = list(csv.DictReader(content.decode().splitlines()))
    cases = [(row["start"], row["binary_sweeps"], row["estimator"], row["relaxed_sweeps"]) for row in rows]
    relaxed = [("exact", "0", relaxation, sweeps) for relaxation in ("concrete", "pwl") for sweeps in "12"]
    others = [
        (start, "2", *kind) for start in ("random", "previous") for kind in (("concrete", "1"), ("REINFORCE", "0"))
    ]
    assert cases == [*relaxed, ("exact", "0", "REINFORCE", "0"), *others]
    assert len([line for line in text.splitlines() if line.startswith("| 1.0")]) == len(rows)
    for row in rows:
        assert 0 < float(row["noise"]) < 100
        assert float(row["noise_se"]) > 0
        assert row["machines"] == "3"
        if row["estimator"] == "REINFORCE":
            assert (float(row["truncated_cosine"]), float(row["truncated_bias"])) == (pytest.approx(1), 0)

    assert main(["estimator", "--folder", str(tmp_path / "b"), *flags]) == 0
    assert (tmp_path / "b" / "estimator.csv").read_bytes() == content
    assert main(["estimator", "--folder", str(tmp_path / "b"), *flags, "--seed", "1"]) == 0
    assert (tmp_path / "b" / "estimator.csv").read_bytes() != content


def test_what_noise_hides_is_not_shown(tmp_path, capsys):
    flags = [*SMALL, "--couplings", "4", "--relaxed-sweeps", "20", "--relaxations", "concrete", "--samples", "80"]
    assert main(["estimator", "--folder", str(tmp_path), *flags]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| 4.0 | concrete | 20"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert [cell == "-" for cell in cells[5:]] == [True, False, True, False, False, True, False]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--couplings", "1", "-1"], "couplings: expected from 0 to 100, got -1.0"),
        (["--couplings", "nan"], "couplings: expected from 0 to 100, got nan"),
        (["--left", "9"], "left: expected from 1 to 8, got 9"),
        (["--relaxed-sweeps", "0"], "relaxed_sweeps: expected from 1 to 100, got 0"),
        (["--binary-sweeps", "-1"], "binary_sweeps: expected from 0 to 100000, got -1"),
        (["--samples", "79"], "samples: expected from 80 to 10000000, got 79"),
        (["--seeds", "2"], "seeds: expected from 3 to 1000, got 2"),
    ],
)
def test_bad_flags_are_one_error(tmp_path, capsys, flags, problem):
    assert main(["estimator", "--folder", str(tmp_path / "a"), *flags]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"error: {problem}\n")
    assert not (tmp_path / "a").exists()


def test_a_folder_that_cannot_be_written_is_one_error_before_the_work(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["estimator", "--folder", str(tmp_path / "file")]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (
        "",
        f"error: {tmp_path / 'file'}: the folder cannot be written: File exists\n",
    )
