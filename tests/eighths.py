# SPDX-License-Identifier: Apache-2.0
"""Which emulated tests run: the emulator takes minutes for what the CPU does in seconds, so a run takes an eighth.

GIBBS_TEST_EMULATED=0 to 7 chooses an eighth, and "all" takes every test. Otherwise successive commits take successive
eighths.
"""

import os
import subprocess
import zlib
from pathlib import Path

NAMES = ["0", "1", "2", "3", "4", "5", "6", "7"]


def of_commit(folder: Path) -> str:
    """The eighth of the commit's number, or of its hash in a shallow clone, which has no number; 0 without git."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        is_shallow = git("rev-parse", "--is-shallow-repository") == "true"
        number = int(git("rev-parse", "HEAD"), 16) if is_shallow else int(git("rev-list", "--count", "HEAD"))
    except (OSError, subprocess.CalledProcessError):
        number = 0
    return NAMES[number % 8]


def chosen() -> str:
    """One of NAMES, or "all"."""
    name = os.environ.get("GIBBS_TEST_EMULATED") or of_commit(Path(__file__).parent)
    if name not in [*NAMES, "all"]:
        raise ValueError(f"GIBBS_TEST_EMULATED must be 0 to 7 or all, got {name!r}")
    return name


def eighth_of(node_id: str) -> str | None:
    """The eighth that runs a test; None for a test that always runs, as those do that exist only for the emulator."""
    file, _, name = node_id.partition("::")
    if not file.endswith("test_cuda_emulated.py") or "__" not in name:
        return None
    return NAMES[zlib.crc32(node_id.encode()) % 8]
