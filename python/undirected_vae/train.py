# SPDX-License-Identifier: Apache-2.0
"""The training loop.

A step depends only on the checkpoint's state and the step's number, so that a resumed run gives the same bits.
"""

from __future__ import annotations

import copy
import json
import math
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tqdm import tqdm

import gibbs_ext as gx

from .config import Config
from .data import Binariser, Dataset, augment
from .feed import Feed, step_seed
from .processes import any_of, share_batch_norms
from .products import fast_products
from .runs import Diverged, Run, RunError
from .vae import VAE, Terms

WARM_UP = 3  # number of steps before the capture: they allocate, compile and load, which a captured step may not
AGREE = 10  # number of steps on a GPU after which processes agree on whether to stop


class Interrupted(Exception):
    """Ctrl-C came; the step was finished and a checkpoint saved."""


class Trainer:
    """The state of a training run on its device, and its step.

    A step uses only tensors on the device and never waits for it: numbers that the host decides come from a
    :class:`Feed`. A GPU can therefore capture the step in a CUDA graph, and does so after a warm-up.

    The processes of gx.distributed share a step: each takes a part of the batch and of the prior's chains, and draws
    the random numbers that belong to these places in the whole. Every process keeps the whole model and the chains
    of all data points; the prior's chains are gathered for a checkpoint.

    Args:
        config: Settings of the run.
        data: Images of the run.
        device: Device to train on.
        capture: Whether to capture the step on a GPU; several processes never do.
    """

    def __init__(
        self,
        config: Config,
        data: Dataset,
        device: torch.device,
        *,
        capture: bool = True,
    ) -> None:
        self.config, self.device = config, device
        self.step = 0  # number of steps that are done
        torch.manual_seed(config.seed)
        with torch.device("cpu"):  # so that it starts from the same parameters on every device
            self.model = VAE(config, data.mean(), len(data.train)).to(device)
            self.average = VAE(config, data.mean(), len(data.train)).to(device) if config.average else None
        if self.average:
            _move_average(self.average.requires_grad_(False), self.model, torch.ones((), device=device))
        self.rate = torch.full((), config.learning_rate, device=device)
        self.optimizer = torch.optim.Adam(
            _parameter_groups(self.model, config.weight_decay),
            lr=config.learning_rate,
            eps=config.adam_eps,
            fused=True,
            capturable=device.type == "cuda",
        )
        self._settings = [
            {name: value for name, value in g.items() if name != "params"} for g in self.optimizer.param_groups
        ]
        self._apply_settings()
        self.shape = data.shape
        self.train_images = data.train.to(device)
        self.binarise = Binariser(self.train_images.shape[1], device)
        self.feed = Feed(config, len(data.train), device)
        self.images: Tensor  # this process's binary images of the last step
        self.terms: Terms

        self.batch = gx.distributed.share(config.batch_size)
        self.prior_part = gx.distributed.share(config.prior_chains)
        self._forward: nn.Module = self.model
        self._is_shared = gx.distributed.world_size() > 1
        if self._is_shared:
            share_batch_norms(self.model)
            device_ids = [device] if device.type == "cuda" else None
            self._forward = nn.parallel.DistributedDataParallel(self.model, device_ids=device_ids)
        self._captures = capture and device.type == "cuda" and not self._is_shared
        # A graph cannot be captured on the default stream, so all steps use a stream of their own if they are captured.
        self._stream = torch.cuda.Stream(device) if self._captures else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm_up = WARM_UP

    def advance(self, num_steps: int) -> None:
        """Makes `num_steps` further steps, without waiting for the device."""
        self.model.train()
        stream = self._stream
        if stream:
            stream.wait_stream(torch.cuda.current_stream(self.device))
        with fast_products(self.device), torch.cuda.stream(stream) if stream else nullcontext():
            for _ in range(num_steps):
                if self.config.dropout:  # all other random numbers have seeds of their own
                    # The masks differ from process to process.
                    seed = step_seed(self.config.seed, self.step) + 0x85EBCA6B * gx.distributed.rank()
                    torch.manual_seed(seed % 2**32)
                self.feed.prepare()
                self._run()
                self.step += 1
        if stream:
            torch.cuda.current_stream(self.device).wait_stream(stream)

    def _run(self) -> None:
        if not self._captures or self._warm_up:
            self._warm_up = max(0, self._warm_up - 1)
            self._make_step()
            return
        if not self._graph:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=self._stream):
                    self._make_step()
            except RuntimeError as error:
                raise RunError(f"the step cannot be captured in a CUDA graph; use --no-capture ({error})") from error
            self._graph = graph
        self._graph.replay()

    def _make_step(self) -> None:
        row = self.feed.take()
        self.rate.copy_(row.rate)
        index = row.indices[self.batch]
        gray = self.train_images.index_select(0, index)
        if row.noise.numel():
            gray = augment(gray, self.shape, row.noise[self.batch])
        self.images = self.binarise(gray, row.seeds[0], self.batch.start)
        terms: Terms = self._forward(
            self.images,
            index,
            row.weight,
            seeds=row.seeds[1:],
            first=self.batch.start,
            batch_size=self.config.batch_size,
            part=self.prior_part,
        )
        self.optimizer.zero_grad(set_to_none=True)
        # DistributedDataParallel takes the mean of gradients over processes, but their sum is needed.
        (gx.distributed.world_size() * terms.loss).backward()
        self.optimizer.step()
        self.terms = Terms(*(value.detach() for value in terms))
        if self.average:
            _move_average(self.average, self.model, row.average_weight)
        if self._is_shared:
            self._share_chains(row.indices)

    @torch.no_grad()
    def _share_chains(self, index: Tensor) -> None:
        """Gathers the chains of this batch in all processes, because any process may need any data point next."""
        chains = getattr(self.model.posterior, "chains", None)
        if chains is not None:
            mine = chains.bits.index_select(0, index[self.batch])
            chains.bits.index_copy_(0, index, gx.distributed.gather(mine, self.config.batch_size))

    def try_compile(self) -> None:
        """Times steps with and without torch.compile, restores the state and keeps the faster way."""
        before = copy.deepcopy(self.state_dict())
        ways: list[Any] = [self.model, torch.compile(self.model, dynamic=False)]
        times: list[list[float]] = [[], []]
        try:
            for _ in range(12):
                for way, seconds in zip(ways, times, strict=True):
                    self._forward = way
                    began = time.perf_counter()
                    self.advance(1)
                    seconds.append(time.perf_counter() - began)
        except Exception as error:  # compilers raise errors of many classes
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            tqdm.write(f"torch.compile cannot be used: {reason}", file=sys.stderr)
            self._forward = self.model
        else:
            eager, compiled = (statistics.median(seconds[2:]) for seconds in times)  # the first ones compile
            self._forward = ways[compiled < eager]
            kept = "kept" if compiled < eager else "not kept"
            tqdm.write(
                f"torch.compile: {compiled * 1e3:.1f} ms a step, {eager * 1e3:.1f} without: {kept}", file=sys.stderr
            )
        self.load_state_dict(before)

    def finish(self) -> None:
        """Waits for the steps. Raises ValueError if the loss or a parameter is not finite."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # raises faults of the machine as they are
            try:
                gx.synchronize(self.device)
            except RuntimeError as error:
                raise ValueError(str(error)) from error
        if not math.isfinite(self.terms.loss.item()):
            raise ValueError(f"the loss became {self.terms.loss.item()}")
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise ValueError("a parameter is not finite")

    @property
    def evaluated(self) -> VAE:
        """The model to evaluate, which has the averaged parameters if an average is kept."""
        return self.average or self.model

    # Checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state from which a run continues, on any device and in any number of processes. A collective call.

        Its tensors are on the CPU. If the run is on the CPU too, they are the run's own and change with the next step.
        """
        if self.model.prior:
            bits = self.model.prior.chains.bits
            bits.copy_(gx.distributed.gather(bits[self.prior_part], len(bits)))
        model, averaged = self.model.state_dict(), None
        if self.average:
            # Not its chains, which nothing moves, nor buffers that no state holds.
            named = dict(self.average.named_parameters()) | dict(self.average.named_buffers())
            averaged = {name: value for name, value in named.items() if name in model}
        state = {
            "step": self.step,
            "model": model,
            "average": averaged,
            "optimizer": self.optimizer.state_dict(),
        }
        on_cpu: dict[str, Any] = tree_map(lambda x: x.detach().cpu() if isinstance(x, Tensor) else x, state)
        return on_cpu

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state, whose tensors are copied."""
        # A captured step holds the optimizer's old tensors.
        self._graph, self._warm_up = None, WARM_UP
        self.model.load_state_dict(state["model"])
        if self.average:
            # A run that kept no average starts one here.
            self.average.load_state_dict(state["model"] | (state["average"] or {}))
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # load_state_dict would keep the tensors
        self._apply_settings()
        self.step = state["step"]
        self.feed.seek(self.step)

    def _apply_settings(self) -> None:
        """Gives the optimizer this run's settings instead of the checkpoint's, and the learning rate as a tensor."""
        for group, settings in zip(self.optimizer.param_groups, self._settings, strict=True):
            group.update(settings, lr=self.rate)


def train(
    run: Run,
    data: Dataset,
    resume: bool = False,
    device: torch.device | None = None,
    *,
    capture: bool = True,
    compile_model: bool = False,
) -> VAE:
    """Trains until the run's last step, and returns the model to evaluate.

    Processes share the work, and only the first one writes files.

    Raises:
        Interrupted: Ctrl-C came; a checkpoint was saved first.
        RunError: The training diverged, or the run's folder cannot be used.
    """
    config = run.config
    first = gx.distributed.rank() == 0
    device = device or torch.device("cpu")
    trainer = Trainer(config, data, device, capture=capture)
    if resume:
        state = run.load_checkpoint()
        with run.fitting():
            trainer.load_state_dict(state)
        if trainer.step > config.steps:
            raise RunError(f"steps: expected at least {trainer.step}, which {run.path} has done, got {config.steps}")
    start = trainer.step

    def save() -> int:
        state = trainer.state_dict()
        return run.save_checkpoint(state) if first else 0

    if first and resume:
        run.save_config()
        run.write_metrics([line for line in run.read_metrics() if line["step"] <= start])
    # The first checkpoint shows before training starts whether the folder can be written. Later ones are larger by
    # Adam's moments, and the old one stays while a new one is written.
    written = save()
    if first:
        moments = 2 * sum(p.numel() * p.element_size() for p in trainer.model.parameters())
        run.check_space(2 * (written + moments) + 20_000_000)

    if compile_model:
        trainer.try_compile()
    validation = data.binary("validation", 200, config.data_seed).to(device)
    interval = 0.5 if sys.stderr.isatty() else 10
    with (
        _metrics(run, start) if first else nullcontext() as write,
        _ctrl_c() as interrupted,
        tqdm(
            total=config.steps, initial=start, unit="step", dynamic_ncols=True, mininterval=interval, disable=not first
        ) as progress,
    ):
        began = time.perf_counter()
        stop = False
        while trainer.step < config.steps and not stop:
            # On the CPU, where steps are slow, each is made alone, so that Ctrl-C is obeyed at once.
            done = _next_pause(config, trainer.step, AGREE if device.type == "cuda" else 1)
            with _divergence(trainer.step):
                trainer.advance(done - trainer.step)
                logs = done % config.log_every == 0 or done in (1, config.steps)
                if logs:
                    trainer.finish()
                if logs and write:
                    line = _line(trainer, validation)
                    # The only value in a line that differs between two runs of the same settings.
                    line["steps_per_second"] = (done - start) / (time.perf_counter() - began)
                    write(line)
                    progress.set_postfix_str(f"ELBO {line['elbo']:.2f}", refresh=False)
                progress.update(done - progress.n)
                stop = any_of(interrupted(), device)
                if done % config.checkpoint_every == 0 or done == config.steps or stop:
                    trainer.finish()
                    save()
    if stop:  # another process was interrupted
        raise Interrupted
    return trainer.evaluated.eval()


def _next_pause(config: Config, step: int, most: int) -> int:
    """The number of steps after which metrics or a checkpoint are due, but at most ``most`` after ``step``."""
    regular = [(step // every + 1) * every for every in (config.log_every, config.checkpoint_every)]
    return 1 if step == 0 else min(step + most, config.steps, *regular)


def _line(trainer: Trainer, validation: Tensor) -> dict[str, float]:
    """The metrics of the last step, for this process's part of the batch."""
    config, done = trainer.config, trainer.step
    # These seeds are far from those that an evaluation makes of the run's seed.
    seed = (config.seed << 32) + (1 << 31) + 4 * done
    line = {
        "step": done,
        "reconstruction": trainer.terms.reconstruction.mean().item(),
        "learning_rate": trainer.rate.item(),
    }
    line |= _elbo(trainer.model, trainer.images, "elbo", "log_partition", seed)
    if done % config.validate_every == 0 or done in (1, config.steps):
        line |= _elbo(trainer.evaluated, validation, "validation_elbo", "validation_log_partition", seed + 2)
    return line


def _elbo(model: VAE, images: Tensor, name: str, partition_name: str, seed: int) -> dict[str, float]:
    """The ELBO of binary samples, by short AIS, whose estimates of both log Z are a little low."""
    was_training = model.training
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gx.EffectiveSampleSizeWarning)  # 64 chains always have few
        log_partition, _ = model.prior_log_partition(64, 1000, seed)
        values = model.elbo(images, log_partition, num_samples=8, seed=seed + 1)
    model.train(was_training)
    return {name: values.mean().item(), partition_name: log_partition}


def _parameter_groups(model: VAE, weight_decay: float) -> list[dict[str, Any]]:
    """Groups with an L2 penalty on weight matrices and couplings, and without one on biases and normalisation."""
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        # The couplings of a graph are one number per edge.
        (decayed if parameter.dim() >= 2 or name.endswith("coupling") else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


@torch.no_grad()
def _move_average(average: nn.Module, model: nn.Module, weight: Tensor) -> None:
    """Adds weight (model - average) to the parameters; copies the buffers, which are averages already."""
    parameters: list[Tensor] = list(average.parameters())
    new: list[Tensor] = list(model.parameters())
    torch._foreach_lerp_(parameters, new, [weight] * len(new))
    torch._foreach_copy_(list(average.buffers()), list(model.buffers()))


@contextmanager
def _metrics(run: Run, start: int) -> Iterator[Any]:
    """Yields a function that appends a line to metrics.jsonl and to TensorBoard's events."""
    from torch.utils.tensorboard import SummaryWriter

    with (
        run.writing(),
        open(run.metrics_path, "a") as file,
        # Stopped amid a write, its thread may keep the program from ending until the next flush.
        SummaryWriter(str(run.path), purge_step=start + 1 if start else None, flush_secs=10) as events,
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
    """Turns the samplers' error about parameters that are not finite into Diverged."""
    try:
        yield
    except ValueError as error:
        raise Diverged(f"training diverged at step {step} ({error}); a smaller learning_rate may help") from error


@contextmanager
def _ctrl_c() -> Iterator[Any]:
    """Yields a function that tells whether Ctrl-C (or SIGTERM) came, so that no step is left half done.

    A second Ctrl-C stops at once. Raises Interrupted at the end, also if the last step was done.
    """
    received = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal received
        # torchrun passes on a signal that the terminal may have sent to this process already. SIGTERM may come several
        # times from a parent that dies, once for each of its threads.
        if received and number == signal.SIGINT and gx.distributed.world_size() == 1:
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
