# SPDX-License-Identifier: Apache-2.0
"""Benchmarks against plain PyTorch, NumPy and other packages: `pytest bench/`."""
