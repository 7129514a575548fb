# SPDX-License-Identifier: Apache-2.0
"""python/examples: each program runs, and the planted ground state is one."""

import os
import re
import signal
import subprocess
import sys

import dimod
import numpy as np
import pytest
from programs import EXAMPLES, ROOT, load, run

from gibbs_ext import ChimeraGraph


def test_spin_glass(tmp_path):
    arguments = ("--size", 3, "--reads", 100, "--sweeps", 300, "--folder", tmp_path / "a" / "b")
    out = run(EXAMPLES / "spin_glass.py", *arguments, cwd=tmp_path)
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["annealing.png", "state.png"]
    for picture in (tmp_path / "a" / "b").iterdir():
        assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    ground = int(re.search(r"72 spins, 18 loops, planted ground state energy (-\d+)", out)[1])
    best = [int(n) for n in re.findall(r"best +(-\d+),", out)]
    assert len(best) == 4  # 10, 30, 100, 300 sweeps
    assert min(best) == ground
    assert f"best found {ground}, 0 above the planted ground state" in out
    means = [float(n) for n in re.findall(r"mean +(-[\d.]+)", out)]
    assert means == sorted(means, reverse=True)


@pytest.mark.parametrize("seed", range(5))
def test_the_planted_state_is_a_ground_state(seed):
    """By enumeration. And without the frustrated couplings' sign, the energy would be another."""
    graph = ChimeraGraph(1, 2)
    bqm, planted, energy = load("spin_glass").planted_spin_glass(graph, 6, np.random.default_rng(seed))
    assert bqm.num_variables == graph.num_nodes == 16
    edges = {frozenset(edge) for edge in graph.edges.tolist()}
    assert bqm.num_interactions > 6
    assert all(frozenset(pair) in edges for pair in bqm.quadratic)
    assert bqm.energy(planted) == energy
    assert dimod.ExactSolver().sample(bqm).first.energy == energy


def test_loops_are_simple_and_closed():
    module, graph = load("spin_glass"), ChimeraGraph(2)
    neighbors = [[] for _ in range(graph.num_nodes)]
    for u, v in graph.edges.tolist():
        neighbors[u].append(v)
        neighbors[v].append(u)
    random = np.random.default_rng(0)
    lengths = set()
    for _ in range(200):
        loop = module.random_loop(neighbors, random)
        assert len(set(loop)) == len(loop) >= 4
        assert all(v in neighbors[u] for u, v in zip(loop, loop[1:] + loop[:1], strict=True))
        lengths.add(len(loop))
    assert len(lengths) > 3


def test_dimod_dropin_and_the_program_that_it_was(tmp_path):
    program = EXAMPLES / "dimod_dropin.py"
    out = run(program, cwd=tmp_path)
    (commented,) = re.findall(r"^# (from dwave.*)$", program.read_text(), re.MULTILINE)
    (ours,) = re.findall(r"^from gibbs_ext.*$", program.read_text(), re.MULTILINE)
    before = tmp_path / "before.py"
    before.write_text(program.read_text().replace(ours, commented))
    lowest = [re.match(r"lowest energy (-[\d.]+),", text)[1] for text in (out, run(before, cwd=tmp_path))]
    assert lowest[0] == lowest[1]


@pytest.mark.parametrize(
    ("option", "value"),
    [("size", 0), ("reads", 0), ("sweeps", 9), ("loops", 0), ("loops", "nan"), ("seed", -1), ("seed", 2**32)],
)
def test_spin_glass_refuses(monkeypatch, capsys, option, value):
    monkeypatch.setattr(sys, "argv", ["spin_glass.py", f"--{option}={value}"])
    with pytest.raises(SystemExit) as stop:
        load("spin_glass").main()
    assert stop.value.code == 2
    assert re.search(rf"error: --{option} must .*, got {value}", capsys.readouterr().err)


def test_xor_posterior(tmp_path):
    out = run(EXAMPLES / "xor_posterior.py", "--folder", tmp_path / "a" / "b", cwd=tmp_path)
    (without,) = re.findall(r"^without couplings: KL\(q \|\| p\) = ([\d.]+) nats$", out, re.MULTILINE)
    (coupled,) = re.findall(r"^with couplings: KL\(q \|\| p\) = ([\d.]+) nats$", out, re.MULTILINE)
    # The best that independent bits can do is 2.99.
    assert 2.98 < float(without) < 3.5
    assert float(coupled) < 0.2
    (picture,) = (tmp_path / "a" / "b").iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(("option", "value"), [("steps", 0), ("seed", -1), ("seed", 2**32)])
def test_xor_posterior_refuses(monkeypatch, capsys, option, value):
    monkeypatch.setattr(sys, "argv", ["xor_posterior.py", f"--{option}={value}"])
    with pytest.raises(SystemExit) as stop:
        load("xor_posterior").main()
    assert stop.value.code == 2
    assert re.search(rf"error: --{option} must .*, got {value}", capsys.readouterr().err)


def test_spin_glass_is_interrupted_in_one_line(tmp_path):
    arguments = ("--size=8", "--reads=1000", "--sweeps=1000000", f"--folder={tmp_path}")
    with subprocess.Popen(
        [sys.executable, "-u", str(EXAMPLES / "spin_glass.py"), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "interrupted\n"
