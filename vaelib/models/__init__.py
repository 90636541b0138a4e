"""Models by name: a joint density p(x, z) and an encoder q(z given x), trained together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vaelib.errors import InputError, choose
from vaelib.models.discrete import DiscreteEncoder, DiscreteJoint
from vaelib.models.linear import LinearEncoder, LinearGaussian, exact_encoder, ppca
from vaelib.models.mlp import (
    BernoulliMLP,
    GaussianMixtureMLP,
    GaussianMLP,
    HierarchicalEncoder,
    HierarchicalJoint,
    Joint,
    linear,
)

__all__ = [
    "MODELS",
    "VAE",
    "BernoulliMLP",
    "DiscreteEncoder",
    "DiscreteJoint",
    "GaussianMixtureMLP",
    "GaussianMLP",
    "HierarchicalEncoder",
    "HierarchicalJoint",
    "Joint",
    "LinearEncoder",
    "LinearGaussian",
    "build",
    "exact_encoder",
    "ppca",
]


class VAE(nn.Module):
    """A joint density and an encoder: ``model.joint(x, z)`` and ``model.encoder(x)``.

    Attributes
    ----------
    binary
        whether the likelihood is Bernoulli, and so wants images of 0 and 1.
    """

    def __init__(self, joint: nn.Module, encoder: nn.Module, binary: bool) -> None:
        super().__init__()
        self.joint, self.encoder, self.binary = joint, encoder, binary


def linear_vae(data_dim: int, mean: Tensor | None, generator: torch.Generator | None, *, latent: int = 8) -> VAE:
    """The linear-Gaussian VAE with one noise scale for all pixels, from small random weights."""
    encode, decode = linear(data_dim, latent, generator), linear(latent, data_dim, generator)
    bias = torch.zeros(data_dim) if mean is None else mean.clone()
    joint = LinearGaussian(decode.weight.data, bias, torch.tensor(-1.0))
    weight = encode.weight.data
    return VAE(joint, LinearEncoder(weight, -weight @ bias, torch.full((latent,), -1.0)), binary=False)


def mlp_1(
    data_dim: int, mean: Tensor | None, generator: torch.Generator | None, *, hidden: int = 200, latent: int = 50
) -> VAE:
    """One stochastic layer: x-200-200-50 and 50-200-200-x (Burda et al. 2016)."""
    encoder = GaussianMLP((data_dim, hidden, hidden), latent, generator)
    decoder = BernoulliMLP((latent, hidden, hidden), data_dim, mean, generator)
    return VAE(Joint(decoder), encoder, binary=True)


def mlp_2(
    data_dim: int,
    mean: Tensor | None,
    generator: torch.Generator | None,
    *,
    hidden: int = 200,
    latent: int = 100,
    hidden2: int = 100,
    latent2: int = 50,
) -> VAE:
    """Two stochastic layers: x-200-200-100, 100-100-100-50 and back (Burda et al. 2016)."""
    encoder = HierarchicalEncoder(
        GaussianMLP((data_dim, hidden, hidden), latent, generator),
        GaussianMLP((latent, hidden2, hidden2), latent2, generator),
    )
    prior = GaussianMLP((latent2, hidden2, hidden2), latent, generator)
    decoder = BernoulliMLP((latent, hidden, hidden), data_dim, mean, generator)
    return VAE(HierarchicalJoint(prior, decoder), encoder, binary=True)


def mlp_1_mixture(
    data_dim: int,
    mean: Tensor | None,
    generator: torch.Generator | None,
    *,
    hidden: int = 200,
    latent: int = 50,
    components: int = 4,
) -> VAE:
    """One stochastic layer as in mlp-1, with a mixture of Gaussians as posterior; k counts the draws of all of them."""
    encoder = GaussianMixtureMLP((data_dim, hidden, hidden), latent, components, generator)
    decoder = BernoulliMLP((latent, hidden, hidden), data_dim, mean, generator)
    return VAE(Joint(decoder), encoder, binary=True)


MODELS = {"linear": linear_vae, "mlp-1": mlp_1, "mlp-2": mlp_2, "mlp-1-mixture": mlp_1_mixture}
"""The builders of the models, by name."""


def build(
    name: str,
    data_dim: int,
    mean: Tensor | None = None,
    generator: torch.Generator | None = None,
    **sizes: int,
) -> VAE:
    """Build a model by name.

    Parameters
    ----------
    name
        a key of :data:`MODELS`.
    data_dim
        the number of pixels.
    mean
        the mean training image, ``[data_dim]``, at which the decoder's output starts.
    generator
        draws the initial weights.
    sizes
        widths other than the builder's defaults, such as ``hidden=50, latent=4``.

    Raises
    ------
    InputError
        for a name that does not exist, a size the model does not have, or a size below 1.
    """
    builder = choose("model", name, MODELS)
    for size, value in sizes.items():
        choose(f"size of model '{name}'", size, builder.__kwdefaults__)
        if value < 1:
            raise InputError(f"{size} of model '{name}' must be at least 1, but is {value}")
    return builder(data_dim, mean, generator, **sizes)
