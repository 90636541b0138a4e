"""Runs on disk: a folder that holds a training, survives being killed at any moment, and goes on bit for bit.

======================  ============================================================================================
``config.json``         the :class:`vaelib.config.Config`; written first
``checkpoint.pt``       the state of the :class:`vaelib.training.Trainer`, at the end of each epoch and now and then
``metrics.jsonl``       the history in that state, one JSON object an epoch, for people and plots
``result.json``         what the finished training gave, and its evaluation
======================  ============================================================================================

Every file is written whole or not at all, and everything follows from ``config.json`` and ``checkpoint.pt``: whatever
else a kill leaves behind is put right when the run is taken up again.
"""

from __future__ import annotations

import io
import json
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaelib import __version__, data, evaluation, models, objectives
from vaelib.bounds import BOUNDS
from vaelib.config import Config
from vaelib.errors import whole_number
from vaelib.data import Images
from vaelib.data.files import whole
from vaelib.errors import InputError
from vaelib.estimators import every
from vaelib.posteriors import Mixture
from vaelib.training import Diverged, Trainer, stream

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder are not noticed
    fcntl = None

FORMAT = 1
"""Of ``checkpoint.pt``; raised whenever a reader of the old format would go wrong."""

FREE = {"epochs", "device", "checkpoint_seconds", "compile"}
"""What may change when a run is taken up again: none of it alters the steps that are done."""


class InUse(InputError):
    """Another process works in the folder of a run."""


@dataclass(frozen=True)
class Folder:
    """The paths in a run's folder."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> Path:
        return self.path / "result.json"


def train(
    run_dir: str | Path,
    config: Config,
    progress: bool = False,
    report: Callable[[float], None] = lambda fraction: None,
) -> dict[str, Any]:
    """Train what ``config`` says in the folder ``run_dir``, from its checkpoint if it has one; return ``result.json``.

    A run that was stopped, even by SIGKILL, ends where an uninterrupted one ends, bit for bit, on the same machine
    with the same number of threads. More epochs than last time go on from there. SIGINT and SIGTERM save first.
    ``report`` is told after each step how much of the training is done, from 0 to 1.

    Raises
    ------
    InputError
        if the configuration cannot be trained, the folder belongs to another one or is in use, or a file in it is
        damaged or cannot be written.
    Diverged
        if the bound is not finite; it names the step and the last good checkpoint.
    KeyboardInterrupt
        after SIGINT or SIGTERM; the message says how to go on.
    """
    folder = Folder(Path(run_dir))
    trainer = build(config, load_images(config))
    with in_use(folder), noticed(signal.SIGINT, signal.SIGTERM) as stop:
        stored = read_config(folder.config)
        if stored is not None:
            check_same(stored, config, folder)
        if folder.checkpoint.exists():
            if stored is None:
                raise InputError(f"'{run_dir}' has a checkpoint.pt but no config.json: choose another folder")
            restore(trainer, folder.checkpoint)
        if trainer.step < trainer.total_steps:
            folder.result.unlink(missing_ok=True)
        write_json(folder.config, asdict(config))
        write_metrics(folder.metrics, trainer)
        saved, due = trainer.step, time.monotonic() + config.checkpoint_seconds

        def after_step() -> None:
            nonlocal saved, due
            epoch_ends = trainer.step % trainer.steps_per_epoch == 0
            if epoch_ends or stop or time.monotonic() >= due:
                save(trainer, folder.checkpoint)
                saved, due = trainer.step, time.monotonic() + config.checkpoint_seconds
            if epoch_ends:
                write_metrics(folder.metrics, trainer)
            report(trainer.step / trainer.total_steps)
            if stop and trainer.step < trainer.total_steps:
                raise KeyboardInterrupt(
                    f"stopped after step {trainer.step} of {trainer.total_steps}, with a checkpoint; "
                    f"go on with: vaelib train {run_dir}"
                )

        try:
            trainer.run(after_step, progress)
        except Diverged as error:
            good = f"is '{folder.checkpoint}', after step {saved}" if saved else "is none: it did not get that far"
            raise Diverged(f"{error}; the last good checkpoint {good}") from None
        known = read_json(folder.result) if folder.result.exists() else {}
        if "training" not in known:
            known["training"] = {**trainer.history[-1], **provenance(trainer)}
            write_json(folder.result, known)
        return known


def evaluate(
    run_dir: str | Path,
    samples: int = 5000,
    chunk: int = 20,
    limit: int | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    r"""Estimate log p(x) of the test images under the model trained in ``run_dir``; add it to its ``result.json``.

    Parameters
    ----------
    samples, chunk
        importance samples an image, and how many of them at a time.
    limit
        take the first ``limit`` test images alone.
    seed
        of the noise, and of the binarisation if that is dynamic: the same seed, the same images.

    Returns
    -------
    dict
        ``nll``, the mean of :math:`-\log p(x)` in nats; ``nll_error``, its standard error over the images;
        ``sampling_error``, the part of that error which more samples would remove; ``bound``, the estimator's bound at
        its K; ``active_units``, one number a stochastic layer; ``mind``, what must be said of the data; and what all
        this was computed from.

    Raises
    ------
    InputError
        if there is no run in the folder, it is in use or damaged, or an argument is out of range.
    """
    folder = Folder(Path(run_dir))
    if limit is not None:
        whole_number("limit", limit, least=2)
    whole_number("seed", seed, least=0)
    config = read_config(folder.config)
    if config is None or not folder.checkpoint.exists():
        raise InputError(f"there is no trained model in '{run_dir}': make one with `vaelib train {run_dir}`")
    config = replace(config, device=device)
    with in_use(folder):
        images = load_images(config)
        trainer = build(config, images)
        restore(trainer, folder.checkpoint)
        model, device = trainer.model.eval(), images.test.grey.device
        x = images.test.batch(slice(0, limit), stream("test", seed, device))
        noise = stream("noise", seed, device)
        values, errors = evaluation.log_likelihood(
            model, x, samples, chunk, noise, return_standard_error=True, progress=progress
        )
        if not values.isfinite().all():
            raise InputError(f"log p(x) is not finite for {int((~values.isfinite()).sum())} of {len(x)} test images")
        nll, nll_error = evaluation.mean_and_standard_error(-values)
        found = {
            "nll": nll,
            "nll_error": nll_error,
            "sampling_error": errors.square().sum().sqrt().item() / len(x),
            "bound": mean_bound(trainer, x, noise),
            "active_units": evaluation.active_units(model.encoder, x),
            "images": len(x),
            "samples": samples,
            "seed": seed,
            "step": trainer.step,
            "mind": images.note,
            **provenance(trainer),
        }
        known = read_json(folder.result) if folder.result.exists() else {}
        write_json(folder.result, {**known, "evaluation": found})
    return found


@torch.no_grad()
def mean_bound(trainer: Trainer, x: Tensor, noise: torch.Generator) -> float:
    """Return the estimator's bound at its K, in nats, averaged over ``x`` ``[N, D]``."""
    model, total = trainer.model, 0.0
    for batch in x.split(500):
        q, eps = model.encoder(batch), model.encoder.noise(trainer.recipe.k, batch, noise)
        if isinstance(q, Mixture):
            bound = objectives.mixture_bound(trainer.estimator, model.joint, q, batch, eps)
        else:
            z = q.sample(eps)
            bound = BOUNDS[trainer.estimator.bound](model.joint(batch, z) - q.log_prob(z))
        total += bound.double().sum().item()
    return total / len(x)


def find_device(name: str) -> torch.device:
    """Return the device that ``name`` ("cpu", "cuda" or "auto") means on this machine."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device is 'cuda', but torch finds no CUDA GPU on this machine: use cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def load_images(config: Config) -> Images:
    """Return the data of a run, on its device."""
    device = find_device(config.device)
    return data.load(config.data, config.binarisation).to(device)


def build(config: Config, images: Images) -> Trainer:
    """Return the run that ``config`` means, before its first step."""
    split = images.train
    weights = stream("init", config.seed)
    model = models.build(config.model, split.grey.shape[1], split.grey.mean(0).cpu(), weights, **config.sizes)
    return Trainer(model.to(split.grey.device), split, every()[config.estimator], config, config.compile)


def provenance(trainer: Trainer) -> dict[str, Any]:
    """Return what a figure depends on besides the configuration."""
    device = trainer.split.grey.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "vaelib": __version__,
    }


@contextmanager
def in_use(folder: Folder) -> Iterator[None]:
    """Make the folder, keep every other process out of it, and sweep up what a killed one left."""
    if folder.path.exists() and not folder.path.is_dir():
        raise InputError(f"'{folder.path}' is a file, but a run needs a folder: choose another name")
    folder.path.mkdir(parents=True, exist_ok=True)
    with open(folder.path / ".lock", "a") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InUse(
                    f"another process works in '{folder.path}': wait for it, or choose another folder"
                ) from None
        for stray in folder.path.glob(".*.part"):
            stray.unlink()
        yield


@contextmanager
def noticed(*signals: int) -> Iterator[list[int]]:
    """Collect the first of ``signals`` in a list instead of dying of it; a second one interrupts at once."""
    arrived: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if arrived:
            raise KeyboardInterrupt(f"interrupted by signal {number}, not saved")
        arrived.append(number)

    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield arrived
        return
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield arrived
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def save(trainer: Trainer, path: Path) -> None:
    """Write the checkpoint of ``trainer``; if it cannot be written, the one before it stays."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **trainer.state_dict()}, buffer)
    write(path, buffer.getbuffer())


def restore(trainer: Trainer, path: Path) -> None:
    """Put ``trainer`` where the checkpoint at ``path`` is.

    Raises
    ------
    InputError
        if the file is damaged, of another format, or of a longer training than asked for.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        version = state["format"]
    except OSError:
        raise
    except Exception as error:  # whatever zipfile, pickle and torch find wrong with it
        raise InputError(
            f"'{path}' is cut or altered, or no checkpoint ({str(error).splitlines()[0]}): "
            "put a whole copy in its place, or train anew in another folder; nothing was changed"
        ) from error
    if version != FORMAT:
        raise InputError(
            f"'{path}' has format {version!r}, but vaelib {__version__} reads format {FORMAT}: "
            "use the version of vaelib that wrote it, or train anew in another folder"
        )
    try:
        trainer.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"'{path}' is not a checkpoint of this run's model and data ({error})") from error
    if trainer.step > trainer.total_steps:
        done = trainer.step / trainer.steps_per_epoch
        raise InputError(
            f"'{path}' has done {done:g} epochs, but only {trainer.recipe.epochs} are asked for: ask for more"
        )


def read_config(path: Path) -> Config | None:
    """Return the configuration that the file ``path`` holds; None if there is no such file.

    Raises
    ------
    InputError
        if the file is not the record of a run.
    """
    try:
        options = read_json(path)
        if unknown := set(options) - {entry.name for entry in fields(Config)}:
            raise InputError(f"it has the unknown key '{min(unknown)}'")
        return Config(**options)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:  # InputError is a ValueError
        raise InputError(f"'{path}' is not the record of a run ({error}): choose another folder") from error


def check_same(stored: Config, asked: Config, folder: Folder) -> None:
    """Raise InputError, naming every difference, if ``asked`` is not the run that ``folder`` holds."""
    old, new = asdict(stored), asdict(asked)
    differences = [
        f"{name} is {old[name]!r} there and {new[name]!r} here"
        for name in old
        if name not in FREE and old[name] != new[name]
    ]
    if differences:
        raise InputError(
            f"'{folder.path}' belongs to another configuration ({'; '.join(differences)}): "
            "leave these options out to go on with that run, or choose another folder"
        )


def write(path: Path, content: bytes | memoryview) -> None:
    """Write ``content`` to ``path``, whole or not at all."""
    try:
        with whole(path) as part:
            part.write_bytes(content)
    except OSError as error:
        raise InputError(
            f"'{path}' could not be written ({error.strerror}); what was there before is whole: "
            "make room, then run the same command again to go on"
        ) from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    write(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"'{path}' is not JSON ({error}): delete it, or put a whole copy in its place") from error


def write_metrics(path: Path, trainer: Trainer) -> None:
    """Write the history, one JSON object a line. Whatever is not in the checkpoint is so cut off on resuming."""
    write(path, "".join(json.dumps(record) + "\n" for record in trainer.history).encode())
