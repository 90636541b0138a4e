"""The editions: what becomes of a source, and that each notebook keeps to Markdown that is shown right anywhere."""

from __future__ import annotations

import functools
import runpy
import subprocess
import sys

import editions
import nbformat
import pytest
import settings_of_book as settings
from nbformat.v4 import new_markdown_cell, new_notebook

MADE_UP = "https://github.com/Someone/some-book"


@pytest.fixture(scope="module")
def book():
    return editions.Book(repository="")


@pytest.fixture(scope="module")
def published():
    return editions.Book(repository=MADE_UP)


@pytest.fixture(scope="module")
def made(book, tmp_path_factory):
    """The folder of each edition."""
    folder = tmp_path_factory.mktemp("editions")
    for kind in editions.EDITIONS:
        editions.write(folder / kind, kind, book)
    return folder


@pytest.mark.parametrize("kind", editions.EDITIONS)
def test_every_notebook_keeps_to_the_subset(book, made, kind):
    paths = sorted((made / kind).iterdir())
    assert [path.stem for path in paths] == sorted(book.notebooks)
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        assert editions.faults(notebook, functools.partial(editions.leads, book, path.parent)) == [], path.name


def test_with_an_address_every_link_leads_to_the_site(published, tmp_path):
    for name in published.notebooks:
        notebook = editions.edition(published, name, "reader")
        leads = functools.partial(editions.leads, published, tmp_path)
        assert editions.faults(notebook, leads) == [], name
        assert f'"vaelib @ git+{MADE_UP}"' in notebook.cells[0].source


PLANTED = {
    "raw markup": ["::: {note}\nA box.\n:::", "see {numref}`fig-a`", "(a-target)=\n\ntext", "> :::{prf:theorem} A"],
    "unknown TeX": [r"$\KL{q}{p}$", "$$\n\\EE_q[z]\n$$"],
    "a link leads nowhere": ["[a page](notation.md)", "[here](nowhere.ipynb)"],
    "HTML": ['<div class="a">text</div>', "<br>"],
    "markup in a summary": [
        f"<details>\n<summary>{words}</summary>\n\ntext\n\n</details>"
        for words in ("a `b`", "$x$", "*a*", "[a](b)", "<b>a</b>")
    ],
    "a formula left open": ["for $x, and", "$$ x = 1"],
    "a formula over several lines of a quote": ["> $$\n> x\n> $$"],
}


@pytest.mark.parametrize(("fault", "text"), [(fault, text) for fault, texts in PLANTED.items() for text in texts])
def test_a_planted_fault_is_found(book, tmp_path, fault, text):
    notebook = new_notebook(cells=[new_markdown_cell(text)])
    found = editions.faults(notebook, functools.partial(editions.leads, book, tmp_path))
    assert any(sentence.startswith(fault + ":") for sentence in found), found


def test_what_looks_like_a_fault_in_code_is_none(book, tmp_path):
    text = "`{cite}` and `\\KL{q}{p}`\n\n```python\n:::{note}\n$x <div>\n```\n\nfrom 2\\$ to 3\\$"
    assert editions.faults(new_notebook(cells=[new_markdown_cell(text)]), lambda address: False) == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (":::{mystery}\n:::", "directive {mystery}"),
        ("{mystery}`a`", "role {mystery}"),
        ("{numref}`fig-nowhere`", "nothing is labelled 'fig-nowhere'"),
        ("{term}`phlogiston`", "'phlogiston' is not in the glossary"),
        ("{cite}`nobody1900`", "no work is called 'nobody1900'"),
        ("[a](nowhere.md)", "no page of the book: nowhere.md"),
        (":::{note}\nwithout an end", "a block without an end"),
        ("$$\nx", "a formula without an end"),
        (r"$\KL q$", "a macro needs 2 arguments"),
        ("![a](picture.png)", "a picture outside of an output"),
    ],
)
def test_what_no_edition_can_show_is_refused(book, source, said):
    with pytest.raises(editions.SourceError) as caught:
        editions.Page(book, "01-elbo-forms").markdown(source)
    assert said in str(caught.value)


def test_macros_are_written_out(book):
    assert book.plain_tex(r"\EE_{q}[\N(0, I)]") == r"\mathbb{E}_{q}[\mathcal{N}(0, I)]"
    assert book.plain_tex(r"\KL{q_{\phi}}{\N}").count(r"\mathcal{N}") == 1
    assert book.plain_tex(r"\Nabla \neq") == r"\Nabla \neq"
    assert "|" not in book.plain_tex(r"\KL{q}{p}"), "a bar would end the cell of a table"


def test_a_source_becomes_plain_markdown():
    book = editions.Book(repository=MADE_UP)
    book.labels |= {
        "eq-a": editions.Label("(1.7)", "01-elbo-forms", "equation-eq-a"),
        "thm-a": editions.Label("Theorem 1.3", "01-elbo-forms", "thm-a"),
    }
    page = editions.Page(book, "01-elbo-forms")
    there = "https://someone.github.io/some-book/book/01-elbo-forms.html"
    source = """(a-target)=
# A heading

:::{admonition} Before you start
:class: note
You need {term}`ELBO`s.
:::

$$
\\EE[z] = 0
$$ (eq-a)

::::{prf:theorem} A title
:label: thm-a
By {eq}`eq-a`

$$
x =
1.
$$
::::

:::{prf:proof}
:class: dropdown
See {cite:t}`roeder2017` and `code $x {cite}`.
:::

:::{dropdown} A path: `elbo-path`
One line.
:::
"""
    assert page.markdown(source).split("\n\n") == [
        "# A heading",
        "> **Before you start**\n>\n"
        "> You need [ELBO](https://someone.github.io/some-book/book/glossary.html#term-ELBO)s.",
        "$$\n\\mathbb{E}[z] = 0\n\\tag{1.7}\n$$",
        f"> **Theorem 1.3** (A title)\n>\n> By [(1.7)]({there}#equation-eq-a)\n>\n> $$ x = 1. $$",
        "<details>\n<summary>Proof</summary>",
        "See [Roeder et al. (2017)](https://arxiv.org/abs/1703.09194) and `code $x {cite}`.",
        "</details>",
        "<details>\n<summary>A path: <code>elbo-path</code></summary>",
        "One line.",
        "</details>",
    ]
    assert "Duvenaud" in page.references() and page.references().count("\n") == 0


def test_without_an_address_a_page_that_is_no_notebook_is_named_and_not_linked(book):
    page = editions.Page(book, "02-score-and-path")
    assert page.markdown("[symbols](notation.md) {term}`ELBO`") == "symbols ELBO"
    assert page.markdown("[one](01-elbo-forms.ipynb)") == "[one](01-elbo-forms.ipynb)"


def code(path):
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def test_each_edition_has_its_cells_and_one_that_installs(book, made):
    for name, source in book.notebooks.items():
        all_of_it = [cell.source for cell in source.cells if cell.cell_type == "code"]
        reader, student, teacher = (code(made / kind / f"{name}.ipynb") for kind in ("reader", "student", "teacher"))
        for cells in (reader, student, teacher):
            assert ["pip" in cell.source for cell in cells] == [True] + [False] * (len(cells) - 1)
        assert [cell.source for cell in teacher[1:]] == all_of_it
        assert sorted(cell.source for cell in reader[1:]) == sorted(all_of_it)
        assert student == reader[: len(student)], "whoever runs the reader's has run the student's"
        left_out = {"solution", "wrong-answer"}
        assert {id(cell) for cell in reader[len(student) :]} >= {
            id(cell) for cell in reader if left_out & set(editions.tags(cell))
        }
        text = (made / "student" / f"{name}.ipynb").read_text("utf-8")
        assert "Solution of" not in text and "## Solutions" not in text


def test_the_first_cell_does_nothing_where_the_package_is_there(book, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was installed"))
    cell = tmp_path / "cell.py"
    cell.write_text(editions.INSTALL.format(requirement=book.requirement()))
    runpy.run_path(str(cell))


def test_the_first_cell_installs_the_package_where_it_is_missing(book, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append((command, check)))
    cell = tmp_path / "cell.py"
    cell.write_text(editions.INSTALL.format(requirement=book.requirement()))
    runpy.run_path(str(cell))
    assert asked == [([sys.executable, "-m", "pip", "install", "--quiet", book.requirement()], True)]


def test_the_addresses_follow_from_one():
    assert settings.site("") == ""
    assert settings.site(MADE_UP) == settings.site(MADE_UP + ".git") == "https://someone.github.io/some-book"
    assert settings.colab(MADE_UP, "01-a").endswith("/Someone/some-book/blob/gh-pages/_sources/book/01-a.ipynb")
    assert [settings.prefix(page) for page in ("00-vae", "08-choosing", "reproductions")] == ["0", "8", "R"]
