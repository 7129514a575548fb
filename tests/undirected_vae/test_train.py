# SPDX-License-Identifier: Apache-2.0
"""Training as a user runs it: it learns, resumes bit for bit after a kill, and says what is wrong before it starts."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mlxtend")
pytest.importorskip("tensorboard")
import gibbs_ext as gx
from undirected_vae.__main__ import main
from undirected_vae.config import ConfigError, resolve
from undirected_vae.processes import find_device
from undirected_vae.runs import Run, RunError, atomic_write, new_folder
from undirected_vae.train import _parameter_groups
from undirected_vae.vae import VAE

ROOT = Path(__file__).parents[2]
SMALL = {
    "--left": 12, "--right": 8, "--encoder": 32, "--decoder": 32, "--prior-chains": 50, "--prior-sweeps": 2,
    "--posterior-sweeps": 2, "--learning-rate": 3e-2, "--schedule": "cosine", "--kl-warmup": 0.1, "--average": 0.9,
    "--samples": 50, "--posterior-betas": 20, "--prior-betas": 200, "--prior-ais-chains": 50, "--test-images": 40,
}  # fmt: skip
SMALL = [str(word) for pair in SMALL.items() for word in pair]
# 24 latents; 12 on the right too, for a bipartite machine beside it.
CHIMERA = ("--chimera-rows", 1, "--chimera-cols", 3, "--right", 12)
IMPROVEMENT = 20  # nats, in 200 steps


def train(path, *flags):
    return main(["train", "--run", str(path), "--no-evaluate", *SMALL, *map(str, flags)])


def metrics(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "flags",
    [
        ("--coupling", "shared"),
        ("--coupling", "per_sample"),
        ("--coupling", "low_rank"),
        ("--posterior", "directed"),
        ("--posterior", "directed", "--relaxation", "concrete", "--sharpness", 10),
        ("--posterior", "chimera", "--prior", "chimera", "--coupling", "shared", *CHIMERA),
        ("--posterior", "chimera", "--prior", "chimera", "--coupling", "per_sample", *CHIMERA),
        ("--posterior", "chimera", "--prior", "bipartite", "--coupling", "low_rank", *CHIMERA),
        ("--posterior", "undirected", "--prior", "chimera", *CHIMERA),
        ("--posterior", "directed", "--prior", "chimera", *CHIMERA),
    ],
    ids=lambda flags: "-".join(map(str, flags[1:6:2])),
)
def test_200_steps_improve_the_elbo(tmp_path, flags):
    assert train(tmp_path / "run", "--steps", 200, "--log-every", 100, *flags) == 0
    lines = metrics(tmp_path / "run")
    gain = lines[-1]["validation_elbo"] - lines[0]["validation_elbo"]
    assert [line["step"] for line in lines] == [1, 100, 200]
    assert gain > IMPROVEMENT


def test_planted_fault_without_learning_the_elbo_does_not_improve(tmp_path):
    flags = ("--steps", 200, "--log-every", 100, "--learning-rate", 0)
    assert train(tmp_path / "run", *flags) == 0
    lines = metrics(tmp_path / "run")
    assert lines[-1]["validation_elbo"] - lines[0]["validation_elbo"] < IMPROVEMENT / 2


# Kill, Ctrl-C, resume -----------------------------------------------------------------------------------------------

LONG = ("--steps", 240, "--log-every", 8, "--checkpoint-every", 7)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "uninterrupted"
    torch.set_num_threads(1)
    assert train(path, *LONG) == 0
    return path


# Each file takes 20 ms to write, so that many a random moment is one in which a temporary file exists.
PROGRAM = """
import os, sys, time
from undirected_vae.__main__ import main
fsync = os.fsync
os.fsync = lambda file: (fsync(file), time.sleep(0.02))
sys.exit(main())
"""


def interrupt(path, number, step, *, resume=False, delay=0.0, writing=False):
    """Starts the same training in a process of its own and sends it a signal once it has reached this step.

    Args:
        delay: seconds from then to the signal.
        writing: then wait until a checkpoint is being written.
    """
    flags = ["--resume", path] if resume else ["--run", path, *SMALL, *LONG]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), *sys.path]),
    }
    command = [sys.executable, "-c", PROGRAM, "train", "--no-evaluate", *map(str, flags)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    pattern = re.compile(r'"step": (\d+), .*}\n')
    lines = path / "metrics.jsonl"

    def ready():
        reached = pattern.findall(lines.read_text()) if lines.exists() else []
        return reached and int(reached[-1]) >= step and (not writing or any(path.glob(".checkpoint.pt.*")))

    while process.poll() is None and not ready():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(number)  # does nothing if the process has ended
    return process.wait(timeout=60), process.stderr.read()


def same_state(first, second, path=""):
    """The first difference between two checkpoints, or None."""
    if isinstance(first, torch.Tensor):
        return None if first.dtype == second.dtype and torch.equal(first, second) else path
    if isinstance(first, (dict, list)):
        keys = first.keys() if isinstance(first, dict) else range(len(first))
        if len(first) != len(second):
            return path
        return next((d for k in keys if (d := same_state(first[k], second[k], f"{path}.{k}"))), None)
    return None if first == second else path


def assert_same_run(path, other):
    assert same_state(Run.open(path).load_checkpoint(), Run.open(other).load_checkpoint()) is None
    keep = [[{k: v for k, v in line.items() if k != "steps_per_second"} for line in metrics(p)] for p in (path, other)]
    assert keep[0] == keep[1]


def test_kills_at_random_moments_then_resume_equals_uninterrupted(tmp_path, uninterrupted):
    path, rng = tmp_path / "run", random.Random(int(os.environ.get("GIBBS_TEST_SEED", "0")))
    moments = (
        {"step": rng.randint(8, 60), "delay": rng.uniform(0, 0.05)},
        {"step": rng.randint(61, 120), "writing": True, "resume": True},
    )
    for moment in moments:
        print("kill at", moment)
        status, text = interrupt(path, signal.SIGKILL, **moment)
        assert status in (-signal.SIGKILL, 0), text  # 0: on a slow machine training was over first
        print("leaves", sorted(p.name for p in path.glob(".*")), "and step", Run.open(path).load_checkpoint()["step"])
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9')  # as a kill amid a write leaves it
    (path / ".checkpoint.pt.1.tmp").write_bytes(b"half a checkpoint")
    assert main(["train", "--resume", str(path), "--no-evaluate"]) == 0
    assert not list(path.glob(".*"))
    assert_same_run(path, uninterrupted)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "stopped"
    return path, *interrupt(path, signal.SIGINT, 24)


def test_ctrl_c_saves_a_checkpoint_and_leaves(tmp_path, stopped, uninterrupted):
    path, status, text = stopped
    assert status == 130
    assert f"train --resume {path}" in text
    assert "Traceback" not in text
    shutil.copytree(path, tmp_path / "run")
    assert 24 <= Run.open(tmp_path / "run").load_checkpoint()["step"] < 240
    assert main(["train", "--resume", str(tmp_path / "run"), "--no-evaluate"]) == 0
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    "kind",
    [
        ("--posterior", "chimera", "--prior", "chimera", *CHIMERA),
        ("--posterior", "chimera", "--prior", "bipartite", *CHIMERA),
        ("--coupling", "none"),
        ("--posterior", "directed", "--groups", 3),
        ("--posterior", "directed", "--relaxation", "power_function", "--sharpness", 30),
        ("--coupling", "per_sample", "--train-samples", 2),
        ("--task", "structured", "--coupling", "low_rank", "--train-samples", 2),
        ("--task", "structured", "--posterior", "directed", "--groups", 2),
    ],
)
def test_resume_of_every_kind_of_model_equals_uninterrupted(tmp_path, monkeypatch, kind):
    flags = [*kind, "--steps", 16, "--log-every", 4]
    assert train(tmp_path / "whole", *flags) == 0
    save = Run.save_checkpoint

    def interrupted_save(run, state):
        if state["step"] == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return save(run, state)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_checkpoint", interrupted_save)
        assert train(tmp_path / "run", *flags, "--checkpoint-every", 7) == 130
    assert Run.open(tmp_path / "run").load_checkpoint()["step"] in (7, 8)
    assert main(["train", "--resume", str(tmp_path / "run"), "--no-evaluate"]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_sigterm_saves_a_checkpoint_even_if_it_comes_several_times(tmp_path, monkeypatch, capsys):
    """As it does from a parent that is killed, once for each of its threads."""
    save = Run.save_checkpoint

    def killed_save(run, state):
        if state["step"] == 7:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
        return save(run, state)

    monkeypatch.setattr(Run, "save_checkpoint", killed_save)
    assert train(tmp_path / "run", "--steps", 16, "--checkpoint-every", 7) == 130
    assert "interrupted; the checkpoint is saved" in capsys.readouterr().err
    assert Run.open(tmp_path / "run").load_checkpoint()["step"] in (7, 8)


def test_ctrl_c_during_the_last_step_is_heeded(tmp_path, monkeypatch):
    save = Run.save_checkpoint

    def interrupted_save(run, state):
        if state["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return save(run, state)

    monkeypatch.setattr(Run, "save_checkpoint", interrupted_save)
    assert main(["train", "--run", str(tmp_path / "run"), *SMALL, "--steps", "3"]) == 130
    assert Run.open(tmp_path / "run").load_checkpoint()["step"] == 3
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_planted_fault_a_resume_that_forgets_the_chains_is_noticed(tmp_path, stopped, uninterrupted):
    shutil.copytree(stopped[0], tmp_path / "run")
    run = Run.open(tmp_path / "run")
    state = run.load_checkpoint()
    state["model"]["prior.chains.bits"].zero_()
    run.save_checkpoint(state)
    assert main(["train", "--resume", str(tmp_path / "run"), "--no-evaluate"]) == 0
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "run", uninterrupted)


def test_resume_for_longer_and_a_run_is_not_overwritten(tmp_path, uninterrupted, capsys):
    shutil.copytree(uninterrupted, tmp_path / "run")
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "250", "--no-evaluate"]) == 0
    assert Run.open(tmp_path / "run").load_checkpoint()["step"] == 250
    assert Run.open(tmp_path / "run").config.steps == 250
    assert train(tmp_path / "run") == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path / "run"), "--left", "13"]) == 2
    assert "does not fit" in capsys.readouterr().err
    assert Run.open(tmp_path / "run").config.left == 12


def test_resume_can_start_an_average(tmp_path):
    assert train(tmp_path / "run", "--steps", 3, "--average", 0) == 0
    assert main(["train", "--resume", str(tmp_path / "run"), "--average", "0.9", "--no-evaluate"]) == 0
    state = Run.open(tmp_path / "run").load_checkpoint()
    # All but the chains.
    assert {name.split(".")[-2] for name in state["model"].keys() - state["average"].keys()} == {"chains"}
    assert same_state(state["average"], {name: state["model"][name] for name in state["average"]}) is None
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "5", "--no-evaluate"]) == 0


def test_resume_is_refused_where_it_makes_no_sense(tmp_path, uninterrupted, capsys):
    shutil.copytree(uninterrupted, tmp_path / "run")
    for flags, message in (
        (["--steps", "2"], "steps: expected at least 240"),
        (["--data", "other.npy"], "a run cannot be resumed on other images"),
        (["--data-seed", "1"], "a run cannot be resumed on other images"),
    ):
        assert main(["train", "--resume", str(tmp_path / "run"), *flags]) == 2
        assert message in one_error(capsys)
    assert Run.open(tmp_path / "run").config == Run.open(uninterrupted).config


def test_one_process_at_a_time_trains_in_a_folder(tmp_path, uninterrupted, capsys):
    shutil.copytree(uninterrupted, tmp_path / "old")
    for path, flags in ((tmp_path / "new", ["--run"]), (tmp_path / "old", ["--resume"])):
        with Run(path, None).lock():
            before = sorted(path.iterdir())
            assert main(["train", *flags, str(path), "--steps", "250"]) == 2
            assert f"{path}: another process is training there" in one_error(capsys)
            assert sorted(path.iterdir()) == before
    assert train(tmp_path / "new", "--steps", 2) == 0
    assert [new_folder(tmp_path / "runs" / "name").name for _ in range(3)] == ["name", "name-2", "name-3"]


def test_data_of_a_relative_path_is_found_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", np.random.default_rng(0).random((300, 4, 4)) < 0.5)
    assert train("run", "--data", "images.npy", "--steps", 2, "--batch-size", 20) == 0
    monkeypatch.chdir("elsewhere")
    assert main(["evaluate", "../run"]) == 0


# Faults -------------------------------------------------------------------------------------------------------------


def one_error(capsys):
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    return error[0]


def test_unwritable_folder_is_reported_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")  # a folder cannot be made in it, whoever asks
    assert train(tmp_path / "file" / "run") == 2
    assert f"{tmp_path / 'file' / 'run'}: the run folder cannot be written" in one_error(capsys)


def test_full_disk_is_reported_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    assert train(tmp_path / "run") == 2
    assert re.search(r"run: the disk is full: training needs about \d+ MB there, 1 MB are free", one_error(capsys))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    atomic_write(tmp_path / "checkpoint.pt", b"old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    run = Run(tmp_path, None)
    with pytest.raises(RunError, match=r"checkpoint\.pt: the checkpoint cannot be written \(the disk is full\)"):
        run.save_checkpoint({"step": 0})
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_evaluation_that_cannot_be_saved_is_told(tmp_path, uninterrupted, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)

    def read_only(source, target):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", read_only)
    assert main(["evaluate", str(run)]) == 2
    error = one_error(capsys)
    path = run / "evaluation.json"
    assert f"{path}: the evaluation cannot be saved (Read-only file system); it is: test NLL" in error
    assert not path.exists()


def test_files_respect_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-1000]), id="truncated"),
        pytest.param(lambda path: path.write_bytes(b"not a checkpoint"), id="other bytes"),
        pytest.param(lambda path: torch.save({"step": 1}, path), id="keys missing"),
        pytest.param(lambda path: torch.save({"step": Bomb()}, path), id="code"),
        pytest.param(lambda path: path.unlink(), id="missing"),
        pytest.param(lambda path: torch.save(torch.load(path) | {"step": "x"}, path), id="step is text"),
        pytest.param(lambda path: torch.save(torch.load(path) | {"model": [1]}, path), id="model is a list"),
        pytest.param(lambda path: torch.save(torch.load(path) | {"model": {}, "average": None}, path), id="no model"),
    ],
)
def test_bad_checkpoint(tmp_path, uninterrupted, capsys, damage, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(uninterrupted, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoint.pt")
    for command in (["train", "--resume"], ["evaluate"], ["sample"], ["info"]):
        assert main([*command, str(tmp_path / "run")]) == 2
        assert "checkpoint.pt" in one_error(capsys)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"[1]\n", b'{"step": 1}\n', b"\xff\n", b'{"step": 1, "elbo": "x"}\n', b"{\n{}\n"])
def test_bad_metrics(tmp_path, uninterrupted, capsys, content):
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_bytes(content)
    for command in (["train", "--resume"], ["sample"]):
        assert main([*command, str(tmp_path / "run")]) == 2
        assert "metrics.jsonl: damaged" in one_error(capsys)


@pytest.mark.parametrize("content", ["", "{}", '{"split": ', "[]"])
def test_bad_evaluation(tmp_path, uninterrupted, capsys, content):
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run" / "evaluation.json").write_text(content)
    assert main(["info", str(tmp_path / "run")]) == 2
    assert "evaluation.json: damaged" in one_error(capsys)
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert main(["info", str(tmp_path / "run")]) == 0


def test_divergence_is_one_error_and_leaves_a_sound_checkpoint(tmp_path, capsys):
    flags = ("--learning-rate", 1e30, "--steps", 50)
    for name, more in (("logged", ("--log-every", 1)), ("saved", ("--checkpoint-every", 1)), ("neither", ())):
        assert train(tmp_path / name, *flags, *more) == 3
        assert re.search(r"training diverged at step \d+ \(.*\); a smaller learning_rate may help", one_error(capsys))
        model = Run.open(tmp_path / name).load_checkpoint()["model"]
        assert all(value.isfinite().all() for value in model.values())


def test_bad_input_is_one_error(tmp_path, uninterrupted, capsys):
    for argv, message in (
        (["sample", str(uninterrupted), "--count", "0"], "count: expected from 1 to 10000, got 0"),
        (["sample", str(uninterrupted), "--seed", str(2**70)], "seed: expected from 0 to"),
        (["sample", str(uninterrupted), "--seed", "-1"], "seed: expected from 0 to"),
        (["train", "--run", str(tmp_path / "a4"), "--learning-rate", "inf"], "learning_rate: expected a finite number"),
        (["train", "--run", str(tmp_path / "a5"), "--data-seed", str(2**70)], "data_seed: expected from 0 to"),
        (["train", "--run", str(tmp_path / "a6"), "--adam-eps", "0"], "adam_eps: expected at least 1e-12"),
        (["evaluate", str(tmp_path)], "no run there"),
        (["train", "--run", str(tmp_path / "a"), "--data", str(tmp_path / "b")], "no such file"),
        (["train", "--run", str(tmp_path / "a2"), "--steps", "0"], "steps: expected at least 1"),
        (["train", "--run", str(tmp_path / "a7"), "--prior", "chimera", "--left", "3"], "left, right: expected 100"),
        (["train", "--run", str(tmp_path / "a3"), "--batch-size", "5000"], "batch_size: expected at most"),
        (["sample", str(uninterrupted), "--device", "gpu"], "device: expected auto, cpu, cuda or cuda:i, got 'gpu'"),
        (["train", "--device", "meta"], "device: expected auto, cpu, cuda or cuda:i, got 'meta'"),
        (["train", "--device", "cpu:3"], "device: expected auto, cpu, cuda or cuda:i, got 'cpu:3'"),
    ):
        assert main(argv) == 2
        assert message in one_error(capsys)
    assert [path.name for path in tmp_path.iterdir()] == []  # no folder of a run that cannot be


@pytest.mark.parametrize(
    ("kernels", "gpus", "name", "found"),
    [
        ("loaded", 2, "auto", torch.device("cuda", 0)),
        ("loaded", 2, "cuda", torch.device("cuda", 0)),
        ("loaded", 2, "cuda:1", torch.device("cuda", 1)),
        ("loaded", 2, "cpu", torch.device("cpu")),
        ("loaded", 0, "auto", torch.device("cpu")),
        ("none were built", 2, "auto", torch.device("cpu")),
        ("none were built", 2, "cuda", "device: cuda needs gibbs_ext's CUDA kernels: none were built"),
        ("loaded", 0, "cuda:0", r"device: cuda:0 needs a GPU, PyTorch .* finds none"),
        ("loaded", 2, "cuda:2", r"device: expected a GPU below cuda:2, got cuda:2"),
    ],
)
def test_devices(kernels, gpus, name, found, monkeypatch):
    monkeypatch.setattr(gx, "build_info", lambda: {"cuda": kernels})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr("undirected_vae.processes._try_kernels", lambda device: None)
    if isinstance(found, str):
        with pytest.raises(ConfigError, match=f"^{found}$"):
            find_device(name)
        return
    assert find_device(name) == found
    assert chosen == ([found.index] if found.type == "cuda" else [])
    # Each of several processes has a GPU of its own, unless one is named.
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_device(name).index == (1 if name in ("auto", "cuda") and found.type == "cuda" else found.index)


def test_a_gpu_that_the_kernels_do_not_fit(monkeypatch, capsys):
    def fail(device):
        raise RuntimeError("cuda:0 is older than the oldest supported")

    monkeypatch.setattr(gx, "build_info", lambda: {"cuda": "loaded"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr("undirected_vae.processes._try_kernels", fail)
    assert find_device("auto") == torch.device("cpu")
    assert capsys.readouterr().err == (
        "on the CPU, as cuda:0 cannot be used: cuda:0 is older than the oldest supported\n"
    )
    with pytest.raises(ConfigError, match=r"^device: cuda:0 cannot be used: cuda:0 is older"):
        find_device("cuda")


def test_compile_is_for_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr("undirected_vae.__main__.find_device", lambda name: torch.device("cuda", 0))
    assert main(["train", "--compile"]) == 2
    assert "compile: expected a run on the CPU in one process" in one_error(capsys)


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "undirected_vae.train", None)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(["train", "--run", str(tmp_path / "run")]) == 1
    error = one_error(capsys)
    assert re.search(r"^error: the package \S+ is not installed; pip install .*'\.\[train\]'", error)


# The whole program --------------------------------------------------------------------------------------------------


def test_train_evaluate_sample_info_against(tmp_path, uninterrupted, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(uninterrupted, "undirected")
    assert main(["train", *SMALL, "--steps", "20", "--posterior", "directed"]) == 0
    directed = Path("runs/directed-12x8")
    output = capsys.readouterr().out
    assert re.search(r"test NLL [\d.]+ \+- [\d.]+ nats", output)
    for name in ("samples.png", "reconstructions.png", "curves.png"):
        assert str(directed / name) in output
        assert (directed / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert list(directed.glob("events.out.tfevents*"))

    full = (directed / "evaluation.json").read_text()
    assert main(["evaluate", "undirected", "--against", str(directed), "--test-images", "30"]) == 0
    paired = re.search(r"paired: ([+-][\d.]+) \+- ([\d.]+) \(30 images\)", capsys.readouterr().out)
    first, second = (json.loads((p / "evaluation.json").read_text()) for p in (Path("undirected"), directed))
    assert (first["images"], second["images"]) == (30, 40)
    # Pairing is what it is for: the digits' own spread cancels.
    assert float(paired[2]) < first["nll_standard_error"]

    # A smaller evaluation, or one for the sake of a comparison, does not replace the full one.
    assert (directed / "evaluation.json").read_text() == full
    assert main(["evaluate", str(directed), "--test-images", "30"]) == 0
    assert main(["evaluate", "undirected", "--against", str(directed), "--samples", "60"]) == 0
    assert (directed / "evaluation.json").read_text() == full
    assert json.loads(Path("undirected/evaluation.json").read_text())["settings"]["samples"] == 60

    capsys.readouterr()
    assert main(["evaluate", "undirected", "--against", str(directed)]) == 0
    output = capsys.readouterr().out
    paired = re.search(r"paired: ([+-][\d.]+) \+- ([\d.]+) \(40 images\)", output)
    assert (directed / "evaluation.json").read_text() == full  # used as it is
    first = json.loads(Path("undirected/evaluation.json").read_text())
    difference = torch.tensor(second["log_likelihood"]) - torch.tensor(first["log_likelihood"])
    assert abs(float(paired[1]) - difference.mean().item()) < 0.006
    assert abs(float(paired[2]) - difference.std().item() / 40**0.5) < 0.006
    loose = max(first["looseness"], second["looseness"])
    assert ("ten times the looseness of a bound" in output) == (loose > abs(difference.mean().item()) / 10)
    change = torch.tensor(second["looseness_of_images"]) - torch.tensor(first["looseness_of_images"])
    assert len(change) == 25
    error = change.std().item() / 25**0.5
    assert f"Ten times the samples would change that by {change.mean():+.3f} +- {error:.3f}" in output

    assert main(["info", str(directed)]) == 0
    output = capsys.readouterr().out
    assert "step: 20" in output
    # Both directed networks: weights without biases + 2 per batch normalisation, heads with biases; the prior.
    encoder, decoder = 784 * 32 + 64 + 33 * 20, 20 * 32 + 64 + 33 * 784
    assert f"parameters: {encoder + decoder + 12 * 8 + 12 + 8}\n" in output
    assert "test NLL" in output
    assert "evaluated at" not in output
    assert main(["train", "--resume", str(directed), "--steps", "21", "--no-evaluate"]) == 0
    assert main(["info", str(directed)]) == 0
    assert "evaluated at step 20" in capsys.readouterr().out
    monkeypatch.setattr("undirected_vae.evaluate.evaluate", None)
    assert train("other", "--steps", 1, "--data-seed", 1) == 0
    assert main(["evaluate", "undirected", "--against", "other"]) == 2
    assert "runs are compared on the same images only" in one_error(capsys)
    assert main(["info"]) == 0
    assert "paper-mnist-200" in capsys.readouterr().out
    assert main(["sample", str(directed), "--count", "5"]) == 0


@pytest.mark.parametrize(
    ("flags", "name", "of_machines"),
    [
        # Edges of 1 x 3 cells of shore 4: 3 * 16 inside, 2 * 4 between. And biases.
        (("--posterior", "chimera", "--prior", "chimera"), "chimera-shared-chimera-1x3x4", 56 + 56 + 24),
        (("--posterior", "directed", "--prior", "chimera"), "directed-chimera-1x3x4", 56 + 24),
        (("--posterior", "chimera"), "chimera-shared-bipartite-1x3x4", 56 + 144 + 24),
    ],
)
def test_whole_program_on_a_chimera(tmp_path, capsys, monkeypatch, flags, name, of_machines):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chimera.yaml").write_text("chimera_rows: 1\nchimera_cols: 3\nleft: 12\nright: 12\n")
    arguments = [word for word in SMALL if word not in ("--left", "--right", "12", "8")]
    assert main(["train", *arguments, "--config", "chimera.yaml", "--steps", "20", *flags]) == 0
    path = Path("runs") / name
    output = capsys.readouterr().out
    assert re.search(r"test NLL [\d.]+ \+- [\d.]+ nats", output)
    assert str(path / "samples.png") in output
    assert main(["evaluate", str(path), "--test-images", "30"]) == 0
    assert main(["sample", str(path), "--count", "5"]) == 0
    assert main(["info", str(path)]) == 0
    networks = 784 * 32 + 64 + 33 * 24 + 24 * 32 + 64 + 33 * 784
    assert f"parameters: {networks + of_machines}\n" in capsys.readouterr().out
    assert main(["train", "--resume", str(path), "--steps", "21", "--chimera-rows", "2", "--left", "24",
                 "--right", "24"]) == 2  # fmt: skip
    assert "does not fit" in one_error(capsys)


def test_couplings_of_a_graph_decay_like_weights():
    config = resolve(flags={"posterior": "chimera", "prior": "chimera"})
    model = VAE(config, torch.full((9,), 0.5), 10)
    decayed, others = (group["params"] for group in _parameter_groups(model, 0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {"prior.coupling", "posterior.raw_coupling", "decoder.output.weight"} <= {names[id(p)] for p in decayed}
    assert {"prior.bias", "posterior.bias.bias"} <= {names[id(p)] for p in others}
    assert len(decayed) + len(others) == len(names)
