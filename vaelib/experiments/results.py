"""Results on disk: ``results/<experiment>.csv``, one row a measured number.

Its columns are the preset, the configuration, the seed, what was measured (``metric``, ``at``), the number with its
standard error, and what it was measured with: seconds, device, threads, versions, date. A row is never altered; a run
is added whole or not at all, under a lock, so that several grids can add to one table.
"""

from __future__ import annotations

import csv
import datetime
import io
import math
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vaelib import __version__
from vaelib.errors import InputError
from vaelib.experiments.experiment import Experiment, Measured, Row, Task, as_text
from vaelib.runs import fcntl, write

RESULTS = Path("results")
"""Where the tables are, from the folder of the repository."""

NUMBERS = ("metric", "at", "value", "standard_error")
PROVENANCE = ("seconds", "device", "threads", "torch", "vaelib", "date")


class Summary(NamedTuple):
    """The mean of a number over seeds, its standard error (not a number for one seed), and how many there were."""

    mean: float
    standard_error: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" ± {self.standard_error:.2f}" if self.n > 1 else "")


@dataclass(frozen=True)
class Table:
    """Lines of words, a header first; set in columns as text, and as a table in a notebook."""

    lines: Sequence[tuple[str, ...]]

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.lines, strict=True)]
        return "\n".join(
            "  ".join(f"{word:{width}}" for word, width in zip(line, widths, strict=True)).rstrip()
            for line in self.lines
        )

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        header, *rest = (f"| {' | '.join(line)} |" for line in self.lines)
        return "\n".join([header, f"|{' --- |' * len(self.lines[0])}", *rest])


def columns(experiment: Experiment) -> tuple[str, ...]:
    """Return the header of an experiment's table."""
    return ("preset", *experiment.keys, "seed", *NUMBERS, *PROVENANCE)


def path_of(experiment: Experiment, folder: Path) -> Path:
    """Return the table of an experiment in ``folder``."""
    return folder / f"{experiment.name}.csv"


def read(experiment: Experiment, folder: Path = RESULTS) -> list[dict[str, str]]:
    """Return the rows of an experiment's table as they stand there; none if there is no table.

    Raises
    ------
    InputError
        if the header or a row is not what it must be; it names the line.
    """
    path, header = path_of(experiment, folder), columns(experiment)
    if not path.exists():
        return []
    lines = csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))
    rows, keys, advice = [], set(), "mend that line or delete it; nothing was written"
    for number, line in enumerate(lines, start=1):
        if number == 1:
            if tuple(line) != header:
                raise InputError(
                    f"'{path}' has the columns {', '.join(line)}, but '{experiment.name}' has {', '.join(header)}: "
                    "move that file out of the way; nothing was written"
                )
            continue
        if len(line) != len(header):
            raise InputError(f"line {number} of '{path}' has {len(line)} fields, not {len(header)}: {advice}")
        row = dict(zip(header, line, strict=True))
        for name in ("seed", "at", "value", "standard_error", "seconds"):
            if not _is_number(row[name], may_lack=name in ("at", "standard_error")):
                raise InputError(f"line {number} of '{path}' has {name} '{row[name]}', not a number: {advice}")
        key = (*_key(row, experiment), row["metric"], row["at"])
        if key in keys:
            raise InputError(f"line {number} of '{path}' repeats a number of the same run: {advice}")
        keys.add(key)
        rows.append(row)
    return rows


def load(name: str, preset: str | None = None, folder: str | Path = RESULTS) -> list[Row]:
    """Return the rows of an experiment's table in the order of its grid, numbers as numbers and nothing as None.

    Parameters
    ----------
    name
        of the experiment.
    preset
        the rows of this preset alone.
    folder
        where the table is.
    """
    from vaelib.experiments import find

    experiment = find(name)
    text = ("preset", "metric", *PROVENANCE[1:])
    rows = [row for row in read(experiment, Path(folder)) if preset in (None, row["preset"])]
    place = {key: i for i, key in enumerate(_grid(experiment))}
    rows.sort(key=lambda row: (place.get(_key(row, experiment)[:-1], len(place)), int(row["seed"])))
    return [{key: value if key in text else _parse(value) for key, value in row.items()} for row in rows]


def finished(experiment: Experiment, folder: Path) -> set[tuple[str, ...]]:
    """Return the keys of the runs that the table holds."""
    return {_key(row, experiment) for row in read(experiment, folder)}


def add(experiment: Experiment, task: Task, measured: Sequence[Row], folder: Path) -> None:
    """Add what a run measured to the table, unless it holds that run already; the table is whole at any moment."""
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        rows = read(experiment, folder)
        if task.key in {_key(row, experiment) for row in rows}:
            return
        known = dict(zip(("preset", *experiment.keys, "seed"), task.key, strict=True))
        rows += [{**known, **{name: as_text(value) for name, value in row.items()}} for row in measured]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns(experiment), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write(path_of(experiment, folder), text.getvalue().encode())


def as_rows(measured: Iterable[Measured], seconds: float, device: str) -> list[Row]:
    """Return what a run measured with what it was measured with, a row a number."""
    import torch

    provenance = {
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "vaelib": CODE,
        "date": datetime.date.today().isoformat(),
    }
    return [
        {"metric": m.metric, "at": m.at, "value": m.value, "standard_error": m.standard_error, **provenance}
        for m in measured
    ]


def code_version(file: Path = Path(__file__)) -> str:
    """Return the version of the package, with the commit if it runs from a checkout, which ``file`` then belongs to."""

    def git(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=file.parent)

    try:
        if git("ls-files", "--error-unmatch", file.name).returncode:
            return __version__
        found = git("describe", "--always", "--dirty")
    except OSError:
        return __version__
    return __version__ if found.returncode else f"{__version__}+{found.stdout.strip()}"


CODE = code_version()
"""The version of the code that was loaded, whatever is committed while its runs are made."""


def over_seeds(rows: Iterable[Row], metric: str, by: Sequence[str], at: int | None = None) -> dict[tuple, Summary]:
    """Return the mean of ``metric`` over the seeds, for each combination of the columns ``by``, in order of appearance.

    ``at`` chooses a point of a curve.
    """
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        if row["metric"] == metric and row["at"] == at:
            groups.setdefault(tuple(row[name] for name in by), []).append(row["value"])
    return {key: summarise(values) for key, values in groups.items()}


def by_seed(rows: Iterable[Row], metric: str, by: Sequence[str], at: int | None = None) -> dict[tuple, float]:
    """Return the values of ``metric`` by the columns ``by`` and the seed, as :func:`paired` takes them."""
    return {
        (*(row[name] for name in by), row["seed"]): row["value"]
        for row in rows
        if row["metric"] == metric and row["at"] == at
    }


def curves(rows: Iterable[Row], metric: str, by: str) -> dict[str, tuple[list[int], list[Summary]]]:
    """Return a metric's curve over the seeds, places and summaries, for each value of the column ``by``."""
    rows = [row for row in rows if row["metric"] == metric and row["at"] is not None]
    found: dict[str, tuple[list[int], list[Summary]]] = {}
    for at in sorted({row["at"] for row in rows}):
        for (name,), summary in over_seeds(rows, metric, (by,), at).items():
            places, summaries = found.setdefault(name, ([], []))
            places.append(at)
            summaries.append(summary)
    return found


def paired(values: Mapping[tuple, float], reference: str) -> dict[tuple, Summary]:
    """Return each arm's difference from the arm ``reference``, paired by seed; the keys are ``(..., arm, seed)``."""
    found: dict[tuple, list[float]] = {}
    for (*rest, arm, seed), value in values.items():
        if (base := values.get((*rest, reference, seed))) is not None:
            found.setdefault((*rest, arm), []).append(value - base)
    return {key: summarise(differences) for key, differences in found.items()}


def summarise(values: Sequence[float]) -> Summary:
    """Return the mean of ``values`` and its standard error."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else math.nan
    return Summary(mean, math.sqrt(variance / n), n)


def _grid(experiment: Experiment) -> Iterator[tuple[str, ...]]:
    """Return the presets and configurations of an experiment as text, in order."""
    return (task.key[:-1] for preset in experiment.presets for task in experiment.tasks(preset, 1))


def _key(row: Mapping[str, str], experiment: Experiment) -> tuple[str, ...]:
    return tuple(row[name] for name in ("preset", *experiment.keys, "seed"))


def _is_number(text: str, may_lack: bool) -> bool:
    return may_lack if text == "" else isinstance(_parse(text), int | float)


def _parse(text: str) -> str | int | float | None:
    if text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process adds to the tables in ``folder``."""
    if fcntl is None:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
