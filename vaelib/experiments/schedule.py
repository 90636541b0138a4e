"""Table 2's question as a function of the length of training: path against total after each stage of the schedule.

What was decided before the first run. The paper's recipe, dynamically binarised MNIST, all test images. After each of
the eight stages (1, 4, 13, 40, 121, 364, 1,093 and 3,280 epochs), -log p(x) by 1,000 importance samples, by 5,000 after
the last; the same seed has the same initial weights, data, noise and test draws with every estimator. What counts is
the mean of the paired differences and its 95% interval by Student's t: an estimator is *ahead* where that lies on its
side of 0; the two are *alike* where it lies within :data:`MARGIN`; all else, and whatever fewer than :data:`FEWEST`
seeds say, is *undecided*.
"""

from __future__ import annotations

import hashlib
import itertools
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from pandas import DataFrame

from vaelib import data, files, models, plots, runs
from vaelib.config import Config, Recipe
from vaelib.errors import InputError
from vaelib.experiments import stl
from vaelib.experiments.experiment import Cell, Experiment, Lines, Measured, Preset, Report, Task
from vaelib.experiments.results import differences, over_seeds, plus_minus, select
from vaelib.experiments.stl import PAIRS, in_nats, published_gain
from vaelib.stacked import StackedTraining
from vaelib.training import BURDA_EPOCHS, Training, stream

STAGES = tuple(int(epochs) for epochs in np.cumsum(BURDA_EPOCHS))
MARGIN = 0.1
"""Nats that would not change what anybody does."""
FEWEST = 10
"""Seeds below which nothing is decided."""
LEVEL = 0.95
EVALUATED_AT_ONCE = {"cpu": 100, "cuda": 2000}
"""As many as alone, so that the draws are those of a run alone, or as many as fill a GPU."""
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""What asks a training to save and end."""


def cells(data: str, arms: Iterable[tuple[str, str, int]], stages: Iterable[int], samples: int) -> list[Cell]:
    """Return the cells of some arms (model, estimator, k), stage after stage, so that each goes on from the last."""
    return [
        {
            "data": data,
            "model": model,
            "estimator": estimator,
            "k": k,
            "epochs": epochs,
            "samples": samples if epochs < STAGES[-1] else 5 * samples,
        }
        for epochs, (model, estimator, k) in itertools.product(stages, arms)
    ]


ONE_DRAW = [(model, estimator, 1) for model in ("mlp-1", "mlp-2") for estimator in ("elbo-total", "elbo-path")]
FIVE_DRAWS = [(m, e, 5) for m in ("mlp-1", "mlp-2") for e in ("iwae-total", "iwae-path", "iwae-dreg")]


def config_of(cell: Cell, seed: int, device: str) -> Config:
    """Return the run that a cell is a stage of, up to that stage."""
    return stl.config_of(cell, seed, device, "paper", compile=True)


def train_and_evaluate(cell: Cell, seed: int, folder: Path, device: str, report: Report) -> list[Measured]:
    """Train on from the last stage before that has ended, and estimate -log p(x) of the test images."""
    arm = f"{cell['data']}-{cell['model']}-{cell['estimator']}-k{cell['k']}-{seed}"
    place = folder.parent.parent / "trained" / arm / f"{cell['epochs']}"
    begin(place)
    training = runs.train(place, config_of(cell, seed, device), report=lambda done: report(0.9 * done))["training"]
    found = runs.evaluate(place, samples=cell["samples"], device=device)
    return measured(found, training["bound"], training["seconds"])


def begin(place: Path) -> None:
    """Let a stage that has no checkpoint begin with that of the last one before it that has ended.

    Each stage has a run folder of its own, so that whoever trains a later one leaves it as it is.
    """
    if runs.Folder(place).checkpoint.exists():
        return
    before = (place.with_name(f"{epochs}") for epochs in reversed(STAGES) if epochs < int(place.name))
    for folder in map(runs.Folder, before):
        if folder.checkpoint.exists() and folder.config.exists() and "training" in runs.read_result(folder.result):
            runs.read_state(folder.checkpoint)  # a damaged one is told of by its own name
            with runs.in_use(runs.Folder(place)) as there:
                if not there.checkpoint.exists():  # as when another grid has been there in the meantime
                    files.write(there.config, files.read(folder.config))
                    files.write(there.checkpoint, files.read(folder.checkpoint))
            return


def measured(found: dict, training_bound: float, seconds: float) -> list[Measured]:
    """Return the numbers of a stage."""
    return [*stl.measured(found, seconds), Measured("training bound", training_bound)]


# --- many runs as one, on a GPU ---------------------------------------------------------------------------------------


def train_together(
    tasks: Sequence[Task], folder: Path, device: str, add: Callable[[Task, list[Measured], float], None]
) -> None:
    """Make the runs of a model and k side by side, one stacked training from stage to stage; ``add`` each stage."""

    def alike(task: Task) -> tuple:
        return task.config["data"], task.config["model"], task.config["k"]

    for (name, model, k), group in itertools.groupby(sorted(tasks, key=alike), alike):
        stages = sorted(group, key=lambda task: task.config["epochs"])
        images = data.load(name, "dynamic").to(device)
        wanted = list(dict.fromkeys((task.config["estimator"], task.seed) for task in stages))
        steps = alone(stages[0], images, *wanted[0]).steps_per_epoch * stages[0].config["epochs"]
        place, who, state = stack_of(wanted, steps, folder / "trained", f"{name}-{model}-k{k}")
        stack = StackedTraining([alone(stages[0], images, *one) for one in who], compile=device == "cuda")
        if state is not None:
            with runs.fitting(place):
                stack.load_state(state)
        for epochs, stage in itertools.groupby(stages, lambda task: task.config["epochs"]):
            stack.recipe = replace(stack.recipe, epochs=epochs)
            train_on(stack, place)
            save(stack, place)
            for task in stage:
                training = stack.trainings[who.index((task.config["estimator"], task.seed))]
                start = time.monotonic()
                found = runs.measure(training, images, task.config["samples"], batch_size=EVALUATED_AT_ONCE[device])
                seconds = stack.seconds / len(who)
                numbers = measured(found, training.history[-1]["bound"], seconds)
                add(task, numbers, seconds + time.monotonic() - start)


Member = tuple[str, int]
"""One of the trainings of a stack: its estimator and its seed."""


def stack_of(
    wanted: list[Member], steps: int, folder: Path, name: str
) -> tuple[Path, list[Member], dict[str, Any] | None]:
    """Return the file, the members and the state of the stack that has all who are wanted, or else of a new one.

    Members who are not wanted train along, since a stack of others would end in other digits. A stack that has taken
    more than ``steps`` is beyond the first stage that is wanted: it stays, and another of the same begins beside it.
    """
    members = wanted
    for place in sorted(folder.glob(f"{name}-together-*.pt")):
        state = runs.read_state(place)
        with runs.fitting(place):
            who = [tuple(member) for member in state.pop("who")]
            beyond = state["runs"][0]["step"] > steps
        if set(wanted) <= set(who):
            if not beyond:
                return place, who, state
            members = who
    first = f"{name}-together-{hashlib.sha256(repr(members).encode()).hexdigest()[:12]}"
    places = (folder / f"{first}-{number}.pt" for number in itertools.count())
    return next(place for place in places if not place.exists()), members, None


def alone(task: Task, images: data.Images, estimator: str, seed: int) -> Training:
    """Return one run before its first step, of the model and k of ``task``."""
    cell = task.config | {"estimator": estimator}
    config = replace(config_of(cell, seed, "auto"), compile=False, epochs=STAGES[-1])
    split = images.train
    model = models.build(config.model, split.grey.shape[1], split.grey.mean(0).cpu(), stream("init", seed))
    recipe = Recipe(**{field.name: getattr(config, field.name) for field in fields(Recipe)})
    return Training(model.to(split.grey.device), split, estimator, recipe)


def save(stack: StackedTraining, place: Path) -> None:
    """Write the state of a stack and its members, whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    who = [(training.estimator.name, training.recipe.seed) for training in stack.trainings]
    runs.write_state({**stack.state(), "who": who}, place)


def train_on(stack: StackedTraining, place: Path, seconds: float = 120.0) -> None:
    """Train a stack to the end of its recipe; save it now and then, and when it is asked to stop."""
    due = time.monotonic() + seconds

    def after_step(stack: StackedTraining) -> None:
        nonlocal due
        if stop or time.monotonic() >= due:
            save(stack, place)
            due = time.monotonic() + seconds
        if stop:
            raise KeyboardInterrupt

    with runs.noticed(*STOPS) as stop:
        stack.run(after_step)


# --- what came out ----------------------------------------------------------------------------------------------------

KEY = ["data", "model", "estimator", "k", "epochs"]
"""What tells the cells apart; the samples follow from the stage."""


def gains(found: DataFrame) -> DataFrame:
    """Return the nats that each estimator gains on its total derivative, over paired seeds, by :data:`KEY`."""
    lost = differences(select(found, "nll"), KEY, estimator=lambda frame: frame["estimator"].map(PAIRS))
    return over_seeds(lost.assign(value=-lost["value"]), KEY)


def interval(mean: float, error: float, n: int) -> tuple[float, float]:
    """Return the interval of Student's t around a mean over n seeds."""
    from scipy.stats import t as student  # it warns on import

    width = error * student.ppf((1 + LEVEL) / 2, n - 1) if n > 1 else np.inf
    return mean - width, mean + width


def verdict(mean: float, error: float, n: int) -> str:
    """Return what a gain says by the rule above."""
    low, high = interval(mean, error, n)
    if n < FEWEST or not np.isfinite([low, high]).all():
        return "undecided"
    if low > 0 or high < 0:
        return "ahead" if low > 0 else "behind"
    return "alike" if max(abs(low), abs(high)) < MARGIN else "undecided"


def table_of_stages(found: DataFrame) -> Lines:
    """Return -log p(x) of each cell at each stage, and what an estimator gains on its total derivative there."""
    words = plus_minus(ours := over_seeds(select(found, "nll"), KEY))
    won = gains(found)
    lines = [("data", "model", "estimator", "k", "epochs", "-log p(x)", "seeds", "gain on total", "paper", "verdict")]
    for cell in sorted(ours.index, key=lambda cell: (*cell[:2], cell[3], cell[4], cell[2])):
        name, model, estimator, k, epochs = cell
        gain = won.loc[cell] if cell in won.index else None
        lines.append(
            (name, model, estimator, str(k), str(epochs), words[cell], str(ours.at[cell, "n"]))
            + (
                ("", "", "")
                if gain is None
                else (
                    plus_minus(won)[cell],
                    in_nats(published_gain(name, model, estimator, k)) if epochs == STAGES[-1] else "-",
                    verdict(gain["mean"], gain["standard_error"], int(gain["n"])),
                )
            )
        )
    return lines


def figure_of_stages(found: DataFrame, figure: Figure) -> None:
    """Draw what each estimator gains on its total derivative after each stage, with its interval."""
    won = gains(found).reset_index()
    if won.empty:
        raise InputError("nothing to draw yet: no estimator has run with the seed and cell of its total derivative")
    panels = sorted({(model, k) for model, k in zip(won["model"], won["k"])})
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for (model, k), ax in zip(panels, axes, strict=True):
        for estimator, mine in won[(won["model"] == model) & (won["k"] == k)].groupby("estimator"):
            widths = [interval(0, e, int(n))[1] for e, n in zip(mine["standard_error"], mine["n"])]
            widths = [width if np.isfinite(width) else 0 for width in widths]
            ax.errorbar(mine["epochs"], mine["mean"], yerr=widths, **plots.LOOKS[estimator].points())
        ax.axhspan(-MARGIN, MARGIN, color="0.9", zorder=0)
        ax.axhline(0, color="k", lw=0.8)
        ax.set(xscale="log", title=f"{model}, k = {k}", xlabel="epochs")
    axes[0].set_ylabel("nats gained on total")
    plots.legend_below(figure)


def seeds_of_stage(cell: Cell) -> int:
    """Ten runs to 121 epochs, three to 364, one to the end."""
    return 10 if cell["epochs"] <= 121 else 3 if cell["epochs"] <= 364 else 1


EXPERIMENTS = {
    "stl-schedule": Experiment(
        name="stl-schedule",
        reproduces='"Sticking the Landing", Table 2, as a function of the length of training: after each stage',
        presets={
            "smoke": Preset(cells("digits", ONE_DRAW, (1, 4), 50), seeds=2, minutes=0.5),
            "short": Preset(cells("mnist", ONE_DRAW, STAGES[:4], 1000), seeds=3, minutes=120),
            "paper": Preset(
                [*cells("mnist", ONE_DRAW, STAGES, 1000), *cells("mnist", FIVE_DRAWS, STAGES[:5], 1000)],
                seeds=seeds_of_stage,
                minutes=3000,
            ),
        },
        run=train_and_evaluate,
        table=table_of_stages,
        figure=figure_of_stages,
        metrics=(*stl.METRICS, "training bound"),
        together=train_together,
    )
}
