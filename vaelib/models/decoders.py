r"""Decoders p(x given z), with their expectations in closed form where they have one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vaelib.estimators.silent import covariances_of_cosines, expected_cosines, expected_log_prob
from vaelib.layers import linear, tanh_layers
from vaelib.likelihoods import Bernoulli, Gaussian
from vaelib.posteriors import LOG_2PI, DiagonalGaussian, FullGaussian


class BernoulliMLP(nn.Module):
    r"""The decoder: tanh layers, then a logit for each pixel.

    Parameters
    ----------
    sizes
        the widths of latent and hidden layers.
    data_dim
        the number of pixels.
    mean
        the mean image of the training data, ``[X]``; if given, the output bias starts at its logit, which is worth
        about a nat at the end of a long training (Burda et al.'s code does it, their paper does not say so).
    """

    def __init__(
        self, sizes: Sequence[int], data_dim: int, mean: Tensor | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.hidden = tanh_layers(sizes, generator)
        self.logits = linear(sizes[-1], data_dim, generator)
        if mean is not None:
            with torch.no_grad():
                self.logits.bias.copy_(mean.clamp(0.001, 0.999).logit())

    def forward(self, z: Tensor) -> Bernoulli:
        """Return p(x given z) for ``z`` ``[K, B, D]``."""
        return Bernoulli(self.logits(self.hidden(z)))


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


class LinearDecoder(nn.Module):
    r"""The decoder :math:`p(x \mid z) = \mathcal N(W z + b, \operatorname{diag} s^2)`, by draws and in closed form.

    Introduced in book/03-silent-gradients.ipynb.

    Parameters
    ----------
    weight, bias, log_std
        W ``[X, D]``, b ``[X]`` and :math:`\log s`, ``[X]`` or ``[]`` (one scale for all pixels).
    """

    def __init__(self, weight: Tensor, bias: Tensor, log_std: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self.log_std = nn.Parameter(log_std)

    def forward(self, z: Tensor) -> Gaussian:
        """Return p(x given z) for ``z`` ``[K, B, D]``."""
        return Gaussian(z @ self.weight.mT + self.bias, self.log_std)

    def expected_log_likelihood(self, x: Tensor, q) -> Tensor:
        """Return :func:`expected_log_prob`, ``[B]``."""
        return expected_log_prob(x, q, self.weight, self.bias, self.log_std)


class CosineDecoder(nn.Module):
    r"""The decoder :math:`\mathcal N(A \cos(W z + c) + b, \operatorname{diag} s^2)`: nonlinear in z, and silent.

    It is linear in features whose means and covariances are known under a Gaussian
    (:func:`vaelib.estimators.silent.covariances_of_cosines`). So the closed form costs :math:`J^2` cosines an
    observation for J features, where a draw costs J. Introduced in book/03-silent-gradients.ipynb.

    Parameters
    ----------
    frequency, phase
        W ``[J, D]`` and c ``[J]``.
    weight, bias, log_std
        A ``[X, J]``, b ``[X]`` and :math:`\log s`, ``[X]`` or ``[]`` (one scale for all pixels).
    """

    def __init__(self, frequency: Tensor, phase: Tensor, weight: Tensor, bias: Tensor, log_std: Tensor) -> None:
        super().__init__()
        self.frequency, self.phase = nn.Parameter(frequency), nn.Parameter(phase)
        self.weight, self.bias, self.log_std = nn.Parameter(weight), nn.Parameter(bias), nn.Parameter(log_std)

    def forward(self, z: Tensor) -> Gaussian:
        """Return p(x given z) for ``z`` ``[K, B, D]``."""
        return Gaussian((z @ self.frequency.mT + self.phase).cos() @ self.weight.mT + self.bias, self.log_std)

    def expected_log_likelihood(self, x: Tensor, q: DiagonalGaussian | FullGaussian) -> Tensor:
        r"""Return the exact :math:`\EE_q[\log p(x \mid z)]`, ``[B]``.

        With features f and whitened :math:`r = (x - b) / s`, :math:`A' = A / s`, the expected square error is
        :math:`|r - A' \EE[f]|^2 + \sum_{ij} (A'^\top A')_{ij} \operatorname{Cov}[f_i, f_j]`, where nothing cancels
        (:func:`vaelib.estimators.silent.covariances_of_cosines`).
        """
        scale = (-self.log_std).exp().expand_as(self.bias)
        weight = self.weight * scale.unsqueeze(-1)
        residual = (x - self.bias) * scale - expected_cosines(q, self.frequency, self.phase) @ weight.mT
        i, j = torch.triu_indices(len(self.phase), len(self.phase), device=x.device)
        gram = (weight.mT @ weight)[i, j] * torch.where(i == j, 1.0, 2.0).to(x)  # a pair stands for both orders
        square = residual.square().sum(-1) + covariances_of_cosines(q, self.frequency, self.phase, i, j) @ gram
        return -0.5 * square + scale.log().sum() - 0.5 * len(self.bias) * LOG_2PI
