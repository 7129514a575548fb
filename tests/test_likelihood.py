# SPDX-License-Identifier: Apache-2.0
"""Gradients of the likelihood with hidden units, by enumeration; centred gradients; and what is refused."""

import re

import pytest
import torch
from graph_support import complete_graph, random_graph_parameters
from support import (
    all_states,
    assert_close,
    assert_same_bits,
    random_bits,
    random_parameters,
    z_threshold,
)
from torch import Tensor

from gibbs_ext import (
    BipartiteBoltzmann,
    Centering,
    ColoredGraph,
    GraphBoltzmann,
    PersistentChains,
    exact_log_partition,
    exact_samples,
    negative_log_likelihood_surrogate,
)
from gibbs_ext.models import Boltzmann


def between(first, second):
    return [(i, j) for i in first for j in second if i < j]


# Visible units 0 .. 3, coupled among themselves, and hidden units that are not.
SEMI_RESTRICTED = ColoredGraph(7, between(range(4), range(4)) + between(range(4), range(4, 7)))
# Layers of 4 visible, 3 and 2 hidden units.
DEEP = ColoredGraph(9, between(range(4), range(4, 7)) + between(range(4, 7), range(7, 9)))
# The kind of model, and its visible units. Hidden units are coupled in the last four.
CASES = {
    "left": ((4, 3), [0, 1, 2, 3]),
    "left and more": ((4, 3), [0, 1, 2, 3, 5]),
    "right": ((4, 3), [4, 5, 6]),
    "all": ((4, 3), [*range(7)]),
    "semi-restricted": (SEMI_RESTRICTED, [0, 1, 2, 3]),
    "deep": (DEEP, [0, 1, 2, 3]),
    "deep, in the middle": (DEEP, [0, 5, 8]),
    "complete": (complete_graph(6), [1, 4]),
    "parts of both sides": ((4, 3), [1, 2, 6]),
}
IS_SAMPLED = dict.fromkeys(CASES, False) | dict.fromkeys([*CASES][5:], True)
NAMES = pytest.mark.parametrize("name", CASES)


def model_of(name: str, batch=(), scale: float = 1.0) -> Boltzmann:
    kind, _ = CASES[name]
    if isinstance(kind, ColoredGraph):
        parameters = random_graph_parameters(kind, (batch, batch), dtype=torch.float64, scale=scale)
        return GraphBoltzmann(kind, *(p.requires_grad_() for p in parameters))
    parameters = random_parameters(*kind, (batch, batch, batch), dtype=torch.float64, scale=scale)
    return BipartiteBoltzmann(*(p.requires_grad_() for p in parameters))


def mask_of(name: str, model: Boltzmann) -> Tensor:
    return torch.zeros(model.num_units, dtype=torch.bool).index_fill(0, torch.tensor(CASES[name][1]), True)


def completions(data: Tensor, where: Tensor) -> Tensor:
    """[2^hidden, ..., N]: all states that have the data [..., V]."""
    hidden = all_states(int((~where).sum()))
    z = torch.zeros(len(hidden), *data.shape[:-1], len(where), dtype=data.dtype)
    z[..., where] = data
    z[..., ~where] = hidden.reshape(len(hidden), *(1,) * (data.dim() - 1), hidden.shape[-1])
    return z


def likelihood(model: Boltzmann, data: Tensor, where: Tensor) -> Tensor:
    """The mean log-likelihood, by enumeration of the hidden units."""
    return (-model.energy(completions(data, where))).logsumexp(0).mean(0) - exact_log_partition(model)


def gradient(loss: Tensor, model: Boltzmann) -> list[Tensor]:
    return [*torch.autograd.grad(loss.sum(), model._parameters)]


def largest(actual: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - e).abs().max()) for a, e in zip(actual, expected, strict=True))


# Hidden units -----------------------------------------------------------------------------------------------------

COUNT = 20_000


def limit_of(model: Boltzmann, *counts: int) -> float:
    """Of the largest error of all moments, each of which has a standard error of at most 1 / 2 / sqrt(count)."""
    num_moments = sum(p.numel() for p in model._parameters)
    return z_threshold(num_moments) * 0.5 * sum(1 / count for count in counts) ** 0.5


@NAMES
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_gradient_is_that_of_the_likelihood(name: str, batch, seed: int) -> None:
    torch.manual_seed(seed)
    model = model_of(name, batch)
    where = mask_of(name, model)
    rows = random_bits(20, *batch, int(where.sum()), dtype=torch.float64)
    expected = gradient(-likelihood(model, rows, where), model)
    data = rows.repeat(COUNT // 20, *(1,) * (rows.dim() - 1))

    loss = negative_log_likelihood_surrogate(
        model, data, PersistentChains(COUNT, model), 40, where=where, num_positive_sweeps=40
    )
    assert loss.shape == batch
    limit = limit_of(model, COUNT, COUNT)
    assert largest(gradient(loss, model), expected) < limit
    assert max(float(g.abs().max()) for g in expected) > 3 * limit


@pytest.mark.parametrize("name", [name for name in CASES if IS_SAMPLED[name]])
def test_hidden_units_that_have_not_arrived_are_noticed(name: str) -> None:
    """The moments of hidden units, given the data alone, with strong couplings."""
    model = model_of(name, scale=2.0)
    where = mask_of(name, model)
    rows = random_bits(20, int(where.sum()), dtype=torch.float64)
    data = rows.repeat(COUNT // 20, 1)
    expected = gradient((-model.energy(completions(rows, where))).logsumexp(0).mean(), model)

    def error(num_positive_sweeps: int) -> float:
        chains = PersistentChains(1, model)
        torch.manual_seed(0)
        loss = negative_log_likelihood_surrogate(
            model, data, chains, where=where, num_positive_sweeps=num_positive_sweeps
        )
        z = model._state_of(chains.state().double())
        of_data = loss + model.free_energy(z).mean(0)
        return largest(gradient(-of_data, model), expected)

    assert error(500) < limit_of(model, COUNT) < error(1)


@NAMES
def test_hidden_units_that_are_not_coupled_are_summed_out(name: str) -> None:
    """Then the data's moments have no noise, and there is none to be sampled for them."""
    model = model_of(name)
    where = mask_of(name, model)
    data = random_bits(30, int(where.sum()), dtype=torch.float64)
    chains = PersistentChains(7, model)
    loss = negative_log_likelihood_surrogate(model, data, chains, where=where)
    of_chains = model.free_energy(model._state_of(chains.state().double())).mean(0)
    expected = -(-model.energy(completions(data, where))).logsumexp(0).mean()
    assert (abs(float((loss + of_chains - expected).detach())) < 1e-12) == (not IS_SAMPLED[name])


def test_data_of_all_units_or_of_the_left_need_no_mask() -> None:
    model = model_of("left")
    for name in ("left", "all"):
        data = random_bits(30, len(CASES[name][1]), dtype=torch.float64)
        losses = []
        for where in (None, mask_of(name, model)):
            for chains in (None, PersistentChains(5, model)):
                torch.manual_seed(3)
                if chains is not None:
                    chains.store_(random_bits(5, 4))
                losses.append(negative_log_likelihood_surrogate(model, data, chains, 3, where=where))
        assert_same_bits(losses[:2], losses[2:])


@pytest.mark.parametrize("kind", ["per row", "per data point"])
@pytest.mark.parametrize("name", ["deep", "parts of both sides"])
def test_persistent_chains_of_hidden_units_arrive_in_many_calls(name: str, kind: str) -> None:
    model = model_of(name, scale=2.0)
    where = mask_of(name, model)
    rows = random_bits(20, int(where.sum()), dtype=torch.float64)
    expected = gradient(-likelihood(model, rows, where), model)
    chains = PersistentChains(COUNT, model)
    if kind == "per row":
        positive, options = PersistentChains(COUNT, model), {}
        data = rows.repeat(COUNT // 20, 1)
    else:
        positive, options = PersistentChains(1000, model, dataset_size=25), {"index": torch.arange(24, 4, -1)}
        data = rows
    others = positive.bits[:5].clone()
    limit, errors = limit_of(model, COUNT, COUNT), []
    for _ in range(25):
        loss = negative_log_likelihood_surrogate(
            model, data, chains, 2, where=where, positive_chains=positive, num_positive_sweeps=1, **options
        )
        errors.append(largest(gradient(loss, model), expected))
    assert errors[-1] < limit < errors[0]
    if options:
        assert_same_bits(positive.bits[:5], others)
        states = positive.state(options["index"])
        kept = where[: states.shape[-1]]
        visible = rows[:, : int(kept.sum())]
        assert_same_bits(states[..., kept].double(), visible.expand(1000, 20, -1))


@NAMES
def test_contrastive_divergence_starts_at_the_data(name: str) -> None:
    """Data drawn from the model stay put on average: the gradient is near zero. Any other data move."""
    model = model_of(name)
    where = mask_of(name, model)
    draws = exact_samples(model, COUNT)[:, where]
    options = {"where": where, "num_positive_sweeps": 40}
    limit = limit_of(model, COUNT, COUNT)
    at_rest = gradient(negative_log_likelihood_surrogate(model, draws, None, 2, **options), model)
    assert largest(at_rest, [torch.zeros_like(g) for g in at_rest]) < limit
    pushed = gradient(negative_log_likelihood_surrogate(model, 0 * draws, None, 2, **options), model)
    assert largest(pushed, [torch.zeros_like(g) for g in pushed]) > limit


def test_contrastive_divergence_of_one_sweep_is_that_of_the_kernel() -> None:
    """The gradient of CD-1 is the data's moments minus those after one sweep, which enumeration has, too."""
    model = model_of("left", scale=1.5)
    rows = random_bits(4, 4, dtype=torch.float64)
    actual = gradient(negative_log_likelihood_surrogate(model, rows.repeat(COUNT // 4, 1), None, 1), model)
    left, right = all_states(4), all_states(3)
    given_left = (-model.energy_of(left[:, None], right)).softmax(1)
    given_right = (-model.energy_of(left[:, None], right)).softmax(0)
    after = (given_left @ given_right.mT).detach()  # [from, to]
    at = (rows.long() << torch.arange(4)).sum(-1)
    energies = model.free_energy(rows).mean() - (after[at].mean(0) * model.free_energy(left)).sum()
    expected = gradient(energies, model)
    limit = limit_of(model, COUNT)
    assert largest(actual, expected) < limit
    # It is not the likelihood's.
    assert largest(gradient(-likelihood(model, rows, mask_of("left", model)), model), expected) > limit


def test_a_deep_machine_learns_by_its_hidden_units() -> None:
    """Two pairs of equal bits, in a machine that couples no visible units to one another."""
    pairs = all_states(2).repeat_interleave(2, dim=1)
    model = model_of("deep", scale=0.5)
    where = mask_of("deep", model)
    chains, centering = PersistentChains(500, model), Centering(model)
    positive = PersistentChains(20, model, dataset_size=4)
    optimizer = torch.optim.Adam(model._parameters, 0.01)
    before = float(likelihood(model, pairs, where).detach())
    for _ in range(600):
        optimizer.zero_grad()
        negative_log_likelihood_surrogate(
            model, pairs, chains, 5, where=where, positive_chains=positive, index=torch.arange(4),
            num_positive_sweeps=5, centering=centering,
        ).backward()  # fmt: skip
        optimizer.step()
    # Fair bits have a log-likelihood of -2.77, the truth has -1.39.
    assert before < -2.7
    assert float(likelihood(model, pairs, where).detach()) > -2.1


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("where must be a bool tensor of shape [9], got torch.bool [3]", {"where": torch.ones(3) > 0}),
        ("where must be a bool tensor of shape [9], got torch.bool [5, 9]", {"where": torch.ones(5, 9) > 0}),
        ("where must be a bool tensor of shape [9], got torch.int64 [9]", {"where": torch.ones(9).long()}),
        ("where must be a tensor, got list", {"where": [True] * 9}),
        ("where must name one or more units, got none", {"where": torch.zeros(9) > 0}),
        ("data must have shape [..., 4], got [5, 3]", {"data": torch.zeros(5, 3).double()}),
        ("data must have shape [B, 4], got [4]", {"data": torch.zeros(4).double()}),
        ("data must have shape [B, 4], got [2, 5, 4]", {"data": torch.zeros(2, 5, 4).double()}),
        ("data must hold 0 and 1 only in where, got 0.5", {"data": torch.full((5, 4), 0.5).double()}),
        ("data must lie in [0, 1], got 2.0", {"data": torch.full((5, 4), 2.0).double()}),
        ("data must lie in [0, 1], got nan", {"data": torch.full((5, 4), torch.nan).double()}),
        ("num_positive_sweeps must be at least 1, got 0", {"num_positive_sweeps": 0}),
        ("index must be None without positive_chains, got Tensor", {"index": torch.arange(5)}),
    ],
)
def test_bad_hidden_units(text: str, changes: dict) -> None:
    model = model_of("deep")
    arguments = {
        "data": torch.zeros(5, 4).double(), "chains": PersistentChains(3, model), "where": mask_of("deep", model)
    }  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=f"^negative_log_likelihood_surrogate: {re.escape(text)}$"):
        negative_log_likelihood_surrogate(model, **{**arguments, **changes})


def test_bad_positive_chains() -> None:
    model = model_of("deep")
    data, chains, where = torch.zeros(5, 4).double(), PersistentChains(3, model), mask_of("deep", model)
    per_point = PersistentChains(2, model, dataset_size=6)
    for positive, index, text in (
        (PersistentChains(4, model), None, "data must broadcast to shape [4, 9], got [5, 9]"),
        (per_point, torch.arange(4), "data must broadcast to shape [2, 4, 9], got [5, 9]"),
        (per_point, None, "index must be given if and only if the chains have a dataset_size"),
        (per_point, torch.arange(2, 7), "index must be in [0, 6), got 6"),
    ):
        before = positive.bits.clone()
        with pytest.raises(ValueError, match=f"^negative_log_likelihood_surrogate: {re.escape(text)}"):
            negative_log_likelihood_surrogate(model, data, chains, where=where, positive_chains=positive, index=index)
        assert_same_bits(positive.bits, before)


def test_chains_keep_given_units() -> None:
    for name in ("left", "deep"):
        model = model_of(name)
        chains = PersistentChains(50, model)
        where = mask_of("right", model) if name == "left" else mask_of(name, model)
        given = torch.randint(2, (model.num_units,)).double()
        z = chains.advance_(model, 30, given=given, where=where, seed=2)
        assert z[:, where].eq(given[where]).all()
        assert not z[:, ~where].eq(z[0, ~where]).all()
        with pytest.raises(ValueError, match=r"^PersistentChains: given must hold 0 and 1 only in where, got 2.0$"):
            chains.advance_(model, 30, given=torch.full_like(given, 2), where=where)


# Centred gradients ------------------------------------------------------------------------------------------------


def centred(plain: list[Tensor], offsets: Tensor, model: Boltzmann) -> list[Tensor]:
    """The centred gradient of the docstring, coupling by coupling, of a model without batch dims."""
    of_units = torch.cat(plain[:-1])
    pairs, couplings = model._edges().tolist(), plain[-1].flatten().clone()
    for e, (i, j) in enumerate(pairs):
        couplings[e] -= of_units[i] * offsets[j] + of_units[j] * offsets[i]
    of_biases = of_units.clone()
    for e, (i, j) in enumerate(pairs):
        of_biases[i] -= couplings[e] * offsets[j]
        of_biases[j] -= couplings[e] * offsets[i]
    sizes = [len(bias) for bias in plain[:-1]]
    return [*of_biases.split(sizes), couplings.reshape(plain[-1].shape)]


@NAMES
def test_the_centred_gradient_is_a_step_in_the_centred_parametrisation(name: str) -> None:
    model = model_of(name)
    offsets, where = torch.rand(model.num_units).double(), mask_of(name, model)
    data = random_bits(20, int(where.sum()), dtype=torch.float64)
    plain = gradient(likelihood(model, data, where), model)
    same = model.centered(offsets)
    for parameter, expected in zip(same._parameters, model._parameters, strict=True):
        assert_same_bits(parameter.detach(), expected.detach())
    actual = gradient(likelihood(same, data, where), model)
    for a, e in zip(actual, centred(plain, offsets, model), strict=True):
        assert_close(a, e, 1e-12)
    assert largest(actual, plain) > 0.01
    # Couplings have the difference of covariances.
    z = completions(data, where)
    weights = (-model.energy(z)).softmax(0).detach() / len(data)
    states = all_states(model.num_units)
    p = (-model.energy(states)).softmax(0).detach()
    i, j = model._edges().unbind(1)
    pairs = [((x[..., i] - offsets[i]) * (x[..., j] - offsets[j])).flatten(0, -2) for x in (z, states)]
    covariances = weights.flatten() @ pairs[0] - p @ pairs[1]
    assert_close(actual[-1].flatten(), covariances, 1e-12)


@NAMES
def test_offsets_of_0_give_the_plain_gradient(name: str) -> None:
    model = model_of(name, (2,))
    where = mask_of(name, model)
    data = random_bits(20, 2, int(where.sum()), dtype=torch.float64)
    zeros = torch.zeros(model.num_units).double()
    plain = gradient(likelihood(model, data, where), model)
    for a, e in zip(gradient(likelihood(model.centered(zeros), data, where), model), plain, strict=True):
        assert_close(a, e, 1e-14)


def flipped(values: list[Tensor], model: Boltzmann, is_flipped: Tensor) -> list[Tensor]:
    """The parameters of the model of flipped units; as it is a linear map, steps in the parameters also.

    With z_i = f_i + s_i y_i, couplings get the factors s_i s_j, and biases are s_i times the field at z = f.
    """
    *biases, couplings = values
    sign, fields, new = 1 - 2 * is_flipped.double(), torch.cat(biases).clone(), couplings.flatten().clone()
    for e, (i, j) in enumerate(model._edges().tolist()):
        fields[i] += couplings.flatten()[e] * is_flipped[j]
        fields[j] += couplings.flatten()[e] * is_flipped[i]
        new[e] *= sign[i] * sign[j]
    return [*(sign * fields).split([len(b) for b in biases]), new.reshape(couplings.shape)]


def of_parameters(model: Boltzmann, parameters: list[Tensor]) -> Boltzmann:
    graph = [model.graph] if isinstance(model, GraphBoltzmann) else []
    return type(model)(*graph, *(p.detach().requires_grad_() for p in parameters))


@NAMES
@pytest.mark.parametrize("which", ["all", "visible", "some"])
def test_flipped_data_have_the_flipped_centred_gradient(name: str, which: str) -> None:
    model = model_of(name)
    where = mask_of(name, model)
    is_flipped = {"all": torch.ones_like(where), "visible": where, "some": torch.arange(len(where)) % 3 == 0}[which]
    data, offsets = random_bits(20, int(where.sum()), dtype=torch.float64), torch.rand(len(where)).double()
    mirror = of_parameters(model, flipped([p.detach() for p in model._parameters], model, is_flipped))
    mirror_data = torch.where(is_flipped[where], 1 - data, data)
    mirror_offsets = torch.where(is_flipped, 1 - offsets, offsets)
    assert_close(likelihood(mirror, mirror_data, where), likelihood(model, data, where).detach(), 1e-12)

    def difference(offsets: Tensor, mirror_offsets: Tensor) -> float:
        step = gradient(likelihood(model.centered(offsets), data, where), model)
        mirror_step = gradient(likelihood(mirror.centered(mirror_offsets), mirror_data, where), mirror)
        return largest(mirror_step, flipped(step, model, is_flipped))

    assert difference(offsets, mirror_offsets) < 1e-12
    # The plain gradient has no such symmetry.
    assert difference(0 * offsets, 0 * offsets) > 0.01


@NAMES
@pytest.mark.parametrize("means", ["data", "model", "average"])
def test_the_surrogate_has_the_centred_gradient_of_its_offsets(name: str, means: str) -> None:
    model = model_of(name)
    where = mask_of(name, model)
    data = random_bits(20, int(where.sum()), dtype=torch.float64)
    centering = Centering(model, means, decay=0.25)
    losses = []
    for given in (None, centering):
        torch.manual_seed(5)
        chains = PersistentChains(10, model)
        losses.append(negative_log_likelihood_surrogate(model, data, chains, 2, where=where, centering=given))
    plain, actual = (gradient(loss, model) for loss in losses)
    assert_same_bits(losses[1].detach(), losses[0].detach())
    for a, e in zip(actual, centred(plain, centering.offsets, model), strict=True):
        assert_close(a, e, 1e-12)
    assert largest(actual, plain) > 0.01


@NAMES
def test_the_offsets_are_averages_of_the_means(name: str) -> None:
    model = model_of(name, (2,))
    where = mask_of(name, model)
    data = random_bits(1, 2, int(where.sum()), dtype=torch.float64)
    z = completions(data, where)
    of_data = ((-model.energy(z)).softmax(0).unsqueeze(-1) * z).sum(0)[0].detach()
    of_model = model.mean.detach()
    for means, expected in (("data", of_data), ("model", of_model), ("average", (of_data + of_model) / 2)):
        centering = Centering(model, means, decay=0.25, initial=0.75)
        assert centering.state_dict()["offsets"].shape == (2, model.num_units)
        for call in range(1, 3):
            negative_log_likelihood_surrogate(
                model, data.expand(COUNT, -1, -1), PersistentChains(COUNT, model), 40, where=where,
                num_positive_sweeps=40, centering=centering,
            )  # fmt: skip
            error = centering.offsets - (0.25**call * 0.75 + (1 - 0.25**call) * expected)
            assert error.abs().max() < z_threshold(error.numel()) * 0.5 / COUNT**0.5
    fixed = Centering(model, decay=1, initial=0)
    fixed.update_(of_data, of_model)
    assert fixed.offsets.eq(0).all()


def test_parameters_that_models_share_get_the_sum_of_their_centred_gradients() -> None:
    a, b, W = (p.requires_grad_() for p in random_parameters(3, 2, ((2,), (), ()), dtype=torch.float64))
    offsets = torch.rand(2, 5).double()
    data = random_bits(20, 2, 3, dtype=torch.float64)
    model = BipartiteBoltzmann(a, b, W)

    def loss(model: Boltzmann, data: Tensor) -> Tensor:
        return (model.free_energy(data).mean(0) + exact_log_partition(model)).sum()

    actual = torch.autograd.grad(loss(model.centered(offsets), data), (a, b, W))
    each = [
        gradient(loss(BipartiteBoltzmann(a[m], b, W).centered(offsets[m]), data[:, m]), BipartiteBoltzmann(a, b, W))
        for m in range(2)
    ]
    for value, first, second in zip(actual, *each, strict=True):
        assert_close(value, first + second, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_centred_models_of_other_dtypes(dtype: torch.dtype) -> None:
    for name in ("left", "deep"):
        exact = model_of(name)
        model = of_parameters(exact, [p.to(dtype) for p in exact._parameters])
        same = of_parameters(exact, [p.to(dtype).double() for p in exact._parameters])
        z, offsets = random_bits(5, model.num_units), torch.rand(model.num_units).to(dtype)
        actual = gradient(model.centered(offsets).energy(z).mean(), model)
        expected = gradient(same.centered(offsets.double()).energy(z).mean(), same)
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == dtype
            assert_close(a.double(), e, 1e-2 if dtype == torch.float16 else 1e-6)


def test_bad_centering() -> None:
    model = model_of("deep", (2,))
    for error, text, call in (
        (TypeError, "Centering: model must be a BipartiteBoltzmann or", lambda: Centering(3)),
        (ValueError, "Centering: means must be one of data, model, average, got 'mean'",
         lambda: Centering(model, "mean")),
        (ValueError, "Centering: means must be one of data, model, average, got ['data']",
         lambda: Centering(model, ["data"])),
        (TypeError, "negative_log_likelihood_surrogate: chains must be PersistentChains or None, got int",
         lambda: negative_log_likelihood_surrogate(model, torch.zeros(5, 2, 9).double(), 3)),
        (TypeError, "negative_log_likelihood_surrogate: positive_chains must be PersistentChains or None, got int",
         lambda: negative_log_likelihood_surrogate(model, torch.zeros(5, 2, 9).double(), None, positive_chains=3)),
        (ValueError, "Centering: decay must lie in [0, 1], got 1.5", lambda: Centering(model, decay=1.5)),
        (TypeError, "Centering: initial must be a number, got '0'", lambda: Centering(model, initial="0")),
        (ValueError, "Centering: initial must lie in [0, 1], got nan", lambda: Centering(model, initial=float("nan"))),
        (ValueError, "Centering: data_means must have shape [2, 9], got [9]",
         lambda: Centering(model).update_(torch.zeros(9), torch.zeros(2, 9))),
        (TypeError, "Centering: model_means must be a tensor, got int",
         lambda: Centering(model).update_(torch.zeros(2, 9), 1)),
        (ValueError, "GraphBoltzmann.centered: offsets must broadcast to shape [2, 9], got [8]",
         lambda: model.centered(torch.zeros(8))),
        (TypeError, "GraphBoltzmann.centered: offsets must be a tensor, got float", lambda: model.centered(0.5)),
        (ValueError, "GraphBoltzmann.centered: offsets must be on the model's device, cpu, got meta",
         lambda: model.centered(torch.zeros(9, device="meta"))),
        (TypeError, "negative_log_likelihood_surrogate: centering must be a Centering, got float",
         lambda: negative_log_likelihood_surrogate(model, torch.zeros(5, 2, 9).double(), None, centering=0.5)),
    ):  # fmt: skip
        with pytest.raises(error, match=f"^{re.escape(text)}"):
            call()
