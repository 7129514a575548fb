# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation in several processes are those of one: the same chains, the same numbers but for rounding."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import deviceless
import many
import pytest
import torch
from support import assert_close, assert_same_bits
from torch import nn

pytest.importorskip("mlxtend")
pytest.importorskip("tensorboard")
from torch.distributed.run import get_args_parser

from undirected_vae import train as train_module
from undirected_vae.__main__ import main, parser
from undirected_vae.processes import share_batch_norms
from undirected_vae.train import Trainer

ROOT = Path(__file__).parents[2]
# Shares of 8 images and 21 chains differ.
KINDS = (
    "undirected-bipartite-per_sample",
    "chimera-bipartite-low_rank",
    "directed-chimera-shared",
    "groups",
    "samples",
    "structured",
)
STEPS = 6


def config_of(name: str) -> Any:
    return deviceless.CONFIGS[name].replace({"batch_size": 7, "prior_chains": 21, "average": 0.9, "steps": 50})


def trained(name: str, start: Any = None, steps: int = STEPS, fault: str = "") -> Any:
    """The state after some steps, from the start or from a state."""
    torch.manual_seed(0)
    data = deviceless.images()
    if fault == "batch norm":
        train_module.share_batch_norms = lambda model: None
    trainer = Trainer(config_of(name), data, torch.device("cpu"))
    if fault == "chains":
        trainer._share_chains = lambda index: None  # type: ignore[method-assign]
    if start:
        trainer.load_state_dict(start)
    trainer.advance(steps)
    trainer.finish()
    return trainer.state_dict()


def chains_of(state: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state["model"].items() if name.endswith("chains.bits")}


def assert_same_training(actual: Any, expected: Any) -> None:
    assert actual["step"] == expected["step"]
    assert_same_bits(list(chains_of(actual).values()), list(chains_of(expected).values()))
    for part in ("model", "average"):
        assert actual[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            assert_close(actual[part][name], value, 1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_train_as_one(name: str) -> None:
    one = trained(name)
    two = many.run(2, trained, name)
    config = config_of(name)
    assert len(chains_of(one)) == (config.posterior != "directed") + (config.task == "density")
    for state in two:
        assert_same_training(state, one)
    # All of them hold the same to the bit, and go on with another number of them.
    for part in ("model", "average"):
        assert_same_bits(list(two[1][part].values()), list(two[0][part].values()))
    if name == KINDS[0]:
        longer = trained(name, steps=2 * STEPS)
        assert_same_training(trained(name, two[0]), longer)
        assert_same_training(many.run(3, trained, name, one)[2], longer)


@pytest.mark.parametrize("fault", ["batch norm", "chains"])
def test_planted_faults_of_processes_are_noticed(fault: str) -> None:
    one, two = trained(KINDS[0]), many.run(2, trained, KINDS[0], None, STEPS, fault)
    with pytest.raises(AssertionError):
        assert_same_training(two[1], one)


def dropped() -> torch.Tensor:
    """Which features of the last layer a step has dropped."""
    config = config_of(KINDS[0]).replace({"dropout": 0.5})
    trainer = Trainer(config, deviceless.images(), torch.device("cpu"))
    masks = []
    trainer.model.encoder.register_forward_hook(lambda module, inputs, output: masks.append(output.detach() == 0))
    trainer.advance(1)
    return masks[0][:3]


def test_each_process_drops_features_of_its_own() -> None:
    first, second = many.run(2, dropped)
    assert first.any()
    assert not first.equal(second)


def normalised(shared: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    norm, values, grads = (
        nn.BatchNorm1d(5, eps=1e-2, momentum=0.1),
        torch.randn(7, 5).requires_grad_(),
        torch.randn(7, 5),
    )
    mine = slice(0, 7)
    if shared:
        share_batch_norms(norm)
        mine = (slice(0, 3), slice(3, 7))[torch.distributed.get_rank()]
    out = norm(values[mine])
    out.backward(grads[mine])
    parameters = torch.stack([p.grad for p in norm.parameters() if p.grad is not None])
    if shared:
        torch.distributed.all_reduce(parameters)
    assert values.grad is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    evaluated = norm.eval()(values).detach()
    return [out.detach(), values.grad[mine], parameters, norm.running_mean, norm.running_var, evaluated]


def test_shared_batch_normalisation_is_that_of_the_whole_batch() -> None:
    out, grad, *rest = normalised(False)
    results = many.run(2, normalised, True)
    assert_close(torch.cat([result[0] for result in results]), out, 1e-6)
    assert_close(torch.cat([result[1] for result in results]), grad, 1e-6)
    for result in results:
        for actual, expected in zip(result[2:], rest, strict=True):
            assert_close(actual, expected, 1e-6)


# torchrun, as README has it ---------------------------------------------------------------------------------------


def test_torchrun_takes_no_flag_for_its_own() -> None:
    """Its parser looks at the program's flags too, and takes the beginning of one of its own for that."""
    own = [flag for action in get_args_parser()._actions for flag in action.option_strings]
    (commands,) = (action for action in parser()._actions if action.dest == "command")
    assert isinstance(commands.choices, dict)
    for command in commands.choices.values():
        for action in command._actions:
            clear = [f for f in action.option_strings if f in ("-h", "--help") or not any(o.startswith(f) for o in own)]
            assert clear or not action.option_strings, action.option_strings


SMALL = {
    "--left": 12, "--right": 8, "--encoder": 32, "--decoder": 32, "--prior-chains": 51, "--prior-sweeps": 2,
    "--posterior-sweeps": 2, "--samples": 60, "--posterior-betas": 20, "--prior-betas": 200,
    "--prior-ais-chains": 50, "--test-images": 40,
}  # fmt: skip
SMALL = [str(word) for pair in SMALL.items() for word in pair]


def torchrun(*words: object, wait: bool = True) -> "subprocess.Popen[str]":
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), *sys.path])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*command, "-m", "undirected_vae", *map(str, words)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if wait:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        process.stdout_text = out  # type: ignore[attr-defined]
    return process


def results_of(path: Path) -> Any:
    result = json.loads((path / "evaluation.json").read_text())
    return result, torch.tensor(result["log_likelihood"])


def test_torchrun_trains_and_evaluates_as_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    process = torchrun("train", "--folder", two, "--steps", 12, "--log-every", 6, "--checkpoint-every", 5, *SMALL)
    assert process.stdout_text.count("test NLL") == 1  # type: ignore[attr-defined]
    assert main(["train", "--run", str(one), "--steps", "12", "--log-every", "6", *SMALL, "--device", "cpu"]) == 0
    assert [json.loads(line)["step"] for line in (two / "metrics.jsonl").read_text().splitlines()] == [1, 6, 12]
    assert {path.name for path in two.iterdir()} >= {"samples.png", "reconstructions.png", "curves.png"}
    assert not list(two.glob(".*.tmp"))
    (result, values), (expected, others) = results_of(two), results_of(one)
    assert result["fingerprint"] == expected["fingerprint"]
    assert abs(result["log_partition"] - expected["log_partition"]) < 1e-3
    assert (values - others).abs().max() < 0.1
    # The same checkpoint, evaluated by two and by one: the same samples.
    (two / "evaluation.json").rename(two / "by_two.json")
    assert main(["evaluate", str(two), "--device", "cpu"]) == 0
    (again, values_again), (by_two) = results_of(two), json.loads((two / "by_two.json").read_text())
    assert abs(again["log_partition"] - by_two["log_partition"]) < 1e-9
    assert (values_again - torch.tensor(by_two["log_likelihood"])).abs().max() < 2e-3
    capsys.readouterr()


def test_ctrl_c_under_torchrun_saves_a_checkpoint_that_one_process_goes_on_from(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = torchrun("train", "--folder", run, "--steps", 100_000, "--no-evaluate", *SMALL, wait=False)
    deadline = time.monotonic() + 120
    lines = run / "metrics.jsonl"
    while not (lines.exists() and '"step": 100,' in lines.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "interrupted; the checkpoint is saved" in err
    step = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert step >= 100
    assert main(["train", "--resume", str(run), "--steps", str(step + 3), "--no-evaluate", "--device", "cpu"]) == 0
