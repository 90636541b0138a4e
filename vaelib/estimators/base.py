r"""What an estimator is: a loss, whose value is minus a bound and whose gradient is the estimator of the bound's.

Everything that trains or measures needs nothing else of it, of whatever kind it is: ``estimator.loss(joint, q, x,
eps)`` is a pure function, so that ``loss.mean().backward()`` is a step of training (:func:`vaelib.objectives.backward`)
and ``vmap(grad(loss))`` gives the gradient of every single draw (:mod:`vaelib.gradients`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vaelib.bounds import BOUNDS
from vaelib.errors import InputError, choose, typed
from vaelib.posteriors import Adapted, Latent, Posterior, draws, layers_of, ready, tracing

TARGETS = {"elbo": "the ELBO", "iwae": "the importance-weighted bound", "wake": "the wake-phase update of the encoder"}
"""What an estimator's gradient can be that of, on average."""


@dataclass(frozen=True)
class Estimator:
    """A gradient estimator. Introduced in book/02-score-and-path.ipynb.

    Attributes
    ----------
    name
        its name here and on the command line.
    bound
        the bound whose value it reports, a key of :data:`vaelib.bounds.BOUNDS`.
    target
        what it is unbiased for, a key of :data:`TARGETS`, or None.
    least_k
        the smallest number of draws it is defined for.
    reference
        where it comes from, a key of the bibliography.
    """

    name: str
    bound: str
    target: str | None
    least_k: int
    reference: str

    def __post_init__(self) -> None:
        choose("bound", self.bound, BOUNDS)
        if self.target is not None:
            choose("target", self.target, TARGETS)

    @property
    def summary(self) -> str:
        """What it does, in a line."""
        return ""

    def loss(self, joint: Callable[[Tensor, Latent], Tensor], q: Any, x: Tensor, eps: Latent | None) -> Tensor:
        r"""Return ``-bound``, ``[B]``, as a pure function whose gradient is the estimator.

        Parameters
        ----------
        joint
            called as ``joint(x, z)``, returns :math:`\log p_\theta(x, z)`, ``[K, B]``.
        q
            the posterior that an encoder returned for ``x`` (see :mod:`vaelib.posteriors`).
        x
            observations, ``[B, ...]``.
        eps
            the noise of K draws, ``[K, B, D]`` or one such tensor a stochastic layer; ``q.noise(k, generator)``. None
            for an estimator without draws, such as ``elbo-silent`` and ``elbo-exact``.

        Raises
        ------
        InputError
            if the estimator is not defined for this K or this posterior, if q is no posterior or not the same function
            each time, if x, q and eps are not of the same observations, or if the joint density does not have the
            shape ``[K, B]``, changes its arguments, or mixes draws or observations up.
        """
        loss = self.differentiate(joint, self.checked(joint, q, x, eps), x, eps)
        if loss.shape != x.shape[:1]:
            raise InputError(
                f"the loss of estimator '{self.name}' must be of the shape [B] = {list(x.shape[:1])}, one value for "
                f"each observation, but is {list(loss.shape)}"
            )
        return loss

    def reference_loss(self, joint: Callable[..., Tensor], q: Any, x: Tensor, eps: Latent | None) -> Tensor:
        """Return the same loss in the form that shows what it is, and that :meth:`loss` is held to; slower."""
        return self.differentiate_by_channels(joint, self.checked(joint, q, x, eps), x, eps)

    def checked(self, joint: Callable[..., Tensor], q: Any, x: Tensor, eps: Latent | None) -> Posterior:
        """Return q as a posterior that the estimator can rely on, or say what does not go together."""
        if not callable(joint):
            raise InputError(f"joint must be a function joint(x, z) that returns log p(x, z), but is {joint!r}")
        check_observations(x)
        if not len(x):
            raise InputError(f"there are no observations: x has the shape {list(x.shape)}")
        if eps is not None:
            check_layers(eps)
        q = ready(q, eps)
        if eps is not None:
            self.check(draws(eps))
            check_noise(q, x, eps)
        return q

    def differentiate(self, joint: Callable[..., Tensor], q: Posterior, x: Tensor, eps: Latent | None) -> Tensor:
        """Return the loss; :meth:`loss` has seen to its arguments."""
        raise NotImplementedError

    def differentiate_by_channels(self, joint: Callable[..., Tensor], q: Posterior, x: Tensor, eps: Latent) -> Tensor:
        """Return the loss; an estimator without channels has but the one form."""
        return self.differentiate(joint, q, x, eps)

    def value(self, log_w: Tensor, log_share: Tensor | float = 0.0) -> Tensor:
        """Return the bound that it reports, ``[K, B] -> [B]``."""
        return BOUNDS[self.bound](log_w, log_share)

    def check(self, k: int) -> None:
        """Raise InputError if the estimator is not defined for ``k`` draws."""
        if k < self.least_k:
            raise InputError(
                f"estimator '{self.name}' needs {typed('k')} >= {self.least_k} draws, but {typed('k')} is {k}"
            )


@dataclass(frozen=True)
class LossEstimator(Estimator):
    """An estimator that is given by its loss: no row of the tableau, since it is not a weight for each draw's log w.

    Attributes
    ----------
    function
        ``(joint, q, x, eps) -> [B]``, the loss.
    summary
        what it does, in a line.
    """

    function: Callable[..., Tensor]
    summary: str = ""

    def differentiate(self, joint: Callable[..., Tensor], q: Posterior, x: Tensor, eps: Latent | None) -> Tensor:
        """Return the loss."""
        return self.function(joint, q, x, eps)


def check_observations(x: Tensor) -> None:
    """Raise InputError unless ``x`` is a tensor of observations."""
    if not isinstance(x, Tensor) or not x.ndim:
        found = "of the shape []" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise InputError(f"x must be a tensor of observations [B, ...], but is {found}")


def check_layers(eps: Latent) -> None:
    """Raise InputError unless ``eps`` is a tensor, or a tuple of them for the same draws and observations."""
    layers = layers_of(eps)
    if not layers or not all(isinstance(layer, Tensor) for layer in layers):
        raise InputError(
            "the noise eps must be a tensor, or a tuple of one for each stochastic layer, but is of type "
            f"{type(eps).__name__}: use q.noise(k, generator)"
        )
    if len({layer.shape[:2] for layer in layers}) > 1:
        raise InputError(
            "the noise of all stochastic layers must be of the same draws and observations, [K, B, ...], but that of "
            f"eps has the shapes {[list(layer.shape) for layer in layers]}: use q.noise(k, generator)"
        )


def check_noise(q: Posterior, x: Tensor, eps: Latent) -> None:
    """Raise InputError unless ``eps`` is noise of q for the observations ``x``."""
    first = layers_of(eps)[0]
    if first.ndim > 1 and first.shape[1] != len(x):
        raise InputError(
            f"x has {len(x)} observations, but q (or its noise eps) is of {first.shape[1]}: give both of one batch"
        )
    if isinstance(eps, Tensor) and not isinstance(q, Adapted):
        expected = q.noise_like(len(eps))
        if eps.ndim != 3 or eps.shape[-1] != expected.shape[-1] or eps.dtype != expected.dtype:
            raise InputError(
                f"the noise of a {type(q).__name__} is {expected.kind}, [K, B, {expected.shape[-1]}] of "
                f"{expected.dtype}, but eps has the shape {list(eps.shape)} and is {eps.dtype}: "
                "use q.noise(k, generator)"
            )
        if expected.kind == "uniform" and not tracing():
            low, high = eps.aminmax()
            if low < 0 or high > 1:
                raise InputError(
                    f"the noise of a {type(q).__name__} is uniform on (0, 1), but eps is from {low:.3g} to {high:.3g}: "
                    "use q.noise(k, generator)"
                )
