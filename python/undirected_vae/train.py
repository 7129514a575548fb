# SPDX-License-Identifier: Apache-2.0
"""The training loop.

A step depends on nothing but the checkpoint's state and the step's number, so that resuming continues bit for bit.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from .data import Dataset, augment, binarise
from .runs import Run, RunError
from .vae import VAE


class Interrupted(Exception):
    """Ctrl-C: the step was finished and a checkpoint saved."""


def train(run: Run, data: Dataset, resume: bool = False) -> VAE:
    """Trains until the run's last step; returns the model to evaluate. Ctrl-C: a checkpoint, then Interrupted."""
    config = run.config
    if len(data.train) < config.batch_size:
        raise RunError(f"batch_size: expected at most the {len(data.train)} training images, got {config.batch_size}")
    torch.manual_seed(config.seed)
    model = VAE(config, data.mean(), len(data.train))
    average = AveragedModel(model, multi_avg_fn=_moving_average(config.average)) if config.average else None
    optimizer = torch.optim.Adam(
        _parameter_groups(model, config.weight_decay), lr=config.learning_rate, eps=config.adam_eps, fused=True
    )
    start = 0
    if resume:
        start = _restore(run, model, average, optimizer)
        if start > config.steps:
            raise RunError(f"steps: expected at least {start}, which {run.path} has done, got {config.steps}")
        run.save_config()
        run.write_metrics([line for line in run.read_metrics() if line["step"] <= start])

    def save(step: int) -> int:
        averaged = average.module.state_dict() if average else None
        return run.save_checkpoint(
            {"step": step, "model": model.state_dict(), "average": averaged, "optimizer": optimizer.state_dict()}
        )

    # The first checkpoint tells of an unwritable folder or a full disk before training starts. Adam's moments come to
    # it later, and the old checkpoint stays while a new one is written.
    size = save(start)
    run.check_space(2 * (size + 2 * sum(p.numel() * p.element_size() for p in model.parameters())) + 20_000_000)

    validation = data.binary("validation", 200, config.data_seed)
    evaluated: VAE = average.module if average else model  # type: ignore[assignment]
    steps_per_epoch = len(data.train) // config.batch_size
    order, order_epoch = torch.empty(0), -1
    interval = 0.5 if sys.stderr.isatty() else 10
    with (
        _metrics(run, start) as write,
        _ctrl_c() as interrupted,
        tqdm(total=config.steps, initial=start, unit="step", dynamic_ncols=True, mininterval=interval) as progress,
    ):
        began = time.perf_counter()
        for step in range(start, config.steps):
            with _divergence(step):
                epoch, position = divmod(step, steps_per_epoch)
                if epoch != order_epoch:
                    order, order_epoch = (
                        torch.randperm(len(data.train), generator=_generator(config.seed, -1 - epoch)),
                        epoch,
                    )
                index = order[position * config.batch_size : (position + 1) * config.batch_size]

                torch.manual_seed(_step_seed(config.seed, step))
                # Less and less augmentation: the last steps see images as they are.
                strength = config.augment * (1 - step / config.steps)
                images = binarise(augment(data.train[index], data.shape, strength))
                rate = config.learning_rate * learning_rate(config.schedule, step / config.steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                model.train()
                terms = model(images, index, kl_weight(config.kl_warmup, step / config.steps))
                optimizer.zero_grad(set_to_none=True)
                terms.loss.backward()
                if not math.isfinite(terms.loss.item()):
                    raise ValueError(f"the loss became {terms.loss.item()}")
                optimizer.step()
                if average:
                    average.update_parameters(model)

                done = step + 1
                if done % config.log_every == 0 or done in (1, config.steps):
                    _require_finite(model)
                    line = {"step": done, "reconstruction": terms.reconstruction.mean().item(), "learning_rate": rate}
                    line |= _elbo(model, images, "elbo", "log_partition")
                    if done % config.validate_every == 0 or done in (1, config.steps):
                        line |= _elbo(evaluated, validation, "validation_elbo", "validation_log_partition")
                    # The only value in a line that differs between two runs of the same settings.
                    line["steps_per_second"] = (done - start) / (time.perf_counter() - began)
                    write(line)
                    progress.set_postfix_str(f"ELBO {line['elbo']:.2f}", refresh=False)
                progress.update()
                stop = interrupted()
                if done % config.checkpoint_every == 0 or done == config.steps or stop:
                    _require_finite(model)
                    save(done)
                if stop:
                    break
    return evaluated.eval()


def learning_rate(schedule: str, progress: float) -> float:
    """The factor of the base rate when this part of the training is done."""
    if schedule == "cosine":
        return min(1.0, 0.1 + progress / 0.02) * 0.5 * (1 + math.cos(math.pi * progress))
    for end, factor in ((0.02, 0.1), (0.6, 1.0), (0.75, 1 / 3), (0.95, 0.1)):
        if progress < end:
            return factor
    return 1 / 33


def kl_weight(warmup: float, progress: float) -> float:
    return min(1.0, progress / warmup) if warmup else 1.0


def _step_seed(seed: int, step: int) -> int:
    # PyTorch's CPU generator reads 32 bits of a seed. This keeps a run's steps apart, and runs far from each other.
    return (seed * 0x9E3779B1 + step) % 2**32


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(_step_seed(seed, step))


def _elbo(model: VAE, images: Tensor, name: str, partition_name: str) -> dict[str, float]:
    """The ELBO of binary samples, by short AIS: log Z of the prior and of the posterior come out a little low."""
    was_training = model.training
    model.eval()
    log_partition, _ = model.prior_log_partition(64, 1000)
    values = model.elbo(images, log_partition, num_samples=8)
    model.train(was_training)
    return {name: values.mean().item(), partition_name: log_partition}


def _require_finite(model: VAE) -> None:
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise ValueError("a parameter is not finite")


def _parameter_groups(model: VAE, weight_decay: float) -> list[dict[str, Any]]:
    """L2 on weight matrices and couplings, none on biases and normalisation."""
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        # The couplings of a graph are one number per edge.
        (decayed if parameter.dim() >= 2 or name.endswith("coupling") else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _moving_average(decay: float) -> Any:
    def update(averaged: Any, current: Any, count: Tensor) -> None:
        # At first a plain mean: a fixed decay would keep the random start for long.
        torch._foreach_lerp_(averaged, current, 1 - min(decay, float(count / (count + 10))))

    return update


def _restore(run: Run, model: VAE, average: AveragedModel | None, optimizer: torch.optim.Optimizer) -> int:
    state = run.load_checkpoint()
    with run.fitting():
        model.load_state_dict(state["model"])
        if average:
            # A run that kept no average starts one here.
            average.module.load_state_dict(state["average"] or state["model"])
            average.n_averaged.fill_(state["step"])
        optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


@contextmanager
def _metrics(run: Run, start: int) -> Iterator[Any]:
    """A function that appends a line to metrics.jsonl and to TensorBoard's events."""
    from torch.utils.tensorboard import SummaryWriter

    with (
        run.writing(),
        open(run.metrics_path, "a") as file,
        SummaryWriter(str(run.path), purge_step=start + 1 if start else None) as events,
    ):

        def write(line: dict[str, float]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()
            for name, value in line.items():
                if name != "step":
                    events.add_scalar(name, value, line["step"])

        yield write


@contextmanager
def _divergence(step: int) -> Iterator[None]:
    """The samplers refuse parameters that are not finite."""
    try:
        yield
    except ValueError as error:
        raise RunError(f"training diverged at step {step} ({error}); a smaller learning_rate may help") from error


@contextmanager
def _ctrl_c() -> Iterator[Any]:
    """Ctrl-C (or SIGTERM) is asked for between steps, so that no step is left half done; a second one stops at once.

    Raises Interrupted at the end, also when that was the last step.
    """
    received = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal received
        if received:
            raise KeyboardInterrupt
        received = True

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield lambda: received
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)
    if received:
        raise Interrupted
