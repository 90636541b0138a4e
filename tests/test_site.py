"""Negative controls of check_site: a good page passes, each way to break one is found. And what quiet_pages does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import check_site
import pytest

GOOD = """<!DOCTYPE html><html><head>
<meta name="description" content="A plain sentence."><link rel="stylesheet" href="../style.css">
<link rel="canonical" href="https://example.org/book/page.html"><script src="../code.js"></script>
<script>window.MathJax = {"tex": {}}; const space = 1 // 2;</script><style>p { color: red }</style></head>
<body><article><h1 id="top"><span class="section-number">1. </span>A page</h1><p>Some text with a
<a href="#top">link</a> and <a href="other.html#there">another</a> and <a href="https://example.org">one
abroad</a>. <code>:::{note}</code></p>
<div class="admonition dropdown"><p class="admonition-title">Solution</p></div>
<img src="../picture.png" alt="A line"></article></body></html>"""
OTHER = '<html><body><article><h1 id="there">Another page</h1>With some text.</article></body></html>'

BROKEN = [
    ("empty", "Some text", None),
    ("empty", "<h1 id=", "<h2 id="),
    ("numbered", ">1. <", ">2. <"),
    ("numbered", ' class="section-number"', ""),
    ("repeated_ids", "<code>", '<code id="top">'),
    ("images", 'alt="A line"', 'alt=" "'),
    ("images", ' alt="A line"', ""),
    ("images", 'alt="A line"', 'alt="../picture.png"'),
    ("errors", "Some text", "Traceback (most recent call last)"),
    ("source_left", "Some text", ":::{admonition}"),
    ("source_left", "Some text", "see {term}`ELBO`"),
    ("source_left", "Some text", "$$ x"),
    ("folded", ' class="admonition-title"', ""),
    ("description", "A plain sentence.", "The bound \\EE[x]"),
    ("links", "#top", "#bottom"),
    ("links", "other.html#there", "other.html#where"),
    ("links", "other.html#there", "missing.html"),
    ("links", 'src="../code.js"', 'src="../missing.js"'),
    ("links", 'src="../picture.png"', 'src="../missing.png"'),
    ("remote", 'src="../code.js"', 'src="https://cdn.example.org/code.js"'),
    ("remote", 'src="../code.js"', 'src="//cdn.example.org/code.js"'),
    ("remote", 'href="../style.css"', 'href="https://cdn.example.org/style.css"'),
    ("remote", 'rel="stylesheet" href="../style.css"', 'rel="preconnect" href="https://cdn.example.org"'),
    ("remote", 'src="../picture.png"', 'src="http://example.org/picture.png"'),
    ("remote", 'src="../picture.png"', 'src="../picture.png" srcset="../picture.png 1x, https://example.org/p.png 2x"'),
    ("remote", "<code>", '<iframe src="https://example.org"></iframe><code>'),
    ("remote", "p { color: red }", '@import "https://example.org/font.css";'),
    ("remote", "p { color: red }", "p { background: url(//example.org/a.png) }"),
    ("remote", "const space", "fetch('https://example.org/data.json'); const space"),
    ("remote", "const space", 'import("https://cdn.example.org/code.js"); const space'),
]


@pytest.fixture
def site(tmp_path):
    """A site of two pages without a fault."""
    (tmp_path / "book").mkdir()
    for name, text in [("style.css", "p {}"), ("code.js", ""), ("picture.png", ""), ("book/other.html", OTHER)]:
        (tmp_path / name).write_text(text)
    (tmp_path / "index.html").write_text('<meta http-equiv="Refresh" content="0; url=book/01-page.html" />')
    (tmp_path / "book/01-page.html").write_text(GOOD)
    return tmp_path


def test_a_good_site_passes(site, capsys):
    assert check_site.problems(site) == []
    assert check_site.main(str(site)) == 0


@pytest.mark.parametrize(("check", "old", "new"), BROKEN)
def test_a_broken_page_fails(site, check, old, new, capsys):
    assert old in GOOD
    page = GOOD.replace(old, new, 1) if new is not None else "<html><body><article></article></body></html>"
    (site / "book/01-page.html").write_text(page)
    assert any(f"page.html: {check}:" in sentence for sentence in check_site.problems(site))
    assert check_site.main(str(site)) == 1


def test_a_stylesheet_from_another_host_is_found(site):
    (site / "style.css").write_text("@import url('https://fonts.example.org/font.css');")
    assert any("style.css: remote:" in sentence for sentence in check_site.problems(site))


def test_a_site_that_was_not_built_is_found(tmp_path):
    assert check_site.problems(tmp_path)


def test_every_check_has_a_negative_control():
    assert {check.__name__ for check in check_site.CHECKS} == {check for check, _, _ in BROKEN}


@pytest.fixture(scope="module")
def quiet_pages():
    """The local Sphinx extension."""
    path = Path(__file__).parent.parent / "book/_tools/quiet_pages.py"
    spec = importlib.util.spec_from_file_location("quiet_pages", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_repeated_ids_are_taken_out_and_others_stay(quiet_pages):
    body = '<div id="thm-a"><section id="proof-content">x</section></div><section class="c" id="solution-content">'
    assert quiet_pages.unique_ids(body) == '<div id="thm-a"><section>x</section></div><section class="c">'


def test_a_folded_proof_gets_a_title_and_others_stay(quiet_pages):
    open_proof = '<div class="proof admonition">\n<p>Proof. By hand.</p></div>'
    folded = open_proof.replace("proof admonition", "proof dropdown admonition")
    assert quiet_pages.titled_proofs(open_proof) == open_proof
    assert '<p class="admonition-title">Proof</p>\n<p>By hand.</p>' in quiet_pages.titled_proofs(folded)


def test_thebe_is_taken_out_and_other_scripts_stay(quiet_pages):
    def script(filename, **attributes):
        return SimpleNamespace(filename=filename, attributes=attributes)

    ours = [script("_static/doctools.js"), script(None, body="window.MathJax = {}")]
    theirs = [script("_static/sphinx-thebe.js"), script(None, body='const THEBE_JS_URL = "https://unpkg.com/thebe"')]
    assert quiet_pages.without_thebe([*ours, *theirs]) == ours


def test_back_links_become_links(quiet_pages):
    assert quiet_pages.linked_chapters("Introduced in book/01-a-b.ipynb.") == "Introduced in :doc:`/book/01-a-b`."


def test_the_examples_of_a_command_are_shown_as_code(quiet_pages):
    lines = ["Train.", "", "\b", "Examples:", "  vaelib train runs/first"]
    assert quiet_pages.examples_as_code(lines) == ["Train.", "", "Examples::", "", "  vaelib train runs/first"]


def test_the_api_page_lists_the_public_modules(quiet_pages):
    names = quiet_pages.modules()
    assert {"vaelib.bounds", "vaelib.estimators", "vaelib.models.linear"} <= set(names)
    assert "vaelib.__main__" not in names
