r"""The engine: a step's gradient by any estimator, for a model of ours or of yours.

An estimator is a loss (:mod:`vaelib.estimators`), so that there is little left to do: :func:`backward` is what training
calls, :func:`loss` what a plain PyTorch loop of your own does, :func:`reference` the form that every estimator is held
to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vaelib import estimators
from vaelib.errors import InputError
from vaelib.estimators import Estimator
from vaelib.estimators.base import check_observations
from vaelib.posteriors import Latent, as_posterior


def backward(estimator: str | Estimator, joint: Callable[..., Tensor], q: Any, x: Tensor, eps: Latent | None) -> Tensor:
    r"""Add the estimator's gradient of ``-bound.mean()`` to ``.grad`` and return the bound, ``[B]``.

    One pass through the model and one back, whatever the estimator. Parts that are frozen get none; if all are, there
    is nothing to add. Introduced in book/02-score-and-path.ipynb.

    Parameters
    ----------
    estimator
        one of :data:`vaelib.estimators.ESTIMATORS`, its name, or your own.
    joint
        called as ``joint(x, z)``, returns :math:`\log p_\theta(x, z)`, ``[K, B]``.
    q
        the posterior of ``x``, ``encoder(x)`` (see :mod:`vaelib.posteriors`).
    x
        observations, ``[B, ...]``.
    eps
        noise, ``[K, B, D]`` or one such tensor a stochastic layer: ``q.noise(k, generator)``; None for an estimator
        without draws.

    Raises
    ------
    InputError
        as :meth:`vaelib.estimators.Estimator.loss`.
    """
    loss = estimators.get(estimator).loss(joint, q, x, eps)
    if loss.requires_grad:
        loss.backward(torch.full_like(loss, 1 / len(loss)))  # as loss.mean().backward(), with one step less
    return -loss.detach()


def reference(
    estimator: str | Estimator, joint: Callable[..., Tensor], q: Any, x: Tensor, eps: Latent | None
) -> Tensor:
    r"""Return ``-bound``, ``[B]``, with the three channels of the tableau one below the other as its gradient.

    Theta alone, phi through the sample alone, phi through the density alone. Two decoder passes and three of q, hence
    slower than :meth:`vaelib.estimators.Estimator.loss`, which gives the same and is tested against it. Parameters as
    for :func:`backward`. Introduced in book/02-score-and-path.ipynb.
    """
    return estimators.get(estimator).reference_loss(joint, q, x, eps)


def loss(
    name: str | Estimator,
    log_joint: Callable[[Tensor, Latent], Tensor],
    q: Any,
    x: Tensor,
    k: int = 1,
    generator: torch.Generator | None = None,
    eps: Latent | None = None,
) -> Tensor:
    r"""Return the loss of an estimator for each observation, ``[B]``: for a plain PyTorch loop of your own.

    ``vaelib.loss("iwae-dreg", log_joint, encoder(x), x, k=5).mean().backward()`` is a step's gradient. The value is
    minus the bound, and the gradient is the estimator's; the value of another expression of the same bound would have
    another gradient. A conditional model is a ``log_joint`` that closes over its condition. A weight :math:`\beta` on
    the KL is a likelihood to the power :math:`1/\beta`: for an estimator of the ELBO,

    .. math:: \EE_q \log p(x \mid z) - \beta\,\mathrm{KL}(q \,\|\, p(z))
        = \beta\, \EE_q\big[\tfrac1\beta \log p(x \mid z) + \log p(z) - \log q(z \mid x)\big]

    so ``beta * vaelib.loss(name, lambda x, z: log_likelihood(x, z) / beta + log_prior(z), q, x)``. Under
    ``torch.autocast`` the networks of ``log_joint`` run in its dtype, and q's density in that of its numbers; both
    densities must come in float32 at least, and an estimator that asks for a part of ``log_joint`` is refused.

    Parameters
    ----------
    name
        of an estimator, also as the field calls it ("stl", "dreg", "reinforce"), or an estimator.
    log_joint
        any function ``log_joint(x, z)`` that returns :math:`\log p_\theta(x, z)`, ``[K, B]``, for ``z`` ``[K, B, D]``.
    q
        the posterior of ``x``: one of :mod:`vaelib.posteriors`, of the families of ``torch.distributions`` that
        :func:`vaelib.posteriors.as_posterior` lists, or a flow of zuko.
    x
        observations, ``[B, ...]``.
    k
        draws of each.
    generator
        draws the noise; torch's own if not given.
    eps
        the noise, in the place of ``k`` and ``generator``.

    Raises
    ------
    InputError
        as :meth:`vaelib.estimators.Estimator.loss`.
    """
    estimator, q = estimators.get(name), as_posterior(q)
    check_observations(x)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        log_joint = InAutocast(log_joint, torch.autocast(kind, torch.get_autocast_dtype(kind)))
    with torch.autocast(kind, enabled=False):
        return estimator.loss(log_joint, q, x, q.noise(k, generator) if eps is None else eps)


@dataclass(frozen=True)
class InAutocast:
    """A joint density that runs in a dtype of autocast; an estimator that asks for a part of it is told of that."""

    log_joint: Callable[[Tensor, Latent], Tensor]
    context: torch.autocast

    def __call__(self, x: Tensor, z: Latent) -> Tensor:
        """Return log p(x, z), ``[K, B]``."""
        return self.context(self.log_joint)(x, z)

    def __getattr__(self, part: str) -> Any:
        raise InputError(
            f"under torch.autocast a joint density is taken as a whole, but this estimator asks for its part '{part}': "
            "leave autocast for it (with torch.autocast(..., enabled=False), and q made of .float() numbers)"
        )


def gradient(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Return the gradient of a number in each leaf, 0 where there is none."""
    if not (leaves and value.requires_grad):
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(value, leaves, materialize_grads=True))


class Objective(nn.Module):
    """An estimator's loss as a module of its two networks, for ``torch.func.functional_call``.

    ``functional_call(Objective(estimator, joint, encoder), parameters, (x, eps))`` is the loss at other parameters.
    Introduced in book/02-score-and-path.ipynb.
    """

    def __init__(self, estimator: Estimator, joint: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.estimator, self.joint, self.encoder = estimator, joint, encoder

    def forward(self, x: Tensor, eps: Latent | None) -> Tensor:
        """Return the loss, ``[B]``."""
        return self.estimator.loss(self.joint, self.encoder(x), x, eps)
