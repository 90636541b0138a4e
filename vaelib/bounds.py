r"""Bounds on log p(x): how K log-weights become one number, and the three ways to write the ELBO.

A log-weight is :math:`\log w_k = \log p(x, z_k) - \log q(z_k \mid x)` for a draw :math:`z_k \sim q(z \mid x)`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vaelib.errors import InputError, choose
from vaelib.posteriors import (
    DiagonalGaussian,
    FullGaussian,
    Latent,
    Posterior,
    as_posterior,
    draws,
    redefines_half,
    standard_normal_log_prob,
    times,
    tracing,
)


def elbo(log_w: Tensor, log_share: Tensor | float = 0.0) -> Tensor:
    r"""Return the evidence lower bound :math:`\tfrac1K \sum_k s_k \log w_k`: ``[K, B] -> [B]``, in nats.

    Its expectation is :math:`\log p(x) - \mathrm{KL}(q(z \mid x) \,\|\, p(z \mid x))` for every K. A draw counts
    :math:`s_k`, which is 1 unless draws are stratified (:class:`vaelib.posteriors.Mixture`; algorithm 3 of "Sticking
    the Landing"). Introduced in book/01-elbo-forms.ipynb.
    """
    log_w = possible(log_w)
    return (times(log_share.exp(), log_w) if isinstance(log_share, Tensor) else log_w).mean(0)


def iwae(log_w: Tensor, log_share: Tensor | float = 0.0) -> Tensor:
    r"""Return the importance-weighted bound :math:`\log \tfrac1K \sum_k s_k w_k`: ``[K, B] -> [B]``, in nats.

    (Burda et al. 2016; eq. 9 of "Sticking the Landing"; Morningstar et al. 2021 for shares :math:`s_k`.) Its
    expectation grows with K towards :math:`\log p(x)`; for K = 1 it is the ELBO. Introduced in
    book/06-mixtures-and-iwae.ipynb.
    """
    shared = log_w + log_share if isinstance(log_share, Tensor) else log_w
    return possible(shared).logsumexp(0) - math.log(log_w.shape[0])


def possible(log_w: Tensor) -> Tensor:
    """Return ``log_w`` with no gradient where it is minus infinity: what is impossible teaches nothing."""
    if not log_w.requires_grad or not may_be_impossible(log_w):
        return log_w
    return log_w.masked_fill(log_w == -math.inf, -math.inf)


def may_be_impossible(log_w: Tensor) -> bool:
    """Whether one of ``log_w`` is minus infinity, or none of them can be looked at."""
    return tracing() or not log_w.detach().amin().item() > -math.inf  # NaN hides the others


def normalised(log_w: Tensor) -> Tensor:
    r"""Return the weights :math:`\tilde w = \operatorname{softmax}_k \log w`, ``[K, B]``; 0 where all w are."""
    return log_w.softmax(0).masked_fill(log_w == -math.inf, 0.0)


BOUNDS: dict[str, Callable[..., Tensor]] = {"elbo": elbo, "iwae": iwae}
"""The bounds by name, each ``(log_w, log_share=0.0) -> [B]``."""


class FactoredJoint(Protocol):
    """A joint density that can tell its prior from its likelihood; both return ``[K, B]``."""

    def log_prior(self, z: Latent) -> Tensor: ...

    def log_likelihood(self, x: Tensor, z: Latent) -> Tensor: ...


def shaped(function: str, what: str, value: Tensor, x: Tensor, z: Latent) -> Tensor:
    """Return ``value``, or raise InputError if it is not of the shape ``[K, B]``, or of a dtype of two digits."""
    expected = (draws(z), x.shape[0])
    if not isinstance(value, Tensor) or value.shape != expected:
        found = list(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise InputError(
            f"{function} must return {what} of the shape [K, B] = {list(expected)}, one value for each draw and "
            f"observation, but returned {found}; see that it sums over the last axis"
        )
    if value.dtype in (torch.bfloat16, torch.float16):
        raise InputError(
            f"{what} is {value.dtype}, which has two or three digits, too few for a sum over coordinates: let networks "
            "run in it, but make their outputs .float() and take the sum in float32"
        )
    return value


def log_likelihood(joint: FactoredJoint, x: Tensor, z: Latent) -> Tensor:
    """Return log p(x given z), or raise InputError if it is not of the shape ``[K, B]``."""
    return shaped("log_likelihood(x, z)", "log p(x given z)", joint.log_likelihood(x, z), x, z)


def elbo_monte_carlo(joint: FactoredJoint, x: Tensor, posterior, z: Latent) -> Tensor:
    r"""Return the integrand of eq. 1, :math:`\log p(x \mid z) + \log p(z) - \log q(z \mid x)`, ``[K, B]``.

    Nothing is integrated by hand, so this form needs nothing but densities; it is the only one whose value has no
    variance when q is the exact posterior (eq. 4). Introduced in book/01-elbo-forms.ipynb.
    """
    return log_likelihood(joint, x, z) + joint.log_prior(z) - posterior.log_prob(z)


def elbo_entropy(joint: FactoredJoint, x: Tensor, posterior, z: Latent) -> Tensor:
    r"""Return the integrand of eq. 2, :math:`\log p(x \mid z) + \log p(z) + H[q]`, ``[K, B]``.

    The entropy is in closed form (``posterior.entropy()``). Introduced in book/01-elbo-forms.ipynb.
    """
    return log_likelihood(joint, x, z) + joint.log_prior(z) + posterior.entropy()


def divergence(joint: nn.Module, q) -> Tensor:
    r"""Return :math:`\mathrm{KL}(q \,\|\, p(z))` to the model's prior in closed form, ``[B]``.

    The prior is ``joint.prior`` where there is one, a distribution like q; otherwise it is standard normal.
    Introduced in book/03-silent-gradients.ipynb.

    Raises
    ------
    InputError
        if the model does not tell its prior, or q is of another kind than that, or a mixture, whose divergence has no
        closed form.
    """
    q = as_posterior(q)
    prior = prior_of(joint, q)
    return q.kl() if prior is None else q.kl(prior)


def prior_of(joint: nn.Module, q) -> Posterior | None:
    """Return the prior from which q has a divergence in closed form, None for the standard normal, or raise InputError.

    As :func:`divergence` does.
    """
    prior = getattr(joint, "prior", None)
    if prior is None and not hasattr(joint, "log_prior") and has_density(joint):
        raise InputError(
            f"a {type(joint).__name__} does not tell its prior: give it a method log_prior(z), or inherit from "
            "models.Joint, whose prior is the standard normal"
        )
    for whole, part in PARTS.items():
        if redefines_half(type(joint), whole, part):
            raise InputError(
                f"this {type(joint).__name__} redefines {whole}, but its {part} is that of the class it comes from, "
                f"and a closed form asks for that: redefine {part} too, or use a row of the tableau"
            )
    families = (DiagonalGaussian, FullGaussian) if prior is None else (type(prior),)
    if not isinstance(q, families):
        known = " or ".join(family.__name__ for family in families)
        kind = "a standard normal" if prior is None else f"a {known}"
        raise InputError(
            f"the divergence of a {type(q).__name__} from {kind} prior has no closed form: use a posterior of the "
            f"class {known}, or a row of the tableau, which estimates the divergence from draws"
        )
    if prior is not None and not inspect.signature(q.kl).parameters:
        raise InputError(
            f"the divergence of a {type(q).__name__} from a prior of its own kind has no closed form here, only that "
            "from the standard normal: use a row of the tableau, which estimates the divergence from draws"
        )
    check_form(q, "kl")
    if prior is None and hasattr(joint, "log_prior") and not tracing():
        check_standard(joint, q.mean)
    return prior


PARTS = {"forward": "log_likelihood", "log_prior": "prior"}
"""What a closed form asks a joint for in the place of what a row of the tableau does."""


def check_form(q: Posterior, form: str) -> None:
    """Raise InputError if q does not have the closed form, or has that of its base, and another density."""
    if not hasattr(q, form):
        raise InputError(f"a {type(q).__name__} has no {form}: give a class that has, such as a DiagonalGaussian")
    if redefines_half(type(q), "log_prob", form):
        raise InputError(
            f"a {type(q).__name__} redefines log_prob, but its {form} is that of the class it comes from: redefine "
            f"{form} too, or use a row of the tableau, which estimates it from draws"
        )


def has_density(joint: Any) -> bool:
    """Whether a joint is called as log p(x, z), and so has a prior of its own; some know their likelihood alone."""
    return type(joint).forward is not nn.Module.forward if isinstance(joint, nn.Module) else callable(joint)


class StandardPrior:
    """A joint density whose prior is the standard normal, and known to be."""

    def log_prior(self, z: Tensor) -> Tensor:
        """Return log p(z), ``[K, B]``."""
        return standard_normal_log_prob(z)


def check_standard(joint: FactoredJoint, like: Tensor) -> None:
    """Raise InputError unless log p(z) is, and stays, that of the standard normal; one that may be another is tried."""
    if getattr(joint.log_prior, "__func__", None) is StandardPrior.log_prior:
        return
    z = torch.stack([torch.full_like(like, place) for place in (0.3, -1.1, 2.7)])
    with torch.enable_grad():
        log_p = joint.log_prior(z)
    if log_p.requires_grad or not torch.allclose(log_p, standard_normal_log_prob(z)):
        learnt = "learnt, and so " * log_p.requires_grad
        raise InputError(
            f"the prior of this {type(joint).__name__} is {learnt}not the standard normal, for which the divergence "
            "has a closed form: use a row of the tableau, which estimates it from draws"
        )


def elbo_kl(joint: FactoredJoint, x: Tensor, posterior, z: Latent) -> Tensor:
    r"""Return the integrand of eq. 3, :math:`\log p(x \mid z) - \mathrm{KL}(q(z \mid x) \,\|\, p(z))`, ``[K, B]``.

    The divergence from the model's prior is in closed form (:func:`divergence`).
    Introduced in book/01-elbo-forms.ipynb.
    """
    return log_likelihood(joint, x, z) - divergence(joint, posterior)


FORMS: dict[str, Callable[..., Tensor]] = {
    "monte-carlo": elbo_monte_carlo,
    "entropy": elbo_entropy,
    "kl": elbo_kl,
}
"""The three forms of the ELBO, eq. 1 to 3 of "Sticking the Landing", by name."""


def estimate(form: str, bound: str, joint: FactoredJoint, x: Tensor, posterior, z: Latent) -> Tensor:
    """Return ``bound`` estimated from the draws ``z`` with the ELBO written in ``form``, ``[B]``.

    Differentiable in everything, so that ``(-estimate(...).mean()).backward()`` is a step of training with the
    divergence or the entropy in closed form. Introduced in book/06-mixtures-and-iwae.ipynb.

    Raises
    ------
    InputError
        for a name that does not exist, for a closed form that the posterior does not have, for densities that do not
        have the shape ``[K, B]``, and for the importance-weighted bound in a form that is not the full Monte Carlo one:
        its integrand is then not a log-weight, and the "bound" bounds nothing.
    """
    integrand, posterior = choose("form of the ELBO", form, FORMS), as_posterior(posterior)
    combine = choose("bound", bound, BOUNDS)
    if form != "monte-carlo":
        if bound != "elbo":
            raise InputError(
                f"the form '{form}' takes an expectation out of log w, but bound '{bound}' needs log w itself for "
                "every draw: use form 'monte-carlo', or bound 'elbo'"
            )
        if not hasattr(posterior, form):
            raise InputError(f"{type(posterior).__name__} has no {form} in closed form: use form 'monte-carlo'")
        check_form(posterior, form)
    k = draws(z)
    values = integrand(joint, x, posterior, z)
    if values.shape != (k, len(x)):
        raise InputError(
            f"the densities of joint and posterior must be of the shape [K, B] = {[k, len(x)]}, but returned "
            f"{list(values.shape)} together; see that they sum over the last axis"
        )
    return combine(values, posterior.log_share(k))
