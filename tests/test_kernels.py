"""The plugin under which the chapters are run."""

import pytest
from kernels import kernel, persistent


def failing(times):
    """A start that fails so often, and says how often it was asked."""
    asked = []

    def start(name):
        asked.append(name)
        if len(asked) <= times:
            raise RuntimeError("Kernel died before replying to kernel_info")
        return len(asked)

    return start


@pytest.mark.parametrize("times", [0, 1, 2])
def test_a_kernel_that_dies_at_its_start_is_started_again(times):
    assert persistent(failing(times))("python") == times + 1


def test_a_kernel_that_never_starts_is_an_error():
    with pytest.raises(RuntimeError, match="Kernel died"):
        persistent(failing(3))("python")


def test_nbval_starts_its_kernels_so():
    assert hasattr(kernel.start_new_kernel, "__wrapped__")
