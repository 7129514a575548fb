# SPDX-License-Identifier: Apache-2.0
"""Keeps what `pytest bench/ --benchmark-json=FILE` measured, and writes the tables of speed and their chart."""

import argparse
import json
from pathlib import Path

from . import chart, tables
from .texts import ROOT


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="a run to keep (default: only write)")
    args = parser.parse_args()
    if args.file:
        print(f"kept in {tables.keep(json.loads(args.file.read_text())).relative_to(ROOT)}")
    tables.write_tables()
    chart.draw()


if __name__ == "__main__":
    main()
