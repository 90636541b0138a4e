"""Measure what a training step of S seeds costs as one stacked model, against one seed alone.

A step is all of it: data order, dynamic binarisation, noise, forward, backward, fused Adam; elbo-path, float32, batches
of 20. Two models: the running example's (64-50-50-8, digits) and that of Burda et al. (784-200-200-50, images of
MNIST's size). Stacks and the single training are timed in turns, round after round; a ratio is taken within each round.
On one thread the time is the process's own. "throughput" is S over the ratio: how many times the steps a second of one
seed.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rounds import clock, finish, parser, ratios, spread, take_turns

from vaelib import models
from vaelib.config import Recipe
from vaelib.data.images import Split
from vaelib.stacked import StackedTraining
from vaelib.training import Training

MODELS = {"digits": (64, {"hidden": 50, "latent": 8}), "burda": (784, {"hidden": 200, "latent": 50})}
IMAGES, FOREVER = 2000, 10**6


def training(name: str, k: int, seed: int) -> Training:
    """Return one training on random grey images."""
    pixels, sizes = MODELS[name]
    grey = torch.rand((IMAGES, pixels), generator=torch.Generator().manual_seed(0))
    model = models.build("mlp-1", pixels, generator=torch.Generator().manual_seed(seed), **sizes)
    recipe = Recipe(k=k, seed=seed, epochs=FOREVER)
    return Training(model, Split(grey, None, (1, pixels), "dynamic"), "elbo-path", recipe)


def steps(loop: Training, count: int) -> None:
    """Take ``count`` steps."""
    for _ in range(count):
        loop.note(loop.advance())


def measure(name: str, k: int, threads: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the CSV for one model."""
    torch.set_num_threads(threads)
    alone = training(name, k, 0)
    loops = {0: alone} | {
        seeds: StackedTraining([training(name, k, seed) for seed in range(seeds)]) for seeds in arguments.seeds
    }
    contestants = {seeds: (lambda loop=loop: steps(loop, arguments.steps)) for seeds, loop in loops.items()}
    times = take_turns(contestants, arguments.rounds, clock(threads), f"{name}, k = {k}, {threads} threads")
    records = []
    for seeds in arguments.seeds:
        each = [1e3 * seconds / arguments.steps for seconds in times[seeds]]
        ratio = ratios(times[seeds], times[0])
        settings = {"model": name, "k": k, "threads": threads, "clock": clock(threads).__name__, "seeds": seeds}
        settings |= {"rounds": arguments.rounds, **spread("ms_a_step", each), **spread("ratio_to_alone", ratio)}
        records.append(settings | spread("throughput", [seeds / r for r in ratio]))
    return records


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "benchmark-stacked", rounds=30)
    options.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    options.add_argument("--k", type=int, nargs="+", default=[1], help="draws (default: 1)")
    options.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="(default: 1 2 4 8 16)")
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    options.add_argument("--steps", type=int, default=20, help="in a round (default: %(default)s)")
    arguments = options.parse_args(argv)
    torch.set_flush_denormal(True)
    finish(
        arguments.output,
        [
            record
            for threads in arguments.threads
            for name in arguments.models
            for k in arguments.k
            for record in measure(name, k, threads, arguments)
        ],
    )


if __name__ == "__main__":
    main()
