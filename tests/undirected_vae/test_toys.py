# SPDX-License-Identifier: Apache-2.0
"""The toys: divergences against hand-computed ones, what training finds, and the command."""

import csv
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from scipy import stats
from support import FALSE_ALARM, assert_close

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
from undirected_vae import toys
from undirected_vae.__main__ import main
from undirected_vae.config import Config
from undirected_vae.directed import all_bits, log_bernoulli
from undirected_vae.vae import VAE

ROOT = Path(__file__).parents[2]


def model_of(toy, seed=0):
    return toys.TOYS[toy][1](torch.Generator().manual_seed(seed))


def fair(inputs, **settings):
    """A VAE whose posterior has fair, independent bits for every input."""
    vae = VAE(Config(left=6, right=6, encoder=(4,), prior_chains=1, **settings), torch.full((inputs,), 0.5), 1).eval()
    with torch.no_grad():
        for parameter in vae.posterior.parameters():
            parameter.zero_()
    return vae


@pytest.mark.parametrize(
    "settings",
    [
        {"coupling": "none"},
        {"coupling": "per_sample"},
        {"posterior": "directed"},
        {"posterior": "directed", "groups": 4},
    ],
)
def test_divergence_of_fair_bits_from_xor_pairs(settings):
    """For each pair two states have the probability 0.45 and two 0.05, so that KL = log(5 / 3)."""
    inputs = (torch.rand(7, 6) < 0.5).float()
    kl = toys.exact_kl(fair(6, **settings), model_of("xor"), inputs)
    assert_close(kl, torch.full((7,), 6 * math.log(5 / 3)).double(), 1e-5)


def test_divergence_of_the_right_couplings_from_xor_pairs():
    """Pairs that are equal with probability 0.9 are exact for x = 0, and cost 0.8 log 9 for each x_i = 1."""
    vae = fair(6, coupling="shared")
    with torch.no_grad():
        # For bits the coupling is 4 times that of spins, log(9) / 2.
        vae.posterior.raw_coupling += torch.eye(6) * 2 * math.log(9)
        scale = vae.posterior.parameters_of(torch.zeros(1, 4))[2].diagonal().mean() / (2 * math.log(9))
        vae.posterior.raw_coupling /= scale
    inputs = torch.tensor([[0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 1]]).float()
    expected = 0.8 * math.log(9) * torch.tensor([0, 1, 3]).double()
    assert_close(toys.exact_kl(vae, model_of("xor"), inputs), expected, 1e-5)


def test_directed_divergence_against_its_conditionals():
    """The hand-made q(z | x) of 4 groups, state by state."""
    torch.manual_seed(0)
    vae, model = fair(24, posterior="directed", groups=4), model_of("mlp")
    with torch.no_grad():
        for parameter in vae.posterior.parameters():
            parameter.normal_()
        inputs = toys.draw(model, 2, torch.Generator().manual_seed(1))
        features, states = vae.encoder(inputs), all_bits(12)
        log_q = 0
        for group in range(4):
            before = states[:, None, : 3 * group].expand(-1, 2, -1)
            logits = vae.posterior.logits(features)
            if group:
                logits = vae.posterior.further[group - 1](inputs, before)
            log_q = log_q + log_bernoulli(2 * logits, states[:, None, 3 * group : 3 * group + 3])
        log_p = toys.true_log_posterior(model, inputs)
        expected = (log_q.exp() * (log_q - log_p)).sum(0)
    assert_close(toys.exact_kl(vae, model, inputs), expected, 1e-4)
    assert (expected > 1).all()


def test_noisy_or_by_its_definition():
    generator = torch.Generator().manual_seed(5)
    is_cause = torch.rand(12, 24, generator=generator) < 0.3
    states = all_bits(12)[::97]
    num_active = states @ is_cause.float()
    assert num_active.max() > 4
    expected = 1 - 0.95 * 0.2**num_active
    assert_close(torch.sigmoid(model_of("noisy_or", 5).decoder(states)), expected, 1e-5)


@pytest.mark.parametrize("toy", toys.TOYS)
def test_inputs_have_the_means_of_the_model_and_seeds_of_their_own(toy):
    model = model_of(toy)
    weight = log_bernoulli(model.prior, all_bits(12)).exp()
    assert_close(weight.sum(), torch.tensor(1.0), 1e-5)
    mean = weight @ torch.sigmoid(model.decoder(all_bits(12)))
    inputs = toys.draw(model, 5000, torch.Generator().manual_seed(1))
    pvalues = [
        stats.binomtest(int(column.sum()), 5000, float(p)).pvalue for column, p in zip(inputs.mT, mean, strict=True)
    ]
    assert min(pvalues) > FALSE_ALARM / len(mean)
    if toy != "xor":  # its decoder is not random
        assert not torch.equal(model_of(toy, 1).decoder(all_bits(12)), model.decoder(all_bits(12)))


def test_xor_pairs_need_couplings():
    """Fair bits cost 6 log(5 / 3) = 3.06 nats, and no factorial posterior is much better."""
    kl = {
        posterior: toys.divergence(toys.Cell("xor", posterior, "pwl", seed=0, steps=800))
        for posterior in ("directed, L = 1, t = 2", "undirected, per_sample")
    }
    assert kl["undirected, per_sample"] < 0.2
    assert kl["directed, L = 1, t = 2"] > 1


def test_every_cell_has_settings():
    cells = [toys.Cell(toy, *row, 0, 1) for toy, row in itertools.product(toys.TOYS, toys.ROWS)]
    configs = [cell.config() for cell in cells[: len(toys.ROWS)]]
    assert len(set(configs)) == len(toys.ROWS)
    assert {config.relaxation for config in configs} == set(toys.SHARPNESS)
    assert {config.coupling for config in configs} == {"none", "shared", "low_rank", "per_sample"}
    assert {(config.groups, config.spin_beta) for config in configs} == set(itertools.product((1, 2, 4), (1, 2)))


def test_the_command_writes_its_files(tmp_path, capfd, monkeypatch):
    rows = [("undirected, per_sample", "concrete"), toys.ROWS[-1]]
    monkeypatch.setattr(toys, "ROWS", rows)
    folder = tmp_path / "a" / "b"
    command = ["toys", "--folder", str(folder), "--toys", "xor", "mlp", "--steps", "2", "--seeds", "2"]
    assert main([*command, "--processes", "1"]) == 0
    out, err = capfd.readouterr()
    assert "8/8" in err
    names = ["toys.csv", "toys.md", "toys.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / "toys.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    table = (folder / "toys.md").read_text()
    assert out.startswith(table)
    assert out.count(str(folder)) == 3
    lines = list(csv.DictReader((folder / "toys.csv").read_text().splitlines()))
    assert [(line["toy"], line["posterior"], line["relaxation"]) for line in lines] == [
        (toy, *row) for toy in ("xor", "mlp") for row in rows
    ]
    for line in lines:
        first, second = float(line["seed_0"]), float(line["seed_1"])
        assert float(line["mean"]) == pytest.approx((first + second) / 2)
        assert float(line["standard_error"]) == pytest.approx(abs(first - second) / 2)
        assert f"{float(line['mean']):.3f} +- {float(line['standard_error']):.3f}" in table
    # A cell's value does not depend on the process that makes it.
    cell = toys.Cell("xor", *rows[0], seed=1, steps=2)
    assert toys.divergence(cell) == pytest.approx(float(lines[0]["seed_1"]), rel=1e-4)


def test_a_training_that_diverges_is_one_error(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(toys, "ROWS", [("undirected, per_sample", "pwl")])
    monkeypatch.setattr(toys, "Cell", _Diverging)
    command = ["toys", "--folder", str(tmp_path), "--toys", "xor", "--steps", "2", "--seeds", "2"]
    assert main([*command, "--processes", "1"]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"error: xor: undirected, per_sample, pwl, seed \d: .*NaN.*", error)
    assert not list(tmp_path.iterdir())


class _Diverging(toys.Cell):
    def config(self):
        return super().config().replace({"learning_rate": 1e300})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "1"], "seeds: expected from 2 to 1000, got 1"),
        (["--steps", "0"], "steps: expected from 1 to 1000000000, got 0"),
        (["--processes", "0"], "processes: expected from 1 to 1000, got 0"),
        (["--toys", "xor", "and"], "toys: expected some of xor, noisy_or, linear, mlp, got and"),
    ],
)
def test_bad_flags_are_one_error(tmp_path, capsys, flags, message):
    assert main(["toys", "--folder", str(tmp_path / "new"), *flags]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_one_error_before_the_work(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["toys", "--folder", str(tmp_path / "file" / "new")]) == 2
    assert re.fullmatch(r"error: \S+/file/new: the folder cannot be written: .*\n", capsys.readouterr().err)


def group_members(group):
    """Ids of the processes of a process group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it has ended
        if int(its_group) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def wait_until(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left(tmp_path, number):
    """Ctrl-C reaches all processes of the group, as from a terminal; SIGKILL the parent alone."""
    process = subprocess.Popen(
        [sys.executable, "-m", "undirected_vae", "toys", "--folder", str(tmp_path), "--steps", "1000000000"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        # The command, the two that train, and multiprocessing's tracker of resources.
        wait_until(lambda: len(group_members(process.pid)) == 4 or process.poll() is not None)
        time.sleep(1)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, err = process.communicate(timeout=120)
        if number == signal.SIGINT:
            assert process.returncode == 130
            assert err.splitlines()[-1] == "interrupted"
            assert "Traceback" not in err
        wait_until(lambda: not group_members(process.pid))
        assert not list(tmp_path.iterdir())
    finally:
        if group_members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
