r"""Many small trainings as one: their models side by side in one stacked model, each as if it were alone.

At one draw an observation and a batch of 20, much of a step is the cost of asking for it. S trainings of the same
shapes, which may differ in seed and in estimator, are therefore asked for together: every linear layer becomes a
:class:`StackedLinear`, whose batch axis holds the S batches one after the other, and all else in the models works on
such a batch as it is. Nothing is shared but the asking. Each training has its own weights, data order, binarisation
and noise; the S gradients do not mix, Adam is elementwise, and a gradient is clipped a training at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vaelib import fast, objectives
from vaelib.config import Recipe
from vaelib.data import Split
from vaelib.errors import InputError, choose
from vaelib.estimators import Estimator, LossEstimator, Weights, every
from vaelib.posteriors import Latent, Mixture
from vaelib.training import OPTIMIZERS, Diverged, Loop, Trainer, set_lr


class StackedLinear(nn.Module):
    """S linear layers side by side: ``[..., S B, inputs] -> [..., S B, outputs]``, B rows to each.

    The layers it is made of become views of its parameters: what this one learns, they have learnt.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.in_features, self.out_features = layers[0].in_features, layers[0].out_features
        self.weight, self.bias = (
            nn.Parameter(torch.stack([p.detach() for p in each]), requires_grad=each[0].requires_grad)
            for each in zip(*((layer.weight, layer.bias) for layer in layers), strict=True)
        )
        for s, layer in enumerate(layers):
            layer.weight.data, layer.bias.data = self.weight.data[s], self.bias.data[s]

    def forward(self, x: Tensor) -> Tensor:
        """Return S products at once: W x with x in columns, so that the gradient of W is laid out as W is."""
        groups = x.unflatten(-2, (len(self.weight), -1)).movedim(-3, 0)
        columns = torch.baddbmm(self.bias.unsqueeze(-1), self.weight, groups.flatten(1, -2).mT)
        return columns.mT.unflatten(1, groups.shape[1:-1]).movedim(0, -3).flatten(-3, -2)


def stack(modules: Sequence[nn.Module]) -> nn.Module:
    """Return S modules of the same shapes as one, for S batches one after the other along the batch axis.

    Raises
    ------
    InputError
        if they differ, share parameters, or have others than those of linear layers, or dropout.
    """
    stacked = _stack(modules)
    ours = sum(p.numel() for p in stacked.parameters())
    if ours != sum(p.numel() for p in {id(p): p for module in modules for p in module.parameters()}.values()):
        raise InputError("models that share parameters cannot be stacked: give each model, and each layer, its own")
    return stacked


def _stack(modules: Sequence[nn.Module]) -> nn.Module:
    first, name = modules[0], type(modules[0]).__name__
    alike = all(
        type(module) is type(first)
        and module._modules.keys() == first._modules.keys()
        and [(p.shape, p.requires_grad) for p in module.parameters()]
        == [(p.shape, p.requires_grad) for p in first.parameters()]
        for module in modules
    )
    if not alike:
        raise InputError("only models of the same shapes can be stacked; train the others by themselves")
    if type(first) is nn.Linear and first.bias is not None:
        return StackedLinear(modules)
    own = [*first.parameters(recurse=False), *first.buffers(recurse=False)]
    if own or isinstance(first, nn.modules.dropout._DropoutNd):
        raise InputError(f"only linear layers can be stacked, but the model has a {name}; train each model by itself")
    stacked = copy.copy(first)
    stacked._modules = {key: _stack([module._modules[key] for module in modules]) for key in first._modules}
    return stacked


@dataclass(frozen=True)
class SideBySide:
    """S rows of the tableau for S batches one after the other, each as if its batch were the only one.

    It serves :func:`vaelib.objectives.backward` as an :class:`vaelib.estimators.Estimator`.
    """

    rows: tuple[Estimator, ...]

    check = Estimator.check

    @property
    def name(self) -> str:
        """The names of the rows."""
        return ", ".join(dict.fromkeys(row.name for row in self.rows))

    @property
    def least_k(self) -> int:
        """The smallest number of draws that all rows are defined for."""
        return max(row.least_k for row in self.rows)

    @cached_property
    def reparameterised(self) -> bool:
        """Whether a row is."""
        return any(row.reparameterised for row in self.rows)

    @cached_property
    def automatic(self) -> bool:
        """Whether all rows are."""
        return all(row.automatic for row in self.rows)

    def value(self, log_w: Tensor) -> Tensor:
        """Return the bound that each row reports, ``[K, S B] -> [S B]``."""
        return torch.cat([row.value(part) for row, part in self.parts(log_w)])

    def rule(self, log_w: Tensor) -> Weights:
        """Return the weights of all rows, S times as large: the engine takes the mean over S batches."""
        weights = [row.rule(part) for row, part in self.parts(log_w)]
        theta, path, score = (self.joined(channel) for channel in zip(*weights, strict=True))
        return Weights(theta, theta if all(w.path is w.theta for w in weights) else path, score)

    def parts(self, log_w: Tensor) -> list[tuple[Estimator, Tensor]]:
        """Return each row with its part of ``log_w``; one row with all of it where they are the same."""
        if len(set(self.rows)) == 1:
            return [(self.rows[0], log_w)]
        return list(zip(self.rows, log_w.chunk(len(self.rows), 1), strict=True))

    def joined(self, parts: Sequence[Tensor | None]) -> Tensor | None:
        """Return one channel of all rows, ``[K, S B]``; a row without it weighs it 0."""
        used = [part for part in parts if part is not None]
        if not used:
            return None
        return len(self.rows) * torch.cat([torch.zeros_like(used[0]) if p is None else p for p in parts], 1)


@cache
def side_by_side(*rows: Estimator) -> SideBySide:
    """Return rows of the tableau as one estimator for as many batches, one after the other."""
    for row in rows:
        if not isinstance(row, Estimator):
            raise InputError(f"estimator '{row.name}' has no row in the tableau and cannot be stacked: train it alone")
    return SideBySide(rows)


class StackedTrainer(Loop):
    """Trainings that go on side by side, each as if it were alone.

    Parameters
    ----------
    trainers
        S trainings on one device, before their first step, that differ in model weights, seed and estimator alone; what
        they hold (model, history, streams) is theirs as before, and kept up to date.
    compile
        as for :class:`vaelib.training.Trainer`.

    Raises
    ------
    InputError
        if they cannot be stacked.
    """

    def __init__(self, trainers: Sequence[Trainer], compile: bool = False) -> None:
        self.trainers = list(trainers)
        self.recipe = self.trainers[0].recipe
        for trainer in self.trainers:
            check_alike(self.trainers[0], trainer)
        side_by_side(*(trainer.estimator for trainer in self.trainers))
        self.model = stack([trainer.model for trainer in self.trainers])
        self.parameters = list(self.model.parameters())
        self.optimizer = OPTIMIZERS[self.recipe.optimizer](self.parameters, self.recipe)
        self.backward = fast.Compiled() if compile else objectives.backward
        self.captures = compile and self.optimizer.defaults.get("capturable", False)
        self.steps_per_epoch = self.trainers[0].steps_per_epoch
        self.seconds = 0.0

    @property
    def step(self) -> int:
        """Steps that each training has taken so far."""
        return self.trainers[0].step

    @property
    def history(self) -> list[list[dict[str, Any]]]:
        """The history of each training; its seconds are a share of those of all."""
        return [trainer.history for trainer in self.trainers]

    def begin_epoch(self) -> None:
        """Shuffle the data of each training and set the learning rate."""
        for trainer in self.trainers:
            trainer.begin_epoch()
        if set_lr(self.optimizer, self.trainers[0].optimizer.param_groups[0]["lr"]):
            self.captured = None

    def index(self, steps: int) -> Tensor:
        """Return the observations of the next ``steps`` steps of each training, ``[steps, S, B]``."""
        return torch.stack([trainer.index(steps) for trainer in self.trainers], 1)

    def learn(self, index: Tensor) -> Tensor:
        """Take one step of each training with the observations ``index`` ``[S, B]``; return their bounds, ``[S]``."""
        batches = [
            trainer.split.batch(row, trainer.streams["binarisation"])
            for trainer, row in zip(self.trainers, index, strict=True)
        ]
        noise = [
            trainer.model.encoder.noise(trainer.recipe.k, x, trainer.streams["noise"])
            for trainer, x in zip(self.trainers, batches, strict=True)
        ]
        estimator = side_by_side(*(t.estimator_at(t.step / t.total_steps) for t in self.trainers))
        self.optimizer.zero_grad()
        x = torch.cat(batches)
        bound = self.backward(estimator, self.model.joint, self.model.encoder, x, join(noise))
        if self.recipe.clip is not None:
            clip_each(self.parameters, self.recipe.clip)
        self.optimizer.step()
        return bound.view(len(self.trainers), -1).mean(1)

    def generators(self) -> list[torch.Generator]:
        """Return all that :meth:`learn` draws from."""
        return [generator for trainer in self.trainers for generator in trainer.generators()]

    def note(self, bounds: Tensor) -> None:
        """Let each training count its steps, ``[steps, S]``, and write its history."""
        for trainer, mine in zip(self.trainers, bounds.unbind(1), strict=True):
            trainer.seconds = self.seconds / len(self.trainers)
            with of_seed(trainer):
                trainer.note(mine)

    def summary(self) -> str:
        """Say how the last epoch went."""
        last = [history[-1]["bound"] for history in self.history]
        return f"epoch {self.history[0][-1]['epoch']}: {sum(last) / len(last):.2f} nats on average"

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each training, under "runs", as :meth:`vaelib.training.Trainer.state_dict` would."""
        self.hand_back()
        states = []
        for trainer in self.trainers:
            with of_seed(trainer):
                states.append(own(trainer.state_dict()))
            trainer.optimizer.state.clear()
        return {"runs": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, bit for bit."""
        for trainer, mine in zip(self.trainers, state["runs"], strict=True):
            trainer.load_state_dict(mine)
        self.seconds = sum(trainer.seconds for trainer in self.trainers)
        for stacked, *views in zip(self.parameters, *(t.model.parameters() for t in self.trainers), strict=True):
            states = [t.optimizer.state.pop(p, {}) for t, p in zip(self.trainers, views, strict=True)]
            if states[0]:
                self.optimizer.state[stacked] = {
                    key: torch.stack([each[key] for each in states]) if value.shape == views[0].shape else value
                    for key, value in states[0].items()
                }
        set_lr(self.optimizer, self.trainers[0].optimizer.param_groups[0]["lr"])
        self.captured = None

    def hand_back(self) -> None:
        """Give every trainer its part of the optimiser's state."""
        for stacked, *views in zip(self.parameters, *(t.model.parameters() for t in self.trainers), strict=True):
            for s, (trainer, p) in enumerate(zip(self.trainers, views, strict=True)):
                if stacked in self.optimizer.state:
                    trainer.optimizer.state[p] = {
                        key: value[s] if value.shape == stacked.shape else value
                        for key, value in self.optimizer.state[stacked].items()
                    }

    def unstack(self) -> list[Trainer]:
        """Return the trainings as they are now, each by itself again; this stack must not be used any more."""
        self.hand_back()
        for trainer in self.trainers:
            trainer.optimizer.state.update({p: own(state) for p, state in trainer.optimizer.state.items()})
            for p in trainer.model.parameters():
                p.data = p.data.clone()
        return self.trainers


@contextmanager
def of_seed(trainer: Trainer) -> Iterator[None]:
    """Say in a Diverged which of the trainings it was."""
    try:
        yield
    except Diverged as error:
        raise Diverged(f"seed {trainer.recipe.seed}: {error}") from None


def check_alike(first: Trainer, other: Trainer) -> None:
    """Raise InputError if two trainings differ in more than weights, seed and estimator."""
    shared = [field.name for field in fields(Recipe) if field.name != "seed"]
    if any(getattr(first.recipe, name) != getattr(other.recipe, name) for name in shared):
        raise InputError("trainings side by side must have the same recipe, but for the seed")
    if first.steps_per_epoch != other.steps_per_epoch or first.order.device != other.order.device:
        raise InputError("trainings side by side must have equally many images, on the same device")
    if other.step:
        raise InputError("trainings can be stacked before their first step alone; load a state of them afterwards")
    x = other.split.batch(slice(0, 1), torch.Generator(other.order.device))
    if isinstance(other.model.encoder(x), Mixture):
        raise InputError("a model whose posterior is a mixture cannot be stacked: train it by itself")


def join(noise: Sequence[Latent]) -> Latent:
    """Join noises along the batch axis, layer by layer."""
    if isinstance(noise[0], tuple):
        return tuple(torch.cat(layers, 1) for layers in zip(*noise, strict=True))
    return torch.cat(noise, 1)


def clip_each(parameters: Sequence[nn.Parameter], limit: float) -> None:
    """Limit the global norm of each training's gradient; axis 0 of every parameter is the trainings'."""
    parameters = [p for p in parameters if p.grad is not None]
    norms = torch.stack([p.grad.flatten(1).norm(dim=1) for p in parameters]).norm(dim=0)
    factors = (limit / (norms + 1e-6)).clamp(max=1)
    for p in parameters:
        p.grad.mul_(factors.view(-1, *[1] * (p.ndim - 1)))


def own(state: Any) -> Any:
    """Return a state whose tensors are views of nothing."""
    if isinstance(state, dict):
        return type(state)((key, own(value)) for key, value in state.items())
    if isinstance(state, list):
        return [own(value) for value in state]
    return state.clone() if isinstance(state, Tensor) else state


def fit(
    models: Sequence[nn.Module],
    split: Split,
    estimators: str | Estimator | Sequence[str | Estimator] = "elbo-path",
    seeds: Sequence[int] | None = None,
    progress: bool = False,
    compile: bool = False,
    **recipe: Any,
) -> list[list[dict[str, Any]]]:
    """Train ``models`` in place, side by side, and return their histories.

    Each ends as :func:`vaelib.training.fit` would leave it alone, to rounding.

    Parameters
    ----------
    models
        S models of the same shapes.
    split
        the training images.
    estimators, seeds
        S of each, or one estimator for all; the seeds are 0 to S - 1 if not given.
    progress, compile
        as for :class:`vaelib.training.Trainer`.
    recipe
        the other fields of :class:`vaelib.config.Recipe`.
    """
    one = isinstance(estimators, str | Estimator | LossEstimator)
    rows = [estimators] * len(models) if one else list(estimators)
    numbers = list(range(len(models)) if seeds is None else seeds)
    if not len(models) == len(rows) == len(numbers):
        raise InputError(f"there are {len(models)} models, {len(rows)} estimators and {len(numbers)} seeds")
    trainers = [
        Trainer(
            model,
            split,
            choose("estimator", row, every()) if isinstance(row, str) else row,
            Recipe(**recipe, seed=seed),
        )
        for model, row, seed in zip(models, rows, numbers, strict=True)
    ]
    stacked = StackedTrainer(trainers, compile)
    stacked.run(progress=progress)
    stacked.unstack()
    return stacked.history
