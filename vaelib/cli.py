"""The command ``vaelib``. Torch is imported inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import errno
import importlib
import inspect
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from vaelib import __version__
from vaelib.config import Config
from vaelib.errors import OPTIONS, InputError
from vaelib.files import in_shell, write

app = typer.Typer(
    name="vaelib",
    help="Train variational autoencoders with the estimators of the book Quiet Gradients.",
    no_args_is_help=True,
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
GROUPS = (app, data_app, experiment_app)
NEXT = (("next:", "evaluate"), ("  or:", "show"), ("  or:", "advise"))
"""What can be done with a run that has ended."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command; what the user can put right is one sentence on stderr and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has no need of it
        text = sys.stdout.encoding.lower() in ("utf-8", "utf8")
        sys.stdout.reconfigure(errors="surrogateescape" if text else "backslashreplace")  # a folder may have any name
    warnings.showwarning = lambda message, *_: print(f"vaelib: warning: {message}", file=sys.stderr)
    names = OPTIONS.set(options())
    try:
        app(arguments, prog_name="vaelib")
    except (InputError, OSError) as error:
        print(f"vaelib: {explain(error)}", file=sys.stderr)
        sys.exit(2)
    finally:
        OPTIONS.reset(names)


def options() -> dict[str, str]:
    """Return what is typed for the arguments that options stand for."""
    commands = [command for group in GROUPS for command in group.registered_commands]
    names = {name for command in commands for name in inspect.signature(command.callback).parameters}
    return {name: f"--{name.replace('_', '-')}" for name in names} | {"sizes": "--size"}


ADVICE = {
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "see to its permissions, or choose another place",
    errno.ENOSPC: "make room, or choose another disk",
}
"""What to do about the commonest errors of the system."""


def explain(error: Exception) -> str:
    """Return the sentence for ``error``."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    what = "the output" if error.filename is None else f"'{error.filename}'"
    return ": ".join(filter(None, (f"cannot use {what}", error.strerror, ADVICE.get(error.errno))))


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


def named_folder(text: str | Path) -> Path:
    """Return the folder; an empty name, such as that of an unset variable, is not the folder that we are in."""
    if not str(text).strip():
        raise typer.BadParameter("the name of the folder is empty")
    return Path(text)


RunDir = Annotated[
    Path, typer.Argument(metavar="RUN_DIR", parser=named_folder, help="The folder of the run.", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress bar.")]

SETTINGS = Config.__dataclass_fields__
HELP = {name: field.metadata["help"] for name, field in SETTINGS.items()}
"""What the fields of the configuration mean."""


def named(place: str, name: str) -> Callable[[str], list[str]]:
    """Return what completes a word by the names in a registry, which is looked up when it is asked for."""

    def complete(incomplete: str) -> list[str]:
        return [key for key in getattr(importlib.import_module(place), name) if key.startswith(incomplete)]

    return complete


COMPLETIONS = {
    "data": named("vaelib.data", "DATASETS"),
    "binarisation": named("vaelib.data", "BINARISATIONS"),
    "model": named("vaelib.models", "MODELS"),
    "estimator": named("vaelib.estimators", "ESTIMATORS"),
    "schedule": named("vaelib.training", "SCHEDULES"),
    "optimizer": named("vaelib.optimizers", "OPTIMIZERS"),
    "device": named("vaelib.config", "DEVICES"),
    "log": named("vaelib.config", "LOGS"),
}
"""What a shell completes the values of options by (`vaelib --install-completion`)."""


def settings() -> list[inspect.Parameter]:
    """Return an option for each field of the configuration, which has its type, default and help; None if not given."""
    made, types = [], get_type_hints(Config)
    for name in sorted(types, key=lambda name: name not in Config.__annotations__):  # the recipe's come last
        kind = types[name]
        flag, default = name.replace("_", "-"), SETTINGS[name].default
        flags, shown, text = f"--{flag}", default is not None and str(default), HELP[name]
        if name == "sizes":
            flags, shown, text, kind = "--size", False, f"{text} May be repeated.", list[str]
        elif kind is bool:
            flags, shown = f"--{flag}/--no-{flag}", flag if default else f"no-{flag}"
        metavar = "NAME=N" if name == "sizes" else None
        completed = COMPLETIONS.get(name)
        option = typer.Option(flags, help=text, show_default=shown, metavar=metavar, autocompletion=completed)
        kind = kind if type(None) in get_args(kind) else kind | None
        made.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])
        )
    return made


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Put the options of the configuration in the place of the command's ``**given``."""
    first, *others, _ = inspect.signature(command, eval_str=True).parameters.values()
    command.__signature__ = inspect.Signature([first, *settings(), *others])
    return command


@app.command()
@with_settings
def train(run_dir: RunDir, *, quiet: Quiet = False, **given: Any) -> None:
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
      vaelib train runs/own --data pictures/ --model conv-logistic --validate --patience 5
      vaelib train runs/mine --data x.npy --model vae.py:build --estimator dreg --k 5

    FILE.py:FUNCTION is code, and it is run: FUNCTION(start, *, latent=8) returns a vaelib.models.VAE(joint, encoder,
    binary=False), where start.pixels and start.shape say what an observation is, and --size latent=4 sets a size.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if "sizes" in given:
        given["sizes"] = parse_sizes(given["sizes"])
    start("vaelib.runs")
    from vaelib import runs

    stored = runs.read_config(run_dir / "config.json")
    config = replace(stored, **given) if stored else Config(**given)
    try:
        trained = runs.train(run_dir, config, progress=show_progress(quiet), say=typer.echo)["training"]
    except KeyboardInterrupt as stop:
        typer.echo(f"vaelib: {str(stop) or 'stopped before the first step'}", err=True)
        raise typer.Exit(130) from None
    held_out = f", held out: {trained['held_out']:.2f}" if "held_out" in trained else ""
    if trained["epoch"] < config.epochs:
        typer.echo(f"stopped early: {config.patience} epochs without a better held-out bound")
    typer.echo(
        f"{trained['epoch']} epochs, {trained['step']} steps, {trained['seconds']:.0f} s on {trained['device']}; "
        f"mean bound in the last epoch: {trained['bound']:.2f} nats{held_out}\n"
        + "\n".join(f"{word} vaelib {what} {in_shell(run_dir)}" for word, what in NEXT)
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
    device: Annotated[str, typer.Option(help=HELP["device"])] = "auto",
    quiet: Quiet = False,
) -> None:
    """Estimate -log p(x) of the test images.

    The model is the one trained in RUN_DIR; what is found is also written into RUN_DIR/result.json.

    \b
    Examples:
      vaelib evaluate runs/mnist
      vaelib evaluate runs/mnist --samples 500 --limit 1000
    """
    start("vaelib.runs")
    from vaelib import runs

    def show(found: dict[str, Any]) -> None:
        error = found["nll_error"]
        typer.echo(
            f"-log p(x): {found['nll']:.2f} {'' if error is None else f'+- {error:.2f} '}nats "
            f"({found['images']} test image{'s' * (error is not None)}, {found['samples']} samples each)\n"
            f"bound: {found['bound']:.2f} nats; active units: {', '.join(map(str, found['active_units']))}"
        )
        if found["mind"]:
            typer.echo(f"mind: {found['mind']}")

    runs.evaluate(run_dir, samples, chunk, limit, seed, device, show_progress(quiet), show)


@app.command()
def show(run_dir: RunDir, device: Annotated[str, typer.Option(help=HELP["device"])] = "auto") -> None:
    """Make a page of a run to look at: RUN_DIR/report.html.

    It opens with whether z is used, and shows curves, reconstructions, samples, a map of z and its units. It is one
    file, which needs no network.

    \b
    Example:
      vaelib show runs/mnist
    """
    start("vaelib.report")
    from vaelib import report

    typer.echo(f"look at {in_shell(report.show(run_dir, device))}")


@app.command()
def advise(
    run_dir: RunDir,
    k: Annotated[
        int | None,
        typer.Option(
            help="Evaluations of the decoder for each observation.", show_default="the run's own, and at least 4"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of all noise, and of the choice of observations.")] = 0,
    device: Annotated[str, typer.Option(help=HELP["device"])] = "auto",
    quiet: Quiet = False,
) -> None:
    """Measure which estimator suits the model in RUN_DIR, whether it uses z, and whether its encoder lags.

    Bias, variance and time of every estimator that applies, on the model as it is now; the model stays as it is. All of
    it is also in RUN_DIR/advice.json and advice.png.

    \b
    Examples:
      vaelib advise runs/mnist
      vaelib advise runs/mnist --k 16
    """
    start("vaelib.report")
    from vaelib import report

    _, paths = report.advise(run_dir, k, device, seed, show_progress(quiet), show=typer.echo)
    typer.echo(f"\nalso in {' and '.join(map(in_shell, paths))}")


@app.command()
def estimators() -> None:
    """List the gradient estimators."""
    from vaelib.estimators import ESTIMATORS

    lines = [(one.name, one.bound, one.target or "-", str(one.least_k), one.summary) for one in ESTIMATORS.values()]
    table(("name", "bound", "unbiased for", "least k", ""), *lines)


@app.command()
def models() -> None:
    """List the models and their sizes."""
    from vaelib.models import MODELS
    from vaelib.models.text import lstm_vae
    from vaelib.runs import LSTM

    lines = [
        (
            name,
            " ".join(f"{size}={width}" for size, width in builder.__kwdefaults__.items()),
            (inspect.getdoc(builder) or "").partition("\n")[0],
        )
        for name, builder in {**MODELS, LSTM: lstm_vae}.items()
    ]
    table(("name", "sizes", ""), *lines)


def table(*lines: tuple[str, ...]) -> None:
    """Print lines of words in columns as wide as they need."""
    from vaelib.experiments.results import Table

    typer.echo(str(Table(lines)))


@data_app.command("list")
def list_data() -> None:
    """List the data sets, and where they are."""
    from vaelib import data

    for one in data.describe():
        note = [f"mind: {one.note}"] if one.note else []
        lines = one.name, one.description, one.splits, f"licence: {one.licence}", one.use, one.where, *note
        typer.echo("\n    ".join(lines))


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


@app.command()
def book(
    folder: Annotated[str, typer.Argument(metavar="[FOLDER]", help="Where to.")] = "quiet-gradients",
) -> None:
    """Copy the book's notebooks into FOLDER, quiet-gradients if none is named; a file that is there stays as it is.

    \b
    Example:
      vaelib book my-notebooks
    """
    from vaelib import notebooks

    copied, kept = notebooks.copy(named_folder(folder))
    typer.echo(f"{len(copied)} notebooks copied into {folder}" + (f", {len(kept)} kept as they were" * bool(kept)))


ExperimentName = Annotated[
    str, typer.Argument(metavar="NAME", help="A name from `vaelib experiment list`.", show_default=False)
]
ResultsFolder = Annotated[
    Path,
    typer.Option(
        "--results", metavar="<path>", parser=named_folder, help="The folder of the tables, one CSV an experiment."
    ),
]


@experiment_app.command("list")
def list_experiments(results: ResultsFolder = Path("results")) -> None:
    """List the experiments: what each reproduces, and its presets with their runs and the time they take.

    \b
    done    runs whose results are in the folder already
    here    the others together, on all cores of this machine
    """
    from vaelib.experiments import EXPERIMENTS, find
    from vaelib.experiments.grid import default_jobs
    from vaelib.experiments.results import finished

    jobs = default_jobs("cpu")
    for name in EXPERIMENTS:
        experiment = find(name)
        typer.echo(f"{name}\n    {experiment.reproduces}")
        try:
            have = finished(experiment, results)
        except (InputError, OSError) as error:
            typer.echo(f"    {explain(error)}")
            continue
        for preset, size in experiment.presets.items():
            done = made(experiment, preset, have)
            left = size.minutes * (1 - done / size.runs) / jobs
            time = f"{duration(size.minutes)} of one core" + f", {duration(left)} here" * (done < size.runs)
            typer.echo(f"    {preset}: {size.runs} runs, {done} done; {time}")


def made(experiment: Any, preset: str, have: set[tuple[str, ...]]) -> int:
    """Return how many runs of a preset are among those of the keys ``have``."""
    return sum(task.key in have for task in experiment.tasks(preset))


@experiment_app.command("run")
def run_experiment(
    name: ExperimentName,
    preset: Annotated[str, typer.Option(help="smoke, short, paper, or another of `vaelib experiment list`.")] = "short",
    seeds: Annotated[int | None, typer.Option(help="Runs of each configuration.", show_default="of the preset")] = None,
    device: Annotated[str, typer.Option(help=HELP["device"])] = "auto",
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
    together: Annotated[
        bool,
        typer.Option(
            "--together",
            help="Make many runs as one, the way to fill a GPU, where the experiment can; one such command at a time.",
        ),
    ] = False,
    results: ResultsFolder = Path("results"),
    runs: Annotated[
        Path,
        typer.Option(
            metavar="<path>", parser=named_folder, help="The folder of checkpoints, which a cluster must share."
        ),
    ] = Path("runs"),
    quiet: Quiet = False,
) -> None:
    """Make the runs of an experiment that its table does not hold yet.

    Ctrl-C, a crash or a power cut lose little: the same command goes on from the checkpoints. Several such commands,
    even of the same experiment, share the work. To make a run anew, delete its lines and its folder.

    \b
    Examples:
      vaelib experiment run stl-figure-1
      vaelib experiment run stl-table-2 --preset short --jobs 2
      vaelib experiment run stl-table-2 --preset paper --ray auto --device cuda --gpu-share 0.25
      vaelib experiment run stl-schedule --preset paper --device cuda --together
    """
    start("vaelib.experiments.grid")
    from vaelib.experiments import grid

    try:
        path = grid.run(
            name, preset, seeds=seeds, device=device, jobs=jobs, ray=ray, gpu_share=gpu_share, together=together,
            results_folder=results, runs_folder=runs, progress=show_progress(quiet),
        )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo("vaelib: stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"all runs are in {path}\nnext: vaelib experiment show {name} --preset {preset}{option_for(results)}")


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
    results: Annotated[
        Path | None,
        typer.Option(
            metavar="<path>",
            parser=named_folder,
            help="The folder of the tables.",
            show_default="results, or the tables that came with vaelib",
        ),
    ] = None,
) -> None:
    """Show an experiment's table, ours beside the published one where there is one.

    Figures of several seeds are means with their standard errors.

    \b
    Examples:
      vaelib experiment show stl-table-2
      vaelib experiment show stl-figure-1 --figure figure-1.png
    """
    from vaelib import experiments
    from vaelib.experiments.results import loaded_runs

    if figure is not None and not figure.suffix:
        raise InputError(f"--figure must be a file's name with an ending, such as table-2.png, but is '{figure}'")
    results = results or (Path("results") if Path("results").exists() else experiments.TABLES)
    experiment, found = experiments.find(name), experiments.load(name, preset, results)
    have = [each for each in experiment.presets if each in set(found["preset"])]
    preset = have[-1]
    found = found[found["preset"] == preset]
    loaded = loaded_runs(found, experiment)
    done = made(experiment, preset, loaded)
    runs = f"{done} of {experiment.presets[preset].runs} runs"
    if further := len(loaded) - done:
        runs += f" and {further} of further seeds"
    typer.echo(f"{experiment.reproduces}\npreset {preset}, {runs}, {', '.join(sorted(set(found['device'])))}\n")
    table(*experiment.table(found))
    if figure is not None:
        from matplotlib.figure import Figure

        canvas, drawn = Figure(figsize=(7, 4), layout="constrained"), io.BytesIO()
        try:
            experiment.figure(found, canvas)
            canvas.savefig(drawn, format=figure.suffix[1:])
        except (ValueError, RuntimeError) as error:  # a kind of file that needs what is not here, or a NaN to draw
            raise InputError(f"--figure '{figure}': {error}") from None
        write(figure, drawn.getvalue())
        typer.echo(f"\nfigure: {figure}")


def option_for(results: Path) -> str:
    """Return the option for a folder of tables in a printed command; nothing for the usual one."""
    return "" if results == Path("results") else f" --results {in_shell(results)}"


def duration(minutes: float) -> str:
    """Return a time in the largest unit of which there are two, such as "30 seconds", "90 minutes" or "3 hours"."""
    units = {"days": 24 * 60, "hours": 60, "minutes": 1, "seconds": 1 / 60}
    unit = next((name for name, size in units.items() if minutes >= 2 * size), "seconds")
    number = f"{minutes / units[unit]:.0f}"
    return f"{number} {unit.removesuffix('s') if number == '1' else unit}"


def parse_sizes(texts: Iterable[str]) -> dict[str, int]:
    """Return {"latent": 10} for ["latent=10"]."""
    sizes = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name in sizes:
            raise InputError(f"--size {name} is given twice, {sizes[name]} and {value}: give it once")
        try:
            sizes[name] = int(value)
        except ValueError:
            raise InputError(f"--size takes NAME=N, such as latent=10, but got '{text}'") from None
    return sizes


def show_progress(quiet: bool) -> bool:
    return not quiet and sys.stderr is not None and sys.stderr.isatty()  # None where it is closed


def start(module: str) -> None:
    """Import what a command needs, and treat denormal floats as zero: vanishing importance weights are, and are slow.

    That is a setting of each thread, which threads inherit: hence here, before torch starts any. An interrupt ends the
    process at once as long as nothing has begun: raised within an import, it can get lost there.
    """

    def end(number: int, frame: Any) -> None:
        os.write(2, b"vaelib: stopped before the first step\n")
        os._exit(130)

    listens = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN
    )
    before = signal.signal(signal.SIGINT, end) if listens else None
    try:
        import torch

        torch.set_flush_denormal(True)
        importlib.import_module(module)
    finally:
        if listens:
            signal.signal(signal.SIGINT, before)
