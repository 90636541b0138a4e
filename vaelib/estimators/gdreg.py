r"""Generalised doubly reparameterised gradients: a second path for the parameters of a conditional prior.

DReG turns the score of q into a path. With two stochastic layers the model has a score of the same kind, that of the
conditional prior :math:`p_\theta(z_1 \mid z_2)`, whose samples would be :math:`z_1 = T_\theta(e, z_2)`. The draws come
from q and not from that prior, which costs a change of measure (Bauer and Mnih 2021): for
:math:`e = T_\theta^{-1}(z_1)` held constant,

.. math:: \mathbb E_q[g\, \partial_\theta \log p_\theta(z_1 \mid z_2)]
    = \mathbb E_q\big[(\partial_{z_1} g + g\, \partial_{z_1} \log \tfrac{q}{p_\theta(z_1 \mid z_2)})\,
    \partial_\theta T_\theta(e, z_2)\big].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vaelib.bounds import check_form
from vaelib.errors import InputError
from vaelib.estimators.base import LossEstimator
from vaelib.estimators.joint import log_joint, log_weight
from vaelib.estimators.tableau import Row
from vaelib.posteriors import Latent, Posterior, map_latent, stop_gradient, tracing

ROWS = ("elbo-path", "iwae-dreg")


def gdreg(row: Row) -> LossEstimator:
    r"""Return a row with GDReG for the parameters of the conditional prior of a model of two stochastic layers.

    With :math:`g = a_k` the identity above collapses into the row's own weights a and b,

    .. math:: \sum_k \big(a_k\, \partial_{z_1} \log p(x \mid z_{1k}) - b_k\, \partial_{z_1} \log w_k\big)\,
        \partial_\theta T_\theta(e_k, z_{2k}),

    where the plain theta channel has :math:`a_k\, \partial_\theta \log p_\theta(z_{1k} \mid z_{2k})`. Decoder and
    encoder get what the row gives them. The joint must show its parts, as :class:`vaelib.models.HierarchicalJoint`
    does: ``priors`` (one module, which returns a Gaussian) and ``log_likelihood``. Introduced in
    book/06-mixtures-and-iwae.ipynb.

    Parameters
    ----------
    row
        'elbo-path' or 'iwae-dreg': the rows whose b already is the path weight of a doubly reparameterised gradient.

    Raises
    ------
    InputError
        for another row; when it is used, for a model of another depth.
    """
    if row.name not in ROWS:
        raise InputError(f"GDReG goes with the rows {' and '.join(ROWS)}, but the estimator is '{row.name}'")

    def loss(joint: Callable[..., Tensor], q: Posterior, x: Tensor, eps: Latent) -> Tensor:
        if len(getattr(joint, "priors", ())) != 1:
            layers = f" with {len(joint.priors) + 1}" if hasattr(joint, "priors") else ""
            raise InputError(
                "GDReG is for the one conditional prior of a HierarchicalJoint with two stochastic layers, but the "
                f"joint is a {type(joint).__name__}{layers}: use the row '{row.name}' itself"
            )
        still, held = stop_gradient(joint), q.stop_gradient()
        z1, z2 = map_latent(Tensor.detach, held.sample(eps))
        prior = joint.priors[0](z2)
        check_form(prior, "whiten")
        e = prior.whiten(z1 - prior.mean).detach()
        shift = prior.sample(e)
        moved = z1 + (shift - shift.detach()), z2  # the same point to the bit, now a function of the prior's parameters
        log_w = log_weight(still, x, moved, held.log_prob_of_sample(moved, eps))
        if not tracing() and log_joint(still, x, (z1[:1], z2[:1])).requires_grad:  # one draw tells
            raise InputError(
                f"GDReG needs a joint whose parameters can be held constant, but a function inside this "
                f"{type(joint).__name__} closes over live ones: make them parameters of a module that is called"
            )
        plain = row.loss(joint, q, x, eps)
        score = prior.log_prob(z1)  # what the row has for the prior, taken back
        if not tracing() and not torch.allclose(plain, -row.value(log_w), rtol=1e-3, atol=1e-3, equal_nan=True):
            raise InputError(
                "GDReG evaluates the joint more than once, and this one is another each time, since a random layer "
                "such as dropout is active in it: call .eval() on that network, or leave the layer out"
            )
        a, b, _ = row.weights(log_w)
        total = (a * (still.log_likelihood(x, moved) - score) - b * log_w).sum(0)
        return plain - (total - total.detach())

    name = f"{row.name}-gdreg"
    return LossEstimator(name, row.bound, row.target, row.least_k, "bauer2021", loss, "With a path for the prior too.")
