r"""Joint densities p(x, z): a prior and a decoder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from vaelib.bounds import StandardPrior, log_likelihood
from vaelib.errors import InputError
from vaelib.models.encoders import family
from vaelib.posteriors import Discrete, Latent, layers_of, standard_normal_log_prob


class Joint(StandardPrior, nn.Module):
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

    def sample_prior(self, eps: Latent) -> Latent:
        """Return the z of the prior that the posterior's noise ``[K, B, D]`` makes: here the noise itself."""
        return eps

    def likelihood(self, z: Latent) -> Any:
        """Return p(x given z), as ``decode`` makes it."""
        return self.decode(z)

    def log_likelihood(self, x: Tensor, z: Latent) -> Tensor:
        """Return log p(x given z), ``[K, B]``."""
        return self.likelihood(z).log_prob(x)

    def generate(self, z: Latent, generator: torch.Generator | None = None) -> Tensor:
        """Return what z looks like, ``[K, B, X]``: the mean of p(x given z), or a draw where that has none."""
        likelihood = self.likelihood(z)
        return likelihood.mean if hasattr(likelihood, "mean") else likelihood.sample(generator)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Return log p(x, z), ``[K, B]``; of one z ``[B, D]`` for each observation, ``[B]``."""
        several = layers_of(z)[0].ndim > 2
        return self.log_prior(z) + (log_likelihood(self, x, z) if several else self.log_likelihood(x, z))


class HierarchicalJoint(Joint):
    r"""The joint density :math:`\log p(z_L) + \sum_l \log p(z_l \mid z_{l+1}) + \log p(x \mid z_1)`.

    Introduced in book/02-score-and-path.ipynb.

    Parameters
    ----------
    priors
        modules, the one next to the data first: ``priors[0](z2)`` returns :math:`p(z_1 \mid z_2)`, and so on; or one
        such module, for two stochastic layers. The prior of the last layer is standard normal.
    decode
        a module called as ``decode(z1)`` that returns a likelihood.
    """

    def __init__(self, priors: nn.Module | Iterable[nn.Module], decode: nn.Module) -> None:
        nn.Module.__init__(self)
        one = isinstance(priors, nn.Module) and not isinstance(priors, nn.ModuleList)
        self.priors, self.decode = nn.ModuleList([priors] if one else priors), decode

    def log_prior(self, z: Latent) -> Tensor:
        """Return log p(z1, z2, ...), ``[K, B]``."""
        log_p = standard_normal_log_prob(z[-1])
        for prior, here, above in zip(self.priors, z[:-1], z[1:], strict=True):
            log_p = log_p + prior(above).log_prob(here)
        return log_p

    def sample_prior(self, eps: Latent) -> Latent:
        """Return the layers of z that the noise makes, from the last one down."""
        z = [eps[-1]]
        for prior, noise in zip(reversed(self.priors), reversed(eps[:-1]), strict=True):
            given = prior(z[0])
            if isinstance(given, Distribution):
                raise InputError(
                    f"a prior is sampled by noise, which a {type(given).__name__} of PyTorch does not take: give a "
                    "posterior of vaelib, such as a DiagonalGaussian"
                )
            z.insert(0, given.sample(noise))
        return tuple(z)

    def likelihood(self, z: Latent) -> Any:
        """Return p(x given z1)."""
        return self.decode(z[0])


class DiscreteJoint(Joint):
    r"""The joint density :math:`\log p(z) + \log p(x \mid z)` with independent bits or one-hot choices as the prior.

    Introduced in book/03-silent-gradients.ipynb.

    Parameters
    ----------
    decode
        a module called as ``decode(z)`` that returns a likelihood.
    prior_logits
        ``[D]`` for bits (zeros are fair ones), ``[G, C]`` for choices; learned if it is a ``nn.Parameter``.

    Raises
    ------
    InputError
        if the logits have another number of axes.
    """

    def __init__(self, decode: nn.Module, prior_logits: Tensor) -> None:
        super().__init__(decode)
        family(tuple(prior_logits.shape))
        if isinstance(prior_logits, nn.Parameter):
            self.prior_logits = prior_logits
        else:
            self.register_buffer("prior_logits", prior_logits)

    @property
    def prior(self) -> Discrete:
        """The prior p(z), a distribution without a batch axis."""
        return family(tuple(self.prior_logits.shape))(self.prior_logits)

    def log_prior(self, z: Tensor) -> Tensor:
        """Return log p(z), ``[K, B]``."""
        return self.prior.log_prob(z)

    def sample_prior(self, eps: Tensor) -> Tensor:
        """Return the bits or choices that uniform noise ``[K, B, D]`` makes under the prior."""
        return self.prior.sample(eps)


class Guided(nn.Module):
    r"""The joint density of the model that is trained, and beside it the guide: one latent and prior, two decoders.

    Called, it is the model, log p(x, z). What the guide is for is up to the estimator:
    :func:`vaelib.estimators.silent.annealed` or :func:`vaelib.estimators.silent.controlled`. Introduced in
    book/04-silent-and-nonlinear.ipynb.

    Parameters
    ----------
    joint
        the model, with any decoder.
    guide
        a joint density whose expected log-likelihood has a closed form, such as
        :class:`vaelib.models.LinearGaussian` or a joint made of a :class:`vaelib.models.LinearDecoder`.
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

    def sample_prior(self, eps: Tensor) -> Tensor:
        """Return the z that the noise makes under the prior."""
        return self.joint.sample_prior(eps)

    def likelihood(self, z: Tensor) -> Any:
        """Return p(x given z) of the model."""
        return self.joint.likelihood(z)

    generate = Joint.generate

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Return log p(x given z) of the model, ``[K, B]``."""
        return self.joint.log_likelihood(x, z)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Return log p(x, z) of the model, ``[K, B]``."""
        return self.joint(x, z)
