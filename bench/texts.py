# SPDX-License-Identifier: Apache-2.0
"""Files and tables, for programs that must run where PyTorch or gibbs_ext may not."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
HISTORY = ROOT / "bench" / "history"
PROOF = "proof.json"  # the results of `make gpu-proof`, in a GPU's folder of bench/history


def file_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def duration(seconds: float) -> str:
    unit, factor = ("us", 1e6) if seconds < 1e-3 else ("ms", 1e3) if seconds < 1 else ("s", 1)
    return f"{seconds * factor:.3g} {unit}"


def write(path: Path, text: str) -> None:
    """Writes the file whole or not at all: a reader sees the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def markdown(lines: list[list[str]]) -> str:
    """A table with its columns aligned; the first line is its head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rows[1:]])


def parts(path: Path, command: str) -> tuple[str, str, str]:
    """A text before, between and after the markers of the part that `command` writes there."""
    before, rest = path.read_text().split(f"<!-- begin: {command} -->\n")
    inside, after = rest.split("<!-- end -->", 1)
    return before, inside, after


def write_part(path: Path, command: str, text: str) -> None:
    """Replaces the text between the markers of `command`."""
    before, _, after = parts(path, command)
    write(path, f"{before}<!-- begin: {command} -->\n{text}\n<!-- end -->{after}")
