# SPDX-License-Identifier: Apache-2.0
"""Runs in this process have one thread, as those in the processes that tests start: sums depend on the number."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
