# SPDX-License-Identifier: Apache-2.0
"""Several processes do the work of one, to the bit: chains keep their numbers, wherever they are swept."""

from typing import Any
from unittest.mock import patch

import many
import pytest
import torch
from support import assert_close, assert_same_bits, random_bits, random_parameters
from torch import Tensor, nn

import gibbs_ext as gx
from gibbs_ext import distributed

GRAPH = gx.ChimeraGraph(2)
MANY = gx.BipartiteBoltzmann(torch.zeros(3, 5), torch.zeros(4), torch.zeros(5, 4))


def models() -> dict[str, Any]:
    torch.manual_seed(3)
    return {
        "bipartite": gx.BipartiteBoltzmann(*random_parameters(12, 9)),
        "many": gx.BipartiteBoltzmann(*random_parameters(5, 4, ((3,), (), (3,)))),
        "graph": gx.GraphBoltzmann(GRAPH, torch.randn(GRAPH.num_nodes), torch.randn(2, GRAPH.num_edges)),
    }


# Shares -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 5, 64])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_all_of_it_in_order(count: int, size: int) -> None:
    with patch.object(distributed, "world_size", lambda: size):
        shares = [gx.distributed.share(count, number) for number in range(size)]
    assert [i for s in shares for i in range(s.start, s.stop)] == list(range(count))
    lengths = [s.stop - s.start for s in shares]
    assert max(lengths) - min(lengths) <= 1


def test_one_process_has_everything() -> None:
    assert (gx.distributed.rank(), gx.distributed.world_size()) == (0, 1)
    assert gx.distributed.share(7) == slice(0, 7)
    values = torch.randn(7, 2)
    assert gx.distributed.gather(values.requires_grad_(), 7).equal(values)
    assert not gx.distributed.gather(values, 7).requires_grad
    for model in models().values():
        result = gx.distributed.annealed_importance_sampling(model, 6, 10, seed=4)
        expected = gx.annealed_importance_sampling(model, 6, 10, seed=4)
        assert_same_bits([result.samples, result.log_weights], [expected.samples, expected.log_weights])
        assert_close(result.log_partition, expected.log_partition, 1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gx.distributed.share(-1), "share: count must be at least 0, got -1"),
        (lambda: gx.distributed.share(4, 1), "share: of must be less than the number of processes, 1, got 1"),
        (lambda: gx.distributed.gather(torch.zeros(3), 4), r"gather: values must have shape \[4, ...\], .* got \[3\]"),
        (
            lambda: gx.distributed.gather(torch.tensor(1.0), 1),
            r"gather: values must have shape \[1, ...\], .* got \[\]",
        ),
        (lambda: gx.distributed.gather([1], 1), "gather: values must be a tensor, got list"),
        (
            lambda: gx.distributed.annealed_importance_sampling(models()["graph"], 2, 5, seed=None),
            "annealed_importance_sampling: seed must be an integer or a 0-dim int64 tensor, the same on every process",
        ),
        (
            lambda: gx.distributed.annealed_importance_sampling(MANY, 4, 5, seed=1, initial=torch.zeros(3)),
            r"annealed_importance_sampling: initial must broadcast to shape \[4, 3, 5\], got \[3\]",
        ),
        (
            lambda: gx.distributed.annealed_importance_sampling(models()["graph"], 0, 5, seed=1),
            "annealed_importance_sampling: num_chains must be at least 1, got 0",
        ),
    ],
)
def test_what_is_refused(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call()


# Two processes ----------------------------------------------------------------------------------------------------


def in_parts(fault: str = "") -> dict[str, Any]:
    """The results of a process once the others' parts are there."""
    found: dict[str, Any] = {}
    for name, model in models().items():
        mine = gx.distributed.share(7)
        first = mine.start * model.batch_shape.numel() if fault != "numbers" else 0
        z = model.sample((mine.stop - mine.start,), 5, chain_offset=first, seed=11)
        found[f"sample {name}"] = gx.distributed.gather(z, 7)
        options = {"base": "bias", "seed": 12}
        found[f"ais {name}"] = list(gx.distributed.annealed_importance_sampling(model, 7, 20, **options))
        # One start for all chains: [n], or of each model [*batch, n], also where there are as many models as chains.
        torch.manual_seed(7)
        count = max(2, model.batch_shape.numel())
        for shape in ((), model.batch_shape, (count, *model.batch_shape)):
            options["initial"] = random_bits(*shape, model._num_state_units)
            found[f"ais {name} {shape}"] = list(
                gx.distributed.annealed_importance_sampling(model, count, 20, **options)
            )

        torch.manual_seed(5)
        chains = gx.PersistentChains(7, model)
        chains.advance_(model, 3, part=mine, seed=13)
        found[f"chains {name}"] = gx.distributed.gather(chains.bits[mine], 7)

    for graph, units in ((None, {"num_left": 8, "num_right": 6}), (GRAPH, {"graph": GRAPH})):
        torch.manual_seed(6)
        posterior = gx.nn.BoltzmannPosterior(4, **units, coupling="low_rank", dataset_size=9).eval()
        features, index = torch.randn(5, 4), torch.tensor([8, 0, 3, 4, 1])
        mine = gx.distributed.share(5)
        z = posterior(features[mine], index[mine], chain_offset=mine.start, seed=14).z
        found[f"posterior {graph}"] = gx.distributed.gather(z.detach(), 5)
    return found


def test_two_processes_draw_what_one_draws() -> None:
    one = in_parts()
    for two in many.run(2, in_parts):
        for name, expected in one.items():
            if name.startswith("posterior"):  # its parameters are rounded otherwise, by matrices of other shapes
                assert_close(two[name], expected, 1e-5)
                continue
            if not name.startswith("ais"):
                assert_same_bits(two[name], expected)
                continue
            log_partition, standard_error, log_weights, samples, _ = two[name]
            assert_same_bits([samples, log_weights], [expected[3], expected[2]])
            assert_close(log_partition, expected[0], 1e-12)
            assert_close(standard_error, expected[1], 1e-9)


def test_planted_fault_wrong_chain_numbers_are_noticed() -> None:
    one, (two, _) = in_parts(), many.run(2, in_parts, "numbers")
    assert not any(two[f"sample {name}"].equal(one[f"sample {name}"]) for name in models())


def test_a_distributed_checkpoint_holds_the_chains() -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    nets = [Net(), Net()]
    state = get_model_state_dict(nets[0])
    assert not nets[1].prior.chains.bits.equal(nets[0].prior.chains.bits)
    set_model_state_dict(nets[1], state)
    assert_same_bits(nets[1].prior.chains.bits, nets[0].prior.chains.bits)


class Net(nn.Module):
    """A posterior inside a user's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.posterior = gx.nn.BoltzmannPosterior(8, 16, 16, dataset_size=10, coupling="shared")
        self.prior = gx.nn.BoltzmannPrior(16, 16, num_chains=3)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        total: Tensor = self.posterior(x, index).z.sum() + self.prior.log_partition_surrogate()
        return total


def chains_under_ddp(as_buffers: bool) -> list[bool]:
    """Whether chains of data points that other steps use are kept, and chains of the prior are the process's own."""
    torch.manual_seed(0)
    net = Net()
    torch.manual_seed(gx.distributed.rank() + 1)
    chains = net.posterior.chains
    assert chains is not None
    if as_buffers:
        bits = chains.__dict__.pop("bits")
        chains.register_buffer("bits", bits)
    wrapped, mine = nn.parallel.DistributedDataParallel(net), torch.arange(5) + 5 * gx.distributed.rank()
    wrapped(torch.randn(5, 8), mine).backward()
    before, prior_before = chains.state(mine[2:]), net.prior.chains.state()
    wrapped(torch.randn(2, 8), mine[:2]).backward()
    return [chains.state(mine[2:]).equal(before), not net.prior.chains.state().equal(prior_before)]


@pytest.mark.parametrize("as_buffers", [False, True])
def test_chains_outlive_distributed_data_parallel(as_buffers: bool) -> None:
    results = many.run(2, chains_under_ddp, as_buffers)
    # As buffers, as they once were, those of the second process are overwritten.
    assert [kept for kept, _ in results] == [True, not as_buffers]
    assert all(moved for _, moved in results)


def too_few_chains() -> str:
    try:
        gx.distributed.annealed_importance_sampling(models()["graph"], 1, 5, seed=1)
    except ValueError as error:
        return str(error)
    return ""


def test_every_process_needs_a_chain() -> None:
    expected = "annealed_importance_sampling: num_chains must be at least the number of processes, 2, got 1"
    assert many.run(2, too_few_chains) == [expected] * 2
