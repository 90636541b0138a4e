r"""Silent gradients (after Shao et al. 2025): linear decoders, annealing to nonlinear ones, and control variates.

Their tables, schedule and code are not published, so that these experiments are of our own design and test the claims:
faster, better, more robust. Pixels are grey and Gaussian throughout, also those of the nonlinear decoder: then the two
decoders are models of the same data, their bounds are in the same units, and a weight between them means what it says.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from vaelib import data, estimators, evaluation, gradients, models, objectives, plots
from vaelib.bounds import divergence
from vaelib.config import Recipe
from vaelib.data import Images
from vaelib.estimators import Estimator, discrete, silent
from vaelib.experiments.experiment import Cell, Experiment, Measured, Preset, Report, Row
from vaelib.experiments.results import Summary, over_seeds, paired, summarise
from vaelib.models import VAE
from vaelib.training import Diverged, Progress, Training, stream

TEST_IMAGES = 300


@cache
def some(name: str, count: int) -> Images:
    """Return a data set in grey, with ``count`` training images and at most 300 test images, the same in every run."""
    images = data.load(name, "grey")
    return replace(images, train=images.train.sample(count), valid=None, test=images.test.sample(TEST_IMAGES))


def start(config: Cell, seed: int, model: str, device: str, **sizes: int) -> tuple[VAE, Images]:
    """Return the model of a run before its first step, the same for all estimators of a seed, and its images."""
    images = some(config["data"], config["images"])
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


def at_epoch(rows: Iterable[Row], metric: str, at: int | None = None) -> list[Row]:
    """Return the rows of a metric at an epoch; at the last one, and what stands for a whole run, if ``at`` is None."""
    places = (lambda row: (None, row["epochs"])) if at is None else (lambda row: (at,))
    return [{**row, "at": None} for row in rows if row["metric"] == metric and row["at"] in places(row)]


def final(rows: Iterable[Row], metric: str, by: Sequence[str]) -> dict[tuple, Summary]:
    """Return the mean of a curve's last point over the seeds of the runs that got there."""
    return over_seeds(at_epoch(rows, metric), metric, by)


ARM = ("data", "latent", "estimator")


def best_rates(rows: Sequence[Row], at: int | None = None) -> dict[tuple[str, str, str], float]:
    """Return the learning rate of the highest mean ELBO at an epoch, the last if None, for each arm of the study."""
    best: dict[tuple, tuple[float, float]] = {}
    for (*key, lr), found in over_seeds(at_epoch(rows, "elbo", at), "elbo", (*ARM, "lr")).items():
        best[tuple(key)] = max(best.get(tuple(key), (-math.inf, 0.0)), (found.mean, lr))
    return {key: lr for key, (_, lr) in best.items()}


def at_best_rate(rows: Sequence[Row], at: int | None = None) -> list[Row]:
    """Return the rows of the runs at each arm's best learning rate."""
    best = best_rates(rows, at)
    return [row for row in rows if best.get(tuple(row[name] for name in ARM)) == row["lr"]]


def leads(rows: Sequence[Row], metric: str, at: int | None = None) -> dict[tuple[str, str, str], Summary]:
    """Return by how many nats the silent gradient leads each arm, both at their best rates, paired by seed."""
    chosen = at_epoch(at_best_rate(rows, at), metric, at)
    negated = {(*(row[name] for name in ARM), row["seed"]): -row["value"] for row in chosen}
    return {key: lead for key, lead in paired(negated, "elbo-silent").items() if key[-1] != "elbo-silent"}


def shortfalls(rows: Sequence[Row]) -> dict[tuple[str, str, str], Summary]:
    """Return by how many nats the final ELBO falls short of the best of all, averaged over the learning rates.

    The mean and standard error are over seeds; a learning rate at which a run diverged counts as the ELBO it began at.
    """
    keys = ("data", "latent", "estimator", "seed", "lr")
    first, last, top = {}, {}, {}
    for row in rows:
        if row["metric"] == "elbo":
            key = tuple(row[name] for name in keys)
            if row["at"] == 0:
                first[key] = row["value"]
            if row["at"] == row["epochs"]:
                last[key] = row["value"]
                top[key[:2]] = max(top.get(key[:2], -math.inf), row["value"])
    lost: dict[tuple, list[float]] = {}
    for key in first:
        lost.setdefault(key[:-1], []).append(top[key[:2]] - last.get(key, first[key]))
    seeds: dict[tuple, list[float]] = {}
    for key, values in lost.items():
        seeds.setdefault(key[:-1], []).append(sum(values) / len(values))
    return {key: summarise(values) for key, values in seeds.items()}


EARLY = 3


def table_linear(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return for each estimator the ELBO early and at the end, each at the best rate for it, test log p(x), what other
    rates cost, and by how much the silent gradient leads.
    """
    early = over_seeds(at_epoch(at_best_rate(rows, EARLY), "elbo", EARLY), "elbo", ARM)
    best, lost, rates = at_best_rate(rows), shortfalls(rows), best_rates(rows)
    late, test = final(best, "elbo", ARM), final(best, "test log-likelihood", ARM)
    lead = [leads(rows, "elbo", EARLY), leads(rows, "elbo"), leads(rows, "test log-likelihood")]
    unfinished = Counter(
        tuple(row[name] for name in ARM) for row in rows if row["metric"] == "diverged" and row["value"]
    )
    names = ("elbo early", "elbo", "test log p(x)")
    lines = [(*ARM, "best lr", *names, "mean shortfall over rates", "diverged", *(f"silent leads: {n}" for n in names))]
    for key, lr in rates.items():
        found = (early.get(key, "-"), late[key], test.get(key, "-"), lost[key], unfinished[key])
        lines.append((*key, f"{lr:g}", *map(str, found), *(str(one.get(key, "-")) for one in lead)))
    return lines


def figure_linear(rows: Sequence[Row], figure: Figure) -> None:
    """Draw the ELBO by epoch at each estimator's best rate, and below it the final ELBO by rate."""
    kinds = list(dict.fromkeys((row["data"], row["latent"]) for row in rows))
    axes = figure.subplots(2, len(kinds), squeeze=False)
    lines = ("data", "latent", "estimator", "lr")
    ends, best = final(rows, "elbo", lines), at_best_rate(rows)
    for column, kind in zip(axes.T, kinds, strict=True):
        for name in LATENTS[kind[1]][1]:
            curve = [row for row in best if (row["data"], row["latent"], row["estimator"]) == (*kind, name)]
            draw_curve(column[0], curve, "elbo", plots.LOOKS[name])
            rates = {lr: end for (*key, lr), end in ends.items() if tuple(key) == (*kind, name)}
            column[1].plot(list(rates), [end.mean for end in rates.values()], **plots.LOOKS[name].points())
        column[0].set(title=" ".join(kind), xlabel="epoch")
        rates = sorted({lr for (*key, lr) in ends if tuple(key[:2]) == kind})
        column[1].set(xscale="log", xlabel="learning rate")
        column[1].set_xticks(rates, [f"{lr:g}" for lr in rates])
        column[1].minorticks_off()
        for ax in column:
            trim(ax)
    axes[0, 0].set_ylabel("ELBO (nats)")
    axes[1, 0].set_ylabel("final ELBO (nats)")
    legend(figure)


def legend(figure: Figure) -> None:
    """Name every line of a figure once, below it."""
    lines = {line.get_label(): line for ax in figure.axes for line in ax.lines if not line.get_label().startswith("_")}
    if lines:
        figure.legend(lines.values(), lines, loc="outside lower center", ncols=5, fontsize="small")


def draw_curve(ax, rows: Sequence[Row], metric: str, look: plots.Look) -> None:
    """Draw a metric over ``at`` with a band over seeds."""
    chosen = sorted((row["at"], row["value"]) for row in rows if row["metric"] == metric)
    points = {at: summarise([value for _, value in group]) for at, group in groupby(chosen, lambda point: point[0])}
    mean = np.array([point.mean for point in points.values()])
    error = np.nan_to_num([point.standard_error for point in points.values()])
    ax.plot(list(points), mean, **look.line())
    ax.fill_between(list(points), mean - 2 * error, mean + 2 * error, color=look.color, alpha=0.2, linewidth=0)


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


def annealed_grid(sets: Mapping[str, int], methods: Iterable[str], epochs: int) -> list[Cell]:
    return [
        {
            "data": name,
            "estimator": base,
            "method": method,
            "anneal": 0.5,
            "lr": 1e-3,
            "k": BASES[base][1],
            "images": images,
            "batch_size": 50,
            "epochs": epochs,
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


def run_annealed(config: Cell, seed: int, folder: Path, device: str, report: Report) -> list[Measured]:
    """Train an encoder with two decoders, from the linear one's gradient to the nonlinear one's."""
    model, images = start(config, seed, BASES[config["estimator"]][0], device, **SIZES)
    training = Training(model, images.train, estimator_at(config), recipe(config, seed))
    measured = train(training, lambda epoch: test_elbo(model, images.test.grey, epoch), report)
    return measured if measured[-1].value else measured + test_log_likelihood(model, images.test.grey)


def test_elbo(model: VAE, x: Tensor, epoch: int, draws: int = 10) -> list[Measured]:
    """Return the test ELBO of the model, whatever it is trained with; the same noise every time."""
    with torch.no_grad():
        q = model.encoder(x)
        z = q.sample(q.noise(draws, stream("test", 0, x.device)))
        elbo = model.joint.log_likelihood(x, z).mean(0) - divergence(model.joint.joint, q)
    return [Measured("elbo", elbo.mean().item(), at=epoch)]


def test_log_likelihood(model: VAE, x: Tensor, samples: int = 100) -> list[Measured]:
    """Return the test log-likelihood by importance sampling, and its standard error over the images."""
    found = evaluation.log_likelihood(model, x, samples, 50, stream("test", 1, x.device))
    return [Measured("log-likelihood", *evaluation.mean_and_standard_error(found))]


def over_plain(rows: Sequence[Row], metric: str, at: int | None = None) -> dict[tuple[str, str, str], Summary]:
    """Return the nats that a method gains on training without a guide at an epoch, the last if None, paired by seed."""
    names = ("data", "estimator", "method", "seed")
    return paired({tuple(row[n] for n in names): row["value"] for row in at_epoch(rows, metric, at)}, "plain")


def table_annealed(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return each method's test ELBO, early and at the end, and log p(x), and its gain on no guide in the last two."""
    by = ("data", "estimator", "method")
    early, late = over_seeds(rows, "elbo", by, at=EARLY), final(rows, "elbo", by)
    likelihood, gain = over_seeds(rows, "log-likelihood", by), over_plain(rows, "log-likelihood")
    lines = [(*by, f"elbo, epoch {EARLY}", "final elbo", "log p(x)", "gain in log p(x)", "seeds")]
    for key, found in late.items():
        cells = (early.get(key, "-"), found, likelihood.get(key, "-"), gain.get(key, "-"), found.n)
        lines.append((*key, *map(str, cells)))
    return lines


METHOD_LOOKS = {
    "plain": plots.Look(plots.BLUE, "-", "o", "no guide"),
    "linear": plots.Look(plots.GREEN, "-", "*", "exact guide, linear"),
    "cosine": plots.Look(plots.GREEN, "--", "D", "exact guide, cosine"),
    "linear, sampled": plots.Look(plots.RED, "-", "s", "sampled guide, linear"),
    "linear decoder": plots.Look(plots.GREEN, "-", "*", "linear decoder's"),
    "expansion": plots.Look(plots.ORANGE, "--", "D", "own expansion's"),
}
"""The look of every way to use a guide."""


def figure_annealed(rows: Sequence[Row], figure: Figure) -> None:
    """Draw the test ELBO by epoch, for each data set and estimator."""
    _panels(rows, figure, "elbo", "test ELBO (nats)", trimmed=True)


def _panels(rows: Sequence[Row], figure: Figure, metric: str, label: str, trimmed: bool = False) -> None:
    sets, bases = (list(dict.fromkeys(row[name] for row in rows)) for name in ("data", "estimator"))
    axes = figure.subplots(len(sets), len(bases), squeeze=False)
    for line, name in zip(axes, sets, strict=True):
        for ax, base in zip(line, bases, strict=True):
            for method in dict.fromkeys(row["method"] for row in rows):
                chosen = (name, base, method)
                curve = [row for row in rows if (row["data"], row["estimator"], row["method"]) == chosen]
                if any(row["metric"] == metric for row in curve):
                    draw_curve(ax, curve, metric, METHOD_LOOKS[method])
            ax.set(title=f"{name}, {base}", xlabel="epoch", ylabel=label)
            if trimmed and ax.lines:
                trim(ax)
    legend(figure)


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


def controlled_grid(sets: Mapping[str, int], epochs: int) -> list[Cell]:
    return [
        {
            "data": name,
            "estimator": base,
            "method": method,
            "lr": 1e-3,
            "k": k,
            "images": images,
            "batch_size": 50,
            "epochs": epochs,
        }
        for name, images in sets.items()
        for base, (_, k, methods) in CONTROLLED.items()
        for method in methods
    ]


LOOK_AT, DRAWS, LOOKS = 50, 50, 3


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
        for _ in range(LOOKS * tracked.every)
    ]
    return sum(mine for mine, _ in pairs) / sum(bare for _, bare in pairs)


def table_controlled(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return for each control variate: variance ratio early and late, cost ratio, test ELBO and what it gains."""
    by = ("data", "estimator", "method")
    ratios = [over_seeds(rows, "variance ratio", by, at=EARLY), final(rows, "variance ratio", by)]
    cost, elbo = over_seeds(rows, "cost ratio", by), final(rows, "elbo", by)
    gain = over_plain(rows, "elbo")
    lines = [(*by, f"variance ratio, epoch {EARLY}", "at the end", "cost ratio", "final elbo", "gain in elbo", "seeds")]
    for key, found in elbo.items():
        cells = (*(ratio.get(key, "-") for ratio in ratios), cost.get(key, "-"), found, gain.get(key, "-"), found.n)
        lines.append((*key, *map(str, cells)))
    return lines


def figure_controlled(rows: Sequence[Row], figure: Figure) -> None:
    """Draw the variance that is left, by epoch."""
    _panels(rows, figure, "variance ratio", "variance ratio")
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
                    linear_grid("digits", 1497, RATES, 15, LINEAR)
                    + linear_grid("digits", 1497, RATES[:3], 15, ("gaussian-cosine",))
                    + linear_grid("fashion-mnist", 1000, RATES[1:4], 15, LINEAR),
                    seeds=5,
                    minutes=30,
                ),
            },
            run=run_linear,
            table=table_linear,
            figure=figure_linear,
        ),
        Experiment(
            name="silent-annealed",
            reproduces="Shao et al. 2025, nonlinear decoders (design ours): exact gradients first, annealed to "
            "sampled ones",
            presets={
                "smoke": Preset(annealed_grid({"digits": 300}, METHODS, 3), seeds=1, minutes=0.3),
                "short": Preset(
                    annealed_grid({"mnist": 2000, "fashion-mnist": 2000, "omniglot": 2000}, METHODS, 10),
                    seeds=3,
                    minutes=8,
                ),
            },
            run=run_annealed,
            table=table_annealed,
            figure=figure_annealed,
        ),
        Experiment(
            name="silent-control-variate",
            reproduces="ours: the silent gradient of a linear decoder as a control variate for a nonlinear one",
            presets={
                "smoke": Preset(controlled_grid({"digits": 300}, 3), seeds=1, minutes=0.5),
                "short": Preset(
                    controlled_grid({"digits": 1497}, 15) + controlled_grid({"mnist": 2000}, 10), seeds=3, minutes=6
                ),
            },
            run=run_controlled,
            table=table_controlled,
            figure=figure_controlled,
        ),
    )
}
"""The experiments of this file, by name."""
