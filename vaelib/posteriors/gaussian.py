r"""Gaussian posteriors: factorised, full, of several stochastic layers, and mixtures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vaelib.errors import InputError
from vaelib.posteriors.base import (
    LOG_2PI,
    Latent,
    Noise,
    Posterior,
    is_ours,
    standard_normal_log_prob,
)
from vaelib.posteriors.stopping import stop_gradient


class Gaussian(Posterior):
    r"""A location and a scale, :math:`z = \mu + L \varepsilon`, whichever way the scale is given."""

    def noise_like(self, k: int) -> Noise:
        """Return standard normal noise, ``[K, B, D]``."""
        return Noise.like("normal", k, self.mean)

    def whiten(self, residual: Tensor) -> Tensor:
        r"""Return :math:`L^{-1} r`."""
        raise NotImplementedError

    def slope(self, eps: Tensor) -> Tensor:
        r"""Return :math:`L^{-\top} \varepsilon`, minus the slope of log q at the sample of ``eps``, held constant."""
        raise NotImplementedError

    def log_det(self) -> Tensor:
        r"""Return :math:`\log\det L`, ``[B]``."""
        raise NotImplementedError

    def log_prob(self, z: Tensor) -> Tensor:
        r"""Return :math:`\log q(z) = \log \mathcal N(L^{-1}(z - \mu); 0, I) - \log\det L`, ``[K, B]``."""
        return standard_normal_log_prob(self.whiten(z - self.mean)) - self.log_det()

    def log_prob_of_sample(self, z: Tensor, eps: Tensor) -> Tensor:
        r"""Return :math:`\log q(z)` of the sample of ``eps``, ``[K, B]``, where :math:`L^{-1}(z - \mu)` is eps itself.

        It is written :math:`\log q(t(\varepsilon)) + s^\top [z - t(\varepsilon)]` with the slope
        :math:`s = -L^{-\top} \varepsilon`: the bracket is 0, and only its first derivatives count.
        """
        sample, log_q = self.sample_and_log_prob(eps)
        return log_q - (self.slope(eps) * (z - sample)).sum(-1)

    def log_prob_near(self, centre: Tensor, offset: Tensor) -> Tensor:
        r"""Return :math:`\log q(c + o)` from the residual :math:`(c - \mu) + o`, which keeps its digits."""
        return standard_normal_log_prob(self.whiten((centre - self.mean) + offset)) - self.log_det()

    def sample_and_log_prob(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return z and :math:`\log q(z) = \log \mathcal N(\varepsilon; 0, I) - \log\det L`, both live in phi."""
        return self.sample(eps), standard_normal_log_prob(eps) - self.log_det()

    def entropy(self) -> Tensor:
        r"""Return :math:`H[q] = \log\det L + \tfrac{D}{2}(1 + \log 2\pi)` in nats, ``[B]``."""
        return (self.log_det() + 0.5 * self.mean.shape[-1] * (1 + LOG_2PI)).expand(self.mean.shape[:-1])


@dataclass(frozen=True)
class DiagonalGaussian(Gaussian):
    r"""The factorised Gaussian :math:`q(z \mid x) = \mathcal N(z; \mu, \operatorname{diag} \sigma^2)`.

    Its samples are :math:`z = \mu + \sigma \varepsilon`. Introduced in book/01-elbo-forms.ipynb.

    Parameters
    ----------
    mean, log_std
        :math:`\mu`, ``[B, D]`` (or ``[K, B, D]``, for a conditional of a sampled layer), and :math:`\log \sigma`, the
        same or what broadcasts to it.
    """

    mean: Tensor
    log_std: Tensor

    def sample(self, eps: Tensor) -> Tensor:
        r"""Return :math:`z = \mu + \sigma \varepsilon`, ``[K, B, D]``."""
        return torch.addcmul(self.mean, self.log_std.exp(), eps)

    def whiten(self, residual: Tensor) -> Tensor:
        r"""Return :math:`r / \sigma`."""
        return residual * (-self.log_std).exp()

    def slope(self, eps: Tensor) -> Tensor:
        r"""Return :math:`\varepsilon / \sigma`, held constant."""
        return eps / self.log_std.detach().exp()

    def log_det(self) -> Tensor:
        r"""Return :math:`\sum_d \log\sigma_d`, ``[B]``; one scale for all dimensions counts for each of them."""
        log_std = self.log_std if self.log_std.shape == self.mean.shape else self.log_std.expand_as(self.mean)
        return log_std.sum(-1)

    def kl(self) -> Tensor:
        r"""Return the divergence from the standard normal prior, ``[B]``.

        .. math:: \mathrm{KL}(q \,\|\, \mathcal N(0, I)) = \tfrac12 \sum_d [\mu_d^2 + \sigma_d^2 - 1 - 2\log\sigma_d]
        """
        return 0.5 * (self.mean.square() + (2 * self.log_std).expm1() - 2 * self.log_std).sum(-1)

    def kl_by_dimension(self) -> Tensor:
        """Return the divergence of each dimension, ``[B, D]``."""
        return DiagonalGaussian(self.mean.unsqueeze(-1), self.log_std.unsqueeze(-1)).kl()

    def linear_moments(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the mean :math:`w^\top \mu` and variance of each row of W z, ``[B, X]``.

        The variance is :math:`\sum_d w_d^2 \sigma_d^2`.
        """
        by_all = self.log_std.shape[-1:] != self.mean.shape[-1:]  # one scale for all dimensions
        log_std = self.log_std.expand_as(self.mean) if by_all else self.log_std
        mean = self.mean @ weight.mT
        return mean, ((2 * log_std).exp() @ weight.square().mT).expand_as(mean)

    def map_parameters(self, function: Callable[[Tensor], Tensor]) -> DiagonalGaussian:
        """As for every posterior; a scale that observations or dimensions share is first given to each."""
        return replace(self, mean=function(self.mean), log_std=function(self.log_std.expand_as(self.mean)))


@dataclass(frozen=True)
class FullGaussian(Gaussian):
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

    def sample(self, eps: Tensor) -> Tensor:
        r"""Return :math:`z = \mu + L \varepsilon`, ``[K, B, D]``."""
        return self.mean + (self.scale_tril.tril() @ eps.unsqueeze(-1)).squeeze(-1)

    def whiten(self, residual: Tensor) -> Tensor:
        r"""Return :math:`L^{-1} r`."""
        return torch.linalg.solve_triangular(self.scale_tril, residual.unsqueeze(-1), upper=False).squeeze(-1)

    def slope(self, eps: Tensor) -> Tensor:
        r"""Return :math:`L^{-\top} \varepsilon`, held constant."""
        return torch.linalg.solve_triangular(self.scale_tril.detach().mT, eps.unsqueeze(-1), upper=True).squeeze(-1)

    def log_det(self) -> Tensor:
        r"""Return :math:`\sum_d \log L_{dd}`, ``[B]`` (``[]`` for a shared L)."""
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def kl(self) -> Tensor:
        r"""Return the divergence from the standard normal prior, ``[B]``.

        .. math:: \mathrm{KL}(q \,\|\, \mathcal N(0, I)) = \tfrac12[\|\mu\|^2 + \|L\|_F^2 - D] - \log\det L
        """
        second_moment = self.mean.square().sum(-1) + self.scale_tril.tril().square().sum((-2, -1))
        return 0.5 * (second_moment - self.mean.shape[-1]) - self.log_det()

    def linear_moments(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the mean :math:`w^\top \mu` and variance :math:`\|L^\top w\|^2` of each row of W z, ``[B, X]``."""
        mean = self.mean @ weight.mT
        return mean, (weight @ self.scale_tril.tril()).square().sum(-1).expand_as(mean)

    def map_parameters(self, function: Callable[[Tensor], Tensor]) -> FullGaussian:
        """As for every posterior; a scale that all observations share is first given to each."""
        *batch, dim = self.mean.shape
        return replace(self, mean=function(self.mean), scale_tril=function(self.scale_tril.expand(*batch, dim, dim)))

    def stop_gradient(self) -> FullGaussian:
        """Return the same Gaussian with its parameters held constant."""
        return replace(self, mean=self.mean.detach(), scale_tril=self.scale_tril.detach())


@dataclass(frozen=True)
class HierarchicalGaussian(Posterior):
    r"""L stochastic layers, :math:`q(z_1, \dots, z_L \mid x) = q(z_1 \mid x) \prod_l q(z_{l+1} \mid z_l)`.

    An upper layer's mean and scale are functions of the *sampled* layer below, so a gradient can reach the parameters
    of that layer through them. Stopping them must therefore hold the parameters of the upper networks constant and not
    their outputs, which would cut that path as well. Introduced in book/02-score-and-path.ipynb.

    Parameters
    ----------
    first
        the posterior of the layer next to the data.
    above
        modules, each called with a sample of the layer below it, ``[K, B, D]``, that return the posterior of theirs.
    """

    first: DiagonalGaussian
    above: tuple[nn.Module, ...]

    def __post_init__(self) -> None:
        check_part(self, self.first)
        if not isinstance(self.above, tuple):
            raise InputError(
                "the networks above the first layer must be a tuple, HierarchicalGaussian(first, (network,)), but are "
                f"a {type(self.above).__name__}"
            )

    def noise_like(self, k: int) -> tuple[Noise, ...]:
        """Return the noise of every layer, ``([K, B, D1], [K, B, D2], ...)``; one draw goes up to learn the widths."""
        noise = [self.first.noise_like(k)]
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            z = self.first.sample(torch.zeros_like(self.first.mean).unsqueeze(0))
            for layer in self.above:
                q = check_part(self, stop_gradient(layer)(z))  # the batch norms of a copy may count this draw
                one = q.noise_like(1)  # [1, 1, B, D]
                noise.append(replace(one, shape=(k, *one.shape[2:])))
                z = q.sample(torch.full(one.shape[1:], 0.5, dtype=one.dtype, device=one.device))
        return tuple(noise)

    def sample(self, eps: Latent) -> Latent:
        r"""Return :math:`z_1 = t_1(\varepsilon_1)`, and :math:`z_{l+1} = t_{l+1}(\varepsilon_{l+1}, z_l)` above it."""
        z = [self.first.sample(eps[0])]
        for layer, noise in zip(self.above, eps[1:], strict=True):
            z.append(layer(z[-1]).sample(noise))
        return tuple(z)

    def log_prob(self, z: Latent) -> Tensor:
        r"""Return :math:`\log q(z_1 \mid x) + \sum_l \log q(z_{l+1} \mid z_l)`, ``[K, B]``."""
        return sum(q.log_prob(layer) for q, layer in zip(self.conditionals(z), z, strict=True))

    def log_prob_of_sample(self, z: Latent, eps: Latent) -> Tensor:
        """As :meth:`log_prob`, by the noise of each layer."""
        parts = zip(self.conditionals(z), z, eps, strict=True)
        return sum(q.log_prob_of_sample(layer, noise) for q, layer, noise in parts)

    def sample_and_log_prob(self, eps: Latent) -> tuple[Latent, Tensor]:
        """Return z and log q(z), with one pass through each network."""
        first, log_q = self.first.sample_and_log_prob(eps[0])
        z = [first]
        for layer, noise in zip(self.above, eps[1:], strict=True):
            sample, one = layer(z[-1]).sample_and_log_prob(noise)
            z.append(sample)
            log_q = log_q + one
        return tuple(z), log_q

    def conditionals(self, z: Latent) -> list[Posterior]:
        """Return the posterior of each layer, given a sample of the layers below it."""
        return [self.first, *(layer(below) for layer, below in zip(self.above, z, strict=False))]

    def means(self) -> tuple[Tensor, ...]:
        """Return the mean of each layer, ``[B, D]``, an upper one's at the mean of the layer below."""
        means = [self.first.mean]
        for layer in self.above:
            means.append(layer(means[-1]).mean)
        return tuple(means)

    def map_parameters(self, function: Callable[[Tensor], Tensor]) -> HierarchicalGaussian:
        """As for every posterior: the parameters of the first layer; those above it are functions of its sample."""
        return replace(self, first=self.first.map_parameters(function))

    def stop_gradient(self) -> HierarchicalGaussian:
        """Return the same posterior with the parameters of all networks held constant."""
        return replace(self, first=self.first.stop_gradient(), above=tuple(map(stop_gradient, self.above)))


@dataclass(frozen=True)
class Mixture(Posterior):
    r"""The mixture :math:`q(z \mid x) = \sum_c \pi_c\, q_c(z \mid x)`, with the choice of the component summed out.

    A drawn component would be a sample without a derivative. Instead every component is drawn from equally often
    (the draws are *stratified*), and a draw from component c counts :math:`C \pi_c` times as much as its share
    (:meth:`log_share`). So K draws mean K / C from each component, component after component, and the weights get
    their gradient through the shares (algorithm 3 of "Sticking the Landing"). Introduced in
    book/06-mixtures-and-iwae.ipynb.

    Parameters
    ----------
    components
        C posteriors of one family for the same ``B`` observations, whose samples are tensors.
    logits
        ``[C, B]``; :math:`\pi = \operatorname{softmax}_c` of it, which keeps the weights on the simplex. A component
        whose logit is -inf has the weight 0.
    """

    components: tuple[DiagonalGaussian | FullGaussian, ...]
    logits: Tensor

    def __post_init__(self) -> None:
        if nowhere := [type(q).__name__ for q in self.components if not hasattr(check_part(self, q), "mean")]:
            raise InputError(
                f"the components of a mixture must have a mean [B, D], but a {nowhere[0]} has none: take Gaussians"
            )
        expected = (len(self.components), *(self.components[0].mean.shape[:-1] if self.components else ()))
        if self.logits.shape != expected:
            raise InputError(
                f"the logits of a mixture must be of the shape [C, B] = {list(expected)}, the components first, but "
                f"are {list(self.logits.shape)}"
            )

    @classmethod
    def from_weights(cls, components: tuple[DiagonalGaussian | FullGaussian, ...], weights: Tensor) -> Mixture:
        r"""Build a mixture from its weights :math:`\pi`, ``[C, B]``; one that is exactly 0 gets no gradient.

        Raises
        ------
        InputError
            if a weight is negative, or those of an observation do not sum to 1.
        """
        off = ~((weights.sum(0) - 1).abs() <= 1e3 * torch.finfo(weights.dtype).eps)
        if not (weights >= 0).all() or off.any():
            found = (
                f"those of one observation sum to {weights.sum(0)[off][0]:.6g}"
                if (weights >= 0).all()
                else f"one is {weights.min():.6g}"
            )
            raise InputError(
                f"mixture weights must be at least 0 and sum to 1 over the components, but {found}; "
                "divide them by their sum, or give logits: Mixture(components, logits)"
            )
        never = weights == 0
        return cls(components, weights.masked_fill(never, 1.0).log().masked_fill(never, -math.inf))

    @property
    def strata(self) -> int:
        """The number of components: as many draws from each."""
        return len(self.components)

    @property
    def log_weights(self) -> Tensor:
        r"""The log-weights :math:`\log \pi_c`, normalised, ``[C, B]``."""
        return self.logits.log_softmax(0)

    @property
    def mean(self) -> Tensor:
        r"""The mean :math:`\sum_c \pi_c \mu_c`, ``[B, D]``."""
        means = torch.stack([q.mean for q in self.components])
        return (self.log_weights.exp().unsqueeze(-1) * means).sum(0)

    def noise_like(self, k: int) -> Noise:
        """Return the noise of ``k`` draws in all, ``[K, B, D]``; ``k`` must be a multiple of C."""
        self.check_shares(k)
        return self.components[0].noise_like(k)

    def sample(self, eps: Tensor) -> Tensor:
        r"""Return :math:`z = t(\varepsilon, \phi_c)`, ``[K, B, D]``, the first K / C from the first component."""
        self.check_shares(len(eps))
        return torch.cat([q.sample(e) for q, e in zip(self.components, eps.chunk(self.strata), strict=True)])

    def log_prob(self, z: Tensor) -> Tensor:
        r"""Return :math:`\log \sum_c \pi_c\, q_c(z)` of any ``z``, whichever component it is from, ``[K, B]``."""
        return self.mixed([q.log_prob(z) for q in self.components])

    def log_prob_of_sample(self, z: Tensor, eps: Tensor) -> Tensor:
        """As :meth:`log_prob`; a Gaussian drew at its mean plus a step, and no component needs their sum."""
        kinds = set(map(type, self.components))
        if not all(issubclass(kind, Gaussian) and is_ours(kind, "log_prob") for kind in kinds):
            return self.log_prob(z)
        still = [q.stop_gradient() for q in self.components]
        steps = [
            replace(q, mean=torch.zeros_like(q.mean)).sample(e)
            for q, e in zip(still, eps.chunk(self.strata), strict=True)
        ]
        centre = torch.stack([q.mean for q in still]).unsqueeze(1)  # [C, 1, B, D]
        offset = torch.stack(steps) + (z - z.detach()).unflatten(0, (self.strata, -1))  # [C, K / C, B, D]
        return self.mixed([q.log_prob_near(centre, offset).flatten(0, 1) for q in self.components])

    def density_moves(self, z: Tensor, eps: Tensor) -> bool:
        """As for every posterior: the weights need no path, they have their shares."""
        return any(q.density_moves(z, eps) for q in self.components)

    def mixed(self, log_q: list[Tensor]) -> Tensor:
        r"""Return :math:`\log \sum_c \pi_c\, q_c` from the components' log-densities, ``[K, B]``."""
        return (self.log_weights.unsqueeze(1) + torch.stack(log_q)).logsumexp(0)

    def log_share(self, k: int) -> Tensor:
        r"""Return :math:`\log (C \pi_c)` for each of ``k`` draws, ``[K, B]``: what turns their mean into that of q."""
        self.check_shares(k)
        return (self.log_weights + math.log(self.strata)).repeat_interleave(k // self.strata, 0)

    def check_shares(self, k: int) -> None:
        """Raise InputError unless ``k`` draws can be shared equally among the components."""
        if k < 1 or k % self.strata:
            raise InputError(
                f"a mixture of {self.strata} components is drawn from in equal shares, so the number of draws k must "
                f"be a multiple of {self.strata}, but is {k}"
            )

    def linear_moments(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the mean :math:`m = \sum_c \pi_c m_c` and variance of each row of W z, ``[B, X]``.

        The law of total variance, :math:`\sum_c \pi_c [v_c + (m_c - m)^2]`: within the components and between them.
        """
        means, variances = map(torch.stack, zip(*(q.linear_moments(weight) for q in self.components), strict=True))
        share = self.log_weights.exp().unsqueeze(-1)
        mean = (share * means).sum(0)
        return mean, (share * (variances + (means - mean).square())).sum(0)

    def map_parameters(self, function: Callable[[Tensor], Tensor]) -> Mixture:
        """As for every posterior; the logits are told with the observations first, ``[B, C]``."""
        components = tuple(q.map_parameters(function) for q in self.components)
        return replace(self, components=components, logits=function(self.logits.mT).mT)

    def stop_gradient(self) -> Mixture:
        """Return the same mixture with its components and weights held constant."""
        components = tuple(q.stop_gradient() for q in self.components)
        return replace(self, components=components, logits=self.logits.detach())


def check_part(whole: Posterior, q: Posterior) -> Posterior:
    """Return ``q``, or raise InputError if it is no posterior that another one can be made of."""
    if not isinstance(q, Posterior):
        raise InputError(
            f"a {type(whole).__name__} is made of posteriors of vaelib.posteriors, but a part of it is a "
            f"{type(q).__name__}: give posteriors.as_posterior(...) of that, or a DiagonalGaussian(mean, log_std)"
        )
    return q
