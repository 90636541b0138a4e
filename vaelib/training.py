r"""The training loop: :func:`train_step`, and :class:`Trainer` around it, whose state can be saved and taken up again.

:func:`fit` trains in memory, for a chapter; :func:`vaelib.runs.train` in a folder, for the command line. Both are the
one loop :meth:`Trainer.run`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from vaelib import objectives
from vaelib.config import Recipe
from vaelib.data import Split
from vaelib.errors import InputError, choose
from vaelib import estimators as known
from vaelib.estimators import Estimator

from vaelib.posteriors import Latent

CHECK_EVERY = 100  # steps between two looks at whether the bounds are finite
CAPTURED_STEPS = 50  # in one CUDA graph

BURDA_STAGES = 8
BURDA_EPOCHS = tuple(3**i for i in range(BURDA_STAGES))
BURDA_FACTORS = tuple(round(10 ** (1 - i / 7), 1) / 10 for i in range(BURDA_STAGES))


def constant(epoch: int) -> float:
    """The same learning rate in every epoch."""
    return 1.0


def burda(epoch: int) -> float:
    r"""Eight stages: stage i has :math:`3^{i-1}` epochs at :math:`10^{-(i-1)/7}` times the rate, two digits of it.

    (Burda et al. 2016.) With lr = 1e-3: 1 epoch at 1e-3, 3 at 7.2e-4, 9 at 5.2e-4, 27 at 3.7e-4 ... 2187 at 1e-4;
    3,280 in all, and 4, 13, 40, 121, 364, 1093 after the stages in between. Beyond, the last rate stays.
    """
    stage = int(np.searchsorted(np.cumsum(BURDA_EPOCHS), epoch))
    return BURDA_FACTORS[min(stage, BURDA_STAGES - 1)]


SCHEDULES: dict[str, Callable[[int], float]] = {"constant": constant, "burda": burda}
"""Learning-rate schedules by name: the number of the epoch, from 1, gives the factor on the learning rate."""


class ReleasedAdam(torch.optim.Optimizer):
    r"""Adam as it stands in the code released with Burda et al. (2016) and Roeder et al. (2017), not as in their text.

    With the gradient g summed over the batch, :math:`m_0 = 0`, :math:`v_0 = 1`, :math:`\beta_1 = 0.99`,

    .. math::

        \theta_t &= \theta_{t-1} - \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
            \frac{m_{t-1}}{\sqrt{v_{t-1}} + \epsilon}, \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2.

    The moments in the update are those of the step before, so that the first step moves nothing.

    Parameters
    ----------
    params, lr, betas, eps
        as for :class:`torch.optim.Adam`.
    scale
        multiplies the gradient; the batch size turns that of the mean into that of the sum.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.99, 0.999),
        eps: float = 1e-4,
        scale: float = 1.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "scale": scale})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            (beta1, beta2), scale = group["betas"], group["scale"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    state["mean"], state["square"] = torch.zeros_like(p), torch.ones_like(p)
                state["step"] += 1
                t, mean, square = state["step"].item(), state["mean"], state["square"]
                rate = group["lr"] * math.sqrt(1 - beta2**t) / (1 - beta1**t)
                p.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-rate)
                mean.mul_(beta1).add_(p.grad, alpha=(1 - beta1) * scale)
                square.mul_(beta2).addcmul_(p.grad, p.grad, value=(1 - beta2) * scale**2)


def adam(parameters: Sequence[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba 2015), as the papers describe their training."""
    on_gpu = parameters[0].is_cuda
    return torch.optim.Adam(parameters, recipe.lr, eps=recipe.adam_eps, fused=True, capturable=on_gpu)


def adam_released(parameters: Sequence[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """Adam as in the papers' released code."""
    return ReleasedAdam(parameters, recipe.lr, eps=recipe.adam_eps, scale=recipe.batch_size)


OPTIMIZERS: dict[str, Callable[[Sequence[Tensor], Recipe], torch.optim.Optimizer]] = {
    "adam": adam,
    "adam-released": adam_released,
}
"""Optimisers by name, built from the parameters and the recipe."""


class Diverged(InputError):
    """The bound or a parameter is not finite any more."""


def train_step(
    model: nn.Module,
    estimator: Estimator,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    eps: Latent,
    clip: float | None = None,
    backward: Callable[..., Tensor] = objectives.backward,
) -> Tensor:
    """Take one step up the bound and return its mean over the batch ``x``, before the step, ``[]``.

    ``clip`` limits the global norm of the gradient; ``backward`` computes it, as :func:`vaelib.objectives.backward`
    does. Introduced in book/01-elbo-forms.ipynb.
    """
    optimizer.zero_grad()
    bound = backward(estimator, model.joint, model.encoder(x), x, eps)
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return bound.mean()


STREAMS = ("init", "order", "binarisation", "noise", "test")


def stream(name: str, seed: int, device: torch.device | str = "cpu", step: int = 0) -> torch.Generator:
    """Return the generator of one kind of randomness (a name in ``STREAMS``); they do not depend on each other."""
    state = np.random.SeedSequence((seed, STREAMS.index(name), step)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]))


class Loop:
    """The loop over steps and epochs, of one training (:class:`Trainer`) or of several side by side.

    Attributes
    ----------
    step : int
        steps taken so far.
    seconds : float
        how long they took.
    """

    recipe: Recipe
    history: list
    step: int
    steps_per_epoch: int
    seconds: float
    captured = None
    captures = False

    @property
    def total_steps(self) -> int:
        """Steps after which the recipe's epochs are done."""
        return self.recipe.epochs * self.steps_per_epoch

    def run(self, after_step: Callable[[], None] = lambda: None, progress: bool = False) -> list:
        """Train until the recipe's epochs are done, from wherever :attr:`step` stands; return the history.

        Raises
        ------
        Diverged
            if a bound is not finite; it names the first such step.
        """
        start = time.monotonic() - self.seconds
        bar = tqdm(total=self.total_steps, initial=self.step, unit="step", disable=not progress, mininterval=0.5)
        with bar:
            while self.step < self.total_steps:
                before = self.step
                bounds = self.advance()
                self.seconds = time.monotonic() - start
                self.note(bounds)
                if self.step % self.steps_per_epoch == 0:
                    bar.set_postfix_str(self.summary())
                after_step()
                bar.update(self.step - before)
        return self.history

    def advance(self) -> Tensor:
        """Take a step, or on a GPU that captures them several; return their bounds, ``[steps, ...]``."""
        i = self.step % self.steps_per_epoch
        if i == 0:
            self.begin_epoch()
        if not self.captures or self.steps_per_epoch - i < CAPTURED_STEPS:
            return self.learn(self.index(1)[0]).unsqueeze(0)
        if self.captured is None:
            self.captured = fast.Captured(self.learn, self.generators())
        return self.captured(self.index(CAPTURED_STEPS))

    def index(self, steps: int) -> Tensor:
        """Return the observations of the next ``steps`` steps, by their numbers."""
        raise NotImplementedError

    def learn(self, index: Tensor) -> Tensor:
        """Take one step with these observations and return the mean bound."""
        raise NotImplementedError

    def generators(self) -> list[torch.Generator]:
        """Return all that :meth:`learn` draws from."""
        raise NotImplementedError

    def note(self, bounds: Tensor) -> None:
        """Count the steps that gave these bounds and write the history."""
        raise NotImplementedError

    def begin_epoch(self) -> None:
        """Shuffle the data and set the learning rate."""
        raise NotImplementedError

    def summary(self) -> str:
        """Say how the last epoch went."""
        raise NotImplementedError


class Trainer(Loop):
    """A training, and everything that a checkpoint has to hold of it.

    Parameters
    ----------
    model
        with ``joint``, ``encoder`` and ``binary``, such as :class:`vaelib.models.VAE`; trained in place.
    split
        the training images, on the device of the model.
    estimator
        a row of the tableau, or one beside it; or a function that gives the one for the next step, called with the
        fraction of the training that is done (such as ``lambda done: silent.annealed(row, 1 - done)``).
    recipe
        how long, how fast, from which seed.
    compile
        take the same steps with less overhead (:mod:`vaelib.fast`): compiled, and on a GPU captured, several at a time.

    Attributes
    ----------
    history : list of dict
        one record an epoch: its number, the steps so far, the mean bound of its steps in nats, the learning rate, and
        the seconds of training so far.

    Raises
    ------
    InputError
        if model, images, estimator and recipe do not go together.
    """

    def __init__(
        self,
        model: nn.Module,
        split: Split,
        estimator: Estimator | Callable[[float], Estimator],
        recipe: Recipe,
        compile: bool = False,
    ) -> None:
        if compile and callable(estimator):
            raise InputError("an estimator that changes from step to step cannot be compiled: leave out compile")
        self.model, self.split, self.recipe = model, split, recipe
        self.estimator_at = estimator if callable(estimator) else lambda done: estimator
        self.backward = objectives.backward
        self.estimator = self.estimator_at(0.0)
        check_fit(model, split, self.estimator, recipe)
        device = split.grey.device
        self.steps_per_epoch = len(split) // recipe.batch_size  # an incomplete batch is left out; every epoch another
        self.optimizer = OPTIMIZERS[recipe.optimizer](list(model.parameters()), recipe)
        self.captures = compile and self.optimizer.defaults.get("capturable", False)
        self.streams = {
            "order": stream("order", recipe.seed),
            "binarisation": stream("binarisation", recipe.seed, device),
            "noise": stream("noise", recipe.seed, device),
        }
        self.step = 0
        self.order = torch.arange(len(split), device=device)
        self.bounds = torch.zeros(self.steps_per_epoch, device=device)
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0

    def index(self, steps: int) -> Tensor:
        """Return the observations of the next ``steps`` steps, by their numbers, ``[steps, B]``."""
        size = self.recipe.batch_size
        first = self.step % self.steps_per_epoch * size
        return self.order[first : first + steps * size].view(steps, size)

    def learn(self, index: Tensor) -> Tensor:
        """Take one step with the observations ``index`` ``[B]`` and return its mean bound, ``[]``."""
        return self.update(self.split.batch(index, self.streams["binarisation"]))

    def update(self, x: Tensor) -> Tensor:
        """Learn from one batch and return its mean bound, ``[]``."""
        self.estimator = self.estimator_at(self.step / self.total_steps)
        q = self.model.encoder(x)
        eps = q.noise(self.recipe.k, self.streams["noise"])
        return train_step(self.model, self.estimator, self.optimizer, x, eps, self.recipe.clip, self.backward)

    def generators(self) -> list[torch.Generator]:
        """Return all that :meth:`learn` draws from."""
        return [self.streams["binarisation"], self.streams["noise"]]

    def note(self, bounds: Tensor) -> None:
        """Count the steps that gave ``bounds`` ``[steps]``; look at them now and then, and at the end of an epoch."""
        before, i = self.step, self.step % self.steps_per_epoch
        self.bounds[i : i + len(bounds)] = bounds
        self.step += len(bounds)
        if before // CHECK_EVERY != self.step // CHECK_EVERY:
            self.check_bounds()
        if self.step % self.steps_per_epoch == 0:
            self.end_epoch()

    def summary(self) -> str:
        """Say how the last epoch went."""
        return f"epoch {self.history[-1]['epoch']}: {self.history[-1]['bound']:.2f} nats"

    def begin_epoch(self) -> None:
        """Shuffle the data, if the recipe says so, and set the learning rate."""
        if self.recipe.shuffle:
            self.order = torch.randperm(len(self.split), generator=self.streams["order"]).to(self.order.device)
        lr = self.recipe.lr * SCHEDULES[self.recipe.schedule](self.step // self.steps_per_epoch + 1)
        if set_lr(self.optimizer, lr):
            self.captured = None  # which holds the old rate

    def end_epoch(self) -> None:
        """Add the epoch to the history."""
        self.check_bounds()
        self.history.append(
            {
                "epoch": self.step // self.steps_per_epoch,
                "step": self.step,
                "bound": self.bounds.double().mean().item(),
                "lr": self.optimizer.param_groups[0]["lr"],
                "seconds": round(self.seconds, 3),
            }
        )

    def check_bounds(self) -> None:
        """Raise Diverged, with the step, if one of this epoch's bounds is not finite."""
        begin = (self.step - 1) // self.steps_per_epoch * self.steps_per_epoch
        bounds = self.bounds[: self.step - begin]
        if not bounds.isfinite().all():
            first = int(bounds.isfinite().logical_not().nonzero()[0])
            raise self.diverged(f"the bound is {bounds[first].item()} at step {begin + first + 1}")

    def diverged(self, what: str) -> Diverged:
        """Return the error that says so."""
        lr = self.optimizer.param_groups[0]["lr"]
        return Diverged(
            f"{what} with estimator '{self.estimator.name}', k = {self.recipe.k} and learning rate {lr:g}: "
            "train anew with a lower lr, or limit the gradient with clip"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all that :meth:`load_state_dict` needs to go on bit for bit; only if all of it is finite.

        Raises
        ------
        Diverged
            if a bound, a parameter or a moment of Adam is not.
        """
        self.check_bounds()
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        if not all(bool(tensor.isfinite().all()) for tensor in (*self.model.parameters(), *moments)):
            raise self.diverged(f"a parameter or its gradient is not finite at step {self.step}")
        return {
            "device": self.order.device.type,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "streams": {name: generator.get_state() for name, generator in self.streams.items()},
            "order": self.order,
            "bounds": self.bounds,
            "history": self.history,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, bit for bit; on another kind of device with other noise from there on."""
        self.captured = None  # with the tensors of before
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:  # where it was captured is of no concern here
            group.update({name: self.optimizer.defaults[name] for name in group if name == "capturable"})
        self.step, self.history, self.seconds = state["step"], state["history"], state["seconds"]
        self.order.copy_(state["order"])
        self.bounds.copy_(state["bounds"])
        for name, generator in self.streams.items():
            if name == "order" or state["device"] == self.order.device.type:
                generator.set_state(state["streams"][name])
            else:
                self.streams[name] = stream(name, self.recipe.seed, generator.device, self.step)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> bool:
    """Set the learning rate and return whether it is another one now."""
    changed = any(group["lr"] != lr for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return changed


def check_fit(model: nn.Module, split: Split, estimator: Estimator, recipe: Recipe) -> None:
    """Raise InputError if these do not go together."""
    estimator.check(recipe.k)
    if recipe.batch_size > len(split):
        raise InputError(f"batch_size is {recipe.batch_size}, but there are only {len(split)} training images")
    if model.binary and split.binarisation != "dynamic" and not ((split.grey == 0) | (split.grey == 1)).all():
        raise InputError(
            "the model's likelihood is Bernoulli and wants images of 0 and 1, but these have grey levels: "
            "use binarisation=dynamic (or fixed), or a model with a Gaussian likelihood such as 'linear'"
        )
    x = split.batch(slice(0, 1), stream("test", 0, split.grey.device))
    mode = model.training
    try:
        with torch.enable_grad():
            q = model.eval().encoder(x)
            estimator.loss(model.joint, q, x, q.noise(recipe.k, stream("test", 0, x.device)))
    except RuntimeError as error:
        raise InputError(
            f"the model cannot take these images of {x.shape[1]} pixels ({error}): build it with data_dim={x.shape[1]}"
        ) from error
    finally:
        model.train(mode)


def fit(
    model: nn.Module,
    split: Split,
    estimator: Estimator | Callable[[float], Estimator] | str = "elbo-path",
    progress: bool = False,
    compile: bool = False,
    **recipe: Any,
) -> list[dict[str, Any]]:
    """Train ``model`` in place, in memory, and return its history, one record an epoch.

    ``fit(model, images.train, "elbo-path", epochs=5, lr=1e-3, seed=0)``; the keywords are the fields of
    :class:`vaelib.config.Recipe`, the records (and ``compile``) those of :class:`Trainer`. Introduced in
    book/01-elbo-forms.ipynb.
    """
    if isinstance(estimator, str):
        estimator = known.get(estimator)
    return Trainer(model, split, estimator, Recipe(**recipe), compile).run(progress=progress)
