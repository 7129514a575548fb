# SPDX-License-Identifier: Apache-2.0
"""csrc/cuda/devices.cpp and the kernels as nvcc compiles them, with tests/cuda/fake_runtime.h in CUDA's place."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "cuda"))
sys.path.insert(0, str(Path(__file__).parents[1] / "csrc" / "cuda"))
import nvcc

import build

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc: no CUDA kernels were built")

DEVICES = build.ROOT / "csrc" / "cuda" / "devices.cpp"
CHECK = build.ROOT / "tests" / "cuda" / "check_devices.cpp"
# What is wrong, the line of check_devices.cpp that must find it, and a replacement in devices.cpp.
FAULTS = {
    "kernels are loaded when they are launched": ("is not loaded", "\n  load_kernels(limits);", ""),
    "loading where a capture forbids it": (
        "when stream is capturing",
        "mode_ = cudaStreamCaptureModeRelaxed;",
        "mode_ = cudaStreamCaptureModeGlobal;",
    ),
    "the capture mode stays another": (
        "fake::capture_mode == cudaStreamCaptureModeGlobal",
        "~OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }",
        "~OutsideCapture() {}",
    ),
    "static shared memory is forgotten": ("another error", "limits.shared_memory_per_cta - own", "227 << 10"),
    "two threads make what a device has": (
        "has opted in",
        """const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = devices_.find(device);
    return found != devices_.end() ? found->second :""",
        """std::unique_lock<std::mutex> lock(mutex_);
    if (devices_.count(device)) return devices_[device];
    lock.unlock();
    const Device made = make_device(device);
    lock.lock();
    return""",
    ),
    "to ask for a report makes one": (
        "whether anybody has used it",
        "const Device* used = devices.find(device);",
        "const Device* used = &devices.get(device);",
    ),
    "clusters wherever the code knows them": (
        "takes route",
        "attribute(cudaDevAttrClusterLaunch, device) ? active_clusters : nullptr",
        "active_clusters",
    ),
    "clusters of any size": ("takes route", "return clusters;", "return clusters; else return 16;"),
    "clusters by code that knows none": ("takes route", "ptxVersion < kFirstPtxWithClusters", "ptxVersion < 0"),
    "an answer leaves an error behind": ("stays behind", "  cudaGetLastError();  // CUDA remembers it", "  // CUDA"),
    "the driver is asked at every plan": ("cluster_questions == 1", "known != answers.end() ? known->second : ", ""),
    "a fork goes on": ("WIFEXITED(status)", "&& user != process", "&& user == -1"),
    "older devices are not refused": ("older than", "  check_supported(limits, device);\n", ""),
}


@pytest.fixture(scope="module")
def cuda() -> nvcc.Cuda:
    found = nvcc.find()
    assert found
    return found


@pytest.fixture(scope="module")
def kernels(cuda: nvcc.Cuda) -> list[str]:
    return nvcc.compile_kernels(cuda)  # again only where something has changed since the build


def run(
    cuda: nvcc.Cuda, kernels: list[str], devices: Path, folder: Path, more: list[str]
) -> subprocess.CompletedProcess[str]:
    common = build.FOLDER / ("devices" if devices == DEVICES else "devices_plain")
    flags = [*build.include_flags(), f"-isystem{cuda.home / 'include'}", "-UGIBBS_EMULATE", *more]
    ours = build.compile_object(CHECK, flags, common), build.compile_object(devices, flags, folder)
    program = build.link([*ours, *map(Path, kernels)], more, folder / "check_devices")
    return subprocess.run([program], capture_output=True, text=True)


def test_devices(cuda: nvcc.Cuda, kernels: list[str]) -> None:
    done = run(cuda, kernels, DEVICES, build.FOLDER / "devices", build.SANITIZE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len({usage.kernel for usage in nvcc.usages(kernels)})} kernels\n"


@pytest.mark.parametrize("what", FAULTS)
def test_a_planted_fault_is_found(what: str, cuda: nvcc.Cuda, kernels: list[str], tmp_path: Path) -> None:
    message, old, new = FAULTS[what]
    text = DEVICES.read_text()
    assert text.count(old) == 1, old
    (tmp_path / "devices.cpp").write_text(text.replace(old, new))
    # Whether the compiler is content with a fault does not matter.
    done = run(cuda, kernels, tmp_path / "devices.cpp", tmp_path, ["-O0", "-Wno-error"])
    assert done.returncode != 0
    assert message in done.stderr, done.stderr
