"""Results on disk: ``results/<experiment>.csv``, one line a measured number; read and grouped with pandas.

Its columns are the preset, the configuration, the seed, what was measured (``metric``, ``at``), the number with its
standard error, what it was measured with (seconds, device, threads, versions, date), and how many ``numbers`` its run
has. A run is added whole or not at all, under a lock, so that several grids can add to one table. One that lacks
numbers, since somebody cut the table, is no run: it is left out, and made anew. So is a run of one number in a last
line without a line end, whose count may be cut.
"""

from __future__ import annotations

import datetime
import functools
import math
import platform
import re
import subprocess
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import eq
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame, Series

from vaelib import __version__, files
from vaelib.errors import InputError, choose, typed
from vaelib.experiments.experiment import Experiment, Lines, Measured, Task, as_text

HERE = Path(__file__).parent.parent
TABLES = HERE / "results" if (HERE / "results").exists() else HERE.parent / "results"
"""The folder of the tables that came with the package: inside of it, or beside it in the repository."""

NUMBERS = ("metric", "at", "value", "standard_error")
PROVENANCE = ("seconds", "device", "threads", "torch", "vaelib", "date")
COUNT = "numbers"

NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?(?:nan|inf)")

WORDS = {"preset", "metric", "device", "torch", "vaelib", "date"}
"""The columns that hold words, even where they look like numbers."""

WHOLE = r"[0-9]{1,18}(?:\.0*)?"
"""Also as pandas writes it in a column where nothing stands somewhere."""

KINDS = {
    "seed": ("a whole number", re.compile(WHOLE)),
    "at": ("a whole number, or nothing", re.compile(rf"(?:{WHOLE})?")),
    "value": ("a number", NUMBER),
    "standard_error": ("a number, or nothing", re.compile(rf"(?:{NUMBER.pattern})?")),
    "seconds": ("a number", NUMBER),
    COUNT: ("a whole number, or nothing", re.compile(rf"(?:{WHOLE})?")),
}
"""What must stand in a column."""


# --- reading and grouping ---------------------------------------------------------------------------------------------


def load(experiment: Experiment, preset: str | None = None, folder: str | Path | None = None) -> DataFrame:
    """Return the measured numbers of an experiment's whole runs, a line each, in the order of its grid.

    Columns are those of the file, with numbers as numbers; where nothing stands it is NaN, or None among words. Runs
    that lack numbers are left out, and beside runs of the grid those of no configuration of it; a warning says so.
    :func:`vaelib.experiments.load` does it by name.

    Parameters
    ----------
    preset
        its numbers alone.
    folder
        where the table is; that of the tables that came with the package, if it is not given.

    Raises
    ------
    InputError
        if there are none; it says how to make them.
    """
    folder = TABLES if folder is None else folder
    if preset is not None:
        choose(f"preset of '{experiment.name}'", preset, experiment.presets)
    found = read(experiment, Path(folder))
    fits = whole(found, experiment)
    if lacking := set(keys(found[~fits], experiment)):
        warnings.warn(
            f"{len(lacking)} runs in '{path_of(experiment, Path(folder))}' lack numbers and are left out; "
            + making_anew(experiment, lacking, folder),
            stacklevel=2,
        )
    found = found[fits]
    if preset is not None:
        found = found[found["preset"] == preset]
    grid = [task.key[:-1] for each in experiment.presets for task in experiment.tasks(each, 1)]
    place = {key: i for i, key in enumerate(grid)}
    runs = keys(found, experiment)
    order = Series([place.get(key[:-1], -1) for key in runs], found.index, dtype=int)
    if strange := sorted({key for key in runs if key[:-1] not in place}):
        alone = (order < 0).all()
        name, has, other = difference(["preset", *experiment.keys], strange[0][:-1], place)
        warnings.warn(
            f"{len(strange)} runs in '{path_of(experiment, Path(folder))}' are of no configuration of the preset they "
            f"name, {'as all there' if alone else 'and are left out'}: the first has {name} {has!r}, not {other!r}",
            stacklevel=2,
        )
        found = found if alone else found[order >= 0]
    if wild := (~np.isfinite(found["value"].astype("float64"))).sum():
        warnings.warn(
            f"{wild} values in '{path_of(experiment, Path(folder))}' are not finite, nor is a mean with one of them",
            stacklevel=2,
        )
    if found.empty:
        raise InputError(
            f"'{folder}' has no results of '{experiment.name}'{f', preset {preset}' if preset else ''}: make them with "
            f"`{command(experiment, preset or 'short', folder)}`"
        )
    found = found.apply(lambda column: column if column.name in WORDS else as_numbers(column))
    found = found.astype({name: "float64" for name in ("at", "value", "standard_error", "seconds")})
    return (
        found.assign(order=order).sort_values(["order", "seed"], kind="stable", ignore_index=True).drop(columns="order")
    )


def command(experiment: Experiment, preset: str, folder: str | Path) -> str:
    """Return the command that makes the runs of a preset."""
    option = "" if folder in (TABLES, Path("results")) else f" --results {files.in_shell(Path(folder))}"
    return f"vaelib experiment run {experiment.name} --preset {preset}{option}"


def making_anew(experiment: Experiment, lacking: Collection[tuple[str, ...]], folder: str | Path) -> str:
    """Return what becomes of runs that lack numbers: which commands make them anew, and how many none makes."""
    made = {task.key: preset for preset in experiment.presets for task in experiment.tasks(preset)}
    presets = dict.fromkeys(made[key] for key in sorted(lacking) if key in made)
    commands = " and ".join(f"`{command(experiment, preset, folder)}`" for preset in presets)
    others = sum(key not in made for key in lacking)
    said = [f"{commands} makes them anew"] if commands else []
    return ", ".join(
        said + ([f"{others} are of no run of a preset (of another --seeds?): delete their lines"] if others else [])
    )


def select(frame: DataFrame, metric: str, at: int | None = None) -> DataFrame:
    """Return a metric's numbers, one a run: at a point of its curve, or for None what stands for the whole run."""
    here = frame["at"].isna() if at is None else frame["at"] == at
    return frame[(frame["metric"] == metric) & here]


def over_seeds(frame: DataFrame, by: Sequence[str], values: str = "value") -> DataFrame:
    """Return the ``mean`` of a column over the seeds, its ``standard_error`` and ``n``, for each combination of ``by``.

    Combinations are in order of appearance. The standard error is not a number for one seed; nothing is left out, so
    that one value that is not a number makes a mean that is none.
    """
    groups = frame.groupby(list(by), sort=False, dropna=False)[values]
    found = groups.agg(mean="mean", standard_error="sem", n="size")
    found.loc[groups.count() < found["n"], ["mean", "standard_error"]] = math.nan
    return found


def differences(frame: DataFrame, by: Sequence[str], **reference: Any) -> DataFrame:
    """Return the lines of ``frame`` with their ``value`` less that of their reference, paired by seed.

    The reference is the line of the same seed and the same columns ``by``, but for what ``reference`` puts in its
    columns: ``differences(nll, ["data", "method"], method="plain")``; a function gets ``frame``, as in
    :meth:`pandas.DataFrame.assign`. Lines without a reference are left out.
    """
    by = [*by, "seed"]
    values = frame.set_index(by)["value"]
    if not values.index.is_unique:
        raise InputError(
            f"several lines are the same in {', '.join(by)}: choose one {typed('preset')}, and one metric and place by "
            "select(frame, metric, at), of a table with one configuration of each"
        )
    partner = pd.MultiIndex.from_frame(frame.assign(**reference)[by])
    return frame.assign(value=frame["value"] - values.reindex(partner).to_numpy())[partner.isin(values.index)]


def curve(frame: DataFrame, metric: str) -> DataFrame:
    """Return a metric's curve over the seeds: ``mean``, ``standard_error`` and ``n`` by ``at``, in rising order."""
    points = frame[(frame["metric"] == metric) & frame["at"].notna()]
    return over_seeds(points, ["at"]).sort_index()


def plus_minus(found: DataFrame) -> Series:
    """Return "1.50 ± 0.25" for each mean and standard error, or "1.50" for a single seed."""
    parts = found[["mean", "standard_error", "n"]].itertuples(index=False)
    words = [f"{mean:.2f}" + (f" ± {error:.2f}" if n > 1 else "") for mean, error, n in parts]
    return Series(words, found.index, dtype=object)


def as_lines(words: DataFrame) -> Lines:
    """Return a data frame of words as the lines of a table, its index in front; a dash where nothing stands."""
    words = words.where(words.notna(), "-").reset_index()
    return [tuple(map(str, line)) for line in (words.columns, *words.itertuples(index=False))]


@dataclass(frozen=True)
class Table:
    """Lines of words, a header first; set in columns as text, and as a table in a notebook."""

    lines: Lines

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


# --- the file ---------------------------------------------------------------------------------------------------------


def columns(experiment: Experiment) -> list[str]:
    """Return the header of an experiment's table."""
    return ["preset", *experiment.keys, "seed", *NUMBERS, *PROVENANCE, COUNT]


def kinds(experiment: Experiment) -> dict[str, tuple[str, re.Pattern]]:
    """Return what must stand in the columns of an experiment's table: :data:`KINDS`, and the numbers of its grid.

    Where a grid has None, there is nothing.
    """
    found = {**KINDS, "preset": (" or ".join(experiment.presets), re.compile("|".join(experiment.presets)))}
    for name in experiment.keys:
        values = {config[name] for preset in experiment.presets.values() for config in preset.grid}
        if not any(isinstance(value, str) for value in values):
            kind, fits = ("a number", NUMBER) if any(isinstance(value, float) for value in values) else KINDS["seed"]
            found[name] = (kind, re.compile(f"(?:{fits.pattern}){'?' * (None in values)}"))
    return found


def fault(found: DataFrame, experiment: Experiment) -> tuple[int, str] | None:
    """Return the first line that no run of the experiment can have, and what is the matter with it."""
    for name, (kind, fits) in (known := kinds(experiment)).items():
        for line, text in found[name].items():
            if not fits.fullmatch(text):
                return line, f"has {name} {text!r}, not {kind}"
    names = ["preset", *(name for name in experiment.keys if name not in known)]
    arms = {
        (name, *(cell[key] for key in names[1:])) for name, each in experiment.presets.items() for cell in each.grid
    }
    for line, *arm in found[names].itertuples(name=None):
        if tuple(arm) not in arms:
            name, has, other = difference(names, arm, arms)
            return line, f"is of no run of '{experiment.name}': its {name} is {has!r}, not {other!r}"
    for line, metric, at in found[["metric", "at"]].itertuples(name=None):
        if metric not in (known := experiment.curves if at else experiment.metrics):
            return line, f"has metric {metric!r}{' at ' * bool(at)}{at}, not {' or '.join(known) or 'at a place'}"
    runs = keys(found, experiment)
    numbers = zip(runs, found["metric"], found["at"].map(canonical), strict=True)
    again = Series([*numbers], found.index, dtype=object).duplicated()
    if again.any():
        return again.idxmax(), "repeats a number of the same run"
    made = found[[*PROVENANCE]]
    other = made != (first := made.groupby(Series(runs, found.index, dtype=object)).transform("first"))
    if other.any(axis=None):
        line = other.any(axis=1).idxmax()
        name = other.loc[line].idxmax()
        has, had = made.at[line, name], first.at[line, name]
        return line, f"is of another making of its run than the first of its lines: it has {name} {has!r}, not {had!r}"
    return None


def difference(names: Sequence[str], arm: Sequence[str], arms: Iterable[tuple[str, ...]]) -> tuple[str, str, str]:
    """Return the first setting by which ``arm`` differs from the most alike of ``arms``: its name, and both values."""
    alike = {sum(map(eq, arm, other)): other for other in sorted(arms) if other[0] == arm[0]}
    return next(each for each in zip(names, arm, alike[max(alike)]) if each[1] != each[2])


def path_of(experiment: Experiment, folder: Path) -> Path:
    """Return the table of an experiment in ``folder``."""
    return folder / f"{experiment.name}.csv"


def read(experiment: Experiment, folder: Path) -> DataFrame:
    """Return an experiment's table as it stands there, every field as text; empty if there is no file.

    In a table of before runs were counted the count is empty, and stays so.

    Raises
    ------
    InputError
        if the file is no such table; it names the line.
    """
    path, header = path_of(experiment, folder), columns(experiment)
    lines = files.read_table(path, header, header[:-1]) or {}
    found = DataFrame(list(lines.values()), index=list(lines), columns=header, dtype=object)
    runs = keys(found, experiment)
    found[COUNT] = found[COUNT].fillna("")
    if (found[COUNT] == "").any():
        warnings.warn(f"'{path}' does not say how many numbers a run has: whether it lacks some cannot be told")
    if lines and not files.is_ended(path) and runs.count(runs[-1]) == 1:
        found.loc[found.index[-1], COUNT] = "0"
    found = found.assign(**{name: found[name].map(canonical) for name in experiment.keys})
    if wrong := fault(found, experiment):
        line, what = wrong
        raise InputError(f"line {line} of '{path}' {what}: mend that line or delete it; nothing was written")
    return found.assign(**{name: found[name].map(canonical) for name in ("seed", "at", COUNT)}).reset_index(drop=True)


def whole(found: DataFrame, experiment: Experiment) -> Series:
    """Tell of each line whether its run has all its numbers, as many as each of its lines says."""
    runs = Series(keys(found, experiment), found.index, dtype=object)
    fits = (found[COUNT] == "") | (runs.map(runs.value_counts()).astype(str) == found[COUNT].str.lstrip("0"))
    return ~runs.isin(set(runs[~fits]))


def finished(experiment: Experiment, folder: Path) -> set[tuple[str, ...]]:
    """Return the keys of the whole runs that the table holds, as :attr:`Task.key` has them."""
    found = read(experiment, folder)
    return set(keys(found[whole(found, experiment)], experiment))


def loaded_runs(found: DataFrame, experiment: Experiment) -> set[tuple[str, ...]]:
    """Return the keys of the runs of a table that :func:`load` has returned, as :attr:`Task.key` has them."""
    runs = found[["preset", *experiment.keys, "seed"]].drop_duplicates().astype(object)
    return {tuple(map(as_text, run)) for run in runs.where(runs.notna(), None).itertuples(index=False)}


def add(experiment: Experiment, task: Task, measured: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Add what a run measured to the table, unless it holds that run already; the table is whole at any moment."""
    with files.locked_around(path_of(experiment, folder)):
        found = read(experiment, folder)
        here = Series([key == task.key for key in keys(found, experiment)], found.index, dtype=bool)
        if (here & whole(found, experiment)).any():
            return
        if wrong := fault(new := rows(experiment, task, measured), experiment):
            raise InputError(f"what run {' '.join(task.key)} of '{experiment.name}' measured {wrong[1]}")
        table = pd.concat([found[~here], new])
        files.write(path_of(experiment, folder), table.to_csv(index=False, lineterminator="\n").encode())


def rows(experiment: Experiment, task: Task, measured: Sequence[Mapping[str, Any]]) -> DataFrame:
    """Return the lines of a table that hold what a run measured."""
    known = {**dict(zip(("preset", *experiment.keys, "seed"), task.key, strict=True)), COUNT: str(len(measured))}
    new = [{**known, **{name: as_text(value) for name, value in number.items()}} for number in measured]
    return DataFrame(new, columns=columns(experiment), dtype=object)


def is_measured(one: Any) -> bool:
    """Tell whether something is a number that a run measured, with its provenance."""
    return (
        isinstance(one, dict)
        and set(one) == {*NUMBERS, *PROVENANCE}
        and all(isinstance(value, str | int | float | None) for value in one.values())
    )


def with_provenance(
    measured: Iterable[Measured], seconds: float, device: str, code: str | None = None
) -> list[dict[str, Any]]:
    """Return what a run measured, each number with what it was measured with; ``code``, if not by this one alone."""
    import torch

    provenance = {
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "vaelib": code or CODE,
        "date": datetime.date.today().isoformat(),
    }
    return [
        {"metric": m.metric, "at": m.at, "value": m.value, "standard_error": m.standard_error, **provenance}
        for m in measured
    ]


def processor() -> str:
    """Return the processor's name, as the system tells it; "cpu" where it does not."""
    with suppress(InputError):  # it may be hidden
        text = files.read_text(Path("/proc/cpuinfo")) or ""
        if found := re.search(r"^model name[ \t]*:[ \t]*(.+)", text, re.MULTILINE):
            return found[1].strip()
    return platform.processor() or platform.machine() or "cpu"


def code_version(file: Path | None = None) -> str:
    """Return the version of the package, with the commit if it runs from a checkout, which ``file`` then belongs to.

    What is changed and not committed in that file's folder makes it "dirty"; a table of results does not.
    """
    file = file or Path(__file__).parents[1] / "__init__.py"

    def git(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=file.parent)

    try:
        if git("ls-files", "--error-unmatch", file.name).returncode:
            return __version__
        found, changed = git("describe", "--always"), git("diff", "--quiet", "HEAD", "--", ".").returncode
    except OSError:
        return __version__
    return __version__ if found.returncode else f"{__version__}+{found.stdout.strip()}{'-dirty' if changed else ''}"


CODE = code_version()
"""The version of the code that was loaded, whatever is committed while its runs are made."""


def keys(found: DataFrame, experiment: Experiment) -> list[tuple[str, ...]]:
    """Return the key of the run of each line, with numbers as :attr:`Task.key` writes them: 0.001 for 1.00E-03."""
    return [tuple(map(canonical, key)) for key in found[["preset", *experiment.keys, "seed"]].to_numpy()]


@functools.cache
def canonical(text: str) -> str:
    """Return the text that stands for the number in ``text``; words as they are."""
    for kind in (int, float) if NUMBER.fullmatch(text) else ():
        with suppress(ValueError):
            return as_text(kind(text))
    return text


def as_numbers(column: Series) -> Series:
    """Return a column of text as whole numbers, or as numbers with NaN where nothing stands, or else as words."""
    with suppress(ValueError, OverflowError):
        return column.astype("int64")
    with suppress(ValueError):
        return column.where(column != "", "nan").astype("float64")
    return column.where(column != "", None)
