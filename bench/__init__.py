# SPDX-License-Identifier: Apache-2.0
"""Benchmarks against plain PyTorch, NumPy, dwave-samplers and networkx: `python -m bench [NAME...]`."""
