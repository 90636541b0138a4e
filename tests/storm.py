"""A storm: runs and grids of every kind are killed at random moments, again and again, and must end bit for bit.

``make storm MINUTES=30`` runs it for so many minutes, and on until there was a kill, and says how many there were. Each
kind is first made once without a disturbance; then in another folder, where it is killed (SIGKILL, or a signal that it
may answer) after a random time, and started again by the same command, until it is done. What it leaves must be the
same then, times apart, and no file of anybody else may be touched. A run is a process forked from this one, which has
imported everything; a grid is that too, and its workers are processes of their own, which are killed as well.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from test_training import differences

from vaelib import cli, files
from vaelib.experiments import grid, lag, results, silent, stl  # noqa: F401  (before the fork, not after)

DIGITS = ("--data", "digits", "--epochs", "6", "--batch-size", "50", "--device", "cpu", "--checkpoint-seconds", "0.1")
SMALL = ("--size", "hidden=16", "--size", "latent=4")
MLP = (*DIGITS, "--binarisation", "dynamic", *SMALL, "--model")

KINDS: dict[str, tuple[str, ...]] = {
    "path": ("train", *MLP, "mlp-1", "--estimator", "elbo-path"),
    "dreg": ("train", *MLP, "mlp-1", "--estimator", "iwae-dreg", "--k", "5"),
    "two layers": ("train", *MLP, "mlp-2", "--estimator", "iwae-path", "--k", "3", "--clip", "1"),
    "released": ("train", *MLP, "mlp-1", "--optimizer", "adam-released", "--no-shuffle", "--schedule", "burda"),
    "sgd": ("train", *MLP, "mlp-1", "--optimizer", "sgd", "--lr", "0.01", "--checkpoint-seconds", "0"),
    "mixture": ("train", *MLP, "mlp-1-mixture", "--estimator", "iwae-path", "--k", "3", "--size", "components=3"),
    "flow": ("train", *MLP, "mlp-1-flow", "--estimator", "elbo-path", "--size", "flow_hidden=8", "--size", "layers=2"),
    "discrete": ("train", *MLP, "mlp-1-bernoulli", "--estimator", "elbo-disarm"),
    "silent": ("train", *DIGITS, "--model", "linear", "--estimator", "elbo-silent"),
    "grey": ("train", *DIGITS, "--model", "linear", "--estimator", "elbo-score-loo", "--k", "4"),
    "table 2": ("experiment", "run", "stl-table-2", "--preset", "smoke", "--jobs", "2", "--device", "cpu"),
    "figure 1": ("experiment", "run", "stl-figure-1", "--preset", "smoke", "--seeds", "2", "--jobs", "2"),
    "silent grid": ("experiment", "run", "silent-annealed", "--preset", "smoke", "--jobs", "2", "--device", "cpu"),
    "lag toy": ("experiment", "run", "lag-toy", "--preset", "smoke", "--jobs", "2", "--device", "cpu"),
    "lag text": ("experiment", "run", "lag-text", "--preset", "smoke", "--jobs", "2", "--device", "cpu"),
    "lag images": ("experiment", "run", "lag-omniglot", "--preset", "smoke", "--jobs", "2", "--device", "cpu"),
}
"""Every kind of run, by the command that makes it, without its folder."""

SIGNALS = (signal.SIGKILL,) * 4 + (signal.SIGTERM, signal.SIGINT)
STRANGERS = (".thesis.odt.part", "notes.txt")
"""Files of somebody else, which lie in each folder from the beginning."""


@dataclass
class Storm:
    """The folder in which it rages, and what there has been of it."""

    folder: Path
    random: random.Random
    kills: int = 0
    starts: int = 0
    rounds: int = 0

    def rage(self, kind: str, most: int = 20) -> None:
        """Make one kind undisturbed, and then with kills, at most so many; raise AssertionError if the two differ."""
        whole, killed = self.folder / "whole", self.folder / "killed"
        for place in (whole, killed):
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            for name in STRANGERS:
                (place / name).write_text("mine")
        start = time.monotonic()
        assert self.end_of(begin(kind, whole)) == 0, f"{kind} fails without any disturbance"
        lasts = time.monotonic() - start
        for _ in range(most):
            process = begin(kind, killed)
            if self.disturbed(process, killed, self.random.uniform(0, lasts)):
                break
            check_whole(killed)
        else:
            assert self.end_of(begin(kind, killed)) == 0, f"{kind} does not go on after {most} kills"
        found = differences(contents(whole), contents(killed))
        assert not found, f"{kind} ends in another way after its kills: {found[:5]}"
        self.rounds += 1

    def disturbed(self, process: int, place: Path, seconds: float) -> bool:
        """Kill a process, or a worker of a grid, after some seconds; return whether it was done before that."""
        self.starts += 1
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if (status := ended(process)) is not None:
                assert status == 0, f"it ends with {status}"
                return True
            time.sleep(0.01)
        workers = list(workers_in(place))
        victim, number = process, self.random.choice(SIGNALS)
        if workers and self.random.random() < 0.5:
            victim, number = self.random.choice(workers), signal.SIGKILL
        try:
            os.kill(victim, number)
        except ProcessLookupError:
            return ended(process) == 0
        self.kills += 1
        if victim != process:  # the grid goes on by itself
            status = wait(process)
            assert status == 0, f"the grid ends with {status} after one of its workers was killed"
            return True
        status = wait(process)
        assert status in (0, 130, -number), f"it ends with {status} after signal {number}"
        while list(workers_in(place)):  # they hear of it by themselves
            time.sleep(0.02)
        return status == 0

    @staticmethod
    def end_of(process: int) -> int:
        return wait(process)


def begin(kind: str, place: Path) -> int:
    """Start the command of a kind in a process of its own; return its number."""
    what, *words = KINDS[kind]
    where = [str(place)] if what == "train" else []
    folders = [] if what == "train" else ["--results", str(place / "results"), "--runs", str(place / "runs")]
    command = [what, *where, *words, *folders, "--quiet"]
    if process := os.fork():
        return process
    status = 1
    try:  # a process forked from a test does not go on as one
        os.setpgrp()
        with open(place.parent / "said.txt", "a") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        cli.main(command)
    except SystemExit as end:
        status = end.code or 0
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def ended(process: int) -> int | None:
    """Return the exit status of a process, negative for a signal; None while it is at work."""
    done, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def wait(process: int) -> int:
    """Wait for the end of a process and return its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def workers_in(place: Path) -> Iterator[int]:
    """Yield the numbers of the processes, other than ours, that hold a lock below a folder."""
    for path in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = os.readlink(path)
        except OSError:
            continue
        if target.startswith(f"{place}/runs/") and target.endswith(".lock"):
            yield int(path.parts[2])


def check_whole(place: Path) -> None:
    """Raise AssertionError unless every file is whole at any moment, and strangers' files are there."""
    assert all((place / name).read_text() == "mine" for name in STRANGERS), "a stranger's file was touched"
    for path in place.rglob("*.json"):
        files.read_json(path)
    for path in place.rglob("checkpoint.pt"):
        torch.load(path, weights_only=True)
    for path in place.rglob("metrics.jsonl"):
        assert all(json.loads(line) for line in path.read_text().splitlines())
    for path in place.glob("results/*.csv"):
        if path.stem in results_of():
            results.read(results_of()[path.stem], path.parent)


def results_of() -> dict:
    """Return the experiments by name."""
    return {**stl.EXPERIMENTS, **lag.EXPERIMENTS, **silent.EXPERIMENTS}


def timeless(value: object) -> object:
    """Return what a file holds without the entries that are times."""
    if isinstance(value, dict):
        return {name: timeless(each) for name, each in value.items() if "seconds" not in str(name)}
    return [timeless(each) for each in value] if isinstance(value, list | tuple) else value


def contents(place: Path) -> dict:
    """Return everything that a run or a grid left, times apart."""
    check_whole(place)
    found: dict = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.name in ("error.txt", "progress.json", "measured.json") or path.is_dir():
            continue  # times, and what is in the tables
        if path.suffix == ".pt":
            state = torch.load(path, weights_only=True)
            found[name] = {**state, "history": [json.loads(line) for line in state["history"].splitlines()]}
        elif path.suffix == ".jsonl":
            found[name] = [json.loads(line) for line in path.read_text().splitlines()]
        elif path.suffix == ".json":
            found[name] = json.loads(path.read_text())
        elif path.suffix == ".csv" and path.stem in results_of():
            table = results.read(results_of()[path.stem], path.parent)
            timed = table["metric"].str.contains("seconds")
            table = table[~timed].drop(columns=["seconds", "date"])
            found[name] = sorted(map(tuple, table.to_numpy().tolist()))
        else:
            found[name] = sorted(path.read_text().splitlines())
    return timeless(found)


def main(minutes: float, *kinds: str) -> None:
    """Let the storm rage over some kinds, or all, in turns; raise AssertionError when something is lost."""
    seed, kinds = int(time.time()), kinds or tuple(KINDS)
    end, folder = time.monotonic() + 60 * minutes, Path(tempfile.mkdtemp(prefix="storm-"))
    storm = Storm(folder, random.Random(seed))
    print(f"seed {seed}, in {folder}", flush=True)
    while time.monotonic() < end or not storm.kills:  # without a kill it says nothing
        kind = kinds[storm.rounds % len(kinds)]
        storm.rage(kind, 6 if minutes < 1 or KINDS[kind][0] != "train" else 20)
        print(
            f"{storm.kills} kills, {storm.starts} starts, {storm.rounds} rounds: {kind} ended as undisturbed",
            flush=True,
        )
    shutil.rmtree(folder)
    print(f"{storm.kills} kills in {storm.rounds} rounds over {min(len(kinds), storm.rounds)} kinds: nothing lost")


if __name__ == "__main__":
    main(float(sys.argv[1]), *sys.argv[2:])
