# SPDX-License-Identifier: Apache-2.0
"""Import rules on the transitive closure: a breach is found through any number of files, all of which are named.

In csrc/, python.cpp -> ops -> {cpu, cuda} -> core. In Python, undirected_vae and the examples import public names of
gibbs_ext only, and the modules of gibbs_ext form storeys.
"""

import ast
import fnmatch
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from posixpath import normpath

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
SOURCES = [p for d in ("csrc", "gibbs_ext", "python", "tests", "bench") for p in (ROOT / d).rglob("*.*")]
LAUNCHES = re.compile(r"<<<|cudaLaunch\w*\(|cuda_emulator::launch\(")

Chain = tuple[str, ...]


def reached(imports: Mapping[str, set[str]], start: str) -> dict[str, Chain]:
    """Everything that `start` imports, directly or through others, each with a shortest chain that leads to it."""
    chains, queue = {start: (start,)}, [start]
    for name in queue:
        for target in sorted(imports.get(name, ())):
            if target not in chains:
                chains[target] = (*chains[name], target)
                queue.append(target)
    del chains[start]
    return chains


def breaches(imports: Mapping[str, set[str]], may_reach: Callable[[str, str], bool]) -> list[Chain]:
    """Chains from each file to the first one on the way that it may not reach."""
    found = []
    for start in sorted(imports):
        for target, chain in reached(imports, start).items():
            if not may_reach(start, target) and all(may_reach(start, name) for name in chain[1:-1]):
                found.append(chain)
    return found


def rows_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split(" | ")] for line in table.strip().splitlines()]


# C++ --------------------------------------------------------------------------------------------------------------

KERNELS = r"cpu/kernels/(table|(\w+_)?types)\.h"  # what the outside sees of cpu/kernels/
TORCH = r"(torch|ATen|c10)/.*"
PYTHON = r"pybind11/.*|Python\.h"
# Files, by the first pattern that matches their path, and what they may reach. System headers are free.
MAY_REACH = {
    r"core/[^/]+": r"core/.*",
    r"cpu/kernels/[^/]+": r"core/.*|cpu/kernels/.*",
    r"cpu/[^/]+": rf"core/.*|cpu/[^/]+|{KERNELS}",
    r"cuda/[^/]+": r"core/.*|cuda/.*",
    r"ops/cpu/[^/]+": rf"core/.*|cpu/[^/]+|{KERNELS}|ops/[^/]+|ops/cpu/.*|{TORCH}",
    r"ops/cuda/[^/]+": rf"core/.*|cuda/.*|ops/[^/]+|ops/cuda/.*|{TORCH}",
    r"ops/[^/]+": rf"core/.*|ops/[^/]+|{TORCH}",
    r"python\.cpp": rf"core/.*|cpu/[^/]+|{KERNELS}|cuda/.*|ops/.*|{TORCH}|{PYTHON}",
}
# The one file that chooses between CUDA's headers and the emulator.
CHOICE = ("cuda/device.cuh", "emulator.h")


def includes(csrc: Path) -> dict[str, set[str]]:
    """What each file of csrc/ includes: paths below csrc/, and the names of all other headers but the system's."""
    found: dict[str, set[str]] = {}
    for path in csrc.rglob("*.*"):
        name = path.relative_to(csrc).as_posix()
        if path.is_dir() or path.suffix in {".md", ".py", ".pyc"}:
            continue
        found[name] = set()
        for bracket, target in re.findall(r'^\s*#\s*include\s*([<"]?)([^>"\s]+)', path.read_text(), re.MULTILINE):
            target = normpath(target)
            is_system = (
                bracket == "<" and not (csrc / target).exists() and not re.fullmatch(f"{TORCH}|{PYTHON}", target)
            )
            if not is_system and (name, target) != CHOICE:
                found[name].add(target)
    return found


def may_include(start: str, target: str) -> bool:
    """False, too, for a file that no pattern knows: a new folder needs a rule."""
    allowed = next((allowed for pattern, allowed in MAY_REACH.items() if re.fullmatch(pattern, start)), "")
    return re.fullmatch(allowed, target) is not None


def include_breaches(csrc: Path) -> list[str]:
    found = includes(csrc)
    unknown = [name for name in sorted(found) if not any(re.fullmatch(pattern, name) for pattern in MAY_REACH)]
    return [" -> ".join(chain) for chain in breaches(found, may_include)] + [f"no rule for {name}" for name in unknown]


def test_includes_point_downwards() -> None:
    found = include_breaches(CSRC)
    assert not found, "\n".join(found)


# The file, a line at its end, and one of the chains that this makes. All but a few start from the deepest files.
PLANTED_INCLUDES = """
    core/macros.h       | #include "cuda/views.cuh"             | cpu/*.h -> core/*.h -> core/macros.h -> cuda/views.cuh
    core/macros.h       | #include "cpu/graph.h"                | cuda/graph.cu -> * -> * -> * -> core/macros.h -> cpu/graph.h
    core/macros.h       | #include <torch/csrc/stable/tensor.h> | cuda/graph.cu -> * -> * -> * -> core/macros.h -> torch/*
    core/macros.h       | #include <Python.h>                   | ops/cpu/graph.cpp -> * -> core/macros.h -> Python.h
    core/philox.h       | #include "ops/schemas.h"              | cpu/graph_layout.cpp -> core/philox.h -> ops/schemas.h
    core/philox.h       | #include <cpu/graph.h>                | core/philox.h -> cpu/graph.h
    cpu/kernels/types.h | #include <pybind11/pybind11.h>        | cpu/graph.cpp -> * -> * -> * -> pybind11/pybind11.h
    cpu/kernels/types.h | #include "cpu/graph.h"                | cpu/kernels/table.h -> * -> cpu/kernels/types.h -> cpu/graph.h
    cpu/kernels/types.h | #include "cpu/kernels/simd.h"         | ops/cpu/graph.cpp -> * -> * -> * -> cpu/kernels/simd.h
    cpu/graph.h         | #include "cpu/../cuda/views.cuh"      | ops/cpu/graph.cpp -> cpu/graph.h -> cuda/views.cuh
    cuda/launch.cuh     | #include "cpu/kernels/table.h"        | ops/cuda/*.cpp -> * -> cuda/launch.cuh -> cpu/kernels/table.h
    cuda/launch.cuh     | #include "emulator.h"                 | cuda/graph.cu -> * -> cuda/launch.cuh -> emulator.h
    ops/arguments.h     | #include "cpu/graph.h"                | ops/cuda/*.cpp -> * -> cpu/graph.h
    ops/arguments.h     | #include "cuda/devices.h"             | ops/cpu/graph.cpp -> * -> cuda/devices.h
    ops/arguments.h     | #include "ops/cuda/library.h"         | ops/cpu/graph.cpp -> * -> ops/cuda/library.h
    ops/arguments.h     | #include <pybind11/numpy.h>           | ops/cuda/*.cpp -> * -> pybind11/numpy.h
    ops/arguments.h     | #include "schemas.h"                  | ops/arguments.h -> schemas.h
    ops/arguments.h     | #  include HEADER                     | ops/arguments.h -> HEADER
"""  # noqa: E501


@pytest.mark.parametrize(("path", "line", "chain"), rows_of(PLANTED_INCLUDES))
def test_a_planted_include_is_found(path: str, line: str, chain: str, tmp_path: Path) -> None:
    shutil.copytree(CSRC, tmp_path / "csrc")
    changed = tmp_path / "csrc" / path
    changed.write_text(f"{changed.read_text()}{line}\n")
    found = include_breaches(tmp_path / "csrc")
    assert fnmatch.filter(found, chain), found


def test_a_new_folder_needs_a_rule(tmp_path: Path) -> None:
    (tmp_path / "metal").mkdir()
    (tmp_path / "metal" / "graph.h").touch()
    assert include_breaches(tmp_path) == ["no rule for metal/graph.h"]


def test_one_place_launches() -> None:
    """It alone checks sizes, asks for shared memory and takes the stream; see csrc/cuda/launch.cuh."""
    launching = [p for p in ROOT.glob("csrc/cuda/*") if p.is_file() and LAUNCHES.search(p.read_text())]
    assert [p.name for p in launching] == ["launch.cuh"]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("path", sorted(ROOT.glob("csrc/core/*.h")), ids=lambda p: p.name)
def test_a_core_header_stands_alone(path: Path) -> None:
    command = ["c++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-x", "c++", "-I", str(CSRC)]
    subprocess.run([*command, "-include", str(path), "/dev/null"], check=True)


# Python -----------------------------------------------------------------------------------------------------------

# Modules of gibbs_ext reach only those of their own storey and of earlier ones. gibbs_ext/__init__.py is on top.
STOREYS = (
    *(
        {"checks", "ops", "progress"},
        {"graphs", "ising"},
        {"autograd"},
        {"arguments"},
        {"functional"},
        {"log_partition"},
    ),
    *(
        {"models"},
        {"chains", "diagnostics", "moments", "perfect", "tempering", "tracking"},
        {"distributed", "ladders", "likelihood"},
        {"nn"},
        {"pictures"},
        {"__init__", "interop"},
    ),
)


def sources() -> dict[str, str]:
    """Texts of all modules by their dotted names."""
    found = {}
    for folder, pattern in ((ROOT, "gibbs_ext/**/*.py"), (ROOT / "python", "**/*.py")):
        for path in folder.glob(pattern):
            found[".".join(path.relative_to(folder).with_suffix("").parts)] = path.read_text()
    return found


def imported(tree: ast.AST, module: str) -> set[str]:
    """Dotted names that a module imports: `from a import b` as a.b, and import_module("a.b")."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            names |= {".".join([*parents, *filter(None, [node.module]), alias.name]) for alias in node.names}
        elif isinstance(node, ast.Call) and re.search(r"\b(import_module|__import__)$", ast.unparse(node.func)):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return names


def module_imports(modules: Mapping[str, str]) -> dict[str, set[str]]:
    """The modules among `modules` that each of them imports.

    An import of a package's module also runs the package's __init__. That of gibbs_ext itself, which every import runs
    and which imports everything, counts only where a name is taken from it.
    """

    def modules_of(name: str, importer: str) -> set[str]:
        parts, owner = name.split("."), name.rpartition(".")[0]
        packages = [".".join([*parts[:i], "__init__"]) for i in range(2, len(parts) + 1)]
        found = {p for p in packages if p in modules and not importer.startswith(p.removesuffix("__init__"))}
        # A name is a module, a package, or something in one of them.
        named = [m for m in (name, f"{name}.__init__", owner, f"{owner}.__init__") if m in modules]
        return found | set(named[:1])

    found = {}
    for module, text in modules.items():
        names = imported(ast.parse(text), module) - {"gibbs_ext._C"}
        found[module] = {target for name in names for target in modules_of(name, module)} - {module}
    return found


def storey(module: str) -> int:
    return next(i for i, names in enumerate(STOREYS) if module.split(".")[1] in names)


def may_import(start: str, target: str) -> bool:
    """Within gibbs_ext; what other packages may import is said by `forbidden`."""
    if not start.startswith("gibbs_ext."):
        return True
    if "gibbs_ext.reference" in (start, target) or not target.startswith("gibbs_ext."):
        return False
    return storey(start) >= storey(target)


def used(tree: ast.AST, module: str) -> set[str]:
    """Dotted names that a module imports or reaches as attributes. Names that imports give are undone."""
    nodes = list(ast.walk(tree))
    aliases = {a.asname: a.name for node in nodes if isinstance(node, ast.Import) for a in node.names if a.asname}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and not node.level:
            aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    dotted = [ast.unparse(node).split(".") for node in nodes if isinstance(node, ast.Attribute)]
    return imported(tree, module) | {".".join([aliases.get(first, first), *others]) for first, *others in dotted}


def is_public(name: str, modules: Mapping[str, str]) -> bool:
    """Of a name that begins with gibbs_ext: whether its __init__ exports it, and nothing after that is private."""
    exported = re.search(r"__all__ = \[(.*?)\]", modules["gibbs_ext.__init__"], re.DOTALL)
    assert exported
    first, *others = re.match(r"[\w.]+", name)[0].split(".")[1:]
    return f'"{first}"' in exported[1] and not any(part.startswith("_") for part in others)


def forbidden(module: str, text: str, modules: Mapping[str, str]) -> list[str]:
    """What one module does that its package may not do, whatever the modules do that it imports."""
    tree = ast.parse(text)
    names = used(tree, module)
    if not module.startswith("gibbs_ext."):
        return sorted(name for name in names if name.startswith("gibbs_ext.") and not is_public(name, modules))
    backdoor = r"(gibbs_ext\.)?(ops\.)?_C|torch\.ops\.gibbs_ext" if module != "gibbs_ext.ops" else "$"
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lazy = {name for function in functions for name in imported(function, module) if name.startswith("gibbs_ext")}
    return sorted(name for name in names if re.fullmatch(backdoor, name)) + [f"{n}, inside a function" for n in lazy]


def import_breaches(modules: Mapping[str, str]) -> list[str]:
    imports = module_imports(modules)
    known = {"reference"}.union(*STOREYS)
    unknown = [m for m in sorted(modules) if m.startswith("gibbs_ext.") and m.split(".")[1] not in known]
    if unknown:
        return [f"no storey for {module}" for module in unknown]
    chains = breaches(imports, may_import)
    for start in modules:  # circles, each from its first module by name
        chains += [
            (*chain, start)
            for last, chain in reached(imports, start).items()
            if start in imports[last] and start == min(chain)
        ]
    single = [f"{module}: {name}" for module, text in modules.items() for name in forbidden(module, text, modules)]
    return single + [" -> ".join(chain) for chain in chains]


def test_imports_point_downwards() -> None:
    found = import_breaches(sources())
    assert not found, "\n".join(found)


# A whole package in small. Each breach below is one line more in one of these modules.
SMALL = {
    "gibbs_ext.__init__": 'from gibbs_ext import nn\nfrom gibbs_ext.models import Model\n__all__ = ["Model", "nn"]',
    "gibbs_ext.reference": "import numpy",
    "gibbs_ext.checks": "import torch",
    "gibbs_ext.ops": "from gibbs_ext import _C\ntorch.ops.gibbs_ext.graph_gibbs",
    "gibbs_ext.graphs": "from gibbs_ext import ops\nfrom gibbs_ext.checks import check_integers",
    "gibbs_ext.autograd": "from gibbs_ext import ops",
    "gibbs_ext.arguments": "from gibbs_ext import autograd\nfrom gibbs_ext.graphs import ColoredGraph",
    "gibbs_ext.functional": "from gibbs_ext.arguments import as_beta",
    "gibbs_ext.log_partition.__init__": "from gibbs_ext.log_partition.annealing import annealed",
    "gibbs_ext.log_partition.annealing": "from gibbs_ext.functional import graph_ais",
    "gibbs_ext.models.__init__": "from gibbs_ext.models.graph import Model",
    "gibbs_ext.models.base": "from gibbs_ext import functional\nfrom gibbs_ext.log_partition import annealing",
    "gibbs_ext.models.graph": "from gibbs_ext.models.base import Base",
    "gibbs_ext.chains": "from gibbs_ext.models import Model",
    "gibbs_ext.nn.__init__": "from gibbs_ext.nn.prior import Prior",
    "gibbs_ext.nn.prior": "from ..chains import Chains",
    "gibbs_ext.pictures": "from gibbs_ext.graphs import ColoredGraph",
    "gibbs_ext.interop.__init__": "import importlib",
    "gibbs_ext.interop.dimod": "from gibbs_ext import Model\nfrom gibbs_ext.chains import Chains",
    "undirected_vae.vae": "import gibbs_ext as gx\ngx.nn.Prior\nfrom gibbs_ext.nn import P\nfrom .config import Config",
    "undirected_vae.config": "from pathlib import Path",
    "examples.spin_glass": "from gibbs_ext import Model",
}  # fmt: skip


def test_a_small_package_keeps_the_rules() -> None:
    assert import_breaches(SMALL) == []


# The module, a line at its end, and one of the breaches that this makes, without "gibbs_ext.".
PLANTED_IMPORTS = """
    checks                  | from gibbs_ext.models import Model                   | graphs -> checks -> models.__init__
    checks                  | import gibbs_ext.nn.prior                            | arguments -> graphs -> checks -> nn.__init__
    checks                  | from gibbs_ext import Model                          | arguments -> graphs -> checks -> __init__
    functional              | from gibbs_ext.models import Model                   | log_partition.annealing -> functional -> models.__init__
    functional              | from gibbs_ext.pictures import draw                  | functional -> pictures
    graphs                  | from gibbs_ext.functional import graph_gibbs         | graphs -> functional
    log_partition.annealing | from gibbs_ext import models                         | log_partition.annealing -> models.__init__
    log_partition.annealing | from ..models.base import Base                       | log_partition.annealing -> models.base
    log_partition.annealing | def f(): from gibbs_ext import models                | log_partition.annealing -> models.__init__
    log_partition.annealing | importlib.import_module("gibbs_ext.models")          | log_partition.annealing -> models.__init__
    log_partition.annealing | if TYPE_CHECKING: from gibbs_ext.models import Model | log_partition.annealing -> models.__init__
    chains                  | from gibbs_ext.nn.prior import Prior                 | chains -> nn.__init__
    chains                  | from undirected_vae import vae                       | interop.dimod -> chains -> undirected_vae.vae
    pictures                | from gibbs_ext.interop.dimod import Sampler          | pictures -> interop.__init__
    reference               | from gibbs_ext import ops                            | reference -> ops
    reference               | from gibbs_ext.checks import shown                   | reference -> checks
    chains                  | from gibbs_ext import reference                      | nn.prior -> chains -> reference
    models.base             | from gibbs_ext.models.graph import Model             | models.base -> models.graph -> models.base
    models.base             | from gibbs_ext import models                         | models.__init__ -> models.graph -> models.base -> models.__init__
    models.graph            | def f(): from gibbs_ext import functional            | models.graph: functional, inside a function
    models.graph            | def f(): from ..log_partition import exact           | models.graph: log_partition.exact, inside a function
    functional              | from gibbs_ext import _C                             | functional: _C
    functional              | from . import _C                                     | functional: _C
    functional              | from gibbs_ext.ops import _C                         | functional: ops._C
    functional              | ops._C.build_info()                                  | functional: ops._C
    functional              | torch.ops.gibbs_ext.graph_gibbs.default              | functional: torch.ops.gibbs_ext
    undirected_vae.vae      | import gibbs_ext.ops                                 | undirected_vae.vae: ops
    undirected_vae.vae      | from gibbs_ext import ops                            | undirected_vae.vae: ops
    undirected_vae.vae      | gx.ops.build_info()                                  | undirected_vae.vae: ops.build_info
    undirected_vae.vae      | from gibbs_ext.nn.prior import _secret               | undirected_vae.vae: nn.prior._secret
    undirected_vae.vae      | from gibbs_ext.models import Model                   | undirected_vae.vae: models.Model
    undirected_vae.vae      | gx.Model._secret(gx.nn.Prior)                        | undirected_vae.vae: Model._secret
    undirected_vae.vae      | from gibbs_ext import nn as q; q.prior._secret       | undirected_vae.vae: nn.prior._secret
    undirected_vae.vae      | from gibbs_ext import Model as M; M._sweep           | undirected_vae.vae: Model._sweep
    functional              | from gibbs_ext import ops as o; o._C                 | functional: ops._C
    functional              | from torch import ops as o; o.gibbs_ext.graph_gibbs  | functional: torch.ops.gibbs_ext
    examples.spin_glass     | from gibbs_ext.functional import graph_gibbs         | examples.spin_glass: functional.graph_gibbs
    examples.spin_glass     | from gibbs_ext.interop.dimod import _schedule        | examples.spin_glass: interop.dimod._schedule
    examples.spin_glass     | from gibbs_ext.reference import philox               | examples.spin_glass: reference.philox
"""  # noqa: E501


def small_package_with(module: str, line: str) -> list[str]:
    name = module if module.startswith(("undirected_vae", "examples")) else f"gibbs_ext.{module}"
    return import_breaches(SMALL | {name: f"{SMALL[name]}\n{line}"})


@pytest.mark.parametrize(("module", "line", "breach"), rows_of(PLANTED_IMPORTS))
def test_a_planted_import_is_found(module: str, line: str, breach: str) -> None:
    found = [re.sub(r"(?<!ops\.)\bgibbs_ext\.", "", text) for text in small_package_with(module, line)]
    assert breach in found, found


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("ops", "from gibbs_ext import checks"),
        ("functional", "# torch.ops.gibbs_ext is for ops.py"),
        ("interop.dimod", "def f(): import dimod"),
    ],
)
def test_what_is_allowed_is_not_reported(module: str, line: str) -> None:
    assert small_package_with(module, line) == []


def test_a_new_module_needs_a_storey() -> None:
    assert import_breaches(SMALL | {"gibbs_ext.extras": ""}) == ["no storey for gibbs_ext.extras"]


def test_optional_packages_are_not_imported() -> None:
    program = """
import sys, gibbs_ext, gibbs_ext.interop, gibbs_ext.pictures
assert not {"dimod", "matplotlib", "networkx", "sklearn"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_every_source_names_its_licence() -> None:
    text = [p for p in SOURCES if p.suffix in {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh"}]
    assert text
    assert [p for p in text if "SPDX-License-Identifier: Apache-2.0" not in p.read_text()[:200]] == []
