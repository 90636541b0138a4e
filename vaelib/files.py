"""Where the outside comes in: files that are read and checked, files that are whole or not there, locks, shell words.

Nothing else in the package opens a file; downloads, and what is made of them, are in :mod:`vaelib.data`.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import shlex
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaelib.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder are not noticed
    fcntl = None

PART = re.compile(r"\..+\.[0-9a-f]{32}\.part")
"""The names of what is being written; nothing else gives a file such a name."""

NO_ROOM = "what was there before is whole: make room, then run the same command again to go on"
ADVICE = {
    errno.ENOSPC: NO_ROOM,
    errno.EFBIG: NO_ROOM,
    getattr(errno, "EDQUOT", errno.ENOSPC): NO_ROOM,
    errno.ENOENT: "its folder is gone or was never there: bring it back to go on, or make it and run this again",
    errno.EISDIR: "a folder has that name: move it out of the way, then run the same command again to go on",
}
"""What to do about an error while writing."""

A_DAY = 86_400.0
"""Seconds after which nobody writes to such a file any more."""


class InUse(InputError):
    """Another process holds a lock."""


@dataclass(frozen=True)
class Lock:
    """A lock that is held: the file in a folder that is locked, and its open handle."""

    path: Path
    handle: int

    def check(self) -> None:
        """Raise InputError if another folder is in the place of the one that is locked."""
        folder = self.path.parent
        try:
            same = os.path.samestat(os.fstat(self.handle), os.stat(self.path))
        except OSError:
            same = not os.path.lexists(folder)  # that it is gone is told by what writes there
        if not same:
            raise InputError(
                f"'{folder}' is not the folder any more that this command began in (it was renamed, a link to it was "
                "turned, or its .lock removed): nothing was written there; what was done before is in the old one, go "
                "on by its new name"
            )


@contextmanager
def atomic(target: Path) -> Iterator[Path]:
    """Give a temporary path beside ``target`` to write to, and name it ``target`` once it is written and on disk.

    A ``target`` that is a link stays one: what it points to is replaced.
    """
    target = Path(os.path.realpath(target))
    sweep(target.parent, A_DAY)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    part.touch(exist_ok=False)
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
        if os.name == "posix":  # the new name itself; Windows has no such call
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        part.unlink(missing_ok=True)


def sweep(folder: Path, age: float = 0.0) -> None:
    """Remove what processes that were killed were writing in ``folder``, if it has not changed for ``age`` seconds."""
    for stray in folder.glob(".*.part"):
        with suppress(FileNotFoundError):
            if PART.fullmatch(stray.name) and stray.is_file() and abs(time.time() - stray.stat().st_mtime) >= age:
                stray.unlink()


def write(path: Path, content: bytes | memoryview) -> None:
    """Write ``content`` to ``path``, whole or not at all.

    Raises
    ------
    InputError
        if it cannot be written; what was there before stays.
    """
    with told(path), atomic(path) as part:
        part.write_bytes(content)


def make_folder(path: Path) -> None:
    """Make the folder of a run, if it is not there; raise InputError if something else has its name."""
    if os.path.lexists(path) and not path.is_dir():
        what = "a file" if path.exists() else f"a link to '{os.readlink(path)}', which is not there"
        raise InputError(
            f"'{path}' is {what}, but a run needs a folder: move it out of the way, or choose another name"
        )
    path.mkdir(parents=True, exist_ok=True)


def folder_around(path: Path) -> Path:
    """Return the folder that a file is in, which is made if need be; of a link it is where that leads."""
    folder = Path(os.path.realpath(path)).parent
    with told(path):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_writable(path: Path) -> None:
    """Raise InputError if no file can be written at ``path`` later."""
    with told(path):
        tempfile.TemporaryFile(dir=folder_around(path)).close()


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Say in a sentence why ``path`` could not be written, if the block does not get it done."""
    try:
        yield
    except OSError as error:
        advice = ADVICE.get(
            error.errno, "what was there before is whole: put that right, then run the same command again"
        )
        if path.is_symlink():
            advice = f"it is a link to '{os.readlink(path)}': {advice}"
        raise InputError(f"'{path}' could not be written ({error.strerror}); {advice}") from error


def in_shell(path: Path) -> str:
    """Return a path as a command has it that is printed to be pasted, whatever the path is called."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    write(path, (json.dumps(value, indent=2) + "\n").encode())


def read(path: Path) -> bytes | None:
    """Return what is in a file; None if there is none.

    Raises
    ------
    InputError
        if it cannot be read, is a link to nothing, or a pipe, which might never end.
    """
    try:
        if path.is_fifo() or path.is_char_device():
            raise InputError(f"'{path}' is a pipe or a device and no file: write what it gives to a file first")
        return path.read_bytes()
    except FileNotFoundError:
        if path.is_symlink():
            raise InputError(f"'{path}' is a link to '{os.readlink(path)}', which is not there: mend it") from None
        return None
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise InputError(f"'{path}' cannot be read ({getattr(error, 'strerror', error)})") from error


def read_text(path: Path) -> str | None:
    """Return the text in a file, without a byte order mark; None if there is no file.

    Raises
    ------
    InputError
        if it is not text in UTF-8.
    """
    content = read(path)
    try:
        text = None if content is None else content.decode("utf-8-sig")
        if text is not None and "\0" in text:
            raise ValueError("it has zero bytes")
    except ValueError as error:  # UnicodeDecodeError is one
        raise InputError(
            f"'{path}' is not text in UTF-8 ({error}): save it in UTF-8, or put a whole copy in its place"
        ) from error
    return text


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if there is no file.

    Raises
    ------
    InputError
        if the file holds anything else.
    """
    if (text := read_text(path)) is None:
        return None
    try:
        found = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{path}' is not JSON ({error}): delete it, or put a whole copy in its place") from error
    if not isinstance(found, dict):
        raise InputError(f"'{path}' is no JSON object: delete it, or put a whole copy in its place")
    return found


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dictionary; raise ValueError where a name comes twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((again, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"'{again}' stands there twice")
    return found


def read_table(path: Path, *headers: Sequence[str]) -> dict[int, dict[str, str]] | None:
    """Return the lines of a CSV file by their numbers, each field by its column; None if there is no file.

    A spreadsheet's byte order mark and line ends are nothing to it.

    Raises
    ------
    InputError
        if it is no CSV, or has other columns than those of one of the ``headers``.
    """
    if (text := read_text(path)) is None:
        return None
    advice = "mend that line or delete it; nothing was written"
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        lines = {reader.line_num: line for line in reader if line}
    except csv.Error as error:
        raise InputError(f"line {reader.line_num} of '{path}' is not CSV ({error}): {advice}") from error
    if not lines:
        raise InputError(f"'{path}' is empty: put a whole copy in its place, or delete it; nothing was written")
    first = lines.pop(next(iter(lines)))
    if first not in [list(header) for header in headers]:
        raise InputError(
            f"'{path}' has the columns {' '.join(', '.join(first).split())}, but should have {', '.join(headers[0])}: "
            "move that file out of the way; nothing was written"
        )
    for number, line in lines.items():
        if len(line) != len(first):
            raise InputError(f"line {number} of '{path}' has {len(line)} fields, not {len(first)}: {advice}")
    return {number: dict(zip(first, line)) for number, line in lines.items()}


def is_ended(path: Path) -> bool:
    """Tell whether the last line of a text has its end; the last field of one that was cut may have lost something."""
    return (read_text(path) or "\n").endswith(("\n", "\r"))


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[Lock | None]:
    """Hold the lock of a folder, or of a file that is made if need be, until the block or the process ends.

    It gives the lock; None where the system knows none.

    Raises
    ------
    InUse
        if another process holds it, and we are not to wait.
    """
    if fcntl is None:
        yield None
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            folder = path if path.is_dir() else path.parent
            raise InUse(f"another process works in '{folder}': wait for it, or choose another folder") from None
        yield Lock(path, handle)
    finally:
        os.close(handle)


@contextmanager
def locked_around(path: Path) -> Iterator[None]:
    """Wait for the lock of :func:`folder_around` a file."""
    with locked(folder_around(path), wait=True):
        yield
