"""Chapters survive a reader who runs cells again, in another order, and changes the sizes that invite playing."""

import sys
from pathlib import Path

import matplotlib as mpl
import nbformat
import pytest
from matplotlib import pyplot

sys.path.insert(0, str(Path(__file__).parent.parent / "book/_tools"))
import check_book  # noqa: E402

BOOK = Path(__file__).parent.parent / "book"
CHECKED = {"check", "exercise-check", "solution", "wrong-answer"}


def run(cells, names, changes=()):
    for cell in cells:
        source = cell.source
        for old, new in changes:
            source = source.replace(old, new)
        exec(compile(source, source[:60], "exec"), names)
        pyplot.close("all")


@pytest.fixture(autouse=True)
def as_in_the_book(monkeypatch):
    monkeypatch.chdir(BOOK)
    with mpl.rc_context({"backend": "agg"}):
        yield


def code(name):
    return check_book.code_cells(nbformat.read(BOOK / f"{name}.ipynb", as_version=4))


@pytest.mark.parametrize("name", ["01-elbo-forms"])
def test_checks_pass_again_after_the_end_and_in_reverse(name):
    cells, names = code(name), {}
    run(cells, names)
    run([cell for cell in reversed(cells) if CHECKED & set(check_book.tags(cell))], names)


@pytest.mark.parametrize(
    ("name", "change"),
    [("01-elbo-forms", ("latent_dim = 8", "latent_dim = 4")), ("00-vae", ("latent_dim = 2", "latent_dim = 3"))],
)
def test_another_latent_dimension_breaks_no_check(name, change):
    cells = code(name)
    assert sum(change[0] in cell.source for cell in cells) == 1
    run(cells, {}, [change])
