r"""Estimators for discrete latents, whose samples have no path: exact or not, biased or not.

With bits or one-hot choices z and :math:`f(z) = \log p(x, z) - \log q(z \mid x)`, these stand beside the rows of the
tableau that have no path channel (from ``elbo-score`` to ``rws``), which ask nothing of z:

* ``elbo-arm`` and ``elbo-disarm``, for bits: the difference of f at a sample and at its antithetic twin;
* ``elbo-gumbel-softmax`` and ``elbo-straight-through``: the gradient of a continuous sample instead, which is biased;
* ``elbo-exact``: no draws, whatever the decoder, by going through all values of z, if they are few.

The last one, and the silent gradient where the decoder is linear (:mod:`vaelib.estimators.silent`), are the truth that
the others are held against.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vaelib.bounds import check_form, divergence, log_likelihood
from vaelib.errors import InputError, positive
from vaelib.estimators.base import LossEstimator
from vaelib.estimators.joint import log_joint, log_weight
from vaelib.posteriors import Discrete, FactorisedBernoulli, as_posterior, is_ours, times


def exact_elbo(joint: Callable[..., Tensor], x: Tensor, q: Discrete) -> Tensor:
    r"""Return the ELBO :math:`\sum_z q(z) [\log p(x, z) - \log q(z)]` by going through all values of z, ``[B]``.

    Its gradient by automatic differentiation is exact. The S values are the draws of one pass through the model,
    ``[S, B, D]``; S is at most 4,096 (12 bits). Introduced in book/03-silent-gradients.ipynb.

    Raises
    ------
    InputError
        if there are more values, or if z is not discrete.
    """
    q, z = every_value(q, x)
    log_q = q.log_prob(z)
    mass, log_w = log_q.exp(), log_weight(joint, x, z, log_q)
    never = (log_w == -math.inf) & (mass > 0)  # impossible, but not for q: the bound is -inf, without a slope
    return times(mass, log_w.masked_fill(never, 0.0)).sum(0).masked_fill(never.any(0), -math.inf)


def log_marginal(joint: Callable[..., Tensor], x: Tensor, q: Discrete) -> Tensor:
    r"""Return the exact :math:`\log p(x) = \log \sum_z p(x, z)`, ``[B]``; q (or ``joint.prior``) says what z can be.

    Introduced in book/08-choosing.ipynb.

    Raises
    ------
    InputError
        as for :func:`exact_elbo`.
    """
    return log_joint(joint, x, every_value(q, x)[1]).logsumexp(0)


def exact(joint: Callable[..., Tensor], q: Discrete, x: Tensor, eps: Tensor | None) -> Tensor:
    """Return minus :func:`exact_elbo`, ``[B]``; there is no noise."""
    return -exact_elbo(joint, x, q)


def antithetic(weigh: Callable[[Tensor, Tensor, FactorisedBernoulli], Tensor]) -> Callable[..., Tensor]:
    r"""Return the loss of an estimator for bits that compares each sample with its antithetic twin.

    The noise :math:`\varepsilon` makes z, and :math:`1 - \varepsilon` makes :math:`\bar z`, so K rows of noise cost 2 K
    evaluations of the decoder. With :math:`\Delta = f(z) - f(\bar z)`, the gradient in the logits is
    :math:`\tfrac1K \sum_k \Delta_k\, h_k`; that of the decoder is the mean over all samples.

    Parameters
    ----------
    weigh
        ``(eps, z - twin, q) -> h``, all ``[K, B, D]``.
    """

    def loss(joint: Callable[..., Tensor], q: FactorisedBernoulli, x: Tensor, eps: Tensor) -> Tensor:
        if not isinstance(q, FactorisedBernoulli):
            raise InputError(
                f"ARM and DisARM are for bits, a posterior FactorisedBernoulli, but this one is a {type(q).__name__}: "
                "use elbo-score-loo, which takes any"
            )
        if not is_ours(type(q), "log_prob"):
            raise InputError(
                f"ARM and DisARM ask for the logits of bits, but a {type(q).__name__} redefines their log_prob: use "
                "elbo-score-loo, which takes any"
            )
        z, twin = q.sample(eps), q.sample(1 - eps)
        both = torch.cat((z, twin))
        log_w = log_weight(joint, x, both, q.log_prob(both).detach())
        with torch.no_grad():
            first, second = log_w.chunk(2)
            delta = first - second
            delta = delta.masked_fill(~delta.isfinite(), 0.0)  # of an impossible sample nothing is learned
            gradient = delta.unsqueeze(-1) * weigh(eps, z - twin, q)
        logits = q.logits.masked_fill(q.logits.isinf(), 0.0)  # a bit that is sure has nothing to learn
        total = (gradient * logits).sum(-1).mean(0)
        return -(log_w.mean(0) + total - total.detach())

    return loss


@antithetic
def arm(eps: Tensor, difference: Tensor, q: FactorisedBernoulli) -> Tensor:
    r"""Augment-REINFORCE-merge, :math:`h_d = \varepsilon_d - \tfrac12` (Yin and Zhou 2019)."""
    return eps - 0.5


@antithetic
def disarm(eps: Tensor, difference: Tensor, q: FactorisedBernoulli) -> Tensor:
    r"""ARM averaged over the noise that gives the same two samples (Dong et al. 2020), so never of more variance.

    .. math:: h_d = \tfrac12 (z_d - \bar z_d) \operatorname{sigmoid}(|l_d|)

    Nothing is asked of a bit that is the same in both.
    """
    return 0.5 * difference * q.logits.abs().sigmoid()


def relaxed(temperature: float, straight_through: bool) -> Callable[..., Tensor]:
    r"""Return the loss that replaces the sample by a continuous one, the gradient of the ELBO's KL form.

    .. math:: \partial_\phi \big[ \log p(x \mid z_\tau) - \mathrm{KL}(q \,\|\, p(z)) \big]

    with :math:`z_\tau` the ``relaxed_sample`` of temperature :math:`\tau`, or, straight through, at the sample itself
    with the derivative of :math:`z_\tau`. The value is the bound at the discrete samples, since the value at relaxed
    ones bounds nothing; where the gradient is not taken straight through, that is one more pass through the decoder,
    without a gradient.
    """
    positive("the temperature of a relaxed sample", temperature)

    def loss(joint: Callable[..., Tensor], q: Discrete, x: Tensor, eps: Tensor) -> Tensor:
        discrete(q, "a relaxed sample")
        if not hasattr(joint, "log_likelihood"):
            raise InputError(
                "a relaxed sample goes through the likelihood alone (method log_likelihood), which a "
                f"{type(joint).__name__} does not have: use models.DiscreteJoint, or a row such as elbo-score-loo"
            )
        check_form(q, "relaxed_sample")
        z, soft = q.sample(eps), q.relaxed_sample(eps, temperature)
        kl = divergence(joint, q)
        if straight_through:
            return -(log_likelihood(joint, x, z + (soft - soft.detach())).mean(0) - kl)
        with torch.no_grad():
            value = log_likelihood(joint, x, z).mean(0) - kl
        total = log_likelihood(joint, x, soft).mean(0) - kl
        return -(value + total - total.detach())

    return loss


def gumbel_softmax(temperature: float) -> LossEstimator:
    r"""Return the estimator that differentiates a continuous sample (Jang et al. 2017, Maddison et al. 2017).

    Its bias goes to 0 with the temperature :math:`\tau`, while its variance grows without limit. To anneal, make one
    for every few steps. Introduced in book/03-silent-gradients.ipynb.

    Raises
    ------
    InputError
        if the temperature is not above 0.
    """
    name = f"elbo-gumbel-softmax({temperature:g})"
    summary = "For discrete latents: the gradient of a continuous sample, which is biased."
    return LossEstimator(name, "elbo", None, 1, "jang2017", relaxed(temperature, straight_through=False), summary)


def straight_through(temperature: float) -> LossEstimator:
    r"""Return the estimator that evaluates the sample and differentiates the continuous one (Jang et al. 2017).

    The decoder sees only what it will see later, and its gradient is unbiased; the encoder's is biased.
    Introduced in book/03-silent-gradients.ipynb.

    Raises
    ------
    InputError
        if the temperature is not above 0.
    """
    name = f"elbo-straight-through({temperature:g})"
    summary = "For discrete latents: the value of the sample, the gradient of a continuous one; biased."
    return LossEstimator(name, "elbo", None, 1, "jang2017", relaxed(temperature, straight_through=True), summary)


TEMPERATURE = 0.5
"""The temperature of the relaxed estimators that have a plain name; the floor of Jang et al.'s schedule."""

ARM, DISARM = (
    LossEstimator(name, "elbo", "elbo", 1, source, loss, summary)
    for name, source, loss, summary in (
        ("elbo-arm", "yin2019", arm, "For bits: the difference between a sample and its antithetic twin."),
        ("elbo-disarm", "dong2020", disarm, "For bits: ARM, averaged over all noise of the same pair."),
    )
)
GUMBEL_SOFTMAX = replace(gumbel_softmax(TEMPERATURE), name="elbo-gumbel-softmax")
STRAIGHT_THROUGH = replace(straight_through(TEMPERATURE), name="elbo-straight-through")
EXACT = LossEstimator(
    "elbo-exact",
    "elbo",
    "elbo",
    1,
    "mohamed2020",
    exact,
    "For discrete latents of at most 12 bits: no draws, all values.",
)


def every_value(q: Any, x: Tensor) -> tuple[Discrete, Tensor]:
    """Return q and every value that its z can have, ``[S, B, D]``."""
    q = discrete(as_posterior(q), "enumeration")
    return q, q.support().expand(-1, len(x), -1)


def discrete(q: Any, what: str) -> Discrete:
    """Return q if it is discrete, or say what needs it to be."""
    if not isinstance(q, Discrete):
        raise InputError(
            f"{what} is for a discrete posterior, FactorisedBernoulli or OneHotCategorical, but this one is a "
            f"{type(q).__name__}: use a row of the tableau such as elbo-path"
        )
    return q
