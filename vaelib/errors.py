"""The one exception a user can cause, the sentence for a mistyped name, and the checks of plain values.

Everything a reader can get wrong (a name, a shape, a file, an option) raises :class:`InputError` with one sentence
that says what was found, what was expected and what to do. The command line prints that sentence and exits with 2.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

Value = TypeVar("Value")

OPTIONS: ContextVar[Mapping[str, str]] = ContextVar("options", default={})
"""What an argument is called where it was typed, such as --batch-size for batch_size; the command line sets it."""

NO_MEMORY = (
    "t allocate memory",
    "not enough memory",
    "out of memory",
    "Unable to allocate",
    "overflow",
    "invalid size",
)
"""What errors say for which there is too little memory, or would be in any machine."""


MEANT = {"gpu": "cuda"}
"""What a name stands for that other programs use."""


class InputError(ValueError):
    """Something the caller gave is not usable; the message is one sentence meant for them."""


def typed(name: str) -> str:
    """Return the name of an argument as it was typed: ``k`` in Python, ``--k`` at the command line."""
    return OPTIONS.get().get(name, name)


def shown(value: Any) -> str:
    """Return how a message writes a value that was given: as Python does, cut to some 60 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than some thousands of digits
        text = f"a {type(value).__name__} too long to be shown"
    return text if len(text) <= 60 else f"{text[:40]}...{text[-17:]}"


@contextmanager
def enough_memory(*smaller: str) -> Iterator[None]:
    """Say that memory is out, and which arguments should be ``smaller``, where that is what an error means.

    Raises
    ------
    InputError
        in the place of such an error.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OverflowError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in NO_MEMORY):
            raise
        size = re.search(r"allocate ([\d.]+ \w+)", str(error))
        raise InputError(
            f"there is not enough memory{f', {size[1]} were asked for at once' if size else ''}: "
            f"choose a smaller {' or '.join(map(typed, smaller))}"
        ) from error


def choose(what: str, name: Any, options: Mapping[str, Value]) -> Value:
    """Return ``options[name]``, or say which names exist and which one was probably meant.

    Raises
    ------
    InputError
        if ``name`` is not a key of ``options``, whatever type it has.
    """
    if not isinstance(name, str):
        raise InputError(f"{what} must be a name, not of type {type(name).__name__}; choose from: {', '.join(options)}")
    if name in options:
        return options[name]
    meant = MEANT.get(name.lower())
    near = [meant] if meant in options else difflib.get_close_matches(name.lower(), options, n=1)
    hint = f", did you mean '{near[0]}'?" if near else ";"
    raise InputError(f"no {what} is called {shown(name)}{hint} choose from: {', '.join(options)}")


def plain(value: Any) -> Any:
    """Return a number of NumPy's as Python's own, and anything else as it is."""
    numpy = sys.modules.get("numpy")  # of which nobody has a number before it is loaded
    return value.item() if numpy and isinstance(value, numpy.generic) else value


def found(value: Any) -> str:
    """Return how a message writes a value that should have been a number of Python's."""
    return shown(value) if plain(value) is value else f"{shown(value)} of NumPy's: give {plain(value)!r}, by .item()"


def whole_number(name: str, value: Any, least: int, most: int = 2**31 - 1) -> None:
    """Raise InputError unless ``value`` is a whole number of at least ``least``, and no more than ``most``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{typed(name)} must be a whole number of at least {least}, but is {found(value)}")
    if value > most:
        raise InputError(f"{typed(name)} must be a whole number of at most {most}, but is {shown(value)}")


def true_or_false(name: str, value: Any) -> None:
    """Raise InputError unless ``value`` is one of these."""
    if not isinstance(value, bool):
        raise InputError(f"{typed(name)} must be true or false, but is {found(value)}")


def is_finite(value: Any) -> bool:
    """Tell whether ``value`` is a number that a float can hold: not NaN, not infinite, no whole number beyond them."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def between(name: str, value: Any, least: float, most: float) -> None:
    """Raise InputError unless ``value`` is a finite number from ``least`` to ``most``."""
    if not is_finite(value) or not least <= value <= most:
        limits = f"of at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
        raise InputError(f"{typed(name)} must be a number {limits}, but is {found(value)}")


def positive(name: str, value: Any) -> None:
    """Raise InputError unless ``value`` is a positive number."""
    if not is_finite(value) or value <= 0:
        raise InputError(f"{typed(name)} must be a positive number, but is {found(value)}")
