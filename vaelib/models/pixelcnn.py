r"""A VAE whose decoder draws an image pixel by pixel: a ResNet encoder and a PixelCNN decoder.

The model of "Lagging Inference Networks and Posterior Collapse in VAEs" (He et al. 2019) for Omniglot, after their
description and released sizes. The decoder sees z *and* all the pixels before the one it predicts, so it can do without
z, and a VAE in which it does has collapsed.

Both networks use batch normalisation, which has consequences:

- *In training mode* an image is normalised with the statistics of its batch, so a logit depends, a little, on later
  pixels and on the other images. Only ``model.eval()``, which uses the running statistics, makes
  ``joint(x, z)`` the log-density of an image: evaluate, sample and compare likelihoods in that mode alone.
- *Stopping q.* There is one stochastic layer, so detaching the encoder's outputs
  (``DiagonalGaussian.stop_gradient()``) is exact, also for q's statistics of the batch, and the
  encoder runs once a step. A second pass through ``posteriors.stop_gradient(encoder)`` gives the same q, too, and does
  not move the running statistics again, since its buffers are copies; a second pass through the encoder itself would.
- *Rows of the tableau.* :func:`vaelib.objectives.backward` scales what arrives at a sample by b / a of its own draw,
  and in training mode a sample's gradient also holds what the others in the batch owe it. For a ratio that is the same
  for all draws (``elbo-total``, ``elbo-path``, ``iwae-total``, ``iwae-path``) this is the estimator; ``iwae-dreg`` and
  ``rws-dreg`` are what they say in evaluation mode only. So are gradients draw by draw under ``torch.func.vmap``, which
  refuses to move running statistics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaelib.errors import InputError, choose
from vaelib.layers import linear
from vaelib.likelihoods import Bernoulli
from vaelib.models.joints import Joint
from vaelib.models.vae import VAE
from vaelib.posteriors import DiagonalGaussian

MASKS = {"A": 0, "B": 1}
"""How many pixels of its own place a kernel sees: A none, for the image itself; B one, for what an A has made of it."""


def he_normal(weight: Tensor, size: int, generator: torch.Generator | None = None) -> Tensor:
    r"""Fill ``weight`` from :math:`\mathcal N(0, 2 / (s^2 C))`, s the kernel's size and C the output maps."""
    return nn.init.normal_(weight, 0.0, math.sqrt(2 / (size * size * weight.shape[0])), generator=generator)


def convolution(
    inputs: int, outputs: int, size: int, generator: torch.Generator | None = None, **options: int
) -> nn.Conv2d:
    """Return a convolution without a bias, from :func:`he_normal` weights."""
    layer = nn.utils.skip_init(nn.Conv2d, inputs, outputs, size, bias=False, **options)
    he_normal(layer.weight, size, generator)
    return layer


class CausalConvolution(nn.Module):
    r"""A convolution that sees, of each pixel's neighbourhood, only what comes before it in raster order.

    That is the rows above, and in its own row the pixels to the left; with mask B the pixel itself too (van den Oord
    et al. 2016). The rows below would have weight zero, and the kernel leaves them out, which halves the work.
    Introduced in book/05-inference-lag.ipynb.

    Parameters
    ----------
    inputs, outputs
        numbers of maps.
    size
        the side of the square kernel, odd.
    mask
        ``"A"`` or ``"B"``.
    """

    def __init__(
        self, inputs: int, outputs: int, size: int, mask: str, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.reach = size // 2
        self.weight = nn.Parameter(he_normal(torch.empty(outputs, inputs, self.reach + 1, size), size, generator))
        seen = torch.ones(self.reach + 1, size)
        seen[-1, self.reach + choose("mask", mask, MASKS) :] = 0
        self.register_buffer("seen", seen, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, inputs, H, W]`` to ``[N, outputs, H, W]``."""
        return F.conv2d(x, self.weight * self.seen, padding=self.reach)[..., : x.shape[-2], :]


class Residual(nn.Module):
    r"""The block :math:`\operatorname{elu}(f(x) + g(x))` of a body f and a shortcut g."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, C, H, W]`` to ``[N, C', H', W']``."""
        return F.elu(self.body(x) + self.shortcut(x))


def causal_block(maps: int, size: int, generator: torch.Generator | None = None) -> Residual:
    """Return the decoder's residual block: 1 x 1 to half the maps, a mask-B convolution, 1 x 1 back."""
    half = max(1, maps // 2)
    body = nn.Sequential(
        *(convolution(maps, half, 1, generator), nn.BatchNorm2d(half), nn.ELU()),
        *(CausalConvolution(half, half, size, "B", generator), nn.BatchNorm2d(half), nn.ELU()),
        *(convolution(half, maps, 1, generator), nn.BatchNorm2d(maps)),
    )
    return Residual(body, nn.Identity())


def halving_block(inputs: int, maps: int, generator: torch.Generator | None = None) -> Residual:
    """Return the encoder's residual block: two 3 x 3 convolutions, the first with stride 2, as has the shortcut."""
    body = nn.Sequential(
        *(convolution(inputs, maps, 3, generator, stride=2, padding=1), nn.BatchNorm2d(maps), nn.ELU()),
        *(convolution(maps, maps, 3, generator, padding=1), nn.BatchNorm2d(maps)),
    )
    shortcut = nn.Sequential(convolution(inputs, maps, 1, generator, stride=2), nn.BatchNorm2d(maps))
    return Residual(body, shortcut)


class ResNetEncoder(nn.Module):
    r"""A diagonal Gaussian from residual blocks: each halves the image's side, and a last kernel covers what is left.

    Published: 28 x 28 pixels, 3 blocks of 64 maps (to 4 x 4), a 4 x 4 convolution to 512, a linear layer to the mean
    and the log-variance of 32 latents. Introduced in book/05-inference-lag.ipynb.

    Parameters
    ----------
    side
        the side of the square images.
    latent
        the dimension of the Gaussian.
    maps, hidden, blocks
        maps of a block, widths of the hidden layer, number of blocks.
    """

    def __init__(
        self,
        side: int,
        latent: int,
        maps: int = 64,
        hidden: int = 512,
        blocks: int = 3,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.side = side
        left = math.ceil(side / 2**blocks)
        self.network = nn.Sequential(
            *(halving_block(maps if i else 1, maps, generator) for i in range(blocks)),
            *(convolution(maps, hidden, left, generator), nn.BatchNorm2d(hidden), nn.ELU(), nn.Flatten()),
            linear(hidden, 2 * latent, generator),
        )

    def forward(self, x: Tensor) -> DiagonalGaussian:
        """Return the posterior for ``x`` ``[B, X]``.

        Raises
        ------
        InputError
            for images of another size, and for a single one in training mode.
        """
        images = as_images(x, self.side)
        if self.training and len(x) < 2:
            raise InputError(
                "batch normalisation learns from the spread over a batch, but this one has 1 image: "
                "use a batch_size of at least 2, or call model.eval() first"
            )
        mean, log_variance = self.network(images.unsqueeze(1)).chunk(2, -1)
        return DiagonalGaussian(mean, 0.5 * log_variance)


class NoLatent(nn.Module):
    """The encoder of a model without z: a Gaussian of dimension 0, whose samples are empty and whose density is 1.

    It makes an autoregressive model a VAE like the others: its bound is log p(x) itself, one draw says all, and KL,
    mutual information and active units are 0. Train it with a row without a path, ``elbo-score`` with k = 1.
    Introduced in book/05-inference-lag.ipynb.
    """

    def forward(self, x: Tensor) -> DiagonalGaussian:
        """Return the empty posterior for ``x`` ``[B, ...]``."""
        empty = x.new_empty(len(x), 0)
        return DiagonalGaussian(empty, empty)


def kernel_sizes(layers: int) -> list[int]:
    """Return the kernels' sizes, a third of them 7, then 5, then 3: five, four and four of 13, as published."""
    return [(7, 5, 3)[3 * i // layers] for i in range(layers)]


class PixelCNN(nn.Module):
    r"""The decoder :math:`p(x \mid z) = \prod_d p(x_d \mid x_{<d}, z)`, pixels in raster order.

    z becomes some maps of the image's size by a linear layer. A masked convolution (mask A) of the image and an
    ordinary one of these maps make the first layer; residual blocks (mask B) follow, and every layer's output skips
    three layers, through a block of its own. Published: 28 x 28 pixels, 13 layers of 64 maps, 4 maps of a
    32-dimensional z. As in all stacks of square masked kernels, far pixels to the upper right stay in a blind spot.
    Called as ``decode(z)`` it returns a likelihood, as other decoders do. Introduced in book/05-inference-lag.ipynb.

    Parameters
    ----------
    side
        the side of the square images.
    latent
        the dimension of z; 0 for the autoregressive model without z (see :class:`NoLatent`).
    maps, layers, latent_maps
        maps of a layer, number of layers (at least 3), maps made of z.
    """

    def __init__(
        self,
        side: int,
        latent: int,
        maps: int = 64,
        layers: int = 13,
        latent_maps: int = 4,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if layers < 3:
            raise InputError(f"a PixelCNN has at least 3 layers, since connections skip three, but layers is {layers}")
        self.side = side
        first, *rest = kernel_sizes(layers)
        weight = torch.empty(latent_maps * side * side, latent)
        self.weight = nn.Parameter(nn.init.xavier_uniform_(weight, generator=generator))
        self.bias = nn.Parameter(torch.zeros(len(weight)))
        self.latent = convolution(latent_maps, maps, first, generator, padding=first // 2)
        self.pixels = CausalConvolution(1, maps, first, "A", generator)
        self.first = nn.Sequential(nn.BatchNorm2d(maps), nn.ELU())
        self.blocks = nn.ModuleList(causal_block(maps, size, generator) for size in rest)
        self.skips = nn.ModuleList(causal_block(maps, size, generator) for size in rest[:-1])
        self.last = nn.Sequential(
            *(convolution(maps, maps, 1, generator), nn.BatchNorm2d(maps), nn.ELU()),
            convolution(maps, 1, 1, generator),
        )
        nn.init.kaiming_uniform_(self.last[-1].weight, a=math.sqrt(5), generator=generator)  # logits start near 0

    def forward(self, z: Tensor) -> AutoregressiveBernoulli:
        """Return p(x given z) for ``z`` ``[K, B, D]``."""
        maps = F.linear(z, self.weight, self.bias).reshape(-1, self.latent.in_channels, self.side, self.side)
        return AutoregressiveBernoulli(self, self.latent(maps).unflatten(0, z.shape[:2]))

    def logits(self, images: Tensor, context: Tensor) -> Tensor:
        """Return the logit of each pixel given those before it, ``[K, B, H, W]``.

        Parameters
        ----------
        images
            ``[B, H, W]`` or ``[K, B, H, W]``; all rows, or the first few of both arguments.
        context
            what the first layer makes of z, ``[K, B, C, H, W]``.
        """
        pixels = self.pixels(images.flatten(0, -3).unsqueeze(1)).unflatten(0, images.shape[:-2])
        outputs = [self.first((pixels + context).flatten(0, 1))]
        skips = iter(self.skips)
        for block in self.blocks:
            before = outputs[-1] + next(skips)(outputs[-3]) if len(outputs) > 2 else outputs[-1]
            outputs.append(block(before))
        return self.last(outputs[-1] + next(skips)(outputs[-3])).squeeze(1).unflatten(0, context.shape[:2])


@dataclass(frozen=True)
class AutoregressiveBernoulli:
    r"""Binary pixels in raster order, :math:`\prod_d p(x_d \mid x_{<d}, z)`; what :class:`PixelCNN` returns.

    Introduced in book/05-inference-lag.ipynb.

    Parameters
    ----------
    network
        the decoder.
    context
        what its first layer makes of z, ``[K, B, C, H, W]``.
    """

    network: PixelCNN
    context: Tensor

    def conditional(self, x: Tensor) -> Bernoulli:
        """Return each pixel's distribution given those before it in ``x`` ``[B, X]``, with logits ``[K, B, X]``.

        Raises
        ------
        InputError
            for images of another size than the network was built for.
        """
        return Bernoulli(self.network.logits(as_images(x, self.network.side), self.context).flatten(-2))

    def log_prob(self, x: Tensor) -> Tensor:
        r"""Return :math:`\sum_d \log p(x_d \mid x_{<d}, z)` for ``x`` ``[B, X]``, ``[K, B]``, in nats: one pass."""
        return self.conditional(x).log_prob(x)

    @torch.no_grad()
    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw images of 0 and 1, ``[K, B, X]``: one pass a pixel, through the rows so far.

        Raises
        ------
        InputError
            in training mode, where the images of a batch would depend on each other.
        """
        if self.network.training:
            raise InputError("a PixelCNN samples with its batch norms' running statistics: call model.eval() first")
        side = self.network.side
        images = self.context.new_zeros(*self.context.shape[:2], side, side)
        for row, column in product(range(side), repeat=2):
            logits = self.network.logits(images[..., : row + 1, :], self.context[..., : row + 1, :])
            images[..., row, column] = torch.bernoulli(logits[..., row, column].sigmoid(), generator=generator)
        return images.flatten(-2)


def as_images(x: Tensor, side: int) -> Tensor:
    """Return ``x`` ``[..., X]`` as ``[..., side, side]``.

    Raises
    ------
    InputError
        if X is not side times side.
    """
    if x.shape[-1] != side * side:
        raise InputError(
            f"this model was built for images of {side} x {side} = {side * side} pixels, but these have "
            f"{x.shape[-1]}: build it with data_dim={x.shape[-1]}"
        )
    return x.unflatten(-1, (side, side))


def square_side(data_dim: int) -> int:
    """Return the side of a square image of ``data_dim`` pixels.

    Raises
    ------
    InputError
        if it is not a square number.
    """
    side = math.isqrt(data_dim)
    if side * side != data_dim:
        raise InputError(
            f"a PixelCNN wants square images, such as 28 x 28 = 784 pixels, but data_dim is {data_dim}: "
            "crop or pad them, or choose a model such as mlp-1"
        )
    return side


def pixelcnn_alone(data_dim: int, generator: torch.Generator | None = None, *, maps: int = 64, layers: int = 13) -> VAE:
    """The decoder of pixelcnn without z, as a VAE whose latent has no dimension (see :class:`NoLatent`)."""
    decoder = PixelCNN(square_side(data_dim), 0, maps, layers, generator=generator)
    return VAE(Joint(decoder), NoLatent(), binary=True)
