r"""The tableau: every gradient estimator of the book as one row of one table.

With K draws :math:`z_k = t(\varepsilon_k, \phi)` and log-weights
:math:`\log w_k = \log p_\theta(x, z_k) - \log q_\phi(z_k \mid x)`, each estimator of the gradient of a bound is

.. math::

    \sum_k \; \underbrace{a_k\, \partial_\theta \log p_\theta(x, z_k)}_{\text{theta channel}}
    + \underbrace{b_k\, \partial_z \log w(z_k)\, \partial_\phi z_k}_{\text{path channel}}
    + \underbrace{c_k\, \partial_\phi \log q_\phi(z_k \mid x)}_{\text{score channel}}

with weights a, b, c that depend on :math:`\log w` alone and are held constant. A row is therefore a rule
``log_w [K, B] -> Weights``; :class:`Row` turns it into a loss. To add an estimator, write its rule
below: it then exists in the engine, the command line, the tests and the chapters.

Write :math:`\tilde w = \operatorname{softmax}_k \log w` and :math:`\hat L = \log \tfrac1K \sum_k w_k`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vaelib.bounds import iwae, may_be_impossible, normalised
from vaelib.errors import InputError
from vaelib.estimators.base import Estimator
from vaelib.estimators.joint import log_joint, log_weight
from vaelib.posteriors import (
    Latent,
    Posterior,
    draws,
    in_forward_mode,
    inside_vmap,
    is_foreign,
    layers_of,
    learning_in,
    map_latent,
    once,
    remade,
    stop_gradient,
    tensors_in,
    tracing,
)


class Weights(NamedTuple):
    """The three channel weights a, b, c of a row, each ``[K, B]``; None in a rule's answer is a channel not used."""

    theta: Tensor
    path: Tensor | None
    score: Tensor | None


@dataclass(frozen=True)
class Row(Estimator):
    """One row of the tableau. Introduced in book/02-score-and-path.ipynb.

    Attributes
    ----------
    rule
        its definition, ``log_w [K, B] -> Weights``.
    """

    rule: Callable[[Tensor], Weights]

    def weights(self, log_w: Tensor, log_share: Tensor | float = 0.0) -> Weights:
        """Return the weights a, b, c for ``log_w`` ``[K, B]``, held constant; a channel that is not used weighs 0."""
        self.check(log_w.shape[0])
        log_w, log_share = log_w.detach(), log_share.detach() if isinstance(log_share, Tensor) else log_share
        weights = self.rule(log_w + log_share)
        if isinstance(log_share, Tensor) and self.bound == "elbo":
            weights = (w if w is None else w * log_share.exp() for w in weights)
        return Weights(*(torch.zeros_like(log_w) if w is None else w for w in weights))

    @property
    def summary(self) -> str:
        """What it does, in a line."""
        return inspect.getdoc(self.rule) or ""

    @property
    def three(self) -> Tensor:
        """Log-weights of three draws, ``[3, 4]``: of like size, equal, one far ahead, and one far behind."""
        return torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 1.0], [-3.0, 9.0, 0.0], [0.5, 0.0, -20.0]]).mT

    @cached_property
    def example(self) -> Weights:
        """The rule's weights of some draws, which show the channels that it uses."""
        return self.rule(self.three)

    @cached_property
    def hides(self) -> bool:
        """Whether the path weighs a draw that theta does not, of which nothing then arrives at the sample."""
        return self.scales and bool(((self.example.theta == 0) & (self.example.path != 0)).any())

    @property
    def reparameterised(self) -> bool:
        """Whether the row uses the path channel, and so needs a sample that is differentiable in phi."""
        return self.example.path is not None

    @cached_property
    def scales(self) -> bool:
        """Whether the path weighs otherwise than theta, so that what arrives at the sample has to be scaled."""
        return self.reparameterised and self.example.path is not self.example.theta

    @cached_property
    def whole(self) -> bool:
        """Whether the row differentiates its bound as one function of log w, with q held constant in it or not."""
        a, b, c = self.example
        slope = torch.func.grad(lambda log_w: self.value(log_w).sum())(self.three)
        path = b is not None and torch.equal(b, a) and torch.allclose(a, slope)
        return path and (c is None or torch.equal(c, -a))

    @property
    def automatic(self) -> bool:
        """Whether the row is what automatic differentiation gives with nothing held constant: b = a = -c."""
        return self.whole and self.example.score is not None

    def differentiate(self, joint: Callable[..., Tensor], q: Posterior, x: Tensor, eps: Latent) -> Tensor:
        r"""Return ``-bound``, ``[B]``, with the three channels as its gradient, in one pass through the model.

        A row that differentiates its bound as a whole is that bound, of :math:`\log w` with q held constant (path) or
        not (total); one that weighs on the path what it does not in theta has its channels one by one. Any other
        differentiates :math:`\sum_k a_k \log w_k`: that is the theta channel, and :math:`a_k\, \partial_z \log w_k`
        arrives at the sample, where it is scaled by :math:`b_k / a_k` on its way to the encoder. The score channel is
        :math:`\log q` at a stopped sample with weight :math:`c_k`.
        """
        if eps is None:
            raise InputError(f"estimator '{self.name}' needs draws: give it eps = q.noise(k, generator)")
        if self.hides:
            return self.differentiate_by_channels(joint, q, x, eps)
        if self.scales and torch.compiler.is_dynamo_compiling():
            return eagerly(self, joint, q, x, eps)
        log_share = self.shares(q, draws(eps))
        if self.automatic:
            score, (z, log_q) = None, q.sample_and_log_prob(eps)
            check_path(self.name, q, z, eps)
        else:
            z = q.sample(eps)
            still = map_latent(Tensor.detach, z)
            score = None if self.example.score is None else q.log_prob_of_sample(still, eps)
            if self.reparameterised:
                check_path(self.name, q, z, eps)
                if self.scales:
                    z = map_latent(lambda layer: layer.view_as(layer), z)  # what arrives here is log w's alone
                log_q = q.stop_gradient().log_prob_of_sample(z, eps)
            else:
                z, log_q = still, score.detach()
        log_w = log_weight(joint, x, z, log_q)
        if self.whole:
            return -self.value(log_w, log_share)  # through which the shares of a mixture get their gradient too

        seen = log_w.detach()
        a, b, c = self.rule(seen)
        if may_be_impossible(seen):
            log_w = log_w.masked_fill(seen == -math.inf, 0.0)  # else 0 times infinity
        total = torch.linalg.vecdot(a, log_w, dim=0)
        if self.scales:
            if inside_vmap():
                raise InputError(
                    f"estimator '{self.name}' scales what arrives at its samples, which grad(vmap(loss)) hides: "
                    "write vmap(grad(loss))"
                )
            if in_forward_mode(z):
                raise InputError(
                    f"estimator '{self.name}' scales what arrives at its samples on the way back, and has no way "
                    "forward (jvp, jacfwd): use grad or jacrev"
                )
            ratio = (b / a).nan_to_num(0.0)  # where a weight underflowed to 0, b has too
            for layer in layers_of(z):
                if layer.requires_grad:  # some layers may be frozen
                    layer.register_hook(lambda slope: ratio.view(*ratio.shape, *[1] * (slope.ndim - 2)) * slope)
        if score is not None:
            total = total + torch.linalg.vecdot(c, score, dim=0)
        return total.detach() - total - self.value(seen)

    def differentiate_by_channels(self, joint: Callable[..., Tensor], q: Posterior, x: Tensor, eps: Latent) -> Tensor:
        """Return the same loss with a line for each channel: theta, phi through the sample, phi through the density."""
        log_share = self.shares(q, draws(eps))
        z = q.sample(eps)
        if self.reparameterised:
            check_path(self.name, q, z, eps)
        still = map_latent(Tensor.detach, z)

        theta = log_joint(joint, x, still)
        held = stop_gradient(joint)
        again = log_joint(held, x, still)
        if not tracing() and not torch.allclose(theta.detach(), again.detach(), rtol=1e-3, atol=1e-3, equal_nan=True):
            raise InputError(
                "the three-channel form evaluates the joint more than once, and this one is another each time, since a "
                "random layer such as dropout is active in it: call .eval() on that network, or use the loss"
            )
        if again.requires_grad:
            raise InputError(
                "the three-channel form needs a joint whose parameters can be held constant, a module, but "
                f"this is a {type(joint).__name__} that closes over live ones: use the estimator's loss, without a stop"
            )
        path = log_weight(held, x, z, q.stop_gradient().log_prob_of_sample(z, eps))
        score = q.log_prob_of_sample(still, eps)

        log_w = (theta - score).detach()
        never = log_w == -math.inf  # what is impossible teaches nothing
        theta, path = theta.masked_fill(never, 0.0), path.masked_fill(never, 0.0)
        a, b, c = self.weights(log_w, log_share)
        total = (a * theta + b * path + c * score).sum(0)
        return -(self.value(log_w, log_share) + total - total.detach())

    def shares(self, q: Posterior, k: int) -> Tensor | float:
        """Return what each draw counts, or raise InputError if they are stratified and the row needs equal ones."""
        log_share = q.log_share(k)
        if isinstance(log_share, Tensor) and not self.whole:
            raise InputError(
                f"estimator '{self.name}' weighs path and score by draws of one q, but a {type(q).__name__} is drawn "
                f"from component by component: use one of {', '.join(n for n, row in TABLEAU.items() if row.whole)}"
            )
        return log_share


def check_path(name: str, q: Posterior, z: Latent, eps: Latent) -> None:
    """Raise InputError if the density of q moves with its parameters, and its sample, which ``name`` needs, does not.

    If neither moves, the encoder is frozen, and the model learns by itself. Where some layers move and others do
    not, or the class is not of this package, each number that the density moves with must move the sample.
    """
    moving = [layer.requires_grad for layer in layers_of(z)]
    if any(moving) and tracing():
        return
    if all(moving):
        lacking = is_foreign(q) and q.strata == 1 and once(lacks_path, q, eps)  # strata learn by their shares
    else:
        lacking = lacks_path(q, eps) is not False if any(moving) else q.density_moves(z, eps)
    if lacking:
        raise InputError(
            f"estimator '{name}' is reparameterised: it needs a sample that moves with the encoder's parameters, but "
            f"that of a {type(q).__name__} does not; use a row without the path channel, such as elbo-score-loo, "
            "iwae-vimco or rws"
        )


def lacks_path(q: Posterior, eps: Latent) -> bool | None:
    """Whether log q moves with a number that the sample does not move with; None if q does not tell its numbers.

    As where one layer, or one coordinate, is of bits and another is Gaussian. The numbers of the observations count as
    one: each is asked in all of them.
    """
    own = None
    if not any(layer.requires_grad for layer in layers_of(eps)):  # noise that moves does so with the numbers of q
        with suppress(InputError, NotImplementedError):
            own, phi = remade(q, lambda p: p.detach().requires_grad_(p.requires_grad))
    if own is None:
        own, phi = q, list(tensors_in(q))
        if not phi:
            return None
    phi = [*(p for p in phi if p.requires_grad), *learning_in(q)]
    z = own.sample(eps)
    log_q = own.log_prob_of_sample(map_latent(Tensor.detach, z), eps)
    if not (phi and log_q.requires_grad):
        return False
    moving = [layer for layer in layers_of(z) if layer.requires_grad]
    if not moving:
        return True
    batch = layers_of(eps)[0].shape[1]
    pairs = zip(found_in(phi, moving, batch), found_in(phi, [log_q], batch), strict=True)
    return any(bool((score & ~path).any()) for path, score in pairs)


def found_in(phi: list[Tensor], parts: list[Tensor], batch: int) -> list[Tensor]:
    """Return which numbers of each of ``phi`` the parts move with, all observations together; sums do not cancel."""
    uneven = [torch.linspace(1, 2, part.numel(), device=part.device).view_as(part) for part in parts]
    value = sum((weight * part).sum() for weight, part in zip(uneven, parts, strict=True))
    slopes = torch.autograd.grad(value, phi, retain_graph=True, materialize_grads=True)
    return [slope.any(0) if slope.ndim > 1 and len(slope) == batch else slope != 0 for slope in slopes]


@torch._disable_dynamo
def eagerly(row: Row, *arguments: Any) -> Tensor:
    """Return the row's loss outside of any graph that torch.compile makes, which would lose its hook."""
    return row.differentiate(*arguments)


TABLEAU: dict[str, Row] = {}
"""The tableau, by name."""


def row(name: str, bound: str, target: str | None, reference: str, least_k: int = 1):
    """Enter the decorated rule into :data:`TABLEAU`."""

    def enter(rule: Callable[[Tensor], Weights]) -> Callable[[Tensor], Weights]:
        TABLEAU[name] = Row(name, bound, target, least_k, reference, rule)
        return rule

    return enter


def uniform(log_w: Tensor) -> Tensor:
    """Return 1/K for every draw, ``[K, B]``."""
    return torch.full_like(log_w, 1 / log_w.shape[0])


def mean_of_others(log_w: Tensor) -> Tensor:
    """Return for every draw the mean of the K - 1 other log-weights, ``[K, B]``; -inf if one of them is."""
    never = log_w == -math.inf
    possible = log_w.masked_fill(never, 0.0)
    mean = (possible.sum(0) - possible) / (log_w.shape[0] - 1)
    return mean.masked_fill(never.sum(0) > never, -math.inf)


def signal(value: Tensor, baseline: Tensor | None = None) -> Tensor:
    """Return the value less the baseline, and 0 where one of them is -inf: what is impossible teaches nothing."""
    if baseline is not None:
        value = value.masked_fill(value == -math.inf, math.inf) - baseline
    return value.nan_to_num(nan=math.nan, posinf=0.0, neginf=0.0)


@row("elbo-score", bound="elbo", target="elbo", reference="williams1992")
def elbo_score(log_w: Tensor) -> Weights:
    """REINFORCE: needs no derivative of the sample, pays for it in variance."""
    u = uniform(log_w)
    return Weights(theta=u, path=None, score=u * signal(log_w))


@row("elbo-score-loo", bound="elbo", target="elbo", reference="kool2019", least_k=2)
def elbo_score_loo(log_w: Tensor) -> Weights:
    """REINFORCE with the other draws' mean as the baseline."""
    u = uniform(log_w)
    return Weights(theta=u, path=None, score=u * signal(log_w, mean_of_others(log_w)))


@row("elbo-total", bound="elbo", target="elbo", reference="kingma2014")
def elbo_total(log_w: Tensor) -> Weights:
    """The reparameterised gradient as automatic differentiation gives it: path and score (eq. 7)."""
    u = uniform(log_w)
    return Weights(theta=u, path=u, score=-u)


@row("elbo-path", bound="elbo", target="elbo", reference="roeder2017")
def elbo_path(log_w: Tensor) -> Weights:
    """Sticking the landing: the path without the score (eq. 8)."""
    u = uniform(log_w)
    return Weights(theta=u, path=u, score=None)


@row("iwae-score", bound="iwae", target="iwae", reference="mnih2016")
def iwae_score(log_w: Tensor) -> Weights:
    """The score-function gradient of the importance-weighted bound, without a baseline."""
    w = normalised(log_w)
    return Weights(theta=w, path=None, score=signal(iwae(log_w)) - w)


@row("iwae-vimco", bound="iwae", target="iwae", reference="mnih2016", least_k=2)
def iwae_vimco(log_w: Tensor) -> Weights:
    """VIMCO: the baseline is the bound with one weight replaced by the geometric mean of the others."""
    w = normalised(log_w)
    own = torch.eye(log_w.shape[0], dtype=torch.bool, device=log_w.device).unsqueeze(-1)
    without_own = iwae(torch.where(own, mean_of_others(log_w), log_w.unsqueeze(1)))
    return Weights(theta=w, path=None, score=signal(iwae(log_w), without_own) - w)


@row("iwae-total", bound="iwae", target="iwae", reference="burda2016")
def iwae_total(log_w: Tensor) -> Weights:
    """The importance-weighted autoencoder as automatic differentiation gives it (eq. 10)."""
    w = normalised(log_w)
    return Weights(theta=w, path=w, score=-w)


@row("iwae-path", bound="iwae", target=None, reference="roeder2017")
def iwae_path(log_w: Tensor) -> Weights:
    """Algorithm 4 of "Sticking the Landing": biased for K > 1, although the paper conjectures that it is not."""
    w = normalised(log_w)
    return Weights(theta=w, path=w, score=None)


@row("iwae-dreg", bound="iwae", target="iwae", reference="tucker2019")
def iwae_dreg(log_w: Tensor) -> Weights:
    """Doubly reparameterised: the score term turned into a second path term, which leaves squared weights."""
    w = normalised(log_w)
    return Weights(theta=w, path=w.square(), score=None)


@row("rws", bound="iwae", target="wake", reference="bornschein2015")
def rws(log_w: Tensor) -> Weights:
    """Reweighted wake-sleep, wake phase for both: raise log q where the weights are."""
    w = normalised(log_w)
    return Weights(theta=w, path=None, score=w)


@row("rws-dreg", bound="iwae", target="wake", reference="tucker2019")
def rws_dreg(log_w: Tensor) -> Weights:
    """The wake-phase update of phi, doubly reparameterised."""
    w = normalised(log_w)
    return Weights(theta=w, path=w - w.square(), score=None)


def elbo_scaled(scale: float) -> Row:
    r"""Return the row that keeps the score times ``scale``: 0 is ``elbo-path``, 1 is ``elbo-total``.

    Unbiased for every fixed scale, since the score's mean is zero. "Sticking the Landing" counts what is *removed*: its
    control-variate scale :math:`c^*` is ``1 - scale``. Not in :data:`TABLEAU`, being a family of rows.
    Introduced in book/02-score-and-path.ipynb.
    """

    def rule(log_w: Tensor) -> Weights:
        u = uniform(log_w)
        return Weights(theta=u, path=u, score=-scale * u)

    return Row(f"elbo-scaled({scale:g})", "elbo", "elbo", 1, "roeder2017", rule)
