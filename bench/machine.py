# SPDX-License-Identifier: Apache-2.0
"""The environment of a measurement: nothing slows a peer, each contender has one thread, and the record says so."""

import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

# Variables that keep a library from the best kernels of the processor, and the libraries that read them.
SLOWING = re.compile(
    r"OPENBLAS_(?!NUM_THREADS)\w+|BLIS_ARCH_TYPE|MKL_(ENABLE_INSTRUCTIONS|DEBUG_CPU_TYPE|CBWR)|(ONEDNN|DNNL)_MAX_CPU_ISA"
    r"|ATEN_CPU_CAPABILITY|NPY_(DISABLE|ENABLE)_CPU_FEATURES|XLA_FLAGS|JAX_(DISABLE_JIT|ENABLE_X64|PLATFORMS)"
    r"|PYTORCH_JIT|TORCH_COMPILE_DISABLE|TORCHDYNAMO_DISABLE"
)
READERS = ("numpy", "torch", "jax", "jaxlib", "scipy")
ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "BLIS")} | {
    "NPROC": "1",  # the size of XLA's pools
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu",
}
# A contender's name begins with that of its package: what is imported, and what pip installs.
PEERS = {
    "thrml": ("thrml", "thrml"),
    "rbms": ("rbms", "rbms"),
    "scikit-learn": ("sklearn", "scikit-learn"),
    "dwave-samplers": ("dwave.samplers", "dimod dwave-samplers"),
    "networkx": ("networkx", "networkx"),
}
# OpenBLAS's names of the kernels that fit a processor.
BLAS_KERNELS = {
    "avx512f": {"skylakex", "cooperlake", "sapphirerapids"},
    "avx2": {"haswell", "zen"},
}


def clean(environ: MutableMapping[str, str], loaded: Collection[str] = sys.modules) -> str | None:
    """Removes what slows peers, and sets one thread for each, before the libraries that read it are loaded.

    Returns what to say if that is too late.
    """
    slowing = sorted(name for name in environ if SLOWING.fullmatch(name) and environ[name] != ONE_THREAD.get(name))
    readers = [name for name in READERS if name in loaded]
    environ.update(ONE_THREAD)
    if not readers:
        for name in slowing:
            if name not in ONE_THREAD:
                del environ[name]
    elif slowing:
        return (
            f"pytest bench/: expected an environment without {', '.join(slowing)}, which changes the speed of peers; "
            f"{', '.join(readers)} has read it already, so unset it before pytest starts: unset {' '.join(slowing)}"
        )
    return None


def pools() -> list[dict[str, Any]]:
    """What threadpoolctl tells of the libraries that have threads, without their paths."""
    from threadpoolctl import threadpool_info

    return [{key: value for key, value in pool.items() if key != "filepath"} for pool in threadpool_info()]


def flags() -> list[str]:
    """The processor's flags that kernels are chosen by."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    (line,) = re.findall(r"^flags\s*: (.*)$", text, re.MULTILINE)[:1] or [""]
    return sorted(flag for flag in line.split() if re.match(r"avx|fma|f16c|bmi|vaes|gfni|amx", flag))


def complaint(found: Sequence[Mapping[str, Any]] | None = None, processor: Collection[str] | None = None) -> str | None:
    """What to say if a library does not have one thread, or BLAS not the kernel of this processor."""
    import numpy  # noqa: F401  loads the libraries
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    threadpool_limits(1)  # also of those that were loaded before clean()
    processor = flags() if processor is None else processor
    for pool in pools() if found is None else found:
        name = f"{pool['internal_api']} {pool.get('version')}"
        if pool["num_threads"] != 1:
            return f"pytest bench/: {name} must have one thread, and has {pool['num_threads']}: set OMP_NUM_THREADS=1"
        best = next((kernels for flag, kernels in BLAS_KERNELS.items() if flag in processor), None)
        kernel = str(pool.get("architecture")).lower()
        if pool["internal_api"] == "openblas" and best and kernel not in best:
            return (
                f"pytest bench/: {name} must have one of the kernels {', '.join(sorted(best))}, which fit this "
                f"processor, and has {kernel}: unset OPENBLAS_CORETYPE"
            )
    return None


def missing(contender: str) -> str | None:
    """Why this contender cannot run, if its package is not installed."""
    module, requirement = PEERS.get(contender.split(",")[0], ("torch", ""))
    try:
        if importlib.util.find_spec(module):
            return None
    except ModuleNotFoundError:
        pass  # a package that holds the module
    return f"{module} is not installed: pip install {requirement}, or make bench-peers"


def versions() -> dict[str, str]:
    """Versions of everything that is compared. The installed package does not always say which build PyTorch is."""
    import torch

    names = {"numpy", "scipy", "jax", "jaxlib", "threadpoolctl"}
    names |= {requirement for _, requirements in PEERS.values() for requirement in requirements.split()}
    found = {"torch": torch.__version__}
    for name in sorted(names):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def about() -> dict[str, Any]:
    """What pytest-benchmark's JSON says of this machine beside its own account."""
    import torch

    import gibbs_ext

    from .harness import cpu_name, on_gpu

    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if on_gpu() else {}
    return gpu | {
        "cpu_name": cpu_name(),
        "cpu_flags": flags(),
        "processors": len(os.sched_getaffinity(0)),
        "threadpools": pools(),
        "versions": versions(),
        "build": gibbs_ext.build_info(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
