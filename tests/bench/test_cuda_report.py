# SPDX-License-Identifier: Apache-2.0
"""bench/cuda_report.py: its counts, their continuation to more sweeps, and the bounds that follow from them."""

import dataclasses
import json
import re
from typing import Any

import pytest

from bench import cuda_report, texts


def test_the_table_of_bounds_is_that_of_the_history() -> None:
    text = texts.parts(cuda_report.README, cuda_report.COMMAND)[1]
    assert text.strip() == cuda_report.readme_table(json.loads(cuda_report.HISTORY.read_text())).strip()


def test_the_history_is_of_the_problems_and_kernels_that_there_are() -> None:
    history = json.loads(cuda_report.HISTORY.read_text())
    assert [case["problem"] for case in history["problems"]] == [problem.name for problem in cuda_report.problems()]
    assert all(kernel["spilled_bytes"] == 0 for kernel in history["kernels"])


# Flips, and with them wavefronts, differ from sweep to sweep, because they are random.
@pytest.mark.parametrize(
    ("problem", "tolerance"),
    [
        (cuda_report.bipartite(2, 1, 40, 33, 40, runs=(10, 20)), 0.1),
        (cuda_report.bipartite(1, 70, 40, 33, 6), 0.1),
        (cuda_report.chimera(2, 40, 12, models=True), 0.1),
    ],
    ids=lambda value: value.name if isinstance(value, cuda_report.Problem) else "",
)
def test_counts_continued_from_few_sweeps_are_those_of_all(problem: cuda_report.Problem, tolerance: float) -> None:
    counted, moved = cuda_report.count(problem, "H100")
    whole, moved_again = cuda_report.launches(problem.ours(problem.sweeps), "H100", 1)
    assert moved == moved_again > 0
    assert len(counted) == len(whole) > 0
    for launch, expected in zip(counted, whole, strict=True):
        assert launch["ctas_run"] == 0
        sweeps = re.search(r"\d(bipartite|graph)_kernel", expected["kernel"]) is not None
        # As many CTAs run as the sweeps of the first model need the results of.
        least = {"pack_kernel": expected["num_ctas"], "slice_kernel": 128}
        wanted = next((count for name, count in least.items() if name in expected["kernel"]), expected["cluster_size"])
        assert expected["ctas_run"] == min(wanted, expected["num_ctas"])
        # A half sweep, or a colour, without open units has a barrier less.
        for name in ("products",) if sweeps else ("barriers", "products"):
            assert launch[name] * expected["ctas_run"] == pytest.approx(expected[name], rel=1e-9)
        for name in ("wavefronts", "sectors", *(["barriers"] if sweeps else [])):
            assert launch[name] * expected["ctas_run"] == pytest.approx(expected[name], rel=tolerance)


def test_a_plan_that_depends_on_the_number_of_sweeps_is_not_continued() -> None:
    problem = dataclasses.replace(cuda_report.relaxed(2, 20, 10), runs=(0, 3))  # no launches for no binary sweeps
    with pytest.raises(RuntimeError, match="the plan for 0 sweeps is another one"):
        cuda_report.count(problem, "H100")


def test_pegasus() -> None:
    graphs = pytest.importorskip("dwave.graphs", reason="dwave-graphs is not installed")
    for size in (2, 3, 6):
        graph, expected = cuda_report.pegasus(size), graphs.pegasus_graph(size)
        numbers = {node: at for at, node in enumerate(sorted(expected))}
        edges = {tuple(sorted((numbers[a], numbers[b]))) for a, b in expected.edges}
        assert {tuple(sorted(edge)) for edge in graph.edges.tolist()} == edges
        assert graph.num_nodes == len(expected)
    assert cuda_report.pegasus(14).num_nodes == 4264


def test_a_sweep_of_pytorch_is_eight_launches() -> None:
    problem = cuda_report.bipartite(3, 1, 20, 10, 50)
    peer = cuda_report.count_peer(problem)
    # a copy of the state, the transposed weight; then product, sigmoid, random numbers and comparison for either side
    assert peer.launches == 2 + 8 * 50
    weight = 3 * 20 * 10 * 4
    assert peer.operands[weight] == 2 + 2 * 50  # copied to its transpose, then read by each product


LAUNCH: dict[str, Any] = dict.fromkeys(cuda_report.COUNTS, 0) | {
    "kernel": "_ZN5gibbs16bipartite_kernelILb0ELi1ELb1ELb1EEEvNS_21BipartiteBinaryParamsE",
    "num_ctas": 300,
    "num_threads": 512,
    "shared_memory": 100 << 10,
    "cluster_size": 1,
    "ctas_per_sm": 2,
}
LIMITS = cuda_report.Limits(1e9, 1e12, 1000, 1 << 20, 128 << 10, 1024, 30)


def test_bounds_of_a_kernel() -> None:
    # The busiest of 100 multiprocessors has three CTAs, two at a time.
    launch = LAUNCH | {"wavefronts": 900, "lines": 100, "barriers": 10, "products": 5, "sectors": 7}
    found = cuda_report.kernel_bounds(launch, LIMITS, 100)
    assert found["shared memory"] == pytest.approx(3 * 1000 / 1e9)
    assert found["latency"] == pytest.approx(2 * 10 * 30 / 1e9)
    assert found["tensor cores"] == pytest.approx(3 * 5 * 16 * 8 * 32 / 1024 / 1e9)


def test_what_is_read_again_comes_from_the_nearest_cache() -> None:
    # There are four passes over 3000 sectors, and two CTAs a multiprocessor.
    launch = LAUNCH | {"sectors": 12000, "different_sectors": 3000}
    for shared, from_l2 in ((100 << 10, 12000), (0, 3000 + 3 * (3000 - 2048)), (48 << 10, 3000 + 3 * (3000 - 512))):
        found = cuda_report.kernel_bounds(launch | {"shared_memory": shared}, LIMITS, 100)
        assert found["L2"] == pytest.approx(300 * from_l2 * 32 / 1000 / 1e9)
    few = cuda_report.kernel_bounds(launch | {"different_sectors": 1000, "shared_memory": 0}, LIMITS, 100)
    assert few["L2"] == pytest.approx(300 * 1000 * 32 / 1000 / 1e9)


def test_the_bound_of_a_call_is_the_largest() -> None:
    problem = dataclasses.replace(cuda_report.bipartite(1, 1, 8, 8, 1), updates=0)
    busy = LAUNCH | {"wavefronts": 10**6}
    assert cuda_report.bounds(problem, [busy, busy], 0, LIMITS, 100) == {
        "seconds": pytest.approx(6e-3),
        "bound_by": "shared memory",
    }
    assert cuda_report.bounds(problem, [LAUNCH], 0, LIMITS, 100) == {"seconds": 4e-6, "bound_by": "launches"}
    assert cuda_report.bounds(problem, [LAUNCH], 10**9, LIMITS, 100)["bound_by"] == "memory"
    many = dataclasses.replace(problem, updates=10**9)
    assert cuda_report.bounds(many, [LAUNCH], 0, LIMITS, 100)["bound_by"] == "arithmetic"


def test_pytorch_reads_what_fits_the_cache_for_nothing() -> None:
    assert cuda_report.peer_bound(cuda_report.PeerCount(1, {1 << 20: 10**6}), LIMITS, 4e-6) == 4e-6
    moved = 10 * (10**8 - (1 << 20))
    assert cuda_report.peer_bound(cuda_report.PeerCount(1, {10**8: 10}), LIMITS, 4e-6) == pytest.approx(moved / 1e12)


SASS = """
        /*0000*/                   LDG.E R1, desc[UR4][R2.64] ;
        /*0010*/              @!P1 BRA 0x90 ;
        /*0020*/                   LDS R4, [R3] ;
        /*0030*/                   IMAD.WIDE.U32 R6, R4, 0x10, RZ ;
        /*0040*/                   IMMA.16832.S8.S8 R8, R4.ROW, R6.COL, R8 ;
        /*0050*/                   FADD R9, R8, R9 ;
        /*0060*/              @P0  BRA 0x20 ;
        /*0070*/                   I2F.S32 R9, R9 ;
        /*0080*/              @P2  BRA 0x0 ;
        /*0090*/                   EXIT ;
"""


def test_the_inner_loop_of_machine_code() -> None:
    code = cuda_report.instructions(SASS)
    assert [opcode for _, opcode, _ in code][:3] == ["LDG.E", "BRA", "LDS"]
    loop = cuda_report.inner_loop(code)
    kinds = [cuda_report.instruction_class(opcode) for opcode in loop]
    assert kinds == ["shared", "integer", "tensor", "float", "control"]
    assert cuda_report.instruction_class("I2F.S32") == "convert"
    assert cuda_report.instruction_class("LDL.64") == "local"
    assert cuda_report.instruction_class("LDC") == "integer"
    assert cuda_report.inner_loop(code[:2]) == []


def test_kernels_are_named_shortly() -> None:
    assert cuda_report.short_name(LAUNCH["kernel"]) == "bipartite"
    scale = "_ZN5gibbs22bipartite_scale_kernelIfEEvNS_20BipartiteScaleParamsE"
    assert cuda_report.short_name(scale) == "bipartite_scale"
    assert cuda_report.short_name("_ZN5gibbs13unpack_kernelENS_12UnpackParamsE") == "unpack"
    history = json.loads(cuda_report.HISTORY.read_text())
    assert all(re.fullmatch("[a-z_]+", cuda_report.short_name(usage["kernel"])) for usage in history["kernels"])
