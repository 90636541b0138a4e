"""Let the reader move the figures that a notebook stores with more than their picture: turn them, or slide through.

A figure to turn has plotly's numbers beside the picture. It is shown as its picture, with a button below it that puts
plotly's view in its place; the script is a copy of the one in the installed plotly, beside the book's other static
files. A figure to slide through has a picture for each value of what changes, and gets a slider, which the arrow keys
move too. All of it is in the page: a reader who moves nothing loads nothing, and one who does needs no network. Without
scripts, and in print, the picture stays.
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

PARTS = {
    "application/vnd.plotly.v1+json": """
<div class="turn" data-script="{script}">
<button type="button" class="turn-button">Turn this figure by hand</button>
<script type="application/json">{numbers}</script>
</div>
""",
    "application/vnd.vaelib.sliding+json": """
<div class="turn slide" hidden>
<label><span></span> <input type="range" min="0"></label> <output></output>
<script type="application/json">{numbers}</script>
</div>
""",
}
"""What a figure gets below its picture, by the type of what is stored beside it."""

_SCRIPT = """
document.addEventListener("DOMContentLoaded", () => {  // the script stands in the head
  for (const part of document.querySelectorAll(".slide")) {
    const {label, values, pictures, start} = JSON.parse(part.querySelector("script").textContent);
    const picture = part.closest("figure").querySelector("img");
    const slider = part.querySelector("input"), output = part.querySelector("output");
    const say = () => { slider.ariaValueText = output.textContent = values[slider.value]; };
    part.querySelector("span").textContent = label;
    slider.max = values.length - 1;
    slider.value = start;
    slider.addEventListener("input", () => {
      picture.src = "data:image/png;base64," + pictures[slider.value];
      say();
    });
    say();
    part.hidden = false;
  }
});
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
.slide input { width: min(20rem, 60%); vertical-align: middle; accent-color: var(--pst-color-primary); }
.slide output { display: inline-block; min-width: 5em; text-align: left; font-variant-numeric: tabular-nums; }
@media print { .turn { display: none; } figure img[hidden] { display: inline !important; } }
"""


def moving_figures(notebook: Path) -> dict[str, tuple[str, Any]]:
    """What is stored beside the picture of each figure that can be moved, and its type, by the figure's name."""
    found = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            for kind in PARTS.keys() & output.get("data", {}).keys():
                name = cell["metadata"].get("mystnb", {}).get("figure", {}).get("name")
                if name is None:
                    raise ExtensionError(f"{notebook.name}: a figure to move needs a mystnb.figure.name")
                found[name] = kind, output["data"][kind]
    return found


def add_parts(body: str, figures: dict[str, tuple[str, Any]], script: str) -> str:
    """The page with a button or a slider inside each of the figures, below its picture."""
    for name, (kind, numbers) in figures.items():
        text = json.dumps(numbers, separators=(",", ":")).replace("<", "\\u003c")
        part = PARTS[kind].format(script=script, numbers=text)
        opening = re.compile(rf'(<figure\b[^>]*\bid="{re.escape(name)}"[^>]*>.*?)(<figcaption>)', re.DOTALL)
        body, count = opening.subn(lambda match, part=part: match[1] + part + match[2], body)
        if count != 1:
            raise ExtensionError(f"the page has {count} figures called {name}, not one")
    return body


def _on_page(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: Any) -> None:
    source = Path(app.env.doc2path(pagename)) if doctree is not None else Path()
    if source.suffix != ".ipynb" or not (figures := moving_figures(source)):
        return
    context["body"] = add_parts(context["body"], figures, context["pathto"]("_static/plotly.min.js", resource=True))
    app.add_js_file(None, body=_SCRIPT)
    context["metatags"] = context.get("metatags", "") + f"<style>{_STYLE}</style>"
    copy = Path(app.outdir) / "_static" / "plotly.min.js"
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with as_file(files("plotly") / "package_data" / "plotly.min.js") as script:
            shutil.copyfile(script, copy)


def _on_config(app: Sphinx, config: Any) -> None:
    config.suppress_warnings = [*config.suppress_warnings, "mystnb.unknown_mime_type"]  # this file knows them


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("config-inited", _on_config)
    app.connect("html-page-context", _on_page, priority=800)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
