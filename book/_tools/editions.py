"""Notebooks that open anywhere, from the sources in ``book/``: ``python book/_tools/editions.py [FOLDER [EDITION]]``.

========  ==============================================================================================
reader    stubs and their checks, hints folded, solutions at the end with their code folded
student   the reader's without its solutions
teacher   solutions in their places, and what the page for teachers says of the chapter
========  ==============================================================================================

So whoever runs the reader's notebooks has run every cell of the book.
Their Markdown is what JupyterLab, Colab, VS Code and GitHub all show right: paragraphs, lists, tables, quotes, code,
links, ``$`` and ``$$`` (on one line inside a quote) with plain TeX, and ``<details>`` with a ``<summary>`` (in which
``<code>`` stands for backticks). Boxes become quotes; numbers are those of the site; terms, works and pages become
links. :func:`faults` looks for all else.

What a source may use is what :data:`DIRECTIVES` and :data:`ROLES` know; anything else is an error that names it.
"""

from __future__ import annotations

import functools
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import nbformat
import settings_of_book as settings
from check_book import tags
from nbformat.v4 import new_code_cell, new_markdown_cell
from pybtex.database import Entry, parse_file
from pybtex.richtext import Text

EDITIONS = ("reader", "student", "teacher")

INSTALL = """\
# Installs the book's package where it is missing, as on Colab; does nothing elsewhere.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("vaelib") is None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "{requirement}"], check=True)"""

SOLUTIONS = "## Solutions\n\nOf each, the check of its exercise, and a likely mistake that the check refuses."

TAGS = {"check", "stub", "exercise-check", "solution", "wrong-answer", "nbval-ignore-output", "raises-exception"}
"""The tags that a notebook keeps: those that a program asks for."""

NUMBERED = {"exercise": "Exercise", "prf:theorem": "Theorem"}

FENCE = re.compile(r"(:{3,}|`{3,}|~{3,})\{([\w:-]+)\} *(.*)")
CODE = re.compile(r"(`{3,}|~{3,})(?!\{)")
OPTION = re.compile(r":([\w-]+):(?: +(.*))?$")
TARGET = re.compile(r"\((\S+)\)=$")
LABELLED = re.compile(r"\$\$ *\((\S+)\)$")
INLINE = re.compile(
    r"\{(?P<role>[\w:-]+)\}`(?P<argument>[^`]+)`"
    r"|(?<!`)(?P<tick>`+)(?!`).+?(?<!`)(?P=tick)(?!`)"
    r"|(?<![\\$])\$(?P<math>[^$]+)\$"
    r"|(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<address>[^)\s]+)\)",
    re.DOTALL,
)
COMMAND = re.compile(r"\\([A-Za-z]+)")


class SourceError(Exception):
    """Something in a source that no edition can show."""


class Label(NamedTuple):
    """What can be pointed at: the words for it, its page and its anchor there."""

    words: str
    page: str
    anchor: str


class Fold(NamedTuple):
    """The beginning of the solution of an exercise, or its end ("")."""

    label: str


@dataclass
class Book:
    """The sources: which pages there are, what they define, and the addresses."""

    root: Path = settings.ROOT
    repository: str | None = None
    labels: dict[str, Label] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.repository = settings.repository(self.root) if self.repository is None else self.repository
        self.site = settings.site(self.repository)
        self.pages = settings.pages(self.root)
        found = settings.config(self.root)["sphinx"]["config"]["mathjax3_config"]["tex"]["macros"]
        self.macros = {name: value if isinstance(value, list) else [value, 0] for name, value in found.items()}
        self.works = parse_file(str(self.root / "book/references.bib")).entries
        glossary = (self.root / "book/glossary.md").read_text("utf-8")
        self.terms = {line.lower(): line for line in glossary.splitlines() if re.match(r"[^\W_]", line)}
        self.titles, self.notebooks = {}, {}
        for page in self.pages:
            self._read(page)

    def _read(self, page: str) -> None:
        path = self.root / "book" / f"{page}.ipynb"
        if path.exists():
            self.notebooks[page] = nbformat.read(path, as_version=4)
            cells = self.notebooks[page].cells
        else:
            cells = [new_markdown_cell(path.with_suffix(".md").read_text("utf-8"))]
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        self.titles[page] = re.search(r"^# +(.*)$", text, re.MULTILINE)[1]
        counts: Counter[str] = Counter()

        def add(label: str | None, kind: str, anchor: str = "") -> None:
            counts[kind] += 1
            number = f"{settings.prefix(page)}.{counts[kind]}"
            if label:
                words = f"({number})" if kind == "equation" else f"{kind} {number}"
                self.labels[label] = Label(words, page, anchor or label)

        for cell in cells:
            if cell.cell_type == "code":
                if name := cell.metadata.get("mystnb", {}).get("figure", {}).get("name"):
                    add(name, "Fig.")
                continue
            lines = cell.source.splitlines()
            for i, line in enumerate(lines):
                if found := LABELLED.match(line):
                    add(found[1], "equation", f"equation-{found[1]}")
                elif (found := FENCE.match(line)) and found[2] in NUMBERED:
                    add(take_options(lines[i + 1 :])[0].get("label"), NUMBERED[found[2]])
                elif found := TARGET.match(line):
                    heading = next((line for line in lines[i + 1 :] if line.startswith("#")), f"# {found[1]}")
                    self.labels[found[1]] = Label(heading.lstrip("# "), page, found[1])

    def label(self, name: str) -> Label:
        if name not in self.labels:
            raise SourceError(f"nothing is labelled '{name}'")
        return self.labels[name]

    def requirement(self) -> str:
        version = re.search(r'__version__ = "(.+)"', (self.root / "vaelib/__init__.py").read_text("utf-8"))[1]
        return f"vaelib @ git+{self.repository}" if self.repository else f"vaelib=={version}"

    def address(self, page: str, anchor: str = "") -> str:
        """Where a page can be read: on the site, or else as a notebook of the same folder, or else nowhere ("")."""
        if self.site:
            return f"{self.site}/book/{page}.html" + (f"#{anchor}" if anchor else "")
        return f"{page}.ipynb" if page in self.notebooks else ""

    def plain_tex(self, tex: str) -> str:
        """TeX with the book's macros written out, until none is left."""
        for name, (body, arguments) in self.macros.items():
            pattern = re.compile(rf"\\{name}(?![A-Za-z])")
            while found := pattern.search(tex):
                taken, end = take_arguments(tex, found.end(), arguments)
                written = re.sub(r"#(\d)", lambda number, taken=taken: taken[int(number[1]) - 1], body)
                space = " " if re.search(r"\\[A-Za-z]+$", written) and re.match(r"[A-Za-z]", tex[end:]) else ""
                tex = tex[: found.start()] + written + space + tex[end:]
        return tex


def take_arguments(tex: str, start: int, count: int) -> tuple[list[str], int]:
    """The ``count`` arguments in braces from ``start`` on, and where they end."""
    taken = []
    for _ in range(count):
        start += len(tex[start:]) - len(tex[start:].lstrip())
        if tex[start : start + 1] != "{":
            raise SourceError(f"a macro needs {count} arguments in braces: {tex!r}")
        depth, end = 1, start + 1
        while depth:
            depth += {"{": 1, "}": -1}.get(tex[end], 0) if tex[end - 1] != "\\" else 0
            end += 1
        taken.append(tex[start + 1 : end - 1])
        start = end
    return taken, start


def take_options(lines: list[str]) -> tuple[dict[str, str], list[str]]:
    """The options at the head of a directive's lines, and the lines after them."""
    options = {}
    for i, line in enumerate(lines):
        if not (found := OPTION.match(line)):
            return options, lines[i:]
        options[found[1]] = found[2] or ""
    return options, []


def quote(text: str) -> str:
    """Text as a quote, each of its formulas on one line: JupyterLab would take the ``>`` of a second one for TeX."""
    text = re.sub(r"\$\$.+?\$\$", lambda found: " ".join(found[0].split()), text, flags=re.DOTALL)
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


def fold(summary: str, text: str) -> str:
    summary = re.sub(r"`([^`]+)`", r"<code>\1</code>", summary)  # it is HTML, in which Markdown stays as it is
    return f"<details>\n<summary>{summary}</summary>\n\n{text}\n\n</details>"


# --- one page ---------------------------------------------------------------------------------------------------------


@dataclass
class Page:
    """A page of the book on its way to plain Markdown."""

    book: Book
    name: str
    cited: dict[str, None] = field(default_factory=dict)

    def link(self, words: str, page: str, anchor: str = "") -> str:
        href = self.book.address(page, anchor) if page != self.name or self.book.site else ""
        return f"[{words}]({href})" if href else words

    def markdown(self, source: str) -> str:
        """Plain Markdown for a source without solutions."""
        return "\n\n".join(piece for piece in self.pieces(source) if isinstance(piece, str))

    def pieces(self, source: str) -> list[str | Fold]:
        """Plain Markdown, with a mark where a solution begins or ends."""
        done: list[str | Fold] = []
        plain: list[str] = []
        lines = source.splitlines()

        def flush() -> None:
            if text := self.inline("\n".join(plain)).strip("\n"):
                done.append(text)
            plain.clear()

        while lines:
            line = lines.pop(0)
            if found := FENCE.match(line):
                flush()
                body = take_until(lines, lambda line, fence=found[1]: line.rstrip() == fence)
                options, body = take_options(body)
                done.append(self.directive(found[2], found[3].strip(), options, "\n".join(body).strip("\n")))
            elif found := CODE.match(line.lstrip()):
                flush()
                fence = found[1]
                body = take_until(lines, lambda line, fence=fence: line.strip() == fence)
                done.append("\n".join([line, *body, line[: len(line) - len(line.lstrip())] + fence]))
            elif line.startswith("$$"):
                flush()
                block = [line[2:]]
                while not re.search(r"\$\$( *\(\S+\))?$", block[-1]):
                    if not lines:
                        raise SourceError(f"a formula without an end: {line}")
                    block.append(lines.pop(0))
                tex, _, label = "\n".join(block).rpartition("$$")
                done.append(self.formula(tex, label.strip().strip("()")))
            elif not TARGET.match(line):
                plain.append(line)
        flush()
        return done

    def formula(self, tex: str, label: str = "") -> str:
        tag = f"\n\\tag{{{self.book.label(label).words.strip('()')}}}" if label else ""
        return f"$$\n{self.book.plain_tex(tex.strip())}{tag}\n$$"

    def inline(self, text: str) -> str:
        return INLINE.sub(self._inline, text)

    def _inline(self, found: re.Match[str]) -> str:
        if found["role"]:
            role, argument = found["role"], found["argument"]
            if role not in ROLES:
                raise SourceError(f"the role {{{role}}} is not one that the editions know")
            named = re.fullmatch(r"(.*?)\s*<(.+)>", argument, re.DOTALL)
            words, target = (self.inline(named[1]), named[2]) if named else ("", argument)
            return ROLES[role](self, words, " ".join(target.split()))
        if found["math"]:
            return f"${self.book.plain_tex(found['math'])}$"
        if not found["address"]:
            return found[0]
        words, address = self.inline(found["text"]), found["address"]
        if found["image"]:
            raise SourceError(f"a picture outside of an output: {address}")
        if re.match(r"https?://", address):
            return f"[{words}]({address})"
        file, _, anchor = address.partition("#")
        page = Path(file).stem or self.name
        if page not in self.book.pages:
            raise SourceError(f"a link to no page of the book: {address}")
        return self.link(words, page, anchor)

    def directive(self, name: str, argument: str, options: dict[str, str], body: str) -> str | Fold:
        if name not in DIRECTIVES:
            raise SourceError(f"the directive {{{name}}} is not one that the editions know")
        return DIRECTIVES[name](self, name, argument, options, body)

    def numbered(self, name: str, argument: str, options: dict[str, str], body: str) -> str:
        kind, label = NUMBERED[name], options.get("label")
        words = self.book.label(label).words if label else kind
        title = f" ({self.inline(argument)})" if argument else ""
        text = f"**{words}**{title}\n\n{self.markdown(body)}"
        return text if kind == "Exercise" else quote(text)

    def box(self, name: str, argument: str, options: dict[str, str], body: str) -> str:
        title, text = self.inline(argument), self.markdown(body)
        return fold(title, text) if "dropdown" in options.get("class", "") else quote(f"**{title}**\n\n{text}")

    def proof(self, name: str, argument: str, options: dict[str, str], body: str) -> str:
        if "dropdown" in options.get("class", ""):
            return fold("Proof", self.markdown(body))
        return f"**Proof.** {self.markdown(body)} ∎"

    # roles

    def term(self, words: str, target: str) -> str:
        if target.lower() not in self.book.terms:
            raise SourceError(f"'{target}' is not in the glossary")
        spelt = self.book.terms[target.lower()]
        return self.link(words or target, "glossary", "term-" + re.sub(r"[^A-Za-z0-9_.]+", "-", spelt).strip("-"))

    def reference(self, words: str, target: str) -> str:
        label = self.book.label(target)
        number = label.words.rpartition(" ")[2]
        words = words.replace("%s", number).replace("{number}", number) or label.words
        return self.link(words, label.page, label.anchor)

    def cite(self, words: str, target: str) -> str:
        return f"({'; '.join(self.work(key, ', {}') for key in target.split(','))})"

    def cite_text(self, words: str, target: str) -> str:
        return ", ".join(self.work(key, " ({})") for key in target.split(","))

    def work(self, key: str, year: str) -> str:
        key = key.strip()
        if key not in self.book.works:
            raise SourceError(f"no work is called '{key}' in references.bib")
        self.cited[key] = None
        entry = self.book.works[key]
        words, href = authors(entry) + year.format(entry.fields["year"]), address_of(entry)
        return f"[{words}]({href})" if href else words

    def references(self) -> str:
        """The works cited so far, one an item."""
        return "\n".join(sorted(f"- {whole(self.book.works[key])}" for key in self.cited))


def take_until(lines: list[str], end: Callable[[str], bool]) -> list[str]:
    """Take the lines before the one that ends a block, and that one too."""
    taken = []
    while lines:
        if end(line := lines.pop(0)):
            return taken
        taken.append(line)
    raise SourceError(f"a block without an end: {' '.join(taken)[:60]!r}")


DIRECTIVES: dict[str, Callable[[Page, str, str, dict[str, str], str], str | Fold]] = {
    **dict.fromkeys(NUMBERED, Page.numbered),
    "admonition": Page.box,
    "hint": lambda page, name, argument, options, body: page.box(name, argument or "Hint", options, body),
    "prf:proof": Page.proof,
    "dropdown": lambda page, name, argument, options, body: fold(page.inline(argument), page.markdown(body)),
    "solution-start": lambda page, name, argument, options, body: Fold(argument),
    "solution-end": lambda page, name, argument, options, body: Fold(""),
}
ROLES: dict[str, Callable[[Page, str, str], str]] = {
    "term": Page.term,
    **dict.fromkeys(("eq", "ref", "numref", "prf:ref"), Page.reference),
    "cite": Page.cite,
    "cite:t": Page.cite_text,
}


def plain(tex: str) -> str:
    return str(Text.from_latex(tex))


def authors(entry: Entry) -> str:
    names = [plain(" ".join(person.prelast_names + person.last_names)) for person in entry.persons["author"]]
    return names[0] + (" et al." if len(names) > 2 else f" and {names[1]}" if len(names) == 2 else "")


def address_of(entry: Entry) -> str:
    found = entry.fields
    if "doi" in found:
        return f"https://doi.org/{found['doi']}"
    return f"https://arxiv.org/abs/{found['eprint']}" if "eprint" in found else found.get("url", "")


def whole(entry: Entry) -> str:
    """A work as the list of references has it."""
    names = [plain(str(person).partition(",")[0]) for person in entry.persons["author"]]
    where = next((entry.fields[name] for name in ("journal", "booktitle", "howpublished") if name in entry.fields), "")
    title, href = plain(entry.fields["title"]), address_of(entry)
    parts = [", ".join(names), f"[{title}]({href})" if href else title, plain(where), entry.fields["year"]]
    return ". ".join(part for part in parts if part) + "."


# --- notebooks --------------------------------------------------------------------------------------------------------


def edition(book: Book, name: str, kind: str):
    """The notebook of a page in one of the editions."""
    page = Page(book, name)
    main, solved = [], []
    into = main
    try:
        for cell in book.notebooks[name].cells:
            if cell.cell_type == "code":
                into += code(page, cell, folded=into is solved)
                continue
            for piece in page.pieces(cell.source):
                if isinstance(piece, str):
                    into.append(new_markdown_cell(piece))
                elif piece.label:
                    into = main if kind == "teacher" else solved
                    into.append(new_markdown_cell(f"#### Solution of {book.label(piece.label).words}"))
                else:
                    into = main
    except SourceError as error:
        raise SourceError(f"book/{name}.ipynb: {error}") from None
    if kind == "reader" and solved:
        main += [new_markdown_cell(SOLUTIONS), *solved]
    if kind == "teacher" and (notes := notes_for(book, name)):
        main.insert(1, new_markdown_cell(notes))
    if page.cited:
        main.append(new_markdown_cell(f"## References\n\n{page.references()}"))
    cells = [new_code_cell(INSTALL.format(requirement=book.requirement())), *joined(main)]
    for i, cell in enumerate(cells):
        cell["id"] = f"cell-{i}"
    made = nbformat.v4.new_notebook(cells=cells)
    made.metadata = nbformat.from_dict(
        {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
         "language_info": {"name": "python"}}
    )  # fmt: skip
    nbformat.validate(made)
    return made


def code(page: Page, cell, folded: bool) -> Iterator:
    """A code cell with what it stores, and the caption of its figure below it."""
    made = new_code_cell(cell.source, execution_count=cell.execution_count)
    made.outputs = [nbformat.from_dict(out) for out in cell.outputs]
    if kept := [tag for tag in tags(cell) if tag in TAGS]:
        made.metadata["tags"] = kept
    if folded or {"hide-input", "remove-cell"} & set(tags(cell)):
        made.metadata["jupyter"] = {"source_hidden": True}
    mystnb = cell.metadata.get("mystnb", {})
    for out in made.outputs:
        if "image/png" in out.get("data", {}) and (alt := mystnb.get("image", {}).get("alt")):
            out.metadata = {"image/png": {"alt": alt}}
    yield made
    if figure := mystnb.get("figure"):
        yield new_markdown_cell(f"**{page.book.label(figure['name']).words}.** {page.inline(figure['caption'])}")


def joined(cells: list) -> Iterator:
    """The cells, with those of Markdown that follow one another as one."""
    last = None
    for cell in cells:
        if last is not None and last.cell_type == cell.cell_type == "markdown":
            last.source += f"\n\n{cell.source}"
            continue
        if last is not None:
            yield last
        last = cell
    if last is not None:
        yield last


def notes_for(book: Book, name: str) -> str:
    """What the page for teachers says of a chapter: the section whose heading links to it."""
    path = book.root / "book/teaching.md"
    text = path.read_text("utf-8") if path.exists() else ""
    found = re.search(
        rf"^### .*\]\({re.escape(name)}\.ipynb\).*\n(?P<body>(?:(?!#{{1,3}} ).*\n?)*)", text, re.MULTILINE
    )
    return quote("**For teachers**\n\n" + Page(book, name).markdown(found["body"].strip())) if found else ""


def write(folder: Path, kind: str, book: Book | None = None) -> list[Path]:
    """Write an edition of every notebook into ``folder``; what else lies there stays."""
    book = book or Book()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in book.notebooks:
        paths.append(folder / f"{name}.ipynb")
        paths[-1].write_text(nbformat.writes(edition(book, name, kind)) + "\n", "utf-8")
    return paths


# --- faults -----------------------------------------------------------------------------------------------------------

TEX = set(
    """
alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi rho varrho sigma tau
upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar infty partial
nabla forall exists emptyset in notin ni subset subseteq supset supseteq cup cap setminus times cdot cdots ldots dots
vdots ddots pm mp div ast star circ bullet oplus ominus otimes odot le leq ge geq ne neq ll gg approx sim simeq cong
equiv propto prec succ mid nmid parallel perp to mapsto rightarrow leftarrow Rightarrow Leftarrow leftrightarrow
Leftrightarrow implies iff longrightarrow longleftarrow longleftrightarrow Longrightarrow uparrow downarrow nearrow
searrow hookrightarrow sum prod int iint oint bigcup bigcap bigoplus bigotimes frac tfrac dfrac binom sqrt left right
middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr bigm Bigm lvert rvert vert Vert lVert rVert
langle rangle lfloor rfloor lceil rceil lbrace rbrace mathrm mathbf mathit mathsf mathtt mathcal mathbb mathfrak
mathscr boldsymbol bm text textbf textit textrm texttt operatorname hat widehat tilde widetilde bar overline underline
vec dot ddot check breve acute grave overbrace underbrace overset underset stackrel xrightarrow xleftarrow begin end
tag label nonumber notag quad qquad enspace hspace hphantom vphantom phantom smash limits nolimits displaystyle
textstyle scriptstyle log ln exp sin cos tan arcsin arccos arctan sinh cosh tanh det dim ker max min sup inf lim
limsup liminf arg gcd Pr deg hom not prime top bot colon dagger ddagger lor land neg wedge vee mathop mathbin mathrel
substack color cancel boxed triangle square Box diamond backslash surd angle because therefore
    """.split()
)
"""Commands that MathJax and KaTeX both know."""

RAW = re.compile(r"^\s*>?\s*(?::{3,}|(?:`{3,}|~{3,})\{)|\{[\w:-]+\}`|^\(\S+\)=$|\{\{|<!--", re.MULTILINE)
HTML = re.compile(r"</?(?!details>|summary>|https?:)[A-Za-z][^>\n]*>")
SUMMARY = re.compile(r"<summary>.*</summary>")
SPANS = re.compile(r"^ *(`{3,}|~{3,}).*?^ *\1 *$|(?<!`)(`+)(?!`).+?(?<!`)\2(?!`)", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\\$])\$([^$]+)\$", re.DOTALL)


def faults(notebook, exists: Callable[[str], bool]) -> list[str]:
    """Every place where a notebook leaves the subset; ``exists`` tells whether a link leads anywhere."""
    found = []
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    for cell in notebook.cells:
        for out in cell.get("outputs", []):
            texts += [text for kind in ("text/markdown", "text/latex") if (text := out.get("data", {}).get(kind))]
    for text in texts:
        summaries = [re.sub("</?code>", "", hit[0]) for hit in SUMMARY.finditer(text)]
        found += [f"markup in a summary: {hit}" for hit in summaries if re.search(r"[`$*\[]|<(?!/?summary>)", hit)]
        text = SUMMARY.sub("", SPANS.sub("`code`", text))
        formulas = [(one or other) for one, other in FORMULA.findall(text)]
        words = FORMULA.sub("x", text)
        found += [f"raw markup: {hit[0].strip()!r}" for hit in RAW.finditer(words)]
        found += [f"HTML: {hit[0]}" for hit in HTML.finditer(words)]
        found += [f"a formula left open: {text[:60]!r}" for _ in range(words.replace("\\$", "").count("$"))]
        for formula in formulas:
            found += [f"unknown TeX: \\{name}" for name in COMMAND.findall(formula) if name not in TEX]
        quoted = [line for line in text.splitlines() if line.startswith(">") and line.count("$$") % 2]
        found += [f"a formula over several lines of a quote: {line!r}" for line in quoted]
        for address in re.findall(r"\]\(([^)\s]+)\)", words):
            if not exists(address):
                found.append(f"a link leads nowhere: {address}")
    return found


@functools.cache
def known(book_repository: str, root: Path = settings.ROOT) -> frozenset[str]:
    """The addresses on the site that the sources define, without those of headings."""
    book = Book(root, book_repository)
    made = {book.address(page) for page in book.pages}
    made |= {book.address(label.page, label.anchor) for label in book.labels.values()}
    made |= {Page(book, "").term("", term).partition("](")[2].rstrip(")") for term in book.terms}
    return frozenset(made)


def main(folder: str = "_build/editions", *kinds: str) -> int:
    book, wrong = Book(), 0
    shutil.rmtree(folder, ignore_errors=True)
    for kind in kinds or EDITIONS:
        paths = write(Path(folder, kind), kind, book)
        for path in paths:
            for fault in faults(nbformat.read(path, as_version=4), functools.partial(leads, book, path.parent)):
                wrong += 1
                print(f"{path}: {fault}", file=sys.stderr)
        print(f"{len(paths)} notebooks, the {kind}'s edition: {Path(folder, kind)}")
    return min(wrong, 1)


def leads(book: Book, folder: Path, address: str) -> bool:
    """Whether a link of an edition leads somewhere: to another host, to the site, or to a notebook beside it."""
    if book.site and address.startswith(book.site):
        return address in known(book.repository, book.root)
    return bool(re.match(r"https?://", address)) or (folder / address).exists()


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except SourceError as error:
        sys.exit(f"{error}")
