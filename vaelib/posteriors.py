r"""Approximate posteriors q(z given x), and the one operation the whole book turns on: holding their parameters still.

A posterior is what an encoder returns. It is built from a batch of ``B`` observations and knows four things: how to
draw the noise its samples are made of, how to turn noise into a sample, the log-density of a sample, and a copy of
itself whose parameters are constants:

=====================  ==============================  ==========================================================
``noise(k, g)``        eps, ``[K, B, D]``              standard normal draws from the generator ``g``
``sample(eps)``        z = t(eps, phi), ``[K, B, D]``  differentiable in phi (the *path*)
``log_prob(z)``        log q(z given x), ``[K, B]``    differentiable in phi (the *score*) and in z
``stop_gradient()``    the same q                      phi held constant; still differentiable in z
=====================  ==============================  ==========================================================

A latent of two stochastic layers is a tuple ``(z1, z2)``, and so is its noise. The discrete posteriors at the end make
their samples of uniform noise; these have no path, so ``log_prob`` is all that moves with phi.

A posterior that can say the mean and the variance of linear functions of z has a method ``linear_moments(weight)``
besides; this is all that an exact expectation under a linear decoder asks for (see :mod:`vaelib.silent`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaelib.errors import InputError

Latent = Tensor | tuple[Tensor, ...]
"""A sample or its noise: one tensor ``[K, B, D]``, or one for each stochastic layer."""

LOG_2PI = math.log(2 * math.pi)


def map_latent(function: Callable[[Tensor], Tensor], z: Latent) -> Latent:
    """Apply ``function`` to every stochastic layer of ``z``."""
    return tuple(function(layer) for layer in z) if isinstance(z, tuple) else function(z)


def standard_normal_log_prob(z: Tensor) -> Tensor:
    r"""Return :math:`\log \mathcal N(z; 0, I)`, summed over the last axis: ``[..., D] -> [...]``."""
    return -0.5 * (z.square().sum(-1) + z.shape[-1] * LOG_2PI)


def standard_normal(k: int, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw ``k`` standard normal variables for each entry of ``like``: ``[B, D] -> [K, B, D]``."""
    if k < 1:
        raise InputError(f"the number of draws k must be at least 1, but is {k}")
    return torch.randn((k, *like.shape), generator=generator, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class DiagonalGaussian:
    r"""The factorised Gaussian :math:`q(z \mid x) = \mathcal N(z; \mu, \operatorname{diag} \sigma^2)`.

    Its samples are :math:`z = \mu + \sigma \varepsilon`. Introduced in book/01-elbo-forms.ipynb.

    Parameters
    ----------
    mean, log_std
        :math:`\mu` and :math:`\log \sigma`, each ``[B, D]`` (or ``[K, B, D]``, for a conditional of a sampled layer).
    """

    mean: Tensor
    log_std: Tensor

    def noise(self, k: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw standard normal noise, ``[K, B, D]``."""
        return standard_normal(k, self.mean, generator)

    def sample(self, eps: Tensor) -> Tensor:
        r"""Return :math:`z = \mu + \sigma \varepsilon`, ``[K, B, D]``."""
        return torch.addcmul(self.mean, self.log_std.exp(), eps)

    def log_prob(self, z: Tensor) -> Tensor:
        r"""Return :math:`\log q(z) = -\tfrac12 \sum_d [(z_d-\mu_d)^2/\sigma_d^2 + 2\log\sigma_d + \log 2\pi]`."""
        return standard_normal_log_prob((z - self.mean) * (-self.log_std).exp()) - self.log_std.sum(-1)

    def entropy(self) -> Tensor:
        r"""Return :math:`H[q] = \sum_d [\log\sigma_d + \tfrac12 (1 + \log 2\pi)]` in nats, ``[B]``."""
        return self.log_std.sum(-1) + 0.5 * self.mean.shape[-1] * (1 + LOG_2PI)

    def kl(self) -> Tensor:
        r"""Return the divergence from the standard normal prior, ``[B]``.

        .. math:: \mathrm{KL}(q \,\|\, \mathcal N(0, I)) = \tfrac12 \sum_d [\mu_d^2 + \sigma_d^2 - 1 - 2\log\sigma_d]
        """
        return 0.5 * (self.mean.square() + (2 * self.log_std).exp() - 1 - 2 * self.log_std).sum(-1)

    def linear_moments(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the mean :math:`w^\top \mu` and variance of each row of W z, ``[B, X]``.

        The variance is :math:`\sum_d w_d^2 \sigma_d^2`.
        """
        return self.mean @ weight.mT, (2 * self.log_std).exp() @ weight.square().mT

    def stop_gradient(self) -> DiagonalGaussian:
        """Return the same Gaussian with its parameters held constant."""
        return DiagonalGaussian(self.mean.detach(), self.log_std.detach())


@dataclass(frozen=True)
class FullGaussian:
    r"""The Gaussian :math:`q(z \mid x) = \mathcal N(z; \mu, L L^\top)` with a full covariance.

    Its samples are :math:`z = \mu + L \varepsilon`. The exact posterior of a linear-Gaussian model is one.
    Introduced in book/01-elbo-forms.ipynb.

    Parameters
    ----------
    mean
        :math:`\mu`, ``[B, D]``.
    scale_tril
        :math:`L`, lower triangular with a positive diagonal, ``[D, D]`` (shared) or ``[B, D, D]``; what is above the
        diagonal does not count.
    """

    mean: Tensor
    scale_tril: Tensor

    def noise(self, k: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw standard normal noise, ``[K, B, D]``."""
        return standard_normal(k, self.mean, generator)

    def sample(self, eps: Tensor) -> Tensor:
        r"""Return :math:`z = \mu + L \varepsilon`, ``[K, B, D]``."""
        return self.mean + (self.scale_tril.tril() @ eps.unsqueeze(-1)).squeeze(-1)

    def log_prob(self, z: Tensor) -> Tensor:
        r"""Return :math:`\log q(z) = \log \mathcal N(L^{-1}(z - \mu); 0, I) - \log\det L`, ``[K, B]``."""
        residual = (z - self.mean).unsqueeze(-1)
        whitened = torch.linalg.solve_triangular(self.scale_tril, residual, upper=False).squeeze(-1)
        return standard_normal_log_prob(whitened) - self._log_det()

    def entropy(self) -> Tensor:
        r"""Return :math:`H[q] = \log\det L + \tfrac{D}{2}(1 + \log 2\pi)` in nats, ``[B]``."""
        return (self._log_det() + 0.5 * self.mean.shape[-1] * (1 + LOG_2PI)).expand(self.mean.shape[:-1])

    def kl(self) -> Tensor:
        r"""Return the divergence from the standard normal prior, ``[B]``.

        .. math:: \mathrm{KL}(q \,\|\, \mathcal N(0, I)) = \tfrac12[\|\mu\|^2 + \|L\|_F^2 - D] - \log\det L
        """
        second_moment = self.mean.square().sum(-1) + self.scale_tril.tril().square().sum((-2, -1))
        return 0.5 * (second_moment - self.mean.shape[-1]) - self._log_det()

    def linear_moments(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the mean :math:`w^\top \mu` and variance :math:`\|L^\top w\|^2` of each row of W z, ``[B, X]``."""
        mean = self.mean @ weight.mT
        return mean, (weight @ self.scale_tril.tril()).square().sum(-1).expand_as(mean)

    def stop_gradient(self) -> FullGaussian:
        """Return the same Gaussian with its parameters held constant."""
        return FullGaussian(self.mean.detach(), self.scale_tril.detach())

    def _log_det(self) -> Tensor:
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)


@dataclass(frozen=True)
class HierarchicalGaussian:
    r"""Two stochastic layers, :math:`q(z_1, z_2 \mid x) = q(z_1 \mid x)\, q(z_2 \mid z_1)`.

    The second layer's mean and scale are functions of the *sampled* first layer, so a gradient can reach the
    parameters of :math:`q(z_1 \mid x)` through them. Stopping them must therefore hold the parameters of the second
    network constant and not its outputs, which would cut that path as well. Introduced in book/02-score-and-path.ipynb.

    Parameters
    ----------
    first
        the posterior of the layer next to the data.
    second
        a module called as ``second(z1)`` that returns the posterior of the layer above it.
    """

    first: DiagonalGaussian
    second: nn.Module

    def noise(self, k: int, generator: torch.Generator | None = None) -> Latent:
        """Draw standard normal noise for both layers, ``([K, B, D1], [K, B, D2])``."""
        eps1 = self.first.noise(k, generator)
        with torch.no_grad():
            above = self.second(self.first.sample(eps1[:1]))
        return eps1, standard_normal(k, above.mean[0], generator)

    def sample(self, eps: Latent) -> Latent:
        r"""Return :math:`z_1 = t_1(\varepsilon_1)` and :math:`z_2 = t_2(\varepsilon_2, z_1)`."""
        eps1, eps2 = eps
        z1 = self.first.sample(eps1)
        return z1, self.second(z1).sample(eps2)

    def log_prob(self, z: Latent) -> Tensor:
        r"""Return :math:`\log q(z_1 \mid x) + \log q(z_2 \mid z_1)`, ``[K, B]``."""
        z1, z2 = z
        return self.first.log_prob(z1) + self.second(z1).log_prob(z2)

    def stop_gradient(self) -> HierarchicalGaussian:
        """Return the same posterior with the parameters of both layers held constant."""
        return HierarchicalGaussian(self.first.stop_gradient(), stop_gradient(self.second))


def stop_gradient(module: nn.Module) -> nn.Module:
    r"""Return the same module with its parameters held constant, :math:`f_{\bar\phi}` for :math:`f_\phi`.

    The copy shares the parameters' storage, follows every later change of their values, and can be differentiated
    with respect to its *input*. It is a shallow copy whose parameters are detached, module by module, and it works
    under ``torch.func.functional_call``, ``vmap`` and ``grad``. Buffers are copied, so that the running statistics
    of a stopped batch normalisation do not move twice. Introduced in book/02-score-and-path.ipynb.

    Raises
    ------
    InputError
        if an active dropout layer is inside: a second pass would draw another mask, and would not be the same q.
    """
    return _stopped_copy(module, {})


def _stopped_copy(module: nn.Module, known: dict[int, object]) -> nn.Module:
    if id(module) in known:
        return known[id(module)]
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
        raise InputError(
            "stop_gradient found an active dropout layer, whose second pass would draw another mask and evaluate "
            "another q; call .eval() on the module or leave dropout out of the posterior"
        )
    stopped = known[id(module)] = object.__new__(type(module))  # copy.copy refuses parametrised modules
    for name, parameter in module._parameters.items():
        if parameter is not None:
            known.setdefault(id(parameter), parameter.detach())
    stopped.__dict__ = {  # lists of parameters, such as an LSTM's flat weights, are rewritten too
        key: [known.get(id(item), item) for item in value] if type(value) is list else value
        for key, value in module.__dict__.items()
    }
    stopped.__dict__["_parameters"] = {
        name: None if parameter is None else known[id(parameter)] for name, parameter in module._parameters.items()
    }
    stopped.__dict__["_buffers"] = {
        name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()
    }
    stopped.__dict__["_modules"] = {
        name: None if child is None else _stopped_copy(child, known) for name, child in module._modules.items()
    }
    return stopped


@dataclass(frozen=True)
class Mixture:
    r"""The mixture :math:`q(z \mid x) = \sum_c \pi_c\, q_c(z \mid x)`, with the choice of the component summed out.

    A drawn component would be a sample without a derivative. Instead every component is drawn from equally often
    (the draws are *stratified*), and a draw from component c counts :math:`C \pi_c` times as much as its share
    (:meth:`log_share`). So K draws mean K / C from each component, component after component, and the weights get
    their gradient through the shares (algorithm 3 of "Sticking the Landing"; see
    :func:`vaelib.objectives.mixture_bound`). Introduced in book/05-mixtures-and-iwae.ipynb.

    Parameters
    ----------
    components
        C posteriors of one family for the same ``B`` observations, whose samples are tensors.
    logits
        ``[C, B]``; :math:`\pi = \operatorname{softmax}_c` of it, which keeps the weights on the simplex.
    """

    components: tuple[DiagonalGaussian | FullGaussian, ...]
    logits: Tensor

    @classmethod
    def from_weights(cls, components: tuple[DiagonalGaussian | FullGaussian, ...], weights: Tensor) -> Mixture:
        """Build a mixture from its weights :math:`\\pi`, ``[C, B]``.

        Raises
        ------
        InputError
            if a weight is negative, or those of an observation do not sum to 1.
        """
        total = weights.sum(0)
        off = (total - 1).abs() > 1e3 * torch.finfo(weights.dtype).eps
        if (weights < 0).any() or off.any():
            found = (
                f"one is {weights.min():.6g}"
                if (weights < 0).any()
                else f"those of one observation sum to {total[off][0]:.6g}"
            )
            raise InputError(
                f"mixture weights must be at least 0 and sum to 1 over the components, but {found}; "
                "divide them by their sum, or give logits: Mixture(components, logits)"
            )
        return cls(components, weights.log())

    @property
    def log_weights(self) -> Tensor:
        r"""The log-weights :math:`\log \pi_c`, normalised, ``[C, B]``."""
        return self.logits.log_softmax(0)

    @property
    def mean(self) -> Tensor:
        r"""The mean :math:`\sum_c \pi_c \mu_c`, ``[B, D]``."""
        means = torch.stack([q.mean for q in self.components])
        return (self.log_weights.exp().unsqueeze(-1) * means).sum(0)

    def noise(self, k: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw noise for ``k`` draws in all, ``[K, B, D]``; ``k`` must be a multiple of C."""
        equal_shares(k, len(self.components))
        return self.components[0].noise(k, generator)

    def sample(self, eps: Tensor) -> Tensor:
        r"""Return :math:`z = t(\varepsilon, \phi_c)`, ``[K, B, D]``, the first K / C from the first component."""
        equal_shares(len(eps), len(self.components))
        return torch.cat([q.sample(e) for q, e in zip(self.components, eps.chunk(len(self.components)))])

    def log_prob(self, z: Tensor) -> Tensor:
        r"""Return :math:`\log \sum_c \pi_c\, q_c(z)` of any ``z``, whichever component it is from, ``[K, B]``."""
        log_q = torch.stack([q.log_prob(z) for q in self.components])
        return (self.log_weights.unsqueeze(1) + log_q).logsumexp(0)

    def log_share(self, k: int) -> Tensor:
        r"""Return :math:`\log (C \pi_c)` for each of ``k`` draws, ``[K, B]``: what turns their mean into that of q."""
        count = len(self.components)
        return (self.log_weights + math.log(count)).repeat_interleave(k // count, 0)

    def linear_moments(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the mean :math:`m = \sum_c \pi_c m_c` and variance of each row of W z, ``[B, X]``.

        The law of total variance, :math:`\sum_c \pi_c [v_c + (m_c - m)^2]`: within the components and between them.
        """
        means, variances = map(torch.stack, zip(*(q.linear_moments(weight) for q in self.components)))
        share = self.log_weights.exp().unsqueeze(-1)
        mean = (share * means).sum(0)
        return mean, (share * (variances + (means - mean).square())).sum(0)

    def stop_gradient(self) -> Mixture:
        """Return the same mixture with its components and weights held constant."""
        return Mixture(tuple(q.stop_gradient() for q in self.components), self.logits.detach())


def equal_shares(k: int, components: int) -> None:
    """Raise InputError unless ``k`` draws can be shared equally among the components of a mixture."""
    if k < 1 or k % components:
        raise InputError(
            f"a mixture of {components} components is drawn from in equal shares, so the number of draws k must be a "
            f"multiple of {components}, but is {k}"
        )


def standard_uniform(k: int, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw ``k`` variables uniform on (0, 1) for each entry of ``like``: ``[B, D] -> [K, B, D]``; none is 0."""
    if k < 1:
        raise InputError(f"the number of draws k must be at least 1, but is {k}")
    eps = torch.rand((k, *like.shape), generator=generator, dtype=like.dtype, device=like.device)
    return eps.clamp_min(torch.finfo(like.dtype).tiny)


MAX_STATES = 2**12
"""The most values of a discrete latent that are gone through one by one."""


def gumbel(eps: Tensor) -> Tensor:
    r"""Return the Gumbel variable :math:`-\log(-\log \varepsilon)` of a uniform one."""
    return -(-eps.log()).log()


@dataclass(frozen=True)
class FactorisedBernoulli:
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

    def noise(self, k: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw uniform noise, ``[K, B, D]``."""
        return standard_uniform(k, self.logits, generator)

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
        r"""Return :math:`\log q(z) = \sum_d [z_d l_d - \log(1 + e^{l_d})]`, ``[K, B]``."""
        return (z * self.logits).sum(-1) - F.softplus(self.logits).sum(-1)

    def entropy(self) -> Tensor:
        r"""Return :math:`H[q] = \sum_d [\log(1 + e^{l_d}) - \pi_d l_d]` in nats, ``[B]``."""
        return (F.softplus(self.logits) - self.mean * self.logits).sum(-1)

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

    def stop_gradient(self) -> FactorisedBernoulli:
        """Return the same bits with their probabilities held constant."""
        return FactorisedBernoulli(self.logits.detach())


@dataclass(frozen=True)
class OneHotCategorical:
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

    def noise(self, k: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw uniform noise, ``[K, B, G C]``."""
        return standard_uniform(k, self.logits.flatten(-2), generator)

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
        return (z * self.log_weights.flatten(-2)).sum(-1)

    def entropy(self) -> Tensor:
        r"""Return :math:`H[q] = -\sum_{gc} \pi_{gc} \log \pi_{gc}` in nats, ``[B]``."""
        return -self.log_prob(self.mean)

    def kl(self, prior: OneHotCategorical | None = None) -> Tensor:
        r"""Return :math:`\mathrm{KL}(q \,\|\, p)`, ``[B]``; the prior p is uniform if not given."""
        uniform = OneHotCategorical(torch.zeros_like(self.logits))
        return -self.entropy() - (prior or uniform).log_prob(self.mean)  # log p is linear in z

    def linear_moments(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the mean :math:`\sum_g m_g` and variance of each row of W z, ``[B, X]``.

        The variance is :math:`\sum_g [\sum_c \pi_{gc} w_{gc}^2 - m_g^2]` with the group means
        :math:`m_g = \sum_c \pi_{gc} w_{gc}`.
        """
        grouped = weight.unflatten(-1, self.logits.shape[-2:])
        group_means = torch.einsum("bgc,xgc->bgx", self.logits.softmax(-1), grouped)
        return group_means.sum(-2), self.mean @ weight.square().mT - group_means.square().sum(-2)

    def support(self) -> Tensor:
        """Return every value of z once, ``[C^G, 1, G C]``, or raise InputError if there are more than 4,096."""
        groups, classes = self.logits.shape[-2:]
        choices = _product([torch.arange(classes, device=self.logits.device)] * groups)
        return F.one_hot(choices, classes).to(self.logits.dtype).flatten(-2).unsqueeze(1)

    def stop_gradient(self) -> OneHotCategorical:
        """Return the same choices with their probabilities held constant."""
        return OneHotCategorical(self.logits.detach())

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
