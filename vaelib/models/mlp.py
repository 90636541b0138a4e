r"""Multilayer-perceptron VAEs with one and with two stochastic layers, as in Burda et al. (2016)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from vaelib.likelihoods import Bernoulli
from vaelib.posteriors import (
    DiagonalGaussian,
    HierarchicalGaussian,
    Latent,
    Mixture,
    equal_shares,
    standard_normal,
    standard_normal_log_prob,
)


def linear(inputs: int, outputs: int, generator: torch.Generator | None = None) -> nn.Linear:
    """Return a linear layer with Glorot-uniform weights and zero biases."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    nn.init.xavier_uniform_(layer.weight, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def tanh_layers(sizes: Sequence[int], generator: torch.Generator | None = None) -> nn.Sequential:
    """Return tanh layers of the given sizes, the input's first."""
    return nn.Sequential(*(part for a, b in pairwise(sizes) for part in (linear(a, b, generator), nn.Tanh())))


class GaussianMLP(nn.Module):
    r"""A diagonal Gaussian whose mean and log-scale are linear in the last of some tanh layers.

    It serves as the encoder :math:`q(z \mid x)`, as the second layer :math:`q(z_2 \mid z_1)` and as the conditional
    prior :math:`p(z_1 \mid z_2)`. Introduced in book/01-elbo-forms.ipynb.

    Parameters
    ----------
    sizes
        the widths of input and hidden layers.
    latent_dim
        the dimension of the Gaussian.
    """

    def __init__(self, sizes: Sequence[int], latent_dim: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.hidden = tanh_layers(sizes, generator)
        self.mean = linear(sizes[-1], latent_dim, generator)
        self.log_std = linear(sizes[-1], latent_dim, generator)

    def forward(self, x: Tensor) -> DiagonalGaussian:
        """Return the Gaussian for ``x`` ``[..., X]``."""
        hidden = self.hidden(x)
        return DiagonalGaussian(self.mean(hidden), self.log_std(hidden))

    def noise(self, k: int, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw the noise for ``k`` samples a row of ``x``, ``[K, B, D]``."""
        return standard_normal(k, x.new_empty(len(x), self.mean.out_features), generator)


class HierarchicalEncoder(nn.Module):
    r"""The encoder :math:`q(z_1 \mid x)\, q(z_2 \mid z_1)` of two stochastic layers.

    Introduced in book/02-score-and-path.ipynb.
    """

    def __init__(self, first: GaussianMLP, second: GaussianMLP) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> HierarchicalGaussian:
        """Return the posterior for ``x`` ``[B, X]``."""
        return HierarchicalGaussian(self.first(x), self.second)

    def noise(self, k: int, x: Tensor, generator: torch.Generator | None = None) -> Latent:
        """Draw the noise for ``k`` samples a row of ``x``, ``([K, B, D1], [K, B, D2])``."""
        return self.first.noise(k, x, generator), self.second.noise(k, x, generator)


class DetachedOutputs(HierarchicalGaussian):
    r"""Two stochastic layers whose stopped copy holds the *outputs* of :math:`q(z_2 \mid z_1)` constant.

    This also cuts the way from z1 through them, so that the path estimator is not the path estimator any more: the
    fault of the code released with "Sticking the Landing". Introduced in book/02-score-and-path.ipynb.
    """

    def stop_gradient(self) -> DetachedOutputs:
        """Return the same posterior with the outputs of both networks held constant."""
        return DetachedOutputs(self.first.stop_gradient(), lambda z1: self.second(z1).stop_gradient())


class DetachedEncoder(HierarchicalEncoder):
    """The encoder of two stochastic layers that returns :class:`DetachedOutputs`."""

    def forward(self, x: Tensor) -> DetachedOutputs:
        """Return the posterior for ``x`` ``[B, X]``."""
        return DetachedOutputs(self.first(x), self.second)


class BernoulliMLP(nn.Module):
    r"""The decoder: tanh layers, then a logit for each pixel.

    Parameters
    ----------
    sizes
        the widths of latent and hidden layers.
    data_dim
        the number of pixels.
    mean
        the mean image of the training data, ``[X]``; if given, the output bias starts at its logit, which is worth
        about a nat at the end of a long training (Burda et al.'s code does it, their paper does not say so).
    """

    def __init__(
        self, sizes: Sequence[int], data_dim: int, mean: Tensor | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.hidden = tanh_layers(sizes, generator)
        self.logits = linear(sizes[-1], data_dim, generator)
        if mean is not None:
            with torch.no_grad():
                self.logits.bias.copy_(mean.clamp(0.001, 0.999).logit())

    def forward(self, z: Tensor) -> Bernoulli:
        """Return p(x given z) for ``z`` ``[K, B, D]``."""
        return Bernoulli(self.logits(self.hidden(z)))


class Joint(nn.Module):
    r"""The joint density :math:`\log p(z) + \log p(x \mid z)` with a standard normal prior.

    Introduced in book/01-elbo-forms.ipynb.

    Parameters
    ----------
    decode
        a module called as ``decode(z)`` that returns a likelihood.
    """

    def __init__(self, decode: nn.Module) -> None:
        super().__init__()
        self.decode = decode

    def log_prior(self, z: Tensor) -> Tensor:
        """Return log p(z), ``[K, B]``."""
        return standard_normal_log_prob(z)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Return log p(x given z), ``[K, B]``."""
        return self.decode(z).log_prob(x)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Return log p(x, z), ``[K, B]``."""
        return self.log_prior(z) + self.log_likelihood(x, z)


class HierarchicalJoint(nn.Module):
    r"""The joint density :math:`\log p(z_2) + \log p(z_1 \mid z_2) + \log p(x \mid z_1)` of two stochastic layers.

    Introduced in book/02-score-and-path.ipynb.

    Parameters
    ----------
    prior
        a module called as ``prior(z2)`` that returns :math:`p(z_1 \mid z_2)`.
    decode
        a module called as ``decode(z1)`` that returns a likelihood.
    """

    def __init__(self, prior: nn.Module, decode: nn.Module) -> None:
        super().__init__()
        self.prior, self.decode = prior, decode

    def log_prior(self, z: Latent) -> Tensor:
        """Return log p(z1, z2), ``[K, B]``."""
        z1, z2 = z
        return standard_normal_log_prob(z2) + self.prior(z2).log_prob(z1)

    def log_likelihood(self, x: Tensor, z: Latent) -> Tensor:
        """Return log p(x given z1), ``[K, B]``."""
        return self.decode(z[0]).log_prob(x)

    def forward(self, x: Tensor, z: Latent) -> Tensor:
        """Return log p(x, z), ``[K, B]``."""
        return self.log_prior(z) + self.log_likelihood(x, z)


class GaussianMixtureMLP(nn.Module):
    r"""An encoder that returns a mixture: C means, log-scales and a logit each, linear in the last of some tanh layers.

    Introduced in book/05-mixtures-and-iwae.ipynb.

    Parameters
    ----------
    sizes
        the widths of input and hidden layers.
    latent_dim
        the dimension of the Gaussians.
    components
        how many there are, C.
    """

    def __init__(
        self, sizes: Sequence[int], latent_dim: int, components: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.shape = (components, latent_dim)
        self.hidden = tanh_layers(sizes, generator)
        self.mean = linear(sizes[-1], components * latent_dim, generator)
        self.log_std = linear(sizes[-1], components * latent_dim, generator)
        self.logits = linear(sizes[-1], components, generator)

    def forward(self, x: Tensor) -> Mixture:
        """Return the mixture for ``x`` ``[B, X]``."""
        hidden = self.hidden(x)
        means, log_stds = (head(hidden).unflatten(-1, self.shape).unbind(-2) for head in (self.mean, self.log_std))
        return Mixture(tuple(map(DiagonalGaussian, means, log_stds)), self.logits(hidden).mT)

    def noise(self, k: int, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw the noise for ``k`` samples a row of ``x``, ``[K, B, D]``; ``k`` must be a multiple of C."""
        components, latent_dim = self.shape
        equal_shares(k, components)
        return standard_normal(k, x.new_empty(len(x), latent_dim), generator)
