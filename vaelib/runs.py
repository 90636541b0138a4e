"""Runs on disk: a folder that holds a training, survives being killed at any moment, and goes on bit for bit.

======================  ============================================================================================
``config.json``         the :class:`vaelib.config.Config`; written first
``checkpoint.pt``       the record of the :class:`vaelib.training.Training`, after each epoch and now and then
``metrics.jsonl``       the history in that state, one JSON object an epoch, for people and plots
``result.json``         what the finished training gave, and its evaluation
``sources.json``        the SHA-256 of data and model of one's own, and of what its file imports from beside it
``model.py``            a copy of the file of such a model: a record, which is never run
``tensorboard/``        the curves, if it is asked for
======================  ============================================================================================

Every file is written whole or not at all, and everything follows from ``config.json`` and ``checkpoint.pt``: whatever
else a kill leaves behind is put right when the run is taken up again.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import signal
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from os.path import lexists
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaelib import __version__, data, evaluation, models
from vaelib.config import DEVICES, Config, Recipe
from vaelib.data import Images, Text
from vaelib.errors import InputError, choose, enough_memory, typed, whole_number
from vaelib.files import Lock, in_shell, locked, make_folder, read, read_json, sweep, write, write_json
from vaelib.posteriors import as_posterior, redefines_half
from vaelib.training import UNRECORDED, Diverged, HeldOut, Training, check_repeats, mean_bound, stream, world

FORMAT = 2
"""Of ``checkpoint.pt``; raised whenever a reader of the old format would go wrong."""

END = 22
"""Bytes of the record with which a zip archive ends, see the specification APPNOTE.TXT, 4.3.16."""

ALIKE = 1e-3
"""The relative difference of losses up to which a model is the same: TF32, which some GPUs multiply in, makes less."""

LSTM = "lstm"
"""The model for sentences."""

READ_BY = {1: "0.1.0"}
"""The last version of vaelib that reads an older format."""

ALWAYS = ("data", "model", "estimator", "k", "epochs", "lr", "seed")
"""What each ``config.json`` says, also one of before other options existed."""

RESULT = {
    "training": {"epoch": int, "step": int, "bound": float, "held_out": float, "seconds": float, "device": str},
    "evaluation": {"step": int},
}
"""What the parts of ``result.json`` must say, as far as it is read again; "held_out" only where it was measured."""

SETTINGS = Config.__dataclass_fields__

RECIPE = Recipe.__dataclass_fields__.keys()
"""What every checkpoint says of its run."""

FREE = {"epochs", "patience", "log", "device", "checkpoint_seconds", "compile"}
"""What may change when a run is taken up again: none of it alters the steps that are done."""

MADE = "data made here"
"""What ``sources.json`` calls a data set with a name whose file was made on this machine."""

WRITTEN = (
    "checkpoint.pt", "metrics.jsonl", "result.json", "sources.json", "model.py", "tensorboard", "report.html",
    "advice.json", "advice.png",
)  # fmt: skip
"""What the commands write into a run's folder, besides config.json."""


@dataclass(frozen=True)
class Folder:
    """The paths in a run's folder; if it is locked, as long as that folder is there."""

    path: Path
    lock: Lock | None = None

    def file(self, name: str) -> Path:
        """Return the path of a file; raise InputError if another folder has come into the place of the locked one."""
        if self.lock:
            self.lock.check()
        return self.path / name

    @property
    def config(self) -> Path:
        return self.file("config.json")

    @property
    def checkpoint(self) -> Path:
        return self.file("checkpoint.pt")

    @property
    def metrics(self) -> Path:
        return self.file("metrics.jsonl")

    @property
    def result(self) -> Path:
        return self.file("result.json")

    @property
    def sources(self) -> Path:
        return self.file("sources.json")

    @property
    def model(self) -> Path:
        return self.file("model.py")


def train(
    run_dir: str | Path,
    config: Config,
    progress: bool = False,
    report: Callable[[float], None] = lambda fraction: None,
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Train what ``config`` says in the folder ``run_dir``, from its checkpoint if it has one; return ``result.json``.

    A run that was stopped, even by SIGKILL, ends where an uninterrupted one ends, bit for bit, on the same machine
    with the same number of threads. More epochs than last time go on from there. SIGINT and SIGTERM save first.
    ``report`` is told after each step how much of the training is done, from 0 to 1; ``say`` what was decided for the
    configuration.

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
    folder = Folder(named(run_dir))
    config = replace(config, data=data.absolute(config.data), model=models.own.absolute(config.model))
    check_place(config, folder)
    images = load_images(config)
    training = build(config, images)
    if seen(images, training) is not images:
        chosen = f"{typed('binarisation')} {training.split.binarisation}"
        say(f"{chosen}, since the likelihood of {config.model} is Bernoulli and these images are not black and white")
    with in_use(folder) as folder:
        stored = read_config(folder.config)
        if stored is not None:
            check_same(stored, config, folder, training.sources)
        elif (strange := [name for name in WRITTEN if lexists(folder.file(name))]) and "checkpoint.pt" not in strange:
            raise InputError(f"'{run_dir}' has a {strange[0]} but no config.json: choose another folder")
        known = read_result(folder.result)
        restore_own(training, config, folder)
        if "evaluation" in known and not (training.over and known["evaluation"]["step"] == training.step):
            warnings.warn(
                f"the evaluation in '{folder.result}', of step {known['evaluation']['step']}, is left out once this "
                "run has gone on: keep a copy of that file, or evaluate anew then",
                stacklevel=2,
            )
        log = tensorboard(folder, training) if config.log else lambda training: None
        write_json(folder.config, asdict(config))
        write_sources(training, config, folder)
        write_metrics(folder.metrics, training)

        def after_step(training: Training) -> None:
            report(training.progress.done)
            log(training)

        if "model" in training.sources and not training.step:
            check_kept(training, record(training), folder.checkpoint)  # told before anything is learnt
            weights(training.model)  # and so is what cannot be told from others
            check_repeats(training)
        try:
            go_on(training, folder, config.checkpoint_seconds, after_step, progress)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(f"{stop}; go on with: vaelib train {in_shell(folder.path)}") from None
        known = {name: found for name, found in of(training, known, folder).items() if found["step"] == training.step}
        if "training" not in known:
            known["training"] = {**training.history[-1], **provenance(training)}
            write_json(folder.result, known)
        return known


def go_on(
    training: Training,
    folder: Folder,
    seconds: float = 60.0,
    after_step: Callable[[Training], None] = lambda training: None,
    progress: bool = False,
) -> None:
    """Train to the end, with a checkpoint and the history in ``folder`` after each epoch, and now and then.

    Parameters
    ----------
    training
        from where it stands; :func:`restore` puts it where a checkpoint is.
    seconds
        the longest time between two checkpoints.
    after_step
        called with the training after each step, before what is then saved.

    Raises
    ------
    Diverged
        if the bound is not finite; it names the step and the last good checkpoint.
    KeyboardInterrupt
        after SIGINT or SIGTERM, once a checkpoint stands.
    """
    saved, due = training.step, time.monotonic() + seconds

    def keep(training: Training) -> None:
        nonlocal saved, due
        after_step(training)
        if training.epoch_ends or stop or time.monotonic() >= due:
            save(training, folder)
            saved, due = training.step, time.monotonic() + seconds
        if training.epoch_ends:
            write_metrics(folder.metrics, training)
        if stop and not training.over:
            raise KeyboardInterrupt(f"stopped after step {training.step} of {training.total_steps}, with a checkpoint")

    with noticed(signal.SIGINT, signal.SIGTERM) as stop:
        try:
            training.run(keep, progress)
        except Diverged as error:
            good = f"is '{folder.checkpoint}', after step {saved}" if saved else "is none: it did not get that far"
            raise Diverged(f"{error}; the last good checkpoint {good}") from None


@dataclass(frozen=True)
class Run:
    """A trained model and where it comes from.

    Attributes
    ----------
    model
        in evaluation mode.
    config
        what it was trained by.
    history
        one record an epoch, see :class:`vaelib.training.Training`.
    data
        the data set it was trained on.
    """

    model: torch.nn.Module
    config: Config
    history: list[dict[str, Any]]
    data: Images | Text

    @torch.no_grad()
    def reconstruct(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return what the model makes of ``x`` ``[B, ...]`` through a draw of z: pixels' means, or tokens.

        A mixture's components count by their weights. The draw is the same each time unless there is a ``generator``.
        """
        generator = generator or torch.Generator(x.device).manual_seed(0)
        q = as_posterior(self.model.encoder(x))
        made = self._joint.generate(q.sample(q.noise(q.strata, generator)), generator)
        return made[0] if q.strata == 1 else (q.log_share(q.strata).exp().unsqueeze(-1) * made).mean(0)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Return ``n`` observations of the model's own, for z drawn from its prior: pixels' means, or tokens."""
        whole_number("n", n, least=1)
        kind = type(self._joint)
        if redefines_half(kind, "log_prior", "sample_prior"):
            raise InputError(
                f"this {kind.__name__} redefines log_prior, but its sample_prior is that of the class it comes from, "
                "which draws from another prior: redefine sample_prior too"
            )
        x = self.data.train.batch(slice(0, 1), stream("test", 0, next(self.model.parameters()).device))
        generator = generator or torch.Generator(x.device).manual_seed(0)
        q = as_posterior(self.model.encoder(x))
        eps = q.noise(q.at_least(n), generator)  # of the prior too
        return self._joint.generate(self._joint.sample_prior(eps), generator).flatten(0, 1)[:n]

    @torch.no_grad()
    def embed(self, x: Tensor) -> Tensor:
        """Return where the encoder puts ``x`` ``[B, ...]``: q's means, layers side by side, ``[B, D]``."""
        return torch.cat(as_posterior(self.model.encoder(x)).means(), -1)

    @property
    def _joint(self) -> Any:
        joint = self.model.joint
        if missing := [name for name in ("sample_prior", "generate") if not hasattr(joint, name)]:
            raise InputError(
                f"this joint, a {type(joint).__name__}, has no {' and no '.join(missing)}: build it as "
                "models.Joint(decode), whose decode(z) returns a likelihood, or give it these methods"
            )
        return joint


def load(run_dir: str | Path | Folder, device: str = "auto") -> Run:
    """Return the run in a folder that ``vaelib train`` made, as its checkpoint holds it.

    Raises
    ------
    InputError
        if there is none, or it is damaged.
    """
    training, images = trained(run_dir if isinstance(run_dir, Folder) else Folder(named(run_dir)), device)
    return Run(training.model, training.recipe, training.history, images)


def trained(folder: Folder, device: str) -> tuple[Training, Images]:
    """Return the training in a folder, its model in evaluation mode, and its data."""
    config = read_config(folder.config)
    command = f"vaelib train {in_shell(folder.path)}"
    if not lexists(folder.checkpoint):
        raise InputError(f"there is no trained model in '{folder.path}': make one with `{command}`")
    if config is None:
        raise InputError(
            f"'{folder.path}' has a checkpoint but no config.json: put that back, or give `{command}` the options that "
            "it was trained by, and it is written anew"
        )
    config = replace(config, device=device)
    check_place(config, folder)
    images = load_images(config)
    training = build(config, images)
    restore_own(training, config, folder)
    training.model.eval()
    return training, seen(images, training)


def evaluate(
    run_dir: str | Path,
    samples: int = 5000,
    chunk: int = 20,
    limit: int | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
    show: Callable[[dict[str, Any]], None] = lambda found: None,
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
    show
        is given what is returned before anything is written, so that a full disk loses no computation; what is found
        is written even if this fails.

    Returns
    -------
    dict
        ``nll``, the mean of :math:`-\log p(x)` in nats; ``nll_error``, its standard error over the images;
        ``sampling_error``, the part of that error which more samples would remove; ``bound``, the estimator's bound at
        its K; ``active_units``, one number a stochastic layer; ``mind``, what must be said of the data; and what all
        this was computed from. The error of a single image, or sample, is None.

    Raises
    ------
    InputError
        if there is no run in the folder, it is in use or damaged, or an argument is out of range.
    """
    if limit is not None:
        whole_number("limit", limit, least=2)
    whole_number("seed", seed, least=0, most=2**63 - 1)
    with at_rest(run_dir) as folder, enough_memory("chunk", "limit"):
        known = read_result(folder.result)
        training, images = trained(folder, device)
        known = of(training, known, folder)
        found = measure(training, images, samples, chunk, limit, seed, progress)
        try:
            show(found)
        finally:
            write_json(folder.result, {**known, "evaluation": found})
    return found


def measure(
    training: Training,
    images: Images,
    samples: int = 5000,
    chunk: int = 20,
    limit: int | None = None,
    seed: int = 0,
    progress: bool = False,
    batch_size: int = 100,
) -> dict[str, Any]:
    """Return what :func:`evaluate` does, of a training in memory and its data, ``batch_size`` images at a time."""
    model, device = training.model, training.device
    x = images.test.batch(slice(0, limit), stream("test", seed, device))
    noise, active = stream("noise", seed, device), evaluation.active_units(model.encoder, x)
    values, errors = evaluation.log_likelihood(
        model, x, samples, chunk, noise, batch_size=batch_size, return_standard_error=True, progress=progress
    )
    if not values.isfinite().all():
        raise InputError(f"log p(x) is not finite for {int((~values.isfinite()).sum())} of {len(x)} test images")
    return {
        "nll": -values.mean().item(),
        "nll_error": evaluation.mean_and_standard_error(values)[1] if len(x) > 1 else None,
        "sampling_error": errors.square().sum().sqrt().item() / len(x) if samples > 1 else None,
        "bound": mean_bound(training, x, noise),
        "active_units": active,
        "images": len(x),
        "samples": samples,
        "seed": seed,
        "step": training.step,
        "mind": images.note,
        **provenance(training),
    }


def find_device(name: str) -> torch.device:
    """Return the device that ``name`` ("cpu", "cuda" or "auto") means on this machine."""
    choose("device", name, DEVICES)
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{typed('device')} is 'cuda', but torch finds no CUDA GPU on this machine: use cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def load_images(config: Config) -> Images | Text:
    """Return the data of a run, on its device; with a validation part, if the run wants one."""
    device = find_device(config.device)
    images = data.load(config.data, config.binarisation)
    if config.validate and images.valid is None:
        images = images.hold_out(max(1, len(images.train) // 10))
    return images.to(device)


def build(config: Config, images: Images | Text) -> Training:
    """Return the run that ``config`` means, before its first step.

    Grey images are binarised, drawn anew at every access, for a model that needs it, unless ``config`` says otherwise.
    """
    weights, own = stream("init", config.seed), ":" in config.model
    if not own and isinstance(images, Text) != (config.model == LSTM):
        raise InputError(
            f"model '{config.model}' is for {'sentences' if config.model == LSTM else 'images'}, but '{config.data}' "
            f"has {'sentences' if isinstance(images, Text) else 'images'}: sentences go with --model {LSTM}, images "
            "with the models of `vaelib models`"
        )
    with enough_memory("sizes"):
        if not isinstance(images, Text):
            grey = images.train.grey
            mean = grey.mean(0).cpu()
            model = models.build(config.model, grey.shape[1], mean, weights, images.shape, **config.sizes)
        elif own:  # which finds in its pixels how many words there are
            model = models.build(config.model, len(images.vocabulary), None, weights, **config.sizes)
        else:
            from vaelib.models.text import lstm_vae  # here alone, since few want it

            for size in config.sizes:
                choose(f"size of model '{LSTM}'", size, lstm_vae.__kwdefaults__)
            model = lstm_vae(len(images.vocabulary), weights, **config.sizes)
    if not isinstance(images, Text) and config.binarisation is None and getattr(model, "binary", False):
        if not images.train.black_and_white:
            images = images.map(lambda split: replace(split, binarisation="dynamic"))
    hooks = [HeldOut(images.valid, config.patience)] if config.validate else []
    with models.own.at_home(models.own.file_of(config.model) if own else None):  # what a call imports counts too
        device = find_device(config.device)
        awaken(model, images.train.batch(slice(0, 2), stream("test", 0, device)), config.seed)
        model = model.to(device)
        training = Training(model, images.train, config.estimator, config, hooks, config.compile)
    training.sources, training.shapes = sources(config), shapes(training.model)
    return training


def awaken(model: torch.nn.Module, x: Tensor, seed: int) -> None:
    """Let the layers of a model that are made at their first call, such as LazyLinear, be made now, by ``seed``."""
    if any(map(torch.nn.parameter.is_lazy, model.parameters())):
        x = x.cpu()
        with models.own.seeded(stream("init", seed, step=1)), evaluation.evaluating(model), torch.no_grad():
            q = as_posterior(model.encoder(x))
            model.joint(x, q.sample(q.noise(q.strata)))


def seen(images: Images | Text, training: Training) -> Images | Text:
    """Return the data as the training sees them, whatever it chose for their binarisation."""
    if isinstance(images, Text) or images.train.binarisation == training.split.binarisation:
        return images
    return images.map(lambda split: replace(split, binarisation=training.split.binarisation))


# --- data and models of one's own -------------------------------------------------------------------------------------


def sources(config: Config) -> dict[str, str]:
    """Return the SHA-256 of what nothing here vouches for, and so may change: data, and a model's files."""
    found = {name: hashlib.sha256(source.content).hexdigest() for name, source in code(config).items()}
    if path := data.path_of(config.data):
        return found | {"data": data.own.digest(path)}
    return found | ({MADE: data.own.digest(path)} if (path := data.made(config.data)) else {})


def code(config: Config) -> dict[str, models.own.Source]:
    """Return the files of a model of one's own, see :func:`vaelib.models.own.code`."""
    return models.own.code(config.model) if ":" in config.model else {}


def check_place(config: Config, folder: Folder) -> None:
    """Raise InputError if what a run is of is not where it was, is code inside its folder, or pictures around it.

    Whoever gets a folder with code would run it.
    """
    own = {
        "data": data.path_of(config.data),
        "model": models.own.file_of(config.model) if ":" in config.model else None,
    }
    if lost := [name for name, path in own.items() if path and not path.exists() and lexists(folder.checkpoint)]:
        places = " ".join({"data": "--data PLACE", "model": "--model FILE.py:FUNCTION"}[name] for name in lost)
        raise InputError(
            f"there is no '{own[lost[0]]}', which the run in '{folder.path}' is of: bring it back, or say where it is "
            f"now by `vaelib train {in_shell(folder.path)} {places}`"
        )
    if own["data"] and own["data"].resolve() in folder.path.resolve().parents:
        raise InputError(
            f"the run's folder '{folder.path}' lies inside its data '{own['data']}', where its pictures would be taken "
            "for data: choose, or move it to, a place outside"
        )
    if ":" not in config.model:
        return
    place = config.model.rpartition(":")[0]
    path = own["model"] or Path(place.replace(".", "/"))
    if folder.path.resolve() in path.resolve().parents:
        raise InputError(
            f"the model '{config.model}' lies inside '{folder.path}', and code that comes with a run is not run: look "
            "at it, put it elsewhere, and give its place by --model"
        )


def restore_own(training: Training, config: Config, folder: Folder) -> None:
    """Put ``training`` where its checkpoint is, if data and model of one's own are still those that it is of.

    Raises
    ------
    InputError
        as :func:`restore`, and if the data, a file of the model or one beside it have changed.
    """
    now = training.sources
    then = training.sources = lexists(folder.checkpoint) and read_json(folder.sources) or now
    for name in now:
        if then.get(name, now[name]) != now[name]:
            places = {"data": config.data, MADE: data.made(config.data)}
            file = places[name] if name in places else code(config)[name].path
            before = f" (it was '{folder.model}')" if name == "model" else ""
            raise InputError(
                f"'{file}' has changed since this run began{before}: put it back as it was, or train anew in another "
                "folder"
            )
    restore(training, folder.checkpoint)


def write_sources(training: Training, config: Config, folder: Folder) -> None:
    """Record what is one's own, as it is when the run begins."""
    if training.sources and training.sources != read_json(folder.sources):
        write_json(folder.sources, training.sources)
        if "model" in training.sources:
            write(folder.model, code(config)["model"].content)


def tensorboard(folder: Folder, training: Training) -> Callable[[Training], None]:
    """Return what writes an epoch's numbers for TensorBoard, from where ``training`` stands.

    Raises
    ------
    InputError
        if it is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            f"{typed('log')} tensorboard needs a package that is not here: pip install 'vaelib[tensorboard]'"
        ) from error
    writer = SummaryWriter(str(folder.file("tensorboard")), purge_step=len(training.history) + 1)

    def log(training: Training) -> None:
        if training.epoch_ends:
            folder.file("tensorboard")  # which is opened by its name each time
            record = training.history[-1]
            for name in ("bound", "held_out", "lr"):
                if name in record:
                    writer.add_scalar(name, record[name], record["epoch"])
            writer.flush()

    return log


def provenance(training: Training) -> dict[str, Any]:
    """Return what a figure depends on besides the configuration."""
    device = training.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "vaelib": __version__,
        "weights": weights(training.model),
    }


def weights(model: torch.nn.Module) -> str:
    """Return the beginning of the SHA-256 of all that a model has learnt."""
    learnt = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return short(b"".join(content(name, value.detach().cpu()) for name, value in learnt.items()))


def content(name: str, value: Tensor) -> bytes:
    """Return the bytes of a tensor, of a sparse one those of its indices and values; InputError if it has none."""
    try:
        if value.layout != torch.strided:
            value = value.to_sparse_coo().coalesce()
            return content(name, value.indices()) + content(name, value.values())
        return value.resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    except (RuntimeError, TypeError) as error:
        kind = "nested" if value.is_nested else value.layout
        raise InputError(
            f"'{name}' of the model's state_dict is a tensor ({kind}) that no run can keep: let it be dense or sparse"
        ) from error


def short(content: bytes) -> str:
    """Return as much of a SHA-256 as tells one run from another."""
    return hashlib.sha256(content).hexdigest()[:16]


def named(folder: str | Path) -> Path:
    """Return the path of a folder; an empty name, such as that of an unset variable, is not the folder we are in."""
    if not str(folder).strip():
        raise InputError("the name of the folder is empty: name the folder of the run")
    return Path(folder)


@contextmanager
def at_rest(run_dir: str | Path) -> Iterator[Folder]:
    """Keep every other process out of the folder of a trained run; of one that has none, say so, and make no folder."""
    folder = Folder(named(run_dir))
    if not lexists(folder.checkpoint):
        trained(folder, "cpu")
    with in_use(folder) as folder:
        yield folder


@contextmanager
def in_use(folder: Folder) -> Iterator[Folder]:
    """Make the folder, keep every other process out of it, and sweep up what a killed one left; give it, locked."""
    make_folder(folder.path)
    with locked(folder.path / ".lock") as lock:
        sweep(folder.path)
        yield replace(folder, lock=lock)


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


def save(training: Training, folder: Folder) -> None:
    """Write the checkpoint of ``training``; if it cannot be written, or is not good, the one before it stays.

    Good is one whose parameters are finite, and have a finite bound.
    """
    content = packed(record(training))  # before the folder is looked at, so that it is written at once then
    write(folder.checkpoint, content)


def record(training: Training) -> dict[str, Any]:
    """Return what the checkpoint of ``training`` holds.

    Raises
    ------
    InputError
        if there is something in its model, a hook or the estimator that could not be read again.
    """
    if "model" in training.sources:
        check_shapes(training)
    state = {**training.state(), "history": training.metrics(), "recipe": fixed(training.recipe, training.sources)}
    parts = {f"'{name}' of the model's state_dict": value for name, value in state["model"].items()}
    for name, value in {**parts, "the state of a hook or of the estimator": state["hooks"]}.items():
        try:
            if type(value) is not Tensor:
                unpacked(packed({"value": value}))
        except Exception as error:  # whatever an object of the user's makes of it
            raise InputError(
                f"{name} is a {type(value).__name__} that could not be read again: let it be numbers, words and "
                "tensors, and lists and dicts of them"
            ) from error
    return {**state, "probe": training.probe()} if "model" in training.sources else state


def shapes(model: torch.nn.Module) -> dict[str, str]:
    """Return the shapes and dtypes of the tensors that a model's state is made of."""
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return {name: f"{list(value.shape)} of {value.dtype}" for name, value in state.items() if not value.is_nested}


def check_shapes(training: Training) -> None:
    """Raise InputError if a tensor is of another shape or dtype than was built, which could not be read again.

    Unless the module that it is in has a way of its own to read it.
    """
    then, now, modules = training.shapes, shapes(training.model), dict(training.model.named_modules())
    for name in {**then, **now}:
        was, has = (found.get(name, "not there") for found in (then, now))
        module = modules.get(name.rpartition(".")[0], training.model)
        its_own = type(module)._load_from_state_dict != torch.nn.Module._load_from_state_dict
        if was != has and not its_own and not module._load_state_dict_pre_hooks:
            raise InputError(
                f"'{name}' of the model's state_dict is {has}, but was {was} when the model was built, and so could "
                "not be read again: build it as it will be, or return it from get_extra_state"
            )


def fixed(recipe: Recipe, sources: dict[str, str]) -> dict[str, Any]:
    """Return what of a recipe stays while a run goes on; one's own data and model may come to another place."""
    kept = {name: value for name, value in asdict(recipe).items() if name not in FREE}
    files = {name: digest for name, digest in sources.items() if name != MADE}
    if "data" in files:
        kept["data"] = f"SHA-256 {files.pop('data')[:16]}"
    if files:
        function = kept["model"].rpartition(":")[2]
        kept["model"] = f"{function}, SHA-256 {short(json.dumps(files, sort_keys=True).encode())}"
    return kept


def restore(training: Training, path: Path) -> None:
    """Put ``training`` where the checkpoint at ``path`` is, if there is one.

    Raises
    ------
    InputError
        if the file is damaged, of another format or run, or of a longer training than asked for.
    """
    if (state := read_state(path)) is None:
        return
    now = fixed(training.recipe, training.sources)
    with fitting(path):
        then = dict(state.get("recipe", {}))
    if others := [
        f"its {name} is {then.get(name)!r}, not {now.get(name)!r}"
        for name in [*then, *(now.keys() & RECIPE - then.keys())]
        if name not in then or then[name] != now.get(name)
    ]:
        raise InputError(
            f"'{path}' is a checkpoint of another run ({', '.join(others)}): put the right one, or the right "
            "config.json or data, in its place, or without a config.json that run's options, or train anew elsewhere"
        )
    with fitting(path):
        training.load_state({**state, "history": [json.loads(line) for line in state["history"].splitlines()]})
    check_kept(training, state, path)
    if all(isinstance(hook, HeldOut) for hook in training.hooks):  # the patience may be another now
        training.stopped = training.epoch_ends and any(hook.has_waited(training) for hook in training.hooks)
    if training.step > training.total_steps:
        done = training.step / training.steps_per_epoch
        raise InputError(
            f"'{path}' has done {done:g} epochs, but only {training.recipe.epochs} are asked for: ask for more"
        )


def check_kept(training: Training, state: dict[str, Any], path: Path) -> None:
    """Raise InputError if a model of one's own gives other losses than when its ``state`` was recorded.

    On another kind of device or in another world the noise may be another, and nothing is compared.
    """
    if "probe" not in state or (state["device"], state["world"]) != (training.device.type, world()):
        return
    with fitting(path):
        then, now = state["probe"].to(training.device), training.probe()
        alike = bool((now - then).abs().sum() <= ALIKE * then.abs().sum())
    if not alike:
        raise InputError(
            f"the model gives another loss for the same batch than when it was saved, at step {training.step}: "
            f"{UNRECORDED}, and train anew in another folder"
        )


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Say of whatever a record of another kind does to what reads it that the file is not the one that belongs here."""
    try:
        yield
    except Exception as error:
        raise InputError(
            f"'{path}' is not a checkpoint of this run's model and data ({first_line(error)}): "
            "put a whole copy in its place, or train anew in another folder"
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of what an error says; of one that is a list, its head and its first entry."""
    return str(error).replace(":\n\t", ": ").partition("\n")[0]


def write_state(state: dict[str, Any], path: Path) -> None:
    """Write the record of a training, whole or not at all."""
    write(path, packed(state))


def packed(state: dict[str, Any]) -> memoryview:
    """Return the record of a training as a file has it."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    return buffer.getbuffer()


def unpacked(content: bytes | memoryview) -> dict[str, Any]:
    """Return the record that :func:`packed` made ``content`` of; nothing but numbers, words and tensors is read."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def read_state(path: Path) -> dict[str, Any] | None:
    """Return the record in a file, numbers and words alone; None if there is no such file.

    Raises
    ------
    InputError
        if the file is damaged, or of another format.
    """
    if (content := read(path)) is None:
        return None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:  # torch does not look at the checksums
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
            if archive.infolist()[0].header_offset or content.rfind(b"PK\5\6") + END != len(content):
                raise zipfile.BadZipFile("something was added to it")
        state = unpacked(content)
        version = state["format"]
    except Exception as error:  # whatever zipfile, pickle and torch find wrong with it
        unsafe = isinstance(error, pickle.UnpicklingError)  # torch would say how to load it all the same
        why = "it holds more than numbers and words" if unsafe else first_line(error)
        raise InputError(
            f"'{path}' is cut or altered, or no checkpoint ({why}): "
            "put a whole copy in its place, or delete it to begin anew; nothing was changed"
        ) from error
    if version != FORMAT:
        reader = f"vaelib {READ_BY[version]}" if version in READ_BY else "the version of vaelib that wrote it"
        raise InputError(
            f"'{path}' has format {version!r}, but vaelib {__version__} reads format {FORMAT}: "
            f"use {reader}, or train anew in another folder"
        )
    return state


def read_config(path: Path) -> Config | None:
    """Return the configuration that the file ``path`` holds; None if there is no such file.

    Raises
    ------
    InputError
        if the file is not the record of a run.
    """
    if (options := read_json(path)) is None:
        return None
    try:
        for name in options:
            choose("option", name, SETTINGS)
        config = Config(**options)
        if missing := [name for name in ALWAYS if name not in options]:
            raise InputError(f"it does not say its {', '.join(missing)}")
        return config
    except InputError as error:
        raise InputError(f"'{path}' is not the record of a run ({error}): choose another folder") from error


def read_result(path: Path) -> dict[str, dict[str, Any]]:
    """Return what ``result.json`` holds: "training" and "evaluation", as far as they are there.

    Raises
    ------
    InputError
        if it holds anything else.
    """
    found = read_json(path) or {}
    for name, part in found.items():
        told = {"held_out": 0.0, **part} if name in RESULT and isinstance(part, dict) else {}
        kinds = RESULT.get(name, RESULT["evaluation"])
        if wrong := [key for key, kind in kinds.items() if type(told.get(key)) is not kind]:
            raise InputError(
                f"'{path}' is not the result of a run (no right {', '.join(wrong)} in {name!r}): delete it, or put a "
                "whole copy in its place"
            )
    return found


def of(training: Training, known: dict[str, dict[str, Any]], folder: Folder) -> dict[str, dict[str, Any]]:
    """Return what ``known``, of ``result.json``, says of this run; what another run left is warned of.

    This run's training is one that its history tells of. What does not say of which weights it is goes with that.
    """
    own, told = weights(training.model), known.get("training", {})
    trained = any(told == {**told, **record, "seconds": told.get("seconds")} for record in training.history)

    def is_strange(name: str) -> bool:
        other = known[name].get("weights", own if trained else None) != own
        return (known[name]["step"] == training.step and other) or (name == "training" and not trained)

    if strange := list(filter(is_strange, known)):
        warnings.warn(
            f"'{folder.result}' has the {' and '.join(strange)} of another run or checkpoint: left out", stacklevel=3
        )
    return {name: part for name, part in known.items() if name not in strange}


def check_same(stored: Config, asked: Config, folder: Folder, sources: dict[str, str]) -> None:
    """Raise InputError, naming every difference, if ``asked`` is not the run that ``folder`` holds.

    One's own data and model may lie elsewhere now, if what is there, ``sources``, is the same.
    """
    old, new = asdict(stored), asdict(asked)
    then, now = fixed(stored, read_json(folder.sources) or {}), fixed(asked, sources)
    differences = [
        f"{typed(name)} is {old[name]!r} there and {new[name]!r} here"
        for name in old
        if name not in FREE and old[name] != new[name] and then[name] != now[name]
    ]
    if differences:
        raise InputError(
            f"'{folder.path}' belongs to another configuration ({'; '.join(differences)}): "
            "leave these options out to go on with that run, or choose another folder"
        )


def write_metrics(path: Path, training: Training) -> None:
    """Write the history, one JSON object a line. Whatever is not in the checkpoint is so cut off on resuming."""
    write(path, training.metrics().encode())
