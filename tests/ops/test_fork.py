# SPDX-License-Identifier: Apache-2.0
"""Processes may be forked from one that has used threads."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import multiprocessing, torch, gibbs_ext as gx

def draw(_=None):
    bipartite = gx.BipartiteBoltzmann(torch.zeros(100), torch.zeros(100), torch.ones(100, 100))
    graph = gx.ChimeraGraph(4)
    on_graph = gx.GraphBoltzmann(graph, torch.zeros(graph.num_nodes), torch.ones(graph.num_edges))
    return [model.sample((512,), 10, seed=1).sum().item() for model in (bipartite, on_graph)]

def draw_in_child(_=None):
    # With more the next line would not return.
    assert torch.get_num_threads() == 1, torch.get_num_threads()
    return draw()

torch.set_num_threads(2)
expected = draw()
with multiprocessing.get_context("fork").Pool(1) as pool:
    assert pool.map(draw_in_child, [None]) == [expected]
assert torch.get_num_threads() == 2
print("the same")
"""


def test_a_forked_process_draws_the_same_bits_and_does_not_hang() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.stdout == "the same\n", run.stderr
