"""Image data as plain tensors: :class:`Split` and :class:`Images`, and the readers of the published file
formats."""

from __future__ import annotations

import gzip
import io
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaelib.data.files import File, fetch
from vaelib.errors import InputError, choose
from vaelib.files import read

Arrays = dict[str, tuple[np.ndarray, np.ndarray | None]]  # split -> (float32 [N, H, W] in [0, 1], labels [N])


def draw(grey: Tensor, generator: torch.Generator) -> Tensor:
    """Return x ~ Bernoulli(grey), zeros and ones in the dtype of ``grey``; exact for 0 and 1, to 2**-24 between.

    Four times as fast on a CPU as ``torch.bernoulli``, which draws a double for each pixel.
    """
    return torch.rand(grey.shape, generator=generator, dtype=grey.dtype, device=grey.device).lt_(grey)


@dataclass(frozen=True)
class Split:
    """Images of one split, flattened.

    Attributes
    ----------
    grey : Tensor
        [N, D] in [0, 1], of a floating dtype (float32 in the data sets by name), D = H W or C H W, channel by channel
        and line by line from the top left; 1 is ink (white on black, as in MNIST). For binarisation ``"fixed"`` these
        are the binary images themselves, zeros and ones.
    labels : Tensor or None
        [N] int64.
    shape : tuple of int
        (H, W), or (C, H, W) for images of three channels.
    binarisation : str
        What :meth:`batch` returns: see :func:`vaelib.data.load`.

    Raises
    ------
    InputError
        for levels or shapes that are not those.
    """

    grey: Tensor
    labels: Tensor | None
    shape: tuple[int, ...]
    binarisation: str

    def __post_init__(self) -> None:
        choose("binarisation", self.binarisation, BINARISATIONS)
        if not isinstance(self.grey, Tensor) or not self.grey.is_floating_point():
            kind = self.grey.dtype if isinstance(self.grey, Tensor) else f"of type {type(self.grey).__name__}"
            raise InputError(
                f"grey levels must be a tensor of floating-point numbers in [0, 1], but are {kind}: "
                "bytes, say, become such by x.float() / 255"
            )
        if self.grey.shape[1:] != (math.prod(self.shape),):
            raise InputError(
                f"images of {' x '.join(map(str, self.shape))} pixels must be a tensor [N, {math.prod(self.shape)}], "
                f"but its shape is {list(self.grey.shape)}"
            )
        if self.labels is not None and (found := tuple(getattr(self.labels, "shape", ()))) != self.grey.shape[:1]:
            raise InputError(
                f"labels must be a tensor [{len(self.grey)}], one an image, or None, but their shape is {list(found)}"
            )
        if self.grey.numel() and not self.grey.is_meta:
            low, high = (level.item() for level in self.grey.detach().aminmax())
            any_number = self.binarisation == "grey"
            within = math.isfinite(low) and math.isfinite(high) if any_number else low >= 0 and high <= 1
            if not within:  # also if one is not a number
                real = "real numbers take a likelihood of theirs, such as likelihoods.Gaussian, and binary=False"
                limits, other = ("finite", "") if any_number else ("in [0, 1]", f"; {real}")
                raise InputError(
                    f"grey levels must be {limits}, but these are from {low:g} to {high:g}: scale them (0 to 255 by "
                    f"x / 255), and fill in what is not a number{other}"
                )

    @classmethod
    def of(cls, images: Tensor | np.ndarray | Any, labels: Any = None, binarisation: str = "grey") -> Split:
        """Return images of one's own as a split; dtype and device stay as they are.

        Parameters
        ----------
        images
            an array or tensor ``[N, D]``, ``[N, H, W]``, ``[N, C, H, W]`` or ``[N, H, W, C]`` with one or three
            channels; or a torch ``Dataset`` whose items are images, or images and labels. (Of longer items the first
            is the image, and the rest is not read.)
        labels
            whole numbers, ``[N]``.
        """
        if isinstance(images, np.ma.MaskedArray) and np.ma.is_masked(images):
            raise InputError("some of these images are masked: fill them in first, such as by x.filled(0)")
        if isinstance(images, Tensor) and images.layout != torch.strided:
            raise InputError("images must be a dense tensor, but are a sparse one: give images.to_dense()")
        if not isinstance(images, Tensor | np.ndarray):
            images, found = stacked(images)
            labels = found if labels is None else labels
        grey = torch.as_tensor(np.ascontiguousarray(images) if isinstance(images, np.ndarray) else images)
        grey = as_images(grey)
        shape = tuple(grey.shape[1:]) if grey.ndim > 2 else (1, grey.shape[1])
        labels = None if labels is None else numbered(labels).to(grey.device)
        return cls(grey.flatten(1), labels, shape, binarisation)

    def __len__(self) -> int:
        return len(self.grey)

    @property
    def black_and_white(self) -> bool:
        """Whether the images that :meth:`batch` returns are zeros and ones."""
        return self.binarisation == "dynamic" or bool(((self.grey == 0) | (self.grey == 1)).all())

    def batch(self, index: Tensor | slice, generator: torch.Generator | None = None) -> Tensor:
        """Return the images ``index``, [len(index), D] in the dtype of the data; for ``"dynamic"`` a fresh draw at
        every call.

        Parameters
        ----------
        index : Tensor of int64, or slice
            Which images.
        generator : torch.Generator, optional
            Source of the draws, on the device of the data; needed for ``"dynamic"``, not touched otherwise.
        """
        grey = self.grey[index] if isinstance(index, slice) else self.grey.index_select(0, index)
        if self.binarisation != "dynamic":
            return grey
        if generator is None:
            raise InputError("dynamic binarisation draws at every access: give batch() a torch.Generator")
        return draw(grey, generator)

    def sample(self, most: int | None, seed: int = 0) -> Split:
        """Return a random subset of at most ``most`` images, for None all, in random order: the same for a seed."""
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:most].to(self.grey.device)
        return self.part(chosen)

    def part(self, chosen: Tensor | slice) -> Split:
        """Return the chosen images of the split."""
        return replace(self, grey=self.grey[chosen], labels=None if self.labels is None else self.labels[chosen])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Split:
        """Return the same split on ``device``, its images as ``dtype``; None for what stays as it is."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, grey=self.grey.to(device, dtype), labels=labels)


def as_images(images: Any) -> Any:
    """Return ``[N, D]``, ``[N, H, W]`` or ``[N, 3, H, W]`` for an array or tensor of images, wherever its channels are.

    Raises
    ------
    InputError
        for any other shape, and where there is no pixel.
    """
    shape = tuple(images.shape)
    if len(shape) == 4 and shape[1] not in (1, 3) and shape[3] in (1, 3):
        images = images.permute(0, 3, 1, 2) if isinstance(images, Tensor) else images.transpose(0, 3, 1, 2)
    if len(shape) not in (2, 3, 4) or len(shape) == 4 and images.shape[1] not in (1, 3):
        raise InputError(
            "images must be [N, H, W] or [N, D], or with one or three channels [N, C, H, W] or [N, H, W, C], but their "
            f"shape is {list(shape)}"
        )
    if not all(shape[1:]):
        raise InputError(f"there is no pixel in these images: their shape is {list(shape)}")
    return images[:, 0] if len(shape) == 4 and images.shape[1] == 1 else images


def whole(label: Any) -> int:
    """Return a label that is a whole number, of Python, NumPy or PyTorch, or raise InputError."""
    with suppress(TypeError, ValueError, OverflowError, RuntimeError):
        if int(label) == label:
            return int(label)
    raise InputError(f"labels must be whole numbers, but one is {label!r}: number the classes")


def numbered(labels: Any) -> Tensor:
    """Return labels as int64, or raise InputError if one is no whole number."""
    if not hasattr(labels, "__iter__"):
        raise InputError(f"labels must be whole numbers, one an image, but are {labels!r}")
    if isinstance(labels, np.ma.MaskedArray) and np.ma.is_masked(labels):
        raise InputError("some of these labels are masked: leave these images out, or number them as a class")
    if isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex() or labels.is_sparse):
        return labels.long()
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iub":
        return torch.from_numpy(labels.astype(np.int64))
    return torch.as_tensor([whole(label) for label in labels])


def stacked(dataset: Any) -> tuple[Tensor, Tensor | None]:
    """Return the images of a torch ``Dataset`` and their labels, if its items are pairs."""
    if (
        not hasattr(dataset, "__getitem__")
        or not hasattr(dataset, "__len__")
        or isinstance(dataset, list | tuple | str | Mapping)
        or hasattr(dataset, "to_numpy")
        or hasattr(dataset, "toarray")
    ):
        raise InputError(
            "images must be an array, a tensor, or a torch Dataset with a length, but are a "
            f"{type(dataset).__name__}: a list becomes an array by np.stack, a data frame by .to_numpy(), a sparse "
            "matrix by .toarray(), and a DataLoader has its .dataset"
        )
    items = [dataset[i] for i in range(len(dataset))]
    if not items:
        raise InputError(f"there is nothing in this {type(dataset).__name__}")
    pairs = [item if isinstance(item, tuple | list) else (item,) for item in items]
    images = [pair[0] for pair in pairs]
    if wrong := [type(image).__name__ for image in images if not isinstance(image, Tensor | np.ndarray)]:
        raise InputError(
            f"the items of a Dataset must be tensors or arrays, but one is a {wrong[0]}: give the Dataset "
            "a transform, such as torchvision's ToTensor()"
        )
    if len(shapes := {tuple(image.shape) for image in images}) > 1:
        raise InputError(f"the images of a Dataset must have one shape, but some are {sorted(shapes)[:3]}")
    labels = numbered([pair[1] for pair in pairs]) if all(len(pair) == 2 for pair in pairs) else None
    return torch.stack([torch.as_tensor(image) for image in images]), labels


@dataclass(frozen=True)
class Images:
    """A data set of images: ``train``, ``test``, and ``valid`` where there is one (else None).

    ``by_label`` says that the training images may be sorted by label.
    """

    name: str
    note: str
    train: Split
    valid: Split | None
    test: Split
    by_label: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W) of an image, or (C, H, W)."""
        return self.train.shape

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Images:
        """Return the same data on ``device``, as ``dtype``; None for what stays as it is."""
        return self.map(lambda split: split.to(device, dtype))

    def map(self, function: Callable[[Split], Split]) -> Images:
        """Return the same data with ``function`` applied to each split."""
        splits = {name: getattr(self, name) for name in ("train", "valid", "test")}
        return replace(self, **{name: split and function(split) for name, split in splits.items()})

    def hold_out(self, valid: int) -> Images:
        """Part the last ``valid`` images of the training set from the rest, or some by a seed if it may be sorted.

        Raises
        ------
        InputError
            if there are validation images already, or not so many.
        """
        train = self.train
        if self.valid is not None:
            raise InputError(f"{self.name} has validation images of its own: leave valid at 0")
        if not 0 < valid < len(train):
            raise InputError(f"valid is {valid:,}, expected 0, or less than {self.name}'s {len(train):,} for train")

        rest, last = slice(None, -valid), slice(-valid, None)
        if self.by_label:
            order = torch.from_numpy(np.random.RandomState(0).permutation(len(train)))  # NumPy keeps it for ever
            rest, last = (order[where].to(train.grey.device) for where in (rest, last))
        return replace(self, train=train.part(rest), valid=train.part(last))


BINARISATIONS = {
    "dynamic": "Bernoulli(grey), drawn anew at every access",
    "fixed": "Bernoulli(grey), drawn once and for all",
    "grey": "grey levels in [0, 1], not binarised",
}


@dataclass(frozen=True)
class ImageSet:
    """An entry of the registry: all that is known of one set of images.

    Attributes
    ----------
    name, description, splits, licence, citation : str
        For people.
    read : callable
        Turns the paths of the parts into arrays, split by split.
    binarisations : tuple of str
        The possible ones, the default first.
    files : mapping
        Part -> interchangeable files that hold it, the preferred one first. Empty for what is built in.
    note : str
        What must be said wherever numbers on this set are shown.
    by_label : bool
        Whether the training images may be sorted by label.
    """

    name: str
    description: str
    splits: str
    read: Callable[[Mapping[str, Path]], Arrays]
    binarisations: tuple[str, ...]
    licence: str
    citation: str
    files: Mapping[str, tuple[File, ...]] | None = None
    note: str = ""
    by_label: bool = False

    def load(self, binarisation: str | None = None, seed: int = 0, valid: int = 0) -> Images:
        """Read the files and return the splits; see :func:`vaelib.data.load`."""
        binarisation = self.binarisations[0] if binarisation is None else binarisation
        choose("binarisation", binarisation, BINARISATIONS)
        if binarisation not in self.binarisations:
            raise InputError(
                f"{self.name} cannot be had as '{binarisation}', since its images are zeros and ones "
                f"already: leave the binarisation out, or choose '{self.binarisations[0]}'"
            )
        arrays = self.read({part: fetch(self.name, files) for part, files in (self.files or {}).items()})
        generator = torch.Generator().manual_seed(seed)
        once = binarisation == "fixed" and len(self.binarisations) > 1
        splits: dict[str, Split] = {}
        for split, (pixels, labels) in arrays.items():
            grey = torch.from_numpy(pixels.reshape(len(pixels), -1))
            part = Split(
                grey,
                None if labels is None else torch.from_numpy(labels.astype(np.int64)),
                pixels.shape[1:] if pixels.ndim > 2 else (1, pixels.shape[1]),
                binarisation,
            )
            splits[split] = replace(part, grey=draw(grey, generator)) if once else part
        images = Images(self.name, self.note, splits["train"], splits.get("valid"), splits["test"], self.by_label)
        return images.hold_out(valid) if valid else images


# ------------------------------------------------------------------------------------- the file formats


def read_digits(paths: Mapping[str, Path]) -> Arrays:
    """Scikit-learn's 1,797 digits, 8 x 8, levels 0 to 16, shuffled by a fixed seed: 1,497 train, 300 test."""
    from sklearn.datasets import load_digits  # two seconds

    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))  # a stream that NumPy keeps for ever
    grey, labels = (digits.images[order] / 16).astype(np.float32), digits.target[order]
    return {"train": (grey[:1497], labels[:1497]), "test": (grey[1497:], labels[1497:])}


def idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of bytes: 0, 0, 8, number of axes, their lengths (big-endian int32), values."""
    try:
        content = gzip.decompress(read(path) or b"")
        zeros, kind, axes = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{axes}I", content, 4)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise InputError(f"'{path}' is no gzipped idx file ({error}): delete it and fetch it again") from error
    if (zeros, kind) != (0, 8) or len(content) != 4 + 4 * axes + math.prod(shape):
        raise InputError(
            f"'{path}' is not an idx file of bytes: it begins with {list(content[:4])} and has "
            f"{len(content):,} bytes for axes {shape}, expected 0, 0, 8 and as many bytes as the axes say; "
            "delete it and fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def read_idx(paths: Mapping[str, Path]) -> Arrays:
    """MNIST and the sets in its layout: images [N, H, W] and labels [N] as bytes, for train and test."""

    def split(name: str) -> tuple[np.ndarray, np.ndarray]:
        images, labels = idx(paths[f"{name} images"]), idx(paths[f"{name} labels"])
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise InputError(
                f"'{paths[f'{name} images']}' has shape {images.shape} and its labels {labels.shape}, "
                "expected [N, H, W] and [N]; delete both and fetch them again"
            )
        return images / np.float32(255), labels

    return {"train": split("train"), "test": split("test")}


BETWEEN_PIXELS = np.frombuffer(b" " * 783 + b"\n", np.uint8)


def read_amat(paths: Mapping[str, Path]) -> Arrays:
    """Larochelle's binarized MNIST: an image a line, 784 digits parted by single spaces, so 1,568 bytes."""

    def split(path: Path) -> tuple[np.ndarray, None]:
        content = read(path) or b""
        try:
            text = np.frombuffer(gzip.decompress(content) if path.suffix == ".gz" else content, np.uint8)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"'{path}' is no gzipped file ({error}): delete it and fetch it again") from error
        pixels = text[::2].astype(np.float32) - ord("0")
        well_formed = len(text) and len(text) % 1568 == 0 and (text[1::2].reshape(-1, 784) == BETWEEN_PIXELS).all()
        if not well_formed or not np.isin(pixels, (0, 1)).all():
            raise InputError(f"'{path}' is not lines of 784 zeros and ones: delete it and fetch it again")
        return pixels.reshape(-1, 28, 28), None

    return {name: split(path) for name, path in paths.items()}


def read_omniglot(paths: Mapping[str, Path]) -> Arrays:
    """Omniglot as :func:`shrink_omniglot` makes it: drawings 1 to 15 of each character train, 16 to 20 test.

    They run through the characters (sorted by background before evaluation set, alphabet, number), then
    through the drawings, so the last 1,623 training images are the 15th drawing of every character. The label
    is the character.
    """
    path = paths["drawings"]
    try:
        with np.load(io.BytesIO(read(path) or b""), allow_pickle=False) as fields:
            images = fields["images"]
            if images.dtype != np.uint8 or images.shape[1:] != (20, 28, 28):
                raise ValueError(f"images are {images.dtype} {list(images.shape)}, expected uint8 [N, 20, 28, 28]")
            order = np.lexsort((fields["character"], fields["alphabet"], ~fields["background"]))
            drawings = images[order].swapaxes(0, 1) / np.float32(255)  # [20, characters, 28, 28]
    except Exception as error:  # a damaged archive raises nearly anything, a TokenError among the rest
        raise InputError(f"'{path}' is cut or altered ({error}): delete it and fetch it again") from error

    def split(drawings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return drawings.reshape(-1, *drawings.shape[2:]), np.tile(np.arange(drawings.shape[1]), len(drawings))

    return {"train": split(drawings[:15]), "test": split(drawings[15:])}


def shrink(ink: np.ndarray, side: int = 28) -> np.ndarray:
    """Return the share of ink in each cell of a ``side`` x ``side`` grid, as round(255 share).

    With A[i, j] the length of pixel j that lies in cell i, the area of ink in a cell is (A ink A')[i, j]: an
    exact average, also where a cell's border cuts a pixel. Lengths are counted in the unit 1/side of a pixel,
    so all sums are whole numbers that float32 holds.

    Parameters
    ----------
    ink : ndarray
        [..., n, n] of 0 and 1, n <= 4096.
    """
    n = ink.shape[-1]
    pixel, cell = side * np.arange(n), n * np.arange(side)[:, None]
    lengths = np.minimum(pixel + side, cell + n) - np.maximum(pixel, cell)
    a = lengths.clip(0).astype(np.float32)
    area = (a @ ink.astype(np.float32) @ a.T).astype(np.int64)  # of n * n
    return ((2 * 255 * area + n * n) // (2 * n * n)).astype(np.uint8)


def shrink_omniglot(sources: Sequence[Path], target: Path) -> None:
    """Write Lake's drawings (zips of 105 x 105 PNGs, black on white) as 28 x 28 images, area-averaged.

    This is not the reduction in Burda et al.'s ``chardata.mat``, whose method is not stated; log-likelihoods
    on the two do not compare.
    """
    from matplotlib.image import imread  # most of a second

    images, labels = [], []
    for source in sources:
        with zipfile.ZipFile(source) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".png"))
            for folder, group in groupby(names, key=lambda name: name.split("/")[:-1]):
                drawings = [archive.open(name) for name in group]
                images.append(shrink(np.stack([imread(drawing, format="png") < 0.5 for drawing in drawings])))
                labels.append(folder)
    top, alphabet, character = zip(*labels, strict=True)
    background = np.array(top) == "images_background"
    with open(target, "wb") as file:
        np.savez_compressed(
            file, images=np.stack(images), background=background, alphabet=alphabet, character=character
        )


def read_chardata(paths: Mapping[str, Path]) -> Arrays:
    """Burda et al.'s Omniglot: each column of ``data`` and ``testdata`` is an image, stored column by column.

    The training images are put in the order of the paper's code (``RandomState(123)``), so that
    ``valid=1345`` holds out the images that it held out.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    path = paths["images"]
    try:
        fields = loadmat(io.BytesIO(read(path) or b""), variable_names=("data", "testdata"))
        train, test = (
            np.ascontiguousarray(fields[key].T.reshape(-1, 28, 28).swapaxes(1, 2), np.float32)
            for key in ("data", "testdata")
        )
    except (MatReadError, OSError, KeyError, ValueError, TypeError, NotImplementedError) as error:
        raise InputError(f"'{path}' is not a chardata.mat ({error}): delete it and fetch it again") from error
    return {"train": (train[np.random.RandomState(123).permutation(len(train))], None), "test": (test, None)}
