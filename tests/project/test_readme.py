# SPDX-License-Identifier: Apache-2.0
"""The example, the commands and the figures of README are right."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bench import chart, tables, texts, training_step

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
DOCS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md"), *ROOT.glob("csrc/**/*.md")]


def blocks(path: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


def run(program: str, folder: Path) -> list[str]:
    paths = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'python')!r}]\n"
    done = subprocess.run([sys.executable, "-c", paths + program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_examples_run(tmp_path: Path) -> None:
    bipartite, tracked, graph, given, training, chains, estimator = blocks("docs/library.md")
    shape, gradient, error = run(bipartite, tmp_path)
    assert shape.startswith("torch.Size([1000, 64, 28])")
    assert gradient == "torch.Size([64, 16, 12])"
    worst, standard_error = map(float, re.findall(r"tensor\(([-\d.e]+)", error))
    assert worst < 6 * standard_error
    (line,) = run("import torch; torch.manual_seed(0)\n" + tracked, tmp_path)
    likelihood, standard_error, error = map(float, re.findall(r"tensor\(([-\d.e]+)", line))
    assert -16 * math.log(2) < likelihood < -8 * math.log(2)  # between independent bits and equal pairs
    assert abs(error) < 6 * standard_error < 0.5
    shape, error = run("import torch; torch.manual_seed(0)\n" + graph, tmp_path)
    assert shape == "torch.Size([1000, 512])"
    # 10,000 chains: 6 standard errors of a mean of bits are 0.03
    assert float(re.findall(r"tensor\(([-\d.e]+)", error)[0]) < 0.03
    shapes, error = run("import torch; torch.manual_seed(0)\n" + given, tmp_path)
    assert shapes == "torch.Size([100, 8, 30]) torch.Size([100, 8, 30]) torch.Size([8])"
    worst, standard_error = map(float, re.findall(r"tensor\(([-\d.e]+)", error))
    assert worst < 6 * standard_error
    (log_likelihood,) = run("import torch; torch.manual_seed(0)\n" + training, tmp_path)
    assert -4 < float(log_likelihood) < -2.7
    head, *rows = run("import torch; torch.manual_seed(0)\n" + chains, tmp_path)
    assert head.split()[0] == "mcse_mean"
    assert [row.split()[0] for row in rows[:4]] == ["energy", "magnetization", "unit[0]", "unit[5]"]
    plain, centred = ([float(x) for x in line.strip("()").split(",")] for line in run(estimator, tmp_path))
    for mean, error, lower, upper in (plain, centred):
        assert abs(lower - mean) < 10 * error + 1e-3
        assert abs(upper - mean) < 10 * error + 1e-3
    assert plain[0] > -26
    assert centred[0] > -19.5


def test_plain_pytorch_does_the_same_as_the_example(tmp_path: Path) -> None:
    ours, plain = blocks("README.md")
    assert len(run(ours + plain, tmp_path)) == 2
    more = (
        "import torch\n"
        + (ours + plain).replace("(1000, 16)", "(50_000, 16)")
        + "print(left.detach().mean(1).std().item())"
    )
    first, second, deviation = ([float(word) for word in line.split()] for line in run(more, tmp_path))
    bits, relaxed, gradient = first
    assert abs(relaxed - second[0]) < 6 * deviation[0] * (2 / 50_000) ** 0.5
    assert gradient == pytest.approx(second[1], rel=0.1)
    assert 0.4 < bits < 0.6


def test_no_example_is_left_out() -> None:
    """Text that shows only part of a program is no python block."""
    texts_with_blocks = {path.relative_to(ROOT).as_posix() for path in DOCS if blocks(str(path.relative_to(ROOT)))}
    assert texts_with_blocks == {"README.md", "docs/library.md"}


def test_links_lead_somewhere() -> None:
    for path in DOCS:
        for target in re.findall(r"\]\((?!http)([^)#]+)|src=\"([^\"]+)\"", path.read_text()):
            assert (path.parent / "".join(target)).exists(), (path, target)


def test_launches_of_a_training_step_are_those_counted() -> None:
    """Another PyTorch may have other operators for a few things."""
    (written,) = re.findall(r"`paper-mnist-200` is (\d+) operators", (ROOT / "docs" / "training.md").read_text())
    assert abs(int(written) - training_step.count("paper-mnist-200")[0]) < 10


def test_the_table_of_speed_is_that_of_the_history() -> None:
    assert texts.parts(tables.ALL, tables.COMMAND)[1].strip() == tables.all_tables(tables.groups())
    assert texts.parts(tables.README, tables.COMMAND)[1].strip() == tables.short_table(tables.cpu_groups())


def test_the_table_of_readme_has_ten_rows_at_most_and_no_case_that_is_gone() -> None:
    assert len(tables.CHOSEN) <= 10
    assert {*tables.CHOSEN} <= {f"{group.op}: {group.case}" for group in tables.cpu_groups()}


def test_the_chart_is_that_of_the_history() -> None:
    assert chart.description(chart.rows()).encode() in chart.CHART.read_bytes()


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    for key, name in (("version", "version"), ("license", "license"), ("abstract", "description"), ("title", "name")):
        (value,) = re.findall(rf'^{name} = "(.*?)"', project, re.MULTILINE)
        assert str(citation[key]).rstrip(".") == value
