"""Run the grid of an experiment, on the cores of this machine or on a Ray cluster, and go on after whatever stopped it.

Every run has a folder, ``runs/<experiment>/<preset>/<run>``, in which it leaves its checkpoints, how far it is
(``progress.json``), by what code it is made (``code.txt``), and in the end ``measured.json``. All that the grid needs
to know is in these files and in the table of results: a grid that was killed goes on by the same command, runs that
were finished are not made again, and two grids at once share the work. The folder must be seen by all machines of a
cluster.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from vaelib import data, files
from vaelib.config import DEVICES
from vaelib.data.files import environment
from vaelib.errors import InputError, choose, positive, whole_number
from vaelib.experiments import EXPERIMENTS, find, results
from vaelib.experiments.experiment import Experiment, Measured, Task
from vaelib.runs import find_device

RUNS = Path("runs")
TRIES = 3
"""How often a run is started whose process died."""
PAUSE = 0.2
"""Seconds between two looks at the runs."""
PATIENCE = 30
"""Seconds that a run has to save and end."""
ANSWER = 5
"""Seconds that a cluster has to answer, and between two times that it is asked whether it is there."""
SILENCE = 20
"""Seconds after which a cluster that does not answer is taken for dead."""
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
    together: bool = False,
    results_folder: str | Path = "results",
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
    together
        make many runs as one, in this process, if the experiment can: the way to fill a GPU.
    results_folder, runs_folder
        where the tables and the runs are.
    progress
        show a bar with the time left.

    Raises
    ------
    InputError
        if there is no such experiment or preset; before the first run, if the table or the folder of runs cannot be
        written or data is not to be had; or if a run failed: all others are finished first.
    KeyboardInterrupt
        after SIGINT, SIGTERM or SIGHUP; the runs under way have saved their checkpoints.
    """
    experiment, table, folder = find(name), Path(results_folder), Path(runs_folder)
    choose("device", device, DEVICES)
    if jobs is not None:
        whole_number("jobs", jobs, least=1)
    positive("gpu_share", gpu_share)
    tasks = experiment.tasks(preset, seeds)
    known = results.finished(experiment, table)
    all_jobs = [Job(task, folder / name / preset / task.name, device) for task in tasks]
    waiting = [job for job in all_jobs if job.task.key not in known]
    failed = {}
    if waiting:
        files.check_writable(results.path_of(experiment, table))
        files.make_folder(folder)
        if not ray:  # whose machines may have what this one has not
            fetch_data([job.task for job in waiting])
    if together:
        make_together(experiment, [job.task for job in waiting], folder / name, device, table)
    elif waiting:
        with interruptible() as listen:
            pool = OnRay(ray, device, gpu_share) if ray else OnThisMachine(jobs or default_jobs(device))
            listen()  # anew, since Ray has handlers of its own
            with tqdm(total=float(len(tasks)), unit="run", disable=not progress, bar_format=BAR) as bar:
                failed = Grid(pool, waiting, table, bar, done=len(tasks) - len(waiting)).finish()
    path = results.path_of(experiment, table)
    lost = put_back(experiment, [job for job in all_jobs if job not in failed], table)
    experiment.gather(preset, [job.folder for job in all_jobs if job.outcome.exists()], table)
    if failed:
        first, why = next(iter(failed.items()))
        others = f"the others are in '{path}', and " if len(failed) + len(lost) < len(tasks) else ""
        raise InputError(
            f"{len(failed)} of {len(tasks)} runs failed, the first in '{first.folder}': {why}; {others}the same "
            "command tries the failed ones again"
        )
    if lost:
        raise InputError(
            f"'{path}' has lost {len(lost)} of {len(tasks)} runs while this command worked, and no folder of theirs "
            "has them either: something else wrote it or removed it; the same command makes them anew"
        )
    return path


def fetch_data(tasks: list[Task]) -> None:
    """Make sure that the data of runs is here, before the first of them; raise InputError as :func:`data.fetch`."""
    for name in dict.fromkeys(task.config.get("data") for task in tasks):
        if name is not None:
            data.fetch(name)


def put_back(experiment: Experiment, jobs: list[Job], table: Path) -> list[Job]:
    """Add what the table has lost meanwhile, as to a program that saved its older copy; return what no folder has."""
    known = results.finished(experiment, table)
    lost = [job for job in jobs if job.task.key not in known]
    for job in lost:
        if job.outcome.exists():
            results.add(experiment, job.task, measured_in(job.outcome, job.task), table)
    return [job for job in lost if not job.outcome.exists()]


def make_together(experiment: Experiment, tasks: list[Task], folder: Path, device: str, table: Path) -> None:
    """Make runs as one, and add each to the table when it is done."""
    if experiment.together is None:
        raise InputError(f"the runs of '{experiment.name}' cannot be made as one: leave out --together")
    place = place_of(experiment, device)

    def add(task: Task, measured: list[Measured], seconds: float) -> None:
        results.add(experiment, task, results.with_provenance(measured, seconds, place), table)

    files.make_folder(folder)
    with interruptible(), files.locked(folder / ".together"):
        experiment.together(tasks, folder, place, add)


BAR = "{desc}{percentage:3.0f}% |{bar}| {n:.1f} of {total:.0f} runs, {elapsed} < {remaining}"


@dataclass(eq=False)
class Job:
    """A task on its way: its folder, where it runs, and how often its process died."""

    task: Task
    folder: Path
    device: str
    deaths: int = 0

    @property
    def outcome(self) -> Path:
        """Where it leaves what it measured."""
        return self.folder / "measured.json"

    @property
    def fraction(self) -> float:
        """How much of it is done."""
        return progress_in(self.folder)["done"]


class Pool(Protocol):
    """Where jobs run."""

    def has_room(self) -> bool:
        """Whether one more job can start."""

    def start(self, job: Job) -> None:
        """Start a job."""

    def ended(self) -> list[tuple[Job, str | None]]:
        """Return the jobs that ended since the last call, with what :func:`execute` said; None if its process died."""

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
                for job, why in self.pool.ended():
                    self.running.remove(job)
                    self.settle(job, why)
                self.show()
                time.sleep(PAUSE)
        except BaseException:
            self.pool.stop()
            raise
        return self.failed

    def settle(self, job: Job, why: str | None) -> None:
        """Put what a job measured into the table; or see to it that it is tried again, or say why not."""
        experiment = find(job.task.experiment)
        if why is None and job.deaths + 1 < TRIES:
            job.deaths += 1
            self.waiting.insert(0, job)
        elif why is None:
            self.failed[job] = f"its process died {TRIES} times"
        elif why == IN_USE:
            self.elsewhere.append(job)
        elif why:
            self.failed[job] = why.splitlines()[-1]
            with suppress(InputError):  # the disk may be full, and that be the reason
                files.write(job.folder / "error.txt", f"{why}\n".encode())
        else:
            try:
                measured = measured_in(job.outcome, job.task)
            except (InputError, OSError) as error:
                self.failed[job] = str(error)
                return
            results.add(experiment, job.task, measured, self.table)
            self.done += 1

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


def execute(task: Task, folder: Path, device: str) -> str:
    """Make one run in its folder, from wherever it was left; return why it has no measured.json in the end, or "".

    Raises
    ------
    KeyboardInterrupt
        if it was asked to stop; its checkpoint is saved.
    """
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    outcome = folder / "measured.json"
    try:
        files.make_folder(folder)
        with files.locked(folder / ".lock"):
            files.sweep(folder)
            (folder / "error.txt").unlink(missing_ok=True)
            if outcome.exists():
                return ""
            start = time.monotonic()
            before = progress_in(folder)["seconds"]  # of earlier starts
            code = code_at(folder)

            def report(fraction: float) -> None:
                nonlocal reported
                if (now := time.monotonic()) - reported >= 1:
                    reported = now
                    files.write_json(folder / "progress.json", {"done": fraction, "seconds": before + now - start})

            reported = start
            experiment = find(task.experiment)
            place = place_of(experiment, device)
            measured = experiment.run(task.config, task.seed, folder, place, report)
            numbers = results.with_provenance(measured, before + time.monotonic() - start, place, code)
            files.write_json(outcome, outcome_of(task, numbers))
            return ""
    except files.InUse:
        return IN_USE
    except InputError as problem:
        return str(problem)
    except OSError as problem:
        return f"{problem.filename or folder}: {problem.strerror or problem}"
    except Exception:
        return traceback.format_exc()[-10_000:]


def outcome_of(task: Task, measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a measured.json holds: whose numbers they are, how many, and the numbers."""
    return {"run": [task.experiment, *task.key], results.COUNT: len(measured), "measured": measured}


def measured_in(path: Path, task: Task) -> list[dict[str, Any]]:
    """Return what a run measured.

    Raises
    ------
    InputError
        if the file says something else, is of another run, lacks numbers or has one twice.
    """
    found, experiment = files.read_json(path) or {}, find(task.experiment)
    measured = found.get("measured")
    if (
        not isinstance(measured, list)
        or not measured
        or not all(map(results.is_measured, measured))
        or found != outcome_of(task, measured)
        or results.fault(results.rows(experiment, task, measured), experiment)
    ):
        raise InputError(
            f"'{path}' is not what this run measured: delete it, and the same command measures again, from the "
            "checkpoint"
        )
    return measured


def code_at(folder: Path) -> str:
    """Return the versions of the code that a run has been made with, the first one first; this one is noted."""
    path, said = folder / "code.txt", []
    with suppress(InputError):
        said = (files.read_text(path) or "").splitlines()
    if said[-1:] != [results.CODE]:
        said.append(results.CODE)
        files.write(path, "\n".join(said).encode())
    return " then ".join(said)


def progress_in(folder: Path) -> dict[str, float]:
    """Return how much of a run is ``done``, from 0 to 1, and its ``seconds`` so far; 0 as long as it does not say."""
    found = {}
    with suppress(InputError):
        found = files.read_json(folder / "progress.json") or {}
    most = {"done": 1.0, "seconds": 1e9}
    numbers = {name: found[name] for name in most if isinstance(found.get(name), float)}
    return {name: numbers[name] if 0 <= numbers.get(name, -1) <= high else 0.0 for name, high in most.items()}


# --- where runs run ---------------------------------------------------------------------------------------------------


def place_of(experiment: Experiment, device: str) -> str:
    """Return the kind of device that runs of an experiment are made on where ``device`` is asked for."""
    asked_for = find_device(device).type
    return "cpu" if experiment.on_cpu else asked_for


def default_jobs(device: str) -> int:
    """Return one job for each core that this process may use, or one for the GPU."""
    if find_device(device).type == "cuda":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class OnThisMachine:
    """A process for each run, with one thread; ``jobs`` at a time."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.processes: dict[Job, tuple[Any, Any]] = {}
        how = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self.context = multiprocessing.get_context(how)
        if how == "forkserver":
            modules = {f"vaelib.experiments.{module}" for module in ("grid", *EXPERIMENTS.values())}
            self.context.set_forkserver_preload([*sorted(modules), *SLOW_IMPORTS])

    def has_room(self) -> bool:
        return len(self.processes) < self.jobs

    def start(self, job: Job) -> None:
        receiver, sender = self.context.Pipe(duplex=False)
        arguments = (sender, job.task, job.folder, job.device)
        process = self.context.Process(target=in_own_process, args=arguments, daemon=True)
        resource_tracker.ensure_running()  # which lets interrupts through again
        with deaf_to_interrupts():  # and so is the fork server, which this starts
            try:
                process.start()
            except (EOFError, ConnectionError) as error:
                raise InputError(
                    "the process from which the runs are started died (killed, perhaps for want of memory): the same "
                    "command goes on from the checkpoints"
                ) from error
            except OSError as error:
                if "AF_UNIX" not in str(error):
                    raise
                raise InputError("the folder of temporary files has too long a path: set TMPDIR to another") from error
        sender.close()
        self.processes[job] = process, receiver

    def ended(self) -> list[tuple[Job, str | None]]:
        gone = [job for job, (process, _) in self.processes.items() if not process.is_alive()]
        return [(job, self.last_word(*self.processes.pop(job))) for job in gone]

    @staticmethod
    def last_word(process: Any, receiver: Any) -> str | None:
        """Return what a process that ended sent; None if it did not come to that."""
        process.join()
        with receiver:
            try:
                return receiver.recv() if receiver.poll() else None
            except EOFError:
                return None

    def stop(self) -> None:
        for process, _ in self.processes.values():
            process.terminate()
            if hasattr(signal, "SIGCONT"):  # one that was stopped does not hear it
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGCONT)
        end = time.monotonic() + PATIENCE
        for process, _ in self.processes.values():
            process.join(max(0, end - time.monotonic()))
            process.kill()
            process.join()


def in_own_process(sender: Any, task: Task, folder: Path, device: str) -> None:
    """Make one run in a process of its own, which ends when the grid's does, and send what :func:`execute` says."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # the terminal's Ctrl-C is for the grid, which passes it on once
    threading.Thread(target=end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a process that is killed leaves
    try:
        sender.send(execute(task, folder, device))
    except (KeyboardInterrupt, BrokenPipeError):  # asked to stop, or nobody is there any more
        sys.exit(130)


def end_with_parent() -> None:
    """Ask this process to stop when the grid's process is gone."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Hold SIGINT back; processes that are started here do not hear it for good."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Let SIGTERM and SIGHUP interrupt as Ctrl-C does, unless they are ignored; what is given sets that again."""
    numbers = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None))]
    before = {number: handler for number in numbers if (handler := signal.getsignal(number)) != signal.SIG_IGN}
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        before = {}

    def listen() -> None:
        for number in before:
            signal.signal(number, signal.default_int_handler)

    listen()
    try:
        yield listen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class OnRay:
    """A Ray task for each run; the cluster decides where."""

    def __init__(self, address: str, device: str, gpu_share: float) -> None:
        try:
            import ray
        except ImportError:
            raise InputError("--ray needs the package ray: pip install 'ray>=2.50,<3'") from None
        self.ray = ray
        if not ray.is_initialized():
            try:
                if address != "local":
                    check_answers(address)
                ray.init(address=address, log_to_driver=False, configure_logging=False)
            except (ConnectionError, OSError, ValueError) as error:
                raise InputError(
                    f"there is no Ray cluster at '{address}' ({str(error).partition(chr(10))[0]})"
                ) from None
        gpus = 0 if device == "cpu" or (device == "auto" and not ray.cluster_resources().get("GPU")) else gpu_share
        self.address = address if address.startswith("ray://") else ray.get_runtime_context().gcs_address
        self.heard = time.monotonic()
        self.execute = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(execute_on_ray)
        self.jobs: dict[Any, Job] = {}

    def has_room(self) -> bool:
        return True

    def start(self, job: Job) -> None:
        reference = self.execute.remote(environment(), job.task, str(job.folder.resolve()), job.device)
        self.jobs[reference] = job

    def ended(self) -> list[tuple[Job, str | None]]:
        self.listen()
        ready, _ = self.ray.wait(list(self.jobs), num_returns=len(self.jobs), timeout=0) if self.jobs else ([], [])
        return [(self.jobs.pop(reference), self.last_word(reference)) for reference in ready]

    def last_word(self, reference: Any) -> str | None:
        """Return what a task returned or raised; None if its process or its machine died."""
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            return str(error)
        except self.ray.exceptions.RayError:
            return None

    def listen(self) -> None:
        """Raise InputError if the cluster has been silent for a while; Ray itself would kill this process, later."""
        try:
            if time.monotonic() - self.heard > ANSWER:
                check_answers(self.address)
                self.heard = time.monotonic()
        except OSError as error:
            if time.monotonic() - self.heard > SILENCE:
                self.jobs = {}
                atexit.unregister(self.ray.shutdown)
                raise InputError(
                    f"the Ray cluster at '{self.address}' does not answer any more ({error}): "
                    "when it is up again, the same command goes on from the checkpoints"
                ) from None

    def stop(self) -> None:
        if not self.jobs:
            return
        for reference in self.jobs:
            self.ray.cancel(reference)
        self.ray.wait(list(self.jobs), num_returns=len(self.jobs), timeout=PATIENCE)


def check_answers(address: str) -> None:
    """Raise an error unless something at a Ray address speaks HTTP/2, as clusters do; Ray itself waits for minutes."""
    from ray._private.services import canonicalize_bootstrap_address_or_die

    place = address.removeprefix("ray://")
    place = place if place != address else canonicalize_bootstrap_address_or_die(address)
    host, _, port = place.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER) as probe:
        probe.settimeout(ANSWER)
        probe.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))  # no settings
        if probe.recv(9)[3:4] != b"\4" and os.environ.get("RAY_USE_TLS", "0") == "0":
            raise ConnectionError("what listens there is none")


def execute_on_ray(folders: dict[str, str], task: Task, folder: str, device: str) -> str:
    """Make one run in a Ray worker, with the data folders of the grid."""
    os.environ.update(folders)
    return execute(task, Path(folder), device)
