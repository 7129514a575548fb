# SPDX-License-Identifier: Apache-2.0
"""csrc/cuda/devices.cpp, launch.cuh, and the kernels as nvcc compiles them, with a fake runtime in place of CUDA's."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda"))
sys.path.insert(0, str(Path(__file__).parents[2] / "csrc" / "cuda"))
import nvcc

import build

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc: no CUDA kernels were built")

CUDA = build.ROOT / "csrc" / "cuda"
CHECK = build.ROOT / "tests" / "cuda" / "check_devices.cpp"
# The fault; the words of check_devices.cpp that must report it; and a replacement in one of these files that makes it.
FILES = ("devices.cpp", "launch.cuh")
FAULTS = {
    "kernels are loaded when they are launched": ("is not loaded", "load_kernels(limits);", ""),
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
    "static shared memory is forgotten": ("another error", "limits.shared_memory_per_cta -= most;", ""),
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
    "clusters of any size": ("has clusters of", "return clusters;", "return clusters; else return 16;"),
    "clusters by code that knows none": ("takes route", "ptxVersion < kFirstPtxWithClusters", "ptxVersion < 0"),
    "an answer leaves an error behind": ("stays behind", "return clusters; cudaGetLastError();", "return clusters;"),
    "the driver is asked at every plan": ("is asked again", "known != answers.end() ? known->second : ", ""),
    "a fork goes on": ("WIFEXITED(status)", "&& user != process", "&& user == -1"),
    "a launch asks for shared memory": (
        "calls of 8 launches",
        "  check_cuda(cudaLaunchKernelEx(",
        "  cudaFuncSetAttribute(\n"
        "      kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.shared_memory));\n"
        "  check_cuda(cudaLaunchKernelEx(",
    ),
    "a failed launch leaves an error behind": (
        "stays behind",
        "if (error == cudaSuccess) return; cudaGetLastError();",
        "if (error == cudaSuccess) return;",
    ),
    "older devices are not refused": ("older than", "check_supported(limits, device);", ""),
}


@pytest.fixture(scope="module")
def cuda() -> nvcc.Cuda:
    found = nvcc.find()
    assert found
    return found


@pytest.fixture(scope="module")
def kernels(cuda: nvcc.Cuda) -> list[str]:
    return nvcc.compile_kernels(cuda)  # compiled again only if a source has changed since the build


def run(
    cuda: nvcc.Cuda, kernels: list[str], devices: tuple[Path, Path], check: tuple[Path, Path], more: list[str]
) -> subprocess.CompletedProcess[str]:
    """Runs the check. devices.cpp and the check each come from a tree and are compiled into a folder."""

    def compiled(root: Path, folder: Path, source: Path) -> Path:
        flags = [*build.include_flags(root), f"-isystem{cuda.home / 'include'}", "-UGIBBS_EMULATE", *more]
        return build.compile_object(source, flags, folder)

    ours = compiled(*devices, devices[0] / "csrc" / "cuda" / "devices.cpp"), compiled(*check, CHECK)
    program = build.link([*ours, *map(Path, kernels)], more, devices[1] / "check_devices")
    return subprocess.run([program], capture_output=True, text=True)


def test_devices(cuda: nvcc.Cuda, kernels: list[str]) -> None:
    here = build.ROOT, build.FOLDER / "devices"
    done = run(cuda, kernels, here, here, build.SANITIZE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len({usage.kernel for usage in nvcc.usages(kernels)})} kernels\n"


@pytest.mark.parametrize("what", FAULTS)
def test_a_planted_fault_is_found(what: str, cuda: nvcc.Cuda, kernels: list[str], tmp_path: Path) -> None:
    message, old, new = FAULTS[what]
    texts = {name: (CUDA / name).read_text() for name in FILES}
    faulty = build.with_fault(texts, old, new)
    in_launch = faulty["launch.cuh"] != build.without_comments(texts["launch.cuh"])
    for part in ("core", "cuda"):
        shutil.copytree(CUDA.parent / part, tmp_path / "csrc" / part)
    for name, text in faulty.items():
        (tmp_path / "csrc" / "cuda" / name).write_text(text)
    there, here = (tmp_path, tmp_path), (build.ROOT, build.FOLDER / "devices_plain")
    # The compiler may warn about a fault.
    done = run(cuda, kernels, there, there if in_launch else here, ["-O0", "-Wno-error"])
    assert done.returncode != 0
    assert message in done.stderr, done.stderr
