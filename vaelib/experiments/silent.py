r"""Silent gradients (after Shao et al. 2025): linear decoders, annealing to nonlinear ones, and control variates.

Their tables, schedule and code are not published, so that these experiments are of our own design and test the claims:
faster, better, more robust. Pixels are grey and Gaussian throughout, also those of the nonlinear decoder: then the two
decoders are models of the same data, their bounds are in the same units, and a weight between them means what it says.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from pandas import DataFrame, Series
from torch import Tensor, nn

from vaelib import data, estimators, evaluation, gradients, models, objectives, plots
from vaelib.bounds import divergence
from vaelib.config import Recipe
from vaelib.data import Images
from vaelib.estimators import Estimator, discrete, silent
from vaelib.experiments.experiment import Cell, Experiment, Lines, Measured, Preset, Report
from vaelib.experiments.results import as_lines, curve, differences, over_seeds, plus_minus, select
from vaelib.models import VAE
from vaelib.training import Diverged, Hook, Progress, Training, stream

TEST_IMAGES = 300


@cache
def subset(name: str, count: int, valid: int = 0) -> Images:
    """Return a data set in grey, with ``count`` training images, at most 300 test images, and ``valid`` held-out ones.

    They are the same in every run.
    """
    images = data.load(name, "grey", valid=valid)
    return replace(images, train=images.train.sample(count), test=images.test.sample(TEST_IMAGES))


def start(config: Cell, seed: int, model: str, device: str, **sizes: int) -> tuple[VAE, Images]:
    """Return the model of a run before its first step, the same for all estimators of a seed, and its images."""
    images = subset(config["data"], config["images"], config.get("valid", 0))
    grey = images.train.grey
    return models.build(model, grey.shape[1], grey.mean(0), stream("init", seed), **sizes).to(device), images.to(device)


def recipe(config: Cell, seed: int) -> Recipe:
    """Return the recipe that a configuration means."""
    return Recipe(k=config["k"], batch_size=config["batch_size"], epochs=config["epochs"], lr=config["lr"], seed=seed)


def train(training: Training, look: Callable[[int], list[Measured]], report: Report) -> list[Measured]:
    """Train to the end, and ``look(epoch)`` before it, and after the epochs 1, 2, 3, 5, 7, 10, 15 ... and the last."""
    measured = look(0)
    due = {*(1, 2, 3, 5, 7), *range(10, training.recipe.epochs, 5), training.recipe.epochs}

    def after_step(training: Training) -> None:
        report(0.9 * training.progress.done)
        epoch = training.step // training.steps_per_epoch
        if training.epoch_ends and epoch in due:
            measured.extend(look(epoch))

    try:
        training.run(after_step)
        training.state()  # refuses parameters that are not finite
        measured.append(Measured("diverged", 0))
    except Diverged:
        measured.append(Measured("diverged", 1))
    return measured


# --- linear decoders --------------------------------------------------------------------------------------------------

LATENTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "gaussian": ("linear", ("elbo-silent", "elbo-total", "elbo-path", "elbo-score-loo")),
    "bernoulli": (
        "linear-bernoulli",
        (
            "elbo-silent",
            "elbo-gumbel-softmax",
            "elbo-straight-through",
            "elbo-score",
            "elbo-score-loo",
            "elbo-arm",
            "elbo-disarm",
        ),
    ),
    "categorical": (
        "linear-categorical",
        ("elbo-silent", "elbo-gumbel-softmax", "elbo-straight-through", "elbo-score", "elbo-score-loo"),
    ),
    "gaussian-cosine": ("cosine", ("elbo-silent", "elbo-total", "elbo-path")),
}
"""The model for each kind of latent, and the estimators that can train it; the last is linear in cosines of z."""

LINEAR = ("gaussian", "bernoulli", "categorical")

TWO_DRAWS = ("elbo-score", "elbo-score-loo")
"""These take two draws, which is what ARM and DisARM make of one."""

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def linear_grid(name: str, images: int, rates: Sequence[float], epochs: int, latents: Iterable[str]) -> list[Cell]:
    return [
        {
            "data": name,
            "latent": latent,
            "estimator": estimator,
            "lr": lr,
            "k": 2 if estimator in TWO_DRAWS else 1,
            "images": images,
            "batch_size": 50,
            "epochs": epochs,
        }
        for latent in latents
        for lr in rates
        for estimator in LATENTS[latent][1]
    ]


def run_linear(config: Cell, seed: int, folder: Path, device: str, report: Report) -> list[Measured]:
    """Train a decoder whose ELBO has a closed form, and measure that, whatever it was trained with."""
    model, images = start(config, seed, LATENTS[config["latent"]][0], device)
    x, test = images.train.grey, images.test.grey

    def look(epoch: int) -> list[Measured]:
        with torch.no_grad():
            return [Measured("elbo", silent.elbo(model.joint, x, model.encoder(x)).mean().item(), at=epoch)]

    training = Training(model, images.train, config["estimator"], recipe(config, seed))
    measured = train(training, look, report)
    if measured[-1].value:
        return measured
    with torch.no_grad():
        measured += [
            Measured("test elbo", silent.elbo(model.joint, test, model.encoder(test)).mean().item()),
            Measured("test log-likelihood", *evaluation.mean_and_standard_error(log_marginal(model, test))),
        ]
        if config["latent"] == "gaussian":
            best = models.ppca(x.double(), model.joint.weight.shape[1])
            measured += [
                Measured("log-likelihood", model.joint.log_marginal(x).mean().item()),
                Measured("ppca", best.log_marginal(x.double()).mean().item()),
            ]
    return measured


def log_marginal(model: VAE, x: Tensor) -> Tensor:
    """Return log p(x), ``[N]``: exact for the linear models, by 200 importance samples for the others."""
    if hasattr(model.joint, "log_marginal"):
        return model.joint.log_marginal(x)
    if getattr(model.joint, "prior", None) is None:
        return evaluation.log_likelihood(model, x, 200, 50, stream("test", 1, x.device))
    return torch.cat([discrete.log_marginal(model.joint, part, model.encoder(part)) for part in x.split(50)])


def at_epoch(found: DataFrame, metric: str, at: int | None = None) -> DataFrame:
    """Return a metric's numbers at an epoch; for None at the last one, or what stands for the whole run."""
    last = found["at"].isna() | (found["at"] == found["epochs"])
    return found[(found["metric"] == metric) & (last if at is None else found["at"] == at)]


def final(found: DataFrame, metric: str, by: Sequence[str]) -> DataFrame:
    """Return the mean of a curve's last point over the seeds of the runs that got there."""
    return over_seeds(at_epoch(found, metric), by)


ARM = ["data", "latent", "estimator"]


def best_rates(found: DataFrame, at: int | None = None, arm: Sequence[str] = ARM) -> Series:
    """Return the learning rate of the highest mean ELBO at an epoch, the last if None, for each arm of a study."""
    means = over_seeds(at_epoch(found, "elbo", at), [*arm, "lr"])["mean"].fillna(math.inf)  # so that it is seen
    return means.groupby(list(arm), sort=False).idxmax().str[-1].rename("lr")


def at_best_rate(found: DataFrame, at: int | None = None, arm: Sequence[str] = ARM) -> DataFrame:
    """Return the runs at each arm's best learning rate."""
    return found.merge(best_rates(found, at, arm).reset_index(), on=[*arm, "lr"])


def leads(found: DataFrame, metric: str, at: int | None = None) -> DataFrame:
    """Return by how many nats the silent gradient leads each arm, both at their best rates, paired by seed."""
    behind = differences(at_epoch(at_best_rate(found, at), metric, at), ARM, estimator="elbo-silent")
    others = behind[behind["estimator"] != "elbo-silent"]
    return over_seeds(others.assign(value=-others["value"]), ARM)


def shortfalls(found: DataFrame) -> DataFrame:
    """Return by how many nats the final ELBO falls short of the best of all, averaged over the learning rates.

    The mean and standard error are over seeds; a learning rate at which a run diverged counts as the ELBO it began at.
    """
    run = [*ARM, "lr", "seed"]
    first, last = (at_epoch(found, "elbo", at).set_index(run)["value"] for at in (0, None))
    ends = last.reindex(first.index).where(first.index.isin(last.index), first).reset_index()
    best = last.groupby(["data", "latent"]).agg(lambda elbos: elbos.max(skipna=False)).rename("best")
    ends = ends.join(best, on=["data", "latent"])
    lost = (ends["best"] - ends["value"]).groupby([ends[name] for name in (*ARM, "seed")], sort=False)
    return over_seeds(lost.agg(lambda rates: rates.mean(skipna=False)).rename("value").reset_index(), ARM)


EARLY = 3


def table_linear(found: DataFrame) -> Lines:
    """Return for each estimator the ELBO early and at the end, each at the best rate for it, test log p(x), what other
    rates cost, and by how much the silent gradient leads.
    """
    early, best, rates = at_best_rate(found, EARLY), at_best_rate(found), best_rates(found)
    diverged = select(found, "diverged").groupby(ARM)["value"].agg(lambda runs: runs.sum(skipna=False))
    elbos = {
        "elbo early": over_seeds(at_epoch(early, "elbo", EARLY), ARM),
        "elbo": final(best, "elbo", ARM),
        "test log p(x)": final(best, "test log-likelihood", ARM),
    }
    lead = [leads(found, "elbo", EARLY), leads(found, "elbo"), leads(found, "test log-likelihood")]
    words = {
        "best lr": rates.map("{:g}".format),
        **{name: plus_minus(each) for name, each in elbos.items()},
        "mean shortfall over rates": plus_minus(shortfalls(found)),
        "diverged": diverged.map("{:.0f}".format),
        **{f"silent leads: {name}": plus_minus(each) for name, each in zip(elbos, lead, strict=True)},
    }
    return as_lines(DataFrame(words, index=rates.index))


def figure_linear(found: DataFrame, figure: Figure) -> None:
    """Draw the ELBO by epoch at each estimator's best rate, and below it the final ELBO by rate."""
    kinds = list(found[["data", "latent"]].drop_duplicates().itertuples(index=False, name=None))
    axes = figure.subplots(2, len(kinds), squeeze=False)
    ends, best = final(found, "elbo", [*ARM, "lr"])["mean"].reset_index(), at_best_rate(found)
    for column, kind in zip(axes.T, kinds, strict=True):
        here, ends_here = (each[(each["data"] == kind[0]) & (each["latent"] == kind[1])] for each in (best, ends))
        for name in LATENTS[kind[1]][1]:
            draw_curve(column[0], here[here["estimator"] == name], "elbo", plots.LOOKS[name])
            by_rate = ends_here[ends_here["estimator"] == name]
            column[1].plot(by_rate["lr"], by_rate["mean"], **plots.LOOKS[name].points())
        column[0].set(title=" ".join(kind), xlabel="epoch")
        rates = sorted(ends_here["lr"].unique())
        column[1].set(xscale="log", xlabel="learning rate")
        column[1].set_xticks(rates, [f"{lr:g}" for lr in rates])
        column[1].minorticks_off()
        for ax in column:
            trim(ax)
    axes[0, 0].set_ylabel("ELBO (nats)")
    axes[1, 0].set_ylabel("final ELBO (nats)")
    plots.legend_below(figure, columns=5, fontsize="small")


def draw_curve(ax, found: DataFrame, metric: str, look: plots.Look) -> None:
    """Draw a metric over ``at`` with a band over seeds."""
    points = curve(found, metric)
    error = 2 * points["standard_error"].fillna(0)
    ax.plot(points["mean"], **look.line())
    ax.fill_between(
        points.index, points["mean"] - error, points["mean"] + error, color=look.color, alpha=0.2, linewidth=0
    )


def trim(ax) -> None:
    """Leave the depths where training began out of the picture."""
    values = np.concatenate([line.get_ydata() for line in ax.lines])
    low = np.median(values) - 2 * (values.max() - np.median(values))
    ax.set_ylim(max(low, values.min()), None)


# --- nonlinear decoders -----------------------------------------------------------------------------------------------

SIZES = {"hidden": 100, "latent": 16}

BASES: Mapping[str, tuple[str, int]] = {
    "elbo-total": ("guided", 1),
    "elbo-gumbel-softmax": ("guided-bernoulli", 1),
    "elbo-score-loo": ("guided-bernoulli", 2),
}
"""The estimator of the nonlinear decoder's gradient: the model it trains, and its draws."""

METHODS: Mapping[str, tuple[str | None, bool]] = {
    "plain": (None, True),
    "linear": ("linear", True),
    "cosine": ("cosine", True),
    "linear, sampled": ("linear", False),
}
"""How the linear decoder's weight goes from 1 to 0, and whether its gradient is exact or, as the control, sampled."""


def annealed_grid(
    sets: Mapping[str, int],
    methods: Iterable[str],
    epochs: int,
    anneal: float = 0.5,
    valid: int = 0,
    patience: int | None = None,
) -> list[Cell]:
    return [
        {
            "data": name,
            "estimator": base,
            "method": method,
            "anneal": anneal,
            "lr": 1e-3,
            "k": BASES[base][1],
            "images": images,
            "valid": valid,
            "batch_size": 50,
            "epochs": epochs,
            "patience": patience,
        }
        for name, images in sets.items()
        for base in BASES
        for method in methods
    ]


def estimator_at(config: Cell) -> Callable[[Progress], Estimator]:
    """Return the estimator for each step of a training."""
    base, (schedule, exact) = estimators.get(config["estimator"]), METHODS[config["method"]]
    guide = silent.ELBO if exact else base
    if schedule is None:
        return lambda progress: silent.annealed(base, 0.0)
    weight = silent.SCHEDULES[schedule]
    return lambda progress: silent.annealed(base, weight(progress.done / config["anneal"]), guide)


class EarlyStopping(Hook):
    """Keep the weights of the best held-out ELBO, and stop where it has not risen for ``patience`` epochs.

    These are counted from the best epoch, or from the end of the guide's share of the training, if that is later.
    """

    def __init__(self, x: Tensor, patience: int, guided: float) -> None:
        self.x, self.patience, self.guided = x, patience, guided
        self.best, self.waited, self.weights = -math.inf, 0, None

    def after_epoch(self, training: Training, record: dict[str, Any]) -> None:
        """Measure, and keep or wait."""
        record["held_out"] = mean_elbo(training.model, self.x)
        better = record["held_out"] > self.best
        if better:
            self.best, self.weights = record["held_out"], copy.deepcopy(training.model.state_dict())
        self.waited = 0 if better or training.progress.done < self.guided else self.waited + 1
        training.stopped |= self.waited >= self.patience

    def finish(self, training: Training) -> None:
        """Leave the model with its best weights."""
        if self.weights is not None:
            training.model.load_state_dict(self.weights)


def run_annealed(config: Cell, seed: int, folder: Path, device: str, report: Report) -> list[Measured]:
    """Train an encoder with two decoders, from the linear one's gradient to the nonlinear one's."""
    model, images = start(config, seed, BASES[config["estimator"]][0], device, **SIZES)
    stops = config["patience"] is not None
    hooks = [EarlyStopping(images.valid.grey, config["patience"], config["anneal"])] if stops else []
    training = Training(model, images.train, estimator_at(config), recipe(config, seed), hooks)
    measured = train(training, lambda epoch: test_elbo(model, images.test.grey, epoch), report)
    if measured[-1].value:
        return measured
    if stops:
        measured += [
            Measured("best elbo", mean_elbo(model, images.test.grey)),
            Measured("epochs taken", len(training.history)),
        ]
    return measured + test_log_likelihood(model, images.test.grey)


def mean_elbo(model: VAE, x: Tensor, draws: int = 10) -> float:
    """Return the ELBO of the model over ``x``, whatever it is trained with; the same noise every time."""
    with torch.no_grad():
        q = model.encoder(x)
        z = q.sample(q.noise(draws, stream("test", 0, x.device)))
        elbo = model.joint.log_likelihood(x, z).mean(0) - divergence(model.joint.joint, q)
    return elbo.mean().item()


def test_elbo(model: VAE, x: Tensor, epoch: int) -> list[Measured]:
    """Return the test ELBO after an epoch."""
    return [Measured("elbo", mean_elbo(model, x), at=epoch)]


def test_log_likelihood(model: VAE, x: Tensor, samples: int = 100) -> list[Measured]:
    """Return the test log-likelihood by importance sampling, and its standard error over the images."""
    found = evaluation.log_likelihood(model, x, samples, 50, stream("test", 1, x.device))
    return [Measured("log-likelihood", *evaluation.mean_and_standard_error(found))]


METHOD = ["data", "estimator", "method"]


def over_plain(found: DataFrame, metric: str, at: int | None = None) -> DataFrame:
    """Return the nats that a method gains on training without a guide at an epoch, the last if None, paired by seed."""
    return over_seeds(differences(at_epoch(found, metric, at), METHOD, method="plain"), METHOD)


def table_annealed(found: DataFrame) -> Lines:
    """Return each method's test ELBO, early and where it stopped, log p(x) there, and its gain in that on no guide."""
    best, last = over_seeds(select(found, "best elbo"), METHOD), final(found, "elbo", METHOD)
    late = last if best.empty else best
    words = {
        f"elbo, epoch {EARLY}": plus_minus(over_seeds(select(found, "elbo", EARLY), METHOD)),
        "final elbo": plus_minus(late),
        "log p(x)": plus_minus(over_seeds(select(found, "log-likelihood"), METHOD)),
        "gain in log p(x)": plus_minus(over_plain(found, "log-likelihood")),
        "seeds": late["n"].map(str),
    }
    return as_lines(DataFrame(words, index=late.index))


METHOD_LOOKS = {
    "plain": plots.Look(plots.BLUE, "-", "o", "no guide"),
    "linear": plots.Look(plots.GREEN, "-", "*", "exact guide, linear"),
    "cosine": plots.Look(plots.GREEN, "--", "D", "exact guide, cosine"),
    "linear, sampled": plots.Look(plots.RED, "-", "s", "sampled guide, linear"),
    "linear decoder": plots.Look(plots.GREEN, "-", "*", "linear decoder's"),
    "expansion": plots.Look(plots.ORANGE, "--", "D", "own expansion's"),
}
"""The look of every way to use a guide."""


def figure_annealed(found: DataFrame, figure: Figure) -> None:
    """Draw the test ELBO by epoch, for each data set and estimator."""
    _panels(found, figure, "elbo", "test ELBO (nats)", trimmed=True)


def _panels(found: DataFrame, figure: Figure, metric: str, label: str, trimmed: bool = False) -> None:
    sets, bases = found["data"].unique(), found["estimator"].unique()
    axes = figure.subplots(len(sets), len(bases), squeeze=False)
    for ax, (name, base) in zip(axes.flat, itertools.product(sets, bases), strict=True):
        here = found[(found["data"] == name) & (found["estimator"] == base) & (found["metric"] == metric)]
        for method, runs_of_it in here.groupby("method", sort=False):
            draw_curve(ax, runs_of_it, metric, METHOD_LOOKS[method])
        ax.set(title=f"{name}, {base}", xlabel="epoch", ylabel=label)
        if trimmed and ax.lines:
            trim(ax)
    plots.legend_below(figure, columns=5, fontsize="small")


# --- the control variate ----------------------------------------------------------------------------------------------

CONTROLS: Mapping[str, silent.Control | None] = {
    "plain": None,
    "linear decoder": silent.linear_control,
    "expansion": silent.taylor_control,
}
"""What is used as the control variate."""

CONTROLLED: Mapping[str, tuple[str, int, tuple[str, ...]]] = {
    "elbo-total": ("guided", 1, ("plain", "linear decoder", "expansion")),
    "elbo-path": ("guided", 1, ("plain", "linear decoder")),
    "elbo-score-loo": ("guided", 2, ("plain", "linear decoder")),
    "elbo-disarm": ("guided-bernoulli", 1, ("plain", "linear decoder")),
}
"""The estimators: the model each trains here, its draws, and the control variates it is tried with."""


CONTROLLED_RATES = (3e-4, 1e-3, 3e-3, 1e-2)


def controlled_grid(sets: Mapping[str, int], rates: Sequence[float], epochs: int) -> list[Cell]:
    return [
        {
            "data": name,
            "estimator": base,
            "method": method,
            "lr": lr,
            "k": k,
            "images": images,
            "batch_size": 50,
            "epochs": epochs,
        }
        for name, images in sets.items()
        for base, (_, k, methods) in CONTROLLED.items()
        for method in methods
        for lr in rates
    ]


LOOK_AT, DRAWS, UPDATES = 50, 50, 3


def run_controlled(config: Cell, seed: int, folder: Path, device: str, report: Report) -> list[Measured]:
    """Train with a control variate, or without; on the way measure its variance beside that of the bare estimator."""
    model, images = start(config, seed, CONTROLLED[config["estimator"]][0], device, **SIZES)
    x, base, control = images.train.grey, estimators.get(config["estimator"]), CONTROLS[config["method"]]
    bare, path = silent.annealed(base, 0.0), silent.annealed(estimators.get("elbo-path"), 0.0)
    noise = stream("noise", seed, device, step=1)
    tracked = (
        silent.TrackedScale(base, model, x[-50:], config["k"], control=control, generator=noise) if control else bare
    )

    def look(epoch: int) -> list[Measured]:
        found = test_elbo(model, images.test.grey, epoch)
        settings = {"draws": DRAWS, "k": config["k"], "wrt": "posterior"}

        def variance(row: Estimator) -> float:
            noise = stream("test", epoch, device)
            (moments,) = gradients.measure(
                [row], model.joint, model.encoder, x[:LOOK_AT], generator=noise, **settings
            ).values()
            return moments.total_variance

        mine = variance(training.estimator)
        found.append(Measured("variance", mine, at=epoch))
        if control:
            found.append(Measured("variance ratio", mine / variance(bare), at=epoch))
            found.append(Measured("scale", tracked.scale, at=epoch))
        if config["estimator"] in ("elbo-total", "elbo-path"):
            found.append(Measured("variance over path", mine / variance(path), at=epoch))
        return found

    training = Training(model, images.train, tracked, recipe(config, seed))
    measured = train(training, look, report)
    if measured[-1].value:
        return measured
    if control:
        measured.append(Measured("cost ratio", cost_ratio(tracked, model, x[: config["batch_size"]])))
    return measured + test_log_likelihood(model, images.test.grey)


def cost_ratio(tracked: silent.TrackedScale, model: VAE, x: Tensor) -> float:
    """Return the processor time of gradients with a control variate, guide and looks at the scale, over bare ones."""
    eps = model.encoder(x).noise(tracked.k, stream("test", 2, x.device))

    def seconds(estimator: Callable[[], Estimator], joint: nn.Module) -> float:
        model.zero_grad()
        begin = time.process_time()
        objectives.backward(estimator(), joint, model.encoder(x), x, eps)
        return time.process_time() - begin

    pairs = [
        (seconds(tracked, model.joint), seconds(lambda: tracked.base, model.joint.joint))
        for _ in range(UPDATES * tracked.every)
    ]
    return sum(mine for mine, _ in pairs) / sum(bare for _, bare in pairs)


def table_controlled(found: DataFrame) -> Lines:
    """Return for each control variate, at the best rate for it: variance ratio early and late, cost ratio, test ELBO
    and what it gains.
    """
    rates, found = best_rates(found, arm=METHOD), at_best_rate(found, arm=METHOD)
    elbo = final(found, "elbo", METHOD)
    words = {
        "best lr": rates.map("{:g}".format),
        f"variance ratio, epoch {EARLY}": plus_minus(over_seeds(select(found, "variance ratio", EARLY), METHOD)),
        "at the end": plus_minus(final(found, "variance ratio", METHOD)),
        "cost ratio": plus_minus(over_seeds(select(found, "cost ratio"), METHOD)),
        "final elbo": plus_minus(elbo),
        "gain in elbo": plus_minus(over_plain(found, "elbo")),
        "seeds": elbo["n"].map(str),
    }
    return as_lines(DataFrame(words, index=elbo.index))


def figure_controlled(found: DataFrame, figure: Figure) -> None:
    """Draw the variance that is left, by epoch, at the best rate for each."""
    _panels(at_best_rate(found, arm=METHOD), figure, "variance ratio", "variance ratio")
    for ax in figure.axes:
        ax.axhline(1.0, color="k", linewidth=0.8)


EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            name="silent-linear",
            reproduces="Shao et al. 2025, the linear decoder study (design ours): silent against stochastic gradients",
            presets={
                "smoke": Preset(linear_grid("digits", 500, (1e-2,), 3, LATENTS), seeds=1, minutes=0.2),
                "short": Preset(
                    linear_grid("digits", 1497, RATES, 15, LATENTS)
                    + linear_grid("fashion-mnist", 1000, RATES, 15, LINEAR),
                    seeds=10,
                    minutes=70,
                ),
            },
            run=run_linear,
            table=table_linear,
            figure=figure_linear,
            metrics=("diverged", "test elbo", "test log-likelihood", "log-likelihood", "ppca"),
            curves=("elbo",),
        ),
        Experiment(
            name="silent-annealed",
            reproduces="Shao et al. 2025, nonlinear decoders (design ours): exact gradients first, annealed to "
            "sampled ones",
            presets={
                "smoke": Preset(annealed_grid({"digits": 300}, METHODS, 4, 0.5, 100, 1), seeds=1, minutes=0.3),
                "short": Preset(
                    annealed_grid({"mnist": 2000, "fashion-mnist": 2000, "omniglot": 2000}, METHODS, 10),
                    seeds=3,
                    minutes=8,
                ),
                "long": Preset(  # to a stopping rule: ten epochs without a better ELBO of 500 images that are held out
                    annealed_grid({"mnist": 1000, "fashion-mnist": 1000}, METHODS, 200, 0.1, 500, 10),
                    seeds=10,
                    minutes=90,
                ),
            },
            run=run_annealed,
            table=table_annealed,
            figure=figure_annealed,
            metrics=("diverged", "best elbo", "epochs taken", "log-likelihood"),
            curves=("elbo",),
        ),
        Experiment(
            name="silent-control-variate",
            reproduces="ours: the silent gradient of a linear decoder as a control variate for a nonlinear one",
            presets={
                "smoke": Preset(controlled_grid({"digits": 300}, (1e-3,), 3), seeds=1, minutes=0.5),
                "short": Preset(
                    controlled_grid({"digits": 1497}, CONTROLLED_RATES, 15)
                    + controlled_grid({"mnist": 2000}, CONTROLLED_RATES, 10),
                    seeds=10,
                    minutes=90,
                ),
            },
            run=run_controlled,
            table=table_controlled,
            figure=figure_controlled,
            metrics=("diverged", "cost ratio", "log-likelihood"),
            curves=("elbo", "variance", "variance ratio", "scale", "variance over path"),
        ),
    )
}
"""The experiments of this file, by name."""
