r"""What a flow gains by the path derivative, fitted to a density and in an autoencoder: our own, for chapter 7.

All seeds of a fit train at once: their parameters are stacked, and ``vmap`` maps the gradient over the stack. Adam
works on each number alone, so these are the runs that each seed would make by itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from numpy.polynomial.hermite_e import hermegauss
from pandas import DataFrame
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from vaelib import data, evaluation, flows, models, plots, stacked
from vaelib.experiments.experiment import Cell, Experiment, Lines, Measured, Preset, Report, Task
from vaelib.experiments.results import differences, over_seeds, plus_minus
from vaelib.models import VAE
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


# --- a ring -----------------------------------------------------------------------------------------------------------


def fit_ring(config: Cell, seeds: Sequence[int], report: Report) -> list[list[Measured]]:
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


WINDOW = 4
"""Points at the end over which a fit's KL is averaged, since a constant step size leaves it restless."""


def ends(found: DataFrame, at: int | None = None) -> DataFrame:
    """Return each run's KL around a step, the last if None: the mean of the :data:`WINDOW` points up to it."""
    curves = found[found["metric"] == "kl"]
    last = curves["steps"] if at is None else at
    near = curves[(curves["at"] <= last) & (curves["at"] > last - WINDOW * curves["every"])]
    return over_seeds(near, ["estimator", "seed"])["mean"].rename("value").reset_index()


def table_of_fits(found: DataFrame) -> Lines:
    """Return the KL of each estimator early and at the end, and the path's lead, paired by seed."""
    lines = [("step", "total", "path", "total - path", "path is ahead", "seeds")]
    for at in sorted({600, *found["steps"]} & set(found["at"])):
        kl = ends(found, at)
        mean = over_seeds(kl, ["estimator"])["mean"]
        gap = differences(kl, ["estimator"], estimator="elbo-path")
        gap = gap[gap["estimator"] == "elbo-total"]
        kls = [f"{mean[name]:.3f}" if name in mean else "-" for name in ("elbo-total", "elbo-path")]
        lead, ahead = "-", "-"  # as long as no seed has both
        if len(gap):
            won = over_seeds(gap, ["estimator"]).iloc[0]
            lead = f"{won['mean']:.3f} ± {won['standard_error']:.3f}"
            ahead = f"{(gap['value'] > 0).sum()} of {len(gap)}"
        lines.append((f"{at:g}", *kls, lead, ahead, str(len(gap))))
    return lines


def figure_of_fits(found: DataFrame, figure: Figure) -> None:
    """Draw the KL on the way, with a band of two standard errors."""
    ax = figure.add_subplot()
    for name in ("elbo-total", "elbo-path"):
        curves = found[(found["metric"] == "kl") & (found["estimator"] == name)]
        if curves.empty:
            continue
        grid = curves.pivot(index="seed", columns="at", values="value")
        plots.band(ax, torch.tensor(grid.columns), torch.tensor(grid.to_numpy()).log10(), plots.LOOKS[name])
    ax.set(xlabel="step", ylabel="log10 KL(q || p)")
    ax.legend()


def cells(steps: int, every: int = 30) -> list[Cell]:
    return [
        {"estimator": name, "steps": steps, "every": every, "draws": 32, "lr": 1e-2}
        for name in ("elbo-total", "elbo-path")
    ]


# --- an autoencoder ---------------------------------------------------------------------------------------------------


def autoencoder(posterior: str, hidden: int, latent: int, seed: int) -> VAE:
    """Return a small VAE for the digits before its first step; its posterior is a Gaussian, or a flow behind it."""
    mean, generator = data.load("digits", "dynamic").train.grey.mean(0), stream("init", seed)
    vae = models.build("mlp-1", len(mean), mean, generator, hidden=hidden, latent=latent)
    if posterior == "flow":
        layers = [flows.AffineCoupling(latent, (32,), 2 * latent, generator) for _ in range(4)]
        vae.encoder = flows.FlowEncoder(vae.encoder, layers, conditional=True, one_pass=True)
    return vae


def train_autoencoders(config: Cell, seeds: Sequence[int], report: Report) -> list[list[Measured]]:
    """Train one autoencoder a seed, side by side; return the ELBO and the log-likelihood of test digits for each."""
    vaes = [autoencoder(config["posterior"], config["hidden"], config["latent"], seed) for seed in seeds]
    digits = data.load("digits", "dynamic")
    recipe = {key: config[key] for key in ("epochs", "batch_size", "lr")}
    stacked.fit(vaes, digits.train, config["estimator"], seeds, **recipe)
    x = digits.test.batch(slice(None), stream("test", 1))
    return [judged(vae, x) for vae in vaes]


def judged(vae: VAE, x: Tensor) -> list[Measured]:
    """Return the mean ELBO, by 100 draws, and the mean log-likelihood, by 500."""
    generator = stream("test", 2)
    with torch.no_grad():
        q = vae.encoder(x)
        z, log_q = q.sample_and_log_prob(q.noise(100, generator))
        elbo = (vae.joint(x, z) - log_q).mean().item()
    return [
        Measured("elbo", elbo),
        Measured("log-likelihood", evaluation.log_likelihood(vae, x, 500, 100, generator).mean().item()),
    ]


def gains(found: DataFrame, over: str, reference: str) -> DataFrame:
    """Return the lead over ``reference``, in the column ``over``, of what else stands there, paired by seed."""
    by = ["epochs", "metric", "posterior", "estimator"]
    lead = differences(found, by, **{over: reference})
    return over_seeds(lead[lead[over] != reference], by)


def table_of_gains(found: DataFrame) -> Lines:
    """Return what the flow gains over the Gaussian, and the path over the total, in nats."""
    lines = [("epochs", "gain of", "with", "ELBO", "log p(x)", "seeds")]
    for over, reference, other in [("posterior", "gaussian", "estimator"), ("estimator", "elbo-total", "posterior")]:
        lead = gains(found, over, reference)
        words, seeds = (each.unstack("metric") for each in (plus_minus(lead), lead["n"]))
        for (epochs, *key), line in words.iterrows():
            names = dict(zip(("posterior", "estimator"), key, strict=True))
            lines.append(
                (
                    str(epochs),
                    names[over],
                    names[other],
                    line["elbo"],
                    line["log-likelihood"],
                    str(seeds.at[(epochs, *key), "elbo"]),
                )
            )
    return [lines[0], *sorted(lines[1:], key=lambda line: int(line[0]))]


def figure_of_gains(found: DataFrame, figure: Figure) -> None:
    """Draw the ELBO and the log-likelihood of each arm at the end, with two standard errors."""
    last = found[found["epochs"] == found["epochs"].max()]
    for ax, metric in zip(figure.subplots(1, 2), ("elbo", "log-likelihood"), strict=True):
        means = over_seeds(last[last["metric"] == metric], ["posterior", "estimator"])
        for place, ((posterior, estimator), line) in enumerate(means.iterrows()):
            look, full = plots.LOOKS[estimator], posterior == "flow"
            ax.errorbar(
                place, line["mean"], 2 * line["standard_error"], color=look.color, capsize=3,
                marker="o" if full else "s", mfc=look.color if full else "white",
            )  # fmt: skip
        arms = [f"{posterior}\n{plots.LOOKS[estimator].label}" for posterior, estimator in means.index]
        ax.set_xticks(range(len(means)), arms, fontsize="small")
        ax.set(title={"elbo": "ELBO", "log-likelihood": "log p(x)"}[metric], xlim=(-0.5, len(means) - 0.5))
    figure.axes[0].set_ylabel("nats")


# --- the experiments --------------------------------------------------------------------------------------------------

Measure = Callable[[Cell, Sequence[int], Report], list[list[Measured]]]


def alone(measure: Measure, config: Cell, seed: int, folder: Path, device: str, report: Report) -> list[Measured]:
    """Make the run of one seed; it takes seconds or minutes, and keeps nothing."""
    return measure(config, [seed], report)[0]


def together(
    measure: Measure,
    tasks: Sequence[Task],
    folder: Path,
    device: str,
    add: Callable[[Task, list[Measured], float], None],
) -> None:
    """Make the runs of each configuration as one."""
    configs = {tuple(task.config.items()): task.config for task in tasks}
    for config in configs.values():
        these, begin = [task for task in tasks if task.config == config], time.monotonic()
        measured = measure(config, [task.seed for task in these], lambda fraction: None)
        for task, numbers in zip(these, measured, strict=True):
            add(task, numbers, (time.monotonic() - begin) / len(these))


def vaes(epochs: int, hidden: int = 100) -> list[Cell]:
    sizes = {"hidden": hidden, "latent": 8, "batch_size": 100, "lr": 4e-3}
    return [
        {"posterior": posterior, "estimator": estimator, "epochs": epochs, **sizes}
        for posterior in ("gaussian", "flow")
        for estimator in ("elbo-total", "elbo-path")
    ]


EXPERIMENTS = {
    "flow-ring": Experiment(
        name="flow-ring",
        reproduces="A flow fitted to a ring that it can only bend to, by the total and by the path derivative",
        presets={"smoke": Preset(cells(120), 2, 0.1), "short": Preset(cells(1500), 64, 4)},
        run=partial(alone, fit_ring),
        table=table_of_fits,
        figure=figure_of_fits,
        metrics=("effective sample",),
        curves=("kl",),
        together=partial(together, fit_ring),
        on_cpu=True,
    ),
    "flow-vae": Experiment(
        name="flow-vae",
        reproduces="Small autoencoders of the digits: a flow or a Gaussian as posterior, total or path, early and late",
        presets={"smoke": Preset(vaes(1, 10), 2, 0.1), "short": Preset([*vaes(20), *vaes(150)], 10, 5)},
        run=partial(alone, train_autoencoders),
        table=table_of_gains,
        figure=figure_of_gains,
        metrics=("elbo", "log-likelihood"),
        together=partial(together, train_autoencoders),
        on_cpu=True,
    ),
}
