# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: undirected_vae -> gibbs_ext (public names) -> ops.py -> _C; csrc/{cpu,cuda} -> csrc/core."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = [*ROOT.glob("gibbs_ext/**/*.py"), *ROOT.glob("python/**/*.py")]
HEADERS = [
    p
    for d in ("core", "cpu", "cuda")
    for p in (ROOT / "csrc" / d).rglob("*.*")
    if p.suffix not in {".md", ".py", ".pyc"}
]
LAUNCHES = re.compile(r"<<<|cudaLaunch\w*\(|cuda_emulator::launch\(")
SOURCES = [p for d in ("csrc", "gibbs_ext", "python", "tests", "bench") for p in (ROOT / d).rglob("*.*")]
# Each storey of gibbs_ext imports only from those before it.
STOREYS = [
    "ops",
    "graphs",
    "autograd",
    "arguments",
    "functional",
    "distributions",
    "exact",
    "chains",
    "estimators",
    "distributed",
    "nn",
    "pictures",
    "interop",
]
# Modules whose names are public, beside those of gibbs_ext itself.
PUBLIC = {"distributed", "nn", "pictures", "interop"}
# Imported inside a method: a model's log_partition is short for the estimators of log Z.
UPWARDS = {("distributions", "gibbs_ext.estimators"), ("distributions", "gibbs_ext.exact")}


def imported(tree: ast.AST, package: str) -> set[str]:
    """Dotted names that a module of `package` imports, `from a import b` as a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def violations(path: Path, text: str) -> list[str]:
    """What a Python module at `path` (relative to its import root) may not import."""
    package = ".".join(path.parent.parts)
    names = imported(ast.parse(text), package)
    found = []
    if package.startswith("gibbs_ext"):
        found += [n for n in names if n.startswith("undirected_vae")]
        if path.name != "ops.py":
            found += [n for n in names if n.startswith("gibbs_ext._C")] + re.findall(r"torch\.ops\.gibbs_ext\b", text)
        storey = path.parts[1].removesuffix(".py")
        if storey in STOREYS:
            above = STOREYS[STOREYS.index(storey) + 1 :]
            found += [
                n
                for n in names
                if n.startswith("gibbs_ext.") and n.split(".")[1] in above and (storey, n) not in UPWARDS
            ]
    else:
        # only gibbs_ext and its public modules, and no private name of theirs
        for name in names:
            parts = name.split(".")
            if parts[0] == "gibbs_ext" and (
                any(part.startswith("_") for part in parts)
                or (len(parts) > 1 and parts[1] in {*STOREYS, "reference"} - PUBLIC)
            ):
                found.append(name)
    return found


def include_violations(path: Path, text: str) -> list[str]:
    folder = path.parts[path.parts.index("csrc") + 1]
    allowed = ("core/",) if folder == "core" else ("core/", f"{folder}/")
    if path.name == "device.cuh":  # the one place that chooses between CUDA and the emulator
        allowed = (*allowed, "emulator.h")
    quoted = re.findall(r'#include "([^"]+)"', text)
    angled = re.findall(r"#include <([^>]+)>", text)
    return [n for n in quoted if not n.startswith(allowed)] + [
        n for n in angled if "torch" in n or "Python" in n or "pybind" in n
    ]


def import_path(path: Path) -> Path:
    return path.relative_to(ROOT / "python" if "python" in path.relative_to(ROOT).parts else ROOT)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    assert violations(import_path(path), path.read_text()) == []


@pytest.mark.parametrize("path", HEADERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_include_no_framework(path: Path) -> None:
    assert include_violations(path, path.read_text()) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("gibbs_ext/functional.py", "from gibbs_ext import _C"),
        ("gibbs_ext/functional.py", "from . import _C"),
        ("gibbs_ext/functional.py", "import torch\ntorch.ops.gibbs_ext.bipartite_gibbs"),
        ("gibbs_ext/functional.py", "from gibbs_ext.distributions import BipartiteBoltzmann"),
        ("gibbs_ext/chains.py", "def f():\n    from .nn.prior import BoltzmannPrior"),
        ("gibbs_ext/nn/prior.py", "from undirected_vae import vae"),
        ("gibbs_ext/functional.py", "from gibbs_ext.pictures import draw_chimera"),
        ("gibbs_ext/pictures.py", "from gibbs_ext.interop.dimod import BlockGibbsSampler"),
        ("undirected_vae/vae.py", "import gibbs_ext.ops"),
        ("undirected_vae/vae.py", "from gibbs_ext import ops"),
        ("undirected_vae/vae.py", "from gibbs_ext.nn.prior import _secret"),
        ("examples/spin_glass.py", "from gibbs_ext.functional import graph_gibbs"),
        ("examples/spin_glass.py", "from gibbs_ext.interop.dimod import _schedule"),
    ],
)
def test_a_wrong_import_is_found(path: str, text: str) -> None:
    assert violations(Path(path), text)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("csrc/core/a.h", '#include "cpu/bipartite.h"'),
        ("csrc/cpu/a.cpp", '#include "ops.h"'),
        ("csrc/cpu/a.cpp", "#include <torch/csrc/stable/tensor.h>"),
        ("csrc/cpu/a.cpp", "#include <Python.h>"),
        ("csrc/cpu/a.cpp", '#include "cuda/views.cuh"'),
        ("csrc/cuda/a_kernel.cuh", '#include "cpu/driver.h"'),
        ("csrc/cuda/a_kernel.cuh", '#include "emulator.h"'),
        ("csrc/cuda/a.cu", "#include <torch/csrc/stable/tensor.h>"),
    ],
)
def test_a_wrong_include_is_found(path: str, text: str) -> None:
    assert include_violations(Path(path), text)


def test_one_place_launches() -> None:
    """It alone checks sizes, asks for shared memory and takes the stream; see csrc/cuda/launch.cuh."""
    launching = [p for p in ROOT.glob("csrc/cuda/*") if p.is_file() and LAUNCHES.search(p.read_text())]
    assert [p.name for p in launching] == ["launch.cuh"]


def test_optional_packages_are_not_imported() -> None:
    program = """
import sys, gibbs_ext, gibbs_ext.interop, gibbs_ext.pictures
assert not {"dimod", "matplotlib", "networkx"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_every_source_names_its_licence() -> None:
    text = [p for p in SOURCES if p.suffix in {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh"}]
    assert text
    assert [p for p in text if "SPDX-License-Identifier: Apache-2.0" not in p.read_text()[:200]] == []


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("path", sorted(ROOT.glob("csrc/core/*.h")), ids=lambda p: p.name)
def test_a_core_header_stands_alone(path: Path) -> None:
    command = [
        "c++",
        "-std=c++17",
        "-fsyntax-only",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-x",
        "c++",
        "-I",
        str(ROOT / "csrc"),
    ]
    subprocess.run([*command, "-include", str(path), "/dev/null"], check=True)
