r"""Inference lag and posterior collapse: training the encoder before the decoder, and what else was tried against it.

A decoder that can model the data without z learns to ignore it while the encoder still lags behind: q(z given x) stays
at the prior, the posterior *collapses*, and no gradient brings it back. "Lagging Inference Networks" (He et al. 2019)
trains the encoder to the end of its way before each step of the decoder (:func:`aggressive_step`), for as long as that
adds mutual information (:data:`RULES`). Its rivals change the objective (:func:`elbo_kl`: a weight on the KL, free
bits) or the encoder (:class:`SemiAmortised`). :data:`METHODS` lists them all as data; :func:`fit` trains by any of
them, in the loop of :mod:`vaelib.training` with hooks: :class:`Validation`, :class:`Aggressive`, :class:`Plateau` and
:class:`Amortisation`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vaelib import evaluation
from vaelib.bounds import divergence, log_likelihood, prior_of
from vaelib.config import Recipe, setting
from vaelib.data import Sentences, Split
from vaelib.errors import InputError, between, choose, positive, true_or_false, whole_number
from vaelib.estimators import Estimator, LossEstimator
from vaelib.estimators.tableau import check_path
from vaelib.optimizers import Limited, shrinkage
from vaelib.posteriors import DiagonalGaussian, as_posterior
from vaelib.training import Hook, Progress, Training, drawing_from, gradient, offspring, stream, train_step

# --- the objective ----------------------------------------------------------------------------------------------------


def elbo_kl(weight: float = 1.0, free_bits: float = 0.0) -> LossEstimator:
    r"""Return the ELBO in its KL form, with a weight on the divergence and bits that are free.

    .. math:: \mathbb E_q[\log p(x \mid z)]
        - \beta \sum_d \max\big(\lambda, \mathrm{KL}(q(z_d \mid x) \,\|\, p(z_d))\big)

    The KL is in closed form; with free bits :math:`\lambda > 0` each dimension's is first averaged over the minibatch
    (Kingma et al. 2016). With :math:`\beta = 1` and :math:`\lambda = 0` it is the ELBO; otherwise its value bounds
    nothing. The joint density must know its ``log_likelihood``, and with free bits the prior be standard normal.
    Introduced in book/05-inference-lag.ipynb.
    """

    def loss(joint: nn.Module, posterior: DiagonalGaussian, x: Tensor, eps: Tensor) -> Tensor:
        if free_bits:
            prior_of(joint, posterior)  # the standard normal, or it says so
            rate = kl_by_dimension(posterior).mean(0).clamp_min(free_bits).sum()
        else:
            rate = divergence(joint, posterior)
        z = posterior.sample(eps)
        check_path(name, posterior, z, eps)
        return weight * rate - log_likelihood(joint, x, z).mean(0)

    name, target = f"elbo-kl({weight:g}, {free_bits:g})", "elbo" if weight == 1 and not free_bits else None
    return LossEstimator(name, "elbo", target, 1, "he2019", loss)


def kl_by_dimension(posterior: DiagonalGaussian) -> Tensor:
    r"""Return :math:`\mathrm{KL}(q(z_d \mid x) \,\|\, \mathcal N(0, 1))` of each dimension, ``[B, D]``."""
    if not isinstance(posterior, DiagonalGaussian):
        raise InputError(f"free bits are for a DiagonalGaussian, but this one is a {type(posterior).__name__}")
    return posterior.kl_by_dimension()


def constant(progress: Progress, recipe: LagRecipe) -> float:
    r"""The same weight, :math:`\beta`, throughout (Higgins et al. 2017)."""
    return recipe.beta


def linear(progress: Progress, recipe: LagRecipe) -> float:
    """From ``start`` to 1 in the first ``warm_up`` epochs (Bowman et al. 2016)."""
    return min(1.0, recipe.start + (1 - recipe.start) * progress.epoch / recipe.warm_up)


def cyclical(progress: Progress, recipe: LagRecipe) -> float:
    """From 0 to 1 in the first part, ``ratio``, of each of ``cycles`` cycles (Fu et al. 2019: 4 cycles, one half)."""
    through = progress.epoch * recipe.cycles / recipe.epochs % 1
    return min(1.0, through / recipe.ratio)


WEIGHTS: dict[str, Callable[[Progress, LagRecipe], float]] = {
    "constant": constant,
    "linear": linear,
    "cyclical": cyclical,
}
"""The weight on the KL by name."""


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
    or after ``most`` steps. The decoder's step is on ``x``. Introduced in book/05-inference-lag.ipynb.

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
        optimizer.zero_grad()
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

    optimizer.zero_grad()
    bound = gradient(model, estimator, x, noise(x), clip, joint_clip)
    model.encoder.zero_grad()
    optimizer.step()
    return bound, steps


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
    exact, by differentiating twice, where the authors take finite differences, but for what limits its growth: as in
    their code (which does so before it takes the difference, too), the norm of a gradient is limited on the way there,
    of mean and of log-variance, and at each step on the way back, of both together, and of what the step adds to the
    decoder's gradient. Without the latter, one long step makes the next decoder a worse one to take steps on.
    As in their code the ELBO is the batch's mean, so a sentence's step is shorter in a larger batch.
    Introduced in book/05-inference-lag.ipynb.

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
        posterior, elbo = gaussian(self.encoder(x)), Elbo(self._joint[0], elbo_kl(self.weight))
        start = (posterior.mean, 2 * posterior.log_std)
        parameters = {name: p for name, p in elbo.named_parameters() if p.requires_grad and learning}
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):  # its LSTM has no second derivative
            here = tuple(p if learning and p.requires_grad else p.detach().requires_grad_() for p in start)
            velocity = tuple(map(torch.zeros_like, here))
            for _ in range(self.steps):
                here = Limited.apply(self.clip, *here)
                decoder = dict(zip(parameters, Limited.apply(self.clip, *parameters.values())))
                value = functional_call(elbo, decoder, (x, *here, self.generator))
                slope = torch.autograd.grad(value, here, create_graph=learning)
                shrink = [shrinkage([part.detach()], self.clip) for part in slope]
                velocity = [self.momentum * v + s * g for v, g, s in zip(velocity, slope, shrink)]
                here = tuple(part + self.lr * v for part, v in zip(here, velocity))
        mean, log_variance = here if learning else (part.detach() for part in here)
        return DiagonalGaussian(mean, 0.5 * log_variance)


def gaussian(q: Any) -> DiagonalGaussian:
    """Return a posterior that is a diagonal Gaussian, or raise InputError."""
    q = as_posterior(q)
    if not isinstance(q, DiagonalGaussian):
        raise InputError(f"this needs an encoder that returns a DiagonalGaussian, but it returns a {type(q).__name__}")
    return q


class Elbo(nn.Module):
    """A batch's mean ELBO at a posterior, as a function of that and of the joint density's parameters."""

    def __init__(self, joint: nn.Module, objective: LossEstimator) -> None:
        super().__init__()
        self.joint, self.objective = joint, objective

    def forward(self, x: Tensor, mean: Tensor, log_variance: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return it, ``[]``."""
        posterior = DiagonalGaussian(mean, 0.5 * log_variance)
        return -self.objective.loss(self.joint, posterior, x, posterior.noise(1, generator)).mean()


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LagRecipe(Recipe):
    """A recipe with what was tried against collapse; the defaults are those of He et al. (2019) for text.

    See :data:`IMAGES` for theirs for images, and :data:`METHODS` for what each method changes.

    Raises
    ------
    InputError
        for a value that cannot be meant.
    """

    batch_size: int = 32
    epochs: int = 100
    lr: float = 1.0
    optimizer: str = "sgd"
    clip: float | None = 5.0
    adam_eps: float = 1e-8
    joint_clip: bool = setting(True, "Clip the gradients of encoder and decoder together, as published.")
    patience: int = setting(2, "Epochs on end without a better validation loss before the step size is halved.")
    first_decay: int = setting(15, "Epochs at the beginning in which it is not.")
    decays: int = setting(5, "Stop after so many halvings.")
    estimator: str | None = setting(None, "Gradient estimator; None for the ELBO in its KL form, see elbo_kl.")
    weight: str = setting("constant", "The weight on the KL: constant (beta), linear or cyclical.")
    beta: float = setting(1.0, "The constant weight.")
    start: float = setting(0.1, "Where the linear weight begins.")
    warm_up: float = setting(10, "Epochs until it is 1.")
    cycles: int = setting(4, "Cycles of the cyclical weight.")
    ratio: float = setting(0.5, "The part of a cycle in which it rises.")
    free_bits: float = setting(0.0, "Nats a dimension that the KL does not cost.")
    svi_steps: int = setting(0, "Gradient steps on each batch's posterior (SA-VAE).")
    aggressive: bool = setting(False, "Begin with the aggressive phase.")
    rule: str = setting("first-drop", "What ends it: first-drop or five-misses.")
    block: int = setting(15, "Steps of the encoder from one look at the loss to the next.")
    most: int = setting(99, "Steps of the encoder before one of the decoder, at most.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("block", "most", "patience", "decays", "cycles"):
            whole_number(name, getattr(self, name), least=1)
        for name in ("first_decay", "svi_steps"):
            whole_number(name, getattr(self, name), least=0)
        for name in ("warm_up", "ratio"):
            positive(name, getattr(self, name))
        for name, most in (("beta", math.inf), ("free_bits", math.inf), ("start", 1.0), ("ratio", 1.0)):
            between(name, getattr(self, name), 0.0, most)
        for name in ("joint_clip", "aggressive"):
            true_or_false(name, getattr(self, name))
        if self.estimator is not None and (self.weight, self.beta, self.free_bits) != ("constant", 1.0, 0.0):
            raise InputError(
                f"estimator '{self.estimator}' has no weight on the KL and no free bits: leave these out, or it"
            )


TEXT = LagRecipe()
IMAGES = LagRecipe(
    epochs=1000, batch_size=50, optimizer="adam", lr=1e-3, block=10, patience=20, first_decay=0, rule="five-misses"
)
"""The recipe of He et al. (2019) for Omniglot."""


class Normalised(nn.Module):
    r"""An encoder whose means have a fixed spread over the batch, the BN-VAE's (Zhu et al. 2020).

    .. math:: \mu_d \to \gamma\, \frac{\mu_d - \bar\mu_d}{s_d} + b_d

    with mean and standard deviation over the batch, or in evaluation mode the running ones, and a learned shift. Since
    :math:`\sigma^2 - 1 - \log \sigma^2 \ge 0`, the mean KL to a standard normal prior is at least
    :math:`D \gamma^2 / 2`, so that q cannot collapse onto it. Idea in book/05-inference-lag.ipynb.

    Parameters
    ----------
    encoder
        gives a diagonal Gaussian of ``latent`` dimensions.
    spread
        the standard deviation :math:`\gamma` of the means, 0.6 as the authors'.
    """

    def __init__(self, encoder: nn.Module, latent: int, spread: float = 0.6) -> None:
        super().__init__()
        self.encoder, self.spread = encoder, spread
        self.norm = nn.BatchNorm1d(latent, eps=1e-12, affine=False)  # fresh means are tiny
        self.shift = nn.Parameter(torch.zeros(latent))

    def forward(self, x: Tensor) -> DiagonalGaussian:
        """Return q(z given x), ``[B, D]``."""
        q = gaussian(self.encoder(x))
        return DiagonalGaussian(self.spread * self.norm(q.mean) + self.shift, q.log_std)


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


class Aggressive(Hook):
    """Take the steps, aggressive ones for as long as the recipe's rule lets them, and add up what they cost.

    It adds "aggressive" (whether the epoch was), "seconds" spent in steps, "aggressive_seconds" in aggressive ones, and
    "encoder_steps" taken to the record of each epoch.
    """

    def __init__(self, recipe: LagRecipe, units: Callable[[Tensor], int], clock: Callable[[], float]) -> None:
        self.recipe, self.units, self.clock = recipe, units, clock
        self.ends = choose("rule", recipe.rule, RULES)
        self.active = recipe.aggressive
        self.cost = {"seconds": 0.0, "aggressive_seconds": 0.0, "encoder_steps": 0}

    def update(self, training: Training, x: Tensor) -> Tensor:
        """Learn from one batch and return its mean bound, ``[]``."""
        start, recipe, steps = self.clock(), self.recipe, 1
        what = (training.model, training.estimator, training.optimizer, x)
        with drawing_from(offspring(training.streams["noise"])):
            if self.active:
                bound, steps = aggressive_step(
                    *what, lambda: random_batch(training), training.noise, block=recipe.block, most=recipe.most,
                    clip=recipe.clip, joint_clip=recipe.joint_clip, units=self.units,
                )  # fmt: skip
            else:
                bound = train_step(*what, training.noise(x), recipe.clip, recipe.joint_clip)
        took = self.clock() - start
        self.cost["seconds"] += took
        self.cost["aggressive_seconds"] += took * self.active
        self.cost["encoder_steps"] += steps
        return bound.mean()

    def order(self, training: Training) -> Tensor:
        """Shuffle the data, then its batches; the sentences of a batch are about equally long."""
        split, shuffle = training.split, training.streams["order"]
        order = torch.randperm(len(split), generator=shuffle)[: len(training.order)]
        if isinstance(split, Sentences):
            order = order[split.lengths.cpu()[order].argsort(stable=True)]
        batches = order.view(training.steps_per_epoch, -1)
        return batches[torch.randperm(len(batches), generator=shuffle)].flatten()

    def after_epoch(self, training: Training, record: dict[str, Any]) -> None:
        """Note the cost, and end the phase where the mutual information says so."""
        record.update(aggressive=self.active, **self.cost)
        self.active &= not self.ends([epoch["mi"] for epoch in training.history])

    def state(self) -> dict[str, Any]:
        """Return whether the phase goes on, and the cost so far."""
        return {"active": self.active, "cost": dict(self.cost)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.active, self.cost = state["active"], dict(state["cost"])


def random_batch(training: Training) -> Tensor:
    """Return one of this epoch's batches, drawn with replacement."""
    size = training.recipe.batch_size
    i = int(torch.randint(training.steps_per_epoch, (), generator=training.streams["order"])) * size
    return training.split.batch(training.order[i : i + size], training.streams["binarisation"])


class Validation(Hook):
    """Add the weight on the KL, and what :func:`measure` says of the validation set, to the record of each epoch.

    Its state is the vocabulary of a text, so that no training goes on with another one.
    """

    def __init__(self, x: Tensor, weight: Callable[[Progress], float], words: Sequence[str]) -> None:
        self.x, self.weight, self.words = x, weight, list(words)

    def after_epoch(self, training: Training, record: dict[str, Any]) -> None:
        """Measure, with noise that follows from the seed and the step."""
        recipe, model = training.recipe, training.model
        noise = stream("test", recipe.seed, training.device, training.step)
        with drawing_from(offspring(noise)), evaluation.evaluating(model):
            record.update(weight=self.weight(training.progress), **measure(model, self.x, recipe.batch_size, noise))

    def state(self) -> list[str]:
        """Return the words."""
        return self.words

    def load_state(self, state: list[str]) -> None:
        """Raise InputError if it is of another vocabulary."""
        check_vocabulary(state, self.words)


class Plateau(Hook):
    """Keep the best weights; where the validation loss stands still, go back to them with half the step size."""

    def __init__(self, recipe: LagRecipe) -> None:
        self.recipe = recipe
        self.loss = {"best": math.inf, "mark": math.inf, "bad": 0, "decays": 0}
        self.best: dict[str, Tensor] | None = None

    def after_epoch(self, training: Training, record: dict[str, Any]) -> None:
        """Look at the loss on the validation set."""
        loss, at, recipe = record["nll_bound"], self.loss, self.recipe
        if loss < at["best"]:
            at["best"], self.best = loss, copy.deepcopy(training.model.state_dict())
        if loss < at["mark"]:
            at["mark"], at["bad"] = loss, 0
            return
        at["bad"] += 1
        if at["bad"] >= recipe.patience and len(training.history) > recipe.first_decay:
            at.update(mark=loss, bad=0, decays=at["decays"] + 1)  # the mark as in the authors' code
            self.go_back(training.model)
            training.decay /= 2
            training.restart_optimizer()
            training.stopped = at["decays"] == recipe.decays

    def finish(self, training: Training) -> None:
        """Leave the model with its best weights, in evaluation mode."""
        self.go_back(training.model)
        training.model.eval()

    def go_back(self, model: nn.Module) -> None:
        """Give the model its best weights."""
        if self.best is not None:
            model.load_state_dict(self.best)

    def state(self) -> dict[str, Any]:
        """Return the best weights and losses."""
        return {"loss": dict(self.loss), "best": self.best}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.loss, self.best = dict(state["loss"]), state["best"]


class Amortisation(Hook):
    """Keep the weight on the KL with which the posterior is improved."""

    def __init__(self, encoder: SemiAmortised) -> None:
        self.encoder = encoder

    def state(self) -> float:
        """Return the weight."""
        return self.encoder.weight

    def load_state(self, state: float) -> None:
        """Go on with this weight."""
        self.encoder.weight = state


def prepare(
    model: nn.Module,
    train: Split | Sentences,
    valid: Split | Sentences,
    recipe: LagRecipe = TEXT,
    clock: Callable[[], float] = time.monotonic,
) -> Training:
    """Return the training of text or images by any of :data:`METHODS`, before its first step.

    Introduced in book/05-inference-lag.ipynb.

    Parameters
    ----------
    model
        with ``joint`` (which knows its ``log_likelihood``) and ``encoder``; trained in place, and left with the best
        weights. With ``svi_steps`` its encoder is put into a :class:`SemiAmortised` one, and otherwise out of it.
    train, valid
        the data, on the device of the model.
    recipe
        how.
    clock
        what tells the seconds: the wall clock, or :func:`time.process_time` on a machine that others work on too.

    Returns
    -------
    Training
        whose history has besides what :class:`Aggressive` and :class:`Validation` note.
    """
    schedule = choose("weight", recipe.weight, WEIGHTS)
    encoder = model.encoder
    while isinstance(encoder, SemiAmortised):  # of an earlier training
        encoder = encoder.encoder
    amortised = SemiAmortised(encoder, model.joint, recipe.svi_steps)

    def weight(progress: Progress) -> float:
        return schedule(progress, recipe)

    def estimator(progress: Progress) -> Estimator:
        amortised.weight = weight(progress)
        return elbo_kl(amortised.weight, recipe.free_bits)

    x = valid.batch(slice(None), stream("test", recipe.seed, next(model.parameters()).device))
    words = train.vocabulary.words if isinstance(train, Sentences) else ()
    hooks = [
        Validation(x, weight, words),
        Aggressive(recipe, getattr(train, "units", len), clock),
        Plateau(recipe),
        Amortisation(amortised),
    ]
    training = Training(model, train, recipe.estimator or estimator, recipe, hooks)
    amortised.generator = training.streams["noise"]
    model.encoder = amortised if recipe.svi_steps else encoder
    model.train()
    return training


def fit(
    model: nn.Module,
    train: Split | Sentences,
    valid: Split | Sentences,
    method: str = "plain",
    recipe: LagRecipe = TEXT,
    progress: bool = False,
    after_step: Callable[[Training], None] | None = None,
    **changes: Any,
) -> list[dict[str, Any]]:
    """Train ``model`` in place, in memory, by one of :data:`METHODS`; return its history, one record an epoch.

    ``fit(model, text.train, text.valid, "aggressive", epochs=5, seed=0)``; ``changes`` are fields of the
    :class:`LagRecipe`. ``after_step(training)`` is called after each step, for a look at it.
    Introduced in book/05-inference-lag.ipynb.
    """
    changes = {**choose("method", method, METHODS), **changes}
    return prepare(model, train, valid, type(recipe).of(**{**vars(recipe), **changes})).run(after_step, progress)


@torch.no_grad()
def measure(
    model: nn.Module, x: Tensor, batch_size: int = 32, generator: torch.Generator | None = None
) -> dict[str, float]:
    r"""Return what tells a collapse, over ``x`` ``[N, ...]``: a model that ignores z has KL, MI and AU near 0.

    "nll_bound", the negative ELBO, one draw each; "kl", the mean :math:`\mathrm{KL}(q(z \mid x) \,\|\, p(z))`;
    "mi", the paper's mutual information with q(z) from each batch, and "mi_all", with q(z) from all of ``x``
    (:func:`vaelib.evaluation.mutual_information`), all in nats; "au", the active units.
    Introduced in book/05-inference-lag.ipynb.
    """
    estimator, loss, kl = elbo_kl(), 0.0, 0.0
    with evaluation.evaluating(model.joint, model.encoder):
        for batch in x.split(batch_size):
            posterior = as_posterior(model.encoder(batch))
            eps = posterior.noise(1, generator)
            loss += estimator.loss(model.joint, posterior, batch, eps).double().sum().item()
            kl += divergence(model.joint, posterior).double().sum().item()
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
    (2019) show the lag. Introduced in book/05-inference-lag.ipynb.

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
        parameter = next(joint.parameters(), x)
        grid = torch.arange(-200, 200, dtype=parameter.dtype, device=x.device).unsqueeze(1) / 10
    means = []
    with evaluation.evaluating(joint):
        for part in x.split(chunk):
            log_p = joint(part, grid.unsqueeze(1).expand(-1, len(part), -1))
            means.append(log_p.softmax(0).mT @ grid)
    return torch.cat(means)


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
