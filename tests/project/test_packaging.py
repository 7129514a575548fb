# SPDX-License-Identifier: Apache-2.0
"""The sdist and the wheel hold everything, and the wheel works outside the source tree."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"gibbs_ext": ROOT / "gibbs_ext", "undirected_vae": ROOT / "python" / "undirected_vae"}


def run(*command: object, cwd: Path = ROOT) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def files(folder: Path, *suffixes: str) -> set[str]:
    return {str(p.relative_to(ROOT)) for p in folder.rglob("*") if p.suffix in suffixes}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in the source tree, as `pip install .` does, so that objects which are already there are used."""
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", out, ROOT)
    (path,) = out.glob("gibbs_ext-*.whl")
    return path


def test_the_wheel_holds_both_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for name, folder in PACKAGES.items():
        paths = (path for path in folder.rglob("*") if path.suffix in {".py", ".pyi", ".yaml"})
        expected = {str(Path(name) / path.relative_to(folder)) for path in paths}
        assert expected
        assert expected <= names
    assert "gibbs_ext/py.typed" in names
    assert [n for n in names if n.startswith("gibbs_ext/_C.") and n.endswith(".so")]
    assert any(n.endswith("LICENSE") for n in names)
    allowed = (*PACKAGES, "gibbs_ext-")
    assert [n for n in names if not n.startswith(allowed)] == []


def test_the_wheel_works_alone(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel)
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path / "site")!r})
import torch, gibbs_ext, undirected_vae
assert gibbs_ext.__file__.startswith({str(tmp_path)!r}) and undirected_vae.__file__.startswith({str(tmp_path)!r})
left, right = gibbs_ext.bipartite_gibbs(torch.zeros(4), torch.zeros(4), torch.zeros(3), torch.zeros(4, 3), 2, seed=1)
print(left.shape[-1] + right.shape[-1])
"""
    assert run(sys.executable, "-I", "-c", program, cwd=tmp_path).strip() == "7"


def test_the_sdist_holds_what_a_build_and_the_tests_need(tmp_path: Path) -> None:
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    expected = files(ROOT / "csrc", ".h", ".cpp") | files(ROOT / "tests", ".py", ".h", ".cpp", ".json", ".txt")
    expected |= files(ROOT / "bench", ".py", ".cpp") | files(ROOT / "gibbs_ext", ".py", ".pyi", ".typed")
    expected |= files(ROOT / "python", ".py")
    expected |= files(ROOT / "docs", ".md", ".png") | {"CITATION.cff", "CONTRIBUTING.md"}
    expected |= {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", ".ci/run"}
    assert expected - names == set()
    assert [n for n in names if n.endswith((".so", ".pyc"))] == []


def test_the_extension_serves_many_versions_of_torch() -> None:
    """The extension needs only symbols of PyTorch's stable ABI, which are C functions."""
    (library,) = ROOT.glob("gibbs_ext/_C.*.so")
    symbols = run("nm", "--dynamic", "--undefined-only", "--demangle", library)
    assert "aoti_torch" in symbols
    assert [s for s in symbols.splitlines() if "at::" in s or "c10::" in s or "torch::" in s] == []
    assert run("nm", "--debug-syms", library).count(" N ") == 0  # -g0


# Prints the folders that setup.py gives the compiler for gibbs_ext._C, when torch's hold an older pybind11.
INCLUDE_DIRS = """
import sys
from setuptools import distutils
from torch.utils import cpp_extension
torchs = [sys.argv[1], *cpp_extension.include_paths()]
cpp_extension.include_paths = lambda: torchs
setup = distutils.core.run_setup("setup.py", stop_after="init")
given = setup.ext_modules[0].include_dirs
print(*(given if sys.argv[2] == "setup.py's" else [*torchs, *given]), sep="\\n")
"""


@pytest.mark.parametrize(("order", "errors"), [("setup.py's", 0), ("torch's first", 3)])
def test_an_older_pybind11_in_torchs_folders_does_no_harm(tmp_path: Path, order: str, errors: int) -> None:
    """The one in torch 2.11 stops with #error if only the stable ABI is used. The other order is the planted fault."""
    (tmp_path / "pybind11").mkdir()
    for name in ("numpy.h", "pybind11.h", "stl.h"):
        (tmp_path / "pybind11" / name).write_text("#error an older pybind11\n")
    folders = run(sys.executable, "-c", INCLUDE_DIRS, tmp_path, order).splitlines()
    flags = [f"-I{folder}" for folder in (*folders, sysconfig.get_path("include"))]
    command = [*os.environ.get("CXX", "c++").split(), "-std=c++20", "-E", "csrc/python.cpp", "-o", os.devnull, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert len(re.findall("error: (?:#error )?an older pybind11", done.stderr)) == errors, done.stderr
    assert (done.returncode != 0) == (errors != 0)


PROMISE = re.compile(r"gibbs_ext\[[a-z]|pip install (?!-).*gibbs_ext")
TEXTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("csrc/**/*.md"), *ROOT.glob("bench/*.*")]
TEXTS += [path for folder in PACKAGES.values() for path in folder.rglob("*.py")] + [*ROOT.glob("python/examples/*.py")]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_text_promises_a_published_package(path: Path) -> None:
    """Until there is a published package, texts show commands that work from a checkout."""
    assert PROMISE.search(path.read_text()) is None


@pytest.mark.parametrize("extra", ["", "[dimod]"])
def test_planted_fault_a_promise_is_noticed(extra: str) -> None:
    assert PROMISE.search(f"pip install '{'gibbs_ext'}{extra}'")


@pytest.mark.parametrize(
    ("complaint", "falls_back"),
    [
        ("ERROR: No matching distribution found for torch", True),
        ("ERROR: ResolutionImpossible: for help visit", True),
        ("ERROR: No space left on device", False),
    ],
)
def test_make_takes_the_default_torch_only_where_there_is_no_cpu_build(
    tmp_path: Path, complaint: str, falls_back: bool
) -> None:
    (tmp_path / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "python.stamp").touch()
    programs = {"pip": f'case "$*" in *+cpu) echo "{complaint}" >&2; exit 1; esac', "nvidia-smi": "exit 1"}
    for name, program in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["make", "PIP=pip", ".venv/torch.stamp"],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == falls_back
    assert (tmp_path / ".venv" / "torch.stamp").exists() == falls_back
    assert ("pip finds no CPU build" in done.stderr) == falls_back
    assert (complaint in done.stderr) != falls_back
