"""Grade handed-in notebooks: ``python book/_tools/grade.py CHAPTER NOTEBOOK.ipynb ... [--seconds N]``.

What counts is what the chapter's own checks say of the names that the student's cells define: the checks are taken from
the source, so that a notebook whose checks were changed gains nothing. Each notebook runs in a process of its own, and
what it prints is not read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import check_book
import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).parent.parent.parent
SOLVED, OPEN, WRONG, LATE, BROKEN = "solved", "open", "wrong", "out of time", "broken"


def program(source, handed_in) -> tuple[list[str], object]:
    """The labels of a chapter's exercises, and a notebook of its cells with the student's in place of the stubs.

    The student's cells for a stub are those at its place: the cells tagged ``stub``, in order.
    """
    answers = [cell.source for cell in handed_in.cells if cell.cell_type == "code" and "stub" in check_book.tags(cell)]
    labels, cells = [], []
    place = iter(answers)
    for cell in check_book.code_cells(source):
        marks = check_book.tags(cell)
        if "stub" in marks:
            cells.append(new_code_cell(next(place, ""), metadata={"tags": ["raises-exception"]}))
        elif "exercise-check" in marks:
            exercise = next(e for e in check_book.exercises_of(source) if cell in e.tagged("exercise-check"))
            labels.append(exercise.label)
            cells.append(new_code_cell(cell.source, metadata={"tags": ["raises-exception"], "label": exercise.label}))
        elif not {"solution", "wrong-answer", "check"} & set(marks):
            cells.append(new_code_cell(cell.source))
    return labels, new_notebook(cells=cells)


def verdict(cell) -> str:
    """What a check said of an answer."""
    said = check_book.printed(cell)
    if any(out.output_type == "error" for out in cell.outputs) or "not right yet" in said:
        return WRONG
    return OPEN if "not solved yet" in said or not said.strip() else SOLVED


def grade(source, handed_in, seconds: float) -> dict[str, str]:
    """What became of each exercise, by its label."""
    labels, notebook = program(source, handed_in)
    done = {}

    def note(cell, cell_index, execute_reply) -> None:
        done[cell.metadata.get("label")] = cell

    client = NotebookClient(
        notebook, timeout=seconds, iopub_timeout=seconds, kernel_name="python3", on_cell_executed=note
    )
    failed = OPEN
    try:
        client.execute()
    except TimeoutError:
        failed = LATE
    except Exception as error:  # whatever the student's code did to its process
        failed = f"{BROKEN}: {type(error).__name__}"
    return {label: verdict(done[label]) if label in done else failed for label in labels}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Grade handed-in notebooks.")
    parser.add_argument("chapter", help="such as 01-elbo-forms")
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--seconds", type=float, default=600, help="the most that one cell may take")
    asked = parser.parse_args(arguments)
    source = nbformat.read(ROOT / f"book/{asked.chapter}.ipynb", as_version=4)
    found = {}
    for path in asked.notebooks:
        found[path.name] = grade(source, nbformat.read(path, as_version=4), asked.seconds)
        points = sum(word == SOLVED for word in found[path.name].values())
        print(f"{path.name}: {points} of {len(found[path.name])}", file=sys.stderr)
    labels = list(next(iter(found.values())))
    print(",".join(["notebook", *labels, "solved"]))
    for name, words in found.items():
        print(",".join([name, *words.values(), str(sum(word == SOLVED for word in words.values()))]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
