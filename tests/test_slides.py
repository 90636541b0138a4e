"""The slides: what of a notebook stands on one, what is said to it, and that they need no network and fit."""

from __future__ import annotations

import re

import check_browser
import editions
import pytest
import slides
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
FOLDED = {"jupyter": {"source_hidden": True}}


def said(text):
    return new_output("stream", text=text)


def picture(alt):
    return new_output("display_data", {"image/png": PNG}, metadata={"image/png": {"alt": alt}})


MADE_UP = new_notebook(
    cells=[
        new_code_cell("# Installs\nimport sys"),
        new_markdown_cell("# A chapter\n\nWhat it shows.\n\n> **Before you start**\n>\n> You need nothing."),
        new_code_cell("import torch"),
        new_markdown_cell(
            "## First\n\nOne.\nTwo.\n\nThree.\nWhich is\n\n$$\nx = 1\n$$\n\nFour.\n\n**Proof.** Five. ∎\n\n"
            "<details>\n<summary>Proof</summary>\n\nSix.\n\n</details>\n\n"
            "<details>\n<summary>A case</summary>\n\nSeven.\n\n</details>"
        ),
        new_code_cell("y = 2"),
        new_code_cell("hidden()", metadata=FOLDED),
        new_code_cell("plot()", metadata=FOLDED, outputs=[picture("A [dot]")]),
        new_markdown_cell("**Fig. 1.** A dot.\n\nEight."),
        new_code_cell("check()", metadata=FOLDED, outputs=[said("ok: it holds\nnoise\n")]),
        new_markdown_cell("### Below\n\n- a\n- b"),
        new_code_cell("table()", metadata=FOLDED, outputs=[new_output("display_data", {"text/markdown": "| a |"})]),
        new_markdown_cell("## Exercises\n\n**Exercise 1**\n\nDo it."),
        new_code_cell("stub = None", metadata={"tags": ["stub"]}),
        new_markdown_cell("## Solutions\n\n#### Solution of Exercise 1"),
        new_code_cell("stub = 1", outputs=[said("ok: solved")]),
    ]
)


def test_the_rule():
    dot = f"![A (dot)](data:image/png;base64,{PNG})"
    folds = [f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"
             for title, text in (("Proof", "Six."), ("A case", "Seven."))]  # fmt: skip
    assert [(slide.kind, slide.shown, slide.notes) for slide in slides.slides(MADE_UP)] == [
        ("slide", ["# A chapter", "What it shows.", "> **Before you start**\n>\n> You need nothing."], []),
        (
            "slide",
            ["## First", "One.\nTwo.", "Which is\n\n$$\nx = 1\n$$", "- A case", "```python\ny = 2\n```"],
            ["Three.\nWhich is", "Four.", "**Proof.** Five. ∎", *folds],
        ),
        ("subslide", ["##### First", dot, "**Fig. 1.** A dot.", "```text\nok: it holds\n```"], ["Eight."]),
        ("subslide", ["### Below", "- a\n- b", "| a |"], []),
    ]


def test_what_does_not_fit_goes_on_below_and_what_follows_a_figure_too():
    long = "\n".join(f"line_{i} = {i}" for i in range(20))
    cells = [new_markdown_cell("## Title\n\nText."), *(new_code_cell(long) for _ in range(2)),
             new_code_cell("plot()", metadata=FOLDED, outputs=[picture("a")]), new_code_cell("z")]  # fmt: skip
    deck = slides.slides(new_notebook(cells=cells))
    assert [(slide.kind, slide.shown[0], len(slide.shown)) for slide in deck] == [
        ("slide", "## Title", 2), *[("subslide", "##### Title", 2)] * 4
    ]  # fmt: skip


def outside(html):
    """What a page loads from elsewhere; a link to click is nothing that it loads."""
    html = re.sub(r"<a\b[^>]*>", "", html)
    return re.findall(
        r"""(?:src|href)=["']?((?:https?:)?//[^"' >]+)|url\(["']?((?:https?:)?//[^)]+)|"(https?://)""", html
    )


def test_a_load_from_elsewhere_is_found():
    for planted in ('<script src="https://a.org/b.js">', "<link href='//a.org/b.css'>", "url(https://a.org/c)"):
        assert outside(planted)
    assert not outside('<a class="x" href="https://a.org">')


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    slides.main(str(folder))
    return folder


def test_every_chapter_has_a_slide_for_each_section_and_loads_nothing_from_elsewhere(made):
    book = slides.Decks(repository="")
    chapters = [name for name in book.notebooks if slides.CHAPTER.match(name)]
    assert [path.stem for path in sorted(made.glob("*.html"))] == chapters and len(chapters) == 9
    for name in chapters:
        html = (made / f"{name}.html").read_text("utf-8")
        assert outside(html) == [], name
        for address in re.findall(r'(?:src|href)="(static/[^"]+)"', html):
            assert (made / address).exists(), address
        sections = [text for kind, text in slides.blocks(editions.edition(book, name, "reader")) if kind == "heading"]
        assert html.count("<h1") == 1 and html.count("<h2") + html.count("<h3") + 1 == len(sections) > 5, name
        assert "checks.attempt" not in html and "Solution of" not in html and "import torch" not in html, name
        for page in re.findall(r'<a href="((?!https?:)[^"#]+)', html):
            assert (made / page).exists(), page


BEYOND = """() => Reveal.getSlides().filter((slide) => {
  const {h, v} = Reveal.getIndices(slide);
  Reveal.slide(h, v);
  const frame = slide.getBoundingClientRect();
  const parts = [...slide.querySelectorAll("pre, table, img, svg, p, li, h1, h2, h3, h5")]
    .filter((e) => !e.closest("aside"));
  return frame.bottom > innerHeight || !parts.length || parts.some((e) => {
    const box = e.getBoundingClientRect();
    return !box.width || box.right > frame.right + 2 || box.bottom > innerHeight || box.top < 0;
  });
}).map((slide) => slide.innerText.slice(0, 80))"""


@pytest.mark.skipif(check_browser.browser() is None, reason="no Chromium or Chrome: NOTHING in a browser was checked")
def test_everything_fits_on_its_slide(made):
    good = slides.page(MADE_UP, "A deck")
    (made / "good.html").write_text(good, "utf-8")
    (made / "long.html").write_text(good.replace("</h1>", "</h1>" + "<p>text</p>" * 20), "utf-8")
    (made / "wide.html").write_text(good.replace("</h1>", '</h1><table style="min-width: 1400px"><tr><td>x'), "utf-8")
    found = {}
    with check_browser.served(made) as address, check_browser.chromium() as program:
        for path in made.glob("*.html"):
            with check_browser.visited(program, address, path.name, made) as visit:
                visit.page.set_viewport_size({"width": 1280, "height": 800})
                visit.page.wait_for_function("window.Reveal?.isReady()")
                found[path.stem] = visit.said + visit.page.evaluate(BEYOND)
    assert found.pop("long") and found.pop("wide")
    assert {name: faults for name, faults in found.items() if faults} == {}
