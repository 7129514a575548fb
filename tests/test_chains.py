# SPDX-License-Identifier: Apache-2.0
import copy
import io

import numpy as np
import pytest
import torch
from graph_support import chimera_cell, random_graph_parameters
from support import assert_bits, assert_same_bits, chi_square_excess, exact_probabilities, random_parameters

from gibbs_ext import (
    BipartiteBoltzmann,
    ChimeraGraph,
    GraphBoltzmann,
    PersistentChains,
    bipartite_gibbs,
    graph_gibbs,
    pack_bits,
    unpack_bits,
)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 31, 33, 64, 129])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_pack_bits(n, dtype):
    bits = torch.randint(2, (3, 5, n)).to(dtype)
    packed = pack_bits(bits)
    expected = np.packbits(bits.numpy().astype(np.uint8), axis=-1, bitorder="little")
    assert_same_bits(packed, torch.from_numpy(expected))
    assert_same_bits(unpack_bits(packed, n), bits.to(torch.uint8))
    assert pack_bits(bits[:0]).shape == (0, 5, -(-n // 8))


def model_of(batch=(), n1=13, n2=9):
    return BipartiteBoltzmann(*random_parameters(n1, n2, (batch, (), batch)))


def graph_model_of(batch=()):
    """13 units, as many as the left side of model_of."""
    graph = ChimeraGraph(1, 2, 4, missing_nodes=[3, 7, 8])
    return GraphBoltzmann(graph, *random_graph_parameters(graph, (batch, batch)))


MAKERS = pytest.mark.parametrize("make", [model_of, graph_model_of])


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
@MAKERS
def test_state_and_store(make, batch):
    model = make(batch)
    chains = PersistentChains(6, model)
    assert chains.bits.shape == (6, *batch, 2)
    state = chains.state()
    assert state.shape == (6, *batch, 13)
    assert 0.3 < state.float().mean() < 0.7
    assert_bits(state)
    new = 1 - state
    chains.store_(new.float())
    assert_same_bits(chains.state(), new)
    with pytest.raises(ValueError, match=r"^PersistentChains: state must have shape"):
        chains.store_(new[:1])


def swept(model, state, num_sweeps, generator):
    if isinstance(model, GraphBoltzmann):
        return graph_gibbs(state, model.bias, model.coupling, model.graph, num_sweeps, generator=generator)
    sides = model.left_bias, model.right_bias, model.weight
    return torch.cat(bipartite_gibbs(state, *sides, num_sweeps, generator=generator), -1)


@pytest.mark.parametrize("batch", [(), (4,)])
@MAKERS
def test_advance_is_block_gibbs(make, batch):
    model = make(batch)
    chains = PersistentChains(6, model)
    start = chains.state().float()
    z = chains.advance_(model, 4, generator=torch.Generator().manual_seed(5))
    assert_same_bits(z, swept(model, start, 4, torch.Generator().manual_seed(5)))
    assert z.shape == (6, *batch, model.num_units)
    assert_same_bits(chains.state().float(), z[..., :13])
    assert not chains.advance_(model, 4).equal(z)
    with pytest.raises(ValueError, match=r"^PersistentChains: num_sweeps"):
        chains.advance_(model, 0)


@pytest.mark.parametrize("batch", [(), (4,)])
def test_a_model_that_does_not_fit_the_chains(batch):
    chains = PersistentChains(6, graph_model_of(batch))
    with pytest.raises((ValueError, RuntimeError), match=r"^PersistentChains: state"):
        chains.advance_(graph_model_of((2,)) if batch else GraphBoltzmann(ChimeraGraph(1), *chimera_cell()[0]), 1)


@MAKERS
def test_chains_per_data_point(make):
    chains = PersistentChains(3, make(), dataset_size=10)
    assert chains.bits.shape == (10, 3, 2)
    before = chains.bits.clone()
    index = torch.tensor([7, 2, 5, 0])
    state = chains.state(index)
    assert state.shape == (3, 4, 13)
    for b, point in enumerate(index):
        assert_same_bits(state[:, b], unpack_bits(before[point], 13))
    model = make((4,))
    z = chains.advance_(model, 2, index)
    assert z.shape == (3, 4, model.num_units)
    assert_same_bits(chains.state(index).float(), z[..., :13])
    others = torch.tensor([1, 3, 4, 6, 8, 9])
    assert_same_bits(chains.bits[others], before[others])
    assert not chains.bits[index].equal(before[index])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "index must be given"),
        (torch.tensor([0, 10]), r"index must be in \[0, 10\)"),
        (torch.tensor([-1]), r"index must be in \[0, 10\)"),
        (torch.tensor([0.0]), r"index must be int64 \[B\]"),
        (torch.tensor([[0]]), r"index must be int64 \[B\]"),
    ],
)
def test_bad_index(index, message):
    chains = PersistentChains(3, model_of(), dataset_size=10)
    before = chains.bits.clone()
    with pytest.raises(ValueError, match=f"^PersistentChains: {message}"):
        chains.state(index)
    with pytest.raises(ValueError, match=f"^PersistentChains: {message}"):
        chains.advance_(model_of((1,)), 1, index)
    with pytest.raises(ValueError, match=r"^PersistentChains: index must be given"):
        PersistentChains(3, model_of()).state(torch.tensor([0]))
    assert_same_bits(chains.bits, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_chains": 0}, "num_chains must be at least 1, got 0"),
        ({"num_chains": 2.5}, "num_chains must be an integer, got 2.5"),
        ({"dataset_size": 0}, "dataset_size must be at least 1, got 0"),
        ({"model": 3}, "model must be a BipartiteBoltzmann or a GraphBoltzmann, got int"),
    ],
)
def test_bad_construction(change, message):
    with pytest.raises((TypeError, ValueError), match=f"^PersistentChains: {message}$"):
        PersistentChains(**{"num_chains": 2, "model": model_of(), **change})


@pytest.mark.parametrize("value", [7, 0.5, -1, float("nan")])
def test_only_bits_are_packed(value):
    bits = torch.ones(3, 13)
    bits[1, 2] = value
    with pytest.raises(ValueError, match=f"^pack_bits: bits must hold 0 and 1 only, got {float(value)}$"):
        pack_bits(bits)
    chains = PersistentChains(3, model_of())
    before = chains.bits.clone()
    with pytest.raises(ValueError, match=f"^PersistentChains: state must hold 0 and 1 only, got {float(value)}$"):
        chains.store_(bits)
    assert_same_bits(chains.bits, before)


@MAKERS
def test_state_dict_round_trip(make):
    model = make()
    chains = PersistentChains(6, model)
    chains.advance_(model, 3)
    file = io.BytesIO()
    torch.save(chains.state_dict(), file)
    file.seek(0)
    restored = PersistentChains(6, model)
    assert not restored.state().equal(chains.state())
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert_same_bits(restored.state(), chains.state())
    torch.manual_seed(1)
    expected = chains.advance_(model, 3)
    torch.manual_seed(1)
    assert_same_bits(restored.advance_(model, 3), expected)


def test_chains_reach_the_model():
    """Many short advances mix as well as one long run."""
    p = random_parameters(4, 3, scale=0.8)
    model = BipartiteBoltzmann(*p)
    chains = PersistentChains(100_000, model)
    for _ in range(8):
        z = chains.advance_(model, 2)
    assert chi_square_excess(z, exact_probabilities(p)) < 1
    # Planted fault: a chain that is not stored starts anew each time.
    fresh = PersistentChains(100_000, model).advance_(model, 1)
    assert chi_square_excess(fresh, exact_probabilities(p)) > 1


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (slice(0.5, 2), "part must be a slice of integers"),
        (slice(0, 4, 2), "part must be a slice of step 1"),
        (3, "part must be a slice of step 1"),
        (slice(2, 2), "part must hold one or more of 6 chains"),
        (slice(6, 9), "part must hold one or more of 6 chains"),
    ],
)
def test_bad_part(part, message):
    model = model_of()
    chains = PersistentChains(6, model)
    before = chains.bits.clone()
    for call in (lambda: chains.state(part=part), lambda: chains.advance_(model, 1, part=part)):
        with pytest.raises((TypeError, ValueError), match=f"^PersistentChains: {message}"):
            call()
    assert_same_bits(chains.bits, before)
    with pytest.raises(ValueError, match=r"^PersistentChains: part must be None where"):
        PersistentChains(6, model_of(), dataset_size=3).state(torch.tensor([0]), part=slice(0, 2))


def test_parts_are_those_of_the_whole():
    torch.manual_seed(0)
    model = model_of()
    whole, parts = PersistentChains(6, model), PersistentChains(6, model)
    parts.load_state_dict(whole.state_dict())
    expected = whole.advance_(model, 3, seed=5)
    for part in (slice(0, 2), slice(2, -1), slice(5, None)):
        actual = parts.advance_(model, 3, seed=5, part=part)
        assert_same_bits(actual, expected[part])
    assert_same_bits(parts.bits, whole.bits)


def test_chains_are_no_buffers_and_move_and_load_as_such():
    chains = PersistentChains(6, model_of())
    assert [name for name, _ in chains.named_buffers()] == ["num_units"]
    assert set(chains.state_dict()) == {"bits", "num_units"}
    assert chains.to("meta").bits.device.type == "meta"
    other = PersistentChains(5, model_of())
    with pytest.raises(RuntimeError, match="size mismatch for bits"):
        other.load_state_dict(PersistentChains(6, model_of()).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*\"bits\""):
        other.load_state_dict({})
    assert other.half().bits.dtype == torch.uint8
    assert_same_bits(copy.deepcopy(other).bits, other.bits)


def test_chains_of_another_number_of_units_do_not_load():
    """Chains of 13 units take as many bytes as chains of 16."""
    saved, other = PersistentChains(6, model_of()), PersistentChains(6, model_of(n1=16))
    with pytest.raises(RuntimeError, match="num_units: the state is that of chains of 13 units, these have 16"):
        other.load_state_dict(saved.state_dict())
