r"""Fits of a flow to a density, with the total and with the path derivative: our own, for the chapter on flows.

All seeds train at once: their parameters are stacked, and ``vmap`` maps the gradient over the stack. Adam works on each
number alone, so these are the runs that each seed would make by itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from numpy.polynomial.hermite_e import hermegauss
from pandas import DataFrame
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from vaelib import flows, plots
from vaelib.experiments.experiment import Cell, Experiment, Lines, Measured, Preset, Report, Task
from vaelib.experiments.results import differences, over_seeds
from vaelib.training import stream

LogDensity = Callable[[Tensor], Tensor]


class Loss(nn.Module):
    r"""-log w of each draw, with the total derivative or, if ``path``, with the path derivative alone."""

    def __init__(self, encoder: flows.FlowEncoder, log_p: LogDensity, path: bool) -> None:
        super().__init__()
        self.encoder, self.log_p, self.path = encoder, log_p, path

    def forward(self, eps: Tensor) -> Tensor:
        """Return log q(z) - log p(z) at the draws made of ``eps`` ``[K, B, D]``, ``[K, B]``."""
        q = self.encoder(eps.new_zeros(eps.shape[1], 1))
        z, log_q = q.sample_and_log_prob(eps)
        if self.path:
            log_q = q.stop_gradient().log_prob(z)
        return log_q - self.log_p(z)


class Fit(NamedTuple):
    """What fits come to: KL(q || p) before the step 0, ``every``, 2 ``every``, ... ``[S, T]``, and the share of 10,000
    draws from the last q that counts after weighing them, the effective sample size, ``[S]``.
    """

    kl: Tensor
    effective: Tensor


def fit(
    log_p: LogDensity,
    path: bool,
    seeds: Sequence[int],
    steps: int,
    every: int = 30,
    draws: int = 32,
    lr: float = 1e-2,
    report: Report = lambda fraction: None,
) -> Fit:
    r"""Fit four affine couplings to a density of two numbers, one flow a seed, by Adam with a constant step size.

    Each starts at the standard normal. The exact :math:`\mathrm{KL}(q \| p)` is an integral over the noise, by
    quadrature with 100 x 100 points. Introduced in book/07-flows.ipynb.

    Parameters
    ----------
    log_p
        the normalised log-density that is aimed at, of z ``[K, B, 2]``.
    path
        whether the score is dropped.
    """
    losses = [Loss(start(seed), log_p, path) for seed in seeds]
    one, (stack, _) = losses[0], stack_module_state(losses)
    adam = torch.optim.Adam(stack.values(), lr=lr)
    step = vmap(grad(lambda parameters, eps: functional_call(one, parameters, (eps,)).mean()))
    exact = vmap(lambda parameters, eps: functional_call(one, parameters, (eps,))[0], in_dims=(0, None))
    noise = torch.stack([torch.randn(steps, draws, 1, 2, generator=stream("noise", seed)) for seed in seeds], 1)
    points, weights = quadrature()
    history = []
    for t in range(steps + 1):
        if t % every == 0:
            report(t / (steps + 1))
            with torch.no_grad():
                history.append(exact(stack, points).double() @ weights)
        if t < steps:
            for name, slope in step(stack, noise[t]).items():
                stack[name].grad = slope
            adam.step()
    with torch.no_grad():
        log_w = -exact(stack, torch.randn(1, 10_000, 2, generator=stream("test", 0)))
    return Fit(torch.stack(history, 1), 1 / log_w.softmax(1).square().sum(1) / log_w.shape[1])


def start(seed: int) -> flows.FlowEncoder:
    """Return the flow of a seed before its first step: a standard normal."""
    generator = stream("init", seed)
    layers = [flows.AffineCoupling(2, (16,), generator=generator) for _ in range(4)]
    return flows.FlowEncoder(flows.StandardNormal(2), layers)


def quadrature() -> tuple[Tensor, Tensor]:
    """Return points of noise ``[1, 10000, 2]`` and their weights ``[10000]``, which sum to one."""
    nodes, mass = (torch.tensor(values) for values in hermegauss(100))
    return torch.cartesian_prod(nodes, nodes)[None].float(), torch.cartesian_prod(mass, mass).prod(1) / mass.sum() ** 2


def ring() -> LogDensity:
    """Return the normalised log-density of a lopsided ring with a nearly empty middle, which couplings can only bend
    to.
    """

    def unnormalised(z: Tensor) -> Tensor:
        radius = (z.square().sum(-1) + 1e-6).sqrt()
        return -(((radius - 2) / 0.4) ** 2) / 2 + 0.7 * z[..., 0]

    cells = torch.cartesian_prod(*[torch.linspace(-6, 6, 601)] * 2)
    log_mass = unnormalised(cells).logsumexp(0) + 2 * math.log(0.02)
    return lambda z: unnormalised(z) - log_mass


# --- the experiment ---------------------------------------------------------------------------------------------------


def measure(config: Cell, seeds: Sequence[int], report: Report) -> list[list[Measured]]:
    """Fit the ring with each seed; return what was measured of each."""
    path = config["estimator"] == "elbo-path"
    found = fit(ring(), path, seeds, config["steps"], config["every"], config["draws"], config["lr"], report)
    return [
        [
            *(Measured("kl", value, at=i * config["every"]) for i, value in enumerate(kl.tolist())),
            Measured("effective sample", effective.item()),
        ]
        for kl, effective in zip(found.kl, found.effective, strict=True)
    ]


def run(config: Cell, seed: int, folder: Path, device: str, report: Report) -> list[Measured]:
    """Make the run of one seed; it takes seconds, and keeps nothing."""
    return measure(config, [seed], report)[0]


def together(
    tasks: Sequence[Task], folder: Path, device: str, add: Callable[[Task, list[Measured], float], None]
) -> None:
    """Make the runs of each configuration as one."""
    configs = {tuple(task.config.items()): task.config for task in tasks}
    for config in configs.values():
        these, begin = [task for task in tasks if task.config == config], time.monotonic()
        measured = measure(config, [task.seed for task in these], lambda fraction: None)
        for task, numbers in zip(these, measured, strict=True):
            add(task, numbers, (time.monotonic() - begin) / len(these))


WINDOW = 4
"""Points at the end over which a fit's KL is averaged, since a constant step size leaves it restless."""


def ends(found: DataFrame, at: int | None = None) -> DataFrame:
    """Return each run's KL around a step, the last if None: the mean of the :data:`WINDOW` points up to it."""
    curves = found[found["metric"] == "kl"]
    last = curves["steps"] if at is None else at
    near = curves[(curves["at"] <= last) & (curves["at"] > last - WINDOW * curves["every"])]
    return near.groupby(["estimator", "seed"], sort=False, as_index=False)["value"].mean()


def table(found: DataFrame) -> Lines:
    """Return the KL of each estimator early and at the end, and the path's lead, paired by seed."""
    lines = [("step", "total", "path", "total - path", "path is ahead", "seeds")]
    for at in sorted({600, *found["steps"]} & set(found["at"])):
        kl = ends(found, at)
        mean = over_seeds(kl, ["estimator"])["mean"]
        gap = differences(kl, ["estimator"], estimator="elbo-path")
        gap = gap[gap["estimator"] == "elbo-total"]
        lead = over_seeds(gap, ["estimator"]).iloc[0]
        lines.append(
            (
                f"{at:g}",
                f"{mean['elbo-total']:.3f}",
                f"{mean['elbo-path']:.3f}",
                f"{lead['mean']:.3f} ± {lead['standard_error']:.3f}",
                f"{(gap['value'] > 0).sum()} of {len(gap)}",
                str(len(gap)),
            )
        )
    return lines


def figure(found: DataFrame, figure: Figure) -> None:
    """Draw the KL on the way, with a band of two standard errors."""
    ax = figure.add_subplot()
    for name in ("elbo-total", "elbo-path"):
        curves = found[(found["metric"] == "kl") & (found["estimator"] == name)]
        grid = curves.pivot(index="seed", columns="at", values="value")
        plots.band(ax, torch.tensor(grid.columns), torch.tensor(grid.to_numpy()).log10(), plots.LOOKS[name])
    ax.set(xlabel="step", ylabel="log10 KL(q || p)")
    ax.legend()


def cells(steps: int, every: int = 30) -> list[Cell]:
    return [
        {"estimator": name, "steps": steps, "every": every, "draws": 32, "lr": 1e-2}
        for name in ("elbo-total", "elbo-path")
    ]


EXPERIMENTS = {
    "flow-ring": Experiment(
        name="flow-ring",
        reproduces="A flow fitted to a ring that it can only bend to, by the total and by the path derivative",
        presets={"smoke": Preset(cells(120), 2, 0.1), "short": Preset(cells(1500), 32, 15)},
        run=run,
        table=table,
        figure=figure,
        together=together,
    )
}
