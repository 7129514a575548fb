# SPDX-License-Identifier: Apache-2.0
"""The AIS op has the reference's states to the bit, and its log-weights to float64 accuracy."""

import pytest
import torch
from support import BROADCASTS, assert_close, assert_same_bits, random_bits, random_parameters

from gibbs_ext import bipartite_ais, bipartite_gibbs
from gibbs_ext.reference import bipartite_ais_reference

SIZES = [(1, 1), (1, 33), (3, 1), (31, 33), (100, 129)]


def both(*args, **kwargs):
    actual, expected = bipartite_ais(*args, **kwargs), bipartite_ais_reference(*args, **kwargs)
    assert_same_bits(actual[:2], expected[:2])
    assert actual[2].dtype == torch.float64
    # Its logits are float32, the reference's float64.
    assert_close(actual[2], expected[2], 1e-5)
    return actual


def base_of(parameters):
    return 0.3 * torch.randn_like(parameters.left_bias), 0.3 * torch.randn_like(parameters.right_bias)


@pytest.mark.parametrize(("n1", "n2"), SIZES)
@pytest.mark.parametrize("broadcast", BROADCASTS)
def test_agrees_with_reference(n1, n2, broadcast, instruction_set):
    (state, *batches), shape = BROADCASTS[broadcast]
    p = random_parameters(n1, n2, batches)
    left, right, log_weights = both(
        random_bits(*state, n1), *p, *base_of(p), torch.linspace(0, 1, 6).double(), seed=n1 * 1000 + n2
    )
    assert (left.shape, right.shape, log_weights.shape) == ((*shape, n1), (*shape, n2), shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("state_dtype", [torch.bool, torch.float32])
def test_dtypes(dtype, state_dtype):
    p = random_parameters(9, 14, ((), (), (5,)), dtype=dtype)
    both(random_bits(5, 9, dtype=state_dtype), *p, *base_of(p), [0.0, 0.3, 1.0], seed=1)


@pytest.mark.parametrize("betas", [[0.5], [0.2, 0.2], [1.0, 0.6, 0.0], [0.0, 1.0], torch.linspace(0, 1, 40).double()])
@pytest.mark.parametrize("shared", [True, False])
def test_schedules(betas, shared, instruction_set):
    p = random_parameters(20, 31, ((), (), () if shared else (9,)))
    left = random_bits(9, 20)
    new_left, right, log_weights = both(left, *p, *base_of(p), betas, seed=3, sweep_offset=5, chain_offset=2**32 - 3)
    if len(betas) == 1:
        assert_same_bits((new_left, right, log_weights), (left, torch.zeros(9, 31), torch.zeros(9).double()))


@pytest.mark.filterwarnings("ignore::gibbs_ext.CouplingResolutionWarning")
def test_beta_zero_is_the_base_whatever_the_couplings(instruction_set):
    """Fields overflow float32, and 0 times them must not be NaN."""
    p = random_parameters(30, 40)
    p = p._replace(weight=p.weight.sign() * 1e37)
    base, left = base_of(p), random_bits(200, 30)
    drawn = both(left, *p, *base, [0.0, 0.0, 0.0], seed=4)
    assert not drawn[2].any()
    assert_same_bits(drawn[:2], bipartite_gibbs(left, *base, torch.zeros(30, 40), 2, seed=4))


def test_sweeps_at_beta_one_are_those_of_bipartite_gibbs():
    p = random_parameters(30, 40)
    left = random_bits(50, 30)
    actual = bipartite_ais(left, *p, *base_of(p), [1.0] * 5, seed=3)
    assert_same_bits(actual[:2], bipartite_gibbs(left, *p, 4, seed=3))
    assert not actual[2].any()


def test_one_step_is_importance_sampling():
    """log f_1(left) - log f_0(left), from its definition."""
    p = random_parameters(6, 7, dtype=torch.float64, scale=0.5)
    base_left, base_right = base_of(p)
    left = random_bits(20, 6, dtype=torch.float64)
    log_weights = bipartite_ais(left, *p, base_left, base_right, [0.0, 1.0], seed=0)[2]
    softplus = torch.nn.functional.softplus
    after = left @ p.left_bias + softplus(left @ p.weight + p.right_bias).sum(-1)
    before = left @ base_left + softplus(base_right).sum()
    assert_close(log_weights, after - before, 1e-6)  # couplings are rounded to 2^-k


def test_long_schedules_do_not_drift():
    p = random_parameters(50, 50, scale=2.0)
    args = (random_bits(4, 50), *p, p.left_bias, p.right_bias, torch.linspace(0, 1, 3001).double())
    actual, expected = bipartite_ais(*args, seed=1), bipartite_ais_reference(*args, seed=1)
    assert_same_bits(actual[:2], expected[:2])
    assert (actual[2] - expected[2]).abs().max() < 1e-3


@pytest.mark.parametrize("shared", [True, False])
def test_invariances(shared, threads):
    p = random_parameters(33, 20, ((), (), () if shared else (64,)))
    base, left, betas = base_of(p), random_bits(64, 33), torch.linspace(0, 1, 11).double()
    torch.set_num_threads(1)
    together = bipartite_ais(left, *p, *base, betas, seed=8)
    torch.set_num_threads(2)
    assert_same_bits(bipartite_ais(left, *p, *base, betas, seed=8), together)
    weight = p.weight if shared else p.weight[7]
    alone = bipartite_ais(left[7], *p[:2], weight, *base, betas, seed=8, chain_offset=7)
    assert_same_bits(alone[:2], [side[7] for side in together[:2]])
    assert_close(alone[2], together[2][7], 1e-12)
    # 10 steps are the same as 3 and then 7.
    first = bipartite_ais(left, *p, *base, betas[:4], seed=8)
    rest = bipartite_ais(first[0], *p, *base, betas[3:], seed=8, sweep_offset=3)
    assert_same_bits(rest[:2], together[:2])
    assert_close(first[2] + rest[2], together[2], 1e-12)


@pytest.mark.parametrize("empty", [(0,), (3, 0)])
def test_empty_batches(empty):
    p = random_parameters(5, 7, ((), (), empty))
    outputs = bipartite_ais(torch.zeros(*empty, 5), *p, torch.zeros(5), torch.zeros(7), [0.0, 1.0], seed=0)
    assert [x.shape for x in outputs] == [(*empty, 5), (*empty, 7), empty]
