"""The book's figures: one style, and one colour for each estimator from the first chapter to the last."""

from __future__ import annotations

from typing import NamedTuple

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from torch import Tensor

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#AA4499", "#56B4E9", "#1A1A1A", "#7A7A7A",
)  # fmt: skip
"""Okabe and Ito's colours, told apart by every kind of colour vision."""


class Look(NamedTuple):
    """How one estimator is drawn wherever it appears: colour, dashes and marker (for print without colour)."""

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
    "iwae-total": Look(BLUE, "-", "o", "IWAE total"),
    "iwae-path": Look(RED, "--", "s", "IWAE path (biased)"),
    "iwae-dreg": Look(GREEN, "-", "D", "DReG"),
    "iwae-score": Look(GREY, ":", "v", "IWAE score"),
    "iwae-vimco": Look(BLACK, "-.", "^", "VIMCO"),
    "rws": Look(PURPLE, "--", "P", "RWS"),
    "rws-dreg": Look(PURPLE, "-", "X", "RWS-DReG"),
    "monte-carlo": Look(BLUE, "-", "o", "full Monte Carlo (1)"),
    "entropy": Look(ORANGE, "--", "s", "entropy (2)"),
    "kl": Look(GREEN, "-.", "D", "KL (3)"),
}
"""The look of every estimator and of the three forms of the ELBO, by name."""


def use_style() -> None:
    """Set matplotlib to the book's style: white-backed PNG figures that read on a phone and in print."""
    mpl.rcParams.update(
        {
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
    )


def band(axes: Axes, x: Tensor, curves: Tensor, look: Look) -> None:
    """Draw the mean of ``curves`` ``[S, T]`` over ``x`` ``[T]`` with a band of 2 standard errors."""
    curves = torch.as_tensor(curves)
    mean, error = curves.mean(0), curves.std(0) / len(curves) ** 0.5
    axes.plot(x, mean, **look.line())
    axes.fill_between(x, mean - 2 * error, mean + 2 * error, color=look.color, alpha=0.2, linewidth=0)


def images(axes: Axes, pictures: Tensor, columns: int) -> None:
    """Show ``pictures`` ``[N, H, W]`` as one sheet of rows of ``columns``, dark ink on white."""
    count, height, width = pictures.shape
    rows = -(-count // columns)
    sheet = torch.zeros(rows * columns, height + 1, width + 1, dtype=pictures.dtype)
    sheet[:count, :height, :width] = pictures
    sheet = sheet.reshape(rows, columns, height + 1, width + 1).swapaxes(1, 2)
    axes.imshow(sheet.reshape(rows * (height + 1), columns * (width + 1)).detach()[:-1, :-1], vmin=0)
    axes.set_axis_off()
