"""What the benchmarks share: options; contestants in turns, round after round; ratios within a round; a CSV."""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
Key = TypeVar("Key", bound=Hashable)


def parser(doc: str, table: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """Return the options of a benchmark that writes ``results/TABLE.csv``, with so many rounds if it has any."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds:
        found.add_argument("--rounds", type=int, default=rounds, help="rounds that count (default: %(default)s)")
    found.add_argument("--output", type=Path, default=ROOT / f"results/{table}.csv", help="the CSV to write")
    return found


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


def provenance() -> dict[str, str]:
    """Return on what, when and with which code this run was made."""
    from vaelib.experiments.results import processor

    settings = {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "LD_PRELOAD")}
    given = [f"{name}={Path(value).name}" for name, value in settings.items() if value]
    describe = ["git", "describe", "--always", "--dirty", "--tags"]
    try:
        code = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        code = importlib.metadata.version("vaelib")
    return {
        "machine": ", ".join([processor(), f"{os.cpu_count()} cores", *given]),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "code": code,
    }


def write(path: Path, records: list[dict[str, Any]], columns: Sequence[str]) -> None:
    """Write the CSV whole or not at all."""
    from vaelib.files import atomic

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as part, part.open("w", newline="") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(records)


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
