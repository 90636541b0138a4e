"""Models by name: a joint density p(x, z) and an encoder q(z given x), trained together."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from vaelib.errors import InputError, choose, plain, shown, whole_number
from vaelib.flows import AffineCoupling, FlowEncoder
from vaelib.layers import linear, tanh_layers
from vaelib.models.convolutional import conv, conv_gaussian, conv_logistic
from vaelib.models.decoders import BernoulliMLP, CosineDecoder, GaussianDecoder, LinearDecoder
from vaelib.models.encoders import (
    DetachedEncoder,
    DiscreteEncoder,
    GaussianMixtureMLP,
    GaussianMLP,
    HierarchicalEncoder,
)
from vaelib.models.joints import DiscreteJoint, Guided, HierarchicalJoint, Joint
from vaelib.models.linear import LinearEncoder, LinearGaussian
from vaelib.models.own import at_home, file_of, seeded, whole
from vaelib.models.own import builder as builder_of
from vaelib.models.vae import VAE, Start


def linear_vae(start: Start, *, latent: int = 8) -> VAE:
    """The linear-Gaussian VAE with one noise scale for all pixels, from small random weights."""
    encode, decode = linear(start.pixels, latent, start.generator), linear(latent, start.pixels, start.generator)
    joint = LinearGaussian(decode.weight.data, start.bias, torch.tensor(-1.0))
    weight = encode.weight.data
    return VAE(joint, LinearEncoder(weight, -weight @ start.bias, torch.full((latent,), -1.0)), binary=False)


def mlp_1(start: Start, *, hidden: int = 200, latent: int = 50) -> VAE:
    """One stochastic layer: x-200-200-50 and 50-200-200-x (Burda et al. 2016)."""
    encoder = GaussianMLP((start.pixels, hidden, hidden), latent, start.generator)
    decoder = BernoulliMLP((latent, hidden, hidden), *start[:3])
    return VAE(Joint(decoder), encoder, binary=True)


def mlp_2(start: Start, *, hidden: int = 200, latent: int = 100, hidden2: int = 100, latent2: int = 50) -> VAE:
    """Two stochastic layers: x-200-200-100, 100-100-100-50 and back (Burda et al. 2016)."""
    return _hierarchy(start, hidden, hidden2, (latent, latent2))


def mlp_4(start: Start, *, hidden: int = 200, hidden2: int = 100, latent: int = 100) -> VAE:
    """Four stochastic layers, each half as wide as the one below: 100, 50, 25 and 12."""
    return _hierarchy(start, hidden, hidden2, tuple(max(1, latent // 2**layer) for layer in range(4)))


def mlp_2_detached(start: Start, *, hidden: int = 200, latent: int = 100, hidden2: int = 100, latent2: int = 50) -> VAE:
    """mlp-2, but stopping q stops its outputs, as in the code released with "Sticking the Landing": a fault."""
    model = mlp_2(start, hidden=hidden, latent=latent, hidden2=hidden2, latent2=latent2)
    return VAE(model.joint, DetachedEncoder(model.encoder.first, *model.encoder.above), binary=True)


def mlp_1_mixture(start: Start, *, hidden: int = 200, latent: int = 50, components: int = 4) -> VAE:
    """One stochastic layer as in mlp-1, with a mixture of Gaussians as posterior; k counts the draws of all of them."""
    encoder = GaussianMixtureMLP((start.pixels, hidden, hidden), latent, components, start.generator)
    decoder = BernoulliMLP((latent, hidden, hidden), *start[:3])
    return VAE(Joint(decoder), encoder, binary=True)


def mlp_1_flow(start: Start, *, hidden: int = 200, latent: int = 50, layers: int = 4, flow_hidden: int = 100) -> VAE:
    """One stochastic layer as in mlp-1, with a normalizing flow as posterior: affine couplings behind the Gaussian."""
    base = GaussianMLP((start.pixels, hidden, hidden), latent, start.generator)
    couplings = [AffineCoupling(latent, (flow_hidden,), 2 * latent, start.generator) for _ in range(layers)]
    decoder = BernoulliMLP((latent, hidden, hidden), *start[:3])
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


def pixelcnn(
    start: Start, *, latent: int = 32, maps: int = 64, layers: int = 13, encoder_maps: int = 64, hidden: int = 512
) -> VAE:
    """A ResNet encoder and a PixelCNN decoder for square images (He et al. 2019); the mean image is not used."""
    from vaelib.models.pixelcnn import PixelCNN, ResNetEncoder, square_side  # here alone, since few want it

    side = square_side(start.pixels)
    encoder = ResNetEncoder(side, latent, encoder_maps, hidden, generator=start.generator)
    return VAE(Joint(PixelCNN(side, latent, maps, layers, generator=start.generator)), encoder, binary=True)


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


def _hierarchy(start: Start, hidden: int, hidden_above: int, latents: tuple[int, ...]) -> VAE:
    def up_and_down(widths: tuple[int, ...]) -> list[GaussianMLP]:
        return [GaussianMLP((here, hidden_above, hidden_above), to, start.generator) for here, to in pairwise(widths)]

    first = GaussianMLP((start.pixels, hidden, hidden), latents[0], start.generator)
    encoder = HierarchicalEncoder(first, *up_and_down(latents))
    priors = up_and_down(latents[::-1])[::-1]
    decoder = BernoulliMLP((latents[0], hidden, hidden), *start[:3])
    return VAE(HierarchicalJoint(priors, decoder), encoder, binary=True)


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
    decoder = BernoulliMLP((math.prod(shape), hidden, hidden), *start[:3])
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
    "mlp-4": mlp_4,
    "mlp-1-mixture": mlp_1_mixture,
    "mlp-1-flow": mlp_1_flow,
    "linear-bernoulli": linear_bernoulli,
    "linear-categorical": linear_categorical,
    "mlp-1-bernoulli": mlp_1_bernoulli,
    "mlp-1-categorical": mlp_1_categorical,
    "guided": guided,
    "guided-bernoulli": guided_bernoulli,
    "cosine": cosine,
    "pixelcnn": pixelcnn,
    "conv": conv,
    "conv-gaussian": conv_gaussian,
    "conv-logistic": conv_logistic,
}
"""The builders of the models, by name."""


def build(
    name: str,
    data_dim: int,
    mean: Tensor | None = None,
    generator: torch.Generator | None = None,
    shape: tuple[int, ...] | None = None,
    **sizes: int,
) -> nn.Module:
    """Build a model by name.

    Parameters
    ----------
    name
        a key of :data:`MODELS`; or one's own, ``FILE.py:FUNCTION`` or ``package.module:FUNCTION``
        (:func:`vaelib.models.own.builder`).
    data_dim
        the number of pixels.
    mean
        the mean training image, ``[data_dim]``, at which the decoder's output starts.
    generator
        draws the initial weights.
    shape
        (H, W) or (C, H, W) of an image, for models that want to know.
    sizes
        widths other than the builder's defaults, such as ``hidden=50, latent=4``.

    Raises
    ------
    InputError
        for a name that does not exist, a size the model does not have, a size below 1, or a mean or shape of other
        data.
    """
    data_dim, sizes = plain(data_dim), {size: plain(value) for size, value in sizes.items()}
    builder = builder_of(name) if isinstance(name, str) and ":" in name else choose("model", name, MODELS)
    for size, value in sizes.items():
        choose(f"size of model '{name}'", size, getattr(builder, "__kwdefaults__", None) or {})
        whole_number(f"{size} of model '{name}'", value, least=1)
    whole_number("data_dim", data_dim, least=1)
    fits = isinstance(mean, Tensor) and mean.shape == (data_dim,)
    if mean is not None and not (fits and mean.isfinite().all()):
        kind = f"tensor {list(mean.shape)}" if isinstance(mean, Tensor) else type(mean).__name__
        found = "holds one that is not" if fits else f"is a {kind}"
        raise InputError(f"mean must be a tensor [{data_dim}] of finite numbers, one for each pixel, but {found}")
    sides = shape if isinstance(shape, tuple | list) else [0]
    if shape is not None and not (all(isinstance(n, int) and n > 0 for n in sides) and math.prod(sides) == data_dim):
        raise InputError(f"shape must be that of {data_dim} pixels, but is {shown(shape)}")
    start = Start(data_dim, mean, generator, shape)
    if ":" not in name:
        return builder(start, **sizes)
    with seeded(generator), at_home(file_of(name)):
        return whole(builder(start, **sizes), name)
