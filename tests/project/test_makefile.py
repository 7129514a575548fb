# SPDX-License-Identifier: Apache-2.0
"""The Makefile's targets are those that CONTRIBUTING.md lists, no more and no fewer, and no text names another."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXTS = ("Makefile", "*.md", "docs/*.md", "bench/*.md", "csrc/**/*.md")


def read() -> dict[str, str]:
    paths = [path for pattern in TEXTS for path in ROOT.glob(pattern)]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


def faults(texts: dict[str, str]) -> list[str]:
    rules = re.findall(r"^([a-z][\w-]*):(?!=)", texts["Makefile"], re.MULTILINE)
    (phony,) = re.findall(r"^\.PHONY: (.*)$", texts["Makefile"], re.MULTILINE)
    rows = re.findall(r"^\| *(`make .*?) \|", texts["CONTRIBUTING.md"], re.MULTILINE)
    listed = re.findall(r"`make ([\w-]+)`", " ".join(rows))
    lists = {"rules": rules, ".PHONY": phony.split(), "CONTRIBUTING.md": listed}
    found = [f"{name} has {t} twice" for name, targets in lists.items() for t in set(targets) if targets.count(t) > 1]
    for name, targets in lists.items():
        found += [f"{name} lacks {target}" for target in {*rules, *phony.split(), *listed} - {*targets}]
    for name, text in texts.items():
        # In code: make TARGET, with or without variables.
        mentioned = re.findall(r"(?:^|`)make (?:[A-Z_]+=\S* )*([a-z][\w-]*)", text, re.MULTILINE)
        found += [f"{name} speaks of make {target}" for target in {*mentioned} - {*rules}]
    return sorted(found)


def test_every_make_target_exists_and_is_listed() -> None:
    assert faults(read()) == []


@pytest.mark.parametrize("target", ["train", "test", "cuda", "cuda-import", "cuda-report", "emulated"])
def test_a_planted_fault_in_a_target_is_found(target: str) -> None:
    texts = read()

    def after(pattern: str, by: str, name: str = "Makefile") -> set[str]:
        changed = re.sub(pattern, by, texts[name], flags=re.MULTILINE)
        assert changed != texts[name]
        return set(faults(texts | {name: changed}))

    assert after(r"\Z", "\nnew:\n\ttrue\n") == {".PHONY lacks new", "CONTRIBUTING.md lacks new"}
    expected = {f"rules lacks {target}", ".PHONY lacks other", "CONTRIBUTING.md lacks other"}
    assert after(rf"^{target}:", "other:") >= expected
    assert after(rf"^(\.PHONY:.*) {target}(?= |$)", r"\1") == {f".PHONY lacks {target}"}
    assert f"CONTRIBUTING.md lacks {target}" in after(f"`make {target}`", "`make lint`", "CONTRIBUTING.md")
    for line in (f"`make {target}s`", f"make {target}s ARGS=1", f"`make ARGS=1 {target}s`"):
        assert after(r"\Z", f"\n{line}\n", "README.md") == {f"README.md speaks of make {target}s"}
