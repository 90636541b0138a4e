r"""A nonlinear decoder with a linear one beside it, which knows its expectation in closed form and can guide."""

from __future__ import annotations

from torch import Tensor, nn

from vaelib.likelihoods import Gaussian
from vaelib.posteriors import Discrete


class GaussianDecoder(nn.Module):
    r"""The decoder :math:`p(x \mid z) = \mathcal N(m(z), s^2 I)`: any network as the mean, one scale for all pixels.

    Parameters
    ----------
    mean
        a module called as ``mean(z)`` that returns m(z), ``[K, B, X]``.
    log_std
        :math:`\log s`, ``[]``.
    """

    def __init__(self, mean: nn.Module, log_std: Tensor) -> None:
        super().__init__()
        self.mean = mean
        self.log_std = nn.Parameter(log_std)

    def forward(self, z: Tensor) -> Gaussian:
        """Return p(x given z) for ``z`` ``[K, B, D]``."""
        return Gaussian(self.mean(z), self.log_std)


class Guided(nn.Module):
    r"""The joint density of the model that is trained, and beside it the guide: one latent and prior, two decoders.

    Called, it is the model, log p(x, z). What the guide is for is up to the estimator: :func:`vaelib.silent.annealed`
    or :func:`vaelib.silent.controlled`. Introduced in book/03-silent-gradients.ipynb.

    Parameters
    ----------
    joint
        the model, with any decoder.
    guide
        a joint density whose expected log-likelihood has a closed form, such as
        :class:`vaelib.models.LinearGaussian` or a joint made of a :class:`vaelib.silent.LinearDecoder`.
    """

    def __init__(self, joint: nn.Module, guide: nn.Module) -> None:
        super().__init__()
        self.joint, self.guide = joint, guide

    @property
    def prior(self) -> Discrete | None:
        """The prior of the model, where it is a distribution of its own and not the standard normal."""
        return getattr(self.joint, "prior", None)

    def log_prior(self, z: Tensor) -> Tensor:
        """Return log p(z), ``[K, B]``."""
        return self.joint.log_prior(z)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Return log p(x given z) of the model, ``[K, B]``."""
        return self.joint.log_likelihood(x, z)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Return log p(x, z) of the model, ``[K, B]``."""
        return self.joint(x, z)
