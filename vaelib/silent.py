r"""Silent gradients: the ELBO in closed form, and so its gradient without any variance over z.

For a decoder that is linear in z and Gaussian, :math:`p(x \mid z) = \mathcal N(W z + b, \operatorname{diag} s^2)`, the
log-likelihood is quadratic in z, so that its expectation needs two moments of q and no draw:

.. math:: \mathbb E_q[\log p(x \mid z)] = -\tfrac12 \sum_d \Big[ \log 2\pi s_d^2
    + \frac{(x_d - b_d - \mathbb E_q[w_d^\top z])^2 + \operatorname{Var}_q[w_d^\top z]}{s_d^2} \Big]

(Shao et al. 2025 call the gradient of it silent.) Every posterior with a method ``linear_moments(weight)`` serves:
Gaussians, bits, one-hot choices, and mixtures of Gaussians. What varies still is the minibatch; and what is exact is
the ELBO of *this* decoder: beside a nonlinear one it is a direction to start in, and biased.
"""

from __future__ import annotations

from torch import Tensor, nn

from vaelib.errors import InputError
from vaelib.estimators import LossEstimator
from vaelib.likelihoods import Gaussian
from vaelib.posteriors import LOG_2PI, DiagonalGaussian, FullGaussian


def expected_square_error(x: Tensor, q, weight: Tensor, bias: Tensor) -> Tensor:
    r"""Return what a pixel is missed by, squared and averaged over z, ``[B, X]``.

    .. math:: \mathbb E_q[(x_d - b_d - w_d^\top z)^2]
        = (x_d - b_d - \mathbb E_q[w_d^\top z])^2 + \operatorname{Var}_q[w_d^\top z]

    Parameters
    ----------
    x
        observations, ``[B, X]``.
    q
        a posterior with the method ``linear_moments``.
    weight, bias
        W ``[X, D]`` and b ``[X]``.

    Raises
    ------
    InputError
        if the posterior does not know its moments, or the sizes do not go together.
    """
    mean, variance = linear_moments(q, weight)
    if mean.shape != x.shape:
        raise InputError(
            f"decoder and posterior make images of the shape [B, X] = {list(mean.shape)}, but x is {list(x.shape)}"
        )
    return (x - bias - mean).square() + variance


def expected_log_prob(x: Tensor, q, weight: Tensor, bias: Tensor, log_std: Tensor) -> Tensor:
    r"""Return :math:`\mathbb E_q[\log \mathcal N(x; W z + b, \operatorname{diag} s^2)]`, ``[B]``.

    It is exact, by the equation at the top of this module, and differentiable in all arguments. The scale may be held
    fixed, learned as a parameter, or profiled out (:func:`profiled_log_std`).

    Parameters
    ----------
    x, q, weight, bias
        as for :func:`expected_square_error`.
    log_std
        :math:`\log s`, ``[X]``, or ``[]`` for one scale of all pixels.

    Raises
    ------
    InputError
        as for :func:`expected_square_error`.
    """
    whitened = expected_square_error(x, q, weight, bias) * (-2 * log_std).exp()
    return -(0.5 * whitened + log_std + 0.5 * LOG_2PI).sum(-1)


def profiled_log_std(square_error: Tensor, shared: bool = True) -> Tensor:
    r"""Return the :math:`\log s` that is best for a batch, where :math:`s^2` is the mean of the square errors.

    With it the expected log-likelihood is :math:`-\tfrac X2 (\log 2\pi s^2 + 1)` on average. It is a maximum, so the
    gradient of the batch's mean is the same with and without the derivative of s. It is the best for the batch it was
    given: a minibatch's flatters, and the model's is that of all the data.

    Parameters
    ----------
    square_error
        what :func:`expected_square_error` returns, ``[B, X]``.
    shared
        one scale for all pixels, ``[]``; otherwise one each, ``[X]``.
    """
    return 0.5 * (square_error.mean() if shared else square_error.mean(0)).log()


def expected_log_prob_log_linear(
    x: Tensor,
    q: DiagonalGaussian | FullGaussian,
    weight: Tensor,
    bias: Tensor,
    scale_weight: Tensor,
    scale_bias: Tensor,
) -> Tensor:
    r"""Return :math:`\mathbb E_q[\log p(x \mid z)]`, ``[B]``, for a scale that depends on z.

    With :math:`s_d^2 = e^{a_d^\top z + c_d}` it is exact for a Gaussian q of mean m and covariance C. The logarithm
    :math:`\log s_d^2` is linear and has the mean :math:`a_d^\top m + c_d`; the exponential tilts the Gaussian to the mean
    m - C a:

    .. math:: \mathbb E_q[e^{-a^\top z} (r - w^\top z)^2]
        = e^{-a^\top m + \frac12 a^\top C a} \big[ (r - w^\top m + w^\top C a)^2 + w^\top C w \big], \qquad r = x - b

    The covariance :math:`w^\top C a` of two linear functions is had from the variances of their sum and difference.

    Parameters
    ----------
    x, weight, bias
        as for :func:`expected_square_error`.
    q
        a Gaussian posterior.
    scale_weight, scale_bias
        the rows :math:`a_d`, ``[X, D]``, and c ``[X]``.

    Raises
    ------
    InputError
        for a posterior that is not one Gaussian.
    """
    if not isinstance(q, DiagonalGaussian | FullGaussian):
        raise InputError(
            f"a scale that depends on z has a closed form for a Gaussian posterior, but this one is a "
            f"{type(q).__name__}: use DiagonalGaussian or FullGaussian, or a scale of its own (expected_log_prob)"
        )
    mean, variance = q.linear_moments(weight)
    log_scale, scale_variance = q.linear_moments(scale_weight)
    covariance = (q.linear_moments(weight + scale_weight)[1] - q.linear_moments(weight - scale_weight)[1]) / 4
    log_variance = log_scale + scale_bias  # of a pixel, averaged over z
    square = (x - bias - mean + covariance).square() + variance
    return -0.5 * (LOG_2PI + log_variance + (0.5 * scale_variance - log_variance).exp() * square).sum(-1)


class LinearDecoder(nn.Module):
    r"""The decoder :math:`p(x \mid z) = \mathcal N(W z + b, \operatorname{diag} s^2)`, by draws and in closed form.

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


def elbo(joint: nn.Module, x: Tensor, q) -> Tensor:
    r"""Return the ELBO :math:`\mathbb E_q[\log p(x \mid z)] - \mathrm{KL}(q \,\|\, p(z))` in closed form, ``[B]``.

    Parameters
    ----------
    joint
        a model with the method ``expected_log_likelihood(x, q)``, or whose ``decode`` has it, such as
        :class:`vaelib.models.LinearGaussian` or a joint made of a :class:`LinearDecoder`.
    x
        observations, ``[B, X]``.
    q
        a posterior of the same family as the prior.

    Raises
    ------
    InputError
        if the likelihood or the divergence has no closed form.
    """
    for part in (joint, getattr(joint, "decode", None)):
        if hasattr(part, "expected_log_likelihood"):
            return part.expected_log_likelihood(x, q) - divergence(joint, q)
    raise InputError(
        f"{type(getattr(joint, 'decode', joint)).__name__} has no closed form of E_q[log p(x given z)], which needs a "
        "log-likelihood quadratic in z: the log(1 + e^l) of Bernoulli pixels is not, nor is anything behind a hidden "
        "layer; estimate it with a row of the tableau such as elbo-path, or decode with a silent.LinearDecoder"
    )


def divergence(joint: nn.Module, q) -> Tensor:
    r"""Return :math:`\mathrm{KL}(q \,\|\, p(z))` to the model's prior in closed form, ``[B]``.

    The prior is ``joint.prior`` where there is one, a distribution like q; otherwise it is standard normal.

    Raises
    ------
    InputError
        if q is of another kind than the prior, or a mixture, whose divergence has no closed form.
    """
    prior = getattr(joint, "prior", None)
    families = (DiagonalGaussian, FullGaussian) if prior is None else (type(prior),)
    if not isinstance(q, families):
        known = " or ".join(family.__name__ for family in families)
        kind = "a standard normal" if prior is None else f"a {known}"
        raise InputError(
            f"the divergence of a {type(q).__name__} from {kind} prior has no closed form: use a posterior of the "
            f"class {known}, or a row of the tableau, which estimates the divergence from draws"
        )
    return q.kl() if prior is None else q.kl(prior)


def linear_moments(q, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance of W z under q, ``[B, X]`` each, or say why they are not to be had.

    Raises
    ------
    InputError
        if the posterior does not know its moments.
    """
    if not hasattr(q, "linear_moments"):
        raise InputError(
            f"a {type(q).__name__} does not know the mean and variance of W z (method linear_moments), of which the "
            "exact expectation is made: use a Gaussian, Bernoulli, categorical or mixture posterior, or a row of the "
            "tableau such as elbo-path, which only needs draws"
        )
    return q.linear_moments(weight)


def _loss(joint: nn.Module, q, x: Tensor, eps: Tensor | None) -> Tensor:
    return -elbo(joint, x, q)


ELBO = LossEstimator("elbo-silent", "elbo", "elbo", 1, "shao2025", _loss)
"""The silent gradient as an estimator, ``objectives.backward(silent.ELBO, joint, encoder, x, None)``: without noise."""
