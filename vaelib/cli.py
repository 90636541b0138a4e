"""The command ``vaelib``. Torch is imported inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from vaelib import __version__
from vaelib.config import Config
from vaelib.errors import InputError, choose

app = typer.Typer(
    name="vaelib",
    help="Train variational autoencoders with the estimators of the book Quiet Gradients.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="List the data sets, or download one.", no_args_is_help=True)
app.add_typer(data_app, name="data")
experiment_app = typer.Typer(
    help="The papers' tables and figures: list them, run one, show what it gave.", no_args_is_help=True
)
app.add_typer(experiment_app, name="experiment")


def main(arguments: list[str] | None = None) -> None:
    """Run the command; what the user can put right is one sentence on stderr and exit code 2."""
    try:
        app(arguments, prog_name="vaelib")
    except (InputError, OSError) as error:
        print(f"vaelib: {explain(error)}", file=sys.stderr)
        sys.exit(2)


def explain(error: Exception) -> str:
    """Return the sentence for ``error``."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot use '{error.filename}': {error.strerror}"
    return str(error)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vaelib {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of the run.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress bar.")]


def option(field: str, *flags: str, **settings: Any) -> Any:
    """An option that sets a field of the configuration, and is None if not given."""
    return typer.Option(*flags, **{"show_default": str(getattr(Config, field)), **settings})


@app.command()
def train(
    run_dir: RunDir,
    data: Annotated[str | None, option("data", help="Data set; see `vaelib data list`.")] = None,
    binarisation: Annotated[
        str | None, option("binarisation", help="dynamic, fixed or grey.", show_default="of the data set")
    ] = None,
    model: Annotated[str | None, option("model", help="Model; see `vaelib models`.")] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=N",
            help="A width of the model, such as latent=10; may be repeated.",
            show_default=False,
        ),
    ] = None,
    estimator: Annotated[str | None, option("estimator", help="Gradient estimator; see `vaelib estimators`.")] = None,
    k: Annotated[int | None, option("k", "--k", help="Draws of the latent an image.")] = None,
    batch_size: Annotated[int | None, option("batch_size", help="Images a step.")] = None,
    epochs: Annotated[int | None, option("epochs", help="Passes through the training images.")] = None,
    lr: Annotated[float | None, option("lr", help="Adam's learning rate.")] = None,
    schedule: Annotated[
        str | None,
        option(
            "schedule",
            help="constant, or burda: lr falls tenfold in eight stages of 1, 3, 9 ... 2187 epochs (Burda et al. 2016; "
            "the first four are 40 epochs, all are 3280).",
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        option(
            "optimizer",
            help="adam, or adam-released: as in the code released with the papers (beta1 .99, second moment from 1, "
            "moments of the step before, gradient summed over the batch).",
        ),
    ] = None,
    shuffle: Annotated[
        bool | None,
        option(
            "shuffle", "--shuffle/--no-shuffle", help="Another order of the images every epoch.", show_default="shuffle"
        ),
    ] = None,
    clip: Annotated[
        float | None, option("clip", help="Largest global norm of a gradient.", show_default="no limit")
    ] = None,
    adam_eps: Annotated[float | None, option("adam_eps", help="The constant in Adam's denominator.")] = None,
    seed: Annotated[int | None, option("seed", help="Seed of weights, data order, binarisation and noise.")] = None,
    device: Annotated[str | None, option("device", help="cpu, cuda or auto.")] = None,
    checkpoint_seconds: Annotated[
        float | None,
        option("checkpoint_seconds", help="Longest time between two checkpoints; each epoch ends with one."),
    ] = None,
    compile: Annotated[
        bool | None,
        option(
            "compile",
            "--compile/--no-compile",
            help="Compile the step: the same numbers to rounding, sooner; needs a C++ compiler.",
            show_default="no-compile",
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train a model in RUN_DIR, or go on with it.

    A run that was stopped goes on with `vaelib train RUN_DIR`, and ends bit for bit where an uninterrupted one ends:
    options that are not given are those of the run in RUN_DIR, and the defaults below if there is none yet.
    RUN_DIR then holds config.json, metrics.jsonl (one line an epoch), checkpoint.pt and result.json.

    \b
    Examples:
      vaelib train runs/first
      vaelib train runs/mnist --data mnist --model mlp-1 --epochs 10
      vaelib train runs/dreg --data mnist --model mlp-2 --estimator iwae-dreg --k 5 --epochs 40 --schedule burda
      vaelib train runs/mnist --epochs 20        (go on to 20 epochs)
    """
    given = {name: value for name, value in locals().items() if name not in ("run_dir", "quiet", "size")}
    given = {name: value for name, value in given.items() if value is not None}
    if size:
        given["sizes"] = dict(map(parse_size, size))
    start()
    from vaelib import runs

    stored = runs.read_config(run_dir / "config.json")
    config = replace(stored, **given) if stored else Config(**given)
    try:
        trained = runs.train(run_dir, config, progress=show_progress(quiet))["training"]
    except KeyboardInterrupt as stop:
        typer.echo(f"vaelib: {str(stop) or 'stopped before the first step'}", err=True)
        raise typer.Exit(130) from None
    typer.echo(
        f"{trained['epoch']} epochs, {trained['step']} steps, {trained['seconds']:.0f} s on {trained['device']}; "
        f"mean bound in the last epoch: {trained['bound']:.2f} nats\n"
        f"next: vaelib evaluate {run_dir}"
    )


@app.command()
def evaluate(
    run_dir: RunDir,
    samples: Annotated[int, typer.Option(help="Importance samples an image.")] = 5000,
    chunk: Annotated[int, typer.Option(help="How many of them at a time; less needs less memory.")] = 20,
    limit: Annotated[
        int | None, typer.Option(help="Take the first LIMIT test images alone.", show_default="all")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise and of dynamic binarisation.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    quiet: Quiet = False,
) -> None:
    """Estimate -log p(x) of the test images.

    The model is the one trained in RUN_DIR; what is found is also written into RUN_DIR/result.json.

    \b
    Examples:
      vaelib evaluate runs/mnist
      vaelib evaluate runs/mnist --samples 500 --limit 1000
    """
    start()
    from vaelib import runs

    found = runs.evaluate(run_dir, samples, chunk, limit, seed, device, progress=show_progress(quiet))
    typer.echo(
        f"-log p(x): {found['nll']:.2f} +- {found['nll_error']:.2f} nats "
        f"({found['images']} test images, {found['samples']} samples each)\n"
        f"bound: {found['bound']:.2f} nats; active units: {', '.join(map(str, found['active_units']))}"
    )
    if found["mind"]:
        typer.echo(f"mind: {found['mind']}")


@app.command()
def estimators() -> None:
    """List the gradient estimators."""
    from vaelib.estimators import every

    rows = [(row.name, row.bound, row.target or "-", str(row.least_k), row.summary) for row in every().values()]
    table(("name", "bound", "unbiased for", "least k", ""), *rows)


@app.command()
def models() -> None:
    """List the models and their sizes."""
    from vaelib.models import MODELS

    rows = [
        (
            name,
            " ".join(f"{size}={width}" for size, width in builder.__kwdefaults__.items()),
            inspect.getdoc(builder),
        )
        for name, builder in MODELS.items()
    ]
    table(("name", "sizes", ""), *rows)


def table(*rows: tuple[str, ...]) -> None:
    """Print rows of cells in columns as wide as they need."""
    from vaelib.experiments.results import Table

    typer.echo(str(Table(rows)))


@data_app.command("list")
def list_data() -> None:
    """List the data sets, and where they are."""
    from vaelib import data

    for row in data.describe():
        typer.echo(f"{row.name}\n    {row.description}\n    {row.splits}\n    {row.where}")
        if row.note:
            typer.echo(f"    mind: {row.note}")


@data_app.command("fetch")
def fetch_data(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name from `vaelib data list`.")],
) -> None:
    """Download a data set, if it is not here.

    A copy that is here already is checked against its checksum.

    \b
    Example:
      vaelib data fetch mnist
    """
    from vaelib import data

    folder = data.fetch(name)
    typer.echo(f"{name} is whole, in {folder}" if folder else f"{name} is built in")


ExperimentName = Annotated[
    str, typer.Argument(metavar="NAME", help="A name from `vaelib experiment list`.", show_default=False)
]
ResultsFolder = Annotated[Path, typer.Option("--results", help="The folder of the tables, one CSV an experiment.")]


@experiment_app.command("list")
def list_experiments(results: ResultsFolder = Path("results")) -> None:
    """List the experiments: what each reproduces, and its presets with their runs and the time they take.

    \b
    done    runs whose results are in the folder already
    here    all runs together, on all cores of this machine
    """
    from vaelib.experiments import EXPERIMENTS, find
    from vaelib.experiments.grid import default_jobs
    from vaelib.experiments.results import finished

    jobs = default_jobs("cpu")
    for name in EXPERIMENTS:
        experiment = find(name)
        typer.echo(f"{name}\n    {experiment.reproduces}")
        have = finished(experiment, results)
        for preset, size in experiment.presets.items():
            done = sum(task.key in have for task in experiment.tasks(preset))
            time = f"{duration(size.minutes)} of one core, {duration(size.minutes / jobs)} here"
            typer.echo(f"    {preset}: {size.runs} runs, {done} done; {time}")


@experiment_app.command("run")
def run_experiment(
    name: ExperimentName,
    preset: Annotated[str, typer.Option(help="smoke, short, paper, or another of `vaelib experiment list`.")] = "short",
    seeds: Annotated[int | None, typer.Option(help="Runs of each configuration.", show_default="of the preset")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    jobs: Annotated[
        int | None, typer.Option(help="Runs at once on this machine.", show_default="one a core, or one on a GPU")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Run on this Ray cluster; auto for the one around.", show_default="this machine"
        ),
    ] = None,
    gpu_share: Annotated[float, typer.Option(help="What a run asks of a GPU on a cluster.")] = 1.0,
    results: ResultsFolder = Path("results"),
    runs: Annotated[Path, typer.Option(help="The folder of checkpoints, which a cluster must share.")] = Path("runs"),
    quiet: Quiet = False,
) -> None:
    """Make the runs of an experiment that its table does not hold yet.

    Ctrl-C, a crash or a power cut lose little: the same command goes on from the checkpoints. Several such commands,
    even of the same experiment, share the work. To make a run anew, delete its rows and its folder.

    \b
    Examples:
      vaelib experiment run stl-figure-1
      vaelib experiment run stl-table-2 --preset short --jobs 2
      vaelib experiment run stl-table-2 --preset paper --ray auto --device cuda --gpu-share 0.25
    """
    start()
    from vaelib.experiments import grid

    try:
        path = grid.run(name, preset, seeds, device, jobs, ray, gpu_share, results, runs, show_progress(quiet))
    except KeyboardInterrupt:
        typer.echo("vaelib: stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"all runs are in {path}\nnext: vaelib experiment show {name} --preset {preset}")


@experiment_app.command("show")
def show_experiment(
    name: ExperimentName,
    preset: Annotated[
        str | None,
        typer.Option(
            help="smoke, short, paper, or another of `vaelib experiment list`.",
            show_default="the largest that has results",
        ),
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Also draw its figure into this file, such as table-2.png.")
    ] = None,
    results: ResultsFolder = Path("results"),
) -> None:
    """Show an experiment's table, ours beside the published one where there is one.

    Figures of several seeds are means with their standard errors.

    \b
    Examples:
      vaelib experiment show stl-table-2
      vaelib experiment show stl-figure-1 --figure figure-1.png
    """
    from vaelib import experiments

    experiment = experiments.find(name)
    if preset is not None:
        choose("preset", preset, experiment.presets)
    rows = experiments.load(name, folder=results)
    have = [each for each in experiment.presets if each in {row["preset"] for row in rows}]
    if not have or (preset or have[-1]) not in have:
        raise InputError(
            f"'{results}' has no results of '{name}'{f', preset {preset}' if preset else ''}: make them with "
            f"`vaelib experiment run {name} --preset {preset or 'short'}`"
        )
    preset = preset or have[-1]
    rows = [row for row in rows if row["preset"] == preset]
    typer.echo(f"{experiment.reproduces}\npreset {preset}, {', '.join(sorted({row['device'] for row in rows}))}\n")
    table(*experiment.table(rows))
    if figure is not None:
        from matplotlib.figure import Figure

        canvas = Figure(figsize=(7, 4), layout="constrained")
        experiment.figure(rows, canvas)
        try:
            canvas.savefig(figure)
        except ValueError as error:  # a kind of file that matplotlib does not know
            raise InputError(f"--figure '{figure}': {error}") from None
        typer.echo(f"\nfigure: {figure}")


def duration(minutes: float) -> str:
    """Return a time in the largest unit of which there are two, such as "30 seconds", "90 minutes" or "3 hours"."""
    units = {"days": 24 * 60, "hours": 60, "minutes": 1, "seconds": 1 / 60}
    unit = next((name for name, size in units.items() if minutes >= 2 * size), "seconds")
    return f"{minutes / units[unit]:.0f} {unit}"


def parse_size(text: str) -> tuple[str, int]:
    """Return ("latent", 10) for "latent=10"."""
    name, _, value = text.partition("=")
    try:
        return name, int(value)
    except ValueError:
        raise InputError(f"--size takes NAME=N, such as latent=10, but got '{text}'") from None


def show_progress(quiet: bool) -> bool:
    return not quiet and sys.stderr.isatty()


def start() -> None:
    """Treat denormal floats as zero: vanishing importance weights are, and slow the matrix products several times.

    It is a setting of each thread, which threads inherit: hence here, before torch starts any.
    """
    import torch

    torch.set_flush_denormal(True)
