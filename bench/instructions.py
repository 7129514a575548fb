# SPDX-License-Identifier: Apache-2.0
"""Counts the instructions of representative calls of the CPU's kernels by callgrind, and compares them with those that
are kept: `make instructions`, or with `--renew` to keep new ones.

valgrind has no AVX-512, so what is counted is the code for AVX2. Counts depend on the compiler, but not on the machine.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from .limits import compiler
from .texts import HISTORY, ROOT, markdown, write

KEPT = HISTORY / "instructions.json"
BAND = 0.05


def compiler_version() -> str:
    return subprocess.run([*compiler(), "-dumpfullversion"], check=True, capture_output=True, text=True).stdout.strip()


def program() -> Path:
    """Links the objects of the extension, as `make build` leaves them."""
    out = ROOT / "build" / "instructions"
    folder = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    objects = sorted(map(str, folder.glob("csrc/cpu/**/*.o")))
    if not objects:
        raise SystemExit(f"make instructions: expected the extension's objects in {folder}, got none: make build")
    flags = ["-std=c++20", "-O2", f"-I{ROOT / 'csrc'}", "-pthread", "-o", str(out)]
    subprocess.run([*compiler(), str(ROOT / "bench" / "instructions.cpp"), *objects, *flags], check=True)
    return out


def count(path: Path, case: str) -> int:
    command = [
        "valgrind",
        "--tool=callgrind",
        "--toggle-collect=measured",
        "--callgrind-out-file=/dev/null",
        path,
        case,
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(re.findall(r"Collected : (\d+)", done.stderr)[0])


def compare(kept: dict[str, int], found: dict[str, int]) -> tuple[str, list[str]]:
    """A table, and the cases that leave the band or are on one side only."""
    rows = [["case", "instructions kept", "found", "change"]]
    outside = []
    for case in dict.fromkeys([*kept, *found]):
        old, new = kept.get(case), found.get(case)
        change = new / old - 1 if old and new else None
        rows.append([case, str(old), str(new), "" if change is None else f"{change:+.1%}"])
        if change is None or abs(change) > BAND:
            outside.append(case)
    return markdown(rows), outside


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.instructions", description=__doc__)
    parser.add_argument("--renew", action="store_true", help="keep the counts")
    args = parser.parse_args()
    if not shutil.which("valgrind"):
        raise SystemExit("make instructions: expected valgrind, found none: apt-get install valgrind")
    path, version = program(), compiler_version()
    cases = subprocess.run([path], check=True, capture_output=True, text=True).stdout.splitlines()
    found = {case: count(path, case) for case in cases}
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {"compiler": None, "instructions": {}}
    text, outside = compare(kept["instructions"], found)
    print(text)
    if args.renew:
        write(KEPT, json.dumps({"compiler": version, "instructions": found}, indent=1) + "\n")
    elif kept["compiler"] != version:
        print(f"kept counts are of compiler {kept['compiler']}, and this is {version}: not compared", file=sys.stderr)
    elif outside:
        raise SystemExit(
            f"make instructions: expected counts within {BAND:.0%} of those kept, got others for: {'; '.join(outside)}"
            ". If that is meant, keep them: make instructions ARGS=--renew"
        )


if __name__ == "__main__":
    main()
