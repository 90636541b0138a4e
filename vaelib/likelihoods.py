r"""Likelihoods p(x given z): what a decoder returns.

Each is built from the decoder's output for ``[K, B]`` latents and has a ``mean``, ``sample(generator)``, both
``[K, B, D]``, and ``log_prob(x)``, summed over the pixels: ``x`` is ``[B, D]``, the result ``[K, B]``, in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vaelib.errors import InputError
from vaelib.posteriors import LOG_2PI, tracing


@dataclass(frozen=True)
class Bernoulli:
    r"""Binary pixels, :math:`p(x \mid z) = \prod_d \pi_d^{x_d} (1-\pi_d)^{1-x_d}`.

    The probabilities are :math:`\pi = \operatorname{sigmoid}(l)`. Introduced in book/01-elbo-forms.ipynb.

    Parameters
    ----------
    logits
        :math:`l`, ``[K, B, D]``. Logits and not probabilities, so that no pixel's log-probability overflows.
    """

    logits: Tensor

    @property
    def mean(self) -> Tensor:
        r"""The probabilities :math:`\pi`, ``[K, B, D]``."""
        return self.logits.sigmoid()

    def log_prob(self, x: Tensor) -> Tensor:
        r"""Return :math:`\sum_d [x_d l_d - \log(1 + e^{l_d})]`, ``[K, B]``.

        Raises
        ------
        InputError
            for another number of pixels, whole numbers, or pixels that are not 0 or 1.
        """
        check_pixels(x, self.logits)
        if not tracing() and not binary(x.detach()):
            raise InputError(
                f"a Bernoulli likelihood is for pixels of 0 and 1, but these go from {x.min():g} to {x.max():g} and "
                "are not all 0 or 1: binarise them (--binarisation dynamic or fixed), or take a Gaussian likelihood"
            )
        x = x.expand_as(self.logits)
        return -F.binary_cross_entropy_with_logits(self.logits, x, reduction="none").sum(-1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw images of 0 and 1, ``[K, B, D]``."""
        return torch.bernoulli(self.mean, generator=generator)


@dataclass(frozen=True)
class Gaussian:
    r"""Real-valued pixels, :math:`p(x \mid z) = \mathcal N(x; m, \operatorname{diag} s^2)`.

    Introduced in book/01-elbo-forms.ipynb.

    Parameters
    ----------
    mean, log_std
        :math:`m`, ``[K, B, D]``, and :math:`\log s`, anything that broadcasts against it.
    """

    mean: Tensor
    log_std: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        r"""Return :math:`-\tfrac12 \sum_d [(x_d-m_d)^2/s_d^2 + 2\log s_d + \log 2\pi]`, ``[K, B]``.

        Raises
        ------
        InputError
            for another number of pixels.
        """
        check_pixels(x, self.mean)
        whitened = (x - self.mean) * (-self.log_std).exp()
        return -(0.5 * whitened.square() + self.log_std + 0.5 * LOG_2PI).sum(-1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw images, ``[K, B, D]``."""
        eps = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + self.log_std.exp() * eps


@dataclass(frozen=True)
class DiscretisedLogistic:
    r"""Pixels of the 256 levels 0, 1/255, ..., 1: a logistic density, summed up around each level (Kingma et al. 2016).

    With :math:`\sigma` the logistic function and half a step :math:`h = 1/510`,

    .. math:: p(x \mid z) = \prod_d \Big[\sigma\Big(\frac{x_d + h - m_d}{s_d}\Big)
        - \sigma\Big(\frac{x_d - h - m_d}{s_d}\Big)\Big]

    where the first term is 1 for the level 1, and the second 0 for the level 0, so that the levels' probabilities sum
    to 1.

    Parameters
    ----------
    mean, log_scale
        m, ``[K, B, D]``, and :math:`\log s`, anything that broadcasts against it.
    """

    mean: Tensor
    log_scale: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        r"""Return :math:`\log p(x)` as a sum over pixels, ``[K, B]``.

        From :math:`\sigma(a) - \sigma(b) = \sigma(a)\, \sigma(-b)\, (1 - e^{b - a})`, where nothing cancels.

        Raises
        ------
        InputError
            for another number of pixels, or pixels of other levels.
        """
        check_pixels(x, self.mean)
        if not tracing() and not ((255 * x - (255 * x).round()).abs().max() < 1e-3 and 0 <= x.min() and x.max() <= 1):
            raise InputError(
                f"a discretised logistic likelihood is for the levels 0, 1/255, ..., 1, but these go from {x.min():g} "
                f"to {x.max():g} and are not all of that kind: round them, (255 * x).round() / 255, or take a Gaussian"
            )
        precision = (-self.log_scale).exp()
        above, below = ((x + sign / 510 - self.mean) * precision for sign in (1, -1))
        inside = torch.log(-torch.expm1(-precision / 255))
        lowest, highest = x < 1 / 510, x > 509 / 510
        log_p = torch.where(highest, 0.0, F.logsigmoid(above)) + torch.where(lowest, 0.0, F.logsigmoid(-below))
        return (log_p + torch.where(lowest | highest, 0.0, inside)).sum(-1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw images of these levels, ``[K, B, D]``."""
        u = torch.rand(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        x = self.mean + self.log_scale.exp() * u.logit(1e-6)
        return (255 * x).round().clamp(0, 255) / 255


def binary(x: Tensor) -> bool:
    r"""Whether all are 0 or 1, the roots of :math:`x - x^2`."""
    return torch.addcmul(x, x, x, value=-1).abs_().sum().item() == 0


def check_pixels(x: Tensor, output: Tensor) -> None:
    """Raise InputError unless ``x`` has as many pixels as the decoder's output: one alone would fit all of them."""
    if not x.is_floating_point():
        raise InputError(f"pixels must be floating-point numbers, but x is {x.dtype}: use x.to({output.dtype})")
    if x.shape[-1] != output.shape[-1]:
        raise InputError(
            f"the decoder makes {output.shape[-1]} pixels, but x has {x.shape[-1]}: build the model with "
            f"data_dim={x.shape[-1]}, or give it observations [B, {output.shape[-1]}]"
        )
