"""Negative controls of check_site: a good page passes, each way to break one is found. And what quiet_pages does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import check_site
import matplotlib.pyplot as plt
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
    assert quiet_pages.linked_chapters("f(start, *, latent=8), *so*") == "f(start, \\*, latent=8), *so*"


def test_the_examples_of_a_command_are_shown_as_code(quiet_pages):
    lines = ["Train.", "", "\b", "Examples:", "  vaelib train runs/first"]
    assert quiet_pages.examples_as_code(lines) == ["Train.", "", "Examples::", "", "  vaelib train runs/first"]


def test_the_api_page_lists_the_public_modules(quiet_pages):
    names = quiet_pages.modules()
    assert {"vaelib.bounds", "vaelib.estimators", "vaelib.models.linear"} <= set(names)
    assert "vaelib.__main__" not in names


def test_a_term_is_found_in_american_spelling_too(quiet_pages):
    terms = ["reparameterisation", "Rao-Blackwellised", "amortisation gap", "noise", "ELBO"]
    spelt = quiet_pages.american(terms)
    assert spelt[:3] == ["reparameterization", "Rao-Blackwellized", "amortization gap"] and "ELBO" not in spelt


def test_a_page_waits_for_its_formulas_and_draws_its_icons_once(quiet_pages):
    icons = '<script defer src="../_static/scripts/fontawesome.js?d=1"></script>\n'
    page = f'<head>\n{icons}<script defer="defer" src="../_static/mathjax/tex-svg.js"></script></head>'
    assert "fontawesome" not in quiet_pages.lighter(page) and "waiting" in quiet_pages.lighter(page)
    assert quiet_pages.lighter(f"<head>{icons}</head>").strip() == "<head>\n</head>"


def test_pictures_come_later_and_have_their_places(quiet_pages, tmp_path):
    figure = plt.figure(figsize=(3, 2), dpi=100)
    figure.savefig(tmp_path / "a.png", dpi=100)
    plt.close(figure)
    page = (
        '<img alt="x &gt; 0" src="a.png"><img src="lost.png"><img src="https://b.org/a.png"><img width="3" src="a.png">'
    )
    found = quiet_pages.later(page, tmp_path)
    assert found.startswith('<img loading="lazy" width="300" height="200" alt="x &gt; 0" src="a.png">')
    assert found.endswith(page.partition("<img src")[2]) and found.count("lazy") == 1


MADE_UP = "https://github.com/Someone/some-book"


@pytest.mark.parametrize("repository", ["", MADE_UP])
def test_what_needs_an_address_is_there_only_with_one(quiet_pages, repository):
    theme = {"logo": {}}
    config = SimpleNamespace(repository_of_book=repository, html_theme_options=theme, html_baseurl="")
    quiet_pages._use_addresses(None, config)
    button = {"type": "javascript"}
    context = {"header_buttons": [button], "page_source_suffix": ".ipynb"}
    quiet_pages._launch(SimpleNamespace(config=config), "book/01-a", "page.html", context, None)
    if not repository:
        assert config.html_theme_options == theme and context["header_buttons"] == [button]
        return
    options = config.html_theme_options
    assert options["repository_url"] == MADE_UP and options["use_edit_page_button"] and options["use_issues_button"]
    assert config.html_baseurl == "https://someone.github.io/some-book/"
    urls = [link["url"] for link in context["header_buttons"][0]["buttons"]]
    assert urls == [
        "https://colab.research.google.com/github/Someone/some-book/blob/gh-pages/_sources/book/01-a.ipynb",
        "https://mybinder.org/v2/gh/Someone/some-book/main?urlpath=lab/tree/work/01-a.ipynb",
    ]


@pytest.mark.parametrize("repository", ["", MADE_UP])
def test_what_stands_beside_the_pages(quiet_pages, tmp_path, monkeypatch, repository):
    book = tmp_path / "book"
    book.mkdir()
    for name in ("07-flows", "reproductions"):
        (book / f"{name}.html").write_text("<head></head>")
    monkeypatch.setattr(quiet_pages.editions, "write", lambda folder, kind, book: folder.mkdir(parents=True))
    app = SimpleNamespace(
        outdir=tmp_path, srcdir=quiet_pages.settings.ROOT, builder=SimpleNamespace(format="html"),
        config=SimpleNamespace(repository_of_book=repository), env=SimpleNamespace(found_docs={"book/reproductions"}),
    )  # fmt: skip
    quiet_pages._finish(app, None)
    assert "url=07-flows.html" in (book / "06-flows.html").read_text() and not (book / "04-inference-lag.html").exists()
    lost = (tmp_path / "404.html").read_text()
    assert "No such page" in lost and 'rel="icon"' in lost  # without one a browser asks for one that is not there
    assert (tmp_path / "sitemap.xml").exists() == bool(repository)
    if repository:
        loc = "<loc>https://someone.github.io/some-book/book/reproductions.html</loc>"
        assert loc in (tmp_path / "sitemap.xml").read_text()
        assert 'href="https://someone.github.io/some-book/book/index.html"' in lost
