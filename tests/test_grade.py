"""Grading: a right answer counts, a wrong, a missing and an endless one do not, and a changed check gains nothing."""

from __future__ import annotations

import grade
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

CHECK = """from vaelib import checks


def check_NAME(answer):
    assert answer() == 4, "it is not four"
    print("ok: four")


checks.attempt(check_NAME, NAME)"""


def cell(source, *tags):
    return new_code_cell(source, metadata={"tags": list(tags)})


def chapter():
    cells = []
    for name in ("a", "b"):
        cells += [
            new_markdown_cell(f"::::{{exercise}} A\n:label: ex-{name}\n\nFour.\n::::"),
            cell(f"def {name}():\n    raise NotImplementedError", "stub"),
            cell(CHECK.replace("NAME", name), "exercise-check"),
            new_markdown_cell(f":::{{solution-start}} ex-{name}\n:::"),
            cell(f"def {name}():\n    return 4", "solution"),
            new_markdown_cell(":::{solution-end}\n:::"),
        ]
    return new_notebook(cells=[cell("four = 4"), *cells])


def handed_in(a, b):
    notebook = chapter()
    notebook.cells = [cell for cell in notebook.cells if "solution" not in cell.metadata.get("tags", [])]
    for stub, source in zip((c for c in notebook.cells if "stub" in c.metadata.get("tags", [])), (a, b), strict=True):
        stub.source = source or stub.source
    return notebook


RIGHT = "def a():\n    return four"


@pytest.mark.parametrize(
    ("b", "word"),
    [
        ("def b():\n    return 2 + 2", grade.SOLVED),
        ("", grade.OPEN),
        ("def b():\n    return 5", grade.WRONG),
        ("def b(:", grade.WRONG),
        ("def b():\n    while True:\n        pass", grade.LATE),
        ("import os\nos._exit(1)", "broken: DeadKernelError"),
    ],
)
def test_an_answer_gets_what_its_check_says(b, word):
    assert grade.grade(chapter(), handed_in(RIGHT, b), seconds=30) == {"ex-a": grade.SOLVED, "ex-b": word}


def test_a_changed_check_gains_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "book").mkdir()
    nbformat.write(chapter(), tmp_path / "book/01-a.ipynb")
    changed = handed_in("def a():\n    return 5", "")
    for each in changed.cells:
        if "exercise-check" in each.metadata.get("tags", []):
            each.source = "print('ok: four')"
    nbformat.write(changed, tmp_path / "me.ipynb")
    monkeypatch.setattr(grade, "ROOT", tmp_path)
    assert grade.main(["01-a", str(tmp_path / "me.ipynb")]) == 0
    assert capsys.readouterr().out == "notebook,ex-a,ex-b,solved\nme.ipynb,wrong,open,0\n"
