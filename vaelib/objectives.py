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
from vaelib.estimators import Estimator, LossEstimator
from vaelib.posteriors import Latent, Mixture, map_latent, stop_gradient


def backward(
    estimator: Estimator | LossEstimator, joint: nn.Module, encoder: nn.Module, x: Tensor, eps: Latent
) -> Tensor:
    r"""Add the estimator's gradient of ``-bound.mean()`` to ``.grad`` and return the bound, ``[B]``.

    One pass through the model and one back. A row with a path evaluates :math:`\log w` with q stopped and goes back
    from it with weight :math:`a_k`: that is the theta channel, and :math:`a_k\, \partial_z \log w_k` arrives at the
    sample, where it is scaled by :math:`b_k / a_k` on its way to the encoder. The score channel is :math:`\log q` at a
    stopped sample with weight :math:`c_k`. A row without a path, or one that is what automatic differentiation gives
    anyway (b = a = -c), has nothing to stop in q. Introduced in book/02-score-and-path.ipynb.

    Parameters
    ----------
    estimator
        a row of the tableau, :data:`vaelib.estimators.ESTIMATORS`, or one beside it, such as those of
        :data:`vaelib.discrete.ESTIMATORS`.
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
        if the row is not defined for this K, if it needs a sample that is differentiable in phi and the posterior's
        is not, or if the joint density does not have the shape ``[K, B]``.
    """
    posterior = encoder(x)
    if isinstance(estimator, LossEstimator):
        loss = _loss(estimator, joint, posterior, x, eps)
        loss.mean().backward()
        return -loss.detach()
    if isinstance(posterior, Mixture):
        bound = mixture_bound(estimator, joint, posterior, x, eps)
        (-bound.mean()).backward()
        return bound.detach()
    z = posterior.sample(eps)
    if estimator.reparameterised:
        check_path(estimator, z)
    if estimator.automatic:
        seen, density = z, posterior
    elif estimator.reparameterised:
        seen, density = map_latent(lambda layer: layer.view_as(layer), z), posterior.stop_gradient()
    else:
        seen, density = map_latent(Tensor.detach, z), posterior
    log_p = log_joint(joint, x, seen)
    estimator.check(len(log_p))
    log_q = density.log_prob(seen)
    log_w = (log_p - log_q).detach()
    a, b, c = estimator.rule(log_w)

    roots = [(log_p, a), (log_q, c if density is posterior else -a)]
    if density is not posterior:
        if b is not a:
            ratio = (b / a).nan_to_num(0).unsqueeze(-1)  # a weight that underflowed to 0 has b = 0 too
            for layer in _layers(seen):
                if layer.requires_grad:  # one of two layers may be frozen
                    layer.register_hook(lambda gradient: ratio * gradient)
        if c is not None:
            roots.append((posterior.log_prob(map_latent(Tensor.detach, z)), c))
    roots = [(root, weight / -len(x)) for root, weight in roots if root.requires_grad]
    torch.autograd.backward(*zip(*roots, strict=True))
    return estimator.value(log_w)


def surrogate(
    estimator: Estimator | LossEstimator, joint: nn.Module, encoder: nn.Module, x: Tensor, eps: Latent
) -> Tensor:
    r"""Return ``-bound``, ``[B]``, as a function whose gradient is the estimator.

    Each line is a channel of the tableau: theta alone, phi through the density alone, phi through the sample alone.
    Two decoder passes and three of q, hence slower than :func:`backward`, but without state: under
    ``torch.func.functional_call`` it can be mapped (``vmap``) and differentiated (``grad``), which gives the
    gradient of every single draw. Parameters as for :func:`backward`. Introduced in book/02-score-and-path.ipynb.
    """
    posterior = encoder(x)
    if isinstance(estimator, LossEstimator):
        return _loss(estimator, joint, posterior, x, eps)
    if isinstance(posterior, Mixture):
        return -mixture_bound(estimator, joint, posterior, x, eps)
    z = posterior.sample(eps)
    z_stopped = map_latent(Tensor.detach, z)

    theta = log_joint(joint, x, z_stopped)
    estimator.check(len(theta))
    score = posterior.log_prob(z_stopped)
    if score.requires_grad and estimator.reparameterised:
        check_path(estimator, z)
    path = stop_gradient(joint)(x, z) - posterior.stop_gradient().log_prob(z)

    log_w = (theta - score).detach()
    a, b, c = estimator.weights(log_w)
    total = (a * theta + b * path + c * score).sum(0)
    return -(estimator.value(log_w) + total - total.detach())


def log_joint(joint: nn.Module, x: Tensor, z: Latent) -> Tensor:
    """Return ``joint(x, z)``, or raise InputError if it is not of the shape ``[K, B]``."""
    log_p = joint(x, z)
    expected = (_layers(z)[0].shape[0], x.shape[0])
    if log_p.shape != expected:
        raise InputError(
            f"joint(x, z) must return log p(x, z) of the shape [K, B] = {list(expected)}, one value for each draw and "
            f"observation, but returned {list(log_p.shape)}; see that it sums over the last axis"
        )
    return log_p


MIXTURE_ROWS = ("elbo-total", "elbo-path", "iwae-total", "iwae-path")
"""The rows that a mixture posterior can be trained with: those that differentiate log w as one function."""


def mixture_bound(estimator: Estimator, joint: nn.Module, posterior: Mixture, x: Tensor, eps: Tensor) -> Tensor:
    r"""Return the bound, ``[B]``, for a mixture posterior, as a function whose gradient is the estimator.

    With K draws, K / C from each component, and :math:`s_k = C \pi_{c(k)}` the share of a draw,

    .. math:: \mathcal L = \tfrac1K \sum_k s_k \log w_k \qquad\text{or}\qquad \log \tfrac1K \sum_k s_k w_k,
        \qquad w_k = \frac{p(x, z_k)}{\sum_c \pi_c q_c(z_k \mid x)}

    (algorithm 3 of "Sticking the Landing"; Morningstar et al. 2021 for the second, whose expectation is at most
    log p(x) too). The path rows stop the mixture in the denominator, weights and all; the shares stay live in all
    rows and give the weights their gradient. Automatic differentiation needs one pass through the decoder here, and
    :func:`backward` and :func:`surrogate` both call this. Introduced in book/05-mixtures-and-iwae.ipynb.

    Raises
    ------
    InputError
        for a row that is not in :data:`MIXTURE_ROWS`.
    """
    if estimator.name not in MIXTURE_ROWS:
        raise InputError(
            f"estimator '{estimator.name}' weighs path and score by draws of one q, but a mixture is drawn from "
            f"component by component: use one of {', '.join(MIXTURE_ROWS)}"
        )
    z = posterior.sample(eps)
    if any(q.log_prob(z).requires_grad for q in posterior.components):
        check_path(estimator, z)
    log_p = log_joint(joint, x, z)
    estimator.check(len(log_p))
    density = posterior if estimator.name.endswith("total") else posterior.stop_gradient()
    log_w = log_p - density.log_prob(z)
    log_share = posterior.log_share(len(eps))
    if estimator.bound == "elbo":
        return BOUNDS["elbo"](log_share.exp() * log_w)
    return BOUNDS["iwae"](log_share + log_w)


class Objective(nn.Module):
    """:func:`surrogate` as a module of its two networks, for ``torch.func.functional_call``.

    ``functional_call(Objective(estimator, joint, encoder), parameters, (x, eps))`` is the surrogate at other
    parameters. Introduced in book/02-score-and-path.ipynb.
    """

    def __init__(self, estimator: Estimator | LossEstimator, joint: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.estimator, self.joint, self.encoder = estimator, joint, encoder

    def forward(self, x: Tensor, eps: Latent) -> Tensor:
        """Return the surrogate, ``[B]``."""
        return surrogate(self.estimator, self.joint, self.encoder, x, eps)


def _loss(estimator: LossEstimator, joint: nn.Module, posterior, x: Tensor, eps: Latent | None) -> Tensor:
    if eps is not None:
        estimator.check(_layers(eps)[0].shape[0])
    return estimator.loss(joint, posterior, x, eps)


def _layers(z: Latent) -> tuple[Tensor, ...]:
    return z if isinstance(z, tuple) else (z,)


def check_path(estimator: Estimator, z: Latent) -> None:
    """Raise InputError if a row with a path has a sample ``z`` that does not move with the encoder's parameters."""
    if not any(layer.requires_grad for layer in _layers(z)):
        raise InputError(
            f"estimator '{estimator.name}' is reparameterised: it needs a sample that moves with the encoder's "
            "parameters, but this one has no gradient (a discrete posterior, or an encoder that is frozen); use a row "
            "without the path channel, such as elbo-score-loo, iwae-vimco or rws"
        )
