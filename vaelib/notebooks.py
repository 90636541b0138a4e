"""The notebooks of the book that came with the package: the reader's edition."""

from __future__ import annotations

from os.path import lexists
from pathlib import Path

from vaelib.errors import InputError
from vaelib.files import read, write

HERE = Path(__file__).parent
PLACES = (HERE / "book", HERE.parent / "_build/editions/reader")
"""Where they are: inside of an installed package, or in a checkout once they were made."""


def copy(folder: Path, places: tuple[Path, ...] | None = None) -> tuple[list[Path], list[Path]]:
    """Copy the notebooks into ``folder``; a file that is there already stays as it is.

    Returns
    -------
    copied, kept
        the paths of the new files, and of those that stayed.

    Raises
    ------
    InputError
        if this package came without notebooks, and how to make them; if one could not be written, which is then not
        there.
    """
    sources = next((found for place in places or PLACES if (found := sorted(place.glob("*.ipynb")))), [])
    if not sources:
        raise InputError("this copy of vaelib came without notebooks: make them with `make editions` in the repository")
    folder.mkdir(parents=True, exist_ok=True)
    new, kept = [], []
    for source in sources:
        target = folder / source.name
        if lexists(target):
            kept.append(target)
        else:
            write(target, read(source) or b"")
            new.append(target)
    return new, kept
