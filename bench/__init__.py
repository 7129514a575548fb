# SPDX-License-Identifier: Apache-2.0
"""Benchmarks against plain PyTorch and NumPy: `python -m bench [NAME...]`."""

import os

# One thread for everybody. These are read when torch and NumPy's BLAS are loaded, hence here.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
