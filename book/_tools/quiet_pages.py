"""What the pages need beyond the extensions: MathJax from a package, the contents of the API page, small repairs.

What needs the address of the repository or of the site is there if `_config.yml` has one, and else not: the buttons to
edit a page, to report a mistake and to open a notebook elsewhere, absolute addresses for search engines and cards.
"""

from __future__ import annotations

import importlib.util
import pkgutil
import re
import struct
import sys
from pathlib import Path
from typing import Any

from docutils.nodes import reference
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.fileutil import copy_asset
from sphinx_external_toc.collectors import TocTreeCollectorWithStyles as TocTreeCollector

sys.path.insert(0, str(Path(__file__).parent))
import editions  # noqa: E402
import settings_of_book as settings  # noqa: E402

MOVED = {
    "04-inference-lag": "05-inference-lag",
    "05-mixtures-and-iwae": "06-mixtures-and-iwae",
    "06-flows": "07-flows",
    "07-choosing": "08-choosing",
    "speed": "running",
}
"""Pages of the first edition, and where their contents are now."""

_ELSEWHERE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Refresh" content="0; url={target}">
<title>{title}</title><meta name="robots" content="noindex"><link rel="icon" href="data:,"></head>
<body><main><h1>{title}</h1><p>{sentence} <a href="{target}">{words}</a>.</p></main></body></html>
"""

# sphinx-proof and sphinx-exercise give these ids to every block; nothing points at them, and an id must be unique.
_REPEATED_ID = re.compile(r' id="(?:proof|proof-content|exercise-content|solution-content)"')
# A proof has no title of its own, and one without a title cannot be folded.
_FOLDED_PROOF = re.compile(r'(<div class="proof dropdown admonition"[^>]*>\s*)<p>Proof\.\s*')
_MATHJAX = ("tex-svg.js", "input/tex/extensions")
_CHAPTER = re.compile(r"\bbook/(\d\d-[\w-]+)\.ipynb")


def unique_ids(body: str) -> str:
    """The page without the ids that the proof and exercise extensions repeat."""
    return _REPEATED_ID.sub("", body)


def plain_citations(body: str) -> str:
    """The page with lists of works that are no ARIA lists: what stands in them are no list items."""
    return re.sub(
        r'(<div class="citation-list") role="list"|(<div) role="list"( class="citation-list")', r"\1\2\3", body
    )


def titled_proofs(body: str) -> str:
    """The page with a title on each proof that is to be folded."""
    return _FOLDED_PROOF.sub(r'\1<p class="admonition-title">Proof</p>\n<p>', body)


def without_thebe(scripts: list[Any]) -> list[Any]:
    """The scripts of a page less thebe, which would come from another host and is not used here."""
    return [script for script in scripts if "thebe" not in f"{script.filename} {script.attributes}".lower()]


def linked_chapters(line: str) -> str:
    """A line of a docstring with "book/01-name.ipynb" made a link to that chapter, and the star of a signature kept."""
    return _CHAPTER.sub(r":doc:`/book/\1`", re.sub(r"(?<=, )\*(?=, )", r"\\*", line))


def examples_as_code(lines: list[str]) -> list[str]:
    """The docstring of a command with what click shows as it stands (below a line of "\\b") as a literal block."""
    shown = []
    for line in lines:
        if line == "\b":
            continue
        shown += ["Examples::", ""] if line in ("Example:", "Examples:") else [line]
    return shown


def modules() -> list[str]:
    """The names of the package's public modules, in alphabetical order."""
    path = importlib.util.find_spec("vaelib").submodule_search_locations
    names = [module.name for module in pkgutil.walk_packages(path, "vaelib.")]
    return sorted(name for name in names if not name.rpartition(".")[2].startswith("_"))


def _write_api(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == "book/api":
        source[0] += "".join(
            f"\n## `{name}`\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```\n" for name in modules()
        )


def _prepare_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [linked_chapters(line) for line in examples_as_code(lines)]


def american(terms: list[str]) -> list[str]:
    """The terms of a list that American spelling writes in another way, so written."""
    spelt = {term: re.sub(r"is(ation|ations|ed|er|ing|e)\b", r"iz\1", term) for term in terms}
    return [other for term, other in spelt.items() if other != term]


def _spell(app: Sphinx, docname: str, source: list[str]) -> None:
    """Let the search find a term of the glossary in both spellings."""
    if docname == "book/glossary":
        terms = [line for line in source[0].splitlines() if re.match(r"[^\W_]", line)]
        source[0] += f"\n\n:::{{container}} d-none\n{'; '.join(american(terms))}\n:::\n"


def copy_mathjax(folder: Path) -> None:
    """Copy what the pages use of the MathJax that the package sphinx-mathjax-offline holds."""
    source = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax"
    for part in _MATHJAX:
        copy_asset(source / part, folder / (part if (source / part).is_dir() else Path(part).parent))


def _copy_mathjax(app: Sphinx, exception: Exception | None) -> None:
    if exception is None and app.builder.format == "html":
        copy_mathjax(Path(app.outdir, "_static/mathjax"))


# The theme draws its icons twice, from a font and from a script of half a megabyte.
_ICON_SCRIPT = re.compile(r"<(?:script|link)\b[^>]*fontawesome\.js[^>]*>(?:\s*</script>)?")


def lighter(page: str) -> str:
    """A page without the script of icons, and with its text waiting for formulas if it has any (site.js shows it)."""
    page = _ICON_SCRIPT.sub("", page)
    if "tex-svg.js" in page:
        return page.replace("<head>", '<head><script>document.documentElement.classList.add("waiting")</script>', 1)
    return page


_PICTURE = re.compile(r'<img\b(?![^>]*\b(?:loading|width|height)=)([^>]*?\bsrc="([^":]+\.png)")')


def later(page: str, folder: Path) -> str:
    """A page of that folder whose pictures come when they are scrolled to, and have their places before."""

    def sized(match: re.Match) -> str:
        path = folder / match[2]
        if not path.exists():
            return match[0]
        width, height = struct.unpack(">II", path.read_bytes()[16:24])  # where a PNG has them
        return f'<img loading="lazy" width="{width}" height="{height}"{match[1]}'

    return _PICTURE.sub(sized, page)


def _finish(app: Sphinx, exception: Exception | None) -> None:
    """The reader's notebooks behind the download buttons, the pages that moved, and what search engines ask for."""
    if exception is not None or app.builder.format != "html":
        return
    out = Path(app.outdir)
    editions.write(out / "_sources/book", "reader", editions.Book(Path(app.srcdir), app.config.repository_of_book))
    for path in out.rglob("*.html"):
        path.write_text(later(lighter(path.read_text("utf-8")), path.parent), "utf-8")
    site = settings.site(app.config.repository_of_book)
    for old, new in MOVED.items():
        here, there = out / f"book/{old}.html", out / f"book/{new}.html"
        if not here.exists() and there.exists():
            text = _ELSEWHERE.format(title="Moved", sentence="This page is now", target=there.name, words="here")
            here.write_text(text, "utf-8")
    home = f"{site}/book/index.html" if site else "book/index.html"
    lost = _ELSEWHERE.format(title="No such page", sentence="Begin at", target=home, words="the first page")
    (out / "404.html").write_text(re.sub(r'<meta http-equiv="Refresh"[^>]*>', "", lost), "utf-8")
    if site:
        addresses = (f"<url><loc>{site}/{page}.html</loc></url>" for page in sorted(app.env.found_docs))
        head = '<?xml version="1.0" encoding="utf-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n'
        (out / "sitemap.xml").write_text(head + "\n".join(addresses) + "\n</urlset>\n", "utf-8")
        (out / "robots.txt").write_text(f"User-agent: *\nSitemap: {site}/sitemap.xml\n", "utf-8")
    (out / ".nojekyll").touch()  # GitHub would leave out the folders whose names begin with an underscore


def _use_addresses(app: Sphinx, config: Any) -> None:
    """Turn on what needs an address, if there is one."""
    if repository := config.repository_of_book:
        site = settings.site(repository)
        buttons = dict.fromkeys(("use_edit_page_button", "use_issues_button", "use_repository_button"), True)
        options = {"repository_url": repository, "repository_branch": "main", "path_to_docs": "", **buttons}
        config.html_theme_options = {**config.html_theme_options, **options}
        config.html_baseurl = config.ogp_site_url = f"{site}/"
        config.ogp_image = f"{site}/_static/figures/elbo-forms.png"
        config.ogp_image_alt = "The noise of the gradient falls to zero where q is the exact posterior."


def launchers(repository: str, page: str) -> dict[str, Any]:
    """The group of buttons that open a notebook elsewhere, as the theme's templates take it."""
    owner, name = repository.rstrip("/").split("/")[-2:]
    binder = f"https://mybinder.org/v2/gh/{owner}/{name}/main?urlpath=lab/tree/work/{page}.ipynb"
    links = [("Colab", settings.colab(repository, page)), ("Binder", binder)]
    return {
        "type": "group",
        "tooltip": "Open the notebook elsewhere",
        "icon": "fas fa-rocket",
        "label": "launch-buttons",
        "buttons": [
            {"type": "link", "text": text, "tooltip": f"Open in {text}", "icon": "fas fa-play", "url": url}
            for text, url in links
        ],
    }


def _launch(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: Any) -> None:
    if app.config.repository_of_book and str(context.get("page_source_suffix")) == ".ipynb":
        context["header_buttons"].insert(0, launchers(app.config.repository_of_book, Path(pagename).name))


def _repair(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: Any) -> None:
    if "body" in context:
        context["body"] = plain_citations(titled_proofs(unique_ids(context["body"])))
    context["script_files"] = without_thebe(context["script_files"])


def _number_chapters(app: Sphinx, config: Any) -> None:
    """Number "book/05-name" as chapter 5, whether or not the chapters before it are written."""
    assign = TocTreeCollector.assign_section_numbers

    def assign_section_numbers(self: TocTreeCollector, env: BuildEnvironment) -> list[str]:
        changed = assign(self, env)
        for docname, numbers in env.toc_secnumbers.items():
            if chapter := re.search(r"/(\d\d)-", docname):
                first = int(chapter[1])
                env.toc_secnumbers[docname] = {anchor: (first, *rest) for anchor, (_, *rest) in numbers.items()}
                for node in (env.titles[docname], *env.tocs[docname].findall(reference)):
                    if node.get("secnumber"):
                        node["secnumber"] = [first, *node["secnumber"][1:]]
        return changed

    TocTreeCollector.assign_section_numbers = assign_section_numbers


def _number_figures(app: Sphinx, config: Any) -> None:
    """Number figures, equations and theorems by page: 3.1 in chapter 3, R.1 among the reproductions."""
    assign = TocTreeCollector.assign_figure_numbers

    def assign_figure_numbers(self: TocTreeCollector, env: BuildEnvironment) -> list[str]:
        changed = assign(self, env)
        for docname, kinds in env.toc_fignumbers.items():
            prefix = settings.prefix(Path(docname).name)
            for numbers in kinds.values():
                numbers.update({label: (prefix, i) for i, label in enumerate(numbers, start=1)})
        return changed

    TocTreeCollector.assign_figure_numbers = assign_figure_numbers


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("repository_of_book", settings.repository(), "html")
    app.connect("config-inited", _number_chapters)
    app.connect("config-inited", _number_figures)
    app.connect("config-inited", _use_addresses, priority=100)
    app.connect("source-read", _write_api)
    app.connect("source-read", _spell)
    app.connect("autodoc-process-docstring", _prepare_docstring)
    app.connect("build-finished", _copy_mathjax)
    app.connect("build-finished", _finish)
    app.connect("html-page-context", _launch, priority=800)
    app.connect("html-page-context", _repair, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
