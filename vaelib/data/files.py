"""Where a data set's files come from: a folder that holds them already, the user's cache, or a mirror.

Every file is named once, as a :class:`File`: its path inside a data folder, its checksum, its addresses.
Files are looked for in the folder that the environment variable ``VAELIB_DATA`` names, then in the user's
cache; what neither has is downloaded into the cache, mirror after mirror, and checked before it gets its name
there. So a file that has its name is whole. What lies in ``VAELIB_DATA`` is checked too, and never written to.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path
from tqdm import tqdm

from vaelib.errors import InputError
from vaelib.files import atomic, told

ROUNDS = 3  # how often the whole list of mirrors is tried
PAUSE = 1.0  # seconds before the second round; twice as long before the third
TIMEOUT = 30.0  # seconds without a sign of life from a server
SLOWEST = 10_000  # bytes a second, on the whole
MOST = 10**8  # bytes of a file whose size is not known


@dataclass(frozen=True)
class File:
    """One file of a data set.

    Attributes
    ----------
    path : str
        Place in a data folder, with forward slashes: ``"mnist/train-images-idx3-ubyte.gz"``.
    digest : str
        ``"sha256:…"``, ``"md5:…"`` or ``"git:…"`` (the id of the git blob: the SHA-1 of ``b"blob <size>\\0"``
        and the content). Empty for a file made on this machine, in a format that holds its own checksums.
    size : int, optional
        Bytes.
    addresses : tuple of str
        Mirrors, tried in this order.
    made_from : tuple of File
        Files that :attr:`make` turns into this one.
    make : callable, optional
        ``make(sources, target)`` reads the paths ``sources`` and writes the path ``target``.
    """

    path: str
    digest: str = ""
    size: int | None = None
    addresses: tuple[str, ...] = ()
    made_from: tuple[File, ...] = ()
    make: Callable[[Sequence[Path], Path], None] | None = None

    @property
    def expected(self) -> str:
        """What a whole copy looks like, in words."""
        size = "" if self.size is None else f"{self.size:,} bytes, "
        return size + self.digest[: self.digest.find(":") + 9].replace(":", " ") + "…"

    @property
    def obtainable(self) -> bool:
        """Whether this machine can get the file by itself, given a network."""
        return bool(self.addresses or self.made_from)

    def fault(self, path: Path) -> str:
        """Say what is wrong with the copy at ``path``; empty if it is whole."""
        size = path.stat().st_size
        if self.size is not None and size != self.size:
            return f"has {size:,} bytes"
        if self.digest and (found := digest(path, self.digest.partition(":")[0])) != self.digest:
            return f"has {found[: found.find(':') + 9].replace(':', ' ')}…"
        return ""


def digest(path: Path, algorithm: str) -> str:
    """Return ``"algorithm:hex"`` of a file, for ``sha256``, ``md5`` or ``git`` (the id of a git blob)."""
    with open(path, "rb") as file:
        if algorithm != "git":
            return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"
        blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        return f"git:{hashlib.file_digest(file, lambda: blob).hexdigest()}"


def cache() -> Path:
    """Return the folder that downloads go to; laid out as ``VAELIB_DATA`` is."""
    return user_cache_path("vaelib")


def folders() -> dict[str, Path]:
    """Return the folders to look in, by name and in order.

    Raises
    ------
    InputError
        if ``VAELIB_DATA`` is set but is not a folder.
    """
    named = os.environ.get("VAELIB_DATA")
    if not named:
        return {"cache": cache()}
    if not (folder := Path(os.path.expanduser(named))).is_dir():
        raise InputError(
            f"VAELIB_DATA is '{named}', which is not a folder: set it to a folder that holds the data "
            "already, or unset it to have the data downloaded"
        )
    return {"VAELIB_DATA": folder, "cache": cache()}


def environment() -> dict[str, str]:
    """Return the variables that say where these folders are, absolute: for a process elsewhere."""
    said = {name: os.environ.get(name) for name in ("VAELIB_DATA", "XDG_CACHE_HOME")}
    return {name: os.path.abspath(os.path.expanduser(path)) for name, path in said.items() if path}


def find(files: Sequence[File]) -> tuple[str, File, Path] | None:
    """Return the first of interchangeable ``files`` that exists, as (name of the folder, file, path)."""
    places = ((place, file, folder / file.path) for place, folder in folders().items() for file in files)
    return next((found for found in places if found[2].is_file()), None)


def fetch(name: str, files: Sequence[File]) -> Path:
    """Return the path of a whole copy of one of interchangeable ``files`` of data set ``name``.

    A damaged copy in the cache is downloaded again; one in ``VAELIB_DATA`` is an error.

    Raises
    ------
    InputError
        if a file in ``VAELIB_DATA`` is cut or altered, or no mirror gives a whole one.
    """
    if found := find(files):
        place, file, path = found
        if not (fault := file.fault(path)):
            return path
        if place != "cache" or not file.obtainable or path.is_symlink():  # what a link leads to is somebody's own
            again = f"delete it and run `vaelib data fetch {name}` with a network, or " if file.obtainable else ""
            raise InputError(
                f"'{path}' is cut or altered: it {fault}, expected {file.expected}; {again}put a whole copy there"
            )
    file = next((file for file in files if file.obtainable), files[0])
    target = cache() / file.path
    with told(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    if file.make is None:
        download(name, file, target)
    else:
        sources = [fetch(name, [source]) for source in file.made_from]
        with told(target), atomic(target) as part:
            file.make(sources, part)
    return target


class Faulty(Exception):
    """A mirror gives no whole copy; the message says in a few words why."""


def download(name: str, file: File, target: Path) -> None:
    """Download ``file`` from the first mirror that gives a whole copy, and only then call it ``target``."""
    failures: dict[str, Faulty] = {}
    for attempt in range(ROUNDS):
        time.sleep(attempt * PAUSE)
        for address in file.addresses:
            try:
                with told(target), atomic(target) as part:
                    receive(address, file, part)
                    if fault := file.fault(part):
                        raise Faulty(f"what it sends {fault}")
                return
            except Faulty as error:
                failures[address] = error
    tried = "; ".join(f"{address}: {why}" for address, why in failures.items()) or "it has no address"
    looked = " or ".join(f"'{folder}'" for folder in folders().values())
    network = f"run `vaelib data fetch {name}` with a network, or " if file.obtainable else ""
    raise InputError(
        f"no whole copy of '{file.path}' (expected: {file.expected}) is in {looked}, and none could be "
        f"downloaded ({tried}): {network}put one into a folder, and set VAELIB_DATA to that"
    )


def receive(address: str, file: File, target: Path) -> None:
    """Write what an address sends to ``target``: no more than the file has, and no slower than is any use."""
    import requests  # takes a tenth of a second, and is wanted only here
    from urllib3.exceptions import HTTPError

    most = file.size or MOST
    got, latest = 0, time.monotonic() + TIMEOUT + most / SLOWEST
    try:
        ask = requests.get(address, stream=True, timeout=TIMEOUT, headers={"Accept-Encoding": "identity"})
        with ask as answer, open(target, "wb") as out, progress(Path(file.path).name, file.size) as bar:
            if answer.status_code != 200:
                raise Faulty(f"HTTP {answer.status_code}")
            while content := answer.raw.read1(2**16):
                got += len(content)
                if got > most:
                    raise Faulty(f"it sends more than {most:,} bytes")
                if time.monotonic() > latest:
                    raise Faulty(f"it sends too slowly: {got:,} bytes so far")
                out.write(content)
                bar.update(len(content))
    except (requests.RequestException, HTTPError, UnicodeError) as error:  # the last of an address to go to
        raise Faulty(type(error).__name__) from error


def progress(name: str, size: int | None) -> tqdm:
    """Return a progress bar in bytes, which shows on a terminal only."""
    return tqdm(desc=name, total=size or 1, unit="B", unit_scale=True, disable=None)
