"""What `_config.yml` and `_toc.yml` say, for every tool of the book; and the addresses that follow from one of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent


def config(root: Path = ROOT) -> dict[str, Any]:
    return yaml.safe_load((root / "_config.yml").read_text("utf-8"))


def repository(root: Path = ROOT) -> str:
    """The address of the repository, "" where it has none: ``repository: url`` of `_config.yml`, and nowhere else."""
    return (config(root).get("repository") or {}).get("url") or ""


def site(repository: str) -> str:
    """The address of the site that GitHub serves for a repository; "" for none."""
    if not repository:
        return ""
    owner, name = repository.rstrip("/").removesuffix(".git").split("/")[-2:]
    return f"https://{owner.lower()}.github.io/{name}"


def colab(repository: str, page: str) -> str:
    """The address that opens the reader's notebook of a page in Colab: the one that the site holds for download."""
    owner, name = repository.rstrip("/").removesuffix(".git").split("/")[-2:]
    return f"https://colab.research.google.com/github/{owner}/{name}/blob/gh-pages/_sources/book/{page}.ipynb"


def pages(root: Path = ROOT) -> list[str]:
    """The names of the book's pages, in the order of the table of contents."""
    toc = yaml.safe_load((root / "_toc.yml").read_text("utf-8"))
    files = [toc["root"], *(entry["file"] for part in toc["parts"] for entry in part["chapters"])]
    return [Path(file).name for file in files]


def prefix(page: str) -> str:
    """What stands before the point in the numbers of a page: "3" for chapter 3, the first letter for other pages."""
    chapter = re.match(r"(\d\d)-", page)
    return str(int(chapter[1])) if chapter else page[0].upper()
