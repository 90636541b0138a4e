r"""The engine: one estimator's gradient for one batch, twice over.

:func:`backward` is what training calls: one pass through the decoder and one through the encoder, whatever the row.
:func:`surrogate` is the reference it is tested against: the three channels of the tableau written one below the
other, a pure function that ``torch.func`` can transform.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vaelib.bounds import BOUNDS
from vaelib.errors import InputError
from vaelib.estimators import Estimator
from vaelib.posteriors import Latent, map_latent, stop_gradient


def backward(estimator: Estimator, joint: nn.Module, encoder: nn.Module, x: Tensor, eps: Latent) -> Tensor:
    r"""Add the estimator's gradient of ``-bound.mean()`` to ``.grad`` and return the bound, ``[B]``.

    The sample is cut in two. The first leg goes back from :math:`a_k \log w_k`, with q stopped, through the decoder:
    it leaves the theta channel in the decoder's parameters and :math:`a_k\, \partial_z \log w_k` at the cut. The
    second leg goes back through the encoder, from z with that gradient times :math:`b_k / a_k`, and from
    :math:`\log q` with weight :math:`c_k`. Introduced in book/01-elbo-forms.ipynb.

    Parameters
    ----------
    estimator
        a row of the tableau, :data:`vaelib.estimators.ESTIMATORS`.
    joint
        called as ``joint(x, z)``, returns :math:`\log p_\theta(x, z)`, ``[K, B]``.
    encoder
        called as ``encoder(x)``, returns a posterior (see :mod:`vaelib.posteriors`).
    x
        observations, ``[B, ...]``.
    eps
        noise, ``[K, B, D]`` or one such tensor a stochastic layer.

    Raises
    ------
    InputError
        if the row is not defined for this K, or the joint density does not have the shape ``[K, B]``.
    """
    posterior = encoder(x)
    z = posterior.sample(eps)
    cut = map_latent(lambda layer: layer.detach().requires_grad_(), z)
    log_p = joint(x, cut)
    _check(estimator, log_p, x, eps)
    log_w = log_p - posterior.stop_gradient().log_prob(cut)
    a, b, c = estimator.rule(log_w.detach())
    batch = x.shape[0]

    log_w.backward(a / -batch)

    roots, gradients = [], []
    if b is not None:
        ratio = torch.where(a > 0, b / a, 0).unsqueeze(-1)  # a weight that underflowed to 0 has b = 0 too
        roots += _layers(z)
        gradients += [ratio * layer.grad for layer in _layers(cut)]
    if c is not None:
        roots.append(posterior.log_prob(map_latent(Tensor.detach, z)))
        gradients.append(c / -batch)
    torch.autograd.backward(roots, gradients)
    return BOUNDS[estimator.bound](log_w.detach())


def surrogate(estimator: Estimator, joint: nn.Module, encoder: nn.Module, x: Tensor, eps: Latent) -> Tensor:
    r"""Return ``-bound``, ``[B]``, as a function whose gradient is the estimator.

    Each line is a channel of the tableau: theta alone, phi through the density alone, phi through the sample alone.
    Two decoder passes and three of q, hence slower than :func:`backward`, but without state: under
    ``torch.func.functional_call`` it can be mapped (``vmap``) and differentiated (``grad``), which gives the
    gradient of every single draw. Parameters as for :func:`backward`. Introduced in book/01-elbo-forms.ipynb.
    """
    posterior = encoder(x)
    z = posterior.sample(eps)
    z_stopped = map_latent(Tensor.detach, z)

    theta = joint(x, z_stopped)
    _check(estimator, theta, x, eps)
    score = posterior.log_prob(z_stopped)
    path = stop_gradient(joint)(x, z) - posterior.stop_gradient().log_prob(z)

    log_w = (theta - score).detach()
    a, b, c = estimator.weights(log_w)
    total = (a * theta + b * path + c * score).sum(0)
    return -(BOUNDS[estimator.bound](log_w) + total - total.detach())


class Objective(nn.Module):
    """:func:`surrogate` as a module of its two networks, for ``torch.func.functional_call``.

    ``functional_call(Objective(estimator, joint, encoder), parameters, (x, eps))`` is the surrogate at other
    parameters. Introduced in book/01-elbo-forms.ipynb.
    """

    def __init__(self, estimator: Estimator, joint: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.estimator, self.joint, self.encoder = estimator, joint, encoder

    def forward(self, x: Tensor, eps: Latent) -> Tensor:
        """Return the surrogate, ``[B]``."""
        return surrogate(self.estimator, self.joint, self.encoder, x, eps)


def _layers(z: Latent) -> tuple[Tensor, ...]:
    return z if isinstance(z, tuple) else (z,)


def _check(estimator: Estimator, log_p: Tensor, x: Tensor, eps: Latent) -> None:
    expected = (_layers(eps)[0].shape[0], x.shape[0])
    if log_p.shape != expected:
        raise InputError(
            f"joint(x, z) must return log p(x, z) of the shape [K, B] = {list(expected)}, one value for each draw and "
            f"observation, but returned {list(log_p.shape)}; see that it sums over the last axis"
        )
    estimator.check(log_p.shape[0])
