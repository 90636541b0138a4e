r"""Discrete posteriors: bits, and one-hot choices. Their samples are made of uniform noise and have no path."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vaelib.errors import InputError
from vaelib.posteriors.base import Noise, Posterior, times

MAX_STATES = 2**12
"""The most values of a discrete latent that are gone through one by one."""


def gumbel(eps: Tensor) -> Tensor:
    r"""Return the Gumbel variable :math:`-\log(-\log \varepsilon)` of a uniform one."""
    return -(-eps.log()).log()


@dataclass(frozen=True)
class FactorisedBernoulli(Posterior):
    r"""Independent bits, :math:`q(z \mid x) = \prod_d \pi_d^{z_d} (1-\pi_d)^{1-z_d}`.

    The probabilities are :math:`\pi = \operatorname{sigmoid}(l)`. A sample is
    :math:`z_d = 1[\varepsilon_d > 1 - \pi_d]` for uniform :math:`\varepsilon`: a step, without a derivative. The
    antithetic sample of the same noise is that of :math:`1 - \varepsilon`. Without a batch axis it serves as a prior.
    Introduced in book/03-silent-gradients.ipynb.

    Parameters
    ----------
    logits
        :math:`l`, ``[B, D]``.
    """

    logits: Tensor

    @property
    def mean(self) -> Tensor:
        r"""The probabilities :math:`\pi`, ``[B, D]``."""
        return self.logits.sigmoid()

    def noise_like(self, k: int) -> Noise:
        """Return uniform noise, ``[K, B, D]``."""
        return Noise.like("uniform", k, self.logits)

    def sample(self, eps: Tensor) -> Tensor:
        """Return z, 0 or 1, ``[K, B, D]``; it does not move with phi."""
        return (eps > torch.sigmoid(-self.logits)).to(self.logits.dtype)

    def relaxed_sample(self, eps: Tensor, temperature: float) -> Tensor:
        r"""Return :math:`\operatorname{sigmoid}((l + \log\tfrac{\varepsilon}{1-\varepsilon}) / \tau)`, ``[K, B, D]``.

        The binary Concrete variable (Maddison et al. 2017), between 0 and 1 and differentiable; it rounds to the
        :meth:`sample` of the same noise.
        """
        return torch.sigmoid((self.logits + eps.log() - torch.log1p(-eps)) / temperature)

    def log_prob(self, z: Tensor) -> Tensor:
        r"""Return :math:`\sum_d [z_d \log\pi_d + (1 - z_d) \log(1 - \pi_d)]`, ``[K, B]``; linear in z."""
        return (times(z, F.logsigmoid(self.logits)) + times(1 - z, F.logsigmoid(-self.logits))).sum(-1)

    def entropy(self) -> Tensor:
        r"""Return :math:`H[q] = -\sum_d [\pi_d \log\pi_d + (1 - \pi_d) \log(1 - \pi_d)]` in nats, ``[B]``."""
        never = torch.sigmoid(-self.logits)
        return -(times(self.mean, F.logsigmoid(self.logits)) + times(never, F.logsigmoid(-self.logits))).sum(-1)

    def kl(self, prior: FactorisedBernoulli | None = None) -> Tensor:
        r"""Return :math:`\mathrm{KL}(q \,\|\, p)`, ``[B]``; the prior p is fair bits if not given."""
        fair = FactorisedBernoulli(torch.zeros_like(self.logits))
        return -self.entropy() - (prior or fair).log_prob(self.mean)  # log p is linear in z

    def linear_moments(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the mean :math:`w^\top \pi` and variance of each row of W z, ``[B, X]``.

        The variance is :math:`\sum_d w_d^2\, \pi_d (1-\pi_d)`.
        """
        variance = self.mean * torch.sigmoid(-self.logits)
        return self.mean @ weight.mT, variance @ weight.square().mT

    def support(self) -> Tensor:
        """Return every value of z once, ``[2^D, 1, D]``, or raise InputError if there are more than 4,096."""
        bits = torch.tensor([0.0, 1.0], dtype=self.logits.dtype, device=self.logits.device)
        return _product([bits] * self.logits.shape[-1]).unsqueeze(1)


@dataclass(frozen=True)
class OneHotCategorical(Posterior):
    r"""G independent choices among C classes each, written as one-hot vectors side by side: z is ``[K, B, G C]``.

    With :math:`\pi_g = \operatorname{softmax}(l_g)`, a sample picks the class of the largest :math:`l_{gc} + G_{gc}`
    for Gumbel variables :math:`G = -\log(-\log\varepsilon)` made of uniform noise. Without a batch axis it serves as a
    prior. Introduced in book/03-silent-gradients.ipynb.

    Parameters
    ----------
    logits
        :math:`l`, ``[B, G, C]``.
    """

    logits: Tensor

    @property
    def log_weights(self) -> Tensor:
        r"""The log-probabilities :math:`\log \pi_{gc}`, ``[B, G, C]``."""
        return self.logits.log_softmax(-1)

    @property
    def mean(self) -> Tensor:
        r"""The probabilities :math:`\pi`, ``[B, G C]``."""
        return self.logits.softmax(-1).flatten(-2)

    def noise_like(self, k: int) -> Noise:
        """Return uniform noise, ``[K, B, G C]``."""
        return Noise.like("uniform", k, self.logits.flatten(-2))

    def sample(self, eps: Tensor) -> Tensor:
        """Return z, 0 or 1, ``[K, B, G C]``; it does not move with phi."""
        scores = self._perturbed(eps).detach()
        return torch.zeros_like(scores).scatter(-1, scores.argmax(-1, keepdim=True), 1.0).flatten(-2)

    def relaxed_sample(self, eps: Tensor, temperature: float) -> Tensor:
        r"""Return :math:`\operatorname{softmax}((l_g + G_g) / \tau)` of each group, ``[K, B, G C]``, differentiable.

        The Gumbel-Softmax or Concrete variable (Jang et al. 2017, Maddison et al. 2017); its largest entries are those
        of the :meth:`sample` of the same noise.
        """
        return (self._perturbed(eps) / temperature).softmax(-1).flatten(-2)

    def log_prob(self, z: Tensor) -> Tensor:
        r"""Return :math:`\log q(z) = \sum_{gc} z_{gc} \log \pi_{gc}`, ``[K, B]``."""
        return times(z, self.log_weights.flatten(-2)).sum(-1)

    def entropy(self) -> Tensor:
        r"""Return :math:`H[q] = -\sum_{gc} \pi_{gc} \log \pi_{gc}` in nats, ``[B]``."""
        return -self.log_prob(self.mean)

    def kl(self, prior: OneHotCategorical | None = None) -> Tensor:
        r"""Return :math:`\mathrm{KL}(q \,\|\, p)`, ``[B]``; the prior p is uniform if not given."""
        uniform = OneHotCategorical(torch.zeros_like(self.logits))
        return -self.entropy() - (prior or uniform).log_prob(self.mean)  # log p is linear in z

    def linear_moments(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the mean :math:`\sum_g m_g` and variance of each row of W z, ``[B, X]``.

        The variance is :math:`\sum_{gc} \pi_{gc} (w_{gc} - m_g)^2` with the group means
        :math:`m_g = \sum_c \pi_{gc} w_{gc}`.
        """
        share, grouped = self.logits.softmax(-1), weight.unflatten(-1, self.logits.shape[-2:])
        group_means = torch.einsum("bgc,xgc->bxg", share, grouped)
        off = grouped - group_means.unsqueeze(-1)
        return group_means.sum(-1), torch.einsum("bgc,bxgc->bx", share, off.square())

    def support(self) -> Tensor:
        """Return every value of z once, ``[C^G, 1, G C]``, or raise InputError if there are more than 4,096."""
        groups, classes = self.logits.shape[-2:]
        choices = _product([torch.arange(classes, device=self.logits.device)] * groups)
        return F.one_hot(choices, classes).to(self.logits.dtype).flatten(-2).unsqueeze(1)

    def _perturbed(self, eps: Tensor) -> Tensor:
        return self.logits + gumbel(eps).unflatten(-1, self.logits.shape[-2:])


Discrete = FactorisedBernoulli | OneHotCategorical
"""The posteriors whose samples have no path, and whose values can be gone through if they are few."""


def _product(values: list[Tensor]) -> Tensor:
    """Return the Cartesian product of some vectors, one row each; also of a single vector."""
    if (states := math.prod(map(len, values))) > MAX_STATES:
        raise InputError(
            f"this latent has {states:,} values, too many to go through one by one: at most {MAX_STATES:,} (12 bits); "
            "take a smaller latent, or an estimator that draws samples"
        )
    return torch.cartesian_prod(*values).reshape(-1, len(values))
