"""The one exception a user can cause, the sentence for a mistyped name, and the checks of plain values.

Everything a reader can get wrong (a name, a shape, a file, an option) raises :class:`InputError` with one sentence
that says what was found, what was expected and what to do. The command line prints that sentence and exits with 2.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")


class InputError(ValueError):
    """Something the caller gave is not usable; the message is one sentence meant for them."""


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
    near = difflib.get_close_matches(name.lower(), options, n=1)
    hint = f", did you mean '{near[0]}'?" if near else ";"
    raise InputError(f"no {what} is called '{name}'{hint} choose from: {', '.join(options)}")


def whole_number(name: str, value: Any, least: int) -> None:
    """Raise InputError unless ``value`` is a whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, but is {value!r}")


def true_or_false(name: str, value: Any) -> None:
    """Raise InputError unless ``value`` is one of these."""
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false, but is {value!r}")


def between(name: str, value: Any, least: float, most: float) -> None:
    """Raise InputError unless ``value`` is a finite number from ``least`` to ``most``."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most or value == math.inf:
        limits = f"of at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
        raise InputError(f"{name} must be a number {limits}, but is {value!r}")


def positive(name: str, value: Any) -> None:
    """Raise InputError unless ``value`` is a positive number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise InputError(f"{name} must be a positive number, but is {value!r}")
