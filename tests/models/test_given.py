# SPDX-License-Identifier: Apache-2.0
"""Samples of some units given the others: their law, the given values, and what is refused."""

import re

import pytest
import torch
from graph_support import random_graph, random_graph_parameters
from support import all_states, assert_same_bits, chi_square_excess, random_parameters
from torch import Tensor

from gibbs_ext import BipartiteBoltzmann, GraphBoltzmann
from gibbs_ext.models.base import Boltzmann

GRAPH = random_graph(6, 9, seed=4)


def bipartite(*batch: int) -> Boltzmann:
    return BipartiteBoltzmann(*random_parameters(3, 3, ((), (), batch), dtype=torch.float64))


def on_graph(*batch: int) -> Boltzmann:
    return GraphBoltzmann(GRAPH, *random_graph_parameters(GRAPH, ((), batch), dtype=torch.float64))


MAKERS = pytest.mark.parametrize("make", [bipartite, on_graph])
MASKS = [[0], [2, 3], [0, 1, 2], [3, 4, 5], [0, 2, 3, 5], []]


def mask_of(units: list[int]) -> Tensor:
    return torch.zeros(6, dtype=torch.bool).index_fill(0, torch.tensor(units, dtype=torch.long), True)


MASK = mask_of([1])


@MAKERS
@pytest.mark.parametrize("units", MASKS, ids=str)
def test_the_law_given_some_units(make, units: list[int]) -> None:
    model, where, values = make(), mask_of(units), torch.tensor([1.0, 0, 1, 0, 1, 1])
    z = model.sample((50_000,), 60, given=values, where=where, seed=1)
    assert z.dtype == torch.float64
    assert z[:, where].eq(values[where]).all()
    states = all_states(6)
    fits = (states[:, where] == values[where]).all(-1)
    weights = torch.where(fits, -model.energy(states), -torch.inf)
    assert chi_square_excess(z, weights.softmax(0)) < 1


@MAKERS
def test_each_chain_has_its_own_values_and_mask(make) -> None:
    model = make(4)
    given, where = torch.randint(2, (5, 4, 6)), torch.rand(5, 1, 6) < 0.5
    z = model.sample((5,), 7, given=given, where=where, seed=2)
    where = where.expand(5, 4, 6)
    assert z[where].eq(given[where]).all()
    for s, m in ((0, 1), (4, 3)):
        one = model._mapped(lambda tensor, dim, m=m: tensor[m] if tensor.dim() > dim else tensor)
        alone = one.sample((), 7, given=given[s, m], where=where[s, m], seed=2, chain_offset=4 * s + m)
        assert_same_bits(alone, z[s, m])


@MAKERS
def test_values_that_are_not_asked_for_do_not_matter(make) -> None:
    model, where = make(), mask_of([1, 4])
    z = model.sample((9,), 5, given=torch.ones(6), where=where, seed=1)
    assert_same_bits(model.sample((9,), 5, given=torch.where(where, 1.0, torch.nan), where=where, seed=1), z)
    assert_same_bits(model.sample((9,), 5, given=torch.ones(6, dtype=torch.bool), where=where, seed=1), z)
    nothing = model.sample((9,), 5, given=torch.ones(6), where=mask_of([]), seed=1)
    assert_same_bits(nothing, model.sample((9,), 5, seed=1))


@MAKERS
@pytest.mark.parametrize("num_sweeps", [0, 3])
def test_a_start_of_ones_own_takes_the_given_values(make, num_sweeps: int) -> None:
    model = make()
    initial = torch.ones(model._num_state_units)
    z = model.sample((2,), num_sweeps, initial=initial, given=torch.zeros(6), where=mask_of([0, 5]), seed=1)
    assert z[:, [0, 5]].eq(0).all()
    if num_sweeps == 0:
        assert z[:, [1, 2]].eq(1).all()


@MAKERS
@pytest.mark.parametrize(
    ("error", "text", "options"),
    [
        (ValueError, "where must be given together with given, got None", {"given": torch.zeros(6)}),
        (ValueError, "given must be given together with where, got None", {"where": MASK}),
        (ValueError, "given must broadcast to shape [2, 6], got [5]", {"given": torch.zeros(5), "where": MASK}),
        (ValueError, "where must broadcast to shape [2, 6], got [5]", {"given": torch.zeros(6), "where": MASK[1:]}),
        (ValueError, "where must be a bool tensor, got torch.int64", {"given": torch.zeros(6), "where": MASK.long()}),
        (ValueError, "given must hold 0 and 1 only in where, got 0.5", {"given": torch.full((6,), 0.5), "where": MASK}),
        (TypeError, "given must be a tensor, got int", {"given": 1, "where": MASK}),
        (ValueError, "where must be on the model's device, cpu, got meta", {"given": MASK, "where": MASK.to("meta")}),
    ],
)
def test_bad_arguments(make, error: type[Exception], text: str, options: dict) -> None:
    model = make()
    with pytest.raises(error, match=f"^{type(model).__name__}.sample: {re.escape(text)}"):
        model.sample((2,), 1, **options)
