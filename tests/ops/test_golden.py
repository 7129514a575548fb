# SPDX-License-Identifier: Apache-2.0
"""The sampling contract does not change by accident: values of earlier versions, kept as text."""

from golden.regenerate import FILE, GRAPH_FILE, graph_vectors, reference_resolution, vectors

import gibbs_ext
from gibbs_ext import _C, ops, reference

GOLDEN, GRAPH_GOLDEN = (file.read_text().splitlines() for file in (FILE, GRAPH_FILE))


def test_compiled(instruction_set):
    assert list(vectors(_C, gibbs_ext.bipartite_gibbs, gibbs_ext.bipartite_ais)) == GOLDEN


def test_reference():
    assert list(vectors(reference, reference.bipartite_gibbs_reference, reference.bipartite_ais_reference)) == GOLDEN


def test_graphs_compiled(instruction_set, graph_route):
    def resolution(coupling, graph):
        return float(ops.graph_coupling_resolution(coupling, graph.layout))

    functions = gibbs_ext.graph_gibbs, gibbs_ext.graph_metropolis, gibbs_ext.graph_ais
    assert list(graph_vectors(*functions, resolution)) == GRAPH_GOLDEN


def test_graphs_reference():
    functions = (
        reference.graph_gibbs_reference,
        reference.graph_metropolis_reference,
        reference.graph_ais_reference,
    )
    assert list(graph_vectors(*functions, reference_resolution)) == GRAPH_GOLDEN
