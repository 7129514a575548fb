# SPDX-License-Identifier: Apache-2.0
"""A VAE of binary latents whose approximate posterior is a Boltzmann machine (Vahdat et al. 2020), over gibbs_ext."""

from .config import PRESETS, Config, ConfigError
from .data import DataError, Dataset, load
from .runs import Run, RunError
from .vae import VAE

__all__ = ["PRESETS", "VAE", "Config", "ConfigError", "DataError", "Dataset", "Run", "RunError", "load"]
