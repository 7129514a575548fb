# SPDX-License-Identifier: Apache-2.0
"""Compiles the CUDA half of gibbs_ext as C++ for the host emulator: as a library of ops, or with a C++ test program.

An object is compiled again if a file that it included has changed since; the compiler lists these files (``-MMD``).
Processes of tests may ask for the same objects: the first one compiles them, and the others wait.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "emulated"
FLAGS = [
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-pthread",
    "-DGIBBS_EMULATE",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
]
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
    target = folder / f"{source.name}.o"
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


def torch_flags() -> tuple[list[str], list[str]]:
    """Flags for compiling against libtorch's stable ABI, and for linking."""
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [f"-isystem{path}" for path in include_paths()]
    defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-fvisibility=hidden"]
    libraries = [word for path in library_paths() for word in (f"-L{path}", f"-Wl,-rpath,{path}")]
    return [*includes, *defines], ["-shared", "-Wl,-z,defs", *libraries, "-lc10", "-ltorch_cpu"]


@contextmanager
def alone() -> Iterator[None]:
    """Keeps other processes and threads from FOLDER."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:  # closing it unlocks it
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@alone()
def emulated_objects() -> list[Path]:
    ops = [*sorted((ROOT / "csrc" / "ops" / "cuda").glob("*.cpp")), ROOT / "tests" / "cuda" / "emulated_devices.cpp"]
    flags = include_flags()
    return [
        *compile_all(ops, [*flags, *torch_flags()[0]], FOLDER / "ops"),
        *compile_all(kernel_sources(), flags, FOLDER / "plain"),
    ]


def emulated_ops() -> Path:
    """The library of torch.ops.gibbs_ext_emulated: the ops of csrc/cuda, run by the emulator on CPU tensors."""
    return link(emulated_objects(), torch_flags()[1], FOLDER / "gibbs_ext_emulated.so")


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def with_fault(texts: dict[str, str], old: str, new: str) -> dict[str, str]:
    """C++ sources in which ``new`` stands for ``old``, which must occur once in all of them.

    Comments are removed first, so that no fault can depend on their words, and any white space separates words.
    """
    codes = {name: without_comments(text) for name, text in texts.items()}
    pattern = r"\s+".join(map(re.escape, old.split()))
    count = sum(len(re.findall(pattern, code)) for code in codes.values())
    if count != 1:
        raise ValueError(f"{', '.join(texts)}: expected once, found {count} times: {old}")
    return {name: re.sub(pattern, lambda _: new, code) for name, code in codes.items()}


def emulated_ops_with_fault(kernel: str, old: str, new: str, folder: Path) -> Path:
    """As :func:`emulated_ops`, with one replacement made in csrc/cuda/``kernel``.

    Only sources that include this kernel are compiled again.
    """
    objects = emulated_objects()
    faulty = with_fault({kernel: (ROOT / "csrc" / "cuda" / kernel).read_text()}, old, new)
    for part in ("core", "cuda"):
        shutil.copytree(ROOT / "csrc" / part, folder / "csrc" / part)
    (folder / "csrc" / "cuda" / kernel).write_text(faulty[kernel])
    affected = [path for path in kernel_sources() if kernel in (FOLDER / "plain" / f"{path.stem}.cu.d").read_text()]
    others = [path for path in objects if path.name not in {f"{source.name}.o" for source in affected}]
    changed = [folder / "csrc" / "cuda" / source.name for source in affected]
    # The compiler may warn about a fault.
    flags = [*include_flags(folder), "-O0", "-Wno-error"]
    return link([*compile_all(changed, flags, folder), *others], torch_flags()[1], folder / "gibbs_ext_emulated.so")


@alone()
def program(source: Path, *, sanitize: bool = False) -> Path:
    """A C++ test program with all the kernels. The CPU's have programs of their own, so they are not sanitized here."""
    plain, flags = include_flags(), SANITIZE if sanitize else []
    folder = FOLDER / ("sanitized" if sanitize else "plain")
    objects = compile_all([*kernel_sources(), source], [*plain, *flags], folder)
    return link([*objects, *compile_all(cpu_sources(), [*plain, "-w"], FOLDER / "cpu")], flags, folder / source.stem)


def kernel_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def cpu_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cpu").rglob("*.cpp"))


def main() -> None:
    """Builds and runs every fuzz program under the sanitizers. Their argument, if given, is the amount of work."""
    for source in sorted((ROOT / "tests" / "cuda").glob("*.cpp")):
        if source.stem.startswith(("fuzz_", "test_")):
            path = program(source, sanitize=True)
            print(path.relative_to(ROOT), flush=True)
            subprocess.run([str(path), *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
