# SPDX-License-Identifier: Apache-2.0
"""bench/call_cost.py: its peers make the sweeps that gibbs_ext makes."""

import pytest
from torch import Tensor

from bench import call_cost, harness
from bench.tables import OURS

CASES = list(call_cost.cases(chains=200_000))


@pytest.fixture(autouse=True)
def _one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_cost, "CALLS", 1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_peers_agree(case: harness.Case) -> None:
    ours, peer = (
        [result] if isinstance(result, Tensor) else list(result)
        for result in (case.contenders[name](case.inputs())() for name in (OURS, "PyTorch, rand"))
    )
    assert [x.shape for x in ours] == [x.shape for x in peer]
    for x, y in zip(ours, peer, strict=True):
        if "backward" in case.name:  # sums over the chains
            assert (x - y).norm() < 0.03 * y.norm()
            continue
        limit = 6 * ((x.var(0) + y.var(0)) / len(x)).sqrt()
        assert (x.mean(0) - y.mean(0)).abs().lt(limit).all()
