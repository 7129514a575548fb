# SPDX-License-Identifier: Apache-2.0
"""Times several ways of doing one thing in turns, and checks that they do the same. bench/conftest.py tells pytest."""

import contextlib
import functools
import math
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .tables import OURS, TWO_THREADS

Call = Callable[[], Any]


class Missing(Exception):
    """A contender, or what a case is made of, is not available here; the text says what would help."""


@dataclass
class Case:
    """One task: a benchmark group. A contender's function gets the inputs, prepares everything that is not timed (it
    imports, converts, compiles) and returns a call without arguments that does the whole task and leaves its inputs
    unchanged."""

    name: str
    inputs: Callable[[], Any]
    contenders: dict[str, Callable[[Any], Call]]  # OURS and its peers
    updates: int | None = None  # updates of units per call; None if the time of a call is shown instead of a rate
    calls: int = 1  # number of times that a call does the task; figures are those of one time
    work: Sequence[Mapping[str, float]] = ()  # what bench/limits.py says of this case, for each way to do it
    tells_figures: bool = False  # whether a call is made once and returns its own figures: a dict with "seconds"
    is_capturable: bool = True  # whether a CUDA graph can hold the call
    # Makes samples [n] of some quantities from the inputs and a result. Their means must be those of OURS.
    statistics: Callable[[Any, Any], Sequence[Tensor]] | None = None


@dataclass
class Outcome:
    """What came of a contender."""

    times: list[float] = field(default_factory=list)  # seconds of the task; a single one if it is far behind
    is_repeated: bool = True
    wall: float = 0.0  # seconds of all calls, on the clock and of processors
    cpu: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    error: Exception | None = None

    def timed(self, call: Call) -> tuple[float, Any]:
        """The seconds of a call and its result. On a GPU the time ends when the result is there."""
        synchronize()
        cpu, start = time.process_time(), time.perf_counter()
        returned = call()
        synchronize()
        seconds = time.perf_counter() - start
        self.cpu += time.process_time() - cpu
        self.wall += seconds
        return seconds, returned


def on_gpu() -> bool:
    """Whether tensors are made on a GPU: `pytest bench/ --device cuda`."""
    return torch.get_default_device().type == "cuda"


def synchronize() -> None:
    if on_gpu():
        torch.cuda.synchronize()


@contextlib.contextmanager
def turn_of(name: str) -> Iterator[None]:
    """A contender's turn. Threads that have done their work spin for a while before they sleep. When the turn on two
    threads begins, those of others are asleep, and OpenMP's second one is awake, as in a loop of calls; it is asleep
    again before the next contender's turn."""
    if name != TWO_THREADS:
        yield
        return
    time.sleep(0.02)
    torch.set_num_threads(2)
    try:
        torch.ones(1 << 20).exp()
        yield
    finally:
        torch.set_num_threads(1)
        time.sleep(0.02)


def warm(call: Call) -> Call:
    """Calls once, so that what a first call compiles is not timed."""
    call()
    return call


def as_cuda_graph(call: Call) -> Call:
    """Captures a call; the result replays it. Each replay overwrites the results and draws new random numbers."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the first calls compile, and allocate memory that is kept from call to call
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            returned = call()
    except BaseException:
        # A capture that fails leaves its stream current and, in some versions, the random generator capturing.
        torch.cuda.set_stream(current)
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(torch.Generator("cuda").graphsafe_get_state())
        raise

    def replay() -> object:
        graph.replay()
        return returned

    return replay


def captured(name: str, prepare: Callable[[Any], Call], inputs: Any) -> Call:
    call = prepare(inputs)
    try:
        return as_cuda_graph(call)
    except RuntimeError as error:
        if name == OURS:
            raise
        raise Missing(f"{name} cannot be captured by a CUDA graph: {error}") from error


def variants(cases: Iterable[Case]) -> Iterator[Case]:
    """On a GPU also each case with every contender as a CUDA graph, which leaves out most of the cost of launches; on
    the CPU each case also with gibbs_ext on two threads, unless the cost of a call is measured."""
    for case in cases:
        if on_gpu():
            yield case
            if case.is_capturable:
                graphs = {name: functools.partial(captured, name, make) for name, make in case.contenders.items()}
                yield replace(case, name=f"{case.name}, CUDA graphs", contenders=graphs)
            continue
        contenders = dict(case.contenders)
        if case.calls == 1 and not case.tells_figures:
            contenders[TWO_THREADS] = case.contenders[OURS]
        yield replace(case, contenders=contenders)


def check_agreement(case: Case, name: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raises RuntimeError if a contender does other work than the first one. Other kinds of sweeps may differ by 1%."""
    for x, y in zip(found, expected, strict=True):
        difference = x - y  # sample by sample: models and gradients differ more among each other than contenders do
        error = (difference.var() / len(difference)).sqrt()
        # not <=: NaN is no agreement
        if not difference.mean().abs() <= 5 * error + 0.01 * y.mean().abs():
            raise RuntimeError(
                f"{case.name}: {name} has a mean of {x.mean():g}, expected {y.mean():g} +- {error:g}, which {OURS} has"
            )


def check_threads(case: Case, name: str, outcome: Outcome) -> None:
    """Raises RuntimeError if a contender was helped by more threads than it may have. A tenth of a second may be what
    others left to be done; a busy machine makes the time on the clock longer, never that of processors."""
    threads = 2 if name == TWO_THREADS else 1
    if outcome.cpu > (threads + 0.2) * outcome.wall + 0.1:
        raise RuntimeError(
            f"{case.name}: {name} must take {threads} thread{'s' * (threads > 1)}, and took {outcome.cpu:.3g} s of "
            f"processors in {outcome.wall:.3g} s"
        )


def measure(case: Case, names: Sequence[str], seconds: float, min_rounds: int) -> dict[str, Outcome]:
    """Calls these contenders round by round, in turns, so that all of them meet a machine's slow spell.

    First each is prepared and called once; that call is not counted, and its result must agree with that of OURS, which
    is called for this in any case. Rounds end after `seconds` (for each contender) and `min_rounds`; none are made if
    `seconds` is 0. A peer is called only once if it takes twice the time of all rounds, or half a second and thrice the
    time of the fastest peer. What a contender raises is kept for its own report, and stops no other.
    """
    outcomes = {name: Outcome() for name in dict.fromkeys((OURS, *names))}
    inputs = case.inputs()
    calls: dict[str, Call] = {}
    expected: list[Tensor] | None = None
    for name, outcome in outcomes.items():
        try:
            call = case.contenders[name](inputs)
            if on_gpu():
                call()  # the first one compiles
            with turn_of(name):
                once, returned = outcome.timed(call)
            if case.statistics:
                if name != OURS and expected is None:
                    raise RuntimeError(f"{case.name}: {name} cannot be checked, because {OURS} failed") from outcomes[
                        OURS
                    ].error
                found = [torch.as_tensor(x).detach().double().flatten() for x in case.statistics(inputs, returned)]
                expected = expected or found
                check_agreement(case, name, found, expected)
            if case.tells_figures:
                outcome.figures, outcome.is_repeated = returned, False
                outcome.times = [returned["seconds"]]
                continue
            del returned
            outcome.times, calls[name] = [once], call
        except Exception as error:
            outcome.error = error
    if seconds:
        repeat({name: calls[name] for name in names if name in calls}, outcomes, seconds, min_rounds)
        for name in calls:
            try:
                check_threads(case, name, outcomes[name])
            except RuntimeError as error:
                outcomes[name].error = outcomes[name].error or error
    for outcome in outcomes.values():
        outcome.times = [t / case.calls for t in outcome.times]
    return {name: outcomes[name] for name in names}


def repeat(calls: dict[str, Call], outcomes: dict[str, Outcome], seconds: float, min_rounds: int) -> None:
    limit = seconds * len(calls)
    once = {name: outcomes[name].times[0] for name in calls}
    fastest = min((t for name, t in once.items() if not name.startswith(OURS)), default=math.inf)
    for name, t in once.items():
        outcome = outcomes[name]
        outcome.is_repeated = name.startswith(OURS) or not (t > 2 * limit or t > max(0.5, 3 * fastest))
        if outcome.is_repeated:
            outcome.times = []
    turns = [name for name in calls if outcomes[name].is_repeated]
    rounds, end = 0, time.perf_counter() + limit
    while turns and (rounds < min_rounds or time.perf_counter() < end):
        rounds += 1
        for name in list(turns):
            try:
                with turn_of(name):
                    outcomes[name].times.append(outcomes[name].timed(calls[name])[0])
            except Exception as error:
                outcomes[name].error = error
                turns.remove(name)


def forget_compiled() -> None:
    """torch.compile gives up functions that it has compiled many times."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def benchmark_of(cases: Callable[[], Iterable[Case]], name: str) -> Callable[..., None]:
    """The function that pytest collects in a module of benchmarks, once for each case and contender."""

    def run(case: str, contender: str, benchmark: Any, group: Any) -> None:
        group.report(contender, benchmark)

    run.__name__ = run.__qualname__ = name
    run.__test__ = True  # type: ignore[attr-defined]
    run.cases = cases  # type: ignore[attr-defined]
    return run


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        return re.findall(r"model name\s*: (.*)", text)[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
