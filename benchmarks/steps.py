"""Measure milliseconds a training step of every estimator beside a plain PyTorch loop, Pyro, NumPyro and pythae.

A step is forward, backward and Adam (lr 1e-3, eps 1e-4; fused in torch) on the 784-200-200-50 model of Burda et al.,
float32, Bernoulli likelihood, images that are binary and in memory. Each library lives in a process of its own, on the
same cores, and must first give our loss and gradient at the same parameters, images and noise. Then every row is timed
in turn, round after round (A B C, A B C, ...); a ratio to the plain loop is taken within each round. Torch flushes
denormal floats, as `vaelib train` does and XLA too, and glibc keeps freed memory, so that no row pays for
another's page faults. The floor is matrix products and Adam alone.

Let the machine do nothing else: torch's threads wait for each other by spinning, and where another program holds a
core a step can take fifty times as long. With OMP_WAIT_POLICY=PASSIVE in the environment they sleep instead.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np
from peers import LIBRARIES, Check, Problem, serve
from rounds import parser, provenance, write

COLUMNS = (
    "library,version,estimator,k,batch,threads,steps,repeats,ms_median,ms_min,ms_max,"
    "ratio_to_plain,ratio_min,ratio_max,machine,python,torch,date,code"
).split(",")
PLAIN = "plain loop"
STEPS = {1: 60, 5: 40, 50: 12}
TOLERANCE = 1e-4


def problem(batch_size: int, threads: int) -> Problem:
    """Make the images (scikit-learn's digits at 28 x 28, binarised once) and the initial parameters."""
    import torch
    import torch.nn.functional as F
    from sklearn.datasets import load_digits

    from vaelib import models

    digits = torch.as_tensor(load_digits().images / 16, dtype=torch.float32).unsqueeze(1)
    grey = F.interpolate(digits, size=28, mode="bilinear").flatten(1)
    generator = torch.Generator().manual_seed(0)
    images = torch.bernoulli(grey, generator=generator)
    model = models.build("mlp-1", images.shape[1], grey.mean(0), generator)
    parameters = [*model.encoder.parameters(), *model.joint.parameters()]
    return Problem(images.numpy(), batch_size, [p.detach().numpy().copy() for p in parameters], threads)


def reference(objective: str, x: np.ndarray, eps: np.ndarray, parameters: list[np.ndarray]):
    """Return our loss and gradient: of a bound, of the KL form, or of pythae's IWAE, which reports sum w log w."""
    import torch
    from peers import load, take_gradient

    from vaelib import bounds, models, objectives
    from vaelib.estimators import ESTIMATORS

    x, eps = torch.from_numpy(x), torch.from_numpy(eps)
    model = models.build("mlp-1", x.shape[1])
    ours = load([*model.encoder.parameters(), *model.joint.parameters()], parameters)
    posterior = model.encoder(x)
    z, log_q = posterior.sample_and_log_prob(eps)
    if objective == "elbo-kl":
        loss = -bounds.elbo_kl(model.joint, x, posterior, z).mean()
        loss.backward()
    else:
        bound = objective.removesuffix("-weighted")
        loss = -objectives.backward(ESTIMATORS[f"{bound}-total"], model.joint, posterior, x, eps).mean()
    if objective == "iwae-weighted":
        log_w = model.joint(x, z) - log_q
        loss = -(log_w.softmax(0) * log_w).sum(0).mean()
    return loss.item(), take_gradient(ours)


def disagreement(check: Check, parameters: list[np.ndarray]) -> float:
    """Return the largest relative difference from our loss, and from our gradient in norm, layer by layer."""
    loss, gradient = reference(check.objective, check.x, check.eps, parameters)
    found = [abs(check.loss - loss) / abs(loss)]
    if check.gradient is not None:
        pairs = zip(check.gradient, gradient, strict=True)
        found += [float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours)) for theirs, ours in pairs]
    return max(found)


class Worker:
    """A library in its own process: requests go in, answers come out; an exception that comes out is raised here."""

    def __init__(self, name: str, task: Problem) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, task), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, *request: Any) -> Any:
        if request:
            self.connection.send(request)
        answer = self.connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop(self) -> None:
        self.connection.close()
        self.process.join(timeout=10)
        self.process.kill()


@contextmanager
def workers(names: list[str], task: Problem) -> Iterator[dict[str, tuple[Worker, str]]]:
    """Start the libraries that are installed, each with its version; say which are not."""
    started: dict[str, tuple[Worker, str]] = {}
    try:
        for name in names:
            worker = Worker(name, task)
            try:
                started[name] = worker, worker.ask()
            except ImportError:
                print(f"skipped: {name} is not installed (make bench installs it: {LIBRARIES[name].package})")
                worker.stop()
        yield started
    finally:
        for worker, _ in started.values():
            worker.stop()


def measure(arguments: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    """Return the rows of the CSV for a number of threads, which the workers that start now are held to."""
    from tqdm import tqdm

    os.environ |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    task = problem(arguments.batch_size, threads)
    records = []
    with workers(arguments.only, task) as started:
        for k, n in zip(arguments.k, arguments.steps, strict=True):
            rows: dict[tuple[str, str], str] = {}
            for name, (worker, _) in started.items():
                for row, bound, check in worker.ask("build", k):
                    rows[name, row] = bound
                    worst = 0.0 if check is None else disagreement(check, task.parameters)
                    if not worst <= TOLERANCE:
                        raise SystemExit(f"{name} {row} at k = {k} is not what we compute: it differs by {worst:.1e}")
            times: dict[tuple[str, str], list[float]] = {key: [] for key in rows}
            rounds = tqdm(
                range(-1, arguments.repeats), desc=f"threads = {threads}, k = {k}", unit="round", file=sys.stderr
            )
            for number in rounds:
                for name, row in rows:
                    elapsed = started[name][0].ask("time", row, n)
                    if number >= 0:  # the first round warms up
                        times[name, row].append(elapsed)
            for (name, row), bound in rows.items():
                plain = times.get((PLAIN, bound))
                record = {"library": name, "version": started[name][1], "estimator": row, "k": k, "steps": n}
                records.append(record | summary(times[name, row], plain))
    shared = {"batch": arguments.batch_size, "threads": threads, "repeats": arguments.repeats}
    return [record | shared | provenance() for record in records]


def summary(times: list[float], plain: list[float] | None) -> dict[str, str]:
    """Return the median and range of the times, and of their ratios to the plain loop's, round by round."""
    ratios = [mine / theirs for mine, theirs in zip(times, plain, strict=True)] if plain else [math.nan]
    found = {"ms_median": median(times), "ms_min": min(times), "ms_max": max(times)}
    found |= {"ratio_to_plain": median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    return {key: f"{value:.4f}" for key, value in found.items()}


def show(records: list[dict[str, Any]]) -> None:
    """Print the summary, a table for each k."""
    for threads, k in dict.fromkeys((record["threads"], record["k"]) for record in records):
        print(f"\n{f'threads = {threads}, k = {k}':33}{'ms a step (range)':31} x plain (range)")
        for r in records:
            if (r["threads"], r["k"]) == (threads, k):
                label = f"{r['library']}: {r['estimator']}"
                low, mid, high = (float(r[f"ms_{part}"]) for part in ("min", "median", "max"))
                times, ratio = f"{mid:7.3f} ({low:.3f} to {high:.3f})", float(r["ratio_to_plain"])
                print(f"{label:32}{times:32}{ratio:5.2f} ({float(r['ratio_min']):.2f} to {float(r['ratio_max']):.2f})")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    options = parser(__doc__, "benchmark-steps")
    options.add_argument("--k", type=int, nargs="+", default=list(STEPS), help="draws (default: 1 5 50)")
    options.add_argument(
        "--steps",
        type=int,
        nargs="+",
        help="steps a row and round, one number for each k (default: 60 40 12; 12 for another k)",
    )
    options.add_argument("--repeats", type=int, default=30, help="rounds that count (default: %(default)s)")
    options.add_argument("--batch-size", type=int, default=20, help="images a step (default: %(default)s)")
    options.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="threads, and cores, of each library (default: 1 2)"
    )
    options.add_argument(
        "--only", nargs="+", choices=list(LIBRARIES), default=list(LIBRARIES), help="only these libraries"
    )
    arguments = options.parse_args(argv)
    if arguments.steps is None:
        arguments.steps = [STEPS.get(k, 12) for k in arguments.k]
    if len(arguments.steps) != len(arguments.k):
        options.error(f"--steps needs one number for each of the {len(arguments.k)} k, but has {len(arguments.steps)}")
    for name in ("k", "steps", "repeats", "batch_size", "threads"):
        if np.min(getattr(arguments, name)) < 1:
            options.error(f"--{name.replace('_', '-')} must be at least 1")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    settings = {"MALLOC_TRIM_THRESHOLD_": 2**29, "MALLOC_MMAP_THRESHOLD_": 2**29, "JAX_PLATFORMS": "cpu"}
    os.environ |= {name: str(value) for name, value in settings.items()}  # the workers start with them
    records = [record for threads in arguments.threads for record in measure(arguments, threads)]
    write(arguments.output, records, COLUMNS)
    show(records)
    print(f"\nWritten: {os.path.relpath(arguments.output)}")


if __name__ == "__main__":
    main()
