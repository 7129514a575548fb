# SPDX-License-Identifier: Apache-2.0
"""A training step waits for no device and mixes none; it can be captured; and it is the same on every device."""

import contextlib
from typing import Any

import deviceless
import pytest
import torch
from backends import call_emulated, emulated_library
from support import assert_same_bits
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor

import gibbs_ext
from gibbs_ext import ops
from undirected_vae import feed
from undirected_vae.runs import RunError
from undirected_vae.train import Trainer
from undirected_vae.vae import VAE

forward = VAE.forward
NO_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", deviceless.CONFIGS)
def test_a_step_needs_no_values_and_one_device(name: str, device: str) -> None:
    trainer = deviceless.take_steps(deviceless.CONFIGS[name], device)
    assert trainer.step == 2
    tensors = [*trainer.model.parameters(), trainer.terms.loss, *(p.grad for p in trainer.model.parameters())]
    assert all(isinstance(x, FakeTensor) if device == "cpu" else x.device.type == "meta" for x in tensors)
    # The step did all its work: the optimizer has moments of every parameter.
    assert len(trainer.optimizer.state) == len(list(trainer.model.parameters()))


def with_item(self: VAE, *args: Any, **options: Any) -> Any:
    terms = forward(self, *args, **options)
    return terms._replace(loss=terms.loss * (1.0 if terms.loss.item() > 0 else 2.0))


def with_nonzero(self: VAE, *args: Any, **options: Any) -> Any:
    terms = forward(self, *args, **options)
    return terms._replace(reconstruction=terms.reconstruction[terms.reconstruction < 0])


def with_constant(self: VAE, images: torch.Tensor, *args: Any, **options: Any) -> Any:
    return forward(self, images * torch.ones(images.shape[1], device="cpu"), *args, **options)


@pytest.mark.parametrize(
    ("fault", "device", "message"),
    [
        (with_item, "cpu", "_local_scalar_dense"),
        (with_nonzero, "cpu", "nonzero"),
        (with_constant, "meta", "device"),
    ],
)
def test_planted_faults_of_a_step_are_found(fault: Any, device: str, message: str) -> None:
    config = deviceless.CONFIGS["undirected-bipartite-shared"]
    with pytest.raises((RuntimeError, *NO_VALUES), match=message):
        deviceless.take_steps(config, device, forward=fault)


def steps_of(trainer: Trainer, *nums: int) -> list[torch.Tensor]:
    for num in nums:
        trainer.advance(num)
    trainer.finish()
    chains = [trainer.model.prior.chains.bits]
    if trainer.model.posterior.chains is not None:
        chains.append(trainer.model.posterior.chains.bits)
    return [*chains, *(p.detach() for p in trainer.model.parameters()), trainer.terms.loss]


CONFIG = deviceless.CONFIGS["undirected-chimera-per_sample"].replace({"average": 0.9, "steps": 300})


@pytest.fixture
def trainers() -> list[Trainer]:
    data = deviceless.images()
    return [Trainer(CONFIG, data, torch.device("cpu")) for _ in range(2)]


def test_a_captured_step_is_replayed_once_a_step(trainers: list[Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for CUDA graphs: what is captured does nothing, and a replay makes the step."""
    eager, captured = trainers
    make, captures = captured._make_step, []

    class Graph:
        replay = staticmethod(make)

    @contextlib.contextmanager
    def capturing(graph: Graph, stream: Any) -> Any:
        captures.append(captured.step)
        captured._make_step = lambda: None
        yield
        captured._make_step = make

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    captured._captures = True
    # Over the end of the table of numbers.
    assert_same_bits(steps_of(captured, 2, 7, feed.ROWS), steps_of(eager, 9 + feed.ROWS))
    assert captures == [3]


def test_a_state_that_is_loaded_is_captured_anew(trainers: list[Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph holds the optimizer's tensors, which loading replaces."""
    trainer, captures = trainers[0], []

    class Graph:
        replay = staticmethod(trainer._make_step)

    @contextlib.contextmanager
    def capturing(graph: Graph, stream: Any) -> Any:
        captures.append(trainer.step)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    trainer._captures = True
    trainer.advance(5)
    trainer.load_state_dict(trainer.state_dict())
    trainer.advance(5)
    assert captures == [3, 8]


def test_a_step_that_cannot_be_captured_says_what_to_do(
    trainers: list[Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(graph: Any, stream: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", fail)
    trainers[0]._captures = True
    with pytest.raises(
        RunError, match=r"cannot be captured in a CUDA graph; use --no-capture \(operation not permitted"
    ):
        trainers[0].advance(5)


def test_another_default_device_changes_nothing(trainers: list[Trainer]) -> None:
    expected = steps_of(trainers[0], 3)
    with torch.device("meta"):
        trainer = Trainer(CONFIG, deviceless.images(), torch.device("cpu"))
        trainer.advance(3)
    assert_same_bits(steps_of(trainer), expected)
    with torch.device("meta"):
        trainer.advance(feed.ROWS)
    assert_same_bits(steps_of(trainer), steps_of(trainers[0], feed.ROWS))


def test_annealing_reads_no_values() -> None:
    """So that a CUDA graph can capture it."""
    graph = gibbs_ext.ChimeraGraph(1)
    with deviceless.fake():
        for model in (
            gibbs_ext.BipartiteBoltzmann(torch.zeros(4), torch.zeros(3), torch.zeros(4, 3), validate_args=False),
            gibbs_ext.GraphBoltzmann(graph, torch.zeros(8), torch.zeros(16), validate_args=False),
        ):
            for betas in (5, torch.linspace(0, 1, 100)):
                result = gibbs_ext.annealed_importance_sampling(
                    model, 6, betas, seed=torch.zeros((), dtype=torch.int64)
                )
                assert isinstance(result.log_partition, FakeTensor)


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({"task": "density"}, [0.0, 0.5, 1.0, 1.0]),
        ({"task": "structured", "entropy_weight": 0.2}, [1.0, 0.6, 0.2, 0.2]),
    ],
)
def test_the_weight_of_the_kl_rises_and_that_of_the_entropy_falls(
    settings: dict[str, Any], weights: list[float]
) -> None:
    config = CONFIG.replace({"kl_warmup": 0.4, **settings})
    assert [feed.term_weight(config, part) for part in (0, 0.2, 0.4, 1)] == pytest.approx(weights)


def test_a_run_goes_on_from_a_checkpoint_within_a_table(trainers: list[Trainer]) -> None:
    whole, parts = trainers
    expected = steps_of(whole, feed.ROWS + 20)
    steps_of(parts, feed.ROWS - 5)
    resumed = Trainer(CONFIG, deviceless.images(), torch.device("cpu"))
    resumed.load_state_dict(parts.state_dict())
    assert_same_bits(steps_of(resumed, 25), expected)


def test_emulated_kernels_make_the_same_chains(trainers: list[Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA kernels' own text in the CPU's place: the bits of all chains and images are those of the CPU."""
    on_cpu, emulated = trainers
    expected = steps_of(on_cpu, 6)
    emulated_library()
    monkeypatch.setattr(ops, "_call", call_emulated)
    actual = steps_of(emulated, 6)
    assert_same_bits(actual[:2], expected[:2])
    assert_same_bits(emulated.images, on_cpu.images)
    for a, e in zip(actual[2:], expected[2:], strict=True):
        assert torch.allclose(a, e, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("compiled", "says"),
    [
        (lambda *args, **options: forward(*args, **options), "torch.compile: "),
        (None, "torch.compile cannot be used: no"),
    ],
)
def test_trying_torch_compile_goes_back_to_where_it_was(
    trainers: list[Trainer], compiled: Any, says: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def compile_model(model: VAE, dynamic: bool) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if compiled is None:
                raise NotImplementedError("no compiler\nof any kind")
            return compiled(model, *args, **options)

        return call

    monkeypatch.setattr(torch, "compile", compile_model)
    plain, trying = trainers
    trying.try_compile()
    assert_same_bits(steps_of(trying, 5), steps_of(plain, 5))
    assert capsys.readouterr().err.startswith(says)
    if compiled is None:
        assert trying._forward is trying.model
