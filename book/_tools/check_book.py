"""The rules that every chapter keeps, as functions from its parts to a list of sentences, one for each breach.

An exercise is written once, and every edition is made from the tags of its cells:

1. a markdown cell with an ``{exercise}`` directive: a title, a label "ex-some-name", a line
   "**level · kind · time**" (see LEVELS and KINDS), the task, and a folded hint (a ``{dropdown}`` titled "Hint");
2. a cell tagged ``stub``, which a reader fills in: a function that raises NotImplementedError, or a name that is None;
3. a cell tagged ``exercise-check``: ``def check_some_name(answer)``, which raises unless the answer is right, and
   ``checks.attempt(check_some_name, answer)``, which says "not solved yet" of the stub and lets the notebook run on;
4. between ``{solution-start}`` and ``{solution-end}``, cells tagged ``solution``, which fill in the stub's names and
   hand them to the same check, ``check_some_name(answer)``, and a cell tagged ``wrong-answer`` and ``remove-cell``,
   which plants a wrong one, ``checks.refused(check_some_name, wrong, what="the sign is turned")``.

A student's edition drops what stands between ``{solution-start}`` and ``{solution-end}``, those two included.
Cells of exercises do not count towards the size of a chapter.
"""

from __future__ import annotations

import ast
import re
from base64 import b64decode
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

import nbformat
import yaml

MAX_LINES, MAX_COLUMNS, MAX_ALT, MAX_BYTES = 20, 79, 250, 150_000
CELL_METADATA = {"picture", "tags", "mystnb", "jupyter"}
MACHINE = re.compile(
    r"(?<![\w.~/])/(?:home|root|Users|tmp|usr|opt|mnt|var|work)/"  # a path
    r"|[A-Z]:\\\\?\w|0x[0-9a-f]{6,}"
    r"|\b\d{4}-\d\d-\d\d\b|\b\d\d:\d\d:\d\d\b"  # a date, a time
    r"|\b\d[\d.,]*\s?(?:ns|us|µs|ms|s(?!\.e)|sec|seconds?|min|minutes?|it/s)\b"  # a duration
    r"|\bcuda(?::\d)?\b"
)
LINK = re.compile(r"\bbook/(\d\d-[\w-]+\.ipynb)")
MAX_CELLS, MAX_MEDIAN, MAX_WORDS, EXERCISES = 40, 6, 3500, 8
LEVELS, KINDS = ("warm-up", "standard", "hard", "project"), ("by hand", "code", "experiment", "predict, then run")
SORT = re.compile(rf"^\*\*({'|'.join(LEVELS)}) · ({'|'.join(KINDS)}) · \d+ (?:minutes|hours?)\*\*$", re.MULTILINE)
GREEK = (
    "alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|pi|rho|sigma|tau|upsilon|phi|"
    "varphi|chi|psi|omega|ell|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Phi|Psi|Omega"
)
ASSERTING = ("checks.", "check_", "torch.testing.assert_")
ANSWER_TAGS = ("stub", "exercise-check", "solution", "wrong-answer")


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def printed(cell) -> str:
    """What a code cell printed or displayed as text, without the stand-in text of a picture."""
    texts = [out.get("text", "") for out in cell.outputs if out.output_type == "stream"]
    for out in cell.outputs:
        data = out.get("data", {})
        if not any(kind.startswith("image/") for kind in data):
            texts.append(data.get("text/plain", ""))
    return "".join(texts)


def pictures(cell) -> list[str]:
    """The PNG outputs of a code cell, in base 64."""
    return [out.data["image/png"] for out in cell.outputs if "image/png" in out.get("data", {})]


def valid(notebook) -> Iterator[str]:
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        yield f"not a valid notebook: {error.message}"


def order(notebook) -> Iterator[str]:
    counts = [cell.execution_count for cell in code_cells(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"not run once from top to bottom: execution counts {counts}"


def size(notebook) -> Iterator[str]:
    for cell in code_cells(notebook):
        lines = cell.source.splitlines()
        if not cell.source.strip():
            yield "an empty code cell"
        if len(lines) > MAX_LINES:
            yield f"a cell of {len(lines)} lines begins with {lines[0]!r}"
        for line in lines:
            if len(line) > MAX_COLUMNS:
                yield f"{len(line)} columns: {line!r}"


def figures(notebook) -> Iterator[str]:
    for cell in code_cells(notebook):
        mystnb = cell.metadata.get("mystnb", {})
        figure, alt = mystnb.get("figure", {}), mystnb.get("image", {}).get("alt", "")
        for png in pictures(cell):
            if not figure.get("name") or not figure.get("caption"):
                yield f"a figure without name or caption, drawn by {cell.source[:40]!r}"
            if not 1 <= len(alt.strip()) <= MAX_ALT:
                yield f"a figure described in {len(alt)} characters, drawn by {cell.source[:40]!r}"
            if len(b64decode(png)) > MAX_BYTES:
                yield f"a figure of more than {MAX_BYTES} bytes, drawn by {cell.source[:40]!r}"
        if len(pictures(cell)) > 1:
            yield f"more than one figure, drawn by {cell.source[:40]!r}"
        if figure and not pictures(cell):
            yield f"a caption without a figure, at {cell.source[:40]!r}"
        for out in cell.outputs:
            if {"image/svg+xml", "image/jpeg"} & set(out.get("data", {})):
                yield f"a figure that is not PNG, drawn by {cell.source[:40]!r}"


def outputs(notebook) -> Iterator[str]:
    for cell in code_cells(notebook):
        for out in cell.outputs:
            if out.output_type == "error":
                yield f"an error is stored: {out.ename}"
            if out.output_type == "stream" and out.name == "stderr":
                yield f"stderr is stored: {out.text[:60]!r}"
        for one, other in pairwise(cell.outputs):
            if one.output_type == other.output_type == "stream" and one.name == other.name:
                yield f"what was printed is stored in pieces: {other.text[:60]!r}"
        if found := MACHINE.search(printed(cell)):
            yield f"an output that belongs to one machine: {found[0]!r}"


def plain_python(notebook) -> Iterator[str]:
    for cell in code_cells(notebook):
        if parsed(cell) is None or "get_ipython" in cell.source:
            yield f"not plain Python, so nbval would pass it when it fails: {cell.source[:60]!r}"


def seeded(notebook) -> Iterator[str]:
    """A draw without a generator must come out the same each time: torch's own is seeded by the clock."""
    first = next(iter(code_cells(notebook)), None)
    if first is not None and not re.search(r"^torch\.manual_seed\(\d+\)$", first.source, re.MULTILINE):
        yield "the first code cell does not seed torch: torch.manual_seed(0)"


def metadata(notebook) -> Iterator[str]:
    if set(notebook.metadata) - {"kernelspec", "language_info", "myst"}:
        yield f"metadata of the machine: {sorted(notebook.metadata)}"
    if set(notebook.metadata.get("language_info", {})) - {"name"}:
        yield f"metadata of the interpreter: {sorted(notebook.metadata.language_info)}"
    for cell in notebook.cells:
        if extra := set(cell.metadata) - CELL_METADATA:
            yield f"cell metadata that does not belong here: {sorted(extra)}"


def parentheses(notebook) -> Iterator[str]:
    """An equation's number brings its own."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (found := re.search(r"\(\{eq\}`[^`]*`", cell.source)):
            yield f"two parentheses before a number: {found[0]!r}"


def checks(notebook) -> Iterator[str]:
    checked = [cell for cell in code_cells(notebook) if "check" in tags(cell)]
    if not checked:
        yield "no cell is tagged 'check'"
    for cell in checked:
        lines = printed(cell).splitlines()
        if not lines or not all(line.startswith("ok: ") for line in lines):
            yield f"a check that does not say 'ok: ...': {cell.source[:60]!r} printed {lines}"
    for cell in code_cells(notebook):
        for call in ast.walk(parsed(cell) or ast.Module([], [])):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "checks.holds" and call.args and of_all(call):
                yield f"`holds` takes the statements themselves, since of nothing all is true: {ast.unparse(call)[:60]}"


def of_all(call: ast.Call) -> bool:
    """Whether the first argument of a call asks for all or any of something."""
    inside = (part.func for part in ast.walk(call.args[0]) if isinstance(part, ast.Call))
    return any(getattr(f, "id", getattr(f, "attr", "")) in ("all", "any") for f in inside)


def exercises(notebook) -> Iterator[str]:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    asked = [
        block_label(text, found.end()) for found in re.finditer(r"^:{3,}\{exercise(?:-start)?\}", text, re.MULTILINE)
    ]
    solved = {label: cells for label, cells in solutions(notebook)}
    if None in asked:
        yield "an exercise without a label"
    for label in asked:
        if label not in solved:
            yield f"exercise '{label}' has no solution"
        elif not any("solution" in tags(cell) and asserted(cell) for cell in solved[label]):
            yield f"the solution of exercise '{label}' asserts nothing in a cell tagged 'solution' that was run"
    for label in set(solved) - set(asked):
        yield f"a solution of no exercise: '{label}'"


class Exercise(NamedTuple):
    """An exercise with the code cells up to the next one."""

    label: str | None
    text: str
    cells: list

    def tagged(self, tag: str) -> list:
        return [cell for cell in self.cells if tag in tags(cell)]

    @property
    def check(self) -> str:
        """The name of the function that checks an answer."""
        return f"check_{(self.label or '').removeprefix('ex-').replace('-', '_')}"


def exercises_of(notebook) -> list[Exercise]:
    """Every exercise in order; one cell of text may end one and begin the next."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for opened in re.finditer(r"^(:{3,})\{exercise(?:-start)?\}", cell.source, re.MULTILINE):
                text = cell.source[opened.start() :].partition(f"\n{opened[1]}\n")[0]
                found.append(Exercise(block_label(cell.source, opened.end()), text, []))
        elif found:
            found[-1].cells.append(cell)
    return found


def answers(notebook) -> Iterator[str]:
    """An exercise that has a stub has all that the editions are made from; see the top of this file."""
    for exercise in exercises_of(notebook):
        if not exercise.tagged("stub"):
            continue
        who, check = f"exercise '{exercise.label}'", exercise.check
        if not SORT.search(exercise.text):
            yield f"{who} has no line '**level · kind · time**'"
        if not re.search(r"^:{3,}\{hint\}\n:class: dropdown$", exercise.text, re.MULTILINE):
            yield f"{who} has no folded hint"
        sequence = [tag for cell in exercise.cells for tag in ANSWER_TAGS if tag in tags(cell)]
        if sequence != sorted(sequence, key=ANSWER_TAGS.index) or set(sequence) != set(ANSWER_TAGS):
            yield f"{who} has cells tagged {sequence}, not {list(ANSWER_TAGS)}"
        for tag, call, said in (
            ("exercise-check", f"checks.attempt({check},", "not solved yet"),
            ("solution", f"{check}(", "ok: "),
            ("wrong-answer", f"checks.refused({check},", "ok: refused, "),
        ):
            calling = [cell for cell in exercise.tagged(tag) if call in re.sub(r"\(\s+", "(", cell.source)]
            lines = [line for cell in calling for line in printed(cell).splitlines()]
            if not lines or not all(line.startswith(said) for line in lines):
                yield f"{who}: {call}...) in a cell tagged '{tag}' must print '{said}...', not {lines}"
        if not all("remove-cell" in tags(cell) for cell in exercise.tagged("wrong-answer")):
            yield f"{who}: its wrong answer must be tagged 'remove-cell', or the site shows it"


def block_label(text: str, start: int) -> str | None:
    """The ``:label:`` among the options of the directive that was opened at ``start``."""
    for line in text[start:].splitlines()[1:]:
        if not line.startswith(":") or line.startswith(":::"):
            return None
        if found := re.fullmatch(r":label:\s*(\S+)", line):
            return found[1]
    return None


def solutions(notebook) -> Iterator[tuple[str, list]]:
    """The label that each solution names, and the code cells inside it."""
    label, inside = None, []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            inside.append(cell)
            continue
        for line in cell.source.splitlines():
            if found := re.match(r":{3,}\{solution(-start)?\}\s*(\S+)", line):
                label, inside = found[2], []
                if not found[1]:
                    yield label, []
            elif re.match(r":{3,}\{solution-end\}", line) and label:
                yield label, inside
                label = None


def parsed(cell) -> ast.Module | None:
    """The syntax tree of a code cell, or None if it is not Python (a magic, a shell command)."""
    try:
        return ast.parse(cell.source)
    except SyntaxError:
        return None


def asserted(cell) -> bool:
    """Whether a cell was run and asserts something."""
    return cell.execution_count is not None and any(
        isinstance(node, ast.Assert) or (isinstance(node, ast.Call) and ast.unparse(node.func).startswith(ASSERTING))
        for node in ast.walk(parsed(cell) or ast.Module([], []))
    )


def course(notebook) -> Iterator[str]:
    """The shape of a chapter of the second edition: short, folded, and with a course of exercises."""
    asked = exercises_of(notebook)
    sorts = [found.groups() for exercise in asked if (found := SORT.search(exercise.text))]
    levels, kinds = [level for level, _ in sorts], [kind for _, kind in sorts]
    if len(asked) != EXERCISES or not all(exercise.tagged("stub") for exercise in asked):
        yield f"{len(asked)} exercises, {sum(bool(e.tagged('stub')) for e in asked)} with a stub, not {EXERCISES}"
    if "warm-up" not in levels or levels.count("hard") < 2 or levels.count("project") != 1:
        yield f"a course goes from a warm-up to two hard exercises and one project, not {levels}"
    if "predict, then run" not in kinds:
        yield "no exercise asks to predict, then run"
    own = [cell for cell in code_cells(notebook) if not set(ANSWER_TAGS) & set(tags(cell))]
    shown = [cell.source.split("\n") for cell in own if "hide-input" not in tags(cell)]
    lines = median(sum(bool(line.strip()) for line in source) for source in shown)
    if len(own) > MAX_CELLS or lines > MAX_MEDIAN:
        yield f"{len(own)} code cells, those that are not folded with a median of {lines} lines; exercises apart"
    if (words := len(prose(notebook).split())) > MAX_WORDS:
        yield f"{words} words, beside those of exercises"
    for cell in own:
        if ("check" in tags(cell) or "figure" in cell.metadata.get("mystnb", {})) and "hide-input" not in tags(cell):
            yield f"a check or a figure whose code is not folded: {cell.source[:60]!r}"


def prose(notebook) -> str:
    """The text of a notebook up to its exercises, and after them, without formulas and the lines of directives."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    text = re.sub(r"^## Exercises$.*?(?=^## |\Z)", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^\$\$.*?^\$\$[^\n]*|\$[^$]*\$|^:+[^\n]*$", "", text, flags=re.MULTILINE | re.DOTALL)


RULES = (valid, order, size, figures, outputs, plain_python, seeded, metadata, parentheses, checks, exercises, answers)


def problems(notebook) -> list[str]:
    """Every breach of the rules in one notebook."""
    return [f"{rule.__name__}: {sentence}" for rule in RULES for sentence in rule(notebook)]


def repeated_figures(notebooks: dict[str, object]) -> list[str]:
    """Figure names that two cells of the book share."""
    seen: dict[str, str] = {}
    found = []
    for where, notebook in notebooks.items():
        for cell in code_cells(notebook):
            name = cell.metadata.get("mystnb", {}).get("figure", {}).get("name")
            if name in seen:
                found.append(f"figure '{name}' stands in {seen[name]} and in {where}")
            elif name:
                seen[name] = where
    return found


def dangling_links(package: Path, book: Path) -> list[str]:
    """Docstrings of ``package`` that say "Introduced in book/NN-name.ipynb" of a chapter that does not mention them."""
    found = []
    for module in sorted(package.rglob("*.py")):
        for names, docstring in docstrings(ast.parse(module.read_text("utf-8")), (module.stem,)):
            for chapter in LINK.findall(docstring or ""):
                who = f"{module.relative_to(package)}: {'.'.join(names[1:]) or 'the module'}"
                if not (book / chapter).exists():
                    found.append(f"{who} points at {chapter}, which does not exist")
                elif not any(mentions(book / chapter, name) for name in names[1:] or names):
                    found.append(f"{who} points at {chapter}, which does not mention it")
    return found


def docstrings(node, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str | None]]:
    """Every docstring below ``node`` with the names that lead to it, the module's first."""
    yield names, ast.get_docstring(node)
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            yield from docstrings(child, (*names, child.name))


def mentions(chapter: Path, name: str) -> bool:
    notebook = nbformat.read(chapter, as_version=4)
    return any(re.search(rf"\b{re.escape(name)}\b", cell.source) for cell in notebook.cells)


def symbols(text: str) -> set[str]:
    """The letters, Latin and Greek, that stand for something in the formulas of a text; indices and words apart."""
    formulas = " ".join(
        re.findall(r"\$\$(?:.*?)\$\$|\$[^$]+\$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.DOTALL)
    )
    formulas = re.sub(
        r"\\(?:text|mathrm|operatorname|begin|end)\{[^}]*\}|\\(?:quad|qquad|tfrac|frac)(?![a-z])", " ", formulas
    )
    greek = set(re.findall(rf"\\({GREEK})(?![A-Za-z])", formulas))
    return greek | set(re.findall(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])", re.sub(r"\\[A-Za-z]+", " ", formulas)))


def symbols_apart(notation: str, chapter: int, notebook) -> list[str]:
    """Letters that a chapter uses and the notation page does not list, or lists for the chapter and for the book."""
    everywhere, _, rest = notation.partition("\n## In one chapter only\n")
    rows = re.findall(r"^\| ([\d, ]+) \| ([^|]*) \|", rest.partition("\n## ")[0], re.MULTILINE)
    own = {letter for numbers, listed in rows if str(chapter) in numbers.split(", ") for letter in symbols(listed)}
    everywhere, rows = symbols(everywhere), "\n".join(listed for _, listed in rows)
    used = symbols("\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown"))
    return [f"'{letter}' is not on the notation page" for letter in sorted(used - everywhere - own)] + [
        f"'{letter}' has a meaning in the whole book and another in one chapter"
        for letter in sorted(symbols(rows) & everywhere)
    ]


def macros_apart(config: str, notation: str) -> list[str]:
    """Macros that ``_config.yml`` defines and the notation page does not list, or the other way round."""
    defined = yaml.safe_load(config)["sphinx"]["config"]["mathjax3_config"]["tex"]["macros"]
    arity = {name: value[1] if isinstance(value, list) else 0 for name, value in defined.items()}
    section = notation.partition("\n## Macros\n")[2]
    listed = {
        found[1]: found[2].count("{") for found in re.finditer(r"^\| `\\(\w+)((?:\{\w+\})*)`", section, re.MULTILINE)
    }
    return [
        f"\\{name}: {arity.get(name, 'not defined')} arguments in _config.yml, "
        f"{listed.get(name, 'not listed')} in the notation"
        for name in sorted(arity.keys() | listed.keys())
        if arity.get(name) != listed.get(name)
    ]


def unlisted_chapters(chapters: list[str], toc: str, index: str) -> list[str]:
    """Chapters missing from the table of contents or from the map on the first page."""
    files = [entry["file"] for part in yaml.safe_load(toc)["parts"] for entry in part["chapters"]]
    return [f"{name} is not in _toc.yml" for name in chapters if f"book/{name.removesuffix('.ipynb')}" not in files] + [
        f"{name} is not on the map in book/index.md" for name in chapters if f"]({name})" not in index
    ]
