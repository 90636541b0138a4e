"""Measure what torch.compile saves of a training step: eager and compiled beside the plain loop, in one run.

The setting of steps.py: the 784-200-200-50 model of Burda et al., float32, batches of 20 binary images, fused Adam. The
compiled step is vaelib.fast.Compiled, which the eager one's gradient is first compared with. All are timed in turns,
round after round; a ratio to the plain loop is taken within each round. On one thread the time is the process's own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers import LIBRARIES, Problem, adam, load, torch_batches
from rounds import clock, finish, ratios, spread, take_turns
from steps import ROOT, STEPS, TOLERANCE, problem

from vaelib import fast, models
from vaelib.estimators import TABLEAU
from vaelib.posteriors import draw
from vaelib.training import backward, train_step

WAYS: dict[str, Callable[[], Callable]] = {"eager": lambda: backward, "compiled": fast.Compiled}


def trainer(way: str, row: str, k: int, task: Problem) -> tuple[Callable[[int], None], torch.Tensor, float]:
    """Return a function that takes n steps, the gradient at the start, and the seconds that the first call took."""
    model, generator = models.build("mlp-1", task.images.shape[1]), torch.Generator().manual_seed(0)
    parameters = load([*model.encoder.parameters(), *model.joint.parameters()], task.parameters)
    optimizer, batches, by = adam(parameters), torch_batches(task), WAYS[way]()

    def steps(n: int) -> None:
        for _ in range(n):
            train_step(model, TABLEAU[row], optimizer, next(batches), draw(noise, generator), backward=by)

    x = next(batches)
    noise, start = model.encoder(x).noise_like(k), time.perf_counter()
    by(TABLEAU[row], model, x, draw(noise, generator))
    if not getattr(by, "works", True):
        raise SystemExit("nothing to measure: torch.compile does not work here")
    return steps, torch.cat([p.grad.flatten() for p in parameters]), time.perf_counter() - start


def measure(row: str, k: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the CSV for one estimator and k."""
    task, n = problem(20, arguments.threads), arguments.steps or STEPS.get(k, 12)
    plain = LIBRARIES["plain loop"].build(TABLEAU[row].bound, k, task)
    ways = {way: trainer(way, row, k, task) for way in WAYS}
    eager, compiled = (ways[way][1] for way in WAYS)
    if not (error := (eager - compiled).norm() / eager.norm()) <= TOLERANCE:
        raise SystemExit(f"{row}, k = {k}: the compiled gradient differs by {error:.1e}")
    contestants = {"plain loop": plain.steps} | {way: steps for way, (steps, _, _) in ways.items()}
    calls = {name: (lambda steps=steps: steps(n)) for name, steps in contestants.items()}
    times = take_turns(calls, arguments.rounds, clock(arguments.threads), f"{row}, k = {k}")
    records = []
    for name, mine in times.items():
        settings = {"estimator": row, "k": k, "way": name, "threads": arguments.threads, "rounds": arguments.rounds}
        settings |= {"clock": clock(arguments.threads).__name__}
        settings |= spread("ms_a_step", [1e3 * seconds / n for seconds in mine])
        settings |= spread("ratio_to_plain", ratios(mine, times["plain loop"]))
        settings |= spread("ratio_to_eager", ratios(mine, times["eager"]))
        records.append(settings | {"compile_s": f"{ways[name][2]:.1f}" if name == "compiled" else ""})
    return records


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(TABLEAU), default=["elbo-path", "iwae-dreg"])
    parser.add_argument("--k", type=int, nargs="+", default=list(STEPS), help="draws (default: 1 5 50)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, help="in a round (default: 60 for k = 1, 40 for 5, 12 for 50)")
    parser.add_argument("--rounds", type=int, default=30, help="rounds that count (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "benchmark-compiled.csv")
    arguments = parser.parse_args(argv)
    torch.set_flush_denormal(True)
    torch.set_num_threads(arguments.threads)
    finish(arguments.output, [r for row in arguments.rows for k in arguments.k for r in measure(row, k, arguments)])


if __name__ == "__main__":
    main()
