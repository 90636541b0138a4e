r"""VAEs whose latents are discrete: bits, or groups of one-hot choices, before any decoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vaelib.errors import InputError
from vaelib.models.mlp import Joint
from vaelib.posteriors import Discrete, FactorisedBernoulli, OneHotCategorical, standard_uniform


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
        _family(tuple(prior_logits.shape))
        if isinstance(prior_logits, nn.Parameter):
            self.prior_logits = prior_logits
        else:
            self.register_buffer("prior_logits", prior_logits)

    @property
    def prior(self) -> Discrete:
        """The prior p(z), a distribution without a batch axis."""
        return _family(tuple(self.prior_logits.shape))(self.prior_logits)

    def log_prior(self, z: Tensor) -> Tensor:
        """Return log p(z), ``[K, B]``."""
        return self.prior.log_prob(z)


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
        self.network, self.shape, self.family = network, shape, _family(shape)

    def forward(self, x: Tensor) -> Discrete:
        """Return q(z given x) for ``x`` ``[B, X]``."""
        return self.family(self.network(x).unflatten(-1, self.shape))

    def noise(self, k: int, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw the uniform noise for ``k`` samples a row of ``x``, ``[K, B, D]`` (or ``[K, B, G C]``)."""
        return standard_uniform(k, x.new_empty(len(x), math.prod(self.shape)), generator)


def _family(shape: tuple[int, ...]) -> type[Discrete]:
    if len(shape) not in (1, 2):
        raise InputError(f"a discrete latent has the shape (bits,) or (groups, classes), but this one has {shape}")
    return FactorisedBernoulli if len(shape) == 1 else OneHotCategorical
