r"""What a posterior is: the contract that every q of this package keeps, and that a q of your own can be tried on.

==============================  ========================  ==========================================================
``noise_like(k)``               what that noise is        kind, shape, dtype and device, before it is drawn
``noise(k, generator)``         eps, ``[K, B, D]``        the noise that samples are made of
``sample(eps)``                 z = t(eps, phi)           differentiable in phi (the *path*), or not at all
``log_prob(z)``                 log q(z | x), ``[K, B]``  differentiable in phi (the *score*) and in z
``log_prob_of_sample(z, eps)``  log q(z), ``[K, B]``      where z is the sample of eps, live or held constant
``sample_and_log_prob(eps)``    both of one draw          without inverting q, so also where q is narrow
``stop_gradient()``             the same q                phi held constant; still differentiable in z
``map_parameters(f)``           the same kind of q        with f applied to each parameter ``[B, ...]``
``log_share(k)``                0, or ``[K, B]``          the log of what a draw counts, if not all count alike
``strata``                      1, or more                draws come in multiples of this number
``means()``                     a tuple of ``[B, D]``     where each stochastic layer is centred
``density_moves(z, eps)``       true or false             whether log q has parameters that need a path
``detaches``                    false                     true for a stop that is meant to hold too much (chapter 2)
==============================  ========================  ==========================================================

A latent of several stochastic layers is a tuple ``(z1, z2, ...)``, and so is its noise. A posterior that can say the
mean and the variance of linear functions of z has a method ``linear_moments(weight)`` besides; this is all that an
exact expectation under a linear decoder asks for (see :mod:`vaelib.estimators.silent`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from vaelib.errors import InputError, whole_number

Latent = Tensor | tuple[Tensor, ...]
"""A sample or its noise: one tensor ``[K, B, D]``, or one for each stochastic layer."""

LOG_2PI = math.log(2 * math.pi)


def map_latent(function: Callable[[Tensor], Tensor], z: Latent) -> Latent:
    """Apply ``function`` to every stochastic layer of ``z``."""
    return tuple(function(layer) for layer in z) if isinstance(z, tuple) else function(z)


def layers_of(z: Latent) -> tuple[Tensor, ...]:
    """Return the stochastic layers of ``z``, one or more."""
    return z if isinstance(z, tuple) else (z,)


def draws(z: Latent) -> int:
    """Return the number of draws K of a sample or its noise."""
    return layers_of(z)[0].shape[0]


def standard_normal_log_prob(z: Tensor) -> Tensor:
    r"""Return :math:`\log \mathcal N(z; 0, I)`, summed over the last axis: ``[..., D] -> [...]``."""
    return torch.rsub(z.square().sum(-1), -0.5 * z.shape[-1] * LOG_2PI, alpha=0.5)  # the minus and the half in one


def times(weight: Tensor, value: Tensor) -> Tensor:
    """Return ``weight * value``, and 0 wherever the weight is, whatever the value: the 0 log 0 of an entropy."""
    return weight * value.masked_fill(weight == 0, 0.0)


def is_ours(kind: type, name: str) -> bool:
    """Whether a class has a method of that name, or what stands for it, from this package."""
    owner = next((each for each in kind.__mro__ if name in vars(each)), None)
    return owner is not None and owner.__module__.startswith("vaelib.")


def redefines_half(kind: type, whole: str, part: str) -> bool:
    """Whether a class has ``whole`` anew, but from this package ``part``, which is to say the same."""
    return hasattr(kind, whole) and is_ours(kind, part) and not is_ours(kind, whole)


def tracing() -> bool:
    """Whether tensors have no values to look at: under a transform of ``torch.func``, or while a graph is traced."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or _get_current_dispatch_mode() is not None
        or torch.compiler.is_compiling()
    )


def inside_vmap() -> bool:
    """Whether the innermost transform is ``vmap``, inside which tensors do not say that they require a gradient."""
    return innermost() == torch._C._functorch.TransformType.Vmap


def in_forward_mode(z: Latent) -> bool:
    """Whether ``z`` is differentiated on the way forward, by ``jvp`` or dual numbers."""
    jvp = innermost() == torch._C._functorch.TransformType.Jvp
    return jvp or any(forward_ad.unpack_dual(layer).tangent is not None for layer in layers_of(z))


def innermost() -> Any:
    """The kind of the innermost transform of ``torch.func``; None outside of any."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return None if interpreter is None else interpreter.key()


# --- noise ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """The noise of one stochastic layer before it is drawn: "normal" or "uniform" on (0, 1), and its tensor's form."""

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def like(cls, kind: str, k: int, tensor: Tensor) -> Noise:
        """Return the noise of ``k`` draws for each entry of ``tensor`` ``[B, D]``, ``[K, B, D]``."""
        whole_number("the number of draws k", k, least=1)
        return cls(kind, (k, *tensor.shape), tensor.dtype, tensor.device)

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw it; of the uniform noise none is 0."""
        options = {"generator": generator, "dtype": self.dtype, "device": self.device}
        if self.kind == "normal":
            return torch.randn(self.shape, **options)
        return torch.rand(self.shape, **options).clamp_min(torch.finfo(self.dtype).tiny)


def draw(noise: Noise | tuple[Noise, ...], generator: torch.Generator | None = None) -> Latent:
    """Draw the noise of every stochastic layer, in their order."""
    if strange := [layer for layer in layers_of(noise) if not hasattr(layer, "draw")]:
        raise InputError(
            "noise_like(k) must return the noise of a layer, such as Noise.like('normal', k, self.mean), or a tuple of "
            f"one for each, but returns a {type(strange[0]).__name__}"
        )
    return map_latent(lambda layer: layer.draw(generator), noise)


# --- the contract -----------------------------------------------------------------------------------------------------


class Posterior:
    """The base of all posteriors; one of your own inherits what it does not say itself.

    It must define ``noise_like``, ``sample`` and ``log_prob``. A dataclass whose fields are tensors with the
    observations on axis 0 gets ``map_parameters`` and ``stop_gradient`` for free.
    """

    strata = 1
    """Draws come in multiples of this number."""

    detaches = False
    """Whether stopping it on purpose also holds constant what it should not; no estimator then is what it says."""

    def at_least(self, k: int) -> int:
        """Return the smallest number of draws that is ``k`` or more and a multiple of the strata."""
        return -(-k // self.strata) * self.strata

    def noise_like(self, k: int) -> Noise | tuple[Noise, ...]:
        """Return the noise that ``k`` draws are made of, before it is drawn."""
        raise NotImplementedError

    def noise(self, k: int, generator: torch.Generator | None = None) -> Latent:
        """Draw the noise for ``k`` draws, ``[K, B, D]``."""
        return draw(self.noise_like(k), generator)

    def sample(self, eps: Latent) -> Latent:
        """Return z = t(eps, phi)."""
        raise NotImplementedError

    def log_prob(self, z: Latent) -> Tensor:
        """Return log q(z), ``[K, B]``."""
        raise NotImplementedError

    def log_prob_of_sample(self, z: Latent, eps: Latent) -> Tensor:
        r"""Return :math:`\log q(z)` at the value that :meth:`sample` makes of ``eps``, ``[K, B]``.

        z may be live or held constant, and so may q: as a function of both it is :meth:`log_prob`. A family that can
        do without inverting :math:`t` says so here, and its value does not suffer where q is narrow.
        """
        return self.log_prob(z)

    def density_moves(self, z: Latent, eps: Latent) -> bool:
        """Whether log q(z) moves with parameters whose gradient a path has to bring."""
        return self.log_prob_of_sample(z, eps).requires_grad

    def sample_and_log_prob(self, eps: Latent) -> tuple[Latent, Tensor]:
        """Return z and log q(z), both live in phi."""
        z = self.sample(eps)
        return z, self.log_prob_of_sample(z, eps)

    def means(self) -> tuple[Tensor, ...]:
        """Return where each stochastic layer is centred, ``[B, D]`` each."""
        if not hasattr(self, "mean"):
            raise InputError(
                f"a {type(self).__name__} does not say where it is centred, which active units and pictures of the "
                "latent space ask for: give it a property mean, [B, D]"
            )
        return (self.mean,)

    def log_share(self, k: int) -> Tensor | float:
        """Return the log of what each of ``k`` draws counts: 0, all count alike."""
        return 0.0

    def map_parameters(self, function: Callable[[Tensor], Tensor]) -> Any:
        """Return the same kind of posterior with ``function`` applied to each parameter, observations on axis 0.

        Raises
        ------
        InputError
            if the posterior has no parameters to be told.
        """
        values = vars(self) if is_dataclass(self) else {}
        if not values or not all(isinstance(value, Tensor) for value in values.values()):
            raise InputError(
                f"a {type(self).__name__} does not say which numbers it is made of, so that none can be held constant "
                "or differentiated: give it a method map_parameters(function)"
            )
        return replace(self, **{name: function(value) for name, value in values.items()})

    def stop_gradient(self) -> Any:
        """Return the same posterior with its parameters held constant."""
        return self.map_parameters(Tensor.detach)
