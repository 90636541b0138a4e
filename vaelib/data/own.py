"""Data of one's own: an array in a .npy, .npz or .csv file, or a folder of pictures, as a data set like any other.

======================  ============================================================================================
``FILE.npy``            one array of images (see :meth:`vaelib.data.Split.of`)
``FILE.npz``            arrays ``train``, ``test`` and perhaps ``valid``, or one of images; with ``y_train`` ...
                        or ``labels`` beside them
``FILE.csv``            an observation a line, perhaps under a line of names; a column ``label`` is that
``FOLDER``              pictures of one size; in folders ``train``, ``test`` and perhaps ``valid``, or not; in
                        folders that name their labels, or not
======================  ============================================================================================

Bytes become levels in [0, 1] by division by 255; other numbers stay what they are. What comes in one piece is divided
by a fixed seed: a tenth for validation, a tenth for testing, the rest for training. What is held out later is chosen
by a seed too, since files are often sorted by label.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vaelib.data.images import Arrays, ImageSet, as_images
from vaelib.errors import InputError
from vaelib.files import read, read_text

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
PARTS = {"train": ("train", "training"), "valid": ("valid", "val", "validation"), "test": ("test", "testing")}
IMAGES, LABELS = ("images", "x", "data"), ("labels", "label", "y", "targets")
DARK = 64
"""Where no byte is as much, 255 is hardly white."""
COLUMNS = ("label", "labels")  # of a table, where y may be a coordinate
DOUBTFUL = ("class", "classes", "category", "target", "targets", "id", "index")
"""Columns of a table that are hardly a part of an observation."""

Part = tuple[np.ndarray, np.ndarray | None]


def image_set(path: Path) -> ImageSet:
    """Return the data set in a file or folder, which is read when it is loaded."""
    return ImageSet(
        str(path), f"your own, in {path}", splits="its own", read=lambda files: divided(whole(path), path),
        binarisations=("grey", "dynamic", "fixed"), licence="", citation="", by_label=True,
    )  # fmt: skip


def is_own(name: str) -> bool:
    """Whether a data set's name is that of a file or folder of one's own."""
    return Path(name).suffix.lower() in READERS or "/" in name or "\\" in name or os.path.isdir(name)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of a folder's pictures and their names."""
    found = hashlib.sha256()
    for file in pictures(path) if path.is_dir() else [path]:
        found.update(b"" if file == path else f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        found.update(read(file) or b"")
    return found.hexdigest()


def whole(path: Path) -> dict[str, Part]:
    """Return what a file or folder holds, by its parts; all that is not divided is called ``train``."""
    if path.is_dir():
        return folder(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"'{path}' is no data: --data takes a name from `vaelib data list`, a file that ends in "
            f"{', '.join(READERS)}, or a folder of pictures"
        )
    return reader(path)


def divided(parts: Mapping[str, Part], path: Path) -> Arrays:
    """Return the parts, as levels; part by a fixed seed what came in one piece."""
    if empty := [name for name, (images, _) in parts.items() if images.ndim and not len(images)]:
        raise InputError(f"'{path}' has nothing in its part {empty[0]}: put observations there, or leave it out")
    for name, (images, labels) in parts.items():
        if labels is not None and len(labels) != len(images):
            raise InputError(f"'{path}' has {len(images)} observations, but {len(labels)} labels, for its part {name}")
    if len({images.dtype == np.uint8 for images, _ in parts.values()}) > 1:
        kinds = ", ".join(f"{name}: {images.dtype}" for name, (images, _) in parts.items())
        raise InputError(
            f"the parts of '{path}' are on different scales ({kinds}), and only bytes are divided by 255: save them "
            "all as one type"
        )
    bytes_of = [images for images, _ in parts.values() if images.dtype == np.uint8 and images.size]
    most = max((int(images.max()) for images in bytes_of), default=255)
    if most <= 1:
        raise InputError(
            f"'{path}' has bytes of 0 and 1 alone, and bytes are divided by 255: save bits as such, or as numbers, "
            "x.astype(bool) or x.astype('float32')"
        )
    if most < DARK:
        warnings.warn(
            f"'{path}' has bytes of at most {most}, and bytes are divided by 255: if {most} is white, save "
            f"(x / {most}).astype('float32')"
        )
    known = classes([labels for _, labels in parts.values() if labels is not None])
    arrays = {name: (levels(images, path), known(labels)) for name, (images, labels) in parts.items()}
    shapes = {name: images.shape[1:] for name, (images, _) in arrays.items()}
    if len(set(shapes.values())) > 1:
        raise InputError(f"the parts of '{path}' have images of different shapes ({shapes}): give them all one")
    if "test" not in arrays:
        images, labels = arrays["train"]
        tenth = len(images) // 10
        if not tenth:
            raise InputError(f"'{path}' has {len(images)} observations, but 10 are needed to part them in three")
        order = np.random.RandomState(0).permutation(len(images))  # a stream that NumPy keeps for ever
        cuts = {"train": order[: -2 * tenth], "valid": order[-2 * tenth : -tenth], "test": order[-tenth:]}
        if "valid" in arrays:
            cuts = {"train": order[:-tenth], "test": order[-tenth:]}
        arrays |= {name: (images[i], None if labels is None else labels[i]) for name, i in cuts.items()}
    return arrays


def classes(labels: list[np.ndarray]) -> Callable[[np.ndarray | None], np.ndarray | None]:
    """Return what makes labels whole numbers: names of classes are numbered in their order, in all parts alike."""
    if all(part.dtype.kind in "iu" for part in labels):
        return lambda part: part
    names = np.unique(np.concatenate([part.ravel() for part in labels]))
    return lambda part: None if part is None else np.searchsorted(names, part)


def levels(images: np.ndarray, path: Path) -> np.ndarray:
    """Return images as float32."""
    if images.dtype == np.uint8:
        images = images / np.float32(255)
    elif images.dtype.kind not in "fb":
        raise InputError(
            f"'{path}' has images of {images.dtype}, expected bytes (0 to 255) or floating-point numbers: "
            "save them as one of these, such as (x / x.max()).astype('float32')"
        )
    with np.errstate(over="ignore"):  # infinity is told of later
        return np.ascontiguousarray(as_images(images), np.float32)


def loaded(path: Path) -> Any:
    """Return what NumPy finds in a file, without Python objects, which are code."""
    if (content := read(path)) is None:
        raise InputError(f"there is no file '{path}': see where you are, or give the whole path")
    try:
        found = np.load(io.BytesIO(content), allow_pickle=False)
        return found if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
    except Exception as error:  # whatever zipfile and NumPy find wrong with it
        if "allow_pickle" in str(error):
            raise InputError(
                f"'{path}' holds Python objects and not just numbers (a list of images of different shapes, say), "
                "which could be code and are not loaded: save one array of numbers"
            ) from None
        raise InputError(f"'{path}' is no file of NumPy, or is cut ({error}): write it again with np.save") from error


def arrays(path: Path) -> dict[str, Part]:
    """Read one array, or several by their names."""
    found = loaded(path)
    if isinstance(found, np.ndarray):
        return {"train": (found, None)}
    taken = set()

    def named(*names: str) -> np.ndarray | None:
        first = next((name for name in names if name in found), None)
        taken.add(first)
        return found.get(first)

    parts = {}
    for part, names in PARTS.items():
        images = named(*names, *(f"{x}_{name}" for x in IMAGES for name in names))
        if images is not None:
            both = [f"{y}_{name}" for y in LABELS for name in names] + [f"{name}_{y}" for y in LABELS for name in names]
            parts[part] = images, named(*both)
    if "train" not in parts:
        rest = [name for name in found if name not in LABELS]
        images = named(rest[0]) if len(rest) == 1 else named(*IMAGES)
        if images is None or parts:
            raise InputError(
                f"'{path}' has the arrays {', '.join(found)}, expected train and test, or one of images (and labels)"
            )
        parts["train"] = images, named(*LABELS)
    if left := found.keys() - taken:
        warnings.warn(
            f"'{path}' has {', '.join(sorted(left))} too, which is not read: parts are called train, valid and test, "
            "such as x_train and y_train",
            stacklevel=2,
        )
    return parts


def table(path: Path) -> dict[str, Part]:
    """Read lines of numbers."""
    if (text := read_text(path)) is None:
        raise InputError(f"there is no file '{path}': see where you are, or give the whole path")
    header, lines = names_of_columns(text)
    counted, numbers = [str(i) for i in range(len(header))], [name for name in header if is_number(name)]
    if numbers == counted != [] or numbers != counted[: len(numbers)]:
        warnings.warn(
            f"the first line of '{path}', {', '.join(header[:3])} ..., is taken for names of columns", stacklevel=2
        )
    if not "".join(text.splitlines()[lines:]).strip():
        raise InputError(f"'{path}' has no line of numbers")
    try:
        rows = np.loadtxt(io.StringIO(text, newline=None), delimiter=",", comments=None, skiprows=lines, ndmin=2)
    except ValueError as error:
        raise InputError(f"'{path}' is not lines of as many numbers each, parted by commas ({error})") from None
    if header and len(header) != rows.shape[1]:
        raise InputError(f"'{path}' has {len(header)} names of columns over {rows.shape[1]} columns: name each of them")
    if "" in header:
        raise InputError(
            f"column {header.index('') + 1} of '{path}' has no name, as where row numbers stand: leave them out, such "
            "as by to_csv(path, index=False), or name the column"
        )
    found = [number for number, name in enumerate(header) if name in COLUMNS]
    if len(found) > 1:
        raise InputError(f"'{path}' has {len(found)} columns of labels: keep one")
    if doubtful := [name for name in header if name in DOUBTFUL]:
        warnings.warn(
            f"column {doubtful[0]} of '{path}' is read as a part of each observation: if it is the label, call it "
            "label; if it numbers the rows, leave it out",
            stacklevel=2,
        )
    return {"train": (np.delete(rows, found, 1), rows[:, found[0]] if found else None)}


def names_of_columns(text: str) -> tuple[list[str], int]:
    """Return the names in the first line, none if it is an observation, and how many lines they take.

    ``0, 1, 2 ...`` are the names that a data frame gives.
    """
    reader = csv.reader(io.StringIO(text, newline=""))
    first = next(reader, [])
    counted = len(first) > 2 and first == [str(i) for i in range(len(first))]
    if all(map(is_number, first)) and not counted:
        return [], 0
    return [name.strip(" #").lower() for name in first], reader.line_num


def is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


READERS: dict[str, Callable[[Path], dict[str, Part]]] = {".npy": arrays, ".npz": arrays, ".csv": table}
"""The readers of files, by how the file's name ends."""


def pictures(path: Path) -> list[Path]:
    """Return the pictures in a folder and the folders inside it, in the order of their names."""
    seen, found = set(), []
    for place, folders, files in os.walk(path, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "." and os.path.realpath(Path(place, name)) not in seen]
        seen |= {os.path.realpath(Path(place, name)) for name in folders}  # a link may lead back
        found += (Path(place, name) for name in files if name[0] != ".")
    return sorted(file for file in found if file.suffix.lower() in PICTURES and file.is_file())


def folder(path: Path) -> dict[str, Part]:
    """Read pictures; folders that are called like parts are these, others name labels."""
    inside = sorted(child for child in path.iterdir() if child.is_dir())
    places = {part: [child for child in inside if child.name.lower() in names] for part, names in PARTS.items()}
    for part, found in places.items():
        if len(found) > 1 or (found and not places["train"]):
            names = " and ".join(child.name for child in found)
            raise InputError(
                f"'{path}' has {names}, "
                + (
                    f"which are one part, {part}: put them into one"
                    if len(found) > 1
                    else "but no folder train beside it: if that is a class, call its folder otherwise"
                )
            )
    parts = {part: found[0] for part, found in places.items() if found} if places["train"] else {"train": path}
    if places["train"]:
        tell_of_others(path, parts)
    files = {part: pictures(place) for part, place in parts.items()}
    for part, found in files.items():
        if not found:
            raise InputError(
                f"the folder '{parts[part]}' has no pictures: their names must end in {', '.join(sorted(PICTURES))}"
            )
    colour = any(has_colours(file) for found in files.values() for file in found)
    images = {part: np.stack(list(same_size(found, colour))) for part, found in files.items()}
    labels = {part: names_of_classes(found, parts[part]) for part, found in files.items()}
    named = len({name for names in labels.values() for name in names}) > 1
    return {part: (images[part], np.array(labels[part]) if named and labels[part] else None) for part in files}


def tell_of_others(path: Path, parts: Mapping[str, Path]) -> None:
    """Warn of what has pictures beside the parts of a folder."""
    beside = [file for file in pictures(path) if not {*file.parents} & {*parts.values()}]
    if names := list(dict.fromkeys(file.relative_to(path).parts[0] for file in beside)):
        warnings.warn(
            f"'{path}' has {', '.join(names[:3])}{' ...' * (len(names) > 3)} too, which is not read: parts are folders "
            "called train, valid and test; if train is a class, call its folder otherwise",
            stacklevel=3,
        )


def names_of_classes(files: Sequence[Path], place: Path) -> list[str]:
    """Return the folders inside a place that pictures lie in; none if they lie in the place itself."""
    inside = [file.relative_to(place).parts[0] for file in files if file.parent != place]
    if inside and len(inside) < len(files):
        beside = next(file for file in files if file.parent == place)
        raise InputError(
            f"'{beside}' lies beside folders, whose names are classes: put it into one of them, or take it out"
        )
    return inside


def opened(file: Path) -> Any:
    """Return a picture, upright and not yet read."""
    from PIL import Image, ImageOps  # a third of a second

    try:
        picture = Image.open(io.BytesIO(read(file) or b""))
        ImageOps.exif_transpose(picture, in_place=True)
        return picture
    except Exception as error:  # a damaged picture raises nearly anything
        raise InputError(f"'{file}' is no picture, or is cut: take it out of the folder ({error})") from error


def has_colours(file: Path) -> bool:
    """Whether a picture has colours, or raise InputError if its levels are not bytes."""
    picture = opened(file)
    mode, pages = picture.mode, getattr(picture, "n_frames", 1)
    if pages > 1:
        raise InputError(f"'{file}' has {pages} pages, but a picture has one: save each as a file of its own")
    if mode.startswith(("I", "F")):
        raise InputError(f"'{file}' has levels of more than 8 bits (mode {mode}): save them as an array in a .npy file")
    return mode not in ("1", "L", "LA")


def same_size(files: Iterable[Path], colour: bool) -> Iterable[np.ndarray]:
    """Yield pictures as bytes, ``[H, W]``, or ``[H, W, 3]`` for ``colour``, all of the first one's size."""
    first = None
    for file in files:
        try:
            picture = opened(file)
            clear = picture.has_transparency_data and picture.convert("RGBA").getextrema()[3][0] < 255
            image = np.asarray(picture.convert("RGB" if colour else "L"))
        except OSError as error:
            raise InputError(f"'{file}' is cut or altered: take it out of the folder ({error})") from error
        if clear:
            raise InputError(f"'{file}' is transparent in places: put it on a background, and save it without")
        first = first or (file, image.shape)
        if image.shape != first[1]:
            (height, width), (h, w) = image.shape[:2], first[1][:2]
            raise InputError(
                f"pictures must have one size, but '{first[0]}' has {w} x {h} pixels and '{file}' has {width} x "
                f"{height}: crop or scale them first"
            )
        yield image
