# SPDX-License-Identifier: Apache-2.0
"""The steps of bench/gpu_proof.py, each in a process of its own: `python -m bench.gpu_steps STEP [--emulate]`.

A step writes each result as soon as it has it, so that a time limit or a crash loses only the rest. Modules of this
project are imported where they are used, because the first steps run before it is built.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from csv import DictReader
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gpu_proof import DEADLINE, SAYS
from .texts import ROOT

ROUNDS = 30
SAMPLES = 32  # number of chains, or models, of a standard problem that the CPU computes too
PRECISIONS = {  # precision of matrix products, and dtype of parameters and states
    "float32": ("highest", torch.float32),
    "bf16": ("highest", torch.bfloat16),
    "TF32": ("high", torch.float32),
}
NO_GPU = "no GPU: torch.cuda.is_available() is False"


class Failed(Exception):
    """The step has failed; the message says why."""


def say(**what: Any) -> None:
    # The line starts anew, because other output may precede it. NaN is refused: it is neither JSON nor a figure.
    print(f"\n{SAYS}{json.dumps(what, allow_nan=False)}", flush=True)


def found(**figures: Any) -> None:
    """Reports figures, which replace earlier figures of the same name."""
    say(figures=figures)


def shell(*command: str, seconds: float | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command for at most `seconds`, and shows its output."""
    if shutil.which(command[0]) is None:
        return subprocess.CompletedProcess(command, 127, stdout=f"there is no {command[0]} on the PATH")
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    assert process.stdout
    timer = threading.Timer(seconds or 0, process.kill)
    if seconds:
        timer.start()
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    status = process.wait()
    if timer.finished.is_set():
        lines.append(f"it took more than {seconds:.0f} s\n")
    timer.cancel()
    return subprocess.CompletedProcess(command, status, stdout="".join(lines))


def last_line(output: str) -> str:
    return (output.strip().splitlines() or ["no output"])[-1][:300]


def seconds_left() -> float:
    """Seconds until this step is stopped, less those that it needs to report its results."""
    return float(os.environ.get(DEADLINE, time.time() + 3600)) - time.time() - 5


# Backends: a GPU, or the emulator of the tests ---------------------------------------------------------------------


class Backend(NamedTuple):
    device: str
    call: Callable[..., Any]  # calls an op with tensors of that device
    call_from_cpu: Callable[..., Any]  # calls an op with tensors of the CPU and returns its results there
    set_route: Callable[[str], None]
    last_route: Callable[[], str]  # the route that binary sweeps took, which may differ from the one that was set


def backend(emulate: bool) -> Backend:
    """Sends all ops to the GPU or the emulator for the rest of this process. Tensors are made on the CPU by default.

    A default device would slow down the calls that are timed, because Python calls a function before each of PyTorch's.
    """
    import backends

    from gibbs_ext import ops

    if emulate:
        ops._call = backends.call_emulated
        torch.set_num_threads(1)
        library = backends.emulated_library()
        call = backends.call_emulated
        return Backend("cpu", call, call, library.set_route, lambda: library.last_route)
    return Backend("cuda", backends.call_on_cpu, backends.call_on_gpu, ops.set_cuda_route, ops.last_cuda_route)


def standard_problems(emulate: bool) -> list[Any]:
    """The problems of bench/cuda_report.py that PyTorch does in seconds, or small ones of the same kinds."""
    from . import cuda_report as report

    if not emulate:
        return [problem for problem in report.problems() if problem.chains <= 1 << 16]
    return [
        report.bipartite(6, 1, 20, 25, 5),
        report.bipartite(1, 70, 40, 33, 4),
        report.relaxed(6, 20, 3),
        report.ais(40, 20, 10),
        report.chimera(2, 40, 4),
        report.coloured("Pegasus P2", report.pegasus(2), 40, 4),
        report.chimera(2, 6, 4, models=True),
        report.chimera(2, 6, 3, models=True, num_relaxed=1),
    ]


def large_weights() -> Any:
    """A problem in which each model has a cluster of its own; those of the standard problems share a weight."""
    from . import cuda_report

    return cuda_report.bipartite(128, 1, 400, 400, 100)


def kind_of(problem: Any) -> str:
    if problem.num_relaxed:
        return "relaxed"
    return "ais" if problem.name.startswith("AIS") else "graph" if problem.quads else "bipartite"


# Environment, build ------------------------------------------------------------------------------------------------


def gpu_state() -> dict[str, str]:
    """Clocks, temperature, power, load and memory, from nvidia-smi."""
    names = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,utilization.gpu,memory.used"
    done = shell("nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader", "--id=0", seconds=30)
    values = [value.strip() for value in done.stdout.split(",")]
    return dict(zip(names.split(","), values, strict=False)) if done.returncode == 0 else {"error": done.stdout[:200]}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(emulate: bool) -> None:
    packages = ("numpy", "pytest", "hypothesis", "scipy", "triton", "pybind11", "ninja", "setuptools")
    found(
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        machine=platform.machine(),
        cores=os.cpu_count(),
        packages={name: version(name) for name in packages},
        tools=[name for name in ("nvcc", "ncu", "compute-sanitizer", "nvidia-smi", "g++") if shutil.which(name)],
    )
    if emulate:
        found(gpu=None)
        return
    if not torch.cuda.is_available():
        raise Failed(NO_GPU)
    properties = torch.cuda.get_device_properties(0)
    found(
        gpu=properties.name,
        compute_capability=architecture(),
        multiprocessors=properties.multi_processor_count,
        memory=properties.total_memory,
        shared_memory_per_block_optin=getattr(properties, "shared_memory_per_block_optin", None),
        L2=getattr(properties, "L2_cache_size", None),
        driver=shell("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", seconds=30).stdout.strip(),
        state=gpu_state(),
    )


def architecture() -> str:
    return "".join(map(str, torch.cuda.get_device_capability()))


def library_info() -> dict[str, Any]:
    """gibbs_ext.build_info() from another process, which may crash; then the fault is in "cuda"."""
    done = shell(sys.executable, "-c", "import gibbs_ext, json; print(json.dumps(gibbs_ext.build_info()))")
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, TypeError, IndexError):
        return {"cuda": f"gibbs_ext does not load: {done.stdout[-500:]}"}


def is_current() -> bool:
    """Whether an earlier build has code for this GPU, loads, and is newer than its sources."""
    names = ("_C" + str(sysconfig.get_config_var("EXT_SUFFIX")), "_cuda.so")
    libraries = [path for path in (ROOT / "gibbs_ext" / name for name in names) if path.exists()]
    sources = [path for path in [ROOT / "setup.py", *ROOT.glob("csrc/**/*")] if path.is_file()]
    newest = max(path.stat().st_mtime for path in sources)
    if len(libraries) < 2 or min(path.stat().st_mtime for path in libraries) < newest:
        return False
    info = library_info()
    return info["cuda"] == "loaded" and architecture() in info["cuda_architectures"]


def build(emulate: bool) -> None:
    if emulate:
        if library_info()["cuda"].startswith("gibbs_ext does not load"):
            done = shell(sys.executable, "setup.py", "build_ext", "--inplace", GIBBS_CUDA="0")
            if done.returncode:
                raise Failed(f"setup.py build_ext ended with exit status {done.returncode}")
        import backends

        found(library=backends.build.emulated_ops().name)
        return
    if is_current():
        found(was_built_before=True)
        return
    start = time.perf_counter()
    done = shell(
        sys.executable, "setup.py", "build_ext", "--inplace", GIBBS_CUDA="1", GIBBS_CUDA_ARCHITECTURES=architecture()
    )
    found(was_built_before=False, architectures=architecture(), compile_seconds=round(time.perf_counter() - start, 1))
    if done.returncode:
        raise Failed(f"setup.py build_ext ended with exit status {done.returncode}")


def build_info(emulate: bool) -> None:
    info = library_info()
    found(**info)
    if not emulate and info["cuda"] != "loaded":
        raise Failed(f"no CUDA kernels: {info['cuda']}")


# Equality ----------------------------------------------------------------------------------------------------------

# Places of an op's results that equal the CPU's to the bit; other results agree within tolerances.
EXACT = {
    "bipartite_gibbs": (0, 1),
    "bipartite_ais": (0, 1),
    "bipartite_gibbs_relaxed": (3,),
    "graph_gibbs": (0,),
    "graph_metropolis": (0,),
    "graph_ais": (0,),
    "graph_tempering": (0, 1, 2),
    "bipartite_moments": tuple(range(8)),
    "graph_moments": tuple(range(5)),
    "graph_gibbs_relaxed": (2,),
    "coupling_resolution": (0,),
}


# Ops that take one of several routes, by kind of model.
BINARY = {
    "bipartite": ("bipartite_gibbs", "bipartite_ais"),
    "graph": ("graph_gibbs", "graph_metropolis", "graph_ais"),
}


def tolerance(op: str, result: Tensor) -> float:
    """The largest norm of the differences, relative to the norm of the CPU's results.

    In single precision a unit at the very edge of a clip may fall on the other side, and its gradient then differs.
    """
    if op.endswith("ais"):
        return 1e-4
    return 1e-9 if result.dtype == torch.float64 else 1e-3 if op.endswith("backward") else 1e-4


def as_results(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


class Comparison:
    """Adds up the differences between an op's results and the CPU's over calls."""

    def __init__(self) -> None:
        self.calls = self.bits = self.different = 0
        self.error = 0.0  # the largest relative error
        self.wrong: list[str] = []
        self.routes: Counter[str] = Counter()  # routes that calls of binary sweeps took

    def add(self, op: str, route: str, actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
        self.calls += 1
        if any(op in ops for ops in BINARY.values()):
            self.routes[route] += 1
        for place, (a, e) in enumerate(zip(actual, expected, strict=True)):
            if place in EXACT.get(op, ()):
                different = e.numel() if a.shape != e.shape else int((a != e).sum())
                self.bits, self.different = self.bits + e.numel(), self.different + different
                if different:
                    self.wrong.append(f"{different} of {e.numel()} bits of result {place} differ")
                continue
            error = float((a.double() - e.double()).norm() / e.double().norm().clamp(min=1e-30))
            if not error <= tolerance(op, e):  # also true for NaN
                self.wrong.append(f"result {place} has a relative error of {error:.3g}")
            self.error = max(self.error, error)

    def figures(self) -> dict[str, Any]:
        error = self.error if self.error < 1e300 else str(self.error)
        return {
            "calls": self.calls, "bits": self.bits, "different": self.different, "largest_error": error,
            "routes": dict(self.routes),
        }  # fmt: skip


def report_comparisons(comparisons: dict[str, Comparison]) -> None:
    wrong = [f"{name}: {text}" for name, one in comparisons.items() for text in one.wrong]
    if not comparisons:
        raise Failed("nothing was compared")
    if wrong:
        raise Failed("; ".join(wrong[:10]))


def bits(route: str, there: Backend) -> None:
    """Compares small problems of many kinds by one route, which bipartite models, graphs or both of them have."""
    import backends
    import compare

    torch.manual_seed(0)
    comparisons: dict[str, Comparison] = {}
    # The emulator would take minutes for the larger sizes.
    sizes = compare.SIZES if there.device == "cpu" else (*compare.SIZES, (300, 310), (700, 900))
    for name, arguments, _routes, _tolerance in compare.calls(lambda other: other == route, sizes):
        op = getattr(torch.ops.gibbs_ext, name).default
        expected = as_results(backends.call_on_cpu(op, *arguments))
        there.set_route(route)
        actual = as_results(there.call_from_cpu(op, *arguments))
        there.set_route("auto")
        comparisons.setdefault(name, Comparison()).add(name, there.last_route(), actual, expected)
        found(**{name: comparisons[name].figures()})
    report_comparisons(comparisons)
    for kind, ops in BINARY.items():
        # Not every op has every route, but one of each kind must have taken it.
        taken = sum((comparisons[op].routes for op in ops if op in comparisons), Counter())
        if taken and route not in ("auto", *taken):
            raise Failed(f"no {kind} call took the route {route}, which does not fit this device: {dict(taken)}")


# Number of trailing dimensions of an op's arguments that do not belong to the batch; fields also have one before it.
CORE = {"weight": 2, "chains": 0} | dict.fromkeys(
    ("left", "left_bias", "right_bias", "right", "clamp_left", "clamp_right", "base_left_bias", "base_right_bias",
     "state", "bias", "coupling", "clamp", "base_bias", "grad_left", "grad_right", "grad_left_mean", "grad_relaxed",
     "grad_mean", "fields"),
    1,
)  # fmt: skip
FIELDS = {"bipartite_gibbs_relaxed": 4, "graph_gibbs_relaxed": 3}  # place of the result fields [R, chains, n]


def of_rows(tensor: Tensor, dim: int, rows: Tensor) -> Tensor:
    return tensor.detach().index_select(dim, rows.to(tensor.device)).cpu()


def of_chains(op: Any, arguments: Sequence[Any], rows: Tensor, num_chains: int) -> list[Any]:
    """A call's arguments on the CPU for some of its chains. Chains are independent, so these give the same results."""
    names = [argument.name for argument in op._schema.arguments]
    values = dict(zip(names, arguments, strict=True))
    for name, value in values.items():
        if not isinstance(value, Tensor):
            continue
        dim = 1 if name == "fields" else 0
        if name in CORE and value.dim() > CORE[name] + dim:
            if value.dim() != CORE[name] + dim + 1 or value.shape[dim] not in (1, num_chains):
                raise ValueError(f"of_chains: {name}: expected a batch [{num_chains}], got shape {list(value.shape)}")
            if value.shape[dim] == num_chains:
                value = of_rows(value, dim, rows)
        values[name] = value.detach().cpu()
    if values["chains"] is None:
        values["chains"] = rows + values["chain_offset"]
        values["chain_offset"] = 0
    return list(values.values())


def headline(kind: str, there: Backend, problems: Iterable[Any]) -> None:
    """Compares standard problems at full size by every route; the CPU computes some of their chains."""
    import backends

    from gibbs_ext import ops

    calls: list[tuple[Any, Sequence[Any], Any, str]] = []

    def record(op: Any, *arguments: Any) -> Any:
        results = there.call(op, *arguments)
        if op._schema.name.removeprefix("gibbs_ext::") in EXACT or "backward" in op._schema.name:
            calls.append((op, arguments, results, there.last_route()))
        return results

    comparisons: dict[str, Comparison] = {}
    before, ops._call = ops._call, record
    try:
        for problem in problems:
            routes = {"relaxed": (), "graph": backends.GRAPH_ROUTES}.get(kind, backends.BIPARTITE_ROUTES)
            with torch.device(there.device):
                call = problem.ours(problem.sweeps)
            for route in ("auto", *routes):
                calls.clear()
                there.set_route(route)
                call()
                there.set_route("auto")
                comparison = comparisons[f"{problem.name}, {route}"] = Comparison()
                for op, arguments, results, taken in calls:
                    compare_chains(comparison, taken, op, arguments, as_results(results), backends.call_on_cpu)
                found(**{f"{problem.name}, {route}": comparison.figures()})
    finally:
        ops._call = before
    report_comparisons(comparisons)


def compare_chains(
    comparison: Comparison,
    route: str,
    op: Any,
    arguments: Sequence[Any],
    results: list[Tensor],
    call_on_cpu: Callable[..., Any],
) -> None:
    name = op._schema.name.removeprefix("gibbs_ext::")
    if results[0].dim() < 2:  # coupling_resolution
        return
    num_chains = results[0].shape[0]
    # The chains are spread over the batch, with the first and the last.
    rows = torch.linspace(0, num_chains - 1, min(SAMPLES, num_chains), dtype=torch.float64).long()
    expected = as_results(call_on_cpu(op, *of_chains(op, arguments, rows, num_chains)))
    sampled = [of_rows(result, int(FIELDS.get(name) == place), rows) for place, result in enumerate(results)]
    comparison.add(name, route, sampled, expected)


# Speed -------------------------------------------------------------------------------------------------------------


def timed(call: Callable[[], object], device: str, most: float = 1.0) -> dict[str, Any]:
    """Median microseconds of up to 30 calls, by CUDA events; of fewer calls, at least 5, if they take too long."""
    call()
    if device != "cuda":
        times = []
        for _ in range(5):
            start = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - start))
        return {"us": statistics.median(times), "rounds": len(times)}
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    rounds = max(5, min(ROUNDS, int(most / once)))
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return {"us": statistics.median(times), "least_us": min(times), "rounds": rounds}


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:300]}"


def ours(there: Backend, problems: Iterable[Any]) -> None:
    from .harness import as_cuda_graph

    on_gpu = there.device == "cuda"
    if on_gpu:
        found(before=gpu_state())
    failed = []
    entries: dict[str, list[dict[str, Any]]] = {}
    problems = list(problems)
    # A capture that fails may leave traces, so calls that are not captured come first.
    for mode in ("eager", "captured") if on_gpu else ("eager",):
        for problem in problems:
            updates = problem.updates * (problem.sweeps + problem.num_relaxed)
            entry: dict[str, Any] = {"mode": mode}
            try:
                with torch.device(there.device):
                    call = problem.ours(problem.sweeps)
                entry |= timed(as_cuda_graph(call) if mode == "captured" else call, there.device)
                entry["updates_per_second"] = updates / entry["us"] * 1e6
            except Exception as error:
                entry["error"] = reason(error)
                failed.append(f"{problem.name}, {mode}: {entry['error']}")
            entries.setdefault(problem.name, []).append(entry)
            found(**{problem.name: entries[problem.name]})
    if on_gpu:
        found(after=gpu_state())
    if failed:
        raise Failed("; ".join(failed))


def peers(mode: str, there: Backend, problems: Sequence[Any]) -> None:
    """Times plain PyTorch. A way that fails has an error in place of figures and does not stop the others."""
    from . import cuda_report
    from .harness import as_cuda_graph

    entries: dict[str, list[dict[str, Any]]] = {problem.name: [] for problem in problems}
    # Ways that must be compiled come last, because they take long.
    for is_compiled in {"eager": (False,), "compiled": (True,)}.get(mode, (False, True)):
        for problem in problems:
            for precision, (matmul, dtype) in PRECISIONS.items():
                torch.set_float32_matmul_precision(matmul)
                for way in problem.ways:
                    if (way == cuda_report.COMPILE) != is_compiled:
                        continue
                    entry: dict[str, Any] = {"way": way, "precision": precision, "mode": mode}
                    try:
                        with torch.device(there.device):
                            call = problem.peer(problem.sweeps, way, dtype)
                        entry |= timed(as_cuda_graph(call) if mode == "captured" else call, there.device, 0.3)
                    except Exception as error:
                        entry["error"] = reason(error)
                    entries[problem.name].append(entry)
            found(**{problem.name: entries[problem.name]})
            torch._dynamo.reset()  # torch.compile gives up functions that it has compiled many times
    if not any("us" in entry for of_problem in entries.values() for entry in of_problem):
        raise Failed("no peer ran")


# Training ----------------------------------------------------------------------------------------------------------


def blobs(count: int, side: int = 28) -> Tensor:
    """Gray images [count, side * side] uint8 that a network can learn: one to three blobs each."""
    generator = torch.Generator().manual_seed(1)
    grid = torch.arange(side).float()
    centers = torch.rand(count, 3, 2, generator=generator) * (side - 8) + 4
    widths = 2 + 3 * torch.rand(count, 3, 1, generator=generator)
    seen = (torch.rand(count, 3, 1, 1, generator=generator) < 0.7).float()
    rows, columns = (torch.exp(-(((grid - centers[..., i : i + 1]) / widths) ** 2)) for i in (0, 1))
    images = (seen * rows[..., :, None] * columns[..., None, :]).sum(1).clamp(max=1)
    return (255 * images).to(torch.uint8).flatten(1)


def training(there: Backend) -> None:
    """Times a training step of the default model."""
    from undirected_vae.config import Config
    from undirected_vae.data import Dataset
    from undirected_vae.train import Trainer

    on_gpu = there.device == "cuda"
    images = blobs(1200 if on_gpu else 60)
    data = Dataset(images, images[:50], images[:50], (28, 28), "blobs")
    sizes: dict[str, Any] = {}
    if not on_gpu:
        sizes = {"left": 10, "right": 10, "encoder": (20,), "decoder": (20,), "prior_chains": 20, "batch_size": 10}
    warm_up, steps = (50, 300) if on_gpu else (2, 3)
    failed = []
    for coupling in ("shared", "per_sample"):
        for capture in (False, True) if on_gpu else (False,):
            name = f"{coupling}, {'captured' if capture else 'eager'}"
            try:
                trainer = Trainer(Config(coupling=coupling, **sizes), data, torch.device(there.device), capture=capture)
                trainer.advance(warm_up)
                if on_gpu:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                trainer.advance(steps)
                if on_gpu:
                    torch.cuda.synchronize()
                per_second = steps / (time.perf_counter() - start)
                found(**{name: {"ms": 1e3 / per_second, "steps_per_second": per_second}})
            except Exception as error:
                found(**{name: {"error": reason(error)}})
                failed.append(f"{name}: {reason(error)}")
    if failed:
        raise Failed("; ".join(failed))


def preset(steps: int = 20_000, device: str = "cuda", count: int = 10_000, *more: str) -> None:
    """Trains the paper's preset by the command line, on images made here, because nothing can be downloaded."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        images = blobs(count).view(-1, 28, 28).numpy()
        trained, held_out = count * 8 // 10, count * 9 // 10
        path, run = Path(folder, "blobs.npz"), Path(folder, "run")
        np.savez(path, train=images[:trained], validation=images[trained:held_out], test=images[held_out:])
        command = [
            sys.executable, "-m", "undirected_vae", "train", "--preset", "paper-mnist-200", "--steps", str(steps),
            "--no-evaluate", "--device", device, "--data", str(path), "--run", str(run), *more,
        ]  # fmt: skip
        start = time.perf_counter()
        done = shell(*command, seconds=seconds_left())
        seconds = time.perf_counter() - start
        text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
        lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        found(seconds=seconds, steps=lines[-1]["step"] if lines else 0, metrics=[lines[i] for i in (0, -1) if lines])
        if done.returncode:
            raise Failed(f"exit status {done.returncode}: {last_line(done.stdout)}")
        if not lines or lines[-1]["step"] != steps:
            raise Failed(f"expected {steps} steps, metrics.jsonl has {lines[-1]['step'] if lines else 'none'}")


# Ceilings ----------------------------------------------------------------------------------------------------------


def compile_ceilings(number: str, folder: Path) -> Path:
    sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
    import nvcc

    cuda = nvcc.find()
    if cuda is None:
        raise Failed("there is no nvcc in CUDA_HOME/bin or on the PATH, or GIBBS_CUDA=0")
    source, program = Path(__file__).with_name("ceilings.cu"), folder / "ceilings"
    flags = ["-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", f"-arch=sm_{number}", "-Werror", "all-warnings"]
    done = shell(cuda.nvcc, *flags, str(source), "-o", str(program))
    if done.returncode:
        raise Failed(f"nvcc ended with exit status {done.returncode}: {last_line(done.stdout)}")
    return program


def ceilings() -> None:
    """Measures the limits of this GPU with the simplest kernels that reach them."""
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    copy = timed(lambda: target.copy_(source), "cuda")
    found(torch_copy_bytes_per_second=2 * source.numel() / copy["us"] * 1e6)
    a, b = (torch.randint(-9, 9, (8192, 8192), dtype=torch.int8, device="cuda") for _ in range(2))
    try:
        product = timed(lambda: torch._int_mm(a, b.T), "cuda")
        found(torch_int8_multiply_adds_per_second=8192**3 / product["us"] * 1e6)
    except RuntimeError as error:
        found(torch_int8_multiply_adds_per_second=reason(error))
    with tempfile.TemporaryDirectory() as folder:
        done = shell(str(compile_ceilings(architecture(), Path(folder))), seconds=seconds_left())
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            found(**json.loads(line))
    if done.returncode:
        raise Failed(f"ceilings.cu ended with exit status {done.returncode}: {last_line(done.stdout)}")
    found(state=gpu_state())


# Tools -------------------------------------------------------------------------------------------------------------


def sanitizer(tool: str, route: str) -> None:
    done = shell(
        # PyTorch tries out features of the driver, so errors of API calls are no faults. Its cache of memory would hide
        # accesses beyond the end of a tensor.
        "compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9",
        sys.executable, "tests/ops/test_gpu.py", route, "1", PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )  # fmt: skip
    summaries = sanitizer_summaries(done.stdout)
    found(summaries=summaries)
    if done.returncode:
        raise Failed(f"exit status {done.returncode}: {'; '.join(summaries or [last_line(done.stdout)])[:500]}")
    if "the small problems agree" not in done.stdout or not summaries:
        raise Failed("the small problems did not run to their end")


def sanitizer_summaries(text: str) -> list[str]:
    return [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line][:10]


# Kernels, each with the problem and the route that launch it. Those named after a route are one kernel, in calls that
# take this route by themselves on an H100.
KERNELS = {
    "registers": ("bipartite_kernel", "4096 models, 200+200, 100 sweeps", "auto"),
    "shared": ("bipartite_kernel", "AIS, 1024 chains, 100+100, 1000 steps", "auto"),
    "cluster": ("bipartite_kernel", "shared weight, 65536 chains, 784+500, 100 sweeps", "auto"),
    "graph": ("graph_kernel", "Chimera C16, 16384 chains, 100 sweeps", "auto"),
    "relaxed_backward": ("bipartite_backward_kernel", "4096 models, 200+200, 10 + 1 sweeps and backward", "auto"),
}
METRICS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
    "lts__t_sectors.sum",
    "dram__bytes.sum",
    "smsp__inst_executed.sum",
    "launch__registers_per_thread",
    "launch__shared_mem_per_block",
    "launch__grid_size",
    "launch__block_size",
    "launch__waves_per_multiprocessor",
)


def kernel(which: str, there: Backend) -> None:
    """Calls the problem of a kernel three times, for ncu."""
    with torch.device(there.device):
        problem, route = problem_of(which)
        call = problem.ours(problem.sweeps)
    there.set_route(route)
    for _ in range(3):
        call()
    torch.cuda.synchronize()


def problem_of(which: str) -> tuple[Any, str]:
    """The problem and the route that launch a kernel."""
    _, name, route = KERNELS[which]
    return next(problem for problem in standard_problems(False) if problem.name == name), route


def ncu(which: str) -> None:
    function, problem, _ = KERNELS[which]
    found(problem=problem)
    chosen = ["--metrics", ",".join(METRICS)]
    while True:
        done = shell(
            "ncu", "--csv", "--page", "raw", "--set", "basic", *chosen, "--kernel-name", function,
            "--launch-skip", "1", "--launch-count", "1", sys.executable, "-m", "bench.gpu_steps", f"kernel:{which}",
            seconds=seconds_left(),
        )  # fmt: skip
        if not chosen or "Failed to find metric" not in done.stdout:
            break
        chosen = []  # this GPU has other names for METRICS, so only the set is measured
    if "ERR_NVGPUCTRPERM" in done.stdout:
        raise Failed("ERR_NVGPUCTRPERM: this user may not read the GPU's counters")
    metrics = ncu_metrics(done.stdout)
    found(metrics=metrics)
    if not metrics:
        raise Failed(f"exit status {done.returncode}, no metrics of {function}: {last_line(done.stdout)}")


def ncu_metrics(text: str) -> dict[str, str]:
    """The METRICS in ncu's table, each with its unit. The table has names, units, then a row for each launch."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return {}
    rows = list(DictReader(line for line in lines[begin:] if line.startswith('"')))
    if len(rows) < 2:
        return {}
    units, values = rows[0], rows[1]
    return {name: f"{values[name]} {units[name]}".strip() for name in METRICS if values.get(name)}


def suite(which: str) -> None:
    """Runs a part of tests/ops/test_gpu.py: `own`, the tests of features of a GPU; or `ops`, the tests of the ops."""
    synchronous = which == "ops"
    command = [sys.executable, "-m", "pytest", "tests/ops/test_gpu.py", "-v", "-p", "no:cacheprovider"]
    if synchronous and importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    command += ["-k", "not compute_sanitizer"]  # compute-sanitizer has steps of its own
    settings = {"GIBBS_REQUIRE_CUDA": "1", "GIBBS_CUDA_SYNCHRONOUS": str(int(synchronous))}
    run = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | settings,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    assert run.stdout
    counts = tally(run.stdout)
    if run.wait():
        raise Failed(f"exit status {run.returncode}: {dict(counts)}")
    if not counts["passed"]:
        raise Failed("no test passed")


def tally(lines: Iterable[str]) -> Counter[str]:
    """Shows pytest's output, and reports now and then how many tests passed or failed, and which failed."""
    counts: Counter[str] = Counter()
    failed: list[str] = []
    for line in lines:
        print(line, end="")
        # pytest writes the test's name first, pytest-xdist last; the summary at the end has no percentage.
        if not (verdict := re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b.*", line)) or "%]" not in line:
            continue
        counts[verdict[1].lower()] += 1
        if verdict[1] in ("FAILED", "ERROR"):
            failed += re.findall(r"tests/\S+", line)
        if verdict[1] in ("FAILED", "ERROR") or sum(counts.values()) % 50 == 0:
            found(**counts, failed_tests=failed[:50])
    found(**counts, failed_tests=failed[:50])
    return counts


# -------------------------------------------------------------------------------------------------------------------


def run(name: str, emulate: bool) -> None:
    kind, _, which = name.partition(":")
    plain: dict[str, Callable[[bool], None]] = {
        "environment": environment, "build": build, "build_info": build_info,
    }  # fmt: skip
    tools: dict[str, Callable[..., None]] = {"ceilings": ceilings, "ncu": ncu, "tests": suite}
    if kind in plain:
        return plain[kind](emulate)
    if kind == "preset" and emulate:  # the rehearsal runs the command line on the CPU
        small = ("--left", "10", "--right", "10", "--encoder", "20", "--decoder", "20", "--prior-chains", "20")
        return preset(2, "cpu", 200, *small, "--batch-size", "20")
    if not emulate and not torch.cuda.is_available():
        raise Failed(NO_GPU)
    if kind == "preset":
        return preset()
    if kind in ("memcheck", "racecheck"):
        return sanitizer(kind, which)
    if kind in tools:
        return tools[kind](*[which] * bool(which))
    there = backend(emulate)
    if kind == "kernel":
        return kernel(which, there)
    if kind == "bits":
        return bits(which, there)
    if kind == "training":
        return training(there)
    with torch.device(there.device):
        problems = standard_problems(emulate)
    if kind == "headline":
        problems += [] if emulate else [large_weights()]
        return headline(which, there, [problem for problem in problems if kind_of(problem) == which])
    if kind == "ours":
        return ours(there, problems)
    if kind == "peers":
        return peers(which, there, problems)
    raise Failed(f"there is no step of this name: {name}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_steps", description=__doc__.split("\n\n")[0])
    parser.add_argument("step")
    parser.add_argument("--emulate", action="store_true")
    args = parser.parse_args()
    try:
        run(args.step, args.emulate)
    except Failed as failure:
        say(failed=str(failure)[:2000])
        return 1
    say(done=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
