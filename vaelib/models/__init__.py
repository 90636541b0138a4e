"""Models by name: a joint density p(x, z) and an encoder q(z given x), trained together."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vaelib.errors import InputError, choose
from vaelib.models.discrete import DiscreteEncoder, DiscreteJoint
from vaelib.models.guided import GaussianDecoder, Guided
from vaelib.models.linear import LinearEncoder, LinearGaussian, exact_encoder, ppca
from vaelib.models.mlp import (
    BernoulliMLP,
    DetachedEncoder,
    GaussianMixtureMLP,
    GaussianMLP,
    HierarchicalEncoder,
    HierarchicalJoint,
    Joint,
    linear,
    tanh_layers,
)
from vaelib.models.pixelcnn import NoLatent, PixelCNN, ResNetEncoder, square_side
from vaelib.silent import CosineDecoder, LinearDecoder

__all__ = [
    "MODELS",
    "VAE",
    "BernoulliMLP",
    "DetachedEncoder",
    "DiscreteEncoder",
    "DiscreteJoint",
    "GaussianMixtureMLP",
    "GaussianDecoder",
    "GaussianMLP",
    "Guided",
    "HierarchicalEncoder",
    "HierarchicalJoint",
    "Joint",
    "LinearEncoder",
    "LinearGaussian",
    "NoLatent",
    "PixelCNN",
    "ResNetEncoder",
    "build",
    "exact_encoder",
    "pixelcnn_alone",
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


class Start(NamedTuple):
    """What every model is built from.

    Attributes
    ----------
    pixels
        how many numbers an observation has.
    mean
        the mean training image, ``[pixels]``, or None: where the decoder's output starts.
    generator
        draws the initial weights.
    """

    pixels: int
    mean: Tensor | None
    generator: torch.Generator | None

    @property
    def bias(self) -> Tensor:
        """The mean image, or zeros, as a parameter's own copy."""
        return torch.zeros(self.pixels) if self.mean is None else self.mean.clone()


def linear_vae(start: Start, *, latent: int = 8) -> VAE:
    """The linear-Gaussian VAE with one noise scale for all pixels, from small random weights."""
    encode, decode = linear(start.pixels, latent, start.generator), linear(latent, start.pixels, start.generator)
    joint = LinearGaussian(decode.weight.data, start.bias, torch.tensor(-1.0))
    weight = encode.weight.data
    return VAE(joint, LinearEncoder(weight, -weight @ start.bias, torch.full((latent,), -1.0)), binary=False)


def mlp_1(start: Start, *, hidden: int = 200, latent: int = 50) -> VAE:
    """One stochastic layer: x-200-200-50 and 50-200-200-x (Burda et al. 2016)."""
    encoder = GaussianMLP((start.pixels, hidden, hidden), latent, start.generator)
    decoder = BernoulliMLP((latent, hidden, hidden), *start)
    return VAE(Joint(decoder), encoder, binary=True)


def mlp_2(start: Start, *, hidden: int = 200, latent: int = 100, hidden2: int = 100, latent2: int = 50) -> VAE:
    """Two stochastic layers: x-200-200-100, 100-100-100-50 and back (Burda et al. 2016)."""
    encoder = HierarchicalEncoder(
        GaussianMLP((start.pixels, hidden, hidden), latent, start.generator),
        GaussianMLP((latent, hidden2, hidden2), latent2, start.generator),
    )
    prior = GaussianMLP((latent2, hidden2, hidden2), latent, start.generator)
    decoder = BernoulliMLP((latent, hidden, hidden), *start)
    return VAE(HierarchicalJoint(prior, decoder), encoder, binary=True)


def mlp_2_detached(start: Start, *, hidden: int = 200, latent: int = 100, hidden2: int = 100, latent2: int = 50) -> VAE:
    """mlp-2, but stopping q stops its outputs, as in the code released with "Sticking the Landing": a fault."""
    model = mlp_2(start, hidden=hidden, latent=latent, hidden2=hidden2, latent2=latent2)
    return VAE(model.joint, DetachedEncoder(model.encoder.first, model.encoder.second), binary=True)


def mlp_1_mixture(start: Start, *, hidden: int = 200, latent: int = 50, components: int = 4) -> VAE:
    """One stochastic layer as in mlp-1, with a mixture of Gaussians as posterior; k counts the draws of all of them."""
    encoder = GaussianMixtureMLP((start.pixels, hidden, hidden), latent, components, start.generator)
    decoder = BernoulliMLP((latent, hidden, hidden), *start)
    return VAE(Joint(decoder), encoder, binary=True)


def mlp_1_flow(start: Start, *, hidden: int = 200, latent: int = 50, layers: int = 4, flow_hidden: int = 100) -> VAE:
    """One stochastic layer as in mlp-1, with a normalizing flow as posterior: affine couplings behind the Gaussian."""
    from vaelib.flows import AffineCoupling, FlowEncoder  # here, since flows are made of this package's layers

    base = GaussianMLP((start.pixels, hidden, hidden), latent, start.generator)
    couplings = [AffineCoupling(latent, (flow_hidden,), 2 * latent, start.generator) for _ in range(layers)]
    decoder = BernoulliMLP((latent, hidden, hidden), *start)
    return VAE(Joint(decoder), FlowEncoder(base, couplings, conditional=True), binary=True)


def linear_bernoulli(start: Start, *, latent: int = 8) -> VAE:
    """As linear, with fair bits as the latent, whose logits a linear layer gives."""
    return _linear_discrete(start, (latent,))


def linear_categorical(start: Start, *, latent: int = 3, classes: int = 6) -> VAE:
    """As linear-bernoulli, with choices among some classes as the latent."""
    return _linear_discrete(start, (latent, classes))


def mlp_1_bernoulli(start: Start, *, hidden: int = 200, latent: int = 50) -> VAE:
    """As mlp-1, with fair bits as the latent."""
    return _mlp_discrete(start, hidden, (latent,))


def mlp_1_categorical(start: Start, *, hidden: int = 200, latent: int = 10, classes: int = 10) -> VAE:
    """As mlp-1, with choices among some classes as the latent."""
    return _mlp_discrete(start, hidden, (latent, classes))


def guided(start: Start, *, hidden: int = 200, latent: int = 32) -> VAE:
    """As mlp-1, with Gaussian pixels of one noise scale, and a linear decoder beside the nonlinear one."""
    encoder = GaussianMLP((start.pixels, hidden, hidden), latent, start.generator)
    decoder, guide = _two_decoders(start, hidden, latent)
    return VAE(Guided(Joint(decoder), LinearGaussian(guide.weight, guide.bias, guide.log_std)), encoder, binary=False)


def guided_bernoulli(start: Start, *, hidden: int = 200, latent: int = 32) -> VAE:
    """As guided, with fair bits as the latent."""
    encoder = DiscreteEncoder(_mlp(start.pixels, hidden, latent, start.generator), (latent,))
    decoder, guide = (DiscreteJoint(d, torch.zeros(latent)) for d in _two_decoders(start, hidden, latent))
    return VAE(Guided(decoder, guide), encoder, binary=False)


def pixelcnn_vae(
    start: Start, *, latent: int = 32, maps: int = 64, layers: int = 13, encoder_maps: int = 64, hidden: int = 512
) -> VAE:
    """A ResNet encoder and a PixelCNN decoder for square images (He et al. 2019); the mean image is not used."""
    side = square_side(start.pixels)
    encoder = ResNetEncoder(side, latent, encoder_maps, hidden, generator=start.generator)
    return VAE(Joint(PixelCNN(side, latent, maps, layers, generator=start.generator)), encoder, binary=True)


def pixelcnn_alone(data_dim: int, generator: torch.Generator | None = None, *, maps: int = 64, layers: int = 13) -> VAE:
    """The decoder of pixelcnn without z, as a VAE whose latent has no dimension (see :class:`NoLatent`)."""
    decoder = PixelCNN(square_side(data_dim), 0, maps, layers, generator=generator)
    return VAE(Joint(decoder), NoLatent(), binary=True)


def cosine(start: Start, *, hidden: int = 100, latent: int = 8, features: int = 32) -> VAE:
    """One stochastic layer, x-100-100-8, and a decoder linear in cosines of z, whose ELBO has a closed form."""
    encoder = GaussianMLP((start.pixels, hidden, hidden), latent, start.generator)
    frequency = 0.7 * torch.randn(features, latent, generator=start.generator)
    phase = 2 * math.pi * torch.rand(features, generator=start.generator)
    weight = 0.3 / math.sqrt(features) * torch.randn(start.pixels, features, generator=start.generator)
    decoder = CosineDecoder(frequency, phase, weight, start.bias, torch.tensor(-1.0))
    return VAE(Joint(decoder), encoder, binary=False)


def _mlp(inputs: int, hidden: int, outputs: int, generator: torch.Generator | None) -> nn.Sequential:
    return tanh_layers((inputs, hidden, hidden), generator).append(linear(hidden, outputs, generator))


def _linear_decoder(start: Start, inputs: int) -> LinearDecoder:
    return LinearDecoder(linear(inputs, start.pixels, start.generator).weight.data, start.bias, torch.tensor(-1.0))


def _linear_discrete(start: Start, shape: tuple[int, ...]) -> VAE:
    encode = linear(start.pixels, math.prod(shape), start.generator)
    decoder = _linear_decoder(start, math.prod(shape))
    with torch.no_grad():
        encode.bias.copy_(-encode.weight @ decoder.bias)
    return VAE(DiscreteJoint(decoder, torch.zeros(shape)), DiscreteEncoder(encode, shape), binary=False)


def _mlp_discrete(start: Start, hidden: int, shape: tuple[int, ...]) -> VAE:
    encoder = DiscreteEncoder(_mlp(start.pixels, hidden, math.prod(shape), start.generator), shape)
    decoder = BernoulliMLP((math.prod(shape), hidden, hidden), *start)
    return VAE(DiscreteJoint(decoder, torch.zeros(shape)), encoder, binary=True)


def _two_decoders(start: Start, hidden: int, latent: int) -> tuple[GaussianDecoder, LinearDecoder]:
    network = _mlp(latent, hidden, start.pixels, start.generator)
    if start.mean is not None:
        with torch.no_grad():
            network[-1].bias.copy_(start.mean)
    return GaussianDecoder(network, torch.tensor(-1.0)), _linear_decoder(start, latent)


MODELS = {
    "linear": linear_vae,
    "mlp-1": mlp_1,
    "mlp-2": mlp_2,
    "mlp-2-detached": mlp_2_detached,
    "mlp-1-mixture": mlp_1_mixture,
    "mlp-1-flow": mlp_1_flow,
    "linear-bernoulli": linear_bernoulli,
    "linear-categorical": linear_categorical,
    "mlp-1-bernoulli": mlp_1_bernoulli,
    "mlp-1-categorical": mlp_1_categorical,
    "guided": guided,
    "guided-bernoulli": guided_bernoulli,
    "cosine": cosine,
    "pixelcnn": pixelcnn_vae,
}
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
    return builder(Start(data_dim, mean, generator), **sizes)
