"""Negative controls of check_browser: a good page passes, and each way to break one is found."""

from __future__ import annotations

import check_browser
import pytest

needs_browser = pytest.mark.skipif(
    check_browser.browser() is None, reason="no Chromium or Chrome on this machine: NOTHING in a browser was checked"
)
pytestmark = needs_browser

PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
GOOD = f"""<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>A page</title>
<link rel="icon" href="data:,"><style>
body {{ margin: 8px; color: #222; background: #fff }} svg {{ display: block }}
.math {{ max-width: 100%; overflow-x: auto; background-image: linear-gradient(to left, #0003, transparent) }}
dialog img {{ width: 340px }} figure img {{ width: 200px }} .enlarge {{ padding: 0; border: 0 }}</style></head>
<body><main><article><h1>A page</h1><p id="text">Some text.</p>
<div class="math" tabindex="0"><mjx-container><svg width="900" height="20" role="img" aria-label="x"></svg>
</mjx-container></div>
<figure><button class="enlarge" onclick="enlarge(this.firstChild)"><img src="{PIXEL}" alt="A dot"></button></figure>
<details><summary>More</summary><p>folded</p></details></article></main>
<script>
function enlarge(img) {{ const d = document.createElement("dialog"); d.setAttribute("aria-label", "large");
  d.append(img.cloneNode()); document.body.append(d); d.showModal(); }}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => d.open = true));
</script></body></html>"""

BROKEN = [
    ("requests", "<body>", '<body><img alt="" src="https://example.org/a.png">'),
    ("requests", "<body>", '<body><img alt="" src="missing.png">'),
    ("requests", "<script>", "<script>console.error('no');"),
    ("requests", "<script>", "<script>nothing.at.all;"),
    ("sideways", '<p id="text">', '<p id="text" style="width: 500px">'),
    ("formulas", "overflow-x: auto", "overflow-x: hidden"),
    ("formulas", "background-image", "--nothing"),
    ("tab_stops", "<article>", '<article><mjx-container tabindex="0">x</mjx-container>'),
    ("access", ' alt="A dot"', ""),
    ("access", "color: #222", "color: #ddd"),
    ("access", ' lang="en"', ""),
    ("shift", "<script>", "<script>setTimeout(() => document.body.style.paddingTop = '600px', 30);"),
    ("weight", "Some text.", "<!-- {noise} -->"),
    ("paper", "d.open = true", "d.open"),
    ("paper", "</style>", "@media print { #text { display: none } }</style>"),
    ("figures", "d.showModal()", "d.remove()"),
    ("figures", "dialog img { width: 340px }", "dialog img { width: 34px }"),
]


@pytest.fixture(scope="module")
def program():
    with check_browser.chromium() as program:
        yield program


def faults(program, folder, text):
    (folder / "page.html").write_text(text)
    with check_browser.served(folder) as address, check_browser.visited(program, address, "page.html", folder) as visit:
        visit.page.wait_for_timeout(100)
        return list(check_browser.look(visit))


def test_a_good_page_passes(program, tmp_path):
    assert faults(program, tmp_path, GOOD) == []


@pytest.mark.parametrize(("check", "old", "new"), BROKEN)
def test_a_broken_page_fails(program, tmp_path, check, old, new):
    import random

    assert old in GOOD
    noise = random.Random(0).randbytes(1_600_000).hex()
    found = faults(program, tmp_path, GOOD.replace(old, new.replace("{noise}", noise), 1))
    assert any(sentence.startswith(check + ":") for sentence in found), found


def test_a_part_that_is_not_there_is_named(program, tmp_path, monkeypatch):
    monkeypatch.setitem(check_browser.LONG, "page.html", ".nowhere")
    assert any("there is nothing at .nowhere" in sentence for sentence in faults(program, tmp_path, GOOD))


def test_every_check_has_a_negative_control():
    assert {check.__name__ for check in check_browser.CHECKS} == {check for check, _, _ in BROKEN}


def test_without_a_browser_it_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CHROMIUM", "no-such-browser")
    assert check_browser.main(str(tmp_path)) == 0
    assert capsys.readouterr().out.startswith("LEFT OUT: ")
