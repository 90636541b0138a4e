"""What is written into a run's folder to look at: ``vaelib show`` makes one page of it, ``vaelib advise`` a figure.

The page, ``report.html``, holds all it needs: pictures stand in it as data, once for a light and once for a dark
screen, and nothing is fetched.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from vaelib import advice, evaluation, files, gradients, plots, runs
from vaelib.advice import Advice, Estimate, Usage
from vaelib.data import Text
from vaelib.errors import InputError, enough_memory, whole_number
from vaelib.posteriors import as_posterior
from vaelib.runs import Run
from vaelib.training import stream

BOUNDS = {"bound": "training", "held_out": "held out"}
"""The bounds in a run's history."""

WIDTH = 5.2
"""Of a picture, in inches: letters are as large as the text's, and can be read on a phone."""

SHOWN, MAPPED = 24, 2000
"""Observations that are shown, and that are put on the map."""

DARK = {
    **dict.fromkeys(("figure.facecolor", "savefig.facecolor", "axes.facecolor"), "#15181c"),
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), "#d7dade"),
    "grid.color": "#30353b",
    "image.cmap": "gray",
}
"""What a dark screen changes in the figures' style."""

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --faint: #666; --line: #ddd; --mark: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #d7dade; --paper: #15181c; --faint: #9aa0a6; --line: #30353b; --mark: #56b4e9; }
}
body { margin: 0 auto; max-width: 40rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem; }
p { margin: .4rem 0; } .faint, figcaption { color: var(--faint); font-size: .9rem; }
.verdict { border-left: 4px solid var(--mark); padding: .2rem 0 .2rem .8rem; margin: 1rem 0; }
.verdict p:first-child { font-size: 1.15rem; }
figure { margin: .5rem 0; } img { max-width: 100%; height: auto; }
table { border-collapse: collapse; table-layout: fixed; width: 100%; } summary { font-weight: bold; margin-top: 2rem; }
td, th { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
"""


def show(run_dir: str | Path, device: str = "auto") -> Path:
    """Write the page of a run, ``report.html``, whole or not at all, and return its path.

    Raises
    ------
    InputError
        if there is no run in the folder, it is in use or damaged.
    """
    with runs.at_rest(run_dir) as folder:
        text = page(runs.load(folder, device), str(run_dir))
        files.write(folder.file("report.html"), text.encode(errors="replace"))  # a folder's name need not be text
    return folder.path / "report.html"


def advise(
    run_dir: str | Path,
    k: int | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: bool = False,
    show: Callable[[Advice], None] = lambda given: None,
) -> tuple[Advice, list[Path]]:
    """Measure what :func:`vaelib.gradients.advise` does on a run; write ``advice.json`` and ``advice.png`` beside it.

    ``k`` is that of the run, and at least four, unless it is given.
    ``show`` is given the advice before anything is written, so that a full disk loses no computation; it is written
    even if this fails.

    Raises
    ------
    InputError
        as :func:`show` and :func:`vaelib.gradients.advise`.
    """
    whole_number("seed", seed, least=0, most=2**63 - 1)
    with runs.at_rest(run_dir) as folder:
        run = runs.load(folder, device)
        x = observations(run, "train", 2000, seed)
        noise = torch.Generator(x.device).manual_seed(seed)
        with enough_memory("k"):
            given = gradients.advise(
                run.model, x, k=max(4, run.config.k) if k is None else k, batch_size=run.config.batch_size,
                estimator=run.config.estimator, generator=noise, progress=progress,
            )  # fmt: skip
        try:
            show(given)
        finally:
            files.write_json(folder.file("advice.json"), given.as_dict())
            picture = png(lambda figure: plots.advice(figure, given), (7.2, 4.4), {})
            files.write(folder.file("advice.png"), picture)
    return given, [folder.path / "advice.json", folder.path / "advice.png"]


def observations(run: Run, part: str, most: int, seed: int = 0) -> Tensor:
    """Return at most ``most`` random observations of a split, as the model sees them."""
    split = getattr(run.data, part)
    chosen = split.sample(most, seed)
    return chosen.batch(slice(None), stream("test", seed, next(run.model.parameters()).device))


# --- the page ---------------------------------------------------------------------------------------------------------


def page(run: Run, name: str) -> str:
    """Return the page of a run as HTML: the verdict first, then what it rests on."""
    x = observations(run, "test", MAPPED)
    if len(x) < 2:
        raise InputError(f"the page of a run compares test observations, but {run.config.data} has one alone")
    generator = torch.Generator(x.device).manual_seed(0)
    used = advice.usage(run.model, x[:1000], generator)
    elbo = Estimate.of(advice.elbo(run.model, x[:1000], generator))
    config = run.config
    parts = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="faint">{escape(config.model)} on {escape(config.data)}, {escape(config.estimator)} with k = '
        f"{config.k}, {len(run.history)} epoch{'s' * (len(run.history) != 1)}</p>",
        f'<div class="verdict">{"".join(f"<p>{escape(line)}</p>" for line in verdict(used, elbo))}</div>',
        *section("Training", curves(run.history)),
        *made(run, x),
        *section("Where observations lie in z", latent_map(run, x)),
        *section("The units of z", units(run, x)),
        "<details><summary>How it was trained</summary>",
        table([(key, value if isinstance(value, str) else json.dumps(value)) for key, value in asdict(config).items()]),
        "</details>",
    ]
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(name)}</title><style>{STYLE}</style></head><body>'
    )
    return head + "\n".join(parts) + "</body></html>\n"


def verdict(used: Usage, elbo: Estimate) -> list[str]:
    """Say whether z is used, and by how much."""
    first = {
        "yes": "z is collapsed: as it is now, the model does without it.",
        "no": "z is used.",
        "cannot tell": "Whether z is used, these observations do not tell.",
    }
    counts = ", ".join(f"{active} of {units}" for active, units in zip(used.active, used.units, strict=True))
    numbers = [f"{counts} units are active", f"the decoder loses {used.told} nats with the z of another observation"]
    if used.kl:
        numbers.append(f"KL to the prior {used.kl} nats")
    if used.information is not None:
        numbers.append(f"mutual information {used.informed} nats")
    return [first[used.collapsed], "; ".join(numbers) + ".", f"ELBO of test observations: {elbo} nats."]


def made(run: Run, x: Tensor) -> list[str]:
    """Return what the model makes: of observations, and of z from the prior."""
    shown = x[:SHOWN]
    try:
        again, samples = run.reconstruct(shown), run.sample(SHOWN, torch.Generator(x.device).manual_seed(1))
    except InputError as error:
        return [f'<p class="faint">No reconstructions and samples: {escape(str(error))}.</p>']
    if isinstance(run.data, Text):
        words = run.data.vocabulary.decode
        pairs = table(list(zip(words(shown[:12]), words(again[:12]), strict=True)), ("sentence", "through z"))
        written = "".join(f"<li>{escape(line)}</li>" for line in words(samples[:12]))
        return [
            "<h2>Sentences, and what comes back</h2>",
            pairs,
            "<h2>Written from the prior</h2>",
            f"<ul>{written}</ul>",
        ]
    first, second, drawn = (x.unflatten(-1, run.data.shape) for x in (shown, again, samples))
    gap = torch.zeros_like(first[..., : first.shape[-1] // 8 + 1])
    return [
        *section("Originals and reconstructions", sheet(torch.cat([first, second, gap], -1), "In each pair the "
                 "original is on the left and its reconstruction, through one draw of z, on the right.", 4)),
        *section("Samples from the prior", sheet(drawn, "The mean image of p(x given z), for z drawn from the "
                 "prior.", 8)),
    ]  # fmt: skip


def section(title: str, picture: str) -> list[str]:
    """Return a picture under its title, or nothing where there is none."""
    return [f"<h2>{title}</h2>", picture] if picture else []


def curves(history: Sequence[dict[str, Any]]) -> str:
    """Draw every bound of the history over its epochs."""
    names = [name for name in (history[-1] if history else {}) if name in BOUNDS]
    if not names:
        return ""
    epochs = [record["epoch"] for record in history]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for name, color in zip(names, (plots.SKY, plots.ORANGE), strict=False):
            label = BOUNDS[name]
            axes.plot(epochs, [record.get(name) for record in history], color=color, label=label, marker="o", ms=3)
        axes.set(xlabel="epoch", ylabel="bound (nats)")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.legend()

    ends = ", ".join(f"{BOUNDS[name]} ends at {history[-1][name]:.2f} nats" for name in names)
    return picture(draw, f"Curves over {len(history)} epochs: {ends}.", 2.6)


def sheet(x: Tensor, caption: str, columns: int) -> str:
    """Draw images ``[N, ..., H, W]`` on one sheet; what has a single line of numbers, one above the other."""
    columns = 1 if x.shape[-2] == 1 else columns

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        plots.images(axes, x, columns)
        axes.set_aspect("auto" if columns == 1 else "equal")

    lines = -(-len(x) // columns)
    height = WIDTH * lines * x.shape[-2] / (columns * x.shape[-1]) if columns > 1 else 0.15 * lines
    return picture(draw, f"{len(x)} images in {lines} lines. {caption}", max(1.0, height), caption)


def latent_map(run: Run, x: Tensor) -> str:
    """Draw where the encoder puts observations: the two directions of z in which the means spread most."""
    means = run.embed(x).double().cpu()
    if means.shape[1] == 0:
        return ""
    centred = means - means.mean(0)
    _, spread, axes_of_z = torch.linalg.svd(centred, full_matrices=False)
    places = centred @ axes_of_z[:2].mT
    share = spread[:2].square().sum() / spread.square().sum().clamp_min(1e-300)
    colours, what = colours_of(run, x)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        across = places[:, 1] if places.shape[1] > 1 else torch.zeros(len(places))
        dots = {"s": 9, "alpha": 0.8}
        names = colours.unique().tolist() if what else []
        if 0 < len(names) <= 10:
            for name in names:
                here = colours == name
                axes.scatter(places[here, 0], across[here], label=str(name), **dots)
            axes.legend(title=what, loc="center left", bbox_to_anchor=(1, 0.5))
        else:
            shade = {"c": colours, "cmap": "viridis"} if what else {}
            points = axes.scatter(places[:, 0], across, **shade, **dots)
            if what:
                figure.colorbar(points, label=what)
        axes.set(xlabel="first principal direction", ylabel="second")

    told = f", coloured by {what}" if what else ""
    return picture(
        draw,
        f"The means of q for {len(x)} test observations in two dimensions{told}.",
        3.6,
        f"Means of q for {len(x)} test observations{told}; the two directions hold {share:.0%} of their variance.",
    )


def colours_of(run: Run, x: Tensor) -> tuple[Tensor | None, str]:
    """Return a number for each observation that :func:`observations` gave, and what it is."""
    if isinstance(run.data, Text):
        return (x != 0).sum(1).cpu() - 2, "number of words"
    labels = run.data.test.sample(MAPPED, 0).labels
    return (None, "") if labels is None else (labels.cpu(), "label")


@torch.no_grad()
def units(run: Run, x: Tensor) -> str:
    """Draw KL and activity of each unit."""
    kl = evaluation.kl_by_unit(run.model.joint, as_posterior(run.model.encoder(x)))
    active = torch.cat(evaluation.activity(run.model.encoder, x)).cpu()
    rows = [("activity, Var of the mean of q", active, 0.01)]
    if kl is not None and kl.shape[1]:
        rows.insert(0, ("KL (nats)", kl.mean(0).cpu(), None))
    if not len(active):
        return ""

    def draw(figure: Figure) -> None:
        for axes, (name, values, limit) in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows, strict=True):
            values = values.sort(descending=True).values
            axes.bar(range(1, len(values) + 1), values, color=plots.SKY)
            axes.set(ylabel=name.partition(",")[0], xlabel="units, the largest first")
            if limit:
                axes.set_yscale("log")
                axes.axhline(limit, color=plots.RED, linestyle="--", linewidth=1)

    said = f"{int((active > 0.01).sum())} of {len(active)} units have an activity above 0.01, the dashed line"
    shown = " and ".join(name for name, _, _ in rows)
    return picture(draw, f"Bars for each unit: {shown}. {said}.", 1.8 * len(rows), f"{said}.")


# --- HTML -------------------------------------------------------------------------------------------------------------


def picture(draw: Callable[[Figure], None], alt: str, height: float, caption: str = "") -> str:
    """Return a figure with its caption, drawn for light and for dark screens."""
    light, dark = (base64.b64encode(png(draw, (WIDTH, height), theme)).decode() for theme in ({}, DARK))
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (
        '<figure><picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="data:image/png;base64,{dark}"><img src="data:image/png;base64,{light}" alt="{escape(alt)}"></picture>'
        f"{below}</figure>"
    )


def png(draw: Callable[[Figure], None], size: tuple[float, float], theme: dict[str, str]) -> bytes:
    """Return what ``draw`` draws on a figure of this size, in the book's style."""
    buffer = io.BytesIO()
    with mpl.rc_context({**plots.STYLE, **theme}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def table(lines: Sequence[tuple[str, ...]], header: tuple[str, ...] = ()) -> str:
    """Return a table of columns of one width, in which long words are broken."""
    top = "".join(f"<th>{escape(word)}</th>" for word in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(word)}</td>' for word in line)}</tr>" for line in lines)
    return f"<table>{f'<tr>{top}</tr>' if header else ''}{body}</table>"
