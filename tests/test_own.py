"""Data, models and estimators of one's own by name: they are used as they are, and what is wrong with them is said."""

from __future__ import annotations

import json
import random
import re
import sys
import textwrap
import warnings
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from vaelib import cli, data, estimators, gradients, models, runs, training
from vaelib.config import Config, Recipe
from vaelib.data import Split
from vaelib.errors import InputError
from vaelib.estimators import TABLEAU

RANDOM = np.random.default_rng(0)
BYTES = RANDOM.integers(0, 256, (20, 4, 6), np.uint8)
LEVELS = torch.from_numpy(BYTES / np.float32(255)).flatten(1)


def all_of(images) -> torch.Tensor:
    """All images, in no order."""
    grey = torch.cat([split.grey for split in (images.train, images.valid, images.test) if split])
    return grey[grey[:, 0].argsort()]


def test_an_array_is_divided_in_three_the_same_way_each_time(tmp_path):
    np.save(tmp_path / "a.npy", BYTES)
    images, again = (data.load(str(tmp_path / "a.npy")) for _ in range(2))
    assert [len(split) for split in (images.train, images.valid, images.test)] == [16, 2, 2]
    assert images.shape == (4, 6) and images.train.binarisation == "grey" and images.train.grey.dtype == torch.float32
    assert torch.equal(images.test.grey, again.test.grey)
    assert torch.equal(all_of(images), LEVELS[LEVELS[:, 0].argsort()])
    binary = data.load(str(tmp_path / "a.npy"), "fixed", seed=1)
    assert set(binary.train.grey.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("names", [("train", "test"), ("x_train", "x_test"), ("images_train", "images_test")])
def test_parts_and_labels_are_taken_by_their_names(tmp_path, names):
    arrays = {names[0]: BYTES[:12], "y_train": np.arange(12), names[1]: BYTES[12:], "test_labels": np.arange(8)}
    np.savez(tmp_path / "a.npz", **arrays)
    images = data.load(str(tmp_path / "a.npz"))
    assert torch.equal(images.train.grey, LEVELS[:12]) and torch.equal(images.test.grey, LEVELS[12:])
    assert images.train.labels.tolist() == list(range(12)) and images.test.labels.tolist() == list(range(8))
    assert images.valid is None and len(images.hold_out(2).valid) == 2
    np.savez(tmp_path / "b.npz", images=BYTES, labels=np.arange(20))
    images = data.load(str(tmp_path / "b.npz"))
    assert torch.equal(images.train.grey, LEVELS[images.train.labels])


def test_an_observation_with_a_slip_of_the_pen_is_not_lost_without_a_word(tmp_path):
    (tmp_path / "a.csv").write_text("0.5,O.5,1\n" + "0,1,0.5\n" * 20)
    with pytest.warns(UserWarning, match="the first line of .*a.csv', 0.5, o.5, 1 ..., is taken for names of columns"):
        data.load(str(tmp_path / "a.csv"))
    (tmp_path / "b.csv").write_text("label,0,1\n" + "2,1,0.5\n" * 20)  # as a data frame names its columns
    with warnings.catch_warnings(action="error"):
        data.load(str(tmp_path / "b.csv"))


@pytest.mark.parametrize("count", [19, 21])
def test_labels_must_be_as_many_as_observations(tmp_path, count):
    np.savez(tmp_path / "a.npz", images=BYTES, labels=np.arange(count))
    with pytest.raises(InputError, match=f"a.npz' has 20 observations, but {count} labels, for its part train"):
        data.load(str(tmp_path / "a.npz"))


def test_what_is_held_out_of_a_sorted_part_is_of_all_labels(tmp_path):
    images, labels = RANDOM.random((500, 4)), np.repeat(np.arange(5), 100)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images[:9], y_test=labels[:9])
    found = data.load(str(tmp_path / "a.npz"))
    held = found.hold_out(50)
    assert held.valid.labels.unique().tolist() == list(range(5)) == held.train.labels.unique().tolist()
    assert torch.equal(found.test.grey, torch.tensor(images[:9], dtype=torch.float32))
    whole = torch.cat([held.train.grey, held.valid.grey])
    assert torch.equal(whole[whole[:, 0].argsort()], torch.tensor(images[images[:, 0].argsort()], dtype=torch.float32))
    place = {tuple(image): label for image, label in zip(images.astype(np.float32).tolist(), labels.tolist())}
    assert [place[tuple(image)] for image in held.train.grey.tolist()] == held.train.labels.tolist()


def test_parts_go_by_their_names_however_they_are_written(tmp_path):
    for place in ("Train/a", "Train/b", "TESTING/a"):
        for i in range(4):
            save(tmp_path / place / f"{i}.png", BYTES[i])
    found = data.load(str(tmp_path))
    assert len(found.train) == 8 and len(found.test) == 4
    save(tmp_path / "test/a/0.png", BYTES[0])
    with pytest.raises(InputError, match="has TESTING and test, which are one part, test: put them into one"):
        data.load(str(tmp_path))
    (tmp_path / "Train").rename(tmp_path / "c")
    (tmp_path / "TESTING").rename(tmp_path / "d")
    with pytest.raises(InputError, match="has test, but no folder train beside it"):
        data.load(str(tmp_path))


def test_bytes_that_are_bits_are_not_divided_by_255(tmp_path):
    np.save(tmp_path / "a.npy", BYTES % 2)
    with pytest.raises(InputError, match="a.npy' has bytes of 0 and 1 alone, .*: save bits as such"):
        data.load(str(tmp_path / "a.npy"))
    np.savez(tmp_path / "b.npz", train=BYTES, test=BYTES % 2)
    assert data.load(str(tmp_path / "b.npz")).test.grey.max() == np.float32(1 / 255)
    np.save(tmp_path / "d.npy", BYTES % 17)
    with pytest.warns(
        UserWarning, match="d.npy' has bytes of at most 16, and bytes are divided by 255: if 16 is white"
    ):
        data.load(str(tmp_path / "d.npy"))
    np.save(tmp_path / "c.npy", (BYTES % 2).astype(bool))
    assert data.load(str(tmp_path / "c.npy")).train.grey.max() == 1


def test_an_array_that_is_not_read_is_told(tmp_path):
    """As of a test part whose name is written otherwise, in whose place a part of the training data would come."""
    np.savez(tmp_path / "a.npz", x_train=BYTES[:12], X_test=BYTES[12:])
    with pytest.warns(UserWarning, match="a.npz' has X_test too, which is not read: parts are called train, valid and"):
        data.load(str(tmp_path / "a.npz"))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["Linux", "Windows", "old Mac"])
@pytest.mark.parametrize("header", ["", "Label,a,b\n", "\ufefflabel,a,b\n"])
def test_a_table_has_an_observation_a_line(tmp_path, header, end):
    rows = RANDOM.normal(size=(20, 3)).round(3)
    rows[:, 0] = np.arange(20)
    text = header + "\n".join(",".join(map(str, row)) for row in rows)
    (tmp_path / "a.csv").write_text(text, "utf-8", newline=end)
    images = data.load(str(tmp_path / "a.csv"))
    found = images.train.grey.numpy()
    if header:
        assert images.shape == (1, 2) and np.allclose(found, rows[images.train.labels, 1:])
    else:
        assert images.shape == (1, 3) and np.allclose(found, rows[found[:, 0].round().astype(int)])


@pytest.mark.parametrize(
    "header", ["0,1,2", '"a, b",Label ,c', "# label,a,b", "x,y,label"], ids=["counted", "quoted", "savetxt", "y"]
)
def test_the_names_of_columns_are_read_as_programs_write_them(tmp_path, header):
    """What a data frame, a spreadsheet, np.savetxt give; y is a coordinate."""
    rows = RANDOM.normal(size=(20, 3)).round(3)
    label = (
        [name.strip(" #").lower() for name in header.replace(", b", "").split(",")].index("label")
        if ("abel" in header)
        else None
    )
    if label is not None:
        rows[:, label] = np.arange(20)
    (tmp_path / "a.csv").write_text(header + "\n" + "\n".join(",".join(map(str, row)) for row in rows))
    said = pytest.warns(UserWarning, match="is taken for names of columns") if header == "0,1,2" else nullcontext()
    with said:
        images = data.load(str(tmp_path / "a.csv"))
    assert sum(len(split) for split in (images.train, images.valid, images.test)) == 20
    assert images.shape == (1, 3 if label is None else 2)
    if label is not None:
        assert np.allclose(images.train.grey, np.delete(rows, label, 1)[images.train.labels])


@pytest.mark.parametrize("name", ["Class", "target", "id"])
def test_a_column_that_is_hardly_a_pixel_is_told(tmp_path, name):
    (tmp_path / "a.csv").write_text(f"a,b,{name}\n" + "0.5,0.1,3\n" * 20)
    with pytest.warns(UserWarning, match=f"column {name.lower()} of .* is read as a part of each observation"):
        assert data.load(str(tmp_path / "a.csv")).train.grey.shape[1:] == (3,)


def test_names_of_classes_have_one_number_in_all_parts(tmp_path):
    names = np.array(["b", "c"] * 5)
    np.savez(tmp_path / "a.npz", train=BYTES[:3], y_train=["c", "a", "b"], test=BYTES[:10], y_test=names)
    images = data.load(str(tmp_path / "a.npz"))
    assert images.train.labels.tolist() == [2, 0, 1] and images.test.labels.tolist() == [1, 2] * 5


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def test_a_folder_of_pictures_with_labels_and_parts(tmp_path):
    for i, image in enumerate(BYTES):
        save(tmp_path / "plain" / f"{i:02}.png", image)
        save(tmp_path / "classes" / "ab"[i % 2] / f"{i:02}.png", image)
        save(tmp_path / "parts" / ("train" if i < 15 else "test") / "ab"[i % 2] / f"{i:02}.png", image)
    images = data.load(str(tmp_path / "plain"))
    assert images.shape == (4, 6) and torch.equal(all_of(images), LEVELS[LEVELS[:, 0].argsort()])
    assert images.train.labels is None
    images = data.load(str(tmp_path / "classes"))
    for x, label in zip(images.train.grey, images.train.labels, strict=True):
        assert (LEVELS == x).all(1).nonzero().item() % 2 == label
    images = data.load(str(tmp_path / "parts"))
    assert (len(images.train), images.valid, len(images.test)) == (15, None, 5)
    assert images.test.labels.tolist() == [0, 0, 1, 1, 1]  # 16, 18; 15, 17, 19


def test_a_class_that_is_called_like_a_part_is_told(tmp_path):
    for name in ("bus", "car", "train"):
        for i in range(10):
            save(tmp_path / name / f"{i}.png", BYTES[i])
    save(tmp_path / "beside.png", BYTES[0])
    with pytest.warns(UserWarning, match="has beside.png, bus, car too, which is not read: .* if train is a class"):
        assert len(all_of(data.load(str(tmp_path)))) == 10


def test_a_part_without_classes_has_no_labels(tmp_path):
    for i in range(10):
        save(tmp_path / "train" / "ab"[i % 2] / f"{i}.png", BYTES[i])
        save(tmp_path / "test" / f"{i}.png", BYTES[i])
    images = data.load(str(tmp_path))
    assert images.train.labels.unique().tolist() == [0, 1] and images.test.labels is None
    save(tmp_path / "train" / "stray.png", BYTES[0])
    with pytest.raises(InputError, match="'.*stray.png' lies beside folders, whose names are classes: put it into one"):
        data.load(str(tmp_path))


@pytest.mark.parametrize("binarisation", ["fixed", "dynamic"])
@pytest.mark.parametrize("wrong", [255.0, np.nan])
def test_levels_that_are_none_are_refused_before_they_are_drawn(binarisation, wrong, tmp_path):
    np.save(tmp_path / "a.npy", np.full((20, 4), wrong, "float32"))
    with pytest.raises(InputError, match=r"grey levels must be in \[0, 1\]"):
        data.load(str(tmp_path / "a.npy"), binarisation)


def test_data_of_ones_own_is_not_fetched(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((20, 4), "float32"))
    with pytest.raises(InputError, match="no data set is called '.*a.npy'"):
        data.fetch(str(tmp_path / "a.npy"))


def test_folders_behind_links_are_read_once(tmp_path):
    for name in ("cat", "elsewhere/dog"):
        for i in range(10):
            save(tmp_path / f"pics/{name}" / f"{i}.png" if name == "cat" else tmp_path / name / f"{i}.png", BYTES[i])
    (tmp_path / "pics/dog").symlink_to(tmp_path / "elsewhere/dog")
    (tmp_path / "pics/cat/round").symlink_to(tmp_path / "pics")
    save(tmp_path / "pics/.ipynb_checkpoints/0-checkpoint.png", BYTES[0])
    images = data.load(str(tmp_path / "pics"))
    assert sum(map(len, (images.train, images.valid, images.test))) == 20
    assert images.train.labels.unique().tolist() == [0, 1]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_picture_that_is_transparent_is_named(mode, tmp_path):
    """White everywhere, its shape in the alpha channel, it would be a white square."""
    for i in range(10):
        save(tmp_path / f"{i}.png", BYTES[i])
    white = Image.fromarray(np.full_like(BYTES[0], 255))
    white.putalpha(255)
    white.convert(mode if mode != "P" else "RGBA").save(tmp_path / "a.png")
    assert len(data.load(str(tmp_path)).train)
    white.putalpha(Image.fromarray(BYTES[0]))
    options = {}
    if mode == "P":
        white, options = Image.fromarray(BYTES[0] * 0), {"transparency": 0}
    (white if mode == "P" else white.convert(mode)).save(tmp_path / "a.png", **options)
    with pytest.raises(InputError, match="a.png' is transparent in places"):
        data.load(str(tmp_path))


def test_a_photograph_is_taken_upright(tmp_path):
    image = Image.fromarray(BYTES[0])
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    for i in range(10):
        image.save(tmp_path / f"{i}.png", exif=exif)
    found = data.load(str(tmp_path)).train.grey[0]
    np.testing.assert_allclose(found, np.rot90(BYTES[0], -1).flatten() / 255, atol=1e-6)


def test_a_picture_of_several_pages_is_named(tmp_path):
    first, *others = (Image.fromarray(image) for image in BYTES[:3])
    for i in range(10):
        first.save(tmp_path / f"{i}.png")
    first.save(tmp_path / "a.tiff", save_all=True, append_images=others)
    with pytest.raises(InputError, match="a.tiff' has 3 pages, but a picture has one: save each as a file of its own"):
        data.load(str(tmp_path))


def test_a_run_does_not_lie_in_its_own_pictures(tmp_path):
    """Its own pictures, such as those of advice, would be data the next time."""
    for i, image in enumerate(BYTES):
        save(tmp_path / f"{i:02}.png", image)
    config = Config(data=str(tmp_path), epochs=1, batch_size=4, sizes={"latent": 2}, device="cpu")
    with pytest.raises(InputError, match="run's folder '.*inside' lies inside its data '.*a place outside"):
        runs.train(tmp_path / "inside", config)
    assert not (tmp_path / "inside/config.json").exists()


def test_colours_come_channel_by_channel_from_wherever_they_are(tmp_path):
    colours = RANDOM.integers(0, 256, (10, 4, 6, 3), np.uint8)
    for i, image in enumerate(colours):
        save(tmp_path / "folder" / f"{i:02}.png", image)
    np.save(tmp_path / "last.npy", colours), np.save(tmp_path / "first.npy", colours.transpose(0, 3, 1, 2))
    found = [data.load(str(tmp_path / name)) for name in ("folder", "last.npy", "first.npy")]
    for images in found:
        assert images.shape == (3, 4, 6)
        assert torch.equal(images.train.grey, found[0].train.grey)
    image = (found[0].train.grey[0].unflatten(0, (3, 4, 6)) * 255).round().byte().permute(1, 2, 0).numpy()
    assert any((image == one).all() for one in colours)


class Pairs(Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, i):
        return LEVELS[i].view(1, 4, 6), i % 3


def test_a_dataset_of_torch_becomes_a_split():
    split = Split.of(Pairs())
    assert split.shape == (4, 6) and torch.equal(split.grey, LEVELS[:5]) and split.labels.tolist() == [0, 1, 2, 0, 1]
    assert torch.equal(Split.of(TensorDataset(LEVELS)).grey, LEVELS)
    colours = torch.rand(5, 3, 4, 6)
    assert Split.of(colours).shape == Split.of(colours.permute(0, 2, 3, 1)).shape == (3, 4, 6)
    assert torch.equal(Split.of(colours).grey, Split.of(colours.permute(0, 2, 3, 1)).grey)


class Strings(Pairs):
    def __getitem__(self, i):
        return "cat"


class Ragged(Pairs):
    def __getitem__(self, i):
        return torch.zeros(i + 1, 2)


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (Strings(), "must be tensors or arrays, but one is a str: give the Dataset a transform"),
        (Ragged(), "must have one shape, but some are"),
        ([1.0, 2.0], "or a torch Dataset with a length, but are a list"),
        (torch.utils.data.DataLoader(TensorDataset(LEVELS)), "a DataLoader has its .dataset"),
        (torch.zeros(5, 2, 4, 4), "with one or three channels"),
        (LEVELS.double() * torch.nan, "must be finite"),
    ],
)
def test_what_is_no_split_is_told(images, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        Split.of(images)


def objects(path):
    np.save(path, np.array([np.zeros(2), np.zeros(3)], object), allow_pickle=True)


def numbers(array):
    return lambda path: np.save(path, array)


WRONG = {
    "no file": ("a.npy", lambda path: None, "there is no file"),
    "no table": ("a.csv", lambda path: None, "there is no file"),
    "another kind of file": ("a/b.txt", lambda path: None, "ends in .npy, .npz, .csv, or a folder of pictures"),
    "objects": ("a.npy", objects, "holds Python objects and not just numbers"),
    "pickled archive": (
        "a.npz",
        lambda path: np.savez(path, x=np.array([{}], object)),
        "holds Python objects and not just numbers",
    ),
    "cut": ("a.npy", lambda path: path.write_bytes(b"\x93NUMPY"), "no file of NumPy, or is cut"),
    "cut archive": ("a.npz", lambda path: path.write_bytes(b"PK\x03\x04rest"), "no file of NumPy, or is cut"),
    "not a number": ("a.npy", numbers(np.full((20, 4), np.nan)), "must be finite, but these are from nan to nan"),
    "whole numbers": ("a.npy", numbers(np.zeros((20, 4), np.int64)), "images of int64, expected bytes"),
    "complex": ("a.npy", numbers(np.zeros((20, 4), complex)), "images of complex128, expected bytes"),
    "one number each": ("a.npy", numbers(np.zeros(20)), "their shape is [20]"),
    "five channels": ("a.npy", numbers(np.zeros((20, 5, 4, 4))), "their shape is [20, 5, 4, 4]"),
    "few": ("a.npy", numbers(np.zeros((5, 4))), "has 5 observations, but 10 are needed"),
    "other names": ("a.npz", lambda path: np.savez(path, a=BYTES, b=BYTES), "has the arrays a, b, expected train"),
    "a test part alone": ("a.npz", lambda path: np.savez(path, test=BYTES), "has the arrays test, expected train"),
    "two shapes": (
        "a.npz",
        lambda path: np.savez(path, train=BYTES, test=BYTES[:, :2]),
        "images of different shapes ({'train': (4, 6), 'test': (2, 6)})",
    ),
    "bytes beside numbers": (
        "a.npz",
        lambda path: np.savez(path, train=BYTES, test=BYTES.astype("float32")),
        "different scales (train: uint8, test: float32), and only bytes are divided by 255: save them all as one type",
    ),
    "ragged lines": ("a.csv", lambda path: path.write_text("1,2\n3\n"), "not lines of as many numbers each"),
    "words": ("a.csv", lambda path: path.write_text("a,b\n1,two\n"), "not lines of as many numbers each"),
    "too few names": ("a.csv", lambda path: path.write_text("label,a\n1,2,3\n"), "2 names of columns over 3"),
    "row numbers": ("a.csv", lambda path: path.write_text(",a,b\n0,2,3\n"), "has no name, as where row numbers stand"),
    "two labels": ("a.csv", lambda path: path.write_text("label,a,label\n0,2,3\n"), "2 columns of labels"),
    "a line put out": ("a.csv", lambda path: path.write_text("1,2\n#3,4\n"), "not lines of as many numbers each"),
    "an empty part": (
        "a.npz",
        lambda path: np.savez(path, train=BYTES, test=BYTES, valid=BYTES[:0]),
        "has nothing in its part valid",
    ),
    "an empty table": ("a.csv", lambda path: path.write_text("a,b\n"), "has no line of numbers"),
    "labels alone": ("a.csv", lambda path: path.write_text("label\n" + "1\n" * 20), "there is no pixel"),
    "no pixels": (
        "a.npy",
        lambda path: np.save(path, np.zeros((20, 0))),
        "there is no pixel in these images: their shape is [20, 0]",
    ),
    "no text": ("a.csv", lambda path: path.write_bytes(b"\xff\xfe"), "is not text in UTF-8"),
    "an empty folder": ("a", lambda path: path.mkdir(), "has no pictures: their names must end in .bmp"),
    "ragged pictures": (
        "a",
        lambda path: [save(path / f"{i}.png", BYTES[0, :, :i]) for i in range(1, 3)],
        "has 1 x 4 pixels and '{path}/2.png' has 2 x 4: crop or scale",
    ),
    "no picture": ("a", lambda path: path.mkdir() or (path / "a.png").write_bytes(b"PNG"), "no picture, or is cut"),
    "deep pictures": (
        "a",
        lambda path: save(path / "a.png", np.zeros((4, 4), np.uint16)),
        "levels of more than 8 bits (mode I;16)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_data_is_one_sentence(tmp_path, case):
    name, make, sentence = WRONG[case]
    path = tmp_path / name
    make(path)
    with pytest.raises(InputError, match=re.escape(sentence.replace("{path}", str(path)))) as error:
        data.load(str(path))
    assert "\n" not in str(error.value)


def test_a_cut_picture_is_named(tmp_path):
    save(tmp_path / "a.png", BYTES[0])
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(InputError, match=r"b.png' is (cut or altered|no picture)"):
        data.load(str(tmp_path))


def test_a_name_of_the_registry_is_that_whatever_lies_about(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert data.load("digits").shape == (8, 8)
    with pytest.raises(InputError, match="no pictures"):
        data.load("./digits")
    with pytest.raises(InputError, match="no data set is called 'digts', did you mean 'digits'"):
        data.load("digts")


# --- models -----------------------------------------------------------------------------------------------------------

MODEL = """
    import torch
    from torch import nn
    from torch.distributions import Normal

    from vaelib.estimators.tableau import Weights, row, uniform
    from vaelib.models import VAE


    @row("own-half", bound="elbo", target="elbo", reference="me")
    def half(log_w):
        u = uniform(log_w)
        return Weights(u, u, -0.5 * u)


    class Encoder(nn.Module):
        def __init__(self, pixels, latent):
            super().__init__()
            self.head = nn.Linear(pixels, 2 * latent)

        def forward(self, x):
            mean, log_std = self.head(x).chunk(2, -1)
            return Normal(mean, log_std.exp())


    class Joint(nn.Module):
        def __init__(self, pixels, latent):
            super().__init__()
            self.mean = nn.Linear(latent, pixels)

        def forward(self, x, z):
            return Normal(0.0, 1.0).log_prob(z).sum(-1) + Normal(self.mean(z), 0.3).log_prob(x).sum(-1)


    def build(start, *, latent=3):
        torch.manual_seed(0)
        return VAE(Joint(start.pixels, latent), Encoder(start.pixels, latent), binary=False)


    def nothing(start):
        return None


    def half_a_model(start):
        return nn.Linear(1, 1)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "vae.py"
    path.write_text(textwrap.dedent(MODEL))
    return path


@pytest.fixture(autouse=True)
def tableau_as_it_was():
    yield
    TABLEAU.pop("own-half", None)


@pytest.fixture
def run(file, tmp_path):
    config = Config(
        model=f"{file}:build", estimator="own-half", epochs=1, batch_size=100, sizes={"latent": 2}, device="cpu"
    )
    return tmp_path / "run", config, runs.train(tmp_path / "run", config)


def test_a_model_and_an_estimator_of_a_file_are_trained_and_found_again(run, file):
    folder, config, result = run
    assert estimators.get("own-half").rule(torch.zeros(2, 1)).score.tolist() == [[-0.25], [-0.25]]
    loaded = runs.load(folder)
    assert loaded.model.encoder.head.out_features == 4 and loaded.config.estimator == "own-half"
    assert runs.evaluate(folder, 20, limit=10)["nll"] > 0
    assert (folder / "model.py").read_bytes() == file.read_bytes()
    assert set(json.loads((folder / "sources.json").read_text())) == {"model"}
    more = runs.train(folder, replace(config, epochs=2))
    assert more["training"]["epoch"] == 2 > result["training"]["epoch"]


def test_a_file_may_have_any_name(file, tmp_path):
    """And is not taken for another one that is called alike."""
    paths = [tmp_path / name for name in ("vae", "vae.v1", "vae.v2")]
    for size, path in enumerate(paths, 3):
        path.write_text(file.read_text().replace("latent=3", f"latent={size}"))
    built = [models.build(f"{path}:build", 6) for path in (file, *paths)]
    assert [model.encoder.head.out_features for model in built] == [6, 6, 8, 10]
    config = Config(model=f"{paths[2]}:build", epochs=1, batch_size=100, sizes={"latent": 2}, device="cpu")
    assert runs.train(tmp_path / "run", config)["training"]["epoch"] == 1


def test_a_model_is_found_from_elsewhere(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs.train("run", Config(model="vae.py:build", epochs=1, batch_size=500, device="cpu"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert runs.load("../run").config.model == f"{file}:build"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # as in a shell
def test_the_model_of_the_book_s_page_goes_from_pictures_to_advice(tmp_path, monkeypatch, capsys):
    page = json.loads((Path(__file__).parent.parent / "book/your-own-model.ipynb").read_text("utf-8"))
    found = {}
    (cell,) = [source for cell in page["cells"] if (source := "".join(cell["source"])).startswith("MINE = ")]
    exec(cell, found)
    (tmp_path / "mine.py").write_text(found["MINE"])
    for i in range(150):
        save(tmp_path / "pictures" / f"{i:03}.png", RANDOM.integers(0, 256, (4, 6), np.uint8))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vaelib.gradients.advise", partial(gradients.advise, seconds=1))
    train = "train run --data pictures --model mine.py:build --estimator dreg --k 5 --epochs 1"
    for command in (train, "show run", "advise run"):
        with pytest.raises(SystemExit) as end:
            cli.main([*command.split(), "--device", "cpu"])
        assert not end.value.code, command
    assert "Originals and reconstructions" in (tmp_path / "run/report.html").read_text("utf-8")
    assert json.loads((tmp_path / "run/advice.json").read_text())["recommendation"]
    said = capsys.readouterr()
    assert "also in run/advice.json and run/advice.png" in said.out and said.err == ""


def test_a_file_that_changed_is_another_model(run, file):
    """Also where the checkpoint would fit: who knows what else it means now; the folder has the file as it was."""
    folder, config, _ = run
    before, kept = file.read_text(), (folder / "checkpoint.pt").read_bytes()
    for after in (before.replace("0.3", "0.4"), before.replace("self.head", "self.tail")):
        assert after != before
        file.write_text(after)
        for use in (
            lambda: runs.load(folder),
            lambda: runs.evaluate(folder),
            lambda: runs.train(folder, replace(config, epochs=9)),
        ):
            with pytest.raises(
                InputError, match=r"vae.py' has changed since this run began \(it was '.*model.py'\): put"
            ):
                use()
    assert (folder / "checkpoint.pt").read_bytes() == kept
    file.write_text((folder / "model.py").read_text())
    assert runs.load(folder).history


def test_a_file_may_be_mended_as_long_as_nothing_was_trained(file, tmp_path):
    before, config = file.read_text(), Config(model=f"{file}:build", epochs=1, batch_size=100, device="cpu")
    file.write_text(before.replace("0.3", "0.3 / self.none"))
    with pytest.raises(AttributeError):
        runs.train(tmp_path / "run", config)
    file.write_text(before)
    assert runs.train(tmp_path / "run", config)["training"]["epoch"] == 1
    assert (tmp_path / "run" / "model.py").read_text() == before and runs.load(tmp_path / "run").history


@pytest.mark.parametrize("name", ["beside", "vaelib_parts"])
def test_what_the_file_imports_from_beside_it_counts_as_the_model(file, tmp_path, monkeypatch, name):
    """As a program of the kind would find it: a new process has not read it before."""
    (tmp_path / f"{name}.py").write_text("NOISE = 0.3")
    file.write_text(
        file.read_text()
        .replace("0.3", "NOISE")
        .replace("import torch\n", f"import torch\nfrom {name} import NOISE\n", 1)
    )
    config = Config(model=f"{file}:build", epochs=1, batch_size=100, device="cpu")
    runs.train(tmp_path / "run", config)
    assert f"{name}.py" in json.loads((tmp_path / "run" / "sources.json").read_text())
    (tmp_path / f"{name}.py").write_text("NOISE = 0.4")
    with pytest.raises(InputError, match=f"{name}.py' has changed since this run began: put it back"):
        runs.load(tmp_path / "run")
    monkeypatch.delitem(sys.modules, name)


LATE = """
    def late(start):
        from parts_for_late import NOISE
        import parts_for_late
        assert parts_for_late.Part is PART
        model = build(start)
        model.joint.noise = NOISE
        return model


    class Late(Encoder):
        def forward(self, x):
            from later_parts_for_late import SCALE
            return super().forward(SCALE * x)


    def later(start):
        return VAE(Joint(start.pixels, 2), Late(start.pixels, 2), binary=False)
"""


@pytest.mark.parametrize(("function", "helper"), [("late", "parts_for_late"), ("later", "later_parts_for_late")])
def test_so_does_what_it_imports_when_it_builds_or_is_called(file, tmp_path, monkeypatch, function, helper):
    """From wherever one is; and a module that it has imported before is that one."""
    (tmp_path / "parts_for_late.py").write_text("class Part:\n    pass\n\nNOISE = 0.3")
    (tmp_path / "later_parts_for_late.py").write_text("SCALE = 0.3")
    file.write_text("from parts_for_late import Part as PART\n" + file.read_text() + textwrap.dedent(LATE))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = Config(model=f"{file}:{function}", epochs=1, batch_size=500, device="cpu")
    runs.train(tmp_path / "run", config)
    assert f"{helper}.py" in json.loads((tmp_path / "run/sources.json").read_text())
    (tmp_path / f"{helper}.py").open("a").write("\n# another")
    with pytest.raises(InputError, match=f"{helper}.py' has changed since this run began"):
        runs.train(tmp_path / "run", replace(config, epochs=2))
    for name in ("parts_for_late", "later_parts_for_late"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_each_model_has_the_module_that_lies_beside_it_as_it_is_now(file, tmp_path, monkeypatch):
    """In one process: two projects with files of one name, one of them edited; what is not imported is no part."""
    found, key = {}, "parts_of_two_projects"
    for folder, noise in (("a", "0.3"), ("b", "0.25"), ("a", "0.125")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{key}.py").write_text(f"NOISE = {noise}")
        path = tmp_path / folder / "vae.py"
        path.write_text(f"from {key} import NOISE\n" + file.read_text())
        (tmp_path / folder / "not_imported.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path / folder)
        monkeypatch.delitem(sys.modules, "not_imported", raising=False)
        __import__("not_imported")
        found[noise] = models.own.builder(f"{path}:build").__globals__["NOISE"]
        assert models.own.code(f"{path}:build")[f"{key}.py"].content == f"NOISE = {noise}".encode()
        assert models.own.code(f"{path}:build").keys() == {"model", f"{key}.py"}
    assert found == {"0.3": 0.3, "0.25": 0.25, "0.125": 0.125}
    for name in (key, "not_imported"):
        monkeypatch.delitem(sys.modules, name)


def test_what_is_recorded_is_what_was_run_though_the_file_was_saved_meanwhile(file, tmp_path):
    text = file.read_text() + "\nfrom pathlib import Path\nPath(__file__).write_text('other = 1')\n"
    file.write_text(text)
    runs.train(tmp_path / "run", Config(model=f"{file}:build", epochs=1, batch_size=100, device="cpu"))
    assert (tmp_path / "run/model.py").read_text() == text
    with pytest.raises(InputError, match="vae.py'"):
        runs.load(tmp_path / "run")


def test_a_file_that_goes_to_its_own_folder_leaves_the_run_where_it_is(file, tmp_path, monkeypatch):
    file.write_text("import os\nos.chdir(os.path.dirname(__file__))\n" + file.read_text())
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    runs.train("run", Config(model=f"{file}:build", epochs=1, batch_size=100, device="cpu"))
    assert (here / "run/result.json").exists()


def test_data_that_changed_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", BYTES)
    config = Config(
        data=str(tmp_path / "a.npy"), epochs=1, batch_size=4, sizes={"latent": 2}, device="cpu", validate=True
    )
    result = runs.train(tmp_path / "run", config)
    assert np.isfinite(result["training"]["held_out"])
    np.save(tmp_path / "a.npy", BYTES[::-1])
    for use in (lambda: runs.load(tmp_path / "run"), lambda: runs.train(tmp_path / "run", config)):
        with pytest.raises(InputError, match="a.npy' has changed since this run began: put it back"):
            use()


def test_a_checkpoint_of_other_data_or_another_model_of_ones_own_is_refused(file, tmp_path):
    """Of the same shapes, so that it would fit; the folder itself says what it began with."""
    np.save(tmp_path / "a.npy", BYTES)
    np.save(tmp_path / "b.npy", BYTES[::-1])
    other = file.with_name("other.py")
    other.write_text(file.read_text().replace("0.3", "0.4"))
    assert other.read_text() != file.read_text()
    common = Config(data=str(tmp_path / "a.npy"), model=f"{file}:build", epochs=1, batch_size=4, device="cpu")
    runs.train(tmp_path / "a", common)
    before = (tmp_path / "a" / "checkpoint.pt").read_bytes()
    for name, change in (("data", str(tmp_path / "b.npy")), ("model", f"{other}:build")):
        runs.train(tmp_path / name, replace(common, **{name: change}))
        (tmp_path / "a" / "checkpoint.pt").write_bytes((tmp_path / name / "checkpoint.pt").read_bytes())
        (tmp_path / "a" / "result.json").unlink(missing_ok=True)
        for use in (lambda: runs.train(tmp_path / "a", common), lambda: runs.evaluate(tmp_path / "a", samples=2)):
            with pytest.raises(InputError, match=rf"of another run \(its {name} is '.*SHA-256 \w+', not"):
                use()
    (tmp_path / "a" / "checkpoint.pt").write_bytes(before)
    assert runs.load(tmp_path / "a").history


def test_data_that_moved_are_the_same_and_without_sources_changed_ones_are_noticed(tmp_path):
    np.save(tmp_path / "a.npy", BYTES)
    config = Config(data=str(tmp_path / "a.npy"), epochs=1, batch_size=4, sizes={"latent": 2}, device="cpu")
    runs.train(tmp_path / "run", config)
    np.save(tmp_path / "moved.npy", BYTES)
    (tmp_path / "run" / "sources.json").unlink()
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**stored, "data": str(tmp_path / "moved.npy")}))
    runs.train(tmp_path / "run", replace(config, data=str(tmp_path / "moved.npy"), epochs=2))
    (tmp_path / "run" / "sources.json").unlink()
    np.save(tmp_path / "moved.npy", BYTES[::-1])
    for use in (
        lambda: runs.load(tmp_path / "run"),
        lambda: runs.train(tmp_path / "run", replace(config, data=str(tmp_path / "moved.npy"), epochs=3)),
    ):
        with pytest.raises(InputError, match=r"of another run \(its data is 'SHA-256 \w+', not 'SHA-256"):
            use()


def test_a_project_that_moved_goes_on_once_it_is_told_where_its_files_are(file, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    file.rename(old / "vae.py")
    np.save(old / "a.npy", BYTES)
    config = Config(data=f"{old}/a.npy", model=f"{old}/vae.py:build", epochs=1, batch_size=4, device="cpu")
    runs.train(old / "run", config)
    old.rename(new)
    for use in (lambda: runs.train(new / "run", config), lambda: runs.evaluate(new / "run")):
        with pytest.raises(
            InputError, match="no '.*old/a.npy', .* `vaelib train .*/run --data PLACE --model FILE.py:F"
        ):
            use()
    moved = replace(config, data=f"{new}/a.npy", model=f"{new}/vae.py:build", epochs=2)
    np.save(new / "b.npy", BYTES[::-1])
    with pytest.raises(InputError, match="data is '.*old/a.npy' there and '.*new/b.npy' here"):
        runs.train(new / "run", replace(moved, data=f"{new}/b.npy"))
    (new / "other.py").write_text((new / "vae.py").read_text().replace("0.3", "0.4"))
    with pytest.raises(InputError, match="model is '.*old/vae.py:build' there and '.*new/other.py:build' here"):
        runs.train(new / "run", replace(moved, model=f"{new}/other.py:build"))
    assert runs.train(new / "run", moved)["training"]["epoch"] == 2
    assert runs.load(new / "run").config.data == f"{new}/a.npy"


def test_code_that_comes_with_a_run_is_not_run(run, file, tmp_path, monkeypatch):
    folder, config, _ = run
    monkeypatch.chdir(tmp_path)
    (folder / "evil.py").write_text("raise SystemExit('it was run')")
    stored = json.loads((folder / "config.json").read_text())
    for place in (f"{folder}/evil.py:build", "run/evil.py:build", "run.evil:build"):
        (folder / "config.json").write_text(json.dumps({**stored, "model": place}))
        with pytest.raises(InputError, match="code that comes with a run is not run"):
            runs.load(folder)


def test_a_module_has_models_too(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mypackage").mkdir()
    file.rename(tmp_path / "mypackage" / "vae.py")
    model = models.build("mypackage.vae:build", 5, latent=4)
    assert model.encoder.head.in_features == 5 and model.encoder.head.out_features == 8
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nothing.py:build", "there is no file 'nothing.py' with a model"),
        ("vae.py:biuld", "no function of 'vae.py' is called 'biuld', did you mean 'build'"),
        ("vae.py:nothing", "must return a module with an encoder and a joint, .* but returned a NoneType"),
        ("vae.py:half_a_model", "must return a module with an encoder and a joint, .* but its encoder is a NoneType"),
        ("nowhere.models:build", "there is no module 'nowhere.models' for the model"),
        ("os:system", "'os' is a module of Python's own, which builds no model"),
        ("vaelib.models:build", "'vaelib.models:build' must be called with one argument, start"),
        ("torch:zeros", "'torch:zeros' must be called with one argument, start"),
        ("..models:build", "'..models' is no name of a module, in the model '..models:build': give FILE.py:FUNCTION"),
        (
            "flow.py:build",
            r"imports 'nozuko', which is not installed here: install it, such as by `pip install nozuko`",
        ),
    ],
)
def test_what_is_no_model_is_one_sentence(file, tmp_path, monkeypatch, name, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flow.py").write_text("import nozuko\n")
    with pytest.raises(InputError, match=sentence):
        models.build(name, 5)


def test_a_flow_where_zuko_is_missing_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "flow.py").write_text("import zuko\n")
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(
        InputError, match=r"imports 'zuko', which is not installed here: .*`pip install 'vaelib\[zuko\]'`"
    ):
        models.build(f"{tmp_path}/flow.py:build", 5)


KEEPS = """
    import datetime

    class Keeper(Encoder):
        kept = 1

        def get_extra_state(self):
            return self.kept

        def set_extra_state(self, kept):
            self.kept = kept


    def fine(start):
        encoder = Keeper(start.pixels, 2)
        encoder.kept = {"a": [1, 2.5, "b", None, (torch.ones(2), True)]}
        return VAE(Joint(start.pixels, 2), encoder, binary=False)


    def at_once(start):
        model = fine(start)
        model.encoder.kept = datetime.date(2026, 1, 1)
        return model


    def later(start):
        model = fine(start)
        joint = model.joint.forward

        def forward(x, z):
            if model.training and torch.is_grad_enabled():
                model.encoder.kept = lambda: 1
            return joint(x, z)

        model.joint.forward = forward
        return model
"""


def test_what_could_not_be_read_again_is_told_before_it_is_written(file, tmp_path):
    """Before the first step if it is there by then, and always before it takes the place of what can be read."""
    file.write_text(textwrap.dedent(MODEL) + textwrap.dedent(KEEPS))
    config = Config(epochs=1, batch_size=100, device="cpu")
    runs.train(tmp_path / "fine", replace(config, model=f"{file}:fine"))
    assert runs.load(tmp_path / "fine").model.encoder.kept["a"][:4] == [1, 2.5, "b", None]
    for name, kind, most in (("at_once", "date", 0), ("later", "function", 15)):
        done = []
        with pytest.raises(InputError, match=f"'encoder._extra_state' of the model's state_dict is a {kind} that"):
            runs.train(tmp_path / name, replace(config, model=f"{file}:{name}"), report=done.append)
        assert len(done) <= most and not (tmp_path / name / "checkpoint.pt").exists()


KINDS = """
    class Knows(Encoder):
        def __init__(self, pixels, kind):
            super().__init__(pixels, 2)
            whole = torch.eye(pixels)
            self.register_buffer("known", {
                "sparse": lambda: whole.to_sparse(),
                "uncoalesced": lambda: torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 1.0], whole.shape),
                "rows": lambda: whole.to_sparse_csr(),
                "conjugate": lambda: whole.to(torch.cfloat).conj(),
                "quantised": lambda: torch.quantize_per_tensor(whole, 0.1, 0, torch.qint8),
                "empty": lambda: whole[:0],
                "nested": lambda: torch.nested.nested_tensor([whole[0], whole[1, 1:]]),
            }[kind]())


    for kind in ("sparse", "uncoalesced", "rows", "conjugate", "quantised", "empty", "nested"):
        vars()[kind] = lambda start, kind=kind: VAE(Joint(start.pixels, 2), Knows(start.pixels, kind), binary=False)
"""


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, of what it calls beta or deprecated
@pytest.mark.parametrize("kind", ["sparse", "uncoalesced", "rows", "conjugate", "quantised", "empty"])
def test_a_tensor_of_any_kind_that_can_be_kept_goes_on_and_is_told_from_others(file, tmp_path, kind):
    file.write_text(textwrap.dedent(MODEL) + textwrap.dedent(KINDS))
    config = Config(model=f"{file}:{kind}", epochs=1, batch_size=500, device="cpu")
    runs.train(tmp_path / "run", config)
    model, found = runs.load(tmp_path / "run").model, runs.evaluate(tmp_path / "run", 2, limit=2)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["training"]["weights"] == found["weights"]
    known = model.state_dict()["encoder.known"]
    if known.numel() and not known.is_quantized:
        model.encoder.known = known * 3
        assert runs.weights(model) != found["weights"]


def test_a_tensor_that_cannot_be_kept_is_told_before_the_first_step(file, tmp_path):
    file.write_text(textwrap.dedent(MODEL) + textwrap.dedent(KINDS))
    config = Config(model=f"{file}:nested", epochs=1, batch_size=500, device="cpu")
    with pytest.raises(InputError, match=r"'encoder.known' of the model's state_dict is a tensor \(nested\) that no"):
        runs.train(tmp_path / "run", config, report=lambda fraction: 1 / 0)


def test_the_weights_of_a_dense_model_are_called_as_ever():
    """Stored results have this name of them."""
    model = torch.nn.Linear(2, 1)
    model.load_state_dict({"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])})
    assert runs.weights(model) == runs.short(np.array([1, 2, 3], np.float32).tobytes())


GROWS = """
    class Grows(Encoder):
        def __init__(self, pixels):
            super().__init__(pixels, 2)
            self.register_buffer("bank", torch.zeros(0, pixels))

        def forward(self, x):
            if self.training:
                self.bank = torch.cat([self.bank, x[:1]])
            return super().forward(x)


    class Reads(Grows):
        def _load_from_state_dict(self, state, prefix, *others):
            self.bank = state[f"{prefix}bank"].clone()
            super()._load_from_state_dict(state, prefix, *others)


    class Appears(Encoder):
        def forward(self, x):
            if self.training:
                self.register_buffer("seen", x[0])
            return super().forward(x)


    def grows(start):
        return VAE(Joint(start.pixels, 2), Grows(start.pixels), binary=False)


    def reads(start):
        return VAE(Joint(start.pixels, 2), Reads(start.pixels), binary=False)


    def appears(start):
        return VAE(Joint(start.pixels, 2), Appears(start.pixels, 2), binary=False)
"""


def test_a_state_that_the_model_as_it_is_built_could_not_take_is_told_when_it_would_be_saved(file, tmp_path):
    file.write_text(textwrap.dedent(MODEL) + textwrap.dedent(GROWS))
    config = Config(epochs=1, batch_size=500, device="cpu")
    for name, sentence in (
        ("grows", r"cannot load its state_dict of before \(size mismatch for encoder.bank: "),
        ("appears", r'cannot load its state_dict of before \(Missing key.* "encoder.seen"'),
    ):
        with pytest.raises(InputError, match=sentence):
            runs.train(tmp_path / name, replace(config, model=f"{file}:{name}"))
        assert not (tmp_path / name / "checkpoint.pt").exists()
    config = replace(config, model=f"{file}:reads")
    runs.train(tmp_path / "reads", config)
    runs.train(tmp_path / "reads", replace(config, epochs=2))
    assert runs.load(tmp_path / "reads").model.encoder.bank.shape == (4, 64)


FORGETS = """
    import random
    from functools import partial

    import numpy as np

    class Forgetful(Encoder):
        steps = 0

        def forward(self, x):
            self.steps += self.training
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x * self.factor())


    class Counts(Forgetful):
        def factor(self):
            return 1.0 if self.steps < 8 else 0.5


    class CountsSteps(Forgetful):
        def factor(self):
            return min(1.0, (1 + self.steps) / 50)


    class Trains(Forgetful):
        def factor(self):
            return 1 + 0.1 * self.draw() if self.training else 1


    class LearnsWithNumPy(Trains):
        def draw(self):
            return np.random.rand()


    class LearnsWithRandom(Trains):
        def draw(self):
            return random.random()


    class LearnsWithItsOwn(Trains):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.generator = torch.Generator().manual_seed(0)

        def draw(self):
            return torch.rand((), generator=self.generator)


    class LearnsWithTorch(Trains):
        def __init__(self, pixels, latent):
            super().__init__(pixels, latent)
            self.layers = nn.Sequential(nn.BatchNorm1d(pixels), nn.Dropout(0.2))
            self.register_buffer("count", torch.zeros(()))
            self.kept = 0

        def draw(self):
            self.count += 1
            self.kept += 1
            return torch.rand(()) + self.count / 100 + self.kept / 100

        def forward(self, x):
            return super().forward(self.layers(x))

        def get_extra_state(self):
            return self.kept

        def set_extra_state(self, kept):
            self.kept = kept


    class ChangesX(Forgetful):
        def forward(self, x):
            return super().forward(x.mul_(0.5))

        def factor(self):
            return 1


    class CountsCalls(Forgetful):
        def factor(self):
            return 1.0 + self.calls


    class DrawsByNumPy(Forgetful):
        def factor(self):
            return np.random.rand()


    class Draws(Forgetful):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.scale = np.random.rand() + random.random()

        def factor(self):
            return self.scale


    def model(kind, start):
        return VAE(Joint(start.pixels, 2), kind(start.pixels, 2), binary=False)


    counts = partial(model, Counts)
    counts_calls = partial(model, CountsCalls)
    draws_by_numpy = partial(model, DrawsByNumPy)
    draws = partial(model, Draws)
    counts_steps = partial(model, CountsSteps)
    learns_with_numpy = partial(model, LearnsWithNumPy)
    learns_with_random = partial(model, LearnsWithRandom)
    learns_with_its_own = partial(model, LearnsWithItsOwn)
    learns_with_torch = partial(model, LearnsWithTorch)
    changes_x = partial(model, ChangesX)
"""


@pytest.fixture
def forgetful(file):
    file.write_text(textwrap.dedent(MODEL) + textwrap.dedent(FORGETS))
    return Config(epochs=1, batch_size=100, device="cpu"), str(file)


@pytest.mark.parametrize("name", ["counts_calls", "draws_by_numpy"])
def test_a_loss_that_is_another_each_time_is_told_before_the_first_step(forgetful, tmp_path, name):
    config, file = forgetful
    with pytest.raises(InputError, match="another loss for the same batch than when it was saved, at step 0: it keeps"):
        runs.train(tmp_path / "run", replace(config, model=f"{file}:{name}"), report=lambda fraction: 1 / 0)


@pytest.mark.parametrize("name", ["counts_steps", *(f"learns_with_{what}" for what in ("numpy", "random", "its_own"))])
def test_so_is_one_that_is_another_in_training_mode_alone(forgetful, tmp_path, name):
    config, file = forgetful
    with pytest.raises(
        InputError, match="in training mode the model gives another loss for the same batch .*: it keeps"
    ):
        runs.train(tmp_path / "run", replace(config, model=f"{file}:{name}"), report=lambda fraction: 1 / 0)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_an_encoder_that_changes_the_data_is_told_before_the_first_step(forgetful, tmp_path):
    config, file = forgetful
    with pytest.raises(InputError, match="the encoder changes x in place, and with it the data: leave x as it is"):
        runs.train(tmp_path / "run", replace(config, model=f"{file}:changes_x"), report=lambda fraction: 1 / 0)


def test_what_draws_by_torch_and_keeps_what_is_read_again_goes_on_bit_for_bit(forgetful, tmp_path):
    config, file = forgetful
    config = replace(config, model=f"{file}:learns_with_torch")
    runs.train(tmp_path / "run", config)
    runs.train(tmp_path / "run", replace(config, epochs=2))
    runs.train(tmp_path / "whole", replace(config, epochs=2))
    ends = [runs.load(tmp_path / name).model.state_dict() for name in ("run", "whole")]
    assert all(a == b if type(a) is int else torch.equal(a, b) for a, b in zip(*(end.values() for end in ends)))


MOVES = """
    class Moves(Encoder):
        def __init__(self, pixels):
            super().__init__(pixels, 2)
            self.register_buffer("centre", torch.zeros(pixels))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.centre.lerp_(x.mean(0), 0.01)
            self.calls = self.calls + 1
            return super().forward((x - self.centre) * (1 + self.calls / 1000))


    class Heads(Encoder):
        def __init__(self, pixels, names):
            super().__init__(pixels, 2)
            self.heads = nn.ModuleDict({name: nn.Linear(pixels, 4) for name in names})
            for head in self.heads.values():
                nn.init.zeros_(head.weight)

        def forward(self, x):
            head = self.head(x) + self.heads["a"](x) + 2 * self.heads["b"](x)
            mean, log_std = head.chunk(2, -1)
            return Normal(mean, log_std.exp())


    class Lazy(Encoder):
        def __init__(self):
            nn.Module.__init__(self)
            self.head = nn.LazyLinear(4)


    class Turns(Encoder):
        def __init__(self, pixels):
            super().__init__(pixels, 2)
            self.register_buffer("beta", torch.tensor(0))
            self.register_buffer("calls", torch.tensor(0))

        def forward(self, x):
            if self.training:
                self.calls = self.calls + 1
                if self.calls > self.late:
                    self.beta = torch.clamp(self.beta + 0.01, max=1.0)
            return super().forward(x)


    def turns(start, late=0):
        model = VAE(Joint(start.pixels, 2), Turns(start.pixels), binary=False)
        model.encoder.late = late
        return model


    def turns_late(start):
        return turns(start, 10)


    ORDER = ["a", "b"]


    def moves(start):
        return VAE(Joint(start.pixels, 2), Moves(start.pixels), binary=False)


    def heads(start):
        return VAE(Joint(start.pixels, 2), Heads(start.pixels, ORDER), binary=False)


    def lazy(start):
        return VAE(Joint(start.pixels, 2), Lazy(), binary=False)
"""


@pytest.fixture
def moving(file):
    file.write_text(textwrap.dedent(MODEL).replace("    torch.manual_seed(0)\n", "") + textwrap.dedent(MOVES))
    return Config(epochs=2, batch_size=200, device="cpu", lr=0.01), str(file)


def end_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def test_how_often_a_run_is_saved_changes_nothing_though_every_call_moves_a_buffer(moving, tmp_path):
    config, file = moving
    config = replace(config, model=f"{file}:moves")
    runs.train(tmp_path / "whole", config)
    runs.train(tmp_path / "often", replace(config, checkpoint_seconds=1e-9))
    runs.train(tmp_path / "twice", replace(config, epochs=1))
    runs.train(tmp_path / "twice", config)
    ends = [end_of(tmp_path / name) for name in ("whole", "often", "twice")]
    assert ends[0]["encoder.calls"] > 0
    assert all(torch.equal(value, end[name]) for end in ends[1:] for name, value in ends[0].items())


def test_moments_go_with_the_names_of_their_parameters(moving, tmp_path, monkeypatch):
    """As of a model that makes its parts from a set, whose order is another in each process."""
    config, file = moving
    config = replace(config, model=f"{file}:heads")
    runs.train(tmp_path / "whole", config)
    runs.train(tmp_path / "run", replace(config, epochs=1))
    monkeypatch.setitem(models.own.builder(f"{file}:heads").__globals__, "ORDER", ["b", "a"])
    with pytest.warns(UserWarning, match="not bit for bit .*: the model's parameters come in another order now"):
        runs.train(tmp_path / "run", config)
    whole, run = end_of(tmp_path / "whole"), end_of(tmp_path / "run")
    assert list(whole) != list(run) and all(torch.equal(value, run[name]) for name, value in whole.items())


def test_a_buffer_of_another_dtype_is_told_before_the_first_step_or_when_it_would_be_saved(moving, tmp_path):
    config, file = moving
    with pytest.raises(InputError, match=r"of before \(encoder.beta is torch.float32 then, and was torch.int"):
        runs.train(tmp_path / "run", replace(config, model=f"{file}:turns"), report=lambda fraction: 1 / 0)
    with pytest.raises(InputError, match=r"'encoder.beta' .* is \[\] of torch.float32, but was \[\] of torch.int64"):
        runs.train(tmp_path / "late", replace(config, model=f"{file}:turns_late", epochs=9))


def test_layers_that_are_made_at_their_first_call_follow_from_the_seed(moving, tmp_path):
    config, file = moving
    config = replace(config, model=f"{file}:lazy", epochs=1, lr=1e-9)
    for seed in (0, 1):
        runs.train(tmp_path / str(seed), replace(config, seed=seed))
    runs.train(tmp_path / "again", config)
    weights = [end_of(tmp_path / name)["encoder.head.weight"] for name in ("0", "1", "again")]
    assert torch.equal(weights[0], weights[2]) and (weights[0] - weights[1]).abs().max() > 0.01
    images = data.load("digits", "grey")
    model = models.build(config.model, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="a layer of the model is made at its first call, such as LazyLinear"):
        training.Training(model, images.train, "elbo-path", Recipe(epochs=1))


def test_what_is_kept_outside_the_state_dict_is_noticed(forgetful, tmp_path):
    config, file = forgetful
    config = replace(config, model=f"{file}:counts")
    step = runs.train(tmp_path / "run", config)["training"]["step"]
    for use in (
        lambda: runs.load(tmp_path / "run"),
        lambda: runs.evaluate(tmp_path / "run", 2),
        lambda: runs.train(tmp_path / "run", replace(config, epochs=2)),
    ):
        with pytest.raises(
            InputError, match=f"when it was saved, at step {step}: .* register what it keeps as a buffer"
        ):
            use()


def test_what_numpy_and_python_draw_for_a_model_follows_from_its_seed(forgetful, tmp_path):
    config, file = forgetful
    config = replace(config, model=f"{file}:draws")
    before = np.random.get_state()[1].tolist(), random.getstate()
    runs.train(tmp_path / "run", config)
    assert before == (np.random.get_state()[1].tolist(), random.getstate())
    scale = runs.load(tmp_path / "run").model.encoder.scale
    runs.train(tmp_path / "run", replace(config, epochs=2))
    runs.train(tmp_path / "whole", replace(config, epochs=2))
    runs.train(tmp_path / "other", replace(config, seed=1))
    assert runs.load(tmp_path / "other").model.encoder.scale != scale
    ends = [runs.load(tmp_path / name).model.state_dict() for name in ("run", "whole")]
    assert all(torch.equal(*pair) for pair in zip(*(end.values() for end in ends)))


def test_an_error_in_ones_own_file_reaches_one_as_it_is(tmp_path):
    (tmp_path / "vae.py").write_text("def build(start):\n    return 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        models.build(f"{tmp_path}/vae.py:build", 5)
    (tmp_path / "vae.py").write_text("def build(start)\n")
    with pytest.raises(SyntaxError):
        models.build(f"{tmp_path}/vae.py:build", 5)


def test_an_empty_name_is_not_the_folder_where_we_are(tmp_path, monkeypatch):
    save(tmp_path / "a.png", BYTES[0])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="data set"):
        data.load("")


def test_the_seed_is_that_of_ones_own_layers_too(tmp_path):
    """Layers of PyTorch draw their weights from its own generator, which is left as it was."""
    path = tmp_path / "plain.py"
    path.write_text(textwrap.dedent(MODEL).replace("    torch.manual_seed(0)\n", ""))
    before = torch.get_rng_state()

    def weights(seed):
        model = models.build(f"{path}:build", 4, generator=torch.Generator().manual_seed(seed))
        return torch.cat([p.flatten() for p in model.parameters()])

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))
    assert torch.equal(before, torch.get_rng_state())
