r"""Silent gradients: the ELBO in closed form, and so its gradient without any variance over z.

For a decoder that is linear in z and Gaussian, :math:`p(x \mid z) = \mathcal N(W z + b, \operatorname{diag} s^2)`, the
log-likelihood is quadratic in z, so that its expectation needs two moments of q and no draw:

.. math:: \mathbb E_q[\log p(x \mid z)] = -\tfrac12 \sum_d \Big[ \log 2\pi s_d^2
    + \frac{(x_d - b_d - \mathbb E_q[w_d^\top z])^2 + \operatorname{Var}_q[w_d^\top z]}{s_d^2} \Big]

(Shao et al. 2025 call the gradient of it silent.) Every posterior with a method ``linear_moments(weight)`` serves:
Gaussians, bits, one-hot choices, and mixtures of Gaussians. What varies still is the minibatch; and what is exact is
the ELBO of *this* decoder: beside a nonlinear one it is a direction to start in, and biased. It can be

* a guide whose weight goes to 0 (:func:`annealed`);
* a control variate, which leaves the nonlinear decoder's gradient unbiased at any time (:func:`controlled`);
* the gradient of a decoder that is nonlinear itself, if its features have known moments
  (:class:`vaelib.models.CosineDecoder`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jvp

from vaelib.bounds import check_form, divergence
from vaelib.errors import InputError, between
from vaelib.estimators.base import Estimator, LossEstimator
from vaelib.posteriors import (
    LOG_2PI,
    DiagonalGaussian,
    Discrete,
    FullGaussian,
    Mixture,
    Posterior,
    as_posterior,
    functions_in,
    is_ours,
    remade,
    stop_gradient,
    tracing,
)


def expected_square_error(x: Tensor, q, weight: Tensor, bias: Tensor) -> Tensor:
    r"""Return what a pixel is missed by, squared and averaged over z, ``[B, X]``.

    Introduced in book/03-silent-gradients.ipynb.

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
    q = as_posterior(q)
    if not hasattr(q, "linear_moments"):
        raise InputError(
            f"a {type(q).__name__} does not know the mean and variance of W z (method linear_moments), of which the "
            "exact expectation is made: use a Gaussian, Bernoulli, categorical or mixture posterior, or a row of the "
            "tableau such as elbo-path, which only needs draws"
        )
    mean, variance = q.linear_moments(weight)
    if mean.shape != x.shape:
        raise InputError(
            f"decoder and posterior make images of the shape [B, X] = {list(mean.shape)}, but x is {list(x.shape)}"
        )
    return (x - bias - mean).square() + variance


def expected_log_prob(x: Tensor, q, weight: Tensor, bias: Tensor, log_std: Tensor) -> Tensor:
    r"""Return :math:`\mathbb E_q[\log \mathcal N(x; W z + b, \operatorname{diag} s^2)]`, ``[B]``.

    It is exact, by the equation at the top of this module, and differentiable in all arguments. The scale may be held
    fixed, learned as a parameter, or profiled out (:func:`profiled_log_std`).
    Introduced in book/03-silent-gradients.ipynb.

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
    Introduced in book/03-silent-gradients.ipynb.

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
    :math:`\log s_d^2` is linear and has the mean :math:`a_d^\top m + c_d`; the exponential tilts the Gaussian to the
    mean m - C a:

    .. math:: \mathbb E_q[e^{-a^\top z} (r - w^\top z)^2]
        = e^{-a^\top m + \frac12 a^\top C a} \big[ (r - w^\top m + w^\top C a)^2 + w^\top C w \big], \qquad r = x - b

    The covariance :math:`w^\top C a` of two linear functions is had from the variances of their sum and difference.
    Introduced in book/03-silent-gradients.ipynb.

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
    _one_gaussian(q, "a scale that depends on z", "a scale of its own (expected_log_prob)")
    mean, variance = q.linear_moments(weight)
    log_scale, scale_variance = q.linear_moments(scale_weight)
    covariance = (q.linear_moments(weight + scale_weight)[1] - q.linear_moments(weight - scale_weight)[1]) / 4
    log_variance = log_scale + scale_bias  # of a pixel, averaged over z
    square = (x - bias - mean + covariance).square() + variance
    return -0.5 * (LOG_2PI + log_variance + (0.5 * scale_variance - log_variance).exp() * square).sum(-1)


def expected_cosines(q: DiagonalGaussian | FullGaussian, weight: Tensor, phase: Tensor) -> Tensor:
    r"""Return :math:`\EE_q[\cos(w_j^\top z + b_j)] = \cos(m_j)\, e^{-v_j / 2}`, ``[B, J]``.

    It is the real part of a Gaussian's characteristic function, with m and v the mean and variance of what the cosine
    is taken of.

    Raises
    ------
    InputError
        for a posterior that is not one Gaussian.
    """
    _one_gaussian(q, "the mean of a cosine", "a decoder that is linear in z")
    mean, variance = q.linear_moments(weight)
    return (mean + phase).cos() * (-0.5 * variance).exp()


def covariances_of_cosines(
    q: DiagonalGaussian | FullGaussian, weight: Tensor, phase: Tensor, i: Tensor, j: Tensor
) -> Tensor:
    r"""Return :math:`\operatorname{Cov}_q[\cos u_i, \cos u_j]` of :math:`u = W z + b` for some pairs, ``[B, P]``.

    With the means m and the covariance C of u it is :math:`\tfrac12 e^{-(C_{ii} + C_{jj}) / 2}
    [\cos(m_i + m_j) (e^{-C_{ij}} - 1) + \cos(m_i - m_j) (e^{C_{ij}} - 1)]`: no difference of two large numbers, also
    where q is narrow.

    Parameters
    ----------
    weight, phase
        W ``[J, D]`` and b ``[J]``.
    i, j
        the pairs, ``[P]`` each.

    Raises
    ------
    InputError
        for a posterior that is not one Gaussian.
    """
    _one_gaussian(q, "the covariance of two cosines", "a decoder that is linear in z")
    mean, variance = q.linear_moments(weight)
    mean, half = mean + phase, -0.5 * (variance[:, i] + variance[:, j])
    covariance = (q.linear_moments(weight[i] + weight[j])[1] - q.linear_moments(weight[i] - weight[j])[1]) / 4

    def grown(c: Tensor) -> Tensor:
        """Return e^half (e^c - 1), whose factors may not fit where c is large."""
        over, under = c.clamp_min(0), c.clamp_max(0)
        return torch.where(c < 0, half.exp() * under.expm1(), -(half + over).exp() * (-over).expm1())

    total, gap = (mean[:, i] + mean[:, j]).cos(), (mean[:, i] - mean[:, j]).cos()
    return 0.5 * (total * grown(-covariance) + gap * grown(covariance))


def elbo(joint: Callable[..., Tensor], x: Tensor, q) -> Tensor:
    r"""Return the ELBO :math:`\mathbb E_q[\log p(x \mid z)] - \mathrm{KL}(q \,\|\, p(z))` in closed form, ``[B]``.

    Introduced in book/03-silent-gradients.ipynb.

    Parameters
    ----------
    joint
        a model with the method ``expected_log_likelihood(x, q)``, or whose ``decode`` has it, such as
        :class:`vaelib.models.LinearGaussian` or a joint made of a :class:`vaelib.models.LinearDecoder`.
    x
        observations, ``[B, X]``.
    q
        a posterior of the same family as the prior.

    Raises
    ------
    InputError
        if the likelihood or the divergence has no closed form.
    """
    q = as_posterior(q)
    for part in (joint, getattr(joint, "decode", None)):
        if hasattr(part, "expected_log_likelihood"):
            expected, kl = part.expected_log_likelihood(x, q), divergence(joint, q)
            check_closed(joint, part, x, q)
            check_form(q, "linear_moments")
            if expected.shape != x.shape[:1]:
                raise InputError(
                    f"expected_log_likelihood(x, q) of a {type(part).__name__} must return one number for each "
                    f"observation, [B] = {list(x.shape[:1])}, but returned {list(expected.shape)}"
                )
            return expected - kl
    raise InputError(
        f"{type(getattr(joint, 'decode', joint)).__name__} has no closed form of E_q[log p(x given z)], which needs a "
        "log-likelihood quadratic in z: the log(1 + e^l) of Bernoulli pixels is not, nor is anything behind a hidden "
        "layer (but for cosines); estimate it with a row of the tableau such as elbo-path, or decode with a "
        "models.LinearDecoder or models.CosineDecoder"
    )


def check_closed(joint: nn.Module, part: nn.Module, x: Tensor, q: Posterior) -> None:
    """Raise InputError unless the closed form of ``part`` is the expectation of the joint's log p(x given z).

    Of a q that is all at one point it is log p(x given z) there. It is tried where it is ours, and another part of the
    model is not.
    """
    parts = joint, getattr(joint, "decode", joint)
    ours = all(type(one).__module__.startswith("vaelib.") for one in parts)
    if ours or tracing() or not is_ours(type(part), "expected_log_likelihood"):
        return
    if not isinstance(q, DiagonalGaussian | FullGaussian | Mixture | Discrete) or not hasattr(joint, "log_prior"):
        return
    with torch.no_grad():
        z, point = at_one_point(q)
        told = joint(x, z) - joint.log_prior(z)
        closed = part.expected_log_likelihood(x, point)
    if not torch.allclose(told[0], closed, rtol=1e-3, atol=1e-3):
        raise InputError(
            f"the likelihood of this {type(joint).__name__} is not that of its {type(part).__name__}, whose "
            "expectation has a closed form: redefine expected_log_likelihood(x, q) too, or use a row of the tableau "
            "such as elbo-path"
        )


def at_one_point(q: DiagonalGaussian | FullGaussian | Mixture | Discrete) -> tuple[Tensor, Posterior]:
    """Return a z of each observation that q may draw, ``[1, B, D]``, and a q that is all there."""
    if isinstance(q, Discrete):
        z = q.sample(torch.full_like(q.mean, 0.5).unsqueeze(0))
        return z, q.map_parameters(lambda logits: (200 * z - 100).view_as(logits))
    return q.mean.unsqueeze(0), DiagonalGaussian(q.mean, torch.full_like(q.mean, -30.0))


def exact(joint: Callable[..., Tensor], q, x: Tensor, eps: Tensor | None) -> Tensor:
    """Return minus :func:`elbo`, ``[B]``; there is no noise."""
    return -elbo(joint, x, q)


ELBO = LossEstimator(
    "elbo-silent", "elbo", "elbo", 1, "shao2025", exact, "For linear Gaussian decoders: no draws, the closed form."
)
"""The silent gradient as an estimator, without noise: ``objectives.backward(silent.ELBO, joint, q, x, None)``."""


# --- beside a nonlinear decoder ---------------------------------------------------------------------------------------


def linear(done: float) -> float:
    r""":math:`1 - t`."""
    return 1.0 - min(done, 1.0)


def cosine(done: float) -> float:
    r""":math:`\tfrac12 (1 + \cos \pi t)`."""
    return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


def exponential(done: float) -> float:
    r""":math:`e^{-5 t}`, and 0 from t = 1."""
    return math.exp(-5.0 * done) if done < 1.0 else 0.0


SCHEDULES: dict[str, Callable[[float], float]] = {"linear": linear, "cosine": cosine, "exponential": exponential}
"""How the weight of the guide goes from 1 to 0 while the fraction done t goes from 0 to 1, by name."""


def annealed(base: Estimator, weight: float, guide: Estimator = ELBO) -> LossEstimator:
    r"""Return the estimator that lets a linear decoder guide the encoder with weight :math:`\lambda`.

    .. math:: \partial_\phi: \quad \lambda\, \partial_\phi \mathcal L_{\text{linear}}
        + (1 - \lambda)\, \partial_\phi \mathcal L_{\text{model}}(\varepsilon)

    while each decoder learns from its own term alone, with weight 1 (after Shao et al. 2025, whose schedule and
    weights are not published). The value is the bound of the model. The gradient in the encoder is biased for the
    model's bound unless :math:`\lambda = 0`; then the linear decoder rests, and this is ``base``.
    Train with it by giving :func:`vaelib.training.fit` in the place of an estimator
    ``lambda progress: annealed(base, SCHEDULES["linear"](2 * progress.done))``.
    Introduced in book/04-silent-and-nonlinear.ipynb.

    Parameters
    ----------
    base
        how the model's own gradient is estimated, an estimator of the ELBO.
    weight
        :math:`\lambda`, from 0 to 1.
    guide
        how the linear decoder's is: in closed form, or, to learn what that is worth, from draws like ``base``.

    Raises
    ------
    InputError
        for a weight outside of 0 to 1, or an estimator that is not of the ELBO.
    """
    between("the weight of the guide", weight, 0, 1)
    _of_elbo(base), _of_elbo(guide)

    def loss(joint: Callable[..., Tensor], q, x: Tensor, eps: Tensor) -> Tensor:
        _guided(joint)
        model = base.loss(joint.joint, scaled_gradient(q, 1 - weight), x, eps)
        if weight == 0:
            return model
        linear = guide.loss(joint.guide, scaled_gradient(q, weight), x, eps)
        return model + linear - linear.detach()

    target = base.target if weight == 0 else None
    return LossEstimator(f"elbo-annealed({weight:g})", "elbo", target, base.least_k, "shao2025", loss)


Control = Callable[[Estimator, Any, Any, Tensor, Tensor], Tensor]
"""``(base, joint, q, x, eps) -> [B]``: a loss whose gradient in q has the mean 0."""


def linear_control(base: Estimator, joint: Callable[..., Tensor], q, x: Tensor, eps: Tensor) -> Tensor:
    """Return the loss of the linear decoder as ``base`` estimates it, less the exact one, ``[B]``."""
    still = stop_gradient(joint.guide)
    return base.loss(still, q, x, eps) + elbo(still, x, q)


def taylor_control(
    base: Estimator, joint: Callable[..., Tensor], q: DiagonalGaussian, x: Tensor, eps: Tensor
) -> Tensor:
    r"""Return a loss with the gradient of the model's own second-order expansion around the mean of q, ``[B]``.

    With :math:`f(z) = \log p(x \mid z)` and :math:`\delta = \sigma \varepsilon`, it has the gradient
    :math:`H(\mu)\, \delta` in :math:`\mu` and :math:`\partial f(\mu)\, \delta` in :math:`\log \sigma`, up to a sign,
    whose means are 0. (Miller et al. 2017; the part of second order in the scale would need the diagonal of H, and is
    left out.) It asks nothing of the likelihood but two derivatives, and costs about two more passes through the
    decoder. Introduced in book/04-silent-and-nonlinear.ipynb.
    """
    if not isinstance(q, DiagonalGaussian):
        raise InputError(
            f"the expansion around the mean is for a DiagonalGaussian posterior, but this one is a {type(q).__name__}: "
            "use linear_control"
        )
    model, still = stop_gradient(joint.joint), q.stop_gradient()
    delta = still.sample(eps) - still.mean
    slope, curvature = jvp(
        grad(lambda z: model.log_likelihood(x, z).sum()), (still.mean.expand_as(delta).contiguous(),), (delta,)
    )
    return -(curvature.detach() * q.mean + (slope * delta).detach() * q.log_std).sum(-1).mean(0)


def controlled(base: Estimator, scale: float, control: Control = linear_control) -> LossEstimator:
    r"""Return ``base`` with the silent gradient of a linear decoder as its control variate.

    .. math:: g(\varepsilon) - c\, \big( g_{\text{linear}}(\varepsilon) - \EE[g_{\text{linear}}] \big)

    The two gradients of the linear decoder, one estimated from the same draws and the other exact, have the same mean,
    so that the encoder's gradient is unbiased for every scale c that does not depend on these draws, whatever the
    linear decoder is. The linear decoder learns its own bound meanwhile; the model's own gradient is that of ``base``.
    Introduced in book/04-silent-and-nonlinear.ipynb.

    Parameters
    ----------
    base
        any estimator of the ELBO that is unbiased.
    scale
        c; the best one is :math:`\operatorname{Cov} / \Var`, see :class:`TrackedScale`.
    control
        what stands in the brackets, :func:`linear_control` or :func:`taylor_control`.

    Raises
    ------
    InputError
        if ``base`` is not an estimator of the ELBO, or the model has no linear decoder.
    """
    _of_elbo(base)

    def loss(joint: Callable[..., Tensor], q, x: Tensor, eps: Tensor) -> Tensor:
        _guided(joint)
        model = base.loss(joint.joint, q, x, eps)
        rest = -scale * control(base, joint, q, x, eps)
        if control is linear_control:  # the guide learns
            rest = rest - elbo(joint.guide, x, q.stop_gradient())
        return model + rest - rest.detach()

    return LossEstimator(f"elbo-controlled({scale:.3g})", "elbo", base.target, base.least_k, "miller2017", loss)


def covariances(
    base: Estimator, joint: Callable[..., Tensor], q, x: Tensor, eps: Tensor, control: Control = linear_control
) -> tuple[float, float]:
    r"""Return :math:`\sum_i g_i h_i` and :math:`\sum_i h_i^2`, of which the best scale of a control variate is made.

    Here g is the gradient of ``base`` and h that of the control, in the numbers that q is made of, and
    :math:`\EE[h] = 0`, so that the ratio of the two means is :math:`c^* = \operatorname{Cov}[g, h] / \Var[h]`.
    """
    still = stop_gradient(joint)
    q, leaves = remade(of_tensors(q), lambda p: p.detach().requires_grad_())
    with torch.enable_grad():
        g = torch.autograd.grad(base.loss(still.joint, q, x, eps).sum(), leaves)
        h = torch.autograd.grad(control(base, still, q, x, eps).sum(), leaves)
    return sum((a * b).sum().item() for a, b in zip(g, h, strict=True)), sum(b.square().sum().item() for b in h)


class TrackedScale:
    r"""The estimator for each step of a training, :func:`controlled` with the scale that has been best of late.

    A look at it is :math:`\sum g \cdot h / \sum h \cdot h` (:func:`covariances`) for images and noise of its own, and
    the scale a running average of looks: of these ratios, since their two parts shrink by orders of magnitude while
    training goes on. It does not depend on the draws that it scales, so that the gradient stays unbiased; the price is
    two more gradients every few steps. Give it to :func:`vaelib.training.fit` in the place of an estimator. Introduced
    in book/04-silent-and-nonlinear.ipynb.

    Parameters
    ----------
    base, control
        as for :func:`controlled`.
    model
        the model in training.
    x
        some training images, ``[B, X]``.
    k
        draws of each.
    every, memory
        how many steps lie between two looks, and how much of the average is left after one.
    generator
        draws the noise.

    Attributes
    ----------
    scale : float
        c as it stands.
    """

    def __init__(
        self,
        base: Estimator,
        model: Any,
        x: Tensor,
        k: int = 1,
        *,
        control: Control = linear_control,
        every: int = 20,
        memory: float = 0.5,
        generator: torch.Generator | None = None,
    ) -> None:
        self.base, self.model, self.x, self.k, self.control = base, model, x, k, control
        self.every, self.memory, self.generator = every, memory, generator
        self.calls, self.scale = 0, 0.0

    def __call__(self, progress: Any = None) -> LossEstimator:
        """Return the estimator for the next step, and look at the scale again every few calls."""
        if self.calls % self.every == 0:
            q = as_posterior(stop_gradient(self.model.encoder)(self.x))  # its batch norms do not count these images
            eps = q.noise(self.k, self.generator)
            covariance, variance = covariances(self.base, self.model.joint, q, self.x, eps, self.control)
            kept = self.memory if self.calls else 0.0
            self.scale = kept * self.scale + (1 - kept) * (covariance / variance if variance else 0.0)
        self.calls += 1
        return controlled(self.base, self.scale, self.control)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold of it."""
        generator = None if self.generator is None else self.generator.get_state()
        return {"calls": self.calls, "scale": self.scale, "generator": generator}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.calls, self.scale = state["calls"], state["scale"]
        if self.generator is not None:
            self.generator.set_state(state["generator"])


def scaled_gradient(q: Posterior, factor: float) -> Posterior:
    r"""Return the same posterior, but f times the gradient goes back: :math:`\bar\phi + f(\phi-\bar\phi)`."""
    return of_tensors(q).map_parameters(
        lambda p: torch.where(p.isinf(), p.detach(), p.detach() + factor * (p - p.detach()).nan_to_num(0.0))
    )


def of_tensors(q: Any) -> Posterior:
    """Return a posterior that is made of its parameters alone, or raise InputError."""
    q = as_posterior(q)
    if next(functions_in(q), None) is not None:
        raise InputError(
            f"a guide is for a posterior that is made of numbers alone, but a {type(q).__name__} has a network inside: "
            "use DiagonalGaussian, FullGaussian, or bits or choices"
        )
    return q


def _one_gaussian(q, what: str, instead: str) -> None:
    if not isinstance(q, DiagonalGaussian | FullGaussian):
        raise InputError(
            f"{what} has a closed form for a Gaussian posterior, but this one is a {type(q).__name__}: use "
            f"DiagonalGaussian or FullGaussian, or {instead}"
        )


def _of_elbo(estimator: Estimator) -> None:
    if estimator.bound != "elbo":
        raise InputError(
            f"estimator '{estimator.name}' is of the bound '{estimator.bound}', but a linear decoder's closed form "
            "is that of the ELBO: use elbo-path, elbo-total, elbo-score-loo or another one of the ELBO"
        )


def _guided(joint: Callable[..., Tensor]) -> None:
    if not hasattr(joint, "guide"):
        raise InputError(
            f"this estimator needs a linear decoder beside the model's own, but {type(joint).__name__} has none: "
            "use models.Guided(joint, guide), or the model 'guided'"
        )
