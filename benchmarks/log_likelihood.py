"""Measure time and peak memory of log p(x) by importance sampling, streamed and with all weights at once.

vaelib.evaluation.log_likelihood, in chunks of 20 and of 100 draws, against the plain way that sends all draws through
the decoder in one call and takes one log-sum-exp; the 784-200-200-50 model of Burda et al., float32. The values must
first agree within their own Monte Carlo error. Times are taken in turns, on one thread, by the process's own time.
Memory is the rise of the largest resident set of a fresh process while it does the work once.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from rounds import clock, finish, parser, ratios, spread, take_turns
from torch import Tensor

from vaelib import evaluation, models

PIXELS, SIGMAS = 784, 6.0


def problem(images: int) -> tuple[models.VAE, Tensor, torch.Generator]:
    """Return the model, the images and the noise's generator, the same ones at every call."""
    generator = torch.Generator().manual_seed(0)
    model = models.build("mlp-1", PIXELS, generator=generator)
    return model, torch.rand((images, PIXELS), generator=generator).round(), generator


def streamed(chunk: int) -> Callable[..., Tensor]:
    """The library's way, ``chunk`` draws at a time."""

    def estimate(model: models.VAE, x: Tensor, generator: torch.Generator, samples: int) -> Tensor:
        return evaluation.log_likelihood(model, x, samples, chunk, generator)

    return estimate


@torch.no_grad()
def at_once(model: models.VAE, x: Tensor, generator: torch.Generator, samples: int) -> Tensor:
    """The plain way: every draw of every image in one tensor."""
    q = model.encoder(x)
    z = q.sample(q.noise(samples, generator))
    return (model.joint(x, z) - q.log_prob(z)).logsumexp(0) - math.log(samples)


WAYS = {"all at once": at_once, "streamed by 20": streamed(20), "streamed by 100": streamed(100)}


def start(threads: int = 1) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def peak(way: str, images: int, samples: int) -> float:
    """Return by how many MB the work raises the peak of this process."""
    import resource

    unit = 1e6 if sys.platform == "darwin" else 1e3  # ru_maxrss is in bytes there, in kilobytes elsewhere
    start()
    model, x, generator = problem(images)
    WAYS[way](model, x[:1], generator, 10)  # what torch needs to start at all
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    WAYS[way](model, x, generator, samples)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit


def memory(way: str, images: int, samples: int) -> float:
    """Return :func:`peak` of a fresh process; asked for early, since a child starts with its parent's peak on Linux."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak, way, images, samples).result()


def measure(images: int, samples: int, rounds: int) -> list[dict[str, Any]]:
    """Return the rows of the CSV."""
    peaks = {name: memory(name, images, samples) for name in WAYS}
    start()
    model, x, generator = problem(images)
    values, errors = evaluation.log_likelihood(model, x, samples, 100, generator, return_standard_error=True)
    if ((at_once(model, x, generator, samples) - values).abs() > SIGMAS * 2**0.5 * errors + 1e-3).any():
        raise SystemExit("the two ways do not find the same log p(x)")
    calls = {name: (lambda way=way: way(model, x, generator, samples)) for name, way in WAYS.items()}
    times = take_turns(calls, rounds, clock(1), "log p(x)")
    return [
        {"way": name, "images": images, "samples": samples, "threads": 1, "rounds": rounds}
        | spread("seconds", mine)
        | spread("ratio_to_at_once", ratios(mine, times["all at once"]))
        | {"peak_mb": f"{peaks[name]:.1f}"}
        for name, mine in times.items()
    ]


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "benchmark-log-likelihood", rounds=10)
    options.add_argument("--images", type=int, default=20, help="(default: %(default)s)")
    options.add_argument("--samples", type=int, default=5000, help="draws an image (default: %(default)s)")
    arguments = options.parse_args(argv)
    finish(arguments.output, measure(arguments.images, arguments.samples, arguments.rounds))


if __name__ == "__main__":
    main()
