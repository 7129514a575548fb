# SPDX-License-Identifier: Apache-2.0
"""Models of some units given the others, and relaxed samples of them: laws, log Z, gradients, and what is refused."""

import re

import pytest
import torch
from graph_support import random_graph_parameters
from support import all_states, assert_close, assert_same_bits, chi_square_excess, random_parameters, z_threshold
from test_given import GRAPH, MAKERS, mask_of
from torch import Tensor

from gibbs_ext import (
    BipartiteBoltzmann,
    ChimeraGraph,
    ColoredGraph,
    GraphBoltzmann,
    annealed_importance_sampling,
    exact_log_partition,
    exact_samples,
    perfect_samples,
)
from gibbs_ext.models import Boltzmann


def of_parameters(model: Boltzmann, parameters: list[Tensor]) -> Boltzmann:
    return type(model)(*([GRAPH] if isinstance(model, GraphBoltzmann) else []), *parameters)


def completions(values: Tensor, where: Tensor) -> Tensor:
    """[2^n, ..., N]: all states that have the values [..., N] where they are given."""
    free = (~where).nonzero()[:, 0]
    states = all_states(len(free)).reshape(-1, *(1,) * (values.dim() - 1), len(free))
    expanded = values.expand(len(states), *values.shape)
    return expanded.index_copy(-1, free, states.expand(*expanded.shape[:-1], len(free)))


# One unit, some of both sides, a whole side of the bipartite model, all units but one, none.
UNITS = pytest.mark.parametrize("units", [[0], [2, 3], [0, 1, 2], [3, 4, 5], [0, 2, 3, 4, 5], []], ids=str)
VALUES = torch.tensor([1.0, 0, 1, 0, 1, 1]).double()


# The model of the free units --------------------------------------------------------------------------------------


@MAKERS
@UNITS
@pytest.mark.parametrize("batch", [((), ()), ((), (4,)), ((4,), ()), ((4,), (3, 1)), ((4,), (3, 4))], ids=str)
def test_energies_and_exact_answers_are_those_of_the_completed_states(make, units: list[int], batch) -> None:
    of_model, of_values = batch
    model, where = make(*of_model), mask_of(units)
    given = torch.randint(2, (*of_values, 6)).double()
    conditional = model.conditioned(given, where)
    assert conditional.model.batch_shape == torch.broadcast_shapes(of_model, of_values)
    assert conditional.free.tolist() == [unit for unit in range(6) if unit not in units]
    z = completions(given.expand(*conditional.model.batch_shape, 6), where)
    states = z[..., ~where]
    energies = model.energy(z).expand(len(z), *conditional.model.batch_shape)
    assert_close(conditional.energy + conditional.model.energy(states), energies, 1e-12)
    assert_close(exact_log_partition(conditional.model) - conditional.energy, (-energies).logsumexp(0), 1e-12)
    assert_close(conditional.model.log_prob(states), (-energies).log_softmax(0), 1e-12)
    expected = ((-energies).softmax(0).unsqueeze(-1) * states).sum(0)
    assert_close(conditional.model.mean, expected, 1e-12)
    assert_same_bits(conditional.complete(states), z)


@MAKERS
@UNITS
def test_the_law_of_completed_samples(make, units: list[int]) -> None:
    model, where = make(), mask_of(units)
    conditional = model.conditioned(VALUES, where)
    fits = (all_states(6)[:, where] == VALUES[where]).all(-1)
    law = torch.where(fits, -model.energy(all_states(6)), -torch.inf).softmax(0)
    for z in (conditional.model.sample((50_000,), 60, seed=1), exact_samples(conditional.model, 50_000, seed=1)):
        z = conditional.complete(z)
        assert z.dtype == torch.float64
        assert z[:, where].eq(VALUES[where]).all()
        assert chi_square_excess(z, law) < 1


@MAKERS
@UNITS
def test_annealing_has_the_sum_over_the_free_units(make, units: list[int]) -> None:
    model, where = make(3), mask_of(units)
    given = torch.randint(2, (3, 6)).double()
    conditional = model.conditioned(given, where)
    energies = model.energy(completions(given, where))
    result = annealed_importance_sampling(conditional.model, 4000, 30, seed=1)
    error = result.log_partition - conditional.energy - (-energies).logsumexp(0)
    assert (error.abs() <= z_threshold(3) * result.standard_error + 1e-6).all()
    assert conditional.complete(result.samples).shape == (4000, 3, 6)


@MAKERS
@UNITS
def test_gradients_of_the_conditional_log_partition_are_those_of_enumeration(make, units: list[int]) -> None:
    model, where = make(2), mask_of(units)
    # Relaxed values, too, have a conditional.
    inputs = [*(p.requires_grad_() for p in model._parameters), torch.rand(4, 2, 6).double().requires_grad_()]

    def conditional_log_partition(*inputs: Tensor) -> Tensor:
        conditional = of_parameters(model, [*inputs[:-1]]).conditioned(inputs[-1], where)
        return conditional.model.log_partition("exact") - conditional.energy

    def enumerated(*inputs: Tensor) -> Tensor:
        return (-of_parameters(model, [*inputs[:-1]]).energy(completions(inputs[-1], where))).logsumexp(0)

    weights = torch.randn(4, 2).double()
    actual, expected = (
        torch.autograd.grad((function(*inputs) * weights).sum(), inputs)
        for function in (conditional_log_partition, enumerated)
    )
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-12)
    if units:
        assert expected[-1][..., where].abs().min() > 0
    assert torch.autograd.gradcheck(conditional_log_partition, inputs)


@MAKERS
@UNITS
def test_conditionals_under_vmap(make, units: list[int]) -> None:
    model, where, given = make(), mask_of(units), torch.randint(2, (5, 6)).double()

    def log_partition(given: Tensor) -> Tensor:
        conditional = model.conditioned(given, where)
        return conditional.model.log_partition("exact") - conditional.energy

    assert_close(torch.vmap(log_partition)(given), log_partition(given), 1e-12)
    options = {"relaxation": "mean_field", "where": where, "initial": torch.zeros(model._num_state_units).double()}
    mapped = torch.vmap(lambda given: model.rsample((), 0, given=given, seed=1, **options))(given)
    assert_close(mapped, model.rsample((5,), 0, given=given, seed=1, **options), 1e-12)
    with pytest.raises(NotImplementedError, match=r"conditioned: where must not be mapped by torch.vmap$"):
        torch.vmap(lambda where: model.conditioned(given, where).energy)(where.expand(2, 6))


@MAKERS
def test_gradient_flows_through_completed_states(make) -> None:
    model = make()
    given = VALUES.clone().requires_grad_()
    conditional = model.conditioned(given, mask_of([1, 4]))
    z = torch.rand(3, 4).double().requires_grad_()
    of_given, of_z = torch.autograd.grad(conditional.complete(z).sum(), (given, z))
    assert of_given.tolist() == [0, 3, 0, 0, 3, 0]
    assert of_z.eq(1).all()


def test_a_few_free_units_of_a_large_model_have_exact_answers() -> None:
    model = BipartiteBoltzmann(*random_parameters(60, 50, dtype=torch.float64))
    where = torch.ones(110, dtype=torch.bool)
    where[[3, 17, 40, 61, 99]] = False
    given = torch.randint(2, (7, 110)).double()
    conditional = model.conditioned(given, where)
    expected = (-model.energy(completions(given, where))).logsumexp(0)
    assert_close(exact_log_partition(conditional.model) - conditional.energy, expected, 1e-12)
    with pytest.raises(ValueError, match="the smaller side of 60"):
        exact_log_partition(model)


def test_a_conditional_on_a_chimera_graph_keeps_the_lattice() -> None:
    """Only the lattice tells the exact sum a good order; another graph of these nodes is too large for it."""
    graph = ChimeraGraph(3, 12, missing_nodes=[3, 20], missing_edges=[(0, 4)])
    model = GraphBoltzmann(graph, *random_graph_parameters(graph, dtype=torch.float64))
    where = torch.zeros(graph.num_nodes, dtype=torch.bool).index_fill(0, torch.tensor([7, 50, 100]), True)
    given = torch.randint(2, (2, graph.num_nodes)).double()
    conditional = model.conditioned(given, where)
    # The given states' probability, by two sums over the rest that differ in which units are given.
    fewer = where.index_fill(0, torch.tensor([50]), False)
    on, off = (model.conditioned(given.index_fill(1, torch.tensor([50]), value), where) for value in (1, 0))
    parts = torch.stack([exact_log_partition(c.model) - c.energy for c in (on, off)])
    whole = model.conditioned(given, fewer)
    assert_close(exact_log_partition(whole.model) - whole.energy, parts.logsumexp(0), 1e-12)
    assert isinstance(conditional.model, GraphBoltzmann)
    on_lattice = conditional.model.graph
    assert isinstance(on_lattice, ChimeraGraph)
    plain = ColoredGraph(on_lattice.num_nodes, on_lattice.edges, on_lattice.colors)
    with pytest.raises(ValueError, match="the graph needs tables"):
        exact_log_partition(GraphBoltzmann(plain, conditional.model.bias, conditional.model.coupling))


def test_a_frustrated_unit_that_is_given_leaves_perfect_samples() -> None:
    """A triangle of negative couplings has no perfect samples; given one of its units, it has."""
    triangle = ColoredGraph(3, [(0, 1), (1, 2), (0, 2)])
    model = GraphBoltzmann(triangle, torch.randn(3).double(), -torch.rand(3).double())
    with pytest.raises(ValueError, match="odd number of couplings below 0"):
        perfect_samples(model, 1)
    where = torch.tensor([False, True, False])
    conditional = model.conditioned(torch.ones(3), where)
    z = conditional.complete(perfect_samples(conditional.model, 20_000, seed=1))
    fits = all_states(3)[:, 1] == 1
    law = torch.where(fits, -model.energy(all_states(3)), -torch.inf).softmax(0)
    assert chi_square_excess(z, law) < 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@MAKERS
def test_conditionals_of_other_dtypes(make, dtype: torch.dtype) -> None:
    exact = make()
    model = of_parameters(exact, [p.to(dtype) for p in exact._parameters])
    same = of_parameters(exact, [p.to(dtype).double() for p in exact._parameters])
    conditional, expected = (m.conditioned(VALUES, mask_of([1, 3])) for m in (model, same))
    assert conditional.model.dtype == dtype
    assert conditional.complete(conditional.model.sample((5,), 3)).dtype == dtype
    assert conditional.energy.dtype == torch.float32
    tolerance = 1e-2 if dtype == torch.float16 else 1e-5
    assert_close(conditional.model.log_partition("exact"), expected.model.log_partition("exact"), tolerance)
    assert_close(conditional.energy, expected.energy.float(), 1e-6)


@MAKERS
@pytest.mark.parametrize(
    ("error", "text", "given", "where"),
    [
        (ValueError, "where must be one mask [6] for all models and chains (sample", VALUES, torch.ones(5, 6) > 0),
        (ValueError, "where must be one mask [6] for all models and chains (sample", VALUES, mask_of([1])[1:]),
        (ValueError, "where must be a bool tensor, got torch.int64", VALUES, mask_of([1]).long()),
        (ValueError, "where must leave one or more units free, got all 6", VALUES, mask_of([*range(6)])),
        (ValueError, "given must have batch dims that broadcast against [2], got shape [3, 6]", VALUES.expand(3, 6), mask_of([1])),  # noqa: E501
        (ValueError, "given must broadcast to shape [2, 6], got [5]", VALUES[1:], mask_of([1])),
        (ValueError, "given must lie in [0, 1] in where, got 2.0", 2 * VALUES, mask_of([0])),
        (ValueError, "given must lie in [0, 1] in where, got nan", torch.nan * VALUES, mask_of([0])),
        (TypeError, "given must be a tensor, got int", 1, mask_of([1])),
        (TypeError, "where must be a tensor, got list", VALUES, [True]),
        (ValueError, "where must be on the model's device, cpu, got meta", VALUES, mask_of([1]).to("meta")),
    ],
)  # fmt: skip
def test_bad_conditions(make, error: type[Exception], text: str, given: Tensor, where: Tensor) -> None:
    model = make(2)
    with pytest.raises(error, match=f"^{type(model).__name__}.conditioned: {re.escape(text)}"):
        model.conditioned(given, where)


@MAKERS
def test_states_that_cannot_be_completed(make) -> None:
    conditional = make(2).conditioned(VALUES.expand(2, 6), mask_of([1, 2]))
    for z, text in (
        (torch.zeros(6), "z must have shape [..., 4], got [6]"),
        (torch.zeros(3, 4), "z must have batch dims that broadcast against [2], got [3]"),
    ):
        with pytest.raises(ValueError, match=f"^Conditional.complete: {re.escape(text)}$"):
            conditional.complete(z)
    with pytest.raises(TypeError, match=r"^Conditional.complete: z must be a tensor, got int$"):
        conditional.complete(3)


# Relaxed samples --------------------------------------------------------------------------------------------------


@MAKERS
@UNITS
def test_relaxed_sweeps_are_those_of_the_model_of_the_free_units(make, units: list[int]) -> None:
    """Mean-field sweeps have no randomness."""
    model, where = make(2), mask_of(units)
    given, start = torch.rand(2, 6).double(), torch.rand(5, 2, 6).double()
    n = model._num_state_units
    options = {"relaxation": "mean_field", "num_relaxed_sweeps": 3}
    z = model.rsample((5,), 0, initial=start[..., :n], given=given, where=where, **options)
    conditional = model.conditioned(given, where)
    m = conditional.model._num_state_units
    initial = start[..., conditional.free][..., :m]
    assert_close(z, conditional.complete(conditional.model.rsample((5,), 0, initial=initial, **options)), 1e-12)


@MAKERS
@UNITS
def test_the_law_of_binary_and_straight_through_sweeps(make, units: list[int]) -> None:
    model, where = make(), mask_of(units)
    z = model.rsample((50_000,), 60, relaxation="straight_through", given=VALUES, where=where, seed=1)
    fits = (all_states(6)[:, where] == VALUES[where]).all(-1)
    law = torch.where(fits, -model.energy(all_states(6)), -torch.inf).softmax(0)
    assert z[:, where].eq(VALUES[where]).all()
    assert chi_square_excess(z, law) < 1


@MAKERS
def test_gradients_of_relaxed_samples(make) -> None:
    model, where = make(), torch.rand(4, 6) < 0.5  # a mask for each chain
    n = model._num_state_units
    start = torch.rand(4, n).double()
    inputs = [*(p.requires_grad_() for p in model._parameters), torch.rand(4, 6).double().requires_grad_()]

    def relaxed(relaxation: str):
        def function(*inputs: Tensor) -> Tensor:
            return of_parameters(model, [*inputs[:-1]]).rsample(
                (4,), 0, 2, relaxation=relaxation, initial=start, given=inputs[-1], where=where, seed=3
            )

        return function

    for relaxation in ("mean_field", "concrete"):
        assert torch.autograd.gradcheck(relaxed(relaxation), inputs)
        z = relaxed(relaxation)(*inputs)
        assert z[where].eq(inputs[-1][where]).all()
        # A free unit's gradient reaches the given neighbours, and no value that is not given.
        (of_given,) = torch.autograd.grad(z[~where].sum(), inputs[-1])
        assert of_given[~where].eq(0).all()
        assert of_given[where].abs().max() > 0.01


@MAKERS
def test_each_relaxed_chain_has_its_own_values_and_mask(make) -> None:
    model = make(4)
    given, where = torch.rand(5, 4, 6).double(), torch.rand(5, 1, 6) < 0.5
    z = model.rsample((5,), 7, given=given, where=where, seed=2)
    for s, m in ((0, 1), (4, 3)):
        one = model._mapped(lambda tensor, dim, m=m: tensor[m] if tensor.dim() > dim else tensor)
        alone = one.rsample((), 7, given=given[s, m], where=where[s, 0], seed=2, chain_offset=4 * s + m)
        assert_close(alone, z[s, m], 1e-12)
    nothing = model.rsample((5,), 7, given=given, where=mask_of([]), seed=2)
    assert_same_bits(nothing, model.rsample((5,), 7, seed=2))
    with pytest.raises(AssertionError):
        assert_same_bits(nothing, z)


@MAKERS
def test_bad_given_values_of_relaxed_samples(make) -> None:
    model = make()
    name = f"^{type(model).__name__}.rsample: "
    for error, text, options in (
        (ValueError, "where must be given together with given, got None", {"given": VALUES}),
        (ValueError, "given must lie in [0, 1] in where, got -1.0", {"given": -VALUES, "where": mask_of([0])}),
        (ValueError, "where must broadcast to shape [2, 6], got [3, 6]", {"given": VALUES, "where": torch.ones(3, 6) > 0}),  # noqa: E501
        (ValueError, "where must be a bool tensor, got torch.float32", {"given": VALUES, "where": torch.ones(6)}),
    ):  # fmt: skip
        with pytest.raises(error, match=name + re.escape(text)):
            model.rsample((2,), 1, **options)
