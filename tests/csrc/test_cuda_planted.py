# SPDX-License-Identifier: Apache-2.0
"""Faults are planted in the CUDA kernels, one at a time: a comparison of emulated ops with the CPU's finds each."""

import re
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda"))
import eighths

import build


class Fault(NamedTuple):
    what: str
    kernel: str  # csrc/cuda/{kernel}_kernel.cuh, or {kernel}.cuh
    old: str
    new: str


def missing(what: str, kernel: str, barrier: str, *, after: str) -> Fault:
    """A barrier is left out, which the code before it tells from others."""
    return Fault(what, kernel, f"{after} {barrier}", after)


FAULTS = [
    missing(
        "no barrier after open units of a side",
        "bipartite",
        "__syncthreads();",
        after="close(side, sweep, bounds);",
    ),
    Fault(
        "no low bits of an open unit's word",
        "bipartite",
        "<< 24 | draw_low_bits(stream(chain, sweep), number)",
        "<< 24",
    ),
    Fault(
        "exact fields of the transposed weight",
        "bipartite",
        "side == 0 ? unit : other, side == 0 ? other : unit",
        "side == 1 ? unit : other, side == 1 ? other : unit",
    ),
    Fault(
        "bits that no lane adds to an exact field", "bipartite", "chain, 1u << lane())", "chain, 1u << (lane() | 1))"
    ),
    missing("bytes read before they are drawn", "bipartite", "__syncthreads();", after="draw_bytes(sweep);"),
    missing("a half sweep before all is loaded", "bipartite", "barrier();", after="load_states(1);"),
    missing("chains loaded before others are stored", "bipartite", "__syncthreads();", after="sweep_chains();"),
    missing("no barrier of the cluster after a side", "bipartite", "sync_cluster();", after="publish(side);"),
    Fault("a CTA that keeps its bits to itself", "bipartite", "publish(side);", ""),
    Fault(
        "words of the first sweep again",
        "bipartite",
        "uint64_t(p_.sweep.sweep_offset + sweep)",
        "uint64_t(p_.sweep.sweep_offset)",
    ),
    Fault("the next CTA's chains are the same", "bipartite", "% p_.clusters_per_model;", "* 0;"),
    Fault(
        "a CTA's next chains are those of another",
        "bipartite",
        "int64_t{p_.clusters_per_model} * chain_slots()",
        "chain_slots()",
    ),
    Fault(
        "units in the wrong order",
        "bipartite",
        "field_of(sums.of[tile][m], 2 * r + column,",
        "field_of(sums.of[tile][m], 2 * column + r,",
    ),
    Fault(
        "bits that a lane does not send",
        "bipartite",
        "bits |= __shfl_xor_sync(kFullWarp, bits, 8);",
        "__shfl_xor_sync(kFullWarp, bits, 8);",
    ),
    Fault("a factor that stays in the sums", "bipartite", "sums[0][element] >> shift)", "sums[0][element])"),
    Fault(
        "bits of another tile",
        "bipartite",
        "0x01010101u << shift_of(n)",
        "0x01010101u << shift_of(n ^ 1)",
    ),
    Fault(
        "an interleaved byte in the wrong word",
        "bipartite",
        "slot_of(first.chain(), quarter)) + 2 * first.fragment",
        "slot_of(first.chain(), quarter ^ 1)) + 2 * first.fragment",
    ),
    Fault(
        "states that are not interleaved",
        "bipartite",
        "return interleaved(tile_in_bundle(chain), [&]",
        "return interleaved(chain % 4, [&]",
    ),
    Fault("an open unit of another tile", "bipartite", "2 * tile_in_bundle(chain) + in_word % 2", "in_word % 2"),
    Fault("the second half of a word is left out", "bipartite", "fragment = item % kParts,", "fragment = 0,"),
    Fault("bytes of another unit", "bipartite", ">> (16 * (group() % 2));", ">> (16 * (group() % 1));"),
    Fault("units that there are not", "bipartite", "< unsigned(of.n)) << i", "< unsigned(of.n + 31)) << i"),
    Fault("a unit for which there is no room", "bipartite", "left |= 1u << k;", "left |= 0;"),
    Fault("open units of a side are forgotten", "bipartite", "close(side, sweep, bounds);", ""),
    Fault(
        "a clamped unit is updated",
        "bipartite",
        "(old & fixed) | (~decided.is_not_one & ~fixed)",
        "~decided.is_not_one",
    ),
    Fault(
        "blocks of the other side", "bipartite", "own_[0].resident_at = own(1).words.count() * side_of(0).words;", ""
    ),
    Fault("bits of the first bundle alone", "bipartite", "chain / kBundleChains * kBundleChains + 4 *", "4 *"),
    Fault("bytes of another span", "bipartite", "nth_span - (side ? first_spans : 0)", "nth_span"),
    Fault(
        "bytes of the other side",
        "bipartite",
        "= byte_run(0).end - byte_run(0).begin - byte_run(1).begin;",
        "= -byte_run(1).begin;",
    ),
    Fault(
        "a weight of right units is left out",
        "bipartite",
        "if (kAnnealed && side == 1) { weigh_right",
        "if (false) { weigh_right",
    ),
    Fault("couplings of another row", "bipartite_slices", "8 * i + 2 * t + half - from.offset", "8 * i + 2 * t + half"),
    Fault("columns in the wrong order", "bipartite_slices", "8 * i + 2 * t + half", "4 * t + i + 16 * half"),
    Fault(
        "rows in the wrong order",
        "bipartite_slices",
        "first_unit + 16 * (row / 2) + row % 2",
        "first_unit + 2 * g + row",
    ),
    Fault("a residual of another unit", "bipartite_slices", "16 * (row / 2) + 2 * g + row % 2", "4 * g + row"),
    Fault(
        "a residual on the wrong side",
        "bipartite_slices",
        "above[row] += int32_t(residual) > 0 ? residual : 0;",
        "above[row] += int32_t(residual) > 0 ? 0 : 0 - residual;",
    ),
    Fault(
        "rows of no part", "bipartite_slices", "end = num_rows * (part + 1) / parts", "end = num_rows * part / parts"
    ),
    Fault("the column of one part", "bipartite_slices", "column += of_model[of *", "column = of_model[of *"),
    Fault("a row of no part", "bipartite_slices", "if (threadIdx.x == 0) own[1] = head[1];", "own[1] = 0;"),
    Fault(
        "the largest of no part",
        "bipartite_slices",
        "of < params.plan.parts; of += kScaleThreads) stored",
        "of < 0; of += kScaleThreads) stored",
    ),
    Fault(
        "a digit that is not signed",
        "rounding",
        "int32_t(int8_t(uint32_t(rest) & 0xff))",
        "int32_t(uint32_t(rest) & 0xff)",
    ),
    missing(
        "no barrier between values and products",
        "bipartite_relaxed",
        "__syncthreads();",
        after="n1 + j, j, j, value).value; });",
    ),
    missing(
        "no barrier in the backward pass",
        "bipartite_relaxed",
        "__syncthreads();",
        after="out(p.grad_left_bias, c, n1)[i] += grad; });",
    ),
    missing(
        "sums of warps written over",
        "bipartite_relaxed",
        "__syncthreads();",
        after="sum(chain + c, column) = total; }",
    ),
    missing(
        "sums of rows that are not there yet",
        "bipartite_relaxed",
        "__syncthreads();",
        after="sum(chain + c, row) = total; } }",
    ),
    Fault(
        "a column of another row",
        "bipartite_relaxed",
        "for (int i = lane(); i < n1; i += kWarpSize) to[i * ld + j]",
        "for (int i = lane(); i < n1; i += kWarpSize) to[i * (ld - 1) + j]",
    ),
    Fault(
        "a sum of another row",
        "bipartite_relaxed",
        "second_of_two ? first : second, 8",
        "second_of_two ? second : first, 8",
    ),
    Fault("a factor of another row", "bipartite_relaxed", "kOuterTile + k * kApart + row", "kOuterTile + row"),
    Fault(
        "outer products that no part has",
        "bipartite_relaxed",
        "factors * (part % params.parts) / params.parts, end",
        "factors * (part % params.parts) / params.parts + 1, end",
    ),
    Fault(
        "words of a binary sweep again",
        "bipartite_relaxed",
        "s.sweep_offset + s.num_sweeps + relaxed_sweep",
        "s.sweep_offset + relaxed_sweep",
    ),
    missing("no barrier after open units", "graph", "__syncthreads();", after="close(sweep, bounds);"),
    Fault(
        "open units are forgotten", "graph", "if (open) note<kChains>(position, first, open, high, sweep, bounds);", ""
    ),
    Fault("noted units are never cleared", "bounds", "if (threadIdx.x == 0) counts_[turn_ ^ 1] = 0;", ""),
    Fault(
        "a flip of the wrong sign",
        "graph",
        "decided.add(open_logits_[byte], -high, -low);",
        "decided.add(open_logits_[byte], low, high);",
    ),
    Fault("every chain the first of its byte", "graph", "bits >>= shift;", ""),
    Fault(
        "a slice in the wrong place", "graph", "uint32_t(rest & 0xff) << (8 * i)", "uint32_t(rest & 0x7f) << (8 * i)"
    ),
    Fault("a clamp is ignored", "graph", "(old & fixed) | (drawn & ~fixed)", "drawn"),
    Fault("intervals too short", "bounds", "return 2e-4f +", "return -2e-2f +"),
    Fault("an error that is not allowed for", "bounds", "(field_error + 1024.0f)", "(0.0f * field_error)"),
    Fault("a part that is in no sum", "stages", "part = warp(); part < p.parts", "part = warp() + 1; part < p.parts"),
    Fault("biases in the nodes' order", "stages", "job.order ? job.order[at] : at", "at"),
    Fault(
        "rows in the wrong place",
        "stages",
        "linear_number(p.batch, own.row / p.batch.chains_per_model, own.row % p.batch.chains_per_model)",
        "own.row",
    ),
    Fault(
        "too little room for random words",
        "graph_relaxed",
        "low_words = plan.tile * round_up(call.num_nodes, 32)",
        "low_words = plan.tile * call.num_nodes",
    ),
    missing(
        "no barrier between colours of relaxed sweeps",
        "graph_relaxed",
        "__syncthreads();",
        after="mean[row + node] = unit.mean; } }",
    ),
    Fault("the gradient stops a sweep early", "graph_relaxed", "sweep >= -1; --sweep", "sweep >= 0; --sweep"),
    Fault("a coupling of the wrong sign", "graph_fields", "field += coupling", "field -= coupling"),
    Fault("a cluster that grows once", "tempering", "= kInCluster, grows = true;", "= kInCluster;"),
    Fault(
        "edges that do not couple connect",
        "tempering",
        "&& coupling_at(m.coupling, coupling, m.is_double, k, 0, edge);",
        ";",
    ),
    missing("marks read before they are written", "tempering", "__syncthreads();", after="kEqual : kDiffers;"),
    Fault("the pair above swaps", "tempering", "uint32_t(low));", "uint32_t(high));"),
    Fault("the last chain of a word is not counted", "moments", "c < 32 && word * 32 + c", "c < 31 && word * 32 + c"),
    Fault("an edge is counted from both ends", "moments", "if (other <= unit.node) continue;", ""),
    Fault("a worse state is the best", "moments", "energy < p.best", "energy > p.best"),
]

# Each takes half a minute, so a run takes every eighth one, as it takes an eighth of the emulated tests.
CHOSEN = FAULTS if eighths.chosen() == "all" else FAULTS[int(eighths.chosen()) :: 8]

# Prefixes of the names of the ops that a kernel serves, and of their routes.
SERVES = {
    "bipartite": ("bipartite_",),
    "bipartite_slices": ("",),
    "rounding": ("bipartite_",),
    "bipartite_relaxed": ("bipartite_gibbs_relaxed",),
    "graph": ("graph_",),
    "bounds": ("graph_",),
    "stages": ("graph_",),
    "graph_relaxed": ("graph_gibbs_relaxed",),
    "graph_fields": ("graph_fields",),
    "tempering": ("graph_tempering",),
    "moments": ("graph_moments",),
}


def file_of(kernel: str) -> str:
    name = f"{kernel}_kernel.cuh"
    return name if (build.ROOT / "csrc" / "cuda" / name).exists() else f"{kernel}.cuh"


def compare(library: Path, *wanted: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, build.ROOT / "tests" / "cuda" / "compare.py", library, *wanted]
    return subprocess.run(command, capture_output=True, text=True, cwd=build.ROOT)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[subprocess.CompletedProcess[str]]]:
    build.emulated_ops()  # the objects that all of them share
    parent = tmp_path_factory.mktemp("faults")  # here, because the factory may be used by one thread only

    def outcome(fault: Fault) -> subprocess.CompletedProcess[str]:
        folder = Path(tempfile.mkdtemp(dir=parent))
        library = build.emulated_ops_with_fault(file_of(fault.kernel), fault.old, fault.new, folder)
        return compare(library, *SERVES[fault.kernel])

    with ThreadPoolExecutor(2) as pool:
        return {fault.what: pool.submit(outcome, fault) for fault in CHOSEN}  # what fails to build fails its own test


def test_without_a_fault_they_agree() -> None:
    done = compare(build.emulated_ops())
    assert done.returncode == 0, done.stderr


def test_every_kernel_of_sweeps_is_compared() -> None:
    library = build.emulated_ops()
    program = f"""
import ctypes, json, sys
sys.path[:0] = {[str(build.ROOT / "tests" / "cuda")]}
import compare
library = ctypes.CDLL({str(library)!r})
library.emulator_launches.restype = ctypes.c_char_p
for *_, call in compare.emulated_calls({str(library)!r}):
    library.emulator_count(ctypes.c_int64(0))  # plans are made, and nothing runs
    call()
    print(*(launch["kernel"] for launch in json.loads(library.emulator_launches())))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    symbols = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
    binary = r"\w+?_kernelI\w+BinaryParamsE"
    relaxed = r"\d+bipartite_(?:relaxed|backward)_kernelI\w+ParamsE"
    kernels = set(re.findall(rf"_ZN5gibbs10registeredIXadL_ZNS_({binary}|{relaxed})EEE", symbols))
    assert len(kernels) > 20
    assert {f"_ZN5gibbs{kernel}" for kernel in kernels} <= set(done.stdout.split())


@pytest.mark.parametrize("words", ["partial sums", "y();", "x();"])
def test_a_fault_hooks_on_code_that_occurs_once(words: str) -> None:
    text = {"a.cuh": "x();\nx();  // partial sums\n/* y(); */"}
    with pytest.raises(ValueError, match=r"^a\.cuh: expected once, found [02] times"):
        build.with_fault(text, words, "")


def test_every_fault_hooks_on_code() -> None:
    for fault in FAULTS:  # also those that this run does not plant
        name = file_of(fault.kernel)
        build.with_fault({name: (build.ROOT / "csrc" / "cuda" / name).read_text()}, fault.old, fault.new)


@pytest.mark.parametrize("fault", CHOSEN, ids=lambda fault: fault.what)
def test_a_planted_fault_is_found(fault: Fault, outcomes: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    done = outcomes[fault.what].result()
    assert done.returncode == 1
    assert "differ" in done.stderr or "emulator: " in done.stderr, done.stderr
