# SPDX-License-Identifier: Apache-2.0
"""Training steps on tensors that have a device and no values: code that reads one, or mixes devices, raises an error.

Fake tensors (FakeTensorMode) show that a step never waits for its device; tensors of device "meta" show that it makes
no tensor on another device. tests/undirected_vae/test_step.py uses fake CPU tensors and "meta";
tests/cuda/check_import.py uses fake CUDA tensors, which need a PyTorch with CUDA but no GPU.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, library, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import gibbs_ext as gx
from undirected_vae.config import Config
from undirected_vae.data import Dataset
from undirected_vae.train import Trainer
from undirected_vae.vae import VAE, chimera

SIZES: dict[str, Any] = {
    "left": 16, "right": 16, "chimera_rows": 1, "chimera_cols": 4, "encoder": (10,), "decoder": (10,),
    "prior_chains": 20, "batch_size": 8,
}  # fmt: skip
# Every combination of posterior, prior and coupling, and other settings that change a step.
CONFIGS = {
    f"{posterior}-{prior}-{coupling}": Config(posterior=posterior, prior=prior, coupling=coupling, **SIZES)
    for posterior, prior, coupling in itertools.product(
        ("undirected", "chimera", "directed"), ("bipartite", "chimera"), ("shared", "low_rank", "per_sample")
    )
    if posterior != "directed" or coupling == "shared"
} | {
    "plain": Config(augment=0.0, average=0.0, coupling="per_sample", relaxation="concrete", **SIZES),
    "none": Config(coupling="none", **SIZES),
    "groups": Config(posterior="directed", groups=3, **SIZES),
    "power_function": Config(posterior="directed", relaxation="power_function", sharpness=30, **SIZES),
    "samples": Config(coupling="per_sample", train_samples=3, **SIZES),
    "structured": Config(task="structured", coupling="per_sample", train_samples=3, **SIZES),
    "structured-groups": Config(task="structured", posterior="directed", groups=2, train_samples=3, **SIZES),
    "dropout": Config(dropout=0.1, relaxed_sweeps=2, kl_warmup=0.0, schedule="paper", **SIZES),
}


def images() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    gray = torch.randint(0, 256, (30, 49), dtype=torch.uint8, device="cpu", generator=generator)
    return Dataset(gray, gray, gray, (7, 7), "noise")


def _to(module: nn.Module, device: torch.device) -> nn.Module:
    """Does the work of module.to(device), which PyTorch refuses for fake tensors."""

    def empty(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(empty(parameter))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = empty(buffer)
        if isinstance(part, gx.PersistentChains):
            part.bits = empty(part.bits)
    return module


def _fused_adam(*lists: Any, **options: Any) -> None:
    """Adam's fused kernel on "meta", for which PyTorch has none. Only the devices of its tensors can be checked."""
    tensors = [x for value in (*lists, *options.values()) for x in (value if isinstance(value, list) else [value])]
    assert all(x.device.type == "meta" for x in tensors if isinstance(x, Tensor))


library.impl("aten::_fused_adam_.tensor_lr", "Meta", _fused_adam)


@contextlib.contextmanager
def optimizers() -> Iterator[None]:
    """Adam's fused kernel for tensors without values."""
    from torch.optim import optimizer

    supported = [*optimizer._get_fused_kernels_supported_devices(), "meta"]
    with patch.object(optimizer, "_get_fused_kernels_supported_devices", lambda: supported):
        yield


@contextlib.contextmanager
def fake() -> Iterator[None]:
    """Makes tensors fake inside. A graph's own tensors stay real, because it reads them; their copies are fake."""
    make = gx.ColoredGraph.__init__

    def made(self: gx.ColoredGraph, *args: Any) -> None:
        with unset_fake_temporarily():
            make(self, *args)

    def copied(self: gx.ColoredGraph, name: str, tensor: Tensor, device: torch.device) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        patch.object(gx.ColoredGraph, "__init__", made),
        patch.object(gx.ColoredGraph, "_copy", copied),
    ):
        yield


@contextlib.contextmanager
def ready(device: str) -> Iterator[None]:
    """Gives a Trainer made inside, and its steps, tensors of "meta", or fake ones of another device."""
    with patch.object(VAE, "to", _to), optimizers(), contextlib.nullcontext() if device == "meta" else fake():
        yield


def take_steps(config: Config, device: str, **faults: Any) -> Trainer:
    """Takes two steps; the second finds the optimizer's moments. ``faults`` replace methods of VAE."""
    # The graph is made before, because renumbering reads its integers.
    graph = chimera(config)
    with (
        patch("undirected_vae.vae.chimera", lambda config: graph),
        patch.multiple(VAE, **faults) if faults else contextlib.nullcontext(),
        ready(device),
    ):
        trainer = Trainer(config, images(), torch.device(device), capture=False)
        trainer.advance(2)
    return trainer
