# SPDX-License-Identifier: Apache-2.0
"""Compiles the CUDA half of gibbs_ext as C++ for the host emulator: as a library of ops, or with a C++ test program.

An object is compiled again when anything that it included has changed since (the compiler's own list, ``-MMD``).
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "emulated"
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-pthread", "-DGIBBS_EMULATE", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
SANITIZE = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def compiler() -> list[str]:
    return os.environ.get("CXX", "g++").split()


def is_stale(target: Path, flags: str) -> bool:
    depends, command = target.with_suffix(".d"), target.with_suffix(".flags")
    if not (target.exists() and depends.exists() and command.exists()) or command.read_text() != flags:
        return True
    files = re.sub(r"\\\n|^[^:]*:", " ", depends.read_text(), flags=re.MULTILINE).split()
    return any(not os.path.exists(name) or os.path.getmtime(name) > target.stat().st_mtime for name in files)


def compile_object(source: Path, flags: Sequence[str], folder: Path) -> Path:
    target = folder / f"{source.stem}.{source.suffix[1:]}.o"
    words = [*compiler(), *FLAGS, *flags, "-x", "c++", "-MMD", "-MF", str(target.with_suffix(".d")), "-c", str(source)]
    if is_stale(target, " ".join(words)):
        folder.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{os.getpid()}")
        subprocess.run([*words, "-o", str(part)], check=True, cwd=ROOT)
        part.replace(target)
        target.with_suffix(".flags").write_text(" ".join(words))
    return target


def link(objects: Sequence[Path], flags: Sequence[str], target: Path) -> Path:
    if not target.exists() or any(path.stat().st_mtime > target.stat().st_mtime for path in objects):
        part = target.with_name(f"{target.name}.{os.getpid()}")
        subprocess.run([*compiler(), *map(str, objects), *flags, "-pthread", "-o", str(part)], check=True)
        part.replace(target)
    return target


def compile_all(sources: Sequence[Path], flags: Sequence[str], folder: Path) -> list[Path]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda source: compile_object(source, flags, folder), sources))


def include_flags(root: Path = ROOT) -> list[str]:
    return [f"-I{root / 'csrc'}", f"-I{ROOT / 'tests' / 'cuda'}", f"-I{ROOT / 'tests' / 'cpp'}"]


def emulated_ops() -> Path:
    """The library whose ops, torch.ops.gibbs_ext_emulated, are those of csrc/cuda run by the emulator on CPU tensors."""
    from torch.utils.cpp_extension import include_paths, library_paths

    torch_flags = [f"-isystem{path}" for path in include_paths()]
    defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-fvisibility=hidden"]
    sources = [*kernel_sources(), ROOT / "csrc" / "cuda" / "ops.cpp"]
    sources.append(ROOT / "tests" / "cuda" / "emulated_devices.cpp")
    objects = compile_all(sources, [*include_flags(), *torch_flags, *defines], FOLDER / sysconfig.get_platform())
    libraries = [word for path in library_paths() for word in (f"-L{path}", f"-Wl,-rpath,{path}")]
    return link(objects, ["-shared", *libraries, "-lc10", "-ltorch_cpu"], FOLDER / "gibbs_ext_emulated.so")


def program(source: Path, *, sanitize: bool = False) -> Path:
    """A C++ test program with all the kernels."""
    flags = [*include_flags(), *(SANITIZE if sanitize else [])]
    folder = FOLDER / ("sanitized" if sanitize else "plain")
    objects = compile_all([*kernel_sources(), *cpu_sources(), source], flags, folder)
    return link(objects, SANITIZE if sanitize else [], folder / source.stem)


def program_with_fault(source: Path, kernel: str, old: str, new: str, folder: Path) -> Path:
    """As :func:`program`, with one replacement made in csrc/cuda/``kernel``. What does not include it is not compiled again."""
    program(source)
    plain = FOLDER / "plain"
    text = (ROOT / "csrc" / "cuda" / kernel).read_text()
    if text.count(old) != 1:
        raise ValueError(f"{kernel} holds {text.count(old)} times, not once: {old}")
    for part in ("core", "cuda"):
        shutil.copytree(ROOT / "csrc" / part, folder / "csrc" / part)
    (folder / "csrc" / "cuda" / kernel).write_text(text.replace(old, new))
    affected = [path for path in kernel_sources() if kernel in (plain / f"{path.stem}.cu.d").read_text()]
    changed = [folder / "csrc" / "cuda" / path.name for path in affected]
    others = [path for path in kernel_sources() if path not in affected]
    objects = compile_all(changed, include_flags(folder), folder / "objects")
    objects += compile_all([*others, *cpu_sources(), source], include_flags(), plain)
    return link(objects, [], folder / source.stem)


def kernel_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def cpu_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))


def main() -> None:
    """Builds and runs every fuzz program under the sanitizers; their argument, if given, is how much to do."""
    for source in sorted((ROOT / "tests" / "cuda").glob("*.cpp")):
        if source.stem.startswith(("fuzz_", "test_")):
            path = program(source, sanitize=True)
            print(path.relative_to(ROOT), flush=True)
            subprocess.run([str(path), *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
