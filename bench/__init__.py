# SPDX-License-Identifier: Apache-2.0
"""Benchmarks against plain PyTorch and NumPy: `python -m bench [NAME...]`."""
