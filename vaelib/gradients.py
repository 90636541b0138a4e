r"""The gradient laboratory: what an estimator's gradient is like, over as many draws as it takes to know.

A *draw* is one estimate of the gradient of a bound, made from K fresh samples for each of the B observations.
:func:`draws` returns such gradients as they are; :func:`measure` streams any number of them through
:class:`Moments`, which keeps a few sums a coordinate; :func:`bias_test` compares the means of two estimators. Every
estimator sees the same noise, and the noise depends on the generator alone, not on how many draws are taken at once.

Which parameters the gradient is taken in is a key of :data:`WRT`:

=============  ============================================================================  ==========================
``wrt``        gradient of                                                                   coordinates, in this order
=============  ============================================================================  ==========================
"posterior"    each observation's own bound, in the numbers its posterior is made of,        field by field: mean
               such as ``mean`` and ``log_std``                                              ``[B, D]``, then log_std
"encoder"      the bound's mean over the batch, in the encoder's weights                     ``encoder.parameters()``
"joint"        the same, in the weights of the model                                         ``joint.parameters()``
"weights"      the same, in both                                                             joint, then encoder
=============  ============================================================================  ==========================

All estimators see one and the same q: the networks are copied and measured in evaluation mode, without dropout and with
the running statistics of batch norms, and what was given is left as it was. What a plain function closes over is not
copied, but in evaluation mode meanwhile. In the place of the encoder a posterior serves too.

The question "which estimator?" is best asked with ``wrt="posterior"``: what lies below, the encoder, is the same for
all of them, and the draws then run side by side as one large batch, many times faster. The modules of a posterior, such
as the second layer of a hierarchical one, are held still there.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from tqdm import tqdm

from vaelib import advice
from vaelib import estimators as known
from vaelib.advice import Advice, Bias
from vaelib.errors import InputError, choose, whole_number
from vaelib.estimators import Estimator
from vaelib.evaluation import evaluating
from vaelib.objectives import Objective, gradient
from vaelib.posteriors import Discrete, Latent, Posterior, as_posterior, map_latent, modules_in, remade
from vaelib.posteriors import draws as count

ROWS = 8192
"""Samples (draws x K x B) that go through the model at once; bounds the memory, whatever the number of draws."""
GRADIENTS = 2**22
"""Numbers in the gradients (draws x P) that are kept at once; bounds the memory, whatever the number of weights."""
BLOCK = 2**18
"""Numbers of a batch that go into the moments at once, so that the powers of them stay in the cache."""
LOOP_FROM = 2**16
"""Weights from which one backward pass a draw is faster than ``vmap`` over draws (measured on two cores)."""


class Moments:
    r"""The moments of a random vector, from draws that arrive in batches; memory does not grow with their number.

    Keeps the sums of the first four powers of :math:`g - a` for each coordinate, and of the first two of
    :math:`\|g - \bar g\|^2` with the mean so far, in float64. The anchor a is the mean of the first batch; so close to
    the mean, plain sums of powers lose no digits. Introduced in book/02-score-and-path.ipynb.

    Attributes
    ----------
    count : int
        how many draws there were.
    seconds : float or None
        the time of one training gradient, where :func:`measure` was asked for it.
    """

    def __init__(self) -> None:
        self.count = 0
        self.seconds: float | None = None

    def add(self, draws: Tensor) -> Moments:
        """Take in ``draws`` ``[S, P]``, and return the moments themselves.

        Raises
        ------
        InputError
            for another shape, also than that of the draws before.
        """
        draws = draws.detach()
        if draws.ndim != 2 or not len(draws) or (self.count and draws.shape[1:] != self.anchor.shape):
            width = len(self.anchor) if self.count else "P"
            raise InputError(f"draws must be of the shape [S, {width}], S of them at a time, not {list(draws.shape)}")
        if self.count == 0:
            self.anchor = draws.double().mean(0)
            self.powers, self.norms = (self.anchor.new_zeros(shape) for shape in ((4, draws.shape[1]), (2,)))
        width = max(1, BLOCK // len(draws))
        for block, anchor, powers in zip(*(t.split(width, -1) for t in (draws, self.anchor, self.powers)), strict=True):
            shifted = block.double() - anchor
            power = shifted.clone()
            for order in range(4):
                powers[order] += power.sum(0)
                power *= shifted
        self.count += len(draws)
        norms = self.norms.new_zeros(len(draws))
        for block, mean in zip(draws.split(width, -1), self.mean.split(width), strict=True):
            norms += (block.double() - mean).square().sum(1)
        self.norms += torch.stack([norms.sum(), norms.square().sum()])
        return self

    @property
    def mean(self) -> Tensor:
        r"""The mean :math:`\bar g`, ``[P]``."""
        return self.anchor + self.powers[0] / self.count

    @property
    def variance(self) -> Tensor:
        """The unbiased variance of each coordinate, ``[P]``."""
        self._need_two()
        return (self.powers[1] - self.powers[0].square() / self.count).clamp_min(0) / (self.count - 1)

    @property
    def total_variance(self) -> float:
        r"""The trace of the covariance, :math:`\Var[g] = \sum_p \Var[g_p]`."""
        return self.variance.sum().item()

    @property
    def standard_error(self) -> Tensor:
        """The standard error of :attr:`mean`, ``[P]``."""
        return (self.variance / self.count).sqrt()

    @property
    def variance_error(self) -> Tensor:
        r"""The standard error of :attr:`variance`, :math:`\sqrt{(m_4 - m_2^2) / S}` with central moments m, ``[P]``."""
        self._need_two()
        d, m2, m3, m4 = self.powers / self.count
        fourth = m4 - 4 * d * m3 + 6 * d.square() * m2 - 3 * d**4
        return ((fourth - (m2 - d.square()).square()).clamp_min(0) / self.count).sqrt()

    @property
    def total_variance_error(self) -> float:
        r"""The standard error of :attr:`total_variance`: that of the mean of :math:`\|g - \bar g\|^2`."""
        self._need_two()
        first, second = (self.norms / self.count).tolist()
        return math.sqrt(max(second - first**2, 0.0) / self.count)

    @property
    def total_snr(self) -> float:
        r"""The signal-to-noise ratio of the whole vector, :math:`\|\EE[g]\| / \sqrt{\Var[g]}`."""
        noise = math.sqrt(self.total_variance)
        return self.mean.norm().item() / noise if noise else math.inf

    @property
    def variance_time(self) -> float:
        """Total variance times seconds: what it costs to bring the error of the mean down to a given size.

        Raises
        ------
        InputError
            if :func:`measure` was not asked for the time.
        """
        if self.seconds is None:
            raise InputError("no time was taken; ask for it by measure(..., repeats=20)")
        return self.total_variance * self.seconds

    def variance_interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the ends of the interval that holds the total variance with this probability."""
        width = two_sided(1 - level) * self.total_variance_error
        return max(self.total_variance - width, 0.0), self.total_variance + width

    def _need_two(self) -> None:
        if self.count < 2:
            raise InputError(f"a variance needs at least 2 draws, but there are {self.count}")


@dataclass(frozen=True)
class BiasTest:
    """What :func:`bias_test` found.

    Attributes
    ----------
    difference, standard_error
        the mean of the paired difference and its standard error, ``[P]`` each.
    draws
        how many there were.
    error_rate
        the probability of a false alarm, in all coordinates together.
    """

    difference: Tensor
    standard_error: Tensor
    draws: int
    error_rate: float

    @property
    def t(self) -> Tensor:
        """The t statistic of each coordinate, ``[P]``."""
        return self.difference / self.standard_error

    @property
    def threshold(self) -> float:
        """The size of t that means bias, by Bonferroni's rule over the coordinates."""
        return two_sided(self.error_rate / len(self.difference))

    @property
    def biased(self) -> bool:
        """Whether any coordinate is off."""
        return bool((self.t.abs() > self.threshold).any())

    def __post_init__(self) -> None:
        if not len(self.difference) or not self.t.isfinite().all():
            raise InputError(
                f"a bias test needs finite gradients, but {int((~self.t.isfinite()).sum())} of "
                f"{len(self.difference)} coordinates have no finite t statistic: look at the model's bound first"
            )


def draws(
    estimator: Estimator | str,
    joint: nn.Module,
    encoder: nn.Module,
    x: Tensor,
    *,
    draws: int,
    k: int = 1,
    wrt: str = "posterior",
    generator: torch.Generator | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the estimator's gradient for each draw, ``[draws, P]``, in the direction that raises the bound.

    For as many as fit in memory; :func:`measure` streams. Two calls with equal generators see the same noise.
    Parameters as for :func:`measure`. Introduced in book/02-score-and-path.ipynb.
    """
    whole_number("draws", draws, least=1)
    with evaluating(joint, encoder):
        lab = Laboratory(joint, encoder, x, k, wrt)
        (one,) = lab.per_draw([known.get(estimator)])
        return torch.cat([one.gradients(eps) for eps in lab.noise(draws, generator, chunk, one.size)])


def measure(
    estimators: Iterable[Estimator | str],
    joint: nn.Module,
    encoder: nn.Module,
    x: Tensor,
    *,
    draws: int,
    k: int = 1,
    wrt: str = "posterior",
    generator: torch.Generator | None = None,
    chunk: int | None = None,
    repeats: int = 0,
    progress: bool = False,
) -> dict[str, Moments]:
    """Return the moments of each estimator's gradient over ``draws`` draws, by the estimator's name.

    Introduced in book/02-score-and-path.ipynb.

    Parameters
    ----------
    estimators
        estimators or their names; all of them see the same noise.
    joint, x
        as for :func:`vaelib.objectives.backward`.
    encoder
        called as ``encoder(x)``, returns q; or q itself, where the gradient is taken in its numbers.
    draws
        how many gradients of each, at least 2.
    k
        samples a gradient.
    wrt
        the parameters, a key of :data:`WRT`.
    generator
        draws the noise, on the device of ``x``.
    chunk
        differentiate at most so many draws at once, to save memory; the result is the same.
    repeats
        also time this many training gradients of each (:func:`vaelib.objectives.backward`, in turns; the median
        goes to :attr:`Moments.seconds`).
    progress
        show a progress bar.

    Raises
    ------
    InputError
        for a name that does not exist, no estimators, fewer than 2 draws, a k for which one is not defined, or a
        gradient that is not finite.
    """
    whole_number("draws", draws, least=2)
    whole_number("repeats", repeats, least=0)
    with evaluating(joint, encoder):
        lab, found = Laboratory(joint, encoder, x, k, wrt), named(estimators)
        each, moments = lab.per_draw(found), [Moments() for _ in found]
        with tqdm(total=draws, desc="gradients", unit="draw", disable=not progress, leave=False) as bar:
            for eps in lab.noise(draws, generator, chunk, each[0].size):
                for one, sums in zip(each, moments, strict=True):
                    sums.add(one.gradients(eps))
                bar.update(count(eps))
        if repeats:
            for sums, seconds in zip(moments, lab.seconds(found, repeats), strict=True):
                sums.seconds = seconds
    for estimator, sums in zip(found, moments, strict=True):
        if bad := int((~sums.mean.isfinite()).sum()):
            raise InputError(
                f"the gradient of '{estimator.name}' is not finite in {bad} of {len(sums.mean)} coordinates: look at "
                "the model's bound first"
            )
    return {estimator.name: sums for estimator, sums in zip(found, moments, strict=True)}


def bias_test(
    estimator: Estimator | str,
    reference: Estimator | str,
    joint: nn.Module,
    encoder: nn.Module,
    x: Tensor,
    *,
    draws: int,
    k: int = 1,
    wrt: str = "posterior",
    error_rate: float = 0.01,
    generator: torch.Generator | None = None,
    chunk: int | None = None,
    progress: bool = False,
) -> BiasTest:
    r"""Test whether two estimators have the same mean, on the same noise.

    With :math:`d_s = g_s - g'_s` for each draw, :math:`t_p = \bar d_p / (\hat\sigma[d_p] / \sqrt S)` in each of the
    P coordinates; a t beyond the normal quantile of ``error_rate / P`` means bias. What the two share cancels, so
    this sees much smaller biases than two separate means. The quantile is for many draws (1,000 and more), and
    for events that are drawn many times: a coordinate that moves once in a million draws has no standard error to
    go by, and an unbiased row may be accused there ("Where it breaks" in book/08-choosing.ipynb).
    Parameters as for :func:`measure`. Introduced in book/02-score-and-path.ipynb.

    Parameters
    ----------
    estimator, reference
        estimators or their names; the second one is known to be unbiased.
    error_rate
        the probability of finding a bias where there is none.
    """
    if not 0 < error_rate < 1:
        raise InputError(f"error_rate must be between 0 and 1, but is {error_rate}")
    whole_number("draws", draws, least=2)
    with evaluating(joint, encoder):
        lab = Laboratory(joint, encoder, x, k, wrt)
        ours, theirs = lab.per_draw([known.get(estimator), known.get(reference)])
        difference, size = Moments(), Moments()
        with tqdm(total=draws, desc="bias", unit="draw", disable=not progress, leave=False) as bar:
            for eps in lab.noise(draws, generator, chunk, ours.size):
                g = theirs.gradients(eps)
                difference.add(ours.gradients(eps) - g)
                size.add(g.abs())
                bar.update(count(eps))
    rounding = 100 * torch.finfo(g.dtype).eps * size.mean.clamp_min(1)  # of two ways to compute the same number
    return BiasTest(difference.mean, torch.maximum(difference.standard_error, rounding), draws, error_rate)


ERROR_RATE = 1e-4
"""How often :func:`advise` may accuse an unbiased row."""


@dataclass
class Networks:
    """The two parts of a model, ours to change."""

    joint: Any
    encoder: Any


def advise(
    model: Any,
    x: Tensor,
    *,
    k: int = 4,
    batch_size: int = 20,
    estimator: Estimator | str | None = None,
    seconds: float = 40.0,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Advice:
    """Measure which gradient estimator a model is best trained with, whether it uses z, and whether its encoder lags.

    The model is copied, and stays as it is. Shown in book/your-own-model.ipynb.

    Parameters
    ----------
    model
        anything with a ``joint`` and an ``encoder``, such as :class:`vaelib.models.VAE`.
    x
        observations as it is trained on, ``[N, ...]``; some hundreds at least, in random order.
    k
        evaluations of the decoder for each observation; of a mixture, the next multiple of its components.
    batch_size
        observations a step.
    estimator
        the one in use, to be compared with.
    seconds
        the time for the variances of the training gradient. The rest takes about as long again for a small network; a
        bias takes its 1,000 draws, which of convolutions or an LSTM are minutes on one core.
    generator
        draws all noise, on the device of ``x``.
    progress
        say what is being measured.

    Raises
    ------
    InputError
        for less than 100 observations, a model with nothing to train, or one that no estimator takes.
    """
    whole_number("k", k, least=1)
    whole_number("batch_size", batch_size, least=1)
    if missing := [part for part in ("joint", "encoder") if not hasattr(model, part)]:
        raise InputError(f"a model must have a joint and an encoder, but this one has no {' and no '.join(missing)}")
    if len(x) < 100:
        raise InputError(f"advice needs 100 observations at least, but x has {len(x)}: give it more")
    generator = generator or torch.Generator(x.device).manual_seed(0)
    copies: dict[int, Any] = {}
    with evaluating(model.joint, model.encoder):
        model = Networks(own(model.joint, copies), own(model.encoder, copies))
    few = x[:8]
    with torch.no_grad():
        k = as_posterior(model.encoder(few)).at_least(k)
    rows, left_out = advice.applicable(model, few, k)

    def bias(row: Estimator, reference: Estimator, k: int) -> Bias:
        """On one noise for every row; where z is discrete, in the coordinates that are drawn often enough."""
        noise = torch.Generator(x.device).manual_seed(1)
        options = {"draws": 1000, "k": k, "generator": noise}
        test = bias_test(row, reference, model.joint, model.encoder, few, error_rate=ERROR_RATE, **options)
        mean = measure([reference], model.joint, model.encoder, few, **(options | {"draws": 200}))[reference.name].mean
        return advice.bias_of(test, reference.name, mean, _often_drawn(model.encoder(few), 1000 * k))

    def say(what: str) -> None:
        if progress:
            tqdm.write(what)

    say(f"{len(rows)} estimators apply; their gradients ...")
    costs, doubled = advice.cost_of_rows(model, x, rows, k, batch_size, generator, seconds, bias)
    say("is the encoder late? ...")
    trains = next(name for name in (*(row for _, _, row in advice.CHART), *rows) if name in rows)
    late = advice.lag(model, x, rows[trains], generator, k=advice.draws_of(trains, k))
    say("is z used? ...")
    used = advice.usage(model, x, generator)
    choices = [choice for goal in advice.WANTED if (choice := advice.choose_row(goal, costs))]
    current = None if estimator is None else known.get(estimator).name
    setting = {"k": k, "batch_size": batch_size, "observations": len(x)}
    return Advice(costs, left_out, choices, doubled, used, late, current, setting)


@torch.no_grad()
def _often_drawn(q: Any, draws: int) -> Tensor | slice:
    """Return the coordinates of a discrete q whose rarer value is expected 20 times and more; of others all."""
    q = as_posterior(q)
    if not isinstance(q, Discrete):
        return slice(None)
    share = q.mean.flatten()
    return torch.minimum(share, 1 - share) > 20 / draws


def two_sided(error_rate: float) -> float:
    """Return the number of standard errors that a normal variable exceeds, either way, with this probability."""
    return statistics.NormalDist().inv_cdf(1 - error_rate / 2)


# --- one draw's gradient ----------------------------------------------------------------------------------------------


class PerDraw(NamedTuple):
    """Noise ``[S, K, B, D]`` to the gradients ``[S, P]``, and P."""

    gradients: Callable[[Latent], Tensor]
    size: int


class Laboratory:
    """The networks of a measurement, copied, and the one q that all estimators see."""

    def __init__(self, joint: Callable[..., Tensor], encoder: Any, x: Tensor, k: int, wrt: str) -> None:
        whole_number("k", k, least=1)
        if not len(x):
            raise InputError("there are no observations in x: a gradient needs one at least")
        self.differentiate = choose("set of parameters (wrt)", wrt, WRT)
        copies: dict[int, Any] = {}  # one for what the two share
        self.joint, self.x, self.k = own(joint, copies), x, k
        if isinstance(encoder, Posterior) or not callable(encoder):
            self.q = as_posterior(own(as_posterior(encoder).map_parameters(Tensor.detach), copies))
            self.encoder = lambda x: self.q
        else:
            self.encoder = own(encoder, copies)
            if wrt in ("encoder", "weights") and not parameters_in(encoder).isdisjoint(parameters_in(self.joint)):
                raise InputError(
                    "the joint has weights of the encoder by a function that closes over them, whose share of the "
                    "gradient a copy of the encoder would miss: make the joint a module that holds the encoder"
                )
            with torch.no_grad():
                self.q = as_posterior(self.encoder(x))

    def per_draw(self, estimators: list[Estimator]) -> list[PerDraw]:
        """Return how to get each estimator's gradient for each draw; every estimator is tried once."""
        eps = self.q.noise(self.k, torch.Generator(self.x.device).manual_seed(0))
        for estimator in estimators:
            estimator.loss(self.joint, self.q, self.x, eps)
        return [self.differentiate(self, estimator) for estimator in estimators]

    def noise(self, draws: int, generator: torch.Generator | None, chunk: int | None, size: int) -> Iterator[Latent]:
        """Yield the noise of all draws, ``[S, K, B, D]``; it is drawn in blocks that do not depend on ``chunk``."""
        whole_number("chunk", 1 if chunk is None else chunk, least=1)
        block = max(1, ROWS // (self.k * len(self.x)))
        chunk = min(chunk or block, block, max(1, GRADIENTS // size))
        for start in range(0, draws, block):
            eps = map_latent(lambda e: e.unflatten(0, (block, self.k)), self.q.noise(block * self.k, generator))
            for first in range(0, min(block, draws - start), chunk):
                last = min(first + chunk, draws - start, block)
                yield map_latent(lambda e, first=first, last=last: e[first:last], eps)

    def seconds(self, estimators: list[Estimator], repeats: int) -> list[float]:
        """Return the median time of a training gradient of each estimator, measured in turns."""
        parts = [part for part in (self.joint, self.encoder) if isinstance(part, nn.Module)]
        parameters = [p for p in nn.ModuleList(parts).parameters() if p.requires_grad]
        if not parameters:
            raise InputError("there is nothing to train, whose time could be taken: leave out repeats")
        eps = self.q.noise(self.k, torch.Generator(self.x.device).manual_seed(0))
        times: list[list[float]] = [[] for _ in estimators]
        for _ in range(repeats + 1):  # the first round warms up
            for estimator, series in zip(estimators, times, strict=True):
                _wait(self.x.device)
                start = time.perf_counter()
                gradient(estimator.loss(self.joint, self.encoder(self.x), self.x, eps).mean(), parameters)
                _wait(self.x.device)
                series.append(time.perf_counter() - start)
        return [statistics.median(series[1:]) for series in times]


def named(estimators: Iterable[Estimator | str]) -> list[Estimator]:
    """Return the estimators, one or more, whose names must differ."""
    if isinstance(estimators, str | Estimator):
        raise InputError(f"estimators must be a list, such as ['{known.get(estimators).name}'], but is one alone")
    found = [known.get(one) for one in estimators]
    names = [one.name for one in found]
    if not found:
        raise InputError("there are no estimators to measure: give one at least, such as ['elbo-path']")
    if len(set(names)) < len(names):
        raise InputError(
            f"two estimators share a name ({', '.join(names)}): give one its own by "
            "dataclasses.replace(estimator, name=...)"
        )
    return found


def parameters_in(part: Any) -> set[Tensor]:
    """Return the parameters of what holds modules, or closes over them."""
    return {p for module in modules_in(part, objects=False) for p in module.parameters()}


def own(part: Any, copies: dict[int, Any]) -> Any:
    """Return a copy of a network or of what holds networks; a plain function as it is."""
    for value in [value for module in modules_in(part, objects=False) for value in vars(module).values()]:
        if isinstance(value, Tensor) and not value.is_leaf:  # what a hook has made of the parameters
            copies[id(value)] = value.detach()
    return copy.deepcopy(part, copies)


def _of_posterior(lab: Laboratory, estimator: Estimator) -> PerDraw:
    """All draws as one batch of S x B observations, each with its own copy of the posterior's parameters."""
    batch = len(lab.x)

    def gradients(eps: Latent) -> Tensor:
        s = count(eps)
        q, leaves = remade(lab.q, lambda p: torch.cat([p.detach()] * s).requires_grad_())
        x = lab.x.repeat(s, *[1] * (lab.x.ndim - 1))
        side_by_side = map_latent(lambda e: e.transpose(0, 1).flatten(1, 2), eps)
        parts = gradient(estimator.loss(lab.joint, q, x, side_by_side).mean(), leaves)
        return -s * batch * torch.cat([part.reshape(s, -1) for part in parts], dim=1)

    def together_or_alone(eps: Latent) -> Tensor:
        try:
            return gradients(eps)
        except RuntimeError:  # the joint closes over a condition of one batch, say
            alone = (map_latent(lambda e, s=s: e[s : s + 1], eps) for s in range(count(eps)))
            return torch.cat([gradients(one) for one in alone])

    size = sum(p.numel() for p in remade(lab.q, lambda p: p)[1])
    if not size:
        raise InputError(f"this {type(lab.q).__name__} has no numbers that a gradient could be taken in")
    return PerDraw(together_or_alone, size)


def _of_weights(*parts: str) -> Callable[..., PerDraw]:
    """``vmap`` over draws for few weights; one backward pass after the other for many, and where there is no rule."""

    def per_draw(lab: Laboratory, estimator: Estimator) -> PerDraw:
        objective = Objective(estimator, lab.joint, lab.encoder)
        wanted = set()
        for part in parts:
            network = getattr(lab, part)
            own_weights = {id(p) for p in network.parameters()} if isinstance(network, nn.Module) else set()
            if not own_weights:
                raise InputError(f"the {part} has no parameters: there is nothing to differentiate")
            wanted |= own_weights
        everything = {name: p.detach() for name, p in objective.named_parameters()}
        weights = {name: everything[name] for name, p in objective.named_parameters() if id(p) in wanted}
        size = sum(p.numel() for p in weights.values())

        def bound(weights: dict[str, Tensor], eps: Latent) -> Tensor:
            return -functional_call(objective, {**everything, **weights}, (lab.x, eps)).mean()

        def one_by_one(eps: Latent) -> Tensor:
            rows, leaves = [], {name: p.detach().requires_grad_() for name, p in weights.items()}
            for s in range(count(eps)):
                value = bound(leaves, map_latent(lambda e, s=s: e[s], eps))
                rows.append(torch.cat([part.flatten() for part in gradient(value, list(leaves.values()))]))
            return torch.stack(rows)

        def side_by_side(eps: Latent) -> Tensor:
            try:
                found = vmap(grad(bound), in_dims=(None, map_latent(lambda _: 0, eps)))(weights, eps)
            except RuntimeError:
                return one_by_one(eps)
            return torch.cat([found[name].reshape(count(eps), -1) for name in weights], dim=1).detach()

        recurrent = any(isinstance(part, nn.RNNBase) for part in objective.modules())  # slow under vmap, or no rule
        return PerDraw(one_by_one if recurrent or size >= LOOP_FROM else side_by_side, size)

    return per_draw


WRT: dict[str, Callable[..., PerDraw]] = {
    "posterior": _of_posterior,
    "encoder": _of_weights("encoder"),
    "joint": _of_weights("joint"),
    "weights": _of_weights("joint", "encoder"),
}
"""What a gradient can be taken with respect to, by name."""


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
