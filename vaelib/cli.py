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
    estimator: Annotated[
        str | None, option("estimator", help="Gradient estimator; see `vaelib estimators`.")
    ] = None,
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
    clip: Annotated[
        float | None, option("clip", help="Largest global norm of a gradient.", show_default="no limit")
    ] = None,
    adam_eps: Annotated[float | None, option("adam_eps", help="The constant in Adam's denominator.")] = None,
    seed: Annotated[
        int | None, option("seed", help="Seed of weights, data order, binarisation and noise.")
    ] = None,
    device: Annotated[str | None, option("device", help="cpu, cuda or auto.")] = None,
    checkpoint_seconds: Annotated[
        float | None,
        option("checkpoint_seconds", help="Longest time between two checkpoints; each epoch ends with one."),
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
    from vaelib.estimators import ESTIMATORS

    rows = [
        (row.name, row.bound, row.target or "-", str(row.least_k), inspect.getdoc(row.rule))
        for row in ESTIMATORS.values()
    ]
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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


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
