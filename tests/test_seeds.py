"""A check keeps its stated rate under other seeds: what a run moves, what the table says, and one chapter for real."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import seeds

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))


def notebook(folder, *cells):
    path = folder / "a.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": cell} for cell in cells]}))
    return path


CELLS = (
    "import torch\nfrom vaelib import checks, data, training\ntorch.manual_seed(0)",
    "g = torch.Generator().manual_seed(0)\nassert isinstance(torch.default_generator, torch.Generator)",
    "draws = torch.randn(1000, generator=g)\nchecks.unbiased(draws, 0.0, 'drawn')",
    "checks.unbiased(torch.randn(1000), 0.0, 'drawn by torch itself')",
    "checks.unbiased(torch.randn(1000, generator=training.stream('noise', 0)), 0.0, 'drawn in a training')",
    "grey = data.load('digits').train.sample(500).grey\nchecks.unbiased(grey[:, 20], 2.0, 'the data set')",
    "table = open('results/a.csv', 'w')\nrate = table.fileno() < 0",
    "checks.holds(rate, 'read from a table')\nchecks.holds(1 < 2, 'drawn')\nrate = 1\nchecks.holds(rate == 1, 'anew')",
    "1 / 0",
    "checks.holds(True, 'never reached')",
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("book")
    (folder / "results").mkdir()
    path = notebook(folder, *CELLS)
    found = []
    for seed in (0, 1, 1):
        done = seeds.launch(path, seed, folder / "out.json")
        assert done.returncode == 0, done.stderr
        found.append({o["name"]: o for o in json.loads((folder / "out.json").read_text())["outcomes"]})
    return found


def test_every_generator_is_moved_but_those_of_the_data(outcomes):
    page, moved, again = outcomes
    assert moved == again
    for name in ("drawn", "drawn by torch itself", "drawn in a training"):
        assert page[name]["margin"] != moved[name]["margin"]
    assert page["the data set"]["margin"] == moved["the data set"]["margin"]


def test_checks_go_on_after_one_that_fails_and_have_one_name_each(outcomes):
    for found in outcomes:
        assert not found["the data set"]["holds"] and not found["read from a table"]["holds"]
        assert found["drawn (2)"]["holds"] and "never reached" not in found
        end = found["it runs to its end"]
        assert not end["holds"] and "ZeroDivisionError" in end["said"]


def test_checks_of_stored_results_are_told_apart(outcomes):
    kinds = {name: outcome["kind"] for name, outcome in outcomes[0].items()}
    assert [name for name, kind in kinds.items() if kind == "stored"] == ["read from a table"]
    assert kinds["anew"] == "holds"


def test_a_name_of_a_function_or_a_loop_of_its_own_is_not_that_of_a_stored_table(tmp_path):
    path = notebook(
        tmp_path,
        "table = open('results/a.csv').read()",
        "row = table\nchecks.holds(row, 'stored')",
        "def width(row):\n    return [table for table in row]\nchecks.holds(width('ab'), 'measured')",
        "for row in ('a', 'b'):\n    checks.holds(row, 'measured')",
        "checks.holds(max((1, 2), key=lambda table: -table), 'measured')",
        "def reads():\n    return table\nchecks.holds(reads(), 'stored')",
        "for row in table:\n    checks.holds(row, 'stored')",
    )
    checked = {(stored, n.value) for node, stored in seeds.statements(path) for n in seeds.ast.walk(node)
               if isinstance(n, seeds.ast.Constant) and n.value in ("stored", "measured")}  # fmt: skip
    assert checked == {(True, "stored"), (False, "measured")}


def bounds(kind, margins):
    return seeds.bounds(kind, pd.Series(margins, dtype=float), int((np.asarray(margins) < 0).sum()))


RNG = np.random.default_rng(0)
Z = RNG.standard_normal((100, 50))


def test_true_means_keep_their_rate_and_a_bias_refutes_it():
    assert sum(bounds("unbiased", 4 - abs(z))[0] > 1e-4 for z in Z) <= 1
    assert all(bounds("unbiased", 4 - abs(z + 2))[0] > 1e-4 for z in Z)  # fails once in 44, but seldom in 50 runs


def test_the_margins_of_a_comparison_bound_its_rate():
    """Six standard errors are enough and two are not, long before a failure shows it."""
    assert all(bounds("below", z + 6)[0] < 1e-4 and bounds("below", z + 6)[1] < 1e-3 for z in Z)
    assert all(bounds("below", z + 2)[0] > 1e-4 for z in Z)
    covered = [low <= 0.02275 <= high for low, high in (bounds("below", np.maximum(z + 2, 0.01)) for z in Z)]
    assert np.mean(covered) > 0.9


def test_a_bias_that_is_another_for_each_seed_is_judged_by_its_logarithm_too():
    """And one that is often too small to be seen is refuted all the same."""
    assert all(bounds("biased", 4 * np.exp(1.6 + 0.35 * z[:20]) - 4)[0] < 1e-4 for z in Z)
    assert all(bounds("biased", 4 * np.exp(0.5 + 0.35 * z) - 4)[0] > 1e-4 for z in Z)
    assert all(bounds("biased", abs(z + 5) - 4)[0] > 1e-4 for z in Z)


def test_rates_have_bounds_where_the_distribution_is_0_or_1_to_rounding():
    for z in Z:  # scipy's noncentral t is NaN far from some of these
        least, most = bounds("below", z[:20] - 3)
        assert 0.8 < least <= most <= 1  # 0.79 is what twenty failures alone say


def test_a_comparison_whose_margins_scatter_may_be_one_in_its_logarithm():
    """Some twenty standard errors that vary by a factor are enough; two that scatter are not, nor is one failure."""
    wide = 4 * np.exp(1.6 + 0.35 * Z) - 4
    assert all(bounds("below", margins)[0] < 1e-4 for margins in wide)
    assert all(bounds("below", 2 + 2 * z)[0] > 1e-4 for z in Z)
    assert all(bounds("below", np.append(margins, -1.0))[0] > 1e-4 for margins in wide)


def test_margins_far_from_or_below_zero_have_bounds_too():
    few = np.array([90.0, 91, 90, 92, 90])
    assert bounds("below", np.array([40.0, 30, 42, 35, 38, 41, 36]))[1] < 1e-3
    assert bounds("below", few) == (0, pytest.approx(0, abs=1e-12))
    assert bounds("below", -few)[0] > 0.3 and bounds("unbiased", 4 - 100 * few)[0] > 0.3


def test_without_margins_the_count_bounds_the_rate():
    none, one = ([float("nan")] * 50 for _ in range(2))
    assert seeds.bounds("holds", pd.Series(none), 0) == pytest.approx((0, 1 - 0.01 ** (1 / 50)))
    assert seeds.bounds("holds", pd.Series(one), 1)[0] == pytest.approx(1 - 0.99 ** (1 / 50))


def outcome(holds=True, margin=5.0, kind="below"):
    return {"name": "a", "kind": kind, "holds": holds, "margin": margin, "rate": 1e-4, "said": "a"}


def table(runs):
    return pd.DataFrame(seeds.rows("01", [[run] for run in runs], "c"), columns=seeds.COLUMNS)


def test_a_row_that_exceeds_its_rate_is_found():
    fine = [outcome(margin=5 + 0.1 * i) for i in range(20)]
    assert seeds.exceeding(table(fine)) == []
    for planted in ([outcome(False, -1.0)], [outcome(False, None)], [outcome(margin=-1.0 + i) for i in range(20)]):
        assert len(seeds.exceeding(table(fine + planted))) == 1
    assert len(seeds.exceeding(table([outcome(kind="stored"), outcome(False, None, "stored")]))) == 1


def test_rows_that_are_missing_stale_or_few_are_found(tmp_path):
    path = notebook(tmp_path, "x = 1")
    runs = [[outcome()]] * seeds.SEEDS
    used = {"a": {"vaelib.errors": "choose"}}
    found = pd.DataFrame(seeds.rows("a", runs, seeds.digest(path, used["a"])), columns=seeds.COLUMNS)
    assert seeds.missing(found, used, [path]) == []
    assert seeds.missing(found, {}, [path]) == ["a: run with other code"]
    assert seeds.missing(found.iloc[:0], used, [path]) == ["a: never run"]
    assert seeds.missing(found.assign(runs=3), used, [path]) == ["a: 3 of 50 seeds"]
    notebook(tmp_path, "x = 1  # a comment")
    assert seeds.missing(found, used, [path]) == []
    notebook(tmp_path, "x = 2")
    assert seeds.missing(found, used, [path]) == ["a: run with other code"]


def test_a_run_is_kept_as_long_as_its_code_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(seeds, "KEPT", tmp_path / "kept")
    path = notebook(tmp_path, "x = 1")
    run = {"outcomes": [outcome()], "used": {}, "code": seeds.digest(path, {})}
    seeds.write(tmp_path / "kept/a/7.json", json.dumps(run))
    assert seeds.kept(path) == {7: run}
    notebook(tmp_path, "x = 2")
    assert seeds.kept(path) == {}


def test_every_notebook_that_needs_fewer_seeds_is_there():
    assert [seeds.enough(path) for path in NOTEBOOKS if path.stem in seeds.SLOW] == [seeds.FEWER] * len(seeds.SLOW)


A = """
import functools
from math import pi, tau
from vaelib.b import called, unused
X, WORD = 1, 'word'
USED = [WORD]
LIST = [1]
MORE = len('more')
def never():
    return 1
@functools.cache
def decorated():
    return 1
class C:
    'Says what it is.'
    z = 1
    def method(self):
        return USED, pi
    def other(self):
        return 2
class D(C):
    def another(self):
        return 2
class Named(C):
    def more(self):
        return 2
"""
SAME = {  # what is not called, or not named by what is
    "a comment": ("return USED, pi", "return USED, pi  # a comment"),
    "a docstring": ("Says what it is.", "Is."),
    "a function": ("never():\n    return 1", "never(more):\n    return 2"),
    "a method": ("other(self)", "others(self, more)"),
    "a list": ("LIST = [1]", "LIST = [2]"),
    "an import": (", unused", ", others"),
    "an import from outside": (", tau", ", e"),
    "one more class": ("class D", "class E:\n    x = 1\nclass D"),
    "a class that is not named": ("another", "others"),
    "a parameter of a function that is not called": ("decorated()", "decorated(more=1)"),
    "a decorated function": ("decorated():\n    return 1", "decorated():\n    return 2"),
    "one more function": ("def never", "def once():\n    pass\ndef never"),
    "one more method of a class without a base": ("    def other", "    def once(self):\n        pass\n    def other"),
}
CHANGED = {
    "a method that is called": ("return USED", "return 1, USED"),
    "what it names": ("USED = [WORD]", "USED = [WORD, WORD]"),
    "what that names": ("'word'", "'words'"),
    "an import from outside that is named": ("import pi", "import tau as pi"),
    "an import that is named": ("import called", "import unused as called"),
    "what happens at import": ("len('more')", "len('less')"),
    "a base": ("class C", "class C(int)"),
    "an attribute of a class": ("z = 1", "z = 2"),
    "a method of a class with a base": ("more(self)", "method(self)"),
    "a decorator that may enter it somewhere": ("@functools.cache", "@called"),
}


@pytest.fixture
def digest(tmp_path, monkeypatch):
    path = notebook(tmp_path, "from vaelib import a\na.called(a.C, a.Named)")

    def of(old="", new="", b="return 1"):
        assert old in A
        package = {"vaelib.a": A.replace(old, new, 1) if old else A, "vaelib.b": f"def called():\n    {b}"}
        monkeypatch.setattr(seeds, "modules", lambda: {name: seeds.parsed(source) for name, source in package.items()})
        return seeds.digest(path, {"vaelib.a": "C.method", "vaelib.b": "called"})

    return of


@pytest.mark.parametrize("what", SAME)
def test_a_run_does_not_depend_on_what_it_did_not_use(digest, what):
    assert digest(*SAME[what]) == digest()


@pytest.mark.parametrize("what", CHANGED)
def test_a_run_depends_on_what_it_used(digest, what):
    assert digest(*CHANGED[what]) != digest()
    assert digest(b="return 2") != digest() == digest(b="return (1)  # a comment")


def test_what_was_called_is_noted(tmp_path):
    source = "from vaelib import errors\nerrors.choose('letter', 'a', {'a': 1})"
    done = seeds.launch(notebook(tmp_path, source), 1, tmp_path / "1.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "1.json").read_text())
    used = found["used"]["vaelib.errors"].split()
    assert "choose" in used and "enough_memory" not in used and "vaelib.training" not in found["used"]
    assert found["code"] == seeds.digest(tmp_path / "a.ipynb", found["used"])


def test_no_stored_rate_exceeds_what_its_check_states():
    """Rows that are missing or stale are listed here, and fail ``make seeds-fresh``."""
    table, used = seeds.read()
    print("\n".join(seeds.missing(table, used, NOTEBOOKS)))
    now = {chapter: seeds.digest(ROOT / f"book/{chapter}.ipynb", used[chapter]) for chapter in set(table["chapter"])}
    assert seeds.exceeding(table[table["code"] == table["chapter"].map(now)]) == []


@pytest.mark.parametrize("seed", [101, 102])
def test_a_chapter_passes_under_other_seeds(tmp_path, seed):
    done = seeds.launch(ROOT / "book/04-silent-and-nonlinear.ipynb", seed, tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    outcomes = json.loads((tmp_path / "out.json").read_text())["outcomes"]
    assert len(outcomes) > 50 and [o["said"] for o in outcomes if not o["holds"]] == []


def test_the_page_shows_a_line_for_each_notebook():
    assert "<!-- seeds -->" in (ROOT / "book/how-this-book-checks-itself.md").read_text("utf-8")
    assert all(f"| {chapter} |" in seeds.summary() for chapter in set(seeds.read()[0]["chapter"]))
