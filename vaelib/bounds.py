r"""Bounds on log p(x): how K log-weights become one number, and the three ways to write the ELBO.

A log-weight is :math:`\log w_k = \log p(x, z_k) - \log q(z_k \mid x)` for a draw :math:`z_k \sim q(z \mid x)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from vaelib.posteriors import Latent


def elbo(log_w: Tensor) -> Tensor:
    r"""Return the evidence lower bound :math:`\tfrac1K \sum_k \log w_k`: ``[K, B] -> [B]``, in nats.

    Its expectation is :math:`\log p(x) - \mathrm{KL}(q(z \mid x) \,\|\, p(z \mid x))` for every K.
    Introduced in book/01-elbo-forms.ipynb.
    """
    return log_w.mean(0)


def iwae(log_w: Tensor) -> Tensor:
    r"""Return the importance-weighted bound :math:`\log \tfrac1K \sum_k w_k`: ``[K, B] -> [B]``, in nats.

    (Burda et al. 2016; eq. 9 of "Sticking the Landing".) Its expectation grows with K towards :math:`\log p(x)`;
    for K = 1 it is the ELBO. Introduced in book/01-elbo-forms.ipynb.
    """
    return log_w.logsumexp(0) - math.log(log_w.shape[0])


BOUNDS: dict[str, Callable[[Tensor], Tensor]] = {"elbo": elbo, "iwae": iwae}


class FactoredJoint(Protocol):
    """A joint density that can tell its prior from its likelihood; both return ``[K, B]``."""

    def log_prior(self, z: Latent) -> Tensor: ...

    def log_likelihood(self, x: Tensor, z: Latent) -> Tensor: ...


def elbo_monte_carlo(joint: FactoredJoint, x: Tensor, posterior, z: Latent) -> Tensor:
    r"""Return the integrand of eq. 1, :math:`\log p(x \mid z) + \log p(z) - \log q(z \mid x)`, ``[K, B]``.

    Nothing is integrated by hand, so this form needs nothing but densities; it is the only one whose value has no
    variance when q is the exact posterior (eq. 4). Introduced in book/01-elbo-forms.ipynb.
    """
    return joint.log_likelihood(x, z) + joint.log_prior(z) - posterior.log_prob(z)


def elbo_entropy(joint: FactoredJoint, x: Tensor, posterior, z: Latent) -> Tensor:
    r"""Return the integrand of eq. 2, :math:`\log p(x \mid z) + \log p(z) + H[q]`, ``[K, B]``.

    The entropy is in closed form (``posterior.entropy()``). Introduced in book/01-elbo-forms.ipynb.
    """
    return joint.log_likelihood(x, z) + joint.log_prior(z) + posterior.entropy()


def elbo_kl(joint: FactoredJoint, x: Tensor, posterior, z: Latent) -> Tensor:
    r"""Return the integrand of eq. 3, :math:`\log p(x \mid z) - \mathrm{KL}(q(z \mid x) \,\|\, p(z))`, ``[K, B]``.

    The divergence from the standard normal prior is in closed form (``posterior.kl()``).
    Introduced in book/01-elbo-forms.ipynb.
    """
    return joint.log_likelihood(x, z) - posterior.kl()


FORMS: dict[str, Callable[..., Tensor]] = {
    "monte-carlo": elbo_monte_carlo,
    "entropy": elbo_entropy,
    "kl": elbo_kl,
}
"""The three forms of the ELBO, eq. 1 to 3 of "Sticking the Landing", by name."""
