"""Settings of all tests: the same examples and the same draws every time, no clock, and nothing left behind."""

import os
import subprocess
import sys

import pytest
from hypothesis import settings

settings.register_profile("book", deadline=None, derandomize=True, database=None)
settings.register_profile("fuzz", deadline=None, max_examples=500, database=None, print_blob=True)
settings.load_profile("fuzz" if "FUZZ" in os.environ else "book")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own of 160 kB, such as fills up soon."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("left out: only root on Linux can mount the small disk that fills up")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"left out: no small disk can be mounted here ({mounted.stderr.strip()})")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(autouse=True)
def as_new():
    """A draw without a generator of its own is the same in every run: torch's generator is seeded by the clock."""
    import torch

    torch.manual_seed(0)
    yield
    torch.set_flush_denormal(False)  # the commands set it for their process
