"""The benchmark compares like with like, and its table has the columns it says. Nothing is timed here."""

from __future__ import annotations

import csv
import itertools
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gradient_lab  # noqa: E402
import lagging  # noqa: E402
import log_likelihood  # noqa: E402
import peers  # noqa: E402
import rounds  # noqa: E402
import stacked  # noqa: E402
import steps  # noqa: E402
import verdicts  # noqa: E402


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
    rounds.write(tmp_path / "table.csv", [record], steps.COLUMNS)
    with pytest.raises(ValueError):
        rounds.write(tmp_path / "table.csv", [record, {"another": "column"}], steps.COLUMNS)
    with open(tmp_path / "table.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [record]
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_stored_table():
    with open(ROOT / "results" / "benchmark-steps.csv", newline="") as file:
        table = csv.DictReader(file)
        rows = list(table)
    assert tuple(table.fieldnames) == tuple(steps.COLUMNS)
    for threads, k in itertools.product(("1", "2"), steps.STEPS):
        here = [row for row in rows if (row["threads"], int(row["k"])) == (threads, k)]
        stored = {row["estimator"] for row in here if row["library"] == "vaelib"}
        assert stored == set(peers.our_rows(k)), f"k = {k}: measure again with `make bench`"
        assert {row["library"] for row in here} == set(peers.LIBRARIES)


@pytest.fixture
def settings():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)  # the benchmarks set it for their process


SMOKE = {
    "stacked": (stacked, ["--models", "digits", "--seeds", "1", "2", "--threads", "1", "--steps", "2"], 2),
    "gradient-lab": (gradient_lab, ["--draws", "20"], 4),
    "log-likelihood": (log_likelihood, ["--images", "2", "--samples", "30"], 1),
}


@pytest.mark.parametrize("name", SMOKE)
def test_the_other_benchmarks_run(name, tmp_path, settings, monkeypatch):
    way = "all at once"  # each one starts a process
    monkeypatch.setattr(log_likelihood, "WAYS", {way: log_likelihood.WAYS[way]})
    module, options, count = SMOKE[name]
    module.main([*options, "--rounds", "2", "--output", str(tmp_path / "table.csv")])
    with open(tmp_path / "table.csv", newline="") as file:
        written = list(csv.DictReader(file))
    with open(ROOT / "results" / f"benchmark-{name}.csv", newline="") as file:
        stored = list(csv.DictReader(file))
    assert len(written) == count and written[0].keys() == stored[0].keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, which would be measured")
def test_the_gpu_benchmark_says_what_it_needs(capsys):
    with pytest.raises(SystemExit) as stop:
        gpu.main([])
    assert stop.value.code == 2
    assert "needs an NVIDIA GPU, and torch finds none here" in capsys.readouterr().err


def test_turns_are_taken_round_by_round():
    calls = []
    ticks = iter(range(100))
    times = rounds.take_turns(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, lambda: next(ticks), ""
    )
    assert calls == ["a", "b"] * 3 and times == {"a": [1, 1], "b": [1, 1]}
    assert rounds.ratios([2.0, 9.0], [1.0, 3.0]) == [2, 3]
    assert rounds.spread("x", [1.0, 2.0, 9.0]) == {"x": "2.0000", "x_min": "1.0000", "x_max": "9.0000"}


@pytest.mark.parametrize("argv", [["--k", "0"], ["--k", "1", "5", "--steps", "3"], ["--only", "Stan"]])
def test_bad_options(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        steps.parse(argv)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def rows_of(name):
    with open(ROOT / "results" / f"benchmark-{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


README_ROWS = {
    "floor": ("floor", "matrix products and Adam"),
    "compiled": ("vaelib --compile", "iwae-total"),
    "NumPyro": ("NumPyro", "iwae"),
    "vaelib": ("vaelib", None),
    "pythae": ("pythae", "iwae"),
    "Pyro": ("Pyro", "iwae"),
}


PAGE_ROWS = {
    "stacked": lambda r: (
        r["threads"] == "1" and f"{float(r['ratio_to_alone']):.2f} ({float(r['ratio_to_alone_min']):.2f} to"
    ),
    "gradient-lab": lambda r: f"| {r['way']} | {float(r['draws_a_second']):,.0f} | {float(r['times_the_loop']):.2f} (",
    "log-likelihood": lambda r: f"| {r['way']} | {float(r['seconds']):.2f} | {float(r['ratio_to_at_once']):.2f} (",
}


@pytest.mark.parametrize("name", PAGE_ROWS)
def test_the_page_on_speed_quotes_what_was_measured(name):
    page = (ROOT / "benchmarks/README.md").read_text("utf-8")
    expected = [PAGE_ROWS[name](row) for row in rows_of(name)]
    assert any(expected) and all(cells in page for cells in expected if cells)


def test_the_readme_quotes_the_measured_ratios():
    rows = rows_of("steps")
    quoted = re.findall(
        r"^\| (floor|NumPyro|vaelib|compiled|pythae|Pyro)\b[^|]*\|(.*)\|$",
        (ROOT / "README.md").read_text("utf-8"),
        re.M,
    )
    assert [name for name, _ in quoted] == list(README_ROWS)
    for name, cells in quoted:
        library, estimator = README_ROWS[name]
        for k, cell in zip((1, 5, 50), cells.split("|"), strict=True):
            ratios = [
                float(row["ratio_to_plain"])
                for row in rows
                if (row["library"], int(row["k"]), row["threads"]) == (library, k, "2")
                and estimator in (None, row["estimator"])
            ]
            low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
            assert cell.strip() == (low if len(ratios) == 1 else f"{low} to {high}"), (name, k)


@pytest.mark.parametrize("name", ["steps", "steps-amd"])
def test_the_page_quotes_the_compiled_steps_beside_their_rivals(name):
    page = (ROOT / "benchmarks/README.md").read_text("utf-8")
    rows = {(row["library"], row["estimator"], row["threads"], row["k"]): row for row in rows_of(name)}
    for threads, k in itertools.product("12", ("1", "5", "50")):
        here = [rows[*README_ROWS[who], threads, k] for who in ("floor", "NumPyro", "compiled")]
        values = [[float(row[key]) for key in ("ratio_to_plain", "ratio_min", "ratio_max")] for row in here]
        cells = " | ".join(f"{middle:.2f} ({low:.2f} to {high:.2f})" for middle, low, high in values)
        assert f"| {threads} | {k} | {cells} |" in page


def test_what_is_said_of_an_amd_processor_is_what_was_measured():
    ms = {
        (name, row["library"], row["threads"], int(row["k"])): float(row["ms_median"])
        for name in ("steps", "steps-amd")
        for row in rows_of(name)
        if (row["library"], row["estimator"]) in [*README_ROWS.values(), ("plain loop", "iwae")]
    }

    def ratios(one, other, threads):
        return [ms[*one, threads, k] / ms[*other, threads, k] for k in steps.STEPS]

    fast, slow = (("steps-amd", library) for library in ("vaelib --compile", "NumPyro"))
    plain = [(name, "plain loop") for name in ("steps-amd", "steps")]
    for page in ("README.md", "benchmarks/README.md"):
        text = (ROOT / page).read_text("utf-8")
        for quoted in (ratios(fast, slow, "1"), ratios(fast, slow, "2"), ratios(*plain, "1")):
            assert "{:.2f}, {:.2f} and {:.2f}".format(*quoted) in text, page
    assert ratios(*plain, "2")[0] > 1
    to_floor = [ratios(("steps", "vaelib --compile"), ("steps", "floor"), threads) for threads in "12"]
    assert (f"{np.min(to_floor):.2f}", f"{np.max(to_floor):.2f}") == ("0.97", "1.23")


def test_what_a_row_and_a_compiled_step_cost_is_what_was_measured():
    page = (ROOT / "book" / "running.md").read_text("utf-8")
    for library, said in (
        ("vaelib", "every row takes {:.2f} to {:.2f} of the time of a hand-written PyTorch step"),
        ("vaelib --compile", "{:.2f} to {:.2f} of the time of that step"),
    ):
        ratios = [float(row["ratio_to_plain"]) for row in rows_of("steps") if row["library"] == library]
        assert said.format(min(ratios), max(ratios)) in page


def test_the_readme_quotes_what_was_measured_elsewhere():
    digits, burda = (
        float(row["ratio_to_alone"]) for row in rows_of("stacked") if row["seeds"] == "8" and row["threads"] == "1"
    )
    few, many = (float(row["times_the_loop"]) for row in rows_of("gradient-lab") if row["way"] == "laboratory")
    at_once, streamed, _ = rows_of("log-likelihood")
    readme = (ROOT / "README.md").read_text("utf-8")
    for quoted in (
        f"digits {digits:.1f} times the time of one seed, 784-200-200-50 {burda:.1f} times",
        f"{few:.0f} times as many a second as a loop for 100 parameters, {many:.1f} times for 217,300",
        f"{float(streamed['peak_mb']):.0f} MB instead of {float(at_once['peak_mb']):.0f} MB",
        f"{float(streamed['ratio_to_at_once']):.2f} of the time |",
    ):
        assert quoted in readme


# --- lagging: the LSTM and the PixelCNN beside the same models as published

LAGGING = (
    "--vocabulary 30 --embedding 6 --hidden 8 --latent 3 --words 6 --text-batch 5 --side 6 --maps 4 --layers 5 "
    "--image-batch 4 --rounds 2"
).split()


def test_lagging_writes_a_row_for_every_way(tmp_path, capsys):
    lagging.main([*LAGGING, "--output", str(tmp_path / "table.csv")])
    with open(tmp_path / "table.csv", newline="") as file:
        table = csv.DictReader(file)
        found = [(row["model"], row["data"], row["way"]) for row in table]
    assert table.fieldnames == lagging.COLUMNS
    assert found == [
        *(("lstm", "one length", way) for way in ("vaelib", "published")),
        *(("lstm", "many lengths", way) for way in ("vaelib", "published", "a softmax a step")),
        *(("pixelcnn", "images", way) for way in ("vaelib", "published")),
    ]
    assert "x published" in capsys.readouterr().out


@pytest.mark.parametrize("case", [0, 1, 2])
def test_lagging_notices_another_model(case):
    _, _, build, x, ways, _, _ = lagging.cases(lagging.parse(LAGGING))[case]
    for way in ways.values():
        ours, x = build().double(), x.double() if x.is_floating_point() else x
        assert lagging.disagreement(ours, way(ours), x) <= lagging.TOLERANCE
        theirs = way(ours)
        list(theirs.parameters())[-1].data.mul_(1.01)
        assert lagging.disagreement(ours, theirs, x) > lagging.TOLERANCE


def test_lagging_stored_table():
    with open(ROOT / "results" / "benchmark-lagging.csv", newline="") as file:
        table = csv.DictReader(file)
        rows = list(table)
    assert table.fieldnames == lagging.COLUMNS
    assert {(row["model"], row["data"]) for row in rows} == {
        (case[0], case[1]) for case in lagging.cases(lagging.parse([]))
    }


def test_a_wrong_verdict_is_the_opposite_of_the_truth():
    said = [("yes", "no"), ("no", "yes"), ("yes", "yes"), ("cannot tell", "no")]
    assert verdicts.wrong([{"late": late, "late_truth": truth} for late, truth in said], "late") == 2


def test_what_is_planted_is_as_described():
    *lags, neither = (verdicts.planted(case, 0, epochs=4).state_dict() for case in ("lag", "mild lag", "neither"))
    for lag, parts in zip(lags, ({"joint"}, {"joint", "encoder"}), strict=True):  # of 4 epochs, 20 are all
        assert {name.partition(".")[0] for name in lag if torch.equal(lag[name], neither[name])} == parts
    assert {*verdicts.TRUTH, *verdicts.WEIGHTS, *verdicts.EARLY} == set(verdicts.CASES)
    record = verdicts.judge("collapse", 0, epochs=1)
    assert (record["lost_truth"], record["late_truth"]) == ("yes", "no")


def test_the_truth_that_is_measured_is_of_other_images(monkeypatch):
    """Verdicts on the training images are set against those on the test images, and may be open."""
    told = {"yes": "yes", "no": "no", "cannot tell": "open"}
    seen = []

    def usage(model, x, noise, draws=8):
        seen.append((len(x), draws))
        return SimpleNamespace(collapsed=said)

    def lag(model, x, row, noise, k):
        seen.append(len(x) // 4)
        return SimpleNamespace(late=said)

    monkeypatch.setattr(verdicts.advice, "usage", usage)
    monkeypatch.setattr(verdicts.advice, "lag", lag)
    for said, truth in told.items():
        assert verdicts.measured(None, verdicts.observations(True)) == (truth, truth)
        assert seen[-2:] == [300, (300, 64)]
