r"""Encoders q(z given x): modules that return a posterior."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vaelib.errors import InputError
from vaelib.layers import linear, tanh_layers
from vaelib.posteriors import (
    DiagonalGaussian,
    Discrete,
    FactorisedBernoulli,
    HierarchicalGaussian,
    Mixture,
    OneHotCategorical,
)


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


class HierarchicalEncoder(nn.Module):
    r"""The encoder :math:`q(z_1 \mid x) \prod_l q(z_{l+1} \mid z_l)` of several stochastic layers.

    Introduced in book/02-score-and-path.ipynb.

    Parameters
    ----------
    first
        a module called with x that returns the posterior of the first layer.
    above
        modules called with a sample of the layer below that return the posterior of theirs.
    """

    def __init__(self, first: nn.Module, *above: nn.Module) -> None:
        super().__init__()
        self.first, self.above = first, nn.ModuleList(above)

    def forward(self, x: Tensor) -> HierarchicalGaussian:
        """Return the posterior for ``x`` ``[B, X]``."""
        return HierarchicalGaussian(self.first(x), tuple(self.above))


class DetachedOutput(nn.Module):
    """A network whose output, a posterior, is held constant, and so does not move with its input either."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor) -> DiagonalGaussian:
        """Return the posterior of the layer above ``z``."""
        return self.network(z).stop_gradient()


class DetachedOutputs(HierarchicalGaussian):
    r"""Stochastic layers whose stopped copy holds the *outputs* of :math:`q(z_{l+1} \mid z_l)` constant.

    This also cuts the way from z1 through them, so that the path estimator is not the path estimator any more: the
    fault of the code released with "Sticking the Landing". Introduced in book/02-score-and-path.ipynb.
    """

    detaches = True

    def stop_gradient(self) -> DetachedOutputs:
        """Return the same posterior with the outputs of all networks held constant."""
        return replace(self, first=self.first.stop_gradient(), above=tuple(map(DetachedOutput, self.above)))


class DetachedEncoder(HierarchicalEncoder):
    """The encoder of several stochastic layers that returns :class:`DetachedOutputs`."""

    def forward(self, x: Tensor) -> DetachedOutputs:
        """Return the posterior for ``x`` ``[B, X]``."""
        return DetachedOutputs(self.first(x), tuple(self.above))


class GaussianMixtureMLP(nn.Module):
    r"""An encoder that returns a mixture: C means, log-scales and a logit each, linear in the last of some tanh layers.

    Introduced in book/06-mixtures-and-iwae.ipynb.

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


class DiscreteEncoder(nn.Module):
    r"""The encoder :math:`q(z \mid x)` of bits or one-hot choices whose logits a network gives.

    Introduced in book/03-silent-gradients.ipynb.

    Parameters
    ----------
    network
        a module called as ``network(x)`` that returns D (or G C) numbers for each observation.
    shape
        ``(D,)`` for bits, ``(G, C)`` for G choices among C classes.

    Raises
    ------
    InputError
        for a shape of another kind.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.network, self.shape, self.family = network, shape, family(shape)

    def forward(self, x: Tensor) -> Discrete:
        """Return q(z given x) for ``x`` ``[B, X]``."""
        return self.family(self.network(x).unflatten(-1, self.shape))


def family(shape: tuple[int, ...]) -> type[Discrete]:
    """Return the posterior for latents of this shape: bits, or choices; or raise InputError."""
    if len(shape) not in (1, 2):
        raise InputError(f"a discrete latent has the shape (bits,) or (groups, classes), but this one has {shape}")
    return FactorisedBernoulli if len(shape) == 1 else OneHotCategorical
