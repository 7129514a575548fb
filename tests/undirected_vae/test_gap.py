# SPDX-License-Identifier: Apache-2.0
"""The parts of a posterior's KL against exact ones: enumeration of all latents, and exact gradients."""

import json
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("tqdm")
from test_evaluate import exact_logits
from test_model import small

import gibbs_ext as gx
from undirected_vae import gap
from undirected_vae.__main__ import main
from undirected_vae.config import Config
from undirected_vae.gap import Posteriors, decompose, gap_run, refit, table
from undirected_vae.runs import Run, RunError

FIT = {"steps": 400, "num_samples": 256}


def tiny(**settings):
    """A model of 4 + 4 latents, the posteriors of which are correlated, and four images."""
    config, data, model = small(**{"left": 4, "right": 4, "coupling": "per_sample", **settings})
    with torch.no_grad():
        model.prior.weight.normal_(0, 1.5, generator=torch.Generator().manual_seed(0))
        model.prior.left_bias.sub_(model.prior.weight.sum(1) / 2)
        model.prior.right_bias.sub_(model.prior.weight.sum(0) / 2)
    return config, data, model, data.binary("test", 4)


def exact_elbo(log_joint, states, field, coupling):
    """[B], of the posteriors of energies -field . z - left^T coupling right, for log p(x, z) [S, B] of all states."""
    logits = states @ field.mT
    if coupling is not None:
        n1 = coupling.shape[-2]
        logits = logits + torch.einsum("si,bij,sj->sb", states[:, :n1], coupling, states[:, n1:])
    log_q = torch.log_softmax(logits, 0)
    return (log_q.exp() * (log_joint - log_q)).sum(0)


def exact_fit(log_joint, states, field, coupling):
    """The largest ELBO [B] of a posterior, by exact gradients from some start."""
    parameters = [p.double().clone().requires_grad_() for p in (field, coupling) if p is not None]
    optimizer = torch.optim.LBFGS(parameters, max_iter=2000, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -exact_elbo(log_joint, states, *parameters, *([None] * (2 - len(parameters)))).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return exact_elbo(log_joint, states, *parameters, *([None] * (2 - len(parameters)))).detach()


def exact_parts(model, images):
    states, log_joint, log_q = exact_logits(model, images)
    states = states.double()
    log_likelihood = torch.logsumexp(log_joint, 0)
    total = (log_q.exp() * (log_q - log_joint)).sum(0) + log_likelihood
    mean = log_q.exp().mT @ states
    field = torch.logit(mean.clamp(1e-3, 1 - 1e-3))
    factorial = exact_fit(log_joint, states, field, None)
    n = states.shape[1] // 2
    undirected = exact_fit(log_joint, states, field, torch.zeros(len(images), n, n))
    return {
        "total": total,
        "factorial": log_likelihood - factorial,
        "undirected": log_likelihood - undirected,
        "couplings": undirected - factorial,
    }


@pytest.mark.parametrize("settings", [{}, {"posterior": "directed"}, {"coupling": "none"}], ids=str)
def test_parts_are_those_of_exact_fits(settings):
    _, _, model, images = tiny(**settings)
    exact = exact_parts(model, images)
    result = decompose(model, images, num_betas=50, draws=20_000, **FIT)
    values = {name: torch.tensor(value).double() for name, value in result["values"].items()}
    for name, expected in exact.items():
        assert (values[name] - expected).abs().max() < 0.05, name
    # The parts are there, and they differ: without that the comparison would mean little.
    assert exact["total"].mean() > exact["factorial"].mean() + 0.2
    assert exact["couplings"].mean() > 0.2
    own = "factorial" if settings else "undirected"
    assert result["own_family"] == own
    assert (values["amortisation"] + values["family"] - values["total"]).abs().max() < 1e-3
    assert values["family"].equal(values[own])
    for name, mean in result["means"].items():
        assert abs(mean - values[name].mean()) < 1e-3
    assert all(abs(gain) < 0.05 for gain in result["gain_of_more_steps"].values())
    assert 0 <= result["looseness"] < 0.02
    assert result["effective_sample_size_min"] > 0.3


def test_a_wrong_gradient_misses_the_optimum():
    """The planted fault: an energy that is missing in the gradient, as if log q did not depend on z."""
    _, _, model, images = tiny()
    exact = exact_parts(model, images)
    with patch.object(gx.BipartiteBoltzmann, "energy", lambda self, z: torch.zeros(())):
        centre = torch.full((4, 8), 0.5)
        start = Posteriors(torch.zeros(4, 8), torch.zeros(4, 4, 4), centre)
        _, wrong = refit(lambda z: model.log_joint(images, z), start, with_coupling=True, **FIT)
    states, log_joint, _ = exact_logits(model, images)
    machine = wrong.machine()
    log_q = torch.log_softmax(-machine.energy(states[:, None]).double(), 0)
    kl = torch.logsumexp(log_joint, 0) - (log_q.exp() * (log_joint - log_q)).sum(0)
    assert (kl - exact["undirected"]).mean() > 0.3


def test_centred_parameters_are_those_of_the_machine():
    torch.manual_seed(0)
    machine = gx.BipartiteBoltzmann(torch.randn(5, 3), torch.randn(5, 2), torch.randn(5, 3, 2))
    again = Posteriors.of_machine(machine, torch.rand(5, 5)).machine()
    torch.testing.assert_close(again.left_bias, machine.left_bias)
    torch.testing.assert_close(again.right_bias, machine.right_bias)
    assert again.weight.equal(machine.weight)


def test_groups_have_no_own_family():
    _, _, model, images = tiny(posterior="directed", groups=2)
    result = decompose(model, images, num_betas=10, draws=100, steps=4, num_samples=8)
    assert result["own_family"] is None
    assert set(result["means"]) == {"total", "factorial", "undirected", "couplings"}


SMALL = {
    "--left": 6, "--right": 4, "--encoder": 16, "--decoder": 16, "--prior-chains": 20, "--prior-sweeps": 2,
    "--posterior-sweeps": 2, "--steps": 3, "--coupling": "per_sample", "--posterior-max-betas": 50, "--device": "cpu",
}  # fmt: skip
SMALL = [str(word) for pair in SMALL.items() for word in pair]


def test_command(tmp_path, capsys):
    pytest.importorskip("mlxtend")
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    assert main(["train", "--run", str(run), "--no-evaluate", *SMALL]) == 0
    words = ["--images", "3", "--steps", "8", "--samples", "10", "--device", "cpu"]
    assert main(["gap", str(run), *words]) == 0
    output = capsys.readouterr().out
    result = json.loads((run / "gap.json").read_text())
    assert output == table(result) + "\n"
    assert output.count(" +- ") == len(gap.ROWS)
    for name, title in gap.ROWS.items():
        assert f"{title} " in output
        assert f"{result['means'][name]:.2f} +- {result['standard_errors'][name]:.2f}" in output
    assert result["step"] == 3
    assert result["settings"] == {"steps": 8, "samples": 10, "betas": 100, "seed": 0}
    assert all(len(values) == 3 for values in result["values"].values())
    # The same seed gives the same result.
    assert main(["gap", str(run), *words]) == 0
    again = json.loads((run / "gap.json").read_text())
    assert again["values"] == result["values"]
    assert main(["gap", str(run), "--images", "0"]) == 2
    assert "images: expected from 1 to" in capsys.readouterr().err
    assert main(["gap", str(run), "--split", "validation", "--images", "1", "--steps", "1"]) == 0
    assert (run / "gap_validation.json").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"posterior": "chimera", "left": 100, "right": 100},
            "expected an undirected or directed posterior, got chimera",
        ),
        ({"task": "structured"}, "expected a run of task density, got structured"),
    ],
)
def test_what_is_not_supported_is_said(tmp_path, settings, message):
    _, data, _ = small()
    with pytest.raises(RunError, match=message):
        gap_run(Run(tmp_path, Config(**settings)), data)
