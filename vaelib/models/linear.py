r"""The linear-Gaussian VAE, the book's running example: everything about it is known exactly.

.. math:: p(z) = \mathcal N(0, I), \qquad p(x \mid z) = \mathcal N(W z + b, \operatorname{diag} s^2)

Its marginal likelihood, its posterior and hence the gradients of its ELBO are closed forms, so that whatever an
estimator claims can be held against the truth.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vaelib.errors import InputError
from vaelib.models.decoders import LinearDecoder
from vaelib.models.joints import Joint
from vaelib.posteriors import LOG_2PI, DiagonalGaussian, FullGaussian


class LinearGaussian(Joint):
    r"""The joint density :math:`\log p(x, z)` of the linear-Gaussian model. Introduced in book/01-elbo-forms.ipynb.

    Parameters
    ----------
    weight, bias, log_std
        W ``[X, D]``, b ``[X]`` and :math:`\log s` ``[X]`` or ``[]`` (one scale for all pixels).
    """

    def __init__(self, weight: Tensor, bias: Tensor, log_std: Tensor) -> None:
        super().__init__(LinearDecoder(weight, bias, log_std))

    @property
    def weight(self) -> nn.Parameter:
        """W, ``[X, D]``."""
        return self.decode.weight

    @property
    def bias(self) -> nn.Parameter:
        """The mean b of x, ``[X]``."""
        return self.decode.bias

    @property
    def log_std(self) -> nn.Parameter:
        r""":math:`\log s`, ``[X]`` or ``[]``."""
        return self.decode.log_std

    def whitened(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return :math:`S^{-1/2} W`, :math:`S^{-1/2} (x - b)` and :math:`M = I + W^\top S^{-1} W`, in float64.

        With little noise the closed forms are small differences of large numbers, for which float32 has no digits.
        """
        weight, bias, log_std = self.weight.double(), self.bias.double(), self.log_std.double()
        whitened = weight * (-log_std).exp().unsqueeze(-1)
        identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        return whitened, (x.double() - bias) * (-log_std).exp(), identity + whitened.mT @ whitened

    def posterior(self, x: Tensor) -> FullGaussian:
        r"""Return the exact posterior :math:`\mathcal N(M^{-1} W^\top S^{-1} (x - b), M^{-1})`.

        Here :math:`S = \operatorname{diag} s^2` and :math:`M = I + W^\top S^{-1} W`; the covariance is the same for
        every x.
        """
        whitened, residual, precision = self.whitened(x)
        covariance = torch.linalg.inv(precision)
        scale_tril = torch.linalg.cholesky(covariance)
        return FullGaussian((residual @ whitened @ covariance).to(x.dtype), scale_tril.to(x.dtype))

    def log_marginal(self, x: Tensor) -> Tensor:
        r"""Return the exact :math:`\log p(x) = \log \mathcal N(x; b, W W^\top + \operatorname{diag} s^2)`, ``[B]``.

        Computed in the latent dimension (Woodbury), so it costs no more than the posterior.
        """
        whitened, residual, precision = self.whitened(x)
        factor = torch.linalg.cholesky(precision)
        projected = torch.linalg.solve_triangular(factor, (residual @ whitened).mT, upper=False)
        distance = residual.square().sum(-1) - projected.square().sum(0)
        log_det = 2 * factor.diagonal().log().sum() + 2 * self.log_std.double().expand(self.bias.shape).sum()
        return (-0.5 * (distance + log_det + x.shape[-1] * LOG_2PI)).to(x.dtype)


class LinearEncoder(nn.Module):
    r"""The encoder :math:`q(z \mid x) = \mathcal N(V x + v, \operatorname{diag} \sigma^2)`, one scale for all x.

    It contains the exact posterior of a :class:`LinearGaussian` whenever :math:`W^\top S^{-1} W` is diagonal.
    Introduced in book/01-elbo-forms.ipynb.

    Parameters
    ----------
    weight, bias, log_std
        V ``[D, X]``, v ``[D]`` and :math:`\log \sigma` ``[D]``.
    """

    def __init__(self, weight: Tensor, bias: Tensor, log_std: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self.log_std = nn.Parameter(log_std)

    def forward(self, x: Tensor) -> DiagonalGaussian:
        """Return q(z given x) for ``x`` ``[B, X]``."""
        mean = x @ self.weight.mT + self.bias
        return DiagonalGaussian(mean, self.log_std.expand_as(mean))


def ppca(x: Tensor, latent_dim: int) -> LinearGaussian:
    r"""Return the linear-Gaussian model of highest likelihood for the data ``x`` ``[N, X]``, in closed form.

    (Tipping and Bishop 1999.) With the eigenvalues :math:`\lambda_1 \ge \lambda_2 \ge \dots` and eigenvectors U of
    the sample covariance, :math:`b = \bar x`, :math:`s^2` is the mean of the eigenvalues left out and
    :math:`W = U (\Lambda - s^2 I)^{1/2}`. This choice of W makes the exact posterior's covariance diagonal.
    Introduced in book/01-elbo-forms.ipynb.

    The smallest eigenvalues are what counts, for which float32 has no digits: computed in float64.

    Raises
    ------
    InputError
        if ``latent_dim`` is not between 1 and X - 1, or explains the data without a rest.
    """
    if not 1 <= latent_dim < x.shape[1]:
        raise InputError(
            f"latent_dim must be between 1 and {x.shape[1] - 1} for data of {x.shape[1]} dimensions, but is "
            f"{latent_dim}"
        )
    mean = x.double().mean(0)
    centred = x.double() - mean
    eigenvalues, eigenvectors = torch.linalg.eigh(centred.mT @ centred / len(x))
    eigenvalues, eigenvectors = eigenvalues.flip(0), eigenvectors.flip(1)
    variance = eigenvalues[latent_dim:].mean()
    rounding = max(torch.finfo(mean.dtype).eps, torch.finfo(x.dtype).eps ** 2)  # here, and of the data themselves
    if not variance > x.shape[1] * rounding * eigenvalues[0]:
        raise InputError(
            f"{latent_dim} dimensions explain these {len(x)} observations without a rest, so that there is no noise "
            "to fit: take fewer dimensions, or more observations"
        )
    scale = (eigenvalues[:latent_dim] - variance).clamp_min(0).sqrt()
    parts = eigenvectors[:, :latent_dim] * scale, mean, 0.5 * variance.log()
    return LinearGaussian(*(part.to(x.dtype) for part in parts))


def exact_encoder(joint: LinearGaussian) -> LinearEncoder:
    r"""Return the linear encoder of the exact posterior; its factorised part, where the covariance is not diagonal.

    The mean is :math:`M^{-1} W^\top S^{-1} (x - b)`; the scale :math:`\sigma_d^2 = 1 / M_{dd}` is that of the
    factorised Gaussian closest to the posterior in :math:`\mathrm{KL}(q \,\|\, p)`, and exact if M is diagonal.
    Introduced in book/01-elbo-forms.ipynb.
    """
    with torch.no_grad():
        whitened, _, precision = joint.whitened(joint.bias)
        scaled = whitened * (-joint.log_std.double()).exp().unsqueeze(-1)  # S^(-1) W
        weight = torch.linalg.solve(precision, scaled.mT)
        parts = weight, -weight @ joint.bias.double(), -0.5 * precision.diagonal().log()
        return LinearEncoder(*(part.to(joint.bias.dtype) for part in parts))
