r"""The training loop: a :class:`Training` is a record of all that evolves, and :meth:`Training.run` the loop around it.

What a schedule decides is a function of :class:`Progress`; what depends on the data, such as an aggressive phase, is a
:class:`Hook` with a state of its own. :func:`fit` trains in memory, for a chapter; :func:`vaelib.runs.train` in a
folder, for the command line; :mod:`vaelib.collapse` brings hooks, :mod:`vaelib.stacked` trains many models as one.
"""

from __future__ import annotations

import copy
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from vaelib import estimators, evaluation, fast, objectives, posteriors
from vaelib.config import Recipe
from vaelib.data import Sentences, Split
from vaelib.errors import (
    InputError,
    between,
    choose,
    enough_memory,
    is_finite,
    positive,
    true_or_false,
    typed,
    whole_number,
)
from vaelib.estimators import Estimator
from vaelib.optimizers import RULES, build_optimizer, clip_gradient
from vaelib.posteriors import Latent, map_latent

CHECK_EVERY = 100  # steps between two looks at whether the bounds are finite
AT_ONCE = {"cpu": 10, "cuda": 50}  # steps on end: where they are compiled, and on a GPU, where they are drawn for too
REHEARSALS = 5  # of the first step of a model of one's own; a model that tosses one coin passes once in 16 times
ROUNDING = 1e-5  # the relative difference of two losses that come of the same numbers, on a GPU in another order

# --- schedules --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """How far a training is before its next step; every schedule is a function of this.

    Attributes
    ----------
    step
        steps taken.
    epoch
        passes through the data, with a fraction: 1.5 in the middle of the second one.
    done
        the share of the whole training, from 0 to 1.
    """

    step: int
    epoch: float
    done: float


BURDA_STAGES = 8
BURDA_EPOCHS = tuple(3**i for i in range(BURDA_STAGES))
BURDA_FACTORS = tuple(round(10 ** (1 - i / 7), 1) / 10 for i in range(BURDA_STAGES))


def constant(progress: Progress) -> float:
    """The same learning rate in every epoch."""
    return 1.0


def burda(progress: Progress) -> float:
    r"""Eight stages: stage i has :math:`3^{i-1}` epochs at :math:`10^{-(i-1)/7}` times the rate, two digits of it.

    (Burda et al. 2016.) With lr = 1e-3: 1 epoch at 1e-3, 3 at 7.2e-4, 9 at 5.2e-4, 27 at 3.7e-4 ... 2187 at 1e-4;
    3,280 in all, and 4, 13, 40, 121, 364, 1093 after the stages in between. Beyond, the last rate stays.
    """
    stage = int(np.searchsorted(np.cumsum(BURDA_EPOCHS), int(progress.epoch) + 1))
    return BURDA_FACTORS[min(stage, BURDA_STAGES - 1)]


SCHEDULES: dict[str, Callable[[Progress], float]] = {"constant": constant, "burda": burda}
"""Learning-rate schedules by name: the factor on the learning rate in an epoch."""

# --- randomness -------------------------------------------------------------------------------------------------------

STREAMS = ("init", "order", "binarisation", "noise", "test", "layers")


def stream(name: str, seed: int, device: torch.device | str = "cpu", step: int = 0) -> torch.Generator:
    """Return the generator of one kind of randomness (a name in ``STREAMS``); they do not depend on each other."""
    state = np.random.SeedSequence((seed, STREAMS.index(name), step)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]))


@contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Let layers that draw from torch's global generator, such as dropout, draw from this one; restore the global."""
    device = generator.device
    everywhere = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
    before = everywhere.get_state()
    everywhere.set_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(everywhere.get_state())
        everywhere.set_state(before)


def offspring(generator: torch.Generator) -> torch.Generator:
    """Return a new generator, seeded by a draw from ``generator``."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return torch.Generator(generator.device).manual_seed(seed)


# --- a step -----------------------------------------------------------------------------------------------------------


def gradient(
    model: nn.Module,
    estimator: Estimator,
    x: Tensor,
    eps: Latent | Callable[[Any], Latent],
    clip: float | None = None,
    joint_clip: bool = True,
) -> Tensor:
    """Put the gradient of ``-bound.mean()`` into ``.grad``, where there is none yet, and return the bound, ``[B]``.

    ``eps`` may be what draws it from q. ``clip`` limits the gradient's global norm, or without ``joint_clip`` that of
    encoder and decoder each.
    """
    q = model.encoder(x)
    bound = objectives.backward(estimator, model.joint, q, x, eps(q) if callable(eps) else eps)
    if clip is not None:
        for part in (model,) if joint_clip else (model.joint, model.encoder):
            clip_gradient(part.parameters(), clip)
    return bound


def train_step(
    model: nn.Module,
    estimator: Estimator,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    eps: Latent | Callable[[Any], Latent],
    clip: float | None = None,
    joint_clip: bool = True,
) -> Tensor:
    """Take one step up the bound and return its mean over the batch ``x``, before the step, ``[]``.

    ``eps``, ``clip`` and ``joint_clip`` are as for :func:`gradient`. Introduced in book/01-elbo-forms.ipynb.
    """
    for group in optimizer.param_groups:  # optimizer.zero_grad() but for its record in the profiler, which takes longer
        for p in group["params"]:
            p.grad = None
    bound = gradient(model, estimator, x, eps, clip, joint_clip)
    optimizer.step()
    return bound.mean()


# --- the loop ---------------------------------------------------------------------------------------------------------


class Diverged(InputError):
    """The bound or a parameter is not finite any more."""


class Hook:
    """What goes on in a training besides its steps; each method may be left as it is."""

    update: Callable[[Training, Tensor], Tensor] | None = None
    """``(training, x) -> bound``, ``[]``: learns from a batch in the place of a plain step."""

    order: Callable[[Training], Tensor] | None = None
    """``training -> [N]``: the observations of the coming epoch, in the place of a permutation."""

    def after_epoch(self, training: Training, record: dict[str, Any]) -> None:
        """Look at the training after an epoch; what is put into ``record`` is in the history."""

    def finish(self, training: Training) -> None:
        """Leave the model as it is meant to be after the last step."""

    def state(self) -> Any:
        """Return all that :meth:`load_state` needs to go on: numbers, strings, tensors, and lists and dicts of them."""

    def load_state(self, state: Any) -> None:
        """Go on from ``state``."""


class HeldOut(Hook):
    """The mean bound of a held-out split after each epoch, ``held_out`` in its record.

    Every epoch draws the same noise, and the same pixels where binarisation is dynamic, so that epochs compare.

    Parameters
    ----------
    split
        the observations, on the device of the model.
    patience
        end the training after so many epochs without a higher bound than the best; None to never do.
    """

    def __init__(self, split: Split, patience: int | None = None) -> None:
        self.split, self.patience = split, patience

    def after_epoch(self, training: Training, record: dict[str, Any]) -> None:
        """Measure the bound, and stop if it has not risen for too long."""
        noise = stream("test", training.recipe.seed, training.device)
        with training.undisturbed():
            record["held_out"] = mean_bound(training, self.split.batch(slice(None), noise), noise)
        if not math.isfinite(record["held_out"]):
            raise training.diverged(f"the held-out bound is {record['held_out']} after epoch {record['epoch']}")
        training.stopped |= self.has_waited(training)

    def has_waited(self, training: Training) -> bool:
        """Whether the last ``patience`` epochs had no higher bound than the best before them."""
        bounds = [epoch["held_out"] for epoch in training.history]
        return self.patience is not None and bounds != [] and len(bounds) - 1 - int(np.argmax(bounds)) >= self.patience


def mean_bound(training: Training, x: Tensor, noise: torch.Generator) -> float:
    """Return the bound of K samples that the estimator climbs, in nats, averaged over ``x`` ``[N, D]``."""
    found = evaluation.bound_by_draws(training.model, training.estimator, x, training.recipe.k, noise)
    return found.double().mean().item()


def random_order(training: Training) -> Tensor:
    """Return all observations in a random order, or in the one they have where the recipe says so."""
    count = len(training.split)
    return (
        torch.randperm(count, generator=training.streams["order"]) if training.recipe.shuffle else torch.arange(count)
    )


EVOLVES = ("step", "seconds", "decay", "stopped", "order", "bounds", "history")
"""The plain part of the record, by the names of its attributes."""


class Training:
    """A training, and the record of all that evolves in it, which a checkpoint holds.

    Parameters
    ----------
    model
        with ``joint`` and ``encoder``, and ``binary`` where it wants images of 0 and 1, such as
        :class:`vaelib.models.VAE`; trained in place.
    split
        the training data, on the device of the model.
    estimator
        an estimator or its name; or a function of :class:`Progress` that gives the one for the next step, such as
        ``lambda progress: silent.annealed(row, 1 - progress.done)``. If it has a ``state()``, that is in the record.
    recipe
        how long, how fast, from which seed.
    hooks
        what else goes on; their states are in the record.
    compile
        take the same steps with less overhead (:mod:`vaelib.fast`): a whole step traced as one function, on a GPU many
        captured as one graph; where a hook takes the steps, this changes nothing.

    Attributes
    ----------
    step : int
        steps taken so far.
    seconds : float
        how long they took.
    history : list of dict
        one record an epoch: its number, the steps so far, the mean bound of its steps in nats, the learning rate, the
        seconds of training so far, and what hooks add.
    decay : float
        the factor on the learning rate that hooks have left of it.
    stopped : bool
        whether a hook ended the training before its time.
    sources : dict
        the SHA-256 of what its recipe names by a place on the disk, see :func:`vaelib.runs.sources`.
    shapes : dict
        of the tensors of its model's state when that was built, see :func:`vaelib.runs.shapes`.

    Raises
    ------
    InputError
        if model, data, estimator and recipe do not go together.
    """

    def __init__(
        self,
        model: nn.Module,
        split: Split | Sentences,
        estimator: Estimator | str | Callable[[Progress], Estimator],
        recipe: Recipe,
        hooks: Sequence[Hook] = (),
        compile: bool = False,
    ) -> None:
        if not hasattr(split, "batch"):
            raise InputError(
                f"the data must be a split, but is a {type(split).__name__}: make one by data.Split.of(array)"
            )
        estimator = estimators.get(estimator) if isinstance(estimator, str) else estimator
        self.fixed = isinstance(estimator, Estimator)
        if compile and (not self.fixed or hasattr(estimator, "load_state")):
            raise InputError(
                f"an estimator that changes from step to step cannot be compiled: leave out {typed('compile')}"
            )
        self.model, self.split, self.recipe, self.hooks = model, split, recipe, list(hooks)
        self.schedule = choose("schedule", recipe.schedule, SCHEDULES)
        self.device = next(model.parameters()).device
        self.streams = {
            name: stream(name, recipe.seed, "cpu" if name == "order" else self.device)
            for name in ("order", "binarisation", "noise", "layers")
        }
        self.estimator_at = (lambda progress: estimator) if self.fixed else estimator
        self.estimator = self.estimator_at(Progress(0, 0.0, 0.0))
        check_fit(self)
        self.keepers = [part for part in (*self.hooks, estimator) if hasattr(part, "load_state")]
        self.update = next((hook.update for hook in self.hooks if hook.update), None)
        self.order_by = next((hook.order for hook in self.hooks if hook.order), random_order)
        self.steps_per_epoch = len(split) // recipe.batch_size  # an incomplete batch is left out; every epoch another
        self.step, self.seconds, self.decay, self.stopped = 0, 0.0, 1.0, False
        self.history: list[dict[str, Any]] = []
        self.sources: dict[str, str] = {}
        self.shapes: dict[str, str] = {}
        self.lines: list[str] = []
        self.order = torch.arange(self.steps_per_epoch * recipe.batch_size, device=self.device)
        self.bounds = torch.zeros(self.steps_per_epoch, device=self.device)
        self.compile = compile and self.update is None
        ours = getattr(type(split), "batch", None) is Split.batch  # another may look at the model, or fill one buffer
        self.even = self.fixed and self.update is None and ours  # so that batches may be drawn ahead
        self.noises: dict[Any, Any] = {}
        self.restart_optimizer()

    @property
    def total_steps(self) -> int:
        """Steps after which the recipe's epochs are done."""
        return self.recipe.epochs * self.steps_per_epoch

    @property
    def progress(self) -> Progress:
        """How far the training is."""
        return Progress(self.step, self.step / self.steps_per_epoch, self.step / self.total_steps)

    @property
    def over(self) -> bool:
        """Whether there is no step left to take."""
        return self.stopped or self.step >= self.total_steps

    @property
    def epoch_ends(self) -> bool:
        """Whether the last step was the last one of an epoch."""
        return self.step % self.steps_per_epoch == 0

    def run(self, after_step: Callable[[Training], None] | None = None, progress: bool = False) -> list:
        """Train until the recipe's epochs are done, from wherever :attr:`step` stands; return the history.

        ``after_step(training)`` is called after each step, or after those that are taken on end (:data:`AT_ONCE`).

        Raises
        ------
        Diverged
            if a bound is not finite; it names the first such step.
        """
        start = time.monotonic() - self.seconds
        bar = tqdm(total=self.total_steps, initial=self.step, unit="step", disable=not progress, mininterval=0.5)
        with bar, enough_memory("k", "batch_size", "sizes"):
            while not self.over:
                try:
                    bounds = self.advance()
                except Exception as error:  # such as torch's distributions raise for a parameter that is not a number
                    if all(bool(p.isfinite().all()) for p in self.model.parameters()):
                        raise
                    raise self.diverged(f"a parameter is not finite before step {self.step + 1}") from error
                self.seconds = time.monotonic() - start
                self.note(bounds)
                if self.epoch_ends:
                    bar.set_postfix_str(self.summary())
                if after_step is not None:
                    after_step(self)
                bar.update(len(bounds))
        for hook in self.hooks:
            hook.finish(self)
        return self.history

    @property
    def at_once(self) -> int:
        """How many steps are taken on end: more than one on a GPU, and where they are compiled, not plain ones."""
        traced = self.step and self.whole and self.whole.works
        on_end = self.even and (traced or self.device.type == "cuda")
        return AT_ONCE.get(self.device.type, 1) if on_end else 1

    def advance(self) -> Tensor:
        """Take a step, or several where that is faster; return their bounds, ``[steps, ...]``."""
        if self.epoch_ends:
            self.begin_epoch()
        left = self.steps_per_epoch - self.step % self.steps_per_epoch
        index = self.index(min(self.at_once, left))
        with drawing_from(self.streams["layers"]):
            return self.captured(index) if self.captured and len(index) == self.at_once else self.learn(index)

    def index(self, steps: int) -> Tensor:
        """Return the observations of the next ``steps`` steps, by their numbers, ``[steps, B]``."""
        size = self.recipe.batch_size
        first = self.step % self.steps_per_epoch * size
        return self.order[first : first + steps * size].view(steps, size)

    def learn(self, index: Tensor) -> Tensor:
        """Take steps with the observations ``index`` ``[steps, B]`` and return their mean bounds, ``[steps]``."""
        self.estimator = self.estimator_at(self.progress)
        if self.update:
            return torch.stack([self.update(self, self.split.batch(i, self.streams["binarisation"])) for i in index])
        return self.take(self.batches(index))

    def batches(self, index: Tensor) -> fast.Batches:
        """Draw the observations and the noise of some steps; on a GPU in one go, where asking takes the longest."""
        if self.device.type != "cuda" or len(index) == 1:
            batches = [self.split.batch(row, self.streams["binarisation"]) for row in index]
            return [(x, self.noise(x)) for x in batches]
        x = self.split.batch(index.flatten(), self.streams["binarisation"]).unflatten(0, index.shape)
        eps = self.noise(x[0], len(index))
        return [(x[i], eps if callable(eps) else map_latent(lambda e: e[i], eps)) for i in range(len(index))]

    def take(self, batches: fast.Batches) -> Tensor:
        """Take a step with each of the batches, as a traced function if told to compile; return the mean bounds."""
        if self.whole and not callable(batches[0][1]):
            return self.whole(batches)
        return torch.stack([self.plain_step(x, eps) for x, eps in batches])

    def plain_step(self, x: Tensor, eps: Latent | Callable[[Any], Latent]) -> Tensor:
        """Take one step, as it stands in the books, and return its mean bound, ``[]``."""
        return train_step(self.model, self.estimator, self.optimizer, x, eps, self.recipe.clip)

    def noise(self, x: Tensor, steps: int | None = None) -> Latent | Callable[[Any], Latent]:
        """Draw the noise for a batch ``x``, or for several of its shape with their number on a first axis.

        What it is made of is learnt from the encoder once for a batch's shape. Of a posterior that draws its noise by
        itself, return what draws it from the q of the step.
        """
        key = (x.shape, x.dtype)
        if key not in self.noises:
            with torch.no_grad(), self.as_in_a_step():
                q = posteriors.as_posterior(self.model.encoder(x))
                self.noises[key] = None if posteriors.draws_by_itself(q) else q.noise_like(self.recipe.k)
        many = self.noises[key]
        if many is None:
            self.captured = None  # who knows what it does
            return lambda q: posteriors.as_posterior(q).noise(self.recipe.k, self.streams["noise"])
        if steps is not None:
            many = map_latent(lambda layer: replace(layer, shape=(steps, *layer.shape)), many)
        return posteriors.draw(many, self.streams["noise"])

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Put the model into evaluation mode, and afterwards it and all randomness back to where they were."""
        before = {name: generator.get_state() for name, generator in self.streams.items()}
        try:
            with evaluation.evaluating(self.model), drawing_from(torch.Generator(self.device)):
                yield
        finally:
            for name, state in before.items():
                self.streams[name].set_state(state)

    def generators(self) -> list[torch.Generator]:
        """Return all that :meth:`learn` draws from."""
        return [self.streams["binarisation"], self.streams["noise"]]

    def begin_epoch(self) -> None:
        """Put the data into the epoch's order and set the learning rate."""
        self.order = self.order_by(self)[: len(self.order)].to(self.device)
        self.set_lr()

    @property
    def lr(self) -> float:
        """The learning rate."""
        return self.recipe.lr * self.decay * self.schedule(self.progress)

    def restart_optimizer(self) -> None:
        """Begin with a new optimiser, without memories, at the learning rate as it is now."""
        self.optimizer = build_optimizer(self.model.parameters(), self.recipe)
        self.hasten()
        self.set_lr()

    def hasten(self) -> None:
        """Make what takes the steps where they are compiled."""
        self.whole = self.captured = None
        if self.compile:
            self.whole = fast.WholeSteps(self)
            if self.even and self.device.type == "cuda":
                self.captured = fast.Captured(self.learn, self.model, self.generators())

    def set_lr(self) -> None:
        """Give the optimiser the learning rate of now."""
        changed = any(group["lr"] != self.lr for group in self.optimizer.param_groups)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        if changed and self.captured:
            self.captured.forget()

    def limit(self, parameters: Sequence[Tensor]) -> None:
        """Limit the gradient as the recipe says."""
        if self.recipe.clip is not None:
            clip_gradient(parameters, self.recipe.clip)

    def mean(self, bound: Tensor) -> Tensor:
        """Return what is reported of a batch's bound ``[B]``: its mean, ``[]``."""
        return bound.mean()

    def note(self, bounds: Tensor) -> None:
        """Count the steps that gave ``bounds`` ``[steps]``; look at them now and then, and at the end of an epoch."""
        before, i = self.step, self.step % self.steps_per_epoch
        self.bounds[i : i + len(bounds)] = bounds
        self.step += len(bounds)
        if before // CHECK_EVERY != self.step // CHECK_EVERY:
            self.check_bounds()
        if self.epoch_ends:
            self.end_epoch()

    def end_epoch(self) -> None:
        """Add the epoch to the history."""
        self.check_bounds()
        record = {
            "epoch": self.step // self.steps_per_epoch,
            "step": self.step,
            "bound": self.bounds.double().mean().item(),
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(self.seconds, 3),
        }
        self.history.append(record)
        for hook in self.hooks:
            hook.after_epoch(self, record)

    def metrics(self) -> str:
        """Return the history, one JSON object a line; each record is put into words once, however long it gets."""
        self.lines += [f"{json.dumps(record)}\n" for record in self.history[len(self.lines) :]]
        return "".join(self.lines)

    def summary(self) -> str:
        """Say how the last epoch went."""
        last = self.history[-1]
        held_out = f", held out {last['held_out']:.2f}" if "held_out" in last else ""
        return f"epoch {last['epoch']}: {last['bound']:.2f} nats{held_out}"

    def check_bounds(self) -> None:
        """Raise Diverged, with the step, if one of this epoch's bounds is not finite."""
        begin = (self.step - 1) // self.steps_per_epoch * self.steps_per_epoch
        bounds = self.bounds[: self.step - begin]
        if not bounds.isfinite().all():
            first = int(bounds.isfinite().logical_not().nonzero()[0])
            raise self.diverged(f"the bound is {bounds[first].item()} at step {begin + first + 1}", begin + first)

    def diverged(self, what: str, steps: int = 1) -> Diverged:
        """Return the error that says so, of a model that has taken some ``steps``."""
        advice = f"train anew with a lower {typed('lr')}, or limit the gradient with {typed('clip')}"
        return Diverged(
            f"{what} with estimator '{self.estimator.name}', k = {self.recipe.k} and learning rate "
            f"{self.optimizer.param_groups[0]['lr']:g}: "
            f"{advice if steps else 'nothing is learnt yet, so look at the data and at how the model begins'}"
        )

    def state(self) -> dict[str, Any]:
        """Return the record: all that :meth:`load_state` needs to go on bit for bit; only if all of it is finite.

        Raises
        ------
        Diverged
            if a bound, a parameter or a moment of the optimiser is not, or if the bound of these parameters is not.
        """
        self.check_bounds()
        moments = [value for state in self.optimizer.state.values() for value in state.values() if value is not None]
        learning = (p for p in self.model.parameters() if p.requires_grad)
        if not all(bool(tensor.isfinite().all()) for tensor in (*learning, *moments)):
            raise self.diverged(f"a parameter or its gradient is not finite at step {self.step}")
        if not self.probe().isfinite().all():
            raise self.diverged(f"the bound is not finite after step {self.step}")
        return {
            "device": self.device.type,
            "world": world(),
            **{name: getattr(self, name) for name in EVOLVES},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "parameters": self.parameter_names,
            "remembered": len(self.optimizer.state),
            "streams": {name: generator.get_state() for name, generator in self.streams.items()},
            "hooks": [part.state() for part in self.keepers],
        }

    @property
    def parameter_names(self) -> list[str]:
        """The names of the parameters, in the optimiser's order."""
        return [name for name, _ in self.model.named_parameters()]

    def probe(self) -> Tensor:
        """Return the loss of the coming batch, ``[B]``, in evaluation mode; nothing notices."""
        with self.undisturbed(), self.put_back():
            return self.coming_loss()

    def rehearsal(self) -> Tensor:
        """Return the loss of the coming batch, ``[B]``, in the mode of a step; what a record holds is put back.

        Raises
        ------
        InputError
            if that cannot be, as of a buffer that has grown.
        """
        with self.as_in_a_step():
            return self.coming_loss()

    @contextmanager
    def as_in_a_step(self) -> Iterator[None]:
        """Leave the model in the mode of a step, and put back what a record holds of it, and all randomness."""
        modes = [(part, part.training) for part in self.model.modules()]
        with self.undisturbed(), self.put_back():
            for part, mode in modes:
                part.training = mode
            yield

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Put back all that a record holds of the model, whatever a call changes of it."""
        now = self.model.state_dict()
        state = {name: x.clone() if isinstance(x, Tensor) else copy.deepcopy(x) for name, x in now.items()}
        yield
        after = dict(self.model.state_dict())
        if fast.alike(state, after):
            return
        try:
            for name, x in state.items():
                if isinstance(x, Tensor) and name in after and after[name].dtype != x.dtype:
                    raise RuntimeError(f"{name} is {after[name].dtype} then, and was {x.dtype}")
            self.model.load_state_dict(state)
        except RuntimeError as error:
            raise InputError(
                "a call leaves a model that cannot load its state_dict of before "
                f"({str(error).splitlines()[-1].strip()}): let all buffers be there from the start, of one shape and "
                "dtype"
            ) from error

    def coming_loss(self) -> Tensor:
        """Return the loss of the coming batch, ``[B]``."""
        with torch.enable_grad():
            x = self.split.batch(self.index(1)[0], self.streams["binarisation"])
            before, q = posteriors.version(x), posteriors.as_posterior(self.model.encoder(x))
            if posteriors.version(x) != before:
                raise InputError(
                    "the encoder changes x in place, and with it the data: leave x as it is, such as x * 2 for "
                    "x.mul_(2), or ReLU() for ReLU(inplace=True)"
                )
            return self.estimator.loss(self.model.joint, q, x, q.noise(self.recipe.k, self.streams["noise"])).detach()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, bit for bit; it warns if that cannot be, since this is another world.

        Raises
        ------
        InputError
            if that is the state of no such training.
        """
        names, known = self.parameter_names, state.get("parameters", self.parameter_names)
        state = {**state, "optimizer": in_order(state["optimizer"], known, names)}
        check_record(state, self)
        then, now = {**state["world"], "device": state["device"]}, {**world(), "device": self.device.type}
        others = [f"{name} {then[name]} then and {now[name]} now" for name in now if then[name] != now[name]]
        others += ["the model's parameters come in another order now"] * (known != names)
        if others:
            warnings.warn(f"not bit for bit as without the interruption: {', '.join(others)}", stacklevel=2)
        for part, own in zip(self.keepers, state["hooks"], strict=True):
            part.load_state(own)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:  # where it was captured is of no concern here
            group.update({name: self.optimizer.defaults[name] for name in group if name in ("capturable", "fused")})
        for name in EVOLVES:
            there, here = state[name], getattr(self, name)
            setattr(self, name, here.copy_(there) if isinstance(here, Tensor) else there)
        self.lines = []
        self.hasten()
        for name, generator in self.streams.items():
            same = name == "order" or state["device"] == self.device.type
            anew = stream(name, self.recipe.seed, generator.device, self.step)
            generator.set_state(state["streams"][name] if same else anew.get_state())


def in_order(state: dict[str, Any], then: Sequence[str], now: Sequence[str]) -> dict[str, Any]:
    """Return an optimiser's state with what it remembers of each parameter at the place that this has now."""
    if then == now:
        return state
    if sorted(then) != sorted(now):
        raise InputError("its parameters must be those of this model")
    places = {i: now.index(name) for i, name in enumerate(then)}
    return {**state, "state": {places[i]: memories for i, memories in state["state"].items()}}


def world() -> dict[str, Any]:
    """Return what must be the same for the same steps to have the same bits, besides the kind of device."""
    return {
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "torch": str(torch.__version__),
    }


def check_record(state: dict[str, Any], training: Training) -> None:
    """Raise InputError unless the plain part of a record can be one of this training."""
    whole_number("its step", state["step"], least=0)
    between("its seconds", state["seconds"], 0, math.inf)
    positive("its decay", state["decay"])
    true_or_false("whether it stopped", state["stopped"])
    if state["decay"] != 1 and all(isinstance(hook, HeldOut) for hook in training.hooks):
        raise InputError(f"its decay must be 1, as nothing in this run slows it down, but is {state['decay']}")
    for name in ("order", "bounds"):
        shape = list(getattr(training, name).shape)
        if not isinstance(state[name], Tensor) or list(state[name].shape) != shape or not state[name].isfinite().all():
            raise InputError(f"its {name} must be a tensor {shape} of finite numbers")
    if not all(0 <= i < len(training.split) for i in state["order"].aminmax()):
        raise InputError(f"its order must be of {len(training.split)} observations")
    epochs, history = state["step"] // training.steps_per_epoch, state["history"]
    if not isinstance(history, list) or len(history) != epochs or not all(isinstance(each, dict) for each in history):
        raise InputError(f"its history must be of the {epochs} epochs that are done")
    if not all(is_finite(epoch.get(name, 0)) for epoch in history for name in ("bound", "held_out")):
        raise InputError("the bounds in its history must be finite")
    parameters = dict(training.model.named_parameters(remove_duplicate=False))
    for name, own in training.model.state_dict().items():
        if isinstance(own, Tensor):
            learns = name in parameters and parameters[name].requires_grad  # what does not need not be finite
            check_numbers(name, state["model"].get(name), (own.dtype,), finite=learns)
    dtypes = (torch.float32, torch.float64, *{p.dtype for p in parameters.values()} - {torch.float32, torch.float64})
    remembered = state.get("remembered", int(state["step"] > 0))  # records of before do not say it
    check_optimizer(state["optimizer"], training.optimizer, dtypes, remembered)


def check_optimizer(state: dict, own: torch.optim.Optimizer, dtypes: Sequence[torch.dtype], remembered: int) -> None:
    """Raise InputError unless ``state`` is one of this optimiser: its settings but for the rate, and its moments.

    ``remembered`` parameters had moments when it was recorded: none right after a restart.
    """
    memories = RULES[type(own)].memories
    if memories and len(state["state"]) < remembered:
        raise InputError(
            f"its optimiser must remember its {' and '.join(memories)} of {remembered} parameters, but does so of "
            f"{len(state['state'])}"
        )
    for there, here, group in zip(
        state["param_groups"], own.state_dict()["param_groups"], own.param_groups, strict=True
    ):
        for name in here.keys() & there.keys() - {"lr", "capturable", "fused", "foreach"}:
            if there[name] != here[name]:
                raise InputError(f"its optimiser's {name} must be {here[name]!r}, but is {there[name]!r}")
        for index, parameter in zip(here["params"], group["params"], strict=True):
            moments = state["state"].get(index, {})
            for name, value in moments.items():
                check_numbers(f"optimiser's {name}", value, dtypes)
            for name in memories if moments else ():
                if moments[name].shape != parameter.shape:
                    raise InputError(
                        f"its optimiser's {name} must be of the shape {list(parameter.shape)}, but is of "
                        f"{list(moments[name].shape)}"
                    )


def check_numbers(name: str, found: Any, dtypes: Sequence[torch.dtype], finite: bool = True) -> None:
    """Raise InputError if a tensor of a record is of another type than a training has, or not finite."""
    if isinstance(found, Tensor) and (found.dtype not in dtypes or finite and not found.isfinite().all()):
        raise InputError(f"its {name} must be finite numbers of {' or '.join(map(str, dtypes))}")


UNRECORDED = (
    "it keeps something outside its state_dict, or draws from another generator than torch's global one; register what "
    "it keeps as a buffer, or return it from get_extra_state, or draw from that one"
)
"""What a checkpoint cannot hold, and what to do."""


def check_repeats(training: Training) -> None:
    """Raise InputError if the coming step, rehearsed from the same record again and again, has another loss.

    A training that goes on from that record could not end as if it had not been interrupted.
    """
    first, *others = (training.rehearsal() for _ in range(REHEARSALS))
    if any((loss - first).abs().nansum() > ROUNDING * first.abs().nansum() for loss in others):
        raise InputError(
            "in training mode the model gives another loss for the same batch and noise from one call to the next: "
            f"{UNRECORDED}"
        )


# --- what goes together -----------------------------------------------------------------------------------------------


def check_fit(training: Training) -> None:
    """Raise InputError if model, data, estimator and recipe do not go together; try them on two observations.

    An exception of the model's own reaches the caller as it is, unless the same model takes the same observation in
    another dtype or with another number of pixels: then it is said which.
    """
    model, split, estimator, recipe = training.model, training.split, training.estimator, training.recipe
    estimator.check(recipe.k)
    what = "images" if isinstance(split, Split) else "observations"
    if recipe.batch_size > len(split):
        raise InputError(
            f"{typed('batch_size')} is {recipe.batch_size}, but there are only {len(split)} training {what}"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("no parameter of this model learns: set requires_grad of those that shall, or do not train it")
    if isinstance(split, Split) and getattr(model, "binary", False):
        check_levels(split)
    if any(map(nn.parameter.is_lazy, (*model.parameters(), *model.buffers()))):
        raise InputError(
            "a layer of the model is made at its first call, such as LazyLinear, which must come before the training: "
            "call encoder(x) and joint(x, z) once, seeded as the initial weights shall be"
        )
    noise = stream("test", 0, training.device)
    x = split.batch(slice(0, 2), noise)

    def attempt(x: Tensor) -> Tensor:
        with torch.enable_grad(), training.undisturbed():
            q = posteriors.as_posterior(model.encoder(x))
            return estimator.loss(model.joint, q, x, q.noise(recipe.k, noise))

    def works(x: Tensor) -> bool:
        try:
            return attempt(x) is not None
        except Exception:  # whatever else is wrong with the model is not what was looked for
            return False

    try:
        with enough_memory("k", "sizes"):
            attempt(x)
    except RuntimeError as error:
        if not x.is_floating_point():
            raise
        parameters = list(model.parameters())
        for dtype in {p.dtype for p in parameters} - {x.dtype}:
            if works(x.to(dtype)):
                raise InputError(
                    f"the images are {x.dtype}, but the model is {dtype}: convert one of them, such as by "
                    f"model.to({x.dtype}), which is float() or double(), or split.to(dtype={dtype})"
                ) from error
        for dtype in {p.dtype for p in parameters} & {torch.bfloat16, torch.float16}:
            raise InputError(
                f"the images are {x.dtype}, but the model is {dtype}, which has too few digits for a density: convert "
                "it by model.float()"
            ) from error
        pixels = x.shape[-1]
        for width in sorted({size for p in parameters for size in p.shape} - {pixels}):
            if works(x.repeat(1, -(-width // pixels))[:, :width]):
                raise InputError(
                    f"the model cannot take these images of {pixels} pixels, but would take {width} ({error}): build "
                    f"it with data_dim={pixels}"
                ) from error
        raise


def check_levels(split: Split) -> None:
    """Raise InputError unless the images that a Bernoulli likelihood will see are black and white."""
    if not split.black_and_white:
        raise InputError(
            "the model's likelihood is Bernoulli and wants images of 0 and 1, but these have grey levels: "
            f"use {typed('binarisation')}=dynamic (or fixed), or a model with a Gaussian likelihood such as 'linear'"
        )


def fit(
    model: nn.Module,
    split: Split | Sentences,
    estimator: Estimator | str | Callable[[Progress], Estimator] = "elbo-path",
    progress: bool = False,
    compile: bool = False,
    **recipe: Any,
) -> list[dict[str, Any]]:
    """Train ``model`` in place, in memory, and return its history, one record an epoch.

    ``fit(model, images.train, "elbo-path", epochs=5, lr=1e-3, seed=0)``; the keywords are the fields of
    :class:`vaelib.config.Recipe`, the records (and ``compile``) those of :class:`Training`. Introduced in
    book/01-elbo-forms.ipynb.
    """
    return Training(model, split, estimator, Recipe.of(**recipe), compile=compile).run(progress=progress)
