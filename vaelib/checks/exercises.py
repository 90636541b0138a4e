"""How an exercise's check meets an answer: a reader's, which may be unfinished, or one planted to be refused.

A check is a function of the answer that raises AssertionError unless it is right, made of the statements of
:mod:`~vaelib.checks.statements`. Called by itself, as a solution does, it stops the notebook.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

from vaelib.checks.statements import ERROR_RATE, Verdict, check, unrecorded


def attempt(check: Callable[..., None], *answer: Any) -> None:
    """Hand a reader's answer to ``check`` and print what it says, also where it fails: a notebook runs on.

    A part of the answer that is None, or that raises NotImplementedError when it is called, is not there yet.
    """
    if any(part is None for part in answer):
        print("not solved yet")
        return
    try:
        check(*answer)
    except NotImplementedError:
        print("not solved yet")
    except Exception as error:
        print(f"not right yet: {str(error).strip() or type(error).__name__}")


@check(ERROR_RATE)
def refused(answered: Callable[..., None], *answer: Any, what: str) -> Verdict:
    """Check that ``answered``, an exercise's check, refuses a wrong ``answer``, of which ``what`` says what is wrong.

    Any other error than AssertionError is not a refusal, and is let through.
    """
    try:
        with redirect_stdout(io.StringIO()), unrecorded():
            answered(*answer)
    except AssertionError:
        return Verdict(True, None, f"refused, {what}")
    return Verdict(False, None, f"a wrong answer passes: {what}")
