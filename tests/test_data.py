"""vaelib.data: whole files or a sentence, the published formats, the splits, and the three binarisations."""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import vaelib.files
from vaelib import data
from vaelib.data import Split, files, images
from vaelib.data.files import File
from vaelib.errors import InputError

quiet = settings(deadline=None, database=None)  # no timed check, nothing written into the tree
REAL = Path(os.environ.get("VAELIB_DATA") or "/nowhere")


def needs(*paths: str) -> pytest.MarkDecorator:
    missing = [path for path in paths if not (REAL / path).is_file()]
    return pytest.mark.skipif(bool(missing), reason=f"VAELIB_DATA names no folder with {', '.join(missing)}")


def digest(content: bytes, tmp_path: Path, algorithm: str = "sha256") -> str:
    path = tmp_path / "to-hash"
    path.write_bytes(content)
    return files.digest(path, algorithm)


def left_over(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# -------------------------------------------------------------------------------- a server of mirrors


class Mirrors:
    """A real HTTP server; `answers[path]` lists (status, body, promised length), the last one for good."""

    def __init__(self) -> None:
        self.answers: dict[str, list[tuple[int, bytes, int]]] = {}
        self.asked: list[str] = []
        mirrors = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirrors.asked.append(self.path)
                queue = mirrors.answers[self.path]
                status, body, length = queue.pop(0) if len(queue) > 1 else queue[0]
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def add(self, path: str, *answers: tuple[int, bytes] | tuple[int, bytes, int]) -> str:
        self.answers[path] = [answer if len(answer) == 3 else (*answer, len(answer[1])) for answer in answers]
        return f"http://127.0.0.1:{self.server.server_port}{path}"


@pytest.fixture
def mirrors():
    mirrors = Mirrors()
    yield mirrors
    mirrors.server.shutdown()
    mirrors.server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, no VAELIB_DATA, no proxy, and no pauses between retries."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(files, "cache", lambda: folder)
    monkeypatch.setattr(files, "PAUSE", 0.0)
    monkeypatch.delenv("VAELIB_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return folder


@pytest.fixture
def offered(tmp_path, monkeypatch):
    """A folder that VAELIB_DATA names."""
    folder = tmp_path / "offered"
    folder.mkdir()
    monkeypatch.setenv("VAELIB_DATA", str(folder))
    return folder


BODY = bytes(range(256)) * 400


@pytest.fixture
def toy(tmp_path):
    return File("toy/file.bin", digest(BODY, tmp_path), len(BODY))


def test_the_first_mirror_that_gives_a_whole_file_is_used_and_only_once(mirrors, cache, toy):
    closed = socket.socket()
    closed.bind(("127.0.0.1", 0))  # bound but not listening: nobody answers there
    down = f"http://127.0.0.1:{closed.getsockname()[1]}/down"
    gone, good = mirrors.add("/gone", (404, b"no")), mirrors.add("/good", (200, BODY))
    cut, spare = mirrors.add("/cut", (200, BODY[:5000])), mirrors.add("/spare", (200, BODY))
    toy = replace(toy, addresses=(down, gone, cut, good, spare))
    path = files.fetch("toy", [toy])
    assert path == cache / "toy/file.bin" and path.read_bytes() == BODY
    assert mirrors.asked == ["/gone", "/cut", "/good"]
    assert files.fetch("toy", [toy]) == path and len(mirrors.asked) == 3
    assert left_over(cache) == ["toy/file.bin"]
    closed.close()


def test_what_a_link_in_the_cache_leads_to_is_not_written_over(mirrors, cache, toy, tmp_path):
    toy = replace(toy, addresses=(mirrors.add("/good", (200, BODY)),))
    (tmp_path / "mine").write_bytes(b"mine")
    (cache / "toy").mkdir(parents=True)
    (cache / "toy/file.bin").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match="file.bin' is cut or altered: .*; delete it and run `vaelib data fetch toy`"):
        files.fetch("toy", [toy])
    assert (tmp_path / "mine").read_bytes() == b"mine" and not mirrors.asked


def test_a_mirror_that_sends_elsewhere_in_no_encoding_is_one_that_fails(mirrors, cache, toy, monkeypatch):
    """As the page of a hotel's network may; ``requests`` then raises what is no error of its own."""
    toy = replace(toy, addresses=(mirrors.add("/bad", (302, b"")), mirrors.add("/good", (200, BODY))))
    end = BaseHTTPRequestHandler.end_headers

    def with_a_place(handler):
        if handler.path == "/bad":
            handler._headers_buffer.append(b"Location: /\xff\xfe\r\n")
        end(handler)

    monkeypatch.setattr(BaseHTTPRequestHandler, "end_headers", with_a_place)
    assert files.fetch("toy", [toy]).read_bytes() == BODY and mirrors.asked == ["/bad", "/good"]


def test_an_altered_file_from_every_mirror_is_refused_and_named(mirrors, cache, toy):
    altered = bytes([BODY[0] ^ 1]) + BODY[1:]
    toy = replace(toy, addresses=(mirrors.add("/a", (200, altered)), mirrors.add("/b", (500, b""))))
    with pytest.raises(InputError) as caught:
        files.fetch("toy", [toy])
    sentence = str(caught.value)
    for words in (
        "toy/file.bin",
        f"{len(BODY):,} bytes",
        toy.expected,
        "vaelib data fetch toy",
        "VAELIB_DATA",
    ):
        assert words in sentence
    assert "/a: what it sends has sha256" in sentence and "/b: HTTP 500" in sentence and "\n" not in sentence
    assert left_over(cache) == []


def test_a_connection_that_breaks_in_mid_transfer_leaves_no_file(mirrors, cache, toy):
    broken = (200, BODY[:70_000], len(BODY))
    with pytest.raises(InputError, match="it has 70,000 bytes|what it sends has 70,000 bytes|Error"):
        files.fetch("toy", [replace(toy, addresses=(mirrors.add("/broken", broken),))])
    assert left_over(cache) == [] and len(mirrors.asked) == files.ROUNDS
    again = replace(toy, addresses=(mirrors.add("/mended", broken, (200, BODY)),))
    assert files.fetch("toy", [again]).read_bytes() == BODY


def test_a_retry_succeeds_after_a_busy_server(mirrors, cache, toy):
    toy = replace(toy, addresses=(mirrors.add("/busy", (503, b""), (503, b""), (200, BODY)),))
    assert files.fetch("toy", [toy]).read_bytes() == BODY
    assert mirrors.asked == ["/busy"] * 3


def test_a_damaged_file_in_the_cache_is_fetched_again_and_kept_if_that_fails(mirrors, cache, toy):
    (cache / "toy").mkdir(parents=True)
    (cache / toy.path).write_bytes(BODY[:-1])
    with pytest.raises(InputError, match="no whole copy of 'toy/file.bin'"):
        files.fetch("toy", [replace(toy, addresses=(mirrors.add("/no", (404, b"")),))])
    assert (cache / toy.path).read_bytes() == BODY[:-1]
    files.fetch("toy", [replace(toy, addresses=(mirrors.add("/yes", (200, BODY)),))])
    assert (cache / toy.path).read_bytes() == BODY


def test_a_full_disk_is_told_as_it_is_and_leaves_no_file(mirrors, cache, toy, monkeypatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="toy/file.bin' could not be written .No space left.*make room"):
        files.fetch("toy", [replace(toy, addresses=(mirrors.add("/good", (200, BODY)),))])
    assert left_over(cache) == [] and len(mirrors.asked) == 1


def test_a_full_cache_is_named(mirrors, small_disk, toy, monkeypatch):
    monkeypatch.setattr(files, "cache", lambda: small_disk)
    (small_disk / "filler").write_bytes(b"x" * 100_000)
    with pytest.raises(InputError, match="toy/file.bin' could not be written .No space left on device.*make room"):
        files.fetch("toy", [replace(toy, addresses=(mirrors.add("/good", (200, BODY)),))])
    assert left_over(small_disk) == ["filler"]


class Endless(BaseHTTPRequestHandler):
    """Sends for ever: all it can, or a byte now and then; or an answer without sense."""

    def do_GET(self) -> None:
        self.send_response(200)
        if self.path == "/nonsense":
            self.send_header("Content-Length", "many")
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(b"x" * (1 if self.path == "/drip" else 2**16))
                time.sleep(0.01 if self.path == "/drip" else 0)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("path", "sizes", "why"),
    [
        ("/flood", True, "it sends more than 102,400 bytes"),
        ("/flood", False, "it sends more than 50,000 bytes"),
        ("/nonsense", True, "it sends more than 102,400 bytes"),
        ("/drip", True, "it sends too slowly: [0-9]+ bytes so far"),
    ],
)
def test_a_download_is_capped_by_size_and_time(cache, toy, monkeypatch, path, sizes, why):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(files, "MOST", 50_000)
    monkeypatch.setattr(files, "ROUNDS", 1)
    monkeypatch.setattr(files, "TIMEOUT", 1.0)
    monkeypatch.setattr(files, "SLOWEST", 10**6)
    address = f"http://127.0.0.1:{server.server_port}{path}"
    with pytest.raises(InputError, match=why):
        files.fetch("toy", [replace(toy, size=toy.size if sizes else None, addresses=(address,))])
    assert left_over(cache) == []
    server.shutdown()
    server.server_close()


def test_what_cannot_be_downloaded_is_not_said_to_be(cache):
    with pytest.raises(InputError) as caught:
        data.load("yelp")
    assert "vaelib data fetch" not in str(caught.value) and "set VAELIB_DATA" in str(caught.value)


def test_two_processes_that_fetch_at_once_both_end_with_a_whole_file(mirrors, cache, toy):
    address = mirrors.add("/good", (200, BODY))
    script = (
        "import sys; from pathlib import Path; from vaelib.data import files\n"
        "files.cache = lambda: Path(sys.argv[1])\n"
        "file = files.File(sys.argv[2], sys.argv[3], int(sys.argv[4]), (sys.argv[5],))\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(files.fetch('toy', [file]).stat().st_size)\n"
    )
    command = [sys.executable, "-c", script, str(cache), toy.path, toy.digest, str(toy.size), address]
    root = Path(data.__file__).parents[2]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": root}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    assert [one.stdout.readline() for one in both] == ["ready\n"] * 2
    for one in both:
        one.stdin.write("go\n")
        one.stdin.flush()
    assert [one.communicate(timeout=300)[0] for one in both] == [f"{len(BODY)}\n"] * 2
    assert left_over(cache) == ["toy/file.bin"] and (cache / toy.path).read_bytes() == BODY


def test_no_bar_is_drawn_where_there_is_no_terminal(mirrors, cache, toy, capfd):
    files.fetch("toy", [replace(toy, addresses=(mirrors.add("/good", (200, BODY)),))])
    assert capfd.readouterr() == ("", "")


# -------------------------------------------------------------------------------- VAELIB_DATA, digests


def test_the_folder_named_by_the_environment_comes_first_and_is_left_alone(cache, offered, toy):
    (offered / "toy").mkdir()
    (offered / toy.path).write_bytes(BODY)
    assert files.fetch("toy", [toy]) == offered / toy.path
    assert not cache.exists() and left_over(offered) == ["toy/file.bin"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [(BODY[:-1], f"it has {len(BODY) - 1:,} bytes"), (b"x" + BODY[1:], "it has sha256 ")],
    ids=["cut", "altered"],
)
def test_a_damaged_file_in_the_named_folder_is_refused(mirrors, cache, offered, toy, content, fault):
    (offered / "toy").mkdir()
    (offered / toy.path).write_bytes(content)
    with pytest.raises(InputError) as caught:
        files.fetch("toy", [replace(toy, addresses=(mirrors.add("/good", (200, BODY)),))])
    sentence = str(caught.value)
    for words in (
        str(offered / toy.path),
        fault,
        f"expected {toy.expected}",
        "delete it",
        "vaelib data fetch toy",
    ):
        assert words in sentence
    assert mirrors.asked == [] and (offered / toy.path).read_bytes() == content


def test_what_killed_downloads_left_is_swept_up_after_a_day(tmp_path):
    target = tmp_path / "digits.gz"
    old, young = (tmp_path / f".digits.gz.{32 * letter}.part" for letter in "ab")
    theirs, folder = tmp_path / ".thesis.odt.part", tmp_path / f".folder.{32 * 'c'}.part"
    for part in (old, young, theirs):
        part.write_bytes(b"half")
    folder.mkdir()
    for part in (old, theirs, folder):
        os.utime(part, (time.time() - 90_000,) * 2)
    with vaelib.files.atomic(target) as part:
        part.write_bytes(b"all")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"digits.gz", young.name, theirs.name, folder.name}  # nothing that another program made
    vaelib.files.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == left - {young.name}


def test_a_file_missing_from_the_named_folder_is_downloaded_or_named(mirrors, cache, offered, toy):
    with pytest.raises(InputError, match="toy/file.bin.*it has no address.*VAELIB_DATA"):
        files.fetch("toy", [toy])
    path = files.fetch("toy", [replace(toy, addresses=(mirrors.add("/good", (200, BODY)),))])
    assert path == cache / toy.path and left_over(offered) == []


def test_what_a_process_elsewhere_is_told_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VAELIB_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "kept")
    assert files.environment() == {"XDG_CACHE_HOME": str(tmp_path / "kept")}
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for said, absolute in (("data", "data"), ("~/data", "home/data"), (str(tmp_path / "a"), "a")):
        monkeypatch.setenv("VAELIB_DATA", said)
        assert files.environment()["VAELIB_DATA"] == str(tmp_path / absolute)


def test_a_named_folder_that_is_none_is_refused(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for wrong in ("file", "absent", "~nobody-of-this-name/x"):
        monkeypatch.setenv("VAELIB_DATA", wrong if wrong[0] == "~" else str(tmp_path / wrong))
        with pytest.raises(InputError, match=f"VAELIB_DATA is '.*{wrong}', which is not a folder"):
            data.load("mnist")
        with pytest.raises(InputError, match="which is not a folder"):
            data.describe()


def test_digests_agree_with_known_ones(tmp_path):
    assert digest(b"abc", tmp_path) == ("sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    assert digest(b"abc", tmp_path, "md5") == "md5:900150983cd24fb0d6963f7d28e17f72"
    # `printf 'what is up, doc?' | git hash-object --stdin`, from the book Pro Git
    assert digest(b"what is up, doc?", tmp_path, "git") == "git:bd9dbf5aae1a3862dd1526723246b20206e5fc37"


def test_a_file_that_is_made_is_whole_or_absent(mirrors, cache, toy):
    source = replace(toy, path="toy/source.bin", addresses=(mirrors.add("/source", (200, BODY)),))

    def make(sources: list[Path], target: Path) -> None:
        target.write_bytes(sources[0].read_bytes()[::-1])
        if stop:
            raise KeyboardInterrupt

    made = File("toy/made.bin", made_from=(source,), make=make)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        files.fetch("toy", [made])
    assert left_over(cache) == ["toy/source.bin"]
    stop = False
    assert files.fetch("toy", [made]).read_bytes() == BODY[::-1]
    assert left_over(cache) == ["toy/made.bin", "toy/source.bin"] and mirrors.asked == ["/source"]


# -------------------------------------------------------------------------------- registry and listing


def test_every_entry_says_what_it_must():
    assert data.names() == [*data.DATASETS, *data.TEXTS] and data.names()[0] == "digits"
    for entry in data.DATASETS.values():
        assert all((entry.description, entry.splits, entry.licence, entry.citation))
        assert set(entry.binarisations) <= set(data.BINARISATIONS)
        for parts in (entry.files or {}).values():
            assert sum(file.obtainable for file in parts) == 1
            leaves = [leaf for file in parts for leaf in (file.made_from or (file,))]
            assert all(leaf.digest.partition(":")[0] in ("sha256", "md5", "git") for leaf in leaves)
            assert all(len(leaf.addresses) != 1 for leaf in leaves)  # none, or more than one mirror
    assert "chardata.mat" in data.DATASETS["omniglot"].note


def test_unknown_names_get_a_sentence():
    for use in (data.load, data.fetch):
        with pytest.raises(InputError, match="no data set is called 'mnits', did you mean 'mnist'"):
            use("mnits")
    for use in (data.load, data.fetch):
        with pytest.raises(InputError, match="no data set is called 'MNIST', did you mean 'mnist'"):
            use("MNIST")
        for wrong in (["mnist"], 3, None, {}, torch.ones(3)):
            with pytest.raises(InputError, match=f"data set must be a name, not of type {type(wrong).__name__}"):
                use(wrong)
    with pytest.raises(InputError, match="no binarisation is called 'dynamik', did you mean 'dynamic'"):
        data.load("digits", binarisation="dynamik")
    for wrong in ("grey", "dynamic"):
        with pytest.raises(InputError, match=f"binarized-mnist cannot be had as '{wrong}'"):
            data.load("binarized-mnist", binarisation=wrong)


def test_the_listing_says_where_the_files_are(cache, offered):
    where = {line.name: line.where for line in data.describe()}
    assert where["digits"] == "built in" and data.fetch("digits") is None
    assert where["mnist"] == "to be downloaded, 11.6 MB"
    assert where["binarized-mnist"] == "to be downloaded, 109.8 MB"
    assert where["omniglot"] == "to be downloaded"
    for folder, path in ((offered, "omniglot/chardata.mat"), (cache, "omniglot/omniglot_28x28_made.npz")):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"")
    where = {line.name: line.where for line in data.describe()}
    assert where["omniglot-burda"] == f"VAELIB_DATA ({offered / 'omniglot'})"
    assert where["omniglot"] == f"cache ({cache / 'omniglot'})"


# -------------------------------------------------------------------------------- digits, binarisation


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def test_digits_need_no_network_and_no_folder(no_network, monkeypatch):
    monkeypatch.setenv("VAELIB_DATA", "/nowhere/at/all")
    digits = data.load("digits")
    assert (len(digits.train), digits.valid, len(digits.test), digits.shape) == (1497, None, 300, (8, 8))
    for split in (digits.train, digits.test):
        assert split.grey.dtype == torch.float32 and split.grey.shape == (len(split), 64)
        assert split.labels.dtype == torch.int64 and split.labels.unique().tolist() == list(range(10))
        assert torch.equal(split.grey * 16, (split.grey * 16).round())
        assert split.grey.min() == 0 and split.grey.max() == 1
    assert torch.equal(digits.train.batch(torch.tensor([3, 1])), digits.train.grey[[3, 1]])
    # every digit of scikit-learn once, with its own label
    from sklearn.datasets import load_digits

    raw = load_digits()
    rows = [(*image, label) for image, label in zip(raw.data / 16, raw.target, strict=True)]
    both = torch.cat([split.grey for split in (digits.train, digits.test)]).tolist()
    labels = torch.cat([split.labels for split in (digits.train, digits.test)]).tolist()
    assert sorted(rows) == sorted((*image, label) for image, label in zip(both, labels, strict=True))


def within(mean: torch.Tensor, grey: torch.Tensor, draws: int) -> bool:
    """Whether all empirical means agree with their Bernoulli means.

    z is compared with its two-sided normal quantile for an error of 1e-6 over all pixels together
    (Bonferroni); pixels with fewer than 20 expected draws on either side, where the normal law does not
    hold, are left out.
    """
    inner = draws * torch.minimum(grey, 1 - grey) >= 20
    z = (mean - grey).abs()[inner] / (grey * (1 - grey) / draws).sqrt()[inner]
    tail = 1e-6 / int(inner.sum())
    return bool(z.max() < -torch.special.ndtri(torch.tensor(tail / 2, dtype=torch.float64)))


def test_the_split_of_the_digits_never_changes():
    digits = data.load("digits")
    assert digits.train.labels[:12].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8]
    assert digits.test.labels[-6:].tolist() == [5, 3, 3, 7, 7, 8]


@pytest.mark.parametrize(("name", "sizes"), [("digits", {}), ("synthetic-text", {"sentences": 300})])
def test_a_sample_is_a_random_subset_and_is_the_same_for_a_seed(name, sizes):
    split = data.load(name, **sizes).test
    rows = split.tokens if name == "synthetic-text" else split.grey
    whole, seven, other = (
        part.batch(slice(None)) for part in (split.sample(None), split.sample(7), split.sample(7, 1))
    )
    assert len(seven) == 7 and torch.equal(seven, split.sample(7).batch(slice(None)))
    assert torch.equal(whole[:7, : seven.shape[1]], seven) and not torch.equal(seven, other)
    assert len(whole) == len(rows) and not torch.equal(whole, rows)
    assert torch.equal(whole.sum(1).sort().values, rows.sum(1).sort().values)


def test_a_sample_keeps_images_and_labels_together():
    split = data.load("digits").test
    subset = split.sample(20)
    for grey, label in zip(subset.grey, subset.labels, strict=True):
        assert label in split.labels[(split.grey == grey).all(1)]


def test_dynamic_images_are_drawn_anew_with_the_right_mean():
    train = data.load("digits", "dynamic").train
    generator = torch.Generator().manual_seed(1)
    index = torch.arange(40)
    grey, draws = train.grey[index].double(), 4000
    batches = torch.stack([train.batch(index, generator) for _ in range(draws)])
    assert batches.dtype == torch.float32 and set(batches.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(batches[0], batches[1])
    mean = batches.double().mean(0)
    assert torch.equal(mean[grey == 0], grey[grey == 0]) and torch.equal(mean[grey == 1], grey[grey == 1])
    assert within(mean, grey, draws)
    # negative controls: the pixels of another image, levels off by a 16th, one draw used over and over
    assert not within(mean.roll(1, 0), grey, draws)
    assert not within(mean, (grey * 16 / 17).clamp(0, 1), draws)
    assert not within(batches[0].double(), grey, draws)
    # pixels of a batch are drawn independently: the mean over a row of pixels varies as it must
    spread = (batches.double() - grey).sum(-1).var(0) / (grey * (1 - grey)).sum(-1)
    assert (spread - 1).abs().max() < 5 * math.sqrt(2 / draws)  # error rate 40 * 6e-7


def test_dynamic_draws_come_from_the_generator_given_and_from_nothing_else():
    train = data.load("digits", "dynamic").train
    index, state = torch.arange(20), torch.get_rng_state()
    one, two, other = (train.batch(index, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(train.batch(slice(0, 20), torch.Generator().manual_seed(5)), one)
    with pytest.raises(InputError, match="give batch\\(\\) a torch.Generator"):
        train.batch(index)


def test_draws_have_the_dtype_of_the_data_and_single_ones_never_change(monkeypatch):
    train = data.load("digits", "dynamic").train
    seeded = torch.Generator().manual_seed(5)
    expected = (torch.rand((9, 64), generator=seeded, dtype=torch.float32) < train.grey[:9]).float()
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            single = train.batch(slice(0, 9), torch.Generator().manual_seed(5))
            double = train.to(dtype=torch.float64).batch(slice(0, 9), torch.Generator().manual_seed(5))
        finally:
            torch.set_default_dtype(torch.float32)
        assert single.dtype == torch.float32 and torch.equal(single, expected)
        assert double.dtype == torch.float64 and set(double.unique().tolist()) == {0.0, 1.0}
    images = data.load("digits", valid=10).to(dtype=torch.float64)
    assert {split.grey.dtype for split in (images.train, images.valid, images.test)} == {torch.float64}
    assert images.train.labels.dtype == torch.int64


def levels(*wrong: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Three images of four pixels, the last ones with these levels."""
    return torch.cat([torch.full((12 - len(wrong),), 0.5), torch.tensor(wrong)]).reshape(3, 4).to(dtype)


@pytest.mark.parametrize(
    ("grey", "complaint"),
    [
        (levels(0, 255), "from 0 to 255"),
        (levels(-1, 1), "from -1 to 1.*real numbers take a likelihood of theirs, such as likelihoods.Gaussian"),
        (levels(1 + 2**-20), r"from 0.5 to 1\b"),
        (levels(math.nan), "from nan to nan"),
        (levels(math.inf), "from 0.5 to inf"),
        (levels(0, 255).to(torch.uint8), "but are torch.uint8"),
        (levels(0, 1).round().bool(), "but are torch.bool"),
        (levels(0, 1).numpy(), "but are of type ndarray"),
        (levels(0, 1)[0], r"must be a tensor \[N, 4\], but its shape is \[4\]"),
        (levels(0, 1)[:, :3], r"must be a tensor \[N, 4\], but its shape is \[3, 3\]"),
        (levels(0, 1).reshape(3, 2, 2), r"but its shape is \[3, 2, 2\]"),
    ],
)
def test_what_is_no_image_is_refused_when_the_split_is_made(grey, complaint):
    with pytest.raises(InputError, match=complaint) as caught:
        Split(grey, None, (2, 2), "dynamic")
    assert "\n" not in str(caught.value)
    good = Split(levels(0, 1), None, (2, 2), "dynamic")
    with pytest.raises(InputError, match=complaint):
        replace(good, grey=grey)


def test_images_are_black_and_white_if_they_are_or_are_drawn_so():
    whole, between = torch.tensor([[0.0, 1.0], [1.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.5, 1.0]])
    assert Split.of(whole).black_and_white and not Split.of(between).black_and_white
    assert not Split.of(between, binarisation="fixed").black_and_white
    assert Split.of(between, binarisation="dynamic").black_and_white


def test_other_faults_of_a_split_are_refused():
    for labels in (torch.zeros(2), torch.zeros(3, 1), [0, 1, 2]):
        with pytest.raises(InputError, match=r"labels must be a tensor \[3\]"):
            Split(levels(0, 1), labels, (2, 2), "grey")
    with pytest.raises(InputError, match="no binarisation is called 'gray', did you mean 'grey'"):
        Split(levels(0, 1), None, (2, 2), "gray")


def test_images_of_ones_own_become_a_split():
    pictures = np.random.default_rng(0).random((5, 2, 3))
    split = Split.of(pictures, labels=np.arange(5), binarisation="dynamic")
    assert split.shape == (2, 3) and split.binarisation == "dynamic" and split.labels.tolist() == list(range(5))
    assert np.array_equal(split.grey.numpy(), pictures.reshape(5, 6)) and split.grey.dtype == torch.float64
    flat = Split.of(torch.from_numpy(pictures).reshape(5, 6).float())
    assert flat.shape == (1, 6) and flat.binarisation == "grey" and flat.labels is None
    turned = Split.of(pictures[:, ::-1])  # a view that runs backwards
    assert torch.equal(turned.grey[:, :3], split.grey[:, 3:])
    for wrong, complaint in (
        (np.zeros((5, 2, 3), np.uint8), "but are torch.uint8"),
        (np.full((5, 6), np.nan), "must be finite, but these are from nan to nan"),
        (np.zeros(5), r"must be \[N, H, W\] or \[N, D\], or .*, but their shape is \[5\]"),
        (np.zeros((5, 2, 2, 2)), r"but their shape is \[5, 2, 2, 2\]"),
    ):
        with pytest.raises(InputError, match=complaint):
            Split.of(wrong)
    with pytest.raises(InputError, match="from 255 to 255"):
        Split.of(np.full((5, 6), 255.0), binarisation="dynamic")


def test_fixed_images_are_the_same_at_every_access_and_load():
    one, two, other = (data.load("digits", "fixed", seed=seed) for seed in (3, 3, 4))
    for split in ("train", "test"):
        first, second, third = (getattr(images, split).grey for images in (one, two, other))
        assert torch.equal(first, second) and not torch.equal(first, third)
        assert set(first.unique().tolist()) == {0.0, 1.0}
    index = torch.arange(9)
    assert torch.equal(one.train.batch(index), one.train.batch(index, torch.Generator()))
    # the draws do not depend on what is held out
    held = data.load("digits", "fixed", seed=3, valid=100)
    assert torch.equal(torch.cat([held.train.grey, held.valid.grey]), one.train.grey)
    assert torch.equal(held.test.grey, one.test.grey)


def test_valid_holds_out_the_last_training_images():
    all_, held = data.load("digits"), data.load("digits", valid=97)
    assert (len(held.train), len(held.valid), len(held.test)) == (1400, 97, 300)
    assert torch.equal(held.valid.grey, all_.train.grey[1400:])
    assert torch.equal(held.valid.labels, all_.train.labels[1400:])
    assert torch.equal(held.train.grey, all_.train.grey[:1400])
    with pytest.raises(InputError, match="expected 0, or less than digits's 1,497"):
        data.load("digits", valid=1497)
    for wrong in (-1, "3", 1.5):
        with pytest.raises(InputError, match="valid must be a whole number of at least 0"):
            data.load("digits", valid=wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_dynamic_images_are_drawn_on_the_device_of_the_data():
    digits = data.load("digits", "dynamic", valid=10).to("cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    for split in (digits.train, digits.valid, digits.test):
        batch = split.batch(torch.arange(5, device="cuda"), generator)
        assert batch.device.type == split.labels.device.type == "cuda"
        assert set(batch.unique().tolist()) == {0.0, 1.0}


def test_to_moves_every_split():
    digits = data.load("digits", valid=10).to("meta")
    for split in (digits.train, digits.valid, digits.test):
        assert split.grey.device.type == split.labels.device.type == "meta"


# -------------------------------------------------------------------------------- formats


def idx_bytes(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


@quiet
@given(arrays(np.uint8, st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple)))
def test_idx_files_are_read_back(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("idx") / "values.gz"
    path.write_bytes(gzip.compress(idx_bytes(values)))
    assert np.array_equal(images.idx(path), values)


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(b"\0\0\x0d\1" + struct.pack(">I", 4) + bytes(4)),  # floats, says the header
        gzip.compress(b"\0\1\x08\1" + struct.pack(">I", 4) + bytes(4)),
        gzip.compress(idx_bytes(np.zeros((3, 4), np.uint8))[:-1]),
        gzip.compress(idx_bytes(np.zeros((3, 4), np.uint8)) + b"\0"),
        gzip.compress(b"\0\0\x08\3\0\0"),
        gzip.compress(idx_bytes(np.zeros((3, 4), np.uint8)))[:-9],
        b"not gzip",
        b"",
    ],
    ids=["kind", "zeros", "short", "long", "no-axes", "cut", "not-gzip", "empty"],
)
def test_a_wrong_idx_file_gets_a_sentence(tmp_path, content):
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(InputError, match="images.gz' is no.*delete it and fetch it again"):
        images.idx(path)


def test_images_and_labels_must_fit_together(tmp_path):
    values = {"train images": (3, 2, 2), "train labels": (4,), "test images": (3, 2, 2), "test labels": (3,)}
    paths = {part: tmp_path / part for part in values}
    for part, shape in values.items():
        paths[part].write_bytes(gzip.compress(idx_bytes(np.zeros(shape, np.uint8))))
    with pytest.raises(InputError, match=r"train images' has shape \(3, 2, 2\) and its labels \(4,\)"):
        images.read_idx(paths)


def test_a_whole_set_goes_from_mirror_to_tensor(mirrors, cache, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pixels = {
        "train": rng.integers(0, 256, (6, 3, 5), np.uint8),
        "test": rng.integers(0, 256, (2, 3, 5), np.uint8),
    }
    parts = {}
    for split, values in pixels.items():
        for kind, array in (("images", values), ("labels", np.arange(len(values), dtype=np.uint8))):
            body = gzip.compress(idx_bytes(array))
            address = mirrors.add(f"/{split}-{kind}.gz", (200, body))
            parts[f"{split} {kind}"] = (File(f"toy/{split}-{kind}.gz", digest(body, tmp_path), len(body), (address,)),)
    toy = replace(data.DATASETS["mnist"], name="toy", files=parts)
    monkeypatch.setitem(data.DATASETS, "toy", toy)
    assert data.fetch("toy") == cache / "toy"
    loaded = data.load("toy", "grey")
    assert len(mirrors.asked) == 4 and loaded.shape == (3, 5)
    for split, values in pixels.items():
        expected = torch.from_numpy(values.reshape(-1, 15)) / 255
        assert torch.equal(getattr(loaded, split).grey, expected)
        assert getattr(loaded, split).labels.tolist() == list(range(len(values)))


@pytest.mark.parametrize("suffix", [".amat", ".amat.gz"])
def test_amat_text_is_read_plain_and_gzipped(tmp_path, suffix):
    bits = np.random.default_rng(0).integers(0, 2, (7, 784))
    text = "".join(" ".join(map(str, row)) + "\n" for row in bits).encode()
    path = tmp_path / f"x{suffix}"
    path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    pixels, labels = images.read_amat({"train": path})["train"]
    assert labels is None and pixels.dtype == np.float32 and np.array_equal(pixels.reshape(7, 784), bits)
    for wrong in (text[:-1], text.replace(b"1", b"2", 1), text.replace(b" ", b",", 1), text.replace(b"\n", b" "), b""):
        path.write_bytes(gzip.compress(wrong) if suffix.endswith("gz") else wrong)
        with pytest.raises(InputError, match="is not lines of 784 zeros and ones"):
            images.read_amat({"train": path})


def test_chardata_is_read_column_by_column(tmp_path):
    from scipy.io import savemat

    pictures = np.random.default_rng(0).random((5, 28, 28))
    pictures[:, 0, :] = 1  # a bar along the top, which the wrong order puts at the left
    columns = pictures.reshape(5, 28 * 28, order="C")
    stored = np.stack([picture.flatten(order="F") for picture in pictures], 1)  # as MATLAB's X(:)
    path = tmp_path / "chardata.mat"
    order = np.random.RandomState(123).permutation(5)

    def read(**fields: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        savemat(path, fields)
        splits = images.read_chardata({"images": path})
        assert splits["train"][1] is None and splits["train"][0].dtype == np.float32
        return splits["train"][0], splits["test"][0]

    train, test = read(data=stored, testdata=stored[:, :2])
    assert np.allclose(train, pictures[order]) and np.allclose(test, pictures[:2])
    assert np.allclose(test[:, 0, :], 1) and not np.allclose(test[:, :, 0], 1)
    # negative control: stored row by row, the pictures must come out wrong
    train, test = read(data=columns.T, testdata=columns.T)
    assert not np.allclose(test[:, 0, :], 1) and np.allclose(test[:, :, 0], 1)
    for content in (path.read_bytes()[:200], b"", b"nonsense" * 100):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is not a chardata.mat"):
            images.read_chardata({"images": path})


def test_chardata_is_known_by_its_git_blob_id(cache, offered):
    (offered / "omniglot").mkdir()
    (offered / "omniglot/chardata.mat").write_bytes(b"something else")
    with pytest.raises(InputError, match="chardata.mat' is cut or altered: it has git .*expected git 016a3536…"):
        data.load("omniglot-burda")


# -------------------------------------------------------------------------------- Omniglot


def omniglot_zip(path: Path, characters: dict[str, np.ndarray]) -> None:
    """Write drawings [20, 105, 105] (1 is ink) as Lake's zips have them: 1-bit PNGs, black on white."""
    from PIL import Image

    with zipfile.ZipFile(path, "w") as archive:
        for number, (folder, drawings) in enumerate(reversed(characters.items())):
            for drawing in reversed(range(20)):
                png = io.BytesIO()
                Image.fromarray(drawings[drawing] == 0).save(png, "png")
                archive.writestr(f"{folder}/{number:04d}_{drawing + 1:02d}.png", png.getvalue())


def test_omniglot_comes_in_one_order_whatever_the_order_in_its_file(tmp_path):
    keys = np.array([(True, "A", "1"), (True, "A", "2"), (True, "B", "1"), (False, "A", "1")], object)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 20, 28, 28), np.uint8)
    read = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        background, alphabet, character = (column.tolist() for column in keys[order].T)
        fields = {"background": background, "alphabet": alphabet, "character": character}
        np.savez(tmp_path / "file.npz", images=pixels[order], **fields)
        read.append(images.read_omniglot({"drawings": tmp_path / "file.npz"})["train"][0])
    assert np.array_equal(*read) and np.array_equal(read[0][:4] * 255, pixels[:, 0])


@pytest.mark.parametrize(
    "wrong", [np.zeros((2, 20, 28, 28)), np.zeros((2, 19, 28, 28), np.uint8), np.zeros((2, 20), int)]
)
def test_a_made_file_of_another_kind_is_refused(tmp_path, wrong):
    fields = {
        "background": np.array([True, False]),
        "alphabet": np.array(["A", "B"]),
        "character": np.array(["1", "2"]),
    }
    np.savez(tmp_path / "file.npz", images=wrong, **fields)
    with pytest.raises(InputError, match="is cut or altered .images are .*expected uint8"):
        images.read_omniglot({"drawings": tmp_path / "file.npz"})


@pytest.fixture(scope="module")
def small_npz(tmp_path_factory):
    path = tmp_path_factory.mktemp("npz") / "small.npz"
    fields = {"background": np.array([True, False]), "alphabet": np.array(["A", "B"])}
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 28, 28), np.uint8)
    np.savez_compressed(path, images=pixels, character=np.array(["1", "2"]), **fields)
    return path.read_bytes(), images.read_omniglot({"drawings": path})


@quiet
@given(place=st.floats(0, 1, exclude_max=True), near_the_ends=st.booleans(), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_made_file_is_found_or_harmless(small_npz, tmp_path_factory, place, near_the_ends, bit):
    content, expected = bytearray(small_npz[0]), small_npz[1]
    at = int(place * 1600) - 1000 if near_the_ends else int(place * len(content))  # headers and directory
    content[at] ^= 1 << bit
    path = tmp_path_factory.mktemp("npz") / "damaged.npz"
    path.write_bytes(content)
    try:
        found = images.read_omniglot({"drawings": path})
    except InputError:
        return
    for split in expected:
        assert all(np.array_equal(a, b) for a, b in zip(found[split], expected[split], strict=True))


@quiet
@given(arrays(np.bool_, (12, 12)))
def test_shrinking_keeps_the_area_of_every_cell(ink):
    fine = np.kron(ink, np.ones((7, 7))).reshape(7, 12, 7, 12).mean((1, 3))  # the same, by 7 x 7 finer pixels
    assert np.abs(images.shrink(ink, 7) / 255 - fine).max() <= 0.5 / 255 + 1e-12
    assert np.array_equal(images.shrink(np.ones_like(ink), 7), np.full((7, 7), 255))
    assert np.array_equal(images.shrink(ink.T, 7), images.shrink(ink, 7).T)


def test_omniglot_is_made_from_the_zips(mirrors, cache, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    zips = {
        "images_background": ("B/character02", "B/character01", "A/character01"),
        "images_evaluation": ("C/character01",),
    }
    drawn = {f"{top}/{name}": rng.random((20, 105, 105)) < 0.1 for top, names in zips.items() for name in names}
    sources = []
    for top, names in zips.items():
        omniglot_zip(tmp_path / f"{top}.zip", {f"{top}/{name}": drawn[f"{top}/{name}"] for name in names})
        body = (tmp_path / f"{top}.zip").read_bytes()
        address = mirrors.add(f"/{top}.zip", (200, body))
        sources.append(File(f"omniglot/{top}.zip", digest(body, tmp_path, "md5"), addresses=(address,)))
    omniglot = data.DATASETS["omniglot"]
    area, made = omniglot.files["drawings"]
    parts = {"drawings": (area, replace(made, made_from=tuple(sources)))}
    monkeypatch.setitem(data.DATASETS, "omniglot", replace(omniglot, files=parts))
    loaded = data.load("omniglot", "grey", valid=4)
    assert (len(loaded.train), len(loaded.valid), len(loaded.test)) == (4 * 14, 4, 4 * 5)
    assert "chardata.mat" in loaded.note
    for drawings, split in (
        (range(14), loaded.train),
        (range(14, 15), loaded.valid),
        (range(15, 20), loaded.test),
    ):
        expected = [images.shrink(drawn[name][drawing]) for drawing in drawings for name in sorted(drawn)]
        assert torch.equal(split.grey, torch.from_numpy(np.stack(expected)).reshape(-1, 784) / 255)
        assert split.labels.tolist() == [0, 1, 2, 3] * len(drawings)
    # the second load takes the file that was made; damage to it is found and named
    path = cache / made.path
    content = path.read_bytes()
    assert torch.equal(data.load("omniglot", "grey").test.grey, loaded.test.grey) and len(mirrors.asked) == 2
    for damaged in (
        content[:-100],
        content[: len(content) // 2],
        b"",
        content.replace(content[300:304], b"\0abc"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="omniglot_28x28_made.npz' is cut or altered.*delete it"):
            data.load("omniglot")


@needs("omniglot/omniglot_105x105_packed.npz", "omniglot/omniglot_28x28_area.npz")
def test_the_conversion_agrees_pixel_for_pixel_with_the_file_that_was_made_elsewhere(tmp_path):
    with np.load(REAL / "omniglot/omniglot_105x105_packed.npz") as fields:
        packed, background = fields["ink_packed"], fields["background"]
        alphabet, character = fields["alphabet"], fields["character"]
    with np.load(REAL / "omniglot/omniglot_28x28_area.npz") as fields:
        area = {(a, c): i for a, c, i in zip(fields["alphabet"], fields["character"], fields["images"], strict=True)}
    chosen = range(0, len(packed), 150)
    for top, belongs in (("images_background", True), ("images_evaluation", False)):
        omniglot_zip(
            tmp_path / f"{top}.zip",
            {
                f"{top}/{alphabet[i]}/{character[i]}": np.unpackbits(packed[i], axis=-1)[:, :11025].reshape(
                    20, 105, 105
                )
                for i in chosen
                if background[i] == belongs
            },
        )
    images.shrink_omniglot([tmp_path / "images_background.zip", tmp_path / "images_evaluation.zip"], tmp_path / "made")
    with np.load(tmp_path / "made") as made:
        assert sorted(made["background"].tolist()) == sorted(background[list(chosen)].tolist())
        for a, c, drawings in zip(made["alphabet"], made["character"], made["images"], strict=True):
            assert np.array_equal(drawings, area[a, c])
        assert len(made["images"]) == len(chosen)


# -------------------------------------------------------------------------------- the real files

MNIST_TEST_LABELS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
MNIST_TRAIN_LABELS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


@pytest.mark.parametrize(
    ("name", "sizes", "counts"),
    [
        pytest.param(
            "mnist",
            (60_000, 0, 10_000),
            (MNIST_TRAIN_LABELS, MNIST_TEST_LABELS),
            marks=needs("mnist/train-images-idx3-ubyte.gz"),
        ),
        pytest.param(
            "fashion-mnist",
            (60_000, 0, 10_000),
            ([6000] * 10, [1000] * 10),
            marks=needs("fashion_mnist/train-images-idx3-ubyte.gz"),
        ),
        pytest.param(
            "binarized-mnist",
            (50_000, 10_000, 10_000),
            None,
            marks=needs("binarized_mnist/binarized_mnist_train.amat.gz"),
        ),
        pytest.param(
            "omniglot",
            (24_345, 0, 8_115),
            ([15] * 1623, [5] * 1623),
            marks=needs("omniglot/omniglot_28x28_area.npz"),
        ),
    ],
)
def test_real_sets_have_their_published_shape(name, sizes, counts):
    loaded = data.load(name)
    assert tuple(0 if split is None else len(split) for split in (loaded.train, loaded.valid, loaded.test)) == sizes
    assert loaded.shape == (28, 28) and loaded.train.grey.shape == (sizes[0], 784)
    assert loaded.train.grey.min() == 0 and loaded.train.grey.max() == 1
    if counts is not None:
        assert (loaded.train.labels.bincount().tolist(), loaded.test.labels.bincount().tolist()) == counts
    if name == "binarized-mnist":
        means = [float(split.grey.mean()) for split in (loaded.train, loaded.valid, loaded.test)]
        assert means == pytest.approx([0.13056, 0.13113, 0.13251], abs=5e-6)
        assert loaded.train.binarisation == "fixed" and set(loaded.test.grey.unique().tolist()) == {0.0, 1.0}
        with pytest.raises(InputError, match="validation images of its own"):
            data.load(name, valid=10)


@pytest.mark.parametrize(
    ("item", "sentence"),
    [
        ((torch.zeros(2, 2), 0.7), "labels must be whole numbers, but one is 0.7"),
        ((torch.zeros(2, 2), "cat"), "labels must be whole numbers, but one is 'cat'"),
        (0.0, "the items of a Dataset must be tensors or arrays, but one is a float"),
        ((0, 1), "the items of a Dataset must be tensors or arrays, but one is a int"),
    ],
)
def test_what_a_dataset_may_not_hold_is_said(item, sentence):
    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, place):
            return item

    with pytest.raises(InputError, match=sentence):
        Split.of(Pictures())


@pytest.mark.parametrize(
    ("images", "labels", "sentence"),
    [
        (pd.DataFrame(np.zeros((3, 4))), None, "but are a DataFrame: .* a data frame by .to_numpy()"),
        ({"images": np.zeros((3, 4))}, None, "but are a dict"),
        (scipy.sparse.csr_matrix(np.eye(3)), None, "but are a csr_matrix: .* a sparse matrix by .toarray()"),
        (torch.eye(3).to_sparse(), None, "must be a dense tensor, but are a sparse one: give images.to_dense()"),
        (np.ma.array(np.zeros((3, 4)), mask=np.eye(3, 4)), None, "some of these images are masked: fill them in"),
        (np.zeros((3, 4)), ["cat"] * 3, "labels must be whole numbers, but one is 'cat': number the classes"),
        (np.zeros((3, 4)), np.array([0, 1, 1.5]), "labels must be whole numbers, but one is .*1.5"),
        (np.zeros((3, 4)), np.ma.array([0, 1, 2], mask=[0, 0, 1]), "some of these labels are masked"),
        (np.zeros((3, 4)), torch.tensor([1, 2, 2 + 1j]), "labels must be whole numbers, but one is .*2.*j"),
        (np.zeros((3, 4)), 3.0, "labels must be whole numbers, one an image, but are 3.0"),
    ],
)
def test_what_is_no_array_of_images_or_labels_is_said(images, labels, sentence):
    with pytest.raises(InputError, match=sentence):
        Split.of(images, labels)


@pytest.mark.parametrize(
    "labels",
    [
        [0, 1, 2],
        np.array([0.0, 1, 2]),
        np.array([2, 1, 0], ">i2")[::-1],
        torch.tensor([0, 1, 2], dtype=torch.uint8),
    ],
)
def test_labels_are_int64(labels):
    """And a masked array without a masked number is an array."""
    found = Split.of(np.ma.array(np.zeros((3, 4))), labels).labels
    assert found.dtype == torch.int64 and found.tolist() == [0, 1, 2]


@pytest.mark.parametrize("label", [1, 1.0, torch.tensor(1), np.int64(1)])
def test_whole_labels_of_any_kind_are_read(label):
    assert Split.of(torch.utils.data.StackDataset(torch.zeros(3, 2, 2), [label] * 3)).labels.tolist() == [1, 1, 1]
