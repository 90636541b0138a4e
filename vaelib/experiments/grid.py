"""Run the grid of an experiment, on the cores of this machine or on a Ray cluster, and go on after whatever stopped it.

Every run has a folder, ``runs/<experiment>/<preset>/<run>``, in which it leaves its checkpoints, how far it is, and in
the end ``measured.json``. All that the grid needs to know is in these files and in the table of results: a grid that
was killed goes on by the same command, runs that were finished are not made again, and two grids at once share the
work. The folder must be seen by all machines of a cluster.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from vaelib.config import DEVICES
from vaelib.errors import InputError, choose, positive, whole_number
from vaelib.experiments import EXPERIMENTS, find, results
from vaelib.experiments.experiment import Task
from vaelib.runs import Folder, InUse, find_device, in_use, read_json, write, write_json

RUNS = Path("runs")
TRIES = 3
"""How often a run is started whose process died."""
PAUSE = 0.2
"""Seconds between two looks at the runs."""
SLOW_IMPORTS = ("sklearn.datasets", "torch._dynamo")
"""What nearly every run imports when it needs it; the processes are forked from one that has."""


def run(
    name: str,
    preset: str,
    seeds: int | None = None,
    device: str = "auto",
    jobs: int | None = None,
    ray: str | None = None,
    gpu_share: float = 1.0,
    results_folder: str | Path = results.RESULTS,
    runs_folder: str | Path = RUNS,
    progress: bool = False,
) -> Path:
    """Make the runs of a preset that are not in the table of results yet; return the table's path.

    Parameters
    ----------
    name, preset, seeds
        which runs.
    device
        "cpu", "cuda" or "auto".
    jobs
        runs at once; by default one a core, or one a GPU, of this machine; on a cluster as many as it has room for.
    ray
        the address of a Ray cluster, "auto" for the one this machine belongs to; None for this machine alone.
    gpu_share
        how much of a GPU a run asks a cluster for.
    results_folder, runs_folder
        where the tables and the runs are.
    progress
        show a bar with the time left.

    Raises
    ------
    InputError
        if there is no such experiment or preset, or if a run failed: all others are finished first.
    KeyboardInterrupt
        after SIGINT; the runs under way have saved their checkpoints.
    """
    experiment, table, folder = find(name), Path(results_folder), Path(runs_folder)
    choose("device", device, DEVICES)
    if jobs is not None:
        whole_number("jobs", jobs, least=1)
    positive("gpu_share", gpu_share)
    tasks = experiment.tasks(preset, seeds)
    known = results.finished(experiment, table)
    places = [folder / name / preset / task.name for task in tasks]
    waiting = [Job(task, place, device) for task, place in zip(tasks, places) if task.key not in known]
    failed = {}
    if waiting:
        pool = OnRay(ray, device, gpu_share) if ray else OnThisMachine(jobs or default_jobs(device))
        with tqdm(total=float(len(tasks)), unit="run", disable=not progress, bar_format=BAR) as bar:
            failed = Grid(pool, waiting, table, bar, done=len(tasks) - len(waiting)).finish()
    experiment.gather(preset, places, table)
    if failed:
        first, why = next(iter(failed.items()))
        raise InputError(
            f"{len(failed)} of {len(tasks)} runs failed, the first in '{first.folder}': {why}; the others are in "
            f"'{results.path_of(experiment, table)}', and the same command tries the failed ones again"
        )
    return results.path_of(experiment, table)


BAR = "{desc}{percentage:3.0f}% |{bar}| {n:.1f} of {total:.0f} runs, {elapsed} < {remaining}"


@dataclass(eq=False)
class Job:
    """A task on its way: its folder, where it runs, and how often its process died."""

    task: Task
    folder: Path
    device: str
    deaths: int = 0

    @property
    def fraction(self) -> float:
        """How much of it is done."""
        return noted(self.folder / "progress")


class Pool(Protocol):
    """Where jobs run."""

    def has_room(self) -> bool:
        """Whether one more job can start."""

    def start(self, job: Job) -> None:
        """Start a job."""

    def ended(self) -> list[Job]:
        """Return the jobs that ended since the last call, well or not: their folders tell."""

    def stop(self) -> None:
        """Ask all jobs to save and end, and wait until they did."""


@dataclass
class Grid:
    """The loop that feeds a pool with jobs and the table with what they measured."""

    pool: Pool
    waiting: list[Job]
    table: Path
    bar: tqdm
    done: float
    running: list[Job] = field(default_factory=list)
    elsewhere: list[Job] = field(default_factory=list)
    failed: dict[Job, str] = field(default_factory=dict)

    def finish(self) -> dict[Job, str]:
        """Run until nothing is left to do; return the jobs that failed, and why."""
        self.bar.initial = self.bar.n = self.done
        try:
            while self.waiting or self.running or self.elsewhere:
                if not self.waiting and not self.running:
                    self.take_up_elsewhere()
                while self.waiting and self.pool.has_room():
                    self.running.append(self.waiting.pop(0))
                    self.pool.start(self.running[-1])
                for job in self.pool.ended():
                    self.running.remove(job)
                    self.settle(job)
                self.show()
                time.sleep(PAUSE)
        except BaseException:
            self.pool.stop()
            raise
        return self.failed

    def settle(self, job: Job) -> None:
        """Put what a job measured into the table; or find out why it did not measure."""
        experiment = find(job.task.experiment)
        outcome = job.folder / "measured.json"
        if outcome.exists():
            results.add(experiment, job.task, read_json(outcome)["rows"], self.table)
            self.done += 1
            return
        error = job.folder / "error.txt"
        why = error.read_text(encoding="utf-8").strip() if error.exists() else ""
        if why == IN_USE:
            self.elsewhere.append(job)
        elif why:
            self.failed[job] = why.splitlines()[-1]
        elif job.deaths + 1 < TRIES:
            job.deaths += 1
            self.waiting.insert(0, job)
        else:
            self.failed[job] = f"its process died {TRIES} times"

    def take_up_elsewhere(self) -> None:
        """See what became of the runs that another grid was at."""
        time.sleep(5 * PAUSE)
        experiment = find(self.elsewhere[0].task.experiment)
        known = results.finished(experiment, self.table)
        self.done += sum(job.task.key in known for job in self.elsewhere)
        self.waiting = [job for job in self.elsewhere if job.task.key not in known]
        self.elsewhere = []

    def show(self) -> None:
        """Move the bar."""
        now = self.done + len(self.failed) + sum(job.fraction for job in self.running)
        if now > self.bar.n + 0.005:
            self.bar.update(now - self.bar.n)


# --- one run ----------------------------------------------------------------------------------------------------------

IN_USE = "another grid is at it"


def execute(task: Task, folder: Path, device: str) -> None:
    """Make one run in its folder, from wherever it was left; in the end the folder has measured.json or error.txt.

    Raises
    ------
    KeyboardInterrupt
        if it was asked to stop; its checkpoint is saved.
    """
    import torch

    torch.set_flush_denormal(True)
    error, outcome = folder / "error.txt", folder / "measured.json"
    try:
        with in_use(Folder(folder)):
            error.unlink(missing_ok=True)
            if outcome.exists():
                return
            start = time.monotonic()
            before = noted(folder / "seconds")  # of earlier starts

            def report(fraction: float) -> None:
                nonlocal reported
                if (now := time.monotonic()) - reported >= 1:
                    reported = now
                    (folder / "progress").write_text(f"{fraction:.4f}")
                    (folder / "seconds").write_text(f"{before + now - start:.1f}")

            reported = start
            place = find_device(device).type
            measured = find(task.experiment).run(task.config, task.seed, folder, place, report)
            rows = results.as_rows(measured, before + time.monotonic() - start, place)
            write_json(outcome, {"rows": rows})
    except InUse:
        write(error, IN_USE.encode())
    except InputError as problem:
        write(error, str(problem).encode())
    except OSError as problem:
        write(error, f"{problem.filename or folder}: {problem.strerror or problem}".encode())
    except Exception:
        write(error, traceback.format_exc().encode())


def noted(path: Path) -> float:
    """Return the number that a run keeps in this file; 0 as long as there is none."""
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return 0.0


# --- where runs run ---------------------------------------------------------------------------------------------------


def default_jobs(device: str) -> int:
    """Return one job for each core that this process may use, or one for the GPU."""
    if find_device(device).type == "cuda":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class OnThisMachine:
    """A process for each run, with one thread; ``jobs`` at a time."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.processes: dict[Job, Any] = {}
        how = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self.context = multiprocessing.get_context(how)
        if how == "forkserver":
            modules = {f"vaelib.experiments.{module}" for module in ("grid", *EXPERIMENTS.values())}
            self.context.set_forkserver_preload([*sorted(modules), *SLOW_IMPORTS])

    def has_room(self) -> bool:
        return len(self.processes) < self.jobs

    def start(self, job: Job) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        process = self.context.Process(target=in_own_process, args=(job.task, job.folder, job.device), daemon=True)
        process.start()
        self.processes[job] = process

    def ended(self) -> list[Job]:
        gone = [job for job, process in self.processes.items() if not process.is_alive()]
        for job in gone:
            self.processes.pop(job).join()
        return gone

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.join()


def in_own_process(task: Task, folder: Path, device: str) -> None:
    """Make one run in a process of its own, which ends when the grid's does."""
    import torch

    if hasattr(os, "setpgrp"):
        os.setpgrp()  # the terminal's Ctrl-C is for the grid, which passes it on once
    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        execute(task, folder, device)
    except KeyboardInterrupt:
        sys.exit(130)


def end_with_parent() -> None:
    """Ask this process to stop when the grid's process is gone."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


class OnRay:
    """A Ray task for each run; the cluster decides where, and starts a run again whose worker died."""

    def __init__(self, address: str, device: str, gpu_share: float) -> None:
        try:
            import ray
        except ImportError:
            raise InputError("--ray needs the package ray: pip install 'ray>=2.50,<3'") from None
        self.ray = ray
        if not ray.is_initialized():
            try:
                ray.init(address=address, log_to_driver=False, configure_logging=False)
            except (ConnectionError, ValueError) as error:
                raise InputError(f"there is no Ray cluster at '{address}' ({str(error).splitlines()[0]})") from None
        gpus = 0 if device == "cpu" or (device == "auto" and not ray.cluster_resources().get("GPU")) else gpu_share
        self.execute = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=TRIES)(execute_on_ray)
        self.jobs: dict[Any, Job] = {}

    def has_room(self) -> bool:
        return True

    def start(self, job: Job) -> None:
        self.jobs[self.execute.remote(job.task, str(job.folder.resolve()), job.device)] = job

    def ended(self) -> list[Job]:
        ready, _ = self.ray.wait(list(self.jobs), num_returns=len(self.jobs), timeout=0) if self.jobs else ([], [])
        return [self.jobs.pop(reference) for reference in ready]

    def stop(self) -> None:
        for reference in self.jobs:
            self.ray.cancel(reference)
        self.ray.wait(list(self.jobs), num_returns=len(self.jobs), timeout=30)


def execute_on_ray(task: Task, folder: str, device: str) -> None:
    """Make one run in a Ray worker."""
    import torch

    torch.set_num_threads(1)
    Path(folder).mkdir(parents=True, exist_ok=True)
    execute(task, Path(folder), device)
