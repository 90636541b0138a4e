r"""Posteriors that come from outside: converted into ours, adapted, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, distributions, nn

from vaelib.errors import InputError
from vaelib.posteriors.base import Latent, Noise, Posterior
from vaelib.posteriors.discrete import FactorisedBernoulli, OneHotCategorical
from vaelib.posteriors.gaussian import DiagonalGaussian, FullGaussian, Mixture
from vaelib.posteriors.stopping import stop_gradient

CONTRACT = (
    "noise_like", "noise", "sample", "log_prob", "log_prob_of_sample", "sample_and_log_prob", "log_share", "strata",
    "density_moves", "map_parameters", "means", "detaches",
)  # fmt: skip


@dataclass(frozen=True)
class OwnNoise:
    """The noise that a posterior of another class draws by itself."""

    q: Any
    k: int

    def draw(self, generator: torch.Generator | None = None) -> Latent:
        """Draw it."""
        return self.q.noise(self.k, generator)


def draws_by_itself(q: Posterior) -> bool:
    """Whether the noise of q is not what its ``noise_like`` says, so that no other q of its form could draw it."""
    return isinstance(q, Adapted) or type(q).noise is not Posterior.noise


class Adapted(Posterior):
    """A posterior of another class, with what it does not say from :class:`Posterior`; it goes by its name."""

    def __init__(self, q: Any) -> None:
        self.q = q
        for name in CONTRACT:
            if hasattr(q, name):
                setattr(self, name, getattr(q, name))
        if not hasattr(q, "noise_like"):
            self.noise_like = partial(OwnNoise, q)

    def __getattr__(self, name: str) -> Any:
        if "q" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.q, name)

    def stop_gradient(self) -> Posterior:
        """Return the same posterior with its parameters held constant, as its own class does it."""
        return as_posterior(self.q.stop_gradient())


@cache
def adapted(kind: type) -> type[Adapted]:
    """Return the class of adapted posteriors that has the name of theirs, for messages."""
    return type(kind.__name__, (Adapted,), {"__module__": kind.__module__})


def as_posterior(q: Any) -> Posterior:
    """Return a posterior of this package for what an encoder returned.

    Ours stay as they are. The families of ``torch.distributions`` that have a counterpart here are converted:
    ``Normal`` (also ``Independent``), ``MultivariateNormal``, ``LowRankMultivariateNormal``, ``MixtureSameFamily`` of
    these, ``Bernoulli`` and ``OneHotCategorical``, each with the observations on its first axis; and what a flow of
    `zuko <https://zuko.readthedocs.io>`_ returns for a context, ``flow(x)``. Another object serves if it has the
    methods ``noise``, ``sample``, ``log_prob`` and ``stop_gradient`` (:class:`vaelib.posteriors.Posterior` says what
    they are to do).

    Raises
    ------
    InputError
        for anything else.
    """
    if isinstance(q, Posterior):
        return q
    if isinstance(q, distributions.Distribution):
        return convert(q)
    if isinstance(q, nn.Module) and _is(q, "zuko", type(q).__name__):
        raise InputError(f"q is zuko's {type(q).__name__} itself: call it with what it is to see of x, flow(x)")
    missing = [
        name for name in ("noise", "sample", "log_prob", "stop_gradient") if not callable(getattr(q, name, None))
    ]
    if missing:
        raise InputError(
            f"q must be a posterior, as an encoder returns it, but is a {type(q).__name__}, which has no "
            f"{' and no '.join(missing)}: give one of vaelib.posteriors, such as DiagonalGaussian(mean, log_std)"
        )
    return adapted(type(q))(q)


def convert(q: distributions.Distribution) -> Posterior:
    """Return our posterior for a distribution of torch.

    Raises
    ------
    InputError
        if it has no counterpart; a subclass of one that has need not be the same thing.
    """
    if _is(q, "zuko", "NormalizingFlow"):
        return flow(q)
    if type(q) not in CONVERSIONS:
        names, name = ", ".join(family.__name__ for family in CONVERSIONS), f"torch.distributions.{type(q).__name__}"
        if base := next((family.__name__ for family in type(q).__mro__ if family in CONVERSIONS), None):
            name = f"{type(q).__name__}, a subclass of {base} whose density may be another one,"
        raise InputError(
            f"a {name} has no counterpart in vaelib: take one of {names}, a flow of zuko, or a posterior of "
            "vaelib.posteriors"
        )
    if not q.batch_shape:
        raise InputError(
            f"this {type(q).__name__} is one distribution of the shape {list(q.event_shape)}, but q must have the "
            "observations on axis 0: see what Independent(..., n) takes for a part of z"
        )
    return CONVERSIONS[type(q)](q)


def _is(q: Any, package: str, name: str) -> bool:
    """Whether q is of a class of a package that need not be here."""
    return type(q).__name__ == name and type(q).__module__.partition(".")[0] == package


@dataclass(frozen=True)
class ZukoFlow(Posterior):
    r"""A flow of zuko: a Gaussian :math:`z_0` and a transform T *from* z *to* it, :math:`z = T^{-1}(z_0)`.

    .. math:: \log q(z) = \log q_0(T(z)) + \log|\det \partial T(z) / \partial z|

    It is evaluated at z and not by the noise, since zuko inverts some transforms by bisection, to six digits.

    Parameters
    ----------
    base
        the Gaussian of :math:`z_0`, ``[B, D]``.
    transform
        the transform; what it sees of x is inside it.
    """

    base: DiagonalGaussian
    transform: distributions.Transform

    def noise_like(self, k: int) -> Noise:
        """Return standard normal noise, ``[K, B, D]``."""
        return self.base.noise_like(k)

    def sample(self, eps: Tensor) -> Tensor:
        """Return z, ``[K, B, D]``."""
        return self.transform.inv(self.base.sample(eps))

    def log_prob(self, z: Tensor) -> Tensor:
        """Return log q(z), ``[K, B]``."""
        start, log_det = self.transform.call_and_ladj(z)
        return self.base.log_prob(start) + log_det

    def means(self) -> tuple[Tensor, ...]:
        """Return where the mean of the Gaussian ends, which stands for the mean."""
        return (self.sample(torch.zeros_like(self.base.mean).unsqueeze(0))[0],)

    def map_parameters(self, function: Callable[[Tensor], Tensor]) -> ZukoFlow:
        """Raise InputError: what it sees of x is out of reach."""
        raise InputError(
            "a flow of zuko keeps what it sees of x inside functions, so that it has no coordinates to measure in: "
            "measure the gradient of the encoder's weights, or take a flow of vaelib.flows"
        )

    def stop_gradient(self) -> ZukoFlow:
        """Return the same flow with the parameters of the Gaussian and of the transform held constant."""
        return replace(self, base=self.base.stop_gradient(), transform=stop_gradient(self.transform))


def flow(q: Any) -> ZukoFlow:
    """Return our flow for the distribution that one of zuko gives."""
    base = q.base.base_dist if isinstance(q.base, distributions.Independent) else q.base
    if type(base) is not distributions.Normal:
        raise InputError(f"a flow of zuko must start from a Gaussian, but this one's base is a {type(base).__name__}")
    if base.loc.ndim != 2:
        raise InputError(
            "a flow of zuko must be one for each observation, but this one's base has the shape "
            f"{list(base.loc.shape)} and not [B, D]: give it a context, flow(x), or repeat it, flow().expand([len(x)])"
        )
    parts = getattr(q.transform, "transforms", [q.transform])
    if any(_is(part, "zuko", "FreeFormJacobianTransform") for part in parts):
        raise InputError(
            "a continuous flow of zuko (CNF) cannot be held constant, since it differentiates in its parameters "
            "whenever it is evaluated: take one of layers, such as MAF, NSF or RealNVP"
        )
    return ZukoFlow(gaussian(base), q.transform)


def mixture(q: distributions.MixtureSameFamily) -> Mixture:
    """Return the mixture of converted components, ``[B, C, ...]`` there, C of ``[B, ...]`` here."""
    parts = q.component_distribution
    if len(parts.event_shape) != 1:
        raise InputError(
            f"the components of a mixture must be distributions of whole z, but one has the event shape "
            f"{list(parts.event_shape)}: wrap them as Independent(Normal(...), 1), or give them multivariate ones"
        )
    parts = parts.base_dist if type(parts) is distributions.Independent else parts
    if type(parts) not in COMPONENTS:
        names = ", ".join(family.__name__ for family in COMPONENTS)
        raise InputError(f"the components of a mixture must be one of {names}, not {type(parts).__name__}")
    family, parameters = COMPONENTS[type(parts)]
    (logits,) = _shaped(q, q.mixture_distribution.logits)
    pairs = zip(*(parameter.unbind(1) for parameter in parameters(parts)), strict=True)
    return Mixture(tuple(family(*pair) for pair in pairs), logits.mT)


def _shaped(q: distributions.Distribution, *parameters: Tensor, axes: tuple[int, ...] = (2, 2)) -> tuple[Tensor, ...]:
    for parameter, expected in zip(parameters, axes, strict=False):
        if parameter.ndim != expected:
            raise InputError(
                f"the parameters of a {type(q).__name__} must have the observations on axis 0 and the coordinates of z "
                f"on the next, {expected} axes, but one has the shape {list(parameter.shape)}"
            )
    return parameters


COMPONENTS: dict[type, tuple[type, Callable[[Any], tuple[Tensor, Tensor]]]] = {
    distributions.Normal: (DiagonalGaussian, lambda q: (q.loc, q.scale.log())),
    distributions.MultivariateNormal: (FullGaussian, lambda q: (q.loc, q.scale_tril)),
    distributions.LowRankMultivariateNormal: (FullGaussian, lambda q: (q.loc, q.scale_tril)),
}
"""Our Gaussian for each of torch's, and its parameters."""


def gaussian(q: distributions.Distribution) -> Posterior:
    """Return our Gaussian."""
    family, parameters = COMPONENTS[type(q)]
    return family(*_shaped(q, *parameters(q), axes=(2, 2) if family is DiagonalGaussian else (2, 3)))


CONVERSIONS: dict[type, Callable[[Any], Posterior]] = {
    **dict.fromkeys(COMPONENTS, gaussian),
    distributions.MixtureSameFamily: mixture,
    distributions.Bernoulli: lambda q: FactorisedBernoulli(*_shaped(q, q.logits)),
    distributions.OneHotCategorical: lambda q: OneHotCategorical(
        *_shaped(q, q.logits if q.logits.ndim > 2 else q.logits.unsqueeze(1), axes=(3,))
    ),
    distributions.Independent: lambda q: convert(q.base_dist),
}
"""How each family of torch's becomes one of ours."""
