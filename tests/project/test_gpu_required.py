# SPDX-License-Identifier: Apache-2.0
"""tests/ops/test_gpu.py is skipped if there is no GPU, and fails if one is required."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def pytest_without_gpu(test: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    unset = ("GIBBS_REQUIRE_CUDA", "GIBBS_CUDA_SYNCHRONOUS", "CUDA_LAUNCH_BLOCKING", "PYTEST_ADDOPTS")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/ops/test_gpu.py::{test}"]
    environment |= {"CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


# The first test is of the file itself, the second one of the ops.
@pytest.mark.parametrize(("test", "synchronous"), [("test_out_of_memory", "0"), ("test_golden__compiled", "1")])
def test_gpu_tests_skip_or_fail(test: str, synchronous: str) -> None:
    skipped = pytest_without_gpu(test, GIBBS_CUDA_SYNCHRONOUS=synchronous)
    assert skipped.returncode == 0, skipped.stdout + skipped.stderr
    assert "skipped" in skipped.stdout
    assert "no CUDA kernels" in skipped.stdout or "no GPU" in skipped.stdout

    failed = pytest_without_gpu(test, GIBBS_CUDA_SYNCHRONOUS=synchronous, GIBBS_REQUIRE_CUDA="1")
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert "GIBBS_REQUIRE_CUDA is set, but no " in failed.stdout
    assert "skipped" not in failed.stdout
