"""Every notebook of the book keeps the rules of check_book, and every rule finds fault with one that breaks it."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import check_book
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from vaelib.checks import KINDS

ROOT = Path(__file__).parent.parent
BOOK = ROOT / "book"
CHAPTERS = sorted(BOOK.glob("*.ipynb"))
COURSE = [
    "00-vae",
    "01-elbo-forms",
    "02-score-and-path",
    "03-silent-gradients",
    "04-silent-and-nonlinear",
    "05-inference-lag",
    "06-mixtures-and-iwae",
    "07-flows",
    "08-choosing",
]
"""The chapters that have the shape of the second edition and its course of exercises."""


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_keeps_the_rules(path):
    assert check_book.problems(nbformat.read(path, as_version=4)) == []


def test_chapters_have_the_shape_of_a_course():
    for name in COURSE:
        assert list(check_book.course(nbformat.read(BOOK / f"{name}.ipynb", as_version=4))) == [], name


def test_the_symbols_of_a_chapter_are_those_of_the_notation_page():
    notation = (BOOK / "notation.md").read_text("utf-8")
    for name in COURSE:
        notebook = nbformat.read(BOOK / f"{name}.ipynb", as_version=4)
        assert check_book.symbols_apart(notation, int(name[:2]), notebook) == [], name


def test_the_book_hangs_together():
    assert CHAPTERS, "there is no chapter"
    notebooks = {path.name: nbformat.read(path, as_version=4) for path in CHAPTERS}
    assert check_book.repeated_figures(notebooks) == []
    assert check_book.dangling_links(ROOT / "vaelib", BOOK) == []
    config, notation = (ROOT / "_config.yml").read_text("utf-8"), (BOOK / "notation.md").read_text("utf-8")
    assert check_book.macros_apart(config, notation) == []
    toc, index = (ROOT / "_toc.yml").read_text("utf-8"), (BOOK / "index.md").read_text("utf-8")
    assert check_book.unlisted_chapters([path.name for path in CHAPTERS], toc, index) == []


def test_the_bibliography_is_in_order_and_has_every_reference_of_the_tableau():
    from vaelib.estimators import ESTIMATORS

    entries = re.split(r"^@\w+\{", (BOOK / "references.bib").read_text("utf-8"), flags=re.MULTILINE)[1:]
    keys = [entry.partition(",")[0] for entry in entries]
    assert keys == sorted(set(keys))
    for key, entry in zip(keys, entries, strict=True):
        assert all(f"\n  {field} = {{" in entry for field in ("author", "title", "year")), key
    assert {row.reference for row in ESTIMATORS.values()} <= set(keys)


def test_every_kind_of_check_is_explained():
    page = (BOOK / "how-this-book-checks-itself.md").read_text("utf-8")
    assert list(KINDS) == re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)


# Negative controls: a notebook that keeps every rule, and for each rule the ways to break it.

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()


def chapter():
    """A small notebook that keeps every rule."""
    check = new_code_cell(
        "torch.manual_seed(0)\nchecks.holds(1 < 2, 'one is less')", execution_count=1, metadata={"tags": ["check"]}
    )
    check.outputs = [new_output("stream", name="stdout", text="ok: one is less\n")]
    figure = new_code_cell("plt.show()", execution_count=2)
    figure.metadata["mystnb"] = {"figure": {"name": "fig-a", "caption": "A."}, "image": {"alt": "A line."}}
    figure.outputs = [new_output("display_data", {"image/png": PNG, "text/plain": "<Figure size 1x1 with 1 Axes>"})]
    answers = [
        new_code_cell(source, execution_count=count, metadata={"tags": tags})
        for count, (source, tags) in enumerate(
            [
                ("def total():\n    raise NotImplementedError", ["stub"]),
                (
                    "def check_a(total):\n    assert total() == 2\n    print('ok: sum')\n\n\n"
                    "checks.attempt(check_a, total)",
                    ["exercise-check"],
                ),
                ("def total():\n    return 1 + 1\n\n\ncheck_a(total)", ["solution"]),
                ("checks.refused(check_a, lambda: 3, what='it is 3')", ["wrong-answer", "remove-cell"]),
            ],
            start=3,
        )
    ]
    for answer, said in zip(answers, ("", "not solved yet\n", "ok: sum\n", "ok: refused, it is 3\n"), strict=True):
        answer.outputs = [new_output("stream", name="stdout", text=said)] if said else []
    notebook = new_notebook(
        cells=[
            new_markdown_cell("# A chapter"),
            check,
            figure,
            new_markdown_cell(
                "::::{exercise} A\n:label: ex-a\n\n**warm-up · by hand · 5 minutes**\n\nAdd.\n\n"
                ":::{hint}\n:class: dropdown\nCount.\n:::\n::::"
            ),
            *answers[:2],
            new_markdown_cell(":::{solution-start} ex-a\n:class: dropdown\n:::"),
            *answers[2:],
            new_markdown_cell(":::{solution-end}\n:::"),
        ]
    )
    notebook.metadata = nbformat.from_dict({"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    return notebook


def prints(cell, text, name="stdout"):
    cell.outputs = [new_output("stream", name=name, text=text)]


CHECK, FIGURE, TASK, STUB, ATTEMPT, OPENED, SOLUTION, WRONG, CLOSED = range(1, 10)
BIG = base64.b64encode(bytes(200_000)).decode()


def reword(cell, old, new):
    assert old in cell.source
    cell.source = cell.source.replace(old, new)


BROKEN = [
    ("valid", lambda cells: cells[CHECK].outputs[0].pop("text")),
    ("order", lambda cells: cells[FIGURE].update(execution_count=7)),
    ("order", lambda cells: cells[FIGURE].update(execution_count=None)),
    ("size", lambda cells: cells[CHECK].update(source="x = 1\n" * 21)),
    ("size", lambda cells: cells[CHECK].update(source="x = " + "1" * 76)),
    ("size", lambda cells: cells[CHECK].update(source=" ")),
    ("figures", lambda cells: cells[FIGURE].metadata.pop("mystnb")),
    ("figures", lambda cells: cells[FIGURE].metadata.mystnb.figure.update(caption="")),
    ("figures", lambda cells: cells[FIGURE].metadata.mystnb.figure.update(name="")),
    ("figures", lambda cells: cells[FIGURE].metadata.mystnb.image.update(alt=" ")),
    ("figures", lambda cells: cells[FIGURE].metadata.mystnb.image.update(alt="a" * 251)),
    ("figures", lambda cells: cells[FIGURE].outputs[0].data.update({"image/svg+xml": "<svg/>"})),
    ("figures", lambda cells: cells[FIGURE].outputs[0].data.update({"image/png": BIG})),
    ("figures", lambda cells: cells[FIGURE].outputs.append(cells[FIGURE].outputs[0])),
    ("figures", lambda cells: cells[FIGURE].outputs.clear()),
    ("outputs", lambda cells: prints(cells[SOLUTION], "a warning", "stderr")),
    ("outputs", lambda cells: cells[CHECK].outputs.append(cells[CHECK].outputs[0])),
    ("outputs", lambda cells: cells[SOLUTION].outputs.append(new_output("error", ename="E", evalue="", traceback=[]))),
    ("outputs", lambda cells: prints(cells[SOLUTION], "saved to /home/me/model.pt")),
    ("outputs", lambda cells: prints(cells[SOLUTION], "took 3.2 s")),
    ("outputs", lambda cells: prints(cells[SOLUTION], "120 ms a step")),
    ("outputs", lambda cells: prints(cells[SOLUTION], "2026-01-31")),
    ("outputs", lambda cells: prints(cells[SOLUTION], "<object at 0x7f00deadbeef>")),
    ("plain_python", lambda cells: cells[SOLUTION].update(source="assert 1\n!pip install torch")),
    ("plain_python", lambda cells: cells[SOLUTION].update(source="%matplotlib inline")),
    ("plain_python", lambda cells: cells[SOLUTION].update(source="get_ipython().run_line_magic('time', '')")),
    ("seeded", lambda cells: cells[CHECK].update(source="checks.holds(1 < 2, 'one is less')")),
    ("metadata", lambda cells: cells[CHECK].metadata.update(execution={"iopub.execute_input": "now"})),
    ("parentheses", lambda cells: cells[0].update(source=cells[0].source + "\nNever noisier ({eq}`eq-a`).")),
    ("checks", lambda cells: prints(cells[CHECK], "True\n")),
    ("checks", lambda cells: cells[CHECK].outputs.clear()),
    ("checks", lambda cells: cells[CHECK].metadata.pop("tags")),
    ("checks", lambda cells: cells[SOLUTION].update(source="checks.holds(all(a < b for a, b in []), 'in order')")),
    ("checks", lambda cells: cells[SOLUTION].update(source="checks.holds((total > 3).all(), 'over three')")),
    ("exercises", lambda cells: reword(cells[OPENED], "-start} ex-a", "-start} ex-b")),
    ("exercises", lambda cells: reword(cells[OPENED], ":::{solution", "no {solution")),
    ("exercises", lambda cells: reword(cells[TASK], ":label: ex-a\n", "")),
    ("exercises", lambda cells: cells[SOLUTION].update(source="print(1 + 1 == 2)")),
    ("exercises", lambda cells: cells[SOLUTION].update(execution_count=None)),
    ("exercises", lambda cells: cells[SOLUTION].metadata.update(tags=[])),
    ("answers", lambda cells: reword(cells[TASK], "warm-up", "easy")),
    ("answers", lambda cells: reword(cells[TASK], "{hint}", "{note}")),
    ("answers", lambda cells: cells.pop(WRONG)),
    ("answers", lambda cells: cells.insert(STUB, cells.pop(ATTEMPT))),
    ("answers", lambda cells: prints(cells[ATTEMPT], "ok: sum\n")),
    ("answers", lambda cells: prints(cells[SOLUTION], "not right yet: it is 3\n")),
    ("answers", lambda cells: reword(cells[SOLUTION], "check_a(", "check_b(")),
    ("answers", lambda cells: cells[WRONG].outputs.clear()),
    ("answers", lambda cells: cells[WRONG].metadata.update(tags=["wrong-answer"])),
]  # fmt: skip


def test_a_good_notebook_passes():
    assert check_book.problems(chapter()) == []


@pytest.mark.parametrize(("rule", "breach"), BROKEN)
def test_a_broken_notebook_fails(rule, breach):
    notebook = chapter()
    breach(notebook.cells)
    assert any(sentence.startswith(rule + ":") for sentence in check_book.problems(notebook))


def test_every_rule_has_a_negative_control():
    assert {rule.__name__ for rule in check_book.RULES} == {rule for rule, _ in BROKEN}


LEVELS = ("warm-up", "standard", "standard", "standard", "standard", "hard", "hard", "project")


def course(levels=LEVELS):
    """A small notebook in the shape of a course."""
    notebook = chapter()
    for cell in notebook.cells[CHECK : FIGURE + 1]:
        cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-input"]
    notebook.cells[0] = new_code_cell("x = 1")
    notebook.cells[TASK:] = [
        cell
        for place, level in enumerate(levels)
        for cell in (
            new_markdown_cell(
                f":::{{exercise}} A\n:label: ex-{place}\n\n**{level} · predict, then run · 5 minutes**\n\nAdd.\n:::"
            ),
            new_code_cell("total = None", metadata={"tags": ["stub"]}),
        )
    ]
    return notebook


@pytest.mark.parametrize(
    ("wrong", "breach"),
    [
        ("exercises", lambda nb: nb.cells.pop()),
        ("exercises", lambda nb: nb.cells.extend(nb.cells[TASK : TASK + 2])),
        ("warm-up", lambda nb: reword(nb.cells[TASK], "warm-up", "standard")),
        ("warm-up", lambda nb: reword(nb.cells[-2], "project", "hard")),
        ("predict", lambda nb: [reword(cell, "predict, then run", "code") for cell in nb.cells[TASK::2]]),
        ("code cells", lambda nb: nb.cells.extend(new_code_cell("x = 1") for _ in range(40))),
        ("median", lambda nb: nb.cells.extend(new_code_cell("x = 1\n" * 7) for _ in range(5))),
        ("words", lambda nb: nb.cells.insert(0, new_markdown_cell("a word " * 2000))),
        ("folded", lambda nb: nb.cells[CHECK].metadata.update(tags=["check"])),
        ("folded", lambda nb: nb.cells[FIGURE].metadata.update(tags=[])),
    ],
)
def test_a_chapter_of_another_shape_is_found(wrong, breach):
    assert list(check_book.course(course())) == []
    notebook = course()
    breach(notebook)
    found = list(check_book.course(notebook))
    assert len(found) == 1 and wrong in found[0]


def test_formulas_and_exercises_are_not_counted_as_prose():
    text = "One $x = 1$ two.\n\n$$\na = b\n$$ (eq-a)\n\n:::{tip}\nthree\n:::\n\n## Exercises\n\nten\n\n## Then\n\nfour"
    assert check_book.prose(new_notebook(cells=[new_markdown_cell(text)])).split() == (
        "One two. three ## Then four".split()
    )


def test_the_metadata_of_a_notebook_is_looked_at():
    for extra in ({"papermill": {}}, {"language_info": {"name": "python", "version": "3.11.7"}}):
        notebook = chapter()
        notebook.metadata.update(nbformat.from_dict(extra))
        assert any(sentence.startswith("metadata:") for sentence in check_book.problems(notebook))


def test_a_repeated_figure_name_is_found():
    assert len(check_book.repeated_figures({"one": chapter(), "two": chapter()})) == 1
    assert check_book.repeated_figures({"one": chapter()}) == []


def test_a_dangling_back_link_is_found(tmp_path):
    package, book = tmp_path / "package", tmp_path / "book"
    package.mkdir(), book.mkdir()
    nbformat.write(new_notebook(cells=[new_markdown_cell("We call `known` here.")]), book / "01-a.ipynb")
    for name, chapter_name, wrong in [("known", "01-a", 0), ("unknown", "01-a", 1), ("any", "02-b", 1)]:
        source = f'def {name}():\n    """One.\n\n    Introduced in book/{chapter_name}.ipynb.\n    """\n'
        (package / "module.py").write_text(source)
        assert len(check_book.dangling_links(package, book)) == wrong


def test_letters_are_read_from_formulas():
    text = "A $x_{ij} = \\frac{\\sigma}{2} \\text{if } \\log p$ b\n\n```\n$c$\n```\n\n$$\nd \\EE[w]\n$$ (eq-e)"
    assert check_book.symbols(text) == {"x", "sigma", "p", "d", "w"}


def test_a_symbol_without_a_meaning_or_with_two_is_found():
    notation = "| $x$ | data |\n\n## In one chapter only\n\n| 1, 3 | $u$ | local |\n\n## Macros\n"
    notebook = new_notebook(cells=[new_markdown_cell("We see $x$ and $u$.")])
    assert check_book.symbols_apart(notation, 1, notebook) == []
    assert check_book.symbols_apart(notation, 2, notebook) == ["'u' is not on the notation page"]
    assert len(check_book.symbols_apart(notation.replace("$u$", "$u, x$"), 3, notebook)) == 1


def test_a_macro_on_one_side_only_is_found():
    config = "sphinx: {config: {mathjax3_config: {tex: {macros: {EE: E, KL: [K, 2]}}}}}"
    notation = "text\n## Macros\n\n| `\\EE` | x |\n| `\\KL{q}{p}` | x |\n"
    assert check_book.macros_apart(config, notation) == []
    assert len(check_book.macros_apart(config, notation.replace("| `\\EE` | x |\n", ""))) == 1
    assert len(check_book.macros_apart(config, notation + "| `\\New` | x |\n")) == 1
    assert len(check_book.macros_apart(config, notation.replace("{q}{p}", "{q}"))) == 1


def test_a_chapter_left_out_is_found():
    toc, index = "parts: [{chapters: [{file: book/01-a}]}]", "| 1 | [A](01-a.ipynb) |"
    assert check_book.unlisted_chapters(["01-a.ipynb"], toc, index) == []
    assert len(check_book.unlisted_chapters(["02-b.ipynb"], toc, index)) == 2
