"""Measure what an exact gradient costs: milliseconds of the silent ELBO against K draws, for each kind of posterior.

A gradient is forward and backward of one estimate of -ELBO for a batch of images, on a linear encoder and a linear
Gaussian decoder of 784 pixels, float32. The silent one has no draws, and its time is one number; the others are rows of
vaelib.estimators with K draws. The silent value must first be the mean of theirs. Times are the
process's own CPU time on one thread, taken in turns, round after round; a ratio to the plainest estimator with one draw
is taken within each round.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from rounds import clock, finish, parser, ratios, spread, take_turns
from torch import Tensor, nn

from vaelib import models, objectives, silent
from vaelib.estimators import ESTIMATORS
from vaelib.posteriors import DiagonalGaussian

PIXELS = 784
CHECKS, SIGMAS = 200, 5.0


class LinearGaussianEncoder(nn.Module):
    """A Gaussian whose mean and log-scale are linear in x."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.network = nn.Linear(PIXELS, 2 * latent)

    def forward(self, x: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(*self.network(x).chunk(2, -1))


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


def build(kind: Kind, latent: int, batch: int) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return the model and the images, the same ones at every call."""
    torch.manual_seed(0)
    decoder = models.LinearDecoder(0.1 * torch.randn(PIXELS, latent), torch.zeros(PIXELS), torch.tensor(-1.0))
    return *kind.make(latent, decoder), torch.rand(batch, PIXELS)


def disagreement(joint: nn.Module, encoder: nn.Module, x: Tensor) -> float:
    """Return how many standard errors the silent ELBO is from the mean of draws, at the worst image."""
    with torch.no_grad():
        q = encoder(x)
        z = q.sample(q.noise(CHECKS, torch.Generator().manual_seed(1)))
        draws = joint(x, z) - q.log_prob(z)
        gap = (draws.mean(0) - silent.elbo(joint, x, q)).abs()
        return (gap / (draws.std(0) / CHECKS**0.5)).max().item()


def measure(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the CSV for one kind of posterior."""
    kind = KINDS[name]
    joint, encoder, x = build(kind, arguments.latent, arguments.batch_size)
    if not (error := disagreement(joint, encoder, x)) <= SIGMAS:
        raise SystemExit(f"the silent ELBO of {name} is {error:.1f} standard errors from the mean of draws")
    generator = torch.Generator().manual_seed(2)

    def drawn(estimator: str, k: int) -> None:
        q = encoder(x)
        objectives.backward(ESTIMATORS[estimator], joint, q, x, q.noise(k, generator))

    takes: dict[tuple[str, int], Callable[[], Any]] = {
        ("elbo-silent", 0): lambda: objectives.backward(silent.ELBO, joint, encoder(x), x, None)
    }
    takes |= {(estimator, k): partial(drawn, estimator, k) for estimator in kind.estimators for k in arguments.k}
    contestants = {key: (lambda take=take: [take() for _ in range(arguments.steps)]) for key, take in takes.items()}

    def before(key: tuple[str, int]) -> None:
        """Take one gradient, for the memory that the contestant before it gave back; then forget it."""
        takes[key]()
        joint.zero_grad(), encoder.zero_grad()

    times = take_turns(contestants, arguments.rounds, clock(1), name, before)
    records = []
    for (estimator, k), mine in times.items():
        settings = {"posterior": name, "estimator": estimator, "k": k, "latent": arguments.latent, "pixels": PIXELS}
        settings |= {"batch": arguments.batch_size, "threads": 1, "steps": arguments.steps, "rounds": arguments.rounds}
        settings |= spread("ms", [1e3 * seconds / arguments.steps for seconds in mine])
        settings |= spread("ratio_to_one_draw", ratios(mine, times[kind.estimators[0], arguments.k[0]]))
        records.append(settings)
    return records


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "benchmark-silent", rounds=40)
    options.add_argument("--k", type=int, nargs="+", default=[1, 5, 50], help="draws (default: 1 5 50)")
    options.add_argument("--latent", type=int, default=50, help="latents, a multiple of 10 (default: %(default)s)")
    options.add_argument("--batch-size", type=int, default=100, help="images a step (default: %(default)s)")
    options.add_argument("--steps", type=int, default=5, help="gradients a round (default: %(default)s)")
    arguments = options.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    finish(arguments.output, [record for name in KINDS for record in measure(name, arguments)])


if __name__ == "__main__":
    main()
