"""Slides of every chapter, from its source: ``python book/_tools/slides.py [FOLDER]``.

They are made from the reader's edition by one rule. A ``##`` begins a slide and a ``###`` one below it. On it stand the
first paragraph after the heading; every formula, box, list and table, with the line that leads to it; the titles of
what is folded; the code that the site does not fold; and what the checks said. A figure has a slide below, with what
was checked of it. What does not fit goes on below, under the same heading. All other prose, and proofs, are the
speaker's notes (key S). Exercises, solutions, further reading and imports are left out.
"""

from __future__ import annotations

import math
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import editions
import quiet_pages
from nbconvert import SlidesExporter
from nbformat.v4 import new_markdown_cell, new_notebook
from traitlets.config import Config

HERE = Path(__file__).parent
CHAPTER = re.compile(r"\d\d-")
LEFT_OUT = {"Exercises", "Further reading", "Solutions", "References"}
BLOCK = re.compile(r"<details>.*?</details>|^(`{3,}).*?^\1|(?:^[^\n]+\n?)+", re.MULTILINE | re.DOTALL)
KINDS = {
    "#": "heading", ">": "box", "$$": "formula", "|": "table", "- ": "list", "1. ": "list", "```": "code",
    "**Fig.": "caption", "**Proof": "proof", "<details>\n<summary>Proof": "proof", "<details>": "fold",
}  # fmt: skip
"""What a block is, by how it begins; what begins otherwise is prose."""
SUMMARY = re.compile(r"<summary>(.*)</summary>")
UNFINISHED = re.compile(r"[^.?!∎)*](?:\*\*)?$")
IMPORTS = re.compile(r"^(?:import|from) ", re.MULTILINE)
ROOM = 17  # lines of text on a slide
SMALL = {"figure": (10, 1e9), "caption": (0.8, 105), "code": (0.72, 95), "check": (0.72, 95), "table": (1, 110)}
"""What is set smaller, or not at all: its height in lines of text, and how many characters are a line of it."""
TALL = re.compile(r"\\(?:d?frac|sum|int|prod|underbrace|max|min)\b")


class Decks(editions.Book):
    """The book whose chapters are decks that lie side by side."""

    def address(self, page: str, anchor: str = "") -> str:
        return super().address(page, anchor) if self.site else f"{page}.html" if CHAPTER.match(page) else ""


@dataclass
class Slide:
    """What stands on one slide, how many lines are left, and what is said to it."""

    kind: str
    shown: list[str]
    room: float
    notes: list[str] = field(default_factory=list)
    figure: bool = False


def lines(kind: str, text: str) -> float:
    """About how many lines of text a block takes."""
    if kind in SMALL:
        height, width = SMALL[kind]
        return 1 + height * sum(math.ceil(len(row) / width) for row in text.splitlines())
    parts = text.split("$$")
    rows = [row for tex in parts[1::2] for row in tex.split(r"\\")]
    words = re.sub(r"\]\([^)]*\)|\\[a-z]+|[$*{}]", "", "".join(parts[::2])).strip("> \n")
    paragraphs = re.split(r"\n>? *(?:\n|(?=[-*\d]))", words)
    return sum(2 if TALL.search(row) else 1.3 for row in rows) + sum(math.ceil(len(p) / 88) + 0.5 for p in paragraphs)


def blocks(notebook) -> Iterator[tuple[str, str]]:
    """The blocks of the reader's edition that have a place in a lecture, each with its kind."""
    section = None
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for found in BLOCK.finditer(cell.source):
                text = found[0].strip()
                if text.startswith("## "):
                    section = text[3:]
                if section not in LEFT_OUT:
                    yield next((kind for start, kind in KINDS.items() if text.startswith(start)), "prose"), text
        elif section not in LEFT_OUT and not IMPORTS.search(cell.source):
            yield from of_code(cell)


def of_code(cell) -> Iterator[tuple[str, str]]:
    """The source of a cell unless it is folded, its tables and figures, and what it checked."""
    if not cell.metadata.get("jupyter", {}).get("source_hidden"):
        yield "code", f"```python\n{cell.source}\n```"
    for out in cell.outputs:
        data = out.get("data", {})
        if png := data.get("image/png"):
            alt = out.metadata.get("image/png", {}).get("alt", "").replace("[", "(").replace("]", ")")
            yield "figure", f"![{alt}](data:image/png;base64,{''.join(png.split())})"
        elif table := data.get("text/markdown"):
            yield "table", table
        elif said := [line for line in out.get("text", "").splitlines() if line.startswith("ok:")]:
            yield "check", "\n".join(["```text", *said, "```"])


def slides(notebook) -> list[Slide]:
    """The slides of a notebook of the reader's edition."""
    deck: list[Slide] = []
    heading = lead = ""
    for kind, text in blocks(notebook):
        if kind == "heading":
            level, _, heading = text.partition(" ")
            deck.append(Slide("subslide" if level == "###" else "slide", [text], room=ROOM - 2))
            continue
        slide = deck[-1]
        if kind in ("proof", "fold") or (kind == "prose" and len(slide.shown) > 1):
            slide.notes.append(text)
            last = text.splitlines()[-1]
            lead = last if kind == "prose" and UNFINISHED.search(last) else ""
            if kind != "fold":
                continue
            text = f"- {SUMMARY.search(text)[1]}"
        block, lead = "\n\n".join(filter(None, [lead, text])), ""
        need = lines(kind, block)
        apart = kind == "figure" or (slide.figure and kind not in ("caption", "check"))
        if kind != "caption" and len(slide.shown) > 1 and (apart or need > slide.room):
            deck.append(slide := Slide("subslide", [f"##### {heading}"], room=ROOM - 1))
        slide.figure |= kind == "figure"
        slide.shown.append(block)
        slide.room -= need
    return deck


def page(notebook, title: str) -> str:
    """The deck of a notebook as HTML."""
    cells = []
    for slide in slides(notebook):
        for kind, texts in ((slide.kind, slide.shown), ("notes", slide.notes)):
            if texts:
                cells.append(new_markdown_cell("\n\n".join(texts), metadata={"slideshow": {"slide_type": kind}}))
    style = Config(CSSHTMLHeaderPreprocessor={"style": "default"})
    exporter = SlidesExporter(config=style, extra_template_paths=[str(HERE)], template_file="slides.html.j2")
    exporter.reveal_url_prefix, exporter.reveal_theme = "static/reveal", "white"
    return exporter.from_notebook_node(new_notebook(cells=cells, metadata={"title": title}))[0]


def main(folder: str = "_build/slides") -> None:
    static = Path(folder, "static")
    shutil.rmtree(folder, ignore_errors=True)
    unused = shutil.ignore_patterns("*.map", "*.esm.js", "css")
    shutil.copytree(files("sphinx_revealjs") / "_static/revealjs", static / "reveal", ignore=unused)
    quiet_pages.copy_mathjax(static / "mathjax")
    book = Decks()
    for name in filter(CHAPTER.match, book.notebooks):
        Path(folder, f"{name}.html").write_text(
            page(editions.edition(book, name, "reader"), book.titles[name]), "utf-8"
        )
        print(Path(folder, f"{name}.html"))


if __name__ == "__main__":
    main(*sys.argv[1:])
