"""The book's figures: one style, and one colour for each estimator from the first chapter to the last."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

from vaelib.advice import Advice
from vaelib.gradients import BiasTest, Moments

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#AA4499", "#56B4E9", "#1A1A1A", "#7A7A7A",
)  # fmt: skip
"""Okabe and Ito's colours, told apart by every kind of colour vision."""


class Look(NamedTuple):
    """How an estimator, or what else is compared, is drawn wherever it appears: colour, dashes, marker (for print)."""

    color: str
    linestyle: str
    marker: str
    label: str

    def line(self, **changes) -> dict:
        """Return keyword arguments for ``Axes.plot``."""
        return {"color": self.color, "linestyle": self.linestyle, "label": self.label, **changes}

    def points(self, **changes) -> dict:
        """Return keyword arguments for a line with markers."""
        return self.line(marker=self.marker, **changes)


LOOKS = {
    "elbo-total": Look(BLUE, "-", "o", "total"),
    "elbo-path": Look(RED, "-", "s", "path"),
    "elbo-score": Look(GREY, ":", "v", "score"),
    "elbo-score-loo": Look(BLACK, "-.", "^", "score, leave-one-out"),
    "elbo-scaled": Look(SKY, "-.", "D", "scaled score"),
    "detached": Look(ORANGE, "--", "X", "outputs detached"),
    "iwae-total": Look(BLUE, "-", "o", "IWAE total"),
    "iwae-path": Look(RED, "--", "s", "IWAE path (biased)"),
    "iwae-dreg": Look(GREEN, "-", "D", "DReG"),
    "iwae-score": Look(GREY, ":", "v", "IWAE score"),
    "iwae-vimco": Look(BLACK, "-.", "^", "VIMCO"),
    "rws": Look(PURPLE, "--", "P", "RWS"),
    "rws-dreg": Look(PURPLE, "-", "X", "RWS-DReG"),
    "elbo-silent": Look(GREEN, "-", "*", "silent"),
    "elbo-exact": Look(BLACK, "--", "x", "enumeration"),
    "elbo-arm": Look(PURPLE, "-.", "<", "ARM"),
    "elbo-disarm": Look(PURPLE, "-", ">", "DisARM"),
    "elbo-gumbel-softmax": Look(ORANGE, "-", "o", "Gumbel-Softmax (biased)"),
    "elbo-straight-through": Look(ORANGE, "--", "h", "straight-through (biased)"),
    "one-pass": Look(RED, "--", "X", "path, one pass"),
    "gaussian": Look(ORANGE, "--", "o", "Gaussian"),
    "mixture": Look(RED, "-", "s", "mixture"),
    "plain": Look(BLUE, "-", "o", "plain"),
    "anneal": Look(SKY, "--", "s", "annealed"),
    "beta": Look(GREY, ":", "v", "β"),
    "cyclical": Look(SKY, "-.", "D", "cyclical"),
    "free-bits": Look(PURPLE, "-.", "P", "free bits"),
    "sa-vae": Look(ORANGE, "--", "X", "SA-VAE"),
    "aggressive": Look(RED, "-", "^", "aggressive"),
    "aggressive-anneal": Look(RED, "--", "h", "aggressive, annealed"),
    "no-z": Look(BLACK, ":", "x", "no z"),
    "monte-carlo": Look(BLUE, "-", "o", "full Monte Carlo (1)"),
    "entropy": Look(ORANGE, "--", "s", "entropy (2)"),
    "kl": Look(GREEN, "-.", "D", "KL (3)"),
}
"""The look of every estimator, posterior and method, and of the three forms of the ELBO, by name."""


STYLE = {
    "figure.figsize": (6.0, 3.4),
    "figure.dpi": 130,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "axes.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "grid.color": "#E6E6E6",
    "font.size": 10.5,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "image.cmap": "gray_r",
    "mathtext.fontset": "cm",
}
"""White-backed figures that read on a phone and in print."""


def use_style() -> None:
    """Set matplotlib to the book's style, :data:`STYLE`."""
    mpl.rcParams.update(STYLE)


def band(axes: Axes, x: Tensor, curves: Tensor, look: Look) -> None:
    """Draw the mean of ``curves`` ``[S, T]`` over ``x`` ``[T]`` with a band of 2 standard errors."""
    curves = torch.as_tensor(curves)
    mean, error = curves.mean(0), curves.std(0) / len(curves) ** 0.5
    axes.plot(x, mean, **look.line())
    axes.fill_between(x, mean - 2 * error, mean + 2 * error, color=look.color, alpha=0.2, linewidth=0)


def legend_below(figure: Figure, columns: int = 3, **style: Any) -> None:
    """Name every line of a figure once, below its panels."""
    named = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes]
    lines = {label: line for each in named for line, label in each}
    if lines:
        figure.legend(lines.values(), lines, loc="outside lower center", ncols=columns, **style)


def images(axes: Axes, pictures: Tensor, columns: int) -> None:
    """Show ``pictures`` ``[N, H, W]`` or ``[N, 3, H, W]`` as one sheet of lines of ``columns``; grey is ink."""
    pictures = pictures.detach().cpu()
    channels = pictures if pictures.ndim == 4 else pictures.unsqueeze(1)
    count, depth, height, width = channels.shape
    lines = -(-count // columns)
    sheet = torch.zeros(lines * columns, depth, height + 1, width + 1, dtype=pictures.dtype)
    sheet[:count, :, :height, :width] = channels if depth == 1 else channels.clamp(0, 1)
    sheet = sheet.unflatten(0, (lines, columns)).permute(0, 3, 1, 4, 2)
    axes.imshow(sheet.reshape(lines * (height + 1), columns * (width + 1), depth).squeeze(-1)[:-1, :-1], vmin=0)
    axes.set_axis_off()


def variance_along(axes: Axes, x: Sequence[float], measured: Mapping[str, Sequence[Moments]]) -> None:
    """Draw the total variance of each estimator at each ``x``, with its 95% interval, on a log axis."""
    for name, moments in measured.items():
        value = torch.tensor([m.total_variance for m in moments])
        ends = torch.tensor([m.variance_interval() for m in moments]).mT
        bars = (ends - value).abs()
        axes.errorbar(x, value, bars, **LOOKS[name].points(linestyle="none"))
    axes.set(yscale="log", ylabel="variance of the gradient")


def snr(axes: Axes, x: Sequence[float], measured: Mapping[str, Sequence[Moments]]) -> None:
    """Draw the signal-to-noise ratio of the whole gradient of each estimator at each ``x``, on log axes."""
    for name, moments in measured.items():
        axes.plot(x, [m.total_snr for m in moments], **LOOKS[name].points())
    axes.set(xscale="log", yscale="log", ylabel="signal-to-noise ratio")


def variance_time(axes: Axes, measured: Mapping[str, Moments]) -> None:
    """Draw variance x time of each estimator as a bar, relative to the best one; ``measured`` must have the time."""
    best = min(m.variance_time for m in measured.values() if m.variance_time > 0)
    for place, (name, moments) in enumerate(measured.items()):
        axes.barh(-place, moments.variance_time / best, color=LOOKS[name].color)
    axes.set_yticks([-place for place in range(len(measured))], [LOOKS[name].label for name in measured])
    axes.set(xscale="log", xlabel="variance x time, relative to the best")


def bias(axes: Axes, tests: Mapping[str, BiasTest]) -> None:
    """Draw the t statistic of every coordinate of each test; beyond the dashed line is a bias."""
    for place, (name, test) in enumerate(tests.items()):
        axes.plot(test.t.abs(), torch.full(test.t.shape, -place), **LOOKS[name].points(linestyle="none", alpha=0.6))
        axes.plot([test.threshold] * 2, [-place - 0.4, -place + 0.4], color=BLACK, linestyle="--", linewidth=1)
    axes.set_yticks([-place for place in range(len(tests))], [LOOKS[name].label for name in tests])
    axes.set(xlabel="standard errors from the reference")


def advice(figure: Figure, given: Advice) -> None:
    """Draw what :func:`vaelib.gradients.advise` measured: the noise of each row's gradient in encoder and decoder."""
    rows = sorted(given.rows, key=lambda row: (row.aim, -row.cost))
    for axes, side in zip(figure.subplots(1, 2, sharey=True), ("encoder", "joint"), strict=True):
        for place, row in enumerate(rows):
            if (part := getattr(row, side)) is not None:
                color = LOOKS[row.name].color if row.name in LOOKS else BLACK
                axes.plot([max(part.minibatch.value, 0.0), part.variance], [place, place], color=GREY, linewidth=1)
                axes.plot(part.minibatch.value, place, marker="|", color=GREY)
                axes.plot(part.variance, place, marker="o", color=color)
        axes.set(xscale="log", title={"joint": "decoder"}.get(side, side), xlabel="variance of a training gradient")
        low, high = (math.log10(end) for end in axes.get_xlim())
        axes.set_xlim(10.0 ** math.floor(low), 10.0 ** math.ceil(high))  # labels within a decade collide
        axes.xaxis.set_minor_formatter(NullFormatter())
    names = [f"{row.aim}: {row.name}{'' if row.target else '*'}" for row in rows]
    figure.axes[0].set_yticks(range(len(rows)), names)


def rotatable(figure: Figure, traces: Sequence[Mapping[str, Any]], axes: tuple[str, str, str]) -> None:
    """Show ``figure`` as a picture that can also be turned by hand, where there is something to turn it with.

    The output holds the PNG and, beside it, the same thing for plotly as plain numbers, rounded to keep it small.
    JupyterLab and the book's site offer the second; a printed page and a plain viewer show the first.

    Parameters
    ----------
    figure
        the still picture, of matplotlib.
    traces
        the same for plotly: its ``data``, as dictionaries; tensors become lists.
    axes
        the names of the three axes.
    """
    scene = {f"{letter}axis": {"title": {"text": name}} for letter, name in zip("xyz", axes, strict=True)}
    scene |= {"aspectmode": "cube", "camera": {"eye": {"x": 1.4, "y": -1.7, "z": 1.1}}}
    layout = {"scene": scene, "margin": {"l": 0, "r": 0, "t": 0, "b": 0}, "showlegend": False, "height": 460}
    turning = {"data": [_plain(trace) for trace in traces], "layout": _plain(layout)}
    _show(_png(figure), "application/vnd.plotly.v1+json", turning)


def sliding(frames: Mapping[str, Figure], label: str, start: int = 0) -> None:
    """Show one of several figures as a picture, where the book's site lets the reader slide through them all.

    The output holds the PNG of the one and, beside it, those of all; JupyterLab and a printed page show the one.

    Parameters
    ----------
    frames
        the figures, of one size, by the value of what changes from one to the next.
    label
        what changes.
    start
        which of them is the picture.
    """
    pictures = [_png(figure) for figure in frames.values()]
    slides = {"label": label, "values": list(frames), "pictures": pictures, "start": start}
    _show(pictures[start], "application/vnd.vaelib.sliding+json", slides)


def _png(figure: Figure) -> str:
    """Return the picture of a figure, which is closed, in base 64."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    pyplot.close(figure)
    return base64.b64encode(picture.getvalue()).decode()


def _show(picture: str, kind: str, more: Mapping[str, Any]) -> None:
    """Display a picture with more beside it, for who can show that."""
    from IPython.display import display

    display({"image/png": picture, kind: more, "text/plain": "<a figure to move>"}, raw=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
