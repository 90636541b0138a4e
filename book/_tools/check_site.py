"""Checks of the built site, run after it is built: ``python book/_tools/check_site.py _build/html``.

Every check is a function from a page to sentences, one for each fault; tests/test_site.py breaks a page in each way.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup

REMOTE = re.compile(r"^\s*(?:https?:|wss?:)?//", re.IGNORECASE)
REMOTE_IN_CSS = re.compile(r"""(?:@import\s+|url\(\s*)(?:url\(\s*)?["']?\s*(?:https?:)?//""", re.IGNORECASE)
REMOTE_IN_SCRIPT = re.compile(r"""["'`](?:(?:https?|wss?):)?//[\w.-]+\.\w""", re.IGNORECASE)
FETCHED = {
    **{tag: ["src"] for tag in ("script", "iframe", "audio", "embed", "track", "input")},
    **{tag: ["src", "srcset"] for tag in ("img", "source")},
    **{tag: ["href", "xlink:href"] for tag in ("image", "use")},
    "video": ["src", "poster"],
    "object": ["data"],
    "link": ["href"],
}
NAMED_ONLY = {"canonical", "license", "author", "next", "prev", "index", "search"}  # link relations that fetch nothing
SOURCE_LEFT = re.compile(r":::|\{(?:term|cite|cite:[pt]|eq|ref|numref|doc|prf:\w+)\}`|\$\$")


@dataclass(frozen=True)
class Site:
    """A folder of built pages."""

    root: Path

    @cached_property
    def pages(self) -> dict[Path, BeautifulSoup]:
        return {
            path.resolve(): BeautifulSoup(path.read_text("utf-8"), "html.parser")
            for path in sorted(self.root.rglob("*.html"))
            if "_static" not in path.relative_to(self.root).parts
        }

    @cached_property
    def anchors(self) -> dict[Path, set[str]]:
        return {path: {t.get("id") or t["name"] for t in soup(anchor)} for path, soup in self.pages.items()}


def anchor(tag) -> bool:
    return tag.has_attr("id") or (tag.name == "a" and tag.has_attr("name"))


def article(soup: BeautifulSoup):
    return soup.find("article") or soup.find("main") or soup.body or soup


def empty(site: Site, path: Path, soup: BeautifulSoup) -> Iterator[str]:
    if soup.find("meta", attrs={"http-equiv": "Refresh"}):
        return
    if len(article(soup).get_text(" ", strip=True)) < 10 or not soup.find("h1"):
        yield "has no text or no heading"


def numbered(site: Site, path: Path, soup: BeautifulSoup) -> Iterator[str]:
    chapter = re.match(r"(\d\d)-", path.name)
    number = soup.select_one("h1 .section-number")
    if soup.find("meta", attrs={"http-equiv": "Refresh"}):
        return
    if chapter and (number is None or number.text.strip() != f"{int(chapter[1])}."):
        yield f"chapter {int(chapter[1])} is numbered {number.text.strip() if number else 'not at all'}"


def repeated_ids(site: Site, path: Path, soup: BeautifulSoup) -> Iterator[str]:
    for name, count in Counter(tag["id"] for tag in soup(id=True)).items():
        if count > 1:
            yield f"the id '{name}' occurs {count} times"


def images(site: Site, path: Path, soup: BeautifulSoup) -> Iterator[str]:
    for image in soup("img"):
        if not image.get("alt", "").strip() or image["alt"] == image.get("src"):
            yield f"an image is not described: {image.get('src')}"


def errors(site: Site, path: Path, soup: BeautifulSoup) -> Iterator[str]:
    if "Traceback (most recent call last)" in soup.get_text():
        yield "shows a traceback"


def source_left(site: Site, path: Path, soup: BeautifulSoup) -> Iterator[str]:
    for text in article(soup).find_all(string=SOURCE_LEFT):
        if not text.find_parent(["pre", "code", "script", "style"]):
            yield f"shows its source: {text.strip()[:60]!r}"


def folded(site: Site, path: Path, soup: BeautifulSoup) -> Iterator[str]:
    for block in soup.select(".admonition.dropdown, .admonition.toggle"):
        if not block.select_one(".admonition-title"):
            yield "a folded block without a title stops the script that folds all others"


def description(site: Site, path: Path, soup: BeautifulSoup) -> Iterator[str]:
    for meta in soup("meta", attrs={"name": "description"}) + soup("meta", attrs={"property": "og:description"}):
        if "\\" in meta.get("content", ""):
            yield f"its description holds TeX; open the page with a plain sentence or two: {meta['content'][:80]!r}"


def links(site: Site, path: Path, soup: BeautifulSoup) -> Iterator[str]:
    for tag, name in [("a", "href"), *((tag, name) for tag, names in FETCHED.items() for name in names[:1])]:
        for element in soup(tag, attrs={name: True}):
            yield from broken(site, path, element[name])


def broken(site: Site, path: Path, address: str) -> Iterator[str]:
    """Why an address found on the page at ``path`` leads nowhere, if it is one inside the site."""
    parts = urlsplit(address.strip())
    if parts.scheme or parts.netloc:
        return
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target.is_dir():
        target /= "index.html"
    if not target.exists():
        yield f"a link leads nowhere: {address}"
    elif parts.fragment and target in site.anchors and unquote(parts.fragment) not in site.anchors[target]:
        yield f"a link leads to no anchor: {address}"


def remote(site: Site, path: Path, soup: BeautifulSoup) -> Iterator[str]:
    for tag, names in FETCHED.items():
        for element in soup(tag):
            if tag == "link" and set(element.get("rel", [])) <= NAMED_ONLY:
                continue
            for name in names:
                if any(REMOTE.match(part) for part in element.get(name, "").split(",")):
                    yield f"a request to another host: <{tag} {name}={element[name]}>"
    for script in soup("script", src=False):
        if found := REMOTE_IN_SCRIPT.search(script.string or ""):
            yield f"a script names another host: {found[0]}"
    styles = [style.string or "" for style in soup("style")] + [tag["style"] for tag in soup(style=True)]
    for style in styles:
        if REMOTE_IN_CSS.search(style):
            yield f"a style from another host: {style.strip()[:60]!r}"


CHECKS = (empty, numbered, repeated_ids, images, errors, source_left, folded, description, links, remote)


def problems(root: Path) -> list[str]:
    """Every fault of the site in ``root``."""
    site = Site(root)
    if not any(path.parent.name == "book" for path in site.pages):
        return [f"{root} holds no pages of the book"]
    found = [
        f"{path.relative_to(root.resolve())}: {check.__name__}: {sentence}"
        for path, soup in site.pages.items()
        for check in CHECKS
        for sentence in check(site, path, soup)
    ]
    for sheet in sorted(root.rglob("*.css")):
        if REMOTE_IN_CSS.search(sheet.read_text("utf-8")):
            found.append(f"{sheet.relative_to(root)}: remote: a style from another host")
    return found


def main(root: str) -> int:
    found = problems(Path(root))
    print("\n".join(found) or f"{len(Site(Path(root)).pages)} pages, and no fault found.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
