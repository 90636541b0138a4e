"""The experiments of "Lagging Inference Networks" (He et al. 2019): its toy, its text, and its images.

An experiment is a grid of methods on one data set; another data set or model is another entry of :data:`FAMILIES`.
Columns are those of the paper's Tables 1 and 2: NLL by importance sampling, KL, mutual information, active units, time.

What was decided before the first runs of ``lag-text`` "middle" and of ``lag-images``. With the same seed the methods
see the same data in the same order. What counts is the paired difference in NLL to no latent variable: a method is
*ahead* or *behind* where the 95% interval of its mean by Student's t, over at least ten seeds, excludes zero; all else
is *undecided*. A run has *collapsed* if no unit is active at its end. The smallest images at which plain training
collapses are the first of :data:`PLACES` where it does with every seed; there the search ends. No place did: the cures
are tried where most seeds do, on Omniglot at 8 x 8 pixels, which was decided after the search and before their runs.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pandas import DataFrame
from torch import nn

from vaelib import collapse, data, evaluation, files, models, plots, runs
from vaelib.collapse import METHODS
from vaelib.data import Images, Sentences, Split, Text
from vaelib.errors import InputError, choose
from vaelib.experiments.experiment import Cell, Experiment, Lines, Measured, Preset, Report
from vaelib.experiments.results import curve, over_seeds, plus_minus, select
from vaelib.models.pixelcnn import pixelcnn_alone
from vaelib.models.text import lstm_vae
from vaelib.training import Training, drawing_from, offspring, stream, train_step

SAVE_EVERY = 30.0  # seconds

# --- what can be trained, and how -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A kind of data with the models for it.

    Attributes
    ----------
    load
        ``load(config)`` returns the data: ``train``, ``valid`` and ``test``.
    build
        ``build(config, data, generator)`` returns the model before its first step; without z where the method is
        "no-z".
    recipe
        what :class:`vaelib.collapse.LagRecipe` it is trained by, where the configuration does not say otherwise.
    """

    load: Callable[[Cell], Text | Images]
    build: Callable[[Cell, Any, torch.Generator], nn.Module]
    recipe: collapse.LagRecipe


def load_text(config: Cell) -> Text:
    """Return the sentences of a configuration; the data set's own sizes where it says None."""
    length = "length" if config["data"] == "synthetic-text" else "longest"
    sizes = {"sentences": config["sentences"], "vocabulary": config["vocabulary"], length: config["length"]}
    return data.load(config["data"], **{name: size for name, size in sizes.items() if size is not None})


def build_lstm(config: Cell, text: Text, generator: torch.Generator) -> nn.Module:
    """Return the LSTM variational autoencoder of a configuration, or the language model without z."""
    sizes = {name: config[name] for name in ("latent", "embedding", "hidden", "dropout")}
    if config["method"] == "no-z":
        sizes["latent"] = 0
    return lstm_vae(len(text.vocabulary), generator, skip=config["method"] == "skip", **sizes)


def load_images(config: Cell) -> Images:
    """Return the images of a configuration: random subsets, averaged to a smaller side where it has one."""
    found = data.load(config["data"], "dynamic", valid=config["valid"])
    most = {"train": config["images"], "valid": config["evaluated"], "test": config["evaluated"]}
    return replace(found, **{name: reduced(getattr(found, name), most[name], config["side"]) for name in most})


def reduced(split: Split, most: int | None, side: int | None) -> Split:
    """Return a random subset of at most ``most`` images, ``side`` pixels a side; for None all, or as they are."""
    chosen, side = split.sample(most), side or split.shape[0]
    grey = F.adaptive_avg_pool2d(chosen.grey.unflatten(1, split.shape), side).flatten(1)
    return replace(chosen, grey=grey, shape=(side, side))


def build_pixelcnn(config: Cell, images: Images, generator: torch.Generator) -> nn.Module:
    """Return the PixelCNN variational autoencoder of a configuration, or the PixelCNN without z."""
    pixels, sizes = images.train.grey.shape[1], {name: config[name] for name in ("maps", "layers")}
    if config["method"] == "no-z":
        return pixelcnn_alone(pixels, generator, **sizes)
    sizes |= {name: config[name] for name in ("latent", "encoder_maps", "hidden")}
    return models.build("pixelcnn", pixels, generator=generator, **sizes)


FAMILIES: dict[str, Family] = {
    "lstm": Family(load_text, build_lstm, collapse.TEXT),
    "pixelcnn": Family(load_images, build_pixelcnn, collapse.IMAGES),
}
"""By the name of the model."""

CHANGES: dict[str, Mapping[str, Any]] = {
    **METHODS,
    "no-z": {},
    **{f"beta-{beta:g}": {"beta": beta} for beta in (0.2, 0.4, 0.6, 0.8)},
    "bn-vae": {},
    "skip": {},
    "pretrained": {"free_bits": 0.5, "weight": "linear"},
}
"""What each method of a grid changes in the recipe."""

PRETRAINING = 10
"""Epochs as an autoencoder before a training that is "pretrained"."""

CURVES = ("nll_bound", "kl", "mi", "mi_all", "au", "encoder_steps")
"""What is measured after each epoch."""

KEPT = 25
"""How many points of a curve are kept at most, evenly spaced, where the configuration fixes the number of epochs."""

METRICS = ("nll", *CURVES, "collapsed", "training_seconds", "aggressive_seconds", "decoder_steps")
"""What is measured at the end."""

IN_RECIPE = ("epochs", "batch_size", "first_decay", "decays", "warm_up")

LABELS = {
    "no-z": "no z (autoregressive)",
    "plain": "VAE",
    "anneal": "VAE + annealing",
    "cyclical": "cyclical annealing",
    "free-bits": "free bits, 0.5 a dimension",
    "sa-vae": "SA-VAE",
    "sa-vae-anneal": "SA-VAE + annealing",
    "aggressive": "aggressive",
    "aggressive-anneal": "aggressive + annealing",
    **{f"beta-{beta:g}": f"β = {beta:g}" for beta in (0.2, 0.4, 0.6, 0.8)},
    "bn-vae": "BN-VAE",
    "skip": "skip decoder",
    "pretrained": "autoencoder first (not in the time), then free bits + annealing",
}
"""The methods in words."""


def run(config: Cell, seed: int, folder: Path, device: str, report: Report) -> list[Measured]:
    """Train one method and measure what it made, with the validation's curves; ``at`` is the epoch."""
    family = choose("model", config["model"], FAMILIES)
    found = family.load(config).to(device)
    model = family.build(config, found, stream("init", seed)).to(device)
    changes = {name: config[name] for name in IN_RECIPE if config[name] is not None}
    recipe = replace(family.recipe, seed=seed, **changes, **choose("method", config["method"], CHANGES))
    valid = subset(found.valid, config["evaluated"], seed=0)
    place = runs.Folder(folder)
    if config["method"] == "bn-vae":
        model.encoder = collapse.Normalised(model.encoder, config["latent"]).to(device)
    if config["method"] == "pretrained" and not place.checkpoint.exists():
        fresh = copy.deepcopy(model.joint.state_dict())
        collapse.fit(
            model, found.train, valid, recipe=recipe, beta=0.0, free_bits=0.0, weight="constant", epochs=PRETRAINING
        )
        model.joint.load_state_dict(fresh)
    clock = time.process_time if device == "cpu" else time.monotonic  # other runs may be at work on the same core
    training = collapse.prepare(model, found.train, valid, recipe, clock)
    looked_at = config["points"] and seed == 0 and config["method"] in ("plain", "aggressive")
    space = Space(found.train, config, folder / "space.csv") if looked_at else None
    if place.checkpoint.exists():
        runs.restore(training, place.checkpoint)

    def after_step(training: Training) -> None:
        report(0.8 * training.progress.done)
        if space:
            space.look(training)

    runs.go_on(training, place, SAVE_EVERY, after_step)
    if space:
        space.add_trajectories(family, found, seed)

    x = found.test.batch(slice(0, config["evaluated"]), stream("test", 0, device))
    noise = stream("noise", seed, x.device, step=1)
    with drawing_from(offspring(noise)):
        final = collapse.measure(model, x, recipe.batch_size, noise)
        values = evaluation.log_likelihood(model, x, config["samples"], 10, noise, batch_size=recipe.batch_size)
    nll, error = evaluation.mean_and_standard_error(-values)
    every = max(1, math.ceil((config["epochs"] or 0) / KEPT))
    kept = [record for record in training.history if record["epoch"] % every == 0]
    curves = [Measured(name, record[name], at=record["epoch"]) for record in kept for name in CURVES]
    cost = training.history[-1]
    return [
        Measured("nll", nll, error),
        *(Measured(name, value) for name, value in final.items()),
        Measured("collapsed", float(final["au"] == 0)),
        Measured("training_seconds", cost["seconds"]),
        Measured("aggressive_seconds", cost["aggressive_seconds"]),
        Measured("encoder_steps", cost["encoder_steps"]),
        Measured("decoder_steps", training.step),
        *curves,
    ]


def subset(split: Any, most: int, seed: int) -> Any:
    """Return a random subset of at most ``most`` sentences of a split; images, which are quick, as they are."""
    return split.sample(most, seed) if isinstance(split, Sentences) and len(split) > most else split


# --- the posterior-mean space -----------------------------------------------------------------------------------------

STAGES = (0.25, 1, 5)  # epochs, and the last one
TRAJECTORIES, BATCH = 9, 50
SPACE_COLUMNS = ("method", "kind", "step", "point", "model_mean", "encoder_mean")


class Space:
    """Where sentences are: the mean of the model's posterior and of the encoder's, at some stages (their Figures 2, 3).

    The table is written at each stage, so that a run that was killed finds its earlier stages there.
    """

    def __init__(self, split: Sentences, config: Cell, path: Path) -> None:
        self.split, self.config, self.path = split, config, path
        self.x = subset(split, config["points"], seed=1).batch(slice(None))
        self.lines: dict[tuple[str, int, int], str] = {}
        for line in read_points(path, SPACE_COLUMNS).to_dict("records"):
            self.lines[line["kind"], int(line["step"]), int(line["point"])] = ",".join(line.values())

    def look(self, training: Training) -> None:
        """Note where the points are, if this step ends a stage."""
        stages = {int(epoch * training.steps_per_epoch) for epoch in (*STAGES, self.config["epochs"])}
        if training.step in stages or training.over:  # it may end early
            with evaluation.evaluating(training.model):
                self.note("stage", training.step, training.model, self.x)
            self.save()

    @torch.no_grad()
    def note(self, kind: str, step: int, model: nn.Module, x: torch.Tensor) -> None:
        """Add a line for each point."""
        there, here = collapse.posterior_mean(model.joint, x)[:, 0], model.encoder(x).mean[:, 0]
        for i, means in enumerate(zip(there.tolist(), here.tolist())):
            values = ",".join(f"{mean:.4f}" for mean in means)
            self.lines[kind, step, i] = f"{self.config['method']},{kind},{step},{i},{values}"

    def add_trajectories(self, family: Family, found: Text, seed: int) -> None:
        """Train anew on one fixed batch of 50, as for their Figure 3, and note some points after every step."""
        config = self.config
        model = family.build(config, found, stream("init", seed)).to(self.x.device)
        x, noise = self.split.batch(slice(0, BATCH)), stream("noise", seed, self.x.device, step=2)
        optimizer, objective = torch.optim.SGD(model.parameters(), family.recipe.lr), collapse.elbo_kl()

        def eps(x: torch.Tensor) -> torch.Tensor:
            return model.encoder(x).noise(1, noise)

        self.note("trajectory", 0, model, x[:TRAJECTORIES])
        for step in range(1, config["path"] + 1):
            with drawing_from(offspring(noise)):
                if CHANGES[config["method"]].get("aggressive"):
                    collapse.aggressive_step(model, objective, optimizer, x, lambda: x, eps, units=self.split.units)
                else:
                    train_step(model, objective, optimizer, x, eps(x), clip=family.recipe.clip)
            self.note("trajectory", step, model, x[:TRAJECTORIES])
        self.save()

    def save(self) -> None:
        """Write the table."""
        files.write(self.path, "\n".join([",".join(SPACE_COLUMNS), *self.lines.values(), ""]).encode())


def read_points(path: Path, columns: Sequence[str]) -> DataFrame:
    """Return the points that a file holds, as words; none if there is no file.

    Raises
    ------
    InputError
        if the file holds anything else; it names the line.
    """
    lines = files.read_table(path, columns) or {}
    if not files.is_ended(path):
        raise InputError(f"the last line of '{path}' has no line end and may be cut: mend that line or delete it")
    for number, line in lines.items():
        try:
            place = int(line["step"]) >= 0 and int(line["point"]) >= 0
            if not place or not all(math.isfinite(float(line[name])) for name in ("model_mean", "encoder_mean")):
                raise ValueError
        except ValueError:
            raise InputError(f"line {number} of '{path}' is no point: mend that line or delete it") from None
    return DataFrame(list(lines.values()), columns=list(columns), dtype=object)


def gather_space(preset: str, folders: Sequence[Path], results_folder: Path) -> None:
    """Put the points that runs of ``lag-toy`` stored into ``lag-toy-space.csv``, in the place of those of earlier runs.

    Its columns are the preset and :data:`SPACE_COLUMNS`. Runs whose folders are gone keep what the table has of them.
    """
    stored = [read_points(folder / "space.csv", SPACE_COLUMNS) for folder in folders]
    if not any(map(len, stored)):
        return
    points = pd.concat(stored)
    path = results_folder / "lag-toy-space.csv"
    points.insert(0, "preset", preset)
    with files.locked_around(path):
        old = read_points(path, ("preset", *SPACE_COLUMNS))
        made = (old["preset"] == preset) & old["method"].isin(points["method"])
        points = pd.concat([old[~made], points])
        files.write(path, points.to_csv(index=False, lineterminator="\n").encode())


# --- tables and figures -----------------------------------------------------------------------------------------------

PUBLISHED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "yahoo": {
        "plain": ("328.8", "0.0", "0.0", "1.00"),
        "anneal": ("328.6", "0.0", "0.0", ""),
        "beta-0.2": ("333.1", "18.7", "3.4", ""),
        "beta-0.4": ("328.5", "3.8", "2.2", ""),
        "beta-0.6": ("328.6", "0.1", "0.1", ""),
        "beta-0.8": ("328.8", "0.0", "0.0", ""),
        "sa-vae": ("329.1", "0.1", "0.0", "9.91"),
        "sa-vae-anneal": ("327.4", "3.5", "1.9", ""),
        "aggressive": ("328.0", "5.4", "3.0", "2.20"),
        "aggressive-anneal": ("326.6", "6.7", "3.2", ""),
        "no-z": ("328.1", "", "", ""),
    },
    "omniglot": {
        "plain": ("89.41", "1.5", "1.4", "1.00"),
        "anneal": ("89.20", "2.1", "1.9", ""),
        "beta-0.2": ("105.19", "69.1", "3.9", ""),
        "beta-0.4": ("95.89", "28.0", "3.9", ""),
        "beta-0.6": ("92.16", "20.4", "3.9", ""),
        "beta-0.8": ("89.27", "9.6", "3.9", ""),
        "sa-vae": ("89.30", "2.6", "2.2", "15.15"),
        "sa-vae-anneal": ("89.01", "3.4", "2.6", ""),
        "aggressive": ("89.03", "2.5", "2.2", "2.19"),
        "aggressive-anneal": ("89.12", "2.5", "2.2", ""),
        "no-z": ("89.76", "", "", ""),
    },
}
"""NLL, KL, MI (Table 1) and relative time (Table 2) as submitted to ICLR 2019, one run each, by data set."""


def table_beside(published: str | None) -> Callable[[DataFrame], Lines]:
    """Return the function that makes a table, with the published numbers for the data set ``published`` beside ours."""

    def table(results: DataFrame) -> Lines:
        found = {name: over_seeds(select(results, name), ["method"]) for name in MEASURES}
        found["time"] = over_seeds(comparable_times(results), ["method"])
        mean = DataFrame({name: each["mean"] for name, each in found.items()}, index=found["nll"].index)
        plain = mean["time"].get("plain", math.nan)
        header = ("method", "NLL", "KL", "MI", "MI, whole set", "AU", "time", "encoder steps", "runs")
        theirs = PUBLISHED.get(published or "", {})
        if theirs:
            header += tuple(f"{name} ({published}, He et al.)" for name in ("NLL", "KL", "MI", "time"))
        lines = [header]
        for method, nll in plus_minus(found["nll"]).items():
            ours = mean.loc[method]
            lines.append(
                (
                    LABELS.get(method, method),
                    nll,
                    *(f"{ours[name]:.2f}" for name in ("kl", "mi", "mi_all")),
                    f"{ours['au']:.1f}",
                    "" if math.isnan(ours["time"] / plain) else f"{ours['time'] / plain:.2f}",
                    f"{ours['encoder_steps']:,.0f}",
                    str(found["nll"].at[method, "n"]),
                    *(theirs.get(method, ("",) * 4) if theirs else ()),
                )
            )
        return lines

    return table


def comparable_times(results: DataFrame) -> DataFrame:
    """Return the seconds of training of the runs that were made on the machine of the plain ones."""
    seconds = select(results, "training_seconds")
    return seconds[seconds["device"].isin(seconds.loc[seconds["method"] == "plain", "device"])]


def table_by_place(results: DataFrame) -> Lines:
    """Return the table of each data set and size of images, one below the other."""
    lines: Lines = []
    for (name, side), mine in results.groupby(["data", "side"], sort=False):
        header, *rows = table_beside(None)(mine)
        lines += [(name, f"{side} x {side}", *row) for row in rows]
    return [("data", "pixels", *header), *lines]


MEASURES = ("nll", "kl", "mi", "mi_all", "au", "encoder_steps")


def figure(results: DataFrame, fig: Figure) -> None:
    """Draw KL and mutual information on the validation set, epoch by epoch."""
    for axes, metric, label in zip(
        fig.subplots(1, 2), ("kl", "mi"), ("KL(q(z|x) || p(z)), nats", "mutual information, nats")
    ):
        for method, runs_of_it in results.groupby("method", sort=False):
            look = plots.LOOKS.get(method) or plots.LOOKS["beta"]
            axes.plot(curve(runs_of_it, metric)["mean"], **look.line(label=LABELS.get(method, method)))
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
    fig.set_layout_engine("constrained")
    plots.legend_below(fig, fontsize=8)


# --- the experiments --------------------------------------------------------------------------------------------------


def grid(methods: Sequence[str], **common: Any) -> list[Cell]:
    """Return a cell for each method; what is not given is None, or as published."""
    keys = {
        "data": None, "model": "lstm", "method": None, "sentences": None, "vocabulary": None, "length": None,
        "latent": 32, "embedding": 512, "hidden": 1024, "dropout": 0.5, "epochs": None, "batch_size": None,
        "first_decay": None, "decays": None, "warm_up": None, "samples": 500, "evaluated": 10_000, "points": 0,
        "path": 0,
    }  # fmt: skip
    return [{**keys, **common, "method": method} for method in methods]


ALL = (
    "no-z", "plain", "anneal", "beta-0.4", "beta-0.8", "cyclical", "free-bits", "sa-vae", "aggressive",
    "aggressive-anneal",
)  # fmt: skip

TOY = {"data": "synthetic-text", "latent": 1, "dropout": 0.0}

LAG_TOY = Experiment(
    "lag-toy",
    "He et al. 2019, Figures 1 to 3 and, on their synthetic sentences, the columns of Tables 1 and 2",
    {
        "smoke": Preset(
            grid(
                ("no-z", "plain", "sa-vae", "aggressive"), **TOY, sentences=200, vocabulary=20, length=5, embedding=8,
                hidden=8, epochs=2, samples=10, evaluated=20, points=5, path=10,
            ),
            seeds=1,
            minutes=0.5,
        ),
        "short": Preset(
            grid(
                ALL, **TOY, sentences=2500, vocabulary=100, embedding=32, hidden=32, epochs=12, first_decay=4, decays=3,
                warm_up=4, samples=100, evaluated=250, points=200, path=100,
            ),
            seeds=8,
            minutes=50,
        ),
        "long": Preset(  # until the likelihoods stand still
            grid(
                ("no-z", "plain", "aggressive"), **TOY, sentences=4000, vocabulary=200, embedding=40, hidden=40,
                epochs=20, first_decay=5, decays=3, warm_up=5, samples=100, evaluated=400,
            ),
            seeds=10,
            minutes=40,
        ),
        "paper": Preset(
            grid(
                (*ALL, "beta-0.2", "beta-0.6", "sa-vae-anneal"), **TOY, embedding=50, hidden=50, epochs=50,
                batch_size=16, first_decay=0, points=500, path=201,
            ),
            seeds=5,
            minutes=3000,
        ),
    },
    run,
    table_beside(None),
    figure,
    METRICS,
    CURVES,
    gather_space,
)  # fmt: skip

LAG_TEXT = Experiment(
    "lag-text",
    "He et al. 2019, Tables 1 and 2: Yahoo (preset paper), and the Penn Treebank at reduced size",
    {
        "smoke": Preset(
            grid(
                ("plain", "aggressive"), **{**TOY, "latent": 2, "dropout": 0.2}, sentences=200, vocabulary=20, length=5,
                embedding=8, hidden=8, epochs=2, samples=10, evaluated=20,
            ),
            seeds=1,
            minutes=0.3,
        ),
        "short": Preset(
            grid(
                ALL, data="ptb", sentences=2000, vocabulary=500, length=12, latent=4, embedding=48, hidden=48,
                dropout=0.0, epochs=12, first_decay=4, decays=3, warm_up=4, samples=100, evaluated=500,
            ),
            seeds=8,
            minutes=55,
        ),
        "long": Preset(  # to the paper's rule: five halvings, none in the first 15 epochs
            grid(
                (
                    "no-z", "plain", "anneal", "free-bits", "sa-vae-anneal", "aggressive", "aggressive-anneal",
                    "bn-vae", "skip", "pretrained",
                ),
                data="ptb", sentences=2000, vocabulary=500, length=12, latent=4, embedding=48, hidden=48, dropout=0.0,
                samples=200, evaluated=500,
            ),
            seeds=10,
            minutes=200,
        ),
        "middle": Preset(  # by the same rule; as large as some 15 hours of one core allow
            grid(
                ("no-z", "plain", "aggressive", "aggressive-anneal", "sa-vae-anneal"),
                data="ptb", sentences=8000, vocabulary=2000, length=20, latent=16, embedding=128, hidden=128,
                dropout=0.0, samples=200, evaluated=500,
            ),
            seeds=10,
            minutes=900,
        ),
        "paper": Preset(
            grid((*ALL, "beta-0.2", "beta-0.6", "sa-vae-anneal"), data="yahoo"),
            seeds=5,
            minutes=2_000_000,
        ),
    },
    run,
    table_beside("yahoo"),
    figure,
    METRICS,
    CURVES,
)  # fmt: skip


def image_grid(methods: Sequence[str], **common: Any) -> list[Cell]:
    """Return a cell for each method, of images; what is not given is None, or as published."""
    keys = {
        "data": "omniglot", "model": "pixelcnn", "method": None, "images": None, "valid": 1623, "side": None,
        "latent": 32, "maps": 64, "layers": 13, "encoder_maps": 64, "hidden": 512, "epochs": None, "batch_size": None,
        "first_decay": None, "decays": None, "warm_up": None, "samples": 500, "evaluated": 10_000, "points": 0,
        "path": 0,
    }  # fmt: skip
    return [{**keys, **common, "method": method} for method in methods]


SMALL = {
    "images": 600, "valid": 200, "latent": 8, "maps": 16, "layers": 4, "encoder_maps": 16, "hidden": 32, "samples": 200,
    "evaluated": 300,
}  # fmt: skip
"""A model and images few enough for a core to train it plainly in half a minute."""

LAG_OMNIGLOT = Experiment(
    "lag-omniglot",
    "He et al. 2019, Tables 1 and 2, images: Omniglot with a PixelCNN (paper), 8 x 8 digits with a small one (short)",
    {
        "smoke": Preset(
            image_grid(
                ("no-z", "plain", "sa-vae", "aggressive"), data="digits", valid=200, images=100, latent=2, maps=4,
                layers=3, encoder_maps=4, hidden=8, epochs=1, samples=10, evaluated=50,
            ),
            seeds=1,
            minutes=0.3,
        ),
        "short": Preset(
            image_grid(
                (
                    "no-z", "plain", "aggressive", "aggressive-anneal", "anneal", "beta-0.4", "beta-0.8", "cyclical",
                    "free-bits", "sa-vae",
                ),
                **SMALL, data="digits", epochs=25,
            ),
            seeds=2,
            minutes=18,
        ),
        "paper": Preset(
            image_grid((*ALL, "beta-0.2", "beta-0.6", "sa-vae-anneal"), data="omniglot-burda", valid=2000),
            seeds=5,
            minutes=2_000_000,
        ),
    },
    run,
    table_beside("omniglot"),
    figure,
    METRICS,
    CURVES,
)  # fmt: skip

PLACES = [("digits", 8), *((name, side) for side in (8, 14, 20, 28) for name in ("mnist", "fashion-mnist", "omniglot"))]
"""Data sets and sizes in the order in which a collapse of plain training is looked for."""

LAG_IMAGES = Experiment(
    "lag-images",
    "He et al. 2019, images: the smallest at which plain training collapses, and what the cures do there",
    {
        "smoke": Preset(
            image_grid(
                ("no-z", "plain"), data="digits", side=8, valid=200, images=100, latent=2, maps=4, layers=3,
                encoder_maps=4, hidden=8, epochs=1, samples=10, evaluated=50,
            ),
            seeds=1,
            minutes=0.2,
        ),
        "search": Preset(
            [
                cell
                for name, side in PLACES
                for cell in image_grid(("plain",), **SMALL, data=name, side=side, epochs=100)
            ],
            seeds=3,
            minutes=70,
        ),
        "long": Preset(  # a hundred of up to a thousand epochs
            image_grid(
                (
                    "no-z", "plain", "anneal", "beta-0.4", "cyclical", "free-bits", "sa-vae", "aggressive",
                    "aggressive-anneal", "bn-vae",
                ),
                **SMALL, data="omniglot", side=8, epochs=100,
            ),
            seeds=10,
            minutes=200,
        ),
    },
    run,
    table_by_place,
    figure,
    METRICS,
    CURVES,
)  # fmt: skip

EXPERIMENTS = {experiment.name: experiment for experiment in (LAG_TOY, LAG_TEXT, LAG_OMNIGLOT, LAG_IMAGES)}
