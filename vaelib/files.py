"""Files that are whole or not there, locks between processes, and paths in printed commands."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vaelib.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder are not noticed
    fcntl = None

PART = re.compile(r"\..+\.[0-9a-f]{32}\.part")
"""The names of what is being written; nothing else gives a file such a name."""

FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None))
"""What an error is called when there is no room."""

A_DAY = 86_400.0
"""Seconds after which nobody writes to such a file any more."""


class InUse(InputError):
    """Another process holds a lock."""


@contextmanager
def atomic(target: Path) -> Iterator[Path]:
    """Give a temporary path beside ``target`` to write to, and name it ``target`` once it is written and on disk."""
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
            if PART.fullmatch(stray.name) and stray.is_file() and time.time() - stray.stat().st_mtime >= age:
                stray.unlink()


def write(path: Path, content: bytes | memoryview) -> None:
    """Write ``content`` to ``path``, whole or not at all.

    Raises
    ------
    InputError
        if it cannot be written; what was there before stays.
    """
    try:
        with atomic(path) as part:
            part.write_bytes(content)
    except OSError as error:
        advice = "make room" if error.errno in FULL else "put that right"
        raise InputError(
            f"'{path}' could not be written ({error.strerror}); what was there before is whole: "
            f"{advice}, then run the same command again to go on"
        ) from error


def in_shell(path: Path) -> str:
    """Return a path as a command has it that is printed to be pasted, whatever the path is called."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    write(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises
    ------
    InputError
        if the file holds anything else.
    """
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{path}' is not JSON ({error}): delete it, or put a whole copy in its place") from error
    if not isinstance(found, dict):
        raise InputError(f"'{path}' is no JSON object: delete it, or put a whole copy in its place")
    return found


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder, or of a file that is made if need be, until the block or the process ends.

    Raises
    ------
    InUse
        if another process holds it, and we are not to wait.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            folder = path if path.is_dir() else path.parent
            raise InUse(f"another process works in '{folder}': wait for it, or choose another folder") from None
        yield
    finally:
        os.close(handle)
