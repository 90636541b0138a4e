"""What an experiment is: a grid of configurations as data, a function that makes one run, a summary of the runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pandas import DataFrame

from vaelib.errors import InputError, choose, whole_number

MOST_SEEDS = 100_000
"""Runs of a configuration that one command makes."""

Plain = str | int | float | None
Cell = Mapping[str, Plain]
Report = Callable[[float], None]
Lines = list[tuple[str, ...]]
"""Of a table: a header, then the lines, all words."""


@dataclass(frozen=True)
class Measured:
    """One number that a run gave.

    Attributes
    ----------
    metric
        what was measured, such as "nll".
    value, standard_error
        the number, and its standard error where one run has one.
    at
        the epoch or step, for a curve.
    """

    metric: str
    value: float
    standard_error: float | None = None
    at: int | None = None


@dataclass(frozen=True)
class Preset:
    """How large an experiment is made.

    Attributes
    ----------
    grid
        the configurations, flat and plain; all of an experiment have the same keys.
    seeds
        runs of each configuration, unless asked otherwise: seeds 0, 1, ...; or a function of the configuration.
    minutes
        what all of it takes one core of a laptop, roughly.
    """

    grid: Sequence[Cell]
    seeds: int | Callable[[Cell], int]
    minutes: float

    def seeds_of(self, config: Cell) -> int:
        """Return how many runs of a configuration belong to it."""
        return self.seeds(config) if callable(self.seeds) else self.seeds

    @property
    def runs(self) -> int:
        """How many runs belong to it."""
        return sum(map(self.seeds_of, self.grid))


@dataclass(frozen=True)
class Task:
    """One run of an experiment: a configuration and a seed."""

    experiment: str
    preset: str
    config: Cell
    seed: int

    @property
    def key(self) -> tuple[str, ...]:
        """What sets this run apart within its experiment, as text in a table of results."""
        return (self.preset, *map(as_text, self.config.values()), str(self.seed))

    @property
    def name(self) -> str:
        """A name for its folder: the short words of its configuration, and a fingerprint of all of it."""
        fingerprint = hashlib.sha256(json.dumps(dict(self.config)).encode()).hexdigest()[:8]
        words = [value for value in self.config.values() if isinstance(value, str)]
        return "-".join([*words[:4], fingerprint, f"seed{self.seed}"])


@dataclass(frozen=True)
class Experiment:
    """A table or a figure of a paper, or one of our own, that can be made again with one command.

    Attributes
    ----------
    name, reproduces
        its name on the command line, and what it reproduces.
    presets
        "smoke" (seconds), "short" (minutes to hours of two cores), "paper" (as published) and others, or some of them.
    run
        ``run(config, seed, folder, device, report)`` makes one run. Checkpoints go to ``folder``, so that a killed run
        goes on; ``report(fraction)`` says how far it is.
    table
        its table, from its results (:func:`vaelib.experiments.load`) of one preset.
    figure
        draws these on a matplotlib Figure.
    metrics, curves
        what is measured of a whole run, and what on its way.
    gather
        ``gather(preset, folders, results_folder)``, if the runs leave more than numbers in their folders: puts that
        beside the table.
    together
        ``together(tasks, folder, device, add)``, if many runs can be made as one on a GPU: makes them, and calls
        ``add(task, measured, seconds)`` for each.
    on_cpu
        whether its runs are made on the CPU, whatever device is asked for.
    """

    name: str
    reproduces: str
    presets: Mapping[str, Preset]
    run: Callable[[Cell, int, Path, str, Report], Sequence[Measured]]
    table: Callable[[DataFrame], Lines]
    figure: Callable[[DataFrame, Any], None]
    metrics: Sequence[str] = ()
    curves: Sequence[str] = ()
    gather: Callable[[str, Sequence[Path], Path], None] = lambda preset, folders, results_folder: None
    together: Callable[[Sequence[Task], Path, str, Callable[[Task, list[Measured], float], None]], None] | None = None
    on_cpu: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """The names in a configuration."""
        return tuple(next(iter(self.presets.values())).grid[0])

    def tasks(self, preset: str, seeds: int | None = None) -> list[Task]:
        """Return the runs of a preset, in the order of its grid.

        Raises
        ------
        InputError
            for a preset it does not have, or less than one seed.
        """
        chosen = choose(f"preset of '{self.name}'", preset, self.presets)
        if seeds is not None:
            whole_number("seeds", seeds, least=1, most=MOST_SEEDS)
        for config in chosen.grid:
            if tuple(config) != self.keys:
                raise InputError(f"a configuration of '{self.name}' has the keys {list(config)}, not {list(self.keys)}")
        return [
            Task(self.name, preset, config, seed)
            for config in chosen.grid
            for seed in range(chosen.seeds_of(config) if seeds is None else seeds)
        ]


def as_text(value: Plain) -> str:
    """Return the word that stands for ``value`` in a table of results; nothing for None."""
    return "" if value is None else f"{value:.10g}" if isinstance(value, float) else str(value)
