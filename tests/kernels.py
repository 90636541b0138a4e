"""A plugin for nbval: a kernel that dies at its start is started again.

Its ports are chosen before it opens them, so that on a busy machine another program may be faster.
"""

import contextlib
import functools
from collections.abc import Callable

from nbval import kernel


def persistent(start: Callable) -> Callable:
    """Return ``start`` with three attempts; the last one's error is raised."""

    @functools.wraps(start)
    def start_again(*args, **kwargs):
        for _ in range(2):
            with contextlib.suppress(RuntimeError):
                return start(*args, **kwargs)
        return start(*args, **kwargs)

    return start_again


kernel.start_new_kernel = persistent(kernel.start_new_kernel)
