"""A convolutional VAE for images of any shape, of one or three channels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaelib.errors import InputError
from vaelib.layers import linear
from vaelib.likelihoods import Bernoulli, DiscretisedLogistic, Gaussian
from vaelib.models.joints import Joint
from vaelib.models.vae import VAE, Start
from vaelib.posteriors import DiagonalGaussian


def convolution(inputs: int, outputs: int, stride: int, generator: torch.Generator | None) -> nn.Conv2d:
    """Return a 3 x 3 convolution with Glorot-uniform weights and zero biases."""
    layer = nn.utils.skip_init(nn.Conv2d, inputs, outputs, 3, stride=stride, padding=1)
    nn.init.xavier_uniform_(layer.weight, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


class ConvEncoder(nn.Module):
    r"""The encoder: two convolutions, each of which halves the image, then a diagonal Gaussian linear in the maps.

    Parameters
    ----------
    shape
        (C, H, W) of an image.
    maps
        of the first convolution; the second has twice as many.
    latent
        the dimension of the Gaussian.
    """

    def __init__(
        self, shape: tuple[int, int, int], maps: int, latent: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.shape = shape
        self.maps = nn.Sequential(
            *(convolution(shape[0], maps, 2, generator), nn.SiLU()),
            *(convolution(maps, 2 * maps, 2, generator), nn.SiLU(), nn.Flatten()),
        )
        self.mean, self.log_std = (linear(2 * maps * quarter(shape), latent, generator) for _ in range(2))

    def forward(self, x: Tensor) -> DiagonalGaussian:
        """Return the Gaussian for ``x`` ``[B, X]``."""
        hidden = self.maps(x.unflatten(-1, self.shape))
        return DiagonalGaussian(self.mean(hidden), self.log_std(hidden))


class ConvDecoder(nn.Module):
    r"""The decoder: the encoder's way back, the image doubled before each convolution, and a likelihood of its output.

    Parameters
    ----------
    shape, maps, latent
        as for :class:`ConvEncoder`.
    bias
        where the output starts, ``[X]``.
    likelihood
        called with the output ``[K, B, X]``, and with ``log_scale`` ``[]`` if there is one.
    log_scale
        the logarithm of the likelihood's scale at first, one for all pixels; None for a likelihood without.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        maps: int,
        latent: int,
        bias: Tensor,
        likelihood: Callable[..., Any],
        log_scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.likelihood = shape, likelihood
        self.start = linear(latent, 2 * maps * quarter(shape), generator)
        self.first, self.second = convolution(2 * maps, maps, 1, generator), convolution(maps, shape[0], 1, generator)
        self.bias = nn.Parameter(bias)
        self.log_scale = None if log_scale is None else nn.Parameter(torch.tensor(log_scale))

    def forward(self, z: Tensor) -> Any:
        """Return p(x given z) for ``z`` ``[K, B, D]``."""
        _, height, width = self.shape
        half, quarter = (-(-height // 2), -(-width // 2)), (-(-height // 4), -(-width // 4))
        maps = self.start(z).flatten(0, -2).unflatten(-1, (-1, *quarter))
        maps = F.silu(self.first(F.interpolate(F.silu(maps), size=half)))
        output = self.second(F.interpolate(maps, size=(height, width))).flatten(1) + self.bias
        output = output.unflatten(0, z.shape[:-1])
        return self.likelihood(output) if self.log_scale is None else self.likelihood(output, self.log_scale)


def quarter(shape: tuple[int, int, int]) -> int:
    """Return the pixels of an image that was halved twice, up to whole ones."""
    return -(-shape[1] // 4) * -(-shape[2] // 4)


def convolutional(
    start: Start, maps: int, latent: int, likelihood: Callable[..., Any], log_scale: float | None = None
) -> VAE:
    """Return the VAE with a likelihood; images whose shape is not said are square.

    Raises
    ------
    InputError
        for observations that are no images.
    """
    side = math.isqrt(start.pixels)
    shape = (side, side) if start.shape is None else start.shape
    shape = shape if len(shape) == 3 else (1, *shape)
    if math.prod(shape) != start.pixels or shape[1] == 1 < shape[2]:
        raise InputError(
            "a convolutional model is for images [H, W] or [C, H, W], but these observations are rows of "
            f"{start.pixels} numbers: give the data their shape, or choose a model such as mlp-1"
        )
    mean = start.bias
    bias = mean.clamp(0.001, 0.999).logit() if likelihood is Bernoulli and start.mean is not None else mean
    encoder = ConvEncoder(shape, maps, latent, start.generator)
    decoder = ConvDecoder(shape, maps, latent, bias, likelihood, log_scale, start.generator)
    return VAE(Joint(decoder), encoder, binary=likelihood is Bernoulli)


def conv(start: Start, *, maps: int = 16, latent: int = 32) -> VAE:
    """A convolutional VAE for images of any shape with black and white pixels."""
    return convolutional(start, maps, latent, Bernoulli)


def conv_gaussian(start: Start, *, maps: int = 16, latent: int = 32) -> VAE:
    """As conv, with Gaussian pixels of one noise scale."""
    return convolutional(start, maps, latent, Gaussian, -1.0)


def conv_logistic(start: Start, *, maps: int = 16, latent: int = 32) -> VAE:
    """As conv, for the 256 levels of bytes: logistic pixels of one scale, discretised (Kingma et al. 2016)."""
    return convolutional(start, maps, latent, DiscretisedLogistic, -2.0)
