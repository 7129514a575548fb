# SPDX-License-Identifier: Apache-2.0
"""Compiles csrc/cuda/*.cu with nvcc alone, for setup.py, which links the objects, and as a check (``make cuda``).

Environment: GIBBS_CUDA=auto|0|1 (auto: compile if nvcc is found), CUDA_HOME (whose bin/nvcc is taken; else the nvcc on
the PATH), GIBBS_CUDA_ARCHITECTURES (compute capabilities to compile for, as in "80;90"; all supported ones by default).
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("75", "80", "90", "100", "120")  # code for 8.0 runs on 8.6 and 8.9


def generation(architecture: str) -> int:
    """The number of a generation: 7.5; 8.x; 9.0, the first with clusters, and newer. Its members share kernels."""
    return min(int(architecture) // 10, 9)


class Cuda:
    """CUDA's compiler and the architectures that it compiles for."""

    def __init__(self, nvcc: str) -> None:
        self.nvcc = nvcc
        # The nvcc on the PATH may be a script that calls the one of a toolkit.
        top = re.search(r"^#\$ TOP=(.*)$", self.ask("--dryrun", "-c", "-x", "cu", os.devnull), re.MULTILINE)
        self.home = Path(top[1].strip() if top else Path(nvcc).parents[1]).resolve()
        known = re.findall(r"compute_(\d+)$", self.ask("--list-gpu-arch"), re.MULTILINE)
        wanted = re.findall(r"[^;, ]+", os.environ.get("GIBBS_CUDA_ARCHITECTURES", ""))
        for number in wanted:
            if number not in known or int(number) < int(ARCHITECTURES[0]):
                sys.exit(f"GIBBS_CUDA_ARCHITECTURES: must be of {', '.join(known)} for {nvcc}, got {number}")
        self.architectures = sorted(wanted, key=int) or [number for number in ARCHITECTURES if number in known]

    def ask(self, *arguments: str) -> str:
        done = subprocess.run([self.nvcc, *arguments], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    @property
    def flags(self) -> list[str]:
        """Flags for machine code for each architecture, and PTX for future ones.

        PTX is made for the oldest architecture of a generation, and the others' machine code is translated from it:
        from 8.0 for 8.6 and 8.9; from 9.0, the first with clusters, for 10.0 and 12.0.
        """
        codes: dict[str, list[str]] = {}
        for number in self.architectures:
            first = next(other for other in self.architectures if generation(other) == generation(number))
            codes.setdefault(first, []).append(f"sm_{number}")
        newest = list(codes)[-1]
        codes[newest].append(f"compute_{newest}")
        generate = [f"-gencode=arch=compute_{virtual},code=[{','.join(real)}]" for virtual, real in codes.items()]
        warnings = ["-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]
        return [
            *generate,
            "-std=c++20",
            "-O3",
            "-Icsrc",
            "-Xfatbin",
            "-compress-all",
            "--threads",
            "2",
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden",
            *warnings,
        ]


def find() -> Cuda | None:
    wish = os.environ.get("GIBBS_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"GIBBS_CUDA must be auto, 0 or 1, got {wish!r}")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if wish == "1" and not nvcc:
        sys.exit("GIBBS_CUDA=1: there is no nvcc in CUDA_HOME/bin or on the PATH")
    return Cuda(nvcc) if nvcc and wish != "0" else None


def kernel_size(source: Path) -> int:
    return source.with_name(f"{source.stem}_kernel.cuh").stat().st_size


def compile_kernels(cuda: Cuda) -> list[str]:
    """Compiles csrc/cuda/*.cu and returns the objects. An object newer than every file that it may include is kept."""
    headers = [path for pattern in ("core/*.h", "cuda/*.h", "cuda/*.cuh") for path in ROOT.glob(f"csrc/{pattern}")]
    newest = max(path.stat().st_mtime for path in [*headers, Path(__file__)])
    folder = ROOT / "build" / ("cuda-" + "-".join(cuda.architectures))
    folder.mkdir(parents=True, exist_ok=True)

    def compile_kernel(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        if not target.exists() or target.stat().st_mtime < max(newest, source.stat().st_mtime):
            part = target.with_suffix(f".{os.getpid()}")
            command = [cuda.nvcc, *cuda.flags, "-c", str(source.relative_to(ROOT)), "-o", str(part)]
            done = subprocess.run(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
            target.with_suffix(".log").write_text(done.stdout)
            part.replace(target)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            # The longest jobs start first, so that no core is left alone with one in the end.
            sources = sorted(ROOT.glob("csrc/cuda/*.cu"))
            return list(pool.map(compile_kernel, sorted(sources, key=kernel_size, reverse=True)))
        except RuntimeError as error:
            sys.exit(f"{error}\nnvcc failed; GIBBS_CUDA=0 builds without the CUDA kernels")


class Usage(NamedTuple):
    """Resources of a kernel on one architecture, as ptxas reports them."""

    kernel: str
    architecture: str
    registers: int
    spilled_bytes: int


def usages(objects: list[str]) -> Iterator[Usage]:
    pattern = re.compile(
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.DOTALL,
    )
    for name in objects:
        for kernel, architecture, stores, loads, registers in pattern.findall(
            Path(name).with_suffix(".log").read_text()
        ):
            yield Usage(kernel, architecture, int(registers), int(stores) + int(loads))


def main() -> None:
    start = time.perf_counter()
    cuda = find()
    if cuda is None:
        sys.exit("there is no nvcc in CUDA_HOME/bin or on the PATH, or GIBBS_CUDA=0")
    found = list(usages(compile_kernels(cuda)))
    spills = [usage for usage in found if usage.spilled_bytes]
    for usage in spills:
        print(f"{usage.kernel} on sm_{usage.architecture} spills {usage.spilled_bytes} bytes", file=sys.stderr)
    kernels = len({usage.kernel for usage in found})
    print(
        f"{kernels} kernels for sm_{', sm_'.join(cuda.architectures)}: "
        f"at most {max(usage.registers for usage in found)} registers, "
        f"{len(spills)} with spills; {time.perf_counter() - start:.0f} s"
    )
    sys.exit(bool(spills or not found))


if __name__ == "__main__":
    main()
