r"""Many small trainings as one: their models side by side in one stacked model, each as if it were alone.

At one draw an observation and a batch of 20, much of a step is the cost of asking for it. S trainings of the same
shapes, which may differ in seed and in row of the tableau, are therefore asked for together: every linear layer becomes
a :class:`StackedLinear`, whose batch axis holds the S batches one after the other, and all else in the models works on
such a batch as it is. Nothing is shared but the asking. Each training has its own weights, data order, binarisation
and noise; the S gradients do not mix, optimisers are elementwise, and a gradient is clipped a training at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vaelib import estimators as known
from vaelib import fast, objectives
from vaelib.config import Recipe
from vaelib.data import Split
from vaelib.errors import InputError
from vaelib.estimators import Estimator, Row, Weights
from vaelib.optimizers import clip_gradient, norm_of_each
from vaelib.posteriors import Latent, as_posterior, draws_by_itself
from vaelib.training import Diverged, Progress, Training, drawing_from, stream

# --- models -----------------------------------------------------------------------------------------------------------


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


MIXING = (nn.modules.dropout._DropoutNd, nn.RReLU, nn.modules.batchnorm._NormBase)
"""Layers that draw, or look at a batch as a whole."""


def stack(modules: Sequence[nn.Module]) -> nn.Module:
    """Return S modules of the same shapes as one, for S batches one after the other along the batch axis.

    Raises
    ------
    InputError
        if they differ in more than the weights of linear layers, share parameters, have others than those, or layers
        that draw or mix the observations of a batch.
    """
    stacked = _stack(modules)
    ours = sum(p.numel() for p in stacked.parameters())
    if ours != sum(p.numel() for p in {id(p): p for module in modules for p in module.parameters()}.values()):
        raise InputError("models that share parameters cannot be stacked: give each model, and each layer, its own")
    return stacked


def _stack(modules: Sequence[nn.Module]) -> nn.Module:
    first, name = modules[0], type(modules[0]).__name__
    if any(type(module) is not type(first) or shapes(module) != shapes(first) for module in modules):
        raise InputError("only models of the same shapes can be stacked; train the others by themselves")
    linear = type(first) is nn.Linear and first.bias is not None
    own = [*first.parameters(recurse=False), *first.buffers(recurse=False)]
    if isinstance(first, MIXING) or own and not linear:
        raise InputError(f"only linear layers can be stacked, but the model has a {name}; train each model by itself")
    if not all(fast.same(numbers(module), numbers(first)) for module in modules):
        raise InputError(
            f"only models that do the same can be stacked, but two of a {name} differ in a setting that is no "
            "parameter, such as a slope or a bound; train each model by itself"
        )
    if linear:
        return StackedLinear(modules)
    stacked = copy.copy(first)
    stacked._modules = {key: _stack([module._modules[key] for module in modules]) for key in first._modules}
    return stacked


def shapes(module: nn.Module) -> Any:
    """Return what must be the same of modules that are stacked: the names of their parts, and their parameters."""
    return list(module._modules), [(p.shape, p.dtype, p.requires_grad) for p in module.parameters()]


def numbers(module: nn.Module) -> dict[str, Any]:
    """Return the settings of a module that are no parameters and no parts."""
    return {k: v for k, v in module.__dict__.items() if k not in ("_parameters", "_buffers", "_modules")}


# --- estimators -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SideBySide(Row):
    """S rows of the tableau for S batches one after the other, each as if its batch were the only one."""

    rows: tuple[Row, ...] = ()

    @property
    def three(self) -> Tensor:
        """Log-weights of three draws for each row, ``[3, 4 S]``."""
        return super().three.repeat(1, len(self.rows))

    def value(self, log_w: Tensor, log_share: Tensor | float = 0.0) -> Tensor:
        """Return the bound that each row reports, ``[K, S B] -> [S B]``."""
        if isinstance(log_share, Tensor):
            raise InputError("a model whose posterior is a mixture cannot be stacked: train it by itself")
        return torch.cat([row.value(part) for row, part in parts(self.rows, log_w)])

    def differentiate(self, joint: nn.Module, q: Any, x: Tensor, eps: Latent) -> Tensor:
        """Return the losses, ``[S B]``, with S times their gradient: who takes their mean takes it over S batches."""
        loss = super().differentiate(joint, q, x, eps)
        return loss.detach() + len(self.rows) * (loss - loss.detach())


def side_by_side(rows: Sequence[Estimator]) -> SideBySide:
    """Return rows of the tableau as one estimator for as many batches, one after the other."""
    for row in rows:
        if not isinstance(row, Row):
            raise InputError(f"estimator '{row.name}' has no row in the tableau and cannot be stacked: train it alone")
    rows = tuple(rows)

    def rule(log_w: Tensor) -> Weights:
        weights = [row.rule(part) for row, part in parts(rows, log_w)]
        theta, path, score = (joined(channel) for channel in zip(*weights, strict=True))
        return Weights(theta, theta if all(w.path is w.theta for w in weights) else path, score)

    name, least_k = ", ".join(dict.fromkeys(row.name for row in rows)), max(row.least_k for row in rows)
    return SideBySide(name, rows[0].bound, None, least_k, rows[0].reference, rule, rows)


def parts(rows: Sequence[Row], log_w: Tensor) -> list[tuple[Row, Tensor]]:
    """Return each row with its part of ``log_w``; one row with all of it where they are the same."""
    if len(set(rows)) == 1:
        return [(rows[0], log_w)]
    return list(zip(rows, log_w.chunk(len(rows), 1), strict=True))


def joined(channel: Sequence[Tensor | None]) -> Tensor | None:
    """Return one channel of all rows, ``[K, S B]``; a row without it weighs it 0."""
    used = [part for part in channel if part is not None]
    return torch.cat([torch.zeros_like(used[0]) if p is None else p for p in channel], 1) if used else None


# --- training ---------------------------------------------------------------------------------------------------------


class StackedTraining(Training):
    """Trainings that go on side by side, each as if it were alone.

    Parameters
    ----------
    trainings
        S trainings on one device, before their first step, that differ in model weights, seed and row alone; what they
        hold (model, history, streams) is theirs as before, and kept up to date.
    compile
        as for :class:`vaelib.training.Training`.

    Raises
    ------
    InputError
        if they cannot be stacked.
    """

    def __init__(self, trainings: Sequence[Training], compile: bool = False) -> None:
        self.trainings, first = list(trainings), trainings[0]
        for training in self.trainings:
            check_alike(first, training)
        self.estimator = side_by_side([training.estimator for training in self.trainings])
        with drawing_from(torch.Generator(first.device)):
            check_same(self.trainings, self.estimator)
        self.estimator_at = lambda progress: self.estimator
        self.recipe, self.device, self.hooks, self.update = first.recipe, first.device, [], None
        self.model = stack([training.model for training in self.trainings])
        self.parameters = list(self.model.parameters())
        self.compile, self.even = compile, first.even
        self.steps_per_epoch, self.seconds, self.stopped = first.steps_per_epoch, 0.0, False
        self.streams = {"layers": stream("layers", self.recipe.seed, self.device)}
        self.restart_optimizer()

    @property
    def step(self) -> int:
        """Steps that each training has taken so far."""
        return self.trainings[0].step

    @property
    def history(self) -> list[list[dict[str, Any]]]:
        """The history of each training; its seconds are a share of those of all."""
        return [training.history for training in self.trainings]

    def begin_epoch(self) -> None:
        """Shuffle the data of each training and set the learning rate."""
        for training in self.trainings:
            training.begin_epoch()
        self.set_lr()

    @property
    def lr(self) -> float:
        """The learning rate, the same of all."""
        return self.trainings[0].lr

    @property
    def progress(self) -> Progress:
        """How far the trainings are."""
        return self.trainings[0].progress

    def index(self, steps: int) -> Tensor:
        """Return the observations of the next ``steps`` steps of each training, ``[steps, S, B]``."""
        return torch.stack([training.index(steps) for training in self.trainings], 1)

    def batches(self, index: Tensor) -> fast.Batches:
        """Draw the observations ``[S B, ...]`` and the noise of some steps, a training after the other."""
        each = [training.batches(index[:, s]) for s, training in enumerate(self.trainings)]
        steps = [zip(*step, strict=True) for step in zip(*each, strict=True)]
        return [(torch.cat(xs), join(noise)) for xs, noise in steps]

    def plain_step(self, x: Tensor, eps: Latent) -> Tensor:
        """Take one step of each training and return their mean bounds, ``[S]``."""
        self.optimizer.zero_grad()
        bound = objectives.backward(self.estimator, self.model.joint, self.model.encoder(x), x, eps)
        self.limit(self.parameters)
        self.optimizer.step()
        return self.mean(bound)

    def limit(self, parameters: Sequence[Tensor]) -> None:
        """Limit the gradient of each training as the recipe says."""
        if self.recipe.clip is not None:
            clip_gradient(parameters, self.recipe.clip, norm_of_each)

    def mean(self, bound: Tensor) -> Tensor:
        """Return the mean bound of each training, ``[S B] -> [S]``."""
        return bound.view(len(self.trainings), -1).mean(1)

    def generators(self) -> list[torch.Generator]:
        """Return all that :meth:`learn` draws from."""
        return [generator for training in self.trainings for generator in training.generators()]

    def note(self, bounds: Tensor) -> None:
        """Let each training count its steps, ``[steps, S]``, and write its history."""
        for training, mine in zip(self.trainings, bounds.unbind(1), strict=True):
            training.seconds = self.seconds / len(self.trainings)
            with of_seed(training):
                training.note(mine)

    def summary(self) -> str:
        """Say how the last epoch went."""
        last = [history[-1]["bound"] for history in self.history]
        return f"epoch {self.history[0][-1]['epoch']}: {sum(last) / len(last):.2f} nats on average"

    def state(self) -> dict[str, Any]:
        """Return the state of each training, under "runs", as :meth:`vaelib.training.Training.state` would."""
        states = []
        self.hand_back()
        for training in self.trainings:
            with of_seed(training):
                states.append(cloned(training.state()))
            training.optimizer.state.clear()
        return {"runs": states}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, bit for bit."""
        for training, mine in zip(self.trainings, state["runs"], strict=True):
            training.load_state(mine)
        self.seconds = sum(training.seconds for training in self.trainings)
        for stacked, views in self.views():
            states = [t.optimizer.state.pop(p, {}) for t, p in zip(self.trainings, views, strict=True)]
            if states[0]:
                self.optimizer.state[stacked] = {
                    key: torch.stack([each[key] for each in states]) if value.shape == views[0].shape else value
                    for key, value in states[0].items()
                }
        self.hasten()
        self.set_lr()

    def views(self) -> Iterator[tuple[nn.Parameter, tuple[nn.Parameter, ...]]]:
        """Yield each parameter with those of the trainings that are views of it."""
        for stacked, *views in zip(self.parameters, *(t.model.parameters() for t in self.trainings), strict=True):
            yield stacked, tuple(views)

    def hand_back(self) -> None:
        """Give every training its part of the optimiser's state."""
        for stacked, views in self.views():
            for s, (training, p) in enumerate(zip(self.trainings, views, strict=True)):
                if stacked in self.optimizer.state:
                    training.optimizer.state[p] = {
                        key: value[s] if value.shape == stacked.shape else value
                        for key, value in self.optimizer.state[stacked].items()
                    }

    def unstack(self) -> list[Training]:
        """Return the trainings as they are now, each by itself again; this stack must not be used any more."""
        self.hand_back()
        for training in self.trainings:
            training.optimizer.state.update({p: cloned(state) for p, state in training.optimizer.state.items()})
            for p in training.model.parameters():
                p.data = p.data.clone()
        return self.trainings


@contextmanager
def of_seed(training: Training) -> Iterator[None]:
    """Say in a Diverged which of the trainings it was."""
    try:
        yield
    except Diverged as error:
        raise Diverged(f"seed {training.recipe.seed}: {error}") from None


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""Of a module, which what takes its place in a stack does not have."""


def check_alike(first: Training, other: Training) -> None:
    """Raise InputError if two trainings differ in more than weights, seed and row."""
    if replace(other.recipe, seed=first.recipe.seed) != first.recipe:
        raise InputError("trainings side by side must have the same recipe, but for the seed")
    if first.steps_per_epoch != other.steps_per_epoch or first.device != other.device:
        raise InputError("trainings side by side must have equally many images, on the same device")
    if other.step:
        raise InputError("trainings can be stacked before their first step alone; load a state of them afterwards")
    for module in other.model.modules():
        if any(getattr(module, name) for name in HOOKS):
            raise InputError(f"a {type(module).__name__} of the model has a hook: train each model by itself")
    if hooked := fast.with_hook(other.model):
        raise InputError(f"parameter '{hooked}' has a hook, which a stack does not call: train each model by itself")
    if other.hooks or not other.fixed:
        raise InputError("a training with hooks, or an estimator that changes, cannot be stacked: train it by itself")


@torch.enable_grad()
def check_same(trainings: Sequence[Training], estimator: SideBySide) -> None:
    """Raise InputError unless two observations of each have the losses and slopes in the stack that they have alone."""
    model = stack([copy.deepcopy(t.model) for t in trainings])
    xs = [t.split.batch(slice(0, 2), stream("test", t.recipe.seed, t.device)) for t in trainings]
    qs = [as_posterior(t.model.encoder(x)) for t, x in zip(trainings, xs)]
    if any(map(draws_by_itself, qs)):
        raise InputError(f"a {type(qs[0]).__name__} draws its noise by itself: train each model by itself")
    noise = [q.noise(t.recipe.k, stream("test", t.recipe.seed, t.device, 1)) for t, q in zip(trainings, qs)]
    alone = [t.estimator.loss(t.model.joint, q, x, eps) for t, q, x, eps in zip(trainings, qs, xs, noise)]
    x = torch.cat(xs)
    together = estimator.loss(model.joint, model.encoder(x), x, join(noise))
    tolerance = 1e4 * torch.finfo(together.dtype).eps
    same = [torch.allclose(torch.cat(alone), together, rtol=tolerance, atol=tolerance, equal_nan=True)]
    each = zip(*(slopes(t.model, loss) for t, loss in zip(trainings, alone)), strict=True)
    for whole, parts in zip(slopes(model, together / len(trainings)), each, strict=True):
        size = tolerance * max(1.0, whole.abs().max().item())
        same.append(torch.allclose(torch.stack(parts).view_as(whole), whole, rtol=tolerance, atol=size, equal_nan=True))
    if not all(same):
        raise InputError(
            "the stacked model does not do what each model does alone, as with a layer that draws or mixes the "
            "observations of a batch: train each model by itself"
        )


def slopes(model: nn.Module, loss: Tensor) -> Sequence[Tensor]:
    """Return the gradient of a summed loss in each parameter of a model that learns, 0 where there is none."""
    learning = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(loss.sum(), learning, materialize_grads=True) if loss.requires_grad else ()


def join(noise: Sequence[Latent]) -> Latent:
    """Join noises along the batch axis, layer by layer."""
    if isinstance(noise[0], tuple):
        return tuple(torch.cat(layers, 1) for layers in zip(*noise, strict=True))
    return torch.cat(list(noise), 1)


def cloned(state: Any) -> Any:
    """Return a state whose tensors are views of nothing."""
    if isinstance(state, dict):
        return type(state)((key, cloned(value)) for key, value in state.items())
    if isinstance(state, list):
        return [cloned(value) for value in state]
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
        as for :class:`vaelib.training.Training`.
    recipe
        the other fields of :class:`vaelib.config.Recipe`.
    """
    rows = [estimators] * len(models) if isinstance(estimators, str | Estimator) else list(estimators)
    seeds = list(range(len(models)) if seeds is None else seeds)
    if not len(models) == len(rows) == len(seeds):
        raise InputError(f"there are {len(models)} models, {len(rows)} estimators and {len(seeds)} seeds")
    stacked = StackedTraining(
        [
            Training(model, split, known.get(row), Recipe.of(**recipe, seed=seed))
            for model, row, seed in zip(models, rows, seeds, strict=True)
        ],
        compile,
    )
    stacked.run(progress=progress)
    stacked.unstack()
    return stacked.history
