"""What a model is, and what every one of ours is built from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


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
    shape
        (H, W) or (C, H, W) of an image, or None: a row of numbers.
    """

    pixels: int
    mean: Tensor | None = None
    generator: torch.Generator | None = None
    shape: tuple[int, ...] | None = None

    @property
    def bias(self) -> Tensor:
        """The mean image, or zeros, as a parameter's own copy."""
        zeros = torch.zeros(self.pixels)
        return zeros if self.mean is None else zeros.copy_(self.mean)
