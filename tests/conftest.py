"""Settings of all tests: the same examples and the same draws every time, no clock, and nothing left behind."""

import pytest
from hypothesis import settings

settings.register_profile("book", deadline=None, derandomize=True, database=None)
settings.load_profile("book")


@pytest.fixture(autouse=True)
def as_new():
    """A draw without a generator of its own is the same in every run: torch's generator is seeded by the clock."""
    import torch

    torch.manual_seed(0)
    yield
    torch.set_flush_denormal(False)  # the commands set it for their process
