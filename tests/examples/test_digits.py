# SPDX-License-Identifier: Apache-2.0
"""The programs in python/examples that learn digits: their figures are those of enumeration of the hidden units."""

import re
import sys

import pytest
import torch
from programs import EXAMPLES, load, run
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from support import all_states
from torch.nn.functional import softplus

from gibbs_ext import BipartiteBoltzmann

BITS = torch.from_numpy(load_digits().data >= 8).float()
TRAINING, HELD_OUT = train_test_split(BITS, test_size=360, random_state=0)
MEAN = ((TRAINING.sum(0) + 1) / (len(TRAINING) + 2)).double()
OF_PIXELS = HELD_OUT.double() * MEAN.log() + (1 - HELD_OUT.double()) * (1 - MEAN).log()  # if they are independent


def log_sums(a, b, weight, above, images, free):
    """log sum exp(-energy) [M] over the hidden units and the free pixels, given the others, in float64.

    The first hidden layer is enumerated; ``above`` is what the second layer adds to log-weights of its states.
    """
    hidden = all_states(len(b))
    fields = a + hidden @ weight.T  # [2^n, 64]
    of_pixels = softplus(fields[:, free]).sum(1, keepdim=True) + fields[:, ~free] @ images[:, ~free].T.double()
    return (of_pixels + (hidden @ b + above(hidden)).unsqueeze(1)).logsumexp(0)


def log_probabilities(a, b, weight, images, above=lambda hidden: 0, given=()):
    """log p of the pixels that are not given, given those that are, [M]."""
    free = torch.ones(64, dtype=torch.bool).index_fill(0, torch.tensor(given, dtype=torch.int64), False)
    none = torch.zeros(64, dtype=torch.bool)
    return log_sums(a, b, weight, above, images, none) - log_sums(a, b, weight, above, images, free)


def doubles(*parameters):
    return [parameter.detach().double() for parameter in parameters]


def are_pictures(folder, *names):
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    return all(path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for path in folder.iterdir())


def numbers(pattern, text):
    found = re.finditer(pattern.replace("#", r"([-+]?[\d.]+)"), text)
    return [[float(number) for number in match.groups()] for match in found]


def test_rbm_digits(tmp_path):
    out = run(
        EXAMPLES / "rbm_digits.py", "--hidden=8", "--epochs=6", "--chains=100", "--folder", tmp_path / "a" / "b",
        cwd=tmp_path,
    )  # fmt: skip
    assert are_pictures(tmp_path / "a" / "b", "filters.png", "learning_curve.png", "samples.png")
    pattern = r"epoch +#: training +#, held out +# nats \+- # of log Z, ends # and #"
    printed = numbers(pattern, out)
    module = load("rbm_digits")
    torch.manual_seed(0)
    for epoch, model in enumerate(module.train(TRAINING, 8, 6, True, 0.5), 1):
        module.log_likelihood(model, TRAINING, HELD_OUT, 100)  # which takes seeds
        parameters = doubles(model.left_bias, model.right_bias, model.weight)
        exact = [log_probabilities(*parameters, images) for images in (TRAINING, HELD_OUT)]
        number, training, held_out, error, lower, upper = printed.pop(0)
        assert number == epoch
        assert error < 0.02
        assert training == pytest.approx(float(exact[0].mean()), abs=6 * error + 0.001)
        assert held_out == pytest.approx(float(exact[1].mean()), abs=6 * error + 0.001)
        assert max(abs(lower), abs(upper)) < 10 * error + 0.002
    assert printed == []
    independent = OF_PIXELS.sum(1)
    gain = exact[1] - independent
    ((before,),) = numbers(r"independent pixels: # ", out)
    ((mean, error, more, of_more),) = numbers(r"machine: # \+- # nats, # \+- # more than independent pixels", out)
    assert before == pytest.approx(float(independent.mean()), abs=0.006)
    for printed, values in (((mean, error), exact[1]), ((more, of_more), gain)):
        assert printed[0] == pytest.approx(float(values.mean()), abs=0.05)
        assert printed[1] == pytest.approx(float(values.std() / 360**0.5), abs=0.006)
    assert more > 2


@pytest.mark.filterwarnings("ignore::gibbs_ext.EffectiveSampleSizeWarning", "ignore::gibbs_ext.BracketWarning")
def test_the_ends_are_on_their_sides(monkeypatch):
    """On average, if few chains are annealed too fast, in 3 steps."""
    module = load("rbm_digits")
    bracket = module.gx.bracket_log_partition
    monkeypatch.setattr(module.gx, "bracket_log_partition", lambda model, draws, betas: bracket(model, draws, 3))
    weight = torch.randn(64, 8)
    model = BipartiteBoltzmann(-weight.sum(1) / 2, -weight.sum(0) / 2, weight)
    exact = log_probabilities(*doubles(model.left_bias, model.right_bias, model.weight), HELD_OUT).mean()
    ends = []
    for _ in range(30):
        found = module.log_likelihood(model, TRAINING, HELD_OUT, 10)
        ends.append([found.held_out.mean() + end - exact for end, _ in (found.lower, found.upper)])
    (lower, upper), errors = torch.tensor(ends).mean(0), torch.tensor(ends).std(0) / 30**0.5
    assert lower < -5 * errors[0]
    assert upper > 5 * errors[1]


def test_inpainting(tmp_path):
    out = run(
        EXAMPLES / "inpainting.py", "--hide=left", "--hidden=6", "--epochs=3", "--seeds=2", "--chains=30",
        "--sweeps=30", "--folder", tmp_path / "a" / "b", cwd=tmp_path,
    )  # fmt: skip
    assert are_pictures(tmp_path / "a" / "b", "inpainting.png")
    models = load("inpainting").train(TRAINING, 6, 3, 2)
    seen = [pixel for pixel in range(64) if pixel % 8 >= 4]
    hidden = [pixel for pixel in range(64) if pixel % 8 < 4]
    found, wrong = [], []
    for parameters in zip(*doubles(models.left_bias, models.right_bias, models.weight), strict=True):
        found.append(log_probabilities(*parameters, HELD_OUT, given=seen))
        # P(pixel = 1 | seen), from its odds
        one, zero = HELD_OUT.clone(), HELD_OUT.clone()
        for pixel in hidden:
            one[:, pixel], zero[:, pixel] = 1, 0
        for pixel in hidden:
            given = [other for other in range(64) if other in seen]
            free = torch.zeros(64, dtype=torch.bool).index_fill(0, torch.tensor(hidden), True)
            free[pixel] = False
            odds = log_sums(*parameters, lambda _: 0, one, free) - log_sums(*parameters, lambda _: 0, zero, free)
            wrong.append((odds > 0) != (HELD_OUT[:, pixel] > 0))
        assert given == seen
    exact = torch.stack(found, 1)
    ((percent, _, mean, error),) = numbers(r"machine +# \+- # % +# \+- #", out)
    assert percent == pytest.approx(100 * float(torch.stack(wrong).double().mean()), abs=0.3)
    assert mean == pytest.approx(float(exact.mean()), abs=0.011)
    of_images, of_seeds = exact.mean(1).var() / 360, exact.mean(0).var() / 2
    assert error == pytest.approx(float((of_images + of_seeds).sqrt()), abs=0.011)
    ((middle, noise, lower, upper),) = numbers(r"annealing has # \+- #, ends # and #", out)
    assert noise < 0.01
    for end in (middle, lower, upper):
        assert end == pytest.approx(float(exact.mean()), abs=6 * noise + 0.002)

    ((percent, _, mean, _),) = numbers(r"each pixel's mean +# \+- # % +# \+- #", out)
    assert percent == pytest.approx(100 * float(((MEAN > 0.5) != (HELD_OUT > 0))[:, hidden].double().mean()), abs=0.006)
    assert mean == pytest.approx(float(OF_PIXELS[:, hidden].sum(1).mean()), abs=0.006)
    differs = (HELD_OUT[:, None, seen] != TRAINING[:, seen]).sum(-1)
    nearest = TRAINING[differs.argmin(1)]
    ((percent, _),) = numbers(r"nearest image +# \+- # %", out)
    assert percent == pytest.approx(100 * float((nearest != HELD_OUT)[:, hidden].double().mean()), abs=0.006)
    ((_, _, mixture, _),) = numbers(r"mixture of training images +# \+- # % +# \+- #", out)
    ((difference, _),) = numbers(r"machine minus mixture: +# \+- # nats", out)
    assert difference == pytest.approx(float(exact.mean()) - mixture, abs=0.02)


def test_the_mixture_of_training_images_is_a_law():
    """Over all values of the hidden pixels it has the sum 1, and the means that it says."""
    is_hidden = torch.zeros(64, dtype=torch.bool).index_fill(0, torch.tensor([18, 20, 34, 43]), True)
    images = HELD_OUT[7].repeat(16, 1)
    images[:, is_hidden] = all_states(4).float()
    log_probability, mean, nearest = load("inpainting").neighbours(images, TRAINING, is_hidden)
    assert float(log_probability.exp().sum()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(log_probability.exp() @ images[:, is_hidden], mean[0])
    distances = (images[:, None, ~is_hidden] != TRAINING[:, ~is_hidden]).sum(-1)
    assert (nearest[0, ~is_hidden] != images[0, ~is_hidden]).sum() == distances[0].min()


def test_deep_boltzmann_machine(tmp_path):
    out = run(
        EXAMPLES / "deep_boltzmann_machine.py", "--layers", 6, 4, "--epochs=4", "--seeds=2", "--chains=100",
        "--sweeps=100", "--folder", tmp_path / "a" / "b", cwd=tmp_path,
    )  # fmt: skip
    assert are_pictures(tmp_path / "a" / "b", "learning_curve.png", "samples.png")
    printed = numbers(r"epoch +#: # \+- # nats, of annealing \+- #, ends # and #", out)
    module = load("deep_boltzmann_machine")
    exact = []
    for layers in ([64, 6, 4], [64, 10]):
        torch.manual_seed(0)
        model = module.machine(layers, TRAINING, 2)
        assert model.graph.colors.unique().tolist() == [0, 1]
        assert f"layers of {', '.join(map(str, layers))} units, {model.num_units + model.graph.num_edges} par" in out
        for epoch in module.train(model, TRAINING, 4, 1.0):
            module.log_likelihood(model, HELD_OUT, 100, 100)  # which takes seeds
            exact.append(of_layers(model, layers))
            number, mean, _, error, lower, upper = printed.pop(0)
            assert number == epoch
            assert error < 0.02
            assert mean == pytest.approx(float(exact[-1].mean()), abs=6 * error + 0.006)
            for end in (lower, upper):
                assert end == pytest.approx(float(exact[-1].mean()), abs=10 * error + 0.001)
        assert exact[-1].mean() > OF_PIXELS.sum(1).mean() + 1
        model.sample((40,), 200)  # of the picture
    assert printed == []
    values = exact[3] - exact[7]
    ((mean, error),) = numbers(r"deep minus restricted: # \+- # nats on 360", out)
    assert mean == pytest.approx(float(values.mean()), abs=0.05)
    of_images, of_seeds = values.mean(1).var() / 360, values.mean(0).var() / 2
    assert error == pytest.approx(float((of_images + of_seeds).sqrt()), abs=0.03)


def of_layers(model, layers):
    """log p of the held-out images [M, S], by enumeration of the first hidden layer."""
    first, second = model.graph.edges.T
    found = []
    for bias, coupling in zip(*doubles(model.bias, model.coupling), strict=True):
        dense = bias.new_zeros(len(bias), len(bias))
        dense[first, second] = coupling
        dense += dense.clone().T
        one, two = slice(64, 64 + layers[1]), slice(64 + layers[1], None)

        def above(hidden, bias=bias[two], weight=dense[one, two]):
            return softplus(bias + hidden @ weight).sum(-1)

        found.append(log_probabilities(bias[:64], bias[one], dense[:64, one], HELD_OUT, above))
    return torch.stack(found, 1)


@pytest.mark.parametrize(
    ("program", "option", "value"),
    [
        ("rbm_digits", "hidden", "0"),
        ("rbm_digits", "epochs", "0"),
        ("rbm_digits", "chains", "39"),
        ("rbm_digits", "rate", "0.0"),
        ("rbm_digits", "rate", "nan"),
        ("rbm_digits", "seed", "-1"),
        ("rbm_digits", "seed", str(2**32)),
        ("inpainting", "hidden", "0"),
        ("inpainting", "epochs", "0"),
        ("inpainting", "seeds", "1"),
        ("inpainting", "chains", "2"),
        ("inpainting", "sweeps", "0"),
        ("deep_boltzmann_machine", "layers", "64"),
        ("deep_boltzmann_machine", "layers", "64 0"),
        ("deep_boltzmann_machine", "epochs", "0"),
        ("deep_boltzmann_machine", "rate", "inf"),
        ("deep_boltzmann_machine", "seeds", "1"),
        ("deep_boltzmann_machine", "chains", "39"),
        ("deep_boltzmann_machine", "sweeps", "0"),
    ],
)
def test_programs_refuse(monkeypatch, capsys, program, option, value):
    monkeypatch.setattr(sys, "argv", [f"{program}.py", f"--{option}", *value.split()])
    with pytest.raises(SystemExit) as stop:
        load(program).main()
    assert stop.value.code == 2
    assert re.search(rf"error: --{option} must .*, got {value}", capsys.readouterr().err)
