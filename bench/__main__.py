# SPDX-License-Identifier: Apache-2.0
"""Runs benchmarks, prints their tables and keeps the figures in bench/history."""

import argparse
import importlib
import os

# Every contender has one thread. PyTorch and NumPy's BLAS read these when they are loaded, so they are set before.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import torch

from . import chart, harness, texts

NAMES = (
    "bipartite_gibbs",
    "bipartite_gibbs_relaxed",
    "graph_gibbs",
    "graph_gibbs_relaxed",
    "graph_building",
    "training_step",
    "call_cost",
)
GPU_NAMES = tuple(name for name in NAMES if name != "graph_building")  # graphs are built by the CPU


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        choices=[[], *NAMES],
        default=[],
        metavar="NAME",
        help=f"benchmarks to run, some of {', '.join(NAMES)} (default: all)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5, help="seconds for each case (default: 5)")
    parser.add_argument("--dry", action="store_true", help="print the tables without keeping the figures")
    parser.add_argument(
        "--readme", action="store_true", help="only rewrite the tables of bench/README.md from the history"
    )
    parser.add_argument("--chart", action="store_true", help="only draw docs/speed.png from the history")
    args = parser.parse_args()
    if args.readme:
        texts.write_part(harness.TABLES, harness.SPEED, harness.readme_table())
    if args.chart:
        chart.draw()
    if args.readme or args.chart:
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: PyTorch {torch.__version__} finds no GPU")
    if args.device == "cuda":  # A default device costs every operator microseconds, so the CPU has none.
        torch.set_default_device(args.device)
    torch.set_num_threads(1)
    results: dict[str, list[dict[str, object]]] = {}
    for name in args.names or (GPU_NAMES if args.device == "cuda" else NAMES):
        cases = importlib.import_module(f"bench.{name}").cases()
        results[name] = [harness.measure(case, args.seconds) for case in harness.with_cuda_graphs(cases)]
        print(f"{name}\n{harness.table(results[name])}\n", flush=True)
        if not args.dry:
            harness.store(results)
    if not args.dry:
        print(f"kept in {harness.history_file().relative_to(harness.ROOT)}")


if __name__ == "__main__":
    main()
