# SPDX-License-Identifier: Apache-2.0
"""The library of CUDA kernels is built with or without nvcc as asked, loads and serves every op, or says why not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gibbs_ext as gx
from gibbs_ext import ops

sys.path.insert(0, str(Path(__file__).parents[2] / "csrc" / "cuda"))
import nvcc

ROOT = Path(__file__).parents[2]
NVCC = [sys.executable, ROOT / "csrc" / "cuda" / "nvcc.py"]


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc: no CUDA kernels were built")
def test_every_op_has_a_cuda_kernel() -> None:
    """Runs in a process of its own: the library stays loaded, and a PyTorch without CUDA does not load it by itself."""
    program = f"""
import sys
import torch
sys.path[:0] = {[str(ROOT / "tests"), str(ROOT / "tests" / "cuda")]}
from compare import BIPARTITE_ROUTES, GRAPH_ROUTES
from gibbs_ext import _C
from support import OPS, names_listed, ops_without_cuda, registered_ops
assert list(OPS) == registered_ops()
assert ops_without_cuda() == ([] if torch.version.cuda else list(OPS))  # a PyTorch with CUDA has loaded the library
library = _C.load_cuda({str(ops.CUDA_LIBRARY)!r})
assert ops_without_cuda() == []
routes = list(dict.fromkeys(["auto", *BIPARTITE_ROUTES, *GRAPH_ROUTES]))
for route in routes:
    library.set_route(route)
try:
    library.set_route("fast")
except ValueError as error:
    assert str(error).startswith("set_route: name must be auto, ")
    assert names_listed(error) == routes == library.routes, error
    print(library.architectures)
"""
    done = run(sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("75;80;")


def test_a_library_that_does_not_load_says_so(tmp_path: Path) -> None:
    program = """
import sys
from gibbs_ext import _C
try:
    _C.load_cuda(sys.argv[1])
except ImportError as error:
    print(error)
"""
    broken = tmp_path / "_cuda.so"
    for content, message in ((None, "cannot open shared object file"), (b"no library", "too short")):
        if content:
            broken.write_bytes(content)
        assert message in run(sys.executable, "-c", program, broken).stdout


def test_build_info_says_whether_there_are_cuda_kernels() -> None:
    info = gx.build_info()
    if torch.version.cuda is None:
        assert info["cuda"] == f"this PyTorch, {torch.__version__}, is built without CUDA"
        assert info["cuda_architectures"] == ()
        with pytest.raises(RuntimeError, match=r"^set_cuda_route: this PyTorch, .*, is built without CUDA"):
            ops.set_cuda_route("tensor")
    else:
        assert info["cuda"] == "loaded"


def test_the_build_refuses_bad_settings() -> None:
    for environment, message in [
        ({"GIBBS_CUDA": "yes"}, "GIBBS_CUDA must be auto, 0 or 1, got 'yes'"),
        (
            {"GIBBS_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "GIBBS_CUDA=1: there is no nvcc in CUDA_HOME/bin or on the PATH",
        ),
        ({"GIBBS_CUDA": "0"}, "GIBBS_CUDA=0"),
    ]:
        done = run(*NVCC, **environment)
        assert done.returncode != 0
        assert message in done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize("wrong", ["70", "999", "80;x"])
def test_unknown_architectures_are_refused(wrong: str) -> None:
    done = run(*NVCC, GIBBS_CUDA_ARCHITECTURES=wrong)
    assert done.returncode != 0
    assert done.stderr.startswith("GIBBS_CUDA_ARCHITECTURES: must be of ")


@pytest.mark.parametrize(
    ("architectures", "codes"),
    [
        (("86",), ["compute_86,code=[sm_86,compute_86]"]),
        (("80", "86", "90"), ["compute_80,code=[sm_80,sm_86]", "compute_90,code=[sm_90,compute_90]"]),
        (("75", "90", "100", "120"), ["compute_75,code=[sm_75]", "compute_90,code=[sm_90,sm_100,sm_120,compute_90]"]),
    ],
)
def test_ptx_is_made_once_for_architectures_that_kernels_treat_alike(
    architectures: tuple[str, ...], codes: list[str]
) -> None:
    cuda = nvcc.Cuda.__new__(nvcc.Cuda)  # does not ask nvcc
    cuda.architectures = list(architectures)
    assert [flag for flag in cuda.flags if "gencode" in flag] == [f"-gencode=arch={code}" for code in codes]
