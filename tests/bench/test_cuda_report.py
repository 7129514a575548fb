# SPDX-License-Identifier: Apache-2.0
"""bench/cuda_report.py: its counts, their continuation to more sweeps, and the bounds that follow from them."""

import dataclasses
import json
import re
import subprocess
from typing import Any

import pytest
import torch

from bench import cuda_report, texts


def test_the_tables_of_bounds_are_those_of_the_history() -> None:
    history = json.loads(cuda_report.HISTORY.read_text())
    for path, table in ((cuda_report.README, cuda_report.table), (texts.ROOT / "README.md", cuda_report.short_table)):
        assert texts.parts(path, cuda_report.COMMAND)[1].strip() == table(history).strip()
    assert cuda_report.short_table(history).count("\n") == 1 + len(cuda_report.SHORT)


def test_times_of_the_history_follow_from_its_counts() -> None:
    history = json.loads(cuda_report.HISTORY.read_text())
    for case, problem in zip(history["problems"], cuda_report.problems(), strict=True):
        for device, limits in cuda_report.LIMITS.items():
            found = case["devices"][device]
            num_sms = found["multiprocessors"]
            again = cuda_report.bounds(problem, found["launches"], limits, num_sms)
            assert (again["seconds"], again["bound_by"]) == (pytest.approx(found["seconds"]), found["bound_by"])
            assert cuda_report.floor(problem, limits, num_sms) == pytest.approx(found["floor"])
            assert found["floor"] < found["seconds"] <= found["eager_seconds"]


def test_products_have_as_many_instructions_as_the_report_takes() -> None:
    history = json.loads(cuda_report.HISTORY.read_text())
    for tiles, expected in cuda_report.PRODUCT_FROM_SHARED.items():
        kernel = f"_ZN5gibbs16bipartite_kernelILb0ELi{tiles}ELi0ELb1EEEvNS_21BipartiteBinaryParamsE"
        loop = history["inner_loops_sm_90"][kernel]
        assert sum(loop.values()) / loop["tensor"] == pytest.approx(expected, abs=0.1)


def test_all_kernels_have_work() -> None:
    history = json.loads(cuda_report.HISTORY.read_text())
    launched = {x["kernel"] for case in history["problems"] for x in case["devices"]["H100"]["launches"]}
    assert {cuda_report.short_name(kernel) for kernel in launched} <= set(cuda_report.WORK)


def test_the_history_is_of_the_problems_and_kernels_that_there_are() -> None:
    history = json.loads(cuda_report.HISTORY.read_text())
    assert [case["problem"] for case in history["problems"]] == [problem.name for problem in cuda_report.problems()]
    assert all(kernel["spilled_bytes"] == 0 for kernel in history["kernels"])
    symbols = subprocess.run(
        ["nm", "-D", cuda_report.build.emulated_ops()], capture_output=True, text=True, check=True
    ).stdout
    launched = {x["kernel"] for case in history["problems"] for x in case["devices"]["H100"]["launches"]}
    assert launched <= set(symbols.split())


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
    assert sum(peer.values()) == 2 + 8 * 50
    weight = 3 * 20 * 10 * 4
    read = sum(x.operands.count(weight) * times for x, times in peer.items())
    assert read == 2 + 2 * 50  # copied to its transpose, then read by each product


LAUNCH: dict[str, Any] = dict.fromkeys(cuda_report.COUNTS, 0) | {
    "kernel": "_ZN5gibbs16bipartite_kernelILb0ELi1ELi0ELb1EEEvNS_21BipartiteBinaryParamsE",
    "num_ctas": 300,
    "num_threads": 512,
    "shared_memory": 100 << 10,
    "cluster_size": 1,
    "ctas_per_sm": 2,
}
RATES = {"float32": 1e13, "TF32": 1e14, "bfloat16": 2e14}
LIMITS = cuda_report.Limits(1e9, 1e12, 1e12, 1 << 20, 128 << 10, 1024, 0.5, 30, RATES)


NOTHING = dataclasses.replace(cuda_report.bipartite(1, 2, 8, 8, 1), units=0, couplings=0, products=0)


def test_bounds_of_a_kernel() -> None:
    # The busiest of 100 multiprocessors has three CTAs, two at a time.
    launch = LAUNCH | {"wavefronts": 900, "lines": 100, "barriers": 10, "products": 5, "sectors": 7}
    found = cuda_report.kernel_bounds(NOTHING, launch, LIMITS, 100)
    assert found["shared memory"] == pytest.approx(3 * 1000 / 1e9)
    assert found["latency"] == pytest.approx(2 * 10 * 30 / 1e9)
    assert found["tensor cores"] == pytest.approx(3 * 5 * 16 * 8 * 32 / 1024 / 0.5 / 1e9)
    # A product's instructions are those of a warp.
    assert found["instructions"] == pytest.approx(3 * 5 * 32 * cuda_report.PRODUCT_FROM_SHARED[1] / 128 / 1e9)
    assert found["memory"] == 0
    large = dataclasses.replace(NOTHING, couplings=10**9)
    assert cuda_report.kernel_bounds(large, launch, LIMITS, 100)["memory"] == pytest.approx(4e9 / 1e12, rel=1e-3)


def test_instructions_of_updates() -> None:
    few = dataclasses.replace(NOTHING, units=100, couplings=50, products=200)
    lanes = cuda_report.least_instructions(few, LAUNCH)
    assert lanes == 2 * 100 * (cuda_report.BIPARTITE_DECISION + 40 / 16)
    alone = dataclasses.replace(few, products=100)
    assert cuda_report.least_instructions(alone, LAUNCH) == 2 * 100 * (4 * cuda_report.BIPARTITE_DECISION + 40 / 16)
    relaxed = dataclasses.replace(few, num_relaxed=3)
    kernel = LAUNCH | {"kernel": "_ZN5gibbs24bipartite_relaxed_kernelIfLi1ELb1EEEvNS_22BipartiteRelaxedParamsE"}
    work = cuda_report.WORK["bipartite_relaxed"]
    expected = work.coupling * 50 + 3 * (work.product * 200 + work.update * 200)
    assert cuda_report.least_instructions(relaxed, kernel) == expected


def test_what_is_read_again_comes_from_the_nearest_cache() -> None:
    # There are four passes over 3000 sectors, and two CTAs a multiprocessor.
    launch = LAUNCH | {"sectors": 12000, "different_sectors": 3000}
    for shared, from_l2 in ((100 << 10, 12000), (0, 3000 + 3 * (3000 - 2048)), (48 << 10, 3000 + 3 * (3000 - 512))):
        found = cuda_report.kernel_bounds(NOTHING, launch | {"shared_memory": shared}, LIMITS, 100)
        assert found["L2"] == pytest.approx(300 * from_l2 * 32 / 1e12)
    few = cuda_report.kernel_bounds(NOTHING, launch | {"different_sectors": 1000, "shared_memory": 0}, LIMITS, 100)
    assert few["L2"] == pytest.approx(300 * 1000 * 32 / 1e12)


def test_a_call_takes_what_its_launches_take() -> None:
    busy = LAUNCH | {"wavefronts": 10**6}
    assert cuda_report.bounds(NOTHING, [busy, LAUNCH, busy], LIMITS, 100) == {
        "seconds": pytest.approx(6e-3 + 1e-6),
        "bound_by": "shared memory",
    }
    assert cuda_report.bounds(NOTHING, [LAUNCH] * 4, LIMITS, 100) == {"seconds": 4e-6, "bound_by": "launches"}
    many = dataclasses.replace(NOTHING, units=10**9)
    assert cuda_report.bounds(many, [LAUNCH], LIMITS, 100)["bound_by"] == "instructions"


def test_no_program_is_faster_than_the_floor() -> None:
    one = dataclasses.replace(NOTHING, sweeps=50)
    latency = 2 * 50 * 30 / 1e9
    assert cuda_report.floor(one, LIMITS, 100) == pytest.approx(1e-6 + latency)
    assert cuda_report.floor(dataclasses.replace(one, couplings=10**10), LIMITS, 100) == pytest.approx(4e-2)
    drawing = dataclasses.replace(one, sweeps=1000, units=10**6)
    assert cuda_report.floor(drawing, LIMITS, 100) == pytest.approx(1000 * 2e6 * 3.5 / 128 / 100 / 1e9)
    multiplying = dataclasses.replace(one, products=10**10)
    assert cuda_report.floor(multiplying, LIMITS, 100) == pytest.approx(50 * 2 * 10**10 / 1024 / 100 / 1e9)
    graph = dataclasses.replace(multiplying, quads=1)
    assert cuda_report.floor(graph, LIMITS, 100) == pytest.approx(50 * 10**10 / 2 / 128 / 100 / 1e9)
    learning = dataclasses.replace(multiplying, sweeps=0, num_relaxed=1)
    assert cuda_report.floor(learning, LIMITS, 100) == pytest.approx(6 * 10**10 / 1e14)


def test_the_bound_of_pytorch_is_that_of_its_operators() -> None:
    def bound(*operators: cuda_report.Operator, arithmetic: str = "float32", memory: float = 1e12) -> float:
        limits = LIMITS._replace(memory=memory)
        return cuda_report.peer_bound(dict.fromkeys(operators, 3.0), limits, arithmetic, 4e-6)

    small = cuda_report.Operator(0, (4, 4), 0)
    assert bound(small) == pytest.approx(12e-6)
    copied = cuda_report.Operator(0, (10**8, 10**8), 0)
    assert bound(small, copied) == pytest.approx(12e-6 + 3 * 2e8 / 1e12)  # from L2
    assert bound(copied, memory=1e10) == pytest.approx(6 * (10**8 - (1 << 20)) / 1e10)  # what L2 does not hold
    assert bound(cuda_report.Operator(0, (), 10**8), memory=1e9) == pytest.approx(3 * 1e8 / 1e12)
    product = cuda_report.Operator(2 * 10**12, (8,), 0)
    assert [bound(product, arithmetic=name) for name in RATES] == [pytest.approx(s) for s in (0.6, 0.06, 0.03)]


def test_products_of_pytorch_are_counted() -> None:
    for problem in (cuda_report.bipartite(3, 2, 20, 10, 50), cuda_report.bipartite(1, 70, 40, 33, 6)):
        for dtype in (torch.float32, torch.bfloat16):
            peer = cuda_report.count_peer(problem, dtype)
            assert sum(x.flops * times for x, times in peer.items()) == 2 * problem.products * problem.sweeps
    problem = cuda_report.chimera(2, 40, 4)
    # A bag reads 40 chains of a neighbour, or of the first node where one has fewer than the most.
    gathered = sum(x.gathered * times for x, times in cuda_report.count_peer(problem).items())
    assert gathered >= problem.products * 4 * problem.sweeps
    assert gathered <= problem.updates * 6 * 4 * problem.sweeps


def test_the_host_is_measured() -> None:
    found = cuda_report.host_seconds()
    assert set(found) == {problem.call for problem in cuda_report.problems()} | {"operator"}
    assert found["bipartite_gibbs"] < found["bipartite_gibbs_relaxed"]  # which has a backward pass
    assert found["operator"] < found["bipartite_gibbs"]


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
