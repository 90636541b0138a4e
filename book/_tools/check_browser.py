"""What only a browser can tell of the built site: ``python book/_tools/check_browser.py _build/html``.

Each page is loaded once, from a server on this machine, then made narrow and dark. Every check is a function from an
open page to sentences, one for each fault; tests/test_browser.py breaks a page in each way. Without a Chromium it says
so, and checks nothing: a page was not found good then.
"""

from __future__ import annotations

import functools
import gzip
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

WIDTHS = (1280, 390, 360)
SCHEMES = ("light", "dark")
MAX_SHIFT, MAX_WEIGHT = 0.1, 1_500_000
TIMEOUT = 180_000  # milliseconds, for a machine that does other things too
SAMPLED = ("_modules/vaelib/estimators/tableau", "_modules/vaelib/training", "_modules/vaelib/cli", "genindex", "404")
LONG = {
    "book/api.html": ".bd-article section section:nth-of-type(-n + 3)",
    "genindex.html": ".bd-article > :nth-child(-n + 8)",
}
"""The part of a page that is asked for access, where the whole takes minutes: it says the same again and again."""
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"

READY = "() => Promise.resolve(window.MathJax?.startup?.promise).then(() => document.fonts.ready).then(() => true)"
SHIFT = """
window.shift = 0;
new PerformanceObserver((list) => list.getEntries().forEach((e) => { if (!e.hadRecentInput) window.shift += e.value; }))
  .observe({type: "layout-shift", buffered: true});
"""
SIDEWAYS = """() => {
  if (document.scrollingElement.scrollWidth <= innerWidth + 1) return null;
  const holds = (box) => box != document.body && getComputedStyle(box).overflowX != "visible";
  const held = (e) => { for (let p = e; p != document.documentElement; p = p.parentElement) if (holds(p)) return p; };
  const wide = [...document.querySelectorAll("main *")].filter((e) =>
    e.getBoundingClientRect().right > innerWidth + 1 && !held(e));
  const e = wide.at(-1);
  return e ? `${e.tagName} ${e.className} ${e.textContent.trim().slice(0, 40)}` : "something";
}"""
CUT = """() => [...document.querySelectorAll("article mjx-container")].filter((formula) => {
  const drawn = formula.querySelector("svg")?.getBoundingClientRect();
  if (!drawn || !drawn.width || !formula.checkVisibility()) return false;
  for (let box = formula; box && box.tagName != "ARTICLE"; box = box.parentElement) {
    const style = getComputedStyle(box), frame = box.getBoundingClientRect();
    if (style.overflowX == "visible" || drawn.right <= frame.right + 1 && drawn.left >= frame.left - 1) continue;
    return !(["auto", "scroll"].includes(style.overflowX) && style.backgroundImage.includes("gradient"));
  }
  return drawn.right > innerWidth;
}).map((formula) => formula.textContent.trim().slice(0, 60) || formula.parentElement.id || "a formula")"""
STOPS = """() => [...document.querySelectorAll("article mjx-container, article mjx-container *")]
  .filter((e) => e.tabIndex >= 0 && e.scrollWidth <= e.clientWidth + 1).length"""
HIDDEN = """() => {
  dispatchEvent(new Event("beforeprint"));
  const found = [...document.querySelectorAll("article details, article .admonition > *, article .cell > *, article p")]
    .filter((e) => e.textContent.trim() && !e.closest("[hidden], .d-none, .turn, button, summary, .headerlink")
      && (e.tagName == "DETAILS" ? !e.open : !e.checkVisibility({contentVisibilityAuto: true})));
  dispatchEvent(new Event("afterprint"));
  return found.map((e) => `${e.tagName} ${e.className} ${e.textContent.trim().slice(0, 40)}`);
}"""


def browser() -> str | None:
    """The Chromium or Chrome of this machine."""
    asked = os.environ.get("CHROMIUM")
    found = (shutil.which(name) for name in ([asked] if asked else [*NAMES, MAC]))
    return next((path for path in found if path), None)


@functools.cache
def compressed(path: Path) -> int:
    """The bytes of a file as a server sends them."""
    return len(gzip.compress(path.read_bytes(), 6))


@dataclass
class Visit:
    """A page that is open, and what happened while it loaded."""

    page: object
    name: str
    folder: Path
    said: list[str] = field(default_factory=list)
    loaded: set[str] = field(default_factory=set)


def requests(visit: Visit) -> Iterator[str]:
    yield from dict.fromkeys(visit.said)


def sideways(visit: Visit) -> Iterator[str]:
    if wide := visit.page.evaluate(SIDEWAYS):
        yield f"the page scrolls sideways: {wide}"


def formulas(visit: Visit) -> Iterator[str]:
    for formula in visit.page.evaluate(CUT):
        yield f"a formula is cut off, or scrolls without a sign: {formula}"


def tab_stops(visit: Visit) -> Iterator[str]:
    if count := visit.page.evaluate(STOPS):
        yield f"{count} formulas that do not scroll are tab stops"


def access(visit: Visit) -> Iterator[str]:
    from axe_playwright_python.sync_playwright import Axe

    part, options = LONG.get(visit.name), {"resultTypes": ["violations"]}
    if part and not visit.page.query_selector(part):
        yield f"there is nothing at {part}, the part that is asked in place of all"
        return
    results = Axe().run(visit.page, context=part, options=options).response
    for fault in results["violations"]:
        if fault["impact"] in ("serious", "critical"):
            nodes = ", ".join(str(node["target"][0]) for node in fault["nodes"][:3])
            yield f"{fault['impact']}: {fault['id']} ({len(fault['nodes'])} times: {nodes})"


def shift(visit: Visit) -> Iterator[str]:
    if (moved := visit.page.evaluate("window.shift")) > MAX_SHIFT:
        yield f"the page moves while it loads: a layout shift of {moved:.2f}, over {MAX_SHIFT}"


def weight(visit: Visit) -> Iterator[str]:
    if (weight := sum(compressed(visit.folder / name) for name in visit.loaded)) > MAX_WEIGHT:
        yield f"{weight:,} bytes compressed, over {MAX_WEIGHT:,}"


def paper(visit: Visit) -> Iterator[str]:
    visit.page.emulate_media(media="print")
    for hidden in visit.page.evaluate(HIDDEN):
        yield f"is not printed: {hidden}"
    visit.page.emulate_media(media="screen")


def figures(visit: Visit) -> Iterator[str]:
    picture = visit.page.query_selector("article figure img")
    if picture is None:
        return
    picture.click()
    large = visit.page.query_selector("dialog[open] img")
    if large is None or large.bounding_box()["width"] < picture.bounding_box()["width"] - 1:
        yield "a click on a figure does not enlarge it"
    visit.page.keyboard.press("Escape")


ONCE = (requests, shift, weight, paper)
"""What is asked of a page as it was loaded, at its widest."""
EVERYWHERE = (sideways, formulas)
"""What is asked at every width."""
CHECKS = (*ONCE, *EVERYWHERE, tab_stops, access, figures)


def look(visit: Visit) -> Iterator[str]:
    """Every fault of an open page: wide and narrow, light and dark."""
    page = visit.page
    for check in (*ONCE, tab_stops):
        yield from (f"{check.__name__}: {sentence}" for sentence in check(visit))
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        for check in EVERYWHERE:
            yield from (f"{check.__name__}: {sentence} (at {width} pixels)" for sentence in check(visit))
        if width == WIDTHS[-1]:
            yield from (f"figures: {sentence}" for sentence in figures(visit))
        if width != WIDTHS[1]:
            page.emulate_media(color_scheme=SCHEMES[width != WIDTHS[0]])
            yield from (f"access: {sentence} (at {width} pixels)" for sentence in access(visit))


@contextmanager
def served(root: Path) -> Iterator[str]:
    """The address of a folder while a server of this process serves it."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def chromium():
    """A browser with one window, light at first."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        program = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox", "--disable-gpu"])
        try:
            yield program
        finally:
            program.close()


@contextmanager
def visited(program, root: str, name: str, folder: Path) -> Iterator[Visit]:
    """A page that has loaded, in a window without a past."""
    context = program.new_context(viewport={"width": WIDTHS[0], "height": 900}, color_scheme=SCHEMES[0])
    page = context.new_page()
    visit = Visit(page, name, folder)
    page.set_default_timeout(TIMEOUT)

    def answered(response) -> None:
        if not response.url.startswith((root, "data:", "blob:")):
            visit.said.append(f"a request to another host: {response.url}")
        elif response.status >= 400:
            visit.said.append(f"a load failed: {response.url.removeprefix(root)}")
        elif response.url.startswith(root):
            visit.loaded.add(unquote(urlsplit(response.url).path).lstrip("/"))

    page.add_init_script(SHIFT)
    page.on("response", answered)
    page.on("requestfailed", lambda request: visit.said.append(f"a load failed: {request.url.removeprefix(root)}"))
    page.on("pageerror", lambda error: visit.said.append(f"an error: {error}"))
    page.on("console", lambda line: line.type == "error" and visit.said.append(f"on the console: {line.text[:120]}"))
    try:
        page.goto(root + name, wait_until="load")
        page.evaluate(READY)
        yield visit
    finally:
        context.close()


def searched(program, root: str, words: str, folder: Path) -> list[str]:
    """The pages that the site's search lists for some words."""
    with visited(program, root, f"search.html?q={words}", folder) as visit:
        visit.page.wait_for_function("document.querySelector('#search-results p.search-summary')")
        visit.page.wait_for_function("document.querySelectorAll('#search-results li').length")
        return visit.page.eval_on_selector_all("#search-results li a", "all => all.map((a) => a.getAttribute('href'))")


def names(root: Path) -> list[str]:
    """The pages to look at: every page of the book, and some of the package's sources."""
    book = sorted(path.relative_to(root).as_posix() for path in (root / "book").glob("*.html"))
    return [*book, *(f"{name}.html" for name in SAMPLED if (root / f"{name}.html").exists())]


def problems(root: Path, chosen: list[str] | None = None) -> list[str]:
    """Every fault that a browser finds in the site in ``root``."""
    found = []
    with served(root) as address, chromium() as program:
        for name in chosen or names(root):
            if 'http-equiv="Refresh"' in (root / name).read_text("utf-8"):
                continue
            with visited(program, address, name, root) as visit:
                found += [f"{name}: {sentence}" for sentence in look(visit)]
        if chosen is None:
            for words in ("reparameterisation", "reparameterization", "amortisation gap", "amortization gap"):
                if not any("glossary" in page for page in searched(program, address, words, root)):
                    found.append(f"the search does not find '{words}' in the glossary")
    return found


def main(root: str, *chosen: str) -> int:
    if browser() is None:
        print("LEFT OUT: the checks in a browser, since this machine has no Chromium or Chrome (CHROMIUM names one).")
        return 0
    found = problems(Path(root), list(chosen) or None)
    print("\n".join(found) or f"{len(chosen or names(Path(root)))} pages in a browser, and no fault found.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
