"""Measure what an exact gradient costs: milliseconds of the silent ELBO against K draws, for each kind of posterior.

A gradient is forward and backward of one estimate of -ELBO for a batch of images, on a linear encoder and a linear
Gaussian decoder of 784 pixels, float32. The silent one has no draws, and its time is one number; the others are rows of
vaelib.estimators and vaelib.discrete with K draws. The silent value must first be the mean of theirs. Times are the
process's own CPU time on one thread, taken in turns, round after round; a ratio to the plainest estimator with one draw
is taken within each round.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from steps import ROOT, provenance, write
from torch import Tensor, nn
from tqdm import tqdm

from vaelib import discrete, models, objectives, silent
from vaelib.estimators import ESTIMATORS
from vaelib.posteriors import DiagonalGaussian

COLUMNS = (
    "posterior,estimator,k,latent,pixels,batch,threads,steps,rounds,ms_median,ms_min,ms_max,ratio_to_one_draw,"
    "ratio_min,ratio_max,machine,python,torch,date,code"
).split(",")
PIXELS = 784
CHECKS, SIGMAS = 200, 5.0


class LinearGaussianEncoder(nn.Module):
    """A Gaussian whose mean and log-scale are linear in x."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.latent, self.network = latent, nn.Linear(PIXELS, 2 * latent)

    def forward(self, x: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(*self.network(x).chunk(2, -1))

    def noise(self, k: int, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn((k, len(x), self.latent), generator=generator)


def gaussian(latent: int, decoder: nn.Module) -> tuple[nn.Module, nn.Module]:
    return models.Joint(decoder), LinearGaussianEncoder(latent)


def bits(latent: int, decoder: nn.Module) -> tuple[nn.Module, nn.Module]:
    return discrete_model((latent,), decoder)


def choices(latent: int, decoder: nn.Module) -> tuple[nn.Module, nn.Module]:
    return discrete_model((latent // 10, 10), decoder)


def discrete_model(shape: tuple[int, ...], decoder: nn.Module) -> tuple[nn.Module, nn.Module]:
    network = nn.Linear(PIXELS, math.prod(shape))
    return models.DiscreteJoint(decoder, torch.zeros(shape)), models.DiscreteEncoder(network, shape)


class Kind(NamedTuple):
    """A kind of posterior: how its model is made and what trains it; the first, with the first k, is the measure."""

    make: Callable[[int, nn.Module], tuple[nn.Module, nn.Module]]
    estimators: list[str]


KINDS = {
    "gaussian": Kind(gaussian, ["elbo-path", "elbo-total"]),
    "bits": Kind(bits, ["elbo-score", "elbo-disarm", "elbo-gumbel-softmax"]),
    "choices": Kind(choices, ["elbo-score", "elbo-gumbel-softmax"]),
}
NAMES = ESTIMATORS | discrete.ESTIMATORS


def build(kind: Kind, latent: int, batch: int) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return the model and the images, the same ones at every call."""
    torch.manual_seed(0)
    decoder = silent.LinearDecoder(0.1 * torch.randn(PIXELS, latent), torch.zeros(PIXELS), torch.tensor(-1.0))
    return *kind.make(latent, decoder), torch.rand(batch, PIXELS)


def disagreement(joint: nn.Module, encoder: nn.Module, x: Tensor) -> float:
    """Return how many standard errors the silent ELBO is from the mean of draws, at the worst image."""
    with torch.no_grad():
        q = encoder(x)
        z = q.sample(encoder.noise(CHECKS, x, torch.Generator().manual_seed(1)))
        draws = joint(x, z) - q.log_prob(z)
        gap = (draws.mean(0) - silent.elbo(joint, x, q)).abs()
        return (gap / (draws.std(0) / CHECKS**0.5)).max().item()


def measure(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the CSV for one kind of posterior."""
    kind = KINDS[name]
    joint, encoder, x = build(kind, arguments.latent, arguments.batch_size)
    if not (error := disagreement(joint, encoder, x)) <= SIGMAS:
        raise SystemExit(f"the silent ELBO of {name} is {error:.1f} standard errors from the mean of draws")
    takes: dict[tuple[str, int], Callable[[], Any]] = {
        ("elbo-silent", 0): lambda: objectives.backward(silent.ELBO, joint, encoder, x, None)
    }
    generator = torch.Generator().manual_seed(2)
    for estimator in kind.estimators:
        for k in arguments.k:

            def take(row=NAMES[estimator], k=k) -> None:
                objectives.backward(row, joint, encoder, x, encoder.noise(k, x, generator))

            takes[estimator, k] = take
    times: dict[tuple[str, int], list[float]] = {key: [] for key in takes}
    for number in tqdm(range(-2, arguments.rounds), desc=name, unit="round", file=sys.stderr):
        for key, take in takes.items():
            joint.zero_grad(), encoder.zero_grad()
            start = time.process_time()
            for _ in range(arguments.steps):
                take()
            if number >= 0:  # the first rounds warm up
                times[key].append(1e3 * (time.process_time() - start) / arguments.steps)
    records = []
    for (estimator, k), mine in times.items():
        ratios = [a / b for a, b in zip(mine, times[kind.estimators[0], arguments.k[0]], strict=True)]
        found = {"ms_median": median(mine), "ms_min": min(mine), "ms_max": max(mine)}
        found |= {"ratio_to_one_draw": median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
        settings = {"posterior": name, "estimator": estimator, "k": k, "latent": arguments.latent, "pixels": PIXELS}
        settings |= {"batch": arguments.batch_size, "threads": 1, "steps": arguments.steps, "rounds": arguments.rounds}
        records.append(settings | {key: f"{value:.4f}" for key, value in found.items()} | provenance())
    return records


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 5, 50], help="draws (default: 1 5 50)")
    parser.add_argument("--latent", type=int, default=50, help="latents, a multiple of 10 (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=100, help="images a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="gradients a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=40, help="rounds that count (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "results" / "benchmark-silent.csv", help="the CSV to write"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    records = [record for name in KINDS for record in measure(name, arguments)]
    write(arguments.output, records, COLUMNS)
    print(f"{'posterior':12}{'estimator':24}{'k':>4}{'ms':>10}{'x one draw':>12}")
    for r in records:
        cells = (float(r[key]) for key in ("ms_median", "ratio_to_one_draw"))
        print(f"{r['posterior']:12}{r['estimator']:24}{r['k']:4}" + "{:10.3f}{:12.2f}".format(*cells))
    print(f"\nWritten: {os.path.relpath(arguments.output)}")


if __name__ == "__main__":
    main()
