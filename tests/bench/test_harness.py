# SPDX-License-Identifier: Apache-2.0
"""bench/harness.py, with a fake clock: how often it calls contenders, and which results it keeps."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bench import harness


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[float] = []

    def takes(self, seconds: float) -> Callable[[], object]:
        def call() -> None:
            self.now += seconds
            self.calls.append(seconds)

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(harness.time, "perf_counter", lambda: made.now)
    return made


def test_rounds_fill_the_time(clock: Clock) -> None:
    case = harness.Case("a", {harness.OURS: clock.takes(0.25), "slow": clock.takes(0.5), "fast": clock.takes(0.125)})
    found = harness.measure(case, 8.0)
    # Each contender is called once, then in rounds of 0.875 s until 8 s are over.
    assert found["rounds"] == 10
    assert clock.calls == [0.25, 0.5, 0.125] * 11
    assert found["seconds"] == {harness.OURS: 0.25, "slow": 0.5, "fast": 0.125}
    assert (found["best_peer"], found["ratio"]) == ("fast", 0.5)


def test_a_peer_that_is_far_behind_is_called_once(clock: Clock) -> None:
    peers = {"slow": clock.takes(20), "behind": clock.takes(3), "fast": clock.takes(0.5)}
    found = harness.measure(harness.Case("a", {harness.OURS: clock.takes(0.25), **peers}), 1.0)
    assert (clock.calls.count(20), clock.calls.count(3)) == (1, 1)
    assert found["rounds"] == clock.calls.count(0.25) - 1 == 5
    assert found["seconds"]["slow"] == 20


def test_those_who_do_something_else_are_found() -> None:
    def draws(mean: float) -> Callable[[], object]:
        return lambda: torch.full((100,), mean)

    case = harness.Case("a", {harness.OURS: draws(1), "b": draws(1.1)}, statistics=lambda x: [x])
    with pytest.raises(RuntimeError, match=r"a: b has a mean of 1.1"):
        harness.measure(case, 0.0)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    harness.write(path, "a")
    harness.write(path, "b")
    assert path.read_text() == "b"
    assert list(path.parent.iterdir()) == [path]


def test_cuda_graphs_are_cases_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def captured(call: Callable[[], object]) -> Callable[[], object]:
        if call() == "synchronises":
            raise RuntimeError("not while capturing")
        return lambda: "replayed"

    monkeypatch.setattr(harness, "on_gpu", lambda: True)
    monkeypatch.setattr(harness, "as_cuda_graph", captured)

    def cases() -> Iterator[harness.Case]:
        yield harness.Case("a", {harness.OURS: lambda: "eager", "b": lambda: "synchronises", "c": lambda: "eager"})
        yield harness.Case("d", {harness.OURS: lambda: "eager"}, is_capturable=False)

    eager, graphs, alone = harness.with_cuda_graphs(cases())
    assert (eager.name, graphs.name, alone.name) == ("a", "a, CUDA graphs", "d")
    assert {name: call() for name, call in graphs.contenders.items()} == {harness.OURS: "replayed", "c": "replayed"}
    assert "a: b cannot be captured: not while capturing" in capsys.readouterr().err
