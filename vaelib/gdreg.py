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

from torch import Tensor, nn

from vaelib.errors import InputError
from vaelib.estimators import Estimator
from vaelib.models import HierarchicalJoint
from vaelib.objectives import surrogate as row_surrogate
from vaelib.posteriors import Latent, map_latent, stop_gradient

ROWS = ("elbo-path", "iwae-dreg")


def surrogate(estimator: Estimator, joint: HierarchicalJoint, encoder: nn.Module, x: Tensor, eps: Latent) -> Tensor:
    r"""Return ``-bound``, ``[B]``, whose gradient is the estimator's, with GDReG for the parameters of ``joint.prior``.

    With :math:`g = a_k` the identity above collapses into the row's own weights a and b,

    .. math:: \sum_k \big(a_k\, \partial_{z_1} \log p(x \mid z_{1k}) - b_k\, \partial_{z_1} \log w_k\big)\,
        \partial_\theta T_\theta(e_k, z_{2k}),

    where the plain theta channel has :math:`a_k\, \partial_\theta \log p_\theta(z_{1k} \mid z_{2k})`. Decoder and
    encoder get what :func:`vaelib.objectives.surrogate` gives them, and so is this a pure function. Introduced in
    book/05-mixtures-and-iwae.ipynb.

    Parameters
    ----------
    estimator
        'elbo-path' or 'iwae-dreg': the rows whose b already is the path weight of a doubly reparameterised gradient.
    joint
        a model of two stochastic layers whose prior is a diagonal Gaussian.
    encoder, x, eps
        as for :func:`vaelib.objectives.surrogate`; ``eps`` is a pair.

    Raises
    ------
    InputError
        for another row, or a model of one layer.
    """
    if estimator.name not in ROWS:
        raise InputError(f"GDReG goes with the rows {' and '.join(ROWS)}, but the estimator is '{estimator.name}'")
    if not isinstance(joint, HierarchicalJoint):
        raise InputError(
            f"GDReG is for the conditional prior of a HierarchicalJoint (two stochastic layers), but the joint is a "
            f"{type(joint).__name__}"
        )
    rest = row_surrogate(estimator, HierarchicalJoint(stop_gradient(joint.prior), joint.decode), encoder, x, eps)

    posterior = encoder(x).stop_gradient()
    z1, z2 = map_latent(Tensor.detach, posterior.sample(eps))
    prior = joint.prior(z2)
    e = ((z1 - prior.mean) * (-prior.log_std).exp()).detach()
    moved = prior.sample(e), z2  # the same point, now a function of the prior's parameters
    model = stop_gradient(joint)
    log_w = model(x, moved) - posterior.log_prob(moved)
    a, b, _ = estimator.weights(log_w.detach())
    total = (a * model.log_likelihood(x, moved) - b * log_w).sum(0)
    return rest - (total - total.detach())
