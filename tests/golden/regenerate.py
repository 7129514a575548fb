# SPDX-License-Identifier: Apache-2.0
"""Writes bipartite.txt from the Python reference.

What it holds is the sampling contract: a line that changes is a breaking change, which CHANGELOG.md must name. Run
``python tests/golden/regenerate.py`` then, and at no other time.
"""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch

from gibbs_ext import pack_bits

FILE = Path(__file__).with_name("bipartite.txt")


def parameters(n1: int, n2: int, models: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Small exact fractions by formula, so that no random generator has a say."""
    i, j, m = torch.arange(n1), torch.arange(n2), torch.arange(max(models, 1))
    weight = ((i[:, None] * 7 + j * 13 + m[:, None, None] * 5) % 11 - 5) / 16
    return (i * 5 % 9 - 4) / 8, (j * 3 % 7 - 3) / 8, weight if models else weight[0]


def hexadecimal(state: torch.Tensor) -> str:
    return pack_bits(state).numpy().tobytes().hex()


def vectors(core: ModuleType | SimpleNamespace, gibbs, ais) -> Iterator[str]:
    """One line each; ``core`` has random_word, threshold and round_couplings."""
    for numbers in [(0, 0, 0, 0), (1, 2, 3, 4), (-1, 2**48 - 1, 2**44 - 1, 1000), (2**63 - 1, 2**32, 2**32, 127)]:
        yield f"random_word {' '.join(map(str, numbers))} = {core.random_word(*numbers):08x}"
    for x in [0.0, 1e-3, -0.5, 1.0, -3.25, 7.5, -15.0, 21.0, -30.0, 60.0, -89.0, 100.0]:
        yield f"threshold {x} = {int(core.threshold(np.array([x], np.float32))[0]):08x}"
    for scale in [1e-6, 0.1, 1.0, 3.7, 1e5]:
        weight = (parameters(20, 30)[2] * scale).numpy()
        rounded, k = core.round_couplings(weight)
        yield f"round_couplings {scale} = {k} {int(rounded[3, 5])} {int(rounded.astype(np.int64).sum())}"
    for n1, n2, models, chains, seed in [
        (1, 1, 0, 8, 0),
        (33, 17, 0, 3, 1),
        (40, 129, 2, 1, -5),
        (130, 64, 3, 2, 2**40),
    ]:
        p = parameters(n1, n2, models)
        start = torch.zeros(chains, *([models] if models else []), n1)
        beta = torch.linspace(0.25, 1.25, 5)
        options = {"seed": seed, "chain_offset": 2**33, "sweep_offset": 7}
        left, right = gibbs(start, *p, 5, beta=beta, **options)
        name = f"{n1} {n2} {models} {chains} {seed}"
        yield f"bipartite_gibbs {name} = {hexadecimal(left)} {hexadecimal(right)}"
        left, right, _ = ais(start, *p, p[0] / 2, p[1] / 2, torch.linspace(0, 1, 6).double(), **options)
        yield f"bipartite_ais {name} = {hexadecimal(left)} {hexadecimal(right)}"


if __name__ == "__main__":
    from gibbs_ext import reference

    lines = vectors(reference, reference.bipartite_gibbs_reference, reference.bipartite_ais_reference)
    FILE.write_text("\n".join(lines) + "\n")
