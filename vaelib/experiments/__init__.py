"""The papers' tables and figures, and our own: each an experiment that one command makes.

``vaelib experiment run NAME --preset short`` runs its grid (:mod:`vaelib.experiments.grid`), each run adds its numbers
to ``results/NAME.csv`` (:mod:`vaelib.experiments.results`), ``vaelib experiment show NAME`` and the chapters read them.
To add an experiment, write it as data with a function for one run (:class:`Experiment`) and list it in
:data:`EXPERIMENTS`.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from pandas import DataFrame

from vaelib.errors import choose
from vaelib.experiments import results
from vaelib.experiments.experiment import Experiment, Measured, Preset, Task
from vaelib.experiments.results import TABLES, Table, curve, differences, over_seeds, plus_minus, select

__all__ = [
    "EXPERIMENTS", "TABLES", "Experiment", "Measured", "Preset", "Table", "Task", "curve", "differences", "find",
    "load", "over_seeds", "plus_minus", "select",
]  # fmt: skip

EXPERIMENTS = {
    "stl-table-2": "stl",
    "stl-schedule": "schedule",
    "stl-figure-1": "stl",
    "stl-figure-3": "stl",
    "silent-linear": "silent",
    "silent-annealed": "silent",
    "silent-control-variate": "silent",
    "lag-toy": "lag",
    "lag-text": "lag",
    "lag-omniglot": "lag",
    "lag-images": "lag",
    "flow-ring": "flow",
    "flow-vae": "flow",
}
"""The experiments by name, and the module each is in."""


def find(name: str) -> Experiment:
    """Return an experiment by name.

    Raises
    ------
    InputError
        if there is none of that name.
    """
    module = importlib.import_module(f"vaelib.experiments.{choose('experiment', name, EXPERIMENTS)}")
    return module.EXPERIMENTS[name]


def load(name: str, preset: str | None = None, folder: str | Path | None = None) -> DataFrame:
    """Return what an experiment measured, by name; see :func:`vaelib.experiments.results.load`."""
    return results.load(find(name), preset, folder)
