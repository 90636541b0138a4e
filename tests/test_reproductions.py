"""The negative controls of what the book says of ``results/``, on its own checks: a fault in the results fails them."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import nbformat
import numpy as np
import pytest
from pandas import DataFrame

from vaelib import checks, experiments

ROOT = Path(__file__).parent.parent


def cells_of(notebook: str) -> list:
    return nbformat.read(ROOT / "book" / notebook, as_version=4).cells


CELLS = cells_of("reproductions.ipynb")
SOURCES = {cell.id: cell.source for cell in CELLS if cell.cell_type == "code"}
CHECKS = {cell.id: cell.source for cell in CELLS if "check" in cell.metadata.get("tags", [])}
DEFINITIONS = [cell.source for cell in CELLS if cell.id not in CHECKS and re.search("^def ", cell.source, re.MULTILINE)]
stored = functools.cache(experiments.load)

ONE_LAYER = {"metric": "nll", "recipe": "paper", "data": "mnist", "model": "mlp-1"}
SCHEDULE = {"metric": "nll", "model": "mlp-1", "samples": 1000}
RELEASED = {**ONE_LAYER, "recipe": "released"}
ELBO, LOG_P = {"metric": "elbo"}, {"metric": "log-likelihood"}
DIGITS, CLOTHES = ({"data": name, "latent": "gaussian"} for name in ("digits", "fashion-mnist"))
GUIDED = {**ELBO, "data": "mnist", "estimator": "elbo-disarm", "method": "linear decoder"}
LAST = {"metric": "mi_all", "at": None}

FAULTS = {
    "schedule-check": [
        ("ahead of total at every", {**SCHEDULE, "epochs": 40, "estimator": "elbo-path"}, lambda nll: nll + 0.5),
        ("and the gain falls", {**SCHEDULE, "epochs": 121, "estimator": "elbo-path"}, lambda nll: nll - 1),
        ("later stages", {**SCHEDULE, "epochs": 364, "estimator": "elbo-path", "seed": 0}, lambda nll: nll + 0.6),
    ],
    "schedule-dreg": [
        ("IWAE path ahead", {"metric": "nll", "k": 5, "epochs": 13, "estimator": "iwae-path"}, lambda nll: nll + 0.15),
    ],
    "figure-1-check": [
        ("total ends above", {"metric": "final kl", "estimator": "elbo-total", "seed": 3}, lambda kl: 0.2),
        ("path ends over a thousand", {"metric": "final kl", "estimator": "elbo-path"}, lambda kl: 1e4 * kl),
    ],
    "figure-3-check": [
        ("at the target path is silent", {"metric": "path", "at": 100, "seed": 0}, lambda spread: 1e-3),
        ("and the score is not", {"metric": "score", "at": 100, "seed": 0}, lambda spread: 0.0),
    ],
    "table-2-check": [
        ("one draw", {**ONE_LAYER, "estimator": "elbo-path", "k": 1, "seed": 0}, lambda nll: nll + 1),
        ("five draws", {**ONE_LAYER, "estimator": "iwae-dreg", "k": 5}, lambda nll: nll + 1),
        ("the importance-weighted", {**ONE_LAYER, "estimator": "iwae-path", "k": 50}, lambda nll: nll + 0.6),
    ],
    "table-2-behind": [
        ("two layers", {**ONE_LAYER, "model": "mlp-2", "estimator": "iwae-total", "k": 50}, lambda nll: nll - 1),
    ],
    "table-2-released": [
        ("released recipe, .*mlp-1.*total", {**RELEASED, "estimator": "elbo-total", "seed": 0}, lambda nll: nll - 3),
    ],
    "silent-linear-check": [
        (
            "silent: the highest",
            {**ELBO, "latent": "bernoulli", "estimator": "elbo-disarm", "at": 15},
            lambda elbo: elbo + 3,
        ),
        ("silent: ahead early", {**ELBO, **DIGITS, "estimator": "elbo-path", "at": 3}, lambda elbo: elbo + 2),
        ("silent: least lost", {**ELBO, **DIGITS, "estimator": "elbo-silent", "lr": 0.001}, lambda elbo: elbo - 20),
        ("no best rate", {**ELBO, **CLOTHES, "estimator": "elbo-total", "lr": 0.1, "at": 15}, lambda elbo: 1e3),
    ],
    "silent-annealed-check": [
        ("the guided start lower", {**ELBO, "method": "linear", "at": 3}, lambda elbo: elbo + 90),
        ("four of them end lower", {**LOG_P, "data": "omniglot", "method": "plain"}, lambda log_p: log_p - 9),
        ("and none ends higher", {**LOG_P, "data": "fashion-mnist", "method": "linear"}, lambda log_p: log_p + 9),
    ],
    "silent-annealed-start": [
        ("start lower with every seed", {**ELBO, "method": "plain", "at": 3, "seed": 1}, lambda elbo: elbo - 9),
    ],
    "silent-annealed-long-check": [
        ("ten seeds each", {**LOG_P, "method": "plain", "seed": 3, "data": "mnist"}, lambda log_p: math.nan),
        ("none ends higher", {**LOG_P, "method": "cosine", "data": "mnist"}, lambda log_p: log_p + 9),
        ("none ends lower", {**LOG_P, "method": "linear", "data": "mnist"}, lambda log_p: log_p - 9),
    ],
    "silent-control-variate-check": [
        ("a tenth of the variance", {"metric": "variance ratio"}, lambda ratio: ratio + 0.2),
        ("twice the time", {"metric": "cost ratio", "data": "mnist"}, lambda ratio: 2 * ratio),
        ("the bound gains", GUIDED, lambda elbo: elbo - 13.5),
        ("no gain is a loss", GUIDED, lambda elbo: elbo - 60),
    ],
    "lag-toy-check": [
        ("toy: over a fifth of a nat", {**LAST, "method": "anneal", "seed": 1}, lambda mi: 0.6),
        ("worse than no z's", {"metric": "nll", "method": "sa-vae"}, lambda nll: nll - 0.6),
    ],
    "lag-toy-long-check": [
        ("toy, long", {"metric": "nll", "method": "aggressive"}, lambda nll: nll + 0.2),
    ],
    "lag-text-check": [
        ("Treebank: the cures alone", {"metric": "au", "at": None, "method": "plain", "seed": 3}, lambda au: 1),
        ("aggressive: one unit", {"metric": "kl", "at": None, "method": "aggressive"}, lambda kl: kl + 0.3),
    ],
    "lag-text-kept": [
        ("over half of it is lost", {"metric": "mi_all", "at": 12, "method": "aggressive"}, lambda mi: mi + 0.2),
    ],
    "lag-text-long-check": [
        ("ten seeds", {"metric": "nll", "method": "plain", "seed": 3}, lambda nll: math.nan),
        ("Treebank, end", {"metric": "nll", "method": "aggressive-anneal"}, lambda nll: nll + 0.3),
        ("all four units", {"metric": "au", "at": None, "method": "sa-vae-anneal", "seed": 3}, lambda au: 3),
        ("aggressive training: undecided", {"metric": "nll", "method": "aggressive-anneal"}, lambda nll: nll - 0.2),
    ],
    "lag-text-middle-check": [
        ("plain collapses", {"metric": "au", "at": None, "method": "plain", "seed": 5}, lambda au: 1),
        ("both are ahead", {"metric": "nll", "method": "aggressive"}, lambda nll: nll + 0.3),
    ],
    "lag-text-middle-early": [
        (
            "annealed SA-VAE: two seeds",
            {"metric": "au", "at": None, "method": "sa-vae-anneal", "preset": "middle", "seed": 0},
            lambda au: 4,
        ),
    ],
    "lag-omniglot-check": [
        ("images: aggressive", {"metric": "kl", "at": None, "method": "aggressive", "seed": 0}, lambda kl: kl / 3),
    ],
    "lag-images-search-check": [
        ("no place where three", {"metric": "au", "data": "omniglot", "side": 8}, lambda au: 0),
        ("two seeds do", {"metric": "au", "data": "mnist", "side": 8, "seed": 2}, lambda au: 0),
        ("the larger the images", {"metric": "kl", "at": None, "data": "omniglot", "side": 20}, lambda kl: kl / 9),
    ],
    "lag-images-cures-check": [
        ("8 × 8: plain keeps", {"metric": "au", "at": None, "method": "plain", "seed": 5}, lambda au: 1),
        ("two are behind no z", {"metric": "nll", "method": "no-z"}, lambda nll: nll + 0.03),
        ("the rest within", {"metric": "nll", "method": "cyclical", "seed": 3}, lambda nll: nll + 0.5),
        ("z tells more", {"metric": "mi_all", "at": None, "method": "aggressive"}, lambda mi: mi - 0.04),
    ],
}
"""For each check cell what its lines say, and a fault to be found: rows of one kind, and what stands there instead."""

NEEDS = {
    "schedule-check": ["schedule-table"],
    "schedule-dreg": ["schedule-table"],
    "silent-annealed-start": ["silent-annealed-check"],
    "table-2-released": ["table-2-behind"],
    "lag-text-kept": ["lag-text-check"],
    "lag-images-search-check": ["lag-images-search-table"],
}
"""What a check takes names from."""


READING = {
    "02-score-and-path.ipynb": ("cell-057", "cell-058"),
    "04-silent-and-nonlinear.ipynb": ("cell-010", "cell-011", "cell-012", "guided-end", "guided-end-check"),
    "05-inference-lag.ipynb": ("lag-seeds-check", "lag-summary", "lag-summary-check"),
    "08-choosing.ipynb": ("cell-046", "cell-047"),
}
"""The cells of a chapter that read results, and those they take names from."""
IMPORTS = """
import torch
from matplotlib import pyplot as plt
from vaelib import checks, experiments, plots
from vaelib.experiments import lag, silent as study
label = str
"""

TOY, TREEBANK = {"data": "synthetic-text", "at": None}, {"data": "ptb", "at": None}
PAPER = {"metric": "nll", "recipe": "paper", "data": "mnist"}

GAIN = {"metric": "nll", "k": 1, "estimator": "elbo-path"}

EARLY = {"preset": "short", "metric": "log-likelihood"}
ENDED, BEST = ({"preset": "long", "metric": metric} for metric in ("log-likelihood", "best elbo"))
LOO = {"estimator": "elbo-score-loo"}
CHAPTER_FAULTS = {
    "02-score-and-path.ipynb": [
        ("mlp-1, 121 epochs: ten seeds", {**GAIN, "model": "mlp-1", "epochs": 121, "seed": 3}, lambda nll: math.nan),
        ("mlp-2, 40 epochs: path is ahead", {**GAIN, "model": "mlp-2", "epochs": 40}, lambda nll: nll + 1),
        ("mlp-1: the gain falls", {**GAIN, "model": "mlp-1", "epochs": 40}, lambda nll: nll - 1),
        ("mlp-1, 1 epochs: by 1.6 nats", {**GAIN, "model": "mlp-1", "epochs": 1}, lambda nll: nll + 0.2),
    ],
    "04-silent-and-nonlinear.ipynb": [
        ("exact guide: no gain", {**EARLY, "data": "fashion-mnist", "method": "linear"}, lambda log_p: log_p + 9),
        ("the guide loses in each", {**EARLY, **LOO, "data": "omniglot", "method": "linear"}, lambda log_p: log_p + 7),
        ("more than its control", {**EARLY, "data": "omniglot", "method": "linear, sampled"}, lambda log_p: log_p - 9),
        ("seven of the eight", {**EARLY, **LOO, "data": "mnist", "method": "linear"}, lambda log_p: log_p - 1.5),
        ("ten seeds each", {**ENDED, "data": "mnist", "method": "cosine", "seed": 2}, lambda log_p: math.nan),
        ("no gain is beyond", {**ENDED, "data": "mnist", "method": "cosine"}, lambda log_p: log_p + 9),
        ("nor is any loss", {**ENDED, "data": "mnist", "method": "cosine"}, lambda log_p: log_p - 9),
        ("in the ELBO one loss", {**BEST, "data": "mnist", "method": "cosine"}, lambda elbo: elbo - 2),
    ],
    "05-inference-lag.ipynb": [
        ("plain: no active unit", {**TOY, "metric": "au", "method": "plain", "seed": 3}, lambda au: 1),
        ("aggressive: one", {**TOY, "metric": "au", "method": "aggressive", "seed": 2}, lambda au: 0),
        ("nats are left", {**TOY, "metric": "mi_all", "method": "aggressive", "seed": 7}, lambda mi: mi - 0.2),
        ("below the highest", {**TOY, "metric": "mi_all", "method": "aggressive", "at": 1}, lambda mi: mi + 2),
        ("toy: only work", {**TOY, "metric": "au", "method": "anneal"}, lambda au: 1),
        ("Treebank: only work", {**TREEBANK, "metric": "au", "method": "free-bits"}, lambda au: 1),
        ("free bits pay", {**TOY, "metric": "mi_all", "method": "free-bits"}, lambda mi: mi + 0.3),
        ("digits: what z tells", {**LAST, "data": "digits", "method": "aggressive"}, lambda mi: mi / 2),
        ("a weight of 0.4", {**LAST, "data": "digits", "method": "beta-0.4"}, lambda mi: mi / 2),
        ("toy, early: behind no z", {**TOY, "metric": "nll", "method": "aggressive", "seed": 5}, lambda nll: nll - 1),
        ("Treebank, end", {"preset": "long", "metric": "nll", "method": "bn-vae"}, lambda nll: nll + 0.3),
    ],
    "08-choosing.ipynb": [
        ("lead all others", {**PAPER, "model": "mlp-1", "estimator": "iwae-dreg", "k": 50}, lambda nll: nll + 1),
        ("two layers", {**PAPER, "model": "mlp-2", "estimator": "iwae-total", "k": 50}, lambda nll: nll + 0.3),
    ],
}


def sources_of(name: str) -> list[str]:
    """Return a check of the reproductions, or the cells of a chapter that read results, after what they need."""
    if name in READING:
        sources = {cell.id: cell.source for cell in cells_of(name)}
        return [IMPORTS, *(sources[cell] for cell in READING[name])]
    return [*DEFINITIONS, *(SOURCES[cell] for cell in (*NEEDS.get(name, ()), name))]


def with_fault(where: dict, fault) -> Callable[[DataFrame], DataFrame]:
    """Return what puts a fault into the lines that have what ``where`` says, None for nothing."""

    def change(found: DataFrame) -> DataFrame:
        if not where.keys() <= set(found):
            return found
        touched = [found[key].isna() if value is None else found[key] == value for key, value in where.items()]
        return found.assign(value=found["value"].mask(np.logical_and.reduce(touched), found["value"].map(fault)))

    return change


def run(name: str, monkeypatch, change=lambda found: found) -> None:
    """Run one check of the reproductions, or a chapter's, on results that are not what was measured."""
    monkeypatch.setattr(
        experiments,
        "load",
        lambda experiment, preset, folder=None: change(stored(experiment, preset, ROOT / "results")),
    )
    space: dict = {}
    with mpl.rc_context():
        for source in sources_of(name):
            exec(source, space)


def test_every_claim_has_a_control():
    claims = {name: len(re.findall(r"checks\.(?:holds|below)\(", source)) for name, source in CHECKS.items()}
    assert claims == {name: len(faults) for name, faults in FAULTS.items()}


@pytest.mark.parametrize("name", [*CHECKS, *READING])
def test_the_results_pass(name, monkeypatch):
    run(name, monkeypatch)


@pytest.mark.parametrize(
    ("name", "says", "where", "fault"),
    [
        pytest.param(name, *fault, id=fault[0])
        for name, faults in {**FAULTS, **CHAPTER_FAULTS}.items()
        for fault in faults
    ],
)
def test_a_fault_in_the_results_fails_its_check(name, says, where, fault, monkeypatch):
    with pytest.raises(AssertionError, match=says):
        run(name, monkeypatch, with_fault(where, fault))


@pytest.mark.parametrize("change", [lambda found: found.assign(value=math.nan), lambda found: found[:0]])
@pytest.mark.parametrize("name", CHECKS)
def test_no_claim_holds_for_no_numbers(name, change, monkeypatch):
    held = []
    for kind in ("holds", "below"):
        check = getattr(checks, kind)

        def noted(*arguments, check=check):
            with contextlib.suppress(AssertionError):
                check(*arguments)
                held.append(arguments[-1])

        monkeypatch.setattr(checks, kind, noted)
    with contextlib.suppress(AssertionError, LookupError, ValueError):  # what cannot even be computed
        run(name, monkeypatch, change)
    assert held == []


def test_a_run_that_lacks_is_no_seed_less(monkeypatch):
    with pytest.raises(AssertionError, match="not complete"):
        run("lag-toy-check", monkeypatch, lambda found: found[(found["method"] != "sa-vae") | (found["seed"] != 4)])
