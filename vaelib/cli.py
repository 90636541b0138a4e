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
from vaelib.errors import InputError

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


def main(arguments: list[str] | None = None) -> None:
    """Run the command; what the user can put right is one sentence on stderr and exit code 2."""
    try:
        app(arguments)
    except (InputError, OSError) as error:
        print(f"vaelib: {explain(error)}", file=sys.stderr)
        sys.exit(2)


def explain(error: Exception) -> str:
    """Return the sentence for ``error``."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"'{error.filename}': {error.strerror}"
    return str(error)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vaelib {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of the run.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress bar.")]


def option(field: str, *flags: str, **settings: Any) -> Any:
    """An option that sets a field of the configuration, and is None if not given."""
    default = getattr(Config, field, None)
    return typer.Option(*flags, show_default="none" if default is None else str(default), **settings)


@app.command()
def train(
    run_dir: RunDir,
    data: Annotated[str | None, option("data", help="Data set; see `vaelib data list`.")] = None,
    binarisation: Annotated[
        str | None, option("binarisation", help="dynamic, fixed or grey; the data set decides if not given.")
    ] = None,
    model: Annotated[str | None, option("model", help="Model; see `vaelib models`.")] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=N", help="A width of the model, such as latent=10; may be repeated.", show_default=False),
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
    clip: Annotated[float | None, option("clip", help="Largest global norm of a gradient.")] = None,
    adam_eps: Annotated[float | None, option("adam_eps", help="The constant in Adam's denominator.")] = None,
    seed: Annotated[int | None, option("seed", help="Seed of weights, data order, binarisation and noise.")] = None,
    device: Annotated[str | None, option("device", help="cpu, cuda or auto.")] = None,
    checkpoint_seconds: Annotated[
        float | None, option("checkpoint_seconds", help="Longest time between two checkpoints; each epoch ends with one.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train a model in RUN_DIR, or go on with the training that RUN_DIR holds.

    A run that was stopped goes on with `vaelib train RUN_DIR`, and ends bit for bit where an uninterrupted one ends.
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
        typer.echo(f"vaelib: {stop}", err=True)
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
    chunk: Annotated[int, typer.Option(help="How many of them at a time; less needs less memory.")] = 50,
    limit: Annotated[int | None, typer.Option(help="Take the first LIMIT test images alone.", show_default="all")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise and of dynamic binarisation.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    quiet: Quiet = False,
) -> None:
    """Estimate -log p(x) of the test images under the model trained in RUN_DIR; add it to RUN_DIR/result.json.

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


@app.command()
def estimators() -> None:
    """List the gradient estimators: bound, what they are unbiased for, least k."""
    from vaelib.estimators import ESTIMATORS

    typer.echo(f"{'name':15}{'bound':7}{'unbiased for':14}{'least k':9}")
    for row in ESTIMATORS.values():
        typer.echo(f"{row.name:15}{row.bound:7}{row.target or 'nothing':14}{row.least_k:<9}{inspect.getdoc(row.rule)}")


@app.command()
def models() -> None:
    """List the models and the widths that --size can set."""
    from vaelib.models import MODELS

    for name, builder in MODELS.items():
        sizes = " ".join(f"{size}={width}" for size, width in builder.__kwdefaults__.items())
        typer.echo(f"{name:10}{sizes:46}{inspect.getdoc(builder)}")


@data_app.command("list")
def list_data() -> None:
    """List the data sets, their splits, and whether they are on this machine."""
    from vaelib import data

    for row in data.describe():
        typer.echo(f"{row.name}\n    {row.description}\n    {row.splits}\n    {row.where}")
        if row.note:
            typer.echo(f"    mind: {row.note}")


@data_app.command("fetch")
def fetch_data(name: Annotated[str, typer.Argument(metavar="NAME", help="A name from `vaelib data list`.")]) -> None:
    """Make sure that a data set is on this machine and whole; download it if not.

    \b
    Example:
      vaelib data fetch mnist
    """
    from vaelib import data

    folder = data.fetch(name)
    typer.echo(f"{name} is whole, in {folder}" if folder else f"{name} is built in")


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
