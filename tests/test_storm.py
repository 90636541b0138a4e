"""A short storm: runs and grids are killed at random moments and end bit for bit; ``make storm`` is a long one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import storm

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="left out: needs fork and /proc")


def weather(minutes: float, *kinds: str) -> subprocess.CompletedProcess:
    """Let a storm rage in a process of its own, which has not trained anything."""
    path = os.pathsep.join(map(str, sys.path))
    return subprocess.run(
        [sys.executable, storm.__file__, str(minutes), *kinds],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip


def test_a_short_storm_loses_nothing():
    found = weather(0.1, "dreg")
    assert found.returncode == 0, found.stdout + found.stderr
    assert int(re.search(r"(\d+) kills in", found.stdout)[1]) > 0 and "nothing lost" in found.stdout


def test_a_storm_notices_what_is_lost(tmp_path):
    """The negative control: another end, a file that is cut, and a stranger's file that is gone."""
    for name in storm.STRANGERS:
        (tmp_path / name).write_text("mine")
    (tmp_path / "metrics.jsonl").write_text('{"bound": 1.0, "seconds": 3.0}\n')
    before = storm.contents(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"bound": 1.0, "seconds": 4.0}\n')
    assert storm.differences(before, storm.contents(tmp_path)) == []
    (tmp_path / "metrics.jsonl").write_text('{"bound": 1.5, "seconds": 4.0}\n')
    assert storm.differences(before, storm.contents(tmp_path)) == ["/metrics.jsonl/0/bound"]
    (tmp_path / "metrics.jsonl").write_text('{"bound": 1.5, "sec')
    with pytest.raises(ValueError):
        storm.check_whole(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / storm.STRANGERS[0]).unlink()
    with pytest.raises(FileNotFoundError):
        storm.check_whole(tmp_path)
