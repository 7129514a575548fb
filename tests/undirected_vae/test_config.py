# SPDX-License-Identifier: Apache-2.0
"""Settings: flags, files, presets, and what is refused."""

import argparse
import dataclasses

import pytest

pytest.importorskip("yaml")
import yaml

from undirected_vae.config import PRESETS, Config, ConfigError, add_flags, read_file, resolve


def flags(*argv):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return vars(parser.parse_args(argv))


def test_round_trip_through_yaml_toml_and_flags(tmp_path):
    config = Config(
        steps=7, encoder=(3, 4), learning_rate=1e-5, slope_gradient=False, test_images=9, coupling="low_rank"
    )
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert resolve(file=tmp_path / "c.yaml") == config
    changed = {k: v for k, v in config.to_dict().items() if v != Config().to_dict()[k]}
    text = "".join(f"{k} = {str(v).lower() if isinstance(v, bool) else repr(v)}\n" for k, v in changed.items())
    (tmp_path / "c.toml").write_text(text)
    assert resolve(file=tmp_path / "c.toml") == config
    argv = ["--steps", "7", "--encoder", "3", "4", "--learning-rate", "1e-5", "--no-slope-gradient"]
    assert resolve(flags=flags(*argv, "--test-images", "9", "--coupling", "low_rank")) == config


def test_order_default_preset_file_flags(tmp_path):
    (tmp_path / "c.yaml").write_text("preset: paper-mnist-400\nsteps: 5\nbatch-size: 50\n")
    config = resolve(file=tmp_path / "c.yaml", flags=flags("--steps", "6"))
    assert (config.steps, config.batch_size, config.left, config.prior_sweeps) == (6, 50, 200, 40)
    assert flags() == {}


def test_settings_that_fit_together_only_when_all_are_known(tmp_path):
    (tmp_path / "c.toml").write_text('prior = "chimera"\nchimera-rows = 2\nleft = 40\n')
    config = resolve(file=tmp_path / "c.toml", flags=flags("--right", "40"))
    assert config.num_latents == 80
    with pytest.raises(ConfigError, match="left, right: expected 40, 40"):
        resolve(file=tmp_path / "c.toml")


@pytest.mark.parametrize(
    ("settings", "num_latents"),
    [
        ({"left": 12, "right": 8}, 20),
        ({"left": 12, "right": 8, "chimera_rows": 9}, 20),  # no Chimera
        ({"posterior": "directed", "left": 12, "right": 8}, 20),
        ({"posterior": "chimera", "prior": "chimera"}, 200),
        # There is no bipartite machine, so the numbers of its sides do not matter.
        ({"posterior": "chimera", "prior": "chimera", "chimera_rows": 2, "chimera_shore": 3, "left": 7}, 60),
        ({"posterior": "directed", "prior": "chimera", "chimera_rows": 1, "chimera_cols": 1, "left": 7}, 8),
        ({"prior": "chimera"}, 200),
    ],
)
def test_number_of_latents(settings, num_latents):
    assert Config(**settings).num_latents == num_latents


def test_every_preset_is_valid_and_has_the_papers_figures():
    for name in PRESETS:
        resolve(preset=name)
    paper = resolve(preset="paper-omniglot-200")
    assert (paper.left, paper.right, paper.sharpness, paper.steps, paper.adam_eps) == (100, 100, 3.0, 10**6, 1e-3)
    assert paper.coupling == "per_sample"


def test_yaml_numbers_in_scientific_notation(tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-4\n")  # which YAML reads as a string
    assert resolve(file=tmp_path / "c.yaml").learning_rate == 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stepz": 1}, "no such setting: stepz"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"steps": 1.5}, "steps: expected an integer"),
        ({"steps": True}, "steps: expected an integer"),
        ({"steps": "many"}, "steps: expected an integer, got 'many'"),
        ({"dropout": 1.5}, "dropout: expected from 0 to 0.99"),
        ({"learning_rate": float("nan")}, "learning_rate: expected at least 0"),
        ({"learning_rate": float("inf")}, "learning_rate: expected a finite number"),
        ({"learning_rate": 10**400}, "learning_rate: expected a finite number"),
        ({"seed": 2**32}, "seed: expected from 0 to 4294967295"),
        ({"posterior": "both"}, "posterior: expected one of undirected, directed, chimera, got 'both'"),
        ({"prior": "directed"}, "prior: expected one of bipartite, chimera, got 'directed'"),
        ({"chimera_rows": 0}, "chimera_rows: expected from 1 to 100, got 0"),
        ({"chimera_shore": 101}, "chimera_shore: expected from 1 to 100, got 101"),
        (
            {"posterior": "chimera", "left": 12},
            r"left, right: expected 100, 100, half of the Chimera's 200 latent bits each "
            r"\(posterior chimera, prior bipartite\), got 12, 100$",
        ),
        ({"prior": "chimera", "chimera_cols": 2}, r"left, right: expected 40, 40, .*, got 100, 100$"),
        ({"encoder": 200}, "encoder: expected a list of integers"),
        ({"encoder": [0]}, "encoder: expected at least 1"),
        ({"slope_gradient": 1}, "slope_gradient: expected true or false"),
        ({"data": 3}, "data: expected a string"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        Config().replace(settings)


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.yaml", "steps: [1"), ("a.toml", "steps = "), ("a.yaml", "just text"), ("a.ini", "steps=1"), ("b.yaml", None)],
)
def test_bad_files(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=name):
        read_file(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "steps: 1\nseed: 2\nsteps: 3\n"),
        ("a.yaml", "kl_warmup: 0.1\nkl-warmup: 0.2\n"),
        ("a.toml", "steps = 1\nsteps = 3\n"),
        ("a.toml", "kl_warmup = 0.1\nkl-warmup = 0.2\n"),
    ],
)
def test_a_setting_given_twice_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"{name}: (cannot be read as settings: .*|expected each setting once)"):
        read_file(tmp_path / name)


def test_a_preset_that_is_a_list_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("preset: [a]\n")
    with pytest.raises(ConfigError, match="preset: expected one of"):
        resolve(file=tmp_path / "c.yaml")


def test_every_setting_says_what_it_is():
    assert all(field.metadata["help"] for field in dataclasses.fields(Config))
