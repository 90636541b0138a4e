"""The benchmark compares like with like, and its table has the columns it says. Nothing is timed here."""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import peers  # noqa: E402
import steps  # noqa: E402


@pytest.fixture(scope="module")
def task() -> peers.Problem:
    return steps.problem(batch_size=4, threads=1)


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("library", ["plain loop", "vaelib"])
def test_same_loss_and_gradient(task, library, k):
    for row in peers.LIBRARIES[library].rows(k):
        check = peers.LIBRARIES[library].build(row, k, task).check()
        assert steps.disagreement(check, task.parameters) <= steps.TOLERANCE, row


def test_another_objective_or_gradient_is_noticed(task):
    check = peers.LIBRARIES["plain loop"].build("iwae", 5, task).check()
    wrong = [1.001 * gradient for gradient in check.gradient]
    assert steps.disagreement(check._replace(objective="elbo"), task.parameters) > steps.TOLERANCE
    assert steps.disagreement(check._replace(gradient=wrong), task.parameters) > steps.TOLERANCE
    assert steps.disagreement(check._replace(eps=check.eps[::-1] + 1), task.parameters) > steps.TOLERANCE


@pytest.mark.parametrize("library", ["plain loop", "vaelib", "floor"])
def test_steps_run(task, library):
    for row in peers.LIBRARIES[library].rows(2):
        peers.LIBRARIES[library].build(row, 2, task).steps(1)


def test_ratios_are_taken_round_by_round():
    found = steps.summary([1.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert [float(value) for value in found.values()] == [4, 1, 9, 2, 1, 3]
    assert np.isnan(float(steps.summary([1.0], None)["ratio_to_plain"]))


def test_output_is_whole(task, tmp_path):
    record = dict.fromkeys(steps.COLUMNS, "1")
    steps.write(tmp_path / "table.csv", [record])
    with pytest.raises(ValueError):
        steps.write(tmp_path / "table.csv", [record, {"another": "column"}])
    with open(tmp_path / "table.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [record]
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_stored_table():
    with open(ROOT / "results" / "benchmark-steps.csv", newline="") as file:
        table = csv.DictReader(file)
        rows = list(table)
    assert tuple(table.fieldnames) == tuple(steps.COLUMNS)
    for k in steps.STEPS:
        stored = {row["estimator"] for row in rows if row["library"] == "vaelib" and int(row["k"]) == k}
        assert stored == set(peers.our_rows(k)), f"k = {k}: measure again with `make bench`"


@pytest.mark.parametrize("argv", [["--k", "0"], ["--k", "1", "5", "--steps", "3"], ["--only", "Stan"]])
def test_bad_options(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        steps.parse(argv)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


README_ROWS = {
    "floor": ("floor", None),
    "NumPyro": ("NumPyro", "iwae"),
    "vaelib": ("vaelib", None),
    "pythae": ("pythae", "iwae"),
    "Pyro": ("Pyro", "iwae"),
}


def test_the_readme_quotes_the_measured_ratios():
    with open(ROOT / "results/benchmark-steps.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    quoted = re.findall(r"^\| (floor|NumPyro|vaelib|pythae|Pyro)\b[^|]*\|(.*)\|$", (ROOT / "README.md").read_text("utf-8"), re.M)
    assert [name for name, _ in quoted] == list(README_ROWS)
    for name, cells in quoted:
        library, estimator = README_ROWS[name]
        for k, cell in zip((1, 5, 50), cells.split("|"), strict=True):
            ratios = [
                float(row["ratio_to_plain"])
                for row in rows
                if row["library"] == library and int(row["k"]) == k and estimator in (None, row["estimator"])
            ]
            low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
            assert cell.strip() == (low if len(ratios) == 1 else f"{low} to {high}"), (name, k)
