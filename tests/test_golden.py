# SPDX-License-Identifier: Apache-2.0
"""The sampling contract does not change by accident: values of earlier versions, kept as text."""

from golden.regenerate import FILE, vectors

import gibbs_ext
from gibbs_ext import _C, reference

GOLDEN = FILE.read_text().splitlines()


def test_compiled(instruction_set):
    assert list(vectors(_C, gibbs_ext.bipartite_gibbs, gibbs_ext.bipartite_ais)) == GOLDEN


def test_reference():
    assert list(vectors(reference, reference.bipartite_gibbs_reference, reference.bipartite_ais_reference)) == GOLDEN
