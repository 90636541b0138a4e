"""Data sets by name: ``data.load("digits")``.

The files are looked for in the folder that the environment variable ``VAELIB_DATA`` names, then in the
user's cache, and downloaded into it otherwise, once, with a checksum. ``digits``, which comes with scikit-learn,
and ``synthetic-text``, which is made from a seed, need none of this; nor do files and folders of one's own
(:mod:`vaelib.data.own`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vaelib.data import files, own
from vaelib.data.images import BINARISATIONS, Images, ImageSet, Split
from vaelib.data.registry import DATASETS, TEXTS
from vaelib.data.text import Sentences, Text, TextSet, Vocabulary
from vaelib.errors import InputError, choose, whole_number

__all__ = [
    "BINARISATIONS",
    "DATASETS",
    "ImageSet",
    "Images",
    "Listing",
    "Sentences",
    "Split",
    "TEXTS",
    "Text",
    "TextSet",
    "Vocabulary",
    "absolute",
    "describe",
    "fetch",
    "load",
    "made",
    "names",
    "own",
]


def names() -> list[str]:
    """Return the names that :func:`load` takes."""
    return [*DATASETS, *TEXTS]


def load(
    name: str, binarisation: str | None = None, seed: int = 0, valid: int = 0, **sizes: int | None
) -> Images | Text:
    """Load a data set, downloading it first if it is nowhere on this machine.

    Images introduced in book/01-elbo-forms.ipynb, text in book/05-inference-lag.ipynb.

    Parameters
    ----------
    name : str
        ``"digits"``, ``"mnist"``, ``"binarized-mnist"``, ``"fashion-mnist"``, ``"omniglot"`` or
        ``"omniglot-burda"``. Mind that ``"omniglot"`` is area-averaged from the original drawings and is not
        the ``chardata.mat`` of Burda et al.: log-likelihoods on it do not compare with published ones.
        ``"omniglot-burda"`` is that file. Or text: ``"synthetic-text"``, ``"ptb"``, ``"yahoo"`` or ``"yelp"``.
        Or the path of one's own data, a .npy, .npz or .csv file or a folder of pictures.
    binarisation : str, optional
        What a batch holds: ``"dynamic"``, x ~ Bernoulli(grey) drawn anew at every access, as in Burda et al.;
        ``"fixed"``, drawn once, by ``seed``; ``"grey"``, the grey levels in [0, 1]. The default is ``"grey"``
        for digits (whose running example is a Gaussian model) and one's own data, ``"fixed"``, and nothing else,
        for binarized-mnist, and ``"dynamic"`` for the rest.
    seed : int
        Of the ``"fixed"`` draws, and of synthetic text; the splits never change.
    valid : int
        Hold out the last ``valid`` training images as ``images.valid``, or of one's own data random ones. With 0,
        ``images.valid`` is None, but for binarized-mnist, texts and one's own data, which have their own.
    sizes : int, optional
        For text alone. Of synthetic text, ``sentences`` (20,000), ``vocabulary`` (1,000), ``length`` (10) and
        ``hidden`` (100), the width of the LSTM that writes them. Of the others, ``sentences``, how many of the training
        set; ``vocabulary``, how many of the most frequent words; ``longest``, the words of the longest sentence.

    Returns
    -------
    Images or Text
        ``.train``, ``.valid`` (or None), ``.test``, each a :class:`Split` or :class:`Sentences`; ``.note`` says what
        to mind.

    Raises
    ------
    InputError
        if a name is not known, if the files are cut, altered or not to be had, or if ``VAELIB_DATA`` is no
        folder.
    """
    entry = find(name)
    for what, number in (("seed", seed), ("valid", valid)):
        whole_number(what, number, least=0)
    if sizes and isinstance(entry, ImageSet):
        raise InputError(f"'{name}' has images, whose sizes are fixed: leave {', '.join(sizes)} out")
    return entry.load(binarisation, seed, valid, **sizes)


def find(name: str) -> ImageSet | TextSet:
    """Return the entry of a data set in the registry, or one for a path."""
    return own.image_set(path) if (path := path_of(name)) else built_in(name)


def built_in(name: str) -> ImageSet | TextSet:
    """Return the entry of a data set in the registry."""
    return choose("data set", name, {**DATASETS, **TEXTS})


def path_of(name: str) -> Path | None:
    """Return where data of one's own lie; None if there is a data set of that name, as a folder may be called too."""
    return Path(name) if isinstance(name, str) and name not in names() and own.is_own(name) else None


def absolute(name: str) -> str:
    """Return the name of a data set, a path of one's own from the root."""
    return str(path.absolute()) if (path := path_of(name)) else name


def made(name: str) -> Path | None:
    """Return the file of a data set that was made on this machine, and so has no checksum; None if it has none."""
    found = (files.find(parts) for parts in (find(name).files or {}).values())
    return next((path for _, file, path in filter(None, found) if not file.digest), None)


def fetch(name: str) -> Path | None:
    """Make sure that the files of a data set are on this machine and whole; return their folder (None if
    built in).

    Raises
    ------
    InputError
        as :func:`load`.
    """
    paths = [files.fetch(name, parts) for parts in (built_in(name).files or {}).values()]
    return paths[0].parent if paths else None


@dataclass(frozen=True)
class Listing:
    """A line of ``vaelib data list``: ``where`` is "built in", the folder that has it, or what is to be
    downloaded; ``use`` is what takes it."""

    name: str
    description: str
    splits: str
    licence: str
    where: str
    note: str
    use: str


def describe() -> list[Listing]:
    """Return a line for each data set; looks whether files exist, and opens none."""
    return [
        Listing(one.name, one.description, one.splits, one.licence, where(one), one.note, USES[type(one)])
        for one in map(find, names())
    ]


USES = {
    ImageSet: "images: for experiments, and for `vaelib train` with any other model",
    TextSet: "sentences: for experiments, and for `vaelib train --model lstm`",
}


def where(entry: ImageSet | TextSet) -> str:
    """Say where the files of a data set are."""
    if not entry.files:
        return "built in"
    found = {part: files.find(parts) for part, parts in entry.files.items()}
    missing = [parts for part, parts in entry.files.items() if not found[part]]
    if not missing:
        return " and ".join(dict.fromkeys(f"{place} ({path.parent})" for place, _, path in found.values()))
    if by_hand := [parts[0].path for parts in missing if not any(file.obtainable for file in parts)]:
        return f"to be put in place by hand: {', '.join(by_hand)}"
    sizes = [next(file.size for file in parts if file.obtainable) for parts in missing]
    return "to be downloaded" if None in sizes else f"to be downloaded, {sum(sizes) / 1e6:.1f} MB"
