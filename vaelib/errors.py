"""The one exception a user can cause, and the sentence for a mistyped name.

Everything a reader can get wrong (a name, a shape, a file, an option) raises :class:`InputError` with one sentence
that says what was found, what was expected and what to do. The command line prints that sentence and exits with 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")


class InputError(ValueError):
    """Something the caller gave is not usable; the message is one sentence meant for them."""


def choose(what: str, name: str, options: Mapping[str, Value]) -> Value:
    """Return ``options[name]``, or say which names exist and which one was probably meant.

    Raises
    ------
    InputError
        if ``name`` is not a key of ``options``.
    """
    if name in options:
        return options[name]
    near = difflib.get_close_matches(str(name), options, n=1)
    hint = f", did you mean '{near[0]}'?" if near else ";"
    raise InputError(f"no {what} is called '{name}'{hint} choose from: {', '.join(options)}")
