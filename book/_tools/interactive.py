"""Let the reader turn the figures that a notebook stores with plotly's numbers beside the picture.

Such a figure is shown as its picture, with a button below it. The button puts plotly's view in its place; the numbers
are in the page, and the script is a copy of the one in the installed plotly, beside the book's other static files. So a
reader who does not press it loads nothing, and one who does needs no network. Without scripts, and in print, the
picture stays.
"""

from __future__ import annotations

import json
import re
import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

MIME = "application/vnd.plotly.v1+json"

_PART = """
<div class="turn" data-script="{script}">
<button type="button" class="turn-button">Turn this figure by hand</button>
<script type="application/json">{numbers}</script>
</div>
"""

_SCRIPT = """
document.addEventListener("click", (event) => {
  if (!event.target.matches(".turn-button")) return;
  const part = event.target.closest(".turn"), picture = part.closest("figure").querySelector("img");
  const draw = () => {
    const {data, layout} = JSON.parse(part.querySelector("script").textContent);
    const view = document.createElement("div");
    view.setAttribute("role", "img");
    view.setAttribute("aria-label", picture.alt);
    picture.hidden = true;
    part.replaceChildren(view);
    Plotly.newPlot(view, data, {...layout, paper_bgcolor: "white"}, {responsive: true, displayModeBar: false});
  };
  event.target.disabled = true;
  event.target.textContent = "Loading";
  if (window.Plotly) return draw();
  const script = document.createElement("script");
  script.src = part.dataset.script;
  script.onload = draw;
  script.onerror = () => { event.target.textContent = "The script for turning could not be loaded"; };
  document.head.append(script);
});
"""

_STYLE = """
.turn { text-align: center; margin: 0.3rem 0 0.6rem; }
.turn-button { font: inherit; font-size: 0.9em; padding: 0.35em 0.9em; cursor: pointer; border-radius: 0.3em;
  border: 1px solid var(--pst-color-border); background: var(--pst-color-surface); color: var(--pst-color-text-base); }
@media print { .turn { display: none; } figure img[hidden] { display: inline !important; } }
"""


def turning_figures(notebook: Path) -> dict[str, Any]:
    """The numbers of each figure that can be turned, by the figure's name."""
    found = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            if MIME in output.get("data", {}):
                name = cell["metadata"].get("mystnb", {}).get("figure", {}).get("name")
                if name is None:
                    raise ExtensionError(f"{notebook.name}: a figure to turn needs a mystnb.figure.name")
                found[name] = output["data"][MIME]
    return found


def add_buttons(body: str, figures: dict[str, Any], script: str) -> str:
    """The page with a button inside each of the figures, below its picture."""
    for name, numbers in figures.items():
        text = json.dumps(numbers, separators=(",", ":")).replace("<", "\\u003c")
        part = _PART.format(script=script, numbers=text)
        opening = re.compile(rf'(<figure\b[^>]*\bid="{re.escape(name)}"[^>]*>.*?)(<figcaption>)', re.DOTALL)
        body, count = opening.subn(lambda match, part=part: match[1] + part + match[2], body)
        if count != 1:
            raise ExtensionError(f"the page has {count} figures called {name}, not one")
    return body


def _on_page(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: Any) -> None:
    source = Path(app.env.doc2path(pagename)) if doctree is not None else Path()
    if source.suffix != ".ipynb" or not (figures := turning_figures(source)):
        return
    context["body"] = add_buttons(context["body"], figures, context["pathto"]("_static/plotly.min.js", resource=True))
    app.add_js_file(None, body=_SCRIPT)
    context["metatags"] = context.get("metatags", "") + f"<style>{_STYLE}</style>"
    copy = Path(app.outdir) / "_static" / "plotly.min.js"
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with as_file(files("plotly") / "package_data" / "plotly.min.js") as script:
            shutil.copyfile(script, copy)


def _on_config(app: Sphinx, config: Any) -> None:
    config.suppress_warnings = [*config.suppress_warnings, "mystnb.unknown_mime_type"]  # this file knows plotly's


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("config-inited", _on_config)
    app.connect("html-page-context", _on_page, priority=800)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
