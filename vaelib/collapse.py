r"""Inference lag and posterior collapse: training the encoder before the decoder, and what else was tried against it.

A decoder that can model the data without z learns to ignore it while the encoder still lags behind: q(z given x) stays
at the prior, the posterior *collapses*, and no gradient brings it back. "Lagging Inference Networks" (He et al. 2019)
trains the encoder to the end of its way before each step of the decoder (:func:`aggressive_step`), for as long as that
adds mutual information (:data:`RULES`). Its rivals change the objective (:func:`elbo_kl`: a weight on the KL, free
bits) or the encoder (:class:`SemiAmortised`). :data:`METHODS` lists them all as data, :func:`fit` trains any of them.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vaelib import evaluation, objectives
from vaelib.data import Sentences, Split
from vaelib import estimators as known
from vaelib.errors import InputError, between, choose, positive, true_or_false, whole_number
from vaelib.estimators import Estimator, LossEstimator
from vaelib.posteriors import DiagonalGaussian
from vaelib.training import Trainer, stream

# --- the objective ----------------------------------------------------------------------------------------------------


def elbo_kl(weight: float = 1.0, free_bits: float = 0.0) -> LossEstimator:
    r"""Return the ELBO in its KL form, with a weight on the divergence and bits that are free.

    .. math:: \mathbb E_q[\log p(x \mid z)]
        - \beta \sum_d \max\big(\lambda, \mathrm{KL}(q(z_d \mid x) \,\|\, p(z_d))\big)

    The KL is in closed form; with free bits :math:`\lambda > 0` each dimension's is first averaged over the minibatch
    (Kingma et al. 2016). With :math:`\beta = 1` and :math:`\lambda = 0` it is the ELBO; otherwise its value bounds
    nothing. The joint density must know its ``log_likelihood``, and the prior be standard normal.
    Introduced in book/04-inference-lag.ipynb.
    """

    def loss(joint: nn.Module, posterior: DiagonalGaussian, x: Tensor, eps: Tensor) -> Tensor:
        rate = posterior.kl() if not free_bits else kl_by_dimension(posterior).mean(0).clamp_min(free_bits).sum()
        return weight * rate - joint.log_likelihood(x, posterior.sample(eps)).mean(0)

    target = "elbo" if weight == 1 and not free_bits else None
    return LossEstimator(f"elbo-kl({weight:g}, {free_bits:g})", "elbo", target, 1, "he2019", loss)


def kl_by_dimension(posterior: DiagonalGaussian) -> Tensor:
    r"""Return :math:`\mathrm{KL}(q(z_d \mid x) \,\|\, \mathcal N(0, 1))` of each dimension, ``[B, D]``."""
    return DiagonalGaussian(posterior.mean.unsqueeze(-1), posterior.log_std.unsqueeze(-1)).kl()


def constant(epoch: float, recipe: Recipe) -> float:
    r"""The same weight, :math:`\beta`, throughout (Higgins et al. 2017)."""
    return recipe.beta


def linear(epoch: float, recipe: Recipe) -> float:
    """From ``start`` to 1 in the first ``warm_up`` epochs (Bowman et al. 2016)."""
    return min(1.0, recipe.start + (1 - recipe.start) * epoch / recipe.warm_up)


def cyclical(epoch: float, recipe: Recipe) -> float:
    """From 0 to 1 in the first part, ``ratio``, of each of ``cycles`` cycles (Fu et al. 2019: 4 cycles, one half)."""
    through = epoch * recipe.cycles / recipe.epochs % 1
    return min(1.0, through / recipe.ratio)


WEIGHTS: dict[str, Callable[[float, Recipe], float]] = {"constant": constant, "linear": linear, "cyclical": cyclical}
"""The weight on the KL by name, as a function of the epochs so far, a fraction."""


# --- the aggressive schedule ------------------------------------------------------------------------------------------


def aggressive_step(
    model: nn.Module,
    estimator: Estimator,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    draw: Callable[[], Tensor],
    noise: Callable[[Tensor], Tensor],
    *,
    block: int = 15,
    most: int = 99,
    clip: float | None = 5.0,
    joint_clip: bool = True,
    units: Callable[[Tensor], int] = len,
) -> tuple[Tensor, int]:
    """Train the encoder until it gets no better, then move the decoder once; return bounds and the encoder's steps.

    (Algorithm 1 of He et al. 2019, as their code has it.) The encoder's first batch is ``x``, then come random ones. It
    stops when a block of batches has a higher loss per unit than the block before, so after two blocks at the earliest,
    or after ``most`` steps. The decoder's step is on ``x``. Introduced in book/04-inference-lag.ipynb.

    Parameters
    ----------
    model, estimator
        a model with ``joint`` and ``encoder``, and a row of the tableau or any other estimator.
    optimizer
        of both; it leaves alone what has no gradient, moments included, and so serves as two optimisers.
    x
        the batch of the decoder's step.
    draw, noise
        ``draw()`` returns a random batch, ``noise(x)`` the noise for one.
    block, most
        steps of the encoder from one look at the loss to the next, and in all.
    clip, joint_clip
        the largest norm of the gradient; that of encoder and decoder together, as published, or of each alone. (Clipped
        together, the decoder's gradient shortens the encoder's steps.)
    units
        counts what the loss is averaged over: words of a batch, or images.
    """
    batch, before, loss, count = x, math.inf, 0.0, 0
    for steps in range(1, most + 1):
        loss = loss - gradient(model, estimator, batch, noise(batch), clip, joint_clip).sum()
        count += units(batch)
        model.joint.zero_grad()
        optimizer.step()
        if steps % block == 0:
            mean = float(loss) / count
            if mean > before:
                break
            before, loss, count = mean, 0.0, 0
        batch = draw()

    bound = gradient(model, estimator, x, noise(x), clip, joint_clip)
    model.encoder.zero_grad()
    optimizer.step()
    return bound, steps


def gradient(
    model: nn.Module,
    estimator: Estimator,
    x: Tensor,
    eps: Tensor,
    clip: float | None = 5.0,
    joint_clip: bool = True,
) -> Tensor:
    """Put the clipped gradient of ``-bound.mean()`` into ``.grad`` and return the bound, ``[B]``."""
    model.zero_grad()
    bound = objectives.backward(estimator, model.joint, model.encoder(x), x, eps)
    if clip is not None:
        for part in (model,) if joint_clip else (model.joint, model.encoder):
            nn.utils.clip_grad_norm_(part.parameters(), clip)
    return bound


def first_drop(mi: Sequence[float]) -> bool:
    """The text's rule: the aggressive phase is over once an epoch has less mutual information than the one before."""
    return any(now < before for before, now in pairwise(mi))


def five_misses(mi: Sequence[float]) -> bool:
    """The images' rule: it is over at the fifth epoch, counting all, with less mutual information than the best."""
    return sum(now < best for best, now in zip(accumulate(mi, max), mi[1:])) >= 5


RULES: dict[str, Callable[[Sequence[float]], bool]] = {"first-drop": first_drop, "five-misses": five_misses}
"""When the aggressive phase ends, given the mutual information on the validation set after each epoch so far."""


# --- semi-amortised inference -----------------------------------------------------------------------------------------


class SemiAmortised(nn.Module):
    r"""An encoder whose answer is improved by gradient steps on the ELBO of each batch (SA-VAE, Kim et al. 2018).

    .. math:: v_{i+1} = m\, v_i + \nabla_\lambda \mathrm{ELBO}(\lambda_i), \qquad
        \lambda_{i+1} = \lambda_i + \eta\, v_{i+1}

    from :math:`\lambda_0 = (\mu, \log \sigma^2)` of the encoder. The steps are differentiable, so that training the
    last :math:`\lambda` trains the encoder to give a good start, and the decoder through all of them. The derivative is
    exact, by differentiating twice, where the authors take finite differences; only the factor that clips is held
    constant. As in their code the ELBO is the batch's mean, so a sentence's step is shorter in a larger batch.
    Introduced in book/04-inference-lag.ipynb.

    Parameters
    ----------
    encoder, joint
        the encoder to start from, and the joint density; a diagonal Gaussian posterior and a standard normal prior.
    steps, lr, momentum, clip
        how many steps, their size, the share of the last one in the next, and the largest norm of a gradient.
    generator
        draws the noise of each step.

    Attributes
    ----------
    weight : float
        on the KL, in the steps as in training.
    """

    def __init__(
        self,
        encoder: nn.Module,
        joint: nn.Module,
        steps: int = 10,
        lr: float = 1.0,
        momentum: float = 0.5,
        clip: float = 5.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.weight = encoder, 1.0
        self._joint = (joint,)  # no child of this module: its parameters are the decoder's
        self.steps, self.lr, self.momentum, self.clip, self.generator = steps, lr, momentum, clip, generator

    def forward(self, x: Tensor) -> DiagonalGaussian:
        """Return the improved posterior for ``x``."""
        learning = torch.is_grad_enabled()
        posterior = self.encoder(x)
        start = (posterior.mean, 2 * posterior.log_std)
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):  # its LSTM has no second derivative
            here = start if learning else tuple(part.detach().requires_grad_() for part in start)
            velocity = tuple(map(torch.zeros_like, here))
            for _ in range(self.steps):
                slope = torch.autograd.grad(self.elbo(x, *here), here, create_graph=learning)
                shrink = [(self.clip / (part.detach().norm() + 1e-6)).clamp_max(1.0) for part in slope]
                velocity = [self.momentum * v + s * g for v, g, s in zip(velocity, slope, shrink)]
                here = tuple(part + self.lr * v for part, v in zip(here, velocity))
        mean, log_variance = here if learning else (part.detach() for part in here)
        return DiagonalGaussian(mean, 0.5 * log_variance)

    def elbo(self, x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        """Return the batch's mean ELBO at a posterior, ``[]``."""
        posterior = DiagonalGaussian(mean, 0.5 * log_variance)
        eps = posterior.noise(1, self.generator)
        return -elbo_kl(self.weight).loss(self._joint[0], posterior, x, eps).mean()


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are those of He et al. (2019) for text. See :data:`IMAGES` for theirs for images.

    Attributes
    ----------
    epochs, batch_size, k, seed
        as in :class:`vaelib.config.Recipe`.
    optimizer, lr
        a key of :data:`OPTIMIZERS`, and its first step size.
    clip, joint_clip, block, most
        as for :func:`aggressive_step`.
    patience, first_decay, decays
        halve the step size, and go back to the best weights, after ``patience`` epochs on end without a better
        validation loss, not before epoch ``first_decay``; stop after ``decays`` such times.
    estimator
        a key of :func:`vaelib.estimators.every`, or None for :func:`elbo_kl`, which the next three are for.
    weight, beta, start, warm_up, cycles, ratio
        a key of :data:`WEIGHTS`, and what the weights there are made of.
    free_bits
        nats a dimension.
    svi_steps
        of :class:`SemiAmortised`; 0 for none.
    aggressive, rule
        whether to begin with the aggressive phase, and a key of :data:`RULES` for its end.

    Raises
    ------
    InputError
        for a value that cannot be meant.
    """

    epochs: int = 100
    batch_size: int = 32
    k: int = 1
    seed: int = 0
    optimizer: str = "sgd"
    lr: float = 1.0
    clip: float | None = 5.0
    joint_clip: bool = True
    block: int = 15
    most: int = 99
    patience: int = 2
    first_decay: int = 15
    decays: int = 5
    estimator: str | None = None
    weight: str = "constant"
    beta: float = 1.0
    start: float = 0.1
    warm_up: float = 10
    cycles: int = 4
    ratio: float = 0.5
    free_bits: float = 0.0
    svi_steps: int = 0
    aggressive: bool = False
    rule: str = "first-drop"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "k", "block", "most", "patience", "decays", "cycles"):
            whole_number(name, getattr(self, name), least=1)
        for name in ("seed", "first_decay", "svi_steps"):
            whole_number(name, getattr(self, name), least=0)
        for name in ("lr", "warm_up", "ratio") + (("clip",) if self.clip is not None else ()):
            positive(name, getattr(self, name))
        for name, most in (("beta", math.inf), ("free_bits", math.inf), ("start", 1.0), ("ratio", 1.0)):
            between(name, getattr(self, name), 0.0, most)
        for name in ("joint_clip", "aggressive"):
            true_or_false(name, getattr(self, name))
        choose("optimizer", self.optimizer, OPTIMIZERS)
        choose("weight", self.weight, WEIGHTS)
        choose("rule", self.rule, RULES)
        if self.estimator is not None:
            known.get(self.estimator).check(self.k)
            if (self.weight, self.beta, self.free_bits) != ("constant", 1.0, 0.0):
                raise InputError(
                    f"estimator '{self.estimator}' has no weight on the KL and no free bits: leave these out, or it"
                )


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}

TEXT = Recipe()
IMAGES = Recipe(
    epochs=1000, batch_size=50, optimizer="adam", lr=1e-3, block=10, patience=20, first_decay=0, rule="five-misses"
)
"""The recipe of He et al. (2019) for Omniglot."""

METHODS: dict[str, Mapping[str, Any]] = {
    "plain": {},
    "anneal": {"weight": "linear"},
    "beta": {"beta": 0.4},
    "cyclical": {"weight": "cyclical"},
    "free-bits": {"free_bits": 0.5},
    "sa-vae": {"svi_steps": 10},
    "sa-vae-anneal": {"svi_steps": 10, "weight": "linear"},
    "aggressive": {"aggressive": True},
    "aggressive-anneal": {"aggressive": True, "weight": "linear"},
}
"""What each method changes in a recipe: ``replace(TEXT, **METHODS["aggressive"])``."""


class Training(Trainer):
    """A training by any of :data:`METHODS`, of text or images; a :class:`vaelib.training.Trainer` to all who save one.

    Introduced in book/04-inference-lag.ipynb.

    Parameters
    ----------
    model
        with ``joint`` (which knows its ``log_likelihood``) and ``encoder``; trained in place, and left with the best
        weights. With ``svi_steps`` its encoder is put into a :class:`SemiAmortised` one.
    train, valid
        the data, on the device of the model.
    recipe
        how.
    clock
        what tells the seconds: the wall clock, or :func:`time.process_time` on a machine that others work on too.

    Attributes
    ----------
    history : list of dict
        one record an epoch: "epoch", "step", "bound" (of the training objective, a batch's mean), "lr", "weight",
        "aggressive" (whether this epoch was), what :func:`measure` says of the validation set, and :attr:`cost`.
    cost : dict
        "seconds" spent in steps, "aggressive_seconds" in aggressive ones, and "encoder_steps" taken.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Split | Sentences,
        valid: Split | Sentences,
        recipe: Recipe = TEXT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if recipe.batch_size > len(train):
            raise InputError(
                f"batch_size is {recipe.batch_size}, but there are only {len(train)} training observations"
            )
        self.model, self.split, self.recipe, self.clock = model, train, recipe, clock
        self.device = next(model.parameters()).device
        self.valid = valid.batch(slice(None), stream("test", recipe.seed, self.device))
        self.steps_per_epoch = len(train) // recipe.batch_size
        self.streams = {
            name: stream(name, recipe.seed, "cpu" if name == "order" else self.device)
            for name in ("order", "binarisation", "noise")
        }
        if recipe.svi_steps:
            model.encoder = SemiAmortised(model.encoder, model.joint, recipe.svi_steps, generator=self.streams["noise"])
        self.optimizer = OPTIMIZERS[recipe.optimizer](model.parameters(), recipe.lr)
        self.step, self.seconds, self.history = 0, 0.0, []
        self.order = torch.arange(len(train), device=self.device)[: self.steps_per_epoch * recipe.batch_size]
        self.bounds = torch.zeros(self.steps_per_epoch, device=self.device)
        self.aggressive = recipe.aggressive
        self.best, self.plateau = (
            copy.deepcopy(model.state_dict()),
            {"best": math.inf, "mark": math.inf, "bad": 0, "decays": 0},
        )
        self.cost = {"seconds": 0.0, "aggressive_seconds": 0.0, "encoder_steps": 0}
        self.units = getattr(train, "units", len)

    @property
    def total_steps(self) -> int:
        """Steps after which the training is over; it may end early."""
        return self.step if self.plateau["decays"] == self.recipe.decays else super().total_steps

    @property
    def estimator(self) -> Estimator:
        """What this step climbs."""
        recipe = self.recipe
        return known.get(recipe.estimator) if recipe.estimator else elbo_kl(self.weight, recipe.free_bits)

    @property
    def weight(self) -> float:
        """The weight on the KL in this step."""
        return WEIGHTS[self.recipe.weight](self.step / self.steps_per_epoch, self.recipe)

    def run(self, after_step: Callable[[], None] = lambda: None, progress: bool = False) -> list[dict[str, Any]]:
        """Train to the recipe's end, from wherever :attr:`step` stands; leave the best weights; return the history."""
        self.model.train()
        super().run(after_step, progress)
        self.model.load_state_dict(self.best)
        self.model.eval()
        return self.history

    def update(self, x: Tensor) -> Tensor:
        """Learn from one batch and return its mean bound, ``[]``."""
        start, recipe, steps = self.clock(), self.recipe, 1
        estimator, noise = self.estimator, lambda x: self.model.encoder(x).noise(recipe.k, self.streams["noise"])
        if recipe.svi_steps:
            self.model.encoder.weight = self.weight
        with own_randomness(self.streams["noise"]):
            if self.aggressive:
                bound, steps = aggressive_step(
                    self.model, estimator, self.optimizer, x, self.random_batch, noise,
                    block=recipe.block, most=recipe.most, clip=recipe.clip, joint_clip=recipe.joint_clip,
                    units=self.units,
                )  # fmt: skip
            else:
                bound = gradient(self.model, estimator, x, noise(x), recipe.clip, recipe.joint_clip)
                self.optimizer.step()
        took = self.clock() - start
        self.cost["seconds"] += took
        self.cost["aggressive_seconds"] += took * self.aggressive
        self.cost["encoder_steps"] += steps
        return bound.mean()

    def random_batch(self) -> Tensor:
        """Return one of this epoch's batches, drawn with replacement."""
        i = int(torch.randint(self.steps_per_epoch, (), generator=self.streams["order"])) * self.recipe.batch_size
        return self.split.batch(self.order[i : i + self.recipe.batch_size], self.streams["binarisation"])

    def begin_epoch(self) -> None:
        """Shuffle the data; of sentences, those in a batch are about equally long."""
        order = torch.randperm(len(self.split), generator=self.streams["order"])[: len(self.order)]
        if isinstance(self.split, Sentences):
            order = order[self.split.lengths.cpu()[order].argsort(stable=True)]
        batches = order.view(self.steps_per_epoch, -1)
        shuffled = torch.randperm(self.steps_per_epoch, generator=self.streams["order"])
        self.order = batches[shuffled].flatten().to(self.device)

    def end_epoch(self) -> None:
        """Measure, add the epoch to the history, and decide on what comes next."""
        super().end_epoch()
        self.model.eval()
        noise = stream("test", self.recipe.seed, self.device, self.step)
        with own_randomness(noise):
            measured = measure(self.model, self.valid, self.recipe.batch_size, noise)
        self.model.train()
        self.history[-1].update(weight=self.weight, aggressive=self.aggressive, **measured)
        self.history[-1].update({**self.cost})
        self.aggressive &= not RULES[self.recipe.rule]([record["mi"] for record in self.history])
        self.look_at_loss(measured["nll_bound"])

    def look_at_loss(self, loss: float) -> None:
        """Keep the best weights; where the validation loss stands still, go back to them with half the step size."""
        at, recipe = self.plateau, self.recipe
        if loss < at["best"]:
            at["best"], self.best = loss, copy.deepcopy(self.model.state_dict())
        if loss < at["mark"]:
            at["mark"], at["bad"] = loss, 0
            return
        at["bad"] += 1
        if at["bad"] >= recipe.patience and len(self.history) > recipe.first_decay:
            at.update(mark=loss, bad=0, decays=at["decays"] + 1)  # the mark as in the authors' code
            self.model.load_state_dict(self.best)
            lr = self.optimizer.param_groups[0]["lr"] / 2
            self.optimizer = OPTIMIZERS[recipe.optimizer](self.model.parameters(), lr)

    def state_dict(self) -> dict[str, Any]:
        """Return all that :meth:`load_state_dict` needs to go on bit for bit; raises as the Trainer's."""
        own = {name: getattr(self, name) for name in ("aggressive", "best", "plateau", "cost")}
        return {**super().state_dict(), **own, "vocabulary": vocabulary_of(self.split)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, bit for bit.

        Raises
        ------
        InputError
            if it was trained on another vocabulary.
        """
        check_vocabulary(state["vocabulary"], vocabulary_of(self.split))
        super().load_state_dict(state)
        for name in ("aggressive", "best", "plateau", "cost"):
            setattr(self, name, state[name])


def fit(
    model: nn.Module,
    train: Split | Sentences,
    valid: Split | Sentences,
    method: str = "plain",
    recipe: Recipe = TEXT,
    progress: bool = False,
    after_step: Callable[[Training], None] | None = None,
    **changes: Any,
) -> list[dict[str, Any]]:
    """Train ``model`` in place, in memory, by one of :data:`METHODS`; return its history, one record an epoch.

    ``fit(model, text.train, text.valid, "aggressive", epochs=5, seed=0)``; ``changes`` are fields of the
    :class:`Recipe`. ``after_step(training)`` is called after each step, for a look at it.
    Introduced in book/04-inference-lag.ipynb.
    """
    changes = {**choose("method", method, METHODS), **changes}
    training = Training(model, train, valid, replace(recipe, **changes))
    return training.run((lambda: after_step(training)) if after_step else (lambda: None), progress)


@torch.no_grad()
def measure(
    model: nn.Module, x: Tensor, batch_size: int = 32, generator: torch.Generator | None = None
) -> dict[str, float]:
    r"""Return what tells a collapse, over ``x`` ``[N, ...]``: a model that ignores z has KL, MI and AU near 0.

    "nll_bound", the negative ELBO, one draw each; "kl", the mean :math:`\mathrm{KL}(q(z \mid x) \,\|\, p(z))`;
    "mi", the paper's mutual information with q(z) from each batch, and "mi_all", with q(z) from all of ``x``
    (:func:`vaelib.evaluation.mutual_information`), all in nats; "au", the active units.
    Introduced in book/04-inference-lag.ipynb.
    """
    estimator, loss, kl = elbo_kl(), 0.0, 0.0
    for batch in x.split(batch_size):
        posterior = model.encoder(batch)
        eps = posterior.noise(1, generator)
        loss += estimator.loss(model.joint, posterior, batch, eps).double().sum().item()
        kl += posterior.kl().double().sum().item()
    return {
        "nll_bound": loss / len(x),
        "kl": kl / len(x),
        "mi": evaluation.mutual_information(model.encoder, x, batch_size, generator, chunk=batch_size),
        "mi_all": evaluation.mutual_information(model.encoder, x, None, generator, chunk=batch_size),
        "au": sum(evaluation.active_units(model.encoder, x, batch_size=batch_size)),
    }


@torch.no_grad()
def posterior_mean(joint: nn.Module, x: Tensor, grid: Tensor | None = None, chunk: int = 5) -> Tensor:
    r"""Return the mean of the model's own posterior p(z given x) by a sum over a grid, ``[N, D]``.

    .. math:: \frac{\sum_g p(x, z_g)\, z_g}{\sum_g p(x, z_g)}

    It is where a perfect encoder's mean would be; beside the mean of q(z given x) it spans the plane in which He et al.
    (2019) show the lag. Introduced in book/04-inference-lag.ipynb.

    Parameters
    ----------
    joint
        log p(x, z).
    x
        observations, ``[N, ...]``.
    grid
        the values of z, ``[G, D]``; None for the paper's 400 from -20 to 20, for a z of one dimension.
    chunk
        observations at a time; each meets all of the grid.
    """
    if grid is None:
        grid = torch.arange(-200, 200, device=x.device).unsqueeze(1) / 10
    means = []
    for part in x.split(chunk):
        log_p = joint(part, grid.unsqueeze(1).expand(-1, len(part), -1))
        means.append(log_p.softmax(0).mT @ grid)
    return torch.cat(means)


@contextmanager
def own_randomness(generator: torch.Generator) -> Iterator[None]:
    """Let what draws from torch's global generator, such as dropout, draw by ``generator``; restore the global one."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng([generator.device] if generator.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def vocabulary_of(split: Split | Sentences) -> list[str]:
    """Return the words of a text; none for images."""
    return list(split.vocabulary.words) if isinstance(split, Sentences) else []


def check_vocabulary(stored: Sequence[str], found: Sequence[str]) -> None:
    """Raise InputError, with the first difference, if a checkpoint's vocabulary is not the data's."""
    if list(stored) != list(found):
        size = f"{len(stored)} words and the data's {len(found)}"
        i = next((i for i, (a, b) in enumerate(zip(stored, found)) if a != b), min(len(stored), len(found)))
        a, b = (f"'{words[i]}'" if i < len(words) else "none" for words in (stored, found))
        raise InputError(
            f"the checkpoint's vocabulary has {size}, and word {i} is {a} there and {b} here: load the data set with "
            "the options it was trained with"
        )
