"""What the pages need beyond the extensions: MathJax from a package, the contents of the API page, small repairs."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
from pathlib import Path
from typing import Any

from docutils.nodes import reference
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.fileutil import copy_asset
from sphinx_external_toc.collectors import TocTreeCollectorWithStyles as TocTreeCollector

# sphinx-proof and sphinx-exercise give these ids to every block; nothing points at them, and an id must be unique.
_REPEATED_ID = re.compile(r' id="(?:proof|proof-content|exercise-content|solution-content)"')
# A proof has no title of its own, and one without a title cannot be folded.
_FOLDED_PROOF = re.compile(r'(<div class="proof dropdown admonition"[^>]*>\s*)<p>Proof\.\s*')
_MATHJAX = ("tex-svg.js", "input/tex/extensions", "a11y", "sre")
_CHAPTER = re.compile(r"\bbook/(\d\d-[\w-]+)\.ipynb")


def unique_ids(body: str) -> str:
    """The page without the ids that the proof and exercise extensions repeat."""
    return _REPEATED_ID.sub("", body)


def titled_proofs(body: str) -> str:
    """The page with a title on each proof that is to be folded."""
    return _FOLDED_PROOF.sub(r'\1<p class="admonition-title">Proof</p>\n<p>', body)


def without_thebe(scripts: list[Any]) -> list[Any]:
    """The scripts of a page less thebe, which would come from another host and is not used here."""
    return [script for script in scripts if "thebe" not in f"{script.filename} {script.attributes}".lower()]


def linked_chapters(line: str) -> str:
    """A line of a docstring with "book/01-name.ipynb" made a link to that chapter."""
    return _CHAPTER.sub(r":doc:`/book/\1`", line)


def examples_as_code(lines: list[str]) -> list[str]:
    """The docstring of a command with what click shows as it stands (below a line of "\\b") as a literal block."""
    shown = []
    for line in lines:
        if line == "\b":
            continue
        shown += ["Examples::", ""] if line in ("Example:", "Examples:") else [line]
    return shown


def modules(package: str = "vaelib") -> list[str]:
    """The names of the package's public modules, in alphabetical order."""
    path = importlib.util.find_spec(package).submodule_search_locations
    names = [module.name for module in pkgutil.walk_packages(path, package + ".")]
    return sorted(name for name in names if not name.rpartition(".")[2].startswith("_"))


def _write_api(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == "book/api":
        source[0] += "".join(
            f"\n## `{name}`\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```\n" for name in modules()
        )


def _prepare_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [linked_chapters(line) for line in examples_as_code(lines)]


def _copy_mathjax(app: Sphinx, exception: Exception | None) -> None:
    """Copy what these pages use of the MathJax that the package sphinx-mathjax-offline holds."""
    if exception is None and app.builder.format == "html":
        source = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax"
        for part in _MATHJAX:
            folder = part if (source / part).is_dir() else str(Path(part).parent)
            copy_asset(source / part, Path(app.outdir, "_static/mathjax", folder))


def _repair(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: Any) -> None:
    if "body" in context:
        context["body"] = titled_proofs(unique_ids(context["body"]))
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


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("config-inited", _number_chapters)
    app.connect("source-read", _write_api)
    app.connect("autodoc-process-docstring", _prepare_docstring)
    app.connect("build-finished", _copy_mathjax)
    app.connect("html-page-context", _repair, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
