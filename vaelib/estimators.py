r"""The tableau: every gradient estimator of the book as one row of one table.

With K draws :math:`z_k = t(\varepsilon_k, \phi)` and log-weights
:math:`\log w_k = \log p_\theta(x, z_k) - \log q_\phi(z_k \mid x)`, each estimator of the gradient of a bound is

.. math::

    \sum_k \; \underbrace{a_k\, \partial_\theta \log p_\theta(x, z_k)}_{\text{theta channel}}
    + \underbrace{b_k\, \partial_z \log w(z_k)\, \partial_\phi z_k}_{\text{path channel}}
    + \underbrace{c_k\, \partial_\phi \log q_\phi(z_k \mid x)}_{\text{score channel}}

with weights a, b, c that depend on :math:`\log w` alone and are held constant. A row is therefore a rule
``log_w [K, B] -> Weights``; :mod:`vaelib.objectives` holds the engine that runs them all. To add an estimator, write
its rule below: it then exists in the engine, the command line, the tests and the chapters.

Write :math:`\tilde w = \operatorname{softmax}_k \log w` and :math:`\hat L = \log \tfrac1K \sum_k w_k`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vaelib.bounds import BOUNDS, iwae
from vaelib.errors import InputError


class Weights(NamedTuple):
    """The three channel weights a, b, c of a row, each ``[K, B]``; None in a rule's answer is a channel not used."""

    theta: Tensor
    path: Tensor | None
    score: Tensor | None


@dataclass(frozen=True)
class Estimator:
    """One row of the tableau. Introduced in book/02-score-and-path.ipynb.

    Attributes
    ----------
    name
        its name here and on the command line.
    bound
        the bound whose value it reports, a key of :data:`vaelib.bounds.BOUNDS`.
    target
        what it is unbiased for: "elbo", "iwae", "wake" (the wake-phase update of the encoder), or None.
    least_k
        the smallest number of draws it is defined for.
    reference
        where it comes from, a key of the bibliography.
    rule
        its definition, ``log_w [K, B] -> Weights``.
    """

    name: str
    bound: str
    target: str | None
    least_k: int
    reference: str
    rule: Callable[[Tensor], Weights]

    def weights(self, log_w: Tensor) -> Weights:
        """Return the weights a, b, c for ``log_w`` ``[K, B]``; a channel that is not used weighs 0."""
        self.check(log_w.shape[0])
        return Weights(*(torch.zeros_like(log_w) if w is None else w for w in self.rule(log_w)))

    @property
    def summary(self) -> str:
        """What it does, in a line."""
        return inspect.getdoc(self.rule) or ""

    @cached_property
    def reparameterised(self) -> bool:
        """Whether the row uses the path channel, and so needs a sample that is differentiable in phi."""
        return self.rule(torch.zeros(self.least_k, 1)).path is not None

    @cached_property
    def automatic(self) -> bool:
        """Whether the row is what automatic differentiation gives with nothing held constant: b = a = -c."""
        a, b, c = self.weights(torch.arange(3.0).unsqueeze(-1))
        return torch.equal(b, a) and torch.equal(c, -a)

    def value(self, log_w: Tensor) -> Tensor:
        """Return the bound that it reports, ``[K, B] -> [B]``."""
        return BOUNDS[self.bound](log_w)

    def check(self, k: int) -> None:
        """Raise InputError if the row is not defined for ``k`` draws."""
        if k < self.least_k:
            raise InputError(f"estimator '{self.name}' needs k >= {self.least_k} draws, but k is {k}")


ESTIMATORS: dict[str, Estimator] = {}
"""The tableau, by name."""


def row(name: str, bound: str, target: str | None, reference: str, least_k: int = 1):
    """Enter the decorated rule into :data:`ESTIMATORS`."""

    def enter(rule: Callable[[Tensor], Weights]) -> Callable[[Tensor], Weights]:
        ESTIMATORS[name] = Estimator(name, bound, target, least_k, reference, rule)
        return rule

    return enter


def uniform(log_w: Tensor) -> Tensor:
    """Return 1/K for every draw, ``[K, B]``."""
    return torch.full_like(log_w, 1 / log_w.shape[0])


def mean_of_others(log_w: Tensor) -> Tensor:
    """Return for every draw the mean of the K - 1 other log-weights, ``[K, B]``."""
    return (log_w.sum(0) - log_w) / (log_w.shape[0] - 1)


@row("elbo-score", bound="elbo", target="elbo", reference="williams1992")
def elbo_score(log_w: Tensor) -> Weights:
    """REINFORCE: needs no derivative of the sample, pays for it in variance."""
    u = uniform(log_w)
    return Weights(theta=u, path=None, score=u * log_w)


@row("elbo-score-loo", bound="elbo", target="elbo", reference="kool2019", least_k=2)
def elbo_score_loo(log_w: Tensor) -> Weights:
    """REINFORCE with the other draws' mean as the baseline."""
    u = uniform(log_w)
    return Weights(theta=u, path=None, score=u * (log_w - mean_of_others(log_w)))


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
    w = log_w.softmax(0)
    return Weights(theta=w, path=None, score=iwae(log_w) - w)


@row("iwae-vimco", bound="iwae", target="iwae", reference="mnih2016", least_k=2)
def iwae_vimco(log_w: Tensor) -> Weights:
    """VIMCO: the baseline is the bound with one weight replaced by the geometric mean of the others."""
    w = log_w.softmax(0)
    own = torch.eye(log_w.shape[0], dtype=torch.bool, device=log_w.device).unsqueeze(-1)
    without_own = iwae(torch.where(own, mean_of_others(log_w), log_w.unsqueeze(1)))
    return Weights(theta=w, path=None, score=iwae(log_w) - without_own - w)


@row("iwae-total", bound="iwae", target="iwae", reference="burda2016")
def iwae_total(log_w: Tensor) -> Weights:
    """The importance-weighted autoencoder as automatic differentiation gives it (eq. 10)."""
    w = log_w.softmax(0)
    return Weights(theta=w, path=w, score=-w)


@row("iwae-path", bound="iwae", target=None, reference="roeder2017")
def iwae_path(log_w: Tensor) -> Weights:
    """Algorithm 4 of "Sticking the Landing": biased for K > 1, although the paper conjectures that it is not."""
    w = log_w.softmax(0)
    return Weights(theta=w, path=w, score=None)


@row("iwae-dreg", bound="iwae", target="iwae", reference="tucker2019")
def iwae_dreg(log_w: Tensor) -> Weights:
    """Doubly reparameterised: the score term turned into a second path term, which leaves squared weights."""
    w = log_w.softmax(0)
    return Weights(theta=w, path=w.square(), score=None)


@row("rws", bound="iwae", target="wake", reference="bornschein2015")
def rws(log_w: Tensor) -> Weights:
    """Reweighted wake-sleep, wake phase for both: raise log q where the weights are."""
    w = log_w.softmax(0)
    return Weights(theta=w, path=None, score=w)


@row("rws-dreg", bound="iwae", target="wake", reference="tucker2019")
def rws_dreg(log_w: Tensor) -> Weights:
    """The wake-phase update of phi, doubly reparameterised."""
    w = log_w.softmax(0)
    return Weights(theta=w, path=w - w.square(), score=None)


def elbo_scaled(scale: float) -> Estimator:
    r"""Return the row that keeps the score times ``scale``: 0 is ``elbo-path``, 1 is ``elbo-total``.

    Unbiased for every fixed scale, since the score's mean is zero. "Sticking the Landing" counts what is *removed*: its
    control-variate scale :math:`c^*` is ``1 - scale``. Not in :data:`ESTIMATORS`, being a family of rows.
    Introduced in book/02-score-and-path.ipynb.
    """

    def rule(log_w: Tensor) -> Weights:
        u = uniform(log_w)
        return Weights(theta=u, path=u, score=-scale * u)

    return Estimator(f"elbo-scaled({scale:g})", "elbo", "elbo", 1, "roeder2017", rule)


@dataclass(frozen=True)
class LossEstimator:
    """An estimator beside the tableau: no row, since its channels are not weights of one draw's log w alone.

    It is given by a loss instead, and :mod:`vaelib.objectives` runs it like a row. :data:`vaelib.silent.ELBO` and
    the special estimators of :mod:`vaelib.discrete` are of this kind.

    Attributes
    ----------
    name, bound, target, least_k, reference
        as for :class:`Estimator`.
    loss
        ``(joint, posterior, x, eps) -> [B]``: the value is -bound, its gradient the estimator; a pure function.
    summary
        what it does, in a line.
    """

    name: str
    bound: str
    target: str | None
    least_k: int
    reference: str
    loss: Callable[[nn.Module, Any, Tensor, Tensor | None], Tensor]
    summary: str = ""

    check = Estimator.check


def every() -> dict[str, Estimator | LossEstimator]:
    """Return all estimators that have a name: the tableau, then those beside it.

    The tableau is :data:`ESTIMATORS`; beside it are the silent gradient and what :mod:`vaelib.discrete` adds for
    discrete latents. Training, the laboratory and the command line look a name up here.
    Introduced in book/03-silent-gradients.ipynb.
    """
    from vaelib import discrete  # here, since it stands on this file

    return {**ESTIMATORS, **discrete.ESTIMATORS}
