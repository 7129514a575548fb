# SPDX-License-Identifier: Apache-2.0
"""Samplers of other packages that more than one benchmark calls. They are imported where they are called."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .harness import Call

# thrml's sampler gathers the neighbours of each unit, and XLA compiles that for minutes if there are more edges.
MOST_EDGES = 50_000


def thrml_gibbs(
    blocks: Sequence[Sequence[int]], edges: Tensor, h: Tensor, J: Tensor, states: Tensor, num_sweeps: int, beta: float
) -> Call:
    """Samples with energies h . s + sum J s s, of one model ([N] and [E]) or of one for each chain ([C, N] and [C, E]),
    from bits [C, N], by blocks in this order. A call returns bits [C, N]; its own arrays are arranged inside, and XLA
    has compiled all of it for all chains before."""
    import jax
    from thrml import Block, SamplingSchedule, SpinNode, sample_states
    from thrml.models import IsingEBM, IsingSamplingProgram

    nodes = [SpinNode() for _ in range(states.shape[1])]
    free = [Block([nodes[i] for i in block]) for block in blocks]
    pairs = [(nodes[u], nodes[v]) for u, v in edges.tolist()]
    schedule = SamplingSchedule(n_warmup=num_sweeps, n_samples=1, steps_per_sample=1)

    def of_chain(key: Any, bias: Any, weight: Any, state: Any) -> Any:
        program = IsingSamplingProgram(IsingEBM(nodes, pairs, bias, weight, jax.numpy.float32(beta)), free, [])
        return sample_states(key, program, schedule, state, [], free)

    axis = 0 if J.dim() == 2 else None
    arguments = (
        jax.random.split(jax.random.key(1), len(states)),
        jax.numpy.asarray(-h.numpy()),  # thrml's energies have the other sign
        jax.numpy.asarray(-J.numpy()),
        [jax.numpy.asarray(states[:, list(block)].numpy() > 0) for block in blocks],
    )
    run = jax.jit(jax.vmap(of_chain, in_axes=(0, axis, axis, 0))).lower(*arguments).compile()
    order = torch.tensor([i for block in blocks for i in block]).argsort().numpy()
    return lambda: np.concatenate([part[:, 0] for part in jax.block_until_ready(run(*arguments))], 1)[:, order]
