"""What the benchmarks on one machine share: contestants in turns, round after round; ratios within a round; a CSV."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from steps import provenance, write
from tqdm import tqdm

Key = TypeVar("Key", bound=Hashable)


def clock(threads: int) -> Callable[[], float]:
    """Return the process's own time on one thread, which other programs do not disturb much; else the wall's."""
    return time.process_time if threads == 1 else time.perf_counter


def take_turns(
    contestants: Mapping[Key, Callable[[], Any]],
    rounds: int,
    now: Callable[[], float],
    what: str,
    before: Callable[[Key], Any] = lambda key: None,
) -> dict[Key, list[float]]:
    """Return the seconds that each took in each round, without what is done ``before``; a first round warms up."""
    times: dict[Key, list[float]] = {key: [] for key in contestants}
    for number in tqdm(range(-1, rounds), desc=what, unit="round", file=sys.stderr):
        for key, work in contestants.items():
            before(key)
            start = now()
            work()
            if number >= 0:
                times[key].append(now() - start)
    return times


def spread(name: str, values: list[float]) -> dict[str, str]:
    """Return the median and the range of ``values`` as three cells."""
    found = {name: median(values), f"{name}_min": min(values), f"{name}_max": max(values)}
    return {key: f"{value:.4f}" for key, value in found.items()}


def ratios(mine: list[float], theirs: list[float]) -> list[float]:
    """Return the ratios, round by round."""
    return [a / b for a, b in zip(mine, theirs, strict=True)]


def finish(path: Path, records: list[dict[str, Any]]) -> None:
    """Write the CSV, whole or not at all, with where, when, and the machine's load, this program's included."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    records = [record | {"load": load} | provenance() for record in records]
    write(path, records, list(records[0]))
    width = {key: max(len(key), *(len(str(record[key])) for record in records)) for key in records[0]}
    shown = list(width)[: list(width).index("load")]
    for row in ({key: key for key in shown}, *records):
        print("  ".join(f"{row[key]!s:{width[key]}}" for key in shown))
    print(f"\nWritten: {os.path.relpath(path)}")
