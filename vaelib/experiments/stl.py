"""The experiments of "Sticking the Landing" (Roeder, Wu and Duvenaud 2017): its Table 2 and its Figures 1 and 3."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from pandas import DataFrame
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from vaelib import gradients, objectives, plots, runs
from vaelib.config import Config
from vaelib.errors import InputError
from vaelib.estimators import ESTIMATORS
from vaelib.experiments.experiment import Cell, Experiment, Lines, Measured, Preset, Report
from vaelib.experiments.results import curve, differences, over_seeds, plus_minus, select
from vaelib.posteriors import DiagonalGaussian, Mixture

# --- Table 2: test log-likelihoods ------------------------------------------------------------------------------------

RECIPES: Mapping[str, Mapping[str, object]] = {
    "paper": {"schedule": "burda", "batch_size": 20, "lr": 1e-3, "adam_eps": 1e-4},
    "released": {
        "schedule": "burda",
        "batch_size": 20,
        "lr": 1e-3,
        "adam_eps": 1e-4,
        "optimizer": "adam-released",
        "shuffle": False,
    },
}
"""How to train: as the paper says, and as the code that was released with it does."""

PUBLISHED: Mapping[tuple[str, int, str], tuple[float, ...]] = {
    ("mnist", 1, "elbo-total"): (86.76, 86.47, 86.35),
    ("mnist", 1, "elbo-path"): (86.40, 86.33, 86.48),
    ("mnist", 1, "iwae-total"): (86.76, 85.54, 84.78),
    ("mnist", 1, "iwae-path"): (86.40, 85.20, 84.45),
    ("mnist", 2, "elbo-total"): (85.33, 85.01, 84.78),
    ("mnist", 2, "elbo-path"): (84.77, 84.68, 84.33),
    ("mnist", 2, "iwae-total"): (85.33, 83.89, 82.90),
    ("mnist", 2, "iwae-path"): (84.77, 83.57, 83.16),
    ("omniglot", 1, "elbo-total"): (108.11, 107.62, 107.80),
    ("omniglot", 1, "elbo-path"): (107.39, 107.40, 107.42),
    ("omniglot", 1, "iwae-total"): (108.11, 106.12, 104.67),
    ("omniglot", 1, "iwae-path"): (107.39, 105.42, 104.16),
    ("omniglot", 2, "elbo-total"): (107.58, 106.31, 106.30),
    ("omniglot", 2, "elbo-path"): (105.22, 104.87, 105.70),
    ("omniglot", 2, "iwae-total"): (107.56, 104.79, 103.38),
    ("omniglot", 2, "iwae-path"): (105.22, 103.59, 102.86),
}
"""Test negative log-likelihoods in nats (their Table 2) for k = 1, 5, 50, by data set, stochastic layers, estimator."""

KS = (1, 5, 50)

COMPILED_FROM = 10
"""Epochs from which on the seconds that compiling takes come back."""


def cells(data: str, ks: Iterable[int], epochs: int, samples: int) -> list[Cell]:
    """Return the cells of Table 2 for one data set, few draws first; for each k what the paper has, then what it lacks.

    With one draw the VAE and the IWAE are the same, and so are path and DReG.
    """
    grid = []
    for k in ks:
        totals_and_paths = (
            ["elbo-total", "elbo-path"] if k == 1 else ["elbo-total", "elbo-path", "iwae-total", "iwae-path"]
        )
        arms = [*itertools.product(("mlp-1", "mlp-2"), totals_and_paths)]
        if k > 1:
            arms += [("mlp-1", "iwae-dreg"), ("mlp-2", "iwae-dreg")]
        arms += [("mlp-2-detached", estimator) for estimator in totals_and_paths if estimator.endswith("-path")]
        grid += [cell(data, model, estimator, k, epochs, samples) for model, estimator in arms]
    return grid


def released(data: str, epochs: int, samples: int) -> list[Cell]:
    """Return the cells that the released code's recipe is tried in."""
    arms = [("mlp-1", "elbo-total"), ("mlp-1", "elbo-path"), ("mlp-2", "elbo-total"), ("mlp-2-detached", "elbo-path")]
    return [cell(data, model, estimator, 1, epochs, samples, "released") for model, estimator in arms]


def cell(data: str, model: str, estimator: str, k: int, epochs: int, samples: int, recipe: str = "paper") -> Cell:
    """Return one cell of Table 2."""
    return {
        "data": data,
        "model": model,
        "estimator": estimator,
        "k": k,
        "recipe": recipe,
        "epochs": epochs,
        "samples": samples,
    }


def config_of(config: Cell, seed: int, device: str, recipe: str, compile: bool) -> Config:
    """Return the run that trains a cell by a recipe."""
    return Config(
        data=config["data"],
        binarisation="dynamic",
        model=config["model"],
        estimator=config["estimator"],
        k=config["k"],
        epochs=config["epochs"],
        seed=seed,
        device=device,
        compile=compile,
        **RECIPES[recipe],
    )


def train_and_evaluate(config: Cell, seed: int, folder: Path, device: str, report: Report) -> list[Measured]:
    """Train one cell of Table 2 and estimate -log p(x) of the test images."""
    run = config_of(config, seed, device, config["recipe"], compile=config["epochs"] >= COMPILED_FROM)
    training = runs.train(folder / "model", run, report=lambda fraction: report(0.9 * fraction))["training"]
    return measured(runs.evaluate(folder / "model", samples=config["samples"], device=device), training["seconds"])


def measured(found: Mapping[str, Any], seconds: float) -> list[Measured]:
    """Return the numbers of a trained cell: what was ``found`` by :func:`vaelib.runs.measure`, and its cost."""
    active = [Measured(f"active units, layer {i}", n) for i, n in enumerate(found["active_units"], start=1)]
    return [
        Measured("nll", found["nll"], found["nll_error"]),
        Measured("bound", found["bound"]),
        *active,
        Measured("training seconds", seconds),
    ]


METRICS = ("nll", "bound", "active units, layer 1", "active units, layer 2", "training seconds")
"""What is measured at the end."""


def layers_of(model: str) -> int:
    """Return how many stochastic layers a model of Table 2 has."""
    return 2 if model.startswith("mlp-2") else 1


PAIRS = {"elbo-path": "elbo-total", "iwae-path": "iwae-total", "iwae-dreg": "iwae-total"}
"""What an estimator is compared with."""

KEY = ["recipe", "data", "model", "estimator", "k"]
"""What tells the cells of one preset apart."""


def published(data: str, model: str, estimator: str | None, k: int) -> float:
    """Return the paper's figure for a cell; not a number where it has none."""
    figures = PUBLISHED.get((data, layers_of(model), estimator), ())
    return dict(zip(KS, figures, strict=False)).get(k, math.nan)


def published_gain(data: str, model: str, estimator: str, k: int) -> float:
    """Return what an estimator gains on its total derivative in the paper; not a number where it does not say."""
    return published(data, model, PAIRS[estimator], k) - published(data, model, estimator, k)


def gains(found: DataFrame) -> DataFrame:
    """Return the nats that each estimator gains on its total derivative, over seeds, by :data:`KEY`.

    Each seed is paired with its own: both arms have the same initial weights, data, noise and test draws.
    """
    lost = differences(
        select(found, "nll"),
        KEY,
        model=lambda frame: frame["model"].str.removesuffix("-detached"),
        estimator=lambda frame: frame["estimator"].map(PAIRS),
    )
    return over_seeds(lost.assign(value=-lost["value"]), KEY)


def table_2(found: DataFrame) -> Lines:
    """Return Table 2, and below it what each estimator gains on its total derivative; in nats, beside the paper's."""
    return [*table_of_nll(found), *table_of_gains(found)[1:]]


def table_of_nll(found: DataFrame) -> Lines:
    """Return -log p(x) in nats, ours (mean and standard error over seeds) beside the published figure."""
    return beside_published(over_seeds(select(found, "nll"), KEY), draws(found), published, str)


def table_of_gains(found: DataFrame) -> Lines:
    """Return the nats gained on the total derivative, ours beside the difference of the published figures."""
    return beside_published(
        gains(found), draws(found), published_gain, lambda estimator: f"{PAIRS[estimator]} - {estimator}"
    )


def draws(found: DataFrame) -> list[int]:
    """Return the numbers of draws k that there are results of."""
    return sorted(found["k"].unique())


def beside_published(
    ours: DataFrame, ks: Iterable[int], figure: Callable[..., float], label: Callable[[str], str]
) -> Lines:
    """Return a line for each recipe, data set, model and estimator: ours and the paper's for each k, and the seeds."""
    words = plus_minus(ours)
    lines = [(*KEY[:-1], *(word for k in ks for word in (f"k = {k}", "published")), "seeds")]
    for recipe, data, model, estimator in sorted({cell[:-1] for cell in ours.index}, key=in_order):
        cells = [(recipe, data, model, estimator, k) for k in ks]
        pairs = [(words.get(cell, "-"), in_nats(figure(*cell[1:]))) for cell in cells]
        seeds = ", ".join(str(ours.at[cell, "n"]) for cell in cells if cell in ours.index)
        lines.append((recipe, data, model, label(estimator), *itertools.chain(*pairs), seeds))
    return lines


def in_nats(value: float) -> str:
    """Return the figure with two decimals; a dash for what is not a number."""
    return "-" if math.isnan(value) else f"{value:.2f}"


def in_order(cell: tuple[str, str, str, str]) -> tuple:
    """Sort by recipe, data set and model, and estimators as their table has them."""
    recipe, data, model, estimator = cell
    return list(RECIPES).index(recipe), data, model, list(ESTIMATORS).index(estimator)


def figure_of_gains(found: DataFrame, figure: Figure) -> None:
    """Draw what each estimator gains on the total derivative (±2 s.e.), a panel for each data set and model."""
    ours = gains(found[found["recipe"] == "paper"]).reset_index()
    if ours.empty:
        raise InputError("nothing to draw yet: no estimator has run with the seed and cell of its total derivative")
    sets, models, ks = (sorted(ours[name].unique()) for name in ("data", "model", "k"))
    axes = figure.subplots(len(sets), len(models), sharex=True, sharey="row", squeeze=False)
    for (data, model), ax in zip(itertools.product(sets, models), axes.flat, strict=True):
        for shift, estimator in zip((-0.15, 0, 0.15), PAIRS, strict=True):
            mine = ours[(ours["data"] == data) & (ours["model"] == model) & (ours["estimator"] == estimator)]
            places = [ks.index(k) + shift for k in mine["k"]]
            theirs = [published_gain(data, model, estimator, k) for k in mine["k"]]
            look = plots.LOOKS[estimator]
            face = "white" if estimator == "iwae-path" else look.color
            style = look.points(linestyle="", markerfacecolor=face)
            ax.errorbar(places, mine["mean"], yerr=2 * mine["standard_error"].fillna(0), **style)
            ax.plot(places, theirs, "kx", label="published", zorder=3)
        ax.axhline(0, color="k", lw=0.8)
        ax.set_title(f"{data}, {model}", fontsize="medium")
        ax.set(xticks=range(len(ks)), xticklabels=ks, xlim=(-0.5, len(ks) - 0.5))
    for ax in axes[-1]:
        ax.set_xlabel("k")
    figure.supylabel("nats gained on total", fontsize="medium")
    plots.legend_below(figure, columns=len(PAIRS) + 1)


# --- Figure 1: a 100-dimensional Gaussian fitted to another -----------------------------------------------------------


class Free(nn.Module):
    """An encoder that reads nothing: one Gaussian for each observation."""

    def __init__(self, batch: int, dim: int) -> None:
        super().__init__()
        self.mean, self.log_std = (nn.Parameter(torch.zeros(batch, dim)) for _ in range(2))

    def forward(self, x: Tensor) -> DiagonalGaussian:
        """Return the Gaussians."""
        return DiagonalGaussian(self.mean, self.log_std)


def fit_gaussian(config: Cell, seed: int, folder: Path, device: str, report: Report) -> list[Measured]:
    """Fit a Gaussian from the standard normal to a target by Adam; measure KL(q, target) along the way."""
    options = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    shape = (1, config["dim"])
    target = DiagonalGaussian(torch.randn(shape, **options), 2 * torch.rand(shape, **options) - 1)
    q, x = Free(*shape).to(device), torch.zeros(1, 1, device=device)
    adam = torch.optim.Adam(q.parameters(), config["lr"])
    row, measured = ESTIMATORS[config["estimator"]], []
    for step in range(config["steps"] + 1):
        if step % config["every"] == 0:
            with torch.no_grad():
                here, there = (Normal(p.mean, p.log_std.exp()) for p in (q(x), target))
                measured.append(Measured("kl", kl_divergence(here, there).sum().item(), at=step))
            report(step / config["steps"])
        adam.zero_grad()
        objectives.backward(row, lambda _, z: target.log_prob(z), q(x), x, q(x).noise(1, options["generator"]))
        adam.step()
    return [*measured, Measured("final kl", measured[-1].value)]


def table_of_finals(found: DataFrame) -> Lines:
    """Return the divergence that each estimator ends with."""
    lines = [("estimator", "dimension", "steps", "learning rate", "KL(q, target) in nats", "seeds")]
    ends = over_seeds(select(found, "final kl"), ["estimator", "dim", "steps", "lr"])
    for (estimator, dim, steps, lr), mean, error, n in ends.itertuples(name=None):
        kl = f"{mean:.3g}" + (f" ± {error:.1g}" if n > 1 else "")
        lines.append((estimator, str(dim), str(steps), f"{lr:g}", kl, str(n)))
    return lines


def figure_1(found: DataFrame, figure: Figure) -> None:
    """Draw KL(q, target) over the steps of the optimiser."""
    ax = figure.add_subplot()
    for name, runs_of_it in found.groupby("estimator", sort=False):
        ax.plot(curve(runs_of_it, "kl")["mean"], **plots.LOOKS[name].line())
    ax.set(yscale="log", xlabel="step", ylabel="KL(q, target) in nats")
    ax.legend()


# --- Figure 3: a mixture of five Gaussians, on the way to its target --------------------------------------------------


def walk_to_mixture(config: Cell, seed: int, folder: Path, device: str, report: Report) -> list[Measured]:
    """Measure the spread of the path and the score component on a straight line from one mixture to another."""
    options = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    shape = (config["components"], 1, config["dim"])

    def parameters() -> tuple[Tensor, Tensor, Tensor]:
        mean, log_std = torch.randn(2, *shape, **options).double()
        return 2 * mean, 0.3 * log_std, torch.randn(shape[:2], **options).double()

    def mixture(mean: Tensor, log_std: Tensor, logits: Tensor) -> Mixture:
        return Mixture(tuple(map(DiagonalGaussian, mean, log_std)), logits)

    start, end = parameters(), parameters()
    target, x, measured = Target(mixture(*end)), torch.zeros(1, 1, device=device).double(), []
    for percent in range(0, 101, config["percent"]):
        t = percent / 100
        q = mixture(*((1 - t) * a + t * b for a, b in zip(start, end, strict=True)))
        total, path = (
            gradients.draws(
                f"elbo-{name}",
                target,
                lambda x, q=q: q,
                x,
                k=config["components"],
                draws=config["draws"],
                generator=torch.Generator(device).manual_seed(seed),
            )
            for name in ("total", "path")
        )
        spreads = {"total": total, "path": path, "score": total - path}
        measured += [Measured(name, draws.var(0).sum().item(), at=percent) for name, draws in spreads.items()]
        report(t)
    return measured


class Target(nn.Module):
    """A joint density that is a given distribution of z."""

    def __init__(self, density: Mixture) -> None:
        super().__init__()
        self.density = density

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Return log p(x, z), ``[K, B]``."""
        return self.density.log_prob(z)


COMPONENTS = ("total", "path", "score")


def table_of_spreads(found: DataFrame) -> Lines:
    """Return the variance of each component at the start, half-way and at the target."""
    lines = [("component", "at the start", "half-way", "at the target", "seeds")]
    for name in COMPONENTS:
        spreads = curve(found, name)
        if {0, 50, 100} <= set(spreads.index):
            lines.append((name, *(f"{spreads.at[at, 'mean']:.3g}" for at in (0, 50, 100)), str(spreads.at[0, "n"])))
    return lines


def figure_3(found: DataFrame, figure: Figure) -> None:
    """Draw the variance of the components on the way, one faint line a seed."""
    ax = figure.add_subplot()
    for name in COMPONENTS:
        look = plots.LOOKS[f"elbo-{name}"]
        for i, (_, line) in enumerate(found[found["metric"] == name].groupby("seed")):
            style = look.line(lw=1.5, alpha=0.6, label=None if i else look.label)
            ax.plot(line["at"], line["value"].clip(lower=1e-30), **style)
    ax.set(yscale="log", xlabel="per cent of the way to the target", ylabel="variance", ylim=(1e-4, None))
    ax.legend()


# --- the experiments --------------------------------------------------------------------------------------------------


def short_seeds(config: Cell) -> int:
    """Three runs where one costs minutes; one where it costs more."""
    return 3 if config["k"] == 1 else 1


GAUSSIAN = {"dim": 100, "steps": 3000, "lr": 0.01, "every": 50}
MIXTURE = {"components": 5, "dim": 2, "draws": 1000, "percent": 5}

EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            name="stl-table-2",
            reproduces='"Sticking the Landing", Table 2: -log p(x) on MNIST and Omniglot, total against path, and DReG',
            presets={
                "smoke": Preset(cells("digits", (1, 5), epochs=2, samples=50), seeds=1, minutes=0.5),
                "short": Preset(
                    [
                        *cells("mnist", (1,), 40, 1000),
                        *cells("omniglot", (1,), 40, 1000),
                        *cells("mnist", (5,), 40, 1000),
                        *released("mnist", 40, 1000),
                        *cells("omniglot", (5,), 40, 1000),
                        *cells("mnist", (50,), 40, 1000),
                    ],
                    seeds=short_seeds,
                    minutes=1300,
                ),
                "paper": Preset(
                    [
                        *(c for k in KS for data in ("mnist", "omniglot") for c in cells(data, (k,), 3280, 5000)),
                        *released("mnist", 3280, 5000),
                    ],
                    seeds=5,
                    minutes=500_000,
                ),
            },
            run=train_and_evaluate,
            table=table_2,
            figure=figure_of_gains,
            metrics=METRICS,
        ),
        Experiment(
            name="stl-figure-1",
            reproduces='"Sticking the Landing", Figure 1: a 100-dimensional Gaussian fitted to another',
            presets={
                "smoke": Preset(
                    [{"estimator": e, **GAUSSIAN, "steps": 200} for e in ("elbo-total", "elbo-path")], 1, 0.1
                ),
                "short": Preset([{"estimator": e, **GAUSSIAN} for e in ("elbo-total", "elbo-path")], 10, 1),
            },
            run=fit_gaussian,
            table=table_of_finals,
            figure=figure_1,
            metrics=("final kl",),
            curves=("kl",),
        ),
        Experiment(
            name="stl-figure-3",
            reproduces='"Sticking the Landing", Figure 3: a mixture of five Gaussians on the way to its target',
            presets={
                "smoke": Preset([{**MIXTURE, "draws": 100, "percent": 50}], 1, 0.1),
                "short": Preset([MIXTURE], 5, 0.5),
            },
            run=walk_to_mixture,
            table=table_of_spreads,
            figure=figure_3,
            curves=COMPONENTS,
        ),
    )
}
